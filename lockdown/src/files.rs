//! landlock: which files a process may still open.

use crate::{Fatal, Step};
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, LandlockStatus, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};
use std::path::Path;

/// What may be opened.
#[derive(Debug, Clone, Copy)]
pub enum Allow<'a> {
    /// One file, for reading.
    File(&'a Path),
    /// Files below a directory, for reading.
    Below(&'a Path),
}

/// The least ABI that confines files. What ABI 3 adds is truncation, by truncate(2) or `O_TRUNC`, which the seccomp lists
/// of bpfgate refuse: the helper opens nothing, the broker and the loader only to read.
pub const LANDLOCK: ABI = ABI::V2;

/// How much of landlock must be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Demand {
    /// Every file access right of ABI 2 (Linux 5.19), or an error.
    Full,
    /// What the kernel has, possibly nothing: the policy says so.
    Whatever,
}

/// Restricts this process to `allow`: nothing else can be opened, made, removed or executed, no TCP port bound or
/// connected (ABI 4), no signal sent and no abstract socket connected outside (ABI 6). Gives the ABI in force.
///
/// Not covered by landlock: descriptors that are open already, `BPF_OBJ_GET`, stat(2), pathname sockets, UDP, netlink.
/// Those are for seccomp. It must be called while the process has one thread.
pub fn restrict(allow: &[Allow<'_>], demand: Demand) -> Result<u32, Fatal> {
    let level = match demand {
        Demand::Full => CompatLevel::HardRequirement,
        Demand::Whatever => CompatLevel::BestEffort,
    };
    let mut ruleset = Ruleset::default()
        .set_compatibility(level)
        .handle_access(AccessFs::from_all(LANDLOCK))
        .step("landlock: files (needs Linux 5.19 or later)")?
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V5))
        .step("landlock: devices")?
        .handle_access(AccessNet::from_all(ABI::V4))
        .step("landlock: network")?
        .scope(Scope::from_all(ABI::V6))
        .step("landlock: scopes")?
        .create()
        .step("landlock: ruleset")?;
    for rule in allow {
        let (path, access) = match rule {
            Allow::File(path) => (path, AccessFs::ReadFile.into()),
            Allow::Below(path) => (path, AccessFs::ReadFile | AccessFs::ReadDir),
        };
        let step = format!("landlock: {}", path.display());
        ruleset = ruleset.add_rule(PathBeneath::new(PathFd::new(path).step(&step)?, access)).step(&step)?;
    }
    let status = ruleset.restrict_self().step("landlock")?;
    let abi = match status.landlock {
        LandlockStatus::Available { effective_abi, .. } => effective_abi as u32,
        LandlockStatus::NotEnabled | LandlockStatus::NotImplemented => 0,
    };
    if demand == Demand::Full && (status.ruleset == RulesetStatus::NotEnforced || abi < LANDLOCK as u32) {
        return Err(Fatal("landlock is not in force; this kernel has it switched off or is too old".into()));
    }
    Ok(abi)
}
