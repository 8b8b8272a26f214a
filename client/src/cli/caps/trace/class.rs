//! What the way to a check says about it: whether a program needs the capability, or the kernel only asks.
//!
//! A check is bookkeeping if the kernel goes on either way, whatever the answer, and no caller is told: then nobody needs
//! the capability for it. What is not in the table here counts as a need. That errs on the side of what works.

use super::observation::Class;

/// Functions on the way, which capability (none: any), and why it makes no difference.
#[rustfmt::skip]
const BOOKKEEPING: [(&[&str], Option<u8>, &str); 7] = [
    (&["security_vm_enough_memory_mm", "cap_vm_enough_memory", "__vm_enough_memory"], Some(21),
     "memory overcommit: who holds it may use the last few percent of the memory"),
    (&["setattr_should_drop_sgid", "setattr_should_drop_suidgid", "should_remove_suid", "mode_strip_sgid",
       "mode_strip_umask", "inode_init_owner", "setattr_prepare", "setattr_copy", "posix_acl_update_mode"], Some(4),
     "set-group-ID bit: without it the bit is cleared, and the call goes on"),
    (&["kallsyms_show_value", "restricted_pointer"], Some(34),
     "kernel addresses: without it they are shown as zero"),
    (&["do_task_stat"], Some(19),
     "/proc/PID/stat of others: without it some numbers are shown as zero"),
    (&["ext4_has_free_clusters", "ext2_has_free_blocks", "ignore_hardlimit", "may_commit_transaction"], Some(24),
     "reserved disk space: who holds it may use the last of it"),
    (&["simple_xattr_list", "ext4_xattr_trusted_list", "xfs_xattr_put_listent"], Some(21),
     "trusted attributes of files: without it they are not listed"),
    (&["io_uring_create", "io_uring_setup"], Some(14),
     "locked memory of io_uring: without it the memory is accounted to the user"),
];

/// Functions whose checks leave no audit record (`CAP_OPT_NOAUDIT`).
const NO_AUDIT: [&str; 7] = [
    "ns_capable_noaudit",
    "has_capability_noaudit",
    "has_ns_capability_noaudit",
    "ptracer_capable",
    "security_vm_enough_memory_mm",
    "cap_vm_enough_memory",
    "__vm_enough_memory",
];

/// Functions that call cap_capable() for checks that do, unless one of the above is on the way.
const AUDIT: [&str; 4] = ["security_capable", "cap_capset", "cap_task_prctl", "cap_prctl_drop"];

/// The functions on the way to a check, the nearest first, from what the kernel wrote: `name+0x1f/0x80 [module]`. What
/// belongs to the tracing itself is left out, and so is cap_capable().
pub(super) fn functions(names: &str) -> Vec<String> {
    let all = names
        .split(' ')
        .filter(|word| !word.is_empty() && !word.starts_with("0x") && !word.starts_with('['))
        .map(|word| {
            let name = word.split_once('+').map_or(word, |(name, _)| name);
            // What the compiler made of a function: name.isra.0, name.constprop.0.
            name.split_once('.').map_or(name, |(name, _)| name).to_owned()
        });
    all.skip_while(|name| is_of_tracing(name)).collect()
}

/// Whether a function is the tracing itself, or what is traced. The kernel calls a program `bpf_prog_DIGEST_NAME`.
fn is_of_tracing(name: &str) -> bool {
    let program = name.strip_prefix("bpf_prog_").and_then(|rest| rest.split_once('_'));
    program
        .is_some_and(|(digest, _)| digest.len() == 16 && digest.bytes().all(|byte| byte.is_ascii_hexdigit()))
        || name == "cap_capable"
        || ["bpf_trampoline_", "bpf_trace_run", "__bpf_trace_"].iter().any(|start| name.starts_with(start))
}

/// What a check of this capability with these functions on the way is; for bookkeeping a sentence that says why.
pub(super) fn class(functions: &[String], cap: u8) -> (Class, Option<&'static str>) {
    if functions.is_empty() {
        return (Class::Unknown, None);
    }
    let on_the_way = |names: &[&str]| functions.iter().any(|function| names.contains(&function.as_str()));
    let row = BOOKKEEPING.iter().find(|(names, of, _)| of.is_none_or(|of| of == cap) && on_the_way(names));
    row.map_or((Class::Need, None), |(_, _, why)| (Class::Bookkeeping, Some(why)))
}

/// Whether the kernel may leave an audit record of a denial; none if the functions do not tell.
pub(super) fn audit(functions: &[String]) -> Option<bool> {
    // The caller's wishes stand in the first functions; further out others may have called the same for something else.
    let near = functions.iter().take(3).map(String::as_str);
    if near.clone().any(|name| NO_AUDIT.contains(&name)) {
        return Some(false);
    }
    near.clone().any(|name| AUDIT.contains(&name)).then_some(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_read_from_what_the_kernel_writes() {
        let names = "bpf_prog_617a621f23e833cd_on_tracepoint+0x382/0x723 bpf_trace_run5+0x101/0x1d0 cap_capable+0x83/0x110 \
                     security_capable+0x3b/0xb0 do_execveat_common.isra.0+0x1a6/0x1b0 f+0x1/0x2 [ext4] 0x0 0x0";
        assert_eq!(functions(names), ["security_capable", "do_execveat_common", "f"]);
        // An fexit program sees no frame of cap_capable.
        assert_eq!(functions("bpf_trampoline_644+0x5/0x9 security_capable+0x3b/0xb0"), ["security_capable"]);
        let load = "cap_capable+0x1/0x2 security_capable+0x1/0x2 bpf_prog_load+0x1/0x2 __sys_bpf+0x1/0x2";
        assert_eq!(functions(load), ["security_capable", "bpf_prog_load", "__sys_bpf"]);
        assert!(functions("").is_empty() && functions("0x0 0x0").is_empty());
    }

    fn of(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    /// Stacks as Linux 6.18 shows them.
    #[test]
    fn bookkeeping_is_told_from_needs() {
        let memory = of(&["security_vm_enough_memory_mm", "__mmap_region", "do_mmap"]);
        assert!(
            matches!(class(&memory, 21), (Class::Bookkeeping, Some(why)) if why.starts_with("memory overcommit"))
        );
        assert_eq!(audit(&memory), Some(false));
        let chown = of(&["security_capable", "capable_wrt_inode_uidgid", "setattr_prepare", "ext4_setattr"]);
        assert_eq!((class(&chown, 0).0, audit(&chown)), (Class::Need, Some(true)));
        let stat = of(&[
            "security_capable",
            "ns_capable_noaudit",
            "__ptrace_may_access",
            "ptrace_may_access",
            "do_task_stat",
        ]);
        assert!(class(&stat, 19).0 == Class::Bookkeeping);
        assert_eq!(audit(&stat), Some(false));
        // The same way, another capability: nothing is known of it.
        assert_eq!(class(&stat, 21), (Class::Need, None));
        assert_eq!((class(&[], 21).0, audit(&[])), (Class::Unknown, None));
        assert_eq!(audit(&of(&["some_other_lsm"])), None);
    }
}
