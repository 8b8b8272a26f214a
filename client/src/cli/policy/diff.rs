//! `bpfgate policy diff`: who may do what more, and who less. Not what is written otherwise.

use super::super::Outcome;
use super::super::failure::Failure;
use super::super::output::{self, Style};
use super::{INVALID, Source, app_of, files_in, invalid};
use bpfgate_protocol::policy::{Policy, PolicyError};
use bpfgate_systemd::grants::{Grant, grants};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;

/// 0 if nothing got wider, 1 if something did.
pub(super) fn run(old: &Path, new: &Path, style: Style) -> Outcome {
    let (old, new) = match (read(old)?, read(new)?) {
        (Ok(old), Ok(new)) => (old, new),
        (old, new) => {
            for error in [old.err(), new.err()].into_iter().flatten().flatten() {
                let _ = invalid(&error);
            }
            return Ok(ExitCode::from(INVALID));
        }
    };
    let apps: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let changes: Vec<(&String, Change)> =
        apps.into_iter().map(|app| (app, Change::between(old.get(app), new.get(app)))).collect();
    match style {
        Style::Json => {
            output::print_json(&changes.iter().map(|(app, change)| change.as_json(app)).collect::<Value>())?;
        }
        Style::Table => {
            let text: String = changes.iter().map(|(app, change)| change.as_text(app)).collect();
            output::print(&output::clean_lines(&text))?;
        }
    }
    Ok(ExitCode::from(u8::from(changes.iter().any(|(_, change)| !change.more.is_empty()))))
}

type Policies = Result<BTreeMap<String, Policy>, Vec<PolicyError>>;

/// One policy file, or all of a directory by the names of their apps. Two files are compared, whatever they are called.
fn read(path: &Path) -> Result<Policies, Failure> {
    let is_directory = path.is_dir();
    let mut files = if is_directory { files_in(path)? } else { vec![path.to_owned()] };
    if is_directory {
        // Repositories have them beside their policies.
        files.retain(|file| !super::cases::is_one(file));
    }
    let (mut policies, mut errors) = (BTreeMap::new(), Vec::new());
    for file in files {
        let app = if is_directory { app_of(&file).map(|app| app.to_string()) } else { Ok(String::new()) };
        match app.and_then(|app| Ok((app, Source::read(&file)?.policy))) {
            Ok((app, policy)) => {
                policies.insert(app, policy);
            }
            Err(error) => errors.push(error),
        }
    }
    Ok(if errors.is_empty() { Ok(policies) } else { Err(errors) })
}

/// The difference of two policies of one app.
#[derive(Debug, PartialEq, Eq)]
struct Change {
    what: &'static str,
    more: Vec<String>,
    less: Vec<String>,
}

impl Change {
    fn between(old: Option<&Policy>, new: Option<&Policy>) -> Self {
        let of = |policy: Option<&Policy>| policy.map(grants).unwrap_or_default();
        let (mut before, mut after) = (of(old), of(new));
        if old.is_none() || new.is_none() {
            // Where there is nothing to bound, a bound allows nothing.
            before.retain(|grant| !grant.is_bound());
            after.retain(|grant| !grant.is_bound());
        }
        let (more, less) = (beyond(&after, &before, "was"), beyond(&before, &after, "is now"));
        let what = match (old, new, more.is_empty(), less.is_empty()) {
            (None, _, _, _) => "a new policy",
            (_, None, _, _) => "no policy any more",
            (_, _, true, true) => "allows the same",
            (_, _, true, false) => "allows less",
            (_, _, false, true) => "allows more",
            (_, _, false, false) => "allows more of this and less of that",
        };
        Self { what, more, less }
    }

    fn as_text(&self, app: &str) -> String {
        let name = if app.is_empty() { String::new() } else { format!("{app}: ") };
        let mut text = format!("{name}{}\n", self.what);
        for (sign, grants) in [("- less", &self.less), ("+ more", &self.more)] {
            for grant in grants {
                let _ = writeln!(text, "  {sign}: {grant}");
            }
        }
        text
    }

    fn as_json(&self, app: &str) -> Value {
        let app = if app.is_empty() { Value::Null } else { json!(app) };
        json!({"app": app, "what": self.what, "more": self.more, "less": self.less})
    }
}

/// What `these` allow beyond `those`, piece by piece. Where one thing took the place of another, both are named.
fn beyond(these: &[Grant], those: &[Grant], other: &str) -> Vec<String> {
    let pieces: Vec<Grant> = those.iter().flat_map(Grant::pieces).collect();
    let is_covered = |piece: &Grant| pieces.iter().any(|those| those.covers(piece));
    let mut sentences = Vec::new();
    for grant in these {
        let beyond: Vec<Grant> = grant.pieces().into_iter().filter(|piece| !is_covered(piece)).collect();
        let whole = beyond.len() == grant.pieces().len();
        let said: Vec<&Grant> = if whole { vec![grant] } else { beyond.iter().collect() };
        for grant in said {
            let replaced = those.iter().find(|those| those.replaces(grant));
            sentences.push(match replaced {
                Some(replaced) => format!("{grant} ({other}: {replaced})"),
                None => grant.to_string(),
            });
        }
    }
    sentences
}

#[cfg(test)]
mod tests {
    use super::*;
    use bpfgate_protocol::policy::file::Accounts;

    const OLD: &str = r#"version = 1
[[client]]
user = 7
maps = ["m", "k"]
may = ["load", "maps"]
[[client]]
group = 8
may = ["attach"]
[objects.o]
path = "/o"
[[objects.o.xdp]]
program = "p"
interfaces = ["lan*"]
[objects.o.maps]
m = "frozen"
[objects.o.globals]
g = { min = 1, max = 5 }
"#;

    fn policy(text: &str) -> Policy {
        Policy::parse("p", text, &Accounts::default()).unwrap()
    }

    /// What is more and what is less when `from` is written as `to`.
    fn change(from: &str, to: &str) -> (Vec<String>, Vec<String>) {
        let new = OLD.replace(from, to);
        assert_ne!(new, OLD, "{from}");
        let Change { more, less, .. } = Change::between(Some(&policy(OLD)), Some(&policy(&new)));
        (more, less)
    }

    #[test]
    fn more_and_less_are_told_apart() {
        for (from, to, more, less) in [
            ("lan*", "lan0", "", "on xdp lan* (any mode)"),
            ("lan*", "*", "on xdp * (any mode)", ""),
            ("\"lan*\"]", "\"lan*\"]\nmode = \"native\"", "", "(any mode)"),
            ("\"lan*\"]", "\"lan*\"]\nlink_fd = true", "descriptor of the link", ""),
            ("frozen", "read-write", "map m of object o read-write (was: map m of object o frozen)", ""),
            ("frozen", "proxy", "", "map m of object o frozen (is now: map m of object o proxy)"),
            ("max = 5", "max = 4", "", "from 1 to 5 (is now:"),
            ("max = 5", "max = 6", "from 1 to 6 (was:", ""),
            ("user = 7\n", "user = 7\ngroup = 9\n", "", "uid 7 may load, maps (only k, m)"),
            ("\"m\", \"k\"", "\"m\"", "", "uid 7 may maps (only k)"),
            ("maps = [\"m\", \"k\"]\n", "", "uid 7 may maps", ""),
            (
                "maps = [\"m\", \"k\"]\n",
                "maps = [\"m\", \"k\"]\nproxy = [\"m\"]\n",
                "",
                "uid 7 may maps (only m)",
            ),
            ("user = 7\n", "user = 7\nunit = \"a.service\"\n", "", "uid 7 may load, maps (only k, m)"),
            ("[[client]]\ngroup = 8\nmay = [\"attach\"]\n", "", "", "gid 8 may attach"),
            ("path = \"/o\"", "path = \"/other\"", "/other, any bytes", "/o, any bytes"),
        ] {
            let (got_more, got_less) = change(from, to);
            for (got, expected) in [(got_more, more), (got_less, less)] {
                let fits = if expected.is_empty() {
                    got.is_empty()
                } else {
                    got.iter().all(|g| g.contains(expected)) && got.len() == 1
                };
                assert!(fits, "{from} -> {to}: {got:?}, expected {expected:?}");
            }
        }
    }

    #[test]
    fn whole_sections_are_compared() {
        let with = |rest: &str| {
            let Change { more, less, .. } =
                Change::between(Some(&policy(OLD)), Some(&policy(&format!("{OLD}{rest}"))));
            (more.len(), less.len())
        };
        assert_eq!(with("[limits]\nprograms = 32\n"), (1, 0));
        assert_eq!(with("[limits]\nprograms = 8\n"), (0, 1));
        assert_eq!(with("[lifetime]\nkeep = \"app\"\n"), (1, 0));
        assert_eq!(with("[require]\nsandbox = \"seccomp\"\n"), (1, 0));
        assert_eq!(with("[objects.o.helpers]\nallow = [\"bpf_send_signal\"]\n"), (1, 0));
        // A pinned file is one of those that root could put there.
        let pinned =
            OLD.replace("path = \"/o\"", &format!("path = \"/o\"\nsha256 = \"{}\"", "ab".repeat(32)));
        let Change { more, less, what } = Change::between(Some(&policy(OLD)), Some(&policy(&pinned)));
        assert_eq!((more.len(), less.len(), what), (0, 1, "allows less"));
        assert_eq!(with("[require]\nkernel = \"6.6\"\nbtf = true\nlandlock = 3\n"), (0, 3));
        assert_eq!(with("[require]\nunit_check = \"broker\"\n"), (1, 0));
        assert_eq!(with("[limits]\nloads_per_minute = 1\n"), (0, 1));
        // Another namespace is neither more nor less, so it is both.
        let netns = format!("netns = \"/run/netns/b\"\n{OLD}");
        let Change { more, less, .. } = Change::between(Some(&policy(&netns)), Some(&policy(OLD)));
        assert_eq!(
            (more, less.len()),
            (vec!["netns of the machine (was: netns /run/netns/b)".to_owned()], 1)
        );
    }

    #[test]
    fn rights_may_be_split_over_entries() {
        let one = policy("version = 1\n[[client]]\nuser = 7\nmay = [\"load\", \"attach\"]\n");
        let two =
            "version = 1\n[[client]]\nuser = 7\nmay = [\"load\"]\n[[client]]\nuser = 7\nmay = [\"attach\"]\n";
        let Change { what, .. } = Change::between(Some(&one), Some(&policy(two)));
        assert_eq!(what, "allows the same");
        let Change { what, more, less } = Change::between(None, Some(&one));
        assert_eq!((what, more, less), ("a new policy", vec!["uid 7 may load, attach".to_owned()], vec![]));
        assert_eq!(Change::between(Some(&one), None).more, Vec::<String>::new());
    }
}
