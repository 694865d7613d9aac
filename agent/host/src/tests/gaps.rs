//! The end of the process in every gap between the steps of a write, and of the power there.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

use tidemark_base::Extent;
use tidemark_base::disk::Durability;
use tidemark_nbd::{Export, WriteRequest};

use super::power::{DISK_BYTES, Media, REGION_BYTES, Replica};
use super::{Fixture, covers, records_after, write};
use crate::attach::Decision;
use crate::capture::splitter::Splitter;
use crate::protected::ProtectedDisk;
use crate::source::Source;

thread_local! {
    static END_AT: Cell<Option<(&'static str, u32)>> = const { Cell::new(None) };
}

struct Killed;

/// Ends this thread's write where a test asked for it.
pub fn reach(name: &'static str) {
    END_AT.with(|end| match end.get() {
        Some((at, 0)) if at == name => {
            end.set(None);
            resume_unwind(Box::new(Killed));
        }
        Some((at, count)) if at == name => end.set(Some((at, count - 1))),
        _ => {}
    });
}

/// Runs `action` until it comes to a gap for the n-th time (from 0). False when it ended before.
fn run_until(gap: &'static str, count: u32, action: impl FnOnce()) -> bool {
    END_AT.set(Some((gap, count)));
    let ended = catch_unwind(AssertUnwindSafe(action));
    END_AT.set(None);
    match ended {
        Ok(()) => false,
        Err(payload) if payload.is::<Killed>() => true,
        Err(payload) => resume_unwind(payload),
    }
}

const GAPS: [&str; 6] = ["admitted", "declared", "published", "written", "logged", "finished"];
/// Three writes: into a new region, over a region that was written before, and long.
const EXTENTS: [Extent; 3] = [
    Extent { offset: 2 * REGION_BYTES + 4096, length: 8192 },
    Extent { offset: 512, length: 512 },
    Extent { offset: 3 * REGION_BYTES, length: 512 << 10 },
];

/// A disk with some history, and writes that end in a gap.
fn interrupted(fixture: &Fixture, gap: &'static str, count: u32) -> (Arc<ProtectedDisk>, Replica, Media) {
    let disk = fixture.attach().disk;
    let mut replica = Replica::of(fixture, &disk);
    let splitter = Splitter::new(disk.clone()).unwrap();
    write(&splitter, 0, &[1; 4096]).unwrap();
    write(&splitter, REGION_BYTES, &[1; 4096]).unwrap();
    replica.ship(fixture, &disk);
    disk.tick();
    let media = Media::of(fixture);
    let data: Vec<Vec<u8>> = EXTENTS.iter().map(|extent| vec![9; extent.length as usize]).collect();
    let writes: Vec<WriteRequest<'_>> = EXTENTS
        .iter()
        .zip(&data)
        .map(|(extent, data)| WriteRequest { offset: extent.offset, data, fua: false })
        .collect();
    let mut results: Vec<_> = writes.iter().map(|_| Err(std::io::ErrorKind::Other.into())).collect();
    assert!(run_until(gap, count, || splitter.write_batch(&writes, &mut results)), "{gap} was not reached");
    (disk, replica, media)
}

#[test]
pub fn a_kill_in_every_gap_of_a_write_compares_nothing() {
    for gap in GAPS {
        for count in 0..if gap == "written" { 3 } else { 1 } {
            let fixture = Fixture::new(DISK_BYTES);
            let (disk, mut replica, _) = interrupted(&fixture, gap, count);
            let logged = disk.state().logged;
            drop(disk);
            let attached = fixture.attach();
            assert_eq!(attached.decision, Decision::ReadSlots, "{gap} {count}");
            assert!(fixture.pending(&attached.disk).is_empty(), "{gap} {count}: nothing is compared");
            let disk = attached.disk;
            // What is read again: the slots, all of them or none.
            let again: u64 = records_after(&disk, &logged).iter().map(super::record_bytes).sum();
            let all: u64 = EXTENTS.iter().map(|extent| extent.length).sum();
            let is_published = !["admitted", "declared", "finished"].contains(&gap);
            assert_eq!(again, if is_published { all } else { 0 }, "{gap} {count}");
            replica.ship(&fixture, &disk);
            replica.assert_equals(&fixture, &format!("{gap} {count}"));
        }
    }
}

/// What the disk holds of the writes is up to chance; where they may have gone is named before they did.
#[test]
pub fn a_power_cut_in_every_gap_of_a_write_names_its_regions() {
    for gap in GAPS {
        for seed in 0..6 {
            let mut fixture = Fixture::new(DISK_BYTES);
            let (disk, mut replica, media) = interrupted(&fixture, gap, 0);
            // Perhaps what was logged was sent already, and a part of it never comes to the media.
            if gap == "logged" && seed % 2 == 0 {
                replica.ship(&fixture, &disk);
            }
            drop(disk);
            media.cut_power(&mut fixture, seed);
            let attached = fixture.attach();
            assert_eq!(attached.decision, Decision::ScanTouched, "{gap} {seed}");
            let pending = fixture.pending(&attached.disk);
            if gap != "admitted" {
                for extent in EXTENTS {
                    assert!(covers(&pending, extent), "{gap} {seed}");
                }
            }
            assert!(!covers(&pending, Extent::new(4 * REGION_BYTES, 4096)), "never a full resync");
            replica.scan(&fixture, &attached.disk);
            replica.assert_equals(&fixture, &format!("{gap} {seed}"));
        }
    }
}

#[test]
fn zeroes_that_end_in_a_gap_are_found() {
    for gap in GAPS {
        let fixture = Fixture::new(DISK_BYTES);
        let disk = fixture.attach().disk;
        let mut replica = Replica::of(&fixture, &disk);
        let splitter = Splitter::new(disk.clone()).unwrap();
        write(&splitter, 0, &[1; 1 << 20]).unwrap();
        replica.ship(&fixture, &disk);
        let extent = Extent::new(4096, 512 << 10);
        assert!(run_until(gap, 0, || splitter.zero(extent, true, Durability::Cached).unwrap()));
        drop((splitter, disk));
        let disk = fixture.attach().disk;
        assert!(fixture.pending(&disk).is_empty());
        replica.ship(&fixture, &disk);
        replica.assert_equals(&fixture, gap);
    }
}
