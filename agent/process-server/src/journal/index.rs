//! Extents of a segment: where each one's chunk is; tables of them on disk, in pages that prove themselves.

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
/// Divisible by both entries' sizes.
pub const PAGE_BYTES: usize = 16_320;
const _: () = assert!(PAGE_BYTES.is_multiple_of(ENTRY_BYTES) && PAGE_BYTES.is_multiple_of(COMMIT_ENTRY_BYTES));

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

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    pub extent: Extent,
    pub place: Place,
}

impl Entry {
    pub fn encode(&self, out: &mut Vec<u8>) {
        for number in [self.extent.offset, self.extent.length, self.place.chunk_at] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&self.place.sealed_bytes.to_le_bytes());
        out.extend_from_slice(&self.place.raw_at.to_le_bytes());
        out.extend_from_slice(&self.place.check.to_le_bytes());
    }

    /// # Panics
    /// Unless there are [`ENTRY_BYTES`].
    pub fn decode(bytes: &[u8]) -> Self {
        let mut fields = Fields(bytes);
        let mut next = || fields.u64().expect("40 bytes");
        let extent = Extent::new(next(), next());
        let (chunk_at, sizes, check) = (next(), next(), next());
        Self { extent, place: Place { chunk_at, sealed_bytes: sizes as u32, raw_at: (sizes >> 32) as u32, check } }
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

/// A segment's file as readers need it: chunks, each verified, through the shared cache.
pub struct SegmentFile {
    pub file: Arc<dyn StorageFile>,
    pub number: FileNumber,
    pub name: String,
    pub key: ChunkKey,
    pub disk_bytes: u64,
}

impl SegmentFile {
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

    /// The raw data of the chunk at `place`, every byte of it proven.
    pub fn chunk(&self, place: &Place, extent: Extent, cache: &BlockCache) -> Result<Arc<Vec<u8>>, ReadError> {
        if let Some(raw) = cache.get(self.number, place.chunk_at) {
            return Ok(raw);
        }
        let raw = Arc::new(self.verified(place, extent)?);
        cache.put(self.number, place.chunk_at, raw.clone());
        Ok(raw)
    }

    fn verified(&self, place: &Place, extent: Extent) -> Result<Vec<u8>, ReadError> {
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
    pub fn page(&self, page: u64, segment: &SegmentFile, cache: &BlockCache) -> Result<Arc<Vec<u8>>, ReadError> {
        let at = self.at + page * PAGE_BYTES as u64;
        if let Some(bytes) = cache.get(segment.number, at) {
            return Ok(bytes);
        }
        let total = self.entries * self.width as u64;
        let length = (total - page * PAGE_BYTES as u64).min(PAGE_BYTES as u64) as usize;
        let bytes = segment.read(at, length)?;
        if page_hash(&bytes, at) != self.page_hashes[page as usize] {
            return Err(ReadError::damaged(&segment.name, format!("the index page at {at} is damaged")));
        }
        let bytes = Arc::new(bytes);
        cache.put(segment.number, at, bytes.clone());
        Ok(bytes)
    }

    pub fn with_entry<T>(
        &self,
        index: u64,
        segment: &SegmentFile,
        cache: &BlockCache,
        decode: impl FnOnce(&[u8]) -> T,
    ) -> Result<T, ReadError> {
        let page = self.page(index / self.per_page(), segment, cache)?;
        let from = (index % self.per_page()) as usize * self.width;
        Ok(decode(&page[from..from + self.width]))
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
