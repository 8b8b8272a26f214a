//! Crash points: each system call that a process makes for a request fails once, with each error, or is the last one that
//! the process makes. The request ends in an answer or a closed connection, the next one works, the kernel holds nothing
//! more than before, and what belongs to another app goes on.
//!
//! An ordinary run takes a sample of them, the same each time; `make attack` takes all.

use bpfgate_tests::gate::WITH_MAP;
use bpfgate_tests::invariants::Baseline;
use bpfgate_tests::process::{self, Process, Role};
use bpfgate_tests::raw::{Raw, frame};
use bpfgate_tests::strace::Strace;
use bpfgate_tests::{Gate, SOON, USER, all_attacks, as_user, needs_root, wait_until};
use nix::poll::{PollFd, PollFlags, poll};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

const KEPT: &str = "{client}\n[objects.o]\n{object:rawtp}\n[[objects.o.raw_tracepoint]]\nprogram = \"on_exit\"\n\
    events = [\"sched_process_exit\"]\n[lifetime]\nkeep = \"app\"\n";
const LIMITS: &str = "[limits]\nloads_per_minute = 60000\n";
const CRASH: &str = "[objects.crash]\n{object:structops_map}\n[[objects.crash.xdp]]\nprogram = \"touch_ops\"\ninterfaces = [\"lo\"]\n";

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Victim {
    Broker,
    Helper,
    Loader,
    Worker,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Verb {
    Open,
    Load,
    /// The load of an object that ends the worker.
    Crash,
    Attach,
    Map,
    Unload,
    /// The policy of the app has changed.
    Reload,
}

const STEPS: [(Victim, &[Verb]); 4] = {
    use Verb::{Attach, Crash, Load, Map, Open, Reload, Unload};
    [
        (Victim::Helper, &[Open, Load, Crash, Attach, Map, Unload, Reload]),
        (Victim::Worker, &[Load]),
        (Victim::Loader, &[Crash]),
        (Victim::Broker, &[Open, Load, Attach, Map, Unload, Reload]),
    ]
};

/// What a system call comes to, in words of strace. A call that fails is not made: getpid(2) is in its place, which is on
/// every list.
const FAULTS: [&str; 7] = ["KILL", "ENOMEM", "EMFILE", "ENOSPC", "EINTR", "EAGAIN", "EIO"];

/// One call of one process on behalf of one request.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Point {
    victim: Victim,
    verb: Verb,
    call: String,
    /// The how manieth of this name.
    number: usize,
    fault: &'static str,
}

impl Point {
    /// A close that fails has closed all the same, which strace cannot do; and who ends does not fail.
    fn makes_sense(&self) -> bool {
        self.fault == "KILL" || !["close", "exit_group", "rt_sigreturn"].contains(&self.call.as_str())
    }

    fn arguments(&self) -> Vec<String> {
        let what = match self.fault {
            "KILL" => "signal=KILL".to_owned(),
            errno => format!("error={errno}:syscall=getpid"),
        };
        let Self { call, number, .. } = self;
        vec!["-e".to_owned(), format!("inject={call}:{what}:when={number}")]
    }
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    Done,
    Refused(String),
    Closed,
    /// It did not.
    Silence,
}

/// In milliseconds: longer than the broker waits for anything here.
const PATIENCE: u16 = 20_000;

/// What requests are made of.
struct Scene {
    gate: Gate,
    /// With what is kept.
    before: Baseline,
    kept: BTreeSet<String>,
    edits: u32,
}

struct Session {
    raw: Raw,
    instance: Value,
}

impl Session {
    fn call(&mut self, method: &str, parameters: &Value) -> (End, Value) {
        // Whoever is gone reads nothing.
        let _ = self.raw.stream.write_all(&frame(method, parameters));
        let mut answer = [PollFd::new(self.raw.stream.as_fd(), PollFlags::POLLIN)];
        if poll(&mut answer, PATIENCE) == Ok(0) {
            return (End::Silence, Value::Null);
        }
        let mut answer = [PollFd::new(self.raw.stream.as_fd(), PollFlags::POLLIN)];
        if poll(&mut answer, PATIENCE) == Ok(0) {
            return (End::Silence, Value::Null);
        }
        let Some((text, _)) = self.raw.receive() else { return (End::Closed, Value::Null) };
        let mut reply: Value = serde_json::from_slice(&text).unwrap();
        match reply["error"].as_str() {
            Some(error) => (End::Refused(error.to_owned()), Value::Null),
            None => (End::Done, reply["parameters"].take()),
        }
    }

    /// Makes the request, or what comes before it.
    fn make(&mut self, verb: Verb) -> End {
        let about = json!({"instance": self.instance});
        match verb {
            Verb::Open => self.call("Open", &json!({"app": "app"})).0,
            Verb::Load => {
                let (end, reply) = self.call("Load", &json!({"object": "o"}));
                self.instance = reply["instance"].clone();
                end
            }
            Verb::Crash => self.call("Load", &json!({"object": "crash"})).0,
            Verb::Attach => self.call("Attach", &json!({"instance": self.instance, "program": "pass"})).0,
            Verb::Map => self.call("Map", &json!({"instance": self.instance, "name": "counts"})).0,
            Verb::Unload => self.call("Unload", &about).0,
            Verb::Reload => self.call("List", &json!({})).0,
        }
    }
}

impl Scene {
    fn new() -> Self {
        let gate = Gate::start();
        gate.policy("app", &format!("{WITH_MAP}{CRASH}{LIMITS}"));
        gate.policy("kept", KEPT);
        let mut raw = Raw::open(&gate, "kept");
        let instance = raw.load("o");
        raw.done("Attach", &json!({"instance": instance, "program": "on_exit"}));
        drop(raw);
        let before = gate.baseline();
        let mut scene = Self { gate, before, kept: BTreeSet::new(), edits: 0 };
        scene.kept = scene.links_that_are_kept();
        assert_eq!(scene.kept.len(), 1);
        scene
    }

    /// The ids of the links of the other app.
    fn links_that_are_kept(&self) -> BTreeSet<String> {
        let helper = self.gate.find(&Role::Helper("kept".to_owned()));
        let all = helper.map(|helper| process::fdinfo(helper.pid)).unwrap_or_default();
        let ids = all.iter().flat_map(|text| text.lines()).filter(|line| line.starts_with("link_id:"));
        ids.map(str::to_owned).collect()
    }

    /// None while the broker is about to end.
    fn connect(&self) -> Option<Session> {
        let stream = as_user(&USER, || UnixStream::connect(self.gate.socket())).ok()?;
        Some(Session { raw: Raw::on(stream), instance: Value::Null })
    }

    /// A session in which this is the next thing to ask for.
    fn session(&self, verb: Verb) -> Session {
        let mut session = self.connect().expect("the broker listens");
        let steps: &[Verb] = match verb {
            Verb::Open => &[],
            Verb::Load | Verb::Crash => &[Verb::Open],
            Verb::Attach | Verb::Map => &[Verb::Open, Verb::Load],
            Verb::Unload | Verb::Reload => &[Verb::Open, Verb::Load, Verb::Attach],
        };
        for step in steps {
            // What a session before has let go of is gone in a moment.
            let mut end = End::Closed;
            let done = wait_until(SOON, || {
                end = session.make(*step);
                end == End::Done
            });
            assert!(done, "before {verb:?}, {step:?} ends with {end:?}:\n{}", self.gate.log());
        }
        session
    }

    fn victim(&self, victim: Victim) -> Process {
        if victim == Victim::Broker {
            return self.gate.broker.clone();
        }
        let [helper, loader, worker] = self.gate.helper("app");
        match victim {
            Victim::Loader => loader,
            Victim::Worker => worker,
            Victim::Broker | Victim::Helper => helper,
        }
    }

    /// Makes a request while strace looks at the victim; gives how it ended, and the trace.
    fn watched(&mut self, victim: Victim, verb: Verb, arguments: &[String]) -> (End, String) {
        let mut session = self.session(verb);
        if verb == Verb::Open && victim != Victim::Broker {
            // The helper has to be there before it is asked.
            drop(self.session(Verb::Load));
        }
        let process = self.victim(victim);
        let strace = Strace::attach(process.pid, arguments, &self.gate.dir);
        if verb == Verb::Reload {
            self.edits += 1;
            self.gate.edit("app", &format!("# {}\n{WITH_MAP}{CRASH}{LIMITS}", self.edits));
            self.reload();
        }
        let end = session.make(verb);
        (end, strace.end())
    }

    /// Has the policies read again: whether there is another generation now, or no broker any more. One that was hit may
    /// be about to end.
    fn reload(&self) -> bool {
        let before = self.gate.generation();
        if self.gate.broker.is_alive() {
            self.gate.hang_up();
        }
        wait_until(2 * SOON, || self.gate.generation() > before || !self.gate.broker.is_alive())
    }

    /// Steps on a point; gives how the request ended, and whether the call was made at all; or what is wrong.
    fn step(&mut self, point: &Point) -> Result<(End, bool), String> {
        let (end, trace) = self.watched(point.victim, point.verb, &point.arguments());
        let hit = trace.contains("(INJECTED") || trace.contains("killed by SIGKILL");
        if end == End::Silence {
            return Err(format!("no answer:\n{trace}"));
        }
        // Nothing is read with such an error, so it is taken for what stands there: then it allows nothing.
        let denied = point.verb == Verb::Reload && point.fault == "ENOSPC";
        if point.verb == Verb::Reload && !self.reload() {
            return Err(format!("no new generation:\n{trace}"));
        }
        // Whoever was hit comes back, or is started again.
        let mut last = Vec::new();
        let works = wait_until(5 * SOON, || {
            let Some(mut session) = self.connect() else { return !self.gate.broker.is_alive() };
            let all = [Verb::Open, Verb::Load, Verb::Attach, Verb::Map, Verb::Unload];
            last = all.iter().map(|verb| session.make(*verb)).take_while(|end| *end == End::Done).collect();
            last.len() == all.len()
        });
        if !self.gate.broker.is_alive() {
            // Without a service manager everything ends with it.
            if !wait_until(5 * SOON, || self.gate.is_over()) {
                return Err(format!("the broker is outlived by {:?}", self.gate.processes()));
            }
        } else if !works {
            return Err(format!("the next session comes no further than {last:?}:\n{trace}"));
        } else if self.links_that_are_kept() != self.kept && !denied {
            return Err(format!("what is kept is gone:\n{trace}"));
        }
        let left = self.gate.left_in_kernel(&self.before, 3 * SOON);
        if left.is_empty() { Ok((end, hit)) } else { Err(format!("left in the kernel: {left:?}:\n{trace}")) }
    }
}

/// The calls that a victim makes for a request, by name, with how often.
fn calls(trace: &str) -> BTreeMap<String, usize> {
    let mut calls = BTreeMap::new();
    for line in trace.lines() {
        let name = line.split('(').next().unwrap_or_default();
        if !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
            *calls.entry(name.to_owned()).or_default() += 1;
        }
    }
    calls
}

/// All points.
fn points(scene: &mut Scene) -> Vec<Point> {
    let mut all = Vec::new();
    for (victim, verbs) in STEPS {
        for &verb in verbs {
            // Once without looking, so that nothing is done for the first time.
            drop(scene.session(verb).make(verb));
            let (end, trace) = scene.watched(victim, verb, &[]);
            assert_eq!(end == End::Done, verb != Verb::Crash, "{victim:?} {verb:?}: {end:?}");
            for (call, count) in calls(&trace) {
                for number in 1..=count {
                    let point = |fault| Point { victim, verb, call: call.clone(), number, fault };
                    all.extend(FAULTS.map(point).into_iter().filter(Point::makes_sense));
                }
            }
        }
    }
    all
}

/// Some of them, the same each time: of each process, request and fault so many, from all over its calls.
fn sample(all: Vec<Point>, each: usize) -> Vec<Point> {
    let mut groups: BTreeMap<_, Vec<Point>> = BTreeMap::new();
    for point in all {
        groups.entry((point.victim, point.verb, point.fault)).or_default().push(point);
    }
    let mut sample = Vec::new();
    for (place, points) in groups.into_values().enumerate() {
        let each = each.min(points.len());
        sample
            .extend((0..each).map(|n| points[(place * 7 + n * points.len() / each) % points.len()].clone()));
    }
    // However much there is time for is of all kinds.
    let shuffled = (0..8).flat_map(|first| sample.iter().skip(first).step_by(8).cloned());
    shuffled.collect()
}

/// What an ordinary run may take.
const QUICK: Duration = Duration::from_secs(30);

#[test]
fn each_call_that_fails_costs_one_request() {
    needs_root!();
    let mut scene = Scene::new();
    let all = points(&mut scene);
    let number = all.len();
    let whole = all_attacks();
    let points = if whole { all } else { sample(all, 1) };
    let start = Instant::now();
    let mut ends: BTreeMap<(Victim, End), usize> = BTreeMap::new();
    let (mut hits, mut brokers, mut wrong) = (0, 0, Vec::new());
    let (mut taken, mut spent) = (0, Duration::ZERO);
    for point in &points {
        // Others may hold the lock of the tests each time that a broker is started: that is not counted.
        if !whole && spent > QUICK {
            break;
        }
        taken += 1;
        let one = Instant::now();
        let stepped = scene.step(point);
        spent += one.elapsed();
        let (end, hit) = match stepped {
            Ok(found) => found,
            Err(why) => {
                println!("{point:?}: {why}\n{}", scene.gate.log());
                wrong.push(format!("{point:?}"));
                drop(scene);
                scene = Scene::new();
                continue;
            }
        };
        if one.elapsed() > Duration::from_secs(2) {
            println!("{point:?} took {:?}: {end:?}", one.elapsed());
        }
        if !hit {
            println!("{point:?}: the call was not made");
        }
        hits += usize::from(hit);
        *ends.entry((point.victim, end)).or_default() += 1;
        brokers += usize::from(!scene.gate.broker.is_alive());
        if !scene.gate.broker.is_alive() || scene.links_that_are_kept() != scene.kept {
            drop(scene);
            scene = Scene::new();
        }
    }
    println!(
        "{taken} of {number} points, {hits} calls failed, {brokers} brokers ended, {:?}: {ends:#?}",
        start.elapsed()
    );
    assert!(wrong.is_empty(), "{wrong:#?}");
    // How often a call is made depends a little on what else goes on.
    assert!(hits * 3 >= taken * 2 && taken > 20, "{hits} of {taken} calls were made");
}

/// The request stays where it is, and nobody hears of it but the log.
#[test]
fn a_request_that_the_kernel_has_no_memory_for_is_passed_on_a_moment_later() {
    needs_root!();
    let mut scene = Scene::new();
    for fault in ["ENOMEM", "EIO"] {
        let point =
            Point { victim: Victim::Broker, verb: Verb::Load, call: "sendmsg".into(), number: 1, fault };
        assert_eq!(scene.step(&point), Ok((End::Done, true)));
    }
}

/// What cannot be read just now says nothing about what root has written there: all policies in force stay, and whoever
/// asks again gets the new ones.
#[test]
fn a_policy_that_cannot_be_read_takes_nothing_away() {
    needs_root!();
    let mut scene = Scene::new();
    // A file is read, the directory is opened, a file in it is.
    for (call, fault, place, number) in [
        ("read", "EIO", "policies/kept.toml", 1),
        ("openat", "EMFILE", "policies", 1),
        ("openat", "ENOMEM", "policies", 2),
    ] {
        let before = (scene.gate.generation(), scene.gate.log().len());
        let inject = format!("inject={call}:error={fault}:syscall=getpid:when={number}");
        let path = scene.gate.dir.join(place).display().to_string();
        let arguments = ["-P", &path, "-e", &inject].map(str::to_owned);
        let (end, trace) = scene.watched(Victim::Broker, Verb::Reload, &arguments);
        assert!(trace.contains("(INJECTED"), "{trace}");
        assert_eq!((end, scene.gate.generation()), (End::Done, before.0), "{call} {fault}");
        let log = scene.gate.log();
        assert!(log[before.1..].contains("those in force stay: "), "{log}");
        assert!(scene.reload());
        assert_eq!(scene.links_that_are_kept(), scene.kept);
        assert_eq!(scene.gate.left_in_kernel(&scene.before, 3 * SOON), BTreeSet::default());
    }
}

/// KRN-07: as a security module does it, commands of bpf(2) are denied, all of a request or all but the first ones. Whoever
/// reads the answer is told what may be the reason.
#[test]
fn a_command_that_is_denied_costs_one_request_and_is_explained() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", &format!("{WITH_MAP}{LIMITS}"));
    let before = gate.baseline();
    let mut raw = Raw::open(&gate, "app");
    let instance = raw.load("o");
    let [helper, ..] = gate.helper("app");
    let load = json!({"object": "o"});
    let attach = json!({"instance": instance, "program": "pass"});
    for (method, parameters, commands) in [("Load", &load, 1..=3), ("Attach", &attach, 1..=1)] {
        for first in commands {
            let inject = format!("inject=bpf:error=EACCES:syscall=getpid:when={first}+");
            let strace = Strace::attach(helper.pid, &["-e".to_owned(), inject], &gate.dir);
            let said = raw.call(method, parameters);
            let trace = strace.end();
            assert!(trace.contains("(INJECTED"), "{method} makes no command {first}: {trace}");
            let refused = said.unwrap_err();
            assert_eq!(refused.error, "io.bpfgate.Kernel", "{refused:?}\n{trace}");
            assert_eq!(refused.parameters["errno"], libc::EACCES, "{refused:?}");
            let message = refused.parameters["message"].as_str().unwrap();
            assert!(message.contains("a security module"), "{message}");
        }
        // And then not any more.
        raw.done(method, parameters);
    }
    drop(raw);
    gate.invariants(&before);
}
