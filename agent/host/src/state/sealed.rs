//! A small state file that is rewritten in place: two slots, checksummed and numbered.
//!
//! *Consistency.* The newest slot that verifies is the content. A store goes into the other slot, so the newest one is never
//! touched. Both slots are written when the file is made, so that no later store needs room: a folder that something
//! else fills to the last byte does not stop it. *Retries.* After a failed store the same slot is written again, through a
//! newly opened file, because a failed sync proves nothing about the one before. *Cancellation.* Every call runs to its end.
//! *Crash.* In a store, see FORMAT.md: the old content or the new one, never a mix and never neither.

use std::io;
use std::marker::PhantomData;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tidemark_base::storage::{OpenMode, Storage, StorageFile, remove_if_there};

const MAGIC: &[u8; 8] = b"TMSTATE1";
const HEADER_BYTES: usize = 48;
const CHECKSUM_BYTES: usize = 16;

/// A state file that holds a `T` as JSON. One at a time is open for a name.
pub struct SealedFile<T> {
    storage: Arc<dyn Storage>,
    name: String,
    slot_bytes: usize,
    /// None after a failed store, until the next one.
    file: Option<Arc<dyn StorageFile>>,
    /// The number in the newest slot that is known to be durable; 0 before the first store.
    count: u64,
    of: PhantomData<fn(T) -> T>,
}

fn file_bytes(slot_bytes: usize) -> u64 {
    2 * slot_bytes as u64
}

/// Where the slot with a number lies.
fn offset(slot_bytes: usize, count: u64) -> u64 {
    (count % 2) * slot_bytes as u64
}

/// BLAKE3 over the file's name and what follows the checksum: a slot of another file does not verify.
fn checksum(name: &str, content: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(name.as_bytes()).update(&[0]).update(content);
    hasher.finalize().as_bytes()[..CHECKSUM_BYTES].try_into().expect("sixteen bytes")
}

fn encode(name: &str, count: u64, json: &[u8], slot_bytes: usize) -> io::Result<Vec<u8>> {
    if HEADER_BYTES + json.len() > slot_bytes {
        let what = format!("{name} would have {} bytes, at most {} fit", json.len(), slot_bytes - HEADER_BYTES);
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    let mut slot = vec![0; HEADER_BYTES];
    slot[16..24].copy_from_slice(MAGIC);
    slot[24..32].copy_from_slice(&count.to_le_bytes());
    slot[32..40].copy_from_slice(&(json.len() as u64).to_le_bytes());
    slot.extend_from_slice(json);
    let sum = checksum(name, &slot[CHECKSUM_BYTES..]);
    slot[..CHECKSUM_BYTES].copy_from_slice(&sum);
    Ok(slot)
}

/// Number and JSON of a slot, when it is whole and one of this file.
fn decode<'a>(name: &str, slot: &'a [u8]) -> Option<(u64, &'a [u8])> {
    let word = |at: usize| u64::from_le_bytes(slot[at..at + 8].try_into().expect("eight bytes"));
    if slot.len() < HEADER_BYTES || &slot[16..24] != MAGIC {
        return None;
    }
    let end = usize::try_from(word(32)).ok()?.checked_add(HEADER_BYTES).filter(|end| *end <= slot.len())?;
    let is_sound = slot[..CHECKSUM_BYTES] == checksum(name, &slot[CHECKSUM_BYTES..end]) && word(24) > 0;
    is_sound.then(|| (word(24), &slot[HEADER_BYTES..end]))
}

impl<T: Serialize + for<'de> Deserialize<'de>> SealedFile<T> {
    /// Opens what an earlier session left, or makes the file. The content is `None` when there is none, or when neither slot
    /// verifies. `slot_bytes` is a multiple of 4096 and the same each time.
    pub fn open(storage: Arc<dyn Storage>, name: &str, slot_bytes: usize) -> io::Result<(Self, Option<T>)> {
        debug_assert!(slot_bytes.is_multiple_of(4096));
        let mut this = Self { storage, name: name.to_owned(), slot_bytes, file: None, count: 0, of: PhantomData };
        let found = this.read()?;
        let content = found.as_ref().and_then(|(_, json)| serde_json::from_slice(json).ok());
        // A slot that verifies is kept from being overwritten first, whatever is in it.
        this.count = found.map_or(0, |(count, _)| count);
        this.make()?;
        Ok((this, content))
    }

    /// What is there, without making anything.
    pub fn peek(storage: &Arc<dyn Storage>, name: &str, slot_bytes: usize) -> io::Result<Option<T>> {
        let (storage, name) = (storage.clone(), name.to_owned());
        let this = Self { storage, name, slot_bytes, file: None, count: 0, of: PhantomData };
        Ok(this.read()?.and_then(|(_, json)| serde_json::from_slice(&json).ok()))
    }

    fn read(&self) -> io::Result<Option<(u64, Vec<u8>)>> {
        if !self.storage.exists(&self.name)? {
            return Ok(None);
        }
        let file = self.storage.open(&self.name, OpenMode::Read)?;
        if file.bytes()? != file_bytes(self.slot_bytes) {
            return Ok(None);
        }
        let mut slots: [Option<(u64, Vec<u8>)>; 2] = [None, None];
        let mut content = vec![0; self.slot_bytes];
        for (place, slot) in slots.iter_mut().enumerate() {
            // A sector that cannot be read is as bad as a torn one; the other slot may be sound.
            if file.read_at((place * self.slot_bytes) as u64, &mut content).is_ok() {
                *slot = decode(&self.name, &content)
                    .filter(|(count, _)| (count % 2) as usize == place || tidemark_base::sabotage::is("state-slot"))
                    .map(|(count, json)| (count, json.to_vec()));
            }
        }
        Ok(slots.into_iter().flatten().max_by_key(|(count, _)| *count))
    }

    /// A file of exactly the right size whose blocks are all there. What the newest slot holds stays.
    fn make(&mut self) -> io::Result<()> {
        let bytes = file_bytes(self.slot_bytes);
        let file = self.storage.open(&self.name, OpenMode::OpenOrCreate)?;
        if file.bytes()? != bytes {
            file.set_bytes(0)?;
            file.write_at(0, &vec![0; bytes as usize])?;
            file.sync()?;
            self.storage.sync_folder("")?;
        }
        self.file = Some(file);
        Ok(())
    }

    /// Durable when it returns. After an error the content before holds, or this one.
    pub fn store(&mut self, content: &T) -> io::Result<()> {
        let json = serde_json::to_vec(content).map_err(io::Error::other)?;
        let count = self.count + 1;
        let slot = encode(&self.name, count, &json, self.slot_bytes)?;
        let file = match self.file.take() {
            Some(file) => file,
            None => self.storage.open(&self.name, OpenMode::ReadWrite)?,
        };
        let place = if tidemark_base::sabotage::is("state-slot") { 0 } else { count };
        file.write_at(offset(self.slot_bytes, place), &slot)?;
        file.sync()?;
        self.file = Some(file);
        self.count = count;
        Ok(())
    }

    /// Where the file is looked for from now on.
    #[cfg(test)]
    pub fn set_storage(&mut self, storage: Arc<dyn Storage>) {
        (self.storage, self.file) = (storage, None);
    }

    /// Forgets the file. Durable when it succeeds; one that was removed already, and perhaps not durably, is removed again.
    pub fn remove(&self) -> io::Result<()> {
        remove_if_there(&*self.storage, &self.name)?;
        self.storage.sync_folder("")
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::tests::memory::MemoryStorage;
    use tidemark_base::storage::RealStorage;

    const SLOT_BYTES: usize = 4096;

    type File = SealedFile<Vec<String>>;

    fn content(number: usize) -> Vec<String> {
        // Long enough for several sectors, and of another length each time.
        vec![format!("content {number} "); 40 + number * 7]
    }

    fn open(storage: &Arc<dyn Storage>) -> (File, Option<Vec<String>>) {
        File::open(storage.clone(), "state", SLOT_BYTES).unwrap()
    }

    /// A power cut brings a file back whose removal was not synced.
    #[test]
    fn a_removal_that_could_not_be_synced_is_tried_again() {
        let memory = MemoryStorage::new();
        let (mut file, _) = open(&memory.storage());
        file.store(&content(1)).unwrap();
        memory.stop_at(2);
        file.remove().unwrap_err();
        memory.go_on();
        file.remove().unwrap();
        assert!((0..16).all(|seed| !memory.content_after_power_loss(seed).contains_key("state")));
    }

    #[test]
    fn what_was_stored_last_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        let (mut file, found) = open(&storage);
        assert_eq!(found, None);
        for number in 0..5 {
            file.store(&content(number)).unwrap();
            assert_eq!(open(&storage).1, Some(content(number)));
        }
        assert_eq!(File::peek(&storage, "state", SLOT_BYTES).unwrap(), Some(content(4)));
        assert_eq!(File::peek(&storage, "absent", SLOT_BYTES).unwrap(), None);
        assert_eq!(storage.list("").unwrap(), ["state"]);
        // Under another name it is another file.
        std::fs::copy(folder.path().join("state"), folder.path().join("copy")).unwrap();
        assert_eq!(File::peek(&storage, "copy", SLOT_BYTES).unwrap(), None);
        let too_long = vec!["x".repeat(SLOT_BYTES)];
        assert_eq!(file.store(&too_long).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(open(&storage).1, Some(content(4)));
        file.remove().unwrap();
        // Under Wine what is open goes when it is closed.
        drop(file);
        assert_eq!(open(&storage).1, None);
    }

    /// Stopped at each operation, killed or without power: the content before or the one after, and the next store works.
    #[test]
    fn a_crash_at_every_operation_leaves_the_old_or_the_new_content() {
        for number in 1..4 {
            let mut operations = 0;
            loop {
                operations += 1;
                let memory = MemoryStorage::new();
                let (mut file, _) = open(&memory.storage());
                for earlier in 0..number {
                    file.store(&content(earlier)).unwrap();
                }
                memory.stop_at(operations);
                let result = file.store(&content(number));
                let has_stopped = memory.has_stopped();
                let mut states = vec![memory.content()];
                states.extend((0..32).map(|seed| memory.content_after_power_loss(seed)));
                for state in &states {
                    let after = MemoryStorage::with(state).storage();
                    let (mut again, found) = open(&after);
                    let found = found.expect("one of them is there");
                    assert!(found == content(number) || (result.is_err() && found == content(number - 1)));
                    again.store(&content(9)).unwrap();
                    assert_eq!(open(&after).1, Some(content(9)));
                }
                if !has_stopped {
                    break;
                }
                // And in the same run, once the fault is over.
                memory.go_on();
                file.store(&content(8)).unwrap();
                assert_eq!(open(&memory.storage()).1, Some(content(8)));
            }
            assert_eq!(operations, 3, "a write and a sync");
        }
    }

    /// Whatever prefix of the new slot reached the media, byte by byte, over what the slot held before.
    #[test]
    pub(crate) fn a_store_torn_at_every_byte_leaves_the_content_before() {
        let memory = MemoryStorage::new();
        let (mut file, _) = open(&memory.storage());
        for number in 0..4 {
            file.store(&content(number)).unwrap();
        }
        let before = memory.content()["state"].clone();
        file.store(&content(4)).unwrap();
        let after = memory.content()["state"].clone();
        let changed: Vec<usize> = (0..before.len()).filter(|&at| before[at] != after[at]).collect();
        let (first, last) = (changed[0], changed[changed.len() - 1]);
        for torn in first..=last {
            for is_prefix in [true, false] {
                let mut bytes = before.clone();
                let part = if is_prefix { first..torn } else { torn + 1..last + 1 };
                bytes[part.clone()].copy_from_slice(&after[part]);
                let state = [("state".to_owned(), bytes)].into();
                let found = File::peek(&MemoryStorage::with(&state).storage(), "state", SLOT_BYTES).unwrap();
                assert_eq!(found, Some(content(3)), "torn at byte {torn}");
            }
        }
    }

    #[test]
    fn each_flipped_bit_of_the_newest_slot_is_found() {
        let memory = MemoryStorage::new();
        let (mut file, _) = open(&memory.storage());
        file.store(&content(0)).unwrap();
        file.store(&vec!["short".to_owned()]).unwrap();
        let sound = memory.content()["state"].clone();
        let used = HEADER_BYTES + serde_json::to_vec(&vec!["short"]).unwrap().len();
        for bit in 0..used * 8 {
            let mut bytes = sound.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let state = [("state".to_owned(), bytes)].into();
            let found = File::peek(&MemoryStorage::with(&state).storage(), "state", SLOT_BYTES).unwrap();
            assert_eq!(found, Some(content(0)), "bit {bit}");
        }
    }

    #[test]
    fn a_failed_sync_is_not_believed_later() {
        let memory = MemoryStorage::new();
        let (mut file, _) = open(&memory.storage());
        file.store(&content(0)).unwrap();
        memory.fail_syncs(true);
        assert!(file.store(&content(1)).is_err());
        assert!(file.store(&content(2)).is_err());
        memory.fail_syncs(false);
        // The slot that is known to be durable was never touched.
        for seed in 0..32 {
            let state = memory.content_after_power_loss(seed);
            let found = File::peek(&MemoryStorage::with(&state).storage(), "state", SLOT_BYTES).unwrap().unwrap();
            assert!(found == content(0) || found == content(2), "{found:?}");
        }
        file.store(&content(3)).unwrap();
        assert_eq!(open(&memory.storage()).1, Some(content(3)));
    }
}
