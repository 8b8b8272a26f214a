//! Reading a policy file: only one that nobody but root can have written.

use super::{Policy, PolicyError};
use crate::names::AppName;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};
use nix::sys::statfs::{FsType, fstatfs};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

/// A policy file is at most so many bytes: a thousand rules are a tenth of it.
pub const MAX_FILE: u64 = 256 * 1024;

/// Where policies are looked for if nothing else is said; an earlier directory's file replaces a later one's.
pub const DIRECTORIES: [&str; 2] = ["/etc/bpfgate/policies", "/usr/lib/bpfgate/policies"];

/// Where accounts are: users, and groups.
pub const ACCOUNTS: [&str; 2] = ["/etc/passwd", "/etc/group"];

/// Users and groups by name, from /etc/passwd and /etc/group alone: no NSS module runs in a process of ours.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Accounts {
    /// Names to uids.
    pub users: BTreeMap<String, u32>,
    /// Names to gids.
    pub groups: BTreeMap<String, u32>,
}

impl Accounts {
    /// Reads both files.
    pub fn read() -> io::Result<Self> {
        let [users, groups] = ACCOUNTS.map(std::fs::read);
        Ok(Self::parse(&users?, &groups?))
    }

    /// From the bytes of both.
    pub fn parse(users: &[u8], groups: &[u8]) -> Self {
        let table = |bytes: &[u8]| -> BTreeMap<String, u32> {
            let text = String::from_utf8_lossy(bytes).into_owned();
            let entry = |line: &str| {
                let mut fields = line.split(':');
                let (name, _, id) = (fields.next()?, fields.next()?, fields.next()?);
                Some((name.to_owned(), id.parse().ok()?))
            };
            text.lines().filter_map(entry).collect()
        };
        Self { users: table(users), groups: table(groups) }
    }
}

/// Why a file is not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotTaken {
    /// A part of a sentence about the file.
    pub why: String,
    /// It says nothing about the file: this process, or the machine, could not do it now.
    pub passing: bool,
}

impl NotTaken {
    fn failed(what: &str, errno: Errno) -> Self {
        Self { why: format!("cannot be {what}: {}", errno.desc()), passing: is_passing(errno) }
    }
}

impl<Text: Into<String>> From<Text> for NotTaken {
    fn from(why: Text) -> Self {
        Self { why: why.into(), passing: false }
    }
}

impl fmt::Display for NotTaken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

/// Whether an error may be another one, or none, a moment later, with nobody having changed the file.
fn is_passing(errno: Errno) -> bool {
    use Errno::{EAGAIN, EINTR, EIO, EMFILE, ENFILE, ENOMEM};
    [EAGAIN, EINTR, EIO, EMFILE, ENFILE, ENOMEM].contains(&errno)
}

/// The same of an error of the standard library.
pub fn is_passing_error(error: &io::Error) -> bool {
    error.raw_os_error().is_some_and(|number| is_passing(Errno::from_raw(number)))
}

/// Why a file must not be trusted: a part of a sentence about it. `None` if root alone can write it.
pub fn writable_by_others(stat: &FileStat) -> Option<String> {
    if stat.st_uid != 0 {
        return Some(format!("belongs to uid {}, not to root", stat.st_uid));
    }
    match stat.st_mode & 0o022 {
        0 => None,
        bits if bits & 0o002 != 0 => {
            Some(format!("may be written by others (mode {:04o})", stat.st_mode & 0o7777))
        }
        _ => {
            Some(format!("may be written by its group {} (mode {:04o})", stat.st_gid, stat.st_mode & 0o7777))
        }
    }
}

/// Opens `path` from the root directory step by step. No step may be a symbolic link, and root alone may be able
/// to write any of them: then nobody else can have put another file there, now or between two looks.
pub fn open_trusted(path: &Path) -> Result<(OwnedFd, FileStat), NotTaken> {
    let mut parts: Vec<&std::ffi::OsStr> = Vec::new();
    for component in path.components() {
        match component {
            Component::RootDir => {}
            Component::Normal(part) => parts.push(part),
            _ => return Err("is not an absolute path in normal form".into()),
        }
    }
    if !path.is_absolute() || parts.is_empty() {
        return Err("is not an absolute path in normal form".into());
    }
    let flags = OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut walked = String::new();
    let mut here: OwnedFd = nix::fcntl::open("/", OFlag::O_PATH | OFlag::O_DIRECTORY | flags, Mode::empty())
        .map_err(|e| NotTaken::failed("opened", e))?;
    for (i, part) in parts.iter().enumerate() {
        let parent = fstat(&here).map_err(|e| NotTaken::failed("examined", e))?;
        if let Some(why) = writable_by_others(&parent) {
            let directory = if walked.is_empty() { "/" } else { &walked };
            return Err(format!("is not safe: its directory {directory} {why}").into());
        }
        let last = i + 1 == parts.len();
        // O_NONBLOCK: opening a FIFO must not wait; it is refused right after.
        let kind = if last {
            OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY
        } else {
            OFlag::O_PATH | OFlag::O_DIRECTORY
        };
        here = open_step(here.as_fd(), part, kind | flags)?;
        walked = format!("{walked}/{}", part.to_string_lossy());
    }
    let kind = fstatfs(&here).map_err(|e| NotTaken::failed("examined", e))?.filesystem_type();
    if let Some(who) = decided_elsewhere(kind) {
        return Err(format!("is on a file system whose contents {who}, not root of this machine").into());
    }
    let stat = fstat(&here).map_err(|e| NotTaken::failed("examined", e))?;
    if SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) != SFlag::S_IFREG {
        return Err("is not a regular file".into());
    }
    match writable_by_others(&stat) {
        Some(why) => Err(why.into()),
        None => Ok((here, stat)),
    }
}

/// Looks at what stands at `path` without opening it, by the rules of [`open_trusted`]: for a process that can open
/// nothing.
pub fn look_trusted(path: &Path) -> Result<FileStat, NotTaken> {
    let normal = |component: &Component<'_>| matches!(component, Component::RootDir | Component::Normal(_));
    if !path.is_absolute() || !path.components().all(|component| normal(&component)) {
        return Err("is not an absolute path in normal form".into());
    }
    for directory in path.ancestors().skip(1) {
        let stat = look(directory).map_err(|e| NotTaken::failed("examined", e))?;
        if stat.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFDIR.bits() {
            return Err(format!("leads through a symbolic link or a file ({})", directory.display()).into());
        }
        if let Some(why) = writable_by_others(&stat) {
            return Err(format!("is not safe: its directory {} {why}", directory.display()).into());
        }
    }
    let stat = look(path).map_err(|e| NotTaken::failed("examined", e))?;
    if stat.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() {
        return Err("is not a regular file".into());
    }
    writable_by_others(&stat).map_or(Ok(stat), |why| Err(why.into()))
}

/// lstat(2) by the one system call that is on the helper's list.
fn look(path: &Path) -> nix::Result<FileStat> {
    fstatat(AT_FDCWD, path, AtFlags::AT_SYMLINK_NOFOLLOW)
}

/// The bytes of the file at `path`, which is as [`look_trusted`] wants it, from a descriptor that somebody has opened who
/// is not believed that it is this file.
pub fn read_handed(path: &Path, fd: OwnedFd, max: u64) -> Result<Vec<u8>, NotTaken> {
    let (there, fd) = (look_trusted(path)?, File::from(fd));
    let got = fstatat(&fd, "", AtFlags::AT_EMPTY_PATH).map_err(|e| NotTaken::failed("examined", e))?;
    if (there.st_dev, there.st_ino) != (got.st_dev, got.st_ino) {
        return Err("is another file than the one that was handed over".into());
    }
    let size = u64::try_from(got.st_size).unwrap_or(0);
    if size > max {
        return Err(format!("is larger than {max} bytes").into());
    }
    let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
    // It may have become shorter; it has not become longer than what root was judged to have written by then.
    let mut len = 0;
    while len < bytes.len() {
        match fd.read_at(&mut bytes[len..], len as u64).map_err(|e| failed_to_read(&e))? {
            0 => break,
            more => len += more,
        }
    }
    bytes.truncate(len);
    Ok(bytes)
}

/// Who decides what a file of this kind of file system holds, and who owns it, if that is not the kernel: owner and mode
/// say nothing there. Source of the numbers: include/uapi/linux/magic.h.
fn decided_elsewhere(kind: FsType) -> Option<&'static str> {
    const SERVER: &str = "a server decides";
    const PROCESS: &str = "a process decides";
    [
        (0x6969, SERVER),       // NFS
        (0x517b, SERVER),       // SMB
        (0xff53_4d42, SERVER),  // CIFS
        (0xfe53_4d42, SERVER),  // SMB2
        (0x00c3_6400, SERVER),  // Ceph
        (0x5346_414f, SERVER),  // AFS
        (0x6b41_4653, SERVER),  // kAFS
        (0x7375_7245, SERVER),  // Coda
        (0x0102_1997, SERVER),  // 9P
        (0x6573_5546, PROCESS), // FUSE
    ]
    .into_iter()
    .find_map(|(magic, who)| (kind.0 == magic).then_some(who))
}

fn open_step(at: BorrowedFd<'_>, part: &std::ffi::OsStr, flags: OFlag) -> Result<OwnedFd, NotTaken> {
    openat(at, part, flags, Mode::empty()).map_err(|errno| match errno {
        Errno::ENOENT => "does not exist".into(),
        Errno::ELOOP | Errno::ENOTDIR => {
            format!("is, or leads through, a symbolic link or a file ({})", part.to_string_lossy()).into()
        }
        other => NotTaken::failed("opened", other),
    })
}

fn failed_to_read(error: &io::Error) -> NotTaken {
    NotTaken { why: format!("cannot be read: {error}"), passing: is_passing_error(error) }
}

/// Reads the policy of one app: the file `APP.toml` of the first directory that has one.
/// `Ok(None)`: no directory has one.
pub fn read(directories: &[impl AsRef<Path>], app: &AppName) -> Result<Option<Policy>, PolicyError> {
    find(directories, app).map(|path| read_file(&path)).transpose()
}

/// The path that counts for an app: that of the first directory that has something of its name. A link or anything
/// else counts as there: it is refused, not passed over.
pub fn find(directories: &[impl AsRef<Path>], app: &AppName) -> Option<PathBuf> {
    let there = |path: &PathBuf| !matches!(look(path), Err(Errno::ENOENT | Errno::ENOTDIR));
    directories.iter().map(|directory| directory.as_ref().join(format!("{app}.toml"))).find(there)
}

/// Reads one policy file, which root alone can have written.
pub fn read_file(path: &Path) -> Result<Policy, PolicyError> {
    read_file_with(path, &accounts_for(&path.display().to_string())?)
}

fn accounts_for(name: &str) -> Result<Accounts, PolicyError> {
    let fail = |e| format!("the policy file cannot be judged: /etc/passwd or /etc/group: {e}");
    Accounts::read().map_err(|e| PolicyError::of_file(name, fail(e), None))
}

/// The same, with accounts that were read before: for many files.
pub fn read_file_with(path: &Path, accounts: &Accounts) -> Result<Policy, PolicyError> {
    let name = path.display().to_string();
    let fail = |not: NotTaken| {
        let help =
            "a policy is a regular file that belongs to root, in directories of root, mode 0644 or stricter";
        let help = (!not.passing).then_some(help);
        PolicyError::of_file(&name, format!("the policy file {not}"), help).passing(not.passing)
    };
    let (fd, _) = open_trusted(path).map_err(fail)?;
    Policy::parse(&name, &text(&name, fd)?, accounts)
}

/// Reads a policy file whoever owns it: to check one before it is installed. Never to decide anything.
pub fn read_untrusted(path: &Path) -> Result<Policy, PolicyError> {
    let name = path.display().to_string();
    Policy::parse(&name, &text_untrusted(path)?, &accounts_for(&name)?)
}

/// The text of a policy file whoever owns it.
pub fn text_untrusted(path: &Path) -> Result<String, PolicyError> {
    let name = path.display().to_string();
    let file = open_regular(path)
        .map_err(|why| PolicyError::of_file(&name, format!("the policy file {why}"), None))?;
    text(&name, file.into())
}

/// Opens a regular file, whoever owns it; or a part of a sentence about it. Nothing else is opened at all, for whoever can
/// write the directory may have put it there: opening a FIFO waits, and opening some devices does something.
pub fn open_regular(path: &Path) -> Result<File, String> {
    let place = nix::fcntl::open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty());
    let place = place.map_err(|e| format!("cannot be opened: {}", e.desc()))?;
    let stat = fstat(&place).map_err(|e| format!("cannot be examined: {}", e.desc()))?;
    if stat.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() {
        return Err("is not a regular file".into());
    }
    let path = format!("/proc/self/fd/{}", place.as_raw_fd());
    let file = nix::fcntl::open(path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty());
    file.map(File::from).map_err(|e| format!("cannot be opened: {}", e.desc()))
}

fn text(name: &str, fd: OwnedFd) -> Result<String, PolicyError> {
    let fail = |not: NotTaken| {
        PolicyError::of_file(name, format!("the policy file {not}"), None).passing(not.passing)
    };
    let mut bytes = Vec::new();
    let read = File::from(fd).take(MAX_FILE + 1).read_to_end(&mut bytes);
    read.map_err(|error| fail(failed_to_read(&error)))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(fail(format!("is larger than {MAX_FILE} bytes").into()));
    }
    String::from_utf8(bytes).map_err(|_| fail("is not UTF-8 text".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_must_not_write() {
        let mut stat = fstat(File::open("/etc/passwd").unwrap()).unwrap();
        for (uid, mode, bad) in [
            (0, 0o100_644, false),
            (0, 0o100_600, false),
            (0, 0o100_664, true),
            (0, 0o100_646, true),
            (0, 0o041_777, true),
            (1, 0o100_644, true),
        ] {
            (stat.st_uid, stat.st_mode) = (uid, mode);
            assert_eq!(writable_by_others(&stat).is_some(), bad, "{uid} {mode:o}");
        }
    }

    #[test]
    fn a_path_through_tmp_or_a_link_is_not_trusted() {
        for (path, why) in [
            ("/tmp/x", "its directory /tmp may be written by others"),
            ("/proc/self/status", "symbolic link"),
            ("/nonexistent/x", "does not exist"),
            ("/dev/null", ""),
            ("/etc", "not a regular file"),
            ("relative", "absolute"),
            ("/etc/../etc/passwd", "normal form"),
        ] {
            let error = open_trusted(Path::new(path)).unwrap_err();
            assert!(error.why.contains(why) && !error.passing, "{path}: {error}");
        }
        assert!(open_trusted(Path::new("/etc/passwd")).is_ok());
    }

    #[test]
    fn a_look_judges_as_an_opening_does() {
        for path in [
            "/tmp/x",
            "/proc/self/status",
            "/nonexistent/x",
            "/dev/null",
            "/etc",
            "relative",
            "/etc/../etc/passwd",
            "/etc/passwd",
            "/etc/group",
            "/",
        ] {
            let path = Path::new(path);
            assert_eq!(look_trusted(path).is_ok(), open_trusted(path).is_ok(), "{}", path.display());
        }
    }

    #[test]
    fn what_is_handed_over_is_the_file_or_nothing() {
        let passwd = Path::new("/etc/passwd");
        let open = |path: &str| File::open(path).unwrap().into();
        assert_eq!(
            read_handed(passwd, open("/etc/passwd"), 1 << 20).unwrap(),
            std::fs::read(passwd).unwrap()
        );
        for other in ["/etc/group", "/dev/null", "/etc"] {
            let error = read_handed(passwd, open(other), 1 << 20).unwrap_err();
            assert!(error.why.contains("another file"), "{other}: {error}");
        }
        assert!(read_handed(passwd, open("/etc/passwd"), 3).unwrap_err().why.contains("larger than 3"));
    }

    /// POL-05.
    #[test]
    fn only_the_kernel_decides_who_owns_a_file() {
        for (magic, who) in [
            (0x6969, Some("a server decides")),
            (0x6573_5546, Some("a process decides")),
            (0xef53, None),
            (0x0102_1994, None),
            (0x794c_7630, None),
        ] {
            assert_eq!(decided_elsewhere(FsType(magic)), who, "{magic:x}");
        }
    }

    #[test]
    fn accounts_are_read_from_files() {
        let accounts = Accounts::read().unwrap();
        assert_eq!((accounts.users["root"], accounts.groups["root"]), (0, 0));
    }
}
