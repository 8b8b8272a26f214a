#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    bpfgate_fuzz_targets::record::record(data);
});
