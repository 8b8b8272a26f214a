//! Services: what becomes of what runs when policies come, change and go.

use bpfgate_client::{Error, LoadOptions, Target};
use bpfgate_tests::services::{
    A_WHILE, COUNTER, bpfgate, broker_uid, helper, is_active, is_attached, journal, kill_main, main_process,
    packets, policy_path, property, said, systemctl, units,
};
use bpfgate_tests::{SOON, wait_until};
use std::fs;
use std::process::Command;
use std::time::Instant;

#[test]
fn a_policy_that_is_removed_takes_everything_with_it() {
    let gate = bpfgate_tests::services!();
    gate.policy("stays", &COUNTER.replace("{interface}", "lo"));
    gate.apply_policy("goes", COUNTER);
    let mut stays = gate.session("stays");
    let _map = gate.count_packets(&mut stays);
    let untouched = main_process(&helper("stays"));
    let mut goes = gate.session("goes");
    let counters = gate.count_packets(&mut goes);
    assert!(is_attached("gate0"));
    fs::remove_file(policy_path("goes")).unwrap();
    let start = Instant::now();
    let text = gate.apply();
    assert!(text.contains("goes"), "{text}");
    assert!(
        wait_until(SOON, || !is_attached("gate0")),
        "still attached {} ms later",
        start.elapsed().as_millis()
    );
    println!("removed and detached after {} ms", start.elapsed().as_millis());
    assert!(matches!(goes.list(), Err(Error::Helper(_) | Error::Io { .. })), "the session goes on");
    assert!(matches!(gate.try_session("goes"), Err(Error::Denied(_))));
    let left = || units("bpfgate-helper@goes*");
    assert!(wait_until(A_WHILE, || left().is_empty()), "{:?}", left());
    assert!(!std::path::Path::new("/run/bpfgate/helper/goes.sock").exists());
    let still = packets(&counters);
    gate.network.send_to_interface(5);
    assert_eq!(packets(&counters), still);
    // Others have noticed nothing.
    assert_eq!(main_process(&helper("stays")), untouched);
    assert_eq!(stays.list().unwrap().len(), 1);
}

#[test]
fn a_narrower_policy_revokes_what_is_outside_of_it_and_nothing_else() {
    let gate = bpfgate_tests::services!();
    let wide = COUNTER.replace("\"{interface}\"", "\"{interface}\", \"lo\"");
    gate.apply_policy("narrow", &wide);
    let mut client = gate.session("narrow");
    let instance = client.load("o", &LoadOptions::default()).unwrap();
    for interface in ["gate0", "lo"] {
        client
            .attach(instance.id, "count_packets", Some(&Target::Interface(interface.into())), None)
            .unwrap();
    }
    drop(client);
    assert!(is_attached("gate0") && is_attached("lo"));
    gate.policy("narrow", COUNTER);
    // Not in force yet: the one of before is.
    assert_eq!(gate.session("narrow").list().unwrap()[0].links.len(), 2);
    let dry = said(&bpfgate(&["policy", "apply", "--dry-run"]));
    assert!(dry.contains("lo"), "{dry}");
    assert!(is_attached("lo"), "a dry run has an effect");
    let text = gate.apply();
    assert!(text.contains("lo"), "{text}");
    assert!(wait_until(SOON, || !is_attached("lo")), "{}", journal());
    assert!(is_attached("gate0"), "what is still allowed is gone\n{}", journal());
    let mut client = gate.session_again("narrow");
    let links = &client.list().unwrap()[0].links;
    assert_eq!(links.iter().map(|link| link.target.as_str()).collect::<Vec<_>>(), ["gate0"]);
    // Nothing persistent is allowed any more.
    gate.apply_policy("narrow", &COUNTER.replace("keep = \"app\"", "keep = \"session\""));
    assert!(wait_until(SOON, || !is_attached("gate0")), "{}", journal());
    assert!(gate.session_again("narrow").list().unwrap().is_empty());
}

#[test]
fn an_object_with_another_digest_is_not_the_one_that_was_approved() {
    let gate = bpfgate_tests::services!();
    gate.apply_policy("bytes", COUNTER);
    let mut client = gate.session("bytes");
    let _map = gate.count_packets(&mut client);
    drop(client);
    let text = fs::read_to_string(policy_path("bytes")).unwrap();
    let (start, rest) = text.split_once("sha256 = \"").unwrap();
    fs::write(policy_path("bytes"), format!("{start}sha256 = \"{}{}", "0".repeat(64), &rest[64..])).unwrap();
    gate.apply();
    assert!(wait_until(SOON, || !is_attached("gate0")), "{}", journal());
    assert!(gate.session_again("bytes").list().unwrap().is_empty());
}

#[test]
fn a_bad_file_disables_its_own_app_and_says_so() {
    let gate = bpfgate_tests::services!();
    gate.policy("good", COUNTER);
    gate.policy("bad", "unknown = 1\n");
    let output = bpfgate(&["policy", "apply"]);
    let text = said(&output);
    assert_eq!(output.status.code(), Some(4), "{text}");
    assert!(text.contains("bad.toml:2:1") && text.contains("unknown"), "{text}");
    drop(gate.session("good"));
    assert!(matches!(gate.try_session("bad"), Err(Error::Denied(_))));
    assert!(units("bpfgate-helper@bad*").is_empty());
    assert!(wait_until(A_WHILE, || journal().contains("bad.toml")), "the broker's log is silent");
    fs::remove_file(policy_path("bad")).unwrap();
    gate.apply();
}

#[test]
fn what_is_not_changed_is_not_restarted() {
    let gate = bpfgate_tests::services!();
    gate.policy("one", COUNTER);
    gate.apply_policy("two", &COUNTER.replace("{interface}", "lo"));
    let (mut one, mut two) = (gate.session("one"), gate.session("two"));
    let _maps = (gate.count_packets(&mut one), gate.count_packets(&mut two));
    let before = [main_process(&helper("one")), main_process(&helper("two"))];
    gate.policy("two", &format!("description = \"another\"\n{}", COUNTER.replace("{interface}", "lo")));
    gate.apply();
    assert_eq!(main_process(&helper("one")), before[0]);
    assert_eq!(one.list().unwrap().len(), 1);
    // It goes on with the new file, and its session too.
    assert_eq!(main_process(&helper("two")), before[1]);
    assert_eq!(two.list().unwrap()[0].links.len(), 1);
    let digest = bpfgate_tests::gate::sha256(&policy_path("two"));
    assert!(property(&helper("two"), "StatusText").contains(&digest), "the new file is not in force");
    // Capabilities follow the policy: with a filter only, CAP_NET_ADMIN is gone.
    let filter =
        "{client}\n[objects.o]\n{object:sockfilter}\n[[objects.o.socket_filter]]\nprogram = \"keep_all\"\n";
    gate.apply_policy("two", filter);
    drop(gate.session_again("two"));
    assert_eq!(
        bpfgate_tests::process::status(main_process(&helper("two")).pid, "CapEff"),
        ["0000008000000000"]
    );
    assert!(!is_attached("lo"));
    assert!(is_active(&helper("two")));
    systemctl(&["stop", &helper("two")]);
}

/// A raw tracepoint that is kept. Its link knows no detaching: it ends with the last descriptor, and systemd has one.
const TRACE: &str = "{client}\n[objects.o]\n{object:rawtp}\n[[objects.o.raw_tracepoint]]\nprogram = \"on_exit\"\n\
    events = [\"sched_process_exit\"]\n[objects.o.maps]\ncounts = \"read-write\"\n[lifetime]\nkeep = \"app\"\n";

fn kept(app: &str) -> u32 {
    property(&helper(app), "NFileDescriptorStore").parse().unwrap()
}

#[test]
fn what_is_revoked_is_gone_everywhere() {
    let gate = bpfgate_tests::services!();
    gate.apply_policy("trace", TRACE);
    drop(gate.session("trace"));
    let nothing = kept("trace");
    let load = || {
        let mut client = gate.session_again("trace");
        let mut instance = client.load("o", &LoadOptions::default()).unwrap();
        client.attach(instance.id, "on_exit", None, None).unwrap();
        instance.take_map("counts").unwrap()
    };
    let counts = |map: &bpfgate_client::Map| {
        let start = bpfgate_tests::counting::count(map, 0);
        Command::new("true").status().unwrap();
        wait_until(std::time::Duration::from_millis(300), || bpfgate_tests::counting::count(map, 0) > start)
    };
    for (how, text) in [
        ("another event", TRACE.replace("sched_process_exit", "sched_process_fork")),
        ("not kept any more", TRACE.replace("\"app\"", "\"session\"")),
        ("another object", TRACE.replace("rawtp", "minimal_btf")),
    ] {
        gate.apply_policy("trace", TRACE);
        let map = load();
        assert!(counts(&map));
        gate.apply_policy("trace", &text);
        assert!(wait_until(SOON, || !counts(&map)), "{how}: it goes on\n{}", journal());
        drop(gate.session_again("trace"));
        // Back to what was: and what was revoked does not come back with it.
        gate.apply_policy("trace", TRACE);
        let mut client = gate.session_again("trace");
        for instance in client.list().unwrap() {
            assert!(instance.links.is_empty(), "{how}: a link came back");
            client.unload(instance.id).unwrap();
        }
        assert!(!counts(&map), "{how}: it counts again");
        // The records of now and of before, and nothing else.
        assert!(kept("trace") <= nothing + 2, "{how}: {} are kept\n{}", kept("trace"), journal());
    }
}

#[test]
fn a_function_that_is_not_granted_any_more_is_not_called_any_more() {
    let gate = bpfgate_tests::services!();
    let text = "{client}\n[objects.o]\n{object:sendsignal}\n[[objects.o.tracepoint]]\nprogram = \"signal_self\"\n\
        events = [\"sched:sched_process_exec\"]\n[objects.o.helpers]\nallow = [\"bpf_send_signal\"]\n[lifetime]\nkeep = \"app\"\n";
    gate.apply_policy("calls", text);
    // Loaded, and not attached to anything: it would send signals.
    let _ = gate.session("calls").load("o", &LoadOptions::default()).unwrap();
    assert_eq!(gate.session_again("calls").list().unwrap().len(), 1);
    gate.apply_policy("calls", &format!("description = \"more\"\n{text}"));
    assert_eq!(gate.session_again("calls").list().unwrap().len(), 1, "{}", journal());
    gate.apply_policy("calls", &text.replace("allow = [\"bpf_send_signal\"]", ""));
    assert!(gate.session_again("calls").list().unwrap().is_empty(), "{}", journal());
}

#[test]
fn a_policy_that_is_edited_and_not_applied_costs_nothing() {
    let gate = bpfgate_tests::services!();
    let counters = gate.kept_counter("edit");
    let good = fs::read_to_string(policy_path("edit")).unwrap();
    for bad in ["", "version = 1\nnonsense", &good.replace("xdp", "tcx")] {
        fs::write(policy_path("edit"), bad).unwrap();
        // The administrator gets an answer at once, whatever it is.
        let start = Instant::now();
        let _ = bpfgate_client::admin::Admin::connect(None).unwrap().instances("edit");
        assert!(start.elapsed() < A_WHILE * bpfgate_tests::slowness(), "no answer for {:?}", start.elapsed());
        kill_main(&helper("edit"), nix::sys::signal::Signal::SIGKILL);
        std::thread::sleep(std::time::Duration::from_secs(3));
        assert!(gate.sees_packets(&counters), "{bad:?}: it is gone\n{}", journal());
        fs::write(policy_path("edit"), &good).unwrap();
        assert_eq!(gate.session_again("edit").list().unwrap()[0].links.len(), 1, "{}", journal());
    }
}

#[test]
fn an_invalid_policy_does_not_start_its_helper_again_and_again() {
    let gate = bpfgate_tests::services!();
    let text = "{client}\n[objects.o]\n{object:tp}\n[[objects.o.tracepoint]]\nprogram = \"on_exec\"\n\
        events = [\"sched:sched_process_exec\"]\n";
    gate.apply_policy("again", text);
    let good = fs::read_to_string(policy_path("again")).unwrap();
    fs::write(policy_path("again"), "version = 1\nnonsense").unwrap();
    // The broker refuses by itself; a socket that is knocked at all the same starts the helper once.
    let broker = broker_uid();
    let knock = || {
        let path = std::path::Path::new("/run/bpfgate/helper/again.sock");
        bpfgate_tests::as_user(&bpfgate_tests::Who::new(broker), || {
            bpfgate_protocol::channel::Channel::connect(path)
        })
    };
    let _ = knock();
    std::thread::sleep(std::time::Duration::from_secs(2));
    assert_eq!(property("bpfgate-helper@again.socket", "ActiveState"), "active", "{}", journal());
    assert!(property(&helper("again"), "NRestarts").parse::<u32>().unwrap() <= 1, "{}", journal());
    fs::write(policy_path("again"), good).unwrap();
    drop(gate.session_again("again"));
    // Events that were prepared are let go of with the rule.
    let before = kept("again");
    assert!(before >= 4, "{before}");
    gate.apply_policy("again", COUNTER);
    drop(gate.session_again("again"));
    assert!(kept("again") <= 2, "{} are kept", kept("again"));
}

#[test]
fn what_is_loaded_at_boot_follows_its_policy() {
    let gate = bpfgate_tests::services!();
    let reader = "[[client]]\nuser = 12345\nmay = [\"maps\"]\n";
    let boot = COUNTER.replace("\"app\"", "\"boot\"").replace("{client}", reader);
    gate.apply_policy("wider", &boot);
    assert!(wait_until(A_WHILE, || is_attached("gate0")), "{}", journal());
    gate.apply_policy("wider", &boot.replace("\"{interface}\"", "\"{interface}\", \"lo\""));
    assert!(wait_until(A_WHILE, || is_attached("gate0") && is_attached("lo")), "{}", journal());
    // A cgroup that comes later.
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let root = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).unwrap();
    let path = format!("{}/bpfgate-late", root.split(' ').nth(1).unwrap());
    let text = format!(
        "{reader}[objects.o]\n{{object:cgroup}}\n[[objects.o.cgroup_skb]]\nprogram = \"on_egress\"\ndirection = \"egress\"\n\
         cgroups = [\"{path}\"]\n[objects.o.maps]\ncounts = \"read-write\"\n[lifetime]\nkeep = \"boot\"\n"
    );
    gate.apply_policy("wider", &text);
    assert!(!is_attached("gate0") && !is_attached("lo"), "{}", journal());
    fs::create_dir(&path).unwrap();
    let links = || {
        gate.try_session("wider")
            .and_then(|mut client| client.list())
            .map_or(0, |all| all.iter().map(|i| i.links.len()).sum::<usize>())
    };
    let start = Instant::now();
    let limit = std::time::Duration::from_secs(60);
    // Not asking all the time: a helper with sessions is not started anew.
    let attached = wait_until(limit, || {
        std::thread::sleep(std::time::Duration::from_secs(5));
        links() == 1
    });
    assert!(attached, "{}", journal());
    println!("attached to a cgroup {} s after it came", start.elapsed().as_secs());
    fs::remove_file(policy_path("wider")).unwrap();
    gate.apply();
    fs::remove_dir(&path).unwrap();
}

#[test]
fn a_broker_that_breaks_the_rules_does_not_end_the_helper() {
    let gate = bpfgate_tests::services!();
    let counters = gate.kept_counter("rules");
    let before = main_process(&helper("rules"));
    let broker = broker_uid();
    // The real one lets go of a helper that nobody uses.
    std::thread::sleep(std::time::Duration::from_secs(6));
    let path = std::path::Path::new("/run/bpfgate/helper/rules.sock");
    let null = fs::File::open("/dev/null").unwrap();
    for round in 0..200 {
        let channel = bpfgate_tests::as_user(&bpfgate_tests::Who::new(broker), || {
            bpfgate_protocol::channel::Channel::connect(path)
        });
        // Its queue may be full for a moment.
        let Ok(channel) = channel else { continue };
        let fds = [std::os::fd::AsFd::as_fd(&null)];
        let _ = match round % 4 {
            0 => channel.send_bytes(b"nonsense", &[]),
            1 => channel.send_bytes(&[0; 12], &fds),
            2 => channel.send_bytes(&[0xff; 4096], &fds[..0]),
            _ => Ok(()),
        };
    }
    assert_eq!(main_process(&helper("rules")), before, "{}", journal());
    assert_eq!(gate.session_again("rules").list().unwrap()[0].links.len(), 1);
    assert!(gate.sees_packets(&counters));
}
