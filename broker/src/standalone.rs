//! The start without systemd: everything that needs privilege, done before it is given up.

use crate::Arguments;
use bpfgate_lockdown::capabilities::User;
use bpfgate_lockdown::{Fatal, Step, process, spawn};
use bpfgate_protocol::channel::{Channel, refuse_descriptors};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, connect, socket};
use nix::sys::stat::{Mode, umask};
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Who the broker is if there is no user of its name: just below the range that the spawner gives to helpers.
const FALLBACK_UID: u32 = 61_183;

pub(crate) struct Started {
    /// Bound, not listening yet.
    pub(crate) listener: OwnedFd,
    pub(crate) spawner: Channel,
    pub(crate) user: User,
}

pub(crate) fn start(arguments: &Arguments) -> Result<Started, Fatal> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Fatal("--standalone starts with privilege, to start helpers: run it as root".into()));
    }
    let user = user(arguments.user.as_deref())?;
    let listener = bound(&arguments.socket)?;
    let spawner = spawner(arguments)?;
    Ok(Started { listener, spawner, user })
}

fn user(name: Option<&str>) -> Result<User, Fatal> {
    let accounts = std::fs::read_to_string("/etc/passwd").step("reading /etc/passwd")?;
    let account = |wanted: &str| {
        accounts.lines().find_map(|line| {
            let mut fields = line.split(':');
            let (name, _, uid, gid) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
            (name == wanted).then_some(User { uid: uid.parse().ok()?, gid: gid.parse().ok()? })
        })
    };
    match name {
        None => Ok(account("bpfgate").unwrap_or(User::unnamed(FALLBACK_UID))),
        Some(name) => match account(name) {
            Some(user) if user.uid != 0 && user.gid != 0 => Ok(user),
            Some(_) => Err(Fatal("the broker must not be root: choose another --user".into())),
            None => Err(Fatal(format!("there is no user {name}"))),
        },
    }
}

/// Binds the socket. A socket that somebody listens on is not taken away; a stale one is.
fn bound(path: &Path) -> Result<OwnedFd, Fatal> {
    let step = |what: &str| format!("{what} {}", path.display());
    if let Some(directory) = path.parent().filter(|directory| !directory.exists()) {
        std::fs::DirBuilder::new().recursive(true).create(directory).step(&step("the directory of"))?;
        // Everybody may reach the socket; who may do what is for the policies.
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(directory, mode).step(&step("the directory of"))?;
    }
    refuse_place(path)?;
    let address = UnixAddr::new(path).step(&step("the socket"))?;
    let new = || {
        socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)
    };
    let probe = new().step("a socket")?;
    match connect(probe.as_raw_fd(), &address) {
        Err(nix::errno::Errno::ENOENT) => {}
        Err(nix::errno::Errno::ECONNREFUSED) => {
            std::fs::remove_file(path).step(&step("removing the stale"))?;
        }
        _ => return Err(Fatal(format!("another broker listens on {}", path.display()))),
    }
    let listener = new().step("a socket")?;
    // Everybody may connect. By umask, not by chmod: what stands at the path by then could be another file.
    let old = umask(Mode::from_bits_truncate(0o111));
    let bound = bind(listener.as_raw_fd(), &address);
    umask(old);
    bound.step(&step("binding"))?;
    if !refuse_descriptors(listener.as_fd()) {
        log::info!(
            "this kernel (before 6.16) cannot keep clients from sending descriptors; they are closed on arrival"
        );
    }
    Ok(listener)
}

/// What connect(2) says of a file is what it says of a stale socket: looked at first, nothing but a socket is taken away.
/// Nor is the socket where everybody could put another one in its place.
fn refuse_place(path: &Path) -> Result<(), Fatal> {
    if path.symlink_metadata().is_ok_and(|there| !there.file_type().is_socket()) {
        let why = "is there and is no socket: remove it, or choose another --socket";
        return Err(Fatal(format!("{} {why}", path.display())));
    }
    let directory = path.parent().filter(|directory| !directory.as_os_str().is_empty());
    let mode = std::fs::metadata(directory.unwrap_or(Path::new("."))).map_or(0, |there| there.mode());
    // In a sticky directory nobody takes away what is another's.
    if mode & 0o1002 == 0o002 {
        return Err(Fatal(format!(
            "everybody may write the directory of {} (mode {:04o}), and so take the place of the broker: chmod o-w, or choose another --socket",
            path.display(),
            mode & 0o7777
        )));
    }
    Ok(())
}

fn spawner(arguments: &Arguments) -> Result<Channel, Fatal> {
    let beside = |name: &str| -> Result<PathBuf, Fatal> {
        let own = std::env::current_exe().step("finding this program")?;
        Ok(own.with_file_name(name))
    };
    let helper = arguments.helper.clone().map_or_else(|| beside("bpfgate-helper"), Ok)?;
    let loader = arguments.loader.clone().map_or_else(|| beside("bpfgate-loader"), Ok)?;
    let exe = spawn::open_program(&helper)?;
    // Opened here to say now, not at the first request, that it is missing.
    drop(spawn::open_program(&loader)?);
    let mut argv = vec!["bpfgate-helper".to_owned(), "--spawner".to_owned()];
    for directory in &arguments.policies {
        argv.extend(["--policies".to_owned(), directory.display().to_string()]);
    }
    argv.extend(["--loader".to_owned(), loader.display().to_string()]);
    argv.extend(["--socket".to_owned(), arguments.socket.display().to_string()]);
    let argv: Vec<CString> =
        argv.into_iter().map(CString::new).collect::<Result<_, _>>().step("the command line")?;
    let (ours, theirs) = Channel::pair().step("the spawner's channel")?;
    spawn::program(process::single_thread()?, exe.as_fd(), &argv, &[theirs.as_fd()], || Ok(()))?;
    Ok(ours)
}
