//! Broker and helper. The helper answers every request once, in order.
//!
//! No request names an app or a user: the helper has one app, and asks the kernel who a client is.

use super::{Bulk, Bytes, InstanceId, LinkId, Process, Row, SessionId};
use crate::channel::Message;
use crate::hooks::Kind;
use crate::names::{
    AbsolutePath, EventName, FunctionName, GlobalName, InterfaceName, MapName, ObjectName, ProgramName,
    SymbolName,
};
use crate::policy::{Access, Unit};
use crate::refusal::Refusal;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Where a client wants a program attached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Target {
    /// The one literal target that the policy allows.
    Only,
    /// A network interface, by name in the helper's network namespace.
    Interface(InterfaceName),
    /// A cgroup, by its path as the policy writes it.
    Cgroup(AbsolutePath),
    /// What a client asks for: the cgroup of the unit by which the policy names it.
    Own,
    /// What that comes to.
    Unit(Unit),
    /// A tracepoint or raw tracepoint.
    Event(EventName),
    /// A function of a binary, both as the policy writes them.
    Symbol {
        /// The binary.
        binary: AbsolutePath,
        /// The function.
        symbol: SymbolName,
    },
    /// A function of the kernel.
    Function(FunctionName),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Only => f.write_str("the only one"),
            Self::Interface(name) => name.fmt(f),
            Self::Cgroup(path) => path.fmt(f),
            Self::Own => f.write_str("its own cgroup"),
            Self::Unit(unit) => write!(f, "the cgroup of {unit}"),
            Self::Event(event) => event.fmt(f),
            Self::Symbol { binary, symbol } => write!(f, "{binary}:{symbol}"),
            Self::Function(name) => name.fmt(f),
        }
    }
}

/// A value for a `.rodata` variable. The loader checks that it fits the variable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Global {
    /// The variable.
    pub name: GlobalName,
    /// Its value; `i128` holds every u64 and i64.
    pub value: i128,
}

/// From the broker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToHelper {
    /// Row `Open`.
    Open {
        /// A number that the broker has not used before.
        session: SessionId,
    },
    /// Every row between `Open` and `Close`.
    Ask {
        /// Whose.
        session: SessionId,
        /// What.
        verb: Verb,
    },
    /// Row `Close`.
    Close {
        /// Which session.
        session: SessionId,
    },
    /// Row `Survey`.
    Survey,
    /// Row `Adopt`.
    Adopt {
        /// SHA-256 of the policy that the broker has put in force; none if the app has none any more.
        policy: Option<[u8; 32]>,
        /// Whether the descriptors go with it: there is a file.
        file: bool,
    },
}

/// What a session asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verb {
    /// Row `Load`.
    Load {
        /// Which object of the policy.
        object: ObjectName,
        /// Which of its programs; none named is all that the policy names.
        programs: Vec<ProgramName>,
        /// Initial values of `.rodata`.
        globals: Vec<Global>,
    },
    /// Row `Attach`.
    Attach {
        /// Of which instance.
        instance: InstanceId,
        /// Which program.
        program: ProgramName,
        /// Under which hook of the policy, where there is more than one.
        hook: Option<Kind>,
        /// To what.
        target: Target,
    },
    /// Row `Detach`.
    Detach {
        /// Which link.
        link: LinkId,
    },
    /// Row `Unload`.
    Unload {
        /// Which instance.
        instance: InstanceId,
    },
    /// Row `Map`.
    Map {
        /// Of which instance.
        instance: InstanceId,
        /// Which map.
        map: MapName,
    },
    /// Row `ReadMap`.
    ReadMap {
        /// Of which instance.
        instance: InstanceId,
        /// Which map.
        map: MapName,
        /// The key to go on after; empty at the start.
        cursor: Bytes,
        /// 1..=256 entries.
        limit: u16,
    },
    /// Row `List`.
    List,
}

/// The table of this channel.
pub const ROWS: [Row; 11] = [
    Row {
        name: "Open",
        from: Process::Broker,
        fds_in: "the client's connected socket",
        fds_out: "",
        doc: "Starts a session for the client at the other end of the socket; the helper reads who that is from it.",
    },
    Row {
        name: "Load",
        from: Process::Broker,
        fds_in: "",
        fds_out: "maps that are frozen or read-write, programs with program_fd; or the verifier log",
        doc: "Loads programs of an approved object.",
    },
    Row {
        name: "Attach",
        from: Process::Broker,
        fds_in: "the cgroup of the client's unit, where that is the target",
        fds_out: "the link, where the policy says link_fd",
        doc: "Attaches a program of an instance to a target of the policy.",
    },
    Row {
        name: "Detach",
        from: Process::Broker,
        fds_in: "",
        fds_out: "",
        doc: "Takes a link down, whoever holds it.",
    },
    Row {
        name: "Unload",
        from: Process::Broker,
        fds_in: "",
        fds_out: "",
        doc: "Detaches and releases an instance.",
    },
    Row {
        name: "Map",
        from: Process::Broker,
        fds_in: "",
        fds_out: "the map, if frozen or read-write",
        doc: "Describes one map and hands it over as its access says.",
    },
    Row {
        name: "ReadMap",
        from: Process::Broker,
        fds_in: "",
        fds_out: "",
        doc: "Reads entries of a map that is not closed to clients.",
    },
    Row {
        name: "List",
        from: Process::Broker,
        fds_in: "",
        fds_out: "",
        doc: "Names the instances of the app that the session may see.",
    },
    Row {
        name: "Close",
        from: Process::Broker,
        fds_in: "",
        fds_out: "",
        doc: "Ends a session and releases what it loaded; the client's end of the socket has the same effect.",
    },
    Row {
        name: "Survey",
        from: Process::Broker,
        fds_in: "",
        fds_out: "",
        doc: "Names all instances, for the administrator; it changes nothing and gives nobody anything.",
    },
    Row {
        name: "Adopt",
        from: Process::Broker,
        fds_in: "the policy file, /etc/passwd and /etc/group, if there is a policy file",
        fds_out: "",
        doc: "Says that the policy was changed. The helper looks itself whether these are the files that root has put there, and judges what comes after this message by them.",
    },
];

impl ToHelper {
    /// The row of this message.
    pub fn row(&self) -> &'static Row {
        &ROWS[match self {
            Self::Open { .. } => 0,
            Self::Ask { verb: Verb::Load { .. }, .. } => 1,
            Self::Ask { verb: Verb::Attach { .. }, .. } => 2,
            Self::Ask { verb: Verb::Detach { .. }, .. } => 3,
            Self::Ask { verb: Verb::Unload { .. }, .. } => 4,
            Self::Ask { verb: Verb::Map { .. }, .. } => 5,
            Self::Ask { verb: Verb::ReadMap { .. }, .. } => 6,
            Self::Ask { verb: Verb::List, .. } => 7,
            Self::Close { .. } => 8,
            Self::Survey => 9,
            Self::Adopt { .. } => 10,
        }]
    }
}

impl Message for ToHelper {
    fn fds(&self) -> usize {
        let attaches_own = |verb: &Verb| matches!(verb, Verb::Attach { target: Target::Own, .. });
        match self {
            Self::Open { .. } => 1,
            Self::Ask { verb, .. } => usize::from(attaches_own(verb)),
            Self::Adopt { file: true, .. } => 3,
            Self::Adopt { file: false, .. } | Self::Close { .. } | Self::Survey => 0,
        }
    }
}

/// What a helper says about its own confinement after its self-test.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// ABI of landlock in force, 0 for none.
    pub landlock_abi: u32,
    /// Stacked seccomp filters.
    pub seccomp_filters: u32,
    /// Permitted capabilities as the kernel's mask.
    pub capabilities: u64,
}

/// A program of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramInfo {
    /// Its name.
    pub name: ProgramName,
    /// The key of its hook in the policy.
    pub hook: Kind,
    /// A descriptor goes with the message.
    pub fd: bool,
}

/// A map of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapInfo {
    /// Its name.
    pub name: MapName,
    /// The kernel's number of it.
    pub number: u32,
    /// `enum bpf_map_type`.
    pub map_type: u32,
    /// Bytes.
    pub key_size: u32,
    /// Bytes, of one value.
    pub value_size: u32,
    /// Entries; bytes for a ring buffer.
    pub max_entries: u32,
    /// As the policy says.
    pub access: Access,
    /// A descriptor goes with the message.
    pub fd: bool,
}

/// An attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkInfo {
    /// Its number.
    pub id: LinkId,
    /// Whose program.
    pub program: ProgramName,
    /// Under which hook.
    pub hook: Kind,
    /// To what.
    pub target: Target,
}

/// A loaded object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceInfo {
    /// Its number.
    pub id: InstanceId,
    /// Which object of the policy.
    pub object: ObjectName,
    /// Loaded by the session that asks.
    pub mine: bool,
    /// Its programs.
    pub programs: Vec<ProgramInfo>,
    /// Its maps.
    pub maps: Vec<MapInfo>,
    /// Its attachments.
    pub links: Vec<LinkInfo>,
}

/// What another policy means for a helper that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adoption {
    /// Which policy is in force.
    pub verdict: Adopted,
    /// Sessions that have ended, because the policy has no entry for their clients any more.
    pub sessions: Vec<SessionId>,
    /// What was detached and released, a phrase each.
    pub revoked: Vec<String>,
    /// What is in somebody's hands and cannot be taken back, a phrase each.
    pub beyond_recall: Vec<String>,
}

/// Which policy a helper goes on with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Adopted {
    /// That of the file.
    InForce,
    /// There is none: everything is released, and the helper ends.
    None,
    /// Still that of before: it takes a new helper to do what the file says, for this reason.
    Restart(String),
}

/// What a request came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Done; nothing to say.
    Done,
    /// `Load`: descriptors of programs, then of maps, in this order.
    Loaded {
        /// The instance.
        instance: InstanceId,
        /// SHA-256 of the file that it was loaded from.
        digest: [u8; 32],
        /// Its programs.
        programs: Vec<ProgramInfo>,
        /// Its maps.
        maps: Vec<MapInfo>,
    },
    /// `Attach`.
    Attached {
        /// The link.
        link: LinkId,
        /// What the target came to.
        target: Target,
        /// A descriptor goes with the message.
        fd: bool,
    },
    /// `Map`.
    Map(MapInfo),
    /// `ReadMap`.
    Entries {
        /// Keys and values.
        entries: Vec<(Bytes, Bytes)>,
        /// The key to go on after; empty at the end.
        cursor: Bytes,
    },
    /// `List`.
    Instances(Vec<InstanceInfo>),
    /// `Survey`.
    Survey {
        /// Open sessions.
        sessions: u32,
        /// All instances; no map of theirs is named.
        instances: Vec<InstanceInfo>,
    },
    /// `Adopt`.
    Adopted(Adoption),
    /// No. A verifier log that does not fit goes in a memfd.
    Refused {
        /// Why.
        refusal: Refusal,
        /// The verifier log; empty if there is none.
        log: Bulk,
    },
}

/// From the helper.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromHelper {
    /// First message: locked down, tested, serving.
    Ready {
        /// [`crate::INNER_VERSION`].
        version: u32,
        /// SHA-256 of the policy file it read; the broker must have read the same.
        policy: [u8; 32],
        /// Its confinement.
        sandbox: Sandbox,
    },
    /// The answer to the oldest request that has none.
    Answer {
        /// What it came to.
        outcome: Outcome,
        /// The line of the policy that allowed it.
        line: Option<u32>,
    },
}

impl Message for FromHelper {
    fn fds(&self) -> usize {
        let Self::Answer { outcome, .. } = self else { return 0 };
        match outcome {
            Outcome::Loaded { programs, maps, .. } => {
                programs.iter().filter(|p| p.fd).count() + maps.iter().filter(|m| m.fd).count()
            }
            Outcome::Attached { fd, .. } => usize::from(*fd),
            Outcome::Map(map) => usize::from(map.fd),
            Outcome::Refused { log, .. } => log.fds(),
            Outcome::Done
            | Outcome::Entries { .. }
            | Outcome::Instances(_)
            | Outcome::Survey { .. }
            | Outcome::Adopted(_) => 0,
        }
    }
}
