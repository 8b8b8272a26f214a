//! What must be true after every case, whatever the case was.

use crate::census::{Census, Object, leftover};
use crate::gate::Gate;
use crate::process::{self, Process, Role};
use crate::user::Who;
use crate::{SOON, slowness, wait_until};
use bpfgate_client::{LoadOptions, Target};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::{Duration, Instant};

/// The app of the honest client.
pub const CANARY: &str = "canary";

const CANARY_USER: Who = Who::new(12_346);

pub(crate) const CANARY_POLICY: &str = r#"
[[client]]
user = 12346
may = ["load", "attach", "maps"]
[objects.o]
{object:minimal}
[[objects.o.xdp]]
program = "pass"
interfaces = ["lo"]
mode = "generic"
[objects.o.maps]
counts = "frozen"
"#;

/// The spawner looks for ended helpers once a second.
const REAPED: Duration = Duration::from_secs(3);

/// How things are when nothing is going on.
pub struct Baseline {
    /// What the kernel holds.
    pub census: Census,
    /// Descriptors of broker and spawner by role, without a channel for each helper.
    descriptors: BTreeMap<Role, BTreeMap<String, usize>>,
}

impl Gate {
    /// How things are now; the honest client has been there.
    pub fn baseline(&self) -> Baseline {
        let idle = self.descriptors();
        self.honest_client();
        let census = settled();
        // The broker needs a moment to see that the honest client has gone: its connection is no part of the baseline.
        wait_until(SOON, || self.descriptors() == idle);
        Baseline { census, descriptors: self.descriptors() }
    }

    /// What this broker's processes and this test have made since `before` and is there after `limit`.
    pub fn left_in_kernel(&self, before: &Baseline, limit: Duration) -> BTreeSet<Object> {
        let mut ours: Vec<i32> = self.processes().iter().map(|process| process.pid).collect();
        ours.push(std::process::id().cast_signed());
        leftover(&before.census, limit, &ours)
    }

    /// Asserts what must be true after every case; `before` is from before the case.
    ///
    /// Kernel objects and descriptors are back, and an honest client is served; the broker is the same process without
    /// any capability, helpers have exactly what their policies need, everything is confined; no process is left
    /// over; the audit records are whole.
    pub fn invariants(&self, before: &Baseline) {
        assert!(self.broker.is_alive(), "the broker has ended:\n{}", self.log());
        self.honest_client();
        let left = self.left_in_kernel(before, SOON);
        assert!(left.is_empty(), "left in the kernel: {left:?}");
        wait_until(SOON, || self.descriptors() == before.descriptors);
        assert_eq!(self.descriptors(), before.descriptors, "descriptors of broker and spawner");
        let mut strange = String::new();
        wait_until(REAPED, || {
            strange = self.strange_processes();
            strange.is_empty()
        });
        assert!(strange.is_empty(), "{strange}\n{}", self.log());
        self.audit();
    }

    /// The honest client: opens, loads, attaches, reads a count of its own packets, unloads.
    fn honest_client(&self) {
        let mut last = Instant::now();
        let mut steps = Vec::new();
        let mut step = |name: &'static str| {
            steps.push((name, last.elapsed()));
            last = Instant::now();
        };
        let honest = |error: bpfgate_client::Error| -> ! {
            panic!("the honest client: {error}\n{}", self.log());
        };
        let mut client = self.client(&CANARY_USER);
        client.open(CANARY).unwrap_or_else(|error| honest(error));
        step("open");
        let mut instance = client.load("o", &LoadOptions::default()).unwrap_or_else(|error| honest(error));
        step("load");
        let target = Target::Interface("lo".to_owned());
        let mut link = client.attach(instance.id, "pass", Some(&target), None);
        // What a client before left attached there may not be gone yet.
        let busy = |error: &bpfgate_client::Error| matches!(error, bpfgate_client::Error::Kernel { errno, .. } if *errno == libc::EBUSY);
        wait_until(SOON, || {
            if link.as_ref().is_err_and(busy) {
                link = client.attach(instance.id, "pass", Some(&target), None);
            }
            !link.as_ref().is_err_and(busy)
        });
        let link = link.unwrap_or_else(|error| honest(error));
        step("attach");
        let counts = instance.take_map("counts").expect("the canary's map");
        self.send_over_loopback(1);
        let value =
            counts.lookup(&[0; 4]).expect("a frozen map can be read").expect("an array has element 0");
        assert_ne!(value, [0; 8], "the honest client counts no packet");
        client.detach(link.id).unwrap_or_else(|error| honest(error));
        step("detach");
        client.unload(instance.id).unwrap_or_else(|error| honest(error));
        step("unload");
        // Attaching and detaching wait for locks of the kernel's network that all of the machine shares.
        let ours = steps.iter().filter(|(name, _)| !name.ends_with("tach"));
        let waited: Duration = ours.map(|(_, took)| *took).sum();
        assert!(waited < 2 * SOON * slowness(), "the honest client waited: {steps:?}");
    }

    /// Descriptors of broker and spawner. The broker has one channel for each helper: those are not counted.
    fn descriptors(&self) -> BTreeMap<Role, BTreeMap<String, usize>> {
        let processes = self.processes();
        let helpers = processes.iter().filter(|process| matches!(process.role, Role::Helper(_))).count();
        let permanent = processes.iter().filter(|p| matches!(p.role, Role::Broker | Role::Spawner));
        let count = |process: &Process| {
            let mut all = process::descriptors(process.pid);
            if process.role == Role::Broker
                && let Some(sockets) = all.get_mut("socket")
            {
                *sockets = sockets.saturating_sub(helpers);
            }
            (process.role.clone(), all)
        };
        permanent.map(count).collect()
    }

    /// What is wrong with the processes; empty if nothing is.
    fn strange_processes(&self) -> String {
        let all = self.processes();
        let mut strange = Vec::new();
        for process in &all {
            let parent = all.iter().find(|other| other.pid == process.parent).map(|parent| &parent.role);
            let children = all.iter().filter(|other| other.parent == process.pid).count();
            let fine = match (&process.role, parent) {
                (Role::Broker, _) => *process == Process { parent: process.parent, ..self.broker.clone() },
                (Role::Spawner, Some(Role::Broker)) | (Role::Worker, Some(Role::Loader)) => true,
                (Role::Helper(_), Some(Role::Spawner)) | (Role::Loader, Some(Role::Helper(_))) => {
                    children == 1
                }
                _ => false,
            };
            if !fine {
                strange.push(format!("{process:?} with {children} children is out of place"));
            }
            strange.extend(self.wrong_privilege(process));
            strange.extend(wrong_descriptors(process));
        }
        let mut roles: Vec<&Role> =
            all.iter().map(|p| &p.role).filter(|r| matches!(r, Role::Helper(_))).collect();
        roles.sort();
        strange.extend(
            roles.windows(2).filter(|two| two[0] == two[1]).map(|two| format!("two of {:?}", two[0])),
        );
        let pids: Vec<i32> = all.iter().map(|process| process.pid).collect();
        for pid in process::all() {
            if let Some(('Z', parent, _)) = process::stat(pid)
                && pids.contains(&parent)
            {
                strange.push(format!("{pid}, a child of {parent}, is a zombie"));
            }
        }
        strange.join("\n")
    }

    /// What a process may not have, or lacks.
    fn wrong_privilege(&self, process: &Process) -> Vec<String> {
        let capabilities = match &process.role {
            // It is what PID 1 is elsewhere.
            Role::Spawner | Role::Other(_) => return Vec::new(),
            Role::Helper(app) => self.needed(app),
            Role::Broker | Role::Loader | Role::Worker => 0,
        };
        let held = format!("{capabilities:016x}");
        let none = format!("{:016x}", 0);
        let expected = [
            ("CapInh", &none),
            ("CapPrm", &held),
            ("CapEff", &held),
            ("CapBnd", &none),
            ("CapAmb", &none),
            ("NoNewPrivs", &"1".to_owned()),
            ("Seccomp", &"2".to_owned()),
        ]
        .map(|(field, value)| (field, value.clone()));
        let mut wrong = Vec::new();
        for (field, expected) in expected {
            let found = process::status(process.pid, field);
            if found.is_empty() || found.iter().any(|value| *value != expected) {
                wrong.push(format!("{:?} has {field} {found:?}, not {expected}", process.role));
            }
        }
        let uids = process::status(process.pid, "Uid");
        if uids.iter().any(|uids| uids.split('\t').any(|uid| uid == "0")) {
            wrong.push(format!("{:?} is root: {uids:?}", process.role));
        }
        wrong
    }

    /// The capabilities that an app's helper needs, read from the words of its policy, not by the code under test.
    fn needed(&self, app: &str) -> u64 {
        const NET_ADMIN: u64 = 1 << 12;
        const PERFMON: u64 = 1 << 38;
        const BPF: u64 = 1 << 39;
        let text = fs::read_to_string(self.policy_path(app)).unwrap_or_default();
        let mut all = 0;
        for (hook, capabilities) in [
            (".xdp]]", NET_ADMIN | BPF),
            (".tcx]]", NET_ADMIN | BPF),
            (".cgroup_skb]]", NET_ADMIN | BPF),
            (".raw_tracepoint]]", PERFMON | BPF),
            (".tracepoint]]", PERFMON | BPF),
            (".uprobe]]", PERFMON | BPF),
            (".socket_filter]]", BPF),
            (".fentry]]", PERFMON | BPF),
            (".fexit]]", PERFMON | BPF),
            (".kprobe]]", PERFMON | BPF),
        ] {
            if text.contains(hook) {
                all |= capabilities;
            }
        }
        all
    }
}

/// A helper without sessions holds its three channels, one socket of its network, and nothing of the kernel's.
fn wrong_descriptors(process: &Process) -> Option<String> {
    if !matches!(process.role, Role::Helper(_) | Role::Loader | Role::Worker) {
        return None;
    }
    let all = process::descriptors(process.pid);
    let bpf = all.keys().any(|kind| kind.starts_with("anon_inode:bpf") || kind == "anon_inode:btf");
    let sockets = all.get("socket").copied().unwrap_or(0);
    let too_many = matches!(process.role, Role::Helper(_)) && sockets != 4;
    (bpf || too_many).then(|| format!("{:?} without a session holds {all:?}", process.role))
}

/// The census, when what was released before is gone.
fn settled() -> Census {
    let mut last = Census::take();
    let mut same = 0;
    // Others may load and unload all the time: then the last look has to do.
    wait_until(SOON, || {
        std::thread::sleep(Duration::from_millis(20));
        let now = Census::take();
        same = if now == last { same + 1 } else { 0 };
        last = now;
        same >= 5
    });
    last
}
