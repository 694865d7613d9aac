//! Which agent may write which disk, at which generation. The process server is the authority: a generation only grows
//! here, whatever a configuration server that was restored from a backup believes.
//!
//! *Consistency* and *Crash*: see [`crate::table`].

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tidemark_base::storage::Storage;
use tidemark_base::{DiskId, Generation, HostId, MachineId};
use tidemark_proto::control::DenyList;
use tidemark_transport::PeerInfo;
use tokio::sync::watch;

use crate::table::{Table, TableError};

const FILE: &str = "authorisations.json";
/// Who is refused whatever it may write: as the configuration server said last, also while that is away.
const DENIED_FILE: &str = "denied.json";

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
    #[error("who may write which disk is not known for sure")]
    Table(#[from] TableError),
}

impl AuthoriseError {
    pub fn help(&self) -> &'static str {
        match self {
            AuthoriseError::Superseded { .. } => {
                "the machine was failed over since, and the configuration server does not know: restore its latest backup; or, if the source is to go on, `tidemark failover cancel NAME`"
            }
            AuthoriseError::Size { .. } => {
                "a disk only grows (`tidemark machine disk resize`); one that shrank is removed from its machine and added again"
            }
            AuthoriseError::Table(error) => error.help(),
        }
    }
}

pub struct Authorisations {
    table: Table<BTreeMap<DiskId, Authorisation>>,
    denied: Table<DenyList>,
    /// Grows with each change, so that running streams look again.
    changes: watch::Sender<u64>,
}

impl Authorisations {
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self, AuthoriseError> {
        let denied = Table::open(storage.clone(), DENIED_FILE)?;
        Ok(Self { table: Table::open(storage, FILE)?, denied, changes: watch::channel(0).0 })
    }

    /// Replaces the list of those who are refused; durable when it returns, and running streams look again. Blocks.
    pub fn deny(&self, list: DenyList) -> Result<(), AuthoriseError> {
        let changed = self.denied.change(|denied| -> Result<(), AuthoriseError> {
            *denied = list;
            Ok(())
        })?;
        if changed {
            self.changes.send_modify(|version| *version += 1);
        }
        Ok(())
    }

    /// Whether this peer, or the certificate that it showed, was revoked.
    pub fn is_denied(&self, peer: &PeerInfo) -> bool {
        self.denied.read(|denied| {
            peer.certificate.is_some_and(|digest| denied.certificates.contains(&digest))
                || (!denied.identities.is_empty()
                    && peer.identity.is_some_and(|identity| denied.identities.contains(&identity.to_string())))
        })
    }

    /// Durable when it returns. Blocks.
    pub fn authorise(&self, disk: DiskId, asked: Authorisation) -> Result<(), AuthoriseError> {
        self.change(|table| {
            if let Some(current) = table.get(&disk) {
                if asked.generation < current.generation {
                    let (asked, current) = (asked.generation, current.generation);
                    return Err(AuthoriseError::Superseded { disk, asked, current });
                }
                if asked.generation == current.generation && asked.disk_bytes != current.disk_bytes {
                    let (known, generation) = (current.disk_bytes, current.generation);
                    return Err(AuthoriseError::Size { disk, known, asked: asked.disk_bytes, generation });
                }
            }
            table.insert(disk, asked);
            Ok(())
        })
    }

    /// Durable when it returns; a running stream of the disk is refused from now on. Blocks.
    pub fn deauthorise(&self, disk: DiskId) -> Result<Option<Authorisation>, AuthoriseError> {
        let mut removed = None;
        self.change(|table| {
            removed = table.remove(&disk);
            Ok(())
        })?;
        Ok(removed)
    }

    fn change(
        &self,
        change: impl FnOnce(&mut BTreeMap<DiskId, Authorisation>) -> Result<(), AuthoriseError>,
    ) -> Result<(), AuthoriseError> {
        if self.table.change(change)? {
            self.changes.send_modify(|version| *version += 1);
        }
        Ok(())
    }

    /// Reads the file again; a damaged one is named, and written again from memory.
    pub fn check(&self) -> Result<(), AuthoriseError> {
        Ok(self.table.check()?)
    }

    pub fn get(&self, disk: DiskId) -> Option<Authorisation> {
        self.table.read(|table| table.get(&disk).copied())
    }

    pub fn all(&self) -> BTreeMap<DiskId, Authorisation> {
        self.table.all()
    }

    /// Tells of every change of the table.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemark_base::storage::{RealStorage, replace_file};

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
    fn who_is_denied_stays_so_over_a_restart_and_streams_look_again() {
        use tidemark_transport::PeerIdentity;
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        let peer = |id, certificate| PeerInfo {
            identity: Some(PeerIdentity::Agent(HostId::from_bytes([id; 16]))),
            certificate: Some([certificate; 32]),
            address: "127.0.0.1:1".parse().unwrap(),
        };
        let table = Authorisations::open(storage.clone()).unwrap();
        assert!(!table.is_denied(&peer(1, 1)));
        let changes = table.changes();
        let identity = peer(1, 1).identity.unwrap().to_string();
        table.deny(DenyList { identities: vec![identity], certificates: vec![[9; 32]] }).unwrap();
        assert!(changes.has_changed().unwrap());
        for table in [table, Authorisations::open(storage.clone()).unwrap()] {
            assert!(table.is_denied(&peer(1, 1)), "the identity");
            assert!(table.is_denied(&peer(2, 9)), "one certificate of a good identity");
            assert!(!table.is_denied(&peer(2, 1)));
        }
    }

    #[test]
    fn a_damaged_table_is_not_taken_for_an_empty_one() {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        replace_file(&*storage, FILE, b"{\"version\":1,\"disks\":{").unwrap();
        assert!(matches!(Authorisations::open(storage), Err(AuthoriseError::Table(TableError::Damaged { .. }))));
    }
}
