//! What may stay of an instance when the policy is another one than it was made under. One judgement for what comes back
//! from the service manager and for what is there when a policy is adopted.

use crate::state::{Instance, Link, State};
use bpfgate_helper::way::Way;
use bpfgate_protocol::messages::InstanceId;
use bpfgate_protocol::messages::helper::Target;
use bpfgate_protocol::names::ProgramName;
use bpfgate_protocol::policy::{Keep, Right};
use std::os::fd::{AsFd, BorrowedFd};

/// Where an instance is judged.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Origin {
    /// It was here all the time.
    Here,
    /// It comes back: with all of its maps, into the network namespace that it was made in?
    Kept { complete: bool, same_network: bool },
}

/// What is left of an instance, and the links that may not stay, for [`State::release`]. `revoked` is told what goes.
pub(crate) fn judge(
    state: &State,
    id: InstanceId,
    mut instance: Instance,
    origin: Origin,
    revoked: &mut Vec<String>,
) -> (Option<Instance>, Vec<Link>) {
    let policy = &state.policy;
    let object = instance.object.clone();
    instance.programs.retain(|program| {
        let named =
            policy.still_names(&object, &program.info.name, program.info.hook, program.function.as_ref());
        if !named {
            revoked.push(format!("program {} of instance {}", program.info.name, id.0));
        }
        named
    });
    // A session's own: it has to be there, and still have the right to make it.
    let session = instance.owner.map(|owner| state.sessions.get(&owner));
    let may = |right| session.is_none_or(|session| session.is_some_and(|s| s.permit.right(right).is_ok()));
    let budget = state.budget();
    let fits = instance.programs.len() <= budget.programs as usize
        && instance.maps.len() <= budget.maps as usize
        && instance.map_bytes <= budget.map_bytes;
    let mut stays = (policy.keep.is_persistent() || instance.owner.is_some())
        && !instance.programs.is_empty()
        && fits
        && may(Right::Load)
        && policy.still_approves(&object, &instance.digest, &instance.functions, &instance.globals);
    if policy.keep == Keep::Boot {
        // What is loaded at boot follows its file and its policy: less than all of it is loaded anew.
        let current = state.inventory.objects.get(&object).and_then(|opened| opened.as_ref().ok());
        let there = |name: &ProgramName| instance.programs.iter().any(|program| program.info.name == *name);
        stays &= current.is_some_and(|approved| approved.digest == instance.digest)
            && policy
                .objects
                .get(&object)
                .is_some_and(|rules| rules.programs.iter().all(|rule| there(&rule.program)))
            && !matches!(origin, Origin::Kept { complete: false, .. });
    }
    let room = (policy.limits.links as usize).saturating_sub(state.links());
    let (mut kept, mut gone) = (Vec::new(), Vec::new());
    for link in std::mem::take(&mut instance.links) {
        let info = &link.info;
        let allowed = may(Right::Attach)
            && policy
                .rules_for(&object, &info.program, info.hook, &info.target)
                .any(|rule| Way::of(&rule.hook) == link.way && (rule.link_fd || !link.shared));
        let there = match origin {
            Origin::Here => true,
            Origin::Kept { same_network, .. } => {
                (same_network || !matches!(info.target, Target::Interface(_)))
                    && is_where_it_was(state, &info.target, link.fd().as_fd())
            }
        };
        if stays && allowed && there && kept.len() < room {
            kept.push(link);
        } else {
            let (number, program, target) = (info.id.0, &info.program, &info.target);
            let why = if there { "" } else { ", which is not there any more" };
            revoked.push(format!("link {number}, program {program} on {target}{why}"));
            gone.push(link);
        }
    }
    if !stays {
        revoked.push(format!("instance {} of object {object}", id.0));
        return (None, gone);
    }
    instance.links = kept;
    (Some(instance), gone)
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
