//! fork(2), and what the child does until its execve(2).
//!
//! Not `std::process::Command`: `LISTEN_PID` is the child's own id, which only the child knows, and
//! `Command` has no place to put it into the environment.

use std::ffi::{CString, c_char, c_int};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{Pid, pipe2};
use seccompiler::BpfProgram;

use super::check;

/// The first inherited descriptor, by `sd_listen_fds(3)`.
const FIRST_FD: RawFd = 3;
const LISTEN_PID: &[u8] = b"LISTEN_PID=";
/// A process id has at most 7 digits (`PID_MAX_LIMIT` is 4 Mi); with the final zero and to spare.
const PID_ROOM: usize = 12;

/// Everything the child needs, made before the fork: after it nothing may be allocated.
pub(crate) struct Image<'a> {
    pub(crate) argv: Vec<CString>,
    /// The environment without `LISTEN_PID`, which the child adds.
    pub(crate) environment: Vec<CString>,
    /// Become descriptors 3, 4, ... of the child.
    pub(crate) fds: Vec<BorrowedFd<'a>>,
    pub(crate) filter: BpfProgram,
}

/// The addresses the child works with.
struct Prepared {
    argv: Vec<*const c_char>,
    environment: Vec<*const c_char>,
    listen_pid: Vec<u8>,
    fds: Vec<OwnedFd>,
    report: OwnedFd,
    parent: Pid,
}

/// Starts the program; an error of the child before its execve(2) is returned here.
pub(crate) fn spawn(image: &Image<'_>) -> io::Result<Pid> {
    if image.argv.is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no program to start"));
    }
    let (reading, writing) = pipe2(OFlag::O_CLOEXEC)?;
    let mut prepared = prepare(image, &writing)?;
    drop(writing);
    // SAFETY: the child calls `child` at once, which only makes async-signal-safe calls on memory
    // made above, and never returns.
    let pid = check(i64::from(unsafe { libc::fork() }))?;
    if pid == 0 {
        child(image, &mut prepared);
    }
    drop(prepared);
    let pid = Pid::from_raw(c_int::try_from(pid).map_err(io::Error::other)?);
    let mut report = Vec::new();
    std::fs::File::from(reading).read_to_end(&mut report)?;
    match <[u8; 5]>::try_from(report.as_slice()) {
        Err(_) => Ok(pid),
        Ok([stage, errno @ ..]) => {
            let _ = nix::sys::wait::waitpid(pid, None);
            let error = io::Error::from_raw_os_error(c_int::from_ne_bytes(errno));
            Err(io::Error::new(error.kind(), format!("{}: {error}", stage_name(stage))))
        }
    }
}

fn prepare(image: &Image<'_>, report: &OwnedFd) -> io::Result<Prepared> {
    let count = RawFd::try_from(image.fds.len()).map_err(io::Error::other)?;
    // Above the range that the child fills, so that no dup2 there hits a source.
    let above = |fd: BorrowedFd<'_>| -> io::Result<OwnedFd> {
        let raw = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(FIRST_FD + count))?;
        // SAFETY: F_DUPFD_CLOEXEC made this descriptor for us.
        Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(raw) })
    };
    let fds = image.fds.iter().map(|fd| above(*fd)).collect::<io::Result<Vec<_>>>()?;
    let report = above(std::os::fd::AsFd::as_fd(report))?;
    let mut listen_pid = LISTEN_PID.to_vec();
    listen_pid.resize(LISTEN_PID.len() + PID_ROOM, 0);
    let mut environment: Vec<_> = image.environment.iter().map(|text| text.as_ptr()).collect();
    // The place of LISTEN_PID, and the end.
    environment.extend([std::ptr::null(); 2]);
    let mut argv: Vec<_> = image.argv.iter().map(|text| text.as_ptr()).collect();
    argv.push(std::ptr::null());
    Ok(Prepared { argv, environment, listen_pid, fds, report, parent: nix::unistd::getpid() })
}

const STAGES: [&str; 4] =
    ["the process that starts it ended", "its signals", "its descriptors", "its seccomp filter"];

fn stage_name(stage: u8) -> &'static str {
    STAGES.get(usize::from(stage)).copied().unwrap_or("the program cannot be started")
}

/// The child's life. It makes system calls and nothing else: no allocation, no lock, no panic.
fn child(image: &Image<'_>, prepared: &mut Prepared) -> ! {
    let (stage, errno) = become_program(image, prepared);
    let mut report = [stage, 0, 0, 0, 0];
    report[1..].copy_from_slice(&errno.to_ne_bytes());
    // SAFETY: `report` is alive and has the stated length; _exit runs no destructor of the
    // parent's objects.
    unsafe {
        let _ = libc::write(prepared.report.as_raw_fd(), report.as_ptr().cast(), report.len());
        libc::_exit(127)
    }
}

/// Returns only on failure: the stage and its errno.
fn become_program(image: &Image<'_>, prepared: &mut Prepared) -> (u8, c_int) {
    // The session ends with its parent, so the program shall not outlive it unnoticed.
    let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGTERM);
    if nix::unistd::getppid() != prepared.parent {
        return (0, libc::ESRCH);
    }
    if let Err(errno) = SigSet::empty().thread_set_mask() {
        return (1, errno as c_int);
    }
    // SAFETY: SIG_DFL is no handler; Rust's start-up had set SIGPIPE to ignored, which execve keeps.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    for (target, fd) in (FIRST_FD..).zip(&prepared.fds) {
        // SAFETY: dup2 on numbers; `target` lies below every descriptor of `prepared`, so it
        // closes none of them. What it does close belongs to a copy of the parent's table.
        if unsafe { libc::dup2(fd.as_raw_fd(), target) } < 0 {
            return (2, last_errno());
        }
    }
    write_pid(&mut prepared.listen_pid);
    if let Some(place) = prepared.environment.get_mut(image.environment.len()) {
        *place = prepared.listen_pid.as_ptr().cast();
    }
    // Sets NO_NEW_PRIVS first.
    if seccompiler::apply_filter(&image.filter).is_err() {
        return (3, last_errno());
    }
    // SAFETY: argv, which is not empty, and environment are null-terminated arrays of C strings
    // that `image` and `prepared` keep alive; listen_pid ends with zeros behind its digits.
    unsafe {
        libc::execvpe(prepared.argv[0], prepared.argv.as_ptr(), prepared.environment.as_ptr());
    }
    (u8::MAX, last_errno())
}

fn last_errno() -> c_int {
    nix::errno::Errno::last_raw()
}

/// Writes this process's id as digits behind `LISTEN_PID=`.
fn write_pid(text: &mut [u8]) {
    let mut digits = [0u8; PID_ROOM];
    let mut rest = nix::unistd::getpid().as_raw().unsigned_abs();
    let mut length = 0;
    while rest > 0 && length < PID_ROOM - 1 {
        digits[length] = b'0' + u8::try_from(rest % 10).unwrap_or(0);
        rest /= 10;
        length += 1;
    }
    for (place, digit) in text.iter_mut().skip(LISTEN_PID.len()).zip(digits[..length].iter().rev()) {
        *place = *digit;
    }
}
