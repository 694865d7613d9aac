//! Cuts of records.

use std::collections::{HashSet, VecDeque};
use std::task::Poll;

use tidemark_base::time::Instant;
use tidemark_base::{Extent, ExtentSet, Sequence};
use tidemark_proto::replication::CutKind;

use super::cut::CutDetails;
use super::{End, Session, lost, read_failed};
use crate::pack::{
    self, Content, CutLimits, CutPieces, CutSpan, Lost, PackError, Permit, Piece, Priority, Sealed, Ticket,
};
use crate::scan::Scan;
use crate::send::{CUT_RECORDS_MAX, CYCLE_BYTES_MAX, CYCLE_RECORDS_MAX, ShipMode};
use crate::source::{LogState, ScanReason, Source, SourceError};

/// A piece of a live cut on its way through a worker.
struct PieceJob {
    ticket: Ticket<Result<Sealed, PackError>>,
    permit: Permit,
}

impl Session<'_> {
    /// Emits one cut of records. True when it ended before `until`.
    pub(super) fn emit_records(&mut self, until: Sequence, state: &LogState) -> Result<bool, End> {
        let source = self.emitter.source.clone();
        let limits = self.limits();
        let cut_limits = match self.mode() {
            ShipMode::Continuous => CutLimits {
                until,
                data_bytes_max: limits.cut_bytes_max,
                records_max: CUT_RECORDS_MAX,
                span_max: limits.cut_span_max,
            },
            ShipMode::Interval => CutLimits {
                data_bytes_max: CYCLE_BYTES_MAX,
                records_max: CYCLE_RECORDS_MAX,
                ..CutLimits::unlimited(until)
            },
        };
        let records = self.records.as_mut().expect("records are read from the beginning of the stream");
        let gathered = CutPieces::gather(source.as_ref(), records, self.sent, &cut_limits, limits.map_entries_max)?;
        let Some((span, mut pieces)) = gathered else {
            // The log said that there were records; the next look may find them.
            return Ok(false);
        };
        if span.to.sequence == state.logged.sequence && span.to != state.logged {
            return Err(End::Source(SourceError::History { disk: source.identity().disk, after: span.from }));
        }
        let mut cut = self.begin_cut();
        let mut jobs = VecDeque::new();
        let mut waiting = None;
        let mut damaged = ExtentSet::new();
        loop {
            self.submit_pieces(&mut pieces, &span, &mut jobs, &mut waiting)?;
            let Some(job) = jobs.pop_front() else {
                if waiting.is_none() {
                    break;
                }
                // No job is under way and there is no room for one: the link holds it all.
                self.wait_for_link(Instant::now() + limits.heartbeat)?;
                continue;
            };
            match job.ticket.poll() {
                Poll::Pending => {
                    jobs.push_front(job);
                    let started = Instant::now();
                    self.wait(started + limits.heartbeat)?;
                    self.waits.sealing += started.elapsed();
                }
                Poll::Ready(Ok(Ok(sealed))) => {
                    sealed.damaged.iter().for_each(|extent| damaged.insert(*extent));
                    self.send_frame(&mut cut, sealed, job.permit)?;
                }
                Poll::Ready(Ok(Err(error))) => return Err(self.pack_failed(error)),
                Poll::Ready(Err(Lost)) => return Err(lost()),
            }
        }
        let mut kind = if self.barrier == Some(span.to) { CutKind::ScanEnd } else { CutKind::Records };
        if !damaged.is_empty() {
            // Only within a scan: it reads these blocks from the disk, and ends later than was thought.
            source.require_scan(self.emitter.config.consumer, &damaged, ScanReason::LogDamaged)?;
            kind = CutKind::Records;
            self.barrier = None;
        }
        let mut scanned = Vec::new();
        if kind == CutKind::ScanEnd {
            scanned = self.scan.as_mut().map(Scan::take_covered).unwrap_or_default();
        }
        let mark = span.mark.clone();
        let details = CutDetails {
            from: Some(span.from),
            first_time: Some(span.first_time),
            clock_stepped: span.clock_stepped,
            written_bytes: span.written_bytes,
            mark,
            scanned,
        };
        self.end_cut(cut, kind, span.to, span.time, details)?;
        if kind == CutKind::ScanEnd {
            tracing::info!(position = %span.to, "scan ended; waiting for its acknowledgement");
            self.scan = None;
            self.barrier = None;
        }
        let behind = span.to.sequence < until;
        self.emitter.live_level.observe(std::mem::take(&mut self.waits), behind && self.scan.is_none());
        Ok(behind)
    }

    /// Submits jobs for the next pieces as far as the budget allows. A piece that did not fit waits in `waiting`.
    fn submit_pieces(
        &mut self,
        pieces: &mut CutPieces,
        span: &CutSpan,
        jobs: &mut VecDeque<PieceJob>,
        waiting: &mut Option<Vec<(Extent, Piece)>>,
    ) -> Result<(), End> {
        let source = &self.emitter.source;
        let compression = self.emitter.live_level.compression();
        let raw_max = pack::frame_raw_bytes(compression);
        loop {
            let batch = match waiting.take() {
                Some(batch) => batch,
                None => {
                    let batch = next_batch(pieces, source.as_ref(), span, raw_max)?;
                    if batch.is_empty() {
                        return Ok(());
                    }
                    if let Some(scan) = &mut self.scan {
                        batch.iter().for_each(|(extent, piece)| scan.touched(*extent, piece.sequence));
                    }
                    batch
                }
            };
            let raw = batch.iter().map(|(extent, piece)| data_bytes(*extent, piece)).sum();
            let Some(permit) = self.emitter.live_budget.take(pack::job_bytes(raw)) else {
                *waiting = Some(batch);
                return Ok(());
            };
            let (source, key, omit) = (source.clone(), self.emitter.key.clone(), self.scan.is_some());
            let ticket = self.emitter.config.workers.submit(Priority::Live, self.emitter.wake.clone(), move |worker| {
                pack::seal_pieces(worker, source.as_ref(), &key, compression, &batch, omit)
            });
            jobs.push_back(PieceJob { ticket, permit });
        }
    }

    pub(super) fn pack_failed(&mut self, error: PackError) -> End {
        let disk = self.emitter.source.identity().disk;
        match error {
            PackError::Damaged(extents) => End::Source(SourceError::Damaged { disk, extents }),
            PackError::Gone => End::Source(SourceError::Gone { disk, after: self.sent }),
            error => read_failed(&error),
        }
    }
}

/// Pieces for one frame. A piece is never longer than a record, so a frame stays within its limit.
fn next_batch(
    pieces: &mut CutPieces,
    source: &dyn Source,
    span: &CutSpan,
    raw_max: u64,
) -> Result<Vec<(Extent, Piece)>, SourceError> {
    let mut batch = Vec::new();
    let mut raw = 0;
    let mut read = 0;
    let mut records = HashSet::new();
    while raw < raw_max && read < BATCH_READ_BYTES_MAX && batch.len() < BATCH_PIECES_MAX {
        let Some((extent, piece)) = pieces.next_within(source, span, raw_max - raw)? else { break };
        raw += data_bytes(extent, &piece);
        if let Content::Data { data, .. } = piece.content
            && records.insert((data.log, data.offset))
        {
            read += u64::from(data.length);
        }
        batch.push((extent, piece));
    }
    Ok(batch)
}

/// Bounds a batch of zeroes, which have no data.
const BATCH_PIECES_MAX: usize = 2048;
/// Bounds what a worker reads for a batch, but for one record: a record is verified as a whole, however little of it
/// later ones left.
pub(in crate::send) const BATCH_READ_BYTES_MAX: u64 = 4 << 20;

fn data_bytes(extent: Extent, piece: &Piece) -> u64 {
    if piece.content == Content::Zeroes { 0 } else { extent.length }
}
