//! The seeds of the fuzzers, and whatever they once found, on the compiler of everybody. Descriptors and their limit are
//! the whole process's, so this is a process of its own with one test.

use bpfgate_fuzz_targets::ALL;
use std::path::Path;

#[test]
fn every_seed_passes() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds");
    for (target, run) in ALL {
        let (mut count, mut come_to_something) = (0, 0);
        for entry in std::fs::read_dir(seeds.join(target)).unwrap() {
            let path = entry.unwrap().path();
            println!("{}", path.display());
            come_to_something += u32::from(run(&std::fs::read(&path).unwrap()));
            count += 1;
        }
        println!("{target}: {come_to_something} of {count} seeds come to something");
        assert!(count >= 5 && come_to_something >= 4, "{target}: {come_to_something} of {count} seeds");
    }
}
