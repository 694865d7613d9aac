//! A protected disk as pack, scan and send see it: its records, its blocks, and what was acknowledged.
//!
//! Capture implements [`Source`]; nothing behind this module knows how a write was caught.
//!
//! *Consistency.* The disk holds a record before the log does ("logged after disk completion"), so a read of the disk
//! that starts after [`LogState::logged`] was asked sees every record up to it. A mark is logged while no write is in
//! flight. Positions are proven by their hash, never by numbers alone.
//!
//! *Retries.* None here; every error names what to do next ([`SourceError`]).
//!
//! *Cancellation.* Nothing here waits for longer than a disk or the log takes. Who wants to know when there is more
//! registers a [`Watcher`].
//!
//! *Crash.* What must still be scanned is durable before a call that adds to it returns. What was acknowledged, and what
//! was scanned, may be forgotten (it is sent again), but a log is deleted only once the cursor that allows it is durable.

use std::io;
use std::sync::Weak;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use tidemark_base::disk::Disk;
use tidemark_base::sync::Mutex;
use tidemark_base::{DiskId, Epoch, Extent, ExtentSet, Generation, HistoryHash, MachineId, Position, Sequence};
use tidemark_base::{ServerId, Timestamp};
use tidemark_proto::replication::Mark;

/// The most data that one record holds. A longer write is logged as several records: a reader verifies a record as a
/// whole, and this bounds what it holds in memory for a few bytes of it.
pub const RECORD_BYTES_MAX: u64 = 256 << 10;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SourceIdentity {
    pub disk: DiskId,
    pub machine: MachineId,
    pub generation: Generation,
    pub disk_bytes: u64,
}

/// What the log holds at one instant; everything in it was true together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LogState {
    pub logged: Position,
    /// The newest mark of this epoch. In interval mode marks are made once a cycle (and on demand), with the rotation
    /// of the log: whoever ships whole cycles ships up to here.
    pub marked: Option<Position>,
    /// When the newest record was logged; the source's wall clock when there is none. Never decreases.
    pub time: Timestamp,
    /// Grows whenever something was added to what must be scanned. An addition is visible here before any mark that
    /// was made after it, so that no mark is taken for a point while its blocks are unknown.
    pub scan_revision: ScanRevision,
    /// Writes are logged. Otherwise what changes is known as blocks only: no mark follows what is logged, and nobody
    /// can say up to when the log tells all.
    pub is_logging: bool,
    /// The disk was detached, or is about to be: nothing is logged any more.
    pub closed: bool,
}

/// Counts additions to what must be scanned; 0 is before the first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct ScanRevision(pub u64);

/// One record of the log.
#[derive(Clone, PartialEq, Debug)]
pub struct Record {
    pub sequence: Sequence,
    /// The running hash up to and including this record.
    pub hash: HistoryHash,
    pub time: Timestamp,
    /// The wall clock had to be held back or jumped at this record.
    pub clock_stepped: bool,
    pub body: RecordBody,
}

#[derive(Clone, PartialEq, Debug)]
pub enum RecordBody {
    Write { extent: Extent, data: DataRef },
    Zeroes { extent: Extent },
    Mark(Box<Mark>),
}

/// Where the data of a write lies in the log. The order is the order on the media.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DataRef {
    /// Which of the disk's logs, in the order in which they were made.
    pub log: u64,
    pub offset: u64,
    /// At most [`RECORD_BYTES_MAX`].
    pub length: u32,
    /// What the stored bytes are verified against.
    pub hash: [u8; 32],
}

/// Where a position lies, seen from the log.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Located {
    /// In this epoch, with the same hash, and every record after it can be read.
    Here,
    /// In this epoch, past what is logged.
    Ahead,
    /// In this epoch, and records after it are gone. A source that drops records which a consumer did not acknowledge
    /// ends the epoch, so this is seen of positions behind the cursor only.
    Gone,
    /// In this epoch, with another hash.
    Differs,
    /// In an epoch that this source ended. What changed after each consumer's cursor in it is in that consumer's scan.
    Earlier,
    /// In an epoch that this source never had, or forgot.
    Unknown,
}

/// Why blocks must be read from the disk instead of the log.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, serde::Serialize, serde::Deserialize)]
pub enum ScanReason {
    /// The consumer holds nothing yet: what it does not get reads as zeroes there. All other reasons lose this one
    /// when they are added to it.
    Initial,
    /// The agent or the machine crashed: the intent regions.
    Unclean,
    /// A write failed, or was not logged because the log was at its limit.
    Dirty,
    /// Records of the log cannot be read back.
    LogDamaged,
    /// The consumer's history is not ours.
    Diverged,
    /// An operator asked for it.
    Requested,
    /// The consumer cannot read back what it stored, and asked for it.
    Repair,
    /// A tracker saw writes somewhere in these granules.
    Tracked,
}

impl ScanReason {
    /// Most of what is scanned for this reason is expected to be the same there: it is compared, and only what differs
    /// is sent. What is known to differ is sent at once.
    pub fn compares(self) -> bool {
        match self {
            ScanReason::Unclean
            | ScanReason::LogDamaged
            | ScanReason::Diverged
            | ScanReason::Requested
            | ScanReason::Tracked => true,
            ScanReason::Initial | ScanReason::Dirty | ScanReason::Repair => false,
        }
    }

    /// The reason of a scan that goes on for both: comparing what differs costs a second read of it, sending what is the
    /// same may cost the whole disk.
    pub fn joined(self, other: Option<ScanReason>) -> ScanReason {
        match other {
            None | Some(ScanReason::Initial) => self,
            Some(other) if self == ScanReason::Initial || other.compares() => other,
            Some(_) => self,
        }
    }
}

/// What must be read from the disk for one consumer.
#[derive(Clone, Debug)]
pub struct PendingScan {
    pub extents: ExtentSet,
    /// `None` when nothing is pending.
    pub reason: Option<ScanReason>,
    /// What was added after this is not in `extents`.
    pub revision: ScanRevision,
}

/// The extents of one [`PendingWindow`]: bounds what a scan of a scattered bitmap holds in memory.
pub const WINDOW_EXTENTS_MAX: usize = 4096;

/// A stretch of what must be read from the disk for one consumer.
#[derive(Clone, Debug)]
pub struct PendingWindow {
    /// At most [`WINDOW_EXTENTS_MAX`].
    pub extents: ExtentSet,
    /// `None` when nothing is pending.
    pub reason: Option<ScanReason>,
    /// What was added after this is not in `extents`.
    pub revision: ScanRevision,
    /// There may be more from here on.
    pub next: Option<u64>,
}

impl PendingWindow {
    /// The stretch that begins at `from`.
    pub fn of(pending: &PendingScan, from: u64) -> Self {
        let mut all = pending.extents.overlapping(Extent::new(from, u64::MAX - from));
        let extents: ExtentSet = all.by_ref().take(WINDOW_EXTENTS_MAX).collect();
        let next = all.next().map(|extent| extent.offset);
        Self { extents, reason: pending.reason, revision: pending.revision, next }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, serde::Serialize, serde::Deserialize)]
pub enum EpochReason {
    /// The tail of the log was lost, or writes may have happened unseen.
    Unclean,
    /// A consumer's history is not ours.
    Diverged,
    /// A consumer begins and the log no longer reaches back to the epoch's start.
    NewConsumer,
    /// Records of the log do not follow from each other any more.
    LogDamaged,
}

#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The log was stepped down or removed: what these records held is in the consumer's scan.
    #[error("records of disk {disk} after {after} are no longer in the log")]
    Gone { disk: DiskId, after: Position },
    /// The stored bytes of these writes do not match their hashes, or cannot be read.
    #[error("the log of disk {disk} cannot be read back at {extents:?}")]
    Damaged { disk: DiskId, extents: Vec<Extent> },
    /// The records themselves do not follow from each other any more: which blocks changed is unknown.
    #[error("the log of disk {disk} is damaged after {after}")]
    History { disk: DiskId, after: Position },
    /// Writes stayed in flight for too long for a mark; the next try may succeed.
    #[error("disk {disk} is too busy for a mark")]
    Busy { disk: DiskId },
    #[error("disk {disk} was detached")]
    Closed { disk: DiskId },
    #[error("cannot {what} of disk {disk}")]
    Io { disk: DiskId, what: &'static str, source: io::Error },
}

impl SourceError {
    /// What an operator should do, or know.
    pub fn help(&self) -> &'static str {
        match self {
            SourceError::Gone { .. } => "nothing: the blocks are read from the disk instead",
            SourceError::Damaged { .. } | SourceError::History { .. } => {
                "the blocks are read from the disk instead; check the medium that holds the log"
            }
            SourceError::Busy { .. } => "nothing: it is tried again",
            SourceError::Closed { .. } => "attach the disk again to go on",
            SourceError::Io { .. } => "see the system's message; check the disk and the folder that holds its log",
        }
    }
}

/// A protected disk. One object for as long as it is attached; shared by its consumers.
pub trait Source: Send + Sync {
    fn identity(&self) -> SourceIdentity;

    /// What the guest sees. Only read here.
    fn disk(&self) -> &dyn Disk;

    fn state(&self) -> LogState;

    /// The epochs of this disk that are remembered, oldest first, with the current one last.
    fn epochs(&self) -> Vec<Epoch>;

    /// Registers who is woken when something was logged, a mark was made, a scan was added, or the disk is closed.
    fn watch(&self, watcher: Weak<Watcher>);

    fn locate(&self, position: &Position) -> Result<Located, SourceError>;

    /// A reader of the records after a position that [`Source::locate`] found to be [`Located::Here`].
    fn read_after(&self, position: &Position) -> Result<Box<dyn RecordReader>, SourceError>;

    /// Reads the data of writes, each whole, back to back into `buffer` (whose length is their sum), and verifies each
    /// against its hash. The caller gives them in order, so that neighbours in the log cost one system call. All that
    /// cannot be read back is named at once.
    fn read_data(&self, data: &[DataRef], buffer: &mut [u8]) -> Result<(), ReadDataError>;

    /// The highest position that the consumer acknowledged.
    fn cursor(&self, consumer: ServerId) -> Option<Position>;

    /// The consumer holds everything up to `position` durably: logs before it may go, as far as other consumers are
    /// concerned as well. Becomes durable within a second or so; only the first one of an epoch waits for it.
    fn acknowledged(&self, consumer: ServerId, position: Position) -> Result<(), SourceError>;

    /// What must be scanned for the consumer and was added after `newer_than`.
    fn pending_scan(&self, consumer: ServerId, newer_than: ScanRevision) -> Result<PendingScan, SourceError>;

    /// The same, a stretch at a time, beginning at `from`.
    fn pending_window(
        &self,
        consumer: ServerId,
        newer_than: ScanRevision,
        from: u64,
    ) -> Result<PendingWindow, SourceError> {
        Ok(PendingWindow::of(&self.pending_scan(consumer, newer_than)?, from))
    }

    /// How much of the disk must be scanned for the consumer.
    fn pending_bytes(&self, consumer: ServerId) -> Result<u64, SourceError> {
        Ok(self.pending_scan(consumer, ScanRevision(0))?.extents.total_bytes())
    }

    /// Adds to what must be scanned. Durable when it returns.
    fn require_scan(&self, consumer: ServerId, extents: &ExtentSet, reason: ScanReason) -> Result<(), SourceError>;

    /// The consumer holds `extent` durably as it was read after `seen` was asked; what was added later stays.
    fn scanned(&self, consumer: ServerId, extent: Extent, seen: ScanRevision) -> Result<(), SourceError>;

    /// Whether everything that was written before now is logged: then the newest position stands for now.
    fn is_complete(&self) -> bool {
        true
    }

    /// Makes a mark on every disk of the machine and returns its position on this one: the end of a scan.
    fn barrier(&self) -> Result<Position, SourceError>;

    /// Ends the current epoch at an instant at which no write is in flight and begins a new one, durable when it returns.
    /// For each consumer, what was logged after its cursor is added to its scan first; where the log cannot be read back
    /// ([`EpochReason::LogDamaged`]), everything that it may have held. Returns the new epoch's start.
    fn new_epoch(&self, reason: EpochReason) -> Result<Position, SourceError>;
}

/// Reads records in order.
pub trait RecordReader: Send {
    /// Appends the records that follow, up to and including sequence `until` and not more than `count`. Nothing is
    /// appended at the end of the log.
    fn read(&mut self, until: Sequence, count: usize, into: &mut Vec<Record>) -> Result<(), SourceError>;
}

/// Why data could not be read back: which of the asked, by index.
#[derive(Debug, thiserror::Error)]
pub enum ReadDataError {
    /// These do not match their hashes or cannot be read; the others were read.
    #[error("the stored data of {} writes cannot be read back", .indices.len())]
    Damaged { indices: Vec<usize> },
    /// The log that held them was removed while it was read.
    #[error("the log was removed")]
    Gone,
}

/// Wakes one consumer when its source has more. Costs one load while nobody waits.
pub struct Watcher {
    armed: AtomicBool,
    wake: Box<dyn Fn() + Send + Sync>,
}

impl Watcher {
    /// `wake` is called on the thread that logged; it must not block.
    pub fn new(wake: impl Fn() + Send + Sync + 'static) -> Self {
        Self { armed: AtomicBool::new(false), wake: Box::new(wake) }
    }

    /// To be called *before* asking for [`Source::state`] and waiting because of what it said: whatever was logged after
    /// that state was made wakes.
    pub fn arm(&self) {
        self.armed.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    pub fn disarm(&self) {
        self.armed.store(false, Ordering::SeqCst);
    }

    /// To be called by the source *after* its state changed. Wakes at most once per [`Watcher::arm`].
    pub fn changed(&self) {
        // Pairs with the fence in `arm`: either this load sees the arming, or the armed one's look at the state sees the change.
        fence(Ordering::SeqCst);
        if self.armed.load(Ordering::Relaxed) && self.armed.swap(false, Ordering::SeqCst) {
            (self.wake)();
        }
    }
}

/// The watchers of one source.
#[derive(Default)]
pub struct Watchers {
    list: Mutex<Vec<Weak<Watcher>>>,
}

impl Watchers {
    pub fn add(&self, watcher: Weak<Watcher>) {
        let mut list = self.list.lock().expect("no panic while held");
        list.retain(|watcher| watcher.strong_count() > 0);
        list.push(watcher);
    }

    /// To be called after the source's state changed, without its locks.
    pub fn changed(&self) {
        for watcher in self.list.lock().expect("no panic while held").iter() {
            if let Some(watcher) = watcher.upgrade() {
                watcher.changed();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn a_watcher_wakes_once_per_arming() {
        let count = Arc::new(AtomicUsize::new(0));
        let watcher = Arc::new(Watcher::new({
            let count = count.clone();
            move || {
                count.fetch_add(1, Ordering::SeqCst);
            }
        }));
        let watchers = Watchers::default();
        watchers.add(Arc::downgrade(&watcher));
        watchers.changed();
        assert_eq!(count.load(Ordering::SeqCst), 0);
        watcher.arm();
        watchers.changed();
        watchers.changed();
        assert_eq!(count.load(Ordering::SeqCst), 1);
        drop(watcher);
        watchers.changed();
    }
}
