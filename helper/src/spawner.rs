//! `bpfgate-helper --spawner`: PID 1's stand-in, for machines and containers without systemd, and for development.
//! It keeps privilege, so it knows one request, and does with it what a unit file would say.

use crate::Arguments;
use bpfgate_lockdown::{Fatal, Step, capabilities, process, spawn};
use bpfgate_protocol::channel::{Channel, ChannelError};
use bpfgate_protocol::messages::spawner::{FromSpawner, ToSpawner};
use bpfgate_protocol::names::AppName;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd};

/// The first uid for helpers: the range that systemd keeps for DynamicUser=, which no account has
/// (systemd.io/UIDS-GIDS).
const FIRST_UID: u32 = 61_184;
const LAST_UID: u32 = 65_519;

struct Spawner<'a> {
    arguments: &'a Arguments,
    /// A uid for each app, for as long as this process lives.
    uids: BTreeMap<AppName, u32>,
    running: BTreeMap<AppName, Pid>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Fatal> {
    let mut broker = Channel::inherited(3).step("descriptor 3 is not the broker's channel")?;
    process::tame(8192)?;
    process::default_sigchld()?;
    capabilities::keep_to_make_helpers()?;
    // Loaders outlive their helpers by a moment, and a helper cannot wait for its own.
    nix::sys::prctl::set_child_subreaper(true).step("adopting what helpers leave")?;
    let alone = process::single_thread()?;
    // Opened now: whatever stands at these paths later, the same programs are started.
    let helper = spawn::open_program(std::path::Path::new("/proc/self/exe"))?;
    let mut spawner = Spawner { arguments, uids: BTreeMap::new(), running: BTreeMap::new() };
    // Now and then it looks for helpers that have ended.
    broker.set_timeouts(5, 1).step("setting deadlines")?;
    loop {
        let (ToSpawner::Spawn { app }, _) = match broker.recv() {
            Ok(received) => received,
            Err(ChannelError::NotNow) => {
                spawner.reap()?;
                continue;
            }
            // Helpers end by themselves, and nobody else may be there to bury them.
            Err(ChannelError::Closed) => return spawner.wait_until_ended(None).map(drop),
            Err(error) => return Err(Fatal::step("the broker", error)),
        };
        match spawner.spawn(alone, helper.as_fd(), &app) {
            Ok(channel) => {
                broker.send(&FromSpawner::Spawned { app }, &[]).step("answering")?;
                broker.hand_over(channel.as_fd()).step("handing over")?;
            }
            Err(Fatal(why)) => broker.send(&FromSpawner::Failed { app, why }, &[]).step("answering")?,
        }
    }
}

impl Spawner<'_> {
    /// Starts the helper of an app; gives the broker's end of its channel.
    fn spawn(
        &mut self,
        alone: process::SingleThread,
        helper: BorrowedFd<'_>,
        app: &AppName,
    ) -> Result<Channel, Fatal> {
        // A helper whose channel is closed is about to end.
        if !self.wait_until_ended(Some(app))? {
            // The broker has given it up, and it does not notice.
            self.running
                .get(app)
                .map_or(Ok(()), |pid| kill(*pid, Signal::SIGKILL))
                .step("ending a helper")?;
            if !self.wait_until_ended(Some(app))? {
                return Err(Fatal(format!("the helper of {app} is still running")));
            }
        }
        let uid = self.uid(app)?;
        let (ours, theirs) = Channel::pair().step("a channel")?;
        let mut argv = vec!["bpfgate-helper".to_owned(), app.to_string()];
        for directory in &self.arguments.policies {
            argv.extend(["--policies".to_owned(), directory.display().to_string()]);
        }
        argv.extend(["--loader".to_owned(), self.arguments.loader.display().to_string()]);
        argv.extend(["--socket".to_owned(), self.arguments.socket.display().to_string()]);
        argv.extend(["--uid".to_owned(), uid.to_string()]);
        let argv: Vec<CString> =
            argv.into_iter().map(CString::new).collect::<Result<_, _>>().step("the command line")?;
        let pid = spawn::program(alone, helper, &argv, &[theirs.as_fd()], || Ok(()))?;
        self.running.insert(app.clone(), pid);
        Ok(ours)
    }

    fn uid(&mut self, app: &AppName) -> Result<u32, Fatal> {
        if let Some(uid) = self.uids.get(app) {
            return Ok(*uid);
        }
        let policy =
            |directory: &std::path::PathBuf| directory.join(format!("{app}.toml")).symlink_metadata().is_ok();
        if !self.arguments.policies.iter().any(policy) {
            return Err(Fatal(format!("there is no policy for app {app}")));
        }
        let next = FIRST_UID + u32::try_from(self.uids.len()).step("too many apps")?;
        if next > LAST_UID {
            return Err(Fatal("there is no uid left for another app".into()));
        }
        self.uids.insert(app.clone(), next);
        Ok(next)
    }

    /// Waits at most a second for the helper of an app to end, or for every child; whether it did.
    fn wait_until_ended(&mut self, app: Option<&AppName>) -> Result<bool, Fatal> {
        for _ in 0..100 {
            let any = self.reap()?;
            if app.map_or(!any, |app| !self.running.contains_key(app)) {
                return Ok(true);
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        Ok(false)
    }

    /// Buries what has ended; whether any child is left.
    fn reap(&mut self) -> Result<bool, Fatal> {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..)) => {
                    self.running.retain(|_, running| *running != pid);
                }
                Ok(WaitStatus::StillAlive) => return Ok(true),
                Err(nix::errno::Errno::ECHILD) => return Ok(false),
                Ok(_) => {}
                Err(error) => return Err(Fatal::step("waiting for helpers", error)),
            }
        }
    }
}
