//! One message of each kind, as the seeds have them. After a change of the messages:
//! `cargo test -p bpfgate-fuzz-targets --test samples -- --ignored write`.

use bpfgate_helper::record::{Granted, InstanceRecord, LinkRecord, Record};
use bpfgate_helper::way::Way;
use bpfgate_policy_tests::bytes;
use bpfgate_protocol::codec;
use bpfgate_protocol::functions::Function;
use bpfgate_protocol::hooks::Kind;
use bpfgate_protocol::messages::helper::{
    Adopted, Adoption, FromHelper, Global, InstanceInfo, LinkInfo, MapInfo, Outcome, ProgramInfo, Sandbox,
    Target, ToHelper, Verb,
};
use bpfgate_protocol::messages::loader::{
    FromLeash, FromLoader, LogWanted, MapCreate, ProgLoad, ProgramPlan, Purpose, ToLeash, ToLoader,
};
use bpfgate_protocol::messages::spawner::{FromSpawner, ToSpawner};
use bpfgate_protocol::messages::{Bulk, Bytes, InstanceId, LinkId, SessionId};
use bpfgate_protocol::policy::{Access, Unit};
use bpfgate_protocol::refusal::Refusal;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::str::FromStr;

fn seeds() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds")
}

/// A name of any kind.
fn n<T: FromStr<Err: Debug>>(text: &str) -> T {
    text.parse().unwrap()
}

const SESSION: SessionId = SessionId(3);
const INSTANCE: InstanceId = InstanceId(5);
const LINK: LinkId = LinkId(4);

fn global() -> Global {
    Global { name: n("rate"), value: -1 }
}

fn program() -> ProgramInfo {
    ProgramInfo { name: n("count"), hook: Kind::Xdp, fd: true }
}

fn map() -> MapInfo {
    MapInfo {
        name: n("counts"),
        number: 9,
        map_type: 2,
        key_size: 4,
        value_size: 8,
        max_entries: 1,
        access: Access::Frozen,
        fd: true,
    }
}

fn link() -> LinkInfo {
    LinkInfo { id: LINK, program: n("count"), hook: Kind::Xdp, target: Target::Interface(n("eth0")) }
}

fn instances() -> Vec<InstanceInfo> {
    let (programs, maps, links) = (vec![program()], vec![map()], vec![link()]);
    vec![InstanceInfo { id: INSTANCE, object: n("o"), mine: true, programs, maps, links }]
}

/// The messages of a channel, as the target takes them: its number first.
fn channel<T: Serialize>(number: u8, messages: &[(&str, T)], all: &mut BTreeMap<String, Vec<u8>>) {
    for (name, message) in messages {
        let bytes = [&[number][..], &codec::encode(message).unwrap()].concat();
        assert!(all.insert(format!("inner/{number}-{name}"), bytes).is_none(), "{name} is there twice");
    }
}

fn messages() -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    let ask = |verb| ToHelper::Ask { session: SESSION, verb };
    let attach = |target| {
        ask(Verb::Attach { instance: INSTANCE, program: n("count"), hook: Some(Kind::Kprobe), target })
    };
    let load = Verb::Load { object: n("o"), programs: vec![n("count")], globals: vec![global()] };
    let unit = Unit { name: n("flowmon.service"), slice: n("system.slice") };
    let read =
        Verb::ReadMap { instance: INSTANCE, map: n("counts"), cursor: Bytes(vec![0, 255]), limit: 256 };
    channel(
        0,
        &[
            ("open", ToHelper::Open { session: SESSION }),
            ("load", ask(load)),
            ("attach-only", attach(Target::Only)),
            ("attach-interface", attach(Target::Interface(n("eth0")))),
            ("attach-cgroup", attach(Target::Cgroup(n("/sys/fs/cgroup/a")))),
            ("attach-own", attach(Target::Own)),
            ("attach-unit", attach(Target::Unit(unit))),
            ("attach-event", attach(Target::Event(n("sched:sched_switch")))),
            ("attach-symbol", attach(Target::Symbol { binary: n("/bin/sh"), symbol: n("main") })),
            ("attach-function", attach(Target::Function(n("vfs_read")))),
            ("detach", ask(Verb::Detach { link: LINK })),
            ("unload", ask(Verb::Unload { instance: INSTANCE })),
            ("map", ask(Verb::Map { instance: INSTANCE, map: n("counts") })),
            ("read-map", ask(read)),
            ("list", ask(Verb::List)),
            ("close", ToHelper::Close { session: SESSION }),
            ("survey", ToHelper::Survey),
            ("adopt", ToHelper::Adopt { policy: Some([7; 32]), file: true }),
        ],
        &mut all,
    );
    let answer = |outcome| FromHelper::Answer { outcome, line: Some(7) };
    let (programs, maps) = (vec![program()], vec![map()]);
    let sandbox = Sandbox { landlock_abi: 7, seccomp_filters: 2, capabilities: 1 << 39 };
    let adoption = Adoption {
        verdict: Adopted::Restart("it needs another capability".into()),
        sessions: vec![SESSION],
        revoked: vec!["link 4".into()],
        beyond_recall: vec!["map counts".into()],
    };
    let verifier = Refusal { program: Some("count".into()), ..Refusal::kernel("BPF_PROG_LOAD", 22) };
    channel(
        1,
        &[
            ("ready", FromHelper::Ready { version: 5, policy: [7; 32], sandbox }),
            ("done", answer(Outcome::Done)),
            ("loaded", answer(Outcome::Loaded { instance: INSTANCE, digest: [8; 32], programs, maps })),
            ("attached", answer(Outcome::Attached { link: LINK, target: Target::Only, fd: true })),
            ("map", answer(Outcome::Map(map()))),
            (
                "entries",
                answer(Outcome::Entries {
                    entries: vec![(Bytes(vec![0; 4]), Bytes(vec![1; 8]))],
                    cursor: Bytes::default(),
                }),
            ),
            ("instances", answer(Outcome::Instances(instances()))),
            ("survey", answer(Outcome::Survey { sessions: 2, instances: instances() })),
            ("adopted", answer(Outcome::Adopted(adoption))),
            ("refused", answer(Outcome::Refused { refusal: verifier, log: Bulk::Memfd { len: 70_000 } })),
        ],
        &mut all,
    );
    let plan =
        ProgramPlan { name: n("count"), prog_type: 26, expected_attach_type: 24, function: Some(n("f")) };
    channel(
        2,
        &[
            ("load", ToLoader::Load { object: n("o"), programs: vec![plan], globals: vec![global()] }),
            ("symbols", ToLoader::Symbols { symbols: vec![n("main")] }),
            ("map-created", ToLoader::MapCreated { handle: 1 }),
            ("kept", ToLoader::Kept { handle: 2 }),
            ("failed", ToLoader::Failed { errno: 22, log: Bulk::Inline(Bytes(b"log".to_vec())) }),
        ],
        &mut all,
    );
    let create = MapCreate {
        purpose: Purpose::Object(0),
        map_type: 2,
        key_size: 4,
        value_size: 8,
        max_entries: 1,
        flags: 0,
        extra: 0,
        name: "counts".into(),
        btf: 1,
        btf_ids: (2, 3),
    };
    let load = ProgLoad {
        purpose: Purpose::Probe,
        prog_type: 1,
        expected_attach_type: 0,
        flags: 0,
        name: "count".into(),
        license: "GPL".into(),
        btf: 0,
        kfuncs: vec![n("bpf_rcu_read_lock")],
        log: LogWanted::Yes,
        record_sizes: (8, 16),
        parts: (16, 0, 0),
        bulk: Bulk::Inline(Bytes(vec![0x95; 16])),
    };
    channel(
        3,
        &[
            ("map-create", FromLoader::MapCreate(create)),
            ("map-freeze", FromLoader::MapFreeze { handle: 1 }),
            ("btf-load", FromLoader::BtfLoad { bulk: Bulk::Memfd { len: 100_000 } }),
            ("prog-load", FromLoader::ProgLoad(load)),
            ("loaded", FromLoader::Loaded { maps: vec![(n("counts"), 1)] }),
            ("found", FromLoader::Found { offsets: vec![4096] }),
            ("refused", FromLoader::Refused { refusal: Refusal::object("no"), log: Bulk::empty() }),
        ],
        &mut all,
    );
    channel(4, &[("kill", ToLeash::Kill { worker: 1 })], &mut all);
    channel(
        5,
        &[
            ("ready", FromLeash::Ready { version: 5 }),
            ("died", FromLeash::Died { worker: 1, how: "signal 9".into() }),
        ],
        &mut all,
    );
    channel(6, &[("spawn", ToSpawner::Spawn { app: n("flowmon") })], &mut all);
    channel(
        7,
        &[
            ("spawned", FromSpawner::Spawned { app: n("flowmon") }),
            ("failed", FromSpawner::Failed { app: n("flowmon"), why: "no policy".into() }),
        ],
        &mut all,
    );
    all
}

/// Of what outlives a helper: nothing, and one of everything in several numbers.
fn records() -> BTreeMap<String, Vec<u8>> {
    let instance = |id| InstanceRecord {
        id: InstanceId(id),
        object: n("o"),
        digest: [9; 32],
        map_bytes: 64,
        granted: Granted {
            functions: BTreeSet::from([Function::Helper(109), Function::Kernel(n("bpf_rcu_read_lock"))]),
            bound: BTreeMap::from([(n("count"), n("vfs_read"))]),
        },
        globals: vec![global()],
        programs: vec![(program(), 8)],
        maps: vec![(n("counts"), 9)],
        links: vec![LinkRecord {
            info: link(),
            way: Way { attach_type: 37, flags: 2 },
            shared: false,
            number: 10,
        }],
    };
    let record = |count: u64| Record {
        last_instance: count,
        last_link: 4,
        network: (4, 4_026_531_840),
        instances: (1..=count).map(instance).collect(),
    };
    (0..5).map(|count| (format!("record/{count}"), record(count).bytes().unwrap())).collect()
}

fn samples() -> BTreeMap<String, Vec<u8>> {
    let mut all = messages();
    all.extend(records());
    all
}

#[test]
fn the_seeds_have_every_message() {
    for (name, bytes) in samples() {
        let path = seeds().join(&name);
        let seed = std::fs::read(&path).unwrap_or_default();
        assert_eq!(seed, bytes, "{name} is another message now: see the head of this file");
    }
}

#[test]
#[ignore = "it writes the seeds"]
fn write() {
    let mut all = samples();
    // What these make of any bytes is made anew by every run.
    for (target, count, len) in [("dialogue", 24, 200), ("channel", 8, 120)] {
        all.extend((0..count).map(|seed| (format!("{target}/{seed}"), bytes(seed, len))));
    }
    for (name, bytes) in all {
        let path = seeds().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
}
