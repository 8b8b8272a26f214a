//! Services: the package, and the machine that starts with it.

use bpfgate_tests::services::{
    A_WHILE, BROKER, COUNTER, Traffic, helper, is_active, journal, main_process, packets, property, said,
    systemctl,
};
use bpfgate_tests::{wait_until, workspace};
use std::process::Command;

/// The package under test, where `make systemd-test` and `make vm-test` put it.
fn package() -> std::path::PathBuf {
    workspace().join("bpfgate.deb")
}

fn run(line: &str) -> String {
    let output = Command::new("sh").args(["-c", line]).output().unwrap();
    assert!(output.status.success(), "{line}: {}", said(&output));
    said(&output)
}

#[test]
fn an_upgrade_misses_no_packet() {
    let gate = bpfgate_tests::services!();
    gate.apply_policy("upgrade", COUNTER);
    let mut client = gate.session("upgrade");
    let counters = gate.count_packets(&mut client);
    drop(client);
    let start = packets(&counters);
    let before = [main_process(BROKER), main_process(&helper("upgrade"))];
    // The next build: other bytes under another version.
    let (old, tree) = (package(), "/tmp/bpfgate-next");
    run(&format!("rm -rf {tree} && dpkg-deb -R {} {tree}", old.display()));
    run(&format!(
        "sed -i 's/^Version: .*/Version: 99.0-1/' {tree}/DEBIAN/control && echo >> {tree}/usr/libexec/bpfgate/bpfgate-helper"
    ));
    run(&format!(
        "cd {tree} && find . -type f ! -path './DEBIAN/*' -printf '%P\\0' | xargs -0 md5sum > DEBIAN/md5sums"
    ));
    run(&format!("dpkg-deb -Znone -b {tree} {tree}.deb"));
    let traffic = Traffic::begin(&gate.network);
    run(&format!("DEBIAN_FRONTEND=noninteractive dpkg -i {tree}.deb"));
    let sent = traffic.end();
    assert!(
        wait_until(A_WHILE, || packets(&counters) - start == sent),
        "{sent} sent, {} counted",
        packets(&counters) - start
    );
    println!("{sent} packets during the upgrade, 0 uncounted");
    let after = [main_process(BROKER), main_process(&helper("upgrade"))];
    assert!(before[0] != after[0] && before[1] != after[1], "the old build still runs");
    assert_eq!(gate.session_again("upgrade").list().unwrap()[0].links.len(), 1, "{}", journal());
    run(&format!("DEBIAN_FRONTEND=noninteractive dpkg -i --force-downgrade {}", old.display()));
    assert_eq!(gate.session_again("upgrade").list().unwrap()[0].links.len(), 1, "{}", journal());
    run(&format!("rm -rf {tree} {tree}.deb"));
}

/// The machine was made with the package and three policies, one of them invalid (tests/machines/prepare).
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
