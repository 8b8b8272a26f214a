//! The list of attacks, the threat model and the ledger name tests that exist.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Source files below a directory.
fn sources(directory: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            all.push(path);
        }
    }
    all
}

/// The source of everything; not on machines that have only programs.
fn source() -> Option<&'static Path> {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    if !tests.join("Cargo.toml").exists() {
        println!("skipped: this machine has no source to look at");
        return None;
    }
    tests.parent()
}

fn tests_in(file: &Path) -> Vec<String> {
    let text = fs::read_to_string(file).unwrap_or_default();
    let name = |after: &str| Some(after.trim_start().strip_prefix("fn ")?.split_once("()")?.0.to_owned());
    text.split("#[test]").skip(1).filter_map(name).collect()
}

/// `file::test` of an end-to-end test, `crate::test` of one beside the code.
fn exists(test: &str) -> bool {
    let (place, name) = test.split_once("::").unwrap_or_else(|| panic!("{test:?} names no test"));
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = [root.join(format!("tests/{place}.rs")), root.join(format!("policy/tests/{place}.rs"))];
    let beside = ["src", "tests"].map(|part| root.parent().unwrap().join(place).join(part));
    let beside = beside.iter().filter(|_| place != "tests").flat_map(|part| sources(part));
    files.into_iter().chain(beside).any(|file| tests_in(&file).iter().any(|test| test == name))
}

/// Rows without a test, rows that only a machine of their own tries, and places in the tests where something may be
/// skipped. None of them grows unnoticed: whoever adds one says so here.
const REASONS: usize = 3;
const ELSEWHERE: usize = 5;
const SKIPS: usize = 22;

/// Places where a test of this directory skips something, but for tests that need root.
fn skips() -> usize {
    let all = sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests"));
    // Not in so many words, or this line would be one.
    let signs = [concat!("\"skip", "ped"), concat!("needs", "_kernel!("), concat!("is", "_kernel(")];
    let count = |text: &str| signs.iter().map(|sign| text.matches(sign).count()).sum::<usize>();
    all.iter().map(|file| count(&fs::read_to_string(file).unwrap_or_default())).sum()
}

/// What stands in backquotes.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Tests that a text names; other things may be quoted in it, too.
fn named(text: &str) -> Vec<&str> {
    quoted(text).filter(|word| word.contains("::")).collect()
}

/// The cells of each row of the tables in a text, but for headings, whose first cell is this.
fn rows<'a>(text: &'a str, heading: &str) -> Vec<Vec<&'a str>> {
    let cells = |line: &'a str| line.trim_matches('|').split('|').map(str::trim).collect::<Vec<_>>();
    let rows = text.lines().filter(|line| line.starts_with("| ")).map(cells);
    rows.filter(|row| row[0] != heading).collect()
}

#[test]
fn every_attack_has_a_test_that_exists() {
    let Some(root) = source() else { return };
    let table = fs::read_to_string(root.join("tests/attacks.md")).unwrap();
    let mut ids = BTreeSet::new();
    let mut missing = Vec::new();
    let (mut reasons, mut elsewhere) = (Vec::new(), Vec::new());
    for row in rows(&table, "id") {
        let [id, attack, tests] = row[..] else { panic!("a row has three cells: {row:?}") };
        assert!(!attack.is_empty() && ids.insert(id.to_owned()), "{row:?}");
        let named: Vec<&str> = quoted(tests).collect();
        assert!(!named.is_empty() || tests.len() > 20, "neither a test nor a reason: {row:?}");
        match named.as_slice() {
            [] => reasons.push(id),
            all if all.iter().all(|test| test.starts_with("services_")) => elsewhere.push(id),
            _ => {}
        }
        missing.extend(named.into_iter().filter(|test| !exists(test)).map(|test| format!("{id}: {test}")));
    }
    assert!(missing.is_empty(), "these tests do not exist: {missing:#?}");
    let own = ids.iter().filter(|id| id.contains("-A")).count();
    println!("{} attacks, {own} of them our own", ids.len());
    assert!(ids.len() >= 150 && own >= 30, "{} {own}", ids.len());
    println!(
        "{} without a test, {} in machines of their own only, {} skips",
        reasons.len(),
        elsewhere.len(),
        skips()
    );
    assert!(reasons.len() <= REASONS, "these have no test: {reasons:?}");
    assert!(elsewhere.len() <= ELSEWHERE, "these are tried in machines of their own only: {elsewhere:?}");
    assert!(skips() <= SKIPS, "{} places where a test may skip something", skips());
    assert!(!exists("identity::no_such_test") && !exists("no_such_file::no_such_test"));
}

/// The places of a document: its headings, as links name them.
fn places(document: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(document).unwrap_or_default();
    let place = |line: &str| {
        let words = line.strip_prefix('#')?.trim_start_matches('#').trim().to_lowercase();
        Some(words.replace(' ', "-").replace(|c: char| !c.is_alphanumeric() && c != '-', ""))
    };
    text.lines().filter_map(place).collect()
}

/// Links of a document to files and places that are not there.
fn astray(document: &Path) -> Vec<String> {
    let text = fs::read_to_string(document).unwrap();
    let links = text.split("](").skip(1).filter_map(|rest| Some(rest.split_once(')')?.0));
    let leads_nowhere = |link: &&str| {
        let (file, place) = link.split_once('#').unwrap_or((link, ""));
        let file = if file.is_empty() { document.to_owned() } else { document.parent().unwrap().join(file) };
        !file.exists() || !(place.is_empty() || places(&file).contains(place))
    };
    links.filter(|link| !link.contains("://")).filter(leads_nowhere).map(str::to_owned).collect()
}

#[test]
fn every_test_that_the_documents_name_exists() {
    let Some(root) = source() else { return };
    for (name, least) in [("docs/threat-model.md", 90), ("docs/cve-ledger.md", 80), ("tests/attacks.md", 200)]
    {
        let document = root.join(name);
        let text = fs::read_to_string(&document).unwrap();
        // What stands above the first heading says how tests are named.
        let (_, text) = text.split_once("\n## ").unwrap();
        let tests = named(text);
        println!("{name}: {} times a test", tests.len());
        assert!(tests.len() >= least, "{name}: {}", tests.len());
        let missing: Vec<_> = tests.into_iter().filter(|test| !exists(test)).collect();
        assert!(missing.is_empty(), "{name}: these tests do not exist: {missing:#?}");
        assert_eq!(astray(&document), Vec::<String>::new(), "{name}: these links lead nowhere");
    }
    assert_eq!(astray(&root.join("README.md")), Vec::<String>::new(), "README.md: these links lead nowhere");
}

/// From a promise to its tests it is one step: each test that is named after a promise stands there, behind a link to its
/// file, and so does every other.
#[test]
fn every_promise_leads_to_its_tests() {
    let Some(root) = source() else { return };
    let text = fs::read_to_string(root.join("docs/threat-model.md")).unwrap();
    let (_, after) = text.split_once("\n## Promises\n").unwrap();
    let (section, _) = after.split_once("\n## ").unwrap();
    let promises: Vec<&str> = section.split("\n**").skip(1).collect();
    assert_eq!(promises.len(), 11);
    for (number, promise) in (1..).zip(&promises) {
        assert!(promise.starts_with(&format!("{number}. ")), "{promise}");
        for test in named(promise) {
            let (file, _) = test.split_once("::").unwrap();
            assert!(promise.contains(&format!("/tests/{file}.rs)")), "{test} is not behind a link");
        }
    }
    let mut count = 0;
    for file in sources(&root.join("tests/tests")) {
        let stem = file.file_stem().unwrap().to_str().unwrap();
        for test in tests_in(&file) {
            let Some(number) = test.strip_prefix("promise_").and_then(|rest| rest.get(..2)) else { continue };
            let promise = promises[number.parse::<usize>().unwrap() - 1];
            assert!(
                named(promise).contains(&format!("{stem}::{test}").as_str()),
                "{stem}::{test} is not there"
            );
            count += 1;
        }
    }
    println!("{count} tests are named after a promise");
    assert!(count >= 25, "{count}");
}

#[test]
fn every_fault_of_others_has_a_rule_and_a_test() {
    let Some(root) = source() else { return };
    let text = fs::read_to_string(root.join("docs/cve-ledger.md")).unwrap();
    let mut ids = BTreeSet::new();
    for row in rows(&text, "CVE") {
        let [id, fault, rule, tests] = row[..] else { panic!("a row has four cells: {row:?}") };
        let number = id.split(' ').next().unwrap();
        let digits: Vec<&str> = number.strip_prefix("CVE-").unwrap_or_default().split('-').collect();
        let fine = |digits: &&str| digits.len() >= 4 && digits.chars().all(|c| c.is_ascii_digit());
        assert!(digits.len() == 2 && digits.iter().all(fine), "{row:?}");
        assert!(ids.insert(number.to_owned()), "{number} is there twice");
        assert!(fault.len() > 20 && rule.len() > 10, "{row:?}");
        assert!(!named(tests).is_empty() || tests.len() > 20, "neither a test nor a reason: {row:?}");
    }
    println!("{} faults of others", ids.len());
    assert!(ids.len() >= 45, "{}", ids.len());
}
