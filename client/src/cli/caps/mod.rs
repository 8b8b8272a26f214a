//! `bpfgate caps`: which capabilities are needed and why, who holds them, who was given too many or too few. Nothing here
//! needs privilege: what /proc, unit files and policies say is there for everybody.

mod delta;
pub(crate) mod kernel;
pub(crate) mod need;
pub(crate) mod process;
pub(crate) mod promise;
pub(crate) mod set;
mod show;
pub(crate) mod trace;

use std::path::Path;

use clap::Subcommand;

use super::Outcome;

#[derive(Subcommand, Debug)]
pub(crate) enum CapsCommand {
    /// Show the capability sets of processes, and whether bpfgate's are as promised
    ///
    /// Promised is: broker and loaders hold nothing, a helper holds what its policy needs and nothing else, all of
    /// them gain nothing by exec and are under seccomp. The securebits of other processes cannot be read.
    ///
    /// Exit codes: 0 every process is as promised, or nothing is promised of it; 1 one is not.
    Show(show::Args),
    /// Say which capabilities a policy or an object needs, and why
    ///
    /// For a policy: what its helper is given. For an object: what it takes to load it, and which ways to attach its
    /// programs take more.
    Need(need::Args),
    /// Compare what a service needs with what its unit grants
    ///
    /// Needed is what the policy of an app says, and what the service was seen to ask for. Works for any service.
    /// Prints a drop-in with the evidence, and how much of what the service does stands behind it.
    ///
    /// Exit codes: 0 done; 1 failed or, with --check, something needed is not granted; 4 policy invalid.
    Delta(delta::Args),
    /// Show which capabilities the kernel asks for, of whom, and what comes of it
    ///
    /// Each line is one kind of check: who, which capability, in which system call, how often since the line before of
    /// the same kind. VERDICT is granted, denied, or harmless: denied, but the system call succeeded. CLASS tells what
    /// a program needs from bookkeeping of the kernel, which asks and goes on either way.
    ///
    /// Needs no privilege: the policy of the app cap-trace says who may trace. Ends after --duration or with Ctrl-C; on
    /// a terminal the table takes the screen: q ends it, p pauses it, s changes the order.
    Trace(trace::Args),
}

pub(crate) fn run(socket: Option<&Path>, command: &CapsCommand) -> Outcome {
    match command {
        CapsCommand::Show(args) => show::run(args),
        CapsCommand::Need(args) => need::run(args),
        CapsCommand::Delta(args) => delta::run(socket, args),
        CapsCommand::Trace(args) => trace::run(socket, args),
    }
}
