//! Programs of tracing, and socket filters: from load to effect to detach.

use bpfgate_client::{LoadOptions, Map, RingBuffer, Target};
use bpfgate_tests::counting::{count, counts_while_attached, policy};
use bpfgate_tests::gate::INTERFACE;
use bpfgate_tests::{Gate, Raw, SOON, USER, as_user, needs_kernel, needs_root, sys, wait_until};
use serde_json::json;
use std::net::UdpSocket;
use std::process::Command;

/// A process that begins and ends.
fn run_something() {
    assert!(Command::new("true").status().unwrap().success());
}

/// Whether a program sees processes end that this test starts. Others end meanwhile, too: only the growth counts.
fn sees_ends(map: &Map) -> bool {
    let start = count(map, 0);
    run_something();
    wait_until(SOON / 4, || count(map, 0) > start)
}

#[test]
fn raw_tracepoints_with_and_without_the_kernels_types() {
    needs_root!();
    let gate = Gate::start();
    let hook = "[[objects.o.raw_tracepoint]]\nprogram = \"on_exit\"\nevents = [\"sched_process_exit\"]";
    let before = gate.baseline();
    for object in ["rawtp", "minimal_btf"] {
        let app = object.replace('_', "-");
        gate.policy(&app, &policy(object, "counts", hook));
        let mut client = gate.session(&app);
        let mut instance = client.load("o", &LoadOptions::default()).unwrap();
        let map = instance.take_map("counts").unwrap();
        assert!(!sees_ends(&map));
        let link = client.attach(instance.id, "on_exit", None, None).unwrap();
        assert_eq!(link.target, "sched_process_exit");
        assert!(sees_ends(&map), "{object}");
        client.detach(link.id).unwrap();
        assert!(wait_until(SOON, || !sees_ends(&map)), "{object} counts after it was detached");
        drop((client, instance, map));
        gate.invariants(&before);
    }
}

#[test]
fn a_tracepoint_writes_records_to_a_ring_buffer() {
    needs_root!();
    let gate = Gate::start();
    let hook = "[[objects.o.tracepoint]]\nprogram = \"on_exec\"\nevents = [\"sched:sched_process_exec\"]";
    gate.policy("app", &policy("tp", "events", hook));
    let before = gate.baseline();
    let mut client = gate.session("app");
    let mut instance = client.load("o", &LoadOptions::default()).unwrap();
    let map = instance.take_map("events").unwrap();
    as_user(&USER, || {
        let mut ring = RingBuffer::new(map).unwrap();
        // Detached and attached again: each attachment takes a perf event that was made at the start, and gives it back.
        for round in 0..6 {
            let target = Target::Event("sched:sched_process_exec".to_owned());
            let link = client.attach(instance.id, "on_exec", Some(&target), None).unwrap();
            let child = Command::new("true").spawn().unwrap();
            let pid = child.id();
            let mut child = child;
            child.wait().unwrap();
            let expected = [pid.to_ne_bytes(), USER.id.to_ne_bytes()].concat();
            let mut seen = false;
            let arrives = || {
                ring.consume(|record| seen |= record == expected).unwrap();
                seen
            };
            assert!(wait_until(SOON, arrives), "round {round}: no record of process {pid}");
            client.detach(link.id).unwrap();
            ring.consume(|_| ()).unwrap();
            Command::new("true").status().unwrap();
            assert_eq!(ring.consume(|_| ()).unwrap(), 0, "a record after the detach");
        }
    });
    drop((client, instance));
    gate.invariants(&before);
}

#[test]
fn uprobes_see_calls_and_returns_of_a_function() {
    needs_root!();
    needs_kernel!(6, 6, "a uprobe link");
    let gate = Gate::start();
    let binary = std::env::current_exe().unwrap().display().to_string();
    let hook = |program: &str, more: &str| {
        format!(
            "[[objects.o.uprobe]]\nprogram = \"{program}\"\nbinary = \"{binary}\"\nsymbols = [\"bpfgate_test_target\"]\n{more}\n"
        )
    };
    let hooks = hook("on_call", "") + &hook("on_return", "return = true");
    gate.policy("app", &policy("uprobe", "counts", &hooks));
    let before = gate.baseline();
    let mut client = gate.session("app");
    let mut instance = client.load("o", &LoadOptions::default()).unwrap();
    let map = instance.take_map("counts").unwrap();
    let symbol = "bpfgate_test_target".to_owned();
    let target = Target::Uprobe { binary, symbol };
    for (program, counter, argument, value) in [("on_call", 0, 1, 21), ("on_return", 2, 3, 42)] {
        let attach = (instance.id.0, program, Some(&target));
        counts_while_attached(&mut client, attach, (&map, counter), || {
            assert_eq!(sys::bpfgate_test_target(21), 42);
        });
        assert_eq!(count(&map, argument), value, "{program}");
    }
    drop((client, instance, map));
    gate.invariants(&before);
}

#[test]
fn a_socket_filter_is_attached_by_its_holder_and_by_nobody_else() {
    needs_root!();
    let gate = Gate::start();
    let hook = "[[objects.o.socket_filter]]\nprogram = \"keep_all\"\n";
    gate.policy("granted", &policy("sockfilter", "seen", &format!("{hook}program_fd = true")));
    gate.policy("plain", &policy("sockfilter", "seen", hook));
    let before = gate.baseline();
    let mut client = gate.session("granted");
    let mut instance = client.load("o", &LoadOptions::default()).unwrap();
    let program = instance.programs.pop().unwrap().fd.expect("the policy grants it");
    let map = instance.take_map("seen").unwrap();
    as_user(&USER, || {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        sys::attach_filter(&socket, &program).unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut buffer = [0; 16];
        for sent in 1..=3 {
            sender.send_to(b"whole", socket.local_addr().unwrap()).unwrap();
            assert_eq!(socket.recv(&mut buffer).unwrap(), 5, "the filter keeps packets whole");
            assert_eq!(count(&map, 0), sent);
        }
    });
    // There is no target to name, with the grant or without it.
    let mut raw = Raw::open(&gate, "plain");
    let (loaded, fds) = raw.done("Load", &json!({"object": "o"}));
    assert_eq!(fds.len(), 1, "the map, and no program without a grant");
    assert!(loaded["programs"][0].get("fd").is_none());
    raw.refused("Attach", &json!({"instance": loaded["instance"], "program": "keep_all"}), "Denied");
    let interface =
        json!({"instance": loaded["instance"], "program": "keep_all", "target": {"interface": INTERFACE}});
    raw.refused("Attach", &interface, "Denied");
    drop((client, instance, program, map, raw, fds));
    gate.invariants(&before);
}
