//! A reload: somebody says so, the policies are read beside the serving, and then they are in force, all at once.

use super::{Farewell, Server};
use crate::audit::{Record, Subject};
use crate::generation::Change;
use crate::reply;
use bpfgate_lockdown::Fatal;
use bpfgate_protocol::names::AppName;
use bpfgate_protocol::refusal::{Class, Refusal};

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

    /// `Reload`: answered when the generation is in force that was read after the call.
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
        let Some(changes) = self.generations.read_on() else { return Ok(()) };
        for (app, change) in &changes {
            self.follow(app, *change)?;
        }
        let in_force = self.generations.in_force();
        let (valid, invalid) = in_force.counts();
        let number = in_force.number;
        let changed = changes.len();
        log::info!(
            "generation {number} of the policies is in force: {valid} valid, {invalid} not, {changed} of them others than before"
        );
        let waits = |(_, generation): &mut (u64, u64)| *generation <= number;
        let asked: Vec<(u64, u64)> = self.reloading.extract_if(.., waits).collect();
        for (connection, _) in asked {
            let Some(entry) = self.connections.get_mut(&connection) else { continue };
            entry.busy = false;
            entry.push(reply::reloaded(number, &changes), Vec::new());
            self.requests(connection)?;
        }
        Ok(())
    }

    /// What an app has under the policy of before, and may not have any more, ends.
    fn follow(&mut self, app: &AppName, change: Change) -> Result<(), Fatal> {
        log::info!("the policy of {app}: {}", change.word());
        let Some(&number) = self.helper_of.get(app) else { return Ok(()) };
        let why = match change {
            Change::New | Change::Changed => "the policy of this app was changed; open a new session",
            Change::Removed => "the policy of this app was removed",
            Change::Invalid => "the policy of this app is not valid any more; the broker's log says why",
        };
        self.lost_because(number, why, &Refusal::gone(why), Farewell::Said)
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
        }
        connection.push(reply::refusal(refusal, &request, ""), Vec::new());
        Ok(())
    }

    /// What a helper says of another policy than the one in force: its file was changed, and nobody has said that it counts.
    pub(super) fn outdated(&self) -> Refusal {
        let how = if self.starter.has_sockets() { "`bpfgate policy apply`" } else { "SIGHUP to the broker" };
        let why =
            format!("the policy of this app was changed and is not in force yet: {how} puts it in force");
        Refusal::new(Class::Busy, why)
    }
}
