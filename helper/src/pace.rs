//! How often an app may load: a bucket that holds as many loads as a minute has, and fills at that pace.

use bpfgate_protocol::refusal::Refusal;
use std::time::{Duration, Instant};

const MINUTE: Duration = Duration::from_secs(60);

/// The time by which everything that was taken is paid back.
#[derive(Debug, Default)]
pub(crate) struct Pace(Option<Instant>);

impl Pace {
    /// Takes one of `limit` a minute.
    ///
    /// Errors: `Quota`
    pub(crate) fn one_more(&mut self, limit: u32, now: Instant) -> Result<(), Refusal> {
        let paid = self.0.unwrap_or(now).max(now) + MINUTE / limit.max(1);
        let wait = paid.saturating_duration_since(now + MINUTE);
        if !wait.is_zero() {
            return Err(Refusal::quota(format!(
                "the policy allows {limit} loads a minute; the next one is possible in {} ms",
                wait.as_millis() + 1
            )));
        }
        self.0 = Some(paid);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minute_holds_as_many_as_it_should() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        for _ in 0..6 {
            pace.one_more(6, start).unwrap();
        }
        let refused = pace.one_more(6, start).unwrap_err();
        assert!(refused.why.contains("6 loads a minute") && refused.why.contains("10001 ms"), "{refused}");
        // A refused one costs nothing.
        let later = start + Duration::from_secs(10);
        pace.one_more(6, later).unwrap();
        assert!(pace.one_more(6, later).is_err());
        let much_later = start + 3 * MINUTE;
        for _ in 0..6 {
            pace.one_more(6, much_later).unwrap();
        }
        assert!(pace.one_more(6, much_later).is_err());
    }
}
