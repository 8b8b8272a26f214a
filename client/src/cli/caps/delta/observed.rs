//! What a service was seen to ask for: the records of `bpfgate caps trace --json`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::super::set::CapSet;

/// Capabilities that `CAP_SYS_ADMIN` stands in for: the kernel asks for them first, and for it if they are not there.
/// Source: `bpf_capable`, `perfmon_capable` and `checkpoint_restore_ns_capable` in include/linux/capability.h,
/// `check_syslog_permissions` in kernel/printk/printk.c.
const NARROWER: [&str; 4] = ["CAP_BPF", "CAP_PERFMON", "CAP_CHECKPOINT_RESTORE", "CAP_SYSLOG"];

/// The same in bpf(2) only. Source: `bpf_token_capable` in kernel/bpf/token.c.
const NARROWER_IN_BPF: &str = "CAP_NET_ADMIN";

/// One line: checks of one kind by one thread. A line with `lost` alone counts what did not fit into the trace's buffer.
#[derive(Debug, Clone, Deserialize)]
struct Record {
    cap: String,
    pid: u32,
    comm: String,
    #[serde(default)]
    cgroup: Option<String>,
    #[serde(default)]
    unit: Option<String>,
    verdict: Verdict,
    #[serde(default)]
    syscall: Option<String>,
    #[serde(default)]
    bpf: Option<Bpf>,
    class: Class,
    #[serde(default = "once")]
    count: u64,
    /// Seconds since 1970.
    #[serde(default)]
    time: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Granted,
    Denied,
    /// Refused, and the call succeeded all the same.
    Harmless,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Class {
    Need,
    /// The kernel asked for reasons of its own, such as how much memory is left for root.
    Bookkeeping,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
struct Bpf {
    command: String,
    #[serde(rename = "type", default)]
    kind: Option<String>,
}

fn once() -> u64 {
    1
}

/// How often one capability was asked for, in what.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Asked {
    granted: u64,
    refused: u64,
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
    /// Errors: a sentence.
    pub(crate) fn read(path: &Path, unit: &str) -> Result<Self, String> {
        let text = fs::read_to_string(path)
            .map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
        Self::parse(&text, unit).map_err(|(line, why)| {
            format!("{}:{line} is no record of `bpfgate caps trace --json`: {why}", path.display())
        })
    }

    fn parse(text: &str, unit: &str) -> Result<Self, (usize, String)> {
        let mut exercised = Exercised::default();
        let mut records: Vec<(CapSet, Record)> = Vec::new();
        for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
            let wrong = |error: serde_json::Error| (number, error.to_string());
            let value: Value = serde_json::from_str(line).map_err(wrong)?;
            if let (None, Some(lost)) = (value.get("cap"), value.get("lost").and_then(Value::as_u64)) {
                exercised.lost += lost;
                continue;
            }
            let record: Record = serde_json::from_value(value).map_err(wrong)?;
            let capability = CapSet::from_name(&record.cap).map_err(|why| (number, why))?;
            if record.is_of(unit) {
                records.push((capability, record));
            } else {
                exercised.of_others += record.count;
            }
        }
        let needs = needs(&records);
        let all = records.iter().map(|(_, record)| record);
        exercised.checks = all.clone().map(|record| record.count).sum();
        exercised.bookkeeping =
            all.clone().filter(|record| record.class == Class::Bookkeeping).map(|record| record.count).sum();
        exercised.processes = all.clone().map(|record| record.pid).collect::<BTreeSet<_>>().len();
        exercised.syscalls = all.clone().filter_map(|record| record.syscall.clone()).collect();
        exercised.bpf = all.clone().filter_map(|record| Some(record.bpf.as_ref()?.name())).collect();
        let times = || all.clone().filter_map(|record| record.time);
        if let (Some(first), Some(last)) = (times().reduce(f64::min), times().reduce(f64::max)) {
            exercised.seconds = Some(last - first);
        }
        Ok(Self { needs, exercised })
    }

    /// What was had because of `CAP_SYS_ADMIN`.
    pub(crate) fn stood_in(&self) -> CapSet {
        let of_admin = self.needs.iter().filter(|(_, asked)| asked.stood_in > 0);
        of_admin.fold(CapSet::NONE, |set, (one, _)| set.with(CapSet(*one)))
    }
}

impl Record {
    fn is_of(&self, unit: &str) -> bool {
        match (&self.unit, &self.cgroup) {
            (Some(own), _) if own == unit => true,
            // A unit may have cgroups of its own below.
            (_, Some(path)) => path.split('/').any(|part| part == unit),
            _ => false,
        }
    }

    /// The call that the check was made in.
    fn call(&self) -> String {
        match (&self.bpf, &self.syscall) {
            (Some(bpf), _) => format!("bpf {}", bpf.name()),
            (None, Some(name)) => name.clone(),
            (None, None) => "an unknown call".to_owned(),
        }
    }
}

impl Bpf {
    fn name(&self) -> String {
        let command = self.command.strip_prefix("BPF_").unwrap_or(&self.command);
        match &self.kind {
            Some(kind) => format!("{command} {kind}"),
            None => command.to_owned(),
        }
    }
}

fn needs(records: &[(CapSet, Record)]) -> BTreeMap<u64, Asked> {
    let named = |name: &str| CapSet::from_name(name).unwrap_or_default();
    let narrower = NARROWER.iter().fold(CapSet::NONE, |set, name| set.with(named(name)));
    let (of_bpf, admin) = (named(NARROWER_IN_BPF), named("CAP_SYS_ADMIN"));
    // Where CAP_SYS_ADMIN was asked for only because something narrower was not there, by process and call: what was
    // not there, and whether CAP_SYS_ADMIN was.
    let mut instead: BTreeMap<(u32, String), (CapSet, bool)> = BTreeMap::new();
    let of_class = || records.iter().filter(|(_, record)| record.class == Class::Need);
    for (capability, record) in of_class() {
        let entry = instead.entry((record.pid, record.call())).or_default();
        let in_bpf = *capability == of_bpf && record.syscall.as_deref() == Some("bpf");
        if record.verdict != Verdict::Granted && (narrower.has(*capability) || in_bpf) {
            entry.0 = entry.0.with(*capability);
        }
        entry.1 |= *capability == admin && record.verdict == Verdict::Granted;
    }
    let mut needs: BTreeMap<u64, Asked> = BTreeMap::new();
    for (capability, record) in of_class() {
        let (lacking, by_admin) = instead[&(record.pid, record.call())];
        let stands_in = by_admin && lacking.has(*capability);
        let is_need = match record.verdict {
            _ if *capability == admin && !lacking.is_empty() => false,
            Verdict::Granted | Verdict::Denied => true,
            Verdict::Harmless => stands_in,
        };
        if !is_need {
            continue;
        }
        let asked = needs.entry(capability.0).or_default();
        match record.verdict {
            Verdict::Granted => asked.granted += record.count,
            _ if stands_in => asked.stood_in += record.count,
            _ => asked.refused += record.count,
        }
        asked.calls.insert(record.call());
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
            r#"{{"cap":"{cap}","pid":7,"tid":8,"uid":0,"comm":"app","cgroup":"/system.slice/a.service/x","unit":null,"#,
        ) + &format!(
            r#""verdict":"{verdict}","syscall":"{syscall}","bpf":{bpf},"class":"{class}","count":2,"lost":0}}"#
        ) + "\n"
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
        let found = of(&[other, "{\"lost\": 5}\n".to_owned(), line("CAP_BPF", "granted", "bpf", "need")]);
        assert_eq!(set(&found).to_string(), "CAP_BPF");
        let seen = &found.exercised;
        assert_eq!((seen.checks, seen.of_others, seen.lost, seen.processes), (2, 2, 5, 1));
        assert_eq!(seen.bpf.iter().cloned().collect::<Vec<_>>(), ["PROG_LOAD xdp"]);
        assert_eq!(seen.seconds, None);
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
