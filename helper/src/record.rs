//! The record of what is kept, from bytes and to bytes. Those who come later read what earlier ones wrote; so a record that
//! is kept is input like any other, and is looked at as a whole before anything is done by it.

use crate::way::Way;
use bpfgate_protocol::codec::{self, CodecError};
use bpfgate_protocol::functions::Function;
use bpfgate_protocol::messages::helper::{Global, LinkInfo, ProgramInfo};
use bpfgate_protocol::messages::{InstanceId, LinkId};
use bpfgate_protocol::names::{FunctionName, MapName, ObjectName, ProgramName};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Numbers count up from 1; who has come this far has not counted.
pub const MAX_NUMBER: u64 = 1 << 48;

/// A record as it is written: a later version of this program reads those of earlier ones.
#[derive(Serialize, Deserialize)]
enum Versioned {
    V1(Record<BTreeSet<u32>>),
    V2(Record<Granted>),
}

impl Versioned {
    /// As it would be written now.
    fn record(self) -> Record<Granted> {
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
pub struct Granted {
    /// Functions that need a grant.
    pub functions: BTreeSet<Function>,
    /// Of programs that are for one function of the kernel: which.
    pub bound: BTreeMap<ProgramName, FunctionName>,
}

/// What is kept, besides descriptors. `G` is what the policy had to say for an instance.
#[derive(Serialize, Deserialize)]
pub struct Record<G> {
    /// Numbers that were given already.
    pub last_instance: u64,
    /// The same of links.
    pub last_link: u64,
    /// Links to interfaces are of this network namespace.
    pub network: (u64, u64),
    /// What is loaded.
    pub instances: Vec<InstanceRecord<G>>,
}

impl Record<Granted> {
    /// Reads one of any version.
    ///
    /// Errors: what it is not, a phrase
    pub fn read(bytes: &[u8]) -> Result<Self, String> {
        let record = codec::decode(bytes).map(Versioned::record).map_err(|e| e.to_string())?;
        let instances = record.instances.iter().map(|instance| instance.id);
        let links = record.instances.iter().flat_map(|instance| &instance.links).map(|link| link.info.id);
        let (last_instance, last_link) = (InstanceId(record.last_instance), LinkId(record.last_link));
        let sane = instances.chain([last_instance]).all(|id| id <= last_instance && id.0 <= MAX_NUMBER)
            && links.chain([last_link]).all(|id| id <= last_link && id.0 <= MAX_NUMBER);
        if sane { Ok(record) } else { Err("its numbers make no sense".into()) }
    }

    /// As it is written.
    pub fn bytes(self) -> Result<Vec<u8>, CodecError> {
        codec::encode(&Versioned::V2(self))
    }
}

/// A loaded object.
#[derive(Serialize, Deserialize)]
pub struct InstanceRecord<G> {
    /// Its number.
    pub id: InstanceId,
    /// Which object of the policy.
    pub object: ObjectName,
    /// Of the file that it was loaded from.
    pub digest: [u8; 32],
    /// What its maps take.
    pub map_bytes: u64,
    /// What the policy had to say for it.
    pub granted: G,
    /// What globals were set to.
    pub globals: Vec<Global>,
    /// Each with the kernel's number for it: a descriptor of this name has to be just that.
    pub programs: Vec<(ProgramInfo, u32)>,
    /// The same of maps.
    pub maps: Vec<(MapName, u32)>,
    /// What is attached.
    pub links: Vec<LinkRecord>,
}

impl From<InstanceRecord<BTreeSet<u32>>> for InstanceRecord<Granted> {
    fn from(old: InstanceRecord<BTreeSet<u32>>) -> Self {
        let InstanceRecord { id, object, digest, map_bytes, granted, globals, programs, maps, links } = old;
        let functions = granted.into_iter().map(Function::Helper).collect();
        let granted = Granted { functions, bound: BTreeMap::new() };
        Self { id, object, digest, map_bytes, granted, globals, programs, maps, links }
    }
}

/// An attachment.
#[derive(Serialize, Deserialize)]
pub struct LinkRecord {
    /// What clients are told of it.
    pub info: LinkInfo,
    /// How it was made.
    pub way: Way,
    /// Its descriptor was given away.
    pub shared: bool,
    /// The kernel's number for it.
    pub number: u32,
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
        let record = Record::read(&bytes).unwrap();
        assert_eq!((record.last_instance, record.last_link, record.network), (7, 3, (4, 5)));
        let [InstanceRecord { granted, digest, programs, .. }] = &record.instances[..] else { panic!() };
        assert_eq!(granted.functions, [Function::Helper(109)].into());
        assert!(granted.bound.is_empty() && *digest == [9; 32]);
        assert_eq!((programs[0].0.name.as_str(), programs[0].1), ("count", 8));
    }
}
