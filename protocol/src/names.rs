//! Names that come from outside, parsed once. A value of one of these types is valid by construction.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;

/// Why a text is not such a name: a sentence without the text itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NameError(pub &'static str);

impl fmt::Display for NameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for NameError {}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $rule:expr, $sentence:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                let rule: fn(&str) -> bool = $rule;
                if rule(&text) { Ok(Self(text)) } else { Err(NameError($sentence)) }
            }
        }

        impl std::str::FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::try_from(text.to_owned())
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name!(
    /// The name of an app, of its policy file and of its units: 1..=64 of `[a-z0-9_-]`, a letter or digit first.
    AppName,
    |s| plain(s, 64),
    "an app name is 1 to 64 characters of a-z, 0-9, - and _, and starts with a letter or digit"
);
name!(
    /// The name of an object in a policy: 1..=32 of `[a-z0-9_-]`, a letter or digit first.
    ObjectName,
    |s| plain(s, 32),
    "an object name is 1 to 32 characters of a-z, 0-9, - and _, and starts with a letter or digit"
);
name!(
    /// The name of a BPF program: a C identifier of at most 127 bytes.
    ProgramName,
    |s| identifier(s, 127),
    "a program name is a C identifier of at most 127 characters"
);
name!(
    /// The name of a map in an object: a C identifier of at most 63 bytes; a leading `.` names a data section (`.bss`).
    MapName,
    |s| identifier(s.strip_prefix('.').unwrap_or(s).replace('.', "_").as_str(), 63),
    "a map name is a C identifier of at most 63 characters, or a data section such as .bss"
);
name!(
    /// The name of a `.rodata` variable: a C identifier of at most 127 bytes.
    GlobalName,
    |s| identifier(s, 127),
    "the name of a global is a C identifier of at most 127 characters"
);
name!(
    /// The name of a network interface: 1..=15 bytes (`IFNAMSIZ - 1`), no `/`, no white space.
    InterfaceName,
    |s| {
        (1..=15).contains(&s.len())
            && s != "."
            && s != ".."
            && s.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b':')
    },
    "an interface name is 1 to 15 printable characters without / : and blanks"
);
name!(
    /// A kernel event: `name` (raw tracepoint) or `category:name` (tracepoint), identifiers of at most 63 bytes.
    EventName,
    |s| match s.split_once(':') {
        Some((category, name)) => event_part(category) && event_part(name),
        None => event_part(s),
    },
    "an event is `name` or `category:name`, each of letters, digits, _ and -"
);
name!(
    /// A function symbol of a uprobe target: 1..=255 printable bytes.
    SymbolName,
    |s| (1..=255).contains(&s.len()) && s.bytes().all(|b| b.is_ascii_graphic()),
    "a symbol is 1 to 255 printable characters"
);
name!(
    /// A function of the kernel, as its BTF and its symbol table have it: an identifier of at most 127 bytes, with the
    /// `.` of what compilers split off (`.isra.0`).
    FunctionName,
    |s| identifier(s.replace('.', "_").as_str(), 127) && !s.starts_with('.'),
    "a function of the kernel is a C identifier of at most 127 characters, with . after the first"
);
name!(
    /// An absolute path in normal form: no empty, `.` or `..` component, no control character, at most 1,024 bytes.
    AbsolutePath,
    |s| {
        s.len() <= 1024
            && !s.contains(|c: char| c.is_control())
            && s.strip_prefix('/').is_some_and(|rest| {
                !rest.is_empty() && rest.split('/').all(|part| !matches!(part, "" | "." | ".."))
            })
    },
    "a path is absolute, without empty, `.` or `..` parts, and at most 1024 characters"
);

name!(
    /// A system unit that processes run in: a service, with its instance where it is one of a template.
    UnitName,
    |s| {
        s.len() <= 255
            && s.strip_suffix(".service").is_some_and(|name| {
                !name.is_empty()
                    && name.bytes().all(unit_byte)
                    && !name.starts_with('@')
                    && !name.ends_with('@')
            })
    },
    "a unit is the whole name of a service, such as flowmon.service or flowmon@eth0.service"
);
name!(
    /// A slice of the service manager. `-` in its name is a step down: `a-b.slice` is in `a.slice`.
    SliceName,
    |s| {
        s.len() <= 255
            && s.strip_suffix(".slice").is_some_and(|name| {
                name == "-" || name.bytes().all(|b| b != b'@' && unit_byte(b)) && name.split('-').all(|part| !part.is_empty())
            })
    },
    "a slice is the whole name of one, such as system.slice or web-front.slice"
);

impl SliceName {
    /// The root of all slices.
    pub fn root() -> Self {
        Self("-.slice".to_owned())
    }
}

/// Source: `VALID_CHARS` of systemd's src/basic/unit-name.c, and `@`.
fn unit_byte(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b":_.\\-@".contains(&b)
}

fn plain(s: &str, max: usize) -> bool {
    (1..=max).contains(&s.len())
        && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_' || b == b'-')
        && s.as_bytes()[0].is_ascii_alphanumeric()
}

fn identifier(s: &str, max: usize) -> bool {
    (1..=max).contains(&s.len())
        && s.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        && !s.as_bytes()[0].is_ascii_digit()
}

fn event_part(s: &str) -> bool {
    (1..=63).contains(&s.len()) && s.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

/// A pattern of interface names: `*` is any run of characters, `?` any one; everything else is literal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pattern(String);

impl TryFrom<String> for Pattern {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        if (1..=15).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_graphic() && !b"/:[]{}!\\".contains(&b))
        {
            Ok(Self(text))
        } else {
            Err(NameError("an interface pattern is 1 to 15 printable characters; only * and ? are special"))
        }
    }
}

impl std::str::FromStr for Pattern {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::try_from(text.to_owned())
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> String {
        pattern.0
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Pattern {
    /// Whether the whole of `name` matches. Time is at most `pattern * name` steps: there is no backtracking
    /// beyond the last `*`.
    pub fn matches(&self, name: &str) -> bool {
        let (p, n) = (self.0.as_bytes(), name.as_bytes());
        let (mut i, mut j, mut star) = (0, 0, None);
        while j < n.len() {
            match p.get(i) {
                Some(b'*') => {
                    star = Some((i, j));
                    i += 1;
                }
                Some(&c) if c == b'?' || c == n[j] => {
                    i += 1;
                    j += 1;
                }
                _ => match star {
                    Some((si, sj)) => {
                        i = si + 1;
                        j = sj + 1;
                        star = Some((si, sj + 1));
                    }
                    None => return false,
                },
            }
        }
        p[i..].iter().all(|&c| c == b'*')
    }

    /// Whether every name that `other` matches is matched by this pattern too.
    ///
    /// Both are read together, letter by letter: `other` goes each of its ways, this one all of its ways at once. A letter
    /// that stands in neither of them stands for all the rest.
    pub fn covers(&self, other: &Pattern) -> bool {
        let (p, o) = (self.0.as_bytes(), other.0.as_bytes());
        let mut letters: BTreeSet<Option<u8>> = p.iter().chain(o).copied().map(Some).collect();
        letters.insert(None);
        let start = (0, places(p, BTreeSet::from([0])));
        let (mut seen, mut open) = (BTreeSet::from([start.clone()]), vec![start]);
        while let Some((at, ours)) = open.pop() {
            if o[at..].iter().all(|&c| c == b'*') && !ours.contains(&p.len()) {
                return false;
            }
            let Some(&c) = o.get(at) else { continue };
            let mut next = Vec::new();
            if c == b'*' {
                next.push((at + 1, ours.clone()));
            }
            for letter in letters.iter().filter(|letter| matches!(c, b'*' | b'?') || **letter == Some(c)) {
                let step = |&i: &usize| match p.get(i) {
                    Some(b'*') => Some(i),
                    Some(&c) => (c == b'?' || Some(c) == *letter).then_some(i + 1),
                    None => None,
                };
                let ours = places(p, ours.iter().filter_map(step).collect());
                next.push((if c == b'*' { at } else { at + 1 }, ours));
            }
            open.extend(next.into_iter().filter(|state| seen.insert(state.clone())));
        }
        true
    }

    /// The interface this pattern names, if it has no wildcard.
    pub fn literal(&self) -> Option<InterfaceName> {
        if self.0.contains(['*', '?']) { None } else { self.0.parse().ok() }
    }
}

/// The places of a pattern that are reached from these without a letter: past each `*`.
fn places(pattern: &[u8], mut from: BTreeSet<usize>) -> BTreeSet<usize> {
    for (i, c) in pattern.iter().enumerate() {
        if *c == b'*' && from.contains(&i) {
            from.insert(i + 1);
        }
    }
    from
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All patterns and names of up to three of a few letters.
    #[test]
    fn a_pattern_covers_what_matches_nothing_else() {
        let words = |letters: &str| {
            let mut all = vec![String::new()];
            for length in 0..3 {
                let longer: Vec<String> = all
                    .iter()
                    .filter(|word| word.len() == length)
                    .flat_map(|word| letters.chars().map(move |c| format!("{word}{c}")))
                    .collect();
                all.extend(longer);
            }
            all.split_off(1)
        };
        let patterns: Vec<Pattern> = words("ab*?").iter().map(|word| pattern(word)).collect();
        // Longer than the patterns, so that what a `*` adds shows; c is in no pattern.
        let mut names = words("abc");
        names.extend(
            words("abc").iter().flat_map(|a| words("abc").into_iter().map(move |b| format!("{a}{b}"))),
        );
        for wide in &patterns {
            for narrow in &patterns {
                // There is no name without a letter, but `*` alone would match it.
                let expected = names.iter().all(|name| !narrow.matches(name) || wide.matches(name))
                    && (!narrow.matches("") || wide.matches(""));
                assert_eq!(wide.covers(narrow), expected, "{wide} {narrow}");
            }
        }
        assert!(pattern("lan*").covers(&pattern("lan0")) && !pattern("lan0").covers(&pattern("lan*")));
    }

    fn pattern(text: &str) -> Pattern {
        Pattern::try_from(text.to_owned()).unwrap()
    }

    #[test]
    fn names_outside_of_their_alphabet_are_refused() {
        for bad in ["", "-a", "A", "a b", "a/b", "../a", "a\0", "é", &"a".repeat(65)] {
            assert!(bad.parse::<AppName>().is_err(), "{bad:?}");
        }
        assert!("flow-mon_2".parse::<AppName>().is_ok());
        for bad in ["/", "a/b", "/a//b", "/a/../b", "/a/./b", "/a/", "/a\nb"] {
            assert!(bad.parse::<AbsolutePath>().is_err(), "{bad:?}");
        }
        assert!("/a/b.o".parse::<AbsolutePath>().is_ok());
        for bad in ["", ".", "..", "a/b", "a b", "sixteencharacter"] {
            assert!(bad.parse::<InterfaceName>().is_err(), "{bad:?}");
        }
        for bad in ["", "1a", ".a", "a b", "a*", "a-b", "bpf:a", &"a".repeat(128)] {
            assert!(bad.parse::<FunctionName>().is_err(), "{bad:?}");
        }
        for good in ["cap_capable", "__x64_sys_bpf", "do_one.isra.0"] {
            assert!(good.parse::<FunctionName>().is_ok(), "{good:?}");
        }
        for good in ["counters", ".bss", ".rodata.str", "_x9"] {
            assert!(good.parse::<MapName>().is_ok(), "{good:?}");
        }
        for good in ["sched:sched_switch", "sched_switch"] {
            assert!(good.parse::<EventName>().is_ok());
        }
        for bad in ["a:b:c", ":a", "a:", "a/b", "../x:y"] {
            assert!(bad.parse::<EventName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn patterns_match_whole_names() {
        for (p, yes, no) in [
            ("lan*", "lan0", "wlan0"),
            ("*", "anything", ""),
            ("e?h0", "eth0", "eh0"),
            ("*0", "eth0", "eth01"),
            ("a*b*c", "aXbYbZc", "aXbY"),
            ("eth0", "eth0", "eth00"),
        ] {
            assert!(pattern(p).matches(yes), "{p} {yes}");
            assert!(!pattern(p).matches(no) || (p == "*" && no.is_empty()), "{p} {no}");
        }
        for bad in ["[!a]", "{a,b}", "a/b", "", "a\\*"] {
            assert!(Pattern::try_from(bad.to_owned()).is_err(), "{bad:?}");
        }
        assert_eq!(pattern("eth0").literal(), "eth0".parse().ok());
        assert_eq!(pattern("eth*").literal(), None);
    }

    /// POL-13. The worst pattern that fits, against the worst name.
    #[test]
    fn no_pattern_takes_long() {
        let (pattern, name) = (pattern("*a*a*a*a*a*a*ab"), "aaaaaaaaaaaaaaa");
        let start = std::time::Instant::now();
        assert!(!pattern.matches(name));
        assert!(start.elapsed() < std::time::Duration::from_millis(50));
    }

    /// The matcher against the obvious recursive one, on every pattern and name of a small alphabet.
    #[test]
    fn patterns_agree_with_a_reference_matcher() {
        fn reference(p: &[u8], n: &[u8]) -> bool {
            match p.split_first() {
                None => n.is_empty(),
                Some((b'*', rest)) => (0..=n.len()).any(|k| reference(rest, &n[k..])),
                Some((b'?', rest)) => !n.is_empty() && reference(rest, &n[1..]),
                Some((c, rest)) => n.first() == Some(c) && reference(rest, &n[1..]),
            }
        }
        fn words(alphabet: &[u8], max: usize) -> Vec<Vec<u8>> {
            let mut all = vec![vec![]];
            let mut last = all.clone();
            for _ in 0..max {
                last = last
                    .iter()
                    .flat_map(|w| alphabet.iter().map(move |&c| [w.as_slice(), &[c]].concat()))
                    .collect();
                all.extend(last.clone());
            }
            all
        }
        for p in words(b"ab*?", 5) {
            let text = String::from_utf8(p.clone()).unwrap();
            let Ok(pattern) = Pattern::try_from(text) else { continue };
            for n in words(b"ab", 5) {
                let name = String::from_utf8(n.clone()).unwrap();
                assert_eq!(pattern.matches(&name), reference(&p, &n), "{pattern} {name}");
            }
        }
    }
}
