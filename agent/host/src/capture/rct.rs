//! The RCT tracker: disks of a machine of the Hyper-V host that the agent runs on, by resilient change tracking ([`tidemark_rct`]).
//!
//! *Consistency.* Marks are made at instants that Hyper-V makes of all disks together ([`Instants`]): a recovery checkpoint, which becomes a reference point once what changed up to it was read. What changed
//! is asked for since the instant before, and the change id of that is kept until all of it is told elsewhere. *Retries.* None here. *Cancellation.* Detaching ends nothing: Hyper-V goes
//! on tracking, so that the next session need not compare. *Crash.* The same; the checkpoint that was there is converted at the next start.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tidemark_base::disk::RemoteDisk;
use tidemark_base::storage::{RealStorage, Storage};
use tidemark_base::sync::Mutex;
use tidemark_base::{DiskId, ExtentSet};
use tidemark_rct::kept::Kept;
use tidemark_rct::{Hypervisor, Live, Machine, RctError, Taken};

use super::tracker::{Changes, Instants, Tracker};
use super::{Address, CaptureProvider};
use crate::error::HostError;
use crate::freeze::{FreezeError, Frozen};
use crate::protected::ProtectedDisk;

/// Where change ids are kept, in the agent's folder.
const FOLDER: &str = "rct";
/// Between checkpoints that nobody asks for: each makes the machine stand still for a moment, and is merged afterwards.
pub const REST: Duration = Duration::from_secs(60);

pub struct RctTracker {
    hypervisor: Arc<dyn Hypervisor>,
    state_folder: PathBuf,
    rest: Duration,
    /// A machine goes with its last disk.
    machines: Mutex<BTreeMap<String, Weak<Group>>>,
    disks: Mutex<BTreeMap<DiskId, Arc<Group>>>,
}

/// The disks of one machine.
struct Group {
    machine: Arc<Machine>,
}

impl RctTracker {
    /// Asks nobody before a disk is protected.
    pub fn new(state_folder: &Path, hypervisor: Arc<dyn Hypervisor>, rest: Duration) -> Self {
        Self {
            hypervisor,
            state_folder: state_folder.to_owned(),
            rest,
            machines: Mutex::default(),
            disks: Mutex::default(),
        }
    }

    fn storage(&self) -> Result<Arc<dyn Storage>, HostError> {
        let folder = self.state_folder.join(FOLDER);
        RealStorage::create(folder.clone()).map_err(|source| HostError::State { what: "make a folder", folder, source })
    }

    fn group(&self, id: &str) -> Result<Arc<Group>, HostError> {
        let mut machines = self.machines.lock().expect("no panic while held");
        machines.retain(|_, group| group.strong_count() > 0);
        if let Some(group) = machines.get(id).and_then(Weak::upgrade) {
            return Ok(group);
        }
        let machine = Machine::new(self.hypervisor.clone(), id, self.storage()?, self.rest)?;
        let group = Arc::new(Group { machine });
        machines.insert(id.to_owned(), Arc::downgrade(&group));
        Ok(group)
    }

    fn group_of(&self, path: &Path) -> Result<Arc<Group>, HostError> {
        let found = self.hypervisor.find(path)?;
        self.group(&found.id)
    }

    /// Ends its threads, and lets go of nothing.
    pub(crate) fn halt(&self) {
        let machines = self.machines.lock().expect("no panic while held");
        machines.values().filter_map(Weak::upgrade).for_each(|group| group.machine.stop());
    }
}

impl CaptureProvider for RctTracker {
    fn probe(&self, path: &Path, _state: &Path) -> Result<u64, HostError> {
        Ok(self.group_of(path)?.machine.probe(path)?)
    }

    fn track(&self, path: &Path, disk: DiskId, _state: &Path) -> Result<Option<Arc<dyn Tracker>>, HostError> {
        let group = self.group_of(path)?;
        let witnessed = group.machine.track(disk, path)?;
        let bytes = group.machine.bytes(disk);
        self.disks.lock().expect("no panic while held").insert(disk, group.clone());
        let reader = Arc::new(Live { machine: group.machine.clone(), disk, bytes });
        Ok(Some(Arc::new(Tracked { group, disk, witnessed, reader })))
    }

    fn untrack(&self, disk: DiskId) -> io::Result<()> {
        let group = self.disks.lock().expect("no panic while held").remove(&disk);
        if let Some(group) = group {
            return Ok(group.machine.untrack(disk)?);
        }
        // Of a machine that could not be attached.
        if !self.state_folder.join(FOLDER).exists() {
            return Ok(());
        }
        let storage = self.storage().map_err(io::Error::other)?;
        match Kept::read(&*storage, disk)? {
            Some(kept) => Ok(self.group(&kept.machine).map_err(io::Error::other)?.machine.untrack(disk)?),
            None => Kept::remove(&*storage, disk),
        }
    }

    fn attach(&self, _name: &str, _disk: &Arc<ProtectedDisk>) -> io::Result<Address> {
        Ok(Address::default())
    }

    fn detach(&self, _name: &str) -> io::Result<()> {
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        self.halt();
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
            tracing::warn!(disk = %self.disk, %error, "its change id names no session: the next attach compares");
        }
    }

    /// A machine that runs writes: what changed is known at a checkpoint alone.
    fn is_dirty(&self) -> bool {
        true
    }

    fn claim(&self) -> io::Result<()> {
        Ok(self.group.machine.claim(self.disk)?)
    }

    fn claimed(&self) -> ExtentSet {
        self.group.machine.claimed(self.disk)
    }

    fn release(&self, extents: &ExtentSet) -> io::Result<()> {
        Ok(self.group.machine.release(self.disk, extents)?)
    }

    /// What is claimed was written before a checkpoint, and is read from it or a later one.
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

    /// That is what the tracking is resilient against.
    fn outlives_power_cuts(&self) -> bool {
        true
    }
}

impl Group {
    fn take(&self, disks: &[DiskId], bytes_max: u64, quiet: bool) -> io::Result<Option<Box<dyn Changes>>> {
        let taken = self.machine.take(disks, bytes_max, quiet)?;
        Ok(taken.map(|taken| Box::new(taken) as Box<dyn Changes>))
    }
}

impl Instants for Group {
    fn take(&self, disks: &[DiskId], bytes_max: u64) -> io::Result<Option<Box<dyn Changes>>> {
        Group::take(self, disks, bytes_max, false)
    }

    fn rest(&self) -> Duration {
        self.machine.rest()
    }

    fn makes_quiet(&self) -> bool {
        true
    }

    fn take_quiet(&self, disks: &[DiskId], bytes_max: u64) -> io::Result<Option<Box<dyn Changes>>> {
        Group::take(self, disks, bytes_max, true)
    }
}

impl Changes for Taken {
    fn changed(&self, disk: DiskId) -> ExtentSet {
        Taken::changed(self, disk)
    }

    fn read_at(&self, disk: DiskId, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        Ok(self.read(disk, offset, buffer)?)
    }

    fn still_holds(&self) -> io::Result<()> {
        Ok(Taken::still_holds(self)?)
    }
}

/// What to do about an instant that could not be made.
pub(crate) fn help_within(source: &io::Error) -> Option<&'static str> {
    source.get_ref()?.downcast_ref::<RctError>().map(RctError::help)
}
