//! The loader of this helper: two channels to it. Once confined, this process cannot start another one.

use bpfgate_lockdown::capabilities::User;
use bpfgate_lockdown::process::SingleThread;
use bpfgate_lockdown::{Fatal, Step, capabilities, spawn};
use bpfgate_protocol::INNER_VERSION;
use bpfgate_protocol::channel::{Channel, ChannelError};
use bpfgate_protocol::messages::loader::{FromLeash, FromLoader, ToLeash, ToLoader};
use bpfgate_protocol::refusal::Refusal;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

/// How long the loader may think in all until a request is done. The kernel's own work, the verifier's above all, is done
/// by this process and does not count.
const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) struct Loader {
    leash: Channel,
    work: Channel,
    /// The number of the worker at the other end of `work`, as far as we were told.
    worker: u32,
    /// How long it may still think.
    patience: Duration,
    gone: bool,
}

impl Loader {
    /// Starts the loader as the user that the helper will be, without any capability.
    pub(crate) fn start(alone: SingleThread, program: &Path, user: Option<User>) -> Result<Self, Fatal> {
        let exe = spawn::open_program(program)?;
        let (leash, leash_end) = Channel::pair().step("the leash")?;
        let (work, work_end) = Channel::pair().step("the work channel")?;
        let argv = [CString::from(c"bpfgate-loader")];
        let fds = [leash_end.as_fd(), work_end.as_fd()];
        spawn::program(alone, exe.as_fd(), &argv, &fds, || capabilities::keep_only(&[], user))?;
        drop((leash_end, work_end));
        leash.set_timeouts(5, 5).step("setting deadlines")?;
        work.set_timeouts(5, 5).step("setting deadlines")?;
        let mut loader = Self { leash, work, worker: 1, patience: PATIENCE, gone: false };
        match loader.leash.recv::<FromLeash>().step("waiting for the loader")? {
            (FromLeash::Ready { version: INNER_VERSION }, _) => Ok(loader),
            (other, _) => Err(Fatal(format!("the loader is of another version: {other:?}"))),
        }
    }

    /// Whether no more loads are possible.
    pub(crate) fn is_gone(&self) -> bool {
        self.gone
    }

    /// Begins a request. Nobody is asked anything before: what is there was left behind by a worker that has died since,
    /// or the one that works now breaks the protocol. It is ended, so that there is an end to what it says.
    pub(crate) fn request(&mut self, request: &ToLoader, file: BorrowedFd<'_>) -> Result<(), Refusal> {
        self.catch_up()?;
        if !self.gone && readable([self.work.as_fd()], Duration::ZERO)?[0] {
            self.kill()?;
        }
        if self.gone {
            return Err(lost());
        }
        self.patience = PATIENCE;
        self.send(request, Some(file))
    }

    pub(crate) fn send(&mut self, message: &ToLoader, fd: Option<BorrowedFd<'_>>) -> Result<(), Refusal> {
        self.work.send(message, fd.as_slice()).map_err(|error| self.broken(&error))
    }

    /// The loader's next message of this request.
    pub(crate) fn next(&mut self) -> Result<(FromLoader, Vec<OwnedFd>), Refusal> {
        let start = Instant::now();
        let ready = readable([self.leash.as_fd(), self.work.as_fd()], self.patience)?;
        self.patience = self.patience.saturating_sub(start.elapsed());
        match ready {
            // First: what is said on `work` after a worker's end is of another one.
            [true, _] => {
                let how = self.announcement()?;
                // Its successor may have got an answer that was for it, or the request.
                self.kill()?;
                Err(ended(&how.unwrap_or_else(|| "is gone".into())))
            }
            [false, true] => self.work.recv().map_err(|error| self.broken(&error)),
            [false, false] => {
                self.kill()?;
                let seconds = PATIENCE.as_secs();
                Err(Refusal::object(format!(
                    "libbpf did not come to an end with this object within {seconds} s"
                )))
            }
        }
    }

    /// Ends the worker and whatever it was doing; the next request meets a new one, and both ends of `work` are empty.
    pub(crate) fn kill(&mut self) -> Result<(), Refusal> {
        self.catch_up()?;
        let worker = self.worker;
        self.gone |= self.leash.send(&ToLeash::Kill { worker }, &[]).is_err();
        while !self.gone && self.worker <= worker {
            self.announcement()?;
        }
        self.throw_away()
    }

    /// Takes in that workers of before have ended: the next announcement is about the one that works now.
    fn catch_up(&mut self) -> Result<(), Refusal> {
        while !self.gone && readable([self.leash.as_fd()], Duration::ZERO)?[0] {
            self.announcement()?;
        }
        Ok(())
    }

    /// What the loader's parent has to say: how a worker ended. None if the parent itself is gone.
    fn announcement(&mut self) -> Result<Option<String>, Refusal> {
        match self.leash.recv() {
            Ok((FromLeash::Died { worker, how }, _)) => {
                self.worker = worker.saturating_add(1);
                Ok(Some(bpfgate_protocol::refusal::printable(&how, 100)))
            }
            Ok((FromLeash::Ready { .. }, _)) | Err(_) => {
                self.gone = true;
                Ok(None)
            }
        }
    }

    fn throw_away(&mut self) -> Result<(), Refusal> {
        while !self.gone && readable([self.work.as_fd()], Duration::ZERO)?[0] {
            if let Err(ChannelError::Closed) = self.work.recv::<FromLoader>() {
                self.gone = true;
            }
        }
        Ok(())
    }

    fn broken(&mut self, error: &ChannelError) -> Refusal {
        eprintln!("bpfgate-helper: the loader: {error}");
        if matches!(error, ChannelError::Closed) {
            self.gone = true;
            return ended("is gone");
        }
        self.astray()
    }

    /// A worker that breaks the protocol is ended: it is not libbpf any more.
    pub(crate) fn astray(&mut self) -> Refusal {
        let refusal = Refusal::object("libbpf went astray while it worked on this object");
        if self.gone { refusal } else { self.kill().err().unwrap_or(refusal) }
    }
}

/// A load whose worker ended. Only what libbpf does to itself is the fault of the object.
fn ended(how: &str) -> Refusal {
    let what = format!("libbpf {how} while it worked on this object");
    if how.contains("SIGKILL") || how == "is gone" {
        // Ours has another message: that it took too long.
        Refusal::helper(format!("{what}: somebody ended it, or there was no memory for it; try again"))
    } else if how.contains("SIGSYS") {
        Refusal::object(format!("{what}; that is a defect of bpfgate"))
    } else {
        Refusal::object(format!("{what}; the object is damaged or hits a bug of libbpf"))
    }
}

fn lost() -> Refusal {
    Refusal::helper("the loader of this app has ended; what is attached goes on, new loads need a new helper")
}

/// Which of these can be read, or are at their end, within this time.
fn readable<const N: usize>(fds: [BorrowedFd<'_>; N], limit: Duration) -> Result<[bool; N], Refusal> {
    let mut polled = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
    // ppoll, not poll: the kernel goes on with poll by restart_syscall after a stop, which is not on our list.
    ppoll(&mut polled, Some(TimeSpec::from_duration(limit)), None)
        .map_err(|errno| Refusal::kernel("ppoll", errno as i32))?;
    Ok(polled.map(|fd| fd.revents().is_some_and(|events| !events.is_empty())))
}
