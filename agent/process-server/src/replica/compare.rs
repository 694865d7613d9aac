//! What a scan is compared with.
//!
//! A host asks whether blocks are the same here as there ([`Hashes`]); the answer names those that are not, with hashes of their parts.
//!
//! *Consistency.* A question means the disk as the last ended cut leaves it, durable or not: the layers are listed when the question's turn
//! comes among the frames of its stream, and what is appended later does not show in them. It is what a view of that cut would give if it
//! were consistent, made of the same layers in the same order. What cannot be proven (a chunk whose hash does not hold, a block of the base whose
//! sum does not, an index that is damaged) is told as different, so that it comes again: the answer is never better than the media, because
//! it is read past the cache that views share. What the replica asks its host for is different in any case.
//! *Retries.* None: the host asks again. *Cancellation.* Between two reads of at most 1 MiB. *Crash.* Nothing here is durable; the host settles a
//! block only when cuts that it sent after the question are.

use std::sync::Arc;

use bytes::Bytes;
use tidemark_base::compare::{BLOCK_BYTES, BLOCK_HASH_BYTES, CompareKey, PART_BYTES, pieces};
use tidemark_base::disk::{Allocation, Disk, is_zero};
use tidemark_base::{Extent, SECTOR_BYTES};
use tidemark_proto::replication::{Claim, DIFFERING_RUNS_MAX, Differing, DifferingRun, Found, Hashes};

use super::{Needs, Session};
use crate::journal::{JournalError, Source};
use crate::view::View;
use crate::view::cache::BlockCache;

/// Index pages and chunks that one stream's questions keep between them.
const CACHE_BYTES: usize = 4 << 20;
/// Read at once.
const READ_BYTES: u64 = 1 << 20;

/// What the questions of one stream share.
pub struct Comparer {
    key: CompareKey,
    cache: Arc<BlockCache>,
}

impl Comparer {
    pub fn new(key: CompareKey) -> Self {
        Self { key, cache: BlockCache::new(CACHE_BYTES) }
    }
}

/// One question with all that its answer depends on. Reads and hashes in [`Comparison::run`], on any thread.
pub struct Comparison {
    hashes: Hashes,
    key: CompareKey,
    view: Option<View>,
    needs: Arc<Needs>,
}

impl Session {
    /// To be called in the order of the stream.
    pub fn compare(&self, comparer: &Comparer, hashes: Hashes) -> Result<Comparison, JournalError> {
        let replica = self.replica();
        let (found, at, pin) = {
            let state = self.state()?;
            let tip = state.journal.tip();
            let protocol =
                |what: &str| JournalError::Protocol { disk: replica.disk, cut: tip.cut, what: what.to_owned() };
            if state.journal.history().open().is_none() || state.journal.history().needs_scan() {
                return Err(protocol("blocks are compared although no scan was started"));
            }
            if state.journal.has_open_cut() {
                return Err(protocol("blocks are compared in the middle of a cut"));
            }
            if hashes.runs.iter().any(|run| !run.extent.is_valid_on(replica.disk_bytes())) {
                return Err(protocol("blocks are compared that do not lie on the disk"));
            }
            let found = state.journal.sources(state.manifest.base.cut, tip.cut);
            (found, (tip.cut, tip.position, tip.time), replica.pins.pin(tip.cut))
        };
        let within = match (hashes.runs.first(), hashes.runs.last()) {
            (Some(first), Some(last)) => Extent::new(first.extent.offset, last.extent.end() - first.extent.offset),
            _ => Extent::new(0, 0),
        };
        let layers = found.and_then(|sources| {
            sources.into_iter().map(|source| narrowed(source, within).layer(&comparer.cache)).collect::<Result<_, _>>()
        });
        let view = match layers {
            Ok(layers) => {
                let (base, suspects) = (replica.base.clone(), replica.suspects.clone());
                Some(View::new(layers, replica.disk_bytes(), base, comparer.cache.clone(), at, pin, suspects))
            }
            Err(error) => {
                tracing::warn!(disk = %replica.disk, %error, "a part of the replica cannot be read to be compared; it is sent again");
                None
            }
        };
        Ok(Comparison { hashes, key: comparer.key.clone(), view, needs: replica.needs.clone() })
    }
}

/// Of the segment that is appended to, only what the question is about: the rest of its extents would cost more than
/// the question.
fn narrowed(source: Source, within: Extent) -> Source {
    match source {
        Source::Entries(segment, mut entries) => {
            entries.retain(|entry| entry.extent.overlaps(&within));
            Source::Entries(segment, entries)
        }
        other => other,
    }
}

impl Comparison {
    /// The answer; `None` when it was cancelled.
    pub fn run(self, cancelled: &dyn Fn() -> bool) -> Option<Differing> {
        let mut answer = Answer::default();
        let mut buffer = Vec::new();
        for run in &self.hashes.runs {
            let whole = match (&self.view, &run.claim) {
                (None, _) => {
                    answer.add(run.extent, Found::Unknown);
                    true
                }
                (Some(view), Claim::Zeroes) => self.zeroes(view, run.extent, cancelled, &mut answer),
                (Some(view), Claim::Hashes(hashes)) => {
                    let blocks: Vec<Block<'_>> =
                        pieces(run.extent, BLOCK_BYTES).zip(hashes.chunks(BLOCK_HASH_BYTES)).collect();
                    self.blocks(view, &blocks, &mut buffer, cancelled, &mut answer)
                }
            };
            if !whole {
                return None;
            }
        }
        Some(Differing { question: self.hashes.question, runs: answer.runs })
    }

    /// Whatever is stored where the host has zeroes is different; nothing is read for it.
    fn zeroes(&self, view: &View, extent: Extent, cancelled: &dyn Fn() -> bool, answer: &mut Answer) -> bool {
        let mut at = extent.offset;
        while at < extent.end() {
            if cancelled() {
                return false;
            }
            let rest = Extent::new(at, extent.end() - at);
            let (part, is_hole) = run_at(view, rest);
            if !is_hole || self.needs.overlaps(part) {
                answer.add(part, Found::Unknown);
            }
            at = part.end();
        }
        true
    }

    fn blocks(
        &self,
        view: &View,
        mut blocks: &[Block<'_>],
        buffer: &mut Vec<u8>,
        cancelled: &dyn Fn() -> bool,
        answer: &mut Answer,
    ) -> bool {
        while let (Some((first, _)), Some((last, _))) = (blocks.first(), blocks.last()) {
            if cancelled() {
                return false;
            }
            let (run, is_hole) = run_at(view, Extent::new(first.offset, last.end() - first.offset));
            // Blocks of one kind; one of two kinds, and the last of some data, is read.
            let inside = blocks
                .iter()
                .take_while(|(extent, _)| if is_hole { extent.end() <= run.end() } else { extent.offset < run.end() });
            let count = inside.count().max(1);
            let is_hole = is_hole && first.end() <= run.end();
            let (now, later) =
                blocks.split_at(if is_hole { count } else { count.min((READ_BYTES / BLOCK_BYTES) as usize) });
            if is_hole {
                // The host has something there, or it would have said zeroes.
                for (extent, _) in now {
                    answer.add(*extent, if self.needs.overlaps(*extent) { Found::Unknown } else { Found::Zeroes });
                }
            } else {
                self.read(view, now, buffer, answer);
            }
            blocks = later;
        }
        true
    }

    /// Reads neighbours with one call; where that fails, each by itself.
    fn read(&self, view: &View, blocks: &[Block<'_>], buffer: &mut Vec<u8>, answer: &mut Answer) {
        let (start, end) = (blocks[0].0.offset, blocks[blocks.len() - 1].0.end());
        buffer.resize((end - start) as usize, 0);
        let readable = view.read(start, buffer).is_ok();
        for (extent, claimed) in blocks {
            let data = &mut buffer[(extent.offset - start) as usize..(extent.end() - start) as usize];
            if self.needs.overlaps(*extent) || (!readable && view.read(extent.offset, data).is_err()) {
                answer.add(*extent, Found::Unknown);
            } else if is_zero(data) {
                answer.add(*extent, Found::Zeroes);
            } else if self.key.hash(*extent, data) != **claimed {
                let mut parts = Vec::with_capacity(17 * BLOCK_HASH_BYTES);
                for part in pieces(*extent, PART_BYTES) {
                    let at = (part.offset - extent.offset) as usize;
                    parts.extend_from_slice(&self.key.hash(part, &data[at..at + part.length as usize]));
                }
                answer.add(*extent, Found::Parts(parts.into()));
            }
        }
    }
}

/// A block, and what the host says of it.
type Block<'a> = (Extent, &'a [u8]);

/// The run of one kind at the front of `within`, in whole sectors, and whether it is a hole. What cannot be told is data.
fn run_at(view: &View, within: Extent) -> (Extent, bool) {
    let (length, is_hole) = match view.allocation(within.offset) {
        Ok((length, Allocation::Hole)) => (length / SECTOR_BYTES * SECTOR_BYTES, true),
        Ok((length, Allocation::Data)) => (length.next_multiple_of(SECTOR_BYTES), false),
        Err(_) => (within.length.min(READ_BYTES), false),
    };
    let is_hole = is_hole && length > 0;
    (Extent::new(within.offset, length.max(SECTOR_BYTES).min(within.length)), is_hole)
}

#[derive(Default)]
struct Answer {
    runs: Vec<DifferingRun>,
}

impl Answer {
    /// Ranges come in order.
    fn add(&mut self, extent: Extent, found: Found) {
        let full = self.runs.len() == DIFFERING_RUNS_MAX;
        if let Some(last) = self.runs.last_mut() {
            let touching = last.extent.end() == extent.offset;
            let joined = match (&last.found, &found) {
                (Found::Unknown, Found::Unknown) | (Found::Zeroes, Found::Zeroes) if touching => Some(found.clone()),
                // The last part of the one and the first of the other may not be one part.
                (Found::Parts(front), Found::Parts(back)) if touching && extent.offset.is_multiple_of(PART_BYTES) => {
                    Some(Found::Parts(Bytes::from([&front[..], &back[..]].concat())))
                }
                // More than what differs may be told, never less.
                _ if full => Some(Found::Unknown),
                _ => None,
            };
            if let Some(joined) = joined {
                last.extent.length = extent.end() - last.extent.offset;
                last.found = joined;
                return;
            }
        }
        self.runs.push(DifferingRun { extent, found });
    }
}
