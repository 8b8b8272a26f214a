//! recvmsg(2) with descriptors.
//!
//! Not nix's: on `MSG_CTRUNC` it returns an error and forgets the descriptors that did arrive.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use super::check;

/// `SCM_MAX_FD` of the kernel: more never come with one message.
const MAX_FDS: u32 = 253;

/// Room for one `SCM_RIGHTS` message of `MAX_FDS`. That is the only kind of control message that
/// arrives on a socket without `SO_PASSCRED`, `SO_PASSSEC` and `SO_TIMESTAMP`.
const CONTROL_WORDS: usize = {
    // SAFETY: arithmetic on its argument only.
    let bytes = unsafe { libc::CMSG_SPACE(MAX_FDS * 4) };
    (bytes as usize).div_ceil(size_of::<u64>())
};

/// What one recvmsg(2) gave.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) bytes: usize,
    pub(crate) fds: Vec<OwnedFd>,
    /// Descriptors were lost: this process may have no more, or the control buffer was too small.
    pub(crate) truncated: bool,
}

/// Receives without waiting; descriptors get close-on-exec in the kernel.
pub(crate) fn receive(socket: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<Received> {
    let mut control = [0u64; CONTROL_WORDS];
    let mut part = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    // SAFETY: msghdr is plain old data, for which all zero bytes are a valid (empty) message.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of_val(&control) as _;
    let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
    // SAFETY: `part` describes `into`, `control` is as long as stated and aligned for cmsghdr;
    // all three outlive the call.
    let got = check(unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) } as i64)?;
    let fds = take_fds(&message);
    let bytes = usize::try_from(got).map_err(io::Error::other)?;
    Ok(Received { bytes, fds, truncated: message.msg_flags & libc::MSG_CTRUNC != 0 })
}

/// Takes ownership of every descriptor in the control messages.
fn take_fds(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: the kernel filled msg_control and set msg_controllen to what it wrote; the buffer is
    // alive and aligned in our only caller.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !header.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return null or a header inside the buffer.
        let (level, kind, len) = unsafe { ((*header).cmsg_level, (*header).cmsg_type, (*header).cmsg_len) };
        if level == libc::SOL_SOCKET && kind == libc::SCM_RIGHTS {
            // SAFETY: arithmetic on its argument only.
            let payload = len.saturating_sub(unsafe { libc::CMSG_LEN(0) } as usize);
            for index in 0..payload / size_of::<RawFd>() {
                // SAFETY: the kernel sets cmsg_len to the descriptors it wrote, also when it
                // truncates, so `index` is inside; bytes need no alignment.
                let raw = unsafe {
                    let data = libc::CMSG_DATA(header).cast::<[u8; size_of::<RawFd>()]>();
                    RawFd::from_ne_bytes(data.add(index).read())
                };
                // SAFETY: the kernel installed this descriptor for us in this call.
                fds.push(unsafe { OwnedFd::from_raw_fd(raw) });
            }
        }
        // SAFETY: `header` is a header of `message`, whose buffer is alive.
        header = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
    fds
}
