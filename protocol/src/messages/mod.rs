//! The messages of the inner channels, one file per channel, and one [`Row`] per message.
#![forbid(unsafe_code)]

pub mod helper;
pub mod loader;
pub mod spawner;

use crate::codec::MAX_MESSAGE;
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

/// One row of a channel's table: what documentation and tests are checked against.
#[derive(Debug, PartialEq, Eq)]
pub struct Row {
    /// The verb; the same word names the request, the broker's call and the helper's operation.
    pub name: &'static str,
    /// Who may send it.
    pub from: Process,
    /// Descriptors with the message, and what they are.
    pub fds_in: &'static str,
    /// Descriptors with its answer.
    pub fds_out: &'static str,
    /// One line.
    pub doc: &'static str,
}

/// The processes of bpfgate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Process {
    /// `bpfgate-broker`
    Broker,
    /// `bpfgate-helper APP`
    Helper,
    /// `bpfgate-loader`
    Loader,
}

/// A client's connection, as the broker numbers it on the channel of one helper. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SessionId(pub u64);

/// A loaded object, as its helper numbers it. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct InstanceId(pub u64);

/// An attachment, as its helper numbers it. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LinkId(pub u64);

/// Bytes that are encoded as one run, not element by element.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Bytes;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes")
            }
            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Bytes, E> {
                Ok(Bytes(bytes.to_vec()))
            }
            fn visit_byte_buf<E: de::Error>(self, bytes: Vec<u8>) -> Result<Bytes, E> {
                Ok(Bytes(bytes))
            }
        }
        deserializer.deserialize_byte_buf(Visitor)
    }
}

/// Bytes that may be larger than a datagram: inside of the message, or in a memfd that goes with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Bulk {
    /// Here.
    Inline(Bytes),
    /// In the descriptor of this message, from offset 0.
    Memfd {
        /// Length in bytes.
        len: u32,
    },
}

/// Up to here bytes travel inside of the message; the rest of it is small.
const INLINE: usize = MAX_MESSAGE * 3 / 4;

impl Bulk {
    /// Nothing.
    pub fn empty() -> Self {
        Self::Inline(Bytes::default())
    }

    /// Packs bytes, with the descriptor to send if they went to a memfd.
    pub fn pack(bytes: Vec<u8>) -> io::Result<(Self, Option<OwnedFd>)> {
        if bytes.len() <= INLINE {
            return Ok((Self::Inline(Bytes(bytes)), None));
        }
        let len = u32::try_from(bytes.len()).map_err(|_| io::Error::other("over 4 GiB"))?;
        let file = File::from(memfd_create("bpfgate", MFdFlags::MFD_CLOEXEC)?);
        // pwrite, which the filters keep away from standard error, where the records of others are.
        file.write_all_at(&bytes, 0)?;
        Ok((Self::Memfd { len }, Some(file.into())))
    }

    /// Descriptors that go with it.
    pub fn fds(&self) -> usize {
        usize::from(matches!(self, Self::Memfd { .. }))
    }

    /// Length in bytes, as the sender says.
    pub fn len(&self) -> usize {
        match self {
            Self::Inline(bytes) => bytes.0.len(),
            Self::Memfd { len } => *len as usize,
        }
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies the bytes out, at most `max` of them. Whatever the sender does to its memfd afterwards, the copy
    /// is what is checked and used; a memfd that is shorter than said is an error, never a fault: it is read,
    /// not mapped.
    pub fn unpack(self, fd: Option<OwnedFd>, max: usize) -> io::Result<Vec<u8>> {
        if self.len() > max {
            return Err(io::Error::other(format!("{} bytes are more than the {max} allowed", self.len())));
        }
        match (self, fd) {
            (Self::Inline(bytes), None) => Ok(bytes.0),
            (Self::Memfd { len }, Some(fd)) => {
                let mut bytes = vec![0; len as usize];
                File::from(fd).read_exact_at(&mut bytes, 0)?;
                Ok(bytes)
            }
            _ => Err(io::Error::other("the descriptor does not go with the message")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rows_of_each_channel_are_documented_once() {
        for rows in [&helper::ROWS[..], &loader::ROWS[..], &spawner::ROWS[..]] {
            let mut names: Vec<_> = rows.iter().map(|r| (r.name, r.from as u8)).collect();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), rows.len());
            for row in rows {
                assert!(row.doc.ends_with('.') && row.doc.len() > 20, "{row:?}");
                assert!(!row.doc.contains('\n'), "{row:?}");
            }
        }
    }

    #[test]
    fn bulk_goes_inline_or_by_memfd_and_comes_back_whole() {
        for len in [0, 1, INLINE, INLINE + 1, 3_000_000] {
            let bytes: Vec<u8> = (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect();
            let (bulk, fd) = Bulk::pack(bytes.clone()).unwrap();
            assert_eq!(bulk.fds(), usize::from(fd.is_some()));
            assert_eq!(fd.is_some(), len > INLINE);
            assert_eq!(bulk.unpack(fd, 3_000_000).unwrap(), bytes);
        }
    }

    #[test]
    fn bulk_that_lies_is_refused() {
        let (bulk, fd) = Bulk::pack(vec![1; INLINE + 1]).unwrap();
        assert!(bulk.clone().unpack(None, 1 << 20).is_err());
        assert!(bulk.unpack(fd, INLINE).is_err());
        let short = memfd_create("short", MFdFlags::MFD_CLOEXEC).unwrap();
        assert!(Bulk::Memfd { len: 10 }.unpack(Some(short), 100).is_err());
        let other = memfd_create("extra", MFdFlags::MFD_CLOEXEC).unwrap();
        assert!(Bulk::Inline(Bytes(vec![])).unpack(Some(other), 100).is_err());
    }
}
