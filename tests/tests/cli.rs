//! The command line `bpfgate`, as an unprivileged user of a real broker.

use bpfgate_tests::census::Census;
use bpfgate_tests::cli::{Ended, Running, run};
use bpfgate_tests::{Gate, SOON, STRANGER, Who, needs_root, wait_until, workspace};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const POLICY: &str = r#"
{client}
[objects.o]
{object:minimal}
[[objects.o.xdp]]
program = "pass"
interfaces = ["lo"]
mode = "generic"
[objects.o.maps]
counts = "read-write"
"#;

const KEPT: &str = "[lifetime]\nkeep = \"app\"\n";

#[test]
fn load_list_show_and_map() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", POLICY);
    let before = gate.baseline();
    let (load, loaded) = Running::start(&gate, "load app o --attach pass=lo --json");
    let id = loaded["instance"].as_u64().expect("an instance");
    let link = loaded["links"][0]["id"].as_u64().expect("a link");
    let programs = json!([{"name": "pass", "type": "xdp"}]);
    let maps = json!([{
        "name": "counts", "type": "array", "key_size": 4, "value_size": 8, "max_entries": 1, "access": "read_write",
    }]);
    assert_eq!((&loaded["programs"], &loaded["maps"]), (&programs, &maps));
    assert_eq!(
        (&loaded["links"][0]["program"], &loaded["links"][0]["target"]),
        (&json!("pass"), &json!("lo"))
    );

    let instance = json!({
        "id": id, "object": "o", "programs": programs, "maps": maps,
        "links": [{"id": link, "program": "pass", "hook": "xdp", "target": "lo"}],
    });
    assert_eq!(run(&gate, "list app --json").json(), json!([instance]));
    assert_eq!(run(&gate, &format!("show app {id} --json")).json(), instance);
    let table = run(&gate, "list app");
    let rows: Vec<Vec<&str>> = table.out.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(
        rows,
        [vec!["INSTANCE", "OBJECT", "PROGRAMS", "MAPS", "LINKS"], vec![&id.to_string(), "o", "1", "1", "1"]]
    );
    let table = run(&gate, &format!("show app {id}"));
    assert_eq!(table.code, Some(0), "{table:?}");
    for row in ["pass xdp", "counts array 4 8 1 read_write", &format!("{link} pass xdp lo")] {
        let has = |line: &str| line.split_whitespace().eq(row.split(' '));
        assert!(table.out.lines().any(has), "no row {row:?} in\n{}", table.out);
    }
    assert_eq!(run(&gate, "show app 4711").code, Some(1));

    let get =
        || run(&gate, &format!("map get app {id} counts 0 --format u64 --json")).json()[0]["value"].as_u64();
    assert_eq!(get(), Some(0));
    gate.send_over_loopback(3);
    // Nobody listens: each packet is answered, over loopback too.
    assert!(wait_until(SOON, || get() == Some(6)), "{:?} packets", get());
    let set = run(&gate, &format!("map set app {id} counts 0 4000000000000 --format u64"));
    assert_eq!((set.code, set.out.as_str()), (Some(0), ""), "{set:?}");
    let dump = run(&gate, &format!("map dump app {id} counts --format u64 --json")).json();
    assert_eq!(dump, json!([{"key": 0, "value": 4_000_000_000_000_u64}]));
    let dump = run(&gate, &format!("map dump app {id} counts"));
    let bytes = bpfgate_client::hex::encode(&4_000_000_000_000_u64.to_ne_bytes());
    assert_eq!(dump.out.split_whitespace().collect::<Vec<_>>(), ["KEY", "VALUE", "00000000", &bytes]);
    for (words, code) in [("counts 01000000", 1), ("nosuch 0", 1), ("counts zz", 2), ("counts 00 --sum", 2)] {
        let ended = run(&gate, &format!("map get app {id} {words}"));
        assert_eq!(ended.code, Some(code), "{words}: {ended:?}");
    }

    load.signal(Signal::SIGTERM);
    assert_eq!(load.end(), (Some(0), String::new()));
    assert!(wait_until(SOON, || run(&gate, "list app --json").json() == json!([])));
    gate.invariants(&before);
}

#[test]
fn what_is_kept_is_attached_and_detached_by_later_commands() {
    needs_root!();
    let gate = Gate::start();
    let policy = POLICY.replace("read-write", "frozen") + KEPT;
    gate.policy("app", &policy);
    let before = gate.baseline();
    let id = run(&gate, "load app o --detach --json").json()["instance"].clone();
    let count =
        || run(&gate, &format!("map dump app {id} counts --format u64 --json")).json()[0]["value"].clone();
    gate.send_over_loopback(3);
    assert_eq!(count(), json!(0));
    let link = run(&gate, &format!("attach app {id} pass lo --json")).json();
    assert_eq!((&link["program"], &link["target"]), (&json!("pass"), &json!("lo")));
    gate.send_over_loopback(3);
    assert!(wait_until(SOON, || count() == 6), "{} packets", count());
    let set = run(&gate, &format!("map set app {id} counts 0 1 --format u64"));
    assert_eq!(set.code, Some(1), "{set:?}");
    assert!(set.err.contains("frozen"), "{set:?}");
    let again = run(&gate, &format!("attach app {id} pass lo"));
    assert_eq!(again.code, Some(1), "attached twice: {again:?}");
    assert!(again.err.contains("already"), "{again:?}");

    let link = &link["id"];
    assert_eq!(run(&gate, &format!("detach app {link}")).out, format!("link {link} is detached\n"));
    gate.send_over_loopback(3);
    assert_eq!(count(), json!(6));
    let again = run(&gate, &format!("detach app {link}"));
    assert_eq!(again.code, Some(1), "{again:?}");
    assert!(again.err.contains("no longer there"), "{again:?}");
    assert_eq!(run(&gate, &format!("unload app {id}")).out, format!("instance {id} is unloaded\n"));
    assert_eq!(run(&gate, &format!("unload app {id}")).code, Some(1));
    assert_eq!(run(&gate, "list app --json").json(), json!([]));
    gate.invariants(&before);
}

#[test]
fn maps_are_read_through_the_broker_and_summed_over_cpus() {
    needs_root!();
    let gate = Gate::start();
    let hook = "[[objects.o.xdp]]\nprogram = \"fill_maps\"\ninterfaces = [\"lo\"]\nmode = \"generic\"\n";
    let maps = "[objects.o.maps]\nper_cpu = \"proxy\"\nrecent = \"frozen\"\nroutes = \"proxy\"\n";
    gate.policy("app", &format!("{{client}}\n[objects.o]\n{{object:percpu}}\n{hook}{maps}{KEPT}"));
    let before = gate.baseline();
    let id = run(&gate, "load app o --attach fill_maps --detach --json").json()["instance"].clone();
    let dump = |map: &str, more: &str| {
        run(&gate, &format!("map dump app {id} {map} --format u64 --json {more}")).json()
    };
    assert_eq!(dump("per_cpu", ""), json!([]));
    gate.send_over_loopback(1);
    assert!(wait_until(SOON, || dump("recent", "") != json!([])), "no packet comes by");
    // The program stores the length of the last packet: in one of the CPUs, or in more of them by now.
    let length = dump("recent", "")[0]["value"].as_u64().unwrap();
    assert!(length > 0);
    let entries = dump("per_cpu", "");
    let values: Vec<u64> =
        entries[0]["values"].as_array().unwrap().iter().map(|value| value.as_u64().unwrap()).collect();
    assert_eq!(
        (entries[0]["key"].as_u64(), values.len()),
        (Some(1), bpfgate_client::possible_cpus().unwrap())
    );
    let sum: u64 = values.iter().sum();
    assert!(sum > 0);
    assert_eq!(dump("per_cpu", "--sum"), json!([{"key": 1, "value": sum}]));
    let one = run(&gate, &format!("map get app {id} per_cpu 1 --format u64 --sum --json")).json();
    assert_eq!(one, json!([{"key": 1, "value": sum}]));
    // 32 bits of 127.0.0.1: a key that only hexadecimal shows as it is.
    let routes = run(&gate, &format!("map dump app {id} routes --json")).json();
    assert_eq!(routes[0]["key"], json!("200000007f000001"));
    let set = run(&gate, &format!("map set app {id} routes 200000007f000001 0000000000000000"));
    assert_eq!((set.code, set.err.contains("proxy")), (Some(1), true), "{set:?}");
    run(&gate, &format!("unload app {id}"));
    gate.invariants(&before);
}

#[test]
fn exit_codes() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", POLICY);
    let bad = "{client}\n[objects.o]\n{object:badverifier}\n[[objects.o.xdp]]\nprogram = \"out_of_bounds\"\n\
               interfaces = [\"lo\"]\n";
    gate.policy("bad", bad);
    let before = gate.baseline();
    let status = run(&gate, "status --json").json();
    assert_eq!(status["answers"], json!(true));
    assert!(status["service"]["interfaces"].as_array().unwrap().contains(&json!("io.bpfgate")), "{status}");
    assert!(run(&gate, "status").out.starts_with("BROKER"));
    for (line, code, says) in [
        ("list app", 0, ""),
        ("--help", 0, ""),
        ("list nosuch", 1, "denied"),
        ("load app nosuch", 1, "denied"),
        ("load app o --program nosuch", 1, "denied"),
        ("load app o --attach pass=gate0", 1, "denied"),
        ("load app o --attach nosuch=lo", 1, "denied"),
        ("load app o --global nosuch=1", 1, "denied"),
        ("load bad o", 1, "verifier"),
        ("", 2, "Usage"),
        ("frobnicate", 2, "Usage"),
        ("load app", 2, "Usage"),
        ("load app o --attach =lo", 2, "no name"),
        ("show app x", 2, "invalid"),
        ("--socket /nonexistent/socket status", 3, "cannot reach the broker"),
        ("--socket /etc/passwd list app", 3, "cannot reach the broker"),
    ] {
        let ended = run(&gate, line);
        assert_eq!(ended.code, Some(code), "{line}: {ended:?}");
        assert!(ended.err.contains(says), "{line}: {ended:?}");
        assert_eq!(ended.err.is_empty(), code == 0, "{line}: {ended:?}");
    }
    // The verifier's own words come along.
    let rejected = run(&gate, "load bad o").err;
    assert!(rejected.contains("invalid access to packet"), "{rejected}");
    let denied = Ended::of(&mut gate.cli(&STRANGER, "list app"));
    assert_eq!(denied.code, Some(1), "{denied:?}");
    assert!(denied.err.starts_with("bpfgate: denied"), "{denied:?}");
    gate.invariants(&before);
}

#[test]
fn load_says_so_when_the_broker_ends_the_session() {
    needs_root!();
    let mut gate = Gate::start();
    gate.policy("app", POLICY);
    let census = gate.baseline().census;
    let (load, _) = Running::start(&gate, "load app o --attach pass=lo --json");
    gate.kill_broker();
    let (code, err) = load.end();
    assert_eq!(code, Some(1));
    assert!(err.contains("ended the session"), "{err}");
    let gone = || !Census::take().since(&census).iter().any(|object| object.0 == "link");
    assert!(wait_until(SOON, gone), "a link outlives the broker");
    let after = run(&gate, "list app");
    assert_eq!(after.code, Some(3), "{after:?}");
}

#[test]
fn policies_are_checked_and_shown_without_a_broker() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("good", &(POLICY.replace("read-write", "frozen") + KEPT));
    gate.policy("bad", &POLICY.replace("mode = ", "mod = "));
    let before = gate.baseline();
    let author = Who::new(4_321);
    let [good, bad] = ["good", "bad"].map(|app| gate.policy_path(app).display().to_string());
    let bpfgate = |line: &str| {
        let mut command = gate.cli(&author, line);
        Ended::of(command.env("BPFGATE_SOCKET", "/nonexistent/socket"))
    };
    // Objects have tests of their own; another user may be kept from the loader by the place where it was built.
    let ended = bpfgate(&format!("policy check --no-objects {good}"));
    assert_eq!((ended.code, ended.out.as_str(), ended.err.as_str()), (Some(0), "1 valid, 0 invalid\n", ""));
    let ended = bpfgate(&format!("policy check {good} {bad}"));
    assert_eq!((ended.code, ended.out.as_str()), (Some(4), "1 valid, 1 invalid\n"), "{ended:?}");
    // Where it is, what is wrong, and the line with the place underlined.
    let line = 1 + gate
        .fill(&POLICY.replace("mode = ", "mod = "))
        .lines()
        .position(|l| l.starts_with("mod"))
        .unwrap();
    for part in [format!("{bad}:{line}:1"), "mod = \"generic\"".to_owned(), "^^^".to_owned()] {
        assert!(ended.err.contains(&part), "no {part:?} in\n{}", ended.err);
    }
    let ended = bpfgate(&format!("policy check --json {good} {bad}"));
    assert_eq!(ended.code, Some(4), "{ended:?}");
    let verdicts: Value = serde_json::from_str(&ended.out).unwrap();
    assert_eq!((&verdicts[0]["valid"], &verdicts[1]["valid"]), (&json!(true), &json!(false)));
    assert_eq!(bpfgate("policy check /nonexistent/a.toml").code, Some(4));
    assert_eq!(bpfgate(&format!("policy show {bad}")).code, Some(4));

    let shown = bpfgate(&format!("policy show {good} --json")).json();
    let held: Vec<&str> = shown["capabilities"]
        .as_array()
        .unwrap()
        .iter()
        .map(|need| need["capability"].as_str().unwrap())
        .collect();
    assert!(held.contains(&"CAP_BPF") && held.contains(&"CAP_NET_ADMIN"), "{shown}");
    assert!(!held.contains(&"CAP_PERFMON"), "{shown}");
    assert_eq!((&shown["keep"], &shown["limits"]["programs"]), (&json!("app"), &json!(16)));
    assert!(bpfgate(&format!("policy show {good}")).out.contains("CAP_NET_ADMIN"));
    // The examples too, whoever asks.
    for name in ["egress-meter", "exec-tracer", "packet-counter"] {
        let source = workspace().join(format!("policies/{name}.toml"));
        let copy = gate.policy_path(name);
        std::fs::copy(source, &copy).unwrap();
        // As shipped their digests are nobody's.
        let ended = bpfgate(&format!("policy check --no-objects {}", copy.display()));
        assert_eq!(ended.code, Some(0), "{ended:?}");
    }
    gate.invariants(&before);
}
