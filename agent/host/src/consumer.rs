//! One process server that a disk feeds: what it acknowledged, and what must still be read from the disk for it.
//!
//! *Consistency.* {blocks it lacks} ⊆ {records after its cursor} ∪ {its scan bitmap} ∪ {the disk's dirty bitmap}. *Retries.*
//! None. *Cancellation.* A scan that dies keeps its bits. *Crash.* Additions are durable before [`Consumer::add`] returns.
//! The first acknowledgement of an epoch is durable before [`Consumer::acknowledged`] returns: a process server that took
//! something, and of which nothing is remembered, looks like one with another history. Later ones are stored about every second
//! ([`Consumer::store`]); an older cursor of the same epoch only means that more is kept and sent again.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tidemark_base::storage::{OpenMode, Storage, remove_if_there};
use tidemark_base::sync::{Mutex, MutexGuard};
use tidemark_base::time::Instant;
use tidemark_base::{Extent, ExtentSet, Position, ServerId};

use crate::source::{PendingScan, PendingWindow, ScanReason, ScanRevision, WINDOW_EXTENTS_MAX};
use crate::state::dirty::{DirtyBitmap, GRANULE_BYTES};
use crate::state::sealed::SealedFile;

/// Additions that are told apart; older ones are merged, which only means that more of them is scanned twice.
const RECENT_MAX: usize = 16;
/// Parts of granules that were scanned and are remembered; past it they are forgotten and scanned again.
const PARTIAL_MAX: usize = 1 << 16;
/// Extents of one addition; a more scattered one is remembered in coarser pieces, more of which is scanned twice then.
const RECENT_EXTENTS_MAX: usize = 1 << 14;
const COARSE_BYTES: u64 = 64 << 20;
const VERSION: u32 = 2;
const SLOT_BYTES: usize = 4096;

pub struct Consumer {
    server: ServerId,
    storage: Arc<dyn Storage>,
    scan: DirtyBitmap,
    state: Mutex<State>,
}

/// The file `consumer-<server>`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stored {
    pub version: u32,
    pub server: ServerId,
    pub cursor: Option<Position>,
    pub reason: Option<ScanReason>,
    /// The log does not wait for it any more: what was logged after its cursor and up to here is in its scan.
    #[serde(default)]
    pub covered: Option<Position>,
    /// The whole disk was added because somebody asked for it; `kept-<server>` says what is pending for other reasons.
    #[serde(default)]
    pub resync: bool,
}

struct State {
    file: SealedFile<Stored>,
    current: Stored,
    stored: Option<Stored>,
    /// While a resync runs: what is pending for other reasons.
    kept: Option<DirtyBitmap>,
    /// Additions of this run, in whole granules, with the revision that made them.
    recent: Vec<(ScanRevision, ExtentSet)>,
    /// Scanned parts of granules of which the rest is not scanned yet.
    partial: ExtentSet,
    /// What the scan that goes on began with.
    total_bytes: u64,
    asked: Option<Instant>,
    /// Its sender was told to send nothing.
    is_paused: bool,
    /// A stream to it is open.
    is_connected: bool,
}

impl Consumer {
    fn state_file(server: ServerId) -> String {
        format!("consumer-{server}")
    }

    fn scan_file(server: ServerId) -> String {
        format!("scan-{server}")
    }

    /// A consumer that holds nothing yet: the whole disk is to be scanned. Durable when it returns.
    pub fn create(storage: Arc<dyn Storage>, server: ServerId, disk_bytes: u64) -> io::Result<Self> {
        let scan = Self::full_scan(&storage, server, disk_bytes)?;
        let (file, _) = SealedFile::open(storage.clone(), &Self::state_file(server), SLOT_BYTES)?;
        let current = Stored {
            version: VERSION,
            server,
            cursor: None,
            reason: Some(ScanReason::Initial),
            covered: None,
            resync: false,
        };
        let consumer = Self::new(storage, file, scan, current, None, None);
        consumer.store()?;
        Ok(consumer)
    }

    fn kept_file(server: ServerId) -> String {
        format!("kept-{server}")
    }

    fn full_scan(storage: &Arc<dyn Storage>, server: ServerId, disk_bytes: u64) -> io::Result<DirtyBitmap> {
        Self::new_scan(storage, server, disk_bytes, &ExtentSet::from_iter([Extent::new(0, disk_bytes)]))
    }

    /// A bitmap with these bits in the place of the one before. Made aside: a kill before its bits are set would leave an empty
    /// one, which says that nothing is to be scanned.
    fn new_scan(
        storage: &Arc<dyn Storage>,
        server: ServerId,
        disk_bytes: u64,
        pending: &ExtentSet,
    ) -> io::Result<DirtyBitmap> {
        let (name, aside) = (Self::scan_file(server), format!("{}.new", Self::scan_file(server)));
        let file = storage.open(&aside, OpenMode::OpenOrCreate)?;
        file.set_bytes(0)?;
        let scan = DirtyBitmap::create(file, disk_bytes)?;
        pending.iter().for_each(|extent| scan.mark(extent));
        scan.sync()?;
        storage.rename(&aside, &name)?;
        storage.sync_folder("")?;
        Ok(scan)
    }

    /// What an earlier session left; `None` when there is nothing, or nothing that can be trusted. A bitmap that is damaged,
    /// or of a disk of another size, is begun anew with the whole disk in it: what was acknowledged is still known.
    pub fn open(storage: Arc<dyn Storage>, server: ServerId, disk_bytes: u64) -> io::Result<Option<Self>> {
        Self::open_grown(storage, server, disk_bytes, disk_bytes)
    }

    /// The same for a disk that had `known_bytes` when it was left: a scan of that size goes on, and the new end is in it.
    pub fn open_grown(
        storage: Arc<dyn Storage>,
        server: ServerId,
        known_bytes: u64,
        disk_bytes: u64,
    ) -> io::Result<Option<Self>> {
        let name = Self::state_file(server);
        if !storage.exists(&name)? {
            return Ok(None);
        }
        let (file, stored) = SealedFile::<Stored>::open(storage.clone(), &name, SLOT_BYTES)?;
        let Some(stored) = stored.filter(|stored| stored.version == VERSION && stored.server == server) else {
            return Ok(None);
        };
        let mut current = stored.clone();
        let open_scan = |bytes| -> io::Result<Option<DirtyBitmap>> {
            match storage.exists(&Self::scan_file(server))? {
                true => DirtyBitmap::open(storage.open(&Self::scan_file(server), OpenMode::ReadWrite)?, bytes),
                false => Ok(None),
            }
        };
        let before = if known_bytes < disk_bytes { open_scan(known_bytes)? } else { None };
        let scan = match (open_scan(disk_bytes)?, before) {
            (Some(scan), _) => scan,
            (None, Some(before)) => {
                let mut pending = before.extents();
                pending.insert(Extent::new(known_bytes, disk_bytes - known_bytes));
                Self::new_scan(&storage, server, disk_bytes, &pending)?
            }
            (None, None) => {
                // It may hold anything by now: zeroes must be sent as well.
                current.reason = Some(ScanReason::Unclean);
                current.resync = false;
                Self::full_scan(&storage, server, disk_bytes)?
            }
        };
        let kept_file = Self::kept_file(server);
        let kept = match current.resync && storage.exists(&kept_file)? {
            true => DirtyBitmap::open(storage.open(&kept_file, OpenMode::ReadWrite)?, disk_bytes)?,
            false => None,
        };
        // Without it nobody knows what may be taken back.
        current.resync = kept.is_some();
        match (scan.is_empty(), current.reason) {
            (true, _) => current.reason = None,
            (false, None) => current.reason = Some(ScanReason::Unclean),
            (false, Some(_)) => {}
        }
        Ok(Some(Self::new(storage, file, scan, current, Some(stored), kept)))
    }

    fn new(
        storage: Arc<dyn Storage>,
        file: SealedFile<Stored>,
        scan: DirtyBitmap,
        current: Stored,
        stored: Option<Stored>,
        kept: Option<DirtyBitmap>,
    ) -> Self {
        let state = State {
            kept,
            file,
            stored,
            recent: Vec::new(),
            partial: ExtentSet::new(),
            total_bytes: scan.bytes(),
            asked: None,
            is_paused: false,
            is_connected: false,
            current,
        };
        Self { server: state.current.server, storage, scan, state: Mutex::new(state) }
    }

    pub fn server(&self) -> ServerId {
        self.server
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }

    pub fn cursor(&self) -> Option<Position> {
        self.state().current.cursor
    }

    /// The cursor that is certain to survive: logs may go up to it.
    pub fn durable_cursor(&self) -> Option<Position> {
        self.state().stored.as_ref()?.cursor
    }

    /// It holds everything up to `position`. The first position of an epoch is durable when this returns. After an error it is
    /// remembered all the same, and the next [`Self::store`] tries again.
    pub fn acknowledged(&self, position: Position) -> io::Result<()> {
        let mut state = self.state();
        state.current.cursor = Some(position);
        // It is back: the log waits for it again.
        state.current.covered = None;
        state.asked = Some(Instant::now());
        let durable = state.stored.as_ref().and_then(|stored| stored.cursor);
        match durable.is_some_and(|durable| durable.epoch == position.epoch) {
            true => Ok(()),
            false => self.store_locked(&mut state),
        }
    }

    /// Whether it is there: it took something lately or a stream to it is open, and its sender may go on.
    pub fn is_active(&self, within: Duration) -> bool {
        let state = self.state();
        !state.is_paused && (state.is_connected || state.asked.is_some_and(|asked| asked.elapsed() < within))
    }

    pub fn is_connected(&self) -> bool {
        self.state().is_connected
    }

    /// Whether a stream to it is open, as its sender says.
    pub fn set_connected(&self, is_connected: bool) {
        self.state().is_connected = is_connected;
    }

    /// Where the log no longer waits for it; `None` as long as it does.
    pub fn covered(&self) -> Option<Position> {
        self.state().current.covered
    }

    /// What was logged up to `position` was acknowledged or is in its scan, durably. Durable when it returns.
    pub fn cover(&self, position: Position) -> io::Result<()> {
        let mut state = self.state();
        state.current.covered = Some(position);
        self.store_locked(&mut state)
    }

    /// Its sender sends nothing until this is taken back: nobody waits for it.
    pub fn set_paused(&self, is_paused: bool) {
        self.state().is_paused = is_paused;
    }

    /// Everything up to `end` was acknowledged, or what was not is in its scan.
    pub fn has_passed(&self, end: &Position) -> bool {
        let state = self.state();
        state.current.cursor.as_ref() == Some(end) || state.current.reason.is_some()
    }

    /// What it did not acknowledge can be sent as records after its cursor, and leave it consistent.
    pub fn wants_records_of(&self, end: &Position) -> bool {
        let state = self.state();
        let cursor = state.current.cursor.filter(|cursor| cursor.epoch == end.epoch);
        state.current.reason.is_none() && cursor.is_some_and(|cursor| cursor.sequence < end.sequence)
    }

    /// Adds to what must be scanned. Durable when it returns.
    pub fn add(&self, extents: &ExtentSet, reason: ScanReason, revision: ScanRevision) -> io::Result<()> {
        let mut state = self.state();
        let was_empty = self.scan.is_empty();
        let mut added = ExtentSet::new();
        for extent in extents.iter() {
            let offset = extent.offset / GRANULE_BYTES * GRANULE_BYTES;
            added.insert(Extent::new(offset, extent.end().next_multiple_of(GRANULE_BYTES) - offset));
            self.scan.mark(extent);
            if let Some(kept) = state.kept.as_ref().filter(|_| reason != ScanReason::Requested) {
                kept.mark(extent);
            }
        }
        for extent in added.iter() {
            state.partial.remove(extent);
        }
        if added.len() > RECENT_EXTENTS_MAX {
            let coarse = |extent: Extent| {
                let offset = extent.offset / COARSE_BYTES * COARSE_BYTES;
                Extent::new(offset, extent.end().next_multiple_of(COARSE_BYTES) - offset)
            };
            added = added.iter().map(coarse).collect();
        }
        if state.recent.len() >= RECENT_MAX {
            let (_, older) = state.recent.remove(0);
            for extent in older.iter() {
                state.recent[0].1.insert(extent);
            }
        }
        state.recent.push((revision, added));
        state.total_bytes = if was_empty { self.scan.bytes() } else { state.total_bytes.max(self.scan.bytes()) };
        // What the consumer lacks reads as zeroes there only as long as nothing else was ever the matter.
        state.current.reason = match state.current.reason {
            None if self.scan.is_empty() => None,
            before => Some(reason.joined(before)),
        };
        if let Some(kept) = &state.kept {
            kept.sync()?;
        }
        self.scan.sync()?;
        self.store_locked(&mut state)
    }

    /// Adds the whole disk because somebody asked for it. What is pending without that is kept apart first, so that
    /// [`Self::cancel_resync`] can take the rest back. Durable when it returns.
    pub fn resync(&self, disk_bytes: u64, revision: ScanRevision) -> io::Result<()> {
        {
            let mut state = self.state();
            if state.kept.is_none() {
                let file = self.storage.open(&Self::kept_file(self.server), OpenMode::OpenOrCreate)?;
                let kept = DirtyBitmap::create(file, disk_bytes)?;
                self.scan.extents().iter().for_each(|extent| kept.mark(extent));
                kept.sync()?;
                self.storage.sync_folder("")?;
                state.kept = Some(kept);
                state.current.resync = true;
            }
        }
        let whole = ExtentSet::from_iter([Extent::new(0, disk_bytes)]);
        self.add(&whole, ScanReason::Requested, revision)
    }

    /// Takes back what only a resync asked for; how much it was, or `None` when none runs. Durable when it returns.
    /// No bit that stands for anything else is cleared even for a moment: a kill in between leaves more, never less.
    pub fn cancel_resync(&self) -> io::Result<Option<u64>> {
        let mut state = self.state();
        let Some(kept) = state.kept.take() else { return Ok(None) };
        let (before, needed) = (self.scan.bytes(), kept.extents());
        for extent in self.scan.extents().iter() {
            needed.gaps(extent).into_iter().for_each(|gap| self.scan.clear(gap));
        }
        self.scan.sync()?;
        state.current.resync = false;
        state.total_bytes = self.scan.bytes();
        if self.scan.is_empty() {
            state.current.reason = None;
            state.recent.clear();
            state.partial = ExtentSet::new();
        }
        self.store_locked(&mut state)?;
        drop(state);
        self.storage.remove(&Self::kept_file(self.server))?;
        Ok(Some(before - self.scan.bytes()))
    }

    /// Nothing of the disk was ever scanned for it, and it acknowledged no record: what it was sent as records does not
    /// read as zeroes there.
    pub fn holds_nothing(&self) -> bool {
        let state = self.state();
        self.scan.is_full() && state.current.reason == Some(ScanReason::Initial) && state.current.cursor.is_none()
    }

    pub fn pending(&self, newer_than: ScanRevision, revision: ScanRevision) -> PendingScan {
        let mut state = self.state();
        if newer_than >= ScanRevision(1) {
            // Whoever asks for everything may not have reached the consumer yet.
            state.asked = Some(Instant::now());
        }
        // Revision 1 is what the attach found.
        let extents = if newer_than < ScanRevision(1) {
            self.scan.extents()
        } else {
            let disk = self.scan.extents();
            let mut found = ExtentSet::new();
            for (_, added) in state.recent.iter().filter(|(revision, _)| *revision > newer_than) {
                for extent in added.iter() {
                    disk.overlapping(extent).for_each(|extent| found.insert(extent));
                }
            }
            found
        };
        let reason = if extents.is_empty() { None } else { state.current.reason };
        PendingScan { extents, reason, revision }
    }

    /// The same, a stretch at a time.
    pub fn window(&self, newer_than: ScanRevision, from: u64, revision: ScanRevision) -> PendingWindow {
        let mut state = self.state();
        let rest = Extent::new(from, u64::MAX - from);
        let mut extents = ExtentSet::new();
        let mut next = None;
        if newer_than < ScanRevision(1) {
            next = self.scan.runs_within(rest, WINDOW_EXTENTS_MAX, &mut extents);
        } else {
            state.asked = Some(Instant::now());
            let recent = state.recent.iter().filter(|(revision, _)| *revision > newer_than);
            let added: ExtentSet = recent.flat_map(|(_, added)| added.overlapping(rest)).collect();
            for extent in added.iter() {
                next = self.scan.runs_within(extent, WINDOW_EXTENTS_MAX, &mut extents);
                if next.is_some() {
                    break;
                }
            }
        }
        let reason = if extents.is_empty() { None } else { state.current.reason };
        PendingWindow { extents, reason, revision, next }
    }

    /// How much of the disk is marked.
    pub fn scan_bytes(&self) -> u64 {
        self.scan.bytes()
    }

    /// `extent` is durable there as it was read after `seen` was asked for.
    pub fn scanned(&self, extent: Extent, seen: ScanRevision) {
        let mut state = self.state();
        let state = &mut *state;
        state.asked = Some(Instant::now());
        let mut settled = ExtentSet::new();
        settled.insert(extent);
        for (_, added) in state.recent.iter().filter(|(revision, _)| *revision > seen) {
            added.overlapping(extent).for_each(|later| settled.remove(later));
        }
        for extent in settled.iter() {
            state.partial.insert(extent);
        }
        let first = extent.offset / GRANULE_BYTES * GRANULE_BYTES;
        let around = Extent::new(first, extent.end().next_multiple_of(GRANULE_BYTES) - first);
        let runs: Vec<Extent> = state.partial.overlapping(around).collect();
        for run in runs {
            self.scan.clear(run);
            if let Some(kept) = &state.kept {
                kept.clear(run);
            }
            let offset = run.offset.next_multiple_of(GRANULE_BYTES);
            let end = run.end() / GRANULE_BYTES * GRANULE_BYTES;
            if end > offset {
                state.partial.remove(Extent::new(offset, end - offset));
            }
        }
        if state.partial.len() > PARTIAL_MAX {
            state.partial = ExtentSet::new();
        }
        if self.scan.is_empty() {
            state.current.reason = None;
            state.current.resync = false;
            state.kept = None;
            state.recent.clear();
            state.partial = ExtentSet::new();
        }
    }

    /// Stores what is known of it elsewhere from now on.
    #[cfg(test)]
    pub(crate) fn set_storage(&self, storage: Arc<dyn Storage>) {
        self.state().file.set_storage(storage);
    }

    /// Done and total bytes of the scan, and why it runs.
    pub fn progress(&self) -> Option<(u64, u64, ScanReason)> {
        let state = self.state();
        let reason = state.current.reason?;
        let left = self.scan.bytes();
        Some((state.total_bytes.saturating_sub(left), state.total_bytes, reason))
    }

    /// Makes cursor and bitmap durable, if they changed.
    pub fn store(&self) -> io::Result<()> {
        self.store_locked(&mut self.state())
    }

    pub fn sync_scan(&self) -> io::Result<()> {
        self.scan.sync()
    }

    fn store_locked(&self, state: &mut State) -> io::Result<()> {
        if state.stored.as_ref() != Some(&state.current) {
            if state.current.reason.is_none() && state.stored.as_ref().is_some_and(|stored| stored.reason.is_some()) {
                // A scan ended. A power cut that brought its bits back would cost it once more.
                self.scan.sync()?;
            }
            state.file.store(&state.current)?;
            state.stored = Some(state.current.clone());
        }
        Ok(())
    }

    /// Forgets the consumer: its files go.
    pub fn remove(&self) -> io::Result<()> {
        for file in [Self::state_file(self.server), Self::scan_file(self.server), Self::kept_file(self.server)] {
            remove_if_there(&*self.storage, &file)?;
        }
        self.storage.sync_folder("")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemark_base::storage::RealStorage;
    use tidemark_base::{Epoch, Sequence};

    const G: u64 = GRANULE_BYTES;
    const DISK_BYTES: u64 = 64 * G + 4096;

    fn set(extents: &[Extent]) -> ExtentSet {
        extents.iter().fold(ExtentSet::new(), |mut set, extent| {
            set.insert(*extent);
            set
        })
    }

    fn pending(consumer: &Consumer, newer_than: u64) -> Vec<Extent> {
        consumer.pending(ScanRevision(newer_than), ScanRevision(9)).extents.iter().collect()
    }

    #[test]
    fn a_consumer_begins_with_the_whole_disk_and_ends_with_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        let server = ServerId::random();
        let consumer = Consumer::create(storage.clone(), server, DISK_BYTES).unwrap();
        assert_eq!(pending(&consumer, 0), [Extent::new(0, DISK_BYTES)]);
        // In pieces that do not match the granules.
        for offset in (0..DISK_BYTES).step_by(12 << 10) {
            consumer.scanned(Extent::new(offset, (12 << 10).min(DISK_BYTES - offset)), ScanRevision(1));
            if offset == G {
                assert_eq!(consumer.progress().unwrap().0, 0);
            }
        }
        assert_eq!(consumer.progress(), None);
        let position = Epoch::random().start();
        consumer.acknowledged(position).unwrap();
        assert_eq!(consumer.durable_cursor(), Some(position), "the first of an epoch");
        let later = Position { sequence: Sequence(7), ..position };
        consumer.acknowledged(later).unwrap();
        assert_eq!(consumer.durable_cursor(), Some(position), "nobody waits for each of them");
        consumer.store().unwrap();
        assert_eq!(consumer.durable_cursor(), Some(later));
        let position = Epoch::random().start();
        consumer.acknowledged(position).unwrap();
        assert_eq!(consumer.durable_cursor(), Some(position), "the first of another epoch");
        drop(consumer);
        let consumer = Consumer::open(storage.clone(), server, DISK_BYTES).unwrap().unwrap();
        assert_eq!((consumer.cursor(), consumer.progress()), (Some(position), None));
        assert!(Consumer::open(storage, ServerId::random(), DISK_BYTES).unwrap().is_none());
    }

    /// What a resync alone asked for is taken back, at once or after a restart; what was pending before, or became so since,
    /// is not.
    #[test]
    fn a_resync_that_is_cancelled_leaves_what_is_pending_for_another_reason() {
        for restart in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let storage = RealStorage::open_folder(folder.path());
            let server = ServerId::random();
            let mut consumer = Consumer::create(storage.clone(), server, DISK_BYTES).unwrap();
            consumer.scanned(Extent::new(0, DISK_BYTES), ScanRevision(1));
            assert_eq!(consumer.cancel_resync().unwrap(), None, "none runs");
            consumer.add(&set(&[Extent::new(3 * G, 2 * G)]), ScanReason::Dirty, ScanRevision(2)).unwrap();
            consumer.resync(DISK_BYTES, ScanRevision(3)).unwrap();
            assert_eq!(pending(&consumer, 0), [Extent::new(0, DISK_BYTES)]);
            // Asked for again, it is the same one.
            consumer.resync(DISK_BYTES, ScanRevision(4)).unwrap();
            consumer.add(&set(&[Extent::new(60 * G, 5 * G)]), ScanReason::Dirty, ScanRevision(5)).unwrap();
            consumer.scanned(Extent::new(0, 4 * G), ScanRevision(5));
            if restart {
                consumer.store().unwrap();
                drop(consumer);
                consumer = Consumer::open(storage.clone(), server, DISK_BYTES).unwrap().unwrap();
                assert_eq!(consumer.scan_bytes(), 61 * G, "whole granules");
            }
            let left = [Extent::new(4 * G, G), Extent::new(60 * G, DISK_BYTES - 60 * G)];
            let left_bytes: u64 = left.iter().map(|extent| extent.length).sum();
            assert_eq!(consumer.cancel_resync().unwrap(), Some(DISK_BYTES - 4 * G - left_bytes));
            assert_eq!(pending(&consumer, 0), left);
            drop(consumer);
            let consumer = Consumer::open(storage.clone(), server, DISK_BYTES).unwrap().unwrap();
            assert_eq!(pending(&consumer, 0), left);
            consumer.scanned(Extent::new(0, DISK_BYTES), ScanRevision(9));
            // One that nothing else was pending beside ends with nothing to do.
            consumer.resync(DISK_BYTES, ScanRevision(10)).unwrap();
            assert_eq!(consumer.cancel_resync().unwrap(), Some(DISK_BYTES));
            assert_eq!((pending(&consumer, 0), consumer.progress()), (vec![], None));
        }
    }

    /// A stretch at a time it is the same as at once; what was added since is told apart.
    #[test]
    fn stretches_are_what_is_pending() {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        let consumer = Consumer::create(storage, ServerId::random(), DISK_BYTES).unwrap();
        consumer.scanned(Extent::new(0, DISK_BYTES), ScanRevision(1));
        consumer.add(&set(&[Extent::new(3 * G, 512)]), ScanReason::Unclean, ScanRevision(2)).unwrap();
        consumer
            .add(&set(&[Extent::new(9 * G, 2 * G), Extent::new(20 * G, 1)]), ScanReason::Dirty, ScanRevision(3))
            .unwrap();
        for newer_than in 0..4 {
            let mut together = ExtentSet::new();
            let mut from = Some(0);
            while let Some(start) = from {
                let window = consumer.window(ScanRevision(newer_than), start, ScanRevision(9));
                window.extents.iter().for_each(|extent| together.insert(extent));
                from = window.next;
            }
            assert_eq!(together.iter().collect::<Vec<_>>(), pending(&consumer, newer_than), "newer than {newer_than}");
        }
        // What is to be compared stays so, whatever joins it.
        assert_eq!(consumer.window(ScanRevision(0), 0, ScanRevision(9)).reason, Some(ScanReason::Unclean));
        let window = consumer.window(ScanRevision(0), 10 * G, ScanRevision(9));
        assert_eq!(window.extents.iter().next(), Some(Extent::new(10 * G, G)));
        assert_eq!(consumer.scan_bytes(), 4 * G);
    }

    #[test]
    fn what_is_added_after_it_was_read_stays() {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        let consumer = Consumer::create(storage.clone(), ServerId::random(), DISK_BYTES).unwrap();
        consumer.scanned(Extent::new(0, 2 * G), ScanRevision(1));
        consumer.add(&set(&[Extent::new(3 * G + 512, 512)]), ScanReason::Dirty, ScanRevision(2)).unwrap();
        assert_eq!(pending(&consumer, 1), [Extent::new(3 * G, G)]);
        consumer.scanned(Extent::new(0, DISK_BYTES), ScanRevision(1));
        assert_eq!(pending(&consumer, 0), [Extent::new(3 * G, G)]);
        let again = Consumer::open(storage, consumer.server(), DISK_BYTES).unwrap().unwrap();
        assert_eq!(pending(&again, 0), [Extent::new(3 * G, G)]);
        assert_eq!(again.progress().unwrap().2, ScanReason::Dirty, "no longer an initial scan");
        consumer.scanned(Extent::new(3 * G, G), ScanRevision(2));
        assert!(pending(&consumer, 0).is_empty());
    }
}
