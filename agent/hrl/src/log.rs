use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use tidemark_base::storage::{Storage, StorageFile};
use tidemark_base::sync::{Mutex, MutexGuard};
use tidemark_base::{Position, Timestamp};

use crate::companion::{Durable, End, Identity, Reached, Slot, Start, control_at, seal};
use crate::error::{Failure, LogError, Result};
use crate::format::{HEADER_BYTES, Header, METADATA_BYTES, SetBuilder};
use crate::hash::{DataHasher, slot_key};
use crate::name::LogName;

/// One log as its appender, its readers and its syncer share it.
pub(crate) struct Log {
    pub storage: Arc<dyn Storage>,
    pub name: LogName,
    pub identity: Identity,
    pub start: Start,
    pub slot_key: [u8; 32],
    pub hasher: DataHasher,
    pub data: Arc<dyn StorageFile>,
    pub companion: Arc<dyn StorageFile>,
    /// Up to where the log may be read: never a part of a batch, never what a failed write left.
    published: Mutex<Reached>,
    sync: Mutex<SyncState>,
    failure: AtomicU8,
    closed: AtomicBool,
}

pub(crate) struct SyncState {
    pub durable: Durable,
    /// The log before, as long as it may not be wholly durable: nothing here counts as durable before it is, or a
    /// power loss would leave a hole in the history.
    pub before: Option<Arc<Log>>,
}

/// The files of a log and the keys that belong to them.
pub(crate) struct Parts {
    pub storage: Arc<dyn Storage>,
    pub name: LogName,
    pub identity: Identity,
    pub data: Arc<dyn StorageFile>,
    pub companion: Arc<dyn StorageFile>,
}

impl Log {
    pub(crate) fn new(parts: Parts, start: Start, reached: Reached, sync: SyncState, closed: bool) -> Self {
        Self {
            slot_key: slot_key(parts.identity.disk, parts.identity.log),
            hasher: DataHasher::new(parts.identity.disk),
            storage: parts.storage,
            name: parts.name,
            identity: parts.identity,
            start,
            data: parts.data,
            companion: parts.companion,
            published: Mutex::new(reached),
            sync: Mutex::new(sync),
            failure: AtomicU8::new(0),
            closed: AtomicBool::new(closed),
        }
    }

    pub(crate) fn reached(&self) -> Reached {
        *self.published.lock().expect("no panic while held")
    }

    pub(crate) fn publish(&self, reached: Reached) {
        *self.published.lock().expect("no panic while held") = reached;
    }

    pub(crate) fn position(&self) -> Position {
        self.position_of(&self.reached())
    }

    pub(crate) fn position_of(&self, reached: &Reached) -> Position {
        Position { epoch: self.start.position.epoch, sequence: reached.sequence, hash: reached.hash }
    }

    fn sync_state(&self) -> MutexGuard<'_, SyncState> {
        self.sync.lock().expect("no panic while held")
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    pub(crate) fn durable(&self) -> Option<Position> {
        self.sync_state().durable.reached.map(|reached| self.position_of(&reached))
    }

    pub(crate) fn failure(&self) -> Option<Failure> {
        match self.failure.load(Ordering::Acquire) {
            0 => None,
            1 => Some(Failure::Write),
            _ => Some(Failure::Sync),
        }
    }

    /// The worse failure stays.
    pub(crate) fn latch(&self, failure: Failure) {
        let code = match failure {
            Failure::Write => 1,
            Failure::Sync => 2,
        };
        self.failure.fetch_max(code, Ordering::AcqRel);
    }

    pub(crate) fn check_latch(&self) -> Result<()> {
        match self.failure() {
            None => Ok(()),
            Some(failure) => Err(LogError::Latched { path: self.storage.path(&self.name.hrl()), failure }),
        }
    }

    pub(crate) fn io_error(&self, verb: &'static str) -> impl FnOnce(io::Error) -> LogError {
        io_error(&*self.storage, &self.name, verb)
    }

    pub(crate) fn damaged_companion(&self, offset: u64, what: impl Into<String>) -> LogError {
        LogError::Damaged { path: self.storage.path(&self.name.companion()), offset, what: what.into() }
    }

    pub(crate) fn damaged_data(&self, offset: u64, what: impl Into<String>) -> LogError {
        LogError::Damaged { path: self.storage.path(&self.name.hrl()), offset, what: what.into() }
    }

    pub(crate) fn write_control(&self, at: u64, mut slot: Slot) -> io::Result<()> {
        seal(&self.slot_key, at, &mut slot);
        self.companion.write_at(at, &slot)
    }

    /// Makes everything that is published now durable, in this log and in those before it.
    pub(crate) fn make_durable(&self) -> Result<Position> {
        self.check_latch()?;
        let mut sync = self.sync_state();
        let reached = self.reached();
        if self.is_closed() || sync.durable.reached == Some(reached) {
            return Ok(self.position_of(&reached));
        }
        self.settle_before(&mut sync)?;
        self.write_durable(&mut sync, reached).map_err(|error| {
            self.latch(Failure::Sync);
            self.io_error("sync")(error)
        })?;
        Ok(self.position_of(&reached))
    }

    fn settle_before(&self, sync: &mut SyncState) -> Result<()> {
        if let Some(before) = &sync.before {
            before.make_durable().inspect_err(|_| self.latch(Failure::Sync))?;
            sync.before = None;
        }
        Ok(())
    }

    fn write_durable(&self, sync: &mut SyncState, reached: Reached) -> io::Result<()> {
        self.data.sync()?;
        self.companion.sync()?;
        let durable = Durable { count: sync.durable.count + 1, reached: Some(reached) };
        self.write_control(control_at::DURABLE[(durable.count % 2) as usize], durable.encode())?;
        self.companion.sync()?;
        sync.durable = durable;
        Ok(())
    }

    /// Closes the log: the order is in the companion's FORMAT.md.
    pub(crate) fn close(&self, sets: &mut SetBuilder, time: Timestamp) -> Result<()> {
        self.check_latch()?;
        let mut sync = self.sync_state();
        self.settle_before(&mut sync)?;
        self.write_close(sets, time).map_err(|error| {
            self.latch(Failure::Sync);
            self.io_error("close")(error)
        })?;
        sync.durable.reached = Some(self.reached());
        self.closed.store(true, Ordering::Release);
        Ok(())
    }

    fn write_close(&self, sets: &mut SetBuilder, time: Timestamp) -> io::Result<()> {
        if sets.needs_last_block() {
            let mut block = Box::new([0; METADATA_BYTES]);
            let at = sets.finish(&mut block);
            self.data.write_at(at, &block[..])?;
        }
        let eol_location = sets.end();
        self.data.sync()?;
        self.companion.sync()?;
        let end = End { reached: self.reached(), eol_location, time };
        self.write_control(control_at::END, end.encode())?;
        self.companion.sync()?;
        let mut header = Header::new(self.identity.log, self.start.previous, self.identity.created);
        header.current_bytes = eol_location;
        header.eol_location = eol_location;
        header.total_entries = sets.total_entries();
        header.modified_seconds = time.hrl_seconds();
        self.data.write_at(0, &header.encode())?;
        self.data.sync()?;
        self.storage.sync_folder("")
    }
}

pub(crate) fn io_error(
    storage: &dyn Storage,
    name: &LogName,
    verb: &'static str,
) -> impl FnOnce(io::Error) -> LogError {
    let path = storage.path(&name.hrl());
    move |source| LogError::Io { verb, path, source }
}

/// The place before the first record.
pub(crate) fn reached_at_start(start: &Start) -> Reached {
    Reached {
        sequence: start.position.sequence,
        hash: start.position.hash,
        companion_bytes: crate::companion::RECORDS_OFFSET,
        data_bytes: HEADER_BYTES as u64,
    }
}
