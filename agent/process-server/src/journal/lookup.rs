//! Finding data, commits and times again.

use std::sync::Arc;

use tidemark_base::{Extent, ExtentMap, Timestamp};

use super::error::ReadError;
use super::index::{self, Entry, Place, SegmentFile, flatten};
use super::merged::{Child, Levels, Merged, MergedLayer};
use super::sealed::{Sealed, read_commit};
use super::segment::Commit;
use super::{Journal, Part};
use crate::view::cache::BlockCache;

/// A part of the disk, and where its data is.
#[derive(Clone, Copy)]
pub struct Found<'a> {
    pub extent: Extent,
    pub place: Place,
    pub segment: &'a Arc<SegmentFile>,
}

/// What one index contributes to the disk at some cut.
#[derive(Clone)]
pub enum Layer {
    /// All of a segment.
    Whole(Arc<Sealed>),
    /// All of many segments.
    Merged(MergedLayer),
    /// A segment's cuts up to one.
    Front { segment: Arc<SegmentFile>, map: Arc<ExtentMap<Place>> },
}

impl Layer {
    /// The parts of `within` that this layer covers, in order.
    pub fn overlapping<'a>(
        &'a self,
        within: Extent,
        cache: &BlockCache,
        found: &mut dyn FnMut(Found<'a>),
    ) -> Result<(), ReadError> {
        match self {
            Layer::Whole(sealed) => sealed.overlapping(within, cache, &mut |extent, place| {
                found(Found { extent, place, segment: &sealed.segment });
            }),
            Layer::Merged(merged) => merged.overlapping(within, cache, found),
            Layer::Front { map, segment } => {
                map.overlapping(within).for_each(|(extent, place)| found(Found { extent, place, segment }));
                Ok(())
            }
        }
    }

    /// The first part at or after `offset` that this layer covers.
    pub fn next(&self, offset: u64, cache: &BlockCache) -> Result<Option<(Extent, Place)>, ReadError> {
        match self {
            Layer::Whole(sealed) => sealed.next(offset, cache),
            Layer::Merged(merged) => merged.next(offset, cache),
            Layer::Front { map, .. } => Ok(map.overlapping(Extent::new(offset, u64::MAX - offset)).next()),
        }
    }
}

/// A layer that is still to be made, outside of the journal's lock.
pub enum Source {
    Layer(Layer),
    Front(Arc<Sealed>, u64),
    Entries(Arc<SegmentFile>, Vec<Entry>),
}

impl Source {
    pub fn layer(self, cache: &BlockCache) -> Result<Layer, ReadError> {
        Ok(match self {
            Source::Layer(layer) => layer,
            Source::Front(sealed, cut) => {
                let map = Arc::new(flatten(&sealed.entries_up_to(cut, cache)?));
                Layer::Front { segment: sealed.segment.clone(), map }
            }
            Source::Entries(segment, entries) => Layer::Front { segment, map: Arc::new(flatten(&entries)) },
        })
    }
}

impl Journal {
    /// The layers of the disk at `cut`, newest first; those at or before `base` are in the base.
    pub fn sources(&self, base: u64, cut: u64) -> Result<Vec<Source>, ReadError> {
        let mut sources = Vec::new();
        if let Some(active) = self.active.as_ref().filter(|active| active.header.first_cut <= cut) {
            let index = (cut - active.header.first_cut) as usize;
            let end = active.commits.get(index).map_or(0, |commit| commit.log_end);
            sources.push(Source::Entries(active.segment.clone(), active.entries[..end as usize].to_vec()));
        }
        let mut count = self.parts.partition_point(|part| part.first() <= cut);
        while let Some(part) = count.checked_sub(1).map(|last| &self.parts[last]).filter(|part| part.last() > base) {
            count -= 1;
            match part {
                Part::Sealed(sealed) if sealed.last_cut <= cut => {
                    match self.levels.ending_at(sealed.last_cut, &self.parts) {
                        Some(merged) => {
                            // Everything that it speaks for is asked by asking it.
                            count = self.parts.partition_point(|part| part.first() < merged.index.first);
                            sources.push(Source::Layer(Layer::Merged(merged)));
                        }
                        None => sources.push(Source::Layer(Layer::Whole(sealed.clone()))),
                    }
                }
                Part::Sealed(sealed) => sources.push(Source::Front(sealed.clone(), cut)),
                // A scan that ended after the damage wrote every block again, so nothing older is needed.
                Part::Broken { last, .. } if *last < cut => {}
                Part::Broken { what, .. } => {
                    return Err(ReadError::damaged(self.storage.path("segments").display().to_string(), what));
                }
            }
        }
        Ok(sources)
    }

    /// The commit record of a cut; `None` when the journal does not hold it (any more), or it was lost.
    pub fn commit(&self, cut: u64) -> Result<Option<Commit>, ReadError> {
        if let Some(active) = self.active.as_ref().filter(|active| active.header.first_cut <= cut) {
            let entry = active.commits.get((cut - active.header.first_cut) as usize);
            return match entry {
                Some(entry) if entry.commit_at != 0 => {
                    read_commit(&active.segment, &active.frame_key, entry.commit_at, cut).map(Some)
                }
                _ => Ok(None),
            };
        }
        match self.part_of(cut) {
            Some(Part::Sealed(sealed)) => sealed.commit(cut, &self.cache),
            _ => Ok(None),
        }
    }

    /// The extents that a cut's own chunks cover.
    pub fn extents_of(&self, cut: u64) -> Result<Vec<Extent>, ReadError> {
        let start = |first: u64| -> Result<u64, ReadError> {
            let before = if cut > first { self.commit_entry(cut - 1)? } else { None };
            Ok(before.map_or(0, |entry| entry.log_end))
        };
        let extents = |entries: &[Entry]| entries.iter().map(|entry| entry.extent).collect();
        if let Some(active) = self.active.as_ref().filter(|active| active.header.first_cut <= cut) {
            let end = self.commit_entry(cut)?.map_or(0, |entry| entry.log_end);
            return Ok(extents(&active.entries[start(active.header.first_cut)? as usize..end as usize]));
        }
        match self.part_of(cut) {
            Some(Part::Sealed(sealed)) => {
                let entries = sealed.entries_up_to(cut, &self.cache)?;
                Ok(extents(&entries[start(sealed.first_cut())? as usize..]))
            }
            _ => Ok(Vec::new()),
        }
    }

    /// What `cut` and the cuts after it changed, up to the end of their segment and to `last`, and the cut behind it. `None`: the
    /// journal does not hold them.
    pub fn changed_from(&self, cut: u64, last: u64) -> Result<Option<(Vec<Extent>, u64)>, ReadError> {
        let start = |first: u64| -> Result<usize, ReadError> {
            let before = if cut > first { self.commit_entry(cut - 1)? } else { None };
            Ok(before.map_or(0, |entry| entry.log_end as usize))
        };
        let extents = |entries: &[Entry]| entries.iter().map(|entry| entry.extent).collect();
        if let Some(active) = self.active.as_ref().filter(|active| active.header.first_cut <= cut) {
            let Some(end) = self.commit_entry(last)? else { return Ok(None) };
            let entries = active.entries.get(start(active.header.first_cut)?..end.log_end as usize);
            return Ok(entries.map(|entries| (extents(entries), last + 1)));
        }
        let Some(part) = self.part_of(cut) else { return Ok(None) };
        let Part::Sealed(sealed) = part else { return Ok(None) };
        let until = part.last().min(last);
        let entries = sealed.entries_up_to(until, &self.cache)?;
        let entries = entries.get(start(sealed.first_cut())?..);
        Ok(entries.map(|entries| (extents(entries), until + 1)))
    }

    fn part_of(&self, cut: u64) -> Option<&Part> {
        let index = self.parts.partition_point(|part| part.first() <= cut);
        self.parts.get(index.checked_sub(1)?).filter(|part| cut <= part.last())
    }

    /// What the index says of a cut.
    pub fn commit_entry(&self, cut: u64) -> Result<Option<index::CommitEntry>, ReadError> {
        if let Some(active) = self.active.as_ref().filter(|active| active.header.first_cut <= cut) {
            return Ok(active.commits.get((cut - active.header.first_cut) as usize).copied());
        }
        match self.part_of(cut) {
            Some(Part::Sealed(sealed)) => sealed.commit_entry(cut, &self.cache).map(Some),
            _ => Ok(None),
        }
    }

    /// The last cut at or before `time`; `None` when all that the journal holds are later.
    pub fn last_cut_at(&self, time: Timestamp) -> Result<Option<u64>, ReadError> {
        if let Some(active) = &self.active {
            let index = active.commits.partition_point(|commit| commit.time <= time);
            if index > 0 {
                return Ok(Some(active.header.first_cut + index as u64 - 1));
            }
        }
        for part in self.parts.iter().rev() {
            if let Part::Sealed(sealed) = part
                && let Some(cut) = sealed.last_cut_at(time, &self.cache)?
            {
                return Ok(Some(cut));
            }
        }
        Ok(None)
    }

    /// The next neighbours whose indexes become one, if there are any.
    pub fn due_merge(&self) -> Option<Vec<Child>> {
        self.levels.due(&self.parts)
    }

    /// Takes a new merged index; false when what it was made of is not there any more.
    pub fn add_merged(&mut self, index: Merged, base: u64) -> bool {
        let fits = index.last > base && Levels::fits(&index, &self.parts, base);
        if fits {
            self.levels.insert(Arc::new(index));
        }
        fits
    }

    pub fn merged_indexes(&self) -> Vec<Arc<Merged>> {
        self.levels.iter().cloned().collect()
    }

    /// Takes out the merged indexes that a read found to be damaged. Views that hold one pass it by.
    pub fn take_damaged_indexes(&mut self) -> Vec<Arc<Merged>> {
        let damaged = self.levels.damaged();
        for index in &damaged {
            self.levels.remove(index.first, index.last);
        }
        damaged
    }
}
