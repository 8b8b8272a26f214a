//! Object files, for people: their bytes, and what the loader says is in them. The command line parses no ELF: that is
//! done by a `bpfgate-loader` that can open nothing and holds nothing.

use bpfgate_protocol::codec;
use bpfgate_protocol::description::Description;
use bpfgate_protocol::hooks::Kind;
use bpfgate_protocol::names::EventName;
use bpfgate_protocol::policy::file::open_regular;
use bpfgate_protocol::policy::object::MAX_OBJECT;
use bpfgate_systemd::units::Layout;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Why there is no description.
pub(in crate::cli) enum Undescribed {
    /// There is nobody to ask: a sentence.
    NoLoader(String),
    /// It is no object, or one that libbpf cannot open: a sentence.
    Broken(String),
}

/// The bytes of an object file; or a part of a sentence about the file.
pub(in crate::cli) fn read(path: &Path) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let read = open_regular(path)?.take(MAX_OBJECT + 1).read_to_end(&mut bytes);
    read.map_err(|error| format!("cannot be read: {error}"))?;
    if bytes.len() as u64 > MAX_OBJECT {
        return Err(format!("is larger than {MAX_OBJECT} bytes"));
    }
    Ok(bytes)
}

/// The event that a section of this kind of program names, as a policy writes it.
pub(super) fn event(kind: Kind, section: &str) -> Option<EventName> {
    let (_, name) = section.split_once('/')?;
    let event: EventName = name.replacen('/', ":", 1).parse().ok()?;
    (event.as_str().contains(':') == (kind == Kind::Tracepoint)).then_some(event)
}

/// Where an object is: at its path, or in `directory` under the name of its file.
pub(super) fn place(path: &str, directory: Option<&Path>) -> PathBuf {
    let path = Path::new(path);
    match (directory, path.file_name()) {
        (Some(directory), Some(name)) => directory.join(name),
        _ => path.to_owned(),
    }
}

/// What is in an object.
pub(in crate::cli) fn describe(bytes: &[u8]) -> Result<Description, Undescribed> {
    let loader = loader();
    let no_loader = |why: String| {
        Undescribed::NoLoader(format!("objects cannot be looked into: {} {why}", loader.display()))
    };
    let mut command = Command::new(&loader);
    command.arg("--describe").env_clear();
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.map_err(|error| no_loader(format!("cannot be started: {error}")))?;
    if let Some(mut input) = child.stdin.take() {
        // It may end before it has read everything, and says why.
        let _ = input.write_all(bytes);
    }
    let output = child.wait_with_output().map_err(|error| no_loader(format!("is lost: {error}")))?;
    if let Some(signal) = output.status.signal() {
        let why = format!("libbpf was ended by signal {signal} while it read the object: it is damaged");
        return Err(Undescribed::Broken(why));
    }
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let why = said.trim().strip_prefix("bpfgate-loader: ").unwrap_or(said.trim());
        return Err(Undescribed::Broken(why.to_owned()));
    }
    codec::decode(&output.stdout).map_err(|_| no_loader("is of another version".to_owned()))
}

/// Beside this program, as they are built; or where it is installed.
fn loader() -> PathBuf {
    let beside = std::env::current_exe().unwrap_or_default().with_file_name("bpfgate-loader");
    if beside.exists() { beside } else { Layout::here().loader() }
}
