//! The tools for people who write policies: without root, without a broker, on the objects that the tests use.

use bpfgate_tests::cli::Ended;
use bpfgate_tests::gate::sha256;
use bpfgate_tests::{bin_dir, bpf_object, needs_root, workspace};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A directory of a policy's author.
struct Desk(PathBuf);

impl Desk {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("bpfgate-tools-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, text).unwrap();
        path
    }

    /// `bpfgate policy` with these words, in this directory.
    fn run(&self, line: &str) -> Ended {
        let mut command = Command::new(bin_dir().join("bpfgate"));
        command.arg("policy").args(line.split_whitespace()).current_dir(&self.0);
        Ended::of(command.env("BPFGATE_SOCKET", "/nonexistent/socket"))
    }

    fn drafted(&self, object: &Path) -> Ended {
        self.run(&format!("new --from-object {}", object.display()))
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The tools of somebody who may do nothing else, with a full bounding set as every login has it.
#[test]
fn an_ordinary_user_needs_no_privilege() {
    needs_root!();
    let desk = Desk::new("ordinary");
    let own = |name: &str| desk.0.join(name);
    for (from, name) in [
        (bin_dir().join("bpfgate"), "bpfgate"),
        (bin_dir().join("bpfgate-loader"), "bpfgate-loader"),
        (bpf_object("packet_counter"), "packet_counter.bpf.o"),
    ] {
        fs::copy(from, own(name)).unwrap();
        fs::set_permissions(own(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    fs::set_permissions(&desk.0, fs::Permissions::from_mode(0o777)).unwrap();
    let run = |line: &str| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=12345", "--regid=12345", "--clear-groups"]).arg(own("bpfgate"));
        Ended::of(command.arg("policy").args(line.split_whitespace()).current_dir(&desk.0))
    };
    let draft = run("new --from-object packet_counter.bpf.o --user daemon --interface lo");
    assert_eq!(draft.code, Some(0), "{draft:?}");
    desk.write("app.toml", &draft.out);
    let check = run("check app.toml");
    assert_eq!(check.code, Some(0), "{check:?}");
    assert!(!check.err.contains("warning"), "{check:?}");
    assert_eq!(run("explain --file app.toml --as daemon load packet_counter").code, Some(0));
}

/// A policy that is as it should be.
fn good() -> String {
    let object = bpf_object("packet_counter");
    format!(
        "version = 1\n[[client]]\nuser = \"daemon\"\nmay = [\"load\", \"attach\", \"maps\"]\n[objects.counter]\n\
         path = \"{}\"\nsha256 = \"{}\"\n[[objects.counter.xdp]]\nprogram = \"count_packets\"\n\
         interfaces = [\"eth0\", \"lan*\"]\n[objects.counter.maps]\ncounters = \"frozen\"\n",
        object.display(),
        sha256(&object)
    )
}

/// Another object than that of [`good`].
fn of_object(name: &str, rest: &str) -> String {
    let object = bpf_object(name);
    format!(
        "version = 1\n[objects.o]\npath = \"{}\"\nsha256 = \"{}\"\n{rest}",
        object.display(),
        sha256(&object)
    )
}

/// Does what the comments of a draft say: fills in their examples, takes the `#` off what is to be used.
fn follow(draft: &str) -> String {
    let mut text = String::new();
    for line in draft.lines() {
        let line = match line.split_once(" # FILL IN: ") {
            Some((setting, hint)) => {
                let (key, _) = setting.split_once(" = ").unwrap();
                let value = match hint.split_once("such as ") {
                    Some((_, example)) => example.split(';').next().unwrap(),
                    None => hint.split(" or ").next().unwrap(),
                };
                format!("{key} = {value}")
            }
            None => line.replace("\"...\"", "\"daemon\""),
        };
        let commented = ["# [[client]]", "# user = ", "# may = ", "# allow = ", "# kfuncs = "];
        let taken_off = commented.iter().any(|start| line.starts_with(start));
        text += if taken_off { &line[2..] } else { &line };
        text.push('\n');
    }
    text
}

#[test]
fn every_draft_is_valid_once_its_comments_were_followed() {
    let desk = Desk::new("new");
    let objects = fs::read_dir(workspace().join("target/bpf")).expect("BPF objects are made by `make bpf`");
    let (mut drafts, mut refused) = (0, 0);
    for entry in objects {
        let object = entry.unwrap().path();
        let draft = desk.drafted(&object);
        if draft.code != Some(0) {
            // No policy could allow it: that is said, and nothing is printed.
            assert_eq!((draft.code, draft.out.as_str()), (Some(1), ""), "{draft:?}");
            assert!(draft.err.contains("no policy can allow this object"), "{draft:?}");
            refused += 1;
            continue;
        }
        drafts += 1;
        let path = desk.write("app.toml", &draft.out);
        let check = desk.run("check app.toml");
        let has_gaps =
            [" # FILL IN: ", "# allow = ", "# kfuncs = "].iter().any(|gap| draft.out.contains(gap));
        assert_eq!(check.code, Some(if has_gaps { 4 } else { 0 }), "{}: {check:?}", object.display());
        // Whoever fills in nothing lets nobody in.
        assert!(!draft.out.lines().any(|line| line.starts_with("[[client]]")), "{}", draft.out);
        fs::write(&path, follow(&draft.out)).unwrap();
        let check = desk.run("check app.toml");
        assert_eq!(check.code, Some(0), "{}: {check:?}\n{}", object.display(), follow(&draft.out));
        // The slice of the example is on machines with systemd only.
        let [all, of_machine] =
            ["warning: ", "warning: there is no directory "].map(|text| check.err.matches(text).count());
        assert_eq!(all, of_machine, "{}: {check:?}", object.display());
    }
    assert!(drafts >= 15 && refused >= 5, "{drafts} drafts, {refused} refused");
}

#[test]
fn a_draft_takes_what_is_known() {
    let object = bpf_object("packet_counter");
    for (option, says) in [
        ("--user nosuchuser", "no user \"nosuchuser\""),
        ("--interface a/b", "--interface: "),
        ("--app a/b", "--app: "),
    ] {
        let desk = Desk::new("unusable");
        let draft = desk.run(&format!("new --from-object {} {option}", object.display()));
        assert_eq!((draft.code, draft.out.as_str()), (Some(2), ""), "{draft:?}");
        assert!(draft.err.contains(says), "no {says:?} in {draft:?}");
    }
    let desk = Desk::new("known");
    let object = bpf_object("packet_counter");
    let line = format!(
        "new --from-object {} --app pc --user daemon --interface eth0 --interface lan*",
        object.display()
    );
    let draft = desk.run(&line);
    assert_eq!(draft.code, Some(0), "{draft:?}");
    desk.write("pc.toml", &draft.out);
    assert_eq!(desk.run("check pc.toml").code, Some(0));
    let explain = |request: &str| desk.run(&format!("explain --file pc.toml --as daemon {request}")).code;
    assert_eq!(explain("attach packet_counter count_packets lan3"), Some(0));
    assert_eq!(explain("attach packet_counter count_packets wlan0"), Some(1));
    assert_eq!(explain("map packet_counter counters"), Some(1), "a draft hands out no map");
}

#[test]
fn what_is_not_in_the_object_is_found_with_its_place() {
    let desk = Desk::new("check");
    desk.write("good.toml", &good());
    let check = desk.run("check good.toml");
    assert_eq!((check.code, check.out.as_str()), (Some(0), "1 valid, 0 invalid\n"), "{check:?}");
    let good = good();
    let change = |from: &str, to: &str| {
        assert!(good.contains(from), "{from}");
        good.replace(from, to)
    };
    let xdp = "[[objects.o.xdp]]\nprogram = \"p\"\ninterfaces = [\"lo\"]\n";
    for (text, place, says, help) in [
        (
            change("count_packets", "count_packet"),
            "9:11",
            "has no program count_packet",
            "did you mean \"count_packets\"?",
        ),
        (change("count_packets", "zzz"), "9:11", "has no program zzz", "its programs are count_packets"),
        (change("counters", "couters"), "12:1", "has no map couters", "did you mean \"counters\"?"),
        (
            change(".xdp]]", ".tcx]]\ndirection = \"egress\""),
            "10:11",
            "program count_packets is of type xdp, but the policy says tcx",
            "which is for [[objects.counter.xdp]]",
        ),
        (change("sha256 = \"", "sha256 = \"00"), "7:10", "a digest is 64", "sha256sum"),
        (
            change(&sha256(&bpf_object("packet_counter")), &"0".repeat(64)),
            "7:10",
            "is another file: its digest is",
            "policy pin",
        ),
        (good.clone() + "[limits]\nmap_memory = 16\n", "14:14", "this limit is 16", ""),
        (good.clone() + "[limits]\ninstructions = 1\n", "14:16", "this limit is 1", ""),
        (
            of_object(
                "sendsignal",
                "[[objects.o.tracepoint]]\nprogram = \"signal_self\"\nevents = [\"a:b\"]\n",
            ),
            "6:11",
            "calls bpf_send_signal, which sends signals to any process",
            "",
        ),
        (of_object("mapinmap", ""), "3:8", "which apps may not have", ""),
        (of_object("pinned", ""), "3:8", "wants to be pinned", ""),
        (of_object("kconfig", ""), "3:8", "kernel's configuration", ""),
        (
            of_object("exec_tracer", "[objects.o.maps]\nevents = \"frozen\"\n"),
            "6:10",
            "ring buffer",
            "read-write",
        ),
        (
            of_object("exec_tracer", "[objects.o.globals]\ntarget_uid = { min = 0, max = 4294967296 }\n"),
            "6:14",
            "does not fit",
            "it holds 0 to 4294967295",
        ),
        (
            of_object("exec_tracer", "[objects.o.globals]\ntarget_gid = { min = 0, max = 1 }\n"),
            "6:1",
            "has no global target_gid",
            "did you mean \"target_uid\"?",
        ),
        (of_object("minimal", xdp), "6:11", "has no program p", "its programs are"),
    ] {
        desk.write("app.toml", &text);
        let check = desk.run("check app.toml");
        assert_eq!(check.code, Some(4), "{says}: {check:?}");
        for part in [&format!("app.toml:{place}"), says, help, "^"] {
            assert!(check.err.contains(part), "no {part:?} in\n{}", check.err);
        }
        // Without a look into the objects only what the file itself says can be wrong.
        let without = desk.run("check --no-objects app.toml");
        assert_eq!(
            without.code == Some(0),
            !says.contains("digits") && !says.contains("a digest is"),
            "{without:?}"
        );
    }
    desk.write("bad.toml", &change("count_packets", "zzz"));
    let found: Value = serde_json::from_str(&desk.run("check bad.toml --json").out).unwrap();
    let problem = &found[0]["problems"][0];
    assert_eq!((&problem["line"], &problem["column"]), (&json!(9), &json!(11)), "{found}");
}

/// What a program calls through functions of its object counts, and what another program calls does not.
#[test]
fn functions_that_need_a_grant_are_found_wherever_they_are_called() {
    let desk = Desk::new("callees");
    for (program, calls) in [("by_call", true), ("by_address", true), ("not_at_all", false)] {
        let rule = format!(
            "[[objects.o.raw_tracepoint]]\nprogram = \"{program}\"\nevents = [\"sched_process_exit\"]\n"
        );
        desk.write("app.toml", &of_object("callees", &rule));
        let check = desk.run("check app.toml");
        assert_eq!(check.code, Some(if calls { 4 } else { 0 }), "{program}: {check:?}");
        assert_eq!(check.err.contains("calls bpf_send_signal"), calls, "{program}: {check:?}");
        let allowed = rule + "[objects.o.helpers]\nallow = [\"bpf_send_signal\"]\n";
        desk.write("app.toml", &of_object("callees", &allowed));
        let check = desk.run("check app.toml");
        assert_eq!(
            (check.code, check.err.contains("leave it out")),
            (Some(0), !calls),
            "{program}: {check:?}"
        );
    }
}

/// By name: libbpf has not put numbers in yet.
#[test]
fn functions_of_the_kernel_are_found_by_name_and_those_that_nobody_may_call_are_refused() {
    let desk = Desk::new("kfuncs");
    let grant = |names: &str| format!("[objects.o.helpers]\nkfuncs = [{names}]\n");
    let (lock, both) = ("\"bpf_rcu_read_lock\"", "\"bpf_rcu_read_lock\", \"bpf_rcu_read_unlock\"");
    for (object, program, grant, code, says) in [
        ("kfunc", "call_kfunc", String::new(), 4, "calls bpf_rcu_read_lock, which"),
        ("kfunc", "call_kfunc", grant(lock), 4, "calls bpf_rcu_read_unlock, which"),
        ("kfunc", "call_kfunc", grant(both), 0, ""),
        ("kfunc", "call_kfunc", grant(&format!("{both}, \"vfs_read\"")), 0, "calls vfs_read"),
        ("kfuncweak", "call_weak", grant(both), 4, "__weak"),
        ("kfuncraw", "by_number", grant(both), 4, "by number"),
        ("kfuncraw", "of_module", grant(both), 4, "of a kernel module"),
        ("ksym", "store_address", String::new(), 4, "variable"),
    ] {
        let rule = format!("[[objects.o.xdp]]\nprogram = \"{program}\"\ninterfaces = [\"lo\"]\n");
        desk.write("app.toml", &of_object(object, &(rule + &grant)));
        let check = desk.run("check app.toml");
        assert!(check.code == Some(code) && check.err.contains(says), "{object}, {says}: {check:?}");
    }
}

/// The section says which hook and which function; where it does not, the author does.
#[test]
fn a_draft_of_programs_for_functions_of_the_kernel_has_their_hooks() {
    let desk = Desk::new("traced");
    let draft = desk.drafted(&bpf_object("traced")).out;
    for rule in [
        "[[objects.traced.fentry]] # section fentry/vfs_read\nprogram = \"on_call\"\nfunction = \"vfs_read\"\n",
        "[[objects.traced.fexit]] # section fexit\nprogram = \"on_return\"\nfunction = \"\" # FILL IN: ",
        "[[objects.traced.kprobe]] # section kprobe.multi\nprogram = \"on_probe\"\nfunctions = [] # FILL IN: ",
        "program = \"on_probe_return\"\nfunctions = [] # FILL IN: functions of the kernel, such as [\"cap_capable\"]\nreturn = true",
    ] {
        assert!(draft.contains(rule), "no {rule:?} in\n{draft}");
    }
}

#[test]
fn what_cannot_be_looked_at_is_a_warning() {
    let desk = Desk::new("warn");
    let object = bpf_object("packet_counter").display().to_string();
    let digest = format!("sha256 = \"{}\"\n", sha256(&bpf_object("packet_counter")));
    for (text, says) in [
        (good().replace(&object, "/nonexistent/packet_counter.bpf.o"), "nothing of it was checked"),
        (good().replace(&digest, ""), "without a sha256"),
        (
            good().replace("may = ", "proxy = [\"nosuch\"]\nmay = "),
            "no object of this policy hands out map nosuch",
        ),
        (good().replace(&object, "/home/non existent/o"), "cannot be written into a unit file"),
        (good() + "[objects.counter.helpers]\nallow = [\"bpf_send_signal\"]\n", "calls bpf_send_signal"),
        (
            of_object("exec_tracer", "[[objects.o.tracepoint]]\nprogram = \"on_exec\"\nevents = [\"a:b\"]\n"),
            "program on_exec is written for sched:sched_process_exec, and not for a:b",
        ),
        (
            of_object(
                "egress_meter",
                "[[objects.o.cgroup_skb]]\nprogram = \"count_egress\"\ndirection = \"egress\"\ncgroups = [\"/no/group\"]\n",
            ),
            "there is no directory /no/group on this machine now",
        ),
    ] {
        desk.write("app.toml", &text);
        let check = desk.run("check app.toml");
        assert_eq!(check.code, Some(0), "{check:?}");
        assert!(check.err.contains("warning: ") && check.err.contains(says), "no {says:?} in {check:?}");
        let verdict = desk.run("check --json app.toml").json();
        let warning = verdict[0]["warnings"][0]["message"].as_str().unwrap();
        assert_eq!((&verdict[0]["valid"], warning.contains(says)), (&json!(true), true), "{verdict}");
    }
    // The same file elsewhere: found by its name.
    desk.write("app.toml", &good().replace(&object, "/nonexistent/packet_counter.bpf.o"));
    let check = desk.run(&format!("check app.toml --objects {}", workspace().join("target/bpf").display()));
    assert_eq!(check.code, Some(0), "{check:?}");
    assert!(!check.err.contains("warning"), "{check:?}");
}

/// Whatever a file holds, the process that reads it is another one, and what it cannot read is a sentence.
#[test]
fn damaged_objects_are_told_apart_from_good_ones() {
    let desk = Desk::new("damaged");
    let bytes = fs::read(bpf_object("packet_counter")).unwrap();
    let mut states = 0;
    for (name, damaged) in [
        ("empty", Vec::new()),
        ("text", b"not an object".to_vec()),
        ("zeros", vec![0; 4096]),
        ("half", bytes[..bytes.len() / 2].to_vec()),
        ("head", bytes[..64].to_vec()),
    ] {
        let path = desk.0.join(format!("{name}.bpf.o"));
        fs::write(&path, damaged).unwrap();
        let draft = desk.drafted(&path);
        assert_eq!((draft.code, draft.out.as_str()), (Some(1), ""), "{name}: {draft:?}");
        assert!(draft.err.lines().count() >= 1 && draft.err.contains(name), "{name}: {draft:?}");
        let text = of_object("packet_counter", "")
            .replace(&bpf_object("packet_counter").display().to_string(), &path.display().to_string());
        desk.write("app.toml", &text.replace(&sha256(&bpf_object("packet_counter")), &sha256(&path)));
        let check = desk.run("check app.toml");
        assert_eq!(check.code, Some(4), "{name}: {check:?}");
        states += 1;
    }
    assert_eq!(states, 5);
    // Every byte of the header and some of the rest, turned around.
    for place in (0..64).chain((64..bytes.len()).step_by(bytes.len() / 64)) {
        let mut damaged = bytes.clone();
        damaged[place] ^= 0xff;
        let path = desk.0.join("flipped.bpf.o");
        fs::write(&path, damaged).unwrap();
        let draft = desk.drafted(&path);
        assert!(matches!(draft.code, Some(0 | 1)), "byte {place}: {draft:?}");
        assert!(
            !draft.err.contains("panicked") && !draft.err.contains("signal 31"),
            "byte {place}: {draft:?}"
        );
    }
}

#[test]
fn explain_says_which_line_decides() {
    let desk = Desk::new("explain");
    desk.write("app.toml", &good());
    for (client, request, code, says) in [
        ("daemon", "open", 0, "app.toml:2"),
        ("1:1", "load counter count_packets", 0, "app.toml:8"),
        ("daemon", "attach counter count_packets eth0", 0, "allowed"),
        ("daemon", "attach counter count_packets eth1", 1, "interface eth1 is not matched by eth0, lan*"),
        ("daemon", "attach counter count_packets", 1, "name the target"),
        ("daemon", "map counter counters", 0, "app.toml:12"),
        ("daemon", "map counter couters", 1, "did you mean \"counters\"?"),
        ("12345:7", "open", 1, "this entry is for uid 1, and this is uid 12345"),
        ("root", "open", 1, "this is uid 0"),
        ("daemon.service", "open", 1, "this is an unknown uid"),
    ] {
        let explained = desk.run(&format!("explain --file app.toml --as {client} {request}"));
        assert_eq!(explained.code, Some(code), "{client} {request}: {explained:?}");
        assert!(explained.out.contains(says), "{client} {request}: no {says:?} in {explained:?}");
        let json = desk.run(&format!("explain --json --policies . --app app --as {client} {request}"));
        let json: Value = serde_json::from_str(&json.out).unwrap();
        assert_eq!(json["allowed"], json!(code == 0), "{json}");
    }
    desk.write("unit.toml", &good().replace("user = \"daemon\"", "user = \"daemon\"\nunit = \"a.service\""));
    for (client, code) in
        [("daemon --unit a.service", 0), ("daemon --unit b.service", 1), ("daemon", 1), ("a.service", 1)]
    {
        let explained = desk.run(&format!("explain --file unit.toml --as {client} open"));
        assert_eq!(explained.code, Some(code), "{client}: {explained:?}");
    }
    for (line, code) in [
        ("explain --file app.toml --as daemon --unit nosuch open", 2),
        ("explain --file app.toml --as nosuchuser open", 2),
        ("explain --file app.toml --as daemon frobnicate", 2),
        ("explain --as daemon open", 2),
        ("explain --policies . --app nosuch --as daemon open", 1),
        ("explain --file nosuch.toml --as daemon open", 4),
    ] {
        assert_eq!(desk.run(line).code, Some(code), "{line}");
    }
}

#[test]
fn show_tells_defaults_from_what_is_said() {
    let desk = Desk::new("show");
    desk.write("app.toml", &(good() + "[limits]\nprograms = 16\n"));
    let shown = desk.run("show app.toml --json").json();
    let defaults = shown["defaults"].as_array().unwrap();
    assert!(defaults.contains(&json!("maps")) && !defaults.contains(&json!("programs")), "{shown}");
    let table = desk.run("show app.toml").out;
    let has = |row: &str| table.lines().any(|line| line.split_whitespace().eq(row.split(' ')));
    for row in
        ["programs 16 line 14", "maps 32 default", "keep session default", "counter map counters frozen 12"]
    {
        assert!(has(row), "no row {row:?} in\n{table}");
    }
    let unit = desk.run("show app.toml --unit");
    assert!(unit.out.contains("\nCapabilityBoundingSet=CAP_NET_ADMIN CAP_BPF\n"), "{unit:?}");
    assert_eq!(desk.run("show nosuch").code, Some(1));
}

#[test]
fn diff_tells_wider_from_narrower() {
    let desk = Desk::new("diff");
    for directory in ["old", "new"] {
        fs::create_dir(desk.0.join(directory)).unwrap();
        desk.write(&format!("{directory}/app.toml"), &good());
    }
    let diff = |new: &str| {
        desk.write("new/app.toml", new);
        desk.run("diff old new")
    };
    let same = diff(&format!("# a comment\n{}", good()));
    assert_eq!((same.code, same.out.as_str()), (Some(0), "app: allows the same\n"), "{same:?}");
    let narrower = diff(&good().replace("lan*", "lan0"));
    assert_eq!(narrower.code, Some(0), "{narrower:?}");
    assert!(
        narrower.out.contains("- less: program count_packets of object counter on xdp lan*"),
        "{narrower:?}"
    );
    let wider = diff(&(good().replace("\"lan*\"", "\"*\"") + "[limits]\nprograms = 32\n"));
    assert_eq!(wider.code, Some(1), "{wider:?}");
    assert!(wider.out.contains("+ more: limit programs 32 (was: limit programs 16)"), "{wider:?}");
    assert_eq!(diff("version = 2\n").code, Some(4));
    desk.write("new/app.toml", &good());
    desk.write("new/another.toml", &good());
    let added = desk.run("diff old new");
    assert_eq!(added.code, Some(1), "{added:?}");
    assert!(added.out.contains("another: a new policy"), "{added:?}");
    assert_eq!(desk.run("diff new old").code, Some(0));
    assert_eq!(desk.run("diff old/app.toml new/another.toml").out, "allows the same\n");
    // Repositories have the cases of `policy test` beside their policies.
    desk.write(
        "new/cases.toml",
        "[[case]]\napp = \"app\"\nas = \"1\"\nrequest = \"open\"\nexpect = \"deny\"\n",
    );
    assert_eq!(desk.run("diff old new").out, added.out);
}

#[test]
fn cases_are_run_and_failing_ones_explained() {
    let desk = Desk::new("cases");
    desk.write("app.toml", &good().replace("\"daemon\"", "\"flowmon\""));
    let case = |client: &str, request: &str, expect: &str| {
        format!(
            "[[case]]\napp = \"app\"\nas = \"{client}\"\nrequest = \"{request}\"\nexpect = \"{expect}\"\n"
        )
    };
    let people = "[users]\nflowmon = 990\n[groups]\nflowmon = 991\n";
    let good = format!(
        "{people}{}line = 2\n{}{}",
        case("flowmon:flowmon", "load counter", "allow"),
        case("daemon", "load counter", "deny"),
        case("990:1", "attach counter count_packets eth1", "deny")
    );
    desk.write("cases", &good);
    let test = desk.run("test cases");
    assert_eq!((test.code, test.out.as_str()), (Some(0), "3 as expected, 0 not\n"), "{test:?}");
    for (text, code, says) in [
        (good.replace("\"deny\"", "\"allow\""), 1, "this entry is for uid 990, and this is uid 1"),
        (good.replace("line = 2", "line = 7"), 1, "line 2 decided, not line 7"),
        (good.replace("\"allow\"", "\"maybe\""), 4, "unknown variant"),
        (good.replace("load counter", "steal counter"), 4, "a request is"),
        // What is not there is denied to everybody: such a case would test nothing.
        (good.replace("\"app\"", "\"ap\""), 4, "no policy of app ap"),
        (good.replace("load counter", "load conuter"), 4, "no object conuter"),
        (good.replace("count_packets", "cuont_packets"), 4, "no program cuont_packets"),
        ("case = []\n".to_owned(), 4, "there is no case"),
    ] {
        desk.write("cases", &text);
        let test = desk.run("test cases");
        assert_eq!(test.code, Some(code), "{test:?}");
        assert!(test.out.contains(says) || test.err.contains(says), "no {says:?} in {test:?}");
    }
    desk.write("cases", &good.replace(people, ""));
    assert_ne!(desk.run("test cases").code, Some(0), "nobody is called flowmon here");
}

#[test]
fn pin_writes_digests_and_nothing_else() {
    let desk = Desk::new("pin");
    let digest = sha256(&bpf_object("packet_counter"));
    let old = good().replace(&format!("\"{digest}\""), &format!("\"{}\" # mine", "0".repeat(64)));
    let path = desk.write("app.toml", &old);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let check = desk.run("pin --check app.toml");
    assert_eq!((check.code, fs::read_to_string(&path).unwrap()), (Some(1), old.clone()), "{check:?}");
    let pin = desk.run("pin app.toml");
    assert_eq!(pin.code, Some(0), "{pin:?}");
    assert!(pin.out.contains(&format!("{} -> {digest}", "0".repeat(64))), "{pin:?}");
    assert_eq!(fs::read_to_string(&path).unwrap(), old.replace(&"0".repeat(64), &digest));
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o640);
    assert_eq!(desk.run("pin --check app.toml").code, Some(0));
    assert_eq!(desk.run("check app.toml").code, Some(0));
    let left: Vec<_> = fs::read_dir(&desk.0).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["app.toml"], "something is left behind");
    // An object that is not there leaves the file as it is.
    let gone = good().replace("packet_counter.bpf.o", "nosuch.bpf.o");
    fs::write(&path, &gone).unwrap();
    assert_eq!((desk.run("pin app.toml").code, fs::read_to_string(&path).unwrap()), (Some(1), gone));
}
