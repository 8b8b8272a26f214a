//! Functions of the kernel, by their names in its own description of its types.
//!
//! A helper reads it before it locks itself down, and only where its policy names such functions. The kernel wrote it,
//! and no object has a part in it; all the same nothing is read that is not inside of it.
#![forbid(unsafe_code)]

use crate::names::FunctionName;
use std::collections::{BTreeMap, BTreeSet};

/// Where the kernel shows it; functions of modules are elsewhere.
pub const KERNEL: &str = "/sys/kernel/btf/vmlinux";

/// The most bytes of it that are read. Kernels of distributions have 4 to 7 MiB.
pub const MAX: u64 = 64 << 20;

/// Bytes of one `struct btf_type`. Source: include/uapi/linux/btf.h, as everything here.
const TYPE: usize = 12;

/// `BTF_KIND_FUNC`.
const FUNC: u32 = 12;

/// The ids of the functions that have one of these names: none, one, or several, which the kernel does not tell apart
/// by name.
///
/// Errors: what it is not, a phrase
pub fn functions(
    btf: &[u8],
    wanted: &BTreeSet<FunctionName>,
) -> Result<BTreeMap<FunctionName, Vec<u32>>, &'static str> {
    let (types, strings) = sections(btf)?;
    let mut found: BTreeMap<&[u8], (&FunctionName, Vec<u32>)> =
        wanted.iter().map(|name| (name.as_str().as_bytes(), (name, Vec::new()))).collect();
    let (mut rest, mut id) = (types, 0_u32);
    while !rest.is_empty() {
        // 0 is void, which stands nowhere.
        id += 1;
        let (Some(name), Some(info)) = (word(rest, 0), word(rest, 4)) else { return Err(CUT) };
        let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
        if kind == FUNC
            && let Some((_, ids)) = found.get_mut(text(strings, name)?)
        {
            ids.push(id);
        }
        rest = rest.get(TYPE + behind(kind, count)?..).ok_or(CUT)?;
    }
    Ok(found.into_values().map(|(name, ids)| (name.clone(), ids)).collect())
}

const CUT: &str = "is cut short";

/// The bytes of types and of strings.
fn sections(btf: &[u8]) -> Result<(&[u8], &[u8]), &'static str> {
    const MAGIC: u16 = 0xeb9f;
    const VERSION: u8 = 1;
    let magic = btf.first_chunk().map(|bytes| u16::from_ne_bytes(*bytes));
    if magic != Some(MAGIC) || btf.get(2) != Some(&VERSION) {
        return Err("is no BTF of this version and byte order");
    }
    let part = |offset: usize| {
        let (header, start, len) = (word(btf, 4)?, word(btf, offset)?, word(btf, offset + 4)?);
        let start = (header as usize).checked_add(start as usize)?;
        btf.get(start..start.checked_add(len as usize)?)
    };
    part(8).zip(part(16)).ok_or(CUT)
}

/// Bytes that stand behind a type of this kind, which has this many members.
fn behind(kind: u32, count: usize) -> Result<usize, &'static str> {
    Ok(match kind {
        // PTR, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC, FLOAT, TYPE_TAG.
        2 | 7..=12 | 16 | 18 => 0,
        // INT, VAR, DECL_TAG.
        1 | 14 | 17 => 4,
        // ARRAY.
        3 => 12,
        // ENUM, FUNC_PROTO.
        6 | 13 => 8 * count,
        // STRUCT, UNION, DATASEC, ENUM64.
        4 | 5 | 15 | 19 => 12 * count,
        _ => return Err("has a kind of type that this build does not know"),
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// The string at this place, without its NUL.
fn text(strings: &[u8], at: u32) -> Result<&[u8], &'static str> {
    let from = strings.get(at as usize..).ok_or(CUT)?;
    from.iter().position(|&byte| byte == 0).map(|end| &from[..end]).ok_or(CUT)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> BTreeSet<FunctionName> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    /// One type of each kind, with as much behind it as the header says, and functions among them.
    fn made() -> Vec<u8> {
        let strings = b"\0one\0two\0twice\0";
        let (one, two, twice) = (1, 5, 9);
        let kinds: [(u32, u32, usize); 23] = [
            (0, 1, 4),
            (0, 2, 0),
            (0, 3, 12),
            (0, 4, 24),
            (0, 5, 24),
            (one, 12, 0),
            (0, 6, 16),
            (0, 7, 0),
            (0, 8, 0),
            (0, 9, 0),
            (0, 10, 0),
            (0, 11, 0),
            (twice, 12, 0),
            // The name alone makes no function.
            (two, 13, 16),
            (two, 14, 4),
            (0, 15, 24),
            (0, 16, 0),
            (0, 17, 4),
            (0, 18, 0),
            (0, 19, 24),
            (twice, 12, 0),
            (two, 12, 0),
            (two, 8, 0),
        ];
        let mut types = Vec::new();
        for (name, kind, behind) in kinds {
            types.extend([name, kind << 24 | 2, 0].map(u32::to_ne_bytes).concat());
            // What stands there must not be taken for a type: 12 << 24 would be a function.
            types.extend((12_u32 << 24).to_ne_bytes().repeat(behind / 4));
        }
        let len = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap();
        let header = [24, 0, len(&types), len(&types), len(strings)].map(u32::to_ne_bytes).concat();
        [&0xeb9f_u16.to_ne_bytes()[..], &[1, 0], &header, &types, strings].concat()
    }

    #[test]
    fn every_kind_is_stepped_over_and_functions_are_counted_from_one() {
        let found = functions(&made(), &names(&["one", "two", "twice", "absent"])).unwrap();
        let found: Vec<(&str, &[u32])> = found.iter().map(|(name, ids)| (name.as_str(), &ids[..])).collect();
        assert_eq!(found, [("absent", &[][..]), ("one", &[6]), ("twice", &[13, 21]), ("two", &[22])]);
    }

    #[test]
    fn what_lies_about_its_size_is_refused() {
        let good = made();
        let wanted = names(&["one"]);
        for len in 0..good.len() {
            assert!(functions(&good[..len], &wanted).is_err(), "{len} bytes of {}", good.len());
        }
        // Header length, offset and length of the types, offset and length of the strings.
        for at in [4, 8, 12, 16, 20] {
            for value in [u32::MAX, u32::try_from(good.len()).unwrap()] {
                let mut bad = good.clone();
                bad[at..at + 4].copy_from_slice(&value.to_ne_bytes());
                assert!(functions(&bad, &wanted).is_err(), "{at}: {value}");
            }
        }
        let changed = |at: usize, byte: u8| {
            let mut bad = good.clone();
            bad[at] = byte;
            functions(&bad, &wanted)
        };
        assert!(changed(0, 0).is_err() && changed(2, 2).is_err());
        // The kind of the first type: none of the kernel's.
        assert!(changed(24 + 7, 31).unwrap_err().contains("does not know"));
    }

    /// One of each name, and none of a name that nothing has.
    #[test]
    fn functions_of_this_kernel_are_found() {
        let Ok(btf) = std::fs::read(KERNEL) else {
            println!("skipped: this kernel has no {KERNEL}");
            return;
        };
        let found = functions(&btf, &names(&["cap_capable", "vfs_read", "no_such_function"])).unwrap();
        let ids: Vec<usize> = found.values().map(Vec::len).collect();
        assert_eq!(ids, [1, 0, 1], "{found:?}");
        assert!(functions(&btf[..btf.len() - 1], &names(&["cap_capable"])).is_err());
    }
}
