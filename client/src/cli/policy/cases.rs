//! `bpfgate policy test`: what a set of policies is expected to allow and to deny, as a file beside them.

use super::super::Outcome;
use super::super::failure::Failure;
use super::super::output::{self, Style};
use super::explain::{reasons, word};
use super::judge::{Judgement, Request, judge};
use super::who::People;
use super::{INVALID, Source, file_of, invalid};
use bpfgate_protocol::names::AppName;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

/// The shape of the file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Cases {
    /// Users and groups of the machine that the policies are for, beside those of this one.
    #[serde(default)]
    users: BTreeMap<String, u32>,
    #[serde(default)]
    groups: BTreeMap<String, u32>,
    case: Vec<toml::Spanned<Case>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    app: AppName,
    #[serde(rename = "as")]
    client: String,
    /// The service that the user's process is of.
    unit: Option<String>,
    request: String,
    expect: Expect,
    /// The deciding line of the policy.
    line: Option<u32>,
}

#[derive(Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Expect {
    Allow,
    Deny,
}

/// Whether this is a file of cases rather than a policy.
pub(super) fn is_one(path: &Path) -> bool {
    let table = std::fs::read_to_string(path).ok().and_then(|text| text.parse::<toml::Table>().ok());
    table.is_some_and(|table| table.contains_key("case") && !table.contains_key("version"))
}

/// 0 if all is as expected, 1 if not, 4 if the cases or a policy that they need cannot be read.
pub(super) fn run(path: &Path, policies: Option<&Path>, style: Style) -> Outcome {
    let name = path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|error| Failure::Failed(format!("{name}: {error}")))?;
    let cases: Cases = match toml::from_str(&text) {
        Ok(cases) => cases,
        Err(error) => {
            super::say(&output::clean_lines(&format!("{name}: {error}")));
            return Ok(ExitCode::from(INVALID));
        }
    };
    if cases.case.is_empty() {
        return Ok(wrong_case(&name, 1, "there is no case: nothing would be tested"));
    }
    let beside = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let directory = policies.unwrap_or(beside);
    let mut people = People::read()?;
    people.accounts.users.extend(cases.users);
    people.accounts.groups.extend(cases.groups);
    let mut sources: BTreeMap<AppName, (String, Arc<bpfgate_protocol::policy::Policy>)> = BTreeMap::new();
    let (mut results, mut failed, count) = (Vec::new(), 0, cases.case.len());
    for case in cases.case {
        let line = bpfgate_protocol::policy::report::position(&text, case.span().start).0;
        let case = case.into_inner();
        let request = match Request::parse(case.request.split_whitespace()) {
            Ok(request) => request,
            Err(why) => return Ok(wrong_case(&name, line, &why)),
        };
        if !sources.contains_key(&case.app)
            && let Some(file) = file_of(&case.app, Some(directory))
        {
            match Source::read_for(&file, &people.accounts) {
                Ok(Source { text, policy }) => {
                    sources.insert(case.app.clone(), (text, Arc::new(policy)));
                }
                Err(error) => return Ok(invalid(&error)),
            }
        }
        let judged = match sources.get(&case.app) {
            Some((text, policy)) => {
                let known = people.peer(&case.client, case.unit.as_deref(), policy).and_then(|peer| {
                    request.names_what_is_there(policy)?;
                    Ok(peer)
                });
                match known {
                    Ok(peer) => Some((text, policy, judge(policy, &peer, &request))),
                    Err(why) => return Ok(wrong_case(&name, line, &why)),
                }
            }
            None => None,
        };
        // It would be denied everything; more likely it is misspelt, and a case that tests nothing is no case.
        let Some((policy_text, policy, judgement)) = judged else {
            let why = format!("{} has no policy of app {}", directory.display(), case.app);
            return Ok(wrong_case(&name, line, &why));
        };
        let difference = case.difference(&judgement);
        failed += usize::from(difference.is_some());
        if let (Some(difference), Style::Table) = (&difference, style) {
            let mut said =
                format!("{name}:{line}: {} as {}: {}: {difference}\n", case.app, case.client, case.request);
            for reason in reasons(&policy.file, policy_text, &judgement).lines() {
                let _ = writeln!(said, "  {reason}");
            }
            output::print(&output::clean_lines(&said))?;
        }
        results.push(json!({"line": line, "app": case.app, "ok": difference.is_none(), "why": difference}));
    }
    match style {
        Style::Json => output::print_json(&Value::from(results))?,
        Style::Table => output::print(&format_args!("{} as expected, {failed} not\n", count - failed))?,
    }
    Ok(ExitCode::from(u8::from(failed > 0)))
}

/// A case that tests nothing, whatever it expects.
fn wrong_case(file: &str, line: u32, why: &str) -> ExitCode {
    super::say(&output::clean_lines(&format!("{file}:{line}: {why}")));
    ExitCode::from(INVALID)
}

impl Case {
    /// What is not as expected.
    fn difference(&self, judgement: &Judgement) -> Option<String> {
        let allowed = judgement.verdict.is_ok();
        let got = word(&judgement.verdict);
        match self.expect {
            Expect::Allow if !allowed => return Some(format!("{got}, expected to be allowed")),
            Expect::Deny if allowed => return Some(format!("{got}, expected to be denied")),
            _ => {}
        }
        let line = match &judgement.verdict {
            Ok(lines) => lines.first().copied(),
            Err(refusal) => refusal.line,
        };
        let expected = self.line.filter(|expected| line != Some(*expected))?;
        let decided =
            line.map_or_else(|| "no line decided".to_owned(), |line| format!("line {line} decided"));
        Some(format!("{got} as expected, but {decided}, not line {expected}"))
    }
}
