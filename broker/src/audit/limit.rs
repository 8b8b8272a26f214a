//! How much of a flood is recorded: each user has a share, all together have one, in bytes. What goes beyond is counted,
//! and the last of it is kept: ten seconds later both are recorded.
//!
//! A minute of the worst flood, of as many users as are told apart, is less than 1 MiB.

use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Bytes at once, and bytes a second, of all users that can be kept within bounds.
const ALL: (u64, u64) = (256 << 10, 8 << 10);
/// The same of one user: some 500 records, and then some ten a second.
const EACH: (u64, u64) = (192 << 10, 4 << 10);
/// Users that are told apart; those beyond share one place.
const USERS: usize = 64;
/// From the first record that is not written to the summary.
const SUMMARY: Duration = Duration::from_secs(10);

/// A record.
pub(super) type Fields = Map<String, Value>;

struct Bucket {
    bytes: u64,
    size: (u64, u64),
    filled: Instant,
}

impl Bucket {
    fn new(size: (u64, u64), now: Instant) -> Self {
        Self { bytes: size.0, size, filled: now }
    }

    fn fill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.filled).as_millis();
        let more = u64::try_from(passed).unwrap_or(u64::MAX).saturating_mul(self.size.1) / 1000;
        // Less than a byte stays due.
        if more > 0 {
            self.bytes = self.bytes.saturating_add(more).min(self.size.0);
            self.filled = now;
        }
    }
}

struct User {
    bucket: Bucket,
    /// What was not written since then: how many of which verdict, and the last one.
    since: Option<Instant>,
    counts: BTreeMap<String, u64>,
    last: Fields,
}

pub(super) struct Limit {
    all: Bucket,
    /// None: those beyond [`USERS`].
    users: BTreeMap<Option<u32>, User>,
}

impl Limit {
    pub(super) fn new(now: Instant) -> Self {
        Self { all: Bucket::new(ALL, now), users: BTreeMap::new() }
    }

    fn user(&mut self, uid: u32, now: Instant) -> &mut User {
        if self.users.len() >= USERS && !self.users.contains_key(&Some(uid)) {
            // Who has his whole share again is as good as never seen.
            self.users.retain(|_, user| {
                user.bucket.fill(now);
                user.since.is_some() || user.bucket.bytes < EACH.0
            });
        }
        let known = self.users.contains_key(&Some(uid)) || self.users.len() < USERS;
        self.users.entry(known.then_some(uid)).or_insert_with(|| User {
            bucket: Bucket::new(EACH, now),
            since: None,
            counts: BTreeMap::new(),
            last: Fields::new(),
        })
    }

    /// Whether a record of this user and this length is written.
    pub(super) fn admits(&mut self, uid: u32, bytes: usize, now: Instant) -> bool {
        let bytes = bytes as u64;
        self.all.fill(now);
        let left = self.all.bytes;
        let user = self.user(uid, now);
        user.bucket.fill(now);
        // Not before the summary: what is kept would not be the last.
        let admitted = user.since.is_none() && user.bucket.bytes >= bytes && left >= bytes;
        if admitted {
            user.bucket.bytes -= bytes;
            self.all.bytes -= bytes;
        }
        admitted
    }

    /// A record that is not written.
    pub(super) fn suppress(&mut self, uid: u32, record: Fields, now: Instant) {
        let user = self.user(uid, now);
        user.since.get_or_insert(now);
        let verdict = record.get("verdict").and_then(Value::as_str).unwrap_or_default().to_owned();
        *user.counts.entry(verdict).or_default() += 1;
        user.last = record;
    }

    /// When the next summary is due.
    pub(super) fn due(&self) -> Option<Instant> {
        self.users.values().filter_map(|user| user.since).min().map(|since| since + SUMMARY)
    }

    /// What is due: the last record of each flood, and how many went before it unwritten.
    pub(super) fn summaries(&mut self, now: Instant) -> Vec<Fields> {
        let mut due = Vec::new();
        for (uid, user) in &mut self.users {
            if user.since.is_none_or(|since| now < since + SUMMARY) {
                continue;
            }
            user.since = None;
            // The last one is written after all.
            let last = std::mem::take(&mut user.last);
            let verdict = last.get("verdict").and_then(Value::as_str).unwrap_or_default().to_owned();
            let mut counts = std::mem::take(&mut user.counts);
            if let Some(count) = counts.get_mut(&verdict) {
                *count -= 1;
            }
            counts.retain(|_, count| *count > 0);
            due.push(last);
            if counts.is_empty() {
                continue;
            }
            let summary = json!({
                "verb": "Summary",
                "verdict": "suppressed",
                "uid": uid,
                "suppressed": counts,
                "why": "more decisions than are recorded one by one; the last of them is the record before this one",
            });
            if let Value::Object(summary) = summary {
                due.push(summary);
            }
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(number: u64) -> Fields {
        let Value::Object(record) = json!({"verdict": "Denied", "number": number}) else { unreachable!() };
        record
    }

    /// Bytes that are recorded of a flood of so many users, a minute long.
    fn flood(users: u32) -> (u64, u64, u64, Option<u64>) {
        const LINE: usize = 400;
        let start = Instant::now();
        let mut limit = Limit::new(start);
        let (mut bytes, mut written, mut counted, mut last) = (0, 0, 0, None);
        // A minute, and two minutes of quiet after it.
        for tick in 0..1200u64 {
            let now = start + Duration::from_millis(50 * tick);
            for uid in 0..users {
                if limit.admits(uid, LINE, now) {
                    (bytes, written) = (bytes + LINE as u64, written + 1);
                } else {
                    limit.suppress(uid, record(tick), now);
                }
            }
            for summary in limit.summaries(now) {
                bytes += LINE as u64;
                match summary.get("suppressed") {
                    Some(counts) => counted += counts["Denied"].as_u64().unwrap(),
                    None => written += 1,
                }
            }
        }
        for summary in limit.summaries(start + Duration::from_secs(180)) {
            if let Some(counts) = summary.get("suppressed") {
                counted += counts["Denied"].as_u64().unwrap();
            } else {
                written += 1;
                last = summary["number"].as_u64();
            }
        }
        assert_eq!(limit.due(), None);
        (bytes, written, counted, last)
    }

    #[test]
    fn a_flood_is_bounded_counted_and_its_last_record_kept() {
        for users in [1, 3, 64, 200] {
            let (bytes, written, counted, last) = flood(users);
            println!("{users} users: {} KiB, {written} records, {counted} counted", bytes >> 10);
            assert!(bytes <= 1 << 20, "{users} users: {bytes} bytes");
            assert_eq!(written + counted, 1200 * u64::from(users), "{users} users");
            assert_eq!(last, Some(1199), "{users} users");
        }
    }

    #[test]
    fn a_flood_of_one_does_not_silence_another() {
        let now = Instant::now();
        let mut limit = Limit::new(now);
        while limit.admits(1, 400, now) {}
        assert!(limit.admits(2, 400, now));
    }

    #[test]
    fn what_comes_now_and_then_is_all_recorded() {
        let start = Instant::now();
        let mut limit = Limit::new(start);
        assert!((0..2000).all(|second| limit.admits(1, 400, start + Duration::from_secs(second))));
    }
}
