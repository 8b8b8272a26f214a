//! Clients that take more than their share: of descriptors, of the broker's time, of connections.

use bpfgate_tests::raw::frame;
use bpfgate_tests::user::STRANGER;
use bpfgate_tests::{Gate, Raw, USER, needs_root, wait_until};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::json;
use std::fmt::Write as _;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

const POLICY: &str = r#"
{client}
[objects.o]
{object:relocations}
[[objects.o.xdp]]
program = "refer"
interfaces = ["{interface}"]
[objects.o.maps]
counts = "frozen"
"#;

/// Descriptors that a client does not read count against all that the broker may have on their way. However the client
/// ends its side, its connection stays counted until they are read or gone: it runs into its own limit first.
#[test]
fn unread_descriptors_stay_counted_against_their_user() {
    needs_root!();
    for end in [Some(Shutdown::Both), Some(Shutdown::Write), None] {
        let gate = Gate::start_with(&["--max-connections-per-user", "6"]);
        gate.policy("app", POLICY);
        let before = gate.baseline();
        let mut hoard = Vec::new();
        for _ in 0..6 {
            let mut raw = Raw::open(&gate, "app");
            raw.send(&frame("Load", &json!({"object": "o"}))).unwrap();
            // The reply is there; it is left unread.
            let mut readable = [PollFd::new(raw.stream.as_fd(), PollFlags::POLLIN)];
            assert_eq!(poll(&mut readable, PollTimeout::from(5000u16)), Ok(1));
            if let Some(how) = end {
                raw.stream.shutdown(how).unwrap();
            }
            hoard.push(raw);
        }
        // One more, twice: the first slots have not come free in the meantime.
        for _ in 0..2 {
            std::thread::sleep(Duration::from_millis(1200));
            // The broker says so at the door, before anything is asked.
            let refused = Raw::connect(&gate, &USER).reply().unwrap_err();
            assert_eq!(refused.error, "io.bpfgate.Quota", "{end:?}");
        }
        drop(hoard);
        let again = || bpfgate_client::Client::from_stream(gate.connect(&USER)).open("app").is_ok();
        assert!(wait_until(Duration::from_secs(3), again), "the slots stay taken after the client is gone");
        gate.invariants(&before);
    }
}

/// A thousand calls in one write, by somebody whom no policy names, keep nobody waiting.
#[test]
fn a_stranger_with_many_calls_keeps_nobody_waiting() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", POLICY);
    let mut long = String::from("{client}\n[objects.o]\npath = \"/o\"\n");
    for i in 0..1000 {
        writeln!(long, "[[objects.o.xdp]]\nprogram = \"p{i}\"\ninterfaces = [\"a\"]").unwrap();
    }
    gate.policy("long", &long);
    let before = gate.baseline();
    let mut honest = Raw::open(&gate, "app");
    let mut stranger = Raw::connect(&gate, &STRANGER);
    let call = frame("Open", &json!({"app": "long"}));
    stranger.send(&call.repeat(1000)).unwrap();
    let mut worst = Duration::ZERO;
    for _ in 0..20 {
        let start = Instant::now();
        honest.done("List", &json!({}));
        worst = worst.max(start.elapsed());
    }
    // The policy was read before; a call is microseconds. Served in one go it was seven seconds.
    assert!(worst < Duration::from_secs(1), "the honest client waited {worst:?}");
    drop((honest, stranger));
    gate.invariants(&before);
}
