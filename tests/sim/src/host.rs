//! A protected host: the product's host role over simulated media, and its guests.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tidemark_base::disk::Durability;
use tidemark_base::error::with_causes;
use tidemark_base::random::Random;
use tidemark_base::{Clock, DiskId, Extent, MachineId, ServerId, Timestamp};
use tidemark_host::capture::splitter::Splitter;
use tidemark_host::capture::{Address, CaptureProvider};
use tidemark_host::protected::ProtectedDisk;
use tidemark_host::send::SendLimits;
use tidemark_host::send::link::Link;
use tidemark_host::state::session::Boot;
use tidemark_host::{Host, HostConfig, HostLimits};
use tidemark_nbd::{Export, WriteRequest};
use tidemark_proto::control::{Consistency, Endpoint, MachineSpec, MarkRequest, SourceMode, SourceState};

use crate::counts::Kind;
use crate::link::{Network, SimLink};
use crate::media::MemoryDisk;
use crate::oracle::Oracle;
use crate::world::{Process, Sim};

/// Less than this of what was written is on its way to who keeps up.
const ON_ITS_WAY: u64 = 16 << 10;
/// How long guests rest that write slowly.
const PACED_MS_MAX: u64 = 800;

/// What the guests do.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    pub guests: u64,
    pub pause_ms_max: u64,
    /// Requests between two long rests.
    pub burst: u64,
    pub write_sectors_max: u64,
    /// Guests write to the first so many sectors; less than the disk makes them meet.
    pub span_sectors: u64,
    pub mark_ms_max: u64,
    /// 0: nobody asks for a resync.
    pub resync_ms_max: u64,
}

pub struct HostState {
    pub sim: Rc<Sim>,
    /// The way to each process server, by its address ([`address`]).
    pub networks: Vec<Rc<Network>>,
    pub oracle: Rc<Oracle>,
    /// What is wanted. Whom it feeds may change ([`Self::feed`]).
    spec: RefCell<MachineSpec>,
    pub machine: MachineId,
    /// How often whom it feeds was changed.
    changes: Cell<u64>,
    pub limits: HostLimits,
    pub disks: BTreeMap<DiskId, Arc<MemoryDisk>>,
    pub workload: Workload,
    /// Guests write while this is set.
    pub is_busy: Cell<bool>,
    /// Guests write no faster than a log of so many bytes takes without being full before anyone can do something about it,
    /// and nobody asks for anything else.
    pub paced_for: Cell<Option<u64>>,
    pub guests_at_work: Cell<u64>,
    host: RefCell<Option<Arc<Host>>>,
    exports: Exports,
    pub is_up: Cell<bool>,
    random: RefCell<Random>,
    writes: Cell<u64>,
    has_protected: Cell<bool>,
}

/// What the host protects now, as guests reach it.
type Exports = Rc<RefCell<BTreeMap<String, (DiskId, Rc<Splitter>)>>>;

/// Hands disks to the guests of the simulation.
struct GuestProvider {
    exports: Exports,
}

// SAFETY: everything of a simulation is reached by the one real thread that runs it.
unsafe impl Send for GuestProvider {}
unsafe impl Sync for GuestProvider {}

impl CaptureProvider for GuestProvider {
    fn attach(&self, name: &str, disk: &Arc<ProtectedDisk>) -> io::Result<Address> {
        let splitter = Rc::new(Splitter::new(disk.clone())?);
        let id = name.parse().expect("exports are named by their disks here");
        self.exports.borrow_mut().insert(name.to_owned(), (id, splitter));
        Ok(Address { nbd: Some(name.to_owned()), file: None })
    }

    fn detach(&self, name: &str) -> io::Result<()> {
        let _ = self.exports.borrow_mut().remove(name);
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        Ok(())
    }
}

/// The host's clock.
struct HostClock;

impl Clock for HostClock {
    fn wall_now(&self) -> Timestamp {
        Timestamp::now()
    }

    fn monotonic_now(&self) -> Duration {
        tidemark_base::seam::current().map_or(Duration::ZERO, |world| world.now())
    }
}

/// How far the host is with some process servers, as far as a status tells.
#[derive(Clone, Debug, Default)]
pub struct Status {
    pub is_settled: bool,
    /// What changes is logged for them, and they are sent it.
    pub is_in_data_mode: bool,
    /// They have what was written, but for what is on its way.
    pub keeps_up: bool,
    pub text: String,
}

/// Where a process server is.
pub fn address(number: usize) -> String {
    format!("sim:{number}")
}

fn number_of(endpoint: &Endpoint) -> usize {
    let number = endpoint.address.strip_prefix("sim:").and_then(|number| number.parse().ok());
    number.expect("an address of the simulation")
}

impl HostState {
    #[expect(clippy::too_many_arguments, reason = "made in one place")]
    pub fn new(
        sim: Rc<Sim>,
        networks: Vec<Rc<Network>>,
        oracle: Rc<Oracle>,
        spec: MachineSpec,
        limits: HostLimits,
        disks: BTreeMap<DiskId, Arc<MemoryDisk>>,
        workload: Workload,
        seed: u64,
    ) -> Rc<Self> {
        Rc::new(Self {
            sim,
            networks,
            oracle,
            machine: spec.machine,
            spec: RefCell::new(spec),
            changes: Cell::new(0),
            limits,
            disks,
            workload,
            is_busy: Cell::new(true),
            paced_for: Cell::new(None),
            guests_at_work: Cell::new(0),
            host: RefCell::default(),
            exports: Rc::default(),
            is_up: Cell::new(false),
            random: RefCell::new(Random::new(seed ^ 0x6775_6573_7473)),
            writes: Cell::new(0),
            has_protected: Cell::new(false),
        })
    }

    fn below(&self, limit: u64) -> u64 {
        self.random.borrow_mut().below(limit)
    }

    pub fn start(self: &Rc<Self>) {
        let state = self.clone();
        self.sim.start(Process::Host, "host", Box::new(move || state.run()));
    }

    /// The process is gone, with everything that it owned.
    pub fn ended(&self) {
        self.is_up.set(false);
        self.guests_at_work.set(0);
        if let Some(host) = self.host.borrow_mut().take() {
            std::mem::forget(host);
        }
        for (_, splitter) in std::mem::take(&mut *self.exports.borrow_mut()).into_values() {
            std::mem::forget(splitter);
        }
        self.oracle.host_ended();
    }

    fn config(&self) -> HostConfig {
        let link = |network: &Rc<Network>| Arc::new(SimLink(network.clone())) as Arc<dyn Link>;
        let links: Vec<Arc<dyn Link>> = self.networks.iter().map(link).collect();
        HostConfig {
            state_folder: "/host/state".into(),
            memory_folder: None,
            run_folder: "/host/run".into(),
            allowed_uids: Vec::new(),
            link: Arc::new(move |endpoint| links[number_of(endpoint)].clone()),
            freezer: None,
            limits: self.limits.clone(),
            boot: Boot { id: format!("boot-{}", self.sim.host.boot()), started: Timestamp::now() },
            events: tidemark_host::events::Events::new(Arc::new(HostClock)),
            clock: Arc::new(HostClock),
        }
    }

    fn run(self: &Rc<Self>) {
        let sim = &self.sim;
        let host = loop {
            let provider = Arc::new(GuestProvider { exports: self.exports.clone() });
            match Host::start_with(self.config(), provider) {
                Ok(host) => break Arc::new(host),
                Err(error) => {
                    sim.note(|| format!("the host does not start: {}", with_causes(&error)));
                    sim.sleep(Duration::from_secs(1));
                }
            }
        };
        *self.host.borrow_mut() = Some(host.clone());
        loop {
            let protected = host.status().iter().any(|machine| machine.machine == self.machine);
            // As it was told before, or told anew.
            if protected && self.is_told(&host) {
                break;
            }
            let spec = self.spec.borrow().clone();
            match host.protect(spec) {
                Ok(_) => break,
                Err(error) => {
                    sim.note(|| format!("the host does not protect: {}", with_causes(&error)));
                    sim.sleep(Duration::from_secs(1));
                }
            }
        }
        self.has_protected.set(true);
        self.is_up.set(true);
        sim.note(|| "host is up".to_owned());
        // Told something else while it was told this.
        if !self.is_told(&host) {
            self.tell(host.clone());
        }
        for number in 0..self.workload.guests {
            let state = self.clone();
            sim.start(Process::Host, &format!("guest-{number}"), Box::new(move || state.guest(number)));
        }
        let (state, marking) = (self.clone(), host.clone());
        sim.start(Process::Host, "marker", Box::new(move || state.make_marks(&marking)));
        if self.workload.resync_ms_max > 0 {
            let (state, host) = (self.clone(), host.clone());
            sim.start(Process::Host, "resyncer", Box::new(move || state.resync(&host)));
        }
        let mut was_bitmap = false;
        loop {
            sim.sleep(Duration::from_millis(500));
            let is_bitmap =
                host.status().iter().flat_map(|machine| &machine.disks).any(|disk| disk.mode == SourceMode::Bitmap);
            if is_bitmap && !was_bitmap {
                sim.count(Kind::BitmapMode);
            }
            was_bitmap = is_bitmap;
        }
    }

    fn make_marks(&self, host: &Host) {
        loop {
            self.sim.sleep(Duration::from_millis(1 + self.below(self.workload.mark_ms_max)));
            if !self.is_busy.get() {
                continue;
            }
            let keep = self.below(3) == 0;
            let request =
                MarkRequest { machine: self.machine, consistency: Consistency::Crash, label: String::new(), keep };
            match host.mark(&request) {
                Ok(_) => self.sim.count(if keep { Kind::KeptMark } else { Kind::Mark }),
                Err(error) => self.sim.note(|| format!("no mark: {}", with_causes(&error))),
            }
        }
    }

    /// Somebody who wants everything compared, now and then.
    fn resync(&self, host: &Host) {
        loop {
            self.sim.sleep(Duration::from_millis(1 + self.below(self.workload.resync_ms_max)));
            if !self.is_busy.get() || self.paced_for.get().is_some() {
                continue;
            }
            match host.resync(self.machine) {
                Ok(_) => self.sim.count(Kind::Resync),
                Err(error) => self.sim.note(|| format!("no resync: {}", with_causes(&error))),
            }
        }
    }

    /// Whom it feeds, the first one first.
    pub fn fed(&self) -> Vec<Endpoint> {
        self.spec.borrow().servers().cloned().collect()
    }

    /// Feeds these from now on. Where the host is away, or cannot do it now, it is told again until it did.
    pub fn feed(self: &Rc<Self>, endpoints: Vec<Endpoint>) {
        let mut endpoints = endpoints.into_iter();
        let first = endpoints.next().expect("a machine feeds one at least");
        {
            let mut spec = self.spec.borrow_mut();
            (spec.server, spec.others) = (first, endpoints.collect());
        }
        self.changes.set(self.changes.get() + 1);
        if !self.is_up.get() {
            return;
        }
        if let Some(host) = self.host.borrow().clone() {
            self.tell(host);
        }
    }

    fn tell(self: &Rc<Self>, host: Arc<Host>) {
        let (state, change) = (self.clone(), self.changes.get());
        let tell = move || {
            while state.changes.get() == change {
                let spec = state.spec.borrow().clone();
                match host.protect(spec) {
                    Ok(_) => return,
                    Err(error) => state.sim.note(|| format!("whom it feeds is not changed: {}", with_causes(&error))),
                }
                state.sim.sleep(Duration::from_secs(1));
            }
        };
        self.sim.start(Process::Host, "feed", Box::new(tell));
    }

    /// Whether it feeds whom it should.
    fn is_told(&self, host: &Host) -> bool {
        let spec = self.spec.borrow();
        let is_it = host.machine(self.machine).is_ok_and(|machine| machine.spec().servers().eq(spec.servers()));
        is_it || self.changes.get() == 0
    }

    /// Asks from outside how far the host is with these process servers. `None`: it does not answer.
    pub fn status(self: &Rc<Self>, servers: &[ServerId]) -> Option<Status> {
        let host = self.host.borrow().clone()?;
        if !self.is_up.get() {
            return None;
        }
        let answer: Rc<RefCell<Option<Status>>> = Rc::default();
        let (into, sim, servers) = (answer.clone(), self.sim.clone(), servers.to_vec());
        let key = Rc::as_ptr(&answer) as usize;
        self.sim.start(
            Process::Host,
            "status",
            Box::new(move || {
                let mut disks: Vec<_> = host.status().into_iter().flat_map(|machine| machine.disks).collect();
                disks.retain(|disk| disk.server.is_none_or(|server| servers.contains(&server)));
                let is_in_data_mode = !disks.is_empty() && disks.iter().all(|disk| disk.mode == SourceMode::Data);
                let is_settled = !disks.is_empty()
                    && disks.iter().all(|disk| {
                        disk.state == SourceState::Replicating
                            && disk.mode == SourceMode::Data
                            && disk.pending_bytes == 0
                            && disk.logged == disk.durable
                    });
                let text = disks.iter().map(|disk| {
                    let problems: Vec<String> = disk.problems.iter().map(|problem| problem.message.clone()).collect();
                    format!(
                        "{:?} {:?} {} logged {} durable {} pending {} scan {:?} {}",
                        disk.state,
                        disk.mode,
                        disk.mode_reason,
                        disk.logged,
                        disk.durable,
                        disk.pending_bytes,
                        disk.scan,
                        problems.join("; ")
                    )
                });
                let keeps_up = is_in_data_mode
                    && disks.iter().all(|disk| {
                        disk.state == SourceState::Replicating && disk.scan.is_none() && disk.pending_bytes < ON_ITS_WAY
                    });
                let status =
                    Status { is_settled, is_in_data_mode, keeps_up, text: text.collect::<Vec<_>>().join(" | ") };
                *into.borrow_mut() = Some(status);
                sim.wake_key(key, true);
            }),
        );
        self.sim.wait_own(key, Duration::from_secs(30));
        answer.borrow_mut().take()
    }

    /// Makes a kept mark from outside.
    pub fn mark(self: &Rc<Self>) -> Option<tidemark_base::MarkId> {
        let host = self.host.borrow().clone()?;
        let answer: Rc<RefCell<Option<tidemark_base::MarkId>>> = Rc::default();
        let (into, sim, machine) = (answer.clone(), self.sim.clone(), self.machine);
        let key = Rc::as_ptr(&answer) as usize;
        self.sim.start(
            Process::Host,
            "mark",
            Box::new(move || {
                let request =
                    MarkRequest { machine, consistency: Consistency::Crash, label: String::new(), keep: true };
                match host.mark(&request) {
                    Ok(outcome) => *into.borrow_mut() = Some(outcome.id),
                    Err(error) => sim.note(|| format!("no mark: {}", with_causes(&error))),
                }
                sim.wake_key(key, true);
            }),
        );
        self.sim.wait_own(key, Duration::from_secs(60));
        answer.borrow_mut().take()
    }

    /// Stops the host cleanly; false when that takes too long.
    pub fn stop(self: &Rc<Self>) -> bool {
        let Some(host) = self.host.borrow().clone() else { return false };
        let done: Rc<Cell<bool>> = Rc::default();
        let (into, sim) = (done.clone(), self.sim.clone());
        let key = Rc::as_ptr(&done) as usize;
        self.sim.start(
            Process::Host,
            "stop",
            Box::new(move || {
                host.stop();
                into.set(true);
                sim.wake_key(key, true);
            }),
        );
        self.sim.wait_own(key, Duration::from_secs(300));
        done.get()
    }

    // ---- guests

    fn guest(self: &Rc<Self>, number: u64) {
        let sim = &self.sim;
        loop {
            // Bursts, and rests between them.
            let pause = match self.paced_for.get() {
                Some(_) => PACED_MS_MAX,
                None if self.below(self.workload.burst) == 0 => 8000,
                None => self.workload.pause_ms_max,
            };
            sim.sleep(Duration::from_millis(self.below(pause + 1)));
            if !self.is_busy.get() {
                continue;
            }
            let exports: Vec<(DiskId, Rc<Splitter>)> = self.exports.borrow().values().cloned().collect();
            if exports.is_empty() {
                continue;
            }
            let (disk, splitter) = exports[self.below(exports.len() as u64) as usize].clone();
            drop(exports);
            self.guests_at_work.set(self.guests_at_work.get() + 1);
            self.act(number, disk, &splitter);
            self.guests_at_work.set(self.guests_at_work.get() - 1);
        }
    }

    fn extent(&self) -> Extent {
        let sectors = self.workload.span_sectors;
        // Long ones are rarer than short ones: what a run costs are bytes, what it finds are orders.
        let most = match self.paced_for.get() {
            // Four guests, two writes or three at a time, a few times a second: a thirtieth of it.
            Some(bytes) => (bytes / 512 / 512).max(1),
            None => self.workload.write_sectors_max,
        };
        let length = 1 + self.below(if self.below(3) == 0 { most } else { most.min(16) });
        // Often at the same places: what is written again and again is where orders matter.
        let at = if self.below(2) == 0 { self.below(16) * sectors / 16 } else { self.below(sectors) };
        let at = at.min(sectors - 1);
        Extent::new(at * 512, length.min(sectors - at) * 512)
    }

    /// Content that says which write it is of, sector by sector.
    fn content(&self, length: u64) -> Vec<u8> {
        let number = self.writes.get() + 1;
        self.writes.set(number);
        let mut data = vec![0; length as usize];
        let kind = self.below(4);
        for (index, sector) in data.chunks_mut(512).enumerate() {
            match kind {
                0 => Random::new(number << 20 | index as u64).fill(sector),
                _ => sector.iter_mut().for_each(|byte| *byte = number as u8 ^ index as u8),
            }
            sector[..8].copy_from_slice(&number.to_le_bytes());
            sector[8] = index as u8;
        }
        data
    }

    fn act(&self, _number: u64, id: DiskId, splitter: &Splitter) {
        let disk = self.disks[&id].clone();
        let now = |sector: u64| disk.peek(sector);
        let durable = |sector: u64| disk.peek_durable(sector);
        match self.below(20) {
            0..=1 => {
                let covered = self.oracle.flush_begins(id);
                match splitter.flush() {
                    Ok(()) => {
                        self.sim.count(Kind::GuestFlush);
                        self.oracle.flushed(id, &covered);
                    }
                    Err(_) => self.sim.count(Kind::GuestError),
                }
            }
            2..=3 => {
                let extent = self.extent();
                let zeroes = vec![0; extent.length as usize];
                self.oracle.issued(id, extent.offset, &zeroes, &now, &durable);
                let result = splitter.zero(extent, self.below(2) == 0, Durability::Cached);
                self.sim.count(if result.is_ok() { Kind::GuestZero } else { Kind::GuestError });
                self.oracle.done(id, extent, result.is_ok(), false, &now);
            }
            _ => {
                let count = 1 + self.below(3);
                let fua = self.below(16) == 0;
                let writes: Vec<(Extent, Vec<u8>)> = (0..count)
                    .map(|_| {
                        let extent = self.extent();
                        (extent, self.content(extent.length))
                    })
                    .collect();
                let requests: Vec<WriteRequest<'_>> =
                    writes.iter().map(|(extent, data)| WriteRequest { offset: extent.offset, data, fua }).collect();
                for (extent, data) in &writes {
                    self.oracle.issued(id, extent.offset, data, &now, &durable);
                }
                let mut results: Vec<io::Result<()>> =
                    writes.iter().map(|_| Err(io::Error::other("not set"))).collect();
                splitter.write_batch(&requests, &mut results);
                for ((extent, _), result) in writes.iter().zip(&results) {
                    self.oracle.done(id, *extent, result.is_ok(), fua && count == 1, &now);
                    self.sim.count(match result {
                        Ok(()) if fua => Kind::GuestFua,
                        Ok(()) => Kind::GuestWrite,
                        Err(_) => Kind::GuestError,
                    });
                }
            }
        }
    }
}

/// Small limits, so that every limit is met.
pub fn limits(random: &mut Random) -> HostLimits {
    let send = SendLimits::default();
    HostLimits {
        log_rotate_bytes: 16 << 10 << random.below(5),
        log_bytes_min: 256 << 10,
        log_reserve_bytes: 1 << 10,
        send: SendLimits {
            live_bytes_max: 4 << 20,
            scan_bytes_max: 4 << 20,
            map_entries_max: if random.chance(1, 2) { 64 } else { 4096 },
            cut_gap: Duration::from_millis(random.below(200)),
            cut_bytes_max: 64 << 10 << random.below(6),
            scan_cut_bytes_max: 64 << 10 << random.below(6),
            cuts_under_way_max: 1 + random.below(16) as usize,
            want_bytes: 1 << 20,
            ..send
        },
        ..HostLimits::default()
    }
}
