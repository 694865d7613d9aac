//! One bit for each part of a disk, in memory: sets whose size does not grow with how scattered they are.

use std::io;

use crate::Extent;
use crate::storage::StorageFile;

/// What one bit is of, aligned on the disk. A disk of 1 TiB takes 32 MiB when the set reaches everywhere.
pub const PART_BYTES: u64 = 4 << 10;
/// Of what is stored: 128 MiB of a disk.
pub const PAGE_BYTES: usize = 4 << 10;
const PAGE_WORDS: usize = PAGE_BYTES / 8;
const PAGE_PARTS: u64 = PAGE_WORDS as u64 * 64;

type Page = [u64; PAGE_WORDS];

/// A set of parts of 4 KiB of a disk. The last part may be shorter. Where nothing is in it, it takes no memory.
#[derive(Clone, Debug, Default)]
pub struct Bits {
    pages: Vec<Option<Box<Page>>>,
    disk_bytes: u64,
}

impl PartialEq for Bits {
    fn eq(&self, other: &Self) -> bool {
        self.disk_bytes == other.disk_bytes && self.differing_pages(other).next().is_none()
    }
}

impl Eq for Bits {}

impl Bits {
    pub fn new(disk_bytes: u64) -> Self {
        let pages = disk_bytes.div_ceil(PART_BYTES).div_ceil(PAGE_PARTS) as usize;
        Self { pages: vec![None; pages], disk_bytes }
    }

    pub fn all(disk_bytes: u64) -> Self {
        let mut bits = Self::new(disk_bytes);
        bits.insert(Extent::new(0, disk_bytes));
        bits
    }

    pub fn disk_bytes(&self) -> u64 {
        self.disk_bytes
    }

    fn parts(&self) -> u64 {
        self.disk_bytes.div_ceil(PART_BYTES)
    }

    fn words(&self) -> usize {
        self.parts().div_ceil(64) as usize
    }

    fn word(&self, index: usize) -> u64 {
        self.pages[index / PAGE_WORDS].as_ref().map_or(0, |page| page[index % PAGE_WORDS])
    }

    fn present(&self) -> impl Iterator<Item = &Page> {
        self.pages.iter().flatten().map(|page| &**page)
    }

    /// Whether the part at `offset` is in the set; nothing behind the disk's end is.
    pub fn contains(&self, offset: u64) -> bool {
        let part = offset / PART_BYTES;
        part < self.parts() && self.word((part / 64) as usize) & (1 << (part % 64)) != 0
    }

    /// Every part that `extent` touches. Whether one of them is new.
    pub fn insert(&mut self, extent: Extent) -> bool {
        let mut is_new = false;
        self.change(extent, |page, index, mask| {
            let word = &mut page.get_or_insert_with(|| Box::new([0; PAGE_WORDS]))[index];
            is_new |= *word & mask != mask;
            *word |= mask;
        });
        is_new
    }

    pub fn remove(&mut self, extent: Extent) {
        self.change(extent, |page, index, mask| {
            if let Some(page) = page {
                page[index] &= !mask;
            }
        });
    }

    fn change(&mut self, extent: Extent, mut change: impl FnMut(&mut Option<Box<Page>>, usize, u64)) {
        if extent.is_empty() {
            return;
        }
        let end = extent.end().div_ceil(PART_BYTES).min(self.parts());
        let mut part = extent.offset / PART_BYTES;
        while part < end {
            let until = (part / 64 * 64 + 64).min(end);
            let count = until - part;
            let mask = if count == 64 { u64::MAX } else { ((1 << count) - 1) << (part % 64) };
            let word = (part / 64) as usize;
            change(&mut self.pages[word / PAGE_WORDS], word % PAGE_WORDS, mask);
            part = until;
        }
    }

    pub fn unite(&mut self, other: &Bits) {
        for (page, theirs) in self.pages.iter_mut().zip(&other.pages) {
            match (page, theirs) {
                (_, None) => {}
                (page @ None, Some(theirs)) => *page = Some(theirs.clone()),
                (Some(page), Some(theirs)) => page.iter_mut().zip(&**theirs).for_each(|(word, theirs)| *word |= theirs),
            }
        }
    }

    pub fn is_empty(&self) -> bool {
        self.present().all(|page| page.iter().all(|word| *word == 0))
    }

    /// How many bytes are stored: eight for each 64 parts.
    pub fn stored_bytes(&self) -> u64 {
        self.words() as u64 * 8
    }

    /// What is stored from byte `at` on: eight bytes for each 64 parts, little end first. Behind the end: zeroes.
    pub fn read_stored(&self, at: u64, buffer: &mut [u8]) {
        let mut place = at as usize;
        let mut rest = buffer;
        while !rest.is_empty() {
            let (index, within) = (place / 8, place % 8);
            let word = if index < self.words() { self.word(index) } else { 0 }.to_le_bytes();
            let count = (8 - within).min(rest.len());
            let (now, later) = rest.split_at_mut(count);
            now.copy_from_slice(&word[within..within + count]);
            (rest, place) = (later, place + count);
        }
    }

    fn put_page(&mut self, page: usize, stored: &[u8]) {
        let mut words = Box::new([0; PAGE_WORDS]);
        let count = self.words().saturating_sub(page * PAGE_WORDS).min(PAGE_WORDS);
        for (word, stored) in words[..count].iter_mut().zip(stored.chunks(8)) {
            let mut bytes = [0; 8];
            bytes[..stored.len()].copy_from_slice(stored);
            *word = u64::from_le_bytes(bytes);
        }
        // Nothing behind the disk's end is in the set, whatever is stored there.
        let parts = self.parts();
        if let Some(last) = parts.checked_sub(page as u64 * PAGE_PARTS).filter(|parts| *parts < PAGE_PARTS)
            && last % 64 != 0
        {
            words[(last / 64) as usize] &= (1 << (last % 64)) - 1;
        }
        self.pages[page] = words.iter().any(|word| *word != 0).then_some(words);
    }

    /// What `file` holds from `at` on, of which `bytes` bytes are stored. Holes of it are not read.
    pub fn load(disk_bytes: u64, file: &dyn StorageFile, at: u64, bytes: u64) -> io::Result<Self> {
        let mut bits = Self::new(disk_bytes);
        let mut buffer = vec![0; PAGE_BYTES];
        let mut from = 0;
        while let Some(data) = file.next_data(at + from, at + bytes)? {
            let page = (data - at) / PAGE_BYTES as u64;
            from = page * PAGE_BYTES as u64;
            let Some(length) = bytes.checked_sub(from).filter(|left| *left > 0) else { break };
            let stored = &mut buffer[..(length as usize).min(PAGE_BYTES)];
            file.read_at(at + from, stored)?;
            bits.put_page(page as usize, stored);
            from += stored.len() as u64;
        }
        Ok(bits)
    }

    /// Pages of what is stored that something is in, by their number.
    pub fn filled_pages(&self) -> impl Iterator<Item = usize> {
        self.pages.iter().enumerate().filter(|(_, page)| page.is_some()).map(|(number, _)| number)
    }

    /// Pages of what is stored that are not the same in a set of the same disk.
    pub fn differing_pages(&self, other: &Self) -> impl Iterator<Item = usize> {
        let is_zero = |page: &Option<Box<Page>>| page.as_ref().is_none_or(|page| page.iter().all(|word| *word == 0));
        let pages = self.pages.iter().zip(&other.pages).enumerate();
        pages
            .filter(move |(_, (ours, theirs))| match (ours, theirs) {
                (Some(ours), Some(theirs)) => ours != theirs,
                _ => is_zero(ours) != is_zero(theirs),
            })
            .map(|(number, _)| number)
    }

    /// Where the parts of `extent` lie in what is stored, and what is stored there.
    pub fn stored(&self, extent: Extent) -> (u64, Vec<u8>) {
        let first = (extent.offset / PART_BYTES / 64) as usize;
        let end = ((extent.end().div_ceil(PART_BYTES)).div_ceil(64) as usize).min(self.words());
        let words = (first..end).flat_map(|index| self.word(index).to_le_bytes());
        (first as u64 * 8, words.collect())
    }

    /// Bytes of the disk that are in the set.
    pub fn bytes(&self) -> u64 {
        let words = self.present().flatten();
        let parts: u64 = words.map(|word| u64::from(word.count_ones())).sum();
        let short = match self.disk_bytes % PART_BYTES {
            rest if rest != 0 && self.contains(self.disk_bytes - 1) => PART_BYTES - rest,
            _ => 0,
        };
        parts * PART_BYTES - short
    }

    /// The first run of the set that ends after `from`, cut at `from`.
    pub fn next_run(&self, from: u64) -> Option<Extent> {
        let parts = self.parts();
        let start = self.find(from / PART_BYTES, parts, true)?;
        let end = self.find(start, parts, false).unwrap_or(parts);
        let offset = (start * PART_BYTES).max(from);
        let end = (end * PART_BYTES).min(self.disk_bytes);
        (offset < end).then(|| Extent::new(offset, end - offset))
    }

    /// The end of the run that is wholly in the set, or wholly not, and begins at `offset`, up to `end`; and whether it is.
    pub fn run_end(&self, offset: u64, end: u64) -> (u64, bool) {
        let is_in = self.contains(offset);
        let changes = self.find(offset / PART_BYTES, end.div_ceil(PART_BYTES).min(self.parts()), !is_in);
        (changes.map_or(end, |part| (part * PART_BYTES).min(end)), is_in)
    }

    /// The first part from `part` on, before `until`, that is in the set, or is not.
    fn find(&self, part: u64, until: u64, wanted: bool) -> Option<u64> {
        let mut index = (part / 64) as usize;
        let end = until.div_ceil(64) as usize;
        let mut ignored = (1u64 << (part % 64)) - 1;
        while index < end {
            if wanted && self.pages[index / PAGE_WORDS].is_none() {
                index = (index / PAGE_WORDS + 1) * PAGE_WORDS;
                ignored = 0;
                continue;
            }
            let word = if wanted { self.word(index) } else { !self.word(index) } & !ignored;
            if word != 0 {
                let found = index as u64 * 64 + u64::from(word.trailing_zeros());
                return (found < until).then_some(found);
            }
            ignored = 0;
            index += 1;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::storage::{OpenMode, RealStorage};

    #[test]
    fn runs_and_sizes_are_those_of_a_set_of_parts() {
        let disk_bytes = 300 * PART_BYTES + 512;
        let mut bits = Bits::new(disk_bytes);
        let mut set = BTreeSet::new();
        let extents = [(0, 1), (4095, 2), (PART_BYTES * 60, PART_BYTES * 70), (PART_BYTES * 250, PART_BYTES * 51)];
        for (offset, length) in extents {
            let extent = Extent::new(offset, length.min(disk_bytes - offset));
            bits.insert(extent);
            set.extend(extent.offset / PART_BYTES..extent.end().div_ceil(PART_BYTES));
        }
        let removed = Extent::new(PART_BYTES * 63, PART_BYTES * 3);
        bits.remove(removed);
        set.retain(|part| !(63..66).contains(part));
        for part in 0..302 {
            assert_eq!(bits.contains(part * PART_BYTES), set.contains(&part), "{part}");
        }
        let mut found = BTreeSet::new();
        let (mut at, mut bytes) = (0, 0);
        while let Some(run) = bits.next_run(at) {
            assert!(run.offset >= at && !run.is_empty());
            found.extend(run.offset / PART_BYTES..run.end().div_ceil(PART_BYTES));
            (at, bytes) = (run.end(), bytes + run.length);
        }
        assert_eq!(found, set);
        assert_eq!(bytes, bits.bytes(), "the last part is shorter");
        assert_eq!(bits.next_run(PART_BYTES * 70 + 100).unwrap().offset, PART_BYTES * 70 + 100);
        assert_eq!((Bits::all(disk_bytes).bytes(), Bits::new(disk_bytes).next_run(0)), (disk_bytes, None));
        let mut united = Bits::new(disk_bytes);
        united.unite(&bits);
        let all_stored = |bits: &Bits| {
            let mut stored = vec![0; bits.stored_bytes() as usize];
            bits.read_stored(0, &mut stored);
            stored
        };
        let mut stored = all_stored(&united);
        assert!(!united.insert(Extent::new(0, 4096)) && united.insert(Extent::new(PART_BYTES * 200, 4096)));
        let (at, changed) = united.stored(Extent::new(PART_BYTES * 200, 4096));
        stored[at as usize..][..changed.len()].copy_from_slice(&changed);
        assert_eq!(stored, all_stored(&united));
        united.remove(Extent::new(PART_BYTES * 200, 4096));
        assert_eq!(united, bits);
        assert!(!united.is_empty());
    }

    /// Of 1 TiB: what is stored is read back the same, whatever it begins with, and only what is there is in memory and read.
    #[test]
    fn a_set_of_a_large_disk_takes_what_is_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        let file = storage.open("map", OpenMode::Create).unwrap();
        let disk_bytes = (1 << 40) + 5 * PART_BYTES + 512;
        let mut bits = Bits::new(disk_bytes);
        assert!(bits.pages.iter().all(Option::is_none));
        let page_disk_bytes = PAGE_PARTS * PART_BYTES;
        let extents = [(3, 1), (page_disk_bytes * 40 - 5000, 20_000), (1 << 39, 64 * PART_BYTES), (disk_bytes - 1, 1)];
        for (offset, length) in extents {
            bits.insert(Extent::new(offset, length));
        }
        bits.insert(Extent::new(1 << 38, PART_BYTES));
        bits.remove(Extent::new(1 << 38, PART_BYTES));
        let at = PAGE_BYTES as u64;
        file.set_bytes(at + bits.stored_bytes()).unwrap();
        for page in bits.filled_pages() {
            let from = (page * PAGE_BYTES) as u64;
            let mut stored = vec![0; (bits.stored_bytes() - from).min(PAGE_BYTES as u64) as usize];
            bits.read_stored(from, &mut stored);
            file.write_at(at + from, &stored).unwrap();
        }
        let loaded = Bits::load(disk_bytes, &*file, at, bits.stored_bytes()).unwrap();
        assert_eq!(loaded, bits);
        assert_eq!(loaded.bytes(), bits.bytes());
        assert_eq!(loaded.filled_pages().count(), 5, "the page that is empty again is not kept");
        let mut other = loaded.clone();
        other.insert(Extent::new(page_disk_bytes * 7, 1));
        assert_eq!(bits.differing_pages(&other).collect::<Vec<_>>(), [7]);
        assert_eq!(bits.run_end(1 << 39, disk_bytes), ((1 << 39) + 64 * PART_BYTES, true));
        assert_eq!(bits.run_end(PART_BYTES, 1 << 39), (page_disk_bytes * 40 - 8192, false));
        assert_eq!(bits.run_end(PART_BYTES + 7, PART_BYTES + 9), (PART_BYTES + 9, false));
        // From the end of a word, over pages that are not there (or empty, of one that was not loaded), to the beginning of one.
        let from = page_disk_bytes * 41 + 63 * PART_BYTES;
        for bits in [&bits, &loaded] {
            assert_eq!(bits.next_run(from), Some(Extent::new(1 << 39, 64 * PART_BYTES)));
        }
        // What is stored behind the end of the disk counts for nothing.
        file.write_at(at + bits.stored_bytes() - 8, &[0xff; 8]).unwrap();
        let loaded = Bits::load(disk_bytes, &*file, at, bits.stored_bytes()).unwrap();
        assert_eq!(loaded.next_run(1 << 40), Some(Extent::new(1 << 40, 5 * PART_BYTES + 512)));
        assert_eq!(loaded.bytes(), bits.bytes() + 5 * PART_BYTES);
    }
}
