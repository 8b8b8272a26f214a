//! Promise 1: what the process with capabilities is made of.

use bpfgate_tests::peer::{POLICY, Peer};
use bpfgate_tests::{Gate, bin_dir, needs_root, process, workspace};
use std::process::Command;

/// Two objects.
fn tool(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).current_dir(workspace()).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn promise_01_no_parser_of_elf_btf_or_json_is_linked_into_the_helper() {
    let symbols =
        |name: &str| tool("readelf", &["--symbols", "--wide", bin_dir().join(name).to_str().unwrap()]);
    let (helper, loader) = (symbols("bpfgate-helper"), symbols("bpfgate-loader"));
    for parser in ["bpf_object__open", "btf__type_by_id", "elf_begin", "serde_json"] {
        assert!(!helper.contains(parser), "the helper has {parser}");
    }
    assert!(loader.contains("bpf_object__open"), "the way to look for symbols does not find them");
    let needed = tool("readelf", &["--dynamic", bin_dir().join("bpfgate-helper").to_str().unwrap()]);
    assert!(!needed.contains("libelf") && !needed.contains("libbpf"), "{needed}");

    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let tree = |package: &str| {
        let line =
            ["tree", "--offline", "--locked", "--edges", "normal", "--prefix", "none", "--package", package];
        tool(&cargo, &line)
    };
    let (helper, loader) = (tree("bpfgate-helper"), tree("bpfgate-loader"));
    for package in ["libbpf-sys", "libbpf-rs", "object", "serde_json", "goblin"] {
        assert!(
            !helper.lines().any(|line| line.starts_with(&format!("{package} "))),
            "the helper has {package}"
        );
    }
    assert!(loader.contains("libbpf-sys ") && helper.contains("bincode "), "cargo tree says something else");
}

#[test]
fn promise_01_a_helper_has_read_what_it_needs_and_opens_nothing() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", POLICY);
    let before = gate.baseline();
    let peer = Peer::start(&gate, "app");
    assert!(peer.sandbox.landlock_abi >= 2 && peer.sandbox.seccomp_filters >= 2, "{:?}", peer.sandbox);
    assert_eq!(peer.sandbox.capabilities, 1 << 39 | 1 << 12);
    assert_eq!(process::status(peer.pid(), "Seccomp"), ["2"]);
    assert_eq!(process::status(peer.pid(), "Seccomp_filters"), ["2"]);
    assert_eq!(process::status(peer.pid(), "CapEff"), [format!("{:016x}", 1u64 << 39 | 1 << 12)]);
    drop(peer);
    // The one that the broker's spawner starts: two objects, sealed; neither a policy nor any other file is open.
    let client = gate.session("app");
    let [helper, ..] = gate.helper("app");
    let environment = std::fs::read(format!("/proc/{}/environ", helper.pid)).unwrap();
    assert!(environment.is_empty(), "it has an environment");
    let open = process::descriptors(helper.pid);
    let log = gate.dir.join("broker.log").display().to_string();
    let known = |kind: &&String| {
        ["/dev/null", "socket", "/memfd:bpfgate-object (deleted)", log.as_str()].contains(&kind.as_str())
    };
    assert_eq!(open.keys().filter(|kind| !known(kind)).count(), 0, "{open:?}");
    assert_eq!(open["/memfd:bpfgate-object (deleted)"], 2);
    drop(client);
    gate.invariants(&before);
}
