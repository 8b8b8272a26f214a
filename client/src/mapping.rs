//! Array maps as memory: reading a value costs no system call.
#![forbid(unsafe_code)]

use std::io;
use std::ops::Deref;
use std::sync::atomic::Ordering;

use crate::map::Map;
use crate::map_info::MapType;
use crate::sys::{Protection, Region};

/// `BPF_F_MMAPABLE`
const MMAPABLE: u32 = 1 << 10;

/// An array map made with `BPF_F_MMAPABLE`, mapped for reading.
///
/// Programs and other holders of the map write at any time; each 8 bytes that are read are whole,
/// a value of more than 8 bytes need not be.
#[derive(Debug)]
#[must_use]
pub struct MappedArray {
    region: Region,
    value_size: usize,
    stride: usize,
    entries: usize,
}

/// The same, mapped for writing too.
#[derive(Debug)]
#[must_use]
pub struct MappedArrayMut(MappedArray);

impl MappedArray {
    /// Maps the array; works for frozen maps too.
    pub fn new(map: &Map) -> io::Result<Self> {
        Self::with(map, Protection::Read)
    }

    fn with(map: &Map, protection: Protection) -> io::Result<Self> {
        let info = map.info();
        if info.kind != MapType::ARRAY || info.flags & MMAPABLE == 0 {
            let error =
                io::Error::new(io::ErrorKind::Unsupported, "only arrays with BPF_F_MMAPABLE allow it");
            return Err(map.context("mapping", &error));
        }
        let value_size = info.value_size as usize;
        let stride = value_size.next_multiple_of(8);
        let entries = info.max_entries as usize;
        let region = Region::new(map.raw(), 0, stride.saturating_mul(entries), protection)
            .map_err(|error| map.context("mapping", &error))?;
        Ok(Self { region, value_size, stride, entries })
    }

    /// How many values there are.
    pub fn len(&self) -> usize {
        self.entries
    }

    /// Never: the kernel makes no empty array.
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Copies a value out; `None` beyond the end.
    pub fn value(&self, index: usize) -> Option<Vec<u8>> {
        let mut value = vec![0; self.value_size];
        self.region.copy_out(self.offset(index, 0)?, &mut value)?;
        Some(value)
    }

    /// Reads 8 bytes of a value at once, at a multiple of 8; `None` if they are not all inside.
    pub fn load(&self, index: usize, offset: usize) -> Option<u64> {
        self.region.load(self.offset(index, offset)?, Ordering::Acquire)
    }

    /// Where in the mapping; 8 bytes behind it are inside the value's own stride.
    fn offset(&self, index: usize, offset: usize) -> Option<usize> {
        let inside = index < self.entries && offset.is_multiple_of(8) && offset < self.stride;
        inside.then(|| index * self.stride + offset)
    }
}

impl MappedArrayMut {
    /// Maps the array; the kernel refuses it for frozen maps.
    pub fn new(map: &Map) -> io::Result<Self> {
        MappedArray::with(map, Protection::ReadWrite).map(Self)
    }

    /// Writes 8 bytes of a value at once, at a multiple of 8; `None` if they are not all inside.
    pub fn store(&self, index: usize, offset: usize, word: u64) -> Option<()> {
        self.0.region.store(self.0.offset(index, offset)?, word, Ordering::Release)
    }
}

impl Deref for MappedArrayMut {
    type Target = MappedArray;

    fn deref(&self) -> &MappedArray {
        &self.0
    }
}
