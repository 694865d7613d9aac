//! Which agent may write which disk, at which generation. The process server is the authority: a generation only grows
//! here, whatever a configuration server that was restored from a backup believes.
//!
//! *Consistency.* The table in memory is what was last made durable; it changes after the file did. *Crash.* The file is
//! replaced atomically: the old table or the new.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use tidemark_base::storage::{Storage, read_file, replace_file};
use tidemark_base::{DiskId, Generation, HostId, MachineId};
use tokio::sync::watch;

const FILE: &str = "authorisations.json";
const FILE_BYTES_MAX: u64 = 64 << 20;
const VERSION: u32 = 1;

/// What one disk's stream must prove.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Authorisation {
    pub machine: MachineId,
    pub agent: HostId,
    pub generation: Generation,
    pub disk_bytes: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum AuthoriseError {
    #[error("disk {disk} is at generation {current}; {asked} is older")]
    Superseded { disk: DiskId, asked: Generation, current: Generation },
    #[error("disk {disk} is authorised with {known} bytes, not {asked}, at generation {generation}")]
    Size { disk: DiskId, known: u64, asked: u64, generation: Generation },
    #[error("the table of authorisations cannot be read or written")]
    Store(#[from] io::Error),
    #[error("{path} is no table of authorisations: {reason}")]
    Damaged { path: String, reason: String },
}

impl AuthoriseError {
    pub fn help(&self) -> &'static str {
        match self {
            AuthoriseError::Superseded { .. } => {
                "the configuration server is behind this process server: restore its latest backup, or reprotect"
            }
            AuthoriseError::Size { .. } => "unprotect the disk and protect it again at its new size",
            AuthoriseError::Store(_) => "check the process server's volume (free room, kernel log)",
            AuthoriseError::Damaged { .. } => {
                "move the file away and let the configuration server authorise the disks again"
            }
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Document {
    version: u32,
    disks: BTreeMap<DiskId, Authorisation>,
}

pub struct Authorisations {
    storage: Arc<dyn Storage>,
    table: Mutex<BTreeMap<DiskId, Authorisation>>,
    /// One writer of the file at a time.
    writing: Mutex<()>,
    /// Grows with each change, so that running streams look again.
    changes: watch::Sender<u64>,
}

impl Authorisations {
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self, AuthoriseError> {
        let table = if storage.exists(FILE)? {
            let damaged =
                |reason: String| AuthoriseError::Damaged { path: storage.path(FILE).display().to_string(), reason };
            let document: Document = serde_json::from_slice(&read_file(&*storage, FILE, FILE_BYTES_MAX)?)
                .map_err(|error| damaged(error.to_string()))?;
            if document.version != VERSION {
                return Err(damaged(format!("version {} is not known", document.version)));
            }
            document.disks
        } else {
            BTreeMap::new()
        };
        Ok(Self { storage, table: Mutex::new(table), writing: Mutex::new(()), changes: watch::channel(0).0 })
    }

    /// Durable when it returns. Blocks.
    pub fn authorise(&self, disk: DiskId, asked: Authorisation) -> Result<(), AuthoriseError> {
        let _writing = self.writing.lock().expect("no panic while held");
        let mut table = self.table().clone();
        if let Some(current) = table.get(&disk) {
            if asked.generation < current.generation {
                let (asked, current) = (asked.generation, current.generation);
                return Err(AuthoriseError::Superseded { disk, asked, current });
            }
            if asked.generation == current.generation && asked.disk_bytes != current.disk_bytes {
                let (known, generation) = (current.disk_bytes, current.generation);
                return Err(AuthoriseError::Size { disk, known, asked: asked.disk_bytes, generation });
            }
            if asked == *current {
                return Ok(());
            }
        }
        table.insert(disk, asked);
        self.replace(table)
    }

    /// Durable when it returns; a running stream of the disk is refused from now on. Blocks.
    pub fn deauthorise(&self, disk: DiskId) -> Result<Option<Authorisation>, AuthoriseError> {
        let _writing = self.writing.lock().expect("no panic while held");
        let mut table = self.table().clone();
        let removed = table.remove(&disk);
        if removed.is_some() {
            self.replace(table)?;
        }
        Ok(removed)
    }

    fn replace(&self, disks: BTreeMap<DiskId, Authorisation>) -> Result<(), AuthoriseError> {
        let document = Document { version: VERSION, disks };
        let text = serde_json::to_vec_pretty(&document).map_err(io::Error::other)?;
        replace_file(&*self.storage, FILE, &text)?;
        *self.table() = document.disks;
        self.changes.send_modify(|version| *version += 1);
        Ok(())
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<DiskId, Authorisation>> {
        self.table.lock().expect("no panic while held")
    }

    pub fn get(&self, disk: DiskId) -> Option<Authorisation> {
        self.table().get(&disk).copied()
    }

    pub fn all(&self) -> BTreeMap<DiskId, Authorisation> {
        self.table().clone()
    }

    /// Tells of every change of the table.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemark_base::storage::RealStorage;

    fn authorisation(generation: u64) -> Authorisation {
        Authorisation {
            machine: MachineId::from_bytes([1; 16]),
            agent: HostId::from_bytes([2; 16]),
            generation: Generation(generation),
            disk_bytes: 1 << 20,
        }
    }

    #[test]
    fn the_table_survives_and_a_generation_is_never_lowered() {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        let disk = DiskId::random();
        let table = Authorisations::open(storage.clone()).unwrap();
        let mut changes = table.changes();
        table.authorise(disk, authorisation(2)).unwrap();
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        table.authorise(disk, authorisation(2)).unwrap();
        assert!(!changes.has_changed().unwrap(), "saying the same again changes nothing");
        let table = Authorisations::open(storage.clone()).unwrap();
        assert_eq!(table.get(disk), Some(authorisation(2)));
        assert!(matches!(table.authorise(disk, authorisation(1)), Err(AuthoriseError::Superseded { .. })));
        let grown = Authorisation { disk_bytes: 2 << 20, ..authorisation(2) };
        assert!(matches!(table.authorise(disk, grown), Err(AuthoriseError::Size { .. })));
        table.deauthorise(disk).unwrap();
        assert_eq!(Authorisations::open(storage).unwrap().get(disk), None);
    }

    #[test]
    fn a_damaged_table_is_not_taken_for_an_empty_one() {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        replace_file(&*storage, FILE, b"{\"version\":1,\"disks\":{").unwrap();
        assert!(matches!(Authorisations::open(storage), Err(AuthoriseError::Damaged { .. })));
    }
}
