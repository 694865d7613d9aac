//! Cuts of a scan, and the questions of a compare between them.

use std::task::Poll;

use tidemark_base::ExtentSet;
use tidemark_base::time::Instant;
use tidemark_proto::replication::{CutKind, Differing, HostFrame, Need};

use super::cut::{CutDetails, OpenCut};
use super::{End, Session, lost, protocol, read_failed};
use crate::scan::{ReadTools, Scan, ScanFailure, ScanFrame, Scanned};
use crate::source::{ScanReason, ScanRevision, SourceError};

impl Session<'_> {
    /// Emits a cut of the scan when a frame of it is ready; asks for the barrier when all was read. True when something
    /// was done.
    pub(super) fn emit_scan(&mut self, next_live: Instant) -> Result<bool, End> {
        self.ask()?;
        if self.emit_scan_cut(next_live)? || self.settle_covered()? {
            return Ok(true);
        }
        if self.barrier.is_some() || !self.scan.as_ref().is_some_and(Scan::is_read) {
            return Ok(false);
        }
        // Without a log there is no mark. It begins again once what the old one holds was taken, so the stream goes on.
        if !self.emitter.source.state().is_logging {
            return Ok(false);
        }
        match self.emitter.source.barrier() {
            Ok(position) => {
                self.barrier = Some(position);
                Ok(true)
            }
            // What is under way would be lost with the stream, and sent again for ever: on its acknowledgement may depend
            // what the mark waits for.
            Err(error) if !self.under_way.is_empty() && !matches!(error, SourceError::Busy { .. }) => {
                tracing::debug!(%error, "no mark for the end of the scan yet");
                self.wait(Instant::now() + self.limits().heartbeat)?;
                Ok(true)
            }
            Err(SourceError::Busy { .. }) => {
                tracing::debug!("no instant without writes in flight for the end of the scan yet");
                self.wait(Instant::now() + self.limits().cut_gap)?;
                Ok(true)
            }
            Err(error) => Err(End::Source(error)),
        }
    }

    /// Submits reads and polls the oldest.
    pub(super) fn next_scan_frame(&mut self) -> Poll<Result<Option<ScanFrame>, End>> {
        let Some(scan) = &mut self.scan else { return Poll::Ready(Ok(None)) };
        let tools = ReadTools {
            source: &self.emitter.source,
            workers: &self.emitter.config.workers,
            budget: &self.emitter.scan_budget,
            key: &self.emitter.key,
            compression: self.emitter.scan_level.compression(),
            done: &self.emitter.wake,
        };
        if let Err(error) = scan.submit(&tools) {
            return Poll::Ready(Err(scan_failed(error)));
        }
        scan.next(&tools, &self.sent).map_err(scan_failed)
    }

    pub(super) fn emit_scan_cut(&mut self, next_live: Instant) -> Result<bool, End> {
        let opened = Instant::now();
        let mut open: Option<OpenCut> = None;
        let mut covers: Vec<Scanned> = Vec::new();
        let mut covered = ExtentSet::new();
        loop {
            match self.next_scan_frame()? {
                Poll::Ready(Some(frame)) => {
                    let overlap = |cover: &Scanned| covered.overlapping(cover.extent).next().is_some();
                    if frame.covers.iter().any(overlap) {
                        // Read twice: the later read belongs into a later cut.
                        self.end_scan_cut(open.take(), std::mem::take(&mut covers))?;
                        covered.clear();
                    }
                    frame.covers.iter().for_each(|cover| covered.insert(cover.extent));
                    covers.extend(frame.covers);
                    let mut cut = open.take().unwrap_or_else(|| self.begin_cut());
                    self.send_frame(&mut cut, frame.sealed, frame.permit)?;
                    open = Some(cut);
                }
                Poll::Ready(None) => break,
                Poll::Pending if open.is_none() => return Ok(false),
                // Only a live cut helps.
                Poll::Pending if self.scan.as_ref().is_some_and(|scan| scan.waits_for_records(&self.sent)) => break,
                Poll::Pending => {
                    let started = Instant::now();
                    // Questions leave between cuts only.
                    let asks = self.scan.as_ref().is_some_and(|scan| scan.progress().compares);
                    let age_max = self.limits().scan_cut_age_max / if asks { 5 } else { 1 };
                    if asks && started >= opened + age_max {
                        break;
                    }
                    self.wait((opened + age_max).max(started))?;
                    self.waits.sealing += started.elapsed();
                }
            }
            let bytes = open.as_ref().map_or(0, |cut| cut.raw_bytes);
            let now = Instant::now();
            let full = bytes >= self.limits().scan_cut_bytes_max || now >= opened + self.limits().scan_cut_age_max;
            if full || (now >= next_live && self.live_until(&self.emitter.source.state()).is_some()) {
                break;
            }
        }
        let sent = open.is_some();
        self.end_scan_cut(open, covers)?;
        Ok(sent)
    }

    pub(super) fn end_scan_cut(&mut self, open: Option<OpenCut>, mut scanned: Vec<Scanned>) -> Result<(), End> {
        let (Some(cut), Some(scan)) = (open, &mut self.scan) else { return Ok(()) };
        scanned.extend(scan.take_covered());
        let progress = scan.progress();
        self.emitter.shared.set_status(|status| status.scan = Some(progress));
        let details = CutDetails { scanned, ..CutDetails::default() };
        self.end_cut(cut, CutKind::Scan, self.sent, self.emitter.last_time, details)?;
        self.emitter.scan_level.observe(std::mem::take(&mut self.waits), false);
        Ok(())
    }

    /// Sends the questions whose turn it is. No cut is open.
    fn ask(&mut self) -> Result<(), End> {
        loop {
            if !self.emitter.throttle.wait(Instant::now()).is_zero() {
                return Ok(());
            }
            let Some(scan) = &mut self.scan else { return Ok(()) };
            let Some(question) = scan.next_question(&self.sent).map_err(scan_failed)? else { return Ok(()) };
            let bytes = question.wire_bytes();
            self.emitter.throttle.spend(bytes);
            self.emitter.shared.set_status(|status| status.question_bytes_sent += bytes);
            self.stream.send(HostFrame::Hashes(question), None)?;
        }
    }

    pub(super) fn answered(&mut self, differing: &Differing) -> Result<(), End> {
        let Some(scan) = &mut self.scan else { return Err(protocol("an answer came after the end of the scan")) };
        let before = scan.progress();
        if !scan.answered(differing) {
            return Err(protocol("an answer came that nobody asked for"));
        }
        let progress = scan.progress();
        self.emitter.shared.set_status(|status| {
            let (equal_bytes, compared_bytes) =
                (progress.equal_bytes - before.equal_bytes, progress.compared_bytes - before.compared_bytes);
            status.compared_bytes += compared_bytes;
            status.differing_bytes += compared_bytes - equal_bytes;
            status.scan = Some(progress);
        });
        Ok(())
    }

    /// Blocks that needed no frame are told by a cut of their own when there are many, or for long.
    fn settle_covered(&mut self) -> Result<bool, End> {
        let now = Instant::now();
        let due = self.scan.as_ref().is_some_and(|scan| scan.covered_is_due(now));
        if due {
            let cut = self.begin_cut();
            self.end_scan_cut(Some(cut), Vec::new())?;
        }
        Ok(due)
    }

    /// The server lost blocks of its replica. What is pending already is not asked for again, unless its zeroes would not be
    /// sent.
    pub(super) fn needed(&mut self, need: &Need) -> Result<(), End> {
        let source = self.emitter.source.clone();
        let (consumer, disk_bytes) = (self.emitter.config.consumer, source.identity().disk_bytes);
        if need.extents.iter().any(|extent| !extent.is_valid_on(disk_bytes)) {
            return Err(protocol("it needs what does not lie on the disk"));
        }
        let mut missing = ExtentSet::new();
        for extent in &need.extents {
            let pending = source.pending_window(consumer, ScanRevision(0), extent.offset)?;
            match pending.reason {
                Some(ScanReason::Initial) => missing.insert(*extent),
                _ => pending.extents.gaps(*extent).into_iter().for_each(|gap| missing.insert(gap)),
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        tracing::warn!(bytes = missing.total_bytes(), why = ?need.why, "the process server asks for blocks that it lost");
        Ok(source.require_scan(consumer, &missing, ScanReason::Repair)?)
    }
}

fn scan_failed(failure: ScanFailure) -> End {
    match failure {
        ScanFailure::Read(error) => read_failed(&error),
        ScanFailure::Source(error) => End::Source(error),
        ScanFailure::Lost => lost(),
    }
}
