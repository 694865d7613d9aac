//! What happened to a disk while nobody watched: each leads to a compare, and to an event that says why.

use std::fs::{File, FileTimes, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use tidemark_base::{Extent, Timestamp};

use super::{Ahead, Fixture, covers, write};
use crate::attach::{Decision, Why};
use crate::capture::splitter::Splitter;
use crate::events::{EventKind, Severity};
use crate::source::{ScanReason, ScanRevision, Source};

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 16 * MIB;

fn open(path: &Path) -> File {
    OpenOptions::new().write(true).open(path).unwrap()
}

/// Left cleanly or killed, then changed by `meddle`, then attached again.
fn after(meddle: impl Fn(&Fixture), is_clean: bool) -> (Fixture, Decision) {
    let fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach_in_sync();
    write(&Splitter::new(disk.clone()).unwrap(), 4096, &[1; 4096]).unwrap();
    fixture.settle(&disk);
    if is_clean {
        disk.detach().unwrap();
    }
    drop(disk);
    meddle(&fixture);
    let attached = fixture.attach();
    let bytes = std::fs::metadata(fixture.path()).unwrap().len();
    if let Decision::ScanWhole(why) = attached.decision {
        let pending = attached.disk.pending_scan(fixture.server, ScanRevision(0)).unwrap();
        assert!(covers(&pending.extents, Extent::new(0, bytes)));
        assert_eq!(pending.reason, Some(ScanReason::Unclean), "a compare, and zeroes are not taken for granted");
        let events = fixture.events.after(0);
        let event = events.last().unwrap();
        assert_eq!((event.kind, event.severity), (why.event(), Severity::Warning));
        assert!(event.message.contains(&why.to_string()) && event.message.contains("disk.img"), "{}", event.message);
        assert_eq!((event.disk, event.help.as_str()), (Some(fixture.disk), why.help()));
    }
    (fixture, attached.decision)
}

#[test]
fn a_disk_that_nobody_touched_is_continued() {
    let (fixture, decision) = after(|_| {}, true);
    assert_eq!(decision, Decision::Continue);
    assert_eq!(fixture.events.after(0).last().unwrap().kind, EventKind::DiskContinued);
    let (fixture, decision) = after(|_| {}, false);
    assert_eq!(decision, Decision::ReadSlots);
    assert_eq!(fixture.events.after(0).last().unwrap().kind, EventKind::AgentWasKilled);
    assert_eq!(fixture.events.after(0)[0].kind, EventKind::DiskAttachedFirst);
}

#[test]
fn a_disk_that_grew_or_shrank_is_compared() {
    for is_clean in [true, false] {
        for to in [DISK_BYTES + MIB, DISK_BYTES - MIB] {
            let (fixture, decision) = after(|fixture| open(&fixture.path()).set_len(to).unwrap(), is_clean);
            assert_eq!(decision, Decision::ScanWhole(Why::Resized { from: DISK_BYTES, to }));
            assert_eq!(fixture.events.after(0).last().unwrap().kind, EventKind::DiskResized);
        }
    }
}

#[test]
fn another_disk_at_the_same_place_is_compared() {
    for is_clean in [true, false] {
        let (_, decision) = after(
            |fixture| {
                // Kept, so that its inode is not used again.
                let kept = fixture.folder.path().join("kept");
                std::fs::hard_link(fixture.path(), &kept).unwrap();
                std::fs::remove_file(fixture.path()).unwrap();
                std::fs::copy(&kept, fixture.path()).unwrap();
            },
            is_clean,
        );
        assert_eq!(decision, Decision::ScanWhole(Why::Replaced));
    }
}

#[test]
fn a_disk_that_was_edited_is_compared_whatever_the_editor_says_of_its_times() {
    for is_clean in [true, false] {
        let write = |fixture: &Fixture| open(&fixture.path()).write_all_at(&[7], 5).unwrap();
        let (_, decision) = after(write, is_clean);
        // The clock that files are stamped with is coarse: a change within a few milliseconds of ours may look like ours.
        if is_clean {
            assert_eq!(decision, Decision::ScanWhole(Why::WrittenMeanwhile));
        }
        // With its modification time put back: the time of that change is seen.
        let (_, decision) = after(
            |fixture| {
                let before = std::fs::metadata(fixture.path()).unwrap().modified().unwrap();
                write(fixture);
                open(&fixture.path()).set_times(FileTimes::new().set_modified(before)).unwrap();
            },
            true,
        );
        assert_eq!(decision, Decision::ScanWhole(Why::WrittenMeanwhile));
        // Only its owner or its mode changed: nobody can tell that from an edit.
        let (_, decision) =
            after(|fixture| std::fs::set_permissions(fixture.path(), PermissionsExt::from_mode(0o640)).unwrap(), true);
        assert_eq!(decision, Decision::ScanWhole(Why::WrittenMeanwhile));
    }
}

#[test]
fn a_clock_that_went_back_proves_nothing() {
    for is_clean in [true, false] {
        let clock = Ahead::new();
        clock.go(Duration::from_secs(3600));
        let mut fixture = Fixture::new(DISK_BYTES);
        fixture.clock = clock;
        let disk = fixture.attach_in_sync();
        write(&Splitter::new(disk.clone()).unwrap(), 0, &[1; 512]).unwrap();
        if is_clean {
            disk.detach().unwrap();
        }
        drop(disk);
        fixture.clock = Ahead::new();
        let attached = fixture.attach();
        assert_eq!(attached.decision, Decision::ScanWhole(Why::ClockSteppedBack));
        assert_eq!(fixture.events.after(0).last().unwrap().kind, EventKind::ClockSteppedBack);
        // Times along the disk go on all the same.
        assert!(attached.disk.state().time > Timestamp(fixture.clock.wall_now().0 + 3_000_000_000_000));
    }
}

/// A loop device, where this user may make one.
struct Loop(String);

impl Loop {
    fn attach(image: &Path) -> Option<Self> {
        let output = std::process::Command::new("losetup").args(["--find", "--show"]).arg(image).output().ok()?;
        if !output.status.success() {
            println!("skipped: block devices need losetup: {}", String::from_utf8_lossy(&output.stderr));
            return None;
        }
        Some(Self(String::from_utf8(output.stdout).unwrap().trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").args(["--detach", &self.0]).output();
    }
}

#[test]
fn a_block_device_is_always_compared() {
    let mut fixture = Fixture::new(DISK_BYTES);
    let Some(device) = Loop::attach(&fixture.path()) else { return };
    fixture.image = Some(device.0.clone().into());
    let disk = fixture.attach_in_sync();
    write(&Splitter::new(disk.clone()).unwrap(), 0, &[1; 512]).unwrap();
    disk.detach().unwrap();
    drop(disk);
    let attached = fixture.attach();
    assert_eq!(attached.decision, Decision::ScanWhole(Why::Unwitnessed));
    assert_eq!(fixture.events.after(0).last().unwrap().kind, EventKind::DiskUnwitnessed);
    drop(attached);
    assert_eq!(fixture.attach().decision, Decision::ScanWhole(Why::Unwitnessed), "also after a kill");
}
