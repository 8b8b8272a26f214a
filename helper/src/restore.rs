//! The way back: from descriptors that the service manager kept to instances, as far as the policy of now allows them.
//!
//! Before the lock-down [`sort`] looks what each descriptor is; inside of it [`restore`] reads the record and puts
//! together what belongs together. What is missing is missing, what nobody knows is closed, what is no longer allowed
//! is detached; each is said.

use crate::attach::Attached;
use crate::maps::Map;
use crate::state::{Instance, Link, Program, State};
use crate::store::{InstanceRecord, LinkRecord, RECORD, Record, link_name, map_name, program_name};
use bpfgate_protocol::codec::{self, MAX_MESSAGE};
use bpfgate_protocol::messages::helper::Target;
use bpfgate_protocol::policy::Keep;
use bpfgate_protocol::policy::object::SEALS;
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
    fn record(&mut self) -> Option<(u64, Record)> {
        let mut newest = None;
        for (name, all) in &self.0 {
            let Some(number) = name.strip_prefix(RECORD).and_then(|number| number.parse::<u64>().ok()) else {
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

    /// The descriptor of this name, if it is what the record says.
    fn claim(&mut self, name: &str, kind: Kind, number: u32) -> Option<Kept> {
        let is =
            |kept: &Kept| kept.kind == Some(kind) && bpfgate_bpf::object_id(kept.fd.as_fd()) == Ok(number);
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

fn read(file: &OwnedFd) -> Result<Record, String> {
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
    codec::decode(&bytes[..len]).map_err(|e| e.to_string())
}

/// Takes back what was kept.
pub(crate) fn restore(state: &mut State, kept: Vec<Kept>) {
    if kept.is_empty() {
        return;
    }
    let mut pool = Pool(BTreeMap::new());
    for one in kept {
        pool.0.entry(one.name.clone()).or_default().push(one);
    }
    let mut links = Vec::new();
    if let Some((generation, record)) = pool.record() {
        state.store.generation = generation;
        (state.last_instance, state.last_link) = (record.last_instance, record.last_link);
        let same_network = record.network == state.inventory.network_id;
        for entry in record.instances {
            let id = entry.id;
            let (instance, revoked) = instance(state, &mut pool, entry, same_network);
            links.extend(revoked);
            if let Some(instance) = instance {
                state.instances.insert(id, instance);
            }
        }
    }
    // Detached whoever else holds them, before anybody is served.
    for link in links {
        state.release(link);
    }
    let claimed: BTreeSet<String> = state.kept_names().into_iter().map(|(name, _)| name).collect();
    let current = format!("{RECORD}{}", state.store.generation);
    // Of a name that has strangers beside ours, everything is forgotten and ours is kept anew.
    let strange = |all: &Vec<Kept>| !all.is_empty();
    let others: Vec<String> = pool
        .0
        .iter()
        .filter(|(name, all)| strange(all) && **name != current)
        .map(|(name, _)| name.clone())
        .collect();
    drop(pool);
    let again: BTreeSet<&String> = others.iter().filter(|name| claimed.contains(*name)).collect();
    state.forget(&others);
    if let Err(refusal) = state.keep_again(&again) {
        eprintln!("bpfgate-helper: {}", refusal.why);
    }
    let count = state.instances.len();
    eprintln!("bpfgate-helper: {count} instances were taken back, {} descriptors were not", others.len());
}

/// One instance, and the links of it that the policy does not allow any more.
fn instance(
    state: &State,
    pool: &mut Pool,
    entry: InstanceRecord,
    same_network: bool,
) -> (Option<Instance>, Vec<Link>) {
    let InstanceRecord { id, object, digest, map_bytes, programs, maps, links } = entry;
    let policy = &state.policy;
    let current = state.inventory.objects.get(&object).and_then(|opened| opened.as_ref().ok());
    // What is loaded at boot follows its file.
    let replaced = policy.keep == Keep::Boot && current.is_some_and(|approved| approved.digest != digest);
    let mut stays = policy.keep.is_persistent() && policy.still_approves(&object, &digest) && !replaced;
    let programs: Vec<Program> = programs
        .into_iter()
        .filter(|(info, _)| policy.still_names(&object, &info.name, info.hook))
        .filter_map(|(info, number)| {
            let Kept { fd, .. } = pool.claim(&program_name(id, &info.name), Kind::Program, number)?;
            Some(Program { info, fd })
        })
        .collect();
    stays &= !programs.is_empty();
    let maps = maps
        .into_iter()
        .filter_map(|(name, number)| {
            let Kept { fd, frozen, .. } = pool.claim(&map_name(id, &name), Kind::Map, number)?;
            Some(Map { name, fd, frozen })
        })
        .collect();
    let (mut kept, mut revoked) = (Vec::new(), Vec::new());
    for LinkRecord { info, way, shared, number } in links {
        let Some(Kept { fd: link, .. }) = pool.claim(&link_name(info.id), Kind::Link, number) else {
            continue;
        };
        let allowed = policy
            .rules_for(&object, &info.program, info.hook, &info.target)
            .any(|rule| crate::attach::Way::of(&rule.hook) == way);
        let elsewhere = matches!(info.target, Target::Interface(_)) && !same_network;
        let link = Link { info, way, attached: Attached::from(link), shared };
        if stays && allowed && !elsewhere {
            kept.push(link);
        } else {
            let (number, program, target) = (link.info.id.0, &link.info.program, &link.info.target);
            eprintln!("bpfgate-helper: revoked: link {number}, program {program} on {target}");
            revoked.push(link);
        }
    }
    if !stays {
        eprintln!("bpfgate-helper: revoked: instance {} of object {object}", id.0);
        return (None, revoked);
    }
    (Some(Instance { object, digest, owner: None, programs, maps, map_bytes, links: kept }), revoked)
}
