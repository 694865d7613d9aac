//! Extents of a segment: where each one's chunk is; tables of them on disk, in pages that prove themselves.

use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::Arc;

use tidemark_base::chunk::{ChunkHash, ChunkKey, Opener, UnverifiedChunk};
use tidemark_base::extent::Sliced;
use tidemark_base::storage::StorageFile;
use tidemark_base::{Extent, ExtentMap, Timestamp};

use super::error::ReadError;
use super::segment::Fields;
use crate::view::cache::{BlockCache, FileNumber};

/// `Place::raw_at` of an extent that reads as zeroes.
pub const ZEROES: u32 = u32::MAX;
pub const ENTRY_BYTES: usize = 40;
pub const COMMIT_ENTRY_BYTES: usize = 32;
/// Divisible by all entries' sizes: these two, and those of merged indexes.
pub const PAGE_BYTES: usize = 16_320;
const _: () = assert!(
    PAGE_BYTES.is_multiple_of(ENTRY_BYTES)
        && PAGE_BYTES.is_multiple_of(COMMIT_ENTRY_BYTES)
        && PAGE_BYTES.is_multiple_of(48)
);

/// Where an extent's data is: in the chunk at `chunk_at` of the segment's file, from `raw_at` of the chunk's raw data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    pub chunk_at: u64,
    pub sealed_bytes: u32,
    pub raw_at: u32,
    /// The front of the chunk's hash.
    pub check: u64,
}

impl Place {
    pub fn is_zeroes(&self) -> bool {
        self.raw_at == ZEROES
    }
}

impl Sliced for Place {
    fn slice(&self, skip: u64) -> Self {
        match self.raw_at {
            ZEROES => *self,
            // An extent with data is at most a chunk long.
            raw_at => Place { raw_at: raw_at + skip as u32, ..*self },
        }
    }
}

pub fn check_of(hash: &ChunkHash) -> u64 {
    u64::from_le_bytes(hash[..8].try_into().expect("eight bytes"))
}

/// What is found by its place on the disk in a sorted table.
pub trait Located: Copy {
    const BYTES: usize;

    fn encode(&self, out: &mut Vec<u8>);

    /// # Panics
    /// Unless there are [`Located::BYTES`].
    fn decode(bytes: &[u8]) -> Self;

    fn extent(&self) -> Extent;
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    pub extent: Extent,
    pub place: Place,
}

impl Located for Entry {
    const BYTES: usize = ENTRY_BYTES;

    fn encode(&self, out: &mut Vec<u8>) {
        for number in [self.extent.offset, self.extent.length, self.place.chunk_at] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&self.place.sealed_bytes.to_le_bytes());
        out.extend_from_slice(&self.place.raw_at.to_le_bytes());
        out.extend_from_slice(&self.place.check.to_le_bytes());
    }

    fn decode(bytes: &[u8]) -> Self {
        let mut fields = Fields(bytes);
        let mut next = || fields.u64().expect("40 bytes");
        let extent = Extent::new(next(), next());
        let (chunk_at, sizes, check) = (next(), next(), next());
        Self { extent, place: Place { chunk_at, sealed_bytes: sizes as u32, raw_at: (sizes >> 32) as u32, check } }
    }

    fn extent(&self) -> Extent {
        self.extent
    }
}

pub mod commit_flags {
    /// The low bits are the cut's kind; none for a cut that was lost.
    pub const KIND: u64 = 7;
    pub const MARK: u64 = 8;
    pub const KEEP: u64 = 16;
    pub const DAMAGED: u64 = 32;
    pub const APPLICATION: u64 = 64;
}

/// What the index says of a cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CommitEntry {
    pub time: Timestamp,
    /// The commit's frame in the file; 0 for a cut that was lost.
    pub commit_at: u64,
    /// Log entries up to the end of this cut.
    pub log_end: u64,
    pub flags: u64,
}

impl CommitEntry {
    pub fn encode(&self, out: &mut Vec<u8>) {
        for number in [self.time.0, self.commit_at, self.log_end, self.flags] {
            out.extend_from_slice(&number.to_le_bytes());
        }
    }

    /// # Panics
    /// Unless there are [`COMMIT_ENTRY_BYTES`].
    pub fn decode(bytes: &[u8]) -> Self {
        let mut fields = Fields(bytes);
        let mut next = || fields.u64().expect("32 bytes");
        Self { time: Timestamp(next()), commit_at: next(), log_end: next(), flags: next() }
    }
}

/// A file opened for reading, as the cache and messages name it.
pub struct IndexFile {
    pub file: Arc<dyn StorageFile>,
    pub number: FileNumber,
    pub name: String,
}

impl IndexFile {
    pub fn bytes(&self) -> Result<u64, ReadError> {
        self.file.bytes().map_err(|source| ReadError::Io { file: self.name.clone(), source })
    }

    pub fn read(&self, at: u64, bytes: usize) -> Result<Vec<u8>, ReadError> {
        let mut buffer = vec![0; bytes];
        match self.file.read_at(at, &mut buffer) {
            Ok(()) => Ok(buffer),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                Err(ReadError::damaged(&self.name, format!("ends before byte {}", at + bytes as u64)))
            }
            Err(source) => Err(ReadError::Io { file: self.name.clone(), source }),
        }
    }
}

/// A segment's file as readers need it: chunks, each verified, through the shared cache.
pub struct SegmentFile {
    pub source: IndexFile,
    pub key: ChunkKey,
    pub disk_bytes: u64,
}

impl Deref for SegmentFile {
    type Target = IndexFile;

    fn deref(&self) -> &IndexFile {
        &self.source
    }
}

impl SegmentFile {
    /// The raw data of the chunk at `place`, every byte of it proven.
    pub fn chunk(&self, place: &Place, extent: Extent, cache: &BlockCache) -> Result<Arc<Vec<u8>>, ReadError> {
        if let Some(raw) = cache.get(self.number, place.chunk_at) {
            return Ok(raw);
        }
        let raw = Arc::new(self.verified(place, extent)?);
        cache.put(self.number, place.chunk_at, raw.clone());
        Ok(raw)
    }

    /// As [`SegmentFile::chunk`], past the cache.
    pub fn verified(&self, place: &Place, extent: Extent) -> Result<Vec<u8>, ReadError> {
        let damaged = |what: String| ReadError::Damaged {
            file: self.name.clone(),
            extent: Some(extent),
            what: format!("the chunk at {} for {extent}: {what}", place.chunk_at),
        };
        let sealed = self.read(place.chunk_at, place.sealed_bytes as usize)?;
        let (chunk, rest) = UnverifiedChunk::split(&sealed).map_err(|error| damaged(error.to_string()))?;
        if !rest.is_empty() || check_of(&chunk.claimed_hash()) != place.check {
            return Err(damaged("another chunk is in its place".to_owned()));
        }
        Opener::with_local(|opener| match chunk.verify(&self.key, self.disk_bytes, opener) {
            Ok(chunk) => Ok(chunk.data.to_vec()),
            Err(error) => Err(damaged(error.to_string())),
        })
    }

    /// Fills `buffer` with the data of `extent`, which begins at `place`.
    pub fn read_extent(
        &self,
        extent: Extent,
        place: &Place,
        buffer: &mut [u8],
        cache: &BlockCache,
    ) -> Result<(), ReadError> {
        if place.is_zeroes() {
            buffer.fill(0);
            return Ok(());
        }
        let raw = self.chunk(place, extent, cache)?;
        let from = place.raw_at as usize;
        match raw.get(from..from + buffer.len()) {
            Some(data) => buffer.copy_from_slice(data),
            None => {
                return Err(ReadError::damaged(&self.name, format!("the index points outside a chunk for {extent}")));
            }
        }
        Ok(())
    }
}

/// Entries of one width in pages of [`PAGE_BYTES`], in a sealed segment.
#[derive(Clone, Debug, Default)]
pub struct Table {
    pub at: u64,
    pub entries: u64,
    pub width: usize,
    pub page_hashes: Vec<[u8; 16]>,
}

impl Table {
    pub fn pages(entries: u64, width: usize) -> u64 {
        (entries * width as u64).div_ceil(PAGE_BYTES as u64)
    }

    pub fn per_page(&self) -> u64 {
        (PAGE_BYTES / self.width) as u64
    }

    /// The page, proven; the last one may be short.
    pub fn page(&self, page: u64, file: &IndexFile, cache: &BlockCache) -> Result<Arc<Vec<u8>>, ReadError> {
        let at = self.at + page * PAGE_BYTES as u64;
        if let Some(bytes) = cache.get(file.number, at) {
            return Ok(bytes);
        }
        let bytes = Arc::new(self.read_page(page, file)?);
        cache.put(file.number, at, bytes.clone());
        Ok(bytes)
    }

    /// As [`Table::page`], past the cache.
    pub fn read_page(&self, page: u64, file: &IndexFile) -> Result<Vec<u8>, ReadError> {
        let at = self.at + page * PAGE_BYTES as u64;
        let total = self.entries * self.width as u64;
        let length = (total - page * PAGE_BYTES as u64).min(PAGE_BYTES as u64) as usize;
        let bytes = file.read(at, length)?;
        if page_hash(&bytes, at) != self.page_hashes[page as usize] {
            return Err(ReadError::damaged(&file.name, format!("the index page at {at} is damaged")));
        }
        Ok(bytes)
    }

    pub fn with_entry<T>(
        &self,
        index: u64,
        file: &IndexFile,
        cache: &BlockCache,
        decode: impl FnOnce(&[u8]) -> T,
    ) -> Result<T, ReadError> {
        let page = self.page(index / self.per_page(), file, cache)?;
        let from = (index % self.per_page()) as usize * self.width;
        Ok(decode(&page[from..from + self.width]))
    }
}

/// A table in order of place, whose entries do not overlap, with the first offset of each page.
pub struct Sorted<E> {
    pub table: Table,
    fences: Vec<u64>,
    entry: PhantomData<fn() -> E>,
}

impl<E: Located> Sorted<E> {
    pub fn new(table: Table, fences: Vec<u64>) -> Self {
        Self { table, fences, entry: PhantomData }
    }

    fn entry(&self, index: u64, file: &IndexFile, cache: &BlockCache) -> Result<E, ReadError> {
        self.table.with_entry(index, file, cache, E::decode)
    }

    /// The number of the first entry that ends after `offset`.
    fn after(&self, offset: u64, file: &IndexFile, cache: &BlockCache) -> Result<u64, ReadError> {
        // The entry that holds `offset` is on the last page whose fence is not after it, or the next page begins with what follows.
        let page = self.fences.partition_point(|&fence| fence <= offset).saturating_sub(1) as u64;
        let start = page * self.table.per_page();
        let (mut low, mut high) = (start, (start + self.table.per_page()).min(self.table.entries));
        if low == high {
            return Ok(low);
        }
        // Fetched once: each look at it would ask the cache again.
        let content = self.table.page(page, file, cache)?;
        while low < high {
            let middle = low + (high - low) / 2;
            let at = (middle - start) as usize * E::BYTES;
            if E::decode(&content[at..at + E::BYTES]).extent().end() <= offset {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Ok(low)
    }

    /// The first entry at or after `offset` that is wanted, and its part from there on.
    pub fn first_from(
        &self,
        offset: u64,
        file: &IndexFile,
        cache: &BlockCache,
        wanted: impl Fn(&E) -> bool,
    ) -> Result<Option<(E, Extent)>, ReadError> {
        for index in self.after(offset, file, cache)?..self.table.entries {
            let entry = self.entry(index, file, cache)?;
            if wanted(&entry) {
                let extent = entry.extent();
                let skip = offset.saturating_sub(extent.offset);
                return Ok(Some((entry, Extent::new(extent.offset + skip, extent.length - skip))));
            }
        }
        Ok(None)
    }

    /// The entries that overlap `within`, in order, each with its part inside.
    pub fn overlapping(
        &self,
        within: Extent,
        file: &IndexFile,
        cache: &BlockCache,
        found: &mut dyn FnMut(E, Extent),
    ) -> Result<(), ReadError> {
        for index in self.after(within.offset, file, cache)?..self.table.entries {
            let entry = self.entry(index, file, cache)?;
            let Some(part) = entry.extent().intersection(&within) else { break };
            found(entry, part);
        }
        Ok(())
    }

    /// All entries in order, past the cache.
    pub fn cursor<'a>(&'a self, file: &'a IndexFile) -> Cursor<'a, E> {
        Cursor { sorted: self, file, page: Vec::new(), at: 0, next_page: 0 }
    }
}

/// Goes through a sorted table once, a page in memory.
pub struct Cursor<'a, E> {
    sorted: &'a Sorted<E>,
    file: &'a IndexFile,
    page: Vec<u8>,
    at: usize,
    next_page: u64,
}

impl<E: Located> Cursor<'_, E> {
    pub fn next(&mut self) -> Result<Option<E>, ReadError> {
        if self.at == self.page.len() {
            if self.next_page == Table::pages(self.sorted.table.entries, E::BYTES) {
                return Ok(None);
            }
            self.page = self.sorted.table.read_page(self.next_page, self.file)?;
            (self.at, self.next_page) = (0, self.next_page + 1);
        }
        let entry = E::decode(&self.page[self.at..self.at + E::BYTES]);
        self.at += E::BYTES;
        Ok(Some(entry))
    }
}

pub fn page_hash(page: &[u8], at: u64) -> [u8; 16] {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&at.to_le_bytes());
    blake3::keyed_hash(&key, page).as_bytes()[..16].try_into().expect("16 bytes")
}

/// The newest entry for every byte: later ones of `entries` replace earlier ones.
pub fn flatten<'a>(entries: impl IntoIterator<Item = &'a Entry>) -> ExtentMap<Place> {
    let mut map = ExtentMap::new();
    entries.into_iter().for_each(|entry| map.insert(entry.extent, entry.place));
    map
}
