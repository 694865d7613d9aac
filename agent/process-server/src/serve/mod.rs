//! Recovery points that can be opened at once, over NBD on a Unix socket, and as files where the machine has FUSE and lets us mount;
//! for a hypervisor elsewhere over TCP too, by a listener of the serve's own with mutual TLS.
//!
//! *Consistency.* What is served is a view at one cut, or a scratch layer over it that belongs to this serve alone. A serve's
//! listener knows that serve's disks alone, and lets in whom that serve's own authority gave a certificate.
//! *Retries.* None. *Cancellation.* Stopping ends its connections after the requests that were received, and drops the
//! scratch layer and the authority. *Crash.* Serves end with the process: the next start removes scratch layers and pins that were left.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tidemark_base::disk::Disk;
use tidemark_base::storage::Storage;
use tidemark_base::sync::{Mutex, MutexGuard};
use tidemark_base::{DiskId, MachineId, MarkId, Timestamp};
use tidemark_fuse::{FuseError, FuseFile};
use tidemark_nbd::server::{ListenError, Server, StillBusy};
use tidemark_nbd::{DiskExport, Export, Exports, Limits, Remote, address};
use tidemark_proto::control::{AttachedDisk, Failure, FailureKind, ServeId, Serving};
use tidemark_transport::ExportAuthority;

/// Points served at once: each costs a few file descriptors and, when writable, the room of its scratch layer.
pub const SERVES_MAX: usize = 64;
const FOLDER: &str = "serves";
/// Beside the socket: a file for each disk that is served.
const FILES: &str = "points";
/// In the folder of a serve that is reached over TLS. No disk has this name.
const CERTIFICATES: &str = "nbd-tls";

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("cannot listen for NBD clients")]
    Listen(#[source] ListenError),
    #[error("{SERVES_MAX} points are served already")]
    TooMany,
    #[error("there is no serve {id}")]
    Unknown { id: ServeId },
    #[error("serve {id} has connections that do not end")]
    Busy { id: ServeId, source: StillBusy },
    #[error("a file of serve {id} does not end")]
    File { id: ServeId, source: FuseError },
    #[error("cannot make certificates for NBD clients")]
    Certificates(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the folder of serves cannot be read or written")]
    Store(#[from] io::Error),
}

impl ServeError {
    pub fn help(&self) -> &'static str {
        match self {
            ServeError::Listen(error) => error.help(),
            ServeError::TooMany => "stop a serve that is not needed any more",
            ServeError::Unknown { .. } => {
                "it was stopped already, or the process server was restarted: serve the point again"
            }
            ServeError::File { source, .. } => source.help(),
            ServeError::Busy { .. } => "stop the program that has the disk open, then stop the serve again",
            ServeError::Certificates(_) | ServeError::Store(_) => {
                "check the process server's volume (free room, kernel log)"
            }
        }
    }
}

impl From<ServeError> for Failure {
    fn from(error: ServeError) -> Self {
        let kind = match &error {
            ServeError::TooMany | ServeError::Busy { .. } | ServeError::File { .. } => FailureKind::Conflict,
            ServeError::Unknown { .. } => FailureKind::NotFound,
            ServeError::Listen(_) | ServeError::Certificates(_) | ServeError::Store(_) => FailureKind::Failed,
        };
        Failure::from_error(kind, &error, error.help())
    }
}

/// What is served, before it has an address.
pub struct ServedPoint {
    pub machine: MachineId,
    pub point: MarkId,
    pub time: Timestamp,
    pub writable: bool,
    pub disks: Vec<(DiskId, Arc<dyn Disk>)>,
    /// Where they are served over TLS as well. Port 0: any.
    pub listen: Option<SocketAddr>,
    /// Dropped, with the time that it takes, when the serve ended.
    pub held: Option<Box<dyn Send>>,
}

pub struct Serves {
    storage: Arc<dyn Storage>,
    server: Server,
    exports: Arc<Exports>,
    socket: PathBuf,
    files: PathBuf,
    active: Mutex<BTreeMap<ServeId, Active>>,
}

struct Active {
    serving: Serving,
    names: Vec<String>,
    files: Vec<Arc<FuseFile>>,
    remote: Option<Arc<Remote>>,
    /// Not shown: it belongs to an export that runs.
    internal: bool,
    held: Option<Box<dyn Send>>,
}

impl Serves {
    /// Drops what an earlier process left and listens on `socket`.
    pub fn open(storage: Arc<dyn Storage>, socket: &Path) -> Result<Self, ServeError> {
        if storage.exists(FOLDER)? {
            storage.remove_folder(FOLDER)?;
        }
        storage.create_folder(FOLDER)?;
        storage.sync_folder("")?;
        let exports = Arc::new(Exports::new());
        let server = Server::new(exports.clone(), Limits::default());
        server.listen_unix(socket, &[]).map_err(ServeError::Listen)?;
        let files = socket.with_file_name(FILES);
        remove_dead(&files);
        Ok(Self { storage, server, exports, socket: socket.to_owned(), files, active: Mutex::default() })
    }

    /// A disk of a serve as a file; `None` where this machine has no FUSE, or does not let us mount.
    fn file(&self, name: &str, export: Arc<dyn Export>) -> Option<Arc<FuseFile>> {
        match tidemark_fuse::probe().and_then(|()| FuseFile::serve(&self.files.join(name), export, &[])) {
            Ok(file) => Some(Arc::new(file)),
            Err(error) => {
                tracing::info!(%error, help = error.help(), "a served disk is no file, and is reached over NBD alone");
                None
            }
        }
    }

    /// A folder for the scratch layer of one disk of a serve that is about to start. [`Serves::discard`] removes it.
    pub fn scratch_folder(&self, id: ServeId, disk: DiskId) -> Result<Arc<dyn Storage>, ServeError> {
        let name = format!("{FOLDER}/{id}/{disk}");
        self.storage.create_folder(&name)?;
        Ok(self.storage.folder(&name))
    }

    /// Removes the scratch layers of a serve.
    pub fn discard(&self, id: ServeId) -> Result<(), ServeError> {
        let name = format!("{FOLDER}/{id}");
        if self.storage.exists(&name)? {
            self.storage.remove_folder(&name)?;
        }
        Ok(())
    }

    /// Listens for clients of one serve, who know nothing yet.
    fn listen(&self, id: ServeId, at: SocketAddr) -> Result<Remote, ServeError> {
        let name = format!("{FOLDER}/{id}/{CERTIFICATES}");
        self.storage.create_folder(&name)?;
        let authority = ExportAuthority::open_or_create(self.storage.folder(&name));
        let authority = Arc::new(authority.map_err(|error| ServeError::Certificates(error.into()))?);
        let config = authority.server(address::certificate_names(at.ip()));
        let config = config.map_err(|error| ServeError::Certificates(error.into()))?;
        Remote::listen(at, config, authority.client_folder()).map_err(ServeError::Listen)
    }

    /// From now on clients can open the disks. An `internal` serve is not listed.
    pub fn start(&self, id: ServeId, point: ServedPoint, internal: bool) -> Result<Serving, ServeError> {
        let mut active = self.active();
        if active.len() >= SERVES_MAX {
            return Err(ServeError::TooMany);
        }
        let remote = point.listen.map(|address| self.listen(id, address)).transpose()?.map(Arc::new);
        let mut disks = Vec::new();
        let mut names = Vec::new();
        let mut files = Vec::new();
        for (index, (disk, content)) in point.disks.into_iter().enumerate() {
            let name = format!("{id}-{index}");
            let bytes = content.bytes();
            let export = DiskExport::new(content);
            let export = if point.writable { export } else { export.read_only() };
            let export = Arc::new(export);
            let nbds = remote.as_ref().map(|remote| {
                remote.exports.insert(name.clone(), export.clone());
                remote.uri(&name)
            });
            let shown = if internal { None } else { self.file(&name, export.clone()) };
            let file = shown.as_ref().map(|file| file.path().to_string_lossy().into_owned());
            files.extend(shown);
            self.exports.insert(name.clone(), export);
            let nbd = Some(address::unix_uri(&name, &self.socket));
            disks.push(AttachedDisk { id: disk, nbd, nbds, file, bytes });
            names.push(name);
        }
        let ServedPoint { machine, point, time, writable, held, .. } = point;
        let serving = Serving { serve: id, machine, point, time, writable, disks };
        active.insert(id, Active { serving: serving.clone(), names, files, remote, internal, held });
        Ok(serving)
    }

    /// Ends the connections, releases the point and drops scratch layers. Blocks until the requests received are done.
    pub fn stop(&self, id: ServeId) -> Result<Serving, ServeError> {
        let (serving, names, files, remote) = {
            let active = self.active();
            let found = active.get(&id).ok_or(ServeError::Unknown { id })?;
            (found.serving.clone(), found.names.clone(), found.files.clone(), found.remote.clone())
        };
        for file in files {
            file.close().map_err(|source| ServeError::File { id, source })?;
        }
        for name in &names {
            self.exports.remove(name);
        }
        if let Some(remote) = remote {
            remote.server.stop().map_err(|source| ServeError::Busy { id, source })?;
        }
        for name in &names {
            self.server.close_export(name).map_err(|source| ServeError::Busy { id, source })?;
        }
        let ended = self.active().remove(&id);
        drop(ended.and_then(|active| active.held));
        self.discard(id)?;
        Ok(serving)
    }

    pub fn get(&self, id: ServeId) -> Option<Serving> {
        self.active().get(&id).map(|active| active.serving.clone())
    }

    pub fn list(&self) -> Vec<Serving> {
        self.active().values().filter(|active| !active.internal).map(|active| active.serving.clone()).collect()
    }

    /// Whether a machine's point is open to clients.
    pub fn of_machine(&self, machine: MachineId) -> Vec<ServeId> {
        let active = self.active();
        active.iter().filter(|(_, active)| active.serving.machine == machine).map(|(id, _)| *id).collect()
    }

    /// Stops everything. Blocks.
    pub fn stop_all(&self) {
        let ids: Vec<ServeId> = self.active().keys().copied().collect();
        for id in ids {
            if let Err(error) = self.stop(id) {
                tracing::error!(serve = %id, %error, "a serve does not end");
            }
        }
        if let Err(error) = self.server.stop() {
            tracing::error!(%error, "the NBD server does not end");
        }
    }

    fn active(&self) -> MutexGuard<'_, BTreeMap<ServeId, Active>> {
        self.active.lock().expect("no panic while held")
    }
}

/// What an earlier process left: mounts that nobody answers for.
fn remove_dead(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let removed = match tidemark_fuse::clear_dead(&entry.path()) {
            Ok(_) => std::fs::remove_file(entry.path()).map_err(io::Error::other),
            Err(error) => Err(io::Error::other(error)),
        };
        if let Err(error) = removed {
            tracing::warn!(path = %entry.path().display(), %error, "a file of an earlier process stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use tidemark_base::disk::{Access, FileDisk};
    use tidemark_base::storage::RealStorage;

    fn point(folder: &Path) -> ServedPoint {
        let path = folder.join("disk.img");
        std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let disk: Arc<dyn Disk> = Arc::new(FileDisk::open(&path, Access::Read).unwrap());
        ServedPoint {
            machine: MachineId::random(),
            point: MarkId::random(),
            time: Timestamp(1),
            writable: false,
            disks: vec![(DiskId::random(), disk)],
            listen: None,
            held: None,
        }
    }

    #[test]
    fn a_serve_has_an_address_until_it_is_stopped() {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        let socket = folder.path().join("run/points.sock");
        storage.create_folder("serves/left-by-a-crash").unwrap();
        let serves = Serves::open(storage.clone(), &socket).unwrap();
        assert!(storage.list("serves").unwrap().is_empty());
        let id = ServeId::random();
        serves.scratch_folder(id, DiskId::random()).unwrap();
        let serving = serves.start(id, point(folder.path()), false).unwrap();
        let nbd = serving.disks[0].nbd.as_deref().unwrap();
        assert_eq!(nbd, format!("nbd+unix:///{id}-0?socket={}", socket.display()));
        UnixStream::connect(&socket).unwrap();
        match &serving.disks[0].file {
            Some(file) => {
                assert!(std::fs::read(file).unwrap() == std::fs::read(folder.path().join("disk.img")).unwrap());
                let refused = std::fs::OpenOptions::new().write(true).open(file).unwrap_err();
                assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
            }
            None => assert!(tidemark_fuse::probe().is_err()),
        }
        assert_eq!(serves.list(), std::slice::from_ref(&serving));
        assert_eq!(serves.of_machine(serving.machine), [id]);
        assert_eq!(serves.stop(id).unwrap(), serving);
        assert!(!serving.disks[0].file.as_ref().is_some_and(|file| Path::new(file).exists()));
        assert!(storage.list("serves").unwrap().is_empty());
        assert!(matches!(serves.stop(id), Err(ServeError::Unknown { .. })));
        let internal = serves.start(ServeId::random(), point(folder.path()), true).unwrap();
        assert!(serves.list().is_empty() && !internal.disks.is_empty());
        serves.stop_all();
        assert!(UnixStream::connect(&socket).is_err());
    }
}
