//! A set of capabilities: from masks and from names, to names.

use std::fmt;

use caps::{Capability, CapsHashSet};
use serde::{Serialize, Serializer};

/// One set. Bits that nobody has named yet are kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct CapSet(pub(crate) u64);

/// So many missing ones are named instead of those that are there.
const FEW: u32 = 5;

impl CapSet {
    pub(crate) const NONE: Self = Self(0);

    /// Every capability that has a name.
    pub(crate) fn all() -> Self {
        caps::all().into()
    }

    /// The kernel's way of writing: hexadecimal, with or without `0x`.
    pub(crate) fn from_mask(text: &str) -> Result<Self, String> {
        let digits = text.strip_prefix("0x").unwrap_or(text);
        // from_str_radix takes a sign, which no mask has.
        let fine = !digits.is_empty() && digits.chars().all(|c| c.is_ascii_hexdigit());
        let mask = fine.then(|| u64::from_str_radix(digits, 16).ok()).flatten();
        mask.map(Self).ok_or_else(|| format!("{text} is no mask of up to 16 hexadecimal digits"))
    }

    /// One capability: `CAP_BPF`, `cap_bpf`, or `cap_63` of a later kernel.
    pub(crate) fn from_name(name: &str) -> Result<Self, String> {
        let upper = name.to_ascii_uppercase();
        if let Ok(known) = upper.parse::<Capability>() {
            return Ok(Self(known.bitmask()));
        }
        let number = upper.strip_prefix("CAP_").and_then(|digits| digits.parse::<u32>().ok());
        let mask = number.and_then(|bit| 1_u64.checked_shl(bit));
        mask.map(Self).ok_or_else(|| format!("{name} is no capability"))
    }

    /// Names with blanks or commas between them.
    pub(crate) fn from_list(list: &str) -> Result<Self, String> {
        let names = list.split([' ', ',', '\t']).filter(|name| !name.is_empty());
        names.map(Self::from_name).try_fold(Self::NONE, |set, name| Ok(set.with(name?)))
    }

    pub(crate) fn is_empty(self) -> bool {
        self.0 == 0
    }

    #[must_use]
    pub(crate) fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    #[must_use]
    pub(crate) fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    #[must_use]
    pub(crate) fn both(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    pub(crate) fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Its members, each as a set of one.
    pub(crate) fn each(self) -> impl Iterator<Item = Self> {
        (0..u64::BITS).map(|bit| Self(1 << bit)).filter(move |one| self.has(*one))
    }

    /// Names in the order of their numbers.
    pub(crate) fn names(self) -> Vec<String> {
        let names: Vec<(u64, String)> =
            caps::all().into_iter().map(|one| (one.bitmask(), one.to_string())).collect();
        let name = |one: Self| {
            let known = names.iter().find(|(mask, _)| *mask == one.0).map(|(_, name)| name.clone());
            known.unwrap_or_else(|| format!("cap_{}", one.0.trailing_zeros()))
        };
        self.each().map(name).collect()
    }

    /// All names, as unit files have them.
    pub(crate) fn list(self) -> String {
        self.names().join(" ")
    }
}

impl From<CapsHashSet> for CapSet {
    fn from(set: CapsHashSet) -> Self {
        Self(set.iter().fold(0, |mask, capability| mask | capability.bitmask()))
    }
}

impl fmt::Display for CapSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let missing = Self::all().without(*self);
        let beyond = self.without(Self::all());
        match missing.0.count_ones() {
            0 if beyond.is_empty() => f.write_str("all"),
            0 => write!(f, "all and {}", beyond.list()),
            few if few <= FEW && beyond.is_empty() => write!(f, "all but {}", missing.list()),
            _ if self.is_empty() => f.write_str("none"),
            _ => f.write_str(&self.list()),
        }
    }
}

impl Serialize for CapSet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.names().serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_decoded_as_capsh_does() {
        // capsh --decode=000000c001201106
        let names = "CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_SETPCAP CAP_NET_ADMIN CAP_SYS_ADMIN CAP_SYS_RESOURCE \
                     CAP_PERFMON CAP_BPF";
        assert_eq!(CapSet::from_mask("000000c001201106").unwrap().to_string(), names);
        assert_eq!(CapSet::from_list(names).unwrap(), CapSet(0x00c0_0120_1106));
        for wrong in ["", "0x", "+1", "-1", "12345678901234567", "cap_bpf"] {
            assert!(CapSet::from_mask(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn every_bit_has_a_name_that_is_read_again() {
        for bit in 0..64 {
            let one = CapSet(1 << bit);
            assert_eq!(CapSet::from_list(&one.list()), Ok(one));
            assert_eq!(CapSet::from_name(&one.list().to_lowercase()), Ok(one));
        }
        assert_eq!(CapSet(1 << 63).to_string(), "cap_63");
        for wrong in ["cap_64", "bpf", "CAP_", ""] {
            assert!(CapSet::from_name(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn large_sets_are_said_in_few_words() {
        let all = CapSet::all();
        assert_eq!(CapSet::NONE.to_string(), "none");
        assert_eq!(all.to_string(), "all");
        let resource = CapSet::from_name("CAP_SYS_RESOURCE").unwrap();
        assert_eq!(all.without(resource).to_string(), "all but CAP_SYS_RESOURCE");
        assert_eq!(all.with(CapSet(1 << 63)).to_string(), "all and cap_63");
        assert_eq!(serde_json::to_string(&resource).unwrap(), "[\"CAP_SYS_RESOURCE\"]");
    }
}
