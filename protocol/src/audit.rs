//! What writer and readers of audit records have to agree on.

/// Marks records in the journal, which has those of many programs.
pub const MESSAGE_ID: &str = "5f1c7a9e0b6d4c0f8a2f6d3be4917c58";

/// What the fields of a record are called in the journal begins with this; the rest is as in JSON, in upper case.
pub const FIELD: &str = "BPFGATE_";

/// A record as a line for people. `get` gives its fields.
pub fn sentence(get: impl Fn(&str) -> Option<String>) -> String {
    let mut line = get("verdict").unwrap_or_else(|| "?".into());
    let mut add = |before: &str, key: &str| {
        if let Some(text) = get(key).filter(|text| !text.is_empty()) {
            line.push_str(before);
            line.push_str(&text);
        }
    };
    add(": ", "verb");
    add(" ", "about");
    for (before, key) in [
        (", app ", "app"),
        (", uid ", "uid"),
        (", pid ", "pid"),
        (", unit ", "unit"),
        (", instance ", "instance"),
        (", link ", "link"),
        (", suppressed ", "suppressed"),
        (", generation ", "generation"),
        (", request ", "request"),
        ("; revoked ", "revoked"),
        ("; issued and beyond recall ", "beyond_recall"),
        (": ", "why"),
        (", by ", "by"),
    ] {
        add(before, key);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_one_line_with_what_it_has() {
        let fields = [("verdict", "Denied"), ("verb", "Open"), ("uid", "7"), ("app", ""), ("why", "nobody")];
        let get =
            |key: &str| fields.iter().find(|(name, _)| *name == key).map(|(_, text)| (*text).to_owned());
        assert_eq!(sentence(get), "Denied: Open, uid 7: nobody");
    }
}
