//! From a policy to what systemd is told about its helper. Nothing here reads or writes: the same policy gives the same
//! text, in the generator, in `bpfgate policy apply` and in a test.

use crate::grants::lines;
use bpfgate_protocol::hex;
use bpfgate_protocol::names::{AbsolutePath, AppName};
use bpfgate_protocol::policy::{Hook, Keep, Policy, capabilities, needed};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Memory beside the maps: helper and loader take 10 MiB, with the kernel's BTF parsed 30 MiB, and the verifier,
/// whose memory counts since Linux 6.17, was seen to take 130 MiB for one program near its own limits. Several times
/// that: a bound against leaks, which no program that the kernel accepts may meet.
const BASE: u64 = 512 << 20;

/// The helper, its loader, the loader's worker, and one that is about to end.
const TASKS: u32 = 4;

/// Descriptors that are kept beside those of objects: the helper's state, the old one until the new one is there, and
/// the same for what is being loaded or released at the moment.
const SPARE_DESCRIPTORS: u32 = 32;

/// Perf events for one tracepoint: as many attachments to it at a time (helper/src/inventory.rs).
const EVENTS: u32 = 4;

/// Directories that a helper does not see, each with the setting that hides it and what shows single files in it.
const HIDDEN: [(&str, Option<&str>); 6] = [
    ("/home", Some("ProtectHome=tmpfs")),
    ("/root", Some("ProtectHome=tmpfs")),
    ("/run/user", Some("ProtectHome=tmpfs")),
    ("/run", None),
    ("/tmp", None),
    ("/var/tmp", None),
];

/// Where bpfgate is installed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    prefix: PathBuf,
}

impl Layout {
    /// By the place of one of our programs, `PREFIX/bin/bpfgate` or
    /// `PREFIX/lib/systemd/system-generators/bpfgate-generator`; /usr if it is elsewhere.
    pub fn of_program(program: &Path) -> Self {
        let prefix = [Path::new("bin/bpfgate"), Path::new("lib/systemd/system-generators/bpfgate-generator")]
            .into_iter()
            .find(|place| program.ends_with(place))
            .and_then(|place| program.ancestors().nth(place.components().count()));
        Self { prefix: prefix.unwrap_or(Path::new("/usr")).to_owned() }
    }

    /// The layout of the program that runs.
    pub fn here() -> Self {
        Self::of_program(&std::env::current_exe().unwrap_or_default())
    }

    /// A unit as it is installed.
    pub fn unit(&self, name: &str) -> PathBuf {
        self.prefix.join("lib/systemd/system").join(name)
    }

    /// The program that runs libbpf.
    pub fn loader(&self) -> PathBuf {
        self.prefix.join("libexec/bpfgate/bpfgate-loader")
    }

    fn helper(&self) -> PathBuf {
        self.prefix.join("libexec/bpfgate/bpfgate-helper")
    }
}

/// The socket unit of an app's helper.
pub fn socket_unit(app: &AppName) -> String {
    format!("bpfgate-helper@{app}.socket")
}

/// The service unit of an app's helper.
pub fn service_unit(app: &AppName) -> String {
    format!("bpfgate-helper@{app}.service")
}

/// The path of an app's drop-in below a directory of units.
pub fn drop_in_path(units: &Path, app: &AppName) -> PathBuf {
    units.join(format!("{}.d/50-policy.conf", service_unit(app)))
}

/// Whether the helper is started with the machine, and not by its first client.
pub fn at_boot(policy: &Policy) -> bool {
    policy.keep == Keep::Boot
}

/// The drop-in of an app's helper: what the template closes and this policy needs, and after that, for people and for
/// `policy apply`, what the policy grants.
///
/// Errors: a path that cannot be written into a unit file: a sentence.
pub fn drop_in(app: &AppName, policy: &Policy, layout: &Layout) -> Result<String, String> {
    let mut text = format!(
        "# Made by bpfgate-generator from {}.\n# Change that file and run `bpfgate policy apply`; what is changed here is lost.\n",
        policy.file
    );
    text += "\n[Service]\n# Instances of one template share the name of their DynamicUser=, and its uid with it, unless told otherwise.\n";
    let _ = writeln!(text, "User={}", user(app));
    add_capabilities(&mut text, policy);
    add_network(&mut text, policy)?;
    add_files(&mut text, policy)?;
    add_preparation(&mut text, app, policy, layout);
    add_bounds(&mut text, policy);
    text += "\n# What is in force, for `bpfgate policy apply`; systemd passes over sections of this name.\n[X-Bpfgate]\n";
    let _ = writeln!(text, "Policy={}\nDigest={}", policy.file, hex::encode(&policy.digest));
    for grant in lines(policy) {
        let _ = writeln!(text, "{GRANT}{grant}");
    }
    Ok(text)
}

/// The name of an app's user, at most 31 characters long: one that no account has.
fn user(app: &AppName) -> String {
    const PREFIX: &str = "bpfgate-app-";
    if PREFIX.len() + app.as_str().len() <= 31 {
        return format!("{PREFIX}{app}");
    }
    let digest: [u8; 32] = Sha256::digest(app.as_str().as_bytes()).into();
    format!("{PREFIX}{}", &hex::encode(&digest)[..16])
}

const GRANT: &str = "Grant=";

/// The grants that a drop-in lists.
pub fn granted(drop_in: &str) -> BTreeSet<&str> {
    drop_in.lines().filter_map(|line| line.strip_prefix(GRANT)).collect()
}

/// The digest of the policy that a drop-in was made from.
pub fn digest(drop_in: &str) -> Option<&str> {
    drop_in.lines().find_map(|line| line.strip_prefix("Digest="))
}

fn add_capabilities(text: &mut String, policy: &Policy) {
    for need in capabilities(policy) {
        let _ = writeln!(text, "# {}: {} ({})", need.capability, need.reason, policy.at(need.line));
    }
    let all = needed(policy).iter().map(|capability| capability.name()).collect::<Vec<_>>().join(" ");
    if all.is_empty() {
        *text += "# No program, no capability.\n";
    }
    let _ = writeln!(text, "CapabilityBoundingSet={all}\nAmbientCapabilities={all}");
}

fn add_network(text: &mut String, policy: &Policy) -> Result<(), String> {
    if let Some(path) = &policy.netns {
        let _ = writeln!(
            text,
            "# The policy names its network namespace.\nNetworkNamespacePath={}",
            plain(path)?
        );
        *text += "# Until it is there every start fails: slowly enough that this never counts as too many.\nRestartSec=1s\n";
        return Ok(());
    }
    let rules = policy.objects.values().flat_map(|object| &object.programs);
    let interfaces = rules.filter(|rule| matches!(rule.hook, Hook::Xdp { .. } | Hook::Tcx { .. }));
    let Some(rule) = interfaces.min_by_key(|rule| rule.line) else {
        *text += "# Nothing is attached to an interface: it sees none.\nPrivateNetwork=yes\n";
        return Ok(());
    };
    let kind = rule.hook.kind();
    let _ = writeln!(
        text,
        "# Links of {kind} are made in the network namespace of their interfaces ({}).",
        policy.at(rule.line)
    );
    *text += "PrivateNetwork=no\n";
    Ok(())
}

/// Files in directories that the template hides. An object there must have a digest: without one, who can write the
/// directories above it decides, and of these the helper would see others.
fn add_files(text: &mut String, policy: &Policy) -> Result<(), String> {
    let mut shown: BTreeSet<(&AbsolutePath, Option<&str>)> = BTreeSet::new();
    let mut show = |path| {
        let hides = |directory: &str| Path::new(AbsolutePath::as_str(path)).starts_with(directory);
        if let Some((_, setting)) = HIDDEN.iter().find(|(directory, _)| hides(directory)) {
            shown.insert((path, *setting));
        }
    };
    for object in policy.objects.values() {
        if object.sha256.is_some() {
            show(&object.path);
        }
        for rule in &object.programs {
            if let Hook::Uprobe { binary, .. } = &rule.hook {
                show(binary);
            }
        }
    }
    // It compares the one that it is in with this.
    policy.netns.iter().for_each(&mut show);
    if shown.is_empty() {
        return Ok(());
    }
    *text += "# The policy names files in directories that are hidden: these, and nothing else there.\n";
    if let Some(setting) = shown.iter().find_map(|(_, setting)| *setting) {
        let _ = writeln!(text, "{setting}");
    }
    for (path, _) in shown {
        let _ = writeln!(text, "BindReadOnlyPaths=-{}", plain(path)?);
    }
    Ok(())
}

/// What only root may open is opened by a step of its own, before the helper starts.
fn add_preparation(text: &mut String, app: &AppName, policy: &Policy, layout: &Layout) {
    let rules = policy.objects.values().flat_map(|object| &object.programs);
    let of_root = rules.filter(|rule| matches!(rule.hook, Hook::Tracepoint { .. } | Hook::Uprobe { .. }));
    let Some(rule) = of_root.min_by_key(|rule| rule.line) else { return };
    let what = match rule.hook {
        Hook::Tracepoint { .. } => "the events of a tracepoint",
        _ => "the binary of a uprobe",
    };
    let _ = writeln!(
        text,
        "# Root alone may open {what} ({}): a step of root's does, from the policy alone, and has them kept for the helper.",
        policy.at(rule.line)
    );
    let _ = writeln!(text, "ExecStartPre=+{} {app} --prepare", layout.helper().display());
    *text +=
        "# That step hands descriptors over too; the helper's children still may not.\nNotifyAccess=exec\n";
}

fn add_bounds(text: &mut String, policy: &Policy) {
    let limits = policy.limits;
    let maps = limits.map_memory;
    // A quarter on top: what the kernel allocates beside keys and values is not in the policy's sum.
    let memory = maps.saturating_add(maps / 4).saturating_add(BASE);
    let _ = writeln!(
        text,
        "# Maps of {} MiB and a quarter for their overhead; {} MiB for helper, loader and the kernel's verifier.",
        maps.div_ceil(1 << 20),
        BASE >> 20
    );
    let _ = writeln!(text, "MemoryMax={memory}");
    *text += "# The helper, the loader, its worker, and one that is about to end.\n";
    let _ = writeln!(text, "TasksMax={TASKS}");
    let objects = u32::try_from(policy.objects.len()).unwrap_or(u32::MAX);
    let mut opened: u32 = 0;
    for rule in policy.objects.values().flat_map(|object| &object.programs) {
        opened = opened.saturating_add(match &rule.hook {
            Hook::Tracepoint { events } => {
                u32::try_from(events.len()).unwrap_or(u32::MAX).saturating_mul(EVENTS)
            }
            Hook::Uprobe { .. } => 1,
            _ => 0,
        });
    }
    let kept = [limits.programs, limits.maps, limits.links, objects, opened, SPARE_DESCRIPTORS]
        .into_iter()
        .fold(0_u32, u32::saturating_add);
    *text += "# Kept over a crash or restart: programs, maps and links up to their limits, what was opened, and the state.\n";
    let _ = writeln!(text, "FileDescriptorStoreMax={kept}");
}

/// A path as it stands in a unit file: `%` begins a specifier. What needs quotes or escapes is refused: settings
/// differ in how they read those.
fn plain(path: &AbsolutePath) -> Result<String, String> {
    let odd = |c: char| !c.is_ascii_graphic() || matches!(c, '"' | '\'' | '\\' | ':' | '$' | ';' | '#');
    if path.as_str().contains(odd) {
        return Err(format!(
            "the path {path} cannot be written into a unit file: use one of letters, digits and - _ . % + ="
        ));
    }
    Ok(path.as_str().replace('%', "%%"))
}

#[cfg(test)]
mod tests;
