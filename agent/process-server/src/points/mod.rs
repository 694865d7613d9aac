#![doc = include_str!("FORMAT.md")]

mod log;
mod retention;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tidemark_base::storage::Storage;
use tidemark_base::sync::Mutex;
use tidemark_base::{DiskId, MachineId, MarkId, Position, Timestamp};
use tidemark_proto::replication::{Consistency, Mark};

use log::{PointLog, Record};
pub use retention::{Retention, effective_times};

/// Marks that wait for other disks of their machine. A disk that is away for longer loses points, not data.
const PENDING_MAX: usize = 4096;
/// A log with more dead lines than this is rewritten.
const DEAD_LINES_MAX: usize = 4096;
/// Dropped points that are remembered: more than marks lie between the base and the oldest point (two hours of one a second).
const DROPPED_MAX: usize = 16 << 10;

/// A mark as one disk holds it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PointDisk {
    pub disk: DiskId,
    /// The cut that ends at the mark.
    pub cut: u64,
    pub position: Position,
    /// What the guest wrote to this disk since the kept point before.
    pub changed_bytes: u64,
}

/// A complete mark.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Point {
    pub id: MarkId,
    pub machine: MachineId,
    pub time: Timestamp,
    /// `crash` or `app`.
    pub consistency: PointConsistency,
    pub label: String,
    /// False: only a place of any-time recovery.
    pub keep: bool,
    pub disks: Vec<PointDisk>,
    #[serde(default)]
    pub locked: bool,
    #[serde(default)]
    pub damaged: bool,
    /// When a machine last booted from it and showed a sign of life.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proven: Option<Timestamp>,
    /// Made behind the barrier of a group, whose other machines may have a point with this id.
    #[serde(default, skip_serializing_if = "is_false")]
    pub group: bool,
    /// They all have.
    #[serde(default, skip_serializing_if = "is_false")]
    pub confirmed: bool,
}

fn is_false(value: &bool) -> bool {
    !value
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum PointConsistency {
    #[serde(rename = "crash")]
    Crash,
    #[serde(rename = "app")]
    Application,
}

impl From<Consistency> for PointConsistency {
    fn from(consistency: Consistency) -> Self {
        match consistency {
            Consistency::Crash => PointConsistency::Crash,
            Consistency::Application => PointConsistency::Application,
        }
    }
}

impl Point {
    pub fn cut_of(&self, disk: DiskId) -> Option<u64> {
        self.disks.iter().find(|held| held.disk == disk).map(|held| held.cut)
    }

    pub fn changed_bytes(&self) -> u64 {
        self.disks.iter().fold(0, |sum: u64, disk| sum.saturating_add(disk.changed_bytes))
    }

    /// Whether this point is after the other: cuts of a disk that both have decide, not clocks.
    fn is_after(&self, other: &Point) -> bool {
        let common = self.disks.iter().find_map(|held| Some((held.cut, other.cut_of(held.disk)?)));
        common.map_or(self.time > other.time, |(ours, theirs)| ours > theirs)
    }
}

/// Of points in order, the newest that was made behind a group's barrier, and the newest of these that all of the group have.
pub fn of_group(points: &[Point]) -> (Option<MarkId>, Option<MarkId>) {
    let newest = |which: fn(&Point) -> bool| points.iter().rev().find(|point| !point.damaged && which(point));
    (newest(|point| point.group).map(|point| point.id), newest(|point| point.confirmed).map(|point| point.id))
}

/// A durable, consistent mark of one disk, as its journal reports it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HeldMark {
    pub mark: Mark,
    pub held: PointDisk,
    /// False: data that the disk shows at this mark is damaged.
    pub whole: bool,
}

/// POINT as a user names it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PointSelector {
    Id(MarkId),
    Latest,
    LatestApp,
    /// The last consistent state that arrived, kept as a point or not.
    LowestRpo,
    /// The last position at or before.
    Time(Timestamp),
}

impl FromStr for PointSelector {
    type Err = PointError;

    fn from_str(text: &str) -> Result<Self, PointError> {
        match text {
            "latest" => Ok(PointSelector::Latest),
            "latest-app" => Ok(PointSelector::LatestApp),
            "lowest-rpo" => Ok(PointSelector::LowestRpo),
            _ => (text.parse().map(PointSelector::Id))
                .or_else(|_| Timestamp::parse(text).map(PointSelector::Time))
                .map_err(|_| PointError::Selector { text: text.to_owned() }),
        }
    }
}

impl fmt::Display for PointSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PointSelector::Id(id) => id.fmt(f),
            PointSelector::Latest => f.write_str("latest"),
            PointSelector::LatestApp => f.write_str("latest-app"),
            PointSelector::LowestRpo => f.write_str("lowest-rpo"),
            PointSelector::Time(time) => time.fmt(f),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum PointError {
    #[error("{text:?} is not a point")]
    Selector { text: String },
    #[error("machine {machine} has no point {selector}")]
    Absent { machine: MachineId, selector: PointSelector },
    #[error("the points of machine {machine} cannot be stored")]
    Store { machine: MachineId, source: io::Error },
}

impl PointError {
    pub fn help(&self) -> &'static str {
        match self {
            PointError::Selector { .. } => {
                "give an id, `latest`, `latest-app`, or a time such as 2026-11-21T10:04:05.250Z"
            }
            PointError::Absent { .. } => "see `tidemark point list` for those there are",
            PointError::Store { .. } => "check the process server's volume, then restart the process server",
        }
    }
}

/// The points of one machine.
pub struct PointStore {
    machine: MachineId,
    state: Mutex<State>,
}

struct State {
    log: PointLog,
    /// In order, oldest first.
    points: Vec<Point>,
    /// Points that are there and those dropped: reconciling must not bring the latter back.
    known: HashSet<MarkId>,
    dropped: VecDeque<MarkId>,
    pending: HashMap<MarkId, Pending>,
    arrivals: u64,
}

struct Pending {
    arrival: u64,
    mark: Mark,
    damaged: bool,
    held: BTreeMap<DiskId, PointDisk>,
}

impl PointStore {
    /// Opens the machine's folder, which exists. Returns how many lines of the log were damaged.
    pub fn open(storage: Arc<dyn Storage>, machine: MachineId, write: bool) -> io::Result<(Self, usize)> {
        let (log, records, damaged) = PointLog::open(storage, write)?;
        let mut state = State {
            log,
            points: Vec::new(),
            known: HashSet::new(),
            dropped: VecDeque::new(),
            pending: HashMap::new(),
            arrivals: 0,
        };
        for record in records {
            state.apply(record);
        }
        Ok((Self { machine, state: Mutex::new(state) }, damaged))
    }

    pub fn machine(&self) -> MachineId {
        self.machine
    }

    fn state(&self) -> tidemark_base::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }

    fn store_error(&self, source: io::Error) -> PointError {
        PointError::Store { machine: self.machine, source }
    }

    /// A disk holds a mark. Returns the points that this completed: kept ones are durable.
    pub fn hold(&self, marks: impl IntoIterator<Item = HeldMark>) -> Result<Vec<Point>, PointError> {
        let mut state = self.state();
        let mut complete = Vec::new();
        for HeldMark { mark, held, whole } in marks {
            if mark.machine != self.machine || state.known.contains(&mark.id) || !mark.disks.contains(&held.disk) {
                continue;
            }
            complete.extend(state.hold(mark, held, whole));
        }
        if complete.is_empty() {
            return Ok(complete);
        }
        let records: Vec<Record> = complete.iter().cloned().map(Record::Point).collect();
        let durable = complete.iter().any(|point| point.keep);
        state.append(&records, durable).map_err(|source| self.store_error(source))?;
        records.into_iter().for_each(|record| state.apply(record));
        Ok(complete)
    }

    /// Reads the log again. What is wrong with it is returned, and it is written again from memory.
    pub fn check(&self) -> Result<Option<String>, PointError> {
        let mut state = self.state();
        let wrong = state.log.check().map_err(|source| self.store_error(source))?;
        if wrong.is_some() {
            state.compact().map_err(|source| self.store_error(source))?;
        }
        Ok(wrong)
    }

    /// All complete points and places, oldest first.
    pub fn all(&self) -> Vec<Point> {
        self.state().points.clone()
    }

    /// The recovery points, oldest first.
    pub fn list(&self) -> Vec<Point> {
        self.state().points.iter().filter(|point| point.keep).cloned().collect()
    }

    pub fn get(&self, id: MarkId) -> Option<Point> {
        self.state().points.iter().find(|point| point.id == id).cloned()
    }

    /// The point that a selector names; for a time the last mark at or before it, kept or not.
    pub fn resolve(&self, selector: PointSelector) -> Result<Point, PointError> {
        let state = self.state();
        let mut newest_first = state.points.iter().rev();
        let found = match selector {
            PointSelector::Id(id) => newest_first.find(|point| point.id == id),
            PointSelector::Latest => newest_first.find(|point| point.keep && !point.damaged),
            PointSelector::LatestApp => newest_first
                .find(|point| point.keep && !point.damaged && point.consistency == PointConsistency::Application),
            PointSelector::LowestRpo => newest_first.find(|point| !point.damaged),
            PointSelector::Time(time) => newest_first.find(|point| point.time <= time && !point.damaged),
        };
        found.cloned().ok_or(PointError::Absent { machine: self.machine, selector })
    }

    pub fn lock(&self, id: MarkId, locked: bool) -> Result<Point, PointError> {
        self.record(id, Record::Lock { id, locked })
    }

    pub fn flag_damaged(&self, id: MarkId, damaged: bool) -> Result<Point, PointError> {
        self.record(id, Record::Flag { id, damaged })
    }

    /// A machine booted from it and showed a sign of life.
    pub fn prove(&self, id: MarkId, time: Timestamp) -> Result<Point, PointError> {
        self.record(id, Record::Proven { id, time })
    }

    /// Every machine of the group has it. One that was not made behind a barrier never is the group's.
    pub fn confirm(&self, id: MarkId) -> Result<Point, PointError> {
        match self.get(id) {
            Some(point) if point.confirmed => Ok(point),
            Some(point) if point.group => self.record(id, Record::Confirm { id }),
            _ => Err(PointError::Absent { machine: self.machine, selector: PointSelector::Id(id) }),
        }
    }

    /// The machine is in no group any more: nothing is kept for one.
    pub fn leave_group(&self) -> Result<(), PointError> {
        let mut state = self.state();
        if !state.points.iter().any(|point| point.confirmed) {
            return Ok(());
        }
        let record = Record::LeaveGroup {};
        state.append(std::slice::from_ref(&record), true).map_err(|source| self.store_error(source))?;
        state.apply(record);
        Ok(())
    }

    /// Marks points as damaged, durably. Those that are, or are gone, are left as they are.
    pub fn flag_all_damaged(&self, ids: &[MarkId]) -> Result<usize, PointError> {
        let mut state = self.state();
        let whole = |id: &MarkId| state.points.iter().any(|point| point.id == *id && !point.damaged);
        let records: Vec<Record> =
            ids.iter().filter(|id| whole(id)).map(|&id| Record::Flag { id, damaged: true }).collect();
        if records.is_empty() {
            return Ok(0);
        }
        state.append(&records, true).map_err(|source| self.store_error(source))?;
        let flagged = records.len();
        records.into_iter().for_each(|record| state.apply(record));
        Ok(flagged)
    }

    fn record(&self, id: MarkId, record: Record) -> Result<Point, PointError> {
        let mut state = self.state();
        let find = |state: &State| state.points.iter().find(|point| point.id == id).cloned();
        if find(&state).is_none() {
            return Err(PointError::Absent { machine: self.machine, selector: PointSelector::Id(id) });
        }
        state.append(std::slice::from_ref(&record), true).map_err(|source| self.store_error(source))?;
        state.apply(record);
        Ok(find(&state).expect("just found"))
    }

    /// Drops points; durable when this returns, so that what they need may be folded away.
    pub fn drop_points(&self, ids: &[MarkId]) -> Result<(), PointError> {
        if ids.is_empty() {
            return Ok(());
        }
        let mut state = self.state();
        let record = Record::Drop { ids: ids.to_vec() };
        state.append(std::slice::from_ref(&record), true).map_err(|source| self.store_error(source))?;
        state.apply(record);
        if state.log.lines > 2 * state.points.len() + DEAD_LINES_MAX {
            state.compact().map_err(|source| self.store_error(source))?;
        }
        Ok(())
    }
}

impl State {
    fn hold(&mut self, mark: Mark, held: PointDisk, whole: bool) -> Option<Point> {
        self.arrivals += 1;
        let (id, disks) = (mark.id, mark.disks.len());
        let arrival = self.arrivals;
        let new = || Pending { arrival, mark, damaged: false, held: BTreeMap::new() };
        let pending = self.pending.entry(id).or_insert_with(new);
        pending.damaged |= !whole;
        pending.held.insert(held.disk, held);
        if pending.held.len() < disks {
            if self.pending.len() > PENDING_MAX {
                // Places of any-time recovery go before points that somebody asked for.
                let rank = |pending: &Pending| (pending.mark.keep, pending.arrival);
                let oldest = self.pending.iter().min_by_key(|(_, pending)| rank(pending)).map(|(&id, _)| id);
                oldest.and_then(|id| self.pending.remove(&id));
            }
            return None;
        }
        let Pending { mark, held, damaged, .. } = self.pending.remove(&id)?;
        Some(Point {
            id,
            machine: mark.machine,
            time: mark.time,
            consistency: mark.consistency.into(),
            label: mark.label,
            keep: mark.keep,
            disks: held.into_values().collect(),
            locked: false,
            damaged,
            proven: None,
            group: mark.group,
            confirmed: false,
        })
    }

    fn apply(&mut self, record: Record) {
        let find = |points: &mut Vec<Point>, id| points.iter_mut().position(|point| point.id == id);
        match record {
            Record::Point(point) => {
                if self.known.insert(point.id) {
                    let at = self.points.iter().rposition(|other| point.is_after(other)).map_or(0, |index| index + 1);
                    self.points.insert(at, point);
                }
            }
            Record::Lock { id, locked } => {
                if let Some(index) = find(&mut self.points, id) {
                    self.points[index].locked = locked;
                }
            }
            Record::Flag { id, damaged } => {
                if let Some(index) = find(&mut self.points, id) {
                    self.points[index].damaged = damaged;
                }
            }
            Record::Proven { id, time } => {
                if let Some(index) = find(&mut self.points, id) {
                    self.points[index].proven = Some(time);
                }
            }
            Record::Confirm { id } => {
                if let Some(index) = find(&mut self.points, id) {
                    self.points[index].confirmed = true;
                }
            }
            Record::LeaveGroup {} => self.points.iter_mut().for_each(|point| point.confirmed = false),
            Record::Drop { ids } => {
                let gone: HashSet<MarkId> = ids.iter().copied().collect();
                self.points.retain(|point| !gone.contains(&point.id));
                self.known.extend(&ids);
                self.dropped.extend(ids);
                while self.dropped.len() > DROPPED_MAX {
                    self.dropped.pop_front().map(|id| self.known.remove(&id));
                }
            }
        }
    }

    /// Appends; a log that failed before is first replaced by a new one, which holds what is known.
    fn append(&mut self, records: &[Record], durable: bool) -> io::Result<()> {
        if self.log.has_failed() {
            self.compact()?;
        }
        self.log.append(records, durable)
    }

    fn compact(&mut self) -> io::Result<()> {
        let points = self.points.iter().cloned().map(Record::Point);
        // What was dropped lately stays known, or reconciling would bring it back from the journals.
        let dropped = Record::Drop { ids: self.dropped.iter().copied().collect() };
        let records: Vec<Record> = points.chain([dropped]).collect();
        self.log.compact(&records)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemark_base::storage::RealStorage;

    pub fn point(number: u64, time: Timestamp, keep: bool) -> Point {
        let position = tidemark_base::Epoch([1; 16]).start();
        let disk = DiskId::from_bytes([1; 16]);
        Point {
            id: MarkId::random(),
            machine: MachineId::from_bytes([2; 16]),
            time,
            consistency: PointConsistency::Crash,
            label: String::new(),
            keep,
            disks: vec![PointDisk { disk, cut: number, position, changed_bytes: 0 }],
            locked: false,
            damaged: false,
            proven: None,
            group: false,
            confirmed: false,
        }
    }

    fn mark(disks: &[DiskId], keep: bool, time: u64) -> Mark {
        Mark {
            id: MarkId::random(),
            machine: MachineId::from_bytes([2; 16]),
            disks: disks.to_vec(),
            consistency: Consistency::Crash,
            label: "label".to_owned(),
            keep,
            time: Timestamp(time),
            group: false,
        }
    }

    fn held(mark: &Mark, disk: DiskId, cut: u64) -> HeldMark {
        let position = tidemark_base::Epoch([1; 16]).start();
        HeldMark { mark: mark.clone(), held: PointDisk { disk, cut, position, changed_bytes: 10 }, whole: true }
    }

    fn open(folder: &tempfile::TempDir) -> (PointStore, usize) {
        let storage = RealStorage::open_folder(folder.path());
        PointStore::open(storage, MachineId::from_bytes([2; 16]), true).unwrap()
    }

    #[test]
    fn a_mark_is_a_point_when_every_disk_holds_it() {
        let folder = tempfile::tempdir().unwrap();
        let (store, _) = open(&folder);
        let disks = [DiskId::from_bytes([1; 16]), DiskId::from_bytes([2; 16])];
        let (first, second) = (mark(&disks, true, 10), mark(&disks, false, 20));
        assert_eq!(store.hold([held(&first, disks[0], 1), held(&second, disks[0], 2)]).unwrap(), []);
        assert!(store.resolve(PointSelector::Latest).is_err());
        let complete = store.hold([held(&first, disks[1], 5)]).unwrap();
        assert_eq!(complete[0].id, first.id);
        assert_eq!(complete[0].changed_bytes(), 20);
        store.hold([held(&second, disks[1], 6), held(&first, disks[1], 5)]).unwrap();
        assert_eq!(store.list().len(), 1);
        assert_eq!(store.resolve(PointSelector::Time(Timestamp(25))).unwrap().id, second.id);
        assert_eq!(store.resolve(PointSelector::Time(Timestamp(19))).unwrap().id, first.id);
        assert!(store.resolve(PointSelector::Time(Timestamp(9))).is_err());
        store.lock(first.id, true).unwrap();
        drop(store);
        let (store, damaged) = open(&folder);
        assert_eq!((store.all().len(), damaged), (2, 0));
        assert!(store.get(first.id).unwrap().locked);
    }

    #[test]
    fn a_disk_that_was_away_for_long_still_completes_the_points_that_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let (store, _) = open(&folder);
        let disks = [DiskId::from_bytes([1; 16]), DiskId::from_bytes([2; 16])];
        let kept = mark(&disks, true, 1);
        store.hold([held(&kept, disks[0], 1)]).unwrap();
        let others =
            (0..2 * PENDING_MAX as u64).map(|number| held(&mark(&disks, false, 2 + number), disks[0], 2 + number));
        store.hold(others).unwrap();
        assert_eq!(store.state().pending.len(), PENDING_MAX);
        assert_eq!(store.hold([held(&kept, disks[1], 1)]).unwrap()[0].id, kept.id);
    }

    #[test]
    fn a_torn_tail_goes_and_a_damaged_line_is_counted() {
        let folder = tempfile::tempdir().unwrap();
        let disk = DiskId::from_bytes([1; 16]);
        let marks: Vec<Mark> = (0..3).map(|number| mark(&[disk], true, number)).collect();
        let (store, _) = open(&folder);
        marks.iter().enumerate().for_each(|(cut, mark)| {
            store.hold([held(mark, disk, cut as u64 + 1)]).unwrap();
        });
        drop(store);
        let path = folder.path().join("points");
        let mut content = std::fs::read(&path).unwrap();
        content.extend_from_slice(b"0123 half a li");
        content[50] ^= 1;
        let file = RealStorage::open_folder(folder.path()).open("points", tidemark_base::storage::OpenMode::ReadWrite);
        file.unwrap().write_at(0, &content).unwrap();
        let (store, damaged) = open(&folder);
        assert_eq!((store.all().len(), damaged), (2, 1));
        // The journal still has the mark: reconciling puts it back where it was.
        store.hold([held(&marks[0], disk, 1)]).unwrap();
        let ids: Vec<MarkId> = store.all().iter().map(|point| point.id).collect();
        assert_eq!(ids, marks.iter().map(|mark| mark.id).collect::<Vec<_>>());
    }

    #[test]
    fn only_what_was_made_behind_a_barrier_becomes_a_point_of_the_group() {
        let folder = tempfile::tempdir().unwrap();
        let disk = DiskId::from_bytes([1; 16]);
        let (plain, of_group) = (mark(&[disk], true, 1), Mark { group: true, ..mark(&[disk], true, 2) });
        let (store, _) = open(&folder);
        store.hold([held(&plain, disk, 1), held(&of_group, disk, 2)]).unwrap();
        assert!(store.confirm(plain.id).is_err() && store.confirm(MarkId::random()).is_err());
        assert!(!store.get(of_group.id).unwrap().confirmed);
        assert!(store.confirm(of_group.id).unwrap().confirmed && store.confirm(of_group.id).unwrap().confirmed);
        store.state().compact().unwrap();
        drop(store);
        let (store, _) = open(&folder);
        let found: Vec<(bool, bool)> = store.all().iter().map(|point| (point.group, point.confirmed)).collect();
        assert_eq!(found, [(false, false), (true, true)]);
        assert_eq!(super::of_group(&store.list()), (Some(of_group.id), Some(of_group.id)));
        store.leave_group().unwrap();
        drop(store);
        let (store, _) = open(&folder);
        assert_eq!(super::of_group(&store.list()), (Some(of_group.id), None));
    }

    #[test]
    fn what_was_dropped_does_not_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let disk = DiskId::from_bytes([1; 16]);
        let gone = mark(&[disk], true, 1);
        let (store, _) = open(&folder);
        store.hold([held(&gone, disk, 1)]).unwrap();
        store.drop_points(&[gone.id]).unwrap();
        store.state().compact().unwrap();
        drop(store);
        let (store, _) = open(&folder);
        assert_eq!(store.hold([held(&gone, disk, 1)]).unwrap(), []);
        assert!(store.all().is_empty());
    }

    #[test]
    fn selectors_are_what_users_type() {
        assert_eq!("latest".parse::<PointSelector>().unwrap(), PointSelector::Latest);
        assert!(matches!("2026-11-21T10:04:05.250Z".parse(), Ok(PointSelector::Time(_))));
        let id = MarkId::random();
        assert_eq!(id.to_string().parse::<PointSelector>().unwrap(), PointSelector::Id(id));
        assert!("yesterday".parse::<PointSelector>().is_err());
    }
}
