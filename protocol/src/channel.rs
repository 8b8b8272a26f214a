//! The inner channels: `AF_UNIX` `SOCK_SEQPACKET`, one message a datagram, descriptors by `SCM_RIGHTS`.
//!
//! The number of descriptors of a message is part of the message (its row). Too many, too few, a truncated
//! datagram or a truncated control message: everything that came is closed, and the channel is an error.
//! This is the only file of the crate with unsafe code: the kernel's control messages are parsed by hand,
//! because what a library forgets to hand out after `MSG_CTRUNC` stays open for ever.
#![allow(unsafe_code)]

use crate::codec::{self, MAX_MESSAGE};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, getsockopt, sendmsg, setsockopt, socketpair,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use serde::{Serialize, de::DeserializeOwned};
use std::fmt;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// The most descriptors one message can carry (`SCM_MAX_FD`, include/net/scm.h).
pub const MAX_FDS: usize = 253;

/// What may go on a channel: it knows how many descriptors belong to it.
pub trait Message {
    /// The number of descriptors that travel with this message.
    fn fds(&self) -> usize;
}

/// Why nothing came or went.
#[derive(Debug)]
pub enum ChannelError {
    /// The other end is closed.
    Closed,
    /// Non-blocking, and nothing is there; or the time set by [`Channel::set_timeouts`] is over.
    NotNow,
    /// The peer broke the protocol: wrong bytes, wrong number of descriptors, too long.
    Protocol(String),
    /// The kernel refused.
    Io(io::Error),
}

impl fmt::Display for ChannelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("the other end is closed"),
            Self::NotNow => f.write_str("nothing came in time"),
            Self::Protocol(why) => write!(f, "the peer broke the protocol: {why}"),
            Self::Io(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for ChannelError {}

impl From<Errno> for ChannelError {
    fn from(errno: Errno) -> Self {
        match errno {
            // ETOOMANYREFS: more descriptors of this user are on their way than it may have open. They will be read.
            Errno::EAGAIN | Errno::ETOOMANYREFS => Self::NotNow,
            Errno::EPIPE | Errno::ECONNRESET | Errno::ENOTCONN => Self::Closed,
            other => Self::Io(other.into()),
        }
    }
}

/// Bytes and descriptors as they came from a Unix socket.
#[derive(Debug)]
pub struct Received {
    /// How many bytes of the buffer are filled; 0 is the end of a stream.
    pub len: usize,
    /// The descriptors, close-on-exec.
    pub fds: Vec<OwnedFd>,
    /// Bytes or descriptors were lost on the way (`MSG_TRUNC`, `MSG_CTRUNC`).
    pub truncated: bool,
}

/// One `recvmsg(2)`: every descriptor that the kernel installed is owned by the result, also when the
/// control message was cut short.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8], flags: MsgFlags) -> Result<Received, Errno> {
    const CONTROL: usize = (MAX_FDS * size_of::<RawFd>()).div_ceil(8) + 8;
    let mut control = [0u64; CONTROL];
    let mut iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: msghdr is plain data for which all zeroes is a valid value.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control);
    let flags = (flags | MsgFlags::MSG_CMSG_CLOEXEC).bits();
    let len = loop {
        // SAFETY: `header` points to `iov` and `control`, which outlive the call and are not aliased during it;
        // the lengths are those of the buffers, so the kernel writes inside of them.
        let result = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
        match Errno::result(result) {
            Ok(len) => break usize::try_from(len).unwrap_or(0),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    };
    let mut fds = Vec::new();
    // SAFETY: the kernel has filled `control` up to msg_controllen with well-formed headers; CMSG_FIRSTHDR and
    // CMSG_NXTHDR stay inside of it and return null at the end; `control` is aligned for cmsghdr (u64).
    unsafe {
        let mut cmsg = libc::CMSG_FIRSTHDR(&raw const header);
        while !cmsg.is_null() {
            if (*cmsg).cmsg_level == libc::SOL_SOCKET && (*cmsg).cmsg_type == libc::SCM_RIGHTS {
                #[allow(clippy::cast_ptr_alignment)] // read_unaligned below
                let data = libc::CMSG_DATA(cmsg).cast::<RawFd>();
                let bytes = (*cmsg).cmsg_len - (data as usize - cmsg as usize);
                for i in 0..bytes / size_of::<RawFd>() {
                    // The kernel installed this descriptor for us in this call; nobody else knows its number.
                    fds.push(OwnedFd::from_raw_fd(data.add(i).read_unaligned()));
                }
            }
            cmsg = libc::CMSG_NXTHDR(&raw const header, cmsg);
        }
    }
    let truncated = header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0;
    Ok(Received { len, fds, truncated })
}

/// One end of an inner channel.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl Channel {
    /// Both ends of a new channel, close-on-exec.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self::own(a), Self::own(b)))
    }

    /// Takes a descriptor that must be a Unix socket of this kind.
    pub fn from_fd(socket: OwnedFd) -> io::Result<Self> {
        if getsockopt(&socket, sockopt::SockType)? != SockType::SeqPacket {
            return Err(io::Error::other("the channel is not a SOCK_SEQPACKET socket"));
        }
        let name = nix::sys::socket::getsockname::<nix::sys::socket::UnixAddr>(socket.as_raw_fd());
        if name.is_err() {
            return Err(io::Error::other("the channel is not a Unix socket"));
        }
        Ok(Self::own(socket))
    }

    /// Takes descriptor number `fd`, which the parent process left for us.
    ///
    /// The number must not be owned by anything else in this process; it is called once, first thing in `main`.
    pub fn inherited(fd: RawFd) -> io::Result<Self> {
        Self::from_fd(inherited_fd(fd)?)
    }

    /// Takes the next connection of a listening socket of this kind.
    pub fn accept(listener: BorrowedFd<'_>) -> io::Result<Self> {
        // SAFETY: accept4 is given no address to write.
        let fd = unsafe {
            libc::accept4(
                listener.as_raw_fd(),
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                libc::SOCK_CLOEXEC,
            )
        };
        let fd = Errno::result(fd)?;
        // SAFETY: the kernel has just made this descriptor for us.
        Self::from_fd(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Connects to a socket of this kind, without waiting: [`ChannelError::NotNow`] if the one who listens is too busy.
    pub fn connect(path: &std::path::Path) -> Result<Self, ChannelError> {
        use nix::sys::socket::{UnixAddr, connect, socket};
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(Self::own(fd))
    }

    fn own(socket: OwnedFd) -> Self {
        Self { socket, buffer: Vec::new() }
    }

    /// Send and receive fail with [`ChannelError::NotNow`] after so many seconds; 0 is never.
    pub fn set_timeouts(&self, send_seconds: i64, receive_seconds: i64) -> io::Result<()> {
        self.set_send_timeout(send_seconds)?;
        setsockopt(&self.socket, sockopt::ReceiveTimeout, &TimeVal::seconds(receive_seconds))?;
        Ok(())
    }

    /// Send fails with [`ChannelError::NotNow`] after so many seconds.
    pub fn set_send_timeout(&self, seconds: i64) -> io::Result<()> {
        Ok(setsockopt(&self.socket, sockopt::SendTimeout, &TimeVal::seconds(seconds))?)
    }

    /// From now on nothing waits: [`ChannelError::NotNow`] instead.
    ///
    /// By ioctl(2), which does this and nothing else: who may set flags by fcntl(2) may also take `O_APPEND` off the file
    /// with the records.
    pub fn set_nonblocking(&self) -> io::Result<()> {
        let on: libc::c_int = 1;
        // SAFETY: the kernel reads one int.
        Errno::result(unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::FIONBIO, &raw const on) })?;
        Ok(())
    }

    /// Sends one message with its descriptors.
    pub fn send<T: Serialize + Message>(
        &self,
        message: &T,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        assert_eq!(message.fds(), fds.len(), "a message goes with exactly its descriptors");
        let bytes = codec::encode(message).map_err(|e| ChannelError::Protocol(e.to_string()))?;
        self.send_bytes(&bytes, fds)
    }

    /// Sends raw bytes as one datagram. Tests use it to be a peer that breaks the rules.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let rights = if raw.is_empty() { &rights[..0] } else { &rights[..] };
        loop {
            match sendmsg::<()>(
                self.socket.as_raw_fd(),
                &[IoSlice::new(bytes)],
                rights,
                MsgFlags::MSG_NOSIGNAL,
                None,
            ) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Receives one message with its descriptors.
    pub fn recv<T: DeserializeOwned + Message>(&mut self) -> Result<(T, Vec<OwnedFd>), ChannelError> {
        if self.buffer.is_empty() {
            // Made in one piece, its pages are the kernel's until something is received into them.
            self.buffer = vec![0; MAX_MESSAGE];
        }
        let got = receive(self.socket.as_fd(), &mut self.buffer, MsgFlags::empty())?;
        if got.truncated {
            return Err(ChannelError::Protocol("a datagram or its descriptors were cut short".into()));
        }
        if got.len == 0 {
            return Err(ChannelError::Closed);
        }
        let message: T =
            codec::decode(&self.buffer[..got.len]).map_err(|e| ChannelError::Protocol(e.to_string()))?;
        if message.fds() != got.fds.len() {
            let why = format!("{} descriptors where {} belong", got.fds.len(), message.fds());
            return Err(ChannelError::Protocol(why));
        }
        Ok((message, got.fds))
    }

    /// Hands one descriptor to a trusted peer that waits for just that ([`Channel::take_over`]).
    pub fn hand_over(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        use passfd::FdPassingExt;
        self.socket.as_raw_fd().send_fd(fd.as_raw_fd())
    }

    /// Receives the one descriptor of [`Channel::hand_over`]. Only for a peer at least as trusted as we are:
    /// passfd leaks a second descriptor if the peer sends two.
    pub fn take_over(&self) -> Result<OwnedFd, ChannelError> {
        use passfd::FdPassingExt;
        let fd = self.socket.as_raw_fd().recv_fd().map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => ChannelError::NotNow,
            io::ErrorKind::UnexpectedEof => ChannelError::Closed,
            _ => ChannelError::Io(error),
        })?;
        // SAFETY: passfd returned the number of a descriptor that the kernel has just installed for us.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> OwnedFd {
        channel.socket
    }
}

/// Takes ownership of a descriptor that the parent process left open for us, and makes it close-on-exec.
pub fn inherited_fd(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD touches no memory; it tells whether the number is open at all.
    Errno::result(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: the number is open, and by contract of the process start nothing in this process owns it yet.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `SO_PEERGROUPS` of a connected Unix socket; nix does not wrap it.
pub fn peer_groups(socket: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    // 65,536 is NGROUPS_MAX, so a second call is always enough.
    let mut groups = vec![0u32; 64];
    for _ in 0..2 {
        let mut bytes =
            libc::socklen_t::try_from(size_of_val(groups.as_slice())).map_err(io::Error::other)?;
        // SAFETY: the kernel writes at most `bytes` bytes to `groups`, whose length that is, and the needed
        // length to `bytes`; both live through the call.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut bytes,
            )
        };
        groups.resize(bytes as usize / size_of::<u32>(), 0);
        match Errno::result(result) {
            Ok(_) => return Ok(groups),
            Err(Errno::ERANGE) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Err(io::Error::other("the group list of the peer changes while it is read"))
}

/// Sends bytes to a stream socket, with descriptors that arrive with the first of them. Gives how many were taken.
pub fn send_stream(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let rights = if raw.is_empty() { &rights[..0] } else { &rights[..] };
    sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(bytes)],
        rights,
        MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
        None,
    )
}

/// The bytes that the peer of a Unix stream has not read yet (`SIOCOUTQ`).
pub fn unread_by_peer(socket: BorrowedFd<'_>) -> Result<usize, Errno> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the kernel writes one int to `bytes`.
    Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) })?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}

/// Tells the kernel that peers of this listening socket may not send descriptors (`SO_PASSRIGHTS`, Linux 6.16).
/// Gives whether this kernel knows it; where it does not, whoever receives must close what came.
pub fn refuse_descriptors(listener: BorrowedFd<'_>) -> bool {
    #![allow(clippy::cast_possible_truncation)] // the size of an int
    const SO_PASSRIGHTS: libc::c_int = 83; // include/uapi/asm-generic/socket.h
    let off: libc::c_int = 0;
    let size = const { size_of::<libc::c_int>() as libc::socklen_t };
    // SAFETY: the kernel reads one int, whose size it is told.
    let result = unsafe {
        libc::setsockopt(listener.as_raw_fd(), libc::SOL_SOCKET, SO_PASSRIGHTS, (&raw const off).cast(), size)
    };
    result == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Note {
        text: String,
        fds: usize,
    }
    impl Message for Note {
        fn fds(&self) -> usize {
            self.fds
        }
    }
    fn note(text: &str, fds: usize) -> Note {
        Note { text: text.into(), fds }
    }

    #[test]
    fn a_message_travels_with_its_descriptors() {
        let (a, mut b) = Channel::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        a.send(&note("x", 2), &[file.as_fd(), file.as_fd()]).unwrap();
        let (got, fds) = b.recv::<Note>().unwrap();
        assert_eq!((got.text.as_str(), fds.len()), ("x", 2));
        let flags = nix::fcntl::fcntl(&fds[0], nix::fcntl::FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
    }

    #[test]
    fn another_kind_of_socket_is_no_channel() {
        let (stream, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(Channel::from_fd(stream.into()).is_err());
        assert!(Channel::from_fd(std::fs::File::open("/dev/null").unwrap().into()).is_err());
        assert!(Channel::inherited(9999).is_err());
    }
}
