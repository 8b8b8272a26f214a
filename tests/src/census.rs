//! The programs, maps, links and BTFs that the kernel holds, by id.

use crate::process;
use crate::{sys, wait_until};
use std::collections::BTreeSet;
use std::time::Duration;

/// What is counted: a name, the key of its id in /proc/PID/fdinfo, and its `BPF_*_GET_NEXT_ID` command.
const KINDS: [(&str, &str, u32); 4] =
    [("program", "prog_id", 11), ("map", "map_id", 12), ("link", "link_id", 31), ("btf", "btf_id", 23)];

/// What keeps a BTF alive: a kind, its `BPF_*_GET_FD_BY_ID` command, and the word of its information that has the
/// id of its BTF (`struct bpf_prog_info`, `struct bpf_map_info`; include/uapi/linux/bpf.h).
const OWNERS: [(&str, u32, usize); 2] = [("program", 13, 32), ("map", 14, 16)];

/// One kernel object: its kind and id. Ids are not used again.
pub type Object = (&'static str, u32);

/// The kernel's objects at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Census(BTreeSet<Object>);

impl Census {
    /// Counts.
    pub fn take() -> Self {
        let mut all = BTreeSet::new();
        for (kind, _, command) in KINDS {
            let mut last = 0;
            while let Some(id) = sys::next_id(command, last) {
                all.insert((kind, id));
                last = id;
            }
        }
        Self(all)
    }

    /// What is there now and was not at `before`.
    pub fn since(&self, before: &Self) -> BTreeSet<Object> {
        self.0.difference(&before.0).copied().collect()
    }
}

/// What is new since `before` and stays for `limit`; what comes and goes meanwhile does not count, nor does what
/// processes other than `ours` hold: other users of BPF on this machine are not our business.
pub fn leftover(before: &Census, limit: Duration, ours: &[i32]) -> BTreeSet<Object> {
    let mut stayed = Census::take().since(before);
    let gone = wait_until(limit, || {
        stayed = stayed.intersection(&Census::take().since(before)).copied().collect();
        stayed.is_empty()
    });
    if gone {
        return stayed;
    }
    for pid in process::all().filter(|pid| !ours.contains(pid)) {
        for text in process::fdinfo(pid) {
            for line in text.lines() {
                let Some((key, id)) = line.split_once(':') else { continue };
                let kind = KINDS.iter().find(|(_, name, _)| *name == key).map(|kind| kind.0);
                if let (Some(kind), Ok(id)) = (kind, id.trim().parse()) {
                    stayed.remove(&(kind, id));
                }
            }
        }
    }
    for (kind, command, btf) in OWNERS {
        for (_, id) in Census::take().0.into_iter().filter(|object| object.0 == kind) {
            // What a program or map of somebody else uses has no descriptor of its own.
            if !stayed.contains(&(kind, id))
                && let Some(info) = sys::info(command, id)
            {
                stayed.remove(&("btf", info[btf]));
            }
        }
    }
    stayed
}
