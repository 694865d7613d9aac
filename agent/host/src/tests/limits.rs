use tidemark_base::disk::DiskError;
use tidemark_base::{Extent, ExtentSet};

use super::{Ahead, Fixture, covers, data_refs, records_after, replay, write};
use crate::attach::Decision;
use crate::capture::splitter::Splitter;
use crate::error::HostError;
use crate::events::EventKind;
use crate::log::LogLimits;
use crate::source::{EpochReason, ScanReason, ScanRevision, Source};
use crate::state::session::Mode;

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 64 * MIB;

#[test]
fn a_full_log_steps_down_and_comes_back_with_a_scan() {
    let mut fixture = Fixture::new(DISK_BYTES);
    fixture.limits = LogLimits { limit_bytes: 4 * MIB, ..fixture.limits };
    let disk = fixture.attach_in_sync();
    let splitter = Splitter::new(disk.clone()).unwrap();
    let epoch = disk.state().logged.epoch;
    let data = vec![7; MIB as usize];
    for index in 0..8 {
        write(&splitter, index * MIB, &data).unwrap();
    }
    disk.tick();
    let Mode::Bitmap { reason } = disk.mode() else { panic!("still {:?}", disk.mode()) };
    assert!(reason.contains("limit"), "{reason}");
    assert!(disk.alarms().contains_key("log"));
    // The guest goes on; what it writes is marked.
    let logged = disk.state().logged;
    write(&splitter, 20 * MIB, &data).unwrap();
    assert_eq!(disk.state().logged, logged);
    assert!(covers(&disk.dirty.extents(), Extent::new(20 * MIB, MIB)));
    disk.tick();
    assert!(matches!(disk.mode(), Mode::Bitmap { .. }), "nobody took what the log holds");
    assert!(fixture.pending(&disk).is_empty());

    // A killed process comes back to the same: what the log holds can still be sent as history.
    drop((splitter, disk));
    let attached = fixture.attach();
    assert_eq!(attached.decision, Decision::StayInBitmap);
    let disk = attached.disk;
    assert_eq!(disk.state().logged, logged);
    assert!(covers(&disk.dirty.extents(), Extent::new(20 * MIB, MIB)) && fixture.pending(&disk).is_empty());
    assert!(matches!(disk.mode(), Mode::Bitmap { .. }));
    disk.tick();
    assert!(matches!(disk.mode(), Mode::Bitmap { .. }), "nobody is there to take it");
    fixture.settle(&disk);
    disk.tick();
    disk.tick();
    assert_eq!(disk.mode(), Mode::Data);
    assert!(covers(&fixture.pending(&disk), Extent::new(20 * MIB, MIB)));
    fixture.settle(&disk);
    assert!(fixture.kinds().contains(&EventKind::SteppedDown) && fixture.kinds().contains(&EventKind::SteppedUp));

    // And without a crash: when the consumer took the rest of the log, a new epoch and a scan of what was not logged.
    let splitter = Splitter::new(disk.clone()).unwrap();
    for index in 0..8 {
        write(&splitter, index * MIB, &data).unwrap();
    }
    disk.tick();
    assert!(matches!(disk.mode(), Mode::Bitmap { .. }));
    write(&splitter, 30 * MIB, &data).unwrap();
    disk.acknowledged(fixture.server, disk.state().logged).unwrap();
    disk.tick();
    assert_eq!(disk.mode(), Mode::Data);
    assert_ne!(disk.state().logged.epoch, epoch);
    assert!(disk.dirty.is_empty() && disk.alarms().is_empty());
    let pending = disk.pending_scan(fixture.server, ScanRevision(0)).unwrap();
    assert_eq!(pending.reason, Some(ScanReason::Dirty));
    assert!(covers(&pending.extents, Extent::new(30 * MIB, MIB)));
    assert!(!covers(&pending.extents, Extent::new(0, 4096)), "that was acknowledged");

    // The log works again.
    write(&splitter, 0, &[9; 4096]).unwrap();
    let mut image = vec![0; DISK_BYTES as usize];
    let mut scanned = ExtentSet::new();
    pending.extents.iter().for_each(|extent| scanned.insert(extent));
    for extent in scanned.iter() {
        disk.disk().read_at(extent.offset, &mut image[extent.offset as usize..extent.end() as usize]).unwrap();
    }
    replay(&disk, &records_after(&disk, &disk.state().logged.epoch.start()), &mut image);
    assert_eq!(image[..4096], [9; 4096]);
}

#[test]
fn a_log_folder_without_room_steps_down() {
    let mut fixture = Fixture::new(DISK_BYTES);
    fixture.limits = LogLimits { reserve_bytes: u64::MAX, ..fixture.limits };
    let disk = fixture.attach().disk;
    disk.tick();
    let Mode::Bitmap { reason } = disk.mode() else { panic!("still logging") };
    assert!(reason.contains("free"), "{reason}");
    write(&Splitter::new(disk.clone()).unwrap(), 0, &[1; 512]).unwrap();
    assert_eq!(fixture.content()[0], 1);
    // A consumer that is there does not bring the log back as long as there is no room for it.
    fixture.settle(&disk);
    disk.tick();
    assert!(matches!(disk.mode(), Mode::Bitmap { .. }));
    disk.set_log_limits(super::LIMITS);
    disk.tick();
    assert_eq!(disk.mode(), Mode::Data);
}

#[test]
fn disks_that_cannot_be_used_say_why() {
    let fixture = Fixture::new(DISK_BYTES);
    let first = fixture.attach();
    let Err(HostError::Disk(error @ DiskError::InUse { .. })) = fixture.try_attach() else { panic!("attached twice") };
    assert!(!error.help().is_empty());
    drop(first);
    std::fs::OpenOptions::new().write(true).open(fixture.path()).unwrap().set_len(1000).unwrap();
    assert!(matches!(fixture.try_attach(), Err(HostError::Disk(DiskError::OddSize { bytes: 1000, .. }))));
    std::fs::remove_file(fixture.path()).unwrap();
    assert!(matches!(fixture.try_attach(), Err(HostError::Disk(DiskError::Absent { .. }))));
    // Someone's file where our folder should be.
    let fixture = Fixture::new(DISK_BYTES);
    std::fs::File::create(fixture.folder.path().join("disk.img.tidemark")).unwrap();
    let Err(error @ HostError::State { .. }) = fixture.try_attach() else { panic!("attached without a folder") };
    assert!(error.help().contains(fixture.folder.path().to_str().unwrap()), "{}", error.help());
}

#[cfg_attr(windows, ignore = "Windows lets nobody change the size of a disk that is attached")]
#[test]
fn a_disk_that_changes_its_size_is_seen() {
    let fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach_in_sync();
    disk.tick();
    assert!(disk.alarms().is_empty());
    std::fs::OpenOptions::new().write(true).open(fixture.path()).unwrap().set_len(DISK_BYTES * 2).unwrap();
    disk.tick();
    let problem = disk.alarms().get("size").cloned().unwrap();
    assert!(problem.critical && problem.message.contains("changed its size"), "{problem:?}");
    assert!(matches!(disk.mode(), Mode::Bitmap { .. }));
    // What its end held is gone, whatever size it has then.
    for bytes in [DISK_BYTES / 2, DISK_BYTES * 2] {
        std::fs::OpenOptions::new().write(true).open(fixture.path()).unwrap().set_len(bytes).unwrap();
        disk.tick();
    }
    assert!(disk.detach().is_err(), "no clean end for it");
}

#[test]
fn intent_bits_go_when_nothing_was_written_for_a_while() {
    let fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach_in_sync();
    write(&Splitter::new(disk.clone()).unwrap(), 0, &[1; 512]).unwrap();
    assert!(disk.intent.is_any_set());
    disk.tick();
    assert!(disk.intent.is_any_set(), "idle for a moment only");
    assert!(disk.log.sync().is_ok());
}

#[test]
fn a_consumer_that_keeps_up_never_brings_the_log_to_its_limit() {
    let mut fixture = Fixture::new(DISK_BYTES);
    fixture.limits = LogLimits { limit_bytes: 8 * MIB, rotate_bytes: MIB, ..fixture.limits };
    let disk = fixture.attach_in_sync();
    let splitter = Splitter::new(disk.clone()).unwrap();
    let epoch = disk.state().logged.epoch;
    for index in 0..40 {
        write(&splitter, index * MIB, &vec![7; MIB as usize]).unwrap();
        disk.acknowledged(fixture.server, disk.state().logged).unwrap();
        disk.make_room();
    }
    assert_eq!((disk.mode(), disk.state().logged.epoch), (Mode::Data, epoch));
    assert!(disk.log.allocated_bytes() < 4 * MIB, "{}", disk.log.allocated_bytes());
}

/// Steps down with a log that nobody acknowledged, in the middle of a run of writes.
fn stepped_down(fixture: &mut Fixture) -> std::sync::Arc<crate::protected::ProtectedDisk> {
    fixture.limits = LogLimits { limit_bytes: 4 * MIB, ..fixture.limits };
    let disk = fixture.attach_in_sync();
    let splitter = Splitter::new(disk.clone()).unwrap();
    for index in 0..8 {
        write(&splitter, index * MIB, &[7; MIB as usize]).unwrap();
    }
    disk.tick();
    assert!(matches!(disk.mode(), Mode::Bitmap { .. }));
    assert!(!covers(&disk.dirty.extents(), Extent::new(0, MIB)), "the first of them were logged");
    disk
}

#[test]
fn what_the_log_holds_outlives_a_step_down_and_the_end_of_the_process() {
    let mut fixture = Fixture::new(DISK_BYTES);
    drop(stepped_down(&mut fixture));
    assert_all_is_known(&fixture, "killed");
    let mut fixture = Fixture::new(DISK_BYTES);
    stepped_down(&mut fixture).detach().unwrap();
    assert_all_is_known(&fixture, "left cleanly");
}

/// What was written before and after the step down is in the log and the dirty bitmap, and later in the scan.
fn assert_all_is_known(fixture: &Fixture, how: &str) {
    let attached = fixture.attach();
    assert_eq!(attached.decision, Decision::StayInBitmap, "{how}");
    let disk = attached.disk;
    let mut image = vec![0; DISK_BYTES as usize];
    let cursor = disk.cursor(fixture.server).unwrap();
    replay(&disk, &records_after(&disk, &cursor), &mut image);
    for extent in disk.dirty.extents().iter() {
        disk.disk().read_at(extent.offset, &mut image[extent.offset as usize..extent.end() as usize]).unwrap();
    }
    assert!(image == fixture.content(), "{how}");
    // Somebody begins a new epoch before it was sent.
    disk.new_epoch(EpochReason::Diverged).unwrap();
    assert!(covers(&fixture.pending(&disk), Extent::new(0, 8 * MIB)), "{how}");
}

#[test]
fn a_region_is_named_until_the_log_that_ended_is_on_the_media() {
    let clock = Ahead::new();
    let mut fixture = Fixture::new(DISK_BYTES);
    fixture.clock = clock.clone();
    let disk = stepped_down(&mut fixture);
    disk.tick();
    clock.go(std::time::Duration::from_secs(40));
    disk.tick();
    assert!(!disk.intent.is_any_set(), "idle and synced");
    drop(disk);
    super::crash::reboot(&mut fixture);
    let attached = fixture.attach();
    assert_eq!(attached.decision, Decision::ScanTouched);
    assert!(covers(&fixture.pending(&attached.disk), Extent::new(0, 8 * MIB)));
}

#[test]
fn a_log_that_was_removed_gives_its_room_back() {
    let fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach_in_sync();
    let start = disk.state().logged;
    let splitter = Splitter::new(disk.clone()).unwrap();
    write(&splitter, 0, &[7; 2 * MIB as usize]).unwrap();
    disk.tick();
    write(&splitter, 0, &[8; 4096]).unwrap();
    let refs = data_refs(&records_after(&disk, &start));
    let mut buffer = vec![0; refs.iter().map(|data| data.length as usize).sum()];
    disk.read_data(&refs, &mut buffer).unwrap();
    fixture.settle(&disk);
    disk.tick();
    let first = fixture.folder.path().join("disk.img.00000001.hrl");
    assert!(!first.exists());
    // Where a file is that was removed is not told by Windows.
    #[cfg(unix)]
    {
        let first = first.to_str().unwrap().to_owned();
        let open = std::fs::read_dir("/proc/self/fd").unwrap();
        let open = open.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok());
        assert!(!open.into_iter().any(|path| path.to_string_lossy().starts_with(&first)), "removed and still open");
    }
}

/// A server that is away for long, and a log for each cycle: their files must not use up those of the process.
#[cfg(unix)]
#[test]
fn a_long_backlog_of_logs_needs_few_open_files() {
    const NAME: &str = "tests::limits::a_long_backlog_of_logs_needs_few_open_files";
    if std::env::var_os("TIDEMARK_FEW_FILES").is_none() {
        let status = std::process::Command::new("sh")
            .args(["-c", "ulimit -n 64 && exec \"$0\" --exact \"$1\""])
            .arg(std::env::current_exe().unwrap())
            .arg(NAME)
            .env("TIDEMARK_FEW_FILES", "1")
            .status();
        assert!(status.unwrap().success());
        return;
    }
    let fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach_in_sync();
    let start = disk.state().logged;
    let splitter = Splitter::new(disk.clone()).unwrap();
    for index in 0..50 {
        write(&splitter, index * 4096, &[7; 4096]).unwrap();
        disk.log.rotate().unwrap();
    }
    assert_eq!(records_after(&disk, &start).len(), 50);
    disk.detach().unwrap();
    drop((splitter, disk));
    let attached = fixture.attach();
    assert_eq!(attached.decision, Decision::Continue);
    assert_eq!(records_after(&attached.disk, &start).len(), 50);
}
