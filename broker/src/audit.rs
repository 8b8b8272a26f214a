//! One record per decision: a line of JSON, so that nothing a client sends can look like a record of its own.

use bpfgate_lockdown::{Fatal, Step};
use bpfgate_protocol::identity::Peer;
use serde::Serialize;
use std::fs::{File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::SystemTime;

pub(crate) struct Audit {
    /// None: standard output, which no other process of bpfgate has.
    file: Option<File>,
    key: RandomState,
    count: u64,
}

/// What was decided.
#[derive(Debug, Serialize)]
pub(crate) struct Record<'a> {
    /// As in the reply to the client.
    pub(crate) request: &'a str,
    /// Which policies were in force.
    pub(crate) generation: u64,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) pid: i32,
    pub(crate) app: Option<&'a str>,
    pub(crate) verb: &'a str,
    /// What it was about: object, instance, target, map.
    pub(crate) object: &'a str,
    /// `allowed`, or the class of the refusal.
    pub(crate) verdict: &'a str,
    /// The line that decided, `file:line`, or the file if it was the absence of one.
    pub(crate) by: Option<String>,
    pub(crate) why: Option<&'a str>,
}

impl<'a> Record<'a> {
    pub(crate) fn of(peer: &Peer, request: &'a str, verb: &'a str, object: &'a str) -> Self {
        let (uid, gid, pid) = (peer.uid, peer.gid, peer.pid);
        Self {
            request,
            generation: 0,
            uid,
            gid,
            pid,
            app: None,
            verb,
            object,
            verdict: "allowed",
            by: None,
            why: None,
        }
    }
}

#[derive(Serialize)]
struct Line<'a> {
    /// Seconds since 1970.
    audit: f64,
    #[serde(flatten)]
    record: &'a Record<'a>,
}

impl Audit {
    pub(crate) fn open(path: Option<&Path>) -> Result<Self, Fatal> {
        let open = |path: &Path| {
            let step = format!("opening {}", path.display());
            OpenOptions::new().append(true).create(true).mode(0o640).open(path).step(&step)
        };
        Ok(Self { file: path.map(open).transpose()?, key: RandomState::new(), count: 0 })
    }

    /// A name for a request, by which its record is found. It tells nothing about other requests.
    pub(crate) fn request_id(&mut self) -> String {
        self.count += 1;
        format!("{:016x}", self.key.hash_one(self.count))
    }

    /// Writes a record. A decision that cannot be recorded is an error of the whole process.
    pub(crate) fn write(&mut self, record: &Record<'_>) -> Result<(), Fatal> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
        let mut line = serde_json::to_vec(&Line { audit: now, record }).step("an audit record")?;
        line.push(b'\n');
        match &mut self.file {
            Some(file) => file.write_all(&line).step("writing an audit record"),
            None => std::io::stdout().lock().write_all(&line).step("writing an audit record"),
        }
    }
}
