use std::io::{IoSlice, Read, Write};
use std::thread::JoinHandle;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};

use super::*;
use crate::wire::Access;

/// Requests with the replies the fake broker gives, and how many descriptors come with them.
type Script = Vec<(Value, Value, usize)>;

fn broker(script: Script) -> (Client, JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let peer = std::thread::spawn(move || serve(theirs, script));
    (Client::from_stream(ours), peer)
}

fn serve(mut stream: UnixStream, script: Script) {
    for (request, reply, fds) in script {
        let mut text = Vec::new();
        let mut byte = [0];
        while stream.read_exact(&mut byte).is_ok() && byte[0] != 0 {
            text.push(byte[0]);
        }
        assert_eq!(serde_json::from_slice::<Value>(&text).unwrap(), request);
        let reply = format!("{reply}\0");
        let null = std::fs::File::open("/dev/null").unwrap();
        let raw = vec![null.as_raw_fd(); fds];
        if fds == 0 {
            stream.write_all(reply.as_bytes()).unwrap();
        } else {
            let rights = [ControlMessage::ScmRights(&raw)];
            let parts = [IoSlice::new(reply.as_bytes())];
            sendmsg::<()>(stream.as_raw_fd(), &parts, &rights, MsgFlags::empty(), None).unwrap();
        }
    }
}

fn request(method: &str, parameters: &Value) -> Value {
    json!({"method": format!("io.bpfgate.{method}"), "parameters": parameters})
}

fn map(name: &str, access: &str, fd: Option<usize>) -> Value {
    json!({"name": name, "type": "array", "key_size": 4, "value_size": 8, "max_entries": 1,
        "access": access, "fd": fd})
}

#[test]
fn a_session() {
    let maps = json!([map("a", "frozen", Some(1)), map("b", "proxy", None), map("c", "read_write", Some(0))]);
    let programs = json!([{"name": "p", "type": "xdp"}, {"name": "q", "type": "socket_filter", "fd": 2}]);
    let (mut client, peer) = broker(vec![
        (request("Open", &json!({"app": "x"})), json!({"parameters": {}}), 0),
        (
            request("Load", &json!({"object": "o", "programs": ["p", "q"], "globals": {"rate": 5}})),
            json!({"parameters": {"instance": 7, "programs": programs, "maps": maps}}),
            3,
        ),
        (
            request("Attach", &json!({"instance": 7, "program": "p", "target": {"interface": "lo"}})),
            json!({"parameters": {"link": 9, "target": "lo"}}),
            0,
        ),
        (
            request("Attach", &json!({"instance": 7, "program": "p", "hook": "tcx"})),
            json!({"parameters": {"link": 10, "target": "lo", "fd": 0}}),
            1,
        ),
        (request("Detach", &json!({"link": 9})), json!({"parameters": {}}), 0),
        (request("Unload", &json!({"instance": 7})), json!({}), 0),
    ]);
    client.open("x").unwrap();
    let options = LoadOptions {
        programs: Some(vec!["p".into(), "q".into()]),
        globals: BTreeMap::from([("rate".to_owned(), 5)]),
    };
    let mut instance = client.load("o", &options).unwrap();
    assert_eq!(instance.id, InstanceId(7));
    assert!(instance.programs[0].fd.is_none() && instance.programs[1].fd.is_some());
    let access: Vec<_> = instance.maps.iter().map(|map| (map.access, map.fd.is_some())).collect();
    assert_eq!(access, [(Access::Frozen, true), (Access::Proxy, false), (Access::ReadWrite, true)]);
    let missing = instance.take_map("b").unwrap_err().to_string();
    assert!(missing.contains("its access is proxy"), "{missing}");
    assert!(instance.take_map("nope").unwrap_err().to_string().contains("no map nope"));
    // /dev/null is no map, and the kernel says so.
    assert!(matches!(instance.take_map("a"), Err(Error::Io { .. })));

    let link = client.attach(instance.id, "p", Some(&Target::Interface("lo".into())), None).unwrap();
    assert_eq!((link.id, link.target.as_str(), link.fd.is_none()), (LinkId(9), "lo", true));
    let second = client.attach(instance.id, "p", None, Some("tcx")).unwrap();
    assert!(second.fd.is_some());
    client.detach(link.id).unwrap();
    client.unload(instance.id).unwrap();
    peer.join().unwrap();
}

#[test]
fn fields_that_are_not_set_are_not_sent() {
    let (mut client, peer) = broker(vec![(
        request("Load", &json!({"object": "o"})),
        json!({"parameters": {"instance": 1, "programs": [], "maps": []}}),
        0,
    )]);
    let _ = client.load("o", &LoadOptions::default()).unwrap();
    peer.join().unwrap();
}

#[test]
fn replies_that_contradict_their_descriptors_are_refused() {
    let load = |fd, sent| {
        let maps = json!([map("a", "frozen", fd)]);
        let reply = json!({"parameters": {"instance": 1, "programs": [], "maps": maps}});
        let (mut client, peer) = broker(vec![(request("Load", &json!({"object": "o"})), reply, sent)]);
        let outcome = client.load("o", &LoadOptions::default());
        peer.join().unwrap();
        outcome.map(drop)
    };
    load(Some(0), 1).unwrap();
    for (fd, sent) in [(None, 1), (Some(0), 2), (Some(1), 1), (Some(0), 0)] {
        assert!(matches!(load(fd, sent), Err(Error::Protocol(_))), "{fd:?} of {sent}");
    }
}

#[test]
fn replies_that_do_not_fit_are_refused() {
    for parameters in [
        json!({}),
        json!({"instance": -1, "programs": [], "maps": []}),
        json!({"instance": 1, "programs": [], "maps": [map("a", "everything", None)]}),
        json!({"instance": 1, "programs": [{"name": 5, "type": "xdp"}], "maps": []}),
    ] {
        let reply = json!({"parameters": parameters});
        let (mut client, peer) = broker(vec![(request("Load", &json!({"object": "o"})), reply, 0)]);
        assert!(matches!(client.load("o", &LoadOptions::default()), Err(Error::Protocol(_))));
        peer.join().unwrap();
    }
}

fn page(cursor: Option<&str>, entries: &[(&str, &str)], next: Option<&str>) -> (Value, Value, usize) {
    let mut parameters = json!({"instance": 3, "name": "m"});
    if let Some(cursor) = cursor {
        parameters["cursor"] = cursor.into();
    }
    let entries: Vec<_> = entries.iter().map(|(key, value)| json!({"key": key, "value": value})).collect();
    let reply = json!({"parameters": {"entries": entries, "cursor": next}});
    (request("ReadMap", &parameters), reply, 0)
}

#[test]
fn a_map_is_read_page_by_page() {
    let (mut client, peer) = broker(vec![
        page(None, &[("00", "0a"), ("01", "0b")], Some("c1")),
        page(Some("c1"), &[], Some("c2")),
        page(Some("c2"), &[("02", "0c")], None),
    ]);
    let entries: Vec<Entry> = client.read_map(InstanceId(3), "m").collect::<Result<_, _>>().unwrap();
    assert_eq!(entries.len(), 3);
    assert_eq!((entries[2].key.as_slice(), entries[2].value.as_slice()), (&[2][..], &[0x0c][..]));
    peer.join().unwrap();
}

#[test]
fn a_page_that_leads_nowhere_ends_the_walk() {
    let (mut client, peer) =
        broker(vec![page(None, &[("00", "0a")], Some("c1")), page(Some("c1"), &[("00", "0a")], Some("c1"))]);
    let outcome: Vec<_> = client.read_map(InstanceId(3), "m").collect();
    assert_eq!(outcome.len(), 2);
    assert!(matches!(outcome[1], Err(Error::Protocol(_))));
    peer.join().unwrap();

    let (mut client, peer) = broker(vec![page(None, &[("0", "0a")], None)]);
    assert!(matches!(client.read_map(InstanceId(3), "m").next(), Some(Err(Error::Protocol(_)))));
    peer.join().unwrap();
}

#[test]
fn listing_and_service_info() {
    let instance = json!({"id": 1, "object": "o", "mine": false, "programs": [], "maps": [map("a", "none", None)],
        "links": [{"id": 2, "program": "p", "hook": "xdp", "target": "lo"}]});
    let info = json!({"vendor": "v", "product": "bpfgate", "version": "0.1.0", "url": "u",
        "interfaces": ["org.varlink.service", "io.bpfgate"]});
    let (mut client, peer) = broker(vec![
        (request("List", &json!({})), json!({"parameters": {"instances": [instance]}}), 0),
        (json!({"method": "org.varlink.service.GetInfo", "parameters": {}}), json!({"parameters": info}), 0),
    ]);
    let list = client.list().unwrap();
    assert_eq!((list[0].links[0].id, list[0].maps[0].access), (LinkId(2), Access::None));
    assert_eq!(client.service_info().unwrap().interfaces.len(), 2);
    peer.join().unwrap();
}

#[test]
fn nobody_there() {
    let Err(Error::Unreachable { socket, .. }) = Client::connect(Some(Path::new("/nonexistent/socket")))
    else {
        panic!("connected to nothing");
    };
    assert_eq!(socket, Path::new("/nonexistent/socket"));
    let endless = "x".repeat(200);
    assert!(matches!(Client::connect(Some(Path::new(&endless))), Err(Error::Unreachable { .. })));
}
