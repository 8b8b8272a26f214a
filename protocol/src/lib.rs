//! What may be said on each channel of bpfgate, how it is carried, and what is allowed.
//!
//! | module | holds |
//! |---|---|
//! | [`messages`] | the rows of the inner channels: broker - helper, helper - loader, broker - spawner |
//! | [`codec`] | bincode with a limit, exact length |
//! | [`channel`] | one message a datagram over `SOCK_SEQPACKET`, descriptors by `SCM_RIGHTS` |
//! | [`policy`] | a policy file, from bytes to types |
//! | [`authorize`] | the one check, run by broker (early) and helper (final) |
//! | [`inspect`] | what the helper checks in maps and instructions before it asks the kernel |
//! | [`description`] | what an object file holds, for people who write policies |
//! | [`btf`] | functions of the kernel, by name |
//! | [`hooks`] | one row per kind of program |
//! | [`demands`] | which capabilities the kernel demands for every type of program and map |
//! | [`identity`] | who a connected client is, as the kernel says |
//! | [`pidfd`] | the two questions to the kernel about a process that no library asks yet |
//! | [`table`] | fields by their names, and in no other way |
//! | [`audit`] | what audit records are known by |
#![deny(unsafe_code)]

pub mod audit;
pub mod authorize;
pub mod btf;
pub mod channel;
pub mod codec;
pub mod demands;
pub mod description;
pub mod functions;
pub mod hex;
pub mod hooks;
pub mod identity;
pub mod inspect;
pub mod messages;
pub mod names;
pub mod pidfd;
pub mod policy;
pub mod refusal;
pub mod table;

/// The Varlink interface that clients speak, word for word.
pub const INTERFACE: &str = include_str!("../io.bpfgate.varlink");

/// The interface for the administrator, on a socket of its own.
pub const ADMIN_INTERFACE: &str = include_str!("../io.bpfgate.Admin.varlink");

/// Where the administrator finds the broker.
pub const ADMIN_SOCKET: &str = "/run/bpfgate/io.bpfgate.Admin";

/// Where clients find the broker if nothing else is said.
pub const DEFAULT_SOCKET: &str = "/run/bpfgate/io.bpfgate";

/// The version of the inner channels; broker, helper and loader of different versions refuse each other.
pub const INNER_VERSION: u32 = 5;

#[cfg(test)]
mod tests {
    /// varlinkctl (systemd 257) refuses an interface in which a type and a method have one name.
    #[test]
    fn every_name_of_the_interface_is_declared_once() {
        let declared = |line: &str| {
            let (keyword, rest) = line.split_once(' ')?;
            let name = rest.split([' ', '(']).next()?;
            matches!(keyword, "type" | "method" | "error").then(|| name.to_owned())
        };
        let mut names: Vec<String> = super::INTERFACE.lines().filter_map(declared).collect();
        let count = names.len();
        assert!(count > 15, "{names:?}");
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
