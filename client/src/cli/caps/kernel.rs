//! Versions of kernels.

use std::fmt;
use std::str::FromStr;

use bpfgate_protocol::demands;
use bpfgate_protocol::policy::{Machine, kernel_version};

/// A version, by the two numbers that count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Kernel(pub(crate) demands::Kernel);

impl Kernel {
    /// From what the kernel says of itself: `6.1.0-28-amd64`.
    pub(crate) fn of_release(release: &str) -> Option<Self> {
        kernel_version(release).map(Self)
    }

    /// The kernel that runs.
    pub(crate) fn here() -> Option<Self> {
        Machine::here().ok().map(|machine| Self(machine.kernel))
    }
}

impl FromStr for Kernel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::of_release(text).ok_or_else(|| format!("{text} is no version of a kernel, such as 6.1"))
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0.0, self.0.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_have_two_numbers_that_count() {
        for (text, version) in [("6.1", (6, 1)), ("6.18.44-fc-v669\n", (6, 18)), ("5.10.0-28-amd64", (5, 10))]
        {
            assert_eq!(text.parse(), Ok(Kernel(version)));
        }
        for wrong in ["", "6", "v6.1", "six", "6."] {
            assert!(wrong.parse::<Kernel>().is_err(), "{wrong}");
        }
    }
}
