//! Client of bpfgate: maps, links and program loads for a process that holds no capability.
//!
//! A connection is a session of one app. What it loads ends with it, unless the app's policy says
//! `keep = "app"`; so keep the [`Client`] for as long as the programs shall run.
//!
//! ```no_run
//! use bpfgate_client::{Client, LoadOptions, Target};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut client = Client::connect(None)?;
//! client.open("packet-counter")?;
//! let mut instance = client.load("counter", &LoadOptions::default())?;
//! client.attach(instance.id, "count_packets", Some(&Target::Interface("eth0".into())), None)?;
//! let counters = instance.take_map("counters")?;
//! let per_cpu = counters.lookup_per_cpu(&0u32.to_ne_bytes())?;
//! # let _ = per_cpu;
//! # Ok(())
//! # }
//! ```
//!
//! | module | holds |
//! |---|---|
//! | `client` | [`Client`]: one method per method of the interface |
//! | [`admin`] | what runs, for the administrator |
//! | `transport` | Varlink over a Unix stream socket, descriptors by `SCM_RIGHTS` |
//! | `map`, `mapping`, [`ringbuf`] | what can be done with the descriptor of a map |
//! | [`exec`] | start another program with map descriptors and a filter on bpf(2) |
//! | `sys` | every unsafe block of the crate |
//!
//! Everything blocks. Nothing here needs a capability; a client needs Linux 5.19 or later where
//! `kernel.unprivileged_bpf_disabled` is set.

#[cfg(not(target_pointer_width = "64"))]
compile_error!("ring buffer positions are `unsigned long`: only 64-bit targets are supported");

pub mod admin;
mod client;
pub mod cpus;
mod error;
pub mod exec;
mod map;
mod map_info;
mod mapping;
pub mod ringbuf;
mod sys;
mod target;
mod transport;
mod wire;

pub use bpfgate_protocol::hex;
pub use client::{
    Client, DEFAULT_SOCKET, Entries, Instance, Link, ListedInstance, LoadOptions, Page, Program,
};
pub use cpus::possible as possible_cpus;
pub use error::{Error, Refusal};
pub use map::{Batches, Keys, Map, Pair, UpdateMode};
pub use map_info::{MapInfo, MapType};
pub use mapping::{MappedArray, MappedArrayMut};
pub use ringbuf::RingBuffer;
pub use target::{Target, TargetWord};
pub use wire::{Access, Entry, InstanceId, LinkId, LinkInfo, MapGrant, ServiceInfo};
