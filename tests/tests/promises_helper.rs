//! Promises 2 and 3: what the process with capabilities decides by itself, and whom it believes.

use bpfgate_client::{Error, LoadOptions};
use bpfgate_protocol::channel::MAX_FDS;
use bpfgate_protocol::codec;
use bpfgate_protocol::messages::helper::{Global, Outcome, Target, ToHelper, Verb};
use bpfgate_protocol::messages::{Bytes, InstanceId, LinkId, SessionId};
use bpfgate_protocol::refusal::Class;
use bpfgate_tests::peer::{POLICY, Peer, client_of, connected};
use bpfgate_tests::{Gate, Raw, SOON, STRANGER, USER, needs_root, process, wait_until};
use serde_json::json;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

fn program(name: &str) -> bpfgate_protocol::names::ProgramName {
    name.parse().unwrap()
}

fn ask(session: u64, verb: Verb) -> ToHelper {
    ToHelper::Ask { session: SessionId(session), verb }
}

fn load(session: u64, object: &str, programs: &[&str], globals: &[(&str, i128)]) -> ToHelper {
    let global = |(name, value): &(&str, i128)| Global { name: name.parse().unwrap(), value: *value };
    let programs = programs.iter().map(|name| program(name)).collect();
    let globals = globals.iter().map(global).collect();
    ask(session, Verb::Load { object: object.parse().unwrap(), programs, globals })
}

fn attach(session: u64, instance: u64, name: &str, interface: &str) -> ToHelper {
    let target = Target::Interface(interface.parse().unwrap());
    let (instance, program) = (InstanceId(instance), program(name));
    ask(session, Verb::Attach { instance, program, hook: None, target })
}

fn map(session: u64, instance: u64, name: &str) -> ToHelper {
    ask(session, Verb::Map { instance: InstanceId(instance), map: name.parse().unwrap() })
}

fn read_map(session: u64, instance: u64, name: &str) -> ToHelper {
    let (instance, map) = (InstanceId(instance), name.parse().unwrap());
    ask(session, Verb::ReadMap { instance, map, cursor: Bytes::default(), limit: 1 })
}

fn detach(session: u64, link: u64) -> ToHelper {
    ask(session, Verb::Detach { link: LinkId(link) })
}

fn unload(session: u64, instance: u64) -> ToHelper {
    ask(session, Verb::Unload { instance: InstanceId(instance) })
}

fn list(session: u64) -> ToHelper {
    ask(session, Verb::List)
}

/// Requests that the policy does not allow, for session 1 with instance 1 of `o`; with the class of the refusal and
/// the same request as a client makes it.
fn outside() -> Vec<(ToHelper, Class, &'static str, serde_json::Value)> {
    use Class::{Denied, Gone, Invalid};
    let target = |interface: &str| json!({"instance": 1, "program": "copy_globals", "target": {"interface": interface}});
    vec![
        (load(1, "absent", &[], &[]), Denied, "Load", json!({"object": "absent"})),
        (
            load(1, "other", &["on_egress"], &[]),
            Denied,
            "Load",
            json!({"object": "other", "programs": ["on_egress"]}),
        ),
        (load(1, "o", &[], &[("g_u16", 1)]), Denied, "Load", json!({"object": "o", "globals": {"g_u16": 1}})),
        (
            load(1, "o", &[], &[("g_u8", 10)]),
            Invalid,
            "Load",
            json!({"object": "o", "globals": {"g_u8": 10}}),
        ),
        (attach(1, 1, "copy_globals", "lo"), Denied, "Attach", target("lo")),
        (
            attach(1, 7, "copy_globals", "gate0"),
            Denied,
            "Attach",
            json!({"instance": 7, "program": "copy_globals"}),
        ),
        (map(1, 1, ".bss"), Denied, "Map", json!({"instance": 1, "name": ".bss"})),
        (map(1, 1, "absent"), Denied, "Map", json!({"instance": 1, "name": "absent"})),
        (read_map(1, 1, ".bss"), Denied, "ReadMap", json!({"instance": 1, "name": ".bss"})),
        (detach(1, 9), Denied, "Detach", json!({"link": 9})),
        (unload(1, 2), Gone, "Unload", json!({"instance": 2})),
    ]
}

#[test]
fn promise_02_broker_and_helper_come_to_the_same_answer() {
    needs_root!();
    let (gate, before, mut peer, client) = Peer::with_session();
    // Instance 1 stays; instance 2 was there.
    let mut raw = Raw::open(&gate, "app");
    for _ in 0..2 {
        assert!(matches!(peer.ask(&load(1, "o", &[], &[]), None).0, Outcome::Loaded { .. }));
        raw.load("o");
    }
    assert_eq!(peer.ask(&unload(1, 2), None).0, Outcome::Done);
    raw.done("Unload", &json!({"instance": 2}));
    for (request, class, method, parameters) in outside() {
        let refusal = peer.refused(&request, None);
        assert_eq!(refusal.class, class, "{request:?}: {refusal}");
        let line = refusal.line.map(|line| format!("{}:{line}", gate.policy_path("app").display()));
        raw.refused(method, &parameters, class.name());
        let record = gate.audit_of("app").pop().unwrap();
        let file = gate.policy_path("app").display().to_string();
        assert_eq!(record["by"], line.unwrap_or(file), "{method} {parameters}: {record}");
        assert_eq!(record["why"], refusal.why, "{method} {parameters}");
    }
    drop((peer, client, raw));
    gate.invariants(&before);
}

#[test]
fn promise_03_a_lying_broker_gets_nothing_outside_of_the_permit() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", POLICY);
    let before = gate.baseline();
    let mut peer = Peer::start(&gate, "app");
    let open = |id| ToHelper::Open { session: SessionId(id) };
    // Sockets that no client of the policy has connected: the broker's own, a file, a stranger's, one that came
    // through another door.
    let (pair, _other) = UnixStream::pair().unwrap();
    let null = File::open("/dev/null").unwrap();
    let (_stranger, of_stranger) = client_of(&gate, &STRANGER);
    let (_elsewhere, of_elsewhere) = connected(&gate, "another", &USER);
    for (id, socket) in (1..).zip([pair.as_fd(), null.as_fd(), of_stranger.as_fd(), of_elsewhere.as_fd()]) {
        assert_eq!(peer.refused(&open(id), Some(socket)).class, Class::Denied, "socket {id}");
        assert_eq!(peer.refused(&load(id, "o", &[], &[]), None).class, Class::Gone, "session {id}");
    }
    let (first, second) = (peer.session(&gate, 11, &USER), peer.session(&gate, 12, &USER));
    let (outcome, _) = peer.ask(&load(11, "o", &[], &[]), None);
    assert!(matches!(outcome, Outcome::Loaded { instance: InstanceId(1), .. }), "{outcome:?}");
    let (outcome, _) = peer.ask(&attach(11, 1, "copy_globals", "gate0"), None);
    assert!(matches!(outcome, Outcome::Attached { link: LinkId(1), .. }), "{outcome:?}");
    // Another session of the same user may look, and change nothing.
    assert!(matches!(peer.ask(&map(12, 1, "values"), None), (Outcome::Map(_), fds) if fds.len() == 1));
    for request in [attach(12, 1, "copy_globals", "gate0"), detach(12, 1), unload(12, 1)] {
        assert_eq!(peer.refused(&request, None).class, Class::Denied, "{request:?}");
    }
    // The broker says nothing of a client that has gone; the kernel does.
    assert_eq!(process::links(peer.pid()), 1);
    drop(first);
    assert!(wait_until(SOON, || process::links(peer.pid()) == 0), "the link outlives its session");
    assert_eq!(peer.refused(&load(11, "o", &[], &[]), None).class, Class::Gone);
    assert!(
        matches!(peer.ask(&load(12, "o", &[], &[]), None).0, Outcome::Loaded { .. }),
        "the other session goes on"
    );
    drop((peer, second));
    gate.invariants(&before);
}

/// What no honest broker sends: the helper ends without an answer and without having done anything.
#[test]
fn promise_03_a_broker_that_breaks_the_rules_loses_its_helper() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", POLICY);
    let before = gate.baseline();
    let null = File::open("/dev/null").unwrap();
    let fds = |count: usize| (0..count).map(|_| null.as_fd()).collect::<Vec<_>>();
    let listed = codec::encode(&list(1)).unwrap();
    let open = codec::encode(&ToHelper::Open { session: SessionId(2) }).unwrap();
    let load = codec::encode(&load(1, "o", &[], &[])).unwrap();
    let mut cases: BTreeMap<&str, (Vec<u8>, usize)> = BTreeMap::from([
        ("garbage", (vec![0xff; 64], 0)),
        ("a tag that does not exist", (u32::MAX.to_le_bytes().to_vec(), 0)),
        ("a byte too many", ([&listed[..], &[0]].concat(), 0)),
        ("a length that lies", ([&load[..12], &u64::MAX.to_le_bytes()].concat(), 0)),
        ("longer than a message", (vec![0; codec::MAX_MESSAGE + 1], 0)),
        ("a descriptor that does not belong", (listed.clone(), 1)),
        ("all the descriptors there can be", (listed.clone(), MAX_FDS)),
        ("Open without its socket", (open.clone(), 0)),
        ("Open with two sockets", (open, 2)),
        (
            "a session number used twice",
            (codec::encode(&ToHelper::Open { session: SessionId(1) }).unwrap(), 1),
        ),
        ("a session never opened", (codec::encode(&list(5)).unwrap(), 0)),
        (
            "Close of a session never opened",
            (codec::encode(&ToHelper::Close { session: SessionId(5) }).unwrap(), 0),
        ),
    ]);
    for cut in [1, 4, listed.len() - 1] {
        cases.insert(
            ["cut after 1", "cut after 4", "cut before the end"][cut.min(5) / 2],
            (listed[..cut].to_vec(), 0),
        );
    }
    for (name, (bytes, count)) in cases {
        let mut peer = Peer::start(&gate, "app");
        let _client = peer.session(&gate, 1, &USER);
        peer.channel.send_bytes(&bytes, &fds(count)).unwrap();
        assert!(peer.has_given_up(), "{name}: the helper goes on");
    }
    gate.invariants(&before);
}

#[test]
fn promise_03_a_policy_is_read_by_the_helper_itself() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", POLICY);
    let before = gate.baseline();
    let mut client = gate.session("app");
    // What stands in the file by now is not what this helper has read.
    gate.edit("app", &POLICY.replace("values = \"read-write\"", "values = \"none\""));
    let instance = client.load("o", &LoadOptions::default()).unwrap();
    assert_eq!(instance.maps.len(), 1);
    let [helper, ..] = gate.helper("app");
    gate.kill(&helper);
    drop((client, instance));
    // The next one has read what nobody has put in force: it serves nobody.
    let busy = || {
        let refused = gate.client(&USER).open("app").unwrap_err();
        matches!(&refused, Error::Busy(refusal) if refusal.message.contains("SIGHUP"))
    };
    assert!(wait_until(SOON, busy), "{}", gate.log());
    gate.reload();
    let mut client = gate.session("app");
    let instance = client.load("o", &LoadOptions::default()).unwrap();
    assert!(instance.maps.is_empty(), "the next helper has not read the new policy");
    drop((client, instance));
    gate.invariants(&before);
}
