//! Every unsafe block of the harness: bpf(2) as root's tools use it, identities of threads, descriptors of children.
#![allow(
    unsafe_code,
    reason = "bpf(2), per-thread credentials, mount(2), ptrace(2), pre_exec and system calls by number have no safe wrapper"
)]

use bpfgate_lockdown::syscalls::Filters;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::ForkResult;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// `union bpf_attr`, as far as the commands here use it; the rest is zero.
type Attr = [u64; 16];

const MAP_CREATE: u32 = 0;
const PROG_LOAD: u32 = 5;
const OBJ_PIN: u32 = 6;
const OBJ_GET: u32 = 7;
const OBJ_GET_INFO_BY_FD: u32 = 15;
const BTF_LOAD: u32 = 18;

/// Makes a bpf(2) call.
///
/// # Safety
/// Whatever `attr` points to for this command is alive and as long as it says.
unsafe fn bpf(command: u32, attr: &mut Attr) -> io::Result<i32> {
    // SAFETY: the kernel reads and writes `attr` within its size; the caller answers for what is behind it.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), size_of::<Attr>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { i32::try_from(result).map_err(io::Error::other) }
}

/// The smallest id above `after` of a `BPF_*_GET_NEXT_ID` command; `None` at the end.
pub fn next_id(command: u32, after: u32) -> Option<u32> {
    // struct { u32 start_id; u32 next_id; u32 open_flags; } needs the rest to be zero, and is 12 bytes long.
    let mut attr: Attr = [0; 16];
    attr[0] = u64::from(after);
    // SAFETY: these commands hold no address.
    match unsafe { bpf(command, &mut attr) } {
        Ok(_) => u32::try_from(attr[0] >> 32).ok(),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => None,
        Err(error) => panic!("the census needs root: {error}"),
    }
}

/// `OBJ_GET_INFO_BY_FD` of the program or map with this id, got by `command`: the first words of its information.
pub fn info(command: u32, id: u32) -> Option<[u32; 64]> {
    let mut attr: Attr = [0; 16];
    attr[0] = u64::from(id);
    // SAFETY: these commands hold no address.
    let fd = unsafe { bpf(command, &mut attr) }.ok()?;
    // SAFETY: a new descriptor, which nobody else knows.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut info = [0u32; 64];
    let mut attr: Attr = [0; 16];
    attr[0] = number(fd.as_fd()) | (size_of_val(&info) as u64) << 32;
    attr[1] = info.as_mut_ptr() as u64;
    // SAFETY: `info` has as many bytes as the attributes say; all addresses in it are zero, so none is followed.
    unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut attr) }.ok()?;
    Some(info)
}

fn number(fd: BorrowedFd<'_>) -> u64 {
    u64::from(fd.as_raw_fd().cast_unsigned())
}

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).expect("a path of a test has no zero byte")
}

/// `BPF_OBJ_PIN`.
pub fn pin(fd: &impl AsFd, path: &Path) -> io::Result<()> {
    let path = c_path(path);
    let mut attr: Attr = [0; 16];
    (attr[0], attr[1]) = (path.as_ptr() as u64, number(fd.as_fd()));
    // SAFETY: the path is a C string that outlives the call.
    unsafe { bpf(OBJ_PIN, &mut attr) }.map(drop)
}

/// `BPF_OBJ_GET`, for reading and writing.
pub fn pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path);
    let mut attr: Attr = [0; 16];
    attr[0] = path.as_ptr() as u64;
    // SAFETY: the path is a C string that outlives the call.
    let fd = unsafe { bpf(OBJ_GET, &mut attr) }?;
    // SAFETY: a new descriptor, which nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Loads the smallest socket filter there is: what a process without privilege must not be able to do.
pub fn load_filter() -> io::Result<OwnedFd> {
    // r0 = 0; exit
    let program: [u64; 2] = [0xb7, 0x95];
    let license = c"GPL";
    let mut attr: Attr = [0; 16];
    attr[0] = 1 | 2 << 32; // BPF_PROG_TYPE_SOCKET_FILTER, two instructions
    (attr[1], attr[2]) = (program.as_ptr() as u64, license.as_ptr() as u64);
    // SAFETY: two instructions and a C string, both alive.
    let fd = unsafe { bpf(PROG_LOAD, &mut attr) }?;
    // SAFETY: a new descriptor, which nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What `BPF_PROG_LOAD` is asked for. Instructions: `r0 = result; exit`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Load {
    /// `enum bpf_prog_type`
    pub prog_type: u32,
    /// `enum bpf_attach_type`
    pub attach_type: u32,
    /// `BPF_F_*` of programs.
    pub flags: u32,
    /// What the program returns.
    pub result: u32,
    /// The type of the kernel's BTF that it is attached to.
    pub btf_id: u32,
}

/// Loads a program, and lets go of it.
pub fn load(load: Load) -> io::Result<()> {
    let program: [u64; 2] = [0xb7 | u64::from(load.result) << 32, 0x95];
    let license = c"GPL";
    let mut attr: Attr = [0; 16];
    attr[0] = u64::from(load.prog_type) | 2 << 32;
    (attr[1], attr[2]) = (program.as_ptr() as u64, license.as_ptr() as u64);
    attr[5] = u64::from(load.flags) << 32;
    attr[8] = u64::from(load.attach_type) << 32;
    attr[13] = u64::from(load.btf_id) << 32;
    // SAFETY: two instructions and a C string, both alive.
    let fd = unsafe { bpf(PROG_LOAD, &mut attr) }?;
    // SAFETY: a new descriptor, which nobody else knows.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    Ok(())
}

/// What `BPF_MAP_CREATE` is asked for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Create<'a> {
    /// `enum bpf_map_type`
    pub map_type: u32,
    /// Bytes of a key and of a value, and the number of entries.
    pub sizes: (u32, u32, u32),
    /// `BPF_F_*` of maps.
    pub flags: u32,
    /// The map that a map of maps is made like.
    pub inner: Option<BorrowedFd<'a>>,
    /// A BTF whose type 1 is that of key and value.
    pub btf: Option<BorrowedFd<'a>>,
    /// The type of the kernel's BTF that the value is of.
    pub value_type: u32,
}

/// `BPF_MAP_CREATE`.
pub fn create(create: Create<'_>) -> io::Result<OwnedFd> {
    let (key, value, entries) = create.sizes;
    let mut attr: Attr = [0; 16];
    attr[0] = u64::from(create.map_type) | u64::from(key) << 32;
    attr[1] = u64::from(value) | u64::from(entries) << 32;
    attr[2] = u64::from(create.flags) | create.inner.map_or(0, number) << 32;
    if let Some(btf) = create.btf {
        attr[6] = number(btf) | 1 << 32;
        attr[7] = 1;
    }
    attr[7] |= u64::from(create.value_type) << 32;
    // SAFETY: this command is given no address.
    let fd = unsafe { bpf(MAP_CREATE, &mut attr) }?;
    // SAFETY: a new descriptor, which nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A BTF with one type, an int of 32 bits.
pub fn btf_of_int() -> io::Result<OwnedFd> {
    // Header: magic and version, length 24, types at 0 of 16 bytes, strings at 16 of 5 bytes; then BTF_KIND_INT.
    // Source: Documentation/bpf/btf.rst.
    let words: [u32; 10] = [0x0001_eb9f, 24, 0, 16, 16, 5, 1, 1 << 24, 4, 32];
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.extend(b"\0int\0");
    let mut attr: Attr = [0; 16];
    (attr[0], attr[2]) = (bytes.as_ptr() as u64, bytes.len() as u64);
    // SAFETY: the bytes are alive, and as many as the attributes say.
    let fd = unsafe { bpf(BTF_LOAD, &mut attr) }?;
    // SAFETY: a new descriptor, which nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The number of a type of the kernel's BTF and its size, by name and `BTF_KIND_*`; none if there is no such type.
pub fn kernel_type(name: &str, kind: u32) -> Option<(u32, u32)> {
    use libbpf_rs::libbpf_sys as sys;
    let name = CString::new(name).ok()?;
    // SAFETY: the BTF is looked at between its load and its release; the name is a C string.
    unsafe {
        let btf = sys::btf__load_vmlinux_btf();
        if btf.is_null() {
            return None;
        }
        let id = sys::btf__find_by_name_kind(btf, name.as_ptr(), kind);
        let id = u32::try_from(id).ok();
        let size = id.map(|id| u32::try_from(sys::btf__resolve_size(btf, id)).unwrap_or(0));
        sys::btf__free(btf);
        Some((id?, size?))
    }
}

/// `SO_ATTACH_BPF`: the program looks at what this socket receives.
pub fn attach_filter(socket: &impl AsFd, program: &impl AsFd) -> io::Result<()> {
    const SO_ATTACH_BPF: libc::c_int = 50; // include/uapi/asm-generic/socket.h
    let fd = program.as_fd().as_raw_fd();
    // SAFETY: the kernel reads one int, whose size it is told.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_ATTACH_BPF,
            (&raw const fd).cast(),
            libc::socklen_t::try_from(size_of_val(&fd)).map_err(io::Error::other)?,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes this thread, and no other, somebody else for good. Its capabilities go with uid 0.
///
/// The C library would change all threads; the kernel has credentials per thread.
pub fn become_user(uid: u32, gid: u32, groups: &[u32]) -> io::Result<()> {
    let check = |result: libc::c_long| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: `groups` has that many elements; the other two calls take numbers only. A thread's credentials are not
    // relied on by other threads, and the C library keeps no copy of them.
    unsafe {
        check(libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()))?;
        check(libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
        check(libc::syscall(libc::SYS_setresuid, uid, uid, uid))
    }
}

/// Drops a capability from this thread's bounding set, by number.
pub fn drop_bounding(capability: u32) -> io::Result<()> {
    // SAFETY: prctl takes numbers only here, and changes nothing but the set.
    let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability), 0, 0, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Mounts a bpf file system that everybody may write, seen by this mount namespace only.
pub fn mount_bpffs(directory: &Path) -> io::Result<()> {
    let (target, root) = (c_path(directory), c"/");
    let (kind, options) = (c"bpf", c"mode=1777");
    let private = libc::MS_REC | libc::MS_PRIVATE;
    // SAFETY: all strings are C strings that outlive the calls.
    unsafe {
        if libc::mount(std::ptr::null(), root.as_ptr(), std::ptr::null(), private, std::ptr::null()) != 0
            || libc::mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, options.as_ptr().cast()) != 0
        {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Gives the child `fd` as its descriptor 3. `fd` has to live until the child is started.
pub fn as_descriptor_3(command: &mut Command, fd: BorrowedFd<'_>) {
    let fd = fd.as_raw_fd();
    // SAFETY: between fork and exec only these two calls are made, which are async-signal-safe and touch no memory.
    unsafe {
        command.pre_exec(move || {
            let result = if fd == 3 { libc::fcntl(3, libc::F_SETFD, 0) } else { libc::dup2(fd, 3) };
            if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        });
    }
}

/// Makes a system call by its number, with arguments that may be anything; gives its errno, or 0.
///
/// # Safety
/// It is made in a process that has nothing to lose: whatever the call does is done to that process.
unsafe fn raw_call(number: i64, [a, b, c, d, e, f]: [u64; 6]) -> i32 {
    // SAFETY: the caller answers for it.
    match unsafe { libc::syscall(number, a, b, c, d, e, f) } {
        0.. => 0,
        _ => nix::errno::Errno::last_raw(),
    }
}

/// Makes a system call the way 32-bit programs do, with zeros as its arguments.
fn call_32(number: u32) -> i32 {
    let result: i64;
    // SAFETY: the kernel takes 32-bit registers as arguments, all of them zero: none is an address. It may clear r8 to
    // r11. rbx belongs to the compiler and is put back.
    unsafe {
        std::arch::asm!(
            "push rbx", "xor ebx, ebx", "int 0x80", "pop rbx",
            inlateout("rax") i64::from(number) => result,
            in("ecx") 0, in("edx") 0, in("esi") 0, in("edi") 0,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    i32::from(result < 0)
}

/// A system call that a child of the test makes.
#[derive(Debug, Clone, Copy)]
pub enum Call {
    /// By number and arguments.
    Plain(i64, [u64; 6]),
    /// As 32-bit programs do, without arguments.
    By32Bit(u32),
}

/// What becomes of a child that makes this call under these filters: it ends with the errno of the call, or 0.
pub fn call_in_child(filters: &[Filters], call: Call) -> WaitStatus {
    // SAFETY: the child makes system calls and ends; it takes no lock and allocates nothing.
    let child = match unsafe { nix::unistd::fork() }.expect("fork") {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            // No core files; and a call that should not have been made waits for nothing.
            let prepared = nix::sys::prctl::set_dumpable(false).is_ok();
            nix::unistd::alarm::set(20);
            let prepared = prepared && filters.iter().all(|filters| filters.install().is_ok());
            let status = match call {
                _ if !prepared => 255,
                // SAFETY: this process has nothing to lose, and nothing of it is used after the call but its result.
                Call::Plain(number, arguments) => unsafe { raw_call(number, arguments) },
                Call::By32Bit(number) => call_32(number),
            };
            // SAFETY: _exit has no preconditions.
            unsafe { libc::_exit(status) }
        }
    };
    waitpid(child, None).expect("it is a child of the test")
}

/// The errno of a command of bpf(2) without attributes, by the number that this kind of program uses for bpf(2).
pub fn bpf_command(number: i64, command: u32) -> i32 {
    // SAFETY: attributes of 0 bytes hold no address.
    unsafe { raw_call(number, [command.into(), 0, 0, 0, 0, 0]) }
}

/// The seccomp filters of a running process, the oldest first: for each instruction its code, where it jumps and its
/// operand. None before the kernel has `CONFIG_CHECKPOINT_RESTORE`.
pub fn filters_of(pid: i32) -> io::Result<Vec<Vec<Instruction>>> {
    const PTRACE_SECCOMP_GET_FILTER: libc::c_uint = 0x420c; // include/uapi/linux/ptrace.h
    let check = |result: libc::c_long| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) };
    let none = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: no memory of this process is given away.
    check(unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, none, none) })?;
    // SAFETY: as above.
    let stopped = check(unsafe { libc::ptrace(libc::PTRACE_INTERRUPT, pid, none, none) });
    let mut all = Vec::new();
    let looked = stopped.and_then(|_| {
        waitpid(nix::unistd::Pid::from_raw(pid), Some(WaitPidFlag::__WALL))?;
        for index in 0..64_usize {
            let at = std::ptr::without_provenance_mut::<libc::c_void>(index);
            // SAFETY: without a buffer the kernel gives the number of instructions.
            let count = unsafe { libc::ptrace(PTRACE_SECCOMP_GET_FILTER, pid, at, none) };
            let Ok(count) = check(count) else { break };
            let mut program = vec![[0_u64; 1]; usize::try_from(count).map_err(io::Error::other)?];
            // SAFETY: the buffer has eight bytes for each of the instructions, whose number cannot change.
            check(unsafe { libc::ptrace(PTRACE_SECCOMP_GET_FILTER, pid, at, program.as_mut_ptr()) })?;
            all.push(program.into_iter().map(|[bits]| Instruction::of(bits)).collect());
        }
        Ok(())
    });
    // SAFETY: as above.
    check(unsafe { libc::ptrace(libc::PTRACE_DETACH, pid, none, none) })?;
    looked.map(|()| all)
}

/// An instruction of a filter (`struct sock_filter`; include/uapi/linux/filter.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    /// What it does.
    pub code: u16,
    /// How many instructions are left out if it holds.
    pub jt: u8,
    /// And if not.
    pub jf: u8,
    /// Its operand.
    pub k: u32,
}

impl Instruction {
    /// From its eight bytes.
    fn of(bits: u64) -> Self {
        let [a, b, jt, jf, rest @ ..] = bits.to_ne_bytes();
        Self { code: u16::from_ne_bytes([a, b]), jt, jf, k: u32::from_ne_bytes(rest) }
    }
}

/// The function that uprobes of the tests are attached to.
// SAFETY: no other function of this name is linked into a test.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn bpfgate_test_target(value: u64) -> u64 {
    std::hint::black_box(value).wrapping_mul(2)
}
