//! A cgroup of a test's own.

use crate::{SOON, wait_until};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A directory of cgroup v2, removed when this is dropped; its processes have to have ended then.
#[derive(Debug)]
pub struct Cgroup {
    /// Where it is.
    pub path: PathBuf,
}

impl Cgroup {
    /// Makes one.
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let mounts = fs::read_to_string("/proc/mounts").expect("/proc is mounted");
        let mut mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let root = mounts.find(|fields| fields[2] == "cgroup2").expect("cgroup v2 is mounted")[1];
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = Path::new(root).join(format!("bpfgate-test-{}-{number}", std::process::id()));
        fs::create_dir(&path).expect("a test runs as root");
        Self { path }
    }
}

impl Default for Cgroup {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let removed = wait_until(SOON, || fs::remove_dir(&self.path).is_ok());
        assert!(removed || std::thread::panicking(), "{} cannot be removed", self.path.display());
    }
}
