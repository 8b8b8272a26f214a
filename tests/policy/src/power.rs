//! What a policy allows, as a set of facts about effects: one policy allows no more than another if each of its facts
//! is one of the other's. The facts are all answers of `authorize` to everything that can be asked for with the names of
//! a file.

use crate::requests::{name, peer, targets};
use bpfgate_protocol::authorize::{AttachPermit, BootPermit, LoadPermit, Permit, authorize};
use bpfgate_protocol::identity::Peer;
use bpfgate_protocol::messages::helper::{Global, Target};
use bpfgate_protocol::names::{GlobalName, MapName, ObjectName, ProgramName};
use bpfgate_protocol::policy::{Hook, Limits, Policy, ProgramRule, Require, Right};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Everybody and everything that can be asked for.
#[derive(Debug, Clone)]
pub struct Names {
    peers: Vec<Peer>,
    objects: Vec<OfObject>,
}

type OfObject = (ObjectName, Vec<ProgramName>, Vec<Target>, Vec<MapName>, Vec<Global>);

/// The number itself, and what is left of it when its last digits are cut off.
fn cut(id: u32) -> impl Iterator<Item = u32> {
    std::iter::successors(Some(id), |id| (*id >= 10).then_some(id / 10))
}

impl Names {
    /// All that stand in this policy, and a few that do not.
    pub fn of(policy: &Policy) -> Self {
        let (mut users, mut groups) = (BTreeSet::from([5]), BTreeSet::from([5]));
        for client in &policy.clients {
            users.extend(client.user.into_iter().flat_map(cut));
            groups.extend(client.group.into_iter().flat_map(cut));
        }
        let mut peers: Vec<Peer> =
            users.iter().flat_map(|uid| groups.iter().map(|gid| peer(*uid, *gid, vec![]))).collect();
        for unit in policy.clients.iter().filter_map(|client| client.unit.as_ref()).collect::<BTreeSet<_>>() {
            let outside = peers.iter().filter(|peer| peer.units.is_empty());
            let inside = outside.map(|peer| Peer { units: BTreeSet::from([unit.clone()]), ..peer.clone() });
            peers.extend(inside.collect::<Vec<_>>());
        }
        let objects = policy.objects.iter().map(|(object, rules)| {
            let mut programs: Vec<ProgramName> =
                rules.programs.iter().map(|rule| rule.program.clone()).collect();
            programs.dedup();
            programs.push(name("nosuch"));
            let mut all: Vec<Target> = rules.programs.iter().flat_map(|rule| targets(&rule.hook)).collect();
            all.push(Target::Only);
            let maps = rules.maps.keys().chain(policy.clients.iter().flat_map(|c| c.maps.iter().flatten()));
            let maps: BTreeSet<MapName> = maps.cloned().chain([name("nosuch")]).collect();
            let value = |name: &GlobalName, value: i128| Global { name: name.clone(), value };
            let globals = rules.globals.iter().flat_map(|(name, range)| {
                let (min, max) = (i128::from(range.min), i128::from(range.max));
                [min - 1, min, min / 10, max / 10, max, max + 1].map(|end| value(name, end))
            });
            (object.clone(), programs, all, maps.into_iter().collect(), globals.collect())
        });
        Self { peers, objects: objects.collect() }
    }
}

/// Says the first thing that `part` allows and `whole` does not.
pub fn no_more(part: &Policy, whole: &Power, names: &Names) -> Result<(), String> {
    let part = Power::of(part, names);
    if let Some(fact) = part.facts.difference(&whole.facts).next() {
        return Err(fact.clone());
    }
    // Bounds and conditions bind nobody if nothing is allowed.
    if part.facts.is_empty() {
        return Ok(());
    }
    for ((what, part), (_, whole)) in part.bounds.iter().zip(&whole.bounds) {
        if part > whole {
            return Err(format!("{what}: {part}, not {whole}"));
        }
    }
    Ok(())
}

/// What a policy allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Power {
    /// What may be done, by whom, to what.
    pub facts: BTreeSet<String>,
    /// How much; more is more.
    bounds: Vec<(&'static str, u64)>,
}

impl Power {
    /// What this policy allows of what can be asked for with these names.
    pub fn of(policy: &Policy, names: &Names) -> Self {
        let policy = Arc::new(policy.clone());
        let mut facts = BTreeSet::new();
        for peer in &names.peers {
            if let Ok(permit) = authorize(&policy, peer) {
                let who = format!("uid {} gid {} units {:?}", peer.uid, peer.gid, peer.units);
                let mut add = |fact: String| {
                    facts.insert(format!("{who}: {fact}"));
                };
                of_client(&permit, names, &mut add);
            }
        }
        if let Some(permit) = BootPermit::of(&policy) {
            let mut add = |fact: String| {
                facts.insert(format!("at boot: {fact}"));
            };
            permit.loads().for_each(|load| loaded(&load, &mut add));
            for object in policy.objects.keys() {
                permit
                    .attachments(object)
                    .iter()
                    .for_each(|permit| attached(&policy, object, permit, &mut add));
            }
        }
        if !facts.is_empty() {
            facts.insert(format!("in network namespace {:?}", policy.netns));
        }
        Self { facts, bounds: bounds(&policy) }
    }
}

fn bounds(policy: &Policy) -> Vec<(&'static str, u64)> {
    let Limits { programs, maps, links, instructions, map_memory, connections, loads_per_minute } =
        policy.limits;
    let Require { sandbox, unit_check, kernel, landlock, btf, line: _ } = policy.require;
    // The more is required, the less is allowed.
    let kernel = kernel.map_or(0, |(major, minor)| u64::from(major) << 32 | u64::from(minor));
    let landlock = landlock.map_or(0, u64::from);
    vec![
        ("programs", programs.into()),
        ("maps", maps.into()),
        ("links", links.into()),
        ("instructions", instructions.into()),
        ("map_memory", map_memory),
        ("connections", connections.into()),
        ("keep", policy.keep as u64),
        ("loads_per_minute", loads_per_minute.into()),
        ("sandbox", sandbox as u64),
        ("unit_check", unit_check as u64),
        ("kernel", u64::MAX - kernel),
        ("landlock", u64::MAX - landlock),
        ("btf", u64::from(!btf)),
    ]
}

fn of_client(permit: &Permit, names: &Names, add: &mut dyn FnMut(String)) {
    for (word, right) in Right::WORDS {
        if permit.right(right).is_ok() {
            add(word.to_owned());
        }
    }
    for (object, programs, targets, maps, globals) in &names.objects {
        for program in programs {
            if let Ok(load) = permit.load(object, std::slice::from_ref(program), &[]) {
                loaded(&load, add);
            }
            for target in targets {
                if let Ok(attach) = permit.attach(object, program, None, target) {
                    attached(permit.policy(), object, &attach, add);
                }
            }
        }
        for global in globals {
            if permit.load(object, &[], std::slice::from_ref(global)).is_ok() {
                add(format!("set {} of {object} to {}", global.name, global.value));
            }
        }
        for map in maps {
            if let Ok(given) = permit.map(object, map) {
                add(format!("read map {map} of {object}"));
                if given.access().hands_over() {
                    add(format!("the descriptor of map {map} of {object}, {:?}", given.access()));
                }
            }
        }
    }
}

fn loaded(permit: &LoadPermit, add: &mut dyn FnMut(String)) {
    let (object, rules) = (permit.object(), permit.rules());
    add(format!("load {object} from {} with {:?}", rules.path, rules.sha256));
    for function in &rules.functions {
        add(format!("load {object} that calls function {function:?}"));
    }
    for ProgramRule { program, hook, .. } in permit.programs() {
        let (kind, way, function) = (hook.kind(), hook.expected_attach_type(), hook.bound_to());
        add(format!("load {program} of {object} as {kind:?} {way} for {function:?}"));
        if permit.program_fd(program) {
            add(format!("the descriptor of {program} of {object}"));
        }
    }
}

/// Every rule that is for this target: they are all in force, though the first one is taken.
fn attached(policy: &Policy, object: &ObjectName, permit: &AttachPermit, add: &mut dyn FnMut(String)) {
    let (program, kind, target) = (&permit.rule().program, permit.rule().hook.kind(), permit.target());
    for rule in policy.rules_for(object, program, kind, target) {
        let how = match &rule.hook {
            Hook::Xdp { mode, .. } => format!("{mode:?}"),
            Hook::Tcx { direction, order, .. } => format!("{direction:?} {order:?}"),
            Hook::CgroupSkb { direction, .. } => format!("{direction:?}"),
            Hook::Uprobe { at_return, .. } | Hook::Kprobe { at_return, .. } => {
                format!("at return: {at_return}")
            }
            Hook::RawTracepoint { .. }
            | Hook::Tracepoint { .. }
            | Hook::SocketFilter
            | Hook::Fentry { .. }
            | Hook::Fexit { .. } => String::new(),
        };
        add(format!("attach {program} of {object} to {target} {how}"));
        if rule.link_fd {
            add(format!("the link of {program} of {object} to {target} {how}"));
        }
    }
}
