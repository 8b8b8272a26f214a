//! One method per method of the interface.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::error::Error;
use crate::map::Map;
use crate::target::Target;
use crate::transport::{Connection, Fds};
use crate::wire;
use crate::wire::{Entry, InstanceId, LinkId, LinkInfo, MapGrant, Nothing, ServiceInfo};

/// Where the broker listens unless `BPFGATE_SOCKET` says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/bpfgate/io.bpfgate";

/// How long connecting and each write may take: both only wait while the broker's queue is full.
const SEND_TIMEOUT_SECONDS: i64 = 10;

/// A connection to the broker, and so a session of one app.
///
/// Dropping it ends the session: what it loaded is detached and released, unless the policy says
/// `keep = "app"`. After [`Error::Io`] or [`Error::Protocol`] connect again.
#[must_use = "the session ends when this is dropped"]
pub struct Client {
    connection: Connection,
}

/// What [`Client::load`] may narrow or set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// Which programs of the object; `None` for all that the policy names.
    pub programs: Option<Vec<String>>,
    /// Initial values of `.rodata` variables, within the ranges of the policy.
    pub globals: BTreeMap<String, i64>,
}

/// A program of an instance.
#[derive(Debug)]
#[non_exhaustive]
pub struct Program {
    /// Its name in the object.
    pub name: String,
    /// The key of its hook in the policy: `xdp`, `tcx`, `uprobe`, ....
    pub kind: String,
    /// Its descriptor, only if the policy says `program_fd = true`.
    pub fd: Option<OwnedFd>,
}

/// What one load gave.
#[derive(Debug)]
#[must_use]
#[non_exhaustive]
pub struct Instance {
    /// Names it in later calls.
    pub id: InstanceId,
    /// The loaded programs.
    pub programs: Vec<Program>,
    /// Their maps.
    pub maps: Vec<MapGrant>,
}

/// What one attach gave.
#[derive(Debug)]
#[non_exhaustive]
pub struct Link {
    /// What [`Client::detach`] takes.
    pub id: LinkId,
    /// What it was attached to, as the broker says.
    pub target: String,
    /// Its descriptor, only if the policy says `link_fd = true`.
    pub fd: Option<OwnedFd>,
}

/// An instance of the app, of this session or another.
#[derive(Debug)]
#[non_exhaustive]
pub struct ListedInstance {
    /// Names it in calls.
    pub id: InstanceId,
    /// The object it was loaded from.
    pub object: String,
    /// Whether this session loaded it.
    pub mine: bool,
    /// Its programs, without descriptors.
    pub programs: Vec<Program>,
    /// Its maps, without descriptors.
    pub maps: Vec<MapGrant>,
    /// What is attached.
    pub links: Vec<LinkInfo>,
}

/// One reply of [`Client::read_map_page`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// The entries.
    pub entries: Vec<Entry>,
    /// Where the next page starts; `None` at the end of the map.
    pub cursor: Option<String>,
}

impl Client {
    /// Connects to the broker: on `path`, else on `$BPFGATE_SOCKET`, else on [`DEFAULT_SOCKET`].
    pub fn connect(path: Option<&Path>) -> Result<Self, Error> {
        let path = path.map_or_else(default_socket, Path::to_path_buf);
        match dial(&path) {
            Ok(stream) => Ok(Self::from_stream(stream)),
            Err(source) => Err(Error::Unreachable { socket: path, source }),
        }
    }

    /// Speaks on a connection that exists.
    pub fn from_stream(stream: UnixStream) -> Self {
        Self { connection: Connection::new(stream) }
    }

    /// How long to wait for each reply, two minutes at first; `None` waits for ever.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.connection.set_timeout(timeout);
    }

    /// Calls `notice` once for each reply that takes longer than `after`.
    pub fn notify_after(&mut self, after: Duration, notice: impl FnMut() + Send + 'static) {
        self.connection.notify_after(after, Box::new(notice));
    }

    /// Calls `observer` with the JSON of each request and that of its reply: for logs of an app, and for tests.
    pub fn observe(&mut self, observer: impl FnMut(&[u8], &[u8]) + Send + 'static) {
        self.connection.observe(Box::new(observer));
    }

    /// Binds this connection to an app: first, and once.
    pub fn open(&mut self, app: &str) -> Result<(), Error> {
        self.plain("io.bpfgate.Open", &wire::OpenIn { app })
    }

    /// Loads an object of the policy.
    pub fn load(&mut self, object: &str, options: &LoadOptions) -> Result<Instance, Error> {
        let parameters =
            wire::LoadIn { object, programs: options.programs.as_deref(), globals: &options.globals };
        let (out, mut fds) = self.connection.call::<_, wire::LoadOut>("io.bpfgate.Load", &parameters)?;
        let programs = programs(out.programs, &mut fds)?;
        let maps = maps(out.maps, &mut fds)?;
        fds.finish()?;
        Ok(Instance { id: out.instance, programs, maps })
    }

    /// Attaches a program of an instance.
    ///
    /// `target` may be `None` where the policy allows exactly one literal target; `hook` is needed
    /// only if the policy lists the program under more than one hook.
    pub fn attach(
        &mut self,
        instance: InstanceId,
        program: &str,
        target: Option<&Target>,
        hook: Option<&str>,
    ) -> Result<Link, Error> {
        let parameters = wire::AttachIn { instance, program, target: target.map(Into::into), hook };
        let (out, mut fds) = self.connection.call::<_, wire::AttachOut>("io.bpfgate.Attach", &parameters)?;
        let fd = fds.take(out.fd)?;
        fds.finish()?;
        Ok(Link { id: out.link, target: out.target, fd })
    }

    /// Takes a link down at once, whoever else holds it.
    pub fn detach(&mut self, link: LinkId) -> Result<(), Error> {
        self.plain("io.bpfgate.Detach", &wire::DetachIn { link })
    }

    /// Detaches and releases everything of an instance.
    pub fn unload(&mut self, instance: InstanceId) -> Result<(), Error> {
        self.plain("io.bpfgate.Unload", &wire::UnloadIn { instance })
    }

    /// One map of any instance of the app, with its descriptor if its access allows one.
    pub fn map(&mut self, instance: InstanceId, name: &str) -> Result<MapGrant, Error> {
        let parameters = wire::MapIn { instance, name };
        let (out, mut fds) = self.connection.call::<_, wire::MapOut>("io.bpfgate.Map", &parameters)?;
        let map = map_grant(out.map, &mut fds)?;
        fds.finish()?;
        Ok(map)
    }

    /// Reads some entries of a map through the broker; `limit` is 1 to 256.
    pub fn read_map_page(
        &mut self,
        instance: InstanceId,
        name: &str,
        cursor: Option<&str>,
        limit: Option<u16>,
    ) -> Result<Page, Error> {
        let parameters = wire::ReadMapIn { instance, name, cursor, limit };
        let (out, fds) = self.connection.call::<_, wire::ReadMapOut>("io.bpfgate.ReadMap", &parameters)?;
        fds.finish()?;
        Ok(Page { entries: out.entries, cursor: out.cursor })
    }

    /// Reads a whole map through the broker, page by page as the iterator is used.
    pub fn read_map<'a>(&'a mut self, instance: InstanceId, name: &'a str) -> Entries<'a> {
        Entries { client: self, instance, name, cursor: None, page: Vec::new().into_iter(), ended: false }
    }

    /// The instances of this app, of all sessions that share it.
    pub fn list(&mut self) -> Result<Vec<ListedInstance>, Error> {
        let (out, mut fds) = self.connection.call::<_, wire::ListOut>("io.bpfgate.List", &Nothing {})?;
        let instances = out.instances.into_iter().map(|instance| {
            Ok(ListedInstance {
                id: instance.id,
                object: instance.object,
                mine: instance.mine,
                programs: programs(instance.programs, &mut fds)?,
                maps: maps(instance.maps, &mut fds)?,
                links: instance.links,
            })
        });
        let instances = instances.collect::<Result<_, Error>>()?;
        fds.finish()?;
        Ok(instances)
    }

    /// Asks the broker what it is; needs no [`open`](Self::open).
    pub fn service_info(&mut self) -> Result<ServiceInfo, Error> {
        let (info, fds) = self.connection.call("org.varlink.service.GetInfo", &Nothing {})?;
        fds.finish()?;
        Ok(info)
    }

    fn plain<P: serde::Serialize>(&mut self, method: &str, parameters: &P) -> Result<(), Error> {
        let (Nothing {}, fds) = self.connection.call(method, parameters)?;
        fds.finish()
    }
}

/// For polling: the broker never speaks first, so anything but silence is the session's end.
impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

impl Instance {
    /// Takes the map of this name out of the instance, as something to work with.
    pub fn take_map(&mut self, name: &str) -> Result<Map, Error> {
        match self.maps.iter().position(|map| map.name == name) {
            Some(place) => self.maps.remove(place).into_map(),
            None => Err(Error::Protocol(format!("instance {} has no map {name}", self.id))),
        }
    }
}

/// The entries of a map that is read through the broker.
pub struct Entries<'a> {
    client: &'a mut Client,
    instance: InstanceId,
    name: &'a str,
    cursor: Option<String>,
    page: std::vec::IntoIter<Entry>,
    ended: bool,
}

impl Entries<'_> {
    fn next_page(&mut self) -> Result<(), Error> {
        let page = self.client.read_map_page(self.instance, self.name, self.cursor.as_deref(), None)?;
        if page.cursor.is_some() && page.cursor == self.cursor {
            return Err(Error::Protocol("reading the map does not get on".to_owned()));
        }
        self.ended = page.cursor.is_none();
        self.cursor = page.cursor;
        self.page = page.entries.into_iter();
        Ok(())
    }
}

impl Iterator for Entries<'_> {
    type Item = Result<Entry, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(entry) = self.page.next() {
                return Some(Ok(entry));
            }
            if self.ended {
                return None;
            }
            if let Err(error) = self.next_page() {
                self.ended = true;
                return Some(Err(error));
            }
        }
    }
}

fn programs(programs: Vec<wire::WireProgram>, fds: &mut Fds) -> Result<Vec<Program>, Error> {
    let one = |program: wire::WireProgram| {
        Ok(Program { name: program.name, kind: program.kind, fd: fds.take(program.fd)? })
    };
    programs.into_iter().map(one).collect()
}

fn maps(maps: Vec<wire::WireMap>, fds: &mut Fds) -> Result<Vec<MapGrant>, Error> {
    maps.into_iter().map(|map| map_grant(map, fds)).collect()
}

fn map_grant(map: wire::WireMap, fds: &mut Fds) -> Result<MapGrant, Error> {
    let wire::WireMap { name, kind, key_size, value_size, max_entries, access, fd } = map;
    Ok(MapGrant { name, kind, key_size, value_size, max_entries, access, fd: fds.take(fd)? })
}

fn default_socket() -> PathBuf {
    std::env::var_os("BPFGATE_SOCKET")
        .filter(|path| !path.is_empty())
        .map_or_else(|| PathBuf::from(DEFAULT_SOCKET), PathBuf::from)
}

/// Not `UnixStream::connect`, which waits for ever while the broker's queue is full.
pub(crate) fn dial(path: &Path) -> io::Result<UnixStream> {
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&fd, sockopt::SendTimeout, &TimeVal::seconds(SEND_TIMEOUT_SECONDS))?;
    match connect(fd.as_raw_fd(), &UnixAddr::new(path)?) {
        Ok(()) => Ok(fd.into()),
        Err(Errno::EAGAIN) => {
            Err(io::Error::new(io::ErrorKind::TimedOut, "its queue of connections is full"))
        }
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
