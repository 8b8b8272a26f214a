//! `bpfgate policy`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Checks policy files, all installed ones if none is given; 4 if one is invalid.
pub(crate) fn check(_paths: &[PathBuf], _json: bool) -> ExitCode {
    super::failure::complain("policy check: not built yet");
    ExitCode::from(1)
}

/// Shows a policy with its defaults and the capabilities it needs; 4 if it is invalid.
pub(crate) fn show(_path: &Path, _json: bool) -> ExitCode {
    super::failure::complain("policy show: not built yet");
    ExitCode::from(1)
}
