//! From all policies to what a systemd generator writes: per valid policy an enabled socket and a drop-in.

use crate::installed::Installed;
use crate::units::{Layout, at_boot, drop_in, drop_in_path, service_unit, socket_unit};
use bpfgate_protocol::names::AppName;
use bpfgate_protocol::policy::Policy;
use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

/// The drop-ins of all apps whose policies are valid, and sentences about all others.
///
/// One function for the generator and for `policy apply`: what one writes is what the other compares.
pub fn drop_ins(installed: &Installed, layout: &Layout) -> (BTreeMap<AppName, String>, Vec<String>) {
    let mut texts = BTreeMap::new();
    let mut warnings: Vec<String> = Vec::new();
    for (app, error) in installed.errors() {
        let consequence = app.map_or(String::new(), |app| format!("; app {app} is disabled"));
        warnings.extend(error.lines().into_iter().map(|line| format!("{line}{consequence}")));
    }
    for (app, policy) in installed.valid() {
        match drop_in(app, policy, layout) {
            Ok(text) => {
                texts.insert(app.clone(), text);
            }
            Err(why) => warnings.push(format!("{}: {why}; app {app} is disabled", policy.file)),
        }
    }
    (texts, warnings)
}

/// Writes the units of all valid policies below `units`, the first directory that a generator is given. Gives sentences
/// about what is not enabled; whatever goes wrong with one app leaves the others as they are.
pub fn write(installed: &Installed, units: &Path, layout: &Layout) -> Vec<String> {
    let (texts, mut warnings) = drop_ins(installed, layout);
    let policies = installed.valid().filter_map(|(app, policy)| Some((app, policy, texts.get(app)?)));
    for (app, policy, text) in policies {
        if let Err(error) = write_one(app, policy, text, units, layout) {
            // Better not at all than in part.
            let _ = std::fs::remove_file(drop_in_path(units, app));
            warnings
                .push(format!("app {app} is disabled: writing its units below {}: {error}", units.display()));
        }
    }
    warnings
}

fn write_one(app: &AppName, policy: &Policy, text: &str, units: &Path, layout: &Layout) -> io::Result<()> {
    let path = drop_in_path(units, app);
    std::fs::create_dir_all(path.parent().unwrap_or(units))?;
    std::fs::write(&path, text)?;
    if at_boot(policy) {
        let template = layout.unit("bpfgate-helper@.service");
        enable(&template, &units.join("multi-user.target.wants"), &service_unit(app))?;
    }
    enable(&layout.unit("bpfgate-helper@.socket"), &units.join("sockets.target.wants"), &socket_unit(app))
}

fn enable(template: &Path, wants: &Path, unit: &str) -> io::Result<()> {
    std::fs::create_dir_all(wants)?;
    symlink(template, wants.join(unit))
}
