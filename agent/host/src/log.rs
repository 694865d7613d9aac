//! The log of one disk: one appender, rotation, limits, and reading back.
//!
//! *Consistency.* One lock assigns sequences and appends; what is published was appended wholly. Times never decrease.
//! *Retries.* None: the first failure ends logging ([`Unlogged`]); the disk steps down to its dirty bitmap, and a new epoch
//! begins in a new log when there is room again. *Cancellation.* A reader may be dropped at any time. *Crash.* As
//! [`tidemark_hrl::companion`] says; nothing here is synced but by [`DiskLog::sync`] and by closing a log.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use tidemark_base::storage::{OpenMode, Storage, StorageFile};
use tidemark_base::sync::{Mutex, MutexGuard};
use tidemark_base::thread::Thread;
use tidemark_base::{Clock, DiskId, Epoch, Extent, Position, Sequence, Timestamp};
use tidemark_hrl::{ActiveLog, Append, DataHasher, LogError, LogName, LogReader, LogSync, PreparedLog};
use tidemark_hrl::{Record as LogRecord, RecordKind, Records};
use tidemark_proto::replication::Mark;

use crate::ledger::Ledger;
use crate::source::{DataRef, Located, ReadDataError, Record, RecordBody, RecordReader, SourceError};

/// A wall clock that moved by this much more or less than the monotonic one was set.
const CLOCK_STEP_MIN: Duration = Duration::from_secs(1);
/// Records at which the clock stepped that are remembered.
const STEPS_MAX: usize = 256;
/// The appender measures what the logs occupy each time that this much was appended.
const MEASURE_BYTES: u64 = 16 << 20;
/// Logs whose data files are kept open for reading.
const DATA_FILES_MAX: usize = 4;
/// The most that is read from a log at once.
const READ_BYTES_MAX: usize = 1 << 20;
/// No log file grows past this.
pub const ROTATE_BYTES_HARD: u64 = 64 << 30;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LogLimits {
    /// A log is rotated when it is longer.
    pub rotate_bytes: u64,
    /// What all logs of the disk may occupy.
    pub limit_bytes: u64,
    /// What must stay free in their folder: the guest's disk may need it.
    pub reserve_bytes: u64,
}

impl LogLimits {
    /// Of logs that may not occupy more than that, whatever the policy says.
    pub fn within(self, bytes_max: u64) -> Self {
        let limit_bytes = self.limit_bytes.min(bytes_max);
        Self { limit_bytes, rotate_bytes: self.rotate_bytes.min(limit_bytes / 8), ..self }
    }

    /// What must be free for logging to begin again: with some distance to the reserve, so that the mode does not change
    /// every second.
    pub fn resume_bytes(&self) -> u64 {
        self.reserve_bytes.saturating_mul(2)
    }
}

/// Why a write is not in the log.
#[derive(Debug, thiserror::Error)]
pub enum Unlogged {
    #[error("the logs of the disk occupy {bytes} bytes, which is their limit")]
    Limit { bytes: u64 },
    #[error("less than {reserve_bytes} bytes were free in the log's folder; {}", resume_text(*resume_bytes))]
    NoRoom { reserve_bytes: u64, resume_bytes: u64 },
    #[error(transparent)]
    Failed(#[from] LogError),
    /// It was said before.
    #[error("the disk is not logging")]
    NotLogging,
}

/// What a disk waits for whose log has no room to begin again.
pub fn resume_text(bytes: u64) -> String {
    format!("logging begins again when {bytes} bytes are free there")
}

impl Unlogged {
    /// With its cause, for people.
    pub fn text(&self) -> String {
        match self {
            Unlogged::Failed(error) => match std::error::Error::source(error) {
                Some(source) => format!("{error}: {source}"),
                None => error.to_string(),
            },
            _ => self.to_string(),
        }
    }
}

pub struct DiskLog {
    storage: Arc<dyn Storage>,
    stem: String,
    disk: DiskId,
    disk_bytes: u64,
    clock: Arc<dyn Clock>,
    limits: Mutex<LogLimits>,
    /// Of the limits, for the appender.
    rotate_bytes: AtomicU64,
    hasher: DataHasher,
    appender: Mutex<Appender>,
    published: Mutex<Published>,
    /// Oldest first; the last is the active one, while there is one.
    chain: Mutex<Vec<Arc<Entry>>>,
    closed_bytes: AtomicU64,
    next_number: AtomicU64,
    prepared: Mutex<Option<PreparedLog>>,
    /// Rotates and removes logs; called before its time when much is written.
    keeper: OnceLock<Thread>,
    /// Of the logs that were read last.
    data_files: Mutex<VecDeque<(u64, Arc<dyn StorageFile>)>>,
    /// The bytes between a cursor and the ledger's begin.
    earlier: Mutex<Option<(Position, Sequence, u64)>>,
    /// Whoever reads: a removed log that one of them holds open keeps its room.
    readers: Mutex<Vec<Weak<Mutex<Place>>>>,
}

struct Appender {
    log: Option<ActiveLog>,
    /// Of a log that ended before its time: what it holds must still become durable, and nobody closes it.
    ended: Option<LogSync>,
    newest: Timestamp,
    /// Wall and monotonic time of the last append.
    clocks: Option<(Timestamp, Duration)>,
    unmeasured_bytes: u64,
    /// Appended since the keeper was last called.
    uncalled_bytes: u64,
}

struct Published {
    logged: Position,
    marked: Option<Position>,
    time: Timestamp,
    ledger: Ledger,
    steps: VecDeque<Sequence>,
}

/// What [`DiskLog::published`] says, true together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Logged {
    pub logged: Position,
    pub marked: Option<Position>,
    pub time: Timestamp,
}

/// One log of the chain. A closed one is opened when it is read: a long backlog would hold too many files open.
pub struct Entry {
    name: LogName,
    start: Position,
    live: Mutex<Option<LogReader>>,
}

impl Entry {
    fn closed(log: &ClosedLog) -> Arc<Self> {
        Arc::new(Self { name: log.name.clone(), start: log.start, live: Mutex::new(None) })
    }

    fn live(reader: LogReader) -> Arc<Self> {
        Arc::new(Self { name: reader.name().clone(), start: reader.start(), live: Mutex::new(Some(reader)) })
    }

    fn number(&self) -> u64 {
        self.name.number
    }

    fn reader(&self, storage: &Arc<dyn Storage>, disk: DiskId) -> Result<LogReader, LogError> {
        let mut live = self.live.lock().expect("no panic while held");
        match &*live {
            Some(reader) if !reader.is_closed() => Ok(reader.clone()),
            Some(reader) => {
                let reader = reader.clone();
                *live = None;
                Ok(reader)
            }
            None => LogReader::open(storage.clone(), &self.name, disk),
        }
    }
}

/// Whose log it is, and where it lies.
pub struct LogPlace {
    pub storage: Arc<dyn Storage>,
    pub stem: String,
    pub disk: DiskId,
    pub disk_bytes: u64,
    pub clock: Arc<dyn Clock>,
}

/// A log that grows no more, by name: many of them may wait for a process server, and files are few.
#[derive(Clone, Debug)]
pub struct ClosedLog {
    pub name: LogName,
    pub start: Position,
    pub end: Position,
}

impl From<&LogReader> for ClosedLog {
    fn from(reader: &LogReader) -> Self {
        Self { name: reader.name().clone(), start: reader.start(), end: reader.end() }
    }
}

/// What is taken over from the sessions before.
pub struct Found {
    /// Closed logs of the current epoch, oldest first, each beginning where the one before it ends.
    pub closed: Vec<ClosedLog>,
    /// The last of them.
    pub last: Option<LogReader>,
    pub newest: Timestamp,
    pub marked: Option<Position>,
    /// The number of the next log: higher than that of any file in the folder.
    pub next_number: u64,
    /// What the closed logs hold is still to be sent, and no more can be logged until it was: no log is begun.
    pub is_ended: bool,
}

impl DiskLog {
    /// Goes on at `start`, in a new log, durable when it returns. Where none can be made, the disk begins without, and
    /// the second value says why.
    pub fn start(place: LogPlace, limits: LogLimits, start: Position, found: Found) -> (Self, Option<Unlogged>) {
        let LogPlace { storage, stem, disk, disk_bytes, clock } = place;
        let mut chain: Vec<Arc<Entry>> = found.closed.iter().map(Entry::closed).collect();
        let previous = found.last.as_ref().map(LogReader::id);
        let now = clock.wall_now().max(found.newest);
        let name = LogName::new(stem.as_str(), found.next_number);
        let created = match found.is_ended {
            true => Err(Unlogged::NotLogging),
            false => {
                ActiveLog::create(storage.clone(), name, disk, disk_bytes, start, previous, now).map_err(Unlogged::from)
            }
        };
        let (log, reason) = match created {
            Ok(log) => (Some(log), None),
            Err(reason) => (None, Some(reason)),
        };
        chain.extend(log.as_ref().map(|log| Entry::live(log.reader())));
        let log = Self {
            storage: storage.clone(),
            stem,
            disk,
            disk_bytes,
            clock,
            limits: Mutex::new(limits),
            rotate_bytes: AtomicU64::new(limits.rotate_bytes),
            hasher: DataHasher::new(disk),
            appender: Mutex::new(Appender {
                log,
                ended: None,
                newest: found.newest,
                clocks: None,
                unmeasured_bytes: 0,
                uncalled_bytes: 0,
            }),
            published: Mutex::new(Published {
                logged: start,
                marked: found.marked,
                time: now,
                ledger: Ledger::begin(start.sequence),
                steps: VecDeque::new(),
            }),
            chain: Mutex::new(chain),
            closed_bytes: AtomicU64::new(0),
            next_number: AtomicU64::new(found.next_number + 1),
            prepared: Mutex::new(None),
            keeper: OnceLock::new(),
            data_files: Mutex::new(VecDeque::new()),
            earlier: Mutex::default(),
            readers: Mutex::default(),
        };
        log.measure_closed();
        (log, reason)
    }

    pub fn hasher(&self) -> &DataHasher {
        &self.hasher
    }

    pub fn set_limits(&self, limits: LogLimits) {
        self.rotate_bytes.store(limits.rotate_bytes, Ordering::Relaxed);
        *self.limits.lock().expect("no panic while held") = limits;
    }

    /// Whom to wake, by `unpark`, each time that enough for another log was appended.
    pub fn set_keeper(&self, keeper: Thread) {
        let _ = self.keeper.set(keeper);
    }

    fn limits(&self) -> LogLimits {
        *self.limits.lock().expect("no panic while held")
    }

    fn appender(&self) -> MutexGuard<'_, Appender> {
        self.appender.lock().expect("no panic while held")
    }

    fn chain(&self) -> MutexGuard<'_, Vec<Arc<Entry>>> {
        self.chain.lock().expect("no panic while held")
    }

    pub fn published(&self) -> Logged {
        let published = self.published.lock().expect("no panic while held");
        Logged { logged: published.logged, marked: published.marked, time: published.time }
    }

    pub fn is_logging(&self) -> bool {
        self.appender().log.is_some()
    }

    /// Appends a batch: one lock, one write of data, one of records. The first error ends logging.
    pub fn append(&self, batch: &[Append<'_>], bytes: u64) -> Result<(), Unlogged> {
        self.append_as(batch, bytes, false).map(drop)
    }

    /// Appends a mark, whose body is made for the time that it gets. The disk must be held and drained.
    pub fn append_mark(&self, body: &[u8]) -> Result<(Position, Timestamp), Unlogged> {
        self.append_as(&[Append::Mark { body }], 0, true)
    }

    fn append_as(&self, batch: &[Append<'_>], bytes: u64, is_mark: bool) -> Result<(Position, Timestamp), Unlogged> {
        let mut appender = self.appender();
        if appender.log.is_none() {
            return Err(Unlogged::NotLogging);
        }
        appender.unmeasured_bytes += bytes;
        appender.uncalled_bytes += bytes;
        if appender.uncalled_bytes >= self.rotate_bytes.load(Ordering::Relaxed) {
            appender.uncalled_bytes = 0;
            if let Some(keeper) = self.keeper.get() {
                keeper.unpark();
            }
        }
        if appender.unmeasured_bytes >= MEASURE_BYTES.min(self.rotate_bytes.load(Ordering::Relaxed)) {
            appender.unmeasured_bytes = 0;
            if let Err(error) = self.check_room(&appender) {
                appender.end();
                return Err(error);
            }
        }
        let (time, has_stepped) = appender.tell_time(&*self.clock);
        let log = appender.log.as_mut().expect("checked above");
        let position = match log.append(time, batch) {
            Ok(position) => position,
            Err(error) => {
                appender.end();
                return Err(error.into());
            }
        };
        appender.newest = time;
        let mut published = self.published.lock().expect("no panic while held");
        published.logged = position;
        published.time = time;
        published.ledger.push(position.sequence, batch.iter().map(changed_bytes).sum());
        if is_mark {
            published.marked = Some(position);
        }
        if has_stepped {
            if published.steps.len() == STEPS_MAX {
                published.steps.pop_front();
            }
            published.steps.push_back(Sequence(position.sequence.0 + 1 - batch.len() as u64));
        }
        Ok((position, time))
    }

    /// The time that a mark made now would get, at least.
    pub fn time_now(&self) -> Timestamp {
        self.clock.wall_now().max(self.appender().newest)
    }

    /// Raises the time of the next record.
    pub fn raise_time(&self, time: Timestamp) {
        let mut appender = self.appender();
        appender.newest = appender.newest.max(time);
    }

    fn check_room(&self, appender: &Appender) -> Result<(), Unlogged> {
        let limits = self.limits();
        let active = appender.log.as_ref().map(|log| log.reader().allocated_bytes()).transpose()?.unwrap_or(0);
        let bytes = active + self.closed_bytes.load(Ordering::Acquire);
        if bytes > limits.limit_bytes {
            return Err(Unlogged::Limit { bytes });
        }
        let available = self.storage.available_bytes().map_err(|source| {
            Unlogged::Failed(LogError::Io { verb: "measure", path: self.storage.path(&self.stem), source })
        })?;
        if available < limits.reserve_bytes {
            return Err(Unlogged::NoRoom { reserve_bytes: limits.reserve_bytes, resume_bytes: limits.resume_bytes() });
        }
        Ok(())
    }

    /// Ends logging when the logs are at their limit or the folder has too little room left.
    pub fn enforce_limits(&self) -> Result<(), Unlogged> {
        let mut appender = self.appender();
        if appender.log.is_none() {
            return Ok(());
        }
        self.check_room(&appender).inspect_err(|_| appender.end())
    }

    /// Three quarters of what the logs may occupy are taken.
    pub fn is_almost_full(&self) -> bool {
        self.allocated_bytes() > self.limits().limit_bytes / 4 * 3
    }

    /// Whether so much is kept for what comes after `cursor` that others, who have it, should not be made to wait for whoever has
    /// not. As on the media, which the limit is about: of small writes more than half is what says where they belong.
    pub fn is_far_behind(&self, cursor: Option<&Position>) -> bool {
        let names: Vec<LogName> = {
            let chain = self.chain();
            let is_passed = |next: &Arc<Entry>| {
                let at = next.start;
                cursor.is_some_and(|cursor| at.epoch == cursor.epoch && at.sequence <= cursor.sequence)
            };
            // A log ends where the next one begins.
            let passed = chain.iter().zip(chain.iter().skip(1)).take_while(|(_, next)| is_passed(next));
            passed.map(|(entry, _)| entry.name.clone()).collect()
        };
        self.allocated_bytes().saturating_sub(self.allocated_of(&names)) > self.limits().limit_bytes / 2
    }

    /// Whether a new log may begin, or else how much must be free for it. The logs of the old epoch go when it begins, so
    /// what they occupy is room.
    pub fn has_room(&self) -> Result<(), u64> {
        let wanted = self.limits().resume_bytes();
        self.measure_closed();
        let freed = self.closed_bytes.load(Ordering::Acquire);
        let available = self.storage.available_bytes();
        if available.is_ok_and(|available| available.saturating_add(freed) >= wanted) { Ok(()) } else { Err(wanted) }
    }

    /// What the logs occupy on the media.
    pub fn allocated_bytes(&self) -> u64 {
        let active = self.appender().log.as_ref().map(|log| log.reader());
        let active = active.and_then(|reader| reader.allocated_bytes().ok()).unwrap_or(0);
        active + self.closed_bytes.load(Ordering::Acquire)
    }

    /// All logs but the one that is appended to.
    fn measure_closed(&self) {
        let active = self.appender().log.as_ref().map(|log| log.name().number);
        let names: Vec<LogName> = self.chain().iter().map(|entry| entry.name.clone()).collect();
        let closed: Vec<LogName> = names.into_iter().filter(|name| Some(name.number) != active).collect();
        self.closed_bytes.store(self.allocated_of(&closed), Ordering::Release);
    }

    fn allocated_of(&self, names: &[LogName]) -> u64 {
        let files = names.iter().flat_map(|name| [name.hrl(), name.companion()]);
        files.filter_map(|file| self.storage.open(&file, OpenMode::Read).ok()?.allocated_bytes().ok()).sum()
    }

    /// Makes everything appended so far durable, without keeping appenders out; also what a log that ended holds.
    pub fn sync(&self) -> Result<(), LogError> {
        let syncer = {
            let appender = self.appender();
            appender.log.as_ref().map(|log| log.syncer()).or_else(|| appender.ended.clone())
        };
        match syncer {
            Some(syncer) => syncer.sync().map(drop),
            None => Ok(()),
        }
    }

    fn new_name(&self) -> LogName {
        LogName::new(&self.stem, self.next_number.fetch_add(1, Ordering::AcqRel))
    }

    fn prepare(&self) -> Result<PreparedLog, LogError> {
        PreparedLog::create(self.storage.clone(), self.new_name(), self.disk, self.disk_bytes, self.clock.wall_now())
    }

    /// Rotates a log that has grown enough, and prepares the next one in time. To be called about every second.
    pub fn rotate_when_long(&self) -> Result<(), Unlogged> {
        let Some(bytes) = self.appender().log.as_ref().map(|log| log.apparent_bytes()) else { return Ok(()) };
        let rotate_bytes = self.limits().rotate_bytes.min(ROTATE_BYTES_HARD);
        if bytes > rotate_bytes / 2 {
            let mut prepared = self.prepared.lock().expect("no panic while held");
            if prepared.is_none() {
                *prepared = Some(self.prepare()?);
            }
        }
        if bytes > rotate_bytes { self.rotate() } else { Ok(()) }
    }

    /// The log to go on in. Numbers grow along the chain, also when a new epoch began after a log was prepared.
    fn next_log(&self) -> Result<PreparedLog, LogError> {
        let active = self.appender().log.as_ref().map(|log| log.name().number);
        match self.prepared.lock().expect("no panic while held").take() {
            Some(next) if active.is_none_or(|active| active < next.name().number) => return Ok(next),
            Some(stale) => stale.discard()?,
            None => {}
        }
        self.prepare()
    }

    /// Goes on in a new log, if anything is in this one. The old one is closed, which syncs it.
    pub fn rotate(&self) -> Result<(), Unlogged> {
        let next = self.next_log()?;
        let old = {
            let mut appender = self.appender();
            let newest = appender.newest;
            let Some(log) = &mut appender.log else {
                drop(appender);
                return next.discard().map_err(Unlogged::from);
            };
            if log.reader().start() == log.position() || next.name().number < log.name().number {
                drop(appender);
                *self.prepared.lock().expect("no panic while held") = Some(next);
                return Ok(());
            }
            let now = self.clock.wall_now().max(newest);
            match log.rotate(next, now) {
                Ok(old) => {
                    // Under the appender's lock: a reader that comes to the end of the old log finds the new one.
                    self.chain().push(Entry::live(log.reader()));
                    old
                }
                Err(error) => {
                    appender.end();
                    return Err(error.into());
                }
            }
        };
        let number = old.name().number;
        let closed = old.close(self.clock.wall_now());
        if closed.is_ok()
            && let Some(entry) = self.chain().iter().find(|entry| entry.number() == number)
        {
            // Whoever reads it opens it again: the files of a long backlog are not kept open.
            *entry.live.lock().expect("no panic while held") = None;
        }
        self.measure_closed();
        closed.map(drop).map_err(|error| {
            // The next log leans on this one; nothing after it would ever be durable.
            self.appender().end();
            error.into()
        })
    }

    /// Closes the active log: the end of a session. Nothing is appended any more.
    pub fn close(&self) -> Result<Position, Unlogged> {
        let log = self.appender().log.take();
        if let Some(prepared) = self.prepared.lock().expect("no panic while held").take() {
            prepared.discard()?;
        }
        let log = log.ok_or(Unlogged::NotLogging)?;
        let position = log.position();
        log.close(self.clock.wall_now())?;
        Ok(position)
    }

    /// What was to be logged cannot be read from the disk.
    pub fn failed_at_disk(&self, source: io::Error) -> Unlogged {
        Unlogged::Failed(LogError::Io { verb: "read the disk for", path: self.storage.path(&self.stem), source })
    }

    /// Ends logging before its time.
    pub fn end(&self) {
        self.appender().end();
    }

    /// Makes the first log of a new epoch, durable.
    pub fn create_epoch(&self, epoch: Epoch) -> Result<NewEpoch, LogError> {
        let now = self.time_now();
        let name = self.new_name();
        let log = ActiveLog::create(self.storage.clone(), name, self.disk, self.disk_bytes, epoch.start(), None, now)?;
        Ok(NewEpoch { entry: Entry::live(log.reader()), log })
    }

    /// Removes the log of an epoch that does not begin after all: a stranger in the folder would make the next attach
    /// doubt the whole chain.
    pub fn discard(&self, new: NewEpoch) {
        let NewEpoch { log, entry } = new;
        drop(log);
        if let Err(error) = self.remove(&[entry]) {
            tracing::warn!(disk = %self.disk, %error, "a log that is not needed could not be removed");
        }
    }

    /// Goes over to the new epoch. The disk must be held and drained. Returns the old logs, to be removed.
    pub fn install(&self, new: NewEpoch) -> Vec<Arc<Entry>> {
        let mut appender = self.appender();
        let mut published = self.published.lock().expect("no panic while held");
        *published = Published {
            logged: new.log.position(),
            marked: None,
            time: self.clock.wall_now().max(appender.newest),
            ledger: Ledger::begin(new.log.position().sequence),
            steps: VecDeque::new(),
        };
        appender.log = Some(new.log);
        appender.ended = None;
        appender.unmeasured_bytes = 0;
        let old = std::mem::replace(&mut *self.chain(), vec![new.entry]);
        self.closed_bytes.store(0, Ordering::Release);
        old
    }

    pub fn remove(&self, entries: &[Arc<Entry>]) -> io::Result<()> {
        // An open file keeps its room.
        let is_removed = |number: u64| entries.iter().any(|entry| entry.number() == number);
        self.data_files.lock().expect("no panic while held").retain(|(number, _)| !is_removed(*number));
        let readers: Vec<_> = {
            let readers = self.readers.lock().expect("no panic while held");
            readers.iter().filter_map(Weak::upgrade).collect()
        };
        for place in readers {
            place.lock().expect("no panic while held").let_go(is_removed);
        }
        for entry in entries {
            remove_log(&*self.storage, &entry.name)?;
        }
        if entries.is_empty() { Ok(()) } else { self.storage.sync_folder("") }
    }

    /// Removes the closed logs that every consumer has passed; a log that ended before its time as well, once everything
    /// in it was acknowledged.
    pub fn remove_before(&self, cursor: &Position, and_ended: bool) -> io::Result<()> {
        self.published.lock().expect("no panic while held").ledger.forget_before(cursor.sequence);
        let passed: Vec<Arc<Entry>> = if and_ended && self.is_drained(cursor) {
            self.appender().ended = None;
            std::mem::take(&mut *self.chain())
        } else {
            let mut chain = self.chain();
            // A log ends where the next one begins; the last one may grow, and one that is being closed stays.
            let count = (1..chain.len())
                .take_while(|&next| {
                    let end = chain[next].start;
                    let closing = chain[next - 1].live.lock().expect("no panic while held");
                    let is_closed = closing.as_ref().is_none_or(LogReader::is_closed);
                    end.epoch == cursor.epoch && end.sequence <= cursor.sequence && is_closed
                })
                .count();
            chain.drain(..count).collect()
        };
        if passed.is_empty() {
            return Ok(());
        }
        self.remove(&passed)?;
        self.measure_closed();
        Ok(())
    }

    /// Nothing is logged any more, and all that was is behind the cursor.
    fn is_drained(&self, cursor: &Position) -> bool {
        !self.is_logging() && *cursor == self.published().logged
    }

    /// Bytes of the records after a cursor. A cursor of another epoch has passed nothing of this one.
    pub fn bytes_after(self: &Arc<Self>, cursor: Option<&Position>) -> Result<u64, SourceError> {
        let (logged, total, first) = {
            let published = self.published.lock().expect("no panic while held");
            (published.logged, published.ledger.total(), published.ledger.first())
        };
        let cursor = cursor.filter(|cursor| cursor.epoch == logged.epoch).copied();
        let oldest = || self.chain().first().map_or(logged, |entry| entry.start);
        let cursor = cursor.unwrap_or_else(oldest);
        if cursor.sequence >= logged.sequence {
            return Ok(0);
        }
        let entry = self.published.lock().expect("no panic while held").ledger.at_or_before(cursor.sequence);
        match entry {
            Some((at, bytes)) if at == cursor.sequence => Ok(total - bytes),
            // Between two entries: what was passed since the first of them is read.
            Some((_, bytes)) => {
                let next = self.published.lock().expect("no panic while held").ledger.after(cursor.sequence);
                let (until, bytes_until) = next.unwrap_or((logged.sequence, total));
                debug_assert!(bytes_until >= bytes);
                Ok(total - bytes_until.min(total) + self.bytes_between(&cursor, until)?)
            }
            None => Ok(total + self.bytes_of_earlier_sessions(&cursor, first)?),
        }
    }

    /// Bytes after a cursor that lies before the ledger: read once, and again only as far as the cursor moves.
    fn bytes_of_earlier_sessions(self: &Arc<Self>, cursor: &Position, until: Sequence) -> Result<u64, SourceError> {
        let mut known = self.earlier.lock().expect("no panic while held");
        let moved = match &*known {
            Some((at, end, bytes)) if *end == until && at.epoch == cursor.epoch && at.sequence <= cursor.sequence => {
                self.bytes_between(at, cursor.sequence).ok().map(|passed| bytes.saturating_sub(passed))
            }
            _ => None,
        };
        let bytes = match moved {
            Some(bytes) => bytes,
            None => self.bytes_between(cursor, until)?,
        };
        *known = Some((*cursor, until, bytes));
        Ok(bytes)
    }

    fn bytes_between(self: &Arc<Self>, after: &Position, until: Sequence) -> Result<u64, SourceError> {
        let mut reader = self.read_after(after)?;
        let mut bytes = 0;
        while reader.at().sequence < until {
            let Some(record) = reader.next_record()? else { break };
            bytes += record.extent().map_or(0, |extent| extent.length);
        }
        Ok(bytes)
    }

    pub fn locate(&self, position: &Position) -> Result<Located, LogError> {
        let logged = self.published().logged;
        if position.epoch != logged.epoch {
            return Ok(Located::Unknown);
        }
        if *position == logged {
            // Nothing follows it, so that no log is needed.
            return Ok(Located::Here);
        }
        if position.sequence > logged.sequence {
            return Ok(Located::Ahead);
        }
        let Some(entry) = self.entry_with(position.sequence) else { return Ok(Located::Gone) };
        let found = entry.reader(&self.storage, self.disk).and_then(|reader| reader.position_of(position.sequence));
        match found {
            Ok(Some(found)) if found.hash == position.hash => Ok(Located::Here),
            Ok(Some(_)) => Ok(Located::Differs),
            Ok(None) => Ok(Located::Gone),
            // Removed between our look at the chain and at its file: that is no damage.
            Err(_) if !self.chain().iter().any(|found| Arc::ptr_eq(found, &entry)) => Ok(Located::Gone),
            Err(error) => Err(error),
        }
    }

    /// The last log that holds the sequence or begins after it.
    fn entry_with(&self, sequence: Sequence) -> Option<Arc<Entry>> {
        self.chain().iter().rev().find(|entry| entry.start.sequence <= sequence).cloned()
    }

    pub fn read_after(self: &Arc<Self>, position: &Position) -> Result<ChainReader, SourceError> {
        let gone = || SourceError::Gone { disk: self.disk, after: *position };
        let Some(entry) = self.entry_with(position.sequence) else {
            let is_end = *position == self.published().logged;
            return if is_end { Ok(ChainReader::new(self, None, *position)) } else { Err(gone()) };
        };
        if entry.start.epoch != position.epoch {
            return Err(gone());
        }
        let reader = entry.reader(&self.storage, self.disk).map_err(|error| self.read_error(error, *position))?;
        let records = reader.records_after(position).map_err(|error| self.read_error(error, *position))?;
        Ok(ChainReader::new(self, Some(OpenLog { number: entry.number(), reader, records }), *position))
    }

    fn read_error(&self, error: LogError, after: Position) -> SourceError {
        match error {
            LogError::Io { source, .. } => SourceError::Io { disk: self.disk, what: "read the log", source },
            error => {
                tracing::error!(disk = %self.disk, error = %error, "log cannot be read back");
                SourceError::History { disk: self.disk, after }
            }
        }
    }

    /// A reader from the cursor on, or from the oldest record of this epoch when the cursor is of another.
    pub fn read_unacknowledged(self: &Arc<Self>, cursor: Option<&Position>) -> Result<ChainReader, SourceError> {
        let first = self.chain().first().map(|entry| entry.start);
        let first = first.unwrap_or_else(|| self.published().logged);
        match cursor {
            Some(cursor) if cursor.epoch == first.epoch => self.read_after(cursor),
            _ => self.read_after(&first),
        }
    }

    /// The data file of a log, from the few that are kept open.
    fn data_file(&self, number: u64) -> Result<Option<Arc<dyn StorageFile>>, ReadDataError> {
        let mut files = self.data_files.lock().expect("no panic while held");
        if let Some((_, file)) = files.iter().find(|(open, _)| *open == number) {
            return Ok(Some(file.clone()));
        }
        let name = self.chain().iter().find(|entry| entry.number() == number).map(|entry| entry.name.clone());
        let name = name.ok_or(ReadDataError::Gone)?;
        let Ok(file) = self.storage.open(&name.hrl(), OpenMode::Read) else { return Ok(None) };
        if files.len() == DATA_FILES_MAX {
            files.pop_front();
        }
        files.push_back((number, file.clone()));
        Ok(Some(file))
    }

    pub fn read_data(&self, data: &[DataRef], buffer: &mut [u8]) -> Result<(), ReadDataError> {
        let mut damaged = Vec::new();
        let (mut index, mut at) = (0, 0);
        while index < data.len() {
            let number = data[index].log;
            let file = self.data_file(number)?;
            let first = index;
            let mut bytes = data[index].length as usize;
            index += 1;
            while let Some(next) = data.get(index)
                && next.log == number
                && next.offset == data[index - 1].offset + u64::from(data[index - 1].length)
                && bytes + next.length as usize <= READ_BYTES_MAX
            {
                bytes += next.length as usize;
                index += 1;
            }
            let read =
                |offset, target: &mut [u8]| file.as_ref().is_some_and(|file| file.read_at(offset, target).is_ok());
            let is_whole = read(data[first].offset, &mut buffer[at..at + bytes]);
            for (number, part) in data[first..index].iter().enumerate() {
                let target = &mut buffer[at..at + part.length as usize];
                // One unreadable sector must not condemn its neighbours.
                let is_read = is_whole || read(part.offset, target);
                if !is_read || self.hasher.digest(target) != part.hash {
                    damaged.push(first + number);
                }
                at += part.length as usize;
            }
        }
        if damaged.is_empty() { Ok(()) } else { Err(ReadDataError::Damaged { indices: damaged }) }
    }

    fn has_stepped(&self, sequence: Sequence) -> bool {
        self.published.lock().expect("no panic while held").steps.contains(&sequence)
    }
}

impl Appender {
    /// Ends logging before its time.
    fn end(&mut self) {
        if let Some(log) = self.log.take() {
            self.ended = Some(log.syncer());
        }
    }

    /// The time of the next record, and whether the wall clock was set.
    fn tell_time(&mut self, clock: &dyn Clock) -> (Timestamp, bool) {
        let (wall, monotonic) = (clock.wall_now(), clock.monotonic_now());
        let has_stepped = self.clocks.is_some_and(|(wall_before, monotonic_before)| {
            let expected = wall_before.0 as i128 + (monotonic - monotonic_before).as_nanos() as i128;
            (wall.0 as i128 - expected).unsigned_abs() > CLOCK_STEP_MIN.as_nanos()
        });
        let is_held_back = wall < self.newest;
        self.clocks = Some((wall, monotonic));
        (wall.max(self.newest), has_stepped || (is_held_back && self.newest.saturating_since(wall) > CLOCK_STEP_MIN))
    }
}

/// The first log of an epoch that did not begin yet.
pub struct NewEpoch {
    log: ActiveLog,
    entry: Arc<Entry>,
}

impl NewEpoch {
    pub fn position(&self) -> Position {
        self.log.position()
    }
}

/// What a record changes on the disk.
fn changed_bytes(append: &Append<'_>) -> u64 {
    match append {
        Append::Write { data, .. } => data.len() as u64,
        Append::Zeroes { extent } => extent.length,
        Append::Mark { .. } => 0,
    }
}

/// Removes both files of a log, the companion last: an `.hrl` file without one looks robbed.
pub fn remove_log(storage: &dyn Storage, name: &LogName) -> io::Result<()> {
    for file in [name.hrl(), name.companion()] {
        match storage.remove(&file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Reads the records of a chain of logs, also while the last one grows.
pub struct ChainReader {
    log: Arc<DiskLog>,
    place: Arc<Mutex<Place>>,
}

/// Where a reader stands.
struct Place {
    /// None between two logs: where nothing follows yet, or after the one that was read to its end was removed.
    open: Option<OpenLog>,
    at: Position,
}

struct OpenLog {
    number: u64,
    reader: LogReader,
    records: Records,
}

impl ChainReader {
    fn new(log: &Arc<DiskLog>, open: Option<OpenLog>, at: Position) -> Self {
        let place = Arc::new(Mutex::new(Place { open, at }));
        let mut readers = log.readers.lock().expect("no panic while held");
        readers.retain(|reader| reader.strong_count() > 0);
        readers.push(Arc::downgrade(&place));
        Self { log: log.clone(), place }
    }

    fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().expect("no panic while held")
    }

    fn at(&self) -> Position {
        self.place().at
    }

    pub fn next_record(&mut self) -> Result<Option<LogRecord>, SourceError> {
        self.place().next(&self.log)
    }

    fn convert(&self, record: LogRecord) -> Result<Record, SourceError> {
        let body = match record.kind {
            RecordKind::Write { extent, data_offset, digest, .. } => RecordBody::Write {
                extent,
                data: DataRef {
                    log: self.place().open.as_ref().map_or(0, |open| open.number),
                    offset: data_offset,
                    length: extent.length as u32,
                    hash: digest,
                },
            },
            RecordKind::Zeroes { extent } => RecordBody::Zeroes { extent },
            RecordKind::Mark { body } => match Mark::from_bytes(&body) {
                Ok(mark) => RecordBody::Mark(Box::new(mark)),
                Err(_) => return Err(SourceError::History { disk: self.log.disk, after: self.at() }),
            },
        };
        Ok(Record {
            sequence: record.sequence,
            hash: record.history,
            time: record.time,
            clock_stepped: self.log.has_stepped(record.sequence),
            body,
        })
    }
}

impl Place {
    fn next(&mut self, log: &DiskLog) -> Result<Option<LogRecord>, SourceError> {
        loop {
            let next = match &mut self.open {
                None => log.chain().iter().find(|entry| entry.start == self.at).cloned(),
                Some(open) => {
                    let record = open.records.next().map_err(|error| log.read_error(error, self.at))?;
                    if let Some(record) = record {
                        self.at.sequence = record.sequence;
                        self.at.hash = record.history;
                        return Ok(Some(record));
                    }
                    let chain = log.chain();
                    match chain.iter().position(|entry| entry.number() == open.number) {
                        Some(index) => chain.get(index + 1).cloned(),
                        None => chain.iter().find(|entry| entry.start == self.at).cloned(),
                    }
                }
            };
            let Some(next) = next else { return Ok(None) };
            // The log ended before the next one was made, but perhaps after we came to what was its end then.
            if self.open.as_ref().is_some_and(|open| open.reader.end() != self.at) {
                continue;
            }
            if next.start != self.at {
                return Err(SourceError::History { disk: log.disk, after: self.at });
            }
            let reader = next.reader(&log.storage, log.disk).map_err(|error| log.read_error(error, self.at))?;
            let records = reader.records();
            self.open = Some(OpenLog { number: next.number(), reader, records });
        }
    }

    /// Closes a removed log that was read to its end. Where logging ended nothing comes that would do it, and the log
    /// cannot begin again before the room is there that the open file keeps.
    fn let_go(&mut self, is_removed: impl Fn(u64) -> bool) {
        if self.open.as_ref().is_some_and(|open| is_removed(open.number) && open.reader.end() == self.at) {
            self.open = None;
        }
    }
}

impl RecordReader for ChainReader {
    fn read(&mut self, until: Sequence, count: usize, into: &mut Vec<Record>) -> Result<(), SourceError> {
        for _ in 0..count {
            let before = self.at();
            if before.sequence >= until {
                break;
            }
            // Looked at first: what was published by then is in the chain, or was removed for the sake of others.
            let logged = self.log.published().logged;
            let Some(record) = self.next_record()? else {
                if logged.epoch != before.epoch || logged.sequence > before.sequence {
                    return Err(SourceError::Gone { disk: self.log.disk, after: before });
                }
                break;
            };
            into.push(self.convert(record)?);
        }
        Ok(())
    }
}

/// The highest number of a log in the folder, whatever state it is in, and all their names.
pub fn logs_in(storage: &dyn Storage, stem: &str) -> io::Result<Vec<LogName>> {
    let mut names = Vec::new();
    for file in storage.list("")? {
        let number = file
            .strip_prefix(stem)
            .and_then(|rest| rest.strip_prefix('.'))
            .and_then(|rest| rest.strip_suffix(".hrl").or_else(|| rest.strip_suffix(".companion")))
            .filter(|number| number.len() >= 8 && number.bytes().all(|byte| byte.is_ascii_digit()))
            .and_then(|number| number.parse::<u64>().ok());
        if let Some(number) = number {
            names.push(LogName::new(stem, number));
        }
    }
    names.sort();
    names.dedup();
    Ok(names)
}

/// The parts of a write that fit a record each.
pub fn record_parts(extent: Extent) -> impl Iterator<Item = Extent> {
    let bytes_max = crate::source::RECORD_BYTES_MAX;
    (0..extent.length.div_ceil(bytes_max)).map(move |index| {
        let skip = index * bytes_max;
        Extent::new(extent.offset + skip, (extent.length - skip).min(bytes_max))
    })
}
