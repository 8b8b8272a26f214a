//! Valid policies from arbitrary bytes. Names come from small pools, so that rules and requests meet.

use arbitrary::{Result, Unstructured};

/// Names in policies and in requests.
pub const OBJECTS: [&str; 3] = ["flow", "flow-2", "o"];
/// Programs.
pub const PROGRAMS: [&str; 4] = ["count", "count2", "on_exec", "p"];
/// Maps.
pub const MAPS: [&str; 4] = ["counters", "counters2", ".bss", "m"];
/// Globals.
pub const GLOBALS: [&str; 3] = ["rate", "rate2", "uid"];
/// Literal interfaces.
pub const INTERFACES: [&str; 5] = ["eth0", "eth1", "lan0", "lan10", "l"];
/// Patterns of interfaces, each with a near miss among [`INTERFACES`].
pub const PATTERNS: [&str; 7] = ["lan*", "eth?", "*", "*0", "?", "l*0", "e*h0"];
/// Cgroups and binaries.
pub const PATHS: [&str; 4] = ["/a", "/a/b", "/a/b.slice", "/sys/fs/cgroup/system.slice"];
/// Events; a tracepoint has its category before them.
pub const EVENTS: [&str; 3] = ["sched_switch", "sched_process_exec", "x-1"];
/// Categories.
pub const CATEGORIES: [&str; 2] = ["sched", "x"];
/// Symbols.
pub const SYMBOLS: [&str; 2] = ["readline", "readline2"];
/// Functions of the kernel that are traced.
pub const TRACED: [&str; 3] = ["cap_capable", "cap_capable2", "f.isra.0"];
/// Users, by number and by name.
pub const USERS: [u32; 4] = [0, 7, 100, 1000];
/// Groups.
pub const GROUPS: [u32; 4] = [0, 4, 50, 991];
/// Units: one of a template, so that its slice is another.
pub const UNITS: [&str; 3] = ["flowmon.service", "flow-mon@eth0.service", "a.service"];
/// Slices.
pub const SLICES: [&str; 3] = ["system.slice", "system-flow\\x2dmon.slice", "a-b.slice"];
/// Keys of the hooks.
pub const HOOKS: [&str; 10] = [
    "xdp",
    "tcx",
    "cgroup_skb",
    "raw_tracepoint",
    "tracepoint",
    "uprobe",
    "socket_filter",
    "fentry",
    "fexit",
    "kprobe",
];
/// Texts that are hard to quote.
const DESCRIPTIONS: [&str; 7] = [
    "",
    "packet counters",
    "\"quoted\" \\ and 'single'",
    "two\nlines\r\n\ttab",
    "\u{0}\u{1b}[31m\u{7f}\u{9b}",
    "é 漢字 😀 \u{202e}",
    "'''\"\"\"\\u0041",
];
/// Functions that need a grant.
const FUNCTIONS: [&str; 4] = ["bpf_send_signal", "probe_write_user", "bpf_trace_printk", "sys_bpf"];

/// Functions of the kernel that are called.
const KFUNCS: [&str; 3] = ["bpf_rcu_read_lock", "bpf_send_signal", "f.isra.0"];

/// A value of a policy file. Keys stay in the order in which they were put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A text.
    Text(String),
    /// An integer.
    Number(i64),
    /// A boolean.
    Flag(bool),
    /// A list of values; of tables, an array of tables.
    List(Vec<Node>),
    /// A table.
    Table(Vec<(String, Node)>),
    /// A table within a line.
    Inline(Vec<(String, Node)>),
}

impl Node {
    fn text(text: &str) -> Self {
        Self::Text(text.to_owned())
    }

    fn texts(texts: &[&str]) -> Self {
        Self::List(texts.iter().map(|text| Self::text(text)).collect())
    }

    fn is_section(&self) -> bool {
        match self {
            Self::Table(_) => true,
            Self::List(items) => matches!(items.first(), Some(Self::Table(_))),
            _ => false,
        }
    }

    /// The text of a file with this table at its top.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        if let Self::Table(entries) = self {
            section(entries, "", &mut text);
        }
        text
    }

    /// Every table without one of its keys, and every list without one of its items: with the names of the keys that
    /// lead there.
    pub fn shortened(&self) -> Vec<(Vec<String>, Self)> {
        let mut all = Vec::new();
        match self {
            Self::Table(entries) | Self::Inline(entries) => {
                let with = |entries| match self {
                    Self::Table(_) => Self::Table(entries),
                    _ => Self::Inline(entries),
                };
                for (i, (key, value)) in entries.iter().enumerate() {
                    let mut fewer = entries.clone();
                    fewer.remove(i);
                    all.push((vec![key.clone()], with(fewer)));
                    for (mut path, shorter) in value.shortened() {
                        let mut changed = entries.clone();
                        changed[i].1 = shorter;
                        path.insert(0, key.clone());
                        all.push((path, with(changed)));
                    }
                }
            }
            Self::List(items) => {
                for (i, item) in items.iter().enumerate() {
                    let mut fewer = items.clone();
                    fewer.remove(i);
                    all.push((vec!["*".to_owned()], Self::List(fewer)));
                    for (mut path, shorter) in item.shortened() {
                        let mut changed = items.clone();
                        changed[i] = shorter;
                        path.insert(0, "*".to_owned());
                        all.push((path, Self::List(changed)));
                    }
                }
            }
            Self::Text(_) | Self::Number(_) | Self::Flag(_) => {}
        }
        all
    }
}

/// Values before sections, or they would be the section's.
fn section(entries: &[(String, Node)], path: &str, text: &mut String) {
    for (key, value) in entries.iter().filter(|(_, value)| !value.is_section()) {
        text.extend([quoted(key), " = ".to_owned(), inline(value), "\n".to_owned()]);
    }
    for (key, value) in entries.iter().filter(|(_, value)| value.is_section()) {
        let path = format!("{path}{}{}", if path.is_empty() { "" } else { "." }, quoted(key));
        match value {
            Node::List(items) => {
                for item in items {
                    if let Node::Table(entries) = item {
                        text.extend(["[[", &path, "]]\n"]);
                        section(entries, &path, text);
                    }
                }
            }
            Node::Table(entries) => {
                text.extend(["[", &path, "]\n"]);
                section(entries, &path, text);
            }
            _ => {}
        }
    }
}

fn inline(value: &Node) -> String {
    let joined = |items: Vec<String>| items.join(", ");
    match value {
        Node::Text(text) => quoted(text),
        Node::Number(number) => number.to_string(),
        Node::Flag(flag) => flag.to_string(),
        Node::List(items) => format!("[{}]", joined(items.iter().map(inline).collect())),
        Node::Table(entries) | Node::Inline(entries) => {
            let entry = |(key, value): &(String, Node)| format!("{} = {}", quoted(key), inline(value));
            format!("{{ {} }}", joined(entries.iter().map(entry).collect()))
        }
    }
}

/// A literal text where that is possible, else one in which everything that is not a letter is escaped.
fn quoted(text: &str) -> String {
    if text.bytes().all(|b| b.is_ascii_graphic() && b != b'\'') {
        return format!("'{text}'");
    }
    let escaped =
        |c: char| if c.is_alphanumeric() { c.to_string() } else { format!("\\U{:08x}", u32::from(c)) };
    format!("\"{}\"", text.chars().map(escaped).collect::<String>())
}

/// Some of these, at least one, none twice.
fn some<'a>(u: &mut Unstructured<'_>, of: &[&'a str]) -> Result<Vec<&'a str>> {
    let mut rest = of.to_vec();
    let mut chosen = Vec::new();
    loop {
        chosen.push(rest.swap_remove(u.choose_index(rest.len())?));
        if rest.is_empty() || u.ratio(1, 2)? {
            return Ok(chosen);
        }
    }
}

type Entries = Vec<(String, Node)>;

fn put(entries: &mut Entries, key: &str, value: Node) {
    entries.push((key.to_owned(), value));
}

/// Any order of keys is one; `last` has a reason to stand behind the others.
fn shuffled(u: &mut Unstructured<'_>, mut entries: Entries, last: &[&str]) -> Result<Entries> {
    for i in (1..entries.len()).rev() {
        entries.swap(i, u.choose_index(i + 1)?);
    }
    entries.sort_by_key(|(key, _)| last.contains(&key.as_str()));
    Ok(entries)
}

/// A valid policy.
pub fn policy(u: &mut Unstructured<'_>) -> Result<Node> {
    let keep = *u.choose(&["", "session", "app", "boot"])?;
    let mut top = Entries::new();
    put(&mut top, "version", Node::Number(1));
    if u.arbitrary()? {
        put(&mut top, "description", Node::text(u.choose(&DESCRIPTIONS)?));
    }
    if u.ratio(1, 4)? {
        put(&mut top, "netns", Node::text("/run/netns/blue"));
    }
    let clients = (0..u.int_in_range(0..=3)?).map(|_| client(u, keep)).collect::<Result<Vec<_>>>()?;
    // The client's own cgroup is somebody's only where an entry that may attach names a unit.
    let own = clients.iter().any(|client| match client {
        Node::Table(entries) => {
            let may = Node::text("attach");
            entries.iter().any(|(key, _)| key == "unit")
                && entries.iter().any(|(_, value)| matches!(value, Node::List(items) if items.contains(&may)))
        }
        _ => false,
    });
    if !clients.is_empty() {
        put(&mut top, "client", Node::List(clients));
    }
    let mut objects = Entries::new();
    for name in some(u, &OBJECTS)? {
        put(&mut objects, name, object(u, keep, own)?);
    }
    put(&mut top, "objects", Node::Table(objects));
    if u.arbitrary()? {
        put(&mut top, "limits", limits(u)?);
    }
    if !keep.is_empty() {
        put(&mut top, "lifetime", Node::Table(vec![("keep".to_owned(), Node::text(keep))]));
    }
    if u.ratio(1, 3)? {
        put(&mut top, "require", require(u)?);
    }
    Ok(Node::Table(shuffled(u, top, &[])?))
}

fn require(u: &mut Unstructured<'_>) -> Result<Node> {
    let mut entries = Entries::new();
    for (key, words) in [("sandbox", ["full", "seccomp"]), ("unit_check", ["helper", "broker"])] {
        if u.arbitrary()? {
            put(&mut entries, key, Node::text(u.choose(&words)?));
        }
    }
    if u.arbitrary()? {
        put(&mut entries, "kernel", Node::text(u.choose(&["6.6", "5.19", "10.0"])?));
    }
    if u.arbitrary()? {
        put(&mut entries, "landlock", Node::Number(u.int_in_range(1..=20)?));
    }
    if u.arbitrary()? {
        put(&mut entries, "btf", Node::Flag(u.arbitrary()?));
    }
    Ok(Node::Table(shuffled(u, entries, &[])?))
}

fn limits(u: &mut Unstructured<'_>) -> Result<Node> {
    let mut entries = Entries::new();
    for (key, most) in [
        ("programs", 64),
        ("maps", 128),
        ("links", 256),
        ("instructions", 1_000_000),
        ("connections", 4096),
        ("loads_per_minute", 60_000),
    ] {
        if u.arbitrary()? {
            put(&mut entries, key, Node::Number(u.int_in_range(1..=most)?));
        }
    }
    if u.arbitrary()? {
        let size = match u.choose_index(3)? {
            0 => Node::Number(u.int_in_range(1..=1 << 40)?),
            1 => Node::Text(format!("{}KiB", u.int_in_range(1..=9999)?)),
            _ => Node::Text(format!("{} GiB", u.int_in_range(1..=1024)?)),
        };
        put(&mut entries, "map_memory", size);
    }
    Ok(Node::Table(shuffled(u, entries, &[])?))
}

fn client(u: &mut Unstructured<'_>, keep: &str) -> Result<Node> {
    let mut entries = Entries::new();
    let conditions = u.int_in_range(1..=7)?;
    if conditions & 1 != 0 {
        let user =
            if u.ratio(1, 4)? { Node::text("flowmon") } else { Node::Number((*u.choose(&USERS)?).into()) };
        put(&mut entries, "user", user);
    }
    if conditions & 2 != 0 {
        let group =
            if u.ratio(1, 4)? { Node::text("metrics") } else { Node::Number((*u.choose(&GROUPS)?).into()) };
        put(&mut entries, "group", group);
    }
    if conditions & 4 != 0 {
        put(&mut entries, "unit", Node::text(u.choose(&UNITS)?));
        if u.arbitrary()? {
            put(&mut entries, "slice", Node::text(u.choose(&SLICES)?));
        }
    }
    let may = if keep == "boot" { vec!["maps"] } else { some(u, &["load", "attach", "maps"])? };
    if may.contains(&"maps") && u.arbitrary()? {
        put(&mut entries, "maps", Node::texts(&some(u, &MAPS)?));
    }
    if may.contains(&"maps") && u.ratio(1, 3)? {
        put(&mut entries, "proxy", Node::texts(&some(u, &MAPS)?));
    }
    put(&mut entries, "may", Node::texts(&may));
    Ok(Node::Table(shuffled(u, entries, &["may"])?))
}

fn object(u: &mut Unstructured<'_>, keep: &str, own: bool) -> Result<Node> {
    let mut entries = Entries::new();
    put(&mut entries, "path", Node::text(u.choose(&["/o", "/usr/lib/é \"x\"/flow.bpf.o"])?));
    if u.arbitrary()? {
        put(&mut entries, "sha256", Node::Text(format!("{:064x}", u.arbitrary::<u64>()?)));
    }
    let mut hooks: Vec<(&str, Vec<Node>)> = HOOKS.map(|hook| (hook, Vec::new())).into();
    for program in PROGRAMS {
        // The kernel knows one type of a program: all of its entries are in one hook, of one direction or function.
        let hook = u.choose_index(hooks.len())?;
        let direction = match hooks[hook].0 {
            "fentry" | "fexit" => *u.choose(&TRACED)?,
            _ => *u.choose(&["ingress", "egress"])?,
        };
        for _ in 0..u.int_in_range(0..=2)? {
            let rule = rule(u, hooks[hook].0, program, direction, (keep, own))?;
            hooks[hook].1.push(rule);
        }
    }
    for (hook, rules) in hooks {
        if !rules.is_empty() {
            put(&mut entries, hook, Node::List(rules));
        }
    }
    if u.arbitrary()? {
        let mut maps = Entries::new();
        for map in some(u, &MAPS)? {
            put(&mut maps, map, Node::text(u.choose(&["none", "proxy", "frozen", "read-write"])?));
        }
        put(&mut entries, "maps", Node::Table(maps));
    }
    if u.ratio(1, 3)? {
        let mut globals = Entries::new();
        for global in some(u, &GLOBALS)? {
            let min = *u.choose(&[i64::MIN, -1, 0, 1])?;
            let max = *u.choose(&[1, 10, i64::MAX])?;
            let range = vec![("min".to_owned(), Node::Number(min)), ("max".to_owned(), Node::Number(max))];
            put(&mut globals, global, Node::Inline(range));
        }
        put(&mut entries, "globals", Node::Table(globals));
    }
    if u.ratio(1, 3)? {
        let mut helpers = Entries::new();
        for (key, names) in [("allow", &FUNCTIONS[..]), ("kfuncs", &KFUNCS)] {
            if u.ratio(2, 3)? {
                put(&mut helpers, key, Node::texts(&some(u, names)?));
            }
        }
        put(&mut entries, "helpers", Node::Table(shuffled(u, helpers, &[])?));
    }
    Ok(Node::Table(shuffled(u, entries, &[])?))
}

fn rule(
    u: &mut Unstructured<'_>,
    hook: &str,
    program: &str,
    direction: &str,
    (keep, own): (&str, bool),
) -> Result<Node> {
    let mut entries = Entries::new();
    put(&mut entries, "program", Node::text(program));
    match hook {
        "xdp" | "tcx" => {
            let mut all = INTERFACES.to_vec();
            if keep != "boot" {
                all.extend(PATTERNS);
            }
            put(&mut entries, "interfaces", Node::texts(&some(u, &all)?));
            if hook == "tcx" {
                // Unlike the other directions, this one is no part of the type.
                put(&mut entries, "direction", Node::text(u.choose(&["ingress", "egress"])?));
                if u.arbitrary()? {
                    put(&mut entries, "order", Node::text(u.choose(&["first", "last"])?));
                }
            } else if u.arbitrary()? {
                put(&mut entries, "mode", Node::text(u.choose(&["native", "generic", "any"])?));
            }
        }
        "cgroup_skb" => {
            let mut all = PATHS.to_vec();
            all.extend(own.then_some("own"));
            put(&mut entries, "cgroups", Node::texts(&some(u, &all)?));
            put(&mut entries, "direction", Node::text(direction));
        }
        "raw_tracepoint" => put(&mut entries, "events", Node::texts(&some(u, &EVENTS)?)),
        "tracepoint" => {
            let category = *u.choose(&CATEGORIES)?;
            let events =
                some(u, &EVENTS)?.iter().map(|event| Node::Text(format!("{category}:{event}"))).collect();
            put(&mut entries, "events", Node::List(events));
        }
        "uprobe" => {
            put(&mut entries, "binary", Node::text(u.choose(&PATHS)?));
            put(&mut entries, "symbols", Node::texts(&some(u, &SYMBOLS)?));
            if u.arbitrary()? {
                put(&mut entries, "return", Node::Flag(u.arbitrary()?));
            }
        }
        "fentry" | "fexit" => put(&mut entries, "function", Node::text(direction)),
        "kprobe" => {
            put(&mut entries, "functions", Node::texts(&some(u, &TRACED)?));
            if u.arbitrary()? {
                put(&mut entries, "return", Node::Flag(u.arbitrary()?));
            }
        }
        _ => {}
    }
    if u.ratio(1, 3)? {
        put(&mut entries, "program_fd", Node::Flag(u.arbitrary()?));
    }
    if u.ratio(1, 3)? && hook != "socket_filter" {
        let link_fd = hook != "tracepoint" && u.arbitrary()?;
        put(&mut entries, "link_fd", Node::Flag(link_fd));
    }
    Ok(Node::Table(shuffled(u, entries, &[])?))
}
