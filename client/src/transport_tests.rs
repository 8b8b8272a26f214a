use std::io::{IoSlice, Read, Write};
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::socket::{ControlMessage, sendmsg};
use serde_json::json;

use super::*;

/// Sends bytes, with descriptors at the first of them.
fn send_with(stream: &UnixStream, bytes: &[u8], fds: &[RawFd]) {
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &rights[..0] } else { &rights[..] };
    let sent = sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::empty(), None);
    assert_eq!(sent.unwrap(), bytes.len());
}

fn read_request(stream: &mut UnixStream) -> Value {
    let mut text = Vec::new();
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte).unwrap();
        if byte[0] == 0 {
            return serde_json::from_slice(&text).unwrap();
        }
        text.push(byte[0]);
    }
}

/// A connection whose peer reads one request and then does what `answer` says.
fn against<R: DeserializeOwned>(
    answer: impl FnOnce(&mut UnixStream) + Send + 'static,
) -> Result<(R, Fds), Error> {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let peer = std::thread::spawn(move || {
        assert_eq!(read_request(&mut theirs), json!({"method": "a.B", "parameters": {"x": 1}}));
        answer(&mut theirs);
    });
    let mut connection = Connection::new(ours);
    connection.set_timeout(Some(Duration::from_secs(10)));
    let outcome = connection.call("a.B", &json!({"x": 1}));
    // A peer that is still writing waits for us.
    drop(connection);
    peer.join().unwrap();
    outcome
}

fn protocol_error<R: DeserializeOwned>(outcome: Result<(R, Fds), Error>, part: &str) {
    match outcome {
        Err(Error::Protocol(sentence)) => assert!(sentence.contains(part), "{sentence}"),
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("accepted"),
    }
}

/// A pipe: its reading end sees the end of file when every copy of the writing end is closed.
fn pipe() -> (std::fs::File, OwnedFd) {
    let (reading, writing) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    (reading.into(), writing)
}

fn assert_all_closed(mut reading: std::fs::File) {
    // Waits: a descriptor that leaked keeps the pipe open and the test hangs in `poll`.
    let mut fds = [PollFd::new(reading.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, 2000u16).unwrap(), 1, "a descriptor is still open");
    assert_eq!(reading.read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn a_reply_comes_in_pieces() {
    let (value, fds) = against::<Value>(|peer| {
        for part in [&b"{\"para"[..], b"meters\":{\"y\":", b"2}}\0"] {
            peer.write_all(part).unwrap();
            std::thread::sleep(Duration::from_millis(5));
        }
    })
    .unwrap();
    assert_eq!(value, json!({"y": 2}));
    fds.finish().unwrap();
}

#[test]
fn a_reply_without_parameters_is_empty() {
    let (value, _) = against::<Value>(|peer| peer.write_all(b"{}\0").unwrap()).unwrap();
    assert_eq!(value, json!({}));
}

#[test]
fn a_refusal_leaves_the_connection_usable() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let peer = std::thread::spawn(move || {
        read_request(&mut theirs);
        theirs.write_all(b"{\"error\":\"io.bpfgate.Busy\",\"parameters\":{\"message\":\"m\"}}\0").unwrap();
        read_request(&mut theirs);
        theirs.write_all(b"{\"parameters\":{}}\0").unwrap();
    });
    let mut connection = Connection::new(ours);
    let refused = connection.call::<_, Value>("a.B", &json!({})).map(drop);
    assert!(matches!(refused, Err(Error::Busy(refusal)) if refusal.message == "m"));
    connection.call::<_, Value>("a.B", &json!({})).unwrap();
    peer.join().unwrap();
}

#[test]
fn descriptors_are_taken_by_index() {
    let (reading, writing) = pipe();
    let (_, mut fds) = against::<Value>(move |peer| {
        let raw = writing.as_raw_fd();
        send_with(peer, b"{\"parameters\":{}}\0", &[raw, raw, raw]);
    })
    .unwrap();
    let flags = |fd: &OwnedFd| nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFD).unwrap();
    let second = fds.take(Some(1)).unwrap().unwrap();
    assert_eq!(flags(&second), libc::FD_CLOEXEC);
    assert!(fds.take(None).unwrap().is_none());
    assert!(fds.take(Some(1)).is_err(), "named twice");
    assert!(fds.take(Some(3)).is_err(), "not there");
    assert!(fds.take(Some(usize::MAX)).is_err());
    drop(second);
    assert!(matches!(fds.finish(), Err(Error::Protocol(text)) if text.starts_with("2 descriptors")));
    assert_all_closed(reading);
}

#[test]
fn two_hundred_fifty_three_descriptors_arrive() {
    let (reading, writing) = pipe();
    let (_, fds) = against::<Value>(move |peer| {
        send_with(peer, b"{\"parameters\":{}}\0", &[writing.as_raw_fd(); 253]);
    })
    .unwrap();
    assert_eq!(fds.0.len(), 253);
    drop(fds);
    assert_all_closed(reading);
}

#[test]
fn descriptors_come_once_in_a_reply() {
    let (reading, writing) = pipe();
    let outcome = against::<Value>(move |peer| {
        send_with(peer, b"{\"parameters\"", &[writing.as_raw_fd()]);
        send_with(peer, b":{}}\0", &[writing.as_raw_fd()]);
    });
    protocol_error(outcome, "twice");
    assert_all_closed(reading);
}

#[test]
fn descriptors_of_a_refusal_are_closed() {
    let (reading, writing) = pipe();
    let outcome = against::<Value>(move |peer| {
        send_with(peer, b"{\"error\":\"io.bpfgate.Gone\"}\0", &[writing.as_raw_fd()]);
    });
    assert!(matches!(outcome, Err(Error::Gone(_))));
    assert_all_closed(reading);
}

#[test]
fn what_is_not_one_reply_is_refused() {
    for (bytes, part) in [
        (&b"\0"[..], "does not fit"),
        (b"[]\0", "does not fit"),
        (b"{\"parameters\":[]}\0", "does not fit"),
        (b"{\"parameters\":{}}\0{", "more than one"),
        (b"{\"parameters\":{}}\0{}\0", "more than one"),
        (b"{\"parameters\":{},\"continues\":true}\0", "second reply"),
        (b"\xff\xfe\0", "does not fit"),
    ] {
        protocol_error(against::<Value>(move |peer| peer.write_all(bytes).unwrap()), part);
    }
    let deep = [vec![b'['; 100_000], vec![0]].concat();
    protocol_error(against::<Value>(move |peer| peer.write_all(&deep).unwrap()), "does not fit");
}

#[test]
fn a_reply_may_be_long_but_not_endless() {
    let log = "x".repeat(7 * 1024 * 1024);
    let reply = format!("{{\"parameters\":{{\"log\":\"{log}\"}}}}\0");
    let (value, _) = against::<Value>(move |peer| peer.write_all(reply.as_bytes()).unwrap()).unwrap();
    assert_eq!(value["log"].as_str().unwrap().len(), log.len());
    let outcome = against::<Value>(|peer| while peer.write_all(&[b' '; 4096]).is_ok() {});
    protocol_error(outcome, "longer than");
}

#[test]
fn a_peer_that_hangs_up_is_an_error() {
    let outcome = against::<Value>(|peer| peer.write_all(b"{\"parameters\"").unwrap());
    assert!(
        matches!(outcome, Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::UnexpectedEof)
    );
}

#[test]
fn a_refusal_of_the_connection_itself_is_read() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(b"{\"error\":\"io.bpfgate.Quota\",\"parameters\":{}}\0").unwrap();
    drop(theirs);
    let outcome = Connection::new(ours).call::<_, Value>("a.B", &json!({})).map(drop);
    assert!(matches!(outcome, Err(Error::Quota(_))), "{outcome:?}");
}

#[test]
fn a_wait_ends_and_is_announced_once() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let mut connection = Connection::new(ours);
    let count = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&count);
    let notice = move || {
        counter.fetch_add(1, Ordering::Relaxed);
    };
    connection.notify_after(Duration::from_millis(10), Box::new(notice));
    connection.set_timeout(Some(Duration::from_millis(60)));
    let outcome = connection.call::<_, Value>("a.B", &json!({})).map(drop);
    assert!(matches!(outcome, Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::TimedOut));
    assert_eq!(count.load(Ordering::Relaxed), 1);
    // Its answer may still come, and would be taken for that of the next request.
    protocol_error(connection.call::<_, Value>("a.B", &json!({})), "connect again");
}

#[test]
fn a_request_that_is_too_long_is_not_sent() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut connection = Connection::new(ours);
    let outcome = connection.call::<_, Value>("a.B", &json!({"x": "y".repeat(MAX_REQUEST)})).map(drop);
    assert!(matches!(outcome, Err(Error::Invalid(_))));
    theirs.set_nonblocking(true).unwrap();
    assert_eq!((&theirs).read(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
}
