//! Services: what `bpfgate caps` and `bpfgate doctor` say of the units, under the service manager.

use bpfgate_client::LoadOptions;
use bpfgate_protocol::policy::Machine;
use bpfgate_tests::cli::Ended;
use bpfgate_tests::counting::policy;
use bpfgate_tests::services;
use bpfgate_tests::services::{DropIn, bpfgate, helper, main_process, said, systemctl};
use bpfgate_tests::{slowness, workspace};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

const APP: &str = "caps-app";

/// Needs `CAP_NET_ADMIN` and `CAP_BPF`.
fn xdp() -> String {
    policy(
        "minimal",
        "counts",
        "[[objects.o.xdp]]\nprogram = \"pass\"\ninterfaces = [\"lo\"]\nmode = \"generic\"",
    )
}

/// What a command says as JSON, and its exit code.
fn asked(words: &[&str]) -> (Value, Option<i32>) {
    let output = bpfgate(words);
    let value = serde_json::from_slice(&output.stdout);
    (value.unwrap_or_else(|error| panic!("{words:?}: {error}: {}", said(&output))), output.status.code())
}

/// The processes of a unit, by role.
fn shown(unit: &str) -> Vec<(String, Value)> {
    let (all, code) = asked(&["caps", "show", unit, "--json"]);
    assert_eq!(code, Some(0), "{all}");
    let role = |process: &Value| process["role"].as_str().unwrap_or_default().to_owned();
    all.as_array().unwrap().iter().map(|process| (role(process), process["threads"][0].clone())).collect()
}

#[test]
fn processes_of_the_units_hold_what_is_promised() {
    let services = services!();
    services.apply_policy(APP, &xdp());
    let client = services.session(APP);
    let (none, needed) = (json!([]), json!(["CAP_NET_ADMIN", "CAP_BPF"]));
    let broker = shown("bpfgate.service");
    assert_eq!(broker.iter().map(|(role, _)| role.as_str()).collect::<Vec<_>>(), ["broker"]);
    for set in ["permitted", "effective", "inheritable", "bounding", "ambient"] {
        assert_eq!(broker[0].1[set], none, "{set}");
    }
    let all = shown(&helper(APP));
    assert_eq!(all.len(), 3, "{all:?}");
    for (role, thread) in all {
        let held = if role == "helper" { &needed } else { &none };
        assert_eq!((&thread["permitted"], &thread["effective"]), (held, held), "{role}");
        // Nobody of them may empty it; the unit has.
        assert_eq!(thread["bounding"], needed, "{role}");
        assert_eq!((&thread["inheritable"], &thread["ambient"]), (&none, &none), "{role}");
    }
    drop(client);
}

#[test]
fn a_unit_is_compared_as_the_manager_has_it() {
    let services = services!();
    services.apply_policy(APP, &xdp());
    let unit = helper(APP);
    let (value, code) = asked(&["caps", "delta", APP, "--check", "--json"]);
    assert_eq!((code, &value["granted"]["by"]["source"]), (Some(0), &json!("systemctl show")), "{value}");
    assert_eq!((&value["missing"], &value["unused"]), (&json!([]), &json!([])), "{value}");
    // One too many and one too few.
    let sets = "CAP_BPF CAP_SYS_PTRACE";
    let text = format!(
        "[Service]\nCapabilityBoundingSet=\nCapabilityBoundingSet={sets}\nAmbientCapabilities=\nAmbientCapabilities={sets}\n"
    );
    let drop_in = DropIn::new(&unit, &text);
    let (value, code) = asked(&["caps", "delta", APP, "--check", "--json"]);
    assert_eq!(code, Some(1), "{value}");
    assert_eq!(value["missing"][0]["capability"], "CAP_NET_ADMIN", "{value}");
    assert_eq!(value["unused"][0]["capability"], "CAP_SYS_PTRACE", "{value}");
    let (value, code) = asked(&["doctor", "--json"]);
    assert_eq!(code, Some(1), "{value}");
    let said = value.to_string();
    assert!(
        said.contains(&format!("{unit}: ")) && said.contains("more than is needed: CAP_SYS_PTRACE"),
        "{said}"
    );
    drop(drop_in);
}

#[test]
fn doctor_finds_no_fault_in_the_services() {
    let services = services!();
    services.apply_policy(APP, &xdp());
    let client = services.session(APP);
    main_process(&helper(APP));
    let (value, _) = asked(&["doctor", "--json"]);
    for topic in ["units", "policies", "broker", "processes", "landlock", "kernel"] {
        let lines = value["lines"].as_array().unwrap();
        let of_topic: Vec<&Value> = lines.iter().filter(|line| line["topic"] == topic).collect();
        assert!(!of_topic.is_empty() && of_topic.iter().all(|line| line["state"] == "ok"), "{of_topic:?}");
    }
    drop(client);
}

/// A block of a page: what it is marked as, what it says, and what is quoted last before it.
struct Block<'t> {
    kind: &'t str,
    text: &'t str,
    named: &'t str,
}

fn blocks(page: &str) -> Vec<Block<'_>> {
    let mut parts = page.split("```");
    let mut all = Vec::new();
    while let (Some(before), Some(block)) = (parts.next(), parts.next()) {
        let (kind, text) = block.split_once('\n').expect("a kind, and lines");
        let named = before.rsplit('`').nth(1).unwrap_or_default();
        all.push(Block { kind, text, named });
    }
    all
}

/// The commands of a block with what they print.
fn transcripts(block: &str) -> Vec<(&str, &str)> {
    let begin = "$ bpfgate ";
    let (first, rest) = block.split_at(begin.len());
    assert_eq!(first, begin);
    rest.split("\n$ bpfgate ").map(|one| one.split_once('\n').unwrap_or((one, ""))).collect()
}

/// Lines without what differs from one time to the next: numbers, and with them the width of columns.
fn alike(text: &str) -> BTreeSet<String> {
    let word = |word: &str| {
        let text: String = word.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
        let mut short = text.clone();
        while short.contains("00") {
            short = short.replace("00", "0");
        }
        if short == "times" { "time".to_owned() } else { short }
    };
    // Who says what a unit grants: a machine without D-Bus tells root only.
    let said = |line: &'_ str| match line.split_once(" is granted: ") {
        Some((_, rest)) => rest.split(" (").next().unwrap_or_default().to_owned(),
        None => line.to_owned(),
    };
    let line = |line: &str| said(line).split_whitespace().map(word).collect::<Vec<_>>().join(" ");
    text.lines().map(line).filter(|line| !line.is_empty()).collect()
}

/// What the pages make on their machine, while this lives.
struct Made;

impl Made {
    const DROP_IN: &str = "/etc/systemd/system/meter.service.d/capabilities.conf";

    fn write(path: &str, text: &str) {
        let path = Path::new(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        systemctl(&["stop", "meter.service", "curious.service"]);
        if Path::new("/run/open").exists() {
            let _ = Command::new("umount").arg("/run/open").status();
        }
        let _ = fs::remove_dir("/run/open");
        let scripts = ["/usr/local/bin/meter", "/usr/local/bin/curious"];
        for file in scripts.into_iter().chain(["/etc/systemd/system/meter.service", Self::DROP_IN]) {
            let _ = fs::remove_file(file);
        }
        let _ = fs::remove_dir("/etc/systemd/system/meter.service.d");
        systemctl(&["daemon-reload"]);
    }
}

/// Whether the screens of doctor tell the same of what is no matter of the kernel and its settings.
fn same_screen(said: &str, expected: &str) -> bool {
    const OF_MACHINE: [&str; 10] = [
        "kernel",
        "units of clients",
        "BPF tokens",
        "unprivileged_bpf_disabled",
        "perf_event_paranoid",
        "BTF",
        "security modules",
        "lockdown",
        "cgroup v2",
        "landlock",
    ];
    let said = alike(said);
    let topic_of = |line: &str| {
        let (_, rest) = line.split_once(' ')?;
        OF_MACHINE.into_iter().find(|topic| rest.starts_with(topic))
    };
    let is_there = |line: &str| match topic_of(line) {
        Some(topic) => said.iter().any(|line| topic_of(line) == Some(topic)),
        None => said.contains(line),
    };
    alike(expected).iter().all(|line| is_there(line))
}

/// A command of somebody in the group adm, without a capability.
fn as_a_reader_of_logs(words: &str) -> Command {
    let adm = nix::unistd::Group::from_name("adm").unwrap().expect("Debian has it").gid;
    let mut command = Command::new("setpriv");
    command.args(["--reuid=12345", "--regid=12345", &format!("--groups={adm}"), "bpfgate"]);
    command.args(words.split(' '));
    command
}

/// The cgroup of its unit: whatever is in there, and nothing else.
#[test]
fn a_trace_of_an_app_is_one_of_its_unit() {
    let services = services!();
    services.apply_policy(APP, &xdp());
    let mut client = services.session(APP);
    let mut command =
        as_a_reader_of_logs(&format!("caps trace --app {APP} --duration {}s --json", 2 * slowness()));
    let mut trace = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut begun = String::new();
    let mut err = BufReader::new(trace.stderr.take().unwrap());
    err.read_line(&mut begun).unwrap();
    assert!(begun.starts_with("bpfgate: tracing by "), "{begun}");
    let instance = client.load("o", &LoadOptions::default()).unwrap();
    let mut text = String::new();
    trace.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(trace.wait().unwrap().success(), "{text}");
    let mut checks: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let whole = checks.pop().unwrap();
    assert!(whole["checks"].as_u64() > Some(0), "{whole}");
    for check in &checks {
        assert_eq!(check["unit"], helper(APP), "{check}");
    }
    let creates = |check: &Value| check["bpf"]["command"] == "MAP_CREATE" && check["cap"] == "CAP_BPF";
    assert!(checks.iter().any(creates), "{text}");
    drop((instance, client));
}

/// Follows a page from top to bottom: writes what it shows as files, runs what it says root runs, and compares what the
/// other commands print.
fn follow(page: &str) {
    let _services = services!();
    let _made = Made;
    let page = fs::read_to_string(workspace().join(page)).unwrap();
    let has_tracepoint = Machine::here().unwrap().kernel >= (6, 14);
    let (mut count, mut others) = (0, Vec::new());
    for block in blocks(&page) {
        match block.kind {
            "python" | "ini" => Made::write(block.named, block.text),
            "sh" => {
                let done = Command::new("sh").args(["-ec", block.text]).output().unwrap();
                assert!(done.status.success(), "{}: {}", block.text, said(&done));
                // The interpreter has started.
                std::thread::sleep(Duration::from_secs(1) * slowness());
            }
            "console live" => {
                for (line, expected) in transcripts(block.text) {
                    let ended = Ended::of(&mut as_a_reader_of_logs(line));
                    assert_eq!(ended.code, Some(0), "{line}: {ended:?}");
                    // All are run: this shows them as they should be on the page.
                    println!("$ bpfgate {line}\n{}", ended.out);
                    let is_same = match line {
                        "doctor" => same_screen(&ended.out, expected),
                        // Without the tracepoint the check in mmap may not be seen: less is printed.
                        _ if line.contains("meter.service") && !has_tracepoint => true,
                        // What came of a call that ended after the trace is not known: a line more, where all is slow.
                        _ if slowness() > 1 => alike(&ended.out).is_superset(&alike(expected)),
                        _ => alike(&ended.out) == alike(expected),
                    };
                    if !is_same {
                        others.push(line);
                    }
                    if let Some(start) = ended.out.find(&format!("# {}", Made::DROP_IN)) {
                        Made::write(Made::DROP_IN, &ended.out[start..]);
                    }
                    count += 1;
                }
            }
            _ => {}
        }
    }
    assert!(count > 0 && others.is_empty(), "of {count} commands these print something else: {others:?}");
}

/// What the guide shows of its service is what is printed, and the drop-in mends the unit.
#[test]
fn the_recipe_of_the_guide_leads_where_it_says() {
    follow("docs/capabilities.md");
}

#[test]
fn the_page_on_traces_shows_what_is_printed() {
    follow("docs/capabilities-trace.md");
}
