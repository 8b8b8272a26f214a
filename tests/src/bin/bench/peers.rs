//! The other processes of the measurements. They are this program in another role, started with one end of a socket
//! as standard input, as a user without any privilege.

use crate::world::SELF;
use crate::{Result, Trying};
use bpfgate_protocol::channel::{receive, send_stream};
use nix::sys::socket::{ControlMessage, MsgFlags, recvmsg, sendmsg};
use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

pub(crate) const CONNECTOR: &str = "--connector";
pub(crate) const PONG: &str = "--pong";

/// A child in one of these roles. It ends when our end of its socket closes.
struct Peer {
    socket: Option<UnixStream>,
    child: Child,
}

impl Peer {
    fn start(arguments: &[&str], uid: u32) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair().trying("making a pair of sockets")?;
        let child = Command::new(SELF)
            .args(arguments)
            .uid(uid) // clears the supplementary groups too
            .gid(uid)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .trying("starting a process without privilege")?;
        Ok(Self { socket: Some(ours), child })
    }

    fn socket(&mut self) -> Result<&mut UnixStream> {
        self.socket.as_mut().ok_or_else(|| "the process without privilege has ended".to_owned())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.socket = None;
        let _ = self.child.wait();
    }
}

/// Connects to a broker as somebody without privilege: what the broker sees as its client is that somebody.
pub(crate) struct Connector(Peer);

impl Connector {
    pub(crate) fn start(socket: &Path, uid: u32) -> Result<Self> {
        let path = socket.to_str().ok_or("the path of the socket is not UTF-8 text")?;
        Peer::start(&[CONNECTOR, path], uid).map(Self)
    }

    pub(crate) fn connect(&mut self) -> Result<UnixStream> {
        let socket = self.0.socket()?;
        socket.write_all(b"?").trying("asking for a connection")?;
        let got = receive(socket.as_fd(), &mut [0], MsgFlags::empty()).trying("waiting for a connection")?;
        let fd = got.fds.into_iter().next().ok_or("the client without privilege cannot connect")?;
        Ok(fd.into())
    }
}

/// The role behind [`Connector`].
pub(crate) fn connector(path: &Path) -> Result<()> {
    let mut input = std::io::stdin();
    while input.read(&mut [0]).trying("waiting for work")? > 0 {
        let connection = UnixStream::connect(path).trying(&format!("connecting to {}", path.display()))?;
        send_stream(input.as_fd(), b"!", &[connection.as_fd()]).trying("handing over a connection")?;
    }
    Ok(())
}

/// The least that handing over a descriptor can cost: a byte there, a byte and a descriptor back, and nothing else.
pub(crate) struct Ping(Peer);

impl Ping {
    pub(crate) fn start(uid: u32) -> Result<Self> {
        Peer::start(&[PONG], uid).map(Self)
    }

    pub(crate) fn ping(&mut self) -> Result<()> {
        let socket = self.0.socket()?;
        socket.write_all(b"?").trying("the bare ping")?;
        let mut space = nix::cmsg_space!([RawFd; 1]);
        let mut byte = [0];
        let mut bytes = [IoSliceMut::new(&mut byte)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let got =
            recvmsg::<()>(socket.as_raw_fd(), &mut bytes, Some(&mut space), flags).trying("the bare pong")?;
        let mut closed = 0;
        for message in got.cmsgs().trying("the bare pong")? {
            if let nix::sys::socket::ControlMessageOwned::ScmRights(fds) = message {
                for fd in fds {
                    nix::unistd::close(fd).trying("closing the descriptor of the bare pong")?;
                    closed += 1;
                }
            }
        }
        if closed == 1 { Ok(()) } else { Err(format!("the bare pong had {closed} descriptors")) }
    }
}

/// The role behind [`Ping`].
pub(crate) fn pong() -> Result<()> {
    let file = File::open("/dev/null").trying("opening /dev/null")?;
    let fds = [file.as_raw_fd()];
    let input = std::io::stdin();
    // Past the buffer of `Stdin`, which would cost a copy.
    while nix::unistd::read(&input, &mut [0]).trying("waiting for the bare ping")? > 0 {
        let rights = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(input.as_raw_fd(), &[IoSlice::new(b"!")], &rights, MsgFlags::empty(), None)
            .trying("answering the bare ping")?;
    }
    Ok(())
}
