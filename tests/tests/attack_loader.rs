//! A loader that was taken over, against the real helper in its real confinement: what an object can reach that has
//! broken libbpf. The test is the loader, its parent included, and the broker, too.

use bpfgate_protocol::inspect::MAX_BTF;
use bpfgate_protocol::messages::helper::{Outcome, ToHelper, Verb};
use bpfgate_protocol::messages::loader::{FromLoader, LogWanted, MapCreate, ProgLoad, Purpose, ToLoader};
use bpfgate_protocol::messages::{Bulk, Bytes, SessionId};
use bpfgate_protocol::refusal::{Class, Refusal};
use bpfgate_tests::peer::Peer;
use bpfgate_tests::rogue::{FIRST, Loader};
use bpfgate_tests::{Gate, USER, needs_root, process, slowness};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{MsgFlags, send};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// One XDP program, and a map that its client can write.
const POLICY: &str = r#"
{client}
[objects.o]
{object:minimal}
[[objects.o.xdp]]
program = "pass"
interfaces = ["{interface}"]
[objects.o.maps]
counts = "read-write"
[limits]
maps = 4
map_memory = "1MiB"
loads_per_minute = 60000
"#;

const XDP: u32 = 6;

struct Attack {
    peer: Peer,
    loader: Loader,
    _client: UnixStream,
}

impl Attack {
    fn on(gate: &Gate) -> Self {
        let (mut peer, loader) = Peer::start_with_rogue(gate, "app");
        let client = peer.session(gate, 1, &USER);
        Self { peer, loader, _client: client }
    }

    /// A load begins.
    fn begin(&mut self) {
        self.peer.send(&request(), None);
        self.loader.load();
    }

    /// It ends with this; what the broker is told.
    fn end(&mut self, last: &FromLoader) -> Outcome {
        self.loader.end(last);
        self.peer.answer(&request()).0
    }

    fn give_up(&mut self) {
        let _ = refused(self.end(&given_up()));
    }

    /// A load of this one message; what the loader is told, and what the broker is told.
    fn try_one(&mut self, message: &FromLoader) -> (ToLoader, Refusal) {
        self.begin();
        let (told, fds) = self.loader.ask(message, &[]);
        let maps = usize::from(matches!(told, ToLoader::MapCreated { .. }));
        assert_eq!(fds.len(), maps, "{message:?}: something else than a map came");
        (told, refused(self.end(&given_up())))
    }

    /// The helper says no by itself: the loader learns EPERM, the client learns why, and the kernel is not asked.
    fn is_refused(&mut self, message: &FromLoader, classes: &[Class]) {
        let (told, refusal) = self.try_one(message);
        assert!(matches!(told, ToLoader::Failed { errno: libc::EPERM, .. }), "{message:?}: {told:?}");
        assert!(classes.contains(&refusal.class), "{message:?}: {refusal}");
        assert!(refusal.call.is_none(), "the kernel was asked for {message:?}: {refusal}");
        assert!(!refusal.why.contains(char::is_control), "{message:?}: {:?}", refusal.why);
    }

    /// It comes to the kernel, whatever that says.
    fn reaches_the_kernel(&mut self, message: &FromLoader) {
        let (told, refusal) = self.try_one(message);
        let asked = !matches!(told, ToLoader::Failed { .. }) || refusal.call.is_some();
        assert!(asked, "{message:?}: {told:?}, {refusal}");
    }
}

fn request() -> ToHelper {
    let verb = Verb::Load { object: "o".parse().unwrap(), programs: Vec::new(), globals: Vec::new() };
    ToHelper::Ask { session: SessionId(1), verb }
}

fn refused(outcome: Outcome) -> Refusal {
    match outcome {
        Outcome::Refused { refusal, .. } => refusal,
        other => panic!("it is not refused: {other:?}"),
    }
}

fn given_up() -> FromLoader {
    FromLoader::Refused { refusal: Refusal::object("given up"), log: Bulk::empty() }
}

fn map(map_type: u32) -> MapCreate {
    MapCreate {
        purpose: FIRST,
        map_type,
        key_size: 4,
        value_size: 8,
        max_entries: 1,
        flags: 0,
        extra: 0,
        name: "counts".into(),
        btf: 0,
        btf_ids: (0, 0),
    }
}

/// An instruction: its code, its registers (the source in the upper half), its immediate.
fn insn(code: u8, registers: u8, immediate: u32) -> Vec<u8> {
    [&[code, registers, 0, 0], immediate.to_le_bytes().as_slice()].concat()
}

fn call(function: u32) -> Vec<u8> {
    insn(0x85, 0, function)
}

fn pass() -> Vec<u8> {
    [insn(0xb7, 0, 2), insn(0x95, 0, 0)].concat()
}

/// The first program of the plan, with these instructions.
fn program(insns: Vec<u8>) -> ProgLoad {
    let parts = (u32::try_from(insns.len()).unwrap(), 0, 0);
    ProgLoad {
        purpose: FIRST,
        prog_type: XDP,
        expected_attach_type: 37, // BPF_XDP
        flags: 0,
        name: "pass".into(),
        license: "GPL".into(),
        btf: 0,
        kfuncs: Vec::new(),
        log: LogWanted::No,
        record_sizes: (0, 0),
        parts,
        bulk: Bulk::Inline(Bytes(insns)),
    }
}

/// OBJ-16, OBJ-17: types, flags and sizes of maps are read from what the kernel will be asked for, not from the object.
#[test]
fn a_map_is_data_and_nothing_else() {
    // include/uapi/linux/bpf.h, enum bpf_map_type: those that hold plain data.
    const PLAIN: [u32; 12] = [1, 2, 5, 6, 7, 9, 10, 11, 22, 23, 27, 30];
    // BPF_F_NO_PREALLOC, NO_COMMON_LRU, RDONLY_PROG, WRONLY_PROG, MMAPABLE.
    const HARMLESS: [u32; 5] = [0, 1, 7, 8, 10];
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", POLICY);
    let before = gate.baseline();
    let mut attack = Attack::on(&gate);
    for map_type in (0..64).chain([u32::MAX, 1 << 31]) {
        let message = FromLoader::MapCreate(map(map_type));
        if PLAIN.contains(&map_type) {
            attack.reaches_the_kernel(&message);
        } else {
            attack.is_refused(&message, &[Class::Unsupported]);
        }
    }
    for bit in 0..32 {
        let message = FromLoader::MapCreate(MapCreate { flags: 1 << bit, ..map(2) });
        if HARMLESS.contains(&bit) {
            attack.reaches_the_kernel(&message);
        } else {
            attack.is_refused(&message, &[Class::Unsupported]);
        }
    }
    for odd in [
        MapCreate { extra: 1, ..map(2) },
        MapCreate { extra: u64::MAX, ..map(30) },
        MapCreate { name: "sixteencharacter".into(), ..map(2) },
        MapCreate { name: "\x1b[2J\n\u{202e}".into(), ..map(3) },
        MapCreate { name: "\x1b[2J\n\u{202e}".into(), flags: 1 << 31, ..map(2) },
        MapCreate { name: "\x1b[2J\n".into(), max_entries: u32::MAX, ..map(2) },
        MapCreate { max_entries: u32::MAX, value_size: u32::MAX, key_size: u32::MAX, ..map(1) },
        MapCreate { max_entries: (1 << 20) / 8 + 1, ..map(2) },
        MapCreate { max_entries: (1 << 20) + 1, key_size: 0, value_size: 0, ..map(27) },
    ] {
        attack.is_refused(&FromLoader::MapCreate(odd), &[Class::Unsupported, Class::Quota]);
    }
    // What calls itself a probe of libbpf's is none.
    for odd in [map(1), MapCreate { max_entries: 4096, ..map(2) }, map(3)] {
        attack.begin();
        let message = FromLoader::MapCreate(MapCreate { purpose: Purpose::Probe, ..odd });
        let (told, _) = attack.loader.ask(&message, &[]);
        assert!(matches!(told, ToLoader::Failed { errno: libc::EPERM, .. }), "{message:?}: {told:?}");
        attack.give_up();
    }
    // More than the policy allows at a time, one after the other.
    attack.begin();
    for _ in 0..4 {
        let (told, fds) = attack.loader.ask(&FromLoader::MapCreate(map(2)), &[]);
        assert!(matches!(told, ToLoader::MapCreated { .. }) && fds.len() == 1, "{told:?}");
    }
    let (told, _) = attack.loader.ask(&FromLoader::MapCreate(map(2)), &[]);
    assert!(matches!(told, ToLoader::Failed { errno: libc::EPERM, .. }), "{told:?}");
    assert_eq!(refused(attack.end(&given_up())).class, Class::Quota);
    drop(attack);
    gate.invariants(&before);
}

/// OBJ-25, OBJ-26: every number of a helper function, in the instructions that the kernel will get; and one that needs a
/// grant wherever it can stand.
#[test]
fn no_function_is_called_without_its_grant() {
    // include/uapi/linux/bpf.h, ___BPF_FUNC_MAPPER: trace_printk, probe_write_user, override_return, send_signal,
    // send_signal_thread, sys_bpf, btf_find_by_name_kind, sys_close, trace_vprintk, kallsyms_lookup_name,
    // copy_from_user_task.
    const BY_GRANT: [u32; 11] = [6, 36, 58, 109, 117, 166, 167, 168, 177, 179, 191];
    const LAST: u32 = 211;
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", POLICY);
    let before = gate.baseline();
    let mut attack = Attack::on(&gate);
    for id in (0..=LAST + 30).chain([u32::MAX, 1 << 31, 0x8000_0024]) {
        let message = FromLoader::ProgLoad(program([call(id), pass()].concat()));
        if (1..=LAST).contains(&id) && !BY_GRANT.contains(&id) {
            attack.reaches_the_kernel(&message);
        } else {
            attack.is_refused(&message, &[Class::Object, Class::Unsupported]);
        }
    }
    let wide = [insn(0x18, 1, 0x85), insn(0, 0, 0)].concat();
    let to_function = insn(0x85, 0x10, 1); // skips one instruction
    for insns in [
        // Behind the end, behind a constant of two halves, in a function of the program, in a function that nobody calls.
        [pass(), call(36)].concat(),
        [wide.clone(), call(36), pass()].concat(),
        [wide.clone(), wide, call(36), pass()].concat(),
        [to_function, insn(0x95, 0, 0), call(36), pass()].concat(),
        [pass(), call(36), pass()].concat(),
        // Calls of other kinds: of a kernel function, by register, 32-bit, and none that exists.
        [insn(0x85, 0x20, 36), pass()].concat(),
        [insn(0x85, 0x30, 36), pass()].concat(),
        [insn(0x85, 0xf0, 36), pass()].concat(),
        [insn(0x8d, 0x01, 36), pass()].concat(),
        [insn(0x86, 0, 36), pass()].concat(),
        [insn(0x8e, 0, 36), pass()].concat(),
    ] {
        attack.is_refused(&FromLoader::ProgLoad(program(insns)), &[Class::Object]);
    }
    drop(attack);
    gate.invariants(&before);
}

/// OBJ-20, OBJ-32, HLP-08: an instruction can name maps of this load by the numbers that the helper gave, and nothing
/// else: no descriptor of the helper's, no map of an earlier load, no type or variable of the kernel.
#[test]
fn instructions_name_maps_of_their_load_only() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", POLICY);
    let before = gate.baseline();
    let mut attack = Attack::on(&gate);
    let load = |source: u8, immediate: u32, second: Vec<u8>| {
        program([insn(0x18, 1 | source << 4, immediate), second, pass()].concat())
    };
    let zero = || insn(0, 0, 0);
    // Every number that a descriptor of the helper may have, and those that wrap.
    let numbers = (0..64).chain([4095, 8191, u32::MAX, u32::MAX - 1, 1 << 31, i32::MAX.cast_unsigned()]);
    for number in numbers {
        for source in [1, 2] {
            attack.is_refused(&FromLoader::ProgLoad(load(source, number, zero())), &[Class::Object]);
        }
    }
    for source in (3..16).filter(|source| *source != 4) {
        attack.is_refused(&FromLoader::ProgLoad(load(source, 1, zero())), &[Class::Object]);
    }
    // Halves: none, one that is an instruction, one with registers, one behind the end.
    for insns in [
        insn(0x18, 0x11, 1),
        [insn(0x18, 0x11, 1), call(36)].concat(),
        [insn(0x18, 0x11, 1), insn(0, 1, 0)].concat(),
        [pass(), insn(0x18, 0x01, 1)].concat(),
    ] {
        attack.is_refused(&FromLoader::ProgLoad(program(insns)), &[Class::Object]);
    }
    // A map of this load is there under its number; in the next load that number means nothing.
    attack.begin();
    let (told, fds) = attack.loader.ask(&FromLoader::MapCreate(map(2)), &[]);
    let ToLoader::MapCreated { handle } = told else { panic!("{told:?}") };
    assert_eq!(process::kind(&fds[0]), "map");
    let using = FromLoader::ProgLoad(load(1, handle, zero()));
    let (told, more) = attack.loader.ask(&using, &[]);
    assert!(matches!(told, ToLoader::Kept { .. }) && more.is_empty(), "the program itself came: {told:?}");
    attack.give_up();
    attack.is_refused(&using, &[Class::Object]);
    // Types are no map.
    attack.begin();
    let (told, _) = attack.loader.ask(&FromLoader::BtfLoad { bulk: Bulk::Inline(Bytes(btf())) }, &[]);
    let ToLoader::Kept { handle } = told else { panic!("{told:?}") };
    let (told, _) = attack.loader.ask(&FromLoader::ProgLoad(load(1, handle, zero())), &[]);
    assert!(matches!(told, ToLoader::Failed { errno: libc::EPERM, .. }), "{told:?}");
    assert_eq!(refused(attack.end(&given_up())).class, Class::Object);
    drop((attack, fds));
    gate.invariants(&before);
}

/// The smallest BTF: a header, an int of four bytes, its name. Source: Documentation/bpf/btf.rst.
fn btf() -> Vec<u8> {
    let header = [24u32, 0, 16, 16, 3];
    let int = [1u32, 1 << 24, 4, 32];
    let words = header.into_iter().chain(int).flat_map(u32::to_le_bytes);
    [0x9f, 0xeb, 1, 0].into_iter().chain(words).chain(*b"\0i\0").collect()
}

/// OBJ-13, OBJ-14, OBJ-23, OBJ-28: what is loaded is the program of the permit: its type, its kind of attachment, its
/// name, no flag that widens it, and lengths that add up.
#[test]
fn a_program_is_the_one_of_the_permit() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", POLICY);
    let before = gate.baseline();
    let mut attack = Attack::on(&gate);
    let good = || program(pass());
    attack.reaches_the_kernel(&FromLoader::ProgLoad(good()));
    let types = (0..64).filter(|prog_type| *prog_type != XDP).chain([u32::MAX]);
    for prog_type in types {
        let odd = ProgLoad { prog_type, ..good() };
        attack.is_refused(&FromLoader::ProgLoad(odd), &[Class::Object]);
    }
    for expected_attach_type in (0..64).filter(|kind| *kind != 37) {
        let odd = ProgLoad { expected_attach_type, ..good() };
        attack.is_refused(&FromLoader::ProgLoad(odd), &[Class::Object]);
    }
    // BPF_F_XDP_HAS_FRAGS is harmless; the others test the verifier, sleep, bind to a device, or take a token.
    for bit in (0..32).filter(|bit| *bit != 5) {
        let odd = ProgLoad { flags: 1 << bit, ..good() };
        attack.is_refused(&FromLoader::ProgLoad(odd), &[Class::Object]);
    }
    let long = |len: usize| ProgLoad { license: "G".repeat(len), ..good() };
    for odd in [
        ProgLoad { name: "another".into(), ..good() },
        ProgLoad { name: "pass_and_more".into(), ..good() },
        ProgLoad { name: "\x1b[2J".into(), ..good() },
        ProgLoad { purpose: Purpose::Object(1), ..good() },
        ProgLoad { purpose: Purpose::Object(u32::MAX), ..good() },
        ProgLoad { license: "GPL\0evil".into(), ..good() },
        long(128),
        long(100_000),
        ProgLoad { parts: (8, 0, 0), ..good() },
        ProgLoad { parts: (8, 8, 0), ..good() },
        ProgLoad { parts: (u32::MAX, 17, 0), ..good() },
        ProgLoad { parts: (u32::MAX, u32::MAX, u32::MAX), ..good() },
        ProgLoad { parts: (0, 16, 0), record_sizes: (8, 0), ..good() },
        ProgLoad { parts: (12, 4, 0), ..good() },
        ProgLoad { parts: (8, 0, 8), record_sizes: (0, 4), ..good() },
        ProgLoad { parts: (8, 8, 0), record_sizes: (0, 0), ..good() },
        ProgLoad { parts: (8, 8, 0), record_sizes: (u32::MAX, 0), ..good() },
        ProgLoad { bulk: Bulk::empty(), ..good() },
        ProgLoad { bulk: Bulk::empty(), parts: (0, 0, 0), ..good() },
    ] {
        attack.is_refused(&FromLoader::ProgLoad(odd), &[Class::Object, Class::Denied]);
    }
    drop(attack);
    gate.invariants(&before);
}

/// HLP-17: how much can be asked for ends below what the kernel would take, and what is said of a length is not believed.
#[test]
fn sizes_are_bounded_before_the_kernel_is_asked() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", POLICY);
    let before = gate.baseline();
    let mut attack = Attack::on(&gate);
    let helper = attack.peer.pid();
    let peak = || process::number(helper, "VmHWM");
    let at_first = peak();
    // A descriptor of nothing, and a length of everything.
    let nothing = memfd_create("nothing", MFdFlags::MFD_CLOEXEC).unwrap();
    for len in [1, 4096, u32::try_from(MAX_BTF + (1 << 20) + 1).unwrap(), u32::MAX] {
        attack.begin();
        let (told, _) =
            attack.loader.ask(&FromLoader::BtfLoad { bulk: Bulk::Memfd { len } }, &[nothing.as_fd()]);
        assert!(matches!(told, ToLoader::Failed { errno: libc::E2BIG, .. }), "{len}: {told:?}");
        let odd = ProgLoad { bulk: Bulk::Memfd { len }, parts: (len & !7, len & 7, 0), ..program(pass()) };
        let (told, _) = attack.loader.ask(&FromLoader::ProgLoad(odd), &[nothing.as_fd()]);
        assert!(matches!(told, ToLoader::Failed { errno: libc::EPERM, .. }), "{len}: {told:?}");
        attack.give_up();
    }
    assert!(peak() - at_first < 16 << 10, "from {at_first} kB to {} kB for nothing", peak());
    // Other kinds of descriptors than a memfd cannot be read from a place, or hold nothing.
    let (one, _other) = UnixStream::pair().unwrap();
    let (pipe, _write) = nix::unistd::pipe().unwrap();
    let zeroes = std::fs::File::open("/dev/zero").unwrap();
    for fd in [one.as_fd(), pipe.as_fd(), zeroes.as_fd()] {
        attack.begin();
        let (told, _) = attack.loader.ask(&FromLoader::BtfLoad { bulk: Bulk::Memfd { len: 4096 } }, &[fd]);
        assert!(matches!(told, ToLoader::Failed { .. }), "{told:?}");
        attack.give_up();
    }
    // One after the other, until it is enough: the load is over, the worker too, the next load is served.
    attack.begin();
    let mut answers = 0;
    loop {
        attack.loader.work.send(&FromLoader::BtfLoad { bulk: Bulk::Inline(Bytes(btf())) }, &[]).unwrap();
        match attack.loader.work.recv::<ToLoader>() {
            Ok((ToLoader::Kept { .. }, _)) => answers += 1,
            other => panic!("after {answers}: {other:?}"),
        }
        if is_told(&attack.loader, 20) {
            break;
        }
        assert!(answers < 400, "there is no end");
    }
    attack.loader.dies();
    assert_eq!(refused(attack.peer.answer(&request()).0).class, Class::Object);
    attack.reaches_the_kernel(&FromLoader::ProgLoad(program(pass())));
    drop(attack);
    gate.invariants(&before);
}

/// Messages that do not belong where they stand end the worker, cost that load, and nothing else.
#[test]
fn a_loader_that_breaks_the_order_loses_its_worker() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", POLICY);
    let before = gate.baseline();
    let mut attack = Attack::on(&gate);
    let (client, _) = attack.peer.ask(&list(), None);
    assert_eq!(client, Outcome::Instances(Vec::new()));
    let astray: [(&str, Vec<u8>); 4] = [
        ("symbols that nobody asked for", encoded(&FromLoader::Found { offsets: vec![0; 1000] })),
        ("garbage", vec![0xff; 300]),
        ("a length that lies", [encoded(&FromLoader::Loaded { maps: Vec::new() }), vec![0]].concat()),
        ("longer than a message", vec![0; bpfgate_protocol::codec::MAX_MESSAGE + 1]),
    ];
    for (what, bytes) in astray {
        attack.begin();
        attack.loader.work.send_bytes(&bytes, &[]).unwrap();
        attack.loader.dies();
        assert_eq!(refused(attack.peer.answer(&request()).0).class, Class::Object, "{what}");
    }
    // Descriptors with a message that takes none.
    let null = std::fs::File::open("/dev/null").unwrap();
    for count in [1, 2, 253] {
        attack.begin();
        attack.loader.work.send_bytes(&encoded(&given_up()), &vec![null.as_fd(); count]).unwrap();
        attack.loader.dies();
        assert_eq!(refused(attack.peer.answer(&request()).0).class, Class::Object);
    }
    // An object that is loaded without its program; with a map that is not there, of a probe, or there twice.
    let loaded = |maps: &[(&str, u32)]| FromLoader::Loaded {
        maps: maps.iter().map(|(name, handle)| (name.parse().unwrap(), *handle)).collect(),
    };
    for (probe, maps) in [
        (false, &[][..]),
        (false, &[("counts", 0)]),
        (false, &[("counts", 7)]),
        (false, &[("counts", u32::MAX)]),
        (false, &[("counts", 1), ("other", 1)]),
        (false, &[("counts", 1), ("counts", 2)]),
        (true, &[("counts", 1)]),
    ] {
        attack.begin();
        let purpose = if probe { Purpose::Probe } else { FIRST };
        for _ in 0..2 {
            let (told, _) = attack.loader.ask(&FromLoader::MapCreate(MapCreate { purpose, ..map(2) }), &[]);
            assert!(matches!(told, ToLoader::MapCreated { .. }), "{told:?}");
        }
        if !maps.is_empty() {
            let (told, _) = attack.loader.ask(&FromLoader::ProgLoad(program(pass())), &[]);
            assert!(matches!(told, ToLoader::Kept { .. }), "{told:?}");
        }
        assert_eq!(refused(attack.end(&loaded(maps))).class, Class::Object, "{maps:?}");
    }
    // Handles of maps to be frozen that are none.
    attack.begin();
    for handle in [0, 1, 2, u32::MAX] {
        let (told, _) = attack.loader.ask(&FromLoader::MapFreeze { handle }, &[]);
        assert!(matches!(told, ToLoader::Failed { errno: libc::EBADF, .. }), "{told:?}");
    }
    // What the loader says of the reason counts for a reason, and for no other class: nobody is told "denied" by it.
    for class in Class::ALL {
        let refusal =
            Refusal { line: Some(1), call: Some(("\x1b[2J".into(), 1)), ..Refusal::new(class, "\x1b[2J") };
        let refusal = refused(attack.end(&FromLoader::Refused { refusal, log: Bulk::empty() }));
        let expected = if class == Class::Invalid { Class::Invalid } else { Class::Object };
        assert_eq!((refusal.class, refusal.line, &refusal.call), (expected, None, &None));
        assert!(!refusal.why.contains('\x1b'), "{refusal}");
        attack.begin();
    }
    attack.give_up();
    assert_eq!(attack.peer.ask(&list(), None).0, Outcome::Instances(Vec::new()), "something was loaded");
    drop(attack);
    gate.invariants(&before);
}

fn list() -> ToHelper {
    ToHelper::Ask { session: SessionId(1), verb: Verb::List }
}

fn encoded(message: &FromLoader) -> Vec<u8> {
    bpfgate_protocol::codec::encode(message).unwrap()
}

/// How long a load may take is counted over all of it: a loader that says something now and then, and never comes to an
/// end, is ended like one that hangs.
#[test]
fn a_loader_that_dawdles_is_late_all_the_same() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", POLICY);
    let before = gate.baseline();
    let mut attack = Attack::on(&gate);
    let start = Instant::now();
    attack.begin();
    loop {
        attack.loader.work.send(&FromLoader::MapFreeze { handle: 0 }, &[]).unwrap();
        if is_told(&attack.loader, 3000) {
            break;
        }
        assert!(start.elapsed() < Duration::from_secs(25) * slowness(), "it dawdles for ever");
    }
    attack.loader.dies();
    let refusal = refused(attack.peer.answer(&request()).0);
    assert!(refusal.why.contains("within 10 s"), "{refusal}");
    attack.reaches_the_kernel(&FromLoader::ProgLoad(program(pass())));
    drop(attack);
    gate.invariants(&before);
}

/// A worker that talks and talks before it is asked anything keeps its helper from nothing: it is ended, and the next one
/// gets the request.
#[test]
fn a_loader_that_floods_is_ended() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", POLICY);
    let before = gate.baseline();
    let mut attack = Attack::on(&gate);
    let (bytes, over) = (encoded(&FromLoader::MapFreeze { handle: 0 }), AtomicBool::new(false));
    let killed = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let _ = send(attack.loader.work.as_fd().as_raw_fd(), &bytes, MsgFlags::MSG_DONTWAIT);
            }
        });
        // It has begun long before it is asked anything.
        std::thread::sleep(Duration::from_millis(50));
        attack.peer.send(&request(), None);
        let killed = is_told(&attack.loader, 10_000);
        over.store(true, Ordering::Relaxed);
        killed
    });
    assert!(killed, "it floods for ever");
    attack.loader.dies();
    attack.loader.load();
    attack.give_up();
    drop(attack);
    gate.invariants(&before);
}

/// Whether the loader's parent is told something within so many milliseconds.
fn is_told(loader: &Loader, milliseconds: u16) -> bool {
    let mut leash = [PollFd::new(loader.leash.as_fd(), PollFlags::POLLIN)];
    poll(&mut leash, milliseconds).unwrap() > 0
}
