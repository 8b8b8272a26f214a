//! No policy for this client: there is none, it is for others, or its file is not to be trusted.

use bpfgate_tests::gate::MINIMAL;
use bpfgate_tests::process::{self, Role};
use bpfgate_tests::{Gate, Raw, STRANGER, USER, Who, needs_root, slowness};
use nix::sys::stat::Mode;
use serde_json::json;
use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Something that stands where a policy should: its name, how it comes about, and what the log says of it.
type Case = (&'static str, &'static dyn Fn(&Path, &str), &'static str);

const CASES: [Case; 20] = [
    (
        "a symbolic link",
        &|path, good| aside(path, good, |other| symlink(other, path).unwrap()),
        "symbolic link",
    ),
    ("a dangling link", &|path, _| symlink("/nonexistent/policy", path).unwrap(), "symbolic link"),
    ("a directory", &|path, _| fs::create_dir(path).unwrap(), "regular file"),
    (
        "a FIFO",
        &|path, _| nix::unistd::mkfifo(path, Mode::from_bits_truncate(0o644)).unwrap(),
        "regular file",
    ),
    ("a socket", &|path, _| drop(UnixListener::bind(path).unwrap()), "cannot be opened"),
    ("a link to a device", &|path, _| symlink("/dev/zero", path).unwrap(), "symbolic link"),
    ("world-writable", &|path, good| with_mode(path, good, 0o646), "written by others"),
    ("group-writable", &|path, good| with_mode(path, good, 0o664), "written by its group"),
    ("writable by an access control list", &|path, good| with_acl(path, good), "written by its group"),
    ("of another owner", &|path, good| owned(path, good, 12_345), "belongs to uid 12345"),
    ("100 MB", &|path, good| sparse(path, good), "larger than 262144 bytes"),
    ("empty", &|path, _| fs::write(path, "").unwrap(), "version"),
    ("an unknown key", &|path, good| write(path, &format!("{good}\n[limit]\nprograms = 1\n")), "limit"),
    ("a misspelt key", &|path, good| write(path, &good.replace("interfaces", "interface")), "interface"),
    (
        "a client without a condition",
        &|path, good| write(path, &good.replace("user = 12345", "")),
        "condition",
    ),
    (
        "a user that does not exist",
        &|path, good| write(path, &good.replace("12345", "\"nosuch\"")),
        "no user",
    ),
    (
        "another version",
        &|path, good| write(path, &good.replace("version = 1", "version = 2")),
        "version = 1",
    ),
    ("no TOML", &|path, _| write(path, "{\"version\": 1}"), "expected"),
    (
        "not UTF-8",
        &|path, good| fs::write(path, [good.as_bytes(), b"#\xff\xfe\n"].concat()).unwrap(),
        "UTF-8",
    ),
    (
        "no digest",
        &|path, good| write(path, &good.replacen("sha256 = \"", "sha256 = \"x", 1)),
        "64 lower-case",
    ),
];

fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
}

fn with_mode(path: &Path, text: &str, bits: u32) {
    write(path, text);
    mode(path, bits);
}

fn owned(path: &Path, text: &str, uid: u32) {
    write(path, text);
    chown(path, Some(uid), None).unwrap();
}

/// Valid, and then 100 MB of nothing.
fn sparse(path: &Path, text: &str) {
    write(path, text);
    File::options().write(true).open(path).unwrap().set_len(100 << 20).unwrap();
}

/// A valid policy somewhere else.
fn aside(path: &Path, text: &str, then: impl FnOnce(&Path)) {
    let other = path.with_extension("aside");
    write(&other, text);
    then(&other);
}

#[test]
fn a_policy_file_that_cannot_be_trusted_disables_its_app_and_says_why() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("good", MINIMAL);
    let before = gate.baseline();
    let text = gate.fill(MINIMAL);
    let path = gate.policy_path("app");
    let unknown = Raw::connect(&gate, &USER).refused("Open", &json!({"app": "unknown"}), "Denied");
    let memory = process::number(gate.broker.pid, "VmHWM");
    for (name, make, word) in CASES {
        let logged = gate.log().len();
        make(&path, &text);
        gate.reload();
        let start = Instant::now();
        let mut raw = Raw::connect(&gate, &USER);
        let answer = raw.refused("Open", &json!({"app": "app"}), "Denied");
        assert!(start.elapsed() < Duration::from_secs(1) * slowness(), "{name}: {:?}", start.elapsed());
        // Nothing of it reaches the client.
        assert_eq!(answer["message"], unknown["message"], "{name}");
        let log = gate.log()[logged..].to_owned();
        let place = path.display().to_string();
        assert!(log.contains("policy of app is not in force") && log.contains(&place), "{name}: {log}");
        assert!(log.contains(word), "{name}: {log}");
        let why = gate.audit().pop().unwrap()["why"].as_str().unwrap().to_owned();
        assert!(why.contains(word), "{name}: {why}");
        assert!(gate.find(&Role::Helper("app".to_owned())).is_none(), "{name}: a helper was started");
        Raw::open(&gate, "good").load("o");
        if fs::symlink_metadata(&path).unwrap().is_dir() {
            fs::remove_dir(&path).unwrap();
        } else {
            fs::remove_file(&path).unwrap();
        }
    }
    let grown = process::number(gate.broker.pid, "VmHWM") - memory;
    assert!(grown < 2048, "reading them took {grown} kB");
    // A file that is right is in force again.
    gate.policy("app", MINIMAL);
    Raw::open(&gate, "app").load("o");
    gate.invariants(&before);
}

#[test]
fn a_directory_that_others_may_write_disables_its_policies_until_it_is_mended() {
    needs_root!();
    let gate = Gate::start();
    let before = gate.baseline();
    let directory = gate.dir.join("policies");
    for bits in [0o777, 0o1777, 0o775] {
        let app = format!("app{bits:o}");
        gate.edit(&app, MINIMAL);
        mode(&directory, bits);
        gate.reload();
        Raw::connect(&gate, &USER).refused("Open", &json!({"app": app}), "Denied");
        assert!(gate.log().contains(&format!("(mode {bits:04o})")), "{}", gate.log());
        mode(&directory, 0o755);
        gate.reload();
        Raw::open(&gate, &app).load("o");
    }
    gate.invariants(&before);
}

/// `user:12345:rw-`: the mode shows the mask of such a list where it shows the group.
fn with_acl(path: &Path, text: &str) {
    const ENTRIES: [(u16, u16, u32); 5] = [
        (0x01, 6, u32::MAX), // the owner
        (0x02, 6, 12_345),
        (0x04, 4, u32::MAX), // the group
        (0x10, 6, u32::MAX), // the mask
        (0x20, 4, u32::MAX), // others
    ];
    write(path, text);
    let mut list = 2u32.to_le_bytes().to_vec();
    for (tag, rights, id) in ENTRIES {
        list.extend(tag.to_le_bytes());
        list.extend(rights.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    let script =
        "import os, sys; os.setxattr(sys.argv[1], 'system.posix_acl_access', bytes.fromhex(sys.argv[2]))";
    let list = bpfgate_protocol::hex::encode(&list);
    let status = Command::new("python3").args(["-c", script]).arg(path).arg(list).status().unwrap();
    assert!(status.success(), "an access control list cannot be set on {}", path.display());
}

/// POL-08. The file that was looked at is the file that is read, however often another one takes its place.
#[test]
fn a_file_that_is_swapped_is_never_half_believed() {
    needs_root!();
    let gate = Gate::start();
    let (good, bad) = (gate.fill(MINIMAL), gate.fill("[[client]]\nuser = 0\nmay = [\"load\"]\n"));
    let path = gate.policy_path("app");
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mine, theirs) = (path.with_extension("mine"), path.with_extension("theirs"));
            while !over.load(Ordering::Relaxed) {
                write(&mine, &good);
                fs::rename(&mine, &path).unwrap();
                owned(&theirs, &bad, 12_345);
                fs::rename(&theirs, &path).unwrap();
            }
        });
        let (mut taken, mut refused) = (0, 0);
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(2) || taken == 0 || refused == 0 {
            assert!(start.elapsed() < Duration::from_secs(60), "taken {taken}, refused {refused}");
            match bpfgate_protocol::policy::file::read_file(&path) {
                Ok(policy) => {
                    assert_eq!(policy.clients[0].user, Some(12_345), "a file of somebody else's is believed");
                    taken += 1;
                }
                Err(error) => {
                    let why = error.lines().join(" ");
                    assert!(why.contains("belongs to uid 12345") || why.contains("does not exist"), "{why}");
                    refused += 1;
                }
            }
        }
        over.store(true, Ordering::Relaxed);
        println!("taken {taken} times, refused {refused} times");
    });
}

#[test]
fn an_unknown_app_and_one_that_is_not_for_this_client_are_the_same_answer() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", MINIMAL);
    let before = gate.baseline();
    let long = "a".repeat(300);
    let mut sentences = Vec::new();
    for (who, app) in [
        (&STRANGER, "app"),
        (&Who::new(0), "app"),
        (&Who::new(65_534), "app"),
        (&USER, "unknown"),
        (&USER, ""),
        (&USER, "."),
        (&USER, "../policies/app"),
        (&USER, "app.toml"),
        (&USER, "app\n{\"verdict\":\"allowed\"}"),
        (&USER, "\u{1b}[2J"),
        (&USER, long.as_str()),
    ] {
        let mut raw = Raw::connect(&gate, who);
        let answer = raw.refused("Open", &json!({"app": app}), "Denied");
        let record = gate.audit().pop().unwrap();
        assert_eq!((&record["verdict"], &record["uid"]), (&json!("Denied"), &json!(who.id)), "{app}");
        assert_eq!(record["request"], answer["request"], "the audit record is not found by its request");
        assert!(record["why"].as_str().is_some_and(|why| !why.is_empty()), "{record}");
        sentences.push(answer["message"].clone());
        // It is no session.
        raw.refused("List", &json!({}), "Invalid");
    }
    sentences.dedup();
    assert_eq!(sentences.len(), 1, "{sentences:?}");
    // Nobody who is refused makes a process start.
    assert!(gate.find(&Role::Helper("app".to_owned())).is_none(), "a helper was started");
    gate.invariants(&before);
}
