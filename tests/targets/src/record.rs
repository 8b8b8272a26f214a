//! What a helper wrote for the next one, and the service manager kept.

use bpfgate_helper::record::{MAX_NUMBER, Record};

/// Any bytes are a record or an error. The numbers of a record are in order; written again it is the same, in the newest
/// version.
pub fn record(data: &[u8]) -> bool {
    let Ok(record) = Record::read(data) else { return false };
    assert!(record.last_instance <= MAX_NUMBER && record.last_link <= MAX_NUMBER);
    for instance in &record.instances {
        assert!(instance.id.0 <= record.last_instance);
        assert!(instance.links.iter().all(|link| link.info.id.0 <= record.last_link));
    }
    let written = record.bytes().expect("what is read can be kept");
    let again = Record::read(&written).expect("what is written can be read");
    assert_eq!(again.bytes().expect("the same once more"), written);
    true
}
