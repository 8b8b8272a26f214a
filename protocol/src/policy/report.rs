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
    /// The text, if places in it are meant.
    text: Option<String>,
}

impl PolicyError {
    /// An error about places in the text.
    pub fn new(file: &str, text: &str, problems: Vec<Problem>) -> Self {
        Self { file: file.to_owned(), problems, text: Some(text.to_owned()) }
    }

    /// An error about the file as a whole: it cannot be read, or must not be trusted.
    pub fn of_file(file: &str, message: impl Into<String>, help: Option<&str>) -> Self {
        let problem = Problem { span: 0..0, message: message.into(), help: help.map(str::to_owned) };
        Self { file: file.to_owned(), problems: vec![problem], text: None }
    }

    /// `file:line:column: message`, one line per problem: for logs.
    pub fn lines(&self) -> Vec<String> {
        let place = |p: &Problem| {
            let Some(text) = &self.text else { return self.file.clone() };
            let (line, column) = position(text, p.span.start);
            format!("{}:{line}:{column}", self.file)
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
        let groups: Vec<Group<'_>> = self
            .problems
            .iter()
            .map(|problem| {
                let snippet = Snippet::source(text)
                    .path(&self.file)
                    .annotation(AnnotationKind::Primary.span(problem.span.clone()));
                let group = Level::ERROR.primary_title(problem.message.as_str()).element(snippet);
                match &problem.help {
                    Some(help) => group.element(Level::HELP.message(help.as_str())),
                    None => group,
                }
            })
            .collect();
        f.write_str(&Renderer::plain().render(&groups))
    }
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
