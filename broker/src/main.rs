//! `bpfgate-broker`: takes requests of apps, checks them against their policies, and passes them to their helpers.
//!
//! It parses what strangers send, so it holds nothing: no capability, no file but policies, no kernel object. It keeps
//! nothing either: who is connected, and which helper runs. `run` below is the start-up, top to bottom.
//!
//! Distrusted: clients. Trusted to confine themselves, and checked: helpers.
#![forbid(unsafe_code)]

mod audit;
mod connection;
mod generation;
mod helpers;
mod reply;
mod seccomp;
mod server;
mod service;
mod standalone;
mod starter;

use crate::audit::Audit;
use crate::generation::Generations;
use crate::server::{Doors, Here, Parts, Server};
use crate::starter::Starter;
use bpfgate_lockdown::{Fatal, Step, capabilities, files, process, syscalls};
use bpfgate_protocol::identity::{Asker, Units};
use bpfgate_protocol::messages::helper::Sandbox;
use bpfgate_protocol::policy::{Machine, file};
use bpfgate_systemd::manager::Manager;
use clap::Parser;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::fstat;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

/// The broker of bpfgate: hands eBPF maps to apps that hold no capability.
#[derive(Parser, Debug)]
#[command(version, about)]
struct Arguments {
    /// Start with privilege, without systemd: for development, containers and the demo
    #[arg(long)]
    standalone: bool,
    /// Directory of policy files; earlier ones win [default: /etc/bpfgate/policies, /usr/lib/bpfgate/policies]
    #[arg(long, value_name = "DIRECTORY")]
    policies: Vec<PathBuf>,
    /// The socket for clients
    #[arg(long, value_name = "PATH", default_value = bpfgate_protocol::DEFAULT_SOCKET)]
    socket: PathBuf,
    /// The helper program [default: bpfgate-helper beside this program]
    #[arg(long, value_name = "PATH")]
    helper: Option<PathBuf>,
    /// The loader program [default: bpfgate-loader beside this program]
    #[arg(long, value_name = "PATH")]
    loader: Option<PathBuf>,
    /// Who to be after the start [default: user bpfgate, or uid 61183 if there is none]
    #[arg(long, value_name = "USER")]
    user: Option<String>,
    /// Connections of all clients at a time
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=65536))]
    max_connections: u32,
    /// Connections of one user at a time
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65536))]
    max_connections_per_user: u32,
    /// Where audit records go: a file, which is appended to, `journal`, or `-` for standard output
    /// [default: journal, with --standalone -]
    ///
    /// The file stays open: for logrotate say copytruncate.
    #[arg(long, value_name = "PATH", verbatim_doc_comment)]
    audit: Option<String>,
}

fn main() {
    log_lines();
    if let Err(fatal) = run(Arguments::parse()) {
        log::error!("{fatal}");
        std::process::exit(1);
    }
}

fn run(mut arguments: Arguments) -> Result<(), Fatal> {
    if arguments.policies.is_empty() {
        arguments.policies = file::DIRECTORIES.iter().map(PathBuf::from).collect();
    }
    // As many descriptors as there may be: those that clients have not read yet count too, and the limits on
    // connections are our own.
    process::tame(u64::MAX)?;
    fit(&mut arguments)?;
    let place = arguments.audit.as_deref().unwrap_or(if arguments.standalone { "-" } else { "journal" });
    only_append().step("standard output and error")?;
    let audit = Audit::open(&place.into())?;
    let generations = Generations::first(&arguments.policies).step("reading /etc/passwd and /etc/group")?;
    let (doors, starter, manager, user) = if arguments.standalone {
        let standalone::Started { listener, spawner, user } = standalone::start(&arguments)?;
        let starter = Starter::by_spawner(spawner).step("the spawner")?;
        (Doors { clients: listener, admin: None }, starter, Manager::none(), Some(user))
    } else {
        let service::Started { clients, admin, manager } = service::start()?;
        let starter = Starter::by_sockets(service::HELPERS.into());
        (Doors { clients, admin }, starter, manager, None)
    };
    capabilities::keep_only(&[], user)?;
    process::not_dumpable()?;
    capabilities::assert_none_in_any_thread()?;
    let below: Vec<&Path> =
        generations.directories().iter().map(PathBuf::as_path).filter(|path| path.is_dir()).collect();
    if below.is_empty() {
        log::warn!("none of the policy directories is there: every app is refused until a restart");
    }
    // Users and groups are read from /etc: a rule for the files themselves would be stale after the next useradd,
    // which replaces them. What an unprivileged user may read there is no secret.
    let mut allow: Vec<_> = below.iter().map(|path| files::Allow::Below(path)).collect();
    allow.push(files::Allow::Below(Path::new("/etc")));
    // The unit of a client, for the record; and, before Linux 6.13, for policies that leave it to the broker.
    allow.push(files::Allow::Below(Path::new("/proc")));
    let machine = Machine::here().step("what this kernel is")?;
    let units = Units::open(Asker::Broker);
    let landlock_abi = files::restrict(&allow, files::Demand::Full)?;
    let hangups = hangups().step("waiting for SIGHUP")?;
    let uid = nix::unistd::geteuid();
    let seccomp_filters = syscalls::restrict(&seccomp::rows(!arguments.standalone))?;
    let sandbox = Sandbox { landlock_abi, seccomp_filters, capabilities: 0 };
    log::info!("uid {uid}, no capability, landlock ABI {landlock_abi}, {seccomp_filters} seccomp filters");
    let here = Here { sandbox, machine, units };
    let parts = Parts { doors, generations, hangups, starter, manager, audit, here };
    Server::new(&arguments, parts).step("starting to serve")?.run()
}

/// Where standard output and error are files, what stands there stays: records and lines of the log are added at their end,
/// wherever in the file whoever has taken over this process or a loader wants to write.
fn only_append() -> nix::Result<()> {
    for fd in [std::io::stdout().as_fd(), std::io::stderr().as_fd()] {
        let is_file = fstat(fd).is_ok_and(|there| there.st_mode & libc::S_IFMT == libc::S_IFREG);
        if is_file {
            let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
            fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_APPEND))?;
        }
    }
    Ok(())
}

/// Descriptors beside those of connections: channels to helpers, what is on its way to clients, files of policies.
const OTHERS: u32 = 64;

/// Takes no more connections than there are descriptors for, and none of their users all of them. Without one left nobody
/// could be let in, and the loop would try again and again.
fn fit(arguments: &mut Arguments) -> Result<(), Fatal> {
    let (files, _) = getrlimit(Resource::RLIMIT_NOFILE).step("reading RLIMIT_NOFILE")?;
    let files = u32::try_from(files).unwrap_or(u32::MAX);
    let most = files.saturating_sub(OTHERS);
    if most < OTHERS {
        let least = 2 * OTHERS;
        return Err(Fatal(format!("RLIMIT_NOFILE is {files}: a broker needs {least} descriptors at least")));
    }
    if arguments.max_connections > most {
        log::warn!(
            "RLIMIT_NOFILE is {files}: descriptors for {most} connections, not {}",
            arguments.max_connections
        );
        arguments.max_connections = most;
        arguments.max_connections_per_user = arguments.max_connections_per_user.min(most / 8);
    }
    Ok(())
}

/// SIGHUP as something to read: it says that the policies are to be read again. After the start of children, which would
/// inherit that it is blocked.
fn hangups() -> nix::Result<SignalFd> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGHUP);
    signals.thread_block()?;
    SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
}

/// Under a service manager lines begin with their priority, and the journal knows the time.
fn log_lines() {
    use std::io::Write;
    let mut builder = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"));
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        builder.format(|out, record| {
            let priority = match record.level() {
                log::Level::Error => 3,
                log::Level::Warn => 4,
                log::Level::Info => 6,
                log::Level::Debug | log::Level::Trace => 7,
            };
            record.args().to_string().lines().try_for_each(|line| writeln!(out, "<{priority}>{line}"))
        });
    }
    builder.init();
}
