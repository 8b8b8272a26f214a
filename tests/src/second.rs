//! Another broker in the namespaces of a gate, started otherwise than a gate starts its own.

use crate::gate::{Gate, bin_dir};
use crate::raw::Raw;
use crate::user::{Who, as_user};
use crate::{SOON, wait_until};
use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// A broker beside that of a gate, with the same policies; it ends with this.
pub struct Second {
    /// The process, or what started it.
    pub child: Child,
    /// Where it listens.
    pub socket: PathBuf,
    /// Its audit records.
    pub audit: PathBuf,
    log: PathBuf,
}

impl Second {
    /// Starts one by a command such as `prlimit --nofile=64`, with further arguments.
    pub fn start(gate: &Gate, by: &[&str], arguments: &[&str]) -> Self {
        let [socket, audit, log] =
            ["socket", "audit", "log"].map(|name| gate.dir.join(format!("second-{name}")));
        let inside = gate.inside(bin_dir().join("bpfgate-broker"));
        let mut command = match by {
            [] => Command::new(inside.get_program()),
            [program, words @ ..] => {
                let mut command = Command::new(program);
                command.args(words).arg(inside.get_program());
                command
            }
        };
        command.args(inside.get_args()).arg("--standalone").arg("--policies").arg(gate.dir.join("policies"));
        command.args(arguments);
        let [socket, audit] = [("--socket", socket), ("--audit", audit)].map(|(flag, path)| {
            if let Some(place) = arguments.iter().position(|word| *word == flag) {
                return arguments[place + 1].into();
            }
            command.arg(flag).arg(&path);
            path
        });
        let out = File::options().append(true).create(true).open(&log).expect("the log");
        let child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(out).spawn().expect("nsenter is there");
        Self { child, socket, audit, log }
    }

    /// Waits until it listens.
    #[must_use]
    pub fn listens(self) -> Self {
        let there = || UnixStream::connect(&self.socket).is_ok();
        assert!(wait_until(Duration::from_secs(10), there), "it does not listen:\n{}", self.log());
        self
    }

    /// What it wrote to standard error.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Its process id: what starts it becomes it.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// A client that is `who`.
    pub fn connect(&self, who: &Who) -> Raw {
        Raw::on(as_user(who, || UnixStream::connect(&self.socket)).expect("it listens"))
    }

    /// Its exit code, which it has to come to by itself.
    pub fn ends(&mut self) -> Option<i32> {
        let mut status = None;
        let ended = wait_until(Duration::from_secs(10), || {
            status = self.child.try_wait().expect("it is a child of the test");
            status.is_some()
        });
        assert!(ended, "it goes on:\n{}", self.log());
        status.and_then(|status| status.code())
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("the log of the second broker:\n{}", self.log());
        }
        // Helpers end with their broker; the spawner waits for them.
        std::thread::sleep(SOON / 10);
    }
}
