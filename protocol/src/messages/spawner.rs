//! Broker and spawner (standalone only): the spawner is PID 1's stand-in and knows one request.

use super::{Process, Row};
use crate::channel::Message;
use crate::names::AppName;
use serde::{Deserialize, Serialize};

/// From the broker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToSpawner {
    /// Start the helper of this app.
    Spawn {
        /// The app; the spawner's child reads the policy file of that name.
        app: AppName,
    },
}

/// From the spawner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromSpawner {
    /// It runs; the next datagram is the hand-over of its channel ([`crate::channel::Channel::take_over`]).
    Spawned {
        /// The app.
        app: AppName,
    },
    /// It could not be started.
    Failed {
        /// The app.
        app: AppName,
        /// A sentence for the log.
        why: String,
    },
}

/// The table.
pub const ROWS: [Row; 1] = [Row {
    name: "Spawn",
    from: Process::Broker,
    fds_in: "",
    fds_out: "the helper's channel, in a datagram of its own",
    doc: "Starts the helper of an app; one helper an app at a time.",
}];

impl Message for ToSpawner {
    fn fds(&self) -> usize {
        match self {
            Self::Spawn { .. } => 0,
        }
    }
}

impl Message for FromSpawner {
    fn fds(&self) -> usize {
        match self {
            Self::Spawned { .. } | Self::Failed { .. } => 0,
        }
    }
}
