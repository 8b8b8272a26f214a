//! `bpfgate-helper APP`: the one process of an app that holds capabilities. It parses one root-owned policy file,
//! opens what that names, locks itself down, and from then on takes typed, bounded messages only.
//!
//! `run_helper` below is the start-up, top to bottom; every step fails closed. `bpfgate-helper --spawner` is PID 1's
//! stand-in where there is no systemd ([`spawner`]).
//!
//! Distrusted: the broker (it may be taken over: [`serve`]), the loader (an object may have taken it over:
//! [`loading`]), the clients. Trusted: the kernel, root's policy file, the process that started this one.

mod attach;
mod inventory;
mod loader;
mod loading;
mod maps;
mod seccomp;
mod serve;
mod spawner;
mod state;

use bpfgate_lockdown::capabilities::User;
use bpfgate_lockdown::{Fatal, Step, capabilities, files, process, syscalls};
use bpfgate_protocol::channel::Channel;
use bpfgate_protocol::messages::helper::{FromHelper, Sandbox};
use bpfgate_protocol::names::AppName;
use bpfgate_protocol::policy::{Sandboxing, file, needed};
use bpfgate_protocol::{DEFAULT_SOCKET, INNER_VERSION};
use std::path::PathBuf;
use std::sync::Arc;

/// The command line; the processes that start this one write it.
#[derive(Default)]
struct Arguments {
    /// None: be the spawner.
    app: Option<AppName>,
    policies: Vec<PathBuf>,
    loader: PathBuf,
    /// The socket that clients come through.
    socket: PathBuf,
    /// Who to be, if started by root.
    user: Option<User>,
}

fn main() {
    let result = arguments().and_then(|arguments| match &arguments.app {
        Some(app) => run_helper(app, &arguments),
        None => spawner::run(&arguments),
    });
    if let Err(fatal) = &result {
        eprintln!("bpfgate-helper: {fatal}");
    }
    // At once: what the Rust library would do before needs more system calls than are left.
    process::exit_now(i32::from(result.is_err()))
}

fn arguments() -> Result<Arguments, Fatal> {
    let usage = || {
        Fatal("usage: bpfgate-helper APP|--spawner [--policies DIRECTORY]... --loader PATH [--socket PATH] [--uid N]".into())
    };
    let mut args = std::env::args().skip(1);
    let app = match args.next().ok_or_else(usage)?.as_str() {
        "--spawner" => None,
        name => Some(name.parse().step("the name of the app")?),
    };
    let mut parsed = Arguments { app, socket: DEFAULT_SOCKET.into(), ..Default::default() };
    while let Some(key) = args.next() {
        let value = args.next().ok_or_else(usage)?;
        match key.as_str() {
            "--policies" => parsed.policies.push(value.into()),
            "--loader" => parsed.loader = value.into(),
            "--socket" => parsed.socket = value.into(),
            "--uid" => parsed.user = Some(User::unnamed(value.parse().step("--uid")?)),
            _ => return Err(usage()),
        }
    }
    if parsed.policies.is_empty() {
        parsed.policies = file::DIRECTORIES.iter().map(PathBuf::from).collect();
    }
    if parsed.loader.as_os_str().is_empty() { Err(usage()) } else { Ok(parsed) }
}

fn run_helper(app: &AppName, arguments: &Arguments) -> Result<(), Fatal> {
    let broker = Channel::inherited(3).step("descriptor 3 is not the broker's channel")?;
    if nix::unistd::geteuid().is_root() && arguments.user.is_none_or(|user| user.uid == 0) {
        return Err(Fatal("a helper is no root process: --uid is missing".into()));
    }
    process::tame(8192)?;
    process::default_sigchld()?;
    let alone = process::single_thread()?;
    let policy = file::read(&arguments.policies, app).map_err(|error| Fatal(error.lines().join("\n")))?;
    let policy = Arc::new(policy.ok_or_else(|| Fatal(format!("there is no policy for app {app}")))?);
    let inventory = inventory::Inventory::open(&policy)?;
    let loader = loader::Loader::start(alone, &arguments.loader, arguments.user)?;
    let keep = needed(&policy);
    capabilities::keep_only(&keep, arguments.user)?;
    process::not_dumpable()?;
    let demand = match policy.require {
        Sandboxing::Full => files::Demand::Full,
        Sandboxing::Seccomp => files::Demand::Whatever,
    };
    let landlock_abi = files::restrict(&[], demand)?;
    // Late answers are for nobody: a broker that does not read them is lost.
    broker.set_timeouts(5, 0).step("setting deadlines")?;
    let seccomp_filters = syscalls::restrict(&seccomp::rows())?;
    self_test()?;
    let sandbox = Sandbox { landlock_abi, seccomp_filters, capabilities: capabilities::mask(&keep) };
    let ready = FromHelper::Ready { version: INNER_VERSION, policy: policy.digest, sandbox };
    broker.send(&ready, &[]).step("telling the broker")?;
    serve::run(broker, state::State::new(policy, inventory, loader, arguments.socket.clone()))
}

/// The confinement works: files are closed to us, bpf(2) is not.
fn self_test() -> Result<(), Fatal> {
    match std::fs::File::open("/proc/self/status") {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {}
        other => return Err(Fatal(format!("self-test: opening a file gave {other:?}"))),
    }
    match bpfgate_bpf::probe() {
        nix::errno::Errno::EBADF | nix::errno::Errno::EBADFD => Ok(()),
        other => Err(Fatal(format!("self-test: bpf(2) gave {other}"))),
    }
}
