//! The harness of the end-to-end tests: the real programs in a network namespace of their own, and eyes on the kernel.
//!
//! | module | holds |
//! |---|---|
//! | [`gate`] | [`Gate`]: a broker with its directory, policies, network and processes |
//! | [`inject`] | calls that a running process makes because the test wants it |
//! | [`invariants`] | what must be true after every case, checked by one function |
//! | [`census`] | the programs, maps, links and types that the kernel holds |
//! | [`demands`] | which capabilities the running kernel demands for each type of program and map |
//! | [`network`] | two network namespaces with a veth pair between them |
//! | [`process`] | what /proc says of a process |
//! | [`raw`] | a client that sends any bytes |
//! | [`cgroup`] | a cgroup of a test's own |
//! | [`cli`] | the command line, run to its end or while it runs |
//! | [`counting`] | programs that count |
//! | [`peer`] | a lying broker: speaks straight to a real helper |
//! | [`rogue`] | a lying loader, or a lying spawner and its helpers |
//! | [`root`] | the root directory of a machine, for `--root` |
//! | [`roles`] | the lists of system calls of each process |
//! | [`second`] | another broker beside the gate's, started otherwise |
//! | [`user`] | threads that are somebody else |
//! | [`waits`] | how long requests take, and whether something else makes them longer |
//! | [`services`] | bpfgate under a running systemd |
//! | [`strace`] | what processes call, and calls that fail |
//! | [`sys`] | every unsafe block |
//!
//! Tests that need root print `skipped: needs root` elsewhere. They run one at a time, whatever starts them: a
//! [`Gate`] holds a lock, because the census counts for the whole machine.
#![allow(clippy::missing_panics_doc, reason = "where the harness panics, the test has failed")]

pub mod census;
pub mod cgroup;
pub mod cli;
pub mod counting;
pub mod demands;
pub mod gate;
pub mod inject;
pub mod invariants;
pub mod network;
pub mod peer;
pub mod process;
pub mod raw;
pub mod rogue;
pub mod roles;
pub mod root;
pub mod second;
pub mod services;
pub mod strace;
pub mod sys;
pub mod user;
pub mod waits;
mod witness;

pub use gate::{Gate, bin_dir, bpf_object, workspace};
pub use raw::Raw;
pub use user::{STRANGER, USER, Who, as_user};

use bpfgate_protocol::policy::Machine;
use std::time::{Duration, Instant};

/// What has to happen soon happens in this time: the promise is one second.
pub const SOON: Duration = Duration::from_secs(1);

/// How many times slower than an ordinary machine this one is, such as one that is emulated.
pub fn slowness() -> u32 {
    std::env::var("BPFGATE_SLOW").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// Whether attacks run at their full length, as `make attack` has them: with `BPFGATE_ATTACK=all`. Otherwise a part does.
pub fn all_attacks() -> bool {
    std::env::var_os("BPFGATE_ATTACK").is_some_and(|which| which == "all")
}

/// Waits until `done`; whether it came to that within `limit`, on an ordinary machine.
pub fn wait_until(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit * slowness();
    loop {
        if done() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether this process may do what the tests need; says so if not.
pub fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("skipped: needs root");
    }
    root
}

/// Whether the kernel is this new; says so if not.
pub fn is_kernel(least: (u32, u32), what: &str) -> bool {
    let this = Machine::here().expect("a version").kernel;
    if this < least {
        println!("skipped: {what} needs Linux {}.{}", least.0, least.1);
    }
    this >= least
}

/// Ends a test that needs a newer kernel.
#[macro_export]
macro_rules! needs_kernel {
    ($major:literal, $minor:literal, $what:literal) => {
        if !$crate::is_kernel(($major, $minor), $what) {
            return;
        }
    };
}

/// Ends a test that needs root, for everybody else.
#[macro_export]
macro_rules! needs_root {
    () => {
        if !$crate::is_root() {
            return;
        }
    };
}
