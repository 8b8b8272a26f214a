//! `bpfgate attach`, `detach` and `unload`: on instances that outlive the session that loaded them.

use std::path::Path;
use std::process::ExitCode;

use bpfgate_client::{Client, InstanceId, LinkId, TargetWord};
use serde_json::json;

use super::args::AttachArgs;
use super::failure::Failure;
use super::output::{self, Style, Table};
use super::{Outcome, open};

pub(crate) fn attach(socket: Option<&Path>, args: &AttachArgs) -> Outcome {
    let mut client = open(socket, &args.app)?;
    let target = match &args.target {
        None => None,
        Some(word @ TargetWord::Clear(_)) => Some(word.for_program("")),
        Some(word @ TargetWord::Bare(_)) => Some(word.for_program(&program_kind(&mut client, args)?)),
    };
    let link = client.attach(args.instance, &args.program, target.as_ref(), args.hook.as_deref())?;
    match (&args.style).into() {
        Style::Json => {
            let link = json!({"id": link.id, "program": args.program, "target": link.target});
            output::print_json(&link)?;
        }
        Style::Table => {
            let mut table = Table::new(["LINK", "PROGRAM", "TARGET"]);
            table.row([&link.id, &args.program, &link.target]);
            output::print(&table)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What a bare word means depends on the type of the program, which only a listing says here.
fn program_kind(client: &mut Client, args: &AttachArgs) -> Result<String, Failure> {
    let instances = client.list()?;
    let programs = instances.into_iter().filter(|instance| instance.id == args.instance);
    let mut programs = programs.flat_map(|instance| instance.programs);
    // An unknown instance or program is for the broker to refuse: it has the better sentence.
    Ok(programs.find(|program| program.name == args.program).map(|program| program.kind).unwrap_or_default())
}

pub(crate) fn detach(socket: Option<&Path>, app: &str, link: LinkId) -> Outcome {
    open(socket, app)?.detach(link)?;
    output::print(&format_args!("link {link} is detached\n"))?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn unload(socket: Option<&Path>, app: &str, instance: InstanceId) -> Outcome {
    open(socket, app)?.unload(instance)?;
    output::print(&format_args!("instance {instance} is unloaded\n"))?;
    Ok(ExitCode::SUCCESS)
}
