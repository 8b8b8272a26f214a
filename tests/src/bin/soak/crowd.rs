//! How long one user waits while another has thousands of connections. Both are measured in turns, so that they meet the
//! same machine.

use crate::verdict::Verdict;
use crate::{CROWDING, WAITING};
use bpfgate_tests::raw::frame;
use bpfgate_tests::{Gate, Raw, as_user};
use serde_json::json;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Connections of one user.
const CONNECTIONS: usize = 2000;
/// Turns of each.
const TURNS: u32 = 6;
/// One of the crowd says something so often.
const PACE: Duration = Duration::from_millis(1);

pub(crate) fn run(gate: &Gate, time: Duration, verdict: &mut Verdict) {
    // On a connection that exists: what it is told is not compared with the audit records, which would be measured too.
    let mut waiting = Raw::on(gate.connect(&WAITING));
    waiting.done("Open", &json!({"app": "waiting"}));
    waiting.load("o");
    let turn = time / (2 * TURNS);
    measure(&mut waiting, turn / 4);
    let (mut alone, mut crowded) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        alone.extend(measure(&mut waiting, turn));
        let crowd: Vec<UnixStream> = as_user(&CROWDING, || {
            let connect = |_| UnixStream::connect(gate.socket()).expect("the broker listens");
            (0..CONNECTIONS).map(connect).collect()
        });
        crowded.extend(among(crowd, || measure(&mut waiting, turn)));
    }
    let [alone, crowded] = [alone, crowded].map(|mut all| {
        all.sort();
        (all[all.len() / 2], all[all.len() * 99 / 100], all.len())
    });
    let seen = format!(
        "p50 {:?}, p99 {:?} of {} requests alone; p50 {:?}, p99 {:?} of {} beside {CONNECTIONS} connections of another user",
        alone.0, alone.1, alone.2, crowded.0, crowded.1, crowded.2
    );
    verdict.held("a crowd keeps nobody waiting", crowded.1 < alone.1 * 2, seen);
}

fn measure(raw: &mut Raw, time: Duration) -> Vec<Duration> {
    let end = Instant::now() + time;
    let mut all = Vec::new();
    while Instant::now() < end {
        let start = Instant::now();
        raw.done("List", &json!({}));
        all.push(start.elapsed());
    }
    all
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
