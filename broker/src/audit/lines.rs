//! A file of records, or standard output. What there is no room for is kept, in its order, until there is.

use bpfgate_lockdown::{Fatal, Step};
use nix::errno::Errno;
use nix::sys::stat::fstat;
use nix::unistd::write;
use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

/// From a write that found no room to the next try.
const AGAIN: Duration = Duration::from_secs(1);

pub(super) struct Lines {
    /// None: standard output.
    file: Option<File>,
    /// What there was no room for, and how much of the first of it is written all the same. Nothing is given meanwhile:
    /// these are the records of requests that were with helpers, and of what root does.
    waiting: VecDeque<Vec<u8>>,
    written: usize,
    /// What the last write said, and when the next one is.
    full: Option<(Errno, Instant)>,
}

impl Lines {
    pub(super) fn to(file: Option<File>) -> Self {
        Self { file, waiting: VecDeque::new(), written: 0, full: None }
    }

    /// Why nothing can be written.
    pub(super) fn full(&self) -> Option<Errno> {
        self.full.map(|(errno, _)| errno)
    }

    /// When to call [`Lines::try_again`].
    pub(super) fn due(&self) -> Option<Instant> {
        self.full.map(|(_, at)| at)
    }

    pub(super) fn put(&mut self, line: Vec<u8>, now: Instant) -> Result<(), Fatal> {
        self.waiting.push_back(line);
        if self.full.is_some() { Ok(()) } else { self.write(now) }
    }

    /// Writes what waits, if it is time.
    pub(super) fn try_again(&mut self, now: Instant) -> Result<(), Fatal> {
        if self.due().is_none_or(|due| now < due) {
            return Ok(());
        }
        // Who made room by cutting the file has taken away the half of a record with it.
        if fstat(self.fd()).is_ok_and(|file| file.st_size == 0) {
            self.written = 0;
        }
        self.write(now)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // That of standard output is the process's, whoever asks for it.
        static STDOUT: std::sync::LazyLock<std::io::Stdout> = std::sync::LazyLock::new(std::io::stdout);
        self.file.as_ref().map_or_else(|| STDOUT.as_fd(), AsFd::as_fd)
    }

    fn write(&mut self, now: Instant) -> Result<(), Fatal> {
        while let Some(line) = self.waiting.front() {
            match write(self.fd(), &line[self.written..]) {
                Ok(0) => return Err(Fatal("writing an audit record: nothing is taken".into())),
                Ok(count) if self.written + count < line.len() => self.written += count,
                Ok(_) => {
                    self.written = 0;
                    self.waiting.pop_front();
                }
                Err(Errno::EINTR) => {}
                Err(errno @ (Errno::ENOSPC | Errno::EDQUOT)) => {
                    if self.full.replace((errno, now + AGAIN)).is_none() {
                        log::error!(
                            "audit records cannot be written ({}): nothing is given until they can",
                            errno.desc()
                        );
                    }
                    return Ok(());
                }
                Err(errno) => return Err(errno).step("writing an audit record"),
            }
        }
        if self.full.take().is_some() {
            log::info!("audit records can be written again, and none is missing");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_there_is_no_room_for_is_written_when_there_is() {
        let path = std::env::temp_dir().join(format!("bpfgate-lines-{}", std::process::id()));
        // Every write to it finds no room.
        let full = || Some(File::options().append(true).open("/dev/full").unwrap());
        let mut lines = Lines::to(full());
        let start = Instant::now();
        for line in ["one\n", "two\n"] {
            lines.put(line.into(), start).unwrap();
        }
        assert_eq!((lines.full(), lines.waiting.len()), (Some(Errno::ENOSPC), 2));
        lines.file = Some(File::options().append(true).create(true).open(&path).unwrap());
        lines.try_again(start).unwrap();
        assert_eq!(lines.waiting.len(), 2, "it was not time");
        lines.try_again(start + AGAIN).unwrap();
        lines.put("three\n".into(), start).unwrap();
        assert_eq!(lines.full(), None);
        let text = || std::fs::read_to_string(&path).unwrap();
        assert_eq!(text(), "one\ntwo\nthree\n");
        // A record that was half written goes on where it was, or is written anew in a file that was cut.
        for (there, after) in [("fo", "four\n"), ("", "four\n")] {
            std::fs::write(&path, there).unwrap();
            lines.waiting.push_back("four\n".into());
            (lines.written, lines.full) = (2, Some((Errno::ENOSPC, start)));
            lines.try_again(start).unwrap();
            assert_eq!(text(), after);
        }
        std::fs::remove_file(&path).unwrap();
    }
}
