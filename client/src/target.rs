//! Where a program is attached, and how people write it.
#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

/// Where a program is attached.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Target {
    /// A network interface, for xdp and tcx programs.
    Interface(String),
    /// The absolute path of a cgroup, as in the policy, or `own`.
    Cgroup(String),
    /// A tracepoint: `category:name`, or the bare name for raw tracepoints.
    Event(String),
    /// A function of a program file or library.
    Uprobe {
        /// The absolute path, as in the policy.
        binary: String,
        /// The function, as in the policy.
        symbol: String,
    },
    /// A function of the kernel, for fentry, fexit and kprobe programs.
    Function(String),
}

/// The fields of the interface's type `Target`.
#[derive(Serialize, Default)]
pub(crate) struct WireTarget<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    interface: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cgroup: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    event: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    binary: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    symbol: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    function: Option<&'a str>,
}

impl<'a> From<&'a Target> for WireTarget<'a> {
    fn from(target: &'a Target) -> Self {
        match target {
            Target::Interface(name) => Self { interface: Some(name), ..Self::default() },
            Target::Cgroup(path) => Self { cgroup: Some(path), ..Self::default() },
            Target::Event(name) => Self { event: Some(name), ..Self::default() },
            Target::Uprobe { binary, symbol } => {
                Self { binary: Some(binary), symbol: Some(symbol), ..Self::default() }
            }
            Target::Function(name) => Self { function: Some(name), ..Self::default() },
        }
    }
}

/// Instead of a path: the cgroup of the unit by which the policy names the client.
const OWN_CGROUP: &str = "own";

/// A target as a person writes it; a bare word gets its meaning from the program it is for.
///
/// | written | means |
/// |---|---|
/// | `eth0` | an interface; the event or function of that name if the program is for such |
/// | `own` | for a program of cgroups, the cgroup of the client's own unit |
/// | `sched:sched_process_exec` | an event |
/// | `/sys/fs/cgroup/web` | a cgroup |
/// | `/usr/bin/bash:readline` | a uprobe: what follows the last colon is the symbol |
/// | `interface:`, `cgroup:/`, `event:`, `uprobe:/`, `function:` in front | exactly that |
///
/// `cgroup:` is a prefix only before a slash, and in `cgroup:own`, the cgroup of the client's own unit:
/// `cgroup:cgroup_mkdir` is a tracepoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetWord {
    /// What it is can be seen from how it is written.
    Clear(Target),
    /// An interface, the name of a raw tracepoint, or a function of the kernel.
    Bare(String),
}

impl TargetWord {
    /// The target for a program of this type, as the broker names it ([`Program::kind`]).
    ///
    /// [`Program::kind`]: crate::Program::kind
    pub fn for_program(&self, kind: &str) -> Target {
        match self {
            Self::Clear(target) => target.clone(),
            Self::Bare(word) if kind.starts_with("raw_tracepoint") => Target::Event(word.clone()),
            Self::Bare(word) if matches!(kind, "fentry" | "fexit" | "kprobe") => {
                Target::Function(word.clone())
            }
            Self::Bare(word) if kind.starts_with("cgroup") => Target::Cgroup(word.clone()),
            Self::Bare(word) => Target::Interface(word.clone()),
        }
    }
}

impl FromStr for TargetWord {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        if word.is_empty() {
            return Err("the target is empty".to_owned());
        }
        let clear = |target| Ok(Self::Clear(target));
        match word.split_once(':') {
            Some(("interface", name)) => clear(Target::Interface(named("interface", name)?)),
            Some(("event", name)) => clear(Target::Event(named("event", name)?)),
            Some(("cgroup", path)) if path.starts_with('/') || path == OWN_CGROUP => {
                clear(Target::Cgroup(path.to_owned()))
            }
            Some(("uprobe", rest)) => clear(uprobe(rest)?),
            Some(("function", name)) => clear(Target::Function(named("function", name)?)),
            Some(_) if word.starts_with('/') => clear(uprobe(word)?),
            Some((category, name)) => {
                named("category", category)?;
                named("event", name)?;
                clear(Target::Event(word.to_owned()))
            }
            None if word.starts_with('/') => clear(Target::Cgroup(word.to_owned())),
            None => Ok(Self::Bare(word.to_owned())),
        }
    }
}

fn named(what: &str, name: &str) -> Result<String, String> {
    if name.is_empty() { Err(format!("the {what} has no name")) } else { Ok(name.to_owned()) }
}

fn uprobe(word: &str) -> Result<Target, String> {
    match word.rsplit_once(':') {
        Some((binary, symbol)) if binary.starts_with('/') && !symbol.is_empty() => {
            Ok(Target::Uprobe { binary: binary.to_owned(), symbol: symbol.to_owned() })
        }
        _ => Err(format!("{word:?} is not a uprobe: write /path/of/the/binary:symbol")),
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Interface(name) => write!(f, "interface:{name}"),
            Self::Cgroup(path) => write!(f, "cgroup:{path}"),
            Self::Event(name) => write!(f, "event:{name}"),
            Self::Uprobe { binary, symbol } => write!(f, "uprobe:{binary}:{symbol}"),
            Self::Function(name) => write!(f, "function:{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clear(word: &str) -> Target {
        match word.parse() {
            Ok(TargetWord::Clear(target)) => target,
            other => panic!("{word}: {other:?}"),
        }
    }

    #[test]
    fn written_forms() {
        let bash = || Target::Uprobe { binary: "/bin/bash".into(), symbol: "readline".into() };
        assert_eq!(clear("/sys/fs/cgroup/x"), Target::Cgroup("/sys/fs/cgroup/x".into()));
        assert_eq!(clear("sched:sched_switch"), Target::Event("sched:sched_switch".into()));
        assert_eq!(clear("/bin/bash:readline"), bash());
        assert_eq!(clear("uprobe:/bin/bash:readline"), bash());
        assert_eq!(clear("interface:eth0"), Target::Interface("eth0".into()));
        assert_eq!(clear("interface:eth0:1"), Target::Interface("eth0:1".into()));
        assert_eq!(clear("cgroup:/a"), Target::Cgroup("/a".into()));
        assert_eq!(clear("cgroup:own"), Target::Cgroup("own".into()));
        assert_eq!(clear("cgroup:cgroup_mkdir"), Target::Event("cgroup:cgroup_mkdir".into()));
        assert_eq!(clear("event:sched_process_exec"), Target::Event("sched_process_exec".into()));
        assert_eq!(clear("event:sched:x"), Target::Event("sched:x".into()));
        assert_eq!(clear("function:cap_capable"), Target::Function("cap_capable".into()));
    }

    #[test]
    fn a_bare_word_depends_on_the_program() {
        let word: TargetWord = "sched_switch".parse().unwrap();
        assert_eq!(word.for_program("raw_tracepoint"), Target::Event("sched_switch".into()));
        assert_eq!(word.for_program("xdp"), Target::Interface("sched_switch".into()));
        for kind in ["fentry", "fexit", "kprobe"] {
            assert_eq!(word.for_program(kind), Target::Function("sched_switch".into()));
        }
        let word: TargetWord = "interface:lo".parse().unwrap();
        assert_eq!(word.for_program("raw_tracepoint"), Target::Interface("lo".into()));
    }

    #[test]
    fn what_says_nothing_is_refused() {
        for word in
            ["", "interface:", "event:", "function:", "uprobe:", "uprobe:bash:x", "/bin/bash:", "a:", ":b"]
        {
            assert!(word.parse::<TargetWord>().is_err(), "{word}");
        }
    }

    #[test]
    fn what_is_displayed_reads_back() {
        for word in ["interface:eth0", "cgroup:/a/b", "event:a:b", "event:a", "uprobe:/b:c", "function:f"] {
            assert_eq!(clear(word).to_string(), word);
        }
    }

    #[test]
    fn only_the_fields_of_its_kind_are_sent() {
        let target = Target::Uprobe { binary: "/b".into(), symbol: "s".into() };
        let json = serde_json::to_value(WireTarget::from(&target)).unwrap();
        assert_eq!(json, serde_json::json!({"binary": "/b", "symbol": "s"}));
    }
}
