//! What this helper owns: sessions, instances, their programs, maps and links. Descriptors are released by dropping
//! what holds them; there is no other clean-up.

use crate::attach::Attached;
use crate::inventory::Inventory;
use crate::loader::Loader;
use crate::loading::Budget;
use crate::maps::Map;
use crate::pace::Pace;
use crate::store::{self, Store};
use bpfgate_helper::way::Way;
use bpfgate_protocol::authorize::{AttachPermit, Permit};
use bpfgate_protocol::functions::Function;
use bpfgate_protocol::hooks::Kind;
use bpfgate_protocol::identity::Peer;
use bpfgate_protocol::messages::helper::{
    Global, InstanceInfo, LinkInfo, MapInfo, Outcome, ProgramInfo, Target,
};
use bpfgate_protocol::messages::{InstanceId, LinkId, SessionId};
use bpfgate_protocol::names::{AppName, FunctionName, MapName, ObjectName, ProgramName};
use bpfgate_protocol::policy::{Access, Policy};
use bpfgate_protocol::refusal::Refusal;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

pub(crate) struct State {
    pub(crate) app: AppName,
    /// Where its policy may be.
    pub(crate) directories: Vec<PathBuf>,
    pub(crate) policy: Arc<Policy>,
    pub(crate) inventory: Inventory,
    pub(crate) loader: Loader,
    /// The path of the socket that clients come through.
    pub(crate) entrance: PathBuf,
    pub(crate) sessions: BTreeMap<SessionId, Session>,
    pub(crate) instances: BTreeMap<InstanceId, Instance>,
    pub(crate) store: Store,
    pub(crate) pace: Pace,
    /// Numbers are given once: a number of something that is gone never means something else.
    pub(crate) last_instance: u64,
    pub(crate) last_link: u64,
    last_session: u64,
    /// There is no policy any more: this process ends.
    pub(crate) over: bool,
}

pub(crate) struct Session {
    pub(crate) permit: Permit,
    pub(crate) peer: Arc<Peer>,
    /// The client's end tells when it is gone. Nothing is ever read from it or written to it here.
    pub(crate) socket: OwnedFd,
}

pub(crate) struct Instance {
    pub(crate) object: ObjectName,
    /// SHA-256 of the file that it was loaded from.
    pub(crate) digest: [u8; 32],
    /// None: it lives until it is unloaded.
    pub(crate) owner: Option<SessionId>,
    pub(crate) programs: Vec<Program>,
    pub(crate) maps: Vec<Map>,
    pub(crate) map_bytes: u64,
    pub(crate) links: Vec<Link>,
    /// Functions that its programs call by grant of the policy.
    pub(crate) functions: BTreeSet<Function>,
    /// What globals were set to.
    pub(crate) globals: Vec<Global>,
}

pub(crate) struct Program {
    pub(crate) info: ProgramInfo,
    /// The function of the kernel that it was loaded for.
    pub(crate) function: Option<FunctionName>,
    pub(crate) fd: OwnedFd,
}

pub(crate) struct Link {
    pub(crate) info: LinkInfo,
    pub(crate) way: Way,
    pub(crate) attached: Attached,
    /// A client holds the link too.
    pub(crate) shared: bool,
}

impl Link {
    pub(crate) fn fd(&self) -> &OwnedFd {
        &self.attached.link
    }
}

impl State {
    pub(crate) fn new(
        app: &AppName,
        directories: &[PathBuf],
        policy: Arc<Policy>,
        inventory: Inventory,
        loader: Loader,
        entrance: PathBuf,
        store: Store,
    ) -> Self {
        Self {
            app: app.clone(),
            directories: directories.to_vec(),
            over: false,
            store,
            policy,
            inventory,
            loader,
            entrance,
            sessions: BTreeMap::new(),
            instances: BTreeMap::new(),
            pace: Pace::default(),
            last_instance: 0,
            last_link: 0,
            last_session: 0,
        }
    }

    /// Whether the number was never used; the broker counts up.
    pub(crate) fn is_new(&mut self, id: SessionId) -> bool {
        let new = id.0 > self.last_session;
        self.last_session = self.last_session.max(id.0);
        new
    }

    /// What the app may still have under its limits.
    pub(crate) fn budget(&self) -> Budget {
        let limits = self.policy.limits;
        let all = || self.instances.values();
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Budget {
            programs: limits.programs.saturating_sub(count(all().map(|i| i.programs.len()).sum())),
            maps: limits.maps.saturating_sub(count(all().map(|i| i.maps.len()).sum())),
            map_bytes: limits.map_memory.saturating_sub(all().map(|i| i.map_bytes).sum()),
        }
    }

    pub(crate) fn links(&self) -> usize {
        self.instances.values().map(|instance| instance.links.len()).sum()
    }

    /// `instance.owner` is the session that loads it; what is kept has none.
    pub(crate) fn add_instance(&mut self, mut instance: Instance) -> Result<InstanceId, Refusal> {
        self.last_instance += 1;
        let id = InstanceId(self.last_instance);
        if self.policy.keep.is_persistent() {
            instance.owner = None;
        }
        self.instances.insert(id, instance);
        let names: BTreeSet<String> = self.names_of(id).into_iter().map(|(name, _)| name).collect();
        let kept = self.keep_again(&names.iter().collect());
        kept.map(|()| id).inspect_err(|_| drop(self.remove_instance(id)))
    }

    /// Everything that is to be kept, by name.
    pub(crate) fn kept_names(&self) -> Vec<(String, &OwnedFd)> {
        self.instances.keys().flat_map(|id| self.names_of(*id)).collect()
    }

    fn names_of(&self, id: InstanceId) -> Vec<(String, &OwnedFd)> {
        let Some(instance) = self.instances.get(&id) else { return Vec::new() };
        let programs = instance.programs.iter().map(|p| (store::program_name(id, &p.info.name), &p.fd));
        let maps = instance.maps.iter().map(|m| (store::map_name(id, &m.name), &m.fd));
        let links = instance.links.iter().map(|link| (store::link_name(link.info.id), link.fd()));
        programs.chain(maps).chain(links).collect()
    }

    /// An instance that any session of the app may look at.
    pub(crate) fn instance(&self, id: InstanceId) -> Result<&Instance, Refusal> {
        self.instances.get(&id).ok_or_else(|| self.absent_instance(id))
    }

    fn absent_instance(&self, id: InstanceId) -> Refusal {
        if (1..=self.last_instance).contains(&id.0) {
            Refusal::gone(format!("instance {} was unloaded, or its session has ended", id.0))
        } else {
            Refusal::denied(format!("there was never an instance {}", id.0))
        }
    }

    /// An instance that this session may change: its own, or one that belongs to the whole app.
    pub(crate) fn own_instance(
        &mut self,
        session: SessionId,
        id: InstanceId,
    ) -> Result<&mut Instance, Refusal> {
        let absent = self.absent_instance(id);
        let instance = self.instances.get_mut(&id).ok_or(absent)?;
        if instance.owner.is_none_or(|owner| owner == session) {
            Ok(instance)
        } else {
            Err(Refusal::denied(format!("instance {} belongs to another session", id.0)))
        }
    }

    pub(crate) fn add_link(
        &mut self,
        instance: InstanceId,
        permit: &AttachPermit,
        attached: Attached,
    ) -> Result<LinkId, Refusal> {
        self.last_link += 1;
        let id = LinkId(self.last_link);
        let rule = permit.rule();
        let info = LinkInfo {
            id,
            program: rule.program.clone(),
            hook: rule.hook.kind(),
            target: permit.target().clone(),
        };
        if let Some(instance) = self.instances.get_mut(&instance) {
            let way = Way::of(&rule.hook);
            instance.links.push(Link { info, way, attached, shared: rule.link_fd });
        }
        let kept = self.keep_again(&BTreeSet::from([&store::link_name(id)]));
        kept.map(|()| id).inspect_err(|_| drop(self.drop_link(instance, id)))
    }

    /// Takes a link down and gives it back, if the session may.
    pub(crate) fn remove_link(&mut self, session: SessionId, id: LinkId) -> Result<(), Refusal> {
        let found = self.instances.iter().find_map(|(instance, entry)| {
            entry.links.iter().position(|link| link.info.id == id).map(|place| (*instance, place))
        });
        let Some((instance, place)) = found else {
            return Err(if (1..=self.last_link).contains(&id.0) {
                Refusal::gone(format!("link {} is detached already", id.0))
            } else {
                Refusal::denied(format!("there was never a link {}", id.0))
            });
        };
        let id = self.own_instance(session, instance)?.links[place].info.id;
        self.drop_link(instance, id)
    }

    /// Takes a link down.
    ///
    /// Errors: `Helper` (it is gone here, and nobody says that it is gone elsewhere)
    pub(crate) fn drop_link(&mut self, instance: InstanceId, id: LinkId) -> Result<(), Refusal> {
        let links = self.instances.get_mut(&instance).map(|instance| &mut instance.links);
        let Some(links) = links else { return Ok(()) };
        let Some(place) = links.iter().position(|link| link.info.id == id) else { return Ok(()) };
        let link = links.remove(place);
        self.release(link);
        self.gone(&[store::link_name(id)])
    }

    pub(crate) fn remove_instance(&mut self, id: InstanceId) -> Result<(), Refusal> {
        let names: Vec<String> = self.names_of(id).into_iter().map(|(name, _)| name).collect();
        if let Some(instance) = self.instances.remove(&id) {
            for link in instance.links {
                self.release(link);
            }
            return self.gone(&names);
        }
        Ok(())
    }

    /// What had these names is not there any more.
    pub(crate) fn gone(&mut self, names: &[String]) -> Result<(), Refusal> {
        if !self.keeps() {
            return Ok(());
        }
        // Without a new record the old one names what does not come back, which is said then and harmless.
        let saved = self.save();
        self.forget(names).and(saved)
    }

    /// Ends all sessions: the broker that spoke for them is gone.
    pub(crate) fn remove_sessions(&mut self) {
        let all: Vec<SessionId> = self.sessions.keys().copied().collect();
        for session in all {
            self.remove_session(session);
        }
        self.last_session = 0;
    }

    /// All instances, for the administrator.
    pub(crate) fn survey(&self) -> Outcome {
        let instance = |(id, instance): (&InstanceId, &Instance)| InstanceInfo {
            id: *id,
            object: instance.object.clone(),
            mine: false,
            programs: instance.programs.iter().map(|p| ProgramInfo { fd: false, ..p.info.clone() }).collect(),
            maps: Vec::new(),
            links: instance.links.iter().map(|link| link.info.clone()).collect(),
        };
        let sessions = u32::try_from(self.sessions.len()).unwrap_or(u32::MAX);
        Outcome::Survey { sessions, instances: self.instances.iter().map(instance).collect() }
    }

    /// Ends a session and what lives as long as it.
    pub(crate) fn remove_session(&mut self, session: SessionId) {
        self.sessions.remove(&session);
        let own: Vec<_> =
            self.instances.iter().filter(|(_, i)| i.owner == Some(session)).map(|(id, _)| *id).collect();
        for id in own {
            // Nothing of a session is kept elsewhere.
            let _ = self.remove_instance(id);
        }
    }

    pub(crate) fn release(&mut self, link: Link) {
        let Link { info, attached: Attached { link, event }, shared, .. } = link;
        if shared || self.store.manager.is_there() {
            // A client or the service manager may hold it too. Links of tracing programs do not know this command:
            // those end with the last descriptor, as the policy reference says of link_fd.
            let _ = bpfgate_bpf::link_detach(std::os::fd::AsFd::as_fd(&link));
        }
        drop(link);
        // The policy gives nobody the link of a tracepoint: its event is free again.
        if let (Target::Event(name), Some(event)) = (info.target, event)
            && let Some(Ok(events)) = self.inventory.tracepoints.get_mut(&name)
        {
            events.push(event);
        }
    }

    pub(crate) fn list(
        &self,
        session: SessionId,
        access: impl Fn(&ObjectName, &MapName) -> Access,
    ) -> Result<Vec<InstanceInfo>, Refusal> {
        let mut all = Vec::new();
        for (id, instance) in &self.instances {
            // A listing carries no descriptors.
            let mut maps = Vec::new();
            for map in &instance.maps {
                let access = access(&instance.object, &map.name);
                if access != Access::None {
                    maps.push(MapInfo { fd: false, ..map.info(access, self.inventory.cpus)? });
                }
            }
            let programs =
                instance.programs.iter().map(|program| ProgramInfo { fd: false, ..program.info.clone() });
            all.push(InstanceInfo {
                id: *id,
                object: instance.object.clone(),
                mine: instance.owner == Some(session),
                programs: programs.collect(),
                maps,
                links: instance.links.iter().map(|link| link.info.clone()).collect(),
            });
        }
        Ok(all)
    }
}

impl Instance {
    /// The live link of this program under this hook to this target, if there is one.
    pub(crate) fn link_to(&self, program: &ProgramName, hook: Kind, target: &Target) -> Option<LinkId> {
        let same = |link: &&Link| {
            let info = &link.info;
            info.program == *program && info.hook == hook && info.target == *target
        };
        self.links.iter().find(same).map(|link| link.info.id)
    }
}
