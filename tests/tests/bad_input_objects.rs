//! Approved objects that are not what their policy says, or no objects at all; and a loader that hangs.

use bpfgate_tests::gate::{MINIMAL, bpf_object, sha256};
use bpfgate_tests::{Gate, Raw, needs_root, slowness};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::time::{Duration, Instant};

/// An app with these objects as `o0`, `o1` and so on, approved by digest, and with a good one, `o`.
fn app_of(gate: &Gate, objects: &[Vec<u8>]) {
    let mut policy = MINIMAL.to_owned();
    for (number, bytes) in objects.iter().enumerate() {
        let path = gate.dir.join(format!("objects/o{number}"));
        fs::write(&path, bytes).unwrap();
        let (place, digest) = (path.display(), sha256(&path));
        write!(
            policy,
            "[objects.o{number}]\npath = \"{place}\"\nsha256 = \"{digest}\"\n\
             [[objects.o{number}.xdp]]\nprogram = \"pass\"\ninterfaces = [\"lo\"]\n"
        )
        .unwrap();
    }
    gate.policy("app", &policy);
}

#[test]
fn an_approved_file_that_is_no_bpf_object_is_refused_as_object() {
    needs_root!();
    let gate = Gate::start();
    let before = gate.baseline();
    let good = fs::read(bpf_object("minimal")).unwrap();
    let changed = |at: usize, bytes: &[u8]| {
        let mut object = good.clone();
        object[at..at + bytes.len()].copy_from_slice(bytes);
        object
    };
    let cases = [
        ("empty", Vec::new()),
        ("text", b"version = 1\n".to_vec()),
        ("zeros", vec![0; 4096]),
        ("magic only", good[..4].to_vec()),
        ("header only", good[..64].to_vec()),
        ("half", good[..good.len() / 2].to_vec()),
        ("without its last byte", good[..good.len() - 1].to_vec()),
        // Offsets: include/uapi/linux/elf.h, Elf64_Ehdr.
        ("32 bits", changed(4, &[1])),
        ("big endian", changed(5, &[2])),
        ("an executable", changed(16, &[2, 0])),
        ("machine x86-64", changed(18, &[62, 0])),
        ("machine 0xffff", changed(18, &[255, 255])),
        ("sections behind the end", changed(40, &[255, 255, 255, 255, 0, 0, 0, 0])),
        ("sections nowhere", changed(40, &[255; 8])),
        ("65535 sections", changed(60, &[255, 255])),
        ("names in no section", changed(62, &[254, 255])),
        ("a program of this machine", fs::read("/bin/true").unwrap()),
        ("larger than 16 MiB", [good.clone(), vec![0; 16 << 20]].concat()),
    ];
    let (names, objects): (Vec<&str>, Vec<Vec<u8>>) = cases.into_iter().unzip();
    app_of(&gate, &objects);
    let mut raw = Raw::open(&gate, "app");
    for (number, name) in names.iter().enumerate() {
        let start = Instant::now();
        let object = format!("o{number}");
        match raw.call("Load", &json!({"object": object})) {
            Ok((reply, _)) => panic!("{name} is loaded: {reply}"),
            Err(refused) => {
                assert_eq!(refused.error, "io.bpfgate.Object", "{name}: {}", refused.parameters);
                let message = refused.parameters["message"].as_str().unwrap();
                assert!(message.len() > 20, "{name}: {message}");
            }
        }
        assert!(start.elapsed() < Duration::from_secs(2) * slowness(), "{name}: {:?}", start.elapsed());
        // The next load works.
        let instance = raw.load("o");
        raw.done("Unload", &json!({"instance": instance}));
    }
    drop(raw);
    gate.invariants(&before);
}

/// Approved objects with some bytes changed anywhere: libbpf may load them, refuse them or crash.
#[test]
fn mutated_objects_cost_one_request_each_at_most() {
    needs_root!();
    let gate = Gate::start();
    let before = gate.baseline();
    let good = fs::read(bpf_object("minimal")).unwrap();
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = |below: usize| {
        // xorshift: every run does the same.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % below as u64).unwrap()
    };
    let mut objects = Vec::new();
    for round in 0..60 {
        let mut object = good.clone();
        for _ in 0..=round % 4 {
            // Half of them in the tables of sections at the end, where libbpf believes what it reads.
            let tail = object.len() / 3;
            let at = if round % 2 == 0 { random(object.len()) } else { object.len() - 1 - random(tail) };
            object[at] = u8::try_from(random(256)).unwrap();
        }
        objects.push(object);
    }
    app_of(&gate, &objects);
    let mut raw = Raw::open(&gate, "app");
    let mut outcomes = BTreeMap::new();
    for number in 0..objects.len() {
        let outcome = match raw.call("Load", &json!({"object": format!("o{number}")})) {
            Ok((reply, _)) => {
                raw.done("Unload", &json!({"instance": reply["instance"]}));
                "loaded".to_owned()
            }
            Err(refused) => refused.error,
        };
        let known = ["loaded", "Object", "Verifier", "Kernel", "Quota", "Unsupported"];
        assert!(known.contains(&outcome.trim_start_matches("io.bpfgate.")), "o{number}: {outcome}");
        *outcomes.entry(outcome).or_insert(0) += 1;
    }
    println!("{outcomes:?}");
    assert!(outcomes.contains_key("io.bpfgate.Object"), "no mutation was noticed: {outcomes:?}");
    raw.load("o");
    drop(raw);
    gate.invariants(&before);
}

/// The same policy for another object and its program.
fn other(object: &str, program: &str) -> String {
    MINIMAL.replace("minimal", object).replace("\"pass\"", &format!("\"{program}\""))
}

#[test]
fn an_object_that_is_not_as_its_policy_says_has_a_named_error() {
    needs_root!();
    let gate = Gate::start();
    let before = gate.baseline();
    let tcx = MINIMAL.replace(".xdp]]", ".tcx]]") + "direction = \"egress\"\n";
    let cgroups = "direction = \"ingress\"\ncgroups = [\"/sys/fs/cgroup\"]";
    let cgroup =
        MINIMAL.replace(".xdp]]", ".cgroup_skb]]").replace("interfaces = [\"{interface}\"]", cgroups);
    let second = "[[objects.o.xdp]]\nprogram = \"packet_observer_second\"\ninterfaces = [\"lo\"]\n";
    let one_program = other("two", "packet_observer_first") + second + "[limits]\nprograms = 1\n";
    for (text, error, word) in [
        (other("minimal", "absent"), "Object", "no program absent"),
        (tcx, "Object", "type xdp"),
        (cgroup, "Object", "type xdp"),
        (MINIMAL.to_owned() + "[limits]\nmap_memory = 8\n", "Quota", "more than the 8"),
        (one_program, "Quota", "1 programs"),
        (other("bigmap", "touch_big"), "Quota", "map big"),
        (other("progarray", "jump_away"), "Unsupported", "prog_array"),
        (other("mapinmap", "count_inner"), "Unsupported", "array_of_maps"),
        (other("badverifier", "out_of_bounds"), "Verifier", "verifier"),
    ] {
        gate.policy("app", &text);
        let mut raw = Raw::open(&gate, "app");
        for _ in 0..2 {
            let answer = raw.refused("Load", &json!({"object": "o"}), error);
            assert!(answer["message"].as_str().unwrap().contains(word), "{word}: {answer}");
            if error == "Verifier" {
                let log = answer["log"].as_str().unwrap();
                assert!(log.contains("invalid access to packet") && log.contains("processed"), "{log}");
            }
        }
        // The next one reads its own policy with the next helper.
        gate.kill(&gate.helper("app")[0]);
        drop(raw);
    }
    gate.invariants(&before);
}

#[test]
fn a_loader_that_hangs_is_replaced_and_costs_one_load() {
    needs_root!();
    let gate = Gate::start();
    let other =
        other("globals", "copy_globals").replace("{client}", "").replace("objects.o", "objects.other");
    gate.policy("app", &(MINIMAL.to_owned() + &other));
    let before = gate.baseline();
    let mut raw = Raw::open(&gate, "app");
    let instance = raw.load("o");
    let [helper, loader, worker] = gate.helper("app");
    kill(Pid::from_raw(worker.pid), Signal::SIGSTOP).unwrap();
    // Whoever else asks this app waits for its helper; other apps do not.
    let start = Instant::now();
    raw.ask("Load", &json!({"object": "o"}));
    gate.policy("another", MINIMAL);
    Raw::open(&gate, "another").load("o");
    assert!(
        start.elapsed() < Duration::from_secs(2) * slowness(),
        "another app waits: {:?}",
        start.elapsed()
    );
    let refused = raw.reply().unwrap_err();
    assert_eq!(refused.error, "io.bpfgate.Object");
    assert!(refused.parameters["message"].as_str().unwrap().contains("within 10 s"), "{refused:?}");
    assert!(start.elapsed() < Duration::from_secs(13) * slowness(), "{:?}", start.elapsed());
    let [same_helper, same_loader, next_worker] = gate.helper("app");
    assert_eq!((same_helper, same_loader), (helper, loader));
    assert_ne!(next_worker, worker);
    // The request that hung is not done by the next worker: that would take it for the next request.
    let (reply, _) = raw.done("Load", &json!({"object": "other"}));
    assert_eq!(reply["programs"][0]["name"], "copy_globals");
    raw.done("Unload", &json!({"instance": instance}));
    raw.load("o");
    drop(raw);
    gate.invariants(&before);
}
