//! Who a connected client is. Broker and helper read it from the client's own socket; nobody tells them.
//!
//! User and groups: `SO_PEERCRED` and `SO_PEERGROUPS`, as they were when the client connected. Unit: `SO_PEERPIDFD` is
//! the process that connected, whatever becomes of its pid; `PIDFD_GET_INFO` gives the id of its cgroup, which is
//! compared with the id of the cgroup that a unit of the policy has now. Nothing is opened for that.
#![forbid(unsafe_code)]

use crate::pidfd;
use crate::policy::{Policy, Unit, UnitCheck};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};
use nix::sys::stat::{FileStat, Mode, fstatat};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, fstatfs};
use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// A uid or gid that stands for "no such id here": it never matches a rule.
/// 65534 is what the kernel shows for ids that are not mapped into this user namespace (`overflowuid`), and
/// at the same time the account `nobody`, which unrelated services share.
pub const NEVER: [u32; 2] = [65534, u32::MAX];

/// A client as the kernel recorded it when it connected.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Peer {
    /// Effective uid.
    pub uid: u32,
    /// Effective gid.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// For the record only: pids are used again, so no decision rests on it. 0 for another pid namespace.
    pub pid: i32,
    /// Those units of the policy that it is in.
    pub units: BTreeSet<Unit>,
    /// Why that cannot be known, where the policy asks for it: a part of a sentence.
    pub no_unit: Option<&'static str>,
    /// For the record only: the system unit that it was in.
    pub unit: Option<String>,
    /// For the record only: the start of that unit that it belongs to.
    pub invocation: Option<String>,
}

impl Peer {
    /// Reads `SO_PEERCRED` and `SO_PEERGROUPS` of a connected Unix socket.
    pub fn of(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let credentials = getsockopt(&socket, sockopt::PeerCredentials)?;
        let groups = crate::channel::peer_groups(socket.as_fd())?;
        let (uid, gid, pid) = (credentials.uid(), credentials.gid(), credentials.pid());
        Ok(Self { uid, gid, groups, pid, ..Default::default() })
    }

    /// What a record says of a client that no policy has to know.
    pub fn for_record(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let mut peer = Self::of(socket)?;
        peer.note_unit(socket);
        Ok(peer)
    }

    /// Fills in what is for the record only. It reads /proc.
    pub fn note_unit(&mut self, socket: BorrowedFd<'_>) {
        let Some(name) = cgroup_of(self.pid).as_deref().and_then(unit_of) else { return };
        // Without a pidfd nobody knows whether this was still the process that connected.
        let Ok(pidfd) = getsockopt(&socket, sockopt::PeerPidfd) else { return };
        // systemd publishes the invocation of each unit as the target of a link that leads nowhere.
        let link = std::fs::read_link(format!("/run/systemd/units/invocation:{name}")).ok();
        if !has_ended(pidfd.as_fd()) {
            self.unit = Some(name);
            self.invocation = link
                .and_then(|link| link.into_os_string().into_string().ok())
                .filter(|id| id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit()));
        }
    }

    /// Whether this is the user `uid`.
    pub fn is_user(&self, uid: u32) -> bool {
        !NEVER.contains(&uid) && self.uid == uid
    }

    /// Whether it was in the group `gid` when it connected.
    pub fn is_in_group(&self, gid: u32) -> bool {
        !NEVER.contains(&gid) && (self.gid == gid || self.groups.contains(&gid))
    }

    /// Whether its process is in the unit's own cgroup.
    pub fn is_in_unit(&self, unit: &Unit) -> bool {
        self.units.contains(unit)
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "uid {} gid {}", self.uid, self.gid)?;
        if let Some(unit) = &self.unit {
            write!(f, " of {unit}")?;
        }
        match self.no_unit {
            Some(why) => write!(f, " (whose unit is not known: {why})"),
            None => Ok(()),
        }
    }
}

/// Who asks: what the broker finds out in /proc, the helper cannot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asker {
    /// It can read /proc.
    Broker,
    /// It can open nothing.
    Helper,
}

/// Finds out units. It is opened before the lock-down.
#[derive(Debug)]
pub struct Units {
    /// The root of cgroup v2, where the service manager has it.
    root: Option<OwnedFd>,
    asker: Asker,
}

impl Units {
    /// Where systemd mounts cgroup v2, alone or beside the older hierarchies. Without it no unit is known.
    pub fn open(asker: Asker) -> Self {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let is_v2 =
            |root: &OwnedFd| fstatfs(root).is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC);
        let open = |place: &str| open(place, flags, Mode::empty()).ok().filter(is_v2);
        Self { root: open("/sys/fs/cgroup").or_else(|| open("/sys/fs/cgroup/unified")), asker }
    }

    /// For a policy: nothing is opened where it asks for no unit.
    pub fn open_for(policy: &Policy, asker: Asker) -> Self {
        if policy.units().next().is_some() { Self::open(asker) } else { Self { root: None, asker } }
    }

    /// The client at the other end of a connected socket, with the units that `policy` asks for.
    pub fn identify(&self, socket: BorrowedFd<'_>, policy: &Policy) -> io::Result<Peer> {
        let mut peer = Peer::of(socket)?;
        let asked: BTreeSet<&Unit> = policy.units().collect();
        if !asked.is_empty() {
            match self.units(socket, &peer, &asked, policy.require.unit_check) {
                Ok(units) => peer.units = units,
                Err(why) => peer.no_unit = Some(why),
            }
        }
        Ok(peer)
    }

    fn units(
        &self,
        socket: BorrowedFd<'_>,
        peer: &Peer,
        asked: &BTreeSet<&Unit>,
        check: UnitCheck,
    ) -> Result<BTreeSet<Unit>, &'static str> {
        const ENDED: &str = "its process has ended";
        let pidfd = getsockopt(&socket, sockopt::PeerPidfd).map_err(|errno| match errno {
            Errno::ENOPROTOOPT => "this needs Linux 6.5",
            _ => ENDED,
        })?;
        let are =
            |is: &dyn Fn(&Unit) -> bool| asked.iter().filter(|unit| is(unit)).copied().cloned().collect();
        match pidfd::cgroup_id(pidfd.as_fd()) {
            Ok(id) => Ok(are(&|unit| self.cgroup_id(unit) == Some(id))),
            Err(Errno::ENOTTY) if check == UnitCheck::Helper => {
                Err("this needs Linux 6.13, or [require] unit_check = \"broker\" in the policy")
            }
            Err(Errno::ENOTTY) if self.asker == Asker::Helper => Ok(are(&|_| true)),
            Err(Errno::ENOTTY) => {
                let path = cgroup_of(peer.pid).ok_or("it is of another pid namespace, or has ended")?;
                if has_ended(pidfd.as_fd()) {
                    return Err(ENDED);
                }
                Ok(are(&|unit| unit.cgroup() == path))
            }
            Err(_) => Err(ENDED),
        }
    }

    /// The id of a unit's cgroup; none while it has no process.
    fn cgroup_id(&self, unit: &Unit) -> Option<u64> {
        self.cgroup(unit).map(|stat| stat.st_ino)
    }

    fn cgroup(&self, unit: &Unit) -> Option<FileStat> {
        fstatat(self.root.as_ref()?, unit.cgroup().as_str(), AtFlags::AT_SYMLINK_NOFOLLOW).ok()
    }

    /// Opens the cgroup of a unit, for somebody who cannot.
    pub fn open_cgroup(&self, unit: &Unit) -> Option<OwnedFd> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        openat(self.root.as_ref()?, unit.cgroup().as_str(), flags, Mode::empty()).ok()
    }

    /// Whether a descriptor that somebody opened for us is the cgroup that this unit has now.
    pub fn is_cgroup_of(&self, fd: BorrowedFd<'_>, unit: &Unit) -> bool {
        let place = |stat: FileStat| (stat.st_dev, stat.st_ino);
        let given = fstatat(fd, "", AtFlags::AT_EMPTY_PATH).ok().map(place);
        given.is_some() && given == self.cgroup(unit).map(place)
    }
}

/// The path of a process in cgroup v2, without its leading `/`.
pub fn cgroup_of(pid: i32) -> Option<String> {
    let all = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok().filter(|_| pid > 0)?;
    all.lines().find_map(|line| line.strip_prefix("0::/")).map(str::to_owned)
}

fn has_ended(pidfd: BorrowedFd<'_>) -> bool {
    poll(&mut [PollFd::new(pidfd, PollFlags::POLLIN)], PollTimeout::ZERO) != Ok(0)
}

/// The unit that a cgroup belongs to: the first part that is no slice. What a unit makes below itself is its own affair.
pub fn unit_of(path: &str) -> Option<String> {
    let unit = path.split('/').find(|part| part.rsplit_once('.').is_none_or(|(_, kind)| kind != "slice"))?;
    let unit = unit.strip_prefix('_').unwrap_or(unit);
    let fine = unit.len() <= 255 && unit.contains('.') && unit.bytes().all(|b| b.is_ascii_graphic());
    fine.then(|| unit.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::file::Accounts;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_peer_is_read_from_its_socket() {
        let (a, _b) = UnixStream::pair().unwrap();
        let peer = Peer::of(a.as_fd()).unwrap();
        assert_eq!(peer.uid, nix::unistd::geteuid().as_raw());
        assert_eq!(peer.pid, i32::try_from(std::process::id()).unwrap());
        let groups: Vec<u32> = nix::unistd::getgroups().unwrap().iter().map(|g| g.as_raw()).collect();
        assert_eq!(peer.groups, groups);
    }

    #[test]
    fn unmapped_ids_never_match() {
        let peer = Peer { uid: 65534, gid: u32::MAX, groups: vec![65534, 7], pid: 1, ..Default::default() };
        assert!(!peer.is_user(65534) && !peer.is_in_group(65534) && !peer.is_in_group(u32::MAX));
        assert!(peer.is_in_group(7));
    }

    #[test]
    fn what_is_no_connected_unix_socket_is_nobody() {
        assert!(Peer::of(std::fs::File::open("/dev/null").unwrap().as_fd()).is_err());
    }

    fn unit(name: &str, slice: Option<&str>) -> Unit {
        let name = name.parse().unwrap();
        let slice = slice.map_or_else(|| Unit::default_slice(&name), |slice| slice.parse().unwrap());
        Unit { name, slice }
    }

    /// As systemd 252 and 257 were seen to place them.
    #[test]
    fn a_unit_is_where_the_service_manager_puts_it() {
        for (name, slice, path) in [
            ("a.service", None, "system.slice/a.service"),
            ("a@b.service", None, "system.slice/system-a.slice/a@b.service"),
            ("a-b@c.service", None, r"system.slice/system-a\x2db.slice/a-b@c.service"),
            ("a.service", Some("web-front.slice"), "web.slice/web-front.slice/a.service"),
            ("a.service", Some("-.slice"), "a.service"),
            ("cpu.service", None, "system.slice/_cpu.service"),
            ("_x.service", None, "system.slice/__x.service"),
            ("cpux.service", None, "system.slice/cpux.service"),
        ] {
            assert_eq!(unit(name, slice).cgroup(), path);
        }
        for bad in [
            "a",
            ".service",
            "a.scope",
            "a@.service",
            "@b.service",
            "a/b.service",
            "a b.service",
            "a.service\n",
        ] {
            assert!(bad.parse::<crate::names::UnitName>().is_err(), "{bad:?}");
        }
        for bad in ["system", ".slice", "a--b.slice", "-a.slice", "a-.slice", "a@b.slice", "../a.slice"] {
            assert!(bad.parse::<crate::names::SliceName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_unit_in_the_record_is_the_first_part_that_is_no_slice() {
        for (path, name) in [
            ("system.slice/a.service", Some("a.service")),
            ("system.slice/a.service/payload/x.service", Some("a.service")),
            ("user.slice/user-1.slice/user@1.service/app.slice/evil.service", Some("user@1.service")),
            ("user.slice/user-1.slice/session-3.scope", Some("session-3.scope")),
            ("system.slice/_cpu.service", Some("cpu.service")),
            ("", None),
            ("docker/0123", None),
        ] {
            assert_eq!(unit_of(path).as_deref(), name, "{path}");
        }
    }

    fn policy(extra: &str) -> Policy {
        let text = format!("version = 1\n[[client]]\nunit = \"no-such.service\"\nmay = [\"load\"]\n{extra}");
        Policy::parse("p", &text, &Accounts::default()).unwrap()
    }

    /// This process is in no such unit, whoever looks; where the kernel cannot tell, that is said.
    #[test]
    fn who_is_in_another_unit_is_not_in_this_one() {
        let (a, _b) = UnixStream::pair().unwrap();
        for (asker, extra) in [
            (Asker::Helper, ""),
            (Asker::Broker, ""),
            (Asker::Broker, "[require]\nunit_check = \"broker\"\n"),
        ] {
            let peer = Units::open(asker).identify(a.as_fd(), &policy(extra)).unwrap();
            assert!(peer.units.is_empty(), "{peer:?}");
        }
        let none = Policy::parse("p", "version = 1\n", &Accounts::default()).unwrap();
        let peer = Units::open(Asker::Helper).identify(a.as_fd(), &none).unwrap();
        assert_eq!((peer.units.len(), peer.no_unit), (0, None));
    }
}
