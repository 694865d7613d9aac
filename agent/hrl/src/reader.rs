//! Reading a log, active or closed.
//!
//! *Consistency.* Nothing past the published position of an active log is looked at. Each slot's tag, each sequence, the
//! history hash and each record's data are verified when they are read. *Retries.* None. *Crash.* Reading changes
//! nothing. Damage is an error that names file and offset, wherever it is: only recovery may cut a log.

use std::sync::Arc;

use tidemark_base::storage::{OpenMode, Storage};
use tidemark_base::{DiskId, Extent, HistoryHash, Position, Sequence, Timestamp};
use uuid::Uuid;

use crate::active::{MARK_BODY_BYTES_MAX, RECORD_BYTES_MAX, ZEROES_BYTES_MAX};
use crate::companion::{
    BODY_SLOT_BYTES, Durable, End, Identity, RECORDS_OFFSET, RecordSlot, SLOT_BYTES, Slot, SlotKind, Start, control_at,
    sequence_of, verify,
};
use crate::error::{LogError, Result};
use crate::format::{HEADER_BYTES, HrlFile, array_at};
use crate::hash::{Event, ZEROES_DIGEST, history_after, slot_key};
use crate::log::{Log, Parts, SyncState, io_error};
use crate::name::LogName;

/// A record of a log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    pub sequence: Sequence,
    pub time: Timestamp,
    pub kind: RecordKind,
    /// The history hash after this record.
    pub history: HistoryHash,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RecordKind {
    Write {
        extent: Extent,
        /// In the `.hrl` file.
        data_offset: u64,
        digest: [u8; 32],
        /// The weak one, of the HRL entry.
        checksum: u32,
    },
    Zeroes {
        extent: Extent,
    },
    Mark {
        body: Vec<u8>,
    },
}

impl Record {
    /// What it changes on the disk: nothing, if it is a mark.
    pub fn extent(&self) -> Option<Extent> {
        match self.kind {
            RecordKind::Write { extent, .. } | RecordKind::Zeroes { extent } => Some(extent),
            RecordKind::Mark { .. } => None,
        }
    }
}

/// Reads one log. Clones share it.
#[derive(Clone)]
pub struct LogReader {
    log: Arc<Log>,
}

impl LogReader {
    pub(crate) fn new(log: Arc<Log>) -> Self {
        Self { log }
    }

    /// Opens a closed log.
    pub fn open(storage: Arc<dyn Storage>, name: &LogName, disk: DiskId) -> Result<Self> {
        let data = storage.open(&name.hrl(), OpenMode::Read).map_err(io_error(&*storage, name, "open"))?;
        if !storage.exists(&name.companion()).map_err(io_error(&*storage, name, "open"))? {
            return Err(LogError::NoCompanion { path: storage.path(&name.hrl()) });
        }
        let companion = storage.open(&name.companion(), OpenMode::Read).map_err(io_error(&*storage, name, "open"))?;
        let data_path = storage.path(&name.hrl());
        let (header, checksum) = HrlFile::header_of(&data).map_err(|defect| LogError::Damaged {
            path: data_path.clone(),
            offset: defect.offset,
            what: defect.kind.to_string(),
        })?;
        if header.eol_location == 0 {
            return Err(LogError::NotClosed { path: data_path });
        }
        let control = Control::read(&*storage, name, &*companion, disk)?;
        let damaged = |offset, what: &str| LogError::Damaged {
            path: storage.path(&name.companion()),
            offset,
            what: what.to_owned(),
        };
        let start = control.start.ok_or_else(|| damaged(control_at::START, "a closed log was never started"))?;
        let end = control.end.ok_or_else(|| damaged(control_at::END, "a closed log has no end"))?;
        let is_of_companion = checksum.is_ok()
            && header.unique_id == control.identity.log
            && header.previous_unique_id == start.previous
            && header.eol_location == end.eol_location;
        if !is_of_companion {
            let what = "the file header does not agree with the companion".to_owned();
            return Err(LogError::Damaged { path: data_path, offset: 0, what });
        }
        let bytes = companion.bytes().map_err(io_error(&*storage, name, "open"))?;
        if end.reached.companion_bytes > bytes || end.reached.companion_bytes < RECORDS_OFFSET {
            return Err(damaged(bytes, "the companion is shorter than its end says"));
        }
        let bytes = data.bytes().map_err(io_error(&*storage, name, "open"))?;
        if end.eol_location > bytes || end.reached.data_bytes > end.eol_location {
            let what = "the log is shorter than its header says".to_owned();
            return Err(LogError::Damaged { path: data_path, offset: bytes, what });
        }
        let sync =
            SyncState { durable: Durable { count: control.durable.count, reached: Some(end.reached) }, before: None };
        let parts = Parts { storage, name: name.clone(), identity: control.identity, data, companion };
        Ok(Self { log: Arc::new(Log::new(parts, start, end.reached, sync, true)) })
    }

    pub fn name(&self) -> &LogName {
        &self.log.name
    }

    pub fn id(&self) -> Uuid {
        self.log.identity.log
    }

    /// The unique id of the log before; `None` for the first of a chain.
    pub fn previous_id(&self) -> Option<Uuid> {
        (!self.log.start.previous.is_nil()).then_some(self.log.start.previous)
    }

    pub fn disk_bytes(&self) -> u64 {
        self.log.identity.disk_bytes
    }

    pub fn start(&self) -> Position {
        self.log.start.position
    }

    /// Up to where the log can be read now; of a closed log its end for ever.
    pub fn end(&self) -> Position {
        self.log.position()
    }

    pub fn is_closed(&self) -> bool {
        self.log.is_closed()
    }

    /// Length of both files, holes included.
    pub fn apparent_bytes(&self) -> u64 {
        let reached = self.log.reached();
        reached.data_bytes + reached.companion_bytes
    }

    /// What both files occupy on the media.
    pub fn allocated_bytes(&self) -> Result<u64> {
        let data = self.log.data.allocated_bytes().map_err(self.log.io_error("measure"))?;
        Ok(data + self.log.companion.allocated_bytes().map_err(self.log.io_error("measure"))?)
    }

    /// The records after `after`, which must be the start of this log or a record of it, by sequence and hash.
    pub fn records_after(&self, after: &Position) -> Result<Records> {
        let unknown = || LogError::Unknown { position: *after, folder: self.log.storage.path("") };
        let (start, end) = (self.start(), self.end());
        if after.epoch != start.epoch || after.sequence < start.sequence || after.sequence > end.sequence {
            return Err(unknown());
        }
        let mut records = self.records();
        if *after == start {
            return Ok(records);
        }
        let Some((at, slot)) = self.find(after.sequence)? else { return Err(unknown()) };
        if slot.history != after.hash {
            return Err(unknown());
        }
        records.scan.at = at + record_bytes(&slot);
        records.scan.before = (slot.sequence, slot.history);
        Ok(records)
    }

    /// The records from the first on.
    pub fn records(&self) -> Records {
        Records { scan: Scan::new(self.log.clone()) }
    }

    /// The position of a record by its sequence; `None` if this log does not hold it.
    pub fn position_of(&self, sequence: Sequence) -> Result<Option<Position>> {
        let start = self.start();
        if sequence == start.sequence {
            return Ok(Some(start));
        }
        let found = self.find(sequence)?;
        Ok(found.map(|(_, slot)| Position { epoch: start.epoch, sequence, hash: slot.history }))
    }

    /// Bisects the slots: each carries a sequence, and they only grow.
    fn find(&self, sequence: Sequence) -> Result<Option<(u64, RecordSlot)>> {
        let reached = self.log.reached();
        if sequence <= self.start().sequence || sequence > reached.sequence {
            return Ok(None);
        }
        let (mut low, mut high) = (0, (reached.companion_bytes - RECORDS_OFFSET) / SLOT_BYTES as u64);
        // The first slot of a record comes before those of its body, so it is the lower bound of its sequence.
        while low < high {
            let middle = low + (high - low) / 2;
            if sequence_of(&self.slot_at(slot_offset(middle))?) < sequence {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let at = slot_offset(low);
        let slot = self.slot_at(at)?;
        match SlotKind::of(&slot) {
            Some(kind @ (SlotKind::Write | SlotKind::Zeroes | SlotKind::Mark)) if sequence_of(&slot) == sequence => {
                Ok(Some((at, RecordSlot::decode(kind, &slot))))
            }
            _ => Err(self.log.damaged_companion(at, format!("record {sequence} is not where it belongs"))),
        }
    }

    fn slot_at(&self, at: u64) -> Result<Slot> {
        let mut slot = [0; SLOT_BYTES];
        self.log.companion.read_at(at, &mut slot).map_err(self.log.io_error("read"))?;
        match verify(&self.log.slot_key, at, &slot) {
            true => Ok(slot),
            false => Err(self.log.damaged_companion(at, "the slot's tag does not verify")),
        }
    }

    /// Reads the data of a write of this log and verifies it. `buffer` is as long as the record's extent.
    pub fn read_data(&self, record: &Record, buffer: &mut [u8]) -> Result<()> {
        let RecordKind::Write { extent, data_offset, digest, .. } = &record.kind else {
            return Err(LogError::Record { what: format!("record {} has no data", record.sequence) });
        };
        if buffer.len() as u64 != extent.length {
            let what = format!("the data of {extent} does not fit a buffer of {} bytes", buffer.len());
            return Err(LogError::Record { what });
        }
        self.log.data.read_at(*data_offset, buffer).map_err(|error| {
            // Published data that is not there any more is damage; anything else may pass.
            match error.kind() {
                std::io::ErrorKind::UnexpectedEof => self.log.damaged_data(*data_offset, "the data is missing"),
                _ => self.log.io_error("read")(error),
            }
        })?;
        match self.log.hasher.digest(buffer) == *digest {
            true => Ok(()),
            false => {
                let what = format!("the data of record {} does not verify", record.sequence);
                Err(self.log.damaged_data(*data_offset, what))
            }
        }
    }
}

fn slot_offset(index: u64) -> u64 {
    RECORDS_OFFSET + index * SLOT_BYTES as u64
}

fn body_slots(body_bytes: u64) -> u64 {
    body_bytes.div_ceil(BODY_SLOT_BYTES as u64)
}

/// What a record takes in the companion.
fn record_bytes(slot: &RecordSlot) -> u64 {
    let body_bytes = if slot.kind == SlotKind::Mark { slot.extent.length } else { 0 };
    (1 + body_slots(body_bytes)) * SLOT_BYTES as u64
}

/// Goes through the records of a log. Of an active log there may be more after `None`.
pub struct Records {
    scan: Scan,
}

impl Records {
    /// Allocates for marks alone.
    #[expect(clippy::should_implement_trait, reason = "after None there may be more")]
    pub fn next(&mut self) -> Result<Option<Record>> {
        let limit = self.scan.log.reached();
        let at = self.scan.at;
        match self.scan.step(limit.companion_bytes, limit.data_bytes)? {
            Step::Record(record) => Ok(Some(record)),
            Step::End => Ok(None),
            Step::Incomplete => Err(self.scan.log.damaged_companion(at, "the record is cut off")),
            Step::Bad(what) => Err(self.scan.log.damaged_companion(at, what)),
        }
    }

    /// The position after the last record that was returned.
    pub fn position(&self) -> Position {
        let (sequence, hash) = self.scan.before;
        Position { epoch: self.scan.log.start.position.epoch, sequence, hash }
    }
}

/// One verified step through a companion after another. What an end means is for the caller to say.
pub(crate) struct Scan {
    pub log: Arc<Log>,
    /// Where the next record begins.
    pub at: u64,
    /// Sequence and history hash that the next record follows.
    pub before: (Sequence, HistoryHash),
    buffer: Vec<u8>,
    buffer_at: u64,
}

pub(crate) enum Step {
    Record(Record),
    /// Exactly at the limit.
    End,
    /// The limit lies within the record.
    Incomplete,
    /// A whole slot is not what was written there.
    Bad(&'static str),
}

/// Slots are read this many bytes at a time; a mark with the longest body fits.
const SCAN_BYTES: usize = 64 << 10;
const _: () = assert!(SCAN_BYTES > SLOT_BYTES * (1 + MARK_BODY_BYTES_MAX.div_ceil(BODY_SLOT_BYTES)));

impl Scan {
    pub(crate) fn new(log: Arc<Log>) -> Self {
        let start = log.start.position;
        Self { log, at: RECORDS_OFFSET, before: (start.sequence, start.hash), buffer: Vec::new(), buffer_at: 0 }
    }

    /// The next record, if it lies before `limit` of the companion and its data before `data_limit`.
    pub(crate) fn step(&mut self, limit: u64, data_limit: u64) -> Result<Step> {
        if self.at >= limit {
            return Ok(Step::End);
        }
        let Some(slot) = self.slot(self.at, limit)? else { return Ok(Step::Incomplete) };
        if !verify(&self.log.slot_key, self.at, &slot) {
            return Ok(Step::Bad("the slot's tag does not verify"));
        }
        let kind = match SlotKind::of(&slot) {
            Some(kind @ (SlotKind::Write | SlotKind::Zeroes | SlotKind::Mark)) => kind,
            _ => return Ok(Step::Bad("the slot is no record")),
        };
        let record = RecordSlot::decode(kind, &slot);
        if let Some(what) = self.refuse(&record, data_limit) {
            return Ok(Step::Bad(what));
        }
        let kind = match record.kind {
            SlotKind::Write => {
                let RecordSlot { extent, data_offset, digest, checksum, .. } = record;
                RecordKind::Write { extent, data_offset, digest, checksum }
            }
            SlotKind::Zeroes => RecordKind::Zeroes { extent: record.extent },
            _ => match self.body(&record, limit)? {
                Ok(body) => RecordKind::Mark { body },
                Err(step) => return Ok(step),
            },
        };
        self.at += record_bytes(&record);
        self.before = (record.sequence, record.history);
        Ok(Step::Record(Record { sequence: record.sequence, time: record.time, kind, history: record.history }))
    }

    fn refuse(&self, record: &RecordSlot, data_limit: u64) -> Option<&'static str> {
        let (sequence, hash) = self.before;
        // A companion made to harm may begin at the last number there is.
        if sequence.0.checked_add(1) != Some(record.sequence.0) {
            return Some("the record's sequence is not the next one");
        }
        let event = Event {
            sequence: record.sequence,
            kind: record.kind,
            time: record.time,
            offset: record.extent.offset,
            length: record.extent.length,
            digest: &record.digest,
        };
        if history_after(hash, &event) != record.history {
            return Some("the record does not continue the history");
        }
        if record.kind == SlotKind::Mark {
            return (record.extent.length > MARK_BODY_BYTES_MAX as u64).then_some("the mark is too long");
        }
        if !record.extent.is_valid_on(self.log.identity.disk_bytes) {
            return Some("the record's range is not on the disk");
        }
        let bytes_max = if record.kind == SlotKind::Write { RECORD_BYTES_MAX } else { ZEROES_BYTES_MAX };
        if record.extent.length > bytes_max {
            return Some("the record is too long");
        }
        if record.kind == SlotKind::Zeroes && record.digest != ZEROES_DIGEST {
            return Some("the record of zeroes has data");
        }
        let is_in_file = record.data_offset >= HEADER_BYTES as u64
            && (record.kind == SlotKind::Zeroes
                || record.data_offset.checked_add(record.extent.length).is_some_and(|end| end <= data_limit));
        (!is_in_file).then_some("the record's data lies outside of the log")
    }

    fn body(&mut self, mark: &RecordSlot, limit: u64) -> Result<std::result::Result<Vec<u8>, Step>> {
        let length = mark.extent.length as usize;
        let mut body = Vec::with_capacity(length + BODY_SLOT_BYTES);
        for index in 1..=body_slots(mark.extent.length) {
            let at = self.at + index * SLOT_BYTES as u64;
            let Some(slot) = self.slot(at, limit)? else { return Ok(Err(Step::Incomplete)) };
            if !verify(&self.log.slot_key, at, &slot)
                || SlotKind::of(&slot) != Some(SlotKind::Body)
                || sequence_of(&slot) != mark.sequence
            {
                return Ok(Err(Step::Bad("the mark's body does not verify")));
            }
            body.extend_from_slice(&array_at::<BODY_SLOT_BYTES>(&slot, 16));
        }
        body.truncate(length);
        match self.log.hasher.mark_digest(&body) == mark.digest {
            true => Ok(Ok(body)),
            false => Ok(Err(Step::Bad("the mark's body does not verify"))),
        }
    }

    /// The slot at a place, if all of it lies before the limit.
    fn slot(&mut self, at: u64, limit: u64) -> Result<Option<Slot>> {
        if limit < at + SLOT_BYTES as u64 {
            return Ok(None);
        }
        let buffered = self.buffer_at..self.buffer_at + self.buffer.len() as u64;
        if !(buffered.start <= at && at + SLOT_BYTES as u64 <= buffered.end) {
            let length = (limit - at).min(SCAN_BYTES as u64) as usize;
            self.buffer.resize(length, 0);
            self.buffer_at = at;
            if let Err(error) = self.log.companion.read_at(at, &mut self.buffer) {
                self.buffer.clear();
                return Err(match error.kind() {
                    std::io::ErrorKind::UnexpectedEof => self.log.damaged_companion(at, "records are missing"),
                    _ => self.log.io_error("read")(error),
                });
            }
        }
        Ok(Some(array_at(&self.buffer, (at - self.buffer_at) as usize)))
    }
}

/// The control slots of a companion.
pub(crate) struct Control {
    pub identity: Identity,
    /// `None`: never put to use.
    pub start: Option<Start>,
    pub durable: Durable,
    pub end: Option<End>,
}

impl Control {
    pub(crate) fn read(
        storage: &dyn Storage,
        name: &LogName,
        companion: &dyn tidemark_base::storage::StorageFile,
        disk: DiskId,
    ) -> Result<Self> {
        let damaged = |offset, what: &str| LogError::Damaged {
            path: storage.path(&name.companion()),
            offset,
            what: what.to_owned(),
        };
        let mut page = vec![0; RECORDS_OFFSET as usize];
        if companion.bytes().map_err(io_error(storage, name, "open"))? < RECORDS_OFFSET {
            return Err(damaged(0, "the companion is shorter than its control page"));
        }
        companion.read_at(0, &mut page).map_err(io_error(storage, name, "read"))?;
        let raw = |at: u64| array_at::<SLOT_BYTES>(&page, at as usize);
        let header = raw(control_at::HEADER);
        let identity = Identity::decode(&header).ok_or_else(|| damaged(control_at::HEADER, "this is no companion"))?;
        let key = slot_key(identity.disk, identity.log);
        if !verify(&key, control_at::HEADER, &header) {
            return Err(damaged(control_at::HEADER, "the companion's header does not verify"));
        }
        if identity.disk != disk {
            let path = storage.path(&name.companion());
            return Err(LogError::OtherDisk { path, found: identity.disk, expected: disk });
        }
        let checked = |at: u64| match raw(at) {
            slot if verify(&key, at, &slot) => Ok(Some(slot)),
            slot if slot == [0; SLOT_BYTES] => Ok(None),
            _ => Err(damaged(at, "the control slot does not verify")),
        };
        let mut durable: Option<Durable> = None;
        for at in control_at::DURABLE {
            let slot = checked(at)?.as_ref().and_then(Durable::decode);
            let slot = slot.ok_or_else(|| damaged(at, "the durable slot does not verify"))?;
            if control_at::DURABLE[(slot.count % 2) as usize] != at {
                return Err(damaged(at, "the durable slot is not in its place"));
            }
            durable = match durable {
                None => Some(slot),
                Some(other) if other.count.abs_diff(slot.count) == 1 => {
                    Some(if other.count > slot.count { other } else { slot })
                }
                Some(_) => return Err(damaged(at, "the durable slots are not of one row")),
            };
        }
        Ok(Self {
            identity,
            start: checked(control_at::START)?.as_ref().and_then(Start::decode),
            durable: durable.ok_or_else(|| damaged(control_at::DURABLE[0], "the durable slot is missing"))?,
            end: checked(control_at::END)?.as_ref().and_then(End::decode),
        })
    }
}
