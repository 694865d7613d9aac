//! A replica in memory that the targets damage.
//!
//! The parts of the process server that read files are compiled here by themselves: with all of it, the network and its
//! cryptography would be built for each kind of build that fuzzing needs.

#![allow(dead_code)]

#[path = "../../src/fold/mod.rs"]
pub mod fold;
#[path = "../../src/journal/mod.rs"]
pub mod journal;
#[path = "../../src/points/mod.rs"]
pub mod points;
#[path = "../../src/replica/mod.rs"]
pub mod replica;
#[path = "../../src/scrub.rs"]
pub mod scrub;
#[path = "../../src/table.rs"]
mod table;
#[path = "../../src/view/mod.rs"]
pub mod view;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSlice};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use tidemark_base::chunk::{ChunkKey, Compression, Sealer};
use tidemark_base::disk::Disk;
use tidemark_base::storage::{OpenMode, Storage, StorageFile};
use tidemark_base::{DiskId, Epoch, Extent, Generation, HistoryHash, MachineId, MarkId, Position, Sequence, Timestamp};
use tidemark_proto::replication::{Consistency, CutEnd, CutKind, CutOrdinal, Mark};

use crate::journal::Limits;
use crate::replica::{Replica, ReplicaInfo};
use crate::view::cache::BlockCache;

/// Small, because every view reads all of it; the last block of the base is a short one.
pub const DISK_BYTES: u64 = (8 << 10) + 512;

/// Shared by copies of the folder until one of them writes.
type Content = Arc<Mutex<Arc<Vec<u8>>>>;

/// Files in memory.
#[derive(Clone, Default)]
pub struct Memory {
    files: Arc<Mutex<BTreeMap<String, Content>>>,
    prefix: String,
}

impl Memory {
    fn full(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}/{name}", self.prefix) }
    }

    pub fn put(&self, name: &str, content: Vec<u8>) {
        self.files.lock().unwrap().insert(name.to_owned(), Arc::new(Mutex::new(Arc::new(content))));
    }

    pub fn get(&self, name: &str) -> Vec<u8> {
        self.files.lock().unwrap()[name].lock().unwrap().to_vec()
    }

    /// The names of the files that end so.
    pub fn ending_with(&self, end: &str) -> Vec<String> {
        self.files.lock().unwrap().keys().filter(|name| name.ends_with(end)).cloned().collect()
    }

    /// A copy that sees no change of this one.
    pub fn copy(&self) -> Memory {
        let files = self.files.lock().unwrap();
        let copied =
            files.iter().map(|(name, content)| (name.clone(), Arc::new(Mutex::new(content.lock().unwrap().clone()))));
        Memory { files: Arc::new(Mutex::new(copied.collect())), prefix: self.prefix.clone() }
    }
}

impl Storage for Memory {
    fn open(&self, name: &str, mode: OpenMode) -> io::Result<Arc<dyn StorageFile>> {
        let mut files = self.files.lock().unwrap();
        let name = self.full(name);
        let content = match (files.get(&name), mode) {
            (Some(_), OpenMode::Create) => return Err(io::ErrorKind::AlreadyExists.into()),
            (Some(content), _) => content.clone(),
            (None, OpenMode::Create | OpenMode::OpenOrCreate) => files.entry(name).or_default().clone(),
            (None, _) => return Err(io::ErrorKind::NotFound.into()),
        };
        Ok(Arc::new(MemoryFile(content)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut files = self.files.lock().unwrap();
        let content = files.remove(&self.full(from)).ok_or(io::ErrorKind::NotFound)?;
        files.insert(self.full(to), content);
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let removed = self.files.lock().unwrap().remove(&self.full(name));
        removed.map(drop).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn create_folder(&self, _name: &str) -> io::Result<()> {
        Ok(())
    }

    fn remove_folder(&self, name: &str) -> io::Result<()> {
        let prefix = format!("{}/", self.full(name));
        self.files.lock().unwrap().retain(|name, _| !name.starts_with(&prefix));
        Ok(())
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        let prefix = if folder.is_empty() { self.full("") } else { format!("{}/", self.full(folder)) };
        let files = self.files.lock().unwrap();
        let mut names: Vec<String> =
            files.keys().filter_map(|name| Some(name.strip_prefix(&prefix)?.split('/').next()?.to_owned())).collect();
        names.dedup();
        Ok(names)
    }

    fn exists(&self, name: &str) -> io::Result<bool> {
        Ok(self.files.lock().unwrap().contains_key(&self.full(name)))
    }

    fn sync_folder(&self, _folder: &str) -> io::Result<()> {
        Ok(())
    }

    fn available_bytes(&self) -> io::Result<u64> {
        Ok(1 << 40)
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("/memory").join(self.full(name))
    }

    fn folder(&self, name: &str) -> Arc<dyn Storage> {
        Arc::new(Memory { files: self.files.clone(), prefix: self.full(name) })
    }
}

struct MemoryFile(Content);

impl StorageFile for MemoryFile {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let content = self.0.lock().unwrap();
        let start = usize::try_from(offset).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let end = start.checked_add(buffer.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(content.get(start..end).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut content = self.0.lock().unwrap();
        let content = Arc::make_mut(&mut content);
        let end = offset as usize + data.len();
        if content.len() < end {
            content.resize(end, 0);
        }
        content[offset as usize..end].copy_from_slice(data);
        Ok(())
    }

    fn write_vectored_at(&self, offset: u64, data: &[IoSlice<'_>]) -> io::Result<()> {
        self.write_at(offset, &data.iter().flat_map(|slice| slice.iter().copied()).collect::<Vec<u8>>())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn set_bytes(&self, bytes: u64) -> io::Result<()> {
        Arc::make_mut(&mut self.0.lock().unwrap()).resize(bytes as usize, 0);
        Ok(())
    }

    fn bytes(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().len() as u64)
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.bytes()
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        let mut content = self.0.lock().unwrap();
        let content = Arc::make_mut(&mut content);
        let end = ((offset + length) as usize).min(content.len());
        content[(offset as usize).min(end)..end].fill(0);
        Ok(())
    }

    fn reserve(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }

    fn as_file(&self) -> Option<&File> {
        None
    }
}

pub fn info() -> ReplicaInfo {
    ReplicaInfo {
        disk: DiskId::from_bytes([1; 16]),
        machine: MachineId::from_bytes([2; 16]),
        generation: Generation::FIRST,
        disk_bytes: DISK_BYTES,
    }
}

fn position(sequence: u64) -> Position {
    Position {
        epoch: Epoch([7; 16]),
        sequence: Sequence(sequence),
        hash: HistoryHash(if sequence == 0 { Epoch([7; 16]).first_hash().0 } else { [sequence as u8; 32] }),
    }
}

/// A replica of so many cuts, the first and sixth of which have no data and each other one an extent. A segment ends with two cuts, or so
/// many extents.
pub fn damageable(cuts: u64, segment_extents: usize) -> Memory {
    let memory = Memory::default();
    Replica::create(&memory, &info()).unwrap();
    let limits = Limits { segment_cuts: 2, segment_extents, reserve_bytes: 0, ..Limits::default() };
    let replica = Replica::open(Arc::new(memory.clone()), limits, BlockCache::new(1 << 20)).unwrap();
    let session = replica.begin_session(Generation::FIRST, DISK_BYTES).unwrap();
    let mut sealer = Sealer::new(ChunkKey::new(info().disk, Generation::FIRST), Compression::Level(1));
    for cut in 1..=cuts {
        let (kind, chunks) = match cut {
            1 => (CutKind::ScanStart, Vec::new()),
            6 => (CutKind::Records, Vec::new()),
            _ => {
                let extent = Extent::new(cut * 512, 1024);
                let raw: Vec<u8> = (0..1024u32).map(|byte| (byte / 64) as u8 ^ cut as u8).collect();
                let mut sealed = Vec::new();
                sealer.seal(&[extent], &raw, &mut sealed);
                (if cut == 2 { CutKind::ScanEnd } else { CutKind::Records }, sealed)
            }
        };
        let mark = (cut % 3 == 2).then(|| Mark {
            id: MarkId::from_bytes([cut as u8; 16]),
            machine: info().machine,
            disks: vec![info().disk],
            consistency: Consistency::Crash,
            label: "label".to_owned(),
            keep: true,
            time: Timestamp(cut),
            group: false,
        });
        let mut hashes = blake3::Hasher::new();
        let count = u64::from(!chunks.is_empty());
        if count > 0 {
            session.append_chunks(cut, &chunks).unwrap();
            hashes.update(&chunks[16..48]);
        }
        let end = CutEnd {
            cut: CutOrdinal(cut),
            kind,
            from: position(cut.saturating_sub(2)),
            to: position(if cut == 1 { 0 } else { cut - 1 }),
            time: Timestamp(1000 + cut),
            clock_stepped: false,
            chunks: count,
            chunk_bytes: chunks.len() as u64,
            chunks_hash: *hashes.finalize().as_bytes(),
            written_bytes: 512,
            mark,
        };
        session.end_cut(&end).unwrap();
        session.sync().unwrap();
    }
    replica.merge_indexes(&tidemark_base::stop::Stop::new()).unwrap();
    drop(session);
    memory
}

/// Opens what the folder holds, reads the disk at the newest cut and at one that `pick` chooses, and scrubs. Whatever is in
/// it, nothing panics.
pub fn look(memory: &Memory, pick: u8) {
    let Ok(replica) = Replica::open_read_only(Arc::new(memory.clone()), BlockCache::new(1 << 20)) else { return };
    let _ = crate::scrub::folder_report(&replica);
    let mut read = vec![0; replica.disk_bytes().min(DISK_BYTES) as usize];
    let (first, last) = (replica.floor(), replica.durable().cut);
    // What damage does to one cut it does to all that read the same place: a pick is enough, and each comes in turn.
    let cuts = last.saturating_sub(first).saturating_add(1);
    for cut in [last, first.saturating_add(u64::from(pick) % cuts)] {
        if let Ok(view) = replica.view(cut) {
            let _ = view.read_at(0, &mut read);
            let _ = view.allocation(0);
        }
    }
    let _ = replica.marks_after(last.saturating_sub(16));
    let _ = crate::scrub::scrub(&replica, &tidemark_base::stop::Stop::new());
}
