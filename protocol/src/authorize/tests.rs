use super::*;
use crate::policy::file::Accounts;
use crate::refusal::Class;

const TEXT: &str = r#"
version = 1
[[client]]
user = 1000
may = ["load", "attach", "maps"]
[[client]]
group = 50
maps = ["counts"]
may = ["maps"]
[[client]]
user = 7
group = 8
may = ["load"]
[objects.o]
path = "/o"
[[objects.o.xdp]]
program = "count"
interfaces = ["eth0", "lan*"]
[[objects.o.xdp]]
program = "one"
interfaces = ["eth1"]
[[objects.o.socket_filter]]
program = "filter"
program_fd = true
[objects.o.maps]
counts = "frozen"
secret = "none"
all = "proxy"
[objects.o.globals]
rate = { min = 1, max = 1000 }
"#;

fn policy() -> Arc<Policy> {
    Arc::new(Policy::parse("/p.toml", TEXT, &Accounts::default()).unwrap())
}
fn peer(uid: u32, gid: u32, groups: &[u32]) -> Peer {
    Peer { uid, gid, groups: groups.to_vec(), ..Default::default() }
}
fn app() -> Permit {
    authorize(&policy(), &peer(1000, 1000, &[])).unwrap()
}
fn name<T: std::str::FromStr>(text: &str) -> T
where
    T::Err: std::fmt::Debug,
{
    text.parse().unwrap()
}
fn class<T: std::fmt::Debug>(result: Result<T, Refusal>) -> Class {
    result.unwrap_err().class
}

#[test]
fn nobody_is_allowed_by_default_not_even_root() {
    for (who, ok) in [
        (peer(0, 0, &[0]), false),
        (peer(1000, 0, &[]), true),
        (peer(1, 1, &[2, 50]), true),
        (peer(1, 50, &[]), true),
        (peer(7, 7, &[]), false),
        (peer(8, 8, &[]), false),
        (peer(7, 1, &[8]), true),
        (peer(65534, 65534, &[65534]), false),
    ] {
        assert_eq!(authorize(&policy(), &who).is_ok(), ok, "{who:?}");
    }
}

#[test]
fn a_role_has_its_rights_and_no_others() {
    let metrics = authorize(&policy(), &peer(1, 50, &[])).unwrap();
    assert_eq!(class(metrics.load(&name("o"), &[], &[])), Class::Denied);
    assert_eq!(class(metrics.attach(&name("o"), &name("one"), None, &Target::Only)), Class::Denied);
    assert_eq!(metrics.map(&name("o"), &name("counts")).unwrap().access(), Access::Frozen);
    assert_eq!(class(metrics.map(&name("o"), &name("all"))), Class::Denied);
    assert_eq!(app().map(&name("o"), &name("all")).unwrap().access(), Access::Proxy);
}

#[test]
fn absent_and_forbidden_maps_are_the_same_answer() {
    let (absent, closed) = (app().map(&name("o"), &name("nosuch")), app().map(&name("o"), &name("secret")));
    let (absent, closed) = (absent.unwrap_err(), closed.unwrap_err());
    assert_eq!((absent.class, absent.public()), (closed.class, closed.public()));
}

#[test]
fn load_takes_what_the_policy_names() {
    let all = app().load(&name("o"), &[], &[]).unwrap();
    let names: Vec<_> = all.plan().iter().map(|p| p.name.to_string()).collect();
    assert_eq!(names, ["count", "one", "filter"]);
    assert!(all.program_fd(&name("filter")) && !all.program_fd(&name("count")));
    assert_eq!(class(app().load(&name("x"), &[], &[])), Class::Denied);
    assert_eq!(class(app().load(&name("o"), &[name("nosuch")], &[])), Class::Denied);
    assert_eq!(class(app().load(&name("o"), &[name("one"), name("one")], &[])), Class::Invalid);
    let global = |n: &str, value| Global { name: name(n), value };
    assert!(app().load(&name("o"), &[], &[global("rate", 1000)]).is_ok());
    for value in [0, 1001, -1, i128::MAX] {
        assert_eq!(class(app().load(&name("o"), &[], &[global("rate", value)])), Class::Invalid);
    }
    assert_eq!(class(app().load(&name("o"), &[], &[global("other", 1)])), Class::Denied);
    assert_eq!(class(app().load(&name("o"), &[], &[global("rate", 1), global("rate", 2)])), Class::Invalid);
}

#[test]
fn attach_takes_targets_of_the_program_under_that_hook() {
    let to = |program: &str, kind, target| app().attach(&name("o"), &name(program), kind, &target);
    let eth = |i: &str| Target::Interface(name(i));
    assert!(to("count", None, eth("lan7")).is_ok());
    assert!(to("count", Some(Kind::Xdp), eth("eth0")).is_ok());
    assert_eq!(class(to("count", Some(Kind::Tcx), eth("eth0"))), Class::Denied);
    assert_eq!(class(to("count", None, eth("eth1"))), Class::Denied);
    assert_eq!(class(to("count", None, Target::Cgroup(name("/eth0")))), Class::Denied);
    assert_eq!(class(to("count", None, Target::Only)), Class::Invalid);
    assert_eq!(*to("one", None, Target::Only).unwrap().target(), eth("eth1"));
    assert_eq!(class(to("filter", None, Target::Only)), Class::Denied);
}

#[test]
fn every_verdict_has_the_line_that_decided() {
    assert_eq!(app().line(), 3);
    assert_eq!(app().load(&name("o"), &[], &[]).unwrap().line(), 3);
    assert_eq!(app().attach(&name("o"), &name("one"), None, &Target::Only).unwrap().rule().line, 19);
    assert_eq!(app().map(&name("o"), &name("counts")).unwrap().line(), 26);
    assert_eq!(app().map(&name("o"), &name("secret")).unwrap_err().line, Some(27));
}

#[test]
fn what_was_loaded_with_a_function_stays_as_long_as_that_is_granted() {
    let policy = |more: &str| {
        let text = format!("version = 1\n[objects.o]\npath = \"/o\"\n[objects.o.helpers]\n{more}");
        Policy::parse("p", &text, &Accounts::default()).unwrap()
    };
    let called = [Function::Kernel(name("bpf_send_signal"))].into();
    let stays = |more| policy(more).still_approves(&name("o"), &[0; 32], &called, &[]);
    assert!(stays("kfuncs = [\"f\", \"bpf_send_signal\"]"));
    assert!(!stays("kfuncs = [\"f\"]"));
    assert!(!stays("allow = [\"bpf_send_signal\"]"), "the helper function of this name is another one");
}

/// The kernel binds such a program when it is loaded: one for another function would be attached to the old one.
#[test]
fn a_program_that_traces_a_function_is_for_that_one_only() {
    let policy = |function: &str| {
        let text = format!(
            "version = 1\n[[client]]\nuser = 1\nmay = [\"load\", \"attach\"]\n[objects.o]\npath = \"/o\"\n\
             [[objects.o.fentry]]\nprogram = \"p\"\nfunction = \"{function}\"\n\
             [[objects.o.kprobe]]\nprogram = \"k\"\nfunctions = [\"{function}\", \"f\"]\n"
        );
        Arc::new(Policy::parse("p", &text, &Accounts::default()).unwrap())
    };
    let (f, g) = (name::<FunctionName>("f"), name::<FunctionName>("g"));
    let stays = |policy: &Policy, loaded: Option<&FunctionName>| {
        policy.still_names(&name("o"), &name("p"), Kind::Fentry, loaded)
    };
    assert!(stays(&policy("g"), Some(&g)));
    assert!(!stays(&policy("g"), Some(&f)) && !stays(&policy("g"), None));
    // A kprobe says where when it is attached.
    assert!(policy("g").still_names(&name("o"), &name("k"), Kind::Kprobe, None));
    let permit = authorize(&policy("g"), &peer(1, 1, &[])).unwrap();
    let to = |program: &str, target| permit.attach(&name("o"), &name(program), None, &target);
    assert_eq!(*to("p", Target::Only).unwrap().target(), Target::Function(g.clone()));
    assert!(to("k", Target::Function(f.clone())).is_ok() && to("k", Target::Function(g)).is_ok());
    assert_eq!(class(to("p", Target::Function(f))), Class::Denied);
    let plan = permit.load(&name("o"), &[], &[]).unwrap().plan();
    let bound: Vec<_> = plan
        .iter()
        .map(|plan| (plan.prog_type, plan.expected_attach_type, plan.function.is_some()))
        .collect();
    assert_eq!(bound, [(26, 24, true), (2, 42, false)]);
}
