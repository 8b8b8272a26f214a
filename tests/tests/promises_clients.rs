//! Promises 6 to 8 and 11: what clients are given, what they are told, and what is recorded.

use bpfgate_client::{LoadOptions, Map, UpdateMode};
use bpfgate_tests::gate::INTERFACE;
use bpfgate_tests::user::{Who, in_thread};
use bpfgate_tests::{Gate, Raw, SOON, STRANGER, USER, as_user, needs_root, process, sys, wait_until};
use serde_json::{Value, json};

const POLICY: &str = r#"
{client}
[[client]]
group = 23456
maps = ["counts"]
may = ["maps"]
[objects.o]
{object:minimal}
[[objects.o.xdp]]
program = "pass"
interfaces = ["{interface}"]
[objects.o.maps]
counts = "ACCESS"
"#;

fn policy(access: &str) -> String {
    POLICY.replace("ACCESS", access)
}

/// The reply without what is different in every one.
fn anonymous(mut parameters: Value) -> Value {
    parameters["request"] = Value::Null;
    parameters
}

#[test]
fn promise_06_absent_and_forbidden_are_one_answer() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", &policy("frozen"));
    gate.policy("of-nobody", &POLICY.replace("{client}", ""));
    gate.policy("empty", "");
    gate.policy("misspelt", &(policy("frozen") + "[limit]\nprograms = 1\n"));
    let before = gate.baseline();
    let denied = |who: &Who, app: &str| {
        anonymous(Raw::connect(&gate, who).refused("Open", &json!({"app": app}), "Denied"))
    };
    let expected = denied(&USER, "absent");
    for app in ["of-nobody", "empty", "misspelt", "../app", "", "canary"] {
        assert_eq!(denied(&USER, app), expected, "{app}");
    }
    for who in [STRANGER, Who::new(0), Who::new(65_534), STRANGER.in_groups(&[12_345, 0])] {
        assert_eq!(denied(&who, "app"), expected, "{who:?}");
    }
    let mut raw = Raw::open(&gate, "app");
    let instance = raw.load("o");
    for (method, parameters) in [
        ("Load", json!({"object": "absent"})),
        ("Load", json!({"object": "o", "programs": ["absent"]})),
        ("Load", json!({"object": "o", "globals": {"absent": 1}})),
        ("Attach", json!({"instance": instance, "program": "absent", "target": {"interface": INTERFACE}})),
        ("Attach", json!({"instance": instance, "program": "pass", "target": {"interface": "lo"}})),
        ("Attach", json!({"instance": 99, "program": "pass", "target": {"interface": INTERFACE}})),
        ("Map", json!({"instance": instance, "name": "absent"})),
        ("Map", json!({"instance": 99, "name": "counts"})),
        ("Detach", json!({"link": 99})),
        ("Unload", json!({"instance": 99})),
    ] {
        assert_eq!(anonymous(raw.refused(method, &parameters, "Denied")), expected, "{method} {parameters}");
    }
    // A reader may read, and nothing else.
    let mut reader = Raw::connect(&gate, &STRANGER.in_groups(&[23_456]));
    reader.done("Open", &json!({"app": "app"}));
    assert_eq!(reader.done("Map", &json!({"instance": instance, "name": "counts"})).1.len(), 1);
    for (method, parameters) in [
        ("Load", json!({"object": "o"})),
        ("Attach", json!({"instance": instance, "program": "pass"})),
        ("Unload", json!({"instance": instance})),
    ] {
        assert_eq!(anonymous(reader.refused(method, &parameters, "Denied")), expected, "{method}");
    }
    drop((raw, reader));
    gate.invariants(&before);
}

#[test]
fn promise_07_program_and_link_descriptors_leave_only_by_a_grant() {
    needs_root!();
    let gate = Gate::start();
    let xdp = "[[objects.o.xdp]]\n";
    gate.policy("plain", &policy("read-write"));
    gate.policy(
        "grants",
        &policy("read-write").replace(xdp, &format!("{xdp}program_fd = true\nlink_fd = true\n")),
    );
    let before = gate.baseline();
    for (app, programs, links) in [("plain", 0, 0), ("grants", 1, 1)] {
        let mut raw = Raw::open(&gate, app);
        let mut fds = Vec::new();
        let (loaded, with_load) = raw.done("Load", &json!({"object": "o"}));
        fds.extend(with_load);
        let instance = &loaded["instance"];
        let (attached, with_attach) = raw.done("Attach", &json!({"instance": instance, "program": "pass"}));
        fds.extend(with_attach);
        fds.extend(raw.done("Map", &json!({"instance": instance, "name": "counts"})).1);
        fds.extend(raw.done("List", &json!({})).1);
        let count = |kind: &str| fds.iter().filter(|fd| process::kind(fd) == kind).count();
        assert_eq!((count("program"), count("link"), count("map")), (programs, links, 2), "{app}");
        assert_eq!(fds.len(), programs + links + 2, "{app}: something else came, too");
        assert_eq!(attached.get("fd").is_some(), links == 1);

        // Detached means detached, whoever holds the link.
        let counts = Map::new(fds.pop().unwrap()).unwrap();
        let counting = || {
            let value = counts.lookup(&[0; 4]).unwrap();
            gate.send_packets(5);
            counts.lookup(&[0; 4]).unwrap() != value
        };
        assert!(wait_until(SOON, counting), "{app}");
        raw.done("Detach", &json!({"link": attached["link"]}));
        assert!(!counting(), "{app}: packets are counted after the detach");
        drop((raw, counts, fds));
        gate.invariants(&before);
    }
}

#[test]
fn promise_07_a_link_that_a_client_holds_ends_with_its_session() {
    needs_root!();
    let gate = Gate::start();
    let xdp = "[[objects.o.xdp]]\n";
    gate.policy("app", &policy("read-write").replace(xdp, &format!("{xdp}link_fd = true\n")));
    let before = gate.baseline();
    let mut client = gate.session("app");
    let mut instance = client.load("o", &LoadOptions::default()).unwrap();
    let link = client.attach(instance.id, "pass", None, None).unwrap().fd.expect("the policy grants it");
    let counts = instance.take_map("counts").unwrap();
    let counting = || {
        let value = counts.lookup(&[0; 4]).unwrap();
        gate.send_packets(5);
        counts.lookup(&[0; 4]).unwrap() != value
    };
    assert!(wait_until(SOON, counting));
    drop(client);
    assert!(wait_until(SOON, || !counting()), "the link works on after the session");
    drop((link, counts, instance));
    gate.invariants(&before);
}

#[test]
fn promise_08_a_frozen_map_can_be_written_by_nobody() {
    needs_root!();
    let gate = Gate::start();
    for (app, access) in [("frozen", "frozen"), ("writable", "read-write"), ("proxied", "proxy")] {
        gate.policy(app, &policy(access));
    }
    let before = gate.baseline();
    let bpffs = gate.dir.join("bpffs");
    std::fs::create_dir(&bpffs).unwrap();
    for (app, writable) in [("frozen", false), ("writable", true)] {
        let mut raw = Raw::open(&gate, app);
        let (_, mut fds) = raw.done("Load", &json!({"object": "o"}));
        let fd = fds.pop().expect("the map comes with the load");
        let verdict = |map: &Map| map.update(&[0; 4], &[1; 8], UpdateMode::Any).map_err(|error| error.kind());
        let expected = if writable { Ok(()) } else { Err(std::io::ErrorKind::PermissionDenied) };
        let map = Map::new(fd).unwrap();
        assert_eq!(as_user(&USER, || verdict(&map)), expected, "{app}: the client");
        assert_eq!(verdict(&map), expected, "{app}: root");
        // Whoever pins a map gets a descriptor with other rights back: not of this one.
        let path = bpffs.join(app);
        in_thread(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
            sys::mount_bpffs(&bpffs).unwrap();
            sys::become_user(USER.id, USER.id, &[]).unwrap();
            sys::pin(&map, &path).expect("everybody may pin in a directory that he may write");
            let again = Map::new(sys::pinned(&path).unwrap()).unwrap();
            assert_eq!(again.info().id, map.info().id);
            assert_eq!(verdict(&again), expected, "{app}: pinned and opened again");
            std::fs::remove_file(&path).unwrap();
        });
        drop((raw, map));
    }
    // Through the broker there is no descriptor at all.
    let mut raw = Raw::open(&gate, "proxied");
    let (loaded, fds) = raw.done("Load", &json!({"object": "o"}));
    let (map, more) = raw.done("Map", &json!({"instance": loaded["instance"], "name": "counts"}));
    assert!(fds.is_empty() && more.is_empty() && map["map"].get("fd").is_none());
    let (entries, _) = raw.done("ReadMap", &json!({"instance": loaded["instance"], "name": "counts"}));
    assert_eq!(entries, json!({"entries": [{"key": "00000000", "value": "0000000000000000"}]}));
    drop(raw);
    gate.invariants(&before);
}

#[test]
fn promise_08_data_sections_are_handed_over_as_the_policy_says() {
    needs_root!();
    let gate = Gate::start();
    let before = gate.baseline();
    for (section, access) in [
        (".rodata", "frozen"),
        (".rodata", "proxy"),
        (".bss", "frozen"),
        (".bss", "read-write"),
        (".bss", "proxy"),
    ] {
        let app = format!("{}-{access}", &section[1..]);
        let rules = "{client}\n[objects.o]\n{object:globals}\n[[objects.o.xdp]]\nprogram = \"copy_globals\"\n\
                     interfaces = [\"{interface}\"]\n[objects.o.maps]\n";
        gate.policy(&app, &format!("{rules}\"{section}\" = \"{access}\"\n"));
        let mut raw = Raw::open(&gate, &app);
        let (loaded, fds) = raw.done("Load", &json!({"object": "o"}));
        assert_eq!(loaded["maps"][0]["name"], section, "{app}");
        assert_eq!(fds.len(), usize::from(access != "proxy"), "{app}");
        drop((raw, fds));
    }
    gate.invariants(&before);
}

/// The line of a policy on which this text stands.
fn line(gate: &Gate, app: &str, text: &str) -> String {
    let path = gate.policy_path(app);
    let file = std::fs::read_to_string(&path).unwrap();
    let number = file.lines().position(|line| line.starts_with(text)).expect("a line of the policy") + 1;
    format!("{}:{number}", path.display())
}

#[test]
fn promise_11_every_decision_is_one_record_with_the_line_that_decided() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", &policy("frozen"));
    let before = gate.baseline();
    let (client, object, xdp, counts) = (
        line(&gate, "app", "[[client]]"),
        line(&gate, "app", "[objects.o]"),
        line(&gate, "app", "[[objects.o.xdp]]"),
        line(&gate, "app", "counts = "),
    );
    let file = gate.policy_path("app").display().to_string();
    let pid = std::process::id();
    let mut raw = Raw::connect(&gate, &USER);
    let target = |name: &str| json!({"instance": 1, "program": "pass", "target": {"interface": name}});
    let map = json!({"instance": 1, "name": "counts"});
    for (method, parameters, verdict, about, by) in [
        ("Open", json!({"app": "app"}), "allowed", "app", &client),
        ("Open", json!({"app": "app"}), "Invalid", "app", &String::new()),
        ("Load", json!({"object": "o"}), "allowed", "o", &client),
        ("Load", json!({"object": "o", "programs": ["x"]}), "Denied", "o x", &object),
        ("Load", json!({"object": "absent"}), "Denied", "absent", &file),
        ("Attach", target(INTERFACE), "allowed", "1/pass to gate0", &xdp),
        ("Attach", target(INTERFACE), "Invalid", "1/pass to gate0", &file),
        ("Attach", target("lo"), "Denied", "1/pass to lo", &object),
        ("Map", map.clone(), "allowed", "1/counts", &counts),
        ("ReadMap", map, "allowed", "1/counts", &counts),
        ("Map", json!({"instance": 1, "name": "absent"}), "Denied", "1/absent", &object),
        ("List", json!({}), "allowed", "", &client),
        ("Detach", json!({"link": 1}), "allowed", "link 1", &client),
        ("Detach", json!({"link": 1}), "Gone", "link 1", &file),
        ("Unload", json!({"instance": 1}), "allowed", "instance 1", &client),
        ("Unload", json!({"instance": 1}), "Gone", "instance 1", &file),
        ("Load", json!({"object": "no\u{1b}[2J\nline"}), "Invalid", "", &String::new()),
    ] {
        let count = gate.audit().len();
        let reply = raw.call(method, &parameters);
        let records = gate.audit().split_off(count);
        let [record] = records.as_slice() else { panic!("{method} {parameters}: {records:?}") };
        let expected = (USER.id, USER.id, pid, "app", method, verdict, about);
        let text = |key: &str| record[key].as_str().unwrap_or_default();
        let number = |key: &str| u32::try_from(record[key].as_u64().unwrap()).unwrap();
        let found = (
            number("uid"),
            number("gid"),
            number("pid"),
            text("app"),
            text("verb"),
            text("verdict"),
            text("about"),
        );
        assert_eq!(found, expected, "{record}");
        assert_eq!(text("by"), by, "{method} {parameters}: {record}");
        // A client finds the record of a refusal by the request id that it was told.
        if let Err(refused) = reply {
            assert_eq!(refused.parameters["request"], record["request"], "{method}");
        }
    }
    let stranger = Raw::connect(&gate, &STRANGER).refused("Open", &json!({"app": "app\u{7}"}), "Denied");
    let record = gate.audit().pop().unwrap();
    assert_eq!((&record["request"], &record["uid"]), (&stranger["request"], &json!(STRANGER.id)));
    assert_eq!((&record["verdict"], &record["by"]), (&json!("Denied"), &Value::Null));
    drop(raw);
    gate.invariants(&before);
}
