//! The RCT tracker, against a simulated Hyper-V host whose machine tracks its changes by rules of its own.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tidemark_base::{Extent, MachineId};
use tidemark_proto::replication::Consistency;

use super::conformance::{DISK_BYTES, Replica, SEEDS, Subject, conforms};
use super::{Fixture, Random};
use crate::attach::Decision;
use crate::capture::CaptureProvider;
use crate::capture::rct::RctTracker;
use crate::error::HostError;
use crate::events::EventKind;
use crate::mark::Marker;
use crate::protected::ProtectedDisk;
use crate::source::Source;
use crate::state::session::Boot;

#[allow(dead_code, reason = "the crate's own tests use the rest")]
#[path = "../../../rct/tests/support/simulator.rs"]
mod simulator;
use simulator::{Asked, Host, Seals};

const MIB: u64 = 1 << 20;
const DISK: &str = "D:/Machines/web.vhdx";

/// The disk of a machine, and what it holds.
struct Rct {
    host: Arc<Host>,
    model: Vec<u8>,
    tracker: Option<RctTracker>,
    restarts: u64,
}

impl Rct {
    fn new(fixture: &mut Fixture, seals: Seals) -> Self {
        let host = Host::new(&[(PathBuf::from(DISK), DISK_BYTES)], seals);
        fixture.image = Some(DISK.into());
        Self { host, model: vec![0; DISK_BYTES as usize], tracker: None, restarts: 0 }
    }

    fn tracker(&self, fixture: &Fixture) -> RctTracker {
        let asked = Arc::new(Asked(self.host.clone()));
        RctTracker::new(&fixture.folder.path().join("state"), asked, Duration::ZERO)
    }

    /// As if the agent was killed: whatever it holds is never let go of.
    fn kill(&mut self, fixture: &mut Fixture) {
        self.tracker.iter().for_each(RctTracker::halt);
        std::mem::forget((self.tracker.take(), fixture.tracker.take()));
    }

    fn told(&self, fixture: &Fixture, reason: &str) -> bool {
        let events = fixture.events.after(0);
        events.iter().any(|event| event.kind == EventKind::DiskUnwitnessed && event.message.contains(reason))
    }
}

impl Subject for Rct {
    fn attach(&mut self, fixture: &mut Fixture) -> (Arc<ProtectedDisk>, Decision) {
        let tracker = self.tracker(fixture);
        fixture.tracker = tracker.track(&fixture.path(), fixture.disk, fixture.folder.path()).unwrap();
        self.tracker = Some(tracker);
        let attached = fixture.attach();
        (attached.disk, attached.decision)
    }

    /// The machine goes on, and others make and remove checkpoints of it.
    fn let_go(&mut self) {
        if let Some(tracker) = self.tracker.take() {
            tracker.stop().unwrap();
        }
        self.restarts += 1;
        let backup = self.host.make_checkpoint("nightly backup", true);
        self.write(self.restarts * 7 * 4096 % DISK_BYTES, &[self.restarts as u8 + 1; 4096]);
        self.host.remove_checkpoint(&backup);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.host.write(0, offset, data);
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
fn the_rct_tracker_conforms() {
    for seals in [Seals::AtCheckpoint, Seals::AtConversion] {
        for seed in SEEDS {
            let mut fixture = Fixture::new(DISK_BYTES);
            let mut subject = Rct::new(&mut fixture, seals);
            conforms(&mut subject, &mut fixture, seed);
            assert!(!subject.told(&fixture, ""), "{seals:?}: nothing was compared that was tracked");
            assert!(subject.host.checkpoints().is_empty(), "nothing of ours stays");
            assert!(subject.host.points() <= 4, "{seals:?}: {}", subject.host.points());
            subject.tracker(&fixture).untrack(fixture.disk).unwrap();
            assert_eq!(subject.host.points(), 0, "{seals:?}");
        }
    }
}

fn marker_of(disk: &Arc<ProtectedDisk>) -> Marker {
    Marker::new(MachineId::random(), "web".into(), vec![disk.clone()], None, Duration::from_secs(1))
}

/// Protected, and a replica that holds it.
fn in_sync(fixture: &mut Fixture, subject: &mut Rct) -> (Arc<ProtectedDisk>, Replica) {
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
fn point(fixture: &Fixture, subject: &Rct, disk: &Arc<ProtectedDisk>, replica: &mut Replica) {
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
fn a_gap_in_resilient_change_tracking_is_a_compare() {
    for seals in [Seals::AtCheckpoint, Seals::AtConversion] {
        let mut fixture = Fixture::new(DISK_BYTES);
        let mut subject = Rct::new(&mut fixture, seals);
        subject.write(MIB, &[1; 8192]);
        let (disk, mut replica) = in_sync(&mut fixture, &mut subject);
        let gaps: [(&str, &dyn Fn(&Host)); 3] = [
            ("error 1168", &|host| host.reset_tracking(0)),
            ("error 87", &|host| host.state().faults.query = Some("error 87".into())),
            ("another disk", &|host| host.state().disks[0].uuid = "another".into()),
        ];
        for (number, (reason, make)) in gaps.into_iter().enumerate() {
            assert!(!subject.told(&fixture, reason));
            // Written before Hyper-V forgot it.
            subject.write(number as u64 * 2 * MIB + 65536 * 3, &[number as u8 + 2; 4096]);
            make(&subject.host);
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
}

/// A kill between checkpoint and conversion, before anything of the instant was logged and after all of it.
#[test]
fn a_kill_in_an_instant_leaves_no_checkpoint_and_misses_nothing() {
    for seals in [Seals::AtCheckpoint, Seals::AtConversion] {
        let mut fixture = Fixture::new(DISK_BYTES);
        let mut subject = Rct::new(&mut fixture, seals);
        let (mut disk, mut replica) = in_sync(&mut fixture, &mut subject);
        for round in 0..4u8 {
            subject.write(u64::from(round) * MIB, &[round + 1; 12288]);
            let instants = disk.tracker().unwrap().instants().unwrap();
            let changes = instants.take(&[fixture.disk], DISK_BYTES).unwrap().unwrap();
            if round % 2 == 1 {
                disk.log_changes(&*changes).unwrap();
            }
            assert_eq!(subject.host.checkpoints().len(), 1);
            std::mem::forget(changes);
            drop(instants);
            subject.kill(&mut fixture);
            drop(disk);
            // Meanwhile the machine goes on; with every other kill the power of its host is cut as well.
            subject.write(4 * MIB + u64::from(round) * 4096, &[round + 100; 4096]);
            if round >= 2 {
                fixture.boot = Boot { id: format!("another boot {round}"), ..fixture.boot.clone() };
            }
            let (again, decision) = subject.attach(&mut fixture);
            assert!(!matches!(decision, Decision::ScanWhole(_)), "{decision:?}");
            assert!(subject.host.checkpoints().is_empty(), "what was left is converted");
            disk = again;
            point(&fixture, &subject, &disk, &mut replica);
        }
        assert!(!subject.told(&fixture, ""), "nothing was compared");
        subject.let_go();
        disk.detach().unwrap();
    }
}

/// More than is logged is scanned first, and the scan reads what is at least as new as everything that was logged.
#[test]
fn much_that_changed_is_scanned_and_no_older_block_follows_a_newer_one() {
    let mut fixture = Fixture::new(DISK_BYTES);
    let mut subject = Rct::new(&mut fixture, Seals::AtCheckpoint);
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

/// Where Hyper-V makes no checkpoint there is no point, the reason is told with what to do, and nothing is lost meanwhile.
#[test]
fn a_host_that_makes_no_checkpoint_makes_no_point() {
    let mut fixture = Fixture::new(DISK_BYTES);
    let mut subject = Rct::new(&mut fixture, Seals::AtCheckpoint);
    let (disk, mut replica) = in_sync(&mut fixture, &mut subject);
    let marker = marker_of(&disk);
    subject.write(0, &[1; 4096]);
    subject.host.state().faults.checkpoint = true;
    let error = marker.mark(Consistency::Crash, "", true).unwrap_err();
    assert!(matches!(error, HostError::Instant { .. }) && error.help().contains("VMMS"), "{error}: {}", error.help());
    let by_hand = subject.host.make_checkpoint("by hand", false);
    let error = marker.mark(Consistency::Crash, "", true).unwrap_err();
    assert!(error.help().contains("Remove-VMCheckpoint"), "{error}: {}", error.help());
    subject.host.remove_checkpoint(&by_hand);
    subject.host.state().faults.checkpoint = false;
    subject.host.state().faults.quiet = true;
    let error = marker.mark(Consistency::Application, "", true).unwrap_err();
    assert!(error.help().contains("VSS"), "{error}: {}", error.help());
    subject.host.state().faults.quiet = false;
    let marked = marker.mark(Consistency::Application, "", true).unwrap();
    assert!(marked.consistency == Consistency::Application && subject.host.state().quiet);
    drop(marker);
    replica.copies.insert(marked.id, subject.content(&fixture));
    replica.catch_up(&fixture, &disk);
    point(&fixture, &subject, &disk, &mut replica);
    assert!(!subject.told(&fixture, ""), "nothing was compared");
    subject.let_go();
    disk.detach().unwrap();
}
