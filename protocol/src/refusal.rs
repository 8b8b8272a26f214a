//! Documented answers. A [`Refusal`] is told to the client; what ends a process is never one of these.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};
use std::fmt;

/// The class of a refusal; the name of the Varlink error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Class {
    /// Not allowed, or not there: the same answer to a client.
    Denied,
    /// The request makes no sense: field, type, range or order.
    Invalid,
    /// The object is missing, changed, not as the policy says, or not loadable by libbpf.
    Object,
    /// The verifier said no; the log goes with it.
    Verifier,
    /// A system call failed.
    Kernel,
    /// A limit is reached.
    Quota,
    /// Try again later.
    Busy,
    /// Not on this kernel, or not in this version.
    Unsupported,
    /// The helper is gone, did not start, or is late.
    Helper,
    /// It was there and is not any more.
    Gone,
}

impl Class {
    /// Every class, for documentation and tests.
    pub const ALL: [Class; 10] = [
        Class::Denied,
        Class::Invalid,
        Class::Object,
        Class::Verifier,
        Class::Kernel,
        Class::Quota,
        Class::Busy,
        Class::Unsupported,
        Class::Helper,
        Class::Gone,
    ];

    /// The name of the error in the interface `io.bpfgate`.
    pub const fn name(self) -> &'static str {
        match self {
            Class::Denied => "Denied",
            Class::Invalid => "Invalid",
            Class::Object => "Object",
            Class::Verifier => "Verifier",
            Class::Kernel => "Kernel",
            Class::Quota => "Quota",
            Class::Busy => "Busy",
            Class::Unsupported => "Unsupported",
            Class::Helper => "Helper",
            Class::Gone => "Gone",
        }
    }
}

/// Why a request is not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[must_use]
pub struct Refusal {
    /// What kind of no it is.
    pub class: Class,
    /// A sentence. For [`Class::Denied`] it goes to the audit record only.
    pub why: String,
    /// The line of the policy file that decided, if one did.
    pub line: Option<u32>,
    /// [`Class::Kernel`]: the call and its errno.
    pub call: Option<(String, i32)>,
    /// [`Class::Verifier`]: the program.
    pub program: Option<String>,
}

impl Refusal {
    /// A refusal of this class, with its sentence.
    pub fn new(class: Class, why: impl Into<String>) -> Self {
        Self { class, why: why.into(), line: None, call: None, program: None }
    }

    /// A [`Class::Denied`] with the reason for the audit record.
    pub fn denied(why: impl Into<String>) -> Self {
        Self::new(Class::Denied, why)
    }

    /// A [`Class::Invalid`].
    pub fn invalid(why: impl Into<String>) -> Self {
        Self::new(Class::Invalid, why)
    }

    /// A [`Class::Object`].
    pub fn object(why: impl Into<String>) -> Self {
        Self::new(Class::Object, why)
    }

    /// A [`Class::Quota`].
    pub fn quota(why: impl Into<String>) -> Self {
        Self::new(Class::Quota, why)
    }

    /// A [`Class::Unsupported`].
    pub fn unsupported(why: impl Into<String>) -> Self {
        Self::new(Class::Unsupported, why)
    }

    /// A [`Class::Gone`].
    pub fn gone(why: impl Into<String>) -> Self {
        Self::new(Class::Gone, why)
    }

    /// A [`Class::Helper`].
    pub fn helper(why: impl Into<String>) -> Self {
        Self::new(Class::Helper, why)
    }

    /// A [`Class::Kernel`] with a sentence of its own.
    pub fn kernel_because(call: &str, errno: i32, why: String) -> Self {
        Self { why, ..Self::kernel(call, errno) }
    }

    /// A [`Class::Kernel`]: `call` failed with `errno`.
    pub fn kernel(call: &str, errno: i32) -> Self {
        let text = std::io::Error::from_raw_os_error(errno);
        let mut refusal = Self::new(Class::Kernel, format!("{call} failed: {text}"));
        refusal.call = Some((call.to_owned(), errno));
        refusal
    }

    /// The same refusal, decided by `line` of the policy file.
    pub fn by_line(mut self, line: u32) -> Self {
        self.line = Some(line);
        self
    }

    /// The sentence that a client may read. A denial never says why: absent and forbidden are one answer.
    pub fn public(&self) -> &str {
        match self.class {
            Class::Denied => {
                "the policy of this app does not allow it, or there is no such thing; \
                 the broker's audit record of this request says why"
            }
            _ => &self.why,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.class.name(), self.why)
    }
}

/// Text of another process, made fit for a log or a client: control characters but line feed and tab
/// become `?`, and at most `max` bytes are kept.
pub fn printable(text: &str, max: usize) -> String {
    let mut out = String::with_capacity(text.len().min(max));
    for c in text.chars() {
        if out.len() + c.len_utf8() > max {
            break;
        }
        out.push(if c.is_control() && c != '\n' && c != '\t' { '?' } else { c });
    }
    out
}

/// Whether a terminal, or a reader of lines, does something with this character: control characters, line and paragraph
/// separators, and what turns the direction of writing.
pub fn is_active(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{061c}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Text of another process as a part of one line of a log or a record: nothing in it ends the line, moves a cursor, or
/// turns the direction of writing.
pub fn one_line(text: &str) -> String {
    let plain = |c| match c {
        '\n' => ' ',
        c if is_active(c) => '?',
        c => c,
    };
    text.chars().map(plain).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_is_an_error_of_the_interface_and_none_is_missing() {
        let declared: Vec<&str> = crate::INTERFACE
            .lines()
            .filter_map(|l| l.strip_prefix("error ")?.split_once(' ').map(|(name, _)| name))
            .collect();
        let known: Vec<&str> = Class::ALL.iter().map(|c| c.name()).collect();
        assert_eq!(declared, known);
    }

    #[test]
    fn a_denial_does_not_tell_its_reason() {
        let (a, b) = (Refusal::denied("no such app"), Refusal::denied("user 7 is not listed").by_line(3));
        assert_eq!(a.public(), b.public());
        assert!(!a.public().contains("app\""));
    }

    #[test]
    fn printable_text_is_bounded_and_free_of_control_characters() {
        assert_eq!(printable("a\x1b[31m\0b\nc", 100), "a?[31m?b\nc");
        assert_eq!(printable("äää", 3), "ä");
        assert_eq!(one_line("a\x1b[31m\0b\nc\u{202e}ä"), "a?[31m?b c?ä");
    }
}
