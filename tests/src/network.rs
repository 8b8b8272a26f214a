//! Two network namespaces with a veth pair between them: the broker's, and the one that packets come from.

use crate::process;
use crate::user::in_network;
use std::io::{BufRead, BufReader};
use std::net::UdpSocket;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// The interface on the broker's side.
pub const INTERFACE: &str = "gate0";
/// Its other end.
const PEER_INTERFACE: &str = "gate1";
const ADDRESS: &str = "192.0.2.1"; // TEST-NET-1, RFC 5737
const PEER_ADDRESS: &str = "192.0.2.2";

/// Namespaces end with the processes that hold them; these end by themselves at the latest, in seconds.
const HOLD: &str = "3600";

/// The namespaces, for as long as this lives.
pub struct Network {
    /// The inode of the broker's network namespace: whoever is in it belongs to this test.
    pub id: u64,
    /// None: the namespace of this process, in a machine of the tests' own.
    holder: Option<Child>,
    peer: Child,
    /// Sockets on the other side and on the broker's side.
    senders: [UdpSocket; 2],
}

impl Network {
    /// Makes both namespaces and what connects them.
    pub fn new() -> Self {
        Self::between(Some(hold()))
    }

    /// Connects this process's namespace with a new one. Nothing but what a test sends comes in: no neighbour is asked
    /// for, and nothing is announced.
    pub fn from_here() -> Self {
        Self::between(None)
    }

    fn between(holder: Option<Child>) -> Self {
        let peer = hold();
        let here = holder.as_ref().map_or_else(std::process::id, Child::id);
        connect(here, peer.id(), holder.is_none());
        let sender = |pid| in_network(pid, || UdpSocket::bind("0.0.0.0:0").expect("a socket"));
        let senders = [sender(peer.id()), sender(here)];
        let id = process::network(here.cast_signed()).expect("the holder runs");
        Self { id, holder, peer, senders }
    }

    /// A process in the broker's namespaces.
    pub fn holder(&self) -> u32 {
        self.holder.as_ref().map_or_else(std::process::id, Child::id)
    }

    /// A socket on the other side, and where to send to.
    pub fn sender(&self) -> (UdpSocket, &'static str) {
        (self.senders[0].try_clone().expect("a descriptor"), ADDRESS)
    }

    /// A command in the broker's namespaces, as root.
    pub fn inside(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new("nsenter");
        let namespace = |kind: &str| format!("/proc/{}/ns/{kind}", self.holder());
        command.arg(format!("--net={}", namespace("net"))).arg(format!("--mount={}", namespace("mnt")));
        command.arg("--").arg(program.as_ref());
        command
    }

    /// Sends packets to the interface, from the other side.
    pub fn send_to_interface(&self, count: usize) {
        send(&self.senders[0], ADDRESS, count);
    }

    /// Sends packets over the loopback interface on the broker's side.
    pub fn send_over_loopback(&self, count: usize) {
        send(&self.senders[1], "127.0.0.1", count);
    }
}

impl Default for Network {
    fn default() -> Self {
        Self::new()
    }
}

/// Starts a process with network and mount namespaces of its own; tracefs is mounted there.
fn hold() -> Child {
    let script = format!(
        "test -e /sys/kernel/tracing/events || mount -t tracefs tracefs /sys/kernel/tracing; echo ready; exec sleep {HOLD}"
    );
    let mut command = Command::new("unshare");
    command.args(["--net", "--mount", "--propagation", "private", "--", "sh", "-c", &script]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("unshare is there");
    let mut line = String::new();
    let out = child.stdout.take().expect("a pipe");
    BufReader::new(out).read_line(&mut line).expect("the holder speaks");
    assert_eq!(line, "ready\n");
    child
}

fn connect(holder: u32, peer: u32, quiet: bool) {
    let ip = |pid: u32, line: &str| {
        let mut command = Command::new("nsenter");
        let command = command.arg(format!("--net=/proc/{pid}/ns/net")).args(["--", "ip"]);
        let output = command.args(line.split(' ')).output().expect("nsenter and ip are there");
        assert!(output.status.success(), "ip {line}: {}", String::from_utf8_lossy(&output.stderr));
    };
    ip(holder, &format!("link add {INTERFACE} type veth peer name {PEER_INTERFACE} netns {peer}"));
    ip(holder, "link set lo up");
    if quiet {
        for (pid, interface) in [(holder, INTERFACE), (peer, PEER_INTERFACE)] {
            ip(pid, &format!("link set {interface} addrgenmode none"));
            ip(pid, &format!("link set {interface} arp off"));
        }
    }
    ip(holder, &format!("address add {ADDRESS}/24 dev {INTERFACE}"));
    ip(holder, &format!("link set {INTERFACE} up"));
    ip(peer, &format!("address add {PEER_ADDRESS}/24 dev {PEER_INTERFACE}"));
    ip(peer, &format!("link set {PEER_INTERFACE} up"));
}

fn send(from: &UdpSocket, to: &str, count: usize) {
    for _ in 0..count {
        // Nobody listens on the port for discarding, and says so by ICMP: that is no error of ours.
        let _ = from.send_to(b"packet", (to, 9));
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if self.holder.is_none() {
            let _ = Command::new("ip").args(["link", "del", INTERFACE]).status();
        }
        for holder in self.holder.iter_mut().chain([&mut self.peer]) {
            let _ = holder.kill();
            let _ = holder.wait();
        }
    }
}
