//! One disk's replica: journal, base, views and pins under one roof.
//!
//! A folder `replicas/<disk-id>/` with `manifest` and its copy, `segments/` ([`crate::journal`]), `base.raw`, `base.sums` and `fold.pending` ([`crate::fold`]).
//!
//! *Consistency.* What may run at the same time:
//!
//! |  | append | sync | point | thin | fold | view | verify, scrub |
//! |---|---|---|---|---|---|---|---|
//! | **append** | one session; an older one is fenced | yes | yes | yes | yes | yes | yes |
//! | **sync** | yes | one after another | yes | yes | yes | yes | yes |
//! | **point** | yes | yes | machine's lock | machine's lock | yes | yes | yes |
//! | **thin** | yes | yes | machine's lock | one maintenance a machine | before it | pinned points stay | yes |
//! | **fold** | yes | yes | yes | after it | one a replica | stops at the oldest view | yes |
//! | **view** | yes | yes | yes | keeps its point's cut | keeps its segments open | yes | yes |
//! | **verify, scrub** | yes | yes | yes | yes | block by block | yes | yes |
//!
//! Locks, in the order in which they are taken: fold, sync, state. `state` is held for an append (checking and writing at most 1 MiB) and for opening a view (listing layers), never for a
//! sync of the journal or a fold's copying. A view registers its pin under `state`, and a fold declares its target under `state`: neither can slip past the other.
//!
//! *Retries.* Appending is repeated by the host from the last durable cut. A failed store latches until the replica is reopened.
//! *Cancellation.* A session can end anywhere: its incomplete cut is discarded when the next begins. A fold stops between batches.
//! *Crash.* See the journal's and the fold's numbered lists; opening a replica does what they say.

mod compare;
pub mod damage;
mod folding;
pub mod manifest;
mod needs;
mod reading;
mod session;
mod set;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_capture;
#[cfg(test)]
mod tests_changed;
#[cfg(test)]
mod tests_faults;
#[cfg(test)]
mod tests_losses;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;
use tidemark_base::stop::Stop;
use tidemark_base::storage::Storage;
use tidemark_base::sync::{Mutex, MutexGuard};
use tidemark_base::{DiskId, Extent, ExtentSet, Generation, MachineId, Position, Timestamp};

use crate::fold::base::BLOCK_BYTES;
use crate::fold::{self, base::BaseStore};
use crate::journal::merged::{self, MergeError, Merged};
use crate::journal::{
    Commit, Interval, Journal, JournalError, JournalInfo, Limits, OpenReport, Part, ReadError, commit_flags,
};
use crate::points::HeldMark;
use crate::table::Table;
use crate::view::cache::BlockCache;
use crate::view::{Pins, Suspects};
pub use compare::{Comparer, Comparison};
use manifest::{Grown, Manifest};
pub use needs::Needs;
pub use session::{Session, Synced};
pub use set::{FoldOutcome, Maintenance, OpenFailure, Place, ReplicaSet, SetError};

/// How far back opening looks for the kept point before, to count what changed since.
const CHANGED_CUTS_MAX: u64 = 4096;

/// What makes a replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct ReplicaInfo {
    pub disk: DiskId,
    pub machine: MachineId,
    pub generation: Generation,
    pub disk_bytes: u64,
}

/// What a replica holds for good.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct DurableState {
    /// The last durable cut; 0: none.
    pub cut: u64,
    /// Where the host resumes. None when nothing is there, or when cuts were lost and a whole scan is needed.
    pub position: Option<Position>,
    pub time: Timestamp,
    /// The replica is not consistent: a scan has not ended.
    pub scan_open: bool,
    /// Cuts were lost; a scan of the whole disk heals it.
    pub needs_scan: bool,
    /// The last consistent durable cut; 0: none.
    pub consistent_cut: u64,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct Statistics {
    pub journal_bytes: u64,
    pub segments: usize,
    pub base_allocated_bytes: u64,
    pub base_cut: u64,
    pub last_cut: u64,
    pub durable_cut: u64,
    pub views: usize,
    pub inconsistent: Vec<Interval>,
    /// Merged indexes.
    pub indexes: usize,
    /// Bytes of the disk whose newest content is damaged and comes again from the source.
    pub needed_bytes: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    #[error("disk {disk} has no replica here")]
    Absent { disk: DiskId },
    #[error("disk {disk} has a replica here already")]
    Exists { disk: DiskId },
    #[error("disk {disk}: cut {cut} cannot be shown: {what}")]
    NotViewable { disk: DiskId, cut: u64, what: String },
    #[error("disk {disk} is at generation {current}, not {expected}")]
    GenerationMoved { disk: DiskId, expected: Generation, current: Generation },
    #[error("a generation only grows: {from} to {to}")]
    GenerationBack { from: Generation, to: Generation },
    #[error("the replica of disk {disk} has {known} bytes and cannot be made to have {asked}")]
    Size { disk: DiskId, known: u64, asked: u64 },
    #[error("disk {disk}: {what}")]
    Busy { disk: DiskId, what: String },
    #[error("disk {disk}: the replica cannot be read")]
    Read { disk: DiskId, source: ReadError },
    #[error("disk {disk}: the replica cannot be written")]
    Write { disk: DiskId, source: io::Error },
    #[error(
        "disk {disk}: no room to fold: up to {needed_bytes} bytes are needed for a while, {available_bytes} are free"
    )]
    FoldNoRoom { disk: DiskId, needed_bytes: u64, available_bytes: u64 },
    #[error("disk {disk}: indexes cannot be merged")]
    Merge { disk: DiskId, source: MergeError },
    #[error(transparent)]
    Journal(#[from] JournalError),
}

impl ReplicaError {
    pub fn help(&self) -> &'static str {
        match self {
            ReplicaError::Absent { .. } => "protect the disk first, or ask the process server that has it",
            ReplicaError::Exists { .. } => "it is protected already; see `tidemark status`",
            ReplicaError::NotViewable { .. } => "choose a point of `tidemark point list`",
            ReplicaError::GenerationMoved { .. } | ReplicaError::GenerationBack { .. } => {
                "another change of direction came first; look at `tidemark status` and try again"
            }
            ReplicaError::Size { .. } => {
                "a replica only grows, and only from a size that is a multiple of 4096: remove the disk from its machine and add it again; its recovery points stay"
            }
            ReplicaError::Busy { .. } => "stop what uses it, then try again",
            ReplicaError::Read { source, .. } => source.help(),
            ReplicaError::Write { .. } => "check the process server's volume (see its kernel log)",
            ReplicaError::FoldNoRoom { .. } => {
                "free or add room on the process server's volume; everything stays servable, and folding goes on by itself"
            }
            ReplicaError::Merge { .. } => {
                "check the process server's volume (free room, kernel log); reads take longer until then"
            }
            ReplicaError::Journal(error) => error.help(),
        }
    }
}

pub struct Replica {
    disk: DiskId,
    machine: MachineId,
    /// Only grows.
    disk_bytes: AtomicU64,
    storage: Arc<dyn Storage>,
    cache: Arc<BlockCache>,
    base: Arc<BaseStore>,
    pins: Arc<Pins>,
    /// False: nothing of it is changed.
    write: bool,
    open_report: OpenReport,
    /// What was found when the journal was opened again after a failure.
    reopened: Mutex<Vec<String>>,
    damage: Table<damage::Known>,
    suspects: Arc<Suspects>,
    needs: Arc<Needs>,
    appended_bytes: AtomicU64,
    syncing: Mutex<()>,
    folding: Mutex<()>,
    merging: Mutex<()>,
    state: Mutex<State>,
}

struct State {
    journal: Journal,
    manifest: Manifest,
    /// Counts sessions: an older one is fenced.
    session: u64,
    /// Marks of cuts that are not durable yet.
    marks: VecDeque<(u64, HeldMark)>,
    changed_bytes: u64,
    /// Parts of the disk whose newest content is damaged.
    need: ExtentSet,
    /// What the cuts up to here wrote was taken out of it.
    healed_to: u64,
    removed: bool,
}

impl Replica {
    /// Makes the folder of a replica. The manifest comes last: without it there is no replica.
    pub fn create(storage: &dyn Storage, info: &ReplicaInfo) -> io::Result<()> {
        storage.create_folder("segments")?;
        BaseStore::create(storage, info.disk_bytes)?;
        storage.sync_folder("segments")?;
        Manifest::new(info.disk, info.machine, info.disk_bytes, info.generation).store(storage)
    }

    /// Opens a replica: finishes a fold's torn batch, truncates a torn tail, names damage.
    pub fn open(storage: Arc<dyn Storage>, limits: Limits, cache: Arc<BlockCache>) -> Result<Arc<Self>, ReadError> {
        Self::open_with(storage, limits, cache, true)
    }

    /// Opens a replica without changing a byte of it.
    pub fn open_read_only(storage: Arc<dyn Storage>, cache: Arc<BlockCache>) -> Result<Arc<Self>, ReadError> {
        Self::open_with(storage, Limits::default(), cache, false)
    }

    fn open_with(
        storage: Arc<dyn Storage>,
        limits: Limits,
        cache: Arc<BlockCache>,
        write: bool,
    ) -> Result<Arc<Self>, ReadError> {
        if write {
            // A rename that a process before this one did not see the end of, or whose sync failed, is seen to it before it is believed:
            // what the manifest calls folded is removed from the journal below.
            let io = |source| ReadError::Io { file: storage.path("").display().to_string(), source };
            storage.sync_folder("").map_err(io)?;
        }
        let manifest::Loaded { manifest, is_stale, damaged } = Manifest::load(&*storage)?;
        if is_stale
            && write
            && let Err(error) = manifest.store(&*storage)
        {
            tracing::warn!(disk = %manifest.disk, %error, "a manifest's second copy cannot be written again");
        }
        let (disk, disk_bytes) = (manifest.disk, manifest.disk_bytes);
        let mut base = BaseStore::open(&*storage, disk, disk_bytes, write)?;
        fold::recover(&*storage, &manifest, &mut base, write)?;
        let info = JournalInfo { disk, disk_bytes, generation: manifest.generation };
        let tip = (&manifest.base).into();
        let (journal, mut open_report) =
            Journal::open(storage.clone(), info, tip, &manifest.losses, limits, cache.clone(), write)?;
        let (damage, forgotten) = Table::open_or_forget(storage.clone(), damage::NAME).map_err(|error| {
            ReadError::Io { file: storage.path(damage::NAME).display().to_string(), source: io::Error::other(error) }
        })?;
        // What was known to be damaged is found again by the next scrub.
        open_report.rebuilt.extend(damaged.into_iter().chain(forgotten));
        let needs = Needs::new(disk_bytes);
        let need = ExtentSet::from_iter(damage.read(|known: &damage::Known| known.need.clone()));
        needs.ask(need.iter());
        let (marks, session, changed_bytes, removed) = (VecDeque::new(), 0, 0, false);
        let healed_to = journal.durable().cut;
        let mut state = State { journal, session, marks, changed_bytes, need, healed_to, removed, manifest };
        // Only a label for people: damage in the way does not keep a replica closed.
        state.changed_bytes = state.changed_since_point().unwrap_or(0);
        if write && let Err(error) = state.store_losses(&*storage) {
            tracing::warn!(%disk, %error, "what was lost cannot be noted: nothing is taken for the disk until it is");
        }
        Ok(Arc::new(Self {
            disk,
            machine: state.manifest.machine,
            disk_bytes: AtomicU64::new(disk_bytes),
            storage,
            cache,
            base: Arc::new(base),
            pins: Arc::default(),
            write,
            open_report,
            reopened: Mutex::default(),
            damage,
            suspects: Arc::default(),
            needs,
            appended_bytes: AtomicU64::new(0),
            syncing: Mutex::new(()),
            folding: Mutex::new(()),
            merging: Mutex::new(()),
            state: Mutex::new(state),
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }

    fn read_error(&self, source: ReadError) -> ReplicaError {
        ReplicaError::Read { disk: self.disk, source }
    }

    fn write_error(&self, source: io::Error) -> ReplicaError {
        ReplicaError::Write { disk: self.disk, source }
    }

    pub fn disk(&self) -> DiskId {
        self.disk
    }

    pub fn machine(&self) -> MachineId {
        self.machine
    }

    pub fn info(&self) -> ReplicaInfo {
        ReplicaInfo {
            disk: self.disk,
            machine: self.machine,
            generation: self.generation(),
            disk_bytes: self.disk_bytes(),
        }
    }

    pub fn disk_bytes(&self) -> u64 {
        self.disk_bytes.load(Ordering::Acquire)
    }

    /// How large the disk is at a cut: points of before it grew keep their size.
    pub fn bytes_at(&self, cut: u64) -> u64 {
        self.state().manifest.bytes_at(cut)
    }

    /// What opening found: torn tails are normal after a crash, damage is not.
    pub fn open_report(&self) -> &OpenReport {
        &self.open_report
    }

    /// The damage that opening found, this replica or later its journal alone.
    pub fn opening_damage(&self) -> Vec<String> {
        let mut found = self.open_report.damage.clone();
        found.extend(self.reopened.lock().expect("no panic while held").iter().cloned());
        found
    }

    pub fn generation(&self) -> Generation {
        self.state().manifest.generation
    }

    /// What the disk's host is asked for: see [`Needs`].
    pub fn needs(&self) -> &Arc<Needs> {
        &self.needs
    }

    /// Has the host send these blocks again: what is stored of them is damaged. To be asked again after the replica was
    /// opened, for as long as it is.
    pub fn ask_for(&self, extents: impl IntoIterator<Item = Extent>) {
        self.needs.ask(extents);
    }

    fn check_generation(&self, current: Generation, expected: Generation, to: Generation) -> Result<(), ReplicaError> {
        if current != expected {
            return Err(ReplicaError::GenerationMoved { disk: self.disk, expected, current });
        }
        if to <= current {
            return Err(ReplicaError::GenerationBack { from: current, to });
        }
        Ok(())
    }

    /// Moves the generation from `expected` to `to`, durably. Chunks sealed for the old one are refused from now on.
    pub fn advance_generation(&self, expected: Generation, to: Generation) -> Result<(), ReplicaError> {
        let mut state = self.state();
        self.check_generation(state.manifest.generation, expected, to)?;
        state.session += 1;
        let next = Manifest { generation: to, ..state.manifest.clone() };
        next.store(&*self.storage).map_err(|error| self.write_error(error))?;
        state.manifest = next;
        Ok(state.journal.set_generation(to)?)
    }

    /// Grows with its disk, and moves the generation from `expected` to `to`: what was sealed for the smaller disk is refused
    /// from now on. Durable when it returns.
    ///
    /// 1. (by the caller) the cuts that came are durable, so that none of their numbers comes again for the larger disk
    /// 2. the base is longer, and durable; its new end reads as zeroes
    /// 3. the manifest names the new size, and the cut from which it holds
    ///
    /// Crash before 3: opening makes the base as short as the manifest says. After 3: it grew.
    pub fn grow(&self, expected: Generation, to: Generation, disk_bytes: u64) -> Result<(), ReplicaError> {
        let known = self.disk_bytes();
        if disk_bytes < known || !known.is_multiple_of(BLOCK_BYTES) {
            return Err(ReplicaError::Size { disk: self.disk, known, asked: disk_bytes });
        }
        let mut state = self.state();
        self.check_generation(state.manifest.generation, expected, to)?;
        let tip = state.journal.tip().cut;
        if tip != state.journal.durable().cut {
            return Err(ReplicaError::Busy { disk: self.disk, what: "cuts come while it is to grow".to_owned() });
        }
        // Sessions end here: nothing is appended any more.
        state.session += 1;
        self.base.grow(disk_bytes).map_err(|error| self.write_error(error))?;
        let mut next = Manifest { generation: to, disk_bytes, ..state.manifest.clone() };
        next.grown.push(Grown { cut: tip + 1, bytes_before: known });
        next.store(&*self.storage).map_err(|error| self.write_error(error))?;
        state.manifest = next;
        self.disk_bytes.store(disk_bytes, Ordering::Release);
        self.needs.grow(disk_bytes);
        Ok(state.journal.grow(to, disk_bytes)?)
    }

    pub fn durable(&self) -> DurableState {
        self.state().durable()
    }

    /// What was free on the volume when the last thing that came was refused for want of room; none since something
    /// was taken again.
    pub fn lacks_room(&self) -> Option<u64> {
        self.state().journal.lacks_room()
    }

    /// Bytes that came since the replica was opened: how busy it is.
    pub fn appended_bytes(&self) -> u64 {
        self.appended_bytes.load(Ordering::Relaxed)
    }

    /// Why nothing is appended until the replica is opened again; `None`: it works.
    pub fn failure(&self) -> Option<String> {
        self.state().journal.failure().map(str::to_owned)
    }

    pub fn statistics(&self) -> Statistics {
        let base_allocated_bytes = self.base.allocated_bytes().unwrap_or(0);
        let state = self.state();
        Statistics {
            journal_bytes: state.journal.bytes(),
            segments: state.journal.segments(),
            base_allocated_bytes,
            base_cut: state.manifest.base.cut,
            last_cut: state.journal.tip().cut,
            durable_cut: state.journal.durable().cut,
            views: self.pins.count(),
            inconsistent: state.journal.history().intervals().to_vec(),
            indexes: state.journal.merged_indexes().len(),
            needed_bytes: state.need.iter().map(|extent| extent.length).sum(),
        }
    }

    /// Ends every session for good, so that the folder can be removed. Refused while views or pins stand on it.
    pub(crate) fn retire(&self) -> Result<(), ReplicaError> {
        let mut state = self.state();
        let what = match (self.pins.count(), state.manifest.pins.first()) {
            (0, None) => {
                state.removed = true;
                return Ok(());
            }
            (0, Some(pin)) => format!("it is in use by {}", pin.holder),
            (views, _) => format!("{views} views of it are open"),
        };
        Err(ReplicaError::Busy { disk: self.disk, what })
    }
}

/// Indexes.
impl Replica {
    /// Merges indexes until none is due, and replaces damaged ones. Returns how many were made. Blocks for as long as that takes.
    pub fn merge_indexes(&self, stop: &Stop) -> Result<usize, ReplicaError> {
        let _one = self.merging.lock().expect("no panic while held");
        let damaged = self.state().journal.take_damaged_indexes();
        for index in damaged {
            self.storage.remove(&merged::name_of(index.first, index.last)).map_err(|error| self.write_error(error))?;
        }
        let mut made = 0;
        while !stop.is_stopped() {
            let Some(children) = self.state().journal.due_merge() else { break };
            let index = match merged::merge(&*self.storage, self.disk, &children, stop) {
                Ok(index) => index,
                Err(MergeError::Stopped) => break,
                Err(source) => return Err(ReplicaError::Merge { disk: self.disk, source }),
            };
            let (first, last) = (index.first, index.last);
            let mut state = self.state();
            let base = state.manifest.base.cut;
            if state.journal.add_merged(index, base) {
                made += 1;
            } else {
                drop(state);
                // A fold removed its segments meanwhile.
                self.storage.remove(&merged::name_of(first, last)).map_err(|error| self.write_error(error))?;
            }
        }
        Ok(made)
    }

    /// Files that reads found to be damaged since this was last asked.
    pub(crate) fn take_suspects(&self) -> std::collections::BTreeSet<crate::view::Suspect> {
        self.suspects.take()
    }

    pub(crate) fn merged_indexes(&self) -> Vec<Arc<Merged>> {
        self.state().journal.merged_indexes()
    }
}

/// What fold and scrub need of a replica.
impl Replica {
    pub(crate) fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    pub(crate) fn cache(&self) -> &Arc<BlockCache> {
        &self.cache
    }

    pub(crate) fn base(&self) -> &Arc<BaseStore> {
        &self.base
    }

    pub(crate) fn fold_lock(&self) -> &Mutex<()> {
        &self.folding
    }

    pub(crate) fn manifest(&self) -> Manifest {
        self.state().manifest.clone()
    }

    pub(crate) fn parts(&self) -> Vec<Part> {
        self.state().journal.parts().cloned().collect()
    }

    /// The active segment's file and the cuts that it held when this was called.
    pub(crate) fn active(&self) -> Option<crate::scrub::ActiveSegment> {
        let state = self.state();
        let (end, entries, ends) = state.journal.active_content()?;
        let (segment, header, key) = state.journal.active_file()?;
        Some(crate::scrub::ActiveSegment {
            segment: segment.clone(),
            header: header.clone(),
            key: key.clone(),
            end,
            entries,
            ends,
        })
    }

    /// The extents that a cut's own chunks cover; `None` when its index cannot be read.
    pub(crate) fn cut_extents(&self, cut: u64) -> Option<Vec<Extent>> {
        self.state().journal.extents_of(cut).ok()
    }
}

impl State {
    /// What the journal lost is durable before anything follows it.
    fn store_losses(&mut self, storage: &dyn Storage) -> io::Result<()> {
        if self.manifest.losses != self.journal.losses() {
            let next = Manifest { losses: self.journal.losses().to_vec(), ..self.manifest.clone() };
            next.store(storage)?;
            self.manifest = next;
        }
        Ok(())
    }

    fn durable(&self) -> DurableState {
        let (tip, history) = (self.journal.durable(), self.journal.history());
        let needs_scan = history.needs_scan();
        DurableState {
            cut: tip.cut,
            position: tip.position.filter(|_| !needs_scan),
            time: tip.time,
            scan_open: history.open().is_some(),
            needs_scan,
            consistent_cut: history.consistent_at_or_before(tip.cut),
        }
    }

    fn position_of(&self, cut: u64) -> Result<(Option<Position>, Timestamp), ReadError> {
        if cut == self.manifest.base.cut {
            return Ok((self.manifest.base.position, self.manifest.base.time));
        }
        match self.journal.commit(cut) {
            Ok(commit) => Ok(commit.map_or((None, Timestamp(0)), |commit| (Some(commit.end.to), commit.end.time))),
            // The index has its time, and the data is as whole as it proves itself to be: only the position is lost.
            Err(ReadError::Damaged { .. }) => {
                Ok((None, self.journal.commit_entry(cut)?.map_or(Timestamp(0), |entry| entry.time)))
            }
            Err(error) => Err(error),
        }
    }

    fn marked_commit(&self, cut: u64) -> Result<Option<Commit>, ReadError> {
        match self.journal.commit_entry(cut)? {
            Some(entry) if entry.flags & commit_flags::MARK != 0 => self.journal.commit(cut),
            _ => Ok(None),
        }
    }

    /// What was written since the last kept point, as far as the journal's tail says.
    fn changed_since_point(&self) -> Result<u64, ReadError> {
        let (mut changed, tip) = (0u64, self.journal.tip().cut);
        for cut in (self.manifest.base.cut + 1..=tip).rev().take(CHANGED_CUTS_MAX as usize) {
            match self.journal.commit_entry(cut)? {
                Some(entry) if entry.flags & commit_flags::KEEP != 0 => break,
                Some(entry) if entry.commit_at != 0 => {
                    let written_bytes = self.journal.commit(cut)?.map_or(0, |commit| commit.end.written_bytes);
                    changed = changed.saturating_add(written_bytes);
                }
                _ => {}
            }
        }
        Ok(changed)
    }
}
