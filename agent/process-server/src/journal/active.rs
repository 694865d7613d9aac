//! The segment that is appended to.

use std::io::{self, IoSlice};
use std::sync::Arc;

use tidemark_base::chunk::{ChunkError, ChunkKey, Opener, UnverifiedChunk};
use tidemark_base::storage::{OpenMode, Storage};

use super::index::{CommitEntry, Entry, IndexFile, Place, SegmentFile, ZEROES, check_of, commit_flags};
use super::sealed::{Boundary, BoundaryKind, Contents, encode_index};
use super::segment::{
    FRAME_HEADER_BYTES, Frame, FrameKey, FrameKind, HEADER_BYTES, Header, SegmentName, body_sum, encode_commit,
};
use super::{Limits, Tip};
use crate::view::cache::FileNumber;
use tidemark_proto::replication::{Consistency, CutEnd, CutKind};

pub struct Active {
    pub segment: Arc<SegmentFile>,
    pub head: [u8; HEADER_BYTES],
    pub header: Header,
    pub frame_key: FrameKey,
    /// The end of the last commit: what is behind it does not exist.
    pub data_end: u64,
    /// What was behind this when the last sync ended is not proven to be on the media.
    pub durable_end: u64,
    pub entries: Vec<Entry>,
    pub commits: Vec<CommitEntry>,
    pub boundaries: Vec<Boundary>,
    pub open: Option<OpenCut>,
    write_at: u64,
}

/// Chunks whose commit has not come yet.
pub struct OpenCut {
    pub cut: u64,
    pub chunks: u64,
    pub bytes: u64,
    pub hashes: blake3::Hasher,
    pub entries: Vec<Entry>,
}

impl OpenCut {
    pub fn new(cut: u64) -> Self {
        Self { cut, chunks: 0, bytes: 0, hashes: blake3::Hasher::new(), entries: Vec::new() }
    }
}

/// Chunks of one frame, every one proven.
#[derive(Default)]
pub struct VerifiedChunks {
    pub entries: Vec<Entry>,
    pub hashes: Vec<u8>,
    pub chunks: u64,
}

/// Checks each chunk of `bytes` completely; `at` is where the first one will be in the file.
pub fn verify_chunks(bytes: &[u8], at: u64, key: &ChunkKey, disk_bytes: u64) -> Result<VerifiedChunks, ChunkError> {
    let mut verified = VerifiedChunks::default();
    let mut rest = bytes;
    Opener::with_local(|opener| {
        while !rest.is_empty() {
            let chunk_at = at + (bytes.len() - rest.len()) as u64;
            let (chunk, behind) = UnverifiedChunk::split(rest)?;
            let sealed_bytes = chunk.sealed_bytes() as u32;
            let chunk = chunk.verify(key, disk_bytes, opener)?;
            let check = check_of(&chunk.hash);
            let zeroes = chunk.data.is_empty();
            let mut raw_at = 0;
            for &extent in chunk.extents {
                let place = Place { chunk_at, sealed_bytes, raw_at: if zeroes { ZEROES } else { raw_at }, check };
                if !zeroes {
                    raw_at += extent.length as u32;
                }
                match verified.entries.last_mut() {
                    // Touching extents of one chunk are one entry: their data touches as well.
                    Some(last) if last.place.chunk_at == chunk_at && last.extent.end() == extent.offset => {
                        last.extent.length += extent.length;
                    }
                    _ => verified.entries.push(Entry { extent, place }),
                }
            }
            verified.hashes.extend_from_slice(&chunk.hash);
            verified.chunks += 1;
            rest = behind;
        }
        Ok(verified)
    })
}

pub fn boundary_of(kind: CutKind, cut: u64) -> Option<Boundary> {
    let what = match kind {
        CutKind::ScanStart => BoundaryKind::ScanStart,
        CutKind::ScanEnd => BoundaryKind::ScanEnd,
        CutKind::Records | CutKind::Scan => return None,
    };
    Some(Boundary { cut, what })
}

pub fn commit_entry(end: &CutEnd, commit_at: u64, log_end: u64) -> CommitEntry {
    let mut flags = u64::from(super::segment::kind_number(end.kind));
    if let Some(mark) = &end.mark {
        flags |= commit_flags::MARK;
        if mark.keep {
            flags |= commit_flags::KEEP;
        }
        if mark.consistency == Consistency::Application {
            flags |= commit_flags::APPLICATION;
        }
    }
    CommitEntry { time: end.time, commit_at, log_end, flags }
}

impl Active {
    /// Makes a new segment, durable with its header before it is returned.
    pub fn create(storage: &dyn Storage, header: Header) -> io::Result<Self> {
        let path = SegmentName::Active { first: header.first_cut }.path();
        let file = storage.open(&path, OpenMode::OpenOrCreate)?;
        file.set_bytes(0)?;
        let head = header.encode();
        file.write_at(0, &head)?;
        file.sync()?;
        storage.sync_folder("segments")?;
        Ok(Self::resume(storage, file, head, header, HEADER_BYTES as u64))
    }

    /// A segment whose committed content ends at `data_end`; entries and commits are added by recovery.
    pub fn resume(
        storage: &dyn Storage,
        file: Arc<dyn tidemark_base::storage::StorageFile>,
        head: [u8; HEADER_BYTES],
        header: Header,
        data_end: u64,
    ) -> Self {
        let path = SegmentName::Active { first: header.first_cut }.path();
        let name = storage.path(&path).display().to_string();
        let segment = SegmentFile {
            source: IndexFile { file, number: FileNumber::next(), name },
            key: ChunkKey::new(header.disk, header.generation),
            disk_bytes: header.disk_bytes,
        };
        Self {
            segment: Arc::new(segment),
            frame_key: FrameKey::new(&head),
            head,
            header,
            data_end,
            durable_end: data_end,
            entries: Vec::new(),
            commits: Vec::new(),
            boundaries: Vec::new(),
            open: None,
            write_at: data_end,
        }
    }

    /// Takes what recovery found.
    pub fn recovered(&mut self, found: super::recovery::Recovered) {
        (self.entries, self.commits, self.boundaries) = (found.entries, found.commits, found.boundaries);
        (self.data_end, self.write_at, self.durable_end) = (found.data_end, found.data_end, found.data_end);
    }

    pub fn last_cut(&self) -> u64 {
        self.header.first_cut + self.commits.len() as u64 - 1
    }

    pub fn is_full(&self, limits: &Limits) -> bool {
        self.data_end >= limits.segment_bytes
            || self.entries.len() >= limits.segment_extents
            || self.commits.len() >= limits.segment_cuts
    }

    /// Where the next chunk will be.
    pub fn chunks_at(&self) -> u64 {
        self.write_at + FRAME_HEADER_BYTES as u64
    }

    /// Appends a frame of verified chunks. After an error nothing of it is there: the next frame overwrites its bytes.
    pub fn append(&mut self, cut: u64, bytes: &[u8], verified: VerifiedChunks) -> io::Result<()> {
        self.write_frame(FrameKind::Chunks, cut, bytes)?;
        let open = self.open.get_or_insert_with(|| OpenCut::new(cut));
        open.chunks += verified.chunks;
        open.bytes += bytes.len() as u64;
        open.hashes.update(&verified.hashes);
        open.entries.extend(verified.entries);
        Ok(())
    }

    /// Ends the cut.
    pub fn commit(&mut self, end: &CutEnd, durable_cut: u64, commit_before: &[u8; 32]) -> io::Result<[u8; 32]> {
        let (body, hash) = encode_commit(end, durable_cut, commit_before);
        let commit_at = self.write_at;
        self.write_frame(FrameKind::Commit, end.cut.0, &body)?;
        if let Some(open) = self.open.take() {
            self.entries.extend(open.entries);
        }
        self.commits.push(commit_entry(end, commit_at, self.entries.len() as u64));
        self.boundaries.extend(boundary_of(end.kind, end.cut.0));
        self.data_end = self.write_at;
        Ok(hash)
    }

    fn write_frame(&mut self, kind: FrameKind, cut: u64, body: &[u8]) -> io::Result<()> {
        let frame = Frame { kind, body_bytes: body.len() as u32, cut, sum: body_sum(body) };
        let head = self.frame_key.encode(frame, self.write_at);
        self.segment.file.write_vectored_at(self.write_at, &[IoSlice::new(&head), IoSlice::new(body)])?;
        self.write_at += (head.len() + body.len()) as u64;
        Ok(())
    }

    /// Forgets the cut that was not committed.
    pub fn discard_open(&mut self) -> io::Result<()> {
        if self.is_in_a_cut() {
            self.open = None;
            self.write_at = self.data_end;
            self.segment.file.set_bytes(self.data_end)?;
        }
        Ok(())
    }

    /// Something of a cut is here that is not committed.
    pub fn is_in_a_cut(&self) -> bool {
        self.write_at != self.data_end || self.open.is_some()
    }

    /// Appends index and footer, syncs, renames. The caller opens the sealed segment.
    pub fn seal(&mut self, storage: &dyn Storage, tip: &Tip) -> Result<(), SealError> {
        let index = encode_index(
            &self.head,
            &Contents {
                entries: &self.entries,
                commits: &self.commits,
                boundaries: &self.boundaries,
                data_end: self.data_end,
                last_position: tip.position,
                last_time: tip.time,
                last_commit: tip.commit,
            },
        );
        let first = self.header.first_cut;
        let (from, to) = (SegmentName::Active { first }, SegmentName::Sealed { first, last: self.last_cut() });
        let file = &self.segment.file;
        // Longer bytes of an earlier attempt would hide the footer.
        file.set_bytes(self.data_end).map_err(SealError::Unsealed)?;
        file.write_at(self.data_end, &index).map_err(SealError::Unsealed)?;
        file.sync().map_err(SealError::Failed)?;
        storage.rename(&from.path(), &to.path()).map_err(SealError::Failed)?;
        storage.sync_folder("segments").map_err(SealError::Failed)
    }
}

#[derive(Debug)]
pub enum SealError {
    /// The segment stays active and can be sealed later.
    Unsealed(io::Error),
    Failed(io::Error),
}
