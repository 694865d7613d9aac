//! The QEMU tracker: disks of a machine that runs already, by the dirty bitmaps of its QEMU ([`tidemark_qemu`]).
//!
//! *Consistency.* Marks are made at instants that QEMU makes of all disks together ([`Instants`]); what changed up to one is logged as it was then.
//! *Retries.* None here. *Cancellation.* Detaching ends nothing: QEMU goes on marking, so that the next session need not compare. *Crash.* The same.
//!
//! While the machine runs elsewhere its images are kept by a storage daemon of ours ([`tidemark_qemu::keep`]), which is asked in its QEMU's place. How QEMU
//! opened each is noted in files when it is tracked: what is in an image never decides what it is.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tidemark_base::disk::RemoteDisk;
use tidemark_base::storage::{RealStorage, read_file, remove_if_there, replace_file};
use tidemark_base::sync::Mutex;
use tidemark_base::{DiskId, ExtentSet, MachineId};
use tidemark_proto::control::DiskSpec;
use tidemark_qemu::keep::{Image, Keeper};
use tidemark_qemu::machine::Live;
use tidemark_qemu::{Machine, Place, QemuError, Taken};

use super::tracker::{Changes, Instants, Tracker};
use super::{Address, CaptureProvider};
use crate::error::HostError;
use crate::freeze::{FreezeError, Frozen};
use crate::protected::ProtectedDisk;

/// Where QEMU makes sockets and scratch files, in the agent's folder.
const FOLDER: &str = "qemu";
/// An instant holds the machine's writes for a moment: so long apart they are, but for those that somebody asks for.
const REST: Duration = Duration::from_secs(5);
const FORMAT_BYTES_MAX: u64 = 64;
/// What the storage daemon opens as QEMU does.
const FORMATS: [&str; 2] = ["qcow2", "raw"];

pub struct QemuTracker {
    folder: PathBuf,
    /// By how each is asked; a machine goes with its last disk.
    machines: Mutex<BTreeMap<String, Weak<Group>>>,
    disks: Mutex<BTreeMap<DiskId, Arc<Group>>>,
    kept: Mutex<BTreeMap<MachineId, Keeper>>,
}

/// The disks of one QEMU.
struct Group {
    machine: Arc<Machine>,
}

impl QemuTracker {
    /// Makes nothing before a disk is protected.
    pub fn new(state_folder: &Path) -> Self {
        let folder = state_folder.join(FOLDER);
        Self { folder, machines: Mutex::default(), disks: Mutex::default(), kept: Mutex::default() }
    }

    fn group(&self, place: &Place) -> Result<Arc<Group>, QemuError> {
        let name = place.way()?.name();
        let mut machines = self.machines.lock().expect("no panic while held");
        machines.retain(|_, group| group.strong_count() > 0);
        if let Some(group) = machines.get(&name).and_then(Weak::upgrade) {
            return Ok(group);
        }
        let group = Arc::new(Group { machine: Arc::new(Machine::new(&self.folder)) });
        machines.insert(name, Arc::downgrade(&group));
        Ok(group)
    }

    /// Who has the disk already stays the one who asks: QMP sockets take one client.
    fn group_of(&self, disk: DiskId, place: &Place) -> Result<Arc<Group>, QemuError> {
        let known = self.disks.lock().expect("no panic while held").get(&disk).cloned();
        known.map_or_else(|| self.group(place), Ok)
    }

    fn note_format(&self, disk: DiskId, format: &str) -> io::Result<()> {
        let (storage, name) = (RealStorage::create(self.folder.clone())?, format!("{disk}.format"));
        if read_file(&*storage, &name, FORMAT_BYTES_MAX).is_ok_and(|known| known == format.as_bytes()) {
            return Ok(());
        }
        replace_file(&*storage, &name, format.as_bytes())
    }

    fn image(&self, disk: &DiskSpec) -> Result<Image, QemuError> {
        let path = match Place::of(disk.path.as_ref())? {
            Place::Image(path) => path,
            Place::Node { .. } => return Err(QemuError::NotAnImage { path: disk.path.as_str().into() }),
        };
        let storage = RealStorage::open_folder(self.folder.clone());
        let known = read_file(&*storage, &format!("{}.format", disk.disk), FORMAT_BYTES_MAX);
        let format = known.map(|format| String::from_utf8_lossy(&format).into_owned()).unwrap_or_default();
        match FORMATS.contains(&format.as_str()) {
            true => Ok(Image { path, format }),
            false => {
                Err(QemuError::Format { path, format: if format.is_empty() { "unknown".to_owned() } else { format } })
            }
        }
    }

    fn keep(&self, machine: MachineId, disks: &[DiskSpec]) -> Result<(), QemuError> {
        let images = disks.iter().map(|disk| self.image(disk)).collect::<Result<Vec<_>, _>>()?;
        let mut kept = self.kept.lock().expect("no panic while held");
        if kept.get(&machine).is_some_and(|keeper| keeper.images() == images && keeper.is_at_work()) {
            return Ok(());
        }
        self.start_keeper(&mut kept, machine, images)
    }

    /// In the place of one that there was.
    fn start_keeper(
        &self,
        kept: &mut BTreeMap<MachineId, Keeper>,
        machine: MachineId,
        images: Vec<Image>,
    ) -> Result<(), QemuError> {
        kept.remove(&machine);
        kept.insert(machine, Keeper::start(&self.folder.join(format!("kept-{machine}")), images)?);
        Ok(())
    }
}

impl CaptureProvider for QemuTracker {
    fn probe(&self, path: &Path, _state: &Path) -> Result<u64, HostError> {
        let place = Place::of(path)?;
        Ok(self.group(&place)?.machine.probe(&place)?)
    }

    fn track(&self, path: &Path, disk: DiskId, _state: &Path) -> Result<Option<Arc<dyn Tracker>>, HostError> {
        let place = Place::of(path)?;
        let group = self.group_of(disk, &place)?;
        let witnessed = group.machine.track(disk, &place)?;
        if let Some(format) = group.machine.format(disk) {
            self.note_format(disk, &format)
                .map_err(|source| HostError::Io { what: "note the format of an image", source })?;
        }
        let bytes = group.machine.bytes(disk);
        self.disks.lock().expect("no panic while held").insert(disk, group.clone());
        let reader = Arc::new(Live { machine: group.machine.clone(), disk, bytes });
        Ok(Some(Arc::new(Tracked { group, disk, witnessed, reader })))
    }

    fn untrack(&self, disk: DiskId) -> io::Result<()> {
        remove_if_there(&*RealStorage::open_folder(self.folder.clone()), &format!("{disk}.format"))?;
        match self.disks.lock().expect("no panic while held").remove(&disk) {
            Some(group) => Ok(group.machine.untrack(disk)?),
            None => Ok(()),
        }
    }

    fn fence(&self, machine: MachineId, disks: &[DiskSpec], fenced: bool) -> io::Result<()> {
        if fenced {
            return Ok(self.keep(machine, disks)?);
        }
        // Not under the lock: its images are closed.
        let kept = self.kept.lock().expect("no panic while held").remove(&machine);
        drop(kept);
        Ok(())
    }

    fn trespass(&self, machine: MachineId, disk: &DiskSpec) -> Option<String> {
        let mut kept = self.kept.lock().expect("no panic while held");
        match kept.get(&machine) {
            Some(keeper) if keeper.is_at_work() => None,
            Some(keeper) => {
                let images = keeper.images().to_vec();
                self.start_keeper(&mut kept, machine, images).err().map(|error| error.to_string())
            }
            None => Some(format!("nobody keeps {}", disk.path)),
        }
    }

    fn attach(&self, _name: &str, _disk: &Arc<ProtectedDisk>) -> io::Result<Address> {
        Ok(Address::default())
    }

    fn detach(&self, _name: &str) -> io::Result<()> {
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        for (disk, group) in std::mem::take(&mut *self.disks.lock().expect("no panic while held")) {
            group.machine.leave(disk);
        }
        Ok(())
    }
}

struct Tracked {
    group: Arc<Group>,
    disk: DiskId,
    witnessed: Option<[u8; 16]>,
    reader: Arc<Live>,
}

impl Tracker for Tracked {
    fn witnessed(&self) -> Option<[u8; 16]> {
        self.witnessed
    }

    fn arm(&self, session: [u8; 16]) {
        if let Err(error) = self.group.machine.arm(self.disk, session) {
            tracing::warn!(disk = %self.disk, %error, "its bitmaps name no session: the next attach compares");
        }
    }

    fn is_dirty(&self) -> bool {
        self.group.machine.is_dirty(self.disk)
    }

    fn claim(&self) -> io::Result<()> {
        Ok(self.group.machine.claim(self.disk)?)
    }

    fn claimed(&self) -> ExtentSet {
        self.group.machine.claimed(self.disk)
    }

    fn release(&self, _extents: &ExtentSet) -> io::Result<()> {
        Ok(self.group.machine.release(self.disk)?)
    }

    /// A write sets its bit when it ends: what is read meanwhile is read again.
    fn in_flight(&self) -> io::Result<u64> {
        Ok(0)
    }

    fn broken(&self) -> Option<String> {
        self.group.machine.broken(self.disk)
    }

    fn forgive(&self) {
        self.group.machine.forgive(self.disk);
    }

    fn freeze(&self, _limit: Duration) -> Result<Option<Box<dyn Frozen>>, FreezeError> {
        Ok(None)
    }

    fn reader(&self) -> Option<Arc<dyn RemoteDisk>> {
        Some(self.reader.clone())
    }

    fn instants(&self) -> Option<Arc<dyn Instants>> {
        Some(self.group.clone())
    }
}

impl Instants for Group {
    fn take(&self, disks: &[DiskId], bytes_max: u64) -> io::Result<Option<Box<dyn Changes>>> {
        let taken = self.machine.take(disks, bytes_max)?;
        Ok(taken.map(|taken| Box::new(taken) as Box<dyn Changes>))
    }

    fn rest(&self) -> Duration {
        REST
    }
}

impl Changes for Taken {
    fn changed(&self, disk: DiskId) -> ExtentSet {
        Taken::changed(self, disk)
    }

    fn read_at(&self, disk: DiskId, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read(disk, offset, buffer)
    }
}
