//! The change id of a disk, on durable media: see the crate's own page.
//!
//! *Consistency.* The file is replaced as a whole. *Retries.* None: a store that failed leaves the older id, which tells more changes and no fewer.
//! *Cancellation.* Every call runs to its end. *Crash.* The old content or the new one.

use std::io;

use serde::{Deserialize, Serialize};
use tidemark_base::DiskId;
use tidemark_base::storage::{Storage, read_with_digest, replace_with_digest};

use crate::changes::ChangeId;

const FILE_BYTES_MAX: u64 = 16 << 10;

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kept {
    pub disk: DiskId,
    pub machine_uuid: String,
    pub disk_uuid: String,
    pub disk_bytes: u64,
    change_id: String,
    session: Option<String>,
}

impl Kept {
    pub fn new(disk: DiskId, machine_uuid: &str, disk_uuid: &str, disk_bytes: u64, change_id: &ChangeId) -> Self {
        Self {
            disk,
            machine_uuid: machine_uuid.to_owned(),
            disk_uuid: disk_uuid.to_owned(),
            disk_bytes,
            change_id: change_id.to_string(),
            session: None,
        }
    }

    pub fn change_id(&self) -> Option<ChangeId> {
        ChangeId::parse(&self.change_id)
    }

    pub fn set_change_id(&mut self, id: &ChangeId) {
        self.change_id = id.to_string();
    }

    pub fn session(&self) -> Option<[u8; 16]> {
        let session = self.session.as_deref().filter(|session| session.len() == 32)?;
        Some(u128::from_str_radix(session, 16).ok()?.to_be_bytes())
    }

    pub fn set_session(&mut self, session: Option<[u8; 16]>) {
        self.session = session.map(|session| format!("{:032x}", u128::from_be_bytes(session)));
    }

    /// `None`: there is none, or nothing that can be trusted.
    pub fn read(storage: &dyn Storage, disk: DiskId) -> io::Result<Option<Self>> {
        let json = read_with_digest(storage, &disk.to_string(), FILE_BYTES_MAX)?;
        let kept: Option<Self> = json.and_then(|json| serde_json::from_str(&json).ok());
        Ok(kept.filter(|kept| kept.disk == disk && kept.change_id().is_some()))
    }

    /// Durable when it returns.
    pub fn store(&self, storage: &dyn Storage) -> io::Result<()> {
        replace_with_digest(storage, &self.disk.to_string(), &(serde_json::to_string(self)? + "\n"))
    }

    pub fn remove(storage: &dyn Storage, disk: DiskId) -> io::Result<()> {
        let name = disk.to_string();
        if storage.exists(&name)? {
            storage.remove(&name)?;
            storage.sync_folder("")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tidemark_base::storage::{OpenMode, RealStorage, read_file};

    use super::*;

    #[test]
    fn a_change_id_is_read_back_and_never_a_damaged_one() {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::create(folder.path().join("vsphere")).unwrap();
        let disk = DiskId::random();
        assert_eq!(Kept::read(&*storage, disk).unwrap(), None);
        let mut kept = Kept::new(disk, "m", "d", 4096, &ChangeId::parse("52 0a/7").unwrap());
        kept.set_session(Some([9; 16]));
        kept.store(&*storage).unwrap();
        let read = Kept::read(&*storage, disk).unwrap().unwrap();
        assert_eq!((&read, read.session()), (&kept, Some([9; 16])));
        assert_eq!(read.change_id(), ChangeId::parse("52 0a/7"));
        let name = disk.to_string();
        let whole = read_file(&*storage, &name, FILE_BYTES_MAX).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            storage.open(&name, OpenMode::ReadWrite).unwrap().write_at(0, &damaged).unwrap();
            assert_eq!(Kept::read(&*storage, disk).unwrap(), None, "byte {at}");
        }
        kept.store(&*storage).unwrap();
        // Another disk's.
        let other = DiskId::random();
        storage.rename(&name, &other.to_string()).unwrap();
        assert_eq!(Kept::read(&*storage, other).unwrap(), None);
        Kept::remove(&*storage, other).unwrap();
        assert!(!storage.exists(&other.to_string()).unwrap());
    }
}
