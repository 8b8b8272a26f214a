//! The shape of a policy file, word for word. Every struct refuses keys that it does not know.
//!
//! What stands above a key here is what the reference (policies/README.md) and the schema for editors
//! (policies/policy.schema.json) say about it: `make reference` writes both.

use crate::table::Table;
use serde::Deserialize;
use serde_spanned::Spanned;
use std::collections::BTreeMap;

pub(super) type Text = Spanned<String>;

/// What one app may do, and for whom.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    /// The version of this format.
    pub version: Spanned<i64>,
    /// For people.
    #[serde(default)]
    pub description: String,
    /// The network namespace of the app's interfaces, as `ip netns` makes them in `/run/netns`. Without it: the machine's own. Under systemd the helper is started in it; a standalone broker has to be started in it.
    pub netns: Option<Text>,
    /// Who may use the app, one entry per role.
    #[serde(default)]
    pub client: Vec<Spanned<Table<Client>>>,
    /// What may be loaded; the key is what clients call the object.
    #[serde(default)]
    pub objects: BTreeMap<Text, Table<Object>>,
    /// How much.
    #[serde(default)]
    pub limits: Table<Limits>,
    /// How long.
    #[serde(default)]
    pub lifetime: Table<Lifetime>,
    /// What must be there.
    pub require: Option<Spanned<Table<Require>>>,
}

/// One role: who, and what these clients may do. Every condition of an entry must hold.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Client {
    /// The client's effective user when it connected: a name of `/etc/passwd`, or a number. Without it: any.
    pub user: Option<Spanned<Principal>>,
    /// A group it was in when it connected, its own or a supplementary one: a name of `/etc/group`, or a number. Without it: any.
    pub group: Option<Spanned<Principal>>,
    /// The system service that it runs in. Without it: any, or none.
    pub unit: Option<Text>,
    /// The slice that `Slice=` of the unit puts it in. Without it: `system.slice`; of an instance `NAME@INSTANCE.service`, `system-NAME.slice`.
    pub slice: Option<Text>,
    /// `load`: load and unload objects. `attach`: attach and detach programs. `maps`: get or read maps. The last key of its entry: a file that is cut off before it gives nobody the entry.
    pub may: Spanned<Vec<Text>>,
    /// The maps that `maps` is for. Without it: all. Only with `may = [..., "maps"]`.
    pub maps: Option<Vec<Text>>,
    /// Maps of which these clients get no descriptor, whatever the object's table says: they read entries through the broker. Only with `may = [..., "maps"]`.
    pub proxy: Option<Vec<Text>>,
}

/// A user or group: by number, or by a name of /etc/passwd or /etc/group.
#[derive(Deserialize)]
#[serde(untagged, expecting = "a name in quotes or a number is expected here")]
pub(super) enum Principal {
    Id(i64),
    Name(String),
}

/// An object file, and what may be done with it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Object {
    /// The object file.
    pub path: Text,
    /// The SHA-256 digest of the file, as `sha256sum` prints it; `bpfgate policy pin` fills it in. Without it: the file and all directories above it must belong to root and be writable by root only.
    pub sha256: Option<Text>,
    /// Packets as an interface receives them.
    #[serde(default)]
    pub xdp: Vec<Spanned<Table<Xdp>>>,
    /// Packets of an interface at the traffic control layer.
    #[serde(default)]
    pub tcx: Vec<Spanned<Table<Tcx>>>,
    /// Packets of the sockets of a cgroup and of the cgroups below it.
    #[serde(default)]
    pub cgroup_skb: Vec<Spanned<Table<CgroupSkb>>>,
    /// Tracepoints of the kernel with their raw arguments.
    #[serde(default)]
    pub raw_tracepoint: Vec<Spanned<Table<Events>>>,
    /// Tracepoints of the kernel with their formatted records.
    #[serde(default)]
    pub tracepoint: Vec<Spanned<Table<Events>>>,
    /// Functions of a program or library in user space, in every process that maps it.
    #[serde(default)]
    pub uprobe: Vec<Spanned<Table<Uprobe>>>,
    /// Packets of single sockets, which the client attaches the program to by itself.
    #[serde(default)]
    pub socket_filter: Vec<Spanned<Table<SocketFilter>>>,
    /// The beginning of a function of the kernel, with its arguments.
    #[serde(default)]
    pub fentry: Vec<Spanned<Table<Traced>>>,
    /// The end of a function of the kernel, with its arguments and what it returns.
    #[serde(default)]
    pub fexit: Vec<Spanned<Table<Traced>>>,
    /// Functions of the kernel, with the registers of the processor.
    #[serde(default)]
    pub kprobe: Vec<Spanned<Table<Kprobe>>>,
    /// What leaves the helper: each key is the name of a map, or a quoted data section such as `".bss"`. A map that is not named is not handed over.
    #[serde(default)]
    pub maps: BTreeMap<Text, Text>,
    /// Constants that a client may set: each key is an integer of `.rodata` (`volatile const` in C). One that is not named keeps the value that it has in the object.
    #[serde(default)]
    pub globals: BTreeMap<Text, Table<Range>>,
    /// Functions that need a grant.
    #[serde(default)]
    pub helpers: Table<Helpers>,
}

/// A program on network interfaces, as early as packets can be seen.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Xdp {
    /// The name of the program: its C function in the object.
    pub program: Text,
    /// Names of interfaces in the helper's network namespace; `*` is any run of characters, `?` any one.
    pub interfaces: Vec<Text>,
    /// `native`: in the driver or not at all. `generic`: in the kernel's generic path. `any`: in the driver where it can, else generic.
    pub mode: Option<Text>,
    /// Hand the program's descriptor to the client. Its holder needs no capability to attach the program, and not only where this policy says: XDP and tcx programs to any device of its network namespace, and a test run of an XDP program sends real packets.
    #[serde(default)]
    pub program_fd: bool,
    /// Hand the link's descriptor to the client. Its holder can detach the link, pin it or pass it on so that it outlives the session, and replace the program with a second one of which it holds a descriptor.
    #[serde(default)]
    pub link_fd: bool,
}

/// A program on network interfaces, at the traffic control layer.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Tcx {
    /// The name of the program: its C function in the object.
    pub program: Text,
    /// Names of interfaces in the helper's network namespace; `*` is any run of characters, `?` any one.
    pub interfaces: Vec<Text>,
    /// Which packets: those that come in, or those that go out.
    pub direction: Text,
    /// Where among the programs that are attached there at that time: before or after them.
    pub order: Option<Text>,
    /// Hand the program's descriptor to the client. Its holder needs no capability to attach the program, and not only where this policy says: to any device of its network namespace.
    #[serde(default)]
    pub program_fd: bool,
    /// Hand the link's descriptor to the client. Its holder can detach the link, pin it or pass it on so that it outlives the session, and replace the program with a second one of which it holds a descriptor.
    #[serde(default)]
    pub link_fd: bool,
}

/// A program on the sockets of cgroups.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CgroupSkb {
    /// The name of the program: its C function in the object.
    pub program: Text,
    /// Directories of cgroup v2, literal. The helper opens them at its start.
    pub cgroups: Vec<Text>,
    /// Which packets: those that come in, or those that go out.
    pub direction: Text,
    /// Hand the program's descriptor to the client. Its holder needs no capability to attach the program, and not only where this policy says: to any cgroup directory that it can open.
    #[serde(default)]
    pub program_fd: bool,
    /// Hand the link's descriptor to the client. Its holder can detach the link, pin it or pass it on so that it outlives the session, and replace the program with a second one of which it holds a descriptor.
    #[serde(default)]
    pub link_fd: bool,
}

/// A program on tracepoints of the kernel.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Events {
    /// The name of the program: its C function in the object.
    pub program: Text,
    /// Names of events: for `tracepoint` with their category, as under `/sys/kernel/tracing/events`, for `raw_tracepoint` without.
    pub events: Vec<Text>,
    /// Hand the program's descriptor to the client. Its holder needs no capability to attach the program, and not only where this policy says: to any tracepoint of its kind.
    #[serde(default)]
    pub program_fd: bool,
    /// Hand the link's descriptor to the client. Its holder can detach the link, pin it or pass it on so that it outlives the session, and replace the program with a second one of which it holds a descriptor. Not for `tracepoint`, whose link could not be taken back.
    #[serde(default)]
    pub link_fd: bool,
}

/// A program on functions of one binary.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Uprobe {
    /// The name of the program: its C function in the object.
    pub program: Text,
    /// The file.
    pub binary: Text,
    /// Functions, by their names in the symbol table.
    pub symbols: Vec<Text>,
    /// `true`: when the function returns; `false`: when it is called.
    #[serde(default, rename = "return")]
    pub at_return: bool,
    /// Hand the program's descriptor to the client. Its holder needs no capability to attach the program, and not only where this policy says: to any binary, even one that it cannot read.
    #[serde(default)]
    pub program_fd: bool,
    /// Hand the link's descriptor to the client. Its holder can detach the link, pin it or pass it on so that it outlives the session, and replace the program with a second one of which it holds a descriptor.
    #[serde(default)]
    pub link_fd: bool,
}

/// A program on sockets of the client's own.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SocketFilter {
    /// The name of the program: its C function in the object.
    pub program: Text,
    /// Hand the program's descriptor to the client. It goes only on sockets that its holder has anyway; without it the program is of no use.
    #[serde(default)]
    pub program_fd: bool,
}

/// A program on one function of the kernel, for which it is loaded.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Traced {
    /// The name of the program: its C function in the object.
    pub program: Text,
    /// The function, by its name in the kernel's BTF, whatever the object says in `SEC()`; none of a module. A program is loaded for one function: another one takes another program.
    pub function: Text,
    /// Hand the program's descriptor to the client. Its holder needs no capability to attach the program, but to its one function only.
    #[serde(default)]
    pub program_fd: bool,
    /// Hand the link's descriptor to the client. Its holder can pin it or pass it on so that the program stays attached when the session has ended: the kernel knows no other way to detach it than to close it.
    #[serde(default)]
    pub link_fd: bool,
}

/// A program on functions of the kernel.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Kprobe {
    /// The name of the program: its C function in the object.
    pub program: Text,
    /// Functions, by their names in `/proc/kallsyms`.
    pub functions: Vec<Text>,
    /// `true`: when the function returns; `false`: when it is called.
    #[serde(default, rename = "return")]
    pub at_return: bool,
    /// Hand the program's descriptor to the client. Its holder needs no capability to attach the program, and not only where this policy says: to any function of the kernel.
    #[serde(default)]
    pub program_fd: bool,
    /// Hand the link's descriptor to the client. Its holder can pin it or pass it on so that the program stays attached when the session has ended: the kernel knows no other way to detach it than to close it.
    #[serde(default)]
    pub link_fd: bool,
}

/// Both ends are among the values that a client may set.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Range {
    /// The least value.
    pub min: Spanned<i64>,
    /// The largest value.
    pub max: Spanned<i64>,
}

/// Functions of the kernel that act beyond the program's own data.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct Helpers {
    /// Names of helper functions of the table above, with or without `bpf_`. One that needs no grant is an error.
    #[serde(default)]
    pub allow: Vec<Text>,
    /// Functions of the kernel itself (kfuncs), by their names in its BTF; none of a module. Each that a program calls has to be named.
    #[serde(default)]
    pub kfuncs: Vec<Text>,
}

/// Upper bounds of the app, over all of its sessions.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct Limits {
    /// Programs loaded at a time.
    pub programs: Option<Spanned<i64>>,
    /// Maps at a time, data sections included.
    pub maps: Option<Spanned<i64>>,
    /// Attachments at a time.
    pub links: Option<Spanned<i64>>,
    /// Instructions of one program.
    pub instructions: Option<Spanned<i64>>,
    /// Memory of all maps, with one copy per CPU where a map has that, as computed before the kernel is asked: bytes, or a text with `KiB`, `MiB` or `GiB`.
    pub map_memory: Option<Spanned<Size>>,
    /// Connections at a time.
    pub connections: Option<Spanned<i64>>,
    /// Loads in a minute, those that fail included.
    pub loads_per_minute: Option<Spanned<i64>>,
}

/// Bytes: a number, or a text with `KiB`, `MiB` or `GiB`.
#[derive(Deserialize)]
#[serde(untagged, expecting = "a number of bytes, or a text such as \"64MiB\", is expected here")]
pub(super) enum Size {
    Bytes(i64),
    Text(String),
}

/// How long loaded things live.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct Lifetime {
    /// `session`: what a connection loaded is detached and released when it ends. `app`: it stays until it is unloaded. `boot`: the helper loads and attaches everything by itself.
    pub keep: Option<Text>,
}

/// What is missed refuses; nothing falls back silently.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct Require {
    /// The helper's confinement. `full`: seccomp and landlock. `seccomp`: landlock only where the kernel has it. A helper that reports less is not used.
    pub sandbox: Option<Text>,
    /// Who finds out a client's `unit`. `helper`: the helper too, which needs Linux 6.13 for it. `broker`: where the helper cannot, the broker alone; one that was taken over could name another unit.
    pub unit_check: Option<Text>,
    /// The least version of the kernel, such as `"6.6"`. Without it: any that bpfgate runs on.
    pub kernel: Option<Text>,
    /// The least ABI of landlock. Without it: any.
    pub landlock: Option<Spanned<i64>>,
    /// Whether the kernel has to describe its types in `/sys/kernel/btf/vmlinux`.
    #[serde(default)]
    pub btf: bool,
}
