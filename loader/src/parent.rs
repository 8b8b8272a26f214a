//! The parent: waits for its worker to end, or for the helper to say that it is late.

use crate::{seccomp, worker};
use bpfgate_lockdown::process::SingleThread;
use bpfgate_lockdown::{Fatal, Step, spawn, syscalls};
use bpfgate_protocol::INNER_VERSION;
use bpfgate_protocol::channel::{Channel, ChannelError, receive};
use bpfgate_protocol::messages::loader::{FromLeash, ToLeash};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::MsgFlags;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

pub(crate) fn run(alone: SingleThread, mut leash: Channel, work: &Channel) -> Result<(), Fatal> {
    syscalls::restrict(&seccomp::parent())?;
    let mut worker = start(alone, &leash, work)?;
    let mut number = 1;
    leash.send(&FromLeash::Ready { version: INNER_VERSION }, &[]).step("telling the helper")?;
    loop {
        let (ended, told) = wait(&worker.1, &leash)?;
        if told {
            match leash.recv::<ToLeash>() {
                Ok((ToLeash::Kill { worker: which }, _)) => {
                    if which == number {
                        let _ = kill(worker.0, Signal::SIGKILL);
                    }
                }
                // The helper is gone, and with it every reason to be here. The worker dies with us.
                Err(ChannelError::Closed) => return Ok(()),
                Err(error) => return Err(Fatal::step("the leash", error)),
            }
        }
        if ended {
            let how = match waitpid(worker.0, None).step("waiting for the worker")? {
                WaitStatus::Signaled(_, signal, _) => format!("was ended by {signal}"),
                WaitStatus::Exited(_, status) => format!("ended with status {status}"),
                other => format!("ended: {other:?}"),
            };
            throw_away(work);
            worker = start(alone, &leash, work)?;
            leash.send(&FromLeash::Died { worker: number, how }, &[]).step("telling the helper")?;
            number += 1;
        }
    }
}

/// What the helper had sent to the worker that ended is not for the next one.
fn throw_away(work: &Channel) {
    let mut buffer = [0; 64];
    while receive(work.as_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT).is_ok_and(|got| got.len > 0) {}
}

/// Forks a worker. The pipe's other end is held by the worker alone: it closes when the worker ends.
fn start(alone: SingleThread, leash: &Channel, work: &Channel) -> Result<(Pid, OwnedFd), Fatal> {
    let (ours, theirs) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).step("a pipe")?;
    let work = work.as_fd().try_clone_to_owned().step("the work channel")?;
    let leash = leash.as_fd().as_raw_fd();
    let pid = spawn::function(alone, move || {
        // The leash is the parent's: a worker that was taken over must not speak for it. The worker never returns, so
        // nothing closes this number a second time.
        let _ = nix::unistd::close(leash);
        worker::main(work)
    })?;
    drop(theirs);
    Ok((pid, ours))
}

/// Whether the worker ended, and whether the helper has something to say or is gone.
fn wait(worker: &OwnedFd, leash: &Channel) -> Result<(bool, bool), Fatal> {
    let mut fds =
        [PollFd::new(worker.as_fd(), PollFlags::POLLIN), PollFd::new(leash.as_fd(), PollFlags::POLLIN)];
    loop {
        match ppoll(&mut fds, None, None) {
            Ok(_) => break,
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(Fatal::step("ppoll", error)),
        }
    }
    let ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
    Ok((ready(&fds[0]), ready(&fds[1])))
}
