//! Units of bpfgate that are not as they were shipped: what drop-ins and copies in /etc have taken away from their
//! confinement, or added to what they may.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::super::caps::set::CapSet;
use super::super::unit_files::{Setting, Unit, boolean};
use super::{Line, fault, ok, warning};

/// The units as this version ships them.
const BROKER: (&str, &str) = ("bpfgate.service", include_str!("../../../../systemd/units/bpfgate.service"));
const HELPER: (&str, &str) =
    ("bpfgate-helper@.service", include_str!("../../../../systemd/units/bpfgate-helper@.service"));

/// Where bpfgate-generator writes, and what.
const GENERATED: &str = "run/systemd/generator";
const DROP_IN: &str = "50-policy.conf";

/// Settings that confine in other ways than by yes or no, with one value. Each must be as it is shipped.
const VALUES: [&str; 9] = [
    "DevicePolicy",
    "Group",
    "KeyringMode",
    "NotifyAccess",
    "ProcSubset",
    "ProtectHome",
    "ProtectSystem",
    "UMask",
    "User",
];

/// The same of those whose values add up.
const LISTS: [&str; 6] = [
    "IPAddressDeny",
    "RestrictAddressFamilies",
    "SecureBits",
    "SupplementaryGroups",
    "SystemCallArchitectures",
    "SystemCallFilter",
];

/// Yes-or-no settings whose loss is no loss of depth but of a promise.
const PROMISED: [&str; 2] = ["NoNewPrivileges", "DynamicUser"];

/// A unit beside what it should be.
struct Compared {
    name: String,
    shipped: Unit,
    is: Unit,
}

/// One line for each thing that is wrong; one if nothing is.
pub(super) fn lines(root: &Path) -> Vec<Line> {
    const WHAT: &str = "units";
    let found = match all(root) {
        Ok(found) => found,
        Err(error) => {
            return vec![fault(WHAT, format!("unit files cannot be read: {error}"), "look as root")];
        }
    };
    let (found, mut lines) = found;
    if found.is_empty() && lines.is_empty() {
        return vec![ok(WHAT, "none of bpfgate is installed: it runs standalone, or not at all")];
    }
    let count = found.len();
    for unit in &found {
        lines.extend(unit.lines());
    }
    if lines.is_empty() {
        lines.push(ok(WHAT, format!("{count} of bpfgate, as confined as they are shipped")));
    }
    lines
}

/// Broker, template, and the helpers that have a drop-in.
fn all(root: &Path) -> io::Result<(Vec<Compared>, Vec<Line>)> {
    let mut units = Vec::new();
    let mut lines = Vec::new();
    for (name, text) in [BROKER, HELPER] {
        let Some(is) = Unit::load(root, name)? else { continue };
        units.push(Compared { name: name.to_owned(), shipped: Unit::parse(Path::new(name), text), is });
    }
    for name in helpers(root)? {
        let Some(is) = Unit::load(root, &name)? else { continue };
        let generated = root.join(GENERATED).join(format!("{name}.d")).join(DROP_IN);
        let shipped = Unit::parse(Path::new(HELPER.0), HELPER.1);
        let shipped = match fs::read_to_string(&generated) {
            Ok(text) => shipped.and(&generated, &text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let what = format!("{name} has drop-ins, and none of a policy: its helper may do nothing");
                lines.push(warning("units", what, "bpfgate policy check, bpfgate policy apply"));
                shipped
            }
            Err(error) => return Err(error),
        };
        units.push(Compared { name, shipped, is });
    }
    Ok((units, lines))
}

/// The helpers that have a directory of drop-ins somewhere.
fn helpers(root: &Path) -> io::Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for directory in ["etc/systemd/system", "run/systemd/system", GENERATED] {
        let entries = match fs::read_dir(root.join(directory)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for entry in entries {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let unit = name.strip_suffix(".d").filter(|unit| unit.starts_with("bpfgate-helper@"));
            names.extend(
                unit.filter(|unit| unit.ends_with(".service") && *unit != HELPER.0).map(str::to_owned),
            );
        }
    }
    Ok(names)
}

impl Compared {
    fn lines(&self) -> Vec<Line> {
        let mut lines = self.identity();
        lines.extend(self.capabilities());
        for key in self.shipped.keys() {
            let switched_on = self.shipped.value(key).is_some_and(|s| boolean(&s.value) == Some(true));
            if switched_on {
                lines.extend(self.switched_off(key));
            }
        }
        for key in VALUES {
            lines.extend(self.changed(key, |unit| unit.value(key).into_iter().cloned().collect()));
        }
        for key in LISTS {
            lines.extend(self.changed(key, |unit| unit.list(key).into_iter().cloned().collect()));
        }
        lines
    }

    fn undo(&self, setting: &Setting) -> String {
        format!(
            "take {}= out of {}, then systemctl daemon-reload and restart {}",
            setting.key,
            setting.place(),
            self.name
        )
    }

    /// What keeps a process from learning who its clients are.
    fn identity(&self) -> Vec<Line> {
        let mut lines = Vec::new();
        for (key, harm) in [
            ("PrivateUsers", "every client would be uid 65534, and capabilities mean nothing to bpf(2)"),
            ("PrivatePIDs", "clients would have no pid"),
        ] {
            // Also by a word such as `identity`.
            if let Some(setting) = self.is.value(key).filter(|setting| boolean(&setting.value) != Some(false))
            {
                let what = format!("{}: {} says {key}={}: {harm}", self.name, setting.place(), setting.value);
                lines.push(fault("units", what, self.undo(setting)));
            }
        }
        let hidden = self.is.value("ProtectProc").filter(|setting| setting.value != "default");
        if let Some(setting) = hidden.filter(|_| self.shipped.value("ProtectProc").is_none()) {
            let what = format!(
                "{}: {} says ProtectProc={}: the units of clients are hidden from it, and `unit` rules refuse",
                self.name,
                setting.place(),
                setting.value
            );
            lines.push(fault("units", what, self.undo(setting)));
        }
        lines
    }

    fn capabilities(&self) -> Vec<Line> {
        let mut lines = Vec::new();
        for (key, unset) in [("CapabilityBoundingSet", CapSet::all()), ("AmbientCapabilities", CapSet::NONE)]
        {
            let place = self.is.last(key).map_or_else(|| "nothing".to_owned(), Setting::place);
            let (is, should) = match (self.is.capabilities(key, unset), self.shipped.capabilities(key, unset))
            {
                (Ok(is), Ok(should)) => (is, should),
                (Err(why), _) | (_, Err(why)) => {
                    lines.push(fault("units", format!("{}: {why}", self.name), "correct the name"));
                    continue;
                }
            };
            let (more, less) = (is.without(should), should.without(is));
            let (what, todo) = if !more.is_empty() {
                ("it grants more than is needed", format!("take {} out", more.list()))
            } else if !less.is_empty() {
                (
                    "it grants less than the policy needs, and the helper does not start",
                    format!("put {} back", less.list()),
                )
            } else {
                continue;
            };
            let named = if more.is_empty() { less } else { more };
            let what = format!("{}: {place} decides {key}=: {what}: {named}", self.name);
            lines.push(fault("units", what, format!("{todo} of {key}= there, or take the line away")));
        }
        lines
    }

    fn switched_off(&self, key: &str) -> Option<Line> {
        let setting = self.is.last(key);
        let value = setting.map_or("", |setting| setting.value.as_str());
        // Nothing said is no; a word that is neither yes nor no, such as ProtectSystem=full, is compared elsewhere.
        if !value.is_empty() && boolean(value) != Some(false) {
            return None;
        }
        let (place, todo) = match setting {
            Some(setting) => (format!("{} says {key}={value}", setting.place()), self.undo(setting)),
            None => (format!("{} does not say {key}=yes any more", self.from()), self.reinstall()),
        };
        let what = format!("{}: {place}", self.name);
        Some(if PROMISED.contains(&key) { fault("units", what, todo) } else { warning("units", what, todo) })
    }

    fn changed(&self, key: &str, of: impl Fn(&Unit) -> Vec<Setting>) -> Option<Line> {
        let values = |unit: &Unit| of(unit).into_iter().map(|setting| setting.value).collect::<Vec<_>>();
        let (is, should) = (values(&self.is), values(&self.shipped));
        if is == should {
            return None;
        }
        let (place, todo) = match self.is.last(key) {
            Some(setting) => (setting.place(), self.undo(setting)),
            None => (self.from(), self.reinstall()),
        };
        let said =
            |values: &[String]| if values.is_empty() { "nothing".to_owned() } else { values.join(" ") };
        let what = format!(
            "{}: {place} makes {key}= {}, which is shipped as {}",
            self.name,
            said(&is),
            said(&should)
        );
        let of_root = key == "User" && matches!(is.last().map(String::as_str), None | Some("root" | "0"));
        Some(if of_root { fault("units", what, todo) } else { warning("units", what, todo) })
    }

    fn from(&self) -> String {
        self.is.files.first().map_or(Path::new(&self.name), PathBuf::as_path).display().to_string()
    }

    fn reinstall(&self) -> String {
        format!(
            "{} is not the unit of this version: install it again, and change it by drop-ins only",
            self.from()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;
    use bpfgate_protocol::policy::Policy;
    use bpfgate_protocol::policy::file::Accounts;
    use bpfgate_systemd::units::{Layout, drop_in};

    /// A root directory with the units, a helper of an app that needs `CAP_BPF` and `CAP_PERFMON`, and one drop-in.
    fn with(name: &str, path: &str, text: &str) -> Vec<Line> {
        let root = std::env::temp_dir().join(format!("bpfgate-doctor-units-{}-{name}", std::process::id()));
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        for (name, text) in [BROKER, HELPER] {
            write(&format!("usr/lib/systemd/system/{name}"), text);
        }
        let text_of_policy = "version = 1\n[objects.o]\npath = \"/o\"\n[[objects.o.raw_tracepoint]]\nprogram = \"f\"\n\
                              events = [\"e\"]";
        let policy = Policy::parse("p", text_of_policy, &Accounts::default()).unwrap();
        let generated = drop_in(&"a".parse().unwrap(), &policy, &Layout::here()).unwrap();
        write("run/systemd/generator/bpfgate-helper@a.service.d/50-policy.conf", &generated);
        if !path.is_empty() {
            write(path, &format!("[Service]\n{text}\n"));
        }
        let lines = lines(&root);
        fs::remove_dir_all(&root).unwrap();
        lines
    }

    #[test]
    fn units_as_shipped_are_fine() {
        let lines = with("fine", "", "");
        assert_eq!((lines.len(), lines[0].state), (1, State::Ok), "{lines:?}");
        let bounds =
            with("bounds", "etc/systemd/system/bpfgate.service.d/x.conf", "MemoryMax=4G\nWatchdogSec=20");
        assert_eq!(bounds[0].state, State::Ok, "{bounds:?}");
    }

    #[test]
    fn what_a_drop_in_weakens_is_named_with_its_line() {
        let broker = "etc/systemd/system/bpfgate.service.d/x.conf";
        let template = "etc/systemd/system/bpfgate-helper@.service.d/x.conf";
        let helper = "run/systemd/system/bpfgate-helper@a.service.d/x.conf";
        for (number, (path, text, state, words)) in [
            (broker, "PrivateUsers=yes", State::Fault, "every client would be uid 65534"),
            (broker, "PrivateUsers=identity", State::Fault, "PrivateUsers=identity"),
            (broker, "PrivatePIDs=true", State::Fault, "clients would have no pid"),
            (broker, "ProtectProc=invisible", State::Fault, "`unit` rules refuse"),
            (
                broker,
                "CapabilityBoundingSet=CAP_NET_ADMIN",
                State::Fault,
                "more than is needed: CAP_NET_ADMIN",
            ),
            (broker, "AmbientCapabilities=cap_bpf", State::Fault, "more than is needed: CAP_BPF"),
            (broker, "NoNewPrivileges=no", State::Fault, "NoNewPrivileges=no"),
            (broker, "NoNewPrivileges=", State::Fault, "NoNewPrivileges="),
            (broker, "User=root", State::Fault, "makes User= root"),
            (broker, "MemoryDenyWriteExecute=0", State::Warning, "MemoryDenyWriteExecute=0"),
            (broker, "RestrictNamespaces=off", State::Warning, "RestrictNamespaces=off"),
            (broker, "SystemCallFilter=", State::Warning, "makes SystemCallFilter= nothing"),
            (broker, "SystemCallFilter=@mount", State::Warning, "makes SystemCallFilter="),
            (broker, "ProtectSystem=full", State::Warning, "makes ProtectSystem= full"),
            (broker, "RestrictAddressFamilies=AF_INET", State::Warning, "RestrictAddressFamilies"),
            (
                helper,
                "CapabilityBoundingSet=CAP_SYS_ADMIN",
                State::Fault,
                "more than is needed: CAP_SYS_ADMIN",
            ),
            (helper, "CapabilityBoundingSet=", State::Fault, "does not start: CAP_PERFMON CAP_BPF"),
            (helper, "DynamicUser=no", State::Fault, "DynamicUser=no"),
            (helper, "SecureBits=", State::Warning, "SecureBits"),
            (helper, "NotifyAccess=all", State::Warning, "NotifyAccess"),
        ]
        .into_iter()
        .enumerate()
        {
            let lines = with(&number.to_string(), path, text);
            assert_eq!(lines.len(), 1, "{text}: {lines:?}");
            let place = format!("/{path}:2");
            let line = &lines[0];
            assert!(
                line.state == state && line.what.contains(words) && line.what.contains(&place),
                "{text}: {line:?}"
            );
        }
        // Both the template and the instance.
        let both = with("both", template, "PrivateUsers=yes");
        assert_eq!(both.iter().filter(|line| line.state == State::Fault).count(), 2, "{both:?}");
    }

    #[test]
    fn a_copy_without_the_lines_is_found() {
        let lines = with("copy", "etc/systemd/system/bpfgate.service", "ExecStart=/bin/true");
        let has = |words: &str| lines.iter().any(|line| line.what.contains(words));
        assert!(
            has("/etc/systemd/system/bpfgate.service does not say NoNewPrivileges=yes any more"),
            "{lines:?}"
        );
        assert!(has("more than is needed: all"), "{lines:?}");
        assert!(has("makes SystemCallFilter= nothing"), "{lines:?}");
    }

    #[test]
    fn a_helper_without_a_policy_is_pointed_out() {
        let lines = with("stray", "etc/systemd/system/bpfgate-helper@b.service.d/x.conf", "MemoryMax=1G");
        assert_eq!((lines.len(), lines[0].state), (1, State::Warning), "{lines:?}");
        assert!(lines[0].what.contains("bpfgate-helper@b.service"), "{lines:?}");
    }
}
