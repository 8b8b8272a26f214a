//! The system calls of the loader, each with its reason.

use bpfgate_bpf::uapi::cmd;
use bpfgate_lockdown::row;
use bpfgate_lockdown::syscalls::{Row, When};

/// Flags of open(2) that change something; landlock before ABI 3 lets `O_TRUNC` through.
const WRITING: u64 = (libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC | libc::O_APPEND) as u64;
const PROT_EXEC: u64 = libc::PROT_EXEC as u64;

/// The one command of bpf(2) that reaches the kernel from here; it works on descriptors that the helper made for this
/// app, and needs no capability.
const BPF: &[u32] = &[cmd::MAP_UPDATE_ELEM];

/// What fork of the C library says to clone(2): no namespace, no thread.
const FORK: &[u32] = &[(libc::CLONE_CHILD_SETTID | libc::CLONE_CHILD_CLEARTID | libc::SIGCHLD) as u32];

/// The worker dies with its parent, cannot be looked into, and gets no new privileges.
const START: &[u32] =
    &[libc::PR_SET_PDEATHSIG as u32, libc::PR_SET_DUMPABLE as u32, libc::PR_SET_NO_NEW_PRIVS as u32];

/// Those of the worker, which runs libbpf.
pub(crate) fn worker() -> Vec<Row> {
    vec![
        row!(bpf, SYS_bpf, When::OneOf(0, BPF), "libbpf fills maps"),
        row!(recvmsg, SYS_recvmsg, When::Always, "requests and answers of the helper"),
        row!(sendmsg, SYS_sendmsg, When::Always, "requests and answers to the helper"),
        row!(close, SYS_close, When::Always, "descriptors"),
        row!(
            mmap,
            SYS_mmap,
            When::Without(2, PROT_EXEC),
            "memory; the object; the kernel's BTF; data sections"
        ),
        row!(munmap, SYS_munmap, When::Always, "memory"),
        row!(mremap, SYS_mremap, When::Always, "memory"),
        row!(mprotect, SYS_mprotect, When::Without(2, PROT_EXEC), "libbpf makes .rodata read-only"),
        row!(madvise, SYS_madvise, When::Always, "the allocator gives memory back"),
        row!(brk, SYS_brk, When::Always, "memory"),
        row!(dup3, SYS_dup3, When::Always, "libbpf puts maps in the place of its placeholders"),
        row!(
            fcntl,
            SYS_fcntl,
            When::OneOf(1, &[1, 3, 1030]),
            "F_DUPFD_CLOEXEC: placeholders; F_GETFD, F_GETFL: debug builds of the Rust library, and libelf"
        ),
        row!(
            memfd_create,
            SYS_memfd_create,
            When::Always,
            "libbpf's placeholders; parts that are larger than a datagram"
        ),
        row!(write, SYS_write, When::OneOf(0, &[2]), "messages on standard error"),
        row!(pwrite64, SYS_pwrite64, When::Except(0, 2), "parts that are larger than a datagram"),
        row!(pread64, SYS_pread64, When::Always, "the verifier log"),
        row!(read, SYS_read, When::Always, "uprobe targets; the kernel's BTF"),
        row!(lseek, SYS_lseek, When::Except(0, 2), "uprobe targets; the size of the object"),
        row!(fstat, SYS_fstat, When::Always, "the size of the object; the kernel's BTF"),
        row!(newfstatat, SYS_newfstatat, When::Always, "fstat of newer C libraries"),
        row!(statx, SYS_statx, When::Always, "fstat of the Rust library"),
        row!(
            openat,
            SYS_openat,
            When::Without(2, WRITING),
            "the kernel's BTF; landlock refuses everything else"
        ),
        row!(access, SYS_access, When::Always, "libbpf looks which file has the kernel's BTF"),
        row!(faccessat, SYS_faccessat, When::Always, "access of newer C libraries"),
        row!(faccessat2, SYS_faccessat2, When::Always, "access of newer C libraries"),
        row!(uname, SYS_uname, When::Always, "libbpf names the kernel version"),
        row!(sysinfo, SYS_sysinfo, When::Always, "qsort of the C library asks how much memory there is"),
        row!(
            prlimit64,
            SYS_prlimit64,
            When::Fails(libc::EACCES),
            "libbpf asks for RLIMIT_MEMLOCK to explain an EPERM"
        ),
        row!(geteuid, SYS_geteuid, When::Always, "libbpf explains an EPERM differently to root"),
        row!(getrandom, SYS_getrandom, When::Always, "seeds of hash tables"),
        row!(futex, SYS_futex, When::Always, "locks of the Rust library"),
        row!(sigaltstack, SYS_sigaltstack, When::Always, "end of the thread"),
        row!(rt_sigprocmask, SYS_rt_sigprocmask, When::Always, "abort"),
        row!(rt_sigaction, SYS_rt_sigaction, When::Always, "abort"),
        row!(rt_sigreturn, SYS_rt_sigreturn, When::Always, "the handler of stack overflows"),
        row!(getpid, SYS_getpid, When::Always, "abort"),
        row!(gettid, SYS_gettid, When::Always, "abort"),
        row!(tgkill, SYS_tgkill, When::Always, "abort"),
        row!(exit_group, SYS_exit_group, When::Always, "the end"),
    ]
}

/// Those of the parent: what its worker needs, since filters are inherited, and what it takes to start one.
pub(crate) fn parent() -> Vec<Row> {
    let mut rows = worker();
    rows.extend([
        row!(clone, SYS_clone, When::OneOf(0, FORK), "forks the worker"),
        row!(set_robust_list, SYS_set_robust_list, When::Always, "fork of the C library"),
        row!(rseq, SYS_rseq, When::Always, "fork of the C library"),
        row!(wait4, SYS_wait4, When::Always, "waits for the worker"),
        row!(kill, SYS_kill, When::Always, "ends a late worker; landlock keeps the signal among our own"),
        row!(ppoll, SYS_ppoll, When::Always, "waits for worker and helper"),
        row!(pipe2, SYS_pipe2, When::Always, "tells when the worker ends"),
        row!(prctl, SYS_prctl, When::OneOf(0, START), "the worker's start"),
        row!(seccomp, SYS_seccomp, When::Always, "the worker's filter"),
        row!(getppid, SYS_getppid, When::Always, "the worker dies with its parent"),
        row!(getsockopt, SYS_getsockopt, When::Always, "the worker checks its channel"),
        row!(getsockname, SYS_getsockname, When::Always, "the worker checks its channel"),
    ]);
    rows
}

/// Those of a description: libbpf opens an object, and nothing is loaded.
pub(crate) fn describer() -> Vec<Row> {
    let mut rows = worker();
    rows.retain(|row| !matches!(row.number, libc::SYS_bpf | libc::SYS_write | libc::SYS_openat));
    rows.push(row!(write, SYS_write, When::OneOf(0, &[1, 2]), "the description; messages on standard error"));
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_has_its_reason_and_the_list_compiles() {
        let rows = parent();
        assert!(rows.iter().all(|row| row.why.len() > 3), "a row without a reason");
        bpfgate_lockdown::syscalls::compile(&rows).unwrap();
        bpfgate_lockdown::syscalls::compile(&describer()).unwrap();
        assert!(describer().iter().all(|row| row.name != "bpf" && row.name != "openat"));
    }

    #[test]
    fn nothing_is_executed_and_no_socket_is_made() {
        for name in [
            "execve", "execveat", "socket", "connect", "ptrace", "clone3", "unshare", "setns", "mount",
            "keyctl",
        ] {
            assert!(parent().iter().all(|row| row.name != name), "{name}");
        }
    }
}
