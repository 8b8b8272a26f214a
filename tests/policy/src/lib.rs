//! What a policy means, said a second time and compared with what `protocol` makes of it.
//!
//! | module | holds |
//! |---|---|
//! | [`generate`] | valid policies from arbitrary bytes, as trees that single keys can be taken out of |
//! | [`naive`] | an evaluator written from policies/README.md alone: loops over the TOML of a file |
//! | [`requests`] | requests that are near misses, and all that the names of a file can be asked for |
//! | [`power`] | what a policy allows, as a set that can be compared with another policy's |
//! | [`targets`] | what the fuzzers run |
#![forbid(unsafe_code)]

pub mod generate;
pub mod naive;
pub mod power;
pub mod requests;
pub mod targets;

use bpfgate_protocol::policy::file::Accounts;
use bpfgate_protocol::policy::{Policy, PolicyError};

/// The accounts of the machine that random policies are for.
pub fn accounts() -> Accounts {
    let table =
        |entries: &[(&str, u32)]| entries.iter().map(|(name, id)| ((*name).to_owned(), *id)).collect();
    Accounts {
        users: table(&[("root", 0), ("daemon", 1), ("flowmon", 990), ("nobody", 65534)]),
        groups: table(&[("adm", 4), ("metrics", 991), ("nogroup", 65534)]),
    }
}

/// Parses the text of a policy on that machine.
pub fn parse(text: &str) -> Result<Policy, PolicyError> {
    Policy::parse("/etc/bpfgate/policies/x.toml", text, &accounts())
}

/// The same policy without the places where things stand in its file.
pub fn without_places(mut policy: Policy) -> Policy {
    policy.file.clear();
    policy.digest = [0; 32];
    policy.require.line = 0;
    for client in &mut policy.clients {
        client.line = 0;
    }
    for object in policy.objects.values_mut() {
        object.line = 0;
        object.programs.iter_mut().for_each(|rule| rule.line = 0);
        object.maps.values_mut().for_each(|(_, line)| *line = 0);
        object.globals.values_mut().for_each(|range| range.line = 0);
    }
    policy
}

/// So many bytes that are the same in every run, one for each seed. (xorshift64)
pub fn bytes(seed: u64, count: usize) -> Vec<u8> {
    let mut state = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let step = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..count).map(step).collect()
}
