//! Logs that a Hyper-V host wrote: a folder (local, SMB, CSV) with VHDX or VHD disks and `.hrl` files beside them. Closed logs are taken in
//! the order of their chain, checked completely, and replayed.
//!
//! What they are replayed onto is a raw *copy* of the disk in the agent's state folder, through the same write path as a guest's writes over NBD: the copy is the
//! protected disk, so log, marks, scans and what follows from crashes are those of any other. It costs the room of the disk's allocated blocks on the agent's
//! volume; nothing of the host's is ever written, locked for writing, renamed or deleted. The image itself is read (by qemu-nbd, read-only; on Windows by a reader of VHDX) when there is no copy yet,
//! and when the logs do not tell everything: the chain is broken, a log is damaged, or the VHDX was written to by somebody who kept no log
//! (DataWriteGuid). Then it is compared with the copy, and what differs is written there.
//!
//! *Consistency.* Marks are made between two logs alone, never while one is replayed ([`ProtectedDisk::set_importing`]): the copy is then the disk at the instant
//! at which its host switched logs. A comparison reads an image that others write to: the copy is no instant of it until the log was replayed that was open when
//! the comparison ended, and until then there are no marks. *Retries.* Whatever fails is tried again every second, with an alarm. What looks like a broken chain is
//! looked at for [`PATIENCE`] first: names appear on a share one after another.
//! *Cancellation.* Between two writes; what was begun is said in the cursor. *Crash.* See [`cursor`].

pub mod cursor;
mod image;
mod importer;
mod logs;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tidemark_base::DiskId;
use tidemark_base::storage::{OpenMode, RealStorage};
use tidemark_base::sync::{Mutex, MutexGuard};

use super::{Address, CaptureProvider};
use crate::error::HostError;
use crate::protected::ProtectedDisk;
pub use image::ImageError;
#[cfg(all(test, unix))]
pub use image::{Format, vhdx};
use importer::{Importer, Patience};

/// How long logs and image may contradict what was taken before the image is compared.
const PATIENCE: Duration = Duration::from_secs(5);
/// Where the copies are, in the state folder.
const FOLDER: &str = "imported";

#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("cannot {what} {}", path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("{} has {now} bytes, and had {before} when it was protected", path.display())]
    Resized { path: PathBuf, before: u64, now: u64 },
    #[error("cannot replay a log")]
    Log(#[from] tidemark_hrl::tools::ToolError),
    #[error("{} was written to while it was compared, and its host keeps no log", path.display())]
    Untracked { path: PathBuf },
    #[error("the import was stopped")]
    Stopped,
}

impl ImportError {
    pub fn help(&self) -> &'static str {
        match self {
            ImportError::Image(error) => error.help(),
            ImportError::Io { .. } => {
                "see the system's message; the folder must be readable, and the agent's state folder must have room"
            }
            ImportError::Resized { .. } => {
                "unprotect the machine and protect it again: the host's logs are of a disk of another size now"
            }
            ImportError::Log(error) => error.help(),
            ImportError::Untracked { .. } => {
                "turn replication of the disk on at its host, so that it keeps .hrl files beside the disk"
            }
            ImportError::Stopped => "start the agent again",
        }
    }
}

/// What is imported, and by whom.
pub struct HrlImporter {
    /// Of the copies.
    folder: PathBuf,
    pub(crate) patience: Patience,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Where the host's own image of a disk is.
    origins: BTreeMap<DiskId, PathBuf>,
    running: BTreeMap<String, Importer>,
}

impl HrlImporter {
    /// Makes nothing before a disk is protected.
    pub fn new(state_folder: &Path) -> Self {
        Self { folder: state_folder.join(FOLDER), patience: Patience::new(PATIENCE), state: Mutex::default() }
    }

    fn name_of(disk: DiskId) -> String {
        format!("{disk}.raw")
    }

    fn copy_of(&self, disk: DiskId) -> PathBuf {
        self.folder.join(Self::name_of(disk))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }
}

impl CaptureProvider for HrlImporter {
    fn probe(&self, path: &Path, _state: &Path) -> Result<u64, HostError> {
        Ok(image::Image::open(path).map_err(ImportError::from)?.bytes())
    }

    fn place(&self, _path: &Path, disk: DiskId) -> PathBuf {
        self.copy_of(disk)
    }

    /// The copy, empty at first, of the size of the image.
    fn prepare(&self, path: &Path, disk: DiskId) -> Result<(), HostError> {
        let copy = self.copy_of(disk);
        let failed = |source| ImportError::Io { what: "make", path: copy.clone(), source };
        if !copy.try_exists().map_err(failed)? {
            let bytes = image::Image::open(path).map_err(ImportError::from)?.bytes();
            let storage = RealStorage::create(self.folder.clone()).map_err(failed)?;
            // Whatever an earlier copy was is not what an empty one is.
            cursor::forget(&*storage, disk).map_err(failed)?;
            let file = storage.open(&Self::name_of(disk), OpenMode::Create).map_err(failed)?;
            // Where files are not sparse by themselves: its blocks that are zeroes take no room.
            file.set_bytes(bytes)
                .and_then(|()| file.punch_hole(0, bytes))
                .and_then(|()| file.sync())
                .map_err(failed)?;
            storage.sync_folder("").map_err(failed)?;
        }
        self.state().origins.insert(disk, path.to_owned());
        Ok(())
    }

    fn untrack(&self, disk: DiskId) -> io::Result<()> {
        self.state().origins.remove(&disk);
        let copy = self.copy_of(disk);
        if !copy.try_exists()? {
            return Ok(());
        }
        let storage = RealStorage::open_folder(&self.folder);
        cursor::forget(&*storage, disk)?;
        storage.remove(&Self::name_of(disk))?;
        storage.sync_folder("")
    }

    fn attach(&self, name: &str, disk: &Arc<ProtectedDisk>) -> io::Result<Address> {
        let mut state = self.state();
        let origin = state.origins.get(&disk.identity.disk).cloned().ok_or(io::ErrorKind::NotFound)?;
        let importer = Importer::start(disk.clone(), origin, self.patience.clone())?;
        state.running.insert(name.to_owned(), importer);
        Ok(Address::default())
    }

    fn detach(&self, name: &str) -> io::Result<()> {
        let importer = self.state().running.remove(name);
        drop(importer);
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        let running = std::mem::take(&mut self.state().running);
        drop(running);
        Ok(())
    }
}
