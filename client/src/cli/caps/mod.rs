//! `bpfgate caps`: capabilities made visible.

pub(crate) mod trace;

use std::path::Path;

use clap::Subcommand;

use super::Outcome;

#[derive(Subcommand, Debug)]
pub(crate) enum CapsCommand {
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
        CapsCommand::Trace(args) => trace::run(socket, args),
    }
}
