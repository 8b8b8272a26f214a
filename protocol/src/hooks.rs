//! One row per kind of program: what the policy calls it, what the kernel calls it, what it needs.
//!
//! To add a kind: a row here, a rule in [`crate::policy`], an arm in the helper's `attach`.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};
use std::fmt;

/// The capabilities that a helper may be given. `CAP_SYS_ADMIN` and the `CAP_DAC_*` are not among them, by type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Capability {
    /// `CAP_NET_ADMIN`, bit 12.
    NetAdmin,
    /// `CAP_PERFMON`, bit 38.
    Perfmon,
    /// `CAP_BPF`, bit 39.
    Bpf,
}

impl Capability {
    /// All of them.
    pub const ALL: [Capability; 3] = [Capability::NetAdmin, Capability::Perfmon, Capability::Bpf];

    /// The name as in capabilities(7).
    pub const fn name(self) -> &'static str {
        match self {
            Self::NetAdmin => "CAP_NET_ADMIN",
            Self::Perfmon => "CAP_PERFMON",
            Self::Bpf => "CAP_BPF",
        }
    }

    /// Its bit in the kernel's masks. Source: include/uapi/linux/capability.h.
    pub const fn bit(self) -> u32 {
        match self {
            Self::NetAdmin => 12,
            Self::Perfmon => 38,
            Self::Bpf => 39,
        }
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A kind of program, by the key of its array in a policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Kind {
    /// `xdp`
    Xdp,
    /// `tcx`
    Tcx,
    /// `cgroup_skb`
    CgroupSkb,
    /// `raw_tracepoint`
    RawTracepoint,
    /// `tracepoint`
    Tracepoint,
    /// `uprobe`
    Uprobe,
    /// `socket_filter`
    SocketFilter,
    /// `fentry`
    Fentry,
    /// `fexit`
    Fexit,
    /// `kprobe`
    Kprobe,
}

/// What is to be known of a kind. Measured on Linux 6.18: docs of the kernel do not list it.
#[derive(Debug)]
pub struct HookRow {
    /// Which.
    pub kind: Kind,
    /// Its key in a policy and its name for clients.
    pub key: &'static str,
    /// `enum bpf_prog_type`. Source: include/uapi/linux/bpf.h.
    pub prog_type: u32,
    /// The kernel's word for the type, for messages.
    pub type_name: &'static str,
    /// Needed by `BPF_PROG_LOAD` beside `CAP_BPF`.
    pub load: &'static [Capability],
    /// Needed to attach with a bpf link.
    pub attach: &'static [Capability],
    /// `BPF_F_*` that a program of this kind may be loaded with.
    pub flags: u32,
    /// First kernel where attaching as bpfgate does it works.
    pub since: (u32, u32),
}

/// `BPF_F_XDP_HAS_FRAGS`: the program can handle packets in several buffers; it gets no further power by it.
pub const XDP_HAS_FRAGS: u32 = 1 << 5;

/// The table.
pub const ROWS: [HookRow; 10] = [
    HookRow {
        kind: Kind::Xdp,
        key: "xdp",
        prog_type: 6,
        type_name: "xdp",
        load: &[Capability::NetAdmin],
        attach: &[],
        flags: XDP_HAS_FRAGS,
        since: (5, 9),
    },
    HookRow {
        kind: Kind::Tcx,
        key: "tcx",
        prog_type: 3,
        type_name: "sched_cls",
        load: &[Capability::NetAdmin],
        attach: &[],
        flags: 0,
        since: (6, 6),
    },
    HookRow {
        kind: Kind::CgroupSkb,
        key: "cgroup_skb",
        prog_type: 8,
        type_name: "cgroup_skb",
        load: &[],
        attach: &[Capability::NetAdmin],
        flags: 0,
        since: (5, 7),
    },
    HookRow {
        kind: Kind::RawTracepoint,
        key: "raw_tracepoint",
        prog_type: 17,
        type_name: "raw_tracepoint",
        load: &[Capability::Perfmon],
        attach: &[],
        flags: 0,
        since: (4, 17),
    },
    HookRow {
        kind: Kind::Tracepoint,
        key: "tracepoint",
        prog_type: 5,
        type_name: "tracepoint",
        load: &[Capability::Perfmon],
        attach: &[Capability::Perfmon],
        flags: 0,
        since: (5, 15),
    },
    HookRow {
        kind: Kind::Uprobe,
        key: "uprobe",
        prog_type: 2,
        type_name: "kprobe",
        load: &[Capability::Perfmon],
        attach: &[],
        flags: 0,
        since: (6, 6),
    },
    HookRow {
        kind: Kind::SocketFilter,
        key: "socket_filter",
        prog_type: 1,
        type_name: "socket_filter",
        load: &[],
        attach: &[],
        flags: 0,
        since: (3, 19),
    },
    HookRow {
        kind: Kind::Fentry,
        key: "fentry",
        prog_type: 26,
        type_name: "tracing",
        load: &[Capability::Perfmon],
        attach: &[],
        flags: 0,
        since: (5, 19),
    },
    HookRow {
        kind: Kind::Fexit,
        key: "fexit",
        prog_type: 26,
        type_name: "tracing",
        load: &[Capability::Perfmon],
        attach: &[],
        flags: 0,
        since: (5, 19),
    },
    HookRow {
        kind: Kind::Kprobe,
        key: "kprobe",
        prog_type: 2,
        type_name: "kprobe",
        load: &[Capability::Perfmon],
        attach: &[],
        flags: 0,
        since: (5, 18),
    },
];

impl Kind {
    /// Its row.
    pub fn row(self) -> &'static HookRow {
        &ROWS[self as usize]
    }

    /// The kind with this key.
    pub fn from_key(key: &str) -> Option<Self> {
        ROWS.iter().find(|row| row.key == key).map(|row| row.kind)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.row().key)
    }
}

/// The kernel's word for a program type, for messages about objects that are not as the policy says.
pub fn type_name(prog_type: u32) -> String {
    ROWS.iter()
        .find(|row| row.prog_type == prog_type)
        .map_or_else(|| format!("number {prog_type}"), |row| row.type_name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_enum() {
        for (i, row) in ROWS.iter().enumerate() {
            assert_eq!(row.kind as usize, i);
            assert_eq!(Kind::from_key(row.key), Some(row.kind));
        }
        assert_eq!(Kind::from_key("lsm"), None);
    }
}
