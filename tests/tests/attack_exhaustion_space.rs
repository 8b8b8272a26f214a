//! No room where the broker writes: a file system of its own, in the mount namespace of the test, is filled.

use bpfgate_tests::gate::{INTERFACE, WITH_MAP};
use bpfgate_tests::process::{self, Process, Role};
use bpfgate_tests::second::Second;
use bpfgate_tests::{Gate, Raw, SOON, STRANGER, USER, needs_root, wait_until};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// A small file system for socket and audit records of another broker.
struct Small {
    /// As the broker names it.
    path: PathBuf,
    /// As the test does, whichever user it is: it is in another mount namespace.
    seen: PathBuf,
    _root: File,
}

impl Small {
    fn mount(gate: &Gate, options: &str) -> Self {
        let path = gate.dir.join("small");
        fs::create_dir(&path).unwrap();
        let mut command = gate.inside("mount");
        command.args(["-t", "tmpfs", "-o", &format!("mode=755,{options}"), "small"]).arg(&path);
        assert!(command.status().unwrap().success(), "no tmpfs with {options}");
        let there = format!("/proc/{}/root{}", gate.holder(), path.display());
        let root = File::open(there).unwrap();
        let seen = PathBuf::from(format!("/proc/self/fd/{}", root.as_raw_fd()));
        Self { path, seen, _root: root }
    }

    /// A broker that has its socket and its records there.
    fn broker(&self, gate: &Gate) -> Second {
        let [socket, audit] = ["socket", "audit"].map(|name| self.path.join(name).display().to_string());
        let mut broker = Second::start(gate, &[], &["--socket", &socket, "--audit", &audit]);
        (broker.socket, broker.audit) = (self.seen.join("socket"), self.seen.join("audit"));
        broker
    }

    /// Leaves no byte.
    fn fill(&self) {
        let mut file = File::create(self.seen.join("fill")).unwrap();
        while file.write_all(&[0; 64]).is_ok() {}
        assert_eq!(file.write(&[0]).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    }

    /// Leaves no inode.
    fn fill_inodes(&self) {
        let full = (0..1000).map(|number| File::create(self.seen.join(format!("inode-{number}"))));
        let error = full.into_iter().find_map(Result::err).expect("there is an end to inodes");
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    }

    fn make_room(&self) {
        for entry in fs::read_dir(&self.seen).unwrap().flatten() {
            let name = entry.file_name();
            if !["socket", "audit"].contains(&name.to_str().unwrap()) {
                fs::remove_file(entry.path()).unwrap();
            }
        }
    }
}

/// The records of a broker; every line is one.
fn records(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"))).collect()
}

fn helper(broker: &Second, gate: &Gate) -> Process {
    let all = gate.processes();
    let spawner =
        all.iter().find(|p| p.role == Role::Spawner && p.parent == broker.pid()).expect("a spawner");
    all.iter().find(|p| p.parent == spawner.pid).expect("a helper").clone()
}

/// What a helper holds of the kernel's.
fn held(helper: &Process) -> usize {
    let all = process::descriptors(helper.pid);
    all.iter().filter(|(kind, _)| kind.starts_with("anon_inode:bpf")).map(|(_, count)| count).sum()
}

/// RES-16: where there is no room for records, what would have to be recorded is refused before the kernel is asked, with
/// a sentence; what runs goes on; and when there is room again, no record is missing.
#[test]
fn without_room_for_its_record_nothing_is_given() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", WITH_MAP);
    let before = gate.baseline();
    let small = Small::mount(&gate, "size=64k");
    let broker = small.broker(&gate).listens();
    let mut raw = broker.connect(&USER);
    raw.done("Open", &json!({"app": "app"}));
    let (loaded, maps) = raw.done("Load", &json!({"object": "o"}));
    let instance = loaded["instance"].clone();
    let target = json!({"instance": instance, "program": "pass", "target": {"interface": INTERFACE}});
    let (attached, _) = raw.done("Attach", &target);
    let counts = bpfgate_client::Map::new(maps.into_iter().next().unwrap()).unwrap();
    let count = || u64::from_ne_bytes(counts.lookup(&[0; 4]).unwrap().unwrap().try_into().unwrap());
    let helper = helper(&broker, &gate);
    small.fill();
    // What meets the end of the room is done, and its record kept. There may be room for one more before that.
    let gives = [
        ("Load", json!({"object": "o"})),
        ("Map", json!({"instance": instance, "name": "counts"})),
        ("Attach", target),
    ];
    let mut given = 0;
    while raw.call(gives[1].0, &gives[1].1).is_ok() {
        given += 1;
        assert!(given < 20, "there is no end to the room");
    }
    let holds = held(&helper);
    for (verb, parameters) in &gives {
        let refused = raw.refused(verb, parameters, "Kernel");
        assert_eq!((&refused["call"], &refused["errno"]), (&json!("write"), &json!(libc::ENOSPC)));
        let message = refused["message"].as_str().unwrap();
        assert!(
            message.contains("cannot write its audit records") && message.contains("make room"),
            "{message}"
        );
    }
    assert_eq!(held(&helper), holds, "something was made");
    // Whoever has something keeps it, and can let go of it.
    let seen = count();
    gate.send_packets(3);
    assert!(wait_until(SOON, || count() >= seen + 3), "the program does not run any more");
    assert_eq!(raw.done("List", &json!({})).0["instances"].as_array().unwrap().len(), 1);
    raw.done("Detach", &json!({"link": attached["link"]}));
    let mut another = broker.connect(&USER);
    another.done("Open", &json!({"app": "app"}));
    another.refused("Load", &json!({"object": "o"}), "Kernel");
    for _ in 0..50 {
        broker.connect(&STRANGER).refused("Open", &json!({"app": "app"}), "Denied");
    }
    small.make_room();
    let loads = |raw: &mut Raw| raw.call("Load", &json!({"object": "o"})).is_ok();
    assert!(wait_until(3 * SOON, || loads(&mut raw)), "it does not see that there is room\n{}", broker.log());
    let is =
        |record: &Value, verb: &str, verdict: &str| record["verb"] == verb && record["verdict"] == verdict;
    let all = records(&broker.audit);
    assert_eq!(all.iter().filter(|record| is(record, "Map", "allowed")).count(), given, "{all:?}");
    assert_eq!(all.iter().filter(|record| is(record, "Load", "allowed")).count(), 2, "{all:?}");
    // The refusals were counted, by user.
    let counted = |uid: u32, verdict: &str| {
        let all = records(&broker.audit);
        let its = || all.iter().filter(|record| record["uid"] == uid);
        let summed = its().filter_map(|record| record["suppressed"][verdict].as_u64()).sum::<u64>();
        summed + its().filter(|record| record["verdict"] == verdict).count() as u64
    };
    let summarized = || counted(STRANGER.id, "Denied") == 50 && counted(USER.id, "Kernel") >= 5;
    assert!(wait_until(15 * SOON, summarized), "{:?}", records(&broker.audit));
    assert!(broker.log().contains("nothing is given until they can"), "{}", broker.log());
    assert!(process::stat(broker.pid()).is_some_and(|(state, ..)| state != 'Z'));
    drop((raw, another, broker, counts));
    gate.invariants(&before);
}

/// RES-16: no inode is needed to serve; a broker that cannot make its socket says so.
#[test]
fn without_an_inode_everything_goes_on() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", WITH_MAP);
    let before = gate.baseline();
    let small = Small::mount(&gate, "size=64k,nr_inodes=16");
    let broker = small.broker(&gate).listens();
    small.fill_inodes();
    let mut raw = broker.connect(&USER);
    raw.done("Open", &json!({"app": "app"}));
    let instance = raw.load("o");
    raw.done("Attach", &json!({"instance": instance, "program": "pass", "target": {"interface": INTERFACE}}));
    raw.done("Unload", &json!({"instance": instance}));
    drop((raw, broker));
    // The stale socket is removed first; the inode that this leaves is taken again.
    fs::remove_file(small.seen.join("socket")).unwrap();
    fs::write(small.seen.join("one-more"), "").unwrap();
    let mut refused = small.broker(&gate);
    assert_eq!(refused.ends(), Some(1));
    assert!(refused.log().contains("No space left on device"), "{}", refused.log());
    drop(refused);
    gate.invariants(&before);
}
