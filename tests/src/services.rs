//! bpfgate as services of a running systemd, in a machine that was made for these tests.
//!
//! They change policies and units of the machine they run in, so they run only where `BPFGATE_MACHINE` says that it is
//! theirs: `make systemd-test` and `make vm-test` set it inside of the machines they make.

use crate::gate::fill;
use crate::network::Network;
use crate::process::{self, Process};
use crate::user::{USER, Who, as_user};
use crate::{SOON, wait_until};
use bpfgate_client::{Client, LoadOptions, Map};
use std::fs::{self, File};
use std::net::UdpSocket;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Where clients find the broker.
pub const SOCKET: &str = "/run/bpfgate/io.bpfgate";
/// Where policies of tests go.
pub const POLICIES: &str = "/etc/bpfgate/policies";
/// The broker's unit.
pub const BROKER: &str = "bpfgate.service";

/// A policy for the packet counter that stays until it is unloaded.
pub const COUNTER: &str = "{client}\n[objects.o]\n{object:packet_counter}\n[[objects.o.xdp]]\nprogram = \"count_packets\"\n\
    interfaces = [\"{interface}\"]\nmode = \"generic\"\n[objects.o.maps]\ncounters = \"read-write\"\n[lifetime]\nkeep = \"app\"\n";

/// The services, with a veth pair, and without any policy but those of this test.
pub struct Services {
    /// `gate0` is in the machine's own network namespace.
    pub network: Network,
    objects: PathBuf,
    _alone: Flock<File>,
}

/// What takes some seconds: a start with everything that a unit does before.
pub const A_WHILE: Duration = Duration::from_secs(10);

impl Services {
    /// The services of this machine; none, with the reason printed, where it is not the tests' own.
    pub fn here() -> Option<Self> {
        if std::env::var_os("BPFGATE_MACHINE").is_none() {
            println!("skipped: needs a machine of its own with systemd (make systemd-test, make vm-test)");
            return None;
        }
        let lock = File::create("/run/bpfgate-tests.lock").expect("the lock of the tests");
        let alone = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno).expect("flock");
        let objects = PathBuf::from("/var/lib/bpfgate-tests");
        fs::create_dir_all(&objects).expect("a directory for objects");
        let services = Self { network: Network::from_here(), objects, _alone: alone };
        clear();
        // Earlier tests killed a lot; limits on starts are not what is tested here.
        systemctl(&["reset-failed"]);
        assert!(wait_until(A_WHILE, || is_active(BROKER) || systemctl(&["start", BROKER]).status.success()));
        Some(services)
    }

    /// Writes an app's policy, as [`crate::Gate::policy`] does.
    pub fn policy(&self, app: &str, text: &str) {
        fs::write(policy_path(app), fill(text, &self.objects)).expect("a policy");
    }

    /// Writes an app's policy and puts it in force.
    pub fn apply_policy(&self, app: &str, text: &str) {
        self.policy(app, text);
        self.apply();
    }

    /// `bpfgate policy apply`, which has to succeed.
    pub fn apply(&self) -> String {
        let output = bpfgate(&["policy", "apply"]);
        let text = said(&output);
        assert!(output.status.success(), "policy apply: {}\n{text}", output.status);
        text
    }

    /// A connection that is `who`'s.
    pub fn connect(&self, who: &Who) -> UnixStream {
        as_user(who, || UnixStream::connect(SOCKET)).expect("the socket is always there")
    }

    /// A session of an app for [`USER`].
    pub fn session(&self, app: &str) -> Client {
        self.try_session(app).unwrap_or_else(|error| panic!("Open {app}: {error}\n{}", journal()))
    }

    /// The same, where it may fail.
    pub fn try_session(&self, app: &str) -> Result<Client, bpfgate_client::Error> {
        let mut client = Client::from_stream(self.connect(&USER));
        client.open(app)?;
        Ok(client)
    }

    /// A session, as soon as there is one: helper or broker may be on their way.
    pub fn session_again(&self, app: &str) -> Client {
        let mut client = self.try_session(app);
        wait_until(A_WHILE, || {
            if client.is_err() {
                client = self.try_session(app);
            }
            client.is_ok()
        });
        client.unwrap_or_else(|error| panic!("Open {app}: {error}\n{}", journal()))
    }

    /// An app with [`COUNTER`] as its policy, loaded and attached by a client that is gone; gives the counters.
    pub fn kept_counter(&self, app: &str) -> Map {
        self.apply_policy(app, COUNTER);
        self.count_packets(&mut self.session(app))
    }

    /// Whether packets that arrive now are counted, each once.
    pub fn sees_packets(&self, counters: &Map) -> bool {
        let start = packets(counters);
        self.network.send_to_interface(5);
        wait_until(SOON, || packets(counters) == start + 5)
    }

    /// Loads and attaches the packet counter ([`COUNTER`]) for the app; gives its map.
    pub fn count_packets(&self, client: &mut Client) -> Map {
        let mut instance = client.load("o", &LoadOptions::default()).expect("Load");
        client.attach(instance.id, "count_packets", None, None).expect("Attach");
        instance.take_map("counters").expect("the map")
    }
}

impl Drop for Services {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the journal:\n{}", journal());
            return;
        }
        clear();
        // The policies of the package stay, and so do their sockets.
        let is_shipped = |unit: &String| unit.starts_with("bpfgate-helper@cap-trace.");
        let left =
            || units("bpfgate-helper@*").into_iter().filter(|unit| !is_shipped(unit)).collect::<Vec<_>>();
        assert!(wait_until(A_WHILE, || left().is_empty()), "units are left: {:?}", left());
    }
}

/// Removes all policies, and everything that they allowed.
fn clear() {
    for entry in fs::read_dir(POLICIES).expect("the package made it").flatten() {
        let _ = fs::remove_file(entry.path());
    }
    let output = bpfgate(&["policy", "apply"]);
    assert!(output.status.success(), "policy apply: {}", said(&output));
}

/// The unit of an app's helper.
pub fn helper(app: &str) -> String {
    format!("bpfgate-helper@{app}.service")
}

/// The file of an app's policy.
pub fn policy_path(app: &str) -> PathBuf {
    Path::new(POLICIES).join(format!("{app}.toml"))
}

/// Runs the command line as root.
pub fn bpfgate(arguments: &[&str]) -> Output {
    Command::new("bpfgate").args(arguments).output().expect("the package is installed")
}

/// Runs `systemctl`.
pub fn systemctl(arguments: &[&str]) -> Output {
    Command::new("systemctl").args(arguments).output().expect("systemctl is there")
}

/// Both outputs of a command.
pub fn said(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes)).concat()
}

/// A property of a unit.
pub fn property(unit: &str, name: &str) -> String {
    said(&systemctl(&["show", "-P", name, unit])).trim().to_owned()
}

/// Whether a unit is active.
pub fn is_active(unit: &str) -> bool {
    property(unit, "ActiveState") == "active"
}

/// Loaded units that are not just there because somebody asked about them.
pub fn units(pattern: &str) -> Vec<String> {
    let text = said(&systemctl(&["list-units", "--all", "--plain", "--no-legend", pattern]));
    text.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

/// The main process of a unit, when it has one.
pub fn main_process(unit: &str) -> Process {
    let mut found = None;
    wait_until(A_WHILE, || {
        let pid: i32 = property(unit, "MainPID").parse().unwrap_or(0);
        found = (pid != 0 && is_active(unit)).then(|| Process::of(pid)).flatten();
        found.is_some()
    });
    found.unwrap_or_else(|| panic!("{unit} has no process\n{}", journal()))
}

/// The uid of the broker.
pub fn broker_uid() -> u32 {
    let uids = process::status(main_process(BROKER).pid, "Uid");
    uids[0].split('\t').next().and_then(|uid| uid.parse().ok()).expect("a uid")
}

/// Whether an XDP program is attached to an interface of this machine.
pub fn is_attached(interface: &str) -> bool {
    let output = Command::new("ip").args(["link", "show", interface]).output().expect("ip is there");
    String::from_utf8_lossy(&output.stdout).contains("xdp")
}

/// Kills the main process of a unit, if it has one.
pub fn kill_main(unit: &str, signal: Signal) {
    let pid: i32 = property(unit, "MainPID").parse().unwrap_or(0);
    if pid > 1 {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

/// What the units have said.
pub fn journal() -> String {
    let output =
        Command::new("journalctl").args(["--no-pager", "-b", "-u", "bpfgate*", "-n", "2000"]).output();
    output.map_or_else(|error| error.to_string(), |output| said(&output))
}

/// A drop-in for a unit while this lives.
pub struct DropIn(PathBuf);

impl DropIn {
    /// Writes it and has systemd read it.
    pub fn new(unit: &str, text: &str) -> Self {
        let directory = PathBuf::from(format!("/run/systemd/system/{unit}.d"));
        fs::create_dir_all(&directory).expect("a drop-in directory");
        fs::write(directory.join("99-test.conf"), text).expect("a drop-in");
        systemctl(&["daemon-reload"]);
        Self(directory)
    }
}

impl Drop for DropIn {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
        systemctl(&["daemon-reload"]);
    }
}

/// Packets that arrive at `gate0` one after the other until this is stopped.
pub struct Traffic {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<u64>,
}

impl Traffic {
    /// Begins.
    pub fn begin(network: &Network) -> Self {
        let (socket, address): (UdpSocket, _) = network.sender();
        let stop = Arc::new(AtomicBool::new(false));
        let over = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut sent = 0;
            while !over.load(Ordering::Relaxed) {
                sent += u64::from(socket.send_to(b"packet", (address, 9)).is_ok());
                // Never more at once than the interface takes: what it drops nobody counts.
                std::thread::sleep(Duration::from_micros(300));
            }
            sent
        });
        Self { stop, thread }
    }

    /// Ends; gives how many were sent.
    pub fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the sender sends")
    }
}

/// Packets that the packet counter has counted, on all CPUs.
pub fn packets(counters: &Map) -> u64 {
    let per_cpu = counters.lookup_per_cpu(&0u32.to_ne_bytes()).expect("a lookup").expect("element 0");
    per_cpu.iter().map(|value| u64::from_ne_bytes(value[..8].try_into().expect("two u64"))).sum()
}

/// Ends a test where the services are not there.
#[macro_export]
macro_rules! services {
    () => {
        match $crate::services::Services::here() {
            Some(services) => services,
            None => return,
        }
    };
}
