//! What is needed around the measurements: a directory, policies, a broker; and the processes as seen from outside.

use crate::{Result, Trying};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Group, Pid, Uid, User};
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// This program, also for a user who could not reach it by its path.
pub(crate) const SELF: &str = "/proc/self/exe";

/// How long anything may take to start or to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// The directory of this run. A policy is read only below directories that root alone can write: not below /tmp.
pub(crate) struct Directory(PathBuf);

impl Directory {
    pub(crate) fn make() -> Result<Self> {
        let path = PathBuf::from(format!("/run/bpfgate-bench.{}", std::process::id()));
        fs::create_dir(&path).trying(&format!("making the directory {}", path.display()))?;
        let directory = Self(path);
        // Whatever the umask: the client has to reach the socket.
        readable(directory.path(), 0o755)?;
        Ok(directory)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("bench: removing {} failed: {error}", self.0.display());
        }
    }
}

fn readable(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, Permissions::from_mode(mode))
        .trying(&format!("setting the mode of {}", path.display()))
}

/// An object of the tests, and how a policy names it.
pub(crate) struct Object {
    pub(crate) app: &'static str,
    pub(crate) file: &'static str,
    hook: &'static str,
}

/// Twelve instructions and one map.
pub(crate) const SMALL: Object =
    Object { app: "small", file: "minimal.bpf.o", hook: "xdp]]\nprogram = \"pass\"\ninterfaces = [\"lo\"]" };

/// Needs the types of the kernel.
pub(crate) const BTF: Object = Object {
    app: "btf",
    file: "minimal_btf.bpf.o",
    hook: "raw_tracepoint]]\nprogram = \"on_exit\"\nevents = [\"sched_process_exit\"]",
};

/// The one map of both.
pub(crate) const MAP: &str = "counts";

pub(crate) struct World {
    directory: PathBuf,
    binaries: PathBuf,
    objects: PathBuf,
    /// The client's user and group: nobody's, so that nobody else can use the socket of this run.
    pub(crate) uid: u32,
}

impl World {
    pub(crate) fn make(directory: &Path, binaries: &Path, objects: &Path) -> Result<Self> {
        for name in ["bpfgate", "bpfgate-broker", "bpfgate-helper", "bpfgate-loader"] {
            let file = binaries.join(name);
            if !file.is_file() {
                return Err(format!("{} is not there; run: make bench", file.display()));
            }
        }
        let nobodys = |id: &u32| {
            let user = User::from_uid(Uid::from_raw(*id)).is_ok_and(|user| user.is_none());
            user && Group::from_gid(Gid::from_raw(*id)).is_ok_and(|group| group.is_none())
        };
        let uid = (61_000..61_100).find(nobodys).ok_or("no user id between 61000 and 61100 is free")?;
        let world =
            Self { directory: directory.into(), binaries: binaries.into(), objects: objects.into(), uid };
        let policies = world.policies();
        fs::create_dir(&policies).trying("making the directory of policies")?;
        readable(&policies, 0o755)?;
        for object in [&SMALL, &BTF] {
            world.copy(object.file)?;
            world.policy(object.app, object)?;
        }
        Ok(world)
    }

    /// The bytes of an object.
    pub(crate) fn object(&self, object: &Object) -> Result<Vec<u8>> {
        self.bytes(object.file)
    }

    fn bytes(&self, file: &str) -> Result<Vec<u8>> {
        let path = self.objects.join(file);
        fs::read(&path).trying(&format!("reading {} (make bench builds it)", path.display()))
    }

    /// An object where a policy of this run may name it.
    pub(crate) fn copy(&self, file: &str) -> Result<PathBuf> {
        let copy = self.directory.join(file);
        fs::write(&copy, self.bytes(file)?).trying(&format!("copying {file}"))?;
        readable(&copy, 0o644)?;
        Ok(copy)
    }

    /// A program of bpfgate.
    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.binaries.join(name)
    }

    fn policies(&self) -> PathBuf {
        self.directory.join("policies")
    }

    /// Writes the policy of an app that may use this object as it likes.
    pub(crate) fn policy(&self, app: &str, object: &Object) -> Result<()> {
        let Self { directory, uid, .. } = self;
        let Object { file, hook, .. } = object;
        let text = format!(
            "version = 1\n\
             [[client]]\nuser = {uid}\nmay = [\"load\", \"attach\", \"maps\"]\n\
             [objects.o]\npath = \"{}/{file}\"\n\
             [[objects.o.{hook}\n\
             [objects.o.maps]\n{MAP} = \"frozen\"\n\
             [limits]\nprograms = 64\nmaps = 128\nconnections = 4000\n",
            directory.display()
        );
        let path = self.policies().join(format!("{app}.toml"));
        fs::write(&path, text).trying(&format!("writing {}", path.display()))?;
        readable(&path, 0o644)
    }

    /// Writes a file of this run, in a directory that nobody else may write.
    pub(crate) fn file(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.directory.join(name);
        if let Some(directory) = path.parent().filter(|directory| !directory.exists()) {
            fs::create_dir(directory).trying(&format!("making {}", directory.display()))?;
            readable(directory, 0o755)?;
        }
        fs::write(&path, text).trying(&format!("writing {}", path.display()))?;
        readable(&path, 0o644)?;
        Ok(path)
    }

    fn log_file(&self) -> PathBuf {
        self.directory.join("broker.log")
    }

    /// How many generations of policies brokers have put in force.
    pub(crate) fn generations(&self) -> usize {
        let text = fs::read_to_string(self.log_file()).unwrap_or_default();
        text.lines().filter(|line| line.contains("of the policies is in force")).count()
    }

    /// The end of the broker's log, to go after an error.
    pub(crate) fn log(&self) -> String {
        let text = fs::read_to_string(self.log_file()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let end: Vec<&str> = lines[lines.len().saturating_sub(5)..].to_vec();
        if end.is_empty() {
            return String::new();
        }
        format!("\nThe last lines of the broker's log:\n  {}", end.join("\n  "))
    }
}

/// A broker of its own, with what it starts. All of it ends when this is dropped.
pub(crate) struct Broker {
    child: Child,
    pub(crate) socket: PathBuf,
}

impl Broker {
    pub(crate) fn start(world: &World, arguments: &[&str]) -> Result<Self> {
        let socket = world.directory.join("socket");
        let log = File::options().create(true).append(true).open(world.log_file());
        let log = log.trying("opening the log of the broker")?;
        let child = Command::new(world.binaries.join("bpfgate-broker"))
            .arg("--standalone")
            .arg("--policies")
            .arg(world.policies())
            .arg("--socket")
            .arg(&socket)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .trying("starting the broker")?;
        let mut broker = Self { child, socket };
        let until = Instant::now() + PATIENCE;
        // The socket is there before somebody listens on it.
        while UnixStream::connect(&broker.socket).is_err() {
            if let Some(status) = broker.child.try_wait().trying("waiting for the broker")? {
                return Err(format!("the broker ended before it listened: {status}"));
            }
            if Instant::now() > until {
                return Err("the broker did not listen in time".into());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(broker)
    }

    /// Has it read its policies again.
    pub(crate) fn reload(&self) -> Result<()> {
        let pid = i32::try_from(self.child.id()).trying("the pid of the broker")?;
        kill(Pid::from_raw(pid), Signal::SIGHUP).trying("sending SIGHUP to the broker")
    }

    /// Ends it and waits until nothing that it started is left: the next measurement has the machine for itself.
    pub(crate) fn stop(self) -> Result<()> {
        drop(self);
        let until = Instant::now() + PATIENCE;
        loop {
            let left = processes()?;
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() > until {
                let names: Vec<String> =
                    left.into_iter().map(|process| format!("{:?} {}", process.role, process.pid)).collect();
                return Err(format!("the broker is gone, but not {}", names.join(", ")));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        if let Ok(Some(status)) = self.child.try_wait() {
            eprintln!("bench: the broker ended by itself: {status}");
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.socket);
    }
}

/// What a process of bpfgate is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Broker,
    Spawner,
    Helper,
    LoaderParent,
    LoaderWorker,
}

/// A process of this run.
pub(crate) struct Process {
    pub(crate) role: Role,
    /// As /proc names it, which is not as our process namespace does.
    pid: String,
}

/// Memory of a process in KiB.
pub(crate) struct Memory {
    /// `VmRSS`: all that is in memory.
    pub(crate) resident: f64,
    /// `RssAnon`: the part that is not file contents, which other processes may share.
    pub(crate) private: f64,
}

impl Process {
    pub(crate) fn memory(&self) -> Result<Memory> {
        Ok(Memory { resident: self.kilobytes("VmRSS:")?, private: self.kilobytes("RssAnon:")? })
    }

    fn kilobytes(&self, name: &str) -> Result<f64> {
        let path = format!("/proc/{}/status", self.pid);
        let text = fs::read_to_string(&path).trying(&format!("reading {path}"))?;
        let value = field(&text, name).and_then(|value| value.trim_end_matches(" kB").parse().ok());
        value.ok_or_else(|| format!("{path} has no {name}"))
    }
}

fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

/// The processes of bpfgate in our network namespace: all of them are of this run.
pub(crate) fn processes() -> Result<Vec<Process>> {
    let namespace = |pid: &str| fs::metadata(format!("/proc/{pid}/ns/net")).map(|meta| meta.ino()).ok();
    let program = |pid: &str| {
        let path = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
        Some(path.file_name()?.to_string_lossy().into_owned())
    };
    let ours = namespace("self").ok_or("our own network namespace cannot be read from /proc")?;
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").trying("reading /proc")? {
        let pid = entry.trying("reading /proc")?.file_name().to_string_lossy().into_owned();
        if !pid.bytes().all(|byte| byte.is_ascii_digit()) || namespace(&pid) != Some(ours) {
            continue;
        }
        // Whatever ends while we look is left out.
        let (Some(name), Ok(status)) = (program(&pid), fs::read_to_string(format!("/proc/{pid}/status")))
        else {
            continue;
        };
        let role = match name.as_str() {
            "bpfgate-broker" => Role::Broker,
            "bpfgate-helper" => {
                let arguments = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let spawner = arguments.split('\0').any(|argument| argument == "--spawner");
                if spawner { Role::Spawner } else { Role::Helper }
            }
            "bpfgate-loader" => {
                let parent = field(&status, "PPid:").and_then(program);
                if parent == Some(name) { Role::LoaderWorker } else { Role::LoaderParent }
            }
            _ => continue,
        };
        found.push(Process { role, pid });
    }
    Ok(found)
}

/// The one process with this role.
pub(crate) fn the_only(role: Role) -> Result<Process> {
    let mut all: Vec<Process> = processes()?.into_iter().filter(|process| process.role == role).collect();
    match (all.pop(), all.len()) {
        (Some(process), 0) => Ok(process),
        (None, _) => Err(format!("there is no process with the role {role:?}")),
        (_, more) => Err(format!("there are {} processes with the role {role:?}, not one", more + 1)),
    }
}
