use super::*;
use bpfgate_protocol::policy::file::Accounts;

fn rendered(text: &str) -> Result<String, String> {
    let accounts = Accounts { users: [("u".to_owned(), 7)].into(), ..Accounts::default() };
    let policy = Policy::parse("/etc/bpfgate/policies/x-1.toml", text, &accounts).unwrap();
    drop_in(&"x-1".parse().unwrap(), &policy, &Layout { prefix: "/usr".into() })
}

fn of(rules: &str) -> String {
    let digest = "ab".repeat(32);
    rendered(&format!("version = 1\n[objects.o]\npath = \"/o\"\nsha256 = \"{digest}\"\n{rules}")).unwrap()
}

/// The settings, without comments and without what systemd passes over.
fn settings(text: &str) -> Vec<&str> {
    let (settings, _) = text.split_once("[X-Bpfgate]").unwrap();
    settings.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).collect()
}

const XDP: &str = "[[objects.o.xdp]]\nprogram = \"p\"\ninterfaces = [\"lan*\"]\n";

#[test]
fn a_drop_in_opens_what_the_policy_needs_and_says_why() {
    let text = of(&format!("{XDP}[limits]\nmap_memory = \"4MiB\"\nprograms = 1\nmaps = 2\nlinks = 3\n"));
    assert_eq!(
        settings(&text),
        [
            "[Service]",
            "User=bpfgate-app-x-1",
            "CapabilityBoundingSet=CAP_NET_ADMIN CAP_BPF",
            "AmbientCapabilities=CAP_NET_ADMIN CAP_BPF",
            "PrivateNetwork=no",
            "MemoryMax=542113792",
            "TasksMax=4",
            "FileDescriptorStoreMax=39",
        ]
    );
    for reason in [
        "# CAP_NET_ADMIN: load xdp program p of object o (/etc/bpfgate/policies/x-1.toml:5)\n",
        "# CAP_BPF: load xdp program p of object o (/etc/bpfgate/policies/x-1.toml:5)\n",
        "# Links of xdp are made in the network namespace of their interfaces (/etc/bpfgate/policies/x-1.toml:5).\n",
        "# Maps of 4 MiB and a quarter for their overhead; 512 MiB for",
        "Policy=/etc/bpfgate/policies/x-1.toml\n",
        "Grant=program p of object o on xdp lan* (any mode)\n",
    ] {
        assert!(text.contains(reason), "{reason} is not in\n{text}");
    }
}

/// Whoever reads a unit finds the reason for a line right above it.
#[test]
fn every_setting_has_a_comment() {
    let all = format!(
        "{XDP}[[objects.o.tracepoint]]\nprogram = \"q\"\nevents = [\"a:b\"]\n[[objects.o.uprobe]]\nprogram = \"r\"\nbinary = \"/home/b\"\nsymbols = [\"f\"]\n"
    );
    for text in [of(""), of(&all), of(&all).replace("lan*", "eth0")] {
        let mut above = "";
        for line in text.lines() {
            let key = line.split('=').next().unwrap_or_default();
            let goes_on =
                matches!(key, "AmbientCapabilities" | "BindReadOnlyPaths" | "Digest" | "Grant" | "Policy");
            if line.contains('=') && !line.starts_with('#') && !goes_on {
                assert!(above.starts_with('#'), "{line} has no comment in\n{text}");
            }
            above = line;
        }
    }
}

#[test]
fn a_policy_without_programs_opens_nothing() {
    let text = of("");
    let settings = settings(&text);
    assert!(settings.contains(&"CapabilityBoundingSet=") && settings.contains(&"AmbientCapabilities="));
    assert!(settings.contains(&"PrivateNetwork=yes"));
}

#[test]
fn the_network_is_that_of_the_interfaces() {
    let cgroup =
        of("[[objects.o.cgroup_skb]]\nprogram = \"p\"\ncgroups = [\"/c\"]\ndirection = \"egress\"\n");
    assert!(cgroup.contains("\nPrivateNetwork=yes\n"), "{cgroup}");
    let blue = |netns: &str, rules: &str| {
        rendered(&format!("version = 1\nnetns = \"{netns}\"\n[objects.o]\npath = \"/o\"\n{rules}"))
    };
    let text = blue("/run/netns/b%i", XDP).unwrap();
    let settings = settings(&text);
    assert!(settings.contains(&"NetworkNamespacePath=/run/netns/b%%i"), "{text}");
    assert!(settings.contains(&"RestartSec=1s") && !text.contains("PrivateNetwork="), "{text}");
    assert!(blue("/run/netns/b", "").unwrap().contains("\nNetworkNamespacePath=/run/netns/b\n"));
    for odd in ["/a b", "/a'b", "/a\\\\", "/a:b", "/ä", "/a\u{7f}"] {
        assert!(
            Policy::parse("p", &format!("version = 1\nnetns = \"{odd}\"\n"), &Accounts::default()).is_err()
                || blue(odd, XDP).unwrap_err().contains("cannot be written into a unit"),
            "{odd}"
        );
    }
}

#[test]
fn only_what_only_root_may_open_is_prepared_by_root() {
    assert!(!of(XDP).contains("--prepare"));
    let text = of("[[objects.o.tracepoint]]\nprogram = \"p\"\nevents = [\"a:b\", \"a:c\"]\n");
    let settings = settings(&text);
    assert!(settings.contains(&"ExecStartPre=+/usr/libexec/bpfgate/bpfgate-helper x-1 --prepare"), "{text}");
    assert!(settings.contains(&"NotifyAccess=exec"), "{text}");
    // 16 programs, 32 maps, 16 links, an object, 4 events for each of 2 tracepoints, 32 spare ones.
    assert!(settings.contains(&"FileDescriptorStoreMax=105"), "{text}");
}

#[test]
fn a_file_in_a_hidden_directory_is_shown_if_its_digest_is_known() {
    let at = |path: &str, digest: &str| {
        rendered(&format!("version = 1\n[objects.o]\npath = \"{path}\"\n{digest}")).unwrap()
    };
    let digest = format!("sha256 = \"{}\"\n", "ab".repeat(32));
    let text = at("/home/me/x.o", &digest);
    assert!(text.contains("\nProtectHome=tmpfs\nBindReadOnlyPaths=-/home/me/x.o\n"), "{text}");
    let text = at("/tmp/x.o", &digest);
    assert!(text.contains("\nBindReadOnlyPaths=-/tmp/x.o\n") && !text.contains("ProtectHome"), "{text}");
    assert!(at("/run/x/y.o", &digest).contains("\nBindReadOnlyPaths=-/run/x/y.o\n"));
    for text in [at("/home/me/x.o", ""), at("/opt/x.o", &digest), at("/homes/x.o", &digest)] {
        assert!(!text.contains("BindReadOnlyPaths") && !text.contains("ProtectHome"), "{text}");
    }
}

#[test]
fn the_place_of_a_program_says_where_everything_else_is() {
    for (program, helper) in [
        ("/usr/bin/bpfgate", "/usr/libexec/bpfgate/bpfgate-helper"),
        ("/usr/local/bin/bpfgate", "/usr/local/libexec/bpfgate/bpfgate-helper"),
        (
            "/usr/local/lib/systemd/system-generators/bpfgate-generator",
            "/usr/local/libexec/bpfgate/bpfgate-helper",
        ),
        ("/src/target/debug/bpfgate", "/usr/libexec/bpfgate/bpfgate-helper"),
        ("", "/usr/libexec/bpfgate/bpfgate-helper"),
    ] {
        assert_eq!(Layout::of_program(Path::new(program)).helper(), Path::new(helper), "{program}");
    }
}

#[test]
fn what_is_in_force_can_be_read_back() {
    let text = of(XDP);
    assert!(granted(&text).contains("program p of object o on xdp lan* (any mode)"));
    assert_eq!(digest(&text).map(str::len), Some(64));
    assert_eq!(granted("").len(), 0);
}

#[test]
fn each_app_has_a_user_of_its_own_whose_name_fits() {
    let names: Vec<String> = ["a", "exactly-nineteen-ch", "exactly-twenty-chars", "exactly-twenty-charz"]
        .map(|app| user(&app.parse().unwrap()))
        .into();
    assert_eq!(names[..2], ["bpfgate-app-a", "bpfgate-app-exactly-nineteen-ch"]);
    assert!(names.iter().all(|name| name.len() <= 31), "{names:?}");
    assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
}
