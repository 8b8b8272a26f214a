//! Being somebody else: per thread, because who a client is counts when it connects.

use crate::sys;
use std::panic::resume_unwind;

/// A user of this test: an id, and the groups it is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Who {
    /// Its uid and gid.
    pub id: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// The client that policies of tests name.
pub const USER: Who = Who::new(12_345);

/// Nobody that a policy names.
pub const STRANGER: Who = Who::new(12_347);

impl Who {
    /// A user in no supplementary group.
    pub const fn new(id: u32) -> Self {
        Self { id, groups: Vec::new() }
    }

    /// The same in these groups.
    #[must_use]
    pub fn in_groups(mut self, groups: &[u32]) -> Self {
        self.groups = groups.to_vec();
        self
    }
}

/// Runs `action` in a thread that is `who` and holds no capability, whatever it then does.
pub fn as_user<T: Send>(who: &Who, action: impl FnOnce() -> T + Send) -> T {
    in_thread(|| {
        sys::become_user(who.id, who.id, &who.groups).expect("a test as root may become anybody");
        action()
    })
}

/// Runs `action` in a thread of nobody's that holds exactly these capabilities, by their mask.
pub fn with_capabilities<T: Send>(mask: u64, action: impl FnOnce() -> T + Send) -> T {
    use caps::CapSet::{Effective, Permitted};
    const NOBODY: u32 = 65_534;
    let set = caps::all().into_iter().filter(|capability| mask & capability.bitmask() != 0).collect();
    in_thread(|| {
        nix::sys::prctl::set_keepcaps(true).expect("PR_SET_KEEPCAPS");
        sys::become_user(NOBODY, NOBODY, &[]).expect("a test as root may become anybody");
        // The change has emptied the effective set, and left the permitted one.
        caps::set(None, Permitted, &set).expect("capabilities are given up");
        caps::set(None, Effective, &set).expect("what is permitted can be effective");
        action()
    })
}

/// Runs `action` in a thread of its own; its panic is ours.
pub fn in_thread<T: Send>(action: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| scope.spawn(action).join()).unwrap_or_else(|panic| resume_unwind(panic))
}

/// Runs `action` in the network namespace of a process.
pub fn in_network<T: Send>(pid: u32, action: impl FnOnce() -> T + Send) -> T {
    in_thread(|| {
        let namespace = std::fs::File::open(format!("/proc/{pid}/ns/net")).expect("the holder runs");
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).expect("a test runs as root");
        action()
    })
}
