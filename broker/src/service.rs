//! The start under a service manager: sockets come from it, and helpers are reached by sockets that it listens on. Such a
//! broker never holds a capability, never forks and never executes anything.

use bpfgate_lockdown::{Fatal, Step};
use bpfgate_protocol::channel::refuse_descriptors;
use bpfgate_systemd::manager::{Manager, Named};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{SockType, UnixAddr, getsockname, getsockopt, sockopt};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// Where the sockets of helpers are, `APP.sock`: `bpfgate-helper@.socket` says the same.
pub(crate) const HELPERS: &str = "/run/bpfgate/helper";

pub(crate) struct Started {
    pub(crate) clients: OwnedFd,
    pub(crate) admin: Option<OwnedFd>,
    pub(crate) manager: Manager,
}

pub(crate) fn start() -> Result<Started, Fatal> {
    let (manager, named) = Manager::from_environment()?;
    let (mut clients, mut admin) = (None, None);
    for Named { name, fd } in named {
        match name.as_str() {
            "clients" => clients = Some(fd),
            "admin" => admin = Some(fd),
            other => log::warn!("a socket named {other} came with the start; it is not used"),
        }
    }
    let clients = clients.ok_or_else(|| {
        Fatal("no socket for clients came with the start: bpfgate.socket starts this program; without systemd say --standalone".into())
    })?;
    if nix::unistd::geteuid().is_root() {
        return Err(Fatal("the broker is no root process: User= is missing in its unit".into()));
    }
    for listener in std::iter::once(&clients).chain(&admin) {
        let kind = getsockopt(listener, sockopt::SockType);
        let listens = getsockopt(listener, sockopt::AcceptConn).unwrap_or(false);
        // Whoever is at the other end of anything else was never asked who he is.
        if !listens || kind != Ok(SockType::Stream) || getsockname::<UnixAddr>(listener.as_raw_fd()).is_err()
        {
            let why = "what came with the start is no listening Unix stream socket: bpfgate.socket says what it should be";
            return Err(Fatal(why.into()));
        }
        refuse_descriptors(listener.as_fd());
        fcntl(listener, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).step("a listening socket")?;
    }
    Ok(Started { clients, admin, manager })
}
