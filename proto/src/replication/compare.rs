//! Questions and answers of a compare, and what a server asks for to repair itself.
//!
//! A host names blocks with their hashes; the server says which of them differ, and what it has there in finer parts, so
//! that one question and one answer are enough to send no more than the parts of 4 KiB that differ.

use bytes::Bytes;
use tidemark_base::Extent;
use tidemark_base::compare::{BLOCK_BYTES, BLOCK_HASH_BYTES, PART_BYTES, piece_count};

use super::{WireError, positive, wire};

/// Questions that a stream may have under way: what a compare has instead of credit. With [`QUESTION_BLOCKS_MAX`] it
/// bounds what waits at the server (64 KiB of hashes) and what comes back (2 MiB), and lets 256 MiB be under way.
pub const QUESTIONS_MAX: usize = 64;
/// Blocks with a hash in one question.
pub const QUESTION_BLOCKS_MAX: usize = 64;
pub const QUESTION_RUNS_MAX: usize = 128;
/// Runs of one answer. A server that found more joins them: more than what differs may be named, never less.
pub const DIFFERING_RUNS_MAX: usize = 256;
/// Ranges of one [`Need`].
pub const NEED_EXTENTS_MAX: usize = 1024;

/// The largest answer fits into what a host takes as one frame of a server: 64 KiB.
const _: () = assert!(
    QUESTION_BLOCKS_MAX * (BLOCK_BYTES / PART_BYTES) as usize * BLOCK_HASH_BYTES
        + QUESTION_BLOCKS_MAX * BLOCK_HASH_BYTES
        + DIFFERING_RUNS_MAX * 32
        < 48 << 10
);
const _: () = assert!(NEED_EXTENTS_MAX * 32 < 48 << 10);

/// A question. See `replication.proto`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hashes {
    pub question: u64,
    pub runs: Vec<HashedRun>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HashedRun {
    pub extent: Extent,
    pub claim: Claim,
}

/// What the host's disk holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Claim {
    Zeroes,
    /// Of each block of [`BLOCK_BYTES`] that the run touches, back to back.
    Hashes(Bytes),
}

/// An answer. See `replication.proto`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Differing {
    pub question: u64,
    pub runs: Vec<DifferingRun>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DifferingRun {
    pub extent: Extent,
    pub found: Found,
}

/// What the replica holds where it differs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Found {
    /// It cannot be read, or was not looked at closely.
    Unknown,
    Zeroes,
    /// Of each part of [`PART_BYTES`] that the run touches, back to back.
    Parts(Bytes),
}

/// What the server cannot read any more.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Need {
    pub extents: Vec<Extent>,
    pub why: NeedReason,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum NeedReason {
    /// What was stored does not match its hash.
    Damaged,
}

/// Ranges come in order, apart, and on sectors. Whether they lie on the disk is for the receiver to check.
struct Ascending {
    end: u64,
}

impl Ascending {
    fn next(&mut self, offset: u64, length: u64) -> Result<Extent, WireError> {
        let extent = Extent::new(offset, length);
        if !extent.is_valid_on(u64::MAX) || offset < self.end {
            return Err(WireError::Contradiction("ranges of a compare are out of order or not on sectors"));
        }
        self.end = extent.end();
        Ok(extent)
    }
}

fn check_hashes(extent: Extent, size: u64, hashes: &Bytes) -> Result<(), WireError> {
    let expected = piece_count(extent, size).checked_mul(BLOCK_HASH_BYTES as u64);
    if expected != Some(hashes.len() as u64) {
        return Err(WireError::Length { field: "the hashes of a run", bytes: hashes.len() });
    }
    Ok(())
}

impl Hashes {
    /// Blocks that have a hash.
    pub fn blocks(&self) -> usize {
        self.runs
            .iter()
            .map(|run| match &run.claim {
                Claim::Zeroes => 0,
                Claim::Hashes(hashes) => hashes.len() / BLOCK_HASH_BYTES,
            })
            .sum()
    }

    /// What it costs on the wire, or nearly: for throttles and figures.
    pub fn wire_bytes(&self) -> u64 {
        (self.blocks() * BLOCK_HASH_BYTES + self.runs.len() * 16 + 16) as u64
    }
}

impl TryFrom<wire::Hashes> for Hashes {
    type Error = WireError;

    fn try_from(wire: wire::Hashes) -> Result<Self, WireError> {
        if wire.runs.is_empty() || wire.runs.len() > QUESTION_RUNS_MAX {
            return Err(WireError::Length { field: "the runs of a question", bytes: wire.runs.len() });
        }
        let mut ascending = Ascending { end: 0 };
        let mut runs = Vec::with_capacity(wire.runs.len());
        for run in wire.runs {
            let extent = ascending.next(run.offset, run.length)?;
            let claim = if run.hashes.is_empty() {
                Claim::Zeroes
            } else {
                check_hashes(extent, BLOCK_BYTES, &run.hashes)?;
                Claim::Hashes(run.hashes)
            };
            runs.push(HashedRun { extent, claim });
        }
        let hashes = Self { question: positive("the number of a question", wire.question)?, runs };
        if hashes.blocks() > QUESTION_BLOCKS_MAX {
            return Err(WireError::Length { field: "the blocks of a question", bytes: hashes.blocks() });
        }
        Ok(hashes)
    }
}

impl From<Hashes> for wire::Hashes {
    fn from(hashes: Hashes) -> Self {
        let run = |run: HashedRun| wire::HashedRun {
            offset: run.extent.offset,
            length: run.extent.length,
            hashes: match run.claim {
                Claim::Zeroes => Bytes::new(),
                Claim::Hashes(hashes) => hashes,
            },
        };
        Self { question: hashes.question, runs: hashes.runs.into_iter().map(run).collect() }
    }
}

impl TryFrom<wire::Differing> for Differing {
    type Error = WireError;

    fn try_from(wire: wire::Differing) -> Result<Self, WireError> {
        if wire.runs.len() > DIFFERING_RUNS_MAX {
            return Err(WireError::Length { field: "the runs of an answer", bytes: wire.runs.len() });
        }
        let mut ascending = Ascending { end: 0 };
        let mut runs = Vec::with_capacity(wire.runs.len());
        for run in wire.runs {
            let extent = ascending.next(run.offset, run.length)?;
            let found = match (run.zeroes, run.hashes.is_empty()) {
                (true, true) => Found::Zeroes,
                (true, false) => return Err(WireError::Contradiction("zeroes have hashes")),
                (false, true) => Found::Unknown,
                (false, false) => {
                    check_hashes(extent, PART_BYTES, &run.hashes)?;
                    Found::Parts(run.hashes)
                }
            };
            runs.push(DifferingRun { extent, found });
        }
        Ok(Self { question: positive("the number of a question", wire.question)?, runs })
    }
}

impl From<Differing> for wire::Differing {
    fn from(differing: Differing) -> Self {
        let run = |run: DifferingRun| {
            let (hashes, zeroes) = match run.found {
                Found::Unknown => (Bytes::new(), false),
                Found::Zeroes => (Bytes::new(), true),
                Found::Parts(hashes) => (hashes, false),
            };
            wire::DifferingRun { offset: run.extent.offset, length: run.extent.length, hashes, zeroes }
        };
        Self { question: differing.question, runs: differing.runs.into_iter().map(run).collect() }
    }
}

impl TryFrom<wire::Need> for Need {
    type Error = WireError;

    fn try_from(wire: wire::Need) -> Result<Self, WireError> {
        if wire.extents.is_empty() || wire.extents.len() > NEED_EXTENTS_MAX {
            return Err(WireError::Length { field: "the ranges that are needed", bytes: wire.extents.len() });
        }
        let mut ascending = Ascending { end: 0 };
        let why = match wire.why() {
            wire::NeedReason::Damaged => NeedReason::Damaged,
            wire::NeedReason::Invalid => return Err(WireError::Value { field: "need", value: wire.why as u64 }),
        };
        let extents = wire.extents.iter().map(|range| ascending.next(range.offset, range.length));
        Ok(Self { extents: extents.collect::<Result<_, _>>()?, why })
    }
}

impl From<Need> for wire::Need {
    fn from(need: Need) -> Self {
        let range = |extent: Extent| wire::Range { offset: extent.offset, length: extent.length };
        Self {
            extents: need.extents.into_iter().map(range).collect(),
            why: match need.why {
                NeedReason::Damaged => wire::NeedReason::Damaged,
            } as i32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: u64 = BLOCK_BYTES;

    fn question() -> Hashes {
        Hashes {
            question: 7,
            runs: vec![
                HashedRun { extent: Extent::new(0, 1 << 40), claim: Claim::Zeroes },
                // Touches three blocks.
                HashedRun {
                    extent: Extent::new((1 << 40) + BLOCK - 512, BLOCK + 1024),
                    claim: Claim::Hashes(vec![1; 48].into()),
                },
            ],
        }
    }

    #[test]
    fn questions_answers_and_needs_survive_the_wire() {
        assert_eq!(Hashes::try_from(wire::Hashes::from(question())), Ok(question()));
        assert_eq!(question().blocks(), 3);
        let differing = Differing {
            question: 7,
            runs: vec![
                DifferingRun { extent: Extent::new(512, 512), found: Found::Unknown },
                DifferingRun { extent: Extent::new(BLOCK, BLOCK), found: Found::Parts(vec![2; 256].into()) },
                DifferingRun { extent: Extent::new(4 * BLOCK, BLOCK), found: Found::Zeroes },
            ],
        };
        assert_eq!(Differing::try_from(wire::Differing::from(differing.clone())), Ok(differing));
        let need = Need { extents: vec![Extent::new(0, 512), Extent::new(1024, 512)], why: NeedReason::Damaged };
        assert_eq!(Need::try_from(wire::Need::from(need.clone())), Ok(need));
    }

    #[test]
    fn hostile_questions_answers_and_needs_are_refused() {
        let good = wire::Hashes::from(question());
        let run = |offset, length, hashes: usize| wire::HashedRun { offset, length, hashes: vec![1; hashes].into() };
        for runs in [
            vec![],
            vec![run(100, 512, 16)],
            vec![run(0, 0, 0)],
            vec![run(0, 512, 15)],
            vec![run(0, 512, 32)],
            vec![run(u64::MAX - 511, 512, 0)],
            vec![run(512, 512, 0), run(512, 512, 0)],
            vec![run(1024, 512, 0), run(512, 512, 0)],
            vec![run(0, 65 * BLOCK, 65 * 16)],
            (0..129).map(|at| run(at * 512, 512, 0)).collect(),
        ] {
            assert!(Hashes::try_from(wire::Hashes { runs: runs.clone(), ..good.clone() }).is_err(), "{runs:?}");
        }
        assert!(Hashes::try_from(wire::Hashes { question: 0, ..good }).is_err());
        let run = |hashes: usize, zeroes| wire::DifferingRun {
            offset: 0,
            length: 8192,
            hashes: vec![1; hashes].into(),
            zeroes,
        };
        for bad in [run(16, false), run(32, true), run(48, false)] {
            assert!(Differing::try_from(wire::Differing { question: 1, runs: vec![bad] }).is_err());
        }
        assert!(Differing::try_from(wire::Differing { question: 0, runs: vec![] }).is_err());
        let range = |offset, length| wire::Range { offset, length };
        for extents in [vec![], vec![range(0, 1)], vec![range(512, 512), range(0, 512)], vec![range(0, 512); 1025]] {
            assert!(Need::try_from(wire::Need { extents, why: 1 }).is_err());
        }
        assert!(Need::try_from(wire::Need { extents: vec![range(0, 512)], why: 0 }).is_err());
    }
}
