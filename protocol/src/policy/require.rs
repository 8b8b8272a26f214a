//! What a policy demands of the machine. What is missing refuses: helper and broker ask the same question.

use super::{Require, Sandboxing, UnitCheck};
use crate::btf;
use nix::sys::utsname::uname;
use std::io;
use std::path::Path;

/// What there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// Version of the kernel, major and minor.
    pub kernel: (u32, u32),
    /// The kernel describes its types.
    pub btf: bool,
}

impl Machine {
    /// This one. Asked before the lock-down, after which there is no system call for it.
    pub fn here() -> io::Result<Self> {
        let release = uname()?.release().to_string_lossy().into_owned();
        let kernel = kernel_version(&release).ok_or_else(|| io::Error::other("no version of the kernel"))?;
        Ok(Self { kernel, btf: Path::new(btf::KERNEL).exists() })
    }
}

/// The first two numbers of a release such as `6.12.9-amd64`.
pub fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|text| text.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

impl Default for Require {
    fn default() -> Self {
        Self {
            sandbox: Sandboxing::Full,
            unit_check: UnitCheck::Helper,
            kernel: None,
            landlock: None,
            btf: false,
            line: 0,
        }
    }
}

impl Require {
    /// Whether both demand the same, wherever it stands.
    pub fn is_same(&self, other: &Self) -> bool {
        Self { line: 0, ..*self } == Self { line: 0, ..*other }
    }

    /// What is missing: a sentence. `landlock` is the ABI in force, 0 for none.
    pub fn missing(&self, machine: Machine, landlock: u32) -> Option<String> {
        if let Some((major, minor)) = self.kernel.filter(|least| machine.kernel < *least) {
            let (is_major, is_minor) = machine.kernel;
            return Some(format!(
                "the policy requires Linux {major}.{minor}, and this is {is_major}.{is_minor}"
            ));
        }
        if let Some(least) = self.landlock.filter(|least| landlock < *least) {
            return Some(format!("the policy requires landlock ABI {least}, and ABI {landlock} is in force"));
        }
        (self.btf && !machine.btf)
            .then(|| format!("the policy requires the kernel's BTF, and there is no {}", btf::KERNEL))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said() {
        let machine = Machine { kernel: (6, 1), btf: false };
        let none = Require::default();
        assert_eq!(none.missing(machine, 0), None);
        for (require, expected) in [
            (Require { kernel: Some((6, 6)), ..none }, Some("requires Linux 6.6, and this is 6.1")),
            (Require { kernel: Some((6, 1)), ..none }, None),
            (Require { kernel: Some((5, 19)), ..none }, None),
            (Require { kernel: Some((7, 0)), ..none }, Some("Linux 7.0")),
            (Require { landlock: Some(3), ..none }, Some("requires landlock ABI 3, and ABI 2 is")),
            (Require { landlock: Some(2), ..none }, None),
            (Require { btf: true, ..none }, Some("/sys/kernel/btf/vmlinux")),
        ] {
            let missing = require.missing(machine, 2);
            match expected {
                Some(expected) => assert!(missing.unwrap().contains(expected)),
                None => assert_eq!(missing, None),
            }
        }
        assert_eq!(Require { btf: true, ..none }.missing(Machine { btf: true, ..machine }, 0), None);
    }

    #[test]
    fn releases_are_understood() {
        for (release, expected) in [
            ("6.12.9-amd64\n", Some((6, 12))),
            ("6.1.0-39-cloud-amd64", Some((6, 1))),
            ("7.3", Some((7, 3))),
            ("6.10-rc1", Some((6, 10))),
            ("x", None),
            ("", None),
        ] {
            assert_eq!(kernel_version(release), expected, "{release}");
        }
        assert!(Machine::here().unwrap().kernel >= (5, 19));
    }
}
