//! One cut: its frames within throttle and credit, and its end.

use tidemark_base::time::Instant;
use tidemark_base::{Position, Timestamp, sabotage};
use tidemark_proto::replication::{CutEnd, CutKind, CutOrdinal, Data, HostFrame};

use super::{End, Session};
use crate::pack::{Permit, Sealed};
use crate::scan::{FRAME_PERMIT_BYTES_MIN, Scanned};

/// A heartbeat may be a little younger than a record that was stamped before it and logged after it; more than this is
/// a clock that was set back.
const CLOCK_STEP: std::time::Duration = std::time::Duration::from_secs(1);

/// A cut that was sent and is not acknowledged.
pub(super) struct UnderWay {
    pub cut: CutOrdinal,
    pub kind: CutKind,
    pub to: Position,
    pub bytes: u64,
    pub time: Timestamp,
    /// When the oldest record of the cut was logged.
    pub first_time: Option<Timestamp>,
    pub sent_at: Instant,
    pub scanned: Vec<Scanned>,
}

/// A cut while its frames leave.
pub(super) struct OpenCut {
    pub chunks: u64,
    pub bytes: u64,
    pub raw_bytes: u64,
    pub hasher: blake3::Hasher,
}

impl OpenCut {
    pub(super) fn new() -> Self {
        Self { chunks: 0, bytes: 0, raw_bytes: 0, hasher: blake3::Hasher::new() }
    }
}

/// What else a cut's end says.
#[derive(Default)]
pub(super) struct CutDetails {
    /// Where `to` is, when the position does not move.
    pub from: Option<Position>,
    pub first_time: Option<Timestamp>,
    pub clock_stepped: bool,
    pub written_bytes: u64,
    pub mark: Option<tidemark_proto::replication::Mark>,
    pub scanned: Vec<Scanned>,
}

impl Session<'_> {
    pub(super) fn begin_cut(&mut self) -> OpenCut {
        self.in_cut = true;
        OpenCut::new()
    }

    /// Sends a frame of the cut that is open, once throttle and credit allow it.
    pub(super) fn send_frame(&mut self, cut: &mut OpenCut, sealed: Sealed, mut permit: Permit) -> Result<(), End> {
        let bytes = sealed.chunks.len() as u64;
        if bytes == 0 {
            return Ok(());
        }
        permit.shrink(bytes.max(FRAME_PERMIT_BYTES_MIN as u64));
        loop {
            let wait = self.emitter.throttle.wait(Instant::now());
            if wait.is_zero() {
                break;
            }
            self.wait_for_link(Instant::now() + wait)?;
        }
        while !self.credit.take(bytes) {
            self.want(bytes)?;
            self.wait_for_link(Instant::now() + self.limits().heartbeat)?;
        }
        self.emitter.throttle.spend(bytes);
        for hash in &sealed.hashes {
            cut.hasher.update(hash);
        }
        cut.chunks += sealed.hashes.len() as u64;
        cut.bytes += bytes;
        cut.raw_bytes += sealed.raw_bytes;
        let data = Data { cut: self.cut.next(), chunks: sealed.chunks };
        self.stream.send(HostFrame::Data(data), Some(permit))?;
        // Asked for ahead, so that a busy stream does not stop for a round trip.
        if cut.bytes > self.limits().want_bytes / 8 && self.credit.room() < self.limits().want_bytes / 2 {
            self.want(bytes)?;
        }
        Ok(())
    }

    pub(super) fn want(&mut self, bytes: u64) -> Result<(), End> {
        if self.wanted < bytes {
            self.wanted = self.limits().want_bytes.max(bytes);
            self.stream.send(HostFrame::Want(self.wanted), None)?;
        }
        Ok(())
    }

    pub(super) fn end_cut(
        &mut self,
        open: OpenCut,
        kind: CutKind,
        to: Position,
        time: Timestamp,
        details: CutDetails,
    ) -> Result<(), End> {
        self.cut = self.cut.next();
        let stepped = self.emitter.last_time.saturating_since(time) > CLOCK_STEP && kind == CutKind::Records;
        self.emitter.last_time = self.emitter.last_time.max(time);
        let end = CutEnd {
            cut: self.cut,
            kind,
            from: details.from.unwrap_or(to),
            to,
            time: self.emitter.last_time,
            clock_stepped: details.clock_stepped || stepped,
            chunks: open.chunks,
            chunk_bytes: open.bytes,
            chunks_hash: *open.hasher.finalize().as_bytes(),
            written_bytes: details.written_bytes,
            mark: details.mark,
        };
        self.stream.send(HostFrame::CutEnd(end), None)?;
        self.in_cut = false;
        self.sent = to;
        self.totals.cuts += 1;
        self.totals.bytes += open.bytes;
        if sabotage::is("scan-acknowledged") {
            for scanned in &details.scanned {
                self.emitter.source.scanned(self.emitter.config.consumer, scanned.extent, scanned.seen)?;
            }
        }
        self.under_way.push_back(UnderWay {
            cut: self.cut,
            kind,
            to,
            bytes: open.bytes,
            time: self.emitter.last_time,
            first_time: details.first_time,
            sent_at: Instant::now(),
            scanned: details.scanned,
        });
        let peak = self.emitter.live_budget.peak() + self.emitter.scan_budget.peak();
        let level = if self.scan.is_some() { &self.emitter.scan_level } else { &self.emitter.live_level };
        let compression = level.compression();
        self.emitter.shared.set_status(|status| {
            status.sent = Some(to);
            status.cuts_sent += 1;
            status.chunk_bytes_sent += open.bytes;
            status.raw_bytes_sent += open.raw_bytes;
            status.held_bytes_peak = peak;
            status.compression = compression;
        });
        Ok(())
    }
}
