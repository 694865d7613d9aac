//! A folder that something else fills to its last byte.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use tidemark_base::{Extent, Sequence};

use super::{Fixture, Random, covers, records_after, write};
use crate::attach::Decision;
use crate::capture::splitter::Splitter;
use crate::events::EventKind;
use crate::log::LogLimits;
use crate::protected::ProtectedDisk;
use crate::source::{Located, Source, SourceError};
use crate::state::session::{Mode, SessionFile};

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 8 * MIB;

/// A small file system in memory, mounted for one test.
struct Tmpfs {
    folder: tempfile::TempDir,
}

impl Tmpfs {
    /// `None` where this user may not mount one: the test says so and ends.
    fn mount(name: &str, bytes: u64) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let size = format!("size={bytes}");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &size, "none"]).arg(folder.path()).output().ok()?;
        if !mounted.status.success() {
            println!("skipped: {name} needs to mount a tmpfs: {}", String::from_utf8_lossy(&mounted.stderr));
            return None;
        }
        Some(Self { folder })
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Another program takes all that is left, to the last byte.
    fn fill(&self) -> PathBuf {
        let path = self.path().join("somebody-else");
        let file = File::create(&path).unwrap();
        let mut at = 0;
        for length in [MIB as usize, 4096, 1] {
            while file.write_all_at(&vec![0x5a; length], at).is_ok() {
                at += length as u64;
            }
        }
        assert!(File::create(self.path().join("one-more")).and_then(|file| file.write_all_at(&[1; 4096], 0)).is_err());
        let _ = std::fs::remove_file(self.path().join("one-more"));
        path
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).output();
    }
}

/// A disk whose blocks are all there, on the small file system; the agent's own state is elsewhere.
fn fixture(tmpfs: &Tmpfs) -> Fixture {
    let mut fixture = Fixture::new(DISK_BYTES);
    fixture.image = Some(tmpfs.path().join("disk.img"));
    let file = File::create(fixture.path()).unwrap();
    file.write_all_at(&vec![1; DISK_BYTES as usize], 0).unwrap();
    fixture.limits = LogLimits { rotate_bytes: MIB, limit_bytes: 64 * MIB, reserve_bytes: 0 };
    fixture
}

fn is_bitmap(disk: &ProtectedDisk) -> bool {
    matches!(disk.mode(), Mode::Bitmap { .. })
}

#[test]
fn a_folder_that_is_full_to_the_last_byte_is_left_by_itself() {
    let Some(tmpfs) = Tmpfs::mount("a_folder_that_is_full_to_the_last_byte_is_left_by_itself", 24 * MIB) else {
        return;
    };
    let fixture = fixture(&tmpfs);
    let disk = fixture.attach_in_sync();
    let splitter = Splitter::new(disk.clone()).unwrap();
    write(&splitter, 0, &[2; MIB as usize]).unwrap();
    disk.tick();
    write(&splitter, MIB, &[2; 2 * MIB as usize]).unwrap();
    disk.tick();
    let somebody = tmpfs.fill();
    // The guest goes on, into the log's last room and then without.
    for round in 0..40u64 {
        write(&splitter, (round % 8) * MIB, &[3 + round as u8; 64 << 10]).unwrap();
    }
    disk.tick();
    assert!(is_bitmap(&disk));
    assert!(disk.mode().reason().unwrap().contains("No space left"), "{:?}", disk.mode());
    assert!(!disk.dirty.is_empty());
    let stored = SessionFile::peek(&fixture.state()).unwrap().unwrap();
    assert_eq!(stored.mode.name(), "bitmap", "stored although nothing fits any more");
    // The consumer takes what the log holds; that is stored in place, and the log makes room for the next one.
    let logged = disk.state().logged;
    assert_eq!(disk.locate(&logged).unwrap(), Located::Here);
    disk.acknowledged(fixture.server, logged).unwrap();
    disk.tick();
    assert_eq!(disk.consumer(fixture.server).unwrap().durable_cursor(), Some(logged));
    disk.tick();
    assert_eq!(disk.mode(), Mode::Data, "the room of the acknowledged logs is enough for a new one");
    let pending = fixture.pending(&disk);
    assert!(covers(&pending, Extent::new(7 * MIB, 64 << 10)));
    assert!(somebody.exists(), "without help from outside");
    write(&splitter, 0, &[9; 4096]).unwrap();
    assert_eq!(records_after(&disk, &disk.state().logged.epoch.start()).len(), 1);
    let kinds = fixture.kinds();
    assert!(kinds.contains(&EventKind::SteppedDown) && kinds.contains(&EventKind::SteppedUp), "{kinds:?}");
}

/// A stream that took everything stays open, with its reader at the end of a log that is not needed any more: an open file
/// keeps its room, and the log waits for room.
#[test]
fn a_stream_that_took_everything_keeps_no_room() {
    let Some(tmpfs) = Tmpfs::mount("a_stream_that_took_everything_keeps_no_room", 24 * MIB) else { return };
    let mut fixture = fixture(&tmpfs);
    // What is logged at once is logged into one log.
    fixture.limits = LogLimits { rotate_bytes: 64 * MIB, reserve_bytes: 4 * MIB, ..fixture.limits };
    let disk = fixture.attach_in_sync();
    let splitter = Splitter::new(disk.clone()).unwrap();
    let mut reader = disk.read_after(&disk.state().logged).unwrap();
    for round in 0..24u64 {
        write(&splitter, (round % 8) * MIB, &[3 + round as u8; MIB as usize]).unwrap();
        disk.tick();
    }
    assert!(is_bitmap(&disk));
    let logged = disk.state().logged;
    let mut records = Vec::new();
    reader.read(logged.sequence, usize::MAX, &mut records).unwrap();
    assert!(records.len() > 8);
    disk.acknowledged(fixture.server, logged).unwrap();
    disk.tick();
    disk.tick();
    assert_eq!(disk.mode(), Mode::Data, "the room of the acknowledged log came back");
    // It reads on where the next one begins, or is told that it cannot.
    assert!(matches!(reader.read(Sequence(u64::MAX), 1, &mut Vec::new()), Err(SourceError::Gone { .. })));
}

/// What the status says about room is what is waited for.
#[test]
fn what_is_said_to_be_waited_for_is_enough() {
    let Some(tmpfs) = Tmpfs::mount("what_is_said_to_be_waited_for_is_enough", 24 * MIB) else { return };
    let mut fixture = fixture(&tmpfs);
    let disk = fixture.attach_in_sync();
    let somebody = tmpfs.fill();
    let somebody = std::fs::OpenOptions::new().write(true).open(somebody).unwrap();
    let keep = somebody.metadata().unwrap().len();
    let leave = |free: u64| {
        let before = somebody.metadata().unwrap().len();
        let taken = vec![0x5a; (keep - free).saturating_sub(before) as usize];
        somebody.write_all_at(&taken, before).unwrap();
        somebody.set_len(keep - free).unwrap();
    };
    leave(3 * MIB);
    fixture.limits.reserve_bytes = 4 * MIB;
    disk.set_log_limits(fixture.limits);
    disk.tick();
    let reason = disk.mode().reason().unwrap().to_owned();
    let bytes = |text: &str| text.split(' ').filter_map(|word| word.parse::<u64>().ok()).collect::<Vec<_>>();
    let [reserve, wanted] = bytes(&reason)[..] else { panic!("{reason}") };
    assert_eq!(reserve, fixture.limits.reserve_bytes);
    assert!(disk.alarms().get("log").unwrap().message.contains(&reason));
    fixture.settle(&disk);
    leave(wanted - MIB);
    disk.tick();
    assert_eq!(disk.mode().reason(), Some(&*reason), "not yet, and nothing else is said");
    leave(wanted + MIB);
    disk.tick();
    assert_eq!(disk.mode(), Mode::Data);
    // A log that ended for another reason waits for the same room, and that is said.
    disk.step_down(&crate::log::Unlogged::Limit { bytes: 1 });
    disk.log.end();
    leave(wanted - MIB);
    disk.acknowledged(fixture.server, disk.state().logged).unwrap();
    disk.tick();
    let reason = disk.mode().reason().unwrap().to_owned();
    assert_eq!(bytes(&reason).last(), Some(&wanted), "{reason}");
    assert!(disk.alarms().get("log").unwrap().message.contains(&reason));
    leave(wanted + MIB);
    disk.tick();
    assert_eq!(disk.mode(), Mode::Data);
}

#[test]
fn an_agent_that_was_killed_on_a_full_disk_serves_its_guest_again() {
    let Some(tmpfs) = Tmpfs::mount("an_agent_that_was_killed_on_a_full_disk_serves_its_guest_again", 24 * MIB) else {
        return;
    };
    let fixture = fixture(&tmpfs);
    let disk = fixture.attach_in_sync();
    let splitter = Splitter::new(disk.clone()).unwrap();
    let mut random = Random(5);
    write(&splitter, 0, &[2; MIB as usize]).unwrap();
    disk.tick();
    for round in 0..3 {
        let somebody = tmpfs.fill();
        for _ in 0..20 {
            write(&splitter, random.below(DISK_BYTES / 4096 - 16) * 4096, &[3; 64 << 10]).unwrap();
        }
        assert!(is_bitmap(&disk));
        let _ = somebody;
        if round == 1 {
            disk.tick();
        }
    }
    let mut replica = vec![0; DISK_BYTES as usize];
    let cursor = disk.cursor(fixture.server).unwrap();
    File::open(fixture.path()).unwrap().read_exact_at(&mut replica, 0).unwrap();
    drop((splitter, disk));
    // Still not a byte.
    let attached = fixture.attach();
    let disk = attached.disk;
    let splitter = Splitter::new(disk.clone()).unwrap();
    write(&splitter, 4096, &[8; 4096]).unwrap();
    assert_eq!(fixture.content()[4096], 8);
    // Everything is known: what the log still holds, what is dirty, what is pending.
    let mut known = fixture.pending(&disk);
    disk.dirty.extents().iter().for_each(|extent| known.insert(extent));
    if attached.decision == Decision::StayInBitmap || disk.state().logged.epoch == cursor.epoch {
        for record in records_after(&disk, &cursor) {
            if let crate::source::RecordBody::Write { extent, .. } = record.body {
                known.insert(extent);
            }
        }
    }
    for at in (0..DISK_BYTES).step_by(4096) {
        let byte = fixture.content()[at as usize];
        assert!(byte == 1 || byte == 2 || covers(&known, Extent::new(at, 4096)), "{at} is {byte} and not known");
    }
    assert!(covers(&known, Extent::new(0, MIB)), "logged before, and not acknowledged");
    // Once somebody tidies up, and the consumer came, the log goes on.
    std::fs::remove_file(tmpfs.path().join("somebody-else")).unwrap();
    for _ in 0..3 {
        fixture.settle(&disk);
        disk.tick();
    }
    assert_eq!(disk.mode(), Mode::Data);
    disk.detach().unwrap();
}

#[test]
fn a_disk_that_is_detached_on_a_full_disk_is_left_cleanly() {
    let Some(tmpfs) = Tmpfs::mount("a_disk_that_is_detached_on_a_full_disk_is_left_cleanly", 24 * MIB) else { return };
    let fixture = fixture(&tmpfs);
    let disk = fixture.attach_in_sync();
    let splitter = Splitter::new(disk.clone()).unwrap();
    tmpfs.fill();
    for round in 0..20u64 {
        write(&splitter, (round % 8) * MIB, &[3; 64 << 10]).unwrap();
    }
    fixture.settle(&disk);
    disk.detach().unwrap();
    drop((splitter, disk));
    let attached = fixture.attach();
    assert!(matches!(attached.decision, Decision::ScanDirty | Decision::StayInBitmap), "{:?}", attached.decision);
    let disk: Arc<ProtectedDisk> = attached.disk;
    let mut known = fixture.pending(&disk);
    disk.dirty.extents().iter().for_each(|extent| known.insert(extent));
    assert!(known.total_bytes() < DISK_BYTES, "not the whole disk");
}
