//! What has to be done so that the policy files are in force: decided here, from texts and states alone.

use bpfgate_protocol::names::AppName;
use bpfgate_systemd::units::{digest, granted};
use std::collections::{BTreeMap, BTreeSet};

/// How the helper of an app should be.
pub(super) struct Wanted {
    pub(super) drop_in: String,
    /// It runs whether or not there are clients.
    pub(super) boot: bool,
}

/// How the units of a helper are.
#[derive(Debug, Default, Clone)]
pub(super) struct Helper {
    pub(super) listens: bool,
    pub(super) runs: bool,
    /// What it says of itself. It names the digest of its policy.
    pub(super) status: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    New,
    /// There is no valid policy any more.
    Removed,
    Changed,
    /// The same grants in other words.
    Reworded,
    /// It runs with an older policy, although systemd has read the new one.
    Outdated,
    Same,
}

impl What {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Removed => "removed",
            Self::Changed => "changed",
            Self::Reworded => "reworded",
            Self::Outdated => "outdated",
            Self::Same => "unchanged",
        }
    }
}

/// What is to be done about one app.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) app: AppName,
    pub(super) what: What,
    pub(super) granted: Vec<String>,
    pub(super) revoked: Vec<String>,
    /// Its socket does not listen and should.
    pub(super) listen: bool,
    /// Its helper runs, with other settings of its unit.
    pub(super) restart: bool,
    /// Its helper runs, and takes the policy over in place, if it can.
    pub(super) adopt: bool,
    /// Its helper does not run and should.
    pub(super) start: bool,
}

impl Change {
    /// What becomes of the app, for people.
    pub(super) fn sentence(&self, dry_run: bool) -> String {
        let what = match self.what {
            What::New => "new",
            What::Removed => "no valid policy any more; its helper is stopped, what it attached is detached",
            What::Changed => "changed",
            What::Reworded => "the same rights in other words",
            What::Outdated => "unchanged, but its helper runs with an older policy",
            What::Same => "unchanged",
        };
        let then = if self.restart {
            "; its helper is restarted, what the policy still allows stays attached"
        } else if self.adopt {
            "; its helper goes on with it, or is restarted if it cannot"
        } else if self.start {
            "; its helper is started"
        } else if self.listen && self.what != What::New {
            "; its socket is opened"
        } else {
            ""
        };
        let anything = self.what != What::Same || !then.is_empty();
        let would = if dry_run && anything { " (not done: --dry-run)" } else { "" };
        format!("{what}{then}{would}")
    }
}

/// Every app that has a policy, had one, or still has a helper, by name.
pub(super) fn plan(
    wanted: &BTreeMap<AppName, Wanted>,
    in_force: &BTreeMap<AppName, String>,
    helpers: &BTreeMap<AppName, Helper>,
) -> Vec<Change> {
    let present = helpers.iter().filter(|(_, helper)| helper.listens || helper.runs).map(|(app, _)| app);
    let apps: BTreeSet<&AppName> = wanted.keys().chain(in_force.keys()).chain(present).collect();
    let one = |app: &AppName| {
        let old = in_force.get(app).map(String::as_str);
        change(app, wanted.get(app), old, &helpers.get(app).cloned().unwrap_or_default())
    };
    apps.into_iter().map(one).collect()
}

fn change(app: &AppName, wanted: Option<&Wanted>, old: Option<&str>, helper: &Helper) -> Change {
    let before = granted(old.unwrap_or_default());
    let after = granted(wanted.map_or("", |wanted| &wanted.drop_in));
    let only = |a: &BTreeSet<&str>, b: &BTreeSet<&str>| a.difference(b).map(ToString::to_string).collect();
    let what = match (wanted, old) {
        (None, _) => What::Removed,
        (Some(_), None) => What::New,
        (Some(_), Some(_)) if before != after => What::Changed,
        (Some(new), Some(old)) if new.drop_in != old => What::Reworded,
        (Some(new), Some(_)) if helper.is_outdated(&new.drop_in) => What::Outdated,
        _ => What::Same,
    };
    Change {
        app: app.clone(),
        what,
        granted: only(&after, &before),
        revoked: only(&before, &after),
        listen: wanted.is_some() && !helper.listens,
        restart: helper.runs
            && wanted.zip(old).is_some_and(|(new, old)| settings(&new.drop_in) != settings(old)),
        // A new policy can meet a helper of an older one, whose removal nobody has applied.
        adopt: wanted.is_some() && helper.runs && what != What::Same,
        start: wanted.is_some_and(|wanted| wanted.boot) && !helper.runs,
    }
}

/// What of a drop-in is for systemd.
fn settings(drop_in: &str) -> Vec<&str> {
    let ours = drop_in.split("[X-Bpfgate]").next().unwrap_or_default();
    ours.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).collect()
}

impl Helper {
    /// Whether it runs and says that it has another policy than this one. One that says nothing yet is starting: with the
    /// policy of now.
    pub(super) fn is_outdated(&self, drop_in: &str) -> bool {
        let digits = |c: char| !c.is_ascii_hexdigit();
        let named = self.status.split(digits).find(|word| word.len() == 64);
        self.runs && named.is_some_and(|named| digest(drop_in) != Some(named))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drop_in(digit: &str, grants: &[&str]) -> String {
        let grants = grants.iter().fold(String::new(), |all, grant| all + "Grant=" + grant + "\n");
        format!("[Service]\n[X-Bpfgate]\nDigest={}\n{grants}", digit.repeat(64))
    }

    fn app() -> AppName {
        "app".parse().unwrap()
    }

    /// The only change between two drop-ins.
    fn between(old: Option<&str>, new: Option<&str>, boot: bool, helper: &Helper) -> Change {
        let wanted = new.map(|new| (app(), Wanted { drop_in: new.to_owned(), boot }));
        let in_force = old.map(|old| (app(), old.to_owned()));
        let helpers = [(app(), helper.clone())].into();
        let mut changes = plan(&wanted.into_iter().collect(), &in_force.into_iter().collect(), &helpers);
        assert_eq!(changes.len(), 1);
        changes.remove(0)
    }

    fn running(digit: &str) -> Helper {
        let status = format!("policy {}, 2 sessions", digit.repeat(64));
        Helper { listens: true, runs: true, status }
    }

    fn idle() -> Helper {
        Helper { listens: true, ..Helper::default() }
    }

    #[test]
    fn only_what_changed_is_touched() {
        let old = drop_in("a", &["x", "y"]);
        let new = drop_in("b", &["y", "z"]);
        let change = between(Some(&old), Some(&new), false, &running("a"));
        assert_eq!(
            (change.what, change.adopt, change.restart, change.start, change.listen),
            (What::Changed, true, false, false, false)
        );
        assert_eq!((change.granted, change.revoked), (vec!["z".into()], vec!["x".into()]));
        let change = between(Some(&old), Some(&old), false, &running("a"));
        assert_eq!((change.what, change.adopt, change.restart), (What::Same, false, false));
        let change = between(Some(&old), Some(&new), false, &idle());
        assert_eq!(
            (change.what, change.adopt, change.restart, change.start),
            (What::Changed, false, false, false)
        );
    }

    #[test]
    fn a_helper_whose_unit_has_other_settings_is_restarted() {
        let old = drop_in("a", &["x"]);
        let new = drop_in("b", &["x"]).replace("[Service]\n", "[Service]\nMemoryMax=1\n");
        assert!(between(Some(&old), Some(&new), false, &running("a")).restart);
        assert!(!between(Some(&old), Some(&new), false, &idle()).restart);
        let comment = drop_in("b", &["x"]).replace("[Service]\n", "# Line 3, not 4.\n[Service]\n");
        assert!(!between(Some(&old), Some(&comment), false, &running("a")).restart);
    }

    #[test]
    fn other_words_are_taken_over_too_because_broker_and_helper_compare_digests() {
        let change = between(Some(&drop_in("a", &["x"])), Some(&drop_in("b", &["x"])), false, &running("a"));
        assert_eq!((change.what, change.adopt, change.restart), (What::Reworded, true, false));
        assert!(change.granted.is_empty() && change.revoked.is_empty());
    }

    /// Somebody else reloaded systemd after the file was changed: its drop-in is new, its helper is not.
    #[test]
    fn a_helper_of_an_older_policy_is_found_out() {
        let text = drop_in("b", &["x"]);
        let change = between(Some(&text), Some(&text), false, &running("a"));
        assert_eq!((change.what, change.adopt), (What::Outdated, true));
        let silent = Helper { status: "starting".into(), ..running("a") };
        assert_eq!(between(Some(&text), Some(&text), false, &silent).what, What::Same);
        // The same, for a policy that is gone: nothing is in force, but a helper runs.
        assert_eq!(between(None, None, false, &running("a")).what, What::Removed);
        // And for one that came back.
        let change = between(None, Some(&text), false, &running("a"));
        assert_eq!((change.what, change.adopt), (What::New, true));
    }

    #[test]
    fn helpers_of_the_boot_are_started_and_sockets_opened() {
        let text = drop_in("a", &["x"]);
        let change = between(None, Some(&text), true, &Helper::default());
        assert_eq!(
            (change.what, change.listen, change.start, change.restart),
            (What::New, true, true, false)
        );
        let change = between(Some(&text), Some(&text), true, &idle());
        assert_eq!((change.what, change.start), (What::Same, true));
        let change = between(Some(&text), Some(&text), false, &Helper::default());
        assert_eq!((change.what, change.start, change.listen), (What::Same, false, true));
    }

    #[test]
    fn what_has_no_policy_is_stopped_and_nothing_else() {
        let change = between(Some(&drop_in("a", &["x"])), None, false, &running("a"));
        assert_eq!((change.what, change.revoked), (What::Removed, vec!["x".to_owned()]));
        assert!(!change.listen && !change.restart && !change.start);
        assert!(plan(&BTreeMap::new(), &BTreeMap::new(), &[(app(), Helper::default())].into()).is_empty());
    }

    #[test]
    fn a_dry_run_says_so() {
        let change = between(None, Some(&drop_in("a", &[])), false, &Helper::default());
        assert_eq!(change.sentence(true), "new (not done: --dry-run)");
        assert_eq!(change.sentence(false), "new");
    }
}
