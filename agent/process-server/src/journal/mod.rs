#![doc = include_str!("FORMAT.md")]

mod active;
mod error;
mod history;
mod index;
mod recovery;
mod sealed;
mod segment;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use tidemark_base::storage::{OpenMode, Storage, StorageFile, os_error, write_again};
use tidemark_base::{DiskId, Extent, ExtentMap, FRAME_BYTES_MAX, Generation, Position, Timestamp};

use crate::view::cache::BlockCache;
pub use active::verify_chunks;
use active::{Active, OpenCut, SealError};
pub use error::{JournalError, ReadError};
pub use history::{History, Interval};
pub use index::{Entry, Place, SegmentFile, commit_flags, flatten};
pub use recovery::{DamagedCut, Inspection, inspect};
pub use sealed::{Boundary, BoundaryKind, Sealed, read_commit};
pub use segment::{
    Commit, FRAME_HEADER_BYTES, Fields, Frame, FrameKey, FrameKind, HEADER_BYTES, Header, SegmentName, decode_commit,
};
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
            reserve_bytes: 64 << 20,
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

/// What one segment contributes to the disk at some cut.
#[derive(Clone)]
pub enum Layer {
    /// All of it.
    Whole(Arc<Sealed>),
    /// Its cuts up to one.
    Front { segment: Arc<SegmentFile>, map: Arc<ExtentMap<Place>> },
}

impl Layer {
    pub fn segment(&self) -> &Arc<SegmentFile> {
        match self {
            Layer::Whole(sealed) => &sealed.segment,
            Layer::Front { segment, .. } => segment,
        }
    }

    /// The parts of `within` that this layer covers, in order.
    pub fn overlapping(
        &self,
        within: Extent,
        cache: &BlockCache,
        found: &mut dyn FnMut(Extent, Place),
    ) -> Result<(), ReadError> {
        match self {
            Layer::Whole(sealed) => sealed.overlapping(within, cache, found),
            Layer::Front { map, .. } => {
                map.overlapping(within).for_each(|(extent, place)| found(extent, place));
                Ok(())
            }
        }
    }

    /// The first part at or after `offset` that this layer covers.
    pub fn next(&self, offset: u64, cache: &BlockCache) -> Result<Option<(Extent, Place)>, ReadError> {
        match self {
            Layer::Whole(sealed) => sealed.next(offset, cache),
            Layer::Front { map, .. } => Ok(map.overlapping(Extent::new(offset, u64::MAX - offset)).next()),
        }
    }
}

/// A layer that is still to be made, outside of the journal's lock.
pub enum Source {
    Whole(Arc<Sealed>),
    Front(Arc<Sealed>, u64),
    Entries(Arc<SegmentFile>, Vec<Entry>),
}

impl Source {
    pub fn layer(self, cache: &BlockCache) -> Result<Layer, ReadError> {
        Ok(match self {
            Source::Whole(sealed) => Layer::Whole(sealed),
            Source::Front(sealed, cut) => {
                let map = Arc::new(flatten(&sealed.entries_up_to(cut, cache)?));
                Layer::Front { segment: sealed.segment.clone(), map }
            }
            Source::Entries(segment, entries) => Layer::Front { segment, map: Arc::new(flatten(&entries)) },
        })
    }
}

/// What opening found.
#[derive(Default, Debug, Clone, serde::Serialize)]
pub struct OpenReport {
    /// Bytes behind the last whole cut, truncated.
    pub torn_bytes: u64,
    pub damage: Vec<String>,
}

/// Appends cuts and finds them again. One lock around it (`Replica`'s); only [`SyncHandle::sync`] runs outside.
pub struct Journal {
    storage: Arc<dyn Storage>,
    info: JournalInfo,
    limits: Limits,
    cache: Arc<BlockCache>,
    parts: VecDeque<Part>,
    active: Option<Active>,
    tip: Tip,
    durable: Tip,
    history: History,
    failed: Option<String>,
}

/// Makes what was appended durable, outside of the lock.
pub struct SyncHandle {
    file: Option<Arc<dyn StorageFile>>,
    tip: Tip,
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
    /// Opens what is in `segments/`. `base` is where the base stands: segments at or before it are leftovers of a fold.
    /// With `write` leftovers and torn tails go; without it nothing is changed.
    pub fn open(
        storage: Arc<dyn Storage>,
        info: JournalInfo,
        base: Tip,
        limits: Limits,
        cache: Arc<BlockCache>,
        write: bool,
    ) -> Result<(Self, OpenReport), ReadError> {
        let io = |source| ReadError::Io { file: storage.path("segments").display().to_string(), source };
        let mut names: Vec<SegmentName> =
            storage.list("segments").map_err(io)?.iter().filter_map(|name| SegmentName::parse(name)).collect();
        names.sort_by_key(|name| (name.first(), matches!(name, SegmentName::Active { .. })));
        let mut journal = Self {
            storage: storage.clone(),
            info,
            limits,
            cache,
            parts: VecDeque::new(),
            active: None,
            tip: base.clone(),
            durable: base.clone(),
            history: History::default(),
            failed: None,
        };
        let mut report = OpenReport::default();
        for name in names {
            match name {
                SegmentName::Sealed { last, .. } | SegmentName::Broken { last, .. } if last <= base.cut => {
                    if write {
                        storage.remove(&name.path()).map_err(io)?;
                    }
                }
                SegmentName::Sealed { first, last } => journal.open_sealed(first, last, &mut report)?,
                SegmentName::Broken { first, last } => {
                    journal.broken(first, last, "its header was destroyed", &mut report)
                }
                // The rename that sealed it was cut short where a file system makes it in two steps: both names are of one file.
                SegmentName::Active { first } if matches!(journal.parts.back(), Some(Part::Sealed(sealed)) if sealed.first_cut() == first) => {
                    if write {
                        storage.remove(&name.path()).and_then(|()| storage.sync_folder("segments")).map_err(io)?;
                    }
                }
                SegmentName::Active { first } => journal.open_active(first, write, &mut report)?,
            }
        }
        journal.durable = journal.tip.clone();
        Ok((journal, report))
    }

    fn broken(&mut self, first: u64, last: u64, what: &str, report: &mut OpenReport) {
        let what = format!("cuts {first} to {last} are lost: {what}");
        report.damage.push(what.clone());
        self.history.apply(Boundary { cut: first, what: BoundaryKind::Damaged });
        self.parts.push_back(Part::Broken { first, last, what });
        self.tip.cut = last;
    }

    /// Whether the segment follows what was opened before it; a gap becomes a broken part.
    fn join(&mut self, header: &Header, report: &mut OpenReport) {
        let opened_any = !self.parts.is_empty();
        let after_broken = matches!(self.parts.back(), Some(Part::Broken { .. }));
        if header.first_cut > self.tip.cut + 1 {
            let (first, last) = (self.tip.cut + 1, header.first_cut - 1);
            self.broken(first, last, "their segment is missing", report);
        } else if opened_any && !after_broken && header.commit_before != self.tip.commit {
            let first = header.first_cut;
            report.damage.push(format!("the segment of cut {first} does not follow the one before it"));
            self.history.apply(Boundary { cut: first, what: BoundaryKind::Damaged });
        }
        if !opened_any && header.first_cut <= self.tip.cut && header.scan_open {
            self.history.apply(Boundary { cut: header.first_cut, what: BoundaryKind::ScanStart });
        }
    }

    fn open_sealed(&mut self, first: u64, last: u64, report: &mut OpenReport) -> Result<(), ReadError> {
        let opened = Sealed::open(&*self.storage, first, last).and_then(|sealed| match self.belongs(&sealed.header) {
            true => Ok(sealed),
            false => Err(ReadError::damaged(&sealed.segment.name, "it is of another disk")),
        });
        let sealed = match opened {
            Ok(sealed) => sealed,
            Err(ReadError::Damaged { file, what, .. }) => {
                self.broken(first, last, &format!("{file}: {what}"), report);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        self.join(&sealed.header, report);
        sealed.boundaries.iter().for_each(|boundary| self.history.apply(*boundary));
        self.tip = Tip {
            cut: last,
            position: sealed.last_position.or(self.tip.position),
            time: sealed.last_time,
            commit: sealed.last_commit,
        };
        self.parts.push_back(Part::Sealed(Arc::new(sealed)));
        Ok(())
    }

    fn belongs(&self, header: &Header) -> bool {
        header.disk == self.info.disk && header.disk_bytes == self.info.disk_bytes
    }

    fn open_active(&mut self, first: u64, write: bool, report: &mut OpenReport) -> Result<(), ReadError> {
        let path = SegmentName::Active { first }.path();
        let name = self.storage.path(&path).display().to_string();
        let io = |source| ReadError::Io { file: name.clone(), source };
        let file = self.storage.open(&path, if write { OpenMode::ReadWrite } else { OpenMode::Read }).map_err(io)?;
        let bytes = file.bytes().map_err(io)?;
        let mut head = [0; HEADER_BYTES];
        let header = if bytes < HEADER_BYTES as u64 {
            Err("too short")
        } else {
            file.read_at(0, &mut head).map_err(io)?;
            Header::decode(&head)
        };
        let header = match header {
            Ok(header) if header.first_cut == first && self.belongs(&header) => header,
            _ if bytes <= HEADER_BYTES as u64 => {
                // Its creation was never finished, so no cut was ever in it.
                if write {
                    self.storage.remove(&path).and_then(|()| self.storage.sync_folder("segments")).map_err(io)?;
                }
                return Ok(());
            }
            _ => {
                // How many cuts it held is unknown; none of their numbers may come again.
                let last = first + self.limits.segment_cuts as u64;
                if write {
                    self.storage
                        .rename(&path, &SegmentName::Broken { first, last }.path())
                        .and_then(|()| self.storage.sync_folder("segments"))
                        .map_err(io)?;
                }
                self.broken(first, last, "the active segment's header is destroyed", report);
                return Ok(());
            }
        };
        self.join(&header, report);
        let mut active = Active::resume(&*self.storage, file, head, header, HEADER_BYTES as u64);
        let found = recovery::recover(&active.segment, &active.header, &active.frame_key)?;
        if let Some((position, time, commit)) = found.last {
            self.tip = Tip { cut: self.tip.cut, position: Some(position), time, commit };
        }
        self.tip.cut = first + found.commits.len() as u64 - 1;
        if write {
            let file = &active.segment.file;
            let truncated = if found.torn_bytes > 0 { file.set_bytes(found.data_end) } else { Ok(()) };
            // After a kill the cuts behind the last sync are only in the page cache, and the host is told that it
            // need not keep them. Where that sync failed, neither file nor folder would be written by another one alone.
            truncated
                .and_then(|()| write_again(&**file, found.data_end))
                .and_then(|()| file.sync())
                .and_then(|()| self.storage.sync_folder("segments"))
                .map_err(io)?;
        }
        report.torn_bytes += found.torn_bytes;
        for cut in &found.damaged {
            report.damage.push(format!("{name}: cut {} at {}: {}", cut.cut, cut.at, cut.what));
        }
        found.boundaries.iter().for_each(|boundary| self.history.apply(*boundary));
        active.recovered(found);
        let damaged = active.boundaries.iter().any(|boundary| boundary.what == BoundaryKind::Damaged);
        self.active = Some(active);
        if damaged && write {
            // From now on its index says which cuts were lost; the evidence stays as it is.
            self.seal().map_err(|error| io(error.into_io()))?;
        }
        Ok(())
    }

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

    pub fn parts(&self) -> impl Iterator<Item = &Part> {
        self.parts.iter()
    }

    pub fn active_file(&self) -> Option<(&Arc<SegmentFile>, &Header, &FrameKey)> {
        self.active.as_ref().map(|active| (&active.segment, &active.header, &active.frame_key))
    }

    /// What the cut that has not ended covers so far.
    pub fn open_extents(&self) -> Vec<Extent> {
        let open = self.active.as_ref().and_then(|active| active.open.as_ref());
        open.map(|open| open.entries.iter().map(|entry| entry.extent).collect()).unwrap_or_default()
    }

    /// The end of the active segment's last commit, and its extents.
    pub fn active_end(&self) -> Option<(u64, u64)> {
        self.active.as_ref().map(|active| (active.data_end, active.entries.len() as u64))
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
            Some(libc::ENOSPC | libc::EDQUOT) => self.no_room(0),
            _ => self.store_failed(error),
        }
    }

    fn no_room(&self, available_bytes: u64) -> JournalError {
        let place = self.storage.path("segments").display().to_string();
        JournalError::NoRoom { disk: self.info.disk, place, available_bytes }
    }

    /// The failure that latched, if one did.
    pub fn failure(&self) -> Option<&str> {
        self.failed.as_deref()
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
        if available < self.limits.reserve_bytes + bytes.len() as u64 {
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
        active.append(cut, bytes, verified).map_err(|error| self.write_failed(error))
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
        // The host was told that nothing is here, and sends no zeroes: what lies below must not show through.
        let wipes = end.kind == CutKind::ScanStart && self.history.needs_scan();
        let active = self.ensure_active()?;
        let commit = match active.commit(&end, wipes, durable, &before) {
            Ok(commit) => commit,
            Err(error) => return Err(self.write_failed(error)),
        };
        if let Some(boundary) = active::boundary_of(end.kind, end.cut.0) {
            self.history.apply(boundary);
        }
        self.tip = Tip { cut: end.cut.0, position: Some(end.to), time: end.time, commit };
        if self.active.as_ref().is_some_and(|active| active.is_full(&self.limits)) {
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
        let Some(active) = &mut self.active else { return Ok(()) };
        let (first, last) = (active.header.first_cut, active.last_cut());
        active.seal(&*self.storage, &self.tip)?;
        let sealed =
            Sealed::open(&*self.storage, first, last).map_err(|error| SealError::Failed(io::Error::other(error)))?;
        self.active = None;
        self.parts.push_back(Part::Sealed(Arc::new(sealed)));
        self.durable = self.tip.clone();
        Ok(())
    }

    /// What has to be synced so that everything up to the last commit is durable.
    pub fn begin_sync(&mut self) -> Result<SyncHandle, JournalError> {
        self.check_usable()?;
        let file = match &self.active {
            Some(active) if self.durable.cut < self.tip.cut => Some(active.segment.file.clone()),
            _ => None,
        };
        Ok(SyncHandle { file, tip: self.tip.clone() })
    }

    /// Notes the outcome of a sync; a failed one latches.
    pub fn finish_sync(&mut self, handle: SyncHandle, outcome: io::Result<()>) -> Result<(), JournalError> {
        match outcome {
            Ok(()) => {
                if handle.tip.cut > self.durable.cut {
                    self.durable = handle.tip;
                }
                Ok(())
            }
            Err(error) => Err(self.store_failed(error)),
        }
    }

    /// From here on chunks are sealed for another generation.
    pub fn set_generation(&mut self, generation: Generation) -> Result<(), JournalError> {
        self.discard_open()?;
        self.info.generation = generation;
        self.leave_generation()
    }

    /// The layers of the disk at `cut`, newest first; those at or before `base` are in the base.
    pub fn sources(&self, base: u64, cut: u64) -> Result<Vec<Source>, ReadError> {
        let mut sources = Vec::new();
        if let Some(active) = self.active.as_ref().filter(|active| active.header.first_cut <= cut) {
            let index = (cut - active.header.first_cut) as usize;
            let end = active.commits.get(index).map_or(0, |commit| commit.log_end);
            sources.push(Source::Entries(active.segment.clone(), active.entries[..end as usize].to_vec()));
        }
        for part in self.parts.iter().rev().filter(|part| part.first() <= cut && part.last() > base) {
            match part {
                Part::Sealed(sealed) if sealed.last_cut <= cut => sources.push(Source::Whole(sealed.clone())),
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
