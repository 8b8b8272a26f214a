//! Datagrams with descriptors over real sockets, also where there is no room for them. Descriptors and their limit belong to
//! the whole process: nothing else may run in it.

use arbitrary::{Result, Unstructured};
use bpfgate_protocol::channel::{Channel, ChannelError, MAX_FDS, Message, receive, send_stream};
use bpfgate_protocol::codec::{self, MAX_MESSAGE};
use bpfgate_protocol::messages::helper::{FromHelper, Outcome, ToHelper};
use bpfgate_protocol::messages::{Bulk, SessionId};
use bpfgate_protocol::refusal::Refusal;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::MsgFlags;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;

/// A few datagrams or pieces of a stream. Of each the receiver gets all descriptors or an error, an error where they are
/// not as many as its message says; and none is left open or closed twice.
pub fn channel(data: &[u8]) -> bool {
    static FILE: OnceLock<File> = OnceLock::new();
    let file = FILE.get_or_init(|| File::open("/dev/null").expect("/dev/null"));
    let mut u = Unstructured::new(data);
    let first = next_number(file);
    let mut came = false;
    while let Ok(something) = round(&mut u, file) {
        came |= something;
        assert_eq!(next_number(file), first, "descriptors are left open, or were closed twice");
        if u.is_empty() {
            break;
        }
    }
    came
}

/// The number that the next descriptor gets.
fn next_number(file: &File) -> RawFd {
    file.try_clone().expect("there is room").as_raw_fd()
}

fn round(u: &mut Unstructured<'_>, file: &File) -> Result<bool> {
    let count = match u.int_in_range(0..=3)? {
        0 => u.int_in_range(0..=MAX_FDS)?,
        _ => u.int_in_range(0..=4)?,
    };
    let fds: Vec<BorrowedFd<'_>> = vec![file.as_fd(); count];
    let room = if u.ratio(1, 4)? { Some(u.int_in_range(0..=8)?) } else { None };
    if u.ratio(1, 4)? { stream(u, file, &fds, room) } else { datagram(u, file, &fds, room) }
}

fn datagram(
    u: &mut Unstructured<'_>,
    file: &File,
    fds: &[BorrowedFd<'_>],
    room: Option<u64>,
) -> Result<bool> {
    let (ours, mut theirs) = Channel::pair().expect("a pair");
    theirs.set_nonblocking().expect("O_NONBLOCK");
    let open = codec::encode(&ToHelper::Open { session: SessionId(7) }).expect("it is short");
    let log = Outcome::Refused { refusal: Refusal::object("no"), log: Bulk::Memfd { len: 9 } };
    let log = codec::encode(&FromHelper::Answer { outcome: log, line: None }).expect("it is short");
    let bytes = match u.int_in_range(0..=4)? {
        0 | 1 => open.clone(),
        2 => log,
        3 => u.arbitrary::<&[u8]>()?.to_vec(),
        _ => vec![0; MAX_MESSAGE + u.int_in_range(0..=2)?],
    };
    ours.send_bytes(&bytes, fds).expect("the kernel takes it");
    let got = with_room(file, room, || theirs.recv::<ToHelper>());
    match &got {
        Ok((message, came)) => {
            assert!(message.fds() == came.len() && came.len() == fds.len(), "{message:?}: {came:?}");
        }
        Err(ChannelError::Protocol(_)) => {
            assert!(bytes != open || fds.len() != 1 || room.is_some(), "{got:?}");
        }
        // An empty datagram is the end, whatever came with it.
        Err(ChannelError::Closed) => assert!(bytes.is_empty()),
        Err(error) => panic!("{error}"),
    }
    Ok(got.is_ok())
}

/// As the broker reads what clients send.
fn stream(u: &mut Unstructured<'_>, file: &File, fds: &[BorrowedFd<'_>], room: Option<u64>) -> Result<bool> {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let bytes = vec![1; u.int_in_range(1..=64)?];
    assert_eq!(send_stream(ours.as_fd(), &bytes, fds), Ok(bytes.len()));
    let mut buffer = vec![0; u.int_in_range(1..=64)?];
    let got = with_room(file, room, || receive(theirs.as_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT));
    let got = got.expect("something came");
    assert_eq!(got.len, bytes.len().min(buffer.len()));
    assert!(
        got.fds.len() == fds.len() || (got.truncated && room.is_some()),
        "{} of {}: {got:?}",
        got.fds.len(),
        fds.len()
    );
    // They came with the first byte.
    if let Ok(rest) = receive(theirs.as_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
        assert!(rest.fds.is_empty(), "{rest:?}");
    }
    Ok(!got.fds.is_empty())
}

/// Does something where the process may have so many descriptors more, or fewer: some that are higher may be open.
fn with_room<T>(file: &File, room: Option<u64>, action: impl FnOnce() -> T) -> T {
    let Some(room) = room else { return action() };
    let next = u64::try_from(next_number(file)).expect("a number");
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("RLIMIT_NOFILE");
    setrlimit(Resource::RLIMIT_NOFILE, next + room, hard).expect("less is allowed");
    let result = action();
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).expect("as before");
    result
}
