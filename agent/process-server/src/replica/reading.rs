//! Looking: views, positions, times and marks of cuts.

use std::sync::Arc;

use tidemark_base::{Bits, Position, Timestamp};

use super::{Replica, ReplicaError};
use crate::journal::{Commit, Source};
use crate::points::{HeldMark, PointDisk};
use crate::view::View;
use crate::view::cache::BlockCache;

impl Replica {
    /// The disk at a cut, read-only and pinned for as long as the view lives. Opening costs the number of segments.
    pub fn view(&self, cut: u64) -> Result<View, ReplicaError> {
        self.view_through(cut, &self.cache)
    }

    /// A view that reads through another cache: what verifies must not believe what was read before.
    pub(crate) fn view_through(&self, cut: u64, cache: &Arc<BlockCache>) -> Result<View, ReplicaError> {
        let not_viewable = |what: String| ReplicaError::NotViewable { disk: self.disk, cut, what };
        let (sources, disk_bytes, at, pin) = {
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
            (sources, state.manifest.bytes_at(cut), (cut, position, time), self.pins.pin(cut))
        };
        let layers = sources.into_iter().map(|source: Source| source.layer(cache)).collect::<Result<_, _>>();
        let layers = layers.map_err(|error| self.read_error(error))?;
        Ok(View::new(layers, disk_bytes, self.base.clone(), cache.clone(), at, pin, self.suspects.clone()))
    }

    /// The disk as it is now, consistent or not: to see what of it can be read.
    pub(super) fn view_now(&self, cache: &Arc<BlockCache>) -> Result<View, ReplicaError> {
        let (sources, disk_bytes, at, pin) = {
            let state = self.state();
            let cut = state.journal.durable().cut.max(state.manifest.floor());
            let sources =
                state.journal.sources(state.manifest.base.cut, cut).map_err(|error| self.read_error(error))?;
            (sources, state.manifest.disk_bytes, (cut, None, Timestamp(0)), self.pins.pin(cut))
        };
        let layers = sources.into_iter().map(|source: Source| source.layer(cache)).collect::<Result<_, _>>();
        let layers = layers.map_err(|error| self.read_error(error))?;
        Ok(View::new(layers, disk_bytes, self.base.clone(), cache.clone(), at, pin, self.suspects.clone()))
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

    /// The parts of 4 KiB of a disk of this size that cuts after `cut` changed; `None` when the journal does not tell of each of
    /// them any more.
    pub fn changed_after(&self, cut: u64, disk_bytes: u64) -> Option<Bits> {
        let (base, end) = {
            let state = self.state();
            (state.manifest.base.cut, state.journal.durable().cut)
        };
        let mut parts = Bits::new(disk_bytes);
        let mut later = (base <= cut).then_some(cut + 1)?;
        while later <= end {
            // The lock is taken for one segment at a time: appends go on.
            let (extents, next) = self.state().journal.changed_from(later, end).ok().flatten()?;
            extents.into_iter().for_each(|extent| _ = parts.insert(extent));
            later = next;
        }
        Some(parts)
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
                marks.push(HeldMark { mark, held, whole: !self.is_touched(cut) });
            }
        }
        (marks, failed)
    }
}
