//! Everything at the same time, in rounds. Between rounds all clients are gone, and the processes are looked at: after the
//! first round none of them may have grown.

use crate::verdict::Verdict;
use crate::{FLOODING, KILLED, ONE, STALLING, TWO, VANISHING};
use bpfgate_client::{Client, Error, LoadOptions, Target};
use bpfgate_tests::gate::INTERFACE;
use bpfgate_tests::process::{self, Process, Role};
use bpfgate_tests::raw::frame;
use bpfgate_tests::{Gate, Raw, Who, slowness, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The first is for warming up.
const ROUNDS: u32 = 5;
/// An app whose helper was killed is served again after this time, on an ordinary machine. Who is killed before he is ready
/// did not start: after some of these in a row the broker waits for five seconds. broker/src/starter.rs says so.
const RECOVERY: Duration = Duration::from_secs(6);
/// Between two loads of a user. The kernel frees programs some time after they were let go of, one at a time, and whoever
/// starts a process with a seccomp filter meanwhile waits for that, which is a program too: after a thousand loads a second
/// for some seconds. What keeps an app from this is `loads_per_minute`, which is set high here.
const PAUSE: Duration = Duration::from_millis(10);
/// What a process may have more than after the first round, in kB: the allocator's slack.
const SLACK: u64 = 512;
/// What is recorded of a flood of one user, in bytes: at once, and each second. broker/src/audit/limit.rs says the same.
const RECORDED: (u64, u64) = (192 << 10, 4 << 10);
/// Loads and unloads in a soak of ten minutes, at least: so many in this time.
const CYCLES: (u64, Duration) = (5000, Duration::from_secs(450));
/// From the first decision that is not recorded to the summary.
const SUMMARY: Duration = Duration::from_secs(10);

/// What was done, in all rounds.
#[derive(Default)]
struct Tally {
    cycles: AtomicU64,
    kills: AtomicU64,
    stalled: AtomicU64,
    vanished: AtomicU64,
    denied: AtomicU64,
    /// Served in spite of kills, and the longest that it took again.
    survived: AtomicU64,
    recovery: Mutex<Duration>,
    /// What should not have happened.
    wrong: Mutex<Vec<String>>,
}

impl Tally {
    fn one_more(count: &AtomicU64) {
        count.fetch_add(1, Ordering::Relaxed);
    }

    fn wrong(&self, what: String) {
        self.wrong.lock().expect("nobody panics").push(what);
    }
}

pub(crate) fn run(gate: &Gate, time: Duration, verdict: &mut Verdict) {
    let tally = Tally::default();
    let start = Instant::now();
    // Sessions that hold the helpers which are measured.
    let _held = [(ONE, "one"), (TWO, "two")].map(|(who, app)| {
        let mut client = Client::from_stream(gate.connect(&who));
        client.open(app).unwrap_or_else(|error| panic!("Open {app}: {error}\n{}", gate.log()));
        client
    });
    let watched = ["one", "two"].map(|app| gate.helper(app));
    let mut seen = Vec::new();
    for round in 1..=ROUNDS {
        let end = Instant::now() + time / ROUNDS;
        std::thread::scope(|scope| {
            let (tally, gate) = (&tally, gate);
            let interface = Target::Interface(INTERFACE.to_owned());
            scope.spawn(move || honest(gate, &ONE, "one", Some(interface), end, tally));
            scope.spawn(move || honest(gate, &TWO, "two", None, end, tally));
            scope.spawn(move || survivor(gate, end, tally));
            scope.spawn(move || killer(gate, u64::from(round), end, tally));
            scope.spawn(move || stalling(gate, end, tally));
            scope.spawn(move || slow(gate, end));
            scope.spawn(move || vanishing(gate, end, tally));
            scope.spawn(move || flooding(gate, end, tally));
        });
        let now = sizes(gate, &watched, seen.first());
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        eprintln!(
            "soak: round {round}: {} cycles, {} kills, {} denials; kB and descriptors: {}",
            count(&tally.cycles),
            count(&tally.kills),
            count(&tally.denied),
            now.iter()
                .map(|size| format!("{} {}/{}", size.what, size.kb, size.fds))
                .collect::<Vec<_>>()
                .join(", ")
        );
        seen.push(now);
    }
    // The killer may have been the last: that its loader has ended a helper sees at its next request.
    let _ = Client::from_stream(gate.connect(&KILLED)).open("killed");
    judge(gate, &tally, &watched, &seen, time, verdict);
    flood(gate, &tally, start, verdict);
}

/// What a process has.
struct Size {
    what: String,
    kb: u64,
    fds: usize,
}

/// The sizes, when what was released before is gone: when there are as many descriptors as `before`, or a while later.
fn sizes(gate: &Gate, watched: &[[Process; 3]], before: Option<&Vec<Size>>) -> Vec<Size> {
    let size = |what: String, pid: i32, without: usize| Size {
        what,
        kb: process::number(pid, "VmRSS"),
        fds: process::descriptors(pid).values().sum::<usize>() - without,
    };
    let look = || {
        // A channel for each helper; the killed one's may be on its way.
        let helpers = gate.processes().iter().filter(|p| matches!(p.role, Role::Helper(_))).count();
        let mut all = vec![size("broker".into(), gate.broker.pid, helpers)];
        for (app, processes) in ["one", "two"].iter().zip(watched) {
            for (process, part) in processes.iter().zip(["helper", "loader", "worker"]) {
                all.push(size(format!("{part} {app}"), process.pid, 0));
            }
        }
        all
    };
    std::thread::sleep(Duration::from_secs(1));
    let mut now = look();
    wait_until(Duration::from_secs(4), || {
        now = look();
        before.is_some_and(|before| now.iter().zip(before).all(|(now, before)| now.fds == before.fds))
    });
    now
}

fn judge(
    gate: &Gate,
    tally: &Tally,
    watched: &[[Process; 3]],
    seen: &[Vec<Size>],
    time: Duration,
    verdict: &mut Verdict,
) {
    let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
    let wrong = tally.wrong.lock().expect("nobody panics");
    let first = wrong.first().cloned().unwrap_or_else(|| "nothing went wrong".into());
    let cycles = count(&tally.cycles);
    let least = CYCLES.0 * time.as_secs() / CYCLES.1.as_secs();
    let served = format!("{cycles} cycles of load and unload, of at least {least}; {first}");
    verdict.held("honest users are served", wrong.is_empty() && cycles >= least, served);
    let alive = gate.broker.is_alive() && watched.iter().flatten().all(Process::is_alive);
    let all = if alive { "broker, and helpers and loaders of two apps" } else { "one of them ended" };
    verdict.held("nobody else's process ends", alive, all.into());
    let (first, last) = (&seen[0], &seen[seen.len() - 1]);
    let pairs = || first.iter().zip(last);
    let show = |number: fn(&Size) -> u64| {
        let of = |(a, b): (&Size, &Size)| format!("{} {} -> {}", a.what, number(a), number(b));
        pairs().map(of).collect::<Vec<_>>().join(", ")
    };
    let flat = pairs().all(|(a, b)| b.kb <= a.kb + a.kb / 10 + SLACK);
    verdict.held("memory is flat (kB)", flat, show(|size| size.kb));
    let flat = pairs().all(|(a, b)| a.fds == b.fds);
    verdict.held("descriptors are flat", flat, show(|size| size.fds as u64));
    let (kills, survived) = (count(&tally.kills), count(&tally.survived));
    let recovery = *tally.recovery.lock().expect("nobody panics");
    let text =
        format!("{kills} kills, {survived} cycles in spite of them, served again after at most {recovery:?}");
    let held = kills > 0 && survived > 0 && recovery < RECOVERY * slowness();
    verdict.held("what is killed comes back", held, text);
    let (stalled, vanished) = (count(&tally.stalled), count(&tally.vanished));
    let text =
        format!("{stalled} clients that never read, and {vanished} that vanished in the middle of a call");
    verdict.held("rude clients were there", stalled > 0 && vanished > 0, text);
}

/// Loads and unloads; now and then attaches.
fn honest(gate: &Gate, who: &Who, app: &str, target: Option<Target>, end: Instant, tally: &Tally) {
    let session = |count: u32| -> Result<(), Error> {
        let mut client = Client::from_stream(gate.connect(who));
        client.open(app)?;
        for cycle in 0..count {
            let mut instance = client.load("o", &LoadOptions::default())?;
            if cycle == 0
                && let Some(target) = &target
            {
                let counts = instance.take_map("counts")?;
                let link = client.attach(instance.id, "pass", Some(target), None)?;
                gate.send_packets(1);
                assert!(counts.lookup(&[0; 4]).is_ok(), "a map that was handed over cannot be read");
                client.detach(link.id)?;
            }
            // Every other instance ends with its session.
            if count.is_multiple_of(2) {
                client.unload(instance.id)?;
            }
            Tally::one_more(&tally.cycles);
            std::thread::sleep(PAUSE);
        }
        Ok(())
    };
    let mut count = 8;
    while Instant::now() < end {
        if let Err(error) = session(count) {
            tally.wrong(format!("{app}: {error}"));
        }
        count = 17 - count;
    }
}

/// Loads and unloads while its helpers and loaders are killed: errors are allowed, but not for long.
fn survivor(gate: &Gate, end: Instant, tally: &Tally) {
    let mut failing: Option<Instant> = None;
    while Instant::now() < end || failing.is_some() {
        let mut client = Client::from_stream(gate.connect(&KILLED));
        let cycle = |client: &mut Client| -> Result<(), Error> {
            let instance = client.load("o", &LoadOptions::default())?;
            client.unload(instance.id)
        };
        let mut result = client.open("killed");
        while result.is_ok() && Instant::now() < end {
            result = cycle(&mut client);
            if result.is_ok() {
                std::thread::sleep(PAUSE);
                Tally::one_more(&tally.survived);
                if let Some(since) = failing.take() {
                    let mut worst = tally.recovery.lock().expect("nobody panics");
                    *worst = since.elapsed().max(*worst);
                }
            }
        }
        match result {
            // A session is open: it is served again.
            Ok(()) => failing = None,
            Err(error) => {
                let since = *failing.get_or_insert_with(Instant::now);
                if since.elapsed() > RECOVERY * slowness() * 2 {
                    tally.wrong(format!("killed: it does not come back: {error}"));
                    return;
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
}

/// Kills the helper, its loader or its worker, at times that are the same in every run.
fn killer(gate: &Gate, seed: u64, end: Instant, tally: &Tally) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    loop {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let pause = Duration::from_millis(100 + state % 700);
        if Instant::now() + pause >= end {
            return;
        }
        std::thread::sleep(pause);
        let all = gate.processes();
        let Some(helper) = all.iter().find(|p| p.role == Role::Helper("killed".into())) else { continue };
        let loader = all.iter().find(|p| p.parent == helper.pid);
        let worker = loader.and_then(|loader| all.iter().find(|p| p.parent == loader.pid));
        let victim = match state >> 32 & 3 {
            0 => loader,
            1 => worker,
            _ => Some(helper),
        };
        if let Some(victim) = victim
            && victim.is_alive()
            && kill(Pid::from_raw(victim.pid), Signal::SIGKILL).is_ok()
        {
            Tally::one_more(&tally.kills);
        }
    }
}

/// Asks and asks, and reads nothing, until the broker has enough of it.
fn stalling(gate: &Gate, end: Instant, tally: &Tally) {
    let call = frame("org.varlink.service.GetInterfaceDescription", &json!({"interface": "io.bpfgate"}));
    while Instant::now() < end {
        let mut all: Vec<_> = (0..8).map(|_| gate.connect(&STALLING)).collect();
        for stream in &mut all {
            stream.set_nonblocking(true).expect("O_NONBLOCK");
            for _ in 0..1000 {
                if stream.write_all(&call).is_err() {
                    break;
                }
            }
            Tally::one_more(&tally.stalled);
        }
        // Some are ended by the broker, some end themselves.
        let pause = Duration::from_secs(if tally.stalled.load(Ordering::Relaxed).is_multiple_of(16) {
            12
        } else {
            1
        });
        std::thread::sleep(pause.min(end.saturating_duration_since(Instant::now())));
    }
}

/// A byte a second.
fn slow(gate: &Gate, end: Instant) {
    let call = frame("org.varlink.service.GetInfo", &json!({}));
    let mut all: Vec<_> = (0..16).map(|_| gate.connect(&STALLING)).collect();
    for byte in call.iter().cycle() {
        for stream in &mut all {
            if stream.write_all(&[*byte]).is_err() {
                *stream = gate.connect(&STALLING);
            }
        }
        if Instant::now() + Duration::from_secs(1) >= end {
            return;
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// Is gone before its answer is there, or before its call is.
fn vanishing(gate: &Gate, end: Instant, tally: &Tally) {
    let load = frame("Load", &json!({"object": "o"}));
    for number in 0u64.. {
        if Instant::now() >= end {
            return;
        }
        let mut raw = Raw::on(gate.connect(&VANISHING));
        raw.done("Open", &json!({"app": "vanishing"}));
        let part = if number.is_multiple_of(2) { &load[..] } else { &load[..load.len() / 2] };
        let _ = raw.send(part);
        if number.is_multiple_of(3) {
            std::thread::sleep(Duration::from_micros(number % 7 * 100));
        }
        Tally::one_more(&tally.vanished);
        drop(raw);
        std::thread::sleep(PAUSE);
    }
}

/// Asks for what it may not have, as fast as it is answered.
fn flooding(gate: &Gate, end: Instant, tally: &Tally) {
    let app = json!({"app": "one"});
    while Instant::now() < end {
        let mut raw = Raw::on(gate.connect(&FLOODING));
        for _ in 0..200 {
            match raw.call("Open", &app) {
                Err(refused) if refused.error == "io.bpfgate.Denied" => Tally::one_more(&tally.denied),
                other => return tally.wrong(format!("a flood is answered by {other:?}")),
            }
        }
    }
}

/// Every denial is recorded or counted, and they are not more than promised.
fn flood(gate: &Gate, tally: &Tally, start: Instant, verdict: &mut Verdict) {
    let denied = tally.denied.load(Ordering::Relaxed);
    let is_its = |record: &&Value| record["uid"] == FLOODING.id;
    let (mut recorded, mut counted, mut bytes) = (0, 0, 0);
    wait_until(SUMMARY + Duration::from_secs(3), || {
        let audit = gate.audit();
        let of =
            |wanted: &str| audit.iter().filter(is_its).filter(|r| r["verdict"] == wanted).collect::<Vec<_>>();
        recorded = of("Denied").len() as u64;
        counted = of("suppressed").iter().filter_map(|r| r["suppressed"]["Denied"].as_u64()).sum();
        bytes = audit.iter().filter(is_its).map(|record| record.to_string().len() as u64 + 1).sum();
        recorded + counted == denied
    });
    // Each summary, and the record before it, are not counted against the share.
    let seconds = start.elapsed().as_secs();
    let most = RECORDED.0 + RECORDED.1 * seconds + 2048 * (seconds / SUMMARY.as_secs() + 1);
    let seen = format!(
        "{denied} denials: {recorded} recorded, {counted} counted; {} KiB of at most {}",
        bytes >> 10,
        most >> 10
    );
    verdict.held("a flood is counted and bounded", recorded + counted == denied && bytes <= most, seen);
}
