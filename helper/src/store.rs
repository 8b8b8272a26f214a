//! What outlives this process: programs, maps and links of instances that are kept, and one record of what they are,
//! each with the service manager under a name that says kind and id.
//!
//! The order makes every crash harmless. New: descriptors, then the record that names them, then the answer. Gone: the
//! kernel's link, then the record without it, then the descriptors. What no record names is nobody's and is closed.
//! [`crate::restore`] is the way back.

use crate::attach::Way;
use crate::state::{Instance, State};
use bpfgate_lockdown::{Fatal, Step};
use bpfgate_protocol::codec;
use bpfgate_protocol::functions::Function;
use bpfgate_protocol::hex;
use bpfgate_protocol::messages::helper::{Global, LinkInfo, ProgramInfo};
use bpfgate_protocol::messages::{InstanceId, LinkId};
use bpfgate_protocol::names::{FunctionName, MapName, ObjectName, ProgramName};
use bpfgate_protocol::policy::object::sealed;
use bpfgate_protocol::refusal::Refusal;
use bpfgate_systemd::manager::Manager;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// A record as it is written: a later version of this program reads those of earlier ones.
#[derive(Serialize, Deserialize)]
pub(crate) enum Versioned {
    V1(Record<BTreeSet<u32>>),
    V2(Record<Granted>),
}

impl Versioned {
    /// As it would be written now.
    pub(crate) fn record(self) -> Record<Granted> {
        match self {
            Self::V1(Record { last_instance, last_link, network, instances }) => {
                let instances = instances.into_iter().map(InstanceRecord::from).collect();
                Record { last_instance, last_link, network, instances }
            }
            Self::V2(record) => record,
        }
    }
}

/// What the policy had to say for an instance.
#[derive(Serialize, Deserialize)]
pub(crate) struct Granted {
    /// Functions that need a grant.
    pub(crate) functions: BTreeSet<Function>,
    /// Of programs that are for one function of the kernel: which.
    pub(crate) bound: BTreeMap<ProgramName, FunctionName>,
}

/// What is kept, besides descriptors. `G` is what the policy had to say for an instance.
#[derive(Serialize, Deserialize)]
pub(crate) struct Record<G> {
    /// Numbers that were given already.
    pub(crate) last_instance: u64,
    pub(crate) last_link: u64,
    /// Links to interfaces are of this network namespace.
    pub(crate) network: (u64, u64),
    pub(crate) instances: Vec<InstanceRecord<G>>,
}

#[derive(Serialize, Deserialize)]
pub(crate) struct InstanceRecord<G> {
    pub(crate) id: InstanceId,
    pub(crate) object: ObjectName,
    /// Of the file that it was loaded from.
    pub(crate) digest: [u8; 32],
    pub(crate) map_bytes: u64,
    pub(crate) granted: G,
    /// What globals were set to.
    pub(crate) globals: Vec<Global>,
    /// Each with the kernel's number for it: a descriptor of this name has to be just that.
    pub(crate) programs: Vec<(ProgramInfo, u32)>,
    pub(crate) maps: Vec<(MapName, u32)>,
    pub(crate) links: Vec<LinkRecord>,
}

impl From<InstanceRecord<BTreeSet<u32>>> for InstanceRecord<Granted> {
    fn from(old: InstanceRecord<BTreeSet<u32>>) -> Self {
        let InstanceRecord { id, object, digest, map_bytes, granted, globals, programs, maps, links } = old;
        let functions = granted.into_iter().map(Function::Helper).collect();
        let granted = Granted { functions, bound: BTreeMap::new() };
        Self { id, object, digest, map_bytes, granted, globals, programs, maps, links }
    }
}

#[derive(Serialize, Deserialize)]
pub(crate) struct LinkRecord {
    pub(crate) info: LinkInfo,
    pub(crate) way: Way,
    pub(crate) shared: bool,
    pub(crate) number: u32,
}

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

    fn put(&mut self, record: &Versioned) -> io::Result<()> {
        let bytes = codec::encode(record).map_err(io::Error::other)?;
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
        self.store.put(&Versioned::V2(record)).map_err(|error| failed(&error))
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

#[cfg(test)]
mod tests {
    use super::*;

    /// As helpers before the second version have written it: one instance, whose programs call `bpf_send_signal`.
    #[test]
    fn a_record_of_the_first_version_is_read() {
        let long = |number: u64| number.to_le_bytes().to_vec();
        let short = |number: u32| number.to_le_bytes().to_vec();
        let name = |text: &str| [long(text.len() as u64), text.into()].concat();
        let bytes = [
            // V1; last_instance, last_link, network; one instance: id, object, digest, map_bytes.
            short(0),
            [7, 3, 4, 5, 1, 7].map(long).concat(),
            name("flow"),
            vec![9; 32],
            long(64),
            // One function; no globals; one program, xdp and without a descriptor, number 8; no maps, no links.
            [long(1), short(109), long(0), long(1)].concat(),
            name("count"),
            [short(0), vec![0], short(8), long(0), long(0)].concat(),
        ]
        .concat();
        let record = codec::decode::<Versioned>(&bytes).unwrap().record();
        assert_eq!((record.last_instance, record.last_link, record.network), (7, 3, (4, 5)));
        let [InstanceRecord { granted, digest, programs, .. }] = &record.instances[..] else { panic!() };
        assert_eq!(granted.functions, [Function::Helper(109)].into());
        assert!(granted.bound.is_empty() && *digest == [9; 32]);
        assert_eq!((programs[0].0.name.as_str(), programs[0].1), ("count", 8));
    }
}
