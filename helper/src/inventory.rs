//! Everything outside of this process that the policy names, opened once, before the lock-down. What could not be
//! opened is kept as the refusal that a request for it gets; what is opened stays as it is, whatever happens to
//! the path afterwards.

use crate::functions::Functions;
use bpfgate_bpf::{self as bpf, PossibleCpus};
use bpfgate_lockdown::{Fatal, Step};
use bpfgate_protocol::identity::{Asker, Units};
use bpfgate_protocol::names::{AbsolutePath, EventName, ObjectName};
use bpfgate_protocol::policy::file::open_trusted;
use bpfgate_protocol::policy::object::{Approved, approve};
use bpfgate_protocol::policy::{Hook, Policy};
use bpfgate_protocol::refusal::Refusal;
use bpfgate_systemd::manager::Named;
use nix::fcntl::{OFlag, open};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::sys::stat::{Mode, SFlag, fstat};
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

/// Attachments to one tracepoint at a time: each needs a perf event of its own, which can be made only now.
const EVENTS: usize = 4;

type Opened<T> = Result<T, Refusal>;

/// What root opened before this process started ([`crate::prepare`]), by name.
#[derive(Default)]
pub(crate) struct Prepared(BTreeMap<String, Vec<OwnedFd>>);

impl Prepared {
    /// The name of a tracepoint's perf events. Names go without `:`.
    pub(crate) fn event(event: &EventName) -> String {
        format!("event {}", event.as_str().replace(':', "/"))
    }

    /// The name of a binary.
    pub(crate) fn binary(path: &AbsolutePath) -> String {
        format!("binary {path}")
    }

    /// Takes what is prepared out of all that was handed over.
    pub(crate) fn of(named: Vec<Named>) -> (Self, Vec<Named>) {
        let (mut prepared, mut rest) = (Self::default(), Vec::new());
        for Named { name, fd } in named {
            if name.starts_with("event ") || name.starts_with("binary ") {
                prepared.0.entry(name).or_default().push(fd);
            } else {
                rest.push(Named { name, fd });
            }
        }
        (prepared, rest)
    }

    /// Names that the policy of now has no use for.
    fn left(self) -> Vec<String> {
        self.0.into_keys().collect()
    }

    fn take(&mut self, name: &str) -> Option<Vec<OwnedFd>> {
        self.0.remove(name)
    }
}

/// What a policy names.
pub(crate) struct Inventory {
    /// Sealed copies of approved objects.
    pub(crate) objects: BTreeMap<ObjectName, Opened<Approved>>,
    pub(crate) cgroups: BTreeMap<AbsolutePath, Opened<OwnedFd>>,
    pub(crate) binaries: BTreeMap<AbsolutePath, Opened<OwnedFd>>,
    /// Perf events that no program is attached to.
    pub(crate) tracepoints: BTreeMap<EventName, Opened<Vec<OwnedFd>>>,
    /// Functions of the kernel.
    pub(crate) functions: Functions,
    /// A socket of the network namespace that links are made in.
    pub(crate) network: OwnedFd,
    /// Which network namespace that is: links to interfaces are of one.
    pub(crate) network_id: (u64, u64),
    /// Who is in which unit.
    pub(crate) units: Units,
    /// Possible CPUs: what per-CPU maps have values for.
    pub(crate) cpus: PossibleCpus,
    /// Names under which something was prepared that nobody needs.
    pub(crate) unwanted: Vec<String>,
}

impl Inventory {
    pub(crate) fn open(policy: &Policy, mut prepared: Prepared) -> Result<Self, Fatal> {
        // Of a kind that sends nothing before it is connected: on one for datagrams whoever takes this process over could
        // send what it likes, descriptors too, to every socket of the machine that has a path.
        let network =
            socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).step("a socket")?;
        let mut inventory = Self {
            objects: BTreeMap::new(),
            cgroups: BTreeMap::new(),
            binaries: BTreeMap::new(),
            tracepoints: BTreeMap::new(),
            functions: Functions::look_up(policy),
            network,
            network_id: network_id(policy)?,
            units: Units::open_for(policy, Asker::Helper),
            cpus: PossibleCpus::read().step("reading the possible CPUs")?,
            unwanted: Vec::new(),
        };
        for (name, object) in &policy.objects {
            inventory.objects.insert(name.clone(), told(policy, object.line, approve(name, object)));
            for rule in &object.programs {
                inventory.open_targets(policy, rule.line, &rule.hook, &mut prepared);
            }
        }
        inventory.unwanted = prepared.left();
        Ok(inventory)
    }

    fn open_targets(&mut self, policy: &Policy, line: u32, hook: &Hook, prepared: &mut Prepared) {
        match hook {
            Hook::CgroupSkb { cgroups, .. } => {
                for path in cgroups {
                    if self.cgroups.contains_key(path) {
                        continue;
                    }
                    let opened =
                        told(policy, line, open_path(path, "cgroup", OFlag::O_RDONLY | OFlag::O_DIRECTORY));
                    self.cgroups.insert(path.clone(), opened);
                }
            }
            Hook::Uprobe { binary, .. } => {
                // Call and return of one binary are two rules.
                if self.binaries.contains_key(binary) {
                    return;
                }
                let there = prepared.take(&Prepared::binary(binary)).and_then(|mut fds| fds.pop());
                let opened = there.map_or_else(|| open_binary(binary), Ok);
                self.binaries.insert(binary.clone(), told(policy, line, opened));
            }
            Hook::Tracepoint { events } => {
                for event in events {
                    if self.tracepoints.contains_key(event) {
                        continue;
                    }
                    let opened = prepared.take(&Prepared::event(event));
                    let opened = opened.map_or_else(|| open_tracepoint(event), Ok);
                    self.tracepoints.insert(event.clone(), told(policy, line, opened));
                }
            }
            // Resolved when they are attached to: an interface may come later. Functions are looked up all at once.
            Hook::Xdp { .. }
            | Hook::Tcx { .. }
            | Hook::RawTracepoint { .. }
            | Hook::SocketFilter
            | Hook::Fentry { .. }
            | Hook::Fexit { .. }
            | Hook::Kprobe { .. } => {}
        }
    }
}

/// A refusal is also for the log of this start: the request that it meets may come much later.
fn told<T>(policy: &Policy, line: u32, opened: Opened<T>) -> Opened<T> {
    opened.map_err(|refusal| {
        eprintln!("bpfgate-helper: {}: {}", policy.at(line), refusal.why);
        refusal.by_line(line)
    })
}

/// The network namespace that this process is in, which has to be the one that the policy names.
fn network_id(policy: &Policy) -> Result<(u64, u64), Fatal> {
    let id = |path: &str| nix::sys::stat::stat(path).map(|stat| (stat.st_dev, stat.st_ino));
    let here = id("/proc/self/ns/net").step("/proc/self/ns/net")?;
    if let Some(path) = &policy.netns
        && id(path.as_str()).step(&format!("netns {path}"))? != here
    {
        return Err(Fatal(format!(
            "the policy is for network namespace {path}, and this process is in another one: under systemd \
             `bpfgate policy apply` writes NetworkNamespacePath=; a standalone broker is started inside of it"
        )));
    }
    Ok(here)
}

/// Opens the binary of a uprobe. Root does it too, for whoever can write the directory: nothing but a regular file is
/// opened at all, and none that others may not read, unless everything on the way to it is root's alone.
pub(crate) fn open_binary(path: &AbsolutePath) -> Opened<OwnedFd> {
    if let Ok((fd, _)) = open_trusted(Path::new(path.as_str())) {
        return Ok(fd);
    }
    let place = open_path(path, "binary", OFlag::O_PATH)?;
    let stat = fstat(&place).map_err(|errno| Refusal::kernel("fstat", errno as i32))?;
    if stat.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() || stat.st_mode & 0o004 == 0 {
        let why = format!("the binary {path} is no regular file that everybody may read");
        return Err(Refusal::unsupported(why));
    }
    let path = format!("/proc/self/fd/{}", place.as_raw_fd());
    open(path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(|errno| Refusal::kernel("open the binary", errno as i32))
}

fn open_path(path: &AbsolutePath, what: &str, flags: OFlag) -> Opened<OwnedFd> {
    open(path.as_str(), flags | OFlag::O_CLOEXEC, Mode::empty()).map_err(|errno| {
        let why = format!("the {what} {path} could not be opened when the helper started: {}", errno.desc());
        Refusal::kernel_because(&format!("open the {what}"), errno as i32, why)
    })
}

/// The tracepoint's number can be read, and its events be made, only by root: this is before the drop.
pub(crate) fn open_tracepoint(event: &EventName) -> Opened<Vec<OwnedFd>> {
    let unsupported = |why: String| Refusal::unsupported(format!("tracepoint {event} {why}"));
    let place = event.as_str().replace(':', "/");
    let read = |root: &str| std::fs::read_to_string(format!("{root}/events/{place}/id"));
    let id = read("/sys/kernel/tracing").or_else(|_| read("/sys/kernel/debug/tracing"));
    let id = id.map_err(|e| {
        unsupported(format!("is not in tracefs: {e}; is tracefs mounted at /sys/kernel/tracing?"))
    })?;
    let id: u64 = id.trim().parse().map_err(|_| unsupported("has no number".into()))?;
    let event = |_| bpf::tracepoint_event(id);
    (0..EVENTS).map(event).collect::<Result<_, _>>().map_err(|errno| {
        let hint = "the helper may need another kernel.perf_event_paranoid, see the policy reference";
        unsupported(format!("cannot be opened: {}; {hint}", errno.desc()))
    })
}
