//! What a policy says to a request, by the code of broker and helper.

use super::miss::{Miss, misses};
use bpfgate_client::{Target as ClientTarget, TargetWord};
use bpfgate_protocol::authorize::{Permit, authorize};
use bpfgate_protocol::hooks::Kind;
use bpfgate_protocol::identity::Peer;
use bpfgate_protocol::messages::helper::{Global, Target};
use bpfgate_protocol::names::{MapName, NameError, ObjectName, ProgramName};
use bpfgate_protocol::policy::{OWN_CGROUP, Policy, ProgramRule, Right};
use bpfgate_protocol::refusal::Refusal;
use std::sync::Arc;

/// A request as people write it.
#[derive(Debug)]
pub(super) enum Request {
    Open,
    Load { object: ObjectName, programs: Vec<ProgramName>, globals: Vec<Global> },
    Attach { object: ObjectName, program: ProgramName, target: Option<TargetWord> },
    Map { object: ObjectName, map: MapName },
}

/// How a request is written, for whoever wrote another one.
const USAGE: &str = "a request is `open`, `load OBJECT [PROGRAM...] [GLOBAL=VALUE...]`, `attach OBJECT PROGRAM [TARGET]` or \
                     `map OBJECT MAP`";

impl Request {
    pub(super) fn parse<'w>(words: impl IntoIterator<Item = &'w str>) -> Result<Self, String> {
        let words: Vec<&str> = words.into_iter().collect();
        let name = |error: NameError| error.to_string();
        match words[..] {
            ["open"] => Ok(Self::Open),
            ["load", object, ref rest @ ..] => {
                let (mut programs, mut globals) = (Vec::new(), Vec::new());
                for word in rest {
                    match word.split_once('=') {
                        Some((global, value)) => {
                            let value = value.parse().map_err(|error| format!("{value:?}: {error}"))?;
                            globals.push(Global { name: global.parse().map_err(name)?, value });
                        }
                        None => programs.push(word.parse().map_err(name)?),
                    }
                }
                Ok(Self::Load { object: object.parse().map_err(name)?, programs, globals })
            }
            ["attach", object, program, ref rest @ ..] if rest.len() <= 1 => Ok(Self::Attach {
                object: object.parse().map_err(name)?,
                program: program.parse().map_err(name)?,
                target: rest.first().map(|word| word.parse()).transpose()?,
            }),
            ["map", object, map] => {
                Ok(Self::Map { object: object.parse().map_err(name)?, map: map.parse().map_err(name)? })
            }
            _ => Err(USAGE.to_owned()),
        }
    }
}

impl Request {
    /// Whether the policy has the object, programs, globals and map of the request at all, whoever may have them: where
    /// it has not, a denial says nothing.
    pub(super) fn names_what_is_there(&self, policy: &Policy) -> Result<(), String> {
        let rules = |object: &ObjectName| {
            policy.objects.get(object).ok_or_else(|| format!("the policy has no object {object}"))
        };
        let has_program = |object: &ObjectName, program: &ProgramName| {
            let there = rules_of(policy, object, program).next().is_some();
            there
                .then_some(())
                .ok_or_else(|| format!("object {object} has no program {program} in the policy"))
        };
        match self {
            Self::Open => Ok(()),
            Self::Load { object, programs, globals } => {
                let rules = rules(object)?;
                programs.iter().try_for_each(|program| has_program(object, program))?;
                match globals.iter().find(|global| !rules.globals.contains_key(&global.name)) {
                    Some(global) => {
                        Err(format!("object {object} has no global {} in the policy", global.name))
                    }
                    None => Ok(()),
                }
            }
            Self::Attach { object, program, .. } => {
                rules(object)?;
                has_program(object, program)
            }
            Self::Map { object, map } => {
                let there = rules(object)?.maps.contains_key(map);
                there.then_some(()).ok_or_else(|| format!("object {object} has no map {map} in the policy"))
            }
        }
    }
}

/// What it came to.
pub(super) struct Judgement {
    /// The lines that allow it, the deciding one first.
    pub(super) verdict: Result<Vec<u32>, Refusal>,
    /// What was nearest, with its line.
    pub(super) misses: Vec<Miss>,
}

pub(super) fn judge(policy: &Arc<Policy>, peer: &Peer, request: &Request) -> Judgement {
    let verdict = authorize(policy, peer).and_then(|permit| allow(&permit, request));
    let misses = if verdict.is_ok() { Vec::new() } else { misses(policy, peer, request) };
    Judgement { verdict, misses }
}

fn allow(permit: &Permit, request: &Request) -> Result<Vec<u32>, Refusal> {
    match request {
        Request::Open => Ok(vec![permit.line()]),
        Request::Load { object, programs, globals } => {
            let load = permit.load(object, programs, globals)?;
            let rules = load.programs().map(|rule| rule.line);
            Ok(std::iter::once(load.line()).chain(rules).collect())
        }
        Request::Attach { object, program, target } => {
            let target = match target {
                Some(word) => target_of(word, permit.policy(), object, program)?,
                None => Target::Only,
            };
            let attach = permit.attach(object, program, None, &target)?;
            Ok(vec![attach.rule().line, permit.right(Right::Attach)?.line()])
        }
        Request::Map { object, map } => {
            Ok(vec![permit.map(object, map)?.line(), permit.right(Right::Maps)?.line()])
        }
    }
}

/// A bare word is what the rules of the program attach to, as in `bpfgate attach`.
fn target_of(
    word: &TargetWord,
    policy: &Policy,
    object: &ObjectName,
    program: &ProgramName,
) -> Result<Target, Refusal> {
    let mut kinds = rules_of(policy, object, program).map(|rule| rule.hook.kind());
    let kind = kinds.next().unwrap_or(Kind::Xdp);
    let target = match word.for_program(kind.row().key) {
        ClientTarget::Interface(name) => name.parse().map(Target::Interface),
        ClientTarget::Cgroup(path) if path == OWN_CGROUP => Ok(Target::Own),
        ClientTarget::Cgroup(path) => path.parse().map(Target::Cgroup),
        ClientTarget::Event(event) => event.parse().map(Target::Event),
        ClientTarget::Uprobe { binary, symbol } => {
            binary.parse().and_then(|binary| Ok(Target::Symbol { binary, symbol: symbol.parse()? }))
        }
        ClientTarget::Function(name) => name.parse().map(Target::Function),
        other => return Err(Refusal::unsupported(format!("{other} is a target of another version"))),
    };
    target.map_err(|error| Refusal::invalid(error.to_string()))
}

pub(super) fn rules_of<'p>(
    policy: &'p Policy,
    object: &ObjectName,
    program: &'p ProgramName,
) -> impl Iterator<Item = &'p ProgramRule> {
    let rules = policy.objects.get(object).map_or(&[][..], |object| &object.programs);
    rules.iter().filter(move |rule| rule.program == *program)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bpfgate_protocol::policy::file::Accounts;

    const POLICY: &str = r#"version = 1
[[client]]
user = 1000
may = ["load", "attach"]
[[client]]
group = 4
maps = ["counters"]
may = ["maps"]
[objects.counter]
path = "/o"
[[objects.counter.xdp]]
program = "count_packets"
interfaces = ["eth0", "lan*"]
[objects.counter.maps]
counters = "frozen"
secret = "none"
[objects.counter.globals]
rate = { min = 1, max = 5 }
"#;

    /// Allowed by these lines, or refused with these misses.
    fn outcome(uid: u32, groups: &[u32], request: &str) -> Result<Vec<u32>, Vec<Miss>> {
        let policy = Arc::new(Policy::parse("p", POLICY, &Accounts::default()).unwrap());
        let peer = Peer { uid, gid: uid, groups: groups.to_vec(), ..Peer::default() };
        let judgement = judge(&policy, &peer, &Request::parse(request.split(' ')).unwrap());
        judgement.verdict.map_err(|_| judgement.misses)
    }

    #[test]
    fn what_is_allowed_names_its_lines() {
        for (uid, groups, request, lines) in [
            (1000, &[][..], "open", vec![2]),
            (1000, &[], "load counter", vec![2, 11]),
            (1000, &[], "load counter count_packets rate=5", vec![2, 11]),
            (1000, &[], "attach counter count_packets lan7", vec![11, 2]),
            (7, &[4], "map counter counters", vec![15, 5]),
        ] {
            assert_eq!(outcome(uid, groups, request), Ok(lines), "{request}");
        }
    }

    #[test]
    fn what_is_not_allowed_names_the_nearest_miss() {
        for (uid, groups, request, line, why) in [
            (7, &[][..], "open", Some(2), "this entry is for uid 1000, and this is uid 7"),
            (7, &[4], "load counter", Some(5), "its may has no \"load\", only \"maps\""),
            (1000, &[], "load couter", None, "did you mean \"counter\"?"),
            (1000, &[], "load counter count_packet", Some(9), "did you mean \"count_packets\"?"),
            (1000, &[], "load counter rat=5", Some(9), "did you mean \"rate\"?"),
            (
                1000,
                &[],
                "attach counter count_packets eth1",
                Some(11),
                "interface eth1 is not matched by eth0, lan*",
            ),
            (1000, &[], "attach counter count_packets", Some(11), "name one of the targets: eth0, lan*"),
            (
                1000,
                &[],
                "attach counter count_packets sched:x",
                Some(11),
                "event:sched:x is none of what this allows",
            ),
            (
                1000,
                &[],
                "map counter counters",
                Some(2),
                "its may has no \"maps\", only \"load\", \"attach\"",
            ),
            (7, &[4], "map counter secret", Some(5), "its maps are counters"),
        ] {
            let misses = outcome(uid, groups, request).unwrap_err();
            let is = |miss: &Miss| miss.0 == line && miss.1.contains(why);
            assert!(misses.iter().any(is), "{request}: {misses:?}");
        }
        // Out of range: the refusal itself says it.
        assert_eq!(outcome(1000, &[], "load counter rate=6"), Err(vec![]));
    }

    #[test]
    fn a_unit_is_told_from_another() {
        let text = "version = 1\n[[client]]\nunit = \"a.service\"\nmay = [\"attach\"]\n[objects.o]\npath = \"/o\"\n\
                    [[objects.o.cgroup_skb]]\nprogram = \"p\"\ncgroups = [\"own\"]\ndirection = \"egress\"\n";
        let policy = Arc::new(Policy::parse("p", text, &Accounts::default()).unwrap());
        let request = Request::parse(["attach", "o", "p", "cgroup:own"]).unwrap();
        let mut peer = Peer { uid: u32::MAX, gid: u32::MAX, ..Peer::default() };
        let why = judge(&policy, &peer, &request).misses.remove(0);
        assert_eq!(why, (Some(2), "this entry is for unit a.service in system.slice, and this client is in no unit that was named".to_owned()));
        peer.units = policy.units().cloned().collect();
        assert_eq!(judge(&policy, &peer, &request).verdict, Ok(vec![7, 2]));
    }

    #[test]
    fn requests_are_written_one_way() {
        for bad in
            ["", "open x", "load", "attach o", "attach o p t t", "map o", "detach 1", "load O", "load o g=x"]
        {
            assert!(Request::parse(bad.split(' ')).is_err(), "{bad}");
        }
    }
}
