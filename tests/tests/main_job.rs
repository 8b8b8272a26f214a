//! What bpfgate is for: an app without any capability reads live packet counts.

use bpfgate_client::{Access, LoadOptions, Map, Target};
use bpfgate_tests::gate::INTERFACE;
use bpfgate_tests::{Gate, SOON, USER, as_user, gate, needs_root, wait_until, workspace};
use std::path::Path;

const POLICY: &str = r#"
{client}
[objects.counter]
{object:packet_counter}
[[objects.counter.xdp]]
program = "count_packets"
interfaces = ["{interface}"]
[objects.counter.maps]
counters = "frozen"
"#;

/// Packets that all CPUs counted.
fn packets(counters: &Map) -> u64 {
    let per_cpu = counters.lookup_per_cpu(&[0; 4]).unwrap().unwrap();
    per_cpu.iter().map(|value| u64::from_ne_bytes(value[..8].try_into().unwrap())).sum()
}

#[test]
fn an_app_without_capabilities_reads_live_packet_counts() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("counter", POLICY);
    let before = gate.baseline();
    as_user(&USER, || {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        for set in ["CapPrm:\t", "CapEff:\t", "CapAmb:\t"] {
            assert!(
                status.contains(&format!("{set}{:016x}\n", 0)),
                "this client holds capabilities: {status}"
            );
        }
        let mut client = bpfgate_client::Client::connect(Some(&gate.socket())).unwrap();
        client.open("counter").unwrap();
        let mut instance = client.load("counter", &LoadOptions::default()).unwrap();
        assert_eq!((instance.programs.len(), instance.maps.len()), (1, 1));
        assert_eq!(
            (instance.programs[0].name.as_str(), instance.programs[0].kind.as_str()),
            ("count_packets", "xdp")
        );
        assert_eq!(
            (instance.maps[0].access, instance.maps[0].kind.as_str()),
            (Access::Frozen, "percpu_array")
        );
        let counters = instance.take_map("counters").unwrap();
        assert_eq!(packets(&counters), 0);

        let target = Target::Interface(INTERFACE.to_owned());
        let link = client.attach(instance.id, "count_packets", Some(&target), None).unwrap();
        assert!(link.fd.is_none(), "a link leaves the helper without a grant");
        // The first packets may be lost while the neighbour is asked for its address.
        for round in 1..=3 {
            let start = packets(&counters);
            let grows = || {
                gate.send_packets(10);
                packets(&counters) >= start + 10
            };
            assert!(wait_until(SOON, grows), "round {round}: the counts do not grow");
        }
        client.detach(link.id).unwrap();
        let last = packets(&counters);
        gate.send_packets(20);
        assert_eq!(packets(&counters), last, "packets are counted after the detach");
        client.unload(instance.id).unwrap();
        assert!(client.list().unwrap().is_empty());
    });
    gate.invariants(&before);
}

#[test]
fn the_end_of_a_session_detaches_within_a_second() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("counter", POLICY);
    let before = gate.baseline();
    let mut client = gate.session("counter");
    let mut instance = client.load("counter", &LoadOptions::default()).unwrap();
    client.attach(instance.id, "count_packets", None, None).unwrap();
    let counters = instance.take_map("counters").unwrap();
    let counts = || {
        let start = packets(&counters);
        gate.send_packets(5);
        packets(&counters) > start
    };
    assert!(wait_until(SOON, counts));
    drop(client);
    assert!(wait_until(SOON, || !counts()), "packets are counted a second after the session");
    // The map is the client's for as long as it likes.
    assert!(packets(&counters) > 0);
    drop((counters, instance));
    gate.invariants(&before);
}

#[test]
fn a_plain_python_client_gets_a_usable_map() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("counter", POLICY);
    let before = gate.baseline();
    let script = gate::inherited(&workspace().join("tests/plain_client.py"));
    let mut command = gate.unprivileged(&USER, Path::new("/usr/bin/python3"));
    let output =
        command.arg(script).arg(gate.socket()).args(["counter", "counter", "counters"]).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}{err}");
    let (reply, value) = out.trim_end().split_once('\n').unwrap();
    let reply: serde_json::Value = serde_json::from_str(reply).unwrap();
    assert_eq!(reply["maps"][0]["name"], "counters");
    // Nothing is attached: 16 zero bytes for each possible CPU.
    assert_eq!(value, "00".repeat(16 * bpfgate_client::possible_cpus().unwrap()));
    gate.invariants(&before);
}
