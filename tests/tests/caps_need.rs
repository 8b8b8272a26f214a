//! What `bpfgate caps need` says, against what the running kernel demands.

use bpfgate_protocol::demands;
use bpfgate_tests::cli::Ended;
use bpfgate_tests::demands::{Measured, map_row, maps, markdown, names, program_row, programs};
use bpfgate_tests::user::with_capabilities;
use bpfgate_tests::{bin_dir, bpf_object, needs_root, workspace};
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// Where anybody may load socket filters the kernel does not ask for `CAP_BPF` where the table says so.
fn asks() -> bool {
    let value = fs::read_to_string("/proc/sys/kernel/unprivileged_bpf_disabled").unwrap_or_default();
    let asks = !matches!(value.trim(), "" | "0");
    if !asks {
        println!("skipped: unprivileged_bpf_disabled is not set, so the kernel asks for less");
    }
    asks
}

/// Compares; the number of types that the kernel could say something about.
fn compare<'a>(all: impl Iterator<Item = (&'a str, demands::Mask, Measured)>) -> usize {
    let mut measured = 0;
    for (name, demanded, said) in all {
        match said {
            Measured::Exactly(mask) => {
                assert_eq!(names(mask), names(demanded), "{name}");
                measured += 1;
            }
            Measured::Not(errno) => println!("skipped: {name} cannot be made on this machine: {errno}"),
        }
    }
    measured
}

#[test]
fn each_type_of_program_takes_exactly_what_the_table_says() {
    needs_root!();
    if !asks() {
        return;
    }
    let count = compare(programs().into_iter().map(|(row, said)| (row.name, row.load, said)));
    // A kernel with next to nothing configured still has these.
    assert!(count >= 15, "{count} types were measured");
}

#[test]
fn each_type_of_map_takes_exactly_what_the_table_says() {
    needs_root!();
    if !asks() {
        return;
    }
    let all = maps();
    let count = compare(all.iter().map(|(row, said)| (row.name.as_str(), row.create, *said)));
    assert!(count >= 20, "{count} types were measured");
}

/// The harness itself: what it calls exact is not what a thread has anyway.
#[test]
fn threads_hold_exactly_what_they_are_given() {
    needs_root!();
    let held = |mask| {
        with_capabilities(mask, || {
            let status = fs::read_to_string("/proc/thread-self/status").unwrap();
            let field = |name: &str| {
                status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned()
            };
            (field("CapEff:"), field("CapPrm:"), field("Uid:"))
        })
    };
    let (effective, permitted, uid) = held(demands::BPF | demands::NET_ADMIN);
    assert_eq!((effective.as_str(), permitted.as_str()), ("0000008000001000", "0000008000001000"));
    assert!(uid.starts_with("65534\t65534"), "{uid}");
    assert_eq!(held(0).0, "0000000000000000");
}

fn need(arguments: &[&str]) -> Ended {
    Ended::of(Command::new(bin_dir().join("bpfgate")).args(["caps", "need"]).args(arguments))
}

#[test]
fn objects_and_policies_are_looked_up_in_that_table() {
    for (object, expected) in [
        ("packet_counter", vec!["CAP_NET_ADMIN", "CAP_BPF"]),
        ("exec_tracer", vec!["CAP_PERFMON", "CAP_BPF"]),
        ("sockfilter", vec!["CAP_BPF"]),
        ("cgroup", vec!["CAP_NET_ADMIN", "CAP_BPF"]),
        ("uprobe", vec!["CAP_PERFMON", "CAP_BPF"]),
    ] {
        let path = bpf_object(object);
        let value = need(&[path.to_str().unwrap(), "--kernel", "6.6", "--json"]).json();
        assert_eq!(value["capabilities"], json!(expected), "{object}");
    }
    let object = bpf_object("exec_tracer");
    let value = need(&[object.to_str().unwrap(), "--json"]).json();
    let reasons: Vec<&Value> = value["needs"].as_array().unwrap().iter().map(|need| &need["why"]).collect();
    assert!(reasons.contains(&&json!("program on_exec is a tracepoint program")), "{reasons:?}");
    assert_eq!(value["host"].as_array().map(Vec::len), Some(3), "{value}");
    let old = need(&[object.to_str().unwrap(), "--kernel", "5.4", "--json"]).json();
    assert_eq!(old["capabilities"], json!(["CAP_SYS_ADMIN"]));
    let policy = workspace().join("policies/exec-tracer.toml");
    let table = need(&[policy.to_str().unwrap()]);
    assert_eq!(table.code, Some(0), "{table:?}");
    assert!(table.out.contains("CAP_PERFMON  load tracepoint program on_exec of object tracer"), "{table:?}");
    assert_eq!(need(&["nosuchapp"]).code, Some(1));
    assert_eq!(need(&["Cargo.toml.o"]).code, Some(1));
    assert_eq!(need(&["x", "--kernel", "new"]).code, Some(2));
}

const BEGIN: &str = "<!-- capabilities: written by make caps-table -->\n";
const END: &str = "<!-- end -->\n";

fn guide() -> PathBuf {
    workspace().join("docs/capabilities.md")
}

#[test]
#[ignore = "writes what the others check: make caps-table"]
fn write() {
    let text = fs::read_to_string(guide()).unwrap();
    let (before, rest) = text.split_once(BEGIN).expect("the mark where the tables begin");
    let (_, after) = rest.split_once(END).expect("the mark where they end");
    fs::write(guide(), format!("{before}{BEGIN}\n{}\n{END}{after}", markdown())).unwrap();
}

/// What was measured on another kernel stands there as it was; what this one says was compared above.
#[test]
fn the_tables_of_the_guide_are_these() {
    let text = fs::read_to_string(guide()).unwrap();
    let table = text.split_once(BEGIN).and_then(|(_, rest)| rest.split_once(END)).expect("both marks").0;
    let rows: Vec<&str> = table.lines().filter(|line| line.starts_with("| ")).collect();
    let expected: Vec<String> =
        demands::PROGRAMS.iter().map(program_row).chain(demands::maps().map(|row| map_row(&row))).collect();
    // Two headings.
    assert_eq!(rows.len(), expected.len() + 2, "run: make caps-table");
    for row in expected {
        let is_there = rows.iter().any(|line| line.starts_with(&row));
        assert!(is_there, "the guide has no row {row}; run: make caps-table");
    }
}
