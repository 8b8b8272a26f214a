//! File offsets of functions in a uprobe target.

use crate::worker::Failure;
use bpfgate_protocol::names::SymbolName;
use object::{Object, ObjectSegment, ObjectSymbol, ReadCache, SymbolKind};
use std::fs::File;
use std::os::fd::OwnedFd;

/// Finds each symbol in the symbol tables; none may be missing.
///
/// The file is read piece by piece, not mapped: it may be cut short while we look.
pub(crate) fn find(file: OwnedFd, symbols: &[SymbolName]) -> Result<Vec<u64>, Failure> {
    let cache = ReadCache::new(File::from(file));
    let elf = object::File::parse(&cache)
        .map_err(|e| Failure::object(format!("the binary is not an ELF file: {e}")))?;
    let mut offsets = vec![None; symbols.len()];
    for symbol in elf.symbols().chain(elf.dynamic_symbols()) {
        if symbol.kind() != SymbolKind::Text || symbol.is_undefined() {
            continue;
        }
        let Ok(name) = symbol.name() else { continue };
        for (wanted, offset) in symbols.iter().zip(&mut offsets) {
            if offset.is_none() && wanted.as_str() == name {
                *offset = file_offset(&elf, symbol.address());
            }
        }
    }
    let found = |(wanted, offset): (&SymbolName, Option<u64>)| {
        offset.ok_or_else(|| Failure::object(format!("the binary has no function {wanted}")))
    };
    symbols.iter().zip(offsets).map(found).collect()
}

/// Where in the file the byte at a virtual address is.
fn file_offset<'data>(elf: &impl Object<'data>, address: u64) -> Option<u64> {
    elf.segments().find_map(|segment| {
        let (offset, size) = segment.file_range();
        let into = address.checked_sub(segment.address())?;
        (into < size).then(|| offset.checked_add(into)).flatten()
    })
}
