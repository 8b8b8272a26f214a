//! The shape of a policy file, word for word. Every struct refuses keys that it does not know.

use serde::Deserialize;
use serde_spanned::Spanned;
use std::collections::BTreeMap;

pub(super) type Text = Spanned<String>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    pub version: Spanned<i64>,
    #[serde(default)]
    pub description: String,
    pub netns: Option<Text>,
    #[serde(default)]
    pub client: Vec<Spanned<Client>>,
    #[serde(default)]
    pub objects: BTreeMap<Text, Object>,
    #[serde(default)]
    pub limits: Limits,
    #[serde(default)]
    pub lifetime: Lifetime,
    pub require: Option<Spanned<Require>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Client {
    pub user: Option<Spanned<Principal>>,
    pub group: Option<Spanned<Principal>>,
    pub unit: Option<Text>,
    pub slice: Option<Text>,
    pub may: Spanned<Vec<Text>>,
    pub maps: Option<Vec<Text>>,
    pub proxy: Option<Vec<Text>>,
}

/// A user or group: by number, or by a name of /etc/passwd or /etc/group.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum Principal {
    Id(i64),
    Name(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Object {
    pub path: Text,
    pub sha256: Option<Text>,
    #[serde(default)]
    pub xdp: Vec<Spanned<Xdp>>,
    #[serde(default)]
    pub tcx: Vec<Spanned<Tcx>>,
    #[serde(default)]
    pub cgroup_skb: Vec<Spanned<CgroupSkb>>,
    #[serde(default)]
    pub raw_tracepoint: Vec<Spanned<Events>>,
    #[serde(default)]
    pub tracepoint: Vec<Spanned<Events>>,
    #[serde(default)]
    pub uprobe: Vec<Spanned<Uprobe>>,
    #[serde(default)]
    pub socket_filter: Vec<Spanned<SocketFilter>>,
    #[serde(default)]
    pub maps: BTreeMap<Text, Text>,
    #[serde(default)]
    pub globals: BTreeMap<Text, Range>,
    #[serde(default)]
    pub helpers: Helpers,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Xdp {
    pub program: Text,
    pub interfaces: Vec<Text>,
    pub mode: Option<Text>,
    #[serde(default)]
    pub program_fd: bool,
    #[serde(default)]
    pub link_fd: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Tcx {
    pub program: Text,
    pub interfaces: Vec<Text>,
    pub direction: Text,
    pub order: Option<Text>,
    #[serde(default)]
    pub program_fd: bool,
    #[serde(default)]
    pub link_fd: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CgroupSkb {
    pub program: Text,
    pub cgroups: Vec<Text>,
    pub direction: Text,
    #[serde(default)]
    pub program_fd: bool,
    #[serde(default)]
    pub link_fd: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Events {
    pub program: Text,
    pub events: Vec<Text>,
    #[serde(default)]
    pub program_fd: bool,
    #[serde(default)]
    pub link_fd: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Uprobe {
    pub program: Text,
    pub binary: Text,
    pub symbols: Vec<Text>,
    #[serde(default, rename = "return")]
    pub at_return: bool,
    #[serde(default)]
    pub program_fd: bool,
    #[serde(default)]
    pub link_fd: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SocketFilter {
    pub program: Text,
    #[serde(default)]
    pub program_fd: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Range {
    pub min: Spanned<i64>,
    pub max: Spanned<i64>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct Helpers {
    #[serde(default)]
    pub allow: Vec<Text>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct Limits {
    pub programs: Option<Spanned<i64>>,
    pub maps: Option<Spanned<i64>>,
    pub links: Option<Spanned<i64>>,
    pub instructions: Option<Spanned<i64>>,
    pub map_memory: Option<Spanned<Size>>,
    pub connections: Option<Spanned<i64>>,
    pub loads_per_minute: Option<Spanned<i64>>,
}

/// Bytes: a number, or a text with `KiB`, `MiB` or `GiB`.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum Size {
    Bytes(i64),
    Text(String),
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct Lifetime {
    pub keep: Option<Text>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct Require {
    pub sandbox: Option<Text>,
    pub unit_check: Option<Text>,
    pub kernel: Option<Text>,
    pub landlock: Option<Spanned<i64>>,
    #[serde(default)]
    pub btf: bool,
}
