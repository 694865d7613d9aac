//! All logs of one disk.
//!
//! *Consistency.* A log follows another if its start is the other's end, by sequence and history hash, and it names the
//! other's unique id. Where a log is missing or cannot be read, going on is an error, never a skip. *Retries.* None.
//! *Cancellation.* Nothing waits. *Crash.* A log is deleted `.hrl` file first, oldest log first; a companion that stays
//! alone is recognised as a leftover.

use std::collections::BTreeMap;
use std::sync::Arc;

use tidemark_base::storage::Storage;
use tidemark_base::sync::Mutex;
use tidemark_base::{DiskId, Position};
use uuid::Uuid;

use crate::error::{LogError, Result};
use crate::log::io_error;
use crate::name::LogName;
use crate::reader::{LogReader, Record, Records};
use crate::recovery::logs_in;

pub struct LogChain {
    storage: Arc<dyn Storage>,
    stem: String,
    disk: DiskId,
    logs: Mutex<BTreeMap<u64, Entry>>,
}

#[derive(Clone)]
enum Entry {
    /// Opened when it is read: a long backlog would hold too many files open.
    Closed(Closed),
    Live(LogReader),
    /// Not to be read, but it counts and can be deleted.
    Unusable {
        what: String,
    },
}

#[derive(Clone, Copy)]
struct Closed {
    id: Uuid,
    start: Position,
    end: Position,
    apparent_bytes: u64,
    allocated_bytes: u64,
}

impl Closed {
    fn of(reader: &LogReader) -> Result<Self> {
        Ok(Self {
            id: reader.id(),
            start: reader.start(),
            end: reader.end(),
            apparent_bytes: reader.apparent_bytes(),
            allocated_bytes: reader.allocated_bytes()?,
        })
    }
}

/// Whether a position belongs to the logged history.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Found {
    In(LogName),
    Unknown,
}

/// What was deleted.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Forgotten {
    pub logs: usize,
    pub allocated_bytes: u64,
}

impl LogChain {
    /// Opens the closed logs of a disk in a folder. Logs that were not closed must have been recovered before.
    pub fn open(storage: Arc<dyn Storage>, stem: &str, disk: DiskId) -> Result<Arc<Self>> {
        let mut logs = BTreeMap::new();
        for (name, files) in logs_in(&*storage, stem)? {
            if !files.has_hrl {
                continue;
            }
            let entry = match LogReader::open(storage.clone(), &name, disk) {
                Ok(reader) => Entry::Closed(Closed::of(&reader)?),
                Err(error @ (LogError::Damaged { .. } | LogError::NoCompanion { .. })) => {
                    tracing::warn!(log = %name, %error, "a closed log cannot be read");
                    Entry::Unusable { what: error.to_string() }
                }
                Err(error) => return Err(error),
            };
            logs.insert(name.number, entry);
        }
        Ok(Arc::new(Self { storage, stem: stem.to_owned(), disk, logs: Mutex::new(logs) }))
    }

    /// Adds the active log, when it was made and after each rotation.
    pub fn add(&self, log: LogReader) {
        let number = log.name().number;
        self.logs.lock().expect("no panic while held").insert(number, Entry::Live(log));
    }

    /// The name for the next new log.
    pub fn next_name(&self) -> LogName {
        let last = self.logs.lock().expect("no panic while held").keys().next_back().copied().unwrap_or(0);
        LogName::new(self.stem.as_str(), last + 1)
    }

    /// Unique id and end of the newest log.
    pub fn last(&self) -> Option<(Uuid, Position)> {
        self.logs.lock().expect("no panic while held").values().rev().find_map(|entry| match entry {
            Entry::Closed(closed) => Some((closed.id, closed.end)),
            Entry::Live(reader) => Some((reader.id(), reader.end())),
            Entry::Unusable { .. } => None,
        })
    }

    pub fn is_empty(&self) -> bool {
        self.logs.lock().expect("no panic while held").is_empty()
    }

    /// A copy of the list, in which logs that were closed meanwhile count as such.
    fn entries(&self) -> Result<BTreeMap<u64, Entry>> {
        let mut logs = self.logs.lock().expect("no panic while held");
        for entry in logs.values_mut() {
            if let Entry::Live(reader) = entry
                && reader.is_closed()
            {
                *entry = Entry::Closed(Closed::of(reader)?);
            }
        }
        Ok(logs.clone())
    }

    /// The next log by number. Looked up without copying the list: a reader at the end asks often.
    fn after(&self, number: u64) -> Option<(u64, Entry)> {
        let logs = self.logs.lock().expect("no panic while held");
        logs.range(number + 1..).next().map(|(&number, entry)| (number, entry.clone()))
    }

    fn reader(&self, number: u64, entry: &Entry) -> Result<LogReader> {
        let name = LogName::new(self.stem.as_str(), number);
        match entry {
            Entry::Live(reader) => Ok(reader.clone()),
            Entry::Closed(_) => LogReader::open(self.storage.clone(), &name, self.disk),
            Entry::Unusable { what } => {
                Err(LogError::Damaged { path: self.storage.path(&name.hrl()), offset: 0, what: what.clone() })
            }
        }
    }

    /// The newest log that holds a position, as its start or as one of its records.
    fn locate(&self, position: &Position) -> Result<Option<(u64, LogReader)>> {
        for (number, entry) in self.entries()?.iter().rev() {
            let (start, end) = match entry {
                Entry::Closed(closed) => (closed.start, closed.end),
                Entry::Live(reader) => (reader.start(), reader.end()),
                Entry::Unusable { .. } => continue,
            };
            let is_in_range = start.epoch == position.epoch
                && start.sequence <= position.sequence
                && position.sequence <= end.sequence;
            if is_in_range {
                let reader = self.reader(*number, entry)?;
                let found = reader.position_of(position.sequence)?;
                return Ok((found == Some(*position)).then_some((*number, reader)));
            }
        }
        Ok(None)
    }

    pub fn find(&self, position: &Position) -> Result<Found> {
        Ok(match self.locate(position)? {
            Some((_, reader)) => Found::In(reader.name().clone()),
            None => Found::Unknown,
        })
    }

    /// The records after a position, across logs, to the end of its epoch.
    pub fn records_after(self: &Arc<Self>, position: &Position) -> Result<ChainRecords> {
        let Some((_, reader)) = self.locate(position)? else {
            return Err(LogError::Unknown { position: *position, folder: self.storage.path("") });
        };
        let records = reader.records_after(position)?;
        Ok(ChainRecords { chain: self.clone(), reader, records })
    }

    /// Deletes the closed logs that lie wholly before a position which every consumer has passed.
    pub fn forget_before(&self, position: &Position) -> Result<Forgotten> {
        let Some((holder, _)) = self.locate(position)? else {
            return Err(LogError::Unknown { position: *position, folder: self.storage.path("") });
        };
        let mut old = Vec::new();
        let mut forgotten = Forgotten::default();
        self.entries()?;
        {
            let mut logs = self.logs.lock().expect("no panic while held");
            while let Some(first) = logs.first_entry().filter(|first| *first.key() < holder) {
                forgotten.allocated_bytes += match first.get() {
                    Entry::Live(_) => break,
                    Entry::Closed(closed) => closed.allocated_bytes,
                    Entry::Unusable { .. } => 0,
                };
                old.push(LogName::new(self.stem.as_str(), first.remove_entry().0));
            }
        }
        for name in &old {
            let remove = || {
                self.storage.remove(&name.hrl())?;
                if self.storage.exists(&name.companion())? {
                    self.storage.remove(&name.companion())?;
                }
                Ok(())
            };
            remove().map_err(io_error(&*self.storage, name, "delete"))?;
            forgotten.logs += 1;
        }
        if let Some(name) = old.last() {
            self.storage.sync_folder("").map_err(io_error(&*self.storage, name, "delete"))?;
        }
        Ok(forgotten)
    }

    /// Length of all files, holes included.
    pub fn apparent_bytes(&self) -> Result<u64> {
        Ok(self
            .entries()?
            .values()
            .map(|entry| match entry {
                Entry::Closed(closed) => closed.apparent_bytes,
                Entry::Live(reader) => reader.apparent_bytes(),
                Entry::Unusable { .. } => 0,
            })
            .sum())
    }

    /// What all files occupy on the media: this is what a log limit counts.
    pub fn allocated_bytes(&self) -> Result<u64> {
        let mut bytes = 0;
        for entry in self.entries()?.values() {
            bytes += match entry {
                Entry::Closed(closed) => closed.allocated_bytes,
                Entry::Live(reader) => reader.allocated_bytes()?,
                Entry::Unusable { .. } => 0,
            };
        }
        Ok(bytes)
    }
}

/// A record and the log that holds its data.
#[derive(Clone)]
pub struct ChainRecord {
    pub record: Record,
    log: LogReader,
}

impl ChainRecord {
    /// As [`LogReader::read_data`].
    pub fn read_data(&self, buffer: &mut [u8]) -> Result<()> {
        self.log.read_data(&self.record, buffer)
    }
}

/// Goes through the records of an epoch, from log to log. There may be more after `None`.
pub struct ChainRecords {
    chain: Arc<LogChain>,
    reader: LogReader,
    records: Records,
}

impl ChainRecords {
    #[expect(clippy::should_implement_trait, reason = "after None there may be more")]
    pub fn next(&mut self) -> Result<Option<ChainRecord>> {
        loop {
            if let Some(record) = self.records.next()? {
                return Ok(Some(ChainRecord { record, log: self.reader.clone() }));
            }
            if !self.enter_next_log()? {
                return Ok(None);
            }
        }
    }

    /// The position after the last record that was returned.
    pub fn position(&self) -> Position {
        self.records.position()
    }

    /// False if there is none, or if it begins another epoch.
    fn enter_next_log(&mut self) -> Result<bool> {
        let number = self.reader.name().number;
        let Some((next, entry)) = self.chain.after(number) else { return Ok(false) };
        let reader = self.chain.reader(next, &entry)?;
        let position = self.position();
        if reader.start().epoch != position.epoch {
            return Ok(false);
        }
        // What was appended between the last look at this log and its rotation comes first.
        if self.reader.end() != position {
            return Ok(true);
        }
        if reader.start() != position || reader.previous_id() != Some(self.reader.id()) {
            let path = self.chain.storage.path(&reader.name().hrl());
            let what =
                format!("it does not continue {} at {position}: a log between them is missing", self.reader.name());
            return Err(LogError::Damaged { path, offset: 0, what });
        }
        self.records = reader.records();
        self.reader = reader;
        Ok(true)
    }
}
