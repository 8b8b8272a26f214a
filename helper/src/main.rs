//! `bpfgate-helper APP`: the one process of an app that holds capabilities. It parses one root-owned policy file,
//! opens what that names, looks up the functions of the kernel that it names ([`functions`]), locks itself down, and from
//! then on takes typed, bounded messages only; and, when it is changed, that file again ([`adopt`]).
//!
//! `run_helper` below is the start-up, top to bottom; every step fails closed. Under systemd it is started when the
//! broker knocks, and what it is to keep outlives it ([`store`]). `bpfgate-helper --spawner` is PID 1's stand-in where
//! there is no systemd ([`spawner`]).
//!
//! Distrusted: the broker (it may be taken over: [`serve`]), the loader (an object may have taken it over:
//! [`loading`]), the clients. Trusted: the kernel, root's policy file, the process that started this one.

mod adopt;
mod attach;
mod boot;
mod entrance;
mod functions;
mod inventory;
mod judge;
mod loader;
mod loading;
mod maps;
mod pace;
mod prepare;
mod restore;
mod rounds;
mod seccomp;
mod serve;
mod spawner;
mod state;
mod store;

use crate::boot::Boot;
use crate::entrance::Entrance;
use crate::inventory::{Inventory, Prepared};
use crate::rounds::Rounds;
use crate::state::State;
use crate::store::Store;
use bpfgate_lockdown::capabilities::User;
use bpfgate_lockdown::{Fatal, Step, capabilities, files, process, syscalls};
use bpfgate_protocol::channel::Channel;
use bpfgate_protocol::messages::helper::{FromHelper, Sandbox};
use bpfgate_protocol::names::AppName;
use bpfgate_protocol::policy::{Keep, Machine, Policy, Sandboxing, file, needed};
use bpfgate_protocol::{DEFAULT_SOCKET, INNER_VERSION};
use bpfgate_systemd::manager::{Manager, Named};
use std::path::PathBuf;
use std::sync::Arc;

/// The command line; the processes that start this one write it.
#[derive(Default)]
struct Arguments {
    /// None: be the spawner.
    app: Option<AppName>,
    /// Started by systemd, on a socket unit.
    service: bool,
    /// Root's step before that: open, hand over, end.
    prepare: bool,
    policies: Vec<PathBuf>,
    loader: PathBuf,
    /// The socket that clients come through.
    socket: PathBuf,
    /// Who to be, if started by root.
    user: Option<User>,
}

/// `EX_CONFIG` of sysexits.h: to start again would not help, somebody has to change something first.
const UNFIT: i32 = 78;

/// The same, where a failed unit would take what is attached with it.
const LATER: i32 = 1;

/// Who speaks to a helper under systemd.
const BROKER: &str = "bpfgate";

fn main() {
    let mut status = 1;
    let result = arguments().and_then(|arguments| match &arguments.app {
        Some(app) if arguments.prepare => prepare::run(app, &arguments),
        Some(app) => run_helper(app, &arguments, &mut status),
        None => spawner::run(&arguments),
    });
    if let Err(fatal) = &result {
        eprintln!("bpfgate-helper: {fatal}");
    }
    // At once: what the Rust library would do before needs more system calls than are left.
    process::exit_now(if result.is_err() { status } else { 0 })
}

fn arguments() -> Result<Arguments, Fatal> {
    let usage = || {
        let lines = [
            "usage: bpfgate-helper APP|--spawner [--policies DIRECTORY]... --loader PATH [--socket PATH] [--uid N]",
            "       bpfgate-helper APP --service --loader PATH     (started by systemd)",
            "       bpfgate-helper APP --prepare                   (root's step before that)",
        ];
        Fatal(lines.join("\n"))
    };
    let mut args = std::env::args().skip(1);
    let app = match args.next().ok_or_else(usage)?.as_str() {
        "--spawner" => None,
        name => Some(name.parse().step("the name of the app")?),
    };
    let mut parsed = Arguments { app, socket: DEFAULT_SOCKET.into(), ..Default::default() };
    while let Some(key) = args.next() {
        let mut value = || args.next().ok_or_else(usage);
        match key.as_str() {
            "--service" => parsed.service = true,
            "--prepare" => parsed.prepare = true,
            "--policies" => parsed.policies.push(value()?.into()),
            "--loader" => parsed.loader = value()?.into(),
            "--socket" => parsed.socket = value()?.into(),
            "--uid" => parsed.user = Some(User::unnamed(value()?.parse().step("--uid")?)),
            _ => return Err(usage()),
        }
    }
    if parsed.policies.is_empty() {
        parsed.policies = file::DIRECTORIES.iter().map(PathBuf::from).collect();
    }
    if parsed.loader.as_os_str().is_empty() && !parsed.prepare { Err(usage()) } else { Ok(parsed) }
}

/// The policy of an app.
fn policy(app: &AppName, arguments: &Arguments) -> Result<Policy, Fatal> {
    let policy = file::read(&arguments.policies, app).map_err(|error| Fatal(error.lines().join("\n")))?;
    policy.ok_or_else(|| Fatal(format!("there is no policy for app {app}")))
}

/// Where requests come from, who keeps descriptors, and those that were kept.
fn begin(arguments: &Arguments) -> Result<(Entrance, Manager, Vec<Named>), Fatal> {
    if !arguments.service {
        let broker = Channel::inherited(3).step("descriptor 3 is not the broker's channel")?;
        return Ok((Entrance::Channel(broker), Manager::none(), Vec::new()));
    }
    let (manager, mut named) = Manager::from_environment()?;
    // What is kept for us has names too, and none of it listens.
    let listens =
        |fd| nix::sys::socket::getsockopt(fd, nix::sys::socket::sockopt::AcceptConn).unwrap_or(false);
    let door = named.iter().position(|named| named.name == "broker" && listens(&named.fd));
    let door =
        door.ok_or_else(|| Fatal("no socket came with --service: a socket unit has to start this".into()))?;
    let listener = named.swap_remove(door).fd;
    let accounts = file::Accounts::read().step("reading /etc/passwd")?;
    let broker_uid = accounts.users.get(BROKER).copied();
    let broker_uid =
        broker_uid.ok_or_else(|| Fatal(format!("there is no user {BROKER}, who is the broker")))?;
    Ok((Entrance::Door { listener, broker_uid, broker: None }, manager, named))
}

fn run_helper(app: &AppName, arguments: &Arguments, status: &mut i32) -> Result<(), Fatal> {
    let (entrance, manager, named) = begin(arguments)?;
    let started = start(app, arguments, status, &entrance, manager, named);
    match started {
        Ok((ready, state, rounds)) => serve::run(entrance, &ready, state, rounds),
        Err(fatal) => {
            entrance.turn_away();
            if arguments.service && *status == LATER {
                // Not so fast that the starts count as too many. ppoll, because sleeping has no place in the list.
                let second = nix::sys::time::TimeSpec::new(1, 0);
                let _ = nix::poll::ppoll(&mut [], Some(second), None);
                entrance.turn_away();
            }
            Err(fatal)
        }
    }
}

fn start(
    app: &AppName,
    arguments: &Arguments,
    status: &mut i32,
    entrance: &Entrance,
    manager: Manager,
    named: Vec<Named>,
) -> Result<(FromHelper, State, Rounds), Fatal> {
    if nix::unistd::geteuid().is_root() && arguments.user.is_none_or(|user| user.uid == 0) {
        return Err(Fatal("a helper is no root process: --uid is missing".into()));
    }
    process::tame(8192)?;
    process::default_sigchld()?;
    let alone = process::single_thread()?;
    process::clear_environment(alone)?;
    // With things that are kept, a policy that cannot be read just now must not cost them: again, in a moment.
    let holds = named.iter().any(|named| named.name.starts_with(store::RECORD));
    let unfit = if holds { LATER } else { UNFIT };
    *status = unfit;
    let policy = Arc::new(policy(app, arguments)?);
    let keep = needed(&policy);
    if arguments.service {
        compare_grant(capabilities::mask(&keep))?;
    }
    *status = LATER;
    let (prepared, kept) = Prepared::of(named);
    let inventory = Inventory::open(&policy, prepared)?;
    let machine = Machine::here().step("what this kernel is")?;
    let kept = restore::sort(kept);
    let loader = loader::Loader::start(alone, &arguments.loader, arguments.user)?;
    capabilities::keep_only(&keep, arguments.user)?;
    process::not_dumpable()?;
    let demand = match policy.require.sandbox {
        Sandboxing::Full => files::Demand::Full,
        Sandboxing::Seccomp => files::Demand::Whatever,
    };
    let landlock_abi = files::restrict(&[], demand)?;
    if let Some(why) = policy.require.missing(machine, landlock_abi) {
        *status = unfit;
        return Err(Fatal(format!("{}: {why}", policy.at(policy.require.line))));
    }
    entrance.prepare()?;
    let mut rounds = Rounds::new((policy.keep == Keep::Boot).then(Boot::default), !arguments.service);
    let seccomp_filters = syscalls::restrict(&seccomp::rows(arguments.service))?;
    self_test()?;
    let sandbox = Sandbox { landlock_abi, seccomp_filters, capabilities: capabilities::mask(&keep) };
    let ready = FromHelper::Ready { version: INNER_VERSION, policy: policy.digest, sandbox };
    let store = Store::new(manager);
    let (directories, socket) = (&arguments.policies, arguments.socket.clone());
    let mut state = State::new(app, directories, policy, inventory, loader, socket, store);
    restore::restore(&mut state, kept)?;
    rounds.begin(&mut state);
    state.say_ready()?;
    entrance.begin(&ready)?;
    Ok((ready, state, rounds))
}

/// The unit grants just what the policy needs: more was never meant, less cannot work.
fn compare_grant(needed: u64) -> Result<(), Fatal> {
    let (permitted, bounding) = capabilities::granted()?;
    if permitted == needed && bounding == needed {
        return Ok(());
    }
    Err(Fatal(format!(
        "the unit grants capabilities {permitted:x} (bounding set {bounding:x}) where the policy needs {needed:x}: \
         `bpfgate policy apply` writes the unit anew"
    )))
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
