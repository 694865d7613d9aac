//! Sealed segments: writing the index, and reading through it.

use std::io;
use std::sync::Arc;

use tidemark_base::chunk::ChunkKey;
use tidemark_base::extent::Sliced;
use tidemark_base::storage::{OpenMode, Storage};
use tidemark_base::sync::Mutex;
use tidemark_base::{Extent, ExtentMap, Position, Timestamp};

use super::error::ReadError;
use super::index::{
    COMMIT_ENTRY_BYTES, CommitEntry, Cursor, ENTRY_BYTES, Entry, IndexFile, Located, PAGE_BYTES, Place, SegmentFile,
    Sorted, Table, flatten, page_hash,
};
use super::recovery::{DamagedCut, Inspection, inspect, recover};
use super::segment::{
    COMMIT_BYTES_MAX, Commit, FRAME_HEADER_BYTES, Fields, FrameKey, FrameKind, HEADER_BYTES, Header, POSITION_BYTES,
    SegmentName, decode_commit, put_position,
};
use crate::view::cache::{BlockCache, FileNumber};

pub const FOOTER_BYTES: usize = 512;
const FOOTER_MAGIC: [u8; 8] = *b"TDMKEND1";
/// As blocks of the base ([`crate::fold::base`]) are counted.
const BASE_BLOCK_BYTES: u64 = 4096;
/// A directory longer than this is not ours: (entries of the largest cut) / (entries a page) × (hash + fence), doubled.
const DIRECTORY_BYTES_MAX: u64 = 64 << 20;

/// A cut at which consistency changes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Boundary {
    pub cut: u64,
    pub what: BoundaryKind,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BoundaryKind {
    ScanStart = 3,
    ScanEnd = 4,
    Damaged = 9,
}

/// What an active segment knows when it is sealed.
pub struct Contents<'a> {
    pub entries: &'a [Entry],
    pub commits: &'a [CommitEntry],
    pub boundaries: &'a [Boundary],
    pub data_end: u64,
    pub last_position: Option<Position>,
    pub last_time: Timestamp,
    pub last_commit: [u8; 32],
}

/// An immutable segment, opened: the directory is in memory (24 bytes for 408 extents), everything else on disk.
pub struct Sealed {
    pub segment: Arc<SegmentFile>,
    pub header: Header,
    pub frame_key: FrameKey,
    pub last_cut: u64,
    pub last_position: Option<Position>,
    pub last_time: Timestamp,
    pub last_commit: [u8; 32],
    pub data_end: u64,
    pub file_bytes: u64,
    /// What its data takes in the base at most.
    pub base_bytes: u64,
    pub boundaries: Vec<Boundary>,
    /// The hash that ends the header.
    pub head_hash: [u8; 32],
    log: Table,
    commits: Table,
    flat: Sorted<Entry>,
    /// The index, made again from the frames, when a page of it is damaged.
    rescued: Mutex<Option<Option<Arc<Rescued>>>>,
}

/// What the index says, read from the frames.
struct Rescued {
    flat: ExtentMap<Place>,
    entries: Vec<Entry>,
    commits: Vec<CommitEntry>,
}

/// The index and footer of a segment, to be written at `contents.data_end`.
pub fn encode_index(header: &[u8; HEADER_BYTES], contents: &Contents<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    let mut directory = Vec::new();
    let mut places = Vec::new();
    let mut table = |bytes: Vec<u8>, entries: usize, out: &mut Vec<u8>| {
        let at = contents.data_end + out.len() as u64;
        for (number, page) in bytes.chunks(PAGE_BYTES).enumerate() {
            directory.extend_from_slice(&page_hash(page, at + (number * PAGE_BYTES) as u64));
        }
        out.extend_from_slice(&bytes);
        places.extend([at, entries as u64]);
    };
    let mut bytes = Vec::with_capacity(contents.entries.len() * ENTRY_BYTES);
    contents.entries.iter().for_each(|entry| entry.encode(&mut bytes));
    table(bytes, contents.entries.len(), &mut out);

    let mut bytes = Vec::with_capacity(contents.commits.len() * COMMIT_ENTRY_BYTES);
    contents.commits.iter().for_each(|commit| commit.encode(&mut bytes));
    table(bytes, contents.commits.len(), &mut out);

    let flat = flatten(contents.entries);
    let blocks = |extent: Extent| extent.end().div_ceil(BASE_BLOCK_BYTES) - extent.offset / BASE_BLOCK_BYTES;
    let data = flat.iter().filter(|(_, place)| !place.is_zeroes());
    let base_bytes = data.map(|(extent, _)| blocks(extent) * BASE_BLOCK_BYTES).sum::<u64>();
    let mut fences = Vec::new();
    let mut bytes = Vec::with_capacity(flat.len() * ENTRY_BYTES);
    for (number, (extent, place)) in flat.iter().enumerate() {
        if number.is_multiple_of(PAGE_BYTES / ENTRY_BYTES) {
            fences.extend_from_slice(&extent.offset.to_le_bytes());
        }
        Entry { extent, place: *place }.encode(&mut bytes);
    }
    table(bytes, flat.len(), &mut out);
    directory.extend_from_slice(&fences);
    for boundary in contents.boundaries {
        directory.extend_from_slice(&boundary.cut.to_le_bytes());
        directory.extend_from_slice(&(boundary.what as u64).to_le_bytes());
    }
    let directory_at = contents.data_end + out.len() as u64;
    out.extend_from_slice(&directory);

    let mut footer = Vec::with_capacity(FOOTER_BYTES);
    footer.extend_from_slice(&FOOTER_MAGIC);
    places.iter().for_each(|number| footer.extend_from_slice(&number.to_le_bytes()));
    for number in [
        directory_at,
        directory.len() as u64,
        contents.boundaries.len() as u64,
        contents.data_end,
        contents.last_time.0,
        u64::from(contents.last_position.is_some()),
    ] {
        footer.extend_from_slice(&number.to_le_bytes());
    }
    match &contents.last_position {
        Some(position) => put_position(&mut footer, position),
        None => footer.resize(footer.len() + POSITION_BYTES, 0),
    }
    footer.extend_from_slice(&contents.last_commit);
    footer.extend_from_slice(blake3::hash(&directory).as_bytes());
    footer.extend_from_slice(&base_bytes.to_le_bytes());
    footer.resize(FOOTER_BYTES - 32, 0);
    let hash = footer_hash(header, &footer);
    footer.extend_from_slice(&hash);
    out.extend_from_slice(&footer);
    out
}

fn footer_hash(header: &[u8; HEADER_BYTES], footer: &[u8]) -> [u8; 32] {
    let key: [u8; 32] = header[HEADER_BYTES - 32..].try_into().expect("32 bytes");
    *blake3::keyed_hash(&key, footer).as_bytes()
}

impl Sealed {
    /// Reads header, footer and directory, and proves them.
    pub fn open(storage: &dyn Storage, first: u64, last: u64) -> Result<Self, ReadError> {
        let path = SegmentName::Sealed { first, last }.path();
        let name = storage.path(&path).display().to_string();
        let io = |source: io::Error| ReadError::Io { file: name.clone(), source };
        let damaged = |what: &str| ReadError::damaged(&name, what);
        let file = storage.open(&path, OpenMode::Read).map_err(io)?;
        let file_bytes = file.bytes().map_err(io)?;
        if file_bytes < (HEADER_BYTES + FOOTER_BYTES) as u64 {
            return Err(damaged("too short to be a sealed segment"));
        }
        let mut head = [0; HEADER_BYTES];
        file.read_at(0, &mut head).map_err(io)?;
        let header = Header::decode(&head).map_err(damaged)?;
        let mut foot = [0; FOOTER_BYTES];
        file.read_at(file_bytes - FOOTER_BYTES as u64, &mut foot).map_err(io)?;
        let (content, hash) = foot.split_at(FOOTER_BYTES - 32);
        if content[..8] != FOOTER_MAGIC || footer_hash(&head, content) != hash {
            return Err(damaged("the footer's hash does not hold"));
        }
        let mut fields = Fields(&content[8..]);
        let mut number = || fields.u64().expect("the footer is 512 bytes");
        let mut table = |width: usize| {
            let (at, entries) = (number(), number());
            Table { at, entries, width, page_hashes: Vec::new() }
        };
        let (mut log, mut commits, mut flat) = (table(ENTRY_BYTES), table(COMMIT_ENTRY_BYTES), table(ENTRY_BYTES));
        let (directory_at, directory_bytes, boundary_count) = (number(), number(), number());
        let (data_end, last_time, has_position) = (number(), Timestamp(number()), number() != 0);
        let last_position = fields.position().filter(|_| has_position);
        let last_commit = fields.array().expect("the footer is 512 bytes");
        let directory_hash: [u8; 32] = fields.array().expect("the footer is 512 bytes");
        let base_bytes = fields.u64().expect("the footer is 512 bytes");
        let in_file = |at: u64, bytes: Option<u64>| {
            bytes.and_then(|bytes| at.checked_add(bytes)).is_some_and(|end| end <= file_bytes)
        };
        let whole = [&log, &commits, &flat]
            .iter()
            .all(|table| in_file(table.at, table.entries.checked_mul(table.width as u64)));
        if !whole || !in_file(directory_at, Some(directory_bytes)) || directory_bytes > DIRECTORY_BYTES_MAX {
            return Err(damaged("its footer claims what cannot be"));
        }
        if header.first_cut != first
            || last.checked_sub(first).and_then(|cuts| cuts.checked_add(1)) != Some(commits.entries)
        {
            return Err(damaged("its name and its footer differ"));
        }
        let mut directory = vec![0; directory_bytes as usize];
        file.read_at(directory_at, &mut directory).map_err(io)?;
        if *blake3::hash(&directory).as_bytes() != directory_hash {
            return Err(damaged("the directory's hash does not hold"));
        }
        let mut fields = Fields(&directory);
        let short = || damaged("the directory is too short");
        for table in [&mut log, &mut commits, &mut flat] {
            for _ in 0..Table::pages(table.entries, table.width) {
                table.page_hashes.push(fields.array().ok_or_else(short)?);
            }
        }
        let fences = (0..flat.page_hashes.len()).map(|_| fields.u64()).collect::<Option<Vec<_>>>().ok_or_else(short)?;
        let mut boundaries = Vec::new();
        for _ in 0..boundary_count {
            let cut = fields.u64().ok_or_else(short)?;
            let what = match fields.u64().ok_or_else(short)? {
                3 => BoundaryKind::ScanStart,
                4 => BoundaryKind::ScanEnd,
                9 => BoundaryKind::Damaged,
                _ => return Err(damaged("a boundary of an unknown kind")),
            };
            boundaries.push(Boundary { cut, what });
        }
        let segment = SegmentFile {
            source: IndexFile { file, number: FileNumber::next(), name },
            key: ChunkKey::new(header.disk, header.generation),
            disk_bytes: header.disk_bytes,
        };
        Ok(Self {
            segment: Arc::new(segment),
            frame_key: FrameKey::new(&head),
            header,
            last_cut: last,
            last_position,
            last_time,
            last_commit,
            data_end,
            file_bytes,
            base_bytes,
            boundaries,
            head_hash: head[HEADER_BYTES - 32..].try_into().expect("32 bytes"),
            log,
            commits,
            flat: Sorted::new(flat, fences),
            rescued: Mutex::new(None),
        })
    }

    /// Makes index and footer again from the frames, and the header of one that is in use from memory, in a copy that
    /// replaces the file. `None`: the frames do not hold every
    /// cut that the name claims, or, for one that is in use, not every cut that it holds: views would silently show what
    /// was there before a cut that the new index leaves out.
    pub(crate) fn rebuild(
        storage: &dyn Storage,
        first: u64,
        last: u64,
        in_use: Option<&Self>,
    ) -> Result<Option<Self>, ReadError> {
        let path = SegmentName::Sealed { first, last }.path();
        let name = storage.path(&path).display().to_string();
        let io = |source: io::Error| ReadError::Io { file: name.clone(), source };
        let file = storage.open(&path, OpenMode::Read).map_err(io)?;
        if file.bytes().map_err(io)? < HEADER_BYTES as u64 {
            return Ok(None);
        }
        let mut head = [0; HEADER_BYTES];
        file.read_at(0, &mut head).map_err(io)?;
        if let Some(old) = in_use {
            head = old.header.encode();
        }
        let Some(header) = Header::decode(&head).ok().filter(|header| header.first_cut == first) else {
            return Ok(None);
        };
        let segment = Arc::new(SegmentFile {
            source: IndexFile { file: file.clone(), number: FileNumber::next(), name: name.clone() },
            key: ChunkKey::new(header.disk, header.generation),
            disk_bytes: header.disk_bytes,
        });
        let found = recover(&segment, &header, &FrameKey::new(&head))?;
        let Some((position, time, commit)) = found.last.filter(|_| first + found.commits.len() as u64 == last + 1)
        else {
            return Ok(None);
        };
        let damaged = found.boundaries.iter().filter(|boundary| boundary.what == BoundaryKind::Damaged);
        if in_use.is_some_and(|old| !old.damaged_cuts().eq(damaged.map(|boundary| boundary.cut))) {
            return Ok(None);
        }
        let index = encode_index(
            &head,
            &Contents {
                entries: &found.entries,
                commits: &found.commits,
                boundaries: &found.boundaries,
                data_end: found.data_end,
                last_position: Some(position),
                last_time: time,
                last_commit: commit,
            },
        );
        let copy = format!("{path}.repair");
        let copied = storage.open(&copy, OpenMode::OpenOrCreate).and_then(|to| {
            to.set_bytes(0)?;
            to.write_at(0, &head)?;
            let mut piece = Vec::new();
            let mut at = HEADER_BYTES as u64;
            while at < found.data_end {
                piece.resize((found.data_end - at).min(1 << 20) as usize, 0);
                file.read_at(at, &mut piece)?;
                to.write_at(at, &piece)?;
                at += piece.len() as u64;
            }
            to.write_at(found.data_end, &index)?;
            to.sync()?;
            storage.rename(&copy, &path)?;
            storage.sync_folder("segments")
        });
        copied.map_err(io)?;
        Self::open(storage, first, last).map(Some)
    }

    pub fn first_cut(&self) -> u64 {
        self.header.first_cut
    }

    /// The cuts that it was sealed without: of each something was missing.
    pub fn damaged_cuts(&self) -> impl Iterator<Item = u64> {
        let damaged = self.boundaries.iter().filter(|boundary| boundary.what == BoundaryKind::Damaged);
        damaged.map(|boundary| boundary.cut)
    }

    pub fn extents(&self) -> u64 {
        self.log.entries
    }

    pub fn commit_entry(&self, cut: u64, cache: &BlockCache) -> Result<CommitEntry, ReadError> {
        let index = cut - self.first_cut();
        self.commits
            .with_entry(index, &self.segment, cache, CommitEntry::decode)
            .or_else(|error| Ok(self.rescue(error)?.commits[index as usize]))
    }

    /// Reads the whole segment and says what is not sound: each frame, and the index against what the frames say.
    /// `tick` is told what was read, and says whether to go on.
    pub fn check(&self, tick: &dyn Fn(u64) -> bool) -> Result<Inspection, ReadError> {
        let mut inspection = inspect(&self.segment, &self.header, &self.frame_key, self.data_end, tick)?;
        if !inspection.finished {
            return Ok(inspection);
        }
        // Named when it was found, and marked as such: no view uses these cuts.
        let is_known = |cut| self.boundaries.contains(&Boundary { cut, what: BoundaryKind::Damaged });
        inspection.damaged.retain(|damaged| !is_known(damaged.cut));
        let found = &inspection.recovered;
        let contents = Contents {
            entries: &found.entries,
            commits: &found.commits,
            boundaries: &found.boundaries,
            data_end: self.data_end,
            last_position: found.last.map(|last| last.0).or(self.header.start),
            last_time: found.last.map_or(self.header.time_before, |last| last.1),
            last_commit: found.last.map_or(self.header.commit_before, |last| last.2),
        };
        let head: [u8; HEADER_BYTES] = self.segment.read(0, HEADER_BYTES)?.try_into().expect("as many as asked");
        let expected = encode_index(&head, &contents);
        let index = self.segment.read(self.data_end, (self.file_bytes - self.data_end) as usize)?;
        if Header::decode(&head).as_ref() != Ok(&self.header) || (inspection.damaged.is_empty() && index != expected) {
            inspection.damaged.push(DamagedCut {
                cut: self.first_cut(),
                at: self.data_end,
                what: "the index does not say what the frames hold".to_owned(),
                extents: Some(Vec::new()),
            });
        }
        for damaged in inspection.damaged.iter_mut().filter(|damaged| damaged.at < self.data_end) {
            damaged.extents = self.damaged_extents(damaged.cut);
        }
        Ok(inspection)
    }

    /// The parts of the disk for which a cut's chunks do not verify, as the index knows their places; `None` when it
    /// cannot tell.
    fn damaged_extents(&self, cut: u64) -> Option<Vec<Extent>> {
        if cut < self.first_cut() || cut > self.last_cut {
            return None;
        }
        let cache = BlockCache::new(0);
        let entries = self.entries_up_to(cut, &cache).ok()?;
        let start = if cut > self.first_cut() { self.commit_entry(cut - 1, &cache).ok()?.log_end } else { 0 };
        Some(unreadable(&self.segment, entries.get(start as usize..)?))
    }

    /// The commit record of a cut; `None` when it was lost.
    pub fn commit(&self, cut: u64, cache: &BlockCache) -> Result<Option<Commit>, ReadError> {
        let entry = self.commit_entry(cut, cache)?;
        if entry.commit_at == 0 {
            return Ok(None);
        }
        read_commit(&self.segment, &self.frame_key, entry.commit_at, cut).map(Some)
    }

    /// What the segment held after `cut`: entries in order, later ones replace earlier ones. Bounded by the segment.
    pub fn entries_up_to(&self, cut: u64, cache: &BlockCache) -> Result<Vec<Entry>, ReadError> {
        let end = self.commit_entry(cut, cache)?.log_end;
        self.log_entries(end, cache).or_else(|error| Ok(self.rescue(error)?.entries[..end as usize].to_vec()))
    }

    fn log_entries(&self, end: u64, cache: &BlockCache) -> Result<Vec<Entry>, ReadError> {
        let mut entries = Vec::with_capacity(end as usize);
        for page in 0..Table::pages(end, ENTRY_BYTES) {
            let bytes = self.log.page(page, &self.segment, cache)?;
            let left = (end - page * self.log.per_page()) as usize;
            entries.extend(bytes.chunks_exact(ENTRY_BYTES).take(left).map(Entry::decode));
        }
        Ok(entries)
    }

    pub fn flat_cursor(&self) -> Cursor<'_, Entry> {
        self.flat.cursor(&self.segment)
    }

    /// Whether a page of its index did not prove itself, and the frames say it all again.
    pub fn is_index_damaged(&self) -> bool {
        matches!(*self.rescued.lock().expect("no panic while held"), Some(Some(_)))
    }

    /// The index as the frames have it, when a page of the one on disk is damaged; the error when they are, too.
    fn rescue(&self, error: ReadError) -> Result<Arc<Rescued>, ReadError> {
        if !matches!(error, ReadError::Damaged { .. }) {
            return Err(error);
        }
        let mut rescued = self.rescued.lock().expect("no panic while held");
        if rescued.is_none() {
            tracing::error!(segment = self.segment.name, %error, "an index is damaged and read from the frames instead");
            *rescued = Some(self.read_frames().map(Arc::new));
        }
        rescued.as_ref().and_then(Clone::clone).ok_or(error)
    }

    fn read_frames(&self) -> Option<Rescued> {
        let inspection = inspect(&self.segment, &self.header, &self.frame_key, self.data_end, &|_| true).ok()?;
        // Damaged cuts that it was sealed with are in no index, and no view shows them.
        let known = self.boundaries.iter().filter(|boundary| boundary.what == BoundaryKind::Damaged).count();
        let found = inspection.recovered;
        let whole = inspection.damaged.len() == known
            && found.entries.len() as u64 == self.log.entries
            && found.commits.len() as u64 == self.commits.entries;
        whole.then(|| Rescued { flat: flatten(&found.entries), entries: found.entries, commits: found.commits })
    }

    /// The first part at or after `offset` that the segment covers.
    pub fn next(&self, offset: u64, cache: &BlockCache) -> Result<Option<(Extent, Place)>, ReadError> {
        match self.flat.first_from(offset, &self.segment, cache, |_| true) {
            Ok(found) => Ok(found.map(|(entry, part)| (part, entry.place.slice(part.offset - entry.extent.offset)))),
            Err(error) => Ok(self.rescue(error)?.flat.overlapping(Extent::new(offset, u64::MAX - offset)).next()),
        }
    }

    /// The parts of `within` that the segment covers, in order, handed to `found`.
    pub fn overlapping(
        &self,
        within: Extent,
        cache: &BlockCache,
        found: &mut dyn FnMut(Extent, Place),
    ) -> Result<(), ReadError> {
        let mut pieces = Vec::new();
        let result = self.flat.overlapping(within, &self.segment, cache, &mut |entry: Entry, part| {
            pieces.push((part, entry.place.slice(part.offset - entry.extent.offset)));
        });
        if let Err(error) = result {
            pieces = self.rescue(error)?.flat.overlapping(within).collect();
        }
        pieces.into_iter().for_each(|(extent, place)| found(extent, place));
        Ok(())
    }

    /// The last cut at or before `time`, by binary search; `None` when all are later.
    pub fn last_cut_at(&self, time: Timestamp, cache: &BlockCache) -> Result<Option<u64>, ReadError> {
        let (mut low, mut high) = (0, self.commits.entries);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.commit_entry(self.first_cut() + middle, cache)?.time <= time {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Ok(low.checked_sub(1).map(|index| self.first_cut() + index))
    }
}

/// The extents of `entries` whose chunks do not verify.
pub fn unreadable(segment: &SegmentFile, entries: &[Entry]) -> Vec<Extent> {
    let mut damaged = Vec::new();
    let mut last: Option<(u64, bool)> = None;
    for entry in entries.iter().filter(|entry| !entry.place.is_zeroes()) {
        let whole = match last {
            Some((chunk_at, whole)) if chunk_at == entry.place.chunk_at => whole,
            _ => segment.verified(&entry.place, entry.extent).is_ok(),
        };
        last = Some((entry.place.chunk_at, whole));
        if !whole {
            damaged.push(entry.extent);
        }
    }
    damaged
}

/// The commit record in the frame at `at`.
pub fn read_commit(segment: &SegmentFile, key: &FrameKey, at: u64, cut: u64) -> Result<Commit, ReadError> {
    let damaged = || ReadError::damaged(&segment.name, format!("the commit record of cut {cut} at {at} is damaged"));
    let head: [u8; FRAME_HEADER_BYTES] = segment.read(at, FRAME_HEADER_BYTES)?.try_into().expect("as many as asked");
    let frame = key.decode(&head, at).ok_or_else(damaged)?;
    if frame.kind != FrameKind::Commit || frame.cut != cut || frame.body_bytes as usize > COMMIT_BYTES_MAX {
        return Err(damaged());
    }
    let body = segment.read(at + FRAME_HEADER_BYTES as u64, frame.body_bytes as usize)?;
    decode_commit(&body).filter(|commit| commit.end.cut.0 == cut).ok_or_else(damaged)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replica::testing::{Chance, SimStorage, TestHost};
    use tidemark_base::storage::read_file;
    use tidemark_proto::replication::CutKind;

    /// Who can write the hash that ends a footer can write anything before it.
    #[test]
    fn a_footer_that_claims_what_cannot_be_is_damage() {
        let storage = SimStorage::default();
        let limits = crate::journal::Limits { segment_cuts: 3, reserve_bytes: 0, ..Default::default() };
        let set = crate::replica::ReplicaSet::open(Arc::new(storage.clone()), limits).unwrap().0;
        let mut host = TestHost::new(8192);
        let replica = set.create(host.info).unwrap();
        let stream = replica.begin_session(host.info.generation, 8192).unwrap();
        host.send(&stream, CutKind::ScanStart, None, &mut Chance(1)).unwrap();
        let mark = host.mark(true);
        host.send(&stream, CutKind::ScanEnd, Some(mark), &mut Chance(2)).unwrap();
        host.send(&stream, CutKind::Records, None, &mut Chance(3)).unwrap();
        let folder = storage.folder(&format!("replicas/{}", host.info.disk));
        let name = SegmentName::Sealed { first: 1, last: 3 }.path();
        let good = read_file(&*folder, &name, 1 << 20).unwrap();
        let footer_at = good.len() - FOOTER_BYTES;
        let header: [u8; HEADER_BYTES] = good[..HEADER_BYTES].try_into().unwrap();
        assert!(Sealed::open(&*folder, 1, 3).is_ok());
        let full = storage.files().into_iter().map(|file| file.0).find(|full| full.ends_with(&name)).unwrap();
        // Places and numbers of the three tables, place and bytes of the directory, its boundaries.
        for field in 0..9 {
            for claim in
                [u64::MAX, u64::MAX / 2, u64::MAX / 40, u64::MAX - good.len() as u64, 1 << 40, good.len() as u64]
            {
                let mut content = good.clone();
                content[footer_at + 8 + field * 8..][..8].copy_from_slice(&claim.to_le_bytes());
                let hash = footer_hash(&header, &content[footer_at..footer_at + FOOTER_BYTES - 32]);
                content[footer_at + FOOTER_BYTES - 32..].copy_from_slice(&hash);
                let forged = storage.with_file(&full, &content).folder(&format!("replicas/{}", host.info.disk));
                let opened = Sealed::open(&*forged, 1, 3);
                assert!(matches!(opened, Err(ReadError::Damaged { .. })), "field {field} claims {claim}");
            }
        }
    }
}
