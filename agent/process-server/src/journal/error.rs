//! What can be wrong with what is appended, and with what is read.

use std::io;

use tidemark_base::chunk::ChunkError;
use tidemark_base::{DiskId, Extent, Generation};
use tidemark_proto::replication::RefusalReason;

#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("disk {disk}: cut {cut} does not continue the journal: {what}")]
    Gap { disk: DiskId, cut: u64, what: String },
    #[error("disk {disk}: cut {cut} is damaged: {what}")]
    Damaged { disk: DiskId, cut: u64, what: String },
    #[error("disk {disk}: a chunk of cut {cut} is damaged")]
    Chunk { disk: DiskId, cut: u64, source: ChunkError },
    #[error("disk {disk}: a frame of cut {cut} is not allowed: {what}")]
    Protocol { disk: DiskId, cut: u64, what: String },
    #[error("disk {disk}: no room in {place} ({available_bytes} bytes free)")]
    NoRoom { disk: DiskId, place: String, available_bytes: u64 },
    #[error("disk {disk}: the journal failed")]
    StoreFailed { disk: DiskId, source: Option<io::Error> },
    #[error("disk {disk}: generation {asked} is superseded by {current}")]
    Generation { disk: DiskId, asked: Generation, current: Generation },
    #[error("disk {disk}: a newer session took over")]
    Fenced { disk: DiskId },
    #[error("disk {disk} had {known} bytes and has {asked} now")]
    SizeChanged { disk: DiskId, known: u64, asked: u64 },
}

impl JournalError {
    pub fn reason(&self) -> RefusalReason {
        match self {
            JournalError::Gap { .. } => RefusalReason::Gap,
            JournalError::Damaged { .. } | JournalError::Chunk { .. } => RefusalReason::Damaged,
            JournalError::Protocol { .. } => RefusalReason::Protocol,
            JournalError::NoRoom { .. } => RefusalReason::NoRoom,
            JournalError::StoreFailed { .. } => RefusalReason::StoreFailed,
            JournalError::Generation { .. } => RefusalReason::Generation,
            JournalError::Fenced { .. } => RefusalReason::Fenced,
            JournalError::SizeChanged { .. } => RefusalReason::SizeChanged,
        }
    }

    pub fn help(&self) -> &'static str {
        match self {
            JournalError::Gap { .. } => {
                "the host reconnects and resumes by itself; if it repeats, run `tidemark resync`"
            }
            JournalError::Damaged { .. } | JournalError::Chunk { .. } => {
                "the host sends it again by itself; if it repeats, check the network and the memory of both machines"
            }
            JournalError::Protocol { .. } => "use the same version of tidemark on both ends",
            JournalError::NoRoom { .. } => {
                "free or add room on the process server's volume, or shorten the retention; replication resumes by itself"
            }
            JournalError::StoreFailed { .. } => {
                "check the process server's volume (see its kernel log), then restart the process server"
            }
            JournalError::Generation { .. } => {
                "this host's copy is no longer the source; reprotect the machine from its new home"
            }
            JournalError::Fenced { .. } => "make sure that only one agent runs for this disk",
            JournalError::SizeChanged { .. } => "unprotect the disk and protect it again at its new size",
        }
    }
}

/// Why data of a replica cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("{file}: {what}")]
    Damaged { file: String, extent: Option<Extent>, what: String },
    #[error("{file} cannot be read")]
    Io { file: String, source: io::Error },
}

impl ReadError {
    pub fn damaged(file: impl Into<String>, what: impl Into<String>) -> Self {
        ReadError::Damaged { file: file.into(), extent: None, what: what.into() }
    }

    pub fn help(&self) -> &'static str {
        match self {
            ReadError::Damaged { .. } => {
                "choose another recovery point, and run `tidemark resync` so that later points are whole again"
            }
            ReadError::Io { .. } => "check the process server's volume (see its kernel log)",
        }
    }
}

impl From<ReadError> for io::Error {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Io { .. } => io::Error::other(error),
            ReadError::Damaged { .. } => io::Error::new(io::ErrorKind::InvalidData, error),
        }
    }
}
