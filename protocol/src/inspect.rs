//! What is checked in maps and programs before the kernel is asked: pure functions, run where the privilege is.
//!
//! The loader that asks is not trusted: an object may have taken it over. What it says is compared with the permit
//! of the load; what the instructions say is read from the instructions.
#![forbid(unsafe_code)]

use crate::authorize::LoadPermit;
use crate::functions::{self, Function};
use crate::hooks::{Kind, type_name};
use crate::messages::loader::{Handle, MapCreate, ProgLoad};
use crate::names::{GlobalName, ObjectName};
use crate::policy::{Object, ProgramRule};
use crate::refusal::Refusal;

/// The most BTF one object may bring, in bytes; the kernel's own limit is 16 MiB (`BTF_MAX_SIZE`).
pub const MAX_BTF: usize = 8 << 20;

/// The most bytes of instructions, func info and line info of one program: 8 + 8 + 16 for each of a million instructions.
pub const MAX_PROGRAM: usize = 32 << 20;

/// Bytes of one instruction. Source: Documentation/bpf/standardization/instruction-set.rst.
pub const INSN: usize = 8;

/// `enum bpf_map_type` by number, as bpftool writes the names. Source: include/uapi/linux/bpf.h, Linux 6.18.
#[rustfmt::skip]
const MAP_TYPES: [&str; 35] = [
    "unspec", "hash", "array", "prog_array", "perf_event_array", "percpu_hash", "percpu_array", "stack_trace",
    "cgroup_array", "lru_hash", "lru_percpu_hash", "lpm_trie", "array_of_maps", "hash_of_maps", "devmap", "sockmap",
    "cpumap", "xskmap", "sockhash", "cgroup_storage", "reuseport_sockarray", "percpu_cgroup_storage", "queue", "stack",
    "sk_storage", "devmap_hash", "struct_ops", "ringbuf", "inode_storage", "task_storage", "bloom_filter",
    "user_ringbuf", "cgrp_storage", "arena", "insn_array",
];

/// The types that an app may have. Types that hold programs, sockets, devices, other maps or pieces of other kernel
/// objects are not here: whoever writes to them acts on more than data.
#[rustfmt::skip]
const ALLOWED: [&str; 12] = [
    "hash", "array", "percpu_hash", "percpu_array", "stack_trace", "lru_hash", "lru_percpu_hash", "lpm_trie", "queue",
    "stack", "ringbuf", "bloom_filter",
];

/// `BPF_F_NO_PREALLOC`, `NO_COMMON_LRU`, `RDONLY_PROG`, `WRONLY_PROG`, `MMAPABLE`: none of them widens who may do what.
const MAP_FLAGS: u32 = 1 << 0 | 1 << 1 | 1 << 7 | 1 << 8 | 1 << 10;

/// The name of a map type as bpftool writes it.
pub fn map_type_name(number: u32) -> String {
    MAP_TYPES.get(number as usize).map_or_else(|| format!("type_{number}"), |name| (*name).to_owned())
}

/// Whether user space sees one value per CPU.
pub fn is_per_cpu(map_type: u32) -> bool {
    map_type_name(map_type).contains("percpu")
}

/// Checks a map of an object; gives the bytes that it will take at least on a machine with `cpus` possible CPUs.
///
/// Errors: `Unsupported` (type or flags that no app may have)
pub fn check_map(map: &MapCreate, cpus: u32) -> Result<u64, Refusal> {
    let refuse = |why: String| Err(Refusal::unsupported(why));
    // As bpf_obj_name_cpy (kernel/bpf/syscall.c) does; and what is refused below is told to the client by this name.
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.');
    if map.name.len() > 15 || !map.name.bytes().all(plain) {
        return refuse(
            "a map has a name that the kernel does not take: at most 15 letters, digits, _ and .".into(),
        );
    }
    let kind = map_type_name(map.map_type);
    if !ALLOWED.contains(&kind.as_str()) {
        return refuse(format!(
            "map {} is of type {kind}, which apps may not have: it can hold more than data",
            map.name
        ));
    }
    if map.flags & !MAP_FLAGS != 0 {
        return refuse(format!(
            "map {} has flags {:#x} that apps may not set",
            map.name,
            map.flags & !MAP_FLAGS
        ));
    }
    if map.extra != 0 && (kind != "bloom_filter" || map.extra > 15) {
        return refuse(format!("map {} sets map_extra, which only bloom filters may", map.name));
    }
    let (key, value, entries) =
        (u64::from(map.key_size), u64::from(map.value_size), u64::from(map.max_entries));
    let cells = if is_per_cpu(map.map_type) { u64::from(cpus) } else { 1 };
    // Per entry of a hash table: bucket, list and element header, about 64 bytes (kernel/bpf/hashtab.c).
    let overhead = if matches!(kind.as_str(), "array" | "percpu_array" | "queue" | "stack") { 0 } else { 64 };
    let bytes = match kind.as_str() {
        "ringbuf" => entries,
        "bloom_filter" => entries.saturating_mul(value.saturating_add(4)),
        _ => {
            let data = value.next_multiple_of(8).saturating_mul(cells);
            key.next_multiple_of(8).saturating_add(data).saturating_add(overhead).saturating_mul(entries)
        }
    };
    Ok(bytes)
}

/// Checks what the loader says of a program against the permit; its parts have `len` bytes together. The instructions
/// are checked by [`scan`].
///
/// Errors: `Denied` (not in the permit) · `Object` (another type, flags, or a shape that libbpf does not make) · `Quota`
pub fn check_program<'p>(
    permit: &'p LoadPermit,
    index: u32,
    load: &ProgLoad,
    len: usize,
) -> Result<&'p ProgramRule, Refusal> {
    let Some(rule) = permit.programs().nth(index as usize) else {
        return Err(Refusal::denied("the loader asks for a program that is not in the permit"));
    };
    let object = |why: String| Refusal::object(why).by_line(rule.line);
    check_kind(rule, load.prog_type, load.flags)?;
    if load.expected_attach_type != rule.hook.expected_attach_type() {
        return Err(object(format!("program {} is for another kind of attachment", rule.program)));
    }
    if !rule.program.as_str().starts_with(&load.name) || load.name.len() > 15 {
        return Err(object(format!("program {} comes under another name", rule.program)));
    }
    check_shape(load, len).map_err(object)?;
    let count = load.parts.0 as usize / INSN;
    if count > permit.policy().limits.instructions as usize {
        let why = format!(
            "program {} has {count} instructions; the policy allows {}",
            rule.program,
            permit.policy().limits.instructions
        );
        return Err(Refusal::quota(why));
    }
    Ok(rule)
}

/// Whether a program of this type with these flags is what the rule says.
///
/// Errors: `Object`
pub fn check_kind(rule: &ProgramRule, prog_type: u32, flags: u32) -> Result<(), Refusal> {
    let row = rule.hook.kind().row();
    let why = if prog_type != row.prog_type {
        format!(
            "program {} is of type {}, but the policy says {}",
            rule.program,
            type_name(prog_type),
            row.key
        )
    } else if flags & !row.flags != 0 {
        format!(
            "program {} has flags {:#x} that a program of type {} may not have",
            rule.program,
            flags & !row.flags,
            row.key
        )
    } else {
        return Ok(());
    };
    Err(Refusal::object(why).by_line(rule.line))
}

/// Whether a `.rodata` variable of `size` bytes can hold `value`, signed or not.
///
/// Errors: `Object` (no integer has this size) · `Invalid` (it does not fit)
pub fn check_global(name: &GlobalName, size: u64, value: i128) -> Result<(), Refusal> {
    if !matches!(size, 1 | 2 | 4 | 8) {
        return Err(Refusal::object(format!(
            "global {name} has {size} bytes; only 1, 2, 4 and 8 can be set"
        )));
    }
    let bits = size * 8;
    if value < -(1i128 << (bits - 1)) || value >= 1i128 << bits {
        return Err(Refusal::invalid(format!("global {name} has {size} bytes; {value} does not fit")));
    }
    Ok(())
}

/// Lengths that fit together, whoever says them.
fn check_shape(load: &ProgLoad, len: usize) -> Result<(), String> {
    let (insns, funcs, lines) = load.parts;
    let sum = u64::from(insns) + u64::from(funcs) + u64::from(lines);
    if sum != len as u64 || sum > MAX_PROGRAM as u64 {
        return Err("the parts of a program do not add up".into());
    }
    if insns == 0 || !(insns as usize).is_multiple_of(INSN) {
        return Err("the instructions are cut short".into());
    }
    for (size, len) in [(load.record_sizes.0, funcs), (load.record_sizes.1, lines)] {
        // 8 and 16 today; the kernel takes up to MAX_FUNCINFO_REC_SIZE = MAX_LINEINFO_REC_SIZE = 252.
        if len != 0 && (!(8..=252).contains(&size) || !size.is_multiple_of(4) || !len.is_multiple_of(size)) {
            return Err("the debug information of a program is cut short".into());
        }
    }
    if load.license.len() > 127 || load.license.contains('\0') {
        return Err("the license of the object is longer than the kernel allows".into());
    }
    Ok(())
}

/// Checks a program by which libbpf finds out what the kernel can do. Its descriptor is closed at once.
/// Source: libbpf 1.7, src/features.c: the largest probe has 12 instructions.
///
/// Errors: `Object` (no such probe)
pub fn check_probe(load: &ProgLoad, len: usize) -> Result<(), Refusal> {
    const SOCKET_FILTER: u32 = 1;
    const CGROUP_SOCK: u32 = 9;
    let types = [SOCKET_FILTER, CGROUP_SOCK, Kind::Uprobe.row().prog_type, Kind::Tracepoint.row().prog_type];
    let fine = types.contains(&load.prog_type)
        && load.parts.0 as usize <= 16 * INSN
        && load.flags == 0
        && load.name.len() <= 15
        && check_shape(load, len).is_ok();
    if fine { Ok(()) } else { Err(Refusal::object("the loader asks for a probe that libbpf does not make")) }
}

/// Helper functions that probes of libbpf call: `probe_read_kernel`, `get_attach_cookie`.
const PROBE_FUNCTIONS: [u32; 2] = [113, 174];

/// Whether instructions of a probe may make this call.
pub fn probe_call(call: Call) -> Result<(), Refusal> {
    match call {
        Call::Helper(id) if PROBE_FUNCTIONS.contains(&id) => Ok(()),
        _ => Err(Refusal::object("a probe calls what libbpf's probes do not call")),
    }
}

/// Whether programs of this object may call this function.
///
/// Errors: `Object` (it needs a grant that the policy does not give) · `Unsupported` (no such function in this build)
pub fn granted(object: &ObjectName, rules: &Object, function: &Function) -> Result<(), Refusal> {
    if let Function::Helper(id) = function
        && functions::name(*id).is_none()
    {
        return Err(Refusal::unsupported(format!(
            "the program calls {function}, which this build does not know"
        )));
    }
    match function.needs_grant() {
        Some(what) if !rules.functions.contains(function) => {
            let key = function.key();
            let why = format!(
                "the program calls {function}, which {what}; the policy must say so: [objects.{object}.helpers] {key} = [\"{function}\"]"
            );
            Err(Refusal::object(why).by_line(rules.line))
        }
        _ => Ok(()),
    }
}

/// What an instruction calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// A helper function, by number.
    Helper(u32),
    /// A function of the kernel itself, by the number of its type in the kernel's BTF ([`crate::btf`]).
    Kernel(u32),
}

/// A place in the instructions where the number of a map stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapSlot {
    /// Index of the instruction.
    pub index: usize,
    /// What the loader wrote there.
    pub handle: Handle,
}

/// Reads every instruction: which functions are called (`allowed` says which may be), where maps stand.
/// Everything else that could name a kernel object is refused: descriptors by index, functions of modules, types and
/// variables of the kernel.
///
/// Errors: those of `allowed` · `Object` (a reference that no app may have, or instructions cut short)
pub fn scan(insns: &[u8], allowed: impl Fn(Call) -> Result<(), Refusal>) -> Result<Vec<MapSlot>, Refusal> {
    const LD_IMM64: u8 = 0x18;
    const CALL: u8 = 0x85;
    // Any other opcode with the call operation: class JMP or JMP32, register source.
    const OTHER_CALLS: [u8; 3] = [0x8d, 0x86, 0x8e];
    let refuse = |index: usize, why: &str| Err(Refusal::object(format!("instruction {index} {why}")));
    let (words, rest) = insns.as_chunks::<INSN>();
    if !rest.is_empty() {
        return refuse(words.len(), "is cut short");
    }
    let mut slots = Vec::new();
    let mut index = 0;
    while let Some(word) = words.get(index) {
        let (code, source) = (word[0], word[1] >> 4);
        let immediate = u32::from_le_bytes([word[4], word[5], word[6], word[7]]);
        match (code, source) {
            (CALL, 0) => allowed(Call::Helper(immediate))?,
            // 1: a function of the program itself.
            (CALL, 1) => {}
            // The offset is the place of a module's BTF in fd_array.
            (CALL, 2) if word[2..4] != [0; 2] => {
                return refuse(index, "calls a function of a kernel module, which no policy can allow");
            }
            (CALL, 2) => allowed(Call::Kernel(immediate))?,
            (CALL, _) => return refuse(index, "is a call of an unknown kind"),
            (code, _) if OTHER_CALLS.contains(&code) => return refuse(index, "is a call of an unknown kind"),
            (LD_IMM64, _) => {
                match words.get(index + 1) {
                    Some(second) if second[..4] == [0; 4] => {}
                    _ => return refuse(index, "is cut short"),
                }
                match source {
                    // 0: a constant. 4: the address of a function of the program itself.
                    0 | 4 => {}
                    // 1, 2: a map, or the address of its value.
                    1 | 2 => slots.push(MapSlot { index, handle: immediate }),
                    3 => return refuse(index, "refers to a variable of the kernel (ksym), which is refused"),
                    5 | 6 => {
                        return refuse(index, "refers to a map by its place in fd_array, which is refused");
                    }
                    _ => return refuse(index, "loads something of an unknown kind"),
                }
                index += 1;
            }
            _ => {}
        }
        index += 1;
    }
    Ok(slots)
}

/// Writes the descriptor of a map to its slot. `slot` comes from [`scan`] of the same instructions.
pub fn patch(insns: &mut [u8], slot: MapSlot, fd: i32) {
    insns[slot.index * INSN + 4..slot.index * INSN + 8].copy_from_slice(&fd.to_le_bytes());
}

/// Takes the addresses of the kernel out of a verifier's log: to a process with `CAP_PERFMON` the kernel writes where maps
/// are in memory, and the log is for clients without any capability. What a constant is stands behind it, in the state of
/// the registers. Source: kernel/bpf/disasm.c, `print_bpf_insn`.
pub fn hide_addresses(log: &mut [u8]) {
    const LD_IMM64: &[u8] = b"(18) r";
    let mut at = 0;
    while let Some(found) = log[at..].windows(LD_IMM64.len()).position(|text| text == LD_IMM64) {
        at += found + LD_IMM64.len();
        // A register has one digit, or two: `1 = 0x`.
        let number = log[at..].iter().take(8).position(|&byte| byte == b'x');
        for byte in log[at..].iter_mut().skip(number.map_or(usize::MAX, |x| x + 1)) {
            if !byte.is_ascii_hexdigit() {
                break;
            }
            *byte = b'?';
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::messages::loader::Purpose;
    use crate::policy::Policy;
    use crate::policy::file::Accounts;
    use crate::refusal::Class;

    fn insn(code: u8, regs: u8, immediate: u32) -> Vec<u8> {
        [&[code, regs, 0, 0], immediate.to_le_bytes().as_slice()].concat()
    }

    fn only(id: u32) -> impl Fn(Call) -> Result<(), Refusal> {
        move |call| if call == Call::Helper(id) { Ok(()) } else { Err(Refusal::denied("function")) }
    }

    #[test]
    fn calls_are_seen_wherever_they_stand() {
        for position in 0..5 {
            let mut program = insn(0xb7, 0, 0).repeat(position);
            program.extend(insn(0x85, 0, 36));
            program.extend(insn(0x95, 0, 0));
            assert_eq!(scan(&program, only(1)).unwrap_err().class, Class::Denied);
            assert!(scan(&program, only(36)).is_ok());
        }
    }

    #[test]
    fn functions_of_the_kernel_are_told_from_helpers_and_from_those_of_modules() {
        let kfunc = insn(0x85, 0x20, 36);
        assert_eq!(scan(&kfunc, only(36)).unwrap_err().class, Class::Denied, "36 is no helper here");
        let seen = std::cell::Cell::new(None);
        let allowed = |call| {
            seen.set(Some(call));
            Ok(())
        };
        assert!(scan(&kfunc, allowed).is_ok());
        assert_eq!(seen.take(), Some(Call::Kernel(36)));
        for byte in [2, 3] {
            let mut of_module = kfunc.clone();
            of_module[byte] = 1;
            let refused = scan(&of_module, allowed).unwrap_err();
            assert!(refused.why.contains("module") && seen.get().is_none(), "{refused:?}");
        }
        for call in [Call::Kernel(113), Call::Helper(1)] {
            assert!(probe_call(call).is_err(), "{call:?}");
        }
        assert!(probe_call(Call::Helper(113)).is_ok());
    }

    #[test]
    fn a_grant_is_for_one_function_of_one_sort() {
        let text = "version = 1\n[objects.o]\npath = \"/o\"\n[objects.o.helpers]\nkfuncs = [\"bpf_send_signal\", \"f\"]\n";
        let policy = Policy::parse("p", text, &Accounts::default()).unwrap();
        let (name, rules) = policy.objects.first_key_value().unwrap();
        let granted = |function: Function| granted(name, rules, &function);
        let kernel = |name: &str| Function::Kernel(name.parse().unwrap());
        assert!(granted(kernel("f")).is_ok() && granted(kernel("bpf_send_signal")).is_ok());
        for (function, says) in [
            (
                kernel("g"),
                "calls g, which runs code of the kernel that may act on anything; the policy must say so: [objects.o.helpers] kfuncs = [\"g\"]",
            ),
            (Function::Helper(109), "allow = [\"bpf_send_signal\"]"),
        ] {
            let refusal = granted(function).unwrap_err();
            assert!(refusal.why.ends_with(says) && refusal.line == Some(2), "{refusal:?}");
        }
        assert_eq!(granted(Function::Helper(212)).unwrap_err().class, Class::Unsupported);
        assert!(granted(Function::Helper(1)).is_ok());
    }

    /// What looks like a call inside of the second half of a 64-bit load is a constant, and the other way round.
    #[test]
    fn halves_of_a_wide_load_are_told_apart() {
        let mut wide = insn(0x18, 0, 7);
        wide.extend(insn(0x85, 0, 36));
        assert_eq!(scan(&wide, only(36)).unwrap_err().class, Class::Object, "the kernel refuses it too");
        let mut good = insn(0x18, 0, 7);
        good.extend(insn(0, 0, 36));
        assert!(scan(&good, only(1)).unwrap().is_empty());
        assert_eq!(scan(&insn(0x18, 0, 7), only(1)).unwrap_err().class, Class::Object);
        assert_eq!(scan(&[0; 7], only(1)).unwrap_err().class, Class::Object);
    }

    #[test]
    fn only_maps_are_referred_to() {
        for source in 0..16u8 {
            let mut program = insn(0x18, source << 4 | 1, 5);
            program.extend(insn(0, 0, 0));
            let got = scan(&program, only(1));
            match source {
                0 | 4 => assert_eq!(got.unwrap(), []),
                1 | 2 => assert_eq!(got.unwrap(), [MapSlot { index: 0, handle: 5 }]),
                _ => assert_eq!(got.unwrap_err().class, Class::Object, "{source}"),
            }
            let got = scan(&insn(0x85, source << 4, 1), only(1));
            assert_eq!(got.is_ok(), source < 2, "call {source}");
        }
        for code in [0x8d, 0x86, 0x8e] {
            assert!(scan(&insn(code, 0, 1), only(1)).is_err());
        }
    }

    #[test]
    fn a_patch_changes_the_immediate_and_nothing_else() {
        let mut program = [insn(0xb7, 0, 0), insn(0x18, 0x11, 2), insn(0, 0, 0)].concat();
        let slots = scan(&program, only(1)).unwrap();
        let before = program.clone();
        patch(&mut program, slots[0], 0x0102_0304);
        assert_eq!(program[12..16], [4, 3, 2, 1]);
        program[12..16].copy_from_slice(&before[12..16]);
        assert_eq!(program, before);
    }

    fn map(map_type: u32) -> MapCreate {
        MapCreate {
            purpose: Purpose::Object(0),
            map_type,
            key_size: 4,
            value_size: 12,
            max_entries: 10,
            flags: 0,
            extra: 0,
            name: "m".into(),
            btf: 0,
            btf_ids: (0, 0),
        }
    }

    #[test]
    fn a_log_tells_no_address() {
        let text = "3: (07) r2 += -4\n4: (18) r1 = 0xffff88816c07b400       ; R1=map_ptr(ks=4)\n\
                    6: (18) r10 = 0x7 ; R10=7\n7: (18) r1 = \n8: (18) r3 = 0xffffc90000\n(18) r";
        let mut log = text.as_bytes().to_vec();
        hide_addresses(&mut log);
        let expected = "3: (07) r2 += -4\n4: (18) r1 = 0x????????????????       ; R1=map_ptr(ks=4)\n\
                        6: (18) r10 = 0x? ; R10=7\n7: (18) r1 = \n8: (18) r3 = 0x??????????\n(18) r";
        assert_eq!(String::from_utf8(log).unwrap(), expected);
    }

    #[test]
    fn map_types_that_hold_more_than_data_are_refused() {
        let allowed = [1, 2, 5, 6, 7, 9, 10, 11, 22, 23, 27, 30];
        for number in 0..64 {
            assert_eq!(check_map(&map(number), 2).is_ok(), allowed.contains(&number), "{number}");
        }
        for bit in 0..32 {
            let got = check_map(&MapCreate { flags: 1 << bit, ..map(1) }, 2);
            assert_eq!(got.is_ok(), [0, 1, 7, 8, 10].contains(&bit), "flag {bit}");
        }
        assert!(check_map(&MapCreate { extra: 1, ..map(1) }, 2).is_err());
        assert!(check_map(&MapCreate { name: "sixteencharacter".into(), ..map(1) }, 2).is_err());
    }

    #[test]
    fn map_memory_counts_every_cpu_and_does_not_wrap() {
        assert_eq!(check_map(&map(2), 8), Ok(10 * (8 + 16)));
        assert_eq!(check_map(&map(6), 8), Ok(10 * (8 + 16 * 8)));
        assert_eq!(check_map(&MapCreate { max_entries: 4096, ..map(27) }, 8), Ok(4096));
        let huge = MapCreate { key_size: u32::MAX, value_size: u32::MAX, max_entries: u32::MAX, ..map(5) };
        assert_eq!(check_map(&huge, u32::MAX), Ok(u64::MAX));
    }
}
