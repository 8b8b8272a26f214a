//! The helpers that run: wait until one is ready and says what the policy demands, then pass requests and match answers,
//! oldest first. How one is reached is in [`crate::starter`].

use bpfgate_lockdown::capabilities::mask;
use bpfgate_lockdown::files;
use bpfgate_protocol::INNER_VERSION;
use bpfgate_protocol::channel::{Channel, ChannelError};
use bpfgate_protocol::messages::SessionId;
use bpfgate_protocol::messages::helper::{FromHelper, Outcome, Sandbox, ToHelper};
use bpfgate_protocol::names::{AppName, ObjectName};
use bpfgate_protocol::policy::{Policy, Sandboxing, needed};
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// From the request to a helper that is locked down and serves.
const START: Duration = Duration::from_secs(10);
/// A load may wait for the verifier; every other request is quick.
const ANSWER: Duration = Duration::from_secs(60);
/// Standalone, a helper that nobody uses ends, so that the next one reads the policy and its objects anew.
const IDLE: Duration = Duration::from_secs(30);
/// Behind a socket it ends by itself, as long as we do not stand in its door.
const IDLE_BEHIND_SOCKET: Duration = Duration::from_secs(5);
/// Until what could not be sent is tried again.
const RETRY: Duration = Duration::from_millis(20);
/// Objects of instances that are remembered for the early check.
const MAX_INSTANCES: usize = 4096;

/// What the broker must know to make a reply of an answer. `tag` is the server's.
pub(crate) struct Request<T> {
    pub(crate) message: ToHelper,
    /// What goes with it; the socket of a client is lent when it is sent.
    pub(crate) fds: Vec<OwnedFd>,
    pub(crate) tag: T,
}

/// The helper of one app.
pub(crate) struct Helper<T> {
    pub(crate) app: AppName,
    /// The policy that it has to serve: that of the generation in force.
    pub(crate) policy: Arc<Policy>,
    channel: Option<Channel>,
    /// How it is confined, when it is ready.
    pub(crate) sandbox: Option<Sandbox>,
    behind_socket: bool,
    queue: VecDeque<Request<T>>,
    waiting: VecDeque<Request<T>>,
    /// An `Adopt` is with it: nothing else is sent until it is said by which policy that would be judged.
    adopting: bool,
    /// Objects and the digests of their files by instance, as far as they are remembered.
    objects: BTreeMap<u64, Loaded>,
    pub(crate) sessions: u32,
    deadline: Option<Instant>,
    /// When to try again to send what could not be sent.
    retry: Option<Instant>,
}

/// What is remembered of an instance.
struct Loaded {
    by: SessionId,
    object: ObjectName,
    digest: [u8; 32],
}

/// What a helper has to say.
pub(crate) enum Said<T> {
    /// It is ready.
    Ready,
    Answer {
        request: Request<T>,
        outcome: Outcome,
        line: Option<u32>,
        fds: Vec<OwnedFd>,
    },
    /// It is ready with another policy than the one in force.
    Outdated,
    /// It is gone or cannot be used: why, for the log.
    Lost(String),
    Nothing,
}

impl<T> Helper<T> {
    pub(crate) fn new(app: AppName, policy: Arc<Policy>, behind_socket: bool, now: Instant) -> Self {
        Self {
            app,
            policy,
            channel: None,
            sandbox: None,
            behind_socket,
            queue: VecDeque::new(),
            waiting: VecDeque::new(),
            adopting: false,
            objects: BTreeMap::new(),
            sessions: 0,
            deadline: Some(now + START),
            retry: None,
        }
    }

    pub(crate) fn connect(&mut self, channel: Channel) -> std::io::Result<()> {
        channel.set_nonblocking()?;
        self.channel = Some(channel);
        Ok(())
    }

    pub(crate) fn channel(&self) -> Option<BorrowedFd<'_>> {
        self.channel.as_ref().map(AsFd::as_fd)
    }

    pub(crate) fn push(&mut self, request: Request<T>) {
        self.queue.push_back(request);
    }

    /// Before everything that waits.
    pub(crate) fn push_first(&mut self, request: Request<T>) {
        self.queue.push_front(request);
    }

    /// Takes back what says that the policy is another one, and was not sent yet.
    pub(crate) fn cancel_adoptions(&mut self) {
        self.queue.retain(|request| !matches!(request.message, ToHelper::Adopt { .. }));
    }

    /// Whether one is still to be sent.
    pub(crate) fn has_adoptions(&self) -> bool {
        self.queue.iter().any(|request| matches!(request.message, ToHelper::Adopt { .. }))
    }

    /// What was not sent yet.
    pub(crate) fn unsent(&mut self) -> impl Iterator<Item = &mut Request<T>> {
        self.queue.iter_mut()
    }

    /// Sends what waits, as far as it can be sent. `socket` gives the client's socket for an `Open`: requests of
    /// clients that are gone were cancelled.
    pub(crate) fn flush<'a>(
        &mut self,
        now: Instant,
        socket: impl Fn(&T) -> Option<BorrowedFd<'a>>,
    ) -> Result<(), String> {
        let again = self.retry.take().is_some();
        let Some(channel) = self.channel.as_ref().filter(|_| self.sandbox.is_some()) else { return Ok(()) };
        while let Some(request) = self.queue.front().filter(|_| !self.adopting) {
            let mut fds: Vec<BorrowedFd<'_>> = request.fds.iter().map(AsFd::as_fd).collect();
            if matches!(request.message, ToHelper::Open { .. }) {
                fds.push(socket(&request.tag).ok_or("a session without a client")?);
            }
            match channel.send(&request.message, &fds) {
                Ok(()) => {
                    self.adopting = matches!(request.message, ToHelper::Adopt { .. });
                    let sent = self.queue.pop_front().map(|request| Request { fds: Vec::new(), ..request });
                    self.waiting.extend(sent);
                }
                // It is busy with a load, or too many descriptors are on their way.
                Err(ChannelError::NotNow) => {
                    self.retry = Some(now + RETRY);
                    break;
                }
                // What it still has to say comes as an event, its end too.
                Err(error @ ChannelError::Closed) => return Err(error.to_string()),
                // The kernel is short of something, and nothing was sent. Again in a moment, but not for ever.
                Err(error) => {
                    self.retry = Some(now + RETRY);
                    self.deadline.get_or_insert(now + START);
                    return if again { Ok(()) } else { Err(error.to_string()) };
                }
            }
        }
        if self.deadline.is_none() || self.waiting.len() == 1 {
            self.rearm(now);
        }
        Ok(())
    }

    /// Takes back what was not sent yet; gives whether an `Open` was among it: then the helper knows of no session.
    pub(crate) fn cancel(&mut self, is: impl Fn(&T) -> bool) -> bool {
        let mut opened = false;
        self.queue.retain(|request| {
            let cancelled = is(&request.tag);
            opened |= cancelled && matches!(request.message, ToHelper::Open { .. });
            !cancelled
        });
        opened
    }

    /// When it is late, if it is waited for, or idle for long enough.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// When to flush again, if not at its next answer.
    pub(crate) fn retry(&self) -> Option<Instant> {
        self.retry
    }

    pub(crate) fn was_ready(&self) -> bool {
        self.sandbox.is_some()
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.was_ready() && self.queue.is_empty() && self.waiting.is_empty()
    }

    /// Sets the deadline anew after something happened.
    pub(crate) fn rearm(&mut self, now: Instant) {
        self.deadline = if !self.was_ready() {
            self.deadline
        } else if !self.waiting.is_empty() {
            Some(now + ANSWER)
        } else if self.sessions == 0 && self.behind_socket {
            Some(now + IDLE_BEHIND_SOCKET)
        } else if self.sessions == 0 && !self.policy.keep.is_persistent() {
            Some(now + IDLE)
        } else {
            None
        };
    }

    /// All requests that will have no answer.
    pub(crate) fn into_requests(self) -> impl Iterator<Item = Request<T>> {
        self.waiting.into_iter().chain(self.queue)
    }

    pub(crate) fn remember(&mut self, instance: u64, by: SessionId, object: ObjectName, digest: [u8; 32]) {
        if self.objects.len() >= MAX_INSTANCES {
            self.objects.pop_first();
        }
        self.objects.insert(instance, Loaded { by, object, digest });
    }

    /// An instance is gone.
    pub(crate) fn forget(&mut self, instance: u64) {
        self.objects.remove(&instance);
    }

    /// A session is over, and with it what it loaded, unless that is kept.
    pub(crate) fn session_ended(&mut self, session: SessionId) {
        self.sessions = self.sessions.saturating_sub(1);
        if !self.policy.keep.is_persistent() {
            self.objects.retain(|_, loaded| loaded.by != session);
        }
    }

    pub(crate) fn object(&self, instance: u64) -> Option<&ObjectName> {
        self.objects.get(&instance).map(|loaded| &loaded.object)
    }

    /// The digest of the file that an instance was loaded from.
    pub(crate) fn digest(&self, instance: u64) -> Option<&[u8; 32]> {
        self.objects.get(&instance).map(|loaded| &loaded.digest)
    }

    /// One message.
    pub(crate) fn receive(&mut self, now: Instant) -> Said<T> {
        let Some(channel) = &mut self.channel else { return Said::Nothing };
        let said = match channel.recv::<FromHelper>() {
            Err(ChannelError::NotNow) => return Said::Nothing,
            Err(error) => Said::Lost(error.to_string()),
            Ok((FromHelper::Ready { version, policy, sandbox }, _)) if self.sandbox.is_none() => {
                let same = policy == self.policy.digest;
                let checked = accept(version).and_then(|()| {
                    // Of another policy it is not known what that demands.
                    if same { confined(&sandbox, &self.policy) } else { Ok(()) }
                });
                match checked {
                    Ok(()) => {
                        self.sandbox = Some(sandbox);
                        if same { Said::Ready } else { Said::Outdated }
                    }
                    // It never was ready: the next start waits.
                    Err(why) => Said::Lost(why),
                }
            }
            Ok((FromHelper::Ready { .. }, _)) => Said::Lost("it said twice that it is ready".into()),
            Ok((FromHelper::Answer { outcome, line }, fds)) => match self.waiting.pop_front() {
                Some(request) => {
                    self.adopting &= !matches!(request.message, ToHelper::Adopt { .. });
                    Said::Answer { request, outcome, line, fds }
                }
                None => Said::Lost("it answered what nobody asked".into()),
            },
        };
        self.rearm(now);
        said
    }

    /// Whether it is confined as the policy that it serves now demands.
    pub(crate) fn confined(&self) -> Result<(), String> {
        self.sandbox.as_ref().map_or(Ok(()), |sandbox| confined(sandbox, &self.policy))
    }
}

fn accept(version: u32) -> Result<(), String> {
    if version == INNER_VERSION {
        return Ok(());
    }
    Err(format!("it speaks version {version}, not {INNER_VERSION}"))
}

fn confined(sandbox: &Sandbox, policy: &Policy) -> Result<(), String> {
    let needed = mask(&needed(policy));
    if sandbox.capabilities != needed {
        return Err(format!(
            "it has capabilities {:x} where its policy needs {:x}",
            sandbox.capabilities, needed
        ));
    }
    let landlock =
        sandbox.landlock_abi >= files::LANDLOCK as u32 || policy.require.sandbox == Sandboxing::Seccomp;
    if !landlock || sandbox.seccomp_filters < 2 {
        return Err(format!(
            "it is confined less than its policy demands: landlock ABI {}, {} seccomp filters; [require] sandbox says how much",
            sandbox.landlock_abi, sandbox.seccomp_filters
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bpfgate_protocol::policy::file::Accounts;

    const POLICY: &str =
        "version = 1\n[objects.o]\npath = \"/o\"\n[[objects.o.socket_filter]]\nprogram = \"f\"\n";
    /// `CAP_BPF`, which is what the policy needs.
    const BPF: u64 = 1 << 39;

    fn policy(extra: &str) -> Arc<Policy> {
        Arc::new(Policy::parse("/p.toml", &format!("{POLICY}{extra}"), &Accounts::default()).unwrap())
    }

    /// What the broker makes of a helper that begins with these messages.
    fn said(policy: &Arc<Policy>, messages: &[FromHelper]) -> Vec<String> {
        let (ours, theirs) = Channel::pair().unwrap();
        let mut helper: Helper<()> =
            Helper::new("app".parse().unwrap(), policy.clone(), false, Instant::now());
        helper.connect(ours).unwrap();
        for message in messages {
            theirs.send(message, &[]).unwrap();
        }
        let word = |said: Said<()>| match said {
            Said::Ready => "ready".to_owned(),
            Said::Lost(why) => why,
            Said::Outdated => "another policy".to_owned(),
            Said::Answer { .. } => "answer".to_owned(),
            Said::Nothing => "nothing".to_owned(),
        };
        let first = word(helper.receive(Instant::now()));
        assert_eq!(helper.was_ready(), ["ready", "another policy"].contains(&first.as_str()), "{first}");
        let others = messages[1..].iter().map(|_| word(helper.receive(Instant::now())));
        std::iter::once(first).chain(others).collect()
    }

    fn ready(
        policy: &Policy,
        version: u32,
        landlock_abi: u32,
        seccomp_filters: u32,
        capabilities: u64,
    ) -> FromHelper {
        let sandbox = Sandbox { landlock_abi, seccomp_filters, capabilities };
        FromHelper::Ready { version, policy: policy.digest, sandbox }
    }

    #[test]
    fn a_helper_that_is_confined_as_its_policy_demands_is_taken() {
        let p = policy("");
        assert_eq!(said(&p, &[ready(&p, INNER_VERSION, 7, 2, BPF)]), ["ready"]);
        let lenient = policy("[require]\nsandbox = \"seccomp\"\n");
        assert_eq!(said(&lenient, &[ready(&lenient, INNER_VERSION, 0, 2, BPF)]), ["ready"]);
    }

    #[test]
    fn a_helper_that_is_confined_less_is_not() {
        let p = policy("");
        for (message, expected) in [
            (ready(&p, INNER_VERSION, 0, 2, BPF), "confined less"),
            (ready(&p, INNER_VERSION, 1, 2, BPF), "confined less"),
            (ready(&p, INNER_VERSION, 7, 1, BPF), "confined less"),
            (ready(&p, INNER_VERSION, 7, 2, BPF | 1 << 38), "capabilities"),
            (ready(&p, INNER_VERSION, 7, 2, BPF | 1 << 21), "capabilities"),
            (ready(&p, INNER_VERSION, 7, 2, 0), "capabilities"),
            (ready(&p, INNER_VERSION + 1, 7, 2, BPF), "version"),
            (ready(&policy("[limits]\nmaps = 1\n"), INNER_VERSION, 7, 2, BPF), "another policy"),
        ] {
            let got = said(&p, &[message]);
            assert!(got[0].contains(expected), "{got:?}");
        }
    }

    #[test]
    fn what_is_gone_is_not_remembered() {
        let object: ObjectName = "o".parse().unwrap();
        for (keep, left) in [("session", [false, true, false]), ("app", [true, true, false])] {
            let policy = policy(&format!("[lifetime]\nkeep = \"{keep}\"\n"));
            let mut helper: Helper<()> = Helper::new("app".parse().unwrap(), policy, false, Instant::now());
            for (instance, session) in [(1, 8), (2, 9), (3, 9)] {
                helper.remember(instance, SessionId(session), object.clone(), [7; 32]);
            }
            helper.session_ended(SessionId(8));
            helper.forget(3);
            assert_eq!([1, 2, 3].map(|instance| helper.object(instance).is_some()), left, "{keep}");
        }
    }

    #[test]
    fn a_helper_that_breaks_the_order_is_lost() {
        let p = policy("");
        let ready = ready(&p, INNER_VERSION, 7, 2, BPF);
        let answer = FromHelper::Answer { outcome: Outcome::Done, line: None };
        assert!(said(&p, &[ready.clone(), ready.clone()])[1].contains("twice"));
        assert!(said(&p, &[ready, answer.clone()])[1].contains("nobody asked"));
        assert!(said(&p, &[answer])[0].contains("nobody asked"));
    }
}
