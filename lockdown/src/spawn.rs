//! Starting a child with a clean environment: no descriptor, variable or signal setting that it was not given.

use crate::process::{SingleThread, close_from, exit_now, fork};
use crate::{Fatal, Step};
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::Mode;
use nix::unistd::{ForkResult, Pid, dup2_stderr, dup2_stdin, dup2_stdout, fexecve};
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;

/// The first descriptor that a child is given; the others follow.
pub const FIRST_FD: RawFd = 3;

/// Opens a program of ours, to be started by [`program`] from wherever the child's user could not reach it.
pub fn open_program(path: &Path) -> Result<OwnedFd, Fatal> {
    open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).step(&format!("opening {}", path.display()))
}

/// Forks and executes `exe`. The child has /dev/null as standard input and output, our standard error, `fds` as
/// 3, 4, ..., no environment, and has run `prepare`.
pub fn program(
    alone: SingleThread,
    exe: BorrowedFd<'_>,
    argv: &[CString],
    fds: &[BorrowedFd<'_>],
    prepare: impl FnOnce() -> Result<(), Fatal>,
) -> Result<Pid, Fatal> {
    match fork(alone)? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            let Err(fatal) = become_program(exe, argv, fds, prepare);
            eprintln!("bpfgate: starting a child: {fatal}");
            exit_now(127)
        }
    }
}

/// Forks; the child runs `main` and ends with its result.
pub fn function(alone: SingleThread, main: impl FnOnce() -> i32) -> Result<Pid, Fatal> {
    match fork(alone)? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => exit_now(main()),
    }
}

fn become_program(
    exe: BorrowedFd<'_>,
    argv: &[CString],
    fds: &[BorrowedFd<'_>],
    prepare: impl FnOnce() -> Result<(), Fatal>,
) -> Result<std::convert::Infallible, Fatal> {
    let null =
        open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).step("opening /dev/null")?;
    dup2_stdin(&null).step("standard input")?;
    dup2_stdout(&null).step("standard output")?;
    if fcntl(std::io::stderr().as_fd(), FcntlArg::F_GETFD).is_err() {
        dup2_stderr(&null).step("standard error")?;
    }
    // First out of the way of 3, 4, ..., then to their places: a source may stand where another one belongs.
    let last = FIRST_FD + RawFd::try_from(fds.len()).step("too many descriptors")?;
    let out_of_the_way =
        |fd: BorrowedFd<'_>| fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(last + 1)).step("moving a descriptor");
    let mut moved = Vec::new();
    for fd in fds {
        moved.push(out_of_the_way(*fd)?);
    }
    let exe = out_of_the_way(exe)?;
    for (target, source) in (FIRST_FD..).zip(moved) {
        place(source, target)?;
    }
    place_cloexec(exe, last)?;
    close_from(u32::try_from(last).step("too many descriptors")? + 1).step("closing descriptors")?;
    prepare()?;
    let exe = bpfgate_protocol::channel::inherited_fd(last).step("the program")?;
    let environment: [CString; 0] = [];
    fexecve(exe, argv, &environment).step("executing the program")
}

fn place(source: RawFd, target: RawFd) -> Result<(), Fatal> {
    raw_dup(source, target, OFlag::empty())
}

fn place_cloexec(source: RawFd, target: RawFd) -> Result<(), Fatal> {
    raw_dup(source, target, OFlag::O_CLOEXEC)
}

#[allow(unsafe_code)]
fn raw_dup(source: RawFd, target: RawFd, flags: OFlag) -> Result<(), Fatal> {
    // SAFETY: dup3 touches no memory. `target` may replace a descriptor that some value of the parent's copy owns;
    // this child runs no destructor: it execs or exits.
    nix::errno::Errno::result(unsafe { libc::dup3(source, target, flags.bits()) })
        .step("placing a descriptor")?;
    Ok(())
}
