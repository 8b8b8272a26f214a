//! Unit files with their drop-ins, as systemd.unit(5) says that they are found and read: for machines that do not run
//! systemd, and for settings of which `systemctl show` tells neither the file nor the line.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::caps::set::CapSet;

/// Where units are, an earlier directory before a later one. Source: systemd.unit(5), "Unit File Load Path".
const DIRECTORIES: [&str; 11] = [
    "etc/systemd/system.control",
    "run/systemd/system.control",
    "run/systemd/transient",
    "run/systemd/generator.early",
    "etc/systemd/system",
    "run/systemd/system",
    "run/systemd/generator",
    "usr/local/lib/systemd/system",
    "usr/lib/systemd/system",
    // Of machines where it is not a link to the one above.
    "lib/systemd/system",
    "run/systemd/generator.late",
];

/// One assignment of the section `[Service]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Setting {
    pub(crate) key: String,
    pub(crate) value: String,
    pub(crate) file: PathBuf,
    pub(crate) line: usize,
}

impl Setting {
    /// `FILE:LINE`
    pub(crate) fn place(&self) -> String {
        format!("{}:{}", self.file.display(), self.line)
    }
}

/// A unit with what its drop-ins make of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unit {
    /// The unit file and the drop-ins, in the order in which they are read.
    pub(crate) files: Vec<PathBuf>,
    settings: Vec<Setting>,
}

impl Unit {
    /// Reads a unit below `root`; none if there is no such unit, or it is masked.
    pub(crate) fn load(root: &Path, name: &str) -> io::Result<Option<Self>> {
        let names = spellings(name);
        let own = names.iter().take(if template(name).is_some() { 2 } else { 1 });
        let find =
            |name: &String| DIRECTORIES.iter().map(|at| root.join(at).join(name)).find(|path| path.exists());
        let Some(fragment) = own.into_iter().find_map(find) else { return Ok(None) };
        let mut unit = Self { files: Vec::new(), settings: Vec::new() };
        if !unit.read(root, &fragment)? {
            return Ok(None);
        }
        let mut drop_ins: BTreeMap<String, PathBuf> = BTreeMap::new();
        let kind = name.rsplit_once('.').map_or("service", |(_, kind)| kind);
        // The more a name says, the more it counts; then the directory.
        for name in names.iter().map(String::as_str).chain([kind]) {
            for at in DIRECTORIES {
                for path in confs(&root.join(at).join(format!("{name}.d")))? {
                    let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                    drop_ins.entry(file).or_insert(path);
                }
            }
        }
        for path in drop_ins.values() {
            unit.read(root, path)?;
        }
        Ok(Some(unit))
    }

    /// A unit of one file.
    pub(crate) fn parse(file: &Path, text: &str) -> Self {
        Self { files: vec![file.to_owned()], settings: parse(file, text) }
    }

    /// The same with one more file.
    pub(crate) fn and(mut self, file: &Path, text: &str) -> Self {
        self.files.push(file.to_owned());
        self.settings.extend(parse(file, text));
        self
    }

    /// Whether the file says anything; a link to /dev/null masks what has its name.
    fn read(&mut self, root: &Path, path: &Path) -> io::Result<bool> {
        let target = fs::read_link(path).ok();
        if target.is_some_and(|target| target == Path::new("/dev/null")) {
            return Ok(false);
        }
        let text = fs::read_to_string(path).map_err(|error| {
            io::Error::new(error.kind(), format!("{} cannot be read: {error}", path.display()))
        })?;
        // As it is called on the machine that it is of.
        let file = path.strip_prefix(root).map_or_else(|_| path.to_owned(), |rest| Path::new("/").join(rest));
        self.settings.extend(parse(&file, &text));
        self.files.push(file);
        Ok(true)
    }

    /// What counts of a setting that has one value: the last assignment, unless it takes back those before it.
    pub(crate) fn value(&self, key: &str) -> Option<&Setting> {
        self.list(key).last().copied()
    }

    /// What counts of a setting that has many: all since the last that took back those before it.
    pub(crate) fn list(&self, key: &str) -> Vec<&Setting> {
        let all: Vec<&Setting> = self.settings.iter().filter(|setting| setting.key == key).collect();
        let from = all.iter().rposition(|setting| setting.value.is_empty()).map_or(0, |reset| reset + 1);
        all[from..].to_vec()
    }

    /// The last assignment of a setting, whatever it says.
    pub(crate) fn last(&self, key: &str) -> Option<&Setting> {
        self.settings.iter().rfind(|setting| setting.key == key)
    }

    /// All settings that are assigned, each once.
    pub(crate) fn keys(&self) -> Vec<&str> {
        let mut keys: Vec<&str> = self.settings.iter().map(|setting| setting.key.as_str()).collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    /// A set of capabilities; `unset` is what it is where nothing is said.
    ///
    /// Errors: a word that is no capability: systemd passes over it with a warning, which nobody should rely on.
    pub(crate) fn capabilities(&self, key: &str, unset: CapSet) -> Result<CapSet, String> {
        // config_parse_capability_set in src/core/load-fragment.c.
        let mut set = unset;
        for setting in self.settings.iter().filter(|setting| setting.key == key) {
            let (inverted, list) = match setting.value.strip_prefix('~') {
                Some(rest) => (true, rest),
                None => (false, setting.value.as_str()),
            };
            let named = CapSet::from_list(list).map_err(|why| format!("{}: {why}", setting.place()))?;
            let all = CapSet::all();
            set = match (named.is_empty() || set == unset, inverted) {
                (true, false) => named,
                (true, true) => all.without(named),
                (false, false) => set.with(named),
                (false, true) => set.without(named),
            };
        }
        Ok(set)
    }
}

/// Whether systemd takes a value for yes, or for no.
pub(crate) fn boolean(value: &str) -> Option<bool> {
    match value.to_ascii_lowercase().as_str() {
        "1" | "yes" | "y" | "true" | "t" | "on" => Some(true),
        "0" | "no" | "n" | "false" | "f" | "off" => Some(false),
        _ => None,
    }
}

/// The template of an instance: `a@.service` of `a@b.service`.
fn template(name: &str) -> Option<String> {
    let (stem, kind) = name.rsplit_once('.')?;
    let (prefix, instance) = stem.split_once('@')?;
    (!instance.is_empty()).then(|| format!("{prefix}@.{kind}"))
}

/// The names under which a unit can have drop-ins, from the one that says most: itself, its template, and both of each
/// part of its name up to a dash.
fn spellings(name: &str) -> Vec<String> {
    let Some((stem, kind)) = name.rsplit_once('.') else { return vec![name.to_owned()] };
    let (mut prefix, instance) = match stem.split_once('@') {
        Some((prefix, instance)) => (prefix, Some(instance)),
        None => (stem, None),
    };
    let mut names = Vec::new();
    loop {
        match instance {
            Some("") => names.push(format!("{prefix}@.{kind}")),
            Some(instance) => {
                names.extend([format!("{prefix}@{instance}.{kind}"), format!("{prefix}@.{kind}")]);
            }
            None => names.push(format!("{prefix}.{kind}")),
        }
        let Some(dash) = prefix.trim_end_matches('-').rfind('-') else { return names };
        prefix = &prefix[..=dash];
    }
}

/// The drop-ins of a directory; none if it is not there.
fn confs(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        Err(error) => return Err(io::Error::new(error.kind(), format!("{}: {error}", directory.display()))),
    };
    let paths = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<PathBuf>>>()?;
    Ok(paths.into_iter().filter(|path| path.extension().is_some_and(|end| end == "conf")).collect())
}

/// The assignments of the section `[Service]`. Source: systemd.syntax(7).
fn parse(file: &Path, text: &str) -> Vec<Setting> {
    let mut settings: Vec<Setting> = Vec::new();
    let mut service = false;
    // A line that goes on, and whether its beginning was of interest.
    let mut open: Option<Option<Setting>> = None;
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.starts_with(['#', ';']) || (line.is_empty() && open.is_none()) {
            continue;
        }
        let goes_on = line.ends_with('\\');
        let part = line.trim_end_matches('\\').trim();
        let setting = match open.take() {
            Some(begun) => begun.map(|setting| {
                let value = [setting.value.as_str(), part].join(" ").trim().to_owned();
                Setting { value, ..setting }
            }),
            None if part.starts_with('[') => {
                service = part == "[Service]";
                None
            }
            None => part.split_once('=').filter(|_| service).map(|(key, value)| Setting {
                key: key.trim().to_owned(),
                value: value.trim().to_owned(),
                file: file.to_owned(),
                line: number,
            }),
        };
        if goes_on {
            open = Some(setting);
        } else {
            settings.extend(setting);
        }
    }
    settings.extend(open.flatten());
    settings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(text: &str) -> Unit {
        Unit::parse(Path::new("/u.service"), text)
    }

    #[test]
    fn lines_are_read_as_systemd_reads_them() {
        let unit = unit(
            "[Unit]\nUser=x\n[Service]\n# User=y\nUser = z\nSystemCallFilter=@a \\\n ; comment\n  @b\nSystemCallFilter=@c\n\
             [X-Other]\nUser=w\n",
        );
        let user = unit.value("User").unwrap();
        assert_eq!((user.value.as_str(), user.place().as_str()), ("z", "/u.service:5"));
        let values: Vec<&str> = unit.list("SystemCallFilter").iter().map(|s| s.value.as_str()).collect();
        assert_eq!(values, ["@a @b", "@c"]);
        assert_eq!(unit.keys(), ["SystemCallFilter", "User"]);
    }

    #[test]
    fn an_empty_value_takes_back_what_was_said() {
        let unit =
            unit("[Service]\nSystemCallFilter=@a\nSystemCallFilter=\nSystemCallFilter=@b\nUser=x\nUser=\n");
        assert_eq!(unit.list("SystemCallFilter").len(), 1);
        assert_eq!((unit.value("User"), unit.last("User").unwrap().line), (None, 6));
    }

    #[test]
    fn capability_sets_are_those_that_systemd_makes() {
        let set = |lines: &str, unset| unit(&format!("[Service]\n{lines}")).capabilities("C", unset);
        let named = |names: &str| CapSet::from_list(names).unwrap();
        let (all, none) = (CapSet::all(), CapSet::NONE);
        assert_eq!(set("", all), Ok(all));
        assert_eq!(set("C=", all), Ok(none));
        assert_eq!(set("C=CAP_BPF\nC=cap_perfmon", all), Ok(named("CAP_BPF CAP_PERFMON")));
        assert_eq!(set("C=CAP_BPF CAP_PERFMON\nC=~CAP_BPF", all), Ok(named("CAP_PERFMON")));
        assert_eq!(set("C=~CAP_SYS_ADMIN", all), Ok(all.without(named("CAP_SYS_ADMIN"))));
        assert_eq!(set("C=CAP_BPF\nC=\nC=CAP_CHOWN", none), Ok(named("CAP_CHOWN")));
        assert_eq!(set("C=CAP_BPF\nC=~", all), Ok(all));
        assert!(set("C=CAP_NOSUCH", all).unwrap_err().contains("/u.service:2: CAP_NOSUCH"));
    }

    #[test]
    fn drop_ins_are_found_under_every_name_of_a_unit() {
        assert_eq!(spellings("a.service"), ["a.service"]);
        assert_eq!(spellings("a-b-c.service"), ["a-b-c.service", "a-b-.service", "a-.service"]);
        assert_eq!(
            spellings("a-b@i.service"),
            ["a-b@i.service", "a-b@.service", "a-@i.service", "a-@.service"]
        );
    }

    #[test]
    fn later_files_and_nearer_directories_count() {
        let root = std::env::temp_dir().join(format!("bpfgate-unit-files-{}", std::process::id()));
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("[Service]\n{text}\n")).unwrap();
        };
        write("usr/lib/systemd/system/a@.service", "User=template\nGroup=g");
        write("run/systemd/generator/a@b.service.d/50.conf", "User=generator");
        write("etc/systemd/system/a@.service.d/60.conf", "User=etc");
        write("run/systemd/system/a@b.service.d/60.conf", "User=instance");
        write("etc/systemd/system/service.d/10.conf", "User=all\nUMask=0");
        write("etc/systemd/system/a@c.service.d/90.conf", "User=another");
        write("usr/lib/systemd/system/a@b.service.d/70.conf", "User=masked");
        fs::create_dir_all(root.join("etc/systemd/system/a@b.service.d")).unwrap();
        std::os::unix::fs::symlink("/dev/null", root.join("etc/systemd/system/a@b.service.d/70.conf"))
            .unwrap();
        let unit = Unit::load(&root, "a@b.service").unwrap().unwrap();
        let none = Unit::load(&root, "b.service").unwrap();
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(none, None);
        let value = |key| unit.value(key).map(|setting| setting.value.as_str());
        assert_eq!((value("User"), value("Group"), value("UMask")), (Some("instance"), Some("g"), Some("0")));
        assert_eq!(unit.files.len(), 4, "{:?}", unit.files);
        assert_eq!(unit.value("User").unwrap().place(), "/run/systemd/system/a@b.service.d/60.conf:2");
    }
}
