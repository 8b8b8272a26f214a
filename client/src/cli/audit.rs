//! `bpfgate audit`: what was decided, from the journal or from a file of records.
//!
//! From the journal only what the broker's unit has written counts: anybody may write something there that looks alike.

use super::args::AuditArgs;
use super::failure::Failure;
use super::output::{self, Style};
use bpfgate_protocol::audit::{FIELD, MESSAGE_ID, sentence};
use nix::unistd::User;
use serde_json::{Map, Value};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

/// How often to look whether a file has grown.
const LOOK: Duration = Duration::from_millis(200);

type Fields = Map<String, Value>;

/// What is to be shown.
struct Filter {
    /// Fields and the values they must have.
    equal: Vec<(&'static str, String)>,
    /// Seconds since 1970.
    since: Option<f64>,
}

pub(crate) fn run(args: &AuditArgs) -> Result<(), Failure> {
    let filter = Filter::of(args)?;
    let style = Style::from(&args.style);
    match &args.file {
        Some(path) => from_file(path, &filter, args.follow, style),
        None => from_journal(&filter, args.follow, style),
    }
}

impl Filter {
    fn of(args: &AuditArgs) -> Result<Self, Failure> {
        let mut equal = Vec::new();
        let texts = [("app", &args.app), ("verdict", &args.verdict), ("request", &args.request)];
        for (key, value) in texts {
            equal.extend(value.as_ref().map(|value| (key, value.clone())));
        }
        if let Some(user) = &args.user {
            equal.push(("uid", uid(user)?.to_string()));
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let since = args.since.map(|ago| now.saturating_sub(ago).as_secs_f64());
        Ok(Self { equal, since })
    }

    fn takes(&self, fields: &Fields) -> bool {
        let is = |(key, value): &(&str, String)| fields.get(*key).is_some_and(|field| text(field) == *value);
        let late = |since: f64| fields.get("audit").and_then(Value::as_f64).is_some_and(|time| time >= since);
        self.equal.iter().all(is) && self.since.is_none_or(late)
    }
}

fn uid(user: &str) -> Result<u32, Failure> {
    if let Ok(uid) = user.parse() {
        return Ok(uid);
    }
    match User::from_name(user) {
        Ok(Some(user)) => Ok(user.uid.as_raw()),
        _ => Err(Failure::Usage(format!("there is no user {user}"))),
    }
}

/// A value as text: lists by commas, tables as `key=value`.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(text).collect::<Vec<_>>().join(", "),
        Value::Object(table) => {
            table.iter().map(|(key, value)| format!("{key}={}", text(value))).collect::<Vec<_>>().join(", ")
        }
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

fn print(fields: &Fields, style: Style) -> Result<(), Failure> {
    match style {
        // One record a line, as in a file: characters that a terminal obeys were taken out when it was written, and are
        // escaped again in case it was not by the broker.
        Style::Json => output::print_json_line(&Value::Object(fields.clone()))?,
        Style::Table => {
            let time = fields.get("audit").and_then(Value::as_f64).unwrap_or_default();
            let line = sentence(|key| fields.get(key).map(text));
            output::print(&format_args!("{} {}\n", utc(time), output::clean(&line)))?;
        }
    }
    Ok(())
}

fn from_file(path: &Path, filter: &Filter, follow: bool, style: Style) -> Result<(), Failure> {
    let failed =
        |error: std::io::Error| Failure::Failed(format!("{} cannot be read: {error}", path.display()));
    let mut reader = BufReader::new(File::open(path).map_err(failed)?);
    let mut line = Vec::new();
    let mut strange = 0u64;
    loop {
        let got = reader.by_ref().read_until(b'\n', &mut line).map_err(failed)?;
        if got > 0 && line.ends_with(b"\n") {
            match serde_json::from_slice::<Fields>(&line) {
                Ok(fields) if filter.takes(&fields) => print(&fields, style)?,
                Ok(_) => {}
                Err(_) => strange += 1,
            }
            line.clear();
            continue;
        }
        if !follow {
            break;
        }
        std::thread::sleep(LOOK);
        // logrotate may have cut it short, or put another one in its place.
        let ours = reader.get_ref().metadata().map_err(failed)?;
        let there = std::fs::metadata(path).ok().filter(|there| there.ino() != ours.ino());
        if there.is_some() {
            reader = BufReader::new(File::open(path).map_err(failed)?);
            line.clear();
        } else if ours.len() < reader.stream_position().map_err(failed)? {
            reader.seek(SeekFrom::Start(0)).map_err(failed)?;
            line.clear();
        }
    }
    strange += u64::from(!line.is_empty());
    match strange {
        0 => Ok(()),
        n => Err(Failure::Failed(format!(
            "{n} lines of {} are no audit records, and are not shown",
            path.display()
        ))),
    }
}

fn from_journal(filter: &Filter, follow: bool, style: Style) -> Result<(), Failure> {
    let mut command = Command::new("journalctl");
    command.args(["--no-pager", "--quiet", "--output=json", "--lines=all", "--all"]);
    if follow {
        command.arg("--follow");
    }
    if let Some(since) = filter.since {
        command.arg(format!("--since=@{since:.0}"));
    }
    command.args(["_SYSTEMD_UNIT=bpfgate.service".to_owned(), format!("MESSAGE_ID={MESSAGE_ID}")]);
    for (key, value) in &filter.equal {
        command.arg(format!("{FIELD}{}={value}", key.to_uppercase()));
    }
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().map_err(|error| {
        let hint = "without systemd name the file that the broker was given with --audit";
        Failure::Failed(format!("journalctl cannot be run: {error}; {hint}"))
    })?;
    if let Some(out) = child.stdout.take() {
        for line in BufReader::new(out).split(b'\n') {
            let Ok(entry) = serde_json::from_slice::<Fields>(&line?) else { continue };
            print(&of_journal(&entry), style)?;
        }
    }
    match child.wait()?.code() {
        // 1: no entry matches.
        Some(0 | 1) => Ok(()),
        _ => Err(Failure::Failed("journalctl has failed; above it says why".into())),
    }
}

/// The record of an entry of the journal, which has text only, and bytes as numbers where they are no plain text.
fn of_journal(entry: &Fields) -> Fields {
    let plain = |value: &Value| match value {
        Value::Array(values) if values.iter().all(Value::is_u64) => {
            let bytes = values.iter().filter_map(|v| u8::try_from(v.as_u64()?).ok()).collect::<Vec<_>>();
            Value::from(String::from_utf8_lossy(&bytes).into_owned())
        }
        other => other.clone(),
    };
    let numbers = ["uid", "gid", "pid", "generation", "instance", "link"];
    let mut fields = Fields::new();
    for (name, value) in entry {
        let Some(name) = name.strip_prefix(FIELD).map(str::to_lowercase) else { continue };
        let value = plain(value);
        let number = value.as_str().filter(|_| numbers.contains(&name.as_str()));
        let number = number.and_then(|text| text.parse::<u64>().ok());
        fields.insert(name, number.map_or(value, Value::from));
    }
    let time = entry.get("__REALTIME_TIMESTAMP").and_then(Value::as_str).and_then(|t| t.parse::<f64>().ok());
    fields.insert("audit".into(), time.map(|microseconds| microseconds / 1e6).into());
    fields
}

/// A time as `2026-11-22T18:00:00Z`.
#[allow(clippy::cast_possible_truncation, reason = "seconds of a calendar fit")]
pub(super) fn utc(seconds: f64) -> String {
    let seconds = seconds as i64;
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // The calendar of a proleptic year that begins in March: howardhinnant.github.io/date_algorithms.html
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, expected) in [
            (0.0, "1970-01-01T00:00:00Z"),
            (951_782_400.5, "2000-02-29T00:00:00Z"),
            (1_767_225_599.0, "2025-12-31T23:59:59Z"),
            (4_107_542_400.0, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(utc(seconds), expected);
        }
    }

    fn fields(value: Value) -> Fields {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn an_entry_of_the_journal_is_the_record_it_was_made_from() {
        let entry = fields(json!({
            "MESSAGE": "x", "_UID": "0", "BPFGATE_UID": "7", "BPFGATE_APP": "a", "BPFGATE_GENERATION": "3",
            "BPFGATE_WHY": [104, 105], "__REALTIME_TIMESTAMP": "1500000",
        }));
        let expected = json!({"uid": 7, "app": "a", "generation": 3, "why": "hi", "audit": 1.5});
        assert_eq!(Value::Object(of_journal(&entry)), expected);
    }

    #[test]
    fn a_filter_takes_what_has_all_of_it() {
        let record = fields(json!({"uid": 7, "app": "a", "verdict": "Denied", "audit": 100.0}));
        let takes = |equal: &[(&'static str, &str)], since| {
            let equal = equal.iter().map(|(key, value)| (*key, (*value).to_owned())).collect();
            Filter { equal, since }.takes(&record)
        };
        assert!(takes(&[], None) && takes(&[("uid", "7"), ("app", "a")], Some(100.0)));
        assert!(
            !takes(&[("uid", "8")], None) && !takes(&[("request", "")], None) && !takes(&[], Some(100.5))
        );
    }
}
