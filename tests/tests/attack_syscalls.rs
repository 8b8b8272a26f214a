//! The lists of system calls, as an attacker meets them: every rule with allowed arguments and with spoiled ones, every
//! number and every way of calling that is not on a list, and the compiled filters against the rows they are made from.

use bpfgate_client::exec::{self, Launch};
use bpfgate_lockdown::syscalls::{Row, When};
use bpfgate_tests::process::Process;
use bpfgate_tests::roles::{self, Role};
use bpfgate_tests::sys::{Call, Instruction, call_in_child, filters_of};
use bpfgate_tests::{Gate, bin_dir, needs_root};
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

/// Bit 30 of a number: the same call as x32 programs make it.
const X32: i64 = 0x4000_0000;

/// Numbers of 64-bit calls end before it, and those of x32 a little later.
const NUMBERS: i64 = 512;

/// uretprobe(2) and uprobe(2): since Linux 6.14 the kernel lets them past every filter. It makes these calls itself, in
/// place of instructions; whoever else makes them gets nothing from them.
const PAST_FILTERS: [i64; 2] = [335, 336];

/// An argument of which no call makes sense: no descriptor, no address, no set of flags.
const NONSENSE: u64 = 9999;

/// What becomes of a process that makes a call.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    /// It goes on with this errno, or 0.
    Answer(i32),
    /// It is ended.
    End(Signal),
}

const KILLED: Fate = Fate::End(Signal::SIGSYS);

fn fate(filters: &[bpfgate_lockdown::syscalls::Filters], call: Call) -> Fate {
    match call_in_child(filters, call) {
        WaitStatus::Exited(_, errno) => Fate::Answer(errno),
        WaitStatus::Signaled(_, signal, _) => Fate::End(signal),
        other => panic!("{other:?}"),
    }
}

/// Nonsense that a row allows, but for arguments that matter.
fn arguments(row: &Row) -> [u64; 6] {
    let mut all = [NONSENSE; 6];
    match row.when {
        When::OneOf(argument, values) => all[usize::from(argument)] = values[0].into(),
        When::Without(argument, bits) => all[usize::from(argument)] &= !bits,
        When::Always | When::Except(..) | When::Fails(_) => {}
    }
    all
}

fn with(mut all: [u64; 6], argument: u8, value: u64) -> [u64; 6] {
    all[usize::from(argument)] = value;
    all
}

const UPPER: u64 = 1 << 32;

/// Arguments that a row allows; those that the kernel takes as 32 bits, with something above those too.
fn allowed(row: &Row) -> Vec<[u64; 6]> {
    let all = arguments(row);
    match row.when {
        When::OneOf(argument, values) => {
            let both = |value: &u32| [u64::from(*value), u64::from(*value) | UPPER];
            values.iter().flat_map(both).map(|value| with(all, argument, value)).collect()
        }
        When::Except(argument, value) => [u64::from(value) + 1, u64::from(value) + 1 + UPPER]
            .map(|value| with(all, argument, value))
            .to_vec(),
        When::Always | When::Without(..) | When::Fails(_) => vec![all],
    }
}

/// Arguments that a row does not allow, as near to those that it does as can be.
fn spoiled(row: &Row) -> Vec<[u64; 6]> {
    let all = arguments(row);
    match row.when {
        When::OneOf(argument, values) => {
            let near =
                |value: u32| (0..32).map(move |bit| value ^ (1 << bit)).chain([0, u32::MAX, value + 1]);
            let near: BTreeSet<u32> = values.iter().flat_map(|value| near(*value)).collect();
            let near = near
                .into_iter()
                .map(u64::from)
                .filter(|value| !values.iter().any(|one| u64::from(*one) == *value));
            let above = values.iter().map(|value| u64::from(value ^ (1 << 31)) | UPPER);
            near.chain(above).map(|value| with(all, argument, value)).collect()
        }
        When::Except(argument, value) => {
            [u64::from(value), u64::from(value) | UPPER].map(|value| with(all, argument, value)).to_vec()
        }
        When::Without(argument, bits) => {
            let each = (0..64).map(|bit| 1 << bit).filter(|bit| bits & bit != 0).chain([bits, u64::MAX]);
            each.map(|bit| with(all, argument, all[usize::from(argument)] | bit)).collect()
        }
        When::Always | When::Fails(_) => Vec::new(),
    }
}

#[test]
fn every_rule_lets_through_what_it_names_and_nothing_near_it() {
    let mut cases = 0;
    for role in roles::all() {
        let filters = role.filters();
        for row in role.rows() {
            for arguments in allowed(row) {
                let call = Call::Plain(row.number, arguments);
                // What is let through works as it does elsewhere.
                let expected = match row.when {
                    When::Fails(errno) => Fate::Answer(errno),
                    _ => fate(&[], call),
                };
                assert_ne!(expected, KILLED, "{row:?} {arguments:x?}");
                assert_eq!(fate(&filters, call), expected, "{}: {row:?} {arguments:x?}", role.name);
                cases += 1;
            }
            for arguments in spoiled(row) {
                let call = Call::Plain(row.number, arguments);
                assert_eq!(fate(&filters, call), KILLED, "{}: {row:?} {arguments:x?}", role.name);
                cases += 1;
            }
        }
    }
    println!("{cases} calls with allowed and with spoiled arguments");
}

#[test]
fn every_other_number_ends_the_process() {
    let mut cases = 0;
    for role in roles::all() {
        let filters = role.filters();
        let listed: BTreeSet<i64> = role.rows().iter().map(|row| row.number).collect();
        let plain = (0..NUMBERS).filter(|number| !listed.contains(number));
        // Those that are on the list, too: it is not a list of x32 calls.
        let x32 = (0..NUMBERS + 64).map(|number| number | X32);
        let far = [i64::from(i32::MAX), i64::from(i32::MIN), -1, -2, 1 << 29, 1 << 31 | 1];
        for number in plain.chain(x32).chain(far) {
            let call = Call::Plain(number, [NONSENSE; 6]);
            let found = fate(&filters, call);
            let nothing = [KILLED, Fate::End(Signal::SIGILL), Fate::Answer(libc::ENXIO)];
            if PAST_FILTERS.contains(&number) {
                assert!(nothing.contains(&found), "{}: {number}: {found:?}", role.name);
            } else {
                assert_eq!(found, KILLED, "{}: {number}", role.name);
            }
            cases += 1;
        }
    }
    println!("{cases} calls by numbers that are on no list");
}

#[test]
fn a_call_as_32_bit_programs_make_it_ends_the_process() {
    const GETPID: u32 = 20;
    // A kernel without such calls ends the process too, in its own way.
    let elsewhere = fate(&[], Call::By32Bit(GETPID));
    let expected = match elsewhere {
        Fate::Answer(0) => KILLED,
        Fate::End(Signal::SIGSEGV) => elsewhere,
        other => panic!("{other:?}"),
    };
    for role in roles::all() {
        let filters = role.filters();
        for number in 0..u32::try_from(NUMBERS).unwrap() {
            assert_eq!(fate(&filters, Call::By32Bit(number)), expected, "{}: {number}", role.name);
        }
    }
}

#[test]
fn commands_of_bpf_that_are_not_on_the_list_end_the_process() {
    for role in roles::all() {
        let filters = role.filters();
        let row = role.rows().iter().find(|row| row.number == libc::SYS_bpf);
        let listed = match row.map(|row| row.when) {
            None => &[][..],
            Some(When::OneOf(0, commands)) => commands,
            Some(other) => panic!("{}: {other:?}", role.name),
        };
        assert!(listed.len() <= 10, "{}: {listed:?}", role.name);
        for command in 0..=40 {
            let call = Call::Plain(libc::SYS_bpf, with([NONSENSE; 6], 0, command.into()));
            let found = fate(&filters, call);
            if listed.contains(&command) {
                // The attributes are too long.
                assert_eq!(found, Fate::Answer(libc::E2BIG), "{}: {command}", role.name);
            } else {
                assert_eq!(found, KILLED, "{}: {command}", role.name);
            }
        }
    }
}

/// The program that comes to an end as it is told, without anything of this test's environment.
fn confined(arguments: &[&str]) -> Command {
    let mut command = Command::new(bin_dir().join("bpfgate-confined"));
    command.args(arguments).env_clear().stdin(Stdio::null()).stdout(Stdio::null());
    command
}

#[test]
fn a_bad_end_is_its_own_under_every_filter() {
    let ends = [
        ("panic", "as the test wants it"),
        ("allocation", "memory allocation of"),
        ("recursion", "has overflowed its stack"),
    ];
    for role in roles::all() {
        for (end, says) in ends {
            let mut command = confined(&[end, role.name]);
            if end == "panic" {
                // A backtrace would take system calls that nobody has.
                command.env("RUST_BACKTRACE", "full");
            }
            let output = command.output().expect("it is made by `make build`");
            let said = String::from_utf8_lossy(&output.stderr);
            let place = format!("{end} of {}: {:?} {said}", role.name, output.status);
            assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{place}");
            assert!(said.contains(says), "{place}");
        }
    }
}

#[test]
fn a_program_with_maps_has_no_other_commands_of_bpf() {
    let out = nix::sys::memfd::memfd_create(c"out", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
    let mut file = File::from(out.try_clone().unwrap());
    let launch =
        Launch::new(bin_dir().join("bpfgate-confined")).arguments(["commands"]).descriptor("out", out);
    assert_eq!(launch.spawn().unwrap().wait().unwrap(), exec::Ended::Exited(0));
    let mut text = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    let [plain, x32]: [Vec<i32>; 2] = serde_json::from_str(&text).unwrap();
    assert_eq!((plain.len(), x32.len()), (41, 41));
    for (command, errno) in (0..).zip(plain) {
        let listed = exec::ALLOWED_BPF_COMMANDS.iter().any(|(allowed, _)| *allowed == command);
        // Without attributes the kernel says something else, whoever asks.
        assert_eq!(errno == libc::EPERM, !listed, "{command}: {errno}");
    }
    assert!(x32.iter().all(|errno| *errno == libc::EPERM), "{x32:?}");
}

/// What a filter says of a call (`SECCOMP_RET_*`).
fn interpret(program: &[Instruction], data: &[u32; 16]) -> u32 {
    let mut at = 0;
    let mut accumulator = 0;
    loop {
        let one = program[at];
        at += 1;
        let jump = |holds: bool| usize::from(if holds { one.jt } else { one.jf });
        match one.code {
            0x20 => accumulator = data[one.k as usize / 4], // BPF_LD | BPF_W | BPF_ABS
            0x54 => accumulator &= one.k,                   // BPF_ALU | BPF_AND | BPF_K
            0x05 => at += one.k as usize,                   // BPF_JMP | BPF_JA
            0x15 => at += jump(accumulator == one.k),       // BPF_JMP | BPF_JEQ | BPF_K
            0x25 => at += jump(accumulator > one.k),        // BPF_JMP | BPF_JGT | BPF_K
            0x35 => at += jump(accumulator >= one.k),       // BPF_JMP | BPF_JGE | BPF_K
            0x06 => return one.k,                           // BPF_RET | BPF_K
            other => panic!("an instruction that no filter here has: {other:x}"),
        }
    }
}

/// `struct seccomp_data` as words: number, architecture, instruction pointer, arguments.
fn data(number: i32, architecture: u32, arguments: &[u64; 6]) -> [u32; 16] {
    let mut words = [0; 16];
    (words[0], words[1]) = (number.cast_unsigned(), architecture);
    for (index, argument) in arguments.iter().enumerate() {
        let halves = [argument & 0xffff_ffff, argument >> 32].map(|half| u32::try_from(half).unwrap());
        words[4 + 2 * index..][..2].copy_from_slice(&halves);
    }
    words
}

/// What the rows say of it, in the simplest words.
fn judge(rows: &[Row], number: i32, arguments: &[u64; 6]) -> u32 {
    let Some(row) = rows.iter().find(|row| row.number == i64::from(number)) else {
        return libc::SECCOMP_RET_KILL_PROCESS;
    };
    let word = |argument: u8| arguments[usize::from(argument)] & 0xffff_ffff;
    let fine = match row.when {
        When::Fails(errno) => return libc::SECCOMP_RET_ERRNO | errno.cast_unsigned(),
        When::Always => true,
        When::OneOf(argument, values) => values.iter().any(|value| u64::from(*value) == word(argument)),
        When::Except(argument, value) => word(argument) != u64::from(value),
        When::Without(argument, bits) => arguments[usize::from(argument)] & bits == 0,
    };
    if fine { libc::SECCOMP_RET_ALLOW } else { libc::SECCOMP_RET_KILL_PROCESS }
}

/// Numbers that look random and are the same each time (xorshift64*).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() >> 33).unwrap() % limit
    }

    /// An argument: nothing in particular, or something near to what a row names.
    fn argument(&mut self, when: When) -> u64 {
        let named = match when {
            When::OneOf(_, values) => values[self.below(values.len())].into(),
            When::Except(_, value) => value.into(),
            When::Without(_, bits) => bits & self.next(),
            When::Always | When::Fails(_) => self.next(),
        };
        match self.below(8) {
            0..3 => named,
            3 => named | UPPER,
            4 => named ^ 1 << self.below(64),
            5 => named.wrapping_add(1),
            6 => self.next() >> self.below(64),
            _ => 0,
        }
    }
}

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;

#[test]
fn the_compiled_filters_say_what_the_rows_say() {
    const INPUTS: usize = 100_000;
    // How much of a verdict is the action, and which is the stricter (man 2 seccomp).
    let strictness = |verdict: u32| (verdict & libc::SECCOMP_RET_ACTION_FULL).cast_signed();
    for role in roles::all() {
        let programs = role.programs();
        let rows = role.rows();
        let mut random = Random(0x5eed);
        let mut seen = BTreeMap::new();
        for _ in 0..INPUTS {
            let row = rows[random.below(rows.len())];
            let mut arguments = [0; 6].map(|_: u64| random.argument(When::Always));
            if let When::OneOf(argument, _) | When::Except(argument, _) | When::Without(argument, _) =
                row.when
            {
                arguments[usize::from(argument)] = random.argument(row.when);
            }
            let listed = i32::try_from(row.number).unwrap();
            let number = match random.below(8) {
                0 => listed ^ 1 << random.below(32),
                1 => i32::try_from(random.below(600)).unwrap(),
                _ => listed,
            };
            let architecture = match random.below(32) {
                0 => AUDIT_ARCH_I386,
                1 => AUDIT_ARCH_X86_64 ^ 1 << random.below(32),
                _ => AUDIT_ARCH_X86_64,
            };
            let expected = match architecture {
                AUDIT_ARCH_X86_64 => judge(rows, number, &arguments),
                _ => libc::SECCOMP_RET_KILL_PROCESS,
            };
            let words = data(number, architecture, &arguments);
            let verdicts = programs.iter().map(|program| interpret(program, &words));
            let found = verdicts.min_by_key(|verdict| strictness(*verdict)).unwrap();
            assert_eq!(found, expected, "{}: {number:#x} {architecture:x} {arguments:x?}", role.name);
            *seen.entry(found).or_insert(0) += 1;
        }
        println!("{}: {} rows, {INPUTS} inputs: {seen:x?}", role.name, rows.len());
        // Random inputs that are all refused would prove nothing.
        assert!(
            seen[&libc::SECCOMP_RET_ALLOW] > INPUTS / 5 && seen[&libc::SECCOMP_RET_KILL_PROCESS] > INPUTS / 5
        );
    }
}

#[test]
fn the_filters_of_running_processes_are_made_from_the_lists() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", bpfgate_tests::gate::MINIMAL);
    let before = gate.baseline();
    let session = gate.session("app");
    let [helper, loader, worker] = gate.helper("app");
    let processes: [(&str, &Process); 4] =
        [("broker", &gate.broker), ("helper", &helper), ("loader", &loader), ("worker", &worker)];
    for (name, process) in processes {
        let found =
            filters_of(process.pid).expect("root may look, where the kernel has CONFIG_CHECKPOINT_RESTORE");
        // What this test was started under comes first.
        let all = Role::named(name).programs();
        let ours = &found[found.len().saturating_sub(all.len())..];
        assert_eq!(ours, all, "{name}");
    }
    drop(session);
    gate.invariants(&before);
}
