//! The bytes of an object that a policy approves.

use super::Object;
use super::file::{open_regular, open_trusted};
use crate::names::ObjectName;
use crate::refusal::Refusal;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The largest object file in bytes. libbpf reads all of it.
pub const MAX_OBJECT: u64 = 16 << 20;

/// A sealed copy of an object, and its SHA-256.
#[derive(Debug)]
pub struct Approved {
    /// The copy.
    pub copy: OwnedFd,
    /// Its digest.
    pub digest: [u8; 32],
}

/// Opens an object, copies it, and compares the copy: from here on only the sealed copy counts.
///
/// Errors: `Object` (not there, not the approved bytes, or writable by others and without a digest)
pub fn approve(name: &ObjectName, object: &Object) -> Result<Approved, Refusal> {
    let refuse = |why: String| Refusal::object(format!("the file of object {name} {why}"));
    let path = Path::new(object.path.as_str());
    let file = match object.sha256 {
        // The digest says which bytes; who can write the file does not matter.
        Some(_) => open_regular(path).map_err(&refuse)?,
        // Who else could write it is for the log of the helper, not for clients.
        None => open_trusted(path).map(|(fd, _)| File::from(fd)).map_err(|why| {
            eprintln!("bpfgate-helper: {}: {why}", object.path);
            refuse(
                "is not root's alone, or a directory above it is not, and the policy has no sha256 for it"
                    .into(),
            )
        })?,
    };
    let mut bytes = Vec::new();
    let read = file.take(MAX_OBJECT + 1).read_to_end(&mut bytes);
    read.map_err(|e| refuse(format!("cannot be read: {e}")))?;
    if bytes.len() as u64 > MAX_OBJECT {
        return Err(refuse(format!("is larger than {MAX_OBJECT} bytes")));
    }
    let digest: [u8; 32] = Sha256::digest(&bytes).into();
    if object.sha256.is_some_and(|expected| expected != digest) {
        return Err(refuse("is not the one that the policy approves: its SHA-256 differs".into()));
    }
    let copy = sealed("bpfgate-object", &bytes).map_err(|e| refuse(format!("cannot be copied: {e}")))?;
    Ok(Approved { copy, digest })
}

/// Nobody changes a memfd with these.
pub const SEALS: SealFlag = SealFlag::F_SEAL_SEAL
    .union(SealFlag::F_SEAL_SHRINK)
    .union(SealFlag::F_SEAL_GROW)
    .union(SealFlag::F_SEAL_WRITE);

/// Bytes in a memfd that nobody changes any more.
pub fn sealed(name: &str, bytes: &[u8]) -> std::io::Result<OwnedFd> {
    let file = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    // pwrite, which the filters keep away from standard error.
    file.write_all_at(bytes, 0)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SEALS))?;
    Ok(file.into())
}
