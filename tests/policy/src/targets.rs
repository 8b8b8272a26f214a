//! What the fuzzers run. Each takes any bytes, panics where something is wrong, and gives whether the bytes came to a
//! valid policy.

use crate::naive::{Verdict, evaluate};
use crate::requests::{Asked, Request, asked};
use crate::{generate, parse, without_places};
use arbitrary::Unstructured;
use bpfgate_protocol::authorize::{Permit, authorize};
use bpfgate_protocol::policy::{Hook, Policy};
use bpfgate_protocol::refusal::{Class, Refusal};
use std::sync::Arc;

/// Any bytes are a policy, or an error with places inside of the text that can be shown. What is a policy can be printed
/// and read again.
pub fn parser(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    match parse(text) {
        Ok(policy) => {
            let last = u32::try_from(text.lines().count()).expect("a number of lines");
            let lines = policy.clients.iter().map(|client| client.line);
            let lines = lines.chain(policy.objects.values().map(|object| object.line));
            assert!(lines.into_iter().all(|line| (1..=last).contains(&line)), "{policy:?}");
            reads_itself(policy);
            true
        }
        Err(error) => {
            assert!(!error.problems.is_empty() && error.lines().len() == error.problems.len());
            for problem in &error.problems {
                assert!(text.get(problem.span.clone()).is_some(), "{:?} is not in the text", problem.span);
                assert!(!problem.message.is_empty());
            }
            assert!(error.to_string().contains("error"));
            false
        }
    }
}

/// A valid policy is printed and read again, and is the same.
pub fn printer(data: &[u8]) -> bool {
    let Ok(node) = generate::policy(&mut Unstructured::new(data)) else { return false };
    let text = node.to_text();
    reads_itself(parse(&text).unwrap_or_else(|error| panic!("a valid policy: {error}\n{text}")));
    true
}

fn reads_itself(policy: Policy) {
    let printed = policy.toml().to_string();
    let again = parse(&printed).unwrap_or_else(|error| panic!("a printed policy: {error}\n{printed}"));
    assert_eq!(again.toml().to_string(), printed);
    assert_eq!(without_places(again), without_places(policy), "{printed}");
}

/// Both evaluators give the same answers about a valid policy.
pub fn evaluator(data: &[u8]) -> bool {
    let mut u = Unstructured::new(data);
    let Ok(node) = generate::policy(&mut u) else { return false };
    let text = node.to_text();
    let policy = parse(&text).unwrap_or_else(|error| panic!("a valid policy: {error}\n{text}"));
    let file = toml::from_str(&text).expect("it was parsed");
    let policy = Arc::new(policy);
    for _ in 0..32 {
        let Ok(asked) = asked(&mut u, &policy) else { break };
        let expected = evaluate(&file, &asked);
        let got = decide(&policy, &asked);
        let same = match (&expected, &got) {
            (Verdict::Allowed(expected), Ok(got)) => expected == got,
            (Verdict::Refused { denied, .. }, Err(Class::Denied)) => *denied,
            (Verdict::Refused { invalid, .. }, Err(Class::Invalid)) => *invalid,
            _ => false,
        };
        assert!(same, "{asked:?}\nnaive: {expected:?}\nauthorize: {got:?}\n{text}");
        if u.is_empty() {
            break;
        }
    }
    true
}

/// What `authorize` says, in the words of the naive evaluator.
pub fn decide(policy: &Arc<Policy>, asked: &Asked) -> Result<Vec<String>, Class> {
    let decided = authorize(policy, &asked.peer).and_then(|permit| allowed(&permit, &asked.request));
    decided.map_err(|refusal| refusal.class)
}

fn allowed(permit: &Permit, request: &Request) -> Result<Vec<String>, Refusal> {
    Ok(match request {
        Request::Open => vec![],
        Request::Right(right) => permit.right(*right).map(|_| vec![])?,
        Request::Load { object, programs, globals } => {
            let load = permit.load(object, programs, globals)?;
            let words = load.programs().map(|rule| {
                let fd = if load.program_fd(&rule.program) { " and its fd" } else { "" };
                format!("{}{fd}", rule.program)
            });
            let mut words: Vec<String> = words.collect();
            words.sort();
            words
        }
        Request::Attach { object, program, kind, target } => {
            let attach = permit.attach(object, program, *kind, target)?;
            let rule = attach.rule();
            let option = match &rule.hook {
                Hook::Xdp { mode, .. } => format!("{mode:?}").to_lowercase(),
                Hook::Tcx { direction, order, .. } => format!("{direction:?} {order:?}").to_lowercase(),
                Hook::CgroupSkb { direction, .. } => format!("{direction:?}").to_lowercase(),
                Hook::Uprobe { at_return: true, .. } | Hook::Kprobe { at_return: true, .. } => {
                    "return".to_owned()
                }
                _ => String::new(),
            };
            let fd = if rule.link_fd { "link_fd" } else { "" };
            vec![attach.target().to_string(), format!("{} {option} {fd}", rule.hook.kind().row().key)]
        }
        Request::Map { object, map } => {
            vec![permit.map(object, map)?.access().interface_word().replace('_', "-")]
        }
    })
}
