//! One machine of this host and those of its disks that are tracked.
//!
//! A file that a running machine writes to can neither be opened nor read. So everything is read from recovery checkpoints: Hyper-V has the machine write elsewhere,
//! at one instant of all its disks, and their files stand still until the checkpoint is made a reference point, which merges what was written since. There is one of ours
//! at a time: an instant makes a new one, after the one before was converted; whoever reads the disks reads the newest, so what is read is at least as new as everything that
//! was logged. One that nobody reads is converted after [`IDLE`], one that a scan reads for longer than [`HELD_MAX`] is replaced, because what is to be merged grows.
//!
//! Resilient change tracking alone gives no instant: what changed *until now* would be read while it changes on. Passes over what changed until one finds nothing,
//! which is how others are settled, cannot be made where nothing can be read beside the machine, and a checkpoint needs none: it is crash-consistent over all disks
//! whatever the machine writes (or application-consistent, where VSS in the machine takes part). Where Hyper-V makes none there is no point, and the alarm of missed points says so.
//!
//! *Consistency.* The change id that is kept is one that a file which stands still names as its own newest: that state, or an older one, so what it tells is enough, or more. It moves on only in
//! [`Machine::release`], after what changed is told by a log, the dirty bitmap or a durable scan bitmap. Whatever Hyper-V cannot tell is a gap: the whole disk is compared, from an id that is durable
//! before that begins. *Retries.* None of what changes something; whoever marks tries again. *Cancellation.* Calls of Hyper-V run to their end or limit. *Crash.* What was made is noted before
//! ([`crate::kept::Ours`]): a checkpoint that is left is converted before the next one is made, and at the start.

mod checkpoints;
mod taken;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use tidemark_base::disk::{Allocation, RemoteDisk};
use tidemark_base::stop::Stop;
use tidemark_base::storage::Storage;
use tidemark_base::sync::{Mutex, MutexGuard, RwLock};
use tidemark_base::{DiskId, Extent, ExtentSet};

use crate::changes::changed_since;
use crate::error::RctError;
use crate::hypervisor::{Found, Hypervisor, Image, is_same_file};
use crate::kept::{Kept, Ours};

pub use taken::Taken;

/// A checkpoint that nobody reads is converted after this.
const IDLE: Duration = Duration::from_secs(5);
/// One that is read for longer is replaced: the more is to be merged, the longer that takes.
const HELD_MAX: Duration = Duration::from_secs(15 * 60);
const KEEPER_INTERVAL: Duration = Duration::from_secs(1);

pub struct Machine {
    hypervisor: Arc<dyn Hypervisor>,
    id: String,
    storage: Arc<dyn Storage>,
    /// How far apart checkpoints are that nobody asks for.
    rest: Duration,
    stop: Stop,
    /// Held while a checkpoint is made or converted: one thing at a time.
    inner: Mutex<Inner>,
    /// Read for as long as the checkpoint is read; written to replace it.
    held: RwLock<Option<Held>>,
    /// Of what is asked all the time, and must not wait for a checkpoint.
    facts: Mutex<BTreeMap<DiskId, Facts>>,
    used: Mutex<Instant>,
    /// Instants that are being read: their checkpoint stays.
    pinned: AtomicUsize,
}

struct Inner {
    /// As people call it.
    name: String,
    ours: Ours,
    disks: BTreeMap<DiskId, Tracked>,
    /// Of the checkpoints that were made since the start.
    count: u64,
    made: Option<Instant>,
    /// Why the last one failed.
    failed: Option<String>,
}

struct Tracked {
    path: PathBuf,
    kept: Kept,
    /// The size that it was attached with: of what lies beyond, whoever attaches it anew reads all.
    bytes: u64,
    /// The newest checkpoint that everything up to is told elsewhere.
    told: u64,
    claimed: Option<Claimed>,
}

struct Claimed {
    areas: ExtentSet,
    until: String,
    /// Of which checkpoint.
    count: u64,
}

#[derive(Default)]
struct Facts {
    bytes: u64,
    claimed: ExtentSet,
    broken: Option<String>,
}

/// A checkpoint of ours, and its files.
struct Held {
    count: u64,
    made: Instant,
    checkpoint: String,
    disks: BTreeMap<DiskId, HeldDisk>,
    is_stale: AtomicBool,
}

struct HeldDisk {
    path: PathBuf,
    bytes: u64,
    uuid: String,
    change_id: String,
    image: Box<dyn Image>,
}

/// What an answer at a checkpoint says of one disk.
struct Answer {
    uuid: String,
    bytes: u64,
    until: String,
    count: u64,
    changed: Result<ExtentSet, String>,
}

impl Machine {
    pub fn new(
        hypervisor: Arc<dyn Hypervisor>,
        id: &str,
        storage: Arc<dyn Storage>,
        rest: Duration,
    ) -> Result<Arc<Self>, RctError> {
        let failed = |source| RctError::Io { what: "read what is kept in", path: storage.path(""), source };
        let ours = Ours::read(&*storage, id).map_err(failed)?;
        let inner = Inner { name: id.to_owned(), ours, disks: BTreeMap::new(), count: 0, made: None, failed: None };
        let this = Arc::new(Self {
            hypervisor,
            id: id.to_owned(),
            storage: storage.clone(),
            rest,
            stop: Stop::new(),
            inner: Mutex::new(inner),
            held: RwLock::new(None),
            facts: Mutex::default(),
            used: Mutex::new(Instant::now()),
            pinned: AtomicUsize::new(0),
        });
        let (weak, stop): (Weak<Self>, _) = (Arc::downgrade(&this), this.stop.clone());
        let keeper = tidemark_base::thread::Builder::new().name("rct-keeper".to_owned()).spawn(move || {
            while !stop.wait_for(KEEPER_INTERVAL) {
                let Some(machine) = weak.upgrade() else { break };
                machine.keep();
            }
        });
        keeper.map_err(|source| RctError::Io { what: "start a thread for", path: storage.path(""), source })?;
        Ok(this)
    }

    pub fn stop(&self) {
        self.stop.stop();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no panic while held")
    }

    fn facts(&self) -> MutexGuard<'_, BTreeMap<DiskId, Facts>> {
        self.facts.lock().expect("no panic while held")
    }

    // ---- disks

    /// Whether a disk can be tracked, and its size. Nothing is changed.
    pub fn probe(&self, path: &Path) -> Result<u64, RctError> {
        let inner = self.lock();
        let found = self.hypervisor.look(&self.id)?;
        self.refuse_others(&found, &inner.ours)?;
        examine(&found, path)
    }

    /// Begins to track a disk, or goes on. Returns the session that its change id is the witness for.
    pub fn track(&self, disk: DiskId, path: &Path) -> Result<Option<[u8; 16]>, RctError> {
        let mut inner = self.lock();
        let found = self.hypervisor.look(&self.id)?;
        inner.name.clone_from(&found.name);
        let bytes = examine(&found, path)?;
        if inner.disks.iter().any(|(id, other)| *id != disk && is_same_file(&other.path, path)) {
            let reason = "it is protected already".to_owned();
            return Err(RctError::Kind { machine: found.name, path: path.to_owned(), reason });
        }
        self.refuse_others(&found, &inner.ours)?;
        let kept = Kept::read(&*self.storage, disk).map_err(|source| self.io_error("read", disk, source))?;
        let kept = kept.filter(|kept| kept.machine == self.id && kept.disk_bytes == bytes);
        let (witnessed, is_new) = (kept.as_ref().and_then(Kept::session), kept.is_none());
        // Until it is known, nothing is.
        let kept = kept.unwrap_or_else(|| Kept::new(disk, &self.id, "", bytes, ""));
        let tracked = Tracked { path: path.to_owned(), kept, bytes, told: 0, claimed: None };
        inner.disks.insert(disk, tracked);
        self.facts().insert(disk, Facts { bytes, ..Facts::default() });
        let begun = match is_new {
            true => self.begin(&mut inner, disk),
            // Left by a kill.
            false => self.clear_leftovers(&mut inner, &found).map(drop),
        };
        if let Err(error) = begun {
            inner.disks.remove(&disk);
            self.facts().remove(&disk);
            return Err(error);
        }
        Ok(witnessed)
    }

    /// The first change id of a disk: everything from here on is told.
    fn begin(&self, inner: &mut Inner, disk: DiskId) -> Result<(), RctError> {
        self.replace(inner, false)?;
        let answer = self.with_held(disk, |held, part| Answer::at(held, part, Ok(ExtentSet::new())))?;
        self.keep_from(inner, disk, &answer)
    }

    /// Everything from this checkpoint on is told.
    fn keep_from(&self, inner: &mut Inner, disk: DiskId, at: &Answer) -> Result<(), RctError> {
        let kept = Kept::new(disk, &self.id, &at.uuid, at.bytes, &at.until);
        kept.store(&*self.storage).map_err(|source| self.io_error("keep", disk, source))?;
        let tracked = inner.disk(disk)?;
        (tracked.kept, tracked.claimed, tracked.told) = (kept, None, at.count);
        if let Some(facts) = self.facts().get_mut(&disk) {
            facts.claimed.clear();
            facts.bytes = at.bytes;
        }
        Ok(())
    }

    /// Nothing more is tracked of a disk. The last one takes the reference points along that are ours; where Hyper-V cannot be asked they stay noted, and
    /// go when a disk of the machine is protected again.
    pub fn untrack(&self, disk: DiskId) -> Result<(), RctError> {
        self.leave(disk);
        Kept::remove(&*self.storage, disk).map_err(|source| self.io_error("remove", disk, source))?;
        let mut inner = self.lock();
        if inner.disks.is_empty()
            && let Err(error) = self.clear_all(&mut inner)
        {
            tracing::warn!(machine = %inner.name, %error, "reference points of ours are left");
        }
        Ok(())
    }

    /// Lets go of a disk that Hyper-V goes on tracking.
    pub fn leave(&self, disk: DiskId) {
        let mut inner = self.lock();
        inner.disks.remove(&disk);
        self.facts().remove(&disk);
        if inner.disks.is_empty()
            && let Err(error) = self.convert_held(&mut inner)
        {
            tracing::warn!(%disk, machine = %inner.name, %error, "a checkpoint is left to the next start");
        }
    }

    /// Everything before is told elsewhere: `session` reads the change id from now on.
    pub fn arm(&self, disk: DiskId, session: [u8; 16]) -> Result<(), RctError> {
        let mut inner = self.lock();
        if self.broken(disk).is_some() {
            return Ok(());
        }
        let tracked = inner.disk(disk)?;
        let mut kept = tracked.kept.clone();
        kept.set_session(Some(session));
        kept.store(&*self.storage).map_err(|source| self.io_error("keep", disk, source))?;
        tracked.kept = kept;
        Ok(())
    }

    pub fn bytes(&self, disk: DiskId) -> u64 {
        self.facts().get(&disk).map_or(0, |facts| facts.bytes)
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

    pub fn rest(&self) -> Duration {
        self.rest
    }

    // ---- what changed

    /// Asks what changed, at the newest checkpoint that it was not asked at, or at a new one. Those are not made more often than [`Machine::rest`].
    pub fn claim(&self, disk: DiskId) -> Result<(), RctError> {
        let mut inner = self.lock();
        self.must_be_whole(disk)?;
        let tracked = inner.disk(disk)?;
        let asked = tracked.claimed.as_ref().map_or(tracked.told, |claimed| claimed.count);
        let newest = self.with_held(disk, |held, _| (held.count, held.is_stale()));
        let is_resting = inner.made.is_some_and(|made| made.elapsed() < self.rest);
        match newest {
            Ok((count, false)) if count > asked => {}
            _ if is_resting => return Ok(()),
            _ => self.replace(&mut inner, false)?,
        }
        self.ask(&mut inner, disk)?;
        self.must_be_whole(disk)
    }

    pub fn claimed(&self, disk: DiskId) -> ExtentSet {
        self.facts().get(&disk).map(|facts| facts.claimed.clone()).unwrap_or_default()
    }

    /// What was claimed is told elsewhere. Of a part of it nothing follows.
    pub fn release(&self, disk: DiskId, extents: &ExtentSet) -> Result<(), RctError> {
        let mut inner = self.lock();
        let tracked = inner.disk(disk)?;
        let Some(claimed) = &tracked.claimed else { return Ok(()) };
        if claimed.areas.iter().any(|area| !extents.gaps(area).is_empty()) {
            return Ok(());
        }
        let (mut kept, told) = (tracked.kept.clone(), claimed.count);
        kept.change_id.clone_from(&claimed.until);
        kept.store(&*self.storage).map_err(|source| self.io_error("keep", disk, source))?;
        (tracked.kept, tracked.claimed, tracked.told) = (kept, None, told);
        if let Some(facts) = self.facts().get_mut(&disk) {
            facts.claimed.clear();
        }
        Ok(())
    }

    fn must_be_whole(&self, disk: DiskId) -> Result<(), RctError> {
        match self.broken(disk) {
            Some(reason) => Err(RctError::Unwitnessed { disk: disk.to_string(), reason }),
            None => Ok(()),
        }
    }

    /// What changed of a disk between the id that is kept and the checkpoint that is there, or that nobody knows.
    fn ask(&self, inner: &mut Inner, disk: DiskId) -> Result<(), RctError> {
        let tracked = inner.disk(disk)?;
        let kept = tracked.kept.clone();
        let answer = self.with_held(disk, |held, part| {
            let gap = match () {
                () if kept.change_id.is_empty() => Some("nothing is kept of it"),
                () if part.uuid != kept.disk_uuid => Some("another disk is in its place"),
                () if part.bytes != kept.disk_bytes => Some("its size was changed"),
                () => None,
            };
            let changed = match gap {
                None => changed_since(&*part.image, &kept.change_id, part.bytes),
                Some(gap) => Err(gap.to_owned()),
            };
            Answer::at(held, part, changed)
        })?;
        let areas = match &answer.changed {
            Ok(areas) => areas.overlapping(Extent::new(0, tracked.bytes)).collect::<ExtentSet>(),
            Err(reason) => {
                self.keep_from(inner, disk, &answer)?;
                if let Some(facts) = self.facts().get_mut(&disk) {
                    facts.broken = Some(reason.clone());
                }
                return Ok(());
            }
        };
        if let Some(facts) = self.facts().get_mut(&disk) {
            facts.claimed = areas.clone();
        }
        tracked.claimed = Some(Claimed { areas, until: answer.until, count: answer.count });
        Ok(())
    }

    fn io_error(&self, what: &'static str, disk: DiskId, source: io::Error) -> RctError {
        RctError::Io { what, path: self.storage.path(&disk.to_string()), source }
    }

    // ---- reading

    fn touch(&self) {
        *self.used.lock().expect("no panic while held") = Instant::now();
    }

    fn with_held<T>(&self, disk: DiskId, look: impl FnOnce(&Held, &HeldDisk) -> T) -> Result<T, RctError> {
        let guard = self.held.read().expect("no panic while held");
        let part = guard.as_ref().and_then(|held| Some((held, held.disks.get(&disk)?)));
        let (held, part) = part.ok_or_else(|| RctError::Unknown { disk: disk.to_string() })?;
        Ok(look(held, part))
    }

    fn read(&self, disk: DiskId, offset: u64, buffer: &mut [u8]) -> Result<(), RctError> {
        loop {
            if let Some(done) = self.read_held(disk, None, offset, buffer) {
                return done;
            }
            let mut inner = self.lock();
            inner.disk(disk)?;
            if !self.with_held(disk, |held, _| self.may_be_read(held)).unwrap_or(false) {
                self.replace(&mut inner, false)?;
            }
        }
    }

    fn may_be_read(&self, held: &Held) -> bool {
        let is_old = held.made.elapsed() > HELD_MAX && self.pinned.load(Ordering::SeqCst) == 0;
        !held.is_stale() && !is_old
    }

    /// `None`: there is no such checkpoint.
    fn read_held(
        &self,
        disk: DiskId,
        count: Option<u64>,
        offset: u64,
        buffer: &mut [u8],
    ) -> Option<Result<(), RctError>> {
        let guard = self.held.read().expect("no panic while held");
        let held = guard.as_ref().filter(|held| match count {
            Some(count) => held.count == count,
            None => self.may_be_read(held),
        })?;
        let part = held.disks.get(&disk)?;
        self.touch();
        let read = part.image.read_at(offset, buffer);
        self.touch();
        if read.is_err() {
            // It may be gone, or its files elsewhere: whoever reads next looks.
            held.is_stale.store(true, Ordering::SeqCst);
        }
        Some(read.map_err(|source| RctError::Read { path: part.path.clone(), source }))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop.stop();
    }
}

/// The size of a disk that can be tracked. While a checkpoint of ours is there, the machine writes to another file.
fn examine(found: &Found, path: &Path) -> Result<u64, RctError> {
    let kind = |reason: &str| {
        let (machine, reason) = (found.name.clone(), reason.to_owned());
        RctError::Kind { machine, path: path.to_owned(), reason }
    };
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default().to_ascii_lowercase();
    match &*ending {
        "vhdx" => {}
        "avhdx" | "avhd" => return Err(kind("it is a checkpoint's")),
        "vhds" => return Err(kind("it is shared by several machines")),
        _ => return Err(kind("Hyper-V tracks changes of VHDX files alone")),
    }
    let is_its = |file: &Path| is_same_file(file, path);
    if let Some(disk) = found.disks.iter().find(|disk| is_its(&disk.path)) {
        return match disk.parent {
            None => Ok(disk.bytes),
            Some(_) => Err(kind("it lies on another disk")),
        };
    }
    // A checkpoint is there: of ours, or of others, who are refused by name.
    let above = found.disks.iter().find(|disk| disk.parent.as_deref().is_some_and(is_its));
    let absent = || RctError::NoDisk { machine: found.name.clone(), path: path.to_owned() };
    above.filter(|_| !found.checkpoints.is_empty()).map(|disk| disk.bytes).ok_or_else(absent)
}

impl Inner {
    fn disk(&mut self, disk: DiskId) -> Result<&mut Tracked, RctError> {
        self.disks.get_mut(&disk).ok_or_else(|| RctError::Unknown { disk: disk.to_string() })
    }
}

impl Held {
    fn is_stale(&self) -> bool {
        self.is_stale.load(Ordering::SeqCst)
    }
}

impl Answer {
    fn at(held: &Held, part: &HeldDisk, changed: Result<ExtentSet, String>) -> Self {
        let (uuid, until) = (part.uuid.clone(), part.change_id.clone());
        Self { uuid, bytes: part.bytes, until, count: held.count, changed }
    }
}

/// A tracked disk as it is read: as it was at the newest checkpoint.
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

    /// What was never written is not told: it is read.
    fn allocation(&self, offset: u64) -> io::Result<(u64, Allocation)> {
        Ok((self.bytes - offset, Allocation::Data))
    }
}
