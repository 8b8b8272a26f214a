//! The root directory of a machine that a test has prepared, for commands that take `--root`.

use crate::cli::Ended;
use crate::{bin_dir, workspace};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A directory, gone when this is dropped.
#[derive(Debug)]
pub struct Root(PathBuf);

impl Root {
    /// An empty one.
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("bpfgate-root-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).expect("a directory of the test");
        Self(path)
    }

    /// One in which `bpfgate doctor` finds nothing to say, with the units of bpfgate.
    pub fn good(name: &str) -> Self {
        let root = Self::new(name);
        for (path, text) in [
            ("proc/sys/kernel/osrelease", "6.12.9-amd64\n"),
            ("proc/sys/kernel/unprivileged_bpf_disabled", "2\n"),
            ("proc/sys/kernel/perf_event_paranoid", "3\n"),
            ("proc/sys/net/core/bpf_jit_enable", "1\n"),
            ("sys/kernel/btf/vmlinux", ""),
            ("sys/kernel/security/lsm", "lockdown,capability,landlock,bpf"),
            ("sys/kernel/security/lockdown", "[none] integrity confidentiality\n"),
            (
                "proc/self/mountinfo",
                "1 1 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n2 1 0:2 / /sys/fs/bpf rw - bpf bpf rw\n",
            ),
        ] {
            root.write(path, text);
        }
        for unit in ["bpfgate.service", "bpfgate-helper@.service"] {
            let text = fs::read_to_string(workspace().join("systemd/units").join(unit)).expect("the units");
            root.write(&format!("usr/lib/systemd/system/{unit}"), &text);
        }
        root.directory("sys/fs/bpf", 0o700);
        root
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Writes a file.
    pub fn write(&self, path: &str, text: &str) {
        let path = self.0.join(path);
        fs::create_dir_all(path.parent().expect("it is below the root")).expect("a directory of the test");
        fs::write(path, text).expect("a file of the test");
    }

    /// Makes a directory with this mode, or gives one the mode.
    pub fn directory(&self, path: &str, mode: u32) {
        let path = self.0.join(path);
        fs::create_dir_all(&path).expect("a directory of the test");
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("its mode");
    }

    /// Runs `bpfgate` with a subcommand, `--root` and these words, in the directory.
    pub fn cli(&self, subcommand: &[&str], line: &str) -> Ended {
        let mut command = Command::new(bin_dir().join("bpfgate"));
        command.args(subcommand).arg("--root").arg(&self.0).args(line.split_whitespace());
        Ended::of(command.current_dir(&self.0))
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
