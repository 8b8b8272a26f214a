//! `Adopt`: the policy was changed while this process runs. It goes on with the new one, in place, if that needs nothing
//! that was not opened before the lock-down; otherwise it says that it takes a new helper.
//!
//! The broker opens the files, because nothing can be opened here any more, and is not believed which ones they are: what
//! stands at the path of the policy now is looked at, and has to be the file that was handed over. So a broker that was
//! taken over can choose when a policy of root's counts, and nothing else: no other app's file, and no older one.

use crate::judge::{Origin, judge};
use crate::state::State;
use bpfgate_protocol::authorize::authorize;
use bpfgate_protocol::hooks::Kind;
use bpfgate_protocol::messages::helper::{Adopted, Adoption};
use bpfgate_protocol::policy::file::{
    ACCOUNTS, Accounts, MAX_FILE, NotTaken, find, look_trusted, read_handed,
};
use bpfgate_protocol::policy::{Hook, Policy, needed};
use bpfgate_protocol::refusal::{Refusal, printable};
use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

/// /etc/passwd or /etc/group in bytes; the accounts of a large organisation are some MiB.
const MAX_ACCOUNTS: u64 = 16 << 20;

/// Phrases of an answer, so that it fits in a message; those beyond are in the log of this process.
const MAX_PHRASES: usize = 200;

impl State {
    /// Errors: `Denied` (these are not the files that root has put there, or they were changed after the broker has read
    /// them: nothing has changed here)
    pub(crate) fn adopt(
        &mut self,
        expected: Option<[u8; 32]>,
        files: Option<[OwnedFd; 3]>,
    ) -> Result<Adoption, Refusal> {
        let policy = self.read(files)?;
        if policy.as_ref().map(|policy| policy.digest) != expected {
            return Err(Refusal::denied("the policy file was changed after the broker has read it"));
        }
        let Some(policy) = policy else { return Ok(self.give_up()) };
        let policy = Arc::new(policy);
        if let Err(why) = self.covers(&policy) {
            eprintln!("bpfgate-helper: {}: not adopted: {why}", policy.file);
            let beyond_recall = self.beyond_recall(&policy);
            return Ok(adoption(Adopted::Restart(why), Vec::new(), beyond_recall));
        }
        let mut beyond_recall = self.beyond_recall(&policy);
        self.policy = policy.clone();
        let mut sessions = Vec::new();
        for (id, session) in &mut self.sessions {
            // The new policy may ask for other units.
            match self.inventory.units.identify(session.socket.as_fd(), &policy) {
                Ok(peer) if let Ok(permit) = authorize(&policy, &peer) => {
                    (session.permit, session.peer) = (permit, Arc::new(peer));
                }
                _ => sessions.push(*id),
            }
        }
        for id in &sessions {
            self.sessions.remove(id);
        }
        let revoked = self.judge_all(&mut beyond_recall);
        if let Err(fatal) = self.say_ready() {
            eprintln!("bpfgate-helper: {fatal}");
        }
        Ok(Adoption { sessions, ..adoption(Adopted::InForce, revoked, beyond_recall) })
    }

    /// The policy of root's that is in the files, if there is a valid one.
    fn read(&self, files: Option<[OwnedFd; 3]>) -> Result<Option<Policy>, Refusal> {
        let Some(path) = find(&self.directories, &self.app) else { return Ok(None) };
        let name = path.display().to_string();
        let none = |why: &str| {
            eprintln!("bpfgate-helper: {name}: no policy is in force any more: {why}");
            Ok(None)
        };
        let denied = |path: &Path, why: NotTaken| Refusal::denied(format!("{} {why}", path.display()));
        match look_trusted(&path) {
            // That is not root's word.
            Err(why) if why.passing => return Err(denied(&path, why)),
            Err(why) => return none(&why.why),
            Ok(stat) if u64::try_from(stat.st_size).is_ok_and(|size| size > MAX_FILE) => {
                return none(&format!("it is larger than {MAX_FILE} bytes"));
            }
            Ok(_) => {}
        }
        let Some([policy, users, groups]) = files else {
            return Err(denied(&path, "is there, and was not handed over".into()));
        };
        let bytes = read_handed(&path, policy, MAX_FILE).map_err(|why| denied(&path, why))?;
        let read = |path: &str, fd| {
            let path = Path::new(path);
            read_handed(path, fd, MAX_ACCOUNTS).map_err(|why| denied(path, why))
        };
        let accounts = Accounts::parse(&read(ACCOUNTS[0], users)?, &read(ACCOUNTS[1], groups)?);
        let Ok(text) = String::from_utf8(bytes) else { return none("it is not UTF-8 text") };
        match Policy::parse(&name, &text, &accounts) {
            Ok(policy) => Ok(Some(policy)),
            Err(error) => none(&error.lines().join("; ")),
        }
    }

    /// Whether what was opened at the start is enough for this policy; if not, what is missing.
    fn covers(&self, new: &Policy) -> Result<(), String> {
        let old = &self.policy;
        let asks_units = |policy: &Policy| policy.units().next().is_some();
        let same = [
            (needed(new) == needed(old), "it needs other capabilities"),
            (new.netns == old.netns, "netns is another one"),
            (new.keep == old.keep, "keep is another one"),
            (new.require.is_same(&old.require), "what it requires of the machine is something else"),
            (!asks_units(new) || asks_units(old), "it asks for units, and none can be looked up here"),
        ];
        if let Some((_, why)) = same.iter().find(|(same, _)| !same) {
            return Err((*why).to_owned());
        }
        if let Some((_, name)) = new.kernel_functions().find(|(_, name)| !self.inventory.functions.has(name))
        {
            return Err(format!("function {name} was not looked up at the start"));
        }
        for (name, object) in &new.objects {
            let before = old.objects.get(name).filter(|before| before.path == object.path);
            let copied = self.inventory.objects.get(name).and_then(|opened| opened.as_ref().ok());
            let covered = before.is_some_and(|before| {
                before.sha256 == object.sha256
                    || object.sha256.is_some_and(|sha256| copied.is_some_and(|copy| copy.digest == sha256))
            });
            if !covered {
                return Err(format!(
                    "object {name} is another file than the one that was opened at the start"
                ));
            }
            for rule in &object.programs {
                let missing = match &rule.hook {
                    Hook::CgroupSkb { cgroups, .. } => cgroups
                        .iter()
                        .find(|path| !self.inventory.cgroups.contains_key(path))
                        .map(ToString::to_string),
                    Hook::Uprobe { binary, .. } => {
                        (!self.inventory.binaries.contains_key(binary)).then(|| binary.to_string())
                    }
                    Hook::Tracepoint { events } => events
                        .iter()
                        .find(|event| !self.inventory.tracepoints.contains_key(event))
                        .map(ToString::to_string),
                    Hook::Xdp { .. }
                    | Hook::Tcx { .. }
                    | Hook::RawTracepoint { .. }
                    | Hook::SocketFilter
                    | Hook::Fentry { .. }
                    | Hook::Fexit { .. }
                    | Hook::Kprobe { .. } => None,
                };
                if let Some(missing) = missing {
                    return Err(format!("{missing} was not opened at the start"));
                }
            }
        }
        Ok(())
    }

    /// Lets go of everything that the policy of now does not allow; gives what that was.
    fn judge_all(&mut self, beyond_recall: &mut Vec<String>) -> Vec<String> {
        let before: Vec<String> = self.kept_names().into_iter().map(|(name, _)| name).collect();
        let (mut revoked, mut links) = (Vec::new(), Vec::new());
        for (id, instance) in std::mem::take(&mut self.instances) {
            let held: Vec<String> =
                instance.maps.iter().flat_map(|map| map.issued.all(id, &map.name)).collect();
            let (instance, gone) = judge(self, id, instance, Origin::Here, &mut revoked);
            links.extend(gone);
            match instance {
                Some(instance) => {
                    self.instances.insert(id, instance);
                }
                // Its maps live on with whoever has them.
                None => beyond_recall.extend(held),
            }
        }
        for link in links {
            if link.shared && !matches!(link.info.hook, Kind::Xdp | Kind::Tcx | Kind::CgroupSkb) {
                beyond_recall.push(format!("link {}, program {}", link.info.id.0, link.info.program));
            }
            self.release(link);
        }
        beyond_recall.sort();
        beyond_recall.dedup();
        let now: BTreeSet<String> = self.kept_names().into_iter().map(|(name, _)| name).collect();
        let gone: Vec<String> = before.into_iter().filter(|name| !now.contains(name)).collect();
        if !gone.is_empty()
            && let Err(refusal) = self.gone(&gone)
        {
            revoked.push(format!("(not sure: {})", refusal.why));
        }
        for what in &revoked {
            eprintln!("bpfgate-helper: revoked: {what}");
        }
        revoked
    }

    /// There is no policy: nothing is allowed, and this process is of no use.
    fn give_up(&mut self) -> Adoption {
        let sessions = self.sessions.keys().copied().collect();
        let all = |(id, instance): (&_, &crate::state::Instance)| -> Vec<String> {
            instance.maps.iter().flat_map(|map| map.issued.all(*id, &map.name)).collect()
        };
        let beyond_recall = self.instances.iter().flat_map(all).collect();
        self.sessions.clear();
        let mut revoked = Vec::new();
        let instances: Vec<_> = self.instances.iter().map(|(id, i)| (*id, i.object.clone())).collect();
        for (id, object) in instances {
            revoked.push(format!("instance {} of object {object}", id.0));
            if let Err(refusal) = self.remove_instance(id) {
                revoked.push(format!("(not sure: {})", refusal.why));
            }
        }
        self.over = true;
        Adoption { sessions, ..adoption(Adopted::None, revoked, beyond_recall) }
    }

    /// What clients hold by the policy of before and would not be given by this one.
    fn beyond_recall(&self, new: &Arc<Policy>) -> Vec<String> {
        let mut all = Vec::new();
        for (id, instance) in &self.instances {
            let old_access =
                |name| self.policy.objects.get(&instance.object)?.maps.get(name).map(|(access, _)| *access);
            for map in &instance.maps {
                all.extend(map.issued.wider(*id, &instance.object, &map.name, new, old_access(&map.name)));
            }
            for program in instance.programs.iter().filter(|program| program.info.fd) {
                let rules = new.objects.get(&instance.object).map_or(&[][..], |rules| &rules.programs);
                if !rules.iter().any(|rule| rule.program == program.info.name && rule.program_fd) {
                    all.push(format!("program {} of instance {}", program.info.name, id.0));
                }
            }
        }
        all
    }
}

fn adoption(verdict: Adopted, mut revoked: Vec<String>, mut beyond_recall: Vec<String>) -> Adoption {
    for phrases in [&mut revoked, &mut beyond_recall] {
        if phrases.len() > MAX_PHRASES {
            let more = phrases.len() - MAX_PHRASES;
            phrases.truncate(MAX_PHRASES);
            phrases.push(format!("and {more} more"));
        }
        for phrase in phrases.iter_mut() {
            *phrase = printable(phrase, 200);
        }
    }
    Adoption { verdict, sessions: Vec::new(), revoked, beyond_recall }
}
