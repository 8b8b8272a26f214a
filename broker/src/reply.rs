//! From outcomes to the bytes that a client reads.

use crate::server::Fate;
use bpfgate_protocol::hex;
use bpfgate_protocol::hooks::Capability;
use bpfgate_protocol::inspect::map_type_name;
use bpfgate_protocol::messages::helper::{InstanceInfo, LinkInfo, MapInfo, Outcome, ProgramInfo, Sandbox};
use bpfgate_protocol::names::AppName;
use bpfgate_protocol::policy::Policy;
use bpfgate_protocol::refusal::{Class, Refusal, printable};
use bpfgate_protocol::{ADMIN_INTERFACE, INTERFACE};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// The description of `org.varlink.service`, which every Varlink service has. Source: varlink.org/Service.
const SERVICE: &str = "\
interface org.varlink.service
method GetInfo() -> (vendor: string, product: string, version: string, url: string, interfaces: []string)
method GetInterfaceDescription(interface: string) -> (description: string)
error InterfaceNotFound (interface: string)
error MethodNotFound (method: string)
error MethodNotImplemented (method: string)
error InvalidParameter (parameter: string)
error PermissionDenied ()
error ExpectedMore ()
";

fn frame(value: &Value) -> Vec<u8> {
    let mut bytes = value.to_string().into_bytes();
    bytes.push(0);
    bytes
}

/// A reply with parameters.
pub(crate) fn parameters(parameters: &Value) -> Vec<u8> {
    frame(&json!({ "parameters": parameters }))
}

/// An error of `org.varlink.service`.
pub(crate) fn standard(error: &str, parameters: &Value) -> Vec<u8> {
    frame(&json!({ "error": error, "parameters": parameters }))
}

/// A refusal, with the verifier's log if it is one of the verifier.
pub(crate) fn refusal(refusal: &Refusal, request: &str, log: &str) -> Vec<u8> {
    let mut parameters = json!({ "message": refusal.public(), "request": request });
    match (refusal.class, &refusal.call) {
        (Class::Kernel, Some((call, errno))) => {
            parameters["call"] = json!(call);
            parameters["errno"] = json!(errno);
        }
        (Class::Verifier, _) => {
            parameters["program"] = json!(refusal.program);
            parameters["log"] = json!(log);
        }
        _ => {}
    }
    standard(&format!("io.bpfgate.{}", refusal.class.name()), &parameters)
}

/// `GetInfo`.
pub(crate) fn info(admin: bool) -> Vec<u8> {
    let interface = if admin { "io.bpfgate.Admin" } else { "io.bpfgate" };
    parameters(&json!({
        "vendor": "bpfgate",
        "product": "bpfgate",
        "version": env!("CARGO_PKG_VERSION"),
        "url": "https://github.com/bpfgate/bpfgate",
        "interfaces": [interface, "org.varlink.service"],
    }))
}

/// `GetInterfaceDescription`.
pub(crate) fn description(interface: &str) -> Vec<u8> {
    match interface {
        "io.bpfgate" => parameters(&json!({ "description": INTERFACE })),
        "io.bpfgate.Admin" => parameters(&json!({ "description": ADMIN_INTERFACE })),
        "org.varlink.service" => parameters(&json!({ "description": SERVICE })),
        other => {
            standard("org.varlink.service.InterfaceNotFound", &json!({ "interface": printable(other, 100) }))
        }
    }
}

/// What a helper did. Indices of descriptors count in the order that the message carries them.
pub(crate) fn outcome(outcome: &Outcome) -> Vec<u8> {
    let mut fds = Counter(0);
    parameters(&match outcome {
        // A refusal has its own reply.
        Outcome::Done | Outcome::Adopted(_) | Outcome::Refused { .. } => json!({}),
        Outcome::Loaded { instance, programs, maps, .. } => {
            let programs: Vec<Value> = programs.iter().map(|p| program(p, &mut fds)).collect();
            let maps: Vec<Value> = maps.iter().map(|m| map(m, &mut fds)).collect();
            json!({ "instance": instance.0, "programs": programs, "maps": maps })
        }
        Outcome::Attached { link, target, fd } => {
            with_fd(json!({ "link": link.0, "target": target.to_string() }), *fd, &mut fds)
        }
        Outcome::Map(info) => json!({ "map": map(info, &mut fds) }),
        Outcome::Entries { entries, cursor } => {
            let entries: Vec<Value> = entries
                .iter()
                .map(|(key, value)| json!({ "key": hex::encode(&key.0), "value": hex::encode(&value.0) }))
                .collect();
            if cursor.0.is_empty() {
                json!({ "entries": entries })
            } else {
                json!({ "entries": entries, "cursor": hex::encode(&cursor.0) })
            }
        }
        Outcome::Survey { sessions, instances } => {
            let instances: Vec<Value> = instances.iter().map(|i| instance(i, &mut fds)).collect();
            json!({ "sessions": sessions, "instances": instances })
        }
        Outcome::Instances(instances) => {
            let instances: Vec<Value> = instances.iter().map(|i| instance(i, &mut fds)).collect();
            json!({ "instances": instances })
        }
    })
}

/// What the administrator is told of a helper.
pub(crate) struct HelperStatus<'a> {
    pub(crate) app: &'a AppName,
    pub(crate) policy: &'a Policy,
    pub(crate) sessions: u32,
    /// None: it is starting.
    pub(crate) sandbox: Option<&'a Sandbox>,
}

fn sandbox(sandbox: &Sandbox) -> Value {
    let has = |c: &&Capability| sandbox.capabilities & (1 << c.bit()) != 0;
    let capabilities: Vec<&str> = Capability::ALL.iter().filter(has).map(|c| c.name()).collect();
    json!({
        "landlock_abi": sandbox.landlock_abi,
        "seccomp_filters": sandbox.seccomp_filters,
        "capabilities": capabilities,
    })
}

/// `Status` of the administrator's interface.
pub(crate) fn status<'a>(
    uptime: u64,
    connections: usize,
    own: &Sandbox,
    helpers: impl Iterator<Item = HelperStatus<'a>>,
) -> Vec<u8> {
    let helper = |helper: HelperStatus<'_>| {
        let mut value = json!({
            "app": helper.app,
            "policy": helper.policy.file,
            "sessions": helper.sessions,
        });
        if let Some(its) = helper.sandbox {
            value["sandbox"] = sandbox(its);
        }
        value
    };
    parameters(&json!({
        "version": env!("CARGO_PKG_VERSION"),
        "uptime": uptime,
        "connections": connections,
        "sandbox": sandbox(own),
        "helpers": helpers.map(helper).collect::<Vec<_>>(),
    }))
}

/// `Reload` of the administrator's interface.
pub(crate) fn reloaded(generation: u64, apps: &BTreeMap<AppName, Fate>) -> Vec<u8> {
    let app = |(app, fate): (&AppName, &Fate)| {
        json!({
            "app": app,
            "change": fate.change.word(),
            "helper": fate.helper.word(),
            "sessions_ended": fate.sessions,
            "revoked": fate.revoked,
            "beyond_recall": fate.beyond_recall,
            "why": fate.why,
        })
    };
    parameters(&json!({ "generation": generation, "apps": apps.iter().map(app).collect::<Vec<_>>() }))
}

struct Counter(usize);

fn with_fd(mut value: Value, fd: bool, fds: &mut Counter) -> Value {
    if fd {
        value["fd"] = json!(fds.0);
        fds.0 += 1;
    }
    value
}

fn program(info: &ProgramInfo, fds: &mut Counter) -> Value {
    with_fd(json!({ "name": info.name, "type": info.hook.row().key }), info.fd, fds)
}

fn map(info: &MapInfo, fds: &mut Counter) -> Value {
    let value = json!({
        "name": info.name,
        "type": map_type_name(info.map_type),
        "key_size": info.key_size,
        "value_size": info.value_size,
        "max_entries": info.max_entries,
        "access": info.access.interface_word(),
    });
    with_fd(value, info.fd, fds)
}

fn link(info: &LinkInfo) -> Value {
    json!({
        "id": info.id.0,
        "program": info.program,
        "hook": info.hook.row().key,
        "target": info.target.to_string(),
    })
}

fn instance(info: &InstanceInfo, fds: &mut Counter) -> Value {
    let programs: Vec<Value> = info.programs.iter().map(|p| program(p, fds)).collect();
    let maps: Vec<Value> = info.maps.iter().map(|m| map(m, fds)).collect();
    let links: Vec<Value> = info.links.iter().map(link).collect();
    json!({
        "id": info.id.0,
        "object": info.object,
        "mine": info.mine,
        "programs": programs,
        "maps": maps,
        "links": links,
    })
}
