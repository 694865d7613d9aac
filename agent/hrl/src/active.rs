//! Writing the live log.
//!
//! *Consistency.* One appender assigns the sequences. A batch becomes readable as a whole after its data and then its
//! records were written; readers never see a part of one, or what a failed write left. *Retries.* None: a failed
//! write or sync latches the log, and every later call says so. *Cancellation.* Nothing waits. *Crash.* The order of
//! writes and what each crash leaves is in [`crate::companion`]; [`crate::Examination`] judges it.

use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::Arc;

use tidemark_base::storage::{OpenMode, Storage};
use tidemark_base::{DiskId, Extent, Position, SECTOR_BYTES, Timestamp};
use uuid::Uuid;

use crate::companion::{
    BODY_SLOT_BYTES, Durable, Identity, RECORDS_OFFSET, Reached, RecordSlot, SLOT_BYTES, Slot, SlotKind, Start,
    control_at, seal,
};
use crate::error::{Failure, LogError, Result};
use crate::format::{Header, METADATA_BYTES, SetBuilder, put, zero_part_count, zero_parts};
use crate::hash::{DataHash, Event, ZEROES_DIGEST, history_after, slot_key};
use crate::log::{Log, Parts, SyncState, io_error, reached_at_start};
use crate::name::LogName;
use crate::reader::LogReader;

/// The most data of one write record.
pub const RECORD_BYTES_MAX: u64 = 1 << 30;
/// The longest run of zeroes of one record: file systems limit how long a sparse file may be.
pub const ZEROES_BYTES_MAX: u64 = 1 << 40;
/// The most that a mark can say.
pub const MARK_BODY_BYTES_MAX: usize = 16 << 10;

/// One thing that happened to the disk.
#[derive(Clone, Copy, Debug)]
pub enum Append<'a> {
    /// `hash` is [`crate::DataHasher::hash`] of `data`.
    Write {
        offset: u64,
        data: &'a [u8],
        hash: DataHash,
    },
    Zeroes {
        extent: Extent,
    },
    Mark {
        body: &'a [u8],
    },
}

/// A log whose files are made and durable, to be put to use without waiting for media.
pub struct PreparedLog {
    parts: Parts,
}

impl PreparedLog {
    /// The companion is durable before the `.hrl` file is made, so that an `.hrl` file without one was robbed of it.
    pub fn create(
        storage: Arc<dyn Storage>,
        name: LogName,
        disk: DiskId,
        disk_bytes: u64,
        now: Timestamp,
    ) -> Result<Self> {
        let identity = Identity { disk, disk_bytes, log: tidemark_base::random::uuid(), created: now };
        let result = create_files(&*storage, &name, &identity);
        if let Err(error) = &result
            && error.kind() != io::ErrorKind::AlreadyExists
        {
            // Best effort: whatever stays is recognised as never used.
            let _ = storage.remove(&name.hrl());
            let _ = storage.remove(&name.companion());
        }
        let (data, companion) = result.map_err(io_error(&*storage, &name, "create"))?;
        Ok(Self { parts: Parts { storage, name, identity, data, companion } })
    }

    pub fn name(&self) -> &LogName {
        &self.parts.name
    }

    /// Puts the log to use: one small write, nothing is synced. It is durable with the first sync.
    pub fn start(self, start: Position, previous: Option<Uuid>, now: Timestamp) -> Result<ActiveLog> {
        self.start_after(start, previous, now, None)
    }

    fn start_after(
        self,
        position: Position,
        previous: Option<Uuid>,
        time: Timestamp,
        before: Option<Arc<Log>>,
    ) -> Result<ActiveLog> {
        let start = Start { position, previous: previous.unwrap_or(Uuid::nil()), time };
        let reached = reached_at_start(&start);
        let sync = SyncState { durable: Durable { count: 1, reached: None }, before };
        let log = Log::new(self.parts, start, reached, sync, false);
        log.write_control(control_at::START, start.encode()).map_err(log.io_error("start"))?;
        Ok(ActiveLog {
            log: Arc::new(log),
            reached,
            sets: SetBuilder::new(),
            slots: Vec::new(),
            blocks: Vec::new(),
            slices: Vec::new(),
            runs: Vec::new(),
        })
    }

    /// Removes a log that is not needed after all.
    pub fn discard(self) -> Result<()> {
        let Parts { storage, name, .. } = self.parts;
        let remove = || {
            storage.remove(&name.hrl())?;
            storage.remove(&name.companion())?;
            storage.sync_folder("")
        };
        remove().map_err(io_error(&*storage, &name, "remove"))
    }
}

type Files = (Arc<dyn tidemark_base::storage::StorageFile>, Arc<dyn tidemark_base::storage::StorageFile>);

fn create_files(storage: &dyn Storage, name: &LogName, identity: &Identity) -> io::Result<Files> {
    let key = slot_key(identity.disk, identity.log);
    let mut page = vec![0; RECORDS_OFFSET as usize];
    let durable = [0, 1].map(|count| Durable { count, reached: None }.encode());
    let slots = [
        (control_at::HEADER, identity.encode()),
        (control_at::DURABLE[0], durable[0]),
        (control_at::DURABLE[1], durable[1]),
    ];
    for (at, mut slot) in slots {
        seal(&key, at, &mut slot);
        put(&mut page, at as usize, &slot);
    }
    if storage.exists(&name.hrl())? {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    let companion = storage.open(&name.companion(), OpenMode::Create)?;
    companion.write_at(0, &page)?;
    companion.sync()?;
    storage.sync_folder("")?;
    let data = storage.open(&name.hrl(), OpenMode::Create)?;
    data.write_at(0, &Header::new(identity.log, Uuid::nil(), identity.created).encode())?;
    data.sync()?;
    storage.sync_folder("")?;
    Ok((data, companion))
}

/// The log that records are appended to.
pub struct ActiveLog {
    log: Arc<Log>,
    /// Equal to what is published; kept here so that appending does not ask.
    reached: Reached,
    sets: SetBuilder,
    // Buffers that live on from batch to batch.
    slots: Vec<u8>,
    blocks: Vec<[u8; METADATA_BYTES]>,
    slices: Vec<IoSlice<'static>>,
    runs: Vec<Run>,
}

/// Slices that lie one after another in the file: between two runs is a hole.
struct Run {
    offset: u64,
    slices: Range<usize>,
}

impl ActiveLog {
    /// Makes a log and makes it durable.
    pub fn create(
        storage: Arc<dyn Storage>,
        name: LogName,
        disk: DiskId,
        disk_bytes: u64,
        start: Position,
        previous: Option<Uuid>,
        now: Timestamp,
    ) -> Result<Self> {
        let log = PreparedLog::create(storage, name, disk, disk_bytes, now)?.start(start, previous, now)?;
        log.log.make_durable()?;
        Ok(log)
    }

    /// Appends a batch and returns the position after its last record; the records' sequences are the last ones up to
    /// it. One write of data (one more for each hole that a run of zeroes leaves between data), one of records, no sync.
    ///
    /// [`LogError::Record`] refuses the batch and leaves the log as it is; any other error latches it.
    pub fn append(&mut self, time: Timestamp, batch: &[Append<'_>]) -> Result<Position> {
        self.log.check_latch()?;
        let mut entries = 0;
        for item in batch {
            entries += self.check(item)?;
        }
        let reached = self.write(time, batch, entries).map_err(|error| {
            self.log.latch(Failure::Write);
            self.log.io_error("append to")(error)
        })?;
        self.reached = reached;
        self.log.publish(reached);
        Ok(self.log.position_of(&reached))
    }

    /// Refuses what a reader would; says how many HRL entries the item takes.
    fn check(&self, item: &Append<'_>) -> Result<usize> {
        let disk_bytes = self.log.identity.disk_bytes;
        let (extent, bytes_max) = match item {
            Append::Write { offset, data, .. } => (Extent::new(*offset, data.len() as u64), RECORD_BYTES_MAX),
            Append::Zeroes { extent } => (*extent, ZEROES_BYTES_MAX),
            Append::Mark { body } if body.len() <= MARK_BODY_BYTES_MAX => return Ok(0),
            Append::Mark { body } => {
                let what = format!("a mark of {} bytes is longer than {MARK_BODY_BYTES_MAX}", body.len());
                return Err(LogError::Record { what });
            }
        };
        if !extent.is_valid_on(disk_bytes) {
            let what =
                format!("{extent} is not a range of {SECTOR_BYTES}-byte sectors of a disk of {disk_bytes} bytes");
            return Err(LogError::Record { what });
        }
        if extent.length > bytes_max {
            return Err(LogError::Record { what: format!("{extent} is longer than {bytes_max} bytes") });
        }
        Ok(match item {
            Append::Zeroes { .. } => zero_part_count(extent.length) as usize,
            _ => 1,
        })
    }

    fn write(&mut self, time: Timestamp, batch: &[Append<'_>], entries: usize) -> io::Result<Reached> {
        let Self { log, sets, slots, blocks, slices, runs, .. } = self;
        let mut reached = self.reached;
        let blocks_needed = sets.blocks_for(entries);
        if blocks.len() < blocks_needed {
            blocks.resize(blocks_needed, [0; METADATA_BYTES]);
        }
        let mut spare_blocks = blocks.iter_mut();
        let mut data_slices = recycle(std::mem::take(slices));
        slots.clear();
        runs.clear();
        let mut run = Run { offset: sets.end(), slices: 0..0 };
        let seconds = time.hrl_seconds();
        let mut finish_full_set = |sets: &mut SetBuilder| {
            sets.is_full().then(|| {
                let block = spare_blocks.next().expect("the full sets were counted");
                sets.finish(block);
                IoSlice::new(&block[..])
            })
        };
        for item in batch {
            let mut record = RecordSlot {
                kind: SlotKind::Mark,
                sequence: reached.sequence.next(),
                time,
                extent: Extent::new(0, 0),
                data_offset: sets.end(),
                digest: ZEROES_DIGEST,
                checksum: 0,
                history: reached.hash,
            };
            let mut body: &[u8] = &[];
            match *item {
                Append::Write { offset, data, hash } => {
                    record.kind = SlotKind::Write;
                    record.extent = Extent::new(offset, data.len() as u64);
                    record.digest = hash.digest;
                    record.checksum = hash.checksum;
                    sets.add(offset, data.len() as u32, seconds, hash.checksum);
                    data_slices.push(IoSlice::new(data));
                    data_slices.extend(finish_full_set(sets));
                }
                Append::Zeroes { extent } => {
                    record.kind = SlotKind::Zeroes;
                    record.extent = extent;
                    record.checksum = u32::MAX;
                    for (offset, bytes) in zero_parts(extent.offset, extent.length) {
                        end_run(runs, &mut run, data_slices.len());
                        sets.add(offset, bytes, seconds, u32::MAX);
                        run.offset = sets.end();
                        data_slices.extend(finish_full_set(sets));
                    }
                }
                Append::Mark { body: of_mark } => {
                    body = of_mark;
                    record.extent.length = body.len() as u64;
                    record.data_offset = 0;
                    record.digest = log.hasher.mark_digest(body);
                }
            }
            record.history = history_after(
                reached.hash,
                &Event {
                    sequence: record.sequence,
                    kind: record.kind,
                    time,
                    offset: record.extent.offset,
                    length: record.extent.length,
                    digest: &record.digest,
                },
            );
            let mut slot: Slot = [0; SLOT_BYTES];
            record.encode(&mut slot);
            push_slot(slots, &log.slot_key, &mut reached, slot);
            for part in body.chunks(BODY_SLOT_BYTES) {
                let mut slot: Slot = [0; SLOT_BYTES];
                slot[0] = SlotKind::Body as u8;
                put(&mut slot, 8, &record.sequence.0.to_le_bytes());
                put(&mut slot, 16, part);
                push_slot(slots, &log.slot_key, &mut reached, slot);
            }
            reached.sequence = record.sequence;
            reached.hash = record.history;
        }
        end_run(runs, &mut run, data_slices.len());
        for run in runs.iter() {
            log.data.write_vectored_at(run.offset, &data_slices[run.slices.clone()])?;
        }
        if !slots.is_empty() {
            log.companion.write_at(self.reached.companion_bytes, slots)?;
        }
        *slices = recycle(data_slices);
        reached.data_bytes = sets.end();
        Ok(reached)
    }

    /// Up to where records were appended.
    pub fn position(&self) -> Position {
        self.log.position_of(&self.reached)
    }

    pub fn name(&self) -> &LogName {
        &self.log.name
    }

    /// The log's unique id: the next log's previous one.
    pub fn id(&self) -> Uuid {
        self.log.identity.log
    }

    pub fn failure(&self) -> Option<Failure> {
        self.log.failure()
    }

    /// How long the `.hrl` file is, holes included.
    pub fn apparent_bytes(&self) -> u64 {
        self.sets.end()
    }

    /// Reads what was appended, also while more is.
    pub fn reader(&self) -> LogReader {
        LogReader::new(self.log.clone())
    }

    /// Syncs without the appender, so that appending goes on meanwhile.
    pub fn syncer(&self) -> LogSync {
        LogSync { log: self.log.clone() }
    }

    /// Makes everything appended so far durable.
    pub fn sync(&mut self) -> Result<Position> {
        self.log.make_durable()
    }

    /// Goes on in `next`, without waiting for media; returns the log so far, to be closed outside of the appender's
    /// lock. Until it is closed or synced, nothing in the new log counts as durable.
    pub fn rotate(&mut self, next: PreparedLog, now: Timestamp) -> Result<ActiveLog> {
        self.log.check_latch()?;
        let next = next.start_after(self.position(), Some(self.id()), now, Some(self.log.clone()))?;
        Ok(std::mem::replace(self, next))
    }

    /// Closes the log: from now on it is an immutable HRL file. If that fails, the log counts as not closed.
    pub fn close(mut self, now: Timestamp) -> Result<LogReader> {
        self.log.close(&mut self.sets, now)?;
        Ok(LogReader::new(self.log))
    }
}

fn end_run(runs: &mut Vec<Run>, run: &mut Run, slices: usize) {
    if slices > run.slices.start {
        runs.push(Run { offset: run.offset, slices: run.slices.start..slices });
    }
    run.slices = slices..slices;
}

fn push_slot(slots: &mut Vec<u8>, key: &[u8; 32], reached: &mut Reached, mut slot: Slot) {
    seal(key, reached.companion_bytes, &mut slot);
    slots.extend_from_slice(&slot);
    reached.companion_bytes += SLOT_BYTES as u64;
}

/// The empty vector with its room, for slices of another lifetime.
fn recycle<'a>(mut slices: Vec<IoSlice<'_>>) -> Vec<IoSlice<'a>> {
    slices.clear();
    slices.into_iter().map(|_| IoSlice::new(&[])).collect()
}

/// Syncs a log that someone else appends to. Clones share it.
#[derive(Clone)]
pub struct LogSync {
    log: Arc<Log>,
}

impl LogSync {
    /// Makes everything appended so far durable, and what is in the logs before it.
    pub fn sync(&self) -> Result<Position> {
        self.log.make_durable()
    }

    /// Up to where the last sync got; `None` before the first.
    pub fn durable(&self) -> Option<Position> {
        self.log.durable()
    }
}
