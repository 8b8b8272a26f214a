//! What `bpfgate caps trace` costs a program that is traced, and one beside it that is not.
//!
//! The program is this one in another role: it does a round of work when it is told to, and says how long that took.

use crate::table::Table;
use crate::world::{Broker, SELF, World};
use crate::{Result, Trying};
use bpfgate_tests::cgroup::Cgroup;
use bpfgate_tests::gate::{inherited, sha256};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::{Signal, kill};
use nix::sys::time::TimeValLike;
use nix::unistd::{Pid, getppid};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

pub(crate) const WORKLOAD: &str = "--workload";

/// The work takes turns with and without the trace, so many times, and so many rounds each time.
const TURNS: usize = 12;
const ROUNDS: usize = 10;
/// How long the processes of bpfgate need to come to rest.
const SETTLED: Duration = Duration::from_millis(500);
/// What is repeated in a round that does one thing only.
const REPEATED: u32 = 20_000;

/// Kinds of rounds: the byte that asks for one.
const MIX: u8 = b'm';
const CHECKS: u8 = b'c';
const CALLS: u8 = b's';

/// Takes the measurements.
pub(crate) fn all(world: &World, table: &mut Table) -> Result<()> {
    install(world)?;
    let broker = Broker::start(world, &[])?;
    let cgroup = Cgroup::new();
    let mut workloads = [Workload::start(world, Some(&cgroup.path))?, Workload::start(world, None)?];
    let mut times: [[Vec<f64>; 2]; 4] = Default::default();
    for turn in 0..=TURNS {
        for on in [0, 1] {
            let trace = if on == 1 { Some(Trace::start(world, &broker, &cgroup.path)?) } else { None };
            // What starts and ends a trace is no part of it: the helper has loaded, or has let go.
            std::thread::sleep(SETTLED);
            // The first of the two is traced.
            for (kind, (place, what)) in
                [(0, MIX), (0, CHECKS), (0, CALLS), (1, CALLS)].into_iter().enumerate()
            {
                for _ in 0..ROUNDS {
                    let time = workloads[place].round(what)?;
                    // The first turn fills caches.
                    if turn > 0 {
                        times[kind][on].push(time);
                    }
                }
            }
            trace.map_or(Ok(()), Trace::end)?;
        }
    }
    let [mix, checks, calls, others] = &times;
    let per_call = |times: &Vec<f64>| times.iter().map(|time| time / f64::from(REPEATED)).collect::<Vec<_>>();
    let off =
        table.median("caps_trace_mix_us_off", "us", &mix[0].iter().map(|t| t / 1e3).collect::<Vec<_>>());
    let on = table.median("caps_trace_mix_us_on", "us", &mix[1].iter().map(|t| t / 1e3).collect::<Vec<_>>());
    table.row("caps_trace_mix_pct", (on / off - 1.0) * 100.0, 1, 5.0, "a mix of work, all of it traced");
    let off = table.median("caps_trace_check_ns_off", "ns", &per_call(&checks[0]));
    let on = table.median("caps_trace_check_ns_on", "ns", &per_call(&checks[1]));
    table.median("caps_trace_check_ratio", "", &[on / off]);
    let off = table.median("caps_trace_call_ns_off", "ns", &per_call(&calls[0]));
    let on = table.median("caps_trace_call_ns_on", "ns", &per_call(&calls[1]));
    table.median("caps_trace_call_ratio", "", &[on / off]);
    let off = table.median("caps_trace_beside_ns_off", "ns", &per_call(&others[0]));
    let on = table.median("caps_trace_beside_ns_on", "ns", &per_call(&others[1]));
    table.median("caps_trace_beside_ratio", "", &[on / off]);
    drop(workloads);
    drop(cgroup);
    broker.stop()
}

/// The policy as it is shipped, for the user of this run.
fn install(world: &World) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().ok_or("the source has no parent directory")?;
    let policy = root.join("policies/shipped/cap-trace.toml");
    let text = fs::read_to_string(&policy).trying(&format!("reading {}", policy.display()))?;
    let object = world.copy("cap_trace.bpf.o")?;
    let text = text
        .replace("/usr/lib/bpfgate/cap_trace.bpf.o", &object.display().to_string())
        .replace(&"0".repeat(64), &sha256(&object))
        .replace("group = \"adm\"", &format!("user = {}", world.uid));
    world.file("policies/cap-trace.toml", &text).map(drop)
}

/// A running trace.
struct Trace(Child);

impl Trace {
    /// Starts one, and waits until it traces.
    fn start(world: &World, broker: &Broker, cgroup: &Path) -> Result<Self> {
        // By descriptor: the way to the file may be closed to that user.
        let mut command = Command::new(inherited(&world.program("bpfgate")));
        command.args(["caps", "trace", "--json", "--unit"]).arg(cgroup);
        command.env("BPFGATE_SOCKET", &broker.socket).uid(world.uid).gid(world.uid);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().trying("starting bpfgate caps trace")?;
        let mut line = String::new();
        if let Some(err) = child.stderr.take() {
            // Read on its own from then on: what it says at its end has somebody to read it.
            let mut err = BufReader::new(err);
            err.read_line(&mut line).trying("waiting for bpfgate caps trace")?;
            std::thread::spawn(move || err.read_to_end(&mut Vec::new()));
        }
        if line.starts_with("bpfgate: tracing by ") { Ok(Self(child)) } else { Err(line) }
    }

    fn end(mut self) -> Result<()> {
        let pid = i32::try_from(self.0.id()).trying("the pid of bpfgate caps trace")?;
        kill(Pid::from_raw(pid), Signal::SIGTERM).trying("ending bpfgate caps trace")?;
        let status = self.0.wait().trying("waiting for bpfgate caps trace")?;
        if status.success() { Ok(()) } else { Err(format!("bpfgate caps trace ended with {status}")) }
    }
}

/// A process that works.
struct Workload {
    child: Child,
    stdin: Option<ChildStdin>,
    out: BufReader<ChildStdout>,
}

impl Workload {
    fn start(world: &World, cgroup: Option<&Path>) -> Result<Self> {
        let mut command = Command::new(SELF);
        command.args([WORKLOAD, &world.uid.to_string()]).args(cgroup);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().trying("starting the work")?;
        let out = child.stdout.take().ok_or("the work has no output")?;
        Ok(Self { stdin: child.stdin.take(), out: BufReader::new(out), child })
    }

    /// Has it do a round; how many nanoseconds of CPU time that took.
    fn round(&mut self, what: u8) -> Result<f64> {
        let stdin = self.stdin.as_mut().ok_or("the work has ended")?;
        stdin.write_all(&[what]).trying("asking for a round of work")?;
        let mut line = String::new();
        self.out.read_line(&mut line).trying("waiting for a round of work")?;
        line.trim().parse().trying(&format!("reading how long a round took, {line:?},"))
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        self.stdin = None;
        let _ = self.child.wait();
    }
}

/// The role behind [`Workload`]: as a user without privilege, and in a cgroup if one is named.
pub(crate) fn workload(uid: &str, cgroup: Option<&Path>) -> Result<()> {
    if let Some(cgroup) = cgroup {
        fs::write(cgroup.join("cgroup.procs"), "0").trying("entering the cgroup")?;
    }
    let uid = uid.parse().trying("the user of the work")?;
    bpfgate_tests::sys::become_user(uid, uid, &[]).trying("giving up privilege")?;
    let mut byte = [0];
    while std::io::stdin().read(&mut byte).trying("waiting for work")? > 0 {
        let start = cpu_time()?;
        match byte[0] {
            MIX => mix()?,
            CHECKS => {
                for _ in 0..REPEATED {
                    let _ = kill(Pid::from_raw(1), None);
                }
            }
            _ => {
                for _ in 0..REPEATED {
                    std::hint::black_box(getppid());
                }
            }
        }
        println!("{}", cpu_time()? - start);
    }
    Ok(())
}

/// The time that this process and its children have had a CPU, in nanoseconds: others that want it too do not count.
fn cpu_time() -> Result<i64> {
    let mut sum = 0;
    for who in [UsageWho::RUSAGE_SELF, UsageWho::RUSAGE_CHILDREN] {
        let usage = getrusage(who).trying("asking for the time that was used")?;
        sum += usage.user_time().num_nanoseconds() + usage.system_time().num_nanoseconds();
    }
    Ok(sum)
}

/// Some of all: a program is started, files are read and looked at, memory is mapped, text is sorted.
fn mix() -> Result<()> {
    let status = Command::new("/bin/true").status().trying("running /bin/true")?;
    let mut lines = Vec::new();
    for path in ["/etc/passwd", "/etc/group", "/proc/self/status", "/proc/self/maps"] {
        let text = fs::read_to_string(path).trying(&format!("reading {path}"))?;
        lines.extend(text.lines().map(str::to_owned));
    }
    for entry in fs::read_dir("/etc").trying("reading /etc")?.flatten() {
        let _ = std::hint::black_box(entry.metadata());
    }
    // So large that the C library maps it and gives it back.
    for _ in 0..4 {
        std::hint::black_box(vec![1u8; 1 << 20]);
    }
    for _ in 0..10 {
        lines.sort_by_cached_key(|line| line.chars().rev().collect::<String>());
        lines.sort();
    }
    if status.success() { Ok(()) } else { Err("/bin/true failed".into()) }
}
