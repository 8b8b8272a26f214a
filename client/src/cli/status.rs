//! `bpfgate status`: what runs. From the broker, from the service manager if there is one, and from /proc; each says
//! what it knows, and who may not ask one of them sees the rest.

use std::path::Path;
use std::process::{Command, ExitCode};

use bpfgate_client::admin::{Admin, BrokerStatus, Survey};
use serde::Serialize;
use serde_json::json;

use super::caps::set::CapSet;
use super::failure::{Failure, say};
use super::output::{self, Style, Table};
use super::{Outcome, connect};

/// The interface that a broker must speak.
const INTERFACE: &str = "io.bpfgate";

/// A unit of bpfgate, as systemd and /proc have it.
#[derive(Debug, Default, Serialize)]
pub(super) struct Unit {
    name: String,
    /// `active (running)`.
    state: String,
    /// As systemd writes times.
    since: String,
    restarts: String,
    /// 0: none.
    pid: u32,
    /// Effective capabilities, by name.
    capabilities: Vec<String>,
    no_new_privileges: bool,
    seccomp_filters: u32,
}

impl Unit {
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// systemd does not start it again.
    pub(super) fn has_failed(&self) -> bool {
        self.state.starts_with("failed ")
    }
}

pub(crate) fn run(socket: Option<&Path>, style: Style) -> Outcome {
    let info = connect(socket)?.service_info()?;
    let speaks = info.interfaces.iter().any(|interface| interface == INTERFACE);
    // Another socket is another broker's, which is not that of the units.
    let units = if socket.is_none() { units() } else { Vec::new() };
    let admin = if socket.is_none() { Some(ask_admin(&units)) } else { None };
    let (broker, surveys) = match admin {
        Some(Ok((broker, surveys))) => (Some(broker), surveys),
        Some(Err(why)) => {
            if style == Style::Table {
                say(&format!("bpfgate: sessions and objects are not shown: {why}"));
            }
            (None, Vec::new())
        }
        None => (None, Vec::new()),
    };
    match style {
        Style::Json => {
            let mut value = json!({"answers": speaks, "units": units, "broker": broker});
            value["service"] =
                serde_json::to_value(&info).map_err(|error| Failure::Failed(error.to_string()))?;
            value["apps"] =
                surveys.iter().map(|(app, survey)| json!({"app": app, "survey": survey})).collect();
            output::print_json(&value)?;
        }
        Style::Table => {
            let mut table = Table::new(["BROKER", if speaks { "answers" } else { "is another service" }]);
            table.row([&"vendor", &info.vendor]);
            table.row([&"product", &info.product]);
            table.row([&"version", &info.version]);
            table.row([&"interfaces", &info.interfaces.join(" ")]);
            if let Some(broker) = &broker {
                let (landlock, filters) = (broker.sandbox.landlock_abi, broker.sandbox.seccomp_filters);
                table.row([&"up", &format!("{} s", broker.uptime)]);
                table.row([&"connections", &broker.connections]);
                table.row([
                    &"sandbox",
                    &format!("landlock ABI {landlock}, {filters} seccomp filters of its own"),
                ]);
            }
            output::print(&table)?;
            print_units(&units)?;
            print_apps(broker.as_ref(), &surveys)?;
        }
    }
    if speaks {
        return Ok(ExitCode::SUCCESS);
    }
    Err(Failure::Failed(format!("the service on this socket does not speak {INTERFACE}")))
}

fn print_units(units: &[Unit]) -> Result<(), Failure> {
    if units.is_empty() {
        return Ok(());
    }
    let mut table = Table::new(["UNIT", "STATE", "SINCE", "RESTARTS", "PID", "CAPABILITIES", "SECCOMP"]);
    for unit in units {
        let running = unit.pid != 0;
        let capabilities =
            if running && unit.capabilities.is_empty() { "none".into() } else { unit.capabilities.join(" ") };
        let number = |number: u32| if running { number.to_string() } else { String::new() };
        table.row([
            &unit.name,
            &unit.state,
            &unit.since,
            &unit.restarts,
            &number(unit.pid),
            &capabilities,
            &number(unit.seccomp_filters),
        ]);
    }
    output::print(&format_args!("\n{table}"))?;
    Ok(())
}

fn print_apps(broker: Option<&BrokerStatus>, surveys: &[(String, Survey)]) -> Result<(), Failure> {
    if surveys.is_empty() {
        return Ok(());
    }
    let mut apps = Table::new(["APP", "SESSIONS", "INSTANCES", "LINKS", "LANDLOCK"]);
    let mut links = Table::new(["APP", "INSTANCE", "OBJECT", "LINK", "PROGRAM", "HOOK", "TARGET"]);
    for (app, survey) in surveys {
        let helper = broker.and_then(|broker| broker.helpers.iter().find(|helper| helper.app == *app));
        let landlock =
            helper.and_then(|helper| helper.sandbox.as_ref()).map(|s| format!("ABI {}", s.landlock_abi));
        let count: usize = survey.instances.iter().map(|instance| instance.links.len()).sum();
        apps.row([app, &survey.sessions, &survey.instances.len(), &count, &landlock.unwrap_or_default()]);
        for instance in &survey.instances {
            for link in &instance.links {
                links.row([
                    app,
                    &instance.id,
                    &instance.object,
                    &link.id,
                    &link.program,
                    &link.hook,
                    &link.target,
                ]);
            }
        }
    }
    output::print(&format_args!("\n{apps}\n{links}"))?;
    Ok(())
}

/// Asks about the helpers that run; one that does not run has nothing, and is not started to say so.
fn ask_admin(units: &[Unit]) -> Result<(BrokerStatus, Vec<(String, Survey)>), bpfgate_client::Error> {
    let mut admin = Admin::connect(None)?;
    let mut surveys = Vec::new();
    for unit in units.iter().filter(|unit| unit.pid != 0) {
        let app = unit.name.strip_prefix("bpfgate-helper@").and_then(|rest| rest.strip_suffix(".service"));
        let Some(app) = app else { continue };
        match admin.instances(app) {
            Ok(survey) => surveys.push((app.to_owned(), survey)),
            Err(error) => say(&format!("bpfgate: {app}: {error}")),
        }
    }
    // Last: now the broker is connected to all of them.
    Ok((admin.status()?, surveys))
}

/// The units of bpfgate; none where systemd is not the service manager, or has none of them.
pub(super) fn units() -> Vec<Unit> {
    if !Path::new("/run/systemd/system").is_dir() {
        return Vec::new();
    }
    let properties = "--property=Id,LoadState,ActiveState,SubState,StateChangeTimestamp,NRestarts,MainPID";
    let names = ["bpfgate.socket", "bpfgate-admin.socket", "bpfgate.service", "bpfgate-helper@*"];
    let Ok(output) = Command::new("systemctl").arg("show").arg(properties).args(names).output() else {
        return Vec::new();
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.split("\n\n").filter_map(unit).collect()
}

fn unit(block: &str) -> Option<Unit> {
    let property = |name: &str| {
        let line = block.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        line.unwrap_or_default().to_owned()
    };
    if property("LoadState") != "loaded" {
        return None;
    }
    let pid = property("MainPID").parse().unwrap_or(0);
    let mut unit = Unit {
        name: property("Id"),
        state: format!("{} ({})", property("ActiveState"), property("SubState")),
        since: property("StateChangeTimestamp"),
        restarts: property("NRestarts"),
        pid,
        ..Default::default()
    };
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field =
        |name: &str| status.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()));
    unit.capabilities = CapSet::from_mask(field("CapEff").unwrap_or("0")).unwrap_or_default().names();
    unit.no_new_privileges = field("NoNewPrivs") == Some("1");
    unit.seccomp_filters = field("Seccomp_filters").and_then(|number| number.parse().ok()).unwrap_or(0);
    Some(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_is_what_systemctl_prints() {
        let block = "Id=bpfgate.service\nLoadState=loaded\nActiveState=active\nSubState=running\nMainPID=0\nNRestarts=3\n";
        let got = unit(block).unwrap();
        assert_eq!((got.name.as_str(), got.state.as_str()), ("bpfgate.service", "active (running)"));
        assert_eq!((got.restarts.as_str(), got.pid), ("3", 0));
        assert!(unit("Id=x\nLoadState=not-found").is_none());
    }
}
