//! Comes to a bad end as confined as one of the processes of bpfgate: `bpfgate-confined END ROLE`. Or tries the commands
//! of bpf(2), for a program that `bpfgate exec` starts: `bpfgate-confined commands`.
#![forbid(unsafe_code)]

use bpfgate_tests::roles::Role;
use bpfgate_tests::sys::bpf_command;
use std::fs::File;
use std::hint::black_box;
use std::io::Write;
use std::os::fd::OwnedFd;

/// Takes all the stack there is.
#[allow(unconditional_recursion, reason = "that is the point")]
fn recursion(depth: u64) -> u64 {
    let room = black_box([depth; 512]);
    recursion(depth + 1).wrapping_add(black_box(room)[0])
}

/// Writes the errno of each command to descriptor 3, by the number of bpf(2) and by that of x32.
fn commands() {
    const X32: i64 = 0x4000_0000;
    let out: OwnedFd = bpfgate_protocol::channel::inherited_fd(3).expect("descriptor 3");
    let number = libc::SYS_bpf;
    let errors = [number, number | X32].map(|number| {
        let each = (0..=40).map(|command| bpf_command(number, command));
        each.collect::<Vec<_>>()
    });
    let text = serde_json::to_string(&errors).expect("numbers");
    File::from(out).write_all(text.as_bytes()).expect("the test reads");
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let [end, role @ ..] = &words[..] else { panic!("no end") };
    if !role.is_empty() {
        bpfgate_lockdown::process::tame(64).expect("as every process of bpfgate");
    }
    for filters in role.iter().flat_map(|name| Role::named(name).filters()) {
        filters.install().expect("filters");
    }
    match *end {
        "panic" => panic!("as the test wants it"),
        "allocation" => drop(black_box(Vec::<u8>::with_capacity(1 << 46))),
        "recursion" => drop(black_box(recursion(0))),
        "commands" => commands(),
        other => panic!("{other:?} is no end"),
    }
}
