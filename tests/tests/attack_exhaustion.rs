//! What others notice of a user who takes all that he can get: connections, the broker's patience, the verifier's time.

use bpfgate_tests::gate::{MINIMAL, WITH_MAP};
use bpfgate_tests::raw::frame;
use bpfgate_tests::waits::Waits;
use bpfgate_tests::{
    Gate, Raw, SOON, USER, Who, all_attacks, as_user, needs_root, process, slowness, wait_until,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Takes all that he can get.
const GREEDY: Who = Who::new(12_399);

const UNHURRIED: &str = "[limits]\nloads_per_minute = 60000\n";

/// A policy for that user.
fn of_greedy(text: &str) -> String {
    text.replace("{client}", "[[client]]\nuser = 12399\nmay = [\"load\", \"attach\", \"maps\"]\n")
}

/// Lets somebody in. What he is told is not compared with the records: that would be measured too.
fn session(gate: &Gate, who: &Who, app: &str) -> Raw {
    let mut raw = Raw::on(gate.connect(who));
    raw.done("Open", &json!({ "app": app }));
    raw
}

/// Between two things that the honest user does, who leaves the processors to others.
const PAUSE: Duration = Duration::from_millis(3);

/// The honest user's waits until something is over: each is a load, a request for the map, and an unload.
fn cycles(honest: &mut Raw, waits: &mut Waits, mut over: impl FnMut() -> bool) {
    while !over() {
        waits.time(|| {
            let instance = json!(honest.load("o"));
            honest.done("Map", &json!({"instance": instance, "name": "counts"}));
            honest.done("Unload", &json!({"instance": instance}));
        });
        std::thread::sleep(PAUSE);
    }
}

/// Over after this time.
fn after(time: Duration) -> impl FnMut() -> bool {
    let end = Instant::now() + time * slowness();
    move || Instant::now() >= end
}

/// The connections of [`GREEDY`]; each is held, whatever the broker makes of it.
fn crowd(gate: &Gate, count: usize) -> Vec<UnixStream> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).expect("RLIMIT_NOFILE");
    setrlimit(Resource::RLIMIT_NOFILE, most, most).expect("as many descriptors as there may be");
    as_user(&GREEDY, || (0..count).map(|_| UnixStream::connect(gate.socket()).expect("it listens")).collect())
}

/// RES-01, RES-13: ten thousand connections of one user, which fill the queue at the door as they come, keep nobody
/// waiting: neither those who are inside, nor for long those who come.
#[test]
fn ten_thousand_who_come_keep_nobody_waiting() {
    const TURNS: usize = 6;
    const CROWD: usize = 10_000;
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", &format!("{WITH_MAP}{UNHURRIED}"));
    let before = gate.baseline();
    let mut honest = session(&gate, &USER, "app");
    let [mut alone, mut beside, mut there, mut entering] = [(); 4].map(|()| Waits::default());
    cycles(&mut honest, &mut Waits::default(), after(SOON / 4));
    for turn in 0..TURNS {
        cycles(&mut honest, &mut alone, after(SOON / 2));
        let over = AtomicBool::new(false);
        let is_over = || over.load(Ordering::Relaxed);
        let held = std::thread::scope(|scope| {
            let coming = scope.spawn(|| {
                let held = crowd(&gate, CROWD);
                over.store(true, Ordering::Relaxed);
                held
            });
            if turn % 3 == 2 {
                while !is_over() {
                    entering.time(|| drop(session(&gate, &USER, "app")));
                }
            } else {
                cycles(&mut honest, &mut beside, is_over);
            }
            coming.join().unwrap()
        });
        cycles(&mut honest, &mut there, after(SOON / 4));
        drop(held);
    }
    println!(
        "alone {alone}; beside those who come {beside}; when they are there {there}; to enter {entering}"
    );
    assert!(beside.are_hardly_longer_than(&alone), "alone {alone}; beside those who come {beside}");
    assert!(there.are_hardly_longer_than(&alone), "alone {alone}; when they are there {there}");
    assert!(entering.percentile(100) < SOON * slowness(), "{entering}");
    drop(honest);
    gate.invariants(&before);
}

/// RES-01: nor do ten thousand who are let in, because the administrator says so, and who all say something.
#[test]
fn ten_thousand_who_are_inside_keep_nobody_waiting() {
    const TURNS: usize = 3;
    const CROWD: usize = 10_000;
    /// Each of them says something so often.
    const ROUND: Duration = SOON;
    needs_root!();
    let gate = Gate::start_with(&["--max-connections", "12000", "--max-connections-per-user", "10000"]);
    gate.policy("app", &format!("{WITH_MAP}{UNHURRIED}"));
    let before = gate.baseline();
    let mut honest = session(&gate, &USER, "app");
    let [mut alone, mut beside] = [(); 2].map(|()| Waits::default());
    cycles(&mut honest, &mut Waits::default(), after(SOON / 4));
    for _ in 0..TURNS {
        cycles(&mut honest, &mut alone, after(SOON / 2));
        let mut held = crowd(&gate, CROWD);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut part = 0;
                while !over.load(Ordering::Relaxed) {
                    for stream in held.iter_mut().skip(part).step_by(100) {
                        stream.write_all(b" ").expect("half a request may wait for ten seconds");
                    }
                    part = (part + 1) % 100;
                    std::thread::sleep(ROUND / 100);
                }
            });
            cycles(&mut honest, &mut beside, after(SOON));
            over.store(true, Ordering::Relaxed);
        });
        drop(held);
    }
    println!("alone {alone}; beside {CROWD} connections of another user {beside}");
    assert!(beside.are_hardly_longer_than(&alone), "alone {alone}; beside {beside}");
    drop(honest);
    gate.invariants(&before);
}

/// A client that goes away after so many whole calls and so many halves of the next one: at once, when the answer is there
/// and not read, or with one of its sides first.
fn vanish(gate: &Gate, whole: usize, halves: usize, end: usize) {
    let mut raw = Raw::on(gate.connect(&GREEDY));
    let mut instance = Value::Null;
    for stage in 0..=whole {
        let call = match stage {
            0 => frame("Open", &json!({"app": "greedy"})),
            1 => frame("Load", &json!({"object": "o"})),
            2 => frame("Attach", &json!({"instance": instance, "program": "pass"})),
            3 => frame("Map", &json!({"instance": instance, "name": "counts"})),
            4 => frame("Unload", &json!({"instance": instance})),
            _ => break,
        };
        if stage == whole {
            let _ = raw.send(&call[..call.len() * halves / 2]);
        } else {
            raw.send(&call).unwrap();
            let (reply, _) = raw.reply().unwrap();
            if stage == 1 {
                instance = reply["instance"].clone();
            }
        }
    }
    match end {
        0 => {}
        1 => std::thread::sleep(PAUSE),
        2 => drop(raw.stream.shutdown(Shutdown::Write)),
        _ => drop(raw.stream.shutdown(Shutdown::Both)),
    }
}

/// Clients that send a byte a second, hundreds at a time, clients that ask and never read, and clients that go away at every
/// stage of every call: the patience with each has an end, somebody else is served, and memory and descriptors are back.
#[test]
fn rude_clients_leave_the_broker_as_it_was() {
    const USERS: u32 = 8;
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", &format!("{WITH_MAP}{UNHURRIED}"));
    gate.policy("greedy", &of_greedy(&format!("{WITH_MAP}{UNHURRIED}")));
    let before = gate.baseline();
    let mut honest = session(&gate, &USER, "app");
    let memory = || process::number(gate.broker.pid, "RssAnon");
    let descriptors = || process::descriptors(gate.broker.pid);
    // Somebody was there once: the helper runs. What he was given on his way out is gone by then.
    vanish(&gate, 5, 0, 0);
    std::thread::sleep(2 * SOON);
    let settled = descriptors();
    let idle = || wait_until(3 * SOON, || descriptors() == settled);
    let call = frame("org.varlink.service.GetInterfaceDescription", &json!({"interface": "io.bpfgate"}));
    let full_house = || {
        let connect = |number| {
            let stream = gate.connect(&Who::new(12_401 + number % USERS));
            stream.set_nonblocking(true).unwrap();
            stream
        };
        let mut silent: Vec<UnixStream> = (0..USERS * 8).map(connect).collect();
        for stream in &mut silent {
            while stream.write_all(&call).is_ok() {}
        }
        (silent, (0..USERS * 48).map(connect).collect::<Vec<UnixStream>>())
    };
    // The allocator keeps what a full house needed.
    let (silent, mut slow) = full_house();
    for stream in &mut slow {
        stream.write_all(b" ").unwrap();
    }
    std::thread::sleep(SOON);
    drop((silent, slow));
    assert!(idle(), "{:?}, and before {settled:?}", descriptors());
    let at_first = memory();
    let (silent, mut slow) = full_house();
    let byte_by_byte = frame("Open", &json!({"app": "app"}));
    let (start, mut waits, mut vanished) = (Instant::now(), Waits::default(), 0);
    for byte in &byte_by_byte {
        let second = Instant::now() + SOON;
        for stream in &mut slow {
            let _ = stream.write_all(&[*byte]);
        }
        while Instant::now() < second {
            vanish(&gate, vanished % 6, vanished / 6 % 3, vanished / 18 % 4);
            waits.time(|| drop(honest.done("List", &json!({}))));
            vanished += 1;
        }
        if start.elapsed() > 11 * SOON {
            break;
        }
    }
    assert!(vanished >= 72, "not every stage was there: {vanished}");
    let is_over = |mut stream: &UnixStream| {
        // What was said before the end can still be read.
        let mut buffer = vec![0; 65536];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() == ErrorKind::ConnectionReset,
            }
        }
    };
    let left = || silent.iter().chain(&slow).filter(|stream| !is_over(stream)).count();
    wait_until(2 * SOON, || left() == 0);
    let left = left();
    assert_eq!(
        left,
        0,
        "of {} connections so many are still there after {:?}",
        silent.len() + slow.len(),
        start.elapsed()
    );
    drop((silent, slow));
    assert!(idle(), "{:?}, and before {settled:?}", descriptors());
    let grown = memory().saturating_sub(at_first);
    println!("{vanished} went away, others waited {waits}; {at_first} kB, and then {grown} more");
    assert!(waits.percentile(100) < SOON * slowness(), "{waits}");
    assert!(grown < 1024, "{grown} kB more than the {at_first} before");
    drop(honest);
    gate.invariants(&before);
}

/// The other app, whose object keeps the verifier busy.
fn stalling() -> String {
    let rule = |number| format!("[[objects.o.xdp]]\nprogram = \"stall_{number}\"\ninterfaces = [\"lo\"]\n");
    let rules: String = (0..6).map(rule).collect();
    of_greedy(&format!("{{client}}\n[objects.o]\n{{object:stall}}\n{rules}"))
}

/// RES-10, OBJ-31: while the verifier is busy for seconds with one app, another is served as ever; who asked for it gets it,
/// and where he is gone by then it is nobody's.
#[test]
fn a_verifier_that_is_busy_keeps_nobody_waiting() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", &format!("{WITH_MAP}{UNHURRIED}"));
    gate.policy("greedy", &stalling());
    let before = gate.baseline();
    let mut honest = session(&gate, &USER, "app");
    let [mut alone, mut beside] = [(); 2].map(|()| Waits::default());
    cycles(&mut honest, &mut Waits::default(), after(SOON / 4));
    for vanishes in [false, true] {
        cycles(&mut honest, &mut alone, after(SOON));
        let mut greedy = session(&gate, &GREEDY, "greedy");
        let [helper, ..] = gate.helper("greedy");
        let holds = || process::descriptors(helper.pid).contains_key("anon_inode:bpf-prog");
        let start = Instant::now();
        if vanishes {
            greedy.ask("Load", &json!({"object": "o", "programs": ["stall_0", "stall_1"]}));
            cycles(&mut honest, &mut beside, holds);
            drop(greedy);
            // The helper comes to an end with it, and lets go.
            assert!(wait_until(60 * SOON, || !holds()), "what nobody waits for is kept");
        } else {
            greedy.ask("Load", &json!({"object": "o"}));
            let answered = || {
                let mut readable = [PollFd::new(greedy.stream.as_fd(), PollFlags::POLLIN)];
                poll(&mut readable, PollTimeout::ZERO) == Ok(1)
            };
            cycles(&mut honest, &mut beside, answered);
            let took = start.elapsed();
            let (loaded, _) = greedy.reply().unwrap();
            assert_eq!(loaded["programs"].as_array().unwrap().len(), 6);
            println!("the verifier was busy for {took:?}");
            assert!(took > 2 * SOON, "the verifier was busy for {took:?} only");
        }
    }
    println!("alone {alone}; beside the verifier {beside}");
    assert!(beside.are_hardly_longer_than(&alone), "alone {alone}; beside the verifier {beside}");
    drop(honest);
    gate.invariants(&before);
}

/// RES-10: a helper that does not come back is given up after a minute, with the right error; its app has another one, when it
/// is gone.
#[test]
fn a_helper_that_does_not_come_back_is_given_up() {
    needs_root!();
    if !all_attacks() {
        println!("skipped: takes a minute; BPFGATE_ATTACK=all runs it");
        return;
    }
    let gate = Gate::start();
    gate.policy("app", &format!("{WITH_MAP}{UNHURRIED}"));
    gate.policy("greedy", &of_greedy(MINIMAL));
    let before = gate.baseline();
    let mut honest = session(&gate, &USER, "app");
    let mut greedy = session(&gate, &GREEDY, "greedy");
    greedy.stream.set_read_timeout(Some(70 * SOON * slowness())).unwrap();
    let [helper, ..] = gate.helper("greedy");
    kill(Pid::from_raw(helper.pid), Signal::SIGSTOP).unwrap();
    let start = Instant::now();
    greedy.ask("Load", &json!({"object": "o"}));
    let [mut alone, mut beside] = [(); 2].map(|()| Waits::default());
    cycles(&mut honest, &mut beside, after(2 * SOON));
    let refused = greedy.reply().unwrap_err();
    let took = start.elapsed();
    assert_eq!(refused.error, "io.bpfgate.Helper");
    assert!((60..66).contains(&took.as_secs()), "{took:?}");
    greedy.is_closed_after(0);
    cycles(&mut honest, &mut alone, after(2 * SOON));
    assert!(
        beside.are_hardly_longer_than(&alone),
        "alone {alone}; beside a helper that stands still {beside}"
    );
    let again = || Raw::on(gate.connect(&GREEDY)).call("Open", &json!({"app": "greedy"})).is_ok();
    let served = wait_until(15 * SOON, again);
    println!("another helper beside one that stands still: {served}");
    if helper.is_alive() {
        kill(Pid::from_raw(helper.pid), Signal::SIGCONT).unwrap();
    }
    assert!(wait_until(15 * SOON, again), "it has no other helper\n{}", gate.log());
    assert!(!helper.is_alive(), "it goes on without its broker");
    drop(honest);
    gate.invariants(&before);
}
