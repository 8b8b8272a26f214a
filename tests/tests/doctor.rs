//! `bpfgate doctor`, on prepared machines and on this one.

use bpfgate_tests::cli::Ended;
use bpfgate_tests::process::Process;
use bpfgate_tests::root::Root;
use bpfgate_tests::{Gate, bin_dir, needs_root};
use serde_json::Value;
use std::fs;
use std::process::Command;

fn doctor(machine: &Root, line: &str) -> Ended {
    machine.cli(&["doctor"], line)
}

/// What is not ok, by topic and state, and the exit codes without and with --strict.
fn worse(machine: &Root) -> (Vec<(String, String)>, [Option<i32>; 2]) {
    let ended = doctor(machine, "--json");
    let value: Value = serde_json::from_str(&ended.out).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
    let word = |line: &Value, key: &str| line[key].as_str().unwrap().to_owned();
    let lines = value["lines"].as_array().unwrap();
    let worse = lines.iter().filter(|line| line["state"] != "ok");
    for line in worse.clone() {
        assert!(line["todo"].is_string(), "nothing is said about what to do: {line}");
    }
    let worse = worse.map(|line| (word(line, "topic"), word(line, "state"))).collect();
    (worse, [ended.code, doctor(machine, "--json --strict").code])
}

#[test]
fn a_machine_as_it_should_be_has_no_warning() {
    let machine = Root::good("good");
    assert_eq!(worse(&machine), (vec![], [Some(0), Some(0)]));
    let table = doctor(&machine, "");
    assert!(table.out.starts_with("STATE  WHAT\n") && !table.out.contains("What to do"), "{table:?}");
    assert!(table.out.lines().count() < 24, "more than one screen:\n{}", table.out);
}

/// One change to a machine.
type Change = fn(&Root);

#[test]
fn each_prepared_state_is_found_and_nothing_else() {
    let warning = |topic: &str| (vec![(topic.to_owned(), "warning".to_owned())], [Some(0), Some(1)]);
    let fault = |topic: &str| (vec![(topic.to_owned(), "fault".to_owned())], [Some(1), Some(1)]);
    let cases: [(&str, Change, _); 10] = [
        ("old", |m| m.write("proc/sys/kernel/osrelease", "5.15.0-1\n"), fault("kernel")),
        (
            "unprivileged",
            |m| m.write("proc/sys/kernel/unprivileged_bpf_disabled", "0\n"),
            warning("unprivileged_bpf_disabled"),
        ),
        (
            "paranoid",
            |m| m.write("proc/sys/kernel/perf_event_paranoid", "-1\n"),
            warning("perf_event_paranoid"),
        ),
        ("btf", |m| fs::remove_file(m.path().join("sys/kernel/btf/vmlinux")).unwrap(), warning("BTF")),
        (
            "modules",
            |m| m.write("sys/kernel/security/lsm", "lockdown,capability\n"),
            fault("security modules"),
        ),
        (
            "lockdown",
            |m| m.write("sys/kernel/security/lockdown", "none integrity [confidentiality]\n"),
            warning("lockdown"),
        ),
        ("bpffs", |m| m.directory("sys/fs/bpf", 0o1777), warning("bpf file systems")),
        (
            "cgroups",
            |m| m.write("proc/self/mountinfo", "2 1 0:2 / /sys/fs/bpf rw - bpf bpf rw\n"),
            warning("cgroup v2"),
        ),
        (
            "users",
            |m| m.write("etc/systemd/system/bpfgate.service.d/x.conf", "[Service]\nPrivateUsers=yes\n"),
            fault("units"),
        ),
        (
            "filter",
            |m| {
                m.write(
                    "run/systemd/system/bpfgate-helper@.service.d/x.conf",
                    "[Service]\nSystemCallFilter=\n",
                );
            },
            warning("units"),
        ),
    ];
    for (name, change, expected) in cases {
        let machine = Root::good(name);
        change(&machine);
        assert_eq!(worse(&machine), expected, "{name}");
    }
}

#[test]
fn what_is_wrong_is_said_with_what_to_do() {
    let machine = Root::good("todo");
    machine.directory("sys/fs/bpf", 0o1777);
    machine
        .write("etc/systemd/system/bpfgate.service.d/x.conf", "# mine\n[Service]\nProtectProc=invisible\n");
    let ended = doctor(&machine, "");
    assert_eq!(ended.code, Some(1), "{ended:?}");
    for words in [
        "/sys/fs/bpf has mode 1777",
        "mount -o remount,mode=0700 /sys/fs/bpf",
        "/etc/systemd/system/bpfgate.service.d/x.conf:3 says ProtectProc=invisible",
        "take ProtectProc= out of /etc/systemd/system/bpfgate.service.d/x.conf:3",
    ] {
        assert!(ended.out.contains(words), "{words}: {ended:?}");
    }
    let nowhere =
        Command::new(bin_dir().join("bpfgate")).args(["doctor", "--root", "/nonexistent"]).output().unwrap();
    assert_eq!(nowhere.status.code(), Some(2));
}

#[test]
fn what_runs_is_looked_at() {
    needs_root!();
    let mut gate = Gate::start();
    gate.policy(
        "app",
        "{client}\n[objects.o]\n{object:minimal}\n[[objects.o.xdp]]\nprogram = \"pass\"\ninterfaces = [\"lo\"]\n",
    );
    let client = gate.session("app");
    let doctor = |gate: &Gate| {
        let mut command = Command::new(bin_dir().join("bpfgate"));
        let ended = Ended::of(command.args(["doctor", "--json"]).env("BPFGATE_SOCKET", gate.socket()));
        let value: Value =
            serde_json::from_str(&ended.out).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
        let line = |topic: &str| {
            let lines = value["lines"].as_array().unwrap();
            lines.iter().find(|line| line["topic"] == topic).unwrap_or_else(|| panic!("no {topic}")).clone()
        };
        // Other brokers may run on this machine.
        let pid = format!("process {}:", gate.broker.pid);
        assert!(!ended.out.contains(&pid), "{ended:?}");
        (line("broker"), line("landlock"), ended)
    };
    let [helper, loader, worker] = gate.helper("app");
    let ours = |ended: &Ended| {
        let named = |process: &Process| ended.out.contains(&format!("process {}:", process.pid));
        [&helper, &loader, &worker].map(named)
    };
    let (broker, landlock, ended) = doctor(&gate);
    assert_eq!((&broker["state"], ours(&ended)), (&"ok".into(), [false; 3]), "{ended:?}");
    // Broker and helpers run: it cannot be worse than they demand.
    assert_eq!(landlock["state"], "ok", "{landlock}");
    gate.edit("app", "nonsense");
    // What they may hold is not known any more.
    let (_, _, ended) = doctor(&gate);
    assert_eq!(ours(&ended), [true; 3], "{ended:?}");
    drop(client);
    gate.kill_broker();
    let (broker, _, ended) = doctor(&gate);
    assert_eq!((&broker["state"], ended.code), (&"fault".into(), Some(1)), "{broker}");
}
