//! Reads everything again and says what is not sound: a replica at work, one recovery point, or a folder with no server.
//!
//! *Consistency.* What is there when it begins is read; segments that a fold removes meanwhile are read to their end, and base blocks are read under the fold's lock.
//! *Retries.* None: a finding is a finding. A file that cannot be read at all is one, too. *Cancellation.* Between segments and between pieces of the base; the report says so.
//! *Crash.* Nothing is written, here or by [`inspect_folder`] and [`verify_folder`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::Serialize;
use tidemark_base::Extent;
use tidemark_base::disk::{Allocation, Disk};
use tidemark_base::stop::Stop;
use tidemark_base::storage::Storage;

use crate::fold::base::BLOCK_BYTES;
use crate::journal::{FrameKey, Header, Inspection, Layer, Part, ReadError, SegmentFile, inspect};
use crate::replica::{DurableState, Replica, ReplicaError, ReplicaInfo, Statistics};
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
}

impl From<ReadError> for Finding {
    fn from(error: ReadError) -> Self {
        let (file, extent, what) = match error {
            ReadError::Damaged { file, extent, what } => (file, extent, what),
            ReadError::Io { file, source } => (file, None, format!("cannot be read: {source}")),
        };
        Self { file, extent, what, from_cut: 0, one_cut: false }
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
}

impl ScrubReport {
    fn find(&mut self, finding: impl Into<Finding>) {
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(finding.into());
        } else {
            self.findings_left_off += 1;
        }
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
                for cut in inspection.damaged {
                    let what = format!("cut {} at {}: {}", cut.cut, cut.at, cut.what);
                    // Behind the last whole frame any number of cuts may be gone.
                    let one_cut = cut.at < frames_end && cut.cut < first_cut + inspection.cuts;
                    self.find(Finding { file: name.to_owned(), extent: None, what, from_cut: cut.cut, one_cut });
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
    pub extents: u64,
}

/// Checks every byte that a cut needs: all data of the disk is read, past every cache, and proven.
pub fn verify(replica: &Replica, cut: u64, stop: &Stop) -> Result<ScrubReport, ReplicaError> {
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
        if kind == Allocation::Data {
            let length = length.min(PIECE_BYTES);
            read_piece(&mut report, Extent::new(at, length), &mut buffer, |offset, part| view.read(offset, part));
            at += length;
        } else {
            at += length;
        }
    }
    Ok(report.finish(true))
}

fn finding_of(error: std::io::Error, extent: Extent) -> Finding {
    Finding { file: String::new(), extent: Some(extent), what: error.to_string(), from_cut: 0, one_cut: false }
}

/// Of `cuts`, in ascending order, those at which the disk cannot be read whole any more because of what a scrub found.
/// Only the places in question are read, past every cache. `None`: it was stopped.
pub fn touched(replica: &Replica, findings: &[Finding], cuts: &[u64], stop: &Stop) -> Option<BTreeSet<u64>> {
    let mut places: BTreeMap<u64, Vec<Extent>> = BTreeMap::new();
    for finding in findings {
        let whole = || vec![Extent::new(0, replica.disk_bytes())];
        let extents = match finding.extent {
            Some(extent) => vec![extent],
            None if finding.one_cut => replica.cut_extents(finding.from_cut).unwrap_or_else(whole),
            None => whole(),
        };
        places.entry(finding.from_cut).or_default().extend(extents);
    }
    let mut found = BTreeSet::new();
    for (from, mut extents) in places {
        extents.sort_by_key(|extent| extent.offset);
        extents.dedup();
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

/// Reads a whole replica: every segment, frame by frame and against its index, and the base against its sums.
pub fn scrub(replica: &Replica, stop: &Stop) -> Result<ScrubReport, ReplicaError> {
    let mut report = ScrubReport::default();
    for what in &replica.open_report().damage {
        report.find(Finding {
            file: replica.storage().path("segments").display().to_string(),
            extent: None,
            what: what.clone(),
            // No view opens at a cut that opening found to be damaged.
            from_cut: u64::MAX,
            one_cut: false,
        });
    }
    // The active one first: it may be sealed and folded while the others are read.
    if let Some(active) = replica.active() {
        let inspected = inspect(&active.segment, &active.header, &active.key, active.end);
        report.segment(&active.segment.name, active.end, active.header.first_cut, active.end, inspected);
    }
    for part in replica.parts() {
        if stop.is_stopped() {
            return Ok(report.finish(false));
        }
        // Broken ones were named when the replica was opened.
        if let Part::Sealed(sealed) = part {
            let (name, bytes) = (&sealed.segment.name, sealed.file_bytes);
            report.segment(name, bytes, sealed.first_cut(), sealed.data_end, sealed.check());
        }
    }
    let finished = scrub_base(replica, &mut report, stop)?;
    Ok(report.finish(finished))
}

fn scrub_base(replica: &Replica, report: &mut ScrubReport, stop: &Stop) -> Result<bool, ReplicaError> {
    let sources = replica.fold_sources()?;
    let layers: Result<Vec<Layer>, ReadError> =
        sources.into_iter().map(|source| source.layer(replica.cache())).collect();
    let layers = layers.unwrap_or_default();
    let base = replica.base();
    let mut found = ScrubReport::default();
    let mut buffer = vec![0; PIECE_BYTES as usize];
    let mut at = 0;
    while at < base.disk_bytes() {
        if stop.is_stopped() {
            return Ok(false);
        }
        let length = match base.allocation(at, base.disk_bytes()) {
            Ok((length, Allocation::Hole)) => length,
            Ok((length, Allocation::Data)) => {
                // Whole blocks, so that each is read once.
                let length = length.min(PIECE_BYTES - at % BLOCK_BYTES);
                read_piece(&mut found, Extent::new(at, length), &mut buffer, |offset, part| base.read_at(offset, part));
                length
            }
            Err(error) => {
                report.find(error);
                return Ok(true);
            }
        };
        at += length;
    }
    report.bytes += found.bytes;
    // A block that a fold cut short was writing may be torn; the fold writes it again and no view reads it here.
    for finding in found.findings {
        if !finding.extent.is_some_and(|extent| covered(&layers, extent, replica.cache())) {
            report.find(finding);
        }
    }
    report.findings_left_off += found.findings_left_off;
    Ok(true)
}

fn covered(layers: &[Layer], extent: Extent, cache: &BlockCache) -> bool {
    let mut gaps = tidemark_base::ExtentSet::from_iter([extent]);
    for layer in layers {
        if layer.overlapping(extent, cache, &mut |part, _| gaps.remove(part)).is_err() {
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
    let replica = Replica::open_read_only(storage, BlockCache::new(VERIFY_CACHE_BYTES))?;
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
            extents: active.extents,
        });
    }
    Ok(FolderReport {
        info: replica.info(),
        durable: replica.durable(),
        floor: replica.floor(),
        statistics,
        segments,
        torn_bytes: replica.open_report().torn_bytes,
        damage: replica.open_report().damage.clone(),
        pins: replica.durable_pins(),
    })
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
