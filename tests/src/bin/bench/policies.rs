//! Policies: what one decision costs, reading and checking a thousand files, and how long a request waits meanwhile.

use crate::table::Table;
use crate::world::{Broker, World};
use crate::{Result, Trying};
use bpfgate_protocol::authorize::authorize;
use bpfgate_protocol::identity::Peer;
use bpfgate_protocol::messages::helper::Target;
use bpfgate_protocol::policy::file::{self, Accounts};
use std::hint::black_box;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

/// So many files are read, so many times: the aim is for the whole set.
const FILES: usize = 1000;
const READINGS: usize = 9;
/// Samples, and decisions in each: a single one is shorter than reading the clock.
const SAMPLES: usize = 200;
const DECISIONS: u32 = 500;

/// So often are the files read again by a broker that serves.
const RELOADS: usize = 5;

pub(crate) fn all(world: &World, table: &mut Table) -> Result<()> {
    let paths: Vec<PathBuf> = (0..FILES)
        .map(|app| world.file(&format!("policies/app-{app}.toml"), &text(app)))
        .collect::<Result<_>>()?;
    reloads(world, table)?;
    let mut times = Vec::new();
    for _ in 0..READINGS {
        let start = Instant::now();
        let accounts = Accounts::read().trying("reading the accounts")?;
        for path in &paths {
            black_box(file::read_file_with(path, &accounts).trying("reading a policy")?);
        }
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let time = table.median("policy_load_ms_1000", "ms", &times);
    table.row("policy_load_ms_1000", time, 0, 300.0, "");
    decisions(&paths, table)?;
    paths.iter().try_for_each(|path| std::fs::remove_file(path).trying("removing a policy"))
}

/// The longest that a request waits while a broker reads all files again; the worst of several reloads.
fn reloads(world: &World, table: &mut Table) -> Result<()> {
    const CALL: &[u8] = b"{\"method\":\"org.varlink.service.GetInfo\"}\0";
    let broker = Broker::start(world, &[])?;
    let mut stream = UnixStream::connect(&broker.socket).trying("connecting")?;
    let mut reply = vec![0; 1 << 16];
    let mut worst: f64 = 0.0;
    for _ in 0..RELOADS {
        let before = world.generations();
        broker.reload()?;
        while world.generations() == before {
            for _ in 0..50 {
                let start = Instant::now();
                stream.write_all(CALL).trying("asking")?;
                let got = stream.read(&mut reply).trying("waiting for the answer")?;
                if !reply[..got].ends_with(b"\0") {
                    return Err("the broker did not answer in one piece".into());
                }
                worst = worst.max(start.elapsed().as_secs_f64() * 1e3);
            }
        }
    }
    table.row("reload_gap_ms", worst, 1, 50.0, "the worst of all requests");
    broker.stop()
}

/// Who and what, from the last entry of each list: nothing is found sooner.
fn decisions(paths: &[PathBuf], table: &mut Table) -> Result<()> {
    let policy = file::read_file(&paths[0]).trying("reading a policy")?;
    let (object, rules) = policy.objects.iter().next_back().ok_or("the policy has no object")?;
    let (object, program) = (object.clone(), rules.programs[rules.programs.len() - 1].program.clone());
    let policy = Arc::new(policy);
    let peer = Peer { uid: 7, gid: 1, groups: (1000..1032).collect(), ..Peer::default() };
    let target = Target::Interface("lan123".parse().trying("naming an interface")?);
    let mut times = Vec::new();
    for _ in 0..SAMPLES {
        let start = Instant::now();
        for _ in 0..DECISIONS {
            let permit = authorize(black_box(&policy), black_box(&peer));
            let permit = permit.and_then(|permit| permit.attach(&object, &program, None, black_box(&target)));
            let _permit = black_box(permit.map_err(|refusal| refusal.why).trying("deciding")?);
        }
        times.push(start.elapsed().as_secs_f64() * 1e6 / f64::from(DECISIONS));
    }
    let time = table.median("policy_check_us", "us", &times);
    table.row("policy_check_us", time, 2, 5.0, "authorize, then attach");
    Ok(())
}

/// A policy as long as real ones are: 5 roles, 2 objects, 16 rules.
fn text(app: usize) -> String {
    let mut text = format!("version = 1\ndescription = \"app {app}\"\n[limits]\nprograms = 16\nlinks = 32\n");
    for group in 0..4 {
        text.extend([format!("[[client]]\ngroup = {}\nmaps = [\"m\"]\nmay = [\"maps\"]\n", 2000 + group)]);
    }
    text.push_str("[[client]]\nuser = 7\ngroup = 1031\nmay = [\"load\", \"attach\", \"maps\"]\n");
    for object in ["first", "second"] {
        text.extend([format!(
            "[objects.{object}]\npath = \"/usr/lib/app/{object}.bpf.o\"\nsha256 = \"{app:064x}\"\n"
        )]);
        for rule in 0..8 {
            text.extend([format!(
                "[[objects.{object}.xdp]]\nprogram = \"program_{rule}\"\ninterfaces = [\"eth{rule}\", \"lan*\"]\n"
            )]);
        }
        text.extend([format!("[objects.{object}.maps]\nm = \"frozen\"\ncounters = \"proxy\"\n")]);
    }
    text
}
