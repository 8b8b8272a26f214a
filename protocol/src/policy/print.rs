//! A policy as the text of a file again.
//!
//! Every default is written out and every name is a number, so that the text means the same on another machine, and
//! with another version of bpfgate. What narrows stands above what it narrows (`[limits]` above everything, the
//! conditions of a client above `may`): such a text allows no more than the whole, wherever it is cut off.

use super::{
    Client, Hook, Limits, OWN_CGROUP, Object, Policy, ProgramRule, Range, Require, Right, Unit, VERSION,
};
use crate::functions::Function;
use crate::hex;
use crate::names::{AbsolutePath, ObjectName};
use std::fmt::{self, Display, Formatter};

/// Displays as the text of a policy file; [`Policy::toml`] makes it.
#[derive(Debug, Clone, Copy)]
pub struct Toml<'a>(&'a Policy);

impl Policy {
    /// The text of a file that means the same.
    pub fn toml(&self) -> Toml<'_> {
        Toml(self)
    }
}

impl Display for Toml<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        // Whoever adds a field is told here to print it.
        let Policy { file: _, digest: _, description, clients, objects, limits, keep, netns, require } =
            self.0;
        writeln!(f, "version = {VERSION}")?;
        writeln!(f, "description = {}", Quoted(description))?;
        if let Some(netns) = netns {
            writeln!(f, "netns = {}", Quoted(netns.as_str()))?;
        }
        print_require(require, f)?;
        print_limits(limits, f)?;
        writeln!(f, "\n[lifetime]\nkeep = {}", Quoted(&keep.to_string()))?;
        for client in clients {
            print_client(client, f)?;
        }
        for (name, object) in objects {
            print_object(name, object, f)?;
        }
        Ok(())
    }
}

fn print_require(require: &Require, f: &mut Formatter<'_>) -> fmt::Result {
    let Require { sandbox, unit_check, kernel, landlock, btf, line: _ } = require;
    writeln!(f, "\n[require]\nsandbox = {}", word(sandbox))?;
    writeln!(f, "unit_check = {}", word(unit_check))?;
    if let Some((major, minor)) = kernel {
        writeln!(f, "kernel = \"{major}.{minor}\"")?;
    }
    if let Some(abi) = landlock {
        writeln!(f, "landlock = {abi}")?;
    }
    writeln!(f, "btf = {btf}")
}

fn print_limits(limits: &Limits, f: &mut Formatter<'_>) -> fmt::Result {
    let Limits { programs, maps, links, instructions, map_memory, connections, loads_per_minute } = limits;
    writeln!(f, "\n[limits]\nprograms = {programs}\nmaps = {maps}\nlinks = {links}")?;
    writeln!(f, "instructions = {instructions}\nmap_memory = {}", size(*map_memory))?;
    writeln!(f, "connections = {connections}\nloads_per_minute = {loads_per_minute}")
}

/// In the largest unit that it is a multiple of.
fn size(bytes: u64) -> String {
    let unit = [("GiB", 30), ("MiB", 20), ("KiB", 10)]
        .into_iter()
        .find(|(_, shift)| bytes.is_multiple_of(1 << shift));
    match unit {
        Some((unit, shift)) => format!("\"{}{unit}\"", bytes >> shift),
        None => bytes.to_string(),
    }
}

fn print_client(client: &Client, f: &mut Formatter<'_>) -> fmt::Result {
    let Client { line: _, user, group, unit, may, maps, proxy } = client;
    writeln!(f, "\n[[client]]")?;
    for (key, id) in [("user", user), ("group", group)] {
        if let Some(id) = id {
            writeln!(f, "{key} = {id}")?;
        }
    }
    if let Some(Unit { name, slice }) = unit {
        writeln!(f, "unit = {}\nslice = {}", Quoted(name.as_str()), Quoted(slice.as_str()))?;
    }
    if let Some(maps) = maps {
        writeln!(f, "maps = {}", list(maps))?;
    }
    if !proxy.is_empty() {
        writeln!(f, "proxy = {}", list(proxy))?;
    }
    writeln!(f, "may = {}", list(may.iter().map(Right::to_string)))
}

fn print_object(name: &ObjectName, object: &Object, f: &mut Formatter<'_>) -> fmt::Result {
    let Object { line: _, path, sha256, programs, maps, globals, functions } = object;
    writeln!(f, "\n[objects.{name}]\npath = {}", Quoted(path.as_str()))?;
    if let Some(sha256) = sha256 {
        writeln!(f, "sha256 = {}", Quoted(&hex::encode(sha256)))?;
    }
    for rule in programs {
        print_rule(name, rule, f)?;
    }
    if !maps.is_empty() {
        writeln!(f, "\n[objects.{name}.maps]")?;
        for (map, (access, _)) in maps {
            writeln!(f, "{} = {}", Quoted(map.as_str()), word(access))?;
        }
    }
    if !globals.is_empty() {
        writeln!(f, "\n[objects.{name}.globals]")?;
        for (global, Range { min, max, line: _ }) in globals {
            writeln!(f, "{global} = {{ min = {min}, max = {max} }}")?;
        }
    }
    if !functions.is_empty() {
        let (helpers, kfuncs): (Vec<_>, Vec<_>) =
            functions.iter().partition(|function| matches!(function, Function::Helper(_)));
        let (helpers, kfuncs) = (list(helpers), list(kfuncs));
        writeln!(f, "\n[objects.{name}.helpers]\nallow = {helpers}\nkfuncs = {kfuncs}")?;
    }
    Ok(())
}

fn print_rule(object: &ObjectName, rule: &ProgramRule, f: &mut Formatter<'_>) -> fmt::Result {
    let ProgramRule { line: _, program, hook, program_fd, link_fd } = rule;
    writeln!(f, "\n[[objects.{object}.{}]]\nprogram = \"{program}\"", hook.kind().row().key)?;
    match hook {
        Hook::Xdp { interfaces, mode } => {
            writeln!(f, "mode = {}\ninterfaces = {}", word(mode), list(interfaces))?;
        }
        Hook::Tcx { interfaces, direction, order } => {
            writeln!(f, "direction = {}", word(direction))?;
            writeln!(f, "order = {}\ninterfaces = {}", word(order), list(interfaces))?;
        }
        Hook::CgroupSkb { cgroups, own, direction } => {
            let own = own.then_some(OWN_CGROUP);
            let cgroups = list(cgroups.iter().map(AbsolutePath::as_str).chain(own));
            writeln!(f, "direction = {}\ncgroups = {cgroups}", word(direction))?;
        }
        Hook::RawTracepoint { events } | Hook::Tracepoint { events } => {
            writeln!(f, "events = {}", list(events))?;
        }
        Hook::Uprobe { binary, symbols, at_return } => {
            writeln!(
                f,
                "return = {at_return}\nbinary = {}\nsymbols = {}",
                Quoted(binary.as_str()),
                list(symbols)
            )?;
        }
        Hook::SocketFilter => {}
        Hook::Fentry { function } | Hook::Fexit { function } => {
            writeln!(f, "function = {}", Quoted(function.as_str()))?;
        }
        Hook::Kprobe { functions, at_return } => {
            writeln!(f, "return = {at_return}\nfunctions = {}", list(functions))?;
        }
    }
    writeln!(f, "program_fd = {program_fd}")?;
    match hook {
        // A socket filter has no link of ours, and the reader knows no such key.
        Hook::SocketFilter => Ok(()),
        _ => writeln!(f, "link_fd = {link_fd}"),
    }
}

/// A basic string of TOML.
struct Quoted<'a>(&'a str);

impl Display for Quoted<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("\"")?;
        for c in self.0.chars() {
            match c {
                '"' | '\\' => write!(f, "\\{c}")?,
                c if c.is_control() => write!(f, "\\u{:04X}", u32::from(c))?,
                c => write!(f, "{c}")?,
            }
        }
        f.write_str("\"")
    }
}

fn list<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<String> = items.into_iter().map(|item| Quoted(&item.to_string()).to_string()).collect();
    format!("[{}]", items.join(", "))
}

/// The word that stands for a value.
fn word(value: &impl Display) -> String {
    Quoted(&value.to_string()).to_string()
}
