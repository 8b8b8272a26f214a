//! A helper that was taken over, against the real broker: nothing that it says or hands over ends more than its own
//! app's sessions. The test is the spawner, which hands over channels to the test as helpers.

use bpfgate_protocol::INNER_VERSION;
use bpfgate_protocol::channel::Channel;
use bpfgate_protocol::codec;
use bpfgate_protocol::messages::helper::{Adopted, Adoption, FromHelper, Outcome, Sandbox, ToHelper};
use bpfgate_protocol::messages::spawner::{FromSpawner, ToSpawner};
use bpfgate_protocol::messages::{Bulk, InstanceId, SessionId};
use bpfgate_protocol::refusal::{Class, Refusal};
use bpfgate_tests::gate::{WITH_MAP, sha256};
use bpfgate_tests::rogue::{self, Ambush};
use bpfgate_tests::second::Second;
use bpfgate_tests::{Gate, Raw, STRANGER, USER, needs_root, process, slowness, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// A broker whose spawner, and every helper, is the test.
struct Trap {
    broker: Second,
    spawner: Channel,
    _process: UnixStream,
}

impl Trap {
    fn set(gate: &Gate) -> Self {
        let ambush = Ambush::lay(gate);
        let program = rogue::program();
        let broker = Second::start(gate, &[], &["--helper", program.to_str().unwrap()]);
        let (process, mut channels) = ambush.caught();
        let spawner = channels.remove(0);
        spawner.set_timeouts(10, 10).unwrap();
        Self { broker: broker.listens(), spawner, _process: process }
    }

    /// The helper that the broker asks for, not ready yet.
    fn helper(&mut self) -> Channel {
        let (ToSpawner::Spawn { app }, _) = self.spawner.recv().unwrap();
        let (ours, theirs) = Channel::pair().unwrap();
        self.spawner.send(&FromSpawner::Spawned { app }, &[]).unwrap();
        self.spawner.hand_over(theirs.as_fd()).unwrap();
        ours.set_timeouts(10, 20).unwrap();
        ours
    }

    /// A client of `app` that is let in, and its helper.
    fn session(&mut self, gate: &Gate, app: &str) -> (Raw, Channel, SessionId) {
        let mut raw = self.broker.connect(&USER);
        raw.ask("Open", &json!({"app": app}));
        let mut helper = self.helper();
        helper.send(&ready(gate, app), &[]).unwrap();
        let (ToHelper::Open { session }, _) = helper.recv().unwrap() else { panic!("it does not ask") };
        helper.send(&answer(Outcome::Done), &[]).unwrap();
        raw.reply().unwrap();
        (raw, helper, session)
    }
}

fn answer(outcome: Outcome) -> FromHelper {
    FromHelper::Answer { outcome, line: Some(1) }
}

fn digest(gate: &Gate, app: &str) -> [u8; 32] {
    let text = sha256(&gate.policy_path(app));
    std::array::from_fn(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap())
}

fn ready(gate: &Gate, app: &str) -> FromHelper {
    let sandbox = Sandbox { landlock_abi: 7, seccomp_filters: 2, capabilities: 1 << 39 | 1 << 12 };
    FromHelper::Ready { version: INNER_VERSION, policy: digest(gate, app), sandbox }
}

/// What a terminal would obey, and what would look like another line of the log.
const EVIL: &str = "no\n[INFO  bpfgate_broker] generation 99 of the policies is in force\x1b[2J\u{202e}";

/// SBX-31: what a helper says that no honest one says ends its own sessions, each with a named error, and leaves no
/// descriptor behind; the next helper of the app is another one.
#[test]
fn a_lying_helper_ends_its_own_sessions_only() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", WITH_MAP);
    gate.policy("other", WITH_MAP);
    let before = gate.baseline();
    let mut trap = Trap::set(&gate);
    let (mut other, mut others, _) = trap.session(&gate, "other");
    let null = File::open("/dev/null").unwrap();
    let done = codec::encode(&answer(Outcome::Done)).unwrap();
    let cases: Vec<(&str, Vec<u8>, usize)> = vec![
        ("garbage", vec![0xff; 100], 0),
        ("half an answer", done[..done.len() - 1].to_vec(), 0),
        ("a byte too many", [&done[..], &[0]].concat(), 0),
        ("longer than a message", vec![0; codec::MAX_MESSAGE + 1], 0),
        ("a second greeting", codec::encode(&ready(&gate, "app")).unwrap(), 0),
        ("a descriptor that does not belong", done.clone(), 1),
        ("all the descriptors there can be", done.clone(), 253),
        (
            "a log in no descriptor",
            {
                let refusal = Refusal::object("no");
                codec::encode(&answer(Outcome::Refused { refusal, log: Bulk::Memfd { len: 9 } })).unwrap()
            },
            0,
        ),
    ];
    let idle = process::descriptors(trap.broker.pid());
    for (what, bytes, count) in cases {
        let (mut raw, mut helper, _) = trap.session(&gate, "app");
        raw.ask("List", &json!({}));
        let (ToHelper::Ask { .. }, _) = helper.recv().unwrap() else { panic!("{what}") };
        helper.send_bytes(&bytes, &vec![null.as_fd(); count]).unwrap();
        let refused = raw.reply().unwrap_err();
        assert_eq!(refused.error, "io.bpfgate.Helper", "{what}: {refused:?}");
        raw.is_closed_after(0);
        drop(raw);
        let same = || process::descriptors(trap.broker.pid()) == idle;
        assert!(
            wait_until(Duration::from_secs(2), same),
            "{what}: {:?}",
            process::descriptors(trap.broker.pid())
        );
        // The other app goes on.
        other.ask("List", &json!({}));
        let _: (ToHelper, _) = others.recv().unwrap();
        others.send(&answer(Outcome::Instances(Vec::new())), &[]).unwrap();
        other.reply().unwrap();
    }
    // An answer that nobody waits for.
    let (mut raw, helper, _) = trap.session(&gate, "app");
    for _ in 0..1000 {
        let _ = helper.send(&answer(Outcome::Done), &[]);
    }
    raw.is_closed_after(0);
    // Answers of another kind than the question: whatever the client makes of them, the broker goes on.
    for outcome in [
        Outcome::Done,
        Outcome::Survey { sessions: u32::MAX, instances: Vec::new() },
        Outcome::Adopted(Adoption {
            verdict: Adopted::None,
            sessions: vec![SessionId(u64::MAX)],
            revoked: Vec::new(),
            beyond_recall: Vec::new(),
        }),
        Outcome::Loaded {
            instance: InstanceId(u64::MAX),
            digest: [0; 32],
            programs: Vec::new(),
            maps: Vec::new(),
        },
        Outcome::Refused { refusal: Refusal::new(Class::Verifier, EVIL), log: Bulk::empty() },
        Outcome::Refused {
            refusal: Refusal::kernel_because(EVIL, i32::MIN, EVIL.into()),
            log: Bulk::empty(),
        },
    ] {
        let (mut raw, mut helper, _) = trap.session(&gate, "app");
        raw.ask("List", &json!({}));
        let _: (ToHelper, _) = helper.recv().unwrap();
        helper.send(&answer(outcome), &[]).unwrap();
        let _ = raw.reply();
        drop((raw, helper));
    }
    other.ask("List", &json!({}));
    let _: (ToHelper, _) = others.recv().unwrap();
    assert!(process::stat(trap.broker.pid()).is_some_and(|(state, ..)| state != 'Z'));
    let text = std::fs::read_to_string(&trap.broker.audit).unwrap();
    assert!(!text.contains(['\u{1b}', '\u{202e}']), "{text}");
    drop((trap, other, others));
    gate.invariants(&before);
}

/// INF-10: nothing that a helper says is obeyed by the terminal of who reads the broker's log, or is a line of it.
#[test]
fn a_helper_writes_no_lines_of_the_brokers_log() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", WITH_MAP);
    let before = gate.baseline();
    let mut trap = Trap::set(&gate);
    let (mut raw, mut helper, _) = trap.session(&gate, "app");
    gate.edit("app", &format!("description = \"another\"\n{WITH_MAP}"));
    kill(Pid::from_raw(trap.broker.pid()), Signal::SIGHUP).unwrap();
    let (ToHelper::Adopt { .. }, _) = helper.recv().unwrap() else { panic!("it is not told") };
    let adoption = Adoption {
        verdict: Adopted::Restart(EVIL.to_owned()),
        sessions: Vec::new(),
        revoked: vec![EVIL.to_owned()],
        beyond_recall: vec![EVIL.to_owned()],
    };
    helper.send(&answer(Outcome::Adopted(adoption)), &[]).unwrap();
    raw.reply().unwrap_err();
    let log = trap.broker.log();
    assert!(log.contains("it takes a new one"), "{log}");
    assert!(
        !log.lines().any(|line| line.contains("generation 99")
            && line.starts_with('[')
            && !line.contains("it takes a new one")),
        "{log}"
    );
    assert!(!log.contains(['\u{1b}', '\u{202e}']), "{log:?}");
    drop((trap, raw, helper));
    gate.invariants(&before);
}

/// SBX-32, RES-10, PRO-07: a helper that does not start, or never answers, and clients that never say anything: each has
/// its deadline, and meanwhile somebody else is served.
#[test]
fn whoever_keeps_quiet_keeps_nobody_waiting() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", WITH_MAP);
    gate.policy("other", WITH_MAP);
    let before = gate.baseline();
    let mut trap = Trap::set(&gate);
    let silent: Vec<Raw> = (0..64).map(|_| trap.broker.connect(&STRANGER)).collect();
    let (mut raw, mut helper, _) = trap.session(&gate, "app");
    raw.stream.set_read_timeout(Some(Duration::from_secs(80) * slowness())).unwrap();
    let start = Instant::now();
    raw.ask("List", &json!({}));
    let _: (ToHelper, _) = helper.recv().unwrap();
    // The other one is asked for and does not say that it is ready.
    let mut waiting = trap.broker.connect(&USER);
    waiting.ask("Open", &json!({"app": "other"}));
    let _never = trap.helper();
    let mut worst = Duration::ZERO;
    let mut honest = trap.broker.connect(&USER);
    while start.elapsed() < Duration::from_secs(9) * slowness() {
        let asked = Instant::now();
        honest.done("org.varlink.service.GetInfo", &json!({}));
        worst = worst.max(asked.elapsed());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(waiting.reply().unwrap_err().error, "io.bpfgate.Helper");
    let started = start.elapsed();
    assert!(started < Duration::from_secs(15) * slowness(), "{started:?}");
    for (number, mut raw) in silent.into_iter().enumerate() {
        raw.stream.set_read_timeout(Some(Duration::from_secs(40) * slowness())).unwrap();
        raw.is_closed_after(0);
        let closed = start.elapsed();
        assert!(closed < Duration::from_secs(35) * slowness(), "{number} is closed after {closed:?}");
    }
    assert_eq!(raw.reply().unwrap_err().error, "io.bpfgate.Helper");
    let answered = start.elapsed();
    let minute = Duration::from_secs(60);
    assert!(answered >= minute && answered < (minute + Duration::from_secs(5)) * slowness(), "{answered:?}");
    println!("others waited {worst:?}; not started after {started:?}, not answered after {answered:?}");
    assert!(worst < Duration::from_millis(500) * slowness(), "{worst:?}");
    drop((trap, raw, helper, waiting, honest));
    gate.invariants(&before);
}
