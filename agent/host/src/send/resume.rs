//! Where a stream begins: what the server says it holds, against what we have.
//!
//! | server's position | seen from here | → |
//! |---|---|---|
//! | none | nothing acknowledged | initial scan of the whole disk, from this epoch's start |
//! | none | something was acknowledged | alarm "replica lost", then the same |
//! | none, but something is there (cuts were lost) | – | alarm "diverged": the whole disk is compared, from this epoch's start |
//! | P of this epoch | readable, not behind the cursor, no scan pending or open | resume after P |
//! | P of this epoch | readable, not behind the cursor, scan pending or open | scan what is pending, from P |
//! | P of this epoch | readable, behind the cursor | alarm "diverged": new epoch, whole compare |
//! | P of this epoch | past our log, other hash, or no longer readable | alarm "diverged": new epoch, whole compare |
//! | P of an earlier epoch of ours | not behind the cursor | scan what is pending, from this epoch's start |
//! | P of an earlier epoch of ours | nothing was acknowledged | the whole disk is compared, from this epoch's start |
//! | P of an earlier epoch of ours | behind the cursor | alarm "diverged": new epoch, whole compare |
//! | P of an unknown epoch | nothing was acknowledged, and the disk was brought here from another place | new epoch, whole compare |
//! | P of an unknown epoch | otherwise | alarm "diverged": new epoch, whole compare |
//!
//! "From this epoch's start" needs the log to reach back to it. Where it does not, a new epoch is begun: nothing
//! of an epoch is skipped.
//!
//! A server that stands in an epoch of ours although nothing was acknowledged took something whose acknowledgement a power
//! cut outran: that is no other history, and the initial scan, which nothing was taken off, goes on as a compare.
//!
//! P behind the cursor is a server that lost what it acknowledged (restored, cloned, reverted). The log might still hold
//! what is missing, but a server that lost one thing may have lost another.

use tidemark_base::{Epoch, Position};

use crate::source::{EpochReason, Located, ScanReason};

#[derive(Clone, Copy, Debug)]
pub struct Situation<'a> {
    /// What the server holds durably, and where that is seen from here.
    pub durable: Option<(Position, Located)>,
    /// A scan began there and did not end.
    pub scan_open: bool,
    /// What this consumer acknowledged, as we remember it.
    pub cursor: Option<Position>,
    /// The epochs that we remember, oldest first, the current one last.
    pub epochs: &'a [Epoch],
    /// Something is to be scanned.
    pub scan_pending: bool,
    /// The current epoch can be read from its start.
    pub start_readable: bool,
    /// The server holds something that can be compared with.
    pub comparable: bool,
    /// The disk was brought here from another place, whose history the server holds.
    pub moved: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Decision {
    pub alarm: Option<Alarm>,
    pub new_epoch: Option<EpochReason>,
    /// The whole disk must be scanned.
    pub whole_scan: Option<ScanReason>,
    pub begin: Begin,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Begin {
    /// Records after the server's position.
    Records,
    /// SCAN_START at the server's position.
    ScanHere,
    /// SCAN_START at the start of the (possibly new) epoch.
    ScanFromEpochStart,
}

/// What an operator must know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Alarm {
    /// The server holds nothing of what it acknowledged.
    ReplicaLost,
    /// The server's history is not ours.
    Diverged,
}

impl Alarm {
    pub fn message(self) -> &'static str {
        match self {
            Alarm::ReplicaLost => "the process server holds nothing of what it acknowledged",
            Alarm::Diverged => "history diverged: the process server does not hold what it acknowledged",
        }
    }

    pub fn help(self) -> &'static str {
        "the whole disk is read again by itself; find out whether the process server or this host was restored, cloned \
         or reverted, and check its recovery points"
    }
}

pub fn decide(situation: &Situation<'_>) -> Decision {
    let Some((durable, located)) = situation.durable else {
        if situation.comparable {
            return from_epoch_start(situation, Some(Alarm::Diverged), Some(ScanReason::Diverged));
        }
        let alarm = situation.cursor.is_some().then_some(Alarm::ReplicaLost);
        return from_epoch_start(situation, alarm, Some(ScanReason::Initial));
    };
    let rank = |position: &Position| situation.epochs.iter().position(|epoch| *epoch == position.epoch);
    let cursor = situation.cursor;
    let behind = cursor.is_some_and(|cursor| (rank(&durable), durable.sequence) < (rank(&cursor), cursor.sequence));
    match located {
        Located::Here if !behind => {
            let begin = if situation.scan_open || situation.scan_pending { Begin::ScanHere } else { Begin::Records };
            Decision { alarm: None, new_epoch: None, whole_scan: None, begin }
        }
        Located::Earlier if cursor.is_none() => from_epoch_start(situation, None, Some(ScanReason::Unclean)),
        // What changed since the cursor is pending; without one that we remember nobody knows since when.
        Located::Earlier if !behind && cursor.is_some_and(|cursor| rank(&cursor).is_some()) => {
            from_epoch_start(situation, None, None)
        }
        Located::Here | Located::Earlier | Located::Ahead | Located::Gone | Located::Differs | Located::Unknown => {
            // From the first acknowledgement on it is like any other disk.
            let is_new_here = situation.moved && cursor.is_none() && located == Located::Unknown;
            Decision {
                alarm: (!is_new_here).then_some(Alarm::Diverged),
                new_epoch: Some(EpochReason::Diverged),
                whole_scan: Some(ScanReason::Diverged),
                begin: Begin::ScanFromEpochStart,
            }
        }
    }
}

fn from_epoch_start(situation: &Situation<'_>, alarm: Option<Alarm>, whole_scan: Option<ScanReason>) -> Decision {
    let new_epoch = (!situation.start_readable).then_some(EpochReason::NewConsumer);
    Decision { alarm, new_epoch, whole_scan, begin: Begin::ScanFromEpochStart }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemark_base::{HistoryHash, Sequence};

    fn at(epoch: u8, sequence: u64) -> Position {
        Position { epoch: Epoch([epoch; 16]), sequence: Sequence(sequence), hash: HistoryHash([7; 32]) }
    }

    const RESUME: (Option<Alarm>, bool, bool, Begin) = (None, false, false, Begin::Records);
    const SCAN_HERE: (Option<Alarm>, bool, bool, Begin) = (None, false, false, Begin::ScanHere);
    const SCAN_START: (Option<Alarm>, bool, bool, Begin) = (None, false, false, Begin::ScanFromEpochStart);
    const COMPARE: (Option<Alarm>, bool, bool, Begin) = (None, false, true, Begin::ScanFromEpochStart);
    const DIVERGED: (Option<Alarm>, bool, bool, Begin) = (Some(Alarm::Diverged), true, true, Begin::ScanFromEpochStart);

    /// What each combination must lead to, written down by hand: (alarm, new epoch, whole scan, begin).
    fn expected(
        located: Located,
        order: std::cmp::Ordering,
        has_cursor: bool,
        scan: bool,
    ) -> (Option<Alarm>, bool, bool, Begin) {
        let behind = has_cursor && order.is_lt();
        match (located, behind, has_cursor, scan) {
            (Located::Here, false, _, false) => RESUME,
            (Located::Here, false, _, true) => SCAN_HERE,
            (Located::Here, true, _, _) => DIVERGED,
            (Located::Earlier, false, true, _) => SCAN_START,
            (Located::Earlier, _, false, _) => COMPARE,
            (Located::Earlier, true, _, _) => DIVERGED,
            (Located::Ahead | Located::Gone | Located::Differs | Located::Unknown, ..) => DIVERGED,
        }
    }

    #[test]
    fn every_row_of_the_table() {
        let epochs = [Epoch([1; 16]), Epoch([2; 16]), Epoch([3; 16])];
        let mut rows = 0;
        for located in
            [Located::Here, Located::Ahead, Located::Gone, Located::Differs, Located::Earlier, Located::Unknown]
        {
            let durable = match located {
                Located::Earlier => at(2, 10),
                Located::Unknown => at(9, 10),
                _ => at(3, 10),
            };
            for cursor in [
                None,
                Some(at(1, 99)),
                Some(at(2, 9)),
                Some(at(2, 10)),
                Some(at(2, 11)),
                Some(at(3, 9)),
                Some(at(3, 10)),
                Some(at(3, 11)),
            ] {
                for (scan_open, scan_pending, start_readable) in
                    (0..8).map(|bits| (bits & 1 > 0, bits & 2 > 0, bits & 4 > 0))
                {
                    let decision = decide(&Situation {
                        durable: Some((durable, located)),
                        scan_open,
                        cursor,
                        epochs: &epochs,
                        scan_pending,
                        start_readable,
                        comparable: true,
                        moved: false,
                    });
                    let order = cursor.map_or(std::cmp::Ordering::Greater, |cursor| {
                        (durable.epoch.0, durable.sequence).cmp(&(cursor.epoch.0, cursor.sequence))
                    });
                    let mut expected = expected(located, order, cursor.is_some(), scan_open || scan_pending);
                    if [SCAN_START, COMPARE].contains(&expected) && !start_readable {
                        expected.1 = true;
                    }
                    let got =
                        (decision.alarm, decision.new_epoch.is_some(), decision.whole_scan.is_some(), decision.begin);
                    assert_eq!(got, expected, "{located:?} {cursor:?} open {scan_open} pending {scan_pending}");
                    rows += 1;
                }
            }
        }
        assert_eq!(rows, 6 * 8 * 8);
    }

    #[test]
    fn an_empty_server_gets_the_whole_disk() {
        let epochs = [Epoch([1; 16])];
        for (cursor, alarm) in [(None, None), (Some(at(1, 5)), Some(Alarm::ReplicaLost))] {
            for start_readable in [false, true] {
                let decision = decide(&Situation {
                    durable: None,
                    scan_open: false,
                    cursor,
                    epochs: &epochs,
                    scan_pending: true,
                    start_readable,
                    comparable: false,
                    moved: false,
                });
                assert_eq!(
                    decision,
                    Decision {
                        alarm,
                        new_epoch: (!start_readable).then_some(EpochReason::NewConsumer),
                        whole_scan: Some(ScanReason::Initial),
                        begin: Begin::ScanFromEpochStart,
                    }
                );
            }
        }
    }

    /// A cursor in an epoch that was forgotten proves nothing.
    #[test]
    fn a_forgotten_cursor_is_no_cursor() {
        let decision = decide(&Situation {
            durable: Some((at(1, 5), Located::Earlier)),
            scan_open: false,
            cursor: Some(at(8, 1)),
            epochs: &[Epoch([1; 16]), Epoch([2; 16])],
            scan_pending: true,
            start_readable: true,
            comparable: true,
            moved: false,
        });
        assert_eq!(decision.alarm, Some(Alarm::Diverged));
    }

    /// What is left of a replica that lost cuts is compared with, and not thrown away.
    #[test]
    fn a_server_that_lost_cuts_is_compared_with() {
        for cursor in [None, Some(at(1, 5))] {
            let decision = decide(&Situation {
                durable: None,
                scan_open: true,
                cursor,
                epochs: &[Epoch([1; 16])],
                scan_pending: false,
                start_readable: true,
                comparable: true,
                moved: true,
            });
            let reason = decision.whole_scan.expect("the whole disk");
            assert!(reason.compares() && decision.alarm == Some(Alarm::Diverged), "{decision:?}");
            assert_eq!(decision.begin, Begin::ScanFromEpochStart);
        }
    }

    /// A disk that was brought here is compared without an alarm, once: what was acknowledged, or is of an epoch of ours, is no other
    /// place's history.
    #[test]
    fn a_disk_that_was_brought_here_is_compared_and_nobody_is_alarmed() {
        let decided = |located, cursor, moved| {
            decide(&Situation {
                durable: Some((at(9, 10), located)),
                scan_open: false,
                cursor,
                epochs: &[Epoch([1; 16])],
                scan_pending: true,
                start_readable: true,
                comparable: true,
                moved,
            })
        };
        let first = decided(Located::Unknown, None, true);
        assert_eq!((first.alarm, first.begin), (None, Begin::ScanFromEpochStart));
        assert!(first.new_epoch.is_some() && first.whole_scan.expect("the whole disk").compares(), "{first:?}");
        assert_eq!(decided(Located::Unknown, None, false).alarm, Some(Alarm::Diverged));
        assert_eq!(decided(Located::Unknown, Some(at(1, 5)), true).alarm, Some(Alarm::Diverged));
        for located in [Located::Ahead, Located::Gone, Located::Differs] {
            assert_eq!(decided(located, None, true).alarm, Some(Alarm::Diverged), "{located:?}");
        }
    }
}
