//! Who a connected client is. Broker and helper read it from the client's own socket; nobody tells them.
#![forbid(unsafe_code)]

use nix::sys::socket::{getsockopt, sockopt};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

/// A uid or gid that stands for "no such id here": it never matches a rule.
/// 65534 is what the kernel shows for ids that are not mapped into this user namespace (`overflowuid`), and
/// at the same time the account `nobody`, which unrelated services share.
pub const NEVER: [u32; 2] = [65534, u32::MAX];

/// A client as the kernel recorded it when it connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Effective uid.
    pub uid: u32,
    /// Effective gid.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// For the record only: pids are used again, so no decision rests on it. 0 for another pid namespace.
    pub pid: i32,
}

impl Peer {
    /// Reads `SO_PEERCRED` and `SO_PEERGROUPS` of a connected Unix socket.
    pub fn of(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let credentials = getsockopt(&socket, sockopt::PeerCredentials)?;
        let mut peer = Self {
            uid: credentials.uid(),
            gid: credentials.gid(),
            groups: Vec::new(),
            pid: credentials.pid(),
        };
        peer.groups = crate::channel::peer_groups(socket.as_fd())?;
        Ok(peer)
    }

    /// Whether this is the user `uid`.
    pub fn is_user(&self, uid: u32) -> bool {
        !NEVER.contains(&uid) && self.uid == uid
    }

    /// Whether it was in the group `gid` when it connected.
    pub fn is_in_group(&self, gid: u32) -> bool {
        !NEVER.contains(&gid) && (self.gid == gid || self.groups.contains(&gid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
        let peer = Peer { uid: 65534, gid: u32::MAX, groups: vec![65534, 7], pid: 1 };
        assert!(!peer.is_user(65534) && !peer.is_in_group(65534) && !peer.is_in_group(u32::MAX));
        assert!(peer.is_in_group(7));
    }

    #[test]
    fn what_is_no_connected_unix_socket_is_nobody() {
        assert!(Peer::of(std::fs::File::open("/dev/null").unwrap().as_fd()).is_err());
    }
}
