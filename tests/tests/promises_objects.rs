//! Promises 4 and 5: which bytes are loaded, and what they may contain.

use bpfgate_client::{Client, Error, Instance, LoadOptions};
use bpfgate_tests::gate::{MINIMAL, bpf_object};
use bpfgate_tests::raw::Refused;
use bpfgate_tests::{Gate, Raw, SOON, needs_kernel, needs_root, wait_until};
use serde_json::json;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;

/// The same, without a digest.
fn by_owner(path: &Path) -> String {
    MINIMAL.replace("{object:minimal}", &format!("path = \"{}\"", path.display()))
}

fn load(client: &mut Client) -> Result<Instance, Error> {
    client.load("o", &LoadOptions::default())
}

#[test]
fn promise_04_an_object_that_changes_on_disk_takes_effect_with_the_next_helper() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", MINIMAL);
    let path = gate.object("minimal");
    let before = gate.baseline();
    let mut client = gate.session("app");
    // In place, and by another file of the same name.
    for replace in [false, true] {
        if replace {
            fs::remove_file(&path).unwrap();
        }
        fs::write(&path, fs::read(bpf_object("tcx")).unwrap()).unwrap();
        let instance = load(&mut client).expect("the bytes from before the change");
        assert_eq!(instance.programs[0].name, "pass");
        client.unload(instance.id).unwrap();
    }
    let [helper, ..] = gate.helper("app");
    gate.kill(&helper);
    drop(client);
    let lost = || gate.log().contains("helper of app: the other end is closed");
    assert!(wait_until(SOON, lost), "{}", gate.log());
    let mut client = gate.session("app");
    assert!(matches!(load(&mut client), Err(Error::Object(_))));
    drop(client);
    // The canary uses the same file: its helper was started before.
    gate.invariants(&before);
}

#[test]
fn promise_04_an_object_with_another_digest_is_refused() {
    needs_root!();
    let gate = Gate::start();
    let before = gate.baseline();
    let mut bytes = fs::read(bpf_object("minimal")).unwrap();
    let copy = gate.dir.join("objects/changed.bpf.o");
    fs::write(&copy, &bytes).unwrap();
    let digest = bpfgate_tests::gate::sha256(&copy);
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&copy, &bytes).unwrap();
    let pinned = format!("path = \"{}\"\nsha256 = \"{digest}\"", copy.display());
    gate.policy("app", &MINIMAL.replace("{object:minimal}", &pinned));
    let error = load(&mut gate.session("app")).unwrap_err();
    assert!(matches!(&error, Error::Object(refusal) if refusal.message.contains("SHA-256")), "{error}");
    gate.invariants(&before);
}

#[test]
fn promise_04_without_a_digest_root_alone_may_have_written_the_object() {
    needs_root!();
    let gate = Gate::start();
    let before = gate.baseline();
    let original = gate.object("minimal");
    let mut number = 0;
    let mut verdict = |prepare: &dyn Fn(&Path)| {
        number += 1;
        let directory = gate.dir.join(format!("objects/{number}"));
        let path = directory.join("o.bpf.o");
        fs::create_dir(&directory).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).unwrap();
        fs::copy(&original, &path).unwrap();
        prepare(&path);
        let app = format!("app{number}");
        gate.policy(&app, &by_owner(&path));
        load(&mut gate.session(&app)).map(drop)
    };
    let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    verdict(&|_| {}).expect("a file of root in directories of root");
    for (what, prepare) in [
        ("group-writable", &(|path: &Path| mode(path, 0o664)) as &dyn Fn(&Path)),
        ("world-writable", &|path| mode(path, 0o646)),
        ("another owner", &|path| chown(path, Some(12_345), None).unwrap()),
        ("group-writable parent", &|path| mode(path.parent().unwrap(), 0o775)),
        ("world-writable parent", &|path| mode(path.parent().unwrap(), 0o1777)),
        ("parent of another owner", &|path| chown(path.parent().unwrap(), Some(12_345), None).unwrap()),
        ("symbolic link", &|path| {
            fs::remove_file(path).unwrap();
            symlink(bpf_object("minimal"), path).unwrap();
        }),
        ("a directory", &|path| {
            fs::remove_file(path).unwrap();
            fs::create_dir(path).unwrap();
        }),
        ("missing", &|path| fs::remove_file(path).unwrap()),
    ] {
        assert!(matches!(verdict(prepare), Err(Error::Object(_))), "{what}");
    }
    gate.invariants(&before);
}

/// Objects that must not be loaded: name, hook, the error, and a word of its sentence.
const REFUSED: [(&str, &str, &str, &str); 13] = [
    ("writeuser", "tracepoint write_null", "Object", "probe_write_user"),
    ("printk", "tracepoint print_line", "Object", "trace_printk"),
    ("sendsignal", "tracepoint signal_self", "Object", "send_signal"),
    ("kfunc", "xdp call_kfunc", "Object", "bpf_rcu_read_"),
    ("kfuncweak", "xdp call_weak", "Object", "__weak"),
    ("ksym", "xdp store_address", "Object", "variable"),
    ("kconfig", "xdp store_hz", "Object", "__kconfig"),
    ("pinned", "xdp count_pinned", "Object", "LIBBPF_PIN_BY_NAME"),
    ("sleepable", "uprobe on_call_sleep", "Object", "flags"),
    ("progarray", "xdp jump_away", "Unsupported", "prog_array"),
    ("mapinmap", "xdp count_inner", "Unsupported", "array_of_maps"),
    ("bigmap", "xdp touch_big", "Quota", "more than the"),
    ("badverifier", "xdp out_of_bounds", "Verifier", "verifier"),
];

fn policy_for(object: &str, hook: &str) -> String {
    let (kind, program) = hook.split_once(' ').unwrap();
    let target = match kind {
        "xdp" => "interfaces = [\"{interface}\"]",
        "tracepoint" => "events = [\"sched:sched_process_exit\"]",
        _ => "binary = \"/bin/sh\"\nsymbols = [\"main\"]",
    };
    format!(
        "{{client}}\n[objects.o]\n{{object:{object}}}\n[[objects.o.{kind}]]\nprogram = \"{program}\"\n{target}\n"
    )
}

#[test]
fn promise_05_what_an_object_may_not_contain_is_refused_by_name_and_leaves_nothing() {
    needs_root!();
    let gate = Gate::start();
    let before = gate.baseline();
    for (object, hook, error, word) in REFUSED {
        gate.policy(object, &policy_for(object, hook));
        let mut raw = Raw::open(&gate, object);
        // Twice: the second answer comes from a loader that has been through the first.
        for _ in 0..2 {
            let parameters = raw.refused("Load", &json!({"object": "o"}), error);
            let message = parameters["message"].as_str().unwrap();
            assert!(message.contains(word), "{object}: {message}");
        }
        drop(raw);
        gate.invariants(&before);
    }
}

#[test]
fn promise_05_a_granted_function_may_be_called() {
    needs_root!();
    let gate = Gate::start();
    let before = gate.baseline();
    let grant = "[objects.o.helpers]\nallow = [\"bpf_send_signal\"]\n";
    gate.policy("app", &(policy_for("sendsignal", "tracepoint signal_self") + grant));
    let instance = load(&mut gate.session("app")).expect("the policy says so");
    drop(instance);
    gate.invariants(&before);
}

/// By the name that the object has, and by the number that stands in the instructions, whatever the object says.
#[test]
fn promise_05_a_function_of_the_kernel_may_be_called_where_the_policy_names_it() {
    needs_root!();
    needs_kernel!(6, 2, "bpf_rcu_read_lock");
    let gate = Gate::start();
    let before = gate.baseline();
    let grant = |names: &str| format!("[objects.o.helpers]\nkfuncs = [{names}]\n");
    let (lock, unlock) = ("\"bpf_rcu_read_lock\"", "\"bpf_rcu_read_unlock\"");
    gate.policy("both", &(policy_for("kfunc", "xdp call_kfunc") + &grant(&format!("{lock}, {unlock}"))));
    let instance = load(&mut gate.session("both")).expect("the policy names both");
    assert_eq!(instance.programs[0].name, "call_kfunc");
    drop(instance);
    for (app, object, program, names, says) in [
        ("one", "kfunc", "call_kfunc", lock, "calls bpf_rcu_read_unlock, which"),
        ("other", "kfunc", "call_kfunc", unlock, "calls bpf_rcu_read_lock, which"),
        ("helper", "kfunc", "call_kfunc", "\"bpf_send_signal\"", "calls bpf_rcu_read_lock, which"),
        ("number", "kfuncraw", "by_number", lock, "calls function 1 of the kernel's BTF"),
        ("module", "kfuncraw", "of_module", lock, "of a kernel module"),
        ("weak", "kfuncweak", "call_weak", lock, "__weak"),
    ] {
        gate.policy(app, &(policy_for(object, &format!("xdp {program}")) + &grant(names)));
        let mut raw = Raw::open(&gate, app);
        let parameters = raw.refused("Load", &json!({"object": "o"}), "Object");
        let message = parameters["message"].as_str().unwrap();
        assert!(message.contains(says), "{app}: {message}");
        let record = gate.audit_of(app).pop().unwrap();
        // Who asks for what no policy can allow has no line that says so.
        let by = record["by"].as_str().unwrap_or_default();
        assert_eq!(by.ends_with(&format!("{app}.toml:6")), says.contains("calls"), "{record}");
    }
    // What is not there is said at the start, and allows nothing.
    gate.policy("absent", &(policy_for("kfunc", "xdp call_kfunc") + &grant("\"bpf_no_such_function\"")));
    Raw::open(&gate, "absent").refused("Load", &json!({"object": "o"}), "Object");
    let log = gate.log();
    assert!(log.contains("absent.toml:6: this kernel has no function bpf_no_such_function"), "{log}");
    gate.invariants(&before);
}

#[test]
fn promise_05_the_type_is_the_policys_and_the_programs() {
    needs_root!();
    let gate = Gate::start();
    let before = gate.baseline();
    let tcx = policy_for("minimal", "xdp pass").replace("objects.o.xdp", "objects.o.tcx")
        + "direction = \"ingress\"\n";
    gate.policy("app", &tcx);
    let mut raw = Raw::open(&gate, "app");
    let parameters = raw.refused("Load", &json!({"object": "o"}), "Object");
    assert!(parameters["message"].as_str().unwrap().contains("sched_cls"), "{parameters}");
    drop(raw);
    gate.invariants(&before);
}

#[test]
fn promise_05_programs_are_told_apart_beyond_the_kernels_fifteen_bytes() {
    needs_root!();
    let gate = Gate::start();
    let second = "[[objects.o.xdp]]\nprogram = \"packet_observer_second\"\ninterfaces = [\"lo\"]\n";
    let maps = "[objects.o.maps]\ncounts = \"read-write\"\n";
    gate.policy("app", &(policy_for("two", "xdp packet_observer_first") + second + maps));
    let before = gate.baseline();
    let mut client = gate.session("app");
    for only in [None, Some("packet_observer_second")] {
        let programs = only.map(|name| vec![name.to_owned()]);
        let mut instance = client.load("o", &LoadOptions { programs, ..Default::default() }).unwrap();
        client.attach(instance.id, "packet_observer_second", None, None).unwrap();
        let counts = instance.take_map("counts").unwrap();
        let value = |key: u8| counts.lookup(&[key, 0, 0, 0]).unwrap().unwrap()[0];
        let counted = || {
            gate.send_over_loopback(1);
            value(1) > 0
        };
        assert!(wait_until(SOON, counted), "{only:?}");
        assert_eq!(value(0), 0, "the other program was attached");
        client.unload(instance.id).unwrap();
    }
    drop(client);
    gate.invariants(&before);
}

#[test]
fn promise_05_a_verifiers_log_comes_whole_and_clean() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", &policy_for("badverifier", "xdp out_of_bounds"));
    let before = gate.baseline();
    let mut raw = Raw::open(&gate, "app");
    let Err(Refused { parameters, .. }) = raw.call("Load", &json!({"object": "o"})) else {
        panic!("it is loaded")
    };
    let log = parameters["log"].as_str().unwrap();
    assert_eq!(parameters["program"], "out_of_bounds");
    assert!(log.contains("invalid access to packet") && log.contains("processed"), "{log}");
    assert!(!log.contains(|c: char| c.is_control() && c != '\n' && c != '\t'), "{log:?}");
    drop(raw);
    gate.invariants(&before);
}
