//! Limits and attributes of a process.
#![allow(unsafe_code)]

use crate::{Fatal, Step};
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, umask};
use std::io::Write;

/// What every process of bpfgate does first: no core files, no descriptors above `files`, nobody of the same user
/// may look into it, files that it might make are private, it stands in the root directory, and a panic says where it
/// happened and no more. (For a backtrace the standard library opens files: a confined process would end by its filter,
/// before it has said anything.)
pub fn tame(files: u64) -> Result<(), Fatal> {
    std::panic::set_hook(Box::new(|panic| {
        let _ = writeln!(std::io::stderr(), "{panic}");
    }));
    setrlimit(Resource::RLIMIT_CORE, 0, 0).step("setting RLIMIT_CORE")?;
    // A lower hard limit stays: it cannot be raised without privilege, and running out is an answer, not an end.
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).step("reading RLIMIT_NOFILE")?;
    let files = files.min(hard);
    setrlimit(Resource::RLIMIT_NOFILE, files, files).step("setting RLIMIT_NOFILE")?;
    umask(Mode::from_bits_truncate(0o077));
    std::env::set_current_dir("/").step("changing to the root directory")?;
    not_dumpable()
}

/// `PR_SET_DUMPABLE` 0: no ptrace and no /proc/PID/mem by processes of the same user. A change of user ids or an exec
/// sets it anew, so it is called after those.
pub fn not_dumpable() -> Result<(), Fatal> {
    nix::sys::prctl::set_dumpable(false).step("becoming undumpable")
}

/// The kernel ends this process when its parent ends.
pub fn die_with_parent() -> Result<(), Fatal> {
    let parent = nix::unistd::getppid();
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)
        .step("asking to die with the parent")?;
    // It may have ended in between.
    if parent == nix::unistd::getppid() { Ok(()) } else { Err(Fatal("the parent ended".into())) }
}

/// Children are waited for by `waitpid`, whatever the parent process of this one had set.
pub fn default_sigchld() -> Result<(), Fatal> {
    use nix::sys::signal::{SigHandler, Signal, signal};
    // SAFETY: SIG_DFL runs no code of this process.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) }.step("resetting SIGCHLD")?;
    Ok(())
}

/// Removes every environment variable: what is not there is read by no library.
pub fn clear_environment(_: SingleThread) -> Result<(), Fatal> {
    // SAFETY: with one thread nobody reads the environment at the same time.
    match unsafe { libc::clearenv() } {
        0 => Ok(()),
        _ => Err(Fatal("the environment cannot be cleared".into())),
    }
}

/// `PR_SET_SECUREBITS`.
pub(crate) fn set_securebits(bits: libc::c_ulong) -> Result<(), Errno> {
    // SAFETY: this prctl takes a number and touches no memory.
    Errno::result(unsafe { libc::prctl(libc::PR_SET_SECUREBITS, bits, 0, 0, 0) }).map(drop)
}

/// Closes every descriptor from `first` on.
pub(crate) fn close_from(first: u32) -> Result<(), Errno> {
    // SAFETY: closing descriptors touches no memory. It is called in a child that owns all of them and uses none
    // of them any more: it execs next.
    Errno::result(unsafe { libc::close_range(first, u32::MAX, 0) }).map(drop)
}

/// Ends this process without running any destructor of the parent's copy.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(status) }
}

/// Proof that this process had one thread when it was asked, and makes no others: bpfgate starts no threads.
#[derive(Debug, Clone, Copy)]
pub struct SingleThread(());

#[cfg(test)]
impl SingleThread {
    /// Test runners have threads; a child of a test makes a system call and exits.
    pub(crate) fn for_tests() -> Self {
        Self(())
    }
}

/// Counts the threads of this process.
pub fn single_thread() -> Result<SingleThread, Fatal> {
    match std::fs::read_dir("/proc/self/task").step("counting threads")?.count() {
        1 => Ok(SingleThread(())),
        threads => Err(Fatal(format!("this process has {threads} threads where it must have one"))),
    }
}

/// fork(2).
pub(crate) fn fork(_: SingleThread) -> Result<nix::unistd::ForkResult, Fatal> {
    // SAFETY: with one thread the child is a whole copy: no lock is held by a thread that does not exist in it.
    unsafe { nix::unistd::fork() }.step("fork")
}
