//! The emitter's thread: one stream after another, and what to do when one ends.

use std::sync::Arc;
use std::time::Duration;

use tidemark_base::Timestamp;
use tidemark_base::chunk::ChunkKey;
use tidemark_base::error::with_causes;
use tidemark_base::time::Instant;
use tidemark_proto::replication::{Refusal, RefusalReason};

use super::backoff::Backoff;
use super::link::{LinkError, Traffic};
use super::session::{End, Session};
use super::status::{Phase, Problem};
use super::throttle::Throttle;
use super::{SenderConfig, Shared};
use crate::pack::{Budget, Level};
use crate::source::{EpochReason, ScanReason, ScanRevision, Source, SourceError, Watcher};

/// What outlives a stream.
pub(super) struct Emitter {
    pub source: Arc<dyn Source>,
    pub config: SenderConfig,
    pub shared: Arc<Shared>,
    pub key: ChunkKey,
    pub live_budget: Budget,
    pub scan_budget: Budget,
    /// Tells that a job is finished, or that bytes of a budget came back.
    pub wake: Arc<dyn Fn() + Send + Sync>,
    pub watcher: Arc<Watcher>,
    pub live_level: Level,
    pub scan_level: Level,
    pub throttle: Throttle,
    /// The next stream is for a scan, although nothing may be pending: only its end is missing.
    pub scan_wanted: bool,
    /// Times of cuts never decrease.
    pub last_time: Timestamp,
    pub backoff: Backoff,
}

/// What follows a stream.
enum Next {
    Stop,
    Pause,
    Again,
    Retry(Duration, Problem),
    Halt(Problem),
}

impl Emitter {
    pub fn new(source: Arc<dyn Source>, config: SenderConfig, shared: Arc<Shared>) -> Self {
        let identity = source.identity();
        let inbox = shared.inbox.clone();
        let wake: Arc<dyn Fn() + Send + Sync> = Arc::new(move || inbox.wake());
        let budget = |bytes| {
            let wake = wake.clone();
            Budget::new(bytes, move || wake())
        };
        let watcher = Arc::new(Watcher::new({
            let wake = wake.clone();
            move || wake()
        }));
        source.watch(Arc::downgrade(&watcher));
        let limits = config.limits;
        Self {
            key: ChunkKey::new(identity.disk, identity.generation),
            live_budget: budget(limits.live_bytes_max),
            scan_budget: budget(limits.scan_bytes_max),
            live_level: Level::live(config.policy.compression),
            scan_level: Level::scan(config.policy.compression),
            throttle: Throttle::new(config.policy.bytes_per_second_max, Instant::now()),
            scan_wanted: false,
            last_time: Timestamp(0),
            backoff: Backoff::new(limits.backoff_min, limits.backoff_max),
            wake,
            watcher,
            source,
            config,
            shared,
        }
    }

    pub fn run(mut self) {
        let identity = self.source.identity();
        let span = tracing::info_span!("send", disk = %identity.disk, consumer = %self.config.consumer);
        let _entered = span.enter();
        loop {
            let control = self.shared.control();
            let next = if control.stop {
                Next::Stop
            } else if control.paused {
                Next::Pause
            } else {
                self.set_phase(Phase::Connecting);
                let end = self.traffic().map_or_else(End::Source, |traffic| Session::run(&mut self, traffic));
                self.follow(end)
            };
            match next {
                Next::Stop => break,
                Next::Again => {}
                Next::Pause => {
                    self.set_phase(Phase::Paused);
                    self.sleep_until(None, control.resumed);
                }
                Next::Retry(wait, problem) => {
                    tracing::warn!(problem = problem.message, "stream ended; it is opened again");
                    self.tell(Phase::Retrying, problem);
                    self.sleep_until(Some(Instant::now() + wait), control.resumed);
                }
                Next::Halt(problem) => {
                    tracing::error!(problem = problem.message, help = problem.help, "sending halted");
                    self.tell(Phase::Halted, problem);
                    self.sleep_until(None, control.resumed);
                }
            }
        }
        self.set_phase(Phase::Stopped);
    }

    fn set_phase(&self, phase: Phase) {
        self.shared.set_status(|status| status.phase = phase);
    }

    fn tell(&self, phase: Phase, problem: Problem) {
        self.shared.set_status(|status| {
            status.phase = phase;
            status.problem = Some(problem);
        });
    }

    /// Waits for the deadline, a stop, or a call of `resume` that came after `resumed` were counted.
    fn sleep_until(&self, deadline: Option<Instant>, resumed: u64) {
        loop {
            let control = self.shared.control();
            let now = Instant::now();
            if control.stop || control.resumed != resumed || deadline.is_some_and(|deadline| now >= deadline) {
                return;
            }
            self.shared.inbox.wait(deadline.unwrap_or(now + Duration::from_secs(3600)));
            while self.shared.inbox.take().is_some() {}
        }
    }

    /// Which connection the next stream belongs on.
    fn traffic(&self) -> Result<Traffic, SourceError> {
        let consumer = self.config.consumer;
        let scan = self.scan_wanted
            || self.source.cursor(consumer).is_none()
            || !self.source.pending_scan(consumer, ScanRevision(0))?.extents.is_empty();
        Ok(if scan { Traffic::Scan } else { Traffic::Live })
    }

    fn follow(&mut self, end: End) -> Next {
        match end {
            End::Stopped => Next::Stop,
            End::Paused => Next::Pause,
            End::Again => Next::Again,
            End::Link(error) => Next::Retry(self.backoff.wait(), problem_of_link(&error)),
            End::Refused(refusal) => self.refused(refusal),
            End::Source(SourceError::Closed { .. }) => Next::Stop,
            End::Source(error) => {
                let problem = Problem { message: with_causes(&error), help: error.help().to_owned(), refusal: None };
                match self.heal(error) {
                    Ok(()) => Next::Retry(self.backoff.wait(), problem),
                    // Someone must act first, or time must pass. A scan that cannot end would otherwise begin again at once.
                    Err(error) => Next::Retry(
                        self.backoff.wait().max(self.config.limits.backoff_max / 4),
                        Problem { message: with_causes(&error), help: error.help().to_owned(), refusal: None },
                    ),
                }
            }
            End::Failed(problem) => Next::Retry(self.backoff.wait(), problem),
        }
    }

    /// What the log cannot tell any more, the disk can.
    fn heal(&mut self, error: SourceError) -> Result<(), SourceError> {
        let consumer = self.config.consumer;
        match error {
            SourceError::Damaged { extents, .. } => {
                self.scan_wanted = true;
                self.source.require_scan(consumer, &extents.into_iter().collect(), ScanReason::LogDamaged)
            }
            SourceError::History { .. } => {
                // Which blocks the log told of is not known here: the source adds what it may have held.
                self.scan_wanted = true;
                self.source.new_epoch(EpochReason::LogDamaged).map(drop)
            }
            _ => Ok(()),
        }
    }

    fn refused(&mut self, refusal: Refusal) -> Next {
        let problem = Problem { message: refusal.message, help: refusal.help, refusal: Some(refusal.reason) };
        match refusal.reason {
            // Only an operator, or another decision about this disk, changes these.
            RefusalReason::NotAuthorised
            | RefusalReason::Generation
            | RefusalReason::Fenced
            | RefusalReason::SizeChanged
            | RefusalReason::Version => Next::Halt(problem),
            // The server may not have heard of the disk yet; room must be made; a store must be opened again.
            RefusalReason::UnknownDisk | RefusalReason::NoRoom | RefusalReason::StoreFailed => {
                Next::Retry(self.backoff.wait().max(self.config.limits.backoff_max / 4), problem)
            }
            // What is sent next is decided anew from what the server says that it holds.
            RefusalReason::Gap
            | RefusalReason::History
            | RefusalReason::Damaged
            | RefusalReason::Protocol
            | RefusalReason::Stopping => Next::Retry(self.backoff.wait(), problem),
        }
    }
}

fn problem_of_link(error: &LinkError) -> Problem {
    Problem { message: error.to_string(), help: error.help().to_owned(), refusal: None }
}
