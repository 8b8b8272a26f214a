//! What a unit grants: as the service manager has it, or as its files say.

use std::path::Path;
use std::process::Command;

use serde::Serialize;

use super::super::super::failure::Failure;
use super::super::super::unit_files::{Unit, boolean};
use super::super::set::CapSet;

/// The capability settings of a unit.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Granted {
    /// Who says so.
    pub(super) source: String,
    /// It runs as uid 0, to which its bounding set is granted.
    pub(super) root: bool,
    pub(super) bounding: CapSet,
    pub(super) ambient: CapSet,
}

impl Granted {
    /// Of a unit on this machine, or of one in the files below `root`.
    pub(super) fn of(unit: &str, root: Option<&Path>) -> Result<Self, Failure> {
        let mut beside = String::new();
        if root.is_none() && Path::new("/run/systemd/system").is_dir() {
            match shown(unit) {
                Ok(text) => {
                    return Self::parse(&text).map_err(|why| Failure::Failed(format!("{unit}: {why}")));
                }
                // It speaks to root only where there is no D-Bus. The files are there for everybody.
                Err(why) => beside = format!("; the service manager was not asked: {why}"),
            }
        }
        let files = Unit::load(root.unwrap_or(Path::new("/")), unit)?
            .ok_or_else(|| Failure::Failed(format!("there is no unit {unit}, or it is masked")))?;
        let granted = Self::by_files(&files).map_err(Failure::Failed)?;
        Ok(Self { source: granted.source.clone() + &beside, ..granted })
    }

    /// From what `systemctl show` prints.
    fn parse(text: &str) -> Result<Self, String> {
        let property = |name: &str| {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            value.unwrap_or_default()
        };
        if property("LoadState") != "loaded" {
            return Err(format!("systemd has no such unit (LoadState={})", property("LoadState")));
        }
        Ok(Self {
            source: "systemctl show".to_owned(),
            root: is_root(Some(property("User")), property("DynamicUser")),
            bounding: CapSet::from_list(property("CapabilityBoundingSet"))?,
            ambient: CapSet::from_list(property("AmbientCapabilities"))?,
        })
    }

    fn by_files(unit: &Unit) -> Result<Self, String> {
        let value = |key| unit.value(key).map(|setting| setting.value.as_str());
        let files: Vec<String> = unit.files.iter().map(|file| file.display().to_string()).collect();
        Ok(Self {
            source: files.join(", "),
            root: is_root(value("User"), value("DynamicUser").unwrap_or_default()),
            bounding: unit.capabilities("CapabilityBoundingSet", CapSet::all())?,
            ambient: unit.capabilities("AmbientCapabilities", CapSet::NONE)?,
        })
    }

    /// What its processes start with.
    pub(super) fn set(&self) -> CapSet {
        if self.root { self.bounding } else { self.ambient.both(self.bounding) }
    }
}

/// What `systemctl show` prints of a unit; or why it does not.
fn shown(unit: &str) -> Result<String, String> {
    let properties = "--property=LoadState,User,DynamicUser,CapabilityBoundingSet,AmbientCapabilities";
    let output = Command::new("systemctl").args(["show", properties, "--", unit]).output();
    let output = output.map_err(|error| format!("systemctl cannot be run: {error}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn is_root(user: Option<&str>, dynamic: &str) -> bool {
    matches!(user, None | Some("" | "root" | "0")) && boolean(dynamic) != Some(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manager_and_files_say_the_same() {
        let shown = "CapabilityBoundingSet=cap_chown cap_bpf\nAmbientCapabilities=cap_bpf\nUser=daemon\nDynamicUser=no\n\
                     LoadState=loaded\n";
        let granted = Granted::parse(shown).unwrap();
        let text =
            "[Service]\nUser=daemon\nCapabilityBoundingSet=CAP_CHOWN CAP_BPF\nAmbientCapabilities=CAP_BPF\n";
        let files = Granted::by_files(&Unit::parse(Path::new("/u"), text)).unwrap();
        assert_eq!(Granted { source: "/u".into(), ..granted }, files);
        assert_eq!((files.root, files.set().to_string().as_str()), (false, "CAP_BPF"));
        assert!(Granted::parse("LoadState=not-found\n").is_err());
    }

    #[test]
    fn root_is_granted_its_bounding_set() {
        let of = |text: &str| {
            Granted::by_files(&Unit::parse(Path::new("/u"), &format!("[Service]\n{text}"))).unwrap()
        };
        assert_eq!(of("CapabilityBoundingSet=CAP_CHOWN").set().to_string(), "CAP_CHOWN");
        assert_eq!(of("").set(), CapSet::all());
        assert_eq!(of("User=0\nAmbientCapabilities=CAP_BPF").set(), CapSet::all());
        assert_eq!(of("DynamicUser=yes").set(), CapSet::NONE);
        // What is not in the bounding set is not there, whatever else is said.
        assert_eq!(of("User=x\nAmbientCapabilities=CAP_BPF\nCapabilityBoundingSet=").set(), CapSet::NONE);
    }
}
