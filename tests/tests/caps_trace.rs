//! `bpfgate caps trace`: a program that makes checks on purpose, and what the trace says of them.
//!
//! Only the cgroups and processes of these tests are traced: the kernel looks at nothing else. The program is this test
//! itself, started anew as [`program`].

use bpfgate_client::LoadOptions;
use bpfgate_protocol::policy::Machine;
use bpfgate_tests::cgroup::Cgroup;
use bpfgate_tests::cli::Ended;
use bpfgate_tests::gate::sha256;
use bpfgate_tests::invariants::Baseline;
use bpfgate_tests::user::in_thread;
use bpfgate_tests::{Gate, STRANGER, USER, Who, bin_dir, needs_root, process, sys, wait_until, workspace};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, SFlag, mknod};
use nix::unistd::{Pid, chroot, gettid};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Barrier;
use std::time::Duration;

/// What the program is to do, in its environment.
const DO: &str = "BPFGATE_TEST_CHECKS";
/// The directory in which it does it.
const WHERE: &str = "BPFGATE_TEST_DIRECTORY";
/// Checks of a burst.
const BURST: u64 = 1_000_000;
/// Threads that make one check each: more than the table in the kernel has entries.
const CROWD: u64 = 20_000;
/// The user who may do nothing.
const NOBODY: u32 = 23_456;

/// An app whose object is relocated by the types of the kernel, which are some megabytes.
const OF_KERNEL_TYPES: &str = "{client}\n[objects.o]\n{object:minimal_btf}\n[[objects.o.raw_tracepoint]]\n\
                               program = \"on_exit\"\nevents = [\"sched_process_exit\"]\n";

/// The capabilities that are asked for, by number.
const CHOWN: u64 = 0;
const FSETID: u64 = 4;
const KILL: u64 = 5;
const SYS_CHROOT: u64 = 18;
const SYS_ADMIN: u64 = 21;
const BPF: u64 = 39;

/// Not a test: the program that is traced. It says its thread ids, waits for a line, and makes its checks.
#[test]
fn program() {
    let Some(what) = std::env::var_os(DO) else { return };
    let place = std::env::var_os(WHERE).expect("a directory");
    let place = Path::new(&place);
    let wait = || {
        let mut line = String::new();
        std::io::stdin().read_line(&mut line).expect("a line");
    };
    let nobody = || sys::become_user(NOBODY, NOBODY, &[]).expect("a test as root may become anybody");
    match what.to_str().expect("text") {
        "sequence" => {
            let (ready, go) = (Barrier::new(2), Barrier::new(2));
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    nobody();
                    println!("\ntid {}", gettid());
                    ready.wait();
                    go.wait();
                    assert!(std::os::unix::fs::chown(place.join("roots"), Some(NOBODY), None).is_err());
                    assert!(kill(Pid::from_raw(1), None).is_err());
                    assert!(sys::load_filter().is_err());
                    // Its group is not ours: the bit is taken away, and the call succeeds.
                    let mine = place.join("mine");
                    fs::set_permissions(&mine, Permissions::from_mode(0o2755)).expect("it is ours");
                    assert_eq!(fs::metadata(&mine).expect("it is there").mode() & 0o7777, 0o755);
                });
                ready.wait();
                println!("\ntid {}", gettid());
                wait();
                for _ in 0..3 {
                    chroot("/").expect("root may");
                }
                go.wait();
            });
        }
        "burst" => in_thread(|| {
            nobody();
            println!("\ntid {}", gettid());
            wait();
            for _ in 0..BURST {
                let _ = kill(Pid::from_raw(1), None);
            }
        }),
        "crowd" => in_thread(|| {
            nobody();
            println!("\ntid {}", gettid());
            wait();
            for _ in 0..CROWD {
                in_thread(|| kill(Pid::from_raw(1), None).expect_err("nobody may"));
            }
        }),
        other => panic!("{other}?"),
    }
}

/// The program, waiting for its signal.
struct Traced {
    child: Child,
    stdin: ChildStdin,
    /// In the order in which it said them.
    tids: Vec<u64>,
}

impl Traced {
    fn start(cgroup: &Cgroup, what: &str, place: &Path, threads: usize) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this test"));
        command.args(["--exact", "program", "--nocapture"]).env(DO, what).env(WHERE, place);
        let mut command = cgroup.inside(&command);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("sh is there");
        let stdin = child.stdin.take().expect("a pipe");
        let mut out = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        let mut tids = Vec::new();
        while tids.len() < threads {
            let line = out.next().expect("it goes on").expect("text");
            tids.extend(line.strip_prefix("tid ").map(|tid| tid.parse::<u64>().expect("a number")));
        }
        // What else it says is read, so that it does not wait for a reader.
        std::thread::spawn(move || out.for_each(drop));
        Self { child, stdin, tids }
    }

    fn pid(&self) -> u64 {
        self.child.id().into()
    }

    /// Has it make its checks, and waits for its end.
    fn go(mut self) {
        self.stdin.write_all(b"\n").expect("it waits");
        assert!(self.child.wait().expect("it is ours").success());
    }
}

/// A running trace.
struct Trace {
    child: Child,
    err: BufReader<std::process::ChildStderr>,
    lines: std::thread::JoinHandle<Vec<Value>>,
}

impl Trace {
    /// Starts one, and waits until it traces.
    fn start(command: &mut Command) -> Self {
        Self::try_start(command).unwrap_or_else(|said| panic!("{said}"))
    }

    /// The same; or what it says instead.
    fn try_start(command: &mut Command) -> Result<Self, String> {
        let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("setpriv is there");
        let out = BufReader::new(child.stdout.take().expect("a pipe"));
        let lines = std::thread::spawn(move || {
            out.lines().map(|line| serde_json::from_str(&line.expect("text")).expect("JSON")).collect()
        });
        let mut err = BufReader::new(child.stderr.take().expect("a pipe"));
        let mut line = String::new();
        err.read_line(&mut line).expect("text");
        if line.starts_with("bpfgate: tracing by ") {
            println!("{}", line.trim());
            return Ok(Self { child, err, lines });
        }
        err.read_to_string(&mut line).expect("text");
        assert!(!child.wait().expect("it is ours").success(), "{line}");
        Err(line)
    }

    /// Ends it; gives what it saw, and what it said of that.
    fn end(mut self) -> (Vec<Value>, String) {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM).expect("it is ours");
        let mut said = String::new();
        self.err.read_to_string(&mut said).expect("text");
        assert!(self.child.wait().expect("it is ours").success(), "{said}");
        let mut lines = self.lines.join().expect("its output is JSON");
        let last = lines.pop().expect("a line about the whole");
        assert_eq!(last["checks"].as_u64(), Some(number(&said, "checks,")), "{said}");
        assert_eq!(said.contains("none lost"), last["lost"] == 0, "{said} {last}");
        (lines, said)
    }
}

/// The policy as it is shipped, but for the path and the digest of its object.
fn install(gate: &Gate) {
    let text = fs::read_to_string(workspace().join("policies/shipped/cap-trace.toml")).expect("the policy");
    let object = gate.object("cap_trace");
    let path = text.replace("/usr/lib/bpfgate/cap_trace.bpf.o", object.to_str().expect("text"));
    let text = path.replace(&"0".repeat(64), &sha256(&object));
    fs::write(gate.policy_path("cap-trace"), text).expect("a policy");
    gate.reload();
}

/// Somebody in the group adm.
fn watcher() -> Who {
    let adm = nix::unistd::Group::from_name("adm").expect("/etc/group").expect("Debian has it");
    USER.in_groups(&[adm.gid.as_raw()])
}

fn sum<'a>(checks: impl IntoIterator<Item = &'a Value>) -> u64 {
    checks.into_iter().map(|check| check["count"].as_u64().expect("a number")).sum()
}

/// The number before a word in the line at the end.
fn number(said: &str, before: &str) -> u64 {
    let words: Vec<&str> = said.lines().last().unwrap_or_default().split(' ').collect();
    let place =
        words.windows(before.split(' ').count()).position(|words| words.join(" ").starts_with(before));
    place.and_then(|place| words[place - 1].parse().ok()).unwrap_or_else(|| panic!("no {before:?} in {said}"))
}

/// A broker whose policies let a [`watcher`] trace, a cgroup for what is traced, and how things were before.
struct Place {
    gate: Gate,
    cgroup: Cgroup,
    before: Baseline,
}

impl Place {
    fn new() -> Self {
        let gate = Gate::start();
        install(&gate);
        // Files for the sequence: one that is root's, one that is not.
        for (name, owner) in [("roots", 0), ("mine", NOBODY)] {
            let path = gate.dir.join(name);
            mknod(&path, SFlag::S_IFREG, Mode::from_bits_truncate(0o644), 0).expect("a file");
            std::os::unix::fs::chown(&path, Some(owner), Some(0)).expect("root may");
        }
        let before = gate.baseline();
        Self { gate, cgroup: Cgroup::new(), before }
    }

    /// The program in its cgroup, before it does `what`.
    fn program(&self, what: &str, threads: usize) -> Traced {
        Traced::start(&self.cgroup, what, &self.gate.dir, threads)
    }

    /// The words for the cgroup as what is traced.
    fn unit(&self) -> String {
        format!("--unit {}", self.cgroup.path.display())
    }

    /// The command with these words.
    fn command(&self, scope: &str) -> Command {
        self.gate.cli(&watcher(), &format!("caps trace {scope} --json --stacks"))
    }

    fn trace(&self, scope: &str) -> Trace {
        Trace::start(&mut self.command(scope))
    }

    /// Nothing is left of it.
    fn end(self) {
        drop(self.cgroup);
        self.gate.invariants(&self.before);
    }
}

/// How often there was a check for this capability.
fn count(checks: &[Value], capability: u64) -> u64 {
    sum(checks.iter().filter(|check| check["number"] == capability))
}

#[test]
fn every_check_is_seen_with_its_thread_and_verdict_and_none_is_invented() {
    needs_root!();
    let place = Place::new();
    let traced = place.program("sequence", 2);
    let [nobody, root] = traced.tids[..] else { panic!("two threads") };
    let pid = traced.pid();
    let trace = place.trace(&place.unit());
    traced.go();
    let (checks, said) = trace.end();

    assert_eq!(number(&said, "checks,"), sum(&checks), "{said}");
    assert!(said.contains("none lost"), "{said}");
    let id = fs::metadata(&place.cgroup.path).unwrap().ino();
    let name = place.cgroup.path.file_name().unwrap().to_str().unwrap();
    for check in &checks {
        assert_eq!((check["pid"].as_u64(), check["cgroup_id"].as_u64()), (Some(pid), Some(id)), "{check}");
        assert_eq!(
            (check["unit"].as_str(), check["userns"].as_u64()),
            (Some(name), Some(0xefff_fffd)),
            "{check}"
        );
        assert!(!check["stack"].as_array().unwrap().is_empty(), "{check}");
        let user = if check["tid"] == nobody { NOBODY } else { 0 };
        assert_eq!(check["uid"], user, "{check}");
    }
    // What is no accounting of memory is exactly what the program did.
    let (memory, checks): (Vec<Value>, Vec<Value>) = checks
        .into_iter()
        .partition(|check| check["stack"][0].as_str().unwrap().contains("vm_enough_memory"));
    for check in memory {
        assert_eq!(
            (&check["class"], &check["number"]),
            (&json!("bookkeeping"), &json!(SYS_ADMIN)),
            "{check}"
        );
        assert_eq!(check["audit"], json!(false), "{check}");
    }
    let mut seen: BTreeMap<(u64, u64, String, String, String), u64> = BTreeMap::new();
    for check in &checks {
        let text = |name: &str| check[name].as_str().unwrap_or("-").to_owned();
        let bpf = match &check["bpf"] {
            Value::Null => String::new(),
            bpf => format!("{} {}", bpf["command"].as_str().unwrap(), bpf["type"].as_str().unwrap_or("?")),
        };
        let number = check["number"].as_u64().unwrap();
        let key = (check["tid"].as_u64().unwrap(), number, text("verdict"), text("syscall"), bpf);
        *seen.entry(key).or_default() += check["count"].as_u64().unwrap();
        // Setting a bit that is then taken away is nobody's need.
        let class = if number == FSETID { "bookkeeping" } else { "need" };
        assert_eq!((&check["class"], &check["audit"]), (&json!(class), &json!(true)), "{check}");
    }
    let (chown, chmod) = ("chown", "chmod");
    let loads = "PROG_LOAD socket_filter";
    let expected = [
        (root, SYS_CHROOT, "granted", "chroot", ""),
        (nobody, CHOWN, "denied", chown, ""),
        (nobody, KILL, "denied", "kill", ""),
        (nobody, BPF, "denied", "bpf", loads),
        (nobody, SYS_ADMIN, "denied", "bpf", loads),
        (nobody, FSETID, "harmless", chmod, ""),
    ];
    // The C library of other machines has fchownat and fchmodat alone.
    let same = |name: &str| name.trim_start_matches('f').trim_end_matches("at").to_owned();
    let mut all: Vec<_> =
        seen.keys().map(|(t, c, v, s, b)| (*t, *c, v.clone(), same(s), b.clone())).collect();
    let mut wanted: Vec<_> =
        expected.iter().map(|(t, c, v, s, b)| (*t, *c, (*v).to_owned(), same(s), (*b).to_owned())).collect();
    all.sort();
    wanted.sort();
    assert_eq!(all, wanted);
    // How often a load asks is the kernel's affair; these are one each.
    for ((_, number, ..), count) in &seen {
        match *number {
            SYS_CHROOT => assert_eq!(*count, 3),
            CHOWN | KILL => assert_eq!(*count, 1, "capability {number}"),
            _ => {}
        }
    }
    place.end();
}

/// The policy with one way to see checks left.
fn only(gate: &Gate, program: &str) {
    install(gate);
    let path = gate.policy_path("cap-trace");
    let text = fs::read_to_string(&path).expect("a policy");
    let mut tables: Vec<&str> = text.split("\n\n").collect();
    let all = tables.len();
    tables.retain(|table| {
        let of_backend = ["on_tracepoint", "on_fexit", "on_kprobe"].iter().find(|name| table.contains(*name));
        of_backend.is_none_or(|name| *name == program)
    });
    assert_eq!(tables.len(), all - 2);
    fs::write(path, tables.join("\n\n")).expect("a policy");
    gate.reload();
}

/// Each way to see checks, where this kernel has it, sees the same ones.
#[test]
fn every_backend_sees_the_same_checks() {
    needs_root!();
    let place = Place::new();
    let mut seen = Vec::new();
    for program in ["on_tracepoint", "on_fexit", "on_kprobe"] {
        only(&place.gate, program);
        let traced = place.program("sequence", 2);
        let trace = match Trace::try_start(&mut place.command(&place.unit())) {
            Ok(trace) => trace,
            Err(said) => {
                println!("skipped {program}: {}", said.trim());
                assert!(said.contains("cannot be traced here"), "{said}");
                traced.go();
                continue;
            }
        };
        traced.go();
        let (checks, _) = trace.end();
        let counts = [SYS_CHROOT, CHOWN, KILL].map(|capability| count(&checks, capability));
        assert_eq!(counts, [3, 1, 1], "{program}: {checks:?}");
        for check in &checks {
            assert_eq!(check["verdict"] == "unknown", program == "on_kprobe", "{program}: {check}");
            assert_ne!(check["audit"], Value::Null, "{program}: {check}");
            assert_ne!(check["class"], "unknown", "{program}: {check}");
        }
        seen.push(program);
    }
    println!("{}", seen.join(", "));
    assert!(!seen.is_empty(), "none of them works here");
    place.end();
}

/// A process is traced alone; without a look at how system calls end nothing is harmless.
#[test]
fn one_process_is_traced_and_no_other() {
    needs_root!();
    let place = Place::new();
    let [one, other] = [0, 1].map(|_| place.program("sequence", 2));
    let pid = one.pid();
    let trace = place.trace(&format!("--pid {pid} --no-outcome"));
    other.go();
    // The first has changed the mode of the file: nothing is different for the second.
    one.go();
    let (checks, _) = trace.end();
    assert_eq!(count(&checks, SYS_CHROOT), 3, "{checks:?}");
    for check in &checks {
        assert_eq!(check["pid"], pid, "{check}");
        assert_ne!(check["verdict"], "harmless", "{check}");
    }
    assert!(
        checks.iter().any(|check| check["number"] == FSETID && check["verdict"] == "denied"),
        "{checks:?}"
    );
    place.end();
}

/// An app is its helper, with the loader and its worker; that of another app is not looked at.
#[test]
fn of_an_app_its_helper_is_traced_with_its_loader() {
    needs_root!();
    let place = Place::new();
    let apps = ["watched", "unwatched"];
    for app in apps {
        place.gate.policy(app, OF_KERNEL_TYPES);
    }
    let mut clients = apps.map(|app| place.gate.session(app));
    let [helper, loader, worker] = place.gate.helper("watched").map(|process| process.pid);
    let trace = place.trace("--app watched");
    let instances =
        clients.each_mut().map(|client| client.load("o", &LoadOptions::default()).expect("a load"));
    let (checks, said) = trace.end();
    let by = |check: &Value, pid: i32| check["pid"] == pid;
    for check in &checks {
        assert!([helper, loader, worker].iter().any(|pid| by(check, *pid)), "{said} {check}");
        // None of them is refused what it needs.
        assert!(check["verdict"] != "denied" || check["class"] != "need", "{check}");
    }
    // The worker takes memory for the types of the kernel, which without the tracepoint nobody may see being checked.
    if Machine::here().unwrap().kernel >= (6, 14) {
        assert!(checks.iter().any(|check| by(check, worker)), "{said} {checks:?}");
    }
    // What it asks for, the helper does.
    let granted: BTreeSet<String> = checks
        .iter()
        .filter(|check| by(check, helper) && check["verdict"] == "granted" && !check["bpf"].is_null())
        .map(|check| format!("{} {} {}", check["bpf"]["command"], check["bpf"]["type"], check["cap"]))
        .map(|text| text.replace('"', ""))
        .collect();
    for what in [
        "MAP_CREATE array CAP_BPF",
        "PROG_LOAD raw_tracepoint CAP_BPF",
        "PROG_LOAD raw_tracepoint CAP_PERFMON",
    ] {
        assert!(granted.contains(what), "{what}: {granted:?}");
    }
    drop((clients, instances));
    place.end();
}

/// Only where the whole machine is the test's own: what others do is not to be watched. A container shares its kernel.
#[test]
fn everything_on_the_machine_is_traced_but_the_trace() {
    needs_root!();
    let is_container = Path::new("/run/systemd/container").exists();
    if std::env::var_os("BPFGATE_MACHINE").is_none() || is_container {
        println!("skipped: needs a kernel of its own, since it watches all there is (make vm-test)");
        return;
    }
    let place = Place::new();
    let elsewhere = Cgroup::new();
    let one = place.program("sequence", 2);
    let other = Traced::start(&elsewhere, "sequence", &place.gate.dir, 2);
    let trace = place.trace("--all");
    let (pids, front_end) = ([one.pid(), other.pid()], trace.child.id());
    // In this order, each alone: the first changes the mode of a file.
    one.go();
    other.go();
    let (checks, said) = trace.end();
    println!("{}", said.trim());
    let of = |pid: u64| checks.iter().filter(|check| check["pid"] == pid).cloned().collect::<Vec<_>>();
    for pid in pids {
        assert_eq!([SYS_CHROOT, KILL].map(|capability| count(&of(pid), capability)), [3, 1], "{said}");
    }
    assert_eq!(of(front_end.into()), [Value::Null; 0]);
    drop(elsewhere);
    place.end();
}

#[test]
fn of_a_million_checks_none_is_missing() {
    needs_root!();
    let place = Place::new();
    let traced = place.program("burst", 1);
    let trace = place.trace(&place.unit());
    traced.go();
    let (checks, said) = trace.end();
    let seen = count(&checks, KILL);
    println!("{BURST} checks in a burst: {seen} counted; {}", said.trim());
    assert_eq!(seen, BURST, "{said}");
    assert!(said.contains("none lost"), "{said}");
    place.end();
}

#[test]
fn what_finds_no_room_is_said_to_be_lost() {
    needs_root!();
    let place = Place::new();
    let traced = place.program("crowd", 1);
    let trace = place.trace(&place.unit());
    // It does not come to empty the table.
    let reader = Pid::from_raw(trace.child.id().cast_signed());
    kill(reader, Signal::SIGSTOP).expect("it is ours");
    traced.go();
    kill(reader, Signal::SIGCONT).expect("it is ours");
    let (checks, said) = trace.end();
    let (seen, lost) = (number(&said, "checks,"), number(&said, "of them lost"));
    println!("{seen} checks of {CROWD} threads: {} counted, {lost} lost", sum(&checks));
    assert!(lost > 0 && seen >= CROWD, "{said}");
    assert_eq!(sum(&checks) + lost, seen, "{said}");
    place.end();
}

/// Also when root starts it; and however it ends, nothing stays attached.
#[test]
fn the_front_end_holds_no_capability() {
    needs_root!();
    let place = Place::new();
    let words = format!("caps trace {} --json", place.unit());
    let adm = watcher().groups[0];
    let mut root = Command::new("setpriv");
    root.args([format!("--groups={adm}"), "--".into()]).arg(bin_dir().join("bpfgate"));
    root.args(words.split(' ')).env("BPFGATE_SOCKET", place.gate.socket());
    for command in [&mut root, &mut place.command(&place.unit())] {
        let mut trace = Trace::start(command);
        let pid = trace.child.id().cast_signed();
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            let sets = process::status(pid, set);
            assert!(
                !sets.is_empty() && sets.iter().all(|mask| mask == "0000000000000000"),
                "{set}: {sets:?}"
            );
        }
        assert!(process::status(pid, "NoNewPrivs").iter().all(|flag| flag == "1"));
        let attached =
            || place.gate.helper("cap-trace").iter().map(|helper| process::links(helper.pid)).sum::<usize>();
        assert_eq!(attached(), 2);
        trace.child.kill().expect("it is ours");
        trace.child.wait().expect("it is ours");
        assert!(wait_until(Duration::from_secs(1), || attached() == 0), "{} links", attached());
    }
    place.end();
}

/// Each with what to do about it.
#[test]
fn who_cannot_trace_is_told_why() {
    needs_root!();
    let place = Place::new();
    let us = std::process::id();
    let deny = |who: &Who, line: &str| Ended::of(&mut place.gate.cli(who, line));
    for (who, scope, code, says) in [
        (&STRANGER, format!("--pid {us}"), 1, "the group adm"),
        (&watcher(), "--unit no-such-unit".to_owned(), 1, "it does not run"),
        (&watcher(), "--unit /no/such".to_owned(), 2, "there is no cgroup"),
        (&watcher(), "--pid 4194305".to_owned(), 2, "there is no process 4194305"),
        (&watcher(), "--app no-such-app".to_owned(), 1, "no helper of app no-such-app runs"),
        (&watcher(), String::new(), 2, "required"),
        (&watcher(), format!("--all --pid {us}"), 2, "cannot be used with"),
    ] {
        let ended = deny(who, &format!("caps trace {scope} --duration 1s"));
        assert_eq!(ended.code, Some(code), "{scope}: {ended:?}");
        assert!(ended.err.contains(says), "{scope}: {ended:?}");
    }
    // A policy that names another object says so, for every backend.
    place
        .gate
        .edit("cap-trace", "[[client]]\nuser = 12345\nmay = [\"load\"]\n[objects.other]\n{object:minimal}\n");
    place.gate.reload();
    let ended = deny(&USER, &format!("caps trace --pid {us} --duration 1s"));
    assert_eq!(ended.code, Some(1), "{ended:?}");
    for backend in ["raw tracepoint", "fexit", "kprobe"] {
        assert!(ended.err.contains(backend), "{backend}: {ended:?}");
    }
    place.end();
}
