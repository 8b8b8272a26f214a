//! Memory shared with the kernel and with BPF programs.
//!
//! Others write to it at any time, so no reference into it ever leaves this file: every access is
//! an atomic one, and bytes are copied out.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::MapFd;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protection {
    Read,
    ReadWrite,
}

/// A shared mapping of a bpf map.
#[derive(Debug)]
pub(crate) struct Region {
    base: NonNull<u8>,
    len: usize,
    protection: Protection,
}

// SAFETY: the mapping belongs to the process, not to a thread, and stays until the drop.
unsafe impl Send for Region {}
// SAFETY: every access through a shared reference is atomic.
unsafe impl Sync for Region {}

impl Region {
    /// Maps `len` bytes of `map` from `offset` on, a multiple of the page size.
    pub(crate) fn new(map: &MapFd, offset: usize, len: usize, protection: Protection) -> io::Result<Self> {
        let length = NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        let flags = match protection {
            Protection::Read => ProtFlags::PROT_READ,
            Protection::ReadWrite => ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
        };
        // SAFETY: no address is asked for, so no existing mapping is touched. A bpf map never
        // shrinks, so the pages cannot vanish under us as those of a truncated file do; MapFd
        // guarantees that it is a bpf object and the kernel maps nothing but maps.
        let base = unsafe { mmap(None, length, flags, MapFlags::MAP_SHARED, map.as_fd(), offset) }?;
        Ok(Self { base: base.cast(), len, protection })
    }

    /// The 8 bytes at `offset`, `None` if they are outside or not aligned to 8.
    pub(crate) fn load(&self, offset: usize, order: Ordering) -> Option<u64> {
        let word = self.word(offset)?;
        // SAFETY: `word` checked range and alignment; the page is mapped readable until the drop,
        // and an 8-byte atomic load writes nothing on 64-bit targets, the only ones we build for.
        Some(unsafe { AtomicU64::from_ptr(word) }.load(order))
    }

    /// The 4 bytes at `offset`, `None` if they are outside or not aligned to 4.
    pub(crate) fn load_u32(&self, offset: usize, order: Ordering) -> Option<u32> {
        let half = self.at::<u32>(offset)?;
        // SAFETY: as in `load`, with 4 bytes.
        Some(unsafe { AtomicU32::from_ptr(half) }.load(order))
    }

    /// Stores 8 bytes; `None` if they are outside, not aligned to 8, or the mapping is read-only.
    pub(crate) fn store(&self, offset: usize, value: u64, order: Ordering) -> Option<()> {
        if self.protection != Protection::ReadWrite {
            return None;
        }
        let word = self.word(offset)?;
        // SAFETY: `word` checked range and alignment; the page is mapped writable until the drop.
        unsafe { AtomicU64::from_ptr(word) }.store(value, order);
        Some(())
    }

    /// Copies `into.len()` bytes out, 8 at a time: `offset` is a multiple of 8 and the last word
    /// lies inside as a whole. Each word is whole, the row of them need not be.
    pub(crate) fn copy_out(&self, offset: usize, into: &mut [u8]) -> Option<()> {
        for (index, chunk) in into.chunks_mut(8).enumerate() {
            let word = self.load(offset.checked_add(index * 8)?, Ordering::Relaxed)?;
            chunk.copy_from_slice(&word.to_ne_bytes()[..chunk.len()]);
        }
        Some(())
    }

    fn word(&self, offset: usize) -> Option<*mut u64> {
        self.at::<u64>(offset)
    }

    fn at<T>(&self, offset: usize) -> Option<*mut T> {
        let end = offset.checked_add(size_of::<T>())?;
        if end > self.len || !offset.is_multiple_of(align_of::<T>()) {
            return None;
        }
        // SAFETY: offset + size_of::<T>() <= len, so the result stays inside the mapping, whose
        // base is page-aligned.
        Some(unsafe { self.base.as_ptr().add(offset) }.cast())
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: base and len are those of the mapping made in `new`; no reference into it exists
        // outside a call on `self`. A failure would leave it mapped, which harms nobody.
        let _ = unsafe { munmap(self.base.cast(), self.len) };
    }
}
