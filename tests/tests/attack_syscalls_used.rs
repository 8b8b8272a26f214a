//! Rules that nothing uses are rules that only an attacker uses: the programs run under strace, and each rule has to be
//! seen at work or to say why it is there all the same.

use bpfgate_lockdown::syscalls::When;
use bpfgate_tests::raw::Raw;
use bpfgate_tests::roles::Role;
use bpfgate_tests::second::Second;
use bpfgate_tests::strace::{self, Line};
use bpfgate_tests::sys;
use bpfgate_tests::{Gate, SOON, USER, needs_root, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;

/// A rule, or one of its values: `fcntl`, `fcntl 2`.
type Rule = String;

/// How often each process used its rules, once it was confined.
type Used = BTreeMap<&'static str, BTreeMap<Rule, usize>>;

/// What a program is, by the command line that it was started with; the worker is a fork of the loader.
fn role(command: &str) -> Option<&'static str> {
    let starts = |program: &str| command.contains(&format!("[\"{program}\""));
    if starts("bpfgate-loader") {
        Some("loader")
    } else if starts("bpfgate-helper") {
        Some("helper").filter(|_| !command.contains("\"--spawner\""))
    } else {
        Some("broker").filter(|_| command.contains("bpfgate-broker\""))
    }
}

/// Reads a trace.
fn used(trace: &str) -> Used {
    let mut roles: BTreeMap<i32, &'static str> = BTreeMap::new();
    for Line { pid, name, arguments, result } in strace::lines(trace) {
        if name.starts_with("exec")
            && let Some(role) = role(arguments)
        {
            roles.insert(pid, role);
        }
        let child = result.filter(|_| name == "clone" && roles.get(&pid) == Some(&"loader")).and_then(parse);
        if let Some(child) = child.and_then(|child| i32::try_from(child).ok()) {
            roles.insert(child, "worker");
        }
    }
    let mut filters: BTreeMap<i32, u32> = BTreeMap::new();
    let mut used = Used::new();
    for Line { pid, name, arguments, .. } in strace::lines(trace) {
        let have = filters.entry(pid).or_default();
        // Until a worker has a list of its own it lives by that of its parent.
        let owner = match (roles.get(&pid), *have) {
            (Some(role), 2..) => Some(*role),
            (Some(&"worker"), _) => Some("loader"),
            _ => None,
        };
        *have += u32::from(name == "seccomp" && !arguments.is_empty());
        if let Some(owner) = owner {
            for rule in rules_of(&Role::named(owner), name, arguments) {
                *used.entry(owner).or_default().entry(rule).or_default() += 1;
            }
        }
    }
    used
}

fn parse(text: &str) -> Option<u64> {
    let word = text.split([' ', ',', ')']).next()?;
    word.strip_prefix("0x").map_or_else(|| word.parse().ok(), |word| u64::from_str_radix(word, 16).ok())
}

/// Which rules a call uses: its name, and the value that it is allowed for.
fn rules_of(role: &Role, name: &str, arguments: &str) -> Vec<Rule> {
    let mut rules = vec![name.to_owned()];
    if let Some(When::OneOf(argument, _)) =
        role.rows().iter().find(|row| row.name == name).map(|row| row.when)
        && let Some(value) = arguments.split(", ").nth(argument.into()).and_then(parse)
    {
        rules.push(format!("{name} {}", value & 0xffff_ffff));
    }
    rules
}

/// All that a role may.
fn rules(role: &Role) -> BTreeSet<Rule> {
    let each = role.rows().iter().flat_map(|row| {
        let values = match row.when {
            When::OneOf(_, values) => values,
            _ => &[],
        };
        let values = values.iter().map(|value| format!("{} {value}", row.name));
        std::iter::once(row.name.to_owned()).chain(values).collect::<Vec<_>>()
    });
    each.collect()
}

/// Why a rule stays that no workload here uses.
enum Stays {
    /// It is used where kernel, C library or chance are other ones; here, too, perhaps.
    Elsewhere(&'static str),
    /// It is for what does not happen here.
    Unseen(&'static str),
}

use Stays::{Elsewhere, Unseen};

const ALL: &[&str] = &["broker", "helper", "loader", "worker"];
const ABORT: &str = "a bad end; attack_syscalls has it under every filter";
const LARGE: &str = "a verifier log that is larger than a datagram";
const MEMORY: &str = "memory, as the allocator likes it";

/// Processes, rules, reasons.
const NOT_SEEN: &[(&[&str], &[&str], Stays)] = &[
    (
        ALL,
        &["getpid", "gettid", "tgkill", "rt_sigprocmask", "rt_sigaction", "rt_sigreturn"],
        Elsewhere(ABORT),
    ),
    (ALL, &["sigaltstack", "exit_group"], Elsewhere("the end of a process that is not killed")),
    (ALL, &["brk", "mmap", "munmap", "mremap", "mprotect", "madvise"], Elsewhere(MEMORY)),
    (ALL, &["futex", "getrandom"], Elsewhere("locks and seeds of the Rust library")),
    (ALL, &["clock_gettime"], Elsewhere("the vDSO has a clock on most machines")),
    (
        ALL,
        &["fcntl 1", "fcntl 3"],
        Elsewhere("debug builds of the Rust library; libelf, where BTF is read from a file"),
    ),
    (ALL, &["fstat", "newfstatat", "statx"], Elsewhere("each C library has its own way to look at a file")),
    (&["broker"], &["lseek"], Elsewhere("the Rust library, where it is not sure how long a file is")),
    (&["broker"], &["write", "writev"], Elsewhere("one of them writes the log")),
    (&["broker"], &["pread64"], Unseen(LARGE)),
    (
        &["broker", "helper"],
        &["ioctl 3225485067", "readlink", "poll", "getsockopt 77"],
        Elsewhere("units, from Linux 6.13 on"),
    ),
    (&["helper"], &["getsockopt 3"], Elsewhere("brokers that come and go under a service manager")),
    (&["helper"], &["memfd_create", "pwrite64"], Unseen(LARGE)),
    (&["helper"], &["write", "write 2"], Elsewhere("messages, if there are any")),
    (&["loader"], &["rseq", "set_robust_list"], Elsewhere("fork, in one C library or another")),
    (
        &["worker"],
        &["access", "faccessat", "faccessat2"],
        Elsewhere("each C library has its own way to look for a file"),
    ),
    (&["worker"], &["pread64"], Unseen(LARGE)),
    (&["worker"], &["prlimit64", "geteuid"], Elsewhere("libbpf explains an EPERM")),
    (&["worker"], &["sysinfo"], Elsewhere("qsort of the C library, for large arrays")),
    (&["worker"], &["write", "write 2"], Elsewhere("messages, if there are any")),
];

const POLICIES: [(&str, &str, &str); 6] = [
    ("big", "huge", "[[objects.o.xdp]]\nprogram = \"huge\"\ninterfaces = [\"{interface}\"]\n"),
    (
        "bad",
        "badverifier",
        "[[objects.o.xdp]]\nprogram = \"out_of_bounds\"\ninterfaces = [\"{interface}\"]\n",
    ),
    (
        "raw",
        "rawtp",
        "[[objects.o.raw_tracepoint]]\nprogram = \"on_exit\"\nevents = [\"sched_process_exit\"]\n",
    ),
    ("crash", "structops_map", "[[objects.o.xdp]]\nprogram = \"touch_ops\"\ninterfaces = [\"lo\"]\n"),
    (
        "vars",
        "globals",
        "[[objects.o.xdp]]\nprogram = \"copy_globals\"\ninterfaces = [\"{interface}\"]\nlink_fd = true\n\
        [objects.o.globals]\ng_u32 = { min = 1, max = 1000 }\n",
    ),
    ("types", "traced", "[[objects.o.fentry]]\nprogram = \"on_call\"\nfunction = \"cap_capable\"\n"),
];

/// What bpfgate is used for, as a client sees it; some of it is refused.
fn workload(gate: &Gate, broker: &Second) {
    let open = |app: &str| {
        let mut raw = broker.connect(&USER);
        raw.done("Open", &json!({ "app": app }));
        raw
    };
    let attach = |raw: &mut Raw, program: &str| {
        let instance = raw.load("o");
        let (link, fds) = raw.done("Attach", &json!({"instance": instance, "program": program}));
        (instance, link["link"].clone(), fds)
    };
    // An object in its whole life, twice, with everything that can be asked.
    let mut raw = open("app");
    let (instance, link, _) = attach(&mut raw, "fill_maps");
    gate.send_packets(10);
    raw.done("Map", &json!({"instance": instance, "name": "recent"}));
    for map in ["per_cpu", "routes"] {
        raw.done("ReadMap", &json!({"instance": instance, "name": map}));
    }
    raw.done("List", &json!({}));
    raw.done("Detach", &json!({ "link": link }));
    raw.done("Unload", &json!({ "instance": instance }));
    let mut watch = open("app");
    watch.ask("Watch", &json!({}));
    // Policies change while somebody is there, and a directory is read again.
    kill(Pid::from_raw(broker_of(broker)), Signal::SIGHUP).unwrap();
    raw.done("List", &json!({}));
    gate.edit("app", &format!("# changed\n{}", maps()));
    kill(Pid::from_raw(broker_of(broker)), Signal::SIGHUP).unwrap();
    assert!(wait_until(10 * SOON, || broker.log().contains("generation 3")), "{}", broker.log());
    raw.done("List", &json!({}));
    for (app, _, _) in POLICIES {
        let mut raw = open(app);
        let _ = raw.call("Load", &json!({"object": "o"}));
        if let Ok((loaded, _)) = raw.call("Load", &json!({"object": "o"})) {
            let program = loaded["programs"][0]["name"].clone();
            let attached = raw.call("Attach", &json!({"instance": loaded["instance"], "program": program}));
            let (attached, _fds) = attached.unwrap_or_else(|refused| panic!("{app}: {refused:?}"));
            raw.done("Detach", &json!({"link": attached["link"]}));
        }
    }
    let mut probed = open("probe");
    attach(&mut probed, "on_call");
    // Whose unit is another one.
    let mut elsewhere = broker.connect(&USER);
    elsewhere.refused("Open", &json!({"app": "unit"}), "Denied");
    // What is asked for and not there, and a client that goes away in the middle.
    raw.refused("Load", &json!({"object": "absent"}), "Denied");
    open("big").ask("Load", &json!({"object": "o"}));
    wait_until(SOON, || false);
}

/// The broker under strace.
fn broker_of(second: &Second) -> i32 {
    let child =
        |pid: &i32| bpfgate_tests::process::stat(*pid).is_some_and(|(_, parent, _)| parent == second.pid());
    bpfgate_tests::process::all().find(child).expect("strace has one child")
}

fn maps() -> String {
    let hook =
        "[[objects.o.xdp]]\nprogram = \"fill_maps\"\ninterfaces = [\"{interface}\"]\nmode = \"generic\"\n";
    let maps = "[objects.o.maps]\nper_cpu = \"proxy\"\nrecent = \"frozen\"\nroutes = \"proxy\"\n";
    format!("{{client}}\n[objects.o]\n{{object:percpu}}\n{hook}{maps}")
}

#[test]
fn every_rule_is_used_or_says_why_it_is_there() {
    needs_root!();
    let gate = Gate::start();
    let before = gate.baseline();
    gate.edit("app", &maps());
    for (app, object, hook) in POLICIES {
        gate.edit(app, &format!("{{client}}\n[objects.o]\n{{object:{object}}}\n{hook}"));
    }
    // The function that is probed is a part of this program.
    assert_eq!(sys::bpfgate_test_target(1), 2);
    let probed = std::env::current_exe().unwrap();
    let probe = format!(
        "[[objects.o.uprobe]]\nprogram = \"on_call\"\nbinary = \"{}\"\nsymbols = [\"bpfgate_test_target\"]\n",
        probed.display()
    );
    gate.edit("probe", &format!("{{client}}\n[objects.o]\n{{object:uprobe}}\n{probe}"));
    gate.edit("unit", &maps().replace("{client}", "[[client]]\nunit = \"nobody.service\"\nmay = [\"load\"]"));
    gate.reload();
    let trace = gate.dir.join("trace");
    let words = strace::words(&trace);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let broker = Second::start(&gate, &words, &[]).listens();
    workload(&gate, &broker);
    // strace ends with the last that it follows.
    kill(Pid::from_raw(broker_of(&broker)), Signal::SIGKILL).unwrap();
    let mut broker = broker;
    broker.ends();
    let used = used(&fs::read_to_string(&trace).unwrap());
    let mut wrong = Vec::new();
    for name in ["broker", "helper", "loader", "worker"] {
        let used = &used[name];
        let role = Role::named(name);
        let stays = |rule: &str| {
            let about = |(roles, rules, _): &&(&[&str], &[&str], Stays)| {
                roles.contains(&name) && rules.contains(&rule)
            };
            NOT_SEEN.iter().find(about).map(|(_, _, stays)| stays)
        };
        let mut rules = rules(&role);
        if name == "loader" {
            // What its worker needs it has too: filters are inherited.
            rules.retain(|rule| !self::rules(&Role::named("worker")).contains(rule));
        }
        println!("{name}: {} rules and values, of which these were not seen:", rules.len());
        for rule in rules.iter().filter(|rule| !used.contains_key(*rule)) {
            match stays(rule) {
                Some(Elsewhere(why) | Unseen(why)) => println!("  {rule}: {why}"),
                None => wrong.push(format!("{name} does not use {rule}")),
            }
        }
        let seen = used.keys().filter(|rule| matches!(stays(rule), Some(Unseen(_))));
        wrong.extend(seen.map(|rule| format!("{name} uses {rule}")));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    gate.invariants(&before);
}
