//! The policies in force: one generation at a time, read at the start and again only when somebody says so. What happens
//! to files in between changes nothing.
//!
//! The next generation is read beside the one in force, a few files at a time, and takes its place at once when it is
//! complete. A request is judged by one generation from its beginning to its end.

use bpfgate_protocol::names::AppName;
use bpfgate_protocol::policy::{Policy, PolicyError};
use bpfgate_systemd::installed::{Installed, Reading};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long to read before clients get their turn again. A policy of a thousand rules takes it alone.
pub(crate) const SLICE: Duration = Duration::from_millis(5);

/// A policy in force, or why the app has none although there is a file.
pub(crate) type Verdict = Result<Arc<Policy>, Arc<PolicyError>>;

/// All policies as they were at one time.
pub(crate) struct Generation {
    /// 1 for that of the start.
    pub(crate) number: u64,
    apps: BTreeMap<AppName, Verdict>,
}

/// What another generation says of an app.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// It has a policy in force now.
    New,
    Changed,
    /// There is no file any more.
    Removed,
    /// The file is no policy.
    Invalid,
}

/// An app of which another generation says something else.
pub(crate) struct Changed {
    pub(crate) app: AppName,
    pub(crate) change: Change,
    /// The policy of before, if there was one.
    pub(crate) before: Option<Arc<Policy>>,
}

impl Change {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Changed => "changed",
            Self::Removed => "removed",
            Self::Invalid => "invalid",
        }
    }
}

impl Generation {
    fn new(number: u64, installed: Installed) -> Self {
        for (app, error) in installed.errors() {
            match app {
                Some(app) => log::error!("the policy of {app} is not in force:\n{error}"),
                None => log::error!("{error}"),
            }
        }
        let shared = |(app, policy): (AppName, Result<Policy, PolicyError>)| {
            (app, policy.map(Arc::new).map_err(Arc::new))
        };
        Self { number, apps: installed.apps.into_iter().map(shared).collect() }
    }

    /// None: there was no file for it.
    pub(crate) fn of(&self, app: &AppName) -> Option<&Verdict> {
        self.apps.get(app)
    }

    /// Apps with a policy in force, and those that have a file and none.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let valid = self.apps.values().filter(|verdict| verdict.is_ok()).count();
        (valid, self.apps.len() - valid)
    }

    /// What `next` says otherwise.
    fn changes(&self, next: &Self) -> Vec<Changed> {
        let apps: BTreeSet<&AppName> = self.apps.keys().chain(next.apps.keys()).collect();
        let change = |app: &AppName| match (self.of(app), next.of(app)) {
            // Not by the digest of the file: the accounts that it names may have become others.
            (Some(Ok(old)), Some(Ok(new))) => (old != new).then_some(Change::Changed),
            (_, Some(Ok(_))) => Some(Change::New),
            (Some(Err(old)), Some(Err(new))) => (old != new).then_some(Change::Invalid),
            (_, Some(Err(_))) => Some(Change::Invalid),
            (Some(_), None) => Some(Change::Removed),
            (None, None) => None,
        };
        let before = |app: &AppName| self.of(app).and_then(|verdict| verdict.clone().ok());
        let changed =
            |app: &AppName| Some(Changed { app: app.clone(), change: change(app)?, before: before(app) });
        apps.into_iter().filter_map(changed).collect()
    }
}

/// The generation in force, and the one that is being read.
pub(crate) struct Generations {
    directories: Vec<PathBuf>,
    in_force: Generation,
    reading: Option<Reading>,
    /// Asked for while another one was being read, which may have passed by what was changed since.
    again: bool,
}

impl Generations {
    /// Reads the first one.
    pub(crate) fn first(directories: &[PathBuf]) -> io::Result<Self> {
        let in_force = Generation::new(1, Installed::read(directories)?);
        Ok(Self { directories: directories.to_vec(), in_force, reading: None, again: false })
    }

    pub(crate) fn in_force(&self) -> &Generation {
        &self.in_force
    }

    pub(crate) fn directories(&self) -> &[PathBuf] {
        &self.directories
    }

    /// Begins to read the next one, now or after the one that is being read. Gives the number that it will have.
    ///
    /// Errors: /etc/passwd or /etc/group cannot be read: what is in force stays
    pub(crate) fn begin(&mut self) -> io::Result<u64> {
        if self.reading.is_some() {
            self.again = true;
            return Ok(self.in_force.number + 2);
        }
        self.reading = Some(Reading::begin(&self.directories)?);
        Ok(self.in_force.number + 1)
    }

    pub(crate) fn is_reading(&self) -> bool {
        self.reading.is_some()
    }

    /// Reads on. When all is read it is in force: gives what that changes.
    ///
    /// Errors: something could not be read, which says nothing about what stands there. What is in force stays, and
    /// whatever else was asked for meanwhile is given up, too
    pub(crate) fn read_on(&mut self) -> Option<Result<Vec<Changed>, PolicyError>> {
        let reading = self.reading.as_mut()?;
        let start = Instant::now();
        while !reading.step(1) {
            if start.elapsed() >= SLICE {
                return None;
            }
        }
        let installed = self.reading.take()?.finish();
        let again = std::mem::take(&mut self.again);
        if let Some((_, error)) = installed.errors().find(|(_, error)| error.passing) {
            return Some(Err(error.clone()));
        }
        if again && let Err(error) = self.begin() {
            log::error!("the policies are not read again: {error}");
        }
        let next = Generation::new(self.in_force.number + 1, installed);
        let changes = self.in_force.changes(&next);
        self.in_force = next;
        Some(Ok(changes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bpfgate_protocol::policy::file::Accounts;

    fn generation(number: u64, apps: &[(&str, &str)]) -> Generation {
        let verdict =
            |text: &str| Policy::parse("/p.toml", text, &Accounts::default()).map(Arc::new).map_err(Arc::new);
        let apps = apps.iter().map(|(app, text)| (app.parse().unwrap(), verdict(text))).collect();
        Generation { number, apps }
    }

    #[test]
    fn what_changed_is_told_by_what_the_files_say() {
        const VALID: &str = "version = 1\n";
        let old = generation(
            1,
            &[
                ("same", VALID),
                ("changed", VALID),
                ("gone", VALID),
                ("breaks", VALID),
                ("broken", "x"),
                ("mended", "y"),
                ("still", "z"),
            ],
        );
        let other = "version = 1\ndescription = \"x\"\n";
        let new = generation(
            2,
            &[
                ("same", VALID),
                ("changed", other),
                ("breaks", "x"),
                ("broken", "xx"),
                ("mended", VALID),
                ("still", "z"),
                ("new", VALID),
                ("bad", "b"),
            ],
        );
        let changes = old.changes(&new);
        let words: Vec<(&str, &str)> =
            changes.iter().map(|changed| (changed.app.as_str(), changed.change.word())).collect();
        assert_eq!(
            words,
            [
                ("bad", "invalid"),
                ("breaks", "invalid"),
                ("broken", "invalid"),
                ("changed", "changed"),
                ("gone", "removed"),
                ("mended", "new"),
                ("new", "new"),
            ]
        );
        assert_eq!(new.counts(), (4, 4));
        assert!(new.changes(&new).is_empty());
    }

    #[test]
    fn a_thousand_files_are_read_in_slices_and_come_into_force_at_once() {
        let directory = std::env::temp_dir().join(format!("bpfgate-generation-{}", std::process::id()));
        std::fs::create_dir(&directory).unwrap();
        for number in 0..1000 {
            std::fs::write(directory.join(format!("app-{number}.toml")), "version = 1\n").unwrap();
        }
        let mut generations = Generations::first(&[]).unwrap();
        generations.directories = vec![directory.clone()];
        generations.begin().unwrap();
        let (mut slices, mut longest) = (1, Duration::ZERO);
        let changes = loop {
            assert_eq!((generations.in_force().number, generations.in_force().counts()), (1, (0, 0)));
            let start = Instant::now();
            let read = generations.read_on();
            longest = longest.max(start.elapsed());
            match read {
                Some(changes) => break changes.unwrap(),
                None => slices += 1,
            }
        };
        println!("{slices} slices, the longest took {} ms", longest.as_millis());
        std::fs::remove_dir_all(&directory).unwrap();
        // Below /tmp nothing is trusted: each is there, and says so.
        assert!(slices > 1 && changes.len() == 1000, "{slices} slices, {} changes", changes.len());
        assert_eq!((generations.in_force().number, generations.in_force().counts()), (2, (0, 1000)));
        assert!(!generations.is_reading() && generations.read_on().is_none());
    }
}
