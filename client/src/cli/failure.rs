//! Everything that ends a command early, and with which exit code.

use std::io::{self, Write};
use std::process::ExitCode;

use bpfgate_client::Error;

use super::output;

/// Why a command ends without having done what was asked.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The broker refused, or cannot be reached.
    Client(Error),
    /// The arguments contradict what they are about, which only the broker's answer showed.
    Usage(String),
    /// Anything else.
    Failed(String),
    /// Whoever reads our output has had enough.
    Unread,
}

impl Failure {
    /// Prints the sentence and gives the exit code.
    pub(crate) fn report(self) -> ExitCode {
        match self {
            Self::Client(error) => {
                complain(&error.to_string());
                if let Error::Verifier { log, .. } = &error {
                    say(output::clean_lines(log).trim_end());
                }
                ExitCode::from(if matches!(error, Error::Unreachable { .. }) { 3 } else { 1 })
            }
            Self::Usage(sentence) => {
                complain(&sentence);
                ExitCode::from(2)
            }
            Self::Failed(sentence) => {
                complain(&sentence);
                ExitCode::from(1)
            }
            Self::Unread => ExitCode::SUCCESS,
        }
    }
}

/// One line on stderr, whatever a peer put into it.
pub(crate) fn complain(sentence: &str) {
    say(&format!("bpfgate: {}", output::clean(sentence)));
}

/// Not `eprintln`, which panics when nobody reads.
pub(crate) fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Client(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::Unread,
            _ => Self::Failed(error.to_string()),
        }
    }
}
