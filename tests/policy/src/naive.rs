//! A second evaluator, written from policies/README.md alone: loops over the TOML of a file that is known to be valid.
//!
//! It shares no code with `authorize`, and is as slow as it likes. Where they differ, one of them is wrong.

use crate::accounts;
use crate::requests::{Asked, Request};
use bpfgate_protocol::messages::helper::Target;
use bpfgate_protocol::names::ProgramName;
use std::collections::BTreeSet;
use toml::{Table, Value};

/// What the answer has to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Yes, and what was allowed, in words.
    Allowed(Vec<String>),
    /// No: `Denied`, `Invalid`, or one of both where there is a reason for each.
    Refused {
        /// Something is not in the policy.
        denied: bool,
        /// Something is allowed, but not as it was asked for.
        invalid: bool,
    },
}

const DENIED: Verdict = Verdict::Refused { denied: true, invalid: false };
const INVALID: Verdict = Verdict::Refused { denied: false, invalid: true };

/// Decides about a request.
pub fn evaluate(file: &Table, asked: &Asked) -> Verdict {
    // "A client has the rights of every entry that is for it; a client with no entry is refused."
    let roles: Vec<&Value> = list(file, "client").iter().filter(|entry| is_for(entry, asked)).collect();
    if roles.is_empty() {
        return DENIED;
    }
    let may = |right: &str| roles.iter().any(|role| texts(role, "may").contains(&right));
    match &asked.request {
        Request::Open => Verdict::Allowed(vec![]),
        Request::Right(right) => {
            if may(&right.to_string()) {
                Verdict::Allowed(vec![])
            } else {
                DENIED
            }
        }
        Request::Load { object, programs, globals } => match object_of(file, object.as_str()) {
            Some(object) if may("load") => {
                let programs: Vec<&str> = programs.iter().map(ProgramName::as_str).collect();
                let globals: Vec<(&str, i128)> = globals.iter().map(|g| (g.name.as_str(), g.value)).collect();
                load(object, &programs, &globals)
            }
            _ => DENIED,
        },
        Request::Attach { object, program, kind, target } => match object_of(file, object.as_str()) {
            Some(object) if may("attach") => {
                let attaching = roles.iter().filter(|role| texts(role, "may").contains(&"attach"));
                let unit = { attaching }.find_map(|role| role.get("unit")?.as_str());
                attach(object, program.as_str(), *kind, target, unit)
            }
            _ => DENIED,
        },
        Request::Map { object, map } => {
            let Some(object) = object_of(file, object.as_str()) else { return DENIED };
            let access = object.get("maps").and_then(|maps| maps.get(map.as_str()));
            let access = access.and_then(Value::as_str).unwrap_or("none");
            let names = |role: &Value, key: &str| texts(role, key).contains(&map.as_str());
            let gives = |role: &&&Value| {
                texts(role, "may").contains(&"maps") && (role.get("maps").is_none() || names(role, "maps"))
            };
            let giving: Vec<&&Value> = roles.iter().filter(gives).collect();
            if giving.is_empty() || access == "none" {
                return DENIED;
            }
            // A client that another entry gives the descriptor has it.
            let by_proxy = giving.iter().all(|role| names(role, "proxy"));
            Verdict::Allowed(vec![if by_proxy { "proxy" } else { access }.to_owned()])
        }
    }
}

fn list<'a>(table: &'a Table, key: &str) -> &'a [Value] {
    table.get(key).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn texts<'a>(value: &'a Value, key: &str) -> Vec<&'a str> {
    let items = value.get(key).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    items.iter().filter_map(Value::as_str).collect()
}

fn object_of<'a>(file: &'a Table, name: &str) -> Option<&'a Value> {
    file.get("objects")?.get(name)
}

/// "Every condition of an entry must hold."
fn is_for(entry: &Value, asked: &Asked) -> bool {
    let accounts = accounts();
    let peer = &asked.peer;
    let number = |value: &Value, names: &std::collections::BTreeMap<String, u32>| match value {
        Value::Integer(number) => *number,
        Value::String(name) => i64::from(names[name]),
        _ => -1,
    };
    let nobody = |id: i64| id == 65534 || id == i64::from(u32::MAX);
    let user = entry.get("user").is_none_or(|user| {
        let user = number(user, &accounts.users);
        user == i64::from(peer.uid) && !nobody(user)
    });
    let group = entry.get("group").is_none_or(|group| {
        let group = number(group, &accounts.groups);
        let groups = [&[peer.gid][..], &peer.groups].concat();
        groups.iter().any(|id| i64::from(*id) == group) && !nobody(group)
    });
    let unit = entry.get("unit").and_then(Value::as_str).is_none_or(|unit| {
        let slice = entry.get("slice").and_then(Value::as_str).map_or_else(|| slice_of(unit), str::to_owned);
        peer.units.iter().any(|own| own.name.as_str() == unit && own.slice.as_str() == slice)
    });
    user && group && unit
}

/// Where the service manager puts a unit that does not say.
fn slice_of(unit: &str) -> String {
    match unit.split_once('@') {
        Some((template, _)) => format!("system-{}.slice", template.replace('-', "\\x2d")),
        None => "system.slice".to_owned(),
    }
}

/// All entries of all hooks, or of one, that are of this program.
fn rules<'a>(object: &'a Value, hook: Option<&str>, program: Option<&str>) -> Vec<(String, &'a Value)> {
    let mut all = Vec::new();
    for key in crate::generate::HOOKS {
        if hook.is_some_and(|hook| hook != key) {
            continue;
        }
        for rule in object.get(key).and_then(Value::as_array).map_or(&[][..], Vec::as_slice) {
            if program.is_none_or(|program| rule.get("program").and_then(Value::as_str) == Some(program)) {
                all.push((key.to_owned(), rule));
            }
        }
    }
    all
}

fn flag(rule: &Value, key: &str) -> bool {
    rule.get(key).and_then(Value::as_bool).unwrap_or(false)
}

fn load(object: &Value, programs: &[&str], globals: &[(&str, i128)]) -> Verdict {
    let all = rules(object, None, None);
    let known: BTreeSet<&str> = all.iter().filter_map(|(_, rule)| rule.get("program")?.as_str()).collect();
    let (mut denied, mut invalid) = (false, false);
    for (i, program) in programs.iter().enumerate() {
        denied |= !known.contains(program);
        invalid |= programs[..i].contains(program);
    }
    denied |= known.is_empty();
    for (i, (name, value)) in globals.iter().enumerate() {
        invalid |= globals[..i].iter().any(|(earlier, _)| earlier == name);
        match object.get("globals").and_then(|globals| globals.get(name)) {
            None => denied = true,
            Some(range) => {
                let end = |key: &str| i128::from(range.get(key).and_then(Value::as_integer).unwrap_or(0));
                invalid |= *value < end("min") || *value > end("max");
            }
        }
    }
    if denied || invalid {
        return Verdict::Refused { denied, invalid };
    }
    let chosen = known.iter().filter(|name| programs.is_empty() || programs.contains(name));
    let with_fd =
        |name: &str| rules(object, None, Some(name)).iter().any(|(_, rule)| flag(rule, "program_fd"));
    let words =
        chosen.map(|name| if with_fd(name) { format!("{name} and its fd") } else { (*name).to_owned() });
    Verdict::Allowed(words.collect())
}

fn attach(
    object: &Value,
    program: &str,
    kind: Option<bpfgate_protocol::hooks::Kind>,
    target: &Target,
    own: Option<&str>,
) -> Verdict {
    let hook = kind.map(|kind| kind.row().key);
    let mut targets = Vec::new();
    let mut pattern = false;
    for (hook, rule) in rules(object, hook, Some(program)) {
        let how = how(&hook, rule);
        let binary = rule.get("binary").and_then(Value::as_str).unwrap_or_default();
        let function = rule.get("function").and_then(Value::as_str);
        targets.extend(function.map(|text| ("functions", String::new(), text.to_owned(), how.clone())));
        for key in ["interfaces", "cgroups", "events", "symbols", "functions"] {
            for text in texts(rule, key) {
                pattern |=
                    key == "interfaces" && text.contains(['*', '?']) || text == "own" && key == "cgroups";
                targets.push((key, binary.to_owned(), text.to_owned(), how.clone()));
            }
        }
    }
    let allowed = |target: String, how: &str| Verdict::Allowed(vec![target, how.to_owned()]);
    if *target == Target::Only {
        return match &targets[..] {
            _ if pattern => INVALID,
            [] => DENIED,
            [(key, binary, text, how)] => {
                let target = if *key == "symbols" { format!("{binary}:{text}") } else { text.clone() };
                allowed(target, how)
            }
            _ => INVALID,
        };
    }
    for (key, binary, text, how) in &targets {
        let fits = match (target, *key) {
            (Target::Interface(name), "interfaces") => fits(text.as_bytes(), name.as_str().as_bytes()),
            (Target::Cgroup(path), "cgroups") => path.as_str() == text,
            (Target::Own, "cgroups") if text == "own" => match own {
                Some(unit) => return allowed(format!("the cgroup of {unit}"), how),
                None => false,
            },
            (Target::Event(event), "events") => event.as_str() == text,
            (Target::Function(name), "functions") => name.as_str() == text,
            (Target::Symbol { binary: b, symbol }, "symbols") => {
                b.as_str() == binary && symbol.as_str() == text
            }
            _ => false,
        };
        if fits {
            return allowed(target.to_string(), how);
        }
    }
    DENIED
}

/// What an entry says beside its targets, with its defaults.
fn how(hook: &str, rule: &Value) -> String {
    let word = |key: &str, default: &str| rule.get(key).and_then(Value::as_str).unwrap_or(default).to_owned();
    let option = match hook {
        "xdp" => word("mode", "any"),
        "tcx" => format!("{} {}", word("direction", ""), word("order", "last")),
        "cgroup_skb" => word("direction", ""),
        "uprobe" | "kprobe" if flag(rule, "return") => "return".to_owned(),
        _ => String::new(),
    };
    format!("{hook} {option} {}", if flag(rule, "link_fd") { "link_fd" } else { "" })
}

/// "`*` is any run of characters, `?` any one."
fn fits(pattern: &[u8], name: &[u8]) -> bool {
    match pattern {
        [] => name.is_empty(),
        [b'*', rest @ ..] => (0..=name.len()).any(|skipped| fits(rest, &name[skipped..])),
        [b'?', rest @ ..] => !name.is_empty() && fits(rest, &name[1..]),
        [literal, rest @ ..] => name.first() == Some(literal) && fits(rest, &name[1..]),
    }
}
