//! Who a client is: what the kernel recorded when it connected, whatever it becomes, says, or hands on.

use bpfgate_client::Target;
use bpfgate_protocol::messages::SessionId;
use bpfgate_protocol::messages::helper::{Outcome, ToHelper, Verb};
use bpfgate_protocol::messages::{InstanceId, LinkId};
use bpfgate_protocol::refusal::Class;
use bpfgate_tests::cgroup::Cgroup;
use bpfgate_tests::cli::{Ended, Running};
use bpfgate_tests::gate::{MINIMAL, bin_dir};
use bpfgate_tests::peer::{Peer, client_of};
use bpfgate_tests::{
    Gate, Raw, SOON, STRANGER, USER, Who, as_user, needs_kernel, needs_root, sys, wait_until,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};

/// For whoever is named by `conditions`.
fn policy(conditions: &str) -> String {
    MINIMAL.replace("{client}", &format!("[[client]]\n{conditions}\nmay = [\"load\", \"attach\", \"maps\"]"))
}

fn may_open(raw: &mut Raw, app: &str) -> bool {
    raw.call("Open", &json!({ "app": app }))
        .map_err(|refused| assert_eq!(refused.error, "io.bpfgate.Denied"))
        .is_ok()
}

/// Whether a `bpfgate` that runs like this is let in.
fn is_let_in(command: &mut Command) -> bool {
    let ended = Ended::of(command);
    match ended.code {
        Some(0) => true,
        Some(1) if ended.err.contains("does not allow it") => false,
        _ => panic!("{ended:?}"),
    }
}

/// IDN-01, IDN-02, and a connection that was handed to somebody else: who connected counts, not who writes.
#[test]
fn who_connected_counts() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", MINIMAL);
    gate.policy("of-root", &policy("user = 0"));
    let before = gate.baseline();
    // This process is root, and writes on connections of others.
    let mut strangers = Raw::connect(&gate, &STRANGER);
    assert!(!may_open(&mut strangers, "of-root") && !may_open(&mut strangers, "app"));
    let mut users = Raw::connect(&gate, &USER);
    let given = as_user(&STRANGER, || may_open(&mut users, "app"));
    assert!(given, "the connection is the user's, whoever writes on it");
    drop((strangers, users));
    // Somebody who was root when connecting, and is not any more.
    let stream = std::os::unix::net::UnixStream::connect(gate.socket()).unwrap();
    let mut roots = Raw::on(stream);
    assert!(as_user(&STRANGER, || may_open(&mut roots, "of-root")));
    drop(roots);
    gate.invariants(&before);
}

/// IDN-07. Root is nobody special; numbers at the ends of the range are numbers; those for "no such id" are nobody's.
#[test]
fn ids_match_exactly_or_not_at_all() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", MINIMAL);
    gate.policy("high", &policy("user = 4294967294"));
    gate.policy("half", &policy("user = 2147483648"));
    gate.policy("group", &policy("group = 4294967294"));
    for never in ["user = 65534", "group = 65534", "user = 4294967295", "user = 4294967296", "user = -2"] {
        gate.policy("never", &policy(never));
        assert!(!may_open(&mut Raw::connect(&gate, &Who::new(65534)), "never"), "{never}");
    }
    let before = gate.baseline();
    for (who, app, fine) in [
        (Who::new(0), "app", false),
        (Who::new(u32::MAX - 1), "high", true),
        (Who::new(u32::MAX - 2), "high", false),
        (Who::new(1 << 31), "half", true),
        (Who::new((1 << 31) - 1), "half", false),
        (Who::new(65534), "app", false),
        (STRANGER.in_groups(&[u32::MAX - 1]), "group", true),
        (STRANGER.in_groups(&[65534, 12_345]), "group", false),
    ] {
        assert_eq!(may_open(&mut Raw::connect(&gate, &who), app), fine, "{who:?} {app}");
    }
    gate.invariants(&before);
}

/// IDN-13. Groups are those of the moment of connecting: dropped later they still count, joined later they do not.
#[test]
fn groups_are_those_of_the_connection() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", &policy("group = 23456"));
    let before = gate.baseline();
    let late = STRANGER.in_groups(&[23456]);
    let (mut member, mut other) = (Raw::connect(&gate, &late), Raw::connect(&gate, &STRANGER));
    assert!(as_user(&STRANGER, || may_open(&mut member, "app")), "the group was there");
    assert!(!as_user(&late, || may_open(&mut other, "app")), "the group came too late");
    // Both conditions of an entry have to hold.
    gate.policy("both", &policy("user = 12345\ngroup = 23456"));
    for (who, fine) in [(USER, false), (late, false), (USER.in_groups(&[23456]), true)] {
        assert_eq!(may_open(&mut Raw::connect(&gate, &who), "both"), fine, "{who:?}");
    }
    drop((member, other));
    gate.invariants(&before);
}

/// IDN-10, IDN-11. Namespaces change what a process calls itself, not who it is.
#[test]
fn a_client_in_namespaces_of_its_own_is_who_it_is_outside() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", MINIMAL);
    gate.policy("of-root", &policy("user = 0"));
    let before = gate.baseline();
    let cli = |who: &Who, unshare: &[&str], line: &str| {
        let program = gate.cli(who, line);
        let mut all: Vec<_> = program.get_args().map(std::ffi::OsStr::to_owned).collect();
        // setpriv ... -- unshare ... bpfgate ...
        let place = all.iter().position(|word| word == "--").expect("setpriv's end") + 1;
        all.splice(place..place, std::iter::once("unshare").chain(unshare.iter().copied()).map(Into::into));
        let mut command = Command::new(program.get_program());
        command.args(all).env("BPFGATE_SOCKET", gate.socket()).current_dir("/");
        command
    };
    let root_inside = ["--user", "--map-root-user"];
    assert!(is_let_in(&mut cli(&USER, &root_inside, "list app")));
    assert!(!is_let_in(&mut cli(&STRANGER, &root_inside, "list app")));
    assert!(
        !is_let_in(&mut cli(&USER, &root_inside, "list of-root")),
        "root of a user namespace is not root"
    );
    // Nobody is mapped: inside it is 65534.
    assert!(is_let_in(&mut cli(&USER, &["--user"], "list app")));
    let all = [
        "--user",
        "--map-root-user",
        "--pid",
        "--fork",
        "--kill-child",
        "--net",
        "--mount",
        "--uts",
        "--ipc",
    ];
    assert!(is_let_in(&mut cli(&USER, &all, "list app")));
    // Its interfaces are of another namespace; a name means the helper's.
    let line = format!("load app o --attach pass={} --json", bpfgate_tests::gate::INTERFACE);
    let mut load = cli(&USER, &all, &line);
    let child = load.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let running = Running(child);
    let attached = || {
        gate.audit_of("app").iter().any(|record| record["verb"] == "Attach" && record["verdict"] == "allowed")
    };
    assert!(wait_until(5 * SOON, attached), "{:?}", gate.audit_of("app"));
    gate.send_packets(1);
    drop(running);
    gate.invariants(&before);
}

/// IDN-08, and a client that is dead before it is let in: it is nobody else, and costs nothing.
#[test]
fn clients_that_die_early_leave_nothing() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", MINIMAL);
    let before = gate.baseline();
    let open = bpfgate_tests::raw::frame("Open", &json!({"app": "app"}));
    for round in 0..300 {
        let mut raw = Raw::connect(&gate, &USER);
        if round % 3 > 0 {
            raw.send(&open).unwrap();
        }
        if round % 3 > 1 {
            raw.send(&bpfgate_tests::raw::frame("Load", &json!({"object": "o"}))).unwrap();
        }
    }
    // The broker stands still while they come and go.
    kill(Pid::from_raw(gate.broker.pid), Signal::SIGSTOP).unwrap();
    for _ in 0..32 {
        Raw::connect(&gate, &USER).send(&open).unwrap();
        Raw::connect(&gate, &STRANGER).send(&open).unwrap();
    }
    kill(Pid::from_raw(gate.broker.pid), Signal::SIGCONT).unwrap();
    gate.invariants(&before);
    for record in gate.audit() {
        let allowed = record["verdict"] == "allowed";
        assert!(!allowed || record["uid"] == 12_345 || record["uid"] == 12_346, "{record}");
    }
}

/// IDN-14. Sockets have paths, whose directory says who may make them.
#[test]
fn nothing_listens_without_a_path() {
    needs_root!();
    let gate = Gate::start();
    let _session = {
        gate.policy("app", MINIMAL);
        gate.session("app")
    };
    let sockets = gate.inside("cat").arg("/proc/net/unix").output().unwrap();
    let sockets = String::from_utf8(sockets.stdout).unwrap();
    assert!(sockets.lines().count() > 3, "{sockets}");
    assert!(!sockets.lines().any(|line| line.contains(" @")), "{sockets}");
}

/// IDN-16. What a service manager hands over has to be what it should be.
#[test]
fn a_broker_takes_only_a_listening_socket() {
    needs_root!();
    let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let datagram = std::os::unix::net::UnixDatagram::unbound().unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    let broker = bpfgate_tests::gate::inherited(&bin_dir().join("bpfgate-broker"));
    for (name, fd) in [
        ("a connected socket", OwnedFd::from(one)),
        ("a datagram socket", OwnedFd::from(datagram)),
        ("a file", OwnedFd::from(file)),
    ] {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=12345", "--regid=12345", "--clear-groups", "/bin/sh", "-c"]);
        command.arg("LISTEN_PID=$$ exec \"$0\"");
        command.arg(&broker);
        command.env("LISTEN_FDS", "1").env("LISTEN_FDNAMES", "clients");
        sys::as_descriptor_3(&mut command, fd.as_fd());
        let ended = Ended::of(&mut command);
        assert_eq!(ended.code, Some(1), "{name}: {ended:?}");
        assert!(ended.err.contains("socket"), "{name}: {ended:?}");
    }
}

/// The cgroup of a service is where the service manager runs its processes and nobody else can. Its own members are
/// let in; neighbours, processes of groups below it, and those that only were there before are not.
#[test]
fn a_unit_is_its_own_cgroup() {
    needs_root!();
    needs_kernel!(6, 13, "PIDFD_GET_INFO");
    let unit = format!("bpfgate-test-{}.service", std::process::id());
    let (ours, other) = (Cgroup::of_service(&unit), Cgroup::of_service(&format!("not-{unit}")));
    let gate = Gate::start();
    gate.policy("app", &policy(&format!("unit = \"{unit}\"")));
    gate.policy("both", &policy(&format!("user = 12345\nunit = \"{unit}\"")));
    gate.policy("elsewhere", &policy(&format!("unit = \"{unit}\"\nslice = \"elsewhere.slice\"")));
    let before = gate.baseline();
    let list = |who: &Who, app: &str| gate.cli(who, &format!("list {app}"));
    assert!(is_let_in(&mut ours.inside(&list(&USER, "app"))));
    assert!(is_let_in(&mut ours.inside(&list(&STRANGER, "app"))));
    assert!(is_let_in(&mut ours.inside(&list(&USER, "both"))));
    assert!(!is_let_in(&mut ours.inside(&list(&STRANGER, "both"))));
    assert!(!is_let_in(&mut ours.inside(&list(&USER, "elsewhere"))));
    assert!(!is_let_in(&mut other.inside(&list(&USER, "app"))));
    assert!(!is_let_in(&mut list(&USER, "app")));
    let record = gate.audit_of("app").into_iter().find(|record| record["verdict"] == "allowed").unwrap();
    assert_eq!(record["by"].as_str().unwrap().rsplit(':').next(), Some("3"), "{record}");
    // Whoever is refused is recorded with its unit too.
    let mut refused = gate.audit_of("app").into_iter().filter(|record| record["verdict"] == "Denied");
    let unit_of = |record: serde_json::Value| record["unit"].as_str().map(str::to_owned);
    assert_eq!(refused.next().and_then(unit_of), Some(format!("not-{unit}")));
    // What a service makes below itself is not the service.
    let below = Cgroup::below(&ours);
    assert!(!is_let_in(&mut below.inside(&list(&USER, "app"))));
    drop(below);
    gate.invariants(&before);
}

/// Connects, and leaves the connection to a child.
const CONNECT: &str = "
import os, socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
if os.fork():
    os._exit(0)
os.read(0, 1)
for app in sys.argv[2:]:
    s.sendall(b'{\"method\":\"io.bpfgate.Open\",\"parameters\":{\"app\":\"%s\"}}\\0' % app.encode())
    answer = s.recv(65536)
    print('denied' if b'io.bpfgate.Denied' in answer else 'opened' if b'error' not in answer else answer)
";

/// IDN-04, IDN-05. The process that connected has ended: its user counts, its unit cannot be told any more, and nobody
/// looks at whoever has its pid now.
#[test]
fn the_unit_of_a_process_that_has_ended_is_unknown() {
    needs_root!();
    needs_kernel!(6, 13, "PIDFD_GET_INFO");
    let unit = format!("bpfgate-test-{}.service", std::process::id());
    let ours = Cgroup::of_service(&unit);
    let gate = Gate::start();
    gate.policy("by-unit", &policy(&format!("unit = \"{unit}\"")));
    gate.policy("by-user", MINIMAL);
    let before = gate.baseline();
    let mut python = gate.unprivileged(&USER, std::path::Path::new("/usr/bin/python3"));
    python.args(["-c", CONNECT]).arg(gate.socket()).args(["by-unit", "by-user"]);
    let mut command = ours.inside(&python);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    // The one that connected ends first; its child is told then.
    child.wait().unwrap();
    drop(child.stdin.take());
    let mut said = String::new();
    std::io::Read::read_to_string(&mut child.stdout.take().unwrap(), &mut said).unwrap();
    assert_eq!(said, "denied\nopened\n", "{}", gate.log());
    let why = gate.audit_of("by-unit").pop().unwrap()["why"].clone();
    assert!(why.as_str().unwrap().contains("its process has ended"), "{why}");
    gate.invariants(&before);
}

const OWN: &str = r#"
{client}
[objects.o]
{object:cgroup}
[[objects.o.cgroup_skb]]
program = "on_egress"
direction = "egress"
cgroups = ["own"]
[objects.o.maps]
counts = "frozen"
"#;

/// `own` is the cgroup of the unit that the policy names the client by: its packets are counted, and no others.
#[test]
fn own_is_the_cgroup_of_the_clients_unit() {
    needs_root!();
    needs_kernel!(6, 13, "PIDFD_GET_INFO");
    let unit = format!("bpfgate-test-{}.service", std::process::id());
    let ours = Cgroup::of_service(&unit);
    let gate = Gate::start();
    let own = |conditions: &str| {
        OWN.replace("{client}", &format!("[[client]]\n{conditions}\nmay = [\"load\", \"attach\", \"maps\"]"))
    };
    gate.policy("app", &own(&format!("unit = \"{unit}\"")));
    gate.policy(
        "two",
        &(own(&format!("unit = \"{unit}\"")) + "[[client]]\nuser = 12345\nmay = [\"load\", \"attach\"]\n"),
    );
    let before = gate.baseline();
    let mut cli = ours.inside(&gate.cli(&USER, "load app o --attach on_egress=cgroup:own --json"));
    let cli = cli.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut running = Running(cli.spawn().unwrap());
    let mut out = std::io::BufReader::new(running.0.stdout.take().unwrap());
    let loaded: serde_json::Value =
        serde_json::Deserializer::from_reader(&mut out).into_iter().next().unwrap().unwrap();
    let send = "for i in 1 2 3; do echo x > /dev/udp/127.0.0.1/9; done";
    let bash = |command: &mut Command| assert!(command.status().unwrap().success());
    let mut talk = gate.inside("/bin/bash");
    talk.args(["-c", send]);
    bash(&mut talk);
    bash(&mut ours.inside(&talk));
    let instance = loaded["instance"].as_u64().unwrap();
    let dump = gate.cli(&USER, &format!("map dump app {instance} counts --format u64 --json"));
    let dumped = Ended::of(&mut ours.inside(&dump)).json();
    assert!(dumped.to_string().contains('3') && !dumped.to_string().contains('6'), "{dumped}");
    running.signal(Signal::SIGTERM);
    assert_eq!(running.end().0, Some(0));
    // A client that is there by its user has no cgroup of its own.
    let ended = Ended::of(&mut gate.cli(&USER, "load two o --attach on_egress=cgroup:own"));
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let why = gate.audit_of("two").pop().unwrap()["why"].clone();
    assert!(why.as_str().unwrap().contains("by its unit"), "{why}");
    gate.invariants(&before);
}

/// Connects, and stays.
const STAY: &str =
    "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); sys.stdin.read()";

/// A broker that lies about a cgroup is not believed: the helper compares what it is given with what the kernel says.
#[test]
fn a_broker_cannot_give_another_cgroup() {
    needs_root!();
    needs_kernel!(6, 13, "PIDFD_GET_INFO");
    let unit = format!("bpfgate-test-{}.service", std::process::id());
    let (ours, other) = (Cgroup::of_service(&unit), Cgroup::of_service(&format!("not-{unit}")));
    let gate = Gate::start();
    let text = OWN.replace(
        "{client}",
        &format!("[[client]]\nunit = \"{unit}\"\nmay = [\"load\", \"attach\", \"maps\"]"),
    );
    gate.policy("app", &text);
    let mut peer = Peer::start(&gate, "app");
    // Nor another client: the helper asks the kernel itself.
    let (_outside, server) = client_of(&gate, &USER);
    let refusal = peer.refused(&ToHelper::Open { session: SessionId(1) }, Some(server.as_fd()));
    assert_eq!(refusal.class, Class::Denied, "{refusal}");
    let client = peer.session_by(&gate, 2, |path| {
        let mut python = gate.unprivileged(&USER, std::path::Path::new("/usr/bin/python3"));
        let mut inside = ours.inside(python.args(["-c", STAY]).arg(path));
        Running(inside.stdin(Stdio::piped()).spawn().unwrap())
    });
    let load = Verb::Load { object: "o".parse().unwrap(), programs: Vec::new(), globals: Vec::new() };
    let (outcome, _) = peer.ask(&ToHelper::Ask { session: SessionId(2), verb: load }, None);
    assert!(matches!(outcome, Outcome::Loaded { .. }), "{outcome:?}");
    let attach = ToHelper::Ask {
        session: SessionId(2),
        verb: Verb::Attach {
            instance: InstanceId(1),
            program: "on_egress".parse().unwrap(),
            hook: None,
            target: bpfgate_protocol::messages::helper::Target::Own,
        },
    };
    let root = ours.path.parent().unwrap().parent().unwrap();
    for wrong in [other.path.as_path(), root, ours.path.parent().unwrap(), std::path::Path::new("/")] {
        let fd = std::fs::File::open(wrong).unwrap();
        let refusal = peer.refused(&attach, Some(fd.as_fd()));
        assert!(refusal.why.contains("is not there"), "{}: {refusal}", wrong.display());
    }
    let fd = std::fs::File::open(&ours.path).unwrap();
    let (outcome, _) = peer.ask(&attach, Some(fd.as_fd()));
    assert!(matches!(outcome, Outcome::Attached { link: LinkId(1), .. }), "{outcome:?}");
    drop(client);
}

/// The client library and the command line mean the same.
#[test]
fn the_word_for_it_is_own() {
    let word: bpfgate_client::TargetWord = "cgroup:own".parse().unwrap();
    assert_eq!(word.for_program("cgroup_skb"), Target::Cgroup("own".to_owned()));
}
