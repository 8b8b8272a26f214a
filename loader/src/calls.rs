//! Which functions the programs of an object call, read from its sections: what libbpf puts together at a load
//! is not there yet. A program reaches a function of the object by a call or by its address, both of which are
//! relocations, or by a call within its section; a function of the kernel by a call of a symbol that is nowhere.

use bpfgate_protocol::functions::Function as Called;
use bpfgate_protocol::inspect::{self, Call, INSN};
use bpfgate_protocol::refusal::Refusal;
use object::{Object, ObjectSection, ObjectSymbol, RelocationTarget, SectionKind, SymbolKind, SymbolSection};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

/// What is called, and what is refused of the instructions.
pub(crate) type Calls = (BTreeSet<Called>, Option<String>);

/// The number of a section, and a place in it.
type Place = (usize, u64);

/// A function of the object.
struct Function<'a> {
    insns: &'a [u8],
    next: BTreeSet<Place>,
    /// Functions of the kernel, or why one is refused.
    kernel: Vec<Result<Called, String>>,
}

/// Where a reference leads.
enum Target {
    Function(Place),
    Kernel(Result<Called, String>),
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
        functions.insert(place, Function { insns, next: BTreeSet::new(), kernel: Vec::new() });
        names.insert(symbol.name()?.to_owned(), place);
    }
    let references = references(&elf, &functions)?;
    for (from, to) in references {
        let within = functions.range_mut((from.0, 0)..=from).next_back();
        let Some((_, function)) = within else { continue };
        match to {
            Target::Function(to) => drop(function.next.insert(to)),
            Target::Kernel(called) => function.kernel.push(called),
        }
    }
    Ok(names.into_iter().map(|(name, place)| (name, reached(&functions, place))).collect())
}

/// From instructions to the functions that they refer to.
fn references(
    elf: &object::File<'_>,
    functions: &BTreeMap<Place, Function<'_>>,
) -> Result<Vec<(Place, Target)>, object::Error> {
    let mut all = Vec::new();
    for section in elf.sections().filter(|section| section.kind() == SectionKind::Text) {
        let (number, data) = (section.index().0, section.data()?);
        let mut relocated = BTreeSet::new();
        for (at, relocation) in section.relocations() {
            relocated.insert(at);
            let RelocationTarget::Symbol(symbol) = relocation.target() else { continue };
            let symbol = elf.symbol_by_index(symbol)?;
            let Some(insn) = insn(data, at) else { continue };
            if symbol.is_undefined() && insn[0] == CALL {
                all.push(((number, at), Target::Kernel(kernel_function(&symbol)?)));
            }
            let Some(target) = symbol.section_index() else { continue };
            let base = if symbol.kind() == SymbolKind::Section { 0 } else { symbol.address() };
            let distance = match insn[0] {
                CALL => call_distance(*insn),
                LD_IMM64 => i64::from(immediate(*insn)),
                _ => continue,
            };
            let to = (target.0, base.saturating_add_signed(distance));
            all.push(((number, at), Target::Function(to)));
        }
        let (insns, _) = data.as_chunks::<INSN>();
        for (at, insn) in (0_u64..).step_by(INSN).zip(insns) {
            if insn[0] == CALL && insn[1] >> 4 == PSEUDO_CALL && !relocated.contains(&at) {
                let distance = call_distance(*insn);
                let to = (number, at.saturating_add_signed(distance));
                all.push(((number, at), Target::Function(to)));
            }
        }
    }
    all.retain(|(_, to)| match to {
        Target::Function(place) => functions.contains_key(place),
        Target::Kernel(_) => true,
    });
    Ok(all)
}

fn kernel_function<'d>(symbol: &impl ObjectSymbol<'d>) -> Result<Result<Called, String>, object::Error> {
    let name = symbol.name()?;
    Ok(if symbol.is_weak() {
        // What an object does on another kernel is not what was looked at.
        Err(format!("kernel function {name} is called only where there is one (__weak), which is refused"))
    } else {
        name.parse().map(Called::Kernel).map_err(|error| format!("{name:?} is called; {error}"))
    })
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
    let collect = |call: Call| -> Result<(), Refusal> {
        match call {
            Call::Helper(id) => drop(calls.borrow_mut().insert(Called::Helper(id))),
            Call::Kernel(_) => return Err(Refusal::object("a function of the kernel is called by number")),
        }
        Ok(())
    };
    let mut refused = None;
    let (mut seen, mut open) = (BTreeSet::from([start]), vec![start]);
    while let Some(function) = open.pop().and_then(|place| functions.get(&place)) {
        // Before libbpf has put numbers in, only what is wrong by itself is refused here.
        if let Err(refusal) = inspect::scan(function.insns, collect) {
            refused = Some(refusal.why);
        }
        for called in &function.kernel {
            match called {
                Ok(called) => drop(calls.borrow_mut().insert(called.clone())),
                Err(why) => refused = Some(why.clone()),
            }
        }
        open.extend(function.next.iter().filter(|place| seen.insert(**place)));
    }
    (calls.into_inner(), refused)
}
