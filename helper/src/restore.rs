//! The way back: from descriptors that the service manager kept to instances, as far as the policy of now allows them.
//!
//! Before the lock-down [`sort`] looks what each descriptor is; inside of it [`restore`] reads the record and puts
//! together what belongs together. What is missing is missing, what nobody knows is closed, what is no longer allowed
//! is detached; each is said.

use crate::attach::{self, Attached};
use crate::judge::{Origin, judge};
use crate::maps::{Issued, Map};
use crate::state::{Instance, Link, Program, State};
use crate::store::{RECORD, link_name, map_name, program_name};
use bpfgate_bpf::Description;
use bpfgate_helper::record::{Granted, InstanceRecord, LinkRecord, MAX_NUMBER, Record};
use bpfgate_lockdown::Fatal;
use bpfgate_protocol::codec::MAX_MESSAGE;
use bpfgate_protocol::names::ProgramName;
use bpfgate_protocol::policy::Policy;
use bpfgate_protocol::policy::object::SEALS;
use bpfgate_protocol::refusal::printable;
use bpfgate_systemd::manager::Named;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::uio::pread;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Map,
    Program,
    Link,
    Record,
}

/// A descriptor that was kept. `kind` is none for what we never had kept.
pub(crate) struct Kept {
    name: String,
    kind: Option<Kind>,
    /// A map that nobody can write any more.
    frozen: bool,
    fd: OwnedFd,
}

/// Looks what descriptors are; later nothing tells.
pub(crate) fn sort(named: Vec<Named>) -> Vec<Kept> {
    let kind = |fd: &OwnedFd| {
        let what = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok()?;
        match what.to_str()? {
            "anon_inode:bpf-map" => Some(Kind::Map),
            "anon_inode:bpf-prog" => Some(Kind::Program),
            "anon_inode:bpf_link" | "anon_inode:bpf-link" => Some(Kind::Link),
            "/memfd:bpfgate-state (deleted)"
                if fcntl(fd, FcntlArg::F_GET_SEALS).is_ok_and(|seals| seals == SEALS.bits()) =>
            {
                Some(Kind::Record)
            }
            _ => None,
        }
    };
    // bpf(2) does not tell; /proc does.
    let frozen = |fd: &OwnedFd| {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()));
        info.is_ok_and(|info| info.lines().any(|line| line == "frozen:\t1"))
    };
    named
        .into_iter()
        .map(|Named { name, fd }| Kept { kind: kind(&fd), frozen: frozen(&fd), name, fd })
        .collect()
}

/// What is there and not yet somebody's.
struct Pool(BTreeMap<String, Vec<Kept>>);

impl Pool {
    /// The newest record that can be read, and its number.
    fn record(&mut self) -> Option<(u64, Record<Granted>)> {
        let mut newest = None;
        for (name, all) in &self.0 {
            let Some(number) = name
                .strip_prefix(RECORD)
                .and_then(|number| number.parse::<u64>().ok())
                .filter(|n| *n < MAX_NUMBER)
            else {
                continue;
            };
            for kept in all.iter().filter(|kept| kept.kind == Some(Kind::Record)) {
                match read(&kept.fd) {
                    Ok(record) if newest.as_ref().is_none_or(|(newest, _)| *newest < number) => {
                        newest = Some((number, record));
                    }
                    Ok(_) => {}
                    Err(why) => eprintln!("bpfgate-helper: {name} cannot be read: {why}"),
                }
            }
        }
        newest
    }

    /// The descriptor of this name, if it is what the record says: of this kind, and as the kernel describes it.
    fn claim(&mut self, name: &str, kind: Kind, expected: impl Fn(&Description) -> bool) -> Option<Kept> {
        let is = |kept: &Kept| {
            kept.kind == Some(kind) && bpfgate_bpf::describe(kept.fd.as_fd()).is_ok_and(|got| expected(&got))
        };
        let found = self.0.get_mut(name).and_then(|all| {
            let place = all.iter().position(is)?;
            Some(all.swap_remove(place))
        });
        if found.is_none() {
            eprintln!("bpfgate-helper: {name} was kept, and did not come back");
        }
        found
    }
}

fn read(file: &OwnedFd) -> Result<Record<Granted>, String> {
    let mut bytes = vec![0; MAX_MESSAGE + 1];
    let mut len = 0;
    while len < bytes.len() {
        let at = i64::try_from(len).map_err(|e| e.to_string())?;
        match pread(file, &mut bytes[len..], at) {
            Ok(0) => break,
            Ok(more) => len += more,
            Err(error) => return Err(error.desc().to_owned()),
        }
    }
    Record::read(&bytes[..len])
}

/// Takes back what was kept.
///
/// Errors: what may not stay may still be there, because the service manager does not answer
pub(crate) fn restore(state: &mut State, kept: Vec<Kept>) -> Result<(), Fatal> {
    let mut names: BTreeSet<String> = kept.iter().map(|one| one.name.clone()).collect();
    names.extend(std::mem::take(&mut state.inventory.unwanted));
    if names.is_empty() {
        return Ok(());
    }
    let mut pool = Pool(BTreeMap::new());
    for one in kept {
        pool.0.entry(one.name.clone()).or_default().push(one);
    }
    let (mut revoked, mut gone) = (Vec::new(), Vec::new());
    if let Some((generation, record)) = pool.record() {
        state.store.generation = generation;
        (state.last_instance, state.last_link) = (record.last_instance, record.last_link);
        let same_network = record.network == state.inventory.network_id;
        for entry in record.instances {
            let id = entry.id;
            let (instance, complete) = instance(&mut pool, entry, &state.policy);
            let origin = Origin::Kept { complete, same_network };
            let (instance, links) = judge(state, id, instance, origin, &mut gone);
            revoked.extend(links);
            if let Some(instance) = instance {
                state.instances.insert(id, instance);
            }
        }
    }
    for what in gone {
        eprintln!("bpfgate-helper: revoked: {what}");
    }
    // Detached whoever else holds them, before anybody is served.
    for link in revoked {
        state.release(link);
    }
    // A name that is not somebody's is forgotten. One that has strangers beside ours too; ours is kept anew.
    let ours: BTreeSet<String> = state.kept_names().into_iter().map(|(name, _)| name).collect();
    let strange: BTreeSet<&String> =
        ours.iter().filter(|name| pool.0.get(*name).is_some_and(|all| !all.is_empty())).collect();
    let current = state.keeps().then(|| format!("{RECORD}{}", state.store.generation));
    let others: Vec<String> = names
        .into_iter()
        .filter(|name| (!ours.contains(name) || strange.contains(name)) && current.as_ref() != Some(name))
        .collect();
    drop(pool);
    let forgotten = state.forget(&others);
    let kept = state.keep_again(&strange);
    let count = state.instances.len();
    let left = if others.is_empty() {
        String::new()
    } else {
        format!("; not taken: {}", printable(&others.join(", "), 1000))
    };
    eprintln!("bpfgate-helper: {count} instances were taken back{left}");
    forgotten.and(kept).map_err(|refusal| Fatal(refusal.why))
}

/// An instance as far as it has come back, and whether all of its maps have.
fn instance(pool: &mut Pool, entry: InstanceRecord<Granted>, policy: &Policy) -> (Instance, bool) {
    let InstanceRecord { id, object, digest, map_bytes, granted, globals, programs, maps, links } = entry;
    let Granted { functions, mut bound } = granted;
    let numbers: BTreeMap<ProgramName, u32> =
        programs.iter().map(|(info, number)| (info.name.clone(), *number)).collect();
    let map_count = maps.len();
    let programs: Vec<Program> = programs
        .into_iter()
        .filter(|(info, _)| policy.still_names(&object, &info.name, info.hook, bound.get(&info.name)))
        .collect::<Vec<_>>()
        .into_iter()
        .filter_map(|(info, number)| {
            let is = |got: &Description| got.id == number && got.kind == info.hook.row().prog_type;
            let Kept { fd, .. } = pool.claim(&program_name(id, &info.name), Kind::Program, is)?;
            Some(Program { function: bound.remove(&info.name), info, fd })
        })
        .collect();
    let maps: Vec<Map> = maps
        .into_iter()
        .filter_map(|(name, number)| {
            let Kept { fd, frozen, .. } =
                pool.claim(&map_name(id, &name), Kind::Map, |got| got.id == number)?;
            Some(Map { name, fd, frozen, issued: Issued::unknown(frozen) })
        })
        .collect();
    let links = links
        .into_iter()
        .filter_map(|LinkRecord { info, way, shared, number }| {
            let runs = numbers.get(&info.program).copied();
            let is = |got: &Description| {
                got.id == number && Some(got.program) == runs && got.kind == attach::link_type(info.hook)
            };
            let Kept { fd, .. } = pool.claim(&link_name(info.id), Kind::Link, is)?;
            Some(Link { info, way, attached: Attached::from(fd), shared })
        })
        .collect();
    let complete = maps.len() == map_count;
    let owner = None;
    (Instance { object, digest, owner, programs, maps, map_bytes, links, functions, globals }, complete)
}
