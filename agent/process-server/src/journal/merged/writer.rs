//! Merging indexes: a streaming merge in which the newest wins, one page of each in memory.

use std::io;
use std::sync::Arc;

use tidemark_base::extent::Sliced;
use tidemark_base::stop::Stop;
use tidemark_base::storage::{OpenMode, Storage, StorageFile};
use tidemark_base::{DiskId, Extent};

use super::{Child, FOOTER_BYTES, MEMBER_BYTES, Member, Merged, MergedEntry, footer_of, name_of, temporary};
use crate::journal::error::ReadError;
use crate::journal::index::{Cursor, Entry, IndexFile, Located, PAGE_BYTES, Sorted, page_hash};

/// Pages that are written at once.
const BATCH_BYTES: usize = 64 * PAGE_BYTES;

#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    #[error("indexes cannot be merged: one of them cannot be read")]
    Read(#[from] ReadError),
    #[error("a merged index cannot be written")]
    Write(#[source] io::Error),
    #[error("merging was stopped")]
    Stopped,
}

/// Merges neighbours, oldest first, into one index on disk, durable when this returns.
pub fn merge(storage: &dyn Storage, disk: DiskId, children: &[Child], stop: &Stop) -> Result<Merged, MergeError> {
    let (Some(oldest), Some(newest)) = (children.first(), children.last()) else { return Err(MergeError::Stopped) };
    let (first, last) = (oldest.first(), newest.last());
    let new = temporary(first, last);
    let result = write(storage, disk, children, &new, stop).and_then(|()| {
        storage.rename(&new, &name_of(first, last)).map_err(MergeError::Write)?;
        storage.sync_folder("segments").map_err(MergeError::Write)?;
        Ok(Merged::open(storage, disk, first, last)?)
    });
    if result.is_err() {
        // It is made again another time; what is left of it is removed then, or when the journal is opened.
        let _ = storage.remove(&new);
    }
    result
}

fn write(storage: &dyn Storage, disk: DiskId, children: &[Child], new: &str, stop: &Stop) -> Result<(), MergeError> {
    let file = storage.open(new, OpenMode::OpenOrCreate).map_err(MergeError::Write)?;
    file.set_bytes(0).map_err(MergeError::Write)?;
    let mut writer = Writer::new(file);
    let mut members = Vec::new();
    let mut sources = Vec::new();
    for child in children {
        sources.push(Source::new(child, &mut members)?);
    }
    // Newest first: it decides.
    sources.reverse();
    while let Some(entry) = next(&mut sources)? {
        if writer.push(entry)? && stop.is_stopped() {
            return Err(MergeError::Stopped);
        }
    }
    let level = children.iter().map(Child::level).max().unwrap_or(0) + 1;
    let (first, last) = (children[0].first(), children[children.len() - 1].last());
    writer.finish(disk, first, last, level, &members)
}

/// One child's entries, from its first on.
enum Cursors<'a> {
    Segment(Cursor<'a, Entry>, u32),
    /// With, for each member of the index, its number in the new one; none when it was folded away.
    Index(Cursor<'a, MergedEntry>, Vec<Option<u32>>),
}

struct Source<'a> {
    cursor: Cursors<'a>,
    /// What of the current entry is left.
    at: Option<MergedEntry>,
}

impl<'a> Source<'a> {
    fn new(child: &'a Child, members: &mut Vec<Member>) -> Result<Self, ReadError> {
        let mut add = |member: Member| {
            members.push(member);
            members.len() as u32 - 1
        };
        let cursor = match child {
            Child::Segment(sealed) => Cursors::Segment(sealed.flat_cursor(), add(Member::of(sealed))),
            Child::Index(layer) => {
                let numbers = layer.members.iter().map(|member| member.as_ref().map(|sealed| add(Member::of(sealed))));
                Cursors::Index(cursor_of(&layer.index.entries, &layer.index.file), numbers.collect())
            }
        };
        let mut source = Self { cursor, at: None };
        source.advance()?;
        Ok(source)
    }

    fn advance(&mut self) -> Result<(), ReadError> {
        self.at = match &mut self.cursor {
            Cursors::Segment(cursor, member) => cursor.next()?.map(|entry| MergedEntry { entry, member: *member }),
            Cursors::Index(cursor, numbers) => loop {
                match cursor.next()? {
                    None => break None,
                    // What was folded away is in the base.
                    Some(entry) => {
                        if let Some(&Some(member)) = numbers.get(entry.member as usize) {
                            break Some(MergedEntry { member, ..entry });
                        }
                    }
                }
            },
        };
        Ok(())
    }

    /// Forgets what lies before `offset`.
    fn skip_to(&mut self, offset: u64) -> Result<(), ReadError> {
        while let Some(current) = &mut self.at {
            let extent = current.entry.extent;
            if extent.end() > offset {
                if extent.offset < offset {
                    let skip = offset - extent.offset;
                    current.entry.extent = Extent::new(offset, extent.length - skip);
                    current.entry.place = current.entry.place.slice(skip);
                }
                break;
            }
            self.advance()?;
        }
        Ok(())
    }
}

fn cursor_of<'a>(entries: &'a Sorted<MergedEntry>, file: &'a IndexFile) -> Cursor<'a, MergedEntry> {
    entries.cursor(file)
}

/// The next run of bytes that one entry is the newest for.
fn next(sources: &mut [Source<'_>]) -> Result<Option<MergedEntry>, ReadError> {
    let Some(start) = sources.iter().filter_map(|source| Some(source.at?.entry.extent.offset)).min() else {
        return Ok(None);
    };
    let covers = |source: &Source<'_>| source.at.is_some_and(|at| at.entry.extent.offset == start);
    let Some(chosen) = sources.iter().position(covers) else { return Ok(None) };
    let Some(mut entry) = sources[chosen].at else { return Ok(None) };
    let newer = sources[..chosen].iter().filter_map(|source| Some(source.at?.entry.extent.offset)).min();
    let end = newer.map_or(entry.entry.extent.end(), |newer| newer.min(entry.entry.extent.end()));
    entry.entry.extent = Extent::new(start, end - start);
    sources.iter_mut().try_for_each(|source| source.skip_to(end))?;
    Ok(Some(entry))
}

struct Writer {
    file: Arc<dyn StorageFile>,
    /// Whole pages that were written.
    written: u64,
    pages: Vec<u8>,
    page_hashes: Vec<[u8; 16]>,
    fences: Vec<u64>,
    entries: u64,
    last: Option<MergedEntry>,
}

impl Writer {
    fn new(file: Arc<dyn StorageFile>) -> Self {
        let (pages, page_hashes, fences) = (Vec::with_capacity(BATCH_BYTES), Vec::new(), Vec::new());
        Self { file, written: 0, pages, page_hashes, fences, entries: 0, last: None }
    }

    /// True when pages were written: a good moment to stop.
    fn push(&mut self, entry: MergedEntry) -> Result<bool, MergeError> {
        if let Some(last) = &mut self.last
            && continues(last, &entry)
        {
            last.entry.extent.length += entry.entry.extent.length;
            return Ok(false);
        }
        match self.last.replace(entry) {
            Some(last) => self.put(&last),
            None => Ok(false),
        }
    }

    fn put(&mut self, entry: &MergedEntry) -> Result<bool, MergeError> {
        if self.pages.len().is_multiple_of(PAGE_BYTES) {
            self.fences.push(entry.entry.extent.offset);
        }
        entry.encode(&mut self.pages);
        self.entries += 1;
        if self.pages.len() < BATCH_BYTES {
            return Ok(false);
        }
        self.flush()?;
        Ok(true)
    }

    fn flush(&mut self) -> Result<(), MergeError> {
        for (number, page) in self.pages.chunks(PAGE_BYTES).enumerate() {
            self.page_hashes.push(page_hash(page, self.written + (number * PAGE_BYTES) as u64));
        }
        self.file.write_at(self.written, &self.pages).map_err(MergeError::Write)?;
        self.written += self.pages.len() as u64;
        self.pages.clear();
        Ok(())
    }

    fn finish(mut self, disk: DiskId, first: u64, last: u64, level: u32, members: &[Member]) -> Result<(), MergeError> {
        if let Some(last) = self.last.take() {
            self.put(&last)?;
        }
        self.flush()?;
        let mut directory =
            Vec::with_capacity(self.page_hashes.len() * 24 + members.len() * MEMBER_BYTES + FOOTER_BYTES);
        self.page_hashes.iter().for_each(|hash| directory.extend_from_slice(hash));
        self.fences.iter().for_each(|fence| directory.extend_from_slice(&fence.to_le_bytes()));
        for member in members {
            directory.extend_from_slice(&member.first.to_le_bytes());
            directory.extend_from_slice(&member.last.to_le_bytes());
            directory.extend_from_slice(&member.head);
        }
        let hash = *blake3::hash(&directory).as_bytes();
        let numbers =
            [first, last, u64::from(level), self.entries, members.len() as u64, self.written, directory.len() as u64];
        directory.extend_from_slice(&footer_of(disk, numbers, &hash));
        self.file.write_at(self.written, &directory).map_err(MergeError::Write)?;
        self.file.sync().map_err(MergeError::Write)
    }
}

/// Whether the second is the first's continuation: pieces of one extent that something older lay between.
fn continues(before: &MergedEntry, after: &MergedEntry) -> bool {
    let (left, right) = (&before.entry, &after.entry);
    before.member == after.member
        && left.extent.end() == right.extent.offset
        && left.place.chunk_at == right.place.chunk_at
        && left.place.slice(left.extent.length) == right.place
}
