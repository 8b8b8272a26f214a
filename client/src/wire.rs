//! The types of the interface: what is sent, what is received, and what a caller gets of it.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::hex;
use crate::map::Map;
use crate::target::WireTarget;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = std::num::ParseIntError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.parse().map(Self)
            }
        }
    };
}

id! {
    /// One load of one object.
    InstanceId
}
id! {
    /// One attachment.
    LinkId
}

/// How a map is handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Access {
    /// Not at all.
    None,
    /// Without a descriptor, to be read with [`Client::read_map`](crate::Client::read_map).
    Proxy,
    /// With a descriptor of a map that user space can never write again.
    Frozen,
    /// With every right over the map.
    ReadWrite,
}

impl Access {
    /// As the interface writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Proxy => "proxy",
            Self::Frozen => "frozen",
            Self::ReadWrite => "read_write",
        }
    }
}

/// A map of an instance, as the broker describes and hands it over.
#[derive(Debug)]
#[non_exhaustive]
pub struct MapGrant {
    /// Its name in the object.
    pub name: String,
    /// Its type as the kernel names it.
    pub kind: String,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value; of one CPU's value for a per-CPU map.
    pub value_size: u32,
    /// How many entries fit; bytes for a ring buffer.
    pub max_entries: u32,
    /// How it is handed over.
    pub access: Access,
    /// Its descriptor, for `Frozen` and `ReadWrite` access.
    pub fd: Option<OwnedFd>,
}

impl MapGrant {
    /// Makes a [`Map`] of the descriptor.
    pub fn into_map(self) -> Result<Map, Error> {
        match self.fd {
            Some(fd) => Map::new(fd).map_err(Error::io("reading what kind of map was received")),
            None => Err(Error::Protocol(format!(
                "the map {} comes without a descriptor, because its access is {}",
                self.name,
                self.access.as_str()
            ))),
        }
    }
}

/// An attachment that exists.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LinkInfo {
    /// What [`Client::detach`](crate::Client::detach) takes.
    pub id: LinkId,
    /// The program's name.
    pub program: String,
    /// The kind of attachment, as the policy names it.
    pub hook: String,
    /// Where.
    pub target: String,
}

/// What a Varlink service says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ServiceInfo {
    /// Who made it.
    #[serde(default)]
    pub vendor: String,
    /// What it is.
    #[serde(default)]
    pub product: String,
    /// Its version.
    #[serde(default)]
    pub version: String,
    /// Where to read about it.
    #[serde(default)]
    pub url: String,
    /// The interfaces it speaks.
    #[serde(default)]
    pub interfaces: Vec<String>,
}

/// One entry of a map that was read through the broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: Vec<u8>,
    /// The value; for a per-CPU map the values of all possible CPUs in a row, each padded to 8 bytes.
    pub value: Vec<u8>,
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Text {
            key: String,
            value: String,
        }
        let text = Text::deserialize(deserializer)?;
        let bytes = |text: &str| {
            hex::decode(text).ok_or_else(|| serde::de::Error::custom("a key or value is not hexadecimal"))
        };
        Ok(Self { key: bytes(&text.key)?, value: bytes(&text.value)? })
    }
}

#[derive(Serialize)]
pub(crate) struct OpenIn<'a> {
    pub(crate) app: &'a str,
}

#[derive(Serialize)]
pub(crate) struct LoadIn<'a> {
    pub(crate) object: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) programs: Option<&'a [String]>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) globals: &'a BTreeMap<String, i64>,
}

#[derive(Deserialize)]
pub(crate) struct LoadOut {
    pub(crate) instance: InstanceId,
    pub(crate) programs: Vec<WireProgram>,
    pub(crate) maps: Vec<WireMap>,
}

#[derive(Deserialize)]
pub(crate) struct WireProgram {
    pub(crate) name: String,
    #[serde(rename = "type")]
    pub(crate) kind: String,
    #[serde(default)]
    pub(crate) fd: Option<usize>,
}

#[derive(Deserialize)]
pub(crate) struct WireMap {
    pub(crate) name: String,
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) key_size: u32,
    pub(crate) value_size: u32,
    pub(crate) max_entries: u32,
    pub(crate) access: Access,
    #[serde(default)]
    pub(crate) fd: Option<usize>,
}

#[derive(Serialize)]
pub(crate) struct AttachIn<'a> {
    pub(crate) instance: InstanceId,
    pub(crate) program: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) target: Option<WireTarget<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) hook: Option<&'a str>,
}

#[derive(Deserialize)]
pub(crate) struct AttachOut {
    pub(crate) link: LinkId,
    pub(crate) target: String,
    #[serde(default)]
    pub(crate) fd: Option<usize>,
}

#[derive(Serialize)]
pub(crate) struct DetachIn {
    pub(crate) link: LinkId,
}

#[derive(Serialize)]
pub(crate) struct UnloadIn {
    pub(crate) instance: InstanceId,
}

#[derive(Serialize)]
pub(crate) struct MapIn<'a> {
    pub(crate) instance: InstanceId,
    pub(crate) name: &'a str,
}

#[derive(Deserialize)]
pub(crate) struct MapOut {
    pub(crate) map: WireMap,
}

#[derive(Serialize)]
pub(crate) struct ReadMapIn<'a> {
    pub(crate) instance: InstanceId,
    pub(crate) name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cursor: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) limit: Option<u16>,
}

#[derive(Deserialize)]
pub(crate) struct ReadMapOut {
    pub(crate) entries: Vec<Entry>,
    #[serde(default)]
    pub(crate) cursor: Option<String>,
}

#[derive(Deserialize)]
pub(crate) struct ListOut {
    pub(crate) instances: Vec<WireInstance>,
}

#[derive(Deserialize)]
pub(crate) struct WireInstance {
    pub(crate) id: InstanceId,
    pub(crate) object: String,
    pub(crate) mine: bool,
    pub(crate) programs: Vec<WireProgram>,
    pub(crate) maps: Vec<WireMap>,
    pub(crate) links: Vec<LinkInfo>,
}

/// Parameters of the methods that have none, in either direction.
#[derive(Serialize, Deserialize)]
pub(crate) struct Nothing {}
