//! Reads everything again and says what is not sound: a replica at work, one recovery point, or a folder with no server.
//!
//! *Consistency.* What is there when it begins is read; segments that a fold removes meanwhile are read to their end, and base blocks are read under the fold's lock.
//! *Retries.* None: a finding is a finding. A file that cannot be read at all is one, too. *Cancellation.* Between frames and between pieces of the base; the report says so, and its
//! [`Cursor`] says where to go on. *Crash.* Nothing is written here; what is done about a finding is in [`crate::replica::damage`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tidemark_base::Extent;
use tidemark_base::disk::{Allocation, Disk};
use tidemark_base::stop::Stop;
use tidemark_base::storage::Storage;

use crate::fold::base::BLOCK_BYTES;
use crate::journal::{
    Entry, FrameKey, Header, Inspection, Layer, Part, ReadError, Sealed, SegmentFile, inspect, unreadable,
};
use crate::replica::{DurableState, Replica, ReplicaError, ReplicaInfo, Statistics};
use crate::view::Suspect;
use crate::view::cache::BlockCache;

/// More findings are counted, not kept.
const FINDINGS_MAX: usize = 1000;
const PIECE_BYTES: u64 = 1 << 20;
const VERIFY_CACHE_BYTES: usize = 4 << 20;

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Finding {
    pub file: String,
    /// The part of the disk that is affected, where that is known.
    pub extent: Option<Extent>,
    pub what: String,
    /// The first cut that it can show in.
    #[serde(skip)]
    pub from_cut: u64,
    /// Only the extents of the cut `from_cut` are touched.
    #[serde(skip)]
    pub one_cut: bool,
    /// The parts of the disk that are touched, where they are known; none at all when no data is.
    #[serde(skip)]
    pub extents: Option<Vec<Extent>>,
}

impl Finding {
    /// Of a file that holds no data of the disk.
    pub fn of_file(file: String, what: String) -> Self {
        Self { file, extent: None, what, from_cut: u64::MAX, one_cut: false, extents: Some(Vec::new()) }
    }
}

impl From<ReadError> for Finding {
    fn from(error: ReadError) -> Self {
        let (file, extent, what) = match error {
            ReadError::Damaged { file, extent, what } => (file, extent, what),
            ReadError::Io { file, source } => (file, None, format!("cannot be read: {source}")),
        };
        Self { file, extent, what, from_cut: 0, one_cut: false, extents: None }
    }
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct ScrubReport {
    pub sound: bool,
    /// False: it was stopped before the end.
    pub finished: bool,
    pub segments: u64,
    pub cuts: u64,
    pub chunks: u64,
    /// Bytes that were read and proven.
    pub bytes: u64,
    pub findings: Vec<Finding>,
    pub findings_left_off: u64,
    /// Bytes of the base that do not prove, and that a fold which was cut short writes again: no view reads them before.
    pub left_to_fold_bytes: u64,
    /// Where they are, the first of them.
    #[serde(skip)]
    pub left_to_fold: Vec<Extent>,
    /// First cuts of segments whose index is to be made again.
    #[serde(skip)]
    pub indexes: Vec<u64>,
}

/// Where a scrub is: in this order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cursor {
    #[default]
    Start,
    /// Sealed segments that begin after this cut.
    Segments(u64),
    /// Merged indexes behind this one, by last and first cut.
    Indexes(u64, u64),
    /// The base, from this byte on.
    Base(u64),
    End,
}

/// Told what was read; waits as long as it likes, and says whether to go on.
pub trait Pace {
    fn tick(&self, bytes: u64) -> bool;
}

/// As fast as it goes.
impl Pace for Stop {
    fn tick(&self, _bytes: u64) -> bool {
        !self.is_stopped()
    }
}

impl ScrubReport {
    fn find(&mut self, finding: impl Into<Finding>) {
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(finding.into());
        } else {
            self.findings_left_off += 1;
        }
    }

    fn leave_to_fold(&mut self, extent: Extent) {
        self.left_to_fold_bytes += extent.length;
        if self.left_to_fold.len() < FINDINGS_MAX {
            self.left_to_fold.push(extent);
        }
    }

    /// What goes on where another finding ended, for the same reason, is the same finding.
    fn join_findings(&mut self) {
        self.findings.dedup_by(|next, last| {
            let (Some(extent), Some(before)) = (next.extent, &mut last.extent) else { return false };
            let is_same = (&last.file, &last.what, last.from_cut) == (&next.file, &next.what, next.from_cut);
            let goes_on = is_same && before.end() == extent.offset;
            if goes_on {
                before.length += extent.length;
            }
            goes_on
        });
    }

    /// Takes the findings out, so that something is done about them.
    pub fn take_findings(&mut self) -> (Vec<Finding>, Vec<u64>) {
        (std::mem::take(&mut self.findings), std::mem::take(&mut self.indexes))
    }

    fn finish(mut self, finished: bool) -> Self {
        self.finished = finished;
        self.sound = finished && self.findings.is_empty();
        self
    }

    /// `frames_end`: what is damaged behind it is the segment's index.
    fn segment(
        &mut self,
        name: &str,
        bytes: u64,
        first_cut: u64,
        frames_end: u64,
        inspected: Result<Inspection, ReadError>,
    ) {
        self.segments += 1;
        match inspected {
            Ok(inspection) => {
                self.cuts += inspection.cuts;
                self.chunks += inspection.chunks;
                self.bytes += bytes;
                for cut in inspection.altered {
                    let what = format!("cut {} at {}: {}", cut.cut, cut.at, cut.what);
                    self.find(Finding::of_file(name.to_owned(), what));
                }
                for cut in inspection.damaged {
                    let what = format!("cut {} at {}: {}", cut.cut, cut.at, cut.what);
                    if cut.at >= frames_end && cut.extents.is_some() {
                        self.indexes.push(first_cut);
                    }
                    // Behind the last whole frame any number of cuts may be gone.
                    let one_cut = cut.at < frames_end && cut.cut < first_cut + inspection.cuts;
                    let extents = cut.extents.filter(|_| one_cut || cut.at >= frames_end);
                    let finding =
                        Finding { file: name.to_owned(), extent: None, what, from_cut: cut.cut, one_cut, extents };
                    self.find(finding);
                }
            }
            Err(error) => self.find(Finding { from_cut: first_cut, ..error.into() }),
        }
    }
}

/// An active segment as it was at some moment.
pub struct ActiveSegment {
    pub segment: Arc<SegmentFile>,
    pub header: Header,
    pub key: FrameKey,
    pub end: u64,
    pub entries: Vec<Entry>,
    /// How many of them each cut ends with.
    pub ends: Vec<u64>,
}

impl ActiveSegment {
    /// What was appended, as memory knows it, against what is in the file.
    fn check(&self, tick: &dyn Fn(u64) -> bool) -> Result<Inspection, ReadError> {
        let mut inspection = inspect(&self.segment, &self.header, &self.key, self.end, tick)?;
        for damaged in &mut inspection.damaged {
            damaged.extents = self.entries_of(damaged.cut).map(|entries| unreadable(&self.segment, entries));
        }
        Ok(inspection)
    }

    fn entries_of(&self, cut: u64) -> Option<&[Entry]> {
        let index = usize::try_from(cut.checked_sub(self.header.first_cut)?).ok()?;
        let start = index.checked_sub(1).map_or(Some(0), |before| self.ends.get(before).copied())?;
        self.entries.get(start as usize..*self.ends.get(index)? as usize)
    }
}

/// Checks every byte that a cut needs: all data of the disk is read, past every cache, and proven. `reached` is told how far it is.
pub fn verify(replica: &Replica, cut: u64, stop: &Stop, reached: &dyn Fn(u64)) -> Result<ScrubReport, ReplicaError> {
    let view = replica.view_through(cut, &BlockCache::new(VERIFY_CACHE_BYTES))?;
    let mut report = ScrubReport::default();
    let mut buffer = vec![0; PIECE_BYTES as usize];
    let mut at = 0;
    while at < view.bytes() {
        if stop.is_stopped() {
            return Ok(report.finish(false));
        }
        let (length, kind) = match view.allocation(at) {
            Ok(run) => run,
            Err(error) => {
                report.find(finding_of(error, Extent::new(at, view.bytes() - at)));
                break;
            }
        };
        let length = match kind {
            Allocation::Data => length.min(PIECE_BYTES),
            Allocation::Hole => length,
        };
        if kind == Allocation::Data {
            read_piece(&mut report, Extent::new(at, length), &mut buffer, |offset, part| view.read(offset, part));
        }
        at += length;
        reached(at);
    }
    report.join_findings();
    Ok(report.finish(true))
}

fn finding_of(error: std::io::Error, extent: Extent) -> Finding {
    let (file, what) = (String::new(), error.to_string());
    Finding { file, extent: Some(extent), what, from_cut: 0, one_cut: false, extents: None }
}

/// Of `cuts`, in ascending order, those at which the disk cannot be read whole any more because of what a scrub found.
/// Only the places in question are read, past every cache. `None`: it was stopped.
pub fn touched(replica: &Replica, findings: &[Finding], cuts: &[u64], stop: &Stop) -> Option<BTreeSet<u64>> {
    let mut places: BTreeMap<u64, Vec<Extent>> = BTreeMap::new();
    for finding in findings {
        let extents = replica.extents_of_finding(finding);
        if !extents.is_empty() {
            places.entry(finding.from_cut).or_default().extend(extents);
        }
    }
    let mut found = BTreeSet::new();
    for (from, mut extents) in places {
        extents.sort_by_key(|extent| extent.offset);
        extents.dedup();
        // What is older than the base cannot be shown, damaged or not.
        let from = from.max(replica.floor());
        let later = &cuts[cuts.partition_point(|&cut| cut < from)..];
        // What a later cut wrote over is whole again for good, so the first cut that can be read ends the search.
        let (mut low, mut high) = (0, later.len());
        while low < high {
            if stop.is_stopped() {
                return None;
            }
            let middle = low + (high - low) / 2;
            if is_whole(replica, later[middle], &extents, stop) { high = middle } else { low = middle + 1 }
        }
        found.extend(&later[..low]);
    }
    Some(found)
}

fn is_whole(replica: &Replica, cut: u64, extents: &[Extent], stop: &Stop) -> bool {
    let view = match replica.view_through(cut, &BlockCache::new(VERIFY_CACHE_BYTES)) {
        Ok(view) => view,
        // What is not there any more is not damaged.
        Err(error) => return !matches!(error, ReplicaError::Read { .. }),
    };
    let mut buffer = vec![0; PIECE_BYTES as usize];
    for extent in extents {
        let end = extent.end().min(view.bytes());
        let mut at = extent.offset;
        while at < end && !stop.is_stopped() {
            let Ok((length, kind)) = view.allocation(at) else { return false };
            let length = length.min(end - at);
            if kind == Allocation::Hole {
                at += length;
                continue;
            }
            let length = length.min(PIECE_BYTES);
            if view.read(at, &mut buffer[..length as usize]).is_err() {
                return false;
            }
            at += length;
        }
    }
    true
}

/// Reads a piece; when it is damaged, block by block, so that each damaged block is named.
fn read_piece(
    report: &mut ScrubReport,
    extent: Extent,
    buffer: &mut [u8],
    read: impl Fn(u64, &mut [u8]) -> Result<(), ReadError>,
) {
    if read(extent.offset, &mut buffer[..extent.length as usize]).is_ok() {
        report.bytes += extent.length;
        return;
    }
    let mut at = extent.offset;
    while at < extent.end() {
        let length = (BLOCK_BYTES - at % BLOCK_BYTES).min(extent.end() - at);
        match read(at, &mut buffer[..length as usize]) {
            Ok(()) => report.bytes += length,
            Err(error) => {
                let mut finding = Finding::from(error);
                finding.extent = Some(Extent::new(at, length));
                report.find(finding);
            }
        }
        at += length;
    }
}

/// Reads a whole replica: every segment, frame by frame and against its index, every merged index, the base against its
/// sums, and the small files against memory.
pub fn scrub(replica: &Replica, stop: &Stop) -> Result<ScrubReport, ReplicaError> {
    let mut report = ScrubReport::default();
    for what in &replica.opening_damage() {
        report.find(Finding {
            file: replica.storage().path("segments").display().to_string(),
            extent: None,
            what: what.clone(),
            // No view opens at a cut that opening found to be damaged.
            from_cut: u64::MAX,
            one_cut: false,
            extents: None,
        });
    }
    let mut cursor = Cursor::Start;
    while cursor != Cursor::End {
        match advance(replica, cursor, stop, &mut report)? {
            Some(next) => cursor = next,
            None => return Ok(report.finish(false)),
        }
    }
    Ok(report.finish(true))
}

/// One unit of a scrub: the small files and the active segment, a segment, an index, or a piece of the base. Returns where
/// to go on; `None`: it was stopped in the middle.
pub fn advance(
    replica: &Replica,
    cursor: Cursor,
    pace: &dyn Pace,
    report: &mut ScrubReport,
) -> Result<Option<Cursor>, ReplicaError> {
    if !pace.tick(0) {
        return Ok(None);
    }
    let tick = |bytes| pace.tick(bytes);
    Ok(match cursor {
        Cursor::Start => {
            replica.check_files().into_iter().for_each(|finding| report.find(finding));
            // The active one first: it may be sealed and folded while the others are read.
            if let Some(active) = replica.active() {
                let checked = active.check(&tick);
                if checked.as_ref().is_ok_and(|inspection| !inspection.finished) {
                    return Ok(None);
                }
                report.segment(&active.segment.name, active.end, active.header.first_cut, active.end, checked);
            }
            Some(Cursor::Segments(0))
        }
        Cursor::Segments(after) => {
            // Broken ones were named when the replica was opened.
            let next = replica.parts().into_iter().find_map(|part| match part {
                Part::Sealed(sealed) if sealed.first_cut() > after => Some(sealed),
                _ => None,
            });
            let Some(sealed) = next else { return Ok(Some(Cursor::Indexes(0, 0))) };
            if !check_segment(&sealed, &tick, report) {
                return Ok(None);
            }
            Some(Cursor::Segments(sealed.first_cut()))
        }
        Cursor::Indexes(last, first) => {
            let mut indexes = replica.merged_indexes();
            indexes.sort_by_key(|index| (index.last, index.first));
            let next = indexes.into_iter().find(|index| (index.last, index.first) > (last, first));
            let Some(index) = next else { return Ok(Some(Cursor::Base(0))) };
            match index.check() {
                Ok(()) => report.bytes += index.bytes,
                Err(error) => report.find(Finding::of_file(index.name().to_owned(), error.to_string())),
            }
            if !tick(index.bytes) {
                return Ok(None);
            }
            Some(Cursor::Indexes(index.last, index.first))
        }
        Cursor::Base(offset) => scrub_base(replica, offset, &tick, report)?,
        Cursor::End => Some(Cursor::End),
    })
}

/// Reads a segment; false: it was stopped.
fn check_segment(sealed: &Sealed, tick: &dyn Fn(u64) -> bool, report: &mut ScrubReport) -> bool {
    let checked = sealed.check(tick);
    if checked.as_ref().is_ok_and(|inspection| !inspection.finished) {
        return false;
    }
    report.segment(&sealed.segment.name, sealed.file_bytes, sealed.first_cut(), sealed.data_end, checked);
    true
}

/// Looks into what a read found to be damaged: the whole segment, or the block of the base.
pub fn look_into(replica: &Replica, suspect: &Suspect, stop: &Stop, report: &mut ScrubReport) {
    let (file, extent) = suspect;
    let tick = |_| !stop.is_stopped();
    if file == replica.base().name() {
        let Some(extent) = extent else { return };
        let mut buffer = vec![0; extent.length as usize];
        read_piece(report, *extent, &mut buffer, |offset, part| replica.base().read_at(offset, part));
        return;
    }
    if let Some(active) = replica.active().filter(|active| active.segment.name == *file) {
        let checked = active.check(&tick);
        report.segment(file, active.end, active.header.first_cut, active.end, checked);
    }
    for part in replica.parts() {
        if let Part::Sealed(sealed) = part
            && sealed.segment.name == *file
        {
            check_segment(&sealed, &tick, report);
        }
    }
}

/// The next piece of the base that holds anything.
fn scrub_base(
    replica: &Replica,
    offset: u64,
    tick: &dyn Fn(u64) -> bool,
    report: &mut ScrubReport,
) -> Result<Option<Cursor>, ReplicaError> {
    let base = replica.base();
    let at = match base.nothing_until(offset) {
        Ok(at) if at >= base.disk_bytes() => return Ok(Some(Cursor::End)),
        Ok(at) => at / BLOCK_BYTES * BLOCK_BYTES,
        Err(error) => {
            report.find(error);
            return Ok(Some(Cursor::End));
        }
    };
    let length = PIECE_BYTES.min(base.disk_bytes() - at);
    let mut found = ScrubReport::default();
    let mut buffer = vec![0; length as usize];
    read_piece(&mut found, Extent::new(at, length), &mut buffer, |offset, part| base.read_at(offset, part));
    report.bytes += found.bytes;
    if !found.findings.is_empty() {
        // A block that a fold cut short was writing may be torn; the fold writes it again and no view reads it here.
        let sources = replica.fold_sources()?;
        let layers: Result<Vec<Layer>, ReadError> =
            sources.into_iter().map(|source| source.layer(replica.cache())).collect();
        let layers = layers.unwrap_or_default();
        for finding in found.findings {
            match finding.extent.filter(|extent| covered(&layers, *extent, replica.cache())) {
                Some(extent) => report.leave_to_fold(extent),
                None => report.find(finding),
            }
        }
    }
    Ok(tick(length).then_some(Cursor::Base(at + length)))
}

fn covered(layers: &[Layer], extent: Extent, cache: &BlockCache) -> bool {
    let mut gaps = tidemark_base::ExtentSet::from_iter([extent]);
    for layer in layers {
        if layer.overlapping(extent, cache, &mut |found| gaps.remove(found.extent)).is_err() {
            return false;
        }
    }
    gaps.is_empty()
}

/// What a replica's folder holds, from its manifest and indexes.
#[derive(Clone, Debug, Serialize)]
pub struct FolderReport {
    #[serde(flatten)]
    pub info: ReplicaInfo,
    pub durable: DurableState,
    /// The oldest cut that can be shown.
    pub floor: u64,
    pub statistics: Statistics,
    pub segments: Vec<SegmentReport>,
    /// Bytes behind the last whole cut: a crash left them.
    pub torn_bytes: u64,
    pub damage: Vec<String>,
    pub pins: Vec<crate::replica::manifest::Pin>,
}

#[derive(Clone, Debug, Serialize)]
pub struct SegmentReport {
    pub first_cut: u64,
    pub last_cut: u64,
    /// `sealed`, `active` or `broken`.
    pub state: &'static str,
    pub bytes: u64,
    pub extents: u64,
}

/// What is in a replica's folder. Nothing is written.
pub fn inspect_folder(storage: Arc<dyn Storage>) -> Result<FolderReport, ReadError> {
    Ok(folder_report(&*Replica::open_read_only(storage, BlockCache::new(VERIFY_CACHE_BYTES))?))
}

/// The same of a replica that is open.
pub fn folder_report(replica: &Replica) -> FolderReport {
    let mut segments: Vec<SegmentReport> = replica
        .parts()
        .iter()
        .map(|part| match part {
            Part::Sealed(sealed) => SegmentReport {
                first_cut: part.first(),
                last_cut: part.last(),
                state: "sealed",
                bytes: sealed.file_bytes,
                extents: sealed.extents(),
            },
            Part::Broken { .. } => {
                SegmentReport { first_cut: part.first(), last_cut: part.last(), state: "broken", bytes: 0, extents: 0 }
            }
        })
        .collect();
    let statistics = replica.statistics();
    if let Some(active) = replica.active() {
        segments.push(SegmentReport {
            first_cut: active.header.first_cut,
            last_cut: statistics.last_cut,
            state: "active",
            bytes: active.end,
            extents: active.entries.len() as u64,
        });
    }
    FolderReport {
        info: replica.info(),
        durable: replica.durable(),
        floor: replica.floor(),
        statistics,
        segments,
        torn_bytes: replica.open_report().torn_bytes,
        damage: replica.open_report().damage.clone(),
        pins: replica.durable_pins(),
    }
}

/// Why a folder could not be verified at all.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    #[error("the folder is no replica that can be opened")]
    Open(#[source] ReadError),
    #[error(transparent)]
    Replica(#[from] ReplicaError),
}

impl FolderError {
    pub fn help(&self) -> &'static str {
        match self {
            FolderError::Open(error) => error.help(),
            FolderError::Replica(error) => error.help(),
        }
    }
}

/// Reads a whole replica's folder. Nothing is written.
pub fn verify_folder(storage: Arc<dyn Storage>, stop: &Stop) -> Result<ScrubReport, FolderError> {
    let replica = Replica::open_read_only(storage, BlockCache::new(VERIFY_CACHE_BYTES)).map_err(FolderError::Open)?;
    Ok(scrub(&replica, stop)?)
}
