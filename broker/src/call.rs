//! From the bytes of a client to a typed request. Whatever is not exactly a call of the interface is refused here.

use bpfgate_protocol::hex;
use bpfgate_protocol::hooks::Kind;
use bpfgate_protocol::messages::helper::{Global, Target, Verb};
use bpfgate_protocol::messages::{Bytes, InstanceId, LinkId};
use bpfgate_protocol::names::{AppName, GlobalName, NameError};
use bpfgate_protocol::policy;
use bpfgate_protocol::refusal::{Refusal, printable};
use bpfgate_protocol::table::Table;
use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Value, value::RawValue};
use std::fmt;

/// A Varlink call.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Frame {
    /// Its whole name.
    pub method: String,
    #[serde(default)]
    parameters: Option<Box<RawValue>>,
    /// The caller wants no reply.
    #[serde(default)]
    pub oneway: bool,
    #[serde(default)]
    #[allow(dead_code)] // a call that wants more replies gets one
    more: bool,
    #[serde(default)]
    upgrade: bool,
}

/// What is asked.
pub enum Call {
    /// `org.varlink.service.GetInfo`
    Info,
    /// `org.varlink.service.GetInterfaceDescription`
    Description {
        /// Which.
        interface: String,
    },
    /// `io.bpfgate.Open`. A text that cannot be the name of an app is the name of none.
    Open {
        /// The app.
        app: Option<AppName>,
        /// As it was said.
        text: String,
    },
    /// `io.bpfgate.Admin.Status`
    Status,
    /// `io.bpfgate.Admin.Reload`
    Reload,
    /// `io.bpfgate.Admin.Instances`
    Instances {
        /// Of which app.
        app: AppName,
    },
    /// Everything that needs a session.
    Verb(Verb),
}

/// Why a call is not understood.
pub enum Misunderstood {
    /// An error of `io.bpfgate`.
    Refusal(Refusal),
    /// An error of `org.varlink.service`: its name and its parameters.
    Standard(&'static str, Value),
}

impl From<Refusal> for Misunderstood {
    fn from(refusal: Refusal) -> Self {
        Self::Refusal(refusal)
    }
}

fn invalid(why: impl fmt::Display) -> Refusal {
    Refusal::invalid(printable(&why.to_string(), 300))
}

impl Frame {
    /// The bytes of a call, without the NUL at its end.
    ///
    /// Errors: `Invalid` (no call, or one that wants another protocol)
    pub fn parse(bytes: &[u8]) -> Result<Self, Refusal> {
        let Table(frame): Table<Self> =
            serde_json::from_slice(bytes).map_err(|e| invalid(format!("this is no Varlink call: {e}")))?;
        if frame.upgrade {
            return Err(invalid("no method upgrades the connection"));
        }
        Ok(frame)
    }

    /// The interface and the method of `method`.
    pub fn split(&self) -> (&str, &str) {
        self.method.rsplit_once('.').unwrap_or(("", &self.method))
    }

    fn parameters<T: DeserializeOwned>(&self) -> Result<T, Refusal> {
        let text = self.parameters.as_ref().map_or("{}", |raw| raw.get());
        let parameters = serde_json::from_str(text);
        parameters
            .map(|Table(parameters)| parameters)
            .map_err(|e| invalid(format!("the parameters of {}: {e}", self.split().1)))
    }

    /// What is asked, through the administrator's door or the one for clients.
    pub fn call(&self, admin: bool) -> Result<Call, Misunderstood> {
        match self.split() {
            ("io.bpfgate.Admin", "Status") if admin => {
                let Empty {} = self.parameters()?;
                Ok(Call::Status)
            }
            ("io.bpfgate.Admin", "Reload") if admin => {
                let Empty {} = self.parameters()?;
                Ok(Call::Reload)
            }
            ("io.bpfgate.Admin", "Instances") if admin => {
                let Open { app } = self.parameters()?;
                Ok(Call::Instances { app: named("app", app)? })
            }
            ("org.varlink.service", "GetInfo") => {
                let Empty {} = self.parameters()?;
                Ok(Call::Info)
            }
            ("org.varlink.service", "GetInterfaceDescription") => {
                let Description { interface } = self.parameters()?;
                Ok(Call::Description { interface })
            }
            ("io.bpfgate", "Open") if !admin => {
                let Open { app } = self.parameters()?;
                Ok(Call::Open { app: app.parse().ok(), text: app })
            }
            ("io.bpfgate", _) if !admin => self.verb().map(Call::Verb),
            ("io.bpfgate.Admin", _) if admin => Err(self.unknown_method()),
            ("org.varlink.service", _) => Err(self.unknown_method()),
            (interface, _) => {
                let interface = printable(interface, 100);
                Err(Misunderstood::Standard(
                    "org.varlink.service.InterfaceNotFound",
                    serde_json::json!({"interface": interface}),
                ))
            }
        }
    }

    fn unknown_method(&self) -> Misunderstood {
        let method = printable(&self.method, 100);
        Misunderstood::Standard("org.varlink.service.MethodNotFound", serde_json::json!({"method": method}))
    }

    fn verb(&self) -> Result<Verb, Misunderstood> {
        Ok(match self.split().1 {
            "Load" => {
                let p: Load = self.parameters()?;
                let programs = p.programs.unwrap_or_default();
                let programs =
                    programs.into_iter().map(|name| named("program", name)).collect::<Result<_, _>>()?;
                Verb::Load {
                    object: named("object", p.object)?,
                    programs,
                    globals: p.globals.unwrap_or_default().0,
                }
            }
            "Attach" => {
                let p: Attach = self.parameters()?;
                let hook = match p.hook {
                    None => None,
                    Some(key) => {
                        Some(Kind::from_key(&key).ok_or_else(|| invalid("hook: there is no such hook"))?)
                    }
                };
                let target = p.target.map_or(Ok(Target::Only), |Table(target)| target.target())?;
                Verb::Attach {
                    instance: InstanceId(p.instance),
                    program: named("program", p.program)?,
                    hook,
                    target,
                }
            }
            "Detach" => Verb::Detach { link: LinkId(self.parameters::<Detach>()?.link) },
            "Unload" => Verb::Unload { instance: InstanceId(self.parameters::<Unload>()?.instance) },
            "Map" => {
                let p: Map = self.parameters()?;
                Verb::Map { instance: InstanceId(p.instance), map: named("name", p.name)? }
            }
            "ReadMap" => {
                let p: ReadMap = self.parameters()?;
                let limit = p.limit.unwrap_or(256);
                if !(1..=256).contains(&limit) {
                    return Err(invalid("limit is 1 to 256").into());
                }
                let cursor = hex::decode(p.cursor.as_deref().unwrap_or_default())
                    .ok_or_else(|| invalid("cursor: not what ReadMap gave"))?;
                Verb::ReadMap {
                    instance: InstanceId(p.instance),
                    map: named("name", p.name)?,
                    cursor: Bytes(cursor),
                    limit,
                }
            }
            "List" => {
                let Empty {} = self.parameters()?;
                Verb::List
            }
            _ => return Err(self.unknown_method()),
        })
    }
}

fn named<T: TryFrom<String, Error = NameError>>(field: &str, text: String) -> Result<T, Refusal> {
    T::try_from(text).map_err(|error| invalid(format!("{field}: {error}")))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Empty {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    interface: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Open {
    app: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Load {
    object: String,
    programs: Option<Vec<String>>,
    globals: Option<Globals>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Attach {
    instance: u64,
    program: String,
    target: Option<Table<WireTarget>>,
    hook: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WireTarget {
    interface: Option<String>,
    cgroup: Option<String>,
    event: Option<String>,
    binary: Option<String>,
    symbol: Option<String>,
    function: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Detach {
    link: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Unload {
    instance: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Map {
    instance: u64,
    name: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ReadMap {
    instance: u64,
    name: String,
    cursor: Option<String>,
    limit: Option<u16>,
}

impl WireTarget {
    fn target(self) -> Result<Target, Refusal> {
        match (self.interface, self.cgroup, self.event, self.binary, self.symbol, self.function) {
            (None, None, None, None, None, None) => Ok(Target::Only),
            (Some(name), None, None, None, None, None) => Ok(Target::Interface(named("interface", name)?)),
            (None, Some(path), None, None, None, None) if path == policy::OWN_CGROUP => Ok(Target::Own),
            (None, Some(path), None, None, None, None) => Ok(Target::Cgroup(named("cgroup", path)?)),
            (None, None, Some(event), None, None, None) => Ok(Target::Event(named("event", event)?)),
            (None, None, None, Some(binary), Some(symbol), None) => {
                Ok(Target::Symbol { binary: named("binary", binary)?, symbol: named("symbol", symbol)? })
            }
            (None, None, None, None, None, Some(name)) => Ok(Target::Function(named("function", name)?)),
            _ => {
                Err(invalid("target: set interface, or cgroup, or event, or binary and symbol, or function"))
            }
        }
    }
}

/// Values of globals. A name that stands there twice stays there twice, for the check to refuse: a plain map would
/// silently take the last one.
#[derive(Default)]
struct Globals(Vec<Global>);

impl<'de> Deserialize<'de> for Globals {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Globals;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of integers")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Globals, A::Error> {
                let mut all = Vec::new();
                while let Some((name, value)) = map.next_entry::<GlobalName, i128>()? {
                    all.push(Global { name, value });
                }
                Ok(Globals(all))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(text: &str) -> Result<Call, String> {
        let frame = Frame::parse(text.as_bytes()).map_err(|r| r.why)?;
        frame.call(false).map_err(|m| match m {
            Misunderstood::Refusal(refusal) => format!("{}: {}", refusal.class.name(), refusal.why),
            Misunderstood::Standard(name, parameters) => format!("{name} {parameters}"),
        })
    }

    fn verb(text: &str) -> Verb {
        match call(text) {
            Ok(Call::Verb(verb)) => verb,
            Ok(_) => panic!("another call"),
            Err(why) => panic!("{why}"),
        }
    }

    #[test]
    fn calls_become_requests() {
        let load = verb(
            r#"{"method":"io.bpfgate.Load","parameters":{"object":"o","globals":{"a":-1,"b":18446744073709551615}}}"#,
        );
        let Verb::Load { globals, .. } = load else { panic!() };
        assert_eq!(globals.iter().map(|g| g.value).collect::<Vec<_>>(), [-1, i128::from(u64::MAX)]);
        let attach = verb(
            r#"{"method":"io.bpfgate.Attach","parameters":{"instance":3,"program":"p","target":{"interface":"eth0"}}}"#,
        );
        assert!(matches!(attach, Verb::Attach { target: Target::Interface(_), instance: InstanceId(3), .. }));
        let read =
            verb(r#"{"method":"io.bpfgate.ReadMap","parameters":{"instance":3,"name":"m","cursor":"00fF"}}"#);
        assert!(matches!(read, Verb::ReadMap { cursor: Bytes(ref c), limit: 256, .. } if c[..] == [0, 255]));
        assert!(matches!(call(r#"{"method":"org.varlink.service.GetInfo"}"#), Ok(Call::Info)));
        assert!(matches!(
            call(r#"{"method":"io.bpfgate.Open","parameters":{"app":"../x"}}"#),
            Ok(Call::Open { app: None, .. })
        ));
    }

    #[test]
    fn what_is_not_exactly_a_call_is_refused() {
        for (text, expected) in [
            ("", "this is no Varlink call"),
            ("[1]", "this is no Varlink call"),
            ("{\"method\":\"io.bpfgate.List\",\"extra\":1}", "this is no Varlink call"),
            ("{\"method\":\"io.bpfgate.List\",\"method\":\"io.bpfgate.List\"}", "this is no Varlink call"),
            ("[\"io.bpfgate.List\",null,false,false,false]", "this is no Varlink call"),
            ("{\"method\":\"io.bpfgate.List\",\"parameters\":[]}", "Invalid: the parameters of List"),
            ("{\"method\":\"io.bpfgate.Open\",\"parameters\":[\"app\"]}", "Invalid: the parameters of Open"),
            ("{\"method\":\"io.bpfgate.List\",\"upgrade\":true}", "no method upgrades"),
            ("{\"method\":\"io.bpfgate.List\",\"parameters\":{\"x\":1}}", "Invalid: the parameters of List"),
            ("{\"method\":\"io.bpfgate.Nope\"}", "org.varlink.service.MethodNotFound"),
            ("{\"method\":\"io.other.Nope\"}", "org.varlink.service.InterfaceNotFound"),
            ("{\"method\":\"List\"}", "org.varlink.service.InterfaceNotFound"),
            (
                "{\"method\":\"io.bpfgate.Load\",\"parameters\":{\"object\":\"../o\"}}",
                "Invalid: object: an object name",
            ),
            (
                "{\"method\":\"io.bpfgate.Detach\",\"parameters\":{\"link\":-1}}",
                "Invalid: the parameters of Detach",
            ),
            (
                "{\"method\":\"io.bpfgate.Detach\",\"parameters\":{\"link\":1.5}}",
                "Invalid: the parameters of Detach",
            ),
            (
                "{\"method\":\"io.bpfgate.ReadMap\",\"parameters\":{\"instance\":1,\"name\":\"m\",\"limit\":0}}",
                "Invalid: limit",
            ),
            (
                "{\"method\":\"io.bpfgate.ReadMap\",\"parameters\":{\"instance\":1,\"name\":\"m\",\"cursor\":\"é0\"}}",
                "Invalid: cursor",
            ),
            (
                "{\"method\":\"io.bpfgate.Attach\",\"parameters\":{\"instance\":1,\"program\":\"p\",\"target\":{\"interface\":\"a\",\"event\":\"b\"}}}",
                "Invalid: target",
            ),
        ] {
            let got = call(text).err().unwrap_or_default();
            assert!(got.starts_with(expected), "{text}: {got}");
        }
    }

    #[test]
    fn a_global_that_is_set_twice_reaches_the_check_twice() {
        let load =
            verb(r#"{"method":"io.bpfgate.Load","parameters":{"object":"o","globals":{"a":1,"a":2}}}"#);
        assert!(matches!(load, Verb::Load { globals, .. } if globals.len() == 2));
    }
}
