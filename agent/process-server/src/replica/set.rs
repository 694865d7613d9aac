//! All replicas of a process server, and the points of their machines.
//!
//! `replicas/<disk-id>/` and `machines/<machine-id>/` beneath one root; names are made from ids only.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::sync::Arc;

use serde::Serialize;
use tidemark_base::error::with_causes;
use tidemark_base::stop::Stop;
use tidemark_base::storage::Storage;
use tidemark_base::sync::{Mutex, RwLock};
use tidemark_base::{DiskId, Generation, MachineId, MarkId, Timestamp};

use super::{DurableState, Replica, ReplicaError, ReplicaInfo};
use crate::fold::{self, Folded, plan};
use crate::journal::{JournalError, Limits, Part, ReadError};
use crate::points::{Point, PointConsistency, PointError, PointSelector, PointStore, Retention, effective_times};
use crate::scrub::{Finding, ScrubReport, look_into, touched};
use crate::view::View;
use crate::view::cache::{BlockCache, CACHE_BYTES};

const REPLICAS: &str = "replicas";
const MACHINES: &str = "machines";
/// A stream that is just ending may bring a cut or two while a replica is to grow.
const GROW_ATTEMPTS: u32 = 8;

#[derive(Debug, thiserror::Error)]
pub enum SetError {
    #[error("the store at {place} cannot be opened")]
    Open { place: String, source: io::Error },
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    #[error(transparent)]
    Point(#[from] PointError),
}

impl SetError {
    pub fn help(&self) -> &'static str {
        match self {
            SetError::Open { .. } => "check that the folder exists and that the process server may write it",
            SetError::Replica(error) => error.help(),
            SetError::Point(error) => error.help(),
        }
    }
}

/// A replica that could not be opened; the others are served.
#[derive(Debug)]
pub struct OpenFailure {
    pub folder: String,
    pub error: ReadError,
}

/// What a POINT resolves to: a cut of each disk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Place {
    pub machine: MachineId,
    /// The mark; none for a position between marks.
    pub id: Option<MarkId>,
    pub time: Timestamp,
    pub consistency: PointConsistency,
    pub cuts: Vec<(DiskId, u64)>,
}

impl From<Point> for Place {
    fn from(point: Point) -> Self {
        Self {
            machine: point.machine,
            id: Some(point.id),
            time: point.time,
            consistency: point.consistency,
            cuts: point.disks.iter().map(|held| (held.disk, held.cut)).collect(),
        }
    }
}

/// What one disk's fold came to.
#[derive(Debug)]
pub struct FoldOutcome {
    pub disk: DiskId,
    pub result: Result<Folded, ReplicaError>,
}

#[derive(Debug, Default)]
pub struct Maintenance {
    /// Points that could not be stored when their marks came, and are now.
    pub made: Vec<Point>,
    pub dropped: Vec<MarkId>,
    pub folds: Vec<FoldOutcome>,
}

pub struct ReplicaSet {
    storage: Arc<dyn Storage>,
    cache: Arc<BlockCache>,
    limits: Limits,
    replicas: RwLock<HashMap<DiskId, Arc<Replica>>>,
    machines: RwLock<HashMap<MachineId, Arc<PointStore>>>,
    /// Lines of their logs that were damaged when these were opened.
    damaged_lines: Mutex<BTreeMap<MachineId, usize>>,
    /// One maintenance at a time; points are thinned and disks folded by it alone.
    maintaining: Mutex<()>,
    /// Disks whose marks may not all be in their machine's points: these are found again in the journal.
    unheld: Mutex<BTreeSet<DiskId>>,
    /// Disks with marks that could not be read: the points that these would have been are gone.
    unread: Mutex<BTreeMap<DiskId, String>>,
    /// Their disks were taken out of their machines: what is left is for the points that they are part of.
    left: RwLock<BTreeSet<DiskId>>,
    /// What went wrong when a replica was last looked after.
    untended: Mutex<BTreeMap<DiskId, String>>,
}

impl ReplicaSet {
    /// Opens every replica beneath `storage`. One that cannot be opened is named and left as it is.
    pub fn open(storage: Arc<dyn Storage>, limits: Limits) -> Result<(Self, Vec<OpenFailure>), SetError> {
        let open = |source| SetError::Open { place: storage.path("").display().to_string(), source };
        storage.create_folder(REPLICAS).map_err(open)?;
        storage.create_folder(MACHINES).map_err(open)?;
        storage.sync_folder("").map_err(open)?;
        let set = Self {
            cache: BlockCache::new(CACHE_BYTES),
            limits,
            replicas: RwLock::default(),
            machines: RwLock::default(),
            damaged_lines: Mutex::default(),
            maintaining: Mutex::new(()),
            unheld: Mutex::default(),
            unread: Mutex::default(),
            left: RwLock::default(),
            untended: Mutex::default(),
            storage: storage.clone(),
        };
        let mut failures = Vec::new();
        for name in storage.list(REPLICAS).map_err(open)? {
            let folder = format!("{REPLICAS}/{name}");
            // A folder without a manifest is one whose creation or removal a crash cut short.
            if name.parse::<DiskId>().is_err() || !storage.exists(&format!("{folder}/manifest")).map_err(open)? {
                continue;
            }
            match Replica::open(storage.folder(&folder), limits, set.cache.clone()) {
                Ok(replica) => {
                    set.replicas.write().expect("no panic while held").insert(replica.disk(), replica);
                }
                Err(error) => failures.push(OpenFailure { folder: storage.path(&folder).display().to_string(), error }),
            }
        }
        for replica in set.replicas() {
            // One machine's points must not keep the others' from being served.
            if let Err(error) = set.hold_again(&replica) {
                tracing::error!(disk = %replica.disk(), %error, "points could not be found again");
            }
        }
        Ok((set, failures))
    }

    /// Gives the machine's points the marks that the journal holds. What fails is tried again by the next maintenance.
    fn hold_again(&self, replica: &Replica) -> Result<Vec<Point>, PointError> {
        let disk = replica.disk();
        self.unheld.lock().expect("no panic while held").insert(disk);
        let points = self.points(replica.machine())?;
        let (marks, failed) = replica.marks_after(0);
        if let Some((error, cuts)) = failed {
            let message = format!("the marks of {cuts} cuts cannot be read: {}", with_causes(&error));
            tracing::error!(%disk, message, "points are missing");
            self.unread.lock().expect("no panic while held").insert(disk, message);
        }
        let made = points.hold(marks)?;
        let lost: Vec<MarkId> = points
            .all()
            .iter()
            .filter(|point| point.disks.iter().any(|held| held.disk == disk && !replica.may_hold(held)))
            .map(|point| point.id)
            .collect();
        if points.flag_all_damaged(&lost)? > 0 {
            tracing::error!(%disk, points = lost.len(), "the journal lost what these points were of");
        }
        self.unheld.lock().expect("no panic while held").remove(&disk);
        Ok(made)
    }

    /// What is wrong with a disk's marks, when something is.
    pub fn unread_marks(&self, disk: DiskId) -> Option<String> {
        self.unread.lock().expect("no panic while held").get(&disk).cloned()
    }

    /// How many lines of a machine's log of points were damaged and left out: its points are found again in the journals,
    /// a lock that was in them is gone.
    pub fn damaged_lines(&self, machine: MachineId) -> usize {
        self.damaged_lines.lock().expect("no panic while held").get(&machine).copied().unwrap_or(0)
    }

    /// What keeps a replica from being looked after, when something does.
    pub fn untended(&self, disk: DiskId) -> Option<String> {
        self.untended.lock().expect("no panic while held").get(&disk).cloned()
    }

    /// Bytes that came for all disks since the start: how busy this process server is.
    pub fn appended_bytes(&self) -> u64 {
        self.replicas().iter().map(|replica| replica.appended_bytes()).sum()
    }

    /// Reads the logs of points again. What is wrong with them is returned, and they are written again from memory.
    pub fn check_points(&self) -> Vec<(MachineId, String)> {
        let machines: Vec<Arc<PointStore>> =
            self.machines.read().expect("no panic while held").values().cloned().collect();
        let checked = machines.iter().filter_map(|store| {
            let wrong = store.check().unwrap_or_else(|error| Some(error.to_string()));
            Some((store.machine(), wrong?))
        });
        checked.collect()
    }

    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    pub fn cache(&self) -> &Arc<BlockCache> {
        &self.cache
    }

    /// Makes a replica, durable when this returns.
    pub fn create(&self, info: ReplicaInfo) -> Result<Arc<Replica>, SetError> {
        let mut replicas = self.replicas.write().expect("no panic while held");
        if replicas.contains_key(&info.disk) {
            return Err(ReplicaError::Exists { disk: info.disk }.into());
        }
        let name = format!("{REPLICAS}/{}", info.disk);
        let write = |source| ReplicaError::Write { disk: info.disk, source };
        if self.storage.exists(&format!("{name}/manifest")).map_err(write)? {
            return Err(ReplicaError::Exists { disk: info.disk }.into());
        }
        if self.storage.exists(&name).map_err(write)? {
            self.storage.remove_folder(&name).map_err(write)?;
        }
        self.storage.create_folder(&name).map_err(write)?;
        self.storage.sync_folder(REPLICAS).map_err(write)?;
        let folder = self.storage.folder(&name);
        Replica::create(&*folder, &info).map_err(write)?;
        let replica = Replica::open(folder, self.limits, self.cache.clone())
            .map_err(|source| ReplicaError::Read { disk: info.disk, source })?;
        replicas.insert(info.disk, replica.clone());
        Ok(replica)
    }

    pub fn get(&self, disk: DiskId) -> Result<Arc<Replica>, ReplicaError> {
        let replicas = self.replicas.read().expect("no panic while held");
        replicas.get(&disk).cloned().ok_or(ReplicaError::Absent { disk })
    }

    pub fn replicas(&self) -> Vec<Arc<Replica>> {
        let mut all: Vec<_> = self.replicas.read().expect("no panic while held").values().cloned().collect();
        all.sort_by_key(|replica| replica.disk());
        all
    }

    pub fn of_machine(&self, machine: MachineId) -> Vec<Arc<Replica>> {
        self.replicas().into_iter().filter(|replica| replica.machine() == machine).collect()
    }

    /// These disks are in no machine any more: new points are complete without them, and a replica goes with the last point that
    /// it is part of. To be said again after opening.
    pub fn leave(&self, disks: impl IntoIterator<Item = DiskId>) {
        self.left.write().expect("no panic while held").extend(disks);
    }

    /// These are, from now on; those that were left and are here still are not removed.
    pub fn rejoin(&self, disks: &[DiskId]) {
        let mut left = self.left.write().expect("no panic while held");
        left.retain(|disk| !disks.contains(disk));
    }

    /// The disks that a machine has now.
    pub fn present(&self, machine: MachineId) -> Vec<Arc<Replica>> {
        let left = self.left.read().expect("no panic while held");
        self.of_machine(machine).into_iter().filter(|replica| !left.contains(&replica.disk())).collect()
    }

    /// Grows a replica with its disk; what came for it before is durable then. Its stream was ended.
    pub fn grow(&self, replica: &Replica, to: Generation, disk_bytes: u64) -> Result<(), SetError> {
        for _ in 1..GROW_ATTEMPTS {
            self.sync(replica).map_err(ReplicaError::from)?;
            match replica.grow(replica.generation(), to, disk_bytes) {
                Err(ReplicaError::Busy { .. }) => {}
                other => return Ok(other?),
            }
        }
        self.sync(replica).map_err(ReplicaError::from)?;
        Ok(replica.grow(replica.generation(), to, disk_bytes)?)
    }

    /// Removes a replica with everything in it. Refused while views or durable pins stand on it.
    pub fn remove(&self, disk: DiskId) -> Result<(), SetError> {
        let mut replicas = self.replicas.write().expect("no panic while held");
        let replica = replicas.get(&disk).ok_or(ReplicaError::Absent { disk })?;
        replica.retire()?;
        replicas.remove(&disk);
        let name = format!("{REPLICAS}/{disk}");
        // The manifest goes first: from then on there is no replica, whatever a crash leaves of the rest.
        self.storage
            .remove(&format!("{name}/manifest"))
            .and_then(|()| self.storage.sync_folder(&name))
            .and_then(|()| self.storage.remove_folder(&name))
            .and_then(|()| self.storage.sync_folder(REPLICAS))
            .map_err(|source| ReplicaError::Write { disk, source }.into())
    }

    /// The points of a machine; made when there are none yet.
    pub fn points(&self, machine: MachineId) -> Result<Arc<PointStore>, PointError> {
        if let Some(points) = self.machines.read().expect("no panic while held").get(&machine) {
            return Ok(points.clone());
        }
        let mut machines = self.machines.write().expect("no panic while held");
        if let Some(points) = machines.get(&machine) {
            return Ok(points.clone());
        }
        let name = format!("{MACHINES}/{machine}");
        let open = || {
            self.storage.create_folder(&name)?;
            self.storage.sync_folder(MACHINES)?;
            PointStore::open(self.storage.folder(&name), machine, true)
        };
        let (points, damaged) = open().map_err(|source| PointError::Store { machine, source })?;
        if damaged > 0 {
            tracing::warn!(%machine, lines = damaged, "lines of the point log were damaged and left out");
            self.damaged_lines.lock().expect("no panic while held").insert(machine, damaged);
        }
        let points = Arc::new(points);
        machines.insert(machine, points.clone());
        Ok(points)
    }

    /// Removes the points of a machine that has no replica any more.
    pub fn remove_points(&self, machine: MachineId) -> Result<(), SetError> {
        let mut machines = self.machines.write().expect("no panic while held");
        if let Some(replica) = self.of_machine(machine).first() {
            let what = "it still has a replica of the machine whose points are to go".to_owned();
            return Err(ReplicaError::Busy { disk: replica.disk(), what }.into());
        }
        machines.remove(&machine);
        let name = format!("{MACHINES}/{machine}");
        let remove = || {
            if self.storage.exists(&name)? {
                self.storage.remove_folder(&name)?;
                self.storage.sync_folder(MACHINES)?;
            }
            Ok(())
        };
        remove().map_err(|source| PointError::Store { machine, source }.into())
    }

    /// Makes a disk's cuts durable and its marks points. A failure to store points does not take the durability back:
    /// they are found again in the journal by the next maintenance.
    pub fn sync(&self, replica: &Replica) -> Result<(DurableState, Vec<Point>), JournalError> {
        let synced = replica.sync()?;
        if synced.marks.is_empty() {
            return Ok((synced.durable, Vec::new()));
        }
        let points = self.points(replica.machine()).and_then(|points| points.hold(synced.marks));
        let points = points.unwrap_or_else(|error| {
            tracing::error!(disk = %replica.disk(), %error, "points could not be stored");
            self.unheld.lock().expect("no panic while held").insert(replica.disk());
            Vec::new()
        });
        Ok((synced.durable, points))
    }

    /// What a selector names. A machine of one disk recovers to any consistent cut; one of several to their marks. Where the last state
    /// shows damage, the lowest RPO is that of a point before it.
    pub fn resolve(&self, machine: MachineId, selector: PointSelector) -> Result<Place, SetError> {
        let points = self.points(machine)?;
        let until = match selector {
            PointSelector::Time(time) => Some(time),
            PointSelector::LowestRpo => Some(Timestamp(u64::MAX)),
            _ => None,
        };
        if let (Some(time), [replica]) = (until, &self.of_machine(machine)[..])
            // One that cannot be opened still is a disk of the machine: its points tell.
            && let marks = points.all()
            && marks.iter().all(|point| point.disks.len() == 1)
            && let cut = replica.cut_at(time)?.ok_or(PointError::Absent { machine, selector })?
            && (selector != PointSelector::LowestRpo || !replica.is_touched(cut))
        {
            let marked = marks.into_iter().find(|point| point.cut_of(replica.disk()) == Some(cut));
            if let Some(point) = marked {
                return Ok(point.into());
            }
            let (_, time) = replica.position_of(cut)?;
            let cuts = vec![(replica.disk(), cut)];
            return Ok(Place { machine, id: None, time, consistency: PointConsistency::Crash, cuts });
        }
        let point = points.resolve(selector)?;
        for held in &point.disks {
            // A disk that is not here any more has its own error, when it is opened.
            if self.get(held.disk).is_ok_and(|replica| !replica.may_hold(held)) {
                let what = format!("the journal lost what point {} was of", point.id);
                return Err(ReplicaError::NotViewable { disk: held.disk, cut: held.cut, what }.into());
            }
        }
        Ok(point.into())
    }

    /// Views of all disks at a place. All of them are pinned when this returns.
    pub fn views(&self, place: &Place) -> Result<BTreeMap<DiskId, View>, SetError> {
        place.cuts.iter().map(|&(disk, cut)| Ok((disk, self.get(disk)?.view(cut)?))).collect()
    }

    /// Thins a machine's points and folds its disks as far as they allow.
    pub fn maintain(
        &self,
        machine: MachineId,
        retention: &Retention,
        now: Timestamp,
        stop: &Stop,
    ) -> Result<Maintenance, SetError> {
        let _one = self.maintaining.lock().expect("no panic while held");
        let store = self.points(machine)?;
        let replicas = self.of_machine(machine);
        let mut made = Vec::new();
        for replica in &replicas {
            let unheld = self.unheld.lock().expect("no panic while held").contains(&replica.disk());
            if unheld {
                made.extend(self.hold_again(replica)?);
            }
        }
        let pinned: HashMap<DiskId, Vec<u64>> =
            replicas.iter().map(|replica| (replica.disk(), replica.pinned_cuts())).collect();
        let is_pinned = |point: &Point| {
            point.disks.iter().any(|held| pinned.get(&held.disk).is_some_and(|cuts| cuts.contains(&held.cut)))
        };
        let points = store.all();
        // The last state that all disks of the machine have in common, even where newer marks are of some disks alone. While a disk
        // that was added is replicated for the first time there is none: then the last one of most disks stays.
        let present = self.present(machine);
        let covers = |point: &Point| present.iter().filter(|replica| point.cut_of(replica.disk()).is_some()).count();
        let newest_common = points.iter().filter(|point| !point.damaged).max_by_key(|point| covers(point)).cloned();
        let is_common = |point: &Point| newest_common.as_ref().is_some_and(|common| common.id == point.id);
        let dropped = retention.expired(&points, now, |point| is_pinned(point) || is_common(point));
        store.drop_points(&dropped)?;
        let points = store.all();
        let window_start = retention.window_start(now);
        let mut folds = Vec::new();
        for replica in &replicas {
            if stop.is_stopped() {
                break;
            }
            let disk = replica.disk();
            let holds = self.holds(replica, &points, replicas.len() == 1, window_start, now).map(|mut holds| {
                let common = newest_common.as_ref().and_then(|point| point.cut_of(disk));
                holds.newest_complete = common.map_or(holds.newest_complete, Some);
                holds
            });
            let result = holds.and_then(|holds| {
                let manifest = replica.manifest();
                match plan::target(manifest.base.cut, holds, |cut| replica.consistent_at_or_before(cut)) {
                    Some(target) => fold::fold(replica, target, stop).map(Some),
                    // What was begun is finished, whatever holds now.
                    None if manifest.fold_to.is_some() => fold::fold(replica, manifest.floor(), stop).map(Some),
                    None => Ok(None),
                }
            });
            match result {
                Ok(None) => {}
                Ok(Some(folded)) => {
                    replica.forget_damage();
                    replica.check_need();
                    folds.push(FoldOutcome { disk, result: Ok(folded) });
                }
                Err(error) => folds.push(FoldOutcome { disk, result: Err(error) }),
            }
        }
        self.remove_left(&replicas, &points);
        Ok(Maintenance { made, dropped, folds })
    }

    /// Disks that were taken out of their machine and are in no point any more. What cannot go now goes later.
    fn remove_left(&self, replicas: &[Arc<Replica>], points: &[Point]) {
        // Whoever takes a disk in again waits, or comes first.
        let mut left = self.left.write().expect("no panic while held");
        for disk in replicas.iter().map(|replica| replica.disk()) {
            let is_needed = points.iter().any(|point| point.cut_of(disk).is_some());
            let is_unheld = self.unheld.lock().expect("no panic while held").contains(&disk);
            if !left.contains(&disk) || is_needed || is_unheld {
                continue;
            }
            match self.remove(disk) {
                Ok(()) => {
                    left.remove(&disk);
                    tracing::info!(%disk, "the replica of a disk that left its machine is removed: no point needs it");
                }
                Err(SetError::Replica(ReplicaError::Busy { .. })) => {}
                Err(error) => {
                    tracing::warn!(%disk, %error, "the replica of a disk that left its machine cannot be removed")
                }
            }
        }
    }

    fn holds(
        &self,
        replica: &Replica,
        points: &[Point],
        alone: bool,
        window_start: Timestamp,
        now: Timestamp,
    ) -> Result<plan::Holds, ReplicaError> {
        let disk = replica.disk();
        let newest_complete = points.iter().rev().filter(|point| !point.damaged).find_map(|point| point.cut_of(disk));
        let window_start = if alone {
            replica.cut_at(window_start)?
        } else {
            let times = effective_times(points, now);
            let before = points.iter().zip(times).rev().filter(|(_, time)| *time <= window_start);
            before.map(|(point, _)| point).find_map(|point| point.cut_of(disk))
        };
        Ok(plan::Holds {
            newest_complete,
            // Those of any-time recovery as well: the one that the window begins with lies before the window's first cut.
            oldest_retained: points
                .iter()
                .filter(|point| point.keep || !point.damaged)
                .filter_map(|point| point.cut_of(disk))
                .min(),
            window_start,
            oldest_pin: replica.oldest_pin(),
        })
    }
}

/// What a finding of damage came to.
#[derive(Debug, Default)]
pub struct Quarantined {
    /// Places that were not known to be damaged before.
    pub new: usize,
    /// Recovery points that show what was found.
    pub points: Vec<MarkId>,
}

/// Damage, and what is done about it.
impl ReplicaSet {
    /// Names damage, flags the points that show it, and notes what has to come again from the source. `None`: it was
    /// stopped; finding the damage again does the rest.
    pub fn quarantine(
        &self,
        replica: &Replica,
        findings: &[Finding],
        stop: &Stop,
    ) -> Result<Option<Quarantined>, PointError> {
        let disk = replica.disk();
        let new = replica.note_damage(findings, Timestamp::now());
        let store = self.points(replica.machine())?;
        let points: Vec<_> = store.all().into_iter().filter_map(|point| Some((point.cut_of(disk)?, point))).collect();
        let mut cuts: Vec<u64> = points.iter().map(|(cut, _)| *cut).collect();
        cuts.sort_unstable();
        let Some(touched) = touched(replica, findings, &cuts, stop) else { return Ok(None) };
        let hit: Vec<&Point> = points.iter().filter(|(cut, _)| touched.contains(cut)).map(|(_, point)| point).collect();
        store.flag_all_damaged(&hit.iter().map(|point| point.id).collect::<Vec<_>>())?;
        let kept: Vec<&Point> = hit.into_iter().filter(|point| point.keep).collect();
        for damage in &new {
            let times = kept.first().zip(kept.last()).map(|(first, last)| format!("{} to {}", first.time, last.time));
            let needed_bytes = replica.statistics().needed_bytes;
            tracing::error!(%disk, file = damage.file, what = damage.what, points = kept.len(), times, needed_bytes, "damaged data is quarantined");
        }
        replica.end_segment_of(findings);
        Ok(Some(Quarantined { new: new.len(), points: kept.iter().map(|point| point.id).collect() }))
    }

    /// At the end of the process: what is unfinished goes, and every segment says what it holds.
    pub fn end_segments(&self) {
        for replica in self.replicas() {
            if let Err(error) = replica.end_segment() {
                tracing::warn!(disk = %replica.disk(), %error, "the active segment stays as it is");
            }
        }
    }

    /// Looks after every replica: indexes are merged and repaired, what reads found to be damaged is looked into. Cheap when
    /// there is nothing to do.
    pub fn tend(&self, stop: &Stop) {
        for replica in self.replicas() {
            if stop.is_stopped() {
                return;
            }
            let disk = replica.disk();
            if let Err(error) = self.tend_replica(&replica, stop) {
                // Said once for each message: a full volume stays full for a while.
                let message = error.to_string();
                let before = self.untended.lock().expect("no panic while held").insert(disk, message.clone());
                if before.as_ref() != Some(&message) {
                    tracing::warn!(%disk, %error, "indexes cannot be looked after");
                }
            } else {
                self.untended.lock().expect("no panic while held").remove(&disk);
            }
        }
    }

    fn tend_replica(&self, replica: &Replica, stop: &Stop) -> Result<(), SetError> {
        let mut report = ScrubReport::default();
        for suspect in replica.take_suspects() {
            look_into(replica, &suspect, stop, &mut report);
        }
        let (findings, mut indexes) = report.take_findings();
        if !findings.is_empty() {
            self.quarantine(replica, &findings, stop)?;
        }
        indexes.extend(replica.parts().iter().filter_map(|part| match part {
            Part::Sealed(sealed) if sealed.is_index_damaged() => Some(sealed.first_cut()),
            _ => None,
        }));
        for first in indexes {
            replica.repair_segment(first)?;
        }
        replica.merge_indexes(stop)?;
        Ok(())
    }
}
