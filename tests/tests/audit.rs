//! Audit: each decision is one record that tells everything, a flood of them is bounded, and nothing in one is obeyed.

use bpfgate_tests::cli::Ended;
use bpfgate_tests::gate::WITH_MAP;
use bpfgate_tests::raw::frame;
use bpfgate_tests::{Gate, Raw, STRANGER, USER, bin_dir, needs_root, wait_until};
use serde_json::{Value, json};
use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

/// `bpfgate audit` on the file of this broker, with these words.
fn audit(gate: &Gate, line: &str) -> Ended {
    let mut command = Command::new(bin_dir().join("bpfgate"));
    Ended::of(command.arg("audit").args(line.split_whitespace()).arg(gate.dir.join("audit")))
}

fn records(ended: &Ended) -> Vec<Value> {
    assert_eq!(ended.code, Some(0), "{ended:?}");
    ended.out.lines().map(|line| serde_json::from_str(line).expect("a record a line")).collect()
}

#[test]
fn a_record_tells_what_was_given_and_of_what() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", WITH_MAP);
    let before = gate.baseline();
    let digest = bpfgate_tests::gate::sha256(&gate.object("minimal"));
    let mut raw = Raw::open(&gate, "app");
    let (loaded, fds) = raw.done("Load", &json!({"object": "o"}));
    let id = json!(loaded["instance"]);
    raw.done("Attach", &json!({"instance": id, "program": "pass"}));
    raw.done("Map", &json!({"instance": id, "name": "counts"}));
    raw.refused(
        "Attach",
        &json!({"instance": id, "program": "pass", "target": {"interface": "lo"}}),
        "Denied",
    );
    let records = gate.audit_of("app");
    let [_open, load, attach, map, denied] = &records[records.len() - 5..] else { panic!("{records:?}") };
    // The kernel's number of the map, as the descriptor has it.
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", std::os::fd::AsRawFd::as_raw_fd(&fds[0])))
        .unwrap();
    let number: u64 =
        info.lines().find_map(|line| line.strip_prefix("map_id:")).unwrap().trim().parse().unwrap();
    for record in [load, attach, map, denied] {
        assert_eq!(
            (&record["object"], &record["digest"], &record["instance"]),
            (&json!("o"), &json!(digest), &id)
        );
        assert_eq!(record["generation"], gate.generation());
    }
    assert_eq!((&load["maps"], &map["maps"]), (&json!({"counts": number}), &json!({"counts": number})));
    assert_eq!((&attach["target"], &attach["link"]), (&json!(bpfgate_tests::gate::INTERFACE), &json!(1)));
    assert_eq!((&denied["target"], &denied["link"]), (&json!("lo"), &Value::Null));
    drop((raw, fds));
    gate.invariants(&before);
}

#[test]
fn records_are_found_by_what_they_are_about() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", WITH_MAP);
    gate.policy("other", WITH_MAP);
    let before = gate.baseline();
    Raw::open(&gate, "app").load("o");
    Raw::open(&gate, "other").load("o");
    let refused = Raw::connect(&gate, &STRANGER).refused("Open", &json!({"app": "app"}), "Denied");
    let request = refused["request"].as_str().unwrap();
    let all = records(&audit(&gate, "--json"));
    assert_eq!(all, gate.audit());
    let of_app = records(&audit(&gate, "--json --app other --verdict allowed"));
    assert_eq!(of_app.iter().map(|r| r["verb"].as_str().unwrap()).collect::<Vec<_>>(), ["Open", "Load"]);
    let of_user = records(&audit(&gate, &format!("--json --user {} --verdict Denied", STRANGER.id)));
    assert_eq!(of_user, records(&audit(&gate, &format!("--json --request {request}"))));
    assert_eq!(of_user.len(), 1);
    assert_eq!(records(&audit(&gate, "--json --since 1h")).len(), all.len());
    let line = audit(&gate, &format!("--request {request}"));
    assert_eq!(line.out.lines().count(), 1, "{line:?}");
    for part in ["Denied: Open app", &format!("uid {}", STRANGER.id), request, "is in no client entry"] {
        assert!(line.out.contains(part), "{part}: {line:?}");
    }
    // What is no record is passed over, and said.
    let path = gate.dir.join("audit");
    let mut text = fs::read(&path).unwrap();
    text.extend(b"\x1b[2Jnonsense\n");
    fs::write(gate.dir.join("copy"), text).unwrap();
    let mut command = Command::new(bin_dir().join("bpfgate"));
    let ended = Ended::of(command.args(["audit", "--json"]).arg(gate.dir.join("copy")));
    assert_eq!((ended.code, ended.out.lines().count()), (Some(1), all.len()), "{ended:?}");
    assert!(ended.err.contains("1 lines"), "{ended:?}");
    assert_eq!(audit(&gate, "--since yesterday").code, Some(2));
    gate.invariants(&before);
}

/// A hundred thousand refusals: what is written of them is bounded, counted, and has the first and the last (RES-11).
#[test]
fn a_flood_is_summarized() {
    needs_root!();
    // Fewer on an emulated machine: still a flood there.
    let calls = 100_000 / bpfgate_tests::slowness() as usize;
    let gate = Gate::start();
    gate.policy("app", WITH_MAP);
    let before = gate.baseline();
    let size = || fs::metadata(gate.dir.join("audit")).unwrap().len();
    let (start, count) = (size(), gate.audit().len());
    let call = frame("Open", &json!({"app": "app"})).repeat(100);
    let mut last = Value::Null;
    for _ in 0..calls / 1000 {
        // Who is let into no app is sent away after a while.
        let mut stranger = Raw::connect(&gate, &STRANGER);
        for _ in 0..10 {
            stranger.send(&call).unwrap();
            for _ in 0..100 {
                last = stranger.reply().unwrap_err().parameters["request"].clone();
            }
        }
    }
    // Somebody else is recorded all the same.
    Raw::open(&gate, "app").load("o");
    assert_eq!(gate.audit_of("app").last().unwrap()["verb"], "Load");
    let is_summary = |record: &&Value| record["verb"] == "Summary";
    let is_last = |record: &Value| record["request"] == last;
    let over = || gate.audit().iter().any(is_last) && gate.audit().iter().any(|record| is_summary(&record));
    assert!(wait_until(Duration::from_secs(15), over), "no summary");
    let records = gate.audit().split_off(count);
    assert_eq!((&records[0]["verdict"], &records[0]["uid"]), (&json!("Denied"), &json!(STRANGER.id)));
    let written = records.iter().filter(|r| r["verdict"] == "Denied" && r["uid"] == STRANGER.id).count();
    let counted: u64 =
        records.iter().filter(is_summary).map(|r| r["suppressed"]["Denied"].as_u64().unwrap()).sum();
    println!("{written} written, {counted} counted, {} KiB", (size() - start) >> 10);
    assert_eq!(written as u64 + counted, calls as u64);
    assert!(size() - start < 1 << 20, "{} bytes", size() - start);
    gate.invariants(&before);
}

#[test]
fn nothing_that_a_client_says_is_obeyed() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", WITH_MAP);
    let before = gate.baseline();
    for text in [
        "\u{1b}[2J",
        "a\nb",
        "\u{9b}31m",
        "\u{202e}gnp",
        "\u{7f}",
        "\r",
        "\u{0}",
        "{\"verdict\":\"allowed\"}\n",
    ] {
        let mut raw = Raw::connect(&gate, &USER);
        let _ = raw.call("Open", &json!({"app": text}));
        let _ = raw.call(&format!("io.bpfgate.{text}"), &json!({}));
        let _ = raw.call("Open", &json!({"app": "app"}));
        for (method, parameters) in [
            ("Load", json!({"object": text})),
            ("Load", json!({"object": "o", "programs": [text]})),
            ("Attach", json!({"instance": 1, "program": text})),
            ("Attach", json!({"instance": 1, "program": "pass", "target": {"interface": text}})),
            ("Map", json!({"instance": 1, "name": text})),
        ] {
            let count = gate.audit().len();
            let _ = raw.call(method, &parameters);
            // Gate::audit asserts that nothing in it is a control character.
            assert_eq!(gate.audit().len(), count + 1, "{method} {parameters}");
        }
    }
    let text = fs::read_to_string(gate.dir.join("audit")).unwrap();
    assert!(!text.contains(['\u{202e}', '\u{9b}', '\u{7f}']));
    assert!(
        gate.audit().iter().all(|record| record["verdict"] != "allowed"
            || record["verb"] == "Open"
            || record["app"] != "app")
    );
    gate.invariants(&before);
}

/// The broker's file stays open: with copytruncate nothing is lost but what comes between copy and cut, and
/// `--follow` goes on reading.
#[test]
fn a_file_that_is_cut_goes_on() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", WITH_MAP);
    let before = gate.baseline();
    let path = gate.dir.join("audit");
    let mut command = Command::new(bin_dir().join("bpfgate"));
    command.args(["audit", "--json", "--follow", "--app", "app", "--verdict", "allowed"]).arg(&path);
    let out = gate.dir.join("followed");
    let mut follow = command.stdout(Stdio::from(fs::File::create(&out).unwrap())).spawn().unwrap();
    let followed = || fs::read_to_string(&out).unwrap().lines().count();
    Raw::open(&gate, "app").load("o");
    assert!(wait_until(Duration::from_secs(5), || followed() == 2), "{} records", followed());
    fs::copy(&path, gate.dir.join("audit.1")).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
    Raw::open(&gate, "app").load("o");
    assert_eq!(gate.audit_of("app").len(), 2, "the file has what came after the cut, from its beginning");
    assert!(wait_until(Duration::from_secs(5), || followed() == 4), "{} records", followed());
    follow.kill().unwrap();
    follow.wait().unwrap();
    gate.invariants(&before);
}
