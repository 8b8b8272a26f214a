//! The journal, by its native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL): one datagram per record, one field per
//! fact. Values go with their length, so that nothing in them can become a field of its own.

use super::limit::Fields;
use bpfgate_protocol::audit::{FIELD, MESSAGE_ID, sentence};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg, socket};
use serde_json::Value;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd};

/// Where journald listens.
const SOCKET: &str = "/run/systemd/journal/socket";

pub(super) struct Journal {
    socket: OwnedFd,
    /// Records that it did not take, which nobody has been told of yet.
    lost: u64,
}

impl Journal {
    /// Connects; before the lock-down, after which there is no way to it.
    pub(super) fn connect() -> nix::Result<Self> {
        let fd = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        connect(fd.as_raw_fd(), &UnixAddr::new(SOCKET)?)?;
        Ok(Self { socket: fd, lost: 0 })
    }

    /// Sends a record. It never waits: what a journal that is stuck does not take is counted.
    pub(super) fn send(&mut self, record: &Fields) {
        if self.lost > 0 {
            let why = format!("{} audit records were lost: the journal did not take them", self.lost);
            let mut notice = Fields::new();
            notice.insert("verb".into(), "Lost".into());
            notice.insert("verdict".into(), "lost".into());
            notice.insert("why".into(), why.into());
            if self.put(&notice).is_ok() {
                self.lost = 0;
            }
        }
        if self.put(record).is_err() {
            self.lost += 1;
        }
    }

    fn put(&self, record: &Fields) -> nix::Result<()> {
        let bytes = datagram(record);
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        loop {
            match sendmsg::<()>(self.socket.as_raw_fd(), &[IoSlice::new(&bytes)], &[], flags, None) {
                Err(Errno::EINTR) => {}
                sent => return sent.map(drop),
            }
        }
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
        other => other.to_string(),
    }
}

fn datagram(record: &Fields) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut field = |name: &str, value: &str| {
        bytes.extend_from_slice(name.as_bytes());
        bytes.push(b'\n');
        bytes.extend_from_slice(&(value.len() as u64).to_le_bytes());
        bytes.extend_from_slice(value.as_bytes());
        bytes.push(b'\n');
    };
    let allowed = record.get("verdict").is_some_and(|verdict| verdict == "allowed");
    field("MESSAGE", &sentence(|key| record.get(key).map(text)));
    field("MESSAGE_ID", MESSAGE_ID);
    // info and notice, as in syslog(3).
    field("PRIORITY", if allowed { "6" } else { "5" });
    field("SYSLOG_IDENTIFIER", "bpfgate-broker");
    for (name, value) in record.iter().filter(|(_, value)| !value.is_null()) {
        field(&format!("{FIELD}{}", name.to_uppercase()), &text(value));
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::collections::BTreeMap;

    /// What journald makes of a datagram.
    fn fields(mut bytes: &[u8]) -> BTreeMap<String, String> {
        let mut all = BTreeMap::new();
        while !bytes.is_empty() {
            let end = bytes.iter().position(|byte| *byte == b'\n').expect("a name");
            let (name, rest) = bytes.split_at(end);
            let (length, rest) = rest[1..].split_at(8);
            let length = usize::try_from(u64::from_le_bytes(length.try_into().unwrap())).unwrap();
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
            assert!(all.insert(text(name), text(&rest[..length])).is_none(), "a field twice");
            assert_eq!(rest[length], b'\n');
            bytes = &rest[length + 1..];
        }
        all
    }

    #[test]
    fn a_value_is_never_a_field() {
        let Value::Object(record) = json!({
            "verdict": "Denied", "verb": "Open", "uid": 7, "app": null,
            "about": "x\nBPFGATE_UID=0\n_UID\n\u{1}", "maps": {"a": 1, "b": 2}, "revoked": ["link 1", "link 2"],
        }) else {
            unreachable!()
        };
        let got = fields(&datagram(&record));
        assert_eq!(got["BPFGATE_UID"], "7");
        assert_eq!(got["BPFGATE_ABOUT"], "x\nBPFGATE_UID=0\n_UID\n\u{1}");
        assert_eq!(
            (got["BPFGATE_MAPS"].as_str(), got["BPFGATE_REVOKED"].as_str()),
            ("a=1, b=2", "link 1, link 2")
        );
        assert_eq!((got["PRIORITY"].as_str(), got["MESSAGE_ID"].as_str()), ("5", MESSAGE_ID));
        assert!(!got.contains_key("BPFGATE_APP") && !got.contains_key("_UID"));
    }

    #[test]
    fn a_journal_that_is_stuck_keeps_nobody_waiting_and_what_it_lost_is_said() {
        let (ours, theirs) = std::os::unix::net::UnixDatagram::pair().unwrap();
        let mut journal = Journal { socket: ours.into(), lost: 0 };
        let Value::Object(record) = json!({"verdict": "Denied", "verb": "Open", "about": "x".repeat(4096)})
        else {
            unreachable!()
        };
        for _ in 0..2000 {
            journal.send(&record);
        }
        let lost = journal.lost;
        assert!(lost > 0, "it took everything");
        let mut buffer = vec![0; 65536];
        theirs.set_nonblocking(true).unwrap();
        while theirs.recv(&mut buffer).is_ok() {}
        journal.send(&record);
        let length = theirs.recv(&mut buffer).unwrap();
        assert!(fields(&buffer[..length])["MESSAGE"].contains(&format!("{lost} audit records were lost")));
        assert!(theirs.recv(&mut buffer).is_ok());
        assert_eq!(journal.lost, 0);
    }
}
