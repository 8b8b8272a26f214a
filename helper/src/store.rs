//! What outlives this process: programs, maps and links of instances that are kept, and one record of what they are,
//! each with the service manager under a name that says kind and id.
//!
//! The order makes every crash harmless. New: descriptors, then the record that names them, then the answer. Gone: the
//! kernel's link, then the record without it, then the descriptors. What no record names is nobody's and is closed.
//! [`crate::restore`] is the way back.

use crate::state::{Instance, State};
use bpfgate_helper::record::{Granted, InstanceRecord, LinkRecord, Record};
use bpfgate_lockdown::{Fatal, Step};
use bpfgate_protocol::hex;
use bpfgate_protocol::messages::{InstanceId, LinkId};
use bpfgate_protocol::names::{MapName, ProgramName};
use bpfgate_protocol::policy::object::sealed;
use bpfgate_protocol::refusal::Refusal;
use bpfgate_systemd::manager::Manager;
use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// The names that descriptors are kept under.
pub(crate) fn program_name(id: InstanceId, name: &ProgramName) -> String {
    format!("program-{}-{name}", id.0)
}

pub(crate) fn map_name(id: InstanceId, name: &MapName) -> String {
    format!("map-{}-{name}", id.0)
}

pub(crate) fn link_name(id: LinkId) -> String {
    format!("link-{}", id.0)
}

/// Records are numbered; the newest one counts.
pub(crate) const RECORD: &str = "state-";

pub(crate) struct Store {
    pub(crate) manager: Manager,
    /// The number of the newest record, 0 for none.
    pub(crate) generation: u64,
}

impl Store {
    pub(crate) fn new(manager: Manager) -> Self {
        Self { manager, generation: 0 }
    }

    fn put(&mut self, record: Record<Granted>) -> io::Result<()> {
        let bytes = record.bytes().map_err(io::Error::other)?;
        let before = self.generation;
        self.generation += 1;
        let file = sealed("bpfgate-state", &bytes)?;
        self.manager.keep(&format!("{RECORD}{}", self.generation), file.as_fd())?;
        // Not the one before: a manager that cannot keep any more does not say so, and then that one counts.
        if before > 1 {
            self.manager.forget(&format!("{RECORD}{}", before - 1))?;
        }
        Ok(())
    }
}

/// Whatever goes wrong with the service manager: what cannot be kept is not made.
fn failed(error: &io::Error) -> Refusal {
    eprintln!("bpfgate-helper: keeping descriptors with the service manager: {error}");
    Refusal::helper("the service manager does not keep what was made, so it was taken down again")
}

impl State {
    /// Whether things are kept at all.
    pub(crate) fn keeps(&self) -> bool {
        self.policy.keep.is_persistent() && self.store.manager.is_there()
    }

    fn record(&self) -> Result<Record<Granted>, nix::errno::Errno> {
        fn number(fd: &OwnedFd) -> Result<u32, nix::errno::Errno> {
            bpfgate_bpf::describe(fd.as_fd()).map(|object| object.id)
        }
        let instance = |(id, instance): (&InstanceId, &Instance)| {
            let programs = instance.programs.iter();
            let bound = programs.clone().filter_map(|p| Some((p.info.name.clone(), p.function.clone()?)));
            let links = instance.links.iter().map(|link| {
                let (info, way, shared) = (link.info.clone(), link.way, link.shared);
                Ok(LinkRecord { info, way, shared, number: number(link.fd())? })
            });
            Ok(InstanceRecord {
                id: *id,
                object: instance.object.clone(),
                digest: instance.digest,
                map_bytes: instance.map_bytes,
                granted: Granted { functions: instance.functions.clone(), bound: bound.collect() },
                globals: instance.globals.clone(),
                programs: programs.map(|p| Ok((p.info.clone(), number(&p.fd)?))).collect::<Result<_, _>>()?,
                maps: instance
                    .maps
                    .iter()
                    .map(|m| Ok((m.name.clone(), number(&m.fd)?)))
                    .collect::<Result<_, _>>()?,
                links: links.collect::<Result<_, _>>()?,
            })
        };
        Ok(Record {
            last_instance: self.last_instance,
            last_link: self.last_link,
            network: self.inventory.network_id,
            instances: self.instances.iter().map(instance).collect::<Result<_, _>>()?,
        })
    }

    /// Has the record of what is there now kept.
    pub(crate) fn save(&mut self) -> Result<(), Refusal> {
        if !self.keeps() {
            return Ok(());
        }
        let record =
            self.record().map_err(|errno| Refusal::kernel("BPF_OBJ_GET_INFO_BY_FD", errno as i32))?;
        self.store.put(record).map_err(|error| failed(&error))
    }

    /// Has what is there under these names kept, and then the record that names it.
    pub(crate) fn keep_again(&mut self, names: &BTreeSet<&String>) -> Result<(), Refusal> {
        if !self.keeps() {
            return Ok(());
        }
        for (name, fd) in self.kept_names().iter().filter(|(name, _)| names.contains(name)) {
            self.store.manager.keep(name, fd.as_fd()).map_err(|error| failed(&error))?;
        }
        self.save()
    }

    /// Has descriptors forgotten that the record does not name any more, and waits until that is done: what was attached
    /// is not attached any more when this returns. (systemd 254 and later close descriptors a moment after that.)
    ///
    /// Errors: `Helper` (nobody says that it is done)
    pub(crate) fn forget(&mut self, names: &[String]) -> Result<(), Refusal> {
        if !self.store.manager.is_there() || names.is_empty() {
            return Ok(());
        }
        let manager = &self.store.manager;
        // All of them are said, whatever becomes of one.
        let said = names.iter().map(|name| manager.forget(name)).fold(Ok(()), Result::and);
        said.and_then(|()| manager.settle()).map_err(|error| {
            eprintln!("bpfgate-helper: the service manager may still keep {}: {error}", names.join(", "));
            Refusal::helper("the service manager does not say that it has let go: it may still be attached")
        })
    }

    /// Says that this process serves, as far as there is somebody to say it to.
    pub(crate) fn say_ready(&self) -> Result<(), Fatal> {
        // The digest tells `bpfgate policy apply` which policy is in force here.
        let digest = hex::encode(&self.policy.digest);
        let status = format!("serving {}, SHA-256 {digest}", self.policy.file);
        self.store.manager.ready(&status).step("telling the service manager")
    }
}
