//! One machine of a vCenter and those of its disks that are tracked.
//!
//! Its disks can be read only while there is a snapshot: what the machine writes goes elsewhere then. There is one of ours at a time: an instant makes a new one, after it removed the
//! one before; whoever reads the disks reads the newest, so what is read is at least as new as everything that was logged. A snapshot that nobody reads goes after [`IDLE`], one that a scan
//! reads for longer than [`HELD_MAX`] is replaced, because it grows while it is there.
//!
//! *Consistency.* The change id that is kept moves on only in [`Machine::release`], after what changed is told by a log, the dirty bitmap or a durable scan bitmap. Whatever
//! VMware cannot tell, or says it began to track anew, is a gap: the whole disk is compared, from an id that is durable before that begins. *Retries.* None of what changes
//! something; whoever marks tries again. *Cancellation.* [`Session::stop`] ends what waits. *Crash.* A snapshot that is left is removed before the next one is made, and at the start.

mod snapshots;
mod taken;

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use tidemark_base::disk::{Allocation, RemoteDisk};
use tidemark_base::storage::Storage;
use tidemark_base::sync::{Mutex, MutexGuard, RwLock};
use tidemark_base::{DiskId, Extent, ExtentSet};

use crate::address::{DiskAddress, DiskName, MachineName};
use crate::changes::{ChangeId, Since, query};
use crate::error::VsphereError;
use crate::flat::Flat;
use crate::inventory::{self, Disk, Found};
use crate::kept::Kept;
use crate::session::Session;
use crate::soap::Reference;

pub use taken::Taken;

/// A snapshot that nobody reads is removed after this.
const IDLE: Duration = Duration::from_secs(5);
/// A snapshot that is read for longer is replaced: it grows, and the longer it gets the longer its removal holds the machine up.
const HELD_MAX: Duration = Duration::from_secs(15 * 60);
/// What is found out of a machine that is off counts for so long.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
const KEEPER_INTERVAL: Duration = Duration::from_secs(1);

pub struct Machine {
    session: Arc<Session>,
    name: MachineName,
    storage: Arc<dyn Storage>,
    /// Held while a snapshot is made or removed: one thing at a time.
    inner: Mutex<Inner>,
    /// Read for as long as the snapshot is read; written to replace it.
    held: RwLock<Option<Arc<Held>>>,
    /// Of what is asked all the time, and must not wait for a snapshot.
    facts: Mutex<BTreeMap<DiskId, Facts>>,
    used: Mutex<Instant>,
    /// Instants that are being read: their snapshot stays.
    pinned: AtomicUsize,
}

#[derive(Default)]
struct Inner {
    reference: Option<Reference>,
    disks: BTreeMap<DiskId, Tracked>,
    /// Of the snapshots that were made since the start.
    count: u64,
    made: Option<Instant>,
    /// Why the last one failed.
    failed: Option<String>,
}

struct Tracked {
    name: DiskName,
    kept: Kept,
    /// The size that it was attached with: of what lies beyond, whoever attaches it anew reads all.
    bytes: u64,
    /// What of it was ever written, while it is scanned for the first time.
    allocated: Option<ExtentSet>,
    claimed: Option<Claimed>,
}

struct Claimed {
    areas: ExtentSet,
    until: ChangeId,
    /// Of which snapshot.
    count: u64,
}

struct Facts {
    bytes: u64,
    claimed: ExtentSet,
    broken: Option<String>,
    /// What the machine was after its last instant, where it was off then.
    off: Option<String>,
    looked: Option<(Instant, bool)>,
}

/// A snapshot of ours, and how its disks are read.
struct Held {
    count: u64,
    made: Instant,
    machine: Reference,
    host: String,
    snapshot: Reference,
    disks: BTreeMap<DiskId, HeldDisk>,
    was_off: bool,
    is_stale: std::sync::atomic::AtomicBool,
}

struct HeldDisk {
    key: i64,
    bytes: u64,
    uuid: String,
    change_id: ChangeId,
    flat: Flat,
}

impl Machine {
    pub fn new(session: Arc<Session>, name: MachineName, storage: Arc<dyn Storage>) -> io::Result<Arc<Self>> {
        let this = Arc::new(Self {
            session,
            name,
            storage,
            inner: Mutex::default(),
            held: RwLock::new(None),
            facts: Mutex::default(),
            used: Mutex::new(Instant::now()),
            pinned: AtomicUsize::new(0),
        });
        let (weak, stop): (Weak<Self>, _) = (Arc::downgrade(&this), this.session.stopping().clone());
        tidemark_base::thread::Builder::new().name("vsphere-keeper".to_owned()).spawn(move || {
            while !stop.wait_for(KEEPER_INTERVAL) {
                let Some(machine) = weak.upgrade() else { break };
                machine.keep();
            }
        })?;
        Ok(this)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no panic while held")
    }

    fn facts(&self) -> MutexGuard<'_, BTreeMap<DiskId, Facts>> {
        self.facts.lock().expect("no panic while held")
    }

    fn held(&self) -> Option<Arc<Held>> {
        self.held.read().expect("no panic while held").clone()
    }

    // ---- disks

    /// Whether a disk can be tracked, and its size. Nothing is changed.
    pub fn probe(&self, address: &DiskAddress) -> Result<u64, VsphereError> {
        let reference = inventory::find(&self.session, &self.name)?;
        let found = self.look(&reference)?;
        self.refuse_others(&found, &[])?;
        Ok(self.examine(&found, &address.disk)?.bytes)
    }

    /// Begins to track a disk, or goes on. Returns the session that its change id is the witness for.
    pub fn track(&self, disk: DiskId, address: &DiskAddress) -> Result<Option<[u8; 16]>, VsphereError> {
        let mut inner = self.lock();
        let (_, found) = self.find(&mut inner)?;
        let bytes = self.examine(&found, &address.disk)?.bytes;
        let Disk { uuid, key, .. } = self.examine(&found, &address.disk)?.clone();
        let is_tracked = |(id, other): (&DiskId, &Tracked)| {
            *id != disk && found.disk(&other.name).is_ok_and(|other| other.key == key)
        };
        if inner.disks.iter().any(is_tracked) {
            let (machine, reason) = (found.name.clone(), "it is protected already, by another name".to_owned());
            return Err(VsphereError::Kind { machine, disk: address.disk.to_string(), reason });
        }
        let mut ours: Vec<DiskId> = inner.disks.keys().copied().collect();
        ours.push(disk);
        self.refuse_others(&found, &ours)?;
        let failed = |source| self.io_error("read what is kept of", disk, source);
        let kept = Kept::read(&*self.storage, disk).map_err(failed)?;
        let kept = kept.filter(|kept| {
            found.tracks && kept.machine_uuid == found.uuid && kept.disk_uuid == uuid && kept.disk_bytes == bytes
        });
        // Until it is known, nothing is.
        let none = Kept::new(disk, &found.uuid, &uuid, bytes, &ChangeId { uuid: String::new(), number: 0 });
        let witnessed = kept.as_ref().and_then(Kept::session);
        let is_new = kept.is_none();
        let tracked =
            Tracked { name: address.disk.clone(), kept: kept.unwrap_or(none), bytes, allocated: None, claimed: None };
        inner.disks.insert(disk, tracked);
        let facts = Facts { bytes, claimed: ExtentSet::new(), broken: None, off: None, looked: None };
        self.facts().insert(disk, facts);
        let begun = match is_new {
            true => self.begin(&mut inner, disk),
            // Left by a kill.
            false => self.clear_leftovers(&inner, &found),
        };
        if let Err(error) = begun {
            inner.disks.remove(&disk);
            self.facts().remove(&disk);
            return Err(error);
        }
        Ok(witnessed)
    }

    /// The first change id of a disk: everything from here on is told.
    fn begin(&self, inner: &mut Inner, disk: DiskId) -> Result<(), VsphereError> {
        let held = self.replace(inner, false)?;
        let (found, part) = (self.look(&held.machine)?, held.disk(disk)?);
        let kept = Kept::new(disk, &found.uuid, &part.uuid, part.bytes, &part.change_id);
        kept.store(&*self.storage).map_err(|source| self.io_error("keep the change id of", disk, source))?;
        // Where nothing was ever written there is nothing to read. VMware cannot tell that of every datastore.
        let asked = query(&self.session, &held.machine, &held.snapshot, part.key, part.bytes, Since::Ever);
        let allocated = asked.ok().and_then(Result::ok);
        if let Some(facts) = self.facts().get_mut(&disk) {
            facts.bytes = part.bytes;
        }
        let tracked = inner.disk(disk)?;
        tracked.kept = kept;
        tracked.bytes = part.bytes;
        tracked.allocated = allocated;
        Ok(())
    }

    /// Nothing more is tracked of a disk. Tracking stays on in the machine: others may need it.
    pub fn untrack(&self, disk: DiskId) -> Result<(), VsphereError> {
        self.leave(disk);
        Kept::remove(&*self.storage, disk).map_err(|source| self.io_error("remove what is kept of", disk, source))
    }

    /// Lets go of a disk that VMware goes on tracking.
    pub fn leave(&self, disk: DiskId) {
        let mut inner = self.lock();
        inner.disks.remove(&disk);
        self.facts().remove(&disk);
        if inner.disks.is_empty()
            && let Err(error) = self.remove_held(&inner)
        {
            tracing::warn!(%disk, machine = %self.name, %error, "a snapshot is left to the next start");
        }
    }

    /// Everything before is told elsewhere: `session` reads the change id from now on.
    pub fn arm(&self, disk: DiskId, session: [u8; 16]) -> Result<(), VsphereError> {
        let mut inner = self.lock();
        if self.broken(disk).is_some() {
            return Ok(());
        }
        let tracked = inner.disk(disk)?;
        let mut kept = tracked.kept.clone();
        kept.set_session(Some(session));
        kept.store(&*self.storage).map_err(|source| self.io_error("keep the change id of", disk, source))?;
        tracked.kept = kept;
        Ok(())
    }

    pub fn bytes(&self, disk: DiskId) -> u64 {
        self.facts().get(&disk).map_or(0, |facts| facts.bytes)
    }

    /// Whether something may have changed that was not claimed. A machine that runs writes: what changed is known at a snapshot alone.
    pub fn is_dirty(&self, disk: DiskId) -> bool {
        let off = match self.facts().get(&disk) {
            Some(Facts { broken: None, off: Some(off), looked, .. }) => match looked {
                Some((at, is_same)) if at.elapsed() < LOOK_INTERVAL => return !is_same,
                _ => off.clone(),
            },
            _ => return true,
        };
        let Some(reference) = self.reference_if_free() else { return true };
        let is_same = match self.look(&reference) {
            Ok(found) => found.is_off && found.trace == off,
            Err(error) => {
                tracing::debug!(%disk, %error, "whether it changed is not known");
                false
            }
        };
        if let Some(facts) = self.facts().get_mut(&disk) {
            facts.looked = Some((Instant::now(), is_same));
            if !is_same && facts.off.as_ref() == Some(&off) {
                facts.off = None;
            }
        }
        !is_same
    }

    /// `None` while a snapshot is made or removed.
    fn reference_if_free(&self) -> Option<Reference> {
        self.inner.try_lock().ok()?.reference.clone()
    }

    /// Why something may have been missed.
    pub fn broken(&self, disk: DiskId) -> Option<String> {
        self.facts().get(&disk).and_then(|facts| facts.broken.clone())
    }

    pub fn forgive(&self, disk: DiskId) {
        if let Some(facts) = self.facts().get_mut(&disk) {
            facts.broken = None;
        }
    }

    /// How far apart snapshots are that nobody asks for.
    pub fn rest(&self) -> Duration {
        self.session.interval()
    }

    // ---- what changed

    /// Asks what changed, at the newest snapshot that it was not asked at, or at a new one. Snapshots are not made more often than [`Machine::rest`].
    pub fn claim(&self, disk: DiskId) -> Result<(), VsphereError> {
        let mut inner = self.lock();
        self.must_be_whole(disk)?;
        let asked = inner.disk(disk)?.claimed.as_ref().map(|claimed| claimed.count);
        let held = self.held().filter(|held| held.disks.contains_key(&disk) && !held.is_stale());
        let is_current = held.as_ref().is_some_and(|held| asked == Some(held.count));
        let is_resting = inner.made.is_some_and(|made| made.elapsed() < self.rest());
        let held = match held {
            Some(_) if is_current => return Ok(()),
            Some(held)
                if asked.is_none()
                    && inner.disk(disk)?.kept.change_id().as_ref() != Some(&held.disk(disk)?.change_id) =>
            {
                held
            }
            _ if is_resting => return Ok(()),
            _ => self.replace(&mut inner, false)?,
        };
        self.ask(&mut inner, disk, &held)?;
        self.must_be_whole(disk)
    }

    pub fn claimed(&self, disk: DiskId) -> ExtentSet {
        self.facts().get(&disk).map(|facts| facts.claimed.clone()).unwrap_or_default()
    }

    /// What was claimed is told elsewhere. Of a part of it nothing follows.
    pub fn release(&self, disk: DiskId, extents: &ExtentSet) -> Result<(), VsphereError> {
        let mut inner = self.lock();
        let tracked = inner.disk(disk)?;
        let Some(claimed) = &tracked.claimed else { return Ok(()) };
        if claimed.areas.iter().any(|area| !extents.gaps(area).is_empty()) {
            return Ok(());
        }
        let mut kept = tracked.kept.clone();
        kept.set_change_id(&claimed.until);
        kept.store(&*self.storage).map_err(|source| self.io_error("keep the change id of", disk, source))?;
        tracked.kept = kept;
        tracked.claimed = None;
        if let Some(facts) = self.facts().get_mut(&disk) {
            facts.claimed.clear();
        }
        Ok(())
    }

    fn must_be_whole(&self, disk: DiskId) -> Result<(), VsphereError> {
        match self.broken(disk) {
            Some(reason) => Err(VsphereError::Unwitnessed { disk: disk.to_string(), reason }),
            None => Ok(()),
        }
    }

    /// What changed of a disk between the id that is kept and a snapshot, or that nobody knows.
    fn ask(&self, inner: &mut Inner, disk: DiskId, held: &Held) -> Result<(), VsphereError> {
        let part = held.disk(disk)?;
        let tracked = inner.disk(disk)?;
        let since = tracked.kept.change_id().filter(|since| !since.uuid.is_empty());
        let gap = match &since {
            None => Some("nothing is kept of it".to_owned()),
            Some(_) if part.uuid != tracked.kept.disk_uuid => Some("another disk is in its place".to_owned()),
            Some(_) if part.bytes != tracked.kept.disk_bytes => Some("its size was changed".to_owned()),
            Some(since) => since.gap_until(&part.change_id),
        };
        let changed = match (gap, &since) {
            (None, Some(since)) => {
                query(&self.session, &held.machine, &held.snapshot, part.key, part.bytes, Since::Id(since))?
            }
            (gap, _) => Err(gap.unwrap_or_default()),
        };
        let areas = match changed {
            Ok(areas) => areas.overlapping(Extent::new(0, tracked.bytes)).collect::<ExtentSet>(),
            Err(reason) => return self.break_off(tracked, disk, part, reason),
        };
        if let Some(allocated) = &mut tracked.allocated {
            areas.iter().for_each(|area| allocated.insert(area));
        }
        if let Some(facts) = self.facts().get_mut(&disk) {
            facts.claimed = areas.clone();
            facts.off = None;
        }
        tracked.claimed = Some(Claimed { areas, until: part.change_id.clone(), count: held.count });
        Ok(())
    }

    /// Everything from this snapshot on is told; the whole disk must be read, for what came before.
    fn break_off(
        &self,
        tracked: &mut Tracked,
        disk: DiskId,
        part: &HeldDisk,
        reason: String,
    ) -> Result<(), VsphereError> {
        let kept = Kept::new(disk, &tracked.kept.machine_uuid, &part.uuid, part.bytes, &part.change_id);
        kept.store(&*self.storage).map_err(|source| self.io_error("keep the change id of", disk, source))?;
        tracked.kept = kept;
        tracked.claimed = None;
        // A compare believes nobody.
        tracked.allocated = None;
        if let Some(facts) = self.facts().get_mut(&disk) {
            facts.claimed.clear();
            facts.off = None;
            facts.bytes = part.bytes;
            facts.broken = Some(reason);
        }
        Ok(())
    }

    // ---- the machine

    fn find(&self, inner: &mut Inner) -> Result<(Reference, Found), VsphereError> {
        if let Some(reference) = &inner.reference {
            match self.look(reference) {
                Err(error) if error.is_fault(&["ManagedObjectNotFound"]) => {}
                found => return Ok((reference.clone(), found?)),
            }
        }
        // It was registered anew, or never looked for.
        inner.reference = None;
        let reference = inventory::find(&self.session, &self.name)?;
        let found = self.look(&reference)?;
        inner.reference = Some(reference.clone());
        Ok((reference, found))
    }

    fn look(&self, reference: &Reference) -> Result<Found, VsphereError> {
        match inventory::look(&self.session, reference) {
            Err(error) if error.is_fault(&["ManagedObjectNotFound"]) && matches!(self.name, MachineName::Moref(_)) => {
                Err(inventory::absent(&self.session, &self.name))
            }
            other => other,
        }
    }

    fn examine<'a>(&self, found: &'a Found, name: &DiskName) -> Result<&'a Disk, VsphereError> {
        if !found.can_track {
            let reason = "its virtual hardware is too old".to_owned();
            return Err(VsphereError::NoTracking { machine: found.name.clone(), reason });
        }
        let disk = found.disk(name)?;
        match disk.obstacle() {
            Some(reason) => Err(VsphereError::Kind { machine: found.name.clone(), disk: name.to_string(), reason }),
            None => Ok(disk),
        }
    }

    fn touch(&self) {
        *self.used.lock().expect("no panic while held") = Instant::now();
    }

    /// A snapshot that nobody reads goes.
    fn keep(&self) {
        self.session.keep_alive();
        let is_idle = self.used.lock().expect("no panic while held").elapsed() >= IDLE;
        if !is_idle || self.pinned.load(Ordering::SeqCst) > 0 || self.held().is_none() {
            return;
        }
        let Ok(inner) = self.inner.try_lock() else { return };
        // An instant is made with `inner` held: none began since.
        if self.pinned.load(Ordering::SeqCst) == 0
            && let Err(error) = self.remove_held(&inner)
        {
            tracing::warn!(machine = %self.name, %error, "a snapshot is removed later");
        }
    }

    fn io_error(&self, what: &'static str, disk: DiskId, source: io::Error) -> VsphereError {
        VsphereError::Io { what, path: self.storage.path(&disk.to_string()), source }
    }

    // ---- reading

    fn read(&self, disk: DiskId, offset: u64, buffer: &mut [u8]) -> Result<(), VsphereError> {
        loop {
            if let Some(done) = self.read_held(disk, None, offset, buffer) {
                return done;
            }
            let mut inner = self.lock();
            let fits = |held: &Held| held.disks.contains_key(&disk) && self.may_be_read(held);
            if !self.held().is_some_and(|held| fits(&held)) {
                self.replace(&mut inner, false)?;
            }
        }
    }

    fn may_be_read(&self, held: &Held) -> bool {
        let is_old = held.made.elapsed() > HELD_MAX && self.pinned.load(Ordering::SeqCst) == 0;
        !held.is_stale() && !is_old
    }

    /// `None`: there is no such snapshot.
    fn read_held(
        &self,
        disk: DiskId,
        count: Option<u64>,
        offset: u64,
        buffer: &mut [u8],
    ) -> Option<Result<(), VsphereError>> {
        let guard = self.held.read().expect("no panic while held");
        let held = guard.as_ref().filter(|held| match count {
            Some(count) => held.count == count,
            None => self.may_be_read(held),
        })?;
        let part = held.disks.get(&disk)?;
        self.touch();
        let read = part.flat.read(&self.session, offset, buffer);
        self.touch();
        if read.is_err() {
            // It may be gone, or its files elsewhere: whoever reads next looks.
            held.is_stale.store(true, Ordering::SeqCst);
        }
        Some(read)
    }

    fn allocation(&self, disk: DiskId, offset: u64, disk_bytes: u64) -> (u64, Allocation) {
        const LOOK_BYTES: u64 = 1 << 30;
        let window = Extent::new(offset, (disk_bytes - offset).min(LOOK_BYTES));
        let mut inner = self.lock();
        let Some(allocated) = inner.disks.get_mut(&disk).and_then(|tracked| tracked.allocated.as_ref()) else {
            return (window.length, Allocation::Data);
        };
        match allocated.overlapping(window).next() {
            None => (window.length, Allocation::Hole),
            Some(first) if first.offset > offset => (first.offset - offset, Allocation::Hole),
            Some(first) => (first.length, Allocation::Data),
        }
    }
}

impl Inner {
    fn disk(&mut self, disk: DiskId) -> Result<&mut Tracked, VsphereError> {
        self.disks.get_mut(&disk).ok_or_else(|| VsphereError::Unknown { disk: disk.to_string() })
    }
}

impl Held {
    fn disk(&self, disk: DiskId) -> Result<&HeldDisk, VsphereError> {
        self.disks.get(&disk).ok_or_else(|| VsphereError::Unknown { disk: disk.to_string() })
    }

    fn is_stale(&self) -> bool {
        self.is_stale.load(Ordering::SeqCst)
    }
}

/// A tracked disk as it is read: as it was at the newest snapshot.
pub struct Live {
    pub machine: Arc<Machine>,
    pub disk: DiskId,
    /// When it was attached.
    pub bytes: u64,
}

impl RemoteDisk for Live {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn current_bytes(&self) -> io::Result<u64> {
        Ok(self.machine.bytes(self.disk))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        Ok(self.machine.read(self.disk, offset, buffer)?)
    }

    fn allocation(&self, offset: u64) -> io::Result<(u64, Allocation)> {
        Ok(self.machine.allocation(self.disk, offset, self.bytes))
    }
}
