//! What an object file holds, as `bpfgate-loader --describe` tells the command line: for people who write policies.
//! Nothing is decided by it. A helper looks at what libbpf really asks for.
#![forbid(unsafe_code)]

use crate::functions::Function;
use crate::messages::loader::MapCreate;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// One object, opened by libbpf and not loaded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// Its programs, in the order of the file.
    pub programs: Vec<Program>,
    /// Its maps, data sections included.
    pub maps: Vec<Map>,
    /// Its global variables; none if it has no BTF.
    pub variables: Vec<Variable>,
    /// What it wants and no policy can allow: a sentence.
    pub wish: Option<String>,
}

/// A program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// The C function.
    pub name: String,
    /// What stands in `SEC()`.
    pub section: String,
    /// `enum bpf_prog_type`, by its section.
    pub prog_type: u32,
    /// `BPF_F_*` of programs.
    pub flags: u32,
    /// Its instructions, without those of functions that it calls.
    pub instructions: u32,
    /// Functions that it calls, itself or through functions of the object.
    pub functions: BTreeSet<Function>,
    /// What stands in its instructions and is refused: a sentence.
    pub refused: Option<String>,
}

/// A map.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Map {
    /// What a policy calls it.
    pub name: String,
    /// What the helper will be asked for.
    pub create: MapCreate,
}

/// A global variable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Variable {
    /// `.rodata` and the like.
    pub section: String,
    /// Its name.
    pub name: String,
    /// Bytes.
    pub size: u32,
    /// What it holds.
    pub shape: Shape,
}

/// What a variable holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Shape {
    /// Whole numbers from 0, truth values included.
    Unsigned,
    /// Whole numbers.
    Signed,
    /// Anything else.
    Other,
}

impl Variable {
    /// A client can be allowed to set it: it is constant for the program.
    pub fn is_read_only(&self) -> bool {
        self.section.starts_with(".rodata")
    }

    /// Its least and its largest value, as far as a policy can write them.
    pub fn bounds(&self) -> Option<(i64, i64)> {
        let bits = self.size.checked_mul(8).filter(|bits| matches!(bits, 8 | 16 | 32 | 64))?;
        match self.shape {
            Shape::Unsigned => Some((0, i64::MAX >> (63 - bits.min(63)))),
            Shape::Signed => Some((i64::MIN >> (64 - bits), i64::MAX >> (64 - bits))),
            Shape::Other => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_those_of_the_type() {
        let bounds =
            |size, shape| Variable { section: ".rodata".into(), name: "v".into(), size, shape }.bounds();
        assert_eq!(bounds(1, Shape::Unsigned), Some((0, 255)));
        assert_eq!(bounds(1, Shape::Signed), Some((-128, 127)));
        assert_eq!(bounds(4, Shape::Unsigned), Some((0, i64::from(u32::MAX))));
        assert_eq!(bounds(8, Shape::Unsigned), Some((0, i64::MAX)));
        assert_eq!(bounds(8, Shape::Signed), Some((i64::MIN, i64::MAX)));
        assert_eq!(bounds(16, Shape::Signed), None);
        assert_eq!(bounds(4, Shape::Other), None);
    }
}
