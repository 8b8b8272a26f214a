//! bincode as bpfgate uses it: serde functions only, a limit, and no byte left over.
//!
//! Message types hold no recursion: bincode would follow it to the end of the stack.
#![forbid(unsafe_code)]

use serde::{Serialize, de::DeserializeOwned};
use std::fmt;

/// The largest message in bytes. A `SOCK_SEQPACKET` datagram may have about 208 KiB (`wmem_default`); what
/// is larger than this goes in a memfd.
pub const MAX_MESSAGE: usize = 128 * 1024;

/// The bytes are not one message of the expected type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CodecError(String);

impl fmt::Display for CodecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for CodecError {}

fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_little_endian().with_fixed_int_encoding().with_limit::<MAX_MESSAGE>()
}

/// Encodes one message.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, CodecError> {
    let bytes = bincode::serde::encode_to_vec(message, config()).map_err(|e| CodecError(e.to_string()))?;
    if bytes.len() > MAX_MESSAGE {
        return Err(CodecError(format!("a message of {} bytes is over the limit", bytes.len())));
    }
    Ok(bytes)
}

/// Decodes one message; every byte must belong to it.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let (message, used) =
        bincode::serde::decode_from_slice(bytes, config()).map_err(|e| CodecError(e.to_string()))?;
    if used == bytes.len() {
        Ok(message)
    } else {
        Err(CodecError(format!("{} bytes follow the message", bytes.len() - used)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::messages::{Bytes, helper::ToHelper, helper::Verb, loader::FromLoader};

    #[test]
    fn a_claimed_length_allocates_nothing() {
        // A vector that says it holds 2^62 elements, in a message of a few bytes.
        let mut bytes = (1u64 << 62).to_le_bytes().to_vec();
        bytes.extend([0; 3]);
        assert!(decode::<Vec<u64>>(&bytes).is_err());
        assert!(decode::<Vec<Vec<u8>>>(&bytes).is_err());
        assert!(decode::<String>(&bytes).is_err());
        assert!(decode::<Bytes>(&bytes).is_err());
    }

    #[test]
    fn trailing_and_missing_bytes_are_refused() {
        let message = ToHelper::Ask { session: crate::messages::SessionId(7), verb: Verb::List };
        let bytes = encode(&message).unwrap();
        assert!(decode::<ToHelper>(&bytes).is_ok());
        for cut in 0..bytes.len() {
            assert!(decode::<ToHelper>(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        let mut longer = bytes;
        longer.push(0);
        assert!(decode::<ToHelper>(&longer).is_err());
    }

    #[test]
    fn unknown_tags_wrong_booleans_and_bad_text_are_refused() {
        assert!(decode::<ToHelper>(&u32::MAX.to_le_bytes()).is_err());
        assert!(decode::<FromLoader>(&[9, 0, 0, 0, 9]).is_err());
        assert!(decode::<bool>(&[2]).is_err());
        assert!(decode::<Option<u8>>(&[7, 1]).is_err());
        let mut text = 2u64.to_le_bytes().to_vec();
        text.extend([0xc0, 0x80]); // overlong NUL
        assert!(decode::<String>(&text).is_err());
    }
}
