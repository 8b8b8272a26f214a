//! The worker: takes one request after the other.

use crate::{object, report, seccomp, symbols, wrap};
use bpfgate_lockdown::{Fatal, Step, process, syscalls};
use bpfgate_protocol::channel::{Channel, ChannelError};
use bpfgate_protocol::messages::Bulk;
use bpfgate_protocol::messages::loader::{FromLoader, ToLoader};
use bpfgate_protocol::refusal::Refusal;
use std::os::fd::{AsFd, OwnedFd};

/// What a request came to, if not done: why, and the verifier's log.
pub(crate) struct Failure {
    pub(crate) refusal: Refusal,
    pub(crate) log: Vec<u8>,
}

impl Failure {
    pub(crate) fn object(why: impl Into<String>) -> Self {
        Self { refusal: Refusal::object(why), log: Vec::new() }
    }
}

pub(crate) fn main(work: OwnedFd) -> i32 {
    match serve(work) {
        Ok(()) => 0,
        Err(fatal) => {
            eprintln!("bpfgate-loader: worker: {fatal}");
            1
        }
    }
}

fn serve(work: OwnedFd) -> Result<(), Fatal> {
    process::die_with_parent()?;
    process::not_dumpable()?;
    report::prepare_libbpf();
    wrap::connect(Channel::from_fd(work).step("the work channel")?);
    syscalls::restrict(&seccomp::worker())?;
    // One buffer for all loads: a fresh one would be cleared each time, which takes longer than all else here.
    let mut log = vec![0; object::MAX_LOG];
    loop {
        let (request, mut fds) = match wrap::receive() {
            Ok(received) => received,
            Err(ChannelError::Closed) => return Ok(()),
            Err(error) => return Err(Fatal::step("the work channel", error)),
        };
        let done = match (request, fds.pop()) {
            (ToLoader::Load { object, programs, globals }, Some(file)) => {
                object::load(&object, &programs, &globals, file, &mut log)
                    .map(|maps| FromLoader::Loaded { maps })
            }
            (ToLoader::Symbols { symbols }, Some(file)) => {
                symbols::find(file, &symbols).map(|offsets| FromLoader::Found { offsets })
            }
            (other, _) => return Err(Fatal(format!("{other:?} is no request"))),
        };
        let (answer, fd) = match done {
            Ok(answer) => (answer, None),
            Err(Failure { refusal, log }) => {
                let (log, fd) = Bulk::pack(log).step("packing the log")?;
                (FromLoader::Refused { refusal, log }, fd)
            }
        };
        wrap::send(&answer, fd.as_ref().map(AsFd::as_fd)).step("answering")?;
    }
}
