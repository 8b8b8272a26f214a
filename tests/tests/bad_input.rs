//! Requests that the policy does not allow, or that come too late: each has its error and changes nothing.

use bpfgate_tests::process;
use bpfgate_tests::raw::frame;
use bpfgate_tests::{Gate, Raw, Who, needs_root};
use serde_json::{Value, json};

const POLICY: &str = r#"
{client}
[[client]]
user = 12399
maps = ["values"]
may = ["maps"]
[objects.o]
{object:globals}
[[objects.o.xdp]]
program = "copy_globals"
interfaces = ["{interface}", "absent*"]
[objects.o.maps]
values = "read-write"
[objects.o.globals]
g_u8 = { min = 0, max = 1000 }
g_u16 = { min = 0, max = 60 }
g_s32 = { min = -5000000000, max = 7 }
g_u64 = { min = -1, max = 9223372036854775807 }
g_pair = { min = 0, max = 1 }
g_absent = { min = 0, max = 1 }
runs = { min = 0, max = 1 }
[objects.pass]
{object:minimal}
[[objects.pass.xdp]]
program = "pass"
interfaces = ["{interface}"]
"#;

/// May read maps and nothing else.
const READER: Who = Who::new(12_399);

fn gate() -> Gate {
    let gate = Gate::start();
    gate.policy("app", POLICY);
    gate
}

fn message(parameters: &Value) -> &str {
    parameters["message"].as_str().expect("an error has a sentence")
}

#[test]
fn a_client_has_the_rights_of_its_entry_only() {
    needs_root!();
    let gate = gate();
    let before = gate.baseline();
    let mut user = Raw::open(&gate, "app");
    let instance = user.load("o");
    let (reply, _) = user.done(
        "Attach",
        &json!({"instance": instance, "program": "copy_globals", "target": {"interface": "gate0"}}),
    );
    let mut reader = Raw::connect(&gate, &READER);
    reader.done("Open", &json!({"app": "app"}));
    for (method, parameters) in [
        ("Load", json!({"object": "o"})),
        ("Attach", json!({"instance": instance, "program": "copy_globals"})),
        ("Detach", json!({"link": reply["link"]})),
        ("Unload", json!({"instance": instance})),
        ("Map", json!({"instance": instance, "name": ".bss"})),
    ] {
        reader.refused(method, &parameters, "Denied");
    }
    assert_eq!(reader.done("Map", &json!({"instance": instance, "name": "values"})).1.len(), 1);
    drop((user, reader));
    gate.invariants(&before);
}

#[test]
fn programs_and_objects_that_the_policy_does_not_list_are_denied() {
    needs_root!();
    let gate = gate();
    let before = gate.baseline();
    let mut raw = Raw::open(&gate, "app");
    for parameters in [
        json!({"object": "absent"}),
        json!({"object": "o", "programs": ["absent"]}),
        json!({"object": "o", "programs": ["copy_globals", "pass"]}),
    ] {
        raw.refused("Load", &parameters, "Denied");
    }
    let instance = raw.load("o");
    let lo = json!({"interface": "lo"});
    for parameters in [
        json!({"instance": instance, "program": "pass"}),
        json!({"instance": instance, "program": "copy_globals", "hook": "tcx", "target": lo}),
        json!({"instance": instance, "program": "copy_globals", "target": {"event": "sched:sched_switch"}}),
    ] {
        raw.refused("Attach", &parameters, "Denied");
    }
    drop(raw);
    gate.invariants(&before);
}

#[test]
fn a_global_is_set_within_its_range_and_size_or_not_at_all() {
    needs_root!();
    let gate = gate();
    let before = gate.baseline();
    let mut raw = Raw::open(&gate, "app");
    for (globals, error, word) in [
        (json!({"g_u32": 1}), "Denied", ""),
        (json!({"nowhere": 1}), "Denied", ""),
        (json!({"g_absent": 1}), "Object", "g_absent"),
        // In .bss: not a constant.
        (json!({"runs": 1}), "Object", "runs"),
        (json!({"g_u16": 61}), "Invalid", "0 to 60"),
        (json!({"g_u16": -1}), "Invalid", "0 to 60"),
        (json!({"g_u16": 1, "g_u8": 1001}), "Invalid", "0 to 1000"),
        // Within the range of the policy, which is wider than the variable.
        (json!({"g_u8": 256}), "Invalid", "1 byte"),
        (json!({"g_s32": -2_147_483_649_i64}), "Invalid", "4 bytes"),
        (json!({"g_u64": u64::MAX}), "Invalid", "9223372036854775807"),
        (json!({"g_pair": 1}), "Object", "16 bytes"),
        (json!({"g_u8": "1"}), "Invalid", ""),
        (json!({"g_u8": 1.0}), "Invalid", ""),
        (json!({"g_u8": null}), "Invalid", ""),
        (json!({"g u8": 1}), "Invalid", ""),
    ] {
        let answer = raw.refused("Load", &json!({"object": "o", "globals": globals}), error);
        assert!(message(&answer).contains(word), "{globals}: {answer}");
    }
    // The same one twice, which no object of ours can be.
    let twice = frame("Load", &json!({"object": "o", "globals": {"g_u8": 1}}));
    raw.send(String::from_utf8(twice).unwrap().replace("\"g_u8\":1", "\"g_u8\":1,\"g_u8\":2").as_bytes())
        .unwrap();
    assert_eq!(raw.reply().unwrap_err().error, "io.bpfgate.Invalid");
    assert_eq!(raw.done("List", &json!({})).0["instances"], json!([]), "something was loaded");
    drop(raw);
    gate.invariants(&before);
}

#[test]
fn the_ends_of_a_range_reach_the_program() {
    needs_root!();
    let gate = gate();
    let before = gate.baseline();
    let mut client = gate.session("app");
    let globals = [("g_u8", 255), ("g_u16", 0), ("g_s32", -2_147_483_648), ("g_u64", i64::MAX)];
    let options = bpfgate_client::LoadOptions {
        globals: globals.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect(),
        ..Default::default()
    };
    let mut instance = client.load("o", &options).unwrap();
    let target = bpfgate_client::Target::Interface("gate0".to_owned());
    client.attach(instance.id, "copy_globals", Some(&target), None).unwrap();
    let values = instance.take_map("values").unwrap();
    let mut seen = Vec::new();
    let has_run = || {
        gate.send_packets(1);
        let bytes = values.lookup(&[0; 4]).unwrap().unwrap();
        seen = bytes.chunks(8).map(|word| i64::from_ne_bytes(word.try_into().unwrap())).collect();
        seen[7] > 0
    };
    assert!(bpfgate_tests::wait_until(bpfgate_tests::SOON, has_run), "the program does not run");
    // g_u32 was not set, g_pair neither.
    assert_eq!(seen[..7], [255, 0, 3, i64::MAX, -2_147_483_648, 6, 7]);
    drop((client, instance, values));
    gate.invariants(&before);
}

#[test]
fn an_interface_that_is_missing_or_not_in_the_policy() {
    needs_root!();
    let gate = gate();
    let before = gate.baseline();
    let mut raw = Raw::open(&gate, "app");
    let instance = raw.load("o");
    let program = json!({"instance": instance, "program": "copy_globals"});
    let attach = |interface: &str| {
        let mut parameters = program.clone();
        parameters["target"] = json!({"interface": interface});
        parameters
    };
    // The policy allows it, the kernel has none.
    let answer = raw.refused("Attach", &attach("absent0"), "Kernel");
    assert_eq!((&answer["call"], &answer["errno"]), (&json!("SIOCGIFINDEX"), &json!(19)), "{answer}");
    assert!(message(&answer).contains("absent0"), "{answer}");
    // It is there, or not: the same answer.
    let there = raw.refused("Attach", &attach("lo"), "Denied");
    let not_there = raw.refused("Attach", &attach("nowhere0"), "Denied");
    assert_eq!(message(&there), message(&not_there));
    // `*` is a letter like others in the name of an interface: what a client sends is no pattern.
    raw.refused("Attach", &attach("absent*"), "Kernel");
    raw.refused("Attach", &attach("gate?"), "Denied");
    for interface in ["", ".", "..", "a b", "a/b", "a:b", "0123456789abcdef"] {
        raw.refused("Attach", &attach(interface), "Invalid");
    }
    // No target at all is right only if there is just one.
    raw.refused("Attach", &program, "Invalid");
    assert_eq!(process::links(gate.helper("app")[0].pid), 0, "something was attached");
    drop(raw);
    gate.invariants(&before);
}

#[test]
fn attaching_twice_and_what_another_holds() {
    needs_root!();
    let gate = gate();
    let before = gate.baseline();
    let mut raw = Raw::open(&gate, "app");
    let instance = raw.load("pass");
    let attach = |instance: u64| json!({"instance": instance, "program": "pass"});
    let (reply, _) = raw.done("Attach", &attach(instance));
    let link = reply["link"].as_u64().unwrap();
    for _ in 0..2 {
        let answer = raw.refused("Attach", &attach(instance), "Invalid");
        assert!(message(&answer).contains(&format!("as link {link}")), "{answer}");
    }
    // Another program at the same interface is what the kernel decides on: an interface has one XDP link.
    let second = raw.load("pass");
    let answer = raw.refused("Attach", &attach(second), "Kernel");
    assert_eq!((&answer["call"], &answer["errno"]), (&json!("BPF_LINK_CREATE"), &json!(16)), "{answer}");
    assert_eq!(process::links(gate.helper("app")[0].pid), 1);
    // Another session of the same user may not touch it.
    let mut other = Raw::open(&gate, "app");
    other.refused("Detach", &json!({"link": link}), "Denied");
    other.refused("Attach", &attach(second), "Denied");
    other.refused("Unload", &json!({"instance": second}), "Denied");
    raw.done("Detach", &json!({"link": link}));
    raw.done("Attach", &attach(second));
    drop((raw, other));
    gate.invariants(&before);
}

#[test]
fn what_is_gone_is_gone_and_what_never_was_is_denied() {
    needs_root!();
    let gate = gate();
    let before = gate.baseline();
    let mut raw = Raw::open(&gate, "app");
    let instance = raw.load("pass");
    let (first, _) = raw.done("Attach", &json!({"instance": instance, "program": "pass"}));
    raw.done("Detach", &json!({"link": first["link"]}));
    for _ in 0..2 {
        let answer = raw.refused("Detach", &json!({"link": first["link"]}), "Gone");
        assert!(message(&answer).contains("detached"), "{answer}");
    }
    let (second, _) = raw.done("Attach", &json!({"instance": instance, "program": "pass"}));
    assert_ne!(second["link"], first["link"], "the number of a link is used again");
    raw.done("Unload", &json!({"instance": instance}));
    for (method, parameters) in [
        // The unload took it down.
        ("Detach", json!({"link": second["link"]})),
        ("Unload", json!({"instance": instance})),
        ("Attach", json!({"instance": instance, "program": "pass"})),
    ] {
        raw.refused(method, &parameters, "Gone");
    }
    for number in [0, 999_999, u64::MAX] {
        raw.refused("Detach", &json!({"link": number}), "Denied");
        raw.refused("Unload", &json!({"instance": number}), "Denied");
        raw.refused("Attach", &json!({"instance": number, "program": "pass"}), "Denied");
        raw.refused("Map", &json!({"instance": number, "name": "values"}), "Denied");
        raw.refused("ReadMap", &json!({"instance": number, "name": "values"}), "Denied");
    }
    assert_ne!(raw.load("pass"), instance, "the number of an instance is used again");
    // A map of an instance that is gone.
    let other = raw.load("o");
    raw.done("Unload", &json!({"instance": other}));
    raw.refused("Map", &json!({"instance": other, "name": "values"}), "Gone");
    raw.refused("ReadMap", &json!({"instance": other, "name": "values"}), "Gone");
    drop(raw);
    gate.invariants(&before);
}
