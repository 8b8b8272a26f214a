//! `make bench`: what the separation of privilege costs, beside libbpf with every privilege.
//!
//! Everything happens in one directory under /run and in a network and a process namespace of its own. Two processes
//! make that safe: a [`supervise`]r, which removes the directory at the end, however that comes about, and the
//! [`worker`] that measures. The worker is the first process of its namespace, so that the kernel ends every broker,
//! helper and loader with it.
//!
//! | module | holds |
//! |---|---|
//! | `measure` | the measurements |
//! | `world` | directory, policies, broker, and the processes seen from outside |
//! | `peers` | the two other processes of the measurements: a client without privilege, and the bare ping-pong |
//! | `policies` | the measurements of policies |
//! | `traced` | what a trace of capability checks costs |
//! | `source` | sizes that are read from the source text |
//! | `table` | the table, and `target/bench.json` |
#![forbid(unsafe_code)]

mod measure;
mod peers;
mod policies;
mod source;
mod table;
mod traced;
mod world;

use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use world::{Directory, World};

/// What went wrong, as a sentence.
type Result<T> = std::result::Result<T, String>;

/// Says what was tried when it failed.
trait Trying<T> {
    fn trying(self, what: &str) -> Result<T>;
}

impl<T, E: Display> Trying<T> for std::result::Result<T, E> {
    fn trying(self, what: &str) -> Result<T> {
        // `#`: the errors of libbpf-rs then tell their causes too.
        self.map_err(|error| format!("{what} failed: {error:#}"))
    }
}

/// The words by which this program starts itself in another role.
const WORKER: &str = "--worker";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => supervise(),
        [WORKER, directory] => worker(Path::new(directory)).map(|()| ExitCode::SUCCESS),
        [peers::CONNECTOR, socket] => peers::connector(Path::new(socket)).map(|()| ExitCode::SUCCESS),
        [traced::WORKLOAD, uid] => traced::workload(uid, None).map(|()| ExitCode::SUCCESS),
        [traced::WORKLOAD, uid, cgroup] => {
            traced::workload(uid, Some(Path::new(cgroup))).map(|()| ExitCode::SUCCESS)
        }
        [peers::PONG] => peers::pong().map(|()| ExitCode::SUCCESS),
        _ => Err("it takes no arguments".to_owned()),
    };
    result.unwrap_or_else(|why| {
        eprintln!("bench: {why}");
        ExitCode::FAILURE
    })
}

fn supervise() -> Result<ExitCode> {
    if !nix::unistd::geteuid().is_root() {
        return Err("root is needed, for namespaces and to load BPF programs; run: sudo make bench".into());
    }
    // Blocked before there is anything to remove; `wait` takes them one after the other.
    let signals: SigSet =
        [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCHLD].into_iter().collect();
    signals.thread_block().trying("blocking signals")?;
    let directory = Directory::make()?;
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWPID).trying("making the namespaces")?;
    let mut worker = Command::new(world::SELF)
        .arg(WORKER)
        .arg(directory.path())
        .spawn()
        .trying("starting the process that measures")?;
    loop {
        let signal = signals.wait().trying("waiting for a signal")?;
        if signal == Signal::SIGCHLD {
            if let Some(status) = worker.try_wait().trying("waiting for the process that measures")? {
                return Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
            }
        } else {
            worker.kill().trying("ending the process that measures")?;
            worker.wait().trying("waiting for the process that measures")?;
            return Err(format!("ended by {signal}; everything it made is removed"));
        }
    }
}

fn worker(directory: &Path) -> Result<()> {
    // The supervisor's mask is inherited, and would be by the broker.
    SigSet::all().thread_unblock().trying("unblocking signals")?;
    set_pdeathsig(Signal::SIGKILL).trying("asking to end with the supervisor")?;
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).trying("reading RLIMIT_NOFILE")?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most).trying("raising RLIMIT_NOFILE")?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().ok_or("the source has no parent directory")?;
    let binaries = std::env::var_os("BPFGATE_BIN_DIR").map_or(root.join("target/release"), PathBuf::from);
    let world = World::make(directory, &binaries, &root.join("target/bpf"))?;
    let measured = measure::all(&world, root).map_err(|why| format!("{why}{}", world.log()))?;
    print!("{measured}");
    let file = root.join("target/bench.json");
    std::fs::write(&file, measured.json()).trying(&format!("writing {}", file.display()))
}
