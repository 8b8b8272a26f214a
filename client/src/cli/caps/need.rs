//! `bpfgate caps need`: which capabilities a policy or an object needs, each with the reason.

use std::path::Path;
use std::process::ExitCode;

use bpfgate_protocol::demands::{self, Mask, ProgramType, Way};
use bpfgate_protocol::description::Description;
use bpfgate_protocol::inspect::map_type_name;
use bpfgate_protocol::policy::{Policy, capabilities};
use serde::Serialize;
use serde_json::json;

use super::super::Outcome;
use super::super::args::StyleArgs;
use super::super::doctor::facts::Facts;
use super::super::doctor::{Line, host};
use super::super::failure::Failure;
use super::super::output::{self, Style, Table};
use super::super::policy::{self, Source, Undescribed};
use super::kernel::Kernel;
use super::set::CapSet;

#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The app of an installed policy, a policy file, or an object file, which is read by a bpfgate-loader without
    /// privilege
    #[arg(value_name = "APP|FILE.toml|OBJECT.bpf.o")]
    what: String,
    /// On this kernel [default: the one that runs]
    #[arg(long, value_name = "VERSION")]
    kernel: Option<Kernel>,
    #[command(flatten)]
    style: StyleArgs,
}

/// One capability with one reason.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Need {
    capability: CapSet,
    why: String,
}

/// One way to attach a program.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Attach {
    program: String,
    how: &'static str,
    /// What it takes that the load of the program does not.
    beside: CapSet,
}

/// What came out for one kernel.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Needs {
    needs: Vec<Need>,
    attach: Vec<Attach>,
    /// What this kernel cannot do, and what is to be known: sentences.
    notes: Vec<String>,
}

impl Needs {
    fn set(&self) -> CapSet {
        self.needs.iter().fold(CapSet::NONE, |set, need| set.with(need.capability))
    }

    /// A need of each capability in the mask.
    fn add(&mut self, mask: Mask, why: &str) {
        let each = CapSet(mask).each();
        self.needs.extend(each.map(|capability| Need { capability, why: why.to_owned() }));
    }

    /// What the policy's helper is given. It is not what the kernel could do with less: bpfgate attaches in one way.
    pub(crate) fn of_policy(policy: &Policy, kernel: Kernel) -> Self {
        let mut found = Self::default();
        for need in capabilities(policy) {
            let mask = demands::on(kernel.0, 1 << need.capability.bit());
            found.add(mask, &format!("{} ({})", need.reason, policy.at(need.line)));
        }
        for rule in policy.objects.values().flat_map(|object| &object.programs) {
            let row = rule.hook.kind().row();
            if row.since > kernel.0 {
                let (key, since, place) = (row.key, Kernel(row.since), policy.at(rule.line));
                found.notes.push(format!("{key} works from Linux {since} on, not on {kernel} ({place})"));
            }
        }
        found.settle(kernel)
    }

    /// What it takes to load the object and to attach its programs.
    pub(crate) fn of_object(object: &Description, kernel: Kernel) -> Self {
        let mut found = Self::default();
        for map in &object.maps {
            let number = map.create.map_type;
            let what = format!("map {} is {}", map.name, an(&map_type_name(number)));
            match demands::maps().find(|row| row.number == number) {
                Some(row) => {
                    found.exists(row.since, &what, kernel);
                    found.add(demands::on(kernel.0, row.create), &what);
                }
                None => found.notes.push(format!("{what}, of which nothing is known here")),
            }
        }
        for program in &object.programs {
            match demands::program(program.prog_type) {
                Some(row) => found.program(&program.name, &program.section, row, kernel),
                None => found.notes.push(format!(
                    "program {} is of type {}, of which nothing is known here: what stands in its SEC() decides its type",
                    program.name, program.prog_type
                )),
            }
        }
        found.settle(kernel)
    }

    fn program(&mut self, name: &str, section: &str, row: &ProgramType, kernel: Kernel) {
        let what = format!("program {name} is {} program", an(row.name));
        self.exists(row.since, &what, kernel);
        let load = row.load_on(kernel.0);
        self.add(load, &what);
        let ways = row.ways_on(kernel.0, section);
        let beside = |way: &Way| CapSet(demands::on(kernel.0, way.needs) & !load);
        if ways.is_empty() && !row.ways.is_empty() {
            let first = row.ways.iter().map(|way| way.since).min().unwrap_or_default();
            let known =
                if first > kernel.0 { format!(" before Linux {}", Kernel(first)) } else { String::new() };
            self.notes.push(format!("{what}: no way to attach it is known{known}"));
        }
        // Nobody can do with less than the easiest way takes.
        if let Some(easiest) = ways.iter().min_by_key(|way| beside(way).0.count_ones()) {
            self.add(beside(easiest).0, &format!("program {name} is attached by {}", easiest.how));
        }
        let attach =
            |way: &&'static Way| Attach { program: name.to_owned(), how: way.how, beside: beside(way) };
        self.attach.extend(ways.iter().map(attach));
    }

    fn exists(&mut self, since: demands::Kernel, what: &str, kernel: Kernel) {
        if since > kernel.0 {
            self.notes.push(format!("{what}, which Linux has from {} on, not on {kernel}", Kernel(since)));
        }
    }

    /// In the order of the capabilities' numbers, and with what holds for everything on this kernel.
    fn settle(mut self, kernel: Kernel) -> Self {
        self.needs.sort_by_key(|need| need.capability.0);
        let before = |version: demands::Kernel| (kernel.0 < version).then_some(Kernel(version));
        if let Some(split) = before(demands::SPLIT) {
            let what = "there is no CAP_BPF and no CAP_PERFMON: CAP_SYS_ADMIN stands for both";
            self.notes.push(format!("before Linux {split} {what}"));
        }
        if let Some(version) = before(demands::NO_MEMLOCK) {
            self.notes.push(format!(
                "before Linux {version} maps and programs are charged to RLIMIT_MEMLOCK: to raise it takes \
                 CAP_SYS_RESOURCE, or LimitMEMLOCK=infinity in the unit"
            ));
        }
        if let Some(version) = before(demands::UNPRIVILEGED_MAPS) {
            self.notes.push(format!(
                "before Linux {version} clients cannot use the maps that they are given, where unprivileged_bpf_disabled \
                 is set: bpfgate is not for this kernel"
            ));
        }
        self
    }
}

/// With its article: an xskmap, an array, a hash.
fn an(noun: &str) -> String {
    let vowel = noun.starts_with(['a', 'e', 'i', 'o', 'u', 'x']) && !noun.starts_with("uni");
    format!("{} {noun}", if vowel { "an" } else { "a" })
}

pub(super) fn run(args: &Args) -> Outcome {
    let here = Kernel::here();
    let kernel = args.kernel.or(here).ok_or_else(|| {
        Failure::Failed("the version of this kernel cannot be read; say which with --kernel".into())
    })?;
    let is_object = Path::new(&args.what).extension().is_some_and(|end| end == "o");
    let found = if is_object {
        Needs::of_object(&description(Path::new(&args.what))?, kernel)
    } else {
        match Source::read(&policy::path(&args.what)?) {
            Ok(source) => Needs::of_policy(&source.policy, kernel),
            Err(error) => return Ok(policy::invalid(&error)),
        }
    };
    // Those of this machine say nothing about another.
    let host = if args.kernel.is_none() { settings(&Facts::gather(Path::new("/"))) } else { Vec::new() };
    match Style::from(&args.style) {
        Style::Json => output::print_json(&json!({
            "kernel": kernel.to_string(),
            "capabilities": found.set(),
            "needs": found.needs.iter().map(|need| json!({
                "capability": need.capability.list(), "why": need.why,
            })).collect::<Vec<_>>(),
            "attach": found.attach,
            "notes": found.notes,
            "host": host,
        }))?,
        Style::Table => print(&found, kernel, &host)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The settings of a machine that change what capabilities are good for.
fn settings(facts: &Facts) -> Vec<Line> {
    vec![host::unprivileged(facts), host::perf_events(facts), host::lockdown(facts)]
}

fn description(path: &Path) -> Result<Description, Failure> {
    let bytes =
        policy::read_object(path).map_err(|why| Failure::Failed(format!("{} {why}", path.display())))?;
    policy::describe(&bytes).map_err(|why| match why {
        Undescribed::NoLoader(why) => Failure::Failed(why),
        Undescribed::Broken(why) => Failure::Failed(format!("{}: {why}", path.display())),
    })
}

fn print(found: &Needs, kernel: Kernel, host: &[Line]) -> Result<(), Failure> {
    output::print(&format_args!("On Linux {kernel}: {}\n", found.set()))?;
    if !found.needs.is_empty() {
        let mut table = Table::new(["CAPABILITY", "WHY"]);
        for need in &found.needs {
            table.row([&need.capability, &need.why]);
        }
        output::print(&format_args!("\n{table}"))?;
    }
    if !found.attach.is_empty() {
        let mut table = Table::new(["PROGRAM", "CAN BE ATTACHED BY", "WHICH TAKES BESIDE"]);
        for attach in &found.attach {
            table.row([&attach.program, &attach.how, &attach.beside]);
        }
        output::print(&format_args!("\n{table}"))?;
    }
    let notes: String = found.notes.iter().map(|note| output::clean(note) + "\n").collect();
    if !notes.is_empty() {
        output::print(&format_args!("\nTo be known:\n{notes}"))?;
    }
    if !host.is_empty() {
        let mut table = Table::new(["SETTING OF THIS MACHINE", ""]);
        for line in host {
            table.row([&line.topic, &line.what]);
        }
        output::print(&format_args!("\n{table}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bpfgate_protocol::description::{Map, Program};
    use bpfgate_protocol::messages::loader::{MapCreate, Purpose};
    use bpfgate_protocol::policy::file::Accounts;
    use std::collections::BTreeSet;

    fn object(programs: &[(u32, &str)], maps: &[u32]) -> Description {
        let program = |(prog_type, section): &(u32, &str)| Program {
            name: "p".into(),
            section: (*section).into(),
            prog_type: *prog_type,
            flags: 0,
            instructions: 2,
            functions: BTreeSet::default(),
            refused: None,
        };
        let map = |map_type: &u32| Map {
            name: "m".into(),
            create: MapCreate {
                purpose: Purpose::Object(0),
                map_type: *map_type,
                key_size: 4,
                value_size: 4,
                max_entries: 1,
                flags: 0,
                extra: 0,
                name: "m".into(),
                btf: 0,
                btf_ids: (0, 0),
            },
        };
        Description {
            programs: programs.iter().map(program).collect(),
            maps: maps.iter().map(map).collect(),
            variables: Vec::new(),
            wish: None,
        }
    }

    fn of(programs: &[(u32, &str)], maps: &[u32], kernel: (u32, u32)) -> Needs {
        Needs::of_object(&object(programs, maps), Kernel(kernel))
    }

    #[test]
    fn each_need_has_its_reason() {
        let found = of(&[(5, "tracepoint/a/b")], &[17], (6, 18));
        assert_eq!(found.set().to_string(), "CAP_NET_ADMIN CAP_PERFMON CAP_BPF");
        let why: Vec<(String, &str)> =
            found.needs.iter().map(|need| (need.capability.list(), need.why.as_str())).collect();
        let expected = [
            ("CAP_NET_ADMIN", "map m is an xskmap"),
            ("CAP_PERFMON", "program p is a tracepoint program"),
            ("CAP_BPF", "map m is an xskmap"),
            ("CAP_BPF", "program p is a tracepoint program"),
        ];
        assert_eq!(why, expected.map(|(capability, why)| (capability.to_owned(), why)));
        // Only one way to attach it takes what root alone has.
        let beside: Vec<String> = found.attach.iter().map(|attach| attach.beside.to_string()).collect();
        assert_eq!(beside, ["none", "CAP_DAC_READ_SEARCH"]);
        assert_eq!(found.notes, [""; 0]);
    }

    #[test]
    fn what_every_way_to_attach_takes_is_needed() {
        let found = of(&[(8, "cgroup_skb/egress")], &[], (6, 18));
        assert_eq!(found.set().to_string(), "CAP_NET_ADMIN CAP_BPF");
        assert_eq!(found.needs[0].why, "program p is attached by cgroup link");
    }

    #[test]
    fn older_kernels_ask_for_more_and_can_less() {
        let uprobe = [(2, "uprobe//bin/sh:f")];
        assert_eq!(of(&uprobe, &[], (6, 6)).set().to_string(), "CAP_PERFMON CAP_BPF");
        // Before uprobe.multi only root's way was there.
        assert_eq!(of(&uprobe, &[], (6, 1)).set().to_string(), "CAP_SYS_ADMIN CAP_PERFMON CAP_BPF");
        let old = of(&[(6, "xdp")], &[17], (5, 4));
        assert_eq!(old.set().to_string(), "CAP_NET_ADMIN CAP_SYS_ADMIN");
        let notes = old.notes.join("\n");
        for words in
            ["before Linux 5.8 there is no CAP_BPF", "RLIMIT_MEMLOCK", "before Linux 5.19 clients cannot"]
        {
            assert!(notes.contains(words), "{notes}");
        }
        assert!(!of(&[], &[1], (5, 11)).notes.join("\n").contains("MEMLOCK"));
        let later = of(&[(32, "netfilter")], &[], (6, 1));
        assert!(later.notes[0].contains("which Linux has from 6.4 on, not on 6.1"), "{later:?}");
        assert!(later.notes[1].contains("no way to attach it is known before Linux 6.4"), "{later:?}");
    }

    #[test]
    fn a_policy_needs_what_its_helper_is_given() {
        let text = "version = 1\n[objects.o]\npath = \"/o\"\n[[objects.o.tcx]]\nprogram = \"f\"\n\
                    interfaces = [\"lo\"]\ndirection = \"ingress\"";
        let policy = Policy::parse("p.toml", text, &Accounts::default()).unwrap();
        let found = Needs::of_policy(&policy, Kernel((6, 18)));
        assert_eq!(found.set().to_string(), "CAP_NET_ADMIN CAP_BPF");
        assert_eq!(found.needs[1].why, "load tcx program f of object o (p.toml:4)");
        let older = Needs::of_policy(&policy, Kernel((6, 1)));
        assert_eq!(older.notes, ["tcx works from Linux 6.6 on, not on 6.1 (p.toml:4)"]);
    }
}
