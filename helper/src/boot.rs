//! `keep = "boot"`: what the policy names is loaded and attached without anybody asking, and again when it is gone.

use crate::state::State;
use bpfgate_protocol::authorize::BootPermit;
use bpfgate_protocol::messages::InstanceId;
use bpfgate_protocol::messages::helper::Target;
use bpfgate_protocol::refusal::Refusal;
use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::time::Duration;

/// How often to look whether everything is there: an interface may come, and go, at any time.
pub(crate) const AGAIN: Duration = Duration::from_secs(2);

#[derive(Default)]
pub(crate) struct Boot {
    /// Something is wrong that only a new start can mend: it opens anew what the policy names.
    pub(crate) stuck: bool,
    /// What went wrong with which object or target, so that it is said once and not at every look.
    said: BTreeMap<String, String>,
}

impl Boot {
    /// Loads and attaches what is not there.
    pub(crate) fn look(&mut self, state: &mut State) {
        // The policy of now.
        let Some(permit) = BootPermit::of(&state.policy) else { return };
        self.stuck = false;
        for load in permit.loads() {
            let object = load.object().clone();
            let there = state.instances.iter().find(|(_, instance)| instance.object == object);
            let made = match there {
                Some((id, _)) => Ok(*id),
                None => state.load_object(None, &load).map_err(|failed| failed.refusal),
            };
            self.stuck |= made.is_err();
            if let Some(id) = self.say(&format!("object {object}"), made) {
                self.attach_all(state, &permit, id);
            }
        }
    }

    fn attach_all(&mut self, state: &mut State, permit: &BootPermit, id: InstanceId) {
        let Some(instance) = state.instances.get(&id) else { return };
        let object = instance.object.clone();
        // A question that cannot be answered is no reason to detach.
        let dead = |fd| bpfgate_bpf::describe(fd).is_ok_and(|link| !link.attached);
        let gone: Vec<_> =
            instance.links.iter().filter(|link| dead(link.fd().as_fd())).map(|link| link.info.id).collect();
        for link in gone {
            eprintln!("bpfgate-helper: link {}: what it was attached to is gone", link.0);
            if let Err(refusal) = state.drop_link(id, link) {
                eprintln!("bpfgate-helper: {}", refusal.why);
            }
        }
        for permit in permit.attachments(&object) {
            let (program, kind) = (permit.rule().program.clone(), permit.rule().hook.kind());
            let target = permit.target().clone();
            let there = state.instances.get(&id).and_then(|i| i.link_to(&program, kind, &target));
            let made = match there {
                Some(link) => Ok(link),
                None => state.attach_program(id, &permit, None),
            };
            // Interfaces are looked up each time; everything else was opened when this process started.
            self.stuck |= made.is_err() && !matches!(target, Target::Interface(_));
            self.say(&format!("{object}: {kind} program {program} on {target}"), made);
        }
    }

    fn say<T>(&mut self, what: &str, made: Result<T, Refusal>) -> Option<T> {
        match made {
            Ok(made) => {
                if self.said.remove(what).is_some() {
                    eprintln!("bpfgate-helper: {what}: done");
                }
                Some(made)
            }
            Err(refusal) => {
                let why = refusal.why;
                if self.said.insert(what.to_owned(), why.clone()).as_ref() != Some(&why) {
                    let seconds = AGAIN.as_secs();
                    eprintln!("bpfgate-helper: {what}: {why}; it is tried again every {seconds} s");
                }
                None
            }
        }
    }
}
