//! docs/capabilities.md and docs/capabilities-trace.md: what they show is what is printed. What needs running services, in
//! blocks that are marked as live, is in `services_caps`.

use bpfgate_tests::cli::Ended;
use bpfgate_tests::root::Root;
use bpfgate_tests::{bin_dir, bpf_object, needs_kernel, workspace};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn guide() -> PathBuf {
    workspace().join("docs/capabilities.md")
}

/// The guide with every block that begins with `$` as it is when its commands are run now.
fn run_again(text: &str, directory: &Path) -> (String, usize) {
    let (mut again, mut count) = (String::new(), 0);
    let mut console = false;
    for line in text.lines() {
        if line.starts_with("```") {
            console = line == "```console";
        }
        if !console || !line.starts_with(['$', '`']) {
            if !console {
                again.extend([line, "\n"]);
            }
            continue;
        }
        again.extend([line, "\n"]);
        let Some(words) = line.strip_prefix("$ bpfgate ") else { continue };
        let mut command = Command::new(bin_dir().join("bpfgate"));
        command.args(words.split(' ')).current_dir(directory);
        let ended = Ended::of(&mut command);
        assert_eq!((ended.code, ended.err.as_str()), (Some(0), ""), "{line}");
        again += &ended.out;
        count += 1;
    }
    (again, count)
}

/// What the guide has now, and what it should have.
fn compared() -> (String, String) {
    let text = fs::read_to_string(guide()).unwrap();
    let directory = std::env::temp_dir().join(format!("bpfgate-guide-{}", std::process::id()));
    fs::create_dir_all(&directory).unwrap();
    for object in ["packet_counter", "exec_tracer"] {
        let copy = directory.join(format!("{object}.bpf.o"));
        fs::copy(bpf_object(object), copy).expect("BPF objects are made by `make bpf`");
    }
    let (again, count) = run_again(&text, &directory);
    fs::remove_dir_all(&directory).unwrap();
    assert_eq!(count, 4, "commands of the guide");
    (text, again)
}

#[test]
fn the_guide_shows_what_is_printed() {
    let (text, again) = compared();
    for (number, (is, should)) in (1..).zip(text.lines().zip(again.lines())) {
        assert_eq!(is, should, "line {number}; run: make caps-table");
    }
    assert_eq!(text, again);
}

/// What is printed of a machine that is as the one in the guide, which is prepared: all that is read from files.
#[test]
fn the_guide_shows_what_doctor_says_of_such_a_machine() {
    const RUNNING: [&str; 4] = ["landlock", "policies", "broker", "processes"];
    let machine = Root::good("guide");
    for (path, text) in [
        ("proc/sys/kernel/osrelease", "6.18.2\n"),
        ("proc/sys/kernel/perf_event_paranoid", "2\n"),
        ("sys/kernel/security/lockdown", "none [integrity] confidentiality\n"),
        (
            "proc/self/mountinfo",
            "1 1 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n2 1 0:2 / /sys/fs/bpf rw - bpf bpf rw\n\
             3 1 0:3 / /run/open rw - bpf bpf rw\n",
        ),
    ] {
        machine.write(path, text);
    }
    machine.directory("run/open", 0o1777);
    // What the generator adds for the policies that are installed.
    for (app, policy) in
        [("cap-trace", "policies/shipped/cap-trace.toml"), ("packet-counter", "policies/packet-counter.toml")]
    {
        let mut show = Command::new(bin_dir().join("bpfgate"));
        let generated = Ended::of(show.args(["policy", "show", "--unit"]).arg(workspace().join(policy)));
        assert_eq!(generated.code, Some(0), "{generated:?}");
        let path = format!("run/systemd/generator/bpfgate-helper@{app}.service.d/50-policy.conf");
        machine.write(&path, &generated.out);
    }
    // Root alone may read it.
    fs::remove_file(machine.path().join("proc/sys/net/core/bpf_jit_enable")).unwrap();
    let text = fs::read_to_string(guide()).unwrap();
    let (_, shown) = text.split_once("$ bpfgate doctor\n").expect("the screen");
    let (shown, _) = shown.split_once("```\n").expect("its end");
    let is_running =
        |line: &&str| RUNNING.iter().any(|topic| line.starts_with(&format!("ok       {topic} ")));
    let (running, files): (Vec<&str>, Vec<&str>) = shown.lines().partition(is_running);
    assert_eq!(running.len(), RUNNING.len());
    let said = machine.cli(&["doctor"], "");
    assert_eq!(said.out.lines().collect::<Vec<_>>(), files, "{said:?}");
    // What the kernel is asked for says the same on all that are as new.
    needs_kernel!(6, 15, "the line about landlock");
    let here = Ended::of(Command::new(bin_dir().join("bpfgate")).arg("doctor"));
    let landlock = |line: &&str| line.split_whitespace().nth(1) == Some("landlock");
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(here.out.lines().find(landlock).map(words), running.into_iter().find(landlock).map(words));
}

/// The commands that the page on traces begins with are understood, every option with its value.
#[test]
fn the_page_on_traces_shows_commands_that_there_are() {
    let text = fs::read_to_string(workspace().join("docs/capabilities-trace.md")).unwrap();
    let (_, block) = text.split_once("```console\n").expect("the commands");
    let (block, _) = block.split_once("```\n").expect("their end");
    for line in block.lines() {
        let line = line.strip_prefix("$ bpfgate ").expect("a command");
        let words = line.split(['#', '>']).next().unwrap_or_default().split_whitespace();
        // With it, what stands before is read, and nothing is done.
        let ended = Ended::of(Command::new(bin_dir().join("bpfgate")).args(words).arg("--help"));
        assert_eq!((ended.code, ended.err.as_str()), (Some(0), ""), "{line}");
    }
    assert!(block.lines().count() >= 5, "{block}");
}

#[test]
#[ignore = "writes what the other checks: make caps-table"]
fn write() {
    fs::write(guide(), compared().1).unwrap();
}
