use std::cell::{Cell, RefCell};

use super::*;

/// A ring of 64 bytes in ordinary memory, written as the kernel writes it.
struct Fake {
    consumer: Cell<u64>,
    producer: Cell<u64>,
    data: RefCell<[u8; 64]>,
}

impl Fake {
    /// Positions start high, so that they wrap around within a test.
    fn starting_at(position: u64) -> Self {
        Self { consumer: Cell::new(position), producer: Cell::new(position), data: RefCell::new([0xee; 64]) }
    }

    fn write(&self, position: u64, bytes: &[u8]) {
        for (index, byte) in (0u64..).zip(bytes) {
            self.data.borrow_mut()[Self::place(position.wrapping_add(index))] = *byte;
        }
    }

    fn place(position: u64) -> usize {
        usize::try_from(position % 64).unwrap()
    }

    /// Reserves a record; returns where its header is.
    fn put(&self, bytes: &[u8], bits: u32) -> u64 {
        let position = self.producer.get();
        let length = u32::try_from(bytes.len()).unwrap();
        self.write(position, &(length | bits).to_ne_bytes());
        self.write(position.wrapping_add(8), bytes);
        self.producer.set(position.wrapping_add((bytes.len() as u64 + 8).next_multiple_of(8)));
        position
    }

    fn steps(&self) -> (Vec<Vec<u8>>, usize) {
        let (mut records, mut discarded, mut record) = (Vec::new(), 0, Vec::new());
        loop {
            match step(self, &mut record).unwrap() {
                Step::Empty => return (records, discarded),
                Step::Record => records.push(record.clone()),
                Step::Discarded => discarded += 1,
            }
        }
    }
}

impl Memory for Fake {
    fn size(&self) -> u64 {
        64
    }

    fn consumer(&self) -> Option<u64> {
        Some(self.consumer.get())
    }

    fn set_consumer(&self, position: u64) -> Option<()> {
        self.consumer.set(position);
        Some(())
    }

    fn producer(&self) -> Option<u64> {
        Some(self.producer.get())
    }

    fn header(&self, position: u64) -> Option<u32> {
        let mut bytes = [0; 4];
        self.copy(position, &mut bytes)?;
        Some(u32::from_ne_bytes(bytes))
    }

    fn copy(&self, position: u64, into: &mut [u8]) -> Option<()> {
        for (index, byte) in (0u64..).zip(into) {
            *byte = self.data.borrow()[Self::place(position.wrapping_add(index))];
        }
        Some(())
    }
}

#[test]
fn records_come_in_order() {
    let ring = Fake::starting_at(0);
    ring.put(b"one", 0);
    ring.put(b"", 0);
    ring.put(b"four-and-twenty-blackbird", DISCARD);
    assert_eq!(ring.steps(), (vec![b"one".to_vec(), vec![]], 1));
    assert_eq!(ring.consumer.get(), ring.producer.get());
}

#[test]
fn positions_and_records_wrap() {
    let ring = Fake::starting_at(u64::MAX - 63);
    for round in 0..50u8 {
        let bytes = vec![round; usize::from(round % 30)];
        ring.put(&bytes, 0);
        assert_eq!(ring.steps(), (vec![bytes], 0));
    }
    assert!(ring.consumer.get() < 10_000, "it never wrapped");
}

#[test]
fn a_busy_record_holds_back_what_follows() {
    let ring = Fake::starting_at(0);
    let busy = ring.put(b"first", BUSY);
    ring.put(b"second", 0);
    assert_eq!(ring.steps(), (vec![], 0));
    assert_eq!(ring.consumer.get(), 0);
    ring.write(busy, &5u32.to_ne_bytes());
    assert_eq!(ring.steps(), (vec![b"first".to_vec(), b"second".to_vec()], 0));
}

#[test]
fn a_ring_may_be_full() {
    let ring = Fake::starting_at(24);
    ring.put(&[7; 56], 0);
    assert_eq!(ring.steps(), (vec![vec![7; 56]], 0));
}

#[test]
fn contradictions_are_errors() {
    let beyond = |length: u32| {
        let ring = Fake::starting_at(0);
        let position = ring.put(b"12345678", 0);
        ring.write(position, &length.to_ne_bytes());
        step(&ring, &mut Vec::new())
    };
    assert!(beyond(8).is_ok());
    for length in [9, 64, u32::MAX >> 2] {
        assert_eq!(beyond(length).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
    let ring = Fake::starting_at(0);
    for (consumer, producer) in [(0, 72), (8, 0), (4, 20), (0, 4)] {
        ring.consumer.set(consumer);
        ring.producer.set(producer);
        assert!(step(&ring, &mut Vec::new()).is_err(), "{consumer} {producer}");
        assert_eq!(ring.consumer.get(), consumer);
    }
}
