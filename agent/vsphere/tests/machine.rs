//! A machine of a simulated vCenter (`tests/src/vcenter.rs`), which tracks changes by rules of its own, and everything that goes wrong between it and us.

#![cfg(unix)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use tidemark_base::disk::{Allocation, RemoteDisk};
use tidemark_base::storage::{RealStorage, Storage};
use tidemark_base::{DiskId, Extent, ExtentSet};
use tidemark_tests::vcenter::{DATACENTER, MACHINE, Vcenter};
use tidemark_vsphere::kept::Kept;
use tidemark_vsphere::{DiskAddress, Live, Machine, Session, VsphereError};

const MIB: u64 = 1 << 20;
const BYTES: u64 = 4 * MIB;
const SESSION: [u8; 16] = [7; 16];

struct Lab {
    folder: TempDir,
    vcenter: Vcenter,
    settings: PathBuf,
    disk: DiskId,
}

/// One agent's view of the machine.
struct Agent {
    machine: Arc<Machine>,
}

impl Lab {
    fn new() -> Self {
        Self::with(1, false)
    }

    fn with(disks: usize, is_old: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let images: Vec<PathBuf> = (0..disks).map(|disk| folder.path().join(format!("disk{disk}.img"))).collect();
        for image in &images {
            let file = File::create(image).unwrap();
            file.set_len(BYTES).unwrap();
            file.write_all_at(&[1; 100_000], MIB).unwrap();
        }
        let vcenter = Vcenter::start_as(folder.path(), &images, is_old);
        let settings = vcenter.connect(folder.path(), "lab");
        Self { folder, vcenter, settings, disk: DiskId::random() }
    }

    fn address(&self, disk: &str) -> DiskAddress {
        DiskAddress::of(Path::new(&format!("vsphere:lab/{DATACENTER}/vm/web/{disk}"))).unwrap()
    }

    fn storage(&self) -> Arc<dyn Storage> {
        RealStorage::create(self.folder.path().join("vsphere")).unwrap()
    }

    fn agent(&self) -> Agent {
        let session = Arc::new(Session::new(&self.settings));
        let machine = Machine::new(session, self.address("scsi0:0").machine, self.storage()).unwrap();
        Agent { machine }
    }

    fn track(&self, agent: &Agent) -> Result<Option<[u8; 16]>, VsphereError> {
        agent.machine.track(self.disk, &self.address("scsi0:0"))
    }

    /// Tracked from its first instant on, by a session.
    fn armed(&self) -> Agent {
        let agent = self.agent();
        assert_eq!(self.track(&agent).unwrap(), None);
        agent.machine.arm(self.disk, SESSION).unwrap();
        agent
    }

    /// What an instant tells, with the content that it reads.
    fn instant(&self, agent: &Agent) -> Result<(ExtentSet, Vec<u8>), VsphereError> {
        let taken = agent.machine.take(&[self.disk], BYTES, false)?.expect("little changed");
        let changed = taken.changed(self.disk);
        let mut content = vec![0; BYTES as usize];
        for extent in changed.iter() {
            taken.read(self.disk, extent.offset, &mut content[extent.offset as usize..extent.end() as usize])?;
        }
        taken.still_holds()?;
        Ok((changed, content))
    }

    /// What an instant tells is what the machine holds there, and all that differs from what it held before.
    fn assert_told(&self, agent: &Agent, before: &[u8]) -> ExtentSet {
        let (changed, content) = self.instant(agent).unwrap();
        let now = self.vcenter.content(0);
        for at in (0..BYTES).step_by(512) {
            let is_told = changed.overlapping(Extent::new(at, 512)).next().is_some();
            let sector = at as usize..at as usize + 512;
            let expected = if is_told { &content } else { before };
            assert!(expected[sector.clone()] == now[sector], "sector at {at}, told: {is_told}");
        }
        changed
    }

    fn read_whole(&self, agent: &Agent) -> Result<Vec<u8>, std::io::Error> {
        let live = Live { machine: agent.machine.clone(), disk: self.disk, bytes: BYTES };
        let mut content = vec![0; BYTES as usize];
        for part in 0..4 {
            live.read_at(part * MIB, &mut content[(part * MIB) as usize..((part + 1) * MIB) as usize])?;
        }
        Ok(content)
    }
}

#[test]
fn what_changed_between_two_instants_is_told_and_read_as_it_was() {
    let lab = Lab::new();
    let agent = lab.armed();
    assert!(lab.vcenter.state().machines[MACHINE].tracks, "it was switched on");
    assert_eq!(lab.read_whole(&agent).unwrap(), lab.vcenter.content(0));
    for round in 0..3u64 {
        let before = lab.vcenter.content(0);
        // More areas than one answer tells, also into each other.
        lab.vcenter.with_disk(0, |disk, _| disk.overlap = round == 2);
        for area in 0..9 {
            lab.vcenter.write(0, area * 3 * 131_072 + round * 4096, &[round as u8 + 2; 5000]);
        }
        let asked = lab.vcenter.calls("QueryChangedDiskAreas");
        let changed = lab.assert_told(&agent, &before);
        assert!(changed.total_bytes() < BYTES / 2, "{changed:?}");
        assert!(lab.vcenter.calls("QueryChangedDiskAreas") >= asked + 3, "in several answers");
        agent.machine.release(lab.disk, &changed).unwrap();
    }
    // Nothing changed since.
    let (changed, _) = lab.instant(&agent).unwrap();
    assert!(changed.is_empty());
    // What is written after an instant is not in it.
    lab.vcenter.write(0, 0, &[8; 4096]);
    let taken = agent.machine.take(&[lab.disk], BYTES, false).unwrap().unwrap();
    lab.vcenter.write(0, 0, &[9; 4096]);
    let mut read = [0; 4096];
    taken.read(lab.disk, 0, &mut read).unwrap();
    assert_eq!(read, [8; 4096]);
}

#[test]
fn a_claim_that_came_to_nothing_is_told_again() {
    let lab = Lab::new();
    let agent = lab.armed();
    let before = lab.vcenter.content(0);
    lab.vcenter.write(0, 3 * MIB, &[2; 4096]);
    assert!(agent.machine.take(&[lab.disk], 1000, false).unwrap().is_none(), "more than that changed");
    lab.assert_told(&agent, &before);
    // A part of it releases nothing.
    agent.machine.release(lab.disk, &ExtentSet::from_iter([Extent::new(3 * MIB, 512)])).unwrap();
    lab.vcenter.write(0, 0, &[3; 4096]);
    // The agent ends and begins again: also then.
    drop(agent);
    let agent = lab.agent();
    assert_eq!(lab.track(&agent).unwrap(), Some(SESSION));
    let changed = lab.assert_told(&agent, &before);
    agent.machine.release(lab.disk, &changed).unwrap();
    assert!(lab.instant(&agent).unwrap().0.is_empty());
}

/// The change id on durable media follows what was released, and nothing else.
#[test]
fn what_cannot_be_kept_moves_nothing_on() {
    use std::os::unix::fs::PermissionsExt;
    if nix::unistd::Uid::effective().is_root() {
        // Permissions stop nobody who is root: a folder in the file's place does.
        let lab = Lab::new();
        let agent = lab.armed();
        let kept = Kept::read(&*lab.storage(), lab.disk).unwrap().unwrap();
        let before = lab.vcenter.content(0);
        lab.vcenter.write(0, 0, &[2; 4096]);
        let changed = lab.assert_told(&agent, &before);
        let new = lab.folder.path().join(format!("vsphere/{}.new", lab.disk));
        std::fs::create_dir(&new).unwrap();
        assert!(matches!(agent.machine.release(lab.disk, &changed), Err(VsphereError::Io { .. })));
        std::fs::remove_dir(&new).unwrap();
        assert_eq!(Kept::read(&*lab.storage(), lab.disk).unwrap().unwrap(), kept);
        lab.assert_told(&agent, &before);
        return;
    }
    let lab = Lab::new();
    let agent = lab.armed();
    let before = lab.vcenter.content(0);
    lab.vcenter.write(0, 0, &[2; 4096]);
    let changed = lab.assert_told(&agent, &before);
    let folder = lab.folder.path().join("vsphere");
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o500)).unwrap();
    assert!(matches!(agent.machine.release(lab.disk, &changed), Err(VsphereError::Io { .. })));
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o700)).unwrap();
    lab.assert_told(&agent, &before);
}

#[test]
fn a_gap_is_found_and_named_and_ends_with_a_new_change_id() {
    type Gap = (&'static str, fn(&Vcenter));
    let gaps: [Gap; 7] = [
        ("began to track its changes anew", |vcenter| vcenter.reset_tracking(0)),
        ("reverted to an older snapshot", |vcenter| vcenter.with_disk(0, |disk, _| disk.turn_tracking_back())),
        ("another disk is in its place", |vcenter| vcenter.with_disk(0, |disk, _| disk.replace_by_another())),
        ("its size was changed", |vcenter| vcenter.with_disk(0, |disk, _| disk.grow(BYTES + MIB))),
        ("cannot tell", |vcenter| vcenter.state().faults.query.push("FileFault")),
        ("cannot tell", |vcenter| vcenter.state().faults.query.push("InvalidArgument")),
        ("began to track its changes anew", |vcenter| {
            vcenter.state().machines.get_mut(MACHINE).unwrap().tracks = false;
        }),
    ];
    for (reason, make) in gaps {
        let lab = Lab::new();
        let agent = lab.armed();
        // Some instants, so that there is something to go back to.
        for _ in 0..2 {
            lab.vcenter.write(0, 0, &[2; 512]);
            let changed = lab.instant(&agent).unwrap().0;
            agent.machine.release(lab.disk, &changed).unwrap();
        }
        make(&lab.vcenter);
        lab.vcenter.write(0, 2 * MIB, &[3; 4096]);
        let told = agent.machine.take(&[lab.disk], BYTES, false).map(drop).unwrap_err();
        assert!(matches!(told, VsphereError::Unwitnessed { .. }), "{reason}: {told}");
        assert!(agent.machine.broken(lab.disk).unwrap().contains(reason), "{reason}: {told}");
        assert!(agent.machine.claim(lab.disk).is_err(), "not before somebody took notice");
        assert!(agent.machine.is_dirty(lab.disk));
        assert_eq!(Kept::read(&*lab.storage(), lab.disk).unwrap().unwrap().session(), None, "{reason}");
        // A compare reads everything, also where nothing is said to be.
        let live = Live { machine: agent.machine.clone(), disk: lab.disk, bytes: BYTES };
        assert_eq!(live.allocation(0).unwrap().1, Allocation::Data, "{reason}");
        agent.machine.forgive(lab.disk);
        agent.machine.arm(lab.disk, [8; 16]).unwrap();
        let before = lab.vcenter.content(0)[..BYTES as usize].to_vec();
        lab.vcenter.write(0, MIB / 2, &[4; 4096]);
        let (changed, _) = lab.instant(&agent).unwrap();
        assert!(changed.total_bytes() < MIB, "{reason}: from here on it is told again: {changed:?}");
        let now = lab.vcenter.content(0);
        let is_told = |at: usize| changed.overlapping(Extent::new(at as u64, 512)).next().is_some();
        let mut sectors = (0..BYTES as usize).step_by(512);
        assert!(sectors.all(|at| before[at..at + 512] == now[at..at + 512] || is_told(at)), "{reason}");
    }
}

#[test]
fn other_state_is_no_witness() {
    let lab = Lab::new();
    drop(lab.armed());
    let agent = lab.agent();
    assert_eq!(lab.track(&agent).unwrap(), Some(SESSION));
    drop(agent);
    let file = lab.folder.path().join("vsphere").join(lab.disk.to_string());
    let whole = std::fs::read(&file).unwrap();
    let mut damaged = whole.clone();
    let digit = damaged.iter().rposition(|byte| *byte == b'/').unwrap() + 1;
    damaged[digit] ^= 1;
    let spoil: [&dyn Fn(); 5] = [
        &|| File::create(&file).unwrap().write_all_at(&damaged, 0).unwrap(),
        &|| std::fs::remove_file(&file).unwrap(),
        &|| lab.vcenter.with_disk(0, |disk, _| disk.replace_by_another()),
        &|| lab.vcenter.state().machines.get_mut(MACHINE).unwrap().uuid = "5029ffff".into(),
        &|| lab.vcenter.state().machines.get_mut(MACHINE).unwrap().tracks = false,
    ];
    for (number, spoil) in spoil.iter().enumerate() {
        spoil();
        let agent = lab.agent();
        assert_eq!(lab.track(&agent).unwrap(), None, "{number}");
        agent.machine.arm(lab.disk, SESSION).unwrap();
        drop(agent);
        let agent = lab.agent();
        assert_eq!(lab.track(&agent).unwrap(), Some(SESSION), "{number}: it is one again");
    }
}

/// A kill between snapshot and removal.
#[test]
fn a_snapshot_that_was_left_is_removed_at_the_start_and_nobody_elses() {
    let lab = Lab::new();
    let agent = lab.armed();
    lab.vcenter.write(0, 0, &[2; 4096]);
    let before = lab.vcenter.content(0);
    let taken = agent.machine.take(&[lab.disk], BYTES, false).unwrap().unwrap();
    let left = lab.vcenter.snapshot_names();
    assert_eq!(left, [format!("tidemark-{}", lab.disk)]);
    // As if killed: nothing of it is let go of.
    std::mem::forget((taken, agent));
    let agent = lab.agent();
    assert_eq!(lab.track(&agent).unwrap(), Some(SESSION));
    assert!(lab.vcenter.snapshot_names().is_empty());
    let told = lab.instant(&agent).unwrap().0;
    assert!(told.overlapping(Extent::new(0, 4096)).next().is_some() && lab.vcenter.content(0) == before);
    agent.machine.leave(lab.disk);
    assert!(lab.vcenter.snapshot_names().is_empty(), "what is let go of is removed");
    // Of another agent's disks: nothing of ours.
    let other = format!("tidemark-{}", DiskId::random());
    lab.vcenter.make_snapshot(&other);
    let refused = lab.track(&agent).unwrap_err();
    assert!(matches!(&refused, VsphereError::HasSnapshots { names, .. } if *names == other), "{refused}");
    assert!(lab.vcenter.snapshot_names().iter().eq([&other]));
    lab.vcenter.remove_snapshot(&other);
    lab.track(&agent).unwrap();
}

#[test]
fn beside_a_snapshot_of_somebody_elses_nothing_is_made() {
    let lab = Lab::new();
    let agent = lab.armed();
    assert!(lab.instant(&agent).is_ok());
    lab.vcenter.make_snapshot("Veeam");
    let made = lab.vcenter.calls("CreateSnapshot_Task");
    let refused = lab.instant(&agent).unwrap_err();
    assert!(matches!(&refused, VsphereError::HasSnapshots { names, .. } if names == "Veeam"), "{refused}");
    assert!(!refused.help().is_empty() && lab.vcenter.calls("CreateSnapshot_Task") == made);
    assert_eq!(lab.vcenter.snapshot_names(), ["Veeam"], "ours is gone, theirs is not");
    lab.vcenter.remove_snapshot("Veeam");
    lab.instant(&agent).unwrap();
}

#[test]
fn a_snapshot_that_somebody_removes_gives_no_instant() {
    let lab = Lab::new();
    let agent = lab.armed();
    lab.vcenter.write(0, 0, &[2; 4096]);
    let taken = agent.machine.take(&[lab.disk], BYTES, false).unwrap().unwrap();
    let name = lab.vcenter.snapshot_names().remove(0);
    lab.vcenter.remove_snapshot(&name);
    lab.vcenter.write(0, 0, &[3; 4096]);
    // Another one of somebody else's: the file can be read again, and is not what it was.
    lab.vcenter.make_snapshot("other");
    let mut read = [0; 4096];
    taken.read(lab.disk, 0, &mut read).unwrap();
    assert_eq!(read, [3; 4096], "the simulator is as treacherous as the real one");
    assert!(matches!(taken.still_holds(), Err(VsphereError::SnapshotGone { .. })));
    drop(taken);
    lab.vcenter.remove_snapshot("other");
    assert!(lab.instant(&agent).unwrap().0.overlapping(Extent::new(0, 1)).next().is_some(), "and is told again");
}

#[test]
fn a_session_that_ends_is_opened_again_in_the_middle() {
    for after in 1..25 {
        let lab = Lab::new();
        let agent = lab.armed();
        let before = lab.vcenter.content(0);
        lab.vcenter.write(0, MIB, &[2; 70_000]);
        lab.vcenter.state().faults.sessions_end_after = Some(after);
        lab.assert_told(&agent, &before);
        agent.machine.leave(lab.disk);
        assert!(lab.vcenter.snapshot_names().is_empty(), "{after}");
    }
}

#[test]
fn reads_that_are_not_what_was_asked_for_are_read_again_and_never_taken() {
    let lab = Lab::new();
    lab.vcenter.write(0, 0, &(0..BYTES).map(|at| (at / 512 % 251) as u8).collect::<Vec<_>>());
    let agent = lab.armed();
    let expected = lab.vcenter.content(0);
    type Count = fn(&mut tidemark_tests::vcenter::Faults) -> &mut u32;
    let faults: [Count; 5] = [
        |faults| &mut faults.cut_reads,
        |faults| &mut faults.short_reads,
        |faults| &mut faults.other_ranges,
        |faults| &mut faults.busy_reads,
        |faults| &mut faults.whole_reads,
    ];
    for (number, count) in faults.iter().enumerate() {
        *count(&mut lab.vcenter.state().faults) = 2;
        assert!(lab.read_whole(&agent).unwrap() == expected, "fault {number}, once in a while");
        *count(&mut lab.vcenter.state().faults) = 20;
        let error = lab.read_whole(&agent).unwrap_err();
        let told = error.get_ref().unwrap().downcast_ref::<VsphereError>().unwrap();
        assert!(!told.help().is_empty(), "fault {number}: {error}");
        let left = std::mem::take(count(&mut lab.vcenter.state().faults));
        assert!(left >= 20 - 2 * 3, "fault {number}: {left} left: it ends");
    }
    assert!(lab.read_whole(&agent).unwrap() == expected);
}

#[test]
fn what_is_refused_is_named_and_leaves_nothing() {
    let lab = Lab::new();
    let agent = lab.armed();
    let before = lab.vcenter.content(0);
    lab.vcenter.write(0, 0, &[2; 4096]);
    lab.vcenter.state().faults.create.push(("NoDiskSpace", "There is not enough space on the file system"));
    let error = lab.instant(&agent).unwrap_err();
    assert!(error.to_string().contains("NoDiskSpace") && error.to_string().contains("not enough space"), "{error}");
    // A datastore that is nearly full is not made fuller.
    lab.vcenter.state().free_bytes = 999_999;
    let made = lab.vcenter.calls("CreateSnapshot_Task");
    let error = lab.instant(&agent).unwrap_err();
    assert!(matches!(error, VsphereError::NoRoom { free: 999_999, .. }), "{error}");
    assert_eq!(lab.vcenter.calls("CreateSnapshot_Task"), made);
    lab.vcenter.state().free_bytes = 1 << 40;
    lab.vcenter.state().faults.quiesce = true;
    let error = agent.machine.take(&[lab.disk], BYTES, true).map(drop).unwrap_err();
    assert!(matches!(error, VsphereError::Quiesce { .. }) && error.help().contains("VMware Tools"), "{error}");
    lab.vcenter.state().faults.quiesce = false;
    drop(agent.machine.take(&[lab.disk], BYTES, true).unwrap());
    assert!(lab.vcenter.state().machines[MACHINE].snapshots[0].quiesced);
    // One that cannot be removed now is removed later.
    lab.vcenter
        .state()
        .faults
        .remove
        .push(("TaskInProgress", "The operation is not allowed: another one is in progress"));
    assert!(lab.instant(&agent).unwrap_err().to_string().contains("TaskInProgress"));
    // An answer that covers nothing does not end the question.
    lab.vcenter.state().faults.query_nothing = 1;
    let error = lab.instant(&agent).unwrap_err();
    assert!(error.to_string().contains("covers nothing"), "{error}");
    lab.assert_told(&agent, &before);
    agent.machine.leave(lab.disk);
    assert!(lab.vcenter.snapshot_names().is_empty());
}

#[test]
fn a_snapshot_that_failed_is_not_tried_each_second() {
    let lab = Lab::new();
    lab.vcenter.connect_with(lab.folder.path(), "lab", &format!("thumbprint = \"{}\"\n", lab.vcenter.thumbprint()));
    let text = std::fs::read_to_string(&lab.settings).unwrap().replace("\"0s\"", "\"1h\"");
    File::create(&lab.settings).unwrap().write_all_at(text.as_bytes(), 0).unwrap();
    let agent = lab.armed();
    lab.vcenter.state().faults.create.push(("GenericVmConfigFault", "no"));
    assert!(lab.instant(&agent).unwrap_err().to_string().contains("GenericVmConfigFault"));
    let made = lab.vcenter.calls("CreateSnapshot_Task");
    let error = lab.instant(&agent).unwrap_err();
    assert!(
        matches!(&error, VsphereError::Resting { reason, .. } if reason.contains("GenericVmConfigFault")),
        "{error}"
    );
    assert_eq!(lab.vcenter.calls("CreateSnapshot_Task"), made);
}

/// Nobody gets a password who is not known.
#[test]
fn unknown_servers_are_refused_with_their_thumbprint() {
    let lab = Lab::new();
    let thumbprint = lab.vcenter.thumbprint().to_owned();
    let other = "00:".repeat(31) + "00";
    for (more, reason) in [(String::new(), "neither"), (format!("thumbprint = \"{other}\"\n"), "another one is pinned")]
    {
        lab.vcenter.connect_with(lab.folder.path(), "lab", &more);
        let error = lab.track(&lab.agent()).unwrap_err();
        assert!(matches!(error, VsphereError::Certificate { .. }), "{error}");
        assert!(error.to_string().contains(&thumbprint) && error.to_string().contains(reason), "{error}");
        assert!(error.help().contains(&thumbprint));
    }
    assert!(lab.vcenter.state().calls.is_empty(), "nothing was asked");
    let authority = lab.folder.path().join("ca.pem");
    let stranger = Vcenter::start(lab.folder.path(), &[]);
    let with = format!("ca-file = {authority:?}\n");
    lab.vcenter.connect_with(lab.folder.path(), "lab", &with);
    for (pem, is_known) in [(stranger.certificate_pem(), false), (lab.vcenter.certificate_pem(), true)] {
        File::create(&authority).unwrap().write_all_at(pem.as_bytes(), 0).unwrap();
        let tracked = lab.track(&lab.agent());
        assert_eq!(tracked.is_ok(), is_known, "{tracked:?}");
        assert!(is_known || matches!(tracked, Err(VsphereError::Certificate { .. })), "{tracked:?}");
    }
}

#[test]
fn a_server_that_speaks_tls_1_2_only_is_spoken_to() {
    let lab = Lab::with(1, true);
    let agent = lab.armed();
    assert_eq!(lab.read_whole(&agent).unwrap(), lab.vcenter.content(0));
}

#[test]
fn a_wrong_password_is_tried_once() {
    let lab = Lab::new();
    lab.vcenter.state().password = "another".into();
    let agent = lab.agent();
    let error = lab.track(&agent).unwrap_err();
    assert!(matches!(error, VsphereError::Login { .. }), "{error}");
    let error = lab.track(&agent).unwrap_err();
    assert!(matches!(error, VsphereError::LoginPaused { .. }), "{error}");
    assert!(!format!("{error} {error:?}").contains("pa<ss>"));
    assert_eq!(lab.vcenter.calls("Login"), 1);
    // Corrected, it is tried at once.
    let password = lab.folder.path().join("vsphere.d/lab.password");
    File::create(&password).unwrap().write_all_at(b"another", 0).unwrap();
    lab.track(&agent).unwrap();
}

#[test]
fn disks_and_machines_are_found_by_every_name_and_others_are_refused() {
    let lab = Lab::with(2, false);
    let uuid = lab.vcenter.state().machines[MACHINE].uuid.clone();
    let probe = |name: &str| {
        let address = DiskAddress::of(Path::new(&format!("vsphere:lab/{name}"))).unwrap();
        let session = Arc::new(Session::new(&lab.settings));
        Machine::new(session, address.machine.clone(), lab.storage()).unwrap().probe(&address)
    };
    for name in [
        format!("{DATACENTER}/vm/web/scsi0:1"),
        format!("{DATACENTER}/vm/web/2001"),
        format!("uuid={}/scsi0:1", uuid.to_uppercase()),
        format!("moref={MACHINE}/scsi0:1"),
    ] {
        assert_eq!(probe(&name).unwrap(), BYTES, "{name}");
    }
    for name in ["DC 0/vm/other/scsi0:0", "uuid=1234/scsi0:0", "moref=vm-1/scsi0:0"] {
        let error = probe(name).unwrap_err();
        assert!(matches!(error, VsphereError::NoMachine { .. }), "{name}: {error}");
    }
    let error = probe("moref=vm-42/scsi0:7").unwrap_err();
    assert!(error.to_string().contains("scsi0:0 (2000, Hard disk 1), scsi0:1 (2001, Hard disk 2)"), "{error}");
    lab.vcenter.with_disk(1, |disk, _| disk.mode = "independent_persistent");
    let error = probe("moref=vm-42/scsi0:1").unwrap_err();
    assert!(matches!(error, VsphereError::Kind { .. }), "{error}");
    assert_eq!(lab.vcenter.calls("ReconfigVM_Task") + lab.vcenter.calls("CreateSnapshot_Task"), 0, "nothing changed");
    // The same disk by another name.
    let agent = lab.agent();
    agent.machine.track(DiskId::random(), &lab.address("scsi0:0")).unwrap();
    let error = agent.machine.track(DiskId::random(), &lab.address("2000")).unwrap_err();
    assert!(matches!(error, VsphereError::Kind { .. }), "{error}");
}

/// What runs elsewhere now is the same machine, and what nobody reads goes.
#[test]
fn a_machine_that_moved_goes_on_and_no_snapshot_stays() {
    let lab = Lab::new();
    let agent = lab.armed();
    let before = lab.vcenter.content(0);
    lab.vcenter.state().machines.get_mut(MACHINE).unwrap().host = "host-77".into();
    lab.vcenter.write(0, 0, &[2; 4096]);
    let changed = lab.assert_told(&agent, &before);
    agent.machine.release(lab.disk, &changed).unwrap();
    // It moved while its snapshot was there, to another place.
    lab.vcenter.state().machines.get_mut(MACHINE).unwrap().name = "moved".into();
    assert!(lab.read_whole(&agent).is_err(), "its files are elsewhere");
    assert!(lab.read_whole(&agent).unwrap() == lab.vcenter.content(0), "whoever reads next looks where");
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    let never = tidemark_base::stop::Stop::new();
    while !lab.vcenter.snapshot_names().is_empty() {
        assert!(std::time::Instant::now() < deadline, "the snapshot stays");
        never.wait_for(Duration::from_millis(20));
    }
}

/// One that runs is never known to have written nothing; one that is off is, until it is on.
#[test]
fn a_machine_that_is_off_changes_nothing() {
    let lab = Lab::new();
    let agent = lab.armed();
    assert!(agent.machine.is_dirty(lab.disk));
    lab.vcenter.state().machines.get_mut(MACHINE).unwrap().is_on = false;
    let changed = lab.instant(&agent).unwrap().0;
    agent.machine.release(lab.disk, &changed).unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    let never = tidemark_base::stop::Stop::new();
    while agent.machine.is_dirty(lab.disk) {
        assert!(std::time::Instant::now() < deadline, "it is off");
        never.wait_for(Duration::from_millis(20));
    }
    lab.vcenter.state().machines.get_mut(MACHINE).unwrap().is_on = true;
    while !agent.machine.is_dirty(lab.disk) {
        assert!(std::time::Instant::now() < deadline, "it is on");
        never.wait_for(Duration::from_millis(20));
    }
}
