//! The system calls of the broker, each with its reason. No bpf(2), no exec, no fork; a new socket only under a service
//! manager, where helpers are behind sockets, and then a Unix socket.

use bpfgate_lockdown::row;
use bpfgate_lockdown::syscalls::{Row, When};
use bpfgate_protocol::pidfd;

const PROT_EXEC: u64 = libc::PROT_EXEC as u64;
#[allow(clippy::cast_possible_truncation)] // an ioctl number has 32 bits
const TIOCOUTQ: u32 = libc::TIOCOUTQ as u32;
#[allow(clippy::cast_possible_truncation)]
const FIONBIO: u32 = libc::FIONBIO as u32;

/// Flags of open(2) that change something; landlock before ABI 3 lets `O_TRUNC` through.
const WRITING: u64 = (libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC | libc::O_APPEND) as u64;

/// The list; `service` adds the way to helpers behind sockets.
#[rustfmt::skip]
pub(crate) fn rows(service: bool) -> Vec<Row> {
    let mut rows = vec![
        row!(epoll_wait, SYS_epoll_wait, When::Always, "the loop"),
        row!(epoll_ctl, SYS_epoll_ctl, When::Always, "the loop"),
        row!(epoll_create1, SYS_epoll_create1, When::Always, "the loop"),
        row!(listen, SYS_listen, When::Always, "clients are let in only after the lock-down"),
        row!(accept4, SYS_accept4, When::Always, "clients"),
        row!(recvmsg, SYS_recvmsg, When::Always, "requests and answers"),
        row!(sendmsg, SYS_sendmsg, When::Always, "requests and answers"),
        row!(shutdown, SYS_shutdown, When::Always, "ends a connection that a helper holds too"),
        row!(close, SYS_close, When::Always, "descriptors"),
        row!(getsockopt, SYS_getsockopt, When::Always, "who a client is; the kind of a helper's channel"),
        row!(getsockname, SYS_getsockname, When::Always, "the kind of a helper's channel"),
        row!(fcntl, SYS_fcntl, When::OneOf(1, &[libc::F_SETFD as u32, libc::F_GETFD as u32]), "descriptors from the spawner"),
        row!(ioctl, SYS_ioctl, When::OneOf(1, &[TIOCOUTQ, FIONBIO, pidfd::GET_INFO]), "whether a client has read its last descriptors; channels of helpers; a client's cgroup"),
        row!(poll, SYS_poll, When::Always, "whether the process of a client has ended"),
        row!(readlink, SYS_readlink, When::Always, "which start of its unit a client belongs to"),
        row!(openat, SYS_openat, When::Without(2, WRITING), "policies and accounts; landlock refuses everything else"),
        row!(fstat, SYS_fstat, When::Always, "who can write a policy"),
        row!(newfstatat, SYS_newfstatat, When::Always, "fstat of newer C libraries"),
        row!(fstatfs, SYS_fstatfs, When::Always, "whether the kernel decides what is in a policy"),
        row!(statx, SYS_statx, When::Always, "whether there is a policy"),
        row!(getdents64, SYS_getdents64, When::Always, "which policies there are"),
        row!(read, SYS_read, When::Always, "policies and accounts; SIGHUP"),
        row!(lseek, SYS_lseek, When::Always, "the size of a file"),
        row!(pread64, SYS_pread64, When::Always, "verifier logs"),
        row!(write, SYS_write, When::Always, "log and audit records"),
        row!(writev, SYS_writev, When::Always, "log records"),
        row!(mmap, SYS_mmap, When::Without(2, PROT_EXEC), "memory"),
        row!(munmap, SYS_munmap, When::Always, "memory"),
        row!(mremap, SYS_mremap, When::Always, "memory"),
        row!(mprotect, SYS_mprotect, When::Without(2, PROT_EXEC), "memory"),
        row!(madvise, SYS_madvise, When::Always, "memory"),
        row!(brk, SYS_brk, When::Always, "memory"),
        row!(clock_gettime, SYS_clock_gettime, When::Always, "deadlines, where the vDSO has no clock"),
        row!(getrandom, SYS_getrandom, When::Always, "request ids, seeds of hash tables"),
        row!(futex, SYS_futex, When::Always, "locks of the Rust library"),
        row!(sigaltstack, SYS_sigaltstack, When::Always, "the end of the process"),
        row!(rt_sigprocmask, SYS_rt_sigprocmask, When::Always, "abort"),
        row!(rt_sigaction, SYS_rt_sigaction, When::Always, "abort"),
        row!(rt_sigreturn, SYS_rt_sigreturn, When::Always, "the report of a stack overflow"),
        row!(getpid, SYS_getpid, When::Always, "abort"),
        row!(gettid, SYS_gettid, When::Always, "abort"),
        row!(tgkill, SYS_tgkill, When::Always, "abort"),
        row!(exit_group, SYS_exit_group, When::Always, "the end of the process"),
    ];
    if service {
        rows.extend([
            row!(socket, SYS_socket, When::OneOf(0, &[libc::AF_UNIX as u32]), "to helpers, which are behind sockets"),
            row!(connect, SYS_connect, When::Always, "to helpers; it can make no other than Unix sockets"),
        ]);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_has_its_reason_and_the_list_compiles() {
        for service in [false, true] {
            let rows = rows(service);
            assert!(rows.iter().all(|row| row.why.len() > 3), "a row without a reason");
            bpfgate_lockdown::syscalls::compile(&rows).unwrap();
        }
    }

    #[test]
    fn nothing_is_executed_and_standalone_no_socket_is_made() {
        for name in
            ["execve", "execveat", "ptrace", "clone3", "fork", "unshare", "setns", "mount", "keyctl", "bpf"]
        {
            assert!(rows(true).iter().all(|row| row.name != name), "{name}");
        }
        assert!(rows(false).iter().all(|row| !["socket", "connect"].contains(&row.name)));
    }
}
