//! Clients that send what is no request: bytes, halves, floods, descriptors; and those that do not read.

use bpfgate_tests::raw::frame;
use bpfgate_tests::{Gate, Raw, USER, needs_root, process, slowness, wait_until};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// The largest request, with the zero byte at its end.
const MAX_REQUEST: usize = 64 * 1024;

/// How long half a request may stay half, and a reply unread.
const STALLED: Duration = Duration::from_secs(10);

const POLICY: &str = r#"
{client}
[objects.o]
{object:minimal}
[[objects.o.xdp]]
program = "pass"
interfaces = ["{interface}"]
[objects.o.maps]
counts = "frozen"
"#;

fn gate() -> Gate {
    let gate = Gate::start();
    gate.policy("app", POLICY);
    gate
}

/// What `bytes` come to on a connection of their own: the first reply.
fn answer(gate: &Gate, bytes: &[u8]) -> Option<Value> {
    let mut raw = Raw::connect(gate, &USER);
    // The broker may close before it has read all.
    let _ = raw.send(bytes);
    let (reply, fds) = raw.receive()?;
    assert!(fds.is_empty());
    Some(serde_json::from_slice(&reply).expect("a reply is JSON"))
}

/// A call of exactly this many bytes, its zero byte included.
fn padded(len: usize) -> Vec<u8> {
    let mut bytes = frame("org.varlink.service.GetInfo", &json!({}));
    bytes.pop();
    bytes.resize(len - 1, b' ');
    bytes.push(0);
    bytes
}

#[test]
fn a_request_has_at_most_64_kib() {
    needs_root!();
    let gate = gate();
    let before = gate.baseline();
    let reply = answer(&gate, &padded(MAX_REQUEST)).expect("a request of 64 KiB is answered");
    assert_eq!(reply["parameters"]["product"], "bpfgate");
    let endless = vec![b'x'; MAX_REQUEST + 1];
    let pipelined = [padded(100), padded(MAX_REQUEST + 1)].concat();
    for (bytes, replies) in [(padded(MAX_REQUEST + 1), 0), (endless, 0), (pipelined, 1)] {
        let mut raw = Raw::connect(&gate, &USER);
        let _ = raw.send(&bytes);
        for _ in 0..replies {
            raw.reply().expect("the request before is answered");
        }
        let Err(refused) = raw.reply() else { panic!("a request of 64 KiB + 1 is answered") };
        assert_eq!(refused.error, "io.bpfgate.Invalid");
        assert!(refused.parameters["message"].as_str().unwrap().contains("65536 bytes"), "{refused:?}");
        raw.is_closed_after(0);
    }
    // What never ends is not kept: 16 MiB of it make no difference.
    let memory = process::number(gate.broker.pid, "VmHWM");
    let mut raw = Raw::connect(&gate, &USER);
    let flood = vec![b'['; MAX_REQUEST];
    assert!((0..256).any(|_| raw.send(&flood).is_err()), "the broker reads on and on");
    let grown = process::number(gate.broker.pid, "VmHWM") - memory;
    assert!(grown < 1024, "the broker keeps {grown} kB of it");
    drop(raw);
    gate.invariants(&before);
}

#[test]
fn garbage_is_answered_once_and_ends_the_connection() {
    needs_root!();
    let gate = gate();
    let before = gate.baseline();
    let deep = [vec![b'['; 30_000], vec![0]].concat();
    let deep_parameters =
        format!("{{\"method\":\"io.bpfgate.List\",\"parameters\":{}}}\0", "[".repeat(30_000));
    let cases: [(&str, &[u8]); 14] = [
        ("nothing", b"\0"),
        ("noise", b"\xff\xfe\x80\x01garbage\x1b[31m\0"),
        ("HTTP", b"GET / HTTP/1.1\r\n\r\n\0"),
        ("half an object", b"{\"method\":\"io.bpfgate.List\"\0"),
        ("no object", b"[1,2]\0"),
        ("null", b"null\0"),
        ("no method", b"{\"parameters\":{}}\0"),
        ("method is a number", b"{\"method\":7}\0"),
        ("an unknown field", b"{\"method\":\"io.bpfgate.List\",\"root\":true}\0"),
        ("a field twice", b"{\"method\":\"io.bpfgate.List\",\"method\":\"io.bpfgate.List\"}\0"),
        ("invalid UTF-8", b"{\"method\":\"io.bpfgate.\xc3\x28\"}\0"),
        ("an upgrade", b"{\"method\":\"io.bpfgate.List\",\"upgrade\":true}\0"),
        ("deep", &deep),
        ("deep parameters", deep_parameters.as_bytes()),
    ];
    for (name, bytes) in cases {
        let mut raw = Raw::connect(&gate, &USER);
        raw.send(bytes).unwrap();
        match raw.reply() {
            Err(refused) => assert_eq!(refused.error, "io.bpfgate.Invalid", "{name}"),
            Ok((reply, _)) => panic!("{name} is answered: {reply}"),
        }
        raw.is_closed_after(0);
        let record = gate.audit().pop().unwrap();
        assert_eq!((&record["verdict"], &record["uid"]), (&json!("Invalid"), &json!(USER.id)), "{name}");
    }
    gate.invariants(&before);
}

/// Calls with one byte changed, cut out or doubled, somewhere: each gets one answer of JSON or the end.
#[test]
fn mutated_calls_are_answered_and_do_no_harm() {
    needs_root!();
    let gate = gate();
    let before = gate.baseline();
    let whole = [
        frame("Open", &json!({"app": "app"})),
        frame("Load", &json!({"object": "o", "programs": ["pass"], "globals": {"a": -1}})),
        frame("Attach", &json!({"instance": 1, "program": "pass", "target": {"interface": "gate0"}})),
        frame("ReadMap", &json!({"instance": 1, "name": "counts", "cursor": "00", "limit": 9})),
    ];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: usize| {
        // xorshift: every run does the same.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % below as u64).unwrap()
    };
    for round in 0..400 {
        let mut bytes = whole[random(whole.len())].clone();
        let at = random(bytes.len() - 1);
        match random(3) {
            0 => bytes[at] = u8::try_from(random(255)).unwrap() + 1,
            1 => drop(bytes.remove(at)),
            _ => bytes.insert(at, b"\"{}[],:\\u0\x1b"[random(11)]),
        }
        let reply = answer(&gate, &bytes).unwrap_or_else(|| panic!("round {round}: no answer"));
        let text = String::from_utf8_lossy(&bytes);
        assert!(reply["error"].is_string() || bytes.contains(&b'O'), "{text}: {reply}");
    }
    gate.invariants(&before);
}

#[test]
fn half_a_message_and_the_end_is_no_request() {
    needs_root!();
    let gate = gate();
    let before = gate.baseline();
    let decisions = gate.audit().len();
    let whole = frame("Open", &json!({"app": "app"}));
    for len in [0, 1, whole.len() / 2, whole.len() - 1] {
        let mut raw = Raw::connect(&gate, &USER);
        raw.send(&whole[..len]).unwrap();
        drop(raw);
        let mut raw = Raw::connect(&gate, &USER);
        raw.send(&whole[..len]).unwrap();
        raw.stream.shutdown(Shutdown::Write).unwrap();
        let start = Instant::now();
        raw.is_closed_after(0);
        assert!(start.elapsed() < STALLED / 2, "half a message whose sender is gone is waited for");
    }
    assert_eq!(gate.audit().len(), decisions, "half a message was taken for a request");
    // One that comes byte by byte is one all the same, and so are two in one piece.
    let mut raw = Raw::connect(&gate, &USER);
    for byte in &whole {
        raw.send(&[*byte]).unwrap();
    }
    raw.reply().unwrap();
    raw.send(&[frame("List", &json!({})), frame("Nope", &json!({})), frame("List", &json!({}))].concat())
        .unwrap();
    raw.reply().unwrap();
    raw.reply().unwrap_err();
    // The last request of a client that sends no more is answered before the end.
    raw.stream.shutdown(Shutdown::Write).unwrap();
    raw.reply().unwrap();
    raw.is_closed_after(0);
    gate.invariants(&before);
}

/// Sends without reading until the broker takes no more.
fn pour(raw: &mut Raw, bytes: &[u8]) {
    raw.stream.set_nonblocking(true).unwrap();
    let full = || loop {
        match raw.stream.write(bytes) {
            // What is cut here is half a request: nothing follows it.
            Ok(sent) if sent == bytes.len() => {}
            Ok(_) => return true,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                return true;
            }
        }
    };
    assert!(wait_until(Duration::from_secs(5), full));
}

fn is_closed(raw: &Raw) -> bool {
    let mut fds = [PollFd::new(raw.stream.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO).unwrap();
    fds[0].revents().unwrap().contains(PollFlags::POLLHUP)
}

#[test]
fn clients_that_stall_are_closed_after_10_seconds_and_keep_nobody_waiting() {
    needs_root!();
    let gate = gate();
    let before = gate.baseline();
    let mut reader = Raw::open(&gate, "app");
    let instance = reader.load("o");
    let memory = process::number(gate.broker.pid, "VmRSS");

    let mut half = Raw::connect(&gate, &USER);
    half.send(b"{\"method\":").unwrap();
    let mut opened_half = Raw::open(&gate, "app");
    opened_half.send(b"{").unwrap();
    let mut lists = Raw::open(&gate, "app");
    pour(&mut lists, &frame("List", &json!({})).repeat(100));
    let mut maps = Raw::open(&gate, "app");
    pour(&mut maps, &frame("Map", &json!({"instance": instance, "name": "counts"})).repeat(100));
    let mut infos = Raw::connect(&gate, &USER);
    pour(&mut infos, &frame("org.varlink.service.GetInfo", &json!({})).repeat(100));
    let start = Instant::now();

    let all =
        [("half", half), ("half, opened", opened_half), ("List", lists), ("Map", maps), ("GetInfo", infos)];
    // Meanwhile others are served, of this app and of another.
    while start.elapsed() < STALLED * 8 / 10 {
        let asked = Instant::now();
        reader.done("Map", &json!({"instance": instance, "name": "counts"}));
        assert!(
            asked.elapsed() < Duration::from_millis(500) * slowness(),
            "a reader waits for {:?}",
            asked.elapsed()
        );
        for (name, raw) in &all {
            assert!(!is_closed(raw), "{name}: closed after {:?}", start.elapsed());
        }
        std::thread::sleep(Duration::from_millis(250));
    }
    let grown = process::number(gate.broker.pid, "VmRSS").saturating_sub(memory);
    assert!(grown < 4096, "the broker keeps {grown} kB for clients that do not read");
    for (name, raw) in &all {
        let left = (STALLED + Duration::from_secs(3)).saturating_sub(start.elapsed());
        assert!(wait_until(left, || is_closed(raw)), "{name} is not closed");
    }
    for (_, mut raw) in all {
        raw.stream.set_nonblocking(false).unwrap();
        // What was on its way can still be read, and then there is an end.
        while raw.receive().is_some() {}
    }
    // Idle is not stalled.
    reader.done("List", &json!({}));
    drop(reader);
    gate.invariants(&before);
}

#[test]
fn descriptors_of_clients_are_not_taken() {
    needs_root!();
    let gate = gate();
    let before = gate.baseline();
    let null = File::open("/dev/null").unwrap();
    for opened in [false, true] {
        let mut raw = if opened { Raw::open(&gate, "app") } else { Raw::connect(&gate, &USER) };
        let bytes = frame("org.varlink.service.GetInfo", &json!({}));
        match raw.send_with(&bytes, &[null.as_fd()]) {
            // The kernel knows SO_PASSRIGHTS (Linux 6.16): nothing was sent.
            Err(errno) => {
                assert_eq!(errno, Errno::EPERM);
                raw.done("org.varlink.service.GetInfo", &json!({}));
            }
            Ok(_) => raw.is_closed_after(0),
        }
    }
    gate.invariants(&before);
}
