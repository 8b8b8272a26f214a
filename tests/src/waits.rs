//! How long requests take, and whether something else makes them longer. Both are measured in turns, so that they meet
//! the same machine.

use crate::all_attacks;
use std::fmt;
use std::time::{Duration, Instant};

/// What the scheduler may add to one request in a hundred that meets more processes than there are processors: each of
/// broker and helper may find that another one has its processor until the next tick, which comes every 10 ms at 100 Hz.
const TICKS: Duration = Duration::from_millis(20);

/// So many, for what is said of one in a hundred.
const ENOUGH: usize = 50;

/// How long each of many requests took.
#[derive(Default)]
pub struct Waits {
    all: Vec<Duration>,
    /// Those in whose time this machine had its processors to itself. It may be one of several on another one, which then
    /// has them.
    undisturbed: Vec<Duration>,
}

/// For how long in all other machines had the processors of this one, in ticks; 0 where nobody knows.
fn stolen() -> u64 {
    let text = std::fs::read_to_string("/proc/stat").expect("/proc is mounted");
    // The first line is of all processors: user, nice, system, idle, iowait, irq, softirq, steal.
    text.split_whitespace().nth(8).and_then(|ticks| ticks.parse().ok()).unwrap_or(0)
}

fn percentile(waits: &[Duration], percent: usize) -> Duration {
    let mut all = waits.to_vec();
    all.sort_unstable();
    all.get(all.len().saturating_sub(1) * percent / 100).copied().unwrap_or_default()
}

impl Waits {
    /// Measures one.
    pub fn time(&mut self, request: impl FnOnce()) {
        let before = stolen();
        let start = Instant::now();
        request();
        let took = start.elapsed();
        self.all.push(took);
        if stolen() == before {
            self.undisturbed.push(took);
        }
    }

    /// Half of all took no longer.
    pub fn median(&self) -> Duration {
        percentile(&self.all, 50)
    }

    /// So many of a hundred took no longer, of those that nobody disturbed.
    pub fn percentile(&self, percent: usize) -> Duration {
        percentile(&self.undisturbed, percent)
    }

    /// Whether these take less than twice as long as `alone`: half of them strictly; and of those that nobody disturbed all
    /// but one in a hundred, within what the scheduler may add. That is for a machine that does nothing else, as under `make
    /// attack`; an ordinary run judges what no busy machine explains, five times.
    pub fn are_hardly_longer_than(&self, alone: &Self) -> bool {
        let (times, ticks) = if all_attacks() { (2, TICKS) } else { (5, 5 * TICKS) };
        let enough = [self, alone].iter().all(|waits| waits.undisturbed.len() >= ENOUGH);
        let late = enough && self.percentile(99) >= alone.percentile(99) * times + ticks;
        self.median() < alone.median() * times && !late
    }
}

impl fmt::Display for Waits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (all, undisturbed) = (self.all.len(), self.undisturbed.len());
        write!(f, "p50 {:?} of {all}, p99 {:?} of {undisturbed}", self.median(), self.percentile(99))
    }
}
