//! The system calls that each process of bpfgate may make. The lists are those of the programs themselves, read from
//! their own source.

use crate::sys::Instruction;
use bpfgate_lockdown::syscalls::{Filters, Row, compile};

#[path = "../../broker/src/seccomp.rs"]
mod broker;
#[path = "../../helper/src/seccomp.rs"]
#[allow(dead_code, reason = "what debug builds have beside that is of no interest")]
mod helper;
#[path = "../../loader/src/seccomp.rs"]
mod loader;

/// A process that confines itself.
#[derive(Debug)]
pub struct Role {
    /// What it is.
    pub name: &'static str,
    /// Its lists, the first that it installs first: the worker is born with those of its parent.
    lists: Vec<Vec<Row>>,
}

/// All of them. The spawner has no list: it keeps privilege, as PID 1 does in its place.
pub fn all() -> [Role; 7] {
    let helper = |service: &[Row]| [&helper::ROWS, service].concat();
    [
        ("broker", vec![broker::rows(false)]),
        ("broker of a service", vec![broker::rows(true)]),
        ("helper", vec![helper(&[])]),
        ("helper of a service", vec![helper(&helper::SERVICE_ROWS)]),
        ("loader", vec![loader::parent()]),
        ("worker", vec![loader::parent(), loader::worker()]),
        ("describer", vec![loader::describer()]),
    ]
    .map(|(name, lists)| Role { name, lists })
}

impl Role {
    /// The one of this name.
    pub fn named(name: &str) -> Self {
        all().into_iter().find(|role| role.name == name).unwrap_or_else(|| panic!("nothing is {name:?}"))
    }

    /// What it may call: whatever is not on its last list is refused.
    pub fn rows(&self) -> &[Row] {
        self.lists.last().map_or(&[], Vec::as_slice)
    }

    /// Its filters.
    pub fn filters(&self) -> Vec<Filters> {
        self.lists.iter().map(|rows| compile(rows).expect("it compiles")).collect()
    }

    /// The same as programs, in the order in which they are installed.
    pub fn programs(&self) -> Vec<Vec<Instruction>> {
        let plain = |program: &bpfgate_lockdown::syscalls::Program| {
            let one =
                program.iter().map(|one| Instruction { code: one.code, jt: one.jt, jf: one.jf, k: one.k });
            one.collect::<Vec<_>>()
        };
        self.filters().iter().flat_map(|filters| [plain(&filters.soft), plain(&filters.hard)]).collect()
    }
}
