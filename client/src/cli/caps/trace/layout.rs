//! What the maps of `cap_trace.bpf.c` hold. The structs there and the readers here say the same, in the same order.

/// `struct check`: equal checks have an equal one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Check {
    pub(super) tgid: u32,
    pub(super) tid: u32,
    pub(super) cgroup: u64,
    pub(super) stack: u64,
    pub(super) uid: u32,
    pub(super) userns: u32,
    /// Negative: `NO_SYSCALL`, `SYSCALL_NOT_SEEN`.
    pub(super) syscall: i32,
    pub(super) bpf_command: Option<u32>,
    pub(super) bpf_type: Option<u32>,
    pub(super) cap: u8,
    pub(super) verdict: u8,
    pub(super) audit: u8,
    pub(super) compat: bool,
    pub(super) comm: String,
}

/// `struct tally`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) count: u64,
    pub(super) harmless: u64,
    pub(super) open: u64,
    pub(super) first: u64,
    pub(super) last: u64,
}

/// `struct total`, of all CPUs together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Total {
    pub(super) seen: u64,
    pub(super) lost: u64,
    pub(super) unplaced: u64,
    pub(super) unfollowed: u64,
}

/// `enum verdict`
pub(super) const GRANTED: u8 = 0;
pub(super) const DENIED: u8 = 1;
/// `enum audit`
pub(super) const AUDIT_YES: u8 = 1;
pub(super) const AUDIT_NO: u8 = 2;
/// `enum syscall`
pub(super) const SYSCALL_NOT_SEEN: i32 = -2;
/// `enum scope`
pub(super) const SCOPE_CGROUP: i64 = 1;
pub(super) const SCOPE_PROCESSES: i64 = 2;
pub(super) const SCOPE_EVERYTHING: i64 = 3;

/// Takes the fields of a struct off, one after the other.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*field)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take::<1>().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_ne_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_ne_bytes)
    }

    /// All must be used up: otherwise the object is of another version.
    fn end<T>(&self, value: T) -> Option<T> {
        self.0.is_empty().then_some(value)
    }
}

impl Check {
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let mut fields = Fields(bytes);
        let check = Self {
            tgid: fields.u32()?,
            tid: fields.u32()?,
            cgroup: fields.u64()?,
            stack: fields.u64()?,
            uid: fields.u32()?,
            userns: fields.u32()?,
            syscall: fields.u32()?.cast_signed(),
            bpf_command: unless_none(fields.u32()?),
            bpf_type: unless_none(fields.u32()?),
            cap: fields.u8()?,
            verdict: fields.u8()?,
            audit: fields.u8()?,
            compat: fields.u8()? != 0,
            comm: text(&fields.take::<16>()?),
        };
        fields.end(check)
    }
}

impl Tally {
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let mut fields = Fields(bytes);
        let tally = Self {
            count: fields.u64()?,
            harmless: fields.u64()?,
            open: fields.u64()?,
            first: fields.u64()?,
            last: fields.u64()?,
        };
        fields.end(tally)
    }
}

impl Total {
    /// Adds what one CPU counted.
    pub(super) fn add(&mut self, bytes: &[u8]) -> Option<()> {
        let mut fields = Fields(bytes);
        for sum in [&mut self.seen, &mut self.lost, &mut self.unplaced, &mut self.unfollowed] {
            *sum += fields.u64()?;
        }
        fields.end(())
    }
}

/// `NONE` stands for no number.
fn unless_none(number: u32) -> Option<u32> {
    (number != u32::MAX).then_some(number)
}

/// A C string.
pub(super) fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_is_read_field_by_field() {
        let mut bytes = Vec::new();
        for number in [7u32, 8] {
            bytes.extend(number.to_ne_bytes());
        }
        bytes.extend(9u64.to_ne_bytes());
        bytes.extend(10u64.to_ne_bytes());
        for number in [1000u32, 0xf000_0000, 321, 5, u32::MAX] {
            bytes.extend(number.to_ne_bytes());
        }
        bytes.extend([39, 1, 2, 1]);
        bytes.extend(*b"sh\0remains\0\0\0\0\0\0");
        let check = Check::read(&bytes).unwrap();
        assert_eq!((check.tgid, check.tid, check.cgroup, check.stack), (7, 8, 9, 10));
        assert_eq!((check.uid, check.userns, check.syscall), (1000, 0xf000_0000, 321));
        assert_eq!((check.bpf_command, check.bpf_type), (Some(5), None));
        assert_eq!((check.cap, check.verdict, check.audit, check.compat), (39, DENIED, AUDIT_NO, true));
        assert_eq!(check.comm, "sh");
        bytes.push(0);
        assert_eq!(Check::read(&bytes), None, "of another version");
        assert_eq!(Check::read(&bytes[..40]), None);
    }

    #[test]
    fn totals_are_those_of_all_cpus() {
        let cpu: Vec<u8> = [4u64, 3, 2, 1].iter().flat_map(|number| number.to_ne_bytes()).collect();
        let mut total = Total::default();
        assert!(total.add(&cpu).is_some() && total.add(&cpu).is_some() && total.add(&cpu[8..]).is_none());
        let mut twice = Total::default();
        twice.add(&cpu).and_then(|()| twice.add(&cpu)).unwrap();
        assert_eq!(twice, Total { seen: 8, lost: 6, unplaced: 4, unfollowed: 2 });
    }
}
