//! What a text or a number may be, beside its type. Words, ends and sentences are those of the parser; the patterns are
//! for editors, and are compared with the parser in `main`.

use bpfgate_protocol::functions::BY_GRANT;
use bpfgate_protocol::names::{
    AbsolutePath, EventName, FunctionName, GlobalName, MapName, NameError, ObjectName, Pattern, ProgramName,
    SliceName, SymbolName, UnitName,
};
use bpfgate_protocol::policy::{
    Access, Direction, Keep, Limits, OWN_CGROUP, Order, Require, Right, Sandboxing, UnitCheck, XdpMode,
};
use std::fmt::Debug;
use std::str::FromStr;

/// What is allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Values {
    /// Everything of the type.
    Any,
    /// One of these words.
    Words(Vec<String>),
    /// What fits this regular expression; the sentence is for people.
    Name(&'static str, String),
    /// From 1 to this.
    Most(u64),
}

/// The sentence with which the parser refuses what is no such name.
fn sentence<T: FromStr<Err = NameError> + Debug>() -> String {
    let sentence = "\0".parse::<T>().unwrap_err().0;
    sentence.split_once(" is ").map_or(sentence, |(_, rest)| rest).replace('`', "")
}

fn words<T>(words: &[(&str, T)]) -> Values {
    Values::Words(words.iter().map(|(word, _)| (*word).to_owned()).collect())
}

const IDENTIFIER: &str = r"^[A-Za-z_][A-Za-z0-9_]{0,126}$";
const FUNCTION: &str = r"^[A-Za-z_][A-Za-z0-9_.]{0,126}$";
const MAP: &str = r"^(\.[A-Za-z_.]|[A-Za-z_])[A-Za-z0-9_.]{0,62}$";
const PATH: &str = r"^(/(?!\.{1,2}(/|$))[^/\u0000-\u001f\u007f-\u009f]+)+$";

/// What the keys that users name are, where they name them.
pub(crate) fn names_in(table: &str, key: &str) -> Values {
    match (table, key) {
        ("File", "objects") => Values::Name(r"^[a-z0-9][a-z0-9_-]{0,31}$", sentence::<ObjectName>()),
        ("Object", "maps") => Values::Name(MAP, sentence::<MapName>()),
        ("Object", "globals") => Values::Name(IDENTIFIER, sentence::<GlobalName>()),
        other => panic!("nothing is said about the names in {other:?}"),
    }
}

/// What a key may hold. A new key has to be added here.
pub(crate) fn values(table: &str, key: &str) -> Values {
    let most = |most: u32| Values::Most(most.into());
    let limits = Limits::MOST;
    match (table, key) {
        ("File", "version") => Values::Most(1),
        ("File", "description") | ("Client", "user" | "group") | ("Range", "min" | "max") => Values::Any,
        ("File", "netns") | ("Object", "path") | ("Uprobe", "binary") => {
            Values::Name(PATH, sentence::<AbsolutePath>())
        }
        ("Client", "unit") => Values::Name(
            r"^[A-Za-z0-9:_.\\-]([A-Za-z0-9:_.\\@-]{0,245}[A-Za-z0-9:_.\\-])?\.service$",
            sentence::<UnitName>(),
        ),
        ("Client", "slice") => {
            Values::Name(r"^(-|[A-Za-z0-9:_.\\]+(-[A-Za-z0-9:_.\\]+)*)\.slice$", sentence::<SliceName>())
        }
        ("Client", "may") => words(&Right::WORDS),
        ("Client", "maps" | "proxy") => Values::Name(MAP, sentence::<MapName>()),
        ("Object", "sha256") => {
            Values::Name(r"^[0-9a-f]{64}$", "64 lower-case hexadecimal digits".to_owned())
        }
        ("Object", "maps") => words(&Access::WORDS),
        (_, "program") => Values::Name(IDENTIFIER, sentence::<ProgramName>()),
        ("Xdp" | "Tcx", "interfaces") => Values::Name(r#"^["-.0-9;-Z^-z|~]{1,15}$"#, sentence::<Pattern>()),
        ("Xdp", "mode") => words(&XdpMode::WORDS),
        (_, "direction") => words(&Direction::WORDS),
        ("Tcx", "order") => words(&Order::WORDS),
        ("CgroupSkb", "cgroups") => Values::Name(
            r"^(own|(/(?!\.{1,2}(/|$))[^/\u0000-\u001f\u007f-\u009f]+)+)$",
            format!("{}; or \"{OWN_CGROUP}\"", sentence::<AbsolutePath>()),
        ),
        ("Events", "events") => {
            Values::Name(r"^[A-Za-z0-9_-]{1,63}(:[A-Za-z0-9_-]{1,63})?$", sentence::<EventName>())
        }
        ("Uprobe", "symbols") => Values::Name(r"^[!-~]{1,255}$", sentence::<SymbolName>()),
        ("Helpers", "allow") => {
            let names = BY_GRANT.iter().flat_map(|(name, _)| [format!("bpf_{name}"), (*name).to_owned()]);
            Values::Words(names.collect())
        }
        ("Traced", "function") | ("Kprobe", "functions") | ("Helpers", "kfuncs") => {
            Values::Name(FUNCTION, sentence::<FunctionName>())
        }
        ("Limits", "programs") => most(limits.programs),
        ("Limits", "maps") => most(limits.maps),
        ("Limits", "links") => most(limits.links),
        ("Limits", "instructions") => most(limits.instructions),
        ("Limits", "map_memory") => Values::Most(limits.map_memory),
        ("Limits", "connections") => most(limits.connections),
        ("Limits", "loads_per_minute") => most(limits.loads_per_minute),
        ("Lifetime", "keep") => words(&Keep::WORDS),
        ("Require", "sandbox") => words(&Sandboxing::WORDS),
        ("Require", "unit_check") => words(&UnitCheck::WORDS),
        ("Require", "kernel") => Values::Name(r"^[0-9]+\.[0-9]+$", "\"MAJOR.MINOR\"".to_owned()),
        ("Require", "landlock") => most(Require::MOST_LANDLOCK),
        other => panic!("nothing is said about the values of {other:?}"),
    }
}
