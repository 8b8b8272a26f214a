//! What a service was seen to ask for: what `bpfgate caps trace` shows.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::super::set::CapSet;
use super::super::trace::{Account, Bpf, Class, Observation, Verdict};

/// Capabilities that `CAP_SYS_ADMIN` stands in for: the kernel asks for them first, and for it if they are not there.
/// Source: `bpf_capable`, `perfmon_capable` and `checkpoint_restore_ns_capable` in include/linux/capability.h,
/// `check_syslog_permissions` in kernel/printk/printk.c.
const NARROWER: [&str; 4] = ["CAP_BPF", "CAP_PERFMON", "CAP_CHECKPOINT_RESTORE", "CAP_SYSLOG"];

/// The same in bpf(2) only. Source: `bpf_token_capable` in kernel/bpf/token.c.
const NARROWER_IN_BPF: &str = "CAP_NET_ADMIN";

/// How often one capability was asked for, in what.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Asked {
    granted: u64,
    refused: u64,
    /// The trace did not see what came of it.
    unseen: u64,
    /// `CAP_SYS_ADMIN` was taken for it.
    stood_in: u64,
    calls: BTreeSet<String>,
    names: BTreeSet<String>,
}

impl Asked {
    /// Evidence, for people.
    pub(crate) fn sentence(&self) -> String {
        let counts = [
            (self.granted, "granted"),
            (self.refused, "refused"),
            (self.unseen, "asked for, with an outcome that the trace did not see,"),
            (self.stood_in, "granted because of CAP_SYS_ADMIN"),
        ];
        let times = |(count, how): &(u64, &str)| {
            format!("{count} {} {how}", if *count == 1 { "time" } else { "times" })
        };
        let counts: Vec<String> = counts.iter().filter(|(count, _)| *count > 0).map(times).collect();
        let list = |set: &BTreeSet<String>| set.iter().cloned().collect::<Vec<_>>().join(", ");
        format!("observed: {} in {} of {}", counts.join(", "), list(&self.calls), list(&self.names))
    }
}

/// How much was seen.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(crate) struct Exercised {
    pub(crate) checks: u64,
    /// Between the first and the last, if the records say when they were made.
    pub(crate) seconds: Option<f64>,
    pub(crate) processes: usize,
    pub(crate) syscalls: BTreeSet<String>,
    /// `PROG_LOAD xdp`
    pub(crate) bpf: BTreeSet<String>,
    /// Checks that are no needs.
    pub(crate) bookkeeping: u64,
    /// Records of other units.
    pub(crate) of_others: u64,
    pub(crate) lost: u64,
}

/// What one unit asked for.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Observed {
    /// What it needs, by capability.
    pub(crate) needs: BTreeMap<u64, Asked>,
    pub(crate) exercised: Exercised,
}

impl Observed {
    /// Of records that were kept in a file.
    ///
    /// Errors: a sentence.
    pub(crate) fn read(path: &Path, unit: &str) -> Result<Self, String> {
        let text = fs::read_to_string(path)
            .map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
        Self::parse(&text, unit).map_err(|(line, why)| {
            format!("{}:{line} is no record of `bpfgate caps trace --json`: {why}", path.display())
        })
    }

    fn parse(text: &str, unit: &str) -> Result<Self, (usize, String)> {
        let (mut records, mut of_others, mut lost) = (Vec::new(), 0, 0);
        for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
            let wrong = |error: serde_json::Error| (number, error.to_string());
            let value: Value = serde_json::from_str(line).map_err(wrong)?;
            // The last line of a trace.
            if let (None, Some(more)) = (value.get("cap"), value.get("lost").and_then(Value::as_u64)) {
                lost += more;
                continue;
            }
            let record: Observation = serde_json::from_value(value).map_err(wrong)?;
            let capability = CapSet::from_name(&record.cap).map_err(|why| (number, why))?;
            if is_of(&record, unit) {
                records.push((capability, record));
            } else {
                of_others += record.count;
            }
        }
        let times = || records.iter().map(|(_, record)| record.time);
        let seconds =
            times().reduce(f64::max).zip(times().reduce(f64::min)).map(|(last, first)| last - first);
        Ok(Self::of(&records, Exercised { seconds, of_others, lost, ..Exercised::default() }))
    }

    /// Of what was watched for so long.
    pub(crate) fn watched(checks: Vec<Observation>, account: &Account, duration: Duration) -> Self {
        let named = |check: Observation| Some((CapSet::from_name(&check.cap).ok()?, check));
        let records: Vec<_> = checks.into_iter().filter_map(named).collect();
        let seconds = Some(duration.as_secs_f64());
        Self::of(&records, Exercised { seconds, lost: account.lost, ..Exercised::default() })
    }

    fn of(records: &[(CapSet, Observation)], mut exercised: Exercised) -> Self {
        let all = || records.iter().map(|(_, record)| record);
        exercised.checks = all().map(|record| record.count).sum();
        exercised.bookkeeping =
            all().filter(|record| record.class == Class::Bookkeeping).map(|record| record.count).sum();
        exercised.processes = all().map(|record| record.pid).collect::<BTreeSet<_>>().len();
        exercised.syscalls = all().filter_map(|record| record.syscall.clone()).collect();
        exercised.bpf = all().filter_map(|record| Some(bpf(record.bpf.as_ref()?))).collect();
        Self { needs: needs(records), exercised }
    }

    /// What was had because of `CAP_SYS_ADMIN`.
    pub(crate) fn stood_in(&self) -> CapSet {
        let of_admin = self.needs.iter().filter(|(_, asked)| asked.stood_in > 0);
        of_admin.fold(CapSet::NONE, |set, (one, _)| set.with(CapSet(*one)))
    }
}

fn is_of(record: &Observation, unit: &str) -> bool {
    // A unit may have cgroups of its own below.
    record.unit.as_deref() == Some(unit)
        || record.cgroup.iter().any(|path| path.split('/').any(|part| part == unit))
}

/// The call that the check was made in.
fn call(record: &Observation) -> String {
    match (&record.bpf, &record.syscall) {
        (Some(of_bpf), _) => format!("bpf {}", bpf(of_bpf)),
        (None, Some(name)) => name.clone(),
        (None, None) => "the kernel itself".to_owned(),
    }
}

fn bpf(call: &Bpf) -> String {
    match &call.kind {
        Some(kind) => format!("{} {kind}", call.command),
        None => call.command.clone(),
    }
}

fn needs(records: &[(CapSet, Observation)]) -> BTreeMap<u64, Asked> {
    let named = |name: &str| CapSet::from_name(name).unwrap_or_default();
    let narrower = NARROWER.iter().fold(CapSet::NONE, |set, name| set.with(named(name)));
    let (of_bpf, admin) = (named(NARROWER_IN_BPF), named("CAP_SYS_ADMIN"));
    // Where CAP_SYS_ADMIN was asked for only because something narrower was not there, by process and call: what was
    // not there, and whether CAP_SYS_ADMIN was.
    let mut instead: BTreeMap<(u32, String), (CapSet, bool)> = BTreeMap::new();
    // What has no class may be a need.
    let of_class = || records.iter().filter(|(_, record)| record.class != Class::Bookkeeping);
    for (capability, record) in of_class() {
        let entry = instead.entry((record.pid, call(record))).or_default();
        let in_bpf = *capability == of_bpf && record.syscall.as_deref() == Some("bpf");
        if record.verdict != Verdict::Granted && (narrower.has(*capability) || in_bpf) {
            entry.0 = entry.0.with(*capability);
        }
        entry.1 |= *capability == admin && record.verdict == Verdict::Granted;
    }
    let mut needs: BTreeMap<u64, Asked> = BTreeMap::new();
    for (capability, record) in of_class() {
        let (lacking, by_admin) = instead[&(record.pid, call(record))];
        let stands_in = by_admin && lacking.has(*capability);
        let is_need = match record.verdict {
            _ if *capability == admin && !lacking.is_empty() => false,
            Verdict::Granted | Verdict::Denied | Verdict::Unknown => true,
            Verdict::Harmless => stands_in,
        };
        if !is_need {
            continue;
        }
        let asked = needs.entry(capability.0).or_default();
        match record.verdict {
            Verdict::Granted => asked.granted += record.count,
            _ if stands_in => asked.stood_in += record.count,
            Verdict::Unknown => asked.unseen += record.count,
            _ => asked.refused += record.count,
        }
        asked.calls.insert(call(record));
        asked.names.insert(record.comm.clone());
    }
    needs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(cap: &str, verdict: &str, syscall: &str, class: &str) -> String {
        let bpf = if syscall == "bpf" { r#"{"command":"PROG_LOAD","type":"xdp"}"# } else { "null" };
        format!(
            r#"{{"time":1.5,"cap":"{cap}","number":0,"pid":7,"tid":8,"uid":0,"comm":"app","cgroup":"/system.slice/a.service/x","#,
        ) + r#""cgroup_id":9,"unit":null,"userns":1,"audit":true,"class_reason":null,"stack":[],"#
            + &format!(
                r#""verdict":"{verdict}","syscall":"{syscall}","bpf":{bpf},"class":"{class}","count":2}}"#
            )
            + "\n"
    }

    fn of(lines: &[String]) -> Observed {
        Observed::parse(&lines.concat(), "a.service").unwrap()
    }

    fn set(observed: &Observed) -> CapSet {
        observed.needs.keys().fold(CapSet::NONE, |set, one| set.with(CapSet(*one)))
    }

    fn needed(lines: &[String]) -> String {
        set(&of(lines)).to_string()
    }

    #[test]
    fn what_was_granted_or_refused_is_needed() {
        assert_eq!(needed(&[line("CAP_CHOWN", "granted", "fchown", "need")]), "CAP_CHOWN");
        let refused = of(&[line("cap_net_raw", "denied", "socket", "need")]);
        let sentence = refused.needs[&(1 << 13)].sentence();
        assert_eq!(sentence, "observed: 2 times refused in socket of app");
        assert_eq!(needed(&[line("CAP_CHOWN", "harmless", "fchown", "need")]), "none");
        let bookkeeping = of(&[line("CAP_SYS_ADMIN", "granted", "mmap", "bookkeeping")]);
        assert_eq!((set(&bookkeeping), bookkeeping.exercised.bookkeeping), (CapSet::NONE, 2));
    }

    #[test]
    fn sys_admin_that_stands_in_is_no_need() {
        let admin = |verdict, call| line("CAP_SYS_ADMIN", verdict, call, "need");
        let bpf = line("CAP_BPF", "harmless", "bpf", "need");
        let net = line("CAP_NET_ADMIN", "harmless", "bpf", "need");
        let found = of(&[bpf.clone(), net.clone(), admin("granted", "bpf")]);
        assert_eq!(set(&found).to_string(), "CAP_NET_ADMIN CAP_BPF");
        let sentence = found.needs[&(1 << 39)].sentence();
        assert_eq!(
            sentence,
            "observed: 2 times granted because of CAP_SYS_ADMIN in bpf PROG_LOAD xdp of app"
        );
        // Neither was there.
        let denied = line("CAP_BPF", "denied", "bpf", "need");
        assert_eq!(needed(&[denied, admin("denied", "bpf")]), "CAP_BPF");
        // In another call it is a need of its own; CAP_NET_ADMIN elsewhere is not what it stands in for.
        assert_eq!(
            needed(&[bpf, admin("granted", "bpf"), admin("granted", "mount")]),
            "CAP_SYS_ADMIN CAP_BPF"
        );
        let elsewhere = line("CAP_NET_ADMIN", "denied", "setsockopt", "need");
        assert_eq!(needed(&[elsewhere, admin("granted", "setsockopt")]), "CAP_NET_ADMIN CAP_SYS_ADMIN");
    }

    #[test]
    fn records_of_others_and_lost_ones_are_counted_apart() {
        let other = line("CAP_CHOWN", "granted", "fchown", "need").replace("a.service", "b.service");
        let found = of(&[
            other,
            "{\"checks\": 9, \"lost\": 5}\n".to_owned(),
            line("CAP_BPF", "granted", "bpf", "need"),
        ]);
        assert_eq!(set(&found).to_string(), "CAP_BPF");
        let seen = &found.exercised;
        assert_eq!((seen.checks, seen.of_others, seen.lost, seen.processes), (2, 2, 5, 1));
        assert_eq!(seen.bpf.iter().cloned().collect::<Vec<_>>(), ["PROG_LOAD xdp"]);
        assert_eq!(seen.seconds, Some(0.0));
    }

    #[test]
    fn what_is_no_record_is_refused_with_its_line() {
        let good = line("CAP_BPF", "granted", "bpf", "need");
        let fails = |bad: &str| Observed::parse(&format!("{good}\n{bad}"), "a.service").unwrap_err();
        assert_eq!(fails("nonsense").0, 3);
        assert_eq!(fails(&good.replace("granted", "perhaps")).0, 3);
        assert_eq!(fails(&good.replace("CAP_BPF", "CAP_NOSUCH")).1, "CAP_NOSUCH is no capability");
    }
}
