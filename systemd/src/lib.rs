//! What bpfgate and systemd say to each other.
//!
//! | module | holds |
//! |---|---|
//! | [`manager`] | the running service manager: descriptors from it, notifications and descriptors to it |
#![forbid(unsafe_code)]

pub mod manager;
