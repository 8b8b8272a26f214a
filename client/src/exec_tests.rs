use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};

use super::*;

fn temporary(text: &str) -> File {
    let fd = nix::sys::memfd::memfd_create("test", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
    let mut file = File::from(fd);
    file.write_all(text.as_bytes()).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    file
}

fn shell(script: &str) -> Launch {
    Launch::new("sh").arguments(["-c", script])
}

fn status(launch: Launch) -> Ended {
    launch.spawn().unwrap().wait().unwrap()
}

#[test]
fn descriptors_arrive_in_order_with_their_names() {
    let (first, second) = (temporary("first"), temporary("second"));
    let script = r#"
        [ "$LISTEN_PID" = $$ ] || exit 1
        [ "$LISTEN_FDS" = 2 ] || exit 2
        [ "$LISTEN_FDNAMES" = "a:b.data" ] || exit 3
        [ "$(cat <&3)" = first ] || exit 4
        [ "$(cat <&4)" = second ] || exit 5
        [ -e /proc/self/fd/5 ] && exit 6
        exit 0"#;
    let launch = shell(script).descriptor("a", first.into()).descriptor("b.data", second.into());
    // Whatever this test process itself inherited without close-on-exec may be there as number 5.
    let ended = status(launch);
    assert!(matches!(ended, Ended::Exited(0 | 6)), "{ended:?}");
}

#[test]
fn no_descriptors_is_fine() {
    assert_eq!(status(shell("[ \"$LISTEN_FDS\" = 0 ]")), Ended::Exited(0));
}

#[test]
fn privileges_are_locked_and_signals_are_default() {
    let script = r#"
        while read -r name value; do
            case $name in
                NoNewPrivs:) [ "$value" = 1 ] || exit 1 ;;
                Seccomp:) [ "$value" = 2 ] || exit 2 ;;
                SigBlk:) [ "$value" = 0000000000000000 ] || exit 3 ;;
            esac
        done < /proc/$$/status"#;
    assert_eq!(status(shell(script)), Ended::Exited(0));
    // SIGPIPE (bit 12) is not ignored any more; other ignored signals are the test runner's.
    let script = "read -r line < /proc/$$/status; grep SigIgn /proc/$$/status | grep -q '[02468ace]...$'";
    assert_eq!(status(shell(script)), Ended::Exited(0));
}

#[test]
fn the_end_is_reported() {
    assert_eq!(status(shell("exit 37")), Ended::Exited(37));
    assert_eq!(status(shell("kill -TERM $$")), Ended::Killed(15));
    assert_eq!((Ended::Killed(15).status(), Ended::Exited(37).status()), (143, 37));
    let mut running = Launch::new("sleep").arguments(["30"]).spawn().unwrap();
    assert_eq!(running.try_wait().unwrap(), None);
    running.signal(15).unwrap();
    assert_eq!(running.wait().unwrap(), Ended::Killed(15));
    // Its number may belong to somebody else now.
    running.signal(15).unwrap();
}

#[test]
fn what_cannot_start_is_an_error() {
    let error = Launch::new("/nonexistent/program").spawn().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    assert!(Launch::new("a\0b").spawn().is_err());
    for name in ["", "a:b", "a\nb"] {
        let launch = Launch::new("true").descriptor(name, temporary("").into());
        assert_eq!(launch.spawn().unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}

/// What the program below says about each bpf command, with the filter on.
fn probe() -> String {
    let mut report = temporary("");
    let copy = report.try_clone().unwrap();
    let launch = Launch::new(std::env::current_exe().unwrap())
        .arguments(["exec::tests::probed", "--exact", "--ignored"])
        .descriptor(REPORT, copy.into());
    assert_eq!(status(launch), Ended::Exited(0));
    let mut text = String::new();
    report.seek(SeekFrom::Start(0)).unwrap();
    report.read_to_string(&mut text).unwrap();
    text
}

const REPORT: &str = "bpfgate-test-report";
const COMMANDS: u32 = 45;

#[test]
#[ignore = "the program that `only_the_allowed_commands_pass` starts"]
fn probed() {
    if std::env::var("LISTEN_FDNAMES").as_deref() != Ok(REPORT) {
        return;
    }
    let lines: Vec<_> =
        (0..COMMANDS).map(|command| format!("{command} {}", sys::testing::probe_bpf(command))).collect();
    #[cfg(target_arch = "x86_64")]
    assert_eq!(sys::testing::probe_bpf_x32(1), libc::EPERM);
    std::fs::write("/proc/self/fd/3", lines.join("\n")).unwrap();
}

#[test]
fn only_the_allowed_commands_pass() {
    let unfiltered = sys::testing::probe_bpf(1);
    if unfiltered == libc::EPERM {
        println!("skipped: bpf(2) is refused to this process anyway");
        return;
    }
    let report = probe();
    assert_eq!(report.lines().count(), COMMANDS as usize);
    for line in report.lines() {
        let (command, errno) = line.split_once(' ').unwrap();
        let allowed = ALLOWED_BPF_COMMANDS.iter().any(|(allowed, _)| command == allowed.to_string());
        assert_eq!(errno != libc::EPERM.to_string(), allowed, "command {command} gave errno {errno}");
    }
}
