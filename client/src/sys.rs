//! The one door to the kernel: every unsafe block of this crate is below this module.
//!
//! Each submodule offers functions that are safe to call with any argument: they check lengths
//! and ranges themselves instead of relying on the caller.
#![allow(unsafe_code, reason = "bpf(2), mmap(2) and fork(2) have no safe wrapper")]

mod bpf;
mod memory;
mod process;

#[cfg(test)]
pub(crate) use bpf::testing;
pub(crate) use bpf::{BatchCursor, MapFd, RawInfo};
pub(crate) use memory::{Protection, Region};
pub(crate) use process::{Image, spawn};

use std::io;

/// Turns the -1 of a raw call into the error it left in errno.
fn check(result: i64) -> io::Result<i64> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
