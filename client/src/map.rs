//! What the descriptor of a map is good for without any capability.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::map_info::MapInfo;
use crate::sys::{BatchCursor, MapFd};

/// How many entries [`Map::entries`] asks for at once.
const BATCH: usize = 256;

/// `ENOTSUPP`, which the kernel returns for a map type without batches and libc does not define.
const ENOTSUPP: i32 = 524;

/// A map of the kernel, through a descriptor that this process received.
///
/// The owner of a read-write descriptor shares the map with every other holder; of a frozen map
/// only programs change the values.
#[derive(Debug)]
pub struct Map {
    map: MapFd,
    info: MapInfo,
}

/// A key and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The key.
    pub key: Vec<u8>,
    /// The value; for a per-CPU map the values of all possible CPUs in a row, each padded to 8 bytes.
    pub value: Vec<u8>,
}

/// What [`Map::update`] does with a key that is there, or is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum UpdateMode {
    /// Sets it either way.
    #[default]
    Any,
    /// Only adds.
    Add,
    /// Only replaces.
    Replace,
}

impl Map {
    /// Takes a descriptor and asks the kernel what it is.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let map = MapFd::new(fd).map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied => io::Error::new(
                error.kind(),
                "bpf(2) is refused to this process: it needs Linux 5.19 or later, or a seccomp filter is in the way",
            ),
            _ => error,
        })?;
        let info = MapInfo::from(map.info());
        Ok(Self { map, info })
    }

    /// What the kernel says it is.
    pub fn info(&self) -> &MapInfo {
        &self.info
    }

    /// The value of a key; `None` if the key is not there.
    ///
    /// For a per-CPU map the values of all possible CPUs in a row, each padded to 8 bytes.
    pub fn lookup(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let mut value = vec![0; self.map.value_bytes()];
        match self.map.lookup(key, &mut value) {
            Ok(()) => Ok(Some(value)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.context("looking up a key in", &error)),
        }
    }

    /// The values of a key in a per-CPU map, one per possible CPU in order.
    pub fn lookup_per_cpu(&self, key: &[u8]) -> io::Result<Option<Vec<Vec<u8>>>> {
        if !self.info.kind.is_per_cpu() {
            let error = io::Error::new(io::ErrorKind::InvalidInput, "it has one value for all CPUs");
            return Err(self.context("looking up values per CPU in", &error));
        }
        let values = self.lookup(key)?;
        Ok(values.map(|values| self.per_cpu(&values).map(<[u8]>::to_vec).collect()))
    }

    /// Splits what [`lookup`](Self::lookup) gives for a per-CPU map; all of it as one otherwise.
    pub fn per_cpu<'a>(&self, value: &'a [u8]) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let (size, stride) = if self.info.kind.is_per_cpu() {
            let size = self.info.value_size as usize;
            (size, size.next_multiple_of(8))
        } else {
            (value.len(), value.len())
        };
        value.chunks_exact(stride.max(1)).map(move |chunk| &chunk[..size])
    }

    /// Sets the value of a key. A per-CPU map takes what [`lookup`](Self::lookup) gives.
    pub fn update(&self, key: &[u8], value: &[u8], mode: UpdateMode) -> io::Result<()> {
        let flags = match mode {
            UpdateMode::Any => 0,
            UpdateMode::Add => 1,
            UpdateMode::Replace => 2,
        };
        self.map.update(key, value, flags).map_err(|error| self.context("updating", &error))
    }

    /// Removes a key; says whether it was there.
    pub fn delete(&self, key: &[u8]) -> io::Result<bool> {
        match self.map.delete(key) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(self.context("deleting a key of", &error)),
        }
    }

    /// The keys, in the kernel's order.
    ///
    /// Ends after `max_entries` keys at the latest: where others add and remove keys meanwhile, the
    /// kernel may start from the first again, and some keys are seen twice or not at all.
    pub fn keys(&self) -> Keys<'_> {
        Keys { map: self, last: None, left: self.info.max_entries }
    }

    /// Reads the map in batches of at most `room` entries; each is one system call.
    ///
    /// Errors:  `Unsupported` for map types without batches
    pub fn lookup_batch(&self, room: usize) -> Batches<'_> {
        Batches { map: self, cursor: self.map.batch_cursor(), room: room.max(1), ended: false }
    }

    /// Reads the whole map, in batches where its type has them.
    pub fn entries(&self) -> io::Result<Vec<Pair>> {
        let mut entries = Vec::new();
        for batch in self.lookup_batch(BATCH) {
            match batch {
                Ok(batch) => entries.extend(batch),
                Err(error) if error.kind() == io::ErrorKind::Unsupported => return self.walk(),
                Err(error) => return Err(error),
            }
        }
        Ok(entries)
    }

    /// Gives the descriptor back.
    pub fn into_fd(self) -> OwnedFd {
        self.map.into_fd()
    }

    pub(crate) fn raw(&self) -> &MapFd {
        &self.map
    }

    fn walk(&self) -> io::Result<Vec<Pair>> {
        let mut entries = Vec::new();
        for key in self.keys() {
            let key = key?;
            // Absent: removed between the two calls.
            if let Some(value) = self.lookup(&key)? {
                entries.push(Pair { key, value });
            }
        }
        Ok(entries)
    }

    /// Says which map and what was done; the kind stays that of `error`.
    pub(crate) fn context(&self, doing: &str, error: &io::Error) -> io::Error {
        let what = format!("{doing} the {} map {}: {error}", self.info.kind, self.info.name);
        io::Error::new(error.kind(), what)
    }
}

impl AsFd for Map {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.map.as_fd()
    }
}

impl TryFrom<OwnedFd> for Map {
    type Error = io::Error;

    fn try_from(fd: OwnedFd) -> io::Result<Self> {
        Self::new(fd)
    }
}

/// The keys of a map.
#[derive(Debug)]
pub struct Keys<'a> {
    map: &'a Map,
    last: Option<Vec<u8>>,
    left: u32,
}

impl Iterator for Keys<'_> {
    type Item = io::Result<Vec<u8>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let mut next = vec![0; self.map.map.key_bytes()];
        match self.map.map.next_key(self.last.as_deref(), &mut next) {
            Ok(()) => {
                self.last = Some(next.clone());
                Some(Ok(next))
            }
            Err(error) => {
                self.left = 0;
                let end = error.kind() == io::ErrorKind::NotFound;
                (!end).then(|| Err(self.map.context("walking the keys of", &error)))
            }
        }
    }
}

/// The entries of a map, some at a time.
#[derive(Debug)]
pub struct Batches<'a> {
    map: &'a Map,
    cursor: BatchCursor,
    room: usize,
    ended: bool,
}

impl Batches<'_> {
    fn read(&mut self) -> io::Result<Vec<Pair>> {
        let map = &self.map.map;
        let (key_bytes, value_bytes) = (map.key_bytes(), map.value_bytes());
        loop {
            let mut keys = vec![0; self.room.saturating_mul(key_bytes)];
            let mut values = vec![0; self.room.saturating_mul(value_bytes)];
            let (count, ended) = map.lookup_batch(&mut self.cursor, &mut keys, &mut values)?;
            match ended.as_ref().and_then(io::Error::raw_os_error) {
                None => {}
                Some(libc::ENOENT) => self.ended = true,
                // One bucket of a hash map holds more than there is room for.
                Some(libc::ENOSPC) if self.room < self.map.info.max_entries as usize => {
                    self.room = self.room.saturating_mul(2);
                    continue;
                }
                Some(ENOTSUPP | libc::EOPNOTSUPP) => return Err(io::ErrorKind::Unsupported.into()),
                // A kernel older than the batch commands; nothing else in the request can be wrong.
                Some(libc::EINVAL) if !self.cursor.started() => return Err(io::ErrorKind::Unsupported.into()),
                Some(errno) => return Err(io::Error::from_raw_os_error(errno)),
            }
            let pairs = keys.chunks_exact(key_bytes).zip(values.chunks_exact(value_bytes)).take(count);
            return Ok(pairs.map(|(key, value)| Pair { key: key.to_vec(), value: value.to_vec() }).collect());
        }
    }
}

impl Iterator for Batches<'_> {
    type Item = io::Result<Vec<Pair>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let batch = self.read();
        match &batch {
            Ok(batch) if batch.is_empty() && self.ended => return None,
            Ok(_) => {}
            Err(_) => self.ended = true,
        }
        Some(batch.map_err(|error| self.map.context("reading a batch of", &error)))
    }
}

#[cfg(test)]
#[path = "map_tests.rs"]
mod tests;
