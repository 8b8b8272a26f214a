//! `bpfgate policy new`: a first policy for an object, with everything that has to be decided, and nobody let in yet.

use super::super::Outcome;
use super::super::args::NewArgs;
use super::super::failure::Failure;
use super::super::output;
use super::objects::{self, Undescribed};
use bpfgate_client::{cpus, hex};
use bpfgate_protocol::description::{Description, Map, Program, Shape};
use bpfgate_protocol::functions::Function;
use bpfgate_protocol::hooks::{Capability, Kind, ROWS};
use bpfgate_protocol::inspect::{self, map_type_name};
use bpfgate_protocol::names::{
    AbsolutePath, AppName, FunctionName, GlobalName, MapName, ObjectName, Pattern, ProgramName, SymbolName,
};
use bpfgate_protocol::policy::Limits;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;

/// Begins the comment on a value that only the author of the policy knows.
const GAP: &str = " # FILL IN: ";

/// Prints a draft; it is refused until its gaps are filled.
pub(super) fn run(args: &NewArgs) -> Outcome {
    let object = Facts::of(args)?;
    output::print(&object.draft(args))?;
    Ok(ExitCode::SUCCESS)
}

/// What is known of the object.
struct Facts {
    app: AppName,
    name: ObjectName,
    path: AbsolutePath,
    digest: [u8; 32],
    found: Description,
    /// The memory of its maps here, in bytes.
    memory: u64,
}

impl Facts {
    fn of(args: &NewArgs) -> Result<Self, Failure> {
        let failed = |why: String| Failure::Failed(format!("{}: {why}", args.from_object.display()));
        let bytes = objects::read(&args.from_object).map_err(|why| failed(format!("it {why}")))?;
        let path = std::fs::canonicalize(&args.from_object)?;
        let path = path.to_str().unwrap_or_default().parse().map_err(|error| failed(format!("{error}")))?;
        let found = match objects::describe(&bytes) {
            Ok(found) => found,
            Err(Undescribed::NoLoader(why) | Undescribed::Broken(why)) => return Err(failed(why)),
        };
        if let Some(wish) = &found.wish {
            return Err(failed(format!("no policy can allow this object: {wish}")));
        }
        let cpus = u32::try_from(cpus::possible()?).unwrap_or(u32::MAX);
        let mut memory: u64 = 0;
        for map in &found.maps {
            let bytes = inspect::check_map(&map.create, cpus);
            let bytes = bytes
                .map_err(|refusal| failed(format!("no policy can allow this object: {}", refusal.why)))?;
            memory = memory.saturating_add(bytes);
        }
        let name = object_name(&args.from_object).or_else(|| "object".parse().ok());
        let name = name.ok_or_else(|| failed("its name cannot be that of an object".to_owned()))?;
        for interface in &args.interface {
            interface.parse::<Pattern>().map_err(|error| Failure::Usage(format!("--interface: {error}")))?;
        }
        if let Some(user) = args.user.as_deref().filter(|user| user.parse::<u32>().is_err()) {
            super::who::People::read()?
                .user_id(user)
                .map_err(|why| Failure::Usage(format!("--user: {why}")))?;
        }
        let app = args.app.clone().unwrap_or_else(|| name.as_str().replace('_', "-"));
        let app = app.parse().map_err(|error| Failure::Usage(format!("--app: {error}")))?;
        Ok(Self { app, name, path, digest: Sha256::digest(&bytes).into(), found, memory })
    }

    fn draft(&self, args: &NewArgs) -> String {
        let mut text = String::new();
        // On top: a file that is cut off must not have the defaults instead.
        self.add_bounds(&mut text);
        add_client(&mut text, args.user.as_deref());
        let name = &self.name;
        let _ = write!(
            text,
            "\n# What: this file, with these bytes. Another build has another digest; `bpfgate policy pin` writes it here.\n\
             [objects.{name}]\nsha256 = \"{}\"\npath = {}\n",
            hex::encode(&self.digest),
            quoted(self.path.as_str())
        );
        self.add_programs(&mut text, &args.interface);
        self.add_maps(&mut text);
        self.add_globals(&mut text);
        self.add_functions(&mut text);
        let gaps =
            if text.contains(GAP) { ", and it is refused until what says FILL IN is filled in" } else { "" };
        let open = if args.user.is_some() { "" } else { ": nobody is let in yet" };
        self.head(&format!("A draft{open}{gaps}.")) + &text
    }

    fn head(&self, state: &str) -> String {
        let app = &self.app;
        let mut text = format!(
            "# Policy of the app {app}: who may load and attach what, and who gets which map.\n\
             # {state}\n\
             #\n\
             #   bpfgate policy check {app}.toml       shows what is missing or wrong\n\
             #   bpfgate policy explain --file {app}.toml --as USER load {}\n\
             #                                         shows what somebody may do, and why\n\
             #   sudo install -m 0644 {app}.toml /etc/bpfgate/policies/\n\
             #   sudo bpfgate policy apply             puts it into force\n\
             #\n\
             # The name of the file is the name of the app.\n",
            self.name
        );
        let mut needs: BTreeMap<Capability, BTreeSet<&str>> = BTreeMap::new();
        for row in self.programs().filter_map(|(_, kind)| Some(kind?.row())) {
            for capability in [Capability::Bpf].iter().chain(row.load).chain(row.attach) {
                needs.entry(*capability).or_default().insert(row.key);
            }
        }
        text += "# The helper of this app, and nobody else, will hold:\n";
        for (capability, kinds) in needs {
            let kinds = kinds.into_iter().collect::<Vec<_>>().join(", ");
            let _ = writeln!(text, "#   {capability}  for programs of type {kinds}");
        }
        text + "version = 1\ndescription = \"\" # for people\n"
    }

    /// The programs that a policy can name, each with its hook.
    fn programs(&self) -> impl Iterator<Item = (&Program, Option<Kind>)> {
        let named = self.found.programs.iter().filter(|program| program.name.parse::<ProgramName>().is_ok());
        named.map(|program| (program, kind(program).filter(|_| program.refused.is_none())))
    }

    fn add_programs(&self, text: &mut String, interfaces: &[String]) {
        *text += "\n# Where each program may run. A program without an entry is not loaded: take out what is not needed.\n\
                  # program_fd = true or link_fd = true in an entry hands its descriptor to the client, which is power\n\
                  # beyond this policy: read about it in the policy reference first.\n";
        for (program, kind) in self.programs() {
            let section = output::clean(&program.section);
            let Some(kind) = kind else {
                let why = program.refused.as_ref();
                let why =
                    why.map_or("there is no hook for programs like it".to_owned(), |why| output::clean(why));
                let _ = writeln!(text, "\n# {} (section {section}): {why}.", program.name);
                continue;
            };
            let key = kind.row().key;
            let _ = writeln!(
                text,
                "\n[[objects.{}.{key}]] # section {section}\nprogram = \"{}\"",
                self.name, program.name
            );
            add_targets(text, kind, &program.section, interfaces);
        }
    }

    fn add_maps(&self, text: &mut String) {
        let is_open = |map: &&Map| map.name.parse::<MapName>().is_ok() && !map.name.starts_with(".rodata");
        let maps: Vec<&Map> = self.found.maps.iter().filter(is_open).collect();
        if maps.is_empty() {
            return;
        }
        let _ = write!(
            text,
            "\n# What clients get of each map:\n\
             #   \"none\"        nothing\n\
             #   \"proxy\"       no descriptor; the broker reads entries for it\n\
             #   \"frozen\"      a descriptor to read with; nobody but the programs can write any more\n\
             #   \"read-write\"  a descriptor with every right over the map\n\
             [objects.{}.maps]\n",
            self.name
        );
        for map in maps {
            let create = &map.create;
            let kind = map_type_name(create.map_type);
            let shape = match kind.as_str() {
                "ringbuf" => {
                    format!("ringbuf, {} bytes; its reader needs \"read-write\"", create.max_entries)
                }
                _ => format!(
                    "{kind}, keys of {} bytes, values of {}, {} entries",
                    create.key_size, create.value_size, create.max_entries
                ),
            };
            let name = if map.name.starts_with('.') { quoted(&map.name) } else { map.name.clone() };
            let _ = writeln!(text, "{name} = \"none\" # {shape}");
        }
    }

    fn add_globals(&self, text: &mut String) {
        let settable = self.found.variables.iter().filter_map(|variable| {
            let bounds = variable.bounds().filter(|_| variable.is_read_only())?;
            Some((variable, variable.name.parse::<GlobalName>().ok()?, bounds))
        });
        let settable: Vec<_> = settable.collect();
        if settable.is_empty() {
            return;
        }
        let _ = write!(
            text,
            "\n# Constants that a client may set before a load, each in its range. Without a line here one keeps its value.\n\
             [objects.{}.globals]\n",
            self.name
        );
        for (variable, name, (min, max)) in settable {
            let signed = if variable.shape == Shape::Signed { "signed" } else { "unsigned" };
            let _ = writeln!(
                text,
                "# {name} = {{ min = {min}, max = {max} }} # {} bytes, {signed}",
                variable.size
            );
        }
    }

    fn add_functions(&self, text: &mut String) {
        let called =
            self.programs().filter(|(_, kind)| kind.is_some()).flat_map(|(program, _)| &program.functions);
        let granted: BTreeMap<&Function, &str> =
            called.filter_map(|function| Some((function, function.needs_grant()?))).collect();
        if granted.is_empty() {
            return;
        }
        let _ = write!(
            text,
            "\n# Its programs call functions that act beyond their own data. Without this grant they are not loaded:\n\
             # take the # off if that is what they are meant to do.\n"
        );
        for (function, what) in &granted {
            let _ = writeln!(text, "#   {function} {what}");
        }
        let _ = writeln!(text, "[objects.{}.helpers]", self.name);
        for key in ["allow", "kfuncs"] {
            let of_key = granted.keys().filter(|function| function.key() == key);
            let names = of_key.map(|function| format!("\"{function}\"")).collect::<Vec<_>>().join(", ");
            if !names.is_empty() {
                let _ = writeln!(text, "# {key} = [{names}]");
            }
        }
    }

    fn add_bounds(&self, text: &mut String) {
        let defaults = Limits::default();
        let programs = self.programs().filter(|(_, kind)| kind.is_some()).count().max(1);
        let _ = write!(
            text,
            "\n# How much, over all sessions at a time. Here: one load of the object. What is left out has its default.\n\
             [limits]\nprograms = {programs}\nmaps = {} # data sections included\n\
             links = {} # attachments\n",
            self.found.maps.len().max(1),
            defaults.links
        );
        let memory = self.memory.div_ceil(1 << 20).max(1);
        let default = defaults.map_memory >> 20;
        let _ = writeln!(
            text,
            "map_memory = \"{}MiB\" # its maps take {} bytes on this machine",
            default.max(memory),
            self.memory
        );
        let _ = write!(
            text,
            "connections = {}\nloads_per_minute = {}\n\n\
             # How long what was loaded stays.\n\
             #   \"session\"  until the connection that loaded it ends\n\
             #   \"app\"      until it is unloaded\n\
             #   \"boot\"     always: the helper loads and attaches everything by itself; clients may have \"maps\" only\n\
             [lifetime]\nkeep = \"session\"\n\n\
             # How confined the helper must be: \"full\" (seccomp and landlock), or \"seccomp\" for kernels without landlock.\n\
             # What is missing refuses; other demands are kernel = \"6.6\", landlock = 3 (its ABI) and btf = true.\n\
             [require]\nsandbox = \"full\"\n",
            defaults.connections, defaults.loads_per_minute
        );
    }
}

fn add_client(text: &mut String, user: Option<&str>) {
    *text += "\n# Who. One entry for each role; all conditions of an entry must hold, and somebody has the rights of every\n\
              # entry that is for them. Nobody else may do anything, not even root.\n\
              #   user, group   a name of /etc/passwd or /etc/group, or a number\n\
              #   unit          a system service, such as \"flowmon.service\"\n\
              #   maps          the maps that \"maps\" is for; left out: all that are handed out below\n\
              #   may           \"load\", \"attach\", \"maps\" (get or read maps); less is fine; the last key of its entry\n";
    match user {
        Some(user) => {
            let user = if user.parse::<u32>().is_ok() { user.to_owned() } else { quoted(user) };
            let _ = write!(text, "[[client]]\nuser = {user}\nmay = [\"load\", \"attach\", \"maps\"]\n");
        }
        None => {
            *text += "# [[client]]\n# user = \"...\"\n# may = [\"load\", \"attach\", \"maps\"]\n";
        }
    }
}

/// The hook for a program of this type and section.
fn kind(program: &Program) -> Option<Kind> {
    let section = program.section.trim_start_matches('?');
    // Several hooks have one type.
    let fits = |kind| match kind {
        Kind::Uprobe => section.starts_with('u'),
        Kind::Kprobe => section.starts_with("kprobe") || section.starts_with("kretprobe"),
        Kind::Fentry => section.starts_with("fentry"),
        Kind::Fexit => section.starts_with("fexit"),
        _ => true,
    };
    ROWS.iter().find(|row| row.prog_type == program.prog_type && fits(row.kind)).map(|row| row.kind)
}

/// The keys of a hook: what the section says, or what has to be filled in.
fn add_targets(text: &mut String, kind: Kind, section: &str, interfaces: &[String]) {
    let names = section.split_once('/').map(|(_, rest)| rest);
    match kind {
        Kind::Xdp | Kind::Tcx => {
            add_list(text, "interfaces", interfaces, "such as [\"eth0\", \"lan*\"]; * and ? are special");
        }
        Kind::CgroupSkb => {
            let hint = "\"own\" for that of the client's unit, or directories, such as [\"/sys/fs/cgroup/system.slice\"]";
            add_list(text, "cgroups", &[], hint);
        }
        Kind::RawTracepoint => {
            let event = objects::event(kind, section);
            add_list(
                text,
                "events",
                event.as_ref().map(ToString::to_string).as_slice(),
                "names without a category, such as [\"sched_process_exit\"]",
            );
        }
        Kind::Tracepoint => {
            let event = objects::event(kind, section);
            add_list(
                text,
                "events",
                event.as_ref().map(ToString::to_string).as_slice(),
                "\"category:name\", such as [\"sched:sched_process_exec\"]",
            );
        }
        Kind::Uprobe => {
            let (binary, symbol) = names.and_then(|names| names.rsplit_once(':')).unwrap_or_default();
            let binary: Option<AbsolutePath> = binary.parse().ok();
            let symbol: Option<SymbolName> = symbol.parse().ok();
            let symbol = symbol.map(|symbol| symbol.to_string());
            add_list(text, "symbols", symbol.as_slice(), "functions, such as [\"readline\"]");
            let _ = match binary {
                Some(binary) => writeln!(text, "binary = {}", quoted(binary.as_str())),
                None => {
                    writeln!(text, "binary = \"\"{GAP}a program or library, such as \"/bin/bash\"")
                }
            };
            let at_return = section.trim_start_matches('?').starts_with("uret");
            let _ = writeln!(
                text,
                "return = {at_return} # true: when the function returns; false: when it is called"
            );
        }
        Kind::Fentry | Kind::Fexit => {
            let function = names.and_then(|name| name.parse::<FunctionName>().ok());
            let _ = match function {
                Some(function) => writeln!(text, "function = \"{function}\""),
                None => {
                    writeln!(text, "function = \"\"{GAP}a function of the kernel, such as \"cap_capable\"")
                }
            };
        }
        Kind::Kprobe => {
            let function =
                names.and_then(|name| name.parse::<FunctionName>().ok()).map(|name| name.to_string());
            add_list(
                text,
                "functions",
                function.as_slice(),
                "functions of the kernel, such as [\"cap_capable\"]",
            );
            let at_return = section.trim_start_matches('?').starts_with("kret");
            let _ = writeln!(
                text,
                "return = {at_return} # true: when the function returns; false: when it is called"
            );
        }
        Kind::SocketFilter => {
            *text += "program_fd = false # true: the client gets the program, for sockets of its own; it is of no use otherwise\n";
        }
    }
    if matches!(kind, Kind::Tcx | Kind::CgroupSkb) {
        let direction = ["ingress", "egress"].into_iter().find(|word| section.ends_with(word));
        let _ = match direction {
            Some(direction) => writeln!(text, "direction = \"{direction}\" # \"ingress\" or \"egress\""),
            None => writeln!(text, "direction = \"\"{GAP}\"ingress\" or \"egress\""),
        };
    }
    if kind == Kind::Tcx {
        *text += "order = \"last\" # \"first\": before what is attached there already; \"last\": after it\n";
    }
    if kind == Kind::Xdp {
        *text += "mode = \"any\" # \"native\": in the driver or not at all; \"generic\": never there; \"any\": there if it can\n";
    }
}

/// A list that is known, or has to be filled in.
fn add_list(text: &mut String, key: &str, values: &[String], hint: &str) {
    let values = values.iter().map(|value| quoted(value)).collect::<Vec<_>>().join(", ");
    let hint = if values.is_empty() { format!("{GAP}{hint}") } else { String::new() };
    let _ = writeln!(text, "{key} = [{values}]{hint}");
}

/// What clients call the object: the name of its file, as far as it can be one.
fn object_name(path: &Path) -> Option<ObjectName> {
    let file = path.file_name()?.to_str()?.to_ascii_lowercase();
    let stem = file.split('.').next()?;
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
    stem.chars().map(plain).take(32).collect::<String>().parse().ok()
}

/// A text as TOML writes it.
fn quoted(text: &str) -> String {
    toml_edit::Value::from(text).to_string()
}
