//! One bit for each part of a disk, in memory: sets whose size does not grow with how scattered they are.

use crate::Extent;

/// What one bit is of, aligned on the disk. A disk of 1 TiB takes 32 MiB.
pub const PART_BYTES: u64 = 4 << 10;

/// A set of parts of 4 KiB of a disk. The last part may be shorter.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Bits {
    words: Vec<u64>,
    disk_bytes: u64,
}

impl Bits {
    pub fn new(disk_bytes: u64) -> Self {
        Self { words: vec![0; disk_bytes.div_ceil(PART_BYTES).div_ceil(64) as usize], disk_bytes }
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

    /// Whether the part at `offset` is in the set; nothing behind the disk's end is.
    pub fn contains(&self, offset: u64) -> bool {
        let part = offset / PART_BYTES;
        self.words.get((part / 64) as usize).is_some_and(|word| word & (1 << (part % 64)) != 0)
    }

    /// Every part that `extent` touches. Whether one of them is new.
    pub fn insert(&mut self, extent: Extent) -> bool {
        let mut is_new = false;
        self.change(extent, |word, mask| {
            is_new |= *word & mask != mask;
            *word |= mask;
        });
        is_new
    }

    pub fn remove(&mut self, extent: Extent) {
        self.change(extent, |word, mask| *word &= !mask);
    }

    fn change(&mut self, extent: Extent, mut change: impl FnMut(&mut u64, u64)) {
        if extent.is_empty() {
            return;
        }
        let end = extent.end().div_ceil(PART_BYTES).min(self.parts());
        let mut part = extent.offset / PART_BYTES;
        while part < end {
            let until = (part / 64 * 64 + 64).min(end);
            let count = until - part;
            let mask = if count == 64 { u64::MAX } else { ((1 << count) - 1) << (part % 64) };
            change(&mut self.words[(part / 64) as usize], mask);
            part = until;
        }
    }

    pub fn unite(&mut self, other: &Bits) {
        for (word, theirs) in self.words.iter_mut().zip(&other.words) {
            *word |= theirs;
        }
    }

    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// As it is stored: eight bytes for each 64 parts, little end first.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// What was stored of a disk of this size; `None`: it is of another.
    pub fn from_bytes(disk_bytes: u64, bytes: &[u8]) -> Option<Self> {
        let mut bits = Self::new(disk_bytes);
        if bytes.len() != bits.words.len() * 8 {
            return None;
        }
        for (word, stored) in bits.words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(stored.try_into().expect("eight bytes"));
        }
        Some(bits)
    }

    /// Where the parts of `extent` lie in what is stored, and what is stored there.
    pub fn stored(&self, extent: Extent) -> (u64, Vec<u8>) {
        let first = (extent.offset / PART_BYTES / 64) as usize;
        let end = ((extent.end().div_ceil(PART_BYTES)).div_ceil(64) as usize).min(self.words.len());
        let words = self.words.get(first..end).unwrap_or_default();
        (first as u64 * 8, words.iter().flat_map(|word| word.to_le_bytes()).collect())
    }

    /// Bytes of the disk that are in the set.
    pub fn bytes(&self) -> u64 {
        let parts: u64 = self.words.iter().map(|word| u64::from(word.count_ones())).sum();
        let short = match self.disk_bytes % PART_BYTES {
            rest if rest != 0 && self.contains(self.disk_bytes - 1) => PART_BYTES - rest,
            _ => 0,
        };
        parts * PART_BYTES - short
    }

    /// The first run of the set that ends after `from`, cut at `from`.
    pub fn next_run(&self, from: u64) -> Option<Extent> {
        let start = self.find(from / PART_BYTES, true)?;
        let end = self.find(start, false).unwrap_or(self.parts());
        let offset = (start * PART_BYTES).max(from);
        let end = (end * PART_BYTES).min(self.disk_bytes);
        (offset < end).then(|| Extent::new(offset, end - offset))
    }

    /// The first part from `part` on that is in the set, or is not.
    fn find(&self, part: u64, wanted: bool) -> Option<u64> {
        let mut index = (part / 64) as usize;
        let mut ignored = (1u64 << (part % 64)) - 1;
        while index < self.words.len() {
            let word = if wanted { self.words[index] } else { !self.words[index] } & !ignored;
            if word != 0 {
                let found = index as u64 * 64 + u64::from(word.trailing_zeros());
                return (found < self.parts()).then_some(found);
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
        let mut stored = united.to_bytes();
        assert!(!united.insert(Extent::new(0, 4096)) && united.insert(Extent::new(PART_BYTES * 200, 4096)));
        let (at, changed) = united.stored(Extent::new(PART_BYTES * 200, 4096));
        stored[at as usize..][..changed.len()].copy_from_slice(&changed);
        assert_eq!(Bits::from_bytes(disk_bytes, &stored).unwrap(), united);
        assert_eq!(Bits::from_bytes(PART_BYTES, &stored), None);
        united.remove(Extent::new(PART_BYTES * 200, 4096));
        assert_eq!(united, bits);
        assert!(!united.is_empty());
    }
}
