//! Errors of a policy file: what is wrong, in which line, underlined, and what to write instead.

use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet};
use std::fmt;
use std::ops::Range;

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Bytes of the file.
    pub span: Range<usize>,
    /// A sentence.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
}

/// A policy file that is not in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyError {
    /// The file.
    pub file: String,
    /// Everything that is wrong with it; never empty.
    pub problems: Vec<Problem>,
    /// It says nothing about the file, which could not be read just now.
    pub passing: bool,
    /// The text, if places in it are meant.
    text: Option<String>,
}

impl PolicyError {
    /// An error about places in the text.
    pub fn new(file: &str, text: &str, problems: Vec<Problem>) -> Self {
        Self { file: file.to_owned(), problems, passing: false, text: Some(text.to_owned()) }
    }

    /// An error about the file as a whole: it cannot be read, or must not be trusted.
    pub fn of_file(file: &str, message: impl Into<String>, help: Option<&str>) -> Self {
        let problem = Problem { span: 0..0, message: message.into(), help: help.map(str::to_owned) };
        Self { file: file.to_owned(), problems: vec![problem], passing: false, text: None }
    }

    /// Whether it is the machine's and not the file's.
    #[must_use]
    pub fn passing(self, passing: bool) -> Self {
        Self { passing, ..self }
    }

    /// Line and column of a problem, from 1; none if it is about the file as a whole.
    pub fn place(&self, problem: &Problem) -> Option<(u32, u32)> {
        self.text.as_deref().map(|text| position(text, problem.span.start))
    }

    /// `file:line:column: message`, one line per problem: for logs.
    pub fn lines(&self) -> Vec<String> {
        let place = |p: &Problem| match self.place(p) {
            Some((line, column)) => format!("{}:{line}:{column}", self.file),
            None => self.file.clone(),
        };
        self.problems.iter().map(|p| format!("{}: {}", place(p), p.message)).collect()
    }
}

impl fmt::Display for PolicyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(text) = &self.text else {
            for problem in &self.problems {
                write!(f, "error: {}: {}", self.file, problem.message)?;
                if let Some(help) = &problem.help {
                    write!(f, "\n  = help: {help}")?;
                }
            }
            return Ok(());
        };
        f.write_str(&underlined(Severity::Error, &self.file, text, &self.problems))
    }
}

/// How bad a problem is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// The file is not in force.
    Error,
    /// Somebody should look at it.
    Warning,
}

/// Problems with their lines shown and their places underlined.
pub fn underlined(severity: Severity, file: &str, text: &str, problems: &[Problem]) -> String {
    let level = match severity {
        Severity::Error => Level::ERROR,
        Severity::Warning => Level::WARNING,
    };
    let groups: Vec<Group<'_>> = problems
        .iter()
        .map(|problem| {
            let snippet = Snippet::source(text)
                .path(file)
                .annotation(AnnotationKind::Primary.span(problem.span.clone()));
            let group = level.clone().primary_title(problem.message.as_str()).element(snippet);
            match &problem.help {
                Some(help) => group.element(Level::HELP.message(help.as_str())),
                None => group,
            }
        })
        .collect();
    Renderer::plain().render(&groups)
}

/// The candidate that was probably meant: at most a third of its letters are other ones.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let near = |candidate: &'a str| {
        let distance = distance(word, candidate);
        (distance <= candidate.len().max(word.len()).div_ceil(3)).then_some((distance, candidate))
    };
    candidates.into_iter().filter_map(near).min().map(|(_, candidate)| candidate)
}

/// `did you mean "..."?`, if there is such a candidate.
pub fn did_you_mean<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<String> {
    nearest(word, candidates).map(|candidate| format!("did you mean \"{candidate}\"?"))
}

/// How many letters have to be put in, taken out or replaced (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut corner = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let replaced = corner + usize::from(x != *y);
            corner = row[j + 1];
            row[j + 1] = replaced.min(corner + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

impl std::error::Error for PolicyError {}

/// Line and column, from 1, of a byte of `text`.
pub fn position(text: &str, offset: usize) -> (u32, u32) {
    let before = &text.as_bytes()[..offset.min(text.len())];
    let line = before.iter().filter(|&&b| b == b'\n').count() + 1;
    let start = before.iter().rposition(|&b| b == b'\n').map_or(0, |i| i + 1);
    let column = String::from_utf8_lossy(&before[start..]).chars().count() + 1;
    (u32::try_from(line).unwrap_or(u32::MAX), u32::try_from(column).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_meant() {
        let words = ["count_packets", "counters", "interfaces"];
        assert_eq!(nearest("count_packet", words), Some("count_packets"));
        assert_eq!(nearest("counter", words), Some("counters"));
        assert_eq!(nearest("intrefaces", words), Some("interfaces"));
        assert_eq!(nearest("sha256", words), None);
        assert_eq!(did_you_mean("couters", words).as_deref(), Some("did you mean \"counters\"?"));
        assert_eq!((distance("", "abc"), distance("abc", "abc"), distance("abc", "axc")), (3, 0, 1));
    }
}
