//! How far the logs of a disk were taken: a file beside the copy, replaced as a whole.
//!
//! 1. what is about to be replayed is stored as `until`
//! 2. the log is replayed
//! 3. the copy is flushed
//! 4. stored: the log is the last one, nothing is pending
//!
//! Crash before 1: nothing happened. Before 4: the copy holds a part of the log, or all of it; the log is replayed again from its beginning, which writes
//! the same, and there are no marks before it was. A comparison is stored as begun first, and is made again where it did not end. A cursor that is lost or
//! damaged is a comparison.

use std::collections::BTreeSet;
use std::io;

use serde::{Deserialize, Serialize};
use tidemark_base::DiskId;
use tidemark_base::storage::{Storage, read_file, replace_file};
use uuid::Uuid;

const FILE_BYTES_MAX: u64 = 8 << 20;

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Cursor {
    /// A comparison was made to its end.
    pub is_compared: bool,
    /// The log that was taken last, or that comes before the first one to take.
    pub last: Option<Uuid>,
    /// The copy is no instant of the disk until this log was replayed.
    pub until: Option<Uuid>,
    /// What the image's DataWriteGuid was when it was compared.
    #[serde(default)]
    pub guid: Option<Uuid>,
    /// Logs that were closed before the last comparison: whatever they are, the copy is past them.
    #[serde(default)]
    pub passed: BTreeSet<Uuid>,
}

fn file(disk: DiskId) -> String {
    format!("{disk}.cursor")
}

/// `None`: there is none, or it cannot be trusted.
pub fn load(storage: &dyn Storage, disk: DiskId) -> io::Result<Option<Cursor>> {
    let name = file(disk);
    if !storage.exists(&name)? {
        return Ok(None);
    }
    let content = read_file(storage, &name, FILE_BYTES_MAX)?;
    let sound = content.split_at_checked(32).filter(|(hash, text)| *hash == blake3::hash(text).as_bytes().as_slice());
    Ok(sound.and_then(|(_, text)| serde_json::from_slice(text).ok()))
}

pub fn store(storage: &dyn Storage, disk: DiskId, cursor: &Cursor) -> io::Result<()> {
    let text = serde_json::to_vec(cursor)?;
    replace_file(storage, &file(disk), &[blake3::hash(&text).as_bytes().as_slice(), &text].concat())
}

pub fn forget(storage: &dyn Storage, disk: DiskId) -> io::Result<()> {
    let name = file(disk);
    if storage.exists(&name)? {
        storage.remove(&name)?;
        storage.sync_folder("")?;
    }
    Ok(())
}
