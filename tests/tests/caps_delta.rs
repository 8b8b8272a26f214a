//! `bpfgate caps delta`, on unit files of prepared machines and on records of what a service asked for.

use bpfgate_tests::cli::Ended;
use bpfgate_tests::root::Root;
use bpfgate_tests::{bin_dir, bpf_object, gate, workspace};
use serde_json::{Value, json};
use std::fs;
use std::process::Command;

/// A machine with a service.
struct Machine(Root);

impl Machine {
    fn new(name: &str) -> Self {
        Self(Root::new(name))
    }

    fn write(&self, path: &str, text: &str) {
        self.0.write(path, text);
    }

    fn unit(&self, settings: &str) {
        self.write(
            "etc/systemd/system/meter.service",
            &format!("[Service]\nExecStart=/bin/meter\n{settings}"),
        );
    }

    /// Records of the service, and some of another.
    fn records(&self, records: &[(&str, &str, &str)]) {
        let mut text = String::new();
        for (cap, verdict, call) in records {
            let (syscall, bpf) = match call.strip_prefix("bpf ") {
                Some(kind) => ("bpf", json!({"command": "PROG_LOAD", "type": kind})),
                None => (*call, Value::Null),
            };
            let record = |unit: &str| {
                json!({
                    "time": 1_795_370_400.5, "cap": cap, "pid": 70, "tid": 71, "uid": 990, "comm": "meter",
                    "cgroup": format!("/system.slice/{unit}"), "unit": unit, "verdict": verdict,
                    "syscall": syscall, "bpf": bpf, "class": "need", "count": 3,
                })
            };
            let other = record("other.service").to_string().replace(cap, "CAP_MKNOD");
            text.extend([record("meter.service").to_string().as_str(), "\n", &other, "\n"]);
        }
        self.write("records", &text);
    }

    fn delta(&self, line: &str) -> Ended {
        self.0.cli(&["caps", "delta"], line)
    }

    fn json(&self, line: &str) -> Value {
        let ended = self.delta(&format!("{line} --json"));
        serde_json::from_str(&ended.out).unwrap_or_else(|error| panic!("{error}: {ended:?}"))
    }
}

const OBSERVED: &str = "meter.service --observed records";

/// Names by direction: missing, unused, had because of `CAP_SYS_ADMIN`, needed.
fn directions(value: &Value) -> [Vec<&str>; 4] {
    ["missing", "unused", "stands_in", "needed"].map(|key| {
        let findings = value[key].as_array().unwrap();
        findings.iter().map(|finding| finding["capability"].as_str().unwrap()).collect()
    })
}

#[test]
fn one_too_many_and_one_too_few_are_found_and_the_drop_in_mends_it() {
    let machine = Machine::new("service");
    machine.unit("User=meter\nAmbientCapabilities=CAP_NET_RAW CAP_CHOWN\nCapabilityBoundingSet=CAP_NET_RAW CAP_CHOWN\n");
    machine.records(&[
        ("CAP_NET_RAW", "granted", "socket"),
        ("CAP_NET_ADMIN", "denied", "setsockopt"),
        ("CAP_SYS_ADMIN", "harmless", "mmap"),
    ]);
    let value = machine.json(OBSERVED);
    assert_eq!(directions(&value), [vec!["CAP_NET_ADMIN"], vec!["CAP_CHOWN"], vec![], vec!["CAP_NET_RAW"]]);
    let evidence = "observed: 3 times refused in setsockopt of meter";
    assert_eq!(value["missing"][0]["evidence"], json!([evidence]));
    let table = machine.delta(OBSERVED);
    assert_eq!(table.code, Some(0), "{table:?}");
    assert_eq!(machine.delta(&format!("{OBSERVED} --check")).code, Some(1));
    let drop_in = value["drop_in"].as_str().unwrap();
    assert!(table.out.ends_with(drop_in), "{}", table.out);
    for words in [
        &format!("# CAP_NET_ADMIN (new): {evidence}\n"),
        "# CAP_CHOWN goes: not asked for in what was observed\n",
        "Observed: 9 checks of 1 process, 0 s from the first to the last; 0 of them are bookkeeping",
        "9 checks of other units were left out",
        "CapabilityBoundingSet=CAP_NET_ADMIN CAP_NET_RAW\nAmbientCapabilities=CAP_NET_ADMIN CAP_NET_RAW\n",
    ] {
        assert!(drop_in.contains(words), "{words}: {drop_in}");
    }
    machine.write("etc/systemd/system/meter.service.d/capabilities.conf", drop_in);
    let value = machine.json(OBSERVED);
    assert_eq!(directions(&value)[..3], [vec![], vec![], vec![] as Vec<&str>]);
    assert_eq!(value["drop_in"], Value::Null);
    let settled = machine.delta(&format!("{OBSERVED} --check"));
    assert_eq!(settled.code, Some(0));
    assert!(settled.out.ends_with("It is granted what it needs, and nothing else.\n"), "{settled:?}");
}

#[test]
fn sys_admin_is_replaced_by_what_it_stands_in_for() {
    let machine = Machine::new("admin");
    // As root, and with all but one capability by a list that says which not.
    machine.unit("CapabilityBoundingSet=CAP_SYS_ADMIN CAP_NET_RAW\nCapabilityBoundingSet=~CAP_NET_RAW\n");
    machine.records(&[
        ("CAP_BPF", "harmless", "bpf xdp"),
        ("CAP_NET_ADMIN", "harmless", "bpf xdp"),
        ("CAP_SYS_ADMIN", "granted", "bpf xdp"),
    ]);
    let value = machine.json(OBSERVED);
    assert_eq!(directions(&value), [vec![], vec![], vec!["CAP_NET_ADMIN", "CAP_BPF"], vec![]]);
    let drop_in = value["drop_in"].as_str().unwrap();
    assert!(drop_in.contains("# CAP_SYS_ADMIN goes: it stood in for CAP_NET_ADMIN CAP_BPF\n"), "{drop_in}");
    assert!(drop_in.ends_with("CapabilityBoundingSet=CAP_NET_ADMIN CAP_BPF\n"), "{drop_in}");
    // Nothing new is needed.
    assert_eq!(machine.delta(&format!("{OBSERVED} --check")).code, Some(0));
}

#[test]
fn the_helper_of_an_app_is_compared_with_its_policy() {
    let machine = Machine::new("app");
    let object = bpf_object("packet_counter");
    let policy = format!(
        "version = 1\n[objects.o]\npath = \"{}\"\nsha256 = \"{}\"\n[[objects.o.xdp]]\nprogram = \"count_packets\"\n\
         interfaces = [\"lo\"]\n",
        object.display(),
        gate::sha256(&object)
    );
    machine.write("etc/bpfgate/policies/flow.toml", &policy);
    let template = fs::read_to_string(workspace().join("systemd/units/bpfgate-helper@.service")).unwrap();
    machine.write("usr/lib/systemd/system/bpfgate-helper@.service", &template);
    let mut show = Command::new(bin_dir().join("bpfgate"));
    let generated = Ended::of(
        show.args(["policy", "show", "--unit", "etc/bpfgate/policies/flow.toml"])
            .current_dir(machine.0.path()),
    );
    assert_eq!(generated.code, Some(0), "{generated:?}");
    machine.write("run/systemd/generator/bpfgate-helper@flow.service.d/50-policy.conf", &generated.out);
    for what in ["flow", "bpfgate-helper@flow.service"] {
        let settled = machine.delta(&format!("{what} --check"));
        assert_eq!(settled.code, Some(0), "{settled:?}");
        assert!(settled.out.contains("It is granted what it needs, and nothing else."), "{settled:?}");
    }
    // One too many and one too few, by hand.
    let by_hand = "[Service]\nCapabilityBoundingSet=\nCapabilityBoundingSet=CAP_BPF CAP_SYS_PTRACE\n\
                   AmbientCapabilities=\nAmbientCapabilities=CAP_BPF CAP_SYS_PTRACE\n";
    machine.write("etc/systemd/system/bpfgate-helper@flow.service.d/60-mine.conf", by_hand);
    let value = machine.json("flow");
    assert_eq!(directions(&value), [vec!["CAP_NET_ADMIN"], vec!["CAP_SYS_PTRACE"], vec![], vec!["CAP_BPF"]]);
    // Nobody should write a drop-in against the generator's.
    assert_eq!(value["drop_in"], Value::Null);
    let ended = machine.delta("flow --check");
    assert_eq!(ended.code, Some(1));
    assert!(ended.out.contains("`bpfgate policy apply` writes it anew"), "{ended:?}");
    assert!(ended.out.contains("policy: load xdp program count_packets of object o"), "{ended:?}");
}

#[test]
fn what_cannot_be_compared_is_said() {
    let machine = Machine::new("errors");
    machine.unit("User=meter\n");
    let fails = |line: &str, code: i32, words: &str| {
        let ended = machine.delta(line);
        assert_eq!(ended.code, Some(code), "{ended:?}");
        assert!(ended.err.contains(words), "{ended:?}");
    };
    fails(
        "meter.service",
        2,
        "watch it with --observe 10min, or record it with `bpfgate caps trace --unit meter.service --json > FILE`",
    );
    fails("meter.service --observed records", 1, "records cannot be read");
    machine.write("records", "{\"cap\": \"CAP_BPF\"}\n");
    fails("meter.service --observed records", 1, "records:1 is no record of `bpfgate caps trace --json`");
    machine.write("records", "");
    fails("nosuch.service --observed records", 1, "there is no unit nosuch.service");
    fails("noapp", 1, "there is no policy of app noapp");
    machine.unit("CapabilityBoundingSet=CAP_NOSUCH\n");
    fails(
        "meter.service --observed records",
        1,
        "/etc/systemd/system/meter.service:3: CAP_NOSUCH is no capability",
    );
}
