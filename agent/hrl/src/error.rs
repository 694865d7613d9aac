use std::io;
use std::path::PathBuf;

use tidemark_base::{DiskId, Position, storage};

pub type Result<T, E = LogError> = std::result::Result<T, E>;

/// Why a log takes no more records.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Failure {
    /// What was appended before is still readable, and durable as far as the last sync says.
    Write,
    /// The page cache may show what the media never got: only what an earlier sync covered is certain.
    Sync,
}

#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("cannot {verb} log {path}")]
    Io { verb: &'static str, path: PathBuf, source: io::Error },
    /// Something that was written is not there any more, or is another.
    #[error("log {path} is damaged at byte {offset}: {what}")]
    Damaged { path: PathBuf, offset: u64, what: String },
    #[error("log {path} takes no more records: an earlier {} failed", match .failure { Failure::Write => "write", Failure::Sync => "sync" })]
    Latched { path: PathBuf, failure: Failure },
    #[error("log {path} was not closed")]
    NotClosed { path: PathBuf },
    #[error("log {path} has no companion")]
    NoCompanion { path: PathBuf },
    #[error("log {path} is of disk {found}, not of {expected}")]
    OtherDisk { path: PathBuf, found: DiskId, expected: DiskId },
    #[error("position {position} is in no log of {folder}")]
    Unknown { position: Position, folder: PathBuf },
    #[error("a record cannot be logged: {what}")]
    Record { what: String },
}

impl LogError {
    /// What to do about it.
    pub fn help(&self) -> &'static str {
        match self {
            LogError::Io { .. } => "see the system's message; while the log cannot be used, changed blocks are tracked",
            LogError::Damaged { .. } => "the disk itself is intact: let Tidemark compare it with the replica (resync)",
            LogError::Latched { failure: Failure::Write, .. } => {
                "make room in the log's folder; the log is opened again by itself"
            }
            LogError::Latched { failure: Failure::Sync, .. } => {
                "check the media that holds the log; what it lost is found by comparing the disk with the replica"
            }
            LogError::NotClosed { .. } => "wait until the agent that writes it has closed it, or start that agent",
            LogError::NoCompanion { .. } => "compare the disk with the replica (resync)",
            LogError::OtherDisk { .. } => "move logs of another disk out of this folder",
            LogError::Unknown { .. } => "compare the disk with the replica (resync)",
            LogError::Record { .. } => "this is a defect of the program that appends; please report it",
        }
    }

    fn io(&self) -> Option<&io::Error> {
        match self {
            LogError::Io { source, .. } => Some(source),
            _ => None,
        }
    }

    /// Whether there was no room.
    pub fn is_full(&self) -> bool {
        self.io().is_some_and(storage::is_full)
    }

    /// Whether a file was not there.
    pub fn is_absent(&self) -> bool {
        self.io().is_some_and(storage::is_absent)
    }
}
