//! What kernel and settings mean for bpfgate and for those who use it.

use bpfgate_lockdown::files::LANDLOCK;
use bpfgate_protocol::demands;
use bpfgate_protocol::hooks::ROWS;

use super::super::caps::kernel::Kernel;
use super::facts::Facts;
use super::{Line, fault, ok, warning};

/// From here on a helper asks the kernel itself for the unit of a client.
const PIDFD_INFO: Kernel = Kernel((6, 13));

/// All lines about the machine.
pub(super) fn lines(facts: &Facts) -> Vec<Line> {
    let mut lines = vec![
        kernel(facts),
        units(facts),
        tokens(facts),
        unprivileged(facts),
        perf_events(facts),
        btf(facts),
        modules(facts),
        lockdown(facts),
        cgroups(facts),
    ];
    lines.extend(jit(facts));
    lines.extend(bpffs(facts));
    lines
}

fn kernel(facts: &Facts) -> Line {
    const WHAT: &str = "kernel";
    let least = Kernel(demands::UNPRIVILEGED_MAPS);
    let Some(kernel) = facts.kernel else {
        return fault(WHAT, "its version cannot be read from /proc/sys/kernel/osrelease", "mount /proc");
    };
    if kernel < Kernel(demands::SPLIT) {
        let split = Kernel(demands::SPLIT);
        let what =
            format!("Linux {kernel} has no CAP_BPF: who uses eBPF there holds CAP_SYS_ADMIN (until {split})");
        return fault(WHAT, what, format!("run Linux {least} or later"));
    }
    if kernel < least {
        let what = format!(
            "Linux {kernel} (before {least}) refuses bpf(2) to processes without CAP_BPF where \
             unprivileged_bpf_disabled is set, also with maps that they hold, and cannot confine helpers by landlock"
        );
        return fault(WHAT, what, format!("run Linux {least} or later"));
    }
    let later: Vec<String> = ROWS
        .iter()
        .filter(|row| row.since > kernel.0)
        .map(|row| format!("{} ({})", row.key, Kernel(row.since)))
        .collect();
    // How a kernel was built, and what its security modules think, only an attempt tells.
    let missing = if later.is_empty() {
        "no hook is too new for it".to_owned()
    } else {
        format!("too new for it: {}", later.join(", "))
    };
    ok(
        WHAT,
        format!(
            "Linux {kernel}: clients without CAP_BPF can use the maps they hold (from {least} on); {missing}"
        ),
    )
}

fn units(facts: &Facts) -> Line {
    let who = if facts.kernel.is_some_and(|kernel| kernel >= PIDFD_INFO) {
        "helpers ask the kernel themselves for the unit of a client".to_owned()
    } else {
        format!(
            "before Linux {PIDFD_INFO} the broker alone checks `unit`, where a policy says so; else such rules refuse"
        )
    };
    ok("units of clients", who)
}

fn tokens(facts: &Facts) -> Line {
    let tokens = Kernel(demands::TOKENS);
    let has = facts.kernel.is_some_and(|kernel| kernel >= tokens);
    ok("BPF tokens", if has { "there".to_owned() } else { format!("from Linux {tokens} on; not needed") })
}

/// `kernel.unprivileged_bpf_disabled`
pub(crate) fn unprivileged(facts: &Facts) -> Line {
    const WHAT: &str = "unprivileged_bpf_disabled";
    match facts.unprivileged_bpf_disabled {
        None => warning(
            WHAT,
            "cannot be read; every process may load programs where it is 0",
            "look with root's eyes",
        ),
        Some(0) => {
            let what = "0: every process may load socket filters and so try its luck with the verifier";
            warning(WHAT, what, "sysctl kernel.unprivileged_bpf_disabled=2")
        }
        Some(value) => {
            let end = if value == 1 { ", until the next boot" } else { "" };
            ok(WHAT, format!("{value}: programs and maps are made with CAP_BPF only{end}"))
        }
    }
}

/// `kernel.perf_event_paranoid`
pub(crate) fn perf_events(facts: &Facts) -> Line {
    const WHAT: &str = "perf_event_paranoid";
    match facts.perf_event_paranoid {
        None => ok(WHAT, "cannot be read: this kernel has no perf events, and no tracepoint programs"),
        Some(value) if value < 0 => {
            let what = format!("{value}: every process may trace the kernel");
            warning(WHAT, what, "sysctl kernel.perf_event_paranoid=2")
        }
        Some(value) if value > 2 => ok(
            WHAT,
            format!(
                "{value}: perf_event_open takes CAP_SYS_ADMIN, as on Debian and Ubuntu; for tracepoint programs root's \
                 step before the helper makes that call, links (raw_tracepoint, uprobe) need none"
            ),
        ),
        Some(value) => ok(WHAT, format!("{value}: perf_event_open takes CAP_PERFMON")),
    }
}

fn jit(facts: &Facts) -> Option<Line> {
    const WHAT: &str = "bpf_jit_enable";
    Some(match facts.bpf_jit_enable? {
        0 => warning(WHAT, "0: programs are interpreted, which is slow", "sysctl net.core.bpf_jit_enable=1"),
        value => ok(WHAT, format!("{value}: programs are compiled")),
    })
}

fn btf(facts: &Facts) -> Line {
    if facts.btf {
        return ok("BTF", "/sys/kernel/btf/vmlinux is there");
    }
    let what = "/sys/kernel/btf/vmlinux is not there: objects with CO-RE relocations are not loaded";
    warning("BTF", what, "run a kernel with CONFIG_DEBUG_INFO_BTF=y")
}

fn modules(facts: &Facts) -> Line {
    const WHAT: &str = "security modules";
    match &facts.modules {
        None => warning(
            WHAT,
            "not known: /sys/kernel/security/lsm is not there",
            "mount -t securityfs securityfs /sys/kernel/security",
        ),
        Some(list) if list.iter().any(|name| name == "landlock") => ok(WHAT, list.join(", ")),
        Some(list) => fault(
            WHAT,
            format!("{}; without landlock helpers and broker do not start", list.join(", ")),
            format!(
                "boot with lsm=landlock,{} or run a kernel with CONFIG_SECURITY_LANDLOCK=y",
                list.join(",")
            ),
        ),
    }
}

/// What landlock can do here; that is asked of the kernel, not read.
pub(super) fn landlock(abi: Option<u32>) -> Line {
    const WHAT: &str = "landlock";
    let least = LANDLOCK as u32;
    match abi {
        None => warning(WHAT, "the kernel cannot be asked", "try again; the log of the kernel may say why"),
        Some(abi) if abi < least => {
            let what = format!(
                "ABI {abi}, where bpfgate confines files with ABI {least}: helpers and broker do not start"
            );
            fault(WHAT, what, "run Linux 5.19 or later, with landlock among the security modules")
        }
        Some(abi) => {
            let more = [(4, "TCP ports"), (5, "devices"), (6, "signals and abstract sockets")];
            let missing: Vec<&str> =
                more.iter().filter(|(since, _)| abi < *since).map(|(_, what)| *what).collect();
            let covers = if missing.is_empty() {
                "all that bpfgate asks of it".to_owned()
            } else {
                format!("files, but not {}", missing.join(", "))
            };
            ok(WHAT, format!("at least ABI {abi}: it confines {covers}"))
        }
    }
}

/// `/sys/kernel/security/lockdown`
pub(crate) fn lockdown(facts: &Facts) -> Line {
    const WHAT: &str = "lockdown";
    match facts.lockdown.as_deref() {
        None if facts.modules.as_ref().is_some_and(|list| !list.iter().any(|name| name == "lockdown")) => {
            ok(WHAT, "the kernel has none")
        }
        None => warning(
            WHAT,
            "not known: /sys/kernel/security/lockdown is not there",
            "mount -t securityfs securityfs /sys/kernel/security",
        ),
        Some("confidentiality") => warning(
            WHAT,
            "confidentiality: tracing programs cannot read memory of the kernel, whoever loads them",
            "boot with lockdown=integrity if they are to",
        ),
        Some("none") => ok(WHAT, "none: no restriction"),
        Some(level) => {
            let what = "no program may write to the memory of processes (probe_write_user), also where a policy allows it";
            ok(WHAT, format!("{level}: {what}"))
        }
    }
}

fn cgroups(facts: &Facts) -> Line {
    const WHAT: &str = "cgroup v2";
    let usual = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
    match facts.cgroup2.iter().find(|path| usual.iter().any(|usual| path.as_os_str() == *usual)) {
        Some(path) => ok(WHAT, format!("mounted on {}", path.display())),
        None => warning(
            WHAT,
            "not mounted where systemd has it: no client's unit is known, and `unit` rules refuse",
            "mount -t cgroup2 cgroup2 /sys/fs/cgroup",
        ),
    }
}

/// A read-only descriptor that is pinned can be opened for writing: a directory where everybody may pin gives it to
/// everybody who holds such a descriptor.
fn bpffs(facts: &Facts) -> Vec<Line> {
    const WHAT: &str = "bpf file systems";
    let open: Vec<_> = facts.bpffs.iter().filter(|(_, mode)| mode & 0o002 != 0).collect();
    if open.is_empty() {
        let what = match facts.bpffs.len() {
            0 => "none is mounted",
            _ => "everybody may write to none of those that are mounted",
        };
        return vec![ok(WHAT, what)];
    }
    let line = |(path, mode): &(std::path::PathBuf, u32)| {
        let what = format!(
            "{} has mode {mode:04o}: everybody may pin there, and who holds a map read-only gets it read-write by that",
            path.display()
        );
        warning(WHAT, what, format!("mount -o remount,mode=0700 {}", path.display()))
    };
    open.into_iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    /// A machine without fault.
    fn good() -> Facts {
        Facts {
            kernel: Some(Kernel((6, 18))),
            unprivileged_bpf_disabled: Some(2),
            perf_event_paranoid: Some(2),
            bpf_jit_enable: Some(1),
            btf: true,
            modules: Some(["lockdown", "capability", "landlock", "bpf"].map(str::to_owned).to_vec()),
            lockdown: Some("none".into()),
            bpffs: vec![("/sys/fs/bpf".into(), 0o700)],
            cgroup2: vec!["/sys/fs/cgroup".into()],
        }
    }

    #[test]
    fn a_good_machine_has_no_warning_and_each_fault_is_found() {
        let worse = |facts: &Facts| -> Vec<(&'static str, State)> {
            let lines = lines(facts).into_iter().filter(|line| line.state != State::Ok);
            lines.map(|line| (line.topic, line.state)).collect()
        };
        assert_eq!(worse(&good()), []);
        let strings = |list: &[&str]| Some(list.iter().map(|name| (*name).to_owned()).collect());
        let cases: [(&str, State, Facts); 15] = [
            ("kernel", State::Fault, Facts { kernel: None, ..good() }),
            ("kernel", State::Fault, Facts { kernel: Some(Kernel((5, 18))), ..good() }),
            ("kernel", State::Fault, Facts { kernel: Some(Kernel((4, 19))), ..good() }),
            (
                "unprivileged_bpf_disabled",
                State::Warning,
                Facts { unprivileged_bpf_disabled: Some(0), ..good() },
            ),
            (
                "unprivileged_bpf_disabled",
                State::Warning,
                Facts { unprivileged_bpf_disabled: None, ..good() },
            ),
            ("perf_event_paranoid", State::Warning, Facts { perf_event_paranoid: Some(-1), ..good() }),
            ("bpf_jit_enable", State::Warning, Facts { bpf_jit_enable: Some(0), ..good() }),
            ("BTF", State::Warning, Facts { btf: false, ..good() }),
            ("security modules", State::Warning, Facts { modules: None, ..good() }),
            ("security modules", State::Fault, Facts { modules: strings(&["capability"]), ..good() }),
            ("lockdown", State::Warning, Facts { lockdown: Some("confidentiality".into()), ..good() }),
            ("lockdown", State::Warning, Facts { lockdown: None, ..good() }),
            ("cgroup v2", State::Warning, Facts { cgroup2: vec!["/mnt".into()], ..good() }),
            ("bpf file systems", State::Warning, Facts { bpffs: vec![("/mnt".into(), 0o1777)], ..good() }),
            ("bpf file systems", State::Warning, Facts { bpffs: vec![("/m".into(), 0o757)], ..good() }),
        ];
        for (topic, state, facts) in cases {
            assert_eq!(worse(&facts), [(topic, state)], "{facts:?}");
        }
    }

    #[test]
    fn settings_of_distributions_are_no_faults() {
        let debian =
            Facts { kernel: Some(Kernel((6, 1))), perf_event_paranoid: Some(3), bpffs: Vec::new(), ..good() };
        assert!(lines(&debian).iter().all(|line| line.state == State::Ok));
        assert!(kernel(&debian).what.contains("tcx (6.6)"), "{}", kernel(&debian).what);
        let plain = Facts { modules: Some(vec!["landlock".into()]), lockdown: None, ..good() };
        assert_eq!(lockdown(&plain).state, State::Ok);
    }

    #[test]
    fn landlock_is_demanded_as_helpers_demand_it() {
        let state = |abi| landlock(abi).state;
        let expected = [State::Warning, State::Fault, State::Fault, State::Ok, State::Ok];
        assert_eq!([None, Some(0), Some(1), Some(2), Some(7)].map(state), expected);
        assert!(landlock(Some(4)).what.ends_with("not devices, signals and abstract sockets"));
    }
}
