//! Clients that are not connected: who a user of this machine would be to the broker.

use bpfgate_protocol::identity::Peer;
use bpfgate_protocol::names::UnitName;
use bpfgate_protocol::policy::Policy;
use bpfgate_protocol::policy::file::Accounts;
use bpfgate_protocol::policy::report::did_you_mean;
use std::collections::BTreeMap;

/// A number that no rule matches, for a service whose user is not known.
const NOBODY: u32 = u32::MAX;

/// As a sentence begins with it.
pub(super) fn describe(peer: &Peer) -> String {
    let mut parts = Vec::new();
    if peer.uid != NOBODY {
        parts.push(format!("uid {}, gid {}", peer.uid, peer.gid));
    }
    if !peer.groups.is_empty() {
        let groups: Vec<String> = peer.groups.iter().map(ToString::to_string).collect();
        parts.push(format!("groups {}", groups.join(" ")));
    }
    parts.extend(peer.unit.clone());
    parts.join(", ")
}

/// The users and groups of a machine, as far as they matter here.
#[derive(Debug, Default)]
pub(super) struct People {
    pub(super) accounts: Accounts,
    /// The group of a user, by uid.
    primary: BTreeMap<u32, u32>,
    /// The groups that list a user, by name.
    supplementary: BTreeMap<String, Vec<u32>>,
}

impl People {
    /// Those of this machine, by the files that policies are read with.
    pub(super) fn read() -> std::io::Result<Self> {
        let text = |path: &str| std::fs::read(path).map(|text| String::from_utf8_lossy(&text).into_owned());
        let of_machine = Self::of(&text("/etc/passwd")?, &text("/etc/group")?);
        Ok(Self { accounts: Accounts::read()?, ..of_machine })
    }

    fn of(passwd: &str, group: &str) -> Self {
        let mut people = Self::default();
        for fields in passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()) {
            if let [_, _, uid, gid, ..] = fields[..]
                && let (Ok(uid), Ok(gid)) = (uid.parse(), gid.parse())
            {
                people.primary.entry(uid).or_insert(gid);
            }
        }
        for fields in group.lines().map(|line| line.split(':').collect::<Vec<_>>()) {
            if let [_, _, gid, members, ..] = fields[..]
                && let Ok(gid) = gid.parse()
            {
                for member in members.split(',').filter(|member| !member.is_empty()) {
                    people.supplementary.entry(member.to_owned()).or_default().push(gid);
                }
            }
        }
        people
    }

    /// `USER` with the groups that it has here, or `USER:GROUP,...` with these and no others, names or numbers; or a
    /// service, of which nothing else is known. A service, by itself or as `unit` of a user, is in the slice where this
    /// policy looks for it.
    pub(super) fn peer(&self, text: &str, unit: Option<&str>, policy: &Policy) -> Result<Peer, String> {
        let (user, unit) = match unit {
            None if text.ends_with(".service") => (None, Some(text)),
            unit => (Some(text), unit),
        };
        let mut peer = match user {
            Some(user) => self.user(user)?,
            None => Peer { uid: NOBODY, gid: NOBODY, ..Peer::default() },
        };
        if let Some(unit) = unit {
            let name: UnitName = unit.parse().map_err(|error| format!("{error}"))?;
            peer.units = policy.units().filter(|unit| unit.name == name).cloned().collect();
            peer.unit = Some(name.to_string());
        }
        Ok(peer)
    }

    fn user(&self, text: &str) -> Result<Peer, String> {
        let (user, groups) = match text.split_once(':') {
            Some((user, groups)) => (user, Some(groups)),
            None => (text, None),
        };
        let uid = self.user_id(user)?;
        let mut groups = match groups {
            Some(groups) => groups
                .split(',')
                .map(|group| number("group", group, &self.accounts.groups))
                .collect::<Result<Vec<_>, _>>()?,
            None => self.groups_of(user, uid)?,
        };
        let gid = groups.remove(0);
        Ok(Peer { uid, gid, groups, ..Peer::default() })
    }

    /// The number of a user, by name or number.
    pub(super) fn user_id(&self, user: &str) -> Result<u32, String> {
        number("user", user, &self.accounts.users)
    }

    /// The groups of a login of this user; its own comes first.
    fn groups_of(&self, user: &str, uid: u32) -> Result<Vec<u32>, String> {
        let primary = self.primary.get(&uid).ok_or_else(|| {
            format!(
                "the groups of user {uid} are not known: write {uid}:GROUP, with all its groups after commas"
            )
        })?;
        let names = self.accounts.users.iter().filter(|(_, id)| **id == uid).map(|(name, _)| name.as_str());
        let names = if user.parse::<u32>().is_ok() { names.collect() } else { vec![user] };
        let supplementary = names.into_iter().filter_map(|name| self.supplementary.get(name)).flatten();
        let mut groups = vec![*primary];
        for gid in supplementary {
            if !groups.contains(gid) {
                groups.push(*gid);
            }
        }
        Ok(groups)
    }
}

fn number(what: &str, word: &str, table: &BTreeMap<String, u32>) -> Result<u32, String> {
    if let Some(id) = table.get(word).copied().or_else(|| word.parse().ok()) {
        return Ok(id);
    }
    let meant = did_you_mean(word, table.keys().map(String::as_str));
    let meant = meant.unwrap_or_else(|| format!("a number works for any {what}"));
    Err(format!(
        "there is no {what} {word:?} in /etc/{}; {meant}",
        if what == "user" { "passwd" } else { "group" }
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bpfgate_protocol::policy::Unit;

    fn people() -> People {
        let (users, groups) = ([("ann", 1000), ("bob", 1001)], [("ann", 1000), ("adm", 4), ("video", 44)]);
        let accounts = Accounts {
            users: users.map(|(name, id)| (name.to_owned(), id)).into(),
            groups: groups.map(|(name, id)| (name.to_owned(), id)).into(),
        };
        let passwd = "ann:x:1000:1000::/:/bin/sh\nbob:x:1001:44::/:/bin/sh\nodd line\n";
        let of = People::of(passwd, "ann:x:1000:\nadm:x:4:ann,bob\nvideo:x:44:bob\n");
        People { accounts, ..of }
    }

    fn ids(text: &str) -> Result<(u32, u32, Vec<u32>), String> {
        let policy = Policy::parse("p", "version = 1\n", &Accounts::default()).unwrap();
        people().peer(text, None, &policy).map(|peer| (peer.uid, peer.gid, peer.groups))
    }

    #[test]
    fn a_user_comes_with_its_groups() {
        assert_eq!(ids("ann"), Ok((1000, 1000, vec![4])));
        assert_eq!(ids("bob"), Ok((1001, 44, vec![4])));
        assert_eq!(ids("1000"), Ok((1000, 1000, vec![4])));
        assert_eq!(ids("ann:adm,44"), Ok((1000, 4, vec![44])));
        assert_eq!(ids("7:8"), Ok((7, 8, vec![])));
    }

    #[test]
    fn who_is_not_known_is_said() {
        assert!(ids("7").unwrap_err().contains("write 7:GROUP"));
        assert!(ids("anne").unwrap_err().contains("did you mean \"ann\"?"));
        assert!(ids("ann:nosuch").unwrap_err().contains("no group \"nosuch\""));
        assert!(ids("ann:").is_err() && ids("").is_err() && ids("-1").is_err());
        assert!(ids("@.service").is_err());
    }

    #[test]
    fn a_unit_is_who_the_policy_says_and_nobody_else() {
        let text = "version = 1\n[[client]]\nunit = \"a.service\"\nslice = \"web.slice\"\nmay = [\"load\"]\n";
        let policy = Policy::parse("p", text, &Accounts::default()).unwrap();
        let of = |name: &str| people().peer(name, None, &policy).unwrap();
        let known: Vec<&Unit> = policy.units().collect();
        assert_eq!(of("a.service").units.iter().collect::<Vec<_>>(), known);
        assert!(of("b.service").units.is_empty());
        assert!(!of("a.service").is_user(u32::MAX) && !of("a.service").is_in_group(u32::MAX));
        assert_eq!(describe(&of("a.service")), "a.service");
    }

    #[test]
    fn a_user_may_be_of_a_unit() {
        let text = "version = 1\n[[client]]\nuser = 1000\nunit = \"a.service\"\nmay = [\"load\"]\n";
        let policy = Policy::parse("p", text, &Accounts::default()).unwrap();
        let of = |user: &str, unit: &str| people().peer(user, Some(unit), &policy).unwrap();
        let judged =
            |peer: &Peer| bpfgate_protocol::authorize::authorize(&policy.clone().into(), peer).is_ok();
        assert!(judged(&of("ann", "a.service")));
        assert!(!judged(&of("bob", "a.service")) && !judged(&of("ann", "b.service")));
        assert_eq!(describe(&of("ann", "a.service")), "uid 1000, gid 1000, groups 4, a.service");
        assert!(people().peer("ann", Some("no unit"), &policy).is_err());
    }
}
