//! `bpfgate policy explain`: what would happen, and which line of the policy says so.

use super::super::Outcome;
use super::super::args::ExplainArgs;
use super::super::failure::Failure;
use super::super::output;
use super::judge::{Judgement, Request, judge};
use super::who::People;
use super::{Source, app_of, file_of, invalid, who};
use bpfgate_protocol::policy::{PolicyError, file};
use bpfgate_protocol::refusal::{Class, Refusal};
use serde_json::json;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

/// 0 if the policy allows it, 1 if not.
pub(super) fn run(args: &ExplainArgs) -> Outcome {
    let request = Request::parse(args.request.iter().map(String::as_str)).map_err(Failure::Usage)?;
    let source = match source(args)? {
        Ok(source) => source,
        Err(error) => return Ok(invalid(&error)),
    };
    let policy = Arc::new(source.policy);
    let peer = People::read()?.peer(&args.client, args.unit.as_deref(), &policy).map_err(Failure::Usage)?;
    let judgement = judge(&policy, &peer, &request);
    let allowed = judgement.verdict.is_ok();
    let who = who::describe(&peer);
    if args.style.json {
        output::print_json(&as_json(&policy.file, &judgement))?;
    } else {
        let mut text = format!("{}, for {who}: {}\n", word(&judgement.verdict), args.request.join(" "));
        text += &reasons(&policy.file, &source.text, &judgement);
        output::print(&output::clean_lines(&text))?;
    }
    Ok(ExitCode::from(u8::from(!allowed)))
}

/// The policy: from --file, from --policies, or the one in force.
fn source(args: &ExplainArgs) -> Result<Result<Source, PolicyError>, Failure> {
    let path: PathBuf = match (&args.file, &args.app) {
        (Some(file), _) => file.clone(),
        (None, None) => return Err(Failure::Usage("say which policy: --app APP or --file FILE".to_owned())),
        (None, Some(app)) => {
            let app = app.parse().map_err(|error| Failure::Usage(format!("{error}")))?;
            let none =
                || Failure::Failed(format!("denied: there is no policy of app {app}, so nobody may use it"));
            file_of(&app, args.policies.as_deref()).ok_or_else(none)?
        }
    };
    let installed = args.file.is_none() && args.policies.is_none();
    Ok(read(&path, installed))
}

fn read(path: &Path, installed: bool) -> Result<Source, PolicyError> {
    app_of(path)?;
    if installed {
        file::read_file(path)?;
    }
    Source::read(path)
}

pub(super) fn word(verdict: &Result<Vec<u32>, Refusal>) -> &'static str {
    match verdict {
        Ok(_) => "allowed",
        Err(refusal) if refusal.class == Class::Denied => "denied",
        Err(_) => "refused",
    }
}

/// Why, with the lines of the policy.
pub(super) fn reasons(file: &str, text: &str, judgement: &Judgement) -> String {
    let mut said = String::new();
    let mut shown = Vec::new();
    match &judgement.verdict {
        Ok(lines) => {
            for &line in lines {
                show(&mut said, &mut shown, file, text, line);
            }
        }
        Err(refusal) => {
            let place = refusal.line.map_or_else(String::new, |line| format!(" ({file}:{line})"));
            let _ = writeln!(said, "{}{place}", refusal.why);
            if let Some(line) = refusal.line.filter(|_| judgement.misses.is_empty()) {
                show(&mut said, &mut shown, file, text, line);
            }
            for (line, why) in &judgement.misses {
                match line {
                    Some(line) => {
                        let _ = writeln!(said, "nearest: {file}:{line}: {why}");
                        show(&mut said, &mut shown, file, text, *line);
                    }
                    None => {
                        let _ = writeln!(said, "nearest: {why}");
                    }
                }
            }
        }
    }
    said
}

/// An entry of the policy, from its first line to the next one, once.
fn show(said: &mut String, shown: &mut Vec<u32>, file: &str, text: &str, line: u32) {
    const MOST: usize = 12;
    if shown.contains(&line) {
        return;
    }
    shown.push(line);
    let first = line.max(1) as usize - 1;
    let ends = |text: &str| text.trim().is_empty() || text.trim_start().starts_with('[');
    let is_header = text.lines().nth(first).is_some_and(|text| text.trim_start().starts_with('['));
    let rest = text.lines().skip(first + 1).take(MOST).take_while(|text| is_header && !ends(text)).count();
    let _ = writeln!(said, "  --> {file}:{line}");
    for (number, text) in text.lines().enumerate().skip(first).take(1 + rest) {
        let _ = writeln!(said, "{:>5} | {text}", number + 1);
    }
}

fn as_json(file: &str, judgement: &Judgement) -> serde_json::Value {
    let misses: Vec<_> =
        judgement.misses.iter().map(|(line, why)| json!({"line": line, "why": why})).collect();
    match &judgement.verdict {
        Ok(lines) => json!({"allowed": true, "file": file, "line": lines.first(), "lines": lines}),
        Err(refusal) => json!({
            "allowed": false,
            "file": file,
            "class": refusal.class.name(),
            "why": refusal.why,
            "line": refusal.line,
            "nearest": misses,
        }),
    }
}
