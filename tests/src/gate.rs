//! A broker of a test's own: directory, policies, network, processes; all gone when it is dropped.

use crate::network::Network;
use crate::process::{self, Process, Role};
use crate::user::{Who, as_user};
use crate::witness::{self, Witness};
use crate::{SOON, invariants, wait_until};
use bpfgate_client::Client;
use nix::fcntl::{FcntlArg, FdFlag, Flock, FlockArg, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

pub use crate::network::INTERFACE;

/// A running broker.
pub struct Gate {
    /// Root's directory, readable by everybody.
    pub dir: PathBuf,
    /// The broker, as it was started.
    pub broker: Process,
    child: Child,
    network: Network,
    _alone: Flock<File>,
}

/// The workspace; on another machine, what was copied of it.
pub fn workspace() -> PathBuf {
    let here =
        || Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate is in the workspace").into();
    std::env::var_os("BPFGATE_WORKSPACE").map_or_else(here, PathBuf::from)
}

/// Where the programs under test are.
pub fn bin_dir() -> PathBuf {
    std::env::var_os("BPFGATE_BIN_DIR").map_or_else(|| workspace().join("target/release"), PathBuf::from)
}

/// A compiled BPF object of `tests/bpf` or `policies/bpf`.
pub fn bpf_object(name: &str) -> PathBuf {
    workspace().join(format!("target/bpf/{name}.bpf.o"))
}

/// The SHA-256 of a file, in hexadecimal.
pub fn sha256(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().expect("sha256sum is there");
    assert!(output.status.success(), "{} cannot be read", path.display());
    String::from_utf8_lossy(&output.stdout).split(' ').next().unwrap_or_default().to_owned()
}

/// An app with the one program of `minimal`, on the test's interface.
pub const MINIMAL: &str = r#"
{client}
[objects.o]
{object:minimal}
[[objects.o.xdp]]
program = "pass"
interfaces = ["{interface}"]
"#;

/// The same with a map, which its client can write.
pub const WITH_MAP: &str = "{client}\n[objects.o]\n{object:minimal}\n[[objects.o.xdp]]\nprogram = \"pass\"\n\
    interfaces = [\"{interface}\"]\nmode = \"generic\"\n[objects.o.maps]\ncounts = \"read-write\"\n";

/// The text of a policy, see [`Gate::policy`]. Objects are copied to a directory.
pub fn fill(text: &str, objects: &Path) -> String {
    let client = "[[client]]\nuser = 12345\nmay = [\"load\", \"attach\", \"maps\"]\n";
    let mut text = text.replace("{client}", client).replace("{interface}", INTERFACE);
    while let Some(start) = text.find("{object:") {
        let end = start + text[start..].find('}').expect("a closing brace");
        let path = object_in(objects, &text[start + "{object:".len()..end]);
        let filled = format!("path = \"{}\"\nsha256 = \"{}\"", path.display(), sha256(&path));
        text.replace_range(start..=end, &filled);
    }
    format!("version = 1\n{text}")
}

/// A copy of a BPF object in a directory; made when first asked for.
pub fn object_in(directory: &Path, name: &str) -> PathBuf {
    let path = directory.join(format!("{name}.bpf.o"));
    if !path.exists() {
        fs::copy(bpf_object(name), &path).expect("BPF objects are made by `make bpf`");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("its mode");
    }
    path
}

impl Gate {
    /// Starts a broker without any policy but the canary's.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts a broker with further arguments.
    pub fn start_with(arguments: &[&str]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let lock = File::create("/run/bpfgate-tests.lock").expect("the lock of the tests");
        let alone = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno).expect("flock");
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = PathBuf::from(format!("/run/bpfgate-test-{}-{number}", std::process::id()));
        for path in [dir.clone(), dir.join("policies"), dir.join("objects")] {
            fs::DirBuilder::new().mode(0o755).create(&path).expect("a directory of the test");
            // Whatever the umask is.
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("its mode");
        }
        // Commands of any user write into it.
        File::create(dir.join("wire")).expect("a file of the test");
        fs::set_permissions(dir.join("wire"), fs::Permissions::from_mode(0o666)).expect("its mode");
        let network = Network::new();
        let log = File::create(dir.join("broker.log")).expect("the log");
        let mut command = network.inside(bin_dir().join("bpfgate-broker"));
        command.arg("--standalone").arg("--policies").arg(dir.join("policies"));
        command.arg("--socket").arg(dir.join("socket")).arg("--audit").arg(dir.join("audit"));
        let command = command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = command.spawn().expect("nsenter is there");
        let pid = child.id().cast_signed();
        let broker = Process { pid, parent: 0, started: 0, role: Role::Broker };
        let mut gate = Self { dir, broker, child, network, _alone: alone };
        let listens = || UnixStream::connect(gate.socket()).is_ok();
        assert!(wait_until(Duration::from_secs(10), listens), "the broker does not listen:\n{}", gate.log());
        gate.broker = Process::of(pid).expect("the broker runs");
        gate.policy(invariants::CANARY, invariants::CANARY_POLICY);
        gate
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("socket")
    }

    /// A process in the broker's namespaces.
    pub fn holder(&self) -> u32 {
        self.network.holder()
    }

    /// The path of an app's policy.
    pub fn policy_path(&self, app: &str) -> PathBuf {
        self.dir.join(format!("policies/{app}.toml"))
    }

    /// Writes an app's policy and puts it in force: `version = 1` and `text`, in which `{NAME}` is filled in: `{client}`
    /// is an entry that allows [`USER`](crate::USER) everything, `{interface}` the interface, `{object:NAME}` path and
    /// digest of a BPF object.
    pub fn policy(&self, app: &str, text: &str) {
        self.edit(app, text);
        self.reload();
    }

    /// Writes it, and that is all.
    pub fn edit(&self, app: &str, text: &str) {
        fs::write(self.policy_path(app), self.fill(text)).expect("a policy");
    }

    /// Has the broker read the policies again, and waits until they are in force. Gives the number of that generation.
    pub fn reload(&self) -> u64 {
        let before = self.generation();
        self.hang_up();
        let in_force = || self.generation() > before;
        assert!(wait_until(Duration::from_secs(10), in_force), "no new generation:\n{}", self.log());
        self.generation()
    }

    /// Sends the broker SIGHUP.
    pub fn hang_up(&self) {
        kill(Pid::from_raw(self.broker.pid), Signal::SIGHUP).expect("root may");
    }

    /// Which generation of the policies is in force, as the broker says in its log.
    pub fn generation(&self) -> u64 {
        let log = self.log();
        let number = |line: &str| line.split_once("] generation ")?.1.split_once(' ')?.0.parse().ok();
        log.lines().filter_map(number).next_back().unwrap_or(1)
    }

    /// The whole text of a policy.
    pub fn fill(&self, text: &str) -> String {
        fill(text, &self.dir.join("objects"))
    }

    /// A copy of a BPF object in the directory of this test; made when first asked for.
    pub fn object(&self, name: &str) -> PathBuf {
        object_in(&self.dir.join("objects"), name)
    }

    /// A client that is `who`; the session is not opened.
    pub fn client(&self, who: &Who) -> Client {
        let mut client = Client::from_stream(self.connect(who));
        if let Some(mut witness) = self.witness(who) {
            client.observe(move |request, reply| {
                let [request, reply]: [Value; 2] =
                    [request, reply].map(|text| serde_json::from_slice(text).expect("JSON"));
                let method = request["method"].as_str().expect("its name");
                witness.told(method, &request["parameters"], &reply);
            });
        }
        client
    }

    /// Compares what this client is told with what is recorded.
    pub(crate) fn witness(&self, who: &Who) -> Option<Witness> {
        Witness::of(self.dir.join("audit"), Some(who.id))
    }

    /// A session of `app` for [`USER`](crate::USER).
    pub fn session(&self, app: &str) -> Client {
        let mut client = self.client(&crate::USER);
        if let Err(error) = client.open(app) {
            panic!("Open {app}: {error}\n{}", self.log());
        }
        client
    }

    /// A connection that is `who`'s for as long as it lives, whoever uses it.
    pub fn connect(&self, who: &Who) -> UnixStream {
        as_user(who, || UnixStream::connect(self.socket())).expect("the broker listens")
    }

    /// What the broker and everything below it wrote to standard error.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.dir.join("broker.log")).unwrap_or_default()).into_owned()
    }

    /// The audit records. Every line is one, and holds nothing that a terminal would obey.
    pub fn audit(&self) -> Vec<Value> {
        let text = fs::read(self.dir.join("audit")).expect("the audit file");
        let text = String::from_utf8(text).expect("audit records are text");
        assert!(text.is_empty() || text.ends_with('\n'), "half an audit record");
        assert!(
            !text.contains(|c: char| c.is_control() && c != '\n'),
            "a control character in the audit file"
        );
        let all: Vec<Value> = text
            .lines()
            .map(|line| {
                serde_json::from_str(line).unwrap_or_else(|error| panic!("no audit record: {line}: {error}"))
            })
            .collect();
        witness::are_whole(&all);
        all
    }

    /// The audit records of one app; refused connections name it as what was asked for.
    pub fn audit_of(&self, app: &str) -> Vec<Value> {
        let is_its = |record: &Value| record["app"] == app || record["about"] == app;
        self.audit().into_iter().filter(is_its).collect()
    }

    /// All processes in the broker's network namespace but the one that holds it.
    pub fn processes(&self) -> Vec<Process> {
        let ours = |pid: &i32| {
            process::network(*pid) == Some(self.network.id) && *pid != self.holder().cast_signed()
        };
        process::all().filter(ours).filter_map(Process::of).collect()
    }

    /// The process of this role, if there is one.
    pub fn find(&self, role: &Role) -> Option<Process> {
        self.processes().into_iter().find(|process| process.role == *role)
    }

    /// The helper of an app, with its loader and the loader's worker.
    pub fn helper(&self, app: &str) -> [Process; 3] {
        let find = || {
            let all = self.processes();
            let helper = all.iter().find(|process| process.role == Role::Helper(app.to_owned()))?;
            let child = |of: &Process| all.iter().find(|process| process.parent == of.pid);
            let loader = child(helper)?;
            Some([helper.clone(), loader.clone(), child(loader)?.clone()])
        };
        let mut found = find();
        wait_until(SOON, || {
            found = find();
            found.is_some()
        });
        found.unwrap_or_else(|| panic!("{app} has no helper with a loader: {:?}", self.processes()))
    }

    /// Kills a process of this broker at once and waits for its end.
    pub fn kill(&self, process: &Process) {
        assert!(self.processes().contains(process), "only what the test started is killed");
        kill(Pid::from_raw(process.pid), Signal::SIGKILL).expect("root may kill");
        assert!(wait_until(SOON, || !process.is_alive()), "{process:?} survives SIGKILL");
    }

    /// Sends this many packets to the interface, from the other side.
    pub fn send_packets(&self, count: usize) {
        self.network.send_to_interface(count);
    }

    /// Sends this many packets over the loopback interface of the broker's namespace.
    pub fn send_over_loopback(&self, count: usize) {
        self.network.send_over_loopback(count);
    }

    /// A command in the broker's namespaces, as root.
    pub fn inside(&self, program: impl AsRef<Path>) -> Command {
        self.network.inside(program)
    }

    /// A program as an unprivileged user: no capability in any set, and none to be had.
    ///
    /// It is executed by descriptor, because the way to the file may be closed to that user.
    pub fn unprivileged(&self, who: &Who, program: &Path) -> Command {
        let mut command = Command::new("setpriv");
        command.args([format!("--reuid={}", who.id), format!("--regid={}", who.id)]);
        if who.groups.is_empty() {
            command.arg("--clear-groups");
        } else {
            let groups: Vec<String> = who.groups.iter().map(u32::to_string).collect();
            command.arg(format!("--groups={}", groups.join(",")));
        }
        command.args(["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--"]);
        command.arg(inherited(program)).env("BPFGATE_SOCKET", self.socket()).current_dir("/");
        command
    }

    /// The command line `bpfgate`, as an unprivileged user.
    pub fn cli(&self, who: &Who, line: &str) -> Command {
        let mut command = self.unprivileged(who, &bin_dir().join("bpfgate"));
        command.args(line.split_whitespace()).env("BPFGATE_WIRE", self.dir.join("wire"));
        command
    }

    /// Ends the broker as a crash would.
    pub fn kill_broker(&mut self) {
        self.child.kill().expect("root may kill");
        self.child.wait().expect("it is a child of the test");
    }

    /// Whether nothing of the broker is left running.
    pub fn is_over(&self) -> bool {
        self.processes().is_empty()
    }
}

/// A path that opens `program` in a child, whoever the child is. The descriptor stays open for the test's life.
pub fn inherited(program: &Path) -> String {
    let file = File::open(program).unwrap_or_else(|error| panic!("{}: {error}", program.display()));
    fcntl(&file, FcntlArg::F_SETFD(FdFlag::empty())).expect("F_SETFD");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    std::mem::forget(file);
    path
}

impl Drop for Gate {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // How soon is what tests of crashes look at; here it is whether.
        let over = wait_until(5 * SOON, || self.is_over());
        let left = self.processes();
        for process in &left {
            let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
        }
        if !std::thread::panicking() {
            witness::of_commands(&self.dir);
        }
        if std::thread::panicking() {
            eprintln!("the log of the broker:\n{}", self.log());
        }
        let _ = fs::remove_dir_all(&self.dir);
        assert!(over || std::thread::panicking(), "these outlived their broker: {left:?}");
    }
}
