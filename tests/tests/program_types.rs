//! Programs of the network, from load to effect to detach; large ones, and every kind of map.

use bpfgate_client::{LoadOptions, Target};
use bpfgate_tests::cgroup::Cgroup;
use bpfgate_tests::counting::{counts_while_attached, policy};
use bpfgate_tests::gate::INTERFACE;
use bpfgate_tests::{Gate, Raw, SOON, needs_kernel, needs_root, wait_until};
use serde_json::json;

#[test]
fn xdp_in_the_driver_and_in_the_generic_path() {
    needs_root!();
    let gate = Gate::start();
    let before = gate.baseline();
    for (mode, shown) in [("native", "xdp/"), ("generic", "xdpgeneric/"), ("any", "xdp/")] {
        let hook =
            format!("[[objects.o.xdp]]\nprogram = \"pass\"\ninterfaces = [\"gat*\"]\nmode = \"{mode}\"");
        gate.policy(mode, &policy("minimal", "counts", &hook));
        let mut client = gate.session(mode);
        let mut instance = client.load("o", &LoadOptions::default()).unwrap();
        let map = instance.take_map("counts").unwrap();
        let target = Target::Interface(INTERFACE.to_owned());
        let attach = (instance.id.0, "pass", Some(&target));
        counts_while_attached(&mut client, attach, (&map, 0), || gate.send_packets(3));
        let link = client.attach(instance.id, "pass", Some(&target), None).unwrap();
        let output = gate.inside("/usr/sbin/ip").args(["link", "show", "dev", INTERFACE]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            text.contains(&format!("prog/{shown}")[..8]) && text.contains(shown.trim_end_matches('/')),
            "{text}"
        );
        assert_eq!(text.contains("xdpgeneric"), mode == "generic", "{text}");
        client.detach(link.id).unwrap();
        drop((client, instance, map));
        gate.invariants(&before);
    }
}

#[test]
fn xdp_for_packets_in_fragments() {
    needs_root!();
    let gate = Gate::start();
    let hook =
        "[[objects.o.xdp]]\nprogram = \"pass_frags\"\ninterfaces = [\"{interface}\"]\nmode = \"native\"";
    gate.policy("app", &policy("xdp_frags", "counts", hook));
    let before = gate.baseline();
    let mut client = gate.session("app");
    let mut instance = client.load("o", &LoadOptions::default()).unwrap();
    let map = instance.take_map("counts").unwrap();
    let attach = (instance.id.0, "pass_frags", None);
    counts_while_attached(&mut client, attach, (&map, 0), || gate.send_packets(3));
    drop((client, instance, map));
    gate.invariants(&before);
}

#[test]
fn tcx_in_both_directions() {
    needs_root!();
    needs_kernel!(6, 6, "a tcx link");
    let gate = Gate::start();
    let hook = |program: &str, direction: &str| {
        format!(
            "[[objects.o.tcx]]\nprogram = \"{program}\"\ninterfaces = [\"lo\"]\ndirection = \"{direction}\"\n"
        )
    };
    gate.policy(
        "app",
        &policy("tcx", "counts", &(hook("on_ingress", "ingress") + &hook("on_egress", "egress"))),
    );
    let before = gate.baseline();
    let mut client = gate.session("app");
    let mut instance = client.load("o", &LoadOptions::default()).unwrap();
    let map = instance.take_map("counts").unwrap();
    for (program, key) in [("on_ingress", 0), ("on_egress", 1)] {
        let attach = (instance.id.0, program, None);
        counts_while_attached(&mut client, attach, (&map, key), || gate.send_over_loopback(2));
    }
    drop((client, instance, map));
    gate.invariants(&before);
}

/// Sends a packet over loopback from inside of the cgroup to a socket of the cgroup: one out, one in.
fn send_packet(gate: &Gate, cgroup: &Cgroup) {
    let script = "echo $$ > \"$0/cgroup.procs\"; exec ping -q -c 1 -W 1 127.0.0.1";
    let output = gate.inside("/bin/sh").args(["-c", script]).arg(&cgroup.path).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn cgroup_skb_in_both_directions() {
    needs_root!();
    let gate = Gate::start();
    let cgroup = Cgroup::new();
    let hook = |program: &str, direction: &str| {
        let path = cgroup.path.display();
        format!(
            "[[objects.o.cgroup_skb]]\nprogram = \"{program}\"\ncgroups = [\"{path}\"]\ndirection = \"{direction}\"\n"
        )
    };
    gate.policy(
        "app",
        &policy("cgroup", "counts", &(hook("on_ingress", "ingress") + &hook("on_egress", "egress"))),
    );
    let before = gate.baseline();
    let mut client = gate.session("app");
    let mut instance = client.load("o", &LoadOptions::default()).unwrap();
    let map = instance.take_map("counts").unwrap();
    for (program, key) in [("on_ingress", 0), ("on_egress", 1)] {
        let target = Target::Cgroup(cgroup.path.display().to_string());
        let attach = (instance.id.0, program, Some(&target));
        counts_while_attached(&mut client, attach, (&map, key), || send_packet(&gate, &cgroup));
    }
    drop((client, instance, map, cgroup));
    gate.invariants(&before);
}

#[test]
fn a_program_of_hundreds_of_thousands_of_instructions() {
    needs_root!();
    let gate = Gate::start();
    let hook = "[[objects.o.xdp]]\nprogram = \"huge\"\ninterfaces = [\"{interface}\"]";
    gate.policy("app", &policy("huge", "counts", hook));
    gate.policy("less", &(policy("huge", "counts", hook) + "[limits]\ninstructions = 300000\n"));
    let before = gate.baseline();
    let mut client = gate.session("app");
    let mut instance = client.load("o", &LoadOptions::default()).unwrap();
    let map = instance.take_map("counts").unwrap();
    counts_while_attached(&mut client, (instance.id.0, "huge", None), (&map, 0), || gate.send_packets(3));
    Raw::open(&gate, "less").refused("Load", &json!({"object": "o"}), "Quota");
    drop((client, instance, map));
    gate.invariants(&before);
}

#[test]
fn maps_of_every_kind_are_described_and_read() {
    needs_root!();
    let gate = Gate::start();
    let hook =
        "[[objects.o.xdp]]\nprogram = \"fill_maps\"\ninterfaces = [\"{interface}\"]\nmode = \"generic\"";
    let text = policy("percpu", "per_cpu", hook) + "recent = \"proxy\"\nroutes = \"frozen\"\n";
    gate.policy("app", &text);
    let before = gate.baseline();
    let mut client = gate.session("app");
    let mut instance = client.load("o", &LoadOptions::default()).unwrap();
    let mut kinds: Vec<(String, String)> =
        instance.maps.iter().map(|map| (map.name.clone(), map.kind.clone())).collect();
    kinds.sort();
    let expected = [("per_cpu", "percpu_hash"), ("recent", "lru_hash"), ("routes", "lpm_trie")];
    assert_eq!(kinds, expected.map(|(name, kind)| (name.to_owned(), kind.to_owned())));
    client.attach(instance.id, "fill_maps", None, None).unwrap();
    let (per_cpu, routes) = (instance.take_map("per_cpu").unwrap(), instance.take_map("routes").unwrap());
    let filled = || {
        gate.send_packets(3);
        per_cpu.lookup(&[1, 0, 0, 0]).unwrap().is_some()
    };
    assert!(wait_until(SOON, filled));
    assert_eq!(
        per_cpu.lookup(&[1, 0, 0, 0]).unwrap().unwrap().len(),
        8 * bpfgate_client::possible_cpus().unwrap()
    );
    assert_eq!(routes.entries().unwrap().len(), 1);
    let proxied: Vec<_> = client.read_map(instance.id, "recent").collect::<Result<_, _>>().unwrap();
    assert_eq!((proxied.len(), proxied[0].key.as_slice()), (1, [1, 0, 0, 0].as_slice()));
    drop((client, instance, per_cpu, routes));
    gate.invariants(&before);
}
