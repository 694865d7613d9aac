//! Change ids, and what of a machine is ours, on durable media: see the crate's own page.
//!
//! *Consistency.* A file is replaced as a whole. *Retries.* None: a store that failed leaves the older id, which tells more changes and no fewer.
//! *Cancellation.* Every call runs to its end. *Crash.* The old content or the new one.

use std::io;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tidemark_base::DiskId;
use tidemark_base::storage::{Storage, read_with_digest, remove_if_there, replace_with_digest};

const FILE_BYTES_MAX: u64 = 1 << 20;

/// Of one disk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kept {
    pub disk: DiskId,
    pub machine: String,
    pub disk_uuid: String,
    pub disk_bytes: u64,
    /// Empty: none yet.
    pub change_id: String,
    session: Option<String>,
}

/// Of one machine: which checkpoints and reference points were made by us. Each is noted before it is made, by what was there then, so that one is
/// found that nobody heard of.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ours {
    pub machine: String,
    /// A checkpoint is being made, and these were there before.
    pub checkpoints_before: Option<Vec<String>>,
    pub checkpoint: Option<String>,
    /// A checkpoint is being converted, and these were there before.
    pub reference_points_before: Option<Vec<String>>,
    pub reference_points: Vec<String>,
}

impl Kept {
    pub fn new(disk: DiskId, machine: &str, disk_uuid: &str, disk_bytes: u64, change_id: &str) -> Self {
        Self {
            disk,
            machine: machine.to_owned(),
            disk_uuid: disk_uuid.to_owned(),
            disk_bytes,
            change_id: change_id.to_owned(),
            session: None,
        }
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
        let kept: Option<Self> = read(storage, &disk.to_string())?;
        Ok(kept.filter(|kept| kept.disk == disk && !kept.change_id.is_empty()))
    }

    /// Of every disk of a machine, also of those that are not tracked now.
    pub fn all_of(storage: &dyn Storage, machine: &str) -> io::Result<Vec<Self>> {
        let names = storage.list("")?;
        let disks = names.iter().filter_map(|name| name.parse::<DiskId>().ok());
        let kept = disks.filter_map(|disk| Self::read(storage, disk).transpose());
        Ok(kept.collect::<io::Result<Vec<_>>>()?.into_iter().filter(|kept| kept.machine == machine).collect())
    }

    /// Durable when it returns.
    pub fn store(&self, storage: &dyn Storage) -> io::Result<()> {
        store(storage, &self.disk.to_string(), self)
    }

    pub fn remove(storage: &dyn Storage, disk: DiskId) -> io::Result<()> {
        remove_if_there(storage, &disk.to_string())?;
        storage.sync_folder("")
    }
}

impl Ours {
    /// Of a machine that nothing is known of, where the file is absent or damaged: what was ours then stays.
    pub fn read(storage: &dyn Storage, machine: &str) -> io::Result<Self> {
        let ours: Option<Self> = read(storage, &name_of(machine))?;
        let none = || Self { machine: machine.to_owned(), ..Self::default() };
        Ok(ours.filter(|ours| ours.machine == machine).unwrap_or_else(none))
    }

    /// Durable when it returns.
    pub fn store(&self, storage: &dyn Storage) -> io::Result<()> {
        if self.is_nothing() {
            remove_if_there(storage, &name_of(&self.machine))?;
            return storage.sync_folder("");
        }
        store(storage, &name_of(&self.machine), self)
    }

    fn is_nothing(&self) -> bool {
        *self == Self { machine: self.machine.clone(), ..Self::default() }
    }
}

/// Ids come from outside: nothing but their letters and digits goes into a name.
fn name_of(machine: &str) -> String {
    let plain: String = machine.chars().filter(|letter| letter.is_ascii_alphanumeric() || *letter == '-').collect();
    format!("machine-{}", plain.to_ascii_lowercase())
}

fn read<T: DeserializeOwned>(storage: &dyn Storage, name: &str) -> io::Result<Option<T>> {
    let json = read_with_digest(storage, name, FILE_BYTES_MAX)?;
    Ok(json.and_then(|json| serde_json::from_str(&json).ok()))
}

fn store<T: Serialize>(storage: &dyn Storage, name: &str, what: &T) -> io::Result<()> {
    replace_with_digest(storage, name, &(serde_json::to_string(what)? + "\n"))
}

#[cfg(test)]
mod tests {
    use tidemark_base::storage::{OpenMode, RealStorage, read_file};

    use super::*;

    #[test]
    fn a_change_id_is_read_back_and_never_a_damaged_one() {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::create(folder.path().join("rct")).unwrap();
        let disk = DiskId::random();
        assert_eq!(Kept::read(&*storage, disk).unwrap(), None);
        let mut kept = Kept::new(disk, "m", "d", 4096, "rctX:5b:00000001");
        kept.set_session(Some([9; 16]));
        kept.store(&*storage).unwrap();
        let read = Kept::read(&*storage, disk).unwrap().unwrap();
        assert_eq!((&read, read.session()), (&kept, Some([9; 16])));
        let name = disk.to_string();
        let whole = read_file(&*storage, &name, FILE_BYTES_MAX).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            storage.open(&name, OpenMode::ReadWrite).unwrap().write_at(0, &damaged).unwrap();
            assert_eq!(Kept::read(&*storage, disk).unwrap(), None, "byte {at}");
        }
        Kept::new(disk, "m", "d", 4096, "").store(&*storage).unwrap();
        assert_eq!(Kept::read(&*storage, disk).unwrap(), None, "it names no change");
        kept.store(&*storage).unwrap();
        // Another disk's.
        let other = DiskId::random();
        storage.rename(&name, &other.to_string()).unwrap();
        assert_eq!(Kept::read(&*storage, other).unwrap(), None);
        Kept::remove(&*storage, other).unwrap();
        assert!(storage.list("").unwrap().is_empty());
    }

    #[test]
    fn what_is_ours_is_read_back_and_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::create(folder.path().join("rct")).unwrap();
        let mut ours = Ours::read(&*storage, "../F0-1").unwrap();
        ours.store(&*storage).unwrap();
        assert!(storage.list("").unwrap().is_empty());
        ours.checkpoints_before = Some(vec![]);
        ours.reference_points.push("r".into());
        ours.store(&*storage).unwrap();
        assert_eq!(storage.list("").unwrap(), ["machine-f0-1"]);
        assert_eq!(Ours::read(&*storage, "../F0-1").unwrap(), ours);
        assert_eq!(Ours::read(&*storage, "f0-1").unwrap().reference_points.len(), 0, "another machine's");
        (ours.checkpoints_before, ours.reference_points) = (None, vec![]);
        ours.store(&*storage).unwrap();
        assert!(storage.list("").unwrap().is_empty());
    }
}
