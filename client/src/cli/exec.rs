//! `bpfgate exec`: a program with maps, and a session as long as its life.

use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;

use bpfgate_client::exec::{Launch, Running};
use nix::sys::signal::Signal;

use super::Outcome;
use super::args::ExecArgs;
use super::failure::{Failure, complain};
use super::load::{Loaded, SESSION_ENDED, load};
use super::signals::{Event, Signals};

/// What a service manager or a person sends to end or reload a program.
const FORWARDED: [Signal; 6] =
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2];

pub(crate) fn run(socket: Option<&Path>, args: &ExecArgs) -> Outcome {
    let Loaded { client, instance, .. } = load(socket, &args.object)?;
    let Some((program, arguments)) = args.command.split_first() else {
        return Err(Failure::Usage("no program to start".to_owned()));
    };
    let mut launch = Launch::new(program).arguments(arguments);
    for map in instance.maps {
        if let Some(fd) = map.fd {
            launch = launch.descriptor(map.name, fd);
        }
    }
    // Before the start, or a program that ends at once would end unnoticed.
    let signals = Signals::block(&[&FORWARDED[..], &[Signal::SIGCHLD]].concat())?;
    let running = launch.spawn().map_err(|error| {
        Failure::Failed(format!("{} cannot be started: {error}", program.to_string_lossy()))
    })?;
    attend(running, &signals, &client)
}

/// Waits for the program's end, passing signals on meanwhile.
fn attend(mut running: Running, signals: &Signals, session: &impl AsFd) -> Outcome {
    let mut session = Some(session.as_fd());
    loop {
        match signals.wait(session)? {
            Event::SessionEnded => {
                complain(SESSION_ENDED);
                session = None;
            }
            Event::Signal { number, .. } if number == Signal::SIGCHLD as i32 => {
                if let Some(ended) = running.try_wait()? {
                    return Ok(ExitCode::from(ended.status()));
                }
            }
            Event::Signal { from_terminal: true, .. } => {}
            Event::Signal { number, .. } => running.signal(number)?,
        }
    }
}
