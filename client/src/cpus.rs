//! The CPUs that a per-CPU map has a value for.
#![forbid(unsafe_code)]

use std::io;

/// The number of possible CPUs: a per-CPU map has one value for each, online or not.
///
/// Source:  /sys/devices/system/cpu/possible (Documentation/ABI/testing/sysfs-devices-system-cpu)
pub fn possible() -> io::Result<usize> {
    const PATH: &str = "/sys/devices/system/cpu/possible";
    let text = std::fs::read_to_string(PATH)
        .map_err(|error| io::Error::new(error.kind(), format!("{PATH}: {error}")))?;
    count(text.trim()).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("{PATH}: not a list of CPUs: {text:?}"))
    })
}

/// Counts the CPUs of a list such as `0-3,8`.
fn count(text: &str) -> Option<usize> {
    text.split(',').try_fold(0usize, |sum, range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        sum.checked_add(last.checked_sub(first)?.checked_add(1)?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_counted() {
        for (list, cpus) in [("0", Some(1)), ("0-1", Some(2)), ("0-3,8-11", Some(8)), ("0,2", Some(2))] {
            assert_eq!(count(list), cpus, "{list}");
        }
        for list in ["", "-", "3-1", "0-", "a", "0,,1", "0-18446744073709551615"] {
            assert_eq!(count(list), None, "{list}");
        }
    }

    #[test]
    fn this_machine_has_one() {
        assert!(possible().unwrap() >= 1);
    }
}
