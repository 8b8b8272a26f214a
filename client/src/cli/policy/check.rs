//! `bpfgate policy check`: whether files are policies, and whether the objects that they name are what they say.

use super::super::Outcome;
use super::super::args::CheckArgs;
use super::super::failure::say;
use super::super::output::{self, Style};
use super::objects::{self, Undescribed};
use super::places::{Places, Step};
use super::{INVALID, Source, app_of, files_in};
use bpfgate_client::hex;
use bpfgate_protocol::description::{Description, Program, Shape, Variable};
use bpfgate_protocol::functions::Function;
use bpfgate_protocol::hooks::ROWS;
use bpfgate_protocol::inspect;
use bpfgate_protocol::names::{AppName, GlobalName, ObjectName};
use bpfgate_protocol::policy::report::{Problem, Severity, did_you_mean, underlined};
use bpfgate_protocol::policy::{Access, Hook, Object, Policy, PolicyError, ProgramRule, Range, file};
use bpfgate_systemd::units::{Layout, drop_in};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Checks policy files, all installed ones if none is given; 4 if one is invalid.
pub(super) fn run(args: &CheckArgs) -> Outcome {
    let style = Style::from(&args.style);
    let installed = args.files.is_empty();
    let paths = if installed { installed_files()? } else { args.files.clone() };
    let mut invalid = 0;
    let mut results = Vec::new();
    for path in &paths {
        let verdict = Verdict::of(path, installed, args);
        invalid += usize::from(verdict.error.is_some());
        match style {
            Style::Table => verdict.tell(),
            Style::Json => results.push(verdict.as_json()),
        }
    }
    match style {
        Style::Json => output::print_json(&Value::from(results))?,
        Style::Table => output::print(&format_args!("{} valid, {invalid} invalid\n", paths.len() - invalid))?,
    }
    Ok(ExitCode::from(if invalid == 0 { 0 } else { INVALID }))
}

fn installed_files() -> Result<Vec<PathBuf>, super::Failure> {
    let directories = file::DIRECTORIES.iter().map(|directory| files_in(Path::new(directory)));
    let mut files = directories.collect::<Result<Vec<_>, _>>()?.concat();
    files.sort();
    Ok(files)
}

/// What is to be said of one file.
struct Verdict {
    file: String,
    text: String,
    error: Option<PolicyError>,
    warnings: Vec<Problem>,
    /// Why the broker would not take it where it is.
    untrusted: Option<String>,
}

impl Verdict {
    fn of(path: &Path, installed: bool, args: &CheckArgs) -> Self {
        let file = path.display().to_string();
        let mut verdict =
            Self { file, text: String::new(), error: None, warnings: Vec::new(), untrusted: None };
        let source = app_of(path).and_then(|app| {
            // A file that is not installed yet may belong to its author; one that is must be root's.
            if installed {
                file::read_file(path)?;
            }
            Ok((app, Source::read(path)?))
        });
        let (app, source) = match source {
            Ok(source) => source,
            Err(error) => {
                verdict.error = Some(error);
                return verdict;
            }
        };
        let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        verdict.untrusted = file::open_trusted(&absolute).err().map(|not| not.why);
        let mut checks = Checks::of(&source);
        checks.clients();
        checks.unit(&app);
        if !args.no_objects {
            checks.objects(args.objects.as_deref());
        }
        verdict.warnings = checks.warnings;
        if !checks.errors.is_empty() {
            verdict.error = Some(PolicyError::new(&verdict.file, &source.text, checks.errors));
        }
        verdict.text = source.text;
        verdict
    }

    fn tell(&self) {
        if let Some(error) = &self.error {
            say(&output::clean_lines(&error.to_string()));
        }
        if !self.warnings.is_empty() {
            let warnings = underlined(Severity::Warning, &self.file, &self.text, &self.warnings);
            say(&output::clean_lines(&warnings));
        }
        if let (Some(why), None) = (&self.untrusted, &self.error) {
            say(&format!("note: {}: where it is now, the broker would not take it: it {why}", self.file));
        }
    }

    fn as_json(&self) -> Value {
        let warnings = PolicyError::new(&self.file, &self.text, self.warnings.clone());
        let mut value =
            json!({"file": self.file, "valid": self.error.is_none(), "warnings": as_json(&warnings)});
        match &self.error {
            Some(error) => value["problems"] = as_json(error),
            None => value["would_be_taken"] = json!(self.untrusted.is_none()),
        }
        value
    }
}

fn as_json(error: &PolicyError) -> Value {
    let problem = |problem: &Problem| {
        let place = error.place(problem);
        let (line, column) = (place.map(|(line, _)| line), place.map(|(_, column)| column));
        json!({"message": problem.message, "help": problem.help, "line": line, "column": column})
    };
    error.problems.iter().map(problem).collect()
}

/// What is found out about a policy that is well written.
struct Checks<'s> {
    policy: &'s Policy,
    places: Places<'s>,
    errors: Vec<Problem>,
    warnings: Vec<Problem>,
}

impl<'s> Checks<'s> {
    fn of(source: &'s Source) -> Self {
        let places = Places::of(&source.text);
        Self { policy: &source.policy, places, errors: Vec::new(), warnings: Vec::new() }
    }

    fn error(&mut self, span: std::ops::Range<usize>, message: impl Into<String>, help: Option<String>) {
        self.errors.push(Problem { span, message: message.into(), help });
    }

    fn warning(&mut self, span: std::ops::Range<usize>, message: impl Into<String>, help: Option<String>) {
        self.warnings.push(Problem { span, message: message.into(), help });
    }

    /// Maps that an entry lists and that no object hands out.
    fn clients(&mut self) {
        let maps = self.policy.objects.values().flat_map(|object| &object.maps);
        let open: BTreeSet<&str> =
            maps.filter(|(_, (access, _))| *access != Access::None).map(|(name, _)| name.as_str()).collect();
        for client in &self.policy.clients {
            let listed = client.maps.iter().flatten().map(|map| ("maps", map));
            let listed = listed.chain(client.proxy.iter().map(|map| ("proxy", map)));
            for (key, map) in listed.filter(|(_, map)| !open.contains(map.as_str())) {
                let span = self.places.key(&["client".into(), Step::Line(client.line), key.into()]);
                let why = format!("no object of this policy hands out map {map}");
                self.warning(span, why, did_you_mean(map.as_str(), open.iter().copied()));
            }
        }
    }

    /// What systemd cannot be told; standalone it does not matter.
    fn unit(&mut self, app: &AppName) {
        if let Err(why) = drop_in(app, self.policy, &Layout::here()) {
            let help = "under systemd this app is disabled";
            self.warning(self.places.key(&["objects".into()]), why, Some(help.to_owned()));
        }
    }

    fn objects(&mut self, directory: Option<&Path>) {
        for (name, object) in &self.policy.objects {
            let path = self.places.value(&below(name, &["path".into()]));
            let place = objects::place(object.path.as_str(), directory);
            if object.sha256.is_none() {
                self.no_digest(name, object, directory.is_some());
            }
            let bytes = match objects::read(&place) {
                Ok(bytes) => bytes,
                Err(why) => {
                    let why = format!("the file of object {name} {why}: nothing of it was checked");
                    let help = "--objects DIRECTORY checks the files there; --no-objects checks none";
                    self.warning(path, why, Some(help.to_owned()));
                    continue;
                }
            };
            let digest: [u8; 32] = Sha256::digest(&bytes).into();
            if object.sha256.is_some_and(|approved| approved != digest) {
                let span = self.places.value(&below(name, &["sha256".into()]));
                let why =
                    format!("{} is another file: its digest is {}", place.display(), hex::encode(&digest));
                let help = "if it is the one that you mean, `bpfgate policy pin FILE` writes its digest here";
                self.error(span, why, Some(help.to_owned()));
            }
            match objects::describe(&bytes) {
                Ok(description) => self.object(name, object, &description),
                Err(Undescribed::NoLoader(why)) => self.warning(path, why, None),
                Err(Undescribed::Broken(why)) => self.error(path, why, None),
            }
        }
    }

    fn no_digest(&mut self, name: &ObjectName, object: &Object, elsewhere: bool) {
        let pin = "`bpfgate policy pin FILE` writes it here";
        let trusted = file::open_trusted(Path::new(object.path.as_str()));
        let why = match trusted {
            Err(why) if !elsewhere => {
                format!("without a sha256 the helper would not take this file: it {why}")
            }
            _ => "without a sha256 whatever root puts there is loaded".to_owned(),
        };
        self.warning(self.places.key(&below(name, &[])), why, Some(pin.to_owned()));
    }

    /// What the policy says of an object, and what is in it.
    fn object(&mut self, name: &ObjectName, object: &Object, found: &Description) {
        let path = self.places.value(&below(name, &["path".into()]));
        if let Some(wish) = &found.wish {
            self.error(path.clone(), wish, None);
        }
        let mut called: BTreeSet<Function> = BTreeSet::new();
        for rule in &object.programs {
            let row = rule.hook.kind().row();
            let span =
                self.places.value(&below(name, &[row.key.into(), Step::Line(rule.line), "program".into()]));
            if let Some(program) = found.programs.iter().find(|program| program.name == rule.program.as_str())
            {
                called.extend(program.functions.iter().cloned());
                self.targets(name, rule, &program.section);
                self.program(span, (name, object), rule, program);
            } else {
                let names = || found.programs.iter().map(|program| program.name.as_str());
                let help =
                    did_you_mean(rule.program.as_str(), names()).unwrap_or_else(|| has("programs", names()));
                self.error(span, format!("object {name} has no program {}", rule.program), Some(help));
            }
        }
        for function in object.functions.difference(&called) {
            let span = self.places.value(&below(name, &["helpers".into(), function.key().into()]));
            let why = format!("no program that this policy names calls {function}");
            self.warning(span, why, Some("leave it out".to_owned()));
        }
        self.maps(name, object, found, path);
        for (global, range) in &object.globals {
            let span = self.places.key(&below(name, &["globals".into(), global.as_str().into()]));
            let value = self.places.value(&below(name, &["globals".into(), global.as_str().into()]));
            self.global((name, global), range, (span, value), &found.variables);
        }
    }

    /// Targets that the program was not written for, or that are not here: what is wrong there is no error, because
    /// policies are written for other machines and objects for several events.
    fn targets(&mut self, name: &ObjectName, rule: &ProgramRule, section: &str) {
        let kind = rule.hook.kind();
        let mut warn = |key: &str, why: String| {
            let span =
                self.places.value(&below(name, &[kind.row().key.into(), Step::Line(rule.line), key.into()]));
            self.warnings.push(Problem { span, message: why, help: None });
        };
        match &rule.hook {
            Hook::RawTracepoint { events } | Hook::Tracepoint { events } => {
                let Some(written_for) = objects::event(kind, section) else { return };
                for event in events.iter().filter(|event| **event != written_for) {
                    let program = &rule.program;
                    warn(
                        "events",
                        format!("program {program} is written for {written_for}, and not for {event}"),
                    );
                }
            }
            Hook::CgroupSkb { cgroups, .. } => {
                for cgroup in cgroups.iter().filter(|path| !Path::new(path.as_str()).is_dir()) {
                    warn("cgroups", format!("there is no directory {cgroup} on this machine now"));
                }
            }
            _ => {}
        }
    }

    fn program(
        &mut self,
        span: std::ops::Range<usize>,
        (name, object): (&ObjectName, &Object),
        rule: &ProgramRule,
        program: &Program,
    ) {
        if let Err(refusal) = inspect::check_kind(rule, program.prog_type, program.flags) {
            let hooks: Vec<String> = ROWS
                .iter()
                .filter(|row| row.prog_type == program.prog_type)
                .map(|row| format!("[[objects.{name}.{}]]", row.key))
                .collect();
            let help = if hooks.is_empty() {
                format!("it is in section \"{}\", for which there is no hook", program.section)
            } else {
                format!("it is in section \"{}\", which is for {}", program.section, hooks.join(" or "))
            };
            self.error(span.clone(), refusal.why, Some(help));
        }
        if let Some(why) = &program.refused {
            self.error(span.clone(), format!("program {}: {why}", program.name), None);
        }
        for function in &program.functions {
            if let Err(refusal) = inspect::granted(name, object, function) {
                self.error(span.clone(), refusal.why, None);
            }
        }
        let limit = self.policy.limits.instructions;
        if program.instructions > limit {
            let place = self.places.value(&["limits".into(), "instructions".into()]);
            let why = format!("program {} has {} instructions", program.name, program.instructions);
            self.error(place, format!("{why}; this limit is {limit}"), None);
        }
    }

    fn maps(
        &mut self,
        name: &ObjectName,
        object: &Object,
        found: &Description,
        path: std::ops::Range<usize>,
    ) {
        let names = || found.maps.iter().map(|map| map.name.as_str());
        for (map, (access, _)) in &object.maps {
            let way = below(name, &["maps".into(), map.as_str().into()]);
            let Some(found) = found.maps.iter().find(|found| found.name == map.as_str()) else {
                let help = did_you_mean(map.as_str(), names()).unwrap_or_else(|| has("maps", names()));
                self.error(self.places.key(&way), format!("object {name} has no map {map}"), Some(help));
                continue;
            };
            if *access == Access::Frozen && inspect::map_type_name(found.create.map_type) == "ringbuf" {
                let why = "the reader of a ring buffer has to write its read position, which nobody can once it is frozen";
                self.error(self.places.value(&way), why, Some("write \"read-write\"".to_owned()));
            }
        }
        let mut bytes: u64 = 0;
        for map in &found.maps {
            // Every CPU of the machine that it runs on counts; here it is known of one that there must be.
            match inspect::check_map(&map.create, 1) {
                Ok(more) => bytes = bytes.saturating_add(more),
                Err(refusal) => self.error(path.clone(), refusal.why, None),
            }
        }
        let limits = self.policy.limits;
        let count = found.maps.len();
        if count > limits.maps as usize {
            let why = format!(
                "object {name} has {count} maps, data sections included; this limit is {}",
                limits.maps
            );
            self.error(self.places.value(&["limits".into(), "maps".into()]), why, None);
        }
        if bytes > limits.map_memory {
            let why = format!(
                "the maps of object {name} take {bytes} bytes or more; this limit is {}",
                limits.map_memory
            );
            self.error(self.places.value(&["limits".into(), "map_memory".into()]), why, None);
        }
    }

    fn global(
        &mut self,
        (object, name): (&ObjectName, &GlobalName),
        range: &Range,
        (key, value): (std::ops::Range<usize>, std::ops::Range<usize>),
        variables: &[Variable],
    ) {
        let of_name = || variables.iter().filter(|variable| variable.name == name.as_str());
        let Some(variable) = of_name().find(|variable| variable.is_read_only()) else {
            let (why, help) = if variables.is_empty() {
                let help = "compile it with -g".to_owned();
                (format!("object {object} has no type information, so no variable is known"), help)
            } else if let Some(other) = of_name().next() {
                let help = "declare it `volatile const`, which puts it in .rodata".to_owned();
                (
                    format!(
                        "global {name} is in {}: programs may change it, so nobody can set it",
                        other.section
                    ),
                    help,
                )
            } else {
                let names = || variables.iter().filter(|v| v.is_read_only()).map(|v| v.name.as_str());
                let help =
                    did_you_mean(name.as_str(), names()).unwrap_or_else(|| has(".rodata variables", names()));
                (format!("object {object} has no global {name}"), help)
            };
            self.error(key, why, Some(help));
            return;
        };
        let fits = |value: i64| inspect::check_global(name, u64::from(variable.size), value.into());
        if let Err(refusal) = fits(range.min).and(fits(range.max)) {
            let help = variable.bounds().map(|(min, max)| format!("it holds {min} to {max}"));
            self.error(value, refusal.why, help);
        } else if let Some((min, max)) = variable.bounds()
            && (range.min < min || range.max > max)
        {
            let signed = if variable.shape == Shape::Signed { "signed" } else { "unsigned" };
            let why =
                format!("global {name} is {signed}: it holds {min} to {max}, other values turn into those");
            self.warning(value, why, None);
        }
    }
}

/// The way to something of an object.
fn below<'a>(name: &'a ObjectName, rest: &[Step<'a>]) -> Vec<Step<'a>> {
    [&[Step::Key("objects"), Step::Key(name.as_str())], rest].concat()
}

/// What there is, when nothing there is like what was written.
fn has<'n>(what: &str, names: impl Iterator<Item = &'n str>) -> String {
    let names: Vec<&str> = names.collect();
    if names.is_empty() {
        format!("it has no {what}")
    } else {
        format!("its {what} are {}", names.join(", "))
    }
}
