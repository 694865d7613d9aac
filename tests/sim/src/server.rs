//! A process server: the product's replicas, points and maintenance over simulated media, and an auditor that reads
//! recovery points while everything runs.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use tidemark_base::error::with_causes;
use tidemark_base::stop::Stop;
use tidemark_base::storage::RealStorage;
use tidemark_base::{DiskId, Extent, Generation, HostId, MachineId, Timestamp};
use tidemark_process_server::accept::authorise::Authorisation;
use tidemark_process_server::accept::{ReplicaStores, Stores};
use tidemark_process_server::fold::base;
use tidemark_process_server::journal::Limits;
use tidemark_process_server::points::{Point, Retention};
use tidemark_process_server::replica::{ReplicaInfo, ReplicaSet};
use tidemark_process_server::scrub;
use tidemark_proto::replication::{Durable, Hello, Refusal, RefusalReason, SessionId};

use crate::counts::Kind;
use crate::link::{Network, Place, Places, refusal};
use crate::oracle::{Content, Oracle};
use crate::world::{Process, Sim};

/// `seg-` and the first cut in sixteen digits: what a segment is called before and after it is sealed.
const SEGMENT_STEM: usize = 20;
const MAINTENANCE: Duration = Duration::from_secs(10);

pub struct ServerState {
    /// Which of the process servers it is.
    pub process: Process,
    pub is_up: Cell<bool>,
    /// Counts starts.
    pub run: Cell<u64>,
    pub set: RefCell<Option<Arc<ReplicaSet>>>,
    stores: RefCell<Option<Arc<ReplicaStores>>>,
    places: RefCell<Rc<Places>>,
    pub network: RefCell<Weak<Network>>,
    pub machine: MachineId,
    pub disks: Vec<(DiskId, u64)>,
    pub limits: Limits,
    pub retention: Retention,
    pub oracle: Rc<Oracle>,
    /// Damage was done to what it stores: reads may fail, but never lie.
    pub is_rotten: Cell<bool>,
    /// What every start named as damaged: once an index says which cuts were lost, nobody reads them again.
    named: RefCell<Vec<String>>,
    /// Why it did not open its folder when it last tried in vain.
    refusal: RefCell<String>,
}

impl ServerState {
    pub fn new(
        process: Process,
        machine: MachineId,
        disks: Vec<(DiskId, u64)>,
        limits: Limits,
        retention: Retention,
        oracle: Rc<Oracle>,
    ) -> Rc<Self> {
        Rc::new(Self {
            process,
            is_up: Cell::new(false),
            run: Cell::new(0),
            set: RefCell::default(),
            stores: RefCell::default(),
            places: RefCell::default(),
            network: RefCell::default(),
            machine,
            disks,
            limits,
            retention,
            oracle,
            is_rotten: Cell::new(false),
            named: RefCell::default(),
            refusal: RefCell::default(),
        })
    }

    pub fn authorisation(&self, disk: DiskId) -> Result<Authorisation, Refusal> {
        let (_, disk_bytes) = self
            .disks
            .iter()
            .find(|(known, _)| *known == disk)
            .ok_or_else(|| refusal(RefusalReason::UnknownDisk, "not known here"))?;
        Ok(Authorisation {
            machine: self.machine,
            agent: HostId::from_bytes([1; 16]),
            generation: Generation::FIRST,
            disk_bytes: *disk_bytes,
        })
    }

    pub fn admit(&self, hello: &Hello) -> Result<(), Refusal> {
        let known = self.authorisation(hello.disk)?;
        if known.disk_bytes != hello.disk_bytes {
            return Err(refusal(RefusalReason::SizeChanged, "another size"));
        }
        Ok(())
    }

    pub fn stores(&self) -> Arc<dyn Stores> {
        self.stores.borrow().clone().expect("streams run while the server does")
    }

    pub fn take_over(&self, sim: &Sim, disk: DiskId, session: SessionId) -> Result<Place, Refusal> {
        let places = self.places.borrow().clone();
        let network = self.network.borrow().upgrade();
        places.take_over(sim, disk, session, &|| {
            if let Some(network) = &network {
                network.wake_streams();
            }
        })
    }

    /// What the server promises to hold from now on.
    pub fn acknowledged(&self, disk: DiskId, durable: &Durable) {
        self.oracle.acknowledged(self.process, disk, durable);
    }

    /// Starts the server's process.
    pub fn start(self: &Rc<Self>, sim: &Rc<Sim>) {
        self.run.set(self.run.get() + 1);
        *self.places.borrow_mut() = Rc::default();
        let (state, world) = (self.clone(), sim.clone());
        sim.start(self.process, "server", Box::new(move || state.run(&world)));
    }

    /// It is gone, however that came.
    pub fn ended(&self) {
        self.is_up.set(false);
        // The dead process's own: what it owns must not be dropped, as nothing of it runs any more.
        if let Some(set) = self.set.borrow_mut().take() {
            std::mem::forget(set);
        }
        if let Some(stores) = self.stores.borrow_mut().take() {
            std::mem::forget(stores);
        }
    }

    /// Another machine, with nothing on it, is in its place. Only while it does not run.
    pub fn replace(&self, sim: &Sim) {
        sim.media(self.process).replace();
        self.oracle.replaced(self.process);
        self.is_rotten.set(false);
        self.named.borrow_mut().clear();
    }

    fn run(self: &Rc<Self>, sim: &Rc<Sim>) {
        let mut tries = 0;
        let set = loop {
            match self.open() {
                Ok(set) => break Arc::new(set),
                Err(error) => {
                    sim.note(|| format!("the server cannot open its folder: {error}"));
                    self.refusal.replace(error.clone());
                    tries += 1;
                    // A medium that fails is tried again; one that is sound must open.
                    if tries > 5 && !self.is_rotten.get() && self.is_sound(sim) {
                        return sim.fail(format!("the server does not open its folder: {error}"));
                    }
                    sim.sleep(Duration::from_secs(5));
                }
            }
        };
        *self.stores.borrow_mut() = Some(ReplicaStores::new(set.clone(), Arc::new(tokio::sync::watch::channel(0).0)));
        *self.set.borrow_mut() = Some(set.clone());
        self.is_up.set(true);
        sim.note(|| "server is up".to_owned());
        self.oracle.check_held(self, &set);
        let (state, world, audited) = (self.clone(), sim.clone(), set.clone());
        sim.start(self.process, "auditor", Box::new(move || state.audit(&world, &audited)));
        let stop = Stop::new();
        loop {
            sim.sleep(MAINTENANCE);
            for replica in set.replicas() {
                let disk = replica.disk();
                let mut named = self.named.borrow_mut();
                for what in replica.opening_damage().into_iter().map(|what| format!("{disk} {what}")) {
                    if !named.contains(&what) {
                        named.push(what);
                    }
                }
            }
            match set.maintain(self.machine, &self.retention, Timestamp::now(), &stop) {
                Ok(done) => {
                    self.oracle.dropped(self.process, &done.dropped);
                    for fold in done.folds {
                        match fold.result {
                            Ok(folded) if folded.to > folded.from => sim.count(Kind::Fold),
                            Ok(_) => {}
                            Err(error) => sim.note(|| format!("fold failed: {error}")),
                        }
                    }
                }
                Err(error) => sim.note(|| format!("maintenance failed: {error}")),
            }
            set.tend(&stop);
        }
    }

    /// A damaged replica may stay closed, until an operator says what to do; then the file is named.
    pub fn check_refusal(&self, sim: &Sim) {
        let refusal = self.refusal.borrow();
        let turned = sim.media(self.process).turned();
        if !turned.iter().any(|(name, _)| refusal.contains(name.as_str())) {
            return sim.fail(format!("the server is not up, bits turned in {turned:?}, and it says: {refusal}"));
        }
        sim.count(Kind::BitRotNamed);
    }

    /// Reads all that is stored: every bit that turned, and was not written over since, is found and its file named.
    pub fn find_rot(&self, sim: &Sim) {
        let Some(set) = self.set.borrow().clone().filter(|_| self.is_up.get()) else { return };
        let before = sim.media(self.process).turned();
        let stop = Stop::new();
        for replica in set.replicas() {
            let disk = replica.disk().to_string();
            let report = match scrub::scrub(&replica, &stop) {
                Ok(report) => report,
                Err(error) => return sim.fail(format!("the scrub of {disk} ended: {}", with_causes(&error))),
            };
            let still = sim.media(self.process).turned();
            let opened = replica.open_report();
            let found = report.findings.iter().map(|finding| format!("{} {}", finding.file, finding.what));
            let known = replica.damages().into_iter().map(|damage| format!("{} {}", damage.file, damage.what));
            let mut named: Vec<String> = found.chain(known).chain(opened.rebuilt.iter().cloned()).collect();
            named.extend(self.named.borrow().iter().filter(|what| what.starts_with(&disk)).cloned());
            for (name, byte) in before.iter().filter(|turned| turned.0.contains(&disk) && still.contains(turned)) {
                let file = name.rsplit('/').next().unwrap_or_default();
                // What a change of a file that was cut short left behind says nothing.
                if file.ends_with(".new") || file.ends_with(".pending") {
                    continue;
                }
                // Sums of the base and what they are of prove each other. A segment may have been named while it was active.
                let stem = match file {
                    file if file.starts_with("base.") => "base.",
                    file if file.starts_with("seg-") => file.get(..SEGMENT_STEM).unwrap_or(file),
                    file => file,
                };
                // No view reads it, which every point that is read afterwards shows.
                if report.left_to_fold.iter().any(|extent| is_of(file, *byte as u64, *extent)) {
                    continue;
                }
                if !named.iter().any(|text| text.contains(stem)) {
                    return sim.fail(format!("a bit turned in byte {byte} of {name}, and the scrub named: {named:?}"));
                }
                sim.count(Kind::BitRotNamed);
            }
            if let Err(error) = set.quarantine(&replica, &report.findings, &stop) {
                sim.note(|| format!("quarantine failed: {}", with_causes(&error)));
            }
            for first in report.indexes {
                if let Err(error) = replica.repair_segment(first) {
                    sim.note(|| format!("no index again: {}", with_causes(&error)));
                }
            }
        }
    }

    fn is_sound(&self, sim: &Sim) -> bool {
        let media = sim.media(self.process);
        let rates = media.rates.get();
        rates.read == 0 && rates.write == 0 && rates.sync == 0 && rates.no_room == 0 && !media.is_full.get()
    }

    fn open(&self) -> Result<ReplicaSet, String> {
        let folder = if self.process == Process::Second { "/second" } else { "/server" };
        let storage = RealStorage::create(folder).map_err(|error| error.to_string())?;
        let (set, failures) = ReplicaSet::open(storage, self.limits).map_err(|error| error.to_string())?;
        if let Some(failure) = failures.first() {
            return Err(format!("{}: {}", failure.folder, with_causes(&failure.error)));
        }
        for replica in set.replicas() {
            let disk = replica.disk();
            self.named.borrow_mut().extend(replica.open_report().damage.iter().map(|what| format!("{disk} {what}")));
        }
        for (disk, disk_bytes) in &self.disks {
            if set.get(*disk).is_err() {
                if self.oracle.holds_anything(self.process, *disk) {
                    return Err(format!("the replica of {disk} is gone"));
                }
                let info = ReplicaInfo {
                    disk: *disk,
                    machine: self.machine,
                    generation: Generation::FIRST,
                    disk_bytes: *disk_bytes,
                };
                set.create(info).map_err(|error| error.to_string())?;
            }
        }
        Ok(set)
    }

    /// Reads a point now and then.
    fn audit(&self, sim: &Rc<Sim>, set: &ReplicaSet) {
        loop {
            sim.sleep(Duration::from_millis(1000 + sim.below(20_000)));
            let Ok(points) = set.points(self.machine) else { continue };
            let points = points.all();
            if points.is_empty() {
                continue;
            }
            let index = if sim.one_in(3) { points.len() - 1 } else { sim.below(points.len() as u64) as usize };
            self.check_point(sim, set, &points[index], false);
        }
    }

    /// Every disk of the point must be what it was at its mark. `must_read`: nothing excuses an error.
    pub fn check_point(&self, sim: &Sim, set: &ReplicaSet, point: &Point, must_read: bool) -> bool {
        if point.damaged {
            if must_read && !self.is_rotten.get() {
                sim.fail(format!("point {} is flagged as damaged", point.id));
            }
            return false;
        }
        for held in &point.disks {
            let Some(expected) = self.oracle.at_mark(point.id, held.disk) else {
                sim.fail(format!("point {} is of no mark that was made on {}", point.id, held.disk));
                return false;
            };
            let view = set.get(held.disk).and_then(|replica| replica.view(held.cut));
            let view = match view.map_err(|error| with_causes(&error)) {
                Ok(view) => view,
                Err(error) => {
                    // It may have been thinned and folded since it was listed.
                    let is_still_there = set
                        .points(self.machine)
                        .is_ok_and(|points| points.get(point.id).is_some_and(|point| !point.damaged));
                    if must_read && is_still_there && !self.is_rotten.get() {
                        sim.fail(format!("point {} cannot be opened: {error}", point.id));
                    }
                    return false;
                }
            };
            let mut buffer = vec![0; 64 << 10];
            let disk_bytes = expected.pages.bytes();
            let mut at = 0;
            while at < disk_bytes {
                let length = (disk_bytes - at).min(buffer.len() as u64) as usize;
                if let Err(error) = view.read(at, &mut buffer[..length]) {
                    if must_read && !self.is_rotten.get() {
                        sim.fail(format!("point {} cannot be read at {at}: {}", point.id, with_causes(&error)));
                    }
                    if self.is_rotten.get() {
                        sim.count(Kind::BitRotFound);
                    }
                    return false;
                }
                if let Some(wrong) = expected.differs(at, &buffer[..length]) {
                    sim.fail(format!(
                        "point {} (kept: {}, cut {}) of disk {} differs from the source at its mark: first at {wrong}: {}",
                        point.id, point.keep, held.cut, held.disk,
                        describe(&expected, wrong, &buffer, at)
                    ));
                    return false;
                }
                at += length as u64;
            }
        }
        sim.count(Kind::PointChecked);
        true
    }
}

/// A byte of the base's data, or of its sums, belongs to this part of the disk.
fn is_of(file: &str, byte: u64, extent: Extent) -> bool {
    let at = match file {
        base::DATA_NAME => byte,
        base::SUMS_NAME => byte / base::SUM_BYTES * base::BLOCK_BYTES,
        _ => return false,
    };
    (extent.offset..extent.end()).contains(&at)
}

fn describe(expected: &Content, wrong: u64, buffer: &[u8], at: u64) -> String {
    let mut right = [0; 16];
    let sector = wrong / 512 * 512;
    expected.pages.read(sector, &mut right);
    let found = &buffer[(sector - at) as usize..][..16];
    format!("expected {right:02x?}, found {found:02x?}")
}
