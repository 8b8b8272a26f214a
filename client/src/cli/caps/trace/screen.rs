//! The checks as a table that takes the screen of a terminal, with the newest or the most frequent on top.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{LocalFlags, SetArg, SpecialCharacterIndices, Termios, tcgetattr, tcsetattr};
use terminal_size::terminal_size;

use super::lines;
use super::observation::{Distinct, Observation};
use super::tracer::Account;
use crate::cli::failure::Failure;

/// The alternate screen, without a cursor; and back.
const TAKE: &str = "\x1b[?1049h\x1b[?25l";
const GIVE_BACK: &str = "\x1b[?25h\x1b[?1049l";

/// What is on top.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Newest,
    Count,
    Capability,
}

impl Order {
    fn next(self) -> Self {
        match self {
            Self::Newest => Self::Count,
            Self::Count => Self::Capability,
            Self::Capability => Self::Newest,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Newest => "newest first",
            Self::Count => "most frequent first",
            Self::Capability => "by capability",
        }
    }
}

pub(super) struct Screen {
    /// As the terminal was.
    before: Termios,
    table: Table,
}

/// What is shown, apart from where.
struct Table {
    backend: &'static str,
    all: Distinct,
    order: Order,
    paused: bool,
}

impl Screen {
    /// Takes the screen until this is dropped.
    pub(super) fn take(backend: &'static str) -> Result<Self, Failure> {
        let stdin = io::stdin();
        let before = tcgetattr(&stdin).map_err(io::Error::from)?;
        let mut raw = before.clone();
        raw.local_flags.remove(LocalFlags::ICANON | LocalFlags::ECHO);
        // Ctrl-Z would leave the shell with this screen.
        raw.control_chars[SpecialCharacterIndices::VSUSP as usize] = 0;
        tcsetattr(&stdin, SetArg::TCSANOW, &raw).map_err(io::Error::from)?;
        let table = Table { backend, all: Distinct::default(), order: Order::Newest, paused: false };
        let screen = Self { before, table };
        write(TAKE)?;
        Ok(screen)
    }

    /// Adds what is new and draws; while it is paused, only the last line.
    pub(super) fn show(&mut self, new: &[Observation], account: &Account) -> Result<(), Failure> {
        for check in new {
            self.table.all.add(check.clone());
        }
        // A terminal that does not say how large it is has the size that terminals once had.
        let (width, height) = terminal_size().map_or((80, 24), |(width, height)| (width.0, height.0));
        if self.table.paused {
            return Ok(write(&format!("\x1b[{height};1Hpaused, {account}; p goes on\x1b[K"))?);
        }
        Ok(write(&self.table.draw(account, usize::from(width), usize::from(height)))?)
    }

    /// Does what the keys say that were pressed; whether that is to end.
    pub(super) fn obey(&mut self) -> Result<bool, Failure> {
        let stdin = io::stdin();
        let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::ZERO).map_err(io::Error::from)? == 0 {
            return Ok(false);
        }
        let mut keys = [0; 64];
        let got = nix::unistd::read(&stdin, &mut keys).map_err(io::Error::from)?;
        // Nobody is there any more.
        Ok(got == 0 || keys[..got].iter().any(|key| self.table.obey(*key)))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = write(GIVE_BACK);
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.before);
    }
}

impl Table {
    fn obey(&mut self, key: u8) -> bool {
        match key {
            b'q' => return true,
            b'p' | b' ' => self.paused = !self.paused,
            b's' => self.order = self.order.next(),
            _ => {}
        }
        false
    }

    fn draw(&self, account: &Account, width: usize, height: usize) -> String {
        let mut checks: Vec<&Observation> = self.all.all().iter().collect();
        match self.order {
            Order::Newest => checks.sort_by(|a, b| b.time.total_cmp(&a.time)),
            Order::Count => checks.sort_by_key(|check| std::cmp::Reverse(check.count)),
            Order::Capability => checks.sort_by_key(|check| (check.number, check.verdict)),
        }
        let head = format!(
            "{account}, by {}; {} kinds, {}; q ends, p pauses, s sorts",
            self.backend,
            checks.len(),
            self.order.word()
        );
        let rows = [head, lines::heading()].into_iter().chain(checks.into_iter().map(lines::line));
        let mut text = "\x1b[H".to_owned();
        // The last line stays empty: a line feed there would scroll.
        for row in rows.take(height.saturating_sub(1)) {
            let row: String = row.chars().take(width).collect();
            let _ = write!(text, "{row}\x1b[K\r\n");
        }
        text + "\x1b[J"
    }
}

fn write(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::caps::trace::observation::example;

    fn rows(text: &str) -> Vec<&str> {
        let text = text.strip_prefix("\x1b[H").unwrap().strip_suffix("\x1b[J").unwrap();
        text.split_terminator("\x1b[K\r\n").collect()
    }

    #[test]
    fn the_table_is_sorted_and_fits() {
        let mut all = Distinct::default();
        all.add(Observation { time: 1_795_370_401.0, ..example() });
        all.add(Observation { number: 0, cap: "CAP_CHOWN".into(), count: 9, ..example() });
        let mut table = Table { backend: "a backend", all, order: Order::Newest, paused: false };
        let account = Account { seen: 12, ..Account::default() };
        let order = |table: &Table| {
            let text = table.draw(&account, 200, 24);
            rows(&text)[2..].iter().map(|row| row.contains("CHOWN")).collect::<Vec<_>>()
        };
        assert_eq!(order(&table), [false, true]);
        assert!(!table.obey(b's') && !table.obey(b'x'));
        assert_eq!(order(&table), [true, false], "the more frequent one is first");
        table.obey(b's');
        assert_eq!(order(&table), [true, false], "capability 0 is first");
        let text = table.draw(&account, 20, 4);
        assert_eq!(rows(&text).len(), 3);
        assert!(rows(&text).iter().all(|row| row.chars().count() <= 20), "{text:?}");
        table.obey(b'p');
        assert!(table.paused && table.obey(b'q'));
    }
}
