use super::file::Accounts;
use super::*;

fn accounts() -> Accounts {
    Accounts {
        users: [("root", 0), ("toor", 0), ("flowmon", 990), ("nobody", 65534)]
            .map(|(n, i)| (n.to_owned(), i))
            .into(),
        groups: [("metrics", 991)].map(|(n, i)| (n.to_owned(), i)).into(),
    }
}

fn parse(text: &str) -> Result<Policy, PolicyError> {
    Policy::parse("/etc/bpfgate/policies/x.toml", text, &accounts())
}

/// The only problem's line, column and message.
fn problem(text: &str) -> String {
    let error = parse(text).unwrap_err();
    let lines = error.lines();
    assert_eq!(lines.len(), 1, "{error}");
    lines[0].strip_prefix("/etc/bpfgate/policies/x.toml:").unwrap().to_owned()
}

const OBJECT: &str = "version = 1\n[objects.o]\npath = \"/o\"\n";

#[test]
fn a_whole_policy_is_understood() {
    let text = r#"
version = 1
description = "packet counters"
[[client]]
user = "flowmon"
may = ["load"]
[[client]]
group = "metrics"
maps = ["counters"]
may = ["maps"]
[[client]]
unit = "meter@eth0.service"
proxy = ["counters"]
may = ["maps"]
[objects.flow]
path = "/usr/lib/flow.bpf.o"
sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
[[objects.flow.xdp]]
program = "count_packets"
interfaces = ["eth0", "lan*"]
mode = "native"
[[objects.flow.uprobe]]
program = "on_call"
binary = "/bin/bash"
symbols = ["readline"]
return = true
[objects.flow.maps]
counters = "frozen"
".bss" = "proxy"
[objects.flow.helpers]
allow = ["bpf_send_signal"]
[limits]
map_memory = "1MiB"
links = 3
loads_per_minute = 6
[lifetime]
keep = "app"
[require]
sandbox = "seccomp"
unit_check = "broker"
kernel = "6.6"
landlock = 4
btf = true
"#;
    let policy = parse(text).unwrap();
    assert_eq!((policy.clients[0].user, policy.clients[0].line), (Some(990), 4));
    assert_eq!(policy.clients[1].group, Some(991));
    let object = policy.objects.values().next().unwrap();
    assert_eq!(object.sha256.unwrap()[..2], [0x9f, 0x86]);
    assert_eq!(object.programs.len(), 2);
    assert!(matches!(object.programs[0].hook, Hook::Xdp { mode: XdpMode::Native, .. }));
    assert!(matches!(object.programs[1].hook, Hook::Uprobe { at_return: true, .. }));
    assert_eq!(object.maps.values().map(|m| m.0).collect::<Vec<_>>(), [Access::Proxy, Access::Frozen]);
    assert!(object.functions.contains(&Function::Helper(109)));
    assert_eq!(
        policy.limits,
        Limits { map_memory: 1 << 20, links: 3, loads_per_minute: 6, ..Limits::default() }
    );
    let unit = policy.clients[2].unit.as_ref().unwrap();
    assert_eq!(unit.cgroup(), "system.slice/system-meter.slice/meter@eth0.service");
    assert_eq!(policy.clients[2].proxy.len(), 1);
    let require = Require {
        sandbox: Sandboxing::Seccomp,
        unit_check: UnitCheck::Broker,
        kernel: Some((6, 6)),
        landlock: Some(4),
        btf: true,
        line: 38,
    };
    assert_eq!((policy.keep, policy.require), (Keep::App, require));
}

#[test]
fn whatever_is_not_understood_is_an_error_with_its_place() {
    for (text, expected) in [
        ("", "1:1: missing field 'version'"),
        ("version = 2\n", "1:11: this version"),
        ("version = 1\nfoo = 1\n", "2:1: unknown field 'foo'"),
        ("version = \"1\"\n", "1:11: a number is expected here, not the text \"1\""),
        ("version = 1\nclient = 5\n", "2:10: a list in [ ] is expected here, not the number 5"),
        ("version = 1\ndescription = true\n", "2:15: text in quotes is expected here, not true"),
        ("version = 1\nobjects = []\n", "2:11: a table is expected here, not a list"),
        ("version = 1\n[require]\nbtf = {}\n", "3:7: true or false is expected here, not a table"),
        (
            "version = 1\n[[client]]\nuser = [1]\nmay = [\"load\"]\n",
            "3:8: a name in quotes or a number is expected here",
        ),
        ("version = 1\n[[client]]\nmay = [\"load\"]\n", "2:1: this client entry has no condition"),
        ("version = 1\n[[client]]\nUser = 1\nmay = [\"load\"]\n", "3:1: unknown field 'User'"),
        (
            "version = 1\n[[client]]\nuser = \"nosuch\"\nmay = [\"load\"]\n",
            "3:8: there is no user of this name",
        ),
        (
            "version = 1\n[[client]]\nuser = \"toor\"\nmay = [\"load\"]\n",
            "3:8: this user is another name of root",
        ),
        ("version = 1\n[[client]]\nuser = \"nobody\"\nmay = [\"load\"]\n", "3:8: user 65534 never matches"),
        ("version = 1\n[[client]]\nuser = -1\nmay = [\"load\"]\n", "3:8: this is not the number of a user"),
        ("version = 1\n[[client]]\nuser = 1\nmay = [\"everything\"]\n", "4:8: this is none of"),
        ("version = 1\n[[client]]\nuser = 1\nmay = []\n", "4:7: this entry allows nothing"),
        (
            "version = 1\n[[client]]\nuser = 1\nmaps = [\"m\"]\nmay = [\"load\"]\n",
            "2:1: this entry lists maps",
        ),
        ("version = 1\n[[client]]\nmay = [\"load\"]\nuser = 1\n", "4:8: this stands after may"),
        (
            "version = 1\n[[client]]\nuser = 1\nmay = [\"maps\"]\nmaps = [\"m\"]\n",
            "5:9: this stands after may",
        ),
        ("version = 1\n[[client]]\nunit = \"x\"\nmay = [\"load\"]\n", "3:8: a unit is the whole name"),
        (
            "version = 1\n[[client]]\nuser = 1\nslice = \"x.slice\"\nmay = [\"load\"]\n",
            "4:9: slice says where the unit",
        ),
        ("version = 1\n[require]\nkernel = \"6\"\n", "3:10: a version of the kernel"),
        ("version = 1\n[require]\nlandlock = 0\n", "3:12: this limit is a number from 1"),
        ("version = 1\n[require]\nunit_check = \"none\"\n", "3:14: this is none of \"helper\", \"broker\""),
        ("version = 1\n[objects.o]\npath = \"o\"\n", "3:8: a path is absolute"),
        ("version = 1\n[objects.O]\npath = \"/o\"\n", "2:10: an object name is"),
        ("version = 1\n[objects.o]\npath = \"/o\"\nsha256 = \"abc\"\n", "4:10: a digest is"),
        ("version = 1\n[limits]\nprograms = 0\n", "3:12: this limit is a number from 1 to 64"),
        ("version = 1\n[limits]\nmap_memory = \"12 parsecs\"\n", "3:14: a size is"),
        ("version = 1\n[lifetime]\nkeep = \"forever\"\n", "3:8: this is none of \"session\", \"app\""),
        ("version = 1\nversion = 1\n", "2:1: duplicate key"),
    ] {
        let got = problem(text);
        assert!(got.starts_with(expected), "{text:?}\n got {got}\nwant {expected}");
    }
    for (rest, expected) in [
        ("[[objects.o.xdp]]\nprogram = \"p\"\ninterfaces = []\n", "4:1: interfaces is empty"),
        ("[[objects.o.xdp]]\nprogram = \"p\"\ninterfaces = [\"[ab]\"]\n", "6:15: an interface pattern"),
        ("[[objects.o.xdp]]\nprogram = \"p\"\ninterfaces = [\"a\", \"a\"]\n", "6:20: this stands here twice"),
        ("[[objects.o.xdp]]\nprogram = \"9\"\ninterfaces = [\"a\"]\n", "5:11: a program name"),
        ("[[objects.o.kprobes]]\nprogram = \"p\"\n", "4:13: unknown field 'kprobes'"),
        ("[[objects.o.tracepoint]]\nprogram = \"p\"\nevents = [\"x\"]\n", "6:11: a tracepoint is written"),
        (
            "[[objects.o.raw_tracepoint]]\nprogram = \"p\"\nevents = [\"a:x\"]\n",
            "6:11: a raw tracepoint is written",
        ),
        (
            "[[objects.o.fentry]]\nprogram = \"p\"\nfunction = \"f*\"\n",
            "6:12: a function of the kernel is a C identifier",
        ),
        (
            "[[objects.o.fentry]]\nprogram = \"p\"\nfunction = \"f\"\n[[objects.o.fentry]]\nprogram = \"p\"\nfunction = \"g\"\n",
            "7:1: program p is loaded in another way in line 4",
        ),
        (
            "[[objects.o.fentry]]\nprogram = \"p\"\nfunction = \"f\"\n[[objects.o.fexit]]\nprogram = \"p\"\nfunction = \"f\"\n",
            "7:1: program p is of another type in line 4",
        ),
        (
            "[[objects.o.uprobe]]\nprogram = \"p\"\nbinary = \"/b\"\nsymbols = [\"f\"]\n[[objects.o.kprobe]]\nprogram = \"p\"\nfunctions = [\"f\"]\n",
            "8:1: program p is of another type in line 4",
        ),
        ("[objects.o.helpers]\nkfuncs = [\"1x\"]\n", "5:11: a function of the kernel is a C identifier"),
        ("[objects.o.helpers]\nkfuncs = [\"x\", \"x\"]\n", "5:16: this stands here twice"),
        ("[objects.o.helpers]\nallow = [\"bpf_nosuch\"]\n", "5:10: this build knows no helper function"),
        (
            "[objects.o.helpers]\nallow = [\"bpf_map_lookup_elem\"]\n",
            "5:10: this helper function needs no grant",
        ),
        ("[objects.o.globals]\ng = { min = 2, max = 1 }\n", "5:13: min is larger than max"),
        ("[objects.o.maps]\nm = \"read-only\"\n", "5:5: this is none of \"none\", \"proxy\""),
        (
            "[[objects.o.xdp]]\nprogram = \"p\"\ninterfaces = [\"a\"]\n[[objects.o.tcx]]\nprogram = \"p\"\ninterfaces = [\"a\"]\ndirection = \"egress\"\n",
            "7:1: program p is of another type in line 4",
        ),
    ] {
        let got = problem(&format!("{OBJECT}{rest}"));
        assert!(got.starts_with(expected), "{rest:?}\n got {got}\nwant {expected}");
    }
}

/// POL-10, POL-11, POL-14: what looks like a key or a number to a person, and is none.
#[test]
fn look_alikes_are_errors() {
    for text in [
        "",
        "# version = 1\n",
        "Version = 1\n",
        "version = 1\nuser\u{430} = 1\n",
        "version = 1\ninclude = [\"other.toml\"]\n",
        "version = 1\n[Limits]\nlinks = 1\n",
        "version = 1\n[limits]\nlinks = -1\n",
        "version = 1\n[limits]\nlinks = 1e400\n",
        "version = 1\n[limits]\nlinks = 1.0\n",
        "version = 1\n[limits]\nlinks = 017\n",
        "version = 1\n[limits]\nlinks = \"1\"\n",
        "version = 1\n[limits]\nlinks = 99999999999999999999\n",
        "version = 1\n[limits]\nmap_memory = \"64MB\"\n",
        "version = 1\n[limits]\nmap_memory = \"-1KiB\"\n",
        "version = 1\n[[client]]\nuser = 1\nmay = \"load\"\n",
        "version = 1\n[[client]]\nuser = 1\nmay = [\"load\", \"load\"]\n",
        // Fields by their order.
        "version = 1\nlifetime = [\"app\"]\n",
        "version = 1\nrequire = [\"full\"]\n",
        "version = 1\nlimits = [1, 2]\n",
        "version = 1\nclient = [[1]]\n",
        "version = 1\n[objects]\no = [\"/o\"]\n",
        "version = 1\n[objects.o]\npath = \"/o\"\n[objects.o.globals]\ng = [1, 2]\n",
        "version = 1\n[objects.o]\npath = \"/o\"\n[objects.o.globals]\ng = [1, 2, 3]\n",
        "version = 1\n[objects.o]\npath = \"/o\"\ncgroup_skb = [[\"p\", [\"/c\"], \"egress\"]]\n",
        "version = 1\n[objects.o]\npath = \"/o\"\nhelpers = [[\"bpf_send_signal\"]]\n",
        "version = 1\n[client]\nuser = 1\nmay = [\"load\"]\n",
        "version = 1\n[[client]]\nuser = 1\nmay = [\"Load\"]\n",
        "version = 1\n[[client]]\nuser = 1\nmay = [\"*\"]\n",
        "version = 1\n[[client]]\nuser = \"*\"\nmay = [\"load\"]\n",
        "version = 1\u{a0}\n",
        "version = 1\0",
    ] {
        assert!(parse(text).is_err(), "{text:?}");
    }
    // Line ends of another system and a byte order mark change nothing: TOML says what they are.
    let plain = parse("version = 1\n[limits]\nlinks = 3\n").unwrap();
    for text in ["version = 1\r\n[limits]\r\nlinks = 3\r\n", "\u{feff}version = 1\n[limits]\nlinks\t=\t3\n"] {
        let same = parse(text).unwrap();
        assert_eq!((same.limits, same.clients.len()), (plain.limits, 0), "{text:?}");
    }
}

/// POL-01. A file that says nothing allows nothing.
#[test]
fn a_policy_that_says_nothing_allows_nothing() {
    let policy = parse("# nothing but this\nversion = 1\n").unwrap();
    assert!(policy.clients.is_empty() && policy.objects.is_empty());
}

#[test]
fn an_error_shows_the_line_underlined() {
    let shown = parse("version = 1\n[limits]\nprograms = 0\n").unwrap_err().to_string();
    assert!(shown.contains("programs = 0") && shown.contains('^'), "{shown}");
    assert!(shown.contains("x.toml:3:12"), "{shown}");
}

/// A file that was cut off must never allow more than the whole: a lost line could be a condition.
#[test]
fn a_cut_off_client_entry_is_refused() {
    let text = "version = 1\n[[client]]\nuser = 7\ngroup = 8\nmaps = [\"m\"]\nmay = [\"maps\"]\n";
    let whole = parse(text).unwrap();
    for end in 0..text.len() {
        if let Ok(policy) = parse(&text[..end]) {
            assert!(policy.clients.is_empty() || policy.clients == whole.clients, "cut at {end}: {policy:?}");
        }
    }
}

#[test]
fn at_boot_the_policy_alone_decides() {
    let boot = |client: &str, interfaces: &str| {
        format!(
            "version = 1\nnetns = \"/run/netns/blue\"\n{client}[objects.o]\npath = \"/o\"\n[[objects.o.xdp]]\nprogram = \"p\"\n\
             interfaces = [{interfaces}]\n[lifetime]\nkeep = \"boot\"\n"
        )
    };
    let reader = "[[client]]\nuser = 5\nmay = [\"maps\"]\n";
    let policy = parse(&boot(reader, "\"eth0\", \"eth1\"")).unwrap();
    assert_eq!(policy.keep, Keep::Boot);
    assert_eq!(policy.netns.as_ref().map(AbsolutePath::as_str), Some("/run/netns/blue"));
    let loader = "[[client]]\nuser = 5\nmay = [\"maps\", \"load\"]\n";
    assert!(problem(&boot(loader, "\"eth0\"")).starts_with("3:1: with keep"));
    assert!(problem(&boot(reader, "\"lan*\"")).starts_with("8:1: with keep"));
}
