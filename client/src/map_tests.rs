use super::*;
use crate::map_info::MapType;
use crate::mapping::{MappedArray, MappedArrayMut};
use crate::sys::testing::{create_map, freeze, ring_writer, run};

const HASH: u32 = 1;
const ARRAY: u32 = 2;
const PERCPU_ARRAY: u32 = 6;
const PERCPU_HASH: u32 = 5;
const QUEUE: u32 = 22;
const RINGBUF: u32 = 27;
const MMAPABLE: u32 = 1 << 10;

/// Makes a map as root; a test that may not says so and ends.
macro_rules! map {
    ($($argument:expr),*) => {
        match create_map($($argument),*) {
            Ok(fd) => Map::new(fd).unwrap(),
            Err(error) => {
                println!("skipped: making a map needs CAP_BPF: {error}");
                return;
            }
        }
    };
}

fn key(number: u32) -> [u8; 4] {
    number.to_ne_bytes()
}

#[test]
fn a_hash() {
    let map = map!(HASH, 4, 8, 1000, 0);
    assert_eq!((map.info().kind.to_string().as_str(), map.info().max_entries), ("hash", 1000));
    assert_eq!(map.lookup(&key(1)).unwrap(), None);
    assert!(!map.delete(&key(1)).unwrap());
    map.update(&key(1), &[7; 8], UpdateMode::Add).unwrap();
    assert_eq!(map.lookup(&key(1)).unwrap(), Some(vec![7; 8]));
    let again = map.update(&key(1), &[8; 8], UpdateMode::Add).unwrap_err();
    assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
    assert!(again.to_string().starts_with("updating the hash map"), "{again}");
    assert!(map.update(&key(2), &[8; 8], UpdateMode::Replace).is_err());
    assert!(map.delete(&key(1)).unwrap());
    assert_eq!(map.keys().count(), 0);
    assert_eq!(map.entries().unwrap(), []);
}

#[test]
fn wrong_lengths_never_reach_the_kernel() {
    let map = map!(HASH, 4, 8, 10, 0);
    for wrong in [&[][..], &[0; 3], &[0; 5]] {
        assert_eq!(map.lookup(wrong).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert!(map.update(wrong, &[0; 8], UpdateMode::Any).is_err());
        assert!(map.update(&key(0), wrong, UpdateMode::Any).is_err());
        assert!(map.delete(wrong).is_err());
    }
}

#[test]
fn every_entry_is_walked_once() {
    let map = map!(HASH, 4, 8, 1000, 0);
    for number in 0..700u32 {
        map.update(&key(number), &u64::from(number).to_ne_bytes(), UpdateMode::Any).unwrap();
    }
    let sorted = |mut keys: Vec<Vec<u8>>| {
        keys.sort_by_key(|key| u32::from_ne_bytes(key.as_slice().try_into().unwrap()));
        keys
    };
    let all: Vec<Vec<u8>> = (0..700).map(|number| key(number).to_vec()).collect();
    assert_eq!(sorted(map.keys().collect::<Result<_, _>>().unwrap()), all);
    let entries = map.entries().unwrap();
    for pair in &entries {
        let number = u32::from_ne_bytes(pair.key.as_slice().try_into().unwrap());
        assert_eq!(pair.value, u64::from(number).to_ne_bytes());
    }
    assert_eq!(sorted(entries.into_iter().map(|pair| pair.key).collect()), all);
    // A room of one makes the kernel say ENOSPC wherever a bucket holds two.
    let batches: Vec<_> = map.lookup_batch(1).collect::<Result<_, _>>().unwrap();
    assert!(batches.len() > 1);
    assert_eq!(sorted(batches.into_iter().flatten().map(|pair| pair.key).collect()), all);
}

#[test]
fn an_array_in_batches() {
    let map = map!(ARRAY, 4, 4, 5, 0);
    map.update(&key(4), &[4; 4], UpdateMode::Any).unwrap();
    let sizes: Vec<_> = map.lookup_batch(2).map(|batch| batch.unwrap().len()).collect();
    assert_eq!(sizes, [2, 2, 1]);
    assert_eq!(map.entries().unwrap()[4], Pair { key: key(4).to_vec(), value: vec![4; 4] });
    assert_eq!(map.lookup(&key(5)).unwrap(), None);
}

#[test]
fn values_per_cpu() {
    for kind in [PERCPU_ARRAY, PERCPU_HASH] {
        let map = map!(kind, 4, 12, 1, 0);
        let cpus = crate::possible_cpus().unwrap();
        let value: Vec<u8> = (0..cpus).flat_map(|cpu| [u8::try_from(cpu % 256).unwrap(); 16]).collect();
        map.update(&key(0), &value, UpdateMode::Any).unwrap();
        let values = map.lookup_per_cpu(&key(0)).unwrap().unwrap();
        assert_eq!(values.len(), cpus);
        assert!(
            values.iter().enumerate().all(|(cpu, value)| *value == [u8::try_from(cpu % 256).unwrap(); 12])
        );
        assert_eq!(map.entries().unwrap()[0].value.len(), 16 * cpus);
        assert!(map.update(&key(0), &[0; 12], UpdateMode::Any).is_err());
    }
    let map = map!(ARRAY, 4, 12, 1, 0);
    assert!(map.lookup_per_cpu(&key(0)).is_err());
    assert_eq!(map.per_cpu(&[1; 12]).count(), 1);
}

#[test]
fn a_queue_has_no_keys() {
    let map = map!(QUEUE, 0, 4, 3, 0);
    map.update(&[], &[5; 4], UpdateMode::Any).unwrap();
    assert_eq!(map.lookup(&[]).unwrap(), Some(vec![5; 4]));
    assert_eq!(map.lookup_batch(4).next().unwrap().unwrap_err().kind(), io::ErrorKind::Unsupported);
}

#[test]
fn an_array_as_memory() {
    let map = map!(ARRAY, 4, 12, 1000, MMAPABLE);
    let memory = MappedArrayMut::new(&map).unwrap();
    map.update(&key(999), &[3; 12], UpdateMode::Any).unwrap();
    assert_eq!(memory.value(999), Some(vec![3; 12]));
    assert_eq!(memory.load(999, 0), Some(u64::from_ne_bytes([3; 8])));
    memory.store(1, 8, 0x0102_0304).unwrap();
    let read = map.lookup(&key(1)).unwrap().unwrap();
    assert_eq!(read[8..], 0x0102_0304u64.to_ne_bytes()[..4]);
    assert_eq!((memory.len(), memory.is_empty()), (1000, false));
    for (index, offset) in [(1000, 0), (0, 16), (0, 4), (0, usize::MAX), (usize::MAX, 0)] {
        assert_eq!(memory.load(index, offset), None);
        assert_eq!(memory.store(index, offset, 1), None);
    }
    assert_eq!(memory.value(1000), None);
    // The memory outlives the descriptor.
    drop(map);
    assert_eq!(memory.value(999), Some(vec![3; 12]));
}

#[test]
fn a_frozen_array_can_only_be_read() {
    let map = map!(ARRAY, 4, 8, 1, MMAPABLE);
    map.update(&key(0), &[9; 8], UpdateMode::Any).unwrap();
    freeze(&map).unwrap();
    assert_eq!(MappedArray::new(&map).unwrap().value(0), Some(vec![9; 8]));
    assert_eq!(MappedArrayMut::new(&map).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    assert_eq!(map.lookup(&key(0)).unwrap(), Some(vec![9; 8]));
    let error = map.update(&key(0), &[0; 8], UpdateMode::Any).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
}

#[test]
fn other_maps_are_no_memory() {
    let map = map!(ARRAY, 4, 8, 1, 0);
    assert_eq!(MappedArray::new(&map).unwrap_err().kind(), io::ErrorKind::Unsupported);
    let map = map!(HASH, 4, 8, 1, 0);
    assert_eq!(MappedArray::new(&map).unwrap_err().kind(), io::ErrorKind::Unsupported);
}

#[test]
fn a_ring_buffer_that_is_empty() {
    let map = map!(RINGBUF, 0, 0, 8192, 0);
    let mut ring = crate::RingBuffer::new(map).unwrap();
    assert_eq!(ring.next_record().unwrap(), None);
    assert!(!ring.wait(Some(std::time::Duration::from_millis(5))).unwrap());
    let other = map!(ARRAY, 4, 8, 1, 0);
    assert!(crate::RingBuffer::new(other).is_err());
}

#[test]
fn a_ring_buffer_that_a_program_writes() {
    let map = map!(RINGBUF, 0, 0, 4096, 0);
    let writer = match ring_writer(&map) {
        Ok(writer) => writer,
        Err(error) => return println!("skipped: loading a program: {error}"),
    };
    let mut ring = crate::RingBuffer::new(map).unwrap();
    let record = [&1u64.to_ne_bytes()[..], &2u64.to_ne_bytes(), &3u32.to_ne_bytes()].concat();
    // One run takes 48 bytes, so the positions pass the end several times, at every 16th byte.
    for _ in 0..20 {
        for _ in 0..50 {
            run(&writer).unwrap();
        }
        assert!(ring.wait(None).unwrap());
        let mut count = 0;
        assert_eq!(ring.consume(|bytes| count += usize::from(bytes == record)).unwrap(), 50);
        assert_eq!(count, 50);
        assert!(!ring.wait(Some(std::time::Duration::ZERO)).unwrap());
    }
    // A ring that is full drops what comes, and goes on when there is room again.
    for _ in 0..200 {
        run(&writer).unwrap();
    }
    let records: Vec<_> = ring.records().collect::<io::Result<_>>().unwrap();
    assert!((50..200).contains(&records.len()), "{}", records.len());
    assert!(records.iter().all(|bytes| *bytes == record));
    run(&writer).unwrap();
    assert_eq!(ring.next_record().unwrap(), Some(record.as_slice()));
}

#[test]
fn other_descriptors_are_no_maps() {
    let null = std::fs::File::open("/dev/null").unwrap();
    assert!(Map::new(null.into()).is_err());
}

#[test]
fn types_have_the_kernels_names() {
    for (number, name) in [(1, "hash"), (6, "percpu_array"), (27, "ringbuf"), (33, "arena"), (99, "type_99")]
    {
        assert_eq!(MapType(number).to_string(), name);
    }
}
