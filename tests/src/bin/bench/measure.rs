//! The measurements. Where two things are compared, they take turns in one loop, so that both meet the same machine.

use crate::peers::{Connector, Ping};
use crate::table::Table;
use crate::world::{self, BTF, Broker, MAP, Object, Role, SMALL, World};
use crate::{Result, Trying, policies, source, traced};
use bpfgate_client::{Client, LoadOptions};
use libbpf_rs::ObjectBuilder;
use std::path::Path;
use std::time::{Duration, Instant};

/// Samples of each side of a comparison.
const SAMPLES: usize = 400;
/// Rounds before the first sample: caches are filled, and libbpf has probed the kernel, on both sides.
const WARM_UP: usize = 20;
/// First uses of apps, so many with each of so many brokers: 200 in all, and never 600 processes at a time.
const BROKERS: usize = 10;
const APPS: usize = 20;
/// Idle connections, shared by so many apps: a helper has room for 4,000.
const CONNECTIONS: u16 = 10_000;
const IDLE_APPS: usize = 4;
/// After so long a process that has nothing to do is idle.
const SETTLED: Duration = Duration::from_millis(100);

/// Takes all measurements; `root` is where the source is.
pub(crate) fn all(world: &World, root: &Path) -> Result<Table> {
    let mut table = Table::default();
    running(world, &mut table)?;
    starting(world, &mut table)?;
    idle(world, &mut table)?;
    progress("policies");
    policies::all(world, &mut table)?;
    progress("the trace of capability checks");
    traced::all(world, &mut table)?;
    written(root, &mut table)?;
    Ok(table)
}

fn progress(what: &str) {
    eprintln!("bench: {what}");
}

/// What the clock counts for a thing that is done once, in microseconds.
fn timed<T>(action: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    let start = Instant::now();
    let value = action()?;
    Ok((value, start.elapsed().as_secs_f64() * 1e6))
}

fn load(client: &mut Client, object: &str) -> Result<bpfgate_client::Instance> {
    client.load(object, &LoadOptions::default()).trying("loading through the broker")
}

fn open(connector: &mut Connector, app: &str) -> Result<Client> {
    let mut client = Client::from_stream(connector.connect()?);
    client.open(app).trying(&format!("opening app {app}"))?;
    Ok(client)
}

/// Loads and maps over a connection that is open.
fn running(world: &World, table: &mut Table) -> Result<()> {
    let broker = Broker::start(world, &[])?;
    let mut connector = Connector::start(&broker.socket, world.uid)?;

    progress("loads of the small object");
    let (ours, bare) = loads(world, &mut connector, &SMALL)?;
    let ours = table.median("load_us_small", "us", &ours);
    let bare = table.median("load_us_small_libbpf", "us", &bare);
    table.row("load_ratio_small", ours / bare, 2, 3.0, "");
    table.row("load_added_us_small", ours - bare, 0, 200.0, "");

    progress("loads of the object that needs the types of the kernel");
    let (ours, bare) = loads(world, &mut connector, &BTF)?;
    let ours = table.median("load_us_btf", "us", &ours);
    let bare = table.median("load_us_btf_libbpf", "us", &bare);
    table.row("load_ratio_btf", ours / bare, 2, 1.1, "");

    progress("requests for a map");
    let (ours, bare) = maps(world, &mut connector)?;
    let ours = table.median("mapfd_us", "us", &ours);
    let bare = table.median("mapfd_us_ping_pong", "us", &bare);
    table.row("mapfd_ratio", ours / bare, 2, 3.0, "");

    broker.stop()
}

/// Load requests, and libbpf in this process, which has every privilege. Letting go is timed on neither side.
fn loads(world: &World, connector: &mut Connector, object: &Object) -> Result<(Vec<f64>, Vec<f64>)> {
    let bytes = world.object(object)?;
    let mut client = open(connector, object.app)?;
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..WARM_UP + SAMPLES {
        let (instance, time) = timed(|| load(&mut client, "o"))?;
        client.unload(instance.id).trying("unloading through the broker")?;
        ours.push(time);
        let (_object, time) = timed(|| {
            let mut builder = ObjectBuilder::default();
            let object = builder.open_memory(&bytes).trying("opening the object with libbpf")?;
            object.load().trying("loading the object with libbpf")
        })?;
        bare.push(time);
    }
    Ok((ours.split_off(WARM_UP), bare.split_off(WARM_UP)))
}

/// Map requests, and the least that a descriptor from another process can cost.
fn maps(world: &World, connector: &mut Connector) -> Result<(Vec<f64>, Vec<f64>)> {
    let mut client = open(connector, SMALL.app)?;
    let instance = load(&mut client, "o")?;
    let mut ping = Ping::start(world.uid)?;
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..WARM_UP + SAMPLES {
        let (map, time) = timed(|| client.map(instance.id, MAP).trying("asking for a map"))?;
        if map.fd.is_none() {
            return Err("the map came without its descriptor".into());
        }
        ours.push(time);
        bare.push(timed(|| ping.ping())?.1);
    }
    Ok((ours.split_off(WARM_UP), bare.split_off(WARM_UP)))
}

/// First uses of apps whose helper does not run yet; and how much memory all processes have after the first load.
fn starting(world: &World, table: &mut Table) -> Result<()> {
    let roles = [Role::Broker, Role::Helper, Role::LoaderWorker, Role::LoaderParent, Role::Spawner];
    let mut resident = roles.map(|_| Vec::new());
    let mut private = roles.map(|_| Vec::new());
    let mut times = Vec::new();
    for round in 0..BROKERS {
        progress(&format!("first uses of apps, and memory: round {} of {BROKERS}", round + 1));
        let names: Vec<String> = (0..APPS).map(|app| format!("first-{round}-{app}")).collect();
        for name in &names {
            world.policy(name, &SMALL)?;
        }
        let broker = Broker::start(world, &[])?;
        let mut connector = Connector::start(&broker.socket, world.uid)?;
        let mut clients = Vec::new();
        for (app, name) in names.iter().enumerate() {
            // The time that another process needs to connect for us and to hand that over is in it.
            let ((client, _instance), time) = timed(|| {
                let mut client = open(&mut connector, name)?;
                let instance = load(&mut client, "o")?;
                Ok((client, instance))
            })?;
            times.push(time / 1e3);
            if app == 0 {
                std::thread::sleep(SETTLED);
                for (place, role) in roles.into_iter().enumerate() {
                    let memory = world::the_only(role)?.memory()?;
                    resident[place].push(memory.resident);
                    private[place].push(memory.private);
                }
            }
            clients.push(client);
        }
        drop(clients);
        broker.stop()?;
    }
    let time = table.median("first_use_ms", "ms", &times);
    table.row("first_use_ms", time, 1, 10.0, "");
    let names = [
        ("rss_kb_broker", "rss_kb_broker_private"),
        ("rss_kb_helper", "rss_kb_helper_private"),
        ("rss_kb_loader", "rss_kb_loader_private"),
        ("rss_kb_loader_parent", "rss_kb_loader_parent_private"),
        ("rss_kb_spawner", "rss_kb_spawner_private"),
    ];
    let aims = [Some((6000.0, "")), Some((2500.0, "")), Some((6000.0, "the worker")), None, None];
    for (place, (name, name_private)) in names.into_iter().enumerate() {
        let value = table.median(name, "KiB", &resident[place]);
        table.median(name_private, "KiB", &private[place]);
        if let Some((aim, remark)) = aims[place] {
            table.row(name, value, 0, aim, remark);
        }
    }
    Ok(())
}

/// What many connections that do nothing cost the broker: some that have said which app they are, and before that.
fn idle(world: &World, table: &mut Table) -> Result<()> {
    progress("idle connections");
    let limits = ["--max-connections", "11000", "--max-connections-per-user", "11000"];
    let apps: Vec<String> = (0..IDLE_APPS).map(|app| format!("idle-{app}")).collect();
    for app in &apps {
        world.policy(app, &SMALL)?;
    }
    let broker = Broker::start(world, &limits)?;
    let mut connector = Connector::start(&broker.socket, world.uid)?;
    let mut clients = Vec::new();
    for app in &apps {
        let mut client = open(&mut connector, app)?;
        let instance = load(&mut client, "o")?;
        client.unload(instance.id).trying("unloading through the broker")?;
        clients.push(client);
    }
    let process = world::the_only(Role::Broker)?;
    let resident = || {
        std::thread::sleep(SETTLED);
        process.memory().map(|memory| memory.resident * 1024.0)
    };
    let before = resident()?;
    let mut idle = Vec::new();
    for _ in 0..CONNECTIONS {
        idle.push(Client::from_stream(connector.connect()?));
    }
    // The broker accepts in order: with an answer to the last it has them all.
    if let Some(last) = idle.last_mut() {
        last.service_info().trying("asking the broker what it is")?;
    }
    let connected = resident()?;
    for (client, app) in idle.iter_mut().zip(apps.iter().cycle()) {
        client.open(app).trying(&format!("opening app {app}"))?;
    }
    let opened = resident()?;
    let each = |after: f64| (after - before) / f64::from(CONNECTIONS);
    table.median("idle_conn_bytes_unopened", "bytes", &[each(connected)]);
    let each = table.median("idle_conn_bytes", "bytes", &[each(opened)]);
    table.row("idle_conn_bytes", each, 0, 1024.0, "after Open");
    drop((idle, clients));
    broker.stop()
}

/// What stands in the source of the helper.
fn written(root: &Path, table: &mut Table) -> Result<()> {
    let source = root.join("helper/src");
    let lines = source::lines(&source)?;
    let (syscalls, commands) = source::lists(&source.join("seccomp.rs"))?;
    table.median("lines_helper_total", "lines", &[f64::from(lines.all)]);
    table.row("lines_helper", f64::from(lines.code), 0, 1500.0, "neither blank nor comment");
    table.row("syscalls_helper", f64::from(syscalls), 0, 24.0, "");
    table.row("bpf_cmds_helper", f64::from(commands), 0, 12.0, "");
    Ok(())
}
