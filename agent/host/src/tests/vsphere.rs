//! The vSphere tracker, against a simulated vCenter whose machine has real files for disks and tracks its changes by rules of its own.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tidemark_base::{Extent, MachineId};
use tidemark_proto::replication::Consistency;
use tidemark_tests::vcenter::{MACHINE, Vcenter};

use super::conformance::{DISK_BYTES, Replica, SEEDS, Subject, conforms};
use super::{Fixture, OverOnDrop, Random};
use crate::attach::Decision;
use crate::capture::CaptureProvider;
use crate::capture::tracker::Changes;
use crate::capture::vsphere::VsphereTracker;
use crate::error::HostError;
use crate::events::EventKind;
use crate::mark::Marker;
use crate::protected::ProtectedDisk;
use crate::source::Source;
use crate::state::session::Boot;

const MIB: u64 = 1 << 20;

/// The disk of a machine, and what it holds.
struct Vsphere {
    vcenter: Vcenter,
    model: Vec<u8>,
    tracker: Option<VsphereTracker>,
    restarts: u64,
}

fn address(disk: usize) -> PathBuf {
    format!("vsphere:lab/moref={MACHINE}/scsi0:{disk}").into()
}

impl Vsphere {
    fn new(fixture: &mut Fixture) -> Self {
        let image = fixture.folder.path().join("disk.img");
        let vcenter = Vcenter::start(fixture.folder.path(), &[image]);
        vcenter.connect(&fixture.folder.path().join("state"), "lab");
        fixture.image = Some(address(0));
        Self { vcenter, model: vec![0; DISK_BYTES as usize], tracker: None, restarts: 0 }
    }

    /// As if the agent was killed: whatever it holds is never let go of.
    fn kill(&mut self, fixture: &mut Fixture) {
        std::mem::forget((self.tracker.take(), fixture.tracker.take()));
    }

    fn told(&self, fixture: &Fixture, reason: &str) -> bool {
        let events = fixture.events.after(0);
        events.iter().any(|event| event.kind == EventKind::DiskUnwitnessed && event.message.contains(reason))
    }
}

impl Subject for Vsphere {
    fn attach(&mut self, fixture: &mut Fixture) -> (Arc<ProtectedDisk>, Decision) {
        let tracker = VsphereTracker::new(&fixture.folder.path().join("state"));
        fixture.tracker = tracker.track(&fixture.path(), fixture.disk, fixture.folder.path()).unwrap();
        self.tracker = Some(tracker);
        let attached = fixture.attach();
        (attached.disk, attached.decision)
    }

    /// The machine goes on, moves, and others make and remove snapshots of it.
    fn let_go(&mut self) {
        if let Some(tracker) = self.tracker.take() {
            tracker.stop().unwrap();
        }
        self.restarts += 1;
        self.vcenter.make_snapshot("nightly backup");
        self.write(self.restarts * 7 * 4096 % DISK_BYTES, &[self.restarts as u8 + 1; 4096]);
        self.vcenter.remove_snapshot("nightly backup");
        self.vcenter.state().machines.get_mut(MACHINE).unwrap().host = format!("host-{}", self.restarts);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.vcenter.write(0, offset, data);
        self.model[offset as usize..][..data.len()].copy_from_slice(data);
    }

    fn zero(&mut self, extent: Extent, _discard: bool) {
        self.write(extent.offset, &vec![0; extent.length as usize]);
    }

    fn content(&self, _fixture: &Fixture) -> Vec<u8> {
        self.model.clone()
    }
}

#[test]
fn the_vsphere_tracker_conforms() {
    for seed in SEEDS {
        let mut fixture = Fixture::new(DISK_BYTES);
        let mut subject = Vsphere::new(&mut fixture);
        subject.vcenter.with_disk(0, |disk, _| disk.overlap = seed == 2);
        conforms(&mut subject, &mut fixture, seed);
        assert!(subject.vcenter.snapshot_names().is_empty(), "nothing of ours stays");
        assert_eq!(subject.vcenter.content(0), subject.model, "nothing was written to it");
    }
}

fn marker_of(disk: &Arc<ProtectedDisk>) -> Marker {
    Marker::new(MachineId::random(), "web".into(), vec![disk.clone()], None, Duration::from_secs(1))
}

/// Protected, and a replica that holds it.
fn in_sync(fixture: &mut Fixture, subject: &mut Vsphere) -> (Arc<ProtectedDisk>, Replica) {
    let (disk, decision) = subject.attach(fixture);
    assert!(matches!(decision, Decision::ScanWhole(_)), "{decision:?}");
    let mut replica = Replica {
        image: vec![0; DISK_BYTES as usize],
        at: disk.state().logged.epoch.start(),
        is_consistent: false,
        copies: Default::default(),
        checked: 0,
    };
    replica.catch_up(fixture, &disk);
    point(fixture, subject, &disk, &mut replica);
    (disk, replica)
}

/// A mark, as often as it takes, that the replica holds and that is the disk.
fn point(fixture: &Fixture, subject: &Vsphere, disk: &Arc<ProtectedDisk>, replica: &mut Replica) {
    let checked = replica.checked;
    let marker = marker_of(disk);
    for attempt in 0.. {
        assert!(attempt < 50, "no point was made");
        let mut held = |outcome: &crate::MarkOutcome| {
            replica.copies.insert(outcome.id, subject.content(fixture));
        };
        match marker.mark_observed(Consistency::Crash, "", true, &mut held) {
            Ok(_) | Err(HostError::Scanning { .. } | HostError::Busy { .. }) => replica.catch_up(fixture, disk),
            Err(error) => panic!("{error}"),
        }
        // One that was made while something is scanned is none.
        if replica.checked > checked && replica.is_consistent {
            break;
        }
    }
    assert!(replica.image == subject.model, "the point is not the disk");
}

/// What nobody tracked is found by the compare that follows, and by nothing less.
#[test]
fn a_gap_in_change_tracking_is_a_compare() {
    let mut fixture = Fixture::new(DISK_BYTES);
    let mut subject = Vsphere::new(&mut fixture);
    subject.write(MIB, &[1; 8192]);
    let (disk, mut replica) = in_sync(&mut fixture, &mut subject);
    let gaps: [(&str, &dyn Fn(&Vcenter)); 3] = [
        ("began to track its changes anew", &|vcenter| vcenter.reset_tracking(0)),
        ("cannot tell what changed", &|vcenter| vcenter.state().faults.query.push("FileFault")),
        ("reverted", &|vcenter| vcenter.with_disk(0, |disk, _| disk.turn_tracking_back())),
    ];
    for (number, (reason, make)) in gaps.into_iter().enumerate() {
        assert!(!subject.told(&fixture, reason));
        // Written before VMware forgot it.
        subject.write(number as u64 * 2 * MIB + 65536 * 3, &[number as u8 + 2; 4096]);
        make(&subject.vcenter);
        subject.write(number as u64 * 65536, &[number as u8 + 9; 512]);
        let marked = marker_of(&disk).mark(Consistency::Crash, "", true);
        assert!(matches!(marked, Err(HostError::Scanning { .. })), "{reason}: {marked:?}");
        let scanned = fixture.pending(&disk);
        assert_eq!(scanned.total_bytes(), DISK_BYTES, "{reason}: the whole disk is compared");
        assert!(subject.told(&fixture, reason), "{reason}");
        point(&fixture, &subject, &disk, &mut replica);
    }
    // From then on changes are told again.
    subject.write(5 * MIB, &[77; 4096]);
    let mut held = |outcome: &crate::MarkOutcome| {
        replica.copies.insert(outcome.id, subject.content(&fixture));
    };
    marker_of(&disk).mark_observed(Consistency::Crash, "", true, &mut held).unwrap();
    assert!(fixture.pending(&disk).is_empty(), "nothing is compared");
    point(&fixture, &subject, &disk, &mut replica);
    subject.let_go();
    disk.detach().unwrap();
}

/// A kill between snapshot and removal, before anything of the instant was logged and after some of it.
#[test]
fn a_kill_in_an_instant_leaves_no_snapshot_and_misses_nothing() {
    let mut fixture = Fixture::new(DISK_BYTES);
    let mut subject = Vsphere::new(&mut fixture);
    let (mut disk, mut replica) = in_sync(&mut fixture, &mut subject);
    for round in 0..4u8 {
        subject.write(u64::from(round) * MIB, &[round + 1; 12288]);
        let instants = disk.tracker().unwrap().instants().unwrap();
        let changes = instants.take(&[fixture.disk], DISK_BYTES).unwrap().unwrap();
        if round % 2 == 1 {
            disk.log_changes(&*changes).unwrap();
        }
        assert_eq!(subject.vcenter.snapshot_names().len(), 1);
        std::mem::forget(changes);
        drop(instants);
        subject.kill(&mut fixture);
        drop(disk);
        // Meanwhile the machine goes on; with every other kill the power of the agent's host is cut as well.
        subject.write(4 * MIB + u64::from(round) * 4096, &[round + 100; 4096]);
        if round >= 2 {
            fixture.boot = Boot { id: format!("another boot {round}"), ..fixture.boot.clone() };
        }
        let (again, decision) = subject.attach(&mut fixture);
        assert!(!matches!(decision, Decision::ScanWhole(_)), "{decision:?}");
        assert!(subject.vcenter.snapshot_names().is_empty(), "what was left is removed");
        disk = again;
        point(&fixture, &subject, &disk, &mut replica);
    }
    subject.let_go();
    disk.detach().unwrap();
}

/// A counter that is written to one disk and then to the other: no instant has the second ahead of the first.
#[test]
fn two_disks_are_taken_at_one_instant() {
    let first = Fixture::new(DISK_BYTES);
    let images: Vec<PathBuf> = (0..2).map(|disk| first.folder.path().join(format!("machine-{disk}.img"))).collect();
    for image in &images {
        std::fs::File::create(image).unwrap().set_len(DISK_BYTES).unwrap();
    }
    let vcenter = Vcenter::start(first.folder.path(), &images);
    let state = first.folder.path().join("state");
    vcenter.connect(&state, "lab");
    let provider = VsphereTracker::new(&state);
    let mut fixtures = [first, Fixture::new(DISK_BYTES)];
    let mut disks = Vec::new();
    for (number, fixture) in fixtures.iter_mut().enumerate() {
        fixture.image = Some(address(number));
        fixture.tracker = provider.track(&fixture.path(), fixture.disk, &state).unwrap();
        disks.push(fixture.attach().disk);
        fixture.settle(&disks[number]);
    }
    let ids = [fixtures[0].disk, fixtures[1].disk];
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _over = OverOnDrop(&is_over);
        scope.spawn(|| {
            for counter in 1u64.. {
                if is_over.load(Ordering::SeqCst) {
                    break;
                }
                vcenter.write(0, 4096, &counter.to_le_bytes());
                vcenter.write(1, 8192, &counter.to_le_bytes());
            }
        });
        let instants = disks[0].tracker().unwrap().instants().unwrap();
        let read = |changes: &dyn Changes, disk: usize, offset: u64| {
            let mut bytes = [0; 8];
            changes.read_at(ids[disk], offset, &mut bytes).unwrap();
            u64::from_le_bytes(bytes)
        };
        let mut last = 0;
        for _ in 0..20 {
            let changes = instants.take(&ids, DISK_BYTES).unwrap().unwrap();
            let (one, two) = (read(&*changes, 0, 4096), read(&*changes, 1, 8192));
            assert!(one == two || one == two + 1, "{one} and {two}");
            assert!(one >= last);
            last = one;
        }
    });
    provider.stop().unwrap();
    disks.iter().for_each(|disk| disk.detach().unwrap());
}

/// More than is logged is scanned first, and the scan reads what is at least as new as everything that was logged.
#[test]
fn much_that_changed_is_scanned_and_no_older_block_follows_a_newer_one() {
    let mut fixture = Fixture::new(DISK_BYTES);
    let mut subject = Vsphere::new(&mut fixture);
    let (disk, mut replica) = in_sync(&mut fixture, &mut subject);
    let mut random = Random(11);
    for round in 0..6u8 {
        // All of the disk; then, while it is scanned, some of it again.
        subject.write(0, &vec![round + 1; DISK_BYTES as usize]);
        let scans = disk.gather(MIB).unwrap();
        assert_eq!(scans, crate::protected::tracked::Gathered::Scanning);
        for _ in 0..20 {
            subject.write(random.below(DISK_BYTES / 4096) * 4096, &[round + 100; 4096]);
        }
        point(&fixture, &subject, &disk, &mut replica);
    }
    subject.let_go();
    disk.detach().unwrap();
}

/// VMware Tools make it quiet; where they cannot, there is no app-consistent point, the reason is told, and others go on.
#[test]
fn app_consistent_points_are_quiesced_or_refused_by_name() {
    let mut fixture = Fixture::new(DISK_BYTES);
    let mut subject = Vsphere::new(&mut fixture);
    let (disk, _) = in_sync(&mut fixture, &mut subject);
    let marker = marker_of(&disk);
    let quiesced =
        |subject: &Vsphere| subject.vcenter.state().machines[MACHINE].snapshots.iter().any(|made| made.quiesced);
    subject.write(0, &[1; 4096]);
    let marked = marker.mark(Consistency::Application, "", true).unwrap();
    assert_eq!(marked.consistency, Consistency::Application);
    assert!(quiesced(&subject));
    marker.mark_app_unasked().unwrap();
    subject.vcenter.state().faults.quiesce = true;
    subject.write(4096, &[2; 4096]);
    let error = marker.mark(Consistency::Application, "", true).unwrap_err();
    assert!(error.help().contains("VMware Tools"), "{error}: {}", error.help());
    let marked = marker.mark(Consistency::Crash, "", true).unwrap();
    assert_eq!(marked.consistency, Consistency::Crash);
    assert!(!quiesced(&subject));
    subject.let_go();
    disk.detach().unwrap();
}

/// A vCenter that is away is no gap.
#[test]
fn a_vcenter_that_is_away_is_waited_for() {
    let mut fixture = Fixture::new(DISK_BYTES);
    let mut subject = Vsphere::new(&mut fixture);
    let (disk, mut replica) = in_sync(&mut fixture, &mut subject);
    let settings = fixture.folder.path().join("state/vsphere.d/lab.password");
    subject.write(MIB, &[3; 4096]);
    // Nobody gets in for a while: sessions end, and the password is another one.
    {
        let mut state = subject.vcenter.state();
        state.sessions.clear();
        state.password = "changed".into();
    }
    let error = marker_of(&disk).mark(Consistency::Crash, "", true).unwrap_err();
    assert!(matches!(error, HostError::Instant { .. }) && !error.help().is_empty(), "{error}");
    assert!(!disk.is_unwitnessed() && disk.is_dirty());
    let file = std::fs::OpenOptions::new().write(true).truncate(true).open(settings).unwrap();
    file.write_all_at(b"changed", 0).unwrap();
    point(&fixture, &subject, &disk, &mut replica);
    assert!(!subject.told(&fixture, ""), "nothing was compared");
    subject.let_go();
    disk.detach().unwrap();
}
