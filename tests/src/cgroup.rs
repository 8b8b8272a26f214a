//! A cgroup of a test's own.

use crate::{SOON, wait_until};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
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
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        Self::at(&format!("bpfgate-test-{}-{number}", std::process::id()))
    }

    /// One where the service manager would have that of a service in `system.slice`.
    pub fn of_service(name: &str) -> Self {
        Self::at(&format!("system.slice/{name}"))
    }

    /// One in another.
    pub fn below(other: &Self) -> Self {
        let path = other.path.join("below");
        fs::create_dir(&path).expect("a test runs as root");
        Self { path }
    }

    fn at(below_root: &str) -> Self {
        let mounts = fs::read_to_string("/proc/mounts").expect("/proc is mounted");
        let mut mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let root = mounts.find(|fields| fields[2] == "cgroup2").expect("cgroup v2 is mounted")[1];
        let path = Path::new(root).join(below_root);
        // A slice that the machine does not have is left behind, empty.
        fs::create_dir_all(path.parent().expect("it is below the root")).expect("a test runs as root");
        fs::create_dir(&path).expect("a test runs as root");
        Self { path }
    }

    /// The same command, in this cgroup from its start.
    pub fn inside(&self, command: &Command) -> Command {
        let mut inside = Command::new("/bin/sh");
        inside.args(["-c", "echo $$ > \"$0/cgroup.procs\" && exec \"$@\""]).arg(&self.path);
        inside.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            value.map(|value| inside.env(name, value));
        }
        inside.current_dir("/");
        inside
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
