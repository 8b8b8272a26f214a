//! Helper and loader. The helper asks for one object or for symbols; while it works, the loader asks the helper
//! for the calls that need a capability. The helper believes nothing of it: every request is checked
//! against the permit of the load.

use super::{Bulk, Process, Row};
use crate::channel::Message;
use crate::messages::helper::Global;
use crate::names::{FunctionName, MapName, ObjectName, ProgramName, SymbolName};
use crate::refusal::Refusal;
use serde::{Deserialize, Serialize};

/// A kernel object of the load that is under way: its place in the helper's list, from 1; 0 is none.
pub type Handle = u32;

/// One program to load, as the permit has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramPlan {
    /// Its name in the object.
    pub name: ProgramName,
    /// `enum bpf_prog_type` that its section must have.
    pub prog_type: u32,
    /// `enum bpf_attach_type` to load it with.
    pub expected_attach_type: u32,
    /// The function of the kernel to load it for, so that libbpf looks for no other; the helper says its number itself.
    pub function: Option<FunctionName>,
}

/// From the helper.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToLoader {
    /// Row `Load`.
    Load {
        /// Its name in the policy; becomes libbpf's object name.
        object: ObjectName,
        /// The programs to load; the others of the object are left out.
        programs: Vec<ProgramPlan>,
        /// Initial values of `.rodata`.
        globals: Vec<Global>,
    },
    /// Row `Symbols`.
    Symbols {
        /// The functions to find.
        symbols: Vec<SymbolName>,
    },
    /// The answer to `MapCreate`.
    MapCreated {
        /// For later reference.
        handle: Handle,
    },
    /// The answer to `MapFreeze`, `BtfLoad` and `ProgLoad`: the descriptor stays with the helper.
    Kept {
        /// For later reference; 0 if there will be none.
        handle: Handle,
    },
    /// The kernel said no, or the helper did (EPERM, with the reason told to the client).
    Failed {
        /// The error.
        errno: i32,
        /// The verifier log, if there is one.
        log: Bulk,
    },
}

/// Why the loader wants a kernel object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// libbpf finds out what the kernel can do; gone with the answer (a map: with the load).
    Probe,
    /// Part of the object. Of a program: its place in the plan.
    Object(u32),
}

/// `BPF_MAP_CREATE`, the fields that bpfgate knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapCreate {
    /// Why.
    pub purpose: Purpose,
    /// `enum bpf_map_type`.
    pub map_type: u32,
    /// Bytes.
    pub key_size: u32,
    /// Bytes.
    pub value_size: u32,
    /// Entries.
    pub max_entries: u32,
    /// `BPF_F_*` of maps.
    pub flags: u32,
    /// `map_extra`; bloom filters only.
    pub extra: u64,
    /// At most 15 bytes.
    pub name: String,
    /// The object's BTF, or 0.
    pub btf: Handle,
    /// BTF type ids of key and value.
    pub btf_ids: (u32, u32),
}

/// `BPF_PROG_LOAD`, the fields that bpfgate knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgLoad {
    /// Why.
    pub purpose: Purpose,
    /// `enum bpf_prog_type`.
    pub prog_type: u32,
    /// `enum bpf_attach_type`.
    pub expected_attach_type: u32,
    /// `BPF_F_*` of programs.
    pub flags: u32,
    /// At most 15 bytes.
    pub name: String,
    /// `GPL` and the like, at most 127 bytes.
    pub license: String,
    /// The object's BTF, or 0.
    pub btf: Handle,
    /// Functions of the kernel that it calls, as the object names them. For the answer to the client only: what counts
    /// is the numbers in the instructions.
    pub kfuncs: Vec<FunctionName>,
    /// A log is wanted if it fails.
    pub log: LogWanted,
    /// Bytes of one `bpf_func_info` and one `bpf_line_info`.
    pub record_sizes: (u32, u32),
    /// Bytes of instructions, func info and line info in the bulk, in this order.
    pub parts: (u32, u32, u32),
    /// The parts. In `ld_imm64` of maps the immediate is a [`Handle`].
    pub bulk: Bulk,
}

/// Whether the verifier is to write a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LogWanted {
    /// No: faster.
    No,
    /// Level 1.
    Yes,
}

/// From the loader.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromLoader {
    /// Row `MapCreate`.
    MapCreate(MapCreate),
    /// Row `MapFreeze`.
    MapFreeze {
        /// A map of this load.
        handle: Handle,
    },
    /// Row `BtfLoad`.
    BtfLoad {
        /// The BTF.
        bulk: Bulk,
    },
    /// Row `ProgLoad`.
    ProgLoad(ProgLoad),
    /// Row `Loaded`.
    Loaded {
        /// The maps of the object by name.
        maps: Vec<(MapName, Handle)>,
    },
    /// Row `Found`.
    Found {
        /// File offsets, in the order of the symbols asked for.
        offsets: Vec<u64>,
    },
    /// Row `Refused`.
    Refused {
        /// Why.
        refusal: Refusal,
        /// The verifier log as libbpf explains it, at most 1 MiB.
        log: Bulk,
    },
}

/// From the loader's parent, on the leash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromLeash {
    /// A worker waits for work.
    Ready {
        /// [`crate::INNER_VERSION`].
        version: u32,
    },
    /// The worker ended; a new one waits for work.
    Died {
        /// Which, counted from 1. The next one is there already.
        worker: u32,
        /// How, for people.
        how: String,
    },
}

/// To the loader's parent, on the leash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToLeash {
    /// End this worker; one that has ended already is meant no more.
    Kill {
        /// Which.
        worker: u32,
    },
}

/// The table of this channel.
pub const ROWS: [Row; 9] = [
    Row {
        name: "Load",
        from: Process::Helper,
        fds_in: "the sealed object",
        fds_out: "",
        doc: "Opens and loads the named programs of an object with libbpf; ends with Loaded or Refused.",
    },
    Row {
        name: "Symbols",
        from: Process::Helper,
        fds_in: "the binary",
        fds_out: "",
        doc: "Finds the file offsets of functions; ends with Found or Refused.",
    },
    Row {
        name: "MapCreate",
        from: Process::Loader,
        fds_in: "",
        fds_out: "the map",
        doc: "Asks for a map; the loader fills it without any capability.",
    },
    Row {
        name: "MapFreeze",
        from: Process::Loader,
        fds_in: "",
        fds_out: "",
        doc: "Asks for a map to be frozen: the verifier takes frozen .rodata for constants.",
    },
    Row {
        name: "BtfLoad",
        from: Process::Loader,
        fds_in: "a memfd if large",
        fds_out: "",
        doc: "Asks for the object's type information to be loaded.",
    },
    Row {
        name: "ProgLoad",
        from: Process::Loader,
        fds_in: "a memfd if large",
        fds_out: "",
        doc: "Asks for a program to be loaded; its descriptor never leaves the helper this way.",
    },
    Row {
        name: "Loaded",
        from: Process::Loader,
        fds_in: "",
        fds_out: "",
        doc: "The object is loaded, and these are its maps.",
    },
    Row {
        name: "Found",
        from: Process::Loader,
        fds_in: "",
        fds_out: "",
        doc: "The offsets of the symbols asked for.",
    },
    Row {
        name: "Refused",
        from: Process::Loader,
        fds_in: "the log in a memfd if large",
        fds_out: "",
        doc: "The object cannot be loaded, or a symbol is not there.",
    },
];

impl Message for ToLoader {
    fn fds(&self) -> usize {
        match self {
            Self::Load { .. } | Self::Symbols { .. } | Self::MapCreated { .. } => 1,
            Self::Kept { .. } => 0,
            Self::Failed { log, .. } => log.fds(),
        }
    }
}

impl Message for FromLoader {
    fn fds(&self) -> usize {
        match self {
            Self::BtfLoad { bulk, .. } | Self::ProgLoad(ProgLoad { bulk, .. }) => bulk.fds(),
            Self::Refused { log, .. } => log.fds(),
            Self::MapCreate(_) | Self::MapFreeze { .. } | Self::Loaded { .. } | Self::Found { .. } => 0,
        }
    }
}

impl Message for FromLeash {
    fn fds(&self) -> usize {
        0
    }
}

impl Message for ToLeash {
    fn fds(&self) -> usize {
        0
    }
}
