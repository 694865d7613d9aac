//! The vSphere tracker: disks of a machine that runs on VMware, by changed-block tracking ([`tidemark_vsphere`]).
//!
//! *Consistency.* Marks are made at instants that VMware makes of all disks together ([`Instants`]): a snapshot, which is gone once what changed up to it was read. What changed is
//! asked for since the instant before, and the change id of that is kept until all of it is told elsewhere. *Retries.* None here. *Cancellation.* Detaching ends nothing: VMware goes
//! on tracking, so that the next session need not compare. *Crash.* The same; the snapshot that was there is removed at the next start.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tidemark_base::disk::RemoteDisk;
use tidemark_base::storage::{RealStorage, Storage};
use tidemark_base::sync::Mutex;
use tidemark_base::{DiskId, ExtentSet};
use tidemark_vsphere::address::MachineName;
use tidemark_vsphere::kept::Kept;
use tidemark_vsphere::{DiskAddress, Live, Machine, Session, Taken, settings};

use super::tracker::{Changes, Instants, Tracker};
use super::{Address, CaptureProvider};
use crate::error::HostError;
use crate::freeze::{FreezeError, Frozen};
use crate::protected::ProtectedDisk;

/// Where change ids are kept, in the agent's folder.
const FOLDER: &str = "vsphere";

pub struct VsphereTracker {
    state_folder: PathBuf,
    /// One for each vCenter, ended with its last machine.
    sessions: Mutex<BTreeMap<String, Weak<Session>>>,
    /// A machine goes with its last disk.
    machines: Mutex<BTreeMap<(String, MachineName), Weak<Group>>>,
    disks: Mutex<BTreeMap<DiskId, Arc<Group>>>,
}

/// The disks of one machine.
struct Group {
    machine: Arc<Machine>,
    /// Stopped with the provider.
    session: Arc<Session>,
}

impl VsphereTracker {
    /// Asks nobody before a disk is protected.
    pub fn new(state_folder: &Path) -> Self {
        Self {
            state_folder: state_folder.to_owned(),
            sessions: Mutex::default(),
            machines: Mutex::default(),
            disks: Mutex::default(),
        }
    }

    fn storage(&self) -> Result<Arc<dyn Storage>, HostError> {
        let folder = self.state_folder.join(FOLDER);
        RealStorage::create(folder.clone()).map_err(|source| HostError::State { what: "make a folder", folder, source })
    }

    fn session(&self, connection: &str) -> Arc<Session> {
        let mut sessions = self.sessions.lock().expect("no panic while held");
        sessions.retain(|_, session| session.strong_count() > 0);
        if let Some(session) = sessions.get(connection).and_then(Weak::upgrade) {
            return session;
        }
        let file = self.state_folder.join(settings::FOLDER).join(format!("{connection}.toml"));
        let session = Arc::new(Session::new(&file));
        sessions.insert(connection.to_owned(), Arc::downgrade(&session));
        session
    }

    fn group(&self, address: &DiskAddress) -> Result<Arc<Group>, HostError> {
        let key = (address.connection.clone(), address.machine.clone());
        let mut machines = self.machines.lock().expect("no panic while held");
        machines.retain(|_, group| group.strong_count() > 0);
        if let Some(group) = machines.get(&key).and_then(Weak::upgrade) {
            return Ok(group);
        }
        let session = self.session(&address.connection);
        let machine = Machine::new(session.clone(), address.machine.clone(), self.storage()?)
            .map_err(|source| HostError::Io { what: "start a thread", source })?;
        let group = Arc::new(Group { machine, session });
        machines.insert(key, Arc::downgrade(&group));
        Ok(group)
    }
}

impl CaptureProvider for VsphereTracker {
    fn probe(&self, path: &Path, _state: &Path) -> Result<u64, HostError> {
        let address = DiskAddress::of(path)?;
        Ok(self.group(&address)?.machine.probe(&address)?)
    }

    fn track(&self, path: &Path, disk: DiskId, _state: &Path) -> Result<Option<Arc<dyn Tracker>>, HostError> {
        let address = DiskAddress::of(path)?;
        let group = self.group(&address)?;
        let witnessed = group.machine.track(disk, &address)?;
        let bytes = group.machine.bytes(disk);
        self.disks.lock().expect("no panic while held").insert(disk, group.clone());
        let reader = Arc::new(Live { machine: group.machine.clone(), disk, bytes });
        Ok(Some(Arc::new(Tracked { group, disk, witnessed, reader })))
    }

    fn untrack(&self, disk: DiskId) -> io::Result<()> {
        let group = self.disks.lock().expect("no panic while held").remove(&disk);
        match group {
            Some(group) => Ok(group.machine.untrack(disk)?),
            // Of a machine that could not be attached.
            None if self.state_folder.join(FOLDER).exists() => {
                let storage = self.storage().map_err(io::Error::other)?;
                Kept::remove(&*storage, disk)
            }
            None => Ok(()),
        }
    }

    fn attach(&self, _name: &str, _disk: &Arc<ProtectedDisk>) -> io::Result<Address> {
        Ok(Address::default())
    }

    fn detach(&self, _name: &str) -> io::Result<()> {
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        let disks = std::mem::take(&mut *self.disks.lock().expect("no panic while held"));
        for (disk, group) in &disks {
            group.machine.leave(*disk);
        }
        disks.values().for_each(|group| group.session.stop());
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

    fn is_dirty(&self) -> bool {
        self.group.machine.is_dirty(self.disk)
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

    /// What is claimed was written before a snapshot, and is read from it or a later one.
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

    /// The machine runs elsewhere: a power cut here stops neither it nor what is told of it.
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
