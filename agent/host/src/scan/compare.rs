//! Questions about blocks that are expected to be the same at the consumer.
//!
//! ```text
//! blocks → hashed (workers) → asked (in the stream, between cuts) → the same: settled with the next cut
//!                                                                 → different: read again, and sent but for equal parts
//! ```
//!
//! *Consistency.* A question leaves where a chunk with the blocks' data might leave, by the same two rules ([`super`]). An
//! answer *the same* says that this chunk would have changed nothing, so the blocks are settled as if it had been sent; they are
//! told as scanned with a cut that ended after the question, whose acknowledgement covers all that the answer stood on.
//! An answer *different* settles nothing: the blocks are read again under the same rules.
//!
//! What the consumer says that it holds ([`Held`]) is true of the place in the stream where the question was. Whatever
//! leaves for a part of it since (a record of any sequence, a chunk of the scan) makes it worthless, up to the moment at which the
//! chunk that makes use of it leaves.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::task::Poll;

use tidemark_base::compare::{BLOCK_BYTES, BLOCK_HASH_BYTES, CompareKey, PART_BYTES, pieces};
use tidemark_base::time::Instant;
use tidemark_base::{Extent, ExtentSet, Position, Sequence};
use tidemark_proto::replication::{Claim, Differing, Found, HashedRun, Hashes, QUESTION_RUNS_MAX, QUESTIONS_MAX};

use super::{Plan, ReadTools, ScanFailure, Scanned, may_follow};
use crate::pack::{HashedBlock, Held, HeldPart, Lost, PackError, Priority, Ticket, hash_blocks};
use crate::source::ScanRevision;

/// Questions whose blocks are being read and hashed: enough to keep the workers busy. Each holds its hashes alone; what is
/// read lies in a worker's own memory.
const HASH_READS_MAX: usize = 8;
/// So much is sent without a question when it turned out that nothing was the same for [`UNLIKE_BYTES_MAX`].
const PLAIN_BYTES: u64 = 256 << 20;
const UNLIKE_BYTES_MAX: u64 = 64 << 20;

pub struct Compare {
    key: CompareKey,
    reads: VecDeque<HashRead>,
    asked: BTreeMap<u64, Asked>,
    /// The last question's number.
    last: u64,
    /// What the consumer holds where it differs: by offset, the length of the part, at most 4 KiB. Bounded by the
    /// questions that may be under way and by what waits to be read again.
    held: BTreeMap<u64, (u64, Held)>,
    /// Differing blocks in a row that had no equal parts worth a question.
    unlike_bytes: u64,
    plain_bytes: u64,
}

struct HashRead {
    plan: Plan,
    /// What was logged before it was planned.
    logged: Position,
    seen: ScanRevision,
    touched: ExtentSet,
    ticket: Ticket<Result<Vec<HashedBlock>, PackError>>,
}

struct Asked {
    extents: Vec<Extent>,
    seen: ScanRevision,
    /// What left for it since.
    overwritten: ExtentSet,
    at: Instant,
}

/// What became of a read whose turn it was.
#[derive(Default)]
pub struct Turn {
    pub question: Option<Hashes>,
    /// To be planned again.
    pub again: Vec<Extent>,
    /// A record that left holds something newer.
    pub covered: Vec<Scanned>,
}

/// What an answer said.
pub struct Answer {
    pub same: Vec<Scanned>,
    pub different: Vec<Extent>,
}

impl Compare {
    pub fn new(key: CompareKey) -> Self {
        Self {
            key,
            reads: VecDeque::new(),
            asked: BTreeMap::new(),
            last: 0,
            held: BTreeMap::new(),
            unlike_bytes: 0,
            plain_bytes: 0,
        }
    }

    pub fn key(&self) -> &CompareKey {
        &self.key
    }

    pub fn is_idle(&self) -> bool {
        self.reads.is_empty() && self.asked.is_empty()
    }

    pub fn has_room(&self) -> bool {
        self.reads.len() < HASH_READS_MAX && self.reads.len() + self.asked.len() < QUESTIONS_MAX
    }

    /// Nothing was the same lately: a second read of everything is worse than asking a little less.
    pub fn is_suspended(&self) -> bool {
        self.plain_bytes > 0
    }

    pub fn sent_plain(&mut self, bytes: u64) {
        self.plain_bytes = self.plain_bytes.saturating_sub(bytes);
    }

    /// Of blocks that differ, so much was the same after all.
    pub fn observe(&mut self, bytes: u64, equal_bytes: u64) {
        if equal_bytes >= bytes / 8 {
            self.unlike_bytes = 0;
            return;
        }
        self.unlike_bytes += bytes;
        if self.unlike_bytes >= UNLIKE_BYTES_MAX {
            // Half of it is enough the next time.
            self.unlike_bytes = UNLIKE_BYTES_MAX / 2;
            self.plain_bytes = PLAIN_BYTES;
        }
    }

    /// When the oldest question left.
    pub fn asked_since(&self) -> Option<Instant> {
        self.asked.values().next().map(|asked| asked.at)
    }

    pub fn submit(&mut self, tools: &ReadTools<'_>, plan: Plan, logged: Position, seen: ScanRevision) {
        let (source, key, blocks) = (tools.source.clone(), self.key.clone(), plan.blocks.clone());
        let ticket = tools.workers.submit(Priority::Scan, Arc::clone(tools.done), move |worker| {
            hash_blocks(worker, source.disk(), &key, &blocks)
        });
        self.reads.push_back(HashRead { plan, logged, seen, touched: ExtentSet::new(), ticket });
    }

    /// A record left.
    pub fn touched(&mut self, extent: Extent, sequence: Sequence) {
        for read in self.reads.iter_mut().filter(|read| sequence > read.logged.sequence) {
            let HashRead { plan, touched, .. } = read;
            plan.extents().filter_map(|of| of.intersection(&extent)).for_each(|part| touched.insert(part));
        }
        self.overwritten(extent);
    }

    /// A record or a chunk of the scan left: what the consumer said of this range is no longer so.
    pub fn overwritten(&mut self, extent: Extent) {
        for asked in self.asked.values_mut() {
            let Asked { extents, overwritten, .. } = asked;
            extents.iter().filter_map(|of| of.intersection(&extent)).for_each(|part| overwritten.insert(part));
        }
        self.forget(extent);
    }

    /// Nothing is known any more of parts that this range touches.
    fn forget(&mut self, extent: Extent) {
        let from = extent.offset.saturating_sub(PART_BYTES);
        let near: Vec<u64> = self
            .held
            .range(from..extent.end())
            .filter(|(offset, (length, _))| **offset + length > extent.offset)
            .map(|(offset, _)| *offset)
            .collect();
        for offset in near {
            self.held.remove(&offset);
        }
    }

    /// What is known of these blocks, which are in disk order.
    pub fn held_in(&self, blocks: &[Extent]) -> Vec<HeldPart> {
        let part = |(offset, (length, held)): (&u64, &(u64, Held))| (Extent::new(*offset, *length), *held);
        blocks.iter().flat_map(|block| self.held.range(block.offset..block.end()).map(part)).collect()
    }

    /// The oldest read waits until records left that were logged before it.
    pub fn waits_for_records(&self, sent: &Position) -> bool {
        self.reads.front().is_some_and(|read| !may_follow(&read.logged, sent))
    }

    /// The oldest read as a question, when it is finished and may follow what was sent.
    pub fn next(&mut self, sent: &Position, now: Instant) -> Poll<Result<Turn, ScanFailure>> {
        let Some(read) = self.reads.pop_front_if(|read| may_follow(&read.logged, sent)) else { return Poll::Pending };
        let blocks = match read.ticket.poll() {
            Poll::Pending => {
                self.reads.push_front(read);
                return Poll::Pending;
            }
            Poll::Ready(Ok(Ok(blocks))) => blocks,
            Poll::Ready(Ok(Err(error))) => return Poll::Ready(Err(ScanFailure::Read(error))),
            Poll::Ready(Err(Lost)) => return Poll::Ready(Err(ScanFailure::Lost)),
        };
        let HashRead { plan, seen, touched, .. } = read;
        let mut turn = Turn::default();
        let mut runs: Vec<HashedRun> = Vec::new();
        let mut holes = plan.holes.iter().map(|hole| HashedBlock { extent: *hole, hash: None }).peekable();
        let mut blocks = blocks.into_iter().peekable();
        loop {
            let hole_is_next = match (holes.peek(), blocks.peek()) {
                (Some(hole), Some(block)) => hole.extent.offset < block.extent.offset,
                (hole, _) => hole.is_some(),
            };
            let Some(block) = (if hole_is_next { holes.next() } else { blocks.next() }) else { break };
            let mut parts = touched.overlapping(block.extent).peekable();
            if parts.peek().is_some() {
                turn.covered.extend(parts.map(|extent| Scanned { extent, seen }));
                turn.again.extend(touched.gaps(block.extent));
            } else if !ask(&mut runs, &block) {
                turn.again.push(block.extent);
            }
        }
        if !runs.is_empty() {
            self.last += 1;
            let extents = runs.iter().map(|run| run.extent).collect();
            self.asked.insert(self.last, Asked { extents, seen, overwritten: ExtentSet::new(), at: now });
            turn.question = Some(Hashes { question: self.last, runs });
        }
        Poll::Ready(Ok(turn))
    }

    /// `None`: nobody asked that.
    pub fn answered(&mut self, differing: &Differing) -> Option<Answer> {
        let Asked { extents, seen, overwritten, .. } = self.asked.remove(&differing.question)?;
        let told: ExtentSet = differing.runs.iter().map(|run| run.extent).collect();
        let mut answer = Answer { same: Vec::new(), different: Vec::new() };
        for extent in &extents {
            answer.same.extend(told.gaps(*extent).into_iter().map(|extent| Scanned { extent, seen }));
            answer.different.extend(told.overlapping(*extent));
        }
        for run in &differing.runs {
            for (index, part) in pieces(run.extent, PART_BYTES).enumerate() {
                let held = match &run.found {
                    Found::Unknown => break,
                    Found::Zeroes => Held::Zeroes,
                    Found::Parts(hashes) => {
                        let hash = &hashes[index * BLOCK_HASH_BYTES..][..BLOCK_HASH_BYTES];
                        Held::Hash(hash.try_into().expect("as many bytes as a hash has"))
                    }
                };
                // Of what left since the question nothing is known.
                if overwritten.overlapping(part).next().is_none() && extents.iter().any(|extent| extent.contains(&part))
                {
                    // A block that is asked about in other pieces than before: parts that overlap are not kept.
                    self.forget(part);
                    self.held.insert(part.offset, (part.length, held));
                }
            }
        }
        Some(answer)
    }
}

/// Adds a block to a question; false when there is no room in it.
fn ask(runs: &mut Vec<HashedRun>, block: &HashedBlock) -> bool {
    let joins = |last: &&mut HashedRun| {
        last.extent.end() == block.extent.offset
            && match last.claim {
                Claim::Zeroes => block.hash.is_none(),
                // The receiver cuts a run into blocks where they lie on the disk.
                Claim::Hashes(_) => block.hash.is_some() && block.extent.offset.is_multiple_of(BLOCK_BYTES),
            }
    };
    if let Some(last) = runs.last_mut().filter(joins) {
        last.extent.length += block.extent.length;
        if let (Claim::Hashes(hashes), Some(hash)) = (&mut last.claim, block.hash) {
            *hashes = [&hashes[..], &hash[..]].concat().into();
        }
        return true;
    }
    if runs.len() == QUESTION_RUNS_MAX {
        return false;
    }
    let claim = block.hash.map_or(Claim::Zeroes, |hash| Claim::Hashes(hash.to_vec().into()));
    runs.push(HashedRun { extent: block.extent, claim });
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemark_base::{DiskId, Epoch, Generation};
    use tidemark_proto::replication::DifferingRun;

    fn compare() -> Compare {
        Compare::new(CompareKey::new(DiskId::random(), Generation::FIRST, [1; 16]))
    }

    fn asked(compare: &mut Compare, extent: Extent) -> u64 {
        compare.last += 1;
        let asked =
            Asked { extents: vec![extent], seen: ScanRevision(1), overwritten: ExtentSet::new(), at: Instant::now() };
        compare.asked.insert(compare.last, asked);
        compare.last
    }

    /// What the consumer said it holds is believed only of parts for which nothing left since the question.
    #[test]
    fn what_left_since_the_question_is_not_believed_to_be_held() {
        let mut compare = compare();
        let block = Extent::new(0, BLOCK_BYTES);
        let question = asked(&mut compare, block);
        // Before the answer, a record into the third part; no read knows of it.
        compare.touched(Extent::new(2 * PART_BYTES + 512, 512), Sequence(0));
        let hashes: Vec<u8> = (0..16u8).flat_map(|part| [part; BLOCK_HASH_BYTES]).collect();
        let runs = vec![DifferingRun { extent: block, found: Found::Parts(hashes.into()) }];
        let answer = compare.answered(&Differing { question, runs: runs.clone() }).unwrap();
        assert_eq!((answer.same.len(), answer.different), (0, vec![block]));
        assert!(compare.answered(&Differing { question, runs }).is_none(), "one answer a question");
        let parts = |compare: &Compare| -> Vec<u64> {
            compare.held_in(&[block]).iter().map(|(part, _)| part.offset / PART_BYTES).collect()
        };
        assert_eq!(parts(&compare), [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
        // After it, a chunk of the scan over two parts and a half.
        compare.overwritten(Extent::new(7 * PART_BYTES - 512, 2 * PART_BYTES));
        assert_eq!(parts(&compare), [0, 1, 3, 4, 5, 9, 10, 11, 12, 13, 14, 15]);
        compare.overwritten(block);
        assert!(compare.held.is_empty());
    }

    /// A block that is asked about again begins elsewhere: what is held of it stays in order, and nothing twice.
    #[test]
    fn parts_that_are_held_never_overlap() {
        let mut compare = compare();
        for extent in [Extent::new(0, BLOCK_BYTES), Extent::new(1536, 1024), Extent::new(512, BLOCK_BYTES - 512)] {
            let question = asked(&mut compare, extent);
            let runs = vec![DifferingRun { extent, found: Found::Zeroes }];
            compare.answered(&Differing { question, runs }).unwrap();
        }
        let held = compare.held_in(&[Extent::new(0, BLOCK_BYTES)]);
        assert!(held.windows(2).all(|pair| pair[0].0.end() <= pair[1].0.offset), "{held:?}");
        assert_eq!(held[0].0, Extent::new(512, PART_BYTES - 512));
    }

    /// A server may tell more than was asked; what was not asked is neither settled nor believed.
    #[test]
    fn an_answer_is_about_what_was_asked() {
        let mut compare = compare();
        let question = asked(&mut compare, Extent::new(BLOCK_BYTES, BLOCK_BYTES));
        let runs = vec![DifferingRun { extent: Extent::new(0, BLOCK_BYTES + PART_BYTES), found: Found::Zeroes }];
        let answer = compare.answered(&Differing { question, runs }).unwrap();
        assert_eq!(answer.different, [Extent::new(BLOCK_BYTES, PART_BYTES)]);
        let same =
            Scanned { extent: Extent::new(BLOCK_BYTES + PART_BYTES, BLOCK_BYTES - PART_BYTES), seen: ScanRevision(1) };
        assert_eq!(answer.same, [same]);
        assert_eq!(compare.held_in(&[Extent::new(0, 4 * BLOCK_BYTES)]).len(), 1);
        assert!(compare.answered(&Differing { question: 99, runs: vec![] }).is_none());
    }

    /// Where nothing is the same, questions stop for a while.
    #[test]
    fn a_replica_that_has_nothing_in_common_is_hardly_asked() {
        let mut compare = compare();
        compare.observe(UNLIKE_BYTES_MAX - 1, 0);
        compare.observe(BLOCK_BYTES, BLOCK_BYTES / 2);
        compare.observe(UNLIKE_BYTES_MAX - 1, 0);
        assert!(!compare.is_suspended());
        compare.observe(BLOCK_BYTES, 0);
        assert!(compare.is_suspended());
        compare.sent_plain(PLAIN_BYTES - 1);
        assert!(compare.is_suspended());
        compare.sent_plain(1);
        assert!(!compare.is_suspended());
    }

    /// The parts that a record changed since the read are not asked about, the others of the same block are read again.
    #[test]
    fn a_question_leaves_out_what_a_record_changed() {
        let workers = crate::pack::Workers::with_threads(1).unwrap();
        let mut compare = compare();
        let logged = Epoch::random().start();
        let plan = Plan {
            blocks: vec![Extent::new(0, 2 * BLOCK_BYTES)],
            holes: vec![Extent::new(4 * BLOCK_BYTES, BLOCK_BYTES), Extent::new(8 * BLOCK_BYTES, BLOCK_BYTES)],
        };
        let (sender, done) = std::sync::mpsc::channel();
        let blocks = (0..2).map(|block| HashedBlock {
            extent: Extent::new(block * BLOCK_BYTES, BLOCK_BYTES),
            hash: (block == 1).then_some([7; 16]),
        });
        let blocks: Vec<HashedBlock> = blocks.collect();
        let ticket = workers.submit(Priority::Scan, Arc::new(move || sender.send(()).unwrap()), move |_| Ok(blocks));
        done.recv().unwrap();
        let seen = ScanRevision(3);
        compare.reads.push_back(HashRead { plan, logged, seen, touched: ExtentSet::new(), ticket });
        compare.touched(Extent::new(512, 512), Sequence(1));
        compare.touched(Extent::new(8 * BLOCK_BYTES, BLOCK_BYTES), Sequence(2));
        let ahead = Position { sequence: Sequence(5), ..logged };
        let other = Epoch::random().start();
        assert!(compare.next(&other, Instant::now()).is_pending(), "of another epoch");
        let Poll::Ready(Ok(turn)) = compare.next(&ahead, Instant::now()) else { panic!("its turn") };
        let runs = turn.question.unwrap().runs;
        assert_eq!(
            runs,
            [
                HashedRun { extent: Extent::new(BLOCK_BYTES, BLOCK_BYTES), claim: Claim::Hashes(vec![7; 16].into()) },
                HashedRun { extent: Extent::new(4 * BLOCK_BYTES, BLOCK_BYTES), claim: Claim::Zeroes },
            ]
        );
        assert_eq!(turn.again, [Extent::new(0, 512), Extent::new(1024, BLOCK_BYTES - 1024)]);
        let covered: Vec<Extent> = turn.covered.iter().map(|covered| covered.extent).collect();
        assert_eq!(covered, [Extent::new(512, 512), Extent::new(8 * BLOCK_BYTES, BLOCK_BYTES)]);
    }
}
