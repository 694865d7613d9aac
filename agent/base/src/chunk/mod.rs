#![doc = include_str!("FORMAT.md")]

use std::cell::RefCell;

use crate::{CHUNK_BYTES_MAX, DiskId, Extent, Generation, SECTOR_BYTES};

pub const HEADER_BYTES: usize = 48;
pub const EXTENT_BYTES: usize = 12;
pub const EXTENTS_MAX: usize = 128;
/// The longest extent: its length in sectors is 32 bits wide.
pub const EXTENT_LENGTH_MAX: u64 = u32::MAX as u64 * SECTOR_BYTES;
/// Where the data of a chunk of one extent begins.
pub const IN_PLACE_AT: usize = HEADER_BYTES + EXTENT_BYTES;
/// The most that one sealed chunk occupies.
pub const SEALED_BYTES_MAX: usize = HEADER_BYTES + EXTENTS_MAX * EXTENT_BYTES + CHUNK_BYTES_MAX;

const VERSION: u8 = 1;
const HASH_AT: usize = 16;
const _: () = assert!(HASH_AT + 32 == HEADER_BYTES && EXTENTS_MAX * SECTOR_BYTES as usize <= CHUNK_BYTES_MAX);

/// What a chunk's hash is bound to.
#[derive(Clone, PartialEq, Eq)]
pub struct ChunkKey([u8; 32]);

impl ChunkKey {
    pub fn new(disk: DiskId, generation: Generation) -> Self {
        let mut context = [0; 24];
        context[..16].copy_from_slice(disk.as_bytes());
        context[16..].copy_from_slice(&generation.0.to_le_bytes());
        Self(blake3::derive_key("tidemark 2026-11 chunk of a disk and generation", &context))
    }
}

pub type ChunkHash = [u8; 32];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Encoding {
    Raw = 0,
    Zstd = 1,
    Zeroes = 2,
}

/// Why bytes are not a chunk of this disk.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ChunkError {
    #[error("a chunk ends after {have} of {need} bytes")]
    Short { have: usize, need: usize },
    #[error("chunk version {0} is not known")]
    Version(u8),
    #[error("a chunk's header contradicts itself: {0}")]
    Malformed(&'static str),
    #[error("extent {0} of a chunk does not lie on the disk")]
    Extent(Extent),
    #[error("a chunk's payload cannot be decompressed")]
    Payload,
    #[error("the hash of the chunk at {0} does not hold: its content, its place or its disk was changed")]
    Hash(Extent),
}

/// How hard to compress.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Compression {
    Off,
    /// A zstd level.
    Level(i32),
}

/// Seals chunks; keeps the compressor's working memory between them. One per thread.
pub struct Sealer {
    key: ChunkKey,
    compression: Compression,
    compressor: Option<zstd::bulk::Compressor<'static>>,
    compressed: Vec<u8>,
}

impl Sealer {
    pub fn new(key: ChunkKey, compression: Compression) -> Self {
        let mut sealer = Self { key, compression: Compression::Off, compressor: None, compressed: Vec::new() };
        sealer.set_compression(compression);
        sealer
    }

    /// Goes on with another disk or generation.
    pub fn set_key(&mut self, key: &ChunkKey) {
        self.key = key.clone();
    }

    pub fn set_compression(&mut self, compression: Compression) {
        if self.compression == compression {
            return;
        }
        self.compression = compression;
        self.compressor = match compression {
            Compression::Off => None,
            Compression::Level(level) => {
                let mut compressor = zstd::bulk::Compressor::new(level).expect("a zstd context can be made");
                // The size is in our header and the hash is stronger than zstd's checksum.
                let _ = compressor.include_contentsize(false);
                let _ = compressor.include_checksum(false);
                Some(compressor)
            }
        };
    }

    /// Appends the sealed chunk of `extents`, whose data is `raw` back to back, to `out`.
    ///
    /// # Panics
    /// When the extents are none, too many, not ascending, not on sectors, or do not add up to `raw`, which is at most
    /// [`CHUNK_BYTES_MAX`]: only a bug of the caller makes them so.
    pub fn seal(&mut self, extents: &[Extent], raw: &[u8], out: &mut Vec<u8>) -> ChunkHash {
        assert!(
            raw.len() <= CHUNK_BYTES_MAX && extents.iter().map(|extent| extent.length).sum::<u64>() == raw.len() as u64
        );
        let start = self.begin(extents, out);
        let hash = hash(&self.key, &out[start + HEADER_BYTES..], raw);
        let (encoding, stored) = match self.compress(raw) {
            Some(compressed) => (Encoding::Zstd, compressed),
            None => (Encoding::Raw, raw),
        };
        out.extend_from_slice(stored);
        let stored = stored.len();
        finish(&mut out[start..], encoding, extents.len(), raw.len(), stored, &hash);
        hash
    }

    /// `None` when that is switched off or not worth it.
    fn compress(&mut self, raw: &[u8]) -> Option<&[u8]> {
        let compressor = self.compressor.as_mut()?;
        if looks_random(raw) {
            return None;
        }
        // Of its own and never cleared, so that nothing is written here but what zstd writes.
        if self.compressed.len() < raw.len() {
            self.compressed.resize(raw.len(), 0);
        }
        // A payload that would not shrink by 1/16 is not worth decompressing later.
        let room = raw.len() - raw.len() / 16;
        let stored = compressor.compress_to_buffer(raw, &mut self.compressed[..room]).ok()?;
        Some(&self.compressed[..stored])
    }

    /// Seals data where it lies: `chunk` is room for what comes before the data of one extent, [`IN_PLACE_AT`] bytes, and
    /// then the data, which stays as it is. For data that is not to be compressed.
    ///
    /// # Panics
    /// When the extent is not as long as the data, not on sectors, or longer than a chunk.
    pub fn seal_in_place(&self, extent: Extent, chunk: &mut [u8]) -> ChunkHash {
        let (head, raw) = chunk.split_at_mut(IN_PLACE_AT);
        assert!(extent.is_valid_on(u64::MAX) && extent.length == raw.len() as u64 && raw.len() <= CHUNK_BYTES_MAX);
        head.fill(0);
        put_extent(&extent, &mut head[HEADER_BYTES..]);
        let hash = hash(&self.key, &head[HEADER_BYTES..], raw);
        finish(head, Encoding::Raw, 1, raw.len(), raw.len(), &hash);
        hash
    }

    /// Appends a chunk that says that `extents` read as zeroes.
    pub fn seal_zeroes(&mut self, extents: &[Extent], out: &mut Vec<u8>) -> ChunkHash {
        let start = self.begin(extents, out);
        let hash = hash(&self.key, &out[start + HEADER_BYTES..], &[]);
        finish(&mut out[start..], Encoding::Zeroes, extents.len(), 0, 0, &hash);
        hash
    }

    fn begin(&self, extents: &[Extent], out: &mut Vec<u8>) -> usize {
        assert!((1..=EXTENTS_MAX).contains(&extents.len()));
        assert!(extents.windows(2).all(|pair| pair[0].end() <= pair[1].offset));
        let start = out.len();
        out.resize(start + HEADER_BYTES, 0);
        for extent in extents {
            assert!(extent.length > 0 && extent.length <= EXTENT_LENGTH_MAX && extent.is_valid_on(u64::MAX));
            let at = out.len();
            out.resize(at + EXTENT_BYTES, 0);
            put_extent(extent, &mut out[at..]);
        }
        start
    }
}

fn put_extent(extent: &Extent, entry: &mut [u8]) {
    entry[..8].copy_from_slice(&extent.offset.to_le_bytes());
    entry[8..].copy_from_slice(&((extent.length / SECTOR_BYTES) as u32).to_le_bytes());
}

fn finish(chunk: &mut [u8], encoding: Encoding, extents: usize, raw: usize, stored: usize, hash: &ChunkHash) {
    chunk[0] = VERSION;
    chunk[1] = encoding as u8;
    chunk[2..4].copy_from_slice(&(extents as u16).to_le_bytes());
    chunk[4..8].copy_from_slice(&(raw as u32).to_le_bytes());
    chunk[8..12].copy_from_slice(&(stored as u32).to_le_bytes());
    chunk[HASH_AT..HEADER_BYTES].copy_from_slice(hash);
}

fn hash(key: &ChunkKey, table: &[u8], raw: &[u8]) -> ChunkHash {
    // Two calls of `update` with 64 KiB between them would keep the hasher from its widest lanes, so the table is
    // hashed by itself and its hash is what the data's key is derived from.
    let table = blake3::keyed_hash(&key.0, table);
    *blake3::keyed_hash(table.as_bytes(), raw).as_bytes()
}

/// Whether a sample's bytes are spread so evenly that compressing is a waste: encrypted, compressed, media.
fn looks_random(raw: &[u8]) -> bool {
    const SAMPLES: usize = 8;
    const SAMPLE_BYTES: usize = 512;
    if raw.len() < SAMPLES * SAMPLE_BYTES {
        return false;
    }
    let mut counts = [0u32; 256];
    let stride = (raw.len() - SAMPLE_BYTES) / (SAMPLES - 1);
    for sample in 0..SAMPLES {
        for &byte in &raw[sample * stride..][..SAMPLE_BYTES] {
            counts[byte as usize] += 1;
        }
    }
    // 4096 uniform bytes give 69,632 on average with a deviation of about 360; text gives several 100,000.
    counts.iter().map(|&count| u64::from(count) * u64::from(count)).sum::<u64>() < 74_000
}

/// Bytes that claim to be a chunk: lengths hold, nothing else was checked.
#[derive(Clone, Copy)]
pub struct UnverifiedChunk<'a> {
    encoding: Encoding,
    raw_bytes: usize,
    table: &'a [u8],
    stored: &'a [u8],
    hash: &'a [u8],
}

impl<'a> UnverifiedChunk<'a> {
    /// Takes the chunk at the front of `bytes`; returns it and what is behind it.
    pub fn split(bytes: &'a [u8]) -> Result<(Self, &'a [u8]), ChunkError> {
        let need =
            |need: usize| if bytes.len() < need { Err(ChunkError::Short { have: bytes.len(), need }) } else { Ok(()) };
        need(HEADER_BYTES)?;
        if bytes[0] != VERSION {
            return Err(ChunkError::Version(bytes[0]));
        }
        let encoding = match bytes[1] {
            0 => Encoding::Raw,
            1 => Encoding::Zstd,
            2 => Encoding::Zeroes,
            _ => return Err(ChunkError::Malformed("unknown encoding")),
        };
        let extents = usize::from(u16::from_le_bytes([bytes[2], bytes[3]]));
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")) as usize;
        let (raw_bytes, stored_bytes) = (word(4), word(8));
        if !(1..=EXTENTS_MAX).contains(&extents) {
            return Err(ChunkError::Malformed("no extents, or too many"));
        }
        if word(12) != 0 {
            return Err(ChunkError::Malformed("reserved bytes are set"));
        }
        let sizes_hold = match encoding {
            Encoding::Raw => stored_bytes == raw_bytes && raw_bytes > 0,
            Encoding::Zstd => stored_bytes < raw_bytes && stored_bytes > 0,
            Encoding::Zeroes => stored_bytes == 0 && raw_bytes == 0,
        };
        if !sizes_hold || raw_bytes > CHUNK_BYTES_MAX {
            return Err(ChunkError::Malformed("sizes that its encoding does not allow"));
        }
        let payload = HEADER_BYTES + extents * EXTENT_BYTES;
        need(payload + stored_bytes)?;
        let chunk = Self {
            encoding,
            raw_bytes,
            table: &bytes[HEADER_BYTES..payload],
            stored: &bytes[payload..payload + stored_bytes],
            hash: &bytes[HASH_AT..HEADER_BYTES],
        };
        Ok((chunk, &bytes[payload + stored_bytes..]))
    }

    /// How many bytes the chunk occupies.
    pub fn sealed_bytes(&self) -> usize {
        HEADER_BYTES + self.table.len() + self.stored.len()
    }

    /// The hash as the chunk claims it.
    pub fn claimed_hash(&self) -> ChunkHash {
        self.hash.try_into().expect("32 bytes")
    }

    /// Checks everything: extents on the disk and in order, payload, hash.
    pub fn verify(self, key: &ChunkKey, disk_bytes: u64, opener: &'a mut Opener) -> Result<Chunk<'a>, ChunkError> {
        opener.extents.clear();
        let mut end = 0;
        let mut total = 0;
        for entry in self.table.chunks_exact(EXTENT_BYTES) {
            let (offset, sectors) = entry.split_at(8);
            let offset = u64::from_le_bytes(offset.try_into().expect("eight bytes"));
            let sectors = u32::from_le_bytes(sectors.try_into().expect("four bytes"));
            let extent = Extent::new(offset, u64::from(sectors) * SECTOR_BYTES);
            if !extent.is_valid_on(disk_bytes) || extent.offset < end {
                return Err(ChunkError::Extent(extent));
            }
            end = extent.end();
            total += extent.length;
            opener.extents.push(extent);
        }
        if self.encoding != Encoding::Zeroes && total != self.raw_bytes as u64 {
            return Err(ChunkError::Malformed("extents that do not add up to its data"));
        }
        let data: &[u8] = match self.encoding {
            Encoding::Raw | Encoding::Zeroes => self.stored,
            Encoding::Zstd => opener.decompress(self.stored, self.raw_bytes)?,
        };
        if hash(key, self.table, data) != *self.hash && !crate::sabotage::is("chunk-hash") {
            return Err(ChunkError::Hash(opener.extents[0]));
        }
        Ok(Chunk {
            encoding: self.encoding,
            extents: &opener.extents,
            data: if self.encoding == Encoding::Zstd { &opener.raw[..self.raw_bytes] } else { self.stored },
            hash: self.claimed_hash(),
        })
    }
}

/// Opens chunks; keeps buffers between them. One per thread.
pub struct Opener {
    decompressor: zstd::bulk::Decompressor<'static>,
    raw: Vec<u8>,
    extents: Vec<Extent>,
}

impl Opener {
    pub fn new() -> Self {
        let decompressor = zstd::bulk::Decompressor::new().expect("a zstd context can be made");
        Self { decompressor, raw: vec![0; CHUNK_BYTES_MAX], extents: Vec::with_capacity(EXTENTS_MAX) }
    }

    /// Never writes more than `raw_bytes`, whatever the payload unfolds to.
    fn decompress(&mut self, stored: &[u8], raw_bytes: usize) -> Result<&[u8], ChunkError> {
        match self.decompressor.decompress_to_buffer(stored, &mut self.raw[..raw_bytes]) {
            Ok(length) if length == raw_bytes => Ok(&self.raw[..raw_bytes]),
            _ => Err(ChunkError::Payload),
        }
    }

    /// Runs `work` with this thread's own opener.
    pub fn with_local<T>(work: impl FnOnce(&mut Opener) -> T) -> T {
        thread_local!(static OPENER: RefCell<Opener> = RefCell::new(Opener::new()));
        OPENER.with(|opener| work(&mut opener.borrow_mut()))
    }
}

impl Default for Opener {
    fn default() -> Self {
        Self::new()
    }
}

/// A chunk whose every byte was checked.
#[derive(Debug)]
pub struct Chunk<'a> {
    pub encoding: Encoding,
    pub extents: &'a [Extent],
    /// The extents' data back to back; empty for zeroes.
    pub data: &'a [u8],
    pub hash: ChunkHash,
}

impl Chunk<'_> {
    /// Each extent with its data; `None` where it reads as zeroes.
    pub fn parts(&self) -> impl Iterator<Item = (Extent, Option<&[u8]>)> {
        let mut at = 0;
        self.extents.iter().map(move |extent| {
            if self.encoding == Encoding::Zeroes {
                return (*extent, None);
            }
            let data = &self.data[at..at + extent.length as usize];
            at += extent.length as usize;
            (*extent, Some(data))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DISK_BYTES: u64 = 1 << 30;

    fn key() -> ChunkKey {
        ChunkKey::new(DiskId::from_bytes([1; 16]), Generation::FIRST)
    }

    fn sealed(compression: Compression, extents: &[Extent], raw: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        Sealer::new(key(), compression).seal(extents, raw, &mut out);
        out
    }

    fn verify(bytes: &[u8], key: &ChunkKey) -> Result<Vec<(Extent, Option<Vec<u8>>)>, ChunkError> {
        let mut opener = Opener::new();
        let (chunk, rest) = UnverifiedChunk::split(bytes)?;
        assert!(rest.is_empty());
        Ok(chunk
            .verify(key, DISK_BYTES, &mut opener)?
            .parts()
            .map(|(extent, data)| (extent, data.map(<[u8]>::to_vec)))
            .collect())
    }

    proptest! {
        #[test]
        fn what_was_sealed_is_what_is_opened(lengths in prop::collection::vec((1u64..40, 0u64..5), 1..4), seed in any::<u8>(), level in prop::option::of(-3i32..4)) {
            let mut at = 0;
            let extents: Vec<Extent> = lengths.iter().map(|&(sectors, gap)| {
                let extent = Extent::new((at + gap) * 512, sectors * 512);
                at += gap + sectors;
                extent
            }).collect();
            let total: u64 = extents.iter().map(|extent| extent.length).sum();
            let raw: Vec<u8> = (0..total).map(|index| if index % 3 == 0 { seed } else { (index / 700) as u8 }).collect();
            let bytes = sealed(level.map_or(Compression::Off, Compression::Level), &extents, &raw);
            let parts = verify(&bytes, &key()).unwrap();
            prop_assert_eq!(parts.iter().map(|(extent, _)| *extent).collect::<Vec<_>>(), extents);
            prop_assert_eq!(parts.into_iter().flat_map(|(_, data)| data.unwrap()).collect::<Vec<u8>>(), raw);
        }

        #[test]
        fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut opener = Opener::new();
            if let Ok((chunk, _)) = UnverifiedChunk::split(&bytes) {
                let _ = chunk.verify(&key(), DISK_BYTES, &mut opener);
            }
        }
    }

    #[test]
    fn every_changed_bit_is_found() {
        let extents = [Extent::new(4096, 1024), Extent::new(8192, 512)];
        for compression in [Compression::Off, Compression::Level(1)] {
            let bytes = sealed(compression, &extents, &[0x5a; 1536]);
            for bit in 0..bytes.len() * 8 {
                let mut damaged = bytes.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                let opened = std::panic::catch_unwind(|| {
                    let mut opener = Opener::new();
                    let (chunk, rest) = UnverifiedChunk::split(&damaged)?;
                    let parts = chunk.verify(&key(), DISK_BYTES, &mut opener)?;
                    Ok::<_, ChunkError>((rest.len(), parts.data.to_vec()))
                });
                match opened.expect("no panic") {
                    Err(_) => {}
                    // A bit that zstd itself ignores does no harm: the data is proven.
                    Ok((_, data)) => assert_eq!(data, [0x5a; 1536], "bit {bit}"),
                }
            }
        }
    }

    #[test]
    fn what_is_sealed_in_place_is_what_is_sealed() {
        let extent = Extent::new(8192, CHUNK_BYTES_MAX as u64);
        let raw: Vec<u8> = (0..CHUNK_BYTES_MAX).map(|index| (index / 300) as u8).collect();
        let mut chunk = [vec![0xee; IN_PLACE_AT], raw.clone()].concat();
        Sealer::new(key(), Compression::Level(1)).seal_in_place(extent, &mut chunk);
        assert_eq!(chunk, sealed(Compression::Off, &[extent], &raw));
    }

    #[test]
    fn a_chunk_of_another_disk_or_direction_does_not_verify() {
        let bytes = sealed(Compression::Off, &[Extent::new(0, 512)], &[1; 512]);
        for other in [
            ChunkKey::new(DiskId::from_bytes([2; 16]), Generation::FIRST),
            ChunkKey::new(DiskId::from_bytes([1; 16]), Generation(2)),
        ] {
            assert!(matches!(verify(&bytes, &other), Err(ChunkError::Hash(_))));
        }
    }

    #[test]
    fn a_bomb_is_not_unfolded() {
        let mut bytes = sealed(Compression::Level(1), &[Extent::new(0, 65536)], &[0x11; 65536]);
        // It claims 512 bytes and would unfold to 65,536.
        bytes[4..8].copy_from_slice(&512u32.to_le_bytes());
        bytes[56..60].copy_from_slice(&1u32.to_le_bytes());
        assert_eq!(verify(&bytes, &key()), Err(ChunkError::Payload));
        bytes[4..8].copy_from_slice(&(1u32 << 30).to_le_bytes());
        assert!(matches!(verify(&bytes, &key()), Err(ChunkError::Malformed(_))));
    }

    #[test]
    fn zeroes_may_be_longer_than_a_chunk() {
        let mut bytes = Vec::new();
        Sealer::new(key(), Compression::Off).seal_zeroes(&[Extent::new(0, DISK_BYTES)], &mut bytes);
        assert_eq!(bytes.len(), 60);
        assert_eq!(verify(&bytes, &key()).unwrap(), [(Extent::new(0, DISK_BYTES), None)]);
    }

    #[test]
    fn random_data_is_not_compressed_and_text_is() {
        let mut state = 1u64;
        let random: Vec<u8> = (0..65536)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 56) as u8
            })
            .collect();
        assert!(looks_random(&random));
        let text: Vec<u8> =
            b"the quick brown fox jumps over the lazy dog. ".iter().copied().cycle().take(65536).collect();
        assert!(!looks_random(&text));
        let half = [&random[..32768], &text[..32768]].concat();
        assert!(!looks_random(&half));
    }
}
