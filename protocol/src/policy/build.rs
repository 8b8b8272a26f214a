//! From the shape of a file to a [`Policy`]: every text becomes a name, every rule gets its line, everything that is
//! wrong is collected with its place.

use super::file::Accounts;
use super::raw::{self, Text};
use super::report::{Problem, did_you_mean};
use super::{
    Access, Client, Direction, Hook, Keep, Limits, OWN_CGROUP, Object, Order, Policy, PolicyError,
    ProgramRule, Range, Require, Right, Sandboxing, Unit, UnitCheck, VERSION, XdpMode,
};
use crate::functions::{self, Function};
use crate::hex;
use crate::identity::NEVER;
use crate::names::{EventName, FunctionName, NameError, ObjectName, Pattern, ProgramName};
use crate::table::Table;
use serde_spanned::Spanned;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

type Span = std::ops::Range<usize>;

/// Collects problems on the way; every method gives a value only if there was none.
struct Builder<'a> {
    text: &'a str,
    accounts: &'a Accounts,
    problems: Vec<Problem>,
    /// Where each line begins.
    starts: Vec<usize>,
}

pub(super) fn policy(file: &str, text: &str, accounts: &Accounts) -> Result<Policy, PolicyError> {
    let raw: raw::File = toml::from_str(text).map_err(|error| {
        let span = error.span().unwrap_or(0..0);
        let message = for_people(&error.message().replace('`', "'"));
        let help = meant(&message);
        PolicyError::new(file, text, vec![Problem { span, message, help }])
    })?;
    let mut builder = Builder { text, accounts, problems: Vec::new(), starts: line_starts(text) };
    let built = builder.policy(file, raw);
    match built {
        Some(policy) if builder.problems.is_empty() => Ok(policy),
        _ => Err(PolicyError::new(file, text, builder.problems)),
    }
}

impl Builder<'_> {
    fn problem(&mut self, span: Span, message: impl Into<String>, help: Option<&str>) {
        self.problems.push(Problem { span, message: message.into(), help: help.map(str::to_owned) });
    }

    fn line(&self, span: &Span) -> u32 {
        u32::try_from(self.starts.partition_point(|&start| start <= span.start)).unwrap_or(u32::MAX)
    }

    fn policy(&mut self, file: &str, raw: raw::File) -> Option<Policy> {
        if *raw.version.get_ref() != VERSION {
            self.problem(raw.version.span(), "this version of bpfgate knows only version = 1", None);
        }
        let clients: Vec<_> = raw.client.into_iter().filter_map(|client| self.client(client)).collect();
        let objects: BTreeMap<_, _> = raw
            .objects
            .into_iter()
            .filter_map(|(name, object)| {
                let line = self.line(&name.span());
                Some((self.name(&name)?, self.object(line, object.0)?))
            })
            .collect();
        let limits = self.limits(raw.limits.0);
        let netns = raw.netns.and_then(|path| self.name(&path));
        let keep = self.word(raw.lifetime.0.keep, Keep::Session, &Keep::WORDS);
        if keep == Keep::Boot {
            self.nothing_is_asked_for(&clients, &objects);
        }
        // An entry that is wrong may have been the one that is missing.
        if self.problems.is_empty() {
            self.own_is_somebodys(&clients, &objects);
        }
        let require = self.require(raw.require);
        Some(Policy {
            file: file.to_owned(),
            digest: Sha256::digest(self.text.as_bytes()).into(),
            description: raw.description,
            clients,
            objects,
            limits,
            keep,
            netns,
            require,
        })
    }

    /// With `keep = "boot"` the policy alone decides what is loaded and attached, and it must say where.
    fn nothing_is_asked_for(&mut self, clients: &[Client], objects: &BTreeMap<ObjectName, Object>) {
        for client in clients {
            if client.may.iter().any(|right| *right != Right::Maps) {
                let why = "with keep = \"boot\" the helper loads and attaches by itself; clients may only have \"maps\"";
                self.problem(self.first_of(client.line), why, None);
            }
        }
        for rule in objects.values().flat_map(|object| &object.programs) {
            let own = matches!(rule.hook, Hook::CgroupSkb { own: true, .. });
            if rule.hook.literal_targets().is_none() && !own {
                let help = "write one name for each interface that the program is to be attached to";
                let why = "with keep = \"boot\" a program is attached to every interface that is named, and a pattern names none";
                self.problem(self.first_of(rule.line), why, Some(help));
            }
        }
    }

    /// `own` is the cgroup of the unit that an entry names: without such an entry it is nothing.
    fn own_is_somebodys(&mut self, clients: &[Client], objects: &BTreeMap<ObjectName, Object>) {
        if clients.iter().any(|client| client.unit.is_some() && client.may.contains(&Right::Attach)) {
            return;
        }
        for rule in objects.values().flat_map(|object| &object.programs) {
            if matches!(rule.hook, Hook::CgroupSkb { own: true, .. }) {
                let why = "the cgroup \"own\" is that of the client's unit, and no client entry that may attach names a unit";
                let help = "add unit = \"NAME.service\" to the entry, or write the path of the cgroup";
                self.problem(self.first_of(rule.line), why, Some(help));
            }
        }
    }

    /// The place of a line.
    fn first_of(&self, line: u32) -> Span {
        let start = self.starts[line as usize - 1];
        start..start + 1
    }

    fn name<T: FromStr<Err = NameError>>(&mut self, text: &Text) -> Option<T> {
        match text.get_ref().parse() {
            Ok(name) => Some(name),
            Err(error) => {
                self.problem(text.span(), error.to_string(), None);
                None
            }
        }
    }

    fn names<T: FromStr<Err = NameError> + PartialEq>(
        &mut self,
        what: &str,
        of: &Span,
        texts: &[Text],
    ) -> Option<Vec<T>> {
        if texts.is_empty() {
            self.problem(of.clone(), format!("{what} is empty: nothing would be allowed"), None);
        }
        let mut names: Vec<T> = Vec::new();
        for text in texts {
            let name = self.name(text)?;
            if names.contains(&name) {
                self.problem(text.span(), "this stands here twice", None);
            }
            names.push(name);
        }
        Some(names)
    }

    /// One of several words; `default` if none is given.
    fn word<T: Copy>(&mut self, text: Option<Text>, default: T, words: &[(&str, T)]) -> T {
        let Some(text) = text else { return default };
        if let Some((_, value)) = words.iter().find(|(word, _)| word == text.get_ref()) {
            return *value;
        }
        let known: Vec<_> = words.iter().map(|(word, _)| format!("\"{word}\"")).collect();
        let help = did_you_mean(text.get_ref(), words.iter().map(|(word, _)| *word));
        self.problem(text.span(), format!("this is none of {}", known.join(", ")), help.as_deref());
        default
    }

    fn client(&mut self, raw: Spanned<Table<raw::Client>>) -> Option<Client> {
        let span = raw.span();
        let line = self.line(&span);
        let raw = raw.into_inner();
        let raw = raw.0;
        self.may_is_last(&raw);
        if raw.user.is_none() && raw.group.is_none() && raw.unit.is_none() {
            let help = "add user = \"...\", group = \"...\" or unit = \"...\"; every condition in one entry must hold";
            self.problem(span, "this client entry has no condition: it would match everybody", Some(help));
            return None;
        }
        let accounts = self.accounts;
        let user = raw.user.map(|user| self.principal("user", user, &accounts.users).ok_or(()));
        let group = raw.group.map(|group| self.principal("group", group, &accounts.groups).ok_or(()));
        let unit = self.unit(raw.unit, raw.slice);
        if raw.may.get_ref().is_empty() {
            self.problem(
                raw.may.span(),
                "this entry allows nothing",
                Some("write may = [\"load\", \"attach\", \"maps\"], or less"),
            );
        }
        let mut may = BTreeSet::new();
        for word in raw.may.into_inner() {
            let span = word.span();
            let known = self.problems.len();
            let right = self.word(Some(word), Right::Maps, &Right::WORDS);
            if !may.insert(right) && self.problems.len() == known {
                self.problem(span, "this stands here twice", None);
            }
        }
        if (raw.maps.is_some() || raw.proxy.is_some()) && !may.contains(&Right::Maps) {
            self.problem(span.clone(), "this entry lists maps, but may does not say \"maps\"", None);
        }
        let mut list = |what: &str, maps: Option<Vec<Text>>| {
            let names = |maps: Vec<Text>| self.names(what, &span, &maps).ok_or(());
            maps.map(names)
                .transpose()
                .map(|names| names.map(|names| names.into_iter().collect::<BTreeSet<_>>()))
        };
        let (maps, proxy) = (list("maps", raw.maps), list("proxy", raw.proxy));
        let (maps, proxy) = (maps.ok()?, proxy.ok()?.unwrap_or_default());
        let (user, group, unit) = (user.transpose().ok()?, group.transpose().ok()?, unit.transpose().ok()?);
        Some(Client { line, user, group, unit, may, maps, proxy })
    }

    /// A file that was cut off must not allow more than the whole: every key of an entry that narrows it stands before
    /// the one that gives something, without which there is no entry.
    fn may_is_last(&mut self, raw: &raw::Client) {
        let may = raw.may.span();
        let spans = [
            raw.user.as_ref().map(Spanned::span),
            raw.group.as_ref().map(Spanned::span),
            raw.unit.as_ref().map(Spanned::span),
            raw.slice.as_ref().map(Spanned::span),
            raw.maps.as_ref().and_then(|maps| Some(maps.last()?.span())),
            raw.proxy.as_ref().and_then(|maps| Some(maps.last()?.span())),
        ];
        if let Some(later) = spans.into_iter().flatten().find(|span| span.start > may.start) {
            let why = "this stands after may: if the file were cut off in between, the entry would allow more than it says";
            self.problem(later, why, Some("write may as the last key of its entry"));
        }
    }

    fn unit(&mut self, name: Option<Text>, slice: Option<Text>) -> Option<Result<Unit, ()>> {
        let Some(name) = name else {
            if let Some(slice) = slice {
                let why = "slice says where the unit of this entry is, and there is none";
                self.problem(slice.span(), why, Some("add unit = \"NAME.service\", or leave slice out"));
            }
            return None;
        };
        let unit = self.name(&name).and_then(|name| {
            let slice = match slice {
                Some(slice) => self.name(&slice)?,
                None => Unit::default_slice(&name),
            };
            Some(Unit { name, slice })
        });
        Some(unit.ok_or(()))
    }

    fn require(&mut self, raw: Option<Spanned<Table<raw::Require>>>) -> Require {
        let line = raw.as_ref().map_or(0, |raw| self.line(&raw.span()));
        let raw = raw.map(|raw| raw.into_inner().0).unwrap_or_default();
        let kernel = raw.kernel.and_then(|text| {
            let version = version(text.get_ref());
            if version.is_none() {
                let why = "a version of the kernel is written \"MAJOR.MINOR\", such as \"6.6\"";
                self.problem(text.span(), why, None);
            }
            version
        });
        let landlock = raw.landlock.map(|abi| self.limit(Some(abi), 1, Require::MOST_LANDLOCK));
        Require {
            sandbox: self.word(raw.sandbox, Require::default().sandbox, &Sandboxing::WORDS),
            unit_check: self.word(raw.unit_check, Require::default().unit_check, &UnitCheck::WORDS),
            kernel,
            landlock,
            btf: raw.btf,
            line,
        }
    }

    fn principal(
        &mut self,
        what: &str,
        raw: Spanned<raw::Principal>,
        table: &BTreeMap<String, u32>,
    ) -> Option<u32> {
        let span = raw.span();
        let (id, by_name) = match raw.into_inner() {
            raw::Principal::Id(id) => (u32::try_from(id).ok(), None),
            raw::Principal::Name(name) => {
                let Some(&id) = table.get(&name) else {
                    let help = if name.contains(['*', '?']) {
                        format!(
                            "* and ? are special in names of interfaces only; write one entry for each {what}"
                        )
                    } else {
                        format!(
                            "names are looked up in /etc/passwd and /etc/group only; a number works for any {what}"
                        )
                    };
                    self.problem(span, format!("there is no {what} of this name"), Some(&help));
                    return None;
                };
                (Some(id), Some(name))
            }
        };
        match id {
            None => self.problem(span, format!("this is not the number of a {what}"), None),
            Some(id) if NEVER.contains(&id) => {
                let help = "the kernel shows this id for everybody whom it cannot name; give the service an account of its own";
                self.problem(span, format!("{what} {id} never matches anybody"), Some(help));
            }
            Some(0) if by_name.as_deref().is_some_and(|name| name != "root") => {
                self.problem(span, format!("this {what} is another name of root"), None);
            }
            Some(id) => return Some(id),
        }
        None
    }

    fn object(&mut self, line: u32, raw: raw::Object) -> Option<Object> {
        let path = self.name(&raw.path);
        let sha256 = raw.sha256.map(|text| self.digest(&text).ok_or(())).transpose();
        let mut programs = Vec::new();
        let mut add = |rule: Option<ProgramRule>| programs.extend(rule);
        for entry in raw.xdp {
            let (span, e) = (entry.span(), entry.into_inner().0);
            let mode = self.word(e.mode, XdpMode::Any, &XdpMode::WORDS);
            let hook = self.patterns(&span, &e.interfaces).map(|interfaces| Hook::Xdp { interfaces, mode });
            add(self.rule(&span, &e.program, hook, e.program_fd, e.link_fd));
        }
        for entry in raw.tcx {
            let (span, e) = (entry.span(), entry.into_inner().0);
            let direction = self.direction(e.direction);
            let order = self.word(e.order, Order::Last, &Order::WORDS);
            let hook = self.patterns(&span, &e.interfaces).map(|interfaces| Hook::Tcx {
                interfaces,
                direction,
                order,
            });
            add(self.rule(&span, &e.program, hook, e.program_fd, e.link_fd));
        }
        for entry in raw.cgroup_skb {
            let (span, e) = (entry.span(), entry.into_inner().0);
            let direction = self.direction(e.direction);
            let (own, paths): (Vec<Text>, Vec<Text>) =
                e.cgroups.into_iter().partition(|text| text.get_ref() == OWN_CGROUP);
            if let Some(again) = own.get(1) {
                self.problem(again.span(), "this stands here twice", None);
            }
            let own = !own.is_empty();
            let cgroups =
                if own && paths.is_empty() { Some(Vec::new()) } else { self.names("cgroups", &span, &paths) };
            let hook = cgroups.map(|cgroups| Hook::CgroupSkb { cgroups, own, direction });
            add(self.rule(&span, &e.program, hook, e.program_fd, e.link_fd));
        }
        for entry in raw.raw_tracepoint {
            let (span, e) = (entry.span(), entry.into_inner().0);
            let hook = self.events(&span, &e.events, false).map(|events| Hook::RawTracepoint { events });
            add(self.rule(&span, &e.program, hook, e.program_fd, e.link_fd));
        }
        for entry in raw.tracepoint {
            let (span, e) = (entry.span(), entry.into_inner().0);
            if e.link_fd {
                let why = "the link of a tracepoint cannot be handed out: it could not be taken back";
                self.problem(span.clone(), why, Some("a raw tracepoint has no such limit"));
            }
            let hook = self.events(&span, &e.events, true).map(|events| Hook::Tracepoint { events });
            add(self.rule(&span, &e.program, hook, e.program_fd, e.link_fd));
        }
        for entry in raw.uprobe {
            let (span, e) = (entry.span(), entry.into_inner().0);
            let (binary, symbols) = (self.name(&e.binary), self.names("symbols", &span, &e.symbols));
            let hook = binary.zip(symbols).map(|(binary, symbols)| Hook::Uprobe {
                binary,
                symbols,
                at_return: e.at_return,
            });
            add(self.rule(&span, &e.program, hook, e.program_fd, e.link_fd));
        }
        for entry in raw.socket_filter {
            let (span, e) = (entry.span(), entry.into_inner().0);
            add(self.rule(&span, &e.program, Some(Hook::SocketFilter), e.program_fd, false));
        }
        for entry in raw.fentry {
            let (span, e) = (entry.span(), entry.into_inner().0);
            let hook = self.name(&e.function).map(|function| Hook::Fentry { function });
            add(self.rule(&span, &e.program, hook, e.program_fd, e.link_fd));
        }
        for entry in raw.fexit {
            let (span, e) = (entry.span(), entry.into_inner().0);
            let hook = self.name(&e.function).map(|function| Hook::Fexit { function });
            add(self.rule(&span, &e.program, hook, e.program_fd, e.link_fd));
        }
        for entry in raw.kprobe {
            let (span, e) = (entry.span(), entry.into_inner().0);
            let functions = self.names("functions", &span, &e.functions);
            let hook = functions.map(|functions| Hook::Kprobe { functions, at_return: e.at_return });
            add(self.rule(&span, &e.program, hook, e.program_fd, e.link_fd));
        }
        self.one_type_each(&programs);
        let maps = raw.maps.into_iter().filter_map(|(name, access)| {
            let line = self.line(&name.span());
            Some((self.name(&name)?, (self.word(Some(access), Access::None, &Access::WORDS), line)))
        });
        let maps = maps.collect();
        let globals = raw
            .globals
            .into_iter()
            .filter_map(|(name, range)| Some((self.name(&name)?, self.range(&name, &range.0))));
        let globals = globals.collect();
        let mut functions: BTreeSet<Function> =
            raw.helpers.0.allow.iter().filter_map(|name| self.function(name)).collect();
        for name in &raw.helpers.0.kfuncs {
            let function = self.name(name).map(Function::Kernel);
            if function.is_some_and(|function| !functions.insert(function)) {
                self.problem(name.span(), "this stands here twice", None);
            }
        }
        Some(Object { line, path: path?, sha256: sha256.ok()?, programs, maps, globals, functions })
    }

    fn rule(
        &mut self,
        span: &Span,
        program: &Text,
        hook: Option<Hook>,
        program_fd: bool,
        link_fd: bool,
    ) -> Option<ProgramRule> {
        let program = self.name(program)?;
        Some(ProgramRule { line: self.line(span), program, hook: hook?, program_fd, link_fd })
    }

    /// The kernel loads a program for one type and one attach type, and one that traces a function for that.
    fn one_type_each(&mut self, programs: &[ProgramRule]) {
        fn kind(rule: &ProgramRule) -> (u32, u32, Option<&FunctionName>) {
            let hook = &rule.hook;
            (hook.kind().row().prog_type, hook.expected_attach_type(), hook.bound_to())
        }
        let mut seen: BTreeMap<&ProgramName, &ProgramRule> = BTreeMap::new();
        for rule in programs {
            let first = *seen.entry(&rule.program).or_insert(rule);
            if kind(first) != kind(rule) {
                let what = if first.hook.kind() == rule.hook.kind() {
                    "loaded in another way"
                } else {
                    "of another type"
                };
                let message = format!("program {} is {what} in line {}", rule.program, first.line);
                let help = "the kernel loads a program for one hook, one direction, call or return, one function of the kernel: write a second one";
                self.problem(self.first_of(rule.line), message, Some(help));
            }
        }
    }

    fn patterns(&mut self, span: &Span, texts: &[Text]) -> Option<Vec<Pattern>> {
        self.names("interfaces", span, texts)
    }

    fn events(&mut self, span: &Span, texts: &[Text], with_category: bool) -> Option<Vec<EventName>> {
        let events: Vec<EventName> = self.names("events", span, texts)?;
        for (event, text) in events.iter().zip(texts) {
            if event.as_str().contains(':') != with_category {
                let message = if with_category {
                    "a tracepoint is written \"category:name\""
                } else {
                    "a raw tracepoint is written without its category"
                };
                self.problem(text.span(), message, None);
            }
        }
        Some(events)
    }

    fn direction(&mut self, text: Text) -> Direction {
        self.word(Some(text), Direction::Ingress, &Direction::WORDS)
    }

    fn digest(&mut self, text: &Text) -> Option<[u8; 32]> {
        let digits = text.get_ref();
        let digest = hex::decode(digits).filter(|_| !digits.bytes().any(|b| b.is_ascii_uppercase()));
        let digest = digest.and_then(|digest| digest.try_into().ok());
        if digest.is_none() {
            self.problem(
                text.span(),
                "a digest is 64 lower-case hexadecimal digits",
                Some("sha256sum prints it"),
            );
        }
        digest
    }

    fn range(&mut self, name: &Text, raw: &raw::Range) -> Range {
        let (min, max) = (*raw.min.get_ref(), *raw.max.get_ref());
        if min > max {
            self.problem(raw.min.span(), "min is larger than max: no value would be allowed", None);
        }
        Range { min, max, line: self.line(&name.span()) }
    }

    fn function(&mut self, text: &Text) -> Option<Function> {
        let Some(id) = functions::number(text.get_ref()) else {
            self.problem(
                text.span(),
                "this build knows no helper function of this name",
                Some("a function of the kernel itself (a kfunc) goes into kfuncs = [...]"),
            );
            return None;
        };
        if functions::needs_grant(id).is_none() {
            self.problem(text.span(), "this helper function needs no grant", Some("leave it out"));
        }
        Some(Function::Helper(id))
    }

    fn limits(&mut self, raw: raw::Limits) -> Limits {
        let (d, most) = (Limits::default(), Limits::MOST);
        Limits {
            programs: self.limit(raw.programs, d.programs, most.programs),
            maps: self.limit(raw.maps, d.maps, most.maps),
            links: self.limit(raw.links, d.links, most.links),
            instructions: self.limit(raw.instructions, d.instructions, most.instructions),
            map_memory: match raw.map_memory {
                None => d.map_memory,
                Some(size) => self.size(&size).unwrap_or(d.map_memory),
            },
            connections: self.limit(raw.connections, d.connections, most.connections),
            loads_per_minute: self.limit(raw.loads_per_minute, d.loads_per_minute, most.loads_per_minute),
        }
    }

    fn limit(&mut self, raw: Option<Spanned<i64>>, default: u32, max: u32) -> u32 {
        let Some(raw) = raw else { return default };
        match u32::try_from(*raw.get_ref()) {
            Ok(value) if (1..=max).contains(&value) => value,
            _ => {
                self.problem(raw.span(), format!("this limit is a number from 1 to {max}"), None);
                default
            }
        }
    }

    fn size(&mut self, raw: &Spanned<raw::Size>) -> Option<u64> {
        let bytes = match raw.get_ref() {
            raw::Size::Bytes(bytes) => u64::try_from(*bytes).ok(),
            raw::Size::Text(text) => {
                [("KiB", 10), ("MiB", 20), ("GiB", 30)].iter().find_map(|(unit, shift)| {
                    let number = text.strip_suffix(unit)?.trim_end();
                    let number: u64 =
                        number.bytes().all(|b| b.is_ascii_digit()).then(|| number.parse().ok())??;
                    number.checked_mul(1 << shift)
                })
            }
        };
        let bytes = bytes.filter(|&bytes| (1..=Limits::MOST.map_memory).contains(&bytes));
        if bytes.is_none() {
            self.problem(
                raw.span(),
                "a size is a number of bytes, or a text such as \"64MiB\" (KiB, MiB, GiB)",
                None,
            );
        }
        bytes
    }
}

/// `MAJOR.MINOR`, as the kernel writes its version.
fn version(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once('.')?;
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?;
    Some((number(major)?, number(minor)?))
}

/// What serde says of a value of the wrong type, in the words of TOML.
fn for_people(message: &str) -> String {
    let Some((found, expected)) =
        message.strip_prefix("invalid type: ").and_then(|rest| rest.split_once(", expected "))
    else {
        return message.to_owned();
    };
    let expected = match expected {
        "a sequence" => "a list in [ ]",
        "a map" | "keys with their values" => "a table",
        "a string" => "text in quotes",
        "a boolean" => "true or false",
        "i64" => "a number",
        other => other,
    };
    let found = match found.split_once(' ').unwrap_or((found, "")) {
        ("integer", number) => format!("the number {}", number.trim_matches('\'')),
        ("string", text) => format!("the text {text}"),
        ("boolean", word) => word.trim_matches('\'').to_owned(),
        ("sequence", _) => "a list".to_owned(),
        ("map", _) => "a table".to_owned(),
        _ => found.to_owned(),
    };
    format!("{expected} is expected here, not {found}")
}

/// The key that was meant by "unknown field 'a', expected one of 'b', 'c'".
fn meant(message: &str) -> Option<String> {
    let mut words = message.strip_prefix("unknown field ")?.split('\'').skip(1).step_by(2);
    did_you_mean(words.next()?, words)
}

fn line_starts(text: &str) -> Vec<usize> {
    std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect()
}
