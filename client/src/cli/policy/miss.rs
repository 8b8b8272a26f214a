//! What was nearest to a yes. That is for people: it is looked for after the verdict and cannot change it.

use super::judge::{Request, rules_of};
use bpfgate_client::Target as ClientTarget;
use bpfgate_protocol::identity::{NEVER, Peer};
use bpfgate_protocol::names::{GlobalName, MapName, ObjectName, ProgramName};
use bpfgate_protocol::policy::report::did_you_mean;
use bpfgate_protocol::policy::{Access, Client, Hook, Object, Policy, Right};

/// What was nearest, with its line.
pub(super) type Miss = (Option<u32>, String);

pub(super) fn misses(policy: &Policy, peer: &Peer, request: &Request) -> Vec<Miss> {
    let (entries, others): (Vec<&Client>, Vec<&Client>) =
        policy.clients.iter().partition(|client| differences(client, peer).is_empty());
    let needed = match request {
        Request::Open => None,
        Request::Load { .. } => Some(Right::Load),
        Request::Attach { .. } => Some(Right::Attach),
        Request::Map { .. } => Some(Right::Maps),
    };
    let has = |client: &Client| needed.is_none_or(|right| client.may.contains(&right));
    let mut misses = Vec::new();
    if !entries.iter().any(|client| has(client)) {
        for client in &entries {
            let may: Vec<String> = client.may.iter().map(|right| format!("\"{right}\"")).collect();
            let why = format!(
                "this entry is for this client, but its may has no \"{}\", only {}",
                needed.map_or_else(String::new, |right| right.to_string()),
                may.join(", ")
            );
            misses.push((Some(client.line), why));
        }
        for client in others.iter().filter(|client| has(client)) {
            let why = format!("this entry is for {}", differences(client, peer).join(", and for "));
            misses.push((Some(client.line), why));
        }
        if policy.clients.is_empty() {
            misses.push((None, "the policy has no [[client]] entry: it is for nobody".to_owned()));
        }
        return misses;
    }
    match request {
        Request::Open => {}
        Request::Load { object, programs, globals } => {
            let Some(rules) = object_or_miss(policy, object, &mut misses) else { return misses };
            for program in programs {
                program_misses(rules, program, &mut misses);
            }
            for global in globals.iter().filter(|global| !rules.globals.contains_key(&global.name)) {
                let names = rules.globals.keys().map(GlobalName::as_str);
                misses
                    .extend(did_you_mean(global.name.as_str(), names).map(|meant| (Some(rules.line), meant)));
            }
        }
        Request::Attach { object, program, target } => {
            let Some(rules) = object_or_miss(policy, object, &mut misses) else { return misses };
            program_misses(rules, program, &mut misses);
            for rule in rules_of(policy, object, program) {
                let word = target.as_ref().map(|word| word.for_program(rule.hook.kind().row().key));
                misses.push((Some(rule.line), hook_miss(&rule.hook, word.as_ref())));
            }
        }
        Request::Map { object, map } => {
            for client in entries.iter().filter(|client| has(client)) {
                if let Some(maps) = client.maps.as_ref().filter(|maps| !maps.contains(map)) {
                    let why = format!("this entry is for this client, but its maps are {}", list(maps));
                    misses.push((Some(client.line), why));
                }
            }
            let Some(rules) = object_or_miss(policy, object, &mut misses) else { return misses };
            match rules.maps.get(map) {
                Some((Access::None, line)) => {
                    misses.push((Some(*line), format!("this says that map {map} is handed to nobody")));
                }
                Some(_) => {}
                None => {
                    let why = did_you_mean(map.as_str(), rules.maps.keys().map(MapName::as_str));
                    let why = why.unwrap_or_else(|| {
                        format!("a map that [objects.{object}.maps] does not name is handed to nobody")
                    });
                    misses.push((Some(rules.line), why));
                }
            }
        }
    }
    misses
}

/// The conditions of an entry that do not hold for this client.
fn differences(client: &Client, peer: &Peer) -> Vec<String> {
    // Every field, so that a new condition is not forgotten here.
    let Client { line: _, user, group, unit, may: _, maps: _, proxy: _ } = client;
    let user = user
        .filter(|uid| !peer.is_user(*uid))
        .map(|uid| format!("uid {uid}, and this is {}", id("uid", peer.uid)));
    let group = group.filter(|gid| !peer.is_in_group(*gid)).map(|gid| {
        let groups: Vec<String> = std::iter::once(id("gid", peer.gid))
            .chain(peer.groups.iter().map(|gid| format!("gid {gid}")))
            .collect();
        format!("gid {gid}, and this client is in {}", list(groups))
    });
    let unit = unit.as_ref().filter(|unit| !peer.is_in_unit(unit)).map(|unit| {
        let own = peer.unit.as_deref().unwrap_or("no unit that was named");
        format!("unit {} in {}, and this client is in {own}", unit.name, unit.slice)
    });
    user.into_iter().chain(group).chain(unit).collect()
}

/// A number of a client, which may be unknown.
fn id(what: &str, number: u32) -> String {
    if NEVER.contains(&number) { format!("an unknown {what}") } else { format!("{what} {number}") }
}

fn object_or_miss<'p>(policy: &'p Policy, object: &ObjectName, misses: &mut Vec<Miss>) -> Option<&'p Object> {
    let found = policy.objects.get(object);
    if found.is_none() {
        let names = || policy.objects.keys().map(ObjectName::as_str);
        let meant = did_you_mean(object.as_str(), names());
        misses.push((None, meant.unwrap_or_else(|| format!("its objects are {}", list(names())))));
    }
    found
}

fn program_misses(rules: &Object, program: &ProgramName, misses: &mut Vec<Miss>) {
    let names = || rules.programs.iter().map(|rule| rule.program.as_str());
    if !names().any(|name| name == program.as_str()) {
        let meant = did_you_mean(program.as_str(), names());
        misses
            .push((Some(rules.line), meant.unwrap_or_else(|| format!("its programs are {}", list(names())))));
    }
}

/// Why a rule is not for a target.
fn hook_miss(hook: &Hook, target: Option<&ClientTarget>) -> String {
    let (what, allowed) = match hook {
        Hook::Xdp { interfaces, .. } | Hook::Tcx { interfaces, .. } => ("interface", list(interfaces)),
        Hook::CgroupSkb { cgroups, own, .. } => {
            let own = own.then(|| "own, for clients that are named by their unit".to_owned());
            ("cgroup", list(cgroups.iter().map(ToString::to_string).chain(own)))
        }
        Hook::RawTracepoint { events } | Hook::Tracepoint { events } => ("event", list(events)),
        Hook::Uprobe { binary, symbols, .. } => {
            ("function", list(symbols.iter().map(|symbol| format!("{binary}:{symbol}"))))
        }
        Hook::Fentry { function } | Hook::Fexit { function } => ("function", function.to_string()),
        Hook::Kprobe { functions, .. } => ("function", list(functions)),
        Hook::SocketFilter => {
            return "a socket filter is attached by the client itself, to its own sockets".to_owned();
        }
    };
    match (hook, target) {
        (_, None) => format!("name one of the targets: {allowed}"),
        (Hook::Xdp { .. } | Hook::Tcx { .. }, Some(ClientTarget::Interface(name))) => {
            format!("interface {name} is not matched by {allowed}")
        }
        (_, Some(target)) => format!("{target} is none of what this allows, {what} {allowed}"),
    }
}

fn list<T: std::fmt::Display>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}
