//! The command line `bpfgate` as an unprivileged user.

use crate::{Gate, SOON, USER, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::io::{BufReader, Read};
use std::process::{Child, Command, Stdio};

/// A command that ended: its exit code and what it printed.
#[derive(Debug)]
pub struct Ended {
    /// `None` if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Ended {
    /// Runs a command to its end.
    pub fn of(command: &mut Command) -> Self {
        let output = command.stdin(Stdio::null()).output().expect("setpriv is there");
        let text = |bytes| String::from_utf8(bytes).expect("what bpfgate prints is text");
        Self { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }

    /// What it printed, as JSON, if all went well.
    pub fn json(&self) -> Value {
        assert_eq!(self.code, Some(0), "{self:?}");
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// Runs `bpfgate` with these words.
pub fn run(gate: &Gate, line: &str) -> Ended {
    Ended::of(&mut gate.cli(&USER, line))
}

/// A `bpfgate` that goes on until it is told to end.
pub struct Running(pub Child);

impl Running {
    /// Starts one; gives the JSON value that it prints first.
    pub fn start(gate: &Gate, line: &str) -> (Self, Value) {
        let mut command = gate.cli(&USER, line);
        let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("setpriv is there");
        let out = BufReader::new(child.stdout.take().expect("a pipe"));
        let first = serde_json::Deserializer::from_reader(out).into_iter().next();
        let running = Self(child);
        match first {
            Some(Ok(value)) => (running, value),
            other => panic!("{line}: {other:?}, {:?}\n{}", running.end(), gate.log()),
        }
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id().cast_signed()), signal).expect("it is a child of the test");
    }

    /// Its exit code and what it said on the way out; it must not take long.
    pub fn end(mut self) -> (Option<i32>, String) {
        let mut code = None;
        let ended = wait_until(2 * SOON, || {
            code = self.0.try_wait().expect("it is a child of the test");
            code.is_some()
        });
        assert!(ended, "it goes on");
        let mut err = String::new();
        let pipe = self.0.stderr.as_mut().expect("a pipe");
        pipe.read_to_string(&mut err).expect("what bpfgate prints is text");
        (code.and_then(|code| code.code()), err)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
