//! `make soak`: a broker with several apps and users, for minutes: honest ones that load and unload, one whose helpers and
//! loaders are killed, clients that never read, that send a byte a second, that vanish, a flood of refusals, and a user
//! with thousands of connections. At the end it says what held.
//!
//! | module | holds |
//! |---|---|
//! | `crowd` | how long one user waits while another has thousands of connections |
//! | `work` | everything else at the same time, in rounds |
//! | `verdict` | what held, and the figures behind it |
//!
//! Promises that the harness asserts end it at once; all others are listed.
#![forbid(unsafe_code)]

mod crowd;
mod verdict;
mod work;

use bpfgate_tests::gate::{MINIMAL, WITH_MAP};
use bpfgate_tests::{Gate, Who, is_root};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::process::exit;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;
use verdict::Verdict;

/// Two users with an app each, whose helpers have to stay as they are; one whose helpers are killed; one who vanishes; one
/// who waits while another has a crowd of connections; one who reads nothing or writes slowly; one whom no policy names.
const ONE: Who = Who::new(12_401);
const TWO: Who = Who::new(12_402);
const KILLED: Who = Who::new(12_403);
const VANISHING: Who = Who::new(12_404);
const WAITING: Who = Who::new(12_405);
const CROWDING: Who = Who::new(12_406);
const STALLING: Who = Who::new(12_407);
const FLOODING: Who = Who::new(12_408);

/// For the processes of the harness, which end by themselves after an hour.
const MOST_SECONDS: u64 = 3000;

/// The broker, for whoever ends without dropping the gate.
static BROKER: AtomicI32 = AtomicI32::new(0);

fn main() {
    let seconds = std::env::var("SOAK_SECONDS").unwrap_or_else(|_| "600".into());
    let seconds = seconds.parse().ok().filter(|seconds| (20..=MOST_SECONDS).contains(seconds));
    let Some(seconds) = seconds else {
        eprintln!("soak: SOAK_SECONDS is a number from 20 to {MOST_SECONDS}");
        exit(2);
    };
    if !is_root() {
        eprintln!("soak: it needs root");
        exit(2);
    }
    // A panic aborts a release: nothing is dropped, and whoever started this has to be told by a 1.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        eprintln!("soak: a promise is broken");
        match BROKER.load(Ordering::Relaxed) {
            0 => {}
            pid => drop(kill(Pid::from_raw(pid), Signal::SIGKILL)),
        }
        exit(1);
    }));
    let verdict = soak(Duration::from_secs(seconds));
    print!("{verdict}");
    exit(i32::from(!verdict.all_held()));
}

fn soak(time: Duration) -> Verdict {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("RLIMIT_NOFILE");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("as many descriptors as there may be");
    let gate = Gate::start_with(&["--max-connections", "12000", "--max-connections-per-user", "10000"]);
    BROKER.store(gate.broker.pid, Ordering::Relaxed);
    let client =
        |who: &Who| format!("[[client]]\nuser = {}\nmay = [\"load\", \"attach\", \"maps\"]\n", who.id);
    let limits = "[limits]\nloads_per_minute = 60000\n";
    for (app, who, text) in [
        ("one", ONE, WITH_MAP),
        ("two", TWO, MINIMAL),
        ("killed", KILLED, WITH_MAP),
        ("vanishing", VANISHING, WITH_MAP),
        ("waiting", WAITING, WITH_MAP),
    ] {
        gate.policy(app, &(text.replace("{client}", &client(&who)) + limits));
    }
    let before = gate.baseline();
    let mut verdict = Verdict::default();
    crowd::run(&gate, time / 4, &mut verdict);
    work::run(&gate, time * 3 / 4, &mut verdict);
    gate.invariants(&before);
    verdict.held(
        "the invariants",
        true,
        "kernel objects, descriptors, privileges and processes are as before; every audit record is whole"
            .into(),
    );
    verdict
}
