//! A reload: somebody says so, the policies are read beside the serving, and then they are in force, all at once.
//!
//! A helper that runs is told in the order of its channel: what went before is judged by the policy of before, what
//! comes after by the new one, here and there. It says whether it goes on with it.

use super::{Farewell, Server, Tag, revoked};
use crate::audit::{Record, Subject};
use crate::generation::{Change, Changed, SLICE};
use crate::helpers::Request;
use crate::reply;
use bpfgate_lockdown::Fatal;
use bpfgate_protocol::authorize::authorize;
use bpfgate_protocol::messages::helper::{Adopted, Adoption, Outcome, ToHelper};
use bpfgate_protocol::names::AppName;
use bpfgate_protocol::policy::file::{ACCOUNTS, find};
use bpfgate_protocol::refusal::{Class, Refusal, one_line};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What a reload means for an app.
#[derive(Debug)]
pub(crate) struct Fate {
    pub(crate) change: Change,
    pub(crate) helper: HelperFate,
    /// Sessions that ended.
    pub(crate) sessions: usize,
    pub(crate) revoked: Vec<String>,
    pub(crate) beyond_recall: Vec<String>,
    pub(crate) why: Option<String>,
}

/// What becomes of the helper of an app.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HelperFate {
    /// None ran; the next one has the policy in force.
    None,
    /// It goes on with the policy in force.
    Adopted,
    /// It has ended, or ends.
    Ended,
    /// It has to be started anew, which is not for us to do.
    Restart,
}

impl HelperFate {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Adopted => "adopted",
            Self::Ended => "ended",
            Self::Restart => "restart",
        }
    }
}

impl Server {
    /// SIGHUP.
    pub(super) fn hung_up(&mut self) {
        // Several at once are one.
        while matches!(self.hangups.read_signal(), Ok(Some(_))) {}
        if let Err(error) = self.generations.begin() {
            log::error!(
                "the policies are not read again, those in force stay: /etc/passwd or /etc/group: {error}"
            );
        }
    }

    /// `Reload`: answered when the generation is in force that was read after the call, and all helpers know of it.
    pub(super) fn reload(&mut self, number: u64, oneway: bool) -> Result<(), Fatal> {
        match self.generations.begin() {
            Ok(_) if oneway => {}
            Ok(generation) => {
                self.reloading.push((number, generation));
                if let Some(connection) = self.connections.get_mut(&number) {
                    connection.busy = true;
                }
            }
            Err(error) => {
                let why =
                    format!("the policies in force stay: /etc/passwd or /etc/group cannot be read: {error}");
                return self.refuse(
                    number,
                    &Refusal::helper(why),
                    oneway,
                    "Reload",
                    Subject::default(),
                    None,
                );
            }
        }
        Ok(())
    }

    /// Reads on, if the policies are being read.
    pub(super) fn read_on(&mut self) -> Result<(), Fatal> {
        let changes = match self.generations.read_on() {
            None => return self.tell_more(),
            Some(Ok(changes)) => changes,
            Some(Err(error)) => return self.stays(&error.lines().join("; ")),
        };
        let in_force = self.generations.in_force();
        let (valid, invalid) = in_force.counts();
        let (number, changed) = (in_force.number, changes.len());
        log::info!(
            "generation {number} of the policies is in force: {valid} valid, {invalid} not, {changed} of them others than before"
        );
        let about = Subject::plain(format!("{valid} valid, {invalid} not, {changed} others than before"));
        self.audit.write(&Record::reload(number, about))?;
        // What an earlier reload still waits for is waited for here.
        let outstanding = &self.outstanding;
        self.fates.retain(|app, _| outstanding.contains(app));
        let (told, others): (Vec<_>, Vec<_>) =
            changes.into_iter().partition(|changed| self.helper_of.contains_key(&changed.app));
        self.untold.extend(others);
        for changed in told {
            self.follow(changed)?;
        }
        self.tell_more()
    }

    /// The policies could not be read, so those in force stay: for whoever asked that is no reload.
    fn stays(&mut self, why: &str) -> Result<(), Fatal> {
        log::error!("the policies are not read again, those in force stay: {why}");
        let refusal = Refusal::helper(format!("the policies in force stay: {why}; ask again"));
        let in_force = self.generations.in_force().number;
        let asked: Vec<_> = self.reloading.extract_if(.., |(_, generation)| *generation > in_force).collect();
        for (number, _) in asked {
            self.refuse(number, &refusal, false, "Reload", Subject::default(), None)?;
            let Some(connection) = self.connections.get_mut(&number) else { continue };
            connection.busy = false;
            self.requests(number)?;
        }
        self.tell_more()
    }

    /// Goes on with apps that have no helper here. There may be a thousand, and nobody waits for them.
    pub(super) fn tell_more(&mut self) -> Result<(), Fatal> {
        let start = Instant::now();
        while let Some(changed) = self.untold.pop_front() {
            self.follow(changed)?;
            if start.elapsed() >= SLICE {
                break;
            }
        }
        self.report()
    }

    /// What an app has under the policy of before, and may not have any more, ends.
    fn follow(&mut self, changed: Changed) -> Result<(), Fatal> {
        let Changed { app, change, before } = changed;
        let app = &app;
        log::info!("the policy of {app}: {}", change.word());
        let fate = Fate {
            change,
            helper: HelperFate::None,
            sessions: 0,
            revoked: Vec::new(),
            beyond_recall: Vec::new(),
            why: None,
        };
        self.fates.insert(app.clone(), fate);
        self.outstanding.insert(app.clone());
        let policy = self.policy(app).ok();
        // One that nobody uses is left alone, behind its socket; but what it keeps is judged now.
        let kept = before.as_ref().filter(|policy| policy.keep.is_persistent() && self.starter.has_sockets());
        if let (None, Some(before)) = (self.helper_of.get(app), kept)
            && let Err(refusal) = self.start_helper(app, policy.as_ref().unwrap_or(before), Instant::now())
        {
            log::info!("helper of {app}: {}", refusal.why);
        }
        let Some(&number) = self.helper_of.get(app) else { return self.settled(app) };
        let generation = self.generations.in_force().number;
        let Some(helper) = self.helpers.get_mut(&number) else { return Ok(()) };
        let ready = helper.was_ready();
        if let Some(policy) = &policy {
            helper.policy = policy.clone();
            if !ready {
                // It has not been asked anything yet: all of it is judged by the new one.
                for Request { tag, .. } in helper.unsent() {
                    (tag.policy, tag.generation) = (policy.clone(), generation);
                }
            }
        }
        let units = &self.here.units;
        for connection in self.connections.values_mut() {
            let its = connection.session.as_ref();
            if !its.is_some_and(|session| session.app == *app && session.permit.is_some()) {
                continue;
            }
            // The new policy may ask for other units.
            let now = policy.as_deref().and_then(|policy| units.identify(connection.socket(), policy).ok());
            let Some(session) = connection.session.as_mut() else { continue };
            if let Some(now) = now {
                (session.peer.units, session.peer.no_unit) = (now.units, now.no_unit);
            }
            let permit = policy.as_ref().and_then(|policy| authorize(policy, &session.peer).ok());
            session.revoked = permit.is_none();
            session.permit = permit.or(session.permit.take());
        }
        match (ready, policy.is_some() || self.starter.has_sockets()) {
            (true, _) => {
                self.have_adopted(number, false);
                self.pass_on(number);
                Ok(())
            }
            // It is told when it is ready.
            (false, true) => Ok(()),
            (false, false) => self.end_app(number, change),
        }
    }

    /// Tells a helper that its policy is another one.
    pub(super) fn have_adopted(&mut self, number: u64, first: bool) {
        let Some(helper) = self.helpers.get_mut(&number) else { return };
        let fds = handed_over(self.generations.directories(), &helper.app);
        let in_force = self.generations.in_force();
        let digest =
            in_force.of(&helper.app).and_then(|verdict| verdict.as_ref().ok()).map(|policy| policy.digest);
        let message = ToHelper::Adopt { policy: digest, file: !fds.is_empty() };
        let (policy, generation) = (helper.policy.clone(), in_force.number);
        let tag = Tag { asker: None, subject: Subject::default(), policy, generation };
        // Of several that wait the last one counts.
        helper.cancel_adoptions();
        if first {
            helper.push_first(Request { message, fds, tag });
        } else {
            helper.push(Request { message, fds, tag });
        }
    }

    /// What a helper says to that.
    pub(super) fn adopted(&mut self, number: u64, outcome: Outcome) -> Result<(), Fatal> {
        let Some(helper) = self.helpers.get(&number) else { return Ok(()) };
        let app = helper.app.clone();
        let in_force = self.policy(&app).ok();
        let adoption = match outcome {
            Outcome::Adopted(adoption) => adoption,
            // Another one waits, which counts; or the file was changed once more, and nobody has said that this counts.
            Outcome::Refused { .. }
                if self.helpers.get(&number).is_some_and(super::Helper::has_adoptions) =>
            {
                return Ok(());
            }
            Outcome::Refused { refusal, .. } => {
                self.fate(&app, HelperFate::Ended, Some(refusal.why.clone()));
                let outdated = self.outdated();
                return self.lost_because(number, &refusal.why, &outdated, Farewell::Said);
            }
            _ => return self.lost(number, "it answered something else than it was asked"),
        };
        let Adoption { verdict, revoked, beyond_recall, .. } = adoption;
        if let Some(fate) = self.fates.get_mut(&app) {
            (fate.revoked, fate.beyond_recall) = (revoked, beyond_recall);
        }
        match (verdict, in_force) {
            // Another one waits, which counts.
            _ if self.helpers.get(&number).is_some_and(super::Helper::has_adoptions) => Ok(()),
            (Adopted::InForce, Some(_)) => {
                if let Err(why) = self.helpers[&number].confined() {
                    return self.lost(number, &why);
                }
                self.fate(&app, HelperFate::Adopted, None);
                self.end_revoked(number, &app)?;
                self.settled(&app)
            }
            (Adopted::None, None) => {
                let change = self.fates.get(&app).map_or(Change::Removed, |fate| fate.change);
                self.end_app(number, change)
            }
            (Adopted::Restart(why), _) => self.not_adopted(number, &why),
            (Adopted::InForce | Adopted::None, _) => self.lost(number, "it adopts what it was not told"),
        }
    }

    /// The helper cannot serve the policy in force: it is of no use.
    fn not_adopted(&mut self, number: u64, why: &str) -> Result<(), Fatal> {
        let Some(app) = self.helpers.get(&number).map(|helper| helper.app.clone()) else { return Ok(()) };
        // In the words of the helper.
        log::warn!("helper of {app}: it takes a new one for the policy in force: {}", one_line(why));
        let (fate, refusal) = if self.starter.has_sockets() {
            let why = "the policy of this app was changed, and its helper has to start anew for it: `bpfgate policy apply` does that";
            (HelperFate::Restart, Refusal::new(Class::Busy, why))
        } else {
            (
                HelperFate::Ended,
                Refusal::gone(
                    "the policy of this app was changed, and its helper starts anew for it: open a new session",
                ),
            )
        };
        self.fate(&app, fate, Some(why.to_owned()));
        self.lost_because(number, why, &refusal, Farewell::Said)
    }

    /// There is no policy for the app of this helper any more.
    fn end_app(&mut self, number: u64, change: Change) -> Result<(), Fatal> {
        let Some(app) = self.helpers.get(&number).map(|helper| helper.app.clone()) else { return Ok(()) };
        let why = match change {
            Change::Invalid => "the policy of this app is not valid any more; the broker's log says why",
            _ => "the policy of this app was removed",
        };
        self.fate(&app, HelperFate::Ended, None);
        self.lost_because(number, why, &Refusal::gone(why), Farewell::Said)
    }

    fn fate(&mut self, app: &AppName, helper: HelperFate, why: Option<String>) {
        if let Some(fate) = self.fates.get_mut(app) {
            fate.helper = helper;
            fate.why = why;
        }
    }

    /// Ends the sessions of an app that the policy in force has no entry for; the helper has ended them already.
    fn end_revoked(&mut self, number: u64, app: &AppName) -> Result<(), Fatal> {
        let its = |session: &super::Session| session.app == *app && session.revoked;
        let is = |connection: &super::Connection| connection.session.as_deref().is_some_and(its);
        let all: Vec<u64> = self.connections.iter().filter(|(_, c)| is(c)).map(|(n, _)| *n).collect();
        for connection in all {
            self.say_farewell(connection, &revoked())?;
            if let Some(entry) = self.connections.get_mut(&connection) {
                entry.busy = false;
                entry.closing = true;
                if let (Some(session), Some(helper)) = (entry.session.take(), self.helpers.get_mut(&number)) {
                    helper.session_ended(session.id);
                }
            }
            self.settle(connection);
        }
        Ok(())
    }

    /// Says to a client that waits for nothing why its session ends: as the answer to whatever it asks next.
    pub(super) fn say_farewell(&mut self, number: u64, refusal: &Refusal) -> Result<(), Fatal> {
        let request = self.audit.request_id();
        let Some(connection) = self.connections.get_mut(&number) else { return Ok(()) };
        if let Some(session) = &connection.session {
            let generation = self.generations.in_force().number;
            let mut record = Record::of(&session.peer, &request, generation, "End", Subject::default());
            record.app = Some(session.app.as_str());
            record.refused(refusal);
            self.audit.write(&record)?;
            if let Some(fate) = self.fates.get_mut(&session.app) {
                fate.sessions += 1;
            }
        }
        connection.push(reply::refusal(refusal, &request, ""), Vec::new());
        Ok(())
    }

    /// Nothing more is waited for from the helper of this app: what became of it is on record.
    pub(super) fn settled(&mut self, app: &AppName) -> Result<(), Fatal> {
        if !self.outstanding.remove(app) {
            return Ok(());
        }
        if let Some(fate) = self.fates.get(app) {
            let about = format!("{}, helper: {}", fate.change.word(), fate.helper.word());
            let mut record = Record::reload(self.generations.in_force().number, Subject::plain(about));
            record.app = Some(app.as_str());
            record.why = fate.why.as_deref();
            (record.revoked, record.beyond_recall) = (&fate.revoked, &fate.beyond_recall);
            self.audit.write(&record)?;
        }
        self.report()
    }

    /// Answers administrators, when all is settled.
    fn report(&mut self) -> Result<(), Fatal> {
        if !(self.outstanding.is_empty() && self.untold.is_empty()) {
            return Ok(());
        }
        let in_force = self.generations.in_force().number;
        let waits = |(_, generation): &mut (u64, u64)| *generation <= in_force;
        let asked: Vec<(u64, u64)> = self.reloading.extract_if(.., waits).collect();
        for (connection, _) in asked {
            let Some(entry) = self.connections.get_mut(&connection) else { continue };
            entry.busy = false;
            entry.push(reply::reloaded(in_force, &self.fates), Vec::new());
            self.requests(connection)?;
        }
        Ok(())
    }

    /// What a helper says of another policy than the one in force: its file was changed, and nobody has said that it counts.
    fn outdated(&self) -> Refusal {
        let how = if self.starter.has_sockets() { "`bpfgate policy apply`" } else { "SIGHUP to the broker" };
        let why =
            format!("the policy of this app was changed and is not in force yet: {how} puts it in force");
        Refusal::new(Class::Busy, why)
    }
}

/// What goes with an `Adopt`: the file of the app and those of accounts, or nothing. The helper looks what they are.
fn handed_over(directories: &[PathBuf], app: &AppName) -> Vec<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let opened = |path: &Path| open(path, flags, Mode::empty()).ok();
    let Some(policy) = find(directories, app).and_then(|path| opened(&path)) else { return Vec::new() };
    let all: Option<Vec<OwnedFd>> =
        std::iter::once(Some(policy)).chain(ACCOUNTS.map(|path| opened(Path::new(path)))).collect();
    all.unwrap_or_default()
}
