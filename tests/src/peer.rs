//! A broker that lies: it speaks to a real helper in its real confinement.

use crate::gate::{Gate, bin_dir};
use crate::invariants::Baseline;
use crate::rogue::{self, Ambush, Loader};
use crate::sys;
use crate::user::{USER, Who, as_user};
use crate::{SOON, wait_until};
use bpfgate_protocol::channel::{Channel, ChannelError};
use bpfgate_protocol::messages::SessionId;
use bpfgate_protocol::messages::helper::{FromHelper, Outcome, Sandbox, ToHelper};
use bpfgate_protocol::refusal::Refusal;
use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Stdio};

/// The policy that tests of the real helper are about.
pub const POLICY: &str = r#"
{client}
[objects.o]
{object:globals}
[[objects.o.xdp]]
program = "copy_globals"
interfaces = ["{interface}"]
[objects.o.maps]
values = "read-write"
".bss" = "none"
[objects.o.globals]
g_u8 = { min = 0, max = 9 }
[objects.other]
{object:tcx}
[[objects.other.tcx]]
program = "on_ingress"
direction = "ingress"
interfaces = ["{interface}"]
"#;

/// The uid of helpers that tests start themselves; not one of the spawner's.
const HELPER_UID: &str = "61180";

/// The socket that its clients come through, in the directory of the test.
const ENTRANCE: &str = "peer";

/// A helper whose broker is the test.
pub struct Peer {
    /// The channel to it.
    pub channel: Channel,
    /// What it said of its confinement.
    pub sandbox: Sandbox,
    child: Child,
}

impl Peer {
    /// Starts `bpfgate-helper APP` in the gate's namespaces and waits until it is ready.
    pub fn start(gate: &Gate, app: &str) -> Self {
        let mut peer = Self::start_with(gate, app, &bin_dir().join("bpfgate-loader"));
        peer.wait_until_ready(gate);
        peer
    }

    /// A helper at a gate of its own with [`POLICY`] as that of `app`, and session 1 for a client of [`USER`]: the gate, how
    /// things were before, the helper, and the client.
    pub fn with_session() -> (Gate, Baseline, Self, UnixStream) {
        let gate = Gate::start();
        gate.policy("app", POLICY);
        let before = gate.baseline();
        let mut peer = Self::start(&gate, "app");
        let client = peer.session(&gate, 1, &USER);
        (gate, before, peer, client)
    }

    /// The same as `start`, with a loader that was taken over.
    pub fn start_with_rogue(gate: &Gate, app: &str) -> (Self, Loader) {
        let ambush = Ambush::lay(gate);
        let mut peer = Self::start_with(gate, app, &rogue::program());
        let loader = Loader::caught(&ambush);
        peer.wait_until_ready(gate);
        (peer, loader)
    }

    fn start_with(gate: &Gate, app: &str, loader: &Path) -> Self {
        let (ours, theirs) = Channel::pair().expect("a channel");
        let mut command = gate.inside(bin_dir().join("bpfgate-helper"));
        command.arg(app).arg("--policies").arg(gate.dir.join("policies"));
        command.arg("--loader").arg(loader).args(["--uid", HELPER_UID]);
        command.arg("--socket").arg(gate.dir.join(ENTRANCE));
        let log = File::options().append(true).open(gate.dir.join("broker.log")).expect("the log");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        sys::as_descriptor_3(&mut command, theirs.as_fd());
        let child = command.spawn().expect("nsenter is there");
        drop(theirs);
        ours.set_timeouts(10, 30).expect("deadlines");
        Self { channel: ours, sandbox: nothing(), child }
    }

    fn wait_until_ready(&mut self, gate: &Gate) {
        match self.channel.recv::<FromHelper>() {
            Ok((FromHelper::Ready { sandbox, .. }, _)) => self.sandbox = sandbox,
            other => panic!("the helper is not ready: {other:?}\n{}", gate.log()),
        }
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Sends a request; an `Open` goes with this socket.
    pub fn send(&self, request: &ToHelper, socket: Option<BorrowedFd<'_>>) {
        self.channel.send(request, socket.as_slice()).expect("the helper reads");
    }

    /// The answer to a request.
    pub fn ask(&mut self, request: &ToHelper, socket: Option<BorrowedFd<'_>>) -> (Outcome, Vec<OwnedFd>) {
        self.send(request, socket);
        self.answer(request)
    }

    /// The answer to a request that was sent.
    pub fn answer(&mut self, request: &ToHelper) -> (Outcome, Vec<OwnedFd>) {
        match self.channel.recv::<FromHelper>() {
            Ok((FromHelper::Answer { outcome, .. }, fds)) => (outcome, fds),
            other => panic!("{request:?}: no answer: {other:?}"),
        }
    }

    /// What it says to an `Adopt` with these descriptors: policy, users, groups.
    pub fn adopt(&mut self, policy: Option<[u8; 32]>, fds: &[BorrowedFd<'_>]) -> Outcome {
        self.channel.send(&ToHelper::Adopt { policy, file: !fds.is_empty() }, fds).expect("the helper reads");
        match self.channel.recv::<FromHelper>() {
            Ok((FromHelper::Answer { outcome, .. }, _)) => outcome,
            other => panic!("Adopt: no answer: {other:?}"),
        }
    }

    /// The answer to a request, which must be no.
    pub fn refused(&mut self, request: &ToHelper, socket: Option<BorrowedFd<'_>>) -> Refusal {
        match self.ask(request, socket) {
            (Outcome::Refused { refusal, .. }, _) => refusal,
            (other, _) => panic!("{request:?} is not refused: {other:?}"),
        }
    }

    /// Opens a session for a client that is `who`; gives the client's end.
    pub fn session(&mut self, gate: &Gate, id: u64, who: &Who) -> UnixStream {
        self.session_by(gate, id, |path| as_user(who, || UnixStream::connect(path)).expect("a connection"))
    }

    /// Opens a session for whoever connects to this path; gives what the connecting came to.
    pub fn session_by<T>(&mut self, gate: &Gate, id: u64, connect: impl FnOnce(&Path) -> T) -> T {
        let (client, server) = connected_by(gate, ENTRANCE, connect);
        let request = ToHelper::Open { session: SessionId(id) };
        let (outcome, _) = self.ask(&request, Some(server.as_fd()));
        assert_eq!(outcome, Outcome::Done);
        client
    }

    /// Whether the helper has ended by itself, and not well, without an answer.
    pub fn has_given_up(&mut self) -> bool {
        let silent = matches!(self.channel.recv::<FromHelper>(), Err(ChannelError::Closed));
        let mut status = None;
        wait_until(SOON, || {
            status = self.child.try_wait().ok().flatten();
            status.is_some()
        });
        silent && status.is_some_and(|status| status.code() == Some(1))
    }
}

/// Both ends of a connection whose client is `who`, through the helper's own entrance: what a broker has of a client.
pub fn client_of(gate: &Gate, who: &Who) -> (UnixStream, UnixStream) {
    connected(gate, ENTRANCE, who)
}

/// Both ends of a connection whose client is `who`, through a socket of this name.
pub fn connected(gate: &Gate, name: &str, who: &Who) -> (UnixStream, UnixStream) {
    connected_by(gate, name, |path| as_user(who, || UnixStream::connect(path)).expect("a connection"))
}

fn connected_by<T>(gate: &Gate, name: &str, connect: impl FnOnce(&Path) -> T) -> (T, UnixStream) {
    let path = gate.dir.join(name);
    let _ = fs::remove_file(&path);
    let listener = UnixListener::bind(&path).expect("a listener");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).expect("its mode");
    let client = connect(&path);
    let (server, _) = listener.accept().expect("a connection");
    (client, server)
}

fn nothing() -> Sandbox {
    Sandbox { landlock_abi: 0, seccomp_filters: 0, capabilities: 0 }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
