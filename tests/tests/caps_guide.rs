//! docs/capabilities.md: what it shows is what is printed. What needs a running service is in `services_caps`.

use bpfgate_tests::cli::Ended;
use bpfgate_tests::{bin_dir, bpf_object, workspace};
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

#[test]
#[ignore = "writes what the other checks: make caps-table"]
fn write() {
    fs::write(guide(), compared().1).unwrap();
}
