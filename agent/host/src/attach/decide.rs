//! The table of an attach: what is known of the session before, and what follows from it.

use std::fmt;

use crate::events::{EventKind, Severity};

/// How the session before this one ended, as far as its files tell.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Before {
    /// No session file, or one that cannot be trusted, or of another disk.
    Nothing,
    /// Left by a clean detach.
    Clean,
    /// Not left cleanly; same boot, same mount, and the slot table is of that session: the page cache has everything.
    Killed,
    /// Not left cleanly, and the page cache may be lost.
    PowerLost,
}

/// Whether this is the disk that the session before had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiskFound {
    Same,
    /// Another device, inode or birth time.
    Replaced,
    /// The same, with a longer end: of what lay there before, the rest of the evidence tells.
    Grown {
        from: u64,
        to: u64,
    },
    Shrunk {
        from: u64,
        to: u64,
    },
}

/// Whether anyone wrote while nobody watched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Written {
    /// The disk's times prove that nobody did.
    No,
    /// They differ from how it was left (clean), or are later than our last step.
    Yes,
    /// Its times prove nothing, because the clock is behind what was seen before.
    ClockSteppedBack,
    /// A block device has no times.
    Unwitnessed,
}

/// What became of the log of the session before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LogFound {
    /// Everything that the session says it had (clean), or everything that reached the page cache (killed), or
    /// everything up to its last sync (power lost).
    Sound,
    /// Damaged, or not to be closed for want of room; its companion names what it held.
    Held,
    /// Absent or damaged; nobody knows what it held.
    Unknown,
}

/// Everything that the decision depends on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Evidence {
    pub before: Before,
    pub disk: DiskFound,
    pub written: Written,
    /// The session was in data mode.
    pub was_logging: bool,
    /// Where it was not: a consumer can still be sent records that the log holds, and would be consistent with them.
    pub has_history: bool,
    pub log: LogFound,
    /// The dirty bitmap can be read.
    pub has_dirty: bool,
    /// The intent bitmap can be read, and nobody stored that it could not be kept.
    pub has_intent: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision {
    /// The same epoch goes on where it was left.
    Continue,
    /// The same epoch goes on; what was in flight is read from the disk and logged as new records.
    ReadSlots,
    /// The log stays at its end, to be sent; what was in flight is dirty. Bitmap mode, until it was taken.
    StayInBitmap,
    /// A new epoch. To be scanned: the dirty bitmap, what was in flight, and what the old log holds and nobody acknowledged.
    ScanDirty,
    /// The same, and the regions of the intent bitmap.
    ScanTouched,
    /// A new epoch. To be scanned: the regions whose writes nobody acknowledged, in whatever log or bitmap they were named.
    ScanUnshipped,
    /// A new epoch; the whole disk is scanned.
    ScanWhole(Why),
}

impl Decision {
    pub fn is_same_epoch(self) -> bool {
        matches!(self, Decision::Continue | Decision::ReadSlots | Decision::StayInBitmap)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Why {
    First,
    Replaced,
    Resized { from: u64, to: u64 },
    WrittenMeanwhile,
    ClockSteppedBack,
    Unwitnessed,
    StateDamaged,
    LogUnusable,
}

impl Why {
    pub fn event(self) -> EventKind {
        match self {
            Why::First => EventKind::DiskAttachedFirst,
            Why::Replaced => EventKind::DiskReplaced,
            Why::Resized { .. } => EventKind::DiskResized,
            Why::WrittenMeanwhile => EventKind::DiskWrittenMeanwhile,
            Why::ClockSteppedBack => EventKind::ClockSteppedBack,
            Why::Unwitnessed => EventKind::DiskUnwitnessed,
            Why::StateDamaged => EventKind::StateDamaged,
            Why::LogUnusable => EventKind::LogDamaged,
        }
    }

    pub fn severity(self) -> Severity {
        if self == Why::First { Severity::Information } else { Severity::Warning }
    }

    /// What an operator should do, or know.
    pub fn help(self) -> &'static str {
        match self {
            Why::First => "",
            Why::Replaced => "check that this is the right disk; its replica becomes the same as this one",
            Why::Resized { .. } => "grow or shrink the replica as well where it refuses another size",
            Why::WrittenMeanwhile => "open a protected disk through the address that Tidemark serves only",
            Why::ClockSteppedBack => "keep the clock right, for example with NTP",
            Why::Unwitnessed => "",
            Why::StateDamaged | Why::LogUnusable => "check the medium that holds the folder beside the disk",
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::First => f.write_str("the disk was not protected before, or nothing is known of it"),
            Why::Replaced => f.write_str("the disk was replaced by another one"),
            Why::Resized { from, to } => {
                write!(f, "the disk {} from {from} to {to} bytes", if to > from { "grew" } else { "shrank" })
            }
            Why::WrittenMeanwhile => {
                f.write_str("another program may have written to the disk while it was not attached")
            }
            Why::ClockSteppedBack => {
                f.write_str("the clock went back, so that nobody can tell whether the disk was written to meanwhile")
            }
            Why::Unwitnessed => f.write_str("nobody watched the block device while it was not attached"),
            Why::StateDamaged => f.write_str("the state beside the disk is damaged"),
            Why::LogUnusable => f.write_str("the log is missing or damaged"),
        }
    }
}

/// The first row that fits decides.
pub fn decide(evidence: &Evidence) -> Decision {
    use Before::*;
    match *evidence {
        Evidence { before: Nothing, .. } => Decision::ScanWhole(Why::First),
        Evidence { disk: DiskFound::Replaced, .. } => Decision::ScanWhole(Why::Replaced),
        Evidence { disk: DiskFound::Shrunk { from, to }, .. } => Decision::ScanWhole(Why::Resized { from, to }),
        Evidence { before: Killed | PowerLost, disk: DiskFound::Grown { from, to }, .. }
        | Evidence { written: Written::Yes | Written::Unwitnessed, disk: DiskFound::Grown { from, to }, .. } => {
            Decision::ScanWhole(Why::Resized { from, to })
        }
        Evidence { written: Written::ClockSteppedBack, .. } => Decision::ScanWhole(Why::ClockSteppedBack),
        Evidence { written: Written::Yes, .. } => Decision::ScanWhole(Why::WrittenMeanwhile),
        Evidence { written: Written::Unwitnessed, .. } => Decision::ScanWhole(Why::Unwitnessed),
        Evidence { before: PowerLost, has_intent: false, .. } => Decision::ScanWhole(Why::StateDamaged),
        // What the lost file named lies in the unshipped regions, and those are beside the intent bits.
        Evidence { has_dirty: false, has_intent: false, .. } => Decision::ScanWhole(Why::StateDamaged),
        Evidence { log: LogFound::Unknown, has_intent: false, .. } => Decision::ScanWhole(Why::LogUnusable),
        Evidence { has_dirty: false, .. } | Evidence { log: LogFound::Unknown, .. } => Decision::ScanUnshipped,
        Evidence { before: PowerLost, .. } => Decision::ScanTouched,
        Evidence { log: LogFound::Held, .. } => Decision::ScanDirty,
        // Marks that wait in the log are of the smaller disk: they would become points of the larger one.
        Evidence { was_logging: false, has_history: true, disk: DiskFound::Same, .. } => Decision::StayInBitmap,
        Evidence { was_logging: false, .. } => Decision::ScanDirty,
        Evidence { before: Clean, .. } => Decision::Continue,
        Evidence { before: Killed, .. } => Decision::ReadSlots,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROWN: DiskFound = DiskFound::Grown { from: 512, to: 1024 };
    const SHRUNK: DiskFound = DiskFound::Shrunk { from: 1024, to: 512 };

    fn every_evidence() -> Vec<Evidence> {
        let mut all = Vec::new();
        for before in [Before::Nothing, Before::Clean, Before::Killed, Before::PowerLost] {
            for disk in [DiskFound::Same, DiskFound::Replaced, GROWN, SHRUNK] {
                for written in [Written::No, Written::Yes, Written::ClockSteppedBack, Written::Unwitnessed] {
                    for log in [LogFound::Sound, LogFound::Held, LogFound::Unknown] {
                        all.extend((0..16u32).map(|flags| Evidence {
                            before,
                            disk,
                            written,
                            log,
                            was_logging: flags & 1 != 0,
                            has_history: flags & 2 != 0,
                            has_dirty: flags & 4 != 0,
                            has_intent: flags & 8 != 0,
                        }));
                    }
                }
            }
        }
        all
    }

    /// What must at least be looked at, and whether the history may go on: said harm by harm, apart from the table.
    #[derive(Default, PartialEq, Debug)]
    struct Needs {
        new_epoch: bool,
        slots: bool,
        dirty: bool,
        touched: bool,
        unshipped: bool,
        whole: bool,
    }

    fn least(evidence: &Evidence) -> Needs {
        let mut needs = Needs::default();
        // Who left it cleanly saw that it only grew.
        let is_same_disk =
            evidence.disk == DiskFound::Same || evidence.disk == GROWN && evidence.before == Before::Clean;
        if evidence.before == Before::Nothing || !is_same_disk || evidence.written != Written::No {
            needs.whole = true;
        }
        match evidence.before {
            Before::Killed => needs.slots = true,
            Before::PowerLost => {
                (needs.slots, needs.touched, needs.new_epoch) = (true, true, true);
                needs.whole |= !evidence.has_intent;
            }
            Before::Nothing | Before::Clean => {}
        }
        needs.dirty = !evidence.was_logging;
        if !evidence.has_dirty || evidence.log == LogFound::Unknown {
            needs.unshipped = true;
            needs.whole |= !evidence.has_intent;
        }
        needs.new_epoch |= needs.whole || needs.unshipped || evidence.log == LogFound::Held;
        needs
    }

    /// What a decision looks at; records that nobody acknowledged stay in the log or are scanned in each.
    fn gives(decision: Decision) -> Needs {
        let scan =
            |touched, unshipped, whole| Needs { new_epoch: true, slots: true, dirty: true, touched, unshipped, whole };
        match decision {
            Decision::Continue => Needs::default(),
            Decision::ReadSlots => Needs { slots: true, ..Needs::default() },
            Decision::StayInBitmap => Needs { slots: true, dirty: true, ..Needs::default() },
            Decision::ScanDirty => scan(false, false, false),
            Decision::ScanTouched => scan(true, false, false),
            Decision::ScanUnshipped => scan(true, true, false),
            Decision::ScanWhole(_) => scan(true, true, true),
        }
    }

    #[test]
    fn every_row_does_what_the_evidence_demands_and_never_a_whole_disk_without_need() {
        let all = every_evidence();
        assert_eq!(all.len(), 4 * 4 * 4 * 3 * 16);
        for evidence in all {
            let (least, gives) = (least(&evidence), gives(decide(&evidence)));
            let enough = |least: bool, gives: bool| gives || !least;
            assert!(enough(least.new_epoch, gives.new_epoch), "{evidence:?}");
            assert!(enough(least.slots, gives.slots), "{evidence:?}");
            assert!(enough(least.dirty, gives.dirty), "{evidence:?}");
            assert!(enough(least.touched, gives.touched), "{evidence:?}");
            assert!(enough(least.unshipped, gives.unshipped), "{evidence:?}");
            assert_eq!(least.whole, gives.whole, "{evidence:?}");
            if !least.unshipped && !least.whole {
                assert!(!gives.unshipped, "{evidence:?}");
            }
            if evidence.before == Before::Killed && !least.unshipped && !least.whole {
                assert!(!gives.touched, "nothing is compared that need not be: {evidence:?}");
            }
        }
    }

    #[test]
    fn the_rows_as_they_are_named() {
        let sound = Evidence {
            before: Before::Clean,
            disk: DiskFound::Same,
            written: Written::No,
            was_logging: true,
            has_history: true,
            log: LogFound::Sound,
            has_dirty: true,
            has_intent: true,
        };
        let killed = Evidence { before: Before::Killed, ..sound };
        let power_lost = Evidence { before: Before::PowerLost, ..sound };
        let whole = Decision::ScanWhole;
        for (evidence, decision) in [
            (sound, Decision::Continue),
            (Evidence { before: Before::Nothing, ..sound }, whole(Why::First)),
            (killed, Decision::ReadSlots),
            (power_lost, Decision::ScanTouched),
            (Evidence { was_logging: false, ..sound }, Decision::StayInBitmap),
            (Evidence { was_logging: false, ..killed }, Decision::StayInBitmap),
            (Evidence { was_logging: false, has_history: false, ..killed }, Decision::ScanDirty),
            (Evidence { was_logging: false, ..power_lost }, Decision::ScanTouched),
            (Evidence { disk: DiskFound::Replaced, ..sound }, whole(Why::Replaced)),
            (Evidence { disk: SHRUNK, ..sound }, whole(Why::Resized { from: 1024, to: 512 })),
            (Evidence { disk: GROWN, ..sound }, Decision::Continue),
            (Evidence { disk: GROWN, ..killed }, whole(Why::Resized { from: 512, to: 1024 })),
            (Evidence { disk: GROWN, ..power_lost }, whole(Why::Resized { from: 512, to: 1024 })),
            (Evidence { disk: GROWN, log: LogFound::Unknown, ..sound }, Decision::ScanUnshipped),
            (Evidence { disk: GROWN, was_logging: false, ..sound }, Decision::ScanDirty),
            (Evidence { disk: GROWN, written: Written::Yes, ..sound }, whole(Why::Resized { from: 512, to: 1024 })),
            (Evidence { written: Written::Yes, ..sound }, whole(Why::WrittenMeanwhile)),
            (Evidence { written: Written::ClockSteppedBack, ..sound }, whole(Why::ClockSteppedBack)),
            (Evidence { written: Written::Unwitnessed, ..sound }, whole(Why::Unwitnessed)),
            (Evidence { log: LogFound::Held, ..killed }, Decision::ScanDirty),
            (Evidence { log: LogFound::Held, ..power_lost }, Decision::ScanTouched),
            (Evidence { log: LogFound::Unknown, ..sound }, Decision::ScanUnshipped),
            (Evidence { log: LogFound::Unknown, ..power_lost }, Decision::ScanUnshipped),
            (Evidence { log: LogFound::Unknown, has_intent: false, ..sound }, whole(Why::LogUnusable)),
            (Evidence { has_intent: false, ..power_lost }, whole(Why::StateDamaged)),
            (Evidence { has_intent: false, ..killed }, Decision::ReadSlots),
            (Evidence { has_dirty: false, ..sound }, Decision::ScanUnshipped),
        ] {
            assert_eq!(decide(&evidence), decision, "{evidence:?}");
        }
    }
}
