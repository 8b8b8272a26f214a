//! The one check. The broker calls it to answer early and to say why; the helper calls it because it is the
//! authority. It gives a permit that carries what was allowed: operations take a permit, not a request.
//!
//! `authorize` (who) -> [`Permit`] -> `load`, `attach`, `map`, ... (what) -> a permit for just that. Permits have private
//! fields and no wire form: nothing that comes over a channel can be one.
#![forbid(unsafe_code)]

use crate::functions::Function;
use crate::hooks::Kind;
use crate::identity::Peer;
use crate::messages::helper::{Global, Target};
use crate::messages::loader::ProgramPlan;
use crate::names::{FunctionName, MapName, ObjectName, ProgramName};
use crate::policy::{Access, Client, Hook, Keep, Object, Policy, ProgramRule, Right, Unit};
use crate::refusal::Refusal;
use std::collections::BTreeSet;
use std::sync::Arc;

/// A client may use this app at all: some of its entries are for it.
#[derive(Debug, Clone)]
#[must_use]
pub struct Permit {
    policy: Arc<Policy>,
    roles: Vec<usize>,
}

/// Programs of one object may be loaded.
#[derive(Debug, Clone)]
#[must_use]
pub struct LoadPermit {
    policy: Arc<Policy>,
    object: ObjectName,
    programs: Vec<ProgramName>,
    globals: Vec<Global>,
    line: u32,
}

/// One program may be attached to one target.
#[derive(Debug, Clone)]
#[must_use]
pub struct AttachPermit {
    policy: Arc<Policy>,
    object: ObjectName,
    rule: usize,
    target: Target,
}

/// One map may be handed over or read, so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub struct MapPermit {
    access: Access,
    line: u32,
}

/// Something that needs a right and nothing else: the line that gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub struct RightPermit {
    line: u32,
}

/// Who: whether this client may use the app of this policy at all.
///
/// Errors: `Denied` (no entry is for it)
pub fn authorize(policy: &Arc<Policy>, peer: &Peer) -> Result<Permit, Refusal> {
    let is_for = |client: &Client| {
        client.user.is_none_or(|uid| peer.is_user(uid))
            && client.group.is_none_or(|gid| peer.is_in_group(gid))
            && client.unit.as_ref().is_none_or(|unit| peer.is_in_unit(unit))
            // An entry without a condition is refused when the file is read; here it is for nobody.
            && (client.user.is_some() || client.group.is_some() || client.unit.is_some())
    };
    let roles: Vec<usize> =
        policy.clients.iter().enumerate().filter(|(_, client)| is_for(client)).map(|(i, _)| i).collect();
    if roles.is_empty() {
        return Err(Refusal::denied(format!("{peer} is in no client entry of {}", policy.file)));
    }
    Ok(Permit { policy: policy.clone(), roles })
}

impl Permit {
    /// The line of the first entry that is for this client.
    pub fn line(&self) -> u32 {
        self.policy.clients[self.roles[0]].line
    }

    /// The policy it was given under.
    pub fn policy(&self) -> &Arc<Policy> {
        &self.policy
    }

    /// Whether some entry for this client has the right: where it stands.
    pub fn right(&self, right: Right) -> Result<RightPermit, Refusal> {
        let entry =
            self.roles.iter().map(|&i| &self.policy.clients[i]).find(|client| client.may.contains(&right));
        match entry {
            Some(client) => Ok(RightPermit { line: client.line }),
            None => Err(Refusal::denied(format!("no entry for this client says may = [\"{right}\"]"))
                .by_line(self.line())),
        }
    }

    /// The unit by which an entry that gives the right to attach names the client.
    pub fn own_unit(&self) -> Option<&Unit> {
        let mut entries = self.roles.iter().map(|&i| &self.policy.clients[i]);
        entries.find_map(|client| client.unit.as_ref().filter(|_| client.may.contains(&Right::Attach)))
    }

    fn object(&self, name: &ObjectName) -> Result<&Object, Refusal> {
        self.policy
            .objects
            .get(name)
            .ok_or_else(|| Refusal::denied(format!("the policy has no object {name}")))
    }

    /// What: these programs of this object (none named: all of them), with these values of globals.
    ///
    /// Errors: `Denied` (no right, or not in the policy) · `Invalid` (twice the same, value out of its range)
    pub fn load(
        &self,
        object: &ObjectName,
        programs: &[ProgramName],
        globals: &[Global],
    ) -> Result<LoadPermit, Refusal> {
        let right = self.right(Right::Load)?;
        let rules = self.object(object)?;
        let known = rules.program_names();
        let mut seen = BTreeSet::new();
        for program in programs {
            if !known.contains(program) {
                return Err(Refusal::denied(format!(
                    "the policy has no program {program} in object {object}"
                ))
                .by_line(rules.line));
            }
            if !seen.insert(program) {
                return Err(Refusal::invalid(format!("program {program} is named twice")));
            }
        }
        let mut names = BTreeSet::new();
        for Global { name, value } in globals {
            let Some(range) = rules.globals.get(name) else {
                return Err(Refusal::denied(format!(
                    "the policy lets nobody set global {name} of object {object}"
                ))
                .by_line(rules.line));
            };
            if !names.insert(name) {
                return Err(Refusal::invalid(format!("global {name} is set twice")));
            }
            if !(i128::from(range.min)..=i128::from(range.max)).contains(value) {
                let why = format!("global {name} may be {} to {}, not {value}", range.min, range.max);
                return Err(Refusal::invalid(why).by_line(range.line));
            }
        }
        let programs = if programs.is_empty() { known } else { programs.to_vec() };
        if programs.is_empty() {
            return Err(Refusal::denied(format!("the policy names no program of object {object}"))
                .by_line(rules.line));
        }
        Ok(LoadPermit {
            policy: self.policy.clone(),
            object: object.clone(),
            programs,
            globals: globals.to_vec(),
            line: right.line,
        })
    }

    /// What: this program to this target, under the hook of this kind if the policy lists it under several.
    ///
    /// Errors: `Denied` (no right, or no rule for such a target) · `Invalid` (the target is not the only one)
    pub fn attach(
        &self,
        object: &ObjectName,
        program: &ProgramName,
        kind: Option<Kind>,
        target: &Target,
    ) -> Result<AttachPermit, Refusal> {
        let _right = self.right(Right::Attach)?;
        let rules = self.object(object)?;
        let candidates: Vec<(usize, &ProgramRule)> = rules
            .programs
            .iter()
            .enumerate()
            .filter(|(_, rule)| rule.program == *program && kind.is_none_or(|kind| kind == rule.hook.kind()))
            .collect();
        let permit = |rule: usize, target: Target| AttachPermit {
            policy: self.policy.clone(),
            object: object.clone(),
            rule,
            target,
        };
        let own = self.own_unit().cloned().map(Target::Unit);
        let target = match target {
            Target::Own => own.as_ref().ok_or_else(|| {
                Refusal::denied("no entry that names this client by its unit says may = [\"attach\"]")
                    .by_line(self.line())
            })?,
            // No client can name the unit of another one.
            Target::Unit(_) => return Err(Refusal::denied("a unit cannot be asked for")),
            other => other,
        };
        if *target == Target::Only {
            let mut all: Vec<(usize, Target)> = Vec::new();
            for (i, rule) in &candidates {
                let literal = rule.hook.literal_targets();
                let Some(literal) = literal else {
                    return Err(Refusal::invalid(
                        "name the target: the policy allows a pattern, or the client's own",
                    )
                    .by_line(rule.line));
                };
                all.extend(literal.into_iter().map(|target| (*i, target)));
            }
            return match all.len() {
                1 => {
                    all.pop().map(|(i, target)| permit(i, target)).ok_or_else(|| Refusal::denied("no target"))
                }
                0 => Err(Refusal::denied(format!("no rule attaches program {program} of object {object}"))
                    .by_line(rules.line)),
                n => Err(Refusal::invalid(format!("name the target: the policy allows {n} of them"))
                    .by_line(rules.line)),
            };
        }
        match candidates.iter().find(|(_, rule)| rule.hook.allows(target)) {
            Some((i, _)) => Ok(permit(*i, target.clone())),
            None => Err(Refusal::denied(format!(
                "no rule attaches program {program} of object {object} to {target}"
            ))
            .by_line(rules.line)),
        }
    }

    /// What: this map of this object, as its access says.
    ///
    /// Errors: `Denied` (no right to this map, not in the policy, or its access is none)
    pub fn map(&self, object: &ObjectName, map: &MapName) -> Result<MapPermit, Refusal> {
        let rules = self.object(object)?;
        let gives = |client: &&Client| {
            client.may.contains(&Right::Maps) && client.maps.as_ref().is_none_or(|maps| maps.contains(map))
        };
        let entries = || self.roles.iter().map(|&i| &self.policy.clients[i]).filter(gives);
        let Some(first) = entries().next() else {
            return Err(
                Refusal::denied(format!("no entry for this client gives map {map}")).by_line(self.line())
            );
        };
        match rules.maps.get(map) {
            // Of several roles the one that gives more counts, as everywhere.
            Some((access, _))
                if access.hands_over() && entries().all(|client| client.proxy.contains(map)) =>
            {
                Ok(MapPermit { access: Access::Proxy, line: first.line })
            }
            Some(&(access, line)) if access != Access::None => Ok(MapPermit { access, line }),
            Some(&(_, line)) => Err(Refusal::denied(format!("map {map} is closed to clients")).by_line(line)),
            None => Err(Refusal::denied(format!("the policy does not name map {map} of object {object}"))
                .by_line(rules.line)),
        }
    }
}

/// What a policy with `keep = "boot"` lets its helper do without being asked by anybody.
#[derive(Debug, Clone)]
#[must_use]
pub struct BootPermit {
    policy: Arc<Policy>,
}

impl BootPermit {
    /// Only where the policy says so.
    pub fn of(policy: &Arc<Policy>) -> Option<Self> {
        (policy.keep == Keep::Boot).then(|| Self { policy: policy.clone() })
    }

    /// Every object of which the policy names a program, with all that it names.
    pub fn loads(&self) -> impl Iterator<Item = LoadPermit> + '_ {
        let named = self.policy.objects.iter().filter(|(_, rules)| !rules.programs.is_empty());
        named.map(|(name, rules)| LoadPermit {
            policy: self.policy.clone(),
            object: name.clone(),
            programs: rules.program_names(),
            globals: Vec::new(),
            line: rules.line,
        })
    }

    /// Every program of an object to every target that its rules name.
    pub fn attachments(&self, object: &ObjectName) -> Vec<AttachPermit> {
        let rules = self.policy.rules_of(object);
        let of_rule = |(rule, entry): (usize, &ProgramRule)| {
            let targets = entry.hook.literal_targets().unwrap_or_default();
            let permit = move |target| AttachPermit {
                policy: self.policy.clone(),
                object: object.clone(),
                rule,
                target,
            };
            targets.into_iter().map(permit).collect::<Vec<_>>()
        };
        rules.iter().enumerate().flat_map(of_rule).collect()
    }
}

/// Whether something that was loaded or attached under an earlier policy may stay under this one.
impl Policy {
    fn rules_of(&self, object: &ObjectName) -> &[ProgramRule] {
        self.objects.get(object).map_or(&[], |rules| &rules.programs)
    }

    /// This object, loaded from the file with this digest, whose programs call these functions that need a grant, and
    /// whose globals were set to these values.
    pub fn still_approves(
        &self,
        object: &ObjectName,
        digest: &[u8; 32],
        functions: &BTreeSet<Function>,
        globals: &[Global],
    ) -> bool {
        let Some(rules) = self.objects.get(object) else { return false };
        // Without a digest in the policy, root's file was approved when it was loaded.
        rules.sha256.is_none_or(|approved| approved == *digest)
            && functions.is_subset(&rules.functions)
            && globals.iter().all(|set| {
                let range = rules.globals.get(&set.name);
                range
                    .is_some_and(|range| (i128::from(range.min)..=i128::from(range.max)).contains(&set.value))
            })
    }

    /// This program of it, as a program of this kind, for the function that it was loaded for.
    pub fn still_names(
        &self,
        object: &ObjectName,
        program: &ProgramName,
        kind: Kind,
        function: Option<&FunctionName>,
    ) -> bool {
        self.rules_of(object).iter().any(|rule| {
            rule.program == *program && rule.hook.kind() == kind && rule.hook.bound_to() == function
        })
    }

    /// The rules that attach this program of it, under this kind of hook, to this target.
    pub fn rules_for<'a>(
        &'a self,
        object: &ObjectName,
        program: &'a ProgramName,
        kind: Kind,
        target: &'a Target,
    ) -> impl Iterator<Item = &'a ProgramRule> {
        self.rules_of(object).iter().filter(move |rule| {
            let still_there = match target {
                Target::Unit(unit) => self.units().any(|known| known == unit),
                _ => true,
            };
            rule.program == *program && rule.hook.kind() == kind && rule.hook.allows(target) && still_there
        })
    }
}

impl Object {
    /// Its programs, each once.
    fn program_names(&self) -> Vec<ProgramName> {
        let mut names: Vec<ProgramName> = Vec::new();
        for rule in &self.programs {
            if !names.contains(&rule.program) {
                names.push(rule.program.clone());
            }
        }
        names
    }
}

impl RightPermit {
    /// The line that gives the right.
    pub fn line(self) -> u32 {
        self.line
    }
}

impl MapPermit {
    /// How.
    pub fn access(self) -> Access {
        self.access
    }

    /// The line that says so.
    pub fn line(self) -> u32 {
        self.line
    }
}

impl LoadPermit {
    /// Which object.
    pub fn object(&self) -> &ObjectName {
        &self.object
    }

    /// Its rules.
    pub fn rules(&self) -> &Object {
        &self.policy.objects[&self.object]
    }

    /// The policy it was given under.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Values of globals.
    pub fn globals(&self) -> &[Global] {
        &self.globals
    }

    /// The line that allowed it.
    pub fn line(&self) -> u32 {
        self.line
    }

    /// The first rule of each program to load. The policy has one type for each of them.
    pub fn programs(&self) -> impl Iterator<Item = &ProgramRule> {
        self.programs
            .iter()
            .filter_map(|name| self.rules().programs.iter().find(|rule| rule.program == *name))
    }

    /// What the loader is told to load.
    pub fn plan(&self) -> Vec<ProgramPlan> {
        self.programs()
            .map(|rule| ProgramPlan {
                name: rule.program.clone(),
                prog_type: rule.hook.kind().row().prog_type,
                expected_attach_type: rule.hook.expected_attach_type(),
                function: rule.hook.bound_to().cloned(),
            })
            .collect()
    }

    /// Whether some rule of the policy hands the descriptor of this program out.
    pub fn program_fd(&self, program: &ProgramName) -> bool {
        self.rules().programs.iter().any(|rule| rule.program == *program && rule.program_fd)
    }
}

impl AttachPermit {
    /// The rule that allowed it.
    pub fn rule(&self) -> &ProgramRule {
        &self.policy.objects[&self.object].programs[self.rule]
    }

    /// To what; never [`Target::Only`].
    pub fn target(&self) -> &Target {
        &self.target
    }
}

impl Hook {
    /// Whether this target is one of the hook's.
    fn allows(&self, target: &Target) -> bool {
        match (self, target) {
            (Self::Xdp { interfaces, .. } | Self::Tcx { interfaces, .. }, Target::Interface(name)) => {
                interfaces.iter().any(|pattern| pattern.matches(name.as_str()))
            }
            (Self::CgroupSkb { cgroups, .. }, Target::Cgroup(path)) => cgroups.contains(path),
            (Self::CgroupSkb { own, .. }, Target::Unit(_)) => *own,
            (Self::RawTracepoint { events } | Self::Tracepoint { events }, Target::Event(event)) => {
                events.contains(event)
            }
            (Self::Uprobe { binary, symbols, .. }, Target::Symbol { binary: b, symbol }) => {
                binary == b && symbols.contains(symbol)
            }
            (Self::Fentry { function } | Self::Fexit { function }, Target::Function(name)) => {
                function == name
            }
            (Self::Kprobe { functions, .. }, Target::Function(name)) => functions.contains(name),
            _ => false,
        }
    }

    /// All of its targets, if they can be listed without knowing who asks.
    pub(crate) fn literal_targets(&self) -> Option<Vec<Target>> {
        Some(match self {
            Self::Xdp { interfaces, .. } | Self::Tcx { interfaces, .. } => {
                interfaces.iter().map(|p| p.literal().map(Target::Interface)).collect::<Option<_>>()?
            }
            Self::CgroupSkb { own: true, .. } => return None,
            Self::CgroupSkb { cgroups, .. } => cgroups.iter().cloned().map(Target::Cgroup).collect(),
            Self::RawTracepoint { events } | Self::Tracepoint { events } => {
                events.iter().cloned().map(Target::Event).collect()
            }
            Self::Uprobe { binary, symbols, .. } => symbols
                .iter()
                .map(|symbol| Target::Symbol { binary: binary.clone(), symbol: symbol.clone() })
                .collect(),
            Self::SocketFilter => Vec::new(),
            Self::Fentry { function } | Self::Fexit { function } => vec![Target::Function(function.clone())],
            Self::Kprobe { functions, .. } => functions.iter().cloned().map(Target::Function).collect(),
        })
    }
}

#[cfg(test)]
mod tests;
