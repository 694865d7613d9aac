//! The eBPF tracker: any block device of this host, whoever writes to it, without a change to them ([`tidemark_bpf`]).
//!
//! *Consistency.* [`crate::protected`] says how what it tells becomes records and marks. *Retries.* None here. *Cancellation.* Detaching
//! ends nothing: the kernel goes on marking, so that the next session need not compare. *Crash.* The same.
//!
//! A device whose machine runs elsewhere is kept as [`tidemark_bpf::keep`] says. Which ones are read-only for that is noted in files: the kernel forgets it when
//! the system starts, and one that somebody else made read-only stays so.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use tidemark_base::storage::{RealStorage, read_file, remove_if_there, replace_file};
use tidemark_base::sync::Mutex;
use tidemark_base::{DiskId, Extent, ExtentSet, MachineId};
use tidemark_bpf::{BlockTracker, Device, Found, Kept, Witness, Writer, keep};
use tidemark_proto::control::DiskSpec;

use super::freezer::{FileSystemFreezer, file_systems_on};
use super::tracker::Tracker;
use super::{Address, CaptureProvider, HomeDisk};
use crate::error::HostError;
use crate::freeze::{FreezeError, Frozen};
use crate::protected::ProtectedDisk;

/// In the agent's folder: a file for each device that is read-only because of us, which names it.
const FOLDER: &str = "kept";
const PATH_BYTES_MAX: u64 = 4096;

/// What is tracked is pinned in the kernel.
pub struct BpfTracker {
    folder: PathBuf,
    kept: Mutex<BTreeMap<DiskId, Kept>>,
}

impl BpfTracker {
    pub fn new(state_folder: &Path) -> Self {
        Self { folder: state_folder.join(FOLDER), kept: Mutex::default() }
    }

    fn keep(&self, disk: &DiskSpec) -> io::Result<()> {
        let mut kept = self.kept.lock().expect("no panic while held");
        match kept.get(&disk.disk) {
            Some(kept) if kept.is_written() => return kept.check_alone().map_err(io::Error::other),
            Some(kept) if kept.is_whole() => return Ok(()),
            _ => {}
        }
        kept.remove(&disk.disk);
        // Noted first: what is read-only is made writable again.
        let storage = RealStorage::create(self.folder.clone())?;
        replace_file(&*storage, &disk.disk.to_string(), disk.path.as_bytes())?;
        kept.insert(disk.disk, keep::keep(disk.path.as_ref()).map_err(io::Error::other)?);
        Ok(())
    }

    fn let_go(&self, disk: DiskId) -> io::Result<()> {
        let mut kept = self.kept.lock().expect("no panic while held");
        kept.remove(&disk);
        let (storage, name) = (RealStorage::open_folder(self.folder.clone()), disk.to_string());
        if !self.folder.join(&name).exists() {
            return Ok(());
        }
        let path = String::from_utf8(read_file(&*storage, &name, PATH_BYTES_MAX)?).map_err(io::Error::other)?;
        // One that is gone is not read-only when it comes back.
        if Path::new(&path).exists() {
            keep::let_go(path.as_ref()).map_err(io::Error::other)?;
        }
        remove_if_there(&*storage, &name)
    }
}

impl CaptureProvider for BpfTracker {
    fn probe(&self, path: &Path, state: &Path) -> Result<u64, HostError> {
        let device = BlockTracker::probe(path)?;
        keeps_away(&device, path, state)?;
        Ok(device.bytes())
    }

    fn track(&self, path: &Path, disk: DiskId, state: &Path) -> Result<Option<Arc<dyn Tracker>>, HostError> {
        keeps_away(&Device::examine(path).map_err(tidemark_bpf::TrackerError::from)?, path, state)?;
        let (tracker, found) = BlockTracker::open(path, disk)?;
        Ok(Some(Arc::new(Tracked { tracker, found })))
    }

    fn wants_state_in_memory(&self, path: &Path, state: &Path, memory: &Path) -> bool {
        let Ok(device) = Device::examine(path) else { return false };
        let holds_state = matches!(keeps_away(&device, path, state), Err(HostError::StateOnDisk { .. }));
        holds_state && is_in_memory(memory)
    }

    fn untrack(&self, disk: DiskId) -> io::Result<()> {
        self.let_go(disk).and(BlockTracker::remove(disk))
    }

    fn fence(&self, _machine: MachineId, disks: &[DiskSpec], fenced: bool) -> io::Result<()> {
        if fenced {
            return disks.iter().try_for_each(|disk| self.keep(disk));
        }
        disks.iter().map(|disk| self.let_go(disk.disk)).fold(Ok(()), Result::and)
    }

    fn trespass(&self, _machine: MachineId, disk: &DiskSpec) -> Option<String> {
        self.keep(disk).err().map(|error| error.to_string())
    }

    /// Its tracker sees what is written.
    fn home(&self, disk: &Arc<ProtectedDisk>) -> io::Result<Box<dyn HomeDisk>> {
        let kept = self.kept.lock().expect("no panic while held");
        let kept =
            kept.get(&disk.identity.disk).ok_or_else(|| io::Error::other("the device is not kept from its machine"))?;
        kept.check_alone().and_then(|()| kept.writer()).map(|writer| Box::new(writer) as _).map_err(io::Error::other)
    }

    fn is_going_home(&self, disk: DiskId) -> bool {
        self.kept.lock().expect("no panic while held").get(&disk).is_some_and(Kept::is_written)
    }

    fn attach(&self, _name: &str, _disk: &Arc<ProtectedDisk>) -> io::Result<Address> {
        Ok(Address::default())
    }

    fn detach(&self, _name: &str) -> io::Result<()> {
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        Ok(())
    }
}

impl HomeDisk for Writer {
    fn put(&self, extent: Extent, data: Option<&[u8]>) -> io::Result<()> {
        match data {
            Some(data) => self.write(extent.offset, data),
            None => self.zero(extent.offset, extent.length),
        }
    }

    fn flush(&self) -> io::Result<()> {
        Writer::flush(self)
    }
}

/// Whether what is written there is on no disk.
fn is_in_memory(folder: &Path) -> bool {
    statfs(existing(folder)).is_ok_and(|found| found.filesystem_type() == TMPFS_MAGIC)
}

/// Where a folder will be made that is not there yet.
fn existing(folder: &Path) -> &Path {
    folder.ancestors().find(|folder| folder.exists()).unwrap_or(folder)
}

/// State on the disk that it is about would change the disk with each change, and wait for ever for a disk that is frozen.
fn keeps_away(device: &Device, path: &Path, state: &Path) -> Result<(), HostError> {
    let number = std::fs::metadata(existing(state)).map_err(|source| HostError::State {
        what: "examine the volume",
        folder: state.to_owned(),
        source,
    })?;
    match device.holds(number.dev()) {
        true => Err(HostError::StateOnDisk { path: path.to_owned(), state: state.to_owned() }),
        false => Ok(()),
    }
}

struct Tracked {
    tracker: BlockTracker,
    found: Found,
}

impl Tracker for Tracked {
    fn witnessed(&self) -> Option<[u8; 16]> {
        match self.found {
            Found::Witness(session) => Some(session),
            Found::New => None,
        }
    }

    fn arm(&self, session: [u8; 16]) {
        self.tracker.arm(session);
    }

    fn is_dirty(&self) -> bool {
        self.tracker.is_dirty()
    }

    fn claim(&self) -> io::Result<()> {
        self.tracker.claim();
        Ok(())
    }

    fn claimed(&self) -> ExtentSet {
        self.tracker.claimed()
    }

    fn release(&self, extents: &ExtentSet) -> io::Result<()> {
        self.tracker.release(extents);
        Ok(())
    }

    fn in_flight(&self) -> io::Result<u64> {
        self.tracker.device().writes_in_flight()
    }

    fn broken(&self) -> Option<String> {
        match self.tracker.witness() {
            Witness::Whole => None,
            Witness::Broken(reason) => Some(reason),
        }
    }

    fn forgive(&self) {
        self.tracker.forgive();
    }

    fn freeze(&self, limit: Duration) -> Result<Option<Box<dyn Frozen>>, FreezeError> {
        let mounted: Vec<PathBuf> = file_systems_on(|device| self.tracker.device().holds(device))
            .map_err(|source| FreezeError::FileSystem { path: "/proc/self/mountinfo".into(), source })?;
        if mounted.is_empty() {
            return Ok(None);
        }
        FileSystemFreezer::freeze(&mounted, limit).map(Some)
    }
}
