//! A protected disk in memory: the reference that replicas are compared with.

use std::collections::{HashMap, HashSet};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, RwLock, Weak};

use tidemark_base::disk::{Allocation, Disk, Durability};
use tidemark_base::extent::Sliced;
use tidemark_base::{
    Clock, DiskId, Epoch, Extent, ExtentMap, ExtentSet, Generation, HistoryHash, MachineId, MarkId, Position, Sequence,
    ServerId, SystemClock, Timestamp,
};
use tidemark_proto::replication::{Consistency, Mark};

use crate::source::*;

pub type ReadHook = Arc<dyn Fn(Extent) + Send + Sync>;

/// A disk in memory with holes.
pub struct MemoryDisk {
    content: Mutex<Vec<u8>>,
    allocated: Mutex<ExtentSet>,
    /// Called after a read took its data and before it returns them.
    pub read_hook: Mutex<Option<ReadHook>>,
    pub read_bytes: Mutex<u64>,
}

impl MemoryDisk {
    fn new(bytes: u64) -> Self {
        Self {
            content: Mutex::new(vec![0; bytes as usize]),
            allocated: Mutex::default(),
            read_hook: Mutex::default(),
            read_bytes: Mutex::default(),
        }
    }

    pub fn content(&self) -> Vec<u8> {
        self.content.lock().unwrap().clone()
    }
}

fn range(offset: u64, length: usize) -> std::ops::Range<usize> {
    offset as usize..offset as usize + length
}

impl Disk for MemoryDisk {
    fn bytes(&self) -> u64 {
        self.content.lock().unwrap().len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        buffer.copy_from_slice(&self.content.lock().unwrap()[range(offset, buffer.len())]);
        *self.read_bytes.lock().unwrap() += buffer.len() as u64;
        let hook = self.read_hook.lock().unwrap().clone();
        if let Some(hook) = hook {
            hook(Extent::new(offset, buffer.len() as u64));
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8], _: Durability) -> std::io::Result<()> {
        self.content.lock().unwrap()[range(offset, data.len())].copy_from_slice(data);
        self.allocated.lock().unwrap().insert(Extent::new(offset, data.len() as u64));
        Ok(())
    }

    fn zero(&self, extent: Extent, _: bool, _: Durability) -> std::io::Result<()> {
        self.content.lock().unwrap()[range(extent.offset, extent.length as usize)].fill(0);
        self.allocated.lock().unwrap().remove(extent);
        Ok(())
    }

    fn flush(&self) -> std::io::Result<()> {
        Ok(())
    }

    fn allocation(&self, offset: u64) -> std::io::Result<(u64, Allocation)> {
        let rest = Extent::new(offset, self.bytes() - offset);
        let first = self.allocated.lock().unwrap().overlapping(rest).next();
        Ok(match first {
            Some(data) if data.offset == offset => (data.length, Allocation::Data),
            Some(data) => (data.offset - offset, Allocation::Hole),
            None => (rest.length, Allocation::Hole),
        })
    }
}

#[derive(Clone, Copy)]
struct Added(u64);

impl Sliced for Added {
    fn slice(&self, _: u64) -> Self {
        *self
    }
}

#[derive(Default)]
struct Pending {
    extents: ExtentMap<Added>,
    reason: Option<ScanReason>,
}

struct Log {
    epochs: Vec<Epoch>,
    records: SharedRecords,
    data: Vec<u8>,
    logged: Position,
    marked: Option<Position>,
    is_stepped_down: bool,
    time: Timestamp,
    revision: u64,
    pending: HashMap<ServerId, Pending>,
    cursors: HashMap<ServerId, Position>,
}

pub struct MemorySource {
    identity: SourceIdentity,
    pub disk: MemoryDisk,
    log: Mutex<Log>,
    /// Writes hold it shared, marks alone.
    gate: RwLock<()>,
    watchers: Watchers,
    clock: SystemClock,
    /// The disk at each mark.
    pub points: Mutex<HashMap<MarkId, Vec<u8>>>,
    /// Where the log's data is damaged.
    pub damaged: Mutex<HashSet<u64>>,
    /// The log is full: no mark has room until every record was acknowledged. Each that is asked for is told here.
    pub refused_marks: Mutex<Option<Sender<()>>>,
    /// The most that was read from the log at once.
    pub read_bytes_max: std::sync::atomic::AtomicUsize,
}

impl MemorySource {
    pub fn new(disk_bytes: u64) -> Arc<Self> {
        let epoch = Epoch::random();
        Arc::new(Self {
            identity: SourceIdentity {
                disk: DiskId::random(),
                machine: MachineId::random(),
                generation: Generation::FIRST,
                disk_bytes,
            },
            disk: MemoryDisk::new(disk_bytes),
            log: Mutex::new(Log {
                epochs: vec![epoch],
                records: Arc::default(),
                data: Vec::new(),
                logged: epoch.start(),
                marked: None,
                is_stepped_down: false,
                time: SystemClock::new().wall_now(),
                revision: 0,
                pending: HashMap::new(),
                cursors: HashMap::new(),
            }),
            gate: RwLock::default(),
            watchers: Watchers::default(),
            clock: SystemClock::new(),
            points: Mutex::default(),
            damaged: Mutex::default(),
            refused_marks: Mutex::default(),
            read_bytes_max: Default::default(),
        })
    }

    pub fn write(&self, offset: u64, data: &[u8]) -> Position {
        let _gate = self.gate.read().unwrap();
        let extent = Extent::new(offset, data.len() as u64);
        // One lock over both: overlapping writes keep one order on disk and in the log.
        let mut log = self.log.lock().unwrap();
        self.disk.write_at(offset, data, Durability::Cached).unwrap();
        let place = log.data.len() as u64;
        log.data.extend_from_slice(data);
        let number = log.epochs.len() as u64;
        let data =
            DataRef { log: number, offset: place, length: data.len() as u32, hash: *blake3::hash(data).as_bytes() };
        self.append(log, RecordBody::Write { extent, data })
    }

    pub fn zero(&self, extent: Extent) -> Position {
        let _gate = self.gate.read().unwrap();
        let log = self.log.lock().unwrap();
        self.disk.zero(extent, true, Durability::Cached).unwrap();
        self.append(log, RecordBody::Zeroes { extent })
    }

    /// A write that reaches the disk and not the log.
    pub fn write_unlogged(&self, consumer: ServerId, offset: u64, data: &[u8]) {
        let _gate = self.gate.read().unwrap();
        self.disk.write_at(offset, data, Durability::Cached).unwrap();
        let extent = ExtentSet::from_iter([Extent::new(offset, data.len() as u64)]);
        self.require_scan(consumer, &extent, ScanReason::Dirty).unwrap();
    }

    /// Nothing is logged any more, and no mark is made.
    pub fn step_down(&self) {
        self.log.lock().unwrap().is_stepped_down = true;
        self.watchers.changed();
    }

    pub fn mark(&self) -> Position {
        let _gate = self.gate.write().unwrap();
        let mark = Mark {
            id: MarkId::random(),
            machine: self.identity.machine,
            disks: vec![self.identity.disk],
            consistency: Consistency::Crash,
            label: String::new(),
            keep: false,
            time: self.clock.wall_now(),
            group: false,
        };
        self.points.lock().unwrap().insert(mark.id, self.disk.content());
        self.append(self.log.lock().unwrap(), RecordBody::Mark(Box::new(mark)))
    }

    fn append(&self, mut log: std::sync::MutexGuard<'_, Log>, body: RecordBody) -> Position {
        let sequence = log.logged.sequence.next();
        let mut hasher = blake3::Hasher::new();
        hasher.update(&log.logged.hash.0).update(format!("{sequence} {body:?}").as_bytes());
        let hash = HistoryHash(*hasher.finalize().as_bytes());
        log.time = log.time.max(self.clock.wall_now());
        log.logged = Position { sequence, hash, ..log.logged };
        if matches!(body, RecordBody::Mark(_)) {
            log.marked = Some(log.logged);
        }
        let record = Record { sequence, hash, time: log.time, clock_stepped: false, body };
        log.records.lock().unwrap().push(record);
        let position = log.logged;
        drop(log);
        self.watchers.changed();
        position
    }

    pub fn pending_bytes(&self, consumer: ServerId) -> u64 {
        self.pending_scan(consumer, ScanRevision(0)).unwrap().extents.total_bytes()
    }
}

impl Source for MemorySource {
    fn identity(&self) -> SourceIdentity {
        self.identity
    }

    fn disk(&self) -> &dyn Disk {
        &self.disk
    }

    fn state(&self) -> LogState {
        let log = self.log.lock().unwrap();
        LogState {
            logged: log.logged,
            marked: log.marked,
            time: log.time,
            scan_revision: ScanRevision(log.revision),
            is_logging: !log.is_stepped_down,
            closed: false,
        }
    }

    fn epochs(&self) -> Vec<Epoch> {
        self.log.lock().unwrap().epochs.clone()
    }

    fn watch(&self, watcher: Weak<Watcher>) {
        self.watchers.add(watcher);
    }

    fn locate(&self, position: &Position) -> Result<Located, SourceError> {
        let log = self.log.lock().unwrap();
        Ok(if position.epoch != log.logged.epoch {
            if log.epochs.contains(&position.epoch) { Located::Earlier } else { Located::Unknown }
        } else if position.sequence > log.logged.sequence {
            Located::Ahead
        } else if *position == position.epoch.start()
            || (position.sequence.0 > 0
                && log.records.lock().unwrap()[position.sequence.0 as usize - 1].hash == position.hash)
        {
            Located::Here
        } else {
            Located::Differs
        })
    }

    fn read_after(&self, position: &Position) -> Result<Box<dyn RecordReader>, SourceError> {
        if self.locate(position)? != Located::Here {
            return Err(SourceError::Gone { disk: self.identity.disk, after: *position });
        }
        let records = self.log.lock().unwrap().records.clone();
        Ok(Box::new(Reader { records, next: position.sequence.0 as usize }))
    }

    fn read_data(&self, data: &[DataRef], buffer: &mut [u8]) -> Result<(), ReadDataError> {
        self.read_bytes_max.fetch_max(buffer.len(), std::sync::atomic::Ordering::SeqCst);
        let log = self.log.lock().unwrap();
        if data.iter().any(|data| data.log != log.epochs.len() as u64) {
            return Err(ReadDataError::Gone);
        }
        let mut rest = buffer;
        let mut indices = Vec::new();
        for (index, data) in data.iter().enumerate() {
            let (now, later) = rest.split_at_mut(data.length as usize);
            rest = later;
            now.copy_from_slice(&log.data[range(data.offset, data.length as usize)]);
            if self.damaged.lock().unwrap().contains(&data.offset) {
                now[0] ^= 1;
            }
            if *blake3::hash(now).as_bytes() != data.hash {
                indices.push(index);
            }
        }
        if indices.is_empty() { Ok(()) } else { Err(ReadDataError::Damaged { indices }) }
    }

    fn cursor(&self, consumer: ServerId) -> Option<Position> {
        self.log.lock().unwrap().cursors.get(&consumer).copied()
    }

    fn acknowledged(&self, consumer: ServerId, position: Position) -> Result<(), SourceError> {
        self.log.lock().unwrap().cursors.insert(consumer, position);
        Ok(())
    }

    fn pending_scan(&self, consumer: ServerId, newer_than: ScanRevision) -> Result<PendingScan, SourceError> {
        let log = self.log.lock().unwrap();
        let mut extents = ExtentSet::new();
        let mut reason = None;
        if let Some(pending) = log.pending.get(&consumer) {
            let newer = pending.extents.iter().filter(|(_, added)| added.0 > newer_than.0);
            newer.for_each(|(extent, _)| extents.insert(extent));
            reason = pending.reason.filter(|_| !extents.is_empty());
        }
        Ok(PendingScan { extents, reason, revision: ScanRevision(log.revision) })
    }

    fn require_scan(&self, consumer: ServerId, extents: &ExtentSet, reason: ScanReason) -> Result<(), SourceError> {
        let mut log = self.log.lock().unwrap();
        log.revision += 1;
        let added = Added(log.revision);
        let pending = log.pending.entry(consumer).or_default();
        extents.iter().for_each(|extent| pending.extents.insert(extent, added));
        pending.reason = Some(reason.joined(pending.reason));
        drop(log);
        self.watchers.changed();
        Ok(())
    }

    fn scanned(&self, consumer: ServerId, extent: Extent, seen: ScanRevision) -> Result<(), SourceError> {
        let mut log = self.log.lock().unwrap();
        let pending = log.pending.entry(consumer).or_default();
        let old: Vec<Extent> = pending
            .extents
            .overlapping(extent)
            .filter(|(_, added)| added.0 <= seen.0)
            .map(|(extent, _)| extent)
            .collect();
        old.into_iter().for_each(|extent| pending.extents.remove(extent));
        if pending.extents.is_empty() {
            pending.reason = None;
        }
        Ok(())
    }

    fn barrier(&self) -> Result<Position, SourceError> {
        if let Some(refused) = &*self.refused_marks.lock().unwrap() {
            let log = self.log.lock().unwrap();
            if log.cursors.values().all(|cursor| *cursor != log.logged) {
                let _ = refused.send(());
                let source = std::io::ErrorKind::StorageFull.into();
                return Err(SourceError::Io { disk: self.identity.disk, what: "make a mark", source });
            }
        }
        Ok(self.mark())
    }

    fn new_epoch(&self, _: EpochReason) -> Result<Position, SourceError> {
        let _gate = self.gate.write().unwrap();
        let mut log = self.log.lock().unwrap();
        log.revision += 1;
        let added = Added(log.revision);
        let Log { records, cursors, pending, logged, .. } = &mut *log;
        for (consumer, cursor) in cursors {
            let after = if cursor.epoch == logged.epoch { cursor.sequence.0 as usize } else { 0 };
            let pending = pending.entry(*consumer).or_default();
            for record in &records.lock().unwrap()[after..] {
                if let RecordBody::Write { extent, .. } | RecordBody::Zeroes { extent } = record.body {
                    pending.extents.insert(extent, added);
                    pending.reason = Some(ScanReason::Unclean.joined(pending.reason));
                }
            }
        }
        let epoch = Epoch::random();
        log.epochs.push(epoch);
        log.records = Arc::default();
        log.data.clear();
        log.logged = epoch.start();
        log.marked = None;
        drop(log);
        self.watchers.changed();
        Ok(epoch.start())
    }
}

/// The records of one epoch; readers share them while they grow.
type SharedRecords = Arc<Mutex<Vec<Record>>>;

struct Reader {
    records: SharedRecords,
    next: usize,
}

impl RecordReader for Reader {
    fn read(&mut self, until: Sequence, count: usize, into: &mut Vec<Record>) -> Result<(), SourceError> {
        let records = self.records.lock().unwrap();
        while self.next < records.len().min(until.0 as usize) && into.len() < count {
            into.push(records[self.next].clone());
            self.next += 1;
        }
        Ok(())
    }
}
