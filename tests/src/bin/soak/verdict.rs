//! What held, and the figures behind it.

use std::fmt;

/// All promises that were looked at.
#[derive(Default)]
pub(crate) struct Verdict(Vec<(&'static str, bool, String)>);

impl Verdict {
    /// A promise was looked at: did it hold, and what was seen.
    pub(crate) fn held(&mut self, promise: &'static str, held: bool, seen: String) {
        eprintln!("soak: {promise}: {seen}");
        self.0.push((promise, held, seen));
    }

    pub(crate) fn all_held(&self) -> bool {
        self.0.iter().all(|(_, held, _)| *held)
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<32} {:<6}  SEEN", "PROMISE", "HELD")?;
        for (promise, held, seen) in &self.0 {
            writeln!(f, "{promise:<32} {:<6}  {seen}", if *held { "yes" } else { "NO" })?;
        }
        Ok(())
    }
}
