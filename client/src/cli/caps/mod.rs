//! `bpfgate caps`: which capabilities are needed and why, who holds them, who was given too many or too few. Nothing here
//! needs privilege: what /proc, unit files and policies say is there for everybody.

mod delta;
pub(crate) mod kernel;
pub(crate) mod need;
pub(crate) mod process;
pub(crate) mod promise;
pub(crate) mod set;
mod show;

use super::Outcome;
use clap::Subcommand;

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
}

pub(crate) fn run(command: &CapsCommand) -> Outcome {
    match command {
        CapsCommand::Show(args) => show::run(args),
        CapsCommand::Need(args) => need::run(args),
        CapsCommand::Delta(args) => delta::run(args),
    }
}
