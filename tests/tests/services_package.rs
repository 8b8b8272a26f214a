//! Services: the package.

use bpfgate_tests::services::{A_WHILE, BROKER, Traffic, helper, journal, main_process, packets, said};
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
    let counters = gate.kept_counter("upgrade");
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

/// Pages refer to each other by their names.
#[test]
fn every_page_is_in_the_package() {
    let _services = bpfgate_tests::services!();
    let files = run(&format!("dpkg-deb --contents {}", package().display()));
    let names: Vec<&str> = files.lines().filter_map(|line| line.split_whitespace().nth(5)).collect();
    let mut count = 0;
    for page in std::fs::read_dir(workspace().join("docs")).unwrap() {
        let page = page.unwrap().file_name().into_string().unwrap();
        let path = format!("./usr/share/doc/bpfgate/{page}");
        assert!(names.contains(&path.as_str()), "{path} is missing:\n{files}");
        count += 1;
    }
    assert!(count >= 4, "{count} pages");
}
