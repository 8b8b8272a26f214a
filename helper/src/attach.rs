//! Attaching: one arm per kind of target. Links keep a program attached as long as somebody holds them; here they are
//! held until they are detached or their instance ends.

use crate::inventory::Inventory;
use crate::loader::Loader;
use crate::loading;
use bpfgate_bpf as bpf;
use bpfgate_bpf::uapi::link_type;
use bpfgate_helper::way::Way;
use bpfgate_protocol::authorize::AttachPermit;
use bpfgate_protocol::hooks::Kind;
use bpfgate_protocol::messages::helper::Target;
use bpfgate_protocol::names::{InterfaceName, ProgramName};
use bpfgate_protocol::policy::Hook;
use bpfgate_protocol::refusal::Refusal;
use nix::errno::Errno;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// A link, and the perf event that it took from the inventory.
pub(crate) struct Attached {
    pub(crate) link: OwnedFd,
    pub(crate) event: Option<OwnedFd>,
}

impl From<OwnedFd> for Attached {
    fn from(link: OwnedFd) -> Self {
        Self { link, event: None }
    }
}

/// What the kernel calls the links of a hook.
pub(crate) fn link_type(kind: Kind) -> u32 {
    match kind {
        Kind::Xdp => link_type::XDP,
        Kind::Tcx => link_type::TCX,
        Kind::CgroupSkb => link_type::CGROUP,
        Kind::RawTracepoint => link_type::RAW_TRACEPOINT,
        Kind::Tracepoint => link_type::PERF_EVENT,
        Kind::Uprobe => link_type::UPROBE_MULTI,
        Kind::Fentry | Kind::Fexit => link_type::TRACING,
        Kind::Kprobe => link_type::KPROBE_MULTI,
        // It has none.
        Kind::SocketFilter => 0,
    }
}

pub(crate) fn attach(
    inventory: &mut Inventory,
    loader: &mut Loader,
    permit: &AttachPermit,
    program: BorrowedFd<'_>,
    cgroup: Option<OwnedFd>,
) -> Result<Attached, Refusal> {
    let rule = permit.rule();
    let Way { attach_type, flags } = Way::of(&rule.hook);
    match (&rule.hook, permit.target()) {
        (Hook::Xdp { .. } | Hook::Tcx { .. }, Target::Interface(name)) => {
            let index = interface(inventory, name)?;
            link(&rule.program, permit.target(), bpf::link_create(program, index, attach_type, flags))
        }
        (Hook::CgroupSkb { .. }, Target::Cgroup(path)) => {
            let cgroup = opened(&inventory.cgroups, path)?;
            let target = cgroup.as_raw_fd().cast_unsigned();
            link(&rule.program, permit.target(), bpf::link_create(program, target, attach_type, flags))
        }
        (Hook::CgroupSkb { .. }, Target::Unit(unit)) => {
            // The broker opened it, and is not believed.
            let cgroup = cgroup.filter(|fd| inventory.units.is_cgroup_of(fd.as_fd(), unit));
            let cgroup = cgroup.ok_or_else(|| Refusal::gone(format!("the cgroup of {unit} is not there")))?;
            let target = cgroup.as_raw_fd().cast_unsigned();
            link(&rule.program, permit.target(), bpf::link_create(program, target, attach_type, flags))
        }
        (Hook::RawTracepoint { .. }, Target::Event(event)) => {
            let name = c_string(event.as_str())?;
            link(&rule.program, permit.target(), bpf::raw_tracepoint(program, &name))
        }
        (Hook::Tracepoint { .. }, Target::Event(event)) => {
            let events = inventory.tracepoints.get_mut(event).ok_or_else(missing)?;
            let events = events.as_mut().map_err(|refusal| refusal.clone())?;
            let Some(free) = events.pop() else {
                return Err(Refusal::quota(format!(
                    "tracepoint {event} has no place left for another program of this app"
                )));
            };
            let target = free.as_raw_fd().cast_unsigned();
            let made =
                link(&rule.program, permit.target(), bpf::link_create(program, target, attach_type, flags));
            match made {
                Ok(attached) => Ok(Attached { event: Some(free), ..attached }),
                Err(refusal) => {
                    events.push(free);
                    Err(refusal)
                }
            }
        }
        (Hook::Uprobe { .. }, Target::Symbol { binary, symbol }) => {
            let file = opened(&inventory.binaries, binary)?;
            let offsets = loading::symbols(loader, file, vec![symbol.clone()])?;
            // The file that was opened at the start, whatever stands at its path by now.
            let path = c_string(&format!("/proc/self/fd/{}", file.as_raw_fd()))?;
            link(&rule.program, permit.target(), bpf::uprobe_link(program, &path, &offsets, flags))
        }
        (Hook::Fentry { .. } | Hook::Fexit { .. }, Target::Function(_)) => {
            // Where, was said when it was loaded.
            link(&rule.program, permit.target(), bpf::link_create(program, 0, attach_type, flags))
        }
        (Hook::Kprobe { .. }, Target::Function(function)) => {
            let name = c_string(function.as_str())?;
            link(&rule.program, permit.target(), bpf::kprobe_link(program, &[&name], flags))
        }
        // The permit pairs hooks with their targets.
        _ => Err(missing()),
    }
}

fn missing() -> Refusal {
    Refusal::denied("no such target")
}

fn c_string(text: &str) -> Result<CString, Refusal> {
    CString::new(text).map_err(|_| missing())
}

fn opened<'a, K: Ord>(
    things: &'a std::collections::BTreeMap<K, Result<OwnedFd, Refusal>>,
    key: &K,
) -> Result<BorrowedFd<'a>, Refusal> {
    match things.get(key).ok_or_else(missing)? {
        Ok(fd) => Ok(fd.as_fd()),
        Err(refusal) => Err(refusal.clone()),
    }
}

fn interface(inventory: &Inventory, name: &InterfaceName) -> Result<u32, Refusal> {
    bpf::interface_index(inventory.network.as_fd(), name).map_err(|errno| {
        let why = format!("there is no interface {name} in the network namespace of the helper");
        Refusal::kernel_because("SIOCGIFINDEX", errno as i32, why)
    })
}

/// Who may be the reason when somebody with all capabilities that a call needs is denied it.
pub(crate) fn forbidden(errno: Errno) -> &'static str {
    match errno {
        Errno::EPERM | Errno::EACCES => "; a security module of the kernel or its lockdown may forbid it",
        _ => "",
    }
}

fn link(program: &ProgramName, target: &Target, made: Result<OwnedFd, Errno>) -> Result<Attached, Refusal> {
    made.map(Attached::from).map_err(|errno| {
        let hint = match errno {
            Errno::EBUSY | Errno::EEXIST => "; another program is attached there",
            Errno::ESRCH => "; the kernel has no such function, or none that can be traced",
            Errno::EINVAL | Errno::EOPNOTSUPP => "; this kernel or this driver cannot do it",
            other => forbidden(other),
        };
        let why = format!("the kernel does not attach program {program} to {target}: {}{hint}", errno.desc());
        Refusal::kernel_because("BPF_LINK_CREATE", errno as i32, why)
    })
}
