//! Mistakes of whoever starts bpfgate, and what its processes leave open to other users of the machine.

use bpfgate_client::{LoadOptions, Target};
use bpfgate_tests::cgroup::Cgroup;
use bpfgate_tests::cli::Ended;
use bpfgate_tests::gate::{INTERFACE, MINIMAL, WITH_MAP, bin_dir, inherited};
use bpfgate_tests::second::Second;
use bpfgate_tests::{
    Gate, Raw, SOON, STRANGER, USER, Who, as_user, needs_root, process, slowness, sys, wait_until,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// OPS-02, OPS-08: a broker takes nobody's place: no other broker's, no file's; only a socket that nobody listens on any
/// more. Nor is it where anybody could take its own.
#[test]
fn a_broker_takes_the_place_of_nothing_but_a_stale_socket() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", MINIMAL);
    let before = gate.baseline();
    let place = gate.dir.join("places");
    fs::create_dir(&place).unwrap();
    let at = |name: &str| place.join(name);
    fs::write(at("file"), "precious").unwrap();
    symlink(at("file"), at("link")).unwrap();
    symlink(gate.socket(), at("link-to-socket")).unwrap();
    fs::create_dir(at("directory")).unwrap();
    nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let open = at("open");
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
    let looks = |path: &Path| fs::symlink_metadata(path).map(|there| (there.ino(), there.mode())).ok();
    for path in [
        gate.socket(),
        at("file"),
        at("link"),
        at("link-to-socket"),
        at("directory"),
        at("fifo"),
        open.join("socket"),
    ] {
        let was = looks(&path);
        let mut second = Second::start(&gate, &[], &["--socket", path.to_str().unwrap()]);
        assert_eq!(second.ends(), Some(1), "{}:\n{}", path.display(), second.log());
        assert!(second.log().contains(path.to_str().unwrap()), "{}", second.log());
        assert_eq!(looks(&path), was, "{} was changed", path.display());
    }
    assert_eq!(fs::read_to_string(at("file")).unwrap(), "precious");
    drop(UnixListener::bind(at("stale")).unwrap());
    let live = UnixListener::bind(at("live")).unwrap();
    let mut second = Second::start(&gate, &[], &["--socket", at("live").to_str().unwrap()]);
    assert_eq!(second.ends(), Some(1), "{}", second.log());
    drop((live, second));
    let second = Second::start(&gate, &[], &["--socket", at("stale").to_str().unwrap()]).listens();
    drop(second);
    Raw::open(&gate, "app").load("o");
    gate.invariants(&before);
}

/// OPS-07: a broker that a service manager starts with more than it may have does not serve.
#[test]
fn a_broker_with_privilege_does_not_serve() {
    needs_root!();
    let directory = std::env::temp_dir().join(format!("bpfgate-privilege-{}", std::process::id()));
    fs::create_dir(&directory).unwrap();
    let listener = UnixListener::bind(directory.join("socket")).unwrap();
    let broker = inherited(&bin_dir().join("bpfgate-broker"));
    let helpers = ["+bpf", "+net_admin", "+sys_admin", "+setuid"];
    let mut cases = vec![
        ("root", vec!["--reuid=0".to_owned(), "--clear-groups".to_owned()], "root"),
        ("a full bounding set", vec!["--reuid=12345".to_owned(), "--clear-groups".to_owned()], "CapBnd"),
    ];
    for capability in helpers {
        let keep =
            ["--reuid=12345", "--clear-groups", "--inh-caps", capability, "--ambient-caps", capability];
        let mut words: Vec<String> = keep.iter().map(|word| (*word).to_owned()).collect();
        words.extend(["--bounding-set".to_owned(), format!("-all,{capability}")]);
        cases.push((capability, words, ""));
    }
    for (what, words, said) in cases {
        let mut command = Command::new("setpriv");
        command.args(words).args(["/bin/sh", "-c", "LISTEN_PID=$$ exec \"$0\" --audit -"]).arg(&broker);
        command.env("LISTEN_FDS", "1").env("LISTEN_FDNAMES", "clients");
        sys::as_descriptor_3(&mut command, listener.as_fd());
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let pid = child.id().cast_signed();
        let mut status = None;
        wait_until(2 * SOON, || {
            status = child.try_wait().unwrap();
            status.is_some()
        });
        if status.is_none() {
            // Then it has let go of it.
            for field in ["CapPrm", "CapEff", "CapInh", "CapAmb"] {
                assert_eq!(process::status(pid, field), [format!("{:016x}", 0)], "{what}: {field}");
            }
            assert_eq!(process::status(pid, "NoNewPrivs"), ["1"], "{what}");
            let bounding = process::status(pid, "CapBnd").remove(0);
            let bounding = u64::from_str_radix(&bounding, 16).unwrap();
            assert_eq!(bounding & !(1 << 39 | 1 << 38 | 1 << 12), 0, "{what}: CapBnd {bounding:x}");
        }
        let _ = child.kill();
        let output = child.wait_with_output().unwrap();
        let err = String::from_utf8_lossy(&output.stderr);
        if !said.is_empty() || status.is_some() {
            assert_eq!(status.and_then(|status| status.code()), Some(1), "{what}: {err}");
            assert!(err.contains(said) && err.len() > 20, "{what}: {err}");
        }
    }
    fs::remove_dir_all(directory).unwrap();
}

/// SBX-25, SBX-26, SBX-28, INF-07: what a process of bpfgate has from birth and keeps: nothing of who started it, and
/// nothing that others of its user, or anybody else, can look into.
#[test]
fn processes_have_nothing_that_they_were_not_given() {
    const FILTER: &str = "{client}\n[objects.o]\n{object:sockfilter}\n[[objects.o.socket_filter]]\nprogram = \"count_packets\"\n";
    const TRACING: &str = "[objects.t]\n{object:rawtp}\n[[objects.t.raw_tracepoint]]\nprogram = \"on_exec\"\nevents = [\"sched_process_exec\"]\n";
    const NETWORK: &str =
        "[objects.n]\n{object:minimal}\n[[objects.n.xdp]]\nprogram = \"pass\"\ninterfaces = [\"lo\"]\n";
    const LIBRARY: u64 = 1 << 31 | 1 << 32;
    needs_root!();
    let gate = Gate::start();
    let (bpf, perfmon, net_admin) = (1u64 << 39, 1u64 << 38, 1u64 << 12);
    let before = gate.baseline();
    for (app, text, capabilities) in [
        ("filter", FILTER.to_owned(), bpf),
        ("tracing", format!("{FILTER}{TRACING}"), bpf | perfmon),
        ("network", format!("{FILTER}{NETWORK}"), bpf | net_admin),
        ("all", format!("{FILTER}{TRACING}{NETWORK}"), bpf | perfmon | net_admin),
    ] {
        gate.policy(app, &text);
        let session = gate.session(app);
        let helper = gate.helper(app);
        for (at, process) in helper.iter().enumerate() {
            let pid = process.pid;
            let status = |field: &str| process::status(pid, field).remove(0);
            let held = if at == 0 { capabilities } else { 0 };
            for (field, expected) in
                [("CapPrm", held), ("CapEff", held), ("CapBnd", 0), ("CapAmb", 0), ("CapInh", 0)]
            {
                assert_eq!(status(field), format!("{expected:016x}"), "{app}: {process:?} {field}");
            }
            // No signal is blocked, ignored or caught that could be a surprise: SIGPIPE, SIGBUS and SIGSEGV are the Rust
            // library's. 32 and 33 are the C library's, which nobody else can set.
            for (field, allowed) in
                [("SigBlk", 0), ("SigIgn", 1 << 12 | LIBRARY), ("SigCgt", 1 << 6 | 1 << 10)]
            {
                let set = u64::from_str_radix(&status(field), 16).unwrap();
                assert_eq!(set & !allowed, 0, "{app}: {process:?} {field} {set:x}");
            }
            assert_eq!(status("Groups"), "", "{process:?}");
            assert_eq!(status("Umask"), "0077", "{process:?}");
            assert_eq!(status("Threads"), "1", "{process:?}");
            let proc = |name: &str| format!("/proc/{pid}/{name}");
            assert_eq!(fs::read(proc("environ")).unwrap(), b"", "{process:?} has an environment");
            assert_eq!(fs::read_link(proc("cwd")).unwrap(), Path::new("/"));
            let limits = fs::read_to_string(proc("limits")).unwrap();
            let limit = |name: &str| limits.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
            assert!(limit("Max core file size").split_whitespace().nth(4) == Some("0"), "{limits}");
            let files: u32 = limit("Max open files").split_whitespace().nth(3).unwrap().parse().unwrap();
            assert!(files <= 8192, "{limits}");
            // Not dumpable: its files in /proc are root's, so nobody of its user reads its memory or descriptors.
            assert_eq!(fs::metadata(proc("environ")).unwrap().uid(), 0, "{process:?} can be dumped");
            let uid: u32 = status("Uid").split('\t').next().unwrap().parse().unwrap();
            for name in ["fd", "mem", "maps", "environ", "exe"] {
                let look = as_user(&Who::new(uid), || {
                    fs::read_dir(proc(name)).is_ok()
                        || fs::read_link(proc(name)).is_ok()
                        || fs::read(proc(name)).is_ok()
                });
                assert!(!look, "{process:?} lets its own user look at {name}");
            }
            let command = String::from_utf8(fs::read(proc("cmdline")).unwrap()).unwrap();
            assert!(!command.contains("sha256") && command.len() < 400, "{command}");
            for (kind, count) in process::descriptors(pid) {
                let known = ["/dev/null", "socket", "pipe", "/memfd:bpfgate-object (deleted)"];
                let log = gate.dir.join("broker.log");
                let fine = known.contains(&kind.as_str()) || Path::new(&kind) == log;
                assert!(fine, "{process:?} holds {count} of {kind}");
            }
        }
        // An end that would leave a core file, with what was in its memory.
        let cores = || -> BTreeSet<_> {
            fs::read_dir("/").unwrap().map(|entry| entry.unwrap().file_name()).collect()
        };
        let there = cores();
        kill(Pid::from_raw(helper[0].pid), Signal::SIGABRT).unwrap();
        assert!(wait_until(SOON, || !helper[0].is_alive()));
        assert_eq!(cores(), there);
        drop(session);
        fs::remove_file(gate.policy_path(app)).unwrap();
        gate.reload();
    }
    // Where it writes, and where it listens.
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
    assert_eq!(mode(&gate.dir.join("audit")) & 0o037, 0, "others read the records");
    assert_eq!(mode(&gate.socket()) & 0o777, 0o666, "everybody may ask");
    assert!(as_user(&STRANGER, || fs::read(gate.dir.join("audit")).is_err()));
    gate.invariants(&before);
}

/// How much a process computes within a second.
fn busy(pid: i32) -> Duration {
    let start = process::ticks(pid);
    std::thread::sleep(SOON);
    // USER_HZ is 100 wherever Linux runs.
    Duration::from_millis((process::ticks(pid) - start) * 10)
}

/// RES: where a broker may have few descriptors, it takes fewer connections: a user who opens all that he gets keeps
/// nobody else out, and the broker has nothing to do meanwhile.
#[test]
fn few_descriptors_are_shared() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", WITH_MAP);
    let before = gate.baseline();
    let second = Second::start(&gate, &["prlimit", "--nofile=128:128"], &[]).listens();
    let mut hoard: Vec<UnixStream> = Vec::new();
    for who in [STRANGER, Who::new(12_350), Who::new(12_351)] {
        hoard.extend((0..100).filter_map(|_| as_user(&who, || UnixStream::connect(&second.socket)).ok()));
    }
    std::thread::sleep(Duration::from_millis(200));
    let computed = busy(second.pid());
    assert!(computed < Duration::from_millis(300), "it computes {computed:?} of a second for nothing");
    let start = Instant::now();
    let mut honest = second.connect(&USER);
    honest.done("Open", &json!({"app": "app"}));
    honest.load("o");
    assert!(start.elapsed() < 2 * SOON * slowness(), "{:?}", start.elapsed());
    assert!(second.log().contains("descriptors"), "it does not say so:\n{}", second.log());
    drop((hoard, honest, second));
    // So few that nothing would work is said at the start.
    let mut few = Second::start(&gate, &["prlimit", "--nofile=40:40"], &[]);
    assert_eq!(few.ends(), Some(1), "{}", few.log());
    assert!(few.log().contains("RLIMIT_NOFILE"), "{}", few.log());
    drop(few);
    gate.invariants(&before);
}

/// CRA-05: a helper that is stopped for a while does what it was asked once, late; meanwhile others are served.
#[test]
fn a_helper_that_stands_still_does_nothing_twice() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", WITH_MAP);
    let before = gate.baseline();
    let mut raw = Raw::open(&gate, "app");
    let mut other = Raw::open(&gate, "app");
    let [helper, ..] = gate.helper("app");
    for victim in [helper.pid, gate.broker.pid] {
        let count = gate.audit_of("app").len();
        kill(Pid::from_raw(victim), Signal::SIGSTOP).unwrap();
        raw.ask("Load", &json!({"object": "o"}));
        other.ask("List", &json!({}));
        std::thread::sleep(2 * SOON);
        if victim == helper.pid {
            gate.policy("meanwhile", WITH_MAP);
            Raw::open(&gate, "meanwhile").load("o");
        }
        kill(Pid::from_raw(victim), Signal::SIGCONT).unwrap();
        let (loaded, fds) = raw.reply().unwrap();
        other.reply().unwrap();
        assert_eq!(fds.len(), 1);
        let (listed, _) = raw.done("List", &json!({}));
        assert_eq!(listed["instances"].as_array().unwrap().len(), 1, "{listed}");
        let verbs: Vec<_> = gate.audit_of("app").split_off(count);
        assert_eq!(verbs.iter().filter(|record| record["verb"] == "Load").count(), 1, "{verbs:?}");
        raw.done("Unload", &json!({"instance": loaded["instance"]}));
    }
    drop((raw, other));
    gate.invariants(&before);
}

/// CRA-14: what a program is attached to goes away under it: the link can be detached, its place is free, and what is
/// there again is another one.
#[test]
fn a_target_that_goes_away_takes_its_link_with_it() {
    needs_root!();
    let gate = Gate::start();
    let cgroup = Cgroup::new();
    let group = "[objects.g]\n{object:cgroup}\n[[objects.g.cgroup_skb]]\nprogram = \"on_egress\"\ndirection = \"egress\"\n";
    gate.policy(
        "app",
        &format!(
            "{}{group}cgroups = [\"{}\"]\n",
            WITH_MAP.replace("{interface}", "brief0"),
            cgroup.path.display()
        ),
    );
    let before = gate.baseline();
    let ip = |line: &str| {
        let output = gate.inside("ip").args(line.split(' ')).output().unwrap();
        assert!(output.status.success(), "ip {line}: {}", String::from_utf8_lossy(&output.stderr));
    };
    let mut client = gate.session("app");
    let instance = client.load("o", &LoadOptions::default()).unwrap();
    let grouped = client.load("g", &LoadOptions::default()).unwrap();
    let on_group = client.attach(grouped.id, "on_egress", None, None).unwrap();
    let target = Target::Interface("brief0".to_owned());
    for _ in 0..3 {
        ip("link add brief0 type veth peer name brief1");
        let link = client.attach(instance.id, "pass", Some(&target), None).unwrap();
        ip("link del brief0");
        // It is still there by its number; a new interface of that name is not what it was attached to.
        ip("link add brief0 type veth peer name brief1");
        assert_eq!(client.list().unwrap()[0].links.len(), 1);
        client.detach(link.id).unwrap();
        let again = client.attach(instance.id, "pass", Some(&target), None).unwrap();
        assert_ne!(again.id, link.id);
        client.detach(again.id).unwrap();
        ip("link del brief0");
    }
    drop(cgroup);
    client.detach(on_group.id).unwrap();
    let error = client.attach(grouped.id, "on_egress", None, None).unwrap_err();
    assert!(matches!(error, bpfgate_client::Error::Kernel { .. }), "{error:?}");
    assert_ne!(INTERFACE, "brief0");
    drop((client, instance, grouped));
    gate.invariants(&before);
}

/// The command line refuses to wait for what is no file.
#[test]
fn a_fifo_in_the_place_of_a_file_keeps_nobody_waiting() {
    let directory = std::env::temp_dir().join(format!("bpfgate-fifo-{}", std::process::id()));
    fs::create_dir(&directory).unwrap();
    let fifo = directory.join("app.toml");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o644)).unwrap();
    let place = fifo.to_str().unwrap();
    for words in [
        vec!["policy", "check", place],
        vec!["policy", "show", place],
        vec!["policy", "pin", place],
        vec!["policy", "diff", place, place],
        vec!["policy", "new", "--from-object", place],
        vec!["policy", "explain", "--file", place, "--as", "root", "load", "o"],
    ] {
        let mut command = Command::new("timeout");
        command.arg("5").arg(bin_dir().join("bpfgate")).args(&words);
        let ended = Ended::of(&mut command);
        assert!(matches!(ended.code, Some(1 | 4)), "{words:?}: {ended:?}");
        assert!(ended.err.contains("regular file"), "{words:?}: {ended:?}");
    }
    fs::remove_dir_all(directory).unwrap();
}
