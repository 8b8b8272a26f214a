//! The administrator's interface: one method per method of `io.bpfgate.Admin`.
#![forbid(unsafe_code)]

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::client::dial;
use crate::error::Error;
use crate::transport::Connection;
use crate::wire::{InstanceId, LinkInfo, Nothing, OpenIn};

/// Where the broker listens for root and the group bpfgate-admin.
pub const ADMIN_SOCKET: &str = "/run/bpfgate/io.bpfgate.Admin";

/// How a process is confined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Sandbox {
    /// 0 if the kernel has no landlock.
    pub landlock_abi: u32,
    /// Stacked seccomp filters.
    pub seccomp_filters: u32,
    /// By name.
    pub capabilities: Vec<String>,
}

/// A helper that the broker is connected to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct HelperStatus {
    /// Of which app.
    pub app: String,
    /// The file of its policy.
    pub policy: String,
    /// Open sessions.
    pub sessions: u32,
    /// None while it starts.
    pub sandbox: Option<Sandbox>,
}

/// The broker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BrokerStatus {
    /// Its version.
    pub version: String,
    /// Seconds.
    pub uptime: u64,
    /// Of clients and administrators.
    pub connections: u64,
    /// Its own confinement.
    pub sandbox: Sandbox,
    /// Helpers that it is connected to.
    pub helpers: Vec<HelperStatus>,
}

/// A program of an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SurveyedProgram {
    /// Its name in the object.
    pub name: String,
    /// The key of its hook in the policy.
    #[serde(rename = "type")]
    pub kind: String,
}

/// An instance, whoever loaded it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SurveyedInstance {
    /// Its number in its app.
    pub id: InstanceId,
    /// The object it was loaded from.
    pub object: String,
    /// Its programs.
    pub programs: Vec<SurveyedProgram>,
    /// What is attached.
    pub links: Vec<LinkInfo>,
}

/// What the helper of one app has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Survey {
    /// Open sessions.
    pub sessions: u32,
    /// Its instances.
    pub instances: Vec<SurveyedInstance>,
}

/// What a reload means for one app.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Reloaded {
    /// Which.
    pub app: String,
    /// `new`, `changed`, `removed` or `invalid`.
    pub change: String,
    /// What became of its helper: `none` ran, it `adopted` the policy, it `ended`, or it needs a `restart`.
    pub helper: String,
    /// Sessions that ended.
    pub sessions_ended: u64,
    /// What was detached and released.
    pub revoked: Vec<String>,
    /// What clients hold and would not be given any more; it cannot be taken back.
    pub beyond_recall: Vec<String>,
    /// Why its helper did not go on.
    #[serde(default)]
    pub why: Option<String>,
}

/// A reload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Reload {
    /// The number of the policies that are in force now.
    pub generation: u64,
    /// Whose policy is another one than before.
    pub apps: Vec<Reloaded>,
}

/// A connection to the broker's socket for administrators.
pub struct Admin {
    connection: Connection,
}

impl Admin {
    /// Connects: on `path`, else on [`ADMIN_SOCKET`].
    pub fn connect(path: Option<&Path>) -> Result<Self, Error> {
        let path = path.unwrap_or(Path::new(ADMIN_SOCKET));
        match dial(path) {
            Ok(stream) => Ok(Self { connection: Connection::new(stream) }),
            Err(source) => Err(Error::Unreachable { socket: path.to_owned(), source }),
        }
    }

    /// The broker, and the helpers that it is connected to.
    pub fn status(&mut self) -> Result<BrokerStatus, Error> {
        let (status, fds) = self.connection.call("io.bpfgate.Admin.Status", &Nothing {})?;
        fds.finish()?;
        Ok(status)
    }

    /// Has all policies read again; returns when they are in force.
    pub fn reload(&mut self) -> Result<Reload, Error> {
        let (reload, fds) = self.connection.call("io.bpfgate.Admin.Reload", &Nothing {})?;
        fds.finish()?;
        Ok(reload)
    }

    /// What the helper of an app has loaded and attached. It is started if it does not run.
    pub fn instances(&mut self, app: &str) -> Result<Survey, Error> {
        let (survey, fds) = self.connection.call("io.bpfgate.Admin.Instances", &OpenIn { app })?;
        fds.finish()?;
        Ok(survey)
    }
}
