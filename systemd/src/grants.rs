//! What a policy grants, one by one: two policies differ in what they allow exactly if their grants differ. Order,
//! spaces, comments and line numbers of the file do not show. As lines of text they stand in drop-ins, where
//! `policy apply` compares them; with their order, which of two allows more, `policy diff` compares files.

mod order;

use bpfgate_protocol::functions::Function;
use bpfgate_protocol::hex;
use bpfgate_protocol::hooks::Capability;
use bpfgate_protocol::names::{AbsolutePath, GlobalName, MapName, ObjectName, Pattern, ProgramName};
use bpfgate_protocol::policy::{
    Access, Client, Direction, Hook, Keep, Limits, Object, Order, Policy, ProgramRule, Range, Require, Right,
    Sandboxing, Unit, UnitCheck, XdpMode, needed,
};
use std::collections::BTreeSet;
use std::fmt;

/// One thing that a policy allows, or that bounds what it allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Grant {
    /// Whoever meets the conditions has these rights.
    Client {
        /// The user.
        user: Option<u32>,
        /// The group.
        group: Option<u32>,
        /// The system unit.
        unit: Option<Unit>,
        /// The rights.
        may: BTreeSet<Right>,
        /// The maps that `Right::Maps` is for; none is all.
        maps: Option<BTreeSet<MapName>>,
        /// Those of them that are only read through the broker.
        proxy: BTreeSet<MapName>,
    },
    /// The helper holds it.
    Capability(Capability),
    /// A file may be loaded.
    Object {
        /// Its name.
        name: ObjectName,
        /// Where it is.
        path: AbsolutePath,
        /// Its digest; without one whatever root puts there.
        sha256: Option<[u8; 32]>,
    },
    /// The descriptor of a program is handed out.
    ProgramFd {
        /// Its object.
        object: ObjectName,
        /// Its name.
        program: ProgramName,
    },
    /// A program may run at one place.
    Place {
        /// Its object.
        object: ObjectName,
        /// Its name.
        program: ProgramName,
        /// Where.
        place: Place,
        /// The descriptor of the link is handed out.
        link_fd: bool,
    },
    /// A map is handed over.
    Map {
        /// Its object.
        object: ObjectName,
        /// Its name.
        map: MapName,
        /// How.
        access: Access,
    },
    /// A global may be set.
    Global {
        /// Its object.
        object: ObjectName,
        /// Its name.
        global: GlobalName,
        /// The least value.
        min: i64,
        /// The largest value.
        max: i64,
    },
    /// Programs of an object may call a function.
    Function {
        /// The object.
        object: ObjectName,
        /// Which.
        function: Function,
    },
    /// An upper bound.
    Limit {
        /// Its key in a policy.
        what: &'static str,
        /// The bound.
        bound: u64,
    },
    /// How long things live.
    Keep(Keep),
    /// The network namespace of interfaces; none is that of the machine.
    Netns(Option<AbsolutePath>),
    /// Who finds out units.
    UnitCheck(UnitCheck),
    /// The least version of the kernel.
    Kernel(Option<(u32, u32)>),
    /// The least ABI of landlock.
    Landlock(Option<u32>),
    /// Whether the kernel has to describe its types.
    Btf(bool),
    /// How confined the helper must be.
    Sandbox(Sandboxing),
}

/// Where a program may run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Packets of interfaces, in this mode.
    Xdp(Pattern, XdpMode),
    /// Packets of interfaces, in this direction.
    Tcx(Pattern, Direction, Order),
    /// Anything else: a kind of hook and one literal target of it.
    Literal(String),
}

/// All grants of a policy, limits and demands included.
pub fn grants(policy: &Policy) -> Vec<Grant> {
    // Every field, here and below, so that a new one is not forgotten.
    let Policy { file: _, digest: _, description: _, clients, objects, limits, keep, netns, require } =
        policy;
    let mut all: Vec<Grant> = clients.iter().map(client).collect();
    all.extend(needed(policy).into_iter().map(Grant::Capability));
    for (name, object) in objects {
        add_object(&mut all, name, object);
    }
    let Limits { programs, maps, links, instructions, map_memory, connections, loads_per_minute } = *limits;
    let Require { sandbox, unit_check, kernel, landlock, btf, line: _ } = *require;
    let limit = |what, bound: u32| Grant::Limit { what, bound: u64::from(bound) };
    all.extend([
        limit("programs", programs),
        limit("maps", maps),
        limit("links", links),
        limit("instructions", instructions),
        Grant::Limit { what: "map_memory", bound: map_memory },
        limit("connections", connections),
        limit("loads_per_minute", loads_per_minute),
        Grant::Keep(*keep),
        Grant::Netns(netns.clone()),
        Grant::UnitCheck(unit_check),
        Grant::Kernel(kernel),
        Grant::Landlock(landlock),
        Grant::Btf(btf),
        Grant::Sandbox(sandbox),
    ]);
    all
}

/// All grants of a policy as text: `uid 1000 may load, attach`, `program count_packets of object counter on xdp lan*`,
/// `limit programs 16`. What is so everywhere, unless said otherwise, has no line.
pub fn lines(policy: &Policy) -> BTreeSet<String> {
    let usual = [
        Grant::Netns(None),
        Grant::UnitCheck(UnitCheck::Helper),
        Grant::Kernel(None),
        Grant::Landlock(None),
        Grant::Btf(false),
    ];
    grants(policy)
        .iter()
        .filter(|grant| !usual.contains(grant))
        .map(|grant| plain(&grant.to_string()))
        .collect()
}

fn client(client: &Client) -> Grant {
    let Client { line: _, user, group, unit, may, maps, proxy } = client;
    let (unit, may, maps, proxy) = (unit.clone(), may.clone(), maps.clone(), proxy.clone());
    Grant::Client { user: *user, group: *group, unit, may, maps, proxy }
}

fn add_object(all: &mut Vec<Grant>, name: &ObjectName, object: &Object) {
    let Object { line: _, path, sha256, programs, maps, globals, functions } = object;
    let of = || name.clone();
    all.push(Grant::Object { name: of(), path: path.clone(), sha256: *sha256 });
    for ProgramRule { line: _, program, hook, program_fd, link_fd } in programs {
        let fd = Grant::ProgramFd { object: of(), program: program.clone() };
        if *program_fd && !all.contains(&fd) {
            all.push(fd);
        }
        let place = |place| Grant::Place { object: of(), program: program.clone(), place, link_fd: *link_fd };
        all.extend(places(hook).into_iter().map(place));
    }
    for (map, (access, _)) in maps {
        if *access != Access::None {
            all.push(Grant::Map { object: of(), map: map.clone(), access: *access });
        }
    }
    for (global, Range { min, max, line: _ }) in globals {
        all.push(Grant::Global { object: of(), global: global.clone(), min: *min, max: *max });
    }
    all.extend(functions.iter().map(|function| Grant::Function { object: of(), function: function.clone() }));
}

/// Where a program may run, one by one.
fn places(hook: &Hook) -> Vec<Place> {
    let literals = |items: Vec<String>| items.into_iter().map(Place::Literal).collect();
    match hook {
        Hook::Xdp { interfaces, mode } => {
            interfaces.iter().map(|name| Place::Xdp(name.clone(), *mode)).collect()
        }
        Hook::Tcx { interfaces, direction, order } => {
            interfaces.iter().map(|name| Place::Tcx(name.clone(), *direction, *order)).collect()
        }
        Hook::CgroupSkb { cgroups, own, direction } => {
            let own = own.then(|| "of the client's unit".to_owned());
            let all = cgroups.iter().map(ToString::to_string).chain(own);
            literals(all.map(|cgroup| format!("on cgroup_skb {cgroup} ({direction})")).collect())
        }
        Hook::RawTracepoint { events } => {
            literals(events.iter().map(|event| format!("on raw_tracepoint {event}")).collect())
        }
        Hook::Tracepoint { events } => {
            literals(events.iter().map(|event| format!("on tracepoint {event}")).collect())
        }
        Hook::Uprobe { binary, symbols, at_return } => {
            let when = if *at_return { "return" } else { "call" };
            literals(symbols.iter().map(|symbol| format!("on uprobe {binary}:{symbol} ({when})")).collect())
        }
        Hook::SocketFilter => literals(vec!["as socket_filter".to_owned()]),
        Hook::Fentry { function } => literals(vec![format!("on fentry {function}")]),
        Hook::Fexit { function } => literals(vec![format!("on fexit {function}")]),
        Hook::Kprobe { functions, at_return } => {
            let when = if *at_return { "return" } else { "call" };
            literals(functions.iter().map(|function| format!("on kprobe {function} ({when})")).collect())
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Xdp(interface, mode) => {
                let any = if *mode == XdpMode::Any { " mode" } else { "" };
                write!(f, "on xdp {interface} ({mode}{any})")
            }
            Self::Tcx(interface, direction, order) => {
                let order = if *order == Order::First { ", first" } else { "" };
                write!(f, "on tcx {interface} ({direction}{order})")
            }
            Self::Literal(place) => f.write_str(place),
        }
    }
}

impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Client { user, group, unit, may, maps, proxy } => {
                let unit = unit.as_ref().map(|unit| format!("unit {} in {}", unit.name, unit.slice));
                let conditions =
                    [user.map(|id| format!("uid {id}")), group.map(|id| format!("gid {id}")), unit];
                let who = conditions.into_iter().flatten().collect::<Vec<_>>().join(" and ");
                write!(f, "{who} may {}", list(may))?;
                if let Some(maps) = maps {
                    write!(f, " (only {})", list(maps))?;
                }
                if proxy.is_empty() { Ok(()) } else { write!(f, " (by proxy {})", list(proxy)) }
            }
            Self::Capability(capability) => write!(f, "helper holds {capability}"),
            Self::Object { name, path, sha256: Some(digest) } => {
                write!(f, "object {name} is {path}, sha256 {}", hex::encode(digest))
            }
            Self::Object { name, path, sha256: None } => {
                write!(f, "object {name} is {path}, any bytes that root put there")
            }
            Self::ProgramFd { object, program } => {
                write!(f, "program {program} of object {object}: its descriptor is handed out")
            }
            Self::Place { object, program, place, link_fd } => {
                let link = if *link_fd { ", the descriptor of the link is handed out" } else { "" };
                write!(f, "program {program} of object {object} {place}{link}")
            }
            Self::Map { object, map, access } => {
                write!(f, "map {map} of object {object} {}", Access::WORDS[*access as usize].0)
            }
            Self::Global { object, global, min, max } => {
                write!(f, "global {global} of object {object} from {min} to {max}")
            }
            Self::Function { object, function: Function::Kernel(name) } => {
                write!(f, "object {object} may call kfunc {name}")
            }
            Self::Function { object, function } => write!(f, "object {object} may call {function}"),
            Self::Limit { what, bound } => write!(f, "limit {what} {bound}"),
            Self::Keep(keep) => write!(f, "keep {keep}"),
            Self::Netns(Some(path)) => write!(f, "netns {path}"),
            Self::Netns(None) => f.write_str("netns of the machine"),
            Self::UnitCheck(UnitCheck::Helper) => f.write_str("the helper checks units"),
            Self::UnitCheck(UnitCheck::Broker) => f.write_str("the broker alone may check units"),
            Self::Kernel(Some((major, minor))) => write!(f, "requires Linux {major}.{minor}"),
            Self::Kernel(None) => f.write_str("requires no version of Linux"),
            Self::Landlock(Some(abi)) => write!(f, "requires landlock ABI {abi}"),
            Self::Landlock(None) => f.write_str("requires no ABI of landlock"),
            Self::Btf(true) => f.write_str("requires the kernel's BTF"),
            Self::Btf(false) => f.write_str("requires no BTF of the kernel"),
            Self::Sandbox(Sandboxing::Full) => f.write_str("sandbox full"),
            Self::Sandbox(Sandboxing::Seccomp) => f.write_str("sandbox seccomp"),
        }
    }
}

fn list<T: fmt::Display>(items: &BTreeSet<T>) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// A backslash at the end of a line would join it with the next one in a unit file.
fn plain(line: &str) -> String {
    line.replace('\\', "\\x5c")
}

#[cfg(test)]
mod tests {
    use super::*;
    use bpfgate_protocol::policy::file::Accounts;

    fn of(text: &str) -> BTreeSet<String> {
        let accounts = Accounts { users: [("u".to_owned(), 7)].into(), groups: [("g".to_owned(), 8)].into() };
        lines(&Policy::parse("/p.toml", text, &accounts).unwrap())
    }

    const WHOLE: &str = r#"
version = 1
netns = "/run/netns/blue"
[[client]]
user = "u"
group = "g"
maps = ["m", "k"]
may = ["maps", "load"]
[[client]]
unit = "a@b.service"
proxy = ["m"]
may = ["attach", "maps"]
[require]
unit_check = "broker"
kernel = "6.6"
landlock = 4
btf = true
[objects.o]
path = "/o"
[[objects.o.xdp]]
program = "p"
interfaces = ["lan*", "eth0"]
mode = "native"
link_fd = true
[[objects.o.uprobe]]
program = "q"
binary = "/b"
symbols = ['odd\']
return = true
[[objects.o.socket_filter]]
program = "f"
program_fd = true
[[objects.o.fexit]]
program = "t"
function = "vfs_read"
[[objects.o.kprobe]]
program = "k"
functions = ["vfs_read"]
return = true
[objects.o.maps]
m = "read-write"
n = "none"
[objects.o.globals]
g = { min = -1, max = 5 }
[objects.o.helpers]
allow = ["bpf_send_signal"]
kfuncs = ["bpf_rcu_read_lock"]
"#;

    #[test]
    fn every_grant_is_a_line() {
        let expected = [
            "global g of object o from -1 to 5",
            "helper holds CAP_BPF",
            "helper holds CAP_NET_ADMIN",
            "helper holds CAP_PERFMON",
            "keep session",
            "limit connections 16",
            "limit instructions 1000000",
            "limit links 16",
            "limit loads_per_minute 600",
            "limit map_memory 67108864",
            "limit maps 32",
            "limit programs 16",
            "map m of object o read-write",
            "netns /run/netns/blue",
            "object o is /o, any bytes that root put there",
            "object o may call bpf_send_signal",
            "object o may call kfunc bpf_rcu_read_lock",
            "program f of object o as socket_filter",
            "program f of object o: its descriptor is handed out",
            "program k of object o on kprobe vfs_read (return)",
            "program p of object o on xdp eth0 (native), the descriptor of the link is handed out",
            "program p of object o on xdp lan* (native), the descriptor of the link is handed out",
            "program q of object o on uprobe /b:odd\\x5c (return)",
            "program t of object o on fexit vfs_read",
            "requires Linux 6.6",
            "requires landlock ABI 4",
            "requires the kernel's BTF",
            "sandbox full",
            "the broker alone may check units",
            "uid 7 and gid 8 may load, maps (only k, m)",
            "unit a@b.service in system-a.slice may attach, maps (by proxy m)",
        ];
        assert_eq!(of(WHOLE).into_iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn how_it_is_written_does_not_matter() {
        let other = WHOLE
            .replace("[\"lan*\", \"eth0\"]", "[\"eth0\",\n  \"lan*\"] # comment")
            .replace("user = \"u\"", "user = 7")
            .replace("n = \"none\"\n", "");
        assert_ne!(other, WHOLE);
        assert_eq!(of(&other), of(WHOLE));
        assert_ne!(of(&WHOLE.replace("max = 5", "max = 6")), of(WHOLE));
    }

    #[test]
    fn every_grant_covers_itself_and_its_pieces_and_nothing_of_another_kind() {
        let accounts = Accounts { users: [("u".to_owned(), 7)].into(), groups: [("g".to_owned(), 8)].into() };
        let all = grants(&Policy::parse("/p.toml", WHOLE, &accounts).unwrap());
        for grant in &all {
            assert!(grant.covers(grant) && grant.pieces().iter().all(|piece| grant.covers(piece)), "{grant}");
            let covered = all.iter().filter(|other| grant.covers(other)).count();
            assert_eq!(covered, 1, "{grant}");
        }
        let client = all.iter().find(|grant| matches!(grant, Grant::Client { .. })).unwrap();
        let pieces: Vec<String> = client.pieces().iter().map(ToString::to_string).collect();
        assert_eq!(
            pieces,
            [
                "uid 7 and gid 8 may load",
                "uid 7 and gid 8 may maps (only k)",
                "uid 7 and gid 8 may maps (only m)"
            ]
        );
    }
}
