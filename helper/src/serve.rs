//! The helper at work: one request after the other, each checked here whatever the broker has checked before.
//!
//! Two kinds of no. A refusal is an answer. A message that an honest broker cannot send ends the process: the broker
//! is lost, and with this process go its kernel objects.

use crate::attach;
use crate::entrance::Entrance;
use crate::loading::{self, Failed};
use crate::rounds::Rounds;
use crate::state::{Instance, Program, Session, State};
use bpfgate_lockdown::{Fatal, Step};
use bpfgate_protocol::authorize::{AttachPermit, LoadPermit, Permit, authorize};
use bpfgate_protocol::channel::{Channel, ChannelError};
use bpfgate_protocol::identity::Peer;
use bpfgate_protocol::messages::helper::{FromHelper, Outcome, ProgramInfo, ToHelper, Verb};
use bpfgate_protocol::messages::{Bulk, Bytes, InstanceId, LinkId, SessionId};
use bpfgate_protocol::names::{MapName, ObjectName, ProgramName};
use bpfgate_protocol::policy::{Access, Right};
use bpfgate_protocol::refusal::Refusal;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::socket::{UnixAddr, getsockname, getsockopt, sockopt};
use nix::sys::time::TimeSpec;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a request came to. Descriptors are named, not held: they are lent to the message that carries them.
struct Done {
    outcome: Outcome,
    line: Option<u32>,
    fds: Vec<Lend>,
}

enum Lend {
    Program(InstanceId, usize),
    Map(InstanceId, usize),
    NewestLink(InstanceId),
}

impl Done {
    fn plain(outcome: Outcome, line: u32) -> Self {
        Self { outcome, line: Some(line), fds: Vec::new() }
    }
}

/// Serves until nobody needs it any more: the channel is closed, or nothing was loaded and nobody was there for a while.
pub(crate) fn run(
    mut entrance: Entrance,
    ready: &FromHelper,
    mut state: State,
    mut rounds: Rounds,
) -> Result<(), Fatal> {
    loop {
        let (asked, gone) = wait(entrance.fd(), &state, rounds.timeout())?;
        for session in gone {
            state.remove_session(session);
        }
        if asked {
            let served = match entrance.broker() {
                Some(broker) => serve_one(broker, &mut state, &mut rounds),
                None => entrance.let_in(ready).map(|()| true),
            };
            if state.over {
                return served.map(drop);
            }
            if !matches!(served, Ok(true)) {
                // With the broker go its sessions: their clients see the end of their connections.
                state.remove_sessions();
                if !entrance.lost() {
                    return served.map(drop);
                }
                if let Err(fatal) = served {
                    eprintln!("bpfgate-helper: {fatal}");
                }
            }
        }
        if state.loader.is_gone() && state.instances.is_empty() {
            return Err(Fatal(
                "the loader has ended, and nothing is loaded: a new helper can start a new one".into(),
            ));
        }
        let used = !state.instances.is_empty() || entrance.broker().is_some();
        if rounds.go(&mut state, used)? {
            return Ok(());
        }
    }
}

/// One request; false if the broker is gone.
fn serve_one(broker: &mut Channel, state: &mut State, rounds: &mut Rounds) -> Result<bool, Fatal> {
    let (request, fds) = match broker.recv::<ToHelper>() {
        Ok(received) => received,
        Err(ChannelError::Closed) => return Ok(false),
        Err(error) => return Err(Fatal::step("the broker", error)),
    };
    if matches!(request, ToHelper::Adopt { .. }) {
        rounds.hurry();
    }
    let done = state.answer(request, fds)?;
    send(broker, state, done)?;
    Ok(true)
}

/// Waits; whether the broker has something to say, and the sessions whose client is gone. That comes from the kernel:
/// a broker that keeps quiet about it changes nothing.
fn wait(
    entrance: BorrowedFd<'_>,
    state: &State,
    timeout: Option<Duration>,
) -> Result<(bool, Vec<SessionId>), Fatal> {
    let mut fds = vec![PollFd::new(entrance, PollFlags::POLLIN)];
    fds.extend(
        state.sessions.values().map(|session| PollFd::new(session.socket.as_fd(), PollFlags::empty())),
    );
    match ppoll(&mut fds, timeout.map(TimeSpec::from_duration), None) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(error) => return Err(Fatal::step("ppoll", error)),
    }
    let mut ready = fds.iter().map(|fd| fd.revents().is_some_and(|events| !events.is_empty()));
    let asked = ready.next().unwrap_or(false);
    let gone = state.sessions.keys().zip(ready).filter(|(_, hung_up)| *hung_up).map(|(id, _)| *id).collect();
    Ok((asked, gone))
}

fn send(broker: &Channel, state: &State, done: Result<Done, Failed>) -> Result<(), Fatal> {
    let (outcome, line, lent, log_fd) = match done {
        Ok(done) => (done.outcome, done.line, done.fds, None),
        Err(Failed { refusal, log, log_fd }) => {
            let line = refusal.line;
            (Outcome::Refused { refusal, log }, line, Vec::new(), log_fd)
        }
    };
    let mut fds: Vec<BorrowedFd<'_>> = Vec::new();
    for lend in &lent {
        let fd = match lend {
            Lend::Program(id, place) => state.instances[id].programs[*place].fd.as_fd(),
            Lend::Map(id, place) => state.instances[id].maps[*place].fd.as_fd(),
            Lend::NewestLink(id) => match state.instances[id].links.last() {
                Some(link) => link.fd().as_fd(),
                None => return Err(Fatal("a link is missing".into())),
            },
        };
        fds.push(fd);
    }
    fds.extend(log_fd.as_ref().map(AsFd::as_fd));
    match broker.send(&FromHelper::Answer { outcome, line }, &fds) {
        // Too long to be said: nothing was sent.
        Err(ChannelError::Protocol(why)) => {
            let outcome = Outcome::Refused { refusal: Refusal::quota(why), log: Bulk::empty() };
            broker.send(&FromHelper::Answer { outcome, line }, &[]).step("answering")
        }
        sent => sent.step("answering"),
    }
}

impl State {
    fn answer(&mut self, request: ToHelper, mut fds: Vec<OwnedFd>) -> Result<Result<Done, Failed>, Fatal> {
        if let ToHelper::Adopt { policy, .. } = request {
            let adoption = self.adopt(policy, fds.try_into().ok());
            let done = |adoption| Done { outcome: Outcome::Adopted(adoption), line: None, fds: Vec::new() };
            return Ok(adoption.map(done).map_err(Failed::from));
        }
        let fd = fds.pop();
        let (ToHelper::Open { session } | ToHelper::Ask { session, .. } | ToHelper::Close { session }) =
            request
        else {
            return Ok(Ok(Done { outcome: self.survey(), line: None, fds: Vec::new() }));
        };
        let is_new = self.is_new(session);
        Ok(match (request, fd) {
            (ToHelper::Open { .. }, Some(socket)) if is_new => {
                self.open(session, socket).map_err(Failed::from)
            }
            // How many descriptors a message has is a part of its shape, which the channel has checked.
            (ToHelper::Ask { verb, .. }, fd) if !is_new => match self.sessions.get(&session) {
                Some(entry) => {
                    let (permit, peer) = (entry.permit.clone(), entry.peer.clone());
                    self.ask(session, &permit, &peer, verb, fd)
                }
                // The client went away before the broker knew.
                None => Err(Refusal::gone("the session has ended").into()),
            },
            (ToHelper::Close { .. }, None) if !is_new => {
                self.remove_session(session);
                Ok(Done { outcome: Outcome::Done, line: None, fds: Vec::new() })
            }
            _ => return Err(Fatal("the broker uses a session number out of order".into())),
        })
    }

    fn ask(
        &mut self,
        session: SessionId,
        permit: &Permit,
        peer: &Arc<Peer>,
        verb: Verb,
        fd: Option<OwnedFd>,
    ) -> Result<Done, Failed> {
        Ok(match verb {
            Verb::Load { object, programs, globals } => {
                let load = permit.load(&object, &programs, &globals)?;
                self.load(session, permit, peer, &load)?
            }
            Verb::Attach { instance, program, hook, target } => {
                let object = self.own_instance(session, instance)?.object.clone();
                let permit = permit.attach(&object, &program, hook, &target)?;
                self.attach(instance, &permit, fd)?
            }
            Verb::Detach { link } => self.detach(session, permit, link)?,
            Verb::Unload { instance } => self.unload(session, permit, instance)?,
            Verb::Map { instance, map } => self.map(permit, peer, instance, &map)?,
            Verb::ReadMap { instance, map, cursor, limit } => {
                self.read_map(permit, instance, &map, &cursor, limit)?
            }
            Verb::List => self.list_for(session, permit)?,
        })
    }

    fn open(&mut self, id: SessionId, socket: OwnedFd) -> Result<Done, Refusal> {
        let unknown =
            |why: &dyn std::fmt::Display| Refusal::denied(format!("the client cannot be identified: {why}"));
        // A broker that was taken over holds other sockets whose peer is somebody else: its log, its channels. A client
        // is who came through the broker's own socket, which the kernel names.
        let name = getsockname::<UnixAddr>(socket.as_raw_fd()).map_err(|e| unknown(&e))?;
        let listens = getsockopt(&socket, sockopt::AcceptConn).map_err(|e| unknown(&e))?;
        if name.path() != Some(self.entrance.as_path()) || listens {
            return Err(unknown(&"it did not come through the socket for clients"));
        }
        let peer = self.inventory.units.identify(socket.as_fd(), &self.policy).map_err(|e| unknown(&e))?;
        let permit = authorize(&self.policy, &peer)?;
        if self.sessions.len() >= self.policy.limits.connections as usize {
            return Err(Refusal::quota("as many connections as the policy allows are there already"));
        }
        let line = permit.line();
        self.sessions.insert(id, Session { permit, peer: Arc::new(peer), socket });
        Ok(Done::plain(Outcome::Done, line))
    }

    fn load(
        &mut self,
        session: SessionId,
        permit: &Permit,
        peer: &Arc<Peer>,
        load: &LoadPermit,
    ) -> Result<Done, Failed> {
        self.pace.one_more(self.policy.limits.loads_per_minute, Instant::now())?;
        let instance = self.load_object(Some(session), load)?;
        self.loaded(permit, peer, load, instance).map_err(|refusal| {
            let _ = self.remove_instance(instance);
            refusal.into()
        })
    }

    /// Loads an object, for a session or for the policy itself.
    pub(crate) fn load_object(
        &mut self,
        owner: Option<SessionId>,
        load: &LoadPermit,
    ) -> Result<InstanceId, Failed> {
        let budget = self.budget();
        let approved = match self.inventory.objects.get(load.object()) {
            Some(Ok(approved)) => approved,
            Some(Err(refusal)) => return Err(refusal.clone().into()),
            None => return Err(Refusal::denied("no such object").into()),
        };
        let digest = approved.digest;
        let loaded = loading::load(&mut self.loader, load, approved.copy.as_fd(), budget, &self.inventory)?;
        let hook =
            |name: &ProgramName| load.programs().find(|rule| rule.program == *name).map(|rule| &rule.hook);
        let programs: Vec<Program> = loaded
            .programs
            .into_iter()
            .filter_map(|(name, fd)| {
                let hook = hook(&name)?;
                let info = ProgramInfo { hook: hook.kind(), fd: load.program_fd(&name), name };
                Some(Program { info, function: hook.bound_to().cloned(), fd })
            })
            .collect();
        let instance = Instance {
            object: load.object().clone(),
            digest,
            owner,
            programs,
            maps: loaded.maps,
            map_bytes: loaded.map_bytes,
            links: Vec::new(),
            functions: loaded.functions,
            globals: load.globals().to_vec(),
        };
        Ok(self.add_instance(instance)?)
    }

    /// What the client is told and given of what it has loaded.
    fn loaded(
        &mut self,
        permit: &Permit,
        peer: &Arc<Peer>,
        load: &LoadPermit,
        id: InstanceId,
    ) -> Result<Done, Refusal> {
        let cpus = self.inventory.cpus;
        let Some(instance) = self.instances.get_mut(&id) else {
            return Err(Refusal::gone("the instance is gone"));
        };
        let object = &instance.object;
        let (mut infos, mut lent) = (Vec::new(), Vec::new());
        for (place, map) in instance.maps.iter_mut().enumerate() {
            // A client that may not have a map is not told of it.
            let Ok(access) =
                permit.map(object, &map.name).map(bpfgate_protocol::authorize::MapPermit::access)
            else {
                continue;
            };
            map.prepare(access)?;
            map.issued.add(peer, access);
            if access.hands_over() {
                lent.push(place);
            }
            infos.push(map.info(access, cpus)?);
        }
        let programs: Vec<ProgramInfo> = instance.programs.iter().map(|p| p.info.clone()).collect();
        let with_fd = programs.iter().enumerate().filter(|(_, info)| info.fd);
        let mut fds: Vec<Lend> = with_fd.map(|(place, _)| Lend::Program(id, place)).collect();
        fds.extend(lent.into_iter().map(|place| Lend::Map(id, place)));
        let outcome = Outcome::Loaded { instance: id, digest: instance.digest, programs, maps: infos };
        Ok(Done { outcome, line: Some(load.line()), fds })
    }

    fn attach(
        &mut self,
        id: InstanceId,
        permit: &AttachPermit,
        cgroup: Option<OwnedFd>,
    ) -> Result<Done, Refusal> {
        let link = self.attach_program(id, permit, cgroup)?;
        let fd = permit.rule().link_fd;
        let fds = if fd { vec![Lend::NewestLink(id)] } else { Vec::new() };
        let outcome = Outcome::Attached { link, target: permit.target().clone(), fd };
        Ok(Done { outcome, line: Some(permit.rule().line), fds })
    }

    /// Attaches a program, for a session or for the policy itself.
    pub(crate) fn attach_program(
        &mut self,
        id: InstanceId,
        permit: &AttachPermit,
        cgroup: Option<OwnedFd>,
    ) -> Result<LinkId, Refusal> {
        let program = &permit.rule().program;
        if self.links() >= self.policy.limits.links as usize {
            return Err(Refusal::quota("as many programs as the policy allows are attached already"));
        }
        let instance = self.instance(id)?;
        if let Some(link) = instance.link_to(program, permit.rule().hook.kind(), permit.target()) {
            let why =
                format!("program {program} is attached to {} already, as link {}", permit.target(), link.0);
            return Err(Refusal::invalid(why));
        }
        let Some(place) = instance.programs.iter().position(|p| p.info.name == *program) else {
            return Err(Refusal::invalid(format!("program {program} was not loaded with this instance")));
        };
        let program = self.instances[&id].programs[place].fd.as_fd();
        let attached = attach::attach(&mut self.inventory, &mut self.loader, permit, program, cgroup)?;
        self.add_link(id, permit, attached)
    }

    fn detach(&mut self, session: SessionId, permit: &Permit, link: LinkId) -> Result<Done, Refusal> {
        let right = permit.right(Right::Attach)?;
        self.remove_link(session, link)?;
        Ok(Done::plain(Outcome::Done, right.line()))
    }

    fn unload(&mut self, session: SessionId, permit: &Permit, id: InstanceId) -> Result<Done, Refusal> {
        let right = permit.right(Right::Load)?;
        self.own_instance(session, id)?;
        self.remove_instance(id)?;
        Ok(Done::plain(Outcome::Done, right.line()))
    }

    fn map(
        &mut self,
        permit: &Permit,
        peer: &Arc<Peer>,
        id: InstanceId,
        name: &MapName,
    ) -> Result<Done, Refusal> {
        let permit = permit.map(&self.instance(id)?.object, name)?;
        let place = self.find_map(id, name)?;
        let (access, cpus) = (permit.access(), self.inventory.cpus);
        let Some(map) = self.instances.get_mut(&id).and_then(|instance| instance.maps.get_mut(place)) else {
            return Err(Refusal::denied("no such map"));
        };
        map.prepare(access)?;
        map.issued.add(peer, access);
        let info = map.info(access, cpus)?;
        let fds = if info.fd { vec![Lend::Map(id, place)] } else { Vec::new() };
        Ok(Done { outcome: Outcome::Map(info), line: Some(permit.line()), fds })
    }

    fn read_map(
        &mut self,
        permit: &Permit,
        id: InstanceId,
        name: &MapName,
        cursor: &Bytes,
        limit: u16,
    ) -> Result<Done, Refusal> {
        let permit = permit.map(&self.instance(id)?.object, name)?;
        let place = self.find_map(id, name)?;
        let outcome = self.instance(id)?.maps[place].read(cursor, limit, self.inventory.cpus)?;
        Ok(Done::plain(outcome, permit.line()))
    }

    fn find_map(&self, id: InstanceId, name: &MapName) -> Result<usize, Refusal> {
        let place = self.instance(id)?.maps.iter().position(|map| map.name == *name);
        place.ok_or_else(|| Refusal::denied(format!("the object has no map {name}")))
    }

    fn list_for(&self, session: SessionId, permit: &Permit) -> Result<Done, Refusal> {
        let access = |object: &ObjectName, map: &MapName| {
            permit.map(object, map).map_or(Access::None, bpfgate_protocol::authorize::MapPermit::access)
        };
        Ok(Done::plain(Outcome::Instances(self.list(session, access)?), permit.line()))
    }
}
