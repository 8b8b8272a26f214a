//! `bpfgate-generator NORMAL EARLY LATE`: systemd runs it at boot and at every `daemon-reload`, and reads what it wrote
//! into NORMAL (systemd.generator(7)). It enables the helper of every valid policy, with what that policy needs.
//!
//! It never fails and never waits: a policy that is wrong costs its own app, with a warning in the kernel's log, because
//! nothing else is there so early.
#![forbid(unsafe_code)]

use bpfgate_protocol::policy::file::DIRECTORIES;
use bpfgate_protocol::refusal::printable;
use bpfgate_systemd::generate;
use bpfgate_systemd::installed::Installed;
use bpfgate_systemd::units::Layout;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Warnings that are shown one by one. The kernel's log is small and shared.
const MOST: usize = 50;

/// The kernel takes a record of 1,024 bytes, and refuses a longer one.
const RECORD: usize = 900;

fn main() -> ExitCode {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let (units, directories) = match arguments.as_slice() {
        [normal, _early, _late] => (normal, DIRECTORIES.iter().map(PathBuf::from).collect()),
        [normal, _early, _late, option, directories @ ..] if option == Path::new("--policies") => {
            (normal, directories.to_vec())
        }
        _ => {
            eprintln!("usage: bpfgate-generator NORMAL EARLY LATE [--policies DIRECTORY...]");
            eprintln!("systemd runs it; `bpfgate policy apply` has it run again");
            return ExitCode::from(2);
        }
    };
    let installed = match Installed::read(&directories) {
        Ok(installed) => installed,
        Err(error) => {
            warn(&[format!("no policy can be judged: /etc/passwd or /etc/group: {error}")]);
            return ExitCode::SUCCESS;
        }
    };
    let warnings = generate::write(&installed, units, &Layout::here());
    // Even then: what is not enabled is missing, and that is all.
    warn(&warnings);
    ExitCode::SUCCESS
}

fn warn(warnings: &[String]) {
    if warnings.is_empty() {
        return;
    }
    let mut kernel = OpenOptions::new().write(true).open("/dev/kmsg").ok();
    for warning in warnings.iter().take(MOST) {
        say(kernel.as_mut(), warning);
    }
    if warnings.len() > MOST {
        say(
            kernel.as_mut(),
            &format!("and {} more; `bpfgate policy check` shows all", warnings.len() - MOST),
        );
    }
}

fn say(kernel: Option<&mut File>, warning: &str) {
    const WARNING: u8 = 4; // syslog(3)
    let line = printable(warning, RECORD).replace('\n', " ");
    let _ = writeln!(std::io::stderr(), "bpfgate-generator: {line}");
    if let Some(kernel) = kernel {
        // One write is one record.
        let _ = kernel.write_all(format!("<{WARNING}>bpfgate-generator: {line}\n").as_bytes());
    }
}
