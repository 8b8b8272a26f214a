//! Keys and values as people write them.

use bpfgate_client::hex;
use clap::ValueEnum;
use serde_json::{Value, json};

/// How keys and values are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Bytes in memory order
    Hex,
    /// Numbers of 4 bytes
    U32,
    /// Numbers of 8 bytes
    U64,
}

impl Format {
    /// The format in which `size` bytes can be written: numbers only where they come out even.
    fn for_size(self, size: usize) -> Self {
        match self {
            Self::U64 if size > 0 && size.is_multiple_of(8) => Self::U64,
            Self::U64 | Self::U32 if size > 0 && size.is_multiple_of(4) => Self::U32,
            _ => Self::Hex,
        }
    }

    /// The numbers in `bytes`; `None` if they are written in hexadecimal.
    fn numbers(self, bytes: &[u8]) -> Option<Vec<u64>> {
        match self.for_size(bytes.len()) {
            Self::Hex => None,
            Self::U32 => {
                let (words, _) = bytes.as_chunks();
                Some(words.iter().map(|word| u64::from(u32::from_ne_bytes(*word))).collect())
            }
            Self::U64 => Some(words(bytes)),
        }
    }

    pub(crate) fn text(self, bytes: &[u8]) -> String {
        match self.numbers(bytes) {
            Some(numbers) => join(&numbers),
            None => hex::encode(bytes),
        }
    }

    pub(crate) fn json(self, bytes: &[u8]) -> Value {
        match self.numbers(bytes) {
            Some(numbers) => numbers_json(&numbers),
            None => hex::encode(bytes).into(),
        }
    }

    /// Reads what [`text`](Self::text) writes for `size` bytes.
    pub(crate) fn parse(self, text: &str, size: usize) -> Result<Vec<u8>, String> {
        let format = self.for_size(size);
        let bytes: Vec<u8> = match format {
            Self::Hex => hex::decode(text.strip_prefix("0x").unwrap_or(text))
                .ok_or_else(|| format!("{text:?} is not hexadecimal"))?,
            Self::U32 | Self::U64 => {
                let mut bytes = Vec::with_capacity(size);
                for word in text.split(',') {
                    let bad = |error| format!("{word:?}: {error}");
                    if format == Self::U32 {
                        bytes.extend(word.parse::<u32>().map_err(bad)?.to_ne_bytes());
                    } else {
                        bytes.extend(word.parse::<u64>().map_err(bad)?.to_ne_bytes());
                    }
                }
                bytes
            }
        };
        if bytes.len() == size {
            return Ok(bytes);
        }
        Err(format!("{text:?} has {} bytes, the map needs {size}", bytes.len()))
    }
}

pub(crate) fn join(numbers: &[u64]) -> String {
    numbers.iter().map(u64::to_string).collect::<Vec<_>>().join(",")
}

pub(crate) fn numbers_json(numbers: &[u64]) -> Value {
    match numbers {
        [number] => json!(number),
        numbers => json!(numbers),
    }
}

/// The whole 8-byte words of `bytes`.
pub(crate) fn words(bytes: &[u8]) -> Vec<u64> {
    let (words, _) = bytes.as_chunks();
    words.iter().map(|word| u64::from_ne_bytes(*word)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        let bytes: Vec<u8> = (1..=16).collect();
        for format in [Format::Hex, Format::U32, Format::U64] {
            for size in [0, 1, 4, 6, 8, 12, 16] {
                let text = format.text(&bytes[..size]);
                assert_eq!(format.parse(&text, size).unwrap(), bytes[..size], "{format:?} {size}");
            }
        }
    }

    #[test]
    fn widths() {
        assert_eq!(Format::U64.text(&7u64.to_ne_bytes()), "7");
        assert_eq!(Format::U64.text(&7u32.to_ne_bytes()), "7");
        assert_eq!(Format::U32.text(&[1, 2]), "0102");
        assert_eq!(Format::U64.json(&7u64.to_ne_bytes()), json!(7));
        assert_eq!(Format::U32.json(&[7u32.to_ne_bytes(), 8u32.to_ne_bytes()].concat()), json!([7, 8]));
        assert_eq!(Format::Hex.json(&[255]), json!("ff"));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        for (format, text, size) in [
            (Format::Hex, "0102", 4),
            (Format::Hex, "zz", 1),
            (Format::U32, "4294967296", 4),
            (Format::U32, "1,2", 4),
            (Format::U64, "", 8),
            (Format::U64, "-1", 8),
        ] {
            assert!(format.parse(text, size).is_err(), "{text}");
        }
    }
}
