//! Blocks that are not in the log, read from the disk: initial replication, dirty regions, crash recovery.
//!
//! *Consistency.* The one emitter of the stream both submits reads and emits records. For each read it remembers L, what
//! was logged before the read was planned. A record is logged after its disk completion, so the read sees every record
//! up to L. Two rules follow:
//!
//! 1. *A record after L that is emitted before the chunk is cut out of the chunk*: the read may have missed it, and the
//!    chunk would undo it. [`Scan::touched`] collects such ranges; a read that was touched is not emitted, what was not
//!    touched of it is planned again, holes included (what was a hole may have been written without being logged). It gets
//!    smaller each time, so hot blocks cannot keep it for ever: they travel as records.
//! 2. *No record up to L is emitted after the chunk*: a block may be scanned because a write to it was not logged (it
//!    failed, the log was full). The chunk holds that write; an older record that came after the chunk would undo it,
//!    and no later record would repair that. So a chunk waits until the stream stands at L or later.
//!
//! A range that rule 1 cut out is as good as scanned: the record is newer than whatever made the range dirty up to
//! the revision that the read knew of, because overlapping writes keep one order on disk and in the log.
//!
//! Holes of a disk whose replica reads as zeroes are neither read nor sent, and zeroes found in data are not sent. For
//! any other replica both are sent as extents without data.
//!
//! *Retries.* A block that cannot be read ends the stream with an error that names it; the scan goes on from what is
//! still pending when the stream is opened again. *Cancellation.* Dropping a [`Scan`] cancels its reads. *Crash.* What
//! is pending is the source's to remember; it shrinks only by [`Source::scanned`] after a durable acknowledgement, and not
//! where something was added since the read was submitted ([`ScanRevision`]).

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::Poll;

use tidemark_base::chunk::{ChunkKey, Compression};
use tidemark_base::disk::Allocation;
use tidemark_base::{Extent, ExtentSet, Position, Sequence};

use crate::pack::{self, Budget, Lost, PackError, Permit, Priority, Sealed, Ticket, Workers, ZeroPolicy};
use crate::source::{PendingScan, ScanReason, ScanRevision, Source};

/// Ranges that one read gathers from a scattered scan.
const READ_EXTENTS_MAX: usize = 128;

/// Ranges that can be acknowledged without waiting for a read of their own; more are attached to the next cut.
#[derive(Clone, Debug, PartialEq)]
pub struct Scanned {
    pub extent: Extent,
    pub seen: ScanRevision,
}

/// A frame of blocks, ready to be emitted, with what it covers.
pub struct ScanFrame {
    pub sealed: Sealed,
    pub permit: Permit,
    pub covers: Vec<Scanned>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ScanProgress {
    /// What is to be read, holes included.
    pub total_bytes: u64,
    /// What was read and emitted, or needed neither.
    pub read_bytes: u64,
    /// What the consumer acknowledged.
    pub durable_bytes: u64,
}

/// One scan of one stream.
pub struct Scan {
    todo: ExtentSet,
    reason: ScanReason,
    seen: ScanRevision,
    /// The run of one kind that the next block lies in, as far as it was asked for.
    run: Option<(Extent, Allocation)>,
    reads: VecDeque<Read>,
    /// Covered without a frame: holes of an empty replica, and reads that records replaced altogether.
    covered: Vec<Scanned>,
    progress: ScanProgress,
}

struct Read {
    plan: Plan,
    /// What was logged before it was planned: all of it is on the disk.
    logged: Position,
    seen: ScanRevision,
    touched: ExtentSet,
    ticket: Ticket<Result<Sealed, PackError>>,
    permit: Permit,
}

impl Read {
    /// Everything that was logged before this read was sent.
    fn may_follow(&self, sent: &Position) -> bool {
        let is_behind = sent.sequence < self.logged.sequence && !tidemark_base::sabotage::is("scan-wait");
        sent.epoch == self.logged.epoch && !is_behind
    }
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Plan {
    blocks: Vec<Extent>,
    holes: Vec<Extent>,
}

impl Plan {
    fn is_empty(&self) -> bool {
        self.blocks.is_empty() && self.holes.is_empty()
    }

    fn extents(&self) -> impl Iterator<Item = Extent> {
        self.blocks.iter().chain(&self.holes).copied()
    }
}

/// What reads are made with.
pub struct ReadTools<'a> {
    pub source: &'a Arc<dyn Source>,
    pub workers: &'a Workers,
    pub budget: &'a Budget,
    pub key: &'a ChunkKey,
    pub compression: Compression,
    pub done: &'a Arc<dyn Fn() + Send + Sync>,
}

impl Scan {
    pub fn new(pending: PendingScan) -> Self {
        let total_bytes = pending.extents.total_bytes();
        Self {
            todo: pending.extents,
            // Nothing pending: only the barrier is missing, and no zeroes may be assumed.
            reason: pending.reason.unwrap_or(ScanReason::Requested),
            seen: pending.revision,
            run: None,
            reads: VecDeque::new(),
            covered: Vec::new(),
            progress: ScanProgress { total_bytes, ..ScanProgress::default() },
        }
    }

    /// What was added to the source's pending scan after [`Scan::seen`].
    pub fn add(&mut self, pending: PendingScan) {
        self.seen = pending.revision;
        if let Some(reason) = pending.reason {
            self.reason = if self.reason == ScanReason::Initial { reason } else { self.reason };
        }
        for extent in pending.extents.iter() {
            self.progress.total_bytes += extent.length;
            self.todo.insert(extent);
        }
    }

    pub fn seen(&self) -> ScanRevision {
        self.seen
    }

    pub fn progress(&self) -> ScanProgress {
        self.progress
    }

    pub fn durable(&mut self, bytes: u64) {
        self.progress.durable_bytes += bytes;
    }

    /// Everything was read and emitted.
    pub fn is_read(&self) -> bool {
        self.todo.is_empty() && self.reads.is_empty()
    }

    /// A record was emitted.
    pub fn touched(&mut self, extent: Extent, sequence: Sequence) {
        if tidemark_base::sabotage::is("scan-cut-out") {
            return;
        }
        for read in self.reads.iter_mut().filter(|read| sequence > read.logged.sequence) {
            let Read { plan, touched, .. } = read;
            plan.extents().filter_map(|of| of.intersection(&extent)).for_each(|part| touched.insert(part));
        }
    }

    /// What was covered without a frame since this was last asked.
    pub fn take_covered(&mut self) -> Vec<Scanned> {
        std::mem::take(&mut self.covered)
    }

    /// Submits reads as far as the budget allows.
    pub fn submit(&mut self, tools: &ReadTools<'_>) -> Result<(), PackError> {
        while !self.todo.is_empty() {
            let raw_max = pack::frame_raw_bytes(tools.compression);
            // Asked for before the plan: a plan must be submitted, or its holes would be older than they say.
            let Some(permit) = tools.budget.take(pack::job_bytes(raw_max)) else {
                return Ok(());
            };
            // Before holes are asked for and blocks are read.
            let logged = tools.source.state().logged;
            // Not the revision of this moment: what was added since is read once more, with what is known of it then.
            let seen = self.seen;
            let plan = self.plan(tools.source.as_ref(), seen, raw_max)?;
            if !plan.is_empty() {
                self.read(tools, plan, logged, seen, permit);
            }
        }
        Ok(())
    }

    /// The oldest read has to wait until records left that were logged before it.
    pub fn waits_for_records(&self, sent: &Position) -> bool {
        self.reads.front().is_some_and(|read| !read.may_follow(sent))
    }

    /// The oldest read, when it is finished, nothing touched it, and it may follow what was sent. What was touched is
    /// planned again, less what touched it.
    pub fn next(&mut self, tools: &ReadTools<'_>, sent: &Position) -> Poll<Result<Option<ScanFrame>, ScanFailure>> {
        loop {
            let Some(read) = self.reads.pop_front() else {
                if let Err(error) = self.submit(tools) {
                    return Poll::Ready(Err(ScanFailure::Read(error)));
                }
                return if self.is_read() { Poll::Ready(Ok(None)) } else { Poll::Pending };
            };
            if !read.may_follow(sent) {
                self.reads.push_front(read);
                return Poll::Pending;
            }
            let sealed = match read.ticket.poll() {
                Poll::Pending => {
                    self.reads.push_front(read);
                    return Poll::Pending;
                }
                Poll::Ready(Ok(Ok(sealed))) => sealed,
                Poll::Ready(Ok(Err(error))) => return Poll::Ready(Err(ScanFailure::Read(error))),
                Poll::Ready(Err(Lost)) => return Poll::Ready(Err(ScanFailure::Lost)),
            };
            let Read { plan, seen, touched, mut permit, .. } = read;
            if !touched.is_empty() {
                plan.extents().flat_map(|extent| touched.gaps(extent)).for_each(|rest| self.todo.insert(rest));
                self.cover(touched.iter(), seen);
                continue;
            }
            if sealed.chunks.is_empty() {
                self.cover(plan.extents(), seen);
                continue;
            }
            permit.shrink(sealed.chunks.len().max(FRAME_PERMIT_BYTES_MIN) as u64);
            let covers: Vec<_> = plan.extents().map(|extent| Scanned { extent, seen }).collect();
            self.progress.read_bytes += covers.iter().map(|covered| covered.extent.length).sum::<u64>();
            return Poll::Ready(Ok(Some(ScanFrame { sealed, permit, covers })));
        }
    }

    /// Notes what needs no frame.
    fn cover(&mut self, extents: impl Iterator<Item = Extent>, seen: ScanRevision) {
        for extent in extents {
            self.progress.read_bytes += extent.length;
            self.covered.push(Scanned { extent, seen });
        }
    }

    fn plan(&mut self, source: &dyn Source, seen: ScanRevision, raw_max: u64) -> Result<Plan, PackError> {
        let mut plan = Plan::default();
        let mut raw = 0;
        while plan.blocks.len() + plan.holes.len() < READ_EXTENTS_MAX && raw < raw_max {
            let Some(next) = self.todo.iter().next() else { break };
            let (run, kind) = self.run_at(source, next.offset)?;
            let mut part = next.intersection(&run).expect("the run begins where the next block does");
            if kind == Allocation::Data {
                part.length = part.length.min(raw_max - raw);
                raw += part.length;
                plan.blocks.push(part);
            } else if self.reason == ScanReason::Initial {
                self.cover([part].into_iter(), seen);
            } else {
                plan.holes.push(part);
            }
            self.todo.remove(part);
        }
        Ok(plan)
    }

    /// The run of one kind around `offset`. A run of data is asked for once; a hole each time, because a write may have
    /// filled it since.
    fn run_at(&mut self, source: &dyn Source, offset: u64) -> Result<(Extent, Allocation), PackError> {
        if let Some((run, Allocation::Data)) = self.run
            && run.contains(&Extent::new(offset, 1))
        {
            return Ok((run, Allocation::Data));
        }
        let (length, kind) = source
            .disk()
            .allocation(offset)
            .map_err(|error| PackError::Disk { extent: Extent::new(offset, 0), source: error })?;
        // Runs that end within a sector are rounded so that data wins.
        let sector = tidemark_base::SECTOR_BYTES;
        let length = match kind {
            Allocation::Data => length.next_multiple_of(sector),
            Allocation::Hole => length - length % sector,
        };
        let found = if length == 0 {
            (Extent::new(offset, sector), Allocation::Data)
        } else {
            (Extent::new(offset, length), kind)
        };
        self.run = Some(found);
        Ok(found)
    }

    fn read(&mut self, tools: &ReadTools<'_>, plan: Plan, logged: Position, seen: ScanRevision, permit: Permit) {
        let zero_policy = if self.reason == ScanReason::Initial { ZeroPolicy::Omit } else { ZeroPolicy::Send };
        let (source, key, compression) = (tools.source.clone(), tools.key.clone(), tools.compression);
        let job = plan.clone();
        let ticket = tools.workers.submit(Priority::Scan, tools.done.clone(), move |worker| {
            pack::seal_blocks(worker, source.disk(), &key, compression, &job.blocks, &job.holes, zero_policy)
        });
        self.reads.push_back(Read { plan, logged, seen, touched: ExtentSet::new(), ticket, permit });
    }
}

/// Even a small frame counts for this much of a budget, so that a budget bounds the number of frames as well.
pub const FRAME_PERMIT_BYTES_MIN: usize = 64 << 10;

#[derive(Debug, thiserror::Error)]
pub enum ScanFailure {
    #[error(transparent)]
    Read(PackError),
    #[error("a worker panicked")]
    Lost,
}
