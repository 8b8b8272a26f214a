//! Which of two grants allows more.

use super::{Grant, Place};
use bpfgate_protocol::names::MapName;
use bpfgate_protocol::policy::{Right, Sandboxing, UnitCheck, XdpMode};
use std::collections::BTreeSet;

impl Grant {
    /// Whether whoever has this one has `other` too.
    pub fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (
                Self::Client { user, group, unit, may, maps, proxy },
                Self::Client {
                    user: user_of,
                    group: group_of,
                    unit: unit_of,
                    may: may_of,
                    maps: maps_of,
                    proxy: proxy_of,
                },
            ) => {
                // A condition less is for more clients.
                (user.is_none() || user == user_of)
                    && (group.is_none() || group == group_of)
                    && (unit.is_none() || unit == unit_of)
                    && may.is_superset(may_of)
                    && (!may_of.contains(&Right::Maps) || {
                        let gives = |map: &MapName| maps_of.as_ref().is_none_or(|maps| maps.contains(map));
                        let all = match (maps, maps_of) {
                            (None, _) => true,
                            (Some(_), None) => false,
                            (Some(maps), Some(maps_of)) => maps.is_superset(maps_of),
                        };
                        all && proxy.iter().all(|map| proxy_of.contains(map) || !gives(map))
                    })
            }
            (
                Self::Object { name, path, sha256 },
                Self::Object { name: name_of, path: path_of, sha256: sha256_of },
            ) => {
                // With a digest it does not matter where the bytes are.
                name == name_of
                    && match sha256 {
                        Some(_) => sha256 == sha256_of,
                        None => path == path_of,
                    }
            }
            (
                Self::Place { object, program, place, link_fd },
                Self::Place { object: object_of, program: program_of, place: place_of, link_fd: link_fd_of },
            ) => {
                (object, program) == (object_of, program_of)
                    && (*link_fd || !link_fd_of)
                    && place.covers(place_of)
            }
            (
                Self::Map { object, map, access },
                Self::Map { object: object_of, map: map_of, access: access_of },
            ) => (object, map) == (object_of, map_of) && access >= access_of,
            (
                Self::Global { object, global, min, max },
                Self::Global { object: object_of, global: global_of, min: min_of, max: max_of },
            ) => (object, global) == (object_of, global_of) && min <= min_of && max >= max_of,
            (Self::Limit { what, bound }, Self::Limit { what: what_of, bound: bound_of }) => {
                what == what_of && bound >= bound_of
            }
            (Self::Keep(keep), Self::Keep(keep_of)) => *keep as u8 >= *keep_of as u8,
            // Who demands less allows more.
            (Self::Sandbox(Sandboxing::Seccomp), Self::Sandbox(_))
            | (Self::UnitCheck(UnitCheck::Broker), Self::UnitCheck(_))
            | (Self::Btf(false), Self::Btf(_)) => true,
            // None is less than any.
            (Self::Kernel(kernel), Self::Kernel(kernel_of)) => kernel <= kernel_of,
            (Self::Landlock(abi), Self::Landlock(abi_of)) => abi <= abi_of,
            _ => self == other,
        }
    }

    /// Whether it allows nothing by itself: it says how far the others reach.
    pub fn is_bound(&self) -> bool {
        matches!(
            self,
            Self::Limit { .. }
                | Self::Keep(_)
                | Self::Netns(_)
                | Self::UnitCheck(_)
                | Self::Kernel(_)
                | Self::Landlock(_)
                | Self::Btf(_)
                | Self::Sandbox(_)
        )
    }

    /// What several grants together can allow piece by piece, in pieces.
    pub fn pieces(&self) -> Vec<Self> {
        let Self::Client { user, group, unit, may, maps, proxy } = self else { return vec![self.clone()] };
        let piece = |right: Right, maps: Option<BTreeSet<MapName>>, proxy: BTreeSet<MapName>| Self::Client {
            user: *user,
            group: *group,
            unit: unit.clone(),
            may: BTreeSet::from([right]),
            maps,
            proxy,
        };
        let mut pieces = Vec::new();
        for right in may {
            match maps {
                Some(maps) if *right == Right::Maps => {
                    pieces.extend(maps.iter().map(|map| {
                        let one = BTreeSet::from([map.clone()]);
                        piece(*right, Some(one.clone()), &one & proxy)
                    }));
                }
                None if *right == Right::Maps => pieces.push(piece(*right, None, proxy.clone())),
                _ => pieces.push(piece(*right, None, BTreeSet::new())),
            }
        }
        pieces
    }

    /// Whether both are about the one thing of their kind that a policy has: a new one takes the place of the old one.
    pub fn replaces(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Object { name, .. }, Self::Object { name: name_of, .. }) => name == name_of,
            (Self::Map { object, map, .. }, Self::Map { object: object_of, map: map_of, .. }) => {
                (object, map) == (object_of, map_of)
            }
            (
                Self::Global { object, global, .. },
                Self::Global { object: object_of, global: global_of, .. },
            ) => (object, global) == (object_of, global_of),
            (Self::Limit { what, .. }, Self::Limit { what: what_of, .. }) => what == what_of,
            (Self::Keep(_), Self::Keep(_))
            | (Self::Netns(_), Self::Netns(_))
            | (Self::UnitCheck(_), Self::UnitCheck(_))
            | (Self::Kernel(_), Self::Kernel(_))
            | (Self::Landlock(_), Self::Landlock(_))
            | (Self::Btf(_), Self::Btf(_))
            | (Self::Sandbox(_), Self::Sandbox(_)) => true,
            _ => false,
        }
    }
}

impl Place {
    fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Xdp(pattern, mode), Self::Xdp(pattern_of, mode_of)) => {
                pattern.covers(pattern_of) && (*mode == XdpMode::Any || mode == mode_of)
            }
            (Self::Tcx(pattern, direction, order), Self::Tcx(pattern_of, direction_of, order_of)) => {
                pattern.covers(pattern_of) && (direction, order) == (direction_of, order_of)
            }
            _ => self == other,
        }
    }
}
