//! One load: libbpf, in the loader, asks for maps, types and programs; here each is compared with the permit and
//! made. The loader is believed nothing: it says which of the permitted programs it means, and everything
//! else is read from the bytes it sent.

use crate::attach::forbidden;
use crate::inventory::Inventory;
use crate::loader::Loader;
use crate::maps::{Issued, Map};
use bpfgate_bpf as bpf;
use bpfgate_protocol::authorize::LoadPermit;
use bpfgate_protocol::functions::Function;
use bpfgate_protocol::inspect::{self, Call, INSN};
use bpfgate_protocol::messages::Bulk;
use bpfgate_protocol::messages::loader::{
    FromLoader, Handle, LogWanted, MapCreate, ProgLoad, Purpose, ToLoader,
};
use bpfgate_protocol::names::{MapName, ProgramName};
use bpfgate_protocol::refusal::{Class, Refusal, printable};
use nix::errno::Errno;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// The most of the verifier's log that is kept, in bytes. Newer kernels keep its end, where the reason stands.
const MAX_LOG: usize = 1 << 20;

/// Kernel objects of one load, probes of libbpf included. A first load in a new worker makes about 25.
const MAX_HELD: usize = 400;

/// All BTF of one load, in bytes: that of the object, and of probes.
const MAX_BTF: usize = inspect::MAX_BTF + (1 << 20);

/// What the app may still have.
#[derive(Clone, Copy)]
pub(crate) struct Budget {
    pub(crate) programs: u32,
    pub(crate) maps: u32,
    pub(crate) map_bytes: u64,
}

/// A load that is done.
pub(crate) struct Loaded {
    pub(crate) programs: Vec<(ProgramName, OwnedFd)>,
    pub(crate) maps: Vec<Map>,
    pub(crate) map_bytes: u64,
    /// Functions that its programs call and that need a grant.
    pub(crate) functions: BTreeSet<Function>,
}

/// A load that failed, with the verifier's log.
pub(crate) struct Failed {
    pub(crate) refusal: Refusal,
    pub(crate) log: Bulk,
    pub(crate) log_fd: Option<OwnedFd>,
}

impl From<Refusal> for Failed {
    fn from(refusal: Refusal) -> Self {
        Self { refusal, log: Bulk::empty(), log_fd: None }
    }
}

enum Held {
    Map { fd: OwnedFd, purpose: Purpose, frozen: bool },
    Btf(OwnedFd),
}

struct Transaction<'a> {
    permit: &'a LoadPermit,
    budget: Budget,
    inventory: &'a Inventory,
    held: Vec<Held>,
    programs: Vec<Option<OwnedFd>>,
    maps: u32,
    map_bytes: u64,
    btf_left: usize,
    functions: RefCell<BTreeSet<Function>>,
    /// The newest reason why libbpf will fail; it knows only an errno.
    refusal: Option<Refusal>,
}

pub(crate) fn load(
    loader: &mut Loader,
    permit: &LoadPermit,
    object: BorrowedFd<'_>,
    budget: Budget,
    inventory: &Inventory,
) -> Result<Loaded, Failed> {
    let programs = permit.plan();
    if programs.len() > budget.programs as usize {
        let limit = permit.policy().limits.programs;
        return Err(Refusal::quota(format!(
            "this would be more than the {limit} programs that the policy allows at a time"
        ))
        .into());
    }
    // Before the loader looks for it, and says so in the words of libbpf.
    for name in permit.programs().filter_map(|rule| rule.hook.bound_to()) {
        inventory.functions.number(name)?;
    }
    let mut transaction = Transaction {
        permit,
        budget,
        inventory,
        held: Vec::new(),
        programs: programs.iter().map(|_| None).collect(),
        maps: 0,
        map_bytes: 0,
        btf_left: MAX_BTF,
        functions: RefCell::default(),
        refusal: None,
    };
    let globals = permit.globals().to_vec();
    loader.request(&ToLoader::Load { object: permit.object().clone(), programs, globals }, object)?;
    // libbpf asks for two things of each map, tries each program twice, and makes some 30 probes.
    for _ in 0..100 + 4 * budget.maps + 4 * budget.programs {
        let (message, mut fds) =
            loader.next().map_err(|refusal| transaction.refusal.take().unwrap_or(refusal))?;
        let fd = fds.pop();
        let (answer, carry) = match message {
            FromLoader::MapCreate(map) => transaction.map_create(map),
            FromLoader::MapFreeze { handle } => transaction.map_freeze(handle),
            FromLoader::BtfLoad { bulk } => transaction.btf_load(bulk, fd),
            FromLoader::ProgLoad(load) => transaction.prog_load(load, fd),
            FromLoader::Loaded { maps } => return transaction.finish(maps).map_err(Failed::from),
            FromLoader::Refused { refusal, log } => return Err(transaction.failed(refusal, log, fd)),
            FromLoader::Found { .. } => return Err(loader.astray().into()),
        };
        let fd = match &carry {
            Carry::Nothing => None,
            Carry::Log(fd) => Some(fd.as_fd()),
            Carry::NewestMap => transaction.newest_map(),
        };
        loader.send(&answer, fd)?;
    }
    Err(loader.astray().into())
}

/// Asks for the file offset of functions in a binary.
pub(crate) fn symbols(
    loader: &mut Loader,
    binary: BorrowedFd<'_>,
    symbols: Vec<bpfgate_protocol::names::SymbolName>,
) -> Result<Vec<u64>, Refusal> {
    let count = symbols.len();
    // A worker that an object may have taken over does not choose where a program is attached.
    loader.kill()?;
    loader.request(&ToLoader::Symbols { symbols }, binary)?;
    match loader.next()?.0 {
        FromLoader::Found { offsets } if offsets.len() == count => Ok(offsets),
        FromLoader::Refused { refusal, .. } => Err(foreign(refusal)),
        _ => Err(loader.astray()),
    }
}

/// A refusal by the loader says why a load failed, and nothing else of it counts.
fn foreign(refusal: Refusal) -> Refusal {
    let class = if refusal.class == Class::Invalid { Class::Invalid } else { Class::Object };
    Refusal::new(class, printable(&refusal.why, 8192))
}

/// Where a handle points: 0, which is none, to nowhere.
fn place(handle: Handle) -> usize {
    (handle as usize).wrapping_sub(1)
}

/// The descriptor that goes with an answer.
enum Carry {
    Nothing,
    Log(OwnedFd),
    NewestMap,
}

type Answer = (ToLoader, Carry);

fn errno(errno: i32) -> Answer {
    (ToLoader::Failed { errno, log: Bulk::empty() }, Carry::Nothing)
}

impl Transaction<'_> {
    /// What libbpf is told: an error number. What the client will be told is kept.
    fn refuse(&mut self, purpose: Purpose, refusal: Refusal, number: i32) -> Answer {
        if purpose != Purpose::Probe {
            self.refusal = Some(refusal);
        }
        errno(number)
    }

    fn newest_map(&self) -> Option<BorrowedFd<'_>> {
        match self.held.last()? {
            Held::Map { fd, .. } => Some(fd.as_fd()),
            Held::Btf(_) => None,
        }
    }

    fn hold(&mut self, held: Held) -> Handle {
        self.held.push(held);
        // At most MAX_HELD.
        u32::try_from(self.held.len()).unwrap_or(0)
    }

    fn is_full(&self) -> bool {
        self.held.len() >= MAX_HELD
    }

    fn btf(&self, handle: Handle) -> Option<BorrowedFd<'_>> {
        match self.held.get(place(handle))? {
            Held::Btf(fd) => Some(fd.as_fd()),
            Held::Map { .. } => None,
        }
    }

    fn map_create(&mut self, map: MapCreate) -> Answer {
        let purpose = map.purpose;
        let bytes = match self.check_map(&map) {
            Ok(bytes) => bytes,
            Err(refusal) => return self.refuse(purpose, refusal, libc::EPERM),
        };
        match bpf::map_create(&map, self.btf(map.btf)) {
            Ok(fd) => {
                if purpose != Purpose::Probe {
                    self.maps += 1;
                    self.map_bytes = self.map_bytes.saturating_add(bytes);
                }
                let handle = self.hold(Held::Map { fd, purpose, frozen: false });
                (ToLoader::MapCreated { handle }, Carry::NewestMap)
            }
            Err(error) => {
                let (name, hint) = (printable(&map.name, 16), forbidden(error));
                let why = format!("the kernel refuses map {name}: {}{hint}", error.desc());
                let refusal = Refusal::kernel_because("BPF_MAP_CREATE", error as i32, why);
                self.refuse(purpose, refusal, error as i32)
            }
        }
    }

    fn check_map(&self, map: &MapCreate) -> Result<u64, Refusal> {
        const ARRAY: u32 = 2;
        let bytes = inspect::check_map(map, self.inventory.cpus.get())?;
        let limits = self.permit.policy().limits;
        let quota = |what: String| Err(Refusal::quota(what));
        if self.is_full() {
            return quota("the object asks for too many kernel objects".into());
        }
        if map.purpose == Purpose::Probe {
            return if map.map_type == ARRAY && bytes <= 4096 {
                Ok(bytes)
            } else {
                quota("a probe is too large".into())
            };
        }
        if self.maps >= self.budget.maps {
            return quota(format!(
                "this would be more than the {} maps that the policy allows at a time",
                limits.maps
            ));
        }
        if self.map_bytes.saturating_add(bytes) > self.budget.map_bytes {
            return quota(format!(
                "map {} takes {bytes} bytes; with it the maps of this app would have more than the {} that the policy allows",
                map.name, limits.map_memory
            ));
        }
        Ok(bytes)
    }

    fn map_freeze(&mut self, handle: Handle) -> Answer {
        match self.held.get_mut(place(handle)) {
            Some(Held::Map { fd, frozen, .. }) => match bpf::map_freeze(fd.as_fd()) {
                Ok(()) => {
                    *frozen = true;
                    (ToLoader::Kept { handle }, Carry::Nothing)
                }
                Err(error) => errno(error as i32),
            },
            _ => errno(libc::EBADF),
        }
    }

    fn btf_load(&mut self, bulk: Bulk, fd: Option<OwnedFd>) -> Answer {
        // libbpf loads an object without its types if it must: no refusal of the load.
        if self.is_full() {
            return errno(libc::E2BIG);
        }
        let Ok(bytes) = bulk.unpack(fd, self.btf_left) else { return errno(libc::E2BIG) };
        self.btf_left -= bytes.len();
        match bpf::btf_load(&bytes) {
            Ok(fd) => (ToLoader::Kept { handle: self.hold(Held::Btf(fd)) }, Carry::Nothing),
            Err(error) => errno(error as i32),
        }
    }

    fn prog_load(&mut self, mut load: ProgLoad, fd: Option<OwnedFd>) -> Answer {
        let purpose = load.purpose;
        let bulk = std::mem::replace(&mut load.bulk, Bulk::empty());
        let len = bulk.len();
        let checked = self.check_program(&load, len).and_then(|function| {
            let mut bytes = bulk
                .unpack(fd, inspect::MAX_PROGRAM)
                .map_err(|_| Refusal::object("the parts of a program do not add up"))?;
            self.check_instructions(&load, &mut bytes)?;
            Ok((bytes, function))
        });
        let (bytes, function) = match checked {
            Ok(checked) => checked,
            Err(refusal) => return self.refuse(purpose, refusal, libc::EPERM),
        };
        let (insns, rest) = bytes.split_at(load.parts.0 as usize);
        let (funcs, lines) = rest.split_at(load.parts.1 as usize);
        let mut log = if load.log == LogWanted::Yes { vec![0; MAX_LOG] } else { Vec::new() };
        let wanted = (load.log == LogWanted::Yes).then_some(log.as_mut_slice());
        let made = bpf::prog_load(&load, function, [insns, funcs, lines], self.btf(load.btf), wanted);
        match (made, purpose) {
            (Ok(fd), Purpose::Object(index)) => {
                // check_program has seen that there is such a place.
                self.programs[index as usize] = Some(fd);
                self.refusal = None;
                (ToLoader::Kept { handle: 0 }, Carry::Nothing)
            }
            (Ok(_closed), Purpose::Probe) => (ToLoader::Kept { handle: 0 }, Carry::Nothing),
            (Err(error), _) => self.program_failed(&load, error, log),
        }
    }

    /// Gives the number of the function that the program is for, 0 for none: from the policy, not from the loader.
    fn check_program(&self, load: &ProgLoad, len: usize) -> Result<u32, Refusal> {
        match load.purpose {
            Purpose::Probe => inspect::check_probe(load, len).map(|()| 0),
            Purpose::Object(index) => {
                let rule = inspect::check_program(self.permit, index, load, len)?;
                rule.hook.bound_to().map_or(Ok(0), |name| self.inventory.functions.number(name))
            }
        }
    }

    /// Reads the instructions and puts descriptors where the loader put handles.
    fn check_instructions(&self, load: &ProgLoad, bytes: &mut [u8]) -> Result<(), Refusal> {
        let Some((insns, _)) = bytes.split_at_mut_checked(load.parts.0 as usize) else {
            return Err(Refusal::object("the parts of a program do not add up"));
        };
        debug_assert!(insns.len().is_multiple_of(INSN));
        let slots = match load.purpose {
            Purpose::Probe => inspect::scan(insns, inspect::probe_call)?,
            Purpose::Object(_) => {
                // The loader's word, for the sake of a name in the answer; the instructions have numbers.
                for name in &load.kfuncs {
                    let function = Function::Kernel(name.clone());
                    inspect::granted(self.permit.object(), self.permit.rules(), &function)?;
                    self.inventory.functions.number(name)?;
                }
                inspect::scan(insns, |call| self.allow(call))?
            }
        };
        for slot in slots {
            match self.held.get(place(slot.handle)) {
                Some(Held::Map { fd, .. }) => inspect::patch(insns, slot, fd.as_raw_fd()),
                _ => {
                    return Err(Refusal::object(format!(
                        "instruction {} refers to a map that is not of this object",
                        slot.index
                    )));
                }
            }
        }
        Ok(())
    }

    /// Whether the policy lets programs of this object call this; what needed its grant is kept in mind.
    fn allow(&self, call: Call) -> Result<(), Refusal> {
        let (object, rules) = (self.permit.object(), self.permit.rules());
        let function = match call {
            Call::Helper(id) => Function::Helper(id),
            Call::Kernel(number) => {
                let name = self.inventory.functions.name(number).ok_or_else(|| {
                    let why = format!(
                        "the program calls function {number} of the kernel's BTF; the policy must name it: [objects.{object}.helpers] kfuncs"
                    );
                    Refusal::object(why).by_line(rules.line)
                })?;
                Function::Kernel(name.clone())
            }
        };
        inspect::granted(object, rules, &function)?;
        if function.needs_grant().is_some() {
            self.functions.borrow_mut().insert(function);
        }
        Ok(())
    }

    fn program_failed(&mut self, load: &ProgLoad, error: Errno, mut log: Vec<u8>) -> Answer {
        log.truncate(log.iter().position(|&b| b == 0).unwrap_or(log.len()));
        if log.len() + 1 >= MAX_LOG {
            // Its beginning is missing: half a line could be half an address.
            log.drain(..log.iter().position(|&b| b == b'\n').map_or(log.len(), |end| end + 1));
        }
        inspect::hide_addresses(&mut log);
        if let Purpose::Object(index) = load.purpose {
            let name = self.permit.programs().nth(index as usize).map(|rule| rule.program.to_string());
            let name = name.unwrap_or_default();
            let why = format!("the kernel refuses program {name}: {}", error.desc());
            let mut refusal = Refusal::kernel_because("BPF_PROG_LOAD", error as i32, why);
            if log.is_empty() {
                refusal.why.push_str(forbidden(error));
            } else {
                refusal.class = Class::Verifier;
                refusal.why.push_str("; the log of the verifier says why");
            }
            refusal.program = Some(name);
            self.refusal = Some(refusal);
        }
        match Bulk::pack(log) {
            Ok((log, fd)) => {
                (ToLoader::Failed { errno: error as i32, log }, fd.map_or(Carry::Nothing, Carry::Log))
            }
            Err(_) => errno(error as i32),
        }
    }

    fn failed(self, refusal: Refusal, log: Bulk, log_fd: Option<OwnedFd>) -> Failed {
        let refusal = self.refusal.unwrap_or_else(|| foreign(refusal));
        if refusal.class != Class::Verifier || log.len() > MAX_LOG {
            return refusal.into();
        }
        Failed { refusal, log, log_fd }
    }

    fn finish(self, names: Vec<(MapName, Handle)>) -> Result<Loaded, Refusal> {
        let astray = || Refusal::object("libbpf says that the object is loaded, but a part of it is missing");
        let plan = self.permit.programs().map(|rule| rule.program.clone());
        let programs: Option<Vec<_>> = plan.zip(self.programs).map(|(name, fd)| Some((name, fd?))).collect();
        let mut held: Vec<Option<Held>> = self.held.into_iter().map(Some).collect();
        let mut maps = Vec::new();
        for (name, handle) in names {
            // By its name a map is found, and by its name it is decided who gets it.
            if maps.iter().any(|map: &Map| map.name == name) {
                return Err(astray());
            }
            match held.get_mut(place(handle)).and_then(Option::take) {
                Some(Held::Map { fd, purpose: Purpose::Object(_), frozen }) => {
                    maps.push(Map { name, fd, frozen, issued: Issued::default() });
                }
                _ => return Err(astray()),
            }
        }
        Ok(Loaded {
            programs: programs.ok_or_else(astray)?,
            maps,
            map_bytes: self.map_bytes,
            functions: self.functions.into_inner(),
        })
    }
}
