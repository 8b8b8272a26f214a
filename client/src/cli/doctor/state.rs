//! What runs at the moment.

use std::path::{Path, PathBuf};

use bpfgate_lockdown::files::{Demand, restrict};
use bpfgate_protocol::policy::file;
use bpfgate_systemd::installed::Installed;

use super::super::caps::process::Process;
use super::super::caps::promise::{Verdict, judge};
use super::super::status;
use super::{Line, fault, ok, warning};

/// The ABI that the kernel gives a thread that confines itself. A thread of its own, which then ends.
pub(super) fn landlock() -> Option<u32> {
    std::thread::spawn(|| restrict(&[], Demand::Whatever).ok()).join().ok().flatten()
}

pub(super) fn lines(socket: Option<&Path>) -> Vec<Line> {
    let mut lines = vec![policies(), broker(socket)];
    lines.extend(failed());
    lines.extend(processes());
    lines
}

fn policies() -> Line {
    const WHAT: &str = "policies";
    let directories = file::DIRECTORIES.map(PathBuf::from);
    let installed = match Installed::read(&directories) {
        Ok(installed) => installed,
        Err(error) => {
            return fault(WHAT, format!("/etc/passwd or /etc/group cannot be read: {error}"), "look as root");
        }
    };
    let (valid, errors) = (installed.valid().count(), installed.errors().count());
    if errors > 0 {
        let what = format!("{valid} in force, {errors} not valid: their apps are refused");
        return warning(WHAT, what, "bpfgate policy check");
    }
    match valid {
        0 => ok(WHAT, format!("none in {}: every app is refused", file::DIRECTORIES.join(" and "))),
        _ => ok(WHAT, format!("{valid} in force")),
    }
}

fn broker(socket: Option<&Path>) -> Line {
    const WHAT: &str = "broker";
    let answered = bpfgate_client::Client::connect(socket).and_then(|mut client| client.service_info());
    match answered {
        Ok(info) => ok(WHAT, format!("answers: {} {}", info.product, info.version)),
        Err(error) => {
            let todo =
                "systemctl enable --now bpfgate.socket; without systemd, start bpfgate-broker --standalone";
            fault(WHAT, error.to_string(), todo)
        }
    }
}

/// Units that systemd has given up.
fn failed() -> Vec<Line> {
    let failed = status::units().into_iter().filter(status::Unit::has_failed);
    failed
        .map(|unit| {
            let todo =
                format!("journalctl -u {0}; once it is mended, systemctl reset-failed {0}", unit.name());
            fault("units", format!("{} has failed", unit.name()), todo)
        })
        .collect()
}

/// Whether each process holds what is promised, one line for all of them if so.
fn processes() -> Vec<Line> {
    const WHAT: &str = "processes";
    let all = match Process::all() {
        Ok(all) => all,
        Err(error) => return vec![fault(WHAT, format!("/proc cannot be read: {error}"), "mount /proc")],
    };
    let mut lines = Vec::new();
    let mut count = 0;
    for process in &all {
        let Some(role) = &process.role else { continue };
        count += 1;
        let app = role.app().map(|app| format!(" of {app}")).unwrap_or_default();
        let who = format!("{}{app}, process {}", role.name(), process.pid);
        match judge(process, &all) {
            Verdict::None | Verdict::Kept => {}
            Verdict::Broken(why) => {
                let what = format!("{who}: {}", why.join("; "));
                lines.push(fault(WHAT, what, format!("bpfgate policy apply, if its policy was changed; bpfgate caps show {} --threads says more", process.pid)));
            }
            Verdict::Unknown(why) => {
                lines.push(warning(WHAT, format!("{who}: {why}"), "bpfgate policy check"));
            }
        }
    }
    if lines.is_empty() {
        lines.push(ok(
            WHAT,
            match count {
                0 => "none of bpfgate is to be seen".to_owned(),
                _ => format!("{count} of bpfgate, each holds what is promised"),
            },
        ));
    }
    lines
}
