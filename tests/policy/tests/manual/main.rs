//! The reference and the schema for editors: written from the types, and as the parser is.

mod render;
mod shape;
mod values;

use arbitrary::Unstructured;
use bpfgate_policy_tests::generate::{self, Node};
use bpfgate_policy_tests::{bytes, parse};
use jsonschema::Validator;
use std::fs;
use std::path::PathBuf;

fn policies() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../policies")
}

fn read(name: &str) -> String {
    fs::read_to_string(policies().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[test]
#[ignore = "writes what the others check: make reference"]
fn write() {
    fs::write(policies().join("policy.schema.json"), render::schema()).unwrap();
    let old = read("README.md");
    fs::write(policies().join("README.md"), render::reference(&old)).unwrap();
}

#[test]
fn reference_and_schema_say_what_the_types_say() {
    assert!(
        read("policy.schema.json") == render::schema(),
        "policy.schema.json is not of these types; run: make reference"
    );
    let reference = read("README.md");
    assert!(
        reference == render::reference(&reference),
        "README.md is not of these types; run: make reference"
    );
}

#[test]
fn every_key_stands_in_the_reference() {
    let reference = read("README.md");
    for (name, table) in shape::tables() {
        for key in table.keys {
            let row = reference.lines().any(|line| {
                line.starts_with(&format!("| `{}` |", key.name))
                    && line.ends_with(&format!("| {} |", key.doc))
            });
            assert!(row, "{} of {name} has no row in the reference", key.name);
        }
    }
}

/// The examples of the reference, each as a file of its own.
fn examples() -> Vec<String> {
    let text = read("README.md");
    let mut all = Vec::new();
    for block in text.split("```toml\n").skip(1) {
        let example = block.split_once("```").expect("a block ends").0;
        let object = example.split_once("objects.").and_then(|(_, rest)| rest.split(['.', ']']).next());
        let mut whole = String::new();
        if !example.contains("version =") {
            whole += "version = 1\n";
        }
        whole += example;
        if let Some(object) = object.filter(|object| !example.contains(&format!("[objects.{object}]\n"))) {
            whole.extend(["[objects.", object, "]\npath = \"/o\"\n"]);
        }
        all.push(whole);
    }
    all
}

#[test]
fn the_examples_of_the_reference_are_policies() {
    let schema = schema();
    let examples = examples();
    assert!(examples.len() >= 14, "{}", examples.len());
    for example in examples {
        parse(&example).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(refusal(&schema, &example), None, "{example}");
    }
}

fn schema() -> Validator {
    let schema: serde_json::Value = serde_json::from_str(&render::schema()).unwrap();
    jsonschema::draft7::meta::validate(&schema).expect("the schema is one");
    jsonschema::draft7::new(&schema).unwrap()
}

/// Why an editor underlines something in this file.
fn refusal(schema: &Validator, text: &str) -> Option<String> {
    let file: toml::Table = toml::from_str(text).ok()?;
    schema
        .validate(&serde_json::to_value(file).unwrap())
        .err()
        .map(|error| format!("{}: {error}", error.instance_path()))
}

#[test]
fn the_schema_takes_the_policies_of_the_tree_and_random_ones() {
    let schema = schema();
    for entry in fs::read_dir(policies()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            assert_eq!(refusal(&schema, &fs::read_to_string(&path).unwrap()), None, "{}", path.display());
        }
    }
    for seed in 0..1000 {
        let node = generate::policy(&mut Unstructured::new(&bytes(seed, 2048))).unwrap();
        let text = node.to_text();
        assert_eq!(refusal(&schema, &text), None, "{text}");
        let printed = parse(&text).unwrap().toml().to_string();
        assert_eq!(refusal(&schema, &printed), None, "{printed}");
    }
}

/// Files in which a value is replaced by something odd, or a key is missing.
fn spoiled(node: &Node) -> Vec<Node> {
    let odd = [
        "",
        "a b",
        "/",
        "/../x",
        "9x",
        "own",
        "x:y",
        "no such",
        "é",
        &"x".repeat(300),
        "a.service",
        "-.slice",
        "6",
        "1.2",
    ];
    let mut all: Vec<Node> = match node {
        Node::Text(_) => odd
            .iter()
            .map(|text| Node::Text((*text).to_owned()))
            .chain([Node::Number(1), Node::Flag(true)])
            .collect(),
        Node::Number(_) => [0, -1, 1, 65534, 1 << 41, i64::MIN]
            .map(Node::Number)
            .into_iter()
            .chain([Node::Text("1".into())])
            .collect(),
        Node::Flag(_) => vec![Node::Number(1), Node::Flag(true), Node::Flag(false)],
        _ => Vec::new(),
    };
    let within = |entries: &Vec<(String, Node)>, make: &dyn Fn(Vec<(String, Node)>) -> Node| {
        let mut made = vec![make([&entries[..], &[("nosuch".to_owned(), Node::Number(1))]].concat())];
        for (i, (_, value)) in entries.iter().enumerate() {
            for spoilt in spoiled(value) {
                let mut changed = entries.clone();
                changed[i].1 = spoilt;
                made.push(make(changed));
            }
        }
        made
    };
    match node {
        Node::Table(entries) => all.extend(within(entries, &Node::Table)),
        Node::Inline(entries) => all.extend(within(entries, &Node::Inline)),
        Node::List(items) => {
            for (i, item) in items.iter().enumerate() {
                all.extend(spoiled(item).into_iter().map(|spoilt| {
                    let mut changed = items.clone();
                    changed[i] = spoilt;
                    Node::List(changed)
                }));
            }
        }
        _ => {}
    }
    all
}

/// What the parser takes, no editor underlines; and of what the parser refuses, an editor shows most.
#[test]
fn the_schema_refuses_only_what_the_parser_refuses() {
    let schema = schema();
    let (mut taken, mut both, mut parser_alone) = (0, 0, 0);
    for seed in 0..4 {
        let node = generate::policy(&mut Unstructured::new(&bytes(seed, 2048))).unwrap();
        let shortened = node.shortened().into_iter().map(|(_, shorter)| shorter);
        for changed in spoiled(&node).into_iter().chain(shortened) {
            let text = changed.to_text();
            match (parse(&text), refusal(&schema, &text)) {
                (Ok(_), None) => taken += 1,
                (Ok(_), Some(why)) => panic!("the schema refuses, and the parser does not: {why}\n{text}"),
                (Err(_), Some(_)) => both += 1,
                (Err(_), None) => parser_alone += 1,
            }
        }
    }
    println!("{taken} taken by both, {both} refused by both, {parser_alone} by the parser alone");
    assert!(both > 5 * parser_alone && taken > 100, "{taken} {both} {parser_alone}");
}

#[test]
fn the_schema_refuses_a_table_of_bad_ones() {
    let schema = schema();
    let object = "[objects.o]\npath = \"/o\"\n";
    for text in [
        String::new(),
        "version = 2\n".to_owned(),
        "version = 1\nfoo = 1\n".to_owned(),
        "version = 1\n[[client]]\nmay = [\"load\"]\n".to_owned(),
        "version = 1\n[[client]]\nUser = 1\nmay = [\"load\"]\n".to_owned(),
        "version = 1\n[[client]]\nuser = -1\nmay = [\"load\"]\n".to_owned(),
        "version = 1\n[[client]]\nuser = 65534\nmay = [\"load\"]\n".to_owned(),
        "version = 1\n[[client]]\nuser = 1\nmay = [\"everything\"]\n".to_owned(),
        "version = 1\n[[client]]\nuser = 1\nmay = []\n".to_owned(),
        "version = 1\n[[client]]\nuser = 1\nmaps = [\"m\"]\nmay = [\"load\"]\n".to_owned(),
        "version = 1\n[[client]]\nslice = \"a.slice\"\nuser = 1\nmay = [\"load\"]\n".to_owned(),
        "version = 1\n[[client]]\nunit = \"a.scope\"\nmay = [\"load\"]\n".to_owned(),
        "version = 1\n[objects.o]\n".to_owned(),
        "version = 1\n[objects.o]\npath = \"o\"\n".to_owned(),
        "version = 1\n[objects.O]\npath = \"/o\"\n".to_owned(),
        "version = 1\n[limits]\nprograms = 65\n".to_owned(),
        "version = 1\n[limits]\nmap_memory = \"12 parsecs\"\n".to_owned(),
        "version = 1\n[lifetime]\nkeep = \"forever\"\n".to_owned(),
        "version = 1\n[require]\nkernel = \"6\"\n".to_owned(),
        format!("version = 1\n{object}sha256 = \"abc\"\n"),
        format!("version = 1\n{object}[[objects.o.xdp]]\nprogram = \"p\"\ninterfaces = []\n"),
        format!("version = 1\n{object}[[objects.o.xdp]]\nprogram = \"p\"\ninterfaces = [\"[ab]\"]\n"),
        format!("version = 1\n{object}[[objects.o.xdp]]\nprogram = \"p\"\ninterfaces = [\"a\", \"a\"]\n"),
        format!("version = 1\n{object}[[objects.o.kprobe]]\nprogram = \"p\"\n"),
        format!("version = 1\n{object}[[objects.o.tracepoint]]\nprogram = \"p\"\nevents = [\"x\"]\n"),
        format!(
            "version = 1\n{object}[[objects.o.tracepoint]]\nprogram = \"p\"\nevents = [\"a:x\"]\nlink_fd = true\n"
        ),
        format!("version = 1\n{object}[[objects.o.raw_tracepoint]]\nprogram = \"p\"\nevents = [\"a:x\"]\n"),
        format!("version = 1\n{object}[objects.o.maps]\nm = \"read-only\"\n"),
        format!("version = 1\n{object}[objects.o.globals]\ng = {{ min = 1 }}\n"),
        format!("version = 1\n{object}[objects.o.helpers]\nallow = [\"bpf_map_lookup_elem\"]\n"),
    ] {
        assert!(parse(&text).is_err(), "the parser takes {text}");
        assert!(refusal(&schema, &text).is_some(), "the schema takes {text}");
    }
}
