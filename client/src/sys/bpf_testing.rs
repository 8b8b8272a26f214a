//! What tests do with bpf(2) and a client never can: it needs `CAP_BPF`.

use std::os::fd::FromRawFd;

use super::*;

const MAP_CREATE: c_int = 0;
const PROG_LOAD: c_int = 5;
const PROG_TEST_RUN: c_int = 10;
const MAP_FREEZE: c_int = 22;
const SOCKET_FILTER: u32 = 1;

pub(crate) fn create_map(
    map_type: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
    flags: u32,
) -> io::Result<OwnedFd> {
    let words = [pair(map_type, key_size), pair(value_size, entries), pair(flags, 0)];
    // SAFETY: for these types the attributes hold no address.
    unsafe { make(MAP_CREATE, &words) }
}

/// Makes a map read-only for user space, for ever.
pub(crate) fn freeze(map: &impl AsFd) -> io::Result<()> {
    let mut attr = Attr::ZERO;
    attr.info = InfoAttr { bpf_fd: number(map.as_fd()), info_len: 0, info: 0 };
    // SAFETY: the attributes hold no address.
    unsafe { bpf(MAP_FREEZE, &mut attr) }.map(drop)
}

/// The errno of a bpf command with no attributes at all, which cannot do anything.
pub(crate) fn probe_bpf(command: u32) -> c_int {
    probe(libc::SYS_bpf, command)
}

/// The same by the call's x32 number, which most kernels do not have (`ENOSYS`).
#[cfg(target_arch = "x86_64")]
pub(crate) fn probe_bpf_x32(command: u32) -> c_int {
    probe(libc::SYS_bpf | 0x4000_0000, command)
}

fn probe(call: i64, command: u32) -> c_int {
    // SAFETY: a size of zero makes the kernel read nothing at the address.
    let result = unsafe { libc::syscall(call, command, std::ptr::null::<u8>(), 0) };
    check(result).err().and_then(|error| error.raw_os_error()).unwrap_or(0)
}

/// Loads a program, attached to nothing, that writes 20 bytes (1u64, 2u64, 3u32) to a ring buffer
/// and reserves and discards 5 more.
pub(crate) fn ring_writer(ring: &impl AsFd) -> io::Result<OwnedFd> {
    const OUTPUT: i32 = 130;
    const RESERVE: i32 = 131;
    const DISCARD: i32 = 133;
    let map = ring.as_fd().as_raw_fd();
    // Code, registers (destination low, source high), offset, immediate.
    let program: Vec<u64> = [
        (0x7a, 0x0a, -24, 1),
        (0x7a, 0x0a, -16, 2),
        (0x62, 0x0a, -8, 3),
        (0x18, 0x11, 0, map),
        (0, 0, 0, 0),
        (0xbf, 0xa2, 0, 0),
        (0x07, 0x02, 0, -24),
        (0xb7, 0x03, 0, 20),
        (0xb7, 0x04, 0, 0),
        (0x85, 0, 0, OUTPUT),
        (0x18, 0x11, 0, map),
        (0, 0, 0, 0),
        (0xb7, 0x02, 0, 5),
        (0xb7, 0x03, 0, 0),
        (0x85, 0, 0, RESERVE),
        (0x15, 0x00, 3, 0),
        (0xbf, 0x01, 0, 0),
        (0xb7, 0x02, 0, 0),
        (0x85, 0, 0, DISCARD),
        (0xb7, 0x00, 0, 0),
        (0x95, 0, 0, 0),
    ]
    .map(instruction)
    .to_vec();
    let count = u32::try_from(program.len()).map_err(io::Error::other)?;
    let words = [pair(SOCKET_FILTER, count), program.as_ptr() as u64, c"GPL".as_ptr() as u64];
    // SAFETY: the kernel reads `count` instructions of 8 bytes and a C string; both are alive.
    unsafe { make(PROG_LOAD, &words) }
}

/// Runs a program once, on an empty packet.
pub(crate) fn run(program: &OwnedFd) -> io::Result<()> {
    let packet = [0u8; 64];
    let mut attr = Attr::ZERO;
    let mut full = [0; ATTR_WORDS];
    full[0] = pair(number(program.as_fd()), 0);
    full[1] = pair(64, 0);
    full[2] = packet.as_ptr() as u64;
    attr.full = full;
    // SAFETY: the kernel reads 64 bytes at `packet`; there is no output buffer.
    unsafe { bpf(PROG_TEST_RUN, &mut attr) }.map(drop)
}

fn pair(low: u32, high: u32) -> u64 {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&low.to_ne_bytes());
    bytes[4..].copy_from_slice(&high.to_ne_bytes());
    u64::from_ne_bytes(bytes)
}

/// `struct bpf_insn` on a little-endian machine.
fn instruction((code, registers, offset, immediate): (u8, u8, i16, i32)) -> u64 {
    let [low, high] = offset.to_le_bytes();
    let [a, b, c, d] = immediate.to_le_bytes();
    u64::from_le_bytes([code, registers, low, high, a, b, c, d])
}

/// Makes a bpf object.
///
/// # Safety
///
/// As for `bpf`.
unsafe fn make(command: c_int, words: &[u64]) -> io::Result<OwnedFd> {
    let mut attr = Attr::ZERO;
    let mut full = [0; ATTR_WORDS];
    full[..words.len()].copy_from_slice(words);
    attr.full = full;
    // SAFETY: passed on from the caller.
    let raw = unsafe { bpf(command, &mut attr) }?;
    let raw = c_int::try_from(raw).map_err(io::Error::other)?;
    // SAFETY: the kernel just made this descriptor for us; nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}
