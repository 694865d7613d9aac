//! From Hello to the first cut: what the server holds, and where to begin.

use tidemark_base::compare::CompareKey;
use tidemark_base::time::Instant;
use tidemark_base::{Extent, ExtentSet};
use tidemark_proto::replication::{Credit, CutKind, Hello, HostFrame, PROTOCOL_VERSION, ServerFrame, Welcome};

use super::cut::{CutDetails, OpenCut};
use super::{End, Session, protocol};
use crate::pack::Records;
use crate::scan::Scan;
use crate::send::inbox::Event;
use crate::send::link::{LinkError, Traffic};
use crate::send::resume::{self, Begin, Situation};
use crate::send::status::Phase;
use crate::source::{Located, ScanReason, ScanRevision};

impl Session<'_> {
    pub(super) fn greet(&mut self) -> Result<Welcome, End> {
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
    pub(super) fn begin(&mut self, welcome: &Welcome) -> Result<(), End> {
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
        let mut pending = source.pending_window(consumer, ScanRevision(0), 0)?;
        let decision = resume::decide(&Situation {
            durable,
            scan_open: welcome.scan_open,
            cursor: source.cursor(consumer),
            epochs: &source.epochs(),
            scan_pending: !pending.extents.is_empty(),
            start_readable: source.locate(&state.logged.epoch.start())? == Located::Here,
            comparable: welcome.comparable,
            moved: self.emitter.config.moved,
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
            pending = source.pending_window(consumer, ScanRevision(0), 0)?;
            self.scan_seen = pending.revision;
            let identity = source.identity();
            // Where nothing is held there is nothing to compare with.
            let compares = welcome.comparable && pending.reason.is_some_and(ScanReason::compares);
            let key =
                compares.then(|| CompareKey::new(identity.disk, identity.generation, self.emitter.config.session.0));
            let scan = Scan::new(consumer, &pending, source.pending_bytes(consumer)?, key);
            let progress = scan.progress();
            self.scan = Some(scan);
            self.emitter.shared.set_status(|status| {
                status.phase = Phase::Scanning;
                status.scan_open = true;
                status.scan = Some(progress);
                status.sent = Some(sent);
            });
            tracing::info!(position = %sent, bytes = progress.total_bytes, compares, "scan begins");
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
}
