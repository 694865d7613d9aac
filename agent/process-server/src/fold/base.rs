//! The base: a plain sparse image of the disk at one cut, and a sum for every block of it.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::unistd::Whence;
use tidemark_base::disk::{Allocation, is_zero};
use tidemark_base::storage::{OpenMode, Storage, StorageFile};
use tidemark_base::sync::{RwLock, RwLockReadGuard};
use tidemark_base::{DiskId, Extent};

use crate::journal::ReadError;

pub const BLOCK_BYTES: u64 = 4096;
pub const SUM_BYTES: u64 = 16;
pub const DATA_NAME: &str = "base.raw";
pub const SUMS_NAME: &str = "base.sums";
/// The most that is read under one hold of the lock.
const PIECE_BLOCKS: u64 = 64;
/// How far a simulated file, which cannot seek to data, is searched for the end of a run.
const SEARCH_BLOCKS: u64 = 4096;

pub type Sum = [u8; SUM_BYTES as usize];
/// The sum of a block that was never written: it reads as zeroes.
pub const NO_SUM: Sum = [0; SUM_BYTES as usize];

/// A whole block to be written: its number and content; `None` makes it read as zeroes.
pub struct Block {
    pub number: u64,
    pub data: Option<Vec<u8>>,
}

/// The two files. A file whose sync failed takes no more writes until it is opened again.
struct Files {
    data: Arc<dyn StorageFile>,
    sums: Arc<dyn StorageFile>,
}

impl Files {
    fn open(storage: &dyn Storage, disk_bytes: u64, write: bool) -> Result<Self, ReadError> {
        let mode = if write { OpenMode::ReadWrite } else { OpenMode::Read };
        let open = |name: &str, bytes: u64| {
            let path = storage.path(name).display().to_string();
            let io = |source| ReadError::Io { file: path.clone(), source };
            let file = storage.open(name, mode).map_err(io)?;
            let found = file.bytes().map_err(io)?;
            // A crash came between the base and the manifest of a replica that was growing: nothing is there but zeroes.
            if found > bytes && write {
                file.set_bytes(bytes).and_then(|()| file.sync()).map_err(io)?;
            } else if found < bytes {
                return Err(ReadError::damaged(&path, format!("it has {found} bytes and should have {bytes}")));
            }
            Ok(file)
        };
        Ok(Self {
            data: open(DATA_NAME, disk_bytes)?,
            sums: open(SUMS_NAME, disk_bytes.div_ceil(BLOCK_BYTES) * SUM_BYTES)?,
        })
    }

    fn zero_run(&self, first: u64, end: u64, disk_bytes: u64) -> io::Result<()> {
        let (from, to) = (first * BLOCK_BYTES, (end * BLOCK_BYTES).min(disk_bytes));
        punch(&*self.data, from, to - from)?;
        punch(&*self.sums, first * SUM_BYTES, (end - first) * SUM_BYTES)
    }

    fn sync(&self) -> io::Result<()> {
        self.data.sync()?;
        self.sums.sync()
    }
}

pub struct BaseStore {
    name: String,
    key: [u8; 32],
    /// Only grows.
    disk_bytes: AtomicU64,
    /// Held for writing while a block and its sum differ, so that no reader takes that for damage.
    files: RwLock<Files>,
    /// A write or a sync failed: what was written since the last sync is written again, through files opened anew.
    failed: AtomicBool,
    /// Blocks of a fold that was cut short, when they may not be written back (offline inspection).
    overlay: BTreeMap<u64, Vec<u8>>,
}

impl BaseStore {
    /// Makes an empty base; durable once the caller synced the folder.
    pub fn create(storage: &dyn Storage, disk_bytes: u64) -> io::Result<()> {
        for (name, bytes) in [(DATA_NAME, disk_bytes), (SUMS_NAME, disk_bytes.div_ceil(BLOCK_BYTES) * SUM_BYTES)] {
            let file = storage.open(name, OpenMode::OpenOrCreate)?;
            file.set_bytes(0)?;
            file.set_bytes(bytes)?;
            file.sync()?;
        }
        Ok(())
    }

    pub fn open(storage: &dyn Storage, disk: DiskId, disk_bytes: u64, write: bool) -> Result<Self, ReadError> {
        Ok(Self {
            files: RwLock::new(Files::open(storage, disk_bytes, write)?),
            failed: AtomicBool::new(false),
            name: storage.path(DATA_NAME).display().to_string(),
            key: blake3::derive_key("tidemark 2026-11 sum of a base block", disk.as_bytes()),
            disk_bytes: AtomicU64::new(disk_bytes),
            overlay: BTreeMap::new(),
        })
    }

    /// Makes room for a disk that grew, durably: its new end reads as zeroes. The old size is of whole blocks.
    pub fn grow(&self, disk_bytes: u64) -> io::Result<()> {
        let files = self.files.write().expect("no panic while held");
        let grown = files
            .data
            .set_bytes(disk_bytes)
            .and_then(|()| files.sums.set_bytes(disk_bytes.div_ceil(BLOCK_BYTES) * SUM_BYTES))
            .and_then(|()| files.sync());
        self.note(grown)?;
        self.disk_bytes.store(disk_bytes, Ordering::Release);
        Ok(())
    }

    /// After a failure: opens the files anew, when that is needed. The fold that was at work begins its step again.
    pub fn reopen(&self, storage: &dyn Storage) -> Result<(), ReadError> {
        if self.failed.load(Ordering::Acquire) {
            *self.files.write().expect("no panic while held") = Files::open(storage, self.disk_bytes(), true)?;
            self.failed.store(false, Ordering::Release);
        }
        Ok(())
    }

    fn reading(&self) -> RwLockReadGuard<'_, Files> {
        self.files.read().expect("no panic while held")
    }

    fn note<T>(&self, result: io::Result<T>) -> io::Result<T> {
        if result.is_err() {
            self.failed.store(true, Ordering::Release);
        }
        result
    }

    /// The data's file, as messages name it.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn disk_bytes(&self) -> u64 {
        self.disk_bytes.load(Ordering::Acquire)
    }

    pub fn blocks(&self) -> u64 {
        self.disk_bytes().div_ceil(BLOCK_BYTES)
    }

    pub fn allocated_bytes(&self) -> io::Result<u64> {
        self.reading().data.allocated_bytes()
    }

    pub fn set_overlay(&mut self, blocks: impl IntoIterator<Item = (u64, Vec<u8>)>) {
        self.overlay.extend(blocks);
    }

    /// Bound to the disk and the block's place. The last block of a disk may be short; it is summed as it is.
    pub fn sum(&self, number: u64, data: &[u8]) -> Sum {
        let mut key = self.key;
        key[..8].iter_mut().zip(number.to_le_bytes()).for_each(|(byte, other)| *byte ^= other);
        blake3::keyed_hash(&key, data).as_bytes()[..SUM_BYTES as usize].try_into().expect("16 bytes")
    }

    fn block_bytes(&self, number: u64) -> usize {
        (self.disk_bytes() - number * BLOCK_BYTES).min(BLOCK_BYTES) as usize
    }

    fn io(&self, source: io::Error) -> ReadError {
        ReadError::Io { file: self.name.clone(), source }
    }

    /// Reads blocks `first…` into `buffer` and proves each.
    fn read_blocks(&self, first: u64, count: u64, buffer: &mut Vec<u8>) -> Result<(), ReadError> {
        let bytes = (self.disk_bytes() - first * BLOCK_BYTES).min(count * BLOCK_BYTES) as usize;
        buffer.resize(bytes, 0);
        let mut sums = vec![0; (count * SUM_BYTES) as usize];
        {
            let files = self.reading();
            files.sums.read_at(first * SUM_BYTES, &mut sums).map_err(|error| self.io(error))?;
            files.data.read_at(first * BLOCK_BYTES, buffer).map_err(|error| self.io(error))?;
        }
        for ((number, sum), block) in
            (first..).zip(sums.chunks_exact(SUM_BYTES as usize)).zip(buffer.chunks_mut(BLOCK_BYTES as usize))
        {
            if let Some(data) = self.overlay.get(&number) {
                block.copy_from_slice(data);
                continue;
            }
            // A block without a sum must be zeroes: a lost page of sums is damage, not a hole.
            let holds = if *sum == NO_SUM { is_zero(block) } else { self.sum(number, block) == *sum };
            if !holds {
                let extent = Extent::new(number * BLOCK_BYTES, block.len() as u64);
                return Err(ReadError::Damaged {
                    file: self.name.clone(),
                    extent: Some(extent),
                    what: format!("the block at {extent} is damaged"),
                });
            }
        }
        Ok(())
    }

    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
        let end = offset + buffer.len() as u64;
        let mut at = offset;
        let mut piece = Vec::new();
        while at < end {
            let first = at / BLOCK_BYTES;
            let count = (end.div_ceil(BLOCK_BYTES) - first).min(PIECE_BLOCKS);
            self.read_blocks(first, count, &mut piece)?;
            let until = (first * BLOCK_BYTES + piece.len() as u64).min(end);
            let skip = (at - first * BLOCK_BYTES) as usize;
            let length = (until - at) as usize;
            buffer[(at - offset) as usize..][..length].copy_from_slice(&piece[skip..skip + length]);
            at = until;
        }
        Ok(())
    }

    /// One whole block, proven.
    pub fn block(&self, number: u64) -> Result<Vec<u8>, ReadError> {
        let mut data = Vec::new();
        self.read_blocks(number, 1, &mut data)?;
        Ok(data)
    }

    /// Writes whole blocks with their sums. Not durable until [`BaseStore::sync`].
    pub fn write_blocks(&self, blocks: &[Block]) -> io::Result<()> {
        let files = self.files.write().expect("no panic while held");
        self.note(self.write_runs(&files, blocks))
    }

    fn write_runs(&self, files: &Files, blocks: &[Block]) -> io::Result<()> {
        let mut run: Vec<u8> = Vec::new();
        let mut sums: Vec<u8> = Vec::new();
        let mut run_start = 0;
        let flush = |start: u64, run: &mut Vec<u8>, sums: &mut Vec<u8>| -> io::Result<()> {
            if !run.is_empty() {
                files.data.write_at(start * BLOCK_BYTES, run)?;
                files.sums.write_at(start * SUM_BYTES, sums)?;
                run.clear();
                sums.clear();
            }
            Ok(())
        };
        for block in blocks {
            let next = run_start + sums.len() as u64 / SUM_BYTES;
            let data = block.data.as_deref().filter(|data| !is_zero(data));
            if data.is_none() || block.number != next || run.len() >= 1 << 20 {
                flush(run_start, &mut run, &mut sums)?;
                run_start = block.number;
            }
            match data {
                Some(data) => {
                    debug_assert_eq!(data.len(), self.block_bytes(block.number));
                    run.extend_from_slice(data);
                    sums.extend_from_slice(&self.sum(block.number, data));
                }
                None => files.zero_run(block.number, block.number + 1, self.disk_bytes())?,
            }
        }
        flush(run_start, &mut run, &mut sums)
    }

    /// Makes whole blocks `first..end` read as zeroes, and gives their room back.
    pub fn zero_blocks(&self, first: u64, end: u64) -> io::Result<()> {
        let files = self.files.write().expect("no panic while held");
        self.note(files.zero_run(first, end, self.disk_bytes()))
    }

    pub fn sync(&self) -> io::Result<()> {
        let files = self.reading();
        self.note(files.sync())
    }

    /// The run of one kind at `offset`, up to `end`.
    pub fn allocation(&self, offset: u64, end: u64) -> Result<(u64, Allocation), ReadError> {
        if let Some((length, kind)) = self.seek(offset, end).map_err(|error| self.io(error))? {
            return Ok((length, kind));
        }
        let first = offset / BLOCK_BYTES;
        let count = (end.div_ceil(BLOCK_BYTES) - first).min(SEARCH_BLOCKS);
        let mut sums = vec![0; (count * SUM_BYTES) as usize];
        self.reading().sums.read_at(first * SUM_BYTES, &mut sums).map_err(|error| self.io(error))?;
        let is_hole = |sum: &[u8]| *sum == NO_SUM;
        let kind = is_hole(&sums[..SUM_BYTES as usize]);
        let run = sums.chunks_exact(SUM_BYTES as usize).take_while(|sum| is_hole(sum) == kind).count() as u64;
        let length = ((first + run) * BLOCK_BYTES).min(end) - offset;
        Ok((length, if kind { Allocation::Hole } else { Allocation::Data }))
    }

    /// The end of the run at `offset` that must read as zeroes because nothing is there; `offset` when something is. A
    /// file without a map of its holes is read everywhere.
    pub fn nothing_until(&self, offset: u64) -> Result<u64, ReadError> {
        if offset >= self.disk_bytes() {
            return Ok(offset);
        }
        match self.seek(offset, self.disk_bytes()).map_err(|error| self.io(error))? {
            Some((length, Allocation::Hole)) => Ok(offset + length),
            _ => Ok(offset),
        }
    }

    fn seek(&self, offset: u64, end: u64) -> io::Result<Option<(u64, Allocation)>> {
        let files = self.reading();
        let Some(file) = files.data.as_file().filter(|_| self.overlay.is_empty()) else { return Ok(None) };
        let seek = |whence| match nix::unistd::lseek(file.as_fd(), offset as i64, whence) {
            Ok(at) => Ok(at as u64),
            Err(nix::Error::ENXIO) => Ok(end),
            Err(error) => Err(io::Error::from(error)),
        };
        let data = seek(Whence::SeekData)?.min(end);
        if data > offset {
            return self.hole_with_sums(&*files.sums, offset, data).map(Some);
        }
        Ok(Some((seek(Whence::SeekHole)?.clamp(offset + 1, end) - offset, Allocation::Data)))
    }

    /// A hole ends where a block has a sum: that block's data was lost, and whoever reads it must learn so.
    fn hole_with_sums(&self, sums_file: &dyn StorageFile, offset: u64, end: u64) -> io::Result<(u64, Allocation)> {
        let hole = (end - offset, Allocation::Hole);
        let Some(file) = sums_file.as_file() else { return Ok(hole) };
        let mut number = offset / BLOCK_BYTES;
        while number * BLOCK_BYTES < end {
            number = match nix::unistd::lseek(file.as_fd(), (number * SUM_BYTES) as i64, Whence::SeekData) {
                Ok(at) => at as u64 / SUM_BYTES,
                Err(nix::Error::ENXIO) => return Ok(hole),
                Err(error) => return Err(error.into()),
            };
            // Sums lie in file-system blocks: most of one that holds any may be unused.
            let count = (self.blocks().saturating_sub(number)).min(SEARCH_BLOCKS);
            let mut sums = vec![0; (count * SUM_BYTES) as usize];
            sums_file.read_at(number * SUM_BYTES, &mut sums)?;
            match sums.chunks_exact(SUM_BYTES as usize).position(|sum| *sum != NO_SUM) {
                Some(index) => {
                    let lost = (number + index as u64) * BLOCK_BYTES;
                    return Ok(if lost <= offset {
                        ((lost + BLOCK_BYTES).min(end) - offset, Allocation::Data)
                    } else {
                        (lost.min(end) - offset, Allocation::Hole)
                    });
                }
                None => number += count.max(1),
            }
        }
        Ok(hole)
    }
}

/// Punches a hole; where the file system cannot, writes zeroes.
fn punch(file: &dyn StorageFile, offset: u64, length: u64) -> io::Result<()> {
    match file.punch_hole(offset, length) {
        Err(error) if matches!(tidemark_base::storage::os_error(&error), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => {
            let zeroes = vec![0; length.min(1 << 20) as usize];
            let mut at = offset;
            while at < offset + length {
                let part = (offset + length - at).min(zeroes.len() as u64);
                file.write_at(at, &zeroes[..part as usize])?;
                at += part;
            }
            Ok(())
        }
        result => result,
    }
}
