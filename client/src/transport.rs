//! Varlink on a Unix stream socket: JSON texts that end with a zero byte, one reply per request.
//!
//! The broker is trusted with the app's maps, not with this process's memory or descriptor table:
//! lengths are bounded, and every descriptor that a reply does not name is closed and an error.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, send};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Refusal};
use bpfgate_protocol::channel::receive;

/// The broker reads no longer request; saying so here saves the round trip.
const MAX_REQUEST: usize = 64 * 1024;

/// A verifier log of 1 MiB, whose every byte JSON may have to write as `\u0000`, and the rest.
const MAX_REPLY: usize = 8 * 1024 * 1024;

/// The broker's own deadlines are shorter, so its answer comes first unless it hangs.
const TIMEOUT: Duration = Duration::from_secs(120);

const CHUNK: usize = 64 * 1024;

/// What [`Connection::notify_after`] calls.
type Notice = Box<dyn FnMut() + Send>;

/// What [`Connection::observe`] calls.
pub(crate) type Observer = Box<dyn FnMut(&[u8], &[u8]) + Send>;

/// A connection on which one request is under way at a time.
pub(crate) struct Connection {
    stream: UnixStream,
    timeout: Option<Duration>,
    notice: Option<(Duration, Notice)>,
    observer: Option<Observer>,
    chunk: Vec<u8>,
    /// A request was given up, so the next bytes may be the answer to that one.
    broken: bool,
}

/// The descriptors that came with a reply, to be taken by their index.
#[derive(Debug, Default)]
pub(crate) struct Fds(Vec<Option<OwnedFd>>);

#[derive(Serialize)]
struct Request<'a, P> {
    method: &'a str,
    parameters: &'a P,
}

/// What a reply may consist of. A struct would be read from a JSON array too, so the text is parsed
/// as an object first.
#[derive(Deserialize)]
struct Reply {
    #[serde(default)]
    parameters: serde_json::Map<String, Value>,
    #[serde(default)]
    error: Option<String>,
    #[serde(default)]
    continues: bool,
}

impl Connection {
    pub(crate) fn new(stream: UnixStream) -> Self {
        let timeout = Some(TIMEOUT);
        Self { stream, timeout, notice: None, observer: None, chunk: Vec::new(), broken: false }
    }

    /// How long to wait for each reply; `None` waits for ever.
    pub(crate) fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.timeout = timeout;
    }

    /// Calls `notice` once for each reply that takes longer than `after`.
    pub(crate) fn notify_after(&mut self, after: Duration, notice: Notice) {
        self.notice = Some((after, notice));
    }

    /// Calls `observer` with the text of each request and that of its reply.
    pub(crate) fn observe(&mut self, observer: Observer) {
        self.observer = Some(observer);
    }

    /// Sends one request and waits for its reply.
    ///
    /// After any error but a refusal the connection cannot be used any more.
    pub(crate) fn call<P: Serialize, R: DeserializeOwned>(
        &mut self,
        method: &str,
        parameters: &P,
    ) -> Result<(R, Fds), Error> {
        if self.broken {
            return Err(Error::Protocol("this connection failed before, connect again".to_owned()));
        }
        let mut text = serde_json::to_vec(&Request { method, parameters })
            .map_err(|error| Error::Protocol(format!("the request cannot be written as JSON: {error}")))?;
        text.push(0);
        if text.len() > MAX_REQUEST {
            let message = format!("it has {} bytes, the broker reads {MAX_REQUEST}", text.len());
            return Err(Error::Invalid(Refusal { message, request: String::new() }));
        }
        self.broken = true;
        self.send(&text)?;
        let request = text;
        let (text, fds) = self.receive()?;
        if let Some(observer) = &mut self.observer {
            observer(request.strip_suffix(&[0]).unwrap_or(&request), &text);
        }
        let object: serde_json::Map<_, _> =
            serde_json::from_slice(&text).map_err(|error| not_json(&error))?;
        let reply = Reply::deserialize(Value::Object(object)).map_err(|error| not_json(&error))?;
        if reply.continues {
            return Err(Error::Protocol("the broker announced a second reply that nobody asked for".into()));
        }
        self.broken = false;
        let parameters = Value::Object(reply.parameters);
        if let Some(name) = reply.error {
            return Err(Error::from_reply(&name, &parameters));
        }
        let parameters = R::deserialize(parameters).map_err(|error| not_json(&error))?;
        Ok((parameters, Fds(fds.into_iter().map(Some).collect())))
    }

    fn send(&self, mut text: &[u8]) -> Result<(), Error> {
        while !text.is_empty() {
            match send(self.stream.as_raw_fd(), text, MsgFlags::MSG_NOSIGNAL) {
                Ok(sent) => text = &text[sent..],
                Err(Errno::EINTR) => {}
                // A broker that refuses a connection answers and closes without reading.
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Ok(()),
                Err(errno) => return Err(Error::io("sending the request")(errno.into())),
            }
        }
        Ok(())
    }

    /// Receives one reply, without its zero byte.
    fn receive(&mut self) -> Result<(Vec<u8>, Vec<OwnedFd>), Error> {
        // Kept from reply to reply: clearing a fresh one takes longer than a short reply.
        let mut chunk = std::mem::take(&mut self.chunk);
        chunk.resize(CHUNK, 0);
        let received = self.receive_into(&mut chunk);
        self.chunk = chunk;
        received
    }

    fn receive_into(&mut self, chunk: &mut [u8]) -> Result<(Vec<u8>, Vec<OwnedFd>), Error> {
        let started = Instant::now();
        let mut noticed = false;
        let mut text = Vec::new();
        let mut fds = Vec::new();
        loop {
            self.wait(started, &mut noticed)?;
            let got =
                match receive(self.stream.as_fd(), chunk, MsgFlags::MSG_DONTWAIT).map_err(io::Error::from) {
                    Ok(got) => got,
                    Err(error) => match error.kind() {
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => continue,
                        io::ErrorKind::ConnectionReset => return Err(Error::io(RECEIVING)(closed())),
                        _ => return Err(Error::io(RECEIVING)(error)),
                    },
                };
            if got.truncated {
                return Err(Error::Io { doing: RECEIVING, source: Errno::EMFILE.into() });
            }
            if got.len == 0 {
                return Err(Error::io(RECEIVING)(closed()));
            }
            // One message holds as many as a reply may have. Whether they came with its first byte
            // cannot be told: the kernel joins a message with fds to earlier ones without.
            if !got.fds.is_empty() && !fds.is_empty() {
                return Err(Error::Protocol("descriptors came twice in one reply".to_owned()));
            }
            fds.extend(got.fds);
            let bytes = &chunk[..got.len];
            let end = bytes.iter().position(|byte| *byte == 0);
            text.extend_from_slice(&bytes[..end.unwrap_or(bytes.len())]);
            if text.len() > MAX_REPLY {
                return Err(Error::Protocol(format!("the reply is longer than {MAX_REPLY} bytes")));
            }
            match end {
                Some(end) if end + 1 == bytes.len() => return Ok((text, fds)),
                Some(_) => return Err(Error::Protocol("the broker sent more than one reply".to_owned())),
                None => {}
            }
        }
    }

    /// Waits until there is something to receive, or until the deadline.
    fn wait(&mut self, started: Instant, noticed: &mut bool) -> Result<(), Error> {
        loop {
            let passed = started.elapsed();
            let mut left = self.timeout.map(|timeout| timeout.saturating_sub(passed));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(Error::io(RECEIVING)(Errno::ETIMEDOUT.into()));
            }
            if let (Some((after, notice)), false) = (&mut self.notice, *noticed) {
                let until = after.saturating_sub(passed);
                if until.is_zero() {
                    notice();
                    *noticed = true;
                } else {
                    left = Some(left.map_or(until, |left| left.min(until)));
                }
            }
            let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, poll_timeout(left)) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(Error::io(RECEIVING)(errno.into())),
            }
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Fds {
    /// Takes the descriptor that an `fd` field names.
    pub(crate) fn take(&mut self, index: Option<usize>) -> Result<Option<OwnedFd>, Error> {
        let Some(index) = index else { return Ok(None) };
        match self.0.get_mut(index).and_then(Option::take) {
            Some(fd) => Ok(Some(fd)),
            None => Err(Error::Protocol(format!(
                "the reply names descriptor {index}, which did not come with it or is named twice"
            ))),
        }
    }

    /// Checks that the reply named every descriptor; those left are closed.
    pub(crate) fn finish(self) -> Result<(), Error> {
        match self.0.iter().flatten().count() {
            0 => Ok(()),
            left => Err(Error::Protocol(format!("{left} descriptors came that the reply does not name"))),
        }
    }
}

const RECEIVING: &str = "waiting for the broker's reply";

fn closed() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the broker closed the connection; its log says why (journalctl -u bpfgate)",
    )
}

fn not_json(error: &serde_json::Error) -> Error {
    Error::Protocol(format!("the broker's reply does not fit the interface: {error}"))
}

/// Rounds up, so that a wait never ends before its time and then spins.
pub(crate) fn poll_timeout(left: Option<Duration>) -> PollTimeout {
    match left {
        None => PollTimeout::NONE,
        Some(left) => {
            let millis = left.as_nanos().div_ceil(1_000_000);
            i32::try_from(millis).ok().and_then(|millis| millis.try_into().ok()).unwrap_or(PollTimeout::MAX)
        }
    }
}

#[cfg(test)]
#[path = "transport_tests.rs"]
mod tests;
