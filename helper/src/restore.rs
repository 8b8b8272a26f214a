//! The way back: from descriptors that the service manager kept to instances, as far as the policy of now allows them.
//!
//! Before the lock-down [`sort`] looks what each descriptor is; inside of it [`restore`] reads the record and puts
//! together what belongs together. What is missing is missing, what nobody knows is closed, what is no longer allowed
//! is detached; each is said.

use crate::attach::{self, Attached, Way};
use crate::maps::Map;
use crate::state::{Instance, Link, Program, State};
use crate::store::{
    InstanceRecord, LinkRecord, RECORD, Record, Versioned, link_name, map_name, program_name,
};
use bpfgate_bpf::Description;
use bpfgate_lockdown::Fatal;
use bpfgate_protocol::codec::{self, MAX_MESSAGE};
use bpfgate_protocol::messages::helper::Target;
use bpfgate_protocol::names::ProgramName;
use bpfgate_protocol::policy::Keep;
use bpfgate_protocol::policy::object::SEALS;
use bpfgate_protocol::refusal::printable;
use bpfgate_systemd::manager::Named;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::uio::pread;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Numbers count up from 1; who has come this far has not counted.
const MAX_NUMBER: u64 = 1 << 48;

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
    let Versioned::V1(record) = codec::decode(&bytes[..len]).map_err(|e| e.to_string())?;
    let numbers = record.instances.iter().map(|instance| instance.id.0);
    let links = record.instances.iter().flat_map(|instance| &instance.links).map(|link| link.info.id.0);
    let sane =
        numbers.chain([record.last_instance]).all(|number| number <= record.last_instance.min(MAX_NUMBER))
            && links.chain([record.last_link]).all(|number| number <= record.last_link.min(MAX_NUMBER));
    if sane { Ok(record) } else { Err("its numbers make no sense".into()) }
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
    let mut revoked = Vec::new();
    if let Some((generation, record)) = pool.record() {
        state.store.generation = generation;
        (state.last_instance, state.last_link) = (record.last_instance, record.last_link);
        let same_network = record.network == state.inventory.network_id;
        for entry in record.instances {
            let id = entry.id;
            let (instance, links) = instance(state, &mut pool, entry, same_network);
            revoked.extend(links);
            if let Some(instance) = instance {
                state.instances.insert(id, instance);
            }
        }
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

/// One instance, and the links of it that may not stay.
fn instance(
    state: &State,
    pool: &mut Pool,
    entry: InstanceRecord,
    same_network: bool,
) -> (Option<Instance>, Vec<Link>) {
    let InstanceRecord { id, object, digest, map_bytes, functions, globals, programs, maps, links } = entry;
    let policy = &state.policy;
    let numbers: BTreeMap<ProgramName, u32> =
        programs.iter().map(|(info, number)| (info.name.clone(), *number)).collect();
    let map_count = maps.len();
    let programs: Vec<Program> = programs
        .into_iter()
        .filter(|(info, _)| policy.still_names(&object, &info.name, info.hook))
        .filter_map(|(info, number)| {
            let is = |got: &Description| got.id == number && got.kind == info.hook.row().prog_type;
            let Kept { fd, .. } = pool.claim(&program_name(id, &info.name), Kind::Program, is)?;
            Some(Program { info, fd })
        })
        .collect();
    let maps: Vec<Map> = maps
        .into_iter()
        .filter_map(|(name, number)| {
            let Kept { fd, frozen, .. } =
                pool.claim(&map_name(id, &name), Kind::Map, |got| got.id == number)?;
            Some(Map { name, fd, frozen })
        })
        .collect();
    let budget = state.budget();
    let fits = programs.len() <= budget.programs as usize
        && maps.len() <= budget.maps as usize
        && map_bytes <= budget.map_bytes;
    let mut stays = policy.keep.is_persistent()
        && !programs.is_empty()
        && fits
        && policy.still_approves(&object, &digest, &functions, &globals);
    if policy.keep == Keep::Boot {
        // What is loaded at boot follows its file and its policy: less than all of it is loaded anew.
        let current = state.inventory.objects.get(&object).and_then(|opened| opened.as_ref().ok());
        stays &= current.is_some_and(|approved| approved.digest == digest)
            && policy.objects.get(&object).is_some_and(|rules| {
                rules
                    .programs
                    .iter()
                    .all(|rule| programs.iter().any(|program| program.info.name == rule.program))
            })
            && maps.len() == map_count;
    }
    let room = (policy.limits.links as usize).saturating_sub(state.links());
    let (mut kept, mut revoked) = (Vec::new(), Vec::new());
    for LinkRecord { info, way, shared, number } in links {
        let runs = numbers.get(&info.program).copied();
        let is = |got: &Description| {
            got.id == number && Some(got.program) == runs && got.kind == attach::link_type(info.hook)
        };
        let Some(Kept { fd, .. }) = pool.claim(&link_name(info.id), Kind::Link, is) else { continue };
        let allowed = policy
            .rules_for(&object, &info.program, info.hook, &info.target)
            .any(|rule| Way::of(&rule.hook) == way && (rule.link_fd || !shared));
        let there = same_network || !matches!(info.target, Target::Interface(_));
        let there = there && is_where_it_was(state, &info.target, fd.as_fd());
        let link = Link { info, way, attached: Attached::from(fd), shared };
        if stays && allowed && there && kept.len() < room {
            kept.push(link);
        } else {
            let (number, program, target) = (link.info.id.0, &link.info.program, &link.info.target);
            let why = if there { "revoked" } else { "not there any more" };
            eprintln!("bpfgate-helper: {why}: link {number}, program {program} on {target}");
            revoked.push(link);
        }
    }
    if !stays {
        eprintln!("bpfgate-helper: revoked: instance {} of object {object}", id.0);
        return (None, revoked);
    }
    let owner = None;
    let links = kept;
    (Some(Instance { object, digest, owner, programs, maps, map_bytes, links, functions, globals }), revoked)
}

/// Whether a link is attached, and to the interface that has the name of its target now.
fn is_where_it_was(state: &State, target: &Target, link: BorrowedFd<'_>) -> bool {
    let Ok(got) = bpfgate_bpf::describe(link) else { return false };
    let index = |name| bpfgate_bpf::interface_index(state.inventory.network.as_fd(), name);
    got.attached
        && match target {
            Target::Interface(name) => index(name) == Ok(got.interface),
            _ => true,
        }
}
