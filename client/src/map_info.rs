//! What the kernel says a map is.
#![forbid(unsafe_code)]

use std::fmt;

use crate::sys::RawInfo;

/// What the kernel says a map is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MapInfo {
    /// Its type.
    pub kind: MapType,
    /// Its id, unique in this kernel.
    pub id: u32,
    /// Its name, at most 15 bytes.
    pub name: String,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value; of one CPU's value for a per-CPU map.
    pub value_size: u32,
    /// How many entries fit; bytes for a ring buffer.
    pub max_entries: u32,
    /// The `BPF_F_*` flags it was made with.
    pub flags: u32,
}

/// The type of a map, `enum bpf_map_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MapType(pub u32);

impl MapType {
    /// `BPF_MAP_TYPE_ARRAY`
    pub const ARRAY: Self = Self(2);
    /// `BPF_MAP_TYPE_RINGBUF`
    pub const RINGBUF: Self = Self(27);

    const NAMES: [&'static str; 34] = [
        "unspec",
        "hash",
        "array",
        "prog_array",
        "perf_event_array",
        "percpu_hash",
        "percpu_array",
        "stack_trace",
        "cgroup_array",
        "lru_hash",
        "lru_percpu_hash",
        "lpm_trie",
        "array_of_maps",
        "hash_of_maps",
        "devmap",
        "sockmap",
        "cpumap",
        "xskmap",
        "sockhash",
        "cgroup_storage",
        "reuseport_sockarray",
        "percpu_cgroup_storage",
        "queue",
        "stack",
        "sk_storage",
        "devmap_hash",
        "struct_ops",
        "ringbuf",
        "inode_storage",
        "task_storage",
        "bloom_filter",
        "user_ringbuf",
        "cgrp_storage",
        "arena",
    ];

    /// Whether a lookup gives one value per possible CPU.
    pub fn is_per_cpu(self) -> bool {
        matches!(self.0, 5 | 6 | 10 | 21)
    }
}

impl fmt::Display for MapType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = usize::try_from(self.0).ok().and_then(|number| Self::NAMES.get(number));
        match name {
            Some(name) => f.write_str(name),
            None => write!(f, "type_{}", self.0),
        }
    }
}

impl From<&RawInfo> for MapInfo {
    fn from(raw: &RawInfo) -> Self {
        let name = raw.name.split(|byte| *byte == 0).next().unwrap_or_default();
        Self {
            kind: MapType(raw.map_type),
            id: raw.id,
            name: String::from_utf8_lossy(name).into_owned(),
            key_size: raw.key_size,
            value_size: raw.value_size,
            max_entries: raw.max_entries,
            flags: raw.map_flags,
        }
    }
}
