//! Clients that have read the source: bytes of other protocols, races for what two of them may change, more of
//! everything than they may have, and what they learn by asking.

use bpfgate_client::{Client, LoadOptions, Map, UpdateMode};
use bpfgate_protocol::codec;
use bpfgate_protocol::messages::helper::{ToHelper, Verb};
use bpfgate_protocol::messages::{Bulk, SessionId, loader::FromLoader, spawner::ToSpawner};
use bpfgate_tests::gate::{INTERFACE, WITH_MAP};
use bpfgate_tests::raw::frame;
use bpfgate_tests::{Gate, Raw, SOON, STRANGER, USER, Who, needs_root, process, slowness, wait_until};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{MsgFlags, send};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Barrier;
use std::time::{Duration, Instant};

/// For somebody else than [`USER`].
const OTHER: Who = Who::new(12_399);

fn of_others() -> String {
    WITH_MAP.replace("{client}", "[[client]]\nuser = 12399\nmay = [\"load\", \"attach\", \"maps\"]\n")
}

/// What is loaded belongs to every session of the app.
fn shared() -> String {
    format!("{WITH_MAP}[lifetime]\nkeep = \"app\"\n[limits]\nloads_per_minute = 60000\n")
}

/// PRO-05: every call cut at every byte, by a client that then sends no more, is no call.
#[test]
fn no_part_of_a_call_is_a_call() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", WITH_MAP);
    let before = gate.baseline();
    let decisions = gate.audit().len();
    let calls = [
        frame("Open", &json!({"app": "app"})),
        frame("Load", &json!({"object": "o", "globals": {"g": 1}})),
        frame("org.varlink.service.GetInfo", &json!({})),
    ];
    let mut cuts = 0;
    for call in &calls {
        for cut in 0..call.len() {
            let mut raw = Raw::connect(&gate, &USER);
            raw.send(&call[..cut]).unwrap();
            raw.stream.shutdown(Shutdown::Write).unwrap();
            raw.is_closed_after(0);
            cuts += 1;
        }
    }
    assert!(cuts > 150, "{cuts}");
    assert_eq!(gate.audit().len(), decisions, "half a call was decided on");
    gate.invariants(&before);
}

/// PRO-23, PRO-25: urgent bytes change nothing but the client's own call, and do not keep the broker busy; messages of
/// the inner channels are no calls.
#[test]
fn bytes_of_another_protocol_are_no_calls() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", WITH_MAP);
    let before = gate.baseline();
    let whole = frame("org.varlink.service.GetInfo", &json!({}));
    let urgent = |raw: &Raw, bytes: &[u8]| send(raw.stream.as_raw_fd(), bytes, MsgFlags::MSG_OOB);
    let mut held = Vec::new();
    for place in [0, 1, whole.len() / 2, whole.len() - 1] {
        let mut raw = Raw::connect(&gate, &USER);
        raw.send(&whole[..place]).unwrap();
        // A kernel without urgent data on Unix sockets says so.
        let _ = urgent(&raw, b"!");
        let _ = raw.send(&whole[place..]);
        // An answer, a refusal, or the end: whatever it is, it comes.
        let _ = raw.receive();
        let raw = Raw::connect(&gate, &USER);
        let _ = urgent(&raw, &whole[..=place]);
        held.push(raw);
    }
    let ticks = || process::ticks(gate.broker.pid);
    let start = ticks();
    std::thread::sleep(SOON);
    assert!(ticks() - start < 30, "the broker is busy with nothing: {} ticks", ticks() - start);
    drop(held);
    let refusal = bpfgate_protocol::refusal::Refusal::object("no");
    for bytes in [
        codec::encode(&ToHelper::Survey).unwrap(),
        codec::encode(&ToHelper::Open { session: SessionId(1) }).unwrap(),
        codec::encode(&ToHelper::Ask { session: SessionId(1), verb: Verb::List }).unwrap(),
        codec::encode(&ToSpawner::Spawn { app: "app".parse().unwrap() }).unwrap(),
        codec::encode(&FromLoader::Refused { refusal, log: Bulk::empty() }).unwrap(),
    ] {
        let mut raw = Raw::connect(&gate, &USER);
        raw.send(&[&bytes[..], &[0]].concat()).unwrap();
        assert_eq!(raw.reply().unwrap_err().error, "io.bpfgate.Invalid", "{bytes:?}");
        raw.is_closed_after(0);
    }
    gate.invariants(&before);
}

/// INF-01: how long a denial takes does not tell whether there is such an app.
#[test]
fn a_denial_takes_as_long_whatever_it_denies() {
    const EACH: usize = 1500;
    needs_root!();
    let gate = Gate::start();
    gate.policy("of-others", &of_others());
    let before = gate.baseline();
    let apps = ["of-others", "absent-app"];
    let mut took: BTreeMap<&str, Vec<Duration>> = BTreeMap::new();
    let mut raw = Raw::connect(&gate, &STRANGER);
    for number in 0..2 * EACH {
        // Who is let into no app is sent away after a while.
        if number % 500 == 0 {
            raw = Raw::connect(&gate, &STRANGER);
        }
        let app = apps[number % 2];
        let start = Instant::now();
        raw.refused("Open", &json!({"app": app}), "Denied");
        took.entry(app).or_default().push(start.elapsed());
    }
    let [others, absent] = apps.map(|app| {
        let mut all = took.remove(app).unwrap();
        all.sort();
        [all[EACH / 10], all[EACH / 2], all[EACH * 9 / 10]]
    });
    println!("p10, p50, p90: of others {others:?}, absent {absent:?}");
    assert!(others[0] < absent[2] && absent[0] < others[2], "{others:?} {absent:?}");
    drop(raw);
    gate.invariants(&before);
}

/// What several clients do at the same moment: each its own call, from a common start.
fn at_once(clients: &mut [Raw], calls: &[(&str, Value)]) -> Vec<String> {
    let start = Barrier::new(calls.len());
    std::thread::scope(|scope| {
        let threads: Vec<_> = clients
            .iter_mut()
            .zip(calls)
            .map(|(raw, (method, parameters))| {
                let start = &start;
                scope.spawn(move || {
                    start.wait();
                    match raw.call(method, parameters) {
                        Ok(_) => "done".to_owned(),
                        Err(refused) => refused.error.trim_start_matches("io.bpfgate.").to_owned(),
                    }
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// CON-01, CON-02: of several who take the same thing away one does it, and the others learn that it is gone; whatever
/// the order of an attach and an unload was, nothing stays attached to something that is gone.
#[test]
fn of_several_one_takes_it_away() {
    const ROUNDS: usize = 60;
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", &shared());
    let before = gate.baseline();
    let mut clients: Vec<Raw> = (0..4).map(|_| Raw::open(&gate, "app")).collect();
    let mut orders = BTreeMap::new();
    for _ in 0..ROUNDS {
        let instance = clients[0].load("o");
        let attach = ("Attach", json!({"instance": instance, "program": "pass"}));
        let unload = ("Unload", json!({"instance": instance}));
        let (attached, _) = clients[1].done(attach.0, &attach.1);
        let detach = ("Detach", json!({"link": attached["link"]}));
        let mut outcomes = at_once(&mut clients, &[detach.clone(), detach.clone(), detach.clone(), detach]);
        outcomes.sort();
        assert_eq!(outcomes, ["Gone", "Gone", "Gone", "done"]);
        let outcomes = at_once(&mut clients, &[attach.clone(), unload.clone(), attach.clone(), unload]);
        *orders.entry(outcomes.join(" ")).or_insert(0) += 1;
        assert_eq!([1, 3].map(|at| outcomes[at].as_str()).iter().filter(|word| **word == "done").count(), 1);
        assert!(
            outcomes.iter().all(|word| ["done", "Gone", "Invalid"].contains(&word.as_str())),
            "{outcomes:?}"
        );
        assert_eq!(clients[0].done("List", &json!({})).0["instances"], json!([]));
        assert_eq!(process::links(gate.helper("app")[0].pid), 0, "{outcomes:?}");
    }
    println!("{orders:?}");
    drop(clients);
    gate.invariants(&before);
}

/// CON-04, XPO-10, INF-11: sessions that load the same object at the same time have maps of their own, each described
/// and recorded as the one that it is; none was somebody's before.
#[test]
fn every_load_has_maps_of_its_own() {
    const CLIENTS: usize = 4;
    const LOADS: usize = 60;
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", &format!("{WITH_MAP}[limits]\nloads_per_minute = 60000\n"));
    let before = gate.baseline();
    // What each is told is compared with the records below: they are all the same user's.
    let session = || {
        let mut client = Client::from_stream(gate.connect(&USER));
        client.open("app").unwrap();
        client
    };
    let seen: Vec<(u64, u32)> = std::thread::scope(|scope| {
        let client = || {
            let mut client = session();
            let mut seen = Vec::new();
            for round in 0..LOADS {
                let mut instance = client.load("o", &LoadOptions::default()).unwrap();
                let map = instance.take_map("counts").unwrap();
                assert_eq!(map.lookup(&[0; 4]).unwrap().unwrap(), [0; 8], "somebody has written here");
                map.update(&[0; 4], &[7; 8], UpdateMode::Any).unwrap();
                seen.push((instance.id.0, map.info().id));
                if round % 2 == 0 {
                    client.unload(instance.id).unwrap();
                    assert_eq!(map.lookup(&[0; 4]).unwrap().unwrap(), [7; 8], "who holds a map holds it");
                }
                if round % 8 == 7 {
                    // What is left ends with its session.
                    client = session();
                }
            }
            seen
        };
        let threads: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(client)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(seen.len(), CLIENTS * LOADS);
    let maps: BTreeMap<u32, u64> = seen.iter().map(|(instance, map)| (*map, *instance)).collect();
    assert_eq!(maps.len(), seen.len(), "a map was given twice");
    let recorded: BTreeMap<u64, u64> = gate
        .audit_of("app")
        .iter()
        .filter(|record| record["verb"] == "Load" && record["verdict"] == "allowed")
        .map(|record| (record["instance"].as_u64().unwrap(), record["maps"]["counts"].as_u64().unwrap()))
        .collect();
    for (instance, map) in &seen {
        assert_eq!(recorded.get(instance), Some(&u64::from(*map)), "the record names another map");
    }
    gate.invariants(&before);
}

/// CON-05: a client that goes away somewhere between its call and the answer with descriptors leaves none of them, and
/// nothing that it asked for.
#[test]
fn an_answer_that_nobody_waits_for_leaves_nothing() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", &format!("{WITH_MAP}[limits]\nloads_per_minute = 60000\n"));
    let before = gate.baseline();
    for round in 0..400u32 {
        let mut raw = Raw::open(&gate, "app");
        raw.send(&[frame("Load", &json!({"object": "o"})), frame("List", &json!({}))].concat()).unwrap();
        let end = Instant::now() + Duration::from_micros(u64::from(round % 80) * 25);
        while Instant::now() < end {
            std::hint::spin_loop();
        }
        if round % 3 == 0 {
            let _ = raw.stream.shutdown(Shutdown::Both);
        }
    }
    let [helper, ..] = gate.helper("app");
    let idle = || !process::descriptors(helper.pid).keys().any(|kind| kind.starts_with("anon_inode:bpf"));
    assert!(wait_until(3 * SOON, idle), "{:?}", process::descriptors(helper.pid));
    gate.invariants(&before);
}

/// RES-01, RES-04, RES-13: a thousand connections of one user, with sessions or without, get their share and no more,
/// and somebody else is let in at once.
#[test]
fn a_thousand_connections_of_one_user_are_its_own_trouble() {
    const SHARE: usize = 64;
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", WITH_MAP);
    gate.policy("other", &of_others());
    let before = gate.baseline();
    let open = || {
        let start = Instant::now();
        Raw::connect(&gate, &OTHER).done("Open", &json!({"app": "other"}));
        start.elapsed()
    };
    open();
    let mut quiet: Vec<Duration> = (0..50).map(|_| open()).collect();
    let (mut inside, mut sessions) = (Vec::new(), 0);
    let mut outside = 0;
    for number in 0..1000 {
        let mut raw = Raw::connect(&gate, &USER);
        // The broker says no at the door, and may have closed it by then.
        let _ = raw.send(&frame("Open", &json!({"app": "app"})));
        match raw.reply() {
            Ok(_) => sessions += 1,
            Err(refused) => {
                assert_eq!(refused.error, "io.bpfgate.Quota", "{number}");
                outside += 1;
            }
        }
        if inside.len() < SHARE {
            inside.push(raw);
        }
    }
    // 16 sessions are what a policy allows that does not say; 64 connections are what a user has.
    assert_eq!((sessions, outside), (16, 984));
    let mut loud: Vec<Duration> = (0..50).map(|_| open()).collect();
    quiet.sort();
    loud.sort();
    println!("p50 of another user: {:?}, beside a thousand: {:?}", quiet[25], loud[25]);
    assert!(loud[45] < Duration::from_millis(200) * slowness(), "{loud:?}");
    drop(inside);
    let again = || Raw::connect(&gate, &USER).call("Open", &json!({"app": "app"})).is_ok();
    assert!(wait_until(3 * SOON, again), "the share stays taken");
    gate.invariants(&before);
}

/// RES: a user whose every connection has sent as much of a request as there may be, and not its end, costs the broker just
/// that, and for ten seconds.
#[test]
fn what_a_user_makes_the_broker_keep_is_bounded() {
    const MOST: usize = 64 * 1024;
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", WITH_MAP);
    let before = gate.baseline();
    let memory = || process::number(gate.broker.pid, "VmRSS");
    let at_first = memory();
    let mut hoard = Vec::new();
    for _ in 0..64 {
        let mut raw = Raw::connect(&gate, &USER);
        // An answer that is not read, and then half of the next call.
        raw.send(&frame("org.varlink.service.GetInfo", &json!({}))).unwrap();
        raw.send(&vec![b' '; MOST - 1]).unwrap();
        hoard.push(raw);
    }
    std::thread::sleep(SOON / 2);
    let kept = memory().saturating_sub(at_first);
    println!("{kept} kB");
    // Each may have a request of 64 KiB, and one more buffer that was read at once.
    assert!(kept < 64 * 2 * 64 + 1024, "{kept} kB");
    let closed = |raw: &mut Raw| {
        let _ = raw.reply();
        raw.receive().is_none()
    };
    assert!(hoard.iter_mut().all(closed), "half a request is waited for");
    drop(hoard);
    gate.invariants(&before);
}

/// XPO-11, XPO-04, XPO-05, XPO-07: what the library gets is closed at an exec, and by every way in which a client can get
/// a descriptor it is a map of plain data.
#[test]
fn what_arrives_is_a_map_that_ends_with_its_process() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", WITH_MAP);
    let before = gate.baseline();
    let mut client = gate.session("app");
    let mut instance = client.load("o", &LoadOptions::default()).unwrap();
    let loaded = instance.take_map("counts").unwrap().into_fd();
    let mut raw = Raw::open(&gate, "app");
    let mut fds = raw.done("Map", &json!({"instance": instance.id.0, "name": "counts"})).1;
    fds.extend(raw.done("Load", &json!({"object": "o"})).1);
    fds.push(loaded);
    let target = json!({"instance": 2, "program": "pass", "target": {"interface": INTERFACE}});
    fds.extend(raw.done("Attach", &target).1);
    fds.extend(raw.done("List", &json!({})).1);
    assert_eq!(fds.len(), 3);
    for fd in fds {
        assert_eq!(process::kind(&fd), "map");
        let flags = FdFlag::from_bits_truncate(fcntl(fd.as_fd(), FcntlArg::F_GETFD).unwrap());
        assert!(flags.contains(FdFlag::FD_CLOEXEC));
        assert_eq!(Map::new(fd).unwrap().info().kind.to_string(), "array");
    }
    drop((client, raw, instance));
    gate.invariants(&before);
}
