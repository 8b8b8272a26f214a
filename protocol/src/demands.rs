//! Which capabilities the kernel demands, for every type of program and of map, also those that bpfgate has no hook for:
//! what `bpfgate caps need` says of an object, and what a test compares with the running kernel.
//!
//! Nothing is decided by it. What a helper is given comes from [`crate::hooks::ROWS`], which a test compares with this.
#![forbid(unsafe_code)]

use crate::hooks::Capability;
use crate::inspect::map_type_name;

/// A set of capabilities, as the kernel's masks have it.
pub type Mask = u64;

/// `CAP_NET_ADMIN`
pub const NET_ADMIN: Mask = 1 << Capability::NetAdmin.bit();
/// `CAP_PERFMON`
pub const PERFMON: Mask = 1 << Capability::Perfmon.bit();
/// `CAP_BPF`
pub const BPF: Mask = 1 << Capability::Bpf.bit();
/// `CAP_DAC_READ_SEARCH`. Source: include/uapi/linux/capability.h, as for the next.
pub const DAC_READ_SEARCH: Mask = 1 << 2;
/// `CAP_SYS_ADMIN`
pub const SYS_ADMIN: Mask = 1 << 21;

/// A kernel, by the two numbers that count.
pub type Kernel = (u32, u32);

/// `CAP_BPF` and `CAP_PERFMON` exist from this kernel on; before it `CAP_SYS_ADMIN` stood for both.
pub const SPLIT: Kernel = (5, 8);

/// From here on maps and programs are charged to the memory cgroup of who makes them; before, to `RLIMIT_MEMLOCK`.
pub const NO_MEMLOCK: Kernel = (5, 11);

/// From here on a process without `CAP_BPF` may use the maps that it holds where unprivileged bpf(2) is switched off.
pub const UNPRIVILEGED_MAPS: Kernel = (5, 19);

/// From here on there are BPF tokens.
pub const TOKENS: Kernel = (6, 9);

/// A type of program.
#[derive(Debug)]
pub struct ProgramType {
    /// `enum bpf_prog_type`. Source: include/uapi/linux/bpf.h.
    pub number: u32,
    /// As bpftool writes it.
    pub name: &'static str,
    /// For `BPF_PROG_LOAD`. Source: `bpf_prog_load` in kernel/bpf/syscall.c.
    pub load: Mask,
    /// How it is attached.
    pub ways: &'static [Way],
    /// The first kernel that has it.
    pub since: Kernel,
}

/// A way to attach a program.
#[derive(Debug)]
pub struct Way {
    /// What it is called.
    pub how: &'static str,
    /// What it takes.
    pub needs: Mask,
    /// The first kernel that has it.
    pub since: Kernel,
    /// For programs whose section begins with one of these; empty: for all of the type.
    pub sections: &'static [&'static str],
}

const fn way(how: &'static str, needs: Mask, since: Kernel) -> Way {
    Way { how, needs, since, sections: &[] }
}

/// kprobes and uprobes are of one type; where they are attached, their sections say.
const fn probe(how: &'static str, needs: Mask, since: Kernel, sections: &'static [&'static str]) -> Way {
    Way { how, needs, since, sections }
}

const CGROUP: &[Way] = &[way("cgroup link", 0, (5, 7))];
const NETLINK_LWT: &[Way] = &[way("route, by netlink", NET_ADMIN, (4, 10))];
const RAW_TRACEPOINT: &[Way] = &[way("raw tracepoint link", 0, (4, 17))];
const SOCKMAP: &[Way] = &[way("sockmap, by BPF_PROG_ATTACH or link", 0, (4, 14))];
const TRAMPOLINE: &[Way] = &[way("tracing link", 0, (5, 5))];
const KPROBE: &[&str] = &["kprobe", "kretprobe", "ksyscall", "kretsyscall"];
const UPROBE: &[&str] = &["uprobe", "uretprobe", "usdt"];

const fn row(
    number: u32,
    name: &'static str,
    load: Mask,
    ways: &'static [Way],
    since: Kernel,
) -> ProgramType {
    ProgramType { number, name, load, ways, since }
}

/// Every type that Linux 6.18 has.
#[rustfmt::skip]
pub const PROGRAMS: [ProgramType; 32] = [
    row(1, "socket_filter", BPF, &[way("own socket, by SO_ATTACH_BPF", 0, (3, 19))], (3, 19)),
    row(2, "kprobe", BPF | PERFMON, &[
        probe("kprobe.multi link", 0, (5, 18), KPROBE),
        probe("perf_event_open of a kprobe", PERFMON, (4, 17), KPROBE),
        probe("uprobe.multi link", 0, (6, 6), UPROBE),
        probe("perf_event_open of a uprobe", SYS_ADMIN, (4, 17), UPROBE),
    ], (4, 1)),
    row(3, "sched_cls", BPF | NET_ADMIN, &[way("tcx link", 0, (6, 6)), way("clsact, by netlink", NET_ADMIN, (4, 5))], (4, 1)),
    row(4, "sched_act", BPF | NET_ADMIN, &[way("action, by netlink", NET_ADMIN, (4, 1))], (4, 1)),
    row(5, "tracepoint", BPF | PERFMON, &[
        way("perf_event_open, with an id that somebody else has read", PERFMON, (4, 7)),
        way("perf_event_open, with the id from tracefs, which is root's", PERFMON | DAC_READ_SEARCH, (4, 7)),
    ], (4, 7)),
    row(6, "xdp", BPF | NET_ADMIN, &[way("xdp link", 0, (5, 9)), way("netlink", NET_ADMIN, (4, 8))], (4, 8)),
    row(7, "perf_event", BPF | PERFMON, &[way("perf_event_open", PERFMON, (4, 9))], (4, 9)),
    row(8, "cgroup_skb", BPF, &[way("cgroup link", NET_ADMIN, (5, 7))], (4, 10)),
    row(9, "cgroup_sock", BPF | NET_ADMIN, CGROUP, (4, 10)),
    row(10, "lwt_in", BPF | NET_ADMIN, NETLINK_LWT, (4, 10)),
    row(11, "lwt_out", BPF | NET_ADMIN, NETLINK_LWT, (4, 10)),
    row(12, "lwt_xmit", BPF | NET_ADMIN, NETLINK_LWT, (4, 10)),
    row(13, "sock_ops", BPF | NET_ADMIN, CGROUP, (4, 13)),
    row(14, "sk_skb", BPF | NET_ADMIN, SOCKMAP, (4, 14)),
    row(15, "cgroup_device", BPF | NET_ADMIN, CGROUP, (4, 15)),
    row(16, "sk_msg", BPF | NET_ADMIN, SOCKMAP, (4, 17)),
    row(17, "raw_tracepoint", BPF | PERFMON, RAW_TRACEPOINT, (4, 17)),
    row(18, "cgroup_sock_addr", BPF | NET_ADMIN, CGROUP, (4, 17)),
    row(19, "lwt_seg6local", BPF | NET_ADMIN, NETLINK_LWT, (4, 18)),
    row(20, "lirc_mode2", BPF, &[], (4, 18)),
    row(21, "sk_reuseport", BPF, &[way("own socket, by SO_ATTACH_REUSEPORT_EBPF", 0, (4, 19))], (4, 19)),
    row(22, "flow_dissector", BPF | NET_ADMIN, &[way("netns link", 0, (5, 8))], (4, 20)),
    row(23, "cgroup_sysctl", BPF | NET_ADMIN, CGROUP, (5, 2)),
    row(24, "raw_tracepoint_writable", BPF | PERFMON, RAW_TRACEPOINT, (5, 2)),
    row(25, "cgroup_sockopt", BPF | NET_ADMIN, CGROUP, (5, 3)),
    row(26, "tracing", BPF | PERFMON, TRAMPOLINE, (5, 5)),
    row(27, "struct_ops", BPF | PERFMON, &[way("update of its map, or a link to it", 0, (5, 6))], (5, 6)),
    row(28, "ext", BPF | PERFMON | NET_ADMIN, TRAMPOLINE, (5, 6)),
    row(29, "lsm", BPF | PERFMON, TRAMPOLINE, (5, 7)),
    row(30, "sk_lookup", BPF, &[way("netns link", 0, (5, 9))], (5, 9)),
    row(31, "syscall", BPF, &[way("not attached: BPF_PROG_TEST_RUN", 0, (5, 14))], (5, 14)),
    row(32, "netfilter", BPF | NET_ADMIN, &[way("netfilter link", 0, (6, 4))], (6, 4)),
];

/// The first kernel with each type of map, by number.
#[rustfmt::skip]
const MAPS_SINCE: [Kernel; 34] = [
    (3, 19), (3, 19), (4, 2), (4, 3), (4, 6), (4, 6), (4, 6), (4, 8), (4, 10), (4, 10), (4, 11), (4, 12), (4, 12),
    (4, 14), (4, 14), (4, 15), (4, 18), (4, 18), (4, 19), (4, 19), (4, 20), (4, 20), (4, 20), (5, 2), (5, 4), (5, 6),
    (5, 8), (5, 10), (5, 11), (5, 16), (6, 1), (6, 2), (6, 9), (6, 19),
];

/// The types of maps that send packets to devices and sockets.
const OF_NETWORK: [&str; 5] = ["devmap", "sockmap", "xskmap", "sockhash", "devmap_hash"];

/// A type of map.
#[derive(Debug)]
pub struct MapType {
    /// `enum bpf_map_type`.
    pub number: u32,
    /// As bpftool writes it.
    pub name: String,
    /// For `BPF_MAP_CREATE`. Source: `map_create` in kernel/bpf/syscall.c.
    pub create: Mask,
    /// The first kernel that has it.
    pub since: Kernel,
}

/// Every type of map, in the order of their numbers.
pub fn maps() -> impl Iterator<Item = MapType> {
    (1..).zip(MAPS_SINCE).map(|(number, since)| {
        let name = map_type_name(number);
        let network = if OF_NETWORK.contains(&name.as_str()) { NET_ADMIN } else { 0 };
        MapType { number, name, create: BPF | network, since }
    })
}

/// The type of program with this number.
pub fn program(number: u32) -> Option<&'static ProgramType> {
    PROGRAMS.iter().find(|row| row.number == number)
}

impl ProgramType {
    /// What a load takes on a kernel.
    pub fn load_on(&self, kernel: Kernel) -> Mask {
        // Before, one question was asked for all types.
        if kernel < SPLIT { SYS_ADMIN } else { self.load }
    }

    /// How a program with this section can be attached on a kernel.
    pub fn ways_on(&self, kernel: Kernel, section: &str) -> Vec<&'static Way> {
        let fits = |way: &&Way| {
            let named = |prefix: &&str| section.trim_start_matches('?').starts_with(*prefix);
            way.since <= kernel && (way.sections.is_empty() || way.sections.iter().any(named))
        };
        self.ways.iter().filter(fits).collect()
    }
}

/// What a mask of the tables becomes on a kernel.
pub fn on(kernel: Kernel, mask: Mask) -> Mask {
    let split = BPF | PERFMON;
    if kernel < SPLIT && mask & split != 0 { mask & !split | SYS_ADMIN } else { mask }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hooks::ROWS;

    fn mask(capabilities: &[Capability]) -> Mask {
        capabilities.iter().fold(0, |mask, capability| mask | 1 << capability.bit())
    }

    #[test]
    fn the_hooks_say_the_same() {
        for hook in &ROWS {
            let row = program(hook.prog_type).expect("its type is in the table");
            assert_eq!(row.name, hook.type_name);
            assert_eq!(row.load, BPF | mask(hook.load), "{}", hook.key);
            let like = |way: &&Way| way.needs == mask(hook.attach);
            assert!(
                row.ways.iter().any(|way| like(&way)),
                "no way to attach {} takes what it takes",
                hook.key
            );
        }
    }

    #[test]
    fn the_tables_are_in_the_order_of_the_kernel() {
        assert!(PROGRAMS.iter().zip(1..).all(|(row, number)| row.number == number));
        let all: Vec<MapType> = maps().collect();
        let after = u32::try_from(all.len()).unwrap() + 1;
        assert_eq!(map_type_name(after), format!("type_{after}"), "a map type without a row");
        let network: Vec<u32> = all.iter().filter(|map| map.create != BPF).map(|map| map.number).collect();
        assert_eq!(network, [14, 15, 17, 18, 25]);
    }

    #[test]
    fn before_the_split_one_capability_stood_for_both() {
        assert_eq!(on((5, 7), BPF | PERFMON | NET_ADMIN), SYS_ADMIN | NET_ADMIN);
        assert_eq!(on((5, 7), NET_ADMIN), NET_ADMIN);
        assert_eq!(on((5, 8), BPF), BPF);
        assert_eq!(program(6).unwrap().load_on((5, 7)), SYS_ADMIN);
    }

    #[test]
    fn sections_tell_kprobes_from_uprobes() {
        let kprobe = program(2).unwrap();
        let how = |section, kernel| -> Vec<&str> {
            kprobe.ways_on(kernel, section).iter().map(|way| way.how).collect()
        };
        assert_eq!(how("uprobe.multi", (6, 6)), ["uprobe.multi link", "perf_event_open of a uprobe"]);
        assert_eq!(how("?uretprobe//bin/sh:f", (6, 1)), ["perf_event_open of a uprobe"]);
        assert_eq!(how("kretprobe/f", (5, 17)), ["perf_event_open of a kprobe"]);
    }
}
