//! `bpfgate policy`: what people need who write policies. Nothing here needs privilege, a broker or systemd; policy files
//! are read by the code that broker and helper read them with, and requests are judged by the code that judges them.

mod cases;
mod check;
mod diff;
mod draft;
mod explain;
mod judge;
mod miss;
mod objects;
mod pin;
mod places;
mod show;
mod who;

pub(super) use objects::{Undescribed, describe, read as read_object};
pub(super) use show::path;

use super::Outcome;
use super::args::PolicyCommand;
use super::failure::{Failure, say};
use super::{apply, output};
use bpfgate_protocol::names::AppName;
use bpfgate_protocol::policy::file::{self, Accounts};
use bpfgate_protocol::policy::{Policy, PolicyError};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Exit code of an invalid policy.
pub(super) const INVALID: u8 = 4;

pub(crate) fn run(command: &PolicyCommand) -> Outcome {
    match command {
        PolicyCommand::Check(args) => check::run(args),
        PolicyCommand::Show { policy, unit, style } => show::run(policy, *unit, style.into()),
        PolicyCommand::Explain(args) => explain::run(args),
        PolicyCommand::New(args) => draft::run(args),
        PolicyCommand::Diff { old, new, style } => diff::run(old, new, style.into()),
        PolicyCommand::Test { cases, policies, style } => {
            cases::run(cases, policies.as_deref(), style.into())
        }
        PolicyCommand::Pin(args) => pin::run(args),
        PolicyCommand::Apply { dry_run, style } => apply::run(*dry_run, style.into()),
    }
}

/// A policy with the text that it was read from, whoever owns the file.
pub(super) struct Source {
    text: String,
    pub(super) policy: Policy,
}

impl Source {
    pub(super) fn read(path: &Path) -> Result<Self, PolicyError> {
        let name = path.display().to_string();
        let accounts = Accounts::read().map_err(|error| {
            PolicyError::of_file(&name, format!("/etc/passwd or /etc/group: {error}"), None)
        })?;
        Self::read_for(path, &accounts)
    }

    /// On a machine with these users and groups.
    fn read_for(path: &Path, accounts: &Accounts) -> Result<Self, PolicyError> {
        let text = file::text_untrusted(path)?;
        let policy = Policy::parse(&path.display().to_string(), &text, accounts)?;
        Ok(Self { text, policy })
    }
}

/// Says what is wrong with a policy; the exit code that goes with it.
pub(super) fn invalid(error: &PolicyError) -> ExitCode {
    say(&output::clean_lines(&error.to_string()));
    ExitCode::from(INVALID)
}

/// The name of the file is the name of the app.
fn app_of(path: &Path) -> Result<AppName, PolicyError> {
    let file = path.display().to_string();
    let app = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".toml"));
    match app.map(str::parse) {
        Some(Ok(app)) => Ok(app),
        Some(Err(why)) => Err(PolicyError::of_file(&file, why.to_string(), None)),
        None => Err(PolicyError::of_file(&file, "a policy file is called APP.toml", None)),
    }
}

/// The file of an app: in `directory`, or else the one that is in force.
fn file_of(app: &AppName, directory: Option<&Path>) -> Option<PathBuf> {
    match directory {
        Some(one) => file::find(&[one], app),
        None => file::find(&file::DIRECTORIES, app),
    }
}

/// The policy files of a directory, by name; none if there is no such directory.
fn files_in(directory: &Path) -> Result<Vec<PathBuf>, Failure> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Failure::Failed(format!("{}: {error}", directory.display()))),
    };
    let paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>, std::io::Error>>()?;
    let is_policy = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "toml");
    let mut files: Vec<PathBuf> = paths.into_iter().filter(is_policy).collect();
    files.sort();
    Ok(files)
}
