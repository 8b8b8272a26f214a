//! Whose checks are traced. The program in the kernel looks at nothing else.

use bpfgate_protocol::names::AppName;

use super::super::process::{Process, Role, status_of};
use super::cgroups::Cgroups;
use crate::cli::failure::Failure;

/// `max_entries` of the map `processes`.
const MOST: usize = 64;

#[derive(clap::Args, Clone, Debug, Default)]
#[group(required = true, multiple = false)]
pub(crate) struct Scope {
    /// Trace a unit with all below its cgroup: nginx, nginx.service, system.slice, or the path of a cgroup
    #[arg(long)]
    pub(crate) unit: Option<String>,
    /// Trace a process with all its threads, not its children; may be repeated
    #[arg(long = "pid", value_name = "PID")]
    pub(crate) pids: Vec<u32>,
    /// Trace the helper of an app, with its loader
    #[arg(long)]
    pub(crate) app: Option<String>,
    /// Trace everything on this machine but this command itself
    #[arg(long)]
    pub(crate) all: bool,
}

/// The same for the program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Cgroup(u64),
    Processes(Vec<u32>),
    Everything,
}

impl Scope {
    pub(super) fn resolve(&self, cgroups: &mut Cgroups) -> Result<Target, Failure> {
        if let Some(unit) = &self.unit {
            return cgroups.of_unit(unit).map(Target::Cgroup);
        }
        if let Some(app) = &self.app {
            return of_app(app, cgroups);
        }
        if self.all {
            return Ok(Target::Everything);
        }
        self.pids.iter().try_for_each(|pid| is_process(*pid))?;
        if self.pids.is_empty() || self.pids.len() > MOST {
            return Err(Failure::Usage(format!(
                "1 to {MOST} processes can be traced; more have to be in one unit"
            )));
        }
        Ok(Target::Processes(self.pids.clone()))
    }
}

/// The kernel knows a thread by its process: the id of a thread would match nothing.
fn is_process(pid: u32) -> Result<(), Failure> {
    match status_of(pid, "Tgid").and_then(|text| text.parse::<u32>().ok()) {
        Some(process) if process == pid => Ok(()),
        Some(process) => {
            Err(Failure::Usage(format!("{pid} is a thread of process {process}: say --pid {process}")))
        }
        None => Err(Failure::Usage(format!("there is no process {pid}"))),
    }
}

/// The helper's unit; or its processes, where the broker stands alone.
fn of_app(app: &str, cgroups: &mut Cgroups) -> Result<Target, Failure> {
    let app: AppName = app.parse().map_err(|why| Failure::Usage(format!("{why}")))?;
    if let Ok(id) = cgroups.of_unit(&format!("bpfgate-helper@{app}.service")) {
        return Ok(Target::Cgroup(id));
    }
    let is_its = |process: &Process| process.role.as_ref().and_then(Role::app) == Some(&app);
    let mut found: Vec<u32> = Process::all()?.into_iter().filter(is_its).map(|process| process.pid).collect();
    if found.is_empty() {
        let why =
            format!("no helper of app {app} runs: use the app first, for example with `bpfgate list {app}`");
        return Err(Failure::Failed(why));
    }
    found.truncate(MOST);
    Ok(Target::Processes(found))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_are_told_from_threads() {
        let ours = std::process::id();
        assert!(is_process(ours).is_ok());
        let thread = nix::unistd::gettid().as_raw().cast_unsigned();
        if thread != ours {
            let Err(Failure::Usage(why)) = is_process(thread) else { panic!("{thread} is no process") };
            assert!(why.contains(&format!("--pid {ours}")), "{why}");
        }
        assert!(matches!(is_process(u32::MAX), Err(Failure::Usage(_))));
        let scope = Scope { pids: vec![ours; 65], ..Scope::default() };
        assert!(matches!(scope.resolve(&mut Cgroups::new()), Err(Failure::Usage(_))));
    }
}
