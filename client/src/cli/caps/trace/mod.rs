//! `bpfgate caps trace`: the capability checks of the kernel, as they happen.
//!
//! | module | holds |
//! |---|---|
//! | `tracer` | the program: loaded through the broker, attached, read |
//! | `scope` | whose checks: a unit, processes, everything |
//! | `layout` | what the maps of the program hold, byte by byte |
//! | `class` | what a stack says of a check: a need or bookkeeping |
//! | `names` | numbers of capabilities, system calls and bpf(2) as words |
//! | `cgroups` | ids of cgroups as paths and units |
//! | `observation` | a check as it is shown |
//! | `lines`, `screen` | where it is shown |

mod cgroups;
mod class;
mod layout;
mod lines;
mod names;
mod observation;
mod scope;
mod screen;
mod tracer;

use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::poll::PollTimeout;
use nix::sys::signal::Signal;

use self::lines::Lines;
use self::observation::Distinct;
use self::screen::Screen;
use self::tracer::Tracer;
use crate::cli::args::ago;
use crate::cli::failure::{Failure, say};
use crate::cli::load::SESSION_ENDED;
use crate::cli::signals::{Event, Signals};
use crate::cli::{Outcome, output};

pub(crate) use self::observation::{Bpf, Class, Observation, Verdict};
pub(crate) use self::scope::Scope;
pub(crate) use self::tracer::Account;

/// How often the tables of the program are read.
const INTERVAL: Duration = Duration::from_millis(250);

#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) scope: Scope,
    /// End after so long: 30s, 10min, 2h
    #[arg(long, value_name = "TIME", value_parser = ago)]
    pub(crate) duration: Option<Duration>,
    /// Show each kind of check once: other pids and later times are no other kind
    #[arg(long)]
    pub(crate) unique: bool,
    /// Show on which way through the kernel the check was reached
    #[arg(long)]
    pub(crate) stacks: bool,
    /// Do not watch how system calls end: cheaper, and a harmless denial is shown as denied
    #[arg(long)]
    pub(crate) no_outcome: bool,
    /// Print JSON, a line for each
    #[arg(long)]
    pub(crate) json: bool,
}

/// Where checks are shown.
enum View {
    Lines(Lines),
    Screen(Box<Screen>),
}

impl View {
    fn show(&mut self, new: &[Observation], account: &Account) -> Result<(), Failure> {
        match self {
            Self::Lines(lines) => lines.show(new),
            Self::Screen(screen) => screen.show(new, account),
        }
    }
}

pub(crate) fn run(socket: Option<&Path>, args: &Args) -> Outcome {
    // Before there is a session: a signal ends it in order.
    let signals = Signals::block(&[Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP])?;
    let mut tracer = Tracer::start(socket, &args.scope, !args.no_outcome)?;
    let terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let mut view = if terminal && !args.json && !args.stacks {
        View::Screen(Box::new(Screen::take(tracer.backend().name)?))
    } else {
        say(&format!("bpfgate: tracing by {}: {}", tracer.backend().name, tracer.backend().blind));
        View::Lines(Lines::new(args)?)
    };
    let result = watch(&mut tracer, &signals, &mut view, args.duration);
    // The screen is given back before anything else is said.
    drop(view);
    let (code, account) = result?;
    if args.json {
        // For who reads the lines later: `caps delta`.
        output::print_json_line(&serde_json::json!({"checks": account.seen, "lost": account.lost}))?;
    }
    say(&output::clean(&format!("bpfgate: {account}")));
    Ok(code)
}

/// Shows what is new until the time is over or somebody ends it.
fn watch(
    tracer: &mut Tracer,
    signals: &Signals,
    view: &mut View,
    duration: Option<Duration>,
) -> Result<(ExitCode, Account), Failure> {
    let end = duration.map(|duration| Instant::now() + duration);
    let mut said = 0;
    loop {
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        let wait = left.map_or(INTERVAL, |left| left.min(INTERVAL));
        let timeout = PollTimeout::try_from(wait).unwrap_or(PollTimeout::ZERO);
        let stdin = std::io::stdin();
        let keys = matches!(view, View::Screen(_)).then(|| stdin.as_fd());
        let event = signals.wait_for(Some(tracer.session()), keys, timeout)?;
        if event == Some(Event::SessionEnded) {
            return Err(Failure::Failed(SESSION_ENDED.to_owned()));
        }
        let ends = match view {
            View::Screen(screen) => screen.obey()?,
            View::Lines(_) => false,
        };
        if ends || event.is_some() || left == Some(Duration::ZERO) {
            let (new, account) = tracer.finish()?;
            view.show(&new, &account)?;
            return Ok((ExitCode::SUCCESS, account));
        }
        let (new, account) = tracer.read()?;
        view.show(&new, &account)?;
        if let View::Lines(_) = view
            && account.lost > said
        {
            said = account.lost;
            say(&format!("bpfgate: {account}"));
        }
    }
}

/// Watches for so long. Gives each kind of check of each process once, with how often it was seen.
pub(crate) fn observe(
    socket: Option<&Path>,
    scope: &Scope,
    duration: Duration,
) -> Result<(Vec<Observation>, Account), Failure> {
    let mut tracer = Tracer::start(socket, scope, true)?;
    let mut all = Distinct::by_process();
    let end = Instant::now() + duration;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        std::thread::sleep(left.min(INTERVAL));
        let (new, account) = if left.is_zero() { tracer.finish()? } else { tracer.read()? };
        for check in new {
            all.add(check);
        }
        if left.is_zero() {
            return Ok((all.into_vec(), account));
        }
    }
}
