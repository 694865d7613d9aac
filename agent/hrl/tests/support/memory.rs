//! A folder in memory that can stop at its n-th operation, lose power, and fail.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSlice};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use tidemark_base::random::Random;
use tidemark_base::storage::{OpenMode, Storage, StorageFile};

pub type Content = BTreeMap<String, Vec<u8>>;

#[derive(Default)]
struct Folder {
    files: BTreeMap<String, Arc<MemoryFile>>,
    /// The names that survive a power loss.
    durable_names: BTreeMap<String, Arc<MemoryFile>>,
}

/// When to fail: counts writes, syncs and changes of names.
#[derive(Default)]
struct Fuse {
    operations: u64,
    blows_at: Option<u64>,
    syncs_fail: bool,
}

#[derive(Clone, Default)]
pub struct MemoryStorage {
    folder: Arc<Mutex<Folder>>,
    fuse: Arc<Mutex<Fuse>>,
}

struct MemoryFile {
    state: Mutex<FileState>,
    fuse: Arc<Mutex<Fuse>>,
}

#[derive(Default)]
struct FileState {
    content: Vec<u8>,
    durable: Vec<u8>,
}

impl Fuse {
    /// `Err` once it has blown; the operation at which it blows is done in part.
    fn burn(fuse: &Mutex<Self>) -> io::Result<bool> {
        let mut fuse = fuse.lock().unwrap();
        fuse.operations += 1;
        match fuse.blows_at {
            Some(at) if fuse.operations > at => Err(io::Error::other("stopped")),
            Some(at) => Ok(fuse.operations == at),
            None => Ok(false),
        }
    }
}

impl MemoryStorage {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn with(content: &Content) -> Self {
        let this = Self::new();
        for (name, bytes) in content {
            let state = FileState { content: bytes.clone(), durable: bytes.clone() };
            let file = Arc::new(MemoryFile { state: Mutex::new(state), fuse: this.fuse.clone() });
            let mut folder = this.folder.lock().unwrap();
            folder.files.insert(name.clone(), file.clone());
            folder.durable_names.insert(name.clone(), file);
        }
        this
    }

    pub fn storage(&self) -> Arc<dyn Storage> {
        Arc::new(self.clone())
    }

    /// Stops in the middle of the n-th operation from now.
    pub fn stop_at(&self, operations: u64) {
        let mut fuse = self.fuse.lock().unwrap();
        fuse.blows_at = Some(fuse.operations + operations);
    }

    pub fn go_on(&self) {
        self.fuse.lock().unwrap().blows_at = None;
    }

    pub fn has_stopped(&self) -> bool {
        let fuse = self.fuse.lock().unwrap();
        fuse.blows_at.is_some_and(|at| fuse.operations >= at)
    }

    pub fn fail_syncs(&self, fail: bool) {
        self.fuse.lock().unwrap().syncs_fail = fail;
    }

    /// Flips a bit of a file, for whoever has it open as well.
    pub fn flip(&self, name: &str, bit: usize) {
        let file = self.folder.lock().unwrap().files[name].clone();
        file.state.lock().unwrap().content[bit / 8] ^= 1 << (bit % 8);
    }

    /// What another process sees: all that was written.
    pub fn content(&self) -> Content {
        let folder = self.folder.lock().unwrap();
        folder.files.iter().map(|(name, file)| (name.clone(), file.state.lock().unwrap().content.clone())).collect()
    }

    /// What may be left when the power fails: of each file what was synced, with any of the sectors that were written
    /// since, and either length.
    pub fn content_after_power_loss(&self, seed: u64) -> Content {
        let mut random = Random::new(seed);
        let folder = self.folder.lock().unwrap();
        let names = if random.draw().is_multiple_of(2) { &folder.durable_names } else { &folder.files };
        let mut content = Content::new();
        for (name, file) in names {
            let state = file.state.lock().unwrap();
            let length = if random.draw().is_multiple_of(2) { state.content.len() } else { state.durable.len() };
            let mut bytes = state.durable.clone();
            bytes.resize(length, 0);
            for start in (0..length).step_by(512) {
                let end = (start + 512).min(length).min(state.content.len());
                if start < end && random.draw().is_multiple_of(2) {
                    bytes[start..end].copy_from_slice(&state.content[start..end]);
                }
            }
            content.insert(name.clone(), bytes);
        }
        content
    }
}

impl MemoryFile {
    fn put(&self, offset: u64, data: &[u8]) {
        let mut state = self.state.lock().unwrap();
        let end = offset as usize + data.len();
        if state.content.len() < end {
            state.content.resize(end, 0);
        }
        state.content[offset as usize..end].copy_from_slice(data);
    }
}

impl StorageFile for MemoryFile {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let state = self.state.lock().unwrap();
        let part = usize::try_from(offset)
            .ok()
            .and_then(|offset| state.content.get(offset..offset.checked_add(buffer.len())?))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(part);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if Fuse::burn(&self.fuse)? {
            // Sectors are written whole or not at all.
            let cut = (offset + data.len() as u64 * 2 / 3) / 512 * 512;
            self.put(offset, &data[..cut.saturating_sub(offset) as usize]);
            return Err(io::Error::other("stopped"));
        }
        self.put(offset, data);
        Ok(())
    }

    fn write_vectored_at(&self, offset: u64, data: &[IoSlice<'_>]) -> io::Result<()> {
        self.write_at(offset, &data.iter().flat_map(|slice| slice.iter().copied()).collect::<Vec<u8>>())
    }

    fn sync(&self) -> io::Result<()> {
        if Fuse::burn(&self.fuse)? || self.fuse.lock().unwrap().syncs_fail {
            return Err(io::Error::other("sync failed"));
        }
        let mut state = self.state.lock().unwrap();
        state.durable = state.content.clone();
        Ok(())
    }

    fn set_bytes(&self, bytes: u64) -> io::Result<()> {
        if Fuse::burn(&self.fuse)? {
            return Err(io::Error::other("stopped"));
        }
        self.state.lock().unwrap().content.resize(bytes as usize, 0);
        Ok(())
    }

    fn bytes(&self) -> io::Result<u64> {
        Ok(self.state.lock().unwrap().content.len() as u64)
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.bytes()
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        self.put(offset, &vec![0; length as usize]);
        Ok(())
    }

    fn reserve(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }

    fn as_file(&self) -> Option<&File> {
        None
    }
}

impl Storage for MemoryStorage {
    fn open(&self, name: &str, mode: OpenMode) -> io::Result<Arc<dyn StorageFile>> {
        let mut folder = self.folder.lock().unwrap();
        match (folder.files.get(name), mode) {
            (Some(_), OpenMode::Create) => Err(io::ErrorKind::AlreadyExists.into()),
            (Some(file), _) => Ok(file.clone()),
            (None, OpenMode::Read | OpenMode::ReadWrite) => Err(io::ErrorKind::NotFound.into()),
            (None, _) => {
                if Fuse::burn(&self.fuse)? {
                    return Err(io::Error::other("stopped"));
                }
                let file = Arc::new(MemoryFile { state: Mutex::default(), fuse: self.fuse.clone() });
                folder.files.insert(name.to_owned(), file.clone());
                Ok(file)
            }
        }
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        if Fuse::burn(&self.fuse)? {
            return Err(io::Error::other("stopped"));
        }
        let mut folder = self.folder.lock().unwrap();
        let file = folder.files.remove(from).ok_or(io::ErrorKind::NotFound)?;
        folder.files.insert(to.to_owned(), file);
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        if Fuse::burn(&self.fuse)? {
            return Err(io::Error::other("stopped"));
        }
        let removed = self.folder.lock().unwrap().files.remove(name);
        removed.map(drop).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn create_folder(&self, _name: &str) -> io::Result<()> {
        Ok(())
    }

    fn remove_folder(&self, _name: &str) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn list(&self, _folder: &str) -> io::Result<Vec<String>> {
        Ok(self.folder.lock().unwrap().files.keys().cloned().collect())
    }

    fn exists(&self, name: &str) -> io::Result<bool> {
        Ok(self.folder.lock().unwrap().files.contains_key(name))
    }

    fn sync_folder(&self, _folder: &str) -> io::Result<()> {
        if Fuse::burn(&self.fuse)? {
            return Err(io::Error::other("stopped"));
        }
        let mut folder = self.folder.lock().unwrap();
        folder.durable_names = folder.files.clone();
        Ok(())
    }

    fn available_bytes(&self) -> io::Result<u64> {
        Ok(u64::MAX)
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("/memory").join(name)
    }

    fn folder(&self, _name: &str) -> Arc<dyn Storage> {
        self.storage()
    }
}
