//! Maps of an instance: what they are, how they leave this process, and reading them for clients.

use crate::bpf;
use bpfgate_protocol::codec::MAX_MESSAGE;
use bpfgate_protocol::inspect::is_per_cpu;
use bpfgate_protocol::messages::Bytes;
use bpfgate_protocol::messages::helper::{MapInfo, Outcome};
use bpfgate_protocol::messages::loader::MapCreate;
use bpfgate_protocol::names::MapName;
use bpfgate_protocol::policy::Access;
use bpfgate_protocol::refusal::{Class, Refusal};
use std::os::fd::{AsFd, OwnedFd};

/// What a map was made as.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Details {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    cpus: u32,
}

impl Details {
    pub(crate) fn of(map: &MapCreate, cpus: u32) -> Self {
        Self {
            map_type: map.map_type,
            key_size: map.key_size,
            value_size: map.value_size,
            max_entries: map.max_entries,
            cpus,
        }
    }

    /// Bytes that the kernel writes for one lookup.
    fn value_bytes(&self) -> usize {
        let size = self.value_size as usize;
        if is_per_cpu(self.map_type) { size.next_multiple_of(8) * self.cpus as usize } else { size }
    }
}

pub(crate) struct Map {
    pub(crate) name: MapName,
    pub(crate) fd: OwnedFd,
    details: Details,
    frozen: bool,
}

impl Map {
    pub(crate) fn new(name: MapName, fd: OwnedFd, details: Details) -> Self {
        Self { name, fd, details, frozen: false }
    }

    pub(crate) fn info(&self, access: Access) -> MapInfo {
        let Details { map_type, key_size, value_size, max_entries, .. } = self.details;
        let fd = access.hands_over();
        MapInfo { name: self.name.clone(), map_type, key_size, value_size, max_entries, access, fd }
    }

    /// Makes the map what `access` says before its descriptor may leave. A descriptor that is only opened read-only
    /// would be no boundary: its holder can pin it and open it again.
    pub(crate) fn prepare(&mut self, access: Access) -> Result<(), Refusal> {
        if access != Access::Frozen || self.frozen {
            return Ok(());
        }
        bpf::map_freeze(self.fd.as_fd()).map_err(|errno| {
            let mut refusal = Refusal::kernel("BPF_MAP_FREEZE", errno as i32);
            refusal.why = format!("map {} cannot be frozen: {}", self.name, errno.desc());
            refusal
        })?;
        self.frozen = true;
        Ok(())
    }

    /// At most `limit` entries after `cursor`, and no more than fit in a message.
    pub(crate) fn read(&self, cursor: &Bytes, limit: u16) -> Result<Outcome, Refusal> {
        const RINGBUF: u32 = 27;
        let key_size = self.details.key_size as usize;
        let value_size = self.details.value_bytes();
        let room = MAX_MESSAGE / 2;
        if key_size == 0 || self.details.map_type == RINGBUF {
            return Err(Refusal::new(
                Class::Unsupported,
                format!("map {} has no keys: it cannot be read this way", self.name),
            ));
        }
        if key_size.saturating_add(value_size) > room {
            return Err(Refusal::new(
                Class::Unsupported,
                format!("an entry of map {} is larger than a message", self.name),
            ));
        }
        if !cursor.0.is_empty() && cursor.0.len() != key_size {
            return Err(Refusal::new(Class::Invalid, "this is no cursor of this map"));
        }
        let kernel = |errno: nix::errno::Errno| Refusal::kernel("reading the map", errno as i32);
        let (mut key, mut entries) = (cursor.0.clone(), Vec::new());
        let mut used = 0;
        for _ in 0..limit.clamp(1, 256) {
            let mut next = vec![0; key_size];
            if !bpf::map_next_key(self.fd.as_fd(), &key, &mut next).map_err(kernel)? {
                return Ok(Outcome::Entries { entries, cursor: Bytes::default() });
            }
            let mut value = vec![0; value_size];
            // An entry may go away between the two calls.
            if bpf::map_lookup(self.fd.as_fd(), &next, &mut value).map_err(kernel)? {
                entries.push((Bytes(next.clone()), Bytes(value)));
            }
            key = next;
            used += key_size + value_size + 16;
            if used + key_size + value_size > room {
                break;
            }
        }
        Ok(Outcome::Entries { entries, cursor: Bytes(key) })
    }
}
