//! How each process of bpfgate gives up what it does not need. Everything here is irreversible, and whatever fails
//! is an error of the caller, which ends: there is no "as far as possible".
//!
//! The order matters: [`process`] (limits, not dumpable) -> [`capabilities`] (ids, sets, securebits) ->
//! [`files`] (landlock) -> [`syscalls`] (seccomp; nothing of the above is possible after it).
#![deny(unsafe_code)]

pub mod capabilities;
pub mod files;
pub mod process;
pub mod spawn;
pub mod syscalls;

use std::fmt;

/// A step that failed. The process must end.
#[derive(Debug)]
pub struct Fatal(pub String);

impl Fatal {
    /// `step` failed because of `error`.
    pub fn step(step: &str, error: impl fmt::Display) -> Self {
        Self(format!("{step}: {error}"))
    }
}

impl fmt::Display for Fatal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Fatal {}

/// Names the step that a result belongs to.
pub trait Step<T> {
    /// The value, or a [`Fatal`] that says which step failed.
    fn step(self, step: &str) -> Result<T, Fatal>;
}

impl<T, E: fmt::Display> Step<T> for Result<T, E> {
    fn step(self, step: &str) -> Result<T, Fatal> {
        self.map_err(|error| Fatal::step(step, error))
    }
}
