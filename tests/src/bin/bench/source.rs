//! Sizes that stand in the source text of the helper.

use crate::{Result, Trying};
use std::fs;
use std::path::Path;

/// Lines of Rust without tests.
#[derive(Default)]
pub(crate) struct Lines {
    /// Neither blank nor only a comment.
    pub(crate) code: u32,
    /// All.
    pub(crate) all: u32,
}

/// Counts the files of a directory, without `*tests.rs` and without what is behind `#[cfg(test)]`.
pub(crate) fn lines(directory: &Path) -> Result<Lines> {
    let reading = format!("reading {}", directory.display());
    let mut sum = Lines::default();
    for entry in fs::read_dir(directory).trying(&reading)? {
        let path = entry.trying(&reading)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() {
            let below = lines(&path)?;
            sum = Lines { code: sum.code + below.code, all: sum.all + below.all };
        } else if name.ends_with(".rs") && !name.ends_with("tests.rs") {
            let text = fs::read_to_string(&path).trying(&format!("reading {}", path.display()))?;
            count(&text, &mut sum);
        }
    }
    Ok(sum)
}

/// The text is as rustfmt leaves it: what is at the margin ends with a `}` or a `;` at the end of its line.
fn count(text: &str, sum: &mut Lines) {
    let mut in_test = false;
    for line in text.lines() {
        if line == "#[cfg(test)]" {
            in_test = true;
        } else if in_test {
            let at_margin = !line.starts_with([' ', '#']);
            in_test = !(at_margin && (line.starts_with('}') || line.ends_with([';', '}'])));
        } else {
            sum.all += 1;
            let line = line.trim_start();
            sum.code += u32::from(!line.is_empty() && !line.starts_with("//"));
        }
    }
}

/// The sizes of the helper's two lists: system calls, and commands of bpf(2).
pub(crate) fn lists(file: &Path) -> Result<(u32, u32)> {
    let text = fs::read_to_string(file).trying(&format!("reading {}", file.display()))?;
    let entries = |start: &str, entry: &str| {
        let list = text.split_once(start).and_then(|(_, rest)| rest.split_once("\n];"));
        let count = list.map_or(0, |(list, _)| list.matches(entry).count());
        match u32::try_from(count) {
            Ok(count) if count > 0 => Ok(count),
            _ => Err(format!("{} has no list that starts with '{start}'", file.display())),
        }
    };
    Ok((entries("const ROWS:", "row!(")?, entries("const BPF:", "(cmd::")?))
}
