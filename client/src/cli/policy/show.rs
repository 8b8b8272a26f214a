//! `bpfgate policy show`: what a policy means, with what it does not say.

use super::super::Outcome;
use super::super::failure::Failure;
use super::super::output::{self, Style, Table};
use super::places::{Places, Step};
use super::{Source, app_of, file_of, invalid};
use bpfgate_client::hex;
use bpfgate_protocol::functions::{self, Function};
use bpfgate_protocol::names::{EventName, ObjectName};
use bpfgate_protocol::policy::report::position;
use bpfgate_protocol::policy::{
    Access, Client, Hook, Limits, Object, Order, Policy, ProgramRule, Range, Require, Right, Sandboxing,
    UnitCheck, XdpMode, capabilities, file,
};
use bpfgate_systemd::units::{Layout, drop_in};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Shows a policy with its defaults and the capabilities it needs, or the drop-in that it leads to; 4 if it is invalid.
pub(super) fn run(policy: &str, unit: bool, style: Style) -> Outcome {
    let path = path(policy)?;
    let source = match Source::read(&path) {
        Ok(source) => source,
        Err(error) => return Ok(invalid(&error)),
    };
    if unit {
        let app = match app_of(&path) {
            Ok(app) => app,
            Err(error) => return Ok(invalid(&error)),
        };
        let text = drop_in(&app, &source.policy, &Layout::here());
        let text = text.map_err(|why| Failure::Failed(format!("{}: {why}", path.display())))?;
        match style {
            Style::Table => output::print(&output::clean_lines(&text))?,
            Style::Json => output::print_json(&json!({"app": app, "drop_in": text}))?,
        }
        return Ok(ExitCode::SUCCESS);
    }
    match style {
        Style::Json => output::print_json(&as_json(&source))?,
        Style::Table => print_tables(&source)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// A file, or the installed policy of an app.
pub(in crate::cli) fn path(policy: &str) -> Result<PathBuf, Failure> {
    let is_file = policy.contains('/') || Path::new(policy).extension().is_some_and(|end| end == "toml");
    if is_file {
        return Ok(policy.into());
    }
    let app = policy.parse().map_err(|error| Failure::Usage(format!("{error}")))?;
    let none = || {
        let directories = file::DIRECTORIES.join(" or ");
        Failure::Failed(format!("there is no policy of app {app} in {directories}; a file is written ./FILE"))
    };
    file_of(&app, None).ok_or_else(none)
}

/// A value that the whole app has: its key in the file, what it is, and the line that says so.
struct Setting {
    key: &'static str,
    way: Vec<Step<'static>>,
    value: Value,
}

fn settings(policy: &Policy) -> Vec<Setting> {
    // Every field, so that a new one is not forgotten.
    let Policy { file: _, digest: _, description, clients: _, objects: _, limits, keep, netns, require } =
        policy;
    let Limits { programs, maps, links, instructions, map_memory, connections, loads_per_minute } = *limits;
    let Require { sandbox, unit_check, kernel, landlock, btf, line: _ } = *require;
    let setting = |table: &'static str, key: &'static str, value: Value| {
        let way = [table, key].into_iter().filter(|step| !step.is_empty()).map(Step::Key).collect();
        Setting { key, way, value }
    };
    let limit = |key, bound: u64| setting("limits", key, bound.into());
    let demand = |key, value: Value| setting("require", key, value);
    let kernel = kernel.map(|(major, minor)| format!("{major}.{minor}"));
    vec![
        setting("", "description", description.as_str().into()),
        setting("", "netns", netns.as_ref().map_or(Value::Null, |path| path.as_str().into())),
        setting("lifetime", "keep", keep.to_string().into()),
        demand("sandbox", Sandboxing::WORDS[sandbox as usize].0.into()),
        demand("unit_check", UnitCheck::WORDS[unit_check as usize].0.into()),
        demand("kernel", kernel.into()),
        demand("landlock", landlock.into()),
        demand("btf", btf.into()),
        limit("programs", programs.into()),
        limit("maps", maps.into()),
        limit("links", links.into()),
        limit("instructions", instructions.into()),
        limit("map_memory", map_memory),
        limit("connections", connections.into()),
        limit("loads_per_minute", loads_per_minute.into()),
    ]
}

fn print_tables(source: &Source) -> Result<(), Failure> {
    let (policy, places) = (&source.policy, Places::of(&source.text));
    let mut table = Table::new(["POLICY", "VALUE", "SAID IN"]);
    table.row([&"file", &policy.file, &""]);
    for setting in settings(policy) {
        let line = if places.has(&setting.way) {
            format!("line {}", position(&source.text, places.key(&setting.way).start).0)
        } else {
            "default".to_owned()
        };
        table.row([&setting.key, &shown(&setting.value), &line]);
    }
    output::print(&table)?;
    let mut table = Table::new(["CLIENT", "MAY", "MAPS", "BY PROXY", "LINE"]);
    for client in &policy.clients {
        let maps = client.maps.as_ref().map_or_else(|| "all (default)".to_owned(), list);
        table.row([&who(client), &list(&client.may), &maps, &list(&client.proxy), &client.line]);
    }
    output::print(&format_args!("\n{table}"))?;
    let mut objects = Table::new(["OBJECT", "PATH", "SHA256", "LINE"]);
    let mut programs = Table::new(["OBJECT", "PROGRAM", "HOOK", "TARGETS", "FDS", "LINE"]);
    let mut rest = Table::new(["OBJECT", "WHAT", "NAME", "VALUE", "LINE"]);
    for (name, object) in &policy.objects {
        // Every field, so that a new one is not forgotten.
        let Object { line, path, sha256, programs: rules, maps, globals, functions } = object;
        let digest = sha256.map_or_else(|| "none (default)".to_owned(), |digest| hex::encode(&digest));
        objects.row([&name, &path, &digest, line]);
        for rule in rules {
            let kind = rule.hook.kind();
            let targets = targets(&rule.hook).join(" ");
            programs.row([&name, &rule.program, &kind, &targets, &fds(rule).join(" "), &rule.line]);
        }
        for (map, (access, line)) in maps {
            rest.row([&name, &"map", &map, &Access::WORDS[*access as usize].0, line]);
        }
        for (global, Range { min, max, line }) in globals {
            rest.row([&name, &"global", &global, &format_args!("{min} to {max}"), line]);
        }
        for function in functions {
            let what = match function {
                Function::Helper(_) => "function",
                Function::Kernel(_) => "kfunc",
            };
            rest.row([&name, &what, function, &"allowed", &""]);
        }
    }
    output::print(&format_args!("\n{objects}\n{programs}\n{rest}"))?;
    let mut table = Table::new(["CAPABILITY", "NEEDED TO", "LINE"]);
    for need in capabilities(policy) {
        table.row([&need.capability, &need.reason, &need.line]);
    }
    output::print(&format_args!("\n{table}"))?;
    Ok(())
}

fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

fn list<T: std::fmt::Display>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(" ")
}

fn who(client: &Client) -> String {
    // Every field, so that a new condition is not forgotten.
    let Client { line: _, user, group, unit, may: _, maps: _, proxy: _ } = client;
    let unit = unit.as_ref().map(|unit| format!("unit {unit}"));
    let conditions = [user.map(|id| format!("uid {id}")), group.map(|id| format!("gid {id}")), unit];
    conditions.into_iter().flatten().collect::<Vec<_>>().join(" and ")
}

fn as_json(source: &Source) -> Value {
    let (policy, places) = (&source.policy, Places::of(&source.text));
    let clients: Vec<Value> = policy
        .clients
        .iter()
        .map(|client| {
            let may: Vec<String> = client.may.iter().map(Right::to_string).collect();
            json!({"who": who(client), "may": may, "maps": client.maps, "proxy": client.proxy, "line": client.line})
        })
        .collect();
    let needs: Vec<Value> = capabilities(policy)
        .iter()
        .map(|need| json!({"capability": need.capability.name(), "reason": need.reason, "line": need.line}))
        .collect();
    let mut value = json!({
        "file": policy.file,
        "clients": clients,
        "objects": policy.objects.iter().map(object).collect::<Vec<_>>(),
        "capabilities": needs,
        "limits": {},
    });
    let mut defaults = Vec::new();
    for Setting { key, way, value: setting } in settings(policy) {
        if !places.has(&way) {
            defaults.push(key);
        }
        match way.first() {
            Some(Step::Key("limits")) => value["limits"][key] = setting,
            _ => value[key] = setting,
        }
    }
    value["defaults"] = defaults.into();
    value
}

fn object((name, object): (&ObjectName, &Object)) -> Value {
    let programs: Vec<Value> = object
        .programs
        .iter()
        .map(|rule| {
            json!({
                "program": rule.program,
                "hook": rule.hook.kind().row().key,
                "targets": targets(&rule.hook),
                "fds": fds(rule),
                "line": rule.line,
            })
        })
        .collect();
    let maps: Vec<Value> = object
        .maps
        .iter()
        .map(|(name, (access, line))| json!({"name": name, "access": access.to_string(), "line": line}))
        .collect();
    let globals: Vec<Value> = object
        .globals
        .iter()
        .map(|(name, range)| json!({"name": name, "min": range.min, "max": range.max, "line": range.line}))
        .collect();
    let helpers = object.functions.iter().filter_map(|function| match function {
        Function::Helper(id) => functions::name(*id),
        Function::Kernel(_) => None,
    });
    let kfuncs = object.functions.iter().filter_map(|function| match function {
        Function::Kernel(name) => Some(name.as_str()),
        Function::Helper(_) => None,
    });
    json!({
        "name": name,
        "path": object.path,
        "digest": object.sha256.is_some(),
        "sha256": object.sha256.map(|digest| hex::encode(&digest)),
        "programs": programs,
        "maps": maps,
        "globals": globals,
        "helpers": helpers.collect::<Vec<_>>(),
        "kfuncs": kfuncs.collect::<Vec<_>>(),
        "line": object.line,
    })
}

fn fds(rule: &ProgramRule) -> Vec<&'static str> {
    let fds = [(rule.program_fd, "program"), (rule.link_fd, "link")];
    fds.iter().filter(|fd| fd.0).map(|fd| fd.1).collect()
}

fn targets(hook: &Hook) -> Vec<String> {
    let strings = |items: &[EventName]| items.iter().map(ToString::to_string).collect();
    match hook {
        Hook::Xdp { interfaces, mode } => {
            let mode = if *mode == XdpMode::Any { String::new() } else { format!(" ({mode})") };
            interfaces.iter().map(|interface| format!("{interface}{mode}")).collect()
        }
        Hook::Tcx { interfaces, direction, order } => {
            let order = if *order == Order::First { ", first" } else { "" };
            let way = format!(" ({direction}{order})");
            interfaces.iter().map(|interface| format!("{interface}{way}")).collect()
        }
        Hook::CgroupSkb { cgroups, own, direction } => {
            let all = cgroups.iter().map(ToString::to_string).chain(own.then(|| "own".to_owned()));
            all.map(|cgroup| format!("{cgroup} ({direction})")).collect()
        }
        Hook::RawTracepoint { events } | Hook::Tracepoint { events } => strings(events),
        Hook::Uprobe { binary, symbols, at_return } => {
            let when = if *at_return { " (return)" } else { "" };
            symbols.iter().map(|symbol| format!("{binary}:{symbol}{when}")).collect()
        }
        Hook::SocketFilter => Vec::new(),
        Hook::Fentry { function } | Hook::Fexit { function } => vec![function.to_string()],
        Hook::Kprobe { functions, at_return } => {
            let when = if *at_return { " (return)" } else { "" };
            functions.iter().map(|function| format!("{function}{when}")).collect()
        }
    }
}
