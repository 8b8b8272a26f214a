//! Calls in the wrong order, with parameters of the wrong type, or of another interface.

use bpfgate_protocol::INTERFACE;
use bpfgate_tests::raw::{Refused, frame};
use bpfgate_tests::{Gate, Raw, USER, needs_root};
use serde_json::json;

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

#[test]
fn open_comes_first_and_once() {
    needs_root!();
    let gate = gate();
    gate.policy("another", POLICY);
    let before = gate.baseline();
    let mut raw = Raw::connect(&gate, &USER);
    let early = [
        ("Load", json!({"object": "o"})),
        ("Attach", json!({"instance": 1, "program": "pass"})),
        ("Detach", json!({"link": 1})),
        ("Unload", json!({"instance": 1})),
        ("Map", json!({"instance": 1, "name": "counts"})),
        ("ReadMap", json!({"instance": 1, "name": "counts"})),
        ("List", json!({})),
    ];
    for (method, parameters) in early {
        let answer = raw.refused(method, &parameters, "Invalid");
        assert!(answer["message"].as_str().unwrap().contains("Open comes first"), "{answer}");
    }
    raw.done("Open", &json!({"app": "app"}));
    for app in ["app", "another", "unknown", "../app"] {
        raw.refused("Open", &json!({"app": app}), "Invalid");
    }
    raw.load("o");
    drop(raw);
    // The second of two at once comes when the first is still under way.
    let mut raw = Raw::connect(&gate, &USER);
    raw.send(&frame("Open", &json!({"app": "another"})).repeat(2)).unwrap();
    raw.reply().unwrap();
    assert_eq!(raw.reply().unwrap_err().error, "io.bpfgate.Invalid");
    drop(raw);
    gate.invariants(&before);
}

#[test]
fn parameters_of_another_type_or_range_are_invalid() {
    needs_root!();
    let gate = gate();
    let before = gate.baseline();
    let mut raw = Raw::open(&gate, "app");
    let instance = raw.load("o");
    let long = "x".repeat(5000);
    let cases = [
        ("Open", json!({})),
        ("Open", json!({"app": 1})),
        ("Load", json!({"object": null})),
        ("Load", json!({"object": ["o"]})),
        ("Load", json!({"object": ""})),
        ("Load", json!({"object": long})),
        ("Load", json!({"object": "o\u{0}"})),
        ("Load", json!({"object": "../o"})),
        ("Load", json!({"object": "o", "programs": "pass"})),
        ("Load", json!({"object": "o", "programs": ["pass", "pass"]})),
        ("Load", json!({"object": "o", "programs": ["pa ss"]})),
        ("Load", json!({"object": "o", "program": "pass"})),
        ("Load", json!({"object": "o", "globals": []})),
        ("Attach", json!({"instance": "1", "program": "pass"})),
        ("Attach", json!({"instance": instance, "program": "pass", "target": "gate0"})),
        (
            "Attach",
            json!({"instance": instance, "program": "pass", "target": {"interface": "gate0", "event": "x"}}),
        ),
        ("Attach", json!({"instance": instance, "program": "pass", "target": {"binary": "/bin/sh"}})),
        (
            "Attach",
            json!({"instance": instance, "program": "pass", "target": {"interface": "sixteencharacter"}}),
        ),
        ("Attach", json!({"instance": instance, "program": "pass", "target": {"interface": "a/b"}})),
        ("Attach", json!({"instance": instance, "program": "pass", "hook": "nonsense"})),
        ("Detach", json!({"link": -1})),
        ("Detach", json!({"link": 1.5})),
        ("Unload", json!({"instance": 1e30})),
        ("Unload", json!({})),
        ("Map", json!({"instance": instance, "name": {}})),
        ("ReadMap", json!({"instance": instance, "name": "counts", "limit": 0})),
        ("ReadMap", json!({"instance": instance, "name": "counts", "limit": 257})),
        ("ReadMap", json!({"instance": instance, "name": "counts", "cursor": "0"})),
        ("ReadMap", json!({"instance": instance, "name": "counts", "cursor": "zz"})),
        ("ReadMap", json!({"instance": instance, "name": "counts", "cursor": "00"})),
        ("List", json!({"all": true})),
    ];
    for (method, parameters) in cases {
        let answer = raw.refused(method, &parameters, "Invalid");
        let message = answer["message"].as_str().unwrap();
        assert!(message.len() > 10 && message.len() < 400, "{method} {parameters}: {message}");
    }
    // Whatever it was, the session goes on.
    raw.done("Unload", &json!({"instance": instance}));
    drop(raw);
    gate.invariants(&before);
}

/// A derived reader of a structure takes an array of its fields, too: their order is nobody's interface.
#[test]
fn an_array_is_neither_a_call_nor_parameters() {
    needs_root!();
    let gate = gate();
    let before = gate.baseline();
    let mut raw = Raw::open(&gate, "app");
    let instance = raw.load("o");
    let target = json!(["gate0", null, null, null, null]);
    for (method, parameters) in [
        ("List", json!([])),
        ("Map", json!([instance, "counts"])),
        ("Attach", json!({"instance": instance, "program": "pass", "target": target})),
    ] {
        raw.refused(method, &parameters, "Invalid");
    }
    raw.send(b"[\"org.varlink.service.GetInfo\",null,false,false,false]\0").unwrap();
    assert_eq!(raw.reply().unwrap_err().error, "io.bpfgate.Invalid");
    drop(raw);
    gate.invariants(&before);
}

#[test]
fn the_service_describes_itself_and_what_it_does_not_know_has_a_standard_error() {
    needs_root!();
    let gate = gate();
    let before = gate.baseline();
    let mut raw = Raw::connect(&gate, &USER);
    let (info, _) = raw.done("org.varlink.service.GetInfo", &json!({}));
    assert_eq!(info["interfaces"], json!(["io.bpfgate", "org.varlink.service"]));
    let description = "org.varlink.service.GetInterfaceDescription";
    let (reply, _) = raw.done(description, &json!({"interface": "io.bpfgate"}));
    assert_eq!(reply["description"], INTERFACE);
    let (reply, _) = raw.done(description, &json!({"interface": "org.varlink.service"}));
    assert!(reply["description"].as_str().unwrap().starts_with("interface org.varlink.service\n"));
    let cases = [
        (
            description,
            json!({"interface": "io.other"}),
            "InterfaceNotFound",
            json!({"interface": "io.other"}),
        ),
        ("io.other.List", json!({}), "InterfaceNotFound", json!({"interface": "io.other"})),
        ("io.bpfgate.", json!({}), "MethodNotFound", json!({"method": "io.bpfgate."})),
        ("io.bpfgate.open", json!({"app": "app"}), "MethodNotFound", json!({"method": "io.bpfgate.open"})),
        (
            "org.varlink.service.Nope",
            json!({}),
            "MethodNotFound",
            json!({"method": "org.varlink.service.Nope"}),
        ),
    ];
    for (method, parameters, error, expected) in cases {
        let Err(Refused { error: found, parameters }) = raw.call(method, &parameters) else {
            panic!("{method}")
        };
        assert_eq!((found, parameters), (format!("org.varlink.service.{error}"), expected), "{method}");
    }
    // A call that wants no answer gets none, whatever it comes to.
    for method in ["io.bpfgate.List", "io.bpfgate.Nope", "org.varlink.service.GetInfo"] {
        raw.send(&[json!({"method": method, "oneway": true}).to_string().as_bytes(), &[0]].concat()).unwrap();
    }
    raw.refused("List", &json!({}), "Invalid");
    drop(raw);
    gate.invariants(&before);
}
