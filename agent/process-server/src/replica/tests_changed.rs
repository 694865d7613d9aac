//! What cuts after a cut changed: a machine on its way home from the cut looks at these parts and at no others.

use std::collections::BTreeSet;

use tidemark_base::stop::Stop;
use tidemark_base::{Extent, Timestamp};
use tidemark_proto::replication::CutKind;

use super::testing::{Chance, SimStorage, TestHost};
use super::tests::{DISK_BYTES, open, session, tight};

const PART: u64 = 4096;

#[test]
fn what_later_cuts_changed_is_known_to_the_part_for_as_long_as_the_journal_holds_them() {
    let storage = SimStorage::default();
    let mut set = open(&storage);
    let mut host = TestHost::new(DISK_BYTES);
    let mut chance = Chance(1);
    let mut replica = set.create(host.info).unwrap();
    let mut stream = session(&replica);
    host.send(&stream, CutKind::ScanStart, None, &mut chance).unwrap();
    let begin = host.cut;
    let mut written = Vec::new();
    // Over several sealed segments and the active one, with a restart between.
    for number in 0..20u64 {
        let at = number * 7 % (DISK_BYTES / PART) * PART;
        host.content[at as usize..(at + PART) as usize].fill(number as u8 + 1);
        host.scan(&stream, &[Extent::new(at, PART)]).unwrap();
        written.push(at);
        if number == 12 {
            set.sync(&replica).unwrap();
            drop((stream, replica, set));
            set = open(&storage);
            replica = set.get(host.info.disk).unwrap();
            stream = session(&replica);
        }
    }
    set.sync(&replica).unwrap();
    for (before, cut) in (begin..=host.cut).enumerate() {
        let changed = replica.changed_after(cut, DISK_BYTES).expect("the journal holds all of them");
        let expected: BTreeSet<u64> = written[before..].iter().copied().collect();
        assert_eq!(changed.bytes(), expected.len() as u64 * PART, "after cut {cut}");
        assert!(expected.iter().all(|at| changed.contains(*at)), "after cut {cut}: {expected:?}");
    }
    // A part of a part counts as all of it.
    let end = host.cut;
    host.scan(&stream, &[Extent::new(512, 512)]).unwrap();
    set.sync(&replica).unwrap();
    assert_eq!(replica.changed_after(end, DISK_BYTES).expect("it is held").bytes(), PART);

    // What was folded away is not told any more: then everything is compared.
    let mark = host.mark(true);
    host.send(&stream, CutKind::ScanEnd, Some(mark), &mut chance).unwrap();
    set.sync(&replica).unwrap();
    let done = set.maintain(host.info.machine, &tight(), Timestamp(host.time), &Stop::new()).unwrap();
    done.folds.iter().for_each(|fold| assert!(fold.result.is_ok(), "{fold:?}"));
    let base = replica.state().manifest.base.cut;
    assert!(base > begin, "it was folded to cut {base}");
    assert!(replica.changed_after(base - 1, DISK_BYTES).is_none());
    assert!(replica.changed_after(base, DISK_BYTES).is_some());
}
