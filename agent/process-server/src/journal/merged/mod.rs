#![doc = include_str!("FORMAT.md")]

mod writer;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tidemark_base::storage::{OpenMode, Storage};
use tidemark_base::{DiskId, Extent, ExtentMap, extent::Sliced};

use super::error::ReadError;
use super::index::{Entry, IndexFile, Located, Place, Sorted, Table};
use super::sealed::Sealed;
use super::segment::Fields;
use super::{Found, Part};
use crate::view::cache::{BlockCache, FileNumber};
pub use writer::{MergeError, merge};

/// How many indexes of one level become one of the next.
pub const FANOUT: usize = 4;
/// More segments than this are in no one index: bounds its directory.
const MEMBERS_MAX: u64 = 1 << 20;
const DIRECTORY_BYTES_MAX: u64 = 256 << 20;
const MEMBER_BYTES: usize = 48;
const FOOTER_BYTES: usize = 512;
const MAGIC: [u8; 8] = *b"TDMKIDX1";

/// An extent, and which member's chunk holds it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MergedEntry {
    pub entry: Entry,
    pub member: u32,
}

impl Located for MergedEntry {
    const BYTES: usize = 48;

    fn encode(&self, out: &mut Vec<u8>) {
        self.entry.encode(out);
        out.extend_from_slice(&self.member.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
    }

    fn decode(bytes: &[u8]) -> Self {
        let (entry, member) = bytes.split_at(Entry::BYTES);
        let member = u32::from_le_bytes(member[..4].try_into().expect("four bytes"));
        Self { entry: Entry::decode(entry), member }
    }

    fn extent(&self) -> Extent {
        self.entry.extent
    }
}

/// A segment that an index speaks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Member {
    pub first: u64,
    pub last: u64,
    /// The end of its header: its hash. Where cuts of it are damaged, the hash of that and of their numbers: an index that
    /// was made while they were whole is of another segment.
    pub head: [u8; 32],
}

impl Member {
    fn of(sealed: &Sealed) -> Self {
        let mut damaged = sealed.damaged_cuts().peekable();
        let head = if damaged.peek().is_none() {
            sealed.head_hash
        } else {
            let mut hasher = blake3::Hasher::new_keyed(&sealed.head_hash);
            damaged.for_each(|cut| {
                hasher.update(&cut.to_le_bytes());
            });
            *hasher.finalize().as_bytes()
        };
        Self { first: sealed.first_cut(), last: sealed.last_cut, head }
    }
}

/// One merged index, opened: the directory is in memory.
pub struct Merged {
    file: IndexFile,
    pub first: u64,
    pub last: u64,
    pub level: u32,
    pub bytes: u64,
    members: Vec<Member>,
    entries: Sorted<MergedEntry>,
    damaged: AtomicBool,
}

pub fn name_of(first: u64, last: u64) -> String {
    format!("segments/idx-{first:016x}-{last:016x}.merged")
}

fn temporary(first: u64, last: u64) -> String {
    format!("segments/idx-{first:016x}-{last:016x}.new")
}

/// The cuts that an index's name claims.
pub fn parse_name(name: &str) -> Option<(u64, u64)> {
    let (first, last) = name.strip_prefix("idx-")?.strip_suffix(".merged")?.split_once('-')?;
    let number = |text: &str| if text.len() == 16 { u64::from_str_radix(text, 16).ok() } else { None };
    Some((number(first)?, number(last)?))
}

/// What a merge that did not end left.
pub fn is_temporary(name: &str) -> bool {
    name.starts_with("idx-") && name.ends_with(".new")
}

fn footer_of(disk: DiskId, numbers: [u64; 7], directory_hash: &[u8; 32]) -> Vec<u8> {
    let mut footer = Vec::with_capacity(FOOTER_BYTES);
    footer.extend_from_slice(&MAGIC);
    footer.extend_from_slice(disk.as_bytes());
    numbers.iter().for_each(|number| footer.extend_from_slice(&number.to_le_bytes()));
    footer.extend_from_slice(directory_hash);
    footer.resize(FOOTER_BYTES - 32, 0);
    let hash = blake3::hash(&footer);
    footer.extend_from_slice(hash.as_bytes());
    footer
}

impl Merged {
    /// Reads footer and directory, and proves them.
    pub fn open(storage: &dyn Storage, disk: DiskId, first: u64, last: u64) -> Result<Self, ReadError> {
        let path = name_of(first, last);
        let name = storage.path(&path).display().to_string();
        let file =
            storage.open(&path, OpenMode::Read).map_err(|source| ReadError::Io { file: name.clone(), source })?;
        let file = IndexFile { file, number: FileNumber::next(), name };
        Self::read(file, disk, first, last)
    }

    fn read(file: IndexFile, disk: DiskId, first: u64, last: u64) -> Result<Self, ReadError> {
        let damaged = |what: &str| ReadError::damaged(&file.name, what);
        let bytes = file.bytes()?;
        let foot_at = bytes.checked_sub(FOOTER_BYTES as u64).ok_or_else(|| damaged("too short to be an index"))?;
        let foot = file.read(foot_at, FOOTER_BYTES)?;
        let (content, hash) = foot.split_at(FOOTER_BYTES - 32);
        if content[..8] != MAGIC || blake3::hash(content).as_bytes() != hash {
            return Err(damaged("the footer's hash does not hold"));
        }
        let mut fields = Fields(&content[8..]);
        let short = || damaged("the directory is too short");
        let of_disk = fields.take(16).and_then(DiskId::from_slice);
        let mut number = || fields.u64().expect("the footer is 512 bytes");
        let (found_first, found_last, level, entries) = (number(), number(), number(), number());
        let (member_count, directory_at, directory_bytes) = (number(), number(), number());
        let directory_hash: [u8; 32] = fields.array().expect("the footer is 512 bytes");
        if of_disk != Some(disk) || (found_first, found_last) != (first, last) {
            return Err(damaged("its name and its footer differ"));
        }
        let ends_at_footer = directory_at.checked_add(directory_bytes) == Some(foot_at);
        if !ends_at_footer || directory_bytes > DIRECTORY_BYTES_MAX || member_count > MEMBERS_MAX || level > 64 {
            return Err(damaged("its footer claims what cannot be"));
        }
        let directory = file.read(directory_at, directory_bytes as usize)?;
        if *blake3::hash(&directory).as_bytes() != directory_hash {
            return Err(damaged("the directory's hash does not hold"));
        }
        let mut fields = Fields(&directory);
        if entries.checked_mul(MergedEntry::BYTES as u64) != Some(directory_at) {
            return Err(damaged("its footer claims what cannot be"));
        }
        let pages = Table::pages(entries, MergedEntry::BYTES);
        let page_hashes = (0..pages).map(|_| fields.array()).collect::<Option<Vec<_>>>().ok_or_else(short)?;
        let fences = (0..pages).map(|_| fields.u64()).collect::<Option<Vec<_>>>().ok_or_else(short)?;
        let members = (0..member_count)
            .map(|_| Some(Member { first: fields.u64()?, last: fields.u64()?, head: fields.array()? }))
            .collect::<Option<Vec<_>>>()
            .ok_or_else(short)?;
        if !fields.0.is_empty() || members.is_empty() {
            return Err(damaged("the directory has another length"));
        }
        let table = Table { at: 0, entries, width: MergedEntry::BYTES, page_hashes };
        Ok(Self {
            file,
            first,
            last,
            level: level as u32,
            bytes,
            members,
            entries: Sorted::new(table, fences),
            damaged: AtomicBool::new(false),
        })
    }

    pub fn name(&self) -> &str {
        &self.file.name
    }

    /// A page of it did not prove itself: it is to be made again.
    pub fn is_damaged(&self) -> bool {
        self.damaged.load(Ordering::Acquire)
    }

    fn note<T>(&self, result: Result<T, ReadError>) -> Result<T, ReadError> {
        if let Err(ReadError::Damaged { .. }) = &result
            && !self.damaged.swap(true, Ordering::AcqRel)
        {
            tracing::error!(
                index = self.file.name,
                "a merged index is damaged; its segments are asked instead, and it is made again"
            );
        }
        result
    }

    /// Reads every page, past the cache.
    pub fn check(&self) -> Result<(), ReadError> {
        // The directory is read again as well: what is in memory may be sound while the file is not.
        let file = IndexFile { file: self.file.file.clone(), number: self.file.number, name: self.file.name.clone() };
        let foot = file.read(self.bytes.saturating_sub(FOOTER_BYTES as u64), FOOTER_BYTES)?;
        let disk = foot.get(8..24).and_then(DiskId::from_slice).unwrap_or(DiskId::from_bytes([0; 16]));
        let read = Self::read(file, disk, self.first, self.last);
        let pages = read.and_then(|found| {
            (0..Table::pages(found.entries.table.entries, MergedEntry::BYTES))
                .try_for_each(|page| found.entries.table.read_page(page, &found.file).map(drop))
        });
        self.note(pages)
    }
}

/// A merged index as one view uses it: members that were folded away are none.
#[derive(Clone)]
pub struct MergedLayer {
    pub index: Arc<Merged>,
    members: Arc<[Option<Arc<Sealed>>]>,
}

impl MergedLayer {
    fn live(&self, entry: &MergedEntry) -> Option<&Arc<Sealed>> {
        self.members.get(entry.member as usize)?.as_ref()
    }

    pub fn overlapping<'a>(
        &'a self,
        within: Extent,
        cache: &BlockCache,
        found: &mut dyn FnMut(Found<'a>),
    ) -> Result<(), ReadError> {
        if !self.index.is_damaged() {
            // Collected first: what a damaged page interrupts must not be told twice.
            let mut pieces = Vec::new();
            let entries =
                self.index.entries.overlapping(within, &self.index.file, cache, &mut |entry: MergedEntry, part| {
                    if let Some(sealed) = self.live(&entry) {
                        let place = entry.entry.place.slice(part.offset - entry.entry.extent.offset);
                        pieces.push(Found { extent: part, place, segment: &sealed.segment });
                    }
                });
            match self.index.note(entries) {
                Ok(()) => {
                    pieces.into_iter().for_each(found);
                    return Ok(());
                }
                Err(ReadError::Damaged { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        self.ask_members(within, cache, found)
    }

    /// As the members know it, one by one.
    fn ask_members<'a>(
        &'a self,
        within: Extent,
        cache: &BlockCache,
        found: &mut dyn FnMut(Found<'a>),
    ) -> Result<(), ReadError> {
        let mut newest: ExtentMap<MemberPlace> = ExtentMap::new();
        for (member, sealed) in self.members.iter().enumerate() {
            let Some(sealed) = sealed else { continue };
            sealed.overlapping(within, cache, &mut |extent, place| {
                newest.insert(extent, MemberPlace { member, place })
            })?;
        }
        for (extent, at) in newest.iter() {
            if let Some(sealed) = &self.members[at.member] {
                found(Found { extent, place: at.place, segment: &sealed.segment });
            }
        }
        Ok(())
    }

    /// The first part at or after `offset` that a member covers.
    pub fn next(&self, offset: u64, cache: &BlockCache) -> Result<Option<(Extent, Place)>, ReadError> {
        if !self.index.is_damaged() {
            let next =
                self.index.entries.first_from(offset, &self.index.file, cache, |entry| self.live(entry).is_some());
            match self.index.note(next) {
                Ok(found) => {
                    return Ok(found.map(|(entry, part)| {
                        (part, entry.entry.place.slice(part.offset - entry.entry.extent.offset))
                    }));
                }
                Err(ReadError::Damaged { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let mut first: Option<u64> = None;
        for sealed in self.members.iter().flatten() {
            if let Some((extent, _)) = sealed.next(offset, cache)? {
                first = Some(first.map_or(extent.offset, |first| first.min(extent.offset)));
            }
        }
        let Some(first) = first else { return Ok(None) };
        let mut found = None;
        self.ask_members(Extent::new(first, 1 << 20), cache, &mut |piece| {
            found.get_or_insert((piece.extent, piece.place));
        })?;
        Ok(found)
    }
}

#[derive(Clone)]
struct MemberPlace {
    member: usize,
    place: Place,
}

impl Sliced for MemberPlace {
    fn slice(&self, skip: u64) -> Self {
        Self { member: self.member, place: self.place.slice(skip) }
    }
}

/// What is merged: a segment, or an index of the level below.
#[derive(Clone)]
pub enum Child {
    Segment(Arc<Sealed>),
    Index(MergedLayer),
}

impl Child {
    fn first(&self) -> u64 {
        match self {
            Child::Segment(sealed) => sealed.first_cut(),
            Child::Index(layer) => layer.index.first,
        }
    }

    fn last(&self) -> u64 {
        match self {
            Child::Segment(sealed) => sealed.last_cut,
            Child::Index(layer) => layer.index.last,
        }
    }

    fn level(&self) -> u32 {
        match self {
            Child::Segment(_) => 0,
            Child::Index(layer) => layer.index.level,
        }
    }
}

/// All merged indexes of a journal.
#[derive(Default)]
pub struct Levels {
    /// By last cut, then first: the longest index that ends somewhere comes first.
    indexes: BTreeMap<(u64, u64), Arc<Merged>>,
}

impl Levels {
    pub fn insert(&mut self, index: Arc<Merged>) {
        self.indexes.insert((index.last, index.first), index);
    }

    pub fn remove(&mut self, first: u64, last: u64) {
        self.indexes.remove(&(last, first));
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<Merged>> {
        self.indexes.values()
    }

    /// Whether every member that is not folded is the segment that it was made of.
    pub fn fits(index: &Merged, parts: &VecDeque<Part>, base: u64) -> bool {
        index
            .members
            .iter()
            .filter(|member| member.last > base)
            .all(|member| sealed_at(parts, member.first).is_some_and(|sealed| Member::of(sealed) == *member))
    }

    /// The longest index that ends with this cut.
    pub fn ending_at(&self, last: u64, parts: &VecDeque<Part>) -> Option<MergedLayer> {
        let (_, index) = self.indexes.range((last, 0)..=(last, u64::MAX)).next()?;
        Some(layer(index, parts))
    }

    /// Takes out the indexes whose segments are all gone; returns their names.
    pub fn drop_up_to(&mut self, base: u64) -> Vec<String> {
        let mut gone = Vec::new();
        while let Some(entry) = self.indexes.first_entry().filter(|entry| entry.key().0 <= base) {
            let index = entry.remove();
            gone.push(name_of(index.first, index.last));
        }
        gone
    }

    /// Those that a read found to be damaged.
    pub fn damaged(&self) -> Vec<Arc<Merged>> {
        self.indexes.values().filter(|index| index.is_damaged()).cloned().collect()
    }

    /// The next run of neighbours that becomes one index, if there is one: the lowest level first.
    pub fn due(&self, parts: &VecDeque<Part>) -> Option<Vec<Child>> {
        let segments = parts.iter().filter_map(|part| match part {
            Part::Sealed(sealed) => Some(Child::Segment(sealed.clone())),
            Part::Broken { .. } => None,
        });
        let mut units: Vec<Child> = segments.collect();
        let mut level = 1;
        loop {
            let mut above: Vec<&Arc<Merged>> = self.indexes.values().filter(|index| index.level == level).collect();
            above.sort_by_key(|index| index.first);
            let covered = |unit: &Child| {
                let at = above.partition_point(|index| index.first <= unit.first());
                at.checked_sub(1).is_some_and(|at| unit.last() <= above[at].last)
            };
            let mut run: Vec<&Child> = Vec::new();
            for unit in &units {
                if covered(unit) || run.last().is_some_and(|before| before.last() + 1 != unit.first()) {
                    run.clear();
                }
                if !covered(unit) {
                    run.push(unit);
                }
                if run.len() == FANOUT {
                    return Some(run.into_iter().cloned().collect());
                }
            }
            if above.len() < FANOUT {
                return None;
            }
            units = above.into_iter().map(|index| Child::Index(layer(index, parts))).collect();
            level += 1;
        }
    }
}

fn sealed_at(parts: &VecDeque<Part>, first: u64) -> Option<&Arc<Sealed>> {
    let index = parts.partition_point(|part| part.first() < first);
    match parts.get(index)? {
        Part::Sealed(sealed) if sealed.first_cut() == first => Some(sealed),
        _ => None,
    }
}

fn layer(index: &Arc<Merged>, parts: &VecDeque<Part>) -> MergedLayer {
    let members = index
        .members
        .iter()
        .map(|member| sealed_at(parts, member.first).filter(|sealed| Member::of(sealed) == *member).cloned());
    MergedLayer { index: index.clone(), members: members.collect() }
}
