//! A policy: one TOML file per app, from bytes to types.
//!
//! The way of the data: bytes of a root-owned file ([`file`]) -> `raw` (serde, unknown keys refused) -> `build`
//! (every text to a type of [`crate::names`], every rule with its line) -> [`Policy`]. Errors keep their place in the
//! file and are shown with the line underlined ([`report`]).
#![forbid(unsafe_code)]

mod build;
pub mod file;
mod needs;
pub mod object;
mod print;
mod raw;
pub mod report;
mod require;

pub use needs::{Need, capabilities, needed};
pub use print::Toml;
pub use report::PolicyError;
pub use require::{Machine, kernel_version};

use crate::functions::Function;
use crate::hooks::Kind;
use crate::names::{
    AbsolutePath, EventName, FunctionName, GlobalName, MapName, ObjectName, Pattern, ProgramName, SliceName,
    SymbolName, UnitName,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// What one app may do, and for whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// The path it was read from, for messages and the audit record.
    pub file: String,
    /// SHA-256 of the file.
    pub digest: [u8; 32],
    /// For people.
    pub description: String,
    /// Who may use it; nobody else.
    pub clients: Vec<Client>,
    /// Its objects.
    pub objects: BTreeMap<ObjectName, Object>,
    /// Upper bounds.
    pub limits: Limits,
    /// How long loaded things live.
    pub keep: Keep,
    /// The network namespace of the app's interfaces; none is the one that helpers are started in.
    pub netns: Option<AbsolutePath>,
    /// What must be there, or the helper does not serve.
    pub require: Require,
}

/// One `[[client]]`: all conditions must hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Client {
    /// Where it stands.
    pub line: u32,
    /// The user, resolved when the file was read.
    pub user: Option<u32>,
    /// The group.
    pub group: Option<u32>,
    /// The system unit.
    pub unit: Option<Unit>,
    /// What it may do.
    pub may: BTreeSet<Right>,
    /// The maps that `Right::Maps` is for; none is all.
    pub maps: Option<BTreeSet<MapName>>,
    /// Those of them that it may only read through the broker, whatever the object's table says.
    pub proxy: BTreeSet<MapName>,
}

/// A system unit, and the slice it is in. Only the service manager makes cgroups in slices: nobody else can run a
/// process there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Unit {
    /// Its name.
    pub name: UnitName,
    /// Where `Slice=` of the unit puts it.
    pub slice: SliceName,
}

impl Unit {
    /// The slice of a unit that does not say one. Source: systemd.special(7) `system.slice`, systemd.unit(5) on
    /// templates: instances are in a slice of their template.
    pub fn default_slice(name: &UnitName) -> SliceName {
        let template = name.as_str().split_once('@').map(|(template, _)| template);
        let slice = template.map_or_else(
            || "system.slice".to_owned(),
            |template| format!("system-{}.slice", template.replace('\\', r"\x5c").replace('-', r"\x2d")),
        );
        // A template's name has no characters that a slice's may not have. The fallback matches no process.
        slice.try_into().unwrap_or_else(|_| SliceName::root())
    }

    /// Its cgroup, from the root of cgroup v2, without a leading `/`.
    pub fn cgroup(&self) -> String {
        let slice = self.slice.as_str();
        let slice = slice.strip_suffix(".slice").unwrap_or(slice).trim_start_matches('-');
        let ends = slice.match_indices('-').map(|(end, _)| end).chain([slice.len()]).filter(|end| *end > 0);
        let mut parts: Vec<String> = ends.map(|end| escaped(&format!("{}.slice", &slice[..end]))).collect();
        parts.push(escaped(self.name.as_str()));
        parts.join("/")
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name.fmt(f)
    }
}

/// The name of a cgroup that could be taken for a file of the kernel's gets a `_` in front.
/// Source: `cg_needs_escape` of systemd's src/basic/cgroup-util.c.
fn escaped(name: &str) -> String {
    const CONTROLLERS: [&str; 8] = ["cgroup", "cpu", "cpuacct", "cpuset", "io", "blkio", "memory", "devices"];
    let first = name.split('.').next().unwrap_or_default();
    let is_kernels = CONTROLLERS.contains(&first) || first == "pids" || first.starts_with("bpf-");
    if is_kernels || name.starts_with(['_', '.']) { format!("_{name}") } else { name.to_owned() }
}

/// A word of `may`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Right {
    /// Load and unload objects.
    Load,
    /// Attach and detach.
    Attach,
    /// Receive or read maps.
    Maps,
}

impl Right {
    /// All, with their words.
    pub const WORDS: [(&'static str, Right); 3] =
        [("load", Right::Load), ("attach", Right::Attach), ("maps", Right::Maps)];
}

/// One `[objects.NAME]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// Where it stands.
    pub line: u32,
    /// The file.
    pub path: AbsolutePath,
    /// Its digest; without one the file and its parents must be root's alone.
    pub sha256: Option<[u8; 32]>,
    /// Programs and where they may be attached.
    pub programs: Vec<ProgramRule>,
    /// Maps and how they are handed over; a map that is not named is not handed over.
    pub maps: BTreeMap<MapName, (Access, u32)>,
    /// Variables of `.rodata` that a client may set.
    pub globals: BTreeMap<GlobalName, Range>,
    /// Functions that need a grant and have it.
    pub functions: BTreeSet<Function>,
}

/// One entry of a hook's array.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramRule {
    /// Where it stands.
    pub line: u32,
    /// The program.
    pub program: ProgramName,
    /// What it is and to what it may be attached.
    pub hook: Hook,
    /// The program's descriptor is handed to the client.
    pub program_fd: bool,
    /// The link's descriptor is handed to the client.
    pub link_fd: bool,
}

/// To what a program may be attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hook {
    /// Interfaces, in this mode.
    Xdp {
        /// Which.
        interfaces: Vec<Pattern>,
        /// How.
        mode: XdpMode,
    },
    /// Interfaces, in this direction.
    Tcx {
        /// Which.
        interfaces: Vec<Pattern>,
        /// Which way.
        direction: Direction,
        /// Before or after the others that are attached there.
        order: Order,
    },
    /// Sockets of a cgroup.
    CgroupSkb {
        /// Directories of cgroup v2.
        cgroups: Vec<AbsolutePath>,
        /// The cgroup of the unit by which an entry names the client, too.
        own: bool,
        /// Which way.
        direction: Direction,
    },
    /// Raw tracepoints, by name.
    RawTracepoint {
        /// Which.
        events: Vec<EventName>,
    },
    /// Tracepoints, `category:name`.
    Tracepoint {
        /// Which.
        events: Vec<EventName>,
    },
    /// Functions of one binary.
    Uprobe {
        /// The file.
        binary: AbsolutePath,
        /// The functions.
        symbols: Vec<SymbolName>,
        /// When they return, not when they are called.
        at_return: bool,
    },
    /// Nothing: its holder attaches it to sockets of its own.
    SocketFilter,
    /// The beginning of one function of the kernel.
    Fentry {
        /// Which.
        function: FunctionName,
    },
    /// The end of one function of the kernel.
    Fexit {
        /// Which.
        function: FunctionName,
    },
    /// Functions of the kernel.
    Kprobe {
        /// Which.
        functions: Vec<FunctionName>,
        /// When they return, not when they are called.
        at_return: bool,
    },
}

impl Hook {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Xdp { .. } => Kind::Xdp,
            Self::Tcx { .. } => Kind::Tcx,
            Self::CgroupSkb { .. } => Kind::CgroupSkb,
            Self::RawTracepoint { .. } => Kind::RawTracepoint,
            Self::Tracepoint { .. } => Kind::Tracepoint,
            Self::Uprobe { .. } => Kind::Uprobe,
            Self::SocketFilter => Kind::SocketFilter,
            Self::Fentry { .. } => Kind::Fentry,
            Self::Fexit { .. } => Kind::Fexit,
            Self::Kprobe { .. } => Kind::Kprobe,
        }
    }

    /// The function of the kernel that a program is for from its load on: it is attached there or nowhere.
    pub fn bound_to(&self) -> Option<&FunctionName> {
        match self {
            Self::Fentry { function } | Self::Fexit { function } => Some(function),
            _ => None,
        }
    }

    /// `enum bpf_attach_type` to load a program with. Source: include/uapi/linux/bpf.h.
    pub fn expected_attach_type(&self) -> u32 {
        match self {
            Self::Xdp { .. } => 37,
            Self::CgroupSkb { direction: Direction::Egress, .. } => 1,
            Self::Uprobe { .. } => 48,
            Self::Fentry { .. } => 24,
            Self::Fexit { .. } => 25,
            Self::Kprobe { .. } => 42,
            // A sched_cls program may be attached in both directions; the kernel asks for 0 at load.
            Self::CgroupSkb { .. }
            | Self::Tcx { .. }
            | Self::RawTracepoint { .. }
            | Self::Tracepoint { .. }
            | Self::SocketFilter => 0,
        }
    }
}

/// How an XDP program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XdpMode {
    /// In the driver, or not at all.
    Native,
    /// In the kernel's generic path.
    Generic,
    /// In the driver if it can.
    Any,
}

impl XdpMode {
    /// All, with their words in a policy.
    pub const WORDS: [(&'static str, XdpMode); 3] =
        [("native", XdpMode::Native), ("generic", XdpMode::Generic), ("any", XdpMode::Any)];
}

/// Which way packets go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// In.
    Ingress,
    /// Out.
    Egress,
}

impl Direction {
    /// All, with their words in a policy.
    pub const WORDS: [(&'static str, Direction); 2] =
        [("ingress", Direction::Ingress), ("egress", Direction::Egress)];
}

/// Where among the programs that are attached already, at the time of attaching.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Runs before them.
    First,
    /// Runs after them.
    Last,
}

impl Order {
    /// All, with their words in a policy.
    pub const WORDS: [(&'static str, Order); 2] = [("first", Order::First), ("last", Order::Last)];
}

/// How a map is handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Access {
    /// Not at all.
    None,
    /// Read through the broker.
    Proxy,
    /// A descriptor, after the map was frozen: nobody in user space can write it any more.
    Frozen,
    /// A descriptor with every right over the map.
    ReadWrite,
}

impl Access {
    /// All, with their words in a policy.
    pub const WORDS: [(&'static str, Access); 4] = [
        ("none", Access::None),
        ("proxy", Access::Proxy),
        ("frozen", Access::Frozen),
        ("read-write", Access::ReadWrite),
    ];

    /// The word in the Varlink interface, which has no `-`.
    pub fn interface_word(self) -> String {
        Self::WORDS[self as usize].0.replace('-', "_")
    }

    /// A descriptor goes to the client.
    pub fn hands_over(self) -> bool {
        matches!(self, Self::Frozen | Self::ReadWrite)
    }
}

/// The values a client may give a global.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Least.
    pub min: i64,
    /// Most.
    pub max: i64,
    /// Where it stands.
    pub line: u32,
}

/// Upper bounds of one app, over all of its sessions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Programs loaded at a time.
    pub programs: u32,
    /// Maps at a time.
    pub maps: u32,
    /// Attachments at a time.
    pub links: u32,
    /// Instructions of one program.
    pub instructions: u32,
    /// Bytes of all maps, as computed before the kernel is asked.
    pub map_memory: u64,
    /// Connections at a time.
    pub connections: u32,
    /// Loads, those that fail included, in a minute.
    pub loads_per_minute: u32,
}

impl Default for Limits {
    /// Enough for every example; small enough that an app that says nothing cannot hurt the machine.
    fn default() -> Self {
        Self {
            programs: 16,
            maps: 32,
            links: 16,
            instructions: 1_000_000,
            map_memory: 64 << 20,
            connections: 16,
            loads_per_minute: 600,
        }
    }
}

impl Limits {
    /// The upper ends: what the processes can hold. One message carries at most 253 descriptors (SCM_MAX_FD), which
    /// are maps and programs of one load; a program of over a million instructions is refused by the kernel.
    pub const MOST: Self = Self {
        programs: 64,
        maps: 128,
        links: 256,
        instructions: 1_000_000,
        map_memory: 1 << 40,
        connections: 4096,
        loads_per_minute: 60_000,
    };
}

/// How long loaded things live.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Until the connection that loaded them ends.
    Session,
    /// Until they are unloaded.
    App,
    /// Always: the helper loads and attaches everything by itself, and again when something is gone.
    Boot,
}

impl Keep {
    /// All, with their words in a policy.
    pub const WORDS: [(&'static str, Keep); 3] =
        [("session", Keep::Session), ("app", Keep::App), ("boot", Keep::Boot)];

    /// What is loaded survives the sessions of clients, and the helper too where its descriptors are kept.
    pub fn is_persistent(self) -> bool {
        self != Self::Session
    }
}

/// What must be there. What is missing refuses; nothing falls back silently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Require {
    /// The helper's confinement.
    pub sandbox: Sandboxing,
    /// Who finds out a client's unit.
    pub unit_check: UnitCheck,
    /// The least version of the kernel, major and minor.
    pub kernel: Option<(u32, u32)>,
    /// The least ABI of landlock in force.
    pub landlock: Option<u32>,
    /// The kernel describes its types in /sys/kernel/btf/vmlinux.
    pub btf: bool,
    /// Where the table stands; 0 if it is not there.
    pub line: u32,
}

impl Require {
    /// No kernel has so high an ABI of landlock yet; a larger number is a mistake.
    pub const MOST_LANDLOCK: u32 = 1000;
}

/// Who finds out a client's unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnitCheck {
    /// The helper too, which needs Linux 6.13 for it.
    Helper,
    /// Where the helper cannot, the broker alone: one that was taken over could name other units.
    Broker,
}

impl UnitCheck {
    /// All, with their words in a policy.
    pub const WORDS: [(&'static str, UnitCheck); 2] =
        [("helper", UnitCheck::Helper), ("broker", UnitCheck::Broker)];
}

/// What the helper's confinement must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sandboxing {
    /// seccomp and landlock.
    Full,
    /// seccomp; landlock only where the kernel has it.
    Seccomp,
}

impl Sandboxing {
    /// All, with their words in a policy.
    pub const WORDS: [(&'static str, Sandboxing); 2] =
        [("full", Sandboxing::Full), ("seccomp", Sandboxing::Seccomp)];
}

/// Written as in a policy: the words stand in the order of the values.
macro_rules! written_by_words {
    ($($type:ident)+) => {
        $(impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(Self::WORDS[*self as usize].0)
            }
        })+
    };
}

written_by_words!(Right XdpMode Direction Order Access Keep UnitCheck Sandboxing);

/// The word for the cgroup of the unit by which an entry names the client.
pub const OWN_CGROUP: &str = "own";

/// Version of this file format.
const VERSION: i64 = 1;

#[cfg(test)]
mod tests;

impl Policy {
    /// Parses the text of a policy file. `accounts` resolves names; `file` is for messages.
    pub fn parse(file: &str, text: &str, accounts: &file::Accounts) -> Result<Self, PolicyError> {
        build::policy(file, text, accounts)
    }

    /// The units that its clients are asked for.
    pub fn units(&self) -> impl Iterator<Item = &Unit> {
        self.clients.iter().filter_map(|client| client.unit.as_ref())
    }

    /// The functions of the kernel that are to be known by number, each with the line that names it.
    pub fn kernel_functions(&self) -> impl Iterator<Item = (u32, &FunctionName)> {
        self.objects.values().flat_map(|object| {
            let called = object.functions.iter().filter_map(|function| match function {
                Function::Kernel(name) => Some((object.line, name)),
                Function::Helper(_) => None,
            });
            let bound = object.programs.iter().filter_map(|rule| Some((rule.line, rule.hook.bound_to()?)));
            called.chain(bound)
        })
    }

    /// `file:line`, as in audit records and messages.
    pub fn at(&self, line: u32) -> String {
        format!("{}:{line}", self.file)
    }
}
