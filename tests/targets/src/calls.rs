//! Calls of clients: JSON that anybody may send.

use bpfgate_broker::call::{Call, Frame, Misunderstood};
use bpfgate_protocol::hex;
use bpfgate_protocol::messages::helper::{Target, Verb};
use bpfgate_protocol::policy::OWN_CGROUP;
use serde_json::{Value, json};

/// Any bytes are a call or an error that can be shown. What is understood is what was said: written by hand it is the
/// same request, and no parameter was passed over. No call is for both doors but those that every service knows.
pub fn calls(data: &[u8]) -> bool {
    let frame = match Frame::parse(data) {
        Ok(frame) => frame,
        Err(refusal) => {
            is_sentence(&refusal.why);
            return false;
        }
    };
    let (client, admin) = (frame.call(false), frame.call(true));
    for answer in [&client, &admin] {
        match answer {
            Err(Misunderstood::Refusal(refusal)) => is_sentence(&refusal.why),
            Err(Misunderstood::Standard(_, parameters)) => is_sentence(&parameters.to_string()),
            Ok(_) => {}
        }
    }
    match (client, admin) {
        (Ok(Call::Description { interface: a }), Ok(Call::Description { interface: b })) => {
            assert_eq!(a, b);
            true
        }
        (Ok(Call::Verb(verb)), Err(_)) => {
            is_what_was_said(data, &frame, &verb);
            true
        }
        (Ok(Call::Open { app, text }), Err(_)) => {
            assert!(app.is_none_or(|app| app.as_str() == text), "another app is opened");
            true
        }
        (Ok(Call::Info), Ok(Call::Info))
        | (Err(_), Ok(Call::Status | Call::Reload | Call::Instances { .. })) => true,
        (Err(_), Err(_)) => false,
        _ => panic!("{} is for clients and for the administrator", frame.method),
    }
}

/// Short, and nothing that a terminal obeys.
fn is_sentence(why: &str) {
    assert!(!why.is_empty() && why.len() <= 400, "{} bytes: {why}", why.len());
    assert!(!why.contains(|c: char| c.is_control() && c != '\n' && c != '\t'), "{why:?}");
}

fn is_what_was_said(data: &[u8], frame: &Frame, verb: &Verb) {
    let (method, parameters) = written(verb);
    assert_eq!(frame.method, method);
    let text = format!("{{\"method\":\"{method}\",\"parameters\":{parameters}}}");
    let again = Frame::parse(text.as_bytes()).ok().and_then(|frame| frame.call(false).ok());
    let Some(Call::Verb(again)) = again else { panic!("{verb:?} is no call any more: {text}") };
    assert_eq!(again, *verb, "{text}");
    let written: Value = serde_json::from_str(&parameters).expect("it was parsed");
    let said: Value = serde_json::from_slice(data).expect("it was parsed");
    for (key, value) in said["parameters"].as_object().into_iter().flatten() {
        assert!(value.is_null() || written.get(key).is_some(), "{key} was passed over: {verb:?}");
    }
}

/// The method and the parameters of a request.
fn written(verb: &Verb) -> (&'static str, String) {
    let (method, parameters) = match verb {
        Verb::Load { object, programs, globals } => {
            // By hand: a value of serde_json holds no i128, and no name twice.
            let globals: Vec<String> =
                globals.iter().map(|global| format!("\"{}\":{}", global.name, global.value)).collect();
            let (object, programs) = (json!(object), json!(programs));
            let globals = globals.join(",");
            let text = format!("{{\"object\":{object},\"programs\":{programs},\"globals\":{{{globals}}}}}");
            return ("io.bpfgate.Load", text);
        }
        Verb::Attach { instance, program, hook, target } => {
            let target = match target {
                Target::Only => json!({}),
                Target::Interface(name) => json!({ "interface": name }),
                Target::Cgroup(path) => json!({ "cgroup": path }),
                Target::Own => json!({ "cgroup": OWN_CGROUP }),
                Target::Event(event) => json!({ "event": event }),
                Target::Symbol { binary, symbol } => json!({ "binary": binary, "symbol": symbol }),
                Target::Function(name) => json!({ "function": name }),
                Target::Unit(unit) => panic!("a client names {unit}"),
            };
            let hook = hook.map(|kind| kind.row().key);
            let parameters =
                json!({ "instance": instance.0, "program": program, "hook": hook, "target": target });
            ("io.bpfgate.Attach", parameters)
        }
        Verb::Detach { link } => ("io.bpfgate.Detach", json!({ "link": link.0 })),
        Verb::Unload { instance } => ("io.bpfgate.Unload", json!({ "instance": instance.0 })),
        Verb::Map { instance, map } => ("io.bpfgate.Map", json!({ "instance": instance.0, "name": map })),
        Verb::ReadMap { instance, map, cursor, limit } => {
            let cursor = hex::encode(&cursor.0);
            let parameters = json!({ "instance": instance.0, "name": map, "cursor": cursor, "limit": limit });
            ("io.bpfgate.ReadMap", parameters)
        }
        Verb::List => ("io.bpfgate.List", json!({})),
    };
    (method, parameters.to_string())
}
