//! `bpfgate doctor`: whether this machine is as bpfgate needs it, and bpfgate as it should be.

pub(crate) mod facts;
pub(crate) mod host;
mod state;
mod units;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde::Serialize;
use serde_json::json;

use super::Outcome;
use super::args::StyleArgs;
use super::failure::Failure;
use super::output::{self, Style, Table};
use facts::Facts;

#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Look at the files of the machine below this directory; what only a running machine knows is left out
    #[arg(long, value_name = "DIRECTORY")]
    root: Option<PathBuf>,
    /// Exit with 1 for warnings too
    #[arg(long)]
    strict: bool,
    #[command(flatten)]
    style: StyleArgs,
}

/// How something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    Ok,
    /// It works, and could be safer or do more.
    Warning,
    /// Something does not work, or a promise is broken.
    Fault,
}

impl State {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Fault => "fault",
        }
    }
}

/// One line of the screen.
#[derive(Debug, Serialize)]
pub(crate) struct Line {
    pub(crate) state: State,
    pub(crate) topic: &'static str,
    /// A sentence, without its point.
    pub(crate) what: String,
    /// What to do about it, if it is not as it should be.
    pub(crate) todo: Option<String>,
}

fn ok(topic: &'static str, what: impl Into<String>) -> Line {
    Line { state: State::Ok, topic, what: what.into(), todo: None }
}

fn warning(topic: &'static str, what: impl Into<String>, todo: impl Into<String>) -> Line {
    Line { state: State::Warning, topic, what: what.into(), todo: Some(todo.into()) }
}

fn fault(topic: &'static str, what: impl Into<String>, todo: impl Into<String>) -> Line {
    Line { state: State::Fault, ..warning(topic, what, todo) }
}

pub(crate) fn run(socket: Option<&Path>, args: &Args) -> Outcome {
    let root = args.root.as_deref().unwrap_or(Path::new("/"));
    if !root.is_dir() {
        return Err(Failure::Usage(format!("{} is no directory", root.display())));
    }
    let mut lines = host::lines(&Facts::gather(root));
    if args.root.is_none() {
        lines.push(host::landlock(state::landlock()));
    }
    lines.extend(units::lines(root));
    if args.root.is_none() {
        lines.extend(state::lines(socket));
    }
    let worst = lines.iter().map(|line| line.state).max().unwrap_or(State::Ok);
    match Style::from(&args.style) {
        Style::Json => output::print_json(&json!({"worst": worst, "lines": lines}))?,
        Style::Table => print(&lines)?,
    }
    let least = if args.strict { State::Warning } else { State::Fault };
    Ok(if worst < least { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// What to do stands below the table: its lines are long.
fn print(lines: &[Line]) -> Result<(), Failure> {
    let mut table = Table::new(["STATE", "WHAT", ""]);
    for line in lines {
        table.row([&line.state.word(), &line.topic, &line.what]);
    }
    output::print(&table)?;
    let mut todo = String::new();
    for line in lines {
        if let Some(what) = &line.todo {
            let _ = writeln!(todo, "  {}: {}", line.topic, output::clean(what));
        }
    }
    if !todo.is_empty() {
        output::print(&format_args!("\nWhat to do:\n{todo}"))?;
    }
    Ok(())
}
