//! What bpfgate and systemd say to each other.
//!
//! | module | holds |
//! |---|---|
//! | [`manager`] | the running service manager: descriptors from it, notifications and descriptors to it |
//! | [`installed`] | the policies of this machine |
//! | [`units`] | from a policy to the drop-in of its helper |
//! | [`grants`] | what a policy grants, one line each |
//! | [`generate`] | from all policies to the directory of a systemd generator |
#![forbid(unsafe_code)]

pub mod generate;
pub mod grants;
pub mod installed;
pub mod manager;
pub mod units;
