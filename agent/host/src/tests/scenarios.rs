//! The named scenarios: damage in the middle of a log, a reverted host, an intent bitmap that cannot be written, a machine that
//! is paused with a full log, a crash in the middle of a scan or of a new epoch.

use std::fs::OpenOptions;
use std::path::PathBuf;
use std::sync::Arc;

use tidemark_base::disk::Durability;
use tidemark_base::storage::read_exact_at;
use tidemark_base::{Extent, Position, Sequence};
use tidemark_hrl::LogError;
use tidemark_nbd::Export;

use super::power::{DISK_BYTES, REGION_BYTES, Replica};
use super::{Ahead, Fixture, covers, data_refs, records_after, write, write_all_at};
use crate::attach::{Decision, Why};
use crate::capture::splitter::Splitter;
use crate::events::EventKind;
use crate::log::{LogLimits, Unlogged};
use crate::protected::{Lost, ProtectedDisk, lost_file};
use crate::send::resume::{self, Alarm, Situation};
use crate::source::{EpochReason, Located, ScanReason, ScanRevision, Source, SourceError};
use crate::state::sealed::SealedFile;
use crate::state::session::{Mode, SessionFile};

const MIB: u64 = 1 << 20;

/// One block in each of the first four regions, none of them acknowledged.
fn four_writes(disk: &Arc<ProtectedDisk>) -> Vec<u64> {
    let start = disk.state().logged;
    let splitter = Splitter::new(disk.clone()).unwrap();
    for region in 0..4 {
        write(&splitter, region * REGION_BYTES + 4096, &[1 + region as u8; 4096]).unwrap();
    }
    data_refs(&records_after(disk, &start)).iter().map(|data| data.offset).collect()
}

fn flip(path: PathBuf, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    read_exact_at(&file, &mut byte, at).unwrap();
    write_all_at(&file, &[byte[0] ^ 0x10], at).unwrap();
}

const RECORDS: u64 = 4096;
const RECORD_BYTES: u64 = 128;

#[test]
fn damage_in_the_middle_of_a_log_becomes_a_compare_of_what_it_may_have_held() {
    // What is damaged, and how much may be compared for it.
    let log = |name: &str| format!("disk.img.00000001.{name}");
    for (name, place, expected, bytes) in [
        ("the data of the second write", None, Decision::ScanDirty, 4 * 65536),
        ("the slot of the second record", Some(RECORDS + RECORD_BYTES + 20), Decision::ScanUnshipped, 4 * REGION_BYTES),
        ("the companion's header", Some(20), Decision::ScanUnshipped, 4 * REGION_BYTES),
    ] {
        let fixture = Fixture::new(DISK_BYTES);
        let disk = fixture.attach().disk;
        let mut replica = Replica::of(&fixture, &disk);
        let data = four_writes(&disk);
        let old = disk.state().logged;
        drop(disk);
        match place {
            None => flip(fixture.folder.path().join(log("hrl")), data[1] + 9),
            Some(place) => flip(fixture.folder.path().join(log("companion")), place),
        }
        let attached = fixture.attach();
        assert_eq!(attached.decision, expected, "{name}");
        assert_eq!(attached.scan_bytes, bytes, "{name}: what it may have held, and not the whole disk");
        let pending = attached.disk.pending_scan(fixture.server, ScanRevision(0)).unwrap();
        assert_eq!(pending.reason, Some(ScanReason::LogDamaged), "{name}");
        let events = fixture.events.after(0);
        assert_eq!(events.last().unwrap().kind, EventKind::LogDamaged, "{name}");
        assert!(events.last().unwrap().message.contains("disk.img.00000001"), "{}", events.last().unwrap().message);
        assert_ne!(attached.disk.state().logged.epoch, old.epoch, "never cut in the middle and continued");
        replica.scan(&fixture, &attached.disk);
        replica.assert_equals(&fixture, name);
    }
}

#[test]
pub fn a_log_that_is_gone_becomes_a_compare_of_the_unshipped_regions() {
    for ending in [["hrl", "companion"].as_slice(), &["companion"], &["hrl"]] {
        for is_power_lost in [false, true] {
            let clock = Ahead::new();
            let mut fixture = Fixture::new(DISK_BYTES);
            fixture.clock = clock.clone();
            let disk = fixture.attach().disk;
            let mut replica = Replica::of(&fixture, &disk);
            write(&Splitter::new(disk.clone()).unwrap(), 5 * REGION_BYTES, &[1; 4096]).unwrap();
            replica.ship(&fixture, &disk);
            // Both long ago: no intent bit names them any more.
            for has_written in [false, true] {
                if has_written {
                    four_writes(&disk);
                }
                disk.tick();
                clock.go(std::time::Duration::from_secs(40));
                disk.tick();
                assert!(!disk.intent.is_any_set());
            }
            drop(disk);
            for ending in ending {
                std::fs::remove_file(fixture.folder.path().join(format!("disk.img.00000001.{ending}"))).unwrap();
            }
            if is_power_lost {
                super::crash::reboot(&mut fixture);
            }
            let attached = fixture.attach();
            assert_eq!(attached.decision, Decision::ScanUnshipped);
            assert_eq!(attached.scan_bytes, 4 * REGION_BYTES, "but for what was acknowledged");
            replica.scan(&fixture, &attached.disk);
            replica.assert_equals(&fixture, "gone");
        }
    }
}

/// While the disk is attached: the sender finds that the records do not follow from each other.
#[test]
fn a_log_that_cannot_be_read_back_while_attached_costs_no_whole_scan() {
    let fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach().disk;
    let mut replica = Replica::of(&fixture, &disk);
    let acknowledged = disk.state().logged;
    four_writes(&disk);
    flip(fixture.folder.path().join("disk.img.00000001.companion"), RECORDS + RECORD_BYTES + 20);
    let mut records = Vec::new();
    let error = disk.read_after(&acknowledged).unwrap().read(disk.state().logged.sequence, 100, &mut records);
    assert!(matches!(error, Err(SourceError::History { .. })), "{error:?}");
    disk.new_epoch(EpochReason::LogDamaged).unwrap();
    let pending = disk.pending_scan(fixture.server, ScanRevision(0)).unwrap();
    assert_eq!((pending.extents.total_bytes(), pending.reason), (4 * REGION_BYTES, Some(ScanReason::LogDamaged)));
    assert!(fixture.kinds().contains(&EventKind::LogDamaged));
    replica.scan(&fixture, &disk);
    replica.assert_equals(&fixture, "damaged while attached");
}

/// Somebody else needs it no more. One that waited for what comes next would wait for ever (simulation, seed 314585).
#[test]
fn a_reader_whose_log_is_removed_under_it_is_told() {
    let mut fixture = Fixture::new(DISK_BYTES);
    fixture.limits = LogLimits { rotate_bytes: 64 << 10, ..fixture.limits };
    let disk = fixture.attach_in_sync();
    let splitter = Splitter::new(disk.clone()).unwrap();
    let log = |splitter: &Splitter| {
        for block in 0..32 {
            write(splitter, block * 4096, &[7; 4096]).unwrap();
        }
        disk.tick();
    };
    log(&splitter);
    let mut reader = disk.read_after(&disk.state().logged.epoch.start()).unwrap();
    let mut records = Vec::new();
    // To the end of a log that others follow, where its next record is in one that is gone.
    while reader.read(Sequence(u64::MAX), 1, &mut records).is_ok() && records.len() < 20 {}
    log(&splitter);
    log(&splitter);
    let logged = disk.state().logged;
    disk.acknowledged(fixture.server, logged).unwrap();
    disk.tick();
    let rest = reader.read(logged.sequence, usize::MAX, &mut records);
    assert!(records.len() < 96, "some logs were removed");
    assert!(matches!(rest, Err(SourceError::Gone { .. })), "{rest:?} after {} records", records.len());
}

/// Between the making of a new epoch's log and its announcement, and between that and the removal of the old logs.
#[test]
pub fn a_kill_in_the_middle_of_a_new_epoch_compares_nothing_that_is_known() {
    let fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach().disk;
    let mut replica = Replica::of(&fixture, &disk);
    four_writes(&disk);
    let old = disk.state().logged;
    let stranger = disk.log.create_epoch(tidemark_base::Epoch::random()).unwrap();
    std::mem::forget(stranger);
    drop(disk);
    let attached = fixture.attach();
    assert_eq!((attached.decision, attached.scan_bytes), (Decision::ReadSlots, 0), "it never began");
    let disk = attached.disk;
    assert_eq!(disk.state().logged.epoch, old.epoch);
    // The other side of the announcement: the old log is still there.
    let kept = fixture.folder.path().join("kept");
    std::fs::create_dir(&kept).unwrap();
    let logs = |folder: &std::path::Path| -> Vec<PathBuf> {
        let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        files.filter(|path| path.extension().is_some_and(|ending| ending == "hrl" || ending == "companion")).collect()
    };
    for log in logs(fixture.folder.path()) {
        std::fs::copy(&log, kept.join(log.file_name().unwrap())).unwrap();
    }
    disk.new_epoch(EpochReason::NewConsumer).unwrap();
    let began = disk.state().logged;
    drop(disk);
    for log in logs(&kept) {
        std::fs::copy(&log, fixture.folder.path().join(log.file_name().unwrap())).unwrap();
    }
    let attached = fixture.attach();
    assert_eq!(attached.decision, Decision::ReadSlots);
    assert_eq!(attached.disk.state().logged.epoch, began.epoch);
    assert_eq!(fixture.pending(&attached.disk).total_bytes(), 4 * 65536, "what the old log held was added before");
    replica.scan(&fixture, &attached.disk);
    replica.assert_equals(&fixture, "between two epochs");
}

#[test]
fn an_intent_bitmap_that_cannot_be_written_is_told_elsewhere_and_the_guest_goes_on() {
    let mut fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach().disk;
    let mut replica = Replica::of(&fixture, &disk);
    let splitter = Splitter::new(disk.clone()).unwrap();
    write(&splitter, 0, &[1; 512]).unwrap();
    disk.intent.break_file(fixture.state().open("intent", tidemark_base::storage::OpenMode::Read).unwrap());
    // A region that is named already costs nothing; a new one cannot be.
    write(&splitter, 1024, &[1; 512]).unwrap();
    assert!(!disk.alarms().contains_key("intent"));
    write(&splitter, REGION_BYTES, &[1; 512]).unwrap();
    write(&splitter, 2 * REGION_BYTES, &[1; 512]).unwrap();
    assert_eq!(fixture.content()[2 * REGION_BYTES as usize], 1, "the guest goes on");
    assert!(disk.alarms().get("intent").unwrap().critical);
    assert_eq!(fixture.kinds().iter().filter(|kind| **kind == EventKind::IntentBitmapLost).count(), 1);
    let elsewhere = fixture.elsewhere();
    let lost = || SealedFile::<Lost>::peek(&elsewhere, &lost_file(fixture.disk), Lost::SLOT_BYTES).unwrap().unwrap();
    assert!(lost().intent && !lost().reason.is_empty());
    // Whatever happens to the folder beside the disk: here the session is as it was at the attach.
    let mut session = SessionFile::peek(&fixture.state()).unwrap().unwrap();
    assert!(session.intent_lost);
    session.intent_lost = false;
    SessionFile::begin(fixture.state(), session).unwrap();
    drop((splitter, disk));
    super::crash::reboot(&mut fixture);
    let attached = fixture.attach();
    assert_eq!(attached.decision, Decision::ScanWhole(Why::StateDamaged));
    let elsewhere = fixture.elsewhere();
    let lost = SealedFile::<Lost>::peek(&elsewhere, &lost_file(fixture.disk), Lost::SLOT_BYTES).unwrap().unwrap();
    assert_eq!(lost, Lost::default(), "heeded, and forgotten");
    replica.scan(&fixture, &attached.disk);
    replica.assert_equals(&fixture, "intent lost");
    // It works again.
    let splitter = Splitter::new(attached.disk.clone()).unwrap();
    write(&splitter, 0, &[2; 512]).unwrap();
    drop((splitter, attached));
    super::crash::reboot(&mut fixture);
    assert_eq!(fixture.attach().decision, Decision::ScanTouched);
}

/// The sync that failed took the dirty pages with it; the ones after a restart succeed, and clear the intent bits.
#[test]
fn a_sync_that_failed_is_remembered_until_the_boot_ends() {
    let mut fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach_in_sync();
    let splitter = Splitter::new(disk.clone()).unwrap();
    write(&splitter, 0, &[1; 512]).unwrap();
    disk.note_failed_sync();
    drop((splitter, disk));
    // A kill, then a detach: nothing is compared for it, and nothing is clean.
    let attached = fixture.attach();
    assert_eq!(attached.decision, Decision::ReadSlots);
    attached.disk.detach().unwrap();
    drop(attached);
    let attached = fixture.attach();
    assert_eq!(attached.decision, Decision::ReadSlots);
    drop(attached);
    super::crash::reboot(&mut fixture);
    assert_eq!(fixture.attach().decision, Decision::ScanWhole(Why::StateDamaged));
    super::crash::reboot(&mut fixture);
    assert_eq!(fixture.attach().decision, Decision::ScanTouched, "forgotten with the boot");
}

/// Neither volume takes the note: the guest goes on, an alarm says so, and the note is stored as soon as one takes it.
#[test]
fn a_note_that_nobody_takes_fails_no_write_and_is_stored_later() {
    for healed in ["elsewhere", "here", "none, and left cleanly", "removed"] {
        let mut fixture = Fixture::new(DISK_BYTES);
        let disk = fixture.attach().disk;
        let mut replica = Replica::of(&fixture, &disk);
        let splitter = Splitter::new(disk.clone()).unwrap();
        write(&splitter, 0, &[1; 512]).unwrap();
        let nowhere = || tidemark_base::storage::RealStorage::open_folder("/nonexistent");
        disk.intent.break_file(fixture.state().open("intent", tidemark_base::storage::OpenMode::Read).unwrap());
        disk.lost.lock().unwrap().set_storage(nowhere());
        disk.session.lock().unwrap().set_storage(nowhere());
        write(&splitter, REGION_BYTES, &[1; 512]).unwrap();
        splitter.zero(Extent::new(2 * REGION_BYTES, 512), false, Durability::Cached).unwrap();
        disk.tick();
        assert!(disk.alarms()["intent"].message.contains("cannot be stored either"), "{healed}");
        match healed {
            "elsewhere" => disk.lost.lock().unwrap().set_storage(fixture.elsewhere()),
            "here" => disk.session.lock().unwrap().set_storage(fixture.state()),
            "removed" => fixture.state().remove("session").unwrap(),
            _ => {
                // It is left as long as nobody takes the clean mark.
                disk.session.lock().unwrap().set_storage(fixture.state());
                disk.detach().unwrap();
            }
        }
        if matches!(healed, "elsewhere" | "here") {
            disk.tick();
            assert!(!disk.alarms()["intent"].message.contains("cannot be stored either"), "{healed}");
        }
        drop((splitter, disk));
        let is_clean = healed.starts_with("none");
        if is_clean {
            assert!(SessionFile::peek(&fixture.state()).unwrap().unwrap().intent_lost);
        }
        super::crash::reboot(&mut fixture);
        let attached = fixture.attach();
        let expected = if is_clean { Decision::Continue } else { Decision::ScanWhole(Why::StateDamaged) };
        assert_eq!(attached.decision, expected, "{healed}");
        replica.scan(&fixture, &attached.disk);
        replica.assert_equals(&fixture, healed);
    }
}

/// The decision of a sender whose server holds `durable`.
fn resumed(fixture: &Fixture, disk: &ProtectedDisk, durable: Position) -> resume::Decision {
    let state = disk.state();
    resume::decide(&Situation {
        durable: Some((durable, disk.locate(&durable).unwrap())),
        scan_open: false,
        cursor: disk.cursor(fixture.server),
        epochs: &disk.epochs(),
        scan_pending: !fixture.pending(disk).is_empty(),
        start_readable: disk.locate(&state.logged.epoch.start()).unwrap() == Located::Here,
        comparable: true,
        moved: false,
    })
}

/// Yesterday's files are put back beside the disk, by a restore of the folder or a copy of the whole machine.
#[cfg_attr(windows, ignore = "copies a folder by `cp`")]
#[test]
fn a_host_that_was_reverted_is_compared_and_told_of() {
    let fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach().disk;
    let mut replica = Replica::of(&fixture, &disk);
    write(&Splitter::new(disk.clone()).unwrap(), 0, &[1; 4096]).unwrap();
    replica.ship(&fixture, &disk);
    disk.detach().unwrap();
    drop(disk);
    let yesterday = tempfile::tempdir().unwrap();
    let copy = |from: &std::path::Path, to: &std::path::Path| {
        let status = std::process::Command::new("cp").args(["-a", "--sparse=always"]).arg(from).arg(to).status();
        assert!(status.unwrap().success());
    };
    copy(&fixture.folder.path().join("."), yesterday.path());

    // Today: more was written and sent.
    let disk = fixture.attach().disk;
    write(&Splitter::new(disk.clone()).unwrap(), REGION_BYTES, &[2; 4096]).unwrap();
    replica.ship(&fixture, &disk);
    let today = disk.state().logged;
    disk.detach().unwrap();
    drop(disk);

    // Only the state goes back: the disk is not as that state left it.
    let state = fixture.folder.path().join("disk.img.tidemark");
    for file in ["session", &format!("consumer-{}", fixture.server), &format!("scan-{}", fixture.server)] {
        std::fs::copy(yesterday.path().join("disk.img.tidemark").join(file), state.join(file)).unwrap();
    }
    let attached = fixture.attach();
    assert_eq!(attached.decision, Decision::ScanWhole(Why::WrittenMeanwhile));
    assert!(fixture.kinds().contains(&EventKind::DiskWrittenMeanwhile));
    drop(attached);

    // All of it goes back, and nothing about the disk shows it: as a snapshot of the whole machine does.
    for name in std::fs::read_dir(fixture.folder.path()).unwrap().map(|entry| entry.unwrap().file_name()) {
        if name.to_str().unwrap().ends_with(".hrl") || name.to_str().unwrap().ends_with(".companion") {
            std::fs::remove_file(fixture.folder.path().join(name)).unwrap();
        }
    }
    copy(&yesterday.path().join("."), fixture.folder.path());
    let mut session = SessionFile::peek(&fixture.state()).unwrap().unwrap();
    let identity = tidemark_base::disk::FileDisk::open(&fixture.path(), tidemark_base::disk::Access::Read).unwrap();
    session.identity = identity.identity().unwrap();
    session.clean.as_mut().unwrap().identity = identity.identity().unwrap();
    SessionFile::begin(fixture.state(), session).unwrap();
    let disk = fixture.attach().disk;
    assert_eq!(disk.locate(&today).unwrap(), Located::Ahead);
    let decision = resumed(&fixture, &disk, today);
    assert_eq!((decision.alarm, decision.whole_scan), (Some(Alarm::Diverged), Some(ScanReason::Diverged)));
    // Or it writes as much as was written before, under the same sequence: the hash tells them apart.
    write(&Splitter::new(disk.clone()).unwrap(), 3 * REGION_BYTES, &[7; 4096]).unwrap();
    assert_eq!(disk.state().logged.sequence, today.sequence);
    assert_eq!(disk.locate(&today).unwrap(), Located::Differs);
    assert_eq!(resumed(&fixture, &disk, today).alarm, Some(Alarm::Diverged));
    disk.new_epoch(EpochReason::Diverged).unwrap();
    disk.resync().unwrap();
    replica.scan(&fixture, &disk);
    replica.assert_equals(&fixture, "reverted");
}

fn fill_the_log(fixture: &mut Fixture) -> (Arc<ProtectedDisk>, Position) {
    fixture.limits = LogLimits { limit_bytes: 4 * MIB, ..fixture.limits };
    let disk = fixture.attach_in_sync();
    let acknowledged = disk.state().logged;
    let splitter = Splitter::new(disk.clone()).unwrap();
    for index in 0..10 {
        write(&splitter, index * MIB, &[7; MIB as usize]).unwrap();
    }
    disk.tick();
    assert!(matches!(disk.mode(), Mode::Bitmap { .. }));
    (disk, acknowledged)
}

#[test]
fn a_paused_machine_with_a_full_log_keeps_its_history() {
    let mut fixture = Fixture::new(DISK_BYTES);
    let (disk, acknowledged) = fill_the_log(&mut fixture);
    let consumer = disk.consumer(fixture.server).unwrap();
    consumer.set_paused(true);
    let logged = disk.state().logged;
    // Also when something is to be scanned by now.
    disk.write_failed(Extent::new(5 * REGION_BYTES, 512), &std::io::Error::other("the medium failed"));
    for _ in 0..3 {
        disk.tick();
    }
    assert!(matches!(disk.mode(), Mode::Bitmap { .. }), "no epoch begins behind its back");
    assert_eq!(disk.state().logged, logged);
    assert_eq!(disk.locate(&acknowledged).unwrap(), Located::Here, "all of it can still be sent");
    assert!(!records_after(&disk, &acknowledged).is_empty());
    // It goes on: the history first, then what was not logged.
    consumer.set_paused(false);
    fixture.settle(&disk);
    disk.tick();
    disk.tick();
    assert_eq!(disk.mode(), Mode::Data);
    assert!(covers(&fixture.pending(&disk), Extent::new(9 * MIB, MIB)));
    assert!(fixture.kinds().contains(&EventKind::WriteFailed));
}

#[test]
pub fn what_is_pending_is_told_to_the_byte_in_every_mode() {
    let mut fixture = Fixture::new(DISK_BYTES);
    let (disk, acknowledged) = fill_the_log(&mut fixture);
    let logged: u64 = records_after(&disk, &acknowledged).iter().map(super::record_bytes).sum();
    let dirty = disk.dirty.bytes();
    assert_eq!(logged + dirty, 10 * MIB);
    assert_eq!(disk.pending_bytes(Some(&acknowledged)), logged + dirty);
    // Writing the same again in bitmap mode leaves nothing more to send.
    let splitter = Splitter::new(disk.clone()).unwrap();
    for _ in 0..5 {
        write(&splitter, 9 * MIB, &[8; 65536]).unwrap();
    }
    assert_eq!(disk.pending_bytes(Some(&acknowledged)), logged + dirty);
    // Record by record, also between two batches, and across a restart.
    let check = |disk: &Arc<ProtectedDisk>| {
        let mut left = logged;
        let mut at = acknowledged;
        for record in records_after(disk, &acknowledged) {
            left -= super::record_bytes(&record);
            (at.sequence, at.hash) = (record.sequence, record.hash);
            assert_eq!(disk.pending_bytes(Some(&at)), left + dirty);
        }
        assert_eq!(left, 0);
    };
    check(&disk);
    drop((splitter, disk));
    let attached = fixture.attach();
    assert_eq!(attached.decision, Decision::StayInBitmap);
    check(&attached.disk);
    // Nothing is left once it was taken, and the log with it.
    fixture.settle(&attached.disk);
    attached.disk.tick();
    attached.disk.tick();
    assert_eq!(attached.disk.mode(), Mode::Data);
    assert_eq!(attached.disk.pending_bytes(Some(&attached.disk.state().logged)), 0);
    let splitter = Splitter::new(attached.disk.clone()).unwrap();
    let start = attached.disk.state().logged;
    write(&splitter, 0, &[1; 8192]).unwrap();
    splitter.zero(Extent::new(65536, 4096), true, Durability::Cached).unwrap();
    assert_eq!(attached.disk.pending_bytes(Some(&start)), 8192 + 4096);
    assert_eq!(attached.disk.pending_bytes(None), 8192 + 4096);
}

/// The log's medium fails: the guest notices nothing, what it writes is tracked, and the log comes back by itself.
#[test]
pub fn a_log_that_fails_steps_down_and_comes_back() {
    let fixture = Fixture::new(DISK_BYTES);
    let disk = fixture.attach().disk;
    let mut replica = Replica::of(&fixture, &disk);
    let splitter = Splitter::new(disk.clone()).unwrap();
    write(&splitter, 0, &[1; 4096]).unwrap();
    let source = std::io::Error::other("the medium failed");
    disk.log.end();
    let error = LogError::Io { verb: "append to", path: "disk.img.00000001.hrl".into(), source };
    disk.unlogged(&[Extent::new(4096, 4096)], &Unlogged::Failed(error));
    write(&splitter, REGION_BYTES, &[2; 4096]).unwrap();
    let Mode::Bitmap { reason } = disk.mode() else { panic!("still logging") };
    assert!(reason.contains("append to log") && reason.contains("the medium failed"), "{reason}");
    disk.tick();
    assert!(matches!(disk.mode(), Mode::Bitmap { .. }), "its records were not taken yet");
    replica.ship(&fixture, &disk);
    disk.tick();
    disk.tick();
    assert_eq!(disk.mode(), Mode::Data);
    assert!(disk.alarms().is_empty());
    replica.scan(&fixture, &disk);
    replica.assert_equals(&fixture, "log failed");
    // No pair of files is left of what ended.
    let logs = std::fs::read_dir(fixture.folder.path()).unwrap();
    let logs: Vec<_> =
        logs.map(|entry| entry.unwrap().file_name()).filter(|name| name.to_string_lossy().contains(".0000")).collect();
    assert_eq!(logs.len(), 2, "{logs:?}");
}

#[test]
pub fn a_server_that_is_away_leaves_history_and_blocks_and_gets_both() {
    let mut fixture = Fixture::new(DISK_BYTES);
    fixture.limits = LogLimits { limit_bytes: 4 * MIB, ..fixture.limits };
    let mut disk = fixture.attach().disk;
    let mut replica = Replica::of(&fixture, &disk);
    disk.consumer(fixture.server).unwrap().store().unwrap();
    // Hours pass, in which the agent is killed and restarted as well.
    for round in 0..4u64 {
        let splitter = Splitter::new(disk.clone()).unwrap();
        for index in 0..6 {
            write(&splitter, index * MIB + round * 4096, &[round as u8 + 1; 512 << 10]).unwrap();
        }
        disk.tick();
        drop((splitter, disk));
        disk = fixture.attach().disk;
    }
    assert!(matches!(disk.mode(), Mode::Bitmap { .. }));
    assert!(fixture.pending(&disk).is_empty(), "nothing was turned into a scan");
    let epoch = disk.state().logged.epoch;
    replica.ship(&fixture, &disk);
    disk.tick();
    disk.tick();
    assert_ne!(disk.state().logged.epoch, epoch);
    assert_eq!(disk.mode(), Mode::Data);
    replica.scan(&fixture, &disk);
    replica.assert_equals(&fixture, "away for hours");
}

/// A scan that was under way: what was acknowledged of it is not read again, what was not is.
#[test]
fn a_crash_in_the_middle_of_a_scan_goes_on_with_what_is_left() {
    for is_power_lost in [false, true] {
        let mut fixture = Fixture::new(DISK_BYTES);
        let disk = fixture.attach().disk;
        let mut replica = Replica::of(&fixture, &disk);
        write(&Splitter::new(disk.clone()).unwrap(), 0, &[5; 4096]).unwrap();
        replica.ship(&fixture, &disk);
        disk.resync().unwrap();
        let seen = disk.state().scan_revision;
        disk.scanned(fixture.server, Extent::new(0, 3 * REGION_BYTES), seen).unwrap();
        disk.consumer(fixture.server).unwrap().sync_scan().unwrap();
        drop(disk);
        if is_power_lost {
            super::crash::reboot(&mut fixture);
        }
        let attached = fixture.attach();
        let pending = fixture.pending(&attached.disk);
        assert!(covers(&pending, Extent::new(3 * REGION_BYTES, 3 * REGION_BYTES)));
        assert!(!covers(&pending, Extent::new(REGION_BYTES, 4096)));
        assert_eq!(covers(&pending, Extent::new(0, 4096)), is_power_lost, "named by its intent bit");
        replica.scan(&fixture, &attached.disk);
        replica.assert_equals(&fixture, "in the middle of a scan");
    }
}

/// Two process servers: the log does not end for the one that is there because the other is away.
#[test]
fn one_dead_consumer_beside_a_live_one_steps_down_alone() {
    let mut fixture = Fixture::new(DISK_BYTES);
    fixture.limits = LogLimits { limit_bytes: 8 * MIB, rotate_bytes: MIB, ..fixture.limits };
    let dead = tidemark_base::ServerId::random();
    fixture.others.push(dead);
    let disk = fixture.attach().disk;
    let mut replica = Replica::of(&fixture, &disk);
    fixture.settle_for(&disk, dead);
    let last_seen = disk.state().logged;
    let gone = disk.consumer(dead).unwrap();
    gone.set_paused(true);
    write(&Splitter::new(disk.clone()).unwrap(), 23 * MIB, &[9; 4096]).unwrap();
    let mut epochs = std::collections::BTreeSet::new();
    let splitter = Splitter::new(disk.clone()).unwrap();
    // Several times what the log may hold; the live one takes it as it comes.
    for round in 0..60u64 {
        write(&splitter, round % 12 * MIB, &[round as u8 + 1; 512 << 10]).unwrap();
        disk.make_room();
        replica.scan(&fixture, &disk);
        disk.tick();
        assert_eq!(disk.mode(), Mode::Data, "round {round}");
        epochs.insert(disk.state().logged.epoch.0);
    }
    assert_eq!(epochs.len(), 2, "one new epoch, when it was let go");
    assert!(disk.log.allocated_bytes() < 8 * MIB);
    assert_eq!(fixture.kinds().iter().filter(|kind| **kind == EventKind::ConsumerSteppedDown).count(), 1);
    replica.assert_equals(&fixture, "the live one");
    // It survives a restart, too.
    drop((splitter, disk, gone));
    let disk = fixture.attach().disk;
    write(&Splitter::new(disk.clone()).unwrap(), 22 * MIB, &[8; 4096]).unwrap();
    assert_eq!(disk.cursor(dead), Some(last_seen));
    // The dead one comes back with what it held: no alarm, no whole scan, a new epoch with its blocks in the scan.
    let decision = resume::decide(&Situation {
        durable: Some((last_seen, disk.locate(&last_seen).unwrap())),
        scan_open: false,
        cursor: disk.cursor(dead),
        epochs: &disk.epochs(),
        scan_pending: true,
        start_readable: disk.locate(&disk.state().logged.epoch.start()).unwrap() == Located::Here,
        comparable: true,
        moved: false,
    });
    assert_eq!((decision.alarm, decision.whole_scan), (None, None));
    disk.new_epoch(decision.new_epoch.unwrap()).unwrap();
    let pending = disk.pending_scan(dead, ScanRevision(0)).unwrap().extents;
    for extent in [Extent::new(23 * MIB, 4096), Extent::new(22 * MIB, 4096), Extent::new(0, 512 << 10)] {
        assert!(covers(&pending, extent), "{extent}");
    }
    assert!(!covers(&pending, Extent::new(20 * MIB, 4096)), "never a full resync");
    disk.acknowledged(dead, disk.state().logged).unwrap();
    assert_eq!(disk.consumer(dead).unwrap().covered(), None, "the log waits for it again");
}
