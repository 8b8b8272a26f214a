//! Services: what becomes of what runs when policies come, change and go.

use bpfgate_client::{Error, LoadOptions, Target};
use bpfgate_tests::services::{
    A_WHILE, COUNTER, bpfgate, helper, is_active, journal, main_process, packets, policy_path, said,
    systemctl, units,
};
use bpfgate_tests::{SOON, wait_until};
use std::fs;
use std::process::Command;
use std::time::Instant;

fn is_attached(interface: &str) -> bool {
    said(&Command::new("ip").args(["link", "show", interface]).output().unwrap()).contains("xdp")
}

#[test]
fn a_policy_that_is_removed_takes_everything_with_it() {
    let gate = bpfgate_tests::services!();
    gate.policy("stays", &COUNTER.replace("{interface}", "lo"));
    gate.apply_policy("goes", COUNTER);
    let mut stays = gate.session("stays");
    let _map = gate.count_packets(&mut stays);
    let untouched = main_process(&helper("stays"));
    let mut goes = gate.session("goes");
    let counters = gate.count_packets(&mut goes);
    assert!(is_attached("gate0"));
    fs::remove_file(policy_path("goes")).unwrap();
    let start = Instant::now();
    let text = gate.apply();
    assert!(text.contains("goes"), "{text}");
    assert!(
        wait_until(SOON, || !is_attached("gate0")),
        "still attached {} ms later",
        start.elapsed().as_millis()
    );
    println!("removed and detached after {} ms", start.elapsed().as_millis());
    assert!(matches!(goes.list(), Err(Error::Helper(_) | Error::Io { .. })), "the session goes on");
    assert!(matches!(gate.try_session("goes"), Err(Error::Denied(_))));
    let left = || units("bpfgate-helper@goes*");
    assert!(wait_until(A_WHILE, || left().is_empty()), "{:?}", left());
    assert!(!std::path::Path::new("/run/bpfgate/helper/goes.sock").exists());
    let still = packets(&counters);
    gate.network.send_to_interface(5);
    assert_eq!(packets(&counters), still);
    // Others have noticed nothing.
    assert_eq!(main_process(&helper("stays")), untouched);
    assert_eq!(stays.list().unwrap().len(), 1);
}

#[test]
fn a_narrower_policy_revokes_what_is_outside_of_it_and_nothing_else() {
    let gate = bpfgate_tests::services!();
    let wide = COUNTER.replace("\"{interface}\"", "\"{interface}\", \"lo\"");
    gate.apply_policy("narrow", &wide);
    let mut client = gate.session("narrow");
    let instance = client.load("o", &LoadOptions::default()).unwrap();
    for interface in ["gate0", "lo"] {
        client
            .attach(instance.id, "count_packets", Some(&Target::Interface(interface.into())), None)
            .unwrap();
    }
    drop(client);
    assert!(is_attached("gate0") && is_attached("lo"));
    gate.policy("narrow", COUNTER);
    // Not in force yet, and said so.
    let outdated = gate.try_session("narrow").err().expect("the policy of before is not served");
    assert!(
        matches!(&outdated, Error::Busy(refusal) if refusal.message.contains("policy apply")),
        "{outdated:?}"
    );
    let dry = said(&bpfgate(&["policy", "apply", "--dry-run"]));
    assert!(dry.contains("lo"), "{dry}");
    assert!(is_attached("lo"), "a dry run has an effect");
    let text = gate.apply();
    assert!(text.contains("lo"), "{text}");
    assert!(wait_until(SOON, || !is_attached("lo")), "{}", journal());
    assert!(is_attached("gate0"), "what is still allowed is gone\n{}", journal());
    let mut client = gate.session_again("narrow");
    let links = &client.list().unwrap()[0].links;
    assert_eq!(links.iter().map(|link| link.target.as_str()).collect::<Vec<_>>(), ["gate0"]);
    // Nothing persistent is allowed any more.
    gate.apply_policy("narrow", &COUNTER.replace("keep = \"app\"", "keep = \"session\""));
    assert!(wait_until(SOON, || !is_attached("gate0")), "{}", journal());
    assert!(gate.session_again("narrow").list().unwrap().is_empty());
}

#[test]
fn an_object_with_another_digest_is_not_the_one_that_was_approved() {
    let gate = bpfgate_tests::services!();
    gate.apply_policy("bytes", COUNTER);
    let mut client = gate.session("bytes");
    let _map = gate.count_packets(&mut client);
    drop(client);
    let text = fs::read_to_string(policy_path("bytes")).unwrap();
    let (start, rest) = text.split_once("sha256 = \"").unwrap();
    fs::write(policy_path("bytes"), format!("{start}sha256 = \"{}{}", "0".repeat(64), &rest[64..])).unwrap();
    gate.apply();
    assert!(wait_until(SOON, || !is_attached("gate0")), "{}", journal());
    assert!(gate.session_again("bytes").list().unwrap().is_empty());
}

#[test]
fn a_bad_file_disables_its_own_app_and_says_so() {
    let gate = bpfgate_tests::services!();
    gate.policy("good", COUNTER);
    gate.policy("bad", "unknown = 1\n");
    let output = bpfgate(&["policy", "apply"]);
    let text = said(&output);
    assert_eq!(output.status.code(), Some(4), "{text}");
    assert!(text.contains("bad.toml:2:1") && text.contains("unknown"), "{text}");
    drop(gate.session("good"));
    assert!(matches!(gate.try_session("bad"), Err(Error::Denied(_))));
    assert!(units("bpfgate-helper@bad*").is_empty());
    assert!(wait_until(A_WHILE, || journal().contains("bad.toml")), "the broker's log is silent");
    fs::remove_file(policy_path("bad")).unwrap();
    gate.apply();
}

#[test]
fn what_is_not_changed_is_not_restarted() {
    let gate = bpfgate_tests::services!();
    gate.policy("one", COUNTER);
    gate.apply_policy("two", &COUNTER.replace("{interface}", "lo"));
    let (mut one, mut two) = (gate.session("one"), gate.session("two"));
    let _maps = (gate.count_packets(&mut one), gate.count_packets(&mut two));
    let before = [main_process(&helper("one")), main_process(&helper("two"))];
    gate.policy("two", &format!("description = \"another\"\n{}", COUNTER.replace("{interface}", "lo")));
    gate.apply();
    assert_eq!(main_process(&helper("one")), before[0]);
    assert_eq!(one.list().unwrap().len(), 1);
    assert_ne!(main_process(&helper("two")), before[1], "the new file is not in force");
    assert_eq!(gate.session_again("two").list().unwrap()[0].links.len(), 1);
    // Capabilities follow the policy: with a filter only, CAP_NET_ADMIN is gone.
    let filter =
        "{client}\n[objects.o]\n{object:sockfilter}\n[[objects.o.socket_filter]]\nprogram = \"keep_all\"\n";
    gate.apply_policy("two", filter);
    drop(gate.session_again("two"));
    assert_eq!(
        bpfgate_tests::process::status(main_process(&helper("two")).pid, "CapEff"),
        ["0000008000000000"]
    );
    assert!(!is_attached("lo"));
    assert!(is_active(&helper("two")));
    systemctl(&["stop", &helper("two")]);
}
