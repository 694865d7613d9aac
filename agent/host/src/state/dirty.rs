//! A bitmap of the disk's blocks that survives `kill -9`: what the log does not hold, or what a consumer must be sent.
//!
//! Each disk has one for the log (`dirty`): writes that were executed and not logged. Each consumer has one (`scan`): what
//! must be read from the disk for it. When the disk returns to its log, the first is added to the second.
//!
//! *Consistency.* A bit is set after the write to the disk and before its slot is freed. *Crash.* `kill -9` loses nothing (the
//! file is mapped). A power cut may lose bits that were set since [`DirtyBitmap::sync`]; the intent bitmap names their
//! regions. It may also bring back bits that were cleared, which costs a scan of them. *Retries.* None. *Cancellation.*
//! Every call runs to its end.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use tidemark_base::storage::StorageFile;
use tidemark_base::{Extent, ExtentSet};

pub const GRANULE_BYTES: u64 = 64 << 10;
const HEADER_BYTES: usize = 4096;
const MAGIC: &[u8; 8] = b"TMDIRTY1";

pub struct DirtyBitmap {
    map: MmapRaw,
    file: Arc<dyn StorageFile>,
    disk_bytes: u64,
    words: usize,
    /// How many bits are set. Kept beside them so that asking is free.
    granules: AtomicU64,
}

fn bitmap_bytes(disk_bytes: u64) -> usize {
    (disk_bytes.div_ceil(GRANULE_BYTES).div_ceil(8) as usize).next_multiple_of(4096)
}

fn header(disk_bytes: u64) -> [u8; 48] {
    let mut header = [0; 48];
    header[16..24].copy_from_slice(MAGIC);
    header[24..32].copy_from_slice(&GRANULE_BYTES.to_le_bytes());
    header[32..40].copy_from_slice(&disk_bytes.to_le_bytes());
    let hash = blake3::hash(&header[16..]);
    header[..16].copy_from_slice(&hash.as_bytes()[..16]);
    header
}

impl DirtyBitmap {
    pub fn file_bytes(disk_bytes: u64) -> u64 {
        (HEADER_BYTES + bitmap_bytes(disk_bytes)) as u64
    }

    /// Writes an empty bitmap over the whole file (so that no later store can lack room) and syncs it.
    pub fn create(file: Arc<dyn StorageFile>, disk_bytes: u64) -> io::Result<Self> {
        let bytes = Self::file_bytes(disk_bytes);
        let zeroes = vec![0; bytes.min(1 << 20) as usize];
        let mut at = 0;
        while at < bytes {
            let length = (bytes - at).min(zeroes.len() as u64);
            file.write_at(at, &zeroes[..length as usize])?;
            at += length;
        }
        file.set_bytes(bytes)?;
        file.write_at(0, &header(disk_bytes))?;
        file.sync()?;
        Self::map(file, disk_bytes)
    }

    /// Opens what an earlier session left. `None` when it is not a bitmap of this disk.
    pub fn open(file: Arc<dyn StorageFile>, disk_bytes: u64) -> io::Result<Option<Self>> {
        if file.bytes()? != Self::file_bytes(disk_bytes) {
            return Ok(None);
        }
        let mut found = [0; 48];
        file.read_at(0, &mut found)?;
        if found != header(disk_bytes) {
            return Ok(None);
        }
        Self::map(file, disk_bytes).map(Some)
    }

    fn map(file: Arc<dyn StorageFile>, disk_bytes: u64) -> io::Result<Self> {
        let real = file.as_file().ok_or_else(|| io::Error::other("a dirty bitmap needs a file that can be mapped"))?;
        let map = MmapOptions::new().len(Self::file_bytes(disk_bytes) as usize).map_raw(real)?;
        let bitmap = Self { map, file, disk_bytes, words: bitmap_bytes(disk_bytes) / 8, granules: AtomicU64::new(0) };
        let granules =
            (0..bitmap.words).map(|word| u64::from(bitmap.word(word).load(Ordering::Relaxed).count_ones())).sum();
        bitmap.granules.store(granules, Ordering::Release);
        Ok(bitmap)
    }

    /// Of a disk of this size.
    pub fn disk_bytes(&self) -> u64 {
        self.disk_bytes
    }

    /// Sets the bits of every granule that the range touches.
    pub fn mark(&self, extent: Extent) {
        if extent.is_empty() {
            return;
        }
        let granules = extent.offset / GRANULE_BYTES..(extent.end().min(self.disk_bytes)).div_ceil(GRANULE_BYTES);
        self.each_word(granules, |word, bits| {
            let before = self.word(word).fetch_or(bits, Ordering::AcqRel);
            self.granules.fetch_add(u64::from((bits & !before).count_ones()), Ordering::AcqRel);
        });
    }

    pub fn mark_all(&self) {
        self.mark(Extent::new(0, self.disk_bytes));
    }

    /// Clears the bits of the granules that the range covers wholly (the last one ends with the disk).
    pub fn clear(&self, extent: Extent) {
        let end = if extent.end() >= self.disk_bytes {
            self.disk_bytes.div_ceil(GRANULE_BYTES)
        } else {
            extent.end() / GRANULE_BYTES
        };
        self.each_word(extent.offset.div_ceil(GRANULE_BYTES)..end, |word, bits| {
            let before = self.word(word).fetch_and(!bits, Ordering::AcqRel);
            self.granules.fetch_sub(u64::from((before & bits).count_ones()), Ordering::AcqRel);
        });
    }

    pub fn clear_all(&self) {
        self.clear(Extent::new(0, self.disk_bytes));
    }

    /// The marked runs.
    pub fn extents(&self) -> ExtentSet {
        let mut found = ExtentSet::new();
        for word in 0..self.words {
            let mut bits = self.word(word).load(Ordering::Acquire);
            while bits != 0 {
                let first = bits.trailing_zeros();
                let run = (bits >> first).trailing_ones();
                let offset = (word as u64 * 64 + u64::from(first)) * GRANULE_BYTES;
                let end = (offset + u64::from(run) * GRANULE_BYTES).min(self.disk_bytes);
                if offset < end {
                    found.insert(Extent::new(offset, end - offset));
                }
                bits = if first + run == 64 { 0 } else { bits & (u64::MAX << (first + run)) };
            }
        }
        found
    }

    /// The marked runs within `within`, until `found` holds `count`; then, from where on there may be more.
    pub fn runs_within(&self, within: Extent, count: usize, found: &mut ExtentSet) -> Option<u64> {
        let end = within.end().min(self.disk_bytes);
        let mut granule = within.offset / GRANULE_BYTES;
        while granule * GRANULE_BYTES < end {
            let bits = self.word((granule / 64) as usize).load(Ordering::Acquire) >> (granule % 64);
            if bits == 0 {
                granule = (granule / 64 + 1) * 64;
                continue;
            }
            let first = granule + u64::from(bits.trailing_zeros());
            let run = (bits >> bits.trailing_zeros()).trailing_ones();
            let run = Extent::new(first * GRANULE_BYTES, u64::from(run) * GRANULE_BYTES);
            if let Some(part) = run.intersection(&Extent::new(within.offset, end.saturating_sub(within.offset))) {
                // A run that goes on in the next word joins the one before it, and is the last at the worst.
                if found.len() >= count {
                    return Some(part.offset);
                }
                found.insert(part);
            }
            granule = run.end() / GRANULE_BYTES;
        }
        None
    }

    pub fn is_empty(&self) -> bool {
        self.granules.load(Ordering::Acquire) == 0
    }

    pub fn is_full(&self) -> bool {
        self.granules.load(Ordering::Acquire) == self.disk_bytes.div_ceil(GRANULE_BYTES)
    }

    /// How much of the disk is marked.
    pub fn bytes(&self) -> u64 {
        (self.granules.load(Ordering::Acquire) * GRANULE_BYTES).min(self.disk_bytes)
    }

    /// Makes the bits durable.
    pub fn sync(&self) -> io::Result<()> {
        self.map.flush()?;
        self.file.sync()
    }

    fn each_word(&self, granules: Range<u64>, mut visit: impl FnMut(usize, u64)) {
        let mut at = granules.start;
        while at < granules.end {
            let end = ((at / 64 + 1) * 64).min(granules.end);
            let bits = (u64::MAX >> (64 - (end - at))) << (at % 64);
            visit((at / 64) as usize, bits);
            at = end;
        }
    }

    fn word(&self, word: usize) -> &AtomicU64 {
        assert!(word < self.words, "outside the dirty bitmap");
        // SAFETY: inside the mapping, aligned, and only ever used as an atomic. Bit order in the file follows from the
        // machine being little-endian, which the assertion below demands.
        unsafe { AtomicU64::from_ptr(self.map.as_mut_ptr().add(HEADER_BYTES + word * 8).cast()) }
    }
}

const _: () = assert!(cfg!(target_endian = "little"), "the mapped bitmap is little-endian");

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use tidemark_base::storage::{OpenMode, RealStorage};

    const DISK_BYTES: u64 = 300 * GRANULE_BYTES + 512;

    fn file() -> (tempfile::TempDir, Arc<dyn StorageFile>) {
        let folder = tempfile::tempdir().unwrap();
        let file = RealStorage::open_folder(folder.path()).open("dirty", OpenMode::Create).unwrap();
        (folder, file)
    }

    fn all(bitmap: &DirtyBitmap) -> Vec<Extent> {
        bitmap.extents().iter().collect()
    }

    #[test]
    fn what_is_marked_is_found_and_survives() {
        let (_folder, file) = file();
        let bitmap = DirtyBitmap::create(file.clone(), DISK_BYTES).unwrap();
        assert!(bitmap.is_empty() && all(&bitmap).is_empty());
        bitmap.mark(Extent::new(GRANULE_BYTES - 512, 1024));
        bitmap.mark(Extent::new(DISK_BYTES - 512, 512));
        let expected = [Extent::new(0, 2 * GRANULE_BYTES), Extent::new(300 * GRANULE_BYTES, 512)];
        assert_eq!(all(&bitmap), expected);
        drop(bitmap);
        let bitmap = DirtyBitmap::open(file.clone(), DISK_BYTES).unwrap().unwrap();
        assert_eq!(all(&bitmap), expected);
        assert_eq!(bitmap.bytes(), 3 * GRANULE_BYTES);
        assert!(DirtyBitmap::open(file.clone(), DISK_BYTES + (1 << 30)).unwrap().is_none());
        file.write_at(30, &[9]).unwrap();
        assert!(DirtyBitmap::open(file, DISK_BYTES).unwrap().is_none());
    }

    #[test]
    fn stretches_are_the_whole() {
        let (_folder, file) = file();
        let bitmap = DirtyBitmap::create(file, DISK_BYTES).unwrap();
        for granule in (0..300).filter(|granule| granule % 3 != 1 && !(60..140).contains(granule)) {
            bitmap.mark(Extent::new(granule * GRANULE_BYTES, 512));
        }
        bitmap.mark(Extent::new(100 * GRANULE_BYTES, 30 * GRANULE_BYTES));
        for count in [1, 2, 7, 1000] {
            let mut together = ExtentSet::new();
            let mut from = Some(0);
            while let Some(start) = from {
                let mut stretch = ExtentSet::new();
                from = bitmap.runs_within(Extent::new(start, u64::MAX - start), count, &mut stretch);
                assert!(stretch.len() <= count && from.is_none_or(|next| next > start));
                stretch.iter().for_each(|extent| together.insert(extent));
            }
            assert_eq!(together.iter().collect::<Vec<_>>(), all(&bitmap));
        }
        let mut part = ExtentSet::new();
        assert_eq!(bitmap.runs_within(Extent::new(110 * GRANULE_BYTES + 512, 1024), 9, &mut part), None);
        assert_eq!(part.iter().collect::<Vec<_>>(), [Extent::new(110 * GRANULE_BYTES + 512, 1024)]);
    }

    #[test]
    fn it_agrees_with_a_set_of_granules() {
        let (_folder, file) = file();
        let bitmap = DirtyBitmap::create(file, DISK_BYTES).unwrap();
        let mut marked = BTreeSet::new();
        let mut seed = 7u64;
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) % below
        };
        for _ in 0..2000 {
            let first = random(300);
            let length = 1 + random(80);
            let granules = first..(first + length).min(301);
            let extent = Extent::new(first * GRANULE_BYTES, length * GRANULE_BYTES);
            if random(2) == 0 {
                bitmap.mark(extent);
                marked.extend(granules);
            } else {
                bitmap.clear(extent);
                marked.retain(|granule| !granules.contains(granule));
            }
            let found: BTreeSet<u64> = all(&bitmap)
                .into_iter()
                .flat_map(|extent| extent.offset / GRANULE_BYTES..extent.end().div_ceil(GRANULE_BYTES))
                .collect();
            assert_eq!(found, marked);
            assert_eq!(bitmap.granules.load(Ordering::Relaxed), marked.len() as u64);
        }
        bitmap.mark_all();
        bitmap.clear(Extent::new(512, GRANULE_BYTES));
        assert_eq!(all(&bitmap), [Extent::new(0, DISK_BYTES)], "nothing is covered wholly");
        bitmap.clear_all();
        assert!(bitmap.is_empty());
    }
}
