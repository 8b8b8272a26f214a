//! What a process that was taken over can still do, tried from inside: the running broker, helper, loader and worker make
//! calls that none of them would make, in their own confinement. Every number and argument of the lists is in
//! `attack_syscalls`; here are those that an attacker wants, and what seccomp alone does not decide.
//!
//! The outcome stands in docs/threat-model.md, as these tests have it.

use bpfgate_client::{Map, UpdateMode};
use bpfgate_protocol::channel::receive;
use bpfgate_tests::gate::{MINIMAL, WITH_MAP};
use bpfgate_tests::inject::{Came, Taken};
use bpfgate_tests::invariants::Baseline;
use bpfgate_tests::process::{self, Process, Role};
use bpfgate_tests::second::Second;
use bpfgate_tests::{Gate, Raw, SOON, STRANGER, as_user, is_kernel, needs_root, wait_until, workspace};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::socket::MsgFlags;
use serde_json::json;
use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;

/// Who was taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Broker,
    Helper,
    Loader,
    Worker,
}

/// In the order of the columns.
const VICTIMS: [Victim; 4] = [Victim::Broker, Victim::Helper, Victim::Loader, Victim::Worker];

/// What comes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Killed,
    Fails(Errno),
    Works,
    /// It would be done to the process itself, or there is nothing to do it with.
    Nothing,
}

use Fate::{Fails, Killed, Nothing, Works};

impl Fate {
    fn of(came: Came) -> Self {
        match came {
            Came::Gave(_) => Works,
            Came::Failed(errno) => Fails(errno),
            Came::Killed(Signal::SIGSYS) => Killed,
            Came::Killed(other) => panic!("it was ended by {other}"),
        }
    }

    fn words(self) -> String {
        match self {
            Killed => "killed".to_owned(),
            Fails(errno) => format!("{errno:?}"),
            Works => "works".to_owned(),
            Nothing => "-".to_owned(),
        }
    }
}

/// An argument of a call.
#[derive(Debug, Clone, Copy)]
enum Argument {
    Number(u64),
    Path(&'static str),
    /// A path in the directory of the test.
    Below(&'static str),
    /// Memory that holds zeros.
    Zeros,
    /// The process id of the one of this app, or of who starts helpers.
    Pid(Target),
}

#[derive(Debug, Clone, Copy)]
enum Target {
    Spawner,
    Broker,
    Helper,
    OtherHelper,
    Loader,
}

use Argument::{Below, Number as N, Path, Pid, Zeros};

struct Call {
    name: &'static str,
    number: i64,
    arguments: &'static [Argument],
}

const fn call(name: &'static str, number: i64, arguments: &'static [Argument]) -> Call {
    Call { name, number, arguments }
}

/// Calls of which the same comes.
struct Row {
    id: &'static str,
    what: &'static str,
    calls: &'static [Call],
    fates: [Fate; 4],
}

const NOBODY: [Fate; 4] = [Killed; 4];
const EPERM: Fate = Fails(Errno::EPERM);
const EACCES: Fate = Fails(Errno::EACCES);

const HERE: Argument = N(libc::AT_FDCWD.cast_unsigned() as u64);
const EXECUTE: u64 = (libc::PROT_READ | libc::PROT_EXEC) as u64;
const NEW_USER: u64 = (libc::CLONE_NEWUSER | libc::SIGCHLD) as u64;
const THREAD: u64 = (libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD) as u64;
const FORK: u64 = (libc::CLONE_CHILD_SETTID | libc::CLONE_CHILD_CLEARTID | libc::SIGCHLD) as u64;
/// Bit 30 of a number: the same call as x32 programs make it.
const X32: i64 = 0x4000_0000;
const KILL: Argument = N(libc::SIGKILL as u64);

#[rustfmt::skip]
const ROWS: &[Row] = &[
    Row { id: "SBX-04", what: "executes a program", fates: NOBODY, calls: &[
        call("execve", libc::SYS_execve, &[Path("/bin/true"), Zeros, Zeros]),
        call("execveat", libc::SYS_execveat, &[N(3), Path(""), Zeros, Zeros, N(libc::AT_EMPTY_PATH as u64)]),
    ]},
    Row { id: "SBX-04", what: "makes memory that can be executed", fates: NOBODY, calls: &[
        call("mmap", libc::SYS_mmap, &[N(0), N(4096), N(EXECUTE), N((libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64), N(u64::MAX)]),
        call("mprotect", libc::SYS_mprotect, &[N(0), N(4096), N(EXECUTE)]),
        call("pkey_mprotect", libc::SYS_pkey_mprotect, &[N(0), N(4096), N(EXECUTE), N(u64::MAX)]),
        call("personality", libc::SYS_personality, &[N(libc::READ_IMPLIES_EXEC as u64)]),
        call("shmat", libc::SYS_shmat, &[N(0), N(0), N(libc::SHM_EXEC as u64)]),
    ]},
    Row { id: "SBX-05", what: "looks into another process", fates: NOBODY, calls: &[
        call("ptrace", libc::SYS_ptrace, &[N(libc::PTRACE_SEIZE as u64), Pid(Target::Helper)]),
        call("process_vm_readv", libc::SYS_process_vm_readv, &[Pid(Target::Helper), Zeros, N(1), Zeros, N(1)]),
        call("process_vm_writev", libc::SYS_process_vm_writev, &[Pid(Target::Helper), Zeros, N(1), Zeros, N(1)]),
        call("process_madvise", libc::SYS_process_madvise, &[N(0), Zeros, N(1), N(libc::MADV_COLD as u64)]),
        call("pidfd_open", libc::SYS_pidfd_open, &[Pid(Target::Helper)]),
        call("pidfd_getfd", libc::SYS_pidfd_getfd, &[N(0), N(3)]),
        call("kcmp", libc::SYS_kcmp, &[Pid(Target::Helper), Pid(Target::Helper)]),
    ]},
    Row { id: "SBX-07", what: "makes a process with more than it has, or a thread; changes namespaces", fates: NOBODY, calls: &[
        call("clone(CLONE_NEWUSER)", libc::SYS_clone, &[N(NEW_USER), N(0), Zeros]),
        call("clone(CLONE_THREAD)", libc::SYS_clone, &[N(THREAD), N(0), Zeros]),
        call("clone3", libc::SYS_clone3, &[Zeros, N(64)]),
        call("fork", libc::SYS_fork, &[Zeros]),
        call("vfork", libc::SYS_vfork, &[Zeros]),
        call("unshare", libc::SYS_unshare, &[N(libc::CLONE_NEWUSER as u64)]),
        call("setns", libc::SYS_setns, &[N(0), N(0)]),
    ]},
    Row { id: "SBX-07", what: "makes a process like itself", fates: [Killed, Killed, Works, Killed], calls: &[
        call("clone", libc::SYS_clone, &[N(FORK), N(0), Zeros]),
    ]},
    Row { id: "SBX-08", what: "mounts", fates: NOBODY, calls: &[
        call("mount", libc::SYS_mount, &[Path("none"), Path("/mnt"), Path("tmpfs")]),
        call("umount2", libc::SYS_umount2, &[Path("/mnt")]),
        call("pivot_root", libc::SYS_pivot_root, &[Path("/mnt"), Path("/mnt")]),
        call("chroot", libc::SYS_chroot, &[Path("/mnt")]),
        call("fsopen", libc::SYS_fsopen, &[Path("bpf")]),
        call("fsmount", libc::SYS_fsmount, &[N(0)]),
        call("open_tree", libc::SYS_open_tree, &[HERE, Path("/mnt")]),
        call("move_mount", libc::SYS_move_mount, &[N(0), Path(""), HERE, Path("/mnt")]),
        call("mount_setattr", libc::SYS_mount_setattr, &[HERE, Path("/mnt")]),
    ]},
    // None of them has the capability either; the arguments are such that nobody could do harm by them.
    Row { id: "SBX-10", what: "changes the machine", fates: NOBODY, calls: &[
        call("init_module", libc::SYS_init_module, &[Zeros]),
        call("finit_module", libc::SYS_finit_module, &[N(u64::MAX), Zeros]),
        call("delete_module", libc::SYS_delete_module, &[Path("no such module")]),
        call("kexec_load", libc::SYS_kexec_load, &[N(0), N(u64::MAX)]),
        call("kexec_file_load", libc::SYS_kexec_file_load, &[N(u64::MAX), N(u64::MAX)]),
        call("reboot", libc::SYS_reboot, &[]),
        call("swapon", libc::SYS_swapon, &[Path("/no such file")]),
        call("iopl", libc::SYS_iopl, &[N(4)]),
        call("ioperm", libc::SYS_ioperm, &[N(1 << 20), N(1), N(1)]),
        call("syslog", libc::SYS_syslog, &[N(u64::MAX)]),
        call("settimeofday", libc::SYS_settimeofday, &[N(1), N(1)]),
        call("clock_settime", libc::SYS_clock_settime, &[N(99), Zeros]),
        call("acct", libc::SYS_acct, &[Path("/no such file")]),
        call("quotactl", libc::SYS_quotactl, &[N(u64::MAX)]),
    ]},
    Row { id: "SBX-11", what: "uses keys", fates: NOBODY, calls: &[
        call("add_key", libc::SYS_add_key, &[Path("user"), Path("x"), Zeros, N(1), N(0)]),
        call("request_key", libc::SYS_request_key, &[Path("user"), Path("x")]),
        call("keyctl", libc::SYS_keyctl, &[N(u64::MAX)]),
    ]},
    Row { id: "SBX-13", what: "uses what the kernel has had errors in", fates: NOBODY, calls: &[
        call("userfaultfd", libc::SYS_userfaultfd, &[N(1)]),
        call("perf_event_open", libc::SYS_perf_event_open, &[Zeros, N(0), N(u64::MAX), N(u64::MAX)]),
        call("io_uring_setup", libc::SYS_io_uring_setup, &[N(1), Zeros]),
        call("ioctl(TIOCSTI)", libc::SYS_ioctl, &[N(0), N(libc::TIOCSTI), Zeros]),
        call("ioctl(SIOCSIFFLAGS)", libc::SYS_ioctl, &[N(0), N(libc::SIOCSIFFLAGS), Zeros]),
    ]},
    Row { id: "SBX-13", what: "makes a file in memory", fates: [Killed, Works, Works, Works], calls: &[
        call("memfd_create", libc::SYS_memfd_create, &[Path("x"), N(libc::MFD_CLOEXEC as u64)]),
    ]},
    Row { id: "SBX-14", what: "reaches for programs of others, runs one", fates: NOBODY, calls: &[
        call("bpf(BPF_OBJ_PIN)", libc::SYS_bpf, &[N(6), Zeros, N(128)]),
        call("bpf(BPF_OBJ_GET)", libc::SYS_bpf, &[N(7), Zeros, N(128)]),
        call("bpf(BPF_PROG_TEST_RUN)", libc::SYS_bpf, &[N(10), Zeros, N(128)]),
        call("bpf(BPF_PROG_GET_FD_BY_ID)", libc::SYS_bpf, &[N(13), Zeros, N(128)]),
        call("bpf(BPF_LINK_UPDATE)", libc::SYS_bpf, &[N(29), Zeros, N(128)]),
        call("bpf(BPF_TOKEN_CREATE)", libc::SYS_bpf, &[N(36), Zeros, N(128)]),
    ]},
    Row { id: "SBX-17", what: "calls as x32 programs do", fates: NOBODY, calls: &[
        call("getpid", libc::SYS_getpid | X32, &[]),
        call("openat", libc::SYS_openat | X32, &[HERE, Path("/etc/passwd")]),
        call("bpf", libc::SYS_bpf | X32, &[N(15), Zeros, N(128)]),
        call("execve", libc::SYS_execve | X32, &[Path("/bin/true"), Zeros, Zeros]),
    ]},
    Row { id: "SBX-05", what: "sends a signal in an unusual way", fates: NOBODY, calls: &[
        call("tkill", libc::SYS_tkill, &[Pid(Target::Broker), N(0)]),
        call("pidfd_send_signal", libc::SYS_pidfd_send_signal, &[N(0), N(0)]),
        call("rt_sigqueueinfo", libc::SYS_rt_sigqueueinfo, &[Pid(Target::Broker), N(0), Zeros]),
        call("rt_tgsigqueueinfo", libc::SYS_rt_tgsigqueueinfo, &[Pid(Target::Broker), Pid(Target::Broker), N(0), Zeros]),
    ]},
    Row { id: "SBX-20", what: "signals to the helper", fates: [Killed, Killed, EPERM, Killed], calls: &[
        call("kill", libc::SYS_kill, &[Pid(Target::Helper), KILL]),
    ]},
    Row { id: "SBX-20", what: "signals to the spawner, the broker, the helper of another app", fates: [EPERM; 4], calls: &[
        call("tgkill", libc::SYS_tgkill, &[Pid(Target::Spawner), Pid(Target::Spawner), KILL]),
        call("tgkill", libc::SYS_tgkill, &[Pid(Target::Broker), Pid(Target::Broker), KILL]),
        call("tgkill", libc::SYS_tgkill, &[Pid(Target::OtherHelper), Pid(Target::OtherHelper), KILL]),
    ]},
    Row { id: "SBX-20", what: "signals to the helper", fates: [EPERM, Nothing, EPERM, EPERM], calls: &[
        call("tgkill", libc::SYS_tgkill, &[Pid(Target::Helper), Pid(Target::Helper), KILL]),
    ]},
    Row { id: "SBX-20", what: "signals to the loader", fates: [EPERM, EPERM, Nothing, Works], calls: &[
        call("tgkill", libc::SYS_tgkill, &[Pid(Target::Loader), Pid(Target::Loader), N(0)]),
    ]},
    Row { id: "SBX-13", what: "makes a socket, or uses one for something else", fates: NOBODY, calls: &[
        call("socket(AF_UNIX)", libc::SYS_socket, &[N(libc::AF_UNIX as u64), N(libc::SOCK_STREAM as u64)]),
        call("socket(AF_INET)", libc::SYS_socket, &[N(libc::AF_INET as u64), N(libc::SOCK_DGRAM as u64)]),
        call("socket(AF_NETLINK)", libc::SYS_socket, &[N(libc::AF_NETLINK as u64), N(libc::SOCK_RAW as u64)]),
        call("socketpair", libc::SYS_socketpair, &[N(libc::AF_UNIX as u64), N(libc::SOCK_STREAM as u64), N(0), Zeros]),
        call("bind", libc::SYS_bind, &[N(3), Zeros, N(2)]),
        call("connect", libc::SYS_connect, &[N(3), Zeros, N(2)]),
        call("sendto", libc::SYS_sendto, &[N(3), Zeros, N(1)]),
    ]},
    Row { id: "SBX-20", what: "reads an account", fates: [Works, EACCES, EACCES, EACCES], calls: &[
        call("openat", libc::SYS_openat, &[HERE, Path("/etc/passwd")]),
    ]},
    Row { id: "SBX-20", what: "reads the policy of another app", fates: [Works, EACCES, EACCES, EACCES], calls: &[
        call("openat", libc::SYS_openat, &[HERE, Below("policies/other.toml")]),
    ]},
    Row { id: "SBX-20", what: "opens what root alone may read; an object; a directory; the broker's socket; its own memory as a file; the environment of another process", fates: [EACCES; 4], calls: &[
        call("openat", libc::SYS_openat, &[HERE, Path("/etc/shadow")]),
        call("openat", libc::SYS_openat, &[HERE, Below("objects/minimal.bpf.o")]),
        call("openat", libc::SYS_openat, &[HERE, Path("/"), N(libc::O_DIRECTORY as u64)]),
        call("openat", libc::SYS_openat, &[HERE, Below("socket")]),
        call("openat", libc::SYS_openat, &[HERE, Path("/proc/self/mem")]),
        call("openat", libc::SYS_openat, &[HERE, Path("/proc/1/environ")]),
    ]},
    Row { id: "SBX-20", what: "reads the types of the kernel", fates: [EACCES, EACCES, Works, Works], calls: &[
        call("openat", libc::SYS_openat, &[HERE, Path("/sys/kernel/btf/vmlinux")]),
    ]},
    Row { id: "SBX-20", what: "opens to write, or makes a file", fates: [Killed, EACCES, Killed, Killed], calls: &[
        call("openat(O_WRONLY)", libc::SYS_openat, &[HERE, Path("/dev/null"), N(libc::O_WRONLY as u64)]),
        call("openat(O_CREAT)", libc::SYS_openat, &[HERE, Path("/tmp/bpfgate-inside"), N(libc::O_CREAT as u64), N(0o600)]),
    ]},
    Row { id: "SBX-20", what: "opens, makes, removes, changes files in another way", fates: NOBODY, calls: &[
        call("open", libc::SYS_open, &[Path("/etc/passwd")]),
        call("openat2", libc::SYS_openat2, &[HERE, Path("/etc/passwd"), Zeros, N(24)]),
        call("creat", libc::SYS_creat, &[Path("/tmp/bpfgate-inside"), N(0o600)]),
        call("mkdir", libc::SYS_mkdir, &[Path("/tmp/bpfgate-inside")]),
        call("mknod", libc::SYS_mknod, &[Path("/tmp/bpfgate-inside")]),
        call("link", libc::SYS_link, &[Path("/etc/passwd"), Path("/tmp/bpfgate-inside")]),
        call("symlink", libc::SYS_symlink, &[Path("/etc/passwd"), Path("/tmp/bpfgate-inside")]),
        call("unlink", libc::SYS_unlink, &[Path("/tmp/bpfgate-inside")]),
        call("rename", libc::SYS_rename, &[Path("/tmp/bpfgate-inside"), Path("/tmp/bpfgate-inside")]),
        call("chmod", libc::SYS_chmod, &[Path("/tmp/bpfgate-inside")]),
        call("chown", libc::SYS_chown, &[Path("/tmp/bpfgate-inside")]),
        call("truncate", libc::SYS_truncate, &[Path("/tmp/bpfgate-inside")]),
        call("ftruncate", libc::SYS_ftruncate, &[N(0)]),
        call("setxattr", libc::SYS_setxattr, &[Path("/tmp/bpfgate-inside")]),
    ]},
    Row { id: "SBX-20", what: "takes O_APPEND off the records", fates: NOBODY, calls: &[
        call("fcntl(F_SETFL)", libc::SYS_fcntl, &[N(2), N(libc::F_SETFL as u64)]),
    ]},
    Row { id: "SBX-20", what: "learns that a file is there", fates: [Works; 4], calls: &[
        call("newfstatat", libc::SYS_newfstatat, &[HERE, Path("/etc/shadow"), Zeros, N(libc::AT_SYMLINK_NOFOLLOW as u64)]),
    ]},
    Row { id: "SBX-25", what: "becomes somebody else, gets a capability", fates: NOBODY, calls: &[
        call("setuid", libc::SYS_setuid, &[N(0)]),
        call("setresuid", libc::SYS_setresuid, &[N(0), N(0), N(0)]),
        call("setgid", libc::SYS_setgid, &[N(0)]),
        call("setgroups", libc::SYS_setgroups, &[N(0)]),
        call("capset", libc::SYS_capset, &[Zeros, Zeros]),
        call("prctl(PR_CAP_AMBIENT)", libc::SYS_prctl, &[N(libc::PR_CAP_AMBIENT as u64), N(libc::PR_CAP_AMBIENT_RAISE as u64), N(39)]),
        call("prctl(PR_SET_SECUREBITS)", libc::SYS_prctl, &[N(libc::PR_SET_SECUREBITS as u64)]),
        call("landlock_restrict_self", libc::SYS_landlock_restrict_self, &[N(0)]),
    ]},
    Row { id: "SBX-25", what: "allows itself new privileges", fates: [Killed, Killed, Fails(Errno::EINVAL), Killed], calls: &[
        call("prctl(PR_SET_NO_NEW_PRIVS)", libc::SYS_prctl, &[N(libc::PR_SET_NO_NEW_PRIVS as u64)]),
    ]},
    Row { id: "SBX-25", what: "lets its own user look into it", fates: [Killed, Killed, Works, Killed], calls: &[
        call("prctl(PR_SET_DUMPABLE)", libc::SYS_prctl, &[N(libc::PR_SET_DUMPABLE as u64), N(1)]),
        call("prctl(PR_SET_DUMPABLE)", libc::SYS_prctl, &[N(libc::PR_SET_DUMPABLE as u64), N(0)]),
    ]},
    Row { id: "SBX-25", what: "outlives its parent", fates: [Killed, Killed, Works, Killed], calls: &[
        call("prctl(PR_SET_PDEATHSIG)", libc::SYS_prctl, &[N(libc::PR_SET_PDEATHSIG as u64)]),
    ]},
    Row { id: "SBX-25", what: "changes limits", fates: [Killed, Killed, EACCES, EACCES], calls: &[
        call("prlimit64", libc::SYS_prlimit64, &[N(0), N(0), Zeros]),
    ]},
];

/// A gate with two apps, and those who are taken over.
struct Scene {
    gate: Gate,
    before: Baseline,
    /// A broker that can be lost.
    broker: Option<Second>,
    session: Option<Raw>,
    other: Raw,
}

impl Scene {
    fn new() -> Self {
        let gate = Gate::start();
        gate.policy("app", WITH_MAP);
        gate.policy("other", MINIMAL);
        let before = gate.baseline();
        let other = Raw::open(&gate, "other");
        Self { gate, before, broker: None, session: None, other }
    }

    /// A process in its confinement, and waiting.
    fn victim(&mut self, victim: Victim) -> Process {
        if victim == Victim::Broker {
            let broker = self.broker.get_or_insert_with(|| Second::start(&self.gate, &[], &[]).listens());
            return Process::of(broker.pid()).expect("the broker runs");
        }
        if self.session.is_none() {
            let mut opened = None;
            wait_until(5 * SOON, || {
                let mut raw = Raw::connect(&self.gate, &bpfgate_tests::USER);
                opened = raw.call("Open", &json!({"app": "app"})).is_ok().then_some(raw);
                opened.is_some()
            });
            self.session = opened;
            assert!(self.session.is_some(), "no helper is started:\n{}", self.gate.log());
        }
        let [helper, loader, worker] = self.gate.helper("app");
        match victim {
            Victim::Worker => {
                // A new one is not confined at once: it has the filters of its parent, and then two of its own.
                let filters = |of: &Process| process::number(of.pid, "Seccomp_filters");
                assert!(wait_until(SOON, || filters(&worker) == filters(&loader) + 2), "{worker:?}");
                worker
            }
            Victim::Loader => loader,
            Victim::Broker | Victim::Helper => helper,
        }
    }

    /// What is to be done when one of them has ended, or is not what it was.
    fn lost(&mut self, victim: Victim) {
        match victim {
            Victim::Broker => self.broker = None,
            Victim::Worker => {}
            Victim::Helper => self.session = None,
            // It is not started again, but with its helper.
            Victim::Loader => {
                let helper = self.gate.find(&Role::Helper("app".to_owned())).expect("it outlives its loader");
                self.gate.kill(&helper);
                self.session = None;
            }
        }
    }

    fn pid(&self, target: Target) -> u64 {
        let helper = |app: &str| self.gate.find(&Role::Helper(app.to_owned())).map(|helper| helper.pid);
        let pid = match target {
            Target::Spawner => self.gate.find(&Role::Spawner).map(|spawner| spawner.pid),
            Target::Broker => Some(self.gate.broker.pid),
            Target::Helper => helper("app"),
            Target::OtherHelper => helper("other"),
            Target::Loader => Some(self.gate.helper("app")[1].pid),
        };
        u64::try_from(pid.expect("it runs")).unwrap()
    }

    /// Has a process make a call; gives what comes of it, when nothing is left of it.
    fn attempt(&mut self, victim: Victim, call: &Call) -> Fate {
        // Whoever it is, the helper is there to be done something to.
        self.victim(Victim::Helper);
        let process = self.victim(victim);
        let numbers: Vec<Option<u64>> = call
            .arguments
            .iter()
            .map(|argument| match argument {
                Pid(target) => Some(self.pid(*target)),
                N(number) => Some(*number),
                Path(_) | Below(_) | Zeros => None,
            })
            .collect();
        let before = descriptors(&process);
        let mut taken = Taken::over(&process);
        let mut arguments = Vec::new();
        for (argument, number) in call.arguments.iter().zip(numbers) {
            arguments.push(match argument {
                Path(path) => taken.text(path),
                Below(path) => taken.text(self.gate.dir.join(path).to_str().unwrap()),
                Zeros => taken.put(&[0; 4096]),
                N(_) | Pid(_) => number.unwrap(),
            });
        }
        let came = taken.call(call.number, &arguments);
        let fate = Fate::of(came);
        if fate == Killed {
            drop(taken);
            assert!(wait_until(SOON, || !process.is_alive()), "{process:?} goes on");
            self.lost(victim);
            return fate;
        }
        for new in descriptors(&process).difference(&before) {
            assert_eq!(taken.call(libc::SYS_close, &[*new]), Came::Gave(0));
        }
        drop(taken);
        assert!(process.is_alive(), "{process:?} has ended");
        if let (libc::SYS_clone, Came::Gave(child)) = (call.number, came) {
            // It is a child that its parent does not know of.
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(child.try_into().unwrap()),
                Signal::SIGKILL,
            );
            self.lost(victim);
        }
        fate
    }

    /// Nothing is left, and everybody is served.
    fn end(self) {
        drop((self.broker, self.session, self.other));
        self.gate.invariants(&self.before);
    }
}

fn descriptors(process: &Process) -> BTreeSet<u64> {
    let entries = fs::read_dir(format!("/proc/{}/fd", process.pid)).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// The line of a table.
fn line<'a>(cells: impl IntoIterator<Item = &'a str>) -> String {
    cells.into_iter().fold("|".to_owned(), |line, cell| line + " " + cell + " |")
}

impl Row {
    /// As it stands in the threat model, with what came.
    fn line(&self, fates: &[Fate; 4]) -> String {
        let mut names: Vec<&str> = self.calls.iter().map(|call| call.name).collect();
        names.dedup();
        let what = format!("{}: {}", self.what, names.join(", "));
        let words = fates.map(Fate::words);
        line([self.id, &what].into_iter().chain(words.iter().map(String::as_str)))
    }
}

#[test]
fn each_process_can_do_what_the_table_says() {
    needs_root!();
    let mut scene = Scene::new();
    let (mut killed, mut other, mut wrong) = (0, 0, Vec::new());
    // landlock ABI 6; before it signals go to whatever has the same user.
    let scoped = is_kernel((6, 12), "that signals stay among a process's own");
    for row in ROWS.iter().filter(|row| scoped || !row.what.starts_with("signals")) {
        let mut fates = row.fates;
        for (place, victim) in VICTIMS.into_iter().enumerate() {
            for call in row.calls.iter().filter(|_| row.fates[place] != Nothing) {
                let fate = scene.attempt(victim, call);
                *if fate == Killed { &mut killed } else { &mut other } += 1;
                if fate != row.fates[place] {
                    wrong.push(format!("{victim:?}: {} ({}): {fate:?}", call.name, row.what));
                    fates[place] = fate;
                }
            }
        }
        println!("{}", row.line(&fates));
    }
    println!("{killed} calls ended their process, {other} did not");
    assert!(wrong.is_empty(), "{wrong:#?}");
    scene.end();
}

/// Policies by what their helpers hold.
const HELPERS: [(&str, &str); 3] = [
    (
        "plain",
        "{client}\n[objects.o]\n{object:sockfilter}\n[[objects.o.socket_filter]]\nprogram = \"keep_all\"\n",
    ),
    ("network", WITH_MAP),
    (
        "trace",
        "{client}\n[objects.o]\n{object:rawtp}\n[[objects.o.raw_tracepoint]]\nprogram = \"on_exit\"\n\
         events = [\"sched_process_exit\"]\n",
    ),
];

/// `union bpf_attr` as words.
type Attributes = [u64; 16];

/// What a helper is made to do beyond its policy.
struct Beyond {
    what: &'static str,
    /// Where the instructions are, if there are any.
    attributes: fn(u64) -> (u64, Attributes),
    program: &'static [u64],
    fates: [Fate; 3],
}

const MAP_CREATE: u64 = 0;
const PROG_LOAD: u64 = 5;
const LINK_CREATE: u64 = 28;

/// The index of every network namespace's own interface.
const LOOPBACK: u64 = 1;

/// `r0 = 2; exit`: as XDP it lets packets pass.
const PASS: &[u64] = &[0xb7 | 2 << 32, 0x95];

/// `bpf_send_signal(0)`, which takes a grant.
const SIGNAL: &[u64] = &[0xb7 | 1 << 8, 0x85 | 109 << 32, 0xb7, 0x95];

/// `bpf_probe_read_kernel(stack, 8, 0xffff888000000000)`.
const READ: &[u64] = &[
    0xbf | 0xa1 << 8,                  // r1 = r10
    0x07 | 1 << 8 | 0xffff_fff8 << 32, // r1 += -8
    0xb7 | 2 << 8 | 8 << 32,           // r2 = 8
    0x18 | 3 << 8,                     // r3 = ... ll
    0xffff_8880 << 32,
    0x85 | 113 << 32,
    0xb7,
    0x95,
];

fn load(program_type: u64, instructions: u64, count: usize) -> (u64, Attributes) {
    let mut attributes = [0; 16];
    attributes[0] = program_type | (count as u64) << 32;
    attributes[1] = instructions;
    (PROG_LOAD, attributes)
}

fn map(map_type: u64, value: u64, entries: u64) -> (u64, Attributes) {
    let mut attributes = [0; 16];
    (attributes[0], attributes[1]) = (map_type | 4 << 32, value | entries << 32);
    (MAP_CREATE, attributes)
}

#[rustfmt::skip]
const BEYOND: &[Beyond] = &[
    Beyond { what: "a socket filter", program: PASS, attributes: |at| load(1, at, PASS.len()), fates: [Works; 3] },
    Beyond { what: "an XDP program of other instructions", program: PASS, attributes: |at| load(6, at, PASS.len()), fates: [EPERM, Works, EPERM] },
    Beyond { what: "a tc program", program: PASS, attributes: |at| load(3, at, PASS.len()), fates: [EPERM, Works, EPERM] },
    Beyond { what: "a program for raw tracepoints that reads any memory of the kernel", program: READ, attributes: |at| load(17, at, READ.len()), fates: [EPERM, EPERM, Works] },
    Beyond { what: "one that sends signals", program: SIGNAL, attributes: |at| load(17, at, SIGNAL.len()), fates: [EPERM, EPERM, Works] },
    Beyond { what: "a map of programs", program: &[], attributes: |_| map(3, 4, 1), fates: [Works; 3] },
    Beyond { what: "a map of sockets", program: &[], attributes: |_| map(15, 4, 1), fates: [EPERM, Works, EPERM] },
    // 80 MiB, where [limits] map_memory is 64 MiB.
    Beyond { what: "a map beyond the limits of the policy", program: &[], attributes: |_| map(2, 4, 10 << 20), fates: [Works; 3] },
];

impl Beyond {
    fn line(&self, fates: &[Fate; 3]) -> String {
        let words = fates.map(Fate::words);
        line([self.what].into_iter().chain(words.iter().map(String::as_str)))
    }

    /// Has a helper do it; gives what came, and the descriptor that it has then.
    fn tried(&self, taken: &mut Taken) -> (Fate, Option<u64>) {
        let license = taken.text("GPL");
        let program: Vec<u8> = self.program.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let (command, mut attributes) = (self.attributes)(taken.put(&program));
        if command == PROG_LOAD {
            attributes[2] = license;
        }
        let came = bpf(taken, command, &attributes);
        (Fate::of(came), matches!(came, Came::Gave(_)).then(|| came.given()))
    }
}

fn bpf(taken: &mut Taken, command: u64, attributes: &Attributes) -> Came {
    let bytes: Vec<u8> = attributes.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let at = taken.put(&bytes);
    taken.call(libc::SYS_bpf, &[command, at, bytes.len() as u64])
}

/// SBX-35. What stands between a helper that was taken over and the kernel are its capabilities: at level L0 nobody asks
/// its policy.
#[test]
fn a_helper_can_load_what_its_capabilities_allow() {
    needs_root!();
    let gate = Gate::start();
    for (app, policy) in HELPERS {
        gate.policy(app, policy);
    }
    let before = gate.baseline();
    let sessions = HELPERS.map(|(app, _)| Raw::open(&gate, app));
    let helpers = HELPERS.map(|(app, _)| gate.helper(app)[0].clone());
    for beyond in BEYOND {
        let fates = helpers.each_ref().map(|helper| {
            let mut taken = Taken::over(helper);
            let (fate, descriptor) = beyond.tried(&mut taken);
            if let Some(descriptor) = descriptor {
                assert_eq!(taken.call(libc::SYS_close, &[descriptor]), Came::Gave(0));
            }
            fate
        });
        println!("{}", beyond.line(&fates));
        assert_eq!(fates, beyond.fates, "{}", beyond.what);
    }
    // And the one with CAP_NET_ADMIN attaches, in its network namespace.
    let mut taken = Taken::over(&helpers[1]);
    let (_, program) = BEYOND[1].tried(&mut taken);
    let mut attributes = [0; 16];
    attributes[0] = program.unwrap() | LOOPBACK << 32;
    attributes[1] = 37; // BPF_XDP
    let link = bpf(&mut taken, LINK_CREATE, &attributes).given();
    assert_eq!(process::links(helpers[1].pid), 1);
    for descriptor in [link, program.unwrap()] {
        assert_eq!(taken.call(libc::SYS_close, &[descriptor]), Came::Gave(0));
    }
    drop(taken);
    drop(sessions);
    gate.invariants(&before);
}

/// `struct msghdr` of one byte and a descriptor, to an address if there is one.
fn message(taken: &mut Taken, address: &[u8], descriptor: u64) -> u64 {
    let name = taken.put(address);
    let byte = taken.put(b"x");
    let bytes = |words: &[u64]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
    let part = taken.put(&bytes(&[byte, 1]));
    // struct cmsghdr: 20 bytes, SOL_SOCKET, SCM_RIGHTS.
    let rights = taken.put(&bytes(&[20, 1 | 1 << 32, descriptor]));
    let name = if address.is_empty() { 0 } else { name };
    taken.put(&bytes(&[name, address.len() as u64, part, 1, rights, 24, 0]))
}

/// A process that could send a datagram to a socket of its choice could hand programs to anybody, and write records into
/// the journal.
#[test]
fn nothing_is_sent_but_by_the_channels() {
    needs_root!();
    let mut scene = Scene::new();
    let path = scene.gate.dir.join("letters");
    let letters = UnixDatagram::bind(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    letters.set_nonblocking(true).unwrap();
    let address = [&[1, 0], path.to_str().unwrap().as_bytes(), &[0]].concat();
    for victim in VICTIMS {
        let process = scene.victim(victim);
        let mut taken = Taken::over(&process);
        for descriptor in descriptors(&process) {
            let message = message(&mut taken, &address, 0);
            let flags = (libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) as u64;
            let came = taken.call(libc::SYS_sendmsg, &[descriptor, message, flags]);
            assert_eq!(letters.recv(&mut [0; 8]).ok(), None, "{victim:?} by {descriptor}: {came:?}");
        }
        drop(taken);
        // Whoever got something by a channel does not trust that process any more.
        scene.lost(victim);
        scene.session = None;
    }
    // This is how it would look.
    UnixDatagram::unbound().unwrap().send_to(b"x", &path).unwrap();
    assert_eq!(letters.recv(&mut [0; 8]).ok(), Some(1));
    scene.end();
}

/// What was recorded and logged stays; where there is no service manager, processes share the log, and may add to it.
#[test]
fn records_and_lines_of_the_log_stay() {
    needs_root!();
    let mut scene = Scene::new();
    let log = scene.gate.dir.join("output");
    let shell = ["sh", "-c", "exec \"$@\" > \"$0\" 2>&1", log.to_str().unwrap()];
    scene.broker = Some(Second::start(&scene.gate, &shell, &[]).listens());
    let broker = scene.victim(Victim::Broker);
    let second = scene.broker.as_ref().unwrap();
    second.connect(&STRANGER).refused("Open", &json!({"app": "app"}), "Denied");
    let audit = second.audit.clone();
    let [log_before, audit_before] = [&log, &audit].map(|path| fs::read_to_string(path).unwrap());
    assert!(!log_before.is_empty() && !audit_before.is_empty());
    let mut taken = Taken::over(&broker);
    let text = taken.put(b"+broker");
    for descriptor in descriptors(&broker) {
        let link = fs::read_link(format!("/proc/{}/fd/{descriptor}", broker.pid)).unwrap();
        if link == log || link == audit {
            assert_eq!(taken.call(libc::SYS_lseek, &[descriptor, 0, 0]), Came::Gave(0));
            assert_eq!(taken.call(libc::SYS_write, &[descriptor, text, 7]), Came::Gave(7));
        }
    }
    drop(taken);
    let [log_after, audit_after] = [&log, &audit].map(|path| fs::read_to_string(path).unwrap());
    // Standard output and standard error.
    assert_eq!(log_after, log_before + "+broker+broker");
    assert_eq!(audit_after, audit_before + "+broker");
    scene.lost(Victim::Broker);

    let helper = scene.victim(Victim::Helper);
    let worker = scene.victim(Victim::Worker);
    let before = scene.gate.log();
    let mut taken = Taken::over(&helper);
    let text = taken.put(b"+helper\n");
    assert_eq!(taken.call(libc::SYS_write, &[2, text, 8]), Came::Gave(8));
    drop(taken);
    let mut taken = Taken::over(&worker);
    let text = taken.put(b"+worker\n");
    assert_eq!(taken.call(libc::SYS_dup3, &[2, 60, libc::O_CLOEXEC as u64]), Came::Gave(60));
    assert_eq!(taken.call(libc::SYS_pwrite64, &[60, text, 8, 0]), Came::Gave(8));
    assert_eq!(taken.call(libc::SYS_close, &[60]), Came::Gave(0));
    drop(taken);
    assert_eq!(scene.gate.log(), before + "+helper\n+worker\n");
    scene.end();
}

/// A filter can be added to those that are there, by the parent of the worker, which does so for each of them. It takes
/// away what it does, and gives nothing.
#[test]
fn another_filter_allows_nothing_more() {
    needs_root!();
    let mut scene = Scene::new();
    let loader = scene.victim(Victim::Loader);
    let mut taken = Taken::over(&loader);
    // SECCOMP_RET_ALLOW, whatever the call is; struct sock_fprog.
    let program = taken.put(&[6, 0, 0, 0, 0, 0, 0xff, 0x7f]);
    let filter = taken.put(&[1u64.to_ne_bytes(), program.to_ne_bytes()].concat());
    let set = u64::from(libc::SECCOMP_SET_MODE_FILTER);
    assert_eq!(taken.call(libc::SYS_seccomp, &[set, 0, filter]), Came::Gave(0));
    assert_eq!(taken.call(libc::SYS_execve, &[0, 0, 0]), Came::Killed(Signal::SIGSYS));
    drop(taken);
    scene.lost(Victim::Loader);
    scene.end();
}

/// What the maps of connected clients are is the broker's to say: they come through it.
#[test]
fn a_broker_can_give_the_maps_of_a_client_to_another() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", WITH_MAP);
    let before = gate.baseline();
    let mut owner = Raw::open(&gate, "app");
    owner.ask("Load", &json!({"object": "o"}));
    // The second reply with descriptors waits until the first is read: here the broker has one at hand.
    owner.ask("Map", &json!({"instance": 1, "name": "counts"}));
    let links = || {
        let link = |number: &u64| fs::read_link(format!("/proc/{}/fd/{number}", gate.broker.pid));
        let all = descriptors(&gate.broker);
        all.into_iter()
            .filter_map(|number| Some((number, link(&number).ok()?.display().to_string())))
            .collect()
    };
    let mut all: Vec<(u64, String)> = links();
    let held = |all: &[(u64, String)]| {
        all.iter().find(|(_, link)| link.contains("bpf-map")).map(|(number, _)| *number)
    };
    assert!(
        wait_until(SOON, || {
            all = links();
            held(&all).is_some()
        }),
        "{all:?}"
    );
    let map = held(&all).unwrap();
    let stranger = Raw::connect(&gate, &STRANGER);
    let mut new = None;
    wait_until(SOON, || {
        new = links().into_iter().find(|one| !all.contains(one));
        new.is_some()
    });
    let (socket, _) = new.expect("the connection");
    let mut taken = Taken::over(&gate.broker);
    let message = message(&mut taken, &[], map);
    assert_eq!(taken.call(libc::SYS_sendmsg, &[socket, message, 0]), Came::Gave(1));
    drop(taken);
    let got = receive(stranger.stream.as_fd(), &mut [0; 8], MsgFlags::empty()).unwrap();
    let map = as_user(&STRANGER, || Map::new(got.fds.into_iter().next().unwrap()).unwrap());
    as_user(&STRANGER, || map.update(&[0; 4], &[7; 8], UpdateMode::Any)).unwrap();
    owner.reply().unwrap();
    let (_, maps) = owner.reply().unwrap();
    let same = Map::new(maps.into_iter().next().unwrap()).unwrap();
    assert_eq!(same.lookup(&[0; 4]).unwrap(), Some(vec![7; 8]));
    drop((owner, stranger, map, same));
    gate.invariants(&before);
}

#[test]
fn the_threat_model_has_what_came() {
    let document = workspace().join("docs/threat-model.md");
    if !document.exists() {
        println!("skipped: this machine has no source to look at");
        return;
    }
    let text = fs::read_to_string(document).unwrap();
    let lines = ROWS.iter().map(|row| row.line(&row.fates));
    let lines = lines.chain(BEYOND.iter().map(|beyond| beyond.line(&beyond.fates)));
    let missing: Vec<String> = lines.filter(|line| !text.contains(line.as_str())).collect();
    assert!(missing.is_empty(), "these are not there:\n{}", missing.join("\n"));
}
