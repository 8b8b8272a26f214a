//! `bpfgate-loader`: libbpf without privilege.
//!
//! Started by a helper with two channels: 3 is the leash, 4 the work. The process stays a parent that waits; a
//! worker that it forks runs libbpf ([`object`]), whose bpf(2) calls that need a capability become requests to the
//! helper ([`wrap`]). libbpf can be crashed by an object: then the worker is gone, the request fails, and the
//! parent forks a new one ([`parent`]).
//! With `--describe` it is started by the command line instead, opens one object and says what is in it ([`describe`]).
//!
//! Distrusted: the object, and whatever libbpf becomes when it reads it. This process therefore holds no capability,
//! can open nothing but the kernel's BTF, and reaches the kernel through a short list of calls ([`seccomp`]).

mod calls;
mod describe;
mod object;
mod parent;
mod report;
mod seccomp;
mod symbols;
mod worker;
mod wrap;

use bpfgate_lockdown::{Fatal, Step, capabilities, files, process};
use bpfgate_protocol::btf;
use bpfgate_protocol::channel::Channel;
use std::path::Path;

fn main() {
    let describe = std::env::args_os().skip(1).eq(["--describe"]);
    if let Err(fatal) = if describe { describe::run() } else { run() } {
        eprintln!("bpfgate-loader: {fatal}");
        std::process::exit(1);
    }
}

fn run() -> Result<(), Fatal> {
    let leash = Channel::inherited(3).step("descriptor 3 is not the leash; a helper starts this program")?;
    let work = Channel::inherited(4).step("descriptor 4 is not the work channel")?;
    // A descriptor for each map and program of an object.
    process::tame(1024)?;
    process::die_with_parent()?;
    process::default_sigchld()?;
    capabilities::keep_only(&[], None)?;
    report::check_version()?;
    let alone = process::single_thread()?;
    // The only file that libbpf may open by path.
    let kernel_btf = [files::Allow::File(Path::new(btf::KERNEL))];
    let allow = if Path::new(btf::KERNEL).exists() { &kernel_btf[..] } else { &[] };
    // The helper demands what the policy demands; here whatever the kernel has is taken.
    files::restrict(allow, files::Demand::Whatever)?;
    parent::run(alone, leash, &work)
}
