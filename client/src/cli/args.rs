//! Every command, argument and flag, once: parser and help come from here; those of `caps` and `doctor` stand beside
//! what they do.
#![allow(clippy::doc_markdown, reason = "these comments are help texts, which show no Markdown")]

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use bpfgate_client::{InstanceId, LinkId, LoadOptions, TargetWord};
use clap::{Args, Parser, Subcommand};

use super::caps::CapsCommand;
use super::doctor;
use super::number::Format;
use super::output::Style;

/// Use eBPF programs and maps without any privilege, as far as a policy allows.
///
/// Exit codes: 0 done, 1 refused or failed, 2 usage, 3 broker unreachable, 4 policy invalid.
///
/// BPFGATE_WIRE=FILE in the environment adds every request of an app and its reply to FILE, a line of JSON each.
#[derive(Parser, Debug)]
#[command(name = "bpfgate", version)]
pub(crate) struct Cli {
    /// The broker's socket [default: $BPFGATE_SOCKET, else /run/bpfgate/io.bpfgate]
    #[arg(long, global = true, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Load an object, attach its programs, and keep them until Ctrl-C or SIGTERM
    Load(LoadArgs),
    /// Attach a program of an instance that outlives its session
    Attach(AttachArgs),
    /// Take a link down
    Detach {
        /// The app, which is the name of its policy
        app: String,
        /// The link's id, as `load`, `attach` and `show` print it
        link: LinkId,
    },
    /// Detach and release everything of an instance
    Unload {
        /// The app
        app: String,
        /// The instance's id
        instance: InstanceId,
    },
    /// List the instances of an app
    List {
        /// The app
        app: String,
        #[command(flatten)]
        style: StyleArgs,
    },
    /// Show the programs, maps and links of an instance
    Show {
        /// The app
        app: String,
        /// The instance's id
        instance: InstanceId,
        #[command(flatten)]
        style: StyleArgs,
    },
    /// Read and write maps
    Map {
        #[command(subcommand)]
        command: MapCommand,
    },
    /// Load, attach, and run a program that gets the maps but none of bpf(2)'s other powers
    ///
    /// The program finds the maps as descriptors from 3 on, described by LISTEN_FDS, LISTEN_FDNAMES
    /// and LISTEN_PID. A seccomp filter leaves it the bpf commands that read and write maps. The
    /// session lasts as long as the program; its exit status is the exit status of bpfgate.
    Exec(ExecArgs),
    /// Write, check and explain policies
    Policy {
        #[command(subcommand)]
        command: PolicyCommand,
    },
    /// Show what was decided: who asked for what, the verdict, and the line of the policy that decided
    ///
    /// Reads the journal, as root or as a member of its groups; or a file that the broker was given with --audit.
    Audit(AuditArgs),
    /// Show which capabilities are needed and why, who holds them, asks for them, has too many or too few
    Caps {
        #[command(subcommand)]
        command: CapsCommand,
    },
    /// Check kernel, settings, units and processes, and say what to do about what is wrong
    ///
    /// ok: as it should be. warning: it works, and could be safer or do more. fault: something does not work, or a
    /// promise is broken. Needs no privilege; root sees more. Exit codes: 0 no fault, 1 a fault, or a warning with
    /// --strict.
    Doctor(doctor::Args),
    /// Show what runs: broker, helpers, units, capabilities, sandbox, objects
    Status {
        #[command(flatten)]
        style: StyleArgs,
    },
}

#[derive(Args, Debug)]
pub(crate) struct AuditArgs {
    /// A file of records [default: the journal]
    pub(crate) file: Option<PathBuf>,
    /// Only of this app
    #[arg(long, value_name = "APP")]
    pub(crate) app: Option<String>,
    /// Only of this user, by name or number
    #[arg(long, value_name = "USER")]
    pub(crate) user: Option<String>,
    /// Only with this verdict: allowed, or the name of an error, such as Denied
    #[arg(long, value_name = "VERDICT")]
    pub(crate) verdict: Option<String>,
    /// Only this request, whose id came with the answer
    #[arg(long, value_name = "ID")]
    pub(crate) request: Option<String>,
    /// Only of so long ago, and later: 90s, 10min, 2h, 3d
    #[arg(long, value_name = "TIME", value_parser = ago)]
    pub(crate) since: Option<Duration>,
    /// Go on, and show what is decided from now on
    #[arg(long)]
    pub(crate) follow: bool,
    #[command(flatten)]
    pub(crate) style: StyleArgs,
}

/// A time span with its unit.
pub(crate) fn ago(text: &str) -> Result<Duration, String> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let seconds = match unit {
        "s" => 1,
        "min" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => 0,
    };
    let number = number.parse::<u64>().ok().filter(|_| seconds > 0).and_then(|n| n.checked_mul(seconds));
    number.map(Duration::from_secs).ok_or_else(|| "a number with a unit: 90s, 10min, 2h, 3d".to_owned())
}

#[derive(Args, Debug, Clone, Copy)]
pub(crate) struct StyleArgs {
    /// Print JSON instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

impl From<&StyleArgs> for Style {
    fn from(args: &StyleArgs) -> Self {
        if args.json { Self::Json } else { Self::Table }
    }
}

/// What to load and where to attach it.
#[derive(Args, Debug)]
pub(crate) struct ObjectArgs {
    /// The app, which is the name of its policy
    pub(crate) app: String,
    /// The object, by its name in the policy
    pub(crate) object: String,
    /// Load this program only; may be repeated [default: all that the policy names]
    #[arg(long = "program", value_name = "NAME")]
    pub(crate) programs: Vec<String>,
    /// Set a read-only variable before the load; may be repeated
    #[arg(long = "global", value_name = "NAME=VALUE", value_parser = global)]
    pub(crate) globals: Vec<(String, i64)>,
    /// Attach a program after the load; may be repeated
    ///
    /// TARGET is an interface (eth0), an event (sched:sched_process_exec), a cgroup
    /// (/sys/fs/cgroup/web, or own: that of the client's unit) or a function (/usr/bin/bash:readline). A bare word means an event for
    /// a raw tracepoint program, a function of the kernel for fentry, fexit and kprobe, and an interface for any other. The prefixes interface:, event:,
    /// cgroup:, uprobe: and function: say it outright. Without TARGET the policy must allow exactly one.
    #[arg(long = "attach", value_name = "PROGRAM[=TARGET]")]
    pub(crate) attach: Vec<AttachSpec>,
}

impl ObjectArgs {
    pub(crate) fn options(&self) -> LoadOptions {
        LoadOptions {
            programs: (!self.programs.is_empty()).then(|| self.programs.clone()),
            globals: self.globals.iter().cloned().collect(),
        }
    }
}

#[derive(Args, Debug)]
pub(crate) struct LoadArgs {
    #[command(flatten)]
    pub(crate) object: ObjectArgs,
    /// Return at once; what was loaded stays only where the policy says keep = "app"
    #[arg(long, visible_alias = "no-wait")]
    pub(crate) detach: bool,
    #[command(flatten)]
    pub(crate) style: StyleArgs,
}

#[derive(Args, Debug)]
pub(crate) struct AttachArgs {
    /// The app
    pub(crate) app: String,
    /// The instance's id
    pub(crate) instance: InstanceId,
    /// The program, by its name in the object
    pub(crate) program: String,
    /// Where: eth0, sched:sched_process_exec, /sys/fs/cgroup/web, own, /usr/bin/bash:readline, or any of
    /// them after interface:, event:, cgroup:, uprobe:, function:
    pub(crate) target: Option<TargetWord>,
    /// Which kind of attachment, if the policy lists the program under more than one
    #[arg(long, value_name = "NAME")]
    pub(crate) hook: Option<String>,
    #[command(flatten)]
    pub(crate) style: StyleArgs,
}

#[derive(Subcommand, Debug)]
pub(crate) enum MapCommand {
    /// Print every entry
    Dump(DumpArgs),
    /// Print the value of one key
    Get(GetArgs),
    /// Set the value of one key; needs read_write access
    Set(SetArgs),
}

#[derive(Args, Debug)]
pub(crate) struct MapName {
    /// The app
    pub(crate) app: String,
    /// The instance's id
    pub(crate) instance: InstanceId,
    /// The map, by its name in the object
    pub(crate) map: String,
    /// How keys and values are written
    ///
    /// hex: bytes in memory order. u32, u64: numbers in the machine's byte order, several with
    /// commas between them; what is no multiple of 8 bytes is taken as u32, then as hex.
    #[arg(long, value_enum, default_value_t = Format::Hex)]
    pub(crate) format: Format,
}

#[derive(Args, Debug)]
pub(crate) struct DumpArgs {
    #[command(flatten)]
    pub(crate) name: MapName,
    /// Add the values of all CPUs, as u64
    #[arg(long)]
    pub(crate) sum: bool,
    #[command(flatten)]
    pub(crate) style: StyleArgs,
}

#[derive(Args, Debug)]
pub(crate) struct GetArgs {
    #[command(flatten)]
    pub(crate) name: MapName,
    /// The key
    pub(crate) key: String,
    /// Add the values of all CPUs, as u64
    #[arg(long)]
    pub(crate) sum: bool,
    #[command(flatten)]
    pub(crate) style: StyleArgs,
}

#[derive(Args, Debug)]
pub(crate) struct SetArgs {
    #[command(flatten)]
    pub(crate) name: MapName,
    /// The key
    pub(crate) key: String,
    /// The value; a per-CPU map gets it for every CPU
    pub(crate) value: String,
}

#[derive(Args, Debug)]
pub(crate) struct ExecArgs {
    #[command(flatten)]
    pub(crate) object: ObjectArgs,
    /// The program to run, and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    pub(crate) command: Vec<OsString>,
}

#[derive(Subcommand, Debug)]
pub(crate) enum PolicyCommand {
    /// Print a first policy for an object, to be filled in
    ///
    /// It names every program, map and variable of the object with the choices that there are. Nobody is let in, and
    /// `policy check` refuses it until what says FILL IN is filled in.
    New(NewArgs),
    /// Check policy files, and the objects that they name [default: all that are installed]
    ///
    /// Errors make a file invalid, warnings do not. Exit codes: 0 all are valid, 4 one is not.
    Check(CheckArgs),
    /// Show a policy with every default filled in, and the capabilities it needs
    Show {
        /// A policy file, or the app of an installed one
        #[arg(value_name = "FILE|APP")]
        policy: String,
        /// Show the drop-in of the helper's unit instead
        #[arg(long)]
        unit: bool,
        #[command(flatten)]
        style: StyleArgs,
    },
    /// Say what a policy would answer to a request, and which line decides
    ///
    /// REQUEST is one of:
    ///   open
    ///   load OBJECT [PROGRAM...] [GLOBAL=VALUE...]
    ///   attach OBJECT PROGRAM [TARGET]
    ///   map OBJECT MAP
    ///
    /// The policy is asked, and nothing else: whether the object is the approved
    /// one, and what limits and kernel say, comes after that.
    ///
    /// Exit codes: 0 allowed, 1 denied, 4 policy invalid.
    #[command(verbatim_doc_comment)]
    Explain(ExplainArgs),
    /// Say what a new policy allows more and what less
    ///
    /// Two files are compared, or two directories by the names of their files. How something is written does not matter:
    /// eth* instead of eth0 is more, a client entry less is less. Exit codes: 0 nothing is wider, 1 something is, 4 a
    /// policy is invalid.
    Diff {
        /// What was allowed: a file or a directory
        old: PathBuf,
        /// What is to be allowed
        new: PathBuf,
        #[command(flatten)]
        style: StyleArgs,
    },
    /// Check that policies allow and deny what a file of cases expects
    ///
    /// The file holds entries like this, and may name users and groups that this
    /// machine does not have:
    ///
    ///   [users]
    ///   flowmon = 990
    ///   [groups]
    ///   metrics = 991
    ///   [[case]]
    ///   app = "flow"
    ///   as = "flowmon:metrics"
    ///   request = "attach counter count_packets eth0"
    ///   expect = "allow"      # or "deny"
    ///   line = 12             # the deciding line of the policy, if it matters
    ///
    /// Exit codes: 0 all is as expected, 1 something is not, 4 a policy or the
    /// file of cases is invalid.
    #[command(verbatim_doc_comment)]
    Test {
        /// The file of cases
        cases: PathBuf,
        /// Where the policies are [default: beside the cases]
        #[arg(long, value_name = "DIRECTORY")]
        policies: Option<PathBuf>,
        #[command(flatten)]
        style: StyleArgs,
    },
    /// Write the digests of object files into policies; everything else stays as it is
    ///
    /// Exit codes: 0 done, 1 an object cannot be read or, with --check, a digest differs, 4 a policy is invalid.
    Pin(PinArgs),
    /// Put the installed policies into force: show what differs, restart the helpers it concerns (root)
    ///
    /// Helpers of changed policies go on with them, or are restarted: what they attached stays as far as the
    /// policy still allows it. Helpers without a valid policy are stopped. All others stay as they
    /// are.
    Apply {
        /// Only show what would be done
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        style: StyleArgs,
    },
}

#[derive(Args, Debug)]
pub(crate) struct NewArgs {
    /// The object file; it is read by a bpfgate-loader without privilege
    #[arg(long, value_name = "FILE")]
    pub(crate) from_object: PathBuf,
    /// The name of the app [default: that of the object file]
    #[arg(long)]
    pub(crate) app: Option<String>,
    /// Let this user in
    #[arg(long)]
    pub(crate) user: Option<String>,
    /// Allow this interface, or pattern of interfaces; may be repeated
    #[arg(long, value_name = "NAME")]
    pub(crate) interface: Vec<String>,
}

#[derive(Args, Debug)]
pub(crate) struct CheckArgs {
    /// Policy files
    pub(crate) files: Vec<PathBuf>,
    /// Do not look into object files
    #[arg(long, conflicts_with = "objects")]
    pub(crate) no_objects: bool,
    /// Take object files from this directory, not from their paths
    #[arg(long, value_name = "DIRECTORY")]
    pub(crate) objects: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) style: StyleArgs,
}

#[derive(Args, Debug)]
pub(crate) struct ExplainArgs {
    /// Who asks: a user with its groups of this machine; USER:GROUP,... with these groups and no others, names or
    /// numbers; or a service, as UNIT.service, whose user is not known
    #[arg(long = "as", value_name = "USER[:GROUP,...]|UNIT")]
    pub(crate) client: String,
    /// The service that the user's process is of
    #[arg(long, value_name = "UNIT")]
    pub(crate) unit: Option<String>,
    /// The app whose policy is asked
    #[arg(long, conflicts_with = "file")]
    pub(crate) app: Option<String>,
    /// Take the app's policy from this directory, not from those where policies are installed
    #[arg(long, value_name = "DIRECTORY", requires = "app")]
    pub(crate) policies: Option<PathBuf>,
    /// Take this policy file
    #[arg(long)]
    pub(crate) file: Option<PathBuf>,
    /// The request
    #[arg(required = true)]
    pub(crate) request: Vec<String>,
    #[command(flatten)]
    pub(crate) style: StyleArgs,
}

#[derive(Args, Debug)]
pub(crate) struct PinArgs {
    /// Policy files
    #[arg(required = true)]
    pub(crate) files: Vec<PathBuf>,
    /// Change nothing; exit code 1 if something would change
    #[arg(long)]
    pub(crate) check: bool,
    /// Take object files from this directory, not from their paths
    #[arg(long, value_name = "DIRECTORY")]
    pub(crate) objects: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) style: StyleArgs,
}

/// `PROGRAM[=TARGET]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AttachSpec {
    pub(crate) program: String,
    pub(crate) target: Option<TargetWord>,
}

impl FromStr for AttachSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (program, target) = match text.split_once('=') {
            Some((program, target)) => (program, Some(target.parse()?)),
            None => (text, None),
        };
        if program.is_empty() {
            return Err("the program has no name".to_owned());
        }
        Ok(Self { program: program.to_owned(), target })
    }
}

fn global(text: &str) -> Result<(String, i64), String> {
    let (name, value) = text.split_once('=').ok_or("write NAME=VALUE")?;
    if name.is_empty() {
        return Err("the variable has no name".to_owned());
    }
    let number = match value.strip_prefix("0x") {
        Some(digits) => i64::from_str_radix(digits, 16),
        None => value.parse(),
    };
    number.map(|number| (name.to_owned(), number)).map_err(|error| format!("{value:?}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bpfgate_client::Target;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn attachments() {
        let spec: AttachSpec = "p=/bin/bash:a=b".parse().unwrap();
        let uprobe = Target::Uprobe { binary: "/bin/bash".into(), symbol: "a=b".into() };
        assert_eq!(spec, AttachSpec { program: "p".into(), target: Some(TargetWord::Clear(uprobe)) });
        assert_eq!("p".parse::<AttachSpec>().unwrap().target, None);
        for text in ["", "=eth0", "p=", "p=event:"] {
            assert!(text.parse::<AttachSpec>().is_err(), "{text}");
        }
    }

    #[test]
    fn globals() {
        assert_eq!(global("rate=-5"), Ok(("rate".to_owned(), -5)));
        assert_eq!(global("rate=0xff"), Ok(("rate".to_owned(), 255)));
        for text in ["rate", "=1", "rate=", "rate=x", "rate=9223372036854775808"] {
            assert!(global(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_program_of_exec_comes_after_the_dashes() {
        let line = ["bpfgate", "exec", "app", "obj", "--attach", "p=lo", "--", "cat", "--json"];
        let Command::Exec(args) = Cli::try_parse_from(line).unwrap().command else {
            panic!("another command");
        };
        assert_eq!(args.command, ["cat", "--json"]);
        assert!(Cli::try_parse_from(["bpfgate", "exec", "app", "obj"]).is_err());
        assert!(Cli::try_parse_from(["bpfgate", "exec", "app", "obj", "cat"]).is_err());
    }
}
