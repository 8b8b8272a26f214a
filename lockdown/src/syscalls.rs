//! seccomp: filters made from rows. A system call that has no row ends the process.

use crate::{Fatal, Step};
pub use seccompiler::BpfProgram as Program;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter,
};
use std::collections::BTreeMap;

/// One system call that a process may make, and why.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// Its number on this architecture.
    pub number: i64,
    /// Its name.
    pub name: &'static str,
    /// What its arguments must be.
    pub when: When,
    /// Why the process needs it.
    pub why: &'static str,
}

/// A condition on arguments. Those that the kernel takes as 32 bits are compared as 32 bits: the upper half does not
/// reach the kernel's decision and must not reach ours.
#[derive(Debug, Clone, Copy)]
pub enum When {
    /// Any arguments.
    Always,
    /// The argument is one of these, as 32 bits.
    OneOf(u8, &'static [u32]),
    /// The argument is not this, as 32 bits.
    Except(u8, u32),
    /// None of these bits is set in the argument.
    Without(u8, u64),
    /// Any arguments; but the call is not made: it fails with this errno.
    Fails(i32),
}

/// Makes a [`Row`]: `row!(close, SYS_close, When::Always, "why")`. The crate that uses it needs libc.
#[macro_export]
macro_rules! row {
    ($name:ident, $number:ident, $when:expr, $why:literal) => {
        $crate::syscalls::Row { number: ::libc::$number, name: stringify!($name), when: $when, why: $why }
    };
}

/// The two programs of a list of rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filters {
    /// What fails softly; the rest is allowed.
    pub soft: BpfProgram,
    /// What is allowed at all; the rest ends the process.
    pub hard: BpfProgram,
}

/// Makes them.
pub fn compile(rows: &[Row]) -> Result<Filters, Fatal> {
    let mut allowed: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut soft: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut errno = libc::EACCES;
    for row in rows {
        let (rules, fails) = match row.when {
            When::Always => (vec![], None),
            When::Fails(errno) => (vec![], Some(errno)),
            When::OneOf(argument, values) => {
                let one = |&value: &u32| {
                    rule(SeccompCondition::new(
                        argument,
                        SeccompCmpArgLen::Dword,
                        SeccompCmpOp::Eq,
                        u64::from(value),
                    ))
                };
                (values.iter().map(one).collect::<Result<_, _>>()?, None)
            }
            When::Except(argument, value) => {
                let other = SeccompCondition::new(
                    argument,
                    SeccompCmpArgLen::Dword,
                    SeccompCmpOp::Ne,
                    u64::from(value),
                );
                (vec![rule(other)?], None)
            }
            When::Without(argument, bits) => {
                let none =
                    SeccompCondition::new(argument, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(bits), 0);
                (vec![rule(none)?], None)
            }
        };
        if allowed.insert(row.number, rules).is_some() {
            return Err(Fatal(format!("seccomp: two rows for {}", row.name)));
        }
        if let Some(number) = fails {
            if !soft.is_empty() && number != errno {
                return Err(Fatal("seccomp: one errno for all soft failures".into()));
            }
            errno = number;
            soft.insert(row.number, vec![]);
        }
    }
    let errno = SeccompAction::Errno(u32::try_from(errno).step("seccomp: errno")?);
    let arch = std::env::consts::ARCH.try_into().step("seccomp: architecture")?;
    let soft = SeccompFilter::new(soft, SeccompAction::Allow, errno, arch).step("seccomp: soft filter")?;
    let hard = SeccompFilter::new(allowed, SeccompAction::KillProcess, SeccompAction::Allow, arch)
        .step("seccomp: filter")?;
    Ok(Filters {
        soft: soft.try_into().step("seccomp: soft filter")?,
        hard: hard.try_into().step("seccomp: filter")?,
    })
}

fn rule(condition: Result<SeccompCondition, seccompiler::BackendError>) -> Result<SeccompRule, Fatal> {
    SeccompRule::new(vec![condition.step("seccomp: condition")?]).step("seccomp: rule")
}

/// So many filters a process gets here, on top of those that it was born with.
pub const FILTERS: u32 = 2;

/// Installs both filters; from here on a call without a row ends the process. Gives the number of filters.
pub fn restrict(rows: &[Row]) -> Result<u32, Fatal> {
    compile(rows)?.install()?;
    Ok(FILTERS)
}

impl Filters {
    /// Installs both, with `NO_NEW_PRIVS`.
    pub fn install(&self) -> Result<(), Fatal> {
        apply_filter(&self.soft).step("seccomp: installing the soft filter")?;
        apply_filter(&self.hard).step("seccomp: installing the filter")
    }
}

#[cfg(test)]
#[allow(unsafe_code)]
mod tests {
    use super::*;
    use crate::process::{SingleThread, exit_now};
    use nix::sys::signal::Signal;
    use nix::sys::wait::{WaitStatus, waitpid};

    const ROWS: [Row; 4] = [
        row!(exit_group, SYS_exit_group, When::Always, "the end"),
        row!(fcntl, SYS_fcntl, When::OneOf(1, &[libc::F_GETFD as u32, libc::F_GETFL as u32]), "test"),
        row!(mmap, SYS_mmap, When::Without(2, libc::PROT_EXEC as u64), "test"),
        row!(openat, SYS_openat, When::Fails(libc::EACCES), "test"),
    ];

    /// What becomes of a child that makes this call under the filter: its errno, or that it was killed.
    fn verdict(number: i64, arguments: [u64; 4]) -> Result<i32, Signal> {
        let filters = compile(&ROWS).unwrap();
        let child = crate::process::fork(SingleThread::for_tests()).unwrap();
        let nix::unistd::ForkResult::Parent { child } = child else {
            if filters.install().is_err() {
                exit_now(255);
            }
            // SAFETY: the calls of this test use no memory of this process: descriptors, lengths and flags only.
            let result = unsafe {
                libc::syscall(number, arguments[0], arguments[1], arguments[2], arguments[3], 0, 0)
            };
            exit_now(if result < 0 { nix::errno::Errno::last_raw() } else { 0 })
        };
        match waitpid(child, None).unwrap() {
            WaitStatus::Exited(_, status) => Ok(status),
            WaitStatus::Signaled(_, signal, _) => Err(signal),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_call_without_a_row_ends_the_process() {
        const X32: i64 = 0x4000_0000;
        let killed = Err(Signal::SIGSYS);
        assert_eq!(verdict(libc::SYS_getppid, [0; 4]), killed);
        assert_eq!(verdict(libc::SYS_execve, [0; 4]), killed);
        assert_eq!(verdict(libc::SYS_fcntl | X32, [0; 4]), killed);
        assert_eq!(verdict(9999, [0; 4]), killed);
    }

    #[test]
    fn arguments_are_compared_as_the_kernel_takes_them() {
        let (getfd, setfd) = (libc::F_GETFD as u64, libc::F_SETFD as u64);
        assert_eq!(verdict(libc::SYS_fcntl, [9999, getfd, 0, 0]), Ok(libc::EBADF));
        assert_eq!(verdict(libc::SYS_fcntl, [9999, setfd, 0, 0]), Err(Signal::SIGSYS));
        // The upper half of a 32-bit argument does not reach the kernel, and changes nothing here.
        assert_eq!(verdict(libc::SYS_fcntl, [9999, getfd | 1 << 32, 0, 0]), Ok(libc::EBADF));
        assert_eq!(verdict(libc::SYS_fcntl, [9999, setfd | 1 << 32, 0, 0]), Err(Signal::SIGSYS));
        let page = 4096;
        assert_eq!(verdict(libc::SYS_mmap, [0, page, libc::PROT_READ as u64, 0]), Ok(libc::EINVAL));
        assert_eq!(
            verdict(libc::SYS_mmap, [0, page, (libc::PROT_READ | libc::PROT_EXEC) as u64, 0]),
            Err(Signal::SIGSYS)
        );
    }

    #[test]
    fn a_soft_row_fails_and_does_not_end_the_process() {
        assert_eq!(verdict(libc::SYS_openat, [0; 4]), Ok(libc::EACCES));
    }

    #[test]
    fn a_list_with_two_rows_for_one_call_is_refused() {
        let twice = [ROWS[0], ROWS[0]];
        assert!(compile(&twice).is_err());
    }
}
