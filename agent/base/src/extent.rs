//! Ranges of a disk, sets of them, and maps from them in which a later range replaces an earlier one.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// A range of a disk: `length` bytes from `offset`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Extent {
    pub offset: u64,
    pub length: u64,
}

impl Extent {
    pub fn new(offset: u64, length: u64) -> Self {
        Self { offset, length }
    }

    /// One past the last byte. Saturates, so that an unchecked extent cannot wrap round to a small number.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }

    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    pub fn overlaps(&self, other: &Extent) -> bool {
        self.offset < other.end() && other.offset < self.end()
    }

    pub fn contains(&self, other: &Extent) -> bool {
        self.offset <= other.offset && other.end() <= self.end()
    }

    pub fn intersection(&self, other: &Extent) -> Option<Extent> {
        let (offset, end) = (self.offset.max(other.offset), self.end().min(other.end()));
        (offset < end).then(|| Extent::new(offset, end - offset))
    }

    /// Whether this lies on a disk of `disk_bytes` and on its sectors, without overflow and not empty.
    pub fn is_valid_on(&self, disk_bytes: u64) -> bool {
        self.length > 0
            && self.offset.is_multiple_of(crate::SECTOR_BYTES)
            && self.length.is_multiple_of(crate::SECTOR_BYTES)
            && self.offset.checked_add(self.length).is_some_and(|end| end <= disk_bytes)
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.offset, self.length)
    }
}

impl fmt::Debug for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A map from ranges to values: inserting a range replaces what it covers of earlier ones.
///
/// `V` is told when its range is cut: [`Sliced::slice`] gives the value for a part.
#[derive(Clone, Debug)]
pub struct ExtentMap<V> {
    // offset → (length, value); ranges never overlap and are never empty
    ranges: BTreeMap<u64, (u64, V)>,
}

/// A value of an [`ExtentMap`], which knows how to name a part of itself.
pub trait Sliced: Clone {
    /// The value for the part that begins `skip` bytes into this one's range.
    fn slice(&self, skip: u64) -> Self;
}

impl Sliced for () {
    fn slice(&self, _skip: u64) -> Self {}
}

impl<V> Default for ExtentMap<V> {
    fn default() -> Self {
        Self { ranges: BTreeMap::new() }
    }
}

impl<V: Sliced> ExtentMap<V> {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    pub fn clear(&mut self) {
        self.ranges.clear();
    }

    /// Sets `extent` to `value`; whatever overlapped keeps only its parts outside.
    pub fn insert(&mut self, extent: Extent, value: V) {
        self.remove(extent);
        if !extent.is_empty() {
            self.ranges.insert(extent.offset, (extent.length, value));
        }
    }

    /// Cuts `extent` out of the map.
    pub fn remove(&mut self, extent: Extent) {
        if extent.is_empty() {
            return;
        }
        if let Some((&offset, (length, value))) = self.ranges.range_mut(..extent.offset).next_back() {
            let end = offset + *length;
            if end > extent.offset {
                *length = extent.offset - offset;
                if end > extent.end() {
                    let tail = value.slice(extent.end() - offset);
                    self.ranges.insert(extent.end(), (end - extent.end(), tail));
                    return;
                }
            }
        }
        while let Some((&offset, &(length, _))) = self.ranges.range(extent.offset..extent.end()).next() {
            let (_, value) = self.ranges.remove(&offset).expect("the range was just found");
            if offset + length > extent.end() {
                let skip = extent.end() - offset;
                self.ranges.insert(extent.end(), (length - skip, value.slice(skip)));
                return;
            }
        }
    }

    /// The ranges in order of offset.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (Extent, &V)> {
        self.ranges.iter().map(|(&offset, (length, value))| (Extent::new(offset, *length), value))
    }

    /// The parts of ranges that lie in `within`, in order of offset.
    pub fn overlapping(&self, within: Extent) -> impl Iterator<Item = (Extent, V)> {
        let first = self
            .ranges
            .range(..within.offset)
            .next_back()
            .filter(|(offset, (length, _))| *offset + length > within.offset);
        first.into_iter().chain(self.ranges.range(within.offset..within.end().max(within.offset))).filter_map(
            move |(&offset, (length, value))| {
                let part = Extent::new(offset, *length).intersection(&within)?;
                Some((part, value.slice(part.offset - offset)))
            },
        )
    }

    /// The parts of `within` that the map does not cover, in order of offset.
    pub fn gaps(&self, within: Extent) -> Vec<Extent> {
        let mut gaps = Vec::new();
        let mut at = within.offset;
        for (part, _) in self.overlapping(within) {
            if part.offset > at {
                gaps.push(Extent::new(at, part.offset - at));
            }
            at = part.end();
        }
        if at < within.end() {
            gaps.push(Extent::new(at, within.end() - at));
        }
        gaps
    }

    /// Takes the first range out of the map.
    pub fn pop_first(&mut self) -> Option<(Extent, V)> {
        self.ranges.pop_first().map(|(offset, (length, value))| (Extent::new(offset, length), value))
    }
}

/// A set of ranges; touching ranges become one.
#[derive(Clone, Debug, Default)]
pub struct ExtentSet {
    map: ExtentMap<()>,
}

impl ExtentSet {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// How many separate ranges there are.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    pub fn insert(&mut self, extent: Extent) {
        if extent.is_empty() {
            return;
        }
        let (mut start, mut end) = (extent.offset, extent.end());
        if let Some((&offset, &(length, ()))) = self.map.ranges.range(..=start).next_back()
            && offset + length >= start
        {
            start = offset;
            end = end.max(offset + length);
        }
        while let Some((&offset, &(length, ()))) = self.map.ranges.range(start..=end).next() {
            end = end.max(offset + length);
            self.map.ranges.remove(&offset);
        }
        self.map.ranges.insert(start, (end - start, ()));
    }

    pub fn remove(&mut self, extent: Extent) {
        self.map.remove(extent);
    }

    pub fn iter(&self) -> impl DoubleEndedIterator<Item = Extent> {
        self.map.iter().map(|(extent, ())| extent)
    }

    pub fn overlapping(&self, within: Extent) -> impl Iterator<Item = Extent> {
        self.map.overlapping(within).map(|(extent, ())| extent)
    }

    pub fn gaps(&self, within: Extent) -> Vec<Extent> {
        self.map.gaps(within)
    }

    pub fn total_bytes(&self) -> u64 {
        self.iter().map(|extent| extent.length).sum()
    }

    pub fn clear(&mut self) {
        self.map.clear();
    }
}

impl FromIterator<Extent> for ExtentSet {
    fn from_iter<I: IntoIterator<Item = Extent>>(extents: I) -> Self {
        let mut set = Self::new();
        extents.into_iter().for_each(|extent| set.insert(extent));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Copy, PartialEq, Debug)]
    struct Source(u64);

    impl Sliced for Source {
        fn slice(&self, skip: u64) -> Self {
            Source(self.0 + skip)
        }
    }

    proptest! {
        /// The oracle is an array with one cell a byte.
        #[test]
        fn the_map_equals_an_array(operations in prop::collection::vec((0u64..64, 0u64..32, any::<bool>()), 1..60), from in 0u64..64, length in 0u64..64) {
            let mut map = ExtentMap::new();
            let mut array = [None; 128];
            for (number, (offset, length, insert)) in operations.into_iter().enumerate() {
                let extent = Extent::new(offset, length);
                let base = 1000 * number as u64;
                if insert { map.insert(extent, Source(base)) } else { map.remove(extent) }
                for index in offset..offset + length {
                    array[index as usize] = insert.then_some(base + index - offset);
                }
            }
            let within = Extent::new(from, length);
            let mut seen = [None; 128];
            for (part, source) in map.overlapping(within) {
                prop_assert!(within.contains(&part) && !part.is_empty());
                for index in 0..part.length {
                    seen[(part.offset + index) as usize] = Some(source.0 + index);
                }
            }
            for index in from..from + length {
                prop_assert_eq!(seen[index as usize], array[index as usize]);
            }
            let uncovered: u64 = map.gaps(within).iter().map(|gap| gap.length).sum();
            prop_assert_eq!(uncovered, (from..from + length).filter(|&index| array[index as usize].is_none()).count() as u64);
            prop_assert_eq!(map.iter().map(|(extent, _)| extent.length).sum::<u64>(), array.iter().flatten().count() as u64);
        }

        #[test]
        fn the_set_equals_an_array(operations in prop::collection::vec((0u64..64, 0u64..32, any::<bool>()), 1..60)) {
            let mut set = ExtentSet::new();
            let mut array = [false; 128];
            for (offset, length, insert) in operations {
                let extent = Extent::new(offset, length);
                if insert { set.insert(extent) } else { set.remove(extent) }
                array[offset as usize..(offset + length) as usize].fill(insert);
            }
            let ranges: Vec<Extent> = set.iter().collect();
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end() < pair[1].offset || pair[0].end() == pair[1].offset));
            let mut seen = [false; 128];
            ranges.iter().for_each(|range| seen[range.offset as usize..range.end() as usize].fill(true));
            prop_assert_eq!(seen, array);
        }
    }

    #[test]
    fn an_extent_that_wraps_is_not_valid() {
        assert!(!Extent::new(u64::MAX - 511, 1024).is_valid_on(u64::MAX));
        assert!(!Extent::new(0, 0).is_valid_on(4096));
        assert!(!Extent::new(1, 512).is_valid_on(4096));
        assert!(Extent::new(3584, 512).is_valid_on(4096));
        assert!(!Extent::new(4096, 512).is_valid_on(4096));
    }
}
