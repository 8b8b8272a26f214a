//! A loader or a spawner that was taken over: the real helper or broker starts `bpfgate-rogue` in its place, which gives
//! its channels to the test.

use crate::gate::{Gate, bin_dir};
use bpfgate_protocol::INNER_VERSION;
use bpfgate_protocol::channel::{Channel, ChannelError, receive};
use bpfgate_protocol::messages::loader::{FromLeash, FromLoader, Purpose, ToLeash, ToLoader};
use nix::sys::socket::MsgFlags;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

/// Where the test waits for it: a program that is started without arguments and without an environment knows one place.
/// Tests run one at a time.
pub const SOCKET: &str = "/run/bpfgate-rogue.sock";

/// The program that is started in the place of another.
pub fn program() -> PathBuf {
    bin_dir().join("bpfgate-rogue")
}

/// Waits for a rogue to be started.
#[derive(Debug)]
pub struct Ambush(UnixListener);

impl Ambush {
    /// Before the process is started that starts it. The gate holds the lock of the tests.
    pub fn lay(_: &Gate) -> Self {
        let _ = fs::remove_file(SOCKET);
        let listener = UnixListener::bind(SOCKET).expect("a listener");
        fs::set_permissions(SOCKET, fs::Permissions::from_mode(0o666)).expect("its mode");
        Self(listener)
    }

    /// The process that was taken over, for as long as the stream lives, and its channels.
    pub fn caught(&self) -> (UnixStream, Vec<Channel>) {
        let (stream, _) = self.0.accept().expect("a rogue");
        let got = receive(stream.as_fd(), &mut [0; 8], MsgFlags::empty()).expect("its channels");
        let channels = got.fds.into_iter().map(|fd| Channel::from_fd(fd).expect("a channel"));
        (stream, channels.collect())
    }
}

impl Drop for Ambush {
    fn drop(&mut self) {
        let _ = fs::remove_file(SOCKET);
    }
}

/// A loader that was taken over, its parent and its worker both.
pub struct Loader {
    /// To the helper, as the parent.
    pub leash: Channel,
    /// To the helper, as the worker.
    pub work: Channel,
    /// The number of the worker that it plays.
    pub worker: u32,
    _process: UnixStream,
}

impl Loader {
    /// The one that a helper has started.
    pub fn caught(ambush: &Ambush) -> Self {
        let (process, channels) = ambush.caught();
        let [leash, work] = <[Channel; 2]>::try_from(channels).expect("two channels");
        work.set_timeouts(15, 15).expect("deadlines");
        leash.set_timeouts(15, 15).expect("deadlines");
        let ready = FromLeash::Ready { version: INNER_VERSION };
        leash.send(&ready, &[]).expect("the helper waits for it");
        Self { leash, work, worker: 1, _process: process }
    }

    /// What the helper sends to the worker.
    pub fn hears(&mut self) -> Result<(ToLoader, Vec<OwnedFd>), ChannelError> {
        self.work.recv()
    }

    /// The request for a load, which has to come next.
    pub fn load(&mut self) {
        match self.hears() {
            Ok((ToLoader::Load { .. }, _)) => {}
            other => panic!("no load: {other:?}"),
        }
    }

    /// What the helper says to this.
    pub fn ask(&mut self, message: &FromLoader, fds: &[BorrowedFd<'_>]) -> (ToLoader, Vec<OwnedFd>) {
        self.work.send(message, fds).expect("the helper reads");
        self.hears().unwrap_or_else(|error| panic!("{message:?}: {error}"))
    }

    /// The end of a request.
    pub fn end(&mut self, message: &FromLoader) {
        self.work.send(message, &[]).expect("the helper reads");
    }

    /// Waits until the helper wants the worker's end, and says that it has come to it; what was sent to it is gone.
    pub fn dies(&mut self) {
        match self.leash.recv() {
            Ok((ToLeash::Kill { worker }, _)) => assert_eq!(worker, self.worker),
            Err(error) => panic!("nobody wants the worker's end: {error}"),
        }
        let mut buffer = [0; 64];
        while receive(self.work.as_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT).is_ok_and(|got| got.len > 0) {}
        let died = FromLeash::Died { worker: self.worker, how: "was ended by SIGKILL".to_owned() };
        self.leash.send(&died, &[]).expect("the helper waits for it");
        self.worker += 1;
    }
}

/// Which program of the plan is meant.
pub const FIRST: Purpose = Purpose::Object(0);
