//! `bpfgate load`, and the loading part of `bpfgate exec`.

use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;

use bpfgate_client::{Client, Instance, Link};
use nix::sys::signal::Signal;
use serde_json::json;

use super::args::{AttachSpec, LoadArgs, ObjectArgs};
use super::failure::Failure;
use super::output::{self, Style, Table};
use super::signals::{Event, Signals};
use super::{Outcome, open, show};

/// An object that was loaded, and what was attached of it.
pub(crate) struct Loaded {
    pub(crate) client: Client,
    pub(crate) instance: Instance,
    links: Vec<(String, Link)>,
}

pub(crate) fn run(socket: Option<&Path>, args: &LoadArgs) -> Outcome {
    let loaded = load(socket, &args.object)?;
    print(&loaded, (&args.style).into())?;
    if args.detach {
        return Ok(ExitCode::SUCCESS);
    }
    let signals = Signals::block(&[Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP])?;
    match signals.wait(Some(loaded.client.as_fd()))? {
        Event::Signal { .. } => Ok(ExitCode::SUCCESS),
        Event::SessionEnded => Err(Failure::Failed(SESSION_ENDED.to_owned())),
    }
}

pub(crate) const SESSION_ENDED: &str =
    "the broker ended the session; what it held is detached unless the policy keeps it";

/// Opens the app, loads the object and makes every attachment; a failure ends the session with all of it.
pub(crate) fn load(socket: Option<&Path>, args: &ObjectArgs) -> Result<Loaded, Failure> {
    let mut client = open(socket, &args.app)?;
    let instance = client.load(&args.object, &args.options())?;
    let mut links = Vec::with_capacity(args.attach.len());
    for spec in &args.attach {
        let link = attach(&mut client, &instance, spec)?;
        links.push((spec.program.clone(), link));
    }
    Ok(Loaded { client, instance, links })
}

fn attach(client: &mut Client, instance: &Instance, spec: &AttachSpec) -> Result<Link, Failure> {
    let kind = instance.programs.iter().find(|program| program.name == spec.program);
    let kind = kind.map_or("", |program| program.kind.as_str());
    let target = spec.target.as_ref().map(|word| word.for_program(kind));
    Ok(client.attach(instance.id, &spec.program, target.as_ref(), None)?)
}

fn print(loaded: &Loaded, style: Style) -> Result<(), Failure> {
    let Loaded { instance, links, .. } = loaded;
    if style == Style::Json {
        let links = links
            .iter()
            .map(|(program, link)| json!({"id": link.id, "program": program, "target": link.target}));
        output::print_json(&json!({
            "instance": instance.id,
            "programs": show::programs_json(&instance.programs),
            "maps": show::maps_json(&instance.maps),
            "links": links.collect::<Vec<_>>(),
        }))?;
        return Ok(());
    }
    let mut table = Table::new(["LINK", "PROGRAM", "TARGET"]);
    for (program, link) in links {
        table.row([&link.id, program, &link.target]);
    }
    let (programs, maps) = (show::programs_table(&instance.programs), show::maps_table(&instance.maps));
    output::print(&format_args!("instance {}\n\n{programs}\n{maps}\n{table}", instance.id))?;
    Ok(())
}
