//! Services: reload without `policy apply`, and what the journal has of it.

use bpfgate_client::{Error, LoadOptions, Target};
use bpfgate_tests::services::{
    A_WHILE, BROKER, COUNTER, bpfgate, helper, is_active, is_attached, journal, main_process, policy_path,
    property, said, systemctl,
};
use bpfgate_tests::{SOON, STRANGER, USER, as_user, wait_until};
use serde_json::Value;
use std::fs;
use std::os::unix::net::UnixStream;
use std::time::Instant;

fn reload() -> Instant {
    let start = Instant::now();
    let output = systemctl(&["reload", BROKER]);
    assert!(output.status.success(), "{}\n{}", said(&output), journal());
    start
}

/// The records of an app, as `bpfgate audit` gives them from the journal.
fn audit(arguments: &[&str]) -> Vec<Value> {
    let output = bpfgate(&[&["audit", "--json"], arguments].concat());
    assert!(output.status.success(), "{}", said(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| serde_json::from_str(line).expect("a record a line")).collect()
}

#[test]
fn a_reload_reaches_a_helper_that_nobody_uses() {
    let gate = bpfgate_tests::services!();
    let wide = COUNTER.replace("\"{interface}\"", "\"{interface}\", \"lo\"");
    gate.apply_policy("quiet", &wide);
    let mut client = gate.session("quiet");
    let instance = client.load("o", &LoadOptions::default()).unwrap();
    for interface in ["gate0", "lo"] {
        let target = Target::Interface(interface.into());
        client.attach(instance.id, "count_packets", Some(&target), None).unwrap();
    }
    drop(client);
    let process = main_process(&helper("quiet"));
    // The broker lets go of it.
    std::thread::sleep(std::time::Duration::from_secs(6));
    gate.policy("quiet", COUNTER);
    let start = reload();
    assert!(wait_until(SOON, || !is_attached("lo")), "{}", journal());
    println!("detached {} ms after the reload", start.elapsed().as_millis());
    assert!(is_attached("gate0"), "what is still allowed is gone\n{}", journal());
    assert_eq!(main_process(&helper("quiet")), process);
    // It counts for both, and the next apply has nothing to do to it.
    assert_eq!(gate.session("quiet").list().unwrap()[0].links.len(), 1);
    gate.apply();
    assert_eq!(main_process(&helper("quiet")), process);
    fs::remove_file(policy_path("quiet")).unwrap();
    let start = reload();
    let gone = || !is_attached("gate0") && !is_active(&helper("quiet"));
    assert!(wait_until(SOON, gone), "{}", journal());
    println!("removed, detached and ended {} ms after the reload", start.elapsed().as_millis());
    assert!(matches!(gate.try_session("quiet"), Err(Error::Denied(_))));
    assert_eq!(property(&helper("quiet"), "Result"), "success", "{}", journal());
    let what = |record: &Value| record["verb"] == "Reload" && record["about"] == "removed, helper: ended";
    assert!(wait_until(SOON, || audit(&["--app", "quiet"]).iter().any(what)), "{}", journal());
}

#[test]
fn the_journal_has_each_fact_as_a_field() {
    let gate = bpfgate_tests::services!();
    gate.apply_policy("facts", COUNTER);
    let mut client = gate.session("facts");
    let map = gate.count_packets(&mut client);
    let mut stranger = bpfgate_client::Client::from_stream(
        as_user(&STRANGER, || UnixStream::connect(bpfgate_tests::services::SOCKET)).unwrap(),
    );
    let Err(Error::Denied(refused)) = stranger.open("facts") else { panic!("a stranger gets in") };
    let found = || audit(&["--request", &refused.request]);
    assert!(wait_until(SOON, || found().len() == 1), "{:?}\n{}", found(), journal());
    let record = found().remove(0);
    assert_eq!((&record["verdict"], &record["uid"]), (&"Denied".into(), &STRANGER.id.into()), "{record}");
    let allowed = audit(&["--app", "facts", "--user", &USER.id.to_string(), "--verdict", "allowed"]);
    let verbs: Vec<&str> = allowed.iter().filter_map(|record| record["verb"].as_str()).collect();
    assert_eq!(verbs, ["Open", "Load", "Attach"], "{allowed:?}");
    assert_eq!((&allowed[1]["object"], &allowed[2]["target"]), (&"o".into(), &"gate0".into()));
    assert!(allowed[1]["maps"].as_str().is_some_and(|maps| maps.starts_with("counters=")), "{}", allowed[1]);
    // Somebody else's words are not the broker's.
    let forged = "MESSAGE_ID=5f1c7a9e0b6d4c0f8a2f6d3be4917c58\nMESSAGE=x\nBPFGATE_APP=facts\nBPFGATE_VERDICT=allowed\n";
    let socket = std::os::unix::net::UnixDatagram::unbound().unwrap();
    socket.send_to(forged.as_bytes(), "/run/systemd/journal/socket").unwrap();
    std::thread::sleep(SOON);
    assert_eq!(audit(&["--app", "facts", "--verdict", "allowed"]).len(), 3);
    drop((client, map));
}

#[test]
fn a_journal_that_is_restarted_costs_nothing() {
    let gate = bpfgate_tests::services!();
    gate.apply_policy("again", COUNTER);
    let broker = main_process(BROKER);
    assert!(systemctl(&["restart", "systemd-journald.service"]).status.success());
    let start = Instant::now();
    let mut client = gate.session("again");
    let _map = gate.count_packets(&mut client);
    assert!(start.elapsed() < A_WHILE, "the broker waits for the journal");
    let loaded = || audit(&["--app", "again"]).iter().any(|record| record["verb"] == "Load");
    assert!(wait_until(A_WHILE, loaded), "{}", journal());
    assert_eq!(main_process(BROKER), broker);
}
