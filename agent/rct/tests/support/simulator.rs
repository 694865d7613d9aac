//! A Hyper-V host in memory, which tracks changes by rules of its own: what it tells is not taken from what the code under test does.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use tidemark_base::Extent;
use tidemark_rct::RctError;
use tidemark_rct::hypervisor::{Checkpoint, Disk, Facts, Found, Hypervisor, Image, Part, ReferencePoint};

pub const MACHINE: &str = "5BFDE23B-CE75-4303-B54F-6C18394F105C";
/// What is told as changed is whole granules.
pub const GRANULE: u64 = 8192;

/// When a state gets an id: Microsoft's documentation does not say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Seals {
    AtCheckpoint,
    AtConversion,
}

pub struct Host {
    state: Mutex<State>,
    seals: Seals,
}

pub struct State {
    pub is_off: bool,
    pub is_absent: bool,
    pub disks: Vec<SimulatedDisk>,
    checkpoints: Vec<Made>,
    pub points: Vec<ReferencePoint>,
    pub free_bytes: u64,
    /// Areas in one answer.
    pub areas_max: usize,
    pub faults: Faults,
    /// Answers to questions for changes.
    pub answers: u64,
    /// Checkpoints that were made for us.
    pub count: u64,
    pub quiet: bool,
    serial: u64,
}

#[derive(Default)]
pub struct Faults {
    /// The next question for changes fails so.
    pub query: Option<String>,
    /// No checkpoint is made.
    pub checkpoint: bool,
    /// None of applications that are quiet.
    pub quiet: bool,
    /// It is made, and nobody hears of it.
    pub checkpoint_unheard: bool,
    pub convert: bool,
    pub convert_unheard: bool,
}

pub struct SimulatedDisk {
    pub path: PathBuf,
    pub uuid: String,
    pub content: Vec<u8>,
    pub parent: Option<PathBuf>,
    tracking: Option<Tracking>,
}

/// By id, what changed since.
#[derive(Clone)]
struct Tracking {
    since: BTreeMap<String, BTreeSet<u64>>,
    newest: String,
}

struct Made {
    told: Checkpoint,
    frozen: Vec<Frozen>,
}

struct Frozen {
    uuid: String,
    content: Vec<u8>,
    tracking: Option<Tracking>,
    /// What changed since the checkpoint.
    after: BTreeSet<u64>,
}

impl SimulatedDisk {
    fn granules(offset: u64, bytes: usize) -> std::ops::Range<u64> {
        offset / GRANULE..(offset + bytes as u64).div_ceil(GRANULE)
    }

    fn note(&mut self, granules: impl Iterator<Item = u64> + Clone) {
        for changed in self.tracking.iter_mut().flat_map(|tracking| tracking.since.values_mut()) {
            changed.extend(granules.clone());
        }
    }
}

impl State {
    fn id(&mut self, kind: &str) -> String {
        self.serial += 1;
        format!("{kind}:5bfde23b:ce75:{:08x}", self.serial)
    }

    fn made(&self, id: &str) -> Option<&Made> {
        self.checkpoints.iter().find(|made| made.told.id == id)
    }

    fn make(&mut self, name: &str, is_recovery: bool, seals: Seals) -> Checkpoint {
        let id = self.id("checkpoint");
        let mut frozen = Vec::new();
        for disk in 0..self.disks.len() {
            let sealed = self.id("rctX");
            let disk = &mut self.disks[disk];
            if let Some(tracking) = disk.tracking.as_mut().filter(|_| seals == Seals::AtCheckpoint && is_recovery) {
                tracking.since.insert(sealed.clone(), BTreeSet::new());
                tracking.newest = sealed;
            }
            let (uuid, content) = (disk.uuid.clone(), disk.content.clone());
            frozen.push(Frozen { uuid, content, tracking: disk.tracking.clone(), after: BTreeSet::new() });
        }
        let disks = self.disks.iter().map(|disk| disk.path.clone()).collect();
        let told = Checkpoint { id, name: name.to_owned(), is_recovery, disks };
        self.checkpoints.push(Made { told: told.clone(), frozen });
        told
    }

    fn convert(&mut self, id: &str, seals: Seals) -> Option<ReferencePoint> {
        let at = self.checkpoints.iter().position(|made| made.told.id == id)?;
        let made = self.checkpoints.remove(at);
        let mut change_ids = Vec::new();
        for (number, frozen) in made.frozen.into_iter().enumerate() {
            let sealed = self.id("rctX");
            let is_sealed = frozen.tracking.as_ref().is_some_and(|_| seals == Seals::AtCheckpoint);
            let live = &mut self.disks[number];
            let newest = match frozen.tracking.filter(|_| is_sealed) {
                Some(tracking) => tracking.newest,
                None => {
                    let none = || Tracking { since: BTreeMap::new(), newest: String::new() };
                    let tracking = live.tracking.get_or_insert_with(none);
                    tracking.since.insert(sealed.clone(), frozen.after);
                    tracking.newest.clone_from(&sealed);
                    sealed
                }
            };
            change_ids.push(newest);
        }
        let point = ReferencePoint { id: self.id("point"), change_ids };
        self.points.push(point.clone());
        Some(point)
    }
}

impl Host {
    pub fn new(disks: &[(PathBuf, u64)], seals: Seals) -> Arc<Self> {
        let disk = |(path, bytes): &(PathBuf, u64)| SimulatedDisk {
            path: path.clone(),
            uuid: format!("uuid of {}", path.display()),
            content: vec![0; *bytes as usize],
            parent: None,
            tracking: None,
        };
        let state = State {
            is_off: false,
            is_absent: false,
            disks: disks.iter().map(disk).collect(),
            checkpoints: Vec::new(),
            points: Vec::new(),
            free_bytes: 1 << 40,
            areas_max: 3,
            faults: Faults::default(),
            answers: 0,
            count: 0,
            quiet: false,
            serial: 0,
        };
        Arc::new(Self { state: Mutex::new(state), seals })
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The machine writes.
    pub fn write(&self, disk: usize, offset: u64, data: &[u8]) {
        let mut state = self.state();
        let granules = SimulatedDisk::granules(offset, data.len());
        state.checkpoints.iter_mut().for_each(|made| made.frozen[disk].after.extend(granules.clone()));
        let disk = &mut state.disks[disk];
        disk.content[offset as usize..][..data.len()].copy_from_slice(data);
        disk.note(granules);
    }

    pub fn content(&self, disk: usize) -> Vec<u8> {
        self.state().disks[disk].content.clone()
    }

    /// Of others.
    pub fn make_checkpoint(&self, name: &str, is_recovery: bool) -> String {
        self.state().make(name, is_recovery, self.seals).id
    }

    pub fn remove_checkpoint(&self, id: &str) {
        self.state().checkpoints.retain(|made| made.told.id != id);
    }

    /// Those that are there.
    pub fn checkpoints(&self) -> Vec<String> {
        self.state().checkpoints.iter().map(|made| made.told.id.clone()).collect()
    }

    pub fn points(&self) -> usize {
        self.state().points.len()
    }

    /// Everything that was sealed is forgotten.
    pub fn reset_tracking(&self, disk: usize) {
        let mut state = self.state();
        let newest = state.id("rctX");
        state.disks[disk].tracking = Some(Tracking { since: [(newest.clone(), BTreeSet::new())].into(), newest });
    }

    pub fn resize(&self, disk: usize, bytes: u64) {
        let mut state = self.state();
        state.disks[disk].content.resize(bytes as usize, 0);
    }
}

fn refused(what: &'static str) -> RctError {
    RctError::Refused { what, reason: "error code 32775".into() }
}

/// What the code under test sees of it.
pub struct Asked(pub Arc<Host>);

impl Hypervisor for Asked {
    fn find(&self, disk: &Path) -> Result<Found, RctError> {
        let is_its = self.0.state().disks.iter().any(|other| other.path == disk);
        if is_its { self.look(MACHINE) } else { Err(RctError::NoMachine { path: disk.to_owned() }) }
    }

    fn look(&self, machine: &str) -> Result<Found, RctError> {
        let state = self.0.state();
        if state.is_absent || machine != MACHINE {
            return Err(RctError::Absent { machine: machine.to_owned() });
        }
        let disk = |disk: &SimulatedDisk| {
            let is_below = !state.checkpoints.is_empty();
            let path = if is_below { disk.path.with_extension("avhdx") } else { disk.path.clone() };
            let parent = if is_below { Some(disk.path.clone()) } else { disk.parent.clone() };
            Disk { path, bytes: disk.content.len() as u64, parent }
        };
        Ok(Found {
            id: MACHINE.to_owned(),
            name: "web".into(),
            is_off: state.is_off,
            disks: state.disks.iter().map(disk).collect(),
            checkpoints: state.checkpoints.iter().map(|made| made.told.clone()).collect(),
            reference_points: state.points.clone(),
        })
    }

    fn free_bytes(&self, _disk: &Path) -> Result<u64, RctError> {
        Ok(self.0.state().free_bytes)
    }

    fn checkpoint(&self, machine: &str, quiet: bool) -> Result<Checkpoint, RctError> {
        assert_eq!(machine, MACHINE);
        let mut state = self.0.state();
        if state.faults.checkpoint || quiet && state.faults.quiet || !state.checkpoints.is_empty() {
            return Err(refused("make a checkpoint"));
        }
        (state.count, state.quiet) = (state.count + 1, quiet);
        let made = state.make("Recovery", true, self.0.seals);
        match std::mem::take(&mut state.faults.checkpoint_unheard) {
            true => Err(RctError::TimedOut { what: "make a checkpoint", limit: std::time::Duration::ZERO }),
            false => Ok(made),
        }
    }

    fn convert(&self, checkpoint: &str) -> Result<ReferencePoint, RctError> {
        let mut state = self.0.state();
        if state.faults.convert {
            return Err(refused("convert a checkpoint"));
        }
        let made = state.convert(checkpoint, self.0.seals).ok_or_else(|| refused("find a checkpoint"))?;
        match std::mem::take(&mut state.faults.convert_unheard) {
            true => Err(RctError::TimedOut { what: "convert a checkpoint", limit: std::time::Duration::ZERO }),
            false => Ok(made),
        }
    }

    /// What was sealed for it is forgotten.
    fn remove(&self, reference_point: &str) -> Result<(), RctError> {
        let mut state = self.0.state();
        let at = state.points.iter().position(|point| point.id == reference_point).expect("it was told of");
        let gone = state.points.remove(at).change_ids;
        for disk in &mut state.disks {
            disk.tracking.iter_mut().for_each(|tracking| tracking.since.retain(|id, _| !gone.contains(id)));
        }
        Ok(())
    }

    fn switch_on(&self, file: &Path) -> Result<(), RctError> {
        let mut state = self.0.state();
        assert!(state.is_off && state.checkpoints.is_empty(), "somebody has it open");
        let newest = state.id("rctX");
        let disk = state.disks.iter_mut().find(|disk| disk.path == file).expect("it was told of");
        disk.tracking = Some(Tracking { since: [(newest.clone(), BTreeSet::new())].into(), newest });
        Ok(())
    }

    fn open(&self, file: &Path) -> Result<Box<dyn Image>, RctError> {
        let state = self.0.state();
        let disk = state.disks.iter().position(|disk| disk.path == file);
        let disk = disk.ok_or_else(|| refused("open a file"))?;
        let made = state.checkpoints.first().ok_or_else(|| refused("open a file that is written to"))?;
        Ok(Box::new(Opened { host: self.0.clone(), checkpoint: made.told.id.clone(), disk }))
    }
}

/// A file below a checkpoint.
struct Opened {
    host: Arc<Host>,
    checkpoint: String,
    disk: usize,
}

impl Opened {
    fn with<T>(&self, look: impl FnOnce(&Frozen) -> T) -> Option<T> {
        let state = self.host.state();
        state.made(&self.checkpoint).map(|made| look(&made.frozen[self.disk]))
    }
}

impl Image for Opened {
    fn facts(&self) -> Result<Facts, RctError> {
        let facts = |frozen: &Frozen| Facts {
            uuid: frozen.uuid.clone(),
            bytes: frozen.content.len() as u64,
            change_id: frozen.tracking.as_ref().map(|tracking| tracking.newest.clone()),
        };
        self.with(facts).ok_or_else(|| refused("open a file that is written to"))
    }

    fn query(&self, since: &str, from: u64, length: u64) -> Result<Part, String> {
        let mut state = self.host.state();
        state.answers += 1;
        if let Some(fault) = state.faults.query.take() {
            return Err(fault);
        }
        let made = state.made(&self.checkpoint).ok_or("error 32")?;
        let frozen = &made.frozen[self.disk];
        // Known since then, and still.
        let is_known = state.disks[self.disk].tracking.as_ref().is_some_and(|live| live.since.contains_key(since));
        let changed = frozen.tracking.as_ref().and_then(|tracking| tracking.since.get(since)).filter(|_| is_known);
        let changed = changed.ok_or("error 1168")?;
        let granules = changed.iter().filter(|granule| (from..from + length).contains(&(*granule * GRANULE)));
        let areas: Vec<Extent> = granules.map(|granule| Extent::new(granule * GRANULE, GRANULE)).collect();
        let answer = areas.iter().take(state.areas_max).copied().collect::<Vec<_>>();
        let is_whole = answer.len() == areas.len();
        let processed = if is_whole { length } else { answer.last().map_or(0, |last| last.end() - from) };
        Ok(Part { areas: answer, processed })
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let read = self.with(|frozen| buffer.copy_from_slice(&frozen.content[offset as usize..][..buffer.len()]));
        read.ok_or_else(|| io::Error::other("the file is written to"))
    }
}
