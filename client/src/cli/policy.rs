//! `bpfgate policy`: reads policy files as broker and helper do, without either of them and without privilege.

use super::Outcome;
use super::failure::{Failure, say};
use super::output::{self, Style, Table};
use bpfgate_protocol::names::AppName;
use bpfgate_protocol::policy::{Hook, Policy, PolicyError, Right, Sandboxing, XdpMode, capabilities, file};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Exit code of an invalid policy.
pub(super) const INVALID: u8 = 4;

/// Checks policy files, all installed ones if none is given; 4 if one is invalid.
pub(crate) fn check(paths: &[PathBuf], style: Style) -> Outcome {
    let installed = paths.is_empty();
    let paths = if installed { installed_files()? } else { paths.to_vec() };
    let mut invalid = 0;
    let mut results = Vec::new();
    for path in &paths {
        // A file that is not installed yet may belong to its author; one that is must be root's.
        let verdict = if installed { file::read_file(path) } else { file::read_untrusted(path) };
        let verdict = verdict.and_then(|policy| named(path).map(|()| policy));
        match verdict {
            Ok(policy) => {
                let trusted = file::open_trusted(path).err();
                if let (Some(why), Style::Table) = (&trusted, style) {
                    say(&format!(
                        "note: {}: where it is now, the broker would not take it: it {why}",
                        path.display()
                    ));
                }
                results
                    .push(json!({"file": policy.file, "valid": true, "would_be_taken": trusted.is_none()}));
            }
            Err(error) => {
                invalid += 1;
                if style == Style::Table {
                    say(&output::clean_lines(&error.to_string()));
                }
                results.push(json!({"file": error.file, "valid": false, "problems": problems(&error)}));
            }
        }
    }
    match style {
        Style::Json => output::print_json(&Value::from(results))?,
        Style::Table => output::print(&format_args!("{} valid, {invalid} invalid\n", paths.len() - invalid))?,
    }
    Ok(ExitCode::from(if invalid == 0 { 0 } else { INVALID }))
}

fn problems(error: &PolicyError) -> Vec<Value> {
    let problem = |(problem, line): (&bpfgate_protocol::policy::report::Problem, String)| json!({"message": problem.message, "help": problem.help, "line": line});
    error.problems.iter().zip(error.lines()).map(problem).collect()
}

/// The name of the file is the name of the app.
fn named(path: &Path) -> Result<(), PolicyError> {
    let app = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".toml"));
    match app.map(str::parse::<AppName>) {
        Some(Ok(_)) => Ok(()),
        Some(Err(why)) => Err(PolicyError::of_file(&path.display().to_string(), why.to_string(), None)),
        None => {
            Err(PolicyError::of_file(&path.display().to_string(), "a policy file is called APP.toml", None))
        }
    }
}

fn installed_files() -> Result<Vec<PathBuf>, Failure> {
    let mut files = Vec::new();
    for directory in file::DIRECTORIES {
        let Ok(entries) = std::fs::read_dir(directory) else { continue };
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "toml") {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

/// Shows a policy with its defaults and the capabilities it needs; 4 if it is invalid.
pub(crate) fn show(path: &Path, style: Style) -> Outcome {
    let policy = match file::read_untrusted(path) {
        Ok(policy) => policy,
        Err(error) => {
            say(&output::clean_lines(&error.to_string()));
            return Ok(ExitCode::from(INVALID));
        }
    };
    match style {
        Style::Json => output::print_json(&as_json(&policy))?,
        Style::Table => print_tables(&policy)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn print_tables(policy: &Policy) -> Result<(), Failure> {
    let value = as_json(policy);
    let mut table = Table::new(["POLICY", ""]);
    table.row([&"file", &policy.file]);
    table.row([&"description", &policy.description]);
    table.row([&"keep", &text(&value["keep"])]);
    if let Value::String(netns) = &value["netns"] {
        table.row([&"netns", netns]);
    }
    table.row([&"sandbox", &text(&value["sandbox"])]);
    if let Value::Object(limits) = &value["limits"] {
        for (limit, bound) in limits {
            table.row([&limit, bound]);
        }
    }
    output::print(&table)?;
    let mut table = Table::new(["CLIENT", "MAY", "MAPS", "LINE"]);
    for client in array(&value["clients"]) {
        let maps = if client["maps"].is_null() { "all".to_owned() } else { list(&client["maps"]) };
        table.row([&text(&client["who"]), &list(&client["may"]), &maps, &client["line"]]);
    }
    output::print(&format_args!("\n{table}"))?;
    let mut table = Table::new(["OBJECT", "PROGRAM", "HOOK", "TARGETS", "FDS", "LINE"]);
    let mut maps = Table::new(["OBJECT", "MAP", "ACCESS"]);
    for object in array(&value["objects"]) {
        for rule in array(&object["programs"]) {
            let (name, hook) = (text(&object["name"]), text(&rule["hook"]));
            table.row([
                &name,
                &text(&rule["program"]),
                &hook,
                &list(&rule["targets"]),
                &list(&rule["fds"]),
                &rule["line"],
            ]);
        }
        for map in array(&object["maps"]) {
            maps.row([&text(&object["name"]), &text(&map["name"]), &text(&map["access"])]);
        }
    }
    output::print(&format_args!("\n{table}\n{maps}"))?;
    let mut table = Table::new(["CAPABILITY", "NEEDED TO", "LINE"]);
    for need in array(&value["capabilities"]) {
        table.row([&text(&need["capability"]), &text(&need["reason"]), &need["line"]]);
    }
    output::print(&format_args!("\n{table}"))?;
    Ok(())
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn list(value: &Value) -> String {
    array(value).iter().map(text).collect::<Vec<_>>().join(" ")
}

fn as_json(policy: &Policy) -> Value {
    let limits = policy.limits;
    let clients: Vec<Value> = policy
        .clients
        .iter()
        .map(|client| {
            let conditions = [
                client.user.map(|id| format!("uid {id}")),
                client.group.map(|id| format!("gid {id}")),
                client.unit.as_ref().map(|unit| format!("unit {unit}")),
            ];
            let who = conditions.into_iter().flatten().collect::<Vec<_>>().join(" and ");
            let may: Vec<String> = client.may.iter().map(Right::to_string).collect();
            json!({"who": who, "may": may, "maps": client.maps, "proxy": client.proxy, "line": client.line})
        })
        .collect();
    let needs: Vec<Value> = capabilities(policy)
        .iter()
        .map(|need| json!({"capability": need.capability.name(), "reason": need.reason, "line": need.line}))
        .collect();
    json!({
        "file": policy.file,
        "description": policy.description,
        "keep": policy.keep.to_string(),
        "netns": policy.netns,
        "sandbox": match policy.require.sandbox { Sandboxing::Full => "full", Sandboxing::Seccomp => "seccomp" },
        "limits": {
            "programs": limits.programs,
            "maps": limits.maps,
            "links": limits.links,
            "instructions": limits.instructions,
            "map_memory": limits.map_memory,
            "connections": limits.connections,
            "loads_per_minute": limits.loads_per_minute,
        },
        "clients": clients,
        "objects": policy.objects.iter().map(object).collect::<Vec<_>>(),
        "capabilities": needs,
    })
}

fn object(
    (name, object): (&bpfgate_protocol::names::ObjectName, &bpfgate_protocol::policy::Object),
) -> Value {
    let programs: Vec<Value> = object
        .programs
        .iter()
        .map(|rule| {
            let fds: Vec<&str> = [(rule.program_fd, "program"), (rule.link_fd, "link")]
                .iter()
                .filter(|fd| fd.0)
                .map(|fd| fd.1)
                .collect();
            json!({
                "program": rule.program,
                "hook": rule.hook.kind().row().key,
                "targets": targets(&rule.hook),
                "fds": fds,
                "line": rule.line,
            })
        })
        .collect();
    let word = |access: bpfgate_protocol::policy::Access| access.interface_word().replace('_', "-");
    let maps: Vec<Value> = object
        .maps
        .iter()
        .map(|(name, (access, line))| json!({"name": name, "access": word(*access), "line": line}))
        .collect();
    let globals: Vec<Value> = object
        .globals
        .iter()
        .map(|(name, range)| json!({"name": name, "min": range.min, "max": range.max, "line": range.line}))
        .collect();
    let functions: Vec<Option<&str>> =
        object.functions.iter().map(|id| bpfgate_protocol::functions::name(*id)).collect();
    json!({
        "name": name,
        "path": object.path,
        "digest": object.sha256.is_some(),
        "programs": programs,
        "maps": maps,
        "globals": globals,
        "helpers": functions,
        "line": object.line,
    })
}

fn targets(hook: &Hook) -> Vec<String> {
    let strings =
        |items: &[bpfgate_protocol::names::EventName]| items.iter().map(ToString::to_string).collect();
    match hook {
        Hook::Xdp { interfaces, mode } => {
            let mode = match mode {
                XdpMode::Native => " (native)",
                XdpMode::Generic => " (generic)",
                XdpMode::Any => "",
            };
            interfaces.iter().map(|interface| format!("{interface}{mode}")).collect()
        }
        Hook::Tcx { interfaces, .. } => interfaces.iter().map(ToString::to_string).collect(),
        Hook::CgroupSkb { cgroups, own, .. } => {
            cgroups.iter().map(ToString::to_string).chain(own.then(|| "own".to_owned())).collect()
        }
        Hook::RawTracepoint { events } | Hook::Tracepoint { events } => strings(events),
        Hook::Uprobe { binary, symbols, .. } => {
            symbols.iter().map(|symbol| format!("{binary}:{symbol}")).collect()
        }
        Hook::SocketFilter => Vec::new(),
    }
}
