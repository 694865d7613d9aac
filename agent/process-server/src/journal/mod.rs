#![doc = include_str!("FORMAT.md")]

mod active;
mod error;
mod history;
mod index;
mod lookup;
pub mod merged;
mod open;
mod recovery;
mod sealed;
mod segment;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use tidemark_base::storage::{Storage, StorageFile, os_error};
use tidemark_base::{DiskId, FRAME_BYTES_MAX, Generation, Position, Timestamp};

use crate::view::cache::BlockCache;
pub use active::verify_chunks;
use active::{Active, OpenCut, SealError};
pub use error::{JournalError, ReadError};
pub use history::{History, Interval, Loss};
pub use index::{Entry, Place, SegmentFile, commit_flags, flatten};
pub use lookup::{Found, Layer, Source};
use merged::Levels;
pub use recovery::{DamagedCut, Inspection, inspect};
pub use sealed::{Boundary, BoundaryKind, Sealed, read_commit, unreadable};
pub use segment::{
    Commit, FRAME_HEADER_BYTES, Fields, Frame, FrameKey, FrameKind, HEADER_BYTES, Header, SegmentName, body_sum,
    decode_commit,
};
use tidemark_proto::control::VOLUME_RESERVE_BYTES;
use tidemark_proto::replication::{CutEnd, CutKind, LABEL_BYTES_MAX, MARK_DISKS_MAX};

/// How far a host's clock may be ahead of this one's: one hour.
const CLOCK_AHEAD_MAX_NS: u64 = 3_600_000_000_000;

/// When a segment is sealed, and how much one cut may hold. Bounds memory: an extent of the active segment is 40 bytes.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub segment_bytes: u64,
    pub segment_extents: usize,
    pub segment_cuts: usize,
    /// More extents than this in one cut are refused; the host cuts earlier.
    pub cut_extents_max: usize,
    /// Appending stops while less than this is free, so that folding and sealing still can.
    pub reserve_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            segment_bytes: 256 << 20,
            segment_extents: 64 << 10,
            segment_cuts: 64 << 10,
            cut_extents_max: 4 << 20,
            reserve_bytes: VOLUME_RESERVE_BYTES,
        }
    }
}

/// Which disk a journal is of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct JournalInfo {
    pub disk: DiskId,
    pub disk_bytes: u64,
    pub generation: Generation,
}

/// The end of the last cut.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tip {
    pub cut: u64,
    pub position: Option<Position>,
    pub time: Timestamp,
    /// The hash of its commit record.
    pub commit: [u8; 32],
}

impl Default for Tip {
    fn default() -> Self {
        Self { cut: 0, position: None, time: Timestamp(0), commit: [0; 32] }
    }
}

/// A stretch of the journal that is on disk for good.
#[derive(Clone)]
pub enum Part {
    Sealed(Arc<Sealed>),
    /// Missing, or its header, footer or directory is destroyed: none of its cuts can be read.
    Broken {
        first: u64,
        last: u64,
        what: String,
    },
}

impl Part {
    pub fn first(&self) -> u64 {
        match self {
            Part::Sealed(sealed) => sealed.first_cut(),
            Part::Broken { first, .. } => *first,
        }
    }

    pub fn last(&self) -> u64 {
        match self {
            Part::Sealed(sealed) => sealed.last_cut,
            Part::Broken { last, .. } => *last,
        }
    }
}

/// What opening found.
#[derive(Default, Debug, Clone, serde::Serialize)]
pub struct OpenReport {
    /// Bytes behind the last whole cut, truncated.
    pub torn_bytes: u64,
    pub damage: Vec<String>,
    /// Merged indexes that were damaged or do not fit: removed, and made again.
    pub rebuilt: Vec<String>,
}

/// Appends cuts and finds them again. One lock around it (`Replica`'s); only [`SyncHandle::sync`] runs outside.
pub struct Journal {
    storage: Arc<dyn Storage>,
    info: JournalInfo,
    limits: Limits,
    cache: Arc<BlockCache>,
    parts: VecDeque<Part>,
    levels: Levels,
    active: Option<Active>,
    tip: Tip,
    durable: Tip,
    history: History,
    losses: Vec<Loss>,
    /// See [`Journal::take_mended`].
    mended: Vec<(String, String)>,
    failed: Option<String>,
    /// What was free when the volume last had no room for what came; none since something was appended again.
    no_room: Option<u64>,
    /// What must have been free for what was refused.
    needs_room: u64,
    /// The active segment ends with the cut that is open.
    end_soon: bool,
    /// Counts openings: a sync that began before the last one says nothing about it.
    opened: u64,
}

/// Makes what was appended durable, outside of the lock.
pub struct SyncHandle {
    file: Option<Arc<dyn StorageFile>>,
    tip: Tip,
    /// The end of the last commit in the file.
    end: u64,
    opened: u64,
}

impl SyncHandle {
    pub fn sync(&self) -> io::Result<()> {
        if tidemark_base::sabotage::is("journal-sync") {
            return Ok(());
        }
        self.file.as_ref().map_or(Ok(()), |file| file.sync())
    }
}

impl Journal {
    pub fn info(&self) -> &JournalInfo {
        &self.info
    }

    pub fn tip(&self) -> &Tip {
        &self.tip
    }

    pub fn durable(&self) -> &Tip {
        &self.durable
    }

    pub fn history(&self) -> &History {
        &self.history
    }

    /// What was lost and is still felt.
    pub fn losses(&self) -> &[Loss] {
        &self.losses
    }

    /// What will still be felt of it when the base is at `base`.
    pub fn losses_after(&self, base: u64) -> Vec<Loss> {
        self.losses.iter().filter(|loss| self.history.is_felt(loss, base)).copied().collect()
    }

    pub fn parts(&self) -> impl Iterator<Item = &Part> {
        self.parts.iter()
    }

    pub fn active_file(&self) -> Option<(&Arc<SegmentFile>, &Header, &FrameKey)> {
        self.active.as_ref().map(|active| (&active.segment, &active.header, &active.frame_key))
    }

    /// Chunks came whose cut has not ended.
    pub fn has_open_cut(&self) -> bool {
        self.active.as_ref().is_some_and(|active| active.open.is_some())
    }

    /// The end of the active segment's last commit, its extents, and how many of them each cut ends with.
    pub fn active_content(&self) -> Option<(u64, Vec<Entry>, Vec<u64>)> {
        let active = self.active.as_ref()?;
        let ends = active.commits.iter().map(|commit| commit.log_end).collect();
        Some((active.data_end, active.entries.clone(), ends))
    }

    pub fn segments(&self) -> usize {
        self.parts.len() + usize::from(self.active.is_some())
    }

    /// Bytes of all segments.
    pub fn bytes(&self) -> u64 {
        let sealed = self.parts.iter().map(|part| match part {
            Part::Sealed(sealed) => sealed.file_bytes,
            Part::Broken { .. } => 0,
        });
        sealed.sum::<u64>() + self.active.as_ref().map_or(0, |active| active.data_end)
    }

    fn store_failed(&mut self, error: io::Error) -> JournalError {
        self.failed = Some(error.to_string());
        JournalError::StoreFailed { disk: self.info.disk, source: Some(error) }
    }

    /// A full volume refuses and loses nothing; every other failure of a write latches.
    fn write_failed(&mut self, error: io::Error) -> JournalError {
        match os_error(&error) {
            Some(libc::ENOSPC | libc::EDQUOT) => {
                self.needs_room = 0;
                self.no_room(0)
            }
            _ => self.store_failed(error),
        }
    }

    fn no_room(&mut self, available_bytes: u64) -> JournalError {
        self.no_room = Some(available_bytes);
        let place = self.storage.path("segments").display().to_string();
        JournalError::NoRoom { disk: self.info.disk, place, available_bytes }
    }

    /// The failure that latched, if one did.
    pub fn failure(&self) -> Option<&str> {
        self.failed.as_deref()
    }

    /// Whether what was refused for want of room would still be: its host need not send it to hear that again.
    pub fn check_room(&mut self) -> Result<(), JournalError> {
        let available = self.storage.available_bytes().unwrap_or(u64::MAX);
        match self.no_room {
            Some(_) if available < self.needs_room => Err(self.no_room(available)),
            _ => Ok(()),
        }
    }

    /// What was free when the last thing that came was refused for want of room.
    pub fn lacks_room(&self) -> Option<u64> {
        self.no_room
    }

    fn check_usable(&self) -> Result<(), JournalError> {
        match &self.failed {
            None => Ok(()),
            Some(earlier) => Err(JournalError::StoreFailed {
                disk: self.info.disk,
                source: Some(io::Error::other(format!("it failed before: {earlier}"))),
            }),
        }
    }

    /// Drops the cut that was not committed.
    pub fn discard_open(&mut self) -> Result<(), JournalError> {
        self.check_usable()?;
        match self.active.as_mut().map_or(Ok(()), Active::discard_open) {
            Ok(()) => Ok(()),
            Err(error) => Err(self.store_failed(error)),
        }
    }

    /// Ends a segment of an older generation: its key opens no chunk of this one. It is there after a crash, or a full
    /// volume, in the middle of [`Journal::set_generation`].
    fn leave_generation(&mut self) -> Result<(), JournalError> {
        match &self.active {
            Some(active) if active.header.generation == self.info.generation => Ok(()),
            Some(active) if !active.commits.is_empty() => match self.seal() {
                Ok(()) => Ok(()),
                Err(SealError::Unsealed(error)) => Err(self.write_failed(error)),
                Err(SealError::Failed(error)) => Err(self.store_failed(error)),
            },
            // A segment without a cut is made anew, over this one.
            _ => {
                self.active = None;
                Ok(())
            }
        }
    }

    fn ensure_active(&mut self) -> Result<&mut Active, JournalError> {
        self.leave_generation()?;
        if self.active.is_none() {
            let header = Header {
                disk: self.info.disk,
                generation: self.info.generation,
                disk_bytes: self.info.disk_bytes,
                first_cut: self.tip.cut + 1,
                start: self.tip.position,
                scan_open: self.history.open().is_some(),
                damaged: self.history.needs_scan(),
                commit_before: self.tip.commit,
                nonce: tidemark_base::Epoch::random().0,
                time_before: self.tip.time,
            };
            match Active::create(&*self.storage, header) {
                Ok(active) => self.active = Some(active),
                Err(error) => return Err(self.write_failed(error)),
            }
        }
        Ok(self.active.as_mut().expect("just made"))
    }

    /// Appends chunks of the cut after the last one. All of them are checked before any is written.
    pub fn append_chunks(&mut self, cut: u64, bytes: &[u8]) -> Result<(), JournalError> {
        self.check_usable()?;
        let disk = self.info.disk;
        if cut != self.tip.cut + 1 {
            return Err(JournalError::Gap { disk, cut, what: format!("the last one is {}", self.tip.cut) });
        }
        if bytes.is_empty() || bytes.len() > FRAME_BYTES_MAX {
            let what = format!("it has {} bytes, 1 to {FRAME_BYTES_MAX} are allowed", bytes.len());
            return Err(JournalError::Protocol { disk, cut, what });
        }
        let available = self.storage.available_bytes().unwrap_or(u64::MAX);
        let needed = self.limits.reserve_bytes + bytes.len() as u64;
        if available < needed {
            self.needs_room = needed;
            return Err(self.no_room(available));
        }
        let (disk_bytes, cut_extents_max) = (self.info.disk_bytes, self.limits.cut_extents_max);
        let active = self.ensure_active()?;
        let verified = verify_chunks(bytes, active.chunks_at(), &active.segment.key, disk_bytes)
            .map_err(|source| JournalError::Chunk { disk, cut, source })?;
        let extents = active.open.as_ref().map_or(0, |open| open.entries.len()) + verified.entries.len();
        if extents > cut_extents_max {
            let what = format!("the cut has more than {cut_extents_max} extents");
            return Err(JournalError::Protocol { disk, cut, what });
        }
        match active.append(cut, bytes, verified) {
            Ok(()) => {
                self.no_room = None;
                Ok(())
            }
            Err(error) => Err(self.write_failed(error)),
        }
    }

    /// What the cut that has not ended covers so far.
    pub fn open_extents(&self) -> Vec<tidemark_base::Extent> {
        let open = self.active.as_ref().and_then(|active| active.open.as_ref());
        open.map(|open| open.entries.iter().map(|entry| entry.extent).collect()).unwrap_or_default()
    }

    /// Ends a cut: checks that it continues the journal and that its chunks are all there, then appends its commit.
    pub fn end_cut(&mut self, end: &CutEnd) -> Result<(), JournalError> {
        self.check_usable()?;
        self.check_continuity(end)?;
        self.check_totals(end)?;
        let mut end = end.clone();
        // A host whose clock went back still gets an ordered journal, and one whose clock is far ahead does not keep all
        // that follows at its time; the mark keeps the time it claims.
        let latest = Timestamp(Timestamp::now().0.saturating_add(CLOCK_AHEAD_MAX_NS));
        end.clock_stepped |= end.time < self.tip.time || end.time > latest;
        end.time = end.time.min(latest).max(self.tip.time);
        let (durable, before) = (self.durable.cut, self.tip.commit);
        let active = self.ensure_active()?;
        let commit = match active.commit(&end, durable, &before) {
            Ok(commit) => commit,
            Err(error) => return Err(self.write_failed(error)),
        };
        if let Some(boundary) = active::boundary_of(end.kind, end.cut.0) {
            self.history.apply(boundary);
        }
        self.tip = Tip { cut: end.cut.0, position: Some(end.to), time: end.time, commit };
        if self.end_soon || self.active.as_ref().is_some_and(|active| active.is_full(&self.limits)) {
            // The cut is committed whatever happens here: a full volume only postpones sealing.
            if let Err(SealError::Failed(error)) = self.seal() {
                return Err(self.store_failed(error));
            }
        }
        Ok(())
    }

    fn check_continuity(&self, end: &CutEnd) -> Result<(), JournalError> {
        let (disk, cut) = (self.info.disk, end.cut.0);
        let gap = |what: String| Err(JournalError::Gap { disk, cut, what });
        let protocol = |what: &str| Err(JournalError::Protocol { disk, cut, what: what.to_owned() });
        if cut != self.tip.cut + 1 {
            return gap(format!("the last one is {}", self.tip.cut));
        }
        let continues = self.tip.position == Some(end.from) && !self.history.needs_scan();
        let moves_forward = end.from.epoch == end.to.epoch && end.from.sequence <= end.to.sequence;
        let scan_open = self.history.open().is_some();
        match end.kind {
            CutKind::ScanStart => {
                if end.chunks != 0 || end.from != end.to {
                    return protocol("a scan's start carries no data and moves no position");
                }
                let new_epoch = self.tip.position.is_none_or(|position| position.epoch != end.from.epoch);
                if !continues && !new_epoch && !self.history.needs_scan() {
                    return gap(format!("it starts a scan at {}, not where the journal ends", end.from));
                }
            }
            _ if !continues => {
                return gap(match &self.tip.position {
                    Some(_) if self.history.needs_scan() => "the replica is damaged and needs a scan".to_owned(),
                    Some(position) => format!("it follows {}, the journal ends at {position}", end.from),
                    None => "the journal is empty and begins with a scan".to_owned(),
                });
            }
            CutKind::Scan if end.from != end.to => return protocol("scanned blocks move no position"),
            CutKind::Scan | CutKind::ScanEnd if !scan_open => return protocol("no scan was started"),
            CutKind::ScanEnd if end.mark.is_none() => return protocol("a scan's end is a mark"),
            _ => {}
        }
        if !moves_forward || (end.from.sequence == end.to.sequence && end.from != end.to) {
            return protocol("its position goes back");
        }
        if let Some(mark) = &end.mark
            && (mark.disks.len() > MARK_DISKS_MAX || mark.label.len() > LABEL_BYTES_MAX || !mark.disks.contains(&disk))
        {
            return protocol("its mark names too many disks, not this one, or has too long a label");
        }
        Ok(())
    }

    fn check_totals(&self, end: &CutEnd) -> Result<(), JournalError> {
        let empty = OpenCut::new(end.cut.0);
        let open = self.active.as_ref().and_then(|active| active.open.as_ref()).unwrap_or(&empty);
        let damaged = |what: String| Err(JournalError::Damaged { disk: self.info.disk, cut: end.cut.0, what });
        if (open.chunks, open.bytes) != (end.chunks, end.chunk_bytes) {
            return damaged(format!(
                "{} chunks of {} bytes were announced, {} of {} bytes came",
                end.chunks, end.chunk_bytes, open.chunks, open.bytes
            ));
        }
        if *open.hashes.finalize().as_bytes() != end.chunks_hash {
            return damaged("the hash over its chunks does not hold".to_owned());
        }
        Ok(())
    }

    fn seal(&mut self) -> Result<(), SealError> {
        // A header that turned while the segment was open is in memory, and is not sealed as it is.
        if let Some((file, what)) = self.check_header() {
            tracing::warn!(disk = %self.info.disk, file, what, "a segment's header was written again from memory");
            self.mended.push((file, what));
            if let Some(failure) = &self.failed {
                return Err(SealError::Failed(io::Error::other(failure.clone())));
            }
        }
        let Some(active) = &mut self.active else { return Ok(()) };
        let (first, last) = (active.header.first_cut, active.last_cut());
        active.seal(&*self.storage, &self.tip)?;
        let sealed =
            Sealed::open(&*self.storage, first, last).map_err(|error| SealError::Failed(io::Error::other(error)))?;
        self.active = None;
        self.end_soon = false;
        self.parts.push_back(Part::Sealed(Arc::new(sealed)));
        self.durable = self.tip.clone();
        self.no_room = None;
        Ok(())
    }

    /// What has to be synced so that everything up to the last commit is durable.
    pub fn begin_sync(&mut self) -> Result<SyncHandle, JournalError> {
        self.check_usable()?;
        let (file, end) = match &self.active {
            Some(active) if self.durable.cut < self.tip.cut => (Some(active.segment.file.clone()), active.data_end),
            _ => (None, 0),
        };
        Ok(SyncHandle { file, tip: self.tip.clone(), end, opened: self.opened })
    }

    /// Notes the outcome of a sync; a failed one latches.
    pub fn finish_sync(&mut self, handle: SyncHandle, outcome: io::Result<()>) -> Result<(), JournalError> {
        if handle.opened != self.opened {
            let source = Some(io::Error::other("it was opened again meanwhile"));
            return Err(JournalError::StoreFailed { disk: self.info.disk, source });
        }
        match outcome {
            Ok(()) => {
                if let Some(active) = self.active.as_mut().filter(|active| active.header.first_cut <= handle.tip.cut) {
                    active.durable_end = active.durable_end.max(handle.end);
                }
                if handle.tip.cut > self.durable.cut {
                    self.durable = handle.tip;
                }
                Ok(())
            }
            Err(error) => Err(self.store_failed(error)),
        }
    }

    /// Ends the active segment here, or behind the cut that is open: its index, which is made from memory, says what it holds. Of one
    /// that is not sealed a start knows only what its frames prove, and after damage nothing of which blocks it may have touched.
    pub fn end_segment(&mut self) -> Result<(), JournalError> {
        self.check_usable()?;
        match &self.active {
            Some(active) if active.is_in_a_cut() => self.end_soon = true,
            Some(active) if !active.commits.is_empty() => match self.seal() {
                Ok(()) | Err(SealError::Unsealed(_)) => {}
                Err(SealError::Failed(error)) => return Err(self.store_failed(error)),
            },
            _ => {}
        }
        Ok(())
    }

    /// From here on chunks are sealed for another generation.
    pub fn set_generation(&mut self, generation: Generation) -> Result<(), JournalError> {
        self.discard_open()?;
        self.info.generation = generation;
        self.leave_generation()
    }

    /// Files with what was wrong with them and was written again without anybody asking.
    pub fn take_mended(&mut self) -> Vec<(String, String)> {
        std::mem::take(&mut self.mended)
    }

    /// The same, for a disk that grew: segments from now on are of the larger one.
    pub fn grow(&mut self, generation: Generation, disk_bytes: u64) -> Result<(), JournalError> {
        self.info.disk_bytes = disk_bytes;
        self.set_generation(generation)
    }

    /// Reads the header of the open segment again. What is wrong with it is returned with the file's name, and it is written
    /// again from memory: the next start would find none of the segment's cuts without it.
    pub fn check_header(&mut self) -> Option<(String, String)> {
        let active = self.active.as_ref()?;
        let mut head = [0; HEADER_BYTES];
        let what = match active.segment.file.read_at(0, &mut head) {
            Ok(()) if head == active.head => return None,
            Ok(()) => "the segment's header does not hold what was written to it".to_owned(),
            Err(error) => format!("the segment's header cannot be read: {error}"),
        };
        let name = active.segment.name.clone();
        let written = active.segment.file.write_at(0, &active.head).and_then(|()| active.segment.file.sync());
        if let Err(error) = written {
            self.store_failed(error);
        }
        Some((name, what))
    }

    /// Puts a segment that was written again in its place; false when the old one is gone.
    pub fn replace(&mut self, old: &Arc<Sealed>, new: Arc<Sealed>) -> bool {
        let is_old = |part: &Part| matches!(part, Part::Sealed(sealed) if Arc::ptr_eq(sealed, old));
        match self.parts.iter().position(is_old) {
            Some(index) => {
                self.parts[index] = Part::Sealed(new);
                true
            }
            None => false,
        }
    }

    /// Takes the segments at or before `base` out and removes their files. Readers that hold them keep reading.
    pub fn drop_up_to(&mut self, base: u64) -> io::Result<()> {
        let mut removed = false;
        while let Some(part) = self.parts.front().filter(|part| part.last() <= base) {
            let (first, last) = (part.first(), part.last());
            for name in [SegmentName::Sealed { first, last }, SegmentName::Broken { first, last }] {
                match self.storage.remove(&name.path()) {
                    Ok(()) => removed = true,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                }
            }
            self.parts.pop_front();
        }
        for name in self.levels.drop_up_to(base) {
            match self.storage.remove(&name) {
                Ok(()) => removed = true,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        self.losses = self.losses_after(base);
        self.history.forget(base);
        if removed { self.storage.sync_folder("segments") } else { Ok(()) }
    }
}

impl SealError {
    fn into_io(self) -> io::Error {
        match self {
            SealError::Unsealed(error) | SealError::Failed(error) => error,
        }
    }
}
