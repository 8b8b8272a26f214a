//! A client that bypasses the client library.

use crate::gate::Gate;
use crate::user::Who;
use crate::witness::Witness;
use bpfgate_protocol::channel::{receive, send_stream};
use nix::errno::Errno;
use nix::sys::socket::MsgFlags;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// A connection on which anything can be sent.
pub struct Raw {
    /// The connection.
    pub stream: UnixStream,
    unread: Vec<u8>,
    fds: Vec<OwnedFd>,
    witness: Option<Witness>,
    /// Calls that have no reply yet; none once something else was sent, whose replies nobody can tell apart.
    asked: Option<VecDeque<(String, Value)>>,
}

/// An error that came as a reply.
#[derive(Debug, Clone, PartialEq)]
pub struct Refused {
    /// Its whole name.
    pub error: String,
    /// Its parameters.
    pub parameters: Value,
}

impl Raw {
    /// Connects as `who`.
    pub fn connect(gate: &Gate, who: &Who) -> Self {
        Self { witness: gate.witness(who), ..Self::on(gate.connect(who)) }
    }

    /// Speaks on a connection that exists.
    pub fn on(stream: UnixStream) -> Self {
        // Longer than the broker waits for anything that these tests do.
        stream.set_read_timeout(Some(Duration::from_secs(20) * crate::slowness())).expect("a timeout");
        let (unread, fds, asked) = (Vec::new(), Vec::new(), Some(VecDeque::new()));
        Self { stream, unread, fds, witness: None, asked }
    }

    /// Connects as [`USER`](crate::USER) and opens `app`.
    pub fn open(gate: &Gate, app: &str) -> Self {
        let mut raw = Self::connect(gate, &crate::USER);
        raw.done("Open", &json!({ "app": app }));
        raw
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.asked = None;
        self.stream.write_all(bytes)
    }

    /// Sends bytes with descriptors.
    pub fn send_with(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
        send_stream(self.stream.as_fd(), bytes, fds)
    }

    /// The next reply as text, and its descriptors; `None` at the end of the connection.
    pub fn receive(&mut self) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
        loop {
            if let Some(end) = self.unread.iter().position(|&byte| byte == 0) {
                let rest = self.unread.split_off(end + 1);
                let mut text = std::mem::replace(&mut self.unread, rest);
                text.pop();
                return Some((text, std::mem::take(&mut self.fds)));
            }
            let mut buffer = vec![0; 65536];
            let got = match receive(self.stream.as_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(got) => got,
                Err(Errno::ECONNRESET) => return None,
                Err(errno) => panic!("no reply: {errno}"),
            };
            assert!(!got.truncated, "descriptors were lost");
            if got.len == 0 {
                return None;
            }
            self.unread.extend_from_slice(&buffer[..got.len]);
            self.fds.extend(got.fds);
        }
    }

    /// The next reply, which must be one.
    pub fn reply(&mut self) -> Result<(Value, Vec<OwnedFd>), Refused> {
        let (text, fds) = self.receive().expect("a reply before the end of the connection");
        let mut reply: Value = serde_json::from_slice(&text).expect("a reply is JSON");
        let oldest = self.asked.as_mut().and_then(VecDeque::pop_front);
        if let (Some(witness), Some((method, asked))) = (&mut self.witness, oldest) {
            witness.told(&method, &asked, &reply);
        }
        let parameters = reply["parameters"].take();
        match reply["error"].as_str() {
            None => Ok((parameters, fds)),
            Some(error) => {
                assert!(fds.is_empty(), "descriptors go with an error");
                Err(Refused { error: error.to_owned(), parameters })
            }
        }
    }

    /// Sends a call without waiting for its reply. A method without a dot is one of `io.bpfgate`.
    pub fn ask(&mut self, method: &str, parameters: &Value) {
        self.stream.write_all(&frame(method, parameters)).expect("the broker reads");
        if let Some(asked) = &mut self.asked {
            asked.push_back((method.to_owned(), parameters.clone()));
        }
    }

    /// Makes a call.
    pub fn call(&mut self, method: &str, parameters: &Value) -> Result<(Value, Vec<OwnedFd>), Refused> {
        self.ask(method, parameters);
        self.reply()
    }

    /// Makes a call that must succeed.
    pub fn done(&mut self, method: &str, parameters: &Value) -> (Value, Vec<OwnedFd>) {
        self.call(method, parameters).unwrap_or_else(|refused| panic!("{method} {parameters}: {refused:?}"))
    }

    /// Makes a call that must be refused with this error of `io.bpfgate`; gives its parameters.
    pub fn refused(&mut self, method: &str, parameters: &Value, error: &str) -> Value {
        match self.call(method, parameters) {
            Ok((reply, _)) => panic!("{method} {parameters} succeeds: {reply}"),
            Err(refused) => {
                assert_eq!(refused.error, format!("io.bpfgate.{error}"), "{method}: {}", refused.parameters);
                refused.parameters
            }
        }
    }

    /// Loads an object; gives the instance.
    pub fn load(&mut self, object: &str) -> u64 {
        let (reply, _) = self.done("Load", &json!({ "object": object }));
        reply["instance"].as_u64().expect("an instance")
    }

    /// Asserts that the broker ends the connection, after at most this many replies.
    pub fn is_closed_after(&mut self, replies: usize) {
        for _ in 0..replies {
            if self.receive().is_none() {
                return;
            }
        }
        assert!(self.receive().is_none(), "the connection goes on");
    }
}

/// A call as it is sent. A method without a dot is one of `io.bpfgate`.
pub fn frame(method: &str, parameters: &Value) -> Vec<u8> {
    let method = if method.contains('.') { method.to_owned() } else { format!("io.bpfgate.{method}") };
    let mut bytes = json!({ "method": method, "parameters": parameters }).to_string().into_bytes();
    bytes.push(0);
    bytes
}
