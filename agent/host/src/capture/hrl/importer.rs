//! The thread that follows the logs of one disk.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tidemark_base::disk::{Allocation, Disk, Durability, is_zero};
use tidemark_base::stop::Stop;
use tidemark_base::storage::{RealStorage, Storage};
use tidemark_base::thread::{Builder, JoinHandle};
use tidemark_base::time::Instant;
use tidemark_base::{DiskId, Extent, Timestamp};
use tidemark_hrl::tools::ToolError;
use tidemark_hrl::tools::apply::ApplyPlan;
use tidemark_nbd::{Export, WriteRequest};
use uuid::Uuid;

use super::ImportError;
use super::cursor::{self, Cursor};
use super::image::{Image, data_write_guid};
use super::logs::{self, Log, Next};
use crate::capture::splitter::Splitter;
use crate::events::{EventKind, Severity};
use crate::protected::ProtectedDisk;

/// How often the folder is looked at.
const POLL: Duration = if cfg!(test) { Duration::from_millis(20) } else { Duration::from_secs(1) };
/// How long the next log waits for a mark after the one before it, so that a disk that is behind has points too.
const MARK_LIMIT: Duration = Duration::from_secs(3);
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// Read at once from image and copy; differences are written in parts of [`PART_BYTES`].
const COMPARED_BYTES: u64 = 1 << 20;
const PART_BYTES: usize = 64 << 10;

/// For how long what contradicts the cursor is looked at before it is believed.
#[derive(Clone)]
pub struct Patience(Arc<AtomicU64>);

impl Patience {
    pub fn new(time: Duration) -> Self {
        Self(Arc::new(AtomicU64::new(time.as_millis() as u64)))
    }

    fn get(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }

    #[cfg(test)]
    pub fn set(&self, time: Duration) {
        self.0.store(time.as_millis() as u64, Ordering::Relaxed);
    }
}

/// Runs until it is dropped.
pub struct Importer {
    stop: Stop,
    thread: Option<JoinHandle<()>>,
}

impl Importer {
    /// Until its first look nothing can be marked: what a crash left half replayed is no instant of the disk.
    pub fn start(disk: Arc<ProtectedDisk>, origin: PathBuf, patience: Patience) -> io::Result<Self> {
        disk.set_importing(true);
        let stop = Stop::new();
        let folder = disk.path().parent().ok_or(io::ErrorKind::NotFound)?;
        let storage = RealStorage::open_folder(folder);
        let copy = Copy { splitter: Splitter::new(disk.clone())?, stop: stop.clone() };
        let mut follower = Follower {
            id: disk.identity.disk,
            disk,
            copy,
            origin,
            storage,
            stop: stop.clone(),
            cursor: None,
            patience,
            contradicted: None,
            is_told: false,
        };
        let thread = Builder::new().name("import".to_owned()).spawn(move || follower.run())?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Importer {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the import of a disk panicked");
        }
    }
}

struct Follower {
    id: DiskId,
    disk: Arc<ProtectedDisk>,
    copy: Copy,
    origin: PathBuf,
    storage: Arc<dyn Storage>,
    stop: Stop,
    cursor: Option<Cursor>,
    patience: Patience,
    /// Since when what is there contradicts the cursor.
    contradicted: Option<Instant>,
    /// Of a comparison that is tried again people heard once.
    is_told: bool,
}

impl Follower {
    fn run(&mut self) {
        loop {
            match self.step() {
                Ok(()) => drop(self.disk.alarms().remove("import")),
                Err(ImportError::Stopped) => break,
                Err(error) => {
                    let message = std::iter::successors(Some(&error as &dyn std::error::Error), |error| error.source());
                    let message = message.map(ToString::to_string).collect::<Vec<_>>().join(": ");
                    self.disk.alarm("import", true, message, error.help());
                }
            }
            if self.stop.wait_for(POLL) {
                break;
            }
        }
    }

    fn io<'a>(&'a self, what: &'static str) -> impl FnOnce(io::Error) -> ImportError + 'a {
        move |source| ImportError::Io { what, path: self.origin.clone(), source }
    }

    /// Takes everything that is there.
    fn step(&mut self) -> Result<(), ImportError> {
        if self.cursor.is_none() {
            let found = cursor::load(&*self.storage, self.id).map_err(self.io("read the cursor of"))?;
            match found.filter(|cursor| cursor.is_compared) {
                Some(cursor) => self.cursor = Some(cursor),
                None => self.compare("its logs were not followed before")?,
            }
        }
        loop {
            if self.stop.is_stopped() {
                return Err(ImportError::Stopped);
            }
            let logs = logs::list(&self.origin).map_err(self.io("list the logs of"))?;
            let Some(cursor) = &self.cursor else { return Ok(()) };
            let contradiction = match logs::next(&logs, cursor.last, &cursor.passed) {
                Next::Log(log) => {
                    self.contradicted = None;
                    if !self.take(&log)? {
                        continue;
                    }
                    self.wait_marked();
                    continue;
                }
                Next::Broken { reason } => Some(reason),
                Next::Nothing => self.foreign_writer(&logs),
            };
            let Some(reason) = contradiction else {
                self.contradicted = None;
                let is_pending = cursor.until.is_some();
                self.disk.set_importing(is_pending);
                return Ok(());
            };
            let since = *self.contradicted.get_or_insert_with(Instant::now);
            if since.elapsed() < self.patience.get() {
                return Ok(());
            }
            self.contradicted = None;
            self.compare(&reason)?;
        }
    }

    /// The image was written to by somebody who kept no log.
    fn foreign_writer(&self, logs: &[Log]) -> Option<String> {
        let newest = logs::active(logs).or_else(|| logs::newest_closed(logs))?;
        let logged = newest.header.data_write_guid;
        let found = data_write_guid(&self.origin)?;
        let compared = self.cursor.as_ref().and_then(|cursor| cursor.guid);
        let differs = !logged.is_nil() && !found.is_nil() && logged != found && compared != Some(found);
        differs.then(|| {
            format!(
                "{} was written to while no log was kept (DataWriteGuid {found}, in the log {logged})",
                self.origin.display()
            )
        })
    }

    /// Replays one log; false where it cannot be, and the disk was compared instead.
    fn take(&mut self, log: &Log) -> Result<bool, ImportError> {
        let plan = match ApplyPlan::check(std::slice::from_ref(&log.path)) {
            Ok(plan) => plan,
            Err(error @ ToolError::Open { .. }) => return Err(error.into()),
            Err(error) => return self.compare(&error.to_string()).map(|()| false),
        };
        let cursor = self.cursor.clone().unwrap_or_default();
        let pending = Cursor { until: cursor.until.or(Some(log.id())), ..cursor.clone() };
        cursor::store(&*self.storage, self.id, &pending).map_err(self.io("store the cursor of"))?;
        self.disk.set_importing(true);
        let report = match plan.apply(&self.copy) {
            Ok(report) => report,
            // Of another disk, or changed since it was checked.
            Err(error @ (ToolError::BeyondDisk { .. } | ToolError::Defect { .. })) => {
                return self.compare(&error.to_string()).map(|()| false);
            }
            Err(_) if self.stop.is_stopped() => return Err(ImportError::Stopped),
            Err(error) => return Err(error.into()),
        };
        let until = cursor.until.filter(|until| *until != log.id());
        let taken = Cursor { is_compared: true, last: Some(log.id()), until, ..cursor };
        cursor::store(&*self.storage, self.id, &taken).map_err(self.io("store the cursor of"))?;
        tracing::info!(disk = %self.id, log = %log.path.display(), entries = report.entries, bytes = report.data_bytes, "log taken");
        self.disk.set_importing(taken.until.is_some());
        self.cursor = Some(taken);
        Ok(true)
    }

    /// Lets a mark be made between this log and the next.
    fn wait_marked(&self) {
        if self.disk.is_importing() {
            return;
        }
        let logged = self.disk.log.published().logged;
        let deadline = Instant::now() + MARK_LIMIT;
        while self.disk.log.published().logged == logged && Instant::now() < deadline {
            if self.stop.wait_for(LOOK_AGAIN) {
                return;
            }
        }
    }

    /// Makes the copy equal to the image, as far as it can be read while others write to it; then goes on with the log that was open
    /// when this began.
    fn compare(&mut self, reason: &str) -> Result<(), ImportError> {
        self.disk.set_importing(true);
        self.cursor = None;
        cursor::store(&*self.storage, self.id, &Cursor::default()).map_err(self.io("store the cursor of"))?;
        if !std::mem::replace(&mut self.is_told, true) {
            let message = format!("{} is compared with its copy: {reason}", self.origin.display());
            self.disk.events.publish(Severity::Warning, EventKind::DiskUnwitnessed, message, "this goes on by itself");
        }
        let before = logs::list(&self.origin).map_err(self.io("list the logs of"))?;
        let face = self.face()?;
        let written = self.write_differences()?;
        let after = logs::list(&self.origin).map_err(self.io("list the logs of"))?;
        let until = logs::active(&after).map(Log::id);
        if until.is_none() && self.face()? != face {
            return Err(ImportError::Untracked { path: self.origin.clone() });
        }
        // Of after the comparison: a writer who came meanwhile is told by a log, or was refused above.
        let guid = data_write_guid(&self.origin);
        // The log that was open then holds what was written meanwhile, and so do all after it.
        let last = match logs::active(&before) {
            Some(active) => Some(active.header.previous_unique_id),
            None => logs::newest_closed(&before).map(Log::id),
        };
        let passed = before.iter().filter(|log| log.is_closed()).map(Log::id).collect();
        let cursor = Cursor { is_compared: true, last, until, guid, passed };
        cursor::store(&*self.storage, self.id, &cursor).map_err(self.io("store the cursor of"))?;
        tracing::info!(disk = %self.id, written, "image compared with its copy");
        self.cursor = Some(cursor);
        self.is_told = false;
        Ok(())
    }

    /// What tells whether somebody wrote to the image.
    fn face(&self) -> Result<(u64, Timestamp, Option<Uuid>), ImportError> {
        let metadata = std::fs::metadata(&self.origin).map_err(self.io("examine"))?;
        let modified = metadata.modified().map_err(self.io("examine"))?;
        Ok((metadata.len(), Timestamp::from_system(modified), data_write_guid(&self.origin)))
    }

    fn write_differences(&self) -> Result<u64, ImportError> {
        let mut image = Image::open(&self.origin)?;
        let bytes = self.disk.identity.disk_bytes;
        if image.bytes() != bytes {
            return Err(ImportError::Resized { path: self.origin.clone(), before: bytes, now: image.bytes() });
        }
        let copy = |source| ImportError::Io { what: "write the copy of", path: self.origin.clone(), source };
        let (mut theirs, mut ours) = (vec![0; COMPARED_BYTES as usize], vec![0; COMPARED_BYTES as usize]);
        let mut written = 0;
        let mut at = 0;
        while at < bytes {
            if self.stop.is_stopped() {
                return Err(ImportError::Stopped);
            }
            let extent = Extent::new(at, COMPARED_BYTES.min(bytes - at));
            at = extent.end();
            let is_hole = image.status(extent)?.iter().all(|(_, kind)| *kind == Allocation::Hole);
            let (run, kind) = self.disk.disk.allocation(extent.offset).map_err(copy)?;
            if is_hole && kind == Allocation::Hole && run >= extent.length {
                continue;
            }
            let length = extent.length as usize;
            let (theirs, ours) = (&mut theirs[..length], &mut ours[..length]);
            if is_hole {
                theirs.fill(0);
            } else {
                image.read(extent.offset, theirs)?;
            }
            self.disk.disk.read_at(extent.offset, ours).map_err(copy)?;
            let parts = theirs.chunks(PART_BYTES).zip(ours.chunks(PART_BYTES)).enumerate();
            for (index, (theirs, _)) in parts.filter(|(_, (theirs, ours))| theirs != ours) {
                let place = extent.offset + (index * PART_BYTES) as u64;
                match is_zero(theirs) {
                    true => self.copy.zero(Extent::new(place, theirs.len() as u64), true, Durability::Cached),
                    false => self.copy.write_at(place, theirs, Durability::Cached),
                }
                .map_err(copy)?;
                written += theirs.len() as u64;
            }
        }
        self.copy.flush().map_err(copy)?;
        Ok(written)
    }
}

/// The copy, written as a guest writes to a disk.
struct Copy {
    splitter: Splitter,
    stop: Stop,
}

impl Disk for Copy {
    fn bytes(&self) -> u64 {
        self.splitter.bytes()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.splitter.read(offset, buffer)
    }

    fn write_at(&self, offset: u64, data: &[u8], durability: Durability) -> io::Result<()> {
        // A replay is left here: it is made again from its beginning.
        if self.stop.is_stopped() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let mut results = [Err(io::ErrorKind::Other.into())];
        let fua = durability == Durability::Durable;
        self.splitter.write_batch(&[WriteRequest { offset, data, fua }], &mut results);
        let [result] = results;
        result
    }

    fn zero(&self, extent: Extent, discard: bool, durability: Durability) -> io::Result<()> {
        self.splitter.zero(extent, discard, durability)
    }

    fn flush(&self) -> io::Result<()> {
        self.splitter.flush()
    }

    fn allocation(&self, offset: u64) -> io::Result<(u64, Allocation)> {
        self.splitter.allocation(offset)
    }
}
