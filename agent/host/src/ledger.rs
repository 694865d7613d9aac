//! How many bytes were logged up to a sequence: what is pending behind a cursor, without counting twice or guessing.

use std::collections::VecDeque;

use tidemark_base::Sequence;

/// Past it every second entry goes. Cursors lie where batches ended, so that most are found as they are; the bytes
/// between an entry and a cursor are read from the log.
const ENTRIES_MAX: usize = 4096;

/// Sequences of one epoch with the bytes logged up to there since the ledger began; oldest first, never empty.
pub struct Ledger {
    entries: VecDeque<(Sequence, u64)>,
}

impl Ledger {
    pub fn begin(at: Sequence) -> Self {
        Self { entries: [(at, 0)].into() }
    }

    fn newest(&self) -> (Sequence, u64) {
        *self.entries.back().expect("never empty")
    }

    /// Bytes since the ledger began.
    pub fn total(&self) -> u64 {
        self.newest().1
    }

    /// A batch was logged that ended at `sequence`.
    pub fn push(&mut self, sequence: Sequence, bytes: u64) {
        if self.entries.len() == ENTRIES_MAX {
            let mut index = 0;
            // The first and the newest stay.
            self.entries.retain(|_| {
                index += 1;
                index % 2 == 1 || index == ENTRIES_MAX
            });
        }
        let total = self.total() + bytes;
        self.entries.push_back((sequence, total));
    }

    /// The last entry that is not past `sequence`; `None` when the ledger began after it.
    pub fn at_or_before(&self, sequence: Sequence) -> Option<(Sequence, u64)> {
        let after = self.entries.partition_point(|(at, _)| *at <= sequence);
        Some(self.entries[after.checked_sub(1)?])
    }

    /// The first entry past `sequence`.
    pub fn after(&self, sequence: Sequence) -> Option<(Sequence, u64)> {
        self.entries.get(self.entries.partition_point(|(at, _)| *at <= sequence)).copied()
    }

    /// Where the ledger begins.
    pub fn first(&self) -> Sequence {
        self.entries[0].0
    }

    /// Nobody asks for what lies before `sequence` any more.
    pub fn forget_before(&mut self, sequence: Sequence) {
        while self.entries.len() > 1 && self.entries[1].0 <= sequence {
            self.entries.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_never_says_more_than_was_logged_and_keeps_its_size() {
        let mut ledger = Ledger::begin(Sequence(10));
        assert_eq!(ledger.at_or_before(Sequence(9)), None);
        let mut exact = vec![(10, 0)];
        for batch in 1..20_000u64 {
            ledger.push(Sequence(10 + batch * 3), batch % 7);
            exact.push((10 + batch * 3, exact[exact.len() - 1].1 + batch % 7));
        }
        assert!(ledger.entries.len() <= ENTRIES_MAX);
        assert_eq!(ledger.total(), exact[exact.len() - 1].1);
        for asked in [10, 11, 13, 4000, 60_000, 70_000] {
            let (at, bytes) = ledger.at_or_before(Sequence(asked)).unwrap();
            assert!(at.0 <= asked && exact.contains(&(at.0, bytes)));
        }
        // The newest are all there.
        assert_eq!(
            ledger.at_or_before(Sequence(59_000)).unwrap().0.0,
            exact.iter().rfind(|(at, _)| *at <= 59_000).unwrap().0
        );
        ledger.forget_before(Sequence(59_001));
        assert!(ledger.first().0 <= 59_001 && ledger.first().0 > 58_900);
        assert_eq!(ledger.total(), exact[exact.len() - 1].1);
    }
}
