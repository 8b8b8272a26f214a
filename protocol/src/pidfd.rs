//! Two questions to the kernel about the process behind a pidfd that no library asks yet.

use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `struct pidfd_info` as of Linux 6.13. Source: include/uapi/linux/pidfd.h, `PIDFD_INFO_SIZE_VER0`.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Info {
    mask: u64,
    cgroup_id: u64,
    ids: [u32; 11],
    exit_code: i32,
}

const _: () = assert!(size_of::<Info>() == 64);

/// `PIDFD_INFO_CGROUPID`.
const CGROUP_ID: u64 = 1 << 2;

/// `PIDFD_GET_INFO`: `_IOWR(0xFF, 11, struct pidfd_info)`; the size is a part of the number.
#[allow(clippy::cast_possible_truncation)] // an ioctl number has 32 bits
pub const GET_INFO: u32 = nix::request_code_readwrite!(0xFF, 11, size_of::<Info>()) as u32;

mod sys {
    #![allow(unsafe_code, missing_docs, unreachable_pub, reason = "one wrapped call")]
    nix::ioctl_readwrite!(get_info, 0xFF, 11, super::Info);
}

/// The id of the cgroup (v2) that the process is in; it is the inode number of the cgroup's directory.
///
/// Errors: `ENOTTY` (before Linux 6.13) · `ESRCH` (the process has ended)
#[allow(unsafe_code)]
pub fn cgroup_id(pidfd: BorrowedFd<'_>) -> Result<u64, Errno> {
    let mut info = Info { mask: CGROUP_ID, ..Default::default() };
    // SAFETY: `info` lives through the call and has the size that the number says.
    unsafe { sys::get_info(pidfd.as_raw_fd(), &raw mut info) }?;
    if info.mask & CGROUP_ID == 0 { Err(Errno::ESRCH) } else { Ok(info.cgroup_id) }
}
