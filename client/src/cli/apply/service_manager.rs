//! systemd, by `systemctl`: the units of the helpers, and what is to be done to them.

use super::super::failure::Failure;
use super::plan::Helper;
use bpfgate_protocol::names::AppName;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};

/// Whether it runs this machine; sd_booted(3) looks at the same directory.
pub(super) fn is_running() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// All helpers that systemd knows of.
pub(super) fn helpers() -> Result<BTreeMap<AppName, Helper>, Failure> {
    let properties = "--property=Id,ActiveState,StatusText";
    let patterns = ["bpfgate-helper@*.socket", "bpfgate-helper@*.service"];
    let output = systemctl(&["show", properties], &patterns.map(str::to_owned))?;
    Ok(parse(&String::from_utf8_lossy(&output.stdout)))
}

/// Blocks of `Key=value`, one per unit, with an empty line between.
fn parse(text: &str) -> BTreeMap<AppName, Helper> {
    let mut helpers: BTreeMap<AppName, Helper> = BTreeMap::new();
    for block in text.split("\n\n") {
        let value = |key: &str| block.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        let Some(instance) = value("Id").and_then(|id| id.strip_prefix("bpfgate-helper@")) else { continue };
        let Some((app, kind)) = instance.rsplit_once('.') else { continue };
        let Ok(app) = app.parse() else { continue };
        // Also on its way up, down, or to the next try.
        let up = value("ActiveState").is_some_and(|state| !matches!(state, "inactive" | "failed"));
        let helper = helpers.entry(app).or_default();
        if kind == "socket" {
            helper.listens = up;
        } else {
            helper.runs = up;
            value("StatusText").unwrap_or_default().clone_into(&mut helper.status);
        }
    }
    helpers
}

/// Reads all units again, and runs all generators.
pub(super) fn reload() -> Result<(), Failure> {
    done("daemon-reload", systemctl(&["daemon-reload"], &[])?)
}

pub(super) fn stop(units: &[String]) -> Result<(), Failure> {
    change("stop", units)
}

pub(super) fn start(units: &[String]) -> Result<(), Failure> {
    change("start", units)
}

/// Restarts those that run.
pub(super) fn try_restart(units: &[String]) -> Result<(), Failure> {
    change("try-restart", units)
}

/// A unit that failed too often is started again only after this.
pub(super) fn forget_failures(units: &[String]) {
    if !units.is_empty() {
        // It complains about units that it does not know yet.
        let _ = systemctl(&["reset-failed"], units);
    }
}

fn change(verb: &str, units: &[String]) -> Result<(), Failure> {
    if units.is_empty() { Ok(()) } else { done(verb, systemctl(&[verb], units)?) }
}

fn systemctl(verb: &[&str], units: &[String]) -> Result<Output, Failure> {
    let mut command = Command::new("systemctl");
    command.arg("--no-ask-password").args(verb).arg("--").args(units);
    command.output().map_err(|error| Failure::Failed(format!("systemctl cannot be run: {error}")))
}

fn done(verb: &str, output: Output) -> Result<(), Failure> {
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', " ");
    let hint = "`journalctl -u 'bpfgate*'` has what the units say";
    Err(Failure::Failed(format!("systemctl {verb} failed: {said}; {hint}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_read_from_blocks() {
        let text = "Id=bpfgate-helper@a-1.socket\nActiveState=active\n\nStatusText=policy ab=cd\nId=bpfgate-helper@a-1.service\n\
                    ActiveState=activating\n\nId=bpfgate-helper@b.service\nActiveState=failed\nStatusText=\n\nId=other.service\n\
                    ActiveState=active\n\nId=bpfgate-helper@Odd.service\nActiveState=active\n";
        let helpers = parse(text);
        assert_eq!(helpers.keys().map(AppName::as_str).collect::<Vec<_>>(), ["a-1", "b"]);
        let [a, b] = [0, 1].map(|i| helpers.values().nth(i).unwrap());
        assert!(a.listens && a.runs && a.status == "policy ab=cd");
        assert!(!b.listens && !b.runs);
        assert!(parse("").is_empty());
    }
}
