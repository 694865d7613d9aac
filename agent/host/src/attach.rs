//! What an attach may take over from the session before it: one table, every row tested.
//!
//! After a crash the disk is the truth. The question is only where the replica may differ from it: nowhere beyond the log
//! (the log goes on), in what was in flight (slots), in what the log or the page cache may have lost (intent bitmap), or
//! anywhere (the whole disk).

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, OnceLock};

use tidemark_base::disk::{Access, Disk, DiskIdentity, FileDisk};
use tidemark_base::storage::{OpenMode, RealStorage, Storage, StorageFile, create_private_folder};
use tidemark_base::sync::Mutex;
use tidemark_base::{Clock, DiskId, Epoch, Extent, ExtentSet, Generation, MachineId, Position, ServerId, Timestamp};
use tidemark_hrl::{Cause, Examination, LogError, LogReader, RecordKind, Verdict};

use crate::capture::in_flight::InFlight;
use crate::capture::splitter::log_from_disk;
use crate::consumer::Consumer;
use crate::error::HostError;
use crate::log::{ClosedLog, DiskLog, Found, LogLimits, LogPlace, logs_in, remove_log};
use crate::protected::{ProtectedDisk, insert_granules, intent_lost_file, push_epoch};
use crate::source::{ScanReason, ScanRevision, SourceIdentity, Watchers};
use crate::state::dirty::DirtyBitmap;
use crate::state::intent::Intent;
use crate::state::session::{self, Boot, Mode, MountIdentity, Session, SessionId};
use crate::state::slots::{self, SlotTable, SlotsFound};

/// How the session before this one ended, as far as its files tell.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Before {
    /// No session file, or one that cannot be trusted, or of another disk.
    Nothing,
    /// Left by a clean detach.
    Clean,
    /// Not left cleanly; same boot, same mount, and the slot table is of that session: the page cache has everything.
    Killed,
    /// Not left cleanly, and the page cache may be lost.
    PowerLost,
}

/// What became of the log of the session before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LogFound {
    /// Everything that the session says it had (clean), or everything that reached the page cache (killed), or
    /// everything up to its last sync (power lost).
    Sound,
    /// Absent, damaged, or shorter than what was promised.
    Unusable,
}

/// Everything that the decision depends on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Evidence {
    pub before: Before,
    /// Device, inode and size are those of the session before.
    pub is_same_disk: bool,
    /// Someone else may have written: for a clean detach, any difference in times; after a kill, a change later than
    /// our last step; after a power loss, a change well after our last step, or in this boot. Block devices have no times, so they always may.
    pub may_have_been_written: bool,
    /// The session was in data mode.
    pub was_logging: bool,
    pub log: LogFound,
    /// The dirty bitmap can be read.
    pub has_dirty: bool,
    /// The intent bitmap can be read, and nobody stored that it could not be kept.
    pub has_intent: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision {
    /// The same epoch goes on where it was left.
    Continue,
    /// The same epoch goes on; what was in flight is read from the disk and logged as new records.
    ReadSlots,
    /// A new epoch. To be scanned: the dirty bitmap, what was in flight, and what the old log holds and nobody acknowledged.
    ScanDirty,
    /// The same, and the regions of the intent bitmap.
    ScanTouched,
    /// A new epoch; the whole disk is scanned.
    ScanWhole(Why),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Why {
    First,
    OtherDisk,
    WrittenMeanwhile,
    StateDamaged,
    LogUnusable,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Why::First => "the disk was not protected before, or nothing is known of it",
            Why::OtherDisk => "the disk was replaced or resized",
            Why::WrittenMeanwhile => "another program may have written to the disk while it was not attached",
            Why::StateDamaged => "the state beside the disk is damaged",
            Why::LogUnusable => "the log is missing or damaged",
        })
    }
}

/// The first row that fits decides.
pub fn decide(evidence: &Evidence) -> Decision {
    use Before::*;
    match *evidence {
        Evidence { before: Nothing, .. } => Decision::ScanWhole(Why::First),
        Evidence { is_same_disk: false, .. } => Decision::ScanWhole(Why::OtherDisk),
        Evidence { may_have_been_written: true, .. } => Decision::ScanWhole(Why::WrittenMeanwhile),
        Evidence { has_dirty: false, .. } => Decision::ScanWhole(Why::StateDamaged),
        Evidence { before: PowerLost, has_intent: false, .. } => Decision::ScanWhole(Why::StateDamaged),
        // Which records nobody acknowledged is known from the log alone, also where it ended and the dirty bitmap went on.
        Evidence { log: LogFound::Unusable, .. } => Decision::ScanWhole(Why::LogUnusable),
        Evidence { before: PowerLost, was_logging: false, .. } => Decision::ScanTouched,
        Evidence { was_logging: false, .. } => Decision::ScanDirty,
        Evidence { before: Clean, .. } => Decision::Continue,
        Evidence { before: Killed, .. } => Decision::ReadSlots,
        Evidence { before: PowerLost, .. } => Decision::ScanTouched,
    }
}

/// Everything that an attach needs to know.
pub struct AttachRequest {
    pub disk: DiskId,
    pub machine: MachineId,
    pub generation: Generation,
    pub path: PathBuf,
    /// Where state and logs of block devices are kept, each in a folder named after its id.
    pub device_folder: PathBuf,
    /// Another volume than the disk's, if there is one.
    pub elsewhere: Arc<dyn Storage>,
    pub consumer: ServerId,
    pub limits: LogLimits,
    pub boot: Boot,
    pub clock: Arc<dyn Clock>,
}

/// A disk that is attached, and what the attach found.
pub struct Attached {
    pub disk: Arc<ProtectedDisk>,
    pub decision: Decision,
    /// Marks that a power loss took: they never become recovery points.
    pub lost_marks: usize,
}

/// Where the logs of a disk lie, what they are called, and where its other state lies.
struct Places {
    logs: Arc<dyn Storage>,
    stem: String,
    state: Arc<dyn Storage>,
    folder: PathBuf,
}

impl Places {
    fn of(request: &AttachRequest, is_block_device: bool) -> Result<Self, HostError> {
        let no_name = || HostError::NoName { path: request.path.clone() };
        let (folder, stem) = if is_block_device {
            let folder = request.device_folder.join(request.disk.to_string());
            create_private_folder(&folder).map_err(|source| HostError::State {
                what: "make a folder",
                folder: request.device_folder.clone(),
                source,
            })?;
            (folder, "disk".to_owned())
        } else {
            let path = tidemark_base::storage::canonical(&request.path)
                .map_err(|source| HostError::Io { what: "resolve the disk", source })?;
            let folder = path.parent().ok_or_else(no_name)?.to_owned();
            let stem = path.file_name().and_then(|name| name.to_str()).ok_or_else(no_name)?.to_owned();
            (folder, stem)
        };
        let state = RealStorage::create(folder.join(format!("{stem}.tidemark")))
            .map_err(|source| HostError::State { what: "make a folder", folder: folder.clone(), source })?;
        Ok(Self { logs: RealStorage::open_folder(folder.clone()), stem, state, folder })
    }

    fn failed(&self, what: &'static str) -> impl Fn(io::Error) -> HostError {
        let folder = self.folder.clone();
        move |source| HostError::State { what, folder: folder.clone(), source }
    }
}

/// What the session before left.
struct Remains {
    session: Option<Session>,
    slots: Option<SlotsFound>,
    intent: Option<ExtentSet>,
    dirty: Option<DirtyBitmap>,
    /// Closed logs of the session's epoch, oldest first; without a gap.
    logs: Vec<ClosedLog>,
    last: Option<LogReader>,
    newest: Timestamp,
    marked: Option<Position>,
    lost_marks: usize,
}

/// Opens a disk and takes over what the session before left, by the table of [`decide`].
///
/// 1. the disk is locked
/// 2. the remains are read, and logs that were not closed are cut and closed
/// 3. by the decision: what must be scanned is added to each consumer's scan, durably, or ranges in flight are logged
///    again, in a new log
/// 4. the slots begin anew
/// 5. the session is stored
/// 6. the intent bitmap begins anew
/// 7. logs that nobody needs are removed
///
/// Crash before 5: the session before still stands and is not clean, the slots are not its own any more (or still are): the
/// next attach decides at least as much. After 5: this session stands, not clean.
pub fn attach(request: AttachRequest) -> Result<Attached, HostError> {
    let disk = Arc::new(FileDisk::open(&request.path, Access::Exclusive)?);
    let places = Places::of(&request, disk.is_block_device())?;
    let identity = disk.identity().map_err(places.failed("examine the disk"))?;
    let mount = MountIdentity::of(&places.state.path("")).map_err(places.failed("examine the folder"))?;
    let now = request.clock.wall_now();
    let source = SourceIdentity {
        disk: request.disk,
        machine: request.machine,
        generation: request.generation,
        disk_bytes: disk.bytes(),
    };

    let mut evidence_of = Evidence {
        before: Before::Nothing,
        is_same_disk: false,
        may_have_been_written: true,
        was_logging: false,
        log: LogFound::Unusable,
        has_dirty: false,
        has_intent: false,
    };
    let mut remains = Remains::read(&places, &source)?;
    if let Some(session) = remains.session.take() {
        evidence_of = examine(&session, &remains, &identity, mount, &request.boot, now);
        evidence_of.has_intent &=
            !session.intent_lost && !exists(&*request.elsewhere, &intent_lost_file(&source)).unwrap_or(true);
        evidence_of.log = remains.read_logs(&places, &session, &evidence_of, now)?;
        remains.session = Some(session);
    }
    let mut decision = decide(&evidence_of);
    if let (Before::Nothing, Decision::ScanWhole(why)) = (evidence_of.before, &mut decision) {
        // A consumer's file may tell that this disk was fed before; then it is not the first time.
        *why = Why::First;
    }

    // What must be scanned, before anything is forgotten.
    let consumer = open_consumer(&places, &request, disk.bytes())?;
    let mut scan = ExtentSet::new();
    let slots = remains.slots.as_ref().map(|slots| slots.in_flight.clone()).unwrap_or_default();
    let slots: Vec<Extent> = slots.into_iter().filter(|extent| extent.is_valid_on(disk.bytes())).collect();
    let dirty = remains.dirty.as_ref().map(DirtyBitmap::extents).unwrap_or_default();
    let mut reason = ScanReason::Unclean;
    match decision {
        Decision::Continue | Decision::ReadSlots => {
            reason = ScanReason::Dirty;
            dirty.iter().for_each(|extent| scan.insert(extent));
        }
        Decision::ScanDirty | Decision::ScanTouched => {
            dirty.iter().for_each(|extent| scan.insert(extent));
            slots.iter().for_each(|extent| insert_granules(&mut scan, *extent));
            if decision == Decision::ScanTouched {
                remains.intent.iter().flat_map(ExtentSet::iter).for_each(|extent| scan.insert(extent));
            }
            if let Err(error) = remains.unacknowledged(&places, &request, consumer.cursor().as_ref(), &mut scan) {
                tracing::warn!(disk = %request.disk, error = %error, "the old log cannot be read; the whole disk is scanned");
                decision = Decision::ScanWhole(Why::LogUnusable);
            }
        }
        Decision::ScanWhole(_) => {}
    }
    if let Decision::ScanWhole(_) = decision {
        scan.insert(Extent::new(0, disk.bytes()));
    }
    // A consumer that holds nothing is to be scanned whole already, and its reason is worth keeping: zeroes need not be sent.
    let holds_nothing = consumer.holds_nothing();
    if !scan.is_empty() && !holds_nothing {
        consumer.add(&scan, reason, ScanRevision(1)).map_err(places.failed("mark blocks"))?;
    }

    // The log.
    let is_same_epoch = matches!(decision, Decision::Continue | Decision::ReadSlots);
    let mut epochs = remains.session.as_ref().map(|session| session.epochs.clone()).unwrap_or_default();
    let old_logs = logs_in(&*places.logs, &places.stem).map_err(places.failed("list the logs"))?;
    let start = if is_same_epoch {
        remains.logs.last().map(|log| log.end).unwrap_or_else(|| epochs[epochs.len() - 1].start())
    } else {
        push_epoch(&mut epochs, Epoch::random());
        remains.logs.clear();
        remains.last = None;
        remains.marked = None;
        epochs[epochs.len() - 1].start()
    };
    let kept: Vec<u64> = remains.logs.iter().map(|log| log.name.number).collect();
    let newest = remains.newest.max(remains.session.as_ref().map_or(Timestamp(0), |session| session.newest));
    let log = DiskLog::start(
        LogPlace {
            storage: places.logs.clone(),
            stem: places.stem.clone(),
            disk: request.disk,
            disk_bytes: disk.bytes(),
            clock: request.clock.clone(),
        },
        request.limits,
        start,
        Found {
            closed: remains.logs,
            last: remains.last,
            newest,
            marked: remains.marked,
            next_number: old_logs.last().map_or(1, |name| name.number + 1),
        },
    )?;
    if decision == Decision::ReadSlots {
        log_from_disk(&*disk, &log, &slots).map_err(places.failed("log again what was in flight"))?;
    }

    // This session.
    let session = Session {
        version: session::VERSION,
        disk: request.disk,
        session: SessionId::random(),
        boot: request.boot,
        mount,
        epochs,
        mode: Mode::Data,
        identity,
        newest,
        clean: None,
        intent_lost: false,
    };
    let slots_file =
        preallocated(&*places.state, "slots", slots::FILE_BYTES).map_err(places.failed("make the slots"))?;
    let dirty = match remains.dirty {
        Some(dirty) => dirty,
        None => {
            let file = emptied(&*places.state, "dirty").map_err(places.failed("make the dirty bitmap"))?;
            DirtyBitmap::create(file, disk.bytes()).map_err(places.failed("make the dirty bitmap"))?
        }
    };
    let intent_file = preallocated(&*places.state, "intent", Intent::file_bytes(disk.bytes()))
        .map_err(places.failed("make the intent bitmap"))?;
    places.state.sync_folder("").map_err(places.failed("sync the folder"))?;
    let slot_table = slots_file
        .as_file()
        .ok_or_else(|| io::Error::other("the slot table needs a file that can be mapped"))
        .and_then(|file| SlotTable::start(file, session.session, now))
        .map_err(places.failed("map the slots"))?;
    session.store(&*places.state).map_err(places.failed("store the session"))?;
    // Regions whose sync is still owed keep their bits; where a new epoch begins they are in the scans.
    let kept_intent = match decision {
        Decision::ReadSlots => remains.intent.filter(|_| evidence_of.has_intent).unwrap_or_else(|| {
            let mut all = ExtentSet::new();
            all.insert(Extent::new(0, disk.bytes()));
            all
        }),
        _ => ExtentSet::new(),
    };
    let intent =
        Intent::start(intent_file, disk.bytes(), &kept_intent).map_err(places.failed("make the intent bitmap"))?;
    dirty.clear_all();
    if exists(&*request.elsewhere, &intent_lost_file(&source)).unwrap_or(false) {
        request.elsewhere.remove(&intent_lost_file(&source)).map_err(places.failed("forget a lost intent bitmap"))?;
    }
    for name in old_logs.iter().filter(|name| !kept.contains(&name.number)) {
        remove_log(&*places.logs, name).map_err(places.failed("remove an old log"))?;
    }
    tracing::info!(disk = %request.disk, path = %request.path.display(), ?decision, epoch = %start.epoch, "disk attached");
    let attached = request.clock.monotonic_now();
    let disk = Arc::new(ProtectedDisk {
        identity: source,
        path: request.path,
        disk,
        state: places.state,
        elsewhere: request.elsewhere,
        log: Arc::new(log),
        in_flight: InFlight::new(slot_table),
        intent,
        dirty,
        consumers: Mutex::new(vec![Arc::new(consumer)]),
        watchers: Watchers::default(),
        clock: request.clock,
        attached,
        session: Mutex::new(session),
        mode: Mutex::new(Mode::Data),
        adding: Mutex::new(()),
        revision: AtomicU64::new(1),
        changing_epoch: Mutex::new(()),
        closed: AtomicBool::new(false),
        writes: AtomicU64::new(0),
        written_bytes: AtomicU64::new(0),
        keeper: Mutex::default(),
        alarms: Mutex::default(),
        barrier: OnceLock::new(),
    });
    Ok(Attached { disk, decision, lost_marks: remains.lost_marks })
}

/// What the session file, the slots and the disk say about each other.
fn examine(
    session: &Session,
    remains: &Remains,
    identity: &DiskIdentity,
    mount: MountIdentity,
    boot: &Boot,
    now: Timestamp,
) -> Evidence {
    let slots = remains.slots.as_ref().filter(|slots| slots.session == session.session);
    let is_same_disk = session.identity.device == identity.device
        && session.identity.inode == identity.inode
        && session.identity.bytes == identity.bytes;
    let is_same_boot = session.boot.id == boot.id && session.mount == mount;
    let changed = Timestamp(identity.changed_ns.max(identity.modified_ns).clamp(0, i128::from(u64::MAX)) as u64);
    let (before, may_have_been_written) = match (&session.clean, slots) {
        (Some(clean), _) => (Before::Clean, clean.identity != *identity || clean.at > now),
        (None, Some(slots)) if is_same_boot => {
            // A write in flight may have touched the disk a little after we last looked at the clock.
            let slack = if slots.in_flight.is_empty() { 0 } else { IN_FLIGHT_SLACK_NS };
            let last = Timestamp(slots.activity.0.saturating_add(slack));
            (Before::Killed, changed > last || slots.activity > now)
        }
        // The disk's own file system was unmounted, which wrote everything, or the machine went down.
        (None, Some(slots)) if session.boot.id == boot.id => (Before::PowerLost, changed > slots.activity),
        // Not only this boot counts: there may have been others in between, in which the agent did not run.
        (None, Some(slots)) => {
            let last = Timestamp(slots.activity.0.saturating_add(POWER_LOST_SLACK_NS));
            (Before::PowerLost, changed > boot.started || changed > last)
        }
        (None, _) => (Before::PowerLost, changed > boot.started || session.boot.id == boot.id),
    };
    Evidence {
        before,
        is_same_disk,
        may_have_been_written: may_have_been_written || identity.is_block_device,
        was_logging: session.mode == Mode::Data,
        log: LogFound::Unusable,
        has_dirty: remains.dirty.is_some(),
        has_intent: remains.intent.is_some(),
    }
}

/// How long the system may take from our look at the clock to its change of the disk's times.
const IN_FLIGHT_SLACK_NS: u64 = 1_000_000_000;
/// How much later than the last step that was synced the last write before a power loss may have been: the keeper syncs
/// about every second, and a sync may take long.
const POWER_LOST_SLACK_NS: u64 = 60_000_000_000;

impl Remains {
    fn read(places: &Places, source: &SourceIdentity) -> Result<Self, HostError> {
        let state = &*places.state;
        let failed = places.failed("read the state");
        let session = Session::load(state).map_err(&failed)?.filter(|session| session.disk == source.disk);
        let open = |name: &str| -> io::Result<Option<Arc<dyn StorageFile>>> {
            Ok(if state.exists(name)? { Some(state.open(name, OpenMode::ReadWrite)?) } else { None })
        };
        let slots = match open("slots").map_err(&failed)? {
            Some(file) => file.as_file().map(SlotTable::read).transpose().map_err(&failed)?.flatten(),
            None => None,
        };
        // A medium that cannot read them back has no bitmaps.
        let intent = open("intent").map_err(&failed)?;
        let intent = intent.and_then(|file| Intent::read(&*file, source.disk_bytes).ok().flatten());
        let dirty = open("dirty").map_err(&failed)?;
        let dirty = dirty.and_then(|file| DirtyBitmap::open(file, source.disk_bytes).ok().flatten());
        Ok(Self {
            session,
            slots,
            intent,
            dirty,
            logs: Vec::new(),
            last: None,
            newest: Timestamp(0),
            marked: None,
            lost_marks: 0,
        })
    }

    /// Judges the logs, and closes those that can be kept.
    fn read_logs(
        &mut self,
        places: &Places,
        session: &Session,
        evidence: &Evidence,
        now: Timestamp,
    ) -> Result<LogFound, HostError> {
        let cause = if evidence.before == Before::PowerLost { Cause::PowerLoss } else { Cause::ProcessKilled };
        let disk = session.disk;
        let examination = match Examination::examine(places.logs.clone(), &places.stem, disk, cause) {
            Ok(examination) => examination,
            Err(error @ LogError::Io { .. }) => return Err(error.into()),
            Err(error) => {
                tracing::warn!(%disk, error = %error, "log cannot be recovered");
                return Ok(LogFound::Unusable);
            }
        };
        match examination.verdict() {
            Verdict::Damaged { path, offset, what, .. } => {
                tracing::warn!(%disk, path = %path.display(), offset, what, "log is damaged");
                return Ok(LogFound::Unusable);
            }
            Verdict::NeedsCompare { path, what } => {
                tracing::warn!(%disk, path = %path.display(), what, "log cannot be trusted");
                return Ok(LogFound::Unusable);
            }
            Verdict::Cut { discarded_records, lost_marks, .. } => {
                self.lost_marks = lost_marks.len();
                tracing::warn!(%disk, discarded_records, lost_marks = lost_marks.len(), "log lost its tail");
            }
            Verdict::NothingOpen | Verdict::Kept { .. } => {}
        }
        examination.finish(now)?;
        let epoch = session.epochs[session.epochs.len() - 1];
        for name in logs_in(&*places.logs, &places.stem).map_err(places.failed("list the logs"))? {
            match LogReader::open(places.logs.clone(), &name, disk) {
                // Of an epoch that did not begin, or that ended: not needed any more.
                Ok(reader) if reader.start().epoch != epoch => {}
                Ok(reader) => {
                    self.logs.push(ClosedLog::from(&reader));
                    self.last = Some(reader);
                }
                Err(error @ LogError::Io { .. }) if error.os_error() != Some(libc::ENOENT) => return Err(error.into()),
                Err(error) => {
                    tracing::warn!(%disk, error = %error, "log cannot be read");
                    return Ok(LogFound::Unusable);
                }
            }
        }
        let is_whole = self.logs.windows(2).all(|pair| pair[0].end == pair[1].start);
        let end = self.logs.last().map(|log| log.end);
        // Where logging ended with an error, records that nobody was told of may follow; their blocks are dirty as well.
        let is_promised = session.clean.as_ref().is_none_or(|clean| match end {
            Some(end) if !evidence.was_logging => {
                end.epoch == clean.position.epoch && end.sequence >= clean.position.sequence
            }
            end => end == Some(clean.position),
        });
        let Some(last) = &self.last else { return Ok(LogFound::Unusable) };
        if !is_whole || !is_promised {
            return Ok(LogFound::Unusable);
        }
        // The newest time and mark: at most one log is read for them.
        let mut records = last.records();
        loop {
            match records.next() {
                Ok(Some(record)) => {
                    self.newest = self.newest.max(record.time);
                    if let RecordKind::Mark { .. } = record.kind {
                        self.marked = Some(records.position());
                    }
                }
                Ok(None) => return Ok(LogFound::Sound),
                Err(error) => {
                    tracing::warn!(%disk, error = %error, "log cannot be read");
                    return Ok(LogFound::Unusable);
                }
            }
        }
    }

    /// Adds what the logs changed after the cursor; everything, if the cursor is of another epoch.
    fn unacknowledged(
        &self,
        places: &Places,
        request: &AttachRequest,
        cursor: Option<&Position>,
        into: &mut ExtentSet,
    ) -> Result<(), LogError> {
        for log in &self.logs {
            let cursor = cursor.filter(|cursor| cursor.epoch == log.start.epoch);
            if cursor.is_some_and(|cursor| cursor.sequence >= log.end.sequence) {
                continue;
            }
            let reader = LogReader::open(places.logs.clone(), &log.name, request.disk)?;
            let mut records = match cursor {
                Some(cursor) if cursor.sequence > log.start.sequence => reader.records_after(cursor)?,
                _ => reader.records(),
            };
            while let Some(record) = records.next()? {
                if let Some(extent) = record.extent() {
                    insert_granules(into, extent);
                }
            }
        }
        Ok(())
    }
}

/// Removes the logs and the state of a disk that is not protected any more. The disk is not attached.
pub fn remove_state(path: &Path, device_folder: &Path, disk: DiskId) -> io::Result<()> {
    // As at attach: beside the file itself, not beside a link to it.
    let path = &path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let device = device_folder.join(disk.to_string());
    if device.exists() {
        return RealStorage::open_folder(device_folder).remove_folder(&disk.to_string());
    }
    let (Some(folder), Some(stem)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Ok(());
    };
    let storage = RealStorage::open_folder(folder);
    for name in logs_in(&*storage, stem)? {
        remove_log(&*storage, &name)?;
    }
    let state = format!("{stem}.tidemark");
    if storage.exists(&state)? {
        storage.remove_folder(&state)?;
    }
    storage.sync_folder("")
}

/// What another process server acknowledged says nothing once this one is fed alone: changes would be missed if the
/// other came back, so it is scanned whole then.
fn forget_other_consumers(state: &dyn Storage, consumer: ServerId) -> io::Result<()> {
    for name in state.list("")? {
        let other = name.strip_prefix("consumer-").or_else(|| name.strip_prefix("scan-"));
        if other.is_some_and(|other| other.trim_end_matches(".new") != consumer.to_string()) {
            state.remove(&name)?;
        }
    }
    state.sync_folder("")
}

fn open_consumer(places: &Places, request: &AttachRequest, disk_bytes: u64) -> Result<Consumer, HostError> {
    let failed = places.failed("keep the consumer's state");
    forget_other_consumers(&*places.state, request.consumer).map_err(&failed)?;
    let found = Consumer::open(places.state.clone(), request.consumer, disk_bytes).map_err(&failed)?;
    match found {
        Some(consumer) => Ok(consumer),
        None => Consumer::create(places.state.clone(), request.consumer, disk_bytes).map_err(&failed),
    }
}

fn exists(storage: &dyn Storage, name: &str) -> io::Result<bool> {
    storage.exists(name)
}

fn emptied(state: &dyn Storage, name: &str) -> io::Result<Arc<dyn StorageFile>> {
    let file = state.open(name, OpenMode::OpenOrCreate)?;
    file.set_bytes(0)?;
    Ok(file)
}

/// A file of exactly this size whose blocks are all there, so that no store to it can lack room. What it holds stays.
fn preallocated(state: &dyn Storage, name: &str, bytes: u64) -> io::Result<Arc<dyn StorageFile>> {
    let file = state.open(name, OpenMode::OpenOrCreate)?;
    let found = file.bytes()?;
    if found > bytes {
        file.set_bytes(bytes)?;
    } else if found < bytes {
        file.write_at(found, &vec![0; (bytes - found) as usize])?;
    }
    file.sync()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every_evidence() -> impl Iterator<Item = Evidence> {
        let flags = 0..32u32;
        [Before::Nothing, Before::Clean, Before::Killed, Before::PowerLost].into_iter().flat_map(move |before| {
            flags.clone().flat_map(move |flags| {
                [LogFound::Sound, LogFound::Unusable].into_iter().map(move |log| Evidence {
                    before,
                    is_same_disk: flags & 1 != 0,
                    may_have_been_written: flags & 2 != 0,
                    was_logging: flags & 4 != 0,
                    log,
                    has_dirty: flags & 8 != 0,
                    has_intent: flags & 16 != 0,
                })
            })
        })
    }

    /// What each kind of harm demands at least, said apart from the table.
    fn least(evidence: &Evidence) -> u32 {
        let mut least = 0;
        let mut need = |condition: bool, rank: u32| {
            if condition {
                least = least.max(rank);
            }
        };
        need(evidence.before == Before::Nothing, 4);
        need(!evidence.is_same_disk || evidence.may_have_been_written || !evidence.has_dirty, 4);
        need(evidence.log == LogFound::Unusable, 4);
        need(!evidence.was_logging, 2);
        need(evidence.before == Before::Killed, 1);
        need(evidence.before == Before::PowerLost, if evidence.has_intent { 3 } else { 4 });
        least
    }

    #[test]
    fn every_row_does_exactly_what_the_evidence_demands() {
        let mut rows = 0;
        for evidence in every_evidence() {
            let rank = match decide(&evidence) {
                Decision::Continue => 0,
                Decision::ReadSlots => 1,
                Decision::ScanDirty => 2,
                Decision::ScanTouched => 3,
                Decision::ScanWhole(_) => 4,
            };
            assert_eq!(rank, least(&evidence), "{evidence:?}");
            rows += 1;
        }
        assert_eq!(rows, 256);
    }

    #[test]
    fn the_rows_as_they_are_named() {
        let sound = Evidence {
            before: Before::Clean,
            is_same_disk: true,
            may_have_been_written: false,
            was_logging: true,
            log: LogFound::Sound,
            has_dirty: true,
            has_intent: true,
        };
        let whole = Decision::ScanWhole;
        for (evidence, decision) in [
            (sound, Decision::Continue),
            (Evidence { before: Before::Nothing, ..sound }, whole(Why::First)),
            (Evidence { before: Before::Killed, ..sound }, Decision::ReadSlots),
            (Evidence { before: Before::PowerLost, ..sound }, Decision::ScanTouched),
            (Evidence { before: Before::Killed, was_logging: false, ..sound }, Decision::ScanDirty),
            (Evidence { before: Before::PowerLost, was_logging: false, ..sound }, Decision::ScanTouched),
            (Evidence { is_same_disk: false, ..sound }, whole(Why::OtherDisk)),
            (Evidence { may_have_been_written: true, ..sound }, whole(Why::WrittenMeanwhile)),
            (Evidence { log: LogFound::Unusable, ..sound }, whole(Why::LogUnusable)),
            (Evidence { before: Before::PowerLost, has_intent: false, ..sound }, whole(Why::StateDamaged)),
            (Evidence { before: Before::Killed, has_intent: false, ..sound }, Decision::ReadSlots),
            (Evidence { has_dirty: false, ..sound }, whole(Why::StateDamaged)),
        ] {
            assert_eq!(decide(&evidence), decision, "{evidence:?}");
        }
    }
}
