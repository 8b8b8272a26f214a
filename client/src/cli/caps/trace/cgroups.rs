//! Cgroups by id: the id of a cgroup is the inode of its directory, which everybody may look at.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bpfgate_protocol::identity::unit_of;

use crate::cli::doctor::facts::mounted;
use crate::cli::failure::Failure;

/// How long to go on with what was found: looking at all of them takes some milliseconds.
const FRESH: Duration = Duration::from_secs(1);

/// The cgroups that were there when somebody looked. One that is gone keeps the path it had.
pub(super) struct Cgroups {
    root: Option<PathBuf>,
    /// Paths below the root, with a leading `/`.
    paths: HashMap<u64, String>,
    looked: Option<Instant>,
}

impl Cgroups {
    pub(super) fn new() -> Self {
        Self {
            root: mounted(Path::new("/"), "cgroup2").into_iter().next(),
            paths: HashMap::new(),
            looked: None,
        }
    }

    /// The path of a cgroup; none if nobody saw it while it was there.
    pub(super) fn path(&mut self, id: u64) -> Option<&str> {
        if !self.paths.contains_key(&id) && self.looked.is_none_or(|looked| looked.elapsed() > FRESH) {
            self.look();
        }
        self.paths.get(&id).map(String::as_str)
    }

    /// Before the programs run: most cgroups that will be asked for are there already.
    pub(super) fn look(&mut self) {
        if let Some(root) = &self.root {
            let mut left = vec![root.clone()];
            while let Some(directory) = left.pop() {
                let Ok(metadata) = fs::symlink_metadata(&directory) else { continue };
                let below = directory.strip_prefix(root).unwrap_or(&directory);
                self.paths.insert(metadata.ino(), format!("/{}", below.display()));
                let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
                left.extend(
                    entries
                        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                        .map(|e| e.path()),
                );
            }
        }
        self.looked = Some(Instant::now());
    }

    /// The cgroup of a unit, by its name or by the path of the cgroup.
    pub(super) fn of_unit(&mut self, unit: &str) -> Result<u64, Failure> {
        let Some(root) = self.root.clone() else {
            return Err(Failure::Failed(
                "cgroup v2 is not mounted here, so units have no cgroup to be known by".into(),
            ));
        };
        if unit.starts_with('/') {
            let below =
                Path::new(unit).strip_prefix(&root).unwrap_or(Path::new(unit.trim_start_matches('/')));
            let path = root.join(below);
            return match fs::symlink_metadata(&path) {
                Ok(metadata) if metadata.is_dir() => Ok(metadata.ino()),
                _ => Err(Failure::Usage(format!("there is no cgroup {}", path.display()))),
            };
        }
        let name = if unit.contains('.') { unit.to_owned() } else { format!("{unit}.service") };
        self.look();
        let mut found: Vec<(u64, &str)> = self
            .paths
            .iter()
            .filter(|(_, path)| is_of(path, &name))
            .map(|(id, path)| (*id, path.as_str()))
            .collect();
        found.sort_by_key(|(_, path)| *path);
        match found[..] {
            [(id, _)] => Ok(id),
            [] => Err(Failure::Failed(format!(
                "unit {name} has no cgroup: it does not run; start it, or trace the slice that it will be in"
            ))),
            _ => {
                let paths: Vec<&str> = found.iter().map(|(_, path)| *path).collect();
                Err(Failure::Usage(format!(
                    "{name} is the name of several: say --unit {}",
                    paths.join(" or --unit ")
                )))
            }
        }
    }
}

/// What a path is called in a column: its unit; or the last of its parts, which is a container's.
pub(super) fn unit(path: &str) -> String {
    unit_of(path.trim_start_matches('/')).unwrap_or_else(|| match path.rsplit('/').next() {
        Some(last) if !last.is_empty() => last.to_owned(),
        _ => "/".to_owned(),
    })
}

/// Whether this is the unit's own cgroup, not one below it.
fn is_of(path: &str, name: &str) -> bool {
    let last = path.rsplit('/').next().unwrap_or_default();
    last.strip_prefix('_').unwrap_or(last) == name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_called_by_its_unit_or_its_last_part() {
        for (path, name) in [
            ("/system.slice/a.service", "a.service"),
            ("/system.slice/a.service/below", "a.service"),
            ("/system.slice/docker-0123.scope", "docker-0123.scope"),
            ("/docker/0123", "0123"),
            ("/", "/"),
        ] {
            assert_eq!(unit(path), name);
        }
        assert!(is_of("/system.slice/_cpu.service", "cpu.service") && is_of("/web.slice", "web.slice"));
        assert!(!is_of("/system.slice/a.service/below", "a.service"));
    }

    #[test]
    fn cgroups_are_found_by_their_inode() {
        let mut cgroups = Cgroups::new();
        let Some(root) = cgroups.root.clone() else { return };
        let id = fs::metadata(&root).unwrap().ino();
        assert_eq!(cgroups.path(id), Some("/"));
        assert_eq!(cgroups.path(u64::MAX), None);
        assert!(matches!(cgroups.of_unit("/no/such"), Err(Failure::Usage(_))));
        assert!(matches!(cgroups.of_unit("no-such-unit"), Err(Failure::Failed(_))));
    }
}
