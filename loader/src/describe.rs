//! `bpfgate-loader --describe`: what is in an object, for the command line. The object comes on standard input, its
//! description goes to standard output. libbpf opens the object as it does for a load, and loads nothing.
//!
//! Distrusted: the object, as in a worker. This process holds no capability, can open no file and has no one to
//! ask for one. It runs as whoever writes a policy, and an object that breaks it breaks nothing else.

use crate::{calls, object, report, seccomp, wrap};
use bpfgate_lockdown::{Fatal, Step, capabilities, files, process, syscalls};
use bpfgate_protocol::channel::Channel;
use bpfgate_protocol::codec;
use bpfgate_protocol::description::{Description, Map, Program};
use bpfgate_protocol::messages::loader::{MapCreate, Purpose};
use bpfgate_protocol::names::ObjectName;
use bpfgate_protocol::policy::object::{MAX_OBJECT, sealed};
use libbpf_rs::libbpf_sys as sys;
use libbpf_rs::{AsRawLibbpf, OpenMap, OpenObject, OpenProgram};
use nix::sys::resource::{Resource, setrlimit};
use std::ffi::CStr;
use std::io::{Read, Write};

/// Seconds of computing: an object with thousands of programs takes a tenth of it.
const PATIENCE: u64 = 10;

pub(crate) fn run() -> Result<(), Fatal> {
    process::tame(64)?;
    capabilities::keep_none()?;
    report::check_version()?;
    setrlimit(Resource::RLIMIT_CPU, PATIENCE, PATIENCE).step("setting RLIMIT_CPU")?;
    let mut bytes = Vec::new();
    let read = std::io::stdin().take(MAX_OBJECT + 1).read_to_end(&mut bytes);
    read.step("reading the object")?;
    if bytes.len() as u64 > MAX_OBJECT {
        return Err(Fatal(format!("the object is larger than {MAX_OBJECT} bytes")));
    }
    let file = sealed("bpfgate-object", &bytes).step("copying the object")?;
    files::restrict(&[], files::Demand::Whatever)?;
    report::prepare_libbpf();
    // Nobody is at the other end: libbpf asks for nothing when it opens an object.
    let (nobody, _) = Channel::pair().step("a channel")?;
    wrap::connect(nobody);
    syscalls::restrict(&seccomp::describer())?;
    let name: ObjectName = "object".parse().step("the name of the object")?;
    let mut log = vec![0; 4096];
    let opened = object::open(&name, &file, &mut log).map_err(|failure| Fatal(failure.refusal.why))?;
    let description = description(&opened, &bytes)?;
    let text = codec::encode(&description).step("describing the object")?;
    let mut out = std::io::stdout();
    out.write_all(&text).and_then(|()| out.flush()).step("writing the description")
}

fn description(object: &OpenObject, bytes: &[u8]) -> Result<Description, Fatal> {
    let mut calls = calls::of_programs(bytes).step("the instructions of the object")?;
    let program = |program: OpenProgram<'_>| {
        let name = program.name().to_string_lossy().into_owned();
        let (functions, refused) = calls.remove(&name).unwrap_or_default();
        Program {
            section: program.section().to_string_lossy().into_owned(),
            prog_type: program.prog_type() as u32,
            flags: flags(&program),
            instructions: u32::try_from(program.insn_cnt()).unwrap_or(u32::MAX),
            functions,
            refused,
            name,
        }
    };
    Ok(Description {
        programs: object.progs().map(program).collect(),
        maps: object.maps().map(|map| self::map(&map)).collect(),
        variables: object::variables(object).into_iter().map(|(variable, _)| variable).collect(),
        wish: object::refuse_wishes(object).err().map(|failure| failure.refusal.why),
    })
}

#[allow(unsafe_code)]
fn flags(program: &OpenProgram<'_>) -> u32 {
    // SAFETY: the program belongs to an object that is alive; libbpf reads a field of it.
    unsafe { sys::bpf_program__flags(program.as_libbpf_object().as_ptr()) }
}

#[allow(unsafe_code)]
fn map(map: &OpenMap<'_>) -> Map {
    let pointer = map.as_libbpf_object().as_ptr();
    // SAFETY: the map belongs to an object that is alive. libbpf reads fields of it; a name is a C string.
    unsafe {
        let name = CStr::from_ptr(sys::bpf_map__name(pointer)).to_string_lossy().into_owned();
        let create = MapCreate {
            purpose: Purpose::Object(0),
            map_type: sys::bpf_map__type(pointer),
            key_size: sys::bpf_map__key_size(pointer),
            value_size: sys::bpf_map__value_size(pointer),
            max_entries: sys::bpf_map__max_entries(pointer),
            flags: sys::bpf_map__map_flags(pointer),
            extra: sys::bpf_map__map_extra(pointer),
            // As libbpf cuts it for the kernel.
            name: name.chars().take(15).collect(),
            btf: 0,
            btf_ids: (0, 0),
        };
        Map { name: object::policy_name(&name).to_owned(), create }
    }
}
