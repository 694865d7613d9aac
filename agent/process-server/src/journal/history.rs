//! Which cuts are consistent.

use super::sealed::{Boundary, BoundaryKind};

/// A run of cuts that are not consistent: from `from` up to but without `until`; to the end while that is `None`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Interval {
    pub from: u64,
    pub until: Option<u64>,
    /// Because cuts were lost, not only because a scan ran.
    pub damaged: bool,
}

/// Built from the journal's boundaries, in order.
#[derive(Clone, Default, Debug)]
pub struct History {
    intervals: Vec<Interval>,
    /// The open interval ends only with a scan that begins from now on.
    needs_scan: bool,
}

impl History {
    pub fn apply(&mut self, boundary: Boundary) {
        let open = self.intervals.last_mut().filter(|interval| interval.until.is_none());
        let new = Interval { from: boundary.cut, until: None, damaged: boundary.what == BoundaryKind::Damaged };
        match (boundary.what, open) {
            (BoundaryKind::ScanStart, open) => {
                self.needs_scan = false;
                if open.is_none() {
                    self.intervals.push(new);
                }
            }
            (BoundaryKind::ScanEnd, Some(open)) if !self.needs_scan => open.until = Some(boundary.cut),
            (BoundaryKind::ScanEnd, _) => {}
            (BoundaryKind::Damaged, open) => {
                self.needs_scan = true;
                match open {
                    Some(open) => open.damaged = true,
                    None => self.intervals.push(new),
                }
            }
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
        self.needs_scan
    }

    pub fn intervals(&self) -> &[Interval] {
        &self.intervals
    }

    /// Forgets what lies at or before `cut`.
    pub fn forget(&mut self, cut: u64) {
        self.intervals.retain(|interval| interval.until.is_none_or(|until| until > cut));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scan_is_not_consistent_until_its_end_and_damage_not_until_a_later_scan() {
        let mut history = History::default();
        let mut at = |cut, what| history.apply(Boundary { cut, what });
        at(1, BoundaryKind::ScanStart);
        at(4, BoundaryKind::ScanEnd);
        at(8, BoundaryKind::ScanStart);
        at(9, BoundaryKind::Damaged);
        at(10, BoundaryKind::ScanEnd);
        at(12, BoundaryKind::ScanStart);
        at(13, BoundaryKind::ScanStart);
        at(15, BoundaryKind::ScanEnd);
        at(20, BoundaryKind::Damaged);
        let consistent: Vec<u64> = (0..23).filter(|&cut| history.is_consistent(cut)).collect();
        assert_eq!(consistent, [0, 4, 5, 6, 7, 15, 16, 17, 18, 19]);
        assert_eq!(history.consistent_at_or_before(22), 19);
        assert_eq!(history.consistent_at_or_before(9), 7);
        assert!(history.needs_scan());
        history.forget(15);
        assert_eq!(history.intervals(), [Interval { from: 20, until: None, damaged: true }]);
    }
}
