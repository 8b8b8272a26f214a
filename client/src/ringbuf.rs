//! Records from a BPF ring buffer.
//!
//! The layout is the kernel's (kernel/bpf/ringbuf.c): one page with the consumer's position, which
//! user space writes; one page with the producer's, which it cannot; then the data, mapped twice in
//! a row so that a record that wraps is still in one piece. A record starts with 8 bytes, of which
//! the first four hold its length, the busy bit while a program writes it, and the discard bit.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};

use crate::map::Map;
use crate::map_info::MapType;
use crate::sys::{Protection, Region};
use crate::transport::poll_timeout;

const BUSY: u32 = 1 << 31;
const DISCARD: u32 = 1 << 30;
const HEADER: u64 = 8;

/// The consumer of a ring buffer. There can be only one: a second one takes records away from the
/// first, and may overwrite a record that the first is reading.
///
/// Needs a map with read-write access: the consumer's position is in the map.
#[derive(Debug)]
#[must_use]
pub struct RingBuffer {
    map: Map,
    pages: Pages,
    record: Vec<u8>,
}

/// The memory of a ring, by its parts. Positions grow for ever; only their low bits are places.
trait Memory {
    /// Bytes of data, a power of two.
    fn size(&self) -> u64;
    fn consumer(&self) -> Option<u64>;
    /// Gives the space before `position` back to the kernel: nothing of it is read afterwards.
    fn set_consumer(&self, position: u64) -> Option<()>;
    /// What is before the returned position has been reserved.
    fn producer(&self) -> Option<u64>;
    /// Length and bits of the record at `position`; if it is not busy, its data is complete.
    fn header(&self, position: u64) -> Option<u32>;
    fn copy(&self, position: u64, into: &mut [u8]) -> Option<()>;
}

#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Nothing more is complete.
    Empty,
    /// A record was copied.
    Record,
    /// The program changed its mind about a record.
    Discarded,
}

impl RingBuffer {
    /// Maps the ring buffer.
    pub fn new(map: Map) -> io::Result<Self> {
        let info = map.info();
        if info.kind != MapType::RINGBUF {
            let error = io::Error::new(io::ErrorKind::InvalidInput, "it is no ring buffer");
            return Err(map.context("reading records of", &error));
        }
        let pages = Pages::new(&map).map_err(|error| map.context("mapping", &error))?;
        Ok(Self { map, pages, record: Vec::new() })
    }

    /// Waits until there may be something to read; `false` after `timeout`.
    pub fn wait(&self, timeout: Option<Duration>) -> io::Result<bool> {
        let started = Instant::now();
        loop {
            let left = timeout.map(|timeout| timeout.saturating_sub(started.elapsed()));
            let mut fds = [PollFd::new(self.map.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, poll_timeout(left)) {
                Ok(ready) => return Ok(ready > 0),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(self.map.context("waiting for records of", &errno.into())),
            }
        }
    }

    /// The next complete record, without waiting.
    ///
    /// It is a copy: its space is given back to the programs before this returns.
    pub fn next_record(&mut self) -> io::Result<Option<&[u8]>> {
        loop {
            match step(&self.pages, &mut self.record) {
                Ok(Step::Discarded) => {}
                Ok(Step::Empty) => return Ok(None),
                Ok(Step::Record) => return Ok(Some(&self.record)),
                Err(error) => return Err(self.map.context("reading a record of", &error)),
            }
        }
    }

    /// Hands every complete record to `each`, without waiting; returns how many there were.
    pub fn consume(&mut self, mut each: impl FnMut(&[u8])) -> io::Result<usize> {
        let mut count = 0;
        while let Some(record) = self.next_record()? {
            each(record);
            count += 1;
        }
        Ok(count)
    }

    /// The complete records one by one, without waiting.
    pub fn records(&mut self) -> impl Iterator<Item = io::Result<Vec<u8>>> {
        std::iter::from_fn(|| self.next_record().map(|record| record.map(<[u8]>::to_vec)).transpose())
    }

    /// Gives the map back.
    pub fn into_map(self) -> Map {
        self.map
    }
}

/// For polling: readable while there is something to consume.
impl AsFd for RingBuffer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.map.as_fd()
    }
}

/// Takes one record off the ring, into `record` if it is one.
fn step(ring: &impl Memory, record: &mut Vec<u8>) -> io::Result<Step> {
    let consumer = ring.consumer().ok_or_else(corrupt)?;
    let reserved = ring.producer().ok_or_else(corrupt)?.wrapping_sub(consumer);
    if reserved == 0 {
        return Ok(Step::Empty);
    }
    // What the kernel never writes: somebody else moved the consumer's position.
    if reserved > ring.size() || reserved < HEADER || !consumer.is_multiple_of(HEADER) {
        return Err(corrupt());
    }
    let header = ring.header(consumer).ok_or_else(corrupt)?;
    if header & BUSY != 0 {
        return Ok(Step::Empty);
    }
    let length = header & !(BUSY | DISCARD);
    let total = (u64::from(length) + HEADER).next_multiple_of(HEADER);
    if total > reserved {
        return Err(corrupt());
    }
    let discarded = header & DISCARD != 0;
    if !discarded {
        record.clear();
        record.resize(length as usize, 0);
        ring.copy(consumer.wrapping_add(HEADER), record).ok_or_else(corrupt)?;
    }
    ring.set_consumer(consumer.wrapping_add(total)).ok_or_else(corrupt)?;
    Ok(if discarded { Step::Discarded } else { Step::Record })
}

fn corrupt() -> io::Error {
    let what = "its positions and records contradict each other, has it a second consumer?";
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// The two mappings.
#[derive(Debug)]
struct Pages {
    consumer: Region,
    producer: Region,
    /// Where the data starts in `producer`.
    data: usize,
    size: usize,
}

impl Pages {
    fn new(map: &Map) -> io::Result<Self> {
        let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?
            .and_then(|size| usize::try_from(size).ok())
            .ok_or(io::ErrorKind::Unsupported)?;
        let size = map.info().max_entries as usize;
        if !size.is_power_of_two() || !size.is_multiple_of(page) {
            return Err(corrupt());
        }
        let consumer = Region::new(map.raw(), 0, page, Protection::ReadWrite)?;
        let producer = Region::new(map.raw(), page, page + 2 * size, Protection::Read)?;
        Ok(Self { consumer, producer, data: page, size })
    }

    fn place(&self, position: u64) -> Option<usize> {
        Some(self.data + usize::try_from(position).ok()? % self.size)
    }
}

impl Memory for Pages {
    fn size(&self) -> u64 {
        self.size as u64
    }

    fn consumer(&self) -> Option<u64> {
        self.consumer.load(0, Ordering::Acquire)
    }

    fn set_consumer(&self, position: u64) -> Option<()> {
        // Release: the copy above happens before the kernel sees the space as free.
        self.consumer.store(0, position, Ordering::Release)
    }

    fn producer(&self) -> Option<u64> {
        // Acquire: pairs with the kernel's release after it wrote the header with the busy bit.
        self.producer.load(0, Ordering::Acquire)
    }

    fn header(&self, position: u64) -> Option<u32> {
        // Acquire: pairs with the kernel's exchange that clears the busy bit after the data.
        self.producer.load_u32(self.place(position)?, Ordering::Acquire)
    }

    fn copy(&self, position: u64, into: &mut [u8]) -> Option<()> {
        self.producer.copy_out(self.place(position)?, into)
    }
}

#[cfg(test)]
#[path = "ringbuf_tests.rs"]
mod tests;
