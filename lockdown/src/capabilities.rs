//! User ids, capability sets and securebits.

use crate::{Fatal, Step};
use bpfgate_protocol::hooks::Capability;
use caps::{CapSet, CapsHashSet};
use nix::unistd::{Gid, Uid, geteuid, setgroups, setresgid, setresuid};
use std::collections::BTreeMap;

/// `SECBIT_NOROOT`, `NO_SETUID_FIXUP`, `NO_CAP_AMBIENT_RAISE`, each with its lock, and `KEEP_CAPS_LOCKED` with the
/// bit itself off. uid 0 means nothing, ids do not change sets, nothing is handed on by exec.
/// Source: include/uapi/linux/securebits.h.
const SECUREBITS: libc::c_ulong = 0b1110_1111;

/// Who a process becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    /// Its uid.
    pub uid: u32,
    /// Its only group.
    pub gid: u32,
}

impl User {
    /// A user that no account has: its group has the same number.
    pub fn unnamed(id: u32) -> Self {
        Self { uid: id, gid: id }
    }
}

/// Gives up everything but `keep`: user id (if we are root and one is given), bounding, ambient and inheritable
/// sets, and what else is permitted. Ends with a check of all five sets and of `NO_NEW_PRIVS`.
///
/// Without `CAP_SETPCAP` (a systemd unit) the bounding set and the securebits are what the service manager made them,
/// and the bounding set may hold what helpers may have, and nothing else: after `NO_NEW_PRIVS` nobody gets it from there.
pub fn keep_only(keep: &[Capability], user: Option<User>) -> Result<(), Fatal> {
    reduce_to(keep, user, Bounding::OfHelpers)
}

/// Gives up every capability, in a process that anybody may start. The bounding set of ordinary users is full and stays
/// so: after `NO_NEW_PRIVS` nobody gets anything from there.
pub fn keep_none() -> Result<(), Fatal> {
    reduce_to(&[], None, Bounding::Whatever)
}

/// What may be left in a bounding set that cannot be emptied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bounding {
    /// It was emptied.
    Nothing,
    /// What the service manager leaves there for helpers.
    OfHelpers,
    /// Anything.
    Whatever,
}

fn reduce_to(keep: &[Capability], user: Option<User>, bounding: Bounding) -> Result<(), Fatal> {
    let set: CapsHashSet = keep.iter().map(|capability| raw(*capability)).collect();
    let setpcap =
        caps::has_cap(None, CapSet::Effective, caps::Capability::CAP_SETPCAP).step("reading capabilities")?;
    if setpcap {
        caps::clear(None, CapSet::Bounding).step("emptying the bounding set")?;
        crate::process::set_securebits(SECUREBITS).step("locking the securebits")?;
    }
    if let (true, Some(User { uid, gid })) = (geteuid().is_root(), user) {
        setgroups(&[]).step("dropping supplementary groups")?;
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        setresgid(gid, gid, gid).step("changing the group")?;
        setresuid(uid, uid, uid).step("changing the user")?;
    }
    nix::sys::prctl::set_no_new_privs().step("forbidding new privileges")?;
    let bounding = if setpcap { Bounding::Nothing } else { bounding };
    // A process that was born with the right sets (the broker's unit) may be without the system call to change them.
    if check(keep, bounding).is_ok() {
        return Ok(());
    }
    caps::clear(None, CapSet::Ambient).step("emptying the ambient set")?;
    caps::clear(None, CapSet::Inheritable).step("emptying the inheritable set")?;
    caps::set(None, CapSet::Effective, &set).step("reducing the effective set")?;
    caps::set(None, CapSet::Permitted, &set).step("reducing the permitted set")?;
    check(keep, bounding)
}

/// What a process needs that makes helpers: the capabilities a helper may get, to become another user, to give up
/// its bounding set, to read what the policy names (tracefs is root's), and to end one that hangs.
const TO_MAKE_HELPERS: [caps::Capability; 8] = [
    caps::Capability::CAP_BPF,
    caps::Capability::CAP_PERFMON,
    caps::Capability::CAP_NET_ADMIN,
    caps::Capability::CAP_SETUID,
    caps::Capability::CAP_SETGID,
    caps::Capability::CAP_SETPCAP,
    caps::Capability::CAP_DAC_READ_SEARCH,
    caps::Capability::CAP_KILL,
];

/// The capabilities that a process needs on this machine that makes helpers.
pub fn to_make_helpers() -> CapsHashSet {
    let mut set: CapsHashSet = TO_MAKE_HELPERS.into_iter().collect();
    // Debian and Ubuntu let nobody else open the perf events of tracepoints, which helpers do before they give up
    // everything.
    let paranoid = std::fs::read_to_string("/proc/sys/kernel/perf_event_paranoid").unwrap_or_default();
    if paranoid.trim().parse::<i32>().is_ok_and(|level| level > 2) {
        set.insert(caps::Capability::CAP_SYS_ADMIN);
    }
    set
}

/// Gives up everything that is not needed to make helpers, for this process and all that it starts.
pub fn keep_to_make_helpers() -> Result<(), Fatal> {
    let set = to_make_helpers();
    for other in caps::all().difference(&set) {
        caps::drop(None, CapSet::Bounding, *other).step("reducing the bounding set")?;
    }
    caps::clear(None, CapSet::Ambient).step("emptying the ambient set")?;
    caps::clear(None, CapSet::Inheritable).step("emptying the inheritable set")?;
    caps::set(None, CapSet::Effective, &set).step("reducing the effective set")?;
    caps::set(None, CapSet::Permitted, &set).step("reducing the permitted set")?;
    nix::sys::prctl::set_no_new_privs().step("forbidding new privileges")
}

fn raw(capability: Capability) -> caps::Capability {
    match capability {
        Capability::NetAdmin => caps::Capability::CAP_NET_ADMIN,
        Capability::Perfmon => caps::Capability::CAP_PERFMON,
        Capability::Bpf => caps::Capability::CAP_BPF,
    }
}

/// The mask of some capabilities, as /proc shows it.
pub fn mask(capabilities: &[Capability]) -> u64 {
    capabilities.iter().fold(0, |mask, capability| mask | 1 << capability.bit())
}

/// What this process was started with: its permitted and its bounding set.
pub fn granted() -> Result<(u64, u64), Fatal> {
    let status = status("/proc/self/status").step("reading /proc/self/status")?;
    let set = |name: &str| status.get(name).copied().unwrap_or(u64::MAX);
    Ok((set("CapPrm"), set("CapBnd")))
}

/// What /proc says of the sets of one thread, by field name; hexadecimal masks.
fn status(path: &str) -> std::io::Result<BTreeMap<String, u64>> {
    let text = std::fs::read_to_string(path)?;
    let field = |line: &str| {
        let (name, value) = line.split_once(':')?;
        let radix = if name.starts_with("Cap") { 16 } else { 10 };
        Some((name.to_owned(), u64::from_str_radix(value.trim(), radix).ok()?))
    };
    Ok(text.lines().filter_map(field).collect())
}

fn check(keep: &[Capability], may_be_left: Bounding) -> Result<(), Fatal> {
    let keep = mask(keep);
    let status = status("/proc/self/status").step("reading /proc/self/status")?;
    let bounding = status.get("CapBnd").copied().unwrap_or(u64::MAX);
    let bounding_fine = match may_be_left {
        Bounding::Nothing => bounding == 0,
        Bounding::OfHelpers => bounding & !mask(&Capability::ALL) == 0,
        Bounding::Whatever => true,
    };
    for (field, expected) in
        [("CapInh", 0), ("CapPrm", keep), ("CapEff", keep), ("CapAmb", 0), ("NoNewPrivs", 1)]
    {
        if status.get(field) != Some(&expected) {
            return Err(Fatal(format!(
                "{field} is {:x?} after the drop, not {expected:x}",
                status.get(field)
            )));
        }
    }
    if bounding_fine { Ok(()) } else { Err(Fatal(format!("CapBnd is {bounding:x} after the drop"))) }
}

/// Fails if any thread of this process holds any capability in any set that it could use.
pub fn assert_none_in_any_thread() -> Result<(), Fatal> {
    for task in std::fs::read_dir("/proc/self/task").step("listing threads")? {
        let path = task.step("listing threads")?.path().join("status");
        let path = path.to_string_lossy();
        let status = status(&path).step("reading the status of a thread")?;
        for field in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            if status.get(field) != Some(&0) {
                return Err(Fatal(format!("{path} says {field} {:x?}", status.get(field))));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bpfgate_protocol::hooks::Capability as C;

    #[test]
    fn masks_are_those_of_the_kernel() {
        assert_eq!(mask(&[C::Bpf, C::NetAdmin]), 0x80_0000_1000);
        assert_eq!(mask(&[C::Bpf, C::Perfmon]), 0xc0_0000_0000);
        for capability in C::ALL {
            assert_eq!(raw(capability).to_string(), capability.name());
            assert_eq!(u32::from(raw(capability).index()), capability.bit());
        }
    }

    #[test]
    fn a_process_with_capabilities_is_found_out() {
        if geteuid().is_root() {
            assert!(assert_none_in_any_thread().is_err());
            assert!(check(&[], Bounding::Nothing).is_err());
        } else {
            eprintln!("skipped: needs root");
        }
    }
}
