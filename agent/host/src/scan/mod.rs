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
//! Where most blocks are expected to be the same at the consumer ([`ScanReason::compares`]) hashes are sent instead of data, and data
//! only of what differs: see [`compare`]. A question takes the place of a chunk in both rules.
//!
//! *Retries.* A block that cannot be read ends the stream with an error that names it; the scan goes on from what is
//! still pending when the stream is opened again. *Cancellation.* Dropping a [`Scan`] cancels its reads. *Crash.* What
//! is pending is the source's to remember; it shrinks only by [`Source::scanned`] after a durable acknowledgement, and not
//! where something was added since the read was submitted ([`ScanRevision`]).

mod compare;
mod todo;

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tidemark_base::chunk::{ChunkKey, Compression};
use tidemark_base::compare::{BLOCK_BYTES, CompareKey, piece_count};
use tidemark_base::disk::Allocation;
use tidemark_base::time::Instant;
use tidemark_base::{Extent, ExtentSet, Position, SECTOR_BYTES, Sequence, ServerId, sabotage};
use tidemark_proto::replication::{Differing, Hashes, QUESTION_BLOCKS_MAX};

use crate::pack::{self, Budget, Lost, PackError, Permit, Priority, Sealed, Ticket, Workers, ZeroPolicy};
use crate::source::{PendingWindow, ScanReason, ScanRevision, Source, SourceError};
use compare::Compare;
use todo::Todo;

/// Ranges that one read gathers from a scattered scan.
const READ_EXTENTS_MAX: usize = 128;
/// The same of a question: each is a run of it, and zeroes among data make more.
const QUESTION_EXTENTS_MAX: usize = 64;
/// What one question asks about a hole, so that its answer is never far away.
const QUESTION_HOLE_BYTES_MAX: u64 = 64 << 30;
/// Differing blocks that wait to be read again: while there are more, nothing else is asked.
const DIFFERING_BYTES_MAX: u64 = 32 << 20;
/// What was settled without a frame is told with a cut of its own when it is so much, or so old: a scan that is cut short
/// begins again from there.
const COVERED_BYTES_MAX: u64 = 256 << 20;
const COVERED_AGE_MAX: Duration = Duration::from_secs(1);
/// Ranges that one cut settles at most without their frames.
const COVERED_EXTENTS_MAX: usize = 4096;

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
    /// Hashes are sent instead of data.
    pub compares: bool,
    /// What was asked about and answered, holes included.
    pub compared_bytes: u64,
    /// Of it, what was the same, and what was sent because it was not.
    pub equal_bytes: u64,
    pub differing_bytes: u64,
}

/// One scan of one stream.
pub struct Scan {
    todo: Todo,
    /// Blocks that differ at the consumer.
    differing: ExtentSet,
    reason: ScanReason,
    seen: ScanRevision,
    /// The run of one kind that the next block lies in, as far as it was asked for.
    run: Option<(Extent, Allocation)>,
    reads: VecDeque<Read>,
    compare: Option<Compare>,
    covered: Covered,
    progress: ScanProgress,
}

/// Covered without a frame: holes of an empty replica, reads that records replaced altogether, blocks that are the same.
#[derive(Default)]
struct Covered {
    list: Vec<Scanned>,
    bytes: u64,
    since: Option<Instant>,
}

struct Read {
    plan: Plan,
    /// What was logged before it was planned: all of it is on the disk.
    logged: Position,
    seen: ScanRevision,
    touched: ExtentSet,
    /// It was found to differ; of its parts that were to be left out, records or chunks left since for these.
    differs: bool,
    overwritten: ExtentSet,
    /// The frame, and what was left out of it because the consumer holds it.
    ticket: Ticket<Result<(Sealed, Vec<Extent>), PackError>>,
    permit: Permit,
}

/// Everything that was logged before a read was sent.
fn may_follow(logged: &Position, sent: &Position) -> bool {
    sent.epoch == logged.epoch && (sent.sequence >= logged.sequence || sabotage::is("scan-wait"))
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

/// What a plan may hold.
struct PlanLimits {
    raw_bytes: u64,
    blocks: u64,
    extents: usize,
    hole_bytes: u64,
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
    /// Everything that is pending for a consumer, as `first` began to say. With `compare` it is compared.
    pub fn new(consumer: ServerId, first: &PendingWindow, total_bytes: u64, compare: Option<CompareKey>) -> Self {
        Self {
            todo: Todo::new(consumer),
            differing: ExtentSet::new(),
            // Nothing pending: only the barrier is missing, and no zeroes may be assumed.
            reason: first.reason.unwrap_or(ScanReason::Requested),
            seen: first.revision,
            run: None,
            reads: VecDeque::new(),
            progress: ScanProgress { total_bytes, compares: compare.is_some(), ..ScanProgress::default() },
            compare: compare.map(Compare::new),
            covered: Covered::default(),
        }
    }

    /// The first stretch of what was added to the source's pending scan after `newer_than`.
    pub fn add(&mut self, newer_than: ScanRevision, window: &PendingWindow) {
        self.fetched(window);
        self.progress.total_bytes += window.extents.total_bytes();
        self.todo.add(newer_than, window);
    }

    fn fetched(&mut self, window: &PendingWindow) {
        self.seen = self.seen.max(window.revision);
        if let Some(reason) = window.reason {
            self.reason = if self.reason == ScanReason::Initial { reason } else { self.reason };
        }
    }

    pub fn progress(&self) -> ScanProgress {
        self.progress
    }

    pub fn durable(&mut self, bytes: u64) {
        self.progress.durable_bytes += bytes;
    }

    /// Everything was read and emitted, and every question answered.
    pub fn is_read(&self) -> bool {
        self.todo.is_empty()
            && self.differing.is_empty()
            && self.reads.is_empty()
            && self.compare.as_ref().is_none_or(Compare::is_idle)
    }

    /// A record was emitted.
    pub fn touched(&mut self, extent: Extent, sequence: Sequence) {
        if sabotage::is("scan-cut-out") {
            return;
        }
        for read in self.reads.iter_mut().filter(|read| sequence > read.logged.sequence) {
            let Read { plan, touched, .. } = read;
            plan.extents().filter_map(|of| of.intersection(&extent)).for_each(|part| touched.insert(part));
        }
        self.overwritten(extent);
        if let Some(compare) = &mut self.compare {
            compare.touched(extent, sequence);
        }
    }

    /// The consumer holds something else there from now on, whatever a read saw.
    fn overwritten(&mut self, extent: Extent) {
        for read in self.reads.iter_mut().filter(|read| read.differs) {
            let Read { plan, overwritten, .. } = read;
            plan.blocks.iter().filter_map(|of| of.intersection(&extent)).for_each(|part| overwritten.insert(part));
        }
        if let Some(compare) = &mut self.compare {
            compare.overwritten(extent);
        }
    }

    /// What was covered without a frame, for the cut that is about to end.
    pub fn take_covered(&mut self) -> Vec<Scanned> {
        self.covered.since = None;
        self.covered.bytes = 0;
        std::mem::take(&mut self.covered.list)
    }

    /// Enough was covered without a frame to be told by itself.
    pub fn covered_is_due(&self, now: Instant) -> bool {
        let Covered { list, bytes, since } = &self.covered;
        *bytes >= COVERED_BYTES_MAX
            || list.len() >= COVERED_EXTENTS_MAX
            || since.is_some_and(|since| now.saturating_duration_since(since) >= COVERED_AGE_MAX)
    }

    /// Notes what needs no frame.
    fn cover(&mut self, extents: impl IntoIterator<Item = Scanned>) {
        for scanned in extents {
            self.progress.read_bytes += scanned.extent.length;
            self.covered.bytes += scanned.extent.length;
            self.covered.since.get_or_insert_with(Instant::now);
            match self.covered.list.last_mut() {
                Some(last) if last.extent.end() == scanned.extent.offset && last.seen == scanned.seen => {
                    last.extent.length += scanned.extent.length;
                }
                _ => self.covered.list.push(scanned),
            }
        }
    }

    /// Submits reads as far as the budget allows: what differs first, then what comes next.
    pub fn submit(&mut self, tools: &ReadTools<'_>) -> Result<(), ScanFailure> {
        loop {
            if let Some(window) = self.todo.refill(tools.source.as_ref())? {
                self.fetched(&window);
            }
            let asks = self.compare.as_ref().is_some_and(|compare| !compare.is_suspended());
            let differs = !self.differing.is_empty();
            if !differs && (self.todo.extents.is_empty() || asks) {
                break;
            }
            let raw_bytes = pack::frame_raw_bytes(tools.compression);
            // Asked for before the plan: a plan must be submitted, or its holes would be older than they say.
            let Some(permit) = tools.budget.take(pack::job_bytes(raw_bytes)) else { break };
            let limits = PlanLimits { raw_bytes, blocks: u64::MAX, extents: READ_EXTENTS_MAX, hole_bytes: u64::MAX };
            // Before holes are asked for and blocks are read.
            let logged = tools.source.state().logged;
            let plan = self.plan(tools.source.as_ref(), differs, &limits)?;
            if !plan.is_empty() {
                self.read(tools, plan, logged, differs, permit);
            }
        }
        self.submit_questions(tools)
    }

    fn submit_questions(&mut self, tools: &ReadTools<'_>) -> Result<(), ScanFailure> {
        const LIMITS: PlanLimits = PlanLimits {
            raw_bytes: QUESTION_BLOCKS_MAX as u64 * BLOCK_BYTES,
            blocks: QUESTION_BLOCKS_MAX as u64,
            extents: QUESTION_EXTENTS_MAX,
            hole_bytes: QUESTION_HOLE_BYTES_MAX,
        };
        while self.compare.as_ref().is_some_and(|compare| compare.has_room() && !compare.is_suspended())
            && self.differing.total_bytes() < DIFFERING_BYTES_MAX
            && !self.todo.extents.is_empty()
        {
            let logged = tools.source.state().logged;
            let plan = self.plan(tools.source.as_ref(), false, &LIMITS)?;
            let seen = self.seen;
            if let Some(compare) = self.compare.as_mut().filter(|_| !plan.is_empty()) {
                compare.submit(tools, plan, logged, seen);
            }
            if let Some(window) = self.todo.refill(tools.source.as_ref())? {
                self.fetched(&window);
            }
        }
        Ok(())
    }

    /// The oldest read, or the oldest question, has to wait until records left that were logged before it.
    pub fn waits_for_records(&self, sent: &Position) -> bool {
        self.reads.front().is_some_and(|read| !may_follow(&read.logged, sent))
            || self.compare.as_ref().is_some_and(|compare| compare.waits_for_records(sent))
    }

    /// The next question, when one may leave after what was sent: between two cuts, and at once.
    pub fn next_question(&mut self, sent: &Position) -> Result<Option<Hashes>, ScanFailure> {
        while let Some(compare) = &mut self.compare {
            let Poll::Ready(turn) = compare.next(sent, Instant::now()) else { break };
            let compare::Turn { question, again, covered } = turn?;
            again.into_iter().for_each(|extent| self.todo.extents.insert(extent));
            self.cover(covered);
            if question.is_some() {
                return Ok(question);
            }
        }
        Ok(None)
    }

    /// The consumer answered; false when it was not asked.
    pub fn answered(&mut self, differing: &Differing) -> bool {
        let Some(answer) = self.compare.as_mut().and_then(|compare| compare.answered(differing)) else { return false };
        let equal: u64 = answer.same.iter().map(|same| same.extent.length).sum();
        self.progress.equal_bytes += equal;
        self.progress.compared_bytes += equal + answer.different.iter().map(|extent| extent.length).sum::<u64>();
        self.cover(answer.same);
        answer.different.into_iter().for_each(|extent| self.differing.insert(extent));
        true
    }

    /// When the oldest question that is not answered left.
    pub fn asked_since(&self) -> Option<Instant> {
        self.compare.as_ref().and_then(Compare::asked_since)
    }

    /// The oldest read, when it is finished, nothing touched it, and it may follow what was sent. What was touched is
    /// planned again, less what touched it.
    pub fn next(&mut self, tools: &ReadTools<'_>, sent: &Position) -> Poll<Result<Option<ScanFrame>, ScanFailure>> {
        loop {
            let Some(read) = self.reads.pop_front() else {
                if let Err(error) = self.submit(tools) {
                    return Poll::Ready(Err(error));
                }
                return if self.is_read() { Poll::Ready(Ok(None)) } else { Poll::Pending };
            };
            if !may_follow(&read.logged, sent) {
                self.reads.push_front(read);
                return Poll::Pending;
            }
            let (sealed, equal) = match read.ticket.poll() {
                Poll::Pending => {
                    self.reads.push_front(read);
                    return Poll::Pending;
                }
                Poll::Ready(Ok(Ok(sealed))) => sealed,
                Poll::Ready(Ok(Err(error))) => return Poll::Ready(Err(ScanFailure::Read(error))),
                Poll::Ready(Err(Lost)) => return Poll::Ready(Err(ScanFailure::Lost)),
            };
            let Read { plan, seen, touched, differs, overwritten, mut permit, .. } = read;
            if !touched.is_empty() {
                let again = if differs { &mut self.differing } else { &mut self.todo.extents };
                plan.extents().flat_map(|extent| touched.gaps(extent)).for_each(|rest| again.insert(rest));
                self.cover(touched.iter().map(|extent| Scanned { extent, seen }));
                continue;
            }
            // The consumer no longer holds what these were compared with.
            let stale: ExtentSet =
                equal.iter().copied().filter(|part| overwritten.overlapping(*part).next().is_some()).collect();
            stale.iter().for_each(|part| self.differing.insert(part));
            let covers: Vec<_> =
                plan.extents().flat_map(|extent| stale.gaps(extent)).map(|extent| Scanned { extent, seen }).collect();
            let bytes: u64 = covers.iter().map(|covered| covered.extent.length).sum();
            if differs {
                self.count_differing(bytes, equal.iter().map(|part| part.length).sum::<u64>() - stale.total_bytes());
            } else if let Some(compare) = &mut self.compare {
                compare.sent_plain(bytes);
            }
            // Whatever was known of these blocks has served.
            plan.extents().for_each(|extent| self.overwritten(extent));
            if sealed.chunks.is_empty() {
                self.cover(covers);
                continue;
            }
            permit.shrink(sealed.chunks.len().max(FRAME_PERMIT_BYTES_MIN) as u64);
            self.progress.read_bytes += bytes;
            return Poll::Ready(Ok(Some(ScanFrame { sealed, permit, covers })));
        }
    }

    fn count_differing(&mut self, bytes: u64, equal_bytes: u64) {
        self.progress.equal_bytes += equal_bytes;
        self.progress.differing_bytes += bytes - equal_bytes;
        if let Some(compare) = &mut self.compare {
            compare.observe(bytes, equal_bytes);
        }
    }

    fn plan(&mut self, source: &dyn Source, differs: bool, limits: &PlanLimits) -> Result<Plan, ScanFailure> {
        let mut plan = Plan::default();
        let (mut raw, mut blocks) = (0, 0);
        while plan.blocks.len() + plan.holes.len() < limits.extents && raw < limits.raw_bytes && blocks < limits.blocks
        {
            let first = if differs { self.differing.iter().next() } else { self.todo.first() };
            let Some(next) = first else { break };
            let (run, kind) = self.run_at(source, next.offset).map_err(ScanFailure::Read)?;
            let mut part = next.intersection(&run).expect("the run begins where the next block does");
            if kind == Allocation::Data {
                part.length = part.length.min(limits.raw_bytes - raw);
                if limits.blocks != u64::MAX {
                    let end = (part.offset / BLOCK_BYTES + limits.blocks - blocks) * BLOCK_BYTES;
                    part.length = part.length.min(end - part.offset);
                    blocks += piece_count(part, BLOCK_BYTES);
                }
                raw += part.length;
                plan.blocks.push(part);
            } else if self.reason == ScanReason::Initial {
                let seen = self.seen;
                self.cover([Scanned { extent: part, seen }]);
            } else {
                part.length = part.length.min(limits.hole_bytes);
                plan.holes.push(part);
            }
            if differs { self.differing.remove(part) } else { self.todo.extents.remove(part) }
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
        let length = match kind {
            Allocation::Data => length.next_multiple_of(SECTOR_BYTES),
            Allocation::Hole => length - length % SECTOR_BYTES,
        };
        let found = if length == 0 {
            (Extent::new(offset, SECTOR_BYTES), Allocation::Data)
        } else {
            (Extent::new(offset, length), kind)
        };
        self.run = Some(found);
        Ok(found)
    }

    fn read(&mut self, tools: &ReadTools<'_>, plan: Plan, logged: Position, differs: bool, permit: Permit) {
        let zero_policy = if self.reason == ScanReason::Initial { ZeroPolicy::Omit } else { ZeroPolicy::Send };
        let (source, key, compression) = (tools.source.clone(), tools.key.clone(), tools.compression);
        let job = plan.clone();
        let known = self.compare.as_ref().filter(|_| differs);
        let known = known.map(|compare| (compare.key().clone(), compare.held_in(&plan.blocks)));
        let ticket = tools.workers.submit(Priority::Scan, tools.done.clone(), move |worker| {
            let Plan { blocks, holes } = &job;
            match &known {
                Some((compare, held)) => {
                    let what = pack::Differing { key: &key, compare, compression, blocks, holes, held };
                    pack::seal_differing(worker, source.disk(), &what)
                }
                None => pack::seal_blocks(worker, source.disk(), &key, compression, blocks, holes, zero_policy)
                    .map(|sealed| (sealed, Vec::new())),
            }
        });
        let (touched, overwritten) = (ExtentSet::new(), ExtentSet::new());
        self.reads.push_back(Read { plan, logged, seen: self.seen, touched, differs, overwritten, ticket, permit });
    }
}

/// Even a small frame counts for this much of a budget, so that a budget bounds the number of frames as well.
pub const FRAME_PERMIT_BYTES_MIN: usize = 64 << 10;

#[derive(Debug, thiserror::Error)]
pub enum ScanFailure {
    #[error(transparent)]
    Read(PackError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("a worker panicked")]
    Lost,
}
