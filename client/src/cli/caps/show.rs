//! `bpfgate caps show`: who holds what.

use std::process::ExitCode;

use bpfgate_protocol::names::AppName;
use serde_json::{Value, json};

use super::super::Outcome;
use super::super::args::StyleArgs;
use super::super::failure::{Failure, complain};
use super::super::output::{self, Style, Table};
use super::process::{Process, Role, Thread};
use super::promise::{Verdict, judge};
use super::set::CapSet;

#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// An app, a unit (cron.service) or a process [default: all processes of bpfgate]
    #[arg(value_name = "APP|UNIT|PID")]
    what: Option<String>,
    /// A row for each thread, also where they hold the same
    #[arg(long)]
    threads: bool,
    /// Only say what stands in this mask, hexadecimal as in /proc/PID/status
    #[arg(long, value_name = "MASK", value_parser = CapSet::from_mask, conflicts_with_all = ["what", "threads"])]
    decode: Option<CapSet>,
    #[command(flatten)]
    style: StyleArgs,
}

/// Whose processes are shown.
#[derive(Debug)]
enum What {
    Ours,
    App(AppName),
    Unit(String),
    Pid(u32),
}

impl What {
    fn parse(word: Option<&str>) -> Result<Self, Failure> {
        let Some(word) = word else { return Ok(Self::Ours) };
        if word.chars().all(|c| c.is_ascii_digit()) {
            let pid = word.parse().map_err(|_| Failure::Usage(format!("{word} is no process id")))?;
            return Ok(Self::Pid(pid));
        }
        // Names of apps have no dots.
        if word.contains('.') {
            return Ok(Self::Unit(word.to_owned()));
        }
        word.parse().map(Self::App).map_err(|error| Failure::Usage(format!("{error}")))
    }

    fn takes(&self, process: &Process) -> bool {
        let role = process.role.as_ref();
        match self {
            Self::Ours => role.is_some(),
            Self::App(app) => role.is_some_and(|role| role.app() == Some(app)),
            Self::Unit(unit) => process.unit.as_ref() == Some(unit),
            Self::Pid(pid) => process.pid == *pid,
        }
    }

    fn nothing(&self) -> String {
        match self {
            Self::Ours => "no process of bpfgate is to be seen; `bpfgate doctor` says what runs".to_owned(),
            Self::App(app) => format!("no helper of {app} runs: it is started by the first client"),
            Self::Unit(unit) => format!("no process is in the cgroup of {unit}"),
            Self::Pid(pid) => format!("there is no process {pid}, or it is hidden from this user"),
        }
    }
}

pub(super) fn run(args: &Args) -> Outcome {
    let style = Style::from(&args.style);
    if let Some(mask) = args.decode {
        return decode(mask, style);
    }
    let what = What::parse(args.what.as_deref())?;
    let all = Process::all()?;
    let shown: Vec<(&Process, Verdict)> = all
        .iter()
        .filter(|process| what.takes(process))
        .map(|process| (process, judge(process, &all)))
        .collect();
    if shown.is_empty() {
        return Err(Failure::Failed(what.nothing()));
    }
    match style {
        Style::Json => {
            output::print_json(&shown.iter().map(|(process, verdict)| json(process, verdict)).collect())?;
        }
        Style::Table => print(&shown, args.threads)?,
    }
    Ok(if shown.iter().all(|(_, verdict)| verdict.is_fine()) { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn decode(mask: CapSet, style: Style) -> Outcome {
    match style {
        Style::Json => {
            output::print_json(&json!({"mask": format!("{:016x}", mask.0), "capabilities": mask}))?;
        }
        Style::Table if mask.is_empty() => output::print(&"none\n")?,
        Style::Table => output::print(&format_args!("{}\n", mask.list()))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn print(shown: &[(&Process, Verdict)], threads: bool) -> Result<(), Failure> {
    let mut table = Table::new([
        "ROLE",
        "APP",
        "PID",
        "TID",
        "NAME",
        "PERMITTED",
        "EFFECTIVE",
        "INHERITABLE",
        "BOUNDING",
        "AMBIENT",
        "NNP",
        "SECCOMP",
        "PROMISE",
    ]);
    for (process, verdict) in shown {
        let mut rows: Vec<&Thread> = Vec::new();
        for thread in &process.threads {
            // What is not shown is as what stands above it.
            if threads || !rows.iter().any(|row| row.is_like(thread)) {
                rows.push(thread);
            }
        }
        for thread in rows {
            let app = process.role.as_ref().and_then(|role| role.app()).map(ToString::to_string);
            let role = process.role.as_ref().map_or("", |role| role.name());
            let seccomp = match thread.seccomp_filters {
                0 => thread.seccomp.name().to_owned(),
                filters => format!("{filters} filters"),
            };
            let nnp = if thread.no_new_privileges { "yes" } else { "no" };
            table.row([
                &role,
                &app.unwrap_or_default(),
                &process.pid,
                &thread.tid,
                if thread.tid == process.pid { &process.name } else { &thread.name },
                &thread.permitted,
                &thread.effective,
                &thread.inheritable,
                &thread.bounding,
                &thread.ambient,
                &nnp,
                &seccomp,
                &verdict.word(),
            ]);
        }
    }
    output::print(&table)?;
    for (process, verdict) in shown {
        for why in verdict.why() {
            complain(&format!("{} (process {}): {why}", process.name, process.pid));
        }
    }
    Ok(())
}

fn json(process: &Process, verdict: &Verdict) -> Value {
    let role = process.role.as_ref();
    json!({
        "pid": process.pid,
        "name": process.name,
        "role": role.map(Role::name),
        "app": role.and_then(Role::app),
        "unit": process.unit,
        "threads": process.threads,
        "promise": (*verdict != Verdict::None).then(|| verdict.word()),
        "why": verdict.why(),
    })
}
