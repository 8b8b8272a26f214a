//! Which helper functions the programs of an object call, read from its sections: what libbpf puts together at a load
//! is not there yet. A program reaches a function of the object by a call or by its address, both of which are
//! relocations, or by a call within its section.

use bpfgate_protocol::inspect::{self, INSN};
use bpfgate_protocol::refusal::Refusal;
use object::{Object, ObjectSection, ObjectSymbol, RelocationTarget, SectionKind, SymbolKind, SymbolSection};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

/// Helper functions by number, and what is refused of the instructions.
type Calls = (BTreeSet<u32>, Option<String>);

/// The number of a section, and a place in it.
type Place = (usize, u64);

/// A function of the object.
struct Function<'a> {
    insns: &'a [u8],
    next: BTreeSet<Place>,
}

const CALL: u8 = 0x85;
const LD_IMM64: u8 = 0x18;
/// Of a call: a function of the object.
const PSEUDO_CALL: u8 = 1;

/// By the name of every function: what it calls, itself or through others.
pub(crate) fn of_programs(bytes: &[u8]) -> Result<BTreeMap<String, Calls>, object::Error> {
    let elf = object::File::parse(bytes)?;
    let mut functions = BTreeMap::new();
    let mut names = BTreeMap::new();
    for symbol in elf.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.size() > 0) {
        let SymbolSection::Section(index) = symbol.section() else { continue };
        let section = elf.section_by_index(index)?;
        let Some(insns) = section.data_range(symbol.address(), symbol.size())? else { continue };
        let place = (index.0, symbol.address());
        functions.insert(place, Function { insns, next: BTreeSet::new() });
        names.insert(symbol.name()?.to_owned(), place);
    }
    let references = references(&elf, &functions)?;
    for (from, to) in references {
        let within = functions.range_mut((from.0, 0)..=from).next_back();
        if let Some((_, function)) = within {
            function.next.insert(to);
        }
    }
    Ok(names.into_iter().map(|(name, place)| (name, reached(&functions, place))).collect())
}

/// From instructions to the functions that they refer to.
fn references(
    elf: &object::File<'_>,
    functions: &BTreeMap<Place, Function<'_>>,
) -> Result<Vec<(Place, Place)>, object::Error> {
    let mut all = Vec::new();
    for section in elf.sections().filter(|section| section.kind() == SectionKind::Text) {
        let (number, data) = (section.index().0, section.data()?);
        let mut relocated = BTreeSet::new();
        for (at, relocation) in section.relocations() {
            relocated.insert(at);
            let RelocationTarget::Symbol(symbol) = relocation.target() else { continue };
            let symbol = elf.symbol_by_index(symbol)?;
            let (Some(target), Some(insn)) = (symbol.section_index(), insn(data, at)) else { continue };
            let base = if symbol.kind() == SymbolKind::Section { 0 } else { symbol.address() };
            let distance = match insn[0] {
                CALL => call_distance(*insn),
                LD_IMM64 => i64::from(immediate(*insn)),
                _ => continue,
            };
            all.push(((number, at), (target.0, base.saturating_add_signed(distance))));
        }
        let (insns, _) = data.as_chunks::<INSN>();
        for (at, insn) in (0_u64..).step_by(INSN).zip(insns) {
            if insn[0] == CALL && insn[1] >> 4 == PSEUDO_CALL && !relocated.contains(&at) {
                let distance = call_distance(*insn);
                all.push(((number, at), (number, at.saturating_add_signed(distance))));
            }
        }
    }
    all.retain(|(_, to)| functions.contains_key(to));
    Ok(all)
}

fn insn(data: &[u8], at: u64) -> Option<&[u8; INSN]> {
    data.get(usize::try_from(at).ok()?..)?.first_chunk()
}

/// Where a call leads, in bytes from its own place or, if there is a relocation, from the symbol of that.
fn call_distance(insn: [u8; INSN]) -> i64 {
    (i64::from(immediate(insn)) + 1) * INSN.cast_signed() as i64
}

fn immediate(insn: [u8; INSN]) -> i32 {
    i32::from_le_bytes([insn[4], insn[5], insn[6], insn[7]])
}

fn reached(functions: &BTreeMap<Place, Function<'_>>, start: Place) -> Calls {
    let calls = RefCell::new(BTreeSet::new());
    let collect = |id: u32| -> Result<(), Refusal> {
        calls.borrow_mut().insert(id);
        Ok(())
    };
    let mut refused = None;
    let (mut seen, mut open) = (BTreeSet::from([start]), vec![start]);
    while let Some(function) = open.pop().and_then(|place| functions.get(&place)) {
        // Before libbpf has put numbers in, only what is wrong by itself is refused here.
        if let Err(refusal) = inspect::scan(function.insns, collect) {
            refused = Some(refusal.why);
        }
        open.extend(function.next.iter().filter(|place| seen.insert(**place)));
    }
    (calls.into_inner(), refused)
}
