//! The program in the kernel: loaded through the broker, attached, and read. This process holds no capability.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use bpfgate_client::{Client, Error, Instance, LinkId, LoadOptions, Map, Pair, UpdateMode};
use nix::time::{ClockId, clock_gettime};

use super::cgroups::{self, Cgroups};
use super::class;
use super::layout::{self, Check, Tally, Total};
use super::names;
use super::observation::{Bpf, Observation, Verdict};
use super::scope::{Scope, Target};
use crate::cli::failure::Failure;

/// The app and the object of the policy.
const APP: &str = "cap-trace";
const OBJECT: &str = "trace";
/// The program that sees how system calls end.
const ON_EXIT: &str = "on_syscall_exit";

/// A program that sees the checks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Backend {
    pub(super) name: &'static str,
    program: &'static str,
    /// What it cannot see.
    pub(super) blind: &'static str,
}

/// The best first.
const BACKENDS: [Backend; 3] = [
    Backend {
        name: "raw tracepoint cap_capable",
        program: "on_tracepoint",
        blind: "it does not see whether a check is left out of audit; that is told from the stack",
    },
    Backend {
        name: "fexit on cap_capable",
        program: "on_fexit",
        blind: "it does not see a check that preempts another one on the same CPU",
    },
    Backend { name: "kprobe on cap_capable", program: "on_kprobe", blind: "it does not see the verdict" },
];

/// From here on entries that nobody adds to are taken out of the table in the kernel, whose room is 4 times that.
const CROWDED: usize = 4096;
/// So many nanoseconds nobody has added to an entry that is taken out.
const IDLE: i64 = 2_000_000_000;

/// How much was seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Account {
    /// Checks in the scope.
    pub(crate) seen: u64,
    /// Of them shown nowhere.
    pub(crate) lost: u64,
    /// Of them without a stack, and so of no class.
    pub(crate) unplaced: u64,
    /// Denied, and what came of the system call is not known.
    pub(crate) unfollowed: u64,
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} checks", self.seen)?;
        match self.lost {
            0 => f.write_str(", none lost")?,
            lost => {
                write!(f, ", {lost} of them lost: there are too many kinds at a time, trace less at once")?;
            }
        }
        if self.unplaced > 0 {
            write!(f, "; {} have no stack, and so no class", self.unplaced)?;
        }
        if self.unfollowed > 0 {
            write!(
                f,
                "; of {} denied ones it is not known whether their system call succeeded",
                self.unfollowed
            )?;
        }
        Ok(())
    }
}

/// What was told of an entry already.
#[derive(Clone, Copy, Default)]
struct Told {
    plain: u64,
    harmless: u64,
}

pub(super) struct Tracer {
    client: Client,
    backend: Backend,
    links: Vec<LinkId>,
    checks: Map,
    stacks: Map,
    totals: Map,
    told: HashMap<Vec<u8>, Told>,
    functions: HashMap<u64, Vec<String>>,
    cgroups: Cgroups,
    /// Nanoseconds from `CLOCK_MONOTONIC` to the time of day.
    since_1970: i64,
}

impl Tracer {
    /// Starts with the best backend that this kernel and the policy have.
    pub(super) fn start(socket: Option<&Path>, scope: &Scope, outcome: bool) -> Result<Self, Failure> {
        give_up_privilege()?;
        let mut cgroups = Cgroups::new();
        let target = scope.resolve(&mut cgroups)?;
        cgroups.look();
        let mut client = Client::connect(socket)?;
        client.open(APP).map_err(who_may)?;
        let mut tried = Vec::new();
        for backend in BACKENDS {
            match attach(&mut client, backend, &target, outcome) {
                Ok((mut instance, links)) => {
                    let maps = [
                        instance.take_map("checks")?,
                        instance.take_map("stacks")?,
                        instance.take_map("totals")?,
                    ];
                    let [checks, stacks, totals] = maps;
                    let (told, functions) = (HashMap::new(), HashMap::new());
                    let since_1970 =
                        nanoseconds(ClockId::CLOCK_REALTIME)? - nanoseconds(ClockId::CLOCK_MONOTONIC)?;
                    return Ok(Self {
                        client,
                        backend,
                        links,
                        checks,
                        stacks,
                        totals,
                        told,
                        functions,
                        cgroups,
                        since_1970,
                    });
                }
                Err(Failure::Client(error)) if is_about_the_backend(&error) => {
                    tried.push(format!("{}: {error}", backend.name));
                }
                Err(failure) => return Err(failure),
            }
        }
        Err(Failure::Failed(format!("capability checks cannot be traced here; {}", tried.join("; "))))
    }

    pub(super) fn backend(&self) -> Backend {
        self.backend
    }

    /// For polling: the broker never speaks first.
    pub(super) fn session(&self) -> BorrowedFd<'_> {
        self.client.as_fd()
    }

    /// What is new since the last time.
    pub(super) fn read(&mut self) -> Result<(Vec<Observation>, Account), Failure> {
        self.news(false)
    }

    /// Detaches the programs and gives what is left. A system call that goes on then is taken for one that fails.
    pub(super) fn finish(&mut self) -> Result<(Vec<Observation>, Account), Failure> {
        for link in self.links.drain(..) {
            self.client.detach(link)?;
        }
        self.news(true)
    }

    fn news(&mut self, is_last: bool) -> Result<(Vec<Observation>, Account), Failure> {
        // Before the entries: what is lost afterwards is told next time.
        let account = self.account()?;
        let entries = self.checks.entries()?;
        let crowded = entries.len() >= CROWDED;
        let now = nanoseconds(ClockId::CLOCK_MONOTONIC)?;
        let mut news = Vec::new();
        for Pair { key, value } in entries {
            let (Some(check), Some(tally)) = (Check::read(&key), Tally::read(&value)) else {
                return Err(another_version());
            };
            let open = if is_last { 0 } else { tally.open };
            // While the kernel counts, one part of a tally may be ahead of the others: what is missing comes next time.
            let plain = tally.count.saturating_sub(tally.harmless).saturating_sub(open);
            let told = self.told.get(&key).copied().unwrap_or_default();
            let new = [
                (verdict(&check), plain.saturating_sub(told.plain)),
                (Verdict::Harmless, tally.harmless.saturating_sub(told.harmless)),
            ];
            for (verdict, count) in new.into_iter().filter(|(_, count)| *count > 0) {
                news.push(self.observation(&check, tally.last, verdict, count)?);
            }
            let last = i64::try_from(tally.last).unwrap_or(i64::MAX);
            if crowded && tally.open == 0 && now.saturating_sub(last) > IDLE {
                self.checks.delete(&key)?;
                self.told.remove(&key);
            } else {
                self.told.insert(
                    key,
                    Told { plain: plain.max(told.plain), harmless: tally.harmless.max(told.harmless) },
                );
            }
        }
        news.sort_by(|a, b| a.time.total_cmp(&b.time));
        Ok((news, account))
    }

    fn account(&self) -> Result<Account, Failure> {
        let mut total = Total::default();
        let values = self.totals.lookup_per_cpu(&0u32.to_ne_bytes())?.unwrap_or_default();
        for value in values {
            total.add(&value).ok_or_else(another_version)?;
        }
        let Total { seen, lost, unplaced, unfollowed } = total;
        Ok(Account { seen, lost, unplaced, unfollowed })
    }

    fn observation(
        &mut self,
        check: &Check,
        last: u64,
        verdict: Verdict,
        count: u64,
    ) -> Result<Observation, Failure> {
        let stack = self.functions(check.stack)?;
        let (class, reason) = class::class(&stack, check.cap);
        let audit = match check.audit {
            layout::AUDIT_YES => Some(true),
            layout::AUDIT_NO => Some(false),
            _ => class::audit(&stack),
        };
        let cgroup = self.cgroups.path(check.cgroup).map(str::to_owned);
        let bpf = check.bpf_command.map(|command| Bpf {
            command: names::bpf_command(command),
            kind: check.bpf_type.map(|number| names::bpf_type(command, number)),
        });
        Ok(Observation {
            time: self.time(last),
            cap: names::capability(check.cap),
            number: check.cap,
            pid: check.tgid,
            tid: check.tid,
            uid: check.uid,
            comm: check.comm.clone(),
            unit: cgroup.as_deref().map(cgroups::unit),
            cgroup,
            cgroup_id: check.cgroup,
            userns: check.userns,
            verdict,
            audit,
            syscall: match check.syscall {
                layout::SYSCALL_NOT_SEEN => Some("?".to_owned()),
                number if number < 0 => None,
                number => Some(names::syscall(number, check.compat)),
            },
            bpf,
            class,
            class_reason: reason.map(str::to_owned),
            count,
            stack,
        })
    }

    /// The functions of a stack. There is room for so many, and what is in there does not change.
    fn functions(&mut self, stack: u64) -> Result<Vec<String>, Failure> {
        if let Some(known) = self.functions.get(&stack) {
            return Ok(known.clone());
        }
        let names = self.stacks.lookup(&stack.to_ne_bytes())?.unwrap_or_default();
        let functions = class::functions(&layout::text(&names));
        self.functions.insert(stack, functions.clone());
        Ok(functions)
    }

    /// A time of the program as seconds since 1970.
    #[allow(clippy::cast_precision_loss, reason = "milliseconds are enough")]
    fn time(&self, monotonic: u64) -> f64 {
        let milliseconds = i64::try_from(monotonic).unwrap_or(0).saturating_add(self.since_1970) / 1_000_000;
        milliseconds as f64 / 1000.0
    }
}

/// Loads and attaches one backend; what it began is undone if that fails.
fn attach(
    client: &mut Client,
    backend: Backend,
    target: &Target,
    outcome: bool,
) -> Result<(Instance, Vec<LinkId>), Failure> {
    let mut programs = vec![backend.program.to_owned()];
    programs.extend(outcome.then(|| ON_EXIT.to_owned()));
    let (scope, cgroup, processes) = match target {
        Target::Cgroup(id) => (layout::SCOPE_CGROUP, i64::try_from(*id).unwrap_or(i64::MAX), &[][..]),
        Target::Processes(pids) => (layout::SCOPE_PROCESSES, 0, &pids[..]),
        Target::Everything => (layout::SCOPE_EVERYTHING, 0, &[][..]),
    };
    let globals = [
        ("scope", scope),
        ("scope_cgroup", cgroup),
        ("reader", i64::from(std::process::id())),
        ("pid_namespace", pid_namespace()?),
        ("follow", i64::from(outcome)),
    ];
    let globals = globals.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let mut instance = client.load(OBJECT, &LoadOptions { programs: Some(programs.clone()), globals })?;
    let map = instance.take_map("processes")?;
    for pid in processes {
        map.update(&pid.to_ne_bytes(), &1u32.to_ne_bytes(), UpdateMode::Any)?;
    }
    let mut links = Vec::new();
    // What sees the end of system calls first: no denial is seen without it.
    for program in programs.iter().rev() {
        match client.attach(instance.id, program, None, None) {
            Ok(link) => links.push(link.id),
            Err(error) => {
                client.unload(instance.id)?;
                return Err(error.into());
            }
        }
    }
    Ok((instance, links))
}

/// Whether another backend may do better.
fn is_about_the_backend(error: &Error) -> bool {
    use Error::{Denied, Invalid, Kernel, Object, Unsupported, Verifier};
    matches!(error, Denied(_) | Invalid(_) | Kernel { .. } | Object(_) | Unsupported(_) | Verifier { .. })
}

/// A refusal of the session, with what to do about it.
fn who_may(error: Error) -> Failure {
    match error {
        Error::Denied(_) => Failure::Failed(format!(
            "{error}; who may trace is said by the policy of the app {APP}, as shipped the group adm: `bpfgate policy \
             show {APP}` shows it, if it is installed"
        )),
        other => other.into(),
    }
}

/// The front end reads maps, and the names of cgroups and processes: for that nobody needs a capability. Root as well
/// gives them up before it hears from anybody.
fn give_up_privilege() -> Result<(), Failure> {
    let failed = |why: &dyn fmt::Display| Failure::Failed(format!("giving up capabilities: {why}"));
    for set in
        [caps::CapSet::Ambient, caps::CapSet::Inheritable, caps::CapSet::Effective, caps::CapSet::Permitted]
    {
        caps::clear(None, set).map_err(|error| failed(&error))?;
    }
    nix::sys::prctl::set_no_new_privs().map_err(|errno| failed(&errno))
}

fn verdict(check: &Check) -> Verdict {
    match check.verdict {
        layout::GRANTED => Verdict::Granted,
        layout::DENIED => Verdict::Denied,
        _ => Verdict::Unknown,
    }
}

fn another_version() -> Failure {
    let why = "the object that the policy cap-trace names is of another version than this command: install both from one";
    Failure::Failed(why.to_owned())
}

fn nanoseconds(clock: ClockId) -> Result<i64, Failure> {
    let time = clock_gettime(clock).map_err(std::io::Error::from)?;
    Ok(time.tv_sec() * 1_000_000_000 + time.tv_nsec())
}

/// The pid namespace that this process is in, as the program knows it: 0 is the initial one.
fn pid_namespace() -> Result<i64, Failure> {
    /// Source: include/linux/proc_ns.h.
    const PROC_PID_INIT_INO: u64 = 0xefff_fffc;
    let inode = std::fs::metadata("/proc/self/ns/pid")?.ino();
    Ok(if inode == PROC_PID_INIT_INO { 0 } else { i64::try_from(inode).unwrap_or(0) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_seen_is_said() {
        let mut account = Account { seen: 1000, ..Account::default() };
        assert_eq!(account.to_string(), "1000 checks, none lost");
        (account.lost, account.unplaced, account.unfollowed) = (7, 3, 2);
        let text = account.to_string();
        for part in ["1000 checks, 7 of them lost", "3 have no stack", "of 2 denied ones"] {
            assert!(text.contains(part), "{text}");
        }
    }
}
