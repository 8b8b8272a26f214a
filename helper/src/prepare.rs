//! `bpfgate-helper APP --prepare`: what only root may open, opened by root from the policy alone, and left with the
//! service manager for the helper that starts next. A step of its own, so that the helper needs no capability for it.

use crate::Arguments;
use crate::inventory::{self, Prepared};
use bpfgate_lockdown::{Fatal, Step, process};
use bpfgate_protocol::names::{AbsolutePath, AppName, EventName};
use bpfgate_protocol::policy::Hook;
use bpfgate_systemd::manager::Manager;
use std::collections::BTreeSet;
use std::os::fd::AsFd;

enum Wanted<'a> {
    Event(&'a EventName),
    Binary(&'a AbsolutePath),
}

pub(crate) fn run(app: &AppName, arguments: &Arguments) -> Result<(), Fatal> {
    let (manager, _kept) = Manager::from_environment()?;
    if !manager.is_there() {
        return Err(Fatal(
            "NOTIFY_SOCKET is missing: a unit runs this, and NotifyAccess=exec lets it".into(),
        ));
    }
    process::tame(8192)?;
    // What is wrong with the policy is for the helper to say: it can send away who waits at the door.
    let policy = match crate::policy(app, arguments) {
        Ok(policy) => policy,
        Err(fatal) => {
            eprintln!("bpfgate-helper: {fatal}");
            return Ok(());
        }
    };
    let mut done = BTreeSet::new();
    for rule in policy.objects.values().flat_map(|object| &object.programs) {
        let wanted: Vec<(String, Wanted<'_>)> = match &rule.hook {
            Hook::Tracepoint { events } => {
                events.iter().map(|event| (Prepared::event(event), Wanted::Event(event))).collect()
            }
            Hook::Uprobe { binary, .. } => vec![(Prepared::binary(binary), Wanted::Binary(binary))],
            _ => Vec::new(),
        };
        for (name, wanted) in wanted {
            if !done.insert(name.clone()) {
                continue;
            }
            let opened = match wanted {
                Wanted::Event(event) => inventory::open_tracepoint(event),
                Wanted::Binary(path) => inventory::open_binary(path).map(|fd| vec![fd]),
            };
            // Those of the last start are used up, or about to be.
            manager.forget(&name).step("the service manager")?;
            match opened {
                Ok(fds) => {
                    for fd in fds {
                        manager.keep(&name, fd.as_fd()).step("the service manager")?;
                    }
                }
                Err(refusal) => eprintln!("bpfgate-helper: {}: {}", policy.at(rule.line), refusal.why),
            }
        }
    }
    manager.settle().step("the service manager")
}
