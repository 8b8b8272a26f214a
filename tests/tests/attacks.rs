//! The list of attacks names tests that exist.

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

fn has_test(file: &Path, name: &str) -> bool {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.split("#[test]").skip(1).any(|after| after.trim_start().starts_with(&format!("fn {name}()")))
}

/// `file::test` of an end-to-end test, `crate::test` of one beside the code.
fn exists(test: &str) -> bool {
    let (place, name) = test.split_once("::").unwrap_or_else(|| panic!("{test:?} names no test"));
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = [root.join(format!("tests/{place}.rs")), root.join(format!("policy/tests/{place}.rs"))];
    let beside = ["src", "tests"].map(|part| root.parent().unwrap().join(place).join(part));
    let beside = beside.iter().filter(|_| place != "tests").flat_map(|part| sources(part));
    files.into_iter().chain(beside).any(|file| has_test(&file, name))
}

/// Rows without a test, rows that only a machine of their own tries, and places in the tests where something may be
/// skipped. None of them grows unnoticed: whoever adds one says so here.
const REASONS: usize = 2;
const ELSEWHERE: usize = 5;
const SKIPS: usize = 16;

/// Places where a test of this directory skips something, but for tests that need root.
fn skips() -> usize {
    let all = sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests"));
    // Not in so many words, or this line would be one.
    let signs = [concat!("\"skip", "ped"), concat!("needs", "_kernel!(")];
    let count = |text: &str| signs.iter().map(|sign| text.matches(sign).count()).sum::<usize>();
    all.iter().map(|file| count(&fs::read_to_string(file).unwrap_or_default())).sum()
}

#[test]
fn every_attack_has_a_test_that_exists() {
    let table = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("attacks.md"));
    let Ok(table) = table else {
        println!("skipped: this machine has no source to look at");
        return;
    };
    let mut ids = BTreeSet::new();
    let mut missing = Vec::new();
    let (mut reasons, mut elsewhere) = (Vec::new(), Vec::new());
    for line in table.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| id")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [id, attack, tests] = cells[..] else { panic!("a row has three cells: {line}") };
        assert!(!attack.is_empty() && ids.insert(id.to_owned()), "{line}");
        let named: Vec<&str> = tests.split('`').skip(1).step_by(2).collect();
        assert!(!named.is_empty() || tests.len() > 20, "neither a test nor a reason: {line}");
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
