//! What libbpf says: its version, and its warnings, collected for the answer.

use bpfgate_lockdown::Fatal;
use libbpf_rs::PrintLevel;
use std::sync::Mutex;

/// The libbpf that this was written and tested against. A distribution's older libbpf, linked by mistake, has
/// other ways to reach bpf(2).
const VERSION: &str = "1.7";

/// The newest warnings of the request under way, at most [`MAX`] bytes.
static MESSAGES: Mutex<String> = Mutex::new(String::new());
const MAX: usize = 8 * 1024;

pub(crate) fn check_version() -> Result<(), Fatal> {
    let (major, minor) = version();
    if format!("{major}.{minor}") == VERSION {
        return Ok(());
    }
    Err(Fatal(format!("linked with libbpf {major}.{minor}; this loader needs the vendored libbpf {VERSION}")))
}

#[allow(unsafe_code)]
fn version() -> (u32, u32) {
    // SAFETY: both functions return a constant.
    unsafe { (libbpf_rs::libbpf_sys::libbpf_major_version(), libbpf_rs::libbpf_sys::libbpf_minor_version()) }
}

/// Prepares libbpf for this process: it leaves RLIMIT_MEMLOCK alone, and its warnings are collected, not printed.
#[allow(unsafe_code)]
pub(crate) fn prepare_libbpf() {
    // SAFETY: sets a number that the first load reads; nothing was loaded yet.
    unsafe { libbpf_rs::libbpf_sys::libbpf_set_memlock_rlim(0) };
    libbpf_rs::set_print(Some((PrintLevel::Warn, |_, text: String| {
        if let Ok(mut messages) = MESSAGES.lock()
            && messages.len() + text.len() <= MAX
        {
            messages.push_str(text.strip_prefix("libbpf: ").unwrap_or(&text));
        }
    })));
}

/// Takes what was collected, without the verifier's log, which travels on its own.
pub(crate) fn take_messages() -> String {
    let Ok(mut messages) = MESSAGES.lock() else { return String::new() };
    let text = std::mem::take(&mut *messages);
    let text = text.split("-- BEGIN PROG LOAD LOG --").next().unwrap_or_default();
    bpfgate_protocol::refusal::printable(text.trim(), MAX)
}
