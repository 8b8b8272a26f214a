//! The service manager, as a process that it started sees it.
//!
//! From it, in the environment: sockets that it listens on for us and descriptors that it keeps for us, each with a name
//! (sd_listen_fds(3)). To it, over one datagram socket: that we are ready, that we are alive, and descriptors to keep
//! (sd_notify(3), sd_pid_notify_with_fds(3)).
//!
//! The socket is connected once, before the lock-down: after it a process of ours can make no other.

use bpfgate_lockdown::{Fatal, Step};
use bpfgate_protocol::channel::inherited_fd;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg, setsockopt,
    socket, sockopt,
};
use nix::sys::time::{TimeSpec, TimeVal, TimeValLike};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

/// The first descriptor that a service manager hands over (`SD_LISTEN_FDS_START`).
const FIRST_FD: RawFd = 3;

/// How long the service manager may take for what we wait for, in seconds.
const PATIENCE: i64 = 5;

/// A descriptor with the name that the service manager has for it.
#[derive(Debug)]
pub struct Named {
    /// `FileDescriptorName=` of a socket unit, or what it was kept under.
    pub name: String,
    /// The descriptor.
    pub fd: OwnedFd,
}

/// The way to the service manager.
#[derive(Debug)]
pub struct Manager {
    /// None: nobody listens. Everything that would be said is for nobody, and nothing is kept.
    socket: Option<OwnedFd>,
    /// How often to say that we are alive: half of what the manager waits.
    every: Option<Duration>,
    next: Option<Instant>,
}

impl Manager {
    /// Nobody.
    pub fn none() -> Self {
        Self { socket: None, every: None, next: None }
    }

    /// Reads `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `LISTEN_FDS`, and takes the descriptors. Once, first thing in `main`.
    pub fn from_environment() -> Result<(Self, Vec<Named>), Fatal> {
        let variable = |name: &str| std::env::var(name).ok();
        let own = |name: &str| variable(name).is_none_or(|pid| pid == std::process::id().to_string());
        let socket = variable("NOTIFY_SOCKET").map(|address| connected(&address)).transpose()?;
        let watchdog = variable("WATCHDOG_USEC").filter(|_| own("WATCHDOG_PID"));
        let every = watchdog.map(|usec| usec.parse().map(|usec: u64| Duration::from_micros(usec / 2)));
        let every = every.transpose().step("WATCHDOG_USEC")?;
        let mut all = Vec::new();
        if let Some(count) = variable("LISTEN_FDS").filter(|_| own("LISTEN_PID")) {
            let count: RawFd = count.parse().step("LISTEN_FDS")?;
            let names = variable("LISTEN_FDNAMES").unwrap_or_default();
            let mut names = names.split(':');
            for number in FIRST_FD..FIRST_FD + count {
                let fd = inherited_fd(number).step("a descriptor of LISTEN_FDS")?;
                all.push(Named { name: names.next().unwrap_or_default().to_owned(), fd });
            }
        }
        Ok((Self { socket, every, next: every.map(|_| Instant::now()) }, all))
    }

    /// Whether somebody listens.
    pub fn is_there(&self) -> bool {
        self.socket.is_some()
    }

    /// The service is ready, and what it is doing.
    pub fn ready(&self, status: &str) -> io::Result<()> {
        self.send(&format!("READY=1\nSTATUS={status}"), &[])
    }

    /// When to call [`Manager::beat`] next.
    pub fn next_beat(&self) -> Option<Instant> {
        self.next
    }

    /// Says that we are alive, if it is time to.
    pub fn beat(&mut self, now: Instant) -> io::Result<()> {
        if let (Some(next), Some(every)) = (self.next, self.every)
            && next <= now
        {
            self.next = Some(now + every);
            return match self.send_with("WATCHDOG=1", &[], MsgFlags::MSG_DONTWAIT) {
                // It has not read what we said before: it cannot think that we are dead.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
                sent => sent,
            };
        }
        Ok(())
    }

    /// Has a descriptor kept: the service gets it back, under this name, when it is started again after a crash or by
    /// `systemctl restart`. `FDPOLL=0`, because a map that is polled says EPOLLERR, and what says so is dropped.
    pub fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.send(&format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}"), &[fd])
    }

    /// Everything that is kept under this name is closed there, soon: [`Manager::settle`] waits for it.
    pub fn forget(&self, name: &str) -> io::Result<()> {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[])
    }

    /// Waits until everything that was said before has been done: the manager closes a pipe of ours.
    pub fn settle(&self) -> io::Result<()> {
        if !self.is_there() {
            return Ok(());
        }
        let (ours, theirs) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        self.send("BARRIER=1", &[theirs.as_fd()])?;
        drop(theirs);
        let mut closed = [PollFd::new(ours.as_fd(), PollFlags::empty())];
        loop {
            match ppoll(&mut closed, Some(TimeSpec::new(PATIENCE, 0)), None) {
                Ok(0) => return Err(io::Error::other("the service manager is too busy")),
                Ok(_) => return Ok(()),
                Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn send(&self, text: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send_with(text, fds, MsgFlags::empty())
    }

    fn send_with(&self, text: &str, fds: &[BorrowedFd<'_>], flags: MsgFlags) -> io::Result<()> {
        let Some(socket) = &self.socket else { return Ok(()) };
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let rights = if raw.is_empty() { &rights[..0] } else { &rights[..] };
        loop {
            let text = [IoSlice::new(text.as_bytes())];
            match sendmsg::<()>(socket.as_raw_fd(), &text, rights, MsgFlags::MSG_NOSIGNAL | flags, None) {
                Ok(_) => return Ok(()),
                Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

fn connected(address: &str) -> Result<OwnedFd, Fatal> {
    let name = match address.as_bytes() {
        [b'@', name @ ..] => UnixAddr::new_abstract(name),
        [b'/', ..] => UnixAddr::new(address),
        _ => return Err(Fatal(format!("NOTIFY_SOCKET is {address}, which is no Unix socket"))),
    };
    let name = name.step("NOTIFY_SOCKET")?;
    let fd =
        socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).step("a socket")?;
    connect(fd.as_raw_fd(), &name).step("connecting to the service manager")?;
    setsockopt(&fd, sockopt::SendTimeout, &TimeVal::seconds(PATIENCE)).step("setting deadlines")?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bpfgate_protocol::channel::receive;
    use std::os::unix::net::UnixDatagram;

    /// A manager whose other end is ours.
    fn pair() -> (Manager, UnixDatagram) {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        (Manager { socket: Some(ours.into()), every: None, next: None }, theirs)
    }

    fn heard(socket: &UnixDatagram) -> (String, usize) {
        let mut buffer = [0; 256];
        let got = receive(socket.as_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT).unwrap();
        (String::from_utf8_lossy(&buffer[..got.len]).into_owned(), got.fds.len())
    }

    #[test]
    fn what_is_kept_is_kept_without_being_polled() {
        let (manager, socket) = pair();
        let null = std::fs::File::open("/dev/null").unwrap();
        manager.keep("map-1-0", null.as_fd()).unwrap();
        assert_eq!(heard(&socket), ("FDSTORE=1\nFDPOLL=0\nFDNAME=map-1-0".into(), 1));
        manager.forget("map-1-0").unwrap();
        assert_eq!(heard(&socket), ("FDSTOREREMOVE=1\nFDNAME=map-1-0".into(), 0));
        manager.ready("serving").unwrap();
        assert_eq!(heard(&socket), ("READY=1\nSTATUS=serving".into(), 0));
    }

    #[test]
    fn it_is_settled_when_the_manager_closes_the_pipe() {
        let (manager, socket) = pair();
        let answers = std::thread::spawn(move || {
            let mut buffer = [0; 64];
            let got = receive(socket.as_fd(), &mut buffer, MsgFlags::empty()).unwrap();
            (buffer[..got.len].to_vec(), got.fds.len())
        });
        manager.settle().unwrap();
        assert_eq!(answers.join().unwrap(), (b"BARRIER=1".to_vec(), 1));
    }

    #[test]
    fn it_beats_as_often_as_is_wanted() {
        let (mut manager, socket) = pair();
        let start = Instant::now();
        let second = Duration::from_secs(1);
        (manager.every, manager.next) = (Some(second), Some(start));
        manager.beat(start).unwrap();
        assert_eq!(heard(&socket).0, "WATCHDOG=1");
        manager.beat(start + second / 2).unwrap();
        assert!(receive(socket.as_fd(), &mut [0; 8], MsgFlags::MSG_DONTWAIT).is_err());
        assert_eq!(manager.next_beat(), Some(start + second));
    }

    #[test]
    fn where_nobody_listens_nothing_is_said() {
        let manager = Manager::none();
        assert!(!manager.is_there());
        manager.ready("serving").unwrap();
        manager.settle().unwrap();
        assert!(connected("vsock:2:1").is_err());
    }
}
