//! Programs that count: a policy for one, its counters, and that they count while it is attached and not otherwise.

use crate::{SOON, wait_until};
use bpfgate_client::{Client, InstanceId, Map, Target};

/// A policy for one object with all of its maps read-write.
pub fn policy(object: &str, maps: &str, hooks: &str) -> String {
    format!(
        "{{client}}\n[objects.o]\n{{object:{object}}}\n{hooks}\n[objects.o.maps]\n{maps} = \"read-write\"\n"
    )
}

/// Element `key` of an array of u64.
pub fn count(map: &Map, key: u8) -> u64 {
    u64::from_ne_bytes(map.lookup(&[key, 0, 0, 0]).unwrap().unwrap().try_into().unwrap())
}

/// Asserts that `cause` makes element `key` grow while the program is attached, and not any more afterwards.
pub fn counts_while_attached(
    client: &mut Client,
    attach: (u64, &str, Option<&Target>),
    map: (&Map, u8),
    mut cause: impl FnMut(),
) {
    let (instance, program, target) = attach;
    let mut grows = || {
        let start = count(map.0, map.1);
        cause();
        count(map.0, map.1) > start
    };
    assert!(!grows(), "{program} counts before it is attached");
    let link = client.attach(InstanceId(instance), program, target, None).unwrap();
    assert!(wait_until(SOON, &mut grows), "{program} does not count");
    client.detach(link.id).unwrap();
    // Detaching from a tracing event lets calls that are under way come to their end.
    assert!(wait_until(SOON, || !grows()), "{program} counts after it was detached");
}
