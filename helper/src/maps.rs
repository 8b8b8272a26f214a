//! Maps of an instance: what they are, how they leave this process, and reading them for clients.

use bpfgate_bpf::{self as bpf, PossibleCpus, uapi};
use bpfgate_protocol::authorize::{MapPermit, authorize};
use bpfgate_protocol::codec::MAX_MESSAGE;
use bpfgate_protocol::identity::Peer;
use bpfgate_protocol::messages::helper::{MapInfo, Outcome};
use bpfgate_protocol::messages::{Bytes, InstanceId};
use bpfgate_protocol::names::{MapName, ObjectName};
use bpfgate_protocol::policy::{Access, Policy};
use bpfgate_protocol::refusal::Refusal;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

pub(crate) struct Map {
    pub(crate) name: MapName,
    pub(crate) fd: OwnedFd,
    /// For user space, for ever; the kernel refuses a second time.
    pub(crate) frozen: bool,
    pub(crate) issued: Issued,
}

/// To whom a map was handed over, and how: that cannot be taken back.
#[derive(Default)]
pub(crate) struct Issued {
    to: Vec<(Arc<Peer>, Access)>,
    /// To more than are remembered, or to nobody knows whom: by the helper of before.
    others: Option<Access>,
}

/// Clients that are told apart in the record of what was handed over.
const MAX_HOLDERS: usize = 64;

impl Issued {
    /// The helper of before may have handed it over.
    pub(crate) fn unknown(frozen: bool) -> Self {
        let access = if frozen { Access::Frozen } else { Access::ReadWrite };
        Self { to: Vec::new(), others: Some(access) }
    }

    pub(crate) fn add(&mut self, peer: &Arc<Peer>, access: Access) {
        if !access.hands_over() {
            return;
        }
        let same = |other: &Peer| (other.uid, other.gid, &other.groups) == (peer.uid, peer.gid, &peer.groups);
        if let Some((_, widest)) = self.to.iter_mut().find(|(other, _)| same(other)) {
            *widest = access.max(*widest);
        } else if self.to.len() < MAX_HOLDERS {
            self.to.push((peer.clone(), access));
        } else {
            self.others = self.others.max(Some(access));
        }
    }

    /// Phrases for all of it.
    pub(crate) fn all(&self, id: InstanceId, map: &MapName) -> Vec<String> {
        let one = |access: Access, whom: String| {
            format!("map {map} of instance {} ({}, {whom})", id.0, Access::WORDS[access as usize].0)
        };
        let known = self.to.iter().map(|(peer, access)| one(*access, format!("to uid {}", peer.uid)));
        known.chain(self.others.map(|access| one(access, "to clients of before".into()))).collect()
    }

    /// Phrases for what goes beyond this policy; before, the map had this access.
    pub(crate) fn wider(
        &self,
        id: InstanceId,
        object: &ObjectName,
        map: &MapName,
        policy: &Arc<Policy>,
        before: Option<Access>,
    ) -> Vec<String> {
        let to_peer = |peer: &Peer| {
            authorize(policy, peer)
                .and_then(|permit| permit.map(object, map))
                .map_or(Access::None, MapPermit::access)
        };
        let to_anybody = policy
            .objects
            .get(object)
            .and_then(|rules| rules.maps.get(map))
            .map_or(Access::None, |(a, _)| *a);
        let to = self.to.iter().filter(|(peer, access)| to_peer(peer) < *access).cloned().collect();
        let others = self.others.filter(|access| before.unwrap_or(Access::None).min(*access) > to_anybody);
        Self { to, others }.all(id, map)
    }
}

impl Map {
    /// As the kernel says.
    fn open(&self, cpus: PossibleCpus) -> Result<bpf::Map<'_>, Refusal> {
        bpf::Map::of(self.fd.as_fd(), cpus)
            .map_err(|errno| Refusal::kernel("BPF_OBJ_GET_INFO_BY_FD", errno as i32))
    }

    pub(crate) fn info(&self, access: Access, cpus: PossibleCpus) -> Result<MapInfo, Refusal> {
        let uapi::MapInfo { id: number, map_type, key_size, value_size, max_entries, .. } =
            *self.open(cpus)?.info();
        let (name, fd) = (self.name.clone(), access.hands_over());
        Ok(MapInfo { name, number, map_type, key_size, value_size, max_entries, access, fd })
    }

    /// Makes the map what `access` says before its descriptor may leave. A descriptor that is only opened read-only
    /// would be no boundary: its holder can pin it and open it again.
    pub(crate) fn prepare(&mut self, access: Access) -> Result<(), Refusal> {
        if access != Access::Frozen || self.frozen {
            return Ok(());
        }
        bpf::map_freeze(self.fd.as_fd()).map_err(|errno| {
            let why = format!("map {} cannot be frozen: {}", self.name, errno.desc());
            Refusal::kernel_because("BPF_MAP_FREEZE", errno as i32, why)
        })?;
        self.frozen = true;
        Ok(())
    }

    /// At most `limit` entries after `cursor`, and no more than fit in a message.
    pub(crate) fn read(&self, cursor: &Bytes, limit: u16, cpus: PossibleCpus) -> Result<Outcome, Refusal> {
        let map = self.open(cpus)?;
        let entry = map.key_bytes().saturating_add(map.value_bytes()) + 16;
        let room = MAX_MESSAGE / 2;
        if map.key_bytes() == 0 {
            return Err(Refusal::unsupported(format!(
                "map {} has no keys: it cannot be read this way",
                self.name
            )));
        }
        if entry > room {
            return Err(Refusal::unsupported(format!(
                "an entry of map {} is larger than a message",
                self.name
            )));
        }
        if !cursor.0.is_empty() && cursor.0.len() != map.key_bytes() {
            return Err(Refusal::invalid("this is no cursor of this map"));
        }
        let kernel = |errno: nix::errno::Errno| Refusal::kernel("reading the map", errno as i32);
        let (mut key, mut entries) = (cursor.0.clone(), Vec::new());
        for _ in 0..usize::from(limit.clamp(1, 256)).min(room / entry) {
            let Some(next) = map.next_key(&key).map_err(kernel)? else {
                return Ok(Outcome::Entries { entries, cursor: Bytes::default() });
            };
            // An entry may go away between the two calls.
            if let Some(value) = map.lookup(&next).map_err(kernel)? {
                entries.push((Bytes(next.clone()), Bytes(value)));
            }
            key = next;
        }
        Ok(Outcome::Entries { entries, cursor: Bytes(key) })
    }
}
