//! What clients ask for: mostly things that are just allowed, or just not.

use crate::generate::{
    CATEGORIES, EVENTS, GLOBALS, GROUPS, INTERFACES, MAPS, OBJECTS, PATHS, PROGRAMS, SLICES, SYMBOLS, TRACED,
    UNITS, USERS,
};
use arbitrary::{Result, Unstructured};
use bpfgate_protocol::hooks::{Kind, ROWS};
use bpfgate_protocol::identity::Peer;
use bpfgate_protocol::messages::helper::{Global, Target};
use bpfgate_protocol::names::{GlobalName, InterfaceName, MapName, ObjectName, Pattern, ProgramName};
use bpfgate_protocol::policy::{Hook, Policy, Right, Unit};
use std::fmt::Debug;
use std::str::FromStr;

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// To use the app at all.
    Open,
    /// Something that needs a right and no more: `Detach`, `Unload`.
    Right(Right),
    /// `Load`.
    Load {
        /// Which object.
        object: ObjectName,
        /// Which of its programs; none is all.
        programs: Vec<ProgramName>,
        /// Values of globals.
        globals: Vec<Global>,
    },
    /// `Attach`.
    Attach {
        /// Of which object.
        object: ObjectName,
        /// Which program.
        program: ProgramName,
        /// Under which hook.
        kind: Option<Kind>,
        /// To what.
        target: Target,
    },
    /// `Map` and `ReadMap`.
    Map {
        /// Of which object.
        object: ObjectName,
        /// Which.
        map: MapName,
    },
}

/// A request of somebody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Who.
    pub peer: Peer,
    /// What.
    pub request: Request,
}

/// A name of which the test knows that it is one.
pub fn name<T: FromStr<Err: Debug>>(text: &str) -> T {
    text.parse().unwrap_or_else(|error| panic!("{text:?} is a name: {error:?}"))
}

fn one<T: FromStr<Err: Debug>>(u: &mut Unstructured<'_>, of: &[&str]) -> Result<T> {
    Ok(name(u.choose(of)?))
}

/// A client with these ids.
pub fn peer(uid: u32, gid: u32, groups: Vec<u32>) -> Peer {
    Peer { uid, gid, groups, pid: 1, ..Peer::default() }
}

/// A request about this policy: each part of it mostly as the policy has it, else from the same pools of names.
pub fn asked(u: &mut Unstructured<'_>, policy: &Policy) -> Result<Asked> {
    let client = match &policy.clients[..] {
        [] => None,
        clients if u.ratio(7, 8)? => Some(u.choose(clients)?),
        _ => None,
    };
    let uid = match client.and_then(|client| client.user) {
        Some(user) if u.ratio(7, 8)? => user,
        _ => *u.choose(&[&USERS[..], &[990, 65534, u32::MAX]].concat())?,
    };
    let pool = [&GROUPS[..], &[51, 65534, u32::MAX]].concat();
    let mut groups = vec![*u.choose(&pool)?];
    for _ in 0..u.int_in_range(0..=2)? {
        groups.push(*u.choose(&pool)?);
    }
    if let Some(group) = client.and_then(|client| client.group).filter(|_| u.ratio(7, 8).unwrap_or(true)) {
        let at = u.choose_index(groups.len())?;
        groups[at] = group;
    }
    let gid = groups.swap_remove(0);
    let mut peer = peer(uid, gid, groups);
    if u.ratio(1, 3)? {
        peer.units.insert(Unit { name: one(u, &UNITS)?, slice: one(u, &SLICES)? });
    }
    if let Some(unit) =
        client.and_then(|client| client.unit.clone()).filter(|_| u.ratio(7, 8).unwrap_or(true))
    {
        peer.units.insert(unit);
    }
    Ok(Asked { peer, request: request(u, policy)? })
}

/// Mostly one of the policy's own names.
fn mostly<T: Clone + FromStr<Err: Debug>>(u: &mut Unstructured<'_>, own: &[T], pool: &[&str]) -> Result<T> {
    if own.is_empty() || u.ratio(1, 8)? { one(u, pool) } else { u.choose(own).cloned() }
}

fn request(u: &mut Unstructured<'_>, policy: &Policy) -> Result<Request> {
    let objects: Vec<ObjectName> = policy.objects.keys().cloned().collect();
    let object: ObjectName = mostly(u, &objects, &OBJECTS)?;
    let rules = policy.objects.get(&object);
    let rule = match rules.map(|rules| &rules.programs[..]) {
        None | Some([]) => None,
        Some(rules) => Some(u.choose(rules)?),
    };
    let programs: Vec<ProgramName> =
        rules.iter().flat_map(|rules| &rules.programs).map(|rule| rule.program.clone()).collect();
    Ok(match u.int_in_range(0..=9)? {
        0 => Request::Open,
        1 => Request::Right(Right::WORDS[u.choose_index(Right::WORDS.len())?].1),
        2..=4 => {
            let programs = (0..u.int_in_range(0..=2)?)
                .map(|_| mostly(u, &programs, &PROGRAMS))
                .collect::<Result<_>>()?;
            let own: Vec<GlobalName> = rules.iter().flat_map(|rules| rules.globals.keys()).cloned().collect();
            let count = if u.ratio(1, 2)? { 0 } else { u.int_in_range(1..=2)? };
            let globals = (0..count).map(|_| global(u, &own)).collect::<Result<_>>()?;
            Request::Load { object, programs, globals }
        }
        5..=7 => {
            let kind = match (u.int_in_range(0..=3)?, rule) {
                (0, _) => Some(ROWS[u.choose_index(ROWS.len())?].kind),
                (1, Some(rule)) => Some(rule.hook.kind()),
                _ => None,
            };
            let own = rule.map_or(vec![], |rule| targets(&rule.hook));
            let target = if own.is_empty() || u.ratio(1, 4)? { target(u)? } else { u.choose(&own)?.clone() };
            let own = rule.map(|rule| rule.program.clone());
            Request::Attach { object, program: mostly(u, own.as_slice(), &PROGRAMS)?, kind, target }
        }
        _ => {
            let own: Vec<MapName> = rules.iter().flat_map(|rules| rules.maps.keys()).cloned().collect();
            Request::Map { object, map: mostly(u, &own, &MAPS)? }
        }
    })
}

fn global(u: &mut Unstructured<'_>, own: &[GlobalName]) -> Result<Global> {
    let values = [
        i128::MIN,
        i128::from(i64::MIN) - 1,
        -2,
        -1,
        0,
        1,
        2,
        10,
        11,
        i128::from(i64::MAX),
        i128::from(u64::MAX),
    ];
    Ok(Global { name: mostly(u, own, &GLOBALS)?, value: *u.choose(&values)? })
}

fn target(u: &mut Unstructured<'_>) -> Result<Target> {
    Ok(match u.choose_index(9)? {
        8 => Target::Function(one(u, &TRACED)?),
        7 => Target::Own,
        0 | 1 => Target::Only,
        2 | 3 => Target::Interface(one(u, &INTERFACES)?),
        4 => Target::Cgroup(one(u, &PATHS)?),
        5 => {
            let event = *u.choose(&EVENTS)?;
            let event = match u.choose_index(CATEGORIES.len() + 1)? {
                0 => event.to_owned(),
                n => format!("{}:{event}", CATEGORIES[n - 1]),
            };
            Target::Event(name(&event))
        }
        _ => Target::Symbol { binary: one(u, &PATHS)?, symbol: one(u, &SYMBOLS)? },
    })
}

/// Names that a pattern fits, and names that it just does not.
fn samples(pattern: &Pattern) -> Vec<InterfaceName> {
    let text = pattern.to_string();
    let filled = ["", "0", "xy"].map(|run| text.replace('*', run).replace('?', "y"));
    let longer = filled.clone().map(|text| format!("{text}0"));
    filled.into_iter().chain(longer).filter_map(|text| text.parse().ok()).collect()
}

/// The targets of a hook; of patterns, samples.
pub fn targets(hook: &Hook) -> Vec<Target> {
    match hook {
        Hook::Xdp { interfaces, .. } | Hook::Tcx { interfaces, .. } => {
            interfaces.iter().flat_map(samples).map(Target::Interface).collect()
        }
        Hook::CgroupSkb { cgroups, own, .. } => {
            let own = own.then_some(Target::Own);
            cgroups.iter().cloned().map(Target::Cgroup).chain(own).collect()
        }
        Hook::RawTracepoint { events } | Hook::Tracepoint { events } => {
            events.iter().cloned().map(Target::Event).collect()
        }
        Hook::Uprobe { binary, symbols, .. } => symbols
            .iter()
            .map(|symbol| Target::Symbol { binary: binary.clone(), symbol: symbol.clone() })
            .collect(),
        Hook::SocketFilter => Vec::new(),
        Hook::Fentry { function } | Hook::Fexit { function } => vec![Target::Function(function.clone())],
        Hook::Kprobe { functions, .. } => functions.iter().cloned().map(Target::Function).collect(),
    }
}
