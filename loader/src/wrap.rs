//! libbpf's way to the kernel. The linker sends every `syscall()` here (`--wrap=syscall`): calls that need a
//! capability become requests to the helper, what works without one goes to the kernel, the rest of bpf(2) fails.
//!
//! libbpf keeps using the numbers that it gets back. A map is a real descriptor; a program or BTF is a placeholder of
//! ours, since the real one stays with the helper. [`State::handles`] knows which number stands for which of the
//! helper's objects; libbpf moves them with dup3 only, which comes through here too.
#![allow(unsafe_code)]
// Arguments of system calls are taken as wide as the kernel takes them.
#![allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap, clippy::needless_pass_by_value)]

use bpfgate_bpf::uapi::{BtfLoadAttr, ElemAttr, MapCreateAttr, ProgLoadAttr, cmd};
use bpfgate_protocol::channel::{Channel, ChannelError};
use bpfgate_protocol::inspect::{self, INSN};
use bpfgate_protocol::messages::Bulk;
use bpfgate_protocol::messages::loader::{
    FromLoader, Handle, LogWanted, MapCreate, ProgLoad, Purpose, ToLoader,
};
use bpfgate_protocol::names::FunctionName;
use nix::fcntl::{FcntlArg, fcntl};
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_long, c_ulong};
use std::os::fd::{AsFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};

/// The worker's one channel, and what libbpf holds.
struct State {
    channel: Channel,
    handles: HashMap<RawFd, Handle>,
    /// The programs of this load that are not loaded yet, in the order of the object, which is the order that libbpf
    /// loads them in.
    expected: Vec<Expected>,
    /// Probes that were answered: libbpf repeats one of them for every object.
    probes: Vec<(ProbeKey, i32)>,
}

/// A program that libbpf will ask for.
pub(crate) struct Expected {
    /// Its name, cut to what the kernel takes.
    pub(crate) name: String,
    /// Its place in the plan.
    pub(crate) place: u32,
    /// Functions of the kernel that it calls.
    pub(crate) kfuncs: Vec<FunctionName>,
}

type ProbeKey = (u32, u32, String, Vec<u8>);

thread_local! {
    static STATE: RefCell<Option<State>> = const { RefCell::new(None) };
}

/// Sets the channel of this worker.
pub(crate) fn connect(channel: Channel) {
    let state = State { channel, handles: HashMap::new(), expected: Vec::new(), probes: Vec::new() };
    STATE.with_borrow_mut(|slot| *slot = Some(state));
}

fn with<T>(action: impl FnOnce(&mut State) -> T) -> T {
    STATE.with_borrow_mut(|slot| action(slot.as_mut().expect("connect() came first")))
}

pub(crate) fn receive() -> Result<(ToLoader, Vec<OwnedFd>), ChannelError> {
    with(|state| state.channel.recv())
}

pub(crate) fn send(message: &FromLoader, fd: Option<BorrowedFd<'_>>) -> Result<(), ChannelError> {
    with(|state| state.channel.send(message, fd.as_slice()))
}

/// A load begins: these programs will be asked for, in this order.
pub(crate) fn begin(expected: Vec<Expected>) {
    with(|state| {
        state.handles.clear();
        state.expected = expected;
    });
}

/// The helper's number for a descriptor of libbpf; 0 if there is none.
pub(crate) fn handle(fd: RawFd) -> Handle {
    with(|state| state.handles.get(&fd).copied().unwrap_or(0))
}

unsafe extern "C" {
    fn __real_syscall(number: c_long, ...) -> c_long;
}

/// Takes the place of the C library's `syscall()`.
///
/// # Safety
/// As `syscall(2)`: pointers among the arguments must be what that call expects.
#[unsafe(no_mangle)]
#[rustfmt::skip]
unsafe extern "C" fn __wrap_syscall(
    number: c_long, a1: c_ulong, a2: c_ulong, a3: c_ulong, a4: c_ulong, a5: c_ulong, a6: c_ulong,
) -> c_long {
    if number == libc::SYS_bpf {
        // SAFETY: the caller's promise: a2 points to a3 bytes of `union bpf_attr`, pointers in it are valid.
        return unsafe { bpf(a1 as u32, a2, a3 as usize) };
    }
    // SAFETY: passed on as it came.
    let result = unsafe { __real_syscall(number, a1, a2, a3, a4, a5, a6) };
    if number == libc::SYS_dup3 && result >= 0 {
        let (old, new) = (a1 as RawFd, a2 as RawFd);
        with(|state| {
            if let Some(&handle) = state.handles.get(&old) {
                state.handles.insert(new, handle);
            }
        });
    }
    result
}

/// bpf(2).
///
/// # Safety
/// `attr` points to `size` bytes, and what the command reads through it is valid.
unsafe fn bpf(command: u32, attr: c_ulong, size: usize) -> c_long {
    // SAFETY: the caller's promise, handed on.
    let result = unsafe {
        match command {
            cmd::MAP_CREATE => read_attr(attr, size).and_then(map_create),
            cmd::BTF_LOAD => read_attr(attr, size).and_then(|a| btf_load(&a)),
            cmd::PROG_LOAD => read_attr(attr, size).and_then(|a| prog_load(&a)),
            cmd::MAP_FREEZE => read_attr(attr, size).and_then(map_freeze),
            // Ties .rodata to a program so that it lives as long: the helper holds both anyway.
            cmd::PROG_BIND_MAP => Ok(0),
            cmd::MAP_UPDATE_ELEM => {
                return __real_syscall(libc::SYS_bpf, c_ulong::from(command), attr, size);
            }
            _ => Err(libc::EPERM),
        }
    };
    result.map_or_else(
        |errno| {
            // SAFETY: the C library's errno of this thread.
            unsafe { *libc::__errno_location() = errno };
            -1
        },
        c_long::from,
    )
}

/// Copies a command's arguments. What is longer than we know must be zero, as in the kernel.
///
/// # Safety
/// `attr` points to `size` bytes. `T` is plain data for which every bit pattern is a value (the structs of
/// [`bpfgate_bpf::uapi`]).
unsafe fn read_attr<T: Default>(attr: c_ulong, size: usize) -> Result<T, i32> {
    let mut value = T::default();
    let known = size.min(size_of::<T>());
    // SAFETY: the caller's promise; `known` is within both, and they do not overlap: `value` is ours.
    unsafe {
        std::ptr::copy_nonoverlapping(attr as *const u8, (&raw mut value).cast::<u8>(), known);
        let rest = std::slice::from_raw_parts((attr as *const u8).add(known), size - known);
        if rest.iter().any(|&byte| byte != 0) { Err(libc::E2BIG) } else { Ok(value) }
    }
}

/// Copies `len` bytes that libbpf points to.
///
/// # Safety
/// `pointer` points to `len` bytes, or `len` is 0.
unsafe fn bytes(pointer: u64, len: usize) -> Vec<u8> {
    if len == 0 || pointer == 0 {
        return Vec::new();
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(pointer as *const u8, len) }.to_vec()
}

fn text(name: &[u8; 16]) -> String {
    String::from_utf8_lossy(name.split(|&b| b == 0).next().unwrap_or_default()).into_owned()
}

/// Sends a request and waits for its answer. A helper that is gone ends this process: there is nobody to work for.
fn ask(request: &FromLoader, fd: Option<&OwnedFd>) -> (ToLoader, Vec<OwnedFd>) {
    let fd = fd.map(AsFd::as_fd);
    let answer = send(request, fd).and_then(|()| receive());
    answer.unwrap_or_else(|error| {
        eprintln!("bpfgate-loader: worker: asking the helper: {error}");
        std::process::exit(1)
    })
}

fn map_create(attr: MapCreateAttr) -> Result<RawFd, i32> {
    // An inner map is not passed on: the helper refuses the types that have one, and says so to the client.
    if attr.map_ifindex != 0 || attr.btf_vmlinux_value_type_id != 0 || attr.value_type_btf_obj_fd != 0 {
        return Err(libc::EPERM);
    }
    let name = text(&attr.map_name);
    let request = FromLoader::MapCreate(MapCreate {
        purpose: if name.starts_with("libbpf_") { Purpose::Probe } else { Purpose::Object(0) },
        map_type: attr.map_type,
        key_size: attr.key_size,
        value_size: attr.value_size,
        max_entries: attr.max_entries,
        flags: attr.map_flags,
        extra: attr.map_extra,
        name,
        btf: if attr.btf_fd == 0 { 0 } else { handle(attr.btf_fd as RawFd) },
        btf_ids: (attr.btf_key_type_id, attr.btf_value_type_id),
    });
    match ask(&request, None) {
        (ToLoader::MapCreated { handle }, mut fds) => {
            let fd = fds.pop().ok_or(libc::EPROTO)?.into_raw_fd();
            with(|state| state.handles.insert(fd, handle));
            Ok(fd)
        }
        (ToLoader::Failed { errno, .. }, _) => Err(errno),
        _ => Err(libc::EPROTO),
    }
}

fn map_freeze(attr: ElemAttr) -> Result<RawFd, i32> {
    match ask(&FromLoader::MapFreeze { handle: handle(attr.map_fd as RawFd) }, None) {
        (ToLoader::Kept { .. }, _) => Ok(0),
        (ToLoader::Failed { errno, .. }, _) => Err(errno),
        _ => Err(libc::EPROTO),
    }
}

/// # Safety
/// The pointers of `attr` are valid for their lengths.
unsafe fn btf_load(attr: &BtfLoadAttr) -> Result<RawFd, i32> {
    // SAFETY: the caller's promise.
    let data = unsafe { bytes(attr.btf, attr.btf_size as usize) };
    let (bulk, fd) = Bulk::pack(data).map_err(|_| libc::ENOMEM)?;
    match ask(&FromLoader::BtfLoad { bulk }, fd.as_ref()) {
        (ToLoader::Kept { handle }, _) => placeholder(handle),
        (ToLoader::Failed { errno, .. }, _) => Err(errno),
        _ => Err(libc::EPROTO),
    }
}

/// A number that stands for something the helper holds: a descriptor of /dev/null.
fn placeholder(handle: Handle) -> Result<RawFd, i32> {
    let fd = fcntl(std::io::stdin().as_fd(), FcntlArg::F_DUPFD_CLOEXEC(3)).map_err(|e| e as i32)?;
    with(|state| state.handles.insert(fd, handle));
    Ok(fd)
}

/// # Safety
/// The pointers of `attr` are valid for their lengths.
unsafe fn prog_load(attr: &ProgLoadAttr) -> Result<RawFd, i32> {
    // attach_btf_id is not passed on: the helper has its own.
    if attr.prog_ifindex != 0 || attr.attach_prog_fd != 0 || attr.fd_array != 0 {
        return Err(libc::EPERM);
    }
    let name = text(&attr.prog_name);
    let lengths = [
        attr.insn_cnt as usize * INSN,
        attr.func_info_cnt as usize * attr.func_info_rec_size as usize,
        attr.line_info_cnt as usize * attr.line_info_rec_size as usize,
    ];
    // SAFETY: the caller's promise; the license is a C string.
    let (mut insns, funcs, lines, license) = unsafe {
        (
            bytes(attr.insns, lengths[0]),
            bytes(attr.func_info, lengths[1]),
            bytes(attr.line_info, lengths[2]),
            CStr::from_ptr(attr.license as *const c_char).to_string_lossy().into_owned(),
        )
    };
    let place = with(|state| state.expected.iter().position(|e| e.name == name && !name.is_empty()));
    let (purpose, kfuncs) = place.map_or((Purpose::Probe, Vec::new()), |place| {
        with(|state| (Purpose::Object(state.expected[place].place), state.expected[place].kfuncs.clone()))
    });
    let key = (attr.prog_type, attr.expected_attach_type, name.clone(), insns.clone());
    if purpose == Purpose::Probe
        && let Some(errno) =
            with(|state| state.probes.iter().find(|(k, _)| *k == key).map(|(_, errno)| *errno))
    {
        return if errno == 0 { placeholder(0) } else { Err(errno) };
    }
    name_maps(&mut insns);
    let log = if attr.log_level == 0 { LogWanted::No } else { LogWanted::Yes };
    let part = |i: usize| u32::try_from(lengths[i]).map_err(|_| libc::E2BIG);
    let parts = (part(0)?, part(1)?, part(2)?);
    let has_map = inspect::scan(&insns, |_| Ok(())).is_ok_and(|slots| !slots.is_empty());
    let (bulk, fd) = Bulk::pack([insns, funcs, lines].concat()).map_err(|_| libc::ENOMEM)?;
    let request = FromLoader::ProgLoad(ProgLoad {
        purpose,
        prog_type: attr.prog_type,
        expected_attach_type: attr.expected_attach_type,
        flags: attr.prog_flags,
        name,
        license,
        btf: if attr.prog_btf_fd == 0 { 0 } else { handle(attr.prog_btf_fd as RawFd) },
        kfuncs,
        log,
        record_sizes: (attr.func_info_rec_size, attr.line_info_rec_size),
        parts,
        bulk,
    });
    let (answer, mut fds) = ask(&request, fd.as_ref());
    let result = match answer {
        ToLoader::Kept { handle } => Ok(handle),
        ToLoader::Failed { errno, log } => {
            let log = log.unpack(fds.pop(), attr.log_size as usize).unwrap_or_default();
            // SAFETY: libbpf's buffer has log_size bytes.
            unsafe { write_log(attr, &log) };
            Err(errno)
        }
        _ => Err(libc::EPROTO),
    };
    match (purpose, place) {
        // A probe with a map has its descriptor in the instructions: the next one is another program.
        (Purpose::Probe, _) if !has_map => with(|state| state.probes.push((key, result.err().unwrap_or(0)))),
        (Purpose::Object(_), Some(place)) if result.is_ok() => {
            with(|state| drop(state.expected.remove(place)));
        }
        _ => {}
    }
    result.and_then(placeholder)
}

/// Puts the helper's numbers where libbpf put descriptors of maps.
fn name_maps(insns: &mut [u8]) {
    let slots = inspect::scan(insns, |_| Ok(())).unwrap_or_default();
    for slot in slots {
        let known = handle(slot.handle as RawFd);
        inspect::patch(insns, slot, known.cast_signed());
    }
}

/// # Safety
/// `attr.log_buf` points to `attr.log_size` bytes, or is null.
unsafe fn write_log(attr: &ProgLoadAttr, log: &[u8]) {
    if attr.log_buf == 0 || attr.log_size == 0 {
        return;
    }
    let len = log.len().min(attr.log_size as usize - 1);
    // SAFETY: the caller's promise; `len` and the final NUL are within log_size.
    unsafe {
        std::ptr::copy_nonoverlapping(log.as_ptr(), attr.log_buf as *mut u8, len);
        *(attr.log_buf as *mut u8).add(len) = 0;
    }
}
