//! The write-intent bitmap: coarse regions that a power cut may have left unlike the log, and beside it those whose writes
//! some process server has not acknowledged.
//!
//! *Consistency.* A region's bits are durable before [`Intent::declare`] returns, and that is before a write to it is given
//! to the disk. [`Intent::clear_idle`] clears the intent bits of regions in which nothing is in flight and which were idle since
//! before a completed sync of disk and log; [`Intent::clear_shipped`] clears the unshipped bits of regions without intent
//! whose last record every consumer has passed. *Retries.* None: a file whose sync failed refuses everything; the caller
//! stores elsewhere that the whole disk must be compared and calls [`Intent::give_up`]. *Cancellation.* Every call runs
//! to its end. *Crash.* A torn block counts as all ones; a clear that did not reach the media leaves a bit too many.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tidemark_base::sabotage;
use tidemark_base::storage::StorageFile;
use tidemark_base::sync::Mutex;
use tidemark_base::{Extent, ExtentSet, Sequence};

pub const BLOCK_BYTES: usize = 4096;
const HEADER_BYTES: usize = 48;
const MAGIC: &[u8; 8] = b"TMINTNT1";
const WORDS_PER_BLOCK: usize = (BLOCK_BYTES - HEADER_BYTES) / 8;
const REGIONS_PER_BLOCK: u64 = (WORDS_PER_BLOCK * 64) as u64;
const REGION_BYTES_MIN: u64 = 4 << 20;
/// At most about this many regions: two blocks of bitmap for any disk.
const REGIONS_MAX: u64 = 1 << 16;
/// The two maps, in the order of their blocks.
const INTENT: usize = 0;
const UNSHIPPED: usize = 1;
/// Two blocks a map (REGIONS_MAX), or three when the last region is partial.
const BLOCKS_MAX: usize = 6;

/// Time in a coarse unit since the disk was attached. The keeper of the clock chooses the unit (milliseconds).
pub type Tick = u64;

pub struct Intent {
    region_shift: u32,
    disk_bytes: u64,
    /// Durable bits, as writers see them.
    bits: Box<[AtomicU64]>,
    /// When the last write to the region ended.
    last_write: Box<[AtomicU64]>,
    /// Up to which sequence its records may reach: known once the region lost its intent bit.
    last_sequence: Box<[AtomicU64]>,
    file: Mutex<Image>,
    /// Set once another place says durably that the whole disk must be compared; bits mean nothing from then on.
    given_up: AtomicBool,
}

struct Image {
    file: Arc<dyn StorageFile>,
    /// What the file holds, or will when its blocks are written next: the intent bits, then the unshipped ones.
    words: Vec<u64>,
}

/// What an earlier session's file names.
#[derive(Clone, Debug, Default)]
pub struct IntentFound {
    /// What a power cut may have left unlike the log.
    pub intent: ExtentSet,
    /// Everything that was written and that some consumer did not acknowledge, unless it is in a scan.
    pub unshipped: ExtentSet,
}

/// Nobody knows up to which record the region's writes reach: it stays.
const NEVER: u64 = u64::MAX;

fn region_shift(disk_bytes: u64) -> u32 {
    disk_bytes.div_ceil(REGIONS_MAX).next_power_of_two().max(REGION_BYTES_MIN).trailing_zeros()
}

fn blocks(disk_bytes: u64) -> usize {
    (disk_bytes.div_ceil(1 << region_shift(disk_bytes))).div_ceil(REGIONS_PER_BLOCK) as usize
}

impl Intent {
    /// The size of the file for a disk.
    pub fn file_bytes(disk_bytes: u64) -> u64 {
        (2 * blocks(disk_bytes) * BLOCK_BYTES) as u64
    }

    /// Writes both maps over the whole file and syncs it. `kept` names regions of an earlier session that are not synced,
    /// and those whose writes are neither acknowledged nor in a scan.
    pub fn start(file: Arc<dyn StorageFile>, disk_bytes: u64, kept: &IntentFound) -> io::Result<Self> {
        let words = blocks(disk_bytes) * WORDS_PER_BLOCK;
        let regions = disk_bytes.div_ceil(1 << region_shift(disk_bytes)) as usize;
        let intent = Self {
            region_shift: region_shift(disk_bytes),
            disk_bytes,
            bits: (0..2 * words).map(|_| AtomicU64::new(0)).collect(),
            last_write: (0..regions).map(|_| AtomicU64::new(0)).collect(),
            last_sequence: (0..regions).map(|_| AtomicU64::new(NEVER)).collect(),
            file: Mutex::new(Image { file, words: vec![0; 2 * words] }),
            given_up: AtomicBool::new(false),
        };
        {
            let mut image = intent.image();
            // A region with intent may hold writes that are in no record yet.
            let kept_intent = kept.intent.iter().map(|extent| (extent, [INTENT, UNSHIPPED].as_slice()));
            let kept_unshipped = kept.unshipped.iter().map(|extent| (extent, [UNSHIPPED].as_slice()));
            for (extent, maps) in kept_intent.chain(kept_unshipped) {
                for region in intent.regions(extent) {
                    for map in maps {
                        let (word, bit) = intent.place(*map, region);
                        image.words[word] |= bit;
                        intent.bits[word].fetch_or(bit, Ordering::Release);
                    }
                }
            }
            for block in 0..2 * blocks(disk_bytes) {
                intent.write_block(&image, block)?;
            }
            image.file.sync()?;
        }
        Ok(intent)
    }

    /// The regions that an earlier session's file names; `None` when the file is of another disk's size. Blocks that
    /// do not match their checksum, or cannot be read, count as all ones.
    pub fn read(file: &dyn StorageFile, disk_bytes: u64) -> io::Result<Option<IntentFound>> {
        if file.bytes()? != Self::file_bytes(disk_bytes) {
            return Ok(None);
        }
        let region_bytes = 1u64 << region_shift(disk_bytes);
        let mut found = IntentFound::default();
        let mut content = [0; BLOCK_BYTES];
        for (map, block) in [INTENT, UNSHIPPED].iter().flat_map(|map| (0..blocks(disk_bytes)).map(move |at| (*map, at)))
        {
            let number = map * blocks(disk_bytes) + block;
            let is_sound = file.read_at((number * BLOCK_BYTES) as u64, &mut content).is_ok()
                && content[..16] == blake3::hash(&content[16..]).as_bytes()[..16]
                && &content[16..24] == MAGIC
                && content[24..32] == region_bytes.to_le_bytes()
                && content[32..40] == disk_bytes.to_le_bytes()
                && content[40..44] == (number as u32).to_le_bytes();
            let into = if map == INTENT { &mut found.intent } else { &mut found.unshipped };
            for region in 0..REGIONS_PER_BLOCK {
                let byte = content[HEADER_BYTES + (region / 8) as usize];
                if !is_sound || byte & (1 << (region % 8)) != 0 {
                    let offset = (block as u64 * REGIONS_PER_BLOCK + region) * region_bytes;
                    if offset < disk_bytes {
                        into.insert(Extent::new(offset, region_bytes.min(disk_bytes - offset)));
                    }
                }
            }
        }
        Ok(Some(found))
    }

    /// Makes the bits of these writes durable. Costs four loads for a region that was declared before.
    ///
    /// The writes must be in the in-flight table already: that is what keeps [`Self::clear_idle`] from clearing behind us.
    pub fn declare(&self, writes: &[Extent]) -> io::Result<()> {
        let is_declared = |region| self.is_set(INTENT, region) && self.is_set(UNSHIPPED, region);
        if writes.iter().all(|write| self.regions(*write).all(is_declared)) || self.given_up.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut image = self.image();
        let mut changed = [false; BLOCKS_MAX];
        for (map, region) in self.bits_of(writes) {
            let (word, bit) = self.place(map, region);
            if image.words[word] & bit == 0 || !self.is_set(map, region) {
                image.words[word] |= bit;
                changed[word / WORDS_PER_BLOCK] = true;
            }
        }
        if !sabotage::is("intent-wait") {
            for (block, _) in changed.iter().enumerate().filter(|(_, changed)| **changed) {
                self.write_block(&image, block)?;
            }
            image.file.sync()?;
        }
        // Only now may a writer rely on them.
        for (map, region) in self.bits_of(writes) {
            let (word, bit) = self.place(map, region);
            self.bits[word].fetch_or(bit, Ordering::Release);
        }
        Ok(())
    }

    fn bits_of(&self, writes: &[Extent]) -> impl Iterator<Item = (usize, u64)> {
        let regions = writes.iter().flat_map(|write| self.regions(*write));
        regions.flat_map(|region| [(INTENT, region), (UNSHIPPED, region)])
    }

    /// Says that a write ended, before it leaves the in-flight table.
    pub fn ended(&self, write: Extent, now: Tick) {
        for region in self.regions(write) {
            self.last_write[region as usize].store(now, Ordering::Release);
        }
    }

    /// Clears the intent bits of regions whose last write ended before `synced` (when the last completed sync of disk and log
    /// began) and is at least `idle` ticks ago. `none_in_flight` is asked with the extent of a region, runs its second
    /// argument under the in-flight lock if nothing is in flight there, and says whether it did. `logged` is up to where the
    /// log tells of every write; `None` when it does not.
    pub fn clear_idle(
        &self,
        now: Tick,
        synced: Tick,
        idle: Tick,
        logged: Option<Sequence>,
        none_in_flight: impl Fn(Extent, &mut dyn FnMut()),
    ) -> io::Result<()> {
        if self.given_up.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut image = self.image();
        let mut changed = vec![false; blocks(self.disk_bytes)];
        for region in 0..self.last_write.len() as u64 {
            if !self.is_set(INTENT, region) {
                continue;
            }
            let offset = region << self.region_shift;
            let (word, bit) = self.place(INTENT, region);
            none_in_flight(Extent::new(offset, 1 << self.region_shift), &mut || {
                let last = self.last_write[region as usize].load(Ordering::Acquire);
                if last < synced && last.saturating_add(idle) <= now || sabotage::is("intent-clear") {
                    // Nothing is in flight here, so all of the region's records are logged.
                    let reached = logged.map_or(NEVER, |logged| logged.0);
                    self.last_sequence[region as usize].store(reached, Ordering::Release);
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

    /// Clears the unshipped bits of regions without intent whose records every consumer has acknowledged durably.
    pub fn clear_shipped(&self, acknowledged: Sequence) -> io::Result<()> {
        if self.given_up.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut image = self.image();
        let mut changed = [false; BLOCKS_MAX];
        for region in 0..self.last_sequence.len() as u64 {
            // Under the lock that a declaration takes before it makes a bit durable.
            let (intent_word, intent_bit) = self.place(INTENT, region);
            let (word, bit) = self.place(UNSHIPPED, region);
            let reached = self.last_sequence[region as usize].load(Ordering::Acquire);
            if image.words[word] & bit != 0
                && image.words[intent_word] & intent_bit == 0
                && (reached != NEVER && reached <= acknowledged.0 || sabotage::is("unshipped-clear"))
            {
                self.bits[word].fetch_and(!bit, Ordering::Release);
                image.words[word] &= !bit;
                changed[word / WORDS_PER_BLOCK] = true;
            }
        }
        for (block, _) in changed.iter().enumerate().filter(|(_, changed)| **changed) {
            self.write_block(&image, block)?;
        }
        Ok(())
    }

    /// A new epoch began: what no consumer acknowledged of the old one is in their scans. Its sequences say nothing
    /// any more.
    pub fn forget_sequences(&self) {
        for region in 0..self.last_sequence.len() as u64 {
            if !self.is_set(INTENT, region) {
                self.last_sequence[region as usize].store(0, Ordering::Release);
            }
        }
    }

    /// Records of an earlier session reach up to here: for the regions that were kept.
    pub fn kept_reach(&self, logged: Sequence) {
        self.last_sequence.iter().for_each(|reached| reached.store(logged.0, Ordering::Release));
    }

    /// Everything that was written and that some consumer did not acknowledge, unless it is in a scan: the whole disk, when
    /// that is not kept.
    pub fn unshipped(&self) -> ExtentSet {
        let mut found = ExtentSet::new();
        for region in 0..self.last_sequence.len() as u64 {
            if self.has_given_up() || self.is_set(UNSHIPPED, region) || self.is_set(INTENT, region) {
                let offset = region << self.region_shift;
                found.insert(Extent::new(offset, (1 << self.region_shift).min(self.disk_bytes - offset)));
            }
        }
        found
    }

    /// Whether any region has its bit set, and so the disk and the log want a sync now and then.
    pub fn is_any_set(&self) -> bool {
        self.bits[..self.bits.len() / 2].iter().any(|word| word.load(Ordering::Acquire) != 0)
    }

    /// The whole disk is to be compared after a crash, and that is durable elsewhere: bits are no longer kept.
    pub fn give_up(&self) {
        self.given_up.store(true, Ordering::Release);
    }

    pub fn has_given_up(&self) -> bool {
        self.given_up.load(Ordering::Acquire)
    }

    /// Has every write to the bitmap fail from now on.
    #[cfg(test)]
    pub fn break_file(&self, read_only: Arc<dyn StorageFile>) {
        self.image().file = read_only;
    }

    fn image(&self) -> tidemark_base::sync::MutexGuard<'_, Image> {
        self.file.lock().expect("no panic while held")
    }

    fn is_set(&self, map: usize, region: u64) -> bool {
        let (word, bit) = self.place(map, region);
        self.bits[word].load(Ordering::Acquire) & bit != 0
    }

    /// Where the bit of a region lies among all words.
    fn place(&self, map: usize, region: u64) -> (usize, u64) {
        (map * self.bits.len() / 2 + (region / 64) as usize, 1 << (region % 64))
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

const _: () = assert!(REGIONS_PER_BLOCK == 32_384 && HEADER_BYTES + WORDS_PER_BLOCK * 8 == BLOCK_BYTES);

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use tidemark_base::storage::{OpenMode, RealStorage};

    const DISK_BYTES: u64 = (100 << 20) + 512;

    fn file() -> (tempfile::TempDir, Arc<dyn StorageFile>) {
        let folder = tempfile::tempdir().unwrap();
        let file = RealStorage::open_folder(folder.path()).open("intent", OpenMode::Create).unwrap();
        (folder, file)
    }

    fn read(file: &Arc<dyn StorageFile>) -> Vec<Extent> {
        Intent::read(&**file, DISK_BYTES).unwrap().unwrap().intent.iter().collect()
    }

    #[test]
    fn declared_regions_are_read_back() {
        let (_folder, file) = file();
        let intent = Intent::start(file.clone(), DISK_BYTES, &IntentFound::default()).unwrap();
        assert!(read(&file).is_empty() && !intent.is_any_set());
        intent.declare(&[Extent::new(5 << 20, 4096), Extent::new((12 << 20) - 512, 1024)]).unwrap();
        assert_eq!(read(&file), [Extent::new(4 << 20, 12 << 20)]);
        intent.declare(&[Extent::new(100 << 20, 512)]).unwrap();
        assert_eq!(read(&file)[1], Extent::new(100 << 20, 512), "the last region ends with the disk");
        assert!(Intent::read(&*file, 200 << 30).unwrap().is_none(), "another size");
    }

    #[test]
    pub(crate) fn only_idle_and_synced_regions_are_cleared() {
        let (_folder, file) = file();
        let intent = Intent::start(file.clone(), DISK_BYTES, &IntentFound::default()).unwrap();
        let write = |region: u64| Extent::new(region << 22, 512);
        for region in 0..4 {
            intent.declare(&[write(region)]).unwrap();
        }
        intent.ended(write(0), 10);
        intent.ended(write(1), 90); // not idle long enough
        intent.ended(write(2), 55); // not synced since
        intent.ended(write(3), 10); // in flight again
        intent
            .clear_idle(100, 50, 30, Some(Sequence(7)), |region, clear| {
                if region.offset != 3 << 22 {
                    clear()
                }
            })
            .unwrap();
        assert_eq!(read(&file), [Extent::new(4 << 20, 12 << 20)]);
        intent.declare(&[write(0)]).unwrap();
        assert_eq!(read(&file), [Extent::new(0, 16 << 20)]);
    }

    fn unshipped(file: &Arc<dyn StorageFile>) -> Vec<Extent> {
        Intent::read(&**file, DISK_BYTES).unwrap().unwrap().unshipped.iter().collect()
    }

    #[test]
    pub(crate) fn a_region_is_unshipped_until_its_last_record_is_acknowledged() {
        let (_folder, file) = file();
        let intent = Intent::start(file.clone(), DISK_BYTES, &IntentFound::default()).unwrap();
        let write = |region: u64| Extent::new(region << 22, 512);
        let clear = |logged: Option<u64>, below: u64| {
            let logged = logged.map(Sequence);
            intent
                .clear_idle(100, 100, 0, logged, |region, clear| {
                    if region.offset < below << 22 {
                        clear()
                    }
                })
                .unwrap();
        };
        intent.declare(&[write(0), write(1), write(2)]).unwrap();
        intent.clear_shipped(Sequence(100)).unwrap();
        assert_eq!(unshipped(&file), [Extent::new(0, 12 << 20)], "all of them may be written to");
        clear(Some(7), 1); // region 0: its records end at 7
        clear(None, 2); // region 1: what was written is in no log
        intent.clear_shipped(Sequence(6)).unwrap();
        assert_eq!(unshipped(&file), [Extent::new(0, 12 << 20)]);
        intent.clear_shipped(Sequence(7)).unwrap();
        assert_eq!(
            (read(&file), unshipped(&file)),
            (vec![Extent::new(8 << 20, 4 << 20)], vec![Extent::new(4 << 20, 8 << 20)])
        );
        // In a new epoch everything older is in the scans, but for what is written to now.
        intent.forget_sequences();
        intent.clear_shipped(Sequence(0)).unwrap();
        assert_eq!(unshipped(&file), [Extent::new(8 << 20, 4 << 20)]);
        intent.declare(&[write(1)]).unwrap();
        assert_eq!(unshipped(&file), [Extent::new(4 << 20, 8 << 20)]);
        assert_eq!(intent.unshipped().iter().collect::<Vec<_>>(), unshipped(&file));
        // The next session keeps them, without knowing up to which record they reach.
        let found = Intent::read(&*file, DISK_BYTES).unwrap().unwrap();
        let kept = IntentFound { intent: ExtentSet::new(), unshipped: found.unshipped };
        let next = Intent::start(file.clone(), DISK_BYTES, &kept).unwrap();
        next.clear_shipped(Sequence(1000)).unwrap();
        assert_eq!(unshipped(&file), [Extent::new(4 << 20, 8 << 20)]);
        next.kept_reach(Sequence(1000));
        next.clear_shipped(Sequence(1000)).unwrap();
        assert!(unshipped(&file).is_empty());
    }

    /// Each bit of the file in turn: never fewer regions than were named.
    #[test]
    fn a_damaged_block_counts_as_all_ones() {
        let (_folder, file) = file();
        let named = Extent::new(8 << 20, 4 << 20);
        let kept = IntentFound { intent: [named].into_iter().collect(), unshipped: [named].into_iter().collect() };
        Intent::start(file.clone(), DISK_BYTES, &kept).unwrap();
        assert_eq!((read(&file), unshipped(&file)), (vec![named], vec![named]));
        let whole = vec![Extent::new(0, DISK_BYTES)];
        for bit in 0..2 * BLOCK_BYTES as u64 * 8 {
            let mut byte = [0];
            file.read_at(bit / 8, &mut byte).unwrap();
            file.write_at(bit / 8, &[byte[0] ^ (1 << (bit % 8))]).unwrap();
            let expected =
                if bit / 8 < BLOCK_BYTES as u64 { (whole.clone(), vec![named]) } else { (vec![named], whole.clone()) };
            if bit % 97 == 0 || bit / 8 % (BLOCK_BYTES as u64) < 64 {
                assert_eq!((read(&file), unshipped(&file)), expected, "bit {bit}");
            }
            file.write_at(bit / 8, &byte).unwrap();
        }
        // Blocks that changed places.
        let mut blocks = [[0; BLOCK_BYTES]; 2];
        for (at, block) in blocks.iter_mut().enumerate() {
            file.read_at((at * BLOCK_BYTES) as u64, block).unwrap();
        }
        file.write_at(0, &blocks[1]).unwrap();
        file.write_at(BLOCK_BYTES as u64, &blocks[0]).unwrap();
        assert_eq!((read(&file), unshipped(&file)), (whole.clone(), whole));
    }

    #[test]
    fn a_disk_of_any_size_has_a_small_bitmap() {
        for disk_bytes in [512, 4 << 20, 1 << 40, (1 << 46) + 512] {
            assert!((1..=3).contains(&blocks(disk_bytes)), "{disk_bytes}");
        }
    }
}
