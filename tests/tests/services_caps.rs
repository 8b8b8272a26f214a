//! Services: what `bpfgate caps` and `bpfgate doctor` say of the units, under the service manager.

use bpfgate_tests::counting::policy;
use bpfgate_tests::services;
use bpfgate_tests::services::{DropIn, bpfgate, helper, main_process, said};
use serde_json::{Value, json};

const APP: &str = "caps-app";

/// Needs `CAP_NET_ADMIN` and `CAP_BPF`.
fn xdp() -> String {
    policy(
        "minimal",
        "counts",
        "[[objects.o.xdp]]\nprogram = \"pass\"\ninterfaces = [\"lo\"]\nmode = \"generic\"",
    )
}

/// What a command says as JSON, and its exit code.
fn asked(words: &[&str]) -> (Value, Option<i32>) {
    let output = bpfgate(words);
    let value = serde_json::from_slice(&output.stdout);
    (value.unwrap_or_else(|error| panic!("{words:?}: {error}: {}", said(&output))), output.status.code())
}

/// The processes of a unit, by role.
fn shown(unit: &str) -> Vec<(String, Value)> {
    let (all, code) = asked(&["caps", "show", unit, "--json"]);
    assert_eq!(code, Some(0), "{all}");
    let role = |process: &Value| process["role"].as_str().unwrap_or_default().to_owned();
    all.as_array().unwrap().iter().map(|process| (role(process), process["threads"][0].clone())).collect()
}

#[test]
fn processes_of_the_units_hold_what_is_promised() {
    let services = services!();
    services.apply_policy(APP, &xdp());
    let client = services.session(APP);
    let (none, needed) = (json!([]), json!(["CAP_NET_ADMIN", "CAP_BPF"]));
    let broker = shown("bpfgate.service");
    assert_eq!(broker.iter().map(|(role, _)| role.as_str()).collect::<Vec<_>>(), ["broker"]);
    for set in ["permitted", "effective", "inheritable", "bounding", "ambient"] {
        assert_eq!(broker[0].1[set], none, "{set}");
    }
    let all = shown(&helper(APP));
    assert_eq!(all.len(), 3, "{all:?}");
    for (role, thread) in all {
        let held = if role == "helper" { &needed } else { &none };
        assert_eq!((&thread["permitted"], &thread["effective"]), (held, held), "{role}");
        // Nobody of them may empty it; the unit has.
        assert_eq!(thread["bounding"], needed, "{role}");
        assert_eq!((&thread["inheritable"], &thread["ambient"]), (&none, &none), "{role}");
    }
    drop(client);
}

#[test]
fn a_unit_is_compared_as_the_manager_has_it() {
    let services = services!();
    services.apply_policy(APP, &xdp());
    let unit = helper(APP);
    let (value, code) = asked(&["caps", "delta", APP, "--check", "--json"]);
    assert_eq!((code, &value["granted"]["by"]["source"]), (Some(0), &json!("systemctl show")), "{value}");
    assert_eq!((&value["missing"], &value["unused"]), (&json!([]), &json!([])), "{value}");
    // One too many and one too few.
    let sets = "CAP_BPF CAP_SYS_PTRACE";
    let text = format!(
        "[Service]\nCapabilityBoundingSet=\nCapabilityBoundingSet={sets}\nAmbientCapabilities=\nAmbientCapabilities={sets}\n"
    );
    let drop_in = DropIn::new(&unit, &text);
    let (value, code) = asked(&["caps", "delta", APP, "--check", "--json"]);
    assert_eq!(code, Some(1), "{value}");
    assert_eq!(value["missing"][0]["capability"], "CAP_NET_ADMIN", "{value}");
    assert_eq!(value["unused"][0]["capability"], "CAP_SYS_PTRACE", "{value}");
    let (value, code) = asked(&["doctor", "--json"]);
    assert_eq!(code, Some(1), "{value}");
    let said = value.to_string();
    assert!(
        said.contains(&format!("{unit}: ")) && said.contains("more than is needed: CAP_SYS_PTRACE"),
        "{said}"
    );
    drop(drop_in);
}

#[test]
fn doctor_finds_no_fault_in_the_services() {
    let services = services!();
    services.apply_policy(APP, &xdp());
    let client = services.session(APP);
    main_process(&helper(APP));
    let (value, _) = asked(&["doctor", "--json"]);
    for topic in ["units", "policies", "broker", "processes", "landlock", "kernel"] {
        let lines = value["lines"].as_array().unwrap();
        let of_topic: Vec<&Value> = lines.iter().filter(|line| line["topic"] == topic).collect();
        assert!(!of_topic.is_empty() && of_topic.iter().all(|line| line["state"] == "ok"), "{of_topic:?}");
    }
    drop(client);
}
