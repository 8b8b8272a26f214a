//! What a loader asks of its helper: near misses of requests that are just so, and what the helper's checks say.

use crate::instructions::named;
use arbitrary::{Result, Unstructured};
use bpfgate_policy_tests::accounts;
use bpfgate_protocol::authorize::{LoadPermit, authorize};
use bpfgate_protocol::functions::Function;
use bpfgate_protocol::identity::Peer;
use bpfgate_protocol::inspect::{self, Call, INSN, MAX_PROGRAM};
use bpfgate_protocol::messages::Bulk;
use bpfgate_protocol::messages::loader::{LogWanted, MapCreate, ProgLoad, Purpose};
use bpfgate_protocol::policy::Policy;
use bpfgate_protocol::refusal::Refusal;
use std::sync::{Arc, OnceLock};

const POLICY: &str = r#"
version = 1
[[client]]
user = 990
may = ["load"]
[objects.o]
path = "/o"
sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
[[objects.o.xdp]]
program = "count_packets"
interfaces = ["eth0"]
[[objects.o.tcx]]
program = "shape"
direction = "egress"
interfaces = ["eth0"]
[[objects.o.fentry]]
program = "a_name_of_more_than_15"
function = "vfs_read"
[objects.o.helpers]
allow = ["bpf_send_signal"]
kfuncs = ["bpf_rcu_read_lock"]
[limits]
instructions = 12
"#;

/// The programs of the policy, in the order of a plan, by the numbers of include/uapi/linux/bpf.h: what they are called in
/// the kernel, their type, the type of their attachment, flags that they may have.
const PROGRAMS: [(&str, u32, u32, u32); 3] =
    [("count_packets", 6, 37, 1 << 5), ("shape", 3, 0, 0), ("a_name_of_more_", 26, 24, 0)];

/// Functions that act outside of the program's own data, but for the one that the policy allows. Numbers as there.
const BY_GRANT: [u32; 10] = [6, 36, 58, 117, 166, 167, 168, 177, 179, 191];
/// The newest of the closed list, `bpf_cgrp_storage_delete`.
const LAST_FUNCTION: u32 = 211;
/// What `bpf_rcu_read_lock` is on this machine.
const KFUNC: u32 = 70_001;
/// Maps that hold data and nothing else, and flags that widen nothing. Numbers as there.
const DATA_MAPS: [u32; 12] = [1, 2, 5, 6, 7, 9, 10, 11, 22, 23, 27, 30];
const PLAIN_FLAGS: u32 = 0x583;

/// One request for a map, for a program, or for a probe: what passes is inside of the permit, as said above; what is just
/// as it should be does pass.
pub fn dialogue(data: &[u8]) -> bool {
    let mut u = Unstructured::new(data);
    let asked = match u.int_in_range(0..=2) {
        Ok(0) => map(&mut u),
        Ok(1) => program(&mut u),
        _ => probe(&mut u),
    };
    asked.unwrap_or(false)
}

fn permit() -> &'static LoadPermit {
    static PERMIT: OnceLock<LoadPermit> = OnceLock::new();
    PERMIT.get_or_init(|| {
        let policy = Policy::parse("p", POLICY, &accounts()).unwrap_or_else(|error| panic!("{error}"));
        let flowmon = Peer { uid: 990, ..Peer::default() };
        let object = "o".parse().expect("a name");
        authorize(&Arc::new(policy), &flowmon)
            .and_then(|permit| permit.load(&object, &[], &[]))
            .expect("it may load")
    })
}

/// What is right, and now and then something else.
struct Mostly<'u, 'd> {
    u: &'u mut Unstructured<'d>,
    all_right: bool,
}

impl Mostly<'_, '_> {
    fn number(&mut self, right: u32) -> Result<u32> {
        if !self.spoils()? {
            return Ok(right);
        }
        let other = match self.u.int_in_range(0..=3)? {
            0 => right.wrapping_add(1),
            1 => right ^ 1 << self.u.int_in_range(0..=31)?,
            2 => self.u.int_in_range(0..=40)?,
            _ => self.u.arbitrary()?,
        };
        self.all_right &= other == right;
        Ok(other)
    }

    fn text(&mut self, right: &str) -> Result<String> {
        if !self.spoils()? {
            return Ok(right.to_owned());
        }
        let mut other = right.to_owned();
        match self.u.int_in_range(0..=3)? {
            0 => other.push('x'),
            1 => drop(other.pop()),
            2 => other.push_str(&"y".repeat(self.u.int_in_range(0..=200)?)),
            _ => self.u.arbitrary::<&str>()?.clone_into(&mut other),
        }
        self.all_right &= other == right;
        Ok(other)
    }

    fn spoils(&mut self) -> Result<bool> {
        self.u.ratio(1, 12)
    }
}

fn map(u: &mut Unstructured<'_>) -> Result<bool> {
    let cpus = u.int_in_range(1..=8192)?;
    let map_type = *u.choose(&DATA_MAPS)?;
    let flags = u.arbitrary::<u32>()? & PLAIN_FLAGS;
    let (key_size, value_size, max_entries) = (u.arbitrary()?, u.arbitrary()?, u.arbitrary()?);
    let mut mostly = Mostly { u, all_right: true };
    let map = MapCreate {
        purpose: Purpose::Object(0),
        map_type: mostly.number(map_type)?,
        key_size,
        value_size,
        max_entries,
        flags: mostly.number(flags)?,
        extra: mostly.number(0)?.into(),
        name: mostly.text("counts.of_9")?,
        btf: 0,
        btf_ids: (0, 0),
    };
    let all_right = mostly.all_right;
    let bytes = match inspect::check_map(&map, cpus) {
        Ok(bytes) => bytes,
        Err(refusal) => {
            assert!(!all_right, "{refusal}: {map:?}");
            return Ok(false);
        }
    };
    assert!(DATA_MAPS.contains(&map.map_type) && map.flags & !PLAIN_FLAGS == 0, "{map:?}");
    assert!(map.name.len() <= 15 && map.name.chars().all(|c| c.is_ascii_alphanumeric() || "_.".contains(c)));
    assert!(map.extra == 0 || (map.map_type == 30 && map.extra < 16), "{map:?}");
    // At least its values, once for each CPU where it has them so; a ring buffer's entries are bytes.
    let (entries, value, key) = (u128::from(max_entries), u128::from(value_size), u128::from(key_size));
    let least = match map.map_type {
        27 => entries,
        5 | 6 | 10 => entries * (key + value * u128::from(cpus)),
        30 => entries * value,
        _ => entries * (key + value),
    };
    assert!(u128::from(bytes) >= least.min(u64::MAX.into()), "{bytes} bytes are charged for {map:?}");
    Ok(true)
}

/// Instructions that are fine, with one among them now and then that is not.
fn write(mostly: &mut Mostly<'_, '_>) -> Result<Vec<u8>> {
    let mut insns: Vec<u8> = Vec::new();
    for _ in 0..mostly.u.int_in_range(1..=6)? {
        let (code, source, immediate) = match mostly.u.int_in_range(0..=5)? {
            0 => (0x85, 0, *mostly.u.choose(&[1, 5, 109, LAST_FUNCTION])?),
            1 => (0x85, 1, mostly.u.arbitrary()?),
            2 => (0x85, 2, KFUNC),
            3 => (0x18, *mostly.u.choose(&[0, 1, 2, 4])?, mostly.u.arbitrary()?),
            4 => (0xbf, 1, 0),
            _ => (0x95, 0, 0),
        };
        let registers = u8::try_from(mostly.number(source << 4)? & 0xff).expect("a byte");
        let offset = u8::try_from(mostly.number(0)? & 0xff).expect("a byte");
        insns.extend([code, registers, offset, 0]);
        insns.extend(mostly.number(immediate)?.to_le_bytes());
        if code == 0x18 {
            insns.extend(mostly.number(0)?.to_le_bytes());
            insns.extend([0; 4]);
        }
    }
    Ok(insns)
}

fn length(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).expect("short")
}

fn program(u: &mut Unstructured<'_>) -> Result<bool> {
    let index = u.int_in_range(0..=2)?;
    let mut mostly = Mostly { u, all_right: true };
    let insns = write(&mut mostly)?;
    let index = mostly.number(index)?;
    let (name, prog_type, attach_type, flags) = PROGRAMS[index.min(2) as usize];
    let (funcs, lines) = (mostly.u.int_in_range(0..=2)?, mostly.u.int_in_range(0..=2)?);
    let flags = mostly.u.arbitrary::<u32>()? & flags;
    let load = ProgLoad {
        purpose: Purpose::Object(index),
        prog_type: mostly.number(prog_type)?,
        expected_attach_type: mostly.number(attach_type)?,
        flags: mostly.number(flags)?,
        name: mostly.text(name)?,
        license: mostly.text("GPL")?,
        btf: 0,
        kfuncs: Vec::new(),
        log: LogWanted::No,
        record_sizes: (mostly.number(8)?, mostly.number(16)?),
        parts: (mostly.number(length(&insns))?, mostly.number(funcs * 8)?, mostly.number(lines * 16)?),
        bulk: Bulk::empty(),
    };
    let len = insns.len() + (funcs * 8 + lines * 16) as usize;
    let len = mostly.number(u32::try_from(len).expect("short"))? as usize;
    let all_right = mostly.all_right;
    let rule = match inspect::check_program(permit(), index, &load, len) {
        Ok(rule) => rule,
        Err(refusal) => {
            let too_many = insns.len() > 12 * INSN;
            assert!(!all_right || too_many, "{refusal}: {load:?}");
            return Ok(false);
        }
    };
    let (name, prog_type, attach_type, flags) = PROGRAMS[index as usize];
    assert!(rule.program.as_str().starts_with(name), "{load:?}");
    assert!(load.prog_type == prog_type && load.expected_attach_type == attach_type, "{load:?}");
    assert!(load.flags & !flags == 0 && name.starts_with(&load.name), "{load:?}");
    let (instructions, funcs, lines) = load.parts;
    let parts = [instructions, funcs, lines].map(u64::from);
    assert!(parts.iter().sum::<u64>() == len as u64 && len <= MAX_PROGRAM, "{load:?}");
    assert!(instructions % 8 == 0 && (1..=12).contains(&(instructions / 8)), "{load:?}");
    assert!(load.license.len() < 128 && !load.license.contains('\0'), "{load:?}");
    // The parts add up to the bytes that came: the helper has as many.
    let mut bytes = insns;
    bytes.resize(len.min(1 << 16), 0);
    let Some(insns) = bytes.get(..instructions as usize) else { return Ok(false) };
    let refusal = match inspect::scan(insns, allow) {
        Ok(slots) => {
            let named = named(insns).expect("what passes can be decoded");
            assert_eq!(slots, named.maps);
            assert!(slots.iter().all(|slot| (slot.index + 2) * INSN <= insns.len()), "{slots:?}");
            for call in named.calls {
                let fine = match call {
                    Call::Helper(id) => (1..=LAST_FUNCTION).contains(&id) && !BY_GRANT.contains(&id),
                    Call::Kernel(number) => number == KFUNC,
                };
                assert!(fine, "{call:?} passes");
            }
            return Ok(true);
        }
        Err(refusal) => refusal,
    };
    assert!(!all_right, "{refusal}: {insns:?}");
    Ok(false)
}

/// As the helper asks the policy, with one function of the kernel that this machine has.
fn allow(call: Call) -> Result<(), Refusal> {
    let function = match call {
        Call::Helper(id) => Function::Helper(id),
        Call::Kernel(KFUNC) => Function::Kernel("bpf_rcu_read_lock".parse().expect("a name")),
        Call::Kernel(_) => return Err(Refusal::object("a function without a name")),
    };
    inspect::granted(permit().object(), permit().rules(), &function)
}

fn probe(u: &mut Unstructured<'_>) -> Result<bool> {
    let insns = u.arbitrary::<&[u8]>()?;
    let prog_type = *u.choose(&[1, 2, 5, 9])?;
    let mut mostly = Mostly { u, all_right: true };
    let load = ProgLoad {
        purpose: Purpose::Probe,
        prog_type: mostly.number(prog_type)?,
        expected_attach_type: 0,
        flags: mostly.number(0)?,
        name: mostly.text("libbpf_nametest")?,
        license: mostly.text("GPL")?,
        btf: 0,
        kfuncs: Vec::new(),
        log: LogWanted::No,
        record_sizes: (0, 0),
        parts: (mostly.number(length(insns))?, 0, 0),
        bulk: Bulk::empty(),
    };
    if inspect::check_probe(&load, insns.len()).is_err() {
        let fine = (1..=16).contains(&(insns.len() / INSN)) && insns.len().is_multiple_of(INSN);
        assert!(!mostly.all_right || !fine, "{load:?}");
        return Ok(false);
    }
    assert!(
        [1, 2, 5, 9].contains(&load.prog_type) && load.flags == 0 && insns.len() <= 16 * INSN,
        "{load:?}"
    );
    if inspect::scan(insns, inspect::probe_call).is_ok() {
        let calls = named(insns).expect("what passes can be decoded").calls;
        // bpf_probe_read_kernel, bpf_get_attach_cookie
        assert!(calls.iter().all(|call| matches!(call, Call::Helper(113 | 174))), "{calls:?}");
    }
    Ok(true)
}
