//! Waiting for signals and for the end of the session at once.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Signals that are read instead of delivered, from `block` on.
#[derive(Debug)]
pub(crate) struct Signals(SignalFd);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A signal, by its number.
    Signal {
        number: i32,
        /// Sent by the terminal to the whole foreground group, so a child has it already.
        from_terminal: bool,
    },
    /// The broker closed the connection.
    SessionEnded,
}

impl Signals {
    pub(crate) fn block(signals: &[Signal]) -> io::Result<Self> {
        let set: SigSet = signals.iter().copied().collect();
        set.thread_block()?;
        Ok(Self(SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?))
    }

    /// Waits for a signal, or for the end of `session` if there is one to watch.
    pub(crate) fn wait(&self, session: Option<BorrowedFd<'_>>) -> io::Result<Event> {
        loop {
            if let Some(event) = self.wait_for(session, None, PollTimeout::NONE)? {
                return Ok(event);
            }
        }
    }

    /// The same, but without an event if there is something to read from `input` first, or the time is over.
    pub(crate) fn wait_for(
        &self,
        session: Option<BorrowedFd<'_>>,
        input: Option<BorrowedFd<'_>>,
        timeout: PollTimeout,
    ) -> io::Result<Option<Event>> {
        let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = vec![readable(self.0.as_fd())];
        fds.extend(session.map(readable));
        fds.extend(input.map(readable));
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        if let Some(info) = self.0.read_signal()? {
            let from_terminal = info.ssi_code == SI_KERNEL;
            return Ok(Some(Event::Signal { number: info.ssi_signo.cast_signed(), from_terminal }));
        }
        // The broker never speaks first: readable means closed.
        let ended = session.is_some() && fds[1].any().unwrap_or(true);
        Ok(ended.then_some(Event::SessionEnded))
    }
}

/// `si_code` of a signal that the kernel itself sent (include/uapi/asm-generic/siginfo.h).
const SI_KERNEL: i32 = 0x80;
