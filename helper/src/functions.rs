//! The functions of the kernel that a policy names, and their numbers: looked up once, before the lock-down, in the
//! kernel's own description of its types. Programs and their loader name functions by these numbers, and are believed
//! none: what a number stands for is known from here.

use bpfgate_protocol::btf;
use bpfgate_protocol::names::FunctionName;
use bpfgate_protocol::policy::Policy;
use bpfgate_protocol::refusal::Refusal;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;

/// By name; one that could not be found is kept as the refusal that its use gets.
pub(crate) struct Functions(BTreeMap<FunctionName, Result<u32, Refusal>>);

impl Functions {
    /// Reads nothing where the policy names none.
    pub(crate) fn look_up(policy: &Policy) -> Self {
        let named: BTreeMap<&FunctionName, u32> =
            policy.kernel_functions().map(|(line, name)| (name, line)).collect();
        if named.is_empty() {
            return Self(BTreeMap::new());
        }
        let wanted: BTreeSet<FunctionName> = named.keys().map(|name| (*name).clone()).collect();
        let found = read().and_then(|btf| btf::functions(&btf, &wanted).map_err(str::to_owned));
        let number = |name: &FunctionName| match &found {
            Ok(found) => match found.get(name).map_or(&[][..], Vec::as_slice) {
                [id] => Ok(*id),
                [] => Err(format!(
                    "this kernel has no function {name} in {}: it is not there, was inlined, or is in a module",
                    btf::KERNEL
                )),
                ids => {
                    let count = ids.len();
                    Err(format!("this kernel has {count} functions {name}, which cannot be told apart"))
                }
            },
            Err(why) => Err(format!("function {name} cannot be looked up: {} {why}", btf::KERNEL)),
        };
        let known = named.into_iter().map(|(name, line)| {
            let number = number(name).map_err(|why| {
                eprintln!("bpfgate-helper: {}: {why}", policy.at(line));
                Refusal::unsupported(why).by_line(line)
            });
            (name.clone(), number)
        });
        Self(known.collect())
    }

    /// Whether it was looked up, whatever came of it.
    pub(crate) fn has(&self, name: &FunctionName) -> bool {
        self.0.contains_key(name)
    }

    /// Its number.
    ///
    /// Errors: `Unsupported` (this kernel has none, or several, of the name)
    pub(crate) fn number(&self, name: &FunctionName) -> Result<u32, Refusal> {
        let unknown = || Err(Refusal::denied(format!("function {name} was not looked up")));
        self.0.get(name).cloned().unwrap_or_else(unknown)
    }

    /// The name that a number stands for, if it is that of a function that the policy names.
    pub(crate) fn name(&self, number: u32) -> Option<&FunctionName> {
        let is = |(_, known): &(&FunctionName, &Result<u32, Refusal>)| **known == Ok(number);
        self.0.iter().find(is).map(|(name, _)| name)
    }
}

fn read() -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let read = File::open(btf::KERNEL).and_then(|file| file.take(btf::MAX + 1).read_to_end(&mut bytes));
    read.map_err(|error| format!("cannot be read: {error}"))?;
    if bytes.len() as u64 > btf::MAX {
        return Err(format!("is larger than {} bytes", btf::MAX));
    }
    Ok(bytes)
}
