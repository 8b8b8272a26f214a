//! `bpfgate list` and `bpfgate show`.

use std::path::Path;
use std::process::ExitCode;

use bpfgate_client::{InstanceId, ListedInstance, MapGrant, Program};
use serde_json::{Value, json};

use super::failure::Failure;
use super::output::{self, Style, Table};
use super::{Outcome, open};

pub(crate) fn list(socket: Option<&Path>, app: &str, style: Style) -> Outcome {
    let instances = open(socket, app)?.list()?;
    match style {
        Style::Json => output::print_json(&instances.iter().map(instance_json).collect())?,
        Style::Table => {
            let mut table = Table::new(["INSTANCE", "OBJECT", "PROGRAMS", "MAPS", "LINKS"]);
            for instance in &instances {
                let (programs, maps) = (instance.programs.len(), instance.maps.len());
                table.row([&instance.id, &instance.object, &programs, &maps, &instance.links.len()]);
            }
            output::print(&table)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn show(socket: Option<&Path>, app: &str, id: InstanceId, style: Style) -> Outcome {
    let instances = open(socket, app)?.list()?;
    let instance = instances
        .iter()
        .find(|instance| instance.id == id)
        .ok_or_else(|| Failure::Failed(format!("{app} has no instance {id}; see bpfgate list {app}")))?;
    if style == Style::Json {
        output::print_json(&instance_json(instance))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut links = Table::new(["LINK", "PROGRAM", "HOOK", "TARGET"]);
    for link in &instance.links {
        links.row([&link.id, &link.program, &link.hook, &link.target]);
    }
    let (programs, maps) = (programs_table(&instance.programs), maps_table(&instance.maps));
    let object = output::clean(&instance.object);
    output::print(&format_args!("instance {id} of object {object}\n\n{programs}\n{maps}\n{links}"))?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn programs_table(programs: &[Program]) -> Table<2> {
    let mut table = Table::new(["PROGRAM", "TYPE"]);
    for program in programs {
        table.row([&program.name, &program.kind]);
    }
    table
}

pub(crate) fn maps_table(maps: &[MapGrant]) -> Table<6> {
    let mut table = Table::new(["MAP", "TYPE", "KEY", "VALUE", "ENTRIES", "ACCESS"]);
    for map in maps {
        let access = map.access.as_str();
        table.row([&map.name, &map.kind, &map.key_size, &map.value_size, &map.max_entries, &access]);
    }
    table
}

pub(crate) fn programs_json(programs: &[Program]) -> Value {
    programs.iter().map(|program| json!({"name": program.name, "type": program.kind})).collect()
}

pub(crate) fn maps_json(maps: &[MapGrant]) -> Value {
    let map = |map: &MapGrant| {
        json!({
            "name": map.name,
            "type": map.kind,
            "key_size": map.key_size,
            "value_size": map.value_size,
            "max_entries": map.max_entries,
            "access": map.access,
        })
    };
    maps.iter().map(map).collect()
}

fn instance_json(instance: &ListedInstance) -> Value {
    json!({
        "id": instance.id,
        "object": instance.object,
        "programs": programs_json(&instance.programs),
        "maps": maps_json(&instance.maps),
        "links": instance.links,
    })
}
