//! How long one user waits while another has thousands of connections. Both are measured in turns, so that they meet the
//! same machine.

use crate::verdict::Verdict;
use crate::{CROWDING, WAITING};
use bpfgate_tests::raw::frame;
use bpfgate_tests::waits::Waits;
use bpfgate_tests::{Gate, Raw, as_user};
use serde_json::json;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Connections of one user.
const CONNECTIONS: usize = 10_000;
/// Turns of each.
const TURNS: u32 = 6;
/// One of the crowd says something so often, so that each does within the broker's patience.
const PACE: Duration = Duration::from_micros(500);

pub(crate) fn run(gate: &Gate, time: Duration, verdict: &mut Verdict) {
    // On a connection that exists: what it is told is not compared with the audit records, which would be measured too.
    let mut waiting = Raw::on(gate.connect(&WAITING));
    waiting.done("Open", &json!({"app": "waiting"}));
    waiting.load("o");
    let turn = time / (2 * TURNS);
    measure(&mut waiting, turn / 4, &mut Waits::default());
    let (mut alone, mut crowded) = (Waits::default(), Waits::default());
    for _ in 0..TURNS {
        measure(&mut waiting, turn, &mut alone);
        let crowd: Vec<UnixStream> = as_user(&CROWDING, || {
            let connect = |_| UnixStream::connect(gate.socket()).expect("the broker listens");
            (0..CONNECTIONS).map(connect).collect()
        });
        among(crowd, || measure(&mut waiting, turn, &mut crowded));
    }
    let seen = format!("{alone} requests alone; {crowded} beside {CONNECTIONS} connections of another user");
    // So many that what the scheduler adds to one in a hundred is in both.
    let held = crowded.median() < alone.median() * 2 && crowded.percentile(99) < alone.percentile(99) * 2;
    verdict.held("a crowd keeps nobody waiting", held, seen);
}

fn measure(raw: &mut Raw, time: Duration, waits: &mut Waits) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        waits.time(|| drop(raw.done("List", &json!({}))));
    }
}

/// Does something while one after the other of the crowd sends a part of a call.
fn among<T>(mut crowd: Vec<UnixStream>, action: impl FnOnce() -> T) -> T {
    let call = frame("org.varlink.service.GetInfo", &json!({}));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0.. {
                let stream = &mut crowd[number % CONNECTIONS];
                // Half a call may not stay half for long: then the broker has ended this connection.
                let half = &call[..call.len() / 2];
                let part = if (number / CONNECTIONS).is_multiple_of(2) { half } else { &call[half.len()..] };
                let _ = stream.write_all(part);
                std::thread::sleep(PACE);
                if done.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        let result = action();
        done.store(true, Ordering::Relaxed);
        result
    })
}
