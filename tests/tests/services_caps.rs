//! Services: what `bpfgate caps` and `bpfgate doctor` say of the units, under the service manager.

use bpfgate_tests::cli::Ended;
use bpfgate_tests::counting::policy;
use bpfgate_tests::services;
use bpfgate_tests::services::{DropIn, bpfgate, helper, main_process, said, systemctl};
use bpfgate_tests::{slowness, workspace};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
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

/// What stands in the blocks of this kind.
fn blocks<'t>(text: &'t str, kind: &str) -> Vec<&'t str> {
    let begin = format!("```{kind}\n");
    text.split(&begin).skip(1).map(|rest| rest.split_once("```\n").expect("its end").0).collect()
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

/// The service of the guide, while this lives.
struct Meter;

impl Meter {
    const DROP_IN: &str = "/etc/systemd/system/meter.service.d/capabilities.conf";

    fn start(guide: &str) -> Self {
        fs::write("/usr/local/bin/meter", blocks(guide, "python")[0]).unwrap();
        fs::set_permissions("/usr/local/bin/meter", fs::Permissions::from_mode(0o755)).unwrap();
        fs::write("/etc/systemd/system/meter.service", blocks(guide, "ini")[0]).unwrap();
        Self::again();
        Self
    }

    fn again() {
        for words in [["daemon-reload"].as_slice(), &["restart", "meter.service"]] {
            let done = systemctl(words);
            assert!(done.status.success(), "{}", said(&done));
        }
        // The interpreter has started.
        std::thread::sleep(Duration::from_secs(1) * slowness());
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        systemctl(&["stop", "meter.service"]);
        for file in ["/usr/local/bin/meter", "/etc/systemd/system/meter.service", Self::DROP_IN] {
            let _ = fs::remove_file(file);
        }
        let _ = fs::remove_dir("/etc/systemd/system/meter.service.d");
        systemctl(&["daemon-reload"]);
    }
}

/// Runs a command of the guide as somebody in the group adm, without a capability.
fn as_a_reader_of_logs(words: &str) -> Ended {
    let adm = nix::unistd::Group::from_name("adm").unwrap().expect("Debian has it").gid;
    let mut command = Command::new("setpriv");
    command.args(["--reuid=12345", "--regid=12345", &format!("--groups={adm}"), "bpfgate"]);
    Ended::of(command.args(words.split(' ')))
}

/// The guide from top to bottom: what it shows of its service is what is printed, and the drop-in mends the unit.
#[test]
fn the_recipe_of_the_guide_leads_where_it_says() {
    let _services = services!();
    let guide = fs::read_to_string(workspace().join("docs/capabilities.md")).unwrap();
    let _meter = Meter::start(&guide);
    let shown = blocks(&guide, "console live");
    assert_eq!(shown.len(), 3);
    // All are run: what stands above shows them as they should be in the guide.
    let mut others = Vec::new();
    for transcript in shown {
        let (line, expected) = transcript.split_once('\n').unwrap();
        let ended = as_a_reader_of_logs(line.strip_prefix("$ bpfgate ").unwrap());
        assert_eq!(ended.code, Some(0), "{line}: {ended:?}");
        println!("{line}\n{}", ended.out);
        if alike(&ended.out) != alike(expected) {
            others.push(line);
        }
        if let Some(start) = ended.out.find(&format!("# {}", Meter::DROP_IN)) {
            fs::create_dir_all("/etc/systemd/system/meter.service.d").unwrap();
            fs::write(Meter::DROP_IN, &ended.out[start..]).unwrap();
            Meter::again();
        }
    }
    assert!(others.is_empty(), "the guide shows something else: {others:?}");
}
