//! The command line against a fake broker: what it asks, what it prints, how it ends.
#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader, IoSlice, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::thread::JoinHandle;

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// Ends the connection at this point of a script.
const HANG_UP: (&str, Value, Vec<OwnedFd>) = ("", Value::Null, Vec::new());

/// Answers by method, in the order of the calls; returns the parameters it was given.
struct Broker {
    socket: PathBuf,
    thread: JoinHandle<Vec<Value>>,
}

impl Broker {
    fn start(name: &str, script: Vec<(&'static str, Value, Vec<OwnedFd>)>) -> Self {
        let socket = std::env::temp_dir().join(format!("bpfgate-cli-{}-{name}", std::process::id()));
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        let path = socket.clone();
        let thread = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            std::fs::remove_file(path).unwrap();
            serve(stream, script)
        });
        Self { socket, thread }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bpfgate"));
        command.arg("--socket").arg(&self.socket).args(arguments);
        command
    }

    /// Runs a command to its end; returns what it printed and what it asked.
    fn run(self, arguments: &[&str]) -> (Output, Vec<Value>) {
        let output = self.command(arguments).output().unwrap();
        (output, self.thread.join().unwrap())
    }
}

fn serve(mut stream: UnixStream, script: Vec<(&str, Value, Vec<OwnedFd>)>) -> Vec<Value> {
    let mut asked = Vec::new();
    for (method, reply, fds) in script {
        if method.is_empty() {
            return asked;
        }
        let Some(request) = read_request(&mut stream) else { break };
        assert_eq!(request["method"], method);
        asked.push(request["parameters"].clone());
        let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &rights[..0] } else { &rights[..] };
        let text = format!("{reply}\0");
        let parts = [IoSlice::new(text.as_bytes())];
        sendmsg::<()>(stream.as_raw_fd(), &parts, control, MsgFlags::empty(), None).unwrap();
    }
    // The session lasts until the client ends it.
    let _ = stream.read_to_end(&mut Vec::new());
    asked
}

fn read_request(stream: &mut UnixStream) -> Option<Value> {
    let mut text = Vec::new();
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte).ok()?;
        if byte[0] == 0 {
            return Some(serde_json::from_slice(&text).unwrap());
        }
        text.push(byte[0]);
    }
}

fn opened() -> (&'static str, Value, Vec<OwnedFd>) {
    ("io.bpfgate.Open", json!({"parameters": {}}), Vec::new())
}

fn file(text: &str) -> OwnedFd {
    let fd = nix::sys::memfd::memfd_create("test", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
    std::fs::write(format!("/proc/self/fd/{}", fd.as_raw_fd()), text).unwrap();
    fd
}

fn map(name: &str, access: &str, fd: Option<usize>) -> Value {
    json!({"name": name, "type": "percpu_array", "key_size": 4, "value_size": 8, "max_entries": 2,
        "access": access, "fd": fd})
}

fn loaded(maps: &Value, fds: Vec<OwnedFd>) -> (&'static str, Value, Vec<OwnedFd>) {
    let programs = json!([{"name": "p", "type": "xdp"}, {"name": "r", "type": "raw_tracepoint"}]);
    let reply = json!({"parameters": {"instance": 4, "programs": programs, "maps": maps}});
    ("io.bpfgate.Load", reply, fds)
}

fn attached(link: u64) -> (&'static str, Value, Vec<OwnedFd>) {
    ("io.bpfgate.Attach", json!({"parameters": {"link": link, "target": format!("t{link}")}}), Vec::new())
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn load_attaches_prints_and_returns() {
    let script = vec![opened(), loaded(&json!([map("m", "proxy", None)]), vec![]), attached(1), attached(2)];
    let line =
        "load app obj --detach --program p --program r --global rate=3 --attach p=lo --attach r=sched_switch";
    let (output, asked) = Broker::start("load", script).run(&line.split(' ').collect::<Vec<_>>());
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(asked[1], json!({"object": "obj", "programs": ["p", "r"], "globals": {"rate": 3}}));
    assert_eq!(asked[2]["target"], json!({"interface": "lo"}));
    assert_eq!(asked[3]["target"], json!({"event": "sched_switch"}));
    let printed = text(&output.stdout);
    assert!(printed.starts_with("instance 4\n\nPROGRAM  TYPE\np        xdp\n"), "{printed}");
    assert!(printed.ends_with("LINK  PROGRAM  TARGET\n1     p        t1\n2     r        t2\n"), "{printed}");
}

#[test]
fn load_stays_until_it_is_told_to_end() {
    let broker = Broker::start("stay", vec![opened(), loaded(&json!([]), vec![])]);
    let mut child = broker.command(&["load", "app", "obj", "--json"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "}"));
    assert!(child.try_wait().unwrap().is_none());
    // It may not have blocked the signal yet; the default action ends it all the same.
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).unwrap();
    child.wait().unwrap();
    broker.thread.join().unwrap();
}

#[test]
fn a_session_that_the_broker_ends_is_reported() {
    let (output, _) = Broker::start("ended", vec![opened(), HANG_UP]).run(&["load", "app", "obj"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("closed the connection"), "{}", text(&output.stderr));

    let script = vec![opened(), loaded(&json!([]), vec![]), HANG_UP];
    let (output, _) = Broker::start("ended2", script).run(&["load", "app", "obj"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("the broker ended the session"), "{}", text(&output.stderr));

    let script = vec![opened(), loaded(&json!([]), vec![]), HANG_UP];
    let arguments = ["exec", "app", "obj", "--", "sh", "-c", "sleep 0.2; exit 6"];
    let (output, _) = Broker::start("ended3", script).run(&arguments);
    assert_eq!(output.status.code(), Some(6));
    assert!(text(&output.stderr).contains("the broker ended the session"), "{}", text(&output.stderr));
}

#[test]
fn exec_hands_over_maps_and_forwards_the_status() {
    let maps =
        json!([map("b", "read_write", Some(1)), map("none", "proxy", None), map("a", "frozen", Some(0))]);
    let script = vec![opened(), loaded(&maps, vec![file("is a"), file("is b")])];
    let check = "echo $LISTEN_FDNAMES; cat <&3; echo; cat <&4; exit 9";
    let (output, _) = Broker::start("exec", script).run(&["exec", "app", "obj", "--", "sh", "-c", check]);
    assert_eq!(output.status.code(), Some(9), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "b:a\nis b\nis a");
}

#[test]
fn exec_passes_signals_on() {
    let broker = Broker::start("signal", vec![opened(), loaded(&json!([]), vec![])]);
    let script = "trap 'exit 5' TERM; echo ready; while :; do sleep 0.05; done";
    let arguments = ["exec", "app", "obj", "--", "sh", "-c", script];
    let mut child = broker.command(&arguments).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(5));
    broker.thread.join().unwrap();
}

#[test]
fn exec_of_nothing_is_an_error() {
    let script = vec![opened(), loaded(&json!([]), vec![])];
    let (output, _) = Broker::start("nothing", script).run(&["exec", "app", "obj", "--", "/nonexistent"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("/nonexistent cannot be started"), "{}", text(&output.stderr));
}

#[test]
fn a_map_is_read_through_the_broker() {
    let cpus = bpfgate_client::possible_cpus().unwrap();
    let value: String = (0..cpus).map(|_| bpfgate_client::hex::encode(&5u64.to_ne_bytes())).collect();
    let entry = |key: u32| json!({"key": bpfgate_client::hex::encode(&key.to_ne_bytes()), "value": value});
    let script = || {
        vec![
            opened(),
            ("io.bpfgate.Map", json!({"parameters": {"map": map("m", "proxy", None)}}), vec![]),
            ("io.bpfgate.ReadMap", json!({"parameters": {"entries": [entry(0)], "cursor": "c"}}), vec![]),
            ("io.bpfgate.ReadMap", json!({"parameters": {"entries": [entry(1)]}}), vec![]),
        ]
    };
    let total = 5 * cpus;
    let (output, _) =
        Broker::start("dump", script()).run(&["map", "dump", "app", "4", "m", "--format", "u32", "--sum"]);
    assert_eq!(text(&output.stdout), format!("KEY  VALUE\n0    {total}\n1    {total}\n"));
    let arguments = ["map", "get", "app", "4", "m", "1", "--format", "u64", "--json"];
    let (output, _) = Broker::start("get", script()).run(&arguments);
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(printed, json!([{"key": 1, "values": vec![5; cpus]}]));
    let (output, _) = Broker::start("set", script()).run(&["map", "set", "app", "4", "m", "00000000", "00"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("its access is proxy"));
}

#[test]
fn refusals_are_one_clean_line_and_exit_code_1() {
    let denied = json!({"error": "io.bpfgate.Denied",
        "parameters": {"message": "no rule\u{1b}[2J\nfake line", "request": "r1"}});
    let broker = Broker::start("denied", vec![("io.bpfgate.Open", denied, vec![])]);
    let (output, _) = broker.run(&["list", "app"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(text(&output.stderr), "bpfgate: denied: no rule\\u{1b}[2J\\nfake line (request r1)\n");

    let verifier = json!({"error": "io.bpfgate.Verifier",
        "parameters": {"message": "m", "request": "r2", "program": "p", "log": "0: r0 = 1\n1: bad\u{1b}\n"}});
    let script = vec![opened(), ("io.bpfgate.Load", verifier, vec![])];
    let (output, _) = Broker::start("verifier", script).run(&["load", "app", "obj"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).ends_with("(request r2)\n0: r0 = 1\n1: bad\\u{1b}\n"));
}

#[test]
fn list_and_show() {
    let instance = json!({"id": 4, "object": "obj", "mine": false, "programs": [{"name": "p", "type": "xdp"}],
        "maps": [map("m", "proxy", None)],
        "links": [{"id": 6, "program": "p", "hook": "xdp", "target": "lo"}]});
    let listed = || ("io.bpfgate.List", json!({"parameters": {"instances": [instance]}}), Vec::new());
    let (output, _) = Broker::start("list", vec![opened(), listed()]).run(&["list", "app"]);
    assert_eq!(
        text(&output.stdout),
        "INSTANCE  OBJECT  PROGRAMS  MAPS  LINKS\n4         obj     1         1     1\n"
    );
    let (output, _) = Broker::start("show", vec![opened(), listed()]).run(&["show", "app", "4", "--json"]);
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(printed["links"][0]["id"], 6);
    let (output, _) = Broker::start("show2", vec![opened(), listed()]).run(&["show", "app", "5"]);
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn attach_detach_unload() {
    let programs = json!([{"name": "r", "type": "raw_tracepoint"}]);
    let instance =
        json!({"id": 4, "object": "o", "mine": false, "programs": programs, "maps": [], "links": []});
    let listed = ("io.bpfgate.List", json!({"parameters": {"instances": [instance]}}), Vec::new());
    let broker = Broker::start("attach", vec![opened(), listed, attached(8)]);
    let (output, asked) =
        broker.run(&["attach", "app", "4", "r", "sched_switch", "--hook", "raw_tracepoint"]);
    assert_eq!(text(&output.stdout), "LINK  PROGRAM  TARGET\n8     r        t8\n");
    assert_eq!(asked[2]["target"], json!({"event": "sched_switch"}));
    assert_eq!(asked[2]["hook"], "raw_tracepoint");
    for (arguments, method, parameters) in [
        (["detach", "app", "8"], "io.bpfgate.Detach", json!({"link": 8})),
        (["unload", "app", "4"], "io.bpfgate.Unload", json!({"instance": 4})),
    ] {
        let broker = Broker::start(arguments[0], vec![opened(), (method, json!({"parameters": {}}), vec![])]);
        let (output, asked) = broker.run(&arguments);
        assert!(output.status.success());
        assert_eq!(asked[1], parameters);
    }
}

#[test]
fn status_says_who_answers() {
    let info = |interface: &str| {
        let info =
            json!({"vendor": "v", "product": "p", "version": "1", "url": "", "interfaces": [interface]});
        vec![("org.varlink.service.GetInfo", json!({"parameters": info}), Vec::new())]
    };
    let (output, _) = Broker::start("status", info("io.bpfgate")).run(&["status"]);
    assert!(output.status.success());
    assert!(
        text(&output.stdout).starts_with("BROKER      answers\nvendor      v\n"),
        "{}",
        text(&output.stdout)
    );
    let (output, _) = Broker::start("other", info("com.example")).run(&["status", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stdout).contains("\"answers\": false"));
}

#[test]
fn exit_codes_without_a_broker() {
    let status = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bpfgate"));
        command.env("BPFGATE_SOCKET", "/nonexistent/socket").args(arguments).output().unwrap().status.code()
    };
    assert_eq!(status(&["status"]), Some(3));
    assert_eq!(status(&["list", "app"]), Some(3));
    assert_eq!(status(&["list"]), Some(2));
    assert_eq!(status(&["load", "app", "obj", "--attach", "p="]), Some(2));
    assert_eq!(status(&["--version"]), Some(0));
}
