//! A small table in one file, as it is in memory: what must survive a restart and is changed rarely.
//!
//! The file is one line of 64 hexadecimal digits (BLAKE3 of the rest), then JSON with a version.
//!
//! *Consistency.* The file first, then memory: what is read here is durable. One writer at a time. *Retries.* A failed change
//! changes nothing and may be repeated. *Cancellation.* None: a change is one replacement. *Crash.* The file is replaced
//! atomically: the old content or the new.

use std::io;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tidemark_base::storage::{Storage, read_file, replace_file};
use tidemark_base::sync::{Mutex, MutexGuard};

const FILE_BYTES_MAX: u64 = 64 << 20;
const VERSION: u32 = 1;

#[derive(Debug, thiserror::Error)]
pub enum TableError {
    #[error("a table cannot be read or written")]
    Store(#[from] io::Error),
    #[error("{path} is damaged: {reason}")]
    Damaged { path: String, reason: String },
}

impl TableError {
    pub fn help(&self) -> &'static str {
        match self {
            TableError::Store(_) => "check the process server's volume (free room, kernel log)",
            TableError::Damaged { .. } => {
                "move the file away; the configuration server says again what was in it when it connects"
            }
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Document<T> {
    version: u32,
    content: T,
}

pub struct Table<T> {
    storage: Arc<dyn Storage>,
    name: &'static str,
    content: Mutex<T>,
    /// One writer of the file at a time.
    writing: Mutex<()>,
}

impl<T: Clone + Default + PartialEq + Serialize + DeserializeOwned> Table<T> {
    /// Reads the file; a missing one is an empty table, a damaged one is not.
    pub fn open(storage: Arc<dyn Storage>, name: &'static str) -> Result<Self, TableError> {
        let content = if storage.exists(name)? { load(&*storage, name)? } else { T::default() };
        Ok(Self { storage, name, content: Mutex::new(content), writing: Mutex::new(()) })
    }

    /// As [`Table::open`]; a damaged file is an empty table, and the second value says what was wrong with it.
    pub fn open_or_forget(storage: Arc<dyn Storage>, name: &'static str) -> Result<(Self, Option<String>), TableError> {
        match Self::open(storage.clone(), name) {
            Ok(table) => Ok((table, None)),
            Err(error @ TableError::Damaged { .. }) => {
                let table = Self { storage, name, content: Mutex::default(), writing: Mutex::new(()) };
                Ok((table, Some(error.to_string())))
            }
            Err(error) => Err(error),
        }
    }

    pub fn read<R>(&self, read: impl FnOnce(&T) -> R) -> R {
        read(&self.content())
    }

    pub fn all(&self) -> T {
        self.content().clone()
    }

    /// Changes the table; durable when this returns. Returns whether anything changed. Blocks.
    pub fn change<E: From<TableError>>(&self, change: impl FnOnce(&mut T) -> Result<(), E>) -> Result<bool, E> {
        let _writing = self.writing.lock().expect("no panic while held");
        let mut next = self.all();
        change(&mut next)?;
        if next == *self.content() {
            return Ok(false);
        }
        store(&*self.storage, self.name, &next)?;
        *self.content() = next;
        Ok(true)
    }

    /// Reads the file again. What is wrong with it is returned, and it is written again from memory.
    pub fn check(&self) -> Result<(), TableError> {
        let _writing = self.writing.lock().expect("no panic while held");
        let content = self.all();
        if !self.storage.exists(self.name)? && content == T::default() {
            return Ok(());
        }
        let damaged = |reason: String| TableError::Damaged { path: self.path(), reason };
        let wrong = match load::<T>(&*self.storage, self.name) {
            Ok(found) if found == content => return Ok(()),
            Ok(_) => damaged("it does not hold what was written to it".to_owned()),
            Err(TableError::Store(error)) if error.kind() == io::ErrorKind::NotFound => {
                damaged("it is gone".to_owned())
            }
            Err(error) => error,
        };
        store(&*self.storage, self.name, &content)?;
        Err(wrong)
    }

    pub fn path(&self) -> String {
        self.storage.path(self.name).display().to_string()
    }

    fn content(&self) -> MutexGuard<'_, T> {
        self.content.lock().expect("no panic while held")
    }
}

fn store<T: Serialize>(storage: &dyn Storage, name: &str, content: &T) -> Result<(), TableError> {
    let document = Document { version: VERSION, content };
    Ok(replace_file(storage, name, seal(&document)?.as_bytes())?)
}

fn load<T: DeserializeOwned>(storage: &dyn Storage, name: &str) -> Result<T, TableError> {
    let damaged = |reason: String| TableError::Damaged { path: storage.path(name).display().to_string(), reason };
    let bytes = read_file(storage, name, FILE_BYTES_MAX)?;
    let document: Document<T> = unseal(&bytes).map_err(damaged)?;
    if document.version != VERSION {
        return Err(damaged(format!("version {} is not known", document.version)));
    }
    Ok(document.content)
}

/// A line with the hash of the JSON, then the JSON.
pub fn seal(document: &impl Serialize) -> io::Result<String> {
    let json = serde_json::to_string_pretty(document).map_err(io::Error::other)?;
    Ok(format!("{}\n{json}\n", blake3::hash(json.as_bytes()).to_hex()))
}

/// The other way; `Err` says what is wrong. Every bit of the file counts.
pub fn unseal<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "not a text".to_owned())?;
    let (digest, json) = text.split_once('\n').ok_or("no line with a hash")?;
    let json = json.strip_suffix('\n').ok_or("cut short")?;
    if blake3::hash(json.as_bytes()).to_hex().as_str() != digest {
        return Err("its hash does not hold".to_owned());
    }
    serde_json::from_str(json).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemark_base::storage::{OpenMode, RealStorage};

    type Numbers = std::collections::BTreeMap<String, u64>;

    fn put(table: &Table<Numbers>, key: &str, number: u64) -> Result<bool, TableError> {
        table.change(|numbers| {
            numbers.insert(key.to_owned(), number);
            Ok(())
        })
    }

    #[test]
    fn a_table_survives_and_every_bit_of_its_file_counts() {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        let table = Table::<Numbers>::open(storage.clone(), "numbers").unwrap();
        assert!(put(&table, "one", 1).unwrap());
        assert!(!put(&table, "one", 1).unwrap(), "saying the same again changes nothing");
        let refused = table.change(|_| Err(TableError::Store(io::Error::other("no"))));
        assert!(refused.is_err() && table.all().len() == 1);
        assert_eq!(Table::<Numbers>::open(storage.clone(), "numbers").unwrap().all(), table.all());
        let good = read_file(&*storage, "numbers", 1000).unwrap();
        for bit in 0..good.len() * 8 {
            let mut damaged = good.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let file = storage.open("numbers", OpenMode::ReadWrite).unwrap();
            file.write_at(0, &damaged).unwrap();
            assert!(Table::<Numbers>::open(storage.clone(), "numbers").is_err(), "bit {bit}");
            if bit % 64 == 0 {
                // While the server runs memory knows better, and the file is made whole.
                assert!(matches!(table.check(), Err(TableError::Damaged { .. })));
                assert!(table.check().is_ok());
            }
        }
    }
}
