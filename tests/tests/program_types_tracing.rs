//! Programs of tracing, and socket filters: from load to effect to detach.

use bpfgate_client::{LoadOptions, Map, RingBuffer, Target};
use bpfgate_tests::counting::{count, counts_while_attached, policy};
use bpfgate_tests::gate::INTERFACE;
use bpfgate_tests::gate::bpf_object;
use bpfgate_tests::{Gate, Raw, SOON, USER, as_user, needs_kernel, needs_root, sys, wait_until};
use libbpf_rs::ObjectBuilder;
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

/// The kernel's function that the programs of `traced` are for.
const TRACED: &str = "cap_capable";

/// Whether root itself can load and attach this program of `traced` here; says so if not, in the kernel's words.
fn kernel_can(program: &str) -> bool {
    let attempt = || {
        let mut object = ObjectBuilder::default().open_file(bpf_object("traced"))?;
        for mut one in object.progs_mut() {
            let wanted = one.name() == program;
            one.set_autoload(wanted);
            if wanted && !program.starts_with("on_probe") {
                one.set_attach_target(0, Some(TRACED.to_owned()))?;
            }
        }
        let object = object.load()?;
        // What it counts is nobody's: the process 0.
        let Some(one) = object.progs_mut().find(|one| one.name() == program) else { return Ok(()) };
        if program.starts_with("on_probe") {
            one.attach_kprobe_multi(false, vec![TRACED]).map(drop)
        } else {
            one.attach_trace().map(drop)
        }
    };
    let outcome: libbpf_rs::Result<()> = attempt();
    if let Err(error) = &outcome {
        println!("skipped: this kernel does not let root attach {program} to {TRACED}: {error:#}");
    }
    outcome.is_ok()
}

/// The kernel asks whether this process has CAP_SETPCAP, before it sees that there is no capability 4000.
fn ask_for_a_capability() {
    sys::drop_bounding(4000).expect_err("there is no such capability");
}

/// A policy for programs of `traced`; hooks and their programs.
fn traced(hooks: &[(&str, &str, &str)]) -> String {
    let rule = |(hook, program, more): &(&str, &str, &str)| {
        let key =
            if *hook == "kprobe" { "functions = [\"cap_capable\"]" } else { "function = \"cap_capable\"" };
        format!("[[objects.o.{hook}]]\nprogram = \"{program}\"\n{key}\n{more}\n")
    };
    let globals = "[objects.o.globals]\nonly = { min = 0, max = 4294967295 }\n";
    policy("traced", "counts", &hooks.iter().map(rule).collect::<String>()) + globals
}

/// A load in which the programs count what this process does.
fn ours() -> LoadOptions {
    let globals = [("only".to_owned(), i64::from(std::process::id()))].into();
    LoadOptions { globals, ..Default::default() }
}

#[test]
fn fentry_and_fexit_see_calls_and_returns_of_the_function_that_the_policy_names() {
    needs_root!();
    if !kernel_can("on_call") {
        return;
    }
    let gate = Gate::start();
    gate.policy("app", &traced(&[("fentry", "on_call", ""), ("fexit", "on_return", "")]));
    let before = gate.baseline();
    let mut client = gate.session("app");
    let mut instance = client.load("o", &ours()).unwrap();
    let map = instance.take_map("counts").unwrap();
    let target = Target::Function(TRACED.to_owned());
    for (program, counter, named) in [("on_call", 0, Some(&target)), ("on_return", 1, None)] {
        counts_while_attached(
            &mut client,
            (instance.id.0, program, named),
            (&map, counter),
            ask_for_a_capability,
        );
    }
    assert_eq!(count(&map, 4), 1, "root has the capability: 0 was returned");
    // The section of on_call says vfs_read, which is not in the policy.
    let error = client.attach(instance.id, "on_call", Some(&Target::Function("vfs_read".into())), None);
    assert!(matches!(error, Err(bpfgate_client::Error::Denied(_))), "{error:?}");
    drop((client, instance, map));
    gate.invariants(&before);
}

/// A program is bound to its function when it is loaded: under a policy for another one it must go.
#[test]
fn a_program_for_another_function_does_not_stay() {
    needs_root!();
    if !kernel_can("on_call") {
        return;
    }
    let gate = Gate::start();
    // Known from the start, so that the changed policy is adopted in place.
    let both = |function: &str| {
        traced(&[("fentry", "on_call", ""), ("fexit", "on_return", "")]).replacen(
            "\"cap_capable\"",
            &format!("\"{function}\""),
            1,
        ) + "[objects.o.helpers]\nkfuncs = [\"vfs_read\"]\n"
    };
    gate.policy("app", &both(TRACED));
    let before = gate.baseline();
    let mut client = gate.session("app");
    let [helper, ..] = gate.helper("app");
    let mut instance = client.load("o", &ours()).unwrap();
    let map = instance.take_map("counts").unwrap();
    client.attach(instance.id, "on_call", None, None).unwrap();
    ask_for_a_capability();
    assert!(count(&map, 0) > 0);
    gate.policy("app", &both("vfs_read"));
    assert!(helper.is_alive(), "the policy was to be adopted in place");
    let seen = count(&map, 0);
    let error = client.attach(instance.id, "on_call", None, None).expect_err("it is for another function");
    assert!(error.to_string().contains("was not loaded"), "{error}");
    ask_for_a_capability();
    assert!(
        wait_until(SOON, || {
            let start = count(&map, 0);
            ask_for_a_capability();
            count(&map, 0) == start
        }),
        "it counts after its policy has gone: {seen}"
    );
    drop((client, instance, map));
    gate.invariants(&before);
}

#[test]
fn kprobes_see_calls_and_returns_of_functions_of_the_kernel() {
    needs_root!();
    if !kernel_can("on_probe") {
        return;
    }
    let gate = Gate::start();
    let hooks = [("kprobe", "on_probe", ""), ("kprobe", "on_probe_return", "return = true")];
    gate.policy("app", &traced(&hooks));
    let before = gate.baseline();
    let mut client = gate.session("app");
    let mut instance = client.load("o", &ours()).unwrap();
    let map = instance.take_map("counts").unwrap();
    let target = Target::Function(TRACED.to_owned());
    for (program, counter) in [("on_probe", 2), ("on_probe_return", 3)] {
        counts_while_attached(
            &mut client,
            (instance.id.0, program, Some(&target)),
            (&map, counter),
            ask_for_a_capability,
        );
    }
    drop((client, instance, map));
    gate.invariants(&before);
}

/// On every kernel, also on one that refuses such programs: what the kernel does not have is refused before it is asked.
#[test]
fn a_function_that_the_kernel_does_not_have_is_refused_by_the_line_that_names_it() {
    needs_root!();
    let gate = Gate::start();
    let before = gate.baseline();
    let text = traced(&[("fexit", "on_return", "")]).replace(TRACED, "no_such_function");
    gate.policy("app", &text);
    let mut raw = Raw::open(&gate, "app");
    let parameters = raw.refused("Load", &json!({"object": "o"}), "Unsupported");
    let message = parameters["message"].as_str().unwrap();
    assert!(message.contains("this kernel has no function no_such_function"), "{message}");
    let record = gate.audit_of("app").pop().unwrap();
    assert!(record["by"].as_str().unwrap().ends_with("app.toml:9"), "{record}");
    drop(raw);
    gate.invariants(&before);
}
