//! One client: bytes in, bytes and descriptors out, and how much of either may pile up.

use bpfgate_protocol::authorize::Permit;
use bpfgate_protocol::channel::{receive, send_stream, unread_by_peer};
use bpfgate_protocol::identity::Peer;
use bpfgate_protocol::messages::SessionId;
use bpfgate_protocol::names::AppName;
use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{MsgFlags, Shutdown, shutdown};
use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// The largest request in bytes.
pub(crate) const MAX_REQUEST: usize = 64 * 1024;

/// How long a client may take to say which app it is.
const HELLO: Duration = Duration::from_secs(30);
/// How long half a request may stay half, and how long a reply may stay unread.
const STALLED: Duration = Duration::from_secs(10);
/// How long to wait before looking again whether the client took its descriptors.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// The same, for a connection that is over but for descriptors that nobody has read.
const LINGER: Duration = Duration::from_secs(1);

pub(crate) struct Connection {
    socket: OwnedFd,
    pub(crate) uid: u32,
    /// It came through the administrator's door: it has no session, and asks for other things.
    pub(crate) admin: bool,
    /// Requests that are not complete, or not looked at yet. Empty and without memory while the client is idle.
    input: Vec<u8>,
    output: VecDeque<Output>,
    /// A request is with the helper.
    pub(crate) busy: bool,
    /// The client will send nothing more.
    ended: bool,
    /// Nothing more is read; the connection ends when the last reply is out.
    pub(crate) closing: bool,
    /// Epoll does not know it any more.
    pub(crate) lingering: bool,
    /// Descriptors are on their way: until the client has read them, no others follow.
    fds_under_way: bool,
    pub(crate) session: Option<Box<Session>>,
    /// What epoll was told to wait for, and when this connection is looked at anew.
    pub(crate) interest: EpollFlags,
    pub(crate) armed: Option<Instant>,
    connected: Instant,
    /// Since when input is half a request, or output is not taken.
    stalled: Option<Instant>,
}

/// Which app a connection is for.
pub(crate) struct Session {
    pub(crate) app: AppName,
    pub(crate) id: SessionId,
    pub(crate) peer: Peer,
    /// Set when the helper has said yes.
    pub(crate) permit: Option<Permit>,
    /// The policy in force has no entry for this client any more: it ends when the helper has heard of it too.
    pub(crate) revoked: bool,
}

struct Output {
    bytes: Vec<u8>,
    sent: usize,
    fds: Vec<OwnedFd>,
}

/// Why a connection ends now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The client is gone, or everything is said.
    Quiet,
    /// The client sent descriptors, which nobody wants.
    Descriptors,
}

/// What the next complete request is.
pub(crate) enum Next {
    Request(Vec<u8>),
    TooLong,
    Nothing,
}

impl Connection {
    pub(crate) fn new(socket: OwnedFd, uid: u32, admin: bool) -> Self {
        Self {
            socket,
            uid,
            admin,
            input: Vec::new(),
            output: VecDeque::new(),
            busy: false,
            ended: false,
            closing: false,
            lingering: false,
            fds_under_way: false,
            session: None,
            interest: EpollFlags::EPOLLIN,
            armed: None,
            connected: Instant::now(),
            stalled: None,
        }
    }

    /// Takes what the client sent, at most one buffer of it.
    pub(crate) fn fill(&mut self, buffer: &mut [u8]) -> Result<(), End> {
        match receive(self.socket.as_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(got) if !got.fds.is_empty() || got.truncated => Err(End::Descriptors),
            Ok(got) if got.len == 0 => {
                self.ended = true;
                Ok(())
            }
            Ok(got) => {
                self.input.extend_from_slice(&buffer[..got.len]);
                Ok(())
            }
            Err(Errno::EAGAIN) => Ok(()),
            Err(_) => Err(End::Quiet),
        }
    }

    /// The next request, if there is a whole one and no other is under way.
    pub(crate) fn next(&mut self) -> Next {
        // One reply at a time: a client that does not read its replies gets no new ones made.
        if self.busy || self.closing || !self.output.is_empty() {
            return Next::Nothing;
        }
        match self.input.iter().position(|&byte| byte == 0) {
            Some(end) if end < MAX_REQUEST => {
                let rest = self.input.split_off(end + 1);
                let mut request = std::mem::replace(&mut self.input, rest);
                request.pop();
                if self.input.is_empty() {
                    self.input = Vec::new();
                }
                Next::Request(request)
            }
            None if self.input.len() < MAX_REQUEST => Next::Nothing,
            _ => Next::TooLong,
        }
    }

    pub(crate) fn push(&mut self, bytes: Vec<u8>, fds: Vec<OwnedFd>) {
        self.output.push_back(Output { bytes, sent: 0, fds });
    }

    /// Sends what the client takes.
    pub(crate) fn flush(&mut self) -> Result<(), End> {
        while let Some(output) = self.output.front_mut() {
            if !output.fds.is_empty() && self.fds_under_way {
                let unread = unread_by_peer(self.socket.as_fd()).map_err(|_| End::Quiet)?;
                if unread > 0 {
                    break;
                }
                self.fds_under_way = false;
            }
            let fds: Vec<BorrowedFd<'_>> = output.fds.iter().map(AsFd::as_fd).collect();
            match send_stream(self.socket.as_fd(), &output.bytes[output.sent..], &fds) {
                Ok(sent) => {
                    // Descriptors went with the first byte.
                    self.fds_under_way |= !output.fds.is_empty();
                    output.fds.clear();
                    output.sent += sent;
                    self.stalled = None;
                    if output.sent == output.bytes.len() {
                        self.output.pop_front();
                    }
                }
                Err(Errno::EAGAIN) => break,
                // Too many descriptors of ours are on their way to clients that do not read. Later.
                Err(Errno::ETOOMANYREFS) => {
                    self.fds_under_way = true;
                    break;
                }
                Err(Errno::EINTR) => {}
                Err(_) => return Err(End::Quiet),
            }
        }
        let over =
            self.output.is_empty() && (self.closing || (self.ended && !self.busy && !self.has_request()));
        // Descriptors that nobody reads count against all that we may have on their way: while they do, the connection
        // counts against its user.
        if over && self.may_forget() { Err(End::Quiet) } else { Ok(()) }
    }

    /// Nothing more is said or heard; but while descriptors of ours are on their way, it counts against its user. Gives
    /// whether that is so.
    pub(crate) fn linger(&mut self) -> bool {
        self.input = Vec::new();
        self.output.clear();
        self.busy = false;
        self.closing = true;
        self.session = None;
        self.shut_down();
        self.lingering = !self.may_forget();
        self.lingering
    }

    /// The client sees the end now, and so does a helper that holds the socket too. What was sent can still be read.
    fn shut_down(&self) {
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
    }

    /// Whether no descriptor of ours is still on its way to this client.
    fn may_forget(&mut self) -> bool {
        if self.fds_under_way && unread_by_peer(self.socket.as_fd()).is_ok_and(|unread| unread > 0) {
            return false;
        }
        self.fds_under_way = false;
        true
    }

    /// Whether a whole request waits.
    pub(crate) fn has_request(&self) -> bool {
        self.input.contains(&0)
    }

    /// What to wait for now.
    pub(crate) fn wanted(&self) -> EpollFlags {
        let mut flags = EpollFlags::empty();
        flags.set(EpollFlags::EPOLLIN, self.wants_input());
        flags.set(EpollFlags::EPOLLOUT, self.wants_output());
        flags
    }

    /// Whether to look for more input.
    fn wants_input(&self) -> bool {
        !self.ended && !self.closing && self.output.is_empty() && self.input.len() < MAX_REQUEST
    }

    /// Whether to wait until the client takes more.
    fn wants_output(&self) -> bool {
        self.output.front().is_some_and(|output| output.fds.is_empty() || !self.fds_under_way)
    }

    /// When this connection is to be looked at again, and whether it is too late then.
    pub(crate) fn deadline(&mut self, now: Instant) -> Option<(Instant, bool)> {
        if self.busy && self.output.is_empty() {
            // The helper has a deadline of its own.
            self.stalled = None;
            return None;
        }
        if self.output.is_empty() && (self.closing || self.ended) {
            return Some((now + LINGER, false));
        }
        if self.output.is_empty() && self.input.is_empty() {
            self.stalled = None;
            return self.session.is_none().then(|| (self.connected + HELLO, true));
        }
        let late = *self.stalled.get_or_insert(now) + STALLED;
        let waits_for_reader = !self.output.is_empty() && !self.wants_output();
        if waits_for_reader && now + LOOK_AGAIN < late {
            Some((now + LOOK_AGAIN, false))
        } else {
            Some((late, true))
        }
    }

    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.shut_down();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    fn pair() -> (UnixStream, Connection) {
        let (client, server) = UnixStream::pair().unwrap();
        (client, Connection::new(server.into(), 1, false))
    }

    fn requests(connection: &mut Connection) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        while let Next::Request(request) = connection.next() {
            all.push(request);
        }
        all
    }

    #[test]
    fn requests_are_cut_at_zero_bytes_wherever_the_pieces_end() {
        let text = b"one\0two\0\0three\0rest";
        for cut in 0..text.len() {
            let (mut client, mut connection) = pair();
            let mut buffer = vec![0; 64];
            for piece in [&text[..cut], &text[cut..]] {
                client.write_all(piece).unwrap();
                connection.fill(&mut buffer).unwrap();
            }
            assert_eq!(requests(&mut connection), [&b"one"[..], b"two", b"", b"three"]);
            assert_eq!(connection.input, b"rest");
        }
    }

    #[test]
    fn a_request_has_at_most_64_kib() {
        let (mut client, mut connection) = pair();
        let mut buffer = vec![0; MAX_REQUEST];
        for (len, fits) in [(MAX_REQUEST - 1, true), (MAX_REQUEST, false)] {
            let mut bytes = vec![b'x'; len];
            bytes.push(0);
            client.write_all(&bytes).unwrap();
            for _ in 0..4 {
                connection.fill(&mut buffer).unwrap();
            }
            match connection.next() {
                Next::Request(request) => assert!(fits && request.len() == len),
                Next::TooLong => assert!(!fits),
                Next::Nothing => panic!("nothing"),
            }
        }
    }

    #[test]
    fn the_second_reply_with_descriptors_waits_for_the_reader() {
        let (client, mut connection) = pair();
        let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        for _ in 0..2 {
            connection.push(b"x\0".to_vec(), vec![null()]);
            connection.flush().unwrap();
        }
        assert_eq!(connection.output.len(), 1);
        assert!(!connection.wants_output());
        assert!(matches!(connection.deadline(Instant::now()), Some((_, false))));
        let got = receive(client.as_fd(), &mut [0; 2], MsgFlags::empty()).unwrap();
        assert_eq!(got.fds.len(), 1);
        connection.flush().unwrap();
        assert!(connection.output.is_empty());
    }

    #[test]
    fn descriptors_from_a_client_end_the_connection() {
        let (client, mut connection) = pair();
        let null = std::fs::File::open("/dev/null").unwrap();
        send_stream(client.as_fd(), b"x", &[null.as_fd()]).unwrap();
        assert_eq!(connection.fill(&mut [0; 8]), Err(End::Descriptors));
    }

    #[test]
    fn a_client_that_shut_down_gets_its_reply_first() {
        let (client, mut connection) = pair();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        connection.fill(&mut [0; 8]).unwrap();
        connection.busy = true;
        assert_eq!(connection.flush(), Ok(()));
        connection.busy = false;
        connection.push(b"x\0".to_vec(), vec![]);
        assert_eq!(connection.flush(), Err(End::Quiet));
        let mut got = [0; 2];
        assert_eq!(nix::unistd::read(&client, &mut got), Ok(2));
    }
}
