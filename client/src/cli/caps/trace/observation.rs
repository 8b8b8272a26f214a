//! A check as it is shown, printed as JSON, and read back from it.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

/// So many kinds are told apart; with all their texts some 50 MB.
const MOST: usize = 65_536;

/// What came of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Verdict {
    /// The capability was there.
    Granted,
    /// It was not, and the system call failed, or it is not known what came of it.
    Denied,
    /// It was not, but the system call succeeded.
    Harmless,
    /// The backend does not see it.
    Unknown,
}

impl Verdict {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Granted => "granted",
            Self::Denied => "denied",
            Self::Harmless => "harmless",
            Self::Unknown => "?",
        }
    }
}

/// What a check is, by the way to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Class {
    /// Somebody may need the capability.
    Need,
    /// The kernel asks and goes on either way.
    Bookkeeping,
    /// The way is not known.
    Unknown,
}

impl Class {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Need => "need",
            Self::Bookkeeping => "bookkeeping",
            Self::Unknown => "unknown",
        }
    }
}

/// A call of bpf(2).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Bpf {
    /// `PROG_LOAD`
    pub(crate) command: String,
    /// Of the program or map that is made: `xdp`, `ringbuf`.
    #[serde(rename = "type")]
    pub(crate) kind: Option<String>,
}

/// Checks that are equal in all of this. When it is read back, what nobody compares by may be missing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Observation {
    /// When the last of them was: seconds since 1970.
    pub(crate) time: f64,
    /// `CAP_NET_ADMIN`
    pub(crate) cap: String,
    #[serde(default)]
    pub(crate) number: u8,
    pub(crate) pid: u32,
    pub(crate) tid: u32,
    pub(crate) uid: u32,
    pub(crate) comm: String,
    /// The path of the cgroup; none if it was gone before it was looked for.
    pub(crate) cgroup: Option<String>,
    #[serde(default)]
    pub(crate) cgroup_id: u64,
    /// The unit, or the last part of the path.
    pub(crate) unit: Option<String>,
    /// The inode of the user namespace where the capability was asked for.
    #[serde(default)]
    pub(crate) userns: u32,
    pub(crate) verdict: Verdict,
    /// Whether the kernel may leave an audit record of a denial; none if that is not known.
    pub(crate) audit: Option<bool>,
    /// None outside of system calls.
    pub(crate) syscall: Option<String>,
    pub(crate) bpf: Option<Bpf>,
    pub(crate) class: Class,
    /// Why it is bookkeeping.
    pub(crate) class_reason: Option<String>,
    pub(crate) count: u64,
    /// The functions on the way to the check, the nearest first.
    #[serde(default)]
    pub(crate) stack: Vec<String>,
}

/// What two checks have in common that are of one kind: not thread and time, and not the stack but its class.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Kind {
    number: u8,
    uid: u32,
    comm: String,
    cgroup: u64,
    userns: u32,
    verdict: Verdict,
    syscall: Option<String>,
    bpf: Option<Bpf>,
    class: Class,
    /// None where other processes are no other kind.
    pid: Option<u32>,
}

impl Kind {
    fn of(check: &Observation, by_process: bool) -> Self {
        Self {
            number: check.number,
            uid: check.uid,
            comm: check.comm.clone(),
            cgroup: check.cgroup_id,
            userns: check.userns,
            verdict: check.verdict,
            syscall: check.syscall.clone(),
            bpf: check.bpf.clone(),
            class: check.class,
            pid: by_process.then_some(check.pid),
        }
    }
}

/// Each kind of check once, counted together.
#[derive(Default)]
pub(super) struct Distinct {
    by_process: bool,
    places: HashMap<Kind, usize>,
    all: Vec<Observation>,
}

impl Distinct {
    /// Those of another process are another kind.
    pub(super) fn by_process() -> Self {
        Self { by_process: true, ..Self::default() }
    }

    /// Whether it is the first of its kind; one more than there is room for is none.
    pub(super) fn add(&mut self, check: Observation) -> bool {
        let kind = Kind::of(&check, self.by_process);
        if let Some(place) = self.places.get(&kind) {
            let known = &mut self.all[*place];
            known.count += check.count;
            (known.time, known.pid, known.tid) = (check.time, check.pid, check.tid);
            return false;
        }
        if self.all.len() >= MOST {
            return false;
        }
        self.places.insert(kind, self.all.len());
        self.all.push(check);
        true
    }

    pub(super) fn all(&self) -> &[Observation] {
        &self.all
    }

    pub(super) fn into_vec(self) -> Vec<Observation> {
        self.all
    }
}

#[cfg(test)]
pub(super) fn example() -> Observation {
    Observation {
        time: 1_795_370_400.25,
        cap: "CAP_BPF".into(),
        number: 39,
        pid: 7,
        tid: 8,
        uid: 1000,
        comm: "loader".into(),
        cgroup: Some("/system.slice/a.service".into()),
        cgroup_id: 4711,
        unit: Some("a.service".into()),
        userns: 0xf000_0000,
        verdict: Verdict::Denied,
        audit: Some(true),
        syscall: Some("bpf".into()),
        bpf: Some(Bpf { command: "PROG_LOAD".into(), kind: Some("xdp".into()) }),
        class: Class::Need,
        class_reason: None,
        count: 3,
        stack: vec!["security_capable".into()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_read_back() {
        let text = serde_json::to_string(&example()).unwrap();
        assert!(
            text.contains(r#""bpf":{"command":"PROG_LOAD","type":"xdp"}"#)
                && text.contains(r#""verdict":"denied""#)
        );
        assert_eq!(serde_json::from_str::<Observation>(&text).unwrap(), example());
    }

    #[test]
    fn one_kind_is_counted_together() {
        let mut all = Distinct::default();
        assert!(all.add(example()));
        assert!(!all.add(Observation { pid: 70, tid: 80, time: 1_795_370_401.0, ..example() }));
        assert!(all.add(Observation { verdict: Verdict::Harmless, ..example() }));
        assert!(all.add(Observation { bpf: None, ..example() }));
        let counts: Vec<u64> = all.all().iter().map(|check| check.count).collect();
        assert_eq!((counts, all.all()[0].pid), (vec![6, 3, 3], 70));
        let mut all = Distinct::by_process();
        assert!(all.add(example()) && all.add(Observation { pid: 70, ..example() }));
    }
}
