//! Which capabilities a policy needs, and why.

use super::Policy;
use crate::hooks::Capability;

/// One capability with the reason for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Need {
    /// Which.
    pub capability: Capability,
    /// A sentence.
    pub reason: String,
    /// The line of the policy that asks for it.
    pub line: u32,
}

/// The capabilities that the helper of this policy is given: exactly these, each with every reason for it.
/// A policy without programs needs none. Used by the helper, by `bpfgate policy show` and by unit files alike.
pub fn capabilities(policy: &Policy) -> Vec<Need> {
    let mut needs = Vec::new();
    for (name, object) in &policy.objects {
        for rule in &object.programs {
            let row = rule.hook.kind().row();
            let program = &rule.program;
            let mut need = |capability, verb: &str| {
                needs.push(Need {
                    capability,
                    reason: format!("{verb} {} program {program} of object {name}", row.key),
                    line: rule.line,
                });
            };
            need(Capability::Bpf, "load");
            for &capability in row.load {
                need(capability, "load");
            }
            for &capability in row.attach {
                if !row.load.contains(&capability) {
                    need(capability, "attach");
                }
            }
        }
    }
    needs.sort_by_key(|need| (need.capability, need.line));
    needs
}

/// The capabilities of [`capabilities`], each once.
pub fn needed(policy: &Policy) -> Vec<Capability> {
    let mut all: Vec<_> = capabilities(policy).iter().map(|need| need.capability).collect();
    all.dedup();
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::file::Accounts;

    fn needs(hooks: &str) -> Vec<Capability> {
        let text = format!("version = 1\n[objects.o]\npath = \"/o\"\n{hooks}");
        let policy = Policy::parse("p", &text, &Accounts::default()).unwrap();
        needed(&policy)
    }

    #[test]
    fn only_what_the_programs_need() {
        use Capability::{Bpf, NetAdmin, Perfmon};
        assert_eq!(needs(""), []);
        assert_eq!(needs("[[objects.o.socket_filter]]\nprogram = \"f\""), [Bpf]);
        assert_eq!(needs("[[objects.o.xdp]]\nprogram = \"f\"\ninterfaces = [\"lo\"]"), [NetAdmin, Bpf]);
        let cgroup = "[[objects.o.cgroup_skb]]\nprogram = \"f\"\ncgroups = [\"/c\"]\ndirection = \"egress\"";
        assert_eq!(needs(cgroup), [NetAdmin, Bpf]);
        assert_eq!(needs("[[objects.o.raw_tracepoint]]\nprogram = \"f\"\nevents = [\"e\"]"), [Perfmon, Bpf]);
    }
}
