//! Attaching: one arm per kind of target. Links keep a program attached as long as somebody holds them; here they are
//! held until they are detached or their instance ends.

use crate::inventory::Inventory;
use crate::loader::Loader;
use crate::loading;
use bpfgate_bpf as bpf;
use bpfgate_bpf::uapi::{self, attach};
use bpfgate_protocol::authorize::AttachPermit;
use bpfgate_protocol::messages::helper::Target;
use bpfgate_protocol::names::{InterfaceName, ProgramName};
use bpfgate_protocol::policy::{Direction, Hook, XdpMode};
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

pub(crate) fn attach(
    inventory: &mut Inventory,
    loader: &mut Loader,
    permit: &AttachPermit,
    program: BorrowedFd<'_>,
) -> Result<Attached, Refusal> {
    let rule = permit.rule();
    match (&rule.hook, permit.target()) {
        (Hook::Xdp { mode, .. }, Target::Interface(name)) => {
            let flags = match mode {
                XdpMode::Native => uapi::XDP_DRV_MODE,
                XdpMode::Generic => uapi::XDP_SKB_MODE,
                XdpMode::Any => 0,
            };
            let index = interface(inventory, name)?;
            link(&rule.program, permit.target(), bpf::link_create(program, index, attach::XDP, flags))
        }
        (Hook::Tcx { direction, .. }, Target::Interface(name)) => {
            let attach_type = match direction {
                Direction::Ingress => attach::TCX_INGRESS,
                Direction::Egress => attach::TCX_EGRESS,
            };
            let index = interface(inventory, name)?;
            link(&rule.program, permit.target(), bpf::link_create(program, index, attach_type, 0))
        }
        (Hook::CgroupSkb { direction, .. }, Target::Cgroup(path)) => {
            let attach_type = match direction {
                Direction::Ingress => attach::CGROUP_INET_INGRESS,
                Direction::Egress => attach::CGROUP_INET_EGRESS,
            };
            let cgroup = opened(&inventory.cgroups, path)?;
            let target = cgroup.as_raw_fd().cast_unsigned();
            link(&rule.program, permit.target(), bpf::link_create(program, target, attach_type, 0))
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
            let made = link(
                &rule.program,
                permit.target(),
                bpf::link_create(program, target, attach::PERF_EVENT, 0),
            );
            match made {
                Ok(attached) => Ok(Attached { event: Some(free), ..attached }),
                Err(refusal) => {
                    events.push(free);
                    Err(refusal)
                }
            }
        }
        (Hook::Uprobe { at_return, .. }, Target::Symbol { binary, symbol }) => {
            let file = opened(&inventory.binaries, binary)?;
            let offsets = loading::symbols(loader, file, vec![symbol.clone()])?;
            // The file that was opened at the start, whatever stands at its path by now.
            let path = c_string(&format!("/proc/self/fd/{}", file.as_raw_fd()))?;
            let flags = if *at_return { uapi::UPROBE_MULTI_RETURN } else { 0 };
            link(&rule.program, permit.target(), bpf::uprobe_link(program, &path, &offsets, flags))
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

fn link(program: &ProgramName, target: &Target, made: Result<OwnedFd, Errno>) -> Result<Attached, Refusal> {
    made.map(Attached::from).map_err(|errno| {
        let hint = match errno {
            Errno::EBUSY | Errno::EEXIST => "; another program is attached there",
            Errno::EINVAL | Errno::EOPNOTSUPP => "; this kernel or this driver cannot do it",
            _ => "",
        };
        let why = format!("the kernel does not attach program {program} to {target}: {}{hint}", errno.desc());
        Refusal::kernel_because("BPF_LINK_CREATE", errno as i32, why)
    })
}
