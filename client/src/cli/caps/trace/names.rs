//! Numbers of the kernel as words.

use bpfgate_protocol::demands;
use bpfgate_protocol::inspect::map_type_name;

use super::super::set::CapSet;

/// `enum bpf_cmd`. Source: include/uapi/linux/bpf.h, Linux 6.18.
#[rustfmt::skip]
const COMMANDS: [&str; 38] = [
    "MAP_CREATE", "MAP_LOOKUP_ELEM", "MAP_UPDATE_ELEM", "MAP_DELETE_ELEM", "MAP_GET_NEXT_KEY", "PROG_LOAD", "OBJ_PIN",
    "OBJ_GET", "PROG_ATTACH", "PROG_DETACH", "PROG_TEST_RUN", "PROG_GET_NEXT_ID", "MAP_GET_NEXT_ID",
    "PROG_GET_FD_BY_ID", "MAP_GET_FD_BY_ID", "OBJ_GET_INFO_BY_FD", "PROG_QUERY", "RAW_TRACEPOINT_OPEN", "BTF_LOAD",
    "BTF_GET_FD_BY_ID", "TASK_FD_QUERY", "MAP_LOOKUP_AND_DELETE_ELEM", "MAP_FREEZE", "BTF_GET_NEXT_ID",
    "MAP_LOOKUP_BATCH", "MAP_LOOKUP_AND_DELETE_BATCH", "MAP_UPDATE_BATCH", "MAP_DELETE_BATCH", "LINK_CREATE",
    "LINK_UPDATE", "LINK_GET_FD_BY_ID", "LINK_GET_NEXT_ID", "ENABLE_STATS", "ITER_CREATE", "LINK_DETACH",
    "PROG_BIND_MAP", "TOKEN_CREATE", "PROG_STREAM_READ_BY_FD",
];

/// `CAP_CHOWN`; a capability that this build does not know by its number.
pub(super) fn capability(number: u8) -> String {
    1_u64.checked_shl(number.into()).map_or_else(|| format!("cap_{number}"), |mask| CapSet(mask).list())
}

/// The command of bpf(2), without `BPF_`.
pub(super) fn bpf_command(number: u32) -> String {
    let name = usize::try_from(number).ok().and_then(|place| COMMANDS.get(place));
    name.map_or_else(|| format!("command {number}"), |name| (*name).to_owned())
}

/// What a command makes: a type of programs or of maps.
pub(super) fn bpf_type(command: u32, number: u32) -> String {
    const MAP_CREATE: u32 = 0;
    if command == MAP_CREATE {
        return map_type_name(number);
    }
    demands::program(number).map_or_else(|| format!("type_{number}"), |row| row.name.to_owned())
}

/// A system call; one of a 32-bit program by its number, which is another there.
pub(super) fn syscall(number: i32, compat: bool) -> String {
    let known = usize::try_from(number).ok().filter(|_| !compat).and_then(syscalls::Sysno::new);
    match known {
        Some(known) => known.name().to_owned(),
        None if compat => format!("32-bit {number}"),
        None => format!("number {number}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_kernel() {
        for (number, name) in [
            (0, "CAP_CHOWN"),
            (21, "CAP_SYS_ADMIN"),
            (39, "CAP_BPF"),
            (40, "CAP_CHECKPOINT_RESTORE"),
            (41, "cap_41"),
            (64, "cap_64"),
        ] {
            assert_eq!(capability(number), name);
        }
        for (number, name) in [
            (0, "MAP_CREATE"),
            (5, "PROG_LOAD"),
            (15, "OBJ_GET_INFO_BY_FD"),
            (28, "LINK_CREATE"),
            (36, "TOKEN_CREATE"),
            (99, "command 99"),
        ] {
            assert_eq!(bpf_command(number), name);
        }
        for (command, number, name) in [
            (5, 6, "xdp"),
            (5, 17, "raw_tracepoint"),
            (5, 32, "netfilter"),
            (0, 27, "ringbuf"),
            (5, 99, "type_99"),
        ] {
            assert_eq!(bpf_type(command, number), name);
        }
        assert_eq!(syscall(i32::try_from(libc::SYS_bpf).unwrap(), false), "bpf");
        assert_eq!(
            (syscall(5, true), syscall(99_999, false)),
            ("32-bit 5".to_owned(), "number 99999".to_owned())
        );
    }
}
