//! Processes, as /proc shows them to everybody.

use std::fs;
use std::io;
use std::path::PathBuf;

use bpfgate_protocol::identity::{cgroup_of, unit_of};
use bpfgate_protocol::names::AppName;
use serde::Serialize;

use super::set::CapSet;

/// What a process of bpfgate is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Role {
    Broker,
    /// PID 1's stand-in, where there is no systemd.
    Spawner,
    /// Root's step before a helper.
    Preparation(AppName),
    Helper(AppName),
    /// The loader's parent, which waits.
    Loader(AppName),
    /// The loader's worker, which runs libbpf.
    Worker(AppName),
}

impl Role {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Broker => "broker",
            Self::Spawner => "spawner",
            Self::Preparation(_) => "preparation",
            Self::Helper(_) => "helper",
            Self::Loader(_) => "loader",
            Self::Worker(_) => "worker",
        }
    }

    pub(crate) fn app(&self) -> Option<&AppName> {
        match self {
            Self::Broker | Self::Spawner => None,
            Self::Preparation(app) | Self::Helper(app) | Self::Loader(app) | Self::Worker(app) => Some(app),
        }
    }
}

/// A process.
#[derive(Debug, Clone)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    /// None: of somebody else.
    pub(crate) role: Option<Role>,
    /// The system unit that it belongs to.
    pub(crate) unit: Option<String>,
    /// Its program's name, of one of ours; else what it is called. A program that was started by its descriptor is
    /// called by the number of that before Linux 6.14.
    pub(crate) name: String,
    /// Where its helper looks for policies; empty: where all do.
    pub(crate) policies: Vec<PathBuf>,
    pub(crate) threads: Vec<Thread>,
}

/// A thread: capabilities belong to threads, not to processes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Thread {
    pub(crate) tid: u32,
    pub(crate) name: String,
    pub(crate) permitted: CapSet,
    pub(crate) effective: CapSet,
    pub(crate) inheritable: CapSet,
    pub(crate) bounding: CapSet,
    pub(crate) ambient: CapSet,
    pub(crate) no_new_privileges: bool,
    pub(crate) seccomp: Seccomp,
    pub(crate) seccomp_filters: u32,
}

/// `Seccomp` of /proc/PID/status. Source: include/uapi/linux/seccomp.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Seccomp {
    Off,
    Strict,
    Filter,
}

impl Seccomp {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Strict => "strict",
            Self::Filter => "filter",
        }
    }
}

impl Thread {
    /// From its `status`; none if that is not what a kernel writes.
    fn parse(status: &str) -> Option<Self> {
        let field = |name| field(status, name);
        let set = |name| CapSet::from_mask(field(name)?).ok();
        Some(Self {
            tid: field("Pid")?.parse().ok()?,
            name: field("Name")?.to_owned(),
            permitted: set("CapPrm")?,
            effective: set("CapEff")?,
            inheritable: set("CapInh")?,
            bounding: set("CapBnd")?,
            ambient: set("CapAmb")?,
            no_new_privileges: field("NoNewPrivs")? == "1",
            // A kernel without seccomp has no such lines.
            seccomp: match field("Seccomp").unwrap_or("0") {
                "0" => Seccomp::Off,
                "1" => Seccomp::Strict,
                _ => Seccomp::Filter,
            },
            // Before Linux 5.9 nobody is told how many.
            seccomp_filters: field("Seccomp_filters").unwrap_or("0").parse().ok()?,
        })
    }

    /// The same but for what tells threads apart.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        Self { tid: 0, name: String::new(), ..self.clone() }
            == Self { tid: 0, name: String::new(), ..other.clone() }
    }
}

impl Process {
    /// Looks at one process; none if it is gone, is about to be, or is hidden.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        let directory = PathBuf::from(format!("/proc/{pid}"));
        let mut threads = Vec::new();
        for task in fs::read_dir(directory.join("task")).ok()? {
            // A thread that ends meanwhile is no thread.
            let status = fs::read_to_string(task.ok()?.path().join("status"));
            threads.extend(status.ok().as_deref().and_then(Thread::parse));
        }
        threads.sort_by_key(|thread| thread.tid);
        let words = words(pid);
        let role = role(pid, &words);
        let called = threads.iter().find(|thread| thread.tid == pid)?.name.clone();
        let name = role.as_ref().and_then(|_| program(pid, &words)).unwrap_or(called);
        let policies = words
            .windows(2)
            .filter(|pair| pair[0] == "--policies")
            .map(|pair| PathBuf::from(&pair[1]))
            .collect();
        let unit = i32::try_from(pid).ok().and_then(cgroup_of).as_deref().and_then(unit_of);
        Some(Self { pid, role, unit, name, policies, threads })
    }

    /// All processes that this one can see.
    pub(crate) fn all() -> io::Result<Vec<Self>> {
        let mut pids = Vec::new();
        for entry in fs::read_dir("/proc")? {
            pids.extend(entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()));
        }
        pids.sort_unstable();
        Ok(pids.into_iter().filter_map(Self::of).collect())
    }
}

/// Its command line; none for threads of the kernel.
fn words(pid: u32) -> Vec<String> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words = line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
    words.filter(|word| !word.is_empty()).collect()
}

/// The name of the program that a process runs. What it runs is told to root and to the same user; to others it says
/// itself, and who lies about it is judged as what it says it is.
fn program(pid: u32, words: &[String]) -> Option<String> {
    let path = match fs::read_link(format!("/proc/{pid}/exe")) {
        Ok(path) => path,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => PathBuf::from(words.first()?),
        Err(_) => return None,
    };
    let name = path.file_name()?.to_str()?;
    // A program that was replaced meanwhile runs on.
    Some(name.strip_suffix(" (deleted)").unwrap_or(name).to_owned())
}

fn role(pid: u32, words: &[String]) -> Option<Role> {
    let first = words.get(1).map(String::as_str);
    match program(pid, words)?.as_str() {
        "bpfgate-broker" => Some(Role::Broker),
        "bpfgate-helper" if first == Some("--spawner") => Some(Role::Spawner),
        "bpfgate-helper" => {
            let app = first?.parse().ok()?;
            let prepares = words.iter().any(|word| word == "--prepare");
            Some(if prepares { Role::Preparation(app) } else { Role::Helper(app) })
        }
        // Its command line does not say whose it is; its parent does.
        "bpfgate-loader" => {
            let parent = parent(pid)?;
            match role(parent, &self::words(parent))? {
                Role::Helper(app) => Some(Role::Loader(app)),
                Role::Loader(app) => Some(Role::Worker(app)),
                _ => None,
            }
        }
        _ => None,
    }
}

fn parent(pid: u32) -> Option<u32> {
    status_of(pid, "PPid")?.parse().ok()
}

/// A field of a process's `status`.
pub(crate) fn status_of(pid: u32, name: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    field(&status, name).map(str::to_owned)
}

fn field<'s>(status: &'s str, name: &str) -> Option<&'s str> {
    status.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_what_proc_says() {
        let status = "Name:\tsleep\nPid:\t7\nCapInh:\t0000000000000000\nCapPrm:\t000000c000001000\n\
                      CapEff:\t0000008000000000\nCapBnd:\t000001feffffffff\nCapAmb:\t0000000000001000\nNoNewPrivs:\t1\n\
                      Seccomp:\t2\nSeccomp_filters:\t3\n";
        let thread = Thread::parse(status).unwrap();
        assert_eq!((thread.tid, thread.name.as_str(), thread.no_new_privileges), (7, "sleep", true));
        assert_eq!((thread.seccomp, thread.seccomp_filters), (Seccomp::Filter, 3));
        assert_eq!(thread.permitted, CapSet(0xc0_0000_1000));
        assert_eq!((thread.effective, thread.ambient), (CapSet(1 << 39), CapSet(1 << 12)));
        assert_eq!(Thread::parse("Name:\tsleep\n"), None);
        assert!(Thread { tid: 8, ..thread.clone() }.is_like(&thread));
        assert!(!Thread { ambient: CapSet::NONE, ..thread.clone() }.is_like(&thread));
    }

    #[test]
    fn this_process_is_seen_with_its_threads() {
        let own = std::thread::spawn(|| Process::of(std::process::id()).unwrap()).join().unwrap();
        assert!(own.threads.len() >= 2, "{own:?}");
        assert_eq!(own.role, None);
    }
}
