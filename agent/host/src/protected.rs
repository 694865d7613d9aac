//! One protected disk, from attach to detach: everything that capture, marks and senders share.
//!
//! *Consistency.* {what a consumer lacks} ⊆ {records after its cursor} ∪ {its scan bitmap} ∪ {the dirty bitmap} ∪ {slots} ∪
//! {intent regions}, at every instant and after every crash. *Retries.* The keeper ([`ProtectedDisk::tick`]) tries to
//! return to the log every second while the disk is in bitmap mode. *Cancellation.* [`ProtectedDisk::detach`] drains and
//! leaves a clean mark; dropping without it is what a crash is. *Crash.* [`crate::attach`].

mod epoch;
mod keeper;
mod source;
pub(crate) mod tracked;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tidemark_base::disk::{Disk, FileDisk};
use tidemark_base::storage::Storage;
use tidemark_base::sync::{Mutex, MutexGuard};
use tidemark_base::time::Instant;
use tidemark_base::{Clock, DiskId, Epoch, Extent, ExtentSet, Position, ServerId, Timestamp};
use tidemark_proto::control::Problem;

use crate::capture::gap;
use crate::capture::in_flight::{Hold, InFlight};
use crate::capture::tracker::Tracker;
use crate::consumer::Consumer;
use crate::events::{DiskEvents, EventKind, Severity};
use crate::log::{DiskLog, LogLimits, Unlogged};
use crate::source::{ScanReason, ScanRevision, SourceError, SourceIdentity, Watchers};
use crate::state::dirty::{DirtyBitmap, GRANULE_BYTES};
use crate::state::intent::{Intent, Tick};
use crate::state::sealed::SealedFile;
use crate::state::session::{EPOCHS_MAX, Mode, Session, SessionFile};
pub(crate) use keeper::Keeper;

/// How long a hold waits for the writes in flight. Then the disk is released, and held again a little later.
pub const HOLD_LIMIT: Duration = Duration::from_millis(50);
/// How often a hold is tried before whoever wanted it is told that the disk is busy.
pub const HOLD_ATTEMPTS: u32 = 40;

const HELP_ROOM: &str = "make room in the log's folder; changed blocks are tracked meanwhile";

/// What went wrong and still is: shown by `status`.
pub type Alarms = BTreeMap<&'static str, Problem>;

/// Makes a mark on every disk of the machine that a disk belongs to.
pub trait Barrier: Send + Sync {
    fn barrier(&self) -> Result<Vec<(tidemark_base::DiskId, Position)>, SourceError>;
}

pub struct ProtectedDisk {
    pub(crate) identity: SourceIdentity,
    pub(crate) path: PathBuf,
    pub(crate) disk: Arc<FileDisk>,
    /// The folder beside the disk.
    pub(crate) state: Arc<dyn Storage>,
    /// On another volume, for what must be stored when the state folder fails.
    pub(crate) lost: Mutex<SealedFile<Lost>>,
    /// What it was to hold, and nobody took.
    pub(crate) owed: Mutex<Option<Lost>>,
    pub(crate) log: Arc<DiskLog>,
    /// Tells what others wrote; `None`: it is written through us alone.
    pub(crate) tracker: Option<Arc<dyn Tracker>>,
    /// One at a time; whether a compare of the whole disk is owed.
    pub(crate) gathering: Mutex<bool>,
    pub(crate) in_flight: InFlight,
    pub(crate) intent: Intent,
    pub(crate) dirty: DirtyBitmap,
    pub(crate) consumers: Mutex<Vec<Arc<Consumer>>>,
    pub(crate) watchers: Watchers,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) attached: Duration,
    /// What its logs never take more of.
    pub(crate) log_bytes_max: u64,
    pub(crate) session: Mutex<SessionFile>,
    pub(crate) mode: Mutex<Mode>,
    /// The current revision; held while an addition is made, so that they become visible in order.
    pub(crate) adding: Mutex<()>,
    pub(crate) revision: AtomicU64,
    pub(crate) changing_epoch: Mutex<()>,
    pub(crate) closed: AtomicBool,
    pub(crate) writes: AtomicU64,
    pub(crate) written_bytes: AtomicU64,
    pub(crate) keeper: Mutex<Keeper>,
    pub(crate) alarms: Mutex<Alarms>,
    pub(crate) events: DiskEvents,
    /// A write failed since the disk was attached, and that was told.
    pub(crate) write_failures: AtomicBool,
    /// What it holds now is between two instants of the disk that it is a copy of.
    pub(crate) importing: AtomicBool,
    /// It was seen smaller than it was attached, and not yet with its size again.
    pub(crate) has_shrunk: AtomicBool,
    pub(crate) barrier: OnceLock<Weak<dyn Barrier>>,
}

impl ProtectedDisk {
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// As the system says it: differs from the size that it was attached with once somebody resized it.
    pub fn disk_bytes_now(&self) -> io::Result<u64> {
        self.disk.current_bytes()
    }

    pub fn tick_now(&self) -> Tick {
        (self.clock.monotonic_now().saturating_sub(self.attached)).as_millis() as Tick
    }

    pub fn mode(&self) -> Mode {
        if let Some(problem) = self.alarms().get("size") {
            return Mode::Bitmap { reason: problem.message.clone() };
        }
        self.mode.lock().expect("no panic while held").clone()
    }

    pub fn alarms(&self) -> MutexGuard<'_, Alarms> {
        self.alarms.lock().expect("no panic while held")
    }

    /// Raises an alarm; says it once, when it is new.
    pub(crate) fn alarm(&self, name: &'static str, critical: bool, message: String, help: &str) {
        let problem = Problem { critical, message, help: help.to_owned() };
        let before = self.alarms().insert(name, problem.clone());
        if before.as_ref() != Some(&problem) {
            if let Some(kind) = event_of(name)
                && before.is_none()
            {
                let severity = if critical { Severity::Critical } else { Severity::Warning };
                self.events.publish(severity, kind, problem.message.as_str(), help);
            }
            tracing::warn!(disk = %self.identity.disk, problem = %problem.message, help = %problem.help, "disk has a problem");
        }
    }

    /// Says whether there may be marks: no while a log of somebody else is replayed onto it.
    pub(crate) fn set_importing(&self, importing: bool) {
        self.importing.store(importing, Ordering::Release);
    }

    pub(crate) fn is_importing(&self) -> bool {
        self.importing.load(Ordering::Acquire)
    }

    pub(crate) fn consumers(&self) -> Vec<Arc<Consumer>> {
        self.consumers.lock().expect("no panic while held").clone()
    }

    pub fn consumer(&self, server: ServerId) -> Option<Arc<Consumer>> {
        self.consumers().into_iter().find(|consumer| consumer.server() == server)
    }

    /// Feeds one process server more, while the others go on: the whole disk is to be scanned for it. Durable when it returns.
    pub(crate) fn add_consumer(&self, server: ServerId) -> io::Result<()> {
        // A new epoch asks each consumer what it lacks.
        let _changing = self.changing_epoch.lock().expect("no panic while held");
        if self.consumer(server).is_none() {
            let consumer = Consumer::create(self.state.clone(), server, self.identity.disk_bytes)?;
            self.consumers.lock().expect("no panic while held").push(Arc::new(consumer));
        }
        Ok(())
    }

    /// Feeds a process server no longer: the log does not wait for it, and what is known of it goes.
    pub(crate) fn remove_consumer(&self, server: ServerId) -> io::Result<()> {
        let _changing = self.changing_epoch.lock().expect("no panic while held");
        let removed = {
            let mut consumers = self.consumers.lock().expect("no panic while held");
            let at = consumers.iter().position(|consumer| consumer.server() == server);
            at.map(|at| consumers.remove(at))
        };
        removed.map_or(Ok(()), |consumer| consumer.remove())
    }

    /// Whether every process server that it feeds still gets it for the first time.
    pub(crate) fn is_first_scanned(&self) -> bool {
        let consumers = self.consumers();
        !consumers.is_empty()
            && consumers.iter().all(|consumer| matches!(consumer.progress(), Some((_, _, ScanReason::Initial))))
    }

    fn known_consumer(&self, server: ServerId, what: &'static str) -> Result<Arc<Consumer>, SourceError> {
        self.consumer(server).ok_or_else(|| {
            let source = io::Error::other(format!("process server {server} is not fed by this disk"));
            SourceError::Io { disk: self.identity.disk, what, source }
        })
    }

    /// Writes executed for the guest, in bytes, since the disk was attached.
    pub fn written_bytes(&self) -> u64 {
        self.written_bytes.load(Ordering::Relaxed)
    }

    /// Bytes of the records that a consumer has still to acknowledge, and of the blocks that changed without one.
    pub fn pending_bytes(&self, durable: Option<&Position>) -> u64 {
        // A log that cannot be read back is about to become a scan.
        let logged = self.log.bytes_after(durable).unwrap_or_else(|_| self.log.allocated_bytes());
        logged + self.dirty.bytes()
    }

    // ---- the write path's failures

    /// The intent bitmap cannot be written. "Compare everything after a power loss" is stored elsewhere, then the guest
    /// goes on.
    ///
    /// It goes on as well where nobody takes the note, with an alarm: its disk must not fail because of replication. The note is
    /// owed then, and the keeper tries again each second ([`Self::store_owed`]). What is certain meanwhile:
    ///
    /// * A block device is compared whole at each attach, so it needs no note.
    /// * After a kill the slots decide, and after a clean detach nothing is open. The clean mark is stored together with
    ///   `intent_lost`, or not at all.
    /// * After a power cut the session is there and not clean, or is gone; gone means the whole disk. Where it is there, the
    ///   newest stamp of activity that reached the slots is from before the media refused (they lie beside the session),
    ///   while each write moves the times of the disk: it is compared whole when they are a minute apart.
    ///
    /// What is left is a power cut within that minute, while a file system takes the guest's writes and neither a store nor
    /// a removal beside them, and the agent's own volume no store: regions written to for the first time in it are unknown.
    pub(crate) fn intent_failed(&self, error: &io::Error) {
        // Whoever comes second goes on when the first has told it, too.
        let mut owed = self.owed.lock().expect("no panic while held");
        if self.intent.has_given_up() {
            return;
        }
        let lost = Lost { intent: true, reason: error.to_string().chars().take(Lost::REASON_CHARS_MAX).collect() };
        let stored = self.store_lost(&lost);
        self.intent.give_up();
        self.alarm_intent(&lost, stored.as_ref().err());
        *owed = stored.is_err().then_some(lost);
    }

    /// What could not be stored when the intent bitmap failed: tried again.
    pub(crate) fn store_owed(&self) {
        let mut owed = self.owed.lock().expect("no panic while held");
        let Some(lost) = &*owed else { return };
        if self.store_lost(lost).is_ok() {
            self.alarm_intent(lost, None);
            *owed = None;
        }
    }

    /// Durable when it succeeds, in one place at least.
    fn store_lost(&self, lost: &Lost) -> io::Result<()> {
        // The other volume first: the one beside the disk just failed.
        let elsewhere = self.lost.lock().expect("no panic while held").store(lost);
        let mut session = self.session.lock().expect("no panic while held");
        let next = Session { intent_lost: true, ..session.current().clone() };
        let here = session.store(next);
        // A removal needs neither room nor the file's own blocks.
        elsewhere.or(here).or_else(|error| session.remove().map_err(|_| error))
    }

    fn alarm_intent(&self, lost: &Lost, unstored: Option<&io::Error>) {
        let mut message =
            format!("the write-intent bitmap of {} cannot be written: {}", self.path.display(), lost.reason);
        let mut help = "check the medium that holds the folder beside the disk; after a power loss the whole disk will be compared";
        if let Some(error) = unstored {
            message.push_str(&format!("; that a power loss calls for a compare cannot be stored either: {error}"));
            help = "check the media that hold the folder beside the disk and the agent's state; should the power fail before \
                    one of them works, ask for a compare: `tidemark resync NAME`";
        }
        self.alarm("intent", true, message, help);
    }

    /// These ranges were written, or half written, and are in no log.
    pub(crate) fn unlogged(&self, extents: &[Extent], reason: &Unlogged) {
        for extent in extents.iter().filter(|_| !tidemark_base::sabotage::is("dirty-mark")) {
            self.dirty.mark(*extent);
        }
        self.step_down(reason);
    }

    pub(crate) fn step_down(&self, reason: &Unlogged) {
        if matches!(reason, Unlogged::NotLogging) {
            return;
        }
        let mut mode = self.mode.lock().expect("no panic while held");
        if *mode != Mode::Data {
            return;
        }
        let text = reason.text();
        *mode = Mode::Bitmap { reason: text.clone() };
        drop(mode);
        self.tell_unlogged(reason, &text);
    }

    /// There is no log from the beginning.
    pub(crate) fn begin_in_bitmap(&self, reason: &Unlogged, mode: Mode) {
        self.log.end();
        let text = mode.reason().unwrap_or_default().to_owned();
        *self.mode.lock().expect("no panic while held") = mode;
        self.tell_unlogged(reason, &text);
    }

    fn tell_unlogged(&self, reason: &Unlogged, text: &str) {
        let help = match reason {
            Unlogged::Failed(error) => error.help(),
            Unlogged::Limit { .. } => {
                "bring the process server back, or raise the policy's log limit; changed blocks are tracked meanwhile"
            }
            _ => HELP_ROOM,
        };
        self.alarm_unlogged(text, help);
    }

    fn alarm_unlogged(&self, text: &str, help: &str) {
        self.alarm("log", false, format!("the changes of {} are not logged: {text}", self.path.display()), help);
    }

    /// A write failed: what is in its range now is unknown.
    pub(crate) fn write_failed(&self, extent: Extent, error: &io::Error) {
        if self.disk.has_failed_to_sync() {
            self.note_failed_sync();
        }
        tracing::warn!(disk = %self.identity.disk, %extent, %error, "write failed");
        if !self.write_failures.swap(true, Ordering::AcqRel) {
            let message = format!("writes to disk {} fail: {error}", self.path.display());
            let help = "check its medium; what was half written is read again and sent as it is";
            self.events.publish(Severity::Critical, EventKind::WriteFailed, message, help);
        }
        let mut extents = ExtentSet::new();
        extents.insert(extent);
        if self.add_for_all(&extents, ScanReason::Dirty).is_err() {
            // Survives a killed process; an attach adds it to the scans.
            self.dirty.mark(extent);
        }
    }

    /// Syncs the disk, for the guest or for us.
    pub(crate) fn flush(&self) -> io::Result<()> {
        self.disk.flush().inspect_err(|_| self.note_failed_sync())
    }

    /// Stores that syncs of the disk prove nothing any more in this boot.
    pub(crate) fn note_failed_sync(&self) {
        let mut session = self.session.lock().expect("no panic while held");
        if session.current().sync_failed {
            return;
        }
        let next = Session { sync_failed: true, ..session.current().clone() };
        // Without a session the next attach takes nothing for granted.
        if let Err(error) = session.store(next).or_else(|_| session.remove()) {
            tracing::error!(disk = %self.identity.disk, %error, "that the disk cannot be synced cannot be stored");
        }
    }

    // ---- what must be scanned

    fn add_for_all(&self, extents: &ExtentSet, reason: ScanReason) -> io::Result<()> {
        let result = {
            let _adding = self.adding.lock().expect("no panic while held");
            let revision = ScanRevision(self.revision.load(Ordering::Acquire) + 1);
            // Each of them, whatever fails for another: what cannot be stored holds in memory all the same.
            let each = self.consumers();
            let result =
                each.iter().map(|consumer| consumer.add(extents, reason, revision)).fold(Ok(()), io::Result::and);
            self.revision.store(revision.0, Ordering::Release);
            result
        };
        self.watchers.changed();
        result
    }

    pub(super) fn add_for(&self, consumer: &Consumer, extents: &ExtentSet, reason: ScanReason) -> io::Result<()> {
        {
            let _adding = self.adding.lock().expect("no panic while held");
            let revision = ScanRevision(self.revision.load(Ordering::Acquire) + 1);
            consumer.add(extents, reason, revision)?;
            self.revision.store(revision.0, Ordering::Release);
        }
        self.watchers.changed();
        Ok(())
    }

    /// The whole disk is read again for every consumer.
    pub fn resync(&self) -> io::Result<()> {
        let result = {
            let _adding = self.adding.lock().expect("no panic while held");
            let revision = ScanRevision(self.revision.load(Ordering::Acquire) + 1);
            let disk_bytes = self.identity.disk_bytes;
            let each = self.consumers();
            let result =
                each.iter().map(|consumer| consumer.resync(disk_bytes, revision)).fold(Ok(()), io::Result::and);
            self.revision.store(revision.0, Ordering::Release);
            result
        };
        self.watchers.changed();
        result
    }

    /// Takes a resync back; whether one ran. What else is pending is scanned all the same.
    pub fn cancel_resync(&self) -> io::Result<bool> {
        let _adding = self.adding.lock().expect("no panic while held");
        let mut ran = false;
        for consumer in self.consumers() {
            ran |= consumer.cancel_resync()?.is_some();
        }
        Ok(ran)
    }

    // ---- holds and epochs

    /// Holds the disk with nothing in flight. Tried again while writes stay in flight for too long.
    pub(crate) fn hold_drained(&self) -> Result<Hold<'_>, SourceError> {
        for attempt in 0..HOLD_ATTEMPTS {
            let hold = self.in_flight.hold();
            if hold.wait_drained(Instant::now() + HOLD_LIMIT) {
                return Ok(hold);
            }
            drop(hold);
            pause(attempt);
        }
        Err(SourceError::Busy { disk: self.identity.disk })
    }

    pub(super) fn io_error(&self, what: &'static str) -> impl Fn(io::Error) -> SourceError {
        let disk = self.identity.disk;
        move |source| SourceError::Io { disk, what, source }
    }

    pub fn set_log_limits(&self, limits: LogLimits) {
        self.log.set_limits(limits.within(self.log_bytes_max));
    }
}

/// On the volume of the agent's own state: whether the intent bitmap of a disk is kept.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Lost {
    /// It could not be written: after a power loss the whole disk is compared.
    pub intent: bool,
    pub reason: String,
}

impl Lost {
    pub const SLOT_BYTES: usize = 4096;
    /// Each may need six bytes in JSON.
    const REASON_CHARS_MAX: usize = 512;

    /// What the file said was heeded.
    pub(crate) fn settle(mut file: SealedFile<Lost>, found: Lost) -> io::Result<SealedFile<Lost>> {
        if found != Lost::default() {
            file.store(&Lost::default())?;
        }
        Ok(file)
    }
}

pub(crate) fn lost_file(disk: DiskId) -> String {
    format!("lost-{disk}")
}

/// What is told when an alarm is raised. Lost marks were told by the attach.
fn event_of(alarm: &str) -> Option<EventKind> {
    Some(match alarm {
        "size" => EventKind::DiskResized,
        "intent" => EventKind::IntentBitmapLost,
        "log" => EventKind::SteppedDown,
        "sync" | "cursor" => EventKind::SyncFailed,
        "marks" => EventKind::MarksFailed,
        "thaw" => EventKind::ThawFailed,
        "fence" => EventKind::SourceOpen,
        _ => return None,
    })
}

/// The oldest epoch goes in which no consumer stands: one that comes back from there has its changes in its scan.
pub(crate) fn push_epoch(epochs: &mut Vec<Epoch>, epoch: Epoch, held: &[Epoch]) {
    if epochs.len() >= EPOCHS_MAX {
        let oldest = epochs.iter().position(|epoch| !held.contains(epoch)).unwrap_or(0);
        epochs.remove(oldest);
    }
    epochs.push(epoch);
}

/// Lets writers go on for a while between two tries of a hold.
pub(crate) fn pause(attempt: u32) {
    let never = tidemark_base::stop::Stop::new();
    never.wait_for(Duration::from_millis(u64::from(attempt.min(10)) * 2 + 1));
}

/// In whole granules: that is what a scan works in, and it bounds the set.
pub(crate) fn insert_granules(set: &mut ExtentSet, extent: Extent) {
    let offset = extent.offset / GRANULE_BYTES * GRANULE_BYTES;
    set.insert(Extent::new(offset, extent.end().next_multiple_of(GRANULE_BYTES) - offset));
}

/// The time of the newest thing that a source holds; for a status that says how far behind a consumer is.
pub fn newest_time(disk: &ProtectedDisk) -> Timestamp {
    disk.log.published().time
}
