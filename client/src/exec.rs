//! Starts a program that works with maps it was given, and with nothing else of bpf(2).
//!
//! The program finds the maps as `sd_listen_fds(3)` says: descriptors from 3 on, their count in
//! `LISTEN_FDS`, their names in `LISTEN_FDNAMES`, its own process id in `LISTEN_PID`. It runs with
//! `NO_NEW_PRIVS` and a seccomp filter that leaves it the bpf commands that read and write the maps
//! it holds; pinning, freezing, attaching and opening by id fail with `EPERM`. The filter is kept by
//! everything it starts. It gets a SIGTERM when the thread that started it ends.
//!
//! Not filtered: `SO_ATTACH_BPF` and the perf ioctls, which take program descriptors that the program
//! does not have. On x86-64 a 32-bit program is killed by its first system call.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

use crate::sys;

/// The bpf commands that the program may use, each with its reason (`enum bpf_cmd`).
pub const ALLOWED_BPF_COMMANDS: [(u32, &str); 9] = [
    (1, "MAP_LOOKUP_ELEM: read a value"),
    (2, "MAP_UPDATE_ELEM: write one; refused by the kernel for frozen maps"),
    (3, "MAP_DELETE_ELEM: remove one; likewise"),
    (4, "MAP_GET_NEXT_KEY: walk a map"),
    (15, "OBJ_GET_INFO_BY_FD: learn the sizes of a map; only of descriptors already held"),
    (24, "MAP_LOOKUP_BATCH: as 1, for many"),
    (25, "MAP_LOOKUP_AND_DELETE_BATCH: as 1 and 3, for many"),
    (26, "MAP_UPDATE_BATCH: as 2, for many"),
    (27, "MAP_DELETE_BATCH: as 3, for many"),
];

/// A program that is about to be started.
#[derive(Debug)]
#[must_use = "nothing is started before `spawn`"]
pub struct Launch {
    program: OsString,
    arguments: Vec<OsString>,
    fds: Vec<(String, OwnedFd)>,
}

/// A program that was started. Dropping this neither stops it nor waits for it.
#[derive(Debug)]
#[must_use]
pub struct Running {
    pid: Pid,
    ended: Option<Ended>,
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With this status, 0 to 255.
    Exited(i32),
    /// By this signal.
    Killed(i32),
}

impl Ended {
    /// The status as a shell would report it: 128 and the number of the signal.
    pub fn status(self) -> u8 {
        let status = match self {
            Self::Exited(status) => status & 0xff,
            Self::Killed(signal) => 128 + (signal & 0x7f),
        };
        u8::try_from(status).unwrap_or(u8::MAX)
    }
}

impl Launch {
    /// A program, searched in `PATH` unless its name has a slash.
    pub fn new(program: impl Into<OsString>) -> Self {
        Self { program: program.into(), arguments: Vec::new(), fds: Vec::new() }
    }

    /// Adds arguments.
    pub fn arguments<S: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Adds a descriptor; the first becomes number 3.
    pub fn descriptor(mut self, name: impl Into<String>, fd: OwnedFd) -> Self {
        self.fds.push((name.into(), fd));
        self
    }

    /// Starts it. This process keeps none of the descriptors.
    ///
    /// Errors:  `InvalidInput` for a name that `LISTEN_FDNAMES` cannot hold
    pub fn spawn(self) -> io::Result<Running> {
        let argv = std::iter::once(self.program).chain(self.arguments).map(OsString::into_vec);
        let image = sys::Image {
            argv: argv.map(CString::new).collect::<Result<_, _>>()?,
            environment: environment(&self.fds)?,
            fds: self.fds.iter().map(|(_, fd)| fd.as_fd()).collect(),
            filter: filter().map_err(io::Error::other)?,
        };
        Ok(Running { pid: sys::spawn(&image)?, ended: None })
    }
}

impl Running {
    /// Its process id.
    pub fn id(&self) -> i32 {
        self.pid.as_raw()
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> io::Result<Ended> {
        self.reap(None)?.ok_or_else(|| io::ErrorKind::WouldBlock.into())
    }

    /// Whether it ended, without waiting.
    pub fn try_wait(&mut self) -> io::Result<Option<Ended>> {
        self.reap(Some(WaitPidFlag::WNOHANG))
    }

    /// Sends it a signal, unless it ended.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        match self.ended {
            Some(_) => Ok(()),
            None => Ok(kill(self.pid, Signal::try_from(signal)?)?),
        }
    }

    fn reap(&mut self, flags: Option<WaitPidFlag>) -> io::Result<Option<Ended>> {
        while self.ended.is_none() {
            match waitpid(self.pid, flags) {
                Ok(WaitStatus::Exited(_, status)) => self.ended = Some(Ended::Exited(status)),
                Ok(WaitStatus::Signaled(_, signal, _)) => self.ended = Some(Ended::Killed(signal as i32)),
                Ok(WaitStatus::StillAlive) => break,
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(self.ended)
    }
}

/// What is meant for this process and wrong for any other (`sd_listen_fds(3)`).
const OURS: [&str; 4] = ["LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID", "LISTEN_PIDFDID"];

/// This process's environment with the names and the count; the child adds its process id.
fn environment(fds: &[(String, OwnedFd)]) -> io::Result<Vec<CString>> {
    let bad = |name: &str| name.is_empty() || name.contains(|c: char| c == ':' || c.is_control());
    if let Some((name, _)) = fds.iter().find(|(name, _)| bad(name)) {
        let what = format!("a descriptor cannot be passed on under the name {name:?}");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    let names: Vec<&str> = fds.iter().map(|(name, _)| name.as_str()).collect();
    let ours = |key: &OsStr| OURS.iter().any(|name| key == *name);
    let mut environment = std::env::vars_os()
        .filter(|(key, _)| !ours(key))
        .map(|(key, value)| CString::new([key.as_bytes(), b"=", value.as_bytes()].concat()))
        .collect::<Result<Vec<_>, _>>()?;
    environment.push(CString::new(format!("LISTEN_FDS={}", fds.len()))?);
    environment.push(CString::new(format!("LISTEN_FDNAMES={}", names.join(":")))?);
    Ok(environment)
}

/// Answers bpf(2) with `EPERM` unless the command is one of the allowed, and allows all else.
fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
    // A rule holds if all its conditions do: a command that is unequal to every allowed one.
    let other_command = ALLOWED_BPF_COMMANDS
        .iter()
        .map(|(command, _)| {
            SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, u64::from(*command))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut rules = BTreeMap::from([(libc::SYS_bpf, vec![SeccompRule::new(other_command)?])]);
    // The same call by its x32 number, which the filter's check of the architecture lets pass.
    #[cfg(target_arch = "x86_64")]
    rules.insert(libc::SYS_bpf | 0x4000_0000, Vec::new());
    let refuse = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    SeccompFilter::new(rules, SeccompAction::Allow, refuse, std::env::consts::ARCH.try_into()?)?.try_into()
}

#[cfg(test)]
#[path = "exec_tests.rs"]
mod tests;
