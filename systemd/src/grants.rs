//! What a policy grants, one line per grant, the same words for the same meaning: two policies differ in what they
//! allow exactly if these lines differ. Order, spaces, comments and line numbers of the file do not show.

use bpfgate_protocol::functions;
use bpfgate_protocol::names::ObjectName;
use bpfgate_protocol::policy::{
    Access, Client, Direction, Hook, Object, Order, Policy, ProgramRule, Sandboxing, UnitCheck, XdpMode,
    needed,
};
use std::collections::BTreeSet;
use std::fmt::Write as _;

/// All grants of a policy, limits and demands included: `uid 1000 may load, attach`,
/// `program count_packets of object counter on xdp lan*`, `limit programs 16`.
pub fn grants(policy: &Policy) -> BTreeSet<String> {
    let mut lines: BTreeSet<String> = policy.clients.iter().map(client).collect();
    for capability in needed(policy) {
        lines.insert(format!("helper holds {capability}"));
    }
    for (name, object) in &policy.objects {
        add_object(&mut lines, name, object);
    }
    let limits = policy.limits;
    for (what, bound) in [
        ("programs", u64::from(limits.programs)),
        ("maps", u64::from(limits.maps)),
        ("links", u64::from(limits.links)),
        ("instructions", u64::from(limits.instructions)),
        ("map_memory", limits.map_memory),
        ("connections", u64::from(limits.connections)),
        ("loads_per_minute", u64::from(limits.loads_per_minute)),
    ] {
        lines.insert(format!("limit {what} {bound}"));
    }
    lines.insert(format!("keep {}", policy.keep));
    if let Some(netns) = &policy.netns {
        lines.insert(format!("netns {netns}"));
    }
    let require = policy.require;
    if require.unit_check == UnitCheck::Broker {
        lines.insert("the broker alone may check units".into());
    }
    if let Some((major, minor)) = require.kernel {
        lines.insert(format!("requires Linux {major}.{minor}"));
    }
    if let Some(abi) = require.landlock {
        lines.insert(format!("requires landlock ABI {abi}"));
    }
    if require.btf {
        lines.insert("requires the kernel's BTF".into());
    }
    lines.insert(match require.sandbox {
        Sandboxing::Full => "sandbox full".into(),
        Sandboxing::Seccomp => "sandbox seccomp".into(),
    });
    lines.into_iter().map(|line| plain(&line)).collect()
}

fn client(client: &Client) -> String {
    let unit = client.unit.as_ref().map(|unit| format!("unit {} in {}", unit.name, unit.slice));
    let conditions =
        [client.user.map(|id| format!("uid {id}")), client.group.map(|id| format!("gid {id}")), unit];
    let who = conditions.into_iter().flatten().collect::<Vec<_>>().join(" and ");
    let may = client.may.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let list = |maps: &BTreeSet<_>| maps.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let mut line = format!("{who} may {may}");
    if let Some(maps) = &client.maps {
        let _ = write!(line, " (only {})", list(maps));
    }
    if !client.proxy.is_empty() {
        let _ = write!(line, " (by proxy {})", list(&client.proxy));
    }
    line
}

fn add_object(lines: &mut BTreeSet<String>, name: &ObjectName, object: &Object) {
    let bytes = match &object.sha256 {
        Some(digest) => format!("sha256 {}", hex(digest)),
        None => "any bytes that root put there".into(),
    };
    lines.insert(format!("object {name} is {}, {bytes}", object.path));
    for rule in &object.programs {
        let program = format!("program {} of object {name}", rule.program);
        if rule.program_fd {
            lines.insert(format!("{program}: its descriptor is handed out"));
        }
        for place in places(rule) {
            let link = if rule.link_fd { ", the descriptor of the link is handed out" } else { "" };
            lines.insert(format!("{program} {place}{link}"));
        }
    }
    for (map, (access, _)) in &object.maps {
        if *access != Access::None {
            lines.insert(format!("map {map} of object {name} {}", Access::WORDS[*access as usize].0));
        }
    }
    for (global, range) in &object.globals {
        lines.insert(format!("global {global} of object {name} from {} to {}", range.min, range.max));
    }
    for function in &object.functions {
        let function = functions::name(*function).unwrap_or("of an unknown name");
        lines.insert(format!("object {name} may call bpf_{function}"));
    }
}

/// Where a program may run, one by one.
fn places(rule: &ProgramRule) -> Vec<String> {
    let way = |direction: &Direction| match direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    };
    match &rule.hook {
        Hook::Xdp { interfaces, mode } => {
            let mode = match mode {
                XdpMode::Native => "native",
                XdpMode::Generic => "generic",
                XdpMode::Any => "any mode",
            };
            interfaces.iter().map(|name| format!("on xdp {name} ({mode})")).collect()
        }
        Hook::Tcx { interfaces, direction, order } => {
            let order = if *order == Order::First { ", first" } else { "" };
            interfaces.iter().map(|name| format!("on tcx {name} ({}{order})", way(direction))).collect()
        }
        Hook::CgroupSkb { cgroups, own, direction } => {
            let own = own.then(|| "of the client's unit".to_owned());
            let all = cgroups.iter().map(ToString::to_string).chain(own);
            all.map(|cgroup| format!("on cgroup_skb {cgroup} ({})", way(direction))).collect()
        }
        Hook::RawTracepoint { events } => {
            events.iter().map(|event| format!("on raw_tracepoint {event}")).collect()
        }
        Hook::Tracepoint { events } => events.iter().map(|event| format!("on tracepoint {event}")).collect(),
        Hook::Uprobe { binary, symbols, at_return } => {
            let when = if *at_return { "return" } else { "call" };
            symbols.iter().map(|symbol| format!("on uprobe {binary}:{symbol} ({when})")).collect()
        }
        Hook::SocketFilter => vec!["as socket_filter".into()],
    }
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
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
        grants(&Policy::parse("/p.toml", text, &accounts).unwrap())
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
[objects.o.maps]
m = "read-write"
n = "none"
[objects.o.globals]
g = { min = -1, max = 5 }
[objects.o.helpers]
allow = ["bpf_send_signal"]
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
            "program f of object o as socket_filter",
            "program f of object o: its descriptor is handed out",
            "program p of object o on xdp eth0 (native), the descriptor of the link is handed out",
            "program p of object o on xdp lan* (native), the descriptor of the link is handed out",
            "program q of object o on uprobe /b:odd\\x5c (return)",
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
}
