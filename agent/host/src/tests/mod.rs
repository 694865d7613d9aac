//! Capture as a whole: the write path against a model, marks under load, crashes, limits.

mod barrier;
#[cfg(unix)]
mod conformance;
#[cfg(unix)]
mod consumers;
mod crash;
pub mod gaps;
// Windows lets nobody change the size of a disk that is attached.
#[cfg(unix)]
mod growth;
#[cfg(unix)]
mod host;
mod hyperv;
#[cfg(unix)]
mod images;
mod limits;
mod marks;
#[cfg(unix)]
mod master_target;
#[allow(dead_code, reason = "the tests of logs use the rest")]
#[path = "../../../hrl/tests/support/memory.rs"]
pub mod memory;
mod power;
#[cfg(unix)]
mod qemu;
#[cfg(unix)]
mod rct;
#[cfg(unix)]
mod room;
#[cfg(all(feature = "sabotage", unix))]
mod sabotage;
mod scenarios;
#[cfg(unix)]
mod unwitnessed;
#[cfg(unix)]
mod vsphere;
mod write_path;

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::Arc;
#[cfg(unix)]
use std::sync::atomic::AtomicBool;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tidemark_base::disk::DiskError;
use tidemark_base::storage::{RealStorage, Storage};
use tidemark_base::{
    Clock, DiskId, Extent, ExtentSet, Generation, MachineId, Position, Sequence, ServerId, SystemClock, Timestamp,
};
use tidemark_nbd::{Export, WriteRequest};

use crate::attach::{AttachRequest, Attached, attach};
use crate::capture::splitter::Splitter;
use crate::capture::tracker::Tracker;
use crate::error::HostError;
use crate::events::{EventKind, Events};
use crate::log::LogLimits;
use crate::protected::ProtectedDisk;
use crate::source::{DataRef, Record, RecordBody, ScanRevision, Source};
use crate::state::session::Boot;

pub struct Fixture {
    pub folder: tempfile::TempDir,
    /// Where the disk lies, if not in the folder.
    pub image: Option<PathBuf>,
    pub disk: DiskId,
    pub server: ServerId,
    /// Further process servers.
    pub others: Vec<ServerId>,
    pub boot: Boot,
    pub limits: LogLimits,
    pub clock: Arc<dyn Clock>,
    pub events: Arc<Events>,
    pub tracker: Option<Arc<dyn Tracker>>,
}

/// The system's clock, set ahead by a test.
pub struct Ahead {
    clock: SystemClock,
    milliseconds: AtomicU64,
}

impl Ahead {
    pub fn new() -> Arc<Self> {
        Arc::new(Self { clock: SystemClock::new(), milliseconds: AtomicU64::new(0) })
    }

    pub fn go(&self, by: Duration) {
        self.milliseconds.fetch_add(by.as_millis() as u64, Ordering::SeqCst);
    }

    fn ahead(&self) -> Duration {
        Duration::from_millis(self.milliseconds.load(Ordering::SeqCst))
    }
}

impl Clock for Ahead {
    fn wall_now(&self) -> Timestamp {
        Timestamp(self.clock.wall_now().0 + self.ahead().as_nanos() as u64)
    }

    fn monotonic_now(&self) -> Duration {
        self.clock.monotonic_now() + self.ahead()
    }
}

pub const LIMITS: LogLimits = LogLimits { rotate_bytes: 1 << 20, limit_bytes: 1 << 30, reserve_bytes: 0 };

impl Fixture {
    pub fn new(disk_bytes: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        File::create(folder.path().join("disk.img")).unwrap().set_len(disk_bytes).unwrap();
        Self {
            folder,
            image: None,
            disk: DiskId::random(),
            server: ServerId::random(),
            others: Vec::new(),
            boot: Boot::current().unwrap(),
            limits: LIMITS,
            clock: Arc::new(SystemClock::new()),
            events: Events::new(Arc::new(SystemClock::new())),
            tracker: None,
        }
    }

    pub fn path(&self) -> PathBuf {
        self.image.clone().unwrap_or_else(|| self.folder.path().join("disk.img"))
    }

    /// The state beside the disk.
    pub fn state(&self) -> Arc<dyn Storage> {
        let mut folder = self.path().into_os_string();
        folder.push(".tidemark");
        RealStorage::open_folder(PathBuf::from(folder))
    }

    pub fn content(&self) -> Vec<u8> {
        std::fs::read(self.path()).unwrap()
    }

    pub fn elsewhere(&self) -> Arc<dyn Storage> {
        RealStorage::create(self.folder.path().join("elsewhere")).unwrap()
    }

    /// The kinds of the events so far.
    pub fn kinds(&self) -> Vec<EventKind> {
        self.events.after(0).iter().map(|event| event.kind).collect()
    }

    pub fn try_attach(&self) -> Result<Attached, HostError> {
        attach(AttachRequest {
            disk: self.disk,
            machine: MachineId::from_bytes([7; 16]),
            generation: Generation::FIRST,
            path: self.path(),
            tracker: self.tracker.clone(),
            device_folder: self.folder.path().join("devices"),
            elsewhere: self.elsewhere(),
            consumers: [self.server].into_iter().chain(self.others.iter().copied()).collect(),
            limits: self.limits,
            log_bytes_max: u64::MAX,
            boot: self.boot.clone(),
            clock: self.clock.clone(),
            events: self.events.clone(),
        })
    }

    pub fn attach(&self) -> Attached {
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        loop {
            match self.try_attach() {
                // A program that another test starts just now holds all our locks until it runs.
                Err(HostError::Disk(DiskError::InUse { .. })) if std::time::Instant::now() < deadline => {
                    std::thread::yield_now();
                }
                attached => return attached.unwrap(),
            }
        }
    }

    /// Attached, with everything that was to be scanned scanned and everything logged acknowledged.
    pub fn attach_in_sync(&self) -> Arc<ProtectedDisk> {
        let disk = self.attach().disk;
        self.settle(&disk);
        disk
    }

    /// The consumer holds everything.
    pub fn settle(&self, disk: &ProtectedDisk) {
        self.settle_for(disk, self.server);
    }

    pub fn settle_for(&self, disk: &ProtectedDisk, server: ServerId) {
        let pending = disk.pending_scan(server, ScanRevision(0)).unwrap();
        for extent in pending.extents.iter() {
            disk.scanned(server, extent, pending.revision).unwrap();
        }
        disk.acknowledged(server, disk.state().logged).unwrap();
        disk.consumer(server).unwrap().store().unwrap();
    }

    pub fn pending(&self, disk: &ProtectedDisk) -> ExtentSet {
        disk.pending_scan(self.server, ScanRevision(0)).unwrap().extents
    }
}

/// For the list of what could not run here.
pub fn skipped(test: &str, why: &str) {
    let line = format!("SKIPPED {test}: {why}");
    println!("{line}");
    if let Some(file) = std::env::var_os("TIDEMARK_SKIPPED")
        && let Ok(mut file) = File::options().create(true).append(true).open(file)
    {
        file.write_all(format!("{line}\n").as_bytes()).unwrap();
    }
}

/// As whoever is not us writes to a file.
pub fn write_all_at(mut file: &File, data: &[u8], offset: u64) -> io::Result<()> {
    file.seek(SeekFrom::Start(offset))?;
    file.write_all(data)
}

pub fn write(splitter: &Splitter, offset: u64, data: &[u8]) -> io::Result<()> {
    let mut results = [Err(io::ErrorKind::Other.into())];
    splitter.write_batch(&[WriteRequest { offset, data, fua: false }], &mut results);
    let [result] = results;
    result
}

pub fn records_after(disk: &ProtectedDisk, after: &Position) -> Vec<Record> {
    let mut records = Vec::new();
    disk.read_after(after).unwrap().read(Sequence(u64::MAX), usize::MAX, &mut records).unwrap();
    records
}

/// Applies records to an image, through the same calls as a sender.
pub fn replay(disk: &ProtectedDisk, records: &[Record], image: &mut [u8]) {
    for record in records {
        match &record.body {
            RecordBody::Write { extent, data } => {
                let target = &mut image[extent.offset as usize..extent.end() as usize];
                disk.read_data(&[*data], target).unwrap();
            }
            RecordBody::Zeroes { extent } => image[extent.offset as usize..extent.end() as usize].fill(0),
            RecordBody::Mark(_) => {}
        }
    }
}

pub fn data_refs(records: &[Record]) -> Vec<DataRef> {
    let data = records.iter().filter_map(|record| match &record.body {
        RecordBody::Write { data, .. } => Some(*data),
        _ => None,
    });
    data.collect()
}

/// What a record changed.
pub fn record_bytes(record: &Record) -> u64 {
    match &record.body {
        RecordBody::Write { extent, .. } | RecordBody::Zeroes { extent } => extent.length,
        RecordBody::Mark(_) => 0,
    }
}

/// Ends a writer also when an assertion failed: a test that fails must not hang.
#[cfg(unix)]
pub struct OverOnDrop<'a>(pub &'a AtomicBool);

#[cfg(unix)]
impl Drop for OverOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

pub fn covers(set: &ExtentSet, extent: Extent) -> bool {
    set.overlapping(extent).map(|part| part.length).sum::<u64>() == extent.length
}

/// A small generator, so that a failing run can be repeated.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % limit
    }
}
