//! What is to be done now and then, whether or not anybody asks: say that we are alive, look after what is loaded at
//! boot, and end when nothing is left to do.

use crate::boot::{AGAIN, Boot};
use crate::state::State;
use bpfgate_lockdown::{Fatal, Step};
use std::time::{Duration, Instant};

/// A helper that nobody uses ends, so that the next one reads the policy and its objects anew.
const IDLE: Duration = Duration::from_secs(30);

/// How long to try at boot before a new start, which opens anew what the policy names: a cgroup may come late.
const STUCK: Duration = Duration::from_secs(30);

pub(crate) struct Rounds {
    boot: Option<Boot>,
    /// None: standalone, where the broker says when to end, and no clock is asked: there is no system call for it.
    clock: Option<Clock>,
}

struct Clock {
    /// Since when something at boot waits for a new start.
    stuck_since: Option<Instant>,
    idle_since: Instant,
    look: Instant,
    beat: Option<Instant>,
    now: Instant,
}

impl Rounds {
    pub(crate) fn new(boot: Option<Boot>, alone: bool) -> Self {
        let now = Instant::now();
        let clock =
            (!alone).then_some(Clock { stuck_since: None, idle_since: now, look: now, beat: Some(now), now });
        Self { boot, clock }
    }

    /// The first look, before anybody is told that this process is ready.
    pub(crate) fn begin(&mut self, state: &mut State) {
        if let Some(boot) = &mut self.boot {
            boot.look(state);
        }
    }

    /// What is due at boot is due now: the policy is another one.
    pub(crate) fn hurry(&mut self) {
        if let Some(clock) = &mut self.clock {
            clock.look = clock.now;
        }
    }

    /// How long to wait for a request at most.
    pub(crate) fn timeout(&self) -> Option<Duration> {
        let Some(clock) = &self.clock else { return self.boot.as_ref().map(|_| AGAIN) };
        let look = self.boot.as_ref().map(|_| clock.look);
        let next = look.into_iter().chain(clock.beat).chain([clock.idle_since + IDLE]).min()?;
        Some(next.saturating_duration_since(clock.now) + Duration::from_millis(1))
    }

    /// Does what is due; whether this process is to end.
    pub(crate) fn go(&mut self, state: &mut State, used: bool) -> Result<bool, Fatal> {
        let Some(clock) = &mut self.clock else {
            if let Some(boot) = &mut self.boot {
                boot.look(state);
            }
            return Ok(false);
        };
        let now = Instant::now();
        clock.now = now;
        state.store.manager.beat(now).step("the service manager")?;
        clock.beat = state.store.manager.next_beat();
        if let Some(boot) = &mut self.boot {
            if clock.look <= now {
                boot.look(state);
                clock.look = now + AGAIN;
                clock.stuck_since = boot.stuck.then(|| *clock.stuck_since.get_or_insert(now));
            }
            if clock.stuck_since.is_some_and(|since| now >= since + STUCK) && state.sessions.is_empty() {
                return Err(Fatal(
                    "a new start opens anew what the policy names; what is attached goes on".into(),
                ));
            }
            clock.idle_since = now;
        }
        if used {
            clock.idle_since = now;
        }
        Ok(now >= clock.idle_since + IDLE)
    }
}
