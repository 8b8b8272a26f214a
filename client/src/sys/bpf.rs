//! bpf(2) on map descriptors: the commands that need no capability.
//!
//! The kernel learns the size of a key or a value from the map, not from its caller, so a buffer
//! that is too short is memory corruption. [`MapFd`] therefore takes both sizes from the kernel
//! when it is made, for the very descriptor it owns, and compares every slice with them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use libc::c_int;

use super::check;
use crate::cpus;

const MAP_LOOKUP_ELEM: c_int = 1;
const MAP_UPDATE_ELEM: c_int = 2;
const MAP_DELETE_ELEM: c_int = 3;
const MAP_GET_NEXT_KEY: c_int = 4;
const OBJ_GET_INFO_BY_FD: c_int = 15;
const MAP_LOOKUP_BATCH: c_int = 24;

const TYPE_PROG_ARRAY: u32 = 3;
const TYPE_PERF_EVENT_ARRAY: u32 = 4;
const TYPE_PERCPU_HASH: u32 = 5;
const TYPE_PERCPU_ARRAY: u32 = 6;
const TYPE_CGROUP_ARRAY: u32 = 8;
const TYPE_LRU_PERCPU_HASH: u32 = 10;
const TYPE_ARRAY_OF_MAPS: u32 = 12;
const TYPE_HASH_OF_MAPS: u32 = 13;
const TYPE_PERCPU_CGROUP_STORAGE: u32 = 21;

/// Larger than `union bpf_attr` of every kernel so far: the kernel accepts more bytes than it
/// knows as long as they are zero (`bpf_check_uarg_tail_zero`, kernel/bpf/syscall.c).
const ATTR_WORDS: usize = 24;

#[repr(C)]
#[derive(Clone, Copy)]
struct ElementAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    /// The address of the value, or of the next key.
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct InfoAttr {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

#[repr(C)]
union Attr {
    full: [u64; ATTR_WORDS],
    element: ElementAttr,
    batch: BatchAttr,
    info: InfoAttr,
}

impl Attr {
    const ZERO: Self = Self { full: [0; ATTR_WORDS] };
}

/// `struct bpf_map_info` up to `map_extra`, which is all this crate reads (Linux 5.16; an older
/// kernel fills less and leaves the rest zero).
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct RawInfo {
    pub(crate) map_type: u32,
    pub(crate) id: u32,
    pub(crate) key_size: u32,
    pub(crate) value_size: u32,
    pub(crate) max_entries: u32,
    pub(crate) map_flags: u32,
    pub(crate) name: [u8; 16],
    ifindex: u32,
    btf_vmlinux_value_type_id: u32,
    netns_dev: u64,
    netns_ino: u64,
    btf_id: u32,
    btf_key_type_id: u32,
    btf_value_type_id: u32,
    btf_vmlinux_id: u32,
    map_extra: u64,
}

/// Makes one bpf(2) call.
///
/// # Safety
///
/// Every address that `command` reads from `attr` must be zero or valid, for the whole call, for
/// as many bytes as the kernel reads or writes there.
unsafe fn bpf(command: c_int, attr: &mut Attr) -> io::Result<i64> {
    // SAFETY: `attr` is an exclusive reference to size_of::<Attr>() initialised bytes (every use
    // starts from Attr::ZERO); what its addresses point at is the caller's promise above.
    check(unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<Attr>()) })
}

/// The address of a buffer, or none for an empty one: maps without keys (queue, stack) refuse a
/// key address.
fn address(bytes: &[u8]) -> u64 {
    if bytes.is_empty() { 0 } else { bytes.as_ptr() as u64 }
}

fn address_mut(bytes: &mut [u8]) -> u64 {
    if bytes.is_empty() { 0 } else { bytes.as_mut_ptr() as u64 }
}

/// The number of a descriptor as the attributes hold it.
fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// A position inside a batch walk; its bytes mean something to the kernel only.
#[derive(Debug)]
pub(crate) struct BatchCursor {
    bytes: Vec<u8>,
    started: bool,
}

impl BatchCursor {
    /// Whether a batch was read already.
    pub(crate) fn started(&self) -> bool {
        self.started
    }
}

/// The descriptor of a map, with the sizes the kernel states for it.
#[derive(Debug)]
pub(crate) struct MapFd {
    fd: OwnedFd,
    info: RawInfo,
    key_bytes: usize,
    value_bytes: usize,
}

impl MapFd {
    /// Asks the kernel what `fd` is; fails with `EINVAL` if it is no bpf object.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        let mut info = RawInfo::default();
        let mut attr = Attr::ZERO;
        let info_len = u32::try_from(size_of::<RawInfo>()).map_err(io::Error::other)?;
        attr.info = InfoAttr { bpf_fd: number(fd.as_fd()), info_len, info: (&raw mut info) as u64 };
        // SAFETY: `info` is writable for `info_len` bytes and outlives the call. It is all zero,
        // so a program or link descriptor, whose info has addresses and lengths of its own in
        // these bytes, finds only empty buffers.
        unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut attr) }?;
        let value_bytes = value_bytes(&info)?;
        let key_bytes = usize::try_from(info.key_size).map_err(io::Error::other)?;
        Ok(Self { fd, info, key_bytes, value_bytes })
    }

    pub(crate) fn info(&self) -> &RawInfo {
        &self.info
    }

    /// Bytes of one value as user space sees it: for a per-CPU map, of all CPUs together.
    pub(crate) fn value_bytes(&self) -> usize {
        self.value_bytes
    }

    pub(crate) fn key_bytes(&self) -> usize {
        self.key_bytes
    }

    pub(crate) fn into_fd(self) -> OwnedFd {
        self.fd
    }

    pub(crate) fn lookup(&self, key: &[u8], value: &mut [u8]) -> io::Result<()> {
        exact("key", key.len(), self.key_bytes)?;
        exact("value", value.len(), self.value_bytes)?;
        let mut attr = self.element(key, address_mut(value), 0);
        // SAFETY: the kernel reads key_size bytes at `key` and reads (bloom filter) or writes
        // value_bytes at `value`; both lengths were compared with what this map has. That
        // value_bytes is enough rests on /sys listing every possible CPU, see `value_bytes`.
        unsafe { bpf(MAP_LOOKUP_ELEM, &mut attr) }.map(drop)
    }

    pub(crate) fn update(&self, key: &[u8], value: &[u8], flags: u64) -> io::Result<()> {
        exact("key", key.len(), self.key_bytes)?;
        exact("value", value.len(), self.value_bytes)?;
        let mut attr = self.element(key, address(value), flags);
        // SAFETY: the kernel reads key_size and value_bytes bytes and writes none; both lengths
        // were compared with what this map has.
        unsafe { bpf(MAP_UPDATE_ELEM, &mut attr) }.map(drop)
    }

    pub(crate) fn delete(&self, key: &[u8]) -> io::Result<()> {
        exact("key", key.len(), self.key_bytes)?;
        let mut attr = self.element(key, 0, 0);
        // SAFETY: the kernel reads key_size bytes at `key`, which has that length.
        unsafe { bpf(MAP_DELETE_ELEM, &mut attr) }.map(drop)
    }

    /// Writes the key after `key` (the first one for `None`) to `next`; `ENOENT` at the end.
    pub(crate) fn next_key(&self, key: Option<&[u8]>, next: &mut [u8]) -> io::Result<()> {
        exact("key", key.map_or(self.key_bytes, <[u8]>::len), self.key_bytes)?;
        exact("key", next.len(), self.key_bytes)?;
        let mut attr = self.element(key.unwrap_or_default(), address_mut(next), 0);
        // SAFETY: the kernel reads key_size bytes at `key`, if there is one, and writes key_size
        // bytes at `next`; both have that length.
        unsafe { bpf(MAP_GET_NEXT_KEY, &mut attr) }.map(drop)
    }

    pub(crate) fn batch_cursor(&self) -> BatchCursor {
        // Hash maps keep a u32 there, the others a key.
        BatchCursor { bytes: vec![0; self.key_bytes.max(8)], started: false }
    }

    /// Reads the next entries into `keys` and `values`, which must have room for equally many.
    ///
    /// Returns how many were read and the error that ended the walk, if one did: `ENOENT` is the
    /// end of the map, after which the count is valid.
    pub(crate) fn lookup_batch(
        &self,
        cursor: &mut BatchCursor,
        keys: &mut [u8],
        values: &mut [u8],
    ) -> io::Result<(usize, Option<io::Error>)> {
        if self.key_bytes == 0 || self.value_bytes == 0 {
            return Err(io::Error::from(io::ErrorKind::Unsupported));
        }
        let room = keys.len() / self.key_bytes;
        exact("key buffer", keys.len(), room * self.key_bytes)?;
        exact("value buffer", Some(values.len()), room.checked_mul(self.value_bytes))?;
        exact("cursor", cursor.bytes.len(), self.key_bytes.max(8))?;
        let cursor_address = address_mut(&mut cursor.bytes);
        let mut attr = Attr::ZERO;
        attr.batch = BatchAttr {
            in_batch: if cursor.started { cursor_address } else { 0 },
            out_batch: cursor_address,
            keys: address_mut(keys),
            values: address_mut(values),
            count: u32::try_from(room).map_err(io::Error::other)?,
            map_fd: number(self.fd.as_fd()),
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: the kernel writes at most `count` keys and values of this map's sizes, which
        // the two buffers hold exactly, and at most max(4, key_size) bytes of cursor. That input
        // and output cursor are the same bytes is fine: they are copied in before any is written.
        let outcome = unsafe { bpf(MAP_LOOKUP_BATCH, &mut attr) };
        // SAFETY: `batch` was the variant written above and has no invalid bit patterns.
        let count = unsafe { attr.batch.count } as usize;
        let ended = outcome.err();
        // Any other error may leave the count as it was given, so it says nothing then.
        let valid = ended.as_ref().is_none_or(|error| error.raw_os_error() == Some(libc::ENOENT));
        cursor.started |= valid;
        Ok((if valid { count.min(room) } else { 0 }, ended))
    }

    fn element(&self, key: &[u8], value: u64, flags: u64) -> Attr {
        let mut attr = Attr::ZERO;
        attr.element =
            ElementAttr { map_fd: number(self.fd.as_fd()), pad: 0, key: address(key), value, flags };
        attr
    }
}

impl AsFd for MapFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// `bpf_map_value_size` of kernel/bpf/syscall.c.
///
/// The count of CPUs comes from /sys/devices/system/cpu/possible, which only root could fake
/// (by mounting something over it); there is no other source for it.
fn value_bytes(info: &RawInfo) -> io::Result<usize> {
    let size = usize::try_from(info.value_size).map_err(io::Error::other)?;
    let bytes = match info.map_type {
        TYPE_PERCPU_HASH | TYPE_PERCPU_ARRAY | TYPE_LRU_PERCPU_HASH | TYPE_PERCPU_CGROUP_STORAGE => {
            size.next_multiple_of(8).checked_mul(cpus::possible()?)
        }
        TYPE_PROG_ARRAY
        | TYPE_PERF_EVENT_ARRAY
        | TYPE_CGROUP_ARRAY
        | TYPE_ARRAY_OF_MAPS
        | TYPE_HASH_OF_MAPS => Some(4),
        _ => Some(size),
    };
    bytes.ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))
}

fn exact<T: PartialEq + std::fmt::Debug + Copy>(what: &str, given: T, needed: T) -> io::Result<()> {
    if given == needed {
        return Ok(());
    }
    let sentence = format!("the {what} has {given:?} bytes, this map needs {needed:?}");
    Err(io::Error::new(io::ErrorKind::InvalidInput, sentence))
}

#[cfg(test)]
#[path = "bpf_testing.rs"]
pub(crate) mod testing;
