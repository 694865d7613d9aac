//! Backups of the configuration that the configuration server has us keep. They are sealed: nobody can read them without the
//! recovery key, and we keep nothing of that but the public half that offline failovers must be signed for.
//!
//! *Consistency.* A backup has its name when all of it came and its digest held. *Retries.* The sender's, from offset 0.
//! *Cancellation.* None. *Crash.* What was not whole is a file that ends in `.part`, which the next backup replaces.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tidemark_base::storage::{OpenMode, Storage, StorageFile};
use tidemark_base::sync::Mutex;
use tidemark_proto::control::{BackupPart, Failure, FailureKind};

use super::{store_failed, table_failed};
use crate::table::Table;

pub const FOLDER: &str = "config-backups";
const PART: &str = "config-backups/incoming.part";
const RECOVERY_FILE: &str = "recovery.json";
/// Of these the newest are kept.
pub const KEPT_MAX: usize = 24;
/// More is no backup of a configuration.
const BYTES_MAX: u64 = 512 << 20;

/// What is known of the installation's recovery key.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Recovery {
    /// Ed25519 public key; absent: no backup came yet.
    pub break_glass: Option<[u8; 32]>,
    /// Names of the backups that are kept, in the order in which they came: the clocks that named them may differ.
    #[serde(default)]
    pub arrived: Vec<String>,
}

pub struct Backups {
    storage: Arc<dyn Storage>,
    recovery: Table<Recovery>,
    incoming: Mutex<Option<Incoming>>,
}

struct Incoming {
    name: String,
    bytes: u64,
    digest: [u8; 32],
    offset: u64,
    hasher: blake3::Hasher,
    file: Arc<dyn StorageFile>,
}

/// The public half of the key that offline failovers must be signed with.
pub fn recovery(storage: Arc<dyn Storage>) -> Result<Recovery, Failure> {
    Ok(Table::open(storage, RECOVERY_FILE).map_err(table_failed)?.all())
}

impl Backups {
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self, Failure> {
        storage.create_folder(FOLDER).map_err(|error| store_failed(&error))?;
        let recovery = Table::open(storage.clone(), RECOVERY_FILE).map_err(table_failed)?;
        Ok(Self { storage, recovery, incoming: Mutex::new(None) })
    }

    /// Takes the next part; the backup is durable when the last one was taken. Blocks.
    pub fn take(&self, part: BackupPart) -> Result<(), Failure> {
        let mut incoming = self.incoming.lock().expect("no panic while held");
        let taken = self.take_next(&mut incoming, &part);
        if taken.is_err() {
            // It begins again from the start.
            *incoming = None;
        }
        taken
    }

    fn take_next(&self, incoming: &mut Option<Incoming>, part: &BackupPart) -> Result<(), Failure> {
        let failed = |error: std::io::Error| store_failed(&error);
        if !is_name(&part.name) {
            let shown: String = part.name.chars().take(80).collect();
            return Err(refused(format!("{shown:?} is no name of a backup")));
        }
        if part.bytes > BYTES_MAX || part.data.is_empty() {
            return Err(refused(format!("a backup of {} bytes, or an empty part of one", part.bytes)));
        }
        let path = format!("{FOLDER}/{}", part.name);
        if part.offset == 0 {
            if self.storage.exists(PART).map_err(failed)? {
                self.storage.remove(PART).map_err(failed)?;
            }
            let file = self.storage.open(PART, OpenMode::Create).map_err(failed)?;
            let (name, bytes, digest) = (part.name.clone(), part.bytes, part.digest);
            *incoming = Some(Incoming { name, bytes, digest, offset: 0, hasher: blake3::Hasher::new(), file });
        }
        let Some(current) = incoming.as_mut() else {
            return Err(refused("a part came without those before it".to_owned()));
        };
        let end = part.offset + part.data.len() as u64;
        let same = current.name == part.name && current.bytes == part.bytes && current.digest == part.digest;
        if !same || current.offset != part.offset || end > current.bytes {
            return Err(refused("a part came out of its order".to_owned()));
        }
        current.file.write_at(part.offset, &part.data).map_err(failed)?;
        current.hasher.update(&part.data);
        current.offset = end;
        if end < current.bytes {
            return Ok(());
        }
        if *current.hasher.finalize().as_bytes() != current.digest {
            return Err(refused("what came is not what was sent".to_owned()));
        }
        current.file.sync().map_err(failed)?;
        self.storage.rename(PART, &path).and_then(|()| self.storage.sync_folder(FOLDER)).map_err(failed)?;
        *incoming = None;
        self.recovery
            .change(|recovery| {
                recovery.break_glass = Some(part.break_glass);
                recovery.arrived.retain(|name| *name != part.name);
                recovery.arrived.push(part.name.clone());
                let surplus = recovery.arrived.len().saturating_sub(KEPT_MAX);
                recovery.arrived.drain(..surplus);
                Ok(())
            })
            .map_err(table_failed)?;
        self.prune().map_err(failed)?;
        tracing::info!(backup = part.name, bytes = part.bytes, "a backup of the configuration is kept");
        Ok(())
    }

    fn prune(&self) -> std::io::Result<()> {
        let mut names = self.storage.list(FOLDER)?;
        names.retain(|name| is_name(name));
        let arrived = self.recovery.all().arrived;
        // Those of before that was noted come first, by their names.
        names.sort_by_key(|name| (arrived.iter().position(|known| known == name).map_or(0, |at| at + 1), name.clone()));
        for name in names.iter().take(names.len().saturating_sub(KEPT_MAX)) {
            self.storage.remove(&format!("{FOLDER}/{name}"))?;
        }
        Ok(())
    }
}

/// `backup-`, twenty digits of a time, `.tidemark`: it becomes a part of a path.
fn is_name(name: &str) -> bool {
    let digits = name.strip_prefix("backup-").and_then(|rest| rest.strip_suffix(".tidemark"));
    digits.is_some_and(|digits| digits.len() == 20 && digits.bytes().all(|digit| digit.is_ascii_digit()))
}

fn refused(what: String) -> Failure {
    Failure::new(FailureKind::BadRequest, format!("the backup is not kept: {what}"), "it is sent again by itself")
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemark_base::storage::RealStorage;

    fn part(number: u64, content: &[u8], range: std::ops::Range<usize>) -> BackupPart {
        BackupPart {
            name: format!("backup-{number:020}.tidemark"),
            offset: range.start as u64,
            bytes: content.len() as u64,
            digest: *blake3::hash(content).as_bytes(),
            data: content[range].to_vec(),
            break_glass: [number as u8; 32],
        }
    }

    #[test]
    fn a_backup_is_kept_when_all_of_it_came_and_the_newest_stay() {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        let backups = Backups::open(storage.clone()).unwrap();
        let content: Vec<u8> = (0..100).collect();
        let listed = || {
            let mut names = storage.list(FOLDER).unwrap();
            names.sort();
            names
        };
        backups.take(part(1, &content, 0..60)).unwrap();
        assert!(!listed().iter().any(|name| is_name(name)), "half a backup is none");
        assert_eq!(recovery(storage.clone()).unwrap().break_glass, None);
        // Cut off, and begun again.
        backups.take(part(1, &content, 0..60)).unwrap();
        backups.take(part(1, &content, 60..100)).unwrap();
        assert_eq!(std::fs::read(folder.path().join(FOLDER).join(&listed()[0])).unwrap(), content);
        assert_eq!(recovery(storage.clone()).unwrap().break_glass, Some([1; 32]));
        for number in 2..KEPT_MAX as u64 + 3 {
            backups.take(part(number, &content, 0..100)).unwrap();
        }
        let names = listed();
        assert_eq!((names.len(), names[0].as_str()), (KEPT_MAX, part(3, &content, 0..1).name.as_str()));
        // Of a configuration server that was restored where the clock is behind: what came last is the newest.
        for number in [1, 2] {
            backups.take(part(number, &content, 0..100)).unwrap();
            let names = listed();
            let is_kept = |number| names.contains(&part(number, &content, 0..1).name);
            assert_eq!((names.len(), is_kept(number), is_kept(number + 2)), (KEPT_MAX, true, false));
        }
    }

    #[test]
    fn what_is_out_of_order_changed_or_of_a_strange_name_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        let backups = Backups::open(storage.clone()).unwrap();
        let content: Vec<u8> = (0..100).collect();
        let refuse = |part: BackupPart| assert_eq!(backups.take(part).unwrap_err().kind, FailureKind::BadRequest);
        refuse(part(1, &content, 60..100));
        backups.take(part(1, &content, 0..60)).unwrap();
        refuse(part(1, &content, 70..100));
        // What was refused ended it: the rest alone is no backup.
        refuse(part(1, &content, 60..100));
        refuse(BackupPart { data: vec![9; 100], ..part(1, &content, 0..100) });
        refuse(BackupPart { bytes: BYTES_MAX + 1, ..part(1, &content, 0..100) });
        refuse(BackupPart { data: Vec::new(), ..part(1, &content, 0..100) });
        backups.take(part(1, &content, 0..60)).unwrap();
        refuse(part(2, &content, 60..100));
        for name in ["../authorisations.json", "incoming.part", "backup-1.tidemark", ""] {
            refuse(BackupPart { name: name.into(), ..part(1, &content, 0..100) });
        }
        assert!(!storage.list(FOLDER).unwrap().iter().any(|name| is_name(name)));
    }
}
