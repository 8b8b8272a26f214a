//! What is wrong closes everything that came. Descriptors and their limit are the whole process's, so this is a process of
//! its own with one test.

use bpfgate_protocol::channel::{Channel, ChannelError, MAX_FDS, Message};
use bpfgate_protocol::codec::MAX_MESSAGE;
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Note {
    text: String,
    fds: usize,
}

impl Message for Note {
    fn fds(&self) -> usize {
        self.fds
    }
}

fn note(text: &str, fds: usize) -> Note {
    Note { text: text.into(), fds }
}

fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn whatever_is_wrong_closes_what_came() {
    wrong_counts_wrong_bytes_and_long_datagrams_are_errors();
    a_full_descriptor_table_loses_nothing();
}

fn wrong_counts_wrong_bytes_and_long_datagrams_are_errors() {
    let (a, mut b) = Channel::pair().unwrap();
    b.set_timeouts(1, 1).unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    let many: Vec<BorrowedFd<'_>> = (0..MAX_FDS).map(|_| file.as_fd()).collect();
    let one = bpfgate_protocol::codec::encode(&note("x", 1)).unwrap();
    let before = open_fds();
    for (bytes, fds) in [
        (one.clone(), &many[..0]),
        (one.clone(), &many[..2]),
        (one.clone(), &many[..]),
        (vec![0xff; 10], &many[..1]),
        (vec![0; MAX_MESSAGE + 1], &many[..3]),
    ] {
        a.send_bytes(&bytes, fds).unwrap();
        assert!(matches!(b.recv::<Note>(), Err(ChannelError::Protocol(_))));
    }
    assert_eq!(open_fds(), before);
    assert!(matches!(b.recv::<Note>(), Err(ChannelError::NotNow)));
    drop(a);
    assert!(matches!(b.recv::<Note>(), Err(ChannelError::Closed)));
}

fn a_full_descriptor_table_loses_nothing() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (a, mut b) = Channel::pair().unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    let three = [file.as_fd(), file.as_fd(), file.as_fd()];
    a.send(&note("x", 3), &three).unwrap();
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let top = file.try_clone().unwrap(); // the lowest free number before the table is full
    let next = u64::try_from(top.as_raw_fd()).unwrap() + 2;
    let before = open_fds();
    setrlimit(Resource::RLIMIT_NOFILE, next, hard).unwrap();
    let got = b.recv::<Note>();
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    assert!(matches!(got, Err(ChannelError::Protocol(_))), "{got:?}");
    assert_eq!(open_fds(), before);
}
