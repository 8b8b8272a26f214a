//! The units as they are installed, and what the generator adds to them: how exposed systemd finds them, that it takes
//! them without a word, and that nothing in the policy directories keeps the machine from starting.

use bpfgate_protocol::policy::{Policy, file::Accounts};
use bpfgate_systemd::units::{Layout, drop_in, drop_in_path, granted};
use bpfgate_tests::{bin_dir, needs_root, workspace};
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

/// A directory of the test's own, removed with it. Of root it is one where policies may be.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let root = nix::unistd::geteuid().is_root();
        let parent = if root { PathBuf::from("/run") } else { std::env::temp_dir() };
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!("bpfgate-units-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const XDP: &str = "[[objects.o.xdp]]\nprogram = \"p\"\ninterfaces = [\"eth0\"]\n";
const CGROUP: &str =
    "[[objects.o.cgroup_skb]]\nprogram = \"c\"\ndirection = \"egress\"\ncgroups = [\"/sys/fs/cgroup\"]\n";
const TRACEPOINT: &str = "[[objects.o.tracepoint]]\nprogram = \"t\"\nevents = [\"sched:sched_switch\"]\n";
const RAW: &str = "[[objects.o.raw_tracepoint]]\nprogram = \"r\"\nevents = [\"sched_switch\"]\n";

fn policy(rules: &str) -> Policy {
    let text = format!("version = 1\n[objects.o]\npath = \"/o\"\n{rules}");
    Policy::parse("/etc/bpfgate/policies/app.toml", &text, &Accounts::default()).unwrap()
}

/// All units in one directory, the helper of `app` with the drop-in of this policy, and programs that exist.
fn units(policy: &Policy) -> Directory {
    let directory = Directory::new();
    let installed = |text: &str| {
        text.replace("/usr/libexec/bpfgate", bin_dir().to_str().expect("the path of the programs is text"))
    };
    for entry in fs::read_dir(workspace().join("systemd/units")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        let text = installed(&fs::read_to_string(&path).unwrap());
        directory.write(name, &text);
        directory.write(&name.replace('@', "@app"), &text);
    }
    let app = "app".parse().unwrap();
    let text = drop_in(&app, policy, &Layout::of_program(Path::new("/usr/bin/bpfgate"))).unwrap();
    let path = drop_in_path(&directory.0, &app);
    directory.write(path.strip_prefix(&directory.0).unwrap().to_str().unwrap(), installed(&text));
    directory
}

fn systemd_analyze(arguments: &[&str], units: &[PathBuf]) -> Option<Output> {
    let output = Command::new("systemd-analyze").args(arguments).args(units).output();
    match output {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            println!("skipped: systemd-analyze is missing; the package systemd has it");
            None
        }
        output => Some(output.unwrap()),
    }
}

/// What `systemd-analyze security` says in the end: 0 is closed, 10 is open.
fn exposure(unit: &Path) -> Option<f64> {
    let arguments = ["security", "--offline=yes", "--no-pager"];
    let output = systemd_analyze(&arguments, &[unit.to_owned()])?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let score = text.rsplit_once("Overall exposure level for ").and_then(|(_, rest)| {
        let (_, rest) = rest.split_once(": ")?;
        rest.split(' ').next()?.parse().ok()
    });
    Some(score.unwrap_or_else(|| panic!("no score in {text}\n{}", String::from_utf8_lossy(&output.stderr))))
}

#[test]
fn units_are_as_closed_as_promised() {
    let all = format!("{XDP}{CGROUP}{TRACEPOINT}");
    let broker = "bpfgate.service";
    let helper = "bpfgate-helper@app.service";
    for (unit, rules, what, most) in [
        (broker, "", "no capability", 0.5),
        (helper, "", "no capability", 0.5),
        (helper, RAW, "CAP_BPF CAP_PERFMON", 0.8),
        (helper, TRACEPOINT, "CAP_BPF CAP_PERFMON, prepared by root", 0.8),
        (helper, CGROUP, "CAP_BPF CAP_NET_ADMIN, no interface", 1.4),
        (helper, XDP, "CAP_BPF CAP_NET_ADMIN", 1.4),
        (helper, &all, "CAP_BPF CAP_NET_ADMIN CAP_PERFMON", 1.4),
    ] {
        let directory = units(&policy(rules));
        let Some(score) = exposure(&directory.0.join(unit)) else { return };
        println!("exposure {score:.1} (at most {most:.1}): {unit}, {what}");
        assert!(score <= most, "{unit} with {what}: {score}");
    }
}

#[test]
fn systemd_has_nothing_to_say_about_them() {
    let netns = "netns = \"/run/netns/blue\"\n";
    let hidden = format!(
        "version = 1\n{netns}[objects.o]\npath = \"/home/x.o\"\nsha256 = \"{}\"\n{XDP}",
        "00".repeat(32)
    );
    let hidden = Policy::parse("p", &hidden, &Accounts::default()).unwrap();
    for policy in [policy(""), policy(&format!("{XDP}{CGROUP}{TRACEPOINT}{RAW}")), hidden] {
        let directory = units(&policy);
        let names = [
            "bpfgate.socket",
            "bpfgate-admin.socket",
            "bpfgate.service",
            "bpfgate-helper@app.socket",
            "bpfgate-helper@app.service",
        ];
        let paths = names.map(|name| directory.0.join(name));
        let Some(output) = systemd_analyze(&["verify", "--man=no"], &paths) else { return };
        let said = [output.stdout, output.stderr].concat();
        assert_eq!(String::from_utf8_lossy(&said), "", "{:?}", output.status);
        assert!(output.status.success());
    }
}

/// A unit is read by people who decide whether they trust it.
#[test]
fn every_setting_has_its_reason_above_it() {
    let mut settings = 0;
    for entry in fs::read_dir(workspace().join("systemd/units")).unwrap() {
        let path = entry.unwrap().path();
        let mut above = "";
        let text = fs::read_to_string(&path).unwrap();
        for line in text.lines() {
            let titles = ["Description=", "Documentation="];
            if line.contains('=') && !line.starts_with('#') && !titles.iter().any(|t| line.starts_with(t)) {
                settings += 1;
                assert!(above.starts_with('#'), "{}: {line}", path.display());
            }
            above = line;
        }
    }
    assert!(settings > 80, "{settings}");
}

/// With any of these the kernel would not tell the broker any more who its clients are.
#[test]
fn nothing_hides_clients_from_the_broker() {
    let text = fs::read_to_string(workspace().join("systemd/units/bpfgate.service")).unwrap();
    for key in ["PrivateUsers=", "PrivatePIDs=", "ProtectProc=", "PIDNamespacePath=", "DynamicUser="] {
        assert!(!text.lines().any(|line| line.starts_with(key)), "{key}");
    }
}

/// Runs the generator on `policies`; gives what it wrote, and what it said.
fn generate(policies: &[&Directory]) -> (Directory, String) {
    let units = Directory::new();
    let mut command = Command::new(bin_dir().join("bpfgate-generator"));
    command.args([&units.0, &units.0, &units.0]).arg("--policies").args(policies.iter().map(|d| &d.0));
    let output = command.output().expect("the generator is built");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{:?}: {said}", output.status);
    (units, said)
}

/// The enabled apps, sorted.
fn enabled(units: &Directory, wants: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(units.0.join(wants)) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn the_generator_enables_what_is_valid_and_survives_everything_else() {
    needs_root!();
    let (etc, usr) = (Directory::new(), Directory::new());
    let valid = format!("version = 1\n[objects.o]\npath = \"/o\"\n{XDP}");
    etc.write("good.toml", &valid);
    etc.write("boot.toml", format!("{valid}[lifetime]\nkeep = \"boot\"\n"));
    usr.write("other.toml", &valid);
    // The first directory wins, also with something that is no policy.
    usr.write("good.toml", valid.replace("eth0", "wrong"));
    usr.write("masked.toml", &valid);
    symlink("/nonexistent", etc.0.join("masked.toml")).unwrap();
    etc.write("broken.toml", "version = 1\nnonsense = 1\n");
    etc.write("writable.toml", &valid);
    fs::set_permissions(etc.0.join("writable.toml"), Permissions::from_mode(0o666)).unwrap();
    etc.write("huge.toml", vec![b'#'; 300 << 10]);
    etc.write("deep.toml", format!("x = {}", "[".repeat(100_000)));
    etc.write("binary.toml", [0xff, 0, 0x80]);
    etc.write("odd-netns.toml", format!("version = 1\nnetns = \"/a b\"\n[objects.o]\npath = \"/o\"\n{XDP}"));
    etc.write("Bad Name\x1b[2J\n.toml", &valid);
    etc.write("ignored.toml~", "nonsense");
    etc.write(".toml", "nonsense");
    fs::create_dir(etc.0.join("directory.toml")).unwrap();
    nix::unistd::mkfifo(&etc.0.join("fifo.toml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    symlink("/dev/zero", etc.0.join("endless.toml")).unwrap();
    let missing = Directory(PathBuf::from("/nonexistent"));

    let (units, said) = generate(&[&etc, &usr, &missing]);
    let sockets = ["boot", "good", "other"].map(|app| format!("bpfgate-helper@{app}.socket"));
    assert_eq!(enabled(&units, "sockets.target.wants"), sockets, "{said}");
    assert_eq!(enabled(&units, "multi-user.target.wants"), ["bpfgate-helper@boot.service"]);
    let good = fs::read_to_string(drop_in_path(&units.0, &"good".parse().unwrap())).unwrap();
    assert!(granted(&good).contains("program p of object o on xdp eth0 (any mode)"), "{good}");
    assert_eq!(fs::read_dir(&units.0).unwrap().count(), 5, "two wants, three drop-ins");
    for app in [
        "masked",
        "broken",
        "writable",
        "huge",
        "deep",
        "binary",
        "odd-netns",
        "directory",
        "fifo",
        "endless",
    ] {
        assert!(said.contains(&format!("; app {app} is disabled\n")), "{app} is not in\n{said}");
    }
    assert!(said.contains("broken.toml:2:1: unknown field"), "{said}");
    assert!(said.contains("an app name is") && !said.contains('\x1b'), "{said}");
}

#[test]
fn ten_thousand_files_do_not_stop_the_machine() {
    needs_root!();
    let policies = Directory::new();
    let text = format!("version = 1\n[objects.o]\npath = \"/o\"\n{XDP}");
    for number in 0..10_000 {
        policies.write(&format!("a{number:05}.toml"), if number % 2 == 0 { &text } else { "nonsense" });
    }
    let begin = Instant::now();
    let (units, said) = generate(&[&policies]);
    println!("10,000 files in {:?}", begin.elapsed());
    assert!(begin.elapsed().as_secs() < 20, "{:?}", begin.elapsed());
    assert_eq!(enabled(&units, "sockets.target.wants").len(), 512, "of the first 1,024 apps");
    assert!(said.lines().count() <= 51 && said.contains(" more; "), "{said}");
}

/// A full or read-only /run: nothing is enabled, and the machine starts.
#[test]
fn a_directory_that_cannot_be_written_is_no_end() {
    needs_root!();
    let policies = Directory::new();
    policies.write("app.toml", "version = 1\n");
    let mut command = Command::new(bin_dir().join("bpfgate-generator"));
    command.args(["/proc", "/proc", "/proc"]).arg("--policies").arg(&policies.0);
    let output = command.output().unwrap();
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("app app is disabled: writing its units"));
}
