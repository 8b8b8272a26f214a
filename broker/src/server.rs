//! The loop: clients on one side, helpers on the other. It waits for nobody.

mod reload;

pub(crate) use reload::Fate;

use crate::Arguments;
use crate::audit::{Audit, Record, Subject};
use crate::connection::{Connection, End, MAX_REQUEST, Next, Session};
use crate::generation::{Changed, Generations};
use crate::helpers::{Helper, Request, Said};
use crate::reply;
use crate::starter::{Attempt, Start, Starter};
use bpfgate_broker::call::{Call, Frame, Misunderstood};
use bpfgate_lockdown::{Fatal, Step};
use bpfgate_protocol::authorize::{Permit, authorize};
use bpfgate_protocol::channel::send_stream;
use bpfgate_protocol::hex;
use bpfgate_protocol::identity::{Peer, Units};
use bpfgate_protocol::messages::SessionId;
use bpfgate_protocol::messages::helper::{Outcome, Sandbox, Target, ToHelper, Verb};
use bpfgate_protocol::names::AppName;
use bpfgate_protocol::policy::{Machine, Policy, Right};
use bpfgate_protocol::refusal::{Refusal, printable};
use bpfgate_systemd::manager::Manager;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signalfd::SignalFd;
use nix::sys::socket::{Backlog, getsockopt, listen, sockopt};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Instant;

/// Names of event sources. Numbers of connections and helpers are given once, so that a late event is never taken for
/// one of a successor.
const CLIENTS: u64 = 0;
const SPAWNER: u64 = 1;
const ADMIN: u64 = 2;
const HANGUPS: u64 = 3;

/// The sockets that we listen on.
pub(crate) struct Doors {
    pub(crate) clients: OwnedFd,
    pub(crate) admin: Option<OwnedFd>,
}

/// What was found out before the lock-down.
pub(crate) struct Here {
    pub(crate) sandbox: Sandbox,
    pub(crate) machine: Machine,
    pub(crate) units: Units,
}

/// What the start has made.
pub(crate) struct Parts {
    pub(crate) doors: Doors,
    pub(crate) generations: Generations,
    /// SIGHUP, to be read.
    pub(crate) hangups: SignalFd,
    pub(crate) starter: Starter,
    pub(crate) manager: Manager,
    pub(crate) audit: Audit,
    pub(crate) here: Here,
}

/// One of the doors.
struct Door {
    listener: UnixListener,
    name: u64,
    /// Epoll knows it: nobody is let in while there are too many.
    open: bool,
}

/// What a request in the helper's hands is about.
pub(crate) struct Tag {
    /// None: no client waits for the answer (`Close`).
    asker: Option<Asker>,
    subject: Subject,
    /// By which it is judged, and in which generation that is in force.
    policy: Arc<Policy>,
    generation: u64,
}

/// A request of a client.
struct Asker {
    connection: u64,
    peer: Peer,
    request: String,
    oneway: bool,
}

pub(crate) struct Server {
    epoll: Epoll,
    doors: Vec<Door>,
    manager: Manager,
    here: Here,
    pub(crate) started: Instant,
    generations: Generations,
    hangups: SignalFd,
    /// Administrators who wait for a generation of at least this number.
    reloading: Vec<(u64, u64)>,
    /// What the last reload means for apps, and those whose helpers have not answered yet.
    fates: BTreeMap<AppName, Fate>,
    outstanding: BTreeSet<AppName>,
    /// Apps without a helper here that it means something for, and that it has not come to yet.
    untold: VecDeque<Changed>,
    starter: Starter,
    audit: Audit,
    connections: HashMap<u64, Connection>,
    deadlines: BTreeSet<(Instant, u64)>,
    helpers: BTreeMap<u64, Helper<Tag>>,
    helper_of: BTreeMap<AppName, u64>,
    /// Connections by user; those of administrators are counted apart.
    per_user: HashMap<(u32, bool), u32>,
    max_connections: usize,
    max_per_user: u32,
    last_number: u64,
    /// Clients that may have more requests.
    ready: VecDeque<u64>,
    buffer: Vec<u8>,
}

impl Server {
    pub(crate) fn new(arguments: &Arguments, parts: Parts) -> std::io::Result<Self> {
        let Parts { doors, generations, hangups, starter, manager, audit, here } = parts;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let mut all = Vec::new();
        for (name, listener) in [(CLIENTS, Some(doors.clients)), (ADMIN, doors.admin)] {
            let Some(listener) = listener else { continue };
            epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, name))?;
            listen(&listener, Backlog::MAXCONN)?;
            all.push(Door { listener: listener.into(), name, open: true });
        }
        if let Some(spawner) = starter.spawner() {
            epoll.add(spawner, EpollEvent::new(EpollFlags::EPOLLIN, SPAWNER))?;
        }
        epoll.add(&hangups, EpollEvent::new(EpollFlags::EPOLLIN, HANGUPS))?;
        manager.ready("serving")?;
        Ok(Self {
            epoll,
            doors: all,
            manager,
            here,
            started: Instant::now(),
            generations,
            hangups,
            reloading: Vec::new(),
            fates: BTreeMap::new(),
            outstanding: BTreeSet::new(),
            untold: VecDeque::new(),
            starter,
            audit,
            connections: HashMap::new(),
            deadlines: BTreeSet::new(),
            helpers: BTreeMap::new(),
            helper_of: BTreeMap::new(),
            per_user: HashMap::new(),
            max_connections: arguments.max_connections as usize,
            max_per_user: arguments.max_connections_per_user,
            last_number: HANGUPS,
            ready: VecDeque::new(),
            buffer: vec![0; MAX_REQUEST],
        })
    }

    pub(crate) fn run(mut self) -> Result<(), Fatal> {
        let mut events = vec![EpollEvent::empty(); 256];
        loop {
            let count = match self.epoll.wait(&mut events, self.timeout()) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(error) => return Err(Fatal::step("epoll", error)),
            };
            for event in &events[..count] {
                match event.data() {
                    door @ (CLIENTS | ADMIN) => self.accept(door),
                    SPAWNER => self.started()?,
                    HANGUPS => self.hung_up(),
                    number if self.helpers.contains_key(&number) => self.helper_says(number)?,
                    number => self.client_says(number, event.events())?,
                }
            }
            for _ in 0..self.ready.len().min(64) {
                if let Some(number) = self.ready.pop_front() {
                    self.requests(number)?;
                }
            }
            self.read_on()?;
            self.look_at_the_clock()?;
        }
    }

    fn timeout(&self) -> EpollTimeout {
        if !self.ready.is_empty() || self.generations.is_reading() || !self.untold.is_empty() {
            return EpollTimeout::ZERO;
        }
        let client = self.deadlines.first().map(|(at, _)| *at);
        let helper = self.helpers.values().flat_map(|h| h.deadline().into_iter().chain(h.retry())).min();
        let others = self.manager.next_beat().into_iter().chain(self.audit.due());
        let Some(next) = client.into_iter().chain(helper).chain(others).min() else {
            return EpollTimeout::NONE;
        };
        let wait = next.saturating_duration_since(Instant::now()).as_millis() + 1;
        EpollTimeout::try_from(i32::try_from(wait).unwrap_or(i32::MAX)).unwrap_or(EpollTimeout::NONE)
    }

    fn look_at_the_clock(&mut self) -> Result<(), Fatal> {
        let now = Instant::now();
        self.manager.beat(now).step("the service manager")?;
        self.audit.summarize(now)?;
        while let Some(&(at, number)) = self.deadlines.first().filter(|(at, _)| *at <= now) {
            self.deadlines.remove(&(at, number));
            let Some(connection) = self.connections.get_mut(&number) else { continue };
            connection.armed = None;
            match connection.deadline(now) {
                Some((at, true)) if at <= now => self.end(number, End::Quiet),
                _ => self.requests(number)?,
            }
        }
        let stuck: Vec<u64> = self
            .helpers
            .iter()
            .filter(|(_, h)| h.retry().is_some_and(|at| at <= now))
            .map(|(n, _)| *n)
            .collect();
        for number in stuck {
            self.pass_on(number);
        }
        let late: Vec<u64> = self
            .helpers
            .iter()
            .filter(|(_, h)| h.deadline().is_some_and(|at| at <= now))
            .map(|(n, _)| *n)
            .collect();
        for number in late {
            if self.helpers[&number].is_idle() {
                self.forget_helper(number);
            } else {
                self.lost(number, "it did not answer in time")?;
            }
        }
        Ok(())
    }

    fn number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    // ---- clients ----

    /// Lets one client in, or sends it away. One at a time: whoever is inside comes next, however many are at the door.
    fn accept(&mut self, name: u64) {
        let Some(door) = self.doors.iter_mut().find(|door| door.name == name) else { return };
        // The administrator gets in, however many clients there are.
        if self.connections.len() >= self.max_connections && name == CLIENTS {
            door.open = self.epoll.delete(&door.listener).is_err();
            return;
        }
        let Ok((stream, _)) = door.listener.accept() else { return };
        let Ok(credentials) = getsockopt(&stream, sockopt::PeerCredentials) else { return };
        let uid = credentials.uid();
        let who = (uid, name == ADMIN);
        let count = self.per_user.entry(who).or_default();
        if *count >= self.max_per_user {
            let limit = self.max_per_user;
            let refusal = Refusal::quota(format!("user {uid} has {limit} connections already"));
            self.refuse_at_the_door(&stream.into(), &refusal);
            return;
        }
        *count += 1;
        let number = self.number();
        let connection = Connection::new(stream.into(), uid, name == ADMIN);
        let event = EpollEvent::new(connection.interest, number);
        if self.epoll.add(connection.socket(), event).is_ok() {
            self.connections.insert(number, connection);
            self.settle(number);
        } else {
            self.leave(who);
        }
    }

    fn refuse_at_the_door(&mut self, stream: &OwnedFd, refusal: &Refusal) {
        let request = self.audit.request_id();
        if let Ok(peer) = Peer::for_record(stream.as_fd()) {
            let generation = self.generations.in_force().number;
            let mut record = Record::of(&peer, &request, generation, "connect", Subject::default());
            record.refused(refusal);
            if let Err(error) = self.audit.write(&record) {
                log::error!("{error}");
            }
        }
        let _ = send_stream(stream.as_fd(), &reply::refusal(refusal, &request, ""), &[]);
    }

    fn leave(&mut self, who: (u32, bool)) {
        if let Some(count) = self.per_user.get_mut(&who) {
            *count -= 1;
            if *count == 0 {
                self.per_user.remove(&who);
            }
        }
        for door in self.doors.iter_mut().filter(|door| !door.open) {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, door.name);
            door.open = self.epoll.add(&door.listener, event).is_ok();
        }
    }

    fn client_says(&mut self, number: u64, events: EpollFlags) -> Result<(), Fatal> {
        let Some(connection) = self.connections.get_mut(&number) else { return Ok(()) };
        if events.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
            self.end(number, End::Quiet);
            return Ok(());
        }
        if events.contains(EpollFlags::EPOLLIN)
            && let Err(end) = connection.fill(&mut self.buffer)
        {
            self.end(number, end);
            return Ok(());
        }
        self.requests(number)
    }

    /// Begins the next request of a client, if there is one that can be begun. One at a time: whoever has more comes again
    /// after everybody else.
    fn requests(&mut self, number: u64) -> Result<(), Fatal> {
        let Some(connection) = self.connections.get_mut(&number) else { return Ok(()) };
        if let Err(end) = connection.flush() {
            self.end(number, end);
            return Ok(());
        }
        match connection.next() {
            Next::Request(bytes) => {
                self.request(number, &bytes)?;
                if self.connections.get(&number).is_some_and(Connection::has_request) {
                    self.ready.push_back(number);
                }
            }
            Next::TooLong => {
                let refusal = Refusal::invalid(format!("a request is longer than {MAX_REQUEST} bytes"));
                self.refuse(number, &refusal, false, "?", Subject::default(), None)?;
                self.close_after_reply(number);
            }
            Next::Nothing => {}
        }
        self.settle(number);
        Ok(())
    }

    fn close_after_reply(&mut self, number: u64) {
        if let Some(connection) = self.connections.get_mut(&number) {
            connection.closing = true;
        }
    }

    /// Sends what can be sent and waits for what comes next.
    fn settle(&mut self, number: u64) {
        let Some(connection) = self.connections.get_mut(&number) else { return };
        if let Err(end) = connection.flush() {
            self.end(number, end);
            return;
        }
        let wanted = connection.wanted();
        if wanted != connection.interest && !connection.lingering {
            connection.interest = wanted;
            if self.epoll.modify(connection.socket(), &mut EpollEvent::new(wanted, number)).is_err() {
                self.end(number, End::Quiet);
                return;
            }
        }
        let next = connection.deadline(Instant::now()).map(|(at, _)| at);
        if next != connection.armed {
            self.deadlines.extend(next.map(|at| (at, number)));
            if let Some(old) = std::mem::replace(&mut connection.armed, next) {
                self.deadlines.remove(&(old, number));
            }
        }
    }

    fn end(&mut self, number: u64, why: End) {
        let Some(mut connection) = self.connections.remove(&number) else { return };
        if let Some(at) = connection.armed.take() {
            self.deadlines.remove(&(at, number));
        }
        if !connection.lingering {
            // The helper holds the socket too: closing ours would leave it with epoll.
            let _ = self.epoll.delete(connection.socket());
        }
        if why == End::Descriptors {
            log::warn!("a client of uid {} sent descriptors; its connection is closed", connection.uid);
        }
        if let Some(session) = connection.session.take() {
            self.close_session(number, &session);
        }
        if connection.linger() {
            self.connections.insert(number, connection);
            self.settle(number);
        } else {
            self.leave((connection.uid, connection.admin));
        }
    }

    fn close_session(&mut self, number: u64, session: &Session) {
        let Some(&helper_number) = self.helper_of.get(&session.app) else { return };
        let Some(helper) = self.helpers.get_mut(&helper_number) else { return };
        helper.session_ended(session.id);
        let unopened =
            helper.cancel(|tag| tag.asker.as_ref().is_some_and(|asker| asker.connection == number));
        if !unopened {
            let (policy, generation) = (helper.policy.clone(), self.generations.in_force().number);
            let tag = Tag { asker: None, subject: Subject::default(), policy, generation };
            helper.push(Request { message: ToHelper::Close { session: session.id }, fds: Vec::new(), tag });
        }
        self.pass_on(helper_number);
    }

    // ---- requests ----

    fn request(&mut self, number: u64, bytes: &[u8]) -> Result<(), Fatal> {
        let frame = match Frame::parse(bytes) {
            Ok(frame) => frame,
            Err(refusal) => {
                self.refuse(number, &refusal, false, "?", Subject::default(), None)?;
                self.close_after_reply(number);
                return Ok(());
            }
        };
        let Some(connection) = self.connections.get_mut(&number) else { return Ok(()) };
        let plain = match frame.call(connection.admin) {
            Ok(Call::Info) => reply::info(connection.admin),
            Ok(Call::Status) => {
                let status = self.status();
                let Some(connection) = self.connections.get_mut(&number) else { return Ok(()) };
                if !frame.oneway {
                    connection.push(status, Vec::new());
                }
                return Ok(());
            }
            Ok(Call::Reload) => return self.reload(number, frame.oneway),
            Ok(Call::Instances { app }) => {
                return match self.survey(number, &app, frame.oneway) {
                    Ok(()) => Ok(()),
                    Err(refusal) => {
                        let about = Subject::plain(app.as_str());
                        self.refuse(number, &refusal, frame.oneway, "Survey", about, None)
                    }
                };
            }
            Ok(Call::Description { interface }) => reply::description(&interface),
            Err(Misunderstood::Standard(name, parameters)) => reply::standard(name, &parameters),
            Err(Misunderstood::Refusal(refusal)) => {
                let verb = printable(frame.split().1, 30);
                return self.refuse(number, &refusal, frame.oneway, &verb, Subject::default(), None);
            }
            Ok(Call::Open { app, text }) => {
                return match self.open(number, app, frame.oneway) {
                    Ok(()) => Ok(()),
                    Err((refusal, policy)) => {
                        let about = Subject::plain(printable(&text, 64));
                        self.refuse(number, &refusal, frame.oneway, "Open", about, policy.as_deref())
                    }
                };
            }
            Ok(Call::Verb(verb)) => {
                let mut subject = self.subject(number, &verb);
                return match self.verb(number, verb, frame.oneway, &mut subject) {
                    Ok(()) => Ok(()),
                    Err((refusal, policy)) => {
                        let name = printable(frame.split().1, 30);
                        self.refuse(number, &refusal, frame.oneway, &name, subject, policy.as_deref())
                    }
                };
            }
        };
        if !frame.oneway {
            connection.push(plain, Vec::new());
        }
        Ok(())
    }

    fn subject(&self, number: u64, verb: &Verb) -> Subject {
        let session = self.connections.get(&number).and_then(|connection| connection.session.as_ref());
        let helper = session.and_then(|session| self.helpers.get(self.helper_of.get(&session.app)?));
        helper.map_or_else(|| Subject::of(verb), |helper| subject(helper, verb))
    }

    /// Answers no, with a record.
    fn refuse(
        &mut self,
        number: u64,
        refusal: &Refusal,
        oneway: bool,
        verb: &str,
        subject: Subject,
        policy: Option<&Policy>,
    ) -> Result<(), Fatal> {
        let Some(connection) = self.connections.get_mut(&number) else { return Ok(()) };
        let request = self.audit.request_id();
        let known = connection.session.as_ref().map(|session| session.peer.clone());
        if let Ok(peer) = known.map_or_else(|| Peer::for_record(connection.socket()), Ok) {
            let app = connection.session.as_ref().map(|session| session.app.as_str());
            let generation = self.generations.in_force().number;
            let mut record = Record::of(&peer, &request, generation, verb, subject);
            record.app = app;
            record.refused(refusal);
            record.by = policy.map(|policy| refusal.line.map_or(policy.file.clone(), |line| policy.at(line)));
            self.audit.write(&record)?;
        }
        if !oneway {
            connection.push(reply::refusal(refusal, &request, ""), Vec::new());
        }
        Ok(())
    }

    fn open(
        &mut self,
        number: u64,
        app: Option<AppName>,
        oneway: bool,
    ) -> Result<(), (Refusal, Option<Arc<Policy>>)> {
        let no = |refusal: Refusal| (refusal, None);
        let Some(connection) = self.connections.get(&number) else { return Ok(()) };
        if connection.session.is_some() {
            return Err(no(Refusal::invalid("a connection is for one app, and Open was called before")));
        }
        let app = app.ok_or_else(|| no(Refusal::denied("this cannot be the name of an app")))?;
        let now = Instant::now();
        let policy = self.policy(&app).map_err(no)?;
        let with = |refusal: Refusal| (refusal, Some(policy.clone()));
        let mut peer =
            self.here.units.identify(connection.socket(), &policy).map_err(|error| {
                with(Refusal::denied(format!("the client cannot be identified: {error}")))
            })?;
        let _early = authorize(&policy, &peer).map_err(with)?;
        if let Some(why) = policy.require.missing(self.here.machine, self.here.sandbox.landlock_abi) {
            return Err(with(Refusal::unsupported(why).by_line(policy.require.line)));
        }
        let sessions =
            self.helper_of.get(&app).and_then(|n| self.helpers.get(n)).map(|helper| helper.sessions);
        if sessions.is_some_and(|sessions| sessions >= policy.limits.connections) {
            let limit = policy.limits.connections;
            return Err(with(Refusal::quota(format!("the policy allows {limit} connections at a time"))));
        }
        if sessions.is_none() {
            self.start_helper(&app, &policy, now).map_err(with)?;
        }
        let helper = self.helper_of[&app];
        let id = SessionId(self.number());
        let request = self.audit.request_id();
        let Some(connection) = self.connections.get_mut(&number) else { return Ok(()) };
        peer.note_unit(connection.socket());
        let asker = Asker { connection: number, peer: peer.clone(), request, oneway };
        let session = Session { app: app.clone(), id, peer, permit: None, revoked: false };
        connection.session = Some(Box::new(session));
        connection.busy = true;
        if let Some(entry) = self.helpers.get_mut(&helper) {
            entry.sessions += 1;
            let generation = self.generations.in_force().number;
            let tag = Tag { asker: Some(asker), subject: Subject::plain(app.as_str()), policy, generation };
            entry.push(Request { message: ToHelper::Open { session: id }, fds: Vec::new(), tag });
        }
        self.pass_on(helper);
        Ok(())
    }

    /// Asks a helper what it has, for the administrator. One that does not run is started, if it is behind a socket.
    fn survey(&mut self, number: u64, app: &AppName, oneway: bool) -> Result<(), Refusal> {
        let policy = self.policy(app)?;
        if !self.helper_of.contains_key(app) {
            self.start_helper(app, &policy, Instant::now())?;
        }
        let request = self.audit.request_id();
        let Some(connection) = self.connections.get_mut(&number) else { return Ok(()) };
        let peer =
            Peer::for_record(connection.socket()).map_err(|error| Refusal::denied(error.to_string()))?;
        connection.busy = true;
        let helper = self.helper_of[app];
        let tag = Tag {
            asker: Some(Asker { connection: number, peer, request, oneway }),
            subject: Subject::plain(app.as_str()),
            policy,
            generation: self.generations.in_force().number,
        };
        if let Some(entry) = self.helpers.get_mut(&helper) {
            entry.push(Request { message: ToHelper::Survey, fds: Vec::new(), tag });
        }
        self.pass_on(helper);
        Ok(())
    }

    /// What runs, for the administrator.
    fn status(&self) -> Vec<u8> {
        let helpers = self.helpers.values().map(|helper| reply::HelperStatus {
            app: &helper.app,
            policy: &helper.policy,
            sessions: helper.sessions,
            sandbox: helper.sandbox.as_ref(),
        });
        let uptime = self.started.elapsed().as_secs();
        reply::status(uptime, self.connections.len(), &self.here.sandbox, helpers)
    }

    /// The policy of an app that is in force.
    fn policy(&self, app: &AppName) -> Result<Arc<Policy>, Refusal> {
        match self.generations.in_force().of(app) {
            Some(Ok(policy)) => Ok(policy.clone()),
            Some(Err(error)) => Err(Refusal::denied(error.lines().join("; "))),
            None => Err(Refusal::denied("there is no policy for this app")),
        }
    }

    fn start_helper(&mut self, app: &AppName, policy: &Arc<Policy>, now: Instant) -> Result<(), Refusal> {
        let channel = match self.starter.start(app, now) {
            Ok(Attempt::Asked) => None,
            Ok(Attempt::Connected(channel)) => Some(channel),
            Ok(Attempt::NotYet) => {
                let why = "the helper of this app did not start a moment ago; the broker's log says why; try again in some seconds";
                return Err(Refusal::helper(why));
            }
            Err(error) => {
                log::error!("{error}");
                self.starter.failed(app, now);
                return Err(Refusal::helper(
                    "the helper of this app cannot be started; the broker's log says why",
                ));
            }
        };
        let number = self.number();
        let mut helper = Helper::new(app.clone(), policy.clone(), self.starter.has_sockets(), now);
        if let Some(channel) = channel {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, number);
            let added = self.epoll.add(&channel, event).map_err(std::io::Error::from);
            if let Err(error) = added.and_then(|()| helper.connect(channel)) {
                return Err(Refusal::helper(format!("the helper of this app cannot be waited for: {error}")));
            }
        }
        self.helpers.insert(number, helper);
        self.helper_of.insert(app.clone(), number);
        Ok(())
    }

    /// Passes a request on; `subject`, what it is about, is taken if that was done.
    fn verb(
        &mut self,
        number: u64,
        verb: Verb,
        oneway: bool,
        subject: &mut Subject,
    ) -> Result<(), (Refusal, Option<Arc<Policy>>)> {
        let Some(connection) = self.connections.get_mut(&number) else { return Ok(()) };
        if connection.session.as_ref().is_some_and(|session| session.revoked) {
            return Err((revoked(), None));
        }
        let opened =
            connection.session.as_ref().and_then(|session| Some((session, session.permit.as_ref()?)));
        let Some((session, permit)) = opened else {
            return Err((Refusal::invalid("Open comes first"), None));
        };
        let Some((helper_number, helper)) =
            self.helper_of.get(&session.app).and_then(|n| Some((*n, self.helpers.get_mut(n)?)))
        else {
            return Err((Refusal::helper("the helper of this app has ended"), None));
        };
        let with = |refusal| (refusal, Some(permit.policy().clone()));
        early(helper, permit, &verb).map_err(with)?;
        let fd = match &verb {
            Verb::Attach { target: Target::Own, .. } => {
                let cgroup = permit.own_unit().and_then(|unit| self.here.units.open_cgroup(unit));
                Some(
                    cgroup
                        .ok_or_else(|| with(Refusal::gone("the cgroup of the client's unit is not there")))?,
                )
            }
            _ => None,
        };
        let message = ToHelper::Ask { session: session.id, verb };
        self.audit.has_room(message.row().name).map_err(with)?;
        let request = self.audit.request_id();
        let asker = Asker { connection: number, peer: session.peer.clone(), request, oneway };
        let (policy, generation) = (permit.policy().clone(), self.generations.in_force().number);
        let tag = Tag { asker: Some(asker), subject: std::mem::take(subject), policy, generation };
        helper.push(Request { message, fds: fd.into_iter().collect(), tag });
        connection.busy = true;
        self.pass_on(helper_number);
        Ok(())
    }

    // ---- helpers ----

    /// Sends a helper what waits for it.
    fn pass_on(&mut self, number: u64) {
        let Some(helper) = self.helpers.get_mut(&number) else { return };
        let connections = &self.connections;
        let socket = |tag: &Tag| connections.get(&tag.asker.as_ref()?.connection).map(Connection::socket);
        if let Err(why) = helper.flush(Instant::now(), socket) {
            log::warn!("helper of {}: {why}", helper.app);
        }
    }

    fn started(&mut self) -> Result<(), Fatal> {
        match self.starter.receive() {
            Start::Nothing => Ok(()),
            Start::Over => Err(Fatal("the spawner has ended: no helper can be started any more".into())),
            Start::Failed(app, why) => match self.helper_of.get(&app) {
                Some(&number) => self.lost(number, &why),
                None => Ok(()),
            },
            Start::Connected(app, channel) => {
                let Some((number, helper)) =
                    self.helper_of.get(&app).and_then(|n| Some((*n, self.helpers.get_mut(n)?)))
                else {
                    return Ok(());
                };
                self.epoll.add(&channel, EpollEvent::new(EpollFlags::EPOLLIN, number)).step("epoll")?;
                helper.connect(channel).step("the channel of a helper")
            }
        }
    }

    fn helper_says(&mut self, number: u64) -> Result<(), Fatal> {
        let Some(helper) = self.helpers.get_mut(&number) else { return Ok(()) };
        let said = helper.receive(Instant::now());
        match said {
            Said::Nothing => Ok(()),
            Said::Ready | Said::Outdated => {
                let app = helper.app.clone();
                self.starter.succeeded(&app);
                log::info!("helper of {app} is ready");
                if matches!(said, Said::Outdated) || self.outstanding.contains(&app) {
                    self.have_adopted(number, true);
                }
                self.pass_on(number);
                Ok(())
            }
            Said::Lost(why) => self.lost(number, &why),
            Said::Answer { request, outcome, line, fds } => {
                self.answered(number, request, outcome, line, fds)?;
                self.pass_on(number);
                Ok(())
            }
        }
    }

    fn answered(
        &mut self,
        number: u64,
        request: Request<Tag>,
        outcome: Outcome,
        line: Option<u32>,
        mut fds: Vec<OwnedFd>,
    ) -> Result<(), Fatal> {
        let Request { message, tag: Tag { asker, mut subject, policy, generation }, .. } = request;
        if matches!(message, ToHelper::Adopt { .. }) {
            return self.adopted(number, outcome);
        }
        let Some(Asker { connection, peer, request, oneway }) = asker else { return Ok(()) };
        let Some(helper) = self.helpers.get_mut(&number) else { return Ok(()) };
        subject.add(&outcome);
        match (&outcome, &message) {
            (
                Outcome::Loaded { instance, digest, .. },
                ToHelper::Ask { session, verb: Verb::Load { object, .. } },
            ) => {
                let lives = |entry: &Connection| entry.session.as_ref().is_some_and(|s| s.id == *session);
                if helper.policy.keep.is_persistent() || self.connections.get(&connection).is_some_and(lives)
                {
                    helper.remember(instance.0, *session, object.clone(), *digest);
                }
                subject.digest = Some(hex::encode(digest));
            }
            (Outcome::Done, ToHelper::Ask { verb: Verb::Unload { instance }, .. }) => {
                helper.forget(instance.0);
            }
            _ => {}
        }
        let mut record = Record::of(&peer, &request, generation, message.row().name, subject);
        record.app = Some(helper.app.as_str());
        record.by = Some(line.map_or(policy.file.clone(), |line| policy.at(line)));
        if let Outcome::Refused { refusal, .. } = &outcome {
            record.refused(refusal);
        }
        self.audit.write(&record)?;
        // The client may be gone: then its session is closed already, and the descriptors end here.
        let Some(entry) = self.connections.get_mut(&connection) else { return Ok(()) };
        entry.busy = false;
        if matches!(message, ToHelper::Open { .. }) {
            if let (Outcome::Done, Some(session)) = (&outcome, &mut entry.session) {
                // By the policy of now: the helper hears of it next, if it is not that of the answer.
                session.permit = authorize(&helper.policy, &peer).ok();
                session.revoked = session.permit.is_none();
            } else {
                entry.session = None;
                helper.sessions = helper.sessions.saturating_sub(1);
            }
        }
        let bytes = match outcome {
            Outcome::Refused { refusal, log } => {
                let log = log.unpack(fds.pop(), 1 << 20).unwrap_or_default();
                reply::refusal(&refusal, &request, &printable(&String::from_utf8_lossy(&log), 1 << 20))
            }
            outcome => reply::outcome(&outcome),
        };
        if !oneway {
            entry.push(bytes, fds);
        }
        self.requests(connection)
    }

    /// A helper that nobody needs.
    fn forget_helper(&mut self, number: u64) -> Option<Helper<Tag>> {
        let helper = self.helpers.remove(&number)?;
        self.helper_of.remove(&helper.app);
        if let Some(channel) = helper.channel() {
            let _ = self.epoll.delete(channel);
        }
        Some(helper)
    }

    /// A helper that is gone, and with it everything its sessions had: they end, each with an answer.
    fn lost(&mut self, number: u64, why: &str) -> Result<(), Fatal> {
        if let Some(helper) = self.helpers.get(&number).filter(|helper| !helper.was_ready()) {
            self.starter.failed(&helper.app, Instant::now());
        }
        let place = if self.starter.has_sockets() { "journal of its unit" } else { "broker's log" };
        let refusal = Refusal::helper(format!(
            "the helper of this app has ended or did not start; the {place} says why"
        ));
        log::error!(
            "helper of {}: {why}",
            self.helpers.get(&number).map_or("?", |helper| helper.app.as_str())
        );
        self.lost_because(number, why, &refusal, Farewell::None)
    }

    fn lost_because(
        &mut self,
        number: u64,
        why: &str,
        refusal: &Refusal,
        farewell: Farewell,
    ) -> Result<(), Fatal> {
        let Some(helper) = self.forget_helper(number) else { return Ok(()) };
        let app = helper.app.clone();
        let mut told = Vec::new();
        for Request { message, tag, .. } in helper.into_requests() {
            let Some(Asker { connection, peer, request, oneway }) = tag.asker else { continue };
            let mut record = Record::of(&peer, &request, tag.generation, message.row().name, tag.subject);
            record.app = Some(app.as_str());
            (record.verdict, record.why) = (refusal.class.name(), Some(why));
            self.audit.write(&record)?;
            if let Some(entry) = self.connections.get_mut(&connection) {
                entry.busy = false;
                if !oneway {
                    entry.push(reply::refusal(refusal, &request, ""), Vec::new());
                }
                told.push(connection);
            }
        }
        let is_its =
            |connection: &Connection| connection.session.as_ref().is_some_and(|session| session.app == app);
        let ended: Vec<u64> = self.connections.iter().filter(|(_, c)| is_its(c)).map(|(n, _)| *n).collect();
        for number in ended {
            if farewell == Farewell::Said && !told.contains(&number) {
                self.say_farewell(number, refusal)?;
            }
            if let Some(connection) = self.connections.get_mut(&number) {
                connection.busy = false;
                connection.closing = true;
                connection.session = None;
            }
            self.settle(number);
        }
        // Administrators have no session, and go on.
        for number in told {
            self.requests(number)?;
        }
        self.settled(&app)
    }
}

/// What a request is about, as far as it is known here.
fn subject(helper: &Helper<Tag>, verb: &Verb) -> Subject {
    let mut subject = Subject::of(verb);
    if let Some(instance) = subject.instance {
        subject.object = helper.object(instance).map(ToString::to_string);
        subject.digest = helper.digest(instance).map(|digest| hex::encode(digest));
    }
    subject
}

/// What a client gets whose session ends because of a reload.
fn revoked() -> Refusal {
    Refusal::gone("the policy in force has no entry for this client any more")
}

/// Whether clients that wait for nothing are told why their session ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Farewell {
    Said,
    None,
}

/// The early check: the same one that the helper makes, to answer at once and to say why. What it cannot know here
/// (an instance of before) is left to the helper.
fn early(helper: &Helper<Tag>, permit: &Permit, verb: &Verb) -> Result<(), Refusal> {
    match verb {
        Verb::Load { object, programs, globals, .. } => permit.load(object, programs, globals).map(drop),
        Verb::Attach { instance, program, hook, target, .. } => match helper.object(instance.0) {
            Some(object) => permit.attach(object, program, *hook, target).map(drop),
            None => permit.right(Right::Attach).map(drop),
        },
        Verb::Map { instance, map, .. } | Verb::ReadMap { instance, map, .. } => {
            match helper.object(instance.0) {
                Some(object) => permit.map(object, map).map(drop),
                None => permit.right(Right::Maps).map(drop),
            }
        }
        Verb::Detach { .. } => permit.right(Right::Attach).map(drop),
        Verb::Unload { .. } => permit.right(Right::Load).map(drop),
        Verb::List => Ok(()),
    }
}
