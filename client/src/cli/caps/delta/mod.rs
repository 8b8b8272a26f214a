//! `bpfgate caps delta`: what a service needs, against what its unit grants.

mod compare;
mod granted;
mod observed;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use bpfgate_protocol::names::AppName;
use bpfgate_protocol::policy::{Policy, Right};
use bpfgate_systemd::units::service_unit;
use serde_json::json;

use super::super::Outcome;
use super::super::args::{StyleArgs, ago};
use super::super::failure::Failure;
use super::super::output::{self, Style, Table};
use super::super::policy::{self, Source};
use super::trace::{self, Scope};
use compare::{Delta, Finding};
use granted::Granted;
use observed::{Exercised, Observed};

#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// A unit (cron.service), or an app, whose helper has a unit
    #[arg(value_name = "UNIT|APP")]
    what: String,
    /// What it was seen to ask for: records of `bpfgate caps trace --json`, in a file
    #[arg(long, value_name = "FILE", conflicts_with = "observe")]
    observed: Option<PathBuf>,
    /// Watch it for so long now: 30s, 10min, 2h
    #[arg(long, value_name = "TIME", value_parser = ago, conflicts_with = "root")]
    observe: Option<Duration>,
    /// Exit with 1 if something is needed that is not granted
    #[arg(long)]
    check: bool,
    /// Look at the unit files below this directory, and ask no service manager
    #[arg(long, value_name = "DIRECTORY")]
    root: Option<PathBuf>,
    #[command(flatten)]
    style: StyleArgs,
}

pub(super) fn run(socket: Option<&Path>, args: &Args) -> Outcome {
    let (unit, app) = unit(&args.what)?;
    let source = match app.as_ref().map(|app| policy_of(app, args.root.as_deref())) {
        None => None,
        Some(path) => match Source::read(&path?) {
            Ok(source) => Some(source),
            Err(error) => return Ok(policy::invalid(&error)),
        },
    };
    let policy = source.as_ref().map(|source| &source.policy);
    let observed = match (&args.observed, args.observe) {
        (Some(path), _) => Some(Observed::read(path, &unit).map_err(Failure::Failed)?),
        (None, Some(duration)) => {
            let scope = match &app {
                Some(app) => Scope { app: Some(app.to_string()), ..Scope::default() },
                None => Scope { unit: Some(unit.clone()), ..Scope::default() },
            };
            let (checks, account) = trace::observe(socket, &scope, duration)?;
            Some(Observed::watched(checks, &account, duration))
        }
        (None, None) if policy.is_none() => {
            return Err(Failure::Usage(format!(
                "{unit} has no policy of bpfgate that says what it needs: watch it with --observe 10min, or record \
                 it with `bpfgate caps trace --unit {unit} --json > FILE` and give --observed FILE"
            )));
        }
        (None, None) => None,
    };
    let granted = Granted::of(&unit, args.root.as_deref())?;
    let delta = Delta::of(&granted, policy, observed.as_ref());
    let exercised = exercised(policy, observed.as_ref().map(|observed| &observed.exercised));
    // The generator's are not for hands to change.
    let change = match app {
        _ if delta.is_settled(&granted) => None,
        Some(_) => {
            Some("Its unit is made from its policy: `bpfgate policy apply` writes it anew.\n".to_owned())
        }
        None => Some(delta.drop_in(&unit, &granted, &exercised.join(" "))),
    };
    match Style::from(&args.style) {
        Style::Json => output::print_json(&json!({
            "unit": unit,
            "app": app,
            "granted": {"set": granted.set(), "by": granted},
            "should": delta.should,
            "missing": delta.missing,
            "unused": delta.unused,
            "stands_in": delta.stands_in,
            "needed": delta.needed,
            "exercised": {"sentences": exercised, "observed": observed.as_ref().map(|observed| &observed.exercised)},
            "drop_in": change.as_ref().filter(|_| app.is_none()),
        }))?,
        Style::Table => print(&unit, &granted, &delta, &exercised, change.as_deref())?,
    }
    Ok(ExitCode::from(u8::from(args.check && !delta.missing.is_empty())))
}

/// The unit that is meant, and the app whose helper it is.
fn unit(what: &str) -> Result<(String, Option<AppName>), Failure> {
    let app = |name: &str| name.parse::<AppName>().map_err(|error| Failure::Usage(format!("{error}")));
    // Names of apps have no dots.
    if !what.contains('.') {
        let app = app(what)?;
        return Ok((service_unit(&app), Some(app)));
    }
    let helper = what.strip_prefix("bpfgate-helper@").and_then(|rest| rest.strip_suffix(".service"));
    let helper = helper.filter(|name| !name.is_empty()).map(app).transpose()?;
    Ok((what.to_owned(), helper))
}

/// The policy of an app on this machine, or below a directory.
fn policy_of(app: &AppName, root: Option<&Path>) -> Result<PathBuf, Failure> {
    let Some(root) = root else { return policy::path(app.as_str()) };
    let places = bpfgate_protocol::policy::file::DIRECTORIES
        .map(|directory| root.join(directory.trim_start_matches('/')).join(format!("{app}.toml")));
    let none = || Failure::Failed(format!("there is no policy of app {app} below {}", root.display()));
    places.into_iter().find(|path| path.exists()).ok_or_else(none)
}

/// How much of what the service does stands behind the result: sentences.
fn exercised(policy: Option<&Policy>, seen: Option<&Exercised>) -> Vec<String> {
    let mut sentences = Vec::new();
    if let Some(policy) = policy {
        sentences.push(format!("By policy: {}.", policy.file));
    }
    let Some(seen) = seen else {
        sentences.push("Nothing was observed.".to_owned());
        return sentences;
    };
    let long = seen.seconds.map_or_else(
        || "for how long the records do not say".to_owned(),
        |seconds| format!("{seconds:.0} s from the first to the last"),
    );
    sentences.push(format!(
        "Observed: {} of {}, {long}; {} bookkeeping of the kernel.",
        counted(seen.checks, "check", "checks"),
        counted(seen.processes as u64, "process", "processes"),
        counted(seen.bookkeeping, "of them is", "of them are")
    ));
    let list =
        |all: &mut dyn Iterator<Item = &String>| all.map(String::as_str).collect::<Vec<_>>().join(", ");
    if !seen.syscalls.is_empty() {
        sentences.push(format!("System calls with checks: {}.", list(&mut seen.syscalls.iter())));
    }
    if !seen.bpf.is_empty() {
        sentences.push(format!("In bpf(2): {}.", list(&mut seen.bpf.iter())));
    }
    if seen.lost > 0 {
        sentences.push(format!("{} checks were lost: there may be needs that are not here.", seen.lost));
    }
    if seen.of_others > 0 {
        sentences.push(format!("{} checks of other units were left out.", seen.of_others));
    }
    sentences.extend(policy.and_then(|policy| unseen(policy, seen)));
    sentences
}

fn counted(count: u64, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

/// What the policy allows and was not seen: programs by their type, since a check does not know their names.
fn unseen(policy: &Policy, seen: &Exercised) -> Option<String> {
    let has = |command: &str| seen.bpf.iter().any(|call| call == command);
    let mut missing: Vec<String> = Vec::new();
    for rule in policy.objects.values().flat_map(|object| &object.programs) {
        let row = rule.hook.kind().row();
        if !has(&format!("PROG_LOAD {}", row.type_name)) {
            missing.push(format!("load of {} program {}", row.key, rule.program));
        }
        let attached = ["LINK_CREATE", "RAW_TRACEPOINT_OPEN"]
            .iter()
            .any(|command| seen.bpf.iter().any(|call| call.starts_with(command)))
            || seen.syscalls.contains("perf_event_open");
        // Where no capability is needed, no check is made that could be seen.
        let may = policy.clients.iter().any(|client| client.may.contains(&Right::Attach));
        if may && !row.attach.is_empty() && !attached {
            missing.push(format!("attach of {} program {}", row.key, rule.program));
        }
    }
    missing.dedup();
    (!missing.is_empty()).then(|| format!("Allowed by the policy and not seen: {}.", missing.join(", ")))
}

fn print(
    unit: &str,
    granted: &Granted,
    delta: &Delta,
    exercised: &[String],
    change: Option<&str>,
) -> Result<(), Failure> {
    let mut text = format!("{unit} is granted: {} ({})\n", granted.set(), granted.source);
    let beyond = granted.bounding.without(granted.set()).without(delta.should);
    if !granted.root && !beyond.is_empty() {
        let _ =
            writeln!(text, "Its bounding set has beside: {beyond}; a set-uid program could give it those.");
    }
    let mut table = Table::new(["", "CAPABILITY", "EVIDENCE"]);
    for (word, findings) in [
        ("missing", &delta.missing),
        ("unused", &delta.unused),
        ("by CAP_SYS_ADMIN", &delta.stands_in),
        ("needed", &delta.needed),
    ] {
        for Finding { capability, evidence } in findings {
            table.row([&word, &capability.list(), &evidence.join("; ")]);
        }
    }
    let _ = write!(text, "\n{table}\n");
    for sentence in exercised {
        let _ = writeln!(text, "{}", output::clean(sentence));
    }
    match change {
        Some(change) => {
            let _ = write!(text, "\n{}", output::clean_lines(change));
        }
        None => text += "\nIt is granted what it needs, and nothing else.\n",
    }
    output::print(&text)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bpfgate_protocol::policy::file::Accounts;

    #[test]
    fn units_and_apps_are_told_apart() {
        let app = || "flow".parse::<AppName>().ok();
        assert_eq!(unit("flow").unwrap(), ("bpfgate-helper@flow.service".to_owned(), app()));
        assert_eq!(
            unit("bpfgate-helper@flow.service").unwrap(),
            ("bpfgate-helper@flow.service".to_owned(), app())
        );
        assert_eq!(unit("cron.service").unwrap(), ("cron.service".to_owned(), None));
        assert!(unit("no/app").is_err());
    }

    #[test]
    fn what_was_not_exercised_is_said() {
        let text = "version = 1\n[[client]]\nuser = 1\nmay = [\"load\", \"attach\"]\n[objects.o]\npath = \"/o\"\n\
                    [[objects.o.tracepoint]]\nprogram = \"f\"\nevents = [\"a:b\"]\n[[objects.o.xdp]]\nprogram = \"g\"\n\
                    interfaces = [\"lo\"]";
        let policy = Policy::parse("p", text, &Accounts::default()).unwrap();
        let mut seen = Exercised { bpf: ["PROG_LOAD tracepoint".to_owned()].into(), ..Default::default() };
        let expected =
            "Allowed by the policy and not seen: load of xdp program g, attach of tracepoint program f.";
        assert_eq!(unseen(&policy, &seen).as_deref(), Some(expected));
        seen.syscalls.insert("perf_event_open".to_owned());
        seen.bpf.insert("PROG_LOAD xdp".to_owned());
        assert_eq!(unseen(&policy, &seen), None);
    }
}
