//! The commands and how they end.

mod apply;
mod args;
mod attach;
mod audit;
mod caps;
mod doctor;
mod exec;
mod failure;
mod load;
mod map;
mod number;
mod output;
mod policy;
mod show;
mod signals;
mod status;
mod unit_files;

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use bpfgate_client::Client;
use clap::Parser;

use args::{Cli, Command, MapCommand};
use failure::Failure;

/// What can end well in more ways than one does so with an exit code.
type Outcome = Result<ExitCode, Failure>;

/// Names a file for [`write_down`].
const WIRE: &str = "BPFGATE_WIRE";

/// How long a wait for the broker may last without a word.
const PATIENCE: Duration = Duration::from_secs(1);

pub(crate) fn run() -> ExitCode {
    let cli = Cli::parse();
    let socket = cli.socket.as_deref();
    let outcome = match &cli.command {
        Command::Load(args) => load::run(socket, args),
        Command::Attach(args) => attach::attach(socket, args),
        Command::Detach { app, link } => attach::detach(socket, app, *link),
        Command::Unload { app, instance } => attach::unload(socket, app, *instance),
        Command::List { app, style } => show::list(socket, app, style.into()),
        Command::Show { app, instance, style } => show::show(socket, app, *instance, style.into()),
        Command::Map { command: MapCommand::Dump(args) } => map::dump(socket, args),
        Command::Map { command: MapCommand::Get(args) } => map::get(socket, args),
        Command::Map { command: MapCommand::Set(args) } => map::set(socket, args),
        Command::Exec(args) => exec::run(socket, args),
        Command::Policy { command } => policy::run(command),
        Command::Caps { command } => caps::run(socket, command),
        Command::Audit(args) => audit::run(args).map(|()| ExitCode::SUCCESS),
        Command::Doctor(args) => doctor::run(socket, args),
        Command::Status { style } => status::run(socket, style.into()),
    };
    outcome.unwrap_or_else(Failure::report)
}

/// Connects, and says so when an answer takes its time.
fn connect(socket: Option<&Path>) -> Result<Client, Failure> {
    let mut client = Client::connect(socket)?;
    if std::io::stderr().is_terminal() {
        client.notify_after(PATIENCE, || failure::say("waiting for the broker…"));
    }
    if let Some(path) = std::env::var_os(WIRE) {
        write_down(&mut client, Path::new(&path))?;
    }
    Ok(client)
}

/// Adds a line of JSON to this file for every request and its reply, as they went over the wire. They are whole JSON
/// texts without a line feed in them: the library writes one, the broker the other.
fn write_down(client: &mut Client, path: &Path) -> Result<(), Failure> {
    let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
    let mut file = file.map_err(|error| Failure::Failed(format!("{WIRE}: {}: {error}", path.display())))?;
    let process = std::process::id();
    client.observe(move |request, reply| {
        let [request, reply] = [request, reply].map(String::from_utf8_lossy);
        let line = format!("{{\"process\":{process},\"request\":{request},\"reply\":{reply}}}\n");
        if let Err(error) = file.write_all(line.as_bytes()) {
            failure::say(&format!("{WIRE}: {error}"));
        }
    });
    Ok(())
}

fn open(socket: Option<&Path>, app: &str) -> Result<Client, Failure> {
    let mut client = connect(socket)?;
    client.open(app)?;
    Ok(client)
}
