//! The write-intent bitmap: coarse regions that a power cut may have left unlike the log.
//!
//! *Consistency.* A region's bit is durable before [`Intent::declare`] returns, and that is before a write to it is given
//! to the disk. [`Intent::clear_idle`] clears bits of regions in which nothing is in flight and which were idle since
//! before a completed sync of disk and log. *Retries.* None: a file whose sync failed refuses everything; the caller
//! stores elsewhere that the whole disk must be compared and calls [`Intent::give_up`]. *Cancellation.* Every call runs
//! to its end. *Crash.* A torn block counts as all ones; a clear that did not reach the media leaves a bit too many.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tidemark_base::storage::StorageFile;
use tidemark_base::sync::Mutex;
use tidemark_base::{Extent, ExtentSet};

pub const BLOCK_BYTES: usize = 4096;
const HEADER_BYTES: usize = 48;
const MAGIC: &[u8; 8] = b"TMINTNT1";
const WORDS_PER_BLOCK: usize = (BLOCK_BYTES - HEADER_BYTES) / 8;
const REGIONS_PER_BLOCK: u64 = (WORDS_PER_BLOCK * 64) as u64;
const REGION_BYTES_MIN: u64 = 4 << 20;
/// At most about this many regions: two blocks of bitmap for any disk.
const REGIONS_MAX: u64 = 1 << 16;

/// Time in a coarse unit since the disk was attached. The keeper of the clock chooses the unit (milliseconds).
pub type Tick = u64;

pub struct Intent {
    region_shift: u32,
    disk_bytes: u64,
    /// Durable bits, as writers see them.
    bits: Box<[AtomicU64]>,
    /// When the last write to the region ended.
    last_write: Box<[AtomicU64]>,
    file: Mutex<Image>,
    /// Set once another place says durably that the whole disk must be compared; bits mean nothing from then on.
    given_up: AtomicBool,
}

struct Image {
    file: Arc<dyn StorageFile>,
    /// What the file holds, or will when its blocks are written next.
    words: Vec<u64>,
}

fn region_shift(disk_bytes: u64) -> u32 {
    disk_bytes.div_ceil(REGIONS_MAX).next_power_of_two().max(REGION_BYTES_MIN).trailing_zeros()
}

fn blocks(disk_bytes: u64) -> usize {
    (disk_bytes.div_ceil(1 << region_shift(disk_bytes))).div_ceil(REGIONS_PER_BLOCK) as usize
}

impl Intent {
    /// The size of the file for a disk.
    pub fn file_bytes(disk_bytes: u64) -> u64 {
        (blocks(disk_bytes) * BLOCK_BYTES) as u64
    }

    /// Writes the bitmap over the whole file and syncs it. `kept` names regions of an earlier session that are neither
    /// synced nor to be scanned.
    pub fn start(file: Arc<dyn StorageFile>, disk_bytes: u64, kept: &ExtentSet) -> io::Result<Self> {
        let words = blocks(disk_bytes) * WORDS_PER_BLOCK;
        let regions = disk_bytes.div_ceil(1 << region_shift(disk_bytes)) as usize;
        let intent = Self {
            region_shift: region_shift(disk_bytes),
            disk_bytes,
            bits: (0..words).map(|_| AtomicU64::new(0)).collect(),
            last_write: (0..regions).map(|_| AtomicU64::new(0)).collect(),
            file: Mutex::new(Image { file, words: vec![0; words] }),
            given_up: AtomicBool::new(false),
        };
        {
            let mut image = intent.image();
            for region in kept.iter().flat_map(|extent| intent.regions(extent)) {
                let (word, bit) = place(region);
                image.words[word] |= bit;
                intent.bits[word].fetch_or(bit, Ordering::Release);
            }
            for block in 0..blocks(disk_bytes) {
                intent.write_block(&image, block)?;
            }
            image.file.sync()?;
        }
        Ok(intent)
    }

    /// The regions that an earlier session's file names; `None` when the file is of another disk's size. Blocks that
    /// do not match their checksum count as all ones.
    pub fn read(file: &dyn StorageFile, disk_bytes: u64) -> io::Result<Option<ExtentSet>> {
        if file.bytes()? != Self::file_bytes(disk_bytes) {
            return Ok(None);
        }
        let region_bytes = 1u64 << region_shift(disk_bytes);
        let mut found = ExtentSet::new();
        let mut content = [0; BLOCK_BYTES];
        for block in 0..blocks(disk_bytes) {
            file.read_at((block * BLOCK_BYTES) as u64, &mut content)?;
            let is_sound = content[..16] == blake3::hash(&content[16..]).as_bytes()[..16]
                && &content[16..24] == MAGIC
                && content[24..32] == region_bytes.to_le_bytes()
                && content[32..40] == disk_bytes.to_le_bytes()
                && content[40..44] == (block as u32).to_le_bytes();
            for region in 0..REGIONS_PER_BLOCK {
                let byte = content[HEADER_BYTES + (region / 8) as usize];
                if !is_sound || byte & (1 << (region % 8)) != 0 {
                    let offset = (block as u64 * REGIONS_PER_BLOCK + region) * region_bytes;
                    if offset < disk_bytes {
                        found.insert(Extent::new(offset, region_bytes.min(disk_bytes - offset)));
                    }
                }
            }
        }
        Ok(Some(found))
    }

    /// Makes the bits of these writes durable. Costs two loads for a region that was declared before.
    ///
    /// The writes must be in the in-flight table already: that is what keeps [`Self::clear_idle`] from clearing behind us.
    pub fn declare(&self, writes: &[Extent]) -> io::Result<()> {
        if writes.iter().all(|write| self.regions(*write).all(|region| self.is_set(region)))
            || self.given_up.load(Ordering::Acquire)
        {
            return Ok(());
        }
        let mut image = self.image();
        let mut changed = [usize::MAX; 2];
        for write in writes {
            for region in self.regions(*write) {
                let (word, bit) = place(region);
                if image.words[word] & bit != 0 && self.is_set(region) {
                    continue;
                }
                image.words[word] |= bit;
                let block = word / WORDS_PER_BLOCK;
                // There are at most two blocks (REGIONS_MAX), or three when the last region is partial.
                if !changed.contains(&block) {
                    match changed.iter_mut().find(|changed| **changed == usize::MAX) {
                        Some(free) => *free = block,
                        None => self.write_block(&image, block)?,
                    }
                }
            }
        }
        for block in changed {
            if block != usize::MAX {
                self.write_block(&image, block)?;
            }
        }
        image.file.sync()?;
        // Only now may a writer rely on them.
        for write in writes {
            for region in self.regions(*write) {
                let (word, bit) = place(region);
                self.bits[word].fetch_or(bit, Ordering::Release);
            }
        }
        Ok(())
    }

    /// Says that a write ended, before it leaves the in-flight table.
    pub fn ended(&self, write: Extent, now: Tick) {
        for region in self.regions(write) {
            self.last_write[region as usize].store(now, Ordering::Release);
        }
    }

    /// Clears the bits of regions whose last write ended before `synced` (when the last completed sync of disk and log
    /// began) and is at least `idle` ticks ago. `none_in_flight` is asked with the extent of a region, runs its second
    /// argument under the in-flight lock if nothing is in flight there, and says whether it did.
    pub fn clear_idle(
        &self,
        now: Tick,
        synced: Tick,
        idle: Tick,
        none_in_flight: impl Fn(Extent, &mut dyn FnMut()),
    ) -> io::Result<()> {
        if self.given_up.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut image = self.image();
        let mut changed = vec![false; blocks(self.disk_bytes)];
        for region in 0..self.last_write.len() as u64 {
            if !self.is_set(region) {
                continue;
            }
            let offset = region << self.region_shift;
            let (word, bit) = place(region);
            none_in_flight(Extent::new(offset, 1 << self.region_shift), &mut || {
                let last = self.last_write[region as usize].load(Ordering::Acquire);
                if last < synced && last.saturating_add(idle) <= now {
                    self.bits[word].fetch_and(!bit, Ordering::Release);
                    image.words[word] &= !bit;
                    changed[word / WORDS_PER_BLOCK] = true;
                }
            });
        }
        for (block, _) in changed.iter().enumerate().filter(|(_, changed)| **changed) {
            self.write_block(&image, block)?;
        }
        Ok(())
    }

    /// Whether any region has its bit set, and so the disk and the log want a sync now and then.
    pub fn is_any_set(&self) -> bool {
        self.bits.iter().any(|word| word.load(Ordering::Acquire) != 0)
    }

    /// The whole disk is to be compared after a crash, and that is durable elsewhere: bits are no longer kept.
    pub fn give_up(&self) {
        self.given_up.store(true, Ordering::Release);
    }

    pub fn has_given_up(&self) -> bool {
        self.given_up.load(Ordering::Acquire)
    }

    fn image(&self) -> tidemark_base::sync::MutexGuard<'_, Image> {
        self.file.lock().expect("no panic while held")
    }

    fn is_set(&self, region: u64) -> bool {
        let (word, bit) = place(region);
        self.bits[word].load(Ordering::Acquire) & bit != 0
    }

    fn regions(&self, extent: Extent) -> std::ops::Range<u64> {
        extent.offset >> self.region_shift..((extent.end() - 1) >> self.region_shift) + 1
    }

    fn write_block(&self, image: &Image, block: usize) -> io::Result<()> {
        let mut content = [0; BLOCK_BYTES];
        content[16..24].copy_from_slice(MAGIC);
        content[24..32].copy_from_slice(&(1u64 << self.region_shift).to_le_bytes());
        content[32..40].copy_from_slice(&self.disk_bytes.to_le_bytes());
        content[40..44].copy_from_slice(&(block as u32).to_le_bytes());
        let words = &image.words[block * WORDS_PER_BLOCK..(block + 1) * WORDS_PER_BLOCK];
        for (word, bytes) in words.iter().zip(content[HEADER_BYTES..].chunks_exact_mut(8)) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        let hash = blake3::hash(&content[16..]);
        content[..16].copy_from_slice(&hash.as_bytes()[..16]);
        image.file.write_at((block * BLOCK_BYTES) as u64, &content)
    }
}

fn place(region: u64) -> (usize, u64) {
    ((region / 64) as usize, 1 << (region % 64))
}

const _: () = assert!(REGIONS_PER_BLOCK == 32_384 && HEADER_BYTES + WORDS_PER_BLOCK * 8 == BLOCK_BYTES);

#[cfg(test)]
mod tests {
    use super::*;
    use tidemark_base::storage::{OpenMode, RealStorage};

    const DISK_BYTES: u64 = (100 << 20) + 512;

    fn file() -> (tempfile::TempDir, Arc<dyn StorageFile>) {
        let folder = tempfile::tempdir().unwrap();
        let file = RealStorage::open_folder(folder.path()).open("intent", OpenMode::Create).unwrap();
        (folder, file)
    }

    fn read(file: &Arc<dyn StorageFile>) -> Vec<Extent> {
        Intent::read(&**file, DISK_BYTES).unwrap().unwrap().iter().collect()
    }

    #[test]
    fn declared_regions_are_read_back() {
        let (_folder, file) = file();
        let intent = Intent::start(file.clone(), DISK_BYTES, &ExtentSet::new()).unwrap();
        assert!(read(&file).is_empty() && !intent.is_any_set());
        intent.declare(&[Extent::new(5 << 20, 4096), Extent::new((12 << 20) - 512, 1024)]).unwrap();
        assert_eq!(read(&file), [Extent::new(4 << 20, 12 << 20)]);
        intent.declare(&[Extent::new(100 << 20, 512)]).unwrap();
        assert_eq!(read(&file)[1], Extent::new(100 << 20, 512), "the last region ends with the disk");
        assert!(Intent::read(&*file, 200 << 30).unwrap().is_none(), "another size");
    }

    #[test]
    fn only_idle_and_synced_regions_are_cleared() {
        let (_folder, file) = file();
        let intent = Intent::start(file.clone(), DISK_BYTES, &ExtentSet::new()).unwrap();
        let write = |region: u64| Extent::new(region << 22, 512);
        for region in 0..4 {
            intent.declare(&[write(region)]).unwrap();
        }
        intent.ended(write(0), 10);
        intent.ended(write(1), 90); // not idle long enough
        intent.ended(write(2), 55); // not synced since
        intent.ended(write(3), 10); // in flight again
        intent
            .clear_idle(100, 50, 30, |region, clear| {
                if region.offset != 3 << 22 {
                    clear()
                }
            })
            .unwrap();
        assert_eq!(read(&file), [Extent::new(4 << 20, 12 << 20)]);
        intent.declare(&[write(0)]).unwrap();
        assert_eq!(read(&file), [Extent::new(0, 16 << 20)]);
    }

    #[test]
    fn a_damaged_block_counts_as_all_ones() {
        let (_folder, file) = file();
        let kept = [Extent::new(8 << 20, 512)].into_iter().fold(ExtentSet::new(), |mut set, extent| {
            set.insert(extent);
            set
        });
        Intent::start(file.clone(), DISK_BYTES, &kept).unwrap();
        assert_eq!(read(&file), [Extent::new(8 << 20, 4 << 20)]);
        file.write_at(3000, &[1]).unwrap();
        assert_eq!(read(&file), [Extent::new(0, DISK_BYTES)]);
    }

    #[test]
    fn a_disk_of_any_size_has_a_small_bitmap() {
        for disk_bytes in [512, 4 << 20, 1 << 40, (1 << 46) + 512] {
            assert!((1..=3).contains(&blocks(disk_bytes)), "{disk_bytes}");
        }
    }
}
