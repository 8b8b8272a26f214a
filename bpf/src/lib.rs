//! bpf(2) and the two other calls that nothing wraps, typed: the only unsafe code of the helper. Every function is safe to
//! call with any argument; what a command may do to whom is for its caller to have checked.
#![allow(unsafe_code)]

pub mod uapi;

use bpfgate_protocol::inspect::is_per_cpu;
use bpfgate_protocol::messages::loader::{MapCreate, ProgLoad};
use bpfgate_protocol::names::InterfaceName;
use nix::errno::Errno;
use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use uapi::{
    BtfLoadAttr, ElemAttr, InfoAttr, KprobeLinkAttr, LinkCreateAttr, LinkInfo, MapCreateAttr, MapInfo,
    ProgLoadAttr, RawTracepointAttr, attach, cmd, link_type,
};

fn bpf<T>(command: u32, attr: &mut T) -> Result<i32, Errno> {
    // SAFETY: every caller is in this file and passes the struct of its command, whose pointers go to buffers that
    // outlive the call and are as long as the struct says; the kernel reads and writes nothing else of ours.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    Errno::result(result).map(|value| i32::try_from(value).unwrap_or(-1))
}

/// For commands that make a descriptor. The kernel makes all of them close-on-exec.
fn bpf_fd<T>(command: u32, attr: &mut T) -> Result<OwnedFd, Errno> {
    let fd = bpf(command, attr)?;
    // SAFETY: the command returned a new descriptor, which nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn address<T>(slice: &[T]) -> u64 {
    if slice.is_empty() { 0 } else { slice.as_ptr() as u64 }
}

fn name16(name: &str) -> [u8; 16] {
    let mut bytes = [0; 16];
    let len = name.len().min(15);
    bytes[..len].copy_from_slice(&name.as_bytes()[..len]);
    bytes
}

/// `BPF_MAP_CREATE`.
pub fn map_create(map: &MapCreate, btf: Option<BorrowedFd<'_>>) -> Result<OwnedFd, Errno> {
    let (key_id, value_id) = if btf.is_some() { map.btf_ids } else { (0, 0) };
    let mut attr = MapCreateAttr {
        map_type: map.map_type,
        key_size: map.key_size,
        value_size: map.value_size,
        max_entries: map.max_entries,
        map_flags: map.flags,
        map_name: name16(&map.name),
        btf_fd: btf.map_or(0, number),
        btf_key_type_id: key_id,
        btf_value_type_id: value_id,
        map_extra: map.extra,
        ..Default::default()
    };
    bpf_fd(cmd::MAP_CREATE, &mut attr)
}

/// `BPF_BTF_LOAD`.
pub fn btf_load(btf: &[u8]) -> Result<OwnedFd, Errno> {
    let size = u32::try_from(btf.len()).map_err(|_| Errno::E2BIG)?;
    bpf_fd(cmd::BTF_LOAD, &mut BtfLoadAttr { btf: address(btf), btf_size: size, ..Default::default() })
}

/// `BPF_PROG_LOAD` of checked instructions. `function` is that of the kernel which the program is for, by number, 0 for
/// none; `parts` are instructions, func info and line info; `log` is filled with
/// the verifier's log, as much of its end as fits.
pub fn prog_load(
    load: &ProgLoad,
    function: u32,
    parts: [&[u8]; 3],
    btf: Option<BorrowedFd<'_>>,
    log: Option<&mut [u8]>,
) -> Result<OwnedFd, Errno> {
    let license = CString::new(load.license.as_str()).map_err(|_| Errno::EINVAL)?;
    let count = |bytes: &[u8], size: u32| {
        if bytes.is_empty() { 0 } else { u32::try_from(bytes.len()).unwrap_or(0) / size }
    };
    let mut attr = ProgLoadAttr {
        prog_type: load.prog_type,
        insn_cnt: count(parts[0], 8),
        insns: address(parts[0]),
        license: license.as_ptr() as u64,
        prog_flags: load.flags,
        prog_name: name16(&load.name),
        expected_attach_type: load.expected_attach_type,
        prog_btf_fd: btf.map_or(0, number),
        attach_btf_id: function,
        ..Default::default()
    };
    if btf.is_some() {
        attr.func_info_rec_size = load.record_sizes.0;
        attr.func_info = address(parts[1]);
        attr.func_info_cnt = count(parts[1], load.record_sizes.0);
        attr.line_info_rec_size = load.record_sizes.1;
        attr.line_info = address(parts[2]);
        attr.line_info_cnt = count(parts[2], load.record_sizes.1);
    }
    if let Some(log) = log {
        attr.log_level = 1;
        attr.log_size = u32::try_from(log.len()).map_err(|_| Errno::E2BIG)?;
        attr.log_buf = log.as_mut_ptr() as u64;
    }
    // The verifier gives up with EAGAIN when a signal is pending.
    let mut tries = 5;
    loop {
        match bpf_fd(cmd::PROG_LOAD, &mut attr) {
            Err(Errno::EAGAIN) if tries > 0 => tries -= 1,
            result => return result,
        }
    }
}

/// `BPF_MAP_FREEZE`.
pub fn map_freeze(map: BorrowedFd<'_>) -> Result<(), Errno> {
    bpf(cmd::MAP_FREEZE, &mut ElemAttr { map_fd: number(map), ..Default::default() }).map(drop)
}

/// `BPF_OBJ_GET_INFO_BY_FD`. `T` is one of the plain structs of [`uapi`]; the kernel writes no more than its size.
fn info<T: Default>(fd: BorrowedFd<'_>) -> Result<T, Errno> {
    let mut info = T::default();
    let info_len = u32::try_from(size_of::<T>()).map_err(|_| Errno::E2BIG)?;
    let mut attr = InfoAttr { bpf_fd: number(fd), info_len, info: (&raw mut info) as u64 };
    bpf(cmd::OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(info)
}

/// What the kernel says of a map, program or link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Description {
    /// `enum bpf_map_type`, `bpf_prog_type` or `bpf_link_type`.
    pub kind: u32,
    /// Its number. Numbers of one kind are not used again while the machine runs.
    pub id: u32,
    /// Of a link: the number of its program.
    pub program: u32,
    /// Of a link to an interface: the index of that; 0 when it is gone.
    pub interface: u32,
    /// Of a link: whether what it was attached to is still there. The kernel detaches links of an interface or a cgroup
    /// that goes away, and leaves them to their holders.
    pub attached: bool,
}

/// Asks the kernel what is behind a descriptor of bpf(2). Whether that is a map, a program or a link, it does not say.
pub fn describe(fd: BorrowedFd<'_>) -> Result<Description, Errno> {
    let info: LinkInfo = info(fd)?;
    Ok(Description {
        kind: info.link_type,
        id: info.id,
        program: info.prog_id,
        interface: info.target[0],
        attached: match info.link_type {
            link_type::XDP | link_type::TCX => info.target[0] != 0,
            link_type::CGROUP => info.target != [0, 0],
            _ => true,
        },
    })
}

/// Asks whether bpf(2) is there at all: info of a descriptor that does not exist is EBADF or
/// EBADFD, by kernel version.
pub fn probe() -> Errno {
    bpf(cmd::OBJ_GET_INFO_BY_FD, &mut InfoAttr { bpf_fd: u32::MAX >> 1, ..Default::default() })
        .err()
        .unwrap_or(Errno::UnknownErrno)
}

/// How many CPUs per-CPU maps have values for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PossibleCpus(u32);

impl PossibleCpus {
    /// Reads the number from /sys; there is no other source for it, and only root could fake it.
    pub fn read() -> std::io::Result<Self> {
        let text = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
        let last = text.trim().rsplit(['-', ',']).next().and_then(|n| n.parse::<u32>().ok());
        last.map(|last| Self(last + 1))
            .ok_or_else(|| std::io::Error::other("the possible CPUs are no list of numbers"))
    }

    /// The number.
    pub fn get(self) -> u32 {
        self.0
    }
}

/// A map to be read. The kernel takes the lengths of keys and values from the map, not from its caller, so they are
/// asked for here, of the same descriptor.
#[derive(Debug)]
pub struct Map<'a> {
    fd: BorrowedFd<'a>,
    info: MapInfo,
    cpus: PossibleCpus,
}

impl<'a> Map<'a> {
    /// What the kernel says of the map behind `fd`.
    pub fn of(fd: BorrowedFd<'a>, cpus: PossibleCpus) -> Result<Self, Errno> {
        Ok(Self { fd, info: info(fd)?, cpus })
    }

    /// What the kernel said.
    pub fn info(&self) -> &MapInfo {
        &self.info
    }

    /// Bytes of a key.
    pub fn key_bytes(&self) -> usize {
        self.info.key_size as usize
    }

    /// Bytes of a value: for a per-CPU map one, rounded up to 8, for each possible CPU.
    pub fn value_bytes(&self) -> usize {
        let size = self.info.value_size as usize;
        if is_per_cpu(self.info.map_type) {
            size.next_multiple_of(8).saturating_mul(self.cpus.get() as usize)
        } else {
            // The smallest value that the kernel writes is a descriptor or id of 4 bytes.
            size.max(4)
        }
    }

    /// `BPF_MAP_GET_NEXT_KEY`: the key after `key`; the first one if `key` is empty.
    pub fn next_key(&self, key: &[u8]) -> Result<Option<Vec<u8>>, Errno> {
        if !key.is_empty() && key.len() != self.key_bytes() {
            return Err(Errno::EINVAL);
        }
        let mut next = vec![0; self.key_bytes()];
        let value = next.as_mut_ptr() as u64;
        let mut attr = ElemAttr { map_fd: number(self.fd), key: address(key), value, ..Default::default() };
        found(bpf(cmd::MAP_GET_NEXT_KEY, &mut attr), next)
    }

    /// `BPF_MAP_LOOKUP_ELEM`.
    pub fn lookup(&self, key: &[u8]) -> Result<Option<Vec<u8>>, Errno> {
        if key.len() != self.key_bytes() {
            return Err(Errno::EINVAL);
        }
        let mut bytes = vec![0; self.value_bytes()];
        let value = bytes.as_mut_ptr() as u64;
        let mut attr = ElemAttr { map_fd: number(self.fd), key: address(key), value, ..Default::default() };
        found(bpf(cmd::MAP_LOOKUP_ELEM, &mut attr), bytes)
    }
}

fn found(result: Result<i32, Errno>, bytes: Vec<u8>) -> Result<Option<Vec<u8>>, Errno> {
    match result {
        Ok(_) => Ok(Some(bytes)),
        Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// `BPF_LINK_CREATE` for a target that is a descriptor or an interface index.
pub fn link_create(
    program: BorrowedFd<'_>,
    target: u32,
    attach_type: u32,
    flags: u32,
) -> Result<OwnedFd, Errno> {
    let mut attr =
        LinkCreateAttr { prog_fd: number(program), target, attach_type, flags, ..Default::default() };
    bpf_fd(cmd::LINK_CREATE, &mut attr)
}

/// `BPF_LINK_CREATE` for functions of a binary, given by its path and their file offsets.
pub fn uprobe_link(
    program: BorrowedFd<'_>,
    path: &CStr,
    offsets: &[u64],
    flags: u32,
) -> Result<OwnedFd, Errno> {
    let mut attr = LinkCreateAttr {
        prog_fd: number(program),
        attach_type: attach::TRACE_UPROBE_MULTI,
        path: path.as_ptr() as u64,
        offsets: address(offsets),
        cnt: u32::try_from(offsets.len()).map_err(|_| Errno::E2BIG)?,
        uprobe_flags: flags,
        ..Default::default()
    };
    bpf_fd(cmd::LINK_CREATE, &mut attr)
}

/// `BPF_LINK_CREATE` for functions of the kernel, by name.
pub fn kprobe_link(program: BorrowedFd<'_>, functions: &[&CStr], flags: u32) -> Result<OwnedFd, Errno> {
    let names: Vec<u64> = functions.iter().map(|name| name.as_ptr() as u64).collect();
    let mut attr = KprobeLinkAttr {
        prog_fd: number(program),
        attach_type: attach::TRACE_KPROBE_MULTI,
        kprobe_flags: flags,
        cnt: u32::try_from(names.len()).map_err(|_| Errno::E2BIG)?,
        syms: address(&names),
        ..Default::default()
    };
    bpf_fd(cmd::LINK_CREATE, &mut attr)
}

/// `BPF_RAW_TRACEPOINT_OPEN`.
pub fn raw_tracepoint(program: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    let mut attr =
        RawTracepointAttr { name: name.as_ptr() as u64, prog_fd: number(program), ..Default::default() };
    bpf_fd(cmd::RAW_TRACEPOINT_OPEN, &mut attr)
}

/// `BPF_LINK_DETACH`: the link has no effect any more, whoever holds it. Tracing links do not know it.
pub fn link_detach(link: BorrowedFd<'_>) -> Result<(), Errno> {
    // The struct is longer than the command's; the rest is zero, as it must be.
    bpf(cmd::LINK_DETACH, &mut ElemAttr { map_fd: number(link), ..Default::default() }).map(drop)
}

/// A perf event for tracepoint `id`: what a program is attached to. It is not switched on: the program runs all the
/// same, and nothing else does.
pub fn tracepoint_event(id: u64) -> Result<OwnedFd, Errno> {
    /// The first version of `struct perf_event_attr`, `PERF_ATTR_SIZE_VER0`. Source: include/uapi/linux/perf_event.h.
    #[repr(C)]
    #[derive(Default)]
    struct PerfAttr {
        kind: u32,
        size: u32,
        config: u64,
        sample_period: u64,
        sample_type: u64,
        read_format: u64,
        flags: u64,
        wakeup_events: u32,
        bp_type: u32,
        bp_addr: u64,
    }
    const TYPE_TRACEPOINT: u32 = 2;
    const DISABLED: u64 = 1;
    const CLOEXEC: u64 = 1 << 3;
    let size = u32::try_from(size_of::<PerfAttr>()).unwrap_or(0);
    let attr = PerfAttr {
        kind: TYPE_TRACEPOINT,
        size,
        config: id,
        sample_period: 1,
        flags: DISABLED,
        ..Default::default()
    };
    // Every process (-1), on CPU 0: the program runs wherever the event happens.
    // SAFETY: the kernel reads `attr`, whose size it is told, and touches no other memory.
    let fd = unsafe { libc::syscall(libc::SYS_perf_event_open, &raw const attr, -1, 0, -1, CLOEXEC) };
    let fd = Errno::result(fd)?;
    // SAFETY: a new descriptor, which nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).map_err(|_| Errno::EBADF)?) })
}

/// The index of an interface in the network namespace that `socket` was made in.
pub fn interface_index(socket: BorrowedFd<'_>, name: &InterfaceName) -> Result<u32, Errno> {
    // SAFETY: ifreq is plain data for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.as_str().bytes()) {
        *to = from.cast_signed();
    }
    // SAFETY: the kernel reads and writes one ifreq; a name has at most 15 bytes, so it ends with a NUL.
    Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFINDEX, &raw mut request) })?;
    // SAFETY: SIOCGIFINDEX has set this member.
    Ok(unsafe { request.ifr_ifru.ifru_ifindex }.cast_unsigned())
}
