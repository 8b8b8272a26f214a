//! `bpfgate policy apply`: what the policy files say becomes what is in force, and nothing else is touched.
//!
//! Before and after are the same text: the drop-in that the generator wrote at the last boot or reload, and the one that
//! it would write now. The files are read, the difference is shown, systemd reads its configuration again, and the broker
//! puts the policies in force: helpers that run take them over in place. Those whose unit has other settings now are
//! restarted, and those that say that they cannot: a restart keeps what is attached, as far as it is still allowed.

mod plan;
mod service_manager;

use super::Outcome;
use super::failure::{Failure, complain, say};
use super::output::{self, Style};
use super::policy::INVALID;
use bpfgate_client::admin::{Admin, Reloaded};
use bpfgate_protocol::names::AppName;
use bpfgate_protocol::policy::file::DIRECTORIES;
use bpfgate_systemd::generate::drop_ins;
use bpfgate_systemd::installed::Installed;
use bpfgate_systemd::units::{Layout, at_boot, drop_in_path, service_unit, socket_unit};
use plan::{Change, Wanted, What, plan};
use serde_json::{Value, json};
use service_manager as manager;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// What systemd gave the generator to write to, by systemd.generator(7): the first of its three directories.
const GENERATED: &str = "/run/systemd/generator";

/// Shows what differs and, unless this is a `dry_run`, puts it into force. 4 if a policy is invalid: its app is
/// disabled, all others are as they should be.
pub(crate) fn run(dry_run: bool, style: Style) -> Outcome {
    if !dry_run && !nix::unistd::geteuid().is_root() {
        let why = "only root can put policies into force: run `sudo bpfgate policy apply`; --dry-run shows what it would do";
        return Err(Failure::Failed(why.into()));
    }
    if !manager::is_running() {
        let why = "systemd does not run here, so there is nothing to apply to; a broker with --standalone takes SIGHUP";
        return Err(Failure::Failed(why.into()));
    }
    let directories = DIRECTORIES.map(PathBuf::from);
    let installed = Installed::read(&directories).map_err(|error| {
        Failure::Failed(format!("no policy can be judged: /etc/passwd or /etc/group: {error}"))
    })?;
    let (texts, warnings) = drop_ins(&installed, &Layout::here());
    if style == Style::Table {
        tell_what_is_wrong(&installed, &warnings);
    }
    let wanted: BTreeMap<AppName, Wanted> = texts
        .into_iter()
        .filter_map(|(app, drop_in)| {
            let boot = at_boot(installed.apps.get(&app)?.as_ref().ok()?);
            Some((app, Wanted { drop_in, boot }))
        })
        .collect();
    let changes = plan(&wanted, &in_force()?, &manager::helpers()?);
    match style {
        Style::Table => print(&changes, dry_run)?,
        Style::Json => output::print_json(&json!({
            "dry_run": dry_run,
            "apps": changes.iter().map(as_json).collect::<Vec<_>>(),
            "invalid": warnings,
        }))?,
    }
    if !dry_run {
        apply(&changes, &wanted)?;
    }
    Ok(ExitCode::from(if warnings.is_empty() { 0 } else { INVALID }))
}

/// Each invalid policy as `policy check` shows it, and then what only a unit file cannot say.
fn tell_what_is_wrong(installed: &Installed, warnings: &[String]) {
    let mut shown = 0;
    for (app, error) in installed.errors() {
        say(&output::clean_lines(&error.to_string()));
        shown += error.lines().len();
        if let Some(app) = app {
            complain(&format!("app {app} is disabled until its policy is mended"));
        }
    }
    warnings.iter().skip(shown).for_each(|warning| complain(warning));
}

/// The drop-ins that systemd has read last.
fn in_force() -> Result<BTreeMap<AppName, String>, Failure> {
    let mut all = BTreeMap::new();
    let Ok(entries) = std::fs::read_dir(GENERATED) else { return Ok(all) };
    for entry in entries {
        let name = entry?.file_name();
        let app = name.to_str().and_then(|name| {
            name.strip_prefix("bpfgate-helper@")?.strip_suffix(".service.d")?.parse::<AppName>().ok()
        });
        let Some(app) = app else { continue };
        if let Ok(text) = std::fs::read_to_string(drop_in_path(Path::new(GENERATED), &app)) {
            all.insert(app, text);
        }
    }
    Ok(all)
}

fn apply(changes: &[Change], wanted: &BTreeMap<AppName, Wanted>) -> Result<(), Failure> {
    let units = |is: &dyn Fn(&Change) -> bool, name: fn(&AppName) -> String| -> Vec<String> {
        changes.iter().filter(|change| is(change)).map(|change| name(&change.app)).collect()
    };
    // Before the reload, with the settings that they were started with; their sockets first, so that nobody starts them
    // again. What they had attached ends with them.
    let removed = |change: &Change| change.what == What::Removed;
    manager::stop(&units(&removed, socket_unit))?;
    manager::stop(&units(&removed, service_unit))?;
    manager::reload()?;
    let now = in_force()?;
    let taken = |(app, wanted): (&AppName, &Wanted)| now.get(app) == Some(&wanted.drop_in);
    if !wanted.iter().all(taken) || now.len() != wanted.len() {
        let why = "what bpfgate-generator wrote is not what the policies say now: one was changed meanwhile, or the \
                   generator is of another version; nothing was restarted, run `bpfgate policy apply` again";
        return Err(Failure::Failed(why.into()));
    }
    let reload = Admin::connect(None)?.reload()?;
    reload.apps.iter().for_each(tell_what_became);
    // All of one kind at a time: systemd starts them side by side.
    let sockets = units(&|change| change.listen, socket_unit);
    // Those that were not told, or could not do it, run with another policy still.
    let runs = manager::helpers()?;
    let outdated = |change: &Change| {
        let (helper, wanted) = (runs.get(&change.app), wanted.get(&change.app));
        helper.zip(wanted).is_some_and(|(helper, wanted)| helper.is_outdated(&wanted.drop_in))
    };
    let restarts = units(&|change| change.restart || outdated(change), service_unit);
    let starts = units(&|change| change.start, service_unit);
    let touched = |change: &Change| change.listen || change.start || change.what != What::Same;
    manager::forget_failures(&[units(&touched, socket_unit), units(&touched, service_unit)].concat());
    let results = [manager::start(&sockets), manager::try_restart(&restarts), manager::start(&starts)];
    results.into_iter().collect()
}

/// What the broker says of an app, as far as it is more than what was shown before.
fn tell_what_became(app: &Reloaded) {
    let line = |what: &str, phrases: &[String]| {
        if !phrases.is_empty() {
            say(&output::clean(&format!("{}: {what}: {}", app.app, phrases.join(", "))));
        }
    };
    line("detached or released", &app.revoked);
    line("issued and beyond recall", &app.beyond_recall);
}

fn print(changes: &[Change], dry_run: bool) -> Result<(), Failure> {
    let mut text = String::new();
    let mut add = |line: &str| {
        text += &output::clean(line);
        text.push('\n');
    };
    for change in changes {
        add(&format!("{}: {}", change.app, change.sentence(dry_run)));
        change.revoked.iter().for_each(|grant| add(&format!("  - {grant}")));
        change.granted.iter().for_each(|grant| add(&format!("  + {grant}")));
    }
    if changes.is_empty() {
        add("there is no policy, and no helper");
    }
    output::print(&text)?;
    Ok(())
}

fn as_json(change: &Change) -> Value {
    json!({
        "app": change.app,
        "change": change.what.word(),
        "granted": change.granted,
        "revoked": change.revoked,
        "restart": change.restart,
        "adopt": change.adopt,
        "start": change.start,
    })
}
