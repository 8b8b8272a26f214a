//! Services: how they start, what they hold, who gets in, and how they end.

use bpfgate_client::{Client, LoadOptions};
use bpfgate_tests::services::{
    self, A_WHILE, BROKER, COUNTER, DropIn, SOCKET, bpfgate, broker_uid, helper, is_active, is_attached,
    journal, kill_main, main_process, packets, property, said, systemctl, units,
};
use bpfgate_tests::{SOON, STRANGER, USER, Who, as_user, process, wait_until};
use nix::sys::signal::Signal;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::time::Instant;

/// An app that filters its own sockets: its helper needs `CAP_BPF` alone, and no interface.
const FILTER: &str =
    "{client}\n[objects.o]\n{object:sockfilter}\n[[objects.o.socket_filter]]\nprogram = \"keep_all\"\n";

/// A classic tracepoint, whose perf events only root may make where `perf_event_paranoid` is 3.
/// Two rules name it: what was opened for the first one serves both.
const TRACE: &str = "{client}\n[objects.o]\n{object:tp}\n[[objects.o.tracepoint]]\nprogram = \"on_exec\"\n\
    events = [\"sched:sched_process_exec\"]\n[[objects.o.tracepoint]]\nprogram = \"on_exec\"\n\
    events = [\"sched:sched_process_exec\"]\n[objects.o.maps]\nevents = \"read-write\"\n";

#[test]
fn the_first_client_starts_the_helper() {
    let gate = bpfgate_tests::services!();
    gate.apply_policy("first", &COUNTER.replace("keep = \"app\"", "keep = \"session\""));
    assert!(!is_active(&helper("first")), "nobody has asked for it yet");
    let start = Instant::now();
    let mut client = gate.session("first");
    let open = start.elapsed();
    let counters = gate.count_packets(&mut client);
    println!("connect to Open {} ms, to attached {} ms", open.as_millis(), start.elapsed().as_millis());
    let before = packets(&counters);
    gate.network.send_to_interface(10);
    assert!(wait_until(SOON, || packets(&counters) == before + 10), "{} packets", packets(&counters));
    assert!(is_active(&helper("first")));
    // The session is all that it was for.
    drop(client);
    let detached =
        || said(&std::process::Command::new("ip").args(["link", "show", "gate0"]).output().unwrap());
    assert!(wait_until(SOON, || !detached().contains("xdp")), "still attached: {}", detached());
}

#[test]
fn an_idle_helper_ends_by_itself_and_comes_again() {
    let gate = bpfgate_tests::services!();
    gate.apply_policy("idle", FILTER);
    drop(gate.session("idle"));
    let first = main_process(&helper("idle"));
    let over = std::time::Duration::from_secs(45);
    assert!(wait_until(over, || !is_active(&helper("idle"))), "it stays for nobody");
    assert_eq!(property(&helper("idle"), "Result"), "success");
    assert!(!first.is_alive());
    drop(gate.session("idle"));
    assert_ne!(main_process(&helper("idle")).pid, first.pid);
}

/// A socket for datagrams sends to every other one that has a path, and nothing but what it sees is in the way: landlock has
/// no rule about it.
#[test]
fn a_helper_sees_nothing_of_run_but_the_way_to_the_manager() {
    let gate = bpfgate_tests::services!();
    gate.apply_policy("filter", FILTER);
    let _session = gate.session("filter");
    let run = format!("/proc/{}/root/run", main_process(&helper("filter")).pid);
    let sockets = |run: &str| {
        // Not by its type in the directory, which is that of what it was mounted upon.
        let is_socket = ["-exec", "test", "-S", "{}", ";", "-printf", "%P\\n"];
        let found = std::process::Command::new("find").arg(run).args(is_socket).output();
        String::from_utf8(found.unwrap().stdout).unwrap()
    };
    assert_eq!(sockets(&run), "systemd/notify\n");
    assert!(sockets("/run").lines().count() > 3, "{}", sockets("/run"));
}

#[test]
fn each_process_holds_what_its_policy_needs_and_nothing_else() {
    let gate = bpfgate_tests::services!();
    gate.policy("filter", FILTER);
    gate.apply_policy("count", COUNTER);
    let [mut filter, mut count] = ["filter", "count"].map(|app| gate.session(app));
    let loaded = [&mut filter, &mut count].map(|client| client.load("o", &LoadOptions::default()).unwrap());
    let [one, other] = ["filter", "count"].map(|app| main_process(&helper(app)));
    for (pid, mask) in [(one.pid, "0000008000000000"), (other.pid, "0000008000001000")] {
        for (field, expected) in [
            ("CapInh", "0000000000000000"),
            ("CapPrm", mask),
            ("CapEff", mask),
            ("CapBnd", mask),
            ("CapAmb", "0000000000000000"),
        ] {
            let got = process::status(pid, field);
            assert!(got.iter().all(|value| value == expected), "{field} of {pid} is {got:?}, not {expected}");
        }
        // The loader and its worker: nothing that they could use.
        let children: Vec<_> =
            process::all().filter_map(process::Process::of).filter(|p| p.parent == pid).collect();
        assert_eq!(children.len(), 1, "{children:?}");
        for field in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(process::status(children[0].pid, field), ["0000000000000000"], "{field}");
        }
    }
    let ids = |pid| (process::status(pid, "Uid"), fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap());
    let (one, other) = (ids(one.pid), ids(other.pid));
    assert_ne!(one.0, other.0, "two apps, two users");
    assert_ne!(one.1, other.1, "two apps, two cgroups");
    assert!(!one.0[0].starts_with("0\t") && !other.0[0].starts_with("0\t"));
    let broker = main_process(BROKER);
    for field in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(process::status(broker.pid, field), ["0000000000000000"], "{field} of the broker");
    }
    let children = process::all().filter_map(process::Process::of).filter(|p| p.parent == broker.pid).count();
    assert_eq!(children, 0, "the broker has children");
    // A helper without interfaces cannot see any.
    assert_ne!(process::network(main_process(&helper("filter")).pid), process::network(1));
    assert_eq!(process::network(main_process(&helper("count")).pid), process::network(1));
    drop(loaded);
}

#[test]
fn a_unit_that_grants_more_than_the_policy_needs_is_not_served() {
    let gate = bpfgate_tests::services!();
    gate.apply_policy("grants", FILTER);
    let set = "CAP_BPF CAP_SYS_ADMIN";
    let more = DropIn::new(
        &helper("grants"),
        &format!("[Service]\nCapabilityBoundingSet={set}\nAmbientCapabilities={set}\n"),
    );
    let error = gate.try_session("grants").err().expect("it is not served");
    assert!(matches!(error, bpfgate_client::Error::Helper(_)), "{error:?}");
    assert!(
        wait_until(A_WHILE, || journal().contains("the unit grants capabilities 8000200000")),
        "{}",
        journal()
    );
    drop(more);
    drop(gate.session_again("grants"));
}

#[test]
fn only_the_broker_gets_to_a_helper() {
    let gate = bpfgate_tests::services!();
    gate.apply_policy("closed", FILTER);
    let path = std::path::Path::new("/run/bpfgate/helper/closed.sock");
    let socket = fs::metadata(path).unwrap();
    let broker = broker_uid();
    assert!(socket.file_type().is_socket());
    assert_eq!((socket.uid(), socket.permissions().mode() & 0o777), (broker, 0o600));
    let knock = || bpfgate_protocol::channel::Channel::connect(path);
    // By the mode ...
    assert!(as_user(&USER, || knock().is_err()), "a user connects to the socket of a helper");
    // ... and for root, whom no mode keeps out, by who it is.
    let channel = knock().expect("root connects");
    assert!(wait_until(A_WHILE, || journal().contains("uid 0 (pid")), "{}", journal());
    let mut buffer = [0; 64];
    let got = bpfgate_protocol::channel::receive(
        std::os::fd::AsFd::as_fd(&channel),
        &mut buffer,
        nix::sys::socket::MsgFlags::MSG_DONTWAIT,
    );
    assert!(got.is_ok_and(|got| got.len == 0), "the helper speaks to root");
    // And it goes on.
    drop(gate.session("closed"));
    let _ = as_user(&STRANGER, || {
        Client::from_stream(std::os::unix::net::UnixStream::connect(SOCKET).unwrap()).open("closed")
    })
    .unwrap_err();
}

#[test]
fn administrators_see_what_runs_and_clients_do_not() {
    let gate = bpfgate_tests::services!();
    gate.apply_policy("shown", COUNTER);
    let mut client = gate.session("shown");
    let _counters = gate.count_packets(&mut client);
    let text = said(&bpfgate(&["status"]));
    for expected in [
        "bpfgate.service",
        "active (running)",
        "bpfgate-helper@shown.service",
        "CAP_NET_ADMIN CAP_BPF",
        "count_packets",
        "gate0",
        "ABI",
    ] {
        assert!(text.contains(expected), "{expected} is missing:\n{text}");
    }
    let broker = text.lines().find(|line| line.starts_with("bpfgate.service")).unwrap();
    assert!(broker.contains("none"), "{broker}");
    let json: serde_json::Value = serde_json::from_slice(&bpfgate(&["status", "--json"]).stdout).unwrap();
    assert_eq!(json["apps"][0]["survey"]["instances"][0]["links"][0]["target"], "gate0", "{json}");
    let admin = std::path::Path::new("/run/bpfgate/io.bpfgate.Admin");
    assert!(as_user(&USER, || std::os::unix::net::UnixStream::connect(admin).is_err()));
    // The socket of clients speaks the interface of clients.
    let mut raw = bpfgate_tests::Raw::on(gate.connect(&USER));
    let refused = raw.call("io.bpfgate.Admin.Status", &serde_json::json!({})).unwrap_err();
    assert_eq!(refused.error, "org.varlink.service.InterfaceNotFound");
    let group = fs::read_to_string("/etc/group").unwrap();
    let group =
        group.lines().find(|line| line.starts_with("bpfgate-admin:")).unwrap().split(':').nth(2).unwrap();
    let member = Who::new(12_399).in_groups(&[group.parse().unwrap()]);
    as_user(&member, || bpfgate_client::admin::Admin::connect(None).unwrap().status().unwrap());
}

#[test]
fn what_only_root_may_open_is_opened_by_root_for_it() {
    let gate = bpfgate_tests::services!();
    gate.apply_policy("trace", TRACE);
    let text =
        fs::read_to_string("/run/systemd/generator/bpfgate-helper@trace.service.d/50-policy.conf").unwrap();
    assert!(text.contains("--prepare"), "{text}");
    let mut client = gate.session("trace");
    let mut instance = client.load("o", &LoadOptions::default()).unwrap();
    let pid = main_process(&helper("trace")).pid;
    assert_eq!(process::status(pid, "CapEff"), ["000000c000000000"]);
    let events = instance.take_map("events").unwrap();
    let target = bpfgate_client::Target::Event("sched:sched_process_exec".into());
    client.attach(instance.id, "on_exec", Some(&target), None).unwrap();
    as_user(&USER, || {
        let mut ring = bpfgate_client::RingBuffer::new(events).unwrap();
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        // {pid, uid}; the pid is the kernel's, which in a container is another one than ours.
        let mut seen = false;
        let arrives = || {
            ring.consume(|record| seen |= record[4..8] == USER.id.to_ne_bytes()).unwrap();
            seen
        };
        assert!(wait_until(SOON, arrives), "no record of the program that was started");
    });
    // A restart brings fresh events; those of before are not piled up.
    let kept = || property(&helper("trace"), "NFileDescriptorStore");
    let before = kept();
    drop(client);
    for _ in 0..3 {
        systemctl(&["restart", &helper("trace")]);
    }
    assert_eq!(kept(), before);
}

#[test]
fn at_boot_everything_is_there_without_anybody_asking() {
    let gate = bpfgate_tests::services!();
    let text = COUNTER
        .replace("\"app\"", "\"boot\"")
        .replace("{client}", "[[client]]\nuser = 12345\nmay = [\"maps\"]\n");
    gate.apply_policy("boot", &text);
    let mut client = gate.session_again("boot");
    let mut instances = client.list().unwrap();
    assert!(wait_until(A_WHILE, || {
        instances = client.list().unwrap();
        instances.first().is_some_and(|instance| instance.links.len() == 1)
    }));
    let id = instances[0].id;
    let counters = client.map(id, "counters").unwrap().into_map().unwrap();
    assert!(gate.sees_packets(&counters));
    // Nobody takes it down, ...
    assert!(client.unload(id).is_err() && client.detach(instances[0].links[0].id).is_err());
    assert!(client.load("o", &LoadOptions::default()).is_err());
    // ... and when what it was attached to goes and comes again, so does the attachment.
    let ip = |line: &str| {
        assert!(std::process::Command::new("ip").args(line.split(' ')).status().unwrap().success());
    };
    ip("link del gate0");
    ip("link add gate0 type veth peer name gate9");
    ip("link set gate0 up");
    let attached = || is_attached("gate0");
    assert!(wait_until(A_WHILE, attached), "{}", journal());
    // The machine is as after a boot: nobody has asked, and it runs.
    drop(client);
    systemctl(&["stop", &helper("boot")]);
    assert!(!attached(), "stopped is stopped");
    systemctl(&["start", "multi-user.target"]);
    assert!(wait_until(A_WHILE, attached), "{}", journal());
}

#[test]
fn a_network_namespace_of_the_policy_is_where_it_attaches() {
    let gate = bpfgate_tests::services!();
    let run = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        assert!(std::process::Command::new(words[0]).args(&words[1..]).status().unwrap().success(), "{line}");
    };
    run("ip netns add blue");
    run("ip -n blue link set lo up");
    let text = COUNTER.replace("{interface}", "lo");
    gate.apply_policy("blue", &format!("netns = \"/run/netns/blue\"\n{text}"));
    let mut client = gate.session("blue");
    let counters = gate.count_packets(&mut client);
    run("ip netns exec blue ping -c 1 -W 2 -q 127.0.0.1");
    assert!(packets(&counters) > 0, "it is attached elsewhere");
    assert_ne!(process::network(main_process(&helper("blue")).pid), process::network(1));
    drop(client);
    fs::remove_file(services::policy_path("blue")).unwrap();
    gate.apply();
    run("ip netns del blue");
}

#[test]
fn a_restart_of_the_broker_touches_no_helper() {
    let gate = bpfgate_tests::services!();
    gate.apply_policy("apart", COUNTER);
    let mut client = gate.session("apart");
    let counters = gate.count_packets(&mut client);
    let before = main_process(&helper("apart"));
    for how in ["kill", "restart", "daemon-reexec"] {
        match how {
            "kill" => kill_main(BROKER, Signal::SIGKILL),
            "restart" => drop(systemctl(&["restart", BROKER])),
            _ => drop(systemctl(&["daemon-reexec"])),
        }
        let mut client = gate.session_again("apart");
        assert_eq!(client.list().unwrap()[0].links.len(), 1, "after {how}");
        assert_eq!(main_process(&helper("apart")), before, "after {how} the helper is another one");
        let start = packets(&counters);
        gate.network.send_to_interface(3);
        assert!(wait_until(SOON, || packets(&counters) == start + 3), "after {how}");
    }
    assert!(units("bpfgate-helper@apart*").len() >= 2);
}
