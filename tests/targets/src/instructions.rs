//! Instructions, decoded a second time: as numbers of 64 bits and by their fields, where the scanner goes by bytes.
//! Source: Documentation/bpf/standardization/instruction-set.rst.

use bpfgate_protocol::inspect::{Call, INSN, MapSlot, patch, scan};
use bpfgate_protocol::refusal::Refusal;
use std::cell::RefCell;

/// What instructions name.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Named {
    /// Functions, in order.
    pub calls: Vec<Call>,
    /// Places of maps.
    pub maps: Vec<MapSlot>,
}

/// Everything that instructions name outside of themselves; none if they are cut short, or name what no app may have.
pub fn named(insns: &[u8]) -> Option<Named> {
    const LD: u64 = 0;
    const JMP: u64 = 5;
    const JMP32: u64 = 6;
    let mut named = Named::default();
    let mut words = insns.chunks(INSN).enumerate();
    while let Some((index, chunk)) = words.next() {
        let word = u64::from_le_bytes(chunk.try_into().ok()?);
        let field = |shift: u32, bits: u32| word >> shift & ((1 << bits) - 1);
        let (class, source, offset) = (field(0, 3), field(12, 4), field(16, 16));
        let immediate = u32::try_from(field(32, 32)).expect("32 bits");
        match class {
            // Mode IMM, size DW: two instructions that are one.
            LD if field(5, 3) == 0 && field(3, 2) == 3 => {
                let (_, second) = words.next()?;
                let second = u64::from_le_bytes(second.try_into().ok()?);
                if second & 0xffff_ffff != 0 {
                    return None;
                }
                match source {
                    0 | 4 => {}
                    1 | 2 => named.maps.push(MapSlot { index, handle: immediate }),
                    _ => return None,
                }
            }
            // Operation CALL; bit 3 says that a register holds the function.
            JMP | JMP32 if field(4, 4) == 8 => match (class, field(3, 1), source) {
                (JMP, 0, 0) => named.calls.push(Call::Helper(immediate)),
                (JMP, 0, 1) => {}
                (JMP, 0, 2) if offset == 0 => named.calls.push(Call::Kernel(immediate)),
                _ => return None,
            },
            _ => {}
        }
    }
    Some(named)
}

/// The scanner sees what the second decoder sees, asks for every call, and refuses all if one is refused. A patch
/// changes the four bytes of its map.
pub fn instructions(data: &[u8]) -> bool {
    let asked = RefCell::new(Vec::new());
    let ask = |call| {
        asked.borrow_mut().push(call);
        Ok(())
    };
    let (got, expected) = (scan(data, ask), named(data));
    let (Ok(maps), Some(expected)) = (&got, &expected) else {
        assert!(got.is_err() && expected.is_none(), "{got:?} {expected:?}");
        return false;
    };
    assert_eq!((maps, &*asked.borrow()), (&expected.maps, &expected.calls));
    for not in expected.calls.iter().take(4) {
        let all_but = |call| if call == *not { Err(Refusal::object("not this one")) } else { Ok(()) };
        assert!(scan(data, all_but).is_err(), "{not:?} is called, and is not allowed");
    }
    let (mut patched, mut by_hand) = (data.to_vec(), data.to_vec());
    for slot in maps {
        patch(&mut patched, *slot, 0x1234_5678);
        by_hand[INSN * slot.index..][4..8].copy_from_slice(&[0x78, 0x56, 0x34, 0x12]);
    }
    assert_eq!(patched, by_hand);
    true
}
