//! How a helper comes to be: who is asked for a new process.

use bpfgate_protocol::channel::{Channel, ChannelError};
use bpfgate_protocol::messages::spawner::{FromSpawner, ToSpawner};
use bpfgate_protocol::names::AppName;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// After a helper that did not start: 100 ms, doubled each time, at most this.
const MAX_BACKOFF: Duration = Duration::from_secs(5);

/// Who starts helpers.
enum Way {
    /// The spawner: it is asked, and hands over a channel.
    Spawner {
        channel: Channel,
        /// The next datagram is the channel of this app's helper.
        expected: Option<AppName>,
    },
    /// The service manager: it listens on `APP.sock` in this directory, and starts a helper when we connect.
    Sockets(PathBuf),
}

/// The way to new helpers.
pub(crate) struct Starter {
    way: Way,
    /// Apps whose last helper did not start: when to try again, and how long to wait after that.
    backoff: BTreeMap<AppName, (Instant, Duration)>,
}

/// What became of a start.
pub(crate) enum Start {
    Connected(AppName, Channel),
    Failed(AppName, String),
    Nothing,
    /// The spawner is gone: no new helper, ever.
    Over,
}

/// What became of an attempt to start one.
pub(crate) enum Attempt {
    /// Its channel comes from the spawner.
    Asked,
    /// Its channel.
    Connected(Channel),
    /// The last one did not start.
    NotYet,
}

impl Starter {
    pub(crate) fn by_spawner(spawner: Channel) -> std::io::Result<Self> {
        spawner.set_nonblocking()?;
        Ok(Self::new(Way::Spawner { channel: spawner, expected: None }))
    }

    pub(crate) fn by_sockets(place: PathBuf) -> Self {
        Self::new(Way::Sockets(place))
    }

    fn new(way: Way) -> Self {
        Self { way, backoff: BTreeMap::new() }
    }

    /// Helpers are behind sockets: they come and go by themselves.
    pub(crate) fn has_sockets(&self) -> bool {
        matches!(self.way, Way::Sockets(_))
    }

    pub(crate) fn spawner(&self) -> Option<BorrowedFd<'_>> {
        match &self.way {
            Way::Spawner { channel, .. } => Some(channel.as_fd()),
            Way::Sockets(_) => None,
        }
    }

    /// Asks for a helper.
    ///
    /// Errors: a sentence for the log.
    pub(crate) fn start(&mut self, app: &AppName, now: Instant) -> Result<Attempt, String> {
        if self.backoff.get(app).is_some_and(|(until, _)| now < *until) {
            return Ok(Attempt::NotYet);
        }
        match &self.way {
            Way::Spawner { channel, .. } => {
                let spawn = ToSpawner::Spawn { app: app.clone() };
                channel.send(&spawn, &[]).map_err(|e| format!("the spawner: {e}"))?;
                Ok(Attempt::Asked)
            }
            Way::Sockets(place) => {
                let path = place.join(format!("{app}.sock"));
                match Channel::connect(&path) {
                    Ok(channel) => Ok(Attempt::Connected(channel)),
                    Err(ChannelError::NotNow) => Ok(Attempt::NotYet),
                    Err(error) => Err(format!(
                        "{}: {error}; `bpfgate policy apply` makes the socket of a new policy, and \
                         `systemctl status bpfgate-helper@{app}.socket` says what became of it",
                        path.display()
                    )),
                }
            }
        }
    }

    pub(crate) fn succeeded(&mut self, app: &AppName) {
        self.backoff.remove(app);
    }

    pub(crate) fn failed(&mut self, app: &AppName, now: Instant) {
        let last = self.backoff.get(app).map_or(Duration::from_millis(50), |(_, wait)| *wait);
        let wait = (last * 2).min(MAX_BACKOFF);
        self.backoff.insert(app.clone(), (now + wait, wait));
    }

    pub(crate) fn receive(&mut self) -> Start {
        let Way::Spawner { channel, expected } = &mut self.way else { return Start::Nothing };
        if expected.is_none() {
            match channel.recv::<FromSpawner>() {
                Ok((FromSpawner::Spawned { app }, _)) => *expected = Some(app),
                Ok((FromSpawner::Failed { app, why }, _)) => return Start::Failed(app, why),
                Err(ChannelError::NotNow) => return Start::Nothing,
                Err(_) => return Start::Over,
            }
        }
        match channel.take_over() {
            Err(ChannelError::NotNow) => Start::Nothing,
            Err(_) => Start::Over,
            Ok(fd) => match (expected.take(), Channel::from_fd(fd)) {
                (Some(app), Ok(channel)) => Start::Connected(app, channel),
                (Some(app), Err(error)) => Start::Failed(app, error.to_string()),
                (None, _) => Start::Nothing,
            },
        }
    }
}
