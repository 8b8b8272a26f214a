//! What of a helper can be looked at from outside: the record of what outlives it. Everything else is the program.
#![forbid(unsafe_code)]

pub mod record;
pub mod way;
