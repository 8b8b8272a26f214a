//! The schema for editors, and the tables of the reference.

use crate::shape::{Key, Kind, Table, tables};
use crate::values::{Values, names_in, values};
use bpfgate_protocol::functions::BY_GRANT;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// policies/policy.schema.json. Draft 7 is what editors know best.
pub(crate) fn schema() -> String {
    let all = tables();
    let mut schema = table_schema("File", &all["File"]);
    let more = json!({
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$id": "https://github.com/bpfgate/bpfgate/raw/main/policies/policy.schema.json",
        "title": "Policy of an app, for bpfgate",
        "definitions": all.iter().filter(|(name, _)| *name != "File").map(|(name, table)| (name.clone(), table_schema(name, table))).collect::<Map<_, _>>(),
    });
    merge(&mut schema, more);
    format!("{schema:#}\n")
}

fn merge(into: &mut Value, more: Value) {
    if let (Value::Object(into), Value::Object(more)) = (into, more) {
        into.extend(more);
    }
}

fn table_schema(name: &str, table: &Table) -> Value {
    let properties: Map<_, _> =
        table.keys.iter().map(|key| (key.name.clone(), key_schema(name, key))).collect();
    let required: Vec<_> = table.keys.iter().filter(|key| key.required).map(|key| &key.name).collect();
    let mut schema = json!({
        "description": table.doc, "type": "object", "additionalProperties": false,
        "properties": properties, "required": required,
    });
    if name == "Client" {
        let maps = json!({"properties": {"may": {"contains": {"const": "maps"}}}});
        merge(
            &mut schema,
            json!({
                "anyOf": [{"required": ["user"]}, {"required": ["group"]}, {"required": ["unit"]}],
                "dependencies": {"slice": ["unit"], "maps": maps, "proxy": maps},
            }),
        );
    }
    schema
}

fn text_schema(values: Values) -> Value {
    match values {
        Values::Words(words) => json!({"type": "string", "enum": words}),
        Values::Name(pattern, _) => json!({"type": "string", "pattern": pattern}),
        Values::Any | Values::Most(_) => json!({"type": "string"}),
    }
}

fn key_schema(table: &str, key: &Key) -> Value {
    let of = |name: &String| json!({"$ref": format!("#/definitions/{name}")});
    let mut schema = match &key.kind {
        Kind::Text => text_schema(values(table, &key.name)),
        Kind::Texts => {
            json!({"type": "array", "items": text_schema(values(table, &key.name)), "uniqueItems": true, "minItems": 1})
        }
        Kind::Integer => match values(table, &key.name) {
            Values::Most(most) => json!({"type": "integer", "minimum": 1, "maximum": most}),
            _ => json!({"type": "integer", "minimum": i64::MIN, "maximum": i64::MAX}),
        },
        Kind::Flag => json!({"type": "boolean"}),
        Kind::Principal => {
            // 65534 and the largest number stand for somebody whom the kernel cannot name.
            let id =
                json!({"type": "integer", "minimum": 0, "maximum": u32::MAX - 1, "not": {"const": 65534}});
            json!({"anyOf": [{"type": "string"}, id]})
        }
        Kind::Size => {
            let Values::Most(most) = values(table, &key.name) else { panic!("a size has an upper end") };
            let text = json!({"type": "string", "pattern": "^[0-9]+\\s*(KiB|MiB|GiB)$"});
            json!({"anyOf": [{"type": "integer", "minimum": 1, "maximum": most}, text]})
        }
        Kind::Table(name) => json!({"allOf": [of(name)]}),
        Kind::Tables(name) => json!({"type": "array", "items": entry(&key.name, of(name))}),
        Kind::TextsByName | Kind::TablesByName(_) => {
            let value = match &key.kind {
                Kind::TablesByName(name) => of(name),
                _ => text_schema(values(table, &key.name)),
            };
            json!({"type": "object", "propertyNames": text_schema(names_in(table, &key.name)), "additionalProperties": value})
        }
    };
    // An empty list of functions allows nothing, and says so.
    if table == "Helpers" {
        let may_repeat = key.name == "allow";
        merge(&mut schema, json!({"minItems": 0, "uniqueItems": !may_repeat}));
    }
    // To say a right twice is no mistake.
    if (table, key.name.as_str()) == ("Client", "may") {
        merge(&mut schema, json!({"uniqueItems": false}));
    }
    merge(&mut schema, json!({"description": key.doc}));
    if let Some(default) = &key.default {
        merge(&mut schema, json!({"default": serde_json::to_value(default).unwrap()}));
    }
    schema
}

/// What an entry of this hook has to be beside its shape.
fn entry(hook: &str, shape: Value) -> Value {
    let events = |pattern: &str| json!({"items": {"pattern": pattern}});
    match hook {
        "raw_tracepoint" => json!({"allOf": [shape, {"properties": {"events": events("^[^:]*$")}}]}),
        "tracepoint" => {
            let never = json!({"const": false});
            json!({"allOf": [shape, {"properties": {"events": events(":"), "link_fd": never}}]})
        }
        _ => shape,
    }
}

fn type_words(kind: &Kind) -> &'static str {
    match kind {
        Kind::Text => "text",
        Kind::Texts => "list of texts",
        Kind::Integer => "integer",
        Kind::Flag => "boolean",
        Kind::Principal | Kind::Size => "text or integer",
        Kind::Table(_) | Kind::TextsByName | Kind::TablesByName(_) => "table",
        Kind::Tables(_) => "tables",
    }
}

fn range(table: &str, key: &Key) -> String {
    let words =
        |words: Vec<String>| words.iter().map(|word| format!("`\"{word}\"`")).collect::<Vec<_>>().join(", ");
    match &key.kind {
        Kind::Flag => "`true`, `false`".to_owned(),
        Kind::Principal => "0 to 4294967294, not 65534; or a name".to_owned(),
        Kind::Table(_) | Kind::Tables(_) => String::new(),
        Kind::TextsByName | Kind::TablesByName(_) => match names_in(table, &key.name) {
            Values::Name(_, sentence) => format!("each key: {sentence}"),
            other => panic!("{other:?}"),
        },
        Kind::Integer | Kind::Text | Kind::Texts | Kind::Size => match values(table, &key.name) {
            Values::Any if key.kind == Kind::Integer => "-2⁶³ to 2⁶³ - 1".to_owned(),
            Values::Any => "any".to_owned(),
            Values::Words(_) if table == "Helpers" => "see above".to_owned(),
            Values::Words(all) => words(all),
            Values::Name(_, sentence) => sentence,
            Values::Most(1) => "`1`".to_owned(),
            Values::Most(most) if key.kind == Kind::Size => format!("1 to {} TiB", most >> 40),
            Values::Most(most) => format!("1 to {most}"),
        },
    }
}

/// The rows of one table: all keys, or those that are asked for.
fn rows(all: &BTreeMap<String, Table>, name: &str, is_wanted: &dyn Fn(&str) -> bool) -> String {
    let table = all.get(name).unwrap_or_else(|| panic!("raw.rs has no {name}"));
    let mut text = "| key | type | default | range | meaning |\n|---|---|---|---|---|\n".to_owned();
    for key in table.keys.iter().filter(|key| is_wanted(&key.name)) {
        let default = match &key.default {
            _ if key.required => "required".to_owned(),
            Some(default) => format!("`{}`", serde_json::to_value(default).unwrap()),
            None => "none".to_owned(),
        };
        let (kind, range) = (type_words(&key.kind), range(name, key).replace('|', "\\|"));
        text.extend([format!(
            "| `{}` | {kind} | {default} | {range} | {} |\n",
            key.name,
            key.doc.replace('|', "\\|")
        )]);
    }
    text
}

const END: &str = "<!-- end -->\n";

/// The reference with its tables filled in. `<!-- keys of NAME -->`, with `: A, B` for some of them or ` but A, B` for
/// the others, and `<!-- functions -->`, stand above a table and `<!-- end -->` below.
pub(crate) fn reference(old: &str) -> String {
    let all = tables();
    let (mut new, mut rest) = (String::new(), old);
    while let Some(start) = rest.find("<!-- ") {
        let (before, after) = rest.split_at(start);
        let (marker, after) = after.split_once('\n').expect("a marker is a line");
        let (_, after) = after.split_once(END).unwrap_or_else(|| panic!("no end of {marker}"));
        let what = marker.trim_start_matches("<!-- ").trim_end_matches(" -->");
        let list = |names: &str| names.split(", ").map(str::to_owned).collect::<Vec<_>>();
        let table = match what.strip_prefix("keys of ") {
            None => functions(),
            Some(keys) => match (keys.split_once(": "), keys.split_once(" but ")) {
                (Some((name, keys)), _) => rows(&all, name, &|key| list(keys).iter().any(|k| k == key)),
                (_, Some((name, keys))) => rows(&all, name, &|key| !list(keys).iter().any(|k| k == key)),
                _ => rows(&all, keys, &|_| true),
            },
        };
        new.extend([before, marker, "\n", &table, END]);
        rest = after;
    }
    new + rest
}

fn functions() -> String {
    let rows = BY_GRANT.iter().map(|(name, why)| format!("| `bpf_{name}` | {why} |\n"));
    format!("| function | because it |\n|---|---|\n{}", rows.collect::<String>())
}
