//! Objects that somebody has made to be approved by mistake: what they say of themselves decides nothing, what is wrong
//! with them costs one request, and nothing of the kernel is told to who loads them.

use bpfgate_tests::gate::{MINIMAL, bin_dir, bpf_object, sha256};
use bpfgate_tests::{Gate, Raw, SOON, needs_root, slowness};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write as _};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// An ELF file of 64 bits, to be damaged. Offsets: include/uapi/linux/elf.h, `Elf64_Ehdr` and `Elf64_Shdr`.
#[derive(Clone)]
struct Elf(Vec<u8>);

impl Elf {
    fn of(name: &str) -> Self {
        Self(fs::read(bpf_object(name)).unwrap())
    }

    fn number(&self, at: usize, len: usize) -> usize {
        self.0[at..at + len].iter().rev().fold(0, |sum, byte| sum << 8 | usize::from(*byte))
    }

    /// The place of a section's header.
    fn header(&self, section: usize) -> usize {
        self.number(40, 8) + 64 * section
    }

    fn sections(&self) -> usize {
        self.number(60, 2)
    }

    fn named(&self, name: &str) -> usize {
        let names = self.number(self.header(self.number(62, 2)) + 24, 8);
        let is = |section: &usize| {
            let start = names + self.number(self.header(*section), 4);
            self.0[start..].starts_with(format!("{name}\0").as_bytes())
        };
        (0..self.sections()).find(is).unwrap_or_else(|| panic!("there is no section {name}"))
    }

    /// The place and the length of what a section holds.
    fn content(&self, name: &str) -> (usize, usize) {
        let header = self.header(self.named(name));
        (self.number(header + 24, 8), self.number(header + 32, 8))
    }

    /// The same with other bytes at some place.
    fn with(&self, at: usize, bytes: &[u8]) -> Self {
        let mut other = self.clone();
        other.0[at..at + bytes.len()].copy_from_slice(bytes);
        other
    }
}

/// What the loader makes of an object when it only looks at it: as the command line has it look.
fn look(bytes: &[u8]) -> &'static str {
    let mut command = Command::new(bin_dir().join("bpfgate-loader"));
    command.arg("--describe").stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let start = Instant::now();
    let mut child = command.spawn().unwrap();
    let _ = child.stdin.take().unwrap().write_all(bytes);
    let output = child.wait_with_output().unwrap();
    assert!(start.elapsed() < 5 * SOON * slowness(), "it looks for {:?}", start.elapsed());
    let said = String::from_utf8_lossy(&output.stderr);
    match (output.status.code(), output.status.signal()) {
        (Some(0), _) => "understood",
        (Some(_), _) => {
            assert!(said.starts_with("bpfgate-loader: ") && said.len() > 25, "{said}");
            "refused"
        }
        // libbpf's own end, which costs a worker; a system call that is not on the list would be ours.
        (None, Some(libc::SIGSEGV | libc::SIGABRT | libc::SIGBUS)) => "crashed",
        (None, signal) => panic!("it is ended by signal {signal:?}: {said}"),
    }
}

fn count(all: impl Iterator<Item = Vec<u8>>) -> BTreeMap<&'static str, usize> {
    let mut outcomes = BTreeMap::new();
    for bytes in all {
        *outcomes.entry(look(&bytes)).or_insert(0) += 1;
    }
    outcomes
}

/// OBJ-01: cut off anywhere.
#[test]
fn an_object_that_is_cut_off_is_refused() {
    let good = Elf::of("minimal").0;
    assert_eq!(look(&good), "understood");
    let outcomes = count((0..good.len()).step_by(7).map(|end| good[..end].to_vec()));
    println!("{} bytes: {outcomes:?}", good.len());
    assert!(!outcomes.contains_key("understood"), "a part of it is an object: {outcomes:?}");
}

/// OBJ-10: types of which one word is another.
#[test]
fn damaged_types_end_in_an_answer() {
    let good = Elf::of("minimal");
    let (start, len) = good.content(".BTF");
    let values = [0u32, 1, 0x7fff_ffff, u32::MAX, 0x0400_0001];
    let words = (0..len / 4).flat_map(|word| values.map(|value| (start + 4 * word, value)));
    let outcomes = count(words.step_by(3).map(|(at, value)| good.with(at, &value.to_le_bytes()).0));
    println!("{len} bytes: {outcomes:?}");
    assert!(outcomes["refused"] > 20 && outcomes["understood"] > 20, "{outcomes:?}");
}

/// Damaged objects by what is wrong with them.
fn crafted() -> Vec<(String, Vec<u8>)> {
    let good = Elf::of("minimal");
    let len = good.0.len() as u64;
    let mut all: Vec<(String, Vec<u8>)> = Vec::new();
    let mut add = |what: &str, elf: Elf| all.push((what.to_owned(), elf.0));
    let word = |value: u64| value.to_le_bytes();
    let half = |value: u16| value.to_le_bytes();
    let first = good.header(0);
    add("no number of sections", good.with(60, &half(0)));
    add("a huge number of sections", good.with(60, &half(0)).with(first + 32, &word(1 << 62)));
    add("names elsewhere", good.with(62, &half(0xffff)).with(first + 40, &[0xff; 4]));
    add("no names", good.with(62, &half(0)));
    for size in [0, 1, 63, 65, 128, 0xffff] {
        add("section headers of another size", good.with(58, &half(size)));
    }
    for name in ["xdp", ".maps", ".BTF", ".BTF.ext", "license", ".symtab", ".strtab"] {
        let header = good.header(good.named(name));
        for size in [1 << 63, u64::MAX, len + 1, u64::MAX - 63] {
            add(&format!("{name} of {size:x} bytes"), good.with(header + 32, &word(size)));
            add(&format!("{name} at {size:x}"), good.with(header + 24, &word(size)));
        }
        add(&format!("{name} compressed"), good.with(header + 8, &word(0x800)));
        add(&format!("{name} without bytes"), good.with(header + 4, &8u32.to_le_bytes()));
        add(&format!("{name} of entries of no size"), good.with(header + 56, &word(0)));
        add(&format!("{name} of no kind"), good.with(header + 4, &0u32.to_le_bytes()));
        add(&format!("{name} linked to nothing"), good.with(header + 40, &[0xff; 4]));
        add(&format!("{name} named by nothing"), good.with(header, &[0xff; 4]));
        let other = good.header(good.named("xdp"));
        let twice = good.0[other..other + 4].to_vec();
        add(&format!("{name} called xdp"), good.with(header, &twice));
    }
    for name in [".strtab", "license"] {
        let (start, len) = good.content(name);
        add(&format!("{name} without an end"), good.with(start, &vec![b'A'; len]));
    }
    let (start, _) = good.content("license");
    add("another license behind the license", good.with(start, b"GPL\0evil"));
    add("a license that is none", good.with(start, b"\x1b[2Jnone"));
    let two = good.header(good.named(".BTF"));
    add("two symbol tables", good.with(two + 4, &2u32.to_le_bytes()));
    let globals = Elf::of("globals");
    let bss = globals.header(globals.named(".bss"));
    for size in [1 << 63, 1 << 32, 1 << 40, u64::MAX] {
        add("endless .bss", globals.with(bss + 32, &word(size)));
    }
    all
}

/// OBJ-02, OBJ-04, OBJ-05, OBJ-07, OBJ-08, through everything: helper, loader and kernel. Each costs its own request; no
/// answer says anything of the machine, and none takes long.
#[test]
fn crafted_objects_cost_one_request_each() {
    needs_root!();
    let gate = Gate::start();
    let before = gate.baseline();
    let mut objects = crafted();
    // What has a hole of 4 GiB is looked at to its limit, and no more.
    objects.push(("sparse".into(), Vec::new()));
    let mut policy = MINIMAL.to_owned() + "[limits]\nmap_memory = \"1MiB\"\nloads_per_minute = 60000\n";
    for (number, (what, bytes)) in objects.iter().enumerate() {
        let path = gate.dir.join(format!("objects/o{number}"));
        fs::write(&path, bytes).unwrap();
        let digest = sha256(&path);
        if what == "sparse" {
            let mut file = File::options().write(true).open(&path).unwrap();
            file.seek(SeekFrom::Start(1 << 32)).unwrap();
            file.write_all(b"end").unwrap();
        }
        let program = if what.starts_with("endless") { "copy_globals" } else { "pass" };
        write!(
            policy,
            "[objects.o{number}]\npath = \"{}\"\nsha256 = \"{digest}\"\n\
             [[objects.o{number}.xdp]]\nprogram = \"{program}\"\ninterfaces = [\"lo\"]\n",
            path.display()
        )
        .unwrap();
    }
    gate.policy("app", &policy);
    let mut raw = Raw::open(&gate, "app");
    let mut outcomes: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    let mut slowest = Duration::ZERO;
    for (number, (what, _)) in objects.iter().enumerate() {
        let start = Instant::now();
        let outcome = match raw.call("Load", &json!({"object": format!("o{number}")})) {
            Ok((reply, _)) => {
                raw.done("Unload", &json!({"instance": reply["instance"]}));
                "loaded".to_owned()
            }
            Err(refused) => {
                is_discreet(&gate, what, &refused.parameters);
                refused.error.trim_start_matches("io.bpfgate.").to_owned()
            }
        };
        slowest = slowest.max(start.elapsed());
        let known = ["loaded", "Object", "Verifier", "Kernel", "Quota", "Unsupported"];
        assert!(known.contains(&outcome.as_str()), "{what}: {outcome}");
        outcomes.entry(outcome).or_default().push(what);
    }
    println!("slowest {slowest:?}: {outcomes:#?}");
    let loaded = outcomes.remove("loaded").unwrap_or_default();
    for must_not in [
        "endless .bss",
        "sparse",
        "a huge number of sections",
        "no names",
        ".BTF.ext of 8000000000000000 bytes",
    ] {
        assert!(!loaded.contains(&must_not), "{must_not} is loaded");
    }
    assert!(outcomes["Object"].len() > 60, "{outcomes:?}");
    assert!(slowest < 2 * SOON * slowness(), "{slowest:?}");
    raw.load("o");
    drop(raw);
    gate.invariants(&before);
}

/// What is told of a refused object names no file, no digest and no address.
fn is_discreet(gate: &Gate, what: &str, parameters: &Value) {
    let text = parameters.to_string();
    let place = gate.dir.display().to_string();
    assert!(!text.contains(&place) && !text.contains("/proc/"), "{what}: {text}");
    let mut run = 0;
    for byte in text.bytes() {
        run = if byte.is_ascii_hexdigit() { run + 1 } else { 0 };
        assert!(run < 32, "{what}: a digest: {text}");
    }
    assert!(!tells_an_address(&text), "{what}: {text}");
}

/// Addresses of the kernel, on x86-64 and on arm64: 16 digits, of which the first four are f.
fn tells_an_address(text: &str) -> bool {
    text.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| {
        let word = word.strip_prefix("0x").unwrap_or(word);
        word.len() == 16 && word.starts_with("ffff") && word.bytes().all(|byte| byte.is_ascii_hexdigit())
    })
}

/// INF-04: the verifier writes addresses of the kernel into the log of a program with CAP_PERFMON. Whoever may load an
/// approved object may not read the kernel by it.
#[test]
fn a_verifiers_log_tells_no_address_of_the_kernel() {
    needs_root!();
    assert!(tells_an_address("r1 = 0xffff888103693c00 ; x") && !tells_an_address("w0 = 0xffffffff"));
    let gate = Gate::start();
    gate.policy(
        "app",
        "{client}\n[objects.o]\n{object:leaky}\n[[objects.o.raw_tracepoint]]\nprogram = \"read_blindly\"\n\
         events = [\"sched_process_exit\"]\n",
    );
    let before = gate.baseline();
    let mut raw = Raw::open(&gate, "app");
    let refused = raw.refused("Load", &json!({"object": "o"}), "Verifier");
    let log = refused["log"].as_str().unwrap();
    // It is the log of just that, with everything else in it.
    assert!(log.contains("r1 = ") && log.contains("processed"), "{log}");
    assert!(!tells_an_address(log), "{log}");
    drop(raw);
    gate.invariants(&before);
}

/// With a digest, anybody may write the directory of an object. What stands there in its place is looked at and not opened,
/// by a helper that is still root: opening some devices does something.
#[test]
fn what_is_no_file_is_not_even_opened() {
    needs_root!();
    let gate = Gate::start();
    let fifo = gate.dir.join("objects/fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o644)).unwrap();
    let path = gate.dir.join("objects/link");
    std::os::unix::fs::symlink(&fifo, &path).unwrap();
    let pinned = format!("path = \"{}\"\nsha256 = \"{}\"", path.display(), "7".repeat(64));
    gate.policy("app", &MINIMAL.replace("{object:minimal}", &pinned));
    let before = gate.baseline();
    std::thread::scope(|scope| {
        // It comes to an end when somebody opens the other side, for however short a time.
        let writer = scope.spawn(|| File::options().write(true).open(&fifo).map(drop));
        let mut raw = Raw::open(&gate, "app");
        let refused = raw.refused("Load", &json!({"object": "o"}), "Object");
        assert!(refused["message"].as_str().unwrap().contains("regular file"), "{refused}");
        let opened = writer.is_finished();
        // For both sides, which never waits.
        drop(File::options().read(true).write(true).open(&fifo));
        writer.join().unwrap().unwrap();
        assert!(!opened, "the helper has opened it");
        drop(raw);
    });
    gate.invariants(&before);
}

/// OBJ-13: whatever section a program is in, it is loaded as what the policy says, or not at all.
#[test]
fn a_section_does_not_decide_what_a_program_is() {
    const XDP: [&str; 5] =
        ["in_xdp_plain", "in_xdp_optional", "in_xdp_frags", "in_xdp_devmap", "in_xdp_cpumap"];
    needs_root!();
    let gate = Gate::start();
    let source = fs::read_to_string(bpfgate_tests::workspace().join("tests/bpf/sections.bpf.c"));
    let Ok(source) = source else {
        println!("skipped: this machine has no source to look at");
        return;
    };
    let programs: Vec<String> = source
        .lines()
        .filter_map(|line| {
            line.strip_prefix("IN(")?
                .strip_suffix(')')?
                .rsplit_once(", ")
                .map(|(_, name)| format!("in_{name}"))
        })
        .collect();
    assert!(programs.len() > 50, "{programs:?}");
    let mut policy = "{client}\n[limits]\nprograms = 64\n[objects.o]\n{object:sections}\n".to_owned();
    for program in &programs {
        write!(policy, "[[objects.o.xdp]]\nprogram = \"{program}\"\ninterfaces = [\"lo\"]\n").unwrap();
    }
    gate.policy("app", &policy);
    let before = gate.baseline();
    let mut raw = Raw::open(&gate, "app");
    for program in &programs {
        let parameters = json!({"object": "o", "programs": [program]});
        if XDP.contains(&program.as_str()) {
            let (loaded, _) = raw.done("Load", &parameters);
            assert_eq!(loaded["programs"][0]["type"], "xdp", "{program}: {loaded}");
            raw.done("Unload", &json!({"instance": loaded["instance"]}));
        } else {
            let refused = raw.refused("Load", &parameters, "Object");
            let message = refused["message"].as_str().unwrap();
            assert!(message.contains(program.as_str()) || message.contains("libbpf"), "{program}: {message}");
        }
    }
    drop(raw);
    gate.invariants(&before);
}
