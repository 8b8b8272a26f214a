//! A program of bpfgate that was taken over, as far as its channels go: started in the place of a loader or of the
//! spawner, it gives them away to the test, which then is that process to everybody else.
#![forbid(unsafe_code)]

use bpfgate_protocol::channel::{inherited_fd, send_stream};
use bpfgate_tests::rogue::SOCKET;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

fn main() {
    // Before anything else has a number.
    let channels: Vec<_> = (3..5).map_while(|fd| inherited_fd(fd).ok()).collect();
    let mut test = UnixStream::connect(SOCKET).expect("the test listens");
    let lent: Vec<_> = channels.iter().map(AsFd::as_fd).collect();
    send_stream(test.as_fd(), &[0], &lent).expect("the test takes them");
    drop(channels);
    // It is there as long as the test wants it to be.
    let _ = test.read(&mut [0]);
}
