//! Logs of Hyper-V, replayed: VHDX images made and written by QEMU's tools (on Windows by a writer of the tests' own, [`own`]), and logs by a
//! writer of the tests' own, after Microsoft's specification and not by our library.

#[allow(dead_code, reason = "each system needs a part of it")]
mod own;
#[cfg(unix)]
mod qemu;

#[cfg(windows)]
use own as images;
#[cfg(unix)]
use qemu as images;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tidemark_base::MachineId;
use tidemark_base::stop::Stop;
use tidemark_proto::replication::Consistency;

use super::Fixture;
use crate::capture::CaptureProvider;
use crate::capture::hrl::HrlImporter;
use crate::error::HostError;
use crate::events::EventKind;
use crate::mark::Marker;
use crate::protected::ProtectedDisk;

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 32 * MIB;
const LIMIT: Duration = Duration::from_secs(60);

// ── a writer of logs ──

fn checksum(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)))
}

fn log_id(number: u8) -> [u8; 16] {
    if number == 0 { [0; 16] } else { [number; 16] }
}

struct Log {
    number: u8,
    previous: u8,
    guid: [u8; 16],
    writes: Vec<(u64, Vec<u8>)>,
}

impl Log {
    /// Sets of at most three entries: the reader must go from set to set.
    fn bytes(&self, is_closed: bool) -> Vec<u8> {
        let mut file = vec![0; 4096];
        let mut before = None;
        let sets: Vec<_> = if self.writes.is_empty() { vec![&[][..]] } else { self.writes.chunks(3).collect() };
        for set in sets {
            for (_, data) in set {
                file.extend(data);
            }
            let at = file.len() as u64;
            let mut block = vec![0; 4096];
            block[..8].copy_from_slice(&before.map_or(0u64, |before| at - before).to_le_bytes());
            block[8..12].copy_from_slice(&(set.len() as u32).to_le_bytes());
            let sum = checksum(&[&block[..12], &block[16..32]].concat());
            block[12..16].copy_from_slice(&sum.to_le_bytes());
            for (index, (offset, data)) in set.iter().enumerate() {
                let entry = &mut block[32 + index * 32..][..32];
                entry[..8].copy_from_slice(&offset.to_le_bytes());
                entry[12..16].copy_from_slice(&(data.len() as u32).to_le_bytes());
                entry[16..20].copy_from_slice(&800_000_000u32.to_le_bytes());
                entry[20] = 1;
                let sum = checksum(&[&entry[..8], &entry[12..]].concat());
                entry[8..12].copy_from_slice(&sum.to_le_bytes());
            }
            file.extend(block);
            before = Some(at);
        }
        let end = file.len() as u64;
        file[..8].copy_from_slice(b"msctlog\0");
        file[8..12].copy_from_slice(&0x0002_0000u32.to_le_bytes());
        file[12..16].copy_from_slice(&(800_000_000 + u32::from(self.number)).to_le_bytes());
        file[16..18].copy_from_slice(b"ct");
        file[32..40].copy_from_slice(&end.to_le_bytes());
        file[44..52].copy_from_slice(&if is_closed { end } else { 0 }.to_le_bytes());
        file[56..60].copy_from_slice(&4096u32.to_le_bytes());
        file[60..76].copy_from_slice(&log_id(self.number));
        file[76..92].copy_from_slice(&log_id(self.previous));
        file[92..96].copy_from_slice(&(800_000_100 + u32::from(self.number)).to_le_bytes());
        file[96..104].copy_from_slice(&(self.writes.len() as u64).to_le_bytes());
        file[110..126].copy_from_slice(&self.guid);
        let sum = checksum(&[&file[..40], &file[44..4096]].concat());
        file[40..44].copy_from_slice(&sum.to_le_bytes());
        file
    }
}

// ── a host ──

struct Host {
    folder: tempfile::TempDir,
    random: super::Random,
}

impl Host {
    fn new() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let host = Self { folder, random: super::Random(5) };
        images::create(&host.image(), DISK_BYTES).then_some(host)
    }

    fn image(&self) -> PathBuf {
        self.folder.path().join("Web Server.vhdx")
    }

    fn log_path(&self, number: u8) -> PathBuf {
        self.folder.path().join(format!("Web Server_{number:02}.hrl"))
    }

    /// The guest writes to the image; returns what a log of it holds.
    fn write(&mut self, number: u8, previous: u8) -> Log {
        let mut writes = Vec::new();
        for _ in 0..7 {
            let sectors = 1 + self.random.below(40);
            let offset = self.random.below(DISK_BYTES / 512 - sectors) * 512;
            let pattern = (self.random.below(255) + 1) as u8;
            writes.push((offset, vec![pattern; (sectors * 512) as usize]));
        }
        // Zeroes are data there.
        writes.push((MIB, vec![0; 65536]));
        images::write(&self.image(), &writes);
        Log { number, previous, guid: self.guid(), writes }
    }

    fn guid(&self) -> [u8; 16] {
        let image = std::fs::read(self.image()).unwrap();
        let header = |at: usize| {
            let sequence = u64::from_le_bytes(image[at + 8..at + 16].try_into().unwrap());
            (sequence, <[u8; 16]>::try_from(&image[at + 32..at + 48]).unwrap())
        };
        header(64 << 10).max(header(128 << 10)).1
    }

    /// Under its name there is a whole file or none.
    fn put(&self, path: &Path, content: &[u8]) {
        let storage = tidemark_base::storage::RealStorage::open_folder(self.folder.path());
        let name = path.file_name().unwrap().to_str().unwrap();
        tidemark_base::storage::replace_file(&*storage, name, content).unwrap();
    }

    fn close(&self, log: &Log) {
        self.put(&self.log_path(log.number), &log.bytes(true));
    }

    /// The disk, by whoever made it.
    fn content(&self) -> Vec<u8> {
        images::content(&self.image())
    }

    fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let files = std::fs::read_dir(self.folder.path()).unwrap().map(|entry| entry.unwrap().path());
        files.map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
    }
}

fn protect(importer: &HrlImporter, fixture: &mut Fixture, image: &Path) -> Arc<ProtectedDisk> {
    assert_eq!(importer.probe(image, fixture.folder.path()).unwrap(), DISK_BYTES);
    importer.prepare(image, fixture.disk).unwrap();
    fixture.image = Some(importer.place(image, fixture.disk));
    let disk = fixture.attach().disk;
    importer.attach("web-0", &disk).unwrap();
    disk
}

fn mark(disk: &Arc<ProtectedDisk>) -> Result<(), HostError> {
    let marker = Marker::new(MachineId::random(), "web".into(), vec![disk.clone()], None, Duration::from_secs(1));
    marker.mark(Consistency::Crash, "", true).map(drop)
}

/// Waits for a mark at which the copy is what the host's disk is.
#[track_caller]
fn wait_same(host: &Host, fixture: &Fixture, disk: &Arc<ProtectedDisk>) {
    let (expected, deadline, never) = (host.content(), Instant::now() + LIMIT, Stop::new());
    loop {
        match mark(disk) {
            Ok(()) if fixture.content() == expected => return,
            Ok(()) | Err(HostError::Replaying { .. }) => {}
            Err(error) => panic!("{error}"),
        }
        assert!(Instant::now() < deadline, "the copy differs; {:?}", disk.alarms());
        never.wait_for(Duration::from_millis(20));
    }
}

/// Until they are told to, logs that contradict each other are waited for: those that the test still writes.
const PATIENT: Duration = Duration::from_secs(3600);
const IMPATIENT: Duration = Duration::from_millis(1);

fn compares(fixture: &Fixture) -> usize {
    fixture.kinds().iter().filter(|kind| **kind == EventKind::DiskUnwitnessed).count()
}

fn skipped(test: &str) -> Option<Host> {
    let host = Host::new();
    if host.is_none() {
        super::skipped(test, "qemu-img cannot make a VHDX");
    }
    host
}

#[test]
fn logs_of_a_hyper_v_host_are_followed() {
    let Some(mut host) = skipped("logs_of_a_hyper_v_host_are_followed") else { return };
    let mut fixture = Fixture::new(DISK_BYTES);
    let importer = HrlImporter::new(&fixture.folder.path().join("state"));
    importer.patience.set(PATIENT);
    // What is there before, and a log that is written when the import begins.
    host.write(0, 0);
    let mut first = host.write(1, 0);
    host.put(&host.log_path(1), &first.bytes(false));
    let disk = protect(&importer, &mut fixture, &host.image());
    let deadline = Instant::now() + LIMIT;
    while fixture.content() != host.content() {
        assert!(Instant::now() < deadline, "{:?}", disk.alarms());
    }
    let refused = mark(&disk).unwrap_err();
    assert!(matches!(refused, HostError::Replaying { .. }) && !refused.help().is_empty(), "{refused}");
    let later = host.write(1, 0);
    first.writes.extend(later.writes);
    first.guid = later.guid;
    host.close(&first);
    wait_same(&host, &fixture, &disk);
    assert_eq!(compares(&fixture), 1, "the first");

    // Two at once, the later one first.
    let (second, third) = (host.write(2, 1), host.write(3, 2));
    host.close(&third);
    host.close(&second);
    wait_same(&host, &fixture, &disk);

    // A restart goes on where it was, with what came meanwhile.
    importer.detach("web-0").unwrap();
    disk.detach().unwrap();
    drop((disk, importer));
    let log = host.write(4, 3);
    host.close(&log);
    let importer = HrlImporter::new(&fixture.folder.path().join("state"));
    importer.patience.set(PATIENT);
    let disk = protect(&importer, &mut fixture, &host.image());
    wait_same(&host, &fixture, &disk);
    assert_eq!(compares(&fixture), 1, "nothing but logs was needed");
    let before = host.files();
    importer.stop().unwrap();
    assert_eq!(host.files(), before, "what is the host's stays as it is");
    disk.detach().unwrap();
    importer.untrack(fixture.disk).unwrap();
    assert!(!fixture.path().exists());
}

#[test]
fn what_logs_do_not_tell_is_compared() {
    let Some(mut host) = skipped("what_logs_do_not_tell_is_compared") else { return };
    let mut fixture = Fixture::new(DISK_BYTES);
    let importer = HrlImporter::new(&fixture.folder.path().join("state"));
    importer.patience.set(PATIENT);
    let settled = |host: &Host, fixture: &Fixture, disk: &Arc<ProtectedDisk>| {
        importer.patience.set(IMPATIENT);
        wait_same(host, fixture, disk);
        importer.patience.set(PATIENT);
    };
    let log = host.write(1, 0);
    host.close(&log);
    let disk = protect(&importer, &mut fixture, &host.image());
    wait_same(&host, &fixture, &disk);
    let log = host.write(2, 1);
    host.close(&log);
    wait_same(&host, &fixture, &disk);
    assert_eq!(compares(&fixture), 1);

    // A log in the chain is missing.
    host.write(3, 2);
    let log = host.write(4, 3);
    host.close(&log);
    settled(&host, &fixture, &disk);
    assert_eq!(compares(&fixture), 2);
    let log = host.write(5, 4);
    host.close(&log);
    wait_same(&host, &fixture, &disk);
    assert_eq!(compares(&fixture), 2, "and the chain goes on");

    // A log is damaged.
    let damaged = host.write(6, 5);
    let mut bytes = damaged.bytes(true);
    let entry = bytes.len() - 4096 + 32;
    bytes[entry] ^= 1;
    host.put(&host.log_path(6), &bytes);
    wait_same(&host, &fixture, &disk);
    assert_eq!(compares(&fixture), 3);

    // Somebody writes to the image and keeps no log.
    host.write(0, 0);
    settled(&host, &fixture, &disk);
    assert_eq!(compares(&fixture), 4);
    importer.stop().unwrap();
    disk.detach().unwrap();
}

/// The copy is half a log when the process is killed: nothing can be marked before the log was replayed again.
#[test]
fn a_replay_that_was_cut_short_is_made_again_before_any_mark() {
    use crate::capture::hrl::cursor::{Cursor, load, store};
    let Some(mut host) = skipped("a_replay_that_was_cut_short_is_made_again_before_any_mark") else { return };
    let mut fixture = Fixture::new(DISK_BYTES);
    let state = fixture.folder.path().join("state");
    let importer = HrlImporter::new(&state);
    importer.patience.set(PATIENT);
    let log = host.write(1, 0);
    host.close(&log);
    let disk = protect(&importer, &mut fixture, &host.image());
    wait_same(&host, &fixture, &disk);
    importer.stop().unwrap();
    // As a kill in the middle leaves it: the cursor says what was begun, the copy holds a part.
    let second = host.write(2, 1);
    let storage = tidemark_base::storage::RealStorage::open_folder(state.join("imported"));
    let cursor = load(&*storage, fixture.disk).unwrap().unwrap();
    let begun = Cursor { until: Some(uuid::Uuid::from_bytes([2; 16])), ..cursor };
    store(&*storage, fixture.disk, &begun).unwrap();
    let splitter = crate::capture::splitter::Splitter::new(disk.clone()).unwrap();
    super::write(&splitter, second.writes[0].0, &second.writes[0].1).unwrap();
    drop((splitter, disk));
    let importer = HrlImporter::new(&state);
    importer.patience.set(PATIENT);
    let disk = protect(&importer, &mut fixture, &host.image());
    let never = Stop::new();
    for _ in 0..20 {
        assert!(matches!(mark(&disk), Err(HostError::Replaying { .. })));
        never.wait_for(Duration::from_millis(10));
    }
    host.close(&second);
    wait_same(&host, &fixture, &disk);
    assert_eq!(compares(&fixture), 1);
    importer.stop().unwrap();
    disk.detach().unwrap();
}

#[test]
fn what_cannot_be_imported_says_why() {
    let Some(host) = skipped("what_cannot_be_imported_says_why") else { return };
    let importer = HrlImporter::new(host.folder.path());
    let probe = |name: &str| importer.probe(&host.folder.path().join(name), host.folder.path()).unwrap_err();
    host.put(Path::new("disk.img"), &[0; 4096]);
    host.put(Path::new("no.vhdx"), &[0; 4096]);
    for (name, expected) in [("disk.img", "neither"), ("no.vhdx", "cannot open"), ("absent.vhdx", "does not exist")] {
        let error = probe(name);
        assert!(error.to_string().contains(expected) && !error.help().is_empty(), "{name}: {error}");
    }
}

/// What reads images on Windows is asked here, for what QEMU made; and QEMU for what the tests' own writer made, so that what passes
/// under Windows rests on a VHDX that others can read.
#[cfg(unix)]
#[test]
fn each_reader_of_vhdx_reads_what_the_others_wrote() {
    use crate::capture::hrl::vhdx::{OpenError, Reader};
    let Some(mut host) = skipped("each_reader_of_vhdx_reads_what_the_others_wrote") else { return };
    let by_the_crate = |path: &Path| {
        let mut reader = Reader::open(path, crate::capture::hrl::Format::Vhdx).unwrap();
        let mut content = vec![1; reader.bytes() as usize];
        content.chunks_mut(1 << 20).enumerate().for_each(|(at, part)| reader.read(at as u64 * MIB, part).unwrap());
        content
    };
    let ours = host.folder.path().join("own.vhdx");
    assert!(own::create(&ours, DISK_BYTES));
    for round in 0..3 {
        let log = host.write(round, 0);
        own::write(&ours, &log.writes);
        let expected = host.content();
        assert!(by_the_crate(&host.image()) == expected, "an image of QEMU's");
        assert!(own::content(&ours) == expected && qemu::content(&ours) == expected, "an image of ours");
        assert!(by_the_crate(&ours) == expected);
    }
    let child = host.folder.path().join("child.avhdx");
    std::fs::copy(&ours, &child).unwrap();
    own::set_parent(&child);
    let refused = |format| Reader::open(&child, format).err().unwrap();
    assert!(matches!(refused(crate::capture::hrl::Format::Vhdx), OpenError::Differencing { .. }));
    assert!(matches!(refused(crate::capture::hrl::Format::Vhd), OpenError::Vhd { .. }));
}
