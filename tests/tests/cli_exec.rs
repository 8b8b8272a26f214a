//! `bpfgate exec`: a program with maps, without the other powers of bpf(2).

use bpfgate_tests::cli::{Ended, Running, run};
use bpfgate_tests::{Gate, USER, needs_root};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::io::Read;
use std::process::Stdio;

const POLICY: &str = r#"
{client}
[objects.o]
{object:minimal}
[[objects.o.xdp]]
program = "pass"
interfaces = ["lo"]
mode = "generic"
[objects.o.maps]
counts = "read-write"
"#;

/// What a program that `bpfgate exec` starts may do with the map it is given; prints what it finds.
const PROGRAM: &str = r#"
import ctypes, json, os, platform, struct
libc, number = ctypes.CDLL(None, use_errno=True), {"x86_64": 321, "aarch64": 280}[platform.machine()]
def bpf(command, attr):
    attr = ctypes.create_string_buffer(attr, 128)
    result = libc.syscall(ctypes.c_long(number), ctypes.c_long(command), attr, ctypes.c_long(128))
    return 0 if result >= 0 else ctypes.get_errno()
key, value, one = (ctypes.create_string_buffer(n) for n in (4, 8, 8))
def access(buffer):
    return struct.pack("=IIQQQ", 3, 0, ctypes.addressof(key), ctypes.addressof(buffer), 0)
insns, license = ctypes.create_string_buffer(struct.pack("=QQ", 0xb7, 0x95), 16), ctypes.create_string_buffer(b"GPL")
load = struct.pack("=IIQQ", 1, 2, ctypes.addressof(insns), ctypes.addressof(license))
one.raw = struct.pack("=Q", 7)
update = bpf(2, access(one))
freeze = bpf(22, struct.pack("=I", 3))
lookup = bpf(1, access(value))
print(json.dumps({
    "fds": os.environ["LISTEN_FDS"], "names": os.environ["LISTEN_FDNAMES"],
    "pid": int(os.environ["LISTEN_PID"]) == os.getpid(), "uid": os.getuid(),
    "update": update, "freeze": freeze, "lookup": lookup, "value": struct.unpack("=Q", value.raw)[0],
    "update_again": bpf(2, access(one)), "pin": bpf(6, struct.pack("=QI", 0, 3)), "load": bpf(5, load),
    "status": {k: v for k, v in (l.split() for l in open("/proc/self/status")
               if l.startswith(("NoNewPrivs", "Seccomp:", "CapEff")))},
}))
raise SystemExit(37)
"#;

#[test]
fn exec_gives_a_program_the_maps_and_nothing_else_of_bpf() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", POLICY);
    let before = gate.baseline();
    let mut command = gate.cli(&USER, "exec app o --attach pass=lo --");
    let ended = Ended::of(command.args(["/usr/bin/python3", "-c", PROGRAM]));
    assert_eq!(ended.code, Some(37), "{ended:?}");
    let found: Value = serde_json::from_str(&ended.out).unwrap();
    let eperm = libc::EPERM;
    assert_eq!(
        found,
        json!({
            "fds": "1", "names": "counts", "pid": true, "uid": USER.id,
            // Without the filter the holder of such a descriptor could freeze the map: EPERM comes from the filter.
            "update": 0, "freeze": eperm, "lookup": 0, "value": 7, "update_again": 0, "pin": eperm, "load": eperm,
            "status": {"NoNewPrivs:": "1", "Seccomp:": "2", "CapEff:": format!("{:016x}", 0)},
        })
    );
    // The session is over with the program.
    assert_eq!(run(&gate, "list app --json").json(), json!([]));
    let absent = run(&gate, "exec app o -- /nonexistent/program");
    assert_eq!(absent.code, Some(1), "{absent:?}");
    gate.invariants(&before);
}

#[test]
fn exec_passes_a_signal_on_and_says_how_its_program_ended() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", POLICY);
    let before = gate.baseline();
    let mut command = gate.cli(&USER, "exec app o --attach pass=lo -- /bin/sh -c");
    let script = "trap 'exit 5' TERM; echo 1; while :; do sleep 0.05; done";
    let command = command.arg(script).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut running = Running(command.spawn().unwrap());
    let mut ready = [0; 2];
    running.0.stdout.take().unwrap().read_exact(&mut ready).unwrap();
    assert_eq!(run(&gate, "list app --json").json()[0]["links"].as_array().unwrap().len(), 1);
    running.signal(Signal::SIGTERM);
    assert_eq!(running.end(), (Some(5), String::new()));
    gate.invariants(&before);
}
