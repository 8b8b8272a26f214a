//! Promises 9 and 10: whatever is killed whenever, nothing is left in the kernel, and the rest goes on.

use bpfgate_client::{Error, LoadOptions};
use bpfgate_tests::process::{self, Process};
use bpfgate_tests::{Gate, Raw, SOON, needs_root, wait_until};
use serde_json::json;
use std::collections::BTreeSet;
use std::time::Duration;

const POLICY: &str = r#"
{client}
[objects.o]
{object:minimal}
[[objects.o.xdp]]
program = "pass"
interfaces = ["{interface}"]
[objects.o.maps]
counts = "frozen"
[objects.huge]
{object:huge}
[[objects.huge.xdp]]
program = "huge"
interfaces = ["{interface}"]
"#;

/// A session with something loaded and attached; it holds no descriptor itself.
fn busy(gate: &Gate) -> Raw {
    let mut raw = Raw::open(gate, "app");
    let instance = raw.load("o");
    raw.done("Attach", &json!({"instance": instance, "program": "pass"}));
    raw
}

#[test]
fn promise_10_a_helper_that_is_killed_takes_everything_of_its_app_with_it() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", POLICY);
    let before = gate.baseline();
    let mut raw = busy(&gate);
    let [helper, ..] = gate.helper("app");
    assert_eq!(process::links(helper.pid), 1);
    gate.kill(&helper);
    assert_eq!(gate.left_in_kernel(&before, SOON), BTreeSet::new());
    raw.is_closed_after(0);
    gate.invariants(&before);
    // The next one is started when it is asked for.
    let next = busy(&gate);
    assert_ne!(gate.helper("app")[0], helper);
    drop(next);
    gate.invariants(&before);
}

/// A load that takes the verifier long enough to be in the middle of it: the client has not got its answer yet.
fn mid_load(gate: &Gate, victim: usize) -> Raw {
    let mut raw = Raw::open(gate, "app");
    raw.load("o");
    let victim = gate.helper("app")[victim].clone();
    raw.ask("Load", &json!({"object": "huge"}));
    let busy = |process: &Process| process::number(process.pid, "VmRSS") > 6_000;
    // The worker has the object in its memory, so the helper is about to be asked or is loading it.
    let [_, _, worker] = gate.helper("app");
    wait_until(SOON, || busy(&worker));
    gate.kill(&victim);
    raw
}

#[test]
fn promise_10_a_helper_that_is_killed_mid_request_is_answered_for() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", POLICY);
    let before = gate.baseline();
    let mut raw = mid_load(&gate, 0);
    match raw.reply() {
        Err(refused) => assert_eq!(refused.error, "io.bpfgate.Helper"),
        Ok((reply, _)) => panic!("the load was done: {reply}"),
    }
    raw.is_closed_after(0);
    assert_eq!(gate.audit_of("app").last().unwrap()["verdict"], "Helper");
    gate.invariants(&before);
}

#[test]
fn promise_10_a_worker_that_is_killed_mid_load_costs_that_load_only() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", POLICY);
    let before = gate.baseline();
    let mut raw = mid_load(&gate, 2);
    match raw.reply() {
        Err(refused) => assert_eq!(refused.error, "io.bpfgate.Helper", "{refused:?}"),
        Ok((reply, _)) => panic!("the load was done: {reply}"),
    }
    // The session and what it had goes on, and so does loading.
    assert_eq!(raw.done("List", &json!({})).0["instances"].as_array().unwrap().len(), 1);
    raw.load("huge");
    drop(raw);
    gate.invariants(&before);
}

#[test]
fn promise_10_a_loader_that_is_killed_costs_loads_until_the_next_helper() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", POLICY);
    let before = gate.baseline();
    let mut raw = busy(&gate);
    let [_, loader, worker] = gate.helper("app");
    gate.kill(&loader);
    assert!(wait_until(SOON, || !worker.is_alive()), "the worker outlives its parent");
    // What is attached goes on; what is not possible any more says so.
    assert_eq!(raw.done("List", &json!({})).0["instances"][0]["links"].as_array().unwrap().len(), 1);
    let message = raw.refused("Load", &json!({"object": "o"}), "Helper");
    assert!(message["message"].as_str().unwrap().contains("loader"), "{message}");
    drop(raw);
    gate.invariants(&before);
    drop(busy(&gate));
    gate.invariants(&before);
}

#[test]
fn promise_10_an_object_that_crashes_libbpf_costs_that_load_only() {
    needs_root!();
    let gate = Gate::start();
    let crash = "[objects.crash]\n{object:structops_map}\n[[objects.crash.xdp]]\nprogram = \"touch_ops\"\ninterfaces = [\"lo\"]\n";
    gate.policy("app", &(POLICY.to_owned() + crash));
    let before = gate.baseline();
    let mut raw = busy(&gate);
    for _ in 0..3 {
        raw.refused("Load", &json!({"object": "crash"}), "Object");
        let instance = raw.load("o");
        raw.done("Unload", &json!({"instance": instance}));
    }
    drop(raw);
    gate.invariants(&before);
}

#[test]
fn promise_09_a_broker_that_is_killed_loses_nothing_but_its_sessions() {
    needs_root!();
    for loading in [false, true] {
        let mut gate = Gate::start();
        gate.policy("app", POLICY);
        let before = gate.baseline();
        let mut raw = busy(&gate);
        if loading {
            raw.ask("Load", &json!({"object": "huge"}));
        }
        gate.kill_broker();
        assert!(wait_until(2 * SOON, || gate.is_over()), "these outlive the broker: {:?}", gate.processes());
        assert_eq!(gate.left_in_kernel(&before, SOON), BTreeSet::new());
        raw.is_closed_after(0);
    }
}

#[test]
fn promise_10_a_client_that_goes_away_mid_load_leaves_nothing() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", POLICY);
    let before = gate.baseline();
    for wait in [0, 1, 5, 20, 60] {
        let mut raw = Raw::open(&gate, "app");
        raw.ask("Load", &json!({"object": "huge"}));
        // Wherever the load is by then.
        std::thread::sleep(Duration::from_millis(wait));
        drop(raw);
    }
    // The helper comes to an end with them, one after the other.
    assert_eq!(gate.left_in_kernel(&before, 10 * SOON), BTreeSet::new());
    gate.invariants(&before);
}

#[test]
fn promise_10_a_hundred_loads_and_sessions_leave_nothing_and_cost_no_memory() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", POLICY);
    let before = gate.baseline();
    let cycle = || {
        let mut client = gate.session("app");
        for _ in 0..10 {
            let instance = client.load("o", &LoadOptions::default()).unwrap();
            client.attach(instance.id, "pass", None, None).unwrap();
            let again = client.attach(instance.id, "pass", None, None);
            assert!(matches!(again, Err(Error::Invalid(_))));
            client.unload(instance.id).unwrap();
        }
    };
    let memory = || {
        let [helper, _, worker] = gate.helper("app");
        [gate.broker.pid, helper.pid, worker.pid].map(|pid| process::number(pid, "VmRSS"))
    };
    cycle();
    cycle();
    let at_first = memory();
    for _ in 0..10 {
        cycle();
    }
    let at_last = memory();
    for (first, last) in at_first.into_iter().zip(at_last) {
        assert!(last < first + 512, "from {at_first:?} kB to {at_last:?} kB");
    }
    gate.invariants(&before);
}
