//! What a policy lets an app have at a time, taken to the last bit of it.

use bpfgate_tests::gate::{INTERFACE, WITH_MAP};
use bpfgate_tests::process::Process;
use bpfgate_tests::strace::Strace;
use bpfgate_tests::{Gate, Raw, needs_root};
use serde_json::{Value, json};

/// Commands of bpf(2) that make something of an app's. Source: include/uapi/linux/bpf.h, `enum bpf_cmd`.
const MAP_CREATE: &str = "0";
const PROG_LOAD: &str = "0x5";
const LINK_CREATE: &str = "0x1c";

const TWO: &str = r#"
{client}
[objects.o]
{object:two}
[[objects.o.xdp]]
program = "packet_observer_first"
interfaces = ["{interface}"]
[[objects.o.xdp]]
program = "packet_observer_second"
interfaces = ["lo"]
"#;

const HUGE: &str =
    "{client}\n[objects.o]\n{object:huge}\n[[objects.o.xdp]]\nprogram = \"huge\"\ninterfaces = [\"lo\"]\n";

/// A limit and what runs into it.
struct Budget {
    policy: &'static str,
    limit: String,
    /// So many fit.
    fits: usize,
    /// What the refusal says.
    says: &'static str,
    /// What the kernel is not asked for.
    never: &'static str,
}

/// Looks at what a helper asks the kernel for.
fn watch(gate: &Gate, helper: &Process) -> Strace {
    Strace::attach(helper.pid, &["-e", "raw=all", "-e", "trace=bpf"].map(str::to_owned), &gate.dir)
}

/// How often that was this.
fn asked(trace: &str, command: &str) -> usize {
    trace.lines().filter(|line| line.starts_with(&format!("bpf({command},"))).count()
}

/// RES-05, RES-07: at the end of a budget, whichever session of the app used it up, the answer is Quota, and the kernel is not
/// asked; what is released can be had again.
#[test]
fn at_the_end_of_a_budget_the_kernel_is_not_asked() {
    needs_root!();
    let gate = Gate::start();
    let before = gate.baseline();
    // What a map takes is what the refusal of it says.
    gate.policy("app", &format!("{WITH_MAP}[limits]\nmap_memory = 1\n"));
    let refused = Raw::open(&gate, "app").refused("Load", &json!({"object": "o"}), "Quota");
    let message = refused["message"].as_str().unwrap();
    let bytes: usize = message.split_once("takes ").unwrap().1.split_once(' ').unwrap().0.parse().unwrap();
    for Budget { policy, limit, fits, says, never } in [
        Budget {
            policy: WITH_MAP,
            limit: format!("map_memory = {}", 3 * bytes - 1),
            fits: 2,
            says: "the maps of this app would have more",
            never: MAP_CREATE,
        },
        Budget { policy: WITH_MAP, limit: "maps = 3".into(), fits: 3, says: "the 3 maps", never: MAP_CREATE },
        Budget {
            policy: TWO,
            limit: "programs = 5".into(),
            fits: 2,
            says: "the 5 programs",
            never: PROG_LOAD,
        },
        Budget {
            policy: HUGE,
            limit: "instructions = 300013".into(),
            fits: 0,
            says: "the policy allows 300013",
            never: PROG_LOAD,
        },
    ] {
        gate.policy("app", &format!("{policy}[limits]\n{limit}\n"));
        let load = json!({"object": "o"});
        let mut sessions = [Raw::open(&gate, "app"), Raw::open(&gate, "app")];
        let loaded: Vec<u64> = (0..fits).map(|number| sessions[number % 2].load("o")).collect();
        let mut refuse = || {
            for raw in &mut sessions {
                let message = raw.refused("Load", &load, "Quota");
                assert!(message["message"].as_str().unwrap().contains(says), "{limit}: {message}");
            }
        };
        // libbpf asks a new kernel some questions first.
        refuse();
        let [helper, ..] = gate.helper("app");
        let strace = watch(&gate, &helper);
        refuse();
        let trace = strace.end();
        assert_eq!(asked(&trace, never), 0, "{limit}:\n{trace}");
        if let Some(first) = loaded.first() {
            sessions[0].done("Unload", &json!({"instance": first}));
            let strace = watch(&gate, &helper);
            sessions[1].load("o");
            let trace = strace.end();
            assert_ne!(asked(&trace, never), 0, "strace sees nothing of a load:\n{trace}");
            sessions[0].refused("Load", &load, "Quota");
        }
    }
    gate.invariants(&before);
}

/// RES-07: the same for attachments.
#[test]
fn at_the_end_of_its_links_the_kernel_is_not_asked() {
    needs_root!();
    let gate = Gate::start();
    gate.policy("app", &format!("{TWO}[limits]\nlinks = 1\n"));
    let before = gate.baseline();
    let mut raw = Raw::open(&gate, "app");
    let instance = raw.load("o");
    let attach = |program: &str, interface: &str| json!({"instance": instance, "program": program, "target": {"interface": interface}});
    let first = attach("packet_observer_first", INTERFACE);
    let second = attach("packet_observer_second", "lo");
    let link: Value = raw.done("Attach", &first).0["link"].clone();
    let [helper, ..] = gate.helper("app");
    let strace = watch(&gate, &helper);
    raw.refused("Attach", &second, "Quota");
    let trace = strace.end();
    assert_eq!(asked(&trace, LINK_CREATE), 0, "{trace}");
    raw.done("Detach", &json!({"link": link}));
    let strace = watch(&gate, &helper);
    raw.done("Attach", &second);
    assert_eq!(asked(&strace.end(), LINK_CREATE), 1);
    raw.refused("Attach", &first, "Quota");
    drop(raw);
    gate.invariants(&before);
}
