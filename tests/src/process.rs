//! What /proc says of processes.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;

/// What a process of bpfgate is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// `bpfgate-broker`
    Broker,
    /// `bpfgate-helper --spawner`
    Spawner,
    /// `bpfgate-helper APP`
    Helper(String),
    /// The loader's parent, which waits.
    Loader,
    /// The loader's worker, which runs libbpf.
    Worker,
    /// Something else, by the name of its program.
    Other(String),
}

/// A process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// Its parent's.
    pub parent: i32,
    /// When it started, in ticks since boot: with the pid, a name that is not used again.
    pub started: u64,
    /// What it is.
    pub role: Role,
}

/// The ids of all processes.
pub fn all() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").expect("/proc is mounted");
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

/// State, parent and start of a process; `None` if it is gone.
pub fn stat(pid: i32) -> Option<(char, i32, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything.
    let fields: Vec<&str> = text.get(text.rfind(')')? + 2..)?.split(' ').collect();
    Some((fields.first()?.chars().next()?, fields.get(1)?.parse().ok()?, fields.get(19)?.parse().ok()?))
}

/// How long a process has computed, in ticks of USER_HZ; 0 if it is gone.
pub fn ticks(pid: i32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = text.rsplit_once(')').map_or("", |(_, fields)| fields).split(' ');
    // utime and stime are the fields 14 and 15, of which the name was the second.
    fields.skip(12).take(2).filter_map(|field| field.parse::<u64>().ok()).sum()
}

/// The name of its program, without the mark of a file that was replaced meanwhile.
fn program(pid: i32) -> Option<String> {
    let path = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    let name = path.file_name()?.to_str()?;
    Some(name.strip_suffix(" (deleted)").unwrap_or(name).to_owned())
}

impl Process {
    /// Looks at one process; `None` if it is gone or a zombie.
    pub fn of(pid: i32) -> Option<Self> {
        let (state, parent, started) = stat(pid)?;
        if state == 'Z' {
            return None;
        }
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let first = String::from_utf8_lossy(command.split(|byte| *byte == 0).nth(1)?).into_owned();
        let role = match program(pid)?.as_str() {
            "bpfgate-broker" => Role::Broker,
            "bpfgate-helper" if first == "--spawner" => Role::Spawner,
            "bpfgate-helper" => Role::Helper(first),
            "bpfgate-loader" if program(parent).as_deref() == Some("bpfgate-loader") => Role::Worker,
            "bpfgate-loader" => Role::Loader,
            other => Role::Other(other.to_owned()),
        };
        Some(Self { pid, parent, started, role })
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid).is_some_and(|now| now.started == self.started)
    }
}

/// The inode of a process's network namespace.
pub fn network(pid: i32) -> Option<u64> {
    Some(fs::metadata(format!("/proc/{pid}/ns/net")).ok()?.ino())
}

/// Its descriptors by what they are, counted; numbers of inodes are left out.
pub fn descriptors(pid: i32) -> BTreeMap<String, usize> {
    let mut count = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
        if let Ok(target) = fs::read_link(entry.path()) {
            let target = target.to_string_lossy();
            let kind = target.split_once(":[").map_or(&*target, |(kind, _)| kind);
            *count.entry(kind.to_owned()).or_default() += 1;
        }
    }
    count
}

/// How many links of BPF programs a process holds.
pub fn links(pid: i32) -> usize {
    descriptors(pid).get("anon_inode:bpf_link").copied().unwrap_or(0)
}

/// What the kernel tells of each of its descriptors.
pub fn fdinfo(pid: i32) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
    entries.filter_map(|entry| fs::read_to_string(entry.path()).ok()).collect()
}

/// A field of /proc/PID/status in each of its threads.
pub fn status(pid: i32, field: &str) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let field_of = |text: String| {
        let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
        Some(line.trim().to_owned())
    };
    tasks.filter_map(|task| field_of(fs::read_to_string(task.path().join("status")).ok()?)).collect()
}

/// A number of /proc/PID/status, such as `VmRSS` in kB.
pub fn number(pid: i32, field: &str) -> u64 {
    let text = status(pid, field).into_iter().next().unwrap_or_default();
    text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0)
}

/// What a descriptor of this process is: `map`, `program`, `link`, or something else.
pub fn kind(fd: impl AsFd) -> String {
    let number = fd.as_fd().as_raw_fd();
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{number}")).unwrap_or_default();
    // A link's information names its program too.
    for (key, kind) in [("link_type:", "link"), ("prog_type:", "program"), ("map_type:", "map")] {
        if text.lines().any(|line| line.starts_with(key)) {
            return kind.to_owned();
        }
    }
    "something else".to_owned()
}
