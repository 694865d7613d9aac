//! One stream: from Hello to its end.
//!
//! Its parts, in the order of a stream's life: `opening`, `records` and `blocks` by turns, each in cuts (`cut`), while `answers`
//! come.

mod answers;
mod blocks;
mod cut;
mod opening;
mod records;

use std::collections::VecDeque;

use tidemark_base::error::with_causes;
use tidemark_base::time::Instant;
use tidemark_base::{Position, Sequence};
use tidemark_proto::replication::{Close, Credit, CutKind, CutOrdinal, Refusal};

use super::emitter::Emitter;
use super::link::{LinkError, LinkStream, Traffic};
use super::status::Problem;
use super::{Control, SendLimits, ShipMode};
use crate::pack::{PackError, Records, Waits};
use crate::scan::Scan;
use crate::source::{LogState, ScanRevision, SourceError};
use cut::{CutDetails, OpenCut, UnderWay};
#[cfg(test)]
pub(super) use records::BATCH_READ_BYTES_MAX;

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
            if room
                && now >= next_heartbeat
                && state.logged == self.sent
                && state.is_logging
                && self.emitter.source.is_complete()
            {
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
        let window = self.emitter.source.pending_window(self.emitter.config.consumer, self.scan_seen, 0)?;
        let newer_than = std::mem::replace(&mut self.scan_seen, window.revision);
        if window.extents.is_empty() {
            return Ok(());
        }
        match &mut self.scan {
            Some(scan) => {
                scan.add(newer_than, &window);
                // A mark made before the addition was seen may not be the end of the scan.
                self.barrier = None;
                Ok(())
            }
            // The replica is not consistent from here on, which begins with a SCAN_START on a stream for scans.
            None => Err(End::Again),
        }
    }
}

fn protocol(reason: &str) -> End {
    End::Link(LinkError::Protocol { reason: reason.to_owned() })
}

fn read_failed(error: &PackError) -> End {
    End::Failed(Problem {
        message: with_causes(error),
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
