//! A broker that was taken over, against real helpers in their real confinement, and against the spawner: everything that
//! it can say, in every order, with every descriptor, as fast as it can.

use bpfgate_protocol::channel::{Channel, ChannelError};
use bpfgate_protocol::codec;
use bpfgate_protocol::messages::helper::{Outcome, Target, ToHelper, Verb};
use bpfgate_protocol::messages::spawner::{FromSpawner, ToSpawner};
use bpfgate_protocol::messages::{Bytes, InstanceId, LinkId, SessionId};
use bpfgate_protocol::policy::Unit;
use bpfgate_protocol::refusal::Class;
use bpfgate_tests::gate::{INTERFACE, WITH_MAP, bin_dir};
use bpfgate_tests::peer::{POLICY, Peer, client_of};
use bpfgate_tests::process::{self, Process, Role};
use bpfgate_tests::{Gate, SOON, USER, needs_root, sys, wait_until};
use nix::sys::epoll::{Epoll, EpollCreateFlags};
use nix::sys::eventfd::EventFd;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket, socketpair};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::{Child, Stdio};
use std::time::Duration;

fn ask(session: u64, verb: Verb) -> ToHelper {
    ToHelper::Ask { session: SessionId(session), verb }
}

fn open(session: u64) -> ToHelper {
    ToHelper::Open { session: SessionId(session) }
}

fn close(session: u64) -> ToHelper {
    ToHelper::Close { session: SessionId(session) }
}

fn load(session: u64, object: &str) -> ToHelper {
    let object = object.parse().unwrap();
    ask(session, Verb::Load { object, programs: Vec::new(), globals: Vec::new() })
}

fn attach(session: u64, instance: u64, program: &str, target: Target) -> ToHelper {
    let (instance, program) = (InstanceId(instance), program.parse().unwrap());
    ask(session, Verb::Attach { instance, program, hook: None, target })
}

fn list(session: u64) -> ToHelper {
    ask(session, Verb::List)
}

/// What a message is in a sequence: with the number of the first session, or of a second one.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Step {
    Open(u64),
    List(u64),
    Load(u64),
    Close(u64),
    Survey,
}

/// What the rules say: whether a helper answers to the last of these steps, or ends.
#[derive(Default)]
struct Model {
    last: u64,
    open: BTreeSet<u64>,
}

impl Model {
    /// None: nobody honest says that now. Otherwise whether the answer is yes.
    fn take(&mut self, step: Step) -> Option<bool> {
        match step {
            Step::Open(id) if id > self.last => {
                self.last = id;
                self.open.insert(id);
                Some(true)
            }
            Step::Open(_) => None,
            Step::List(id) | Step::Load(id) | Step::Close(id) if id > self.last => None,
            Step::List(id) | Step::Load(id) => Some(self.open.contains(&id)),
            Step::Close(id) => {
                self.open.remove(&id);
                Some(true)
            }
            Step::Survey => Some(true),
        }
    }
}

/// HLP-02: every order of messages up to four, of two sessions. What the rules do not allow at its place ends the helper,
/// and everything else has the answer that it should have.
#[test]
fn every_order_of_messages_is_answered_or_the_end() {
    const STEPS: [Step; 7] = [
        Step::Open(1),
        Step::Open(2),
        Step::List(1),
        Step::Load(2),
        Step::Close(1),
        Step::Close(2),
        Step::Survey,
    ];
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", POLICY);
    let before = gate.baseline();
    let (mut sequences, mut ends) = (0, 0);
    let mut next: Vec<Vec<Step>> = vec![Vec::new()];
    while let Some(sequence) = next.pop() {
        let mut model = Model::default();
        let verdicts: Vec<_> = sequence.iter().map(|step| model.take(*step)).collect();
        let broken = verdicts.contains(&None);
        // A whole one is played; a shorter one is the beginning of others.
        if broken || sequence.len() == 4 {
            let mut peer = Peer::start(&gate, "app");
            let mut clients = Vec::new();
            for (step, verdict) in sequence.iter().zip(&verdicts) {
                let (client, server) = client_of(&gate, &USER);
                let (request, fd) = match *step {
                    Step::Open(id) => (open(id), Some(server.as_fd())),
                    Step::List(id) => (list(id), None),
                    Step::Load(id) => (load(id, "o"), None),
                    Step::Close(id) => (close(id), None),
                    Step::Survey => (ToHelper::Survey, None),
                };
                clients.push(client);
                let Some(yes) = verdict else {
                    peer.send(&request, fd);
                    assert!(peer.has_given_up(), "{sequence:?}: it goes on");
                    ends += 1;
                    break;
                };
                let (outcome, _) = peer.ask(&request, fd);
                let refused = matches!(outcome, Outcome::Refused { .. });
                assert_eq!(refused, !yes, "{sequence:?}: {outcome:?}");
            }
            sequences += 1;
            continue;
        }
        // Where both sessions are alike, one of them is enough.
        next.extend(STEPS.iter().filter(|step| !sequence.is_empty() || **step != Step::Open(2)).map(
            |step| {
                let mut longer = sequence.clone();
                longer.push(*step);
                longer
            },
        ));
    }
    println!("{sequences} sequences, {ends} of them ended the helper");
    assert!(sequences > 200 && ends > 100, "{sequences} {ends}");
    gate.invariants(&before);
}

/// A descriptor of every kind there is, by name.
fn kinds(gate: &Gate) -> Vec<(&'static str, OwnedFd)> {
    let file = |path: &str| OwnedFd::from(File::open(path).unwrap());
    let (stream, other) = UnixStream::pair().unwrap();
    let (packets, _) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let (pipe, write) = nix::unistd::pipe().unwrap();
    let half = UnixStream::connect(gate.socket()).unwrap();
    half.shutdown(std::net::Shutdown::Both).unwrap();
    let listener = UnixListener::bind(gate.dir.join("listener")).unwrap();
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
    let outer = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
    outer.add(&epoll.0, nix::sys::epoll::EpollEvent::empty()).unwrap();
    let path = nix::fcntl::open("/etc/passwd", nix::fcntl::OFlag::O_PATH, nix::sys::stat::Mode::empty());
    let tcp = socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None).unwrap();
    let netlink = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::empty(), None).unwrap();
    let pidfd = {
        let (socket, _other) = UnixStream::pair().unwrap();
        nix::sys::socket::getsockopt(&socket, nix::sys::socket::sockopt::PeerPidfd)
    };
    let mut all = vec![
        ("a file", file("/etc/passwd")),
        ("a directory", file("/")),
        ("a place", path.unwrap()),
        ("/dev/zero", file("/dev/zero")),
        ("/proc/self/mem", file("/proc/self/mem")),
        ("the policy", file(gate.policy_path("app").to_str().unwrap())),
        ("a pipe", pipe),
        ("the other end of a pipe", write),
        ("a socket of a pair", stream.into()),
        ("the other", other.into()),
        ("a channel", packets),
        ("a datagram socket", UnixDatagram::unbound().unwrap().into()),
        ("a TCP socket", tcp),
        ("a netlink socket", netlink),
        ("a listener", listener.into()),
        ("the client's end of a connection", UnixStream::connect(gate.socket()).unwrap().into()),
        ("a connection that is over", half.into()),
        ("an epoll of an epoll", outer.0),
        ("an epoll", epoll.0),
        ("an eventfd", EventFd::new().unwrap().into()),
        ("a memfd", memfd_create("anything", MFdFlags::empty()).unwrap()),
        ("a program", sys::load_filter().unwrap()),
    ];
    all.extend(pidfd.ok().map(|fd| ("a process", fd)));
    all
}

/// FDA-05 at the inner channel: whatever comes as the socket of a client, it is one, from the broker's own door, or it is
/// nobody, and nothing of it stays open.
#[test]
fn no_kind_of_descriptor_is_a_client_but_a_client() {
    needs_root!();
    let (gate, before, mut peer, client) = Peer::with_session();
    let held = process::descriptors(peer.pid());
    let mut count = 0;
    for (number, (what, fd)) in (2..).zip(kinds(&gate)) {
        let refusal = peer.refused(&open(number), Some(fd.as_fd()));
        assert_eq!(refusal.class, Class::Denied, "{what}: {refusal}");
        assert_eq!(peer.refused(&list(number), None).class, Class::Gone, "{what}");
        assert_eq!(process::descriptors(peer.pid()), held, "{what} stays open");
        count += 1;
    }
    assert!(count >= 22, "{count} kinds");
    // Nor is any of them a cgroup, or the three files of a policy.
    for (what, fd) in kinds_again(&gate) {
        let fds: [BorrowedFd<'_>; 3] = [fd.as_fd(), fd.as_fd(), fd.as_fd()];
        match peer.adopt(Some([7; 32]), &fds) {
            Outcome::Refused { refusal, .. } => assert_eq!(refusal.class, Class::Denied, "{what}"),
            other => panic!("{what}: {other:?}"),
        }
    }
    assert_eq!(process::descriptors(peer.pid()), held);
    assert!(matches!(peer.ask(&list(1), None).0, Outcome::Instances(_)), "the session goes on");
    drop((peer, client));
    gate.invariants(&before);
}

fn kinds_again(gate: &Gate) -> Vec<(&'static str, OwnedFd)> {
    std::fs::remove_file(gate.dir.join("listener")).unwrap();
    kinds(gate).into_iter().filter(|(what, _)| *what != "the policy").collect()
}

/// HLP-07: targets that the policy does not name, in every spelling, for every kind of program.
#[test]
fn no_target_but_those_of_the_policy() {
    needs_root!();
    let (gate, before, mut peer, client) = Peer::with_session();
    assert!(matches!(peer.ask(&load(1, "o"), None).0, Outcome::Loaded { .. }));
    let interface = |name: &str| Target::Interface(name.parse().unwrap());
    let event = |name: &str| Target::Event(name.parse().unwrap());
    let cgroup = |path: &str| Target::Cgroup(path.parse().unwrap());
    let symbol = |binary: &str, symbol: &str| Target::Symbol {
        binary: binary.parse().unwrap(),
        symbol: symbol.parse().unwrap(),
    };
    let longer = format!("{INTERFACE}0");
    let upper = INTERFACE.to_uppercase();
    let targets = [
        interface("lo"),
        interface("gate1"),
        interface("gate"),
        interface(&longer),
        interface(&upper),
        interface("gate?"),
        interface("gate*"),
        interface("*"),
        interface("eth0"),
        interface("1"),
        interface("2"),
        interface("-1"),
        interface("..."),
        event("sys_enter"),
        event("sched:sched_process_exec"),
        event("raw_syscalls:sys_enter"),
        event("bpf_trace:bpf_trace_printk"),
        cgroup("/sys/fs/cgroup"),
        cgroup("/sys/fs/cgroup/system.slice"),
        cgroup("/proc/self/fd/0"),
        cgroup("/own"),
        symbol("/bin/sh", "main"),
        symbol("/bin/bash", "readline"),
        symbol("/proc/self/exe", "main"),
        symbol("/proc/self/fd/5", "main"),
        symbol("/lib/x86_64-linux-gnu/libc.so.6", "malloc"),
        symbol("/lib/x86_64-linux-gnu/libcrypto.so.3", "EVP_DecryptUpdate"),
        Target::Unit(Unit { name: "init.service".parse().unwrap(), slice: "system.slice".parse().unwrap() }),
    ];
    for target in targets {
        let refusal = peer.refused(&attach(1, 1, "copy_globals", target.clone()), None);
        assert!(matches!(refusal.class, Class::Denied | Class::Invalid), "{target:?}: {refusal}");
        assert!(refusal.call.is_none(), "the kernel was asked for {target:?}: {refusal}");
    }
    assert_eq!(process::links(peer.pid()), 0);
    assert!(matches!(
        peer.ask(&attach(1, 1, "copy_globals", interface(INTERFACE)), None).0,
        Outcome::Attached { .. }
    ));
    drop((peer, client));
    gate.invariants(&before);
}

/// HLP-08: numbers that were never given, not yet given, given to another session, or are at the ends of their range.
#[test]
fn a_number_means_what_it_was_given_for() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", POLICY);
    let before = gate.baseline();
    let mut peer = Peer::start(&gate, "app");
    let clients = (peer.session(&gate, 1, &USER), peer.session(&gate, 2, &USER));
    for round in 1..=20 {
        let (loaded, _) = peer.ask(&load(1, "o"), None);
        assert!(
            matches!(loaded, Outcome::Loaded { instance: InstanceId(id), .. } if id == round),
            "{loaded:?}"
        );
        let target = Target::Interface(INTERFACE.parse().unwrap());
        let (attached, _) = peer.ask(&attach(1, round, "copy_globals", target.clone()), None);
        assert!(
            matches!(attached, Outcome::Attached { link: LinkId(id), .. } if id == round),
            "{attached:?}"
        );
        for odd in [0, round + 1, u64::MAX, 1 << 31, 1 << 32 | round, 1 << 63 | round] {
            let (instance, link) = (InstanceId(odd), LinkId(odd));
            let map = "values".parse().unwrap();
            for verb in [
                Verb::Unload { instance },
                Verb::Detach { link },
                Verb::Map { instance, map },
                Verb::ReadMap {
                    instance,
                    map: "values".parse().unwrap(),
                    cursor: Bytes::default(),
                    limit: 1,
                },
            ] {
                let refusal = peer.refused(&ask(1, verb.clone()), None);
                assert_eq!(refusal.class, Class::Denied, "{verb:?}: {refusal}");
            }
            let refusal = peer.refused(&attach(1, odd, "copy_globals", target.clone()), None);
            assert_eq!(refusal.class, Class::Denied, "{refusal}");
        }
        // The other session's.
        let instance = InstanceId(round);
        assert_eq!(peer.refused(&ask(2, Verb::Unload { instance }), None).class, Class::Denied);
        assert_eq!(peer.refused(&ask(2, Verb::Detach { link: LinkId(round) }), None).class, Class::Denied);
        // Those that are gone.
        assert_eq!(peer.ask(&ask(1, Verb::Unload { instance }), None).0, Outcome::Done);
        for gone in 1..=round {
            let refusal = peer.refused(&ask(1, Verb::Detach { link: LinkId(gone) }), None);
            assert_eq!(refusal.class, Class::Gone, "{refusal}");
        }
    }
    drop((peer, clients));
    gate.invariants(&before);
}

/// HLP-16: what was allowed is not allowed any more, once the policy has said otherwise, whoever asks again.
#[test]
fn an_old_request_is_judged_by_the_policy_of_now() {
    needs_root!();
    let gate = Gate::start();
    let may =
        |words: &str| WITH_MAP.replace("{client}", &format!("[[client]]\nuser = 12345\nmay = {words}\n"));
    gate.edit("app", &may("[\"load\", \"attach\", \"maps\"]"));
    let before = gate.baseline();
    let mut peer = Peer::start(&gate, "app");
    let client = peer.session(&gate, 1, &USER);
    let map = ask(1, Verb::Map { instance: InstanceId(1), map: "counts".parse().unwrap() });
    let target = attach(1, 1, "pass", Target::Interface(INTERFACE.parse().unwrap()));
    let old = [load(1, "o"), map.clone(), target.clone()];
    for request in &old {
        assert!(!matches!(peer.ask(request, None).0, Outcome::Refused { .. }), "{request:?}");
    }
    gate.edit("app", &may("[\"maps\"]").replace("read-write", "none"));
    let path = gate.policy_path("app");
    let digest = bpfgate_tests::gate::sha256(&path);
    let digest = std::array::from_fn(|at| u8::from_str_radix(&digest[2 * at..2 * at + 2], 16).unwrap());
    let files = [path.to_str().unwrap(), "/etc/passwd", "/etc/group"].map(|path| File::open(path).unwrap());
    let files = files.each_ref().map(AsFd::as_fd);
    assert!(matches!(peer.adopt(Some(digest), &files), Outcome::Adopted(_)));
    assert_eq!(process::links(peer.pid()), 0, "what was attached stays");
    for request in &old {
        let refusal = peer.refused(request, None);
        assert!(matches!(refusal.class, Class::Denied | Class::Gone), "{request:?}: {refusal}");
    }
    assert_eq!(peer.ask(&list(1), None).0, Outcome::Instances(Vec::new()));
    drop((peer, client));
    gate.invariants(&before);
}

/// HLP-10: a hundred thousand requests cost a helper no memory; loads are counted by the policy.
#[test]
fn a_flood_of_requests_costs_a_helper_nothing_that_stays() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", &format!("{POLICY}[limits]\nloads_per_minute = 20\nconnections = 4\n"));
    let before = gate.baseline();
    let mut peer = Peer::start(&gate, "app");
    let client = peer.session(&gate, 1, &USER);
    let memory = |peer: &Peer| process::number(peer.pid(), "VmRSS");
    for _ in 0..1000 {
        peer.ask(&list(1), None);
    }
    let at_first = memory(&peer);
    let calls = 100_000 / u64::from(bpfgate_tests::slowness());
    for number in 0..calls {
        match number % 4 {
            0 => drop(peer.ask(&list(1), None)),
            1 => drop(peer.ask(&ToHelper::Survey, None)),
            2 => drop(peer.refused(&ask(1, Verb::Detach { link: LinkId(number) }), None)),
            _ => drop(peer.adopt(None, &[])),
        }
    }
    let mut loads = 0;
    for _ in 0..100 {
        if let (Outcome::Loaded { instance, .. }, _) = peer.ask(&load(1, "o"), None) {
            loads += 1;
            peer.ask(&ask(1, Verb::Unload { instance }), None);
        }
    }
    assert!((20..=22).contains(&loads), "{loads} loads");
    let mut clients = Vec::new();
    for number in 2..200 {
        let (client, server) = client_of(&gate, &USER);
        let (outcome, _) = peer.ask(&open(number), Some(server.as_fd()));
        assert_eq!(matches!(outcome, Outcome::Done), number <= 4, "session {number}: {outcome:?}");
        clients.push(client);
    }
    let grown = memory(&peer).saturating_sub(at_first);
    assert!(grown < 1024, "{grown} kB more than at first");
    drop((peer, client, clients));
    gate.invariants(&before);
}

/// HLP-11: a broker that asks and does not read is given up after five seconds, and with it everything that was loaded.
#[test]
fn a_broker_that_does_not_read_is_given_up() {
    needs_root!();
    let (gate, before, mut peer, _client) = Peer::with_session();
    assert!(matches!(peer.ask(&load(1, "o"), None).0, Outcome::Loaded { .. }));
    peer.channel.set_timeouts(1, 1).unwrap();
    let map = ask(1, Verb::Map { instance: InstanceId(1), map: "values".parse().unwrap() });
    let mut sent = 0;
    let stuck = loop {
        match peer.channel.send(&map, &[]) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
        assert!(sent < 1_000_000, "it takes and takes");
    };
    assert!(matches!(stuck, ChannelError::NotNow | ChannelError::Closed), "{stuck}");
    let ended = || Process::of(peer.pid()).is_none();
    assert!(wait_until(Duration::from_secs(10), ended), "it waits for ever, after {sent} requests");
    // What was on its way to nobody: descriptors of maps hold these.
    drop(peer);
    gate.invariants(&before);
}

/// PRO-05, PRO-16, PRO-17: every message cut at every byte, and every byte of one replaced, is refused as a whole: the
/// helper ends, or it was another valid message.
#[test]
fn no_part_of_a_message_is_a_message() {
    let bytes = [
        open(1),
        close(7),
        list(1),
        load(1, "o"),
        attach(1, 1, "copy_globals", Target::Interface(INTERFACE.parse().unwrap())),
        attach(
            1,
            1,
            "p",
            Target::Symbol { binary: "/bin/sh".parse().unwrap(), symbol: "main".parse().unwrap() },
        ),
        ask(
            1,
            Verb::ReadMap {
                instance: InstanceId(1),
                map: "m".parse().unwrap(),
                cursor: Bytes(vec![1; 8]),
                limit: 9,
            },
        ),
        ToHelper::Survey,
        ToHelper::Adopt { policy: Some([7; 32]), file: true },
    ]
    .map(|message| (codec::encode(&message).unwrap(), message));
    let mut others = 0;
    for (bytes, message) in &bytes {
        assert_eq!(codec::decode::<ToHelper>(bytes).as_ref(), Ok(message));
        for cut in 0..bytes.len() {
            assert!(codec::decode::<ToHelper>(&bytes[..cut]).is_err(), "{message:?} cut after {cut}");
        }
        for at in 0..bytes.len() {
            for value in [0, 1, 2, 0x1b, 0x7f, 0x80, 0xff] {
                let mut odd = bytes.clone();
                odd[at] = value;
                // What is understood is written the same way: one message, one spelling.
                if let Ok(other) = codec::decode::<ToHelper>(&odd) {
                    assert_eq!(codec::encode(&other).unwrap(), odd, "{other:?} has two spellings");
                    others += usize::from(other != *message);
                }
            }
        }
    }
    println!("{others} other messages");
    assert!(others > 100, "nothing was changed: {others}");
}

/// A spawner whose broker is the test.
struct Spawner {
    channel: Channel,
    child: Child,
}

impl Spawner {
    fn start(gate: &Gate) -> Self {
        let (channel, theirs) = Channel::pair().unwrap();
        let mut command = gate.inside(bin_dir().join("bpfgate-helper"));
        command.arg("--spawner").arg("--policies").arg(gate.dir.join("policies"));
        command.arg("--loader").arg(bin_dir().join("bpfgate-loader"));
        command.arg("--socket").arg(gate.dir.join("peer"));
        let log = File::options().append(true).open(gate.dir.join("broker.log")).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        sys::as_descriptor_3(&mut command, theirs.as_fd());
        let child = command.spawn().unwrap();
        drop(theirs);
        channel.set_timeouts(10, 10).unwrap();
        Self { channel, child }
    }

    fn spawn(&mut self, app: &str) -> Result<Channel, String> {
        self.channel.send(&ToSpawner::Spawn { app: app.parse().unwrap() }, &[]).unwrap();
        match self.channel.recv::<FromSpawner>() {
            Ok((FromSpawner::Spawned { app: of }, _)) => {
                assert_eq!(of.as_str(), app);
                let channel = Channel::from_fd(self.channel.take_over().unwrap()).unwrap();
                channel.set_timeouts(10, 10).unwrap();
                Ok(channel)
            }
            Ok((FromSpawner::Failed { why, .. }, _)) => Err(why),
            other => panic!("{app}: {other:?}"),
        }
    }
}

impl Drop for Spawner {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn helpers(gate: &Gate, app: &str) -> Vec<Process> {
    gate.processes().into_iter().filter(|process| process.role == Role::Helper(app.to_owned())).collect()
}

/// The one helper of an app, once it is a helper: a child of the spawner is a copy of that for a moment, and its loader is
/// one of a helper.
fn helper(gate: &Gate, app: &str) -> Process {
    let mut all = Vec::new();
    let one = wait_until(SOON, || {
        all = helpers(gate, app);
        all.len() == 1
    });
    assert!(one, "{app} has not one helper but {all:?}");
    all.remove(0)
}

/// HLP-19: a broker that was taken over gets one helper for each app, however often it asks and whatever it keeps; none
/// for an app without a policy; and nothing at all by garbage.
#[test]
fn a_spawner_makes_one_helper_for_an_app() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", POLICY);
    gate.policy("other", POLICY);
    let before = gate.baseline();
    let mut spawner = Spawner::start(&gate);
    let mut kept = Vec::new();
    for _ in 0..3 {
        // The channel of the one before is kept open: it does not end by itself.
        kept.push(spawner.spawn("app").unwrap());
        helper(&gate, "app");
    }
    kept.push(spawner.spawn("other").unwrap());
    let is_root = |app: &str| process::status(helper(&gate, app).pid, "Uid")[0].starts_with("0\t");
    assert!(wait_until(SOON, || !is_root("app") && !is_root("other")), "a helper stays root");
    let uids = ["app", "other"].map(|app| process::status(helper(&gate, app).pid, "Uid"));
    assert_ne!(uids[0], uids[1], "two apps are one user");
    // One that was stopped does not notice anything, and is ended all the same.
    let stopped = helper(&gate, "app");
    kill(Pid::from_raw(stopped.pid), Signal::SIGSTOP).unwrap();
    kept.push(spawner.spawn("app").unwrap());
    assert!(!stopped.is_alive());
    for absent in ["absent", "app2", "0"] {
        let why = spawner.spawn(absent).unwrap_err();
        assert!(why.contains("no policy"), "{why}");
    }
    // The helpers end with their channels, and the spawner with its own.
    let all = ["app", "other"].map(|app| helper(&gate, app));
    assert!(all.iter().all(|process| process.parent == spawner.child.id().cast_signed()), "{all:?}");
    drop(kept);
    spawner.channel.send_bytes(&[0xff; 100], &[]).unwrap();
    let mut status = None;
    assert!(wait_until(3 * SOON, || {
        status = spawner.child.try_wait().unwrap();
        status.is_some()
    }));
    assert_eq!(status.and_then(|status| status.code()), Some(1), "garbage is no reason to go on");
    assert!(wait_until(3 * SOON, || all.iter().all(|helper| !helper.is_alive())), "{all:?}");
    drop(spawner);
    gate.invariants(&before);
}

/// PRO-01: a datagram of no bytes is what the end of a channel looks like, and is taken for it: everything is released.
#[test]
fn an_empty_message_is_the_end() {
    needs_root!();
    let (gate, before, mut peer, _client) = Peer::with_session();
    assert!(matches!(peer.ask(&load(1, "o"), None).0, Outcome::Loaded { .. }));
    peer.channel.send_bytes(&[], &[]).unwrap();
    assert!(wait_until(SOON, || Process::of(peer.pid()).is_none()), "it goes on");
    gate.invariants(&before);
}
