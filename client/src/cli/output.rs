//! Tables for people, JSON for programs, and nothing a terminal would obey.

use std::fmt::{self, Write as _};
use std::io::{self, Write};

use bpfgate_protocol::refusal::is_active;
use serde_json::Value;

/// How a result is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    Table,
    Json,
}

/// Rows under a heading, columns as wide as they need.
#[derive(Debug)]
pub(crate) struct Table<const COLUMNS: usize> {
    heading: [&'static str; COLUMNS],
    rows: Vec<[String; COLUMNS]>,
}

impl<const COLUMNS: usize> Table<COLUMNS> {
    pub(crate) fn new(heading: [&'static str; COLUMNS]) -> Self {
        Self { heading, rows: Vec::new() }
    }

    pub(crate) fn row(&mut self, cells: [&dyn fmt::Display; COLUMNS]) {
        self.rows.push(cells.map(|cell| match clean(&cell.to_string()) {
            // An empty cell would shift the row for whoever splits it at blanks.
            text if text.is_empty() => "-".to_owned(),
            text => text,
        }));
    }
}

impl<const COLUMNS: usize> fmt::Display for Table<COLUMNS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut widths = self.heading.map(str::len);
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut line = |cells: [&str; COLUMNS]| {
            let mut text = String::new();
            for (cell, width) in cells.iter().zip(widths) {
                write!(text, "{cell:width$}  ")?;
            }
            writeln!(f, "{}", text.trim_end())
        };
        line(self.heading)?;
        self.rows.iter().try_for_each(|row| line(row.each_ref().map(String::as_str)))
    }
}

/// Prints to stdout and flushes.
pub(crate) fn print(text: &dyn fmt::Display) -> io::Result<()> {
    let mut out = io::stdout().lock();
    write!(out, "{text}")?;
    out.flush()
}

/// Prints one JSON value; characters that a terminal obeys are escaped.
pub(crate) fn print_json(value: &Value) -> io::Result<()> {
    print_escaped(&format!("{value:#}"))
}

/// The same on one line.
pub(crate) fn print_json_line(value: &Value) -> io::Result<()> {
    print_escaped(&value.to_string())
}

fn print_escaped(json: &str) -> io::Result<()> {
    let mut text = String::new();
    for c in json.chars() {
        // Outside of strings JSON has no such character but the line feeds that were just made.
        if c != '\n' && is_active(c) {
            let mut units = [0; 2];
            for unit in c.encode_utf16(&mut units) {
                let _ = write!(text, "\\u{unit:04x}");
            }
        } else {
            text.push(c);
        }
    }
    print(&format_args!("{text}\n"))
}

/// Text of a peer on one line, with every control character made visible.
pub(crate) fn clean(text: &str) -> String {
    visible(text, is_active)
}

/// Text of a peer that may have several lines.
pub(crate) fn clean_lines(text: &str) -> String {
    visible(text, |c| c != '\n' && c != '\t' && is_active(c))
}

fn visible(text: &str, active: impl Fn(char) -> bool) -> String {
    let mut clean = String::with_capacity(text.len());
    for c in text.chars() {
        if active(c) {
            clean.extend(c.escape_default());
        } else {
            clean.push(c);
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new(["ID", "NAME", "X"]);
        table.row([&1, &"a-long-name", &"x"]);
        table.row([&200, &"", &"y"]);
        assert_eq!(table.to_string(), "ID   NAME         X\n1    a-long-name  x\n200  -            y\n");
    }

    #[test]
    fn a_table_without_rows_is_its_heading() {
        assert_eq!(Table::new(["A", "B"]).to_string(), "A  B\n");
    }

    #[test]
    fn nothing_reaches_the_terminal() {
        assert_eq!(clean("a\x1b[2J\r\n\u{9b}b\u{202e}é"), "a\\u{1b}[2J\\r\\n\\u{9b}b\\u{202e}é");
        assert_eq!(clean_lines("0: r0\n\tx\x07\n"), "0: r0\n\tx\\u{7}\n");
        let mut table = Table::new(["A"]);
        table.row([&"x\nFAKE ROW\x1b]0;t\x07"]);
        assert_eq!(table.to_string().matches('\n').count(), 2);
        assert!(!table.to_string().contains('\x1b'));
    }
}
