//! seccomp: filters made from rows. A system call that has no row ends the process.

use crate::{Fatal, Step};
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

/// The two programs of a list of rows: what fails softly, and what is allowed at all.
pub fn compile(rows: &[Row]) -> Result<(BpfProgram, BpfProgram), Fatal> {
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
    Ok((soft.try_into().step("seccomp: soft filter")?, hard.try_into().step("seccomp: filter")?))
}

fn rule(condition: Result<SeccompCondition, seccompiler::BackendError>) -> Result<SeccompRule, Fatal> {
    SeccompRule::new(vec![condition.step("seccomp: condition")?]).step("seccomp: rule")
}

/// Installs both filters; from here on a call without a row ends the process. Gives the number of filters.
pub fn restrict(rows: &[Row]) -> Result<u32, Fatal> {
    let (soft, hard) = compile(rows)?;
    apply_filter(&soft).step("seccomp: installing the soft filter")?;
    apply_filter(&hard).step("seccomp: installing the filter")?;
    Ok(2)
}
