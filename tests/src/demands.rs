//! Which capabilities the running kernel demands for each type of program and map: by asking it, again and again, with
//! one capability less.

use crate::sys::{self, Create, Load};
use crate::user::with_capabilities;
use bpfgate_protocol::demands::{self, Mask, PROGRAMS, ProgramType};
use bpfgate_protocol::policy::Machine;
use nix::errno::Errno;
use std::fmt::Write as _;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// What the kernel said of one type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measured {
    /// It is made with exactly these, and with none of them less.
    Exactly(Mask),
    /// It cannot be made on this machine, whoever asks.
    Not(Errno),
}

/// Bisects. `make` is what takes capabilities, whoever calls it.
///
/// Panics: the kernel contradicts itself: with what it asked for one by one the call is refused, or a set without one
/// of them is enough.
pub fn measure(make: impl Fn() -> io::Result<()> + Sync) -> Measured {
    let with = |mask: Mask| -> Result<(), Errno> {
        with_capabilities(mask, &make).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))
    };
    let refused = |result: Result<(), Errno>| matches!(result, Err(Errno::EPERM | Errno::EACCES));
    let own = own();
    if let Err(errno) = with(own) {
        return Measured::Not(errno);
    }
    // It stands in for those that are looked for.
    let all = own & !demands::SYS_ADMIN;
    let base = if refused(with(all)) { own } else { all };
    let each = |set: Mask| (0..u64::BITS).map(|bit| 1 << bit).filter(move |one: &Mask| set & one != 0);
    let needed = each(base).filter(|one| refused(with(base & !one))).fold(0, |set, one| set | one);
    assert_eq!(with(needed), Ok(()), "not enough: {needed:x}");
    for one in each(needed) {
        assert!(refused(with(needed & !one)), "{one:x} of {needed:x} is not needed");
    }
    Measured::Exactly(needed)
}

/// What this process may hand to its threads.
fn own() -> Mask {
    let permitted = caps::read(None, caps::CapSet::Permitted).expect("capabilities can be read");
    permitted.iter().fold(0, |mask, capability| mask | capability.bitmask())
}

const BTF_STRUCT: u32 = 4;
const BTF_FUNC: u32 = 12;

/// The smallest program of a type.
pub fn smallest(row: &ProgramType) -> Load {
    let kernel_type = |name, kind| sys::kernel_type(name, kind).map_or(0, |(id, _)| id);
    let (attach_type, flags, result, btf_id) = match row.name {
        "xdp" => (37, 0, 2, 0),
        "cgroup_sock" => (2, 0, 1, 0),
        "cgroup_sock_addr" => (8, 0, 1, 0),
        "cgroup_sockopt" => (21, 0, 1, 0),
        "cgroup_device" | "cgroup_sysctl" | "cgroup_skb" | "sock_ops" => (0, 0, 1, 0),
        "sk_lookup" => (36, 0, 1, 0),
        "netfilter" => (45, 0, 1, 0),
        // BPF_F_SLEEPABLE
        "syscall" => (0, 1 << 4, 0, 0),
        // BPF_TRACE_ITER, which needs no trampoline.
        "tracing" => (28, 0, 0, kernel_type("bpf_iter_task", BTF_FUNC)),
        "lsm" => (27, 0, 0, kernel_type("bpf_lsm_file_open", BTF_FUNC)),
        // Its first function, `ssthresh`.
        "struct_ops" => (0, 0, 0, kernel_type("tcp_congestion_ops", BTF_STRUCT)),
        _ => (0, 0, 0, 0),
    };
    Load { prog_type: row.number, attach_type, flags, result, btf_id }
}

/// What a map can be made from that is not made with it.
pub struct Parts {
    inner: OwnedFd,
    btf: OwnedFd,
}

impl Parts {
    /// Makes them, as root.
    pub fn new() -> io::Result<Self> {
        let inner = sys::create(Create { map_type: 2, sizes: (4, 4, 1), ..Create::default() })?;
        Ok(Self { inner, btf: sys::btf_of_int()? })
    }

    /// The smallest map of a type.
    pub fn smallest(&self, row: &demands::MapType) -> Create<'_> {
        // BPF_F_NO_PREALLOC, BPF_F_MMAPABLE; a ring has whole pages, of any size.
        let (no_prealloc, mmapable, pages) = (1, 1 << 10, 1 << 16);
        let plain = Create { map_type: row.number, sizes: (4, 4, 1), ..Create::default() };
        let storage = Create { sizes: (4, 4, 0), flags: no_prealloc, btf: Some(self.btf.as_fd()), ..plain };
        match row.name.as_str() {
            "stack_trace" => Create { sizes: (4, 8, 1), ..plain },
            "lpm_trie" => Create { sizes: (8, 4, 1), flags: no_prealloc, ..plain },
            "array_of_maps" | "hash_of_maps" => Create { inner: Some(self.inner.as_fd()), ..plain },
            "cgroup_storage" | "percpu_cgroup_storage" => Create { sizes: (8, 8, 0), ..plain },
            "queue" | "stack" | "bloom_filter" => Create { sizes: (0, 4, 1), ..plain },
            "sk_storage" | "inode_storage" | "task_storage" | "cgrp_storage" => storage,
            "ringbuf" | "user_ringbuf" => Create { sizes: (0, 0, pages), ..plain },
            "arena" => Create { sizes: (0, 0, 1), flags: mmapable, ..plain },
            "insn_array" => Create { sizes: (4, 16, 1), ..plain },
            "struct_ops" => {
                let found = sys::kernel_type("bpf_struct_ops_tcp_congestion_ops", BTF_STRUCT);
                let (value_type, size) = found.unwrap_or_default();
                Create { sizes: (4, size, 1), value_type, ..plain }
            }
            _ => plain,
        }
    }
}

/// All types of programs, each with what the kernel said.
pub fn programs() -> Vec<(&'static ProgramType, Measured)> {
    PROGRAMS
        .iter()
        .map(|row| {
            let load = smallest(row);
            (row, measure(|| sys::load(load)))
        })
        .collect()
}

/// All types of maps, each with what the kernel said.
pub fn maps() -> Vec<(demands::MapType, Measured)> {
    let parts = Parts::new().expect("root makes an array and a BTF");
    demands::maps()
        .map(|row| {
            let create = parts.smallest(&row);
            let measured = measure(|| sys::create(create).map(drop));
            (row, measured)
        })
        .collect()
}

/// Names of the capabilities in a mask.
pub fn names(mask: Mask) -> String {
    let mut all: Vec<caps::Capability> = caps::all().into_iter().collect();
    all.sort_by_key(caps::Capability::index);
    let names: Vec<String> =
        all.iter().filter(|one| mask & one.bitmask() != 0).map(ToString::to_string).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// The row of a type of program in the documentation, without what was measured.
pub fn program_row(row: &ProgramType) -> String {
    let way = |way: &demands::Way| format!("{}: {}", way.how, names(way.needs));
    let ways = row.ways.iter().map(way).collect::<Vec<_>>().join("; ");
    let ways = if ways.is_empty() { "-" } else { &ways };
    let (major, minor) = row.since;
    format!("| {} | {major}.{minor} | {} | {ways} |", row.name, names(row.load))
}

/// The same for a type of map.
pub fn map_row(row: &demands::MapType) -> String {
    let (major, minor) = row.since;
    format!("| {} | {major}.{minor} | {} |", row.name, names(row.create))
}

/// Both tables in Markdown, with what the running kernel said.
pub fn markdown() -> String {
    let (major, minor) = Machine::here().expect("a version").kernel;
    let here = format!("Linux {major}.{minor}");
    let said = |measured: Measured| match measured {
        Measured::Exactly(mask) => names(mask),
        Measured::Not(errno) => format!("not made on this machine: {errno:?}"),
    };
    let mut text = format!(
        "| program type | since | load | attach | load, as measured on {here} |\n|---|---|---|---|---|\n"
    );
    for (row, measured) in programs() {
        let _ = writeln!(text, "{} {} |", program_row(row), said(measured));
    }
    let _ = write!(text, "\n| map type | since | create | as measured on {here} |\n|---|---|---|---|\n");
    for (row, measured) in maps() {
        let _ = writeln!(text, "{} {} |", map_row(&row), said(measured));
    }
    text
}
