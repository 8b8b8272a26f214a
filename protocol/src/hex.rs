//! Bytes as text: lower-case hexadecimal, in memory order. Digests, and the keys and values of the interface.
#![forbid(unsafe_code)]

use std::fmt::Write;

/// Writes bytes as two lower-case digits each.
pub fn encode(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Reads what [`encode`] wrote, in either case; `None` for anything else.
pub fn decode(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|value| u8::try_from(value).ok());
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if !rest.is_empty() {
        return None;
    }
    pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(decode(&encode(&bytes)).unwrap(), bytes);
        assert_eq!(decode("FFa0"), Some(vec![255, 160]));
        assert_eq!(decode(""), Some(vec![]));
    }

    #[test]
    fn anything_else_is_refused() {
        for text in ["0", "0x", "+1", "zz", "0 ", "é"] {
            assert_eq!(decode(text), None, "{text}");
        }
    }
}
