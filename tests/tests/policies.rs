//! The example policies, as they stand in policies/: only the path and digest of the object are filled in, and the
//! cgroup, which a machine may not have.

use bpfgate_client::ringbuf::RingBuffer;
use bpfgate_client::{Access, Client, Error, LoadOptions, Target};
use bpfgate_tests::cgroup::Cgroup;
use bpfgate_tests::gate::sha256;
use bpfgate_tests::{Gate, SOON, USER, Who, needs_root, wait_until, workspace};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

const EXAMPLES: [(&str, &str); 3] =
    [("egress-meter", "egress_meter"), ("exec-tracer", "exec_tracer"), ("packet-counter", "packet_counter")];

/// `replace`, and what is to be replaced is there.
fn replaced(text: &str, from: &str, to: &str) -> String {
    assert_eq!(text.matches(from).count(), 1, "the example has {from:?} once");
    text.replace(from, to)
}

/// An example as its author wrote it, but with the path of the object.
fn with_path(gate: &Gate, app: &str) -> String {
    let object = EXAMPLES.iter().find(|example| example.0 == app).expect("an example").1;
    let text = fs::read_to_string(workspace().join(format!("policies/{app}.toml"))).unwrap();
    let path = gate.object(object);
    replaced(&text, &format!("/usr/lib/bpfgate/{object}.bpf.o"), path.to_str().unwrap())
}

/// Installs an example as its comments say.
fn install(gate: &Gate, app: &str, adapt: impl Fn(&str) -> String) {
    let text = with_path(gate, app);
    let object = EXAMPLES.iter().find(|example| example.0 == app).expect("an example").1;
    let text = replaced(&text, &"0".repeat(64), &sha256(&gate.object(object)));
    fs::write(gate.policy_path(app), adapt(&text)).unwrap();
    gate.reload();
}

fn id(database: &str, name: &str) -> u32 {
    let output = Command::new("getent").args([database, name]).output().unwrap();
    let line = String::from_utf8(output.stdout).unwrap();
    line.split(':').nth(2).unwrap_or_else(|| panic!("{name} is in {database}: {line:?}")).parse().unwrap()
}

/// Somebody in the group adm.
fn watcher() -> Who {
    USER.in_groups(&[id("group", "adm")])
}

fn session(gate: &Gate, who: &Who, app: &str) -> Client {
    let mut client = gate.client(who);
    client.open(app).unwrap_or_else(|error| panic!("{app}: {error}\n{}", gate.log()));
    client
}

/// Packets and bytes that all CPUs counted, from a value `struct traffic` per CPU.
fn traffic(value: &[u8]) -> (u64, u64) {
    let cpus = bpfgate_client::possible_cpus().unwrap();
    assert_eq!(value.len(), 16 * cpus);
    let word = |at: usize| u64::from_ne_bytes(value[at..at + 8].try_into().unwrap());
    (0..cpus).fold((0, 0), |(packets, bytes), cpu| (packets + word(16 * cpu), bytes + word(16 * cpu + 8)))
}

#[test]
fn every_example_is_tried_here() {
    let mut found: Vec<String> = fs::read_dir(workspace().join("policies"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    found.sort();
    assert_eq!(found, EXAMPLES.map(|example| example.0));
}

#[test]
fn as_shipped_the_examples_load_nothing() {
    needs_root!();
    let gate = Gate::start();
    let before = gate.baseline();
    let adm = watcher();
    let daemon = Who::new(id("passwd", "daemon"));
    for ((app, _), who, object) in
        [(EXAMPLES[0], &daemon, "meter"), (EXAMPLES[1], &adm, "tracer"), (EXAMPLES[2], &adm, "counter")]
    {
        fs::write(gate.policy_path(app), with_path(&gate, app)).unwrap();
        gate.reload();
        let error = session(&gate, who, app).load(object, &LoadOptions::default()).unwrap_err();
        assert!(
            matches!(&error, Error::Object(refusal) if refusal.message.contains("SHA-256")),
            "{app}: {error}"
        );
        let error = gate.client(&USER).open(app).unwrap_err();
        assert!(matches!(error, Error::Denied(_)), "{app}, for somebody without its group: {error}");
    }
    gate.invariants(&before);
}

#[test]
fn packet_counter_counts_on_the_interfaces_it_names() {
    needs_root!();
    let gate = Gate::start();
    install(&gate, "packet-counter", str::to_owned);
    let ip =
        |line: &str| assert!(gate.inside("ip").args(line.split(' ')).status().unwrap().success(), "{line}");
    // The interface where packets arrive takes a name that only the pattern of the policy fits.
    for line in [
        "link set gate0 down",
        "link set gate0 name lan7",
        "link set lan7 up",
        "link add eth0 type veth peer name other",
    ] {
        ip(line);
    }
    let before = gate.baseline();
    let mut client = session(&gate, &watcher(), "packet-counter");
    let mut instance = client.load("counter", &LoadOptions::default()).unwrap();
    assert_eq!(instance.maps[0].access, Access::Frozen);
    let counters = instance.take_map("counters").unwrap();
    let counted = || traffic(&counters.lookup(&[0; 4]).unwrap().unwrap());
    let attach = |client: &mut Client, name: &str| {
        client.attach(instance.id, "count_packets", Some(&Target::Interface(name.to_owned())), None)
    };
    let denied = attach(&mut client, "lo").unwrap_err();
    assert!(matches!(denied, Error::Denied(_)), "{denied}");
    attach(&mut client, "eth0").expect("a literal name");
    assert_eq!(counted(), (0, 0));
    attach(&mut client, "lan7").expect("a name that fits the pattern");
    let grows = || {
        gate.send_packets(5);
        counted().0 >= 5
    };
    assert!(wait_until(SOON, grows), "{:?}", counted());
    let (packets, bytes) = counted();
    // The least packet here: Ethernet, IPv4, UDP headers, or Ethernet and ARP.
    assert!(bytes >= 42 * packets, "{packets} packets of {bytes} bytes");
    let error = client.load("counter", &LoadOptions::default()).unwrap_err();
    assert!(matches!(error, Error::Quota(_)), "its limit is one program and one map: {error}");
    drop((client, counters, instance));
    gate.invariants(&before);
}

#[test]
fn exec_tracer_tells_of_the_user_that_was_asked_for() {
    const WANTED: u32 = 23_451;
    const OTHER: u32 = 23_452;
    needs_root!();
    let gate = Gate::start();
    install(&gate, "exec-tracer", str::to_owned);
    let before = gate.baseline();
    let mut client = session(&gate, &watcher(), "exec-tracer");
    let asked = |value| LoadOptions {
        globals: BTreeMap::from([("target_uid".to_owned(), value)]),
        ..LoadOptions::default()
    };
    for value in [0, 999, 60_000, -1, i64::from(u32::MAX)] {
        let error = client.load("tracer", &asked(value)).unwrap_err();
        assert!(matches!(error, Error::Invalid(_)), "{value}: {error}");
    }
    for (options, others_too) in [(asked(i64::from(WANTED)), false), (LoadOptions::default(), true)] {
        let mut instance = client.load("tracer", &options).unwrap();
        let mut ring = RingBuffer::new(instance.take_map("events").unwrap()).unwrap();
        client.attach(instance.id, "on_exec", None, None).unwrap();
        // The wanted one last: when its record is there, the other's would be.
        for uid in [OTHER, WANTED] {
            let mut command = gate.unprivileged(&Who::new(uid), Path::new("/bin/true"));
            assert!(command.status().unwrap().success());
        }
        let mut seen = BTreeMap::new();
        let arrives = || {
            ring.wait(Some(SOON / 10)).unwrap();
            for record in ring.records() {
                let record = record.unwrap();
                // struct record { __u32 pid; __u32 uid; char comm[16]; }
                assert_eq!(record.len(), 24);
                let word = |at: usize| u32::from_ne_bytes(record[at..at + 4].try_into().unwrap());
                assert_ne!(word(0), 0);
                seen.insert(word(4), record[8..].split(|byte| *byte == 0).next().unwrap().to_vec());
            }
            seen.contains_key(&WANTED)
        };
        assert!(wait_until(SOON, arrives), "no record of the exec");
        // The harness executes by descriptor: the kernel takes the name from the number.
        assert!(!seen[&WANTED].is_empty());
        assert_eq!(seen.contains_key(&OTHER), others_too, "{seen:?}");
        if !others_too {
            assert_eq!(seen.len(), 1, "{seen:?}");
        }
        client.unload(instance.id).unwrap();
    }
    drop(client);
    gate.invariants(&before);
}

#[test]
fn egress_meter_runs_on_and_others_may_read_it() {
    needs_root!();
    let cgroup = Cgroup::new();
    let gate = Gate::start();
    install(&gate, "egress-meter", |text| {
        replaced(text, "/sys/fs/cgroup/system.slice", cgroup.path.to_str().unwrap())
    });
    let before = gate.baseline();
    let daemon = Who::new(id("passwd", "daemon"));
    // bash sends a datagram for each line that it writes there.
    let script = format!(
        "echo $$ > {}/cgroup.procs; for i in 1 2 3 4 5; do echo 1234567 > /dev/udp/127.0.0.1/9; done",
        cgroup.path.display()
    );
    let talk = || assert!(gate.inside("/bin/bash").args(["-c", &script]).status().unwrap().success());

    let mut starter = session(&gate, &daemon, "egress-meter");
    let instance = starter.load("meter", &LoadOptions::default()).unwrap();
    assert_eq!(instance.maps[0].access, Access::Proxy);
    assert!(instance.maps[0].fd.is_none() && instance.programs[0].fd.is_none());
    talk();
    starter.attach(instance.id, "count_egress", None, None).unwrap();
    drop(starter);

    let mut reader = session(&gate, &watcher(), "egress-meter");
    let mut read = || -> (u64, u64) {
        let entries: Vec<_> = reader.read_map(instance.id, "egress").collect::<Result<_, _>>().unwrap();
        assert_eq!((entries.len(), entries[0].key.as_slice()), (1, &[0; 4][..]));
        traffic(&entries[0].value)
    };
    assert_eq!(read(), (0, 0));
    talk();
    // A byte counts from the IP header on: 20 + 8 + 8.
    assert_eq!(read(), (5, 5 * 36));
    gate.send_over_loopback(5);
    assert_eq!(read(), (5, 5 * 36), "packets from outside of the cgroup are counted");

    assert!(reader.map(instance.id, "egress").unwrap().fd.is_none());
    for error in [
        reader.load("meter", &LoadOptions::default()).map(drop).unwrap_err(),
        reader.unload(instance.id).unwrap_err(),
        reader.attach(instance.id, "count_egress", None, None).map(drop).unwrap_err(),
    ] {
        assert!(matches!(error, Error::Denied(_)), "a reader may only read: {error}");
    }
    let listed = reader.list().unwrap();
    assert_eq!((listed.len(), listed[0].mine, listed[0].links.len()), (1, false, 1));
    let error = reader.detach(listed[0].links[0].id).unwrap_err();
    assert!(matches!(error, Error::Denied(_)), "a reader may only read: {error}");

    let mut ender = session(&gate, &daemon, "egress-meter");
    ender.unload(instance.id).unwrap();
    assert!(ender.list().unwrap().is_empty());
    drop((ender, reader));
    gate.invariants(&before);
}
