//! Where in the text of a policy something stands. What it means is decided elsewhere; here keys are followed.

use std::ops::Range;
use toml_edit::{Document, Item, TableLike};

/// A policy's text with the place of every key and value.
pub(super) struct Places<'t> {
    text: &'t str,
    root: Document<&'t str>,
}

/// One step on the way to a place.
#[derive(Clone, Copy)]
pub(super) enum Step<'a> {
    /// The key of a table.
    Key(&'a str),
    /// The element of an array that begins in this line.
    Line(u32),
}

impl<'a> From<&'a str> for Step<'a> {
    fn from(key: &'a str) -> Self {
        Self::Key(key)
    }
}

/// What is found on the way, with the place of its key or its first line.
struct Found<'t> {
    key: Option<Range<usize>>,
    value: Option<Range<usize>>,
    table: Option<&'t dyn TableLike>,
    item: Option<&'t Item>,
}

impl<'t> Places<'t> {
    /// `text` is that of a valid policy.
    pub(super) fn of(text: &'t str) -> Self {
        let root = Document::parse(text).unwrap_or_else(|_| Document::parse("").expect("an empty document"));
        Self { text, root }
    }

    /// The place of the last key of the way; of what is around it, if it is not there.
    pub(super) fn key(&self, way: &[Step<'_>]) -> Range<usize> {
        self.place(way, |found| found.key.clone().or_else(|| found.value.clone()))
    }

    /// The place of its value.
    pub(super) fn value(&self, way: &[Step<'_>]) -> Range<usize> {
        self.place(way, |found| found.value.clone().or_else(|| found.key.clone()))
    }

    /// Whether the file says it.
    pub(super) fn has(&self, way: &[Step<'_>]) -> bool {
        self.find(way).is_some()
    }

    fn place(&self, way: &[Step<'_>], which: impl Fn(&Found<'_>) -> Option<Range<usize>>) -> Range<usize> {
        let found = (1..=way.len()).rev().find_map(|length| which(&self.find(&way[..length])?));
        let place = found.unwrap_or(0..0);
        // Of a table its first line is enough.
        let end = self.text[place.start..place.end].find('\n').map_or(place.end, |line| place.start + line);
        place.start..end
    }

    fn find(&self, way: &[Step<'_>]) -> Option<Found<'_>> {
        let root: &dyn TableLike = self.root.as_table();
        let mut here = Found { key: None, value: None, table: Some(root), item: None };
        for step in way {
            here = match step {
                Step::Key(name) => {
                    let (key, item) = here.table?.get_key_value(name)?;
                    Found {
                        key: key.span(),
                        value: item.span(),
                        table: item.as_table_like(),
                        item: Some(item),
                    }
                }
                Step::Line(line) => {
                    let (span, table) =
                        elements(here.item?).into_iter().find(|(span, _)| self.line(span) == *line)?;
                    Found { key: Some(span.clone()), value: Some(span), table: Some(table), item: None }
                }
            };
        }
        Some(here)
    }

    fn line(&self, span: &Range<usize>) -> u32 {
        bpfgate_protocol::policy::report::position(self.text, span.start).0
    }
}

/// The elements of an array of tables, or of an array of inline tables.
fn elements(item: &Item) -> Vec<(Range<usize>, &dyn TableLike)> {
    match item {
        Item::ArrayOfTables(tables) => {
            tables.iter().filter_map(|table| Some((table.span()?, table as &dyn TableLike))).collect()
        }
        Item::Value(toml_edit::Value::Array(values)) => values
            .iter()
            .filter_map(|value| Some((value.span()?, value.as_inline_table()? as &dyn TableLike)))
            .collect(),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "version = 1\n[objects.o]\npath = \"/o\"\n[[objects.o.xdp]]\nprogram = \"p\"\n\
                        [[objects.o.xdp]]\nprogram = \"q\" # comment\n[objects.o.maps]\n\".bss\" = \"proxy\"\n\
                        [objects]\nb = { path = \"/b\", tcx = [{ program = \"r\" }] }\n";

    #[test]
    fn keys_and_values_are_found_however_they_are_written() {
        let places = Places::of(TEXT);
        let key = |way: &[Step<'_>]| &TEXT[places.key(way)];
        let value = |way: &[Step<'_>]| &TEXT[places.value(way)];
        assert_eq!(value(&["objects".into(), "o".into(), "path".into()]), "\"/o\"");
        assert_eq!(key(&["objects".into(), "o".into(), "maps".into(), ".bss".into()]), "\".bss\"");
        for (line, program) in [(4, "\"p\""), (6, "\"q\"")] {
            let way = ["objects".into(), "o".into(), "xdp".into(), Step::Line(line), "program".into()];
            assert_eq!(value(&way), program);
        }
        let inline = ["objects".into(), "b".into(), "tcx".into(), Step::Line(11), "program".into()];
        assert_eq!(value(&inline), "\"r\"");
        assert!(places.has(&["version".into()]) && !places.has(&["limits".into(), "programs".into()]));
    }

    #[test]
    fn what_is_not_there_is_shown_where_it_would_be() {
        let places = Places::of(TEXT);
        let way = ["objects".into(), "o".into(), "sha256".into()];
        assert_eq!(&TEXT[places.value(&way)], "[objects.o]");
        assert_eq!(places.key(&["netns".into()]), 0..0);
    }
}
