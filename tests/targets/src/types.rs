//! The kernel's description of its types, read a second time: into a list of all functions first.
//! Source: Documentation/bpf/btf.rst.

use bpfgate_protocol::btf;
use bpfgate_protocol::names::FunctionName;
use std::collections::{BTreeMap, BTreeSet};

/// What is looked for.
const WANTED: [&str; 3] = ["one", "twice", "vfs_read"];

/// Any bytes are types or an error, and both readers find the same functions under the same numbers.
pub fn types(data: &[u8]) -> bool {
    let wanted: BTreeSet<FunctionName> = WANTED.map(|name| name.parse().expect("a name")).into();
    let (got, expected) = (btf::functions(data, &wanted), functions(data));
    let (Ok(got), Some(expected)) = (&got, &expected) else {
        assert!(got.is_err() && expected.is_none(), "{got:?} {expected:?}");
        return false;
    };
    for (name, ids) in got {
        let name = name.as_str().as_bytes();
        let same: Vec<u32> =
            expected.iter().filter(|(_, other)| **other == name).map(|(id, _)| *id).collect();
        assert_eq!(*ids, same, "{name:?}");
    }
    assert_eq!(got.len(), WANTED.len());
    got.values().any(|ids| !ids.is_empty())
}

/// Numbers and names of all functions; none if a type or one of their names is not inside.
fn functions(data: &[u8]) -> Option<BTreeMap<u32, &[u8]>> {
    // Magic number, version and flags; then the length of the header, and offset and length of types and strings.
    if data.get(..3)? != [0x9f, 0xeb, 1] {
        return None;
    }
    let number = |from: &[u8], at: usize| Some(u32::from_le_bytes(from.get(at..at + 4)?.try_into().ok()?));
    let section = |at: usize| {
        let start = u64::from(number(data, 4)?) + u64::from(number(data, at)?);
        let end = start + u64::from(number(data, at + 4)?);
        data.get(usize::try_from(start).ok()?..usize::try_from(end).ok()?)
    };
    let (types, strings) = (section(8)?, section(16)?);
    let mut all = BTreeMap::new();
    let mut at = 0;
    for id in 1.. {
        if at == types.len() {
            break;
        }
        let (name, info) = (number(types, at)?, number(types, at + 4)?);
        let members = usize::try_from(info & 0xffff).ok()?;
        let behind = match info >> 24 & 31 {
            // int, variable, declaration tag
            1 | 14 | 17 => 4,
            // array
            3 => 12,
            // struct, union, section, enum of 64 bits
            4 | 5 | 15 | 19 => 12 * members,
            // enum, parameters of a function
            6 | 13 => 8 * members,
            12 => {
                let text = strings.get(usize::try_from(name).ok()?..)?;
                all.insert(id, &text[..text.iter().position(|byte| *byte == 0)?]);
                0
            }
            // pointer, forward, typedef, volatile, const, restrict, float, type tag
            2 | 7..=11 | 16 | 18 => 0,
            _ => return None,
        };
        at += 12 + behind;
        if at > types.len() {
            return None;
        }
    }
    Some(all)
}
