//! The parts of `union bpf_attr` that bpfgate uses: one struct per command, plain data.
//! Source: include/uapi/linux/bpf.h, Linux 6.18. Pointers are u64, as the kernel takes them.
//! Fields that are not named in a comment are named as in the kernel.
#![forbid(unsafe_code)]
#![allow(missing_docs)] // the kernel's names, documented there

/// `enum bpf_cmd`.
#[rustfmt::skip]
pub mod cmd {
    pub const MAP_CREATE: u32 = 0;
    pub const MAP_LOOKUP_ELEM: u32 = 1;
    pub const MAP_UPDATE_ELEM: u32 = 2;
    pub const MAP_DELETE_ELEM: u32 = 3;
    pub const MAP_GET_NEXT_KEY: u32 = 4;
    pub const PROG_LOAD: u32 = 5;
    pub const OBJ_GET_INFO_BY_FD: u32 = 15;
    pub const RAW_TRACEPOINT_OPEN: u32 = 17;
    pub const BTF_LOAD: u32 = 18;
    pub const MAP_FREEZE: u32 = 22;
    pub const LINK_CREATE: u32 = 28;
    pub const LINK_DETACH: u32 = 34;
    pub const PROG_BIND_MAP: u32 = 35;
}

/// `enum bpf_attach_type` of the links that bpfgate makes.
#[rustfmt::skip]
pub mod attach {
    pub const CGROUP_INET_INGRESS: u32 = 0;
    pub const CGROUP_INET_EGRESS: u32 = 1;
    pub const TRACE_FENTRY: u32 = 24;
    pub const TRACE_FEXIT: u32 = 25;
    pub const XDP: u32 = 37;
    pub const PERF_EVENT: u32 = 41;
    pub const TRACE_KPROBE_MULTI: u32 = 42;
    pub const TCX_INGRESS: u32 = 46;
    pub const TCX_EGRESS: u32 = 47;
    pub const TRACE_UPROBE_MULTI: u32 = 48;
}

/// `BPF_F_UPROBE_MULTI_RETURN`.
pub const UPROBE_MULTI_RETURN: u32 = 1;
/// `BPF_F_KPROBE_MULTI_RETURN`.
pub const KPROBE_MULTI_RETURN: u32 = 1;
/// `XDP_FLAGS_SKB_MODE`, include/uapi/linux/if_link.h.
pub const XDP_SKB_MODE: u32 = 1 << 1;
/// `XDP_FLAGS_DRV_MODE`.
/// `BPF_F_BEFORE`: without a program to be relative to, before all of them.
pub const F_BEFORE: u32 = 1 << 3;
pub const XDP_DRV_MODE: u32 = 1 << 2;

/// `BPF_MAP_CREATE`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct MapCreateAttr {
    pub map_type: u32,
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
    pub map_flags: u32,
    pub inner_map_fd: u32,
    pub numa_node: u32,
    pub map_name: [u8; 16],
    pub map_ifindex: u32,
    pub btf_fd: u32,
    pub btf_key_type_id: u32,
    pub btf_value_type_id: u32,
    pub btf_vmlinux_value_type_id: u32,
    pub map_extra: u64,
    pub value_type_btf_obj_fd: u32,
    pub map_token_fd: u32,
}

/// `BPF_PROG_LOAD`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ProgLoadAttr {
    pub prog_type: u32,
    pub insn_cnt: u32,
    pub insns: u64,
    pub license: u64,
    pub log_level: u32,
    pub log_size: u32,
    pub log_buf: u64,
    pub kern_version: u32,
    pub prog_flags: u32,
    pub prog_name: [u8; 16],
    pub prog_ifindex: u32,
    pub expected_attach_type: u32,
    pub prog_btf_fd: u32,
    pub func_info_rec_size: u32,
    pub func_info: u64,
    pub func_info_cnt: u32,
    pub line_info_rec_size: u32,
    pub line_info: u64,
    pub line_info_cnt: u32,
    pub attach_btf_id: u32,
    pub attach_prog_fd: u32,
    pub core_relo_cnt: u32,
    pub fd_array: u64,
    pub core_relos: u64,
    pub core_relo_rec_size: u32,
    pub log_true_size: u32,
    pub prog_token_fd: u32,
    pub fd_array_cnt: u32,
}

/// `BPF_BTF_LOAD`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct BtfLoadAttr {
    pub btf: u64,
    pub btf_log_buf: u64,
    pub btf_size: u32,
    pub btf_log_size: u32,
    pub btf_log_level: u32,
    pub btf_log_true_size: u32,
    pub btf_flags: u32,
    pub btf_token_fd: u32,
}

/// `BPF_MAP_*_ELEM`, `BPF_MAP_GET_NEXT_KEY` (`value` is `next_key`), `BPF_MAP_FREEZE` (only `map_fd`).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ElemAttr {
    pub map_fd: u32,
    pub pad: u32,
    pub key: u64,
    pub value: u64,
    pub flags: u64,
}

/// `BPF_OBJ_GET_INFO_BY_FD`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct InfoAttr {
    pub bpf_fd: u32,
    pub info_len: u32,
    pub info: u64,
}

/// `struct bpf_map_info`, as far as it is used; the kernel fills no more than it is told.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct MapInfo {
    pub map_type: u32,
    pub id: u32,
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
    pub map_flags: u32,
}

/// `struct bpf_link_info`, as far as it is used. It begins like `bpf_map_info` and `bpf_prog_info`: with type and id.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct LinkInfo {
    pub link_type: u32,
    pub id: u32,
    pub prog_id: u32,
    pub pad: u32,
    /// What it is attached to: `xdp.ifindex` and `tcx.ifindex` in the first half, or `cgroup.cgroup_id`.
    pub target: [u32; 2],
}

/// `enum bpf_link_type`, as far as it is used.
pub mod link_type {
    pub const RAW_TRACEPOINT: u32 = 1;
    pub const TRACING: u32 = 2;
    pub const CGROUP: u32 = 3;
    pub const XDP: u32 = 6;
    pub const PERF_EVENT: u32 = 7;
    pub const KPROBE_MULTI: u32 = 8;
    pub const TCX: u32 = 11;
    pub const UPROBE_MULTI: u32 = 12;
}

/// `BPF_RAW_TRACEPOINT_OPEN`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct RawTracepointAttr {
    pub name: u64,
    pub prog_fd: u32,
    pub pad: u32,
    pub cookie: u64,
}

/// `BPF_LINK_CREATE`; the last fields are those of `uprobe_multi`, which is the longest, and are zero otherwise.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct LinkCreateAttr {
    pub prog_fd: u32,
    /// `target_fd` or `target_ifindex`.
    pub target: u32,
    pub attach_type: u32,
    pub flags: u32,
    pub path: u64,
    pub offsets: u64,
    pub ref_ctr_offsets: u64,
    pub cookies: u64,
    pub cnt: u32,
    pub uprobe_flags: u32,
    pub pid: u32,
    pub pad: u32,
}

/// `BPF_LINK_CREATE` with the fields of `kprobe_multi`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct KprobeLinkAttr {
    pub prog_fd: u32,
    pub target: u32,
    pub attach_type: u32,
    pub flags: u32,
    pub kprobe_flags: u32,
    pub cnt: u32,
    pub syms: u64,
    pub addrs: u64,
    pub cookies: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    /// Against the offsets of the kernel's header (pahole of 6.18's vmlinux).
    #[test]
    fn layouts_are_those_of_the_kernel() {
        assert_eq!((offset_of!(MapCreateAttr, map_ifindex), offset_of!(MapCreateAttr, map_extra)), (44, 64));
        assert_eq!((offset_of!(ProgLoadAttr, prog_name), offset_of!(ProgLoadAttr, func_info)), (48, 80));
        assert_eq!((offset_of!(ProgLoadAttr, fd_array), offset_of!(ProgLoadAttr, fd_array_cnt)), (120, 148));
        assert_eq!((offset_of!(BtfLoadAttr, btf_size), size_of::<BtfLoadAttr>()), (16, 40));
        assert_eq!((offset_of!(KprobeLinkAttr, cnt), offset_of!(KprobeLinkAttr, syms)), (20, 24));
        assert_eq!((offset_of!(LinkCreateAttr, path), offset_of!(LinkCreateAttr, cnt)), (16, 48));
    }
}
