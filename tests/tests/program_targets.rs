//! Where programs run, exactly: in that way, in that direction, for that cgroup, at that function, and nowhere else.
//! That each type of program works at all is in `program_types.rs`.

use bpfgate_client::{Client, Error, Instance, LoadOptions, Map, Target};
use bpfgate_tests::cgroup::Cgroup;
use bpfgate_tests::gate::INTERFACE;
use bpfgate_tests::{Gate, SOON, needs_kernel, needs_root, sys, user, wait_until};
use std::net::UdpSocket;

/// The neighbour of the broker's interface.
const NEIGHBOUR: &str = "192.0.2.2";

/// More packets than the kernel answers: answers are limited to a few per second.
const MANY: u64 = 100;

/// The session of an app whose policy is `rules` for its object `o`, with the map `counts` frozen.
fn load(gate: &Gate, rules: &str) -> (Client, Instance, Map) {
    gate.policy("app", &format!("{{client}}\n[objects.o]\n{rules}[objects.o.maps]\ncounts = \"frozen\"\n"));
    let mut client = gate.session("app");
    let mut instance = client
        .load("o", &LoadOptions::default())
        .unwrap_or_else(|error| panic!("{error}\nfor\n{rules}\n{}", gate.log()));
    let counts = instance.take_map("counts").unwrap();
    (client, instance, counts)
}

fn types(instance: &Instance) -> Vec<(&str, &str)> {
    instance.programs.iter().map(|program| (program.name.as_str(), program.kind.as_str())).collect()
}

/// An element of an array of numbers.
fn value(map: &Map, key: u32) -> u64 {
    let bytes = map.lookup(&key.to_ne_bytes()).unwrap().expect("the array has this element");
    u64::from_ne_bytes(bytes.try_into().unwrap())
}

fn interface(name: &str) -> Target {
    Target::Interface(name.to_owned())
}

/// The way in which a program is attached to the interface: `XDP_ATTACHED_*` of linux/if_link.h, or nothing.
fn xdp_mode(gate: &Gate) -> Option<u64> {
    let output = gate.inside("ip").args(["-j", "link", "show", INTERFACE]).output().unwrap();
    let links: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    links[0]["xdp"]["mode"].as_u64()
}

#[test]
fn xdp_native_is_in_the_driver_or_not_at_all() {
    const DRIVER: u64 = 1;
    const GENERIC: u64 = 2;
    needs_root!();
    for (word, mode) in [("native", DRIVER), ("generic", GENERIC), ("any", DRIVER)] {
        let gate = Gate::start();
        let before = gate.baseline();
        let (mut client, instance, counts) = load(
            &gate,
            &format!(
                "{{object:minimal}}\n[[objects.o.xdp]]\nprogram = \"pass\"\nmode = \"{word}\"\n\
                 interfaces = [\"{{interface}}\", \"lo\", \"absent\"]\n"
            ),
        );
        assert_eq!(types(&instance), [("pass", "xdp")]);
        assert_eq!(xdp_mode(&gate), None);
        let link = client.attach(instance.id, "pass", Some(&interface(INTERFACE)), None).unwrap();
        assert_eq!(xdp_mode(&gate), Some(mode), "{word}");
        client.detach(link.id).unwrap();
        assert_eq!(xdp_mode(&gate), None);
        // The loopback interface has no driver that could run it.
        match (word, client.attach(instance.id, "pass", Some(&interface("lo")), None)) {
            ("native", Err(Error::Kernel { call, errno, .. })) => {
                assert_eq!((call.as_str(), errno), ("BPF_LINK_CREATE", libc::EOPNOTSUPP));
            }
            ("generic" | "any", Ok(_)) => {
                gate.send_over_loopback(5);
                assert!(wait_until(SOON, || value(&counts, 0) >= 5), "{word} on lo");
            }
            (_, other) => panic!("{word} on lo: {other:?}"),
        }
        let error = client.attach(instance.id, "pass", Some(&interface("absent")), None).unwrap_err();
        assert!(matches!(&error, Error::Kernel { errno: libc::ENODEV, .. }), "{error:?}");
        // What is not in the policy and not there is refused as what is there.
        for name in [&INTERFACE[..4], "eth77"] {
            let error = client.attach(instance.id, "pass", Some(&interface(name)), None).unwrap_err();
            assert!(matches!(&error, Error::Denied(_)), "{name}: {error:?}");
        }
        drop((client, instance, counts));
        gate.invariants(&before);
    }
}

#[test]
fn tcx_ingress_is_what_comes_and_egress_what_goes() {
    needs_root!();
    needs_kernel!(6, 6, "a tcx link");
    let gate = Gate::start();
    let before = gate.baseline();
    let hook = |direction: &str| {
        format!(
            "[[objects.o.tcx]]\nprogram = \"on_{direction}\"\ndirection = \"{direction}\"\n\
             interfaces = [\"{{interface}}\"]\n"
        )
    };
    let rules = ["{object:tcx}\n", &hook("ingress"), &hook("egress")];
    let (mut client, instance, counts) = load(&gate, &rules.concat());
    assert_eq!(types(&instance), [("on_ingress", "tcx"), ("on_egress", "tcx")]);
    let sender = user::in_network(gate.holder(), || UdpSocket::bind("0.0.0.0:0").unwrap());
    let come = || gate.send_packets(usize::try_from(MANY).unwrap());
    let go = || (0..MANY).for_each(|_| drop(sender.send_to(b"packet", (NEIGHBOUR, 9))));
    // The first packets may wait for the neighbour's address.
    let all_counted = |key, act: &dyn Fn()| {
        wait_until(SOON, || {
            let start = value(&counts, key);
            act();
            wait_until(SOON / 10, || value(&counts, key) >= start + MANY)
        })
    };

    let first = client.attach(instance.id, "on_ingress", None, None).unwrap();
    assert!(all_counted(0, &come), "received: {}", value(&counts, 0));
    let start = value(&counts, 0);
    go();
    assert!(value(&counts, 0) < start + MANY, "what is sent counts as received");
    assert_eq!(value(&counts, 1), 0, "the other program runs unattached");

    let second = client.attach(instance.id, "on_egress", None, None).unwrap();
    assert!(all_counted(1, &go), "sent: {}", value(&counts, 1));
    let start = value(&counts, 1);
    come();
    assert!(value(&counts, 1) < start + MANY, "what is received counts as sent");

    client.detach(first.id).unwrap();
    let start = value(&counts, 0);
    come();
    assert_eq!(value(&counts, 0), start, "packets are counted after the detach");
    assert!(all_counted(1, &go), "the other link was taken down too");
    client.detach(second.id).unwrap();
    drop((client, instance, counts));
    gate.invariants(&before);
}

/// Joins the cgroup, sends as many packets to itself as the second argument says, and as many as the third that nobody
/// receives: so there are more that go than that come.
const TALK: &str = r#"
import os, socket, sys
with open(sys.argv[1] + "/cgroup.procs", "w") as f:
    f.write(str(os.getpid()))
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.bind(("127.0.0.1", 0))
    for _ in range(int(sys.argv[2])):
        s.sendto(b"packet", s.getsockname())
        s.recv(100)
    for _ in range(int(sys.argv[3])):
        s.sendto(b"packet", ("127.0.0.1", 9))
"#;

#[test]
fn cgroup_skb_sees_the_packets_of_its_cgroup_only() {
    needs_root!();
    let cgroup = Cgroup::new();
    let gate = Gate::start();
    let before = gate.baseline();
    let path = cgroup.path.display();
    let hook = |direction: &str| {
        format!(
            "[[objects.o.cgroup_skb]]\nprogram = \"on_{direction}\"\ndirection = \"{direction}\"\n\
             cgroups = [\"{path}\"]\n"
        )
    };
    let rules = ["{object:cgroup}\n", &hook("ingress"), &hook("egress")];
    let (mut client, instance, counts) = load(&gate, &rules.concat());
    assert_eq!(types(&instance), [("on_ingress", "cgroup_skb"), ("on_egress", "cgroup_skb")]);
    let talk = |to_itself: u64, away: u64| {
        let mut command = gate.inside("/usr/bin/python3");
        let command =
            command.args(["-c", TALK]).arg(&cgroup.path).args([to_itself, away].map(|n| n.to_string()));
        assert!(command.status().unwrap().success());
        [0, 1].map(|key| value(&counts, key))
    };
    assert_eq!(talk(3, 1), [0, 0], "counted before anything is attached");
    let target = Target::Cgroup(path.to_string());
    let egress = client.attach(instance.id, "on_egress", Some(&target), None).unwrap();
    assert_eq!(talk(5, 2), [0, 7]);
    client.attach(instance.id, "on_ingress", Some(&target), None).unwrap();
    gate.send_over_loopback(5);
    assert_eq!(talk(7, 1), [7, 15]);
    client.detach(egress.id).unwrap();
    assert_eq!(talk(2, 4), [9, 15]);
    let parent = Target::Cgroup(cgroup.path.parent().unwrap().display().to_string());
    let error = client.attach(instance.id, "on_egress", Some(&parent), None).unwrap_err();
    assert!(matches!(error, Error::Denied(_)), "a cgroup that is not in the policy: {error}");
    drop((client, instance, counts));
    gate.invariants(&before);
}

#[test]
fn uprobes_are_at_the_function_of_the_policy() {
    needs_root!();
    needs_kernel!(6, 6, "a uprobe link");
    let gate = Gate::start();
    let before = gate.baseline();
    let binary = std::fs::read_link("/proc/self/exe").unwrap().display().to_string();
    let hook = |program: &str, at_return| {
        format!(
            "[[objects.o.uprobe]]\nprogram = \"{program}\"\nbinary = \"{binary}\"\nreturn = {at_return}\n\
             symbols = [\"bpfgate_test_target\", \"no_such_function\"]\n"
        )
    };
    let rules = ["{object:uprobe}\n", &hook("on_call", false), &hook("on_return", true)];
    let (mut client, instance, counts) = load(&gate, &rules.concat());
    assert_eq!(types(&instance), [("on_call", "uprobe"), ("on_return", "uprobe")]);
    let all = || [0, 1, 2, 3].map(|key| value(&counts, key));
    let call = |all: &[u64]| all.iter().for_each(|&n| assert_eq!(sys::bpfgate_test_target(n), 2 * n));
    let function = |symbol: &str| Target::Uprobe { binary: binary.clone(), symbol: symbol.to_owned() };
    let target = function("bpfgate_test_target");

    call(&[1, 2, 3]);
    assert_eq!(all(), [0; 4], "it counts before it is attached");
    let entry = client.attach(instance.id, "on_call", Some(&target), None).unwrap();
    call(&[10, 20, 30]);
    assert_eq!(all(), [3, 30, 0, 0]);
    let at_return = client.attach(instance.id, "on_return", Some(&target), None).unwrap();
    call(&[40, 50]);
    assert_eq!(all(), [5, 50, 2, 100]);
    client.detach(entry.id).unwrap();
    call(&[60]);
    assert_eq!(all(), [5, 50, 3, 120]);
    client.detach(at_return.id).unwrap();
    call(&[70]);
    assert_eq!(all(), [5, 50, 3, 120]);

    let error = client.attach(instance.id, "on_call", Some(&function("main")), None).unwrap_err();
    assert!(matches!(error, Error::Denied(_)), "a function that is not in the policy: {error}");
    let error = client.attach(instance.id, "on_call", Some(&function("no_such_function")), None).unwrap_err();
    assert!(error.to_string().contains("no_such_function"), "{error}");
    assert!(!matches!(error, Error::Denied(_) | Error::Helper(_)), "{error}");
    drop((client, instance, counts));
    gate.invariants(&before);
}
