//! One record per decision, for whoever asks later who was given what, and by which line.
//!
//! A record is fields. In a file and on standard output it is a line of JSON, in the journal a message with fields of its
//! own: nothing that a client sends can look like a record, or like a field of one.

mod journal;
mod limit;
mod lines;

use bpfgate_lockdown::{Fatal, Step};
use bpfgate_protocol::identity::Peer;
use bpfgate_protocol::messages::helper::{MapInfo, Outcome, Target, Verb};
use bpfgate_protocol::refusal::{Refusal, is_active, one_line};
use journal::Journal;
use limit::{Fields, Limit};
use lines::Lines;
use nix::errno::Errno;
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::hash::{BuildHasher, RandomState};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Instant, SystemTime};

/// Where records go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// `journal`
    Journal,
    /// `-`: standard output, which no other process of bpfgate has.
    Output,
    /// A file, appended to.
    File(PathBuf),
}

impl From<&str> for Place {
    fn from(text: &str) -> Self {
        match text {
            "journal" => Self::Journal,
            "-" => Self::Output,
            path => Self::File(path.into()),
        }
    }
}

enum Sink {
    Journal(Journal),
    Lines(Lines),
}

pub(crate) struct Audit {
    sink: Sink,
    limit: Limit,
    key: RandomState,
    count: u64,
}

/// Who asked. The one place where a peer becomes a part of a record.
#[derive(Debug, Serialize)]
pub(crate) struct Who {
    uid: u32,
    gid: u32,
    pid: i32,
    #[serde(skip_serializing_if = "Option::is_none")]
    unit: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    invocation: Option<String>,
}

impl From<&Peer> for Who {
    fn from(peer: &Peer) -> Self {
        Self {
            uid: peer.uid,
            gid: peer.gid,
            pid: peer.pid,
            unit: peer.unit.clone(),
            invocation: peer.invocation.clone(),
        }
    }
}

/// What a request is about.
#[derive(Debug, Default, Clone, Serialize)]
pub(crate) struct Subject {
    /// As the client said it, for people.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) about: String,
    /// The object, by its name in the policy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) object: Option<String>,
    /// SHA-256 of the file that it was loaded from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) digest: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) target: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) instance: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) link: Option<u64>,
    /// Maps that were handed over or read, with the kernel's numbers for them.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) maps: BTreeMap<String, u32>,
}

impl Subject {
    /// Something that has only a name.
    pub(crate) fn plain(about: impl Into<String>) -> Self {
        Self { about: about.into(), ..Self::default() }
    }

    pub(crate) fn of(verb: &Verb) -> Self {
        match verb {
            Verb::Load { object, programs, .. } => {
                let names: Vec<&str> =
                    programs.iter().map(bpfgate_protocol::names::ProgramName::as_str).collect();
                let about = format!("{object} {}", names.join(" ")).trim_end().to_owned();
                Self { object: Some(object.to_string()), ..Self::plain(about) }
            }
            Verb::Attach { instance, program, target, .. } => Self {
                instance: Some(instance.0),
                target: (*target != Target::Only).then(|| target.to_string()),
                ..Self::plain(format!("{}/{program} to {target}", instance.0))
            },
            Verb::Detach { link } => Self { link: Some(link.0), ..Self::plain(format!("link {}", link.0)) },
            Verb::Unload { instance } => {
                Self { instance: Some(instance.0), ..Self::plain(format!("instance {}", instance.0)) }
            }
            Verb::Map { instance, map } | Verb::ReadMap { instance, map, .. } => {
                Self { instance: Some(instance.0), ..Self::plain(format!("{}/{map}", instance.0)) }
            }
            Verb::List => Self::default(),
        }
    }

    /// What came of it.
    pub(crate) fn add(&mut self, outcome: &Outcome) {
        let number = |map: &MapInfo| (map.name.to_string(), map.number);
        match outcome {
            Outcome::Loaded { instance, maps, .. } => {
                self.instance = Some(instance.0);
                self.maps = maps.iter().map(number).collect();
            }
            Outcome::Attached { link, target, .. } => {
                self.link = Some(link.0);
                self.target = Some(target.to_string());
            }
            Outcome::Map(map) => self.maps = [number(map)].into(),
            _ => {}
        }
    }
}

/// Requests that give somebody something that lasts.
const GIVING: [&str; 3] = ["Load", "Attach", "Map"];

/// What was decided.
#[derive(Debug, Serialize)]
pub(crate) struct Record<'a> {
    /// As in the reply to the client.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub(crate) request: &'a str,
    /// Which policies were in force.
    pub(crate) generation: u64,
    /// None: nobody asked, or it is not known who.
    #[serde(flatten)]
    pub(crate) who: Option<Who>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) app: Option<&'a str>,
    pub(crate) verb: &'a str,
    #[serde(flatten)]
    pub(crate) subject: Subject,
    /// `allowed`, the class of the refusal, or `in force` for a policy.
    pub(crate) verdict: &'a str,
    /// The line that decided, `file:line`, or the file if it was the absence of one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) by: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) why: Option<&'a str>,
    /// What a reload has taken back.
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    pub(crate) revoked: &'a [String],
    /// What it could not take back, because it is in somebody's hands.
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    pub(crate) beyond_recall: &'a [String],
}

impl<'a> Record<'a> {
    /// For what a reload means.
    pub(crate) fn reload(generation: u64, subject: Subject) -> Self {
        Self { verdict: "in force", ..Self::new(generation, "Reload", subject) }
    }

    fn new(generation: u64, verb: &'a str, subject: Subject) -> Self {
        Self {
            request: "",
            generation,
            who: None,
            app: None,
            verb,
            subject,
            verdict: "allowed",
            by: None,
            why: None,
            revoked: &[],
            beyond_recall: &[],
        }
    }

    /// For a request.
    pub(crate) fn of(
        peer: &Peer,
        request: &'a str,
        generation: u64,
        verb: &'a str,
        subject: Subject,
    ) -> Self {
        Self { request, who: Some(peer.into()), ..Self::new(generation, verb, subject) }
    }

    pub(crate) fn refused(&mut self, refusal: &'a Refusal) {
        (self.verdict, self.why) = (refusal.class.name(), Some(refusal.why.as_str()));
    }

    /// Always written, however many there are: what gave somebody something that lasts, and what policies changed. All
    /// else costs those who ask nothing.
    fn is_kept(&self) -> bool {
        matches!(self.verb, "Reload" | "End") || (self.verdict == "allowed" && GIVING.contains(&self.verb))
    }
}

/// Text in which nothing moves a cursor, ends a line, or turns the direction of writing.
fn plain(value: &mut Value) {
    match value {
        Value::String(text) if text.contains(is_active) => *text = one_line(text),
        Value::Array(values) => values.iter_mut().for_each(plain),
        _ => {}
    }
}

impl Audit {
    pub(crate) fn open(place: &Place) -> Result<Self, Fatal> {
        let sink = match place {
            Place::Output => Sink::Lines(Lines::to(None)),
            Place::Journal => match Journal::connect() {
                Ok(journal) => Sink::Journal(journal),
                Err(error) => {
                    log::warn!("audit records go to standard output: the journal's socket: {error}");
                    Sink::Lines(Lines::to(None))
                }
            },
            Place::File(path) => {
                let step = format!("opening {}", path.display());
                let file = OpenOptions::new().append(true).create(true).mode(0o640).open(path);
                Sink::Lines(Lines::to(Some(file.step(&step)?)))
            }
        };
        Ok(Self { sink, limit: Limit::new(Instant::now()), key: RandomState::new(), count: 0 })
    }

    /// A name for a request, by which its record is found. It tells nothing about other requests.
    pub(crate) fn request_id(&mut self) -> String {
        self.count += 1;
        format!("{:016x}", self.key.hash_one(self.count))
    }

    /// Writes a record, or counts it, in a flood. What there is no room for is written later; any other failure is an error
    /// of the whole process.
    pub(crate) fn write(&mut self, record: &Record<'_>) -> Result<(), Fatal> {
        let uid = record.who.as_ref().map(|who| who.uid);
        let Value::Object(mut fields) = serde_json::to_value(record).step("an audit record")? else {
            return Err(Fatal("an audit record has no fields".into()));
        };
        fields.values_mut().for_each(plain);
        fields.insert("audit".into(), time().into());
        let line = line(&fields)?;
        if let Some(uid) = uid.filter(|_| !record.is_kept()) {
            let now = Instant::now();
            if self.full().is_some() || !self.limit.admits(uid, line.len(), now) {
                self.limit.suppress(uid, fields, now);
                return Ok(());
            }
        }
        self.put(&fields, line)
    }

    /// Whether what this request gives could be recorded. It is asked before a helper is: what is not on record is not
    /// given.
    pub(crate) fn has_room(&self, verb: &str) -> Result<(), Refusal> {
        let Some(errno) = self.full().filter(|_| GIVING.contains(&verb)) else { return Ok(()) };
        let why = format!(
            "the broker cannot write its audit records ({}), and gives nothing without one: make room where they are written",
            errno.desc()
        );
        Err(Refusal::kernel_because("write", errno as i32, why))
    }

    fn full(&self) -> Option<Errno> {
        match &self.sink {
            Sink::Journal(_) => None,
            Sink::Lines(lines) => lines.full(),
        }
    }

    /// When to call [`Audit::summarize`].
    pub(crate) fn due(&self) -> Option<Instant> {
        match &self.sink {
            Sink::Lines(lines) if lines.full().is_some() => lines.due(),
            _ => self.limit.due(),
        }
    }

    /// Writes how many records a flood had, and its last one; before that, what there was no room for.
    pub(crate) fn summarize(&mut self, now: Instant) -> Result<(), Fatal> {
        if let Sink::Lines(lines) = &mut self.sink {
            lines.try_again(now)?;
        }
        // Until there is room they go on being counted.
        if self.full().is_some() || self.limit.due().is_none_or(|due| now < due) {
            return Ok(());
        }
        for mut fields in self.limit.summaries(now) {
            fields.entry("audit").or_insert_with(|| time().into());
            let line = line(&fields)?;
            self.put(&fields, line)?;
        }
        Ok(())
    }

    fn put(&mut self, fields: &Fields, line: Vec<u8>) -> Result<(), Fatal> {
        match &mut self.sink {
            Sink::Journal(journal) => {
                journal.send(fields);
                Ok(())
            }
            Sink::Lines(lines) => lines.put(line, Instant::now()),
        }
    }
}

/// Seconds since 1970.
fn time() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

fn line(fields: &Fields) -> Result<Vec<u8>, Fatal> {
    let mut line = serde_json::to_vec(fields).step("an audit record")?;
    line.push(b'\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_told_by_their_words() {
        assert_eq!(Place::from("journal"), Place::Journal);
        assert_eq!(Place::from("-"), Place::Output);
        assert_eq!(Place::from("/var/log/x"), Place::File("/var/log/x".into()));
    }

    #[test]
    fn nothing_in_a_record_is_obeyed_by_a_terminal() {
        let path = std::env::temp_dir().join(format!("bpfgate-audit-{}", std::process::id()));
        let mut audit = Audit::open(&Place::File(path.clone())).unwrap();
        let peer = Peer { uid: 7, gid: 8, pid: 9, ..Default::default() };
        let about = "a\u{1b}[2J\r\nb\u{9b}c\u{202e}d\u{7f}";
        let mut record = Record::of(&peer, "r", 3, "Open\u{7}", Subject::plain(about));
        let revoked = ["x\ny".to_owned()];
        record.revoked = &revoked;
        audit.write(&record).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(
            text.ends_with('\n') && !text[..text.len() - 1].contains(|c: char| c.is_control()),
            "{text:?}"
        );
        let got: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&got["about"], &got["verb"]), (&"a?[2J? b?c?d?".into(), &"Open?".into()));
        assert_eq!(
            (&got["uid"], &got["generation"], &got["revoked"][0]),
            (&7.into(), &3.into(), &"x y".into())
        );
    }

    #[test]
    fn what_gives_something_is_always_recorded() {
        let peer = Peer { uid: 7, gid: 8, pid: 9, ..Default::default() };
        let kept = |verb, verdict| {
            let mut record = Record::of(&peer, "r", 1, verb, Subject::default());
            record.verdict = verdict;
            record.is_kept()
        };
        assert!(["Load", "Attach", "Map", "Reload", "End"].iter().all(|verb| kept(verb, "allowed")));
        assert!(["Load", "Attach", "Map", "Open"].iter().all(|verb| !kept(verb, "Denied")));
        assert!(!kept("List", "allowed") && !kept("ReadMap", "allowed"));
    }
}
