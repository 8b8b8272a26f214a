//! Needed against granted, and the drop-in that makes them the same.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use bpfgate_protocol::policy::{Policy, capabilities};
use serde::Serialize;

use super::super::super::output;
use super::super::set::CapSet;
use super::granted::Granted;
use super::observed::Observed;

/// A capability and why it stands where it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    #[serde(serialize_with = "name")]
    pub(super) capability: CapSet,
    pub(super) evidence: Vec<String>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn name<S: serde::Serializer>(capability: &CapSet, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&capability.list())
}

/// What came out, by direction.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Delta {
    /// Needed and not granted.
    pub(super) missing: Vec<Finding>,
    /// Granted and not needed.
    pub(super) unused: Vec<Finding>,
    /// Needed, and had only because `CAP_SYS_ADMIN` is granted.
    pub(super) stands_in: Vec<Finding>,
    /// Needed and granted.
    pub(super) needed: Vec<Finding>,
    /// `CAP_SYS_ADMIN` is granted, and needed for nothing but what it stands in for.
    pub(super) admin_is_too_much: bool,
    /// All that should be granted.
    pub(super) should: CapSet,
}

impl Delta {
    pub(super) fn of(granted: &Granted, policy: Option<&Policy>, observed: Option<&Observed>) -> Self {
        let mut evidence: BTreeMap<u64, Vec<String>> = BTreeMap::new();
        for need in policy.map(capabilities).unwrap_or_default() {
            let why = format!(
                "policy: {} ({})",
                need.reason,
                policy.map(|policy| policy.at(need.line)).unwrap_or_default()
            );
            evidence.entry(1 << need.capability.bit()).or_default().push(why);
        }
        for (capability, asked) in observed.map(|observed| &observed.needs).into_iter().flatten() {
            evidence.entry(*capability).or_default().push(asked.sentence());
        }
        let should = evidence.keys().fold(CapSet::NONE, |set, one| set.with(CapSet(*one)));
        let admin = CapSet::from_name("CAP_SYS_ADMIN").unwrap_or_default();
        let is = granted.set();
        // A policy's capabilities are asked for in bpf(2) and perf_event_open(2), where it stands in for all of them.
        let of_policy = policy.map(capabilities).unwrap_or_default();
        let of_policy = of_policy.iter().fold(0, |mask, need| mask | 1_u64 << need.capability.bit());
        let covered = observed.map(Observed::stood_in).unwrap_or_default().with(CapSet(of_policy));
        let lacking = should.without(is);
        let stands_in = if is.has(admin) { lacking.both(covered) } else { CapSet::NONE };
        let admin_is_too_much = !stands_in.is_empty() && !should.has(admin);
        let unused = is.without(should).without(if admin_is_too_much { admin } else { CapSet::NONE });
        let findings = |set: CapSet| -> Vec<Finding> {
            let finding = |capability: CapSet| Finding {
                capability,
                evidence: evidence.get(&capability.0).cloned().unwrap_or_default(),
            };
            set.each().map(finding).collect()
        };
        let idle = match (policy, observed) {
            (Some(_), Some(_)) => {
                "the policy does not need it, and it was not asked for in what was observed"
            }
            (Some(_), None) => "the policy does not need it",
            (None, _) => "not asked for in what was observed",
        };
        let unused = unused.each().map(|capability| Finding { capability, evidence: vec![idle.to_owned()] });
        Self {
            missing: findings(lacking.without(stands_in)),
            unused: unused.collect(),
            stands_in: findings(stands_in),
            needed: findings(should.both(is)),
            admin_is_too_much,
            should,
        }
    }

    /// Whether the unit grants what it should, in both sets.
    pub(super) fn is_settled(&self, granted: &Granted) -> bool {
        let ambient = if granted.root { CapSet::NONE } else { self.should };
        granted.bounding == self.should && (granted.root || granted.ambient == ambient)
    }

    /// A drop-in that grants what should be granted, with the evidence.
    pub(super) fn drop_in(&self, unit: &str, granted: &Granted, basis: &str) -> String {
        let mut text = format!("# /etc/systemd/system/{unit}.d/capabilities.conf\n# {basis}\n");
        for (word, findings) in [("", &self.needed), ("", &self.stands_in), (" (new)", &self.missing)] {
            for Finding { capability, evidence } in findings {
                let _ =
                    writeln!(text, "# {}{word}: {}", capability.list(), output::clean(&evidence.join("; ")));
            }
        }
        if self.admin_is_too_much {
            let instead: Vec<String> =
                self.stands_in.iter().map(|finding| finding.capability.list()).collect();
            let _ = writeln!(text, "# CAP_SYS_ADMIN goes: it stood in for {}", instead.join(" "));
        }
        for Finding { capability, evidence } in &self.unused {
            let _ = writeln!(text, "# {} goes: {}", capability.list(), evidence.join("; "));
        }
        // Lists add up: what stands in the unit is taken back first.
        let _ = write!(text, "[Service]\nCapabilityBoundingSet=\nAmbientCapabilities=\n");
        if !self.should.is_empty() {
            let _ = writeln!(text, "CapabilityBoundingSet={}", self.should.list());
            if !granted.root {
                let _ = writeln!(text, "AmbientCapabilities={}", self.should.list());
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::super::unit_files::Unit;
    use super::*;
    use bpfgate_protocol::policy::file::Accounts;
    use std::path::Path;

    fn granted(root: bool, names: &str) -> Granted {
        let set = CapSet::from_list(names).unwrap();
        Granted { source: String::new(), root, bounding: set, ambient: if root { CapSet::NONE } else { set } }
    }

    /// Needs `CAP_BPF` and `CAP_PERFMON`.
    fn policy() -> Policy {
        let text = "version = 1\n[objects.o]\npath = \"/o\"\n[[objects.o.raw_tracepoint]]\nprogram = \"f\"\n\
                    events = [\"e\"]";
        Policy::parse("p.toml", text, &Accounts::default()).unwrap()
    }

    fn list(findings: &[Finding]) -> String {
        findings.iter().map(|finding| finding.capability.list()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn one_too_many_and_one_too_few_are_found() {
        let granted = granted(false, "CAP_BPF CAP_CHOWN");
        let delta = Delta::of(&granted, Some(&policy()), None);
        assert_eq!((list(&delta.missing), list(&delta.unused)), ("CAP_PERFMON".into(), "CAP_CHOWN".into()));
        assert_eq!((list(&delta.needed), list(&delta.stands_in)), ("CAP_BPF".into(), String::new()));
        assert_eq!(
            delta.missing[0].evidence,
            ["policy: load raw_tracepoint program f of object o (p.toml:4)"]
        );
        assert!(!delta.is_settled(&granted));
    }

    #[test]
    fn sys_admin_gives_way_to_what_it_stands_in_for() {
        let delta = Delta::of(&granted(true, "CAP_SYS_ADMIN CAP_BPF"), Some(&policy()), None);
        assert_eq!((list(&delta.stands_in), list(&delta.missing)), ("CAP_PERFMON".into(), String::new()));
        assert!(delta.admin_is_too_much && delta.unused.is_empty());
        // Beside the narrower ones it is only unused.
        let delta = Delta::of(&granted(true, "CAP_SYS_ADMIN CAP_BPF CAP_PERFMON"), Some(&policy()), None);
        assert_eq!((list(&delta.unused), delta.admin_is_too_much), ("CAP_SYS_ADMIN".into(), false));
    }

    #[test]
    fn the_drop_in_leads_to_what_should_be_granted() {
        for root in [true, false] {
            let before = granted(root, "CAP_SYS_ADMIN CAP_CHOWN");
            let delta = Delta::of(&before, Some(&policy()), None);
            let text = delta.drop_in("a.service", &before, "Policy.");
            assert!(text.contains("# CAP_SYS_ADMIN goes: it stood in for CAP_PERFMON CAP_BPF\n"), "{text}");
            assert!(text.contains("# CAP_CHOWN goes: the policy does not need it\n"), "{text}");
            let unit = Unit::parse(
                Path::new("/u"),
                "[Service]\nCapabilityBoundingSet=CAP_SYS_ADMIN CAP_CHOWN\nAmbientCapabilities=CAP_CHOWN\n",
            );
            let unit = unit.and(Path::new("/d"), &text);
            let after = Granted {
                source: String::new(),
                root,
                bounding: unit.capabilities("CapabilityBoundingSet", CapSet::all()).unwrap(),
                ambient: unit.capabilities("AmbientCapabilities", CapSet::NONE).unwrap(),
            };
            assert_eq!(after.set().to_string(), "CAP_PERFMON CAP_BPF");
            assert!(Delta::of(&after, Some(&policy()), None).is_settled(&after));
        }
    }
}
