//! `bpfgate caps show`, on the processes of a real broker and on others.

use bpfgate_protocol::demands;
use bpfgate_tests::cli::Ended;
use bpfgate_tests::process::{Role, number};
use bpfgate_tests::user::with_capabilities;
use bpfgate_tests::{Gate, SOON, STRANGER, bin_dir, needs_root, wait_until};
use serde_json::{Value, json};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::mpsc;

const XDP: &str = "{client}\n[objects.o]\n{object:minimal}\n[[objects.o.xdp]]\nprogram = \"pass\"\n\
                   interfaces = [\"lo\"]\nmode = \"generic\"\n[objects.o.maps]\ncounts = \"read-write\"\n";

/// The same with a program of a type that needs another capability.
const TRACEPOINT: &str = "{client}\n[objects.o]\n{object:minimal}\n[[objects.o.raw_tracepoint]]\nprogram = \"pass\"\n\
                          events = [\"sched_switch\"]\n";

/// As root, or as somebody who may do nothing.
fn show(line: &str) -> Ended {
    Ended::of(Command::new(bin_dir().join("bpfgate")).args(["caps", "show"]).args(line.split_whitespace()))
}

fn of_stranger(gate: &Gate, line: &str) -> Ended {
    Ended::of(&mut gate.cli(&STRANGER, &format!("caps show {line}")))
}

fn processes(ended: &Ended) -> Vec<Value> {
    serde_json::from_str(&ended.out).unwrap_or_else(|error| panic!("{error}: {ended:?}"))
}

/// What every child of this test has: in a container it is under filters already.
fn inherited() -> (&'static str, u64) {
    match number(std::process::id().cast_signed(), "Seccomp_filters") {
        0 => ("off", 0),
        filters => ("filter", filters),
    }
}

/// The process with this id: other brokers may run on this machine.
fn one(all: &[Value], pid: i32) -> &Value {
    all.iter().find(|process| process["pid"] == pid).unwrap_or_else(|| panic!("no process {pid}: {all:?}"))
}

#[test]
fn broker_helper_and_loader_hold_what_is_promised() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app-of-show", XDP);
    let client = gate.session("app-of-show");
    let [helper, loader, worker] = gate.helper("app-of-show");
    let none: [&str; 0] = [];
    // Whoever asks sees the same, although what they run is not told to others.
    for ended in [show("--json"), of_stranger(&gate, "--json")] {
        let all = processes(&ended);
        for (role, app, pid) in [
            ("broker", None, gate.broker.pid),
            ("helper", Some("app-of-show"), helper.pid),
            ("loader", Some("app-of-show"), loader.pid),
            ("worker", Some("app-of-show"), worker.pid),
            ("spawner", None, gate.find(&Role::Spawner).unwrap().pid),
        ] {
            let found = one(&all, pid);
            assert_eq!((&found["role"], found["app"].as_str()), (&json!(role), app));
            assert_eq!((&found["promise"], &found["why"]), (&json!("kept"), &json!([])));
            let thread = &found["threads"][0];
            let held = match role {
                "helper" => json!(["CAP_NET_ADMIN", "CAP_BPF"]),
                "spawner" => continue,
                _ => json!(none),
            };
            assert_eq!((&thread["permitted"], &thread["effective"]), (&held, &held), "{role}");
            for set in ["inheritable", "bounding", "ambient"] {
                assert_eq!(thread[set], json!(none), "{set} of {role}");
            }
            assert_eq!((&thread["no_new_privileges"], &thread["seccomp"]), (&json!(true), &json!("filter")));
            let filters = inherited().1 + if role == "worker" { 4 } else { 2 };
            assert_eq!(thread["seccomp_filters"], json!(filters), "{role}");
        }
    }
    let table = of_stranger(&gate, "app-of-show");
    let rows: Vec<Vec<&str>> = table.out.lines().map(|line| line.split_whitespace().collect()).collect();
    let (helper, filters) = (helper.pid.to_string(), (inherited().1 + 2).to_string());
    let expected = [
        "helper",
        "app-of-show",
        &helper,
        &helper,
        "bpfgate-helper",
        "CAP_NET_ADMIN",
        "CAP_BPF",
        "CAP_NET_ADMIN",
        "CAP_BPF",
        "none",
        "none",
        "none",
        "yes",
        &filters,
        "filters",
        "kept",
    ];
    assert!(rows.len() == 4 && rows.iter().any(|row| row[..] == expected), "{table:?}");
    drop(client);
}

#[test]
fn a_helper_that_holds_something_else_is_found() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app-of-show", XDP);
    let client = gate.session("app-of-show");
    let [helper, loader, _] = gate.helper("app-of-show");
    assert_eq!(show("app-of-show").code, Some(0));
    // The policy of now is not that of the helper's start.
    gate.edit("app-of-show", TRACEPOINT);
    let ended = show("app-of-show");
    assert_eq!(ended.code, Some(1), "{ended:?}");
    for words in [
        "its permitted set has CAP_NET_ADMIN, which it must not hold",
        "its effective set lacks CAP_PERFMON, which its policy needs",
    ] {
        assert!(ended.err.contains(words), "{ended:?}");
    }
    let all = processes(&show("app-of-show --json"));
    assert_eq!(one(&all, helper.pid)["promise"], json!("broken"));
    assert_eq!(one(&all, loader.pid)["promise"], json!("kept"));
    gate.edit("app-of-show", "[[client]]\nnonsense = 1\n");
    let ended = show("app-of-show --json");
    assert_eq!((ended.code, &processes(&ended)[0]["promise"]), (Some(1), &json!("unknown")), "{ended:?}");
    drop(client);
}

/// Ends with the test.
struct Sleeper(Child);

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A process that waits, once it is what its command says.
fn sleeper(command: &mut Command) -> Sleeper {
    let sleeper = Sleeper(command.spawn().expect("it starts"));
    let name = || std::fs::read_to_string(format!("/proc/{}/comm", sleeper.0.id())).unwrap_or_default();
    assert!(wait_until(SOON, || name() == "sleep\n"), "{}", name());
    sleeper
}

#[test]
fn of_any_other_process_the_sets_are_shown_and_nothing_is_promised() {
    needs_root!();
    let mut command = Command::new("setpriv");
    command.args([
        "--bounding-set=-all,+chown,+bpf",
        "--inh-caps=-all,+bpf",
        "--no-new-privs",
        "sleep",
        "60",
    ]);
    let process = sleeper(&mut command);
    let ended = show(&format!("{} --json", process.0.id()));
    let found = &ended.json()[0];
    assert_eq!((&found["role"], &found["promise"]), (&Value::Null, &Value::Null));
    let thread = &found["threads"][0];
    assert_eq!(thread["bounding"], json!(["CAP_CHOWN", "CAP_BPF"]));
    assert_eq!(thread["inheritable"], json!(["CAP_BPF"]));
    assert_eq!((&thread["no_new_privileges"], &thread["seccomp"]), (&json!(true), &json!(inherited().0)));
    // It says that it is the broker, and root sees that it is not.
    let impostor = sleeper(Command::new("sleep").arg0("bpfgate-broker").arg("60"));
    let ended = show(&format!("{} --json", impostor.0.id()));
    assert_eq!(ended.json()[0]["role"], Value::Null);
    assert_eq!(show("4194304").code, Some(1));
    assert_eq!(show("nosuch.service").code, Some(1));
    assert_eq!(show("no/app").code, Some(2));
}

#[test]
fn threads_that_differ_have_rows_of_their_own() {
    needs_root!();
    let rows = |words: &str| {
        let ended = show(&format!("{} {words}", std::process::id()));
        assert_eq!(ended.code, Some(0), "{ended:?}");
        ended.out.lines().count() - 1
    };
    let (before, threads) = (rows(""), rows("--threads"));
    let (ready, is_ready) = mpsc::channel();
    let (end, ends) = mpsc::channel::<()>();
    let other = std::thread::spawn(move || {
        with_capabilities(demands::BPF, move || {
            ready.send(()).unwrap();
            let _ = ends.recv();
        });
    });
    is_ready.recv().unwrap();
    // The thread that waits for it is as the others are.
    assert_eq!((rows(""), rows("--threads")), (before + 1, threads + 2));
    drop(end);
    other.join().unwrap();
}

#[test]
fn masks_are_decoded() {
    let ended = show("--decode 000000c001201106");
    let names = "CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_SETPCAP CAP_NET_ADMIN CAP_SYS_ADMIN CAP_SYS_RESOURCE \
                 CAP_PERFMON CAP_BPF\n";
    assert_eq!((ended.code, ended.out.as_str()), (Some(0), names));
    let value = show("--decode 0x8000000000000001 --json").json();
    assert_eq!(value, json!({"mask": "8000000000000001", "capabilities": ["CAP_CHOWN", "cap_63"]}));
    assert_eq!(show("--decode xyz").code, Some(2));
    assert_eq!(show("--decode 1 app").code, Some(2));
}
