//! Reload: policies come into force when somebody says so, all at once, and what they take away ends.

use bpfgate_tests::{Gate, Raw, SOON, STRANGER, USER, needs_root, wait_until};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Instant;

/// Something small to load, attach and map.
const POLICY: &str = "{client}\n[objects.o]\n{object:minimal}\n[[objects.o.xdp]]\nprogram = \"pass\"\n\
    interfaces = [\"{interface}\"]\nmode = \"generic\"\n[objects.o.maps]\ncounts = \"read-write\"\n";

fn denied(gate: &Gate, app: &str) {
    Raw::connect(gate, &USER).refused("Open", &json!({"app": app}), "Denied");
}

/// What is on disk counts when somebody says so, whatever its times say (POL-23).
#[test]
fn files_count_when_somebody_says_so_and_not_by_their_times() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("changed", POLICY);
    gate.policy("removed", POLICY);
    let before = gate.baseline();
    gate.edit("new", POLICY);
    gate.edit("changed", &POLICY.replace("{client}", ""));
    fs::remove_file(gate.policy_path("removed")).unwrap();
    // Nobody has said anything: what was in force is in force.
    denied(&gate, "new");
    for app in ["changed", "removed"] {
        let mut raw = Raw::connect(&gate, &USER);
        let answer = raw.call("Open", &json!({"app": app}));
        if app == "changed" {
            // Its helper has read what nobody has put in force.
            assert_eq!(answer.unwrap_err().error, "io.bpfgate.Busy");
        } else {
            assert_eq!(answer.unwrap_err().error, "io.bpfgate.Helper");
        }
    }
    gate.reload();
    denied(&gate, "changed");
    denied(&gate, "removed");
    // The same size, the same inode, the same modification time; and the clock in the past.
    let path = gate.policy_path("new");
    let text = fs::read_to_string(&path).unwrap();
    let metadata = fs::metadata(&path).unwrap();
    fs::write(&path, text.replace("user = 12345", "user = 12399")).unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.set_modified(metadata.modified().unwrap()).unwrap();
    let after = fs::metadata(&path).unwrap();
    assert_eq!(
        (after.ino(), after.size(), after.mtime(), after.mtime_nsec()),
        (metadata.ino(), metadata.size(), metadata.mtime(), metadata.mtime_nsec())
    );
    gate.reload();
    denied(&gate, "new");
    gate.invariants(&before);
}

#[test]
fn one_bad_file_of_three_disables_its_app_only() {
    needs_root!();
    let gate = Gate::start();
    for app in ["one", "two", "three"] {
        gate.edit(app, POLICY);
    }
    gate.reload();
    let before = gate.baseline();
    let mut sessions = ["one", "two", "three"].map(|app| Raw::open(&gate, app));
    let instances = sessions.each_mut().map(|raw| raw.load("o"));
    gate.edit("two", &format!("{POLICY}[limits]\nprogram = 1\n"));
    let start = Instant::now();
    gate.reload();
    let [one, two, three] = &mut sessions;
    for (raw, instance) in [(one, instances[0]), (three, instances[2])] {
        raw.done("Map", &json!({"instance": instance, "name": "counts"}));
    }
    // It is told why, and then it is over: connection, helper, and what it had loaded.
    let (told, _) = two.receive().expect("a word of farewell");
    let told: Value = serde_json::from_slice(&told).unwrap();
    assert_eq!(told["error"], "io.bpfgate.Gone", "{told}");
    assert!(told["parameters"]["message"].as_str().unwrap().contains("not valid"), "{told}");
    two.is_closed_after(0);
    let gone = || gate.find(&bpfgate_tests::process::Role::Helper("two".into())).is_none();
    assert!(wait_until(SOON, gone), "its helper goes on after {:?}", start.elapsed());
    denied(&gate, "two");
    let log = gate.log();
    assert!(log.contains("two.toml:") && log.contains("program"), "{log}");
    let ended = gate.audit_of("two").into_iter().find(|record| record["verb"] == "End").expect("a record");
    assert_eq!(ended["request"], told["parameters"]["request"]);
    drop(sessions);
    gate.policy("two", POLICY);
    Raw::open(&gate, "two").load("o");
    gate.invariants(&before);
}

#[test]
fn a_record_says_in_which_generation_it_was_decided() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", POLICY);
    let before = gate.baseline();
    let mut last = gate.generation();
    for (user, verdict) in [(12345, "allowed"), (12399, "Denied"), (12345, "allowed")] {
        let client = format!("[[client]]\nuser = {user}\nmay = [\"load\"]");
        gate.policy("app", &POLICY.replace("{client}", &client));
        let _ = Raw::connect(&gate, &USER).call("Open", &json!({"app": "app"}));
        Raw::connect(&gate, &STRANGER).refused("Open", &json!({"app": "app"}), "Denied");
        let records = gate.audit();
        let [mine, strange] = &records[records.len() - 2..] else { panic!("two records") };
        assert_eq!((&mine["verdict"], &strange["verdict"]), (&json!(verdict), &json!("Denied")));
        let generation = mine["generation"].as_u64().unwrap();
        assert!(generation > last && strange["generation"] == generation, "{mine} {strange}");
        last = generation;
    }
    assert_eq!(last, gate.generation());
    gate.invariants(&before);
}
