#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    bpfgate_policy_tests::targets::parser(data);
});
