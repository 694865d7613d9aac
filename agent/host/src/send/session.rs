//! One stream: from Hello to its end.

use std::collections::{HashSet, VecDeque};
use std::task::Poll;

use tidemark_base::time::Instant;
use tidemark_base::{Extent, ExtentSet, Position, Sequence, Timestamp};
use tidemark_proto::replication::{
    Close, Credit, CutEnd, CutKind, CutOrdinal, Data, Durable, Hello, HostFrame, Need, PROTOCOL_VERSION, Refusal,
    ServerFrame, Welcome,
};

use super::emitter::{Emitter, chain};
use super::inbox::Event;
use super::link::{LinkError, LinkStream, Traffic};
use super::resume::{self, Begin, Situation};
use super::status::{Phase, Problem};
use super::{CUT_RECORDS_MAX, CYCLE_BYTES_MAX, CYCLE_RECORDS_MAX, Control, SendLimits, ShipMode};
use crate::pack::{
    self, Content, CutLimits, CutPieces, CutSpan, Lost, PackError, Permit, Piece, Priority, Records, Sealed, Ticket,
    Waits,
};
use crate::scan::{FRAME_PERMIT_BYTES_MIN, ReadTools, Scan, ScanFailure, ScanFrame, Scanned};
use crate::source::{LogState, ScanReason, ScanRevision, SourceError};

/// A heartbeat may be a little younger than a record that was stamped before it and logged after it; more than this is
/// a clock that was set back.
const CLOCK_STEP: std::time::Duration = std::time::Duration::from_secs(1);

/// How a stream ended.
pub(super) enum End {
    Stopped,
    Paused,
    /// Nothing went wrong: open another one.
    Again,
    Link(LinkError),
    Refused(Refusal),
    Source(SourceError),
    Failed(Problem),
}

impl From<SourceError> for End {
    fn from(error: SourceError) -> Self {
        End::Source(error)
    }
}

impl From<LinkError> for End {
    fn from(error: LinkError) -> Self {
        End::Link(error)
    }
}

pub(super) struct Session<'a> {
    emitter: &'a mut Emitter,
    stream: Box<dyn LinkStream>,
    traffic: Traffic,
    control: Control,
    credit: Credit,
    /// What was wanted and not granted yet.
    wanted: u64,
    /// The last cut that was begun.
    cut: CutOrdinal,
    /// A cut was begun and not ended: this stream cannot be closed, only reset.
    in_cut: bool,
    sent: Position,
    records: Option<Records>,
    under_way: VecDeque<UnderWay>,
    scan: Option<Scan>,
    /// What must be scanned was looked at up to here.
    scan_seen: ScanRevision,
    /// The mark that ends the scan.
    barrier: Option<Position>,
    waits: Waits,
    totals: Close,
    welcomed: bool,
}

/// A cut that was sent and is not acknowledged.
struct UnderWay {
    cut: CutOrdinal,
    kind: CutKind,
    to: Position,
    bytes: u64,
    time: Timestamp,
    /// When the oldest record of the cut was logged.
    first_time: Option<Timestamp>,
    sent_at: Instant,
    scanned: Vec<Scanned>,
}

/// A cut while its frames leave.
struct OpenCut {
    chunks: u64,
    bytes: u64,
    raw_bytes: u64,
    hasher: blake3::Hasher,
}

impl OpenCut {
    fn new() -> Self {
        Self { chunks: 0, bytes: 0, raw_bytes: 0, hasher: blake3::Hasher::new() }
    }
}

/// A piece of a live cut on its way through a worker.
struct PieceJob {
    ticket: Ticket<Result<Sealed, PackError>>,
    permit: Permit,
}

impl<'a> Session<'a> {
    pub fn run(emitter: &'a mut Emitter, traffic: Traffic) -> End {
        let stream = emitter.config.link.open(traffic, emitter.shared.inbox.stream());
        emitter.shared.set_status(|status| status.streams_opened += 1);
        let mut session = Session {
            control: emitter.shared.control(),
            sent: emitter.source.state().logged,
            emitter,
            stream,
            traffic,
            credit: Credit::new(0),
            wanted: 0,
            cut: CutOrdinal(0),
            in_cut: false,
            records: None,
            under_way: VecDeque::new(),
            scan: None,
            scan_seen: ScanRevision(0),
            barrier: None,
            waits: Waits::default(),
            totals: Close::default(),
            welcomed: false,
        };
        let Err(end) = session.greet().and_then(|welcome| session.begin(&welcome)).and_then(|()| session.emit());
        match end {
            End::Stopped | End::Paused | End::Again if session.welcomed && !session.in_cut => {
                session.close();
                end
            }
            end => end,
        }
    }

    fn limits(&self) -> SendLimits {
        self.emitter.config.limits
    }

    // ── opening ──

    fn greet(&mut self) -> Result<Welcome, End> {
        let identity = self.emitter.source.identity();
        let hello = Hello {
            version: PROTOCOL_VERSION,
            disk: identity.disk,
            generation: identity.generation,
            disk_bytes: identity.disk_bytes,
            session: self.emitter.config.session,
            acknowledged: self.emitter.source.cursor(self.emitter.config.consumer),
        };
        self.stream.send(HostFrame::Hello(hello), None)?;
        let deadline = Instant::now() + self.limits().welcome_timeout;
        loop {
            match self.emitter.shared.inbox.take() {
                Some(Event::Frame(ServerFrame::Welcome(welcome))) => return Ok(welcome),
                Some(Event::Frame(ServerFrame::Refusal(refusal))) => return Err(End::Refused(refusal)),
                Some(Event::Frame(_)) => return Err(protocol("a frame came before Welcome")),
                Some(Event::Closed(error)) => return Err(End::Link(error)),
                None => {}
            }
            self.check_control()?;
            if Instant::now() >= deadline {
                return Err(End::Link(LinkError::Cut { reason: "no Welcome came in time".to_owned() }));
            }
            self.emitter.shared.inbox.wait(deadline);
        }
    }

    /// Decides where to begin, and begins.
    fn begin(&mut self, welcome: &Welcome) -> Result<(), End> {
        self.welcomed = true;
        self.credit = Credit::new(welcome.credit_bytes);
        self.cut = welcome.cut;
        let source = self.emitter.source.clone();
        let consumer = self.emitter.config.consumer;
        let state = source.state();
        let durable = match welcome.durable {
            Some(position) => Some((position, source.locate(&position)?)),
            None => None,
        };
        let mut pending = source.pending_scan(consumer, ScanRevision(0))?;
        let decision = resume::decide(&Situation {
            durable,
            scan_open: welcome.scan_open,
            cursor: source.cursor(consumer),
            epochs: &source.epochs(),
            scan_pending: !pending.extents.is_empty(),
            start_readable: source.locate(&state.logged.epoch.start())? == crate::source::Located::Here,
        });
        let scanning = decision.begin != Begin::Records;
        if scanning && self.traffic == Traffic::Live {
            self.emitter.scan_wanted = true;
            return Err(End::Again);
        }
        if let Some(alarm) = decision.alarm {
            tracing::error!(help = alarm.help(), durable = ?welcome.durable, "{}", alarm.message());
            self.emitter.shared.set_status(|status| status.alarm = Some(alarm));
        }
        if let Some(reason) = decision.new_epoch {
            source.new_epoch(reason)?;
        }
        if let Some(mut reason) = decision.whole_scan {
            // What is pending for another reason may hold writes that are in no record: its zeroes must be sent, because
            // an older record may leave before them.
            if let (ScanReason::Initial, Some(other)) = (reason, pending.reason) {
                reason = other;
            }
            let whole = ExtentSet::from_iter([Extent::new(0, source.identity().disk_bytes)]);
            source.require_scan(consumer, &whole, reason)?;
        }
        self.sent = match (decision.begin, durable) {
            (Begin::ScanFromEpochStart, _) | (_, None) => source.state().logged.epoch.start(),
            (Begin::Records | Begin::ScanHere, Some((position, _))) => {
                source.acknowledged(consumer, position)?;
                position
            }
        };
        let wall = self.emitter.config.clock.wall_now();
        let mut records = Records::after(source.as_ref(), &self.sent)?;
        // What was logged before now and was not sent keeps its own time.
        let time = records.peek(source.state().logged.sequence)?.map_or(wall, |record| record.time.min(wall));
        self.records = Some(records);
        let sent = self.sent;
        if scanning {
            pending = source.pending_scan(consumer, ScanRevision(0))?;
            self.scan_seen = pending.revision;
            let scan = Scan::new(pending);
            let progress = scan.progress();
            self.scan = Some(scan);
            self.emitter.shared.set_status(|status| {
                status.phase = Phase::Scanning;
                status.scan_open = true;
                status.scan = Some(progress);
                status.sent = Some(sent);
            });
            tracing::info!(position = %sent, bytes = progress.total_bytes, "scan begins");
            self.end_cut(OpenCut::new(), CutKind::ScanStart, self.sent, time, CutDetails::default())?;
        } else {
            self.scan_seen = pending.revision;
            self.emitter.shared.set_status(|status| {
                status.phase = Phase::Live;
                status.scan_open = false;
                status.scan = None;
                status.sent = Some(sent);
                status.durable = Some(sent);
            });
            tracing::info!(position = %sent, "live from here");
        }
        Ok(())
    }

    // ── emitting ──

    fn emit(&mut self) -> Result<std::convert::Infallible, End> {
        let mut last_live = Instant::now();
        let mut next_live = last_live;
        let mut next_heartbeat = Instant::now() + self.limits().heartbeat;
        loop {
            self.handle_events()?;
            self.emitter.watcher.arm();
            let wall = self.emitter.config.clock.wall_now();
            let state = self.emitter.source.state();
            self.look_at_state(&state)?;
            let room = self.under_way.len() < self.limits().cuts_under_way_max;
            let behind = self.live_until(&state);
            let now = Instant::now();
            if self.scan.as_ref().is_some_and(|scan| scan.waits_for_records(&self.sent)) {
                next_live = next_live.min(last_live + self.limits().cut_gap / 10);
            }
            let mut deadline = next_heartbeat.max(now + self.limits().scan_cut_age_max);
            if let Some(until) = behind {
                // Not woken by each record meanwhile.
                self.emitter.watcher.disarm();
                if room && now >= next_live {
                    let full = self.emit_records(until, &state)?;
                    last_live = now;
                    next_live = if full { now } else { now + self.limits().cut_gap };
                    next_heartbeat = now + self.limits().heartbeat;
                    continue;
                }
                deadline = if room { next_live } else { now + self.limits().heartbeat };
            }
            if room && self.scan.is_some() && self.emit_scan(next_live)? {
                continue;
            }
            // While blocks change that no log tells of, nothing is known to be complete up to now.
            if room && now >= next_heartbeat && state.logged == self.sent && state.is_logging {
                self.end_cut(OpenCut::new(), CutKind::Records, self.sent, wall, CutDetails::default())?;
                next_heartbeat = now + self.limits().heartbeat;
                continue;
            }
            if next_heartbeat <= now {
                next_heartbeat = now + self.limits().heartbeat;
            }
            self.emitter.shared.inbox.wait(deadline);
        }
    }

    /// Up to where records are to leave now, when there are any.
    fn live_until(&self, state: &LogState) -> Option<Sequence> {
        let until = match self.mode() {
            ShipMode::Continuous => Some(state.logged),
            // A cycle that was cut short by the end of the log gets no mark: the rest of it leaves as it is.
            ShipMode::Interval if !state.is_logging => Some(state.logged),
            ShipMode::Interval => state.marked,
        };
        until.map(|until| until.sequence).filter(|until| *until > self.sent.sequence)
    }

    /// Chunks of a scan follow the records that were logged before they were read, so records do not wait for the end
    /// of a cycle while there is a scan. The replica is not consistent then, whatever the cuts are.
    fn mode(&self) -> ShipMode {
        if self.scan.is_some() { ShipMode::Continuous } else { self.control.policy.mode }
    }

    fn look_at_state(&mut self, state: &LogState) -> Result<(), End> {
        if state.closed && state.logged == self.sent && self.under_way.is_empty() {
            return Err(End::Stopped);
        }
        if state.logged.epoch != self.sent.epoch {
            // Somebody began another epoch: decide anew.
            return Err(End::Again);
        }
        if state.scan_revision == self.scan_seen {
            return Ok(());
        }
        let pending = self.emitter.source.pending_scan(self.emitter.config.consumer, self.scan_seen)?;
        self.scan_seen = pending.revision;
        if pending.extents.is_empty() {
            return Ok(());
        }
        match &mut self.scan {
            Some(scan) => {
                scan.add(pending);
                // A mark made before the addition was seen may not be the end of the scan.
                self.barrier = None;
                Ok(())
            }
            // The replica is not consistent from here on, which begins with a SCAN_START on a stream for scans.
            None => Err(End::Again),
        }
    }

    /// Emits one cut of records. True when it ended before `until`.
    fn emit_records(&mut self, until: Sequence, state: &LogState) -> Result<bool, End> {
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

    /// Emits a cut of the scan when a frame of it is ready; asks for the barrier when all was read. True when something
    /// was done.
    fn emit_scan(&mut self, next_live: Instant) -> Result<bool, End> {
        if self.emit_scan_cut(next_live)? {
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
    fn next_scan_frame(&mut self) -> Poll<Result<Option<ScanFrame>, End>> {
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
            return Poll::Ready(Err(read_failed(&error)));
        }
        scan.next(&tools, &self.sent).map_err(|failure| match failure {
            ScanFailure::Read(error) => read_failed(&error),
            ScanFailure::Lost => lost(),
        })
    }

    fn emit_scan_cut(&mut self, next_live: Instant) -> Result<bool, End> {
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
                    self.wait((opened + self.limits().scan_cut_age_max).max(started))?;
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

    fn end_scan_cut(&mut self, open: Option<OpenCut>, mut scanned: Vec<Scanned>) -> Result<(), End> {
        let (Some(cut), Some(scan)) = (open, &mut self.scan) else { return Ok(()) };
        scanned.extend(scan.take_covered());
        let progress = scan.progress();
        self.emitter.shared.set_status(|status| status.scan = Some(progress));
        let details = CutDetails { scanned, ..CutDetails::default() };
        self.end_cut(cut, CutKind::Scan, self.sent, self.emitter.last_time, details)?;
        self.emitter.scan_level.observe(std::mem::take(&mut self.waits), false);
        Ok(())
    }

    fn begin_cut(&mut self) -> OpenCut {
        self.in_cut = true;
        OpenCut::new()
    }

    /// Sends a frame of the cut that is open, once throttle and credit allow it.
    fn send_frame(&mut self, cut: &mut OpenCut, sealed: Sealed, mut permit: Permit) -> Result<(), End> {
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

    fn want(&mut self, bytes: u64) -> Result<(), End> {
        if self.wanted < bytes {
            self.wanted = self.limits().want_bytes.max(bytes);
            self.stream.send(HostFrame::Want(self.wanted), None)?;
        }
        Ok(())
    }

    fn end_cut(
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
        if tidemark_base::sabotage::is("scan-acknowledged")
            && let Some(cut) = self.under_way.back()
        {
            for scanned in &cut.scanned {
                self.emitter.source.scanned(self.emitter.config.consumer, scanned.extent, scanned.seen)?;
            }
        }
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

    // ── waiting ──

    fn wait(&mut self, deadline: Instant) -> Result<(), End> {
        self.emitter.shared.inbox.wait(deadline);
        self.handle_events()
    }

    fn wait_for_link(&mut self, deadline: Instant) -> Result<(), End> {
        let started = Instant::now();
        self.wait(deadline)?;
        self.waits.link += started.elapsed();
        Ok(())
    }

    fn check_control(&mut self) -> Result<(), End> {
        self.control = self.emitter.shared.control();
        self.emitter.live_level.set_policy(self.control.policy.compression);
        self.emitter.scan_level.set_policy(self.control.policy.compression);
        self.emitter.throttle.set_limit(self.control.policy.bytes_per_second_max);
        match self.control {
            Control { stop: true, .. } => Err(End::Stopped),
            Control { paused: true, .. } => Err(End::Paused),
            _ => Ok(()),
        }
    }

    fn handle_events(&mut self) -> Result<(), End> {
        while let Some(event) = self.emitter.shared.inbox.take() {
            match event {
                Event::Closed(error) => return Err(End::Link(error)),
                Event::Frame(frame) => self.handle_frame(frame)?,
            }
        }
        if let Some(oldest) = self.under_way.front()
            && oldest.sent_at.elapsed() > self.limits().acknowledge_timeout
        {
            let reason = format!("cut {} was not acknowledged in time", oldest.cut);
            return Err(End::Link(LinkError::Cut { reason }));
        }
        self.check_control()
    }

    fn handle_frame(&mut self, frame: ServerFrame) -> Result<(), End> {
        match frame {
            ServerFrame::Grant(bytes) => {
                self.credit.grant(bytes);
                self.wanted = self.wanted.saturating_sub(bytes);
                Ok(())
            }
            ServerFrame::Durable(durable) => self.acknowledged(durable),
            ServerFrame::Need(need) => self.needed(need),
            ServerFrame::Differing(_) => Err(protocol("an answer came that nobody asked for")),
            ServerFrame::Refusal(refusal) => Err(End::Refused(refusal)),
            ServerFrame::Close(_) => {
                Err(End::Link(LinkError::Cut { reason: "the process server closed it".to_owned() }))
            }
            ServerFrame::Welcome(_) => Err(protocol("a second Welcome came")),
        }
    }

    /// The server lost blocks of its replica. What is pending already is not asked for again.
    fn needed(&mut self, need: Need) -> Result<(), End> {
        let source = &self.emitter.source;
        let (consumer, disk_bytes) = (self.emitter.config.consumer, source.identity().disk_bytes);
        if need.extents.iter().any(|extent| !extent.is_valid_on(disk_bytes)) {
            return Err(protocol("it needs what does not lie on the disk"));
        }
        let pending = source.pending_scan(consumer, ScanRevision(0))?.extents;
        let missing: ExtentSet = need.extents.iter().flat_map(|extent| pending.gaps(*extent)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        tracing::warn!(bytes = missing.total_bytes(), why = ?need.why, "the process server asks for blocks that it lost");
        Ok(source.require_scan(consumer, &missing, ScanReason::Repair)?)
    }

    fn acknowledged(&mut self, durable: Durable) -> Result<(), End> {
        let mut last = None;
        while let Some(cut) = self.under_way.pop_front_if(|cut| cut.cut <= durable.cut) {
            self.credit.acknowledge(cut.bytes);
            last = Some(self.cut_acknowledged(cut)?);
        }
        match last {
            Some((cut, position)) if cut == durable.cut && position == durable.position => {
                self.emitter.source.acknowledged(self.emitter.config.consumer, position)?;
                self.emitter.backoff.reset();
                if self.traffic == Traffic::Scan && self.scan.is_none() && !self.scan_end_under_way() {
                    // The scan is over: live changes have their own connection.
                    self.emitter.scan_wanted = false;
                    if !self.in_cut {
                        return Err(End::Again);
                    }
                }
                Ok(())
            }
            _ => Err(protocol("an acknowledgement names a cut or a position that was not sent")),
        }
    }

    fn scan_end_under_way(&self) -> bool {
        self.under_way.iter().any(|cut| cut.kind == CutKind::ScanEnd)
    }

    fn cut_acknowledged(&mut self, cut: UnderWay) -> Result<(CutOrdinal, Position), End> {
        let consumer = self.emitter.config.consumer;
        let mut bytes = 0;
        for scanned in &cut.scanned {
            self.emitter.source.scanned(consumer, scanned.extent, scanned.seen)?;
            bytes += scanned.extent.length;
        }
        let progress = self.scan.as_mut().map(|scan| {
            scan.durable(bytes);
            scan.progress()
        });
        let rpo = cut.first_time.map(|first| self.emitter.config.clock.wall_now().saturating_since(first));
        self.emitter.shared.set_status(|status| {
            status.durable = Some(cut.to);
            status.durable_time = Some(cut.time);
            status.cuts_durable += 1;
            status.problem = None;
            if let Some(rpo) = rpo {
                status.sample_rpo(rpo);
            }
            status.scan = progress;
            if cut.kind == CutKind::ScanEnd {
                status.scan_open = false;
                status.phase = Phase::Live;
            }
        });
        Ok((cut.cut, cut.to))
    }

    // ── ending ──

    /// Closes between two cuts, and waits a little for what is under way.
    fn close(&mut self) {
        if self.stream.send(HostFrame::Close(self.totals), None).is_err() {
            return;
        }
        self.stream.finish();
        let deadline = Instant::now() + self.limits().close_timeout;
        while Instant::now() < deadline {
            match self.emitter.shared.inbox.take() {
                Some(Event::Frame(ServerFrame::Durable(durable))) => {
                    // Whatever it ends with, the stream ends.
                    let _ = self.acknowledged(durable);
                }
                Some(Event::Frame(ServerFrame::Close(_) | ServerFrame::Refusal(_)) | Event::Closed(_)) => return,
                Some(Event::Frame(_)) => {}
                None => self.emitter.shared.inbox.wait(deadline),
            }
        }
    }

    fn pack_failed(&mut self, error: PackError) -> End {
        let disk = self.emitter.source.identity().disk;
        match error {
            PackError::Damaged(extents) => End::Source(SourceError::Damaged { disk, extents }),
            PackError::Gone => End::Source(SourceError::Gone { disk, after: self.sent }),
            error => read_failed(&error),
        }
    }
}

/// What else a cut's end says.
#[derive(Default)]
struct CutDetails {
    /// Where `to` is, when the position does not move.
    from: Option<Position>,
    first_time: Option<Timestamp>,
    clock_stepped: bool,
    written_bytes: u64,
    mark: Option<tidemark_proto::replication::Mark>,
    scanned: Vec<Scanned>,
}

/// Pieces for one frame. A piece is never longer than a record, so a frame stays within its limit.
fn next_batch(
    pieces: &mut CutPieces,
    source: &dyn crate::source::Source,
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
pub(super) const BATCH_READ_BYTES_MAX: u64 = 4 << 20;

fn data_bytes(extent: Extent, piece: &Piece) -> u64 {
    if piece.content == Content::Zeroes { 0 } else { extent.length }
}

fn protocol(reason: &str) -> End {
    End::Link(LinkError::Protocol { reason: reason.to_owned() })
}

fn read_failed(error: &PackError) -> End {
    End::Failed(Problem {
        message: chain(error),
        help: "check the disk; the scan goes on from there by itself".to_owned(),
        refusal: None,
    })
}

fn lost() -> End {
    End::Failed(Problem {
        message: "a worker panicked".to_owned(),
        help: "report it with the log; the stream is opened again".to_owned(),
        refusal: None,
    })
}
