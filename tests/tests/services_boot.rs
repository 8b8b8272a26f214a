//! Services: a machine that was started with the package in it. This program runs first: the others change policies.

use bpfgate_tests::services::{A_WHILE, helper, is_active, journal, property, said, systemctl};
use bpfgate_tests::wait_until;
use std::process::Command;

/// The machine was made with the package and three policies, one of them invalid (tests/machines/installed).
#[test]
fn the_machine_has_started_with_three_policies_of_which_one_is_invalid() {
    if std::env::var_os("BPFGATE_MACHINE").is_none_or(|how| how != "booted") {
        println!("skipped: needs a machine that was started with the package in it");
        return;
    }
    // Not Services::here(), which begins by removing policies.
    for unit in [
        "bpfgate.socket",
        "bpfgate-admin.socket",
        "bpfgate-helper@boot-one.socket",
        "bpfgate-helper@boot-two.socket",
    ] {
        assert!(is_active(unit), "{unit}: {}", said(&systemctl(&["status", "--no-pager", unit])));
    }
    assert_eq!(property("bpfgate-helper@boot-bad.socket", "ActiveState"), "inactive");
    // keep = "boot": on lo, without anybody asking.
    let attached =
        || said(&Command::new("ip").args(["link", "show", "lo"]).output().unwrap()).contains("xdp");
    assert!(wait_until(A_WHILE, attached), "{}", journal());
    assert!(is_active(&helper("boot-one")));
    assert!(!is_active(&helper("boot-two")), "nobody has asked for it");
    let state = said(&Command::new("systemctl").arg("is-system-running").output().unwrap());
    assert_eq!(state.trim(), "running", "{}", said(&systemctl(&["--failed", "--no-pager"])));
    // The invalid one is said: by the generator, and by the broker as soon as it runs.
    let _ = std::os::unix::net::UnixStream::connect(bpfgate_tests::services::SOCKET).unwrap();
    assert!(wait_until(A_WHILE, || journal().contains("boot-bad")), "{}", journal());
}
