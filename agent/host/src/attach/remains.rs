//! What the session before left beside the disk, and what it is worth.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use tidemark_base::disk::DiskIdentity;
use tidemark_base::storage::{OpenMode, RealStorage, Storage, StorageFile, canonical, create_private_folder};
use tidemark_base::{Extent, ExtentSet, Position, Timestamp};
use tidemark_hrl::{Cause, Examination, Held, LogError, LogReader, RecordKind, Verdict};

use super::AttachRequest;
use super::decide::{Before, DiskFound, Evidence, LogFound, Written};
use crate::error::HostError;
use crate::log::{ClosedLog, logs_in};
use crate::protected::insert_granules;
use crate::source::SourceIdentity;
use crate::state::dirty::DirtyBitmap;
use crate::state::intent::{Intent, IntentFound};
use crate::state::session::{Boot, Mode, MountIdentity, Session, SessionFile};
use crate::state::slots::{SlotTable, SlotsFound};

/// How long the system may take from our look at the clock to its change of the disk's times.
const IN_FLIGHT_SLACK_NS: u64 = 1_000_000_000;
/// How much later than the last step that was synced the last write before a power loss may have been: the keeper syncs
/// about every second, and a sync may take long.
const POWER_LOST_SLACK_NS: u64 = 60_000_000_000;
/// With less room than this a log may not be closed: its last block is written then.
const CLOSE_ROOM_BYTES: u64 = 1 << 20;

/// Where the logs of a disk lie, what they are called, and where its other state lies.
pub(super) struct Places {
    pub logs: Arc<dyn Storage>,
    pub stem: String,
    pub state: Arc<dyn Storage>,
    pub folder: PathBuf,
}

impl Places {
    pub fn of(request: &AttachRequest, is_block_device: bool) -> Result<Self, HostError> {
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
            let path = canonical(&request.path).map_err(|source| HostError::Io { what: "resolve the disk", source })?;
            let folder = path.parent().ok_or_else(no_name)?.to_owned();
            let stem = path.file_name().and_then(|name| name.to_str()).ok_or_else(no_name)?.to_owned();
            (folder, stem)
        };
        let state = RealStorage::create(folder.join(format!("{stem}.tidemark")))
            .map_err(|source| HostError::State { what: "make a folder", folder: folder.clone(), source })?;
        Ok(Self { logs: RealStorage::open_folder(folder.clone()), stem, state, folder })
    }

    pub fn failed(&self, what: &'static str) -> impl Fn(io::Error) -> HostError {
        let folder = self.folder.clone();
        move |source| HostError::State { what, folder: folder.clone(), source }
    }
}

pub(super) struct Remains {
    pub session: Option<Session>,
    pub slots: Option<SlotsFound>,
    pub intent: Option<IntentFound>,
    pub dirty: Option<DirtyBitmap>,
    /// Closed logs of the session's epoch, oldest first; without a gap.
    pub logs: Vec<ClosedLog>,
    pub last: Option<LogReader>,
    /// What logs changed that cannot be kept.
    pub held: ExtentSet,
    pub newest: Timestamp,
    pub marked: Option<Position>,
    pub lost_marks: usize,
    /// What is wrong with the log, for people.
    pub defect: Option<String>,
}

impl Remains {
    pub fn read(places: &Places, source: &SourceIdentity) -> Result<Self, HostError> {
        let state = &*places.state;
        let failed = places.failed("read the state");
        let session = SessionFile::peek(&places.state).map_err(&failed)?.filter(|session| session.disk == source.disk);
        let known_bytes = known_bytes(session.as_ref(), source.disk_bytes);
        let open = |name: &str| -> io::Result<Option<Arc<dyn StorageFile>>> {
            Ok(if state.exists(name)? { Some(state.open(name, OpenMode::ReadWrite)?) } else { None })
        };
        let slots = match open("slots").map_err(&failed)? {
            Some(file) => file.as_file().map(SlotTable::read).transpose().map_err(&failed)?.flatten(),
            None => None,
        };
        // A medium that cannot read them back has no bitmaps.
        let intent = open("intent").map_err(&failed)?;
        let intent = intent.and_then(|file| Intent::read(&*file, known_bytes).ok().flatten());
        let dirty = open("dirty").map_err(&failed)?;
        let dirty = dirty.and_then(|file| DirtyBitmap::open(file, known_bytes).ok().flatten());
        Ok(Self {
            session,
            slots,
            intent,
            dirty,
            logs: Vec::new(),
            last: None,
            held: ExtentSet::new(),
            newest: Timestamp(0),
            marked: None,
            lost_marks: 0,
            defect: None,
        })
    }

    /// What was in flight, as far as it lies on the disk.
    pub fn in_flight(&self, disk_bytes: u64) -> Vec<Extent> {
        if tidemark_base::sabotage::is("slots-read") {
            return Vec::new();
        }
        let slots = self.slots.iter().flat_map(|slots| slots.in_flight.iter().copied());
        slots.filter(|extent| extent.is_valid_on(disk_bytes)).collect()
    }

    /// How large the disk was for the session before: its bitmaps are of that size.
    pub fn known_bytes(&self, disk_bytes: u64) -> u64 {
        known_bytes(self.session.as_ref(), disk_bytes)
    }

    pub fn end(&self) -> Option<Position> {
        self.logs.last().map(|log| log.end)
    }

    /// What the session file, the slots and the disk say about each other.
    pub fn examine(
        &self,
        session: &Session,
        identity: &DiskIdentity,
        mount: MountIdentity,
        boot: &Boot,
        now: Timestamp,
    ) -> Evidence {
        let slots = self.slots.as_ref().filter(|slots| slots.session == session.session);
        let is_same_boot = session.boot.id == boot.id && session.mount == mount;
        let before = match (&session.clean, slots) {
            (Some(_), _) => Before::Clean,
            (None, Some(_)) if is_same_boot => Before::Killed,
            (None, _) => Before::PowerLost,
        };
        Evidence {
            before,
            disk: compare(&session.identity, identity),
            written: written(before, session, slots, identity, boot, now),
            was_logging: session.mode == Mode::Data,
            has_history: false,
            log: LogFound::Unknown,
            has_dirty: self.dirty.is_some(),
            // Its bits were cleared by syncs that did not cover what an earlier one had lost.
            has_intent: self.intent.is_some()
                && !session.intent_lost
                && !(session.sync_failed && before == Before::PowerLost),
        }
    }

    /// Judges the logs, and closes those that can be kept. `cursor` is what every consumer acknowledged at least.
    pub fn read_logs(
        &mut self,
        places: &Places,
        session: &Session,
        evidence: &Evidence,
        cursor: Option<&Position>,
        now: Timestamp,
    ) -> Result<LogFound, HostError> {
        let cause = if evidence.before == Before::PowerLost { Cause::PowerLoss } else { Cause::ProcessKilled };
        let disk = session.disk;
        let epoch = session.epochs.last().copied();
        let examination = match Examination::examine_epoch(places.logs.clone(), &places.stem, disk, cause, epoch) {
            Ok(examination) => examination,
            Err(error @ LogError::Io { .. }) => return Err(error.into()),
            Err(error) => return Ok(self.unknown(format!("the log cannot be recovered: {error}"))),
        };
        let mut found = LogFound::Sound;
        match examination.verdict() {
            Verdict::Damaged { path, offset, what, held, .. } => {
                self.defect = Some(format!("{} is damaged at byte {offset}: {what}", path.display()));
                found = match held {
                    Held::Extents(extents) => {
                        self.held = extents.clone();
                        LogFound::Held
                    }
                    Held::Unknown => LogFound::Unknown,
                };
            }
            Verdict::NeedsCompare { path, what } => {
                self.defect = Some(format!("{} cannot be trusted: {what}", path.display()));
                found = LogFound::Unknown;
            }
            Verdict::Cut { discarded_records, lost_marks, .. } => {
                self.lost_marks = lost_marks.len();
                tracing::warn!(%disk, discarded_records, lost_marks = lost_marks.len(), "log lost its tail");
            }
            Verdict::NothingOpen | Verdict::Kept { .. } => {}
        }
        if found != LogFound::Unknown {
            found = self.close_logs(places, examination, cursor, found, now)?;
        } else {
            examination.finish(now)?;
        }
        if found == LogFound::Unknown { Ok(found) } else { self.read_closed(places, session, evidence, found) }
    }

    /// Closes what can be kept; where there is no room for that, its blocks are looked at instead.
    fn close_logs(
        &mut self,
        places: &Places,
        examination: Examination,
        cursor: Option<&Position>,
        found: LogFound,
        now: Timestamp,
    ) -> Result<LogFound, HostError> {
        let is_full = places.logs.available_bytes().is_ok_and(|bytes| bytes < CLOSE_ROOM_BYTES);
        let mut intact = ExtentSet::new();
        if is_full || found == LogFound::Held {
            intact = examination.extents(cursor)?;
        }
        match examination.finish(now) {
            Ok(_) if found == LogFound::Sound => return Ok(LogFound::Sound),
            Ok(_) => {}
            Err(error) if is_full && error.is_full() => {
                self.defect = Some(format!("there is no room to close the log: {error}"));
            }
            Err(error) => return Err(error.into()),
        }
        intact.iter().for_each(|extent| self.held.insert(extent));
        Ok(LogFound::Held)
    }

    /// Reads the closed logs of the session's epoch, and whether they are all there.
    fn read_closed(
        &mut self,
        places: &Places,
        session: &Session,
        evidence: &Evidence,
        found: LogFound,
    ) -> Result<LogFound, HostError> {
        let disk = session.disk;
        let epoch = session.epochs[session.epochs.len() - 1];
        for name in logs_in(&*places.logs, &places.stem).map_err(places.failed("list the logs"))? {
            match LogReader::open(places.logs.clone(), &name, disk) {
                // Of an epoch that did not begin, or that ended: not needed any more.
                Ok(reader) if reader.start().epoch != epoch => {}
                Ok(reader) => {
                    self.logs.push(ClosedLog::from(&reader));
                    self.last = Some(reader);
                }
                // The one that could not be closed, last of all.
                Err(LogError::NotClosed { .. }) if found == LogFound::Held => break,
                Err(error @ LogError::Io { .. }) if !error.is_absent() => return Err(error.into()),
                Err(error) => return Ok(self.unknown(format!("the log cannot be read: {error}"))),
            }
        }
        if !self.logs.windows(2).all(|pair| pair[0].end == pair[1].start) {
            return Ok(self.unknown("a log between two others is missing".to_owned()));
        }
        if found == LogFound::Held {
            return Ok(found);
        }
        let end = self.end();
        // Where logging ended with an error, records that nobody was told of may follow; their blocks are dirty as well.
        let is_promised = session.clean.as_ref().is_none_or(|clean| match end {
            Some(end) if !evidence.was_logging => {
                end.epoch == clean.position.epoch && end.sequence >= clean.position.sequence
            }
            // In bitmap mode logs go when everything in them was acknowledged.
            None => !evidence.was_logging,
            end => end == Some(clean.position),
        });
        if !is_promised {
            return Ok(self.unknown("the log does not end where it was left".to_owned()));
        }
        let Some(last) = &self.last else {
            return Ok(if evidence.was_logging { self.unknown("the log is missing".to_owned()) } else { found });
        };
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
                Err(error) => return Ok(self.unknown(format!("the log cannot be read: {error}"))),
            }
        }
    }

    fn unknown(&mut self, defect: String) -> LogFound {
        self.defect = Some(defect);
        LogFound::Unknown
    }

    /// Adds what the logs changed after the cursor; everything, if the cursor is of another epoch.
    pub fn unacknowledged(
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

fn compare(before: &DiskIdentity, now: &DiskIdentity) -> DiskFound {
    let is_born_together = before.born_ns.is_none() || now.born_ns.is_none() || before.born_ns == now.born_ns;
    if before.device != now.device || before.inode != now.inode || !is_born_together {
        DiskFound::Replaced
    } else if before.bytes < now.bytes {
        DiskFound::Grown { from: before.bytes, to: now.bytes }
    } else if before.bytes > now.bytes {
        DiskFound::Shrunk { from: before.bytes, to: now.bytes }
    } else {
        DiskFound::Same
    }
}

fn known_bytes(session: Option<&Session>, disk_bytes: u64) -> u64 {
    session.map_or(disk_bytes, |session| session.identity.bytes.min(disk_bytes))
}

/// Whether someone else may have written: for a clean detach, any difference in times; after a kill, a change later than our
/// last step; after a power loss, a change well after our last step, or in this boot.
fn written(
    before: Before,
    session: &Session,
    slots: Option<&SlotsFound>,
    identity: &DiskIdentity,
    boot: &Boot,
    now: Timestamp,
) -> Written {
    if identity.is_block_device {
        return Written::Unwitnessed;
    }
    let changed = Timestamp(identity.changed_ns.max(identity.modified_ns).clamp(0, i128::from(u64::MAX)) as u64);
    let last_seen = session.clean.as_ref().map(|clean| clean.at).or(slots.map(|slots| slots.activity));
    let is_changed = match (&session.clean, slots) {
        (Some(clean), _) => clean.identity != *identity,
        (None, Some(slots)) if before == Before::Killed => {
            // A write in flight may have touched the disk a little after we last looked at the clock.
            let slack = if slots.in_flight.is_empty() { 0 } else { IN_FLIGHT_SLACK_NS };
            changed > Timestamp(slots.activity.0.saturating_add(slack))
        }
        // The disk's own file system was unmounted, which wrote everything, or the machine went down.
        (None, Some(slots)) if session.boot.id == boot.id => changed > slots.activity,
        // Not only this boot counts: there may have been others in between, in which the agent did not run.
        (None, Some(slots)) => {
            let last = Timestamp(slots.activity.0.saturating_add(POWER_LOST_SLACK_NS));
            changed > boot.started || changed > last
        }
        (None, None) => changed > boot.started || session.boot.id == boot.id,
    };
    if is_changed {
        Written::Yes
    } else if last_seen.is_some_and(|seen| seen > now) {
        Written::ClockSteppedBack
    } else {
        Written::No
    }
}
