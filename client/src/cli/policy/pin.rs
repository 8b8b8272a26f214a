//! `bpfgate policy pin`: the digests of a policy, written into it. Nothing else of the file is touched.

use super::super::Outcome;
use super::super::args::PinArgs;
use super::super::failure::{Failure, complain};
use super::super::output::{self, Style};
use super::{Source, invalid, objects};
use bpfgate_client::hex;
use bpfgate_protocol::policy::Policy;
use bpfgate_protocol::policy::file::Accounts;
use bpfgate_systemd::grants::grants;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::Path;
use std::process::ExitCode;
use toml_edit::{DocumentMut, TableLike, value};

/// A digest that is not the one of the file.
struct Change {
    object: String,
    old: Option<String>,
    new: String,
}

/// 0 if every digest is there now, 1 if an object cannot be read or, with --check, if a digest would change.
pub(super) fn run(args: &PinArgs) -> Outcome {
    let style = Style::from(&args.style);
    let mut results = Vec::new();
    let (mut changed, mut failed) = (false, false);
    for path in &args.files {
        let source = match Source::read(path) {
            Ok(source) => source,
            Err(error) => return Ok(invalid(&error)),
        };
        let (changes, unread) = changes(&source.policy, args.objects.as_deref());
        for why in unread {
            failed = true;
            complain(&format!("{}: {why}", path.display()));
        }
        for Change { object, old, new } in &changes {
            changed = true;
            if style == Style::Table {
                let old = old.as_deref().unwrap_or("none");
                output::print(&format_args!("{}: object {object}: {old} -> {new}\n", path.display()))?;
            }
            results.push(json!({"file": path, "object": object, "old": old, "new": new}));
        }
        if !args.check && !changes.is_empty() {
            let text = pinned(&source, &changes)
                .map_err(|why| Failure::Failed(format!("{}: {why}", path.display())))?;
            replace(path, &text)
                .map_err(|error| Failure::Failed(format!("{} is as it was: {error}", path.display())))?;
        }
    }
    if style == Style::Json {
        output::print_json(&Value::from(results))?;
    } else if !changed && !failed {
        output::print(&"every digest is that of its file\n")?;
    }
    Ok(ExitCode::from(u8::from(failed || (args.check && changed))))
}

/// The digests that differ, and sentences about objects that cannot be read.
fn changes(policy: &Policy, directory: Option<&Path>) -> (Vec<Change>, Vec<String>) {
    let (mut changes, mut unread) = (Vec::new(), Vec::new());
    for (name, object) in &policy.objects {
        let place = objects::place(object.path.as_str(), directory);
        match objects::read(&place) {
            Ok(bytes) => {
                let digest: [u8; 32] = Sha256::digest(&bytes).into();
                if object.sha256 != Some(digest) {
                    let old = object.sha256.map(|digest| hex::encode(&digest));
                    changes.push(Change { object: name.to_string(), old, new: hex::encode(&digest) });
                }
            }
            Err(why) => unread.push(format!("object {name}: {} {why}", place.display())),
        }
    }
    (changes, unread)
}

/// The text with these digests, and with nothing else changed: that is looked at again.
fn pinned(source: &Source, changes: &[Change]) -> Result<String, String> {
    let mut document: DocumentMut = source.text.parse().map_err(|error| format!("{error}"))?;
    for Change { object, new, .. } in changes {
        let table = document.get_mut("objects").and_then(|objects| objects.get_mut(object));
        let table = table.and_then(|object| object.as_table_like_mut());
        set(table.ok_or_else(|| format!("object {object} is not a table"))?, new);
    }
    let text = document.to_string();
    let mut expected = source.policy.objects.clone();
    for Change { object, new, .. } in changes {
        for (name, rules) in &mut expected {
            if name.as_str() == object {
                rules.sha256 = hex::decode(new).and_then(|digest| digest.try_into().ok());
            }
        }
    }
    let accounts = Accounts::read().map_err(|error| error.to_string())?;
    let policy = Policy::parse(&source.policy.file, &text, &accounts).map_err(|error| error.to_string())?;
    let same = grants(&policy) == grants(&Policy { objects: expected, ..source.policy.clone() });
    if same {
        Ok(text)
    } else {
        Err("the digests cannot be written without changing something else".to_owned())
    }
}

/// Sets the digest; the comment behind an old one stays.
fn set(object: &mut dyn TableLike, digest: &str) {
    let mut new = value(digest);
    if let (Some(old), Some(new)) = (object.get("sha256").and_then(|old| old.as_value()), new.as_value_mut())
    {
        *new.decor_mut() = old.decor().clone();
    }
    object.insert("sha256", new);
}

/// Puts a new file in the place of an old one, at once, with its mode and owner.
fn replace(path: &Path, text: &str) -> std::io::Result<()> {
    let path = fs::canonicalize(path)?;
    let old = fs::metadata(&path)?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    // Not .toml: nobody takes it for a policy.
    name.push(format!(".new-{}", std::process::id()));
    let new = path.with_file_name(name);
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&new)?;
    let written = (|| {
        file.write_all(text.as_bytes())?;
        if (old.uid(), old.gid()) != (file.metadata()?.uid(), file.metadata()?.gid()) {
            fchown(&file, Some(old.uid()), Some(old.gid()))?;
        }
        file.set_permissions(fs::Permissions::from_mode(old.mode() & 0o7777))?;
        file.sync_all()?;
        fs::rename(&new, &path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_layout_stay() {
        let text =
            "version = 1 # one\n[objects.b]\npath = \"/b\" # where\n\n[objects.a] # first\npath   = \"/a\"\n\
                    sha256 = \"AA\" # old\n[[objects.a.xdp]]\nprogram = \"p\"\ninterfaces = [ \"lo\" ]\n"
                .replace("AA", &"aa".repeat(32));
        let policy = Policy::parse("p", &text, &Accounts::default()).unwrap();
        let new = "cd".repeat(32);
        let change = |object: &str| Change { object: object.to_owned(), old: None, new: new.clone() };
        let got = pinned(&Source { text: text.clone(), policy }, &[change("a"), change("b")]).unwrap();
        let expected = text
            .replace(&"aa".repeat(32), &new)
            .replace("path = \"/b\" # where\n", &format!("path = \"/b\" # where\nsha256 = \"{new}\"\n"));
        assert_eq!(got, expected);
    }

    #[test]
    fn a_file_is_replaced_with_its_mode() {
        let path = std::env::temp_dir().join(format!("bpfgate-pin-{}.toml", std::process::id()));
        fs::write(&path, "old").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        replace(&path, "new").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o640);
        fs::remove_file(&path).unwrap();
    }
}
