//! What every capture provider must do: [`conforms`] drives any of them with random writes and trims, marks, restarts (clean and not) and
//! more than its log may hold, and compares every recovery point with a copy of the disk that was taken at its mark.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tidemark_base::disk::Disk;
use tidemark_base::storage::RealStorage;
use tidemark_base::{DiskId, Extent, ExtentSet, Generation, MachineId, MarkId, Position};
use tidemark_nbd::client::Client;
use tidemark_proto::control::DiskSpec;
use tidemark_proto::replication::Consistency;

pub(super) use super::skipped;
use super::{Fixture, Random, records_after};
use crate::attach::Decision;
use crate::capture::CaptureProvider;
use crate::capture::bpf::BpfTracker;
use crate::capture::fuse::FuseSplitter;
use crate::capture::nbd::{NbdSplitter, SOCKET};
use crate::capture::providers::ProviderError;
use crate::capture::tracker::Tracker;
use crate::error::HostError;
use crate::freeze::{FreezeError, Frozen};
use crate::log::LogLimits;
use crate::mark::Marker;
use crate::protected::ProtectedDisk;
use crate::source::{Located, RecordBody, ScanRevision, Source};
use crate::state::session::Mode;

const MIB: u64 = 1 << 20;
pub(super) const DISK_BYTES: u64 = 8 * MIB;
const SECTOR: u64 = 4096;

/// A provider, and a workload that uses a disk as it wants it used.
pub(super) trait Subject {
    /// Attaches the disk and begins to capture.
    fn attach(&mut self, fixture: &mut Fixture) -> (Arc<ProtectedDisk>, Decision);
    /// Lets go of everything but the disk itself, which then is detached or, as by a kill, is not.
    fn let_go(&mut self);
    fn write(&mut self, offset: u64, data: &[u8]);
    fn zero(&mut self, extent: Extent, discard: bool);
    /// The disk as its workload sees it.
    fn content(&self, fixture: &Fixture) -> Vec<u8> {
        fixture.content()
    }
}

/// What a process server would hold.
pub(super) struct Replica {
    pub image: Vec<u8>,
    pub at: Position,
    /// False from the begin of a scan to the first mark after its end.
    pub is_consistent: bool,
    pub copies: BTreeMap<MarkId, Vec<u8>>,
    pub checked: usize,
}

impl Replica {
    /// Takes the records and scans that there are, and checks each mark that is a recovery point.
    pub fn catch_up(&mut self, fixture: &Fixture, disk: &ProtectedDisk) {
        let pending = disk.pending_scan(fixture.server, ScanRevision(0)).unwrap();
        if disk.locate(&self.at).unwrap() != Located::Here {
            assert!(!pending.extents.is_empty() || self.at.sequence.0 == 0, "history goes on without a scan");
            self.at = disk.state().logged.epoch.start();
            self.is_consistent = false;
        }
        self.is_consistent &= pending.extents.is_empty();
        for record in records_after(disk, &self.at) {
            self.at.sequence = record.sequence;
            self.at.hash = record.hash;
            match &record.body {
                RecordBody::Write { extent, data } => {
                    let target = &mut self.image[extent.offset as usize..extent.end() as usize];
                    disk.read_data(&[*data], target).unwrap();
                }
                RecordBody::Zeroes { extent } => self.image[extent.offset as usize..extent.end() as usize].fill(0),
                RecordBody::Mark(mark) => {
                    // A scan that was taken whole before this mark was made ends with it.
                    self.is_consistent |= pending.extents.is_empty();
                    let copy = self.copies.remove(&mark.id).expect("each mark has its copy");
                    if self.is_consistent {
                        assert!(copy == self.image, "recovery point {} differs from the disk at its mark", mark.id);
                        self.checked += 1;
                    }
                }
            }
        }
        for extent in pending.extents.iter() {
            disk.disk.read_at(extent.offset, &mut self.image[extent.offset as usize..extent.end() as usize]).unwrap();
            disk.scanned(fixture.server, extent, pending.revision).unwrap();
        }
        disk.acknowledged(fixture.server, self.at).unwrap();
        disk.consumer(fixture.server).unwrap().store().unwrap();
    }
}

pub(super) fn conforms(subject: &mut dyn Subject, fixture: &mut Fixture, seed: u64) {
    // A log that a few writes fill.
    fixture.limits = LogLimits { rotate_bytes: 256 << 10, limit_bytes: 2 * MIB, reserve_bytes: 0 };
    let mut random = Random(seed);
    let (mut disk, _) = subject.attach(fixture);
    let mut replica = Replica {
        image: vec![0; DISK_BYTES as usize],
        at: disk.state().logged.epoch.start(),
        is_consistent: false,
        copies: BTreeMap::new(),
        checked: 0,
    };
    let mut stepped_down = 0;
    for round in 0..50u64 {
        let is_overload = round % 20 == 13;
        for _ in 0..if is_overload { 200 } else { 1 + random.below(8) } {
            let offset = random.below(DISK_BYTES / SECTOR) * SECTOR;
            let room = DISK_BYTES - offset;
            match random.below(6) {
                0 => {
                    let length = (SECTOR << random.below(8)).min(room);
                    subject.zero(Extent::new(offset, length), random.below(2) == 0);
                }
                _ => {
                    let length = (SECTOR << random.below(5)).min(room);
                    let data = random.below(1 << 30).to_le_bytes().repeat(length as usize / 8);
                    subject.write(offset, &data);
                }
            }
        }
        // A mark of its own machine each time: nothing of it must be remembered.
        let marker = Marker::new(MachineId::random(), "web".into(), vec![disk.clone()], None, Duration::from_secs(1));
        for attempt in 0.. {
            assert!(attempt < 200, "no mark could be made: {:?}", disk.mode());
            let mut held = |outcome: &crate::MarkOutcome| {
                replica.copies.insert(outcome.id, subject.content(fixture));
            };
            match marker.mark_observed(Consistency::Crash, "", true, &mut held) {
                Ok(_) => break,
                Err(HostError::Scanning { .. } | HostError::Unsettled { .. } | HostError::Busy { .. }) => {}
                Err(HostError::NotLogging { .. }) => stepped_down += usize::from(attempt == 0),
                Err(error) => panic!("{error}"),
            }
            // The replica takes what there is; then the disk may return to its log.
            marker.drain();
            replica.catch_up(fixture, &disk);
            disk.tick();
        }
        if random.below(3) == 0 {
            replica.catch_up(fixture, &disk);
        }
        disk.tick();
        if random.below(6) == 0 {
            let is_clean = random.below(2) == 0;
            // What is written after the last mark and what nobody acknowledged must survive as well.
            subject.write(random.below(DISK_BYTES / SECTOR) * SECTOR, &[round as u8; SECTOR as usize]);
            subject.let_go();
            if is_clean {
                disk.detach().unwrap();
            }
            drop((marker, disk));
            let (again, decision) = subject.attach(fixture);
            assert!(!matches!(decision, Decision::ScanWhole(_)), "a restart needs no compare: {decision:?}");
            disk = again;
        }
    }
    replica.catch_up(fixture, &disk);
    let marker = Marker::new(MachineId::random(), "web".into(), vec![disk.clone()], None, Duration::from_secs(1));
    let mut held = |outcome: &crate::MarkOutcome| {
        replica.copies.insert(outcome.id, subject.content(fixture));
    };
    marker.mark_observed(Consistency::Crash, "", true, &mut held).unwrap();
    replica.catch_up(fixture, &disk);
    assert!(replica.is_consistent && replica.image == subject.content(fixture));
    assert!(replica.checked > 15, "only {} points were checked", replica.checked);
    assert!(stepped_down > 0, "the log was never at its limit");
    assert_eq!(disk.mode(), Mode::Data, "it returned to its log");
    subject.let_go();
    disk.detach().unwrap();
}

pub(super) const SEEDS: std::ops::Range<u64> = 1..3;

// ── the NBD splitter, through its socket ──

#[derive(Default)]
pub(super) struct Nbd {
    running: Option<(NbdSplitter, Client)>,
}

impl Subject for Nbd {
    fn attach(&mut self, fixture: &mut Fixture) -> (Arc<ProtectedDisk>, Decision) {
        let attached = fixture.attach();
        let run = fixture.folder.path().join("run");
        let storage = RealStorage::create(fixture.folder.path().join("state")).unwrap();
        let provider = NbdSplitter::start(&run, &[], storage).unwrap();
        provider.attach("web-0", &attached.disk).unwrap();
        let client = Client::connect_unix(&run.join(SOCKET), "web-0").unwrap();
        self.running = Some((provider, client));
        (attached.disk, attached.decision)
    }

    fn let_go(&mut self) {
        let (provider, client) = self.running.take().unwrap();
        drop(client);
        provider.detach("web-0").unwrap();
        provider.stop().unwrap();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.running.as_mut().unwrap().1.write(offset, data).unwrap();
    }

    fn zero(&mut self, extent: Extent, discard: bool) {
        let client = &mut self.running.as_mut().unwrap().1;
        if discard { client.trim(extent).unwrap() } else { client.zero(extent, false).unwrap() }
    }
}

#[test]
fn the_nbd_splitter_conforms() {
    for seed in SEEDS {
        conforms(&mut Nbd::default(), &mut Fixture::new(DISK_BYTES), seed);
    }
}

// ── the FUSE splitter, through its file ──

#[derive(Default)]
pub(super) struct Fuse {
    running: Option<(FuseSplitter, File)>,
}

impl Subject for Fuse {
    fn attach(&mut self, fixture: &mut Fixture) -> (Arc<ProtectedDisk>, Decision) {
        let attached = fixture.attach();
        let run = fixture.folder.path().join("run");
        std::fs::create_dir_all(&run).unwrap();
        let provider = FuseSplitter::new(&run, &[]);
        let address = provider.attach("web-0", &attached.disk).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(address.file.unwrap()).unwrap();
        self.running = Some((provider, file));
        (attached.disk, attached.decision)
    }

    /// The program still has the file open.
    fn let_go(&mut self) {
        let (provider, file) = self.running.take().unwrap();
        provider.detach("web-0").unwrap();
        let refused = file.write_at(&[1; 512], 0).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::ENOTCONN));
        provider.stop().unwrap();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.running.as_ref().unwrap().1.write_all_at(data, offset).unwrap();
    }

    fn zero(&mut self, extent: Extent, discard: bool) {
        use nix::fcntl::FallocateFlags;
        let mode = match discard {
            true => FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
            false => FallocateFlags::FALLOC_FL_ZERO_RANGE,
        };
        let file = &self.running.as_ref().unwrap().1;
        nix::fcntl::fallocate(file, mode, extent.offset as i64, extent.length as i64).unwrap();
    }

    fn content(&self, fixture: &Fixture) -> Vec<u8> {
        fixture.content()
    }
}

#[test]
fn the_fuse_splitter_conforms() {
    if let Err(error) = tidemark_fuse::probe() {
        return skipped("the_fuse_splitter_conforms", &error.to_string());
    }
    for seed in SEEDS {
        conforms(&mut Fuse::default(), &mut Fixture::new(DISK_BYTES), seed);
    }
}

/// Who is fenced has no way to the disk, and finds it at the same place again.
#[test]
fn a_fenced_file_is_gone_until_it_is_let_back() {
    const NAME: &str = "a_fenced_file_is_gone_until_it_is_let_back";
    if let Err(error) = tidemark_fuse::probe() {
        return skipped(NAME, &error.to_string());
    }
    let mut subject = Fuse::default();
    let mut fixture = Fixture::new(DISK_BYTES);
    let (disk, _) = subject.attach(&mut fixture);
    subject.write(0, &[1; 4096]);
    let (provider, file) = subject.running.take().unwrap();
    let path = fixture.folder.path().join("run/disks/web-0");
    let (machine, disks) = (MachineId::random(), [named("web-0")]);
    provider.fence(machine, &disks, true).unwrap();
    assert_eq!(file.write_at(&[2; 4096], 0).unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
    assert!(!path.exists());
    provider.fence(machine, &disks, false).unwrap();
    assert_eq!(file.read_at(&mut [0; 512], 0).unwrap_err().raw_os_error(), Some(libc::ENOTCONN), "opened before");
    let again = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    again.write_all_at(&[3; 4096], 4096).unwrap();
    // Fenced before it is attached: from its first instant on nobody gets in.
    provider.detach("web-0").unwrap();
    provider.fence(machine, &disks, true).unwrap();
    let address = provider.attach("web-0", &disk).unwrap();
    assert!(address.file.as_deref() == path.to_str() && !path.exists());
    assert_eq!(fixture.content()[..8192], [[1; 4096], [3; 4096]].concat());
    for name in ["../web-0", "", ".", "a/b"] {
        let refused = provider.attach(name, &disk).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::InvalidInput, "{name:?}");
    }
    provider.stop().unwrap();
    disk.detach().unwrap();
}

/// A disk of this export.
fn named(export: &str) -> DiskSpec {
    let (disk, generation) = (DiskId::random(), Generation(1));
    DiskSpec { disk, path: String::new(), export: export.to_owned(), generation, bytes: 0, added: false }
}

// ── a tracker whose bitmaps are in memory: what is made of a tracker's word, on any machine ──

#[derive(Default)]
struct Memory {
    live: Mutex<ExtentSet>,
    claimed: Mutex<ExtentSet>,
    session: Mutex<Option<[u8; 16]>>,
    pub in_flight: AtomicU64,
    missed: AtomicBool,
    /// Runs once, when it is claimed next: a write in the middle of a pass.
    at_claim: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    frozen: Arc<AtomicBool>,
    can_freeze: bool,
}

impl Memory {
    fn mark(&self, extent: Extent) {
        let offset = extent.offset / 65536 * 65536;
        let end = extent.end().next_multiple_of(65536).min(DISK_BYTES);
        self.live.lock().unwrap().insert(Extent::new(offset, end - offset));
    }
}

struct Still(Arc<AtomicBool>);

impl Frozen for Still {
    fn thaw(self: Box<Self>) -> Result<(), FreezeError> {
        Ok(())
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

impl Tracker for Memory {
    fn witnessed(&self) -> Option<[u8; 16]> {
        *self.session.lock().unwrap()
    }

    fn arm(&self, session: [u8; 16]) {
        *self.session.lock().unwrap() = Some(session);
    }

    fn is_dirty(&self) -> bool {
        !self.live.lock().unwrap().is_empty()
    }

    fn claim(&self) -> std::io::Result<()> {
        let mut live = self.live.lock().unwrap();
        live.iter().for_each(|extent| self.claimed.lock().unwrap().insert(extent));
        live.clear();
        drop(live);
        if let Some(then) = self.at_claim.lock().unwrap().take() {
            then();
        }
        Ok(())
    }

    fn claimed(&self) -> ExtentSet {
        self.claimed.lock().unwrap().clone()
    }

    fn release(&self, extents: &ExtentSet) -> std::io::Result<()> {
        extents.iter().for_each(|extent| self.claimed.lock().unwrap().remove(extent));
        Ok(())
    }

    fn in_flight(&self) -> std::io::Result<u64> {
        Ok(if self.frozen.load(Ordering::SeqCst) { 0 } else { self.in_flight.load(Ordering::SeqCst) })
    }

    fn broken(&self) -> Option<String> {
        self.missed.load(Ordering::SeqCst).then(|| "it slept".to_owned())
    }

    fn forgive(&self) {
        self.missed.store(false, Ordering::SeqCst);
    }

    fn freeze(&self, _limit: Duration) -> Result<Option<Box<dyn Frozen>>, FreezeError> {
        self.frozen.store(self.can_freeze, Ordering::SeqCst);
        Ok(self.can_freeze.then(|| Box::new(Still(self.frozen.clone())) as Box<dyn Frozen>))
    }
}

struct Tracked {
    tracker: Arc<Memory>,
    file: Option<File>,
}

impl Tracked {
    fn new() -> Self {
        Self { tracker: Arc::default(), file: None }
    }
}

impl Subject for Tracked {
    fn attach(&mut self, fixture: &mut Fixture) -> (Arc<ProtectedDisk>, Decision) {
        self.file = Some(OpenOptions::new().write(true).open(fixture.path()).unwrap());
        fixture.tracker = Some(self.tracker.clone());
        let attached = fixture.attach();
        (attached.disk, attached.decision)
    }

    fn let_go(&mut self) {}

    fn write(&mut self, offset: u64, data: &[u8]) {
        let extent = Extent::new(offset, data.len() as u64);
        self.tracker.mark(extent);
        self.file.as_ref().unwrap().write_all_at(data, offset).unwrap();
        self.tracker.mark(extent);
    }

    fn zero(&mut self, extent: Extent, _discard: bool) {
        self.write(extent.offset, &vec![0; extent.length as usize]);
    }
}

#[test]
fn a_tracked_disk_conforms() {
    for seed in SEEDS {
        conforms(&mut Tracked::new(), &mut Fixture::new(DISK_BYTES), seed);
    }
}

/// A tracked disk that is in sync, and a marker for it.
fn tracked(subject: &mut Tracked) -> (Fixture, Arc<ProtectedDisk>, Marker) {
    let mut fixture = Fixture::new(DISK_BYTES);
    let (disk, _) = subject.attach(&mut fixture);
    fixture.settle(&disk);
    let marker = Marker::new(MachineId::random(), "web".into(), vec![disk.clone()], None, Duration::from_secs(1));
    (fixture, disk, marker)
}

/// A write that comes after the claim is in no point before it was read.
#[test]
fn a_write_in_the_middle_of_a_pass_is_passed_over_again() {
    let mut subject = Tracked::new();
    let (fixture, disk, marker) = tracked(&mut subject);
    let start = disk.state().logged;
    subject.write(0, &[1; 4096]);
    let (tracker, file) = (subject.tracker.clone(), OpenOptions::new().write(true).open(fixture.path()).unwrap());
    *subject.tracker.at_claim.lock().unwrap() = Some(Box::new(move || {
        tracker.mark(Extent::new(4 * MIB, 4096));
        file.write_all_at(&[2; 4096], 4 * MIB).unwrap();
    }));
    marker.mark(Consistency::Crash, "", true).unwrap();
    let mut image = vec![0; DISK_BYTES as usize];
    super::replay(&disk, &records_after(&disk, &start), &mut image);
    assert!(image == fixture.content());
    assert!(subject.tracker.claimed().is_empty() && !disk.is_dirty() && disk.is_complete());
    subject.write(0, &[3; 512]);
    assert!(!disk.is_complete() && marker.is_written_since(false), "what nobody took yet");
}

#[test]
fn writes_in_flight_keep_a_mark_away_until_they_are_frozen() {
    for can_freeze in [false, true] {
        let mut subject = Tracked { tracker: Arc::new(Memory { can_freeze, ..Memory::default() }), file: None };
        let (_fixture, disk, marker) = tracked(&mut subject);
        subject.tracker.in_flight.store(1, Ordering::SeqCst);
        subject.write(0, &[1; 4096]);
        let logged = disk.state().logged;
        let result = marker.mark(Consistency::Crash, "", true);
        if can_freeze {
            assert!(result.is_ok() && !subject.tracker.frozen.load(Ordering::SeqCst), "thawed again");
            // Nobody asked for another one: writers are left alone for a while.
            subject.write(0, &[2; 4096]);
            let error = marker.mark(Consistency::Crash, "", false).unwrap_err();
            assert!(matches!(error, HostError::Unsettled { .. }), "{error}");
        } else {
            let error = result.unwrap_err();
            assert!(matches!(error, HostError::Unsettled { frozen: false, .. }) && !error.help().is_empty(), "{error}");
            assert_eq!(disk.state().logged, logged, "nothing was read that may still change");
            subject.tracker.in_flight.store(0, Ordering::SeqCst);
            marker.mark(Consistency::Crash, "", true).unwrap();
        }
    }
}

#[test]
fn a_tracker_that_missed_something_is_a_compare_of_the_whole_disk() {
    let mut subject = Tracked::new();
    let (fixture, disk, marker) = tracked(&mut subject);
    marker.mark(Consistency::Crash, "", true).unwrap();
    assert!(fixture.pending(&disk).is_empty());
    subject.tracker.missed.store(true, Ordering::SeqCst);
    let error = marker.mark(Consistency::Crash, "", true).unwrap_err();
    assert!(matches!(error, HostError::Scanning { .. }), "{error}");
    assert_eq!(fixture.pending(&disk).total_bytes(), DISK_BYTES);
    assert!(disk.consumer(fixture.server).unwrap().progress().unwrap().2.compares());
    let told = fixture.events.after(0).last().unwrap().message.clone();
    assert!(told.contains("it slept"), "{told}");
    fixture.settle(&disk);
    marker.mark(Consistency::Crash, "", true).unwrap();
}

/// Much that changed is compared part by part, not logged whole.
#[test]
fn much_that_changed_is_scanned_and_released_once_that_is_durable() {
    let mut subject = Tracked::new();
    let (fixture, disk, marker) = tracked(&mut subject);
    let logged = disk.state().logged;
    for granule in 0..40 {
        subject.write(granule * 65536, &[1; 4096]);
    }
    let error = marker.mark(Consistency::Crash, "", true).unwrap_err();
    assert!(matches!(error, HostError::Scanning { total, .. } if total == 40 * 65536), "{error}");
    assert_eq!(disk.state().logged, logged);
    assert!(
        subject.tracker.claimed().is_empty() && disk.consumer(fixture.server).unwrap().progress().unwrap().2.compares()
    );
    drop((marker, disk));
    let again = fixture.attach().disk;
    assert_eq!(fixture.pending(&again).total_bytes(), 40 * 65536, "durable");
}

#[test]
fn a_gap_that_the_tracker_did_not_witness_is_a_compare() {
    for kind in ["witnessed", "another session", "new"] {
        let mut subject = Tracked::new();
        let (mut fixture, disk, _) = tracked(&mut subject);
        disk.detach().unwrap();
        drop(disk);
        subject.write(MIB, &[7; 4096]);
        match kind {
            "another session" => *subject.tracker.session.lock().unwrap() = Some([1; 16]),
            "new" => *subject.tracker.session.lock().unwrap() = None,
            _ => {}
        }
        let (disk, decision) = subject.attach(&mut fixture);
        assert_eq!(matches!(decision, Decision::ScanWhole(_)), kind != "witnessed", "{kind}: {decision:?}");
        assert!(disk.is_dirty(), "{kind}");
    }
}

// ── the eBPF tracker, on a loop device ──

struct Bpf {
    device: PathBuf,
    disk: tidemark_base::DiskId,
    file: Option<File>,
}

impl Bpf {
    /// `None`, and says so, where it cannot be tried.
    fn new(test: &str, fixture: &mut Fixture) -> Option<Self> {
        let image = fixture.folder.path().join("disk.img");
        let output = std::process::Command::new("losetup").args(["--find", "--show"]).arg(&image).output().ok()?;
        if !output.status.success() {
            skipped(test, "no loop device can be had");
            return None;
        }
        let device: PathBuf = String::from_utf8(output.stdout).unwrap().trim().into();
        let this = Self { device: device.clone(), disk: fixture.disk, file: None };
        fixture.image = Some(device);
        match BpfTracker::new(fixture.folder.path()).probe(&this.device, fixture.folder.path()) {
            Ok(bytes) => {
                assert_eq!(bytes, DISK_BYTES);
                Some(this)
            }
            Err(error @ HostError::Provider(ProviderError::Tracker(_))) => {
                skipped(test, &error.to_string());
                None
            }
            Err(error) => panic!("{error}"),
        }
    }
}

impl Drop for Bpf {
    fn drop(&mut self) {
        let _ = BpfTracker::new(Path::new("/nowhere")).untrack(self.disk);
        let _ = std::process::Command::new("losetup").arg("--detach").arg(&self.device).status();
    }
}

impl Subject for Bpf {
    fn attach(&mut self, fixture: &mut Fixture) -> (Arc<ProtectedDisk>, Decision) {
        let open = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&self.device);
        self.file = Some(open.unwrap());
        fixture.tracker =
            BpfTracker::new(fixture.folder.path()).track(&self.device, self.disk, fixture.folder.path()).unwrap();
        let attached = fixture.attach();
        (attached.disk, attached.decision)
    }

    fn let_go(&mut self) {}

    fn write(&mut self, offset: u64, data: &[u8]) {
        #[repr(align(4096))]
        struct Aligned([u8; 128 << 10]);
        let mut aligned = Box::new(Aligned([0; 128 << 10]));
        let buffer = &mut aligned.0[..data.len()];
        buffer.copy_from_slice(data);
        self.file.as_ref().unwrap().write_all_at(buffer, offset).unwrap();
    }

    fn zero(&mut self, extent: Extent, discard: bool) {
        let range = [extent.offset, extent.length];
        let request = if discard { 0x1277 } else { 0x127f };
        // SAFETY: BLKDISCARD and BLKZEROOUT read two u64.
        let result = unsafe {
            libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(self.file.as_ref().unwrap()), request, range.as_ptr())
        };
        assert_eq!(result, 0);
    }

    /// What lies in the file behind the device: another way than the one that is tested.
    fn content(&self, fixture: &Fixture) -> Vec<u8> {
        std::fs::read(fixture.folder.path().join("disk.img")).unwrap()
    }
}

#[test]
fn the_ebpf_tracker_conforms() {
    for seed in SEEDS {
        let mut fixture = Fixture::new(DISK_BYTES);
        let Some(mut subject) = Bpf::new("the_ebpf_tracker_conforms", &mut fixture) else { return };
        conforms(&mut subject, &mut fixture, seed);
    }
}

/// Passes everything on, and counts how often writers were made to keep still.
struct Counting {
    tracker: Arc<dyn Tracker>,
    frozen: AtomicU64,
}

impl Tracker for Counting {
    fn witnessed(&self) -> Option<[u8; 16]> {
        self.tracker.witnessed()
    }
    fn arm(&self, session: [u8; 16]) {
        self.tracker.arm(session);
    }
    fn is_dirty(&self) -> bool {
        self.tracker.is_dirty()
    }
    fn claim(&self) -> std::io::Result<()> {
        self.tracker.claim()
    }
    fn claimed(&self) -> ExtentSet {
        self.tracker.claimed()
    }
    fn release(&self, extents: &ExtentSet) -> std::io::Result<()> {
        self.tracker.release(extents)
    }
    fn in_flight(&self) -> std::io::Result<u64> {
        self.tracker.in_flight()
    }
    fn broken(&self) -> Option<String> {
        self.tracker.broken()
    }
    fn forgive(&self) {
        self.tracker.forgive();
    }
    fn freeze(&self, limit: Duration) -> Result<Option<Box<dyn Frozen>>, FreezeError> {
        self.frozen.fetch_add(1, Ordering::SeqCst);
        self.tracker.freeze(limit)
    }
}

/// Writers that never pause, stopped and unmounted at the end.
struct Mounted<'a> {
    place: PathBuf,
    is_over: &'a AtomicBool,
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.place).status();
    }
}

#[test]
fn a_file_system_that_is_written_all_the_time_is_frozen_for_a_mark() {
    const NAME: &str = "a_file_system_that_is_written_all_the_time_is_frozen_for_a_mark";
    let mut fixture = Fixture::new(DISK_BYTES);
    let Some(mut subject) = Bpf::new(NAME, &mut fixture) else { return };
    let run = |program: &str, arguments: &[&std::ffi::OsStr]| {
        std::process::Command::new(program).args(arguments).output().is_ok_and(|output| output.status.success())
    };
    let place = fixture.folder.path().join("mounted");
    std::fs::create_dir(&place).unwrap();
    let device = subject.device.clone();
    if !run("mke2fs", &["-q".as_ref(), "-F".as_ref(), device.as_ref()])
        || !run("mount", &[device.as_ref(), place.as_ref()])
    {
        return skipped(NAME, "no file system can be made and mounted");
    }
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mounted = Mounted { place, is_over: &is_over };
        let refused = BpfTracker::new(&mounted.place).probe(&device, &mounted.place).unwrap_err();
        assert!(matches!(refused, HostError::StateOnDisk { .. }) && !refused.help().is_empty(), "{refused}");
        // A folder in memory is taken instead, and no other one.
        let takes = |state: &std::path::Path, memory: &std::path::Path| {
            BpfTracker::new(state).wants_state_in_memory(&device, state, memory)
        };
        assert!(
            takes(&mounted.place, std::path::Path::new("/dev/shm/tidemark")) && !takes(&mounted.place, &mounted.place)
        );
        assert!(!takes(fixture.folder.path(), std::path::Path::new("/dev/shm/tidemark")), "it lies elsewhere");
        let (disk, _) = subject.attach(&mut fixture);
        drop(disk);
        let counting = Arc::new(Counting { tracker: fixture.tracker.take().unwrap(), frozen: AtomicU64::new(0) });
        fixture.tracker = Some(counting.clone());
        let disk = fixture.attach().disk;
        for writer in 0..6u8 {
            let path = mounted.place.join(format!("file-{writer}"));
            let is_over = &is_over;
            scope.spawn(move || {
                let file = File::create(path).unwrap();
                let mut round = 0u64;
                while !is_over.load(Ordering::SeqCst) {
                    file.write_all_at(&[round as u8; 8192], round % 40 * 8192).unwrap();
                    file.sync_data().unwrap();
                    round += 1;
                }
            });
        }
        let mut replica = Replica {
            image: vec![0; DISK_BYTES as usize],
            at: disk.state().logged.epoch.start(),
            is_consistent: false,
            copies: BTreeMap::new(),
            checked: 0,
        };
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        // Some marks find an instant between two writes; sooner or later one does not, and freezes.
        while replica.checked < 3 || counting.frozen.load(Ordering::SeqCst) == 0 {
            assert!(std::time::Instant::now() < deadline, "{} points, {:?} freezes", replica.checked, counting.frozen);
            replica.catch_up(&fixture, &disk);
            let marker =
                Marker::new(MachineId::random(), "web".into(), vec![disk.clone()], None, Duration::from_secs(1));
            let mut kept = None;
            let mut held = |outcome: &crate::MarkOutcome| {
                let content = subject.content(&fixture);
                // Nothing was written while it was copied: it is the disk at the mark.
                kept = disk.is_settled().then_some(outcome.id);
                replica.copies.insert(outcome.id, content);
            };
            let marked = marker.mark_observed(Consistency::Crash, "", true, &mut held);
            match (marked, kept) {
                (Ok(_), Some(_)) => replica.catch_up(&fixture, &disk),
                // An instant between two writes, which was over before it could be copied.
                (Ok(outcome), None) => {
                    replica.copies.remove(&outcome.id);
                    replica.at = disk.state().logged;
                    replica.is_consistent = false;
                    disk.resync().unwrap();
                }
                (Err(HostError::Scanning { .. } | HostError::Unsettled { .. }), _) => {}
                (Err(error), _) => panic!("{error}"),
            }
        }
        let image = fixture.folder.path().join("replica.img");
        std::io::Write::write_all(&mut File::create(&image).unwrap(), &replica.image).unwrap();
        let checked = std::process::Command::new("e2fsck").arg("-fn").arg(&image).output().unwrap();
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
        drop(mounted);
        disk.detach().unwrap();
    });
}

/// Whoever froze dies, or forgets: the file system thaws.
#[test]
fn a_frozen_file_system_thaws_by_itself() {
    const NAME: &str = "a_frozen_file_system_thaws_by_itself";
    let mut fixture = Fixture::new(DISK_BYTES);
    let Some(subject) = Bpf::new(NAME, &mut fixture) else { return };
    let place = fixture.folder.path().join("mounted");
    std::fs::create_dir(&place).unwrap();
    let run = |program: &str, arguments: &[&std::ffi::OsStr]| {
        std::process::Command::new(program).args(arguments).output().is_ok_and(|output| output.status.success())
    };
    if !run("mke2fs", &["-q".as_ref(), "-F".as_ref(), subject.device.as_ref()])
        || !run("mount", &[subject.device.as_ref(), place.as_ref()])
    {
        return skipped(NAME, "no file system can be made and mounted");
    }
    let is_over = AtomicBool::new(false);
    let mounted = Mounted { place, is_over: &is_over };
    let freeze = |limit| {
        crate::capture::freezer::FileSystemFreezer::freeze(std::slice::from_ref(&mounted.place), limit).unwrap()
    };
    let write = || File::create(mounted.place.join("file")).unwrap().sync_all().unwrap();
    // Its time is over before anybody says anything: the write gets through, and the thaw says that it was late.
    let frozen = freeze(Duration::from_millis(200));
    write();
    assert!(frozen.thaw().is_err());
    let frozen = freeze(Duration::from_secs(30));
    drop(frozen);
    write();
    freeze(Duration::from_secs(30)).thaw().unwrap();
    write();
    let nothing = crate::capture::freezer::FileSystemFreezer::freeze(&["/proc".into()], Duration::from_secs(1));
    assert!(nothing.is_err(), "what cannot be frozen says so");
}
