//! One load: open the object with libbpf, refuse what it may not wish for, load what was asked for.

use crate::worker::Failure;
use crate::wrap::Expected;
use crate::{calls, report, wrap};
use bpfgate_protocol::description::{Shape, Variable};
use bpfgate_protocol::functions::Function;
use bpfgate_protocol::hooks::type_name;
use bpfgate_protocol::inspect::check_global;
use bpfgate_protocol::messages::helper::Global;
use bpfgate_protocol::messages::loader::{Handle, ProgramPlan};
use bpfgate_protocol::names::{MapName, ObjectName};
use bpfgate_protocol::refusal::Refusal;
use libbpf_rs::libbpf_sys as sys;
use libbpf_rs::{AsRawLibbpf, MapCore, ObjectBuilder, OpenObject, ProgramAttachType};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::num::NonZero;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// The whole verifier log is kept up to here, in bytes; beyond it, the end of it.
pub(crate) const MAX_LOG: usize = 1 << 20;

/// Loads `plan` from the object in `file`, which is sealed. Gives the maps by name. `log` is for the verifier's log.
pub(crate) fn load(
    name: &ObjectName,
    plan: &[ProgramPlan],
    globals: &[Global],
    file: OwnedFd,
    log: &mut [u8],
) -> Result<Vec<(MapName, Handle)>, Failure> {
    let _ = report::take_messages();
    log[0] = 0;
    let mut object = open(name, &file, log)?;
    refuse_wishes(&object)?;
    let mut expected = select(&mut object, plan)?;
    if kernel_symbols(&object).next().is_some() {
        name_kfuncs(&mut expected, plan, file)?;
    }
    wrap::begin(expected);
    set_globals(&mut object, globals)?;
    let loaded = object.load().map_err(|error| failed(&error, log))?;
    let mut maps = Vec::new();
    for map in loaded.maps() {
        let name = map.name().to_string_lossy().into_owned();
        let name = policy_name(&name);
        let handle = wrap::handle(map.as_fd().as_raw_fd());
        // A name that no policy can write is of no use to anybody.
        if let Ok(name) = name.parse() {
            maps.push((name, handle));
        }
    }
    // `loaded` closes everything here: the helper may freeze a map only if nobody has it mapped for writing.
    Ok(maps)
}

/// libbpf calls data sections OBJECT.bss and the like; a policy calls them .bss.
pub(crate) fn policy_name(name: &str) -> &str {
    name.find('.').map_or(name, |dot| &name[dot..])
}

#[allow(unsafe_code)]
pub(crate) fn open(name: &ObjectName, file: &OwnedFd, log: &mut [u8]) -> Result<OpenObject, Failure> {
    let size = nix::sys::stat::fstat(file).map_or(0, |stat| stat.st_size);
    let Some(size) = usize::try_from(size).ok().and_then(NonZero::new) else {
        return Err(Failure::object("the object file is empty"));
    };
    // SAFETY: a new private mapping, unmapped below; the memfd is sealed, so it cannot shrink under us.
    let memory = unsafe { mmap(None, size, ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE, file, 0) };
    let memory = memory.map_err(|e| Failure::object(format!("mapping the object: {}", e.desc())))?;
    let mut builder = ObjectBuilder::default();
    builder.name(name.as_str()).map_err(|e| Failure::object(e.to_string()))?;
    let no_token = CString::default();
    // SAFETY: `options` is the builder's own struct, alive until `open_memory` returned; libbpf keeps the pointer to
    // `log`, which the caller keeps until the object is loaded, and copies the token path. The bytes at `memory`
    // are `size` long and mapped until `munmap`, and libbpf lets go of them at the end of open (bpf_object__elf_finish).
    unsafe {
        let options = builder.as_libbpf_object().as_mut();
        options.kernel_log_buf = log.as_mut_ptr().cast();
        options.kernel_log_size = log.len() as u64;
        options.kernel_log_level = 0;
        options.bpf_token_path = no_token.as_ptr();
        let bytes = std::slice::from_raw_parts(memory.as_ptr().cast::<u8>(), size.get());
        let object = builder.open_memory(bytes);
        let _ = munmap(memory, size.get());
        object.map_err(|error| {
            let said = report::take_messages();
            Failure::object(format!("libbpf cannot open the object: {error}; {said}"))
        })
    }
}

/// Refuses what an object may wish for and a policy cannot allow: pinned maps, configuration and variables of the kernel.
#[allow(unsafe_code)]
pub(crate) fn refuse_wishes(object: &OpenObject) -> Result<(), Failure> {
    for map in object.maps() {
        let name = map.name().to_string_lossy();
        // SAFETY: the map belongs to `object`, which is alive; libbpf returns its own string or null.
        let pinned = unsafe { !sys::bpf_map__pin_path(map.as_libbpf_object().as_ptr()).is_null() };
        if pinned {
            return Err(Failure::object(format!(
                "map {name} wants to be pinned (LIBBPF_PIN_BY_NAME); take the pinning out of the object"
            )));
        }
        if name.ends_with(".kconfig") {
            return Err(Failure::object(
                "the object wants the kernel's configuration (__kconfig); set a global instead",
            ));
        }
    }
    match kernel_symbols(object).find(|name| name != KERNEL_FUNCTION) {
        Some(name) => Err(Failure::object(format!(
            "the object refers to variable {name} of the kernel (__ksym), which no policy can allow"
        ))),
        None => Ok(()),
    }
}

/// What libbpf calls every function of the kernel among the symbols, once it has opened an object.
/// Source: libbpf 1.7, src/libbpf.c, `add_dummy_ksym_var`.
const KERNEL_FUNCTION: &str = "dummy_ksym";

/// Symbols of the kernel that the object wants: functions and variables.
fn kernel_symbols(object: &OpenObject) -> impl Iterator<Item = String> {
    let all = variables(object).into_iter().map(|(variable, _)| variable);
    all.filter(|variable| variable.section == ".ksyms").map(|variable| variable.name)
}

/// Switches on the programs of the plan and off all others; gives what the kernel will be asked for, in order.
fn select(object: &mut OpenObject, plan: &[ProgramPlan]) -> Result<Vec<Expected>, Failure> {
    let mut expected = Vec::new();
    for mut program in object.progs_mut() {
        let name = program.name().to_string_lossy().into_owned();
        let wanted = plan.iter().position(|p| p.name.as_str() == name);
        program.set_autoload(wanted.is_some());
        let Some(place) = wanted else { continue };
        let plan = &plan[place];
        let prog_type = program.prog_type() as u32;
        if prog_type != plan.prog_type {
            let section = program.section().to_string_lossy();
            let why = format!(
                "program {name} is in section \"{section}\", type {}; the policy lists it as type {}",
                type_name(prog_type),
                type_name(plan.prog_type)
            );
            return Err(Failure::object(why));
        }
        program.set_attach_type(ProgramAttachType::from(plan.expected_attach_type));
        if let Some(function) = &plan.function {
            // Else libbpf would take the one that stands in the section.
            program.set_attach_target(0, Some(function.to_string())).map_err(|error| {
                let said = report::take_messages();
                Failure::object(format!("program {name} cannot be for function {function}: {error}; {said}"))
            })?;
        }
        let place = u32::try_from(place).map_err(|_| Failure::object("too many programs"))?;
        expected.push(Expected { name: name.chars().take(15).collect(), place, kfuncs: Vec::new() });
    }
    for program in plan {
        if !object.progs().any(|p| p.name() == OsStr::new(program.name.as_str())) {
            return Err(Failure::object(format!("the object has no program {}", program.name)));
        }
    }
    Ok(expected)
}

/// Finds out which functions of the kernel each program calls: libbpf tells only their numbers.
fn name_kfuncs(expected: &mut [Expected], plan: &[ProgramPlan], file: OwnedFd) -> Result<(), Failure> {
    let file = File::from(file);
    let size = file.metadata().map_or(0, |data| data.len());
    let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
    // Not from where it was read last: the helper's descriptor and that of the load before are the same file.
    file.read_exact_at(&mut bytes, 0)
        .map_err(|error| Failure::object(format!("reading the object: {error}")))?;
    let mut calls = calls::of_programs(&bytes)
        .map_err(|error| Failure::object(format!("the instructions of the object: {error}")))?;
    for program in expected {
        let name = plan[program.place as usize].name.as_str();
        let (called, refused) = calls.remove(name).unwrap_or_default();
        if let Some(why) = refused {
            return Err(Failure::object(format!("program {name}: {why}")));
        }
        let kfuncs = called.into_iter().filter_map(|function| match function {
            Function::Kernel(name) => Some(name),
            Function::Helper(_) => None,
        });
        // So that they fit into a message.
        program.kfuncs = kfuncs.take(64).collect();
    }
    Ok(())
}

/// Writes values to variables of `.rodata`, found by the object's own type information.
fn set_globals(object: &mut OpenObject, globals: &[Global]) -> Result<(), Failure> {
    for global in globals {
        let variable = variables(object)
            .into_iter()
            .find(|(variable, _)| variable.is_read_only() && variable.name == global.name.as_str());
        let Some((Variable { section, size, .. }, offset)) = variable else {
            return Err(Failure::object(format!("the object has no .rodata variable {}", global.name)));
        };
        check_global(&global.name, u64::from(size), global.value)
            .map_err(|refusal| Failure { refusal, log: Vec::new() })?;
        let size = size as usize;
        let mut maps = object.maps_mut();
        let map = maps.find(|map| map.name().to_string_lossy().ends_with(&section));
        let Some(mut map) = map else {
            return Err(Failure::object(format!("global {} is in no map", global.name)));
        };
        let place = map.initial_value_mut().and_then(|value| value.get_mut(offset..offset + size));
        let Some(place) = place else {
            return Err(Failure::object(format!("global {} is outside of its section", global.name)));
        };
        place.copy_from_slice(&global.value.to_le_bytes()[..size]);
    }
    Ok(())
}

/// The variables of all data sections, each with its offset in its section.
#[allow(unsafe_code)]
pub(crate) fn variables(object: &OpenObject) -> Vec<(Variable, usize)> {
    let mut all = Vec::new();
    // SAFETY: the object is alive, and so is its BTF. libbpf has checked the BTF when it opened the object:
    // types, names and the entries behind a DATASEC are inside of it. A type id that does not exist gives null.
    unsafe {
        let btf = sys::bpf_object__btf(object.as_libbpf_object().as_ptr());
        if btf.is_null() {
            return all;
        }
        for id in 1..sys::btf__type_cnt(btf) {
            let section = sys::btf__type_by_id(btf, id);
            if section.is_null() || ((*section).info >> 24) & 0x1f != sys::BTF_KIND_DATASEC {
                continue;
            }
            let Some(section_name) = string(btf, (*section).name_off) else { continue };
            let variables = section.add(1).cast::<sys::btf_var_secinfo>();
            for i in 0..((*section).info & 0xffff) as usize {
                let variable = &*variables.add(i);
                let var_type = sys::btf__type_by_id(btf, variable.type_);
                if var_type.is_null() {
                    continue;
                }
                let Some(name) = string(btf, (*var_type).name_off) else { continue };
                let (section, size) = (section_name.clone(), variable.size);
                let shape = shape(btf, variable.type_);
                all.push((Variable { section, name, size, shape }, variable.offset as usize));
            }
        }
    }
    all
}

/// What a variable of this type holds.
///
/// # Safety
/// `btf` is alive, and libbpf has checked it.
#[allow(unsafe_code)]
unsafe fn shape(btf: *const sys::btf, id: u32) -> Shape {
    // SAFETY: the caller's promise. The encoding of an INT is the word behind its type.
    unsafe {
        let Ok(id) = u32::try_from(sys::btf__resolve_type(btf, id)) else { return Shape::Other };
        let resolved = sys::btf__type_by_id(btf, id);
        if resolved.is_null() {
            return Shape::Other;
        }
        match ((*resolved).info >> 24) & 0x1f {
            sys::BTF_KIND_INT => {
                let encoding = (*resolved.add(1).cast::<u32>() >> 24) & 0xf;
                if encoding & sys::BTF_INT_SIGNED == 0 { Shape::Unsigned } else { Shape::Signed }
            }
            // The highest bit of `info` says that values of an ENUM are signed.
            sys::BTF_KIND_ENUM | sys::BTF_KIND_ENUM64 if (*resolved).info >> 31 == 0 => Shape::Unsigned,
            sys::BTF_KIND_ENUM | sys::BTF_KIND_ENUM64 => Shape::Signed,
            _ => Shape::Other,
        }
    }
}

/// # Safety
/// `btf` is alive.
#[allow(unsafe_code)]
unsafe fn string(btf: *const sys::btf, offset: u32) -> Option<String> {
    // SAFETY: libbpf returns null or a C string inside of the BTF.
    unsafe {
        let text = sys::btf__name_by_offset(btf, offset);
        (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
    }
}

/// What a failed load comes to. The helper knows better what it refused itself; this is for the rest, and for the log.
fn failed(error: &libbpf_rs::Error, log: &[u8]) -> Failure {
    let end = log.iter().position(|&b| b == 0).unwrap_or(log.len());
    let said = report::take_messages();
    let refusal = Refusal::object(format!("libbpf cannot load the object: {error}; {said}"));
    Failure { refusal, log: log[..end].to_vec() }
}
