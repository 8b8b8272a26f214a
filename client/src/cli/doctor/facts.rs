//! What a machine says of itself in files: read once, below a root directory, so that another machine's can be looked at.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::super::caps::kernel::Kernel;

/// What was read. None: the file is not there or cannot be read.
#[derive(Debug, Default)]
pub(crate) struct Facts {
    pub(crate) kernel: Option<Kernel>,
    pub(crate) unprivileged_bpf_disabled: Option<i32>,
    pub(crate) perf_event_paranoid: Option<i32>,
    pub(crate) bpf_jit_enable: Option<i32>,
    pub(crate) btf: bool,
    /// Security modules, in their order.
    pub(crate) modules: Option<Vec<String>>,
    /// The level in force: none, integrity, confidentiality.
    pub(crate) lockdown: Option<String>,
    /// Where bpf file systems are mounted, with the mode of their root directories.
    pub(crate) bpffs: Vec<(PathBuf, u32)>,
    /// Where cgroup v2 is mounted.
    pub(crate) cgroup2: Vec<PathBuf>,
}

impl Facts {
    pub(crate) fn gather(root: &Path) -> Self {
        let text = |path: &str| fs::read_to_string(root.join(path)).ok();
        let number = |path: &str| text(path)?.trim().parse().ok();
        let security = "sys/kernel/security";
        let mode = |path: PathBuf| {
            let below = path.strip_prefix("/").unwrap_or(&path);
            let mode = fs::metadata(root.join(below)).ok()?.permissions().mode();
            Some((path, mode & 0o7777))
        };
        Self {
            kernel: text("proc/sys/kernel/osrelease").as_deref().and_then(Kernel::of_release),
            unprivileged_bpf_disabled: number("proc/sys/kernel/unprivileged_bpf_disabled"),
            perf_event_paranoid: number("proc/sys/kernel/perf_event_paranoid"),
            bpf_jit_enable: number("proc/sys/net/core/bpf_jit_enable"),
            btf: root.join("sys/kernel/btf/vmlinux").exists(),
            modules: text(&format!("{security}/lsm"))
                .map(|list| list.trim().split(',').map(str::to_owned).collect()),
            lockdown: text(&format!("{security}/lockdown")).as_deref().and_then(chosen),
            bpffs: mounted(root, "bpf").into_iter().filter_map(mode).collect(),
            cgroup2: mounted(root, "cgroup2"),
        }
    }
}

/// The word in brackets: `none [integrity] confidentiality`.
fn chosen(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

/// Where file systems of this kind are mounted.
pub(crate) fn mounted(root: &Path, kind: &str) -> Vec<PathBuf> {
    let mountinfo = fs::read_to_string(root.join("proc/self/mountinfo")).unwrap_or_default();
    let of_kind = |(path, is): (PathBuf, String)| (is == kind).then_some(path);
    mounts(&mountinfo).into_iter().filter_map(of_kind).collect()
}

/// Mount points with their file systems. Source: proc_pid_mountinfo(5).
fn mounts(mountinfo: &str) -> Vec<(PathBuf, String)> {
    let mount = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        Some((PathBuf::from(unescaped(left.split(' ').nth(4)?)), right.split(' ').next()?.to_owned()))
    };
    mountinfo.lines().filter_map(mount).collect()
}

/// Blanks and the like stand there as `\040`.
fn unescaped(path: &str) -> String {
    let mut parts = path.split('\\');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                text.push(char::from(byte));
                text += &part[3..];
            }
            None => text.extend(["\\", part]),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_prints_is_understood() {
        assert_eq!(chosen("none [integrity] confidentiality\n").as_deref(), Some("integrity"));
        assert_eq!(chosen("none"), None);
        let text = "36 35 98:0 / /sys/fs/bpf rw - bpf bpf rw,mode=700\n\
                    37 35 0:1 / /mnt/a\\040b rw shared:1 master:2 - cgroup2 cgroup2 rw\nnonsense\n";
        let expected = [("/sys/fs/bpf", "bpf"), ("/mnt/a b", "cgroup2")];
        assert_eq!(mounts(text), expected.map(|(path, kind)| (PathBuf::from(path), kind.to_owned())));
    }
}
