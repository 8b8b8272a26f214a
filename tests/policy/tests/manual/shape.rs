//! The shape of a policy file, read from protocol/src/policy/raw.rs: what the parser is made of.

use bpfgate_policy_tests::parse;
use std::collections::BTreeMap;
use toml::{Table as Toml, Value};

const RAW: &str = include_str!("../../../../protocol/src/policy/raw.rs");

/// A struct: a table of the file.
#[derive(Debug, Default)]
pub(crate) struct Table {
    pub(crate) doc: String,
    pub(crate) keys: Vec<Key>,
}

/// A field: a key.
#[derive(Debug)]
pub(crate) struct Key {
    pub(crate) name: String,
    pub(crate) doc: String,
    pub(crate) kind: Kind,
    pub(crate) required: bool,
    /// What the parser takes if the key is left out, where that is a value.
    pub(crate) default: Option<Value>,
}

/// What a key holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    Text,
    Texts,
    Integer,
    Flag,
    Principal,
    Size,
    Table(String),
    /// An array of tables.
    Tables(String),
    /// A table in which the user names the keys.
    TextsByName,
    TablesByName(String),
}

fn kind(rust: &str) -> Kind {
    let inside = |prefix: &str| rust.strip_prefix(prefix)?.strip_suffix('>');
    if let Some(inner) = inside("Option<").or_else(|| inside("Spanned<")).or_else(|| inside("Table<")) {
        return kind(inner);
    }
    if let Some(inner) = inside("Vec<") {
        return match kind(inner) {
            Kind::Text => Kind::Texts,
            Kind::Table(table) => Kind::Tables(table),
            other => panic!("a list of {other:?}"),
        };
    }
    if let Some(inner) = inside("BTreeMap<Text, ") {
        return match kind(inner) {
            Kind::Text => Kind::TextsByName,
            Kind::Table(table) => Kind::TablesByName(table),
            other => panic!("a table of {other:?}"),
        };
    }
    match rust {
        "Text" | "String" => Kind::Text,
        "i64" => Kind::Integer,
        "bool" => Kind::Flag,
        "Principal" => Kind::Principal,
        "Size" => Kind::Size,
        table => Kind::Table(table.to_owned()),
    }
}

/// All structs, by name. The text is as rustfmt leaves it; a line of which nothing is known here is an error.
pub(crate) fn tables() -> BTreeMap<String, Table> {
    let mut all: BTreeMap<String, Table> = BTreeMap::new();
    let (mut current, mut doc, mut renamed, mut default, mut in_enum) =
        (None, String::new(), None, false, false);
    for line in RAW.lines() {
        let text = line.trim();
        if in_enum {
            in_enum = text != "}";
        } else if let Some(more) = text.strip_prefix("/// ") {
            doc.extend([if doc.is_empty() { "" } else { " " }, more]);
        } else if let Some(name) = text.strip_prefix("pub(super) struct ") {
            let name = name.trim_end_matches(" {").to_owned();
            all.insert(name.clone(), Table { doc: std::mem::take(&mut doc), keys: vec![] });
            current = Some(name);
        } else if let Some(field) = text.strip_prefix("pub ") {
            let (name, rust) = field.trim_end_matches(',').split_once(": ").expect("a field");
            let key = Key {
                name: renamed.take().unwrap_or(name).to_owned(),
                doc: std::mem::take(&mut doc),
                kind: kind(rust),
                required: !rust.starts_with("Option<") && !std::mem::take(&mut default),
                default: None,
            };
            assert!(key.doc.ends_with('.'), "a sentence about {name} is missing in raw.rs: {:?}", key.doc);
            let table = current.as_ref().and_then(|name| all.get_mut(name)).expect("a field is in a struct");
            table.keys.push(key);
        } else if text.starts_with("pub(super) enum ") {
            in_enum = true;
            doc.clear();
        } else if let Some(attribute) = text.strip_prefix("#[serde(default") {
            default = true;
            renamed = attribute.strip_prefix(", rename = \"").and_then(|rest| rest.strip_suffix("\")]"));
        } else {
            let known = text.is_empty()
                || ["//!", "use ", "#[", "}", "pub(super) type "].iter().any(|p| text.starts_with(p));
            assert!(known, "what is this line of raw.rs? {line:?}");
            assert!(!text.starts_with("#[serde(rename"), "a renamed key without a default: {line:?}");
        }
    }
    let filled = defaults();
    for (name, table) in &mut all {
        for key in &mut table.keys {
            key.default = filled.get(name).and_then(|table| table.get(&key.name)).cloned();
        }
    }
    all
}

/// One entry of everything, with the least keys.
const LEAST: &str = r#"
version = 1
[[client]]
user = 7
may = ["maps"]
[objects.o]
path = "/o"
[[objects.o.xdp]]
program = "a"
interfaces = ["eth0"]
[[objects.o.tcx]]
program = "b"
interfaces = ["eth0"]
direction = "ingress"
[[objects.o.cgroup_skb]]
program = "c"
cgroups = ["/c"]
direction = "ingress"
[[objects.o.raw_tracepoint]]
program = "d"
events = ["e"]
[[objects.o.uprobe]]
program = "e"
binary = "/b"
symbols = ["s"]
[[objects.o.socket_filter]]
program = "f"
[[objects.o.fentry]]
program = "g"
function = "f"
[[objects.o.kprobe]]
program = "h"
functions = ["f"]
"#;

/// Where an entry of a struct is in a file.
type Place<'a> = &'a dyn Fn(&Toml) -> Toml;

/// What the parser fills in where a key is left out: it is asked, and prints what it took.
fn defaults() -> BTreeMap<String, Toml> {
    let written: Toml = toml::from_str(LEAST).unwrap();
    let printed: Toml = toml::from_str(&parse(LEAST).unwrap().toml().to_string()).unwrap();
    let hook = |table: &Toml, key: &str| table["objects"]["o"][key][0].as_table().cloned().unwrap();
    let places: [(&str, Place<'_>); 14] = [
        ("File", &|file| file.clone()),
        ("Client", &|file| file["client"][0].as_table().cloned().unwrap()),
        ("Object", &|file| file["objects"]["o"].as_table().cloned().unwrap()),
        ("Limits", &|file| section(file, "limits")),
        ("Lifetime", &|file| section(file, "lifetime")),
        ("Require", &|file| section(file, "require")),
        ("Xdp", &|file| hook(file, "xdp")),
        ("Tcx", &|file| hook(file, "tcx")),
        ("CgroupSkb", &|file| hook(file, "cgroup_skb")),
        ("Events", &|file| hook(file, "raw_tracepoint")),
        ("Uprobe", &|file| hook(file, "uprobe")),
        ("SocketFilter", &|file| hook(file, "socket_filter")),
        ("Traced", &|file| hook(file, "fentry")),
        ("Kprobe", &|file| hook(file, "kprobe")),
    ];
    let mut all = BTreeMap::new();
    for (name, place) in places {
        let (written, mut printed) = (place(&written), place(&printed));
        printed.retain(|key, value| !written.contains_key(key) && !value.is_table());
        all.insert(name.to_owned(), printed);
    }
    all
}

fn section(file: &Toml, key: &str) -> Toml {
    file.get(key).and_then(Value::as_table).cloned().unwrap_or_default()
}
