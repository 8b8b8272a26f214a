//! The system calls of the helper, each with its reason. What is not here ends the process.

use bpfgate_bpf::uapi::cmd;
use bpfgate_lockdown::row;
use bpfgate_lockdown::syscalls::{Row, When};
use bpfgate_protocol::pidfd;

const PROT_EXEC: u64 = libc::PROT_EXEC as u64;
#[allow(clippy::cast_possible_truncation)] // an ioctl number has 32 bits
const SIOCGIFINDEX: u32 = libc::SIOCGIFINDEX as u32;

/// The commands of bpf(2), each with its reason. None takes an id, a path or another process's descriptor; none runs
/// a program.
pub(crate) const BPF: [(u32, &str); 10] = [
    (cmd::MAP_CREATE, "maps of an object"),
    (cmd::MAP_LOOKUP_ELEM, "ReadMap"),
    (cmd::MAP_GET_NEXT_KEY, "ReadMap"),
    (cmd::PROG_LOAD, "programs of an object"),
    (cmd::OBJ_GET_INFO_BY_FD, "what a map is; the self-test"),
    (cmd::RAW_TRACEPOINT_OPEN, "attach to raw tracepoints"),
    (cmd::BTF_LOAD, "types of an object"),
    (cmd::MAP_FREEZE, "maps that are handed out frozen"),
    (cmd::LINK_CREATE, "attach to everything else"),
    (cmd::LINK_DETACH, "detach a link that a client holds too"),
];

const BPF_COMMANDS: [u32; BPF.len()] = {
    let mut commands = [0; BPF.len()];
    let mut i = 0;
    while i < BPF.len() {
        commands[i] = BPF[i].0;
        i += 1;
    }
    commands
};

/// Options of a client's socket.
const IDENTITY: [u32; 5] = [
    libc::SO_PEERCRED as u32,
    libc::SO_PEERGROUPS as u32,
    libc::SO_PEERPIDFD as u32,
    libc::SO_TYPE as u32,
    libc::SO_ACCEPTCONN as u32,
];

/// A path that is no link, and a descriptor.
const LOOKS: [u32; 2] = [libc::AT_SYMLINK_NOFOLLOW as u32, libc::AT_EMPTY_PATH as u32];

/// The list.
#[rustfmt::skip]
pub(crate) const ROWS: [Row; 26] = [
    row!(bpf, SYS_bpf, When::OneOf(0, &BPF_COMMANDS), "what this process is for"),
    row!(recvmsg, SYS_recvmsg, When::Always, "requests"),
    row!(sendmsg, SYS_sendmsg, When::Always, "answers"),
    row!(ppoll, SYS_ppoll, When::Always, "waits for requests and for clients that go away"),
    row!(getsockname, SYS_getsockname, When::Always, "whether a client came through the broker's socket"),
    row!(close, SYS_close, When::Always, "descriptors"),
    row!(getsockopt, SYS_getsockopt, When::OneOf(2, &IDENTITY), "who a client is"),
    row!(ioctl, SYS_ioctl, When::OneOf(1, &[SIOCGIFINDEX, pidfd::GET_INFO]), "the index of an interface; a client's cgroup"),
    // Paths cannot be told apart here, and no rule of landlock is about stat: who has taken this process over learns
    // which files there are. Without it a policy that was changed would take a new helper, and end every session.
    row!(newfstatat, SYS_newfstatat, When::OneOf(3, &LOOKS), "the cgroup of a unit; whether a file that the broker hands over is the one that root has put there"),
    row!(clock_gettime, SYS_clock_gettime, When::Always, "loads in a minute, where the vDSO has no clock"),
    row!(pread64, SYS_pread64, When::Always, "parts of a program that are larger than a datagram; a policy that is adopted"),
    row!(memfd_create, SYS_memfd_create, When::Always, "verifier logs that are larger than a datagram"),
    row!(mmap, SYS_mmap, When::Without(2, PROT_EXEC), "memory"),
    row!(munmap, SYS_munmap, When::Always, "memory"),
    row!(mremap, SYS_mremap, When::Always, "memory"),
    row!(brk, SYS_brk, When::Always, "memory"),
    row!(write, SYS_write, When::OneOf(0, &[2]), "messages on standard error"),
    row!(pwrite64, SYS_pwrite64, When::Except(0, 2), "verifier logs that are larger than a datagram"),
    row!(openat, SYS_openat, When::Fails(libc::EACCES), "nothing is opened; the self-test sees that this list is in force"),
    row!(exit_group, SYS_exit_group, When::Always, "the end of the process"),
    row!(rt_sigprocmask, SYS_rt_sigprocmask, When::Always, "abort ends in SIGABRT, not in a broken filter"),
    row!(rt_sigaction, SYS_rt_sigaction, When::Always, "the same, and the report of a stack overflow"),
    row!(rt_sigreturn, SYS_rt_sigreturn, When::Always, "the report of a stack overflow"),
    row!(getpid, SYS_getpid, When::Always, "abort"),
    row!(gettid, SYS_gettid, When::Always, "abort"),
    row!(tgkill, SYS_tgkill, When::Always, "abort"),
];

const F_ADD_SEALS: u32 = libc::F_ADD_SEALS as u32;
const F_GETFD: u32 = libc::F_GETFD as u32;

/// What comes to it under a service manager.
#[rustfmt::skip]
pub(crate) const SERVICE_ROWS: [Row; 4] = [
    row!(accept4, SYS_accept4, When::Always, "brokers come and go"),
    row!(setsockopt, SYS_setsockopt, When::OneOf(2, &[libc::SO_SNDTIMEO as u32]), "a broker that does not read is lost"),
    row!(pipe2, SYS_pipe2, When::Always, "the service manager closes it when it has closed what we detach"),
    row!(fcntl, SYS_fcntl, When::OneOf(1, &[F_ADD_SEALS]), "the record that the service manager keeps"),
];

/// The list as this build needs it.
pub(crate) fn rows(service: bool) -> Vec<Row> {
    let mut rows = ROWS.to_vec();
    if service {
        rows.extend(SERVICE_ROWS);
    }
    if cfg!(debug_assertions) {
        rows.retain(|row| row.name != "fcntl");
        rows.push(row!(
            fcntl,
            SYS_fcntl,
            When::OneOf(1, &[F_GETFD, F_ADD_SEALS]),
            "debug builds of the Rust library check descriptors"
        ));
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
    fn nothing_is_executed_and_no_socket_is_made() {
        for name in [
            "execve", "execveat", "socket", "connect", "ptrace", "clone3", "unshare", "setns", "mount",
            "keyctl",
        ] {
            assert!(rows(true).iter().all(|row| row.name != name), "{name}");
        }
    }

    /// The two sizes are figures of the project: to let them grow is a decision.
    #[test]
    fn the_lists_are_as_short_as_promised() {
        assert!(ROWS.len() <= 26 && BPF.len() <= 12, "{} {}", ROWS.len(), BPF.len());
        assert!(SERVICE_ROWS.len() <= 4);
    }

    #[test]
    fn no_command_takes_an_id_or_a_path() {
        // OBJ_PIN, OBJ_GET, PROG_TEST_RUN, *_GET_NEXT_ID, *_GET_FD_BY_ID, PROG_QUERY, TASK_FD_QUERY, LINK_UPDATE,
        // ENABLE_STATS, ITER_CREATE, TOKEN_CREATE.
        for command in [6, 7, 10, 11, 12, 13, 14, 16, 19, 20, 23, 29, 30, 31, 32, 33, 36] {
            assert!(BPF.iter().all(|(allowed, _)| *allowed != command), "{command}");
        }
        assert!(BPF.iter().all(|(_, why)| !why.is_empty()));
    }
}
