//! What the fuzzers run: everything of bpfgate that reads what another process wrote, beside a second reading of it.
//! The fuzzers are in tests/fuzz and need a nightly compiler; the same functions run on the seeds as an ordinary test.
//!
//! | target | what is read | what is asserted |
//! |---|---|---|
//! | `parser` | policy files | an error shows its place; what is valid can be printed and read again |
//! | `printer` | random valid policies | printed and read again they are the same |
//! | `evaluator` | random policies and requests | `authorize` says what a naive evaluator says |
//! | [`calls`](calls::calls) | calls of clients | what is understood is what was said, written again it is the same |
//! | [`inner`](inner::inner) | messages of the inner channels | one message has one encoding, and no byte more or less |
//! | [`record`](record::record) | the record of what outlives a helper | its numbers make sense; written again it is the same |
//! | [`instructions`](instructions::instructions) | instructions of programs | a second decoder sees the same calls and the same maps |
//! | [`dialogue`](dialogue::dialogue) | what a loader asks of a helper | what passes is inside of the permit, said a second time; what is just so passes |
//! | [`types`](types::types) | the kernel's BTF | a second reader finds the same functions |
//! | [`channel`](channel::channel) | datagrams with descriptors, over real sockets | every descriptor that came is handed out or closed |
#![forbid(unsafe_code)]

pub mod calls;
pub mod channel;
pub mod dialogue;
pub mod inner;
pub mod instructions;
pub mod record;
pub mod types;

use bpfgate_policy_tests::targets::{evaluator, parser, printer};

/// A target: it takes any bytes, panics where something is wrong, and gives whether the bytes came to anything.
pub type Run = fn(&[u8]) -> bool;

/// All, with their names.
pub const ALL: [(&str, Run); 10] = [
    ("parser", parser),
    ("printer", printer),
    ("evaluator", evaluator),
    ("calls", calls::calls),
    ("inner", inner::inner),
    ("record", record::record),
    ("instructions", instructions::instructions),
    ("dialogue", dialogue::dialogue),
    ("types", types::types),
    ("channel", channel::channel),
];
