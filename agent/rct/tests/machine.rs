//! A machine of a simulated Hyper-V host (`support/simulator.rs`), and everything that goes wrong between it and us.

#[path = "support/simulator.rs"]
mod simulator;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use simulator::{Asked, GRANULE, Host, MACHINE, Seals, State};
use tempfile::TempDir;
use tidemark_base::disk::{Allocation, RemoteDisk};
use tidemark_base::storage::{RealStorage, Storage};
use tidemark_base::{DiskId, Extent, ExtentSet};
use tidemark_rct::kept::{Kept, Ours};
use tidemark_rct::{Live, Machine, RctError};

const MIB: u64 = 1 << 20;
const BYTES: u64 = 4 * MIB;
const SESSION: [u8; 16] = [7; 16];
const DISK: &str = "D:/Machines/web.vhdx";
const BOTH: [Seals; 2] = [Seals::AtCheckpoint, Seals::AtConversion];

struct Lab {
    folder: TempDir,
    host: Arc<Host>,
    disk: DiskId,
}

impl Lab {
    fn new(seals: Seals) -> Self {
        let host = Host::new(&[(PathBuf::from(DISK), BYTES)], seals);
        Self { folder: tempfile::tempdir().unwrap(), host, disk: DiskId::random() }
    }

    fn storage(&self) -> Arc<dyn Storage> {
        RealStorage::create(self.folder.path().join("rct")).unwrap()
    }

    fn agent(&self) -> Arc<Machine> {
        let asked = Arc::new(Asked(self.host.clone()));
        Machine::new(asked, MACHINE, self.storage(), Duration::ZERO).unwrap()
    }

    /// As if killed: nothing of it is let go of.
    fn kill<T>(&self, agent: Arc<Machine>, more: T) {
        agent.stop();
        std::mem::forget((agent, more));
    }

    fn track(&self, agent: &Machine) -> Result<Option<[u8; 16]>, RctError> {
        agent.track(self.disk, Path::new(DISK))
    }

    /// Tracked from its first instant on, by a session.
    fn armed(&self) -> Arc<Machine> {
        let agent = self.agent();
        assert_eq!(self.track(&agent).unwrap(), None);
        agent.arm(self.disk, SESSION).unwrap();
        agent
    }

    /// What an instant tells; with `release` it is told elsewhere then.
    fn instant(&self, agent: &Arc<Machine>, release: bool) -> Result<ExtentSet, RctError> {
        let taken = agent.take(&[self.disk], BYTES, false)?.unwrap();
        let changed = taken.changed(self.disk);
        for area in changed.iter() {
            let mut content = vec![0; area.length as usize];
            taken.read(self.disk, area.offset, &mut content)?;
            assert!(content == self.host.content(0)[area.offset as usize..area.end() as usize], "nobody writes here");
        }
        taken.still_holds()?;
        if release {
            agent.release(self.disk, &changed)?;
        }
        Ok(changed)
    }

    fn kept(&self) -> Kept {
        Kept::read(&*self.storage(), self.disk).unwrap().unwrap()
    }
}

fn granules(set: &ExtentSet) -> Vec<u64> {
    set.iter().flat_map(|area| area.offset / GRANULE..area.end() / GRANULE).collect()
}

#[test]
fn what_changed_is_told_until_it_is_told_elsewhere() {
    for seals in BOTH {
        let lab = Lab::new(seals);
        let agent = lab.armed();
        // A first instant: of what the beginning may tell again.
        lab.instant(&agent, true).unwrap();
        lab.instant(&agent, true).unwrap();
        let written: Vec<u64> = (0..20).map(|number| number * 7).collect();
        written.iter().for_each(|granule| lab.host.write(0, granule * GRANULE + 512, &[3; 512]));
        let (before, kept) = (lab.host.state().answers, lab.kept());
        assert_eq!(granules(&lab.instant(&agent, false).unwrap()), written, "{seals:?}");
        assert!(lab.host.state().answers - before > 5, "in parts");
        assert_eq!(lab.kept(), kept, "nothing is kept that was not told");
        // What came to nothing is told again, with what came since.
        lab.host.write(0, BYTES - 512, &[4; 512]);
        let all: Vec<u64> = written.iter().copied().chain([BYTES / GRANULE - 1]).collect();
        let changed = lab.instant(&agent, false).unwrap();
        assert_eq!(granules(&changed), all, "{seals:?}");
        let part: ExtentSet = changed.iter().skip(1).collect();
        agent.release(lab.disk, &part).unwrap();
        assert_eq!(lab.kept(), kept, "of a part of it nothing follows");
        lab.instant(&agent, true).unwrap();
        assert_ne!(lab.kept().change_id, kept.change_id);
        assert_eq!(lab.kept().session(), Some(SESSION));
        // Where a state gets its id late, the newest are told twice.
        lab.instant(&agent, true).unwrap();
        assert!(lab.instant(&agent, true).unwrap().is_empty(), "{seals:?}");
    }
}

#[test]
fn a_disk_is_let_go_of_whatever_became_of_its_machine() {
    for is_absent in [true, false] {
        let lab = Lab::new(Seals::AtCheckpoint);
        let agent = lab.armed();
        lab.instant(&agent, true).unwrap();
        // Moved to another host; or its own refuses.
        lab.host.state().is_absent = is_absent;
        lab.host.state().faults.convert = !is_absent;
        agent.untrack(lab.disk).unwrap();
        assert_eq!(lab.storage().list("").unwrap().is_empty(), is_absent, "what is left at the host is noted");
        lab.host.state().faults.convert = false;
        if !is_absent {
            let agent = lab.agent();
            assert_eq!(lab.track(&agent).unwrap(), None);
            agent.untrack(lab.disk).unwrap();
            assert!(lab.host.points() == 0 && lab.storage().list("").unwrap().is_empty());
        }
    }
}

/// Meanwhile another disk of the machine had instants, and reference points went.
#[test]
fn a_change_id_that_is_kept_later_is_not_lost_meanwhile() {
    for seals in BOTH {
        let mut lab = Lab::new(seals);
        let other = (DiskId::random(), "D:/Machines/data.vhdx");
        lab.host = Host::new(&[(DISK.into(), BYTES), (other.1.into(), BYTES)], seals);
        let agent = lab.armed();
        agent.track(other.0, Path::new(other.1)).unwrap();
        for _ in 0..3 {
            let taken = agent.take(&[lab.disk, other.0], BYTES, false).unwrap().unwrap();
            agent.release(lab.disk, &taken.changed(lab.disk)).unwrap();
            agent.release(other.0, &taken.changed(other.0)).unwrap();
        }
        lab.host.write(0, 3 * GRANULE, &[1; 512]);
        let changed = agent.take(&[lab.disk], BYTES, false).unwrap().unwrap().changed(lab.disk);
        let made = lab.host.state().count;
        agent.claim(other.0).unwrap();
        assert_eq!(lab.host.state().count, made, "{seals:?}: the one that is there will do");
        for _ in 0..3 {
            let taken = agent.take(&[other.0], BYTES, false).unwrap().unwrap();
            agent.release(other.0, &taken.changed(other.0)).unwrap();
        }
        agent.release(lab.disk, &changed).unwrap();
        lab.host.write(0, 5 * GRANULE, &[1; 512]);
        assert!(granules(&lab.instant(&agent, true).unwrap()).contains(&5), "{seals:?}");
        assert_eq!((agent.broken(lab.disk), agent.broken(other.0)), (None, None), "{seals:?}");
    }
}

/// Nothing heaps up at the host, and nothing that is needed goes.
#[test]
fn reference_points_that_no_change_id_needs_are_removed() {
    for seals in BOTH {
        let lab = Lab::new(seals);
        let others = lab.host.make_checkpoint("another backup", true);
        let refused = lab.track(&lab.agent()).unwrap_err();
        assert!(matches!(&refused, RctError::HasCheckpoints { names, .. } if names == "of a backup"), "{refused}");
        assert!(lab.host.checkpoints().contains(&others));
        lab.host.remove_checkpoint(&others);
        let agent = lab.armed();
        for round in 0..20u64 {
            lab.host.write(0, round * MIB / 8, &[round as u8 + 1; 512]);
            let changed = lab.instant(&agent, round % 3 != 0).unwrap();
            assert!(!changed.is_empty() && lab.host.points() <= 4, "{seals:?} {round}: {}", lab.host.points());
            if round % 5 == 4 {
                agent.leave(lab.disk);
                assert!(lab.host.checkpoints().is_empty());
                assert_eq!(lab.track(&agent).unwrap(), Some(SESSION));
            }
            assert_eq!(agent.broken(lab.disk), None, "{seals:?} {round}");
        }
        agent.untrack(lab.disk).unwrap();
        assert!(lab.host.checkpoints().is_empty() && lab.host.points() == 0, "nothing of ours stays");
        assert!(lab.storage().list("").unwrap().is_empty());
    }
}

#[test]
fn what_hyper_v_cannot_tell_is_a_gap_and_the_next_id_is_kept_first() {
    let gaps: [(&str, &dyn Fn(&Lab)); 5] = [
        ("cannot tell what changed", &|lab| lab.host.reset_tracking(0)),
        ("error 87", &|lab| lab.host.state().faults.query = Some("error 87".into())),
        ("another disk", &|lab| lab.host.state().disks[0].uuid = "another".into()),
        ("its size", &|lab| lab.host.resize(0, BYTES + MIB)),
        ("told of 0 bytes", &|lab| lab.host.state().areas_max = 0),
    ];
    for seals in BOTH {
        for (reason, make) in &gaps {
            let lab = Lab::new(seals);
            let agent = lab.armed();
            lab.instant(&agent, true).unwrap();
            lab.host.write(0, 0, &[1; 512]);
            make(&lab);
            lab.host.write(0, MIB, &[2; 512]);
            let error = agent.take(&[lab.disk], BYTES, false).err().unwrap();
            let told = agent.broken(lab.disk).unwrap_or_default();
            let is_told = told.contains(reason);
            assert!(matches!(error, RctError::Unwitnessed { .. }) && is_told, "{reason}: {error}, {told}");
            assert!(agent.claim(lab.disk).is_err(), "not before somebody took notice");
            assert_eq!(lab.kept().session(), None, "{reason}: nobody is the witness of what came before");
            lab.host.state().areas_max = 3;
            agent.forgive(lab.disk);
            agent.arm(lab.disk, [8; 16]).unwrap();
            lab.host.write(0, MIB / 2, &[4; 512]);
            let changed = lab.instant(&agent, true).unwrap();
            assert!(granules(&changed).contains(&(MIB / 2 / GRANULE)), "{reason}: from here on it is told again");
            assert!(changed.total_bytes() < MIB, "{reason}: {changed:?}");
        }
    }
}

#[test]
fn other_state_is_no_witness() {
    let lab = Lab::new(Seals::AtCheckpoint);
    drop(lab.armed());
    let agent = lab.agent();
    assert_eq!(lab.track(&agent).unwrap(), Some(SESSION));
    agent.leave(lab.disk);
    drop(agent);
    let file = lab.folder.path().join("rct").join(lab.disk.to_string());
    let mut damaged = std::fs::read(&file).unwrap();
    let last = damaged.iter().rposition(|byte| *byte == b'0').unwrap();
    damaged[last] ^= 1;
    let spoil: [&dyn Fn(); 4] = [
        &|| std::fs::copy(lab.folder.path().join("damaged"), &file).map(drop).unwrap(),
        &|| std::fs::remove_file(&file).unwrap(),
        &|| lab.host.resize(0, BYTES * 2),
        &|| {
            let mut others = Kept::new(lab.disk, "another machine", "u", BYTES * 2, "rctX:1");
            others.set_session(Some(SESSION));
            others.store(&*lab.storage()).unwrap();
        },
    ];
    tidemark_base::storage::replace_file(&*RealStorage::open_folder(lab.folder.path()), "damaged", &damaged).unwrap();
    for (number, spoil) in spoil.iter().enumerate() {
        spoil();
        let agent = lab.agent();
        assert_eq!(lab.track(&agent).unwrap(), None, "{number}");
        agent.arm(lab.disk, SESSION).unwrap();
        agent.leave(lab.disk);
        drop(agent);
        let agent = lab.agent();
        assert_eq!(lab.track(&agent).unwrap(), Some(SESSION), "{number}: it is one again");
        agent.leave(lab.disk);
    }
}

/// A kill between any two steps, and calls whose end nobody heard of.
#[test]
fn what_a_kill_left_at_the_host_is_ours_and_nothing_else_is() {
    let kills: [(&str, &dyn Fn(&mut State)); 3] = [
        ("in an instant", &|_| {}),
        ("a checkpoint that nobody heard of", &|state| state.faults.checkpoint_unheard = true),
        ("a reference point that nobody heard of", &|state| state.faults.convert_unheard = true),
    ];
    for seals in BOTH {
        for (name, prepare) in &kills {
            let lab = Lab::new(seals);
            let agent = lab.armed();
            lab.instant(&agent, true).unwrap();
            lab.instant(&agent, true).unwrap();
            lab.host.write(0, 5 * GRANULE, &[1; 512]);
            prepare(&mut lab.host.state());
            let taken = agent.take(&[lab.disk], BYTES, false);
            assert_eq!(taken.is_ok(), *name == "in an instant", "{name}");
            lab.kill(agent, taken);
            // Of others, made while nobody watched.
            let other = lab.host.make_checkpoint("by hand", false);
            let refused = lab.track(&lab.agent()).unwrap_err();
            assert!(matches!(&refused, RctError::HasCheckpoints { names, .. } if names == "by hand"), "{refused}");
            lab.host.remove_checkpoint(&other);
            let of_others = lab.host.points();
            lab.host.write(0, 9 * GRANULE, &[2; 512]);
            let agent = lab.agent();
            assert_eq!(lab.track(&agent).unwrap(), Some(SESSION), "{name}");
            assert!(lab.host.checkpoints().is_empty(), "{seals:?} {name}: it was converted");
            assert!(lab.host.points() <= of_others + 1);
            let changed = granules(&lab.instant(&agent, true).unwrap());
            assert!(changed.contains(&5) && changed.contains(&9), "{seals:?} {name}: {changed:?}");
            agent.untrack(lab.disk).unwrap();
            assert_eq!(lab.host.points(), 0, "{seals:?} {name}");
            assert!(lab.storage().list("").unwrap().is_empty(), "{name}");
        }
    }
}

/// What Hyper-V refused was not made: a backup of somebody else that was in the way is not ours.
#[test]
fn a_refused_checkpoint_makes_nobody_elses_ours() {
    let lab = Lab::new(Seals::AtCheckpoint);
    let agent = lab.armed();
    lab.instant(&agent, true).unwrap();
    lab.host.state().faults.checkpoint = true;
    let refused = lab.instant(&agent, true).unwrap_err();
    assert!(matches!(refused, RctError::Refused { .. }) && !refused.help().is_empty(), "{refused}");
    assert_eq!(Ours::read(&*lab.storage(), MACHINE).unwrap().checkpoints_before, None);
    let other = lab.host.make_checkpoint("a backup", true);
    lab.host.state().faults.checkpoint = false;
    for _ in 0..2 {
        let refused = lab.instant(&agent, true).unwrap_err();
        assert!(matches!(refused, RctError::HasCheckpoints { .. }), "{refused}");
    }
    lab.kill(agent, ());
    assert!(lab.track(&lab.agent()).is_err());
    assert!(lab.host.checkpoints().contains(&other));
    lab.host.remove_checkpoint(&other);
    let agent = lab.agent();
    assert_eq!(lab.track(&agent).unwrap(), Some(SESSION));
    lab.instant(&agent, true).unwrap();
}

#[test]
fn a_conversion_that_failed_is_tried_again_before_the_next_instant() {
    for seals in BOTH {
        let lab = Lab::new(seals);
        let agent = lab.armed();
        lab.instant(&agent, true).unwrap();
        lab.host.write(0, 0, &[1; 512]);
        lab.host.state().faults.convert = true;
        assert!(lab.instant(&agent, true).is_err());
        assert_eq!(lab.host.checkpoints().len(), 1, "it is there still");
        assert!(Live { machine: agent.clone(), disk: lab.disk, bytes: BYTES }.read_at(0, &mut [0; 512]).is_err());
        lab.host.state().faults.convert = false;
        assert!(granules(&lab.instant(&agent, true).unwrap()).contains(&0), "{seals:?}");
        agent.leave(lab.disk);
        assert!(lab.host.checkpoints().is_empty());
    }
}

#[test]
fn an_instant_whose_checkpoint_somebody_removed_is_none() {
    let lab = Lab::new(Seals::AtCheckpoint);
    let agent = lab.armed();
    lab.host.write(0, 0, &[1; 512]);
    let taken = agent.take(&[lab.disk], BYTES, false).unwrap().unwrap();
    lab.host.remove_checkpoint(&lab.host.checkpoints()[0]);
    assert!(taken.still_holds().is_err() && taken.read(lab.disk, 0, &mut [0; 512]).is_err());
    drop(taken);
    // Whoever reads gets a new one.
    lab.host.write(0, 0, &[2; 512]);
    let live = Live { machine: agent.clone(), disk: lab.disk, bytes: BYTES };
    let mut content = [0; 512];
    live.read_at(0, &mut content).unwrap();
    assert_eq!(content, [2; 512]);
    assert_eq!(live.allocation(MIB).unwrap(), (BYTES - MIB, Allocation::Data));
    assert_eq!(live.current_bytes().unwrap(), BYTES);
}

#[test]
fn what_cannot_be_tracked_is_refused_by_name() {
    let lab = Lab::new(Seals::AtCheckpoint);
    let agent = lab.agent();
    let probe = |path: &str| agent.probe(Path::new(path));
    assert_eq!(probe("d:\\machines\\WEB.vhdx").unwrap(), BYTES);
    for (path, reason) in [
        ("D:/Machines/web.vhd", "VHDX files alone"),
        ("D:/Machines/web.vhds", "shared"),
        ("D:/Machines/web.avhdx", "checkpoint"),
        ("D:/Machines/other.vhdx", "has no disk"),
    ] {
        let refused = probe(path).unwrap_err();
        assert!(refused.to_string().contains(reason), "{refused}");
        assert!(refused.is_a_wrong_question() && !refused.help().is_empty());
    }
    lab.host.state().disks[0].parent = Some("D:/Machines/template.vhdx".into());
    assert!(probe(DISK).unwrap_err().to_string().contains("lies on another disk"));
    lab.host.state().disks[0].parent = None;
    lab.host.state().free_bytes = 1 << 30;
    let refused = lab.track(&agent).unwrap_err();
    assert!(matches!(refused, RctError::NoRoom { .. }) && lab.host.state().count == 0, "{refused}");
    lab.host.state().free_bytes = 1 << 40;
    lab.host.make_checkpoint("before the update", false);
    let refused = probe(DISK).unwrap_err();
    assert!(matches!(&refused, RctError::HasCheckpoints { names, .. } if names == "before the update"), "{refused}");
    lab.host.state().is_absent = true;
    assert!(matches!(probe(DISK), Err(RctError::Absent { .. })));
}

#[test]
fn tracking_is_switched_on_where_it_is_off() {
    for is_off in [false, true] {
        let lab = Lab::new(Seals::AtCheckpoint);
        lab.host.state().is_off = is_off;
        let agent = lab.armed();
        assert_eq!(lab.host.state().count, 2, "the first one has it begin");
        lab.host.write(0, 0, &[1; 512]);
        assert!(granules(&lab.instant(&agent, true).unwrap()).contains(&0));
        assert_eq!(agent.broken(lab.disk), None);
    }
}

#[test]
fn instants_of_quiet_applications_are_asked_for_or_refused_by_name() {
    let lab = Lab::new(Seals::AtCheckpoint);
    let agent = lab.armed();
    drop(agent.take(&[lab.disk], BYTES, true).unwrap().unwrap());
    assert!(lab.host.state().quiet);
    lab.host.state().faults.quiet = true;
    let refused = agent.take(&[lab.disk], BYTES, true).err().unwrap();
    assert!(matches!(refused, RctError::Quiesce { .. }) && refused.help().contains("VSS"), "{refused}");
    drop(agent.take(&[lab.disk], BYTES, false).unwrap().unwrap());
    assert!(!lab.host.state().quiet);
}

/// What is left is claimed at a checkpoint that is there, and no new one is made for it.
#[test]
fn much_that_changed_is_claimed_and_not_taken() {
    let lab = Lab::new(Seals::AtCheckpoint);
    let agent = lab.armed();
    lab.host.write(0, 0, &vec![1; MIB as usize]);
    assert!(agent.take(&[lab.disk], MIB / 2, false).unwrap().is_none());
    assert_eq!(agent.claimed(lab.disk).total_bytes(), MIB);
    assert_eq!(lab.host.checkpoints().len(), 1);
    let mut content = [0; 512];
    Live { machine: agent.clone(), disk: lab.disk, bytes: BYTES }.read_at(MIB - 512, &mut content).unwrap();
    assert_eq!(content, [1; 512]);
    agent.release(lab.disk, &agent.claimed(lab.disk)).unwrap();
    assert!(agent.claimed(lab.disk).is_empty());
    lab.host.write(0, Extent::new(MIB, 512).offset, &[1; 512]);
    assert_eq!(granules(&lab.instant(&agent, true).unwrap()), [MIB / GRANULE]);
}
