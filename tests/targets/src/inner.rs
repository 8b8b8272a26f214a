//! Messages of the inner channels: what a process that was taken over may send to the next.

use bpfgate_protocol::channel::Message;
use bpfgate_protocol::codec;
use bpfgate_protocol::messages::helper::{FromHelper, ToHelper};
use bpfgate_protocol::messages::loader::{FromLeash, FromLoader, ToLeash, ToLoader};
use bpfgate_protocol::messages::spawner::{FromSpawner, ToSpawner};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::Debug;

/// The first byte says which channel; the rest is a message or an error. A message has one encoding, which is what came,
/// and is none with a byte more or less.
pub fn inner(data: &[u8]) -> bool {
    let Some((which, bytes)) = data.split_first() else { return false };
    CHANNELS[usize::from(*which) % CHANNELS.len()](bytes)
}

const CHANNELS: [fn(&[u8]) -> bool; 8] = [
    comes_back::<ToHelper>,
    comes_back::<FromHelper>,
    comes_back::<ToLoader>,
    comes_back::<FromLoader>,
    comes_back::<ToLeash>,
    comes_back::<FromLeash>,
    comes_back::<ToSpawner>,
    comes_back::<FromSpawner>,
];

fn comes_back<T: Message + Serialize + DeserializeOwned + Debug>(bytes: &[u8]) -> bool {
    let Ok(message) = codec::decode::<T>(bytes) else { return false };
    assert_eq!(codec::encode(&message).expect("it came in a message"), bytes, "{message:?}");
    // How many is compared with what came; a count that wraps would be less.
    assert!(message.fds() <= bytes.len(), "{message:?}");
    assert!(codec::decode::<T>(&bytes[..bytes.len() - 1]).is_err(), "a part of {message:?} is a message");
    assert!(codec::decode::<T>(&[bytes, &[0]].concat()).is_err(), "more than {message:?} is a message");
    true
}
