//! What bpfgate promises of each of its processes, and whether it is so.

use std::path::PathBuf;

use bpfgate_lockdown::capabilities::{mask, to_make_helpers};
use bpfgate_lockdown::syscalls::FILTERS;
use bpfgate_protocol::names::AppName;
use bpfgate_protocol::policy::{file, needed};

use super::process::{Process, Role, Seccomp, Thread};
use super::set::CapSet;

/// What came out.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing is promised of it.
    None,
    Kept,
    /// Sentences, with the thread where not all of them are so.
    Broken(Vec<String>),
    /// It cannot be said: a sentence.
    Unknown(String),
}

impl Verdict {
    pub(crate) fn word(&self) -> &'static str {
        match self {
            Self::None => "",
            Self::Kept => "kept",
            Self::Broken(_) => "broken",
            Self::Unknown(_) => "unknown",
        }
    }

    pub(crate) fn why(&self) -> &[String] {
        match self {
            Self::Broken(why) => why,
            Self::Unknown(why) => std::slice::from_ref(why),
            Self::None | Self::Kept => &[],
        }
    }

    /// As it should be, as far as anything should.
    pub(crate) fn is_fine(&self) -> bool {
        matches!(self, Self::None | Self::Kept)
    }
}

/// Judges a process. `all` are those that were seen with it: a loader's helper knows where its policy is.
pub(crate) fn judge(process: &Process, all: &[Process]) -> Verdict {
    let needs = match &process.role {
        None | Some(Role::Preparation(_)) => return Verdict::None,
        Some(Role::Broker | Role::Spawner) => CapSet::NONE,
        Some(Role::Helper(app) | Role::Loader(app) | Role::Worker(app)) => match needs(app, all) {
            Ok(needs) => needs,
            Err(why) => return Verdict::Unknown(why),
        },
    };
    let Some(role) = &process.role else { return Verdict::None };
    let mut broken: Vec<String> = Vec::new();
    for thread in &process.threads {
        let found = faults(role, thread, needs);
        let which = |fault| {
            if thread.tid == process.pid { fault } else { format!("thread {}: {fault}", thread.tid) }
        };
        broken.extend(found.into_iter().map(which));
    }
    if broken.is_empty() { Verdict::Kept } else { Verdict::Broken(broken) }
}

/// What the policy of an app needs: the policy that its helper would read now.
fn needs(app: &AppName, all: &[Process]) -> Result<CapSet, String> {
    let is_helper = |process: &&Process| process.role.as_ref() == Some(&Role::Helper(app.clone()));
    let mut directories =
        all.iter().find(is_helper).map(|helper| helper.policies.clone()).unwrap_or_default();
    if directories.is_empty() {
        directories = file::DIRECTORIES.map(PathBuf::from).to_vec();
    }
    match file::read(&directories, app) {
        Ok(Some(policy)) => Ok(CapSet(mask(&needed(&policy)))),
        Ok(None) => {
            Err(format!("there is no policy of {app} any more: `bpfgate policy apply` ends its helper"))
        }
        Err(error) => Err(format!("what it may hold is not known, {}", error.lines().join(" "))),
    }
}

fn faults(role: &Role, thread: &Thread, needs: CapSet) -> Vec<String> {
    let mut faults = Vec::new();
    let mut exactly = |what: &str, is: CapSet, may: CapSet, must: CapSet| {
        if !may.has(is) {
            faults.push(format!("its {what} set has {}, which it must not hold", is.without(may).list()));
        }
        if !is.has(must) {
            faults.push(format!("its {what} set lacks {}, which its policy needs", must.without(is).list()));
        }
    };
    let none = CapSet::NONE;
    let filters = match role {
        Role::Broker | Role::Preparation(_) => {
            exactly("permitted", thread.permitted, none, none);
            exactly("effective", thread.effective, none, none);
            exactly("bounding", thread.bounding, none, none);
            FILTERS
        }
        Role::Helper(_) => {
            exactly("permitted", thread.permitted, needs, needs);
            exactly("effective", thread.effective, needs, needs);
            // Emptied, or as the unit has it: without CAP_SETPCAP it cannot be emptied.
            let bounding = if thread.bounding.is_empty() { none } else { needs };
            exactly("bounding", thread.bounding, needs, bounding);
            FILTERS
        }
        Role::Loader(_) | Role::Worker(_) => {
            exactly("permitted", thread.permitted, none, none);
            exactly("effective", thread.effective, none, none);
            // That of its helper's unit. It gains nothing from there, with NO_NEW_PRIVS.
            exactly("bounding", thread.bounding, needs, none);
            // A worker has those of its parent too.
            if matches!(role, Role::Worker(_)) { 2 * FILTERS } else { FILTERS }
        }
        Role::Spawner => {
            let makers = CapSet::from(to_make_helpers());
            exactly("permitted", thread.permitted, makers, none);
            exactly("effective", thread.effective, makers, none);
            exactly("bounding", thread.bounding, makers, none);
            0
        }
    };
    exactly("inheritable", thread.inheritable, none, none);
    exactly("ambient", thread.ambient, none, none);
    if !thread.no_new_privileges {
        faults.push("NO_NEW_PRIVS is not set: a set-uid program would give it privileges".to_owned());
    }
    if filters > 0 && thread.seccomp != Seccomp::Filter {
        faults.push(format!("seccomp is {}: it may make any system call", thread.seccomp.name()));
    } else if thread.seccomp_filters < filters {
        let has = thread.seccomp_filters;
        faults.push(format!("it has {has} seccomp filters, where it installs {filters} of its own"));
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thread(held: u64, bounding: u64, filters: u32) -> Thread {
        Thread {
            tid: 1,
            name: "t".into(),
            permitted: CapSet(held),
            effective: CapSet(held),
            inheritable: CapSet::NONE,
            bounding: CapSet(bounding),
            ambient: CapSet::NONE,
            no_new_privileges: true,
            seccomp: if filters > 0 { Seccomp::Filter } else { Seccomp::Off },
            seccomp_filters: filters,
        }
    }

    #[test]
    fn each_role_has_its_promise() {
        let app = || "a".parse::<AppName>().unwrap();
        let (bpf, net) = (1 << 39, 1 << 12);
        let needs = CapSet(bpf | net);
        let fine = |role: Role, thread: &Thread| faults(&role, thread, needs);
        assert_eq!(fine(Role::Broker, &thread(0, 0, 2)), [""; 0]);
        assert_eq!(fine(Role::Helper(app()), &thread(bpf | net, 0, 2)), [""; 0]);
        assert_eq!(fine(Role::Helper(app()), &thread(bpf | net, bpf | net, 9)), [""; 0]);
        assert_eq!(fine(Role::Loader(app()), &thread(0, bpf | net, 2)), [""; 0]);
        assert_eq!(fine(Role::Worker(app()), &thread(0, 0, 4)), [""; 0]);
        assert_eq!(fine(Role::Spawner, &thread(bpf, bpf, 0)), [""; 0]);
        // One thing wrong in each.
        for (role, thread, word) in [
            (Role::Broker, thread(0, net, 2), "bounding set has CAP_NET_ADMIN"),
            (Role::Helper(app()), thread(bpf, 0, 2), "lacks CAP_NET_ADMIN"),
            (Role::Helper(app()), thread(bpf | net, bpf, 2), "bounding set lacks CAP_NET_ADMIN"),
            (Role::Helper(app()), thread(bpf | net | 1 << 21, 0, 2), "has CAP_SYS_ADMIN"),
            (Role::Helper(app()), thread(bpf | net, 0, 1), "1 seccomp filters"),
            (Role::Helper(app()), thread(bpf | net, 0, 0), "seccomp is off"),
            (Role::Loader(app()), thread(bpf, 0, 2), "effective set has CAP_BPF"),
            (Role::Loader(app()), thread(0, 1 << 38, 2), "bounding set has CAP_PERFMON"),
            (Role::Worker(app()), thread(0, 0, 2), "2 seccomp filters"),
            (Role::Spawner, thread(1 << 25, 0, 0), "has CAP_SYS_TIME"),
            (
                Role::Broker,
                Thread { inheritable: CapSet(bpf), ..thread(0, 0, 2) },
                "inheritable set has CAP_BPF",
            ),
            (Role::Broker, Thread { ambient: CapSet(bpf), ..thread(0, 0, 2) }, "ambient set has CAP_BPF"),
            (Role::Broker, Thread { no_new_privileges: false, ..thread(0, 0, 2) }, "NO_NEW_PRIVS"),
        ] {
            let found = faults(&role, &thread, needs);
            assert!(found.iter().any(|fault| fault.contains(word)), "{role:?}: {word}: {found:?}");
        }
    }

    #[test]
    fn one_thread_is_enough_to_break_it() {
        let of = |threads: Vec<Thread>| Process {
            pid: 1,
            role: Some(Role::Broker),
            unit: None,
            name: "bpfgate-broker".into(),
            policies: Vec::new(),
            threads,
        };
        let good = thread(0, 0, 2);
        assert_eq!(judge(&of(vec![good.clone()]), &[]), Verdict::Kept);
        let bad = Thread { tid: 2, ..thread(1 << 39, 0, 2) };
        let verdict = judge(&of(vec![good, bad]), &[]);
        assert!(verdict.why()[0].starts_with("thread 2: its permitted set has CAP_BPF"), "{verdict:?}");
        assert!(!verdict.is_fine());
    }
}
