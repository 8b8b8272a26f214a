//! What can go wrong, one variant per error of the interface.
#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::path::PathBuf;

use serde_json::Value;

/// What every refusal says.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Refusal {
    /// The broker's sentence: what is wrong and what to do next.
    pub message: String,
    /// Finds the line in the broker's audit record.
    pub request: String,
}

/// An answer that is not the one asked for, or no answer.
///
/// The text of a refusal comes from the broker: clean it of control characters before it goes to a
/// terminal.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// The policy does not allow it, or it does not exist: the same answer.
    Denied(Refusal),
    /// The broker does not understand the request.
    Invalid(Refusal),
    /// The object file is missing, changed, not as the policy says, or libbpf refuses it.
    Object(Refusal),
    /// The kernel's verifier rejected a program.
    Verifier {
        /// The broker's sentence and request id.
        refusal: Refusal,
        /// The rejected program.
        program: String,
        /// The verifier's log.
        log: String,
    },
    /// A system call of the helper failed.
    Kernel {
        /// The broker's sentence and request id.
        refusal: Refusal,
        /// Which call.
        call: String,
        /// Its errno.
        errno: i32,
    },
    /// A limit of the policy or of the broker is reached.
    Quota(Refusal),
    /// Try again later.
    Busy(Refusal),
    /// This kernel or this version of bpfgate cannot do it.
    Unsupported(Refusal),
    /// The helper of the app ended, did not start, or did not answer in time.
    Helper(Refusal),
    /// The link or instance was there and is not any more.
    Gone(Refusal),
    /// Nobody answers on the broker's socket.
    Unreachable {
        /// The path that was tried.
        socket: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A call of this process failed, on the connection or on a descriptor it received.
    Io {
        /// What was being done, as it reads behind "while".
        doing: &'static str,
        /// The failure.
        source: io::Error,
    },
    /// The peer does not speak `io.bpfgate`, or speaks another version of it.
    Protocol(String),
}

impl Error {
    pub(crate) fn io(doing: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io { doing, source }
    }

    /// What the broker said, if it is the broker that refused.
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Denied(refusal)
            | Self::Invalid(refusal)
            | Self::Object(refusal)
            | Self::Verifier { refusal, .. }
            | Self::Kernel { refusal, .. }
            | Self::Quota(refusal)
            | Self::Busy(refusal)
            | Self::Unsupported(refusal)
            | Self::Helper(refusal)
            | Self::Gone(refusal) => Some(refusal),
            Self::Unreachable { .. } | Self::Io { .. } | Self::Protocol(_) => None,
        }
    }

    /// Reads the error of a reply.
    pub(crate) fn from_reply(name: &str, parameters: &Value) -> Self {
        let refusal = Refusal { message: text(parameters, "message"), request: text(parameters, "request") };
        match name {
            "io.bpfgate.Denied" => Self::Denied(refusal),
            "io.bpfgate.Invalid" => Self::Invalid(refusal),
            "io.bpfgate.Object" => Self::Object(refusal),
            "io.bpfgate.Verifier" => {
                Self::Verifier { refusal, program: text(parameters, "program"), log: text(parameters, "log") }
            }
            "io.bpfgate.Kernel" => Self::Kernel {
                refusal,
                call: text(parameters, "call"),
                errno: parameters["errno"].as_i64().and_then(|errno| i32::try_from(errno).ok()).unwrap_or(0),
            },
            "io.bpfgate.Quota" => Self::Quota(refusal),
            "io.bpfgate.Busy" => Self::Busy(refusal),
            "io.bpfgate.Unsupported" => Self::Unsupported(refusal),
            "io.bpfgate.Helper" => Self::Helper(refusal),
            "io.bpfgate.Gone" => Self::Gone(refusal),
            "org.varlink.service.MethodNotFound"
            | "org.varlink.service.MethodNotImplemented"
            | "org.varlink.service.InterfaceNotFound" => Self::Protocol(format!(
                "the broker does not know {}, so it is another version or no bpfgate broker",
                first_text(parameters).unwrap_or("this request")
            )),
            "org.varlink.service.InvalidParameter" => Self::Protocol(format!(
                "the broker does not accept the parameter {}, so it is another version",
                first_text(parameters).unwrap_or("it was given")
            )),
            _ => {
                Self::Protocol(format!("the broker answered with an error this client does not know, {name}"))
            }
        }
    }
}

fn text(parameters: &Value, field: &str) -> String {
    parameters[field].as_str().unwrap_or_default().to_owned()
}

fn first_text(parameters: &Value) -> Option<&str> {
    parameters.as_object()?.values().find_map(Value::as_str)
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Denied(refusal) => say(f, "denied", refusal, ""),
            Self::Invalid(refusal) => say(f, "the request is not valid", refusal, ""),
            Self::Object(refusal) => say(f, "the object cannot be loaded", refusal, ""),
            Self::Verifier { refusal, program, .. } => {
                say(f, "the kernel's verifier rejected the program", refusal, program)
            }
            Self::Kernel { refusal, call, errno } => {
                let errno = io::Error::from_raw_os_error(*errno);
                say(f, "the kernel refused", refusal, &format!("{call}: {errno}"))
            }
            Self::Quota(refusal) => say(f, "a limit is reached", refusal, ""),
            Self::Busy(refusal) => say(f, "busy, try again later", refusal, ""),
            Self::Unsupported(refusal) => say(f, "not supported here", refusal, ""),
            Self::Helper(refusal) => say(f, "the app's helper failed", refusal, ""),
            Self::Gone(refusal) => say(f, "no longer there", refusal, ""),
            Self::Unreachable { socket, source } => write!(
                f,
                "cannot reach the broker on {}: {source}; is bpfgate.socket started, and may you open it?",
                socket.display()
            ),
            Self::Io { doing, source } => write!(f, "while {doing}: {source}"),
            Self::Protocol(what) => f.write_str(what),
        }
    }
}

/// `kind (detail): message (request id)`, without the parts that are empty.
fn say(f: &mut fmt::Formatter<'_>, kind: &str, refusal: &Refusal, detail: &str) -> fmt::Result {
    f.write_str(kind)?;
    if !detail.is_empty() {
        write!(f, " ({detail})")?;
    }
    if !refusal.message.is_empty() {
        write!(f, ": {}", refusal.message)?;
    }
    if !refusal.request.is_empty() {
        write!(f, " (request {})", refusal.request)?;
    }
    Ok(())
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Unreachable { source, .. } | Self::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_error_of_the_interface_has_its_variant() {
        let interface = include_str!("../../protocol/io.bpfgate.varlink");
        let names = interface.lines().filter_map(|line| line.strip_prefix("error "));
        let mut seen = 0;
        for name in names.map(|line| line.split(' ').next().unwrap_or_default()) {
            let parameters = json!({"message": "m", "request": "r7", "errno": 22, "call": "c"});
            let error = Error::from_reply(&format!("io.bpfgate.{name}"), &parameters);
            assert!(format!("{error:?}").starts_with(name), "{name} became {error:?}");
            assert!(error.to_string().ends_with(": m (request r7)"), "{error}");
            seen += 1;
        }
        assert!(seen >= 10, "the interface file has {seen} errors");
    }

    #[test]
    fn fields_are_carried() {
        let parameters = json!({"message": "x", "request": "1", "program": "p", "log": "0: exit\n"});
        let Error::Verifier { program, log, .. } = Error::from_reply("io.bpfgate.Verifier", &parameters)
        else {
            panic!("wrong variant");
        };
        assert_eq!((program.as_str(), log.as_str()), ("p", "0: exit\n"));
        let kernel = Error::from_reply("io.bpfgate.Kernel", &json!({"call": "LINK_CREATE", "errno": 16}));
        assert!(kernel.to_string().starts_with("the kernel refused (LINK_CREATE: Device or resource busy"));
    }

    #[test]
    fn an_unknown_error_is_named() {
        let error = Error::from_reply("com.example.Odd", &Value::Null);
        assert!(matches!(&error, Error::Protocol(text) if text.contains("com.example.Odd")));
        let error = Error::from_reply("org.varlink.service.MethodNotFound", &json!({"method": "a.b.C"}));
        assert!(error.to_string().contains("a.b.C"));
    }
}
