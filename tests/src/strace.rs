//! strace: what processes of bpfgate call, and calls that fail where the test wants it.

use crate::{SOON, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// The words that start a program under strace; every process below it is followed. Arguments are numbers, but for those
/// of exec, so that they can be compared with rules.
pub fn words(out: &Path) -> Vec<String> {
    let out = out.display().to_string();
    let words =
        ["strace", "-f", "-q", "-s", "64", "-e", "raw=!execve,execveat", "-e", "signal=none", "-o", &out];
    words.map(str::to_owned).to_vec()
}

/// A call as strace writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line<'a> {
    /// Who makes it.
    pub pid: i32,
    /// Its name.
    pub name: &'a str,
    /// What stands between the parentheses, as far as it was known when the call was made.
    pub arguments: &'a str,
    /// What it gave, if that stands on the same line, or the end of a line that was interrupted.
    pub result: Option<&'a str>,
}

/// The calls of a trace, in their order. The second half of a call that was interrupted by another one's line comes with an
/// empty list of arguments.
pub fn lines(text: &str) -> impl Iterator<Item = Line<'_>> {
    text.lines().filter_map(|line| {
        let (pid, rest) = line.split_once(' ')?;
        let (pid, rest) = (pid.parse().ok()?, rest.trim_start());
        let result = rest.rsplit_once(" = ").map(|(_, result)| result);
        if let Some(resumed) = rest.strip_prefix("<... ") {
            let (name, _) = resumed.split_once(' ')?;
            return Some(Line { pid, name, arguments: "", result });
        }
        let (name, rest) = rest.split_once('(')?;
        let end = rest.find(" <unfinished").or_else(|| rest.rfind(')')).unwrap_or(rest.len());
        Some(Line { pid, name, arguments: rest.get(..end)?, result })
    })
}

/// Watches one process that runs, until it is dropped.
pub struct Strace {
    child: Child,
    out: PathBuf,
}

impl Strace {
    /// Follows a process and nothing that it starts; with further arguments.
    pub fn attach(pid: i32, arguments: &[String], directory: &Path) -> Self {
        let [out, log] = ["strace", "strace.log"].map(|name| directory.join(name));
        let mut command = Command::new("strace");
        command.args(["-p", &pid.to_string(), "-o"]).arg(&out).args(arguments);
        let errors = File::create(&log).expect("the log of strace");
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
        let child = child.spawn().expect("strace is installed by `make deps`");
        let attached = || fs::read_to_string(&log).is_ok_and(|text| text.contains("attached"));
        assert!(wait_until(5 * SOON, attached), "strace: {:?}", fs::read_to_string(&log));
        Self { child, out }
    }

    /// Lets go of the process; gives what was seen.
    pub fn end(mut self) -> String {
        self.let_go();
        fs::read_to_string(&self.out).unwrap_or_default()
    }

    fn let_go(&mut self) {
        // By itself it ends with the process.
        let _ = kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        self.let_go();
    }
}
