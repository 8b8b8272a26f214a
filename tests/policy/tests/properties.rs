//! Properties of a thousand random policies, the same ones in every run.

use arbitrary::Unstructured;
use bpfgate_policy_tests::generate::{self, Node};
use bpfgate_policy_tests::power::{Names, Power, no_more};
use bpfgate_policy_tests::requests::asked;
use bpfgate_policy_tests::targets::{decide, evaluator, printer};
use bpfgate_policy_tests::{bytes, parse};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

const POLICIES: u64 = 1000;

fn random(seed: u64) -> Node {
    generate::policy(&mut Unstructured::new(&bytes(seed, 2048))).unwrap()
}

#[test]
fn a_random_policy_is_printed_and_read_again() {
    let texts: BTreeSet<String> = (0..POLICIES).map(|seed| random(seed).to_text()).collect();
    assert!(texts.len() > 990, "{} different policies", texts.len());
    (0..POLICIES).for_each(|seed| {
        printer(&bytes(seed, 2048));
    });
}

#[test]
fn both_evaluators_give_the_same_answers() {
    (0..POLICIES).for_each(|seed| {
        evaluator(&bytes(seed, 4096));
    });
}

/// Or the comparison would say little.
#[test]
fn requests_are_allowed_denied_and_invalid() {
    let mut counts = BTreeMap::new();
    for seed in 0..POLICIES {
        let data = bytes(seed, 4096);
        let mut u = Unstructured::new(&data);
        let policy = Arc::new(parse(&generate::policy(&mut u).unwrap().to_text()).unwrap());
        for _ in 0..32 {
            let asked = asked(&mut u, &policy).unwrap();
            let verb = format!("{:?}", asked.request).split([' ', '(']).next().unwrap().to_owned();
            let verdict =
                decide(&policy, &asked).map_or_else(|class| format!("{class:?}"), |_| "Allowed".to_owned());
            *counts.entry((verb, verdict)).or_insert(0) += 1;
        }
    }
    println!("{counts:?}");
    for (verb, verdicts) in [
        ("Open", &["Allowed", "Denied"][..]),
        ("Right", &["Allowed", "Denied"]),
        ("Load", &["Allowed", "Denied", "Invalid"]),
        ("Attach", &["Allowed", "Denied", "Invalid"]),
        ("Map", &["Allowed", "Denied"]),
    ] {
        for verdict in verdicts {
            let count = counts.get(&(verb.to_owned(), (*verdict).to_owned())).copied().unwrap_or(0);
            assert!(count >= 50, "{verb} {verdict}: {count}");
        }
    }
}

/// Keys that take something away, with the objects' names left out: without them a policy allows more, or something
/// else in their place. All others only ever add.
const NARROWING: [&str; 24] = [
    "client.*.group",
    "client.*.maps",
    "client.*.proxy",
    "client.*.proxy.*",
    "client.*.slice",
    "client.*.unit",
    "client.*.user",
    "limits",
    "limits.instructions",
    "limits.links",
    "limits.loads_per_minute",
    "limits.map_memory",
    "limits.maps",
    "limits.programs",
    "netns",
    "objects.kprobe.*.return",
    "objects.sha256",
    "objects.tcx.*.order",
    "objects.uprobe.*.return",
    "objects.xdp.*.mode",
    "require",
    "require.btf",
    "require.kernel",
    "require.landlock",
];

#[test]
fn without_any_one_allow_a_policy_allows_no_more() {
    let mut tried = 0;
    let mut widened: BTreeMap<String, String> = BTreeMap::new();
    for seed in 0..POLICIES / 10 {
        let node = random(seed);
        let whole = parse(&node.to_text()).unwrap();
        let names = Names::of(&whole);
        let power = Power::of(&whole, &names);
        for (mut path, shorter) in node.shortened() {
            let Ok(part) = parse(&shorter.to_text()) else { continue };
            tried += 1;
            if let Err(fact) = no_more(&part, &power, &names) {
                if path[0] == "objects" && path.len() > 1 {
                    path.remove(1);
                }
                widened.entry(path.join(".")).or_insert(fact);
            }
        }
    }
    println!("{tried} shorter policies");
    let without: Vec<&str> = widened.keys().map(String::as_str).collect();
    assert_eq!(without, NARROWING, "{widened:#?}");
}

/// What is left of a text of a policy that is cut off, and allows more than the whole; and what that is.
fn widening_cuts(text: &str, ends: impl Iterator<Item = usize>) -> Vec<(&str, String)> {
    let whole = parse(text).unwrap();
    let names = Names::of(&whole);
    let power = Power::of(&whole, &names);
    let more = |left| Some((left, no_more(&parse(left).ok()?, &power, &names).err()?));
    ends.filter_map(|end| more(text.get(..end)?)).collect()
}

fn line_ends(text: &str) -> impl Iterator<Item = usize> {
    text.match_indices('\n').map(|(at, _)| at + 1)
}

fn assert_no_more(text: &str, ends: impl Iterator<Item = usize>) {
    if let Some((left, fact)) = widening_cuts(text, ends).first() {
        panic!("{fact}\n{left}");
    }
}

#[test]
fn a_printed_policy_that_is_cut_off_allows_no_more() {
    let printed = |seed| parse(&random(seed).to_text()).unwrap().toml().to_string();
    for text in (0..8).map(printed) {
        assert_no_more(&text, 0..text.len());
    }
    for text in (8..100).map(printed) {
        assert_no_more(&text, line_ends(&text));
    }
}

/// And so are the examples: they are written in that order.
#[test]
fn an_example_that_is_cut_off_allows_no_more() {
    let policies = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../policies");
    let mut count = 0;
    for entry in std::fs::read_dir(policies).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            let text = std::fs::read_to_string(path).unwrap();
            assert_no_more(&text, 0..text.len());
            count += 1;
        }
    }
    assert!(count >= 3);
}

/// What is missed where the text ends before it.
const MISSED: [&str; 10] = [
    "btf",
    "instructions",
    "kernel",
    "landlock",
    "links",
    "loads_per_minute",
    "map_memory",
    "maps",
    "order, mode, return",
    "programs",
];

/// In any other order, the keys that widen nothing but what stands above them are missed where the text ends before
/// them: bounds, and how a program is attached to a target that is allowed.
#[test]
fn whatever_the_order_a_cut_gives_nobody_a_right_or_a_target() {
    let mut missed = BTreeMap::new();
    for text in (0..150).map(|seed| random(seed).to_text()) {
        for (_, fact) in widening_cuts(&text, line_ends(&text)) {
            let how = fact.contains(": attach ") || fact.starts_with("at boot: the link of ");
            let key = if how { "order, mode, return" } else { fact.split(": ").next().unwrap() };
            missed.insert(key.to_owned(), fact);
        }
    }
    let keys: Vec<&str> = missed.keys().map(String::as_str).collect();
    assert_eq!(keys, MISSED, "{missed:#?}");
}
