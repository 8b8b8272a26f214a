//! How links are made. Nothing here asks the kernel.

use bpfgate_bpf::uapi::{self, attach};
use bpfgate_protocol::policy::{Direction, Hook, Order, XdpMode};
use serde::{Deserialize, Serialize};

/// How a hook is attached: the kernel's attach type and flags. A link that was made in another way than the policy
/// says now is another link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Way {
    /// `enum bpf_attach_type`.
    pub attach_type: u32,
    /// Flags of the link.
    pub flags: u32,
}

impl Way {
    /// As a hook says.
    pub fn of(hook: &Hook) -> Self {
        let (attach_type, flags) = match hook {
            Hook::Xdp { mode: XdpMode::Native, .. } => (attach::XDP, uapi::XDP_DRV_MODE),
            Hook::Xdp { mode: XdpMode::Generic, .. } => (attach::XDP, uapi::XDP_SKB_MODE),
            Hook::Xdp { mode: XdpMode::Any, .. } => (attach::XDP, 0),
            Hook::Tcx { direction, order, .. } => {
                let flags = match order {
                    Order::First => uapi::F_BEFORE,
                    // Without a flag too, since the kernel has an order.
                    Order::Last => 0,
                };
                match direction {
                    Direction::Ingress => (attach::TCX_INGRESS, flags),
                    Direction::Egress => (attach::TCX_EGRESS, flags),
                }
            }
            Hook::CgroupSkb { direction: Direction::Ingress, .. } => (attach::CGROUP_INET_INGRESS, 0),
            Hook::CgroupSkb { direction: Direction::Egress, .. } => (attach::CGROUP_INET_EGRESS, 0),
            Hook::Tracepoint { .. } => (attach::PERF_EVENT, 0),
            Hook::Uprobe { at_return: true, .. } => (0, uapi::UPROBE_MULTI_RETURN),
            Hook::Fentry { .. } => (attach::TRACE_FENTRY, 0),
            Hook::Fexit { .. } => (attach::TRACE_FEXIT, 0),
            Hook::Kprobe { at_return: true, .. } => (attach::TRACE_KPROBE_MULTI, uapi::KPROBE_MULTI_RETURN),
            Hook::Kprobe { .. } => (attach::TRACE_KPROBE_MULTI, 0),
            Hook::Uprobe { .. } | Hook::RawTracepoint { .. } | Hook::SocketFilter => (0, 0),
        };
        Self { attach_type, flags }
    }
}
