//! The policies of this machine: every app that has a file, with its policy or with what is wrong with it.

use bpfgate_protocol::names::AppName;
use bpfgate_protocol::policy::file::{self, Accounts};
use bpfgate_protocol::policy::{Policy, PolicyError};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// Apps that are enabled at most. Each has a socket, which is a descriptor and a unit of the service manager, also
/// while nobody uses it; ten times as many would slow down the start of the machine.
pub const MAX_APPS: usize = 1024;

/// What the policy directories hold.
#[derive(Debug, Default)]
pub struct Installed {
    /// Apps by name; of several directories the first one that has a file counts.
    pub apps: BTreeMap<AppName, Result<Policy, PolicyError>>,
    /// What belongs to no app: a name that cannot be an app's, a directory that cannot be read.
    pub strays: Vec<PolicyError>,
}

impl Installed {
    /// Reads all directories. It never waits, and what is there cannot make it fail: everything that is not a policy
    /// is an entry that says so.
    ///
    /// Errors: /etc/passwd or /etc/group, by which every policy is judged
    pub fn read(directories: &[PathBuf]) -> io::Result<Self> {
        let mut reading = Reading::begin(directories)?;
        while !reading.step(MAX_APPS) {}
        Ok(reading.finish())
    }

    /// Apps with a policy in force.
    pub fn valid(&self) -> impl Iterator<Item = (&AppName, &Policy)> {
        self.apps.iter().filter_map(|(app, policy)| Some((app, policy.as_ref().ok()?)))
    }

    /// Everything that is wrong, by app where there is one.
    pub fn errors(&self) -> impl Iterator<Item = (Option<&AppName>, &PolicyError)> {
        let of_apps = self.apps.iter().filter_map(|(app, policy)| Some((Some(app), policy.as_ref().err()?)));
        of_apps.chain(self.strays.iter().map(|error| (None, error)))
    }
}

/// Reading all directories, some files at a time: who serves others meanwhile keeps nobody waiting.
#[derive(Debug)]
pub struct Reading {
    directories: Vec<PathBuf>,
    /// By which all files are judged.
    accounts: Accounts,
    left: std::vec::IntoIter<AppName>,
    installed: Installed,
}

impl Reading {
    /// Finds out which files there are.
    ///
    /// Errors: /etc/passwd or /etc/group
    pub fn begin(directories: &[PathBuf]) -> io::Result<Self> {
        let accounts = Accounts::read()?;
        let mut names = BTreeSet::new();
        let mut strays = Vec::new();
        for directory in directories {
            if let Err(error) = collect(directory, &mut names, &mut strays)
                && error.kind() != ErrorKind::NotFound
            {
                let why = format!("the policy directory cannot be read: {error}");
                let passing = file::is_passing_error(&error);
                strays
                    .push(PolicyError::of_file(&directory.display().to_string(), why, None).passing(passing));
            }
        }
        if let Some(first) = names.iter().nth(MAX_APPS) {
            let why = format!(
                "there are {} policies, {MAX_APPS} of them are enabled: not {first} and what comes after it",
                names.len()
            );
            strays.push(PolicyError::of_file(&first.to_string(), why, None));
        }
        let left = names.into_iter().take(MAX_APPS).collect::<Vec<_>>().into_iter();
        let installed = Installed { apps: BTreeMap::new(), strays };
        Ok(Self { directories: directories.to_vec(), accounts, left, installed })
    }

    /// Reads at most so many files more; whether all of them are read.
    pub fn step(&mut self, files: usize) -> bool {
        for app in self.left.by_ref().take(files) {
            // None: it was removed meanwhile.
            if let Some(path) = file::find(&self.directories, &app) {
                self.installed.apps.insert(app, file::read_file_with(&path, &self.accounts));
            }
        }
        self.left.len() == 0
    }

    /// What was read.
    pub fn finish(self) -> Installed {
        self.installed
    }
}

/// The names of files that end in `.toml`; editors and package managers leave others behind.
fn collect(directory: &Path, names: &mut BTreeSet<AppName>, strays: &mut Vec<PolicyError>) -> io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension() != Some(OsStr::new("toml")) {
            continue;
        }
        match path.file_stem().unwrap_or_default().to_string_lossy().parse() {
            Ok(app) => {
                names.insert(app);
            }
            Err(error) => {
                strays.push(PolicyError::of_file(&path.display().to_string(), error.to_string(), None));
            }
        }
    }
    Ok(())
}
