//! Services: whatever ends, whenever it ends, nothing that is to stay is lost, and nothing else stays.

use bpfgate_client::{Error, LoadOptions};
use bpfgate_tests::census::Census;
use bpfgate_tests::services::{
    A_WHILE, BROKER, COUNTER, DropIn, Services, Traffic, helper, is_active, journal, kill_main, main_process,
    packets, property, said, systemctl,
};
use bpfgate_tests::{SOON, process, slowness, wait_until};
use nix::sys::signal::Signal;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Moments that differ from run to run.
fn moment(round: u32) -> Duration {
    let jitter = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_nanos();
    Duration::from_millis(u64::from((jitter / 1000 + round * 7) % 120) + 5)
}

/// Errors that a client may meet when something was killed: each says what it is.
fn is_named(error: &Error) -> bool {
    matches!(
        error,
        Error::Helper(_) | Error::Busy(_) | Error::Io { .. } | Error::Gone(_) | Error::Unreachable { .. }
    )
}

/// A client that loads, reads and unloads until it is told to stop; how often it succeeded.
fn work(gate: &Services, over: &AtomicBool) -> (u64, u64) {
    let (mut done, mut failed) = (0, 0);
    while !over.load(Ordering::Relaxed) {
        let round = || -> Result<(), Error> {
            let mut client = gate.try_session("busy")?;
            let mut instance = client.load("o", &LoadOptions::default())?;
            packets(&instance.take_map("counters").expect("the map"));
            client.unload(instance.id)
        };
        match round() {
            Ok(()) => done += 1,
            Err(error) => {
                assert!(is_named(&error), "an error without a name: {error:?}");
                failed += 1;
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
    (done, failed)
}

#[test]
fn twenty_crashes_of_each_process_lose_nothing() {
    let gate = bpfgate_tests::services!();
    gate.policy("busy", &COUNTER.replace("keep = \"app\"", "keep = \"session\""));
    let counters = gate.kept_counter("kept");
    drop(gate.session("busy"));
    let before = Census::take();
    let start = packets(&counters);
    let traffic = Traffic::begin(&gate.network);
    let over = AtomicBool::new(false);
    let (worked, killed) = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..2).map(|_| scope.spawn(|| work(&gate, &over))).collect();
        let (mut last, mut killed) = (start, 0);
        for round in 0..60 {
            std::thread::sleep(moment(round) * slowness());
            match round % 3 {
                0 => kill_main(BROKER, Signal::SIGKILL),
                1 => kill_main(&helper(if round % 2 == 0 { "kept" } else { "busy" }), Signal::SIGKILL),
                _ => {
                    // The loader and its worker, whichever is found.
                    let pid = main_process(&helper("busy")).pid;
                    let below = |of: i32| {
                        process::all().filter_map(process::Process::of).filter(move |p| p.parent == of)
                    };
                    let Some(loader) = below(pid).next() else { continue };
                    let target = if round % 2 == 0 { Some(loader.clone()) } else { below(loader.pid).next() };
                    if let Some(target) = target {
                        let _ =
                            nix::sys::signal::kill(nix::unistd::Pid::from_raw(target.pid), Signal::SIGKILL);
                    }
                }
            }
            killed += 1;
            let now = packets(&counters);
            assert!(now >= last, "the counter went back from {last} to {now}");
            last = now;
        }
        over.store(true, Ordering::Relaxed);
        (workers.into_iter().map(|worker| worker.join().unwrap()).collect::<Vec<_>>(), killed)
    });
    let sent = traffic.end();
    assert!(
        wait_until(A_WHILE, || packets(&counters) - start == sent),
        "{sent} sent, {} counted",
        packets(&counters) - start
    );
    println!("{killed} kills, {sent} packets, all counted; clients: {worked:?} (done, failed with a name)");
    assert!(worked.iter().all(|(done, _)| *done > 0), "a client never succeeded: {worked:?}");
    let mut client = gate.session_again("kept");
    assert_eq!(client.list().unwrap()[0].links.len(), 1);
    let left = leftover(&before);
    assert!(left.is_empty(), "left behind: {left:?}");
}

/// Programs, maps and links of ours that are new and stay. systemd makes programs of its own for units, which are not.
fn leftover(before: &Census) -> Vec<String> {
    let shown = || -> Vec<String> {
        let mut all = Vec::new();
        for kind in ["prog", "map"] {
            let output = Command::new("bpftool").args([kind, "show"]).output().unwrap();
            let text = said(&output);
            for line in text
                .lines()
                .filter(|line| line.contains(" name count_packets ") || line.contains(" name counters "))
            {
                let id: u32 = line.split(':').next().and_then(|id| id.parse().ok()).unwrap_or(0);
                let kind = if kind == "prog" { "program" } else { "map" };
                if Census::take().since(before).contains(&(kind, id)) {
                    all.push(line.to_owned());
                }
            }
        }
        all
    };
    wait_until(A_WHILE, || shown().is_empty());
    shown()
}

#[test]
fn restarts_under_traffic_count_every_packet() {
    let gate = bpfgate_tests::services!();
    let counters = gate.kept_counter("steady");
    let start = packets(&counters);
    let traffic = Traffic::begin(&gate.network);
    for unit in [BROKER.to_owned(), helper("steady"), BROKER.to_owned(), helper("steady")] {
        std::thread::sleep(Duration::from_millis(150));
        let output = systemctl(&["restart", &unit]);
        assert!(output.status.success(), "restart {unit}: {}\n{}", said(&output), journal());
    }
    std::thread::sleep(Duration::from_millis(150));
    let sent = traffic.end();
    assert!(
        wait_until(A_WHILE, || packets(&counters) - start == sent),
        "{sent} sent, {} counted",
        packets(&counters) - start
    );
    println!("{sent} packets during four restarts, 0 uncounted");
    // Who comes back finds what it had, under the numbers it had.
    let mut client = gate.session_again("steady");
    let instances = client.list().unwrap();
    let again = client.map(instances[0].id, "counters").unwrap().into_map().unwrap();
    assert_eq!(packets(&again), packets(&counters));
    client.detach(instances[0].links[0].id).unwrap();
    let still = packets(&counters);
    gate.network.send_to_interface(10);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(packets(&counters), still, "detached, and it counts");
    client.unload(instances[0].id).unwrap();
    // Nothing of it comes back after that.
    systemctl(&["restart", &helper("steady")]);
    assert!(gate.session_again("steady").list().unwrap().is_empty());
}

#[test]
fn a_session_ends_within_a_second_whatever_ends() {
    let gate = bpfgate_tests::services!();
    let text = COUNTER.replace("keep = \"app\"", "keep = \"session\"");
    gate.apply_policy("short", &text);
    let attached =
        || said(&Command::new("ip").args(["link", "show", "gate0"]).output().unwrap()).contains("xdp");
    for what in ["client", "broker", "helper"] {
        let mut client = gate.session_again("short");
        let _counters = gate.count_packets(&mut client);
        assert!(attached());
        let mut client = Some(client);
        match what {
            "client" => drop(client.take()),
            "broker" => kill_main(BROKER, Signal::SIGKILL),
            _ => kill_main(&helper("short"), Signal::SIGKILL),
        }
        assert!(wait_until(SOON, || !attached()), "attached a second after the {what} ended");
        if let Some(mut client) = client {
            let error = client.list().unwrap_err();
            assert!(is_named(&error), "after the {what} ended: {error:?}");
        }
    }
}

#[test]
fn the_watchdog_ends_a_broker_that_hangs() {
    let gate = bpfgate_tests::services!();
    gate.apply_policy("watch", COUNTER);
    let _quick = DropIn::new(BROKER, "[Service]\nWatchdogSec=4\n");
    systemctl(&["restart", BROKER]);
    let hung = main_process(BROKER);
    // It beats: it is not ended while it works.
    std::thread::sleep(Duration::from_secs(6));
    assert!(hung.is_alive(), "{}", journal());
    kill_main(BROKER, Signal::SIGSTOP);
    let limit = Duration::from_secs(20);
    assert!(wait_until(limit, || !hung.is_alive()), "it still hangs");
    assert!(wait_until(A_WHILE, || journal().contains("Watchdog timeout")), "{}", journal());
    drop(gate.session_again("watch"));
}

/// Has something kept in the name of a helper, or forgotten: what a test does from inside of its unit.
fn meddle(unit: &str, script: &str) {
    let cgroup = property(unit, "ControlGroup");
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    let root = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).unwrap();
    let root = root.split(' ').nth(1).unwrap();
    let program = format!(
        "import os, socket, array\n\
         open(r'{root}{cgroup}/cgroup.procs', 'w').write(str(os.getpid()))\n\
         s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n\
         s.connect('/run/systemd/notify')\n\
         def keep(name, fd): s.sendmsg([b'FDSTORE=1\\nFDPOLL=0\\nFDNAME=' + name.encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [fd]))])\n\
         def forget(name): s.send(b'FDSTOREREMOVE=1\\nFDNAME=' + name.encode())\n\
         def settle():\n  r, w = os.pipe()\n  s.sendmsg([b'BARRIER=1'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [w]))])\n  os.close(w)\n  os.read(r, 1)\n\
         {script}\nsettle()\n"
    );
    let output = Command::new("python3").args(["-c", &program]).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
}

#[test]
fn what_comes_back_wrong_is_not_taken_for_what_was_kept() {
    let gate = bpfgate_tests::services!();
    gate.apply_policy("odd", COUNTER);
    let unit = helper("odd");
    let _anybody = DropIn::new(&unit, "[Service]\nNotifyAccess=all\n");
    let mut client = gate.session("odd");
    let counters = gate.count_packets(&mut client);
    let id = client.list().unwrap()[0].id;
    drop(client);
    let grows = || gate.sees_packets(&counters);
    for (what, script, said_of_it) in [
        (
            "extra",
            "keep('link-77', os.open('/dev/null', os.O_RDONLY)); keep('nonsense', os.open('/etc/passwd', os.O_RDONLY))",
            "not taken: link-77, nonsense",
        ),
        (
            "of the wrong kind",
            &*format!(
                "forget('map-{id}-counters'); keep('map-{id}-counters', os.open('/dev/null', os.O_RDONLY))"
            ),
            "did not come back",
        ),
        ("a second record", "keep('state-99', os.memfd_create('bpfgate-state'))", "state-99"),
    ] {
        meddle(&unit, script);
        kill_main(&unit, Signal::SIGKILL);
        let mut client = gate.session_again("odd");
        assert_eq!(client.list().unwrap()[0].links.len(), 1, "{what}: the attachment is gone");
        assert!(grows(), "{what}: it does not count");
        assert!(wait_until(A_WHILE, || journal().contains(said_of_it)), "{what}: {}", journal());
    }
    // Without its link it is not attached, and says so; the rest is there.
    let link = gate.session_again("odd").list().unwrap()[0].links[0].id;
    meddle(&unit, &format!("forget('link-{link}')"));
    kill_main(&unit, Signal::SIGKILL);
    let mut client = gate.session_again("odd");
    let instances = client.list().unwrap();
    assert!(instances[0].links.is_empty());
    assert!(!grows());
    client.attach(id, "count_packets", None, None).unwrap();
    assert!(grows());
    drop(client);
    // Without any record nothing is known, and nothing stays attached.
    meddle(&unit, "\nfor n in range(1, 200): forget('state-%d' % n)");
    kill_main(&unit, Signal::SIGKILL);
    assert!(gate.session_again("odd").list().unwrap().is_empty());
    assert!(!grows(), "attached, and nobody knows");
}

#[test]
fn a_full_or_read_only_run_loses_nothing() {
    let gate = bpfgate_tests::services!();
    let counters = gate.kept_counter("full");
    let grows = || gate.sees_packets(&counters);
    let _ = Command::new("dd").args(["if=/dev/zero", "of=/run/full", "bs=1M"]).output().unwrap();
    assert!(grows());
    // A session needs no space there.
    assert_eq!(gate.session_again("full").list().unwrap()[0].links.len(), 1);
    kill_main(&helper("full"), Signal::SIGKILL);
    std::thread::sleep(Duration::from_millis(300));
    let still = grows();
    std::fs::remove_file("/run/full").unwrap();
    assert!(still, "a full /run took the attachment away");
    assert_eq!(gate.session_again("full").list().unwrap()[0].links.len(), 1, "{}", journal());
    // A second mount over it: the first has files open for writing.
    let mount = |words: &[&str]| {
        let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
        assert!(output.status.success(), "{words:?}: {}", said(&output));
    };
    mount(&["mount", "--bind", "/run", "/run"]);
    mount(&["mount", "-o", "remount,bind,ro", "/run"]);
    let read_only = std::fs::write("/run/anything", "x").is_err();
    let counts = grows();
    let session = gate.try_session("full").map(|mut client| client.list().unwrap().len());
    kill_main(&helper("full"), Signal::SIGKILL);
    std::thread::sleep(Duration::from_millis(300));
    let still = grows();
    mount(&["umount", "/run"]);
    assert!(read_only && still, "a helper that was killed took the attachment with it");
    assert!(counts, "a read-only /run took the attachment away");
    assert_eq!(session.unwrap(), 1);
    assert_eq!(gate.session_again("full").list().unwrap()[0].links.len(), 1, "{}", journal());
    assert!(is_active(BROKER));
}
