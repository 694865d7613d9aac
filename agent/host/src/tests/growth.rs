//! A disk that grows while it is attached goes on where it was; its new end is scanned, and nothing else.

use std::fs::OpenOptions;
use std::sync::Arc;

use tidemark_base::{Extent, ExtentSet};

use super::{Fixture, Random, covers, records_after, replay, write};
use crate::attach::{Attached, Decision, Why};
use crate::capture::splitter::Splitter;
use crate::consumer::Consumer;
use crate::events::{EventKind, Severity};
use crate::log::LogLimits;
use crate::protected::ProtectedDisk;
use crate::source::{ScanReason, ScanRevision, Source};
use crate::state::dirty::GRANULE_BYTES;
use crate::state::session::Mode;

const MIB: u64 = 1 << 20;
/// Neither end is that of a granule.
const BEFORE: u64 = 16 * MIB + 4096;
const AFTER: u64 = 19 * MIB + 8192;
const NEW_END: Extent = Extent { offset: 16 * MIB, length: AFTER - 16 * MIB };

fn grow(fixture: &Fixture, bytes: u64) {
    OpenOptions::new().write(true).open(fixture.path()).unwrap().set_len(bytes).unwrap();
}

/// Writes of a guest: in part acknowledged by the consumer, then not, before and after the disk grew.
fn used(fixture: &Fixture) -> (Arc<ProtectedDisk>, Vec<u8>) {
    let disk = fixture.attach_in_sync();
    let splitter = Splitter::new(disk.clone()).unwrap();
    let mut random = Random(5);
    let mut some = |count: u8| {
        for number in 0..count {
            let (offset, length) = (random.below(BEFORE / 512 - 64) * 512, (1 + random.below(60)) * 512);
            write(&splitter, offset, &vec![number + 1; length as usize]).unwrap();
        }
    };
    some(40);
    fixture.settle(&disk);
    // What the consumer holds.
    let mut replica = fixture.content();
    some(20);
    grow(fixture, AFTER);
    some(20);
    replica.resize(AFTER as usize, 0);
    (disk, replica)
}

/// What the consumer lacks is in the records after what it acknowledged, or in its scan.
fn converges(attached: &Attached, fixture: &Fixture, replica: &mut [u8]) {
    let disk = &attached.disk;
    let cursor = disk.consumer(fixture.server).unwrap().cursor().unwrap();
    let start = if disk.state().logged.epoch == cursor.epoch { cursor } else { disk.state().logged.epoch.start() };
    replay(disk, &records_after(disk, &start), replica);
    for extent in fixture.pending(disk).iter() {
        disk.disk().read_at(extent.offset, &mut replica[extent.offset as usize..extent.end() as usize]).unwrap();
    }
    assert!(replica == fixture.content(), "after {:?}", attached.decision);
}

#[test]
fn a_disk_that_grew_while_it_was_attached_goes_on_and_its_new_end_alone_is_compared() {
    let fixture = Fixture::new(BEFORE);
    let (disk, mut replica) = used(&fixture);
    let logged = disk.state().logged;
    disk.tick();
    assert!(disk.alarms().contains_key("size"));
    disk.detach().unwrap();
    drop(disk);
    let attached = fixture.attach();
    assert_eq!(attached.decision, Decision::Continue);
    assert_eq!((attached.scan_bytes, attached.disk.state().logged), (AFTER - BEFORE, logged), "its log goes on");
    let pending = attached.disk.pending_scan(fixture.server, ScanRevision(0)).unwrap();
    assert_eq!(pending.extents.iter().collect::<Vec<_>>(), [NEW_END], "and nothing else");
    assert_eq!(pending.reason, Some(ScanReason::Unclean));
    let event = fixture.events.after(0).into_iter().next_back().unwrap();
    assert_eq!((event.kind, event.severity), (EventKind::DiskResized, Severity::Information));
    converges(&attached, &fixture, &mut replica);
    // What is written to either part of it from now on is in the log, and its regions are named.
    let splitter = Splitter::new(attached.disk.clone()).unwrap();
    write(&splitter, BEFORE - 4096, &[7; 8192]).unwrap();
    write(&splitter, AFTER - 4096, &[8; 4096]).unwrap();
    assert!(covers(&attached.disk.intent.unshipped(), Extent::new(BEFORE - 4096, 8192)));
    assert!(covers(&attached.disk.intent.unshipped(), Extent::new(AFTER - 4096, 4096)));
    converges(&attached, &fixture, &mut replica);
    drop((splitter, attached));
    assert_eq!(fixture.attach().decision, Decision::ReadSlots, "it is a disk like any other now");
}

/// What a disk lost that shrank is compared when its size is back; then it is as before, with a clean end.
#[test]
fn a_disk_that_shrank_and_has_its_size_again_is_compared_where_it_was_cut() {
    let fixture = Fixture::new(BEFORE);
    let disk = fixture.attach_in_sync();
    let splitter = Splitter::new(disk.clone()).unwrap();
    write(&splitter, 0, &[1; 4096]).unwrap();
    write(&splitter, 9 * MIB, &vec![2; 5 << 20]).unwrap();
    fixture.settle(&disk);
    let mut replica = fixture.content();
    let lost = |offset: u64| Extent::new(offset, BEFORE - offset);
    for (bytes, expected) in [(12 * MIB, 12 * MIB), (13 * MIB, 12 * MIB), (10 * MIB, 10 * MIB), (BEFORE, 10 * MIB)] {
        grow(&fixture, bytes);
        disk.tick();
        assert!(covers(&fixture.pending(&disk), lost(expected)), "at {bytes}");
        assert_eq!(disk.alarms().contains_key("size"), bytes != BEFORE, "at {bytes}");
    }
    assert!(!covers(&fixture.pending(&disk), Extent::new(9 * MIB, 512)), "and nothing else");
    let event = fixture.events.after(0).into_iter().next_back().unwrap();
    assert_eq!((event.kind, event.severity), (EventKind::DiskResized, Severity::Warning));
    write(&splitter, 11 * MIB, &[3; 512]).unwrap();
    drop(splitter);
    disk.detach().unwrap();
    drop(disk);
    let attached = fixture.attach();
    assert_eq!(attached.decision, Decision::Continue);
    assert!(covers(&fixture.pending(&attached.disk), lost(10 * MIB)));
    converges(&attached, &fixture, &mut replica);
}

/// Also where the attach that grew it was killed before its session was stored.
#[test]
fn what_was_pending_before_it_grew_is_pending_after() {
    let parts = [Extent::new(2 * GRANULE_BYTES, GRANULE_BYTES), Extent::new(9 * MIB, 2 * GRANULE_BYTES)];
    for was_killed in [false, true] {
        let fixture = Fixture::new(BEFORE);
        let disk = fixture.attach_in_sync();
        let extents = ExtentSet::from_iter(parts);
        disk.consumer(fixture.server).unwrap().add(&extents, ScanReason::Dirty, ScanRevision(3)).unwrap();
        grow(&fixture, AFTER);
        disk.detach().unwrap();
        drop(disk);
        if was_killed {
            drop(Consumer::open_grown(fixture.state(), fixture.server, BEFORE, AFTER).unwrap().unwrap());
        }
        let attached = fixture.attach();
        assert_eq!(attached.decision, Decision::Continue);
        let expected = ExtentSet::from_iter(parts.into_iter().chain([NEW_END]));
        assert_eq!(fixture.pending(&attached.disk).iter().collect::<Vec<_>>(), expected.iter().collect::<Vec<_>>());
    }
}

#[test]
fn a_consumer_that_holds_nothing_yet_gets_the_new_end_as_well() {
    let fixture = Fixture::new(BEFORE);
    let disk = fixture.attach().disk;
    grow(&fixture, AFTER);
    disk.detach().unwrap();
    drop(disk);
    let attached = fixture.attach();
    assert!(covers(&fixture.pending(&attached.disk), Extent::new(0, AFTER)));
}

/// What no log tells of is in the dirty bitmap, which is of the smaller disk.
#[test]
fn what_changed_without_a_log_is_scanned_when_it_grew() {
    let mut fixture = Fixture::new(BEFORE);
    fixture.limits = LogLimits { limit_bytes: 4 * MIB, ..fixture.limits };
    let disk = fixture.attach_in_sync();
    let mut replica = fixture.content();
    replica.resize(AFTER as usize, 0);
    let splitter = Splitter::new(disk.clone()).unwrap();
    for number in 0..8 {
        write(&splitter, number * MIB, &vec![number as u8 + 1; MIB as usize]).unwrap();
    }
    disk.tick();
    assert!(matches!(disk.mode(), Mode::Bitmap { .. }));
    write(&splitter, 12 * MIB, &[9; 4096]).unwrap();
    grow(&fixture, AFTER);
    disk.detach().unwrap();
    drop((splitter, disk));
    let attached = fixture.attach();
    assert_eq!(attached.decision, Decision::ScanDirty);
    let pending = fixture.pending(&attached.disk);
    assert!(covers(&pending, Extent::new(12 * MIB, 4096)) && covers(&pending, NEW_END));
    assert!(!covers(&pending, Extent::new(14 * MIB, 4096)));
    converges(&attached, &fixture, &mut replica);
}

#[test]
fn grown_while_nobody_watched_or_left_by_a_kill_or_smaller_for_a_moment_it_is_compared_whole() {
    let whole = Decision::ScanWhole(Why::Resized { from: BEFORE, to: AFTER });
    let fixture = Fixture::new(BEFORE);
    fixture.attach_in_sync().detach().unwrap();
    grow(&fixture, AFTER);
    assert_eq!(fixture.attach().decision, whole);
    let fixture = Fixture::new(BEFORE);
    drop(used(&fixture));
    assert_eq!(fixture.attach().decision, whole);
    let fixture = Fixture::new(BEFORE);
    let disk = fixture.attach_in_sync();
    for bytes in [BEFORE - 4096, AFTER] {
        grow(&fixture, bytes);
        disk.tick();
    }
    disk.detach().unwrap_err();
    drop(disk);
    assert_eq!(fixture.attach().decision, whole);
}
