//! Which cuts are consistent, and what was lost.

use serde::{Deserialize, Serialize};

use super::sealed::{Boundary, BoundaryKind};

/// Cuts that are gone, kept in the manifest ([`crate::replica::manifest`]) from the moment on at which this was found.
///
/// A scan that began before that moment compared with a replica that still had them, so it repairs nothing, wherever it
/// ended; and a file that was lost once is not used again even if it can be read the next time, because a scan since then
/// compared without it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Loss {
    pub first: u64,
    pub last: u64,
    /// How many of them are gone. A segment of which more is found to be gone has another loss.
    pub cuts: u64,
    /// The journal's last cut when this was found: a scan that begins later ends the run that is not consistent.
    pub found_at: u64,
}

impl Loss {
    /// Nothing from `first` to `last` is left.
    pub fn is_whole(&self) -> bool {
        self.last.checked_sub(self.first).and_then(|cuts| cuts.checked_add(1)) == Some(self.cuts)
    }

    pub fn covers(&self, first: u64, last: u64) -> bool {
        self.is_whole() && self.first <= first && last <= self.last
    }
}

/// A run of cuts that are not consistent: from `from` up to but without `until`; to the end while that is `None`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Interval {
    pub from: u64,
    pub until: Option<u64>,
    /// Because cuts were lost, not only because a scan ran.
    pub damaged: bool,
}

#[derive(Clone, Default, Debug)]
pub struct History {
    intervals: Vec<Interval>,
    /// The open interval ends only with a scan that begins after this cut.
    scan_after: Option<u64>,
}

impl History {
    /// From the boundaries of scans, in order, and what was lost.
    pub fn new(boundaries: &[Boundary], losses: &[Loss]) -> Self {
        let scans = boundaries.iter().map(|boundary| (boundary.cut, Ok(*boundary)));
        let mut events: Vec<_> = losses.iter().map(|loss| (loss.first, Err(*loss))).chain(scans).collect();
        events.sort_by_key(|(cut, event)| (*cut, event.is_ok()));
        let mut history = Self::default();
        for (_, event) in events {
            match event {
                Ok(boundary) => history.apply(boundary),
                Err(loss) => history.lose(loss),
            }
        }
        history
    }

    /// A scan begins or ends. Damage is none of its business: it is in a [`Loss`].
    pub fn apply(&mut self, boundary: Boundary) {
        let is_repairing = self.scan_after.is_none_or(|found_at| boundary.cut > found_at);
        let open = self.intervals.last_mut().filter(|interval| interval.until.is_none());
        match (boundary.what, open) {
            (BoundaryKind::ScanStart, open) => {
                if is_repairing {
                    self.scan_after = None;
                }
                if open.is_none() {
                    self.intervals.push(Interval { from: boundary.cut, until: None, damaged: false });
                }
            }
            (BoundaryKind::ScanEnd, Some(open)) if self.scan_after.is_none() => open.until = Some(boundary.cut),
            (BoundaryKind::ScanEnd | BoundaryKind::Damaged, _) => {}
        }
    }

    fn lose(&mut self, loss: Loss) {
        self.scan_after = self.scan_after.max(Some(loss.found_at));
        match self.intervals.last_mut().filter(|interval| interval.until.is_none()) {
            Some(open) => open.damaged = true,
            None => self.intervals.push(Interval { from: loss.first, until: None, damaged: true }),
        }
    }

    pub fn is_consistent(&self, cut: u64) -> bool {
        self.interval(cut).is_none()
    }

    /// The inconsistent run that holds `cut`.
    pub fn interval(&self, cut: u64) -> Option<Interval> {
        let index = self.intervals.partition_point(|interval| interval.from <= cut);
        let interval = *self.intervals.get(index.checked_sub(1)?)?;
        interval.until.is_none_or(|until| cut < until).then_some(interval)
    }

    /// The newest consistent cut at or before `cut`; 0 is before everything.
    pub fn consistent_at_or_before(&self, cut: u64) -> u64 {
        self.interval(cut).map_or(cut, |interval| interval.from.saturating_sub(1))
    }

    pub fn open(&self) -> Option<Interval> {
        self.intervals.last().copied().filter(|interval| interval.until.is_none())
    }

    /// Whether what was lost can only be replaced by a new scan.
    pub fn needs_scan(&self) -> bool {
        self.scan_after.is_some()
    }

    pub fn intervals(&self) -> &[Interval] {
        &self.intervals
    }

    /// Whether a loss still says anything when the base is at `base`: something of it is left, or its run is not over.
    pub fn is_felt(&self, loss: &Loss, base: u64) -> bool {
        let run = self.interval(loss.first);
        loss.last > base || run.is_some_and(|run| run.until.is_none_or(|until| until > base))
    }

    /// Forgets what lies at or before `cut`.
    pub fn forget(&mut self, cut: u64) {
        self.intervals.retain(|interval| interval.until.is_none_or(|until| until > cut));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(cut: u64) -> Boundary {
        Boundary { cut, what: BoundaryKind::ScanStart }
    }

    fn end(cut: u64) -> Boundary {
        Boundary { cut, what: BoundaryKind::ScanEnd }
    }

    fn lost(cut: u64, found_at: u64) -> Loss {
        Loss { first: cut, last: cut, cuts: 1, found_at }
    }

    fn consistent(history: &History, cuts: u64) -> Vec<u64> {
        (0..cuts).filter(|&cut| history.is_consistent(cut)).collect()
    }

    #[test]
    fn a_scan_is_not_consistent_until_its_end_and_damage_not_until_a_later_scan() {
        let scans = [start(1), end(4), start(8), end(10), start(12), start(13), end(15)];
        let mut history = History::new(&scans, &[lost(9, 11), lost(20, 22)]);
        assert_eq!(consistent(&history, 23), [0, 4, 5, 6, 7, 15, 16, 17, 18, 19]);
        assert_eq!(history.consistent_at_or_before(22), 19);
        assert_eq!(history.consistent_at_or_before(9), 7);
        assert!(history.needs_scan());
        history.forget(15);
        assert_eq!(history.intervals(), [Interval { from: 20, until: None, damaged: true }]);
        history.apply(start(23));
        assert!(!history.needs_scan());
        history.apply(end(24));
        assert!(history.is_consistent(24));
    }

    #[test]
    fn only_a_scan_that_began_after_the_last_of_the_losses_was_found_ends_their_run() {
        let scans = [start(1), end(2), start(12), end(14), start(31), end(33), start(41), end(43)];
        // Found at the end of what is there: the scans of before count for nothing.
        assert_eq!(consistent(&History::new(&scans, &[lost(5, 50)]), 52), [0, 2, 3, 4]);
        // Found in the middle of the scan that ended at 14, and before the one of 31.
        let found_early = History::new(&scans, &[lost(5, 13)]);
        assert_eq!(consistent(&found_early, 35), [0, 2, 3, 4, 33, 34]);
        // Two losses, the older place found later: the first repair is none of the second.
        let twice = History::new(&scans, &[lost(5, 35), lost(9, 20)]);
        assert_eq!(consistent(&twice, 45), [0, 2, 3, 4, 43, 44]);
        let thrice = History::new(&scans, &[lost(9, 20), lost(32, 40)]);
        assert_eq!(consistent(&thrice, 45).last(), Some(&44), "the scan of 31 lost its middle, the one of 41 did not");
        assert!(!thrice.is_consistent(42) && !thrice.is_consistent(33));
        // A loss is felt for as long as something of it is left, or its run goes on.
        assert!(twice.is_felt(&lost(5, 35), 4) && twice.is_felt(&lost(5, 35), 42));
        assert!(!twice.is_felt(&lost(5, 35), 43));
    }
}
