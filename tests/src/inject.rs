//! System calls that a running process makes because the test wants it: what somebody could do who has taken it over.
//!
//! The process is one of the release build, in its own confinement. Every process of bpfgate waits in a system call; it is
//! stopped there by ptrace(2), its registers are set, and it makes the call by the very instruction that it waits behind.
//! seccomp, landlock and the kernel judge that call as any other of the process. Then it goes on as if nothing had been.
//!
//! x86_64 only: elsewhere registers have other names.

use crate::process::Process;
use crate::{SOON, wait_until};
use nix::errno::Errno;
use nix::libc::user_regs_struct as Registers;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// The instruction `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// What the kernel leaves in the register of the result where a call has been interrupted that is to be made again, and that
/// is not to be (include/linux/errno.h). Outside of a stop nobody sees them.
const AGAIN: [i64; 3] = [-512, -513, -514];
const NOT_AGAIN: i64 = -516;

/// Below the stack pointer functions may keep something that they have not said so of.
const RED_ZONE: u64 = 128;

/// What came of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Came {
    /// It was made, and gave this.
    Gave(i64),
    /// It failed.
    Failed(Errno),
    /// It was the end of the process.
    Killed(Signal),
}

impl Came {
    /// The descriptor, address or number that a call has to have given.
    pub fn given(self) -> u64 {
        match self {
            Self::Gave(result) => result.cast_unsigned(),
            other => panic!("the call was not made: {other:?}"),
        }
    }
}

/// A process that was taken over, until this is dropped.
#[derive(Debug)]
pub struct Taken {
    pid: Pid,
    memory: File,
    /// As they were.
    registers: Registers,
    /// Everything below is free.
    free: u64,
    gone: bool,
}

impl Taken {
    /// Stops a process where it waits.
    pub fn over(process: &Process) -> Self {
        assert!(process.is_alive(), "{process:?} has ended");
        let pid = Pid::from_raw(process.pid);
        let memory = File::options().read(true).write(true).open(format!("/proc/{pid}/mem"));
        let memory = memory.expect("root may look into it");
        ptrace::seize(pid, ptrace::Options::PTRACE_O_TRACESYSGOOD).expect("root may trace it");
        let mut waits = None;
        // It may be about to wait only.
        let stopped = wait_until(SOON, || {
            ptrace::interrupt(pid).expect("it is traced");
            wait_for(pid);
            let registers = ptrace::getregs(pid).expect("it has stopped");
            let mut instruction = [0; 2];
            memory.read_exact_at(&mut instruction, registers.rip - 2).expect("its text");
            if instruction == SYSCALL && registers.orig_rax.cast_signed() >= 0 {
                waits = Some(registers);
            } else {
                ptrace::cont(pid, None).expect("it has stopped");
            }
            waits.is_some()
        });
        assert!(stopped, "{process:?} does not wait");
        let registers = waits.expect("it waits");
        Self { pid, memory, registers, free: (registers.rsp - RED_ZONE) & !15, gone: false }
    }

    /// Puts bytes into its memory; gives their address.
    pub fn put(&mut self, bytes: &[u8]) -> u64 {
        self.free = (self.free - bytes.len() as u64) & !15;
        self.memory.write_all_at(bytes, self.free).expect("its stack");
        self.free
    }

    /// The same for a path.
    pub fn text(&mut self, text: impl AsRef<str>) -> u64 {
        self.put(&[text.as_ref().as_bytes(), &[0]].concat())
    }

    /// What stands in its memory.
    pub fn look(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_exact_at(&mut bytes, address).expect("its memory");
        bytes
    }

    /// Has it make a call.
    pub fn call(&mut self, number: i64, arguments: &[u64]) -> Came {
        let made = self.make(number, arguments);
        // The end of a call that is not allowed is told as any other, and only then the signal comes. Nothing is in the way
        // of this one.
        let alive = made.and_then(|result| self.make(libc::SYS_getpid, &[]).map(|_| result));
        let result = match alive {
            Ok(result) => result,
            Err(signal) => {
                self.gone = true;
                return Came::Killed(signal);
            }
        };
        match i32::try_from(-result) {
            Ok(errno @ 1..4096) => Came::Failed(Errno::from_raw(errno)),
            _ => Came::Gave(result),
        }
    }

    /// Runs to the end of a call; gives what stands in the register of the result, or the signal that has ended it.
    fn make(&self, number: i64, arguments: &[u64]) -> Result<i64, Signal> {
        assert!(!self.gone, "the process has ended");
        let argument = |index: usize| arguments.get(index).copied().unwrap_or(0);
        let registers = Registers {
            // Whatever call it waits in is not made again now.
            orig_rax: u64::MAX,
            rip: self.registers.rip - 2,
            rsp: self.free,
            rax: number.cast_unsigned(),
            rdi: argument(0),
            rsi: argument(1),
            rdx: argument(2),
            r10: argument(3),
            r8: argument(4),
            r9: argument(5),
            ..self.registers
        };
        ptrace::setregs(self.pid, registers).expect("it has stopped");
        self.goes_on()?;
        self.goes_on()?;
        Ok(ptrace::getregs(self.pid).expect("it has stopped").rax.cast_signed())
    }

    /// Runs to the next beginning or end of a call.
    fn goes_on(&self) -> Result<(), Signal> {
        let mut signal = None;
        loop {
            ptrace::syscall(self.pid, signal).expect("it has stopped");
            match wait_for(self.pid) {
                WaitStatus::PtraceSyscall(_) => return Ok(()),
                WaitStatus::Signaled(_, signal, _) => return Err(signal),
                // Such as that a child has ended.
                WaitStatus::Stopped(_, other) => signal = Some(other),
                WaitStatus::PtraceEvent(..) => signal = None,
                other => panic!("{other:?}"),
            }
        }
    }
}

fn wait_for(pid: Pid) -> WaitStatus {
    waitpid(pid, Some(WaitPidFlag::__WALL)).expect("it is traced")
}

impl Drop for Taken {
    fn drop(&mut self) {
        if self.gone {
            return;
        }
        let mut registers = self.registers;
        match registers.rax.cast_signed() {
            result if AGAIN.contains(&result) => {
                (registers.rax, registers.rip) = (registers.orig_rax, registers.rip - 2);
            }
            NOT_AGAIN => registers.rax = i64::from(-libc::EINTR).cast_unsigned(),
            _ => {}
        }
        registers.orig_rax = u64::MAX;
        let back = ptrace::setregs(self.pid, registers).and_then(|()| ptrace::detach(self.pid, None));
        if let Err(errno) = back
            && !std::thread::panicking()
        {
            panic!("{} cannot be let go of: {errno}", self.pid);
        }
    }
}
