//! One disk's replica: journal, base, views and pins under one roof.
//!
//! A folder `replicas/<disk-id>/` with `manifest`, `segments/` ([`crate::journal`]), `base.raw`, `base.sums` and `fold.pending` ([`crate::fold`]).
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

pub mod manifest;
mod needs;
mod set;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use serde::Serialize;
use tidemark_base::storage::Storage;
use tidemark_base::sync::{Mutex, MutexGuard};
use tidemark_base::{DiskId, Extent, Generation, MachineId, Position, Timestamp};
use tidemark_proto::replication::CutEnd;

use crate::fold::{self, base::BaseStore};
use crate::journal::{
    Commit, Interval, Journal, JournalError, JournalInfo, Limits, OpenReport, Part, ReadError, Source, commit_flags,
};
use crate::points::{HeldMark, PointDisk};
use crate::view::cache::BlockCache;
use crate::view::{Pins, View};
use manifest::{Manifest, Pin};
pub use needs::Needs;
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

/// What a sync brought about.
#[derive(Clone, Debug)]
pub struct Synced {
    pub durable: DurableState,
    /// Marks that this disk now holds, for the machine's [`crate::points::PointStore`].
    pub marks: Vec<HeldMark>,
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
    #[error("disk {disk}: {what}")]
    Busy { disk: DiskId, what: String },
    #[error("disk {disk}: the replica cannot be read")]
    Read { disk: DiskId, source: ReadError },
    #[error("disk {disk}: the replica cannot be written")]
    Write { disk: DiskId, source: io::Error },
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
            ReplicaError::Busy { .. } => "stop what uses it, then try again",
            ReplicaError::Read { source, .. } => source.help(),
            ReplicaError::Write { .. } => "check the process server's volume (see its kernel log)",
            ReplicaError::Journal(error) => error.help(),
        }
    }
}

pub struct Replica {
    disk: DiskId,
    machine: MachineId,
    disk_bytes: u64,
    storage: Arc<dyn Storage>,
    cache: Arc<BlockCache>,
    base: Arc<BaseStore>,
    pins: Arc<Pins>,
    open_report: OpenReport,
    needs: Arc<Needs>,
    syncing: Mutex<()>,
    folding: Mutex<()>,
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
    removed: bool,
}

/// One stream's right to append. A newer session of the disk takes it away.
pub struct Session {
    replica: Arc<Replica>,
    number: u64,
}

impl Session {
    pub fn replica(&self) -> &Arc<Replica> {
        &self.replica
    }

    fn state(&self) -> Result<MutexGuard<'_, State>, JournalError> {
        let state = self.replica.state();
        if state.session != self.number || state.removed {
            return Err(JournalError::Fenced { disk: self.replica.disk });
        }
        Ok(state)
    }

    /// Appends chunks of the cut after the last one; every chunk is verified first, and none is kept if one fails.
    pub fn append_chunks(&self, cut: u64, chunks: &[u8]) -> Result<(), JournalError> {
        self.state()?.journal.append_chunks(cut, chunks)
    }

    /// Ends a cut. It exists from now on, and is durable after the next [`Replica::sync`].
    pub fn end_cut(&self, end: &CutEnd) -> Result<(), JournalError> {
        let mut state = self.state()?;
        let needs = &self.replica.needs;
        let came = if needs.is_empty() { Vec::new() } else { state.journal.open_extents() };
        state.journal.end_cut(end)?;
        came.into_iter().for_each(|extent| needs.came(extent));
        state.changed_bytes += end.written_bytes;
        if let Some(mark) = &end.mark {
            let changed_bytes = state.changed_bytes;
            if mark.keep {
                state.changed_bytes = 0;
            }
            let held = PointDisk { disk: self.replica.disk, cut: end.cut.0, position: end.to, changed_bytes };
            state.marks.push_back((end.cut.0, HeldMark { mark: mark.clone(), held }));
        }
        Ok(())
    }

    pub fn sync(&self) -> Result<Synced, JournalError> {
        drop(self.state()?);
        self.replica.sync()
    }
}

impl Drop for Session {
    /// The cut that did not end is gone, unless a newer session has begun.
    fn drop(&mut self) {
        if let Ok(mut state) = self.state() {
            // A failure latches in the journal, and the next session says so.
            let _ = state.journal.discard_open();
        }
    }
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
        let manifest = Manifest::load(&*storage)?;
        let (disk, disk_bytes) = (manifest.disk, manifest.disk_bytes);
        let mut base = BaseStore::open(&*storage, disk, disk_bytes, write)?;
        fold::recover(&*storage, &manifest, &mut base, write)?;
        let info = JournalInfo { disk, disk_bytes, generation: manifest.generation };
        let tip = (&manifest.base).into();
        let (journal, open_report) = Journal::open(storage.clone(), info, tip, limits, cache.clone(), write)?;
        let mut state =
            State { journal, session: 0, marks: VecDeque::new(), changed_bytes: 0, removed: false, manifest };
        // Only a label for people: damage in the way does not keep a replica closed.
        state.changed_bytes = state.changed_since_point().unwrap_or(0);
        Ok(Arc::new(Self {
            disk,
            machine: state.manifest.machine,
            disk_bytes,
            storage,
            cache,
            base: Arc::new(base),
            pins: Arc::default(),
            open_report,
            needs: Needs::new(disk_bytes),
            syncing: Mutex::new(()),
            folding: Mutex::new(()),
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
            disk_bytes: self.disk_bytes,
        }
    }

    pub fn disk_bytes(&self) -> u64 {
        self.disk_bytes
    }

    /// What opening found: torn tails are normal after a crash, damage is not.
    pub fn open_report(&self) -> &OpenReport {
        &self.open_report
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

    /// Moves the generation from `expected` to `to`, durably. Chunks sealed for the old one are refused from now on.
    pub fn advance_generation(&self, expected: Generation, to: Generation) -> Result<(), ReplicaError> {
        let mut state = self.state();
        let current = state.manifest.generation;
        if current != expected {
            return Err(ReplicaError::GenerationMoved { disk: self.disk, expected, current });
        }
        if to <= current {
            return Err(ReplicaError::GenerationBack { from: current, to });
        }
        state.session += 1;
        let next = Manifest { generation: to, ..state.manifest.clone() };
        next.store(&*self.storage).map_err(|error| self.write_error(error))?;
        state.manifest = next;
        Ok(state.journal.set_generation(to)?)
    }

    /// Begins a session for a host that says this generation and size; fences the session before it and discards its incomplete cut.
    pub fn begin_session(self: &Arc<Self>, generation: Generation, disk_bytes: u64) -> Result<Session, JournalError> {
        let mut state = self.state();
        let current = state.manifest.generation;
        if state.removed {
            return Err(JournalError::Fenced { disk: self.disk });
        }
        if generation != current {
            return Err(JournalError::Generation { disk: self.disk, asked: generation, current });
        }
        if disk_bytes != self.disk_bytes {
            return Err(JournalError::SizeChanged { disk: self.disk, known: self.disk_bytes, asked: disk_bytes });
        }
        state.journal.discard_open()?;
        state.session += 1;
        Ok(Session { number: state.session, replica: self.clone() })
    }

    /// Makes every committed cut durable: one `fdatasync` for all that waited.
    pub fn sync(&self) -> Result<Synced, JournalError> {
        let _one = self.syncing.lock().expect("no panic while held");
        let handle = self.state().journal.begin_sync()?;
        let outcome = handle.sync();
        let mut state = self.state();
        state.journal.finish_sync(handle, outcome)?;
        let durable = state.durable();
        let mut marks = Vec::new();
        while let Some((cut, _)) = state.marks.front() {
            if *cut > durable.cut {
                break;
            }
            let (cut, mark) = state.marks.pop_front().expect("just seen");
            if state.journal.history().is_consistent(cut) {
                marks.push(mark);
            }
        }
        Ok(Synced { durable, marks })
    }

    pub fn durable(&self) -> DurableState {
        self.state().durable()
    }

    /// The disk at a cut, read-only and pinned for as long as the view lives. Opening costs the number of segments.
    pub fn view(&self, cut: u64) -> Result<View, ReplicaError> {
        self.view_through(cut, &self.cache)
    }

    /// A view that reads through another cache: what verifies must not believe what was read before.
    pub(crate) fn view_through(&self, cut: u64, cache: &Arc<BlockCache>) -> Result<View, ReplicaError> {
        let not_viewable = |what: String| ReplicaError::NotViewable { disk: self.disk, cut, what };
        let (sources, at, pin) = {
            let state = self.state();
            let (floor, durable) = (state.manifest.floor(), state.journal.durable().cut);
            if cut < floor || cut > durable || cut == 0 {
                return Err(not_viewable(format!("the replica holds cuts {} to {durable}", floor.max(1))));
            }
            if let Some(interval) = state.journal.history().interval(cut) {
                let why = if interval.damaged { "cuts before it were lost" } else { "a scan was under way" };
                return Err(not_viewable(why.to_owned()));
            }
            let sources =
                state.journal.sources(state.manifest.base.cut, cut).map_err(|error| self.read_error(error))?;
            let (position, time) = state.position_of(cut).map_err(|error| self.read_error(error))?;
            (sources, (cut, position, time), self.pins.pin(cut))
        };
        let layers = sources.into_iter().map(|source: Source| source.layer(cache)).collect::<Result<_, _>>();
        let layers = layers.map_err(|error| self.read_error(error))?;
        Ok(View::new(layers, self.base.clone(), cache.clone(), at, pin))
    }

    /// The last consistent durable cut at or before `time` that is still there; `None`: all are later.
    pub fn cut_at(&self, time: Timestamp) -> Result<Option<u64>, ReplicaError> {
        let state = self.state();
        let floor = state.manifest.floor();
        let cut = match state.journal.last_cut_at(time).map_err(|error| self.read_error(error))? {
            Some(cut) => cut.min(state.journal.durable().cut),
            None if state.manifest.base.time <= time => state.manifest.base.cut,
            None => return Ok(None),
        };
        let cut = state.journal.history().consistent_at_or_before(cut);
        Ok((cut >= floor && cut > 0).then_some(cut))
    }

    /// The commit record of a cut; `None` when it was folded away or lost.
    pub fn commit(&self, cut: u64) -> Result<Option<Commit>, ReplicaError> {
        self.state().journal.commit(cut).map_err(|error| self.read_error(error))
    }

    /// Position and time of a cut that can be viewed.
    pub fn position_of(&self, cut: u64) -> Result<(Option<Position>, Timestamp), ReplicaError> {
        self.state().position_of(cut).map_err(|error| self.read_error(error))
    }

    /// Whether a point's cut is what the journal holds under this number, as far as that can be told: a journal whose
    /// end was lost gives its numbers to other cuts.
    pub(crate) fn may_hold(&self, held: &PointDisk) -> bool {
        let state = self.state();
        if held.cut > state.journal.durable().cut || !state.journal.history().is_consistent(held.cut) {
            return false;
        }
        // A cut that cannot be read says so when it is opened.
        !matches!(state.position_of(held.cut), Ok((Some(position), _)) if position != held.position)
    }

    /// The oldest cut that can still be viewed, unless it is not consistent.
    pub fn floor(&self) -> u64 {
        self.state().manifest.floor()
    }

    /// Marks of durable, consistent cuts after `cut`, found in the journal's index: what a point store may have missed.
    /// Those that cannot be read are left out: the first failure is told, and how many cuts it was.
    pub fn marks_after(&self, cut: u64) -> (Vec<HeldMark>, Option<(ReplicaError, u64)>) {
        let (mut cut, end) = {
            let state = self.state();
            (cut.max(state.manifest.floor()), state.journal.durable().cut)
        };
        let mut marks = Vec::new();
        let mut failed: Option<(ReplicaError, u64)> = None;
        while cut < end {
            cut += 1;
            // The lock is taken for one cut at a time: appends go on.
            let state = self.state();
            if !state.journal.history().is_consistent(cut) {
                continue;
            }
            let found = match state.marked_commit(cut) {
                Ok(found) => found,
                Err(error) => {
                    failed.get_or_insert_with(|| (self.read_error(error), 0)).1 += 1;
                    continue;
                }
            };
            if let Some(commit) = found
                && let Some(mark) = commit.end.mark
            {
                let held = PointDisk {
                    disk: self.disk,
                    cut,
                    position: commit.end.to,
                    changed_bytes: commit.end.written_bytes,
                };
                marks.push(HeldMark { mark, held });
            }
        }
        (marks, failed)
    }

    /// Holds a cut against folding until [`Replica::unpin`], across restarts.
    pub fn pin(&self, holder: &str, cut: u64, now: Timestamp) -> Result<(), ReplicaError> {
        let mut state = self.state();
        if cut < state.manifest.floor() {
            let what = format!("the replica begins at cut {}", state.manifest.floor());
            return Err(ReplicaError::NotViewable { disk: self.disk, cut, what });
        }
        let mut next = state.manifest.clone();
        next.pins.retain(|pin| pin.holder != holder);
        next.pins.push(Pin { holder: holder.to_owned(), cut, since: now });
        self.store_pins(&mut state, next)
    }

    /// A volume without room keeps nobody from what is on it: pins are kept in memory then, and are durable with the next
    /// manifest that can be stored. Nothing folds past them meanwhile; whoever holds one across a restart pins again.
    fn store_pins(&self, state: &mut State, next: Manifest) -> Result<(), ReplicaError> {
        match next.store(&*self.storage) {
            Err(error) if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
                tracing::warn!(disk = %self.disk, %error, "no room to make pins durable");
            }
            outcome => outcome.map_err(|error| self.write_error(error))?,
        }
        state.manifest = next;
        Ok(())
    }

    /// Gives a holder's pin back; one that is not there is fine.
    pub fn unpin(&self, holder: &str) -> Result<(), ReplicaError> {
        let mut state = self.state();
        let mut next = state.manifest.clone();
        next.pins.retain(|pin| pin.holder != holder);
        match next.pins.len() != state.manifest.pins.len() {
            true => self.store_pins(&mut state, next),
            false => Ok(()),
        }
    }

    /// Gives back the pins of everything whose name begins so.
    pub fn unpin_all(&self, prefixes: &[&str]) -> Result<(), ReplicaError> {
        let stale = self.durable_pins().into_iter().map(|pin| pin.holder);
        let stale: Vec<String> =
            stale.filter(|holder| prefixes.iter().any(|prefix| holder.starts_with(prefix))).collect();
        stale.iter().try_for_each(|holder| self.unpin(holder))
    }

    pub fn durable_pins(&self) -> Vec<Pin> {
        self.state().manifest.pins.clone()
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
        let (end, extents) = state.journal.active_end()?;
        let (segment, header, key) = state.journal.active_file()?;
        Some(crate::scrub::ActiveSegment {
            segment: segment.clone(),
            header: header.clone(),
            key: key.clone(),
            end,
            extents,
        })
    }

    /// The extents that a cut's own chunks cover; `None` when its index cannot be read.
    pub(crate) fn cut_extents(&self, cut: u64) -> Option<Vec<Extent>> {
        self.state().journal.extents_of(cut).ok()
    }

    /// The oldest cut that a pin or an open view stands on.
    pub(crate) fn oldest_pin(&self) -> Option<u64> {
        let state = self.state();
        let durable = state.manifest.pins.iter().map(|pin| pin.cut).min();
        durable.into_iter().chain(self.pins.oldest()).min()
    }

    /// Every cut that a durable pin or an open view stands on.
    pub(crate) fn pinned_cuts(&self) -> Vec<u64> {
        let mut cuts: Vec<u64> = self.state().manifest.pins.iter().map(|pin| pin.cut).collect();
        cuts.extend(self.pins.cuts());
        cuts
    }

    /// What covers the cuts of a fold that was begun; nothing when none was.
    pub(crate) fn fold_sources(&self) -> Result<Vec<Source>, ReplicaError> {
        let state = self.state();
        let Some(fold_to) = state.manifest.fold_to else { return Ok(Vec::new()) };
        state.journal.sources(state.manifest.base.cut, fold_to).map_err(|error| self.read_error(error))
    }

    /// The newest consistent durable cut at or before `cut`.
    pub(crate) fn consistent_at_or_before(&self, cut: u64) -> u64 {
        let state = self.state();
        state.journal.history().consistent_at_or_before(cut.min(state.journal.durable().cut))
    }

    /// Declares a fold to `target`, durably: no older view opens from now on. The target is lowered to the oldest pin; `None`: nothing to do.
    pub(crate) fn declare_fold(&self, target: u64) -> Result<Option<(u64, Vec<Source>)>, ReplicaError> {
        let mut state = self.state();
        let pinned = state.manifest.pins.iter().map(|pin| pin.cut).chain(self.pins.oldest()).min();
        // A fold that was begun is finished first, to where it was declared.
        let target = state.manifest.fold_to.unwrap_or_else(|| pinned.map_or(target, |pinned| pinned.min(target)));
        if state.journal.durable().cut < target {
            let what = format!("it ends at cut {}, a fold to {target} was begun", state.journal.durable().cut);
            return Err(self.read_error(ReadError::damaged(self.storage.path("segments").display().to_string(), what)));
        }
        if target <= state.manifest.base.cut {
            return Ok(None);
        }
        let sources = state.journal.sources(state.manifest.base.cut, target).map_err(|error| self.read_error(error))?;
        if state.manifest.fold_to != Some(target) {
            let next = Manifest { fold_to: Some(target), ..state.manifest.clone() };
            next.store(&*self.storage).map_err(|error| self.write_error(error))?;
            state.manifest = next;
        }
        Ok(Some((target, sources)))
    }

    /// The base is at `target`: records that, then removes the segments that nothing needs any more.
    pub(crate) fn finish_fold(&self, target: u64) -> Result<(), ReplicaError> {
        let mut state = self.state();
        let commit = state.journal.commit(target).map_err(|error| self.read_error(error))?;
        let Some(commit) = commit else {
            return Err(self.read_error(ReadError::damaged("segments", format!("cut {target} has no commit record"))));
        };
        let base = crate::journal::Tip {
            cut: target,
            position: Some(commit.end.to),
            time: commit.end.time,
            commit: commit.hash,
        };
        let next = Manifest { base: base.into(), fold_to: None, ..state.manifest.clone() };
        next.store(&*self.storage).map_err(|error| self.write_error(error))?;
        state.manifest = next;
        state.journal.drop_up_to(target).map_err(|error| self.write_error(error))
    }
}

impl State {
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
        let commit = self.journal.commit(cut)?;
        Ok(commit.map_or((None, Timestamp(0)), |commit| (Some(commit.end.to), commit.end.time)))
    }

    fn marked_commit(&self, cut: u64) -> Result<Option<Commit>, ReadError> {
        match self.journal.commit_entry(cut)? {
            Some(entry) if entry.flags & commit_flags::MARK != 0 => self.journal.commit(cut),
            _ => Ok(None),
        }
    }

    /// What was written since the last kept point, as far as the journal's tail says.
    fn changed_since_point(&self) -> Result<u64, ReadError> {
        let (mut changed, tip) = (0, self.journal.tip().cut);
        for cut in (self.manifest.base.cut + 1..=tip).rev().take(CHANGED_CUTS_MAX as usize) {
            match self.journal.commit_entry(cut)? {
                Some(entry) if entry.flags & commit_flags::KEEP != 0 => break,
                Some(entry) if entry.commit_at != 0 => {
                    changed += self.journal.commit(cut)?.map_or(0, |commit| commit.end.written_bytes);
                }
                _ => {}
            }
        }
        Ok(changed)
    }
}
