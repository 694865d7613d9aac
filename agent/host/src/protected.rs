//! One protected disk, from attach to detach: everything that capture, marks and senders share.
//!
//! *Consistency.* {what a consumer lacks} ⊆ {records after its cursor} ∪ {its scan bitmap} ∪ {the dirty bitmap} ∪ {slots} ∪
//! {intent regions}, at every instant and after every crash. *Retries.* The keeper ([`ProtectedDisk::tick`]) tries to
//! return to the log every second while the disk is in bitmap mode. *Cancellation.* [`ProtectedDisk::detach`] drains and
//! leaves a clean mark; dropping without it is what a crash is. *Crash.* [`crate::attach`].

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use tidemark_base::disk::{Disk, FileDisk};
use tidemark_base::storage::Storage;
use tidemark_base::sync::{Mutex, MutexGuard};
use tidemark_base::time::Instant;
use tidemark_base::{Clock, Epoch, Extent, ExtentSet, Position, ServerId, Timestamp};
use tidemark_proto::control::Problem;

use crate::capture::in_flight::{Hold, InFlight};
use crate::consumer::Consumer;
use crate::log::{ChainReader, DiskLog, LogLimits, Unlogged};
use crate::source::{
    EpochReason, Located, LogState, PendingScan, ReadDataError, RecordReader, ScanReason, ScanRevision, Source,
    SourceError, SourceIdentity, Watcher, Watchers,
};
use crate::state::dirty::{DirtyBitmap, GRANULE_BYTES};
use crate::state::intent::{Intent, Tick};
use crate::state::session::{CleanDetach, EPOCHS_MAX, Mode, Session};

/// How long a hold waits for the writes in flight. Then the disk is released, and held again a little later.
pub const HOLD_LIMIT: Duration = Duration::from_millis(50);
/// How often a hold is tried before whoever wanted it is told that the disk is busy.
pub const HOLD_ATTEMPTS: u32 = 40;
/// A region without writes for so long loses its intent bit.
const IDLE_TICKS: Tick = 30_000;
/// A consumer that asked for nothing for so long is not waited for, and not scanned for, in bitmap mode.
const CONSUMER_ACTIVE: Duration = Duration::from_secs(60);
const DRAIN_LIMIT: Duration = Duration::from_secs(30);

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
    pub(crate) state: Arc<dyn Storage>,
    /// Another volume, for what must be stored when the state folder fails.
    pub(crate) elsewhere: Arc<dyn Storage>,
    pub(crate) log: Arc<DiskLog>,
    pub(crate) in_flight: InFlight,
    pub(crate) intent: Intent,
    pub(crate) dirty: DirtyBitmap,
    pub(crate) consumers: Mutex<Vec<Arc<Consumer>>>,
    pub(crate) watchers: Watchers,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) attached: Duration,
    pub(crate) session: Mutex<Session>,
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
    pub(crate) barrier: OnceLock<Weak<dyn Barrier>>,
}

/// What the keeper remembers from one second to the next.
#[derive(Default)]
pub(crate) struct Keeper {
    /// When the last completed sync began, and how many writes had ended by then.
    synced: Tick,
    synced_writes: Option<u64>,
    /// Which sequence was reached with how many bytes, second by second; oldest first.
    samples: VecDeque<(Position, u64)>,
}

/// About an hour of samples; what is pending for longer is estimated from the oldest.
const SAMPLES_MAX: usize = 4096;

impl ProtectedDisk {
    pub fn path(&self) -> &Path {
        &self.path
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
        if self.alarms().insert(name, problem.clone()).as_ref() != Some(&problem) {
            tracing::warn!(disk = %self.identity.disk, problem = %problem.message, help = %problem.help, "disk has a problem");
        }
    }

    pub(crate) fn consumers(&self) -> Vec<Arc<Consumer>> {
        self.consumers.lock().expect("no panic while held").clone()
    }

    pub fn consumer(&self, server: ServerId) -> Option<Arc<Consumer>> {
        self.consumers().into_iter().find(|consumer| consumer.server() == server)
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

    /// Bytes that the guest wrote after a position, to about a second's worth.
    pub fn pending_bytes(&self, durable: Option<&Position>) -> u64 {
        let logged = self.log.published().logged;
        let written = self.written_bytes();
        let Some(durable) = durable else { return written };
        if *durable == logged {
            return 0;
        }
        let keeper = self.keeper.lock().expect("no panic while held");
        let reached = keeper
            .samples
            .iter()
            .rev()
            .find(|(at, _)| at.epoch == durable.epoch && at.sequence <= durable.sequence)
            .map_or(0, |(_, bytes)| *bytes);
        written.saturating_sub(reached)
    }

    // ---- the write path's failures

    /// The intent bitmap cannot be written. "Compare everything after a power loss" is stored elsewhere, then the guest
    /// goes on; only if that fails as well, its write does.
    pub(crate) fn intent_failed(&self, error: &io::Error) -> io::Result<()> {
        if self.intent.has_given_up() {
            return Ok(());
        }
        let mut session = self.session.lock().expect("no panic while held");
        session.intent_lost = true;
        let name = intent_lost_file(&self.identity);
        let elsewhere = tidemark_base::storage::replace_file(&*self.elsewhere, &name, error.to_string().as_bytes());
        session.store(&*self.state).or(elsewhere)?;
        self.intent.give_up();
        self.alarm(
            "intent",
            true,
            format!("the write-intent bitmap of {} cannot be written: {error}", self.path.display()),
            "check the medium that holds the folder beside the disk; after a power loss the whole disk will be compared",
        );
        Ok(())
    }

    /// These ranges were written, or half written, and are in no log.
    pub(crate) fn unlogged(&self, extents: &[Extent], reason: &Unlogged) {
        for extent in extents {
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
        let mut text = reason.to_string();
        if let Unlogged::Failed(error) = reason
            && let Some(source) = std::error::Error::source(error)
        {
            text = format!("{text}: {source}");
        }
        *mode = Mode::Bitmap { reason: text.clone() };
        drop(mode);
        let help = match reason {
            Unlogged::Failed(error) => error.help(),
            Unlogged::Limit { .. } => {
                "bring the process server back, or raise the policy's log limit; changed blocks are tracked meanwhile"
            }
            _ => "make room in the log's folder; changed blocks are tracked meanwhile",
        };
        self.alarm("log", false, format!("the changes of {} are not logged: {text}", self.path.display()), help);
    }

    /// A write failed: what is in its range now is unknown.
    pub(crate) fn write_failed(&self, extent: Extent, error: &io::Error) {
        tracing::warn!(disk = %self.identity.disk, %extent, %error, "write failed");
        let mut extents = ExtentSet::new();
        extents.insert(extent);
        if self.add_for_all(&extents, ScanReason::Dirty).is_err() {
            // Survives a killed process; an attach adds it to the scans.
            self.dirty.mark(extent);
        }
    }

    // ---- what must be scanned

    fn add_for_all(&self, extents: &ExtentSet, reason: ScanReason) -> io::Result<()> {
        let result = {
            let _adding = self.adding.lock().expect("no panic while held");
            let revision = ScanRevision(self.revision.load(Ordering::Acquire) + 1);
            let result = self.consumers().iter().try_for_each(|consumer| consumer.add(extents, reason, revision));
            self.revision.store(revision.0, Ordering::Release);
            result
        };
        self.watchers.changed();
        result
    }

    fn add_for(&self, consumer: &Consumer, extents: &ExtentSet, reason: ScanReason) -> io::Result<()> {
        {
            let _adding = self.adding.lock().expect("no panic while held");
            let revision = ScanRevision(self.revision.load(Ordering::Acquire) + 1);
            consumer.add(extents, reason, revision)?;
            self.revision.store(revision.0, Ordering::Release);
        }
        self.watchers.changed();
        Ok(())
    }

    pub(crate) fn whole(&self) -> ExtentSet {
        let mut whole = ExtentSet::new();
        whole.insert(Extent::new(0, self.identity.disk_bytes));
        whole
    }

    /// The whole disk is read again for every consumer.
    pub fn resync(&self) -> io::Result<()> {
        self.add_for_all(&self.whole(), ScanReason::Requested)
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

    fn io_error(&self, what: &'static str) -> impl Fn(io::Error) -> SourceError {
        let disk = self.identity.disk;
        move |source| SourceError::Io { disk, what, source }
    }

    /// Ends the epoch: see [`Source::new_epoch`]. Also the way back from bitmap mode.
    ///
    /// 1. a new log is made and synced
    /// 2. the disk is held
    /// 3. what the old log holds and nobody acknowledged, and the dirty bitmap, are added to each consumer's scan, durably
    /// 4. the session names the new epoch, durably
    /// 5. the new log takes over and the disk is released
    /// 6. the old logs and the dirty bits go
    ///
    /// Failure before 4: the new log is removed again. Crash between 1 and 4: the old epoch stands, with a log in the
    /// folder that does not belong to its chain, so the next attach scans the whole disk. After 4: the new one stands,
    /// what the old logs held is in the scans.
    fn begin_epoch(&self, reason: EpochReason) -> Result<Position, SourceError> {
        let _changing = self.changing_epoch.lock().expect("no panic while held");
        if self.closed.load(Ordering::Acquire) {
            return Err(SourceError::Closed { disk: self.identity.disk });
        }
        // Most of it is gathered before the new log is made and the disk is held.
        let mut behind: Vec<Behind> =
            self.consumers().iter().map(|consumer| Behind::of(&self.log, consumer.clone())).collect();
        behind.iter_mut().for_each(Behind::gather);
        let new = self.log.create_epoch(Epoch::random()).map_err(|error| {
            let source = io::Error::other(format!("{error}: {}", source_of(&error)));
            SourceError::Io { disk: self.identity.disk, what: "begin a log", source }
        })?;
        let start = new.position();
        let hold = match self.announce_epoch(start.epoch, reason, &mut behind) {
            Ok(hold) => hold,
            Err(error) => {
                self.log.discard(new);
                return Err(error);
            }
        };
        // Whoever ends the new log at once steps down after us, not before.
        let mut mode = self.mode.lock().expect("no panic while held");
        let old = self.log.install(new);
        self.dirty.clear_all();
        *mode = Mode::Data;
        drop(mode);
        drop(hold);
        if let Err(error) = self.log.remove(&old) {
            tracing::warn!(disk = %self.identity.disk, %error, "an old log could not be removed");
        }
        self.alarms().remove("log");
        tracing::info!(disk = %self.identity.disk, epoch = %start.epoch, ?reason, "new epoch");
        self.watchers.changed();
        Ok(start)
    }

    /// Steps 2 to 4 of [`Self::begin_epoch`].
    fn announce_epoch(
        &self,
        epoch: Epoch,
        reason: EpochReason,
        behind: &mut [Behind],
    ) -> Result<Hold<'_>, SourceError> {
        let hold = self.hold_drained()?;
        let dirty = self.dirty.extents();
        for behind in behind {
            behind.gather();
            for extent in dirty.iter() {
                behind.changed.insert(extent);
            }
            if !behind.is_readable {
                behind.changed = self.whole();
            }
            let reason = match reason {
                _ if !behind.is_readable => ScanReason::LogDamaged,
                _ if !dirty.is_empty() => ScanReason::Dirty,
                EpochReason::Diverged => ScanReason::Diverged,
                EpochReason::LogDamaged => ScanReason::LogDamaged,
                EpochReason::NewConsumer | EpochReason::Unclean => ScanReason::Unclean,
            };
            if !behind.changed.is_empty() {
                self.add_for(&behind.consumer, &behind.changed, reason).map_err(self.io_error("mark blocks"))?;
            }
        }
        let mut session = self.session.lock().expect("no panic while held");
        let mut next = session.clone();
        push_epoch(&mut next.epochs, epoch);
        next.mode = Mode::Data;
        next.newest = self.log.time_now();
        next.store(&*self.state).map_err(self.io_error("store the session"))?;
        *session = next;
        Ok(hold)
    }

    // ---- the keeper

    /// To be called about every second: syncs, clears idle intent bits, rotates, removes, watches the disk's size, and
    /// returns to the log when it can.
    pub fn tick(&self) {
        self.watch_size();
        self.sample();
        self.sync_and_clear();
        self.make_room();
        self.store_mode();
        self.return_to_log();
    }

    /// Rotates a log that is long enough and removes those that are not needed: each second, and sooner under load.
    pub fn make_room(&self) {
        let rotated = self.log.rotate_when_long();
        // What was acknowledged goes first: it must not count against the limit.
        self.store_consumers();
        if let Err(error) = rotated.and_then(|()| self.log.enforce_limits()) {
            self.step_down(&error);
        }
    }

    fn sample(&self) {
        // In this order: bytes that are counted but not reached yet would look delivered.
        let bytes = self.written_bytes();
        let logged = self.log.published().logged;
        let samples = &mut self.keeper.lock().expect("no panic while held").samples;
        if samples.back().is_none_or(|(last, _)| *last != logged) {
            if samples.len() == SAMPLES_MAX {
                samples.pop_front();
            }
            samples.push_back((logged, bytes));
        }
    }

    fn watch_size(&self) {
        match self.disk.current_bytes() {
            Ok(bytes) if bytes == self.identity.disk_bytes => {}
            Ok(bytes) => self.alarm(
                "size",
                true,
                format!(
                    "disk {} changed its size from {} to {bytes} bytes while it was attached",
                    self.path.display(),
                    self.identity.disk_bytes
                ),
                "detach it (unprotect, or stop the agent) and attach it again: the whole disk is then compared",
            ),
            Err(error) => self.alarm(
                "size",
                true,
                format!("disk {} cannot be examined: {error}", self.path.display()),
                "check the medium",
            ),
        }
    }

    /// While intent bits are set, what they stand for is synced, so that they can be cleared and little is lost.
    fn sync_and_clear(&self) {
        if !self.intent.is_any_set() {
            return;
        }
        let mut keeper = self.keeper.lock().expect("no panic while held");
        let began = self.tick_now();
        let writes = self.writes.load(Ordering::Acquire);
        if keeper.synced_writes == Some(writes) {
            // Each write is counted before the time of its end is noted.
            keeper.synced = began;
        } else {
            match self.sync() {
                Ok(true) => (keeper.synced, keeper.synced_writes) = (began, Some(writes)),
                // What the log holds may be lost with the power, so the regions stay named.
                Ok(false) => {}
                Err(error) => {
                    let help = "check the medium; flushes of the guest fail until the disk is attached again";
                    self.alarm("sync", true, format!("{} cannot be synced: {error}", self.path.display()), help);
                }
            }
        }
        let cleared = self.intent.clear_idle(self.tick_now(), keeper.synced, IDLE_TICKS, |region, clear| {
            self.in_flight.if_none_in(region, clear)
        });
        if let Err(error) = cleared
            && let Err(error) = self.intent_failed(&error)
        {
            tracing::error!(disk = %self.identity.disk, %error, "the intent bitmap is lost and that cannot be stored");
        }
    }

    /// The disk, and whatever says what was written to it. False when the log cannot be synced any more.
    fn sync(&self) -> io::Result<bool> {
        if let Err(error) = self.in_flight.sync() {
            tracing::warn!(disk = %self.identity.disk, %error, "the slots cannot be synced");
        }
        self.disk.flush()?;
        if !self.dirty.is_empty() {
            self.dirty.sync()?;
        }
        if let Err(error) = self.log.sync() {
            // Records that may not be on the media are no proof any more: their blocks are read from the disk instead.
            self.step_down(&Unlogged::Failed(error));
            return Ok(false);
        }
        Ok(true)
    }

    fn store_consumers(&self) {
        let consumers = self.consumers();
        for consumer in &consumers {
            if let Err(error) = consumer.store() {
                tracing::warn!(disk = %self.identity.disk, %error, "the cursor cannot be stored");
            }
        }
        let cursors: Option<Vec<Position>> = consumers.iter().map(|consumer| consumer.durable_cursor()).collect();
        let epoch = self.log.published().logged.epoch;
        let lowest = cursors.into_iter().flatten().min_by_key(|cursor| (cursor.epoch == epoch, cursor.sequence));
        if let Some(cursor) = lowest.filter(|cursor| cursor.epoch == epoch)
            && let Err(error) = self.log.remove_before(&cursor)
        {
            tracing::warn!(disk = %self.identity.disk, %error, "logs that are not needed cannot be removed");
        }
    }

    fn store_mode(&self) {
        let mode = self.mode.lock().expect("no panic while held").clone();
        let mut session = self.session.lock().expect("no panic while held");
        if session.mode != mode {
            let next = Session { mode, newest: self.log.time_now(), ..session.clone() };
            match next.store(&*self.state) {
                Ok(()) => *session = next,
                Err(error) => tracing::warn!(disk = %self.identity.disk, %error, "the mode cannot be stored"),
            }
        }
    }

    /// In bitmap mode: once each active consumer has taken what the old log holds, a new epoch begins.
    fn return_to_log(&self) {
        if *self.mode.lock().expect("no panic while held") == Mode::Data || !self.log.has_room() {
            return;
        }
        let logged = self.log.published().logged;
        let consumers = self.consumers();
        let mut active = consumers.iter().filter(|consumer| consumer.is_active(CONSUMER_ACTIVE)).peekable();
        let is_drained = active.peek().is_some()
            && active.all(|consumer| consumer.cursor() == Some(logged) || consumer.progress().is_some());
        if (is_drained || consumers.is_empty())
            && let Err(error) = self.begin_epoch(EpochReason::Unclean)
        {
            tracing::debug!(disk = %self.identity.disk, error = %error, "still no log");
        }
    }

    // ---- the end

    /// Drains, syncs disk and log, and proves that nobody needs to look again.
    pub fn detach(&self) -> io::Result<()> {
        if self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let is_drained = self.in_flight.close(DRAIN_LIMIT);
        self.watchers.changed();
        if !is_drained {
            return Err(io::Error::other(format!("writes to {} do not end", self.path.display())));
        }
        let _changing = self.changing_epoch.lock().expect("no panic while held");
        self.disk.flush()?;
        // With its times: they are the proof.
        self.disk.file().sync_all()?;
        let is_logging = self.log.is_logging();
        let position = match self.log.close() {
            Ok(position) => position,
            Err(Unlogged::NotLogging) => self.log.published().logged,
            Err(error) => return Err(io::Error::other(error)),
        };
        self.dirty.sync()?;
        for consumer in self.consumers() {
            consumer.sync_scan()?;
            consumer.store()?;
        }
        let mut session = self.session.lock().expect("no panic while held");
        session.newest = self.log.published().time;
        session.mode = self.mode.lock().expect("no panic while held").clone();
        if self.alarms().contains_key("size") {
            return Err(io::Error::other(format!("{} changed its size", self.path.display())));
        }
        debug_assert!(is_logging || session.mode != Mode::Data);
        session.clean = Some(CleanDetach { identity: self.disk.identity()?, position, at: self.clock.wall_now() });
        session.store(&*self.state)
    }

    pub fn set_log_limits(&self, limits: LogLimits) {
        self.log.set_limits(limits);
    }
}

/// The marker on the other volume that the intent bitmap of a disk was lost.
pub(crate) fn intent_lost_file(identity: &SourceIdentity) -> String {
    format!("intent-lost-{}", identity.disk)
}

pub(crate) fn push_epoch(epochs: &mut Vec<Epoch>, epoch: Epoch) {
    epochs.push(epoch);
    if epochs.len() > EPOCHS_MAX {
        epochs.remove(0);
    }
}

/// Lets writers go on for a while between two tries of a hold.
pub(crate) fn pause(attempt: u32) {
    let never = tidemark_base::stop::Stop::new();
    never.wait_for(Duration::from_millis(u64::from(attempt.min(10)) * 2 + 1));
}

fn source_of(error: &dyn std::error::Error) -> String {
    error.source().map(ToString::to_string).unwrap_or_default()
}

/// What a consumer did not acknowledge of the current epoch.
struct Behind {
    consumer: Arc<Consumer>,
    reader: Option<ChainReader>,
    changed: ExtentSet,
    is_readable: bool,
}

impl Behind {
    fn of(log: &Arc<DiskLog>, consumer: Arc<Consumer>) -> Self {
        let reader = log.read_unacknowledged(consumer.cursor().as_ref()).ok();
        Self { consumer, is_readable: reader.is_some(), reader, changed: ExtentSet::new() }
    }

    fn gather(&mut self) {
        let Some(reader) = &mut self.reader else { return };
        self.is_readable = self.is_readable
            && (|| -> Result<(), SourceError> {
                while let Some(record) = reader.next_record()? {
                    if let Some(extent) = record.extent() {
                        insert_granules(&mut self.changed, extent);
                    }
                }
                Ok(())
            })()
            .is_ok();
    }
}

/// In whole granules: that is what a scan works in, and it bounds the set.
pub(crate) fn insert_granules(set: &mut ExtentSet, extent: Extent) {
    let offset = extent.offset / GRANULE_BYTES * GRANULE_BYTES;
    set.insert(Extent::new(offset, extent.end().next_multiple_of(GRANULE_BYTES) - offset));
}

impl Source for ProtectedDisk {
    fn identity(&self) -> SourceIdentity {
        self.identity
    }

    fn disk(&self) -> &dyn Disk {
        &*self.disk
    }

    fn state(&self) -> LogState {
        // In this order: an addition that was made before the mark that we see is then seen, too.
        let logged = self.log.published();
        let scan_revision = ScanRevision(self.revision.load(Ordering::Acquire));
        let is_logging = *self.mode.lock().expect("no panic while held") == Mode::Data;
        LogState {
            logged: logged.logged,
            marked: logged.marked,
            time: logged.time,
            scan_revision,
            is_logging,
            closed: self.closed.load(Ordering::Acquire),
        }
    }

    fn epochs(&self) -> Vec<Epoch> {
        self.session.lock().expect("no panic while held").epochs.clone()
    }

    fn watch(&self, watcher: Weak<Watcher>) {
        self.watchers.add(watcher);
    }

    fn locate(&self, position: &Position) -> Result<Located, SourceError> {
        let found = self.log.locate(position).map_err(|error| {
            tracing::error!(disk = %self.identity.disk, error = %error, "log cannot be read back");
            SourceError::History { disk: self.identity.disk, after: *position }
        })?;
        Ok(match found {
            Located::Unknown if self.epochs().contains(&position.epoch) => Located::Earlier,
            found => found,
        })
    }

    fn read_after(&self, position: &Position) -> Result<Box<dyn RecordReader>, SourceError> {
        Ok(Box::new(self.log.read_after(position)?))
    }

    fn read_data(&self, data: &[crate::source::DataRef], buffer: &mut [u8]) -> Result<(), ReadDataError> {
        self.log.read_data(data, buffer)
    }

    fn cursor(&self, consumer: ServerId) -> Option<Position> {
        self.consumer(consumer)?.cursor()
    }

    fn acknowledged(&self, consumer: ServerId, position: Position) -> Result<(), SourceError> {
        self.known_consumer(consumer, "move the cursor")?.acknowledged(position);
        Ok(())
    }

    fn pending_scan(&self, consumer: ServerId, newer_than: ScanRevision) -> Result<PendingScan, SourceError> {
        let consumer = self.known_consumer(consumer, "read the scan bitmap")?;
        let _adding = self.adding.lock().expect("no panic while held");
        Ok(consumer.pending(newer_than, ScanRevision(self.revision.load(Ordering::Acquire))))
    }

    fn require_scan(&self, consumer: ServerId, extents: &ExtentSet, reason: ScanReason) -> Result<(), SourceError> {
        let consumer = self.known_consumer(consumer, "mark blocks")?;
        self.add_for(&consumer, extents, reason).map_err(self.io_error("mark blocks"))
    }

    fn scanned(&self, consumer: ServerId, extent: Extent, seen: ScanRevision) -> Result<(), SourceError> {
        self.known_consumer(consumer, "clear blocks")?.scanned(extent, seen);
        Ok(())
    }

    fn barrier(&self) -> Result<Position, SourceError> {
        let barrier = self.barrier.get().and_then(Weak::upgrade);
        let barrier = barrier.ok_or(SourceError::Closed { disk: self.identity.disk })?;
        let positions = barrier.barrier()?;
        let own = positions.into_iter().find(|(disk, _)| *disk == self.identity.disk);
        own.map(|(_, position)| position).ok_or(SourceError::Closed { disk: self.identity.disk })
    }

    fn new_epoch(&self, reason: EpochReason) -> Result<Position, SourceError> {
        self.begin_epoch(reason)
    }
}

/// The time of the newest thing that a source holds; for a status that says how far behind a consumer is.
pub fn newest_time(disk: &ProtectedDisk) -> Timestamp {
    disk.log.published().time
}
