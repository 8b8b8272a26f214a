//! Every decision that a client of a test is told of, in the test's own process or a command, has its audit record, of its
//! own, with the right peer, app, verb, verdict, object and numbers. The broker writes the record before it answers, so it can be looked for at once.

use bpfgate_protocol::refusal::{Class, is_active};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Of refusals and listings more than this many bytes of one user may go unrecorded, but for their number.
const FLOOD: usize = 150 << 10;

/// What was read of an audit file, which was opened by who may read it.
struct Seen {
    file: File,
    offset: u64,
    /// Records that belong to no decision that was looked for yet.
    unclaimed: Vec<Value>,
    /// Bytes of records by user.
    bytes: BTreeMap<u64, usize>,
}

/// By the path of the file: clients of one broker share it.
static ALL: Mutex<BTreeMap<PathBuf, Seen>> = Mutex::new(BTreeMap::new());

impl Seen {
    fn read_on(&mut self) {
        if self.file.metadata().expect("its size").len() < self.offset {
            self.offset = 0;
        }
        self.file.seek(SeekFrom::Start(self.offset)).expect("a place in it");
        let mut text = String::new();
        self.file.read_to_string(&mut text).expect("audit records are text");
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        self.offset += whole as u64;
        for line in text[..whole].lines() {
            let record: Value = serde_json::from_str(line).expect("an audit record");
            *self.bytes.entry(record["uid"].as_u64().unwrap_or(0)).or_default() += line.len();
            self.unclaimed.push(record);
        }
    }
}

/// Asserts what is true of every record, whatever was decided, and that each decision has one.
pub(crate) fn are_whole(records: &[Value]) {
    let mut requests = BTreeSet::new();
    for record in records {
        let text = |name: &str| record[name].as_str().unwrap_or_default();
        assert!(record["audit"].is_number(), "{record}");
        match text("verb") {
            "Summary" => assert!(record["suppressed"].is_object(), "{record}"),
            "Reload" => assert!(record["generation"].as_u64() >= Some(1), "{record}"),
            verb => {
                assert!(!verb.is_empty() && record["generation"].as_u64() >= Some(1), "{record}");
                assert!(
                    record["uid"].is_u64() && record["gid"].is_u64() && record["pid"].is_i64(),
                    "{record}"
                );
                let request = text("request");
                let is_new = requests.insert(request.to_owned());
                assert!(request.len() == 16 && is_new, "two decisions of one request: {record}");
                let verdict = text("verdict");
                let class = Class::ALL.iter().any(|class| class.name() == verdict);
                assert!(class || verdict == "allowed", "{record}");
                assert!(!class || !text("why").is_empty(), "nobody learns why: {record}");
                assert!(class || text("by").contains(".toml"), "no policy decided: {record}");
            }
        }
    }
}

/// What one client is told, compared with what is recorded.
pub(crate) struct Witness {
    audit: PathBuf,
    /// None: whoever started the command.
    uid: Option<u32>,
    app: Option<String>,
}

/// What the commands of one gate were told, from the file where they write it down. Called when all of them have ended.
pub(crate) fn of_commands(gate: &Path) {
    let text = std::fs::read_to_string(gate.join("wire")).unwrap_or_default();
    let mut clients: BTreeMap<u64, Witness> = BTreeMap::new();
    // One that was killed may leave half a line.
    for line in text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
        let process = line["process"].as_u64().expect("its number");
        let request = &line["request"];
        let Some(fresh) = Witness::of(gate.join("audit"), None) else { return };
        let method = request["method"].as_str().expect("its name");
        clients.entry(process).or_insert(fresh).told(method, &request["parameters"], &line["reply"]);
    }
}

impl Witness {
    /// For a client that is this user; none if the broker has no audit file.
    pub(crate) fn of(audit: PathBuf, uid: Option<u32>) -> Option<Self> {
        let mut all = ALL.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !all.contains_key(&audit) {
            let file = File::open(&audit).ok()?;
            let (unclaimed, bytes) = (Vec::new(), BTreeMap::new());
            all.insert(audit.clone(), Seen { file, offset: 0, unclaimed, bytes });
        }
        Some(Self { audit, uid, app: None })
    }

    /// Asserts that the reply to a call has its record. A method without a dot is one of `io.bpfgate`.
    pub(crate) fn told(&mut self, method: &str, asked: &Value, reply: &Value) {
        let verb = method.strip_prefix("io.bpfgate.").unwrap_or(method);
        let parameters = &reply["parameters"];
        let told = match reply["error"].as_str() {
            None => Ok(parameters),
            Some(error) => match error.strip_prefix("io.bpfgate.") {
                Some(class) => Err((class, parameters)),
                // An error of the protocol is no decision.
                None => return,
            },
        };
        if verb.contains('.') {
            return;
        }
        if verb == "Open" && told.is_ok() {
            self.app = asked["app"].as_str().map(str::to_owned);
        }
        if let Err((class, parameters)) = told {
            self.is_discreet(class, parameters);
        }
        claim(&self.audit, &Decision { uid: self.uid, app: self.app.as_deref(), verb, asked, told });
    }
}

impl Witness {
    /// Asserts that a refusal names no file of the broker's, no digest, and nobody else.
    fn is_discreet(&self, class: &str, parameters: &Value) {
        let message = parameters["message"].as_str().expect("a refusal is a sentence");
        let place = self.audit.parent().expect("the directory of the test").display().to_string();
        let words = message.split(|c: char| !c.is_ascii_alphanumeric());
        let digest = |word: &str| word.len() >= 32 && word.bytes().all(|byte| byte.is_ascii_hexdigit());
        let fine = !message.contains(&place) && !message.contains(".toml") && !words.clone().any(digest);
        // What libbpf says may have several lines.
        let active = message.contains(|c| is_active(c) && c != '\n' && c != '\t');
        assert!(fine && !active, "{class} tells too much: {message:?}");
        // Who is told that it has too many connections, is told so by its number.
        let others = words.filter_map(|word| word.parse::<u32>().ok());
        let named = others
            .filter(|number| (12_340..=12_400).contains(number) && self.uid.is_some_and(|own| *number != own))
            .count();
        assert_eq!(named, 0, "{class} names somebody else: {message:?}");
    }
}

/// A decision as a client was told of it.
struct Decision<'a> {
    uid: Option<u32>,
    app: Option<&'a str>,
    verb: &'a str,
    asked: &'a Value,
    /// The parameters of the reply, or the name of the error and its parameters.
    told: Result<&'a Value, (&'a str, &'a Value)>,
}

/// Looks for the record of a decision, which then is no other's.
fn claim(path: &Path, decision: &Decision<'_>) {
    let Decision { uid, app, verb, asked, told } = decision;
    let mut all = ALL.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let seen = all.get_mut(path).expect("it is watched");
    seen.read_on();
    let is_its = |record: &Value| {
        uid.is_none_or(|uid| record["uid"] == uid)
            && match told {
                Ok(_) => {
                    record["verb"] == *verb
                        && record["verdict"] == "allowed"
                        && record["app"].as_str() == *app
                }
                Err((error, parameters)) => {
                    record["request"] == parameters["request"] && record["verdict"] == *error
                }
            }
    };
    let Some(place) = seen.unclaimed.iter().position(is_its) else {
        let of_user = |uid: u32| seen.bytes.get(&u64::from(uid)).copied();
        let most = uid.map_or_else(|| seen.bytes.values().max().copied(), of_user);
        let flood = most.is_some_and(|bytes| bytes > FLOOD);
        assert!(flood, "no audit record of {verb} {asked} by uid {uid:?} of {app:?}: {told:?}");
        return;
    };
    let record = seen.unclaimed.remove(place);
    assert!(record["generation"].as_u64() >= Some(1) && record["pid"].is_u64(), "{record}");
    assert_eq!(record["request"].as_str().map(str::len), Some(16), "{record}");
    match told {
        Ok(reply) => {
            let by = record["by"].as_str().unwrap_or_default();
            assert!(by.contains(".toml"), "no policy decided: {record}");
            for number in ["instance", "link"] {
                if reply[number].is_u64() {
                    assert_eq!(record[number], reply[number], "{record}");
                }
            }
            if *verb == "Load" {
                assert_eq!(record["object"], asked["object"], "{record}");
                assert_eq!(record["digest"].as_str().map(str::len), Some(64), "{record}");
            }
        }
        Err(_) => assert!(record["why"].as_str().is_some_and(|why| !why.is_empty()), "{record}"),
    }
}
