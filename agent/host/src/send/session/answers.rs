//! What the server says while a stream runs, waiting for it, and the end of a stream.

use tidemark_base::Position;
use tidemark_base::time::Instant;
use tidemark_proto::replication::{CutKind, CutOrdinal, Durable, HostFrame, ServerFrame};

use super::cut::UnderWay;
use super::{Control, End, Session, protocol};
use crate::scan::Scan;
use crate::send::inbox::Event;
use crate::send::link::{LinkError, Traffic};
use crate::send::status::Phase;

impl Session<'_> {
    pub(super) fn wait(&mut self, deadline: Instant) -> Result<(), End> {
        self.emitter.shared.inbox.wait(deadline);
        self.handle_events()
    }

    pub(super) fn wait_for_link(&mut self, deadline: Instant) -> Result<(), End> {
        let started = Instant::now();
        self.wait(deadline)?;
        self.waits.link += started.elapsed();
        Ok(())
    }

    pub(super) fn check_control(&mut self) -> Result<(), End> {
        let before = std::mem::replace(&mut self.control, self.emitter.shared.control());
        self.emitter.live_level.set_policy(self.control.policy.compression);
        self.emitter.scan_level.set_policy(self.control.policy.compression);
        self.emitter.throttle.set_limit(self.control.policy.bytes_per_second_max);
        match self.control {
            Control { stop: true, .. } => Err(End::Stopped),
            Control { paused: true, .. } => Err(End::Paused),
            Control { restarted, .. } if restarted != before.restarted => Err(End::Again),
            _ => Ok(()),
        }
    }

    pub(super) fn handle_events(&mut self) -> Result<(), End> {
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
        if let Some(asked) = self.scan.as_ref().and_then(Scan::asked_since)
            && asked.elapsed() > self.limits().acknowledge_timeout
        {
            return Err(End::Link(LinkError::Cut { reason: "a question was not answered in time".to_owned() }));
        }
        self.check_control()
    }

    pub(super) fn handle_frame(&mut self, frame: ServerFrame) -> Result<(), End> {
        match frame {
            ServerFrame::Grant(bytes) => {
                self.credit.grant(bytes);
                self.wanted = self.wanted.saturating_sub(bytes);
                Ok(())
            }
            ServerFrame::Durable(durable) => self.acknowledged(durable),
            ServerFrame::Need(need) => self.needed(&need),
            ServerFrame::Differing(differing) => self.answered(&differing),
            ServerFrame::Refusal(refusal) => Err(End::Refused(refusal)),
            ServerFrame::Close(_) => {
                Err(End::Link(LinkError::Cut { reason: "the process server closed it".to_owned() }))
            }
            ServerFrame::Welcome(_) => Err(protocol("a second Welcome came")),
        }
    }

    pub(super) fn acknowledged(&mut self, durable: Durable) -> Result<(), End> {
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

    pub(super) fn scan_end_under_way(&self) -> bool {
        self.under_way.iter().any(|cut| cut.kind == CutKind::ScanEnd)
    }

    pub(super) fn cut_acknowledged(&mut self, cut: UnderWay) -> Result<(CutOrdinal, Position), End> {
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
    pub(super) fn close(&mut self) {
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
}
