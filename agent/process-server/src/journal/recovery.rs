//! What an active segment holds after a crash.
//!
//! | found | a later commit says it was durable | → |
//! |---|---|---|
//! | whole cuts to the end | | all kept |
//! | bytes behind the last commit | | truncated: they were never a cut |
//! | a cut that is not whole, or whose commit is gone | no | truncated at that cut: a torn tail |
//! | the same | yes | kept, named as damaged; every cut behind it is kept, and not consistent until a scan ended that began after the damage was found ([`super::Loss`]) |

use std::sync::Arc;

use tidemark_base::{Extent, FRAME_BYTES_MAX, Position, Timestamp};

use super::active::{OpenCut, boundary_of, commit_entry, verify_chunks};
use super::error::ReadError;
use super::index::{CommitEntry, Entry, SegmentFile, commit_flags};
use super::sealed::{Boundary, BoundaryKind};
use super::segment::{
    COMMIT_BYTES_MAX, Commit, FRAME_HEADER_BYTES, FRAME_MAGIC, Frame, FrameKey, FrameKind, HEADER_BYTES, Header,
    body_sum, decode_commit,
};

/// A cut of which something is missing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DamagedCut {
    pub cut: u64,
    pub at: u64,
    pub what: String,
    /// The parts of the disk whose data of this cut is damaged; none when that is not known.
    pub extents: Option<Vec<Extent>>,
}

impl DamagedCut {
    fn new(what: String) -> Self {
        Self { cut: 0, at: 0, what, extents: None }
    }
}

#[derive(Default)]
pub struct Recovered {
    pub entries: Vec<Entry>,
    pub commits: Vec<CommitEntry>,
    pub boundaries: Vec<Boundary>,
    pub data_end: u64,
    /// The commit, position and time of the last cut that was kept; `None`: no cut.
    pub last: Option<(Position, Timestamp, [u8; 32])>,
    pub damaged: Vec<DamagedCut>,
    /// Bytes behind the last commit that was kept.
    pub torn_bytes: u64,
    /// Up to here a later commit proves that a sync was seen to succeed; 0 when there is no such proof.
    pub proven_end: u64,
}

/// One cut on the way through the file.
struct Walk<'a> {
    segment: &'a SegmentFile,
    header: &'a Header,
    key: &'a FrameKey,
    at: u64,
    end: u64,
    open: OpenCut,
    open_at: u64,
    /// Why the open cut cannot be whole.
    trouble: Option<(u64, String)>,
    cuts: Vec<WalkedCut>,
    /// Frames whose stored bytes changed though their content is proven.
    altered: Vec<DamagedCut>,
}

struct WalkedCut {
    cut: u64,
    starts_at: u64,
    ends_at: u64,
    entries: Vec<Entry>,
    commit: Option<(Commit, u64)>,
    trouble: Option<(u64, String)>,
}

/// Reads the segment from its first frame on and decides what it holds. Writes nothing.
pub fn recover(segment: &Arc<SegmentFile>, header: &Header, key: &FrameKey) -> Result<Recovered, ReadError> {
    let end = segment.file.bytes().map_err(|source| ReadError::Io { file: segment.name.clone(), source })?;
    Ok(decide(walk(segment, header, key, end, &|_| true)?.cuts, header, end))
}

/// What a walk over a segment that should be whole up to `end` saw.
pub struct Inspection {
    pub chunks: u64,
    pub cuts: u64,
    /// Cuts that are not whole.
    pub damaged: Vec<DamagedCut>,
    /// Places where stored bytes changed, though what they say is proven.
    pub altered: Vec<DamagedCut>,
    /// False: it was stopped.
    pub finished: bool,
    /// What the index of this segment should say.
    pub recovered: Recovered,
}

/// Reads every frame up to `end` and proves it. Writes nothing.
/// `tick` is told what was read, and says whether to go on.
pub fn inspect(
    segment: &SegmentFile,
    header: &Header,
    key: &FrameKey,
    end: u64,
    tick: &dyn Fn(u64) -> bool,
) -> Result<Inspection, ReadError> {
    let Walked { cuts, altered, finished } = walk(segment, header, key, end, tick)?;
    let trouble = |cut: &WalkedCut| {
        let (at, what) = cut.trouble.clone()?;
        Some(DamagedCut { cut: cut.cut, at, ..DamagedCut::new(what) })
    };
    let mut damaged: Vec<DamagedCut> = cuts.iter().filter_map(trouble).collect();
    let ends_at = cuts.last().map_or(HEADER_BYTES as u64, |cut| cut.ends_at);
    if ends_at != end && finished {
        let cut = cuts.last().map_or(header.first_cut, |cut| cut.cut + 1);
        damaged.push(DamagedCut { cut, at: ends_at, ..DamagedCut::new(format!("nothing whole follows up to {end}")) });
    }
    let chunks = cuts.iter().filter_map(|cut| Some(cut.commit.as_ref()?.0.end.chunks)).sum();
    Ok(Inspection { chunks, cuts: cuts.len() as u64, damaged, altered, finished, recovered: decide(cuts, header, end) })
}

struct Walked {
    cuts: Vec<WalkedCut>,
    altered: Vec<DamagedCut>,
    finished: bool,
}

fn walk(
    segment: &SegmentFile,
    header: &Header,
    key: &FrameKey,
    end: u64,
    tick: &dyn Fn(u64) -> bool,
) -> Result<Walked, ReadError> {
    let start = HEADER_BYTES as u64;
    let mut walk = Walk {
        segment,
        header,
        key,
        at: start,
        end,
        open: OpenCut::new(header.first_cut),
        open_at: start,
        trouble: None,
        cuts: Vec::new(),
        altered: Vec::new(),
    };
    let finished = walk.run(tick)?;
    Ok(Walked { cuts: walk.cuts, altered: walk.altered, finished })
}

fn decide(cuts: Vec<WalkedCut>, header: &Header, file_end: u64) -> Recovered {
    // Behind the first cut that is not whole, only what a later commit proves to have been durable counts.
    let first_bad = cuts.iter().position(|cut| cut.trouble.is_some());
    let proven = cuts.iter().filter_map(|cut| Some(cut.commit.as_ref()?.0.durable_cut)).max().unwrap_or(0);
    let keep = match first_bad {
        Some(bad) if cuts[bad].cut > proven => bad,
        // Damage. Cuts at the end that are not whole and that nothing proves are a torn tail all the same.
        Some(_) => cuts.iter().rposition(|cut| cut.trouble.is_none() || cut.cut <= proven).map_or(0, |last| last + 1),
        None => cuts.len(),
    };
    let mut recovered = Recovered { data_end: HEADER_BYTES as u64, ..Recovered::default() };
    let mut time = header.time_before;
    for cut in cuts.into_iter().take(keep) {
        if cut.cut <= proven {
            recovered.proven_end = cut.ends_at;
        }
        let log_end = |entries: &Vec<Entry>| entries.len() as u64;
        recovered.data_end = cut.ends_at;
        if let Some((at, what)) = cut.trouble {
            let mut entry =
                CommitEntry { time, commit_at: 0, log_end: log_end(&recovered.entries), flags: commit_flags::DAMAGED };
            if let Some((commit, commit_at)) = &cut.commit {
                time = commit.end.time;
                entry = commit_entry(&commit.end, *commit_at, entry.log_end);
                entry.flags |= commit_flags::DAMAGED;
                recovered.last = Some((commit.end.to, commit.end.time, commit.hash));
            }
            recovered.commits.push(entry);
            recovered.boundaries.push(Boundary { cut: cut.cut, what: BoundaryKind::Damaged });
            let at = at.max(cut.starts_at);
            recovered.damaged.push(DamagedCut { cut: cut.cut, at, ..DamagedCut::new(what) });
            continue;
        }
        recovered.entries.extend(cut.entries);
        if let Some((commit, commit_at)) = cut.commit {
            time = commit.end.time;
            recovered.commits.push(commit_entry(&commit.end, commit_at, log_end(&recovered.entries)));
            recovered.boundaries.extend(boundary_of(commit.end.kind, cut.cut));
            recovered.last = Some((commit.end.to, commit.end.time, commit.hash));
        }
    }
    recovered.torn_bytes = file_end.saturating_sub(recovered.data_end);
    recovered
}

impl Walk<'_> {
    /// False: it was stopped.
    fn run(&mut self, tick: &dyn Fn(u64) -> bool) -> Result<bool, ReadError> {
        let mut commit_before = self.header.commit_before;
        while let Some(frame) = self.next_frame()? {
            let body_at = self.at + FRAME_HEADER_BYTES as u64;
            if body_at + u64::from(frame.body_bytes) > self.end {
                break;
            }
            let body = self.segment.read(body_at, frame.body_bytes as usize)?;
            match frame.kind {
                FrameKind::Chunks => self.chunks(&frame, &body, body_at),
                FrameKind::Commit => self.commit(&frame, &body, &mut commit_before, body_at),
            }
            self.at = body_at + u64::from(frame.body_bytes);
            if frame.kind == FrameKind::Commit {
                self.open_at = self.at;
            }
            if !tick(u64::from(frame.body_bytes)) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn frame_at(&self, bytes: &[u8], at: u64) -> Option<Frame> {
        let frame = self.key.decode(bytes.try_into().ok()?, at)?;
        let limit = match frame.kind {
            FrameKind::Chunks => FRAME_BYTES_MAX,
            FrameKind::Commit => COMMIT_BYTES_MAX,
        };
        (frame.body_bytes as usize <= limit).then_some(frame)
    }

    /// The frame at `self.at`, or the next one behind damage; `None` at the end.
    fn next_frame(&mut self) -> Result<Option<Frame>, ReadError> {
        if self.at + FRAME_HEADER_BYTES as u64 > self.end {
            return Ok(None);
        }
        let head = self.segment.read(self.at, FRAME_HEADER_BYTES)?;
        if let Some(frame) = self.frame_at(&head, self.at) {
            return Ok(Some(frame));
        }
        let lost_at = self.at;
        let found = self.search()?;
        if found.is_some() {
            self.trouble.get_or_insert((lost_at, "a frame's header is destroyed".to_owned()));
        }
        Ok(found)
    }

    /// Looks byte by byte for a frame of this segment; the nonce in its key keeps look-alikes out.
    fn search(&mut self) -> Result<Option<Frame>, ReadError> {
        const WINDOW: u64 = 1 << 20;
        let mut from = self.at + 1;
        while from + FRAME_HEADER_BYTES as u64 <= self.end {
            let length = (self.end - from).min(WINDOW);
            let bytes = self.segment.read(from, length as usize)?;
            for (index, head) in bytes.windows(FRAME_HEADER_BYTES).enumerate() {
                if head[..4] == FRAME_MAGIC
                    && let Some(frame) = self.frame_at(head, from + index as u64)
                {
                    self.at = from + index as u64;
                    return Ok(Some(frame));
                }
            }
            from += length - FRAME_HEADER_BYTES as u64 + 1;
        }
        Ok(None)
    }

    fn chunks(&mut self, frame: &Frame, body: &[u8], body_at: u64) {
        if frame.cut != self.open.cut {
            self.trouble.get_or_insert((self.at, format!("a frame of cut {} among those of this cut", frame.cut)));
            return;
        }
        match verify_chunks(body, body_at, &self.segment.key, self.segment.disk_bytes) {
            Ok(verified) => {
                self.open.chunks += verified.chunks;
                self.open.bytes += body.len() as u64;
                self.open.hashes.update(&verified.hashes);
                self.open.entries.extend(verified.entries);
                if body_sum(body) != frame.sum {
                    let what = "stored bytes changed where nothing reads them; the data is whole".to_owned();
                    self.altered.push(DamagedCut { cut: frame.cut, at: body_at, ..DamagedCut::new(what) });
                }
            }
            Err(error) => {
                self.trouble.get_or_insert((body_at, error.to_string()));
            }
        }
    }

    fn commit(&mut self, frame: &Frame, body: &[u8], commit_before: &mut [u8; 32], body_at: u64) {
        let commit = decode_commit(body).filter(|commit| commit.end.cut.0 == frame.cut);
        // Cuts whose commits were destroyed lie between the last commit and this one.
        while self.open.cut < frame.cut {
            let trouble = self.trouble.clone().unwrap_or((self.open_at, "its commit record is gone".to_owned()));
            let open = std::mem::replace(&mut self.open, OpenCut::new(0));
            self.cuts.push(WalkedCut {
                cut: open.cut,
                starts_at: self.open_at,
                ends_at: self.open_at,
                entries: Vec::new(),
                commit: None,
                trouble: Some(trouble),
            });
            self.open = OpenCut::new(open.cut + 1);
        }
        let open = std::mem::replace(&mut self.open, OpenCut::new(frame.cut + 1));
        let mut trouble = self.trouble.take();
        if let Some(commit) = &commit {
            let totals_hold = open.chunks == commit.end.chunks
                && open.bytes == commit.end.chunk_bytes
                && *open.hashes.finalize().as_bytes() == commit.end.chunks_hash;
            if !totals_hold {
                trouble.get_or_insert((self.open_at, "chunks are missing".to_owned()));
            }
            let after_damage = self.cuts.last().is_some_and(|cut| cut.commit.is_none());
            if commit.commit_before != *commit_before && !after_damage {
                trouble.get_or_insert((body_at, "it does not follow the commit before it".to_owned()));
            }
            *commit_before = commit.hash;
        } else {
            trouble.get_or_insert((body_at, "its commit record is destroyed".to_owned()));
        }
        self.cuts.push(WalkedCut {
            cut: frame.cut,
            starts_at: self.open_at,
            ends_at: body_at + u64::from(frame.body_bytes),
            entries: open.entries,
            commit: commit.map(|commit| (commit, self.at)),
            trouble,
        });
    }
}
