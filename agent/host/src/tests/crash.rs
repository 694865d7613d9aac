use std::sync::Arc;

use tidemark_base::disk::{Disk, Durability};
use tidemark_base::{Extent, Timestamp};
use tidemark_nbd::Export;

use super::{Fixture, covers, records_after, replay, write};
use crate::attach::{Decision, Why};
use crate::capture::splitter::Splitter;
use crate::source::{EpochReason, Located, ScanReason, ScanRevision, Source, SourceError};

const DISK_BYTES: u64 = 64 << 20;
const MIB: u64 = 1 << 20;

pub fn reboot(fixture: &mut Fixture) {
    fixture.boot.id = format!("after {}", fixture.boot.id);
    fixture.boot.started = fixture.clock.wall_now();
}

#[test]
fn a_clean_detach_is_continued() {
    let fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach_in_sync();
    let start = disk.state().logged;
    write(&Splitter::new(disk.clone()).unwrap(), 0, &[1; 4096]).unwrap();
    let logged = disk.state().logged;
    disk.detach().unwrap();
    drop(disk);
    let attached = fixture.attach();
    assert_eq!(attached.decision, Decision::Continue);
    let disk = attached.disk;
    assert_eq!(disk.state().logged, logged);
    assert!(fixture.pending(&disk).is_empty());
    write(&Splitter::new(disk.clone()).unwrap(), 8192, &[2; 4096]).unwrap();
    // Across the two logs, as if nothing had been.
    let mut image = vec![0; DISK_BYTES as usize];
    let records = records_after(&disk, &start);
    assert_eq!(records.len(), 2);
    replay(&disk, &records, &mut image);
    assert!(image == fixture.content());
}

#[test]
fn whoever_writes_to_a_detached_disk_causes_a_whole_scan() {
    let fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach_in_sync();
    let logged = disk.state().logged;
    disk.detach().unwrap();
    drop(disk);
    let file = std::fs::OpenOptions::new().write(true).open(fixture.path()).unwrap();
    super::write_all_at(&file, &[1], 5).unwrap();
    drop(file);
    let attached = fixture.attach();
    assert_eq!(attached.decision, Decision::ScanWhole(Why::WrittenMeanwhile));
    assert!(covers(&fixture.pending(&attached.disk), Extent::new(0, DISK_BYTES)));
    // A new epoch; the old one is remembered, its sequences are never used again.
    let state = attached.disk.state();
    assert_ne!(state.logged.epoch, logged.epoch);
    assert_eq!(attached.disk.locate(&logged).unwrap(), Located::Earlier);
}

#[test]
fn a_killed_process_reads_what_was_in_flight() {
    let fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach_in_sync();
    let start = disk.state().logged;
    let splitter = Splitter::new(disk.clone()).unwrap();
    write(&splitter, 4096, &[1; 4096]).unwrap();
    // Killed between the write to the disk and its record.
    let extents = [Extent::new(20 * MIB, 8192), Extent::new(30 * MIB, 512 << 10)];
    let admitted = disk.in_flight.admit(&extents).unwrap(); // and never finished
    disk.intent.declare(&extents).unwrap();
    disk.in_flight.publish(&admitted, &extents, fixture.clock.wall_now());
    disk.disk.write_at(20 * MIB, &[2; 8192], Durability::Cached).unwrap();
    disk.disk.write_at(30 * MIB, &[3; 4096], Durability::Cached).unwrap();
    let logged = disk.state().logged;
    drop((splitter, disk));

    let attached = fixture.attach();
    assert_eq!(attached.decision, Decision::ReadSlots);
    let disk = attached.disk;
    assert!(fixture.pending(&disk).is_empty(), "nothing needs a scan");
    assert_eq!(disk.state().logged.epoch, logged.epoch);
    assert!(disk.state().logged.sequence > logged.sequence);
    let mut image = vec![0; DISK_BYTES as usize];
    replay(&disk, &records_after(&disk, &start), &mut image);
    assert!(image == fixture.content());
    // Killed again before anything else happened: nothing is in the slots, the regions are still named.
    drop(disk);
    let attached = fixture.attach();
    assert_eq!(attached.decision, Decision::ReadSlots);
    assert!(attached.disk.intent.is_any_set());
}

#[test]
fn another_writer_after_a_kill_is_noticed() {
    let fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach_in_sync();
    write(&Splitter::new(disk.clone()).unwrap(), 4096, &[1; 4096]).unwrap();
    drop(disk);
    // The clock that the file system stamps files with is coarse.
    let times =
        std::fs::FileTimes::new().set_modified(std::time::SystemTime::now() + std::time::Duration::from_secs(1));
    std::fs::OpenOptions::new().write(true).open(fixture.path()).unwrap().set_times(times).unwrap();
    assert_eq!(fixture.attach().decision, Decision::ScanWhole(Why::WrittenMeanwhile));
}

#[test]
fn a_power_loss_scans_the_touched_regions_and_what_was_not_acknowledged() {
    let mut fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach_in_sync();
    let splitter = Splitter::new(disk.clone()).unwrap();
    let epoch = disk.state().logged.epoch;
    write(&splitter, 9 * MIB, &[1; 4096]).unwrap();
    disk.log.sync().unwrap();
    // The intent bit of this region is cleared (as after 30 s idle), so only the log knows of it.
    disk.disk.flush().unwrap();
    disk.intent.clear_idle(u64::MAX, u64::MAX, 0, None, |_, clear| clear()).unwrap();
    assert!(!disk.intent.is_any_set());
    write(&splitter, 41 * MIB, &[2; 4096]).unwrap();
    drop((splitter, disk));
    reboot(&mut fixture);

    let attached = fixture.attach();
    assert_eq!(attached.decision, Decision::ScanTouched);
    let disk = attached.disk;
    let pending = fixture.pending(&disk);
    assert!(covers(&pending, Extent::new(9 * MIB, 4096)), "logged, durable, not acknowledged");
    assert!(covers(&pending, Extent::new(40 * MIB, 4 * MIB)), "the region that was touched last");
    assert!(!covers(&pending, Extent::new(0, 4096)), "never a full resync");
    assert_ne!(disk.state().logged.epoch, epoch);
    assert_eq!(disk.state().logged.sequence.0, 0);
    assert!(!fixture.folder.path().join("disk.img.00000001.hrl").exists(), "the old log is gone");
}

#[test]
fn a_power_loss_during_the_first_replication_keeps_what_is_left_of_it() {
    let mut fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach().disk;
    let seen = disk.state().scan_revision;
    disk.scanned(fixture.server, Extent::new(0, 32 * MIB), seen).unwrap();
    write(&Splitter::new(disk.clone()).unwrap(), 5 * MIB, &[2; 4096]).unwrap();
    disk.consumer(fixture.server).unwrap().sync_scan().unwrap();
    drop(disk);
    reboot(&mut fixture);
    let attached = fixture.attach();
    assert_eq!(attached.decision, Decision::ScanTouched);
    let pending = fixture.pending(&attached.disk);
    assert!(covers(&pending, Extent::new(4 * MIB, 4 * MIB)) && covers(&pending, Extent::new(32 * MIB, 32 * MIB)));
    assert!(!covers(&pending, Extent::new(16 * MIB, 4096)));
}

#[test]
fn a_lost_intent_bitmap_means_the_whole_disk() {
    let mut fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach_in_sync();
    write(&Splitter::new(disk.clone()).unwrap(), 0, &[1; 512]).unwrap();
    disk.intent_failed(&std::io::Error::other("the medium failed"));
    // The guest goes on.
    write(&Splitter::new(disk.clone()).unwrap(), 50 * MIB, &[1; 512]).unwrap();
    drop(disk);
    reboot(&mut fixture);
    assert_eq!(fixture.attach().decision, Decision::ScanWhole(Why::StateDamaged));
}

#[cfg_attr(
    windows,
    ignore = "Wine renames nothing over a file that is open, as the bitmap of the other size is here; Windows 10 does"
)]
#[test]
fn a_disk_that_was_replaced_or_resized_is_another() {
    let fixture = Fixture::new(DISK_BYTES);
    fixture.attach_in_sync().detach().unwrap();
    std::fs::OpenOptions::new().write(true).open(fixture.path()).unwrap().set_len(DISK_BYTES + MIB).unwrap();
    let attached = fixture.attach();
    assert_eq!(attached.decision, Decision::ScanWhole(Why::Resized { from: DISK_BYTES, to: DISK_BYTES + MIB }));
    assert!(covers(&fixture.pending(&attached.disk), Extent::new(0, DISK_BYTES + MIB)));
    attached.disk.detach().unwrap();
    drop(attached);
    std::fs::remove_file(fixture.path()).unwrap();
    std::fs::File::create(fixture.path()).unwrap().set_len(DISK_BYTES + MIB).unwrap();
    // Inode numbers are used again at once; the time of birth tells them apart, where there is one.
    assert!(matches!(fixture.attach().decision, Decision::ScanWhole(Why::Replaced | Why::WrittenMeanwhile)));
}

#[test]
fn damaged_files_are_noticed() {
    let slot = crate::state::session::SLOT_BYTES as u64;
    for (name, places, expected) in [
        ("disk.img.tidemark/session", vec![60, slot + 60], Decision::ScanWhole(Why::StateDamaged)),
        ("disk.img.tidemark/dirty", vec![40], Decision::ScanUnshipped),
        ("disk.img.00000001.companion", vec![40], Decision::ScanUnshipped),
    ] {
        let fixture = Fixture::new(DISK_BYTES);
        let disk = fixture.attach_in_sync();
        write(&Splitter::new(disk.clone()).unwrap(), 20 * MIB, &[1; 4096]).unwrap();
        drop(disk);
        let file = std::fs::OpenOptions::new().write(true).open(fixture.folder.path().join(name)).unwrap();
        for place in places {
            super::write_all_at(&file, &[0xa5], place).unwrap();
        }
        let attached = fixture.attach();
        assert_eq!(attached.decision, expected, "{name}");
        let pending = fixture.pending(&attached.disk);
        assert!(covers(&pending, Extent::new(20 * MIB, 4096)));
        if expected == Decision::ScanUnshipped {
            assert_eq!(pending.total_bytes(), 4 * MIB, "never a full resync: {name}");
        }
    }
}

#[test]
fn a_new_epoch_takes_what_was_not_acknowledged_into_the_scan() {
    let fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach_in_sync();
    let splitter = Arc::new(Splitter::new(disk.clone()).unwrap());
    write(&splitter, 0, &[1; 4096]).unwrap();
    fixture.settle(&disk);
    let acknowledged = disk.state().logged;
    write(&splitter, 20 * MIB, &[2; 4096]).unwrap();
    splitter.zero(Extent::new(30 * MIB, MIB), true, Durability::Cached).unwrap();
    let before = disk.state();
    let start = disk.new_epoch(EpochReason::NewConsumer).unwrap();
    assert_eq!(disk.state().logged, start);
    assert!(disk.state().scan_revision > before.scan_revision);
    let pending = fixture.pending(&disk);
    assert_eq!(pending.iter().collect::<Vec<_>>(), [Extent::new(20 * MIB, 65536), Extent::new(30 * MIB, MIB)]);
    assert_eq!(disk.locate(&acknowledged).unwrap(), Located::Earlier);
    assert_eq!(disk.cursor(fixture.server), Some(acknowledged));
    assert_eq!(disk.epochs().last(), Some(&start.epoch));
    // Writes go on in it, and a kill continues it.
    write(&splitter, 0, &[3; 512]).unwrap();
    let logged = disk.state().logged;
    drop((splitter, disk));
    let attached = fixture.attach();
    assert_eq!((attached.decision, attached.disk.state().logged), (Decision::ReadSlots, logged));
    assert!(covers(&fixture.pending(&attached.disk), Extent::new(20 * MIB, 4096)));
}

#[test]
fn times_never_decrease_across_a_crash() {
    let fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach().disk;
    let ahead = Timestamp(fixture.clock.wall_now().0 + 3_600_000_000_000);
    disk.log.raise_time(ahead);
    let splitter = Splitter::new(disk.clone()).unwrap();
    write(&splitter, 0, &[1; 512]).unwrap();
    let start = disk.state().logged.epoch.start();
    let record = &records_after(&disk, &start)[0];
    assert_eq!(record.time, ahead);
    assert!(record.clock_stepped, "the clock was held back by an hour");
    drop((splitter, disk));
    let disk = fixture.attach().disk;
    assert!(disk.state().time >= ahead);
}

/// The agent did not run in the boot between, and somebody else used the disk.
#[test]
fn another_writer_between_a_power_loss_and_this_boot_is_noticed() {
    let mut fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach_in_sync();
    write(&Splitter::new(disk.clone()).unwrap(), 4096, &[1; 4096]).unwrap();
    drop(disk);
    let hour = 3_600_000_000_000;
    let edited = std::time::SystemTime::now() + std::time::Duration::from_nanos(hour);
    let times = std::fs::FileTimes::new().set_modified(edited);
    std::fs::OpenOptions::new().write(true).open(fixture.path()).unwrap().set_times(times).unwrap();
    reboot(&mut fixture);
    fixture.boot.started = Timestamp(fixture.boot.started.0 + 2 * hour);
    assert_eq!(fixture.attach().decision, Decision::ScanWhole(Why::WrittenMeanwhile));
}

/// Its scan sent nothing yet, but records did: what they wrote does not read as zeroes there.
#[test]
fn a_consumer_that_got_records_is_not_taken_for_an_empty_one() {
    let fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach().disk;
    assert_eq!(disk.pending_scan(fixture.server, ScanRevision(0)).unwrap().reason, Some(ScanReason::Initial));
    write(&Splitter::new(disk.clone()).unwrap(), 4096, &[1; 4096]).unwrap();
    disk.acknowledged(fixture.server, disk.state().logged).unwrap();
    disk.detach().unwrap();
    drop(disk);
    let file = std::fs::OpenOptions::new().write(true).open(fixture.path()).unwrap();
    super::write_all_at(&file, &[0; 4096], 4096).unwrap();
    drop(file);
    let attached = fixture.attach();
    assert_eq!(attached.decision, Decision::ScanWhole(Why::WrittenMeanwhile));
    let pending = attached.disk.pending_scan(fixture.server, ScanRevision(0)).unwrap();
    assert_eq!(pending.reason, Some(ScanReason::Unclean), "zeroes must be sent");
    assert!(covers(&pending.extents, Extent::new(0, DISK_BYTES)));
}

/// A log that was prepared before a new epoch began has a lower number than that epoch's first.
#[test]
fn the_logs_of_a_new_epoch_are_in_the_order_of_their_numbers() {
    let fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach_in_sync();
    let splitter = Splitter::new(disk.clone()).unwrap();
    write(&splitter, 0, &[1; 600 << 10]).unwrap();
    disk.tick();
    assert!(fixture.folder.path().join("disk.img.00000002.hrl").exists(), "the next log is prepared");
    disk.new_epoch(EpochReason::Diverged).unwrap();
    write(&splitter, 0, &[2; 2 * MIB as usize]).unwrap();
    disk.tick();
    write(&splitter, 0, &[3; 4096]).unwrap();
    assert!(fixture.folder.path().join("disk.img.00000004.hrl").exists(), "rotated");
    let logged = disk.state().logged;
    disk.detach().unwrap();
    drop((splitter, disk));
    let attached = fixture.attach();
    assert_eq!((attached.decision, attached.disk.state().logged), (Decision::Continue, logged));
}

#[test]
fn an_epoch_that_cannot_begin_leaves_no_log_behind() {
    let fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach_in_sync();
    write(&Splitter::new(disk.clone()).unwrap(), 0, &[1; 4096]).unwrap();
    let extents = [Extent::new(MIB, 4096)];
    let stuck = disk.in_flight.admit(&extents).unwrap();
    assert!(matches!(disk.new_epoch(EpochReason::Diverged), Err(SourceError::Busy { .. })));
    drop((stuck, disk));
    let attached = fixture.attach();
    assert_eq!(attached.decision, Decision::ReadSlots);
}

#[cfg(unix)]
#[test]
fn the_state_of_a_disk_behind_a_link_is_removed() {
    let fixture = Fixture::new(DISK_BYTES);
    let links = tempfile::tempdir().unwrap();
    let link = links.path().join("link.img");
    std::os::unix::fs::symlink(fixture.path(), &link).unwrap();
    fixture.attach_in_sync().detach().unwrap();
    let elsewhere = fixture.elsewhere();
    crate::attach::remove_state(&link, &fixture.folder.path().join("devices"), &*elsewhere, fixture.disk).unwrap();
    assert!(elsewhere.list("").unwrap().is_empty());
    assert!(!fixture.folder.path().join("disk.img.tidemark").exists());
}
