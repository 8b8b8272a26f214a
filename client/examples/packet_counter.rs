//! Counts the packets of an interface, as a process without any capability.
//!
//! Run it as `packet_counter SOCKET INTERFACE SECONDS`, with a policy `packet-counter` that names
//! the object `counter`, lets its XDP program `count_packets` be attached to the interface, and
//! hands out the map `counters`.

use std::error::Error;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use bpfgate_client::{Client, LoadOptions, Map, Target};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, interface, seconds] = arguments.as_slice() else {
        return Err("usage: packet_counter SOCKET INTERFACE SECONDS".into());
    };
    let seconds: u64 = seconds.parse()?;
    say(&format!("capabilities: {}", capabilities()?))?;

    let mut client = Client::connect(Some(Path::new(socket)))?;
    client.open("packet-counter")?;
    let mut instance = client.load("counter", &LoadOptions::default())?;
    client.attach(instance.id, "count_packets", Some(&Target::Interface(interface.clone())), None)?;

    let counters = instance.take_map("counters")?;
    for _ in 0..seconds {
        std::thread::sleep(Duration::from_secs(1));
        let (packets, bytes) = totals(&counters)?;
        say(&format!("packets {packets} bytes {bytes}"))?;
    }
    Ok(())
}

/// Adds up what each CPU counted: `struct { u64 packets; u64 bytes; }`.
fn totals(counters: &Map) -> Result<(u64, u64), Box<dyn Error>> {
    let per_cpu = counters.lookup_per_cpu(&0u32.to_ne_bytes())?.ok_or("the map has no entry 0")?;
    let mut totals = (0, 0);
    for value in per_cpu {
        let (words, _) = value.as_chunks::<8>();
        let [packets, bytes] = words else {
            return Err(format!("a value has {} bytes, not 16", value.len()).into());
        };
        totals.0 += u64::from_ne_bytes(*packets);
        totals.1 += u64::from_ne_bytes(*bytes);
    }
    Ok(totals)
}

/// The effective capabilities of this process, by name.
fn capabilities() -> Result<String, Box<dyn Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:")).ok_or("no CapEff line")?;
    let set = u64::from_str_radix(line.trim(), 16)?;
    let held: Vec<String> = (0..u64::BITS).filter(|bit| set >> bit & 1 == 1).map(capability).collect();
    Ok(if held.is_empty() { "none".to_owned() } else { held.join(" ") })
}

/// The name of a capability (include/uapi/linux/capability.h).
fn capability(number: u32) -> String {
    const NAMES: &str = "chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap \
        linux_immutable net_bind_service net_broadcast net_admin net_raw ipc_lock ipc_owner sys_module \
        sys_rawio sys_chroot sys_ptrace sys_pacct sys_admin sys_boot sys_nice sys_resource sys_time \
        sys_tty_config mknod lease audit_write audit_control setfcap mac_override mac_admin syslog \
        wake_alarm block_suspend audit_read perfmon bpf checkpoint_restore";
    match NAMES.split_whitespace().nth(number as usize) {
        Some(name) => format!("cap_{name}"),
        None => format!("cap_{number}"),
    }
}

/// One line, at once: whoever watches wants it now, also through a pipe.
fn say(line: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}
