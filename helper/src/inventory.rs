//! Everything outside of this process that the policy names, opened once, before the lock-down. What could not be
//! opened is kept as the refusal that a request for it gets; what is opened stays as it is, whatever happens to
//! the path afterwards.

use crate::bpf;
use bpfgate_lockdown::{Fatal, Step};
use bpfgate_protocol::names::{AbsolutePath, EventName, ObjectName};
use bpfgate_protocol::policy::file::open_trusted;
use bpfgate_protocol::policy::{Hook, Object, Policy};
use bpfgate_protocol::refusal::{Class, Refusal};
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl, open};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::sys::stat::{Mode, fstat};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

/// The largest object file in bytes. libbpf reads all of it.
const MAX_OBJECT: u64 = 16 << 20;

/// Attachments to one tracepoint at a time: each needs a perf event of its own, which can be made only now.
const EVENTS: usize = 4;

type Opened<T> = Result<T, Refusal>;

/// What a policy names.
pub(crate) struct Inventory {
    /// Sealed copies of approved objects.
    pub(crate) objects: BTreeMap<ObjectName, Opened<OwnedFd>>,
    pub(crate) cgroups: BTreeMap<AbsolutePath, Opened<OwnedFd>>,
    pub(crate) binaries: BTreeMap<AbsolutePath, Opened<OwnedFd>>,
    /// Perf events that no program is attached to.
    pub(crate) tracepoints: BTreeMap<EventName, Opened<Vec<OwnedFd>>>,
    /// A socket of the network namespace that links are made in.
    pub(crate) network: OwnedFd,
    /// Possible CPUs: what per-CPU maps have values for.
    pub(crate) cpus: u32,
}

impl Inventory {
    pub(crate) fn open(policy: &Policy) -> Result<Self, Fatal> {
        let network =
            socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).step("a socket")?;
        let mut inventory = Self {
            objects: BTreeMap::new(),
            cgroups: BTreeMap::new(),
            binaries: BTreeMap::new(),
            tracepoints: BTreeMap::new(),
            network,
            cpus: possible_cpus()?,
        };
        for (name, object) in &policy.objects {
            inventory.objects.insert(name.clone(), told(policy, object.line, approve(name, object)));
            for rule in &object.programs {
                inventory.open_targets(policy, rule.line, &rule.hook);
            }
        }
        Ok(inventory)
    }

    fn open_targets(&mut self, policy: &Policy, line: u32, hook: &Hook) {
        match hook {
            Hook::CgroupSkb { cgroups, .. } => {
                for path in cgroups {
                    let opened =
                        told(policy, line, open_path(path, "cgroup", OFlag::O_RDONLY | OFlag::O_DIRECTORY));
                    self.cgroups.insert(path.clone(), opened);
                }
            }
            Hook::Uprobe { binary, .. } => {
                let opened =
                    told(policy, line, open_path(binary, "binary", OFlag::O_RDONLY | OFlag::O_NONBLOCK));
                self.binaries.insert(binary.clone(), opened);
            }
            Hook::Tracepoint { events } => {
                for event in events {
                    self.tracepoints.insert(event.clone(), told(policy, line, open_tracepoint(event)));
                }
            }
            // Resolved when they are attached to: an interface may come later.
            Hook::Xdp { .. } | Hook::Tcx { .. } | Hook::RawTracepoint { .. } | Hook::SocketFilter => {}
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

fn possible_cpus() -> Result<u32, Fatal> {
    let text =
        std::fs::read_to_string("/sys/devices/system/cpu/possible").step("reading the possible CPUs")?;
    let last = text.trim().rsplit(['-', ',']).next().unwrap_or_default();
    Ok(last.parse::<u32>().step("reading the possible CPUs")? + 1)
}

/// Opens an object, copies it, and compares the copy: from here on only the sealed copy counts.
fn approve(name: &ObjectName, object: &Object) -> Opened<OwnedFd> {
    let refuse = |why: String| Refusal::new(Class::Object, format!("the file of object {name} {why}"));
    let path = Path::new(object.path.as_str());
    let (fd, stat) = match object.sha256 {
        // The digest says which bytes; who can write the file does not matter.
        Some(_) => {
            let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
            let fd = open(path, flags, Mode::empty())
                .map_err(|e| refuse(format!("cannot be opened: {}", e.desc())))?;
            let stat = fstat(&fd).map_err(|e| refuse(format!("cannot be examined: {}", e.desc())))?;
            (fd, stat)
        }
        None => {
            open_trusted(path).map_err(|why| refuse(format!("{why}, and the policy has no sha256 for it")))?
        }
    };
    if stat.st_mode & libc::S_IFMT != libc::S_IFREG {
        return Err(refuse("is not a regular file".into()));
    }
    let mut bytes = Vec::new();
    let read = File::from(fd).take(MAX_OBJECT + 1).read_to_end(&mut bytes);
    read.map_err(|e| refuse(format!("cannot be read: {e}")))?;
    if bytes.len() as u64 > MAX_OBJECT {
        return Err(refuse(format!("is larger than {MAX_OBJECT} bytes")));
    }
    let digest: [u8; 32] = Sha256::digest(&bytes).into();
    if object.sha256.is_some_and(|expected| expected != digest) {
        return Err(refuse("is not the one that the policy approves: its SHA-256 differs".into()));
    }
    seal(&bytes).map_err(|e| refuse(format!("cannot be copied: {e}")))
}

fn seal(bytes: &[u8]) -> std::io::Result<OwnedFd> {
    let mut file =
        File::from(memfd_create("bpfgate-object", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.write_all(bytes)?;
    let seals =
        SealFlag::F_SEAL_SEAL | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file.into())
}

fn open_path(path: &AbsolutePath, what: &str, flags: OFlag) -> Opened<OwnedFd> {
    open(path.as_str(), flags | OFlag::O_CLOEXEC, Mode::empty()).map_err(|errno| {
        let mut refusal = Refusal::kernel(&format!("open the {what}"), errno as i32);
        refusal.why =
            format!("the {what} {path} could not be opened when the helper started: {}", errno.desc());
        refusal
    })
}

/// The tracepoint's number can be read, and its events be made, only by root: this is before the drop.
fn open_tracepoint(event: &EventName) -> Opened<Vec<OwnedFd>> {
    let unsupported = |why: String| Refusal::new(Class::Unsupported, format!("tracepoint {event} {why}"));
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
