//! A deterministic simulation of the product's own code on one seed.
//!
//! The host role ([`tidemark_host::Host`]: attach, capture, log, marks, keeper, pack, scan, send) and the process server's
//! stages (journal, points, fold, views, maintenance) run unchanged; only what is beneath them is simulated, through the
//! one seam of `tidemark-base` (`seam.rs`): threads, locks, clocks, randomness, files, disks and the network.
//!
//! * [`world`]: threads that take turns, and time; * [`media`]: what is durable and what a power cut takes; * [`link`]: the
//!   network, and the server's end of a stream; * [`host`], [`server`]: the two processes; * [`paged`]: their bytes; [`oracle`]: what must be true;
//!   * [`counts`]: what happened; [`heap`]: the real process's memory.

pub mod counts;
pub mod heap;
pub mod host;
pub mod link;
pub mod media;
pub mod oracle;
pub mod paged;
pub mod server;
mod several;
pub mod world;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use tidemark_base::random::Random;
use tidemark_base::seam::World;
use tidemark_base::{DiskId, Generation, MachineId, MarkId, ServerId};
use tidemark_process_server::journal::Limits;
use tidemark_process_server::points::{Point, Retention};
use tidemark_proto::control::{Compression, DiskSpec, Endpoint, MachineSpec, ReplicationPolicy, Throttle};

use counts::{Counts, Kind};
use host::{HostState, Workload};
use link::{CALM, Network, Weather};
use media::FaultRates;
use oracle::{Content, Oracle};
use server::ServerState;
use world::{Process, Sim};

/// Safeguards of `tidemark_base::sabotage` whose loss some seed was seen to fail of.
pub const SEEN_SABOTAGES: &[&str] = &[
    "journal-sync",
    "disk-flush",
    "intent-wait",
    "slots-read",
    "dirty-mark",
    "fold-sync",
    "scan-acknowledged",
    "replace-sync",
    "epoch-scan",
    "scan-cut-out",
    "chunk-hash",
    "mark-hold",
    "attach-sync",
];

/// What one run came to.
pub struct Outcome {
    pub seed: u64,
    pub failure: Option<String>,
    pub counts: Counts,
    pub steps: u64,
    pub simulated: Duration,
    /// The same for the same seed, or the simulation is not deterministic.
    pub fingerprint: u64,
}

/// Which process ends at which sync, for crash enumeration.
#[derive(Clone, Debug)]
pub struct StopAtSync {
    pub process: Process,
    /// As [`media::kind_of`] names files.
    pub kind: String,
    pub number: u64,
    /// After the sync, not before it.
    pub after: bool,
    pub power_loss: bool,
}

#[derive(Clone, Default)]
pub struct Options {
    pub trace: bool,
    /// Nothing goes wrong but this.
    pub stop_at_sync: Option<StopAtSync>,
}

/// What a seed makes of the run.
struct Plan {
    rounds: u64,
    has_errors: bool,
    has_rot: bool,
    /// Bits turn in the host's logs while it is away.
    has_log_rot: bool,
    /// What the logs of a disk may occupy.
    log_bytes: u64,
    /// Changes are sent once a cycle.
    has_cycle: bool,
}

/// Runs one seed.
pub fn run(seed: u64, options: &Options) -> Outcome {
    let mut random = Random::new(seed ^ 0x5eed_5eed_5eed_5eed);
    let is_calm = options.stop_at_sync.is_some();
    let switch_one_in = [3, 10, 40, 200][random.below(4) as usize];
    let sim = Sim::new(seed, switch_one_in, options.trace);
    let oracle = Oracle::new(sim.clone());
    let machine = MachineId::from_bytes(random.bytes16());
    let disk_count = if random.chance(1, 3) { 2 } else { 1 };
    let disks: Vec<(DiskId, u64)> = (0..disk_count)
        .map(|_| {
            (DiskId::from_bytes(random.bytes16()), [512 << 10, 512 << 10, 1 << 20, 3 << 20][random.below(4) as usize])
        })
        .collect();
    let mut disks = disks;
    disks.sort();
    let keeps_all = random.chance(1, 2);
    let retention = Retention {
        any_time_window: Duration::from_secs([5, 30, 120, 7200][random.below(4) as usize]),
        point_age_max: Duration::from_secs(86_400),
        points_max: if keeps_all { 100_000 } else { 2 + random.below(20) as usize },
        ..Retention::default()
    };
    let limits = Limits {
        segment_bytes: 32 << 10 << random.below(5),
        segment_extents: 64 << random.below(5),
        segment_cuts: 8 << random.below(6),
        cut_extents_max: 4 << 20,
        reserve_bytes: 1 << 10,
    };
    let mut plan = Plan {
        log_bytes: 0,
        has_cycle: false,
        rounds: if is_calm { 1 } else { 2 + random.below(6) },
        has_errors: !is_calm && random.chance(1, 3),
        has_rot: !is_calm && random.chance(1, 10),
        has_log_rot: !is_calm && random.chance(1, 12),
    };
    let weather = Weather {
        is_down: false,
        cut_one_in: if is_calm || random.chance(1, 4) { 0 } else { 20 << random.below(6) },
        delay_ms_max: [1, 5, 60, 300][random.below(4) as usize],
    };
    if !is_calm {
        // Of its own, so that media of the other seeds are what they would be.
        let mut slow = Random::new(seed ^ 0x510e);
        for media in [&sim.host, &sim.server] {
            media.slow_one_in.set([0, 0, 0, 0, 0, 64, 16, 4][slow.below(8) as usize]);
        }
    }
    let server = ServerState::new(Process::Server, machine, disks.clone(), limits, retention, oracle.clone());
    let mut sites = vec![Site::new(&sim, server, weather, keeps_all)];
    if !is_calm {
        sites.extend(several::second(seed, &sim, &oracle, machine, &disks));
    }
    let mut memory = BTreeMap::new();
    let mut before = Random::new(seed ^ 0xbef0);
    for (number, (disk, bytes)) in disks.iter().enumerate() {
        let added = sim.host.add_disk(&format!("/host/disk-{number}.img"), *bytes);
        let (oracle, id) = (oracle.clone(), *disk);
        added.set_on_lost(move || oracle.flush_failed(id));
        if before.below(2) == 0 {
            added.fill_before(&mut before);
        }
        memory.insert(*disk, added);
    }
    let spec = MachineSpec {
        machine,
        name: "machine".to_owned(),
        disks: disks
            .iter()
            .enumerate()
            .map(|(number, (disk, bytes))| DiskSpec {
                disk: *disk,
                path: format!("/host/disk-{number}.img"),
                export: disk.to_string(),
                generation: Generation::FIRST,
                bytes: *bytes,
                added: false,
            })
            .collect(),
        policy: ReplicationPolicy {
            cycle: random.chance(1, 4).then(|| Duration::from_secs(1 + random.below(20))),
            point_interval: random.chance(1, 2).then(|| Duration::from_secs(1 + random.below(30))),
            compression: if random.chance(1, 2) { Compression::Auto } else { Compression::Off },
            log_limit_bytes: Some(32 << 10 << random.below(7)),
            throttle: Throttle { bytes_per_second: random.chance(1, 8).then_some(256 << 10), rules: Vec::new() },
            ..ReplicationPolicy::default()
        },
        server: Endpoint { server: ServerId::from_bytes(random.bytes16()), address: host::address(0) },
        others: sites.iter().skip(1).map(|site| site.endpoint.borrow().clone()).collect(),
        paused: false,
        listen: None,
        fenced: false,
        via: Default::default(),
        moved: false,
    };
    let span = disks.iter().map(|(_, bytes)| bytes / 512).min().unwrap_or(1);
    let workload = Workload {
        guests: 1 + random.below(4),
        pause_ms_max: [2, 20, 100, 400][random.below(4) as usize],
        burst: 2 + random.below(20),
        write_sectors_max: [8, 16, 64, 256][random.below(4) as usize],
        span_sectors: [span, span, span / 4, 64][random.below(4) as usize],
        mark_ms_max: [200, 2000, 20_000][random.below(3) as usize],
        resync_ms_max: if is_calm { 0 } else { [0, 0, 20_000, 90_000][random.below(4) as usize] },
    };
    *sites[0].endpoint.borrow_mut() = spec.server.clone();
    plan.log_bytes = spec.policy.log_limit_bytes.unwrap_or_default();
    plan.has_cycle = spec.policy.cycle.is_some();
    let host_limits = host::limits(&mut random);
    let networks = sites.iter().map(|site| site.network.clone()).collect();
    let host = HostState::new(sim.clone(), networks, oracle.clone(), spec, host_limits, memory.clone(), workload, seed);
    sim.set_on_mark({
        let (oracle, disks) = (oracle.clone(), memory.clone());
        move |disk, mark| {
            if let Some(found) = disks.get(&disk) {
                oracle.marked(mark, disk, Content { pages: found.snapshot() });
            }
        }
    });
    let remembered = oracle.clone();
    let director = Director { sim: sim.clone(), host, sites, oracle, plan, stop_at_sync: options.stop_at_sync.clone() };
    let start = sim.now();
    let result = sim.run(move || director.run(random));
    remembered.forget();
    let counts = sim.counts.borrow().clone();
    Outcome {
        seed,
        failure: result.err(),
        counts,
        steps: sim.steps(),
        simulated: sim.now() - start,
        fingerprint: sim.fingerprint(),
    }
}

/// Who lets things go wrong, and asks at the end whether everything came right.
struct Director {
    sim: Rc<Sim>,
    host: Rc<HostState>,
    /// One, or two.
    sites: Vec<Site>,
    oracle: Rc<Oracle>,
    plan: Plan,
    stop_at_sync: Option<StopAtSync>,
}

/// A process server, and the way to it.
struct Site {
    server: Rc<ServerState>,
    network: Rc<Network>,
    /// What its network is like, where nothing else is said.
    weather: Weather,
    /// Retention drops nothing.
    keeps_all: bool,
    /// Its address stays, whichever machine is there.
    endpoint: RefCell<Endpoint>,
}

/// How a process ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Ending {
    Kill,
    PowerLoss,
    Clean,
}

impl Director {
    fn run(&self, mut random: Random) {
        for site in &self.sites {
            site.network.weather.set(site.weather);
            site.server.start(&self.sim);
        }
        self.host.start();
        if let Some(stop) = self.stop_at_sync.clone() {
            self.stop_at(&stop, &mut random);
        }
        for round in 0..self.plan.rounds {
            if self.sim.has_failed() {
                return;
            }
            self.sim.note(|| format!("round {round}"));
            self.sim.sleep(Duration::from_millis(100 + random.below(20_000)));
            self.list_points();
            if self.stop_at_sync.is_none() {
                self.trouble(&mut random);
            }
        }
        if !self.sim.has_failed() {
            self.settle(&mut random);
        }
    }

    fn stop_at(&self, stop: &StopAtSync, random: &mut Random) {
        let media = self.sim.media(stop.process);
        *media.stop_at_sync.borrow_mut() = Some((stop.kind.clone(), stop.number, stop.after));
        if self.sim.wait_crash(stop.process, Duration::from_secs(60)) {
            self.end(stop.process, if stop.power_loss { Ending::PowerLoss } else { Ending::Kill }, random);
            self.restart(stop.process);
        } else {
            media.stop_at_sync.borrow_mut().take();
        }
    }

    /// Kept points that are listed now are there to stay, where retention keeps all.
    fn list_points(&self) {
        for Site { server, .. } in self.sites.iter().filter(|site| site.keeps_all && site.server.is_up.get()) {
            let Some(set) = server.set.borrow().clone() else { continue };
            if let Ok(points) = set.points(server.machine) {
                let sound = points.list().into_iter().filter(|point| !point.damaged);
                self.oracle.list(server.process, sound.map(|point| point.id));
            }
        }
    }

    /// One of the process servers.
    fn a_site(&self, random: &mut Random) -> &Site {
        // What a seed with one of them does is what it always did.
        if self.sites.len() == 1 { &self.sites[0] } else { &self.sites[random.below(self.sites.len() as u64) as usize] }
    }

    fn host_or_server(&self, random: &mut Random) -> Process {
        if random.chance(1, 2) { Process::Host } else { self.a_site(random).server.process }
    }

    fn trouble(&self, random: &mut Random) {
        if self.sites.len() > 1 && random.chance(1, 3) {
            return if random.chance(1, 2) { self.change_servers(random) } else { self.leave_one_behind(random) };
        }
        match random.below(if self.plan.has_errors || self.plan.has_rot { 16 } else { 8 }) {
            0..=2 => self.crash(Process::Host, random),
            3..=4 => self.crash(self.a_site(random).server.process, random),
            5 => {
                // Both at once: a site without power.
                let server = self.a_site(random).server.process;
                self.end(Process::Host, Ending::PowerLoss, random);
                self.end(server, Ending::PowerLoss, random);
                self.sim.sleep(Duration::from_millis(random.below(30_000)));
                self.restart(server);
                self.restart(Process::Host);
            }
            6 => {
                let network = &self.a_site(random).network;
                let mut weather = network.weather.get();
                weather.is_down = true;
                network.weather.set(weather);
                self.sim.count(Kind::LinkDown);
                network.cut_all();
                let is_long = random.chance(1, 3);
                if is_long {
                    self.sim.count(Kind::ServerAbsent);
                }
                let limit = if is_long { 300_000 } else { 20_000 };
                self.sim.sleep(Duration::from_millis(random.below(limit)));
                weather.is_down = false;
                network.weather.set(weather);
            }
            7 => {
                let process = self.host_or_server(random);
                let by = random.below(7_200_000) as i64 - 3_600_000;
                self.sim.count(Kind::ClockJump);
                self.sim.note(|| format!("the clock of {process:?} jumps by {by} ms"));
                *self.sim.wall_offset_ms.borrow_mut().entry(process).or_default() += by;
            }
            12..=15 if self.plan.has_rot => self.rot(random),
            _ if self.plan.has_errors => self.errors(random),
            _ => self.rot(random),
        }
    }

    /// A medium that fails for a while.
    fn errors(&self, random: &mut Random) {
        let process = self.host_or_server(random);
        let media = self.sim.media(process).clone();
        let mut rate = |likely: u64| if random.chance(1, likely) { 5 << random.below(7) } else { 0 };
        let rates = FaultRates {
            read: rate(3),
            write: rate(3),
            sync: rate(2),
            no_room: rate(3),
            disk: rate(3),
            disk_flush: rate(4),
        };
        self.sim.note(|| format!("media of {process:?} fail: {rates:?}"));
        media.rates.set(rates);
        media.is_full.set(random.chance(1, 4));
        self.sim.sleep(Duration::from_millis(random.below(10_000)));
        media.rates.set(FaultRates::default());
        media.is_full.set(false);
        if random.chance(1, 2) {
            self.crash(process, random);
        }
    }

    /// One bit of what the server stores turns.
    fn rot(&self, random: &mut Random) {
        let server = &self.a_site(random).server;
        server.is_rotten.set(true);
        if let Some((name, bit)) = self.sim.media(server.process).rot(random, &["replicas/"]) {
            self.sim.count(Kind::BitRot);
            self.sim.note(|| format!("bit {bit} of {name} turned"));
        }
    }

    /// One bit of a log turns: what it held is not sent as something else, and is read from the disk again.
    fn log_rot(&self, random: &mut Random) {
        if let Some((name, bit)) = self.sim.host.rot(random, &[".hrl"]) {
            self.sim.count(Kind::LogRot);
            self.sim.note(|| format!("bit {bit} of {name} turned"));
        }
    }

    fn crash(&self, process: Process, random: &mut Random) {
        let ending = match random.below(5) {
            0 | 1 => Ending::Kill,
            2 | 3 => Ending::PowerLoss,
            _ => Ending::Clean,
        };
        // At a step of its own rather than between two.
        if ending != Ending::Clean && random.chance(3, 4) {
            let most = [20, 300, 3000][random.below(3) as usize];
            let steps = random.below(most);
            self.sim.traps.borrow_mut().entry(process).or_default().steps_left = Some(steps);
            if self.sim.wait_crash(process, Duration::from_secs(20)) {
                self.sim.count(Kind::CrashAtStep);
            }
        }
        self.end(process, ending, random);
        if process == Process::Host && self.plan.has_log_rot && random.chance(2, 3) {
            self.log_rot(random);
        }
        let is_long = process != Process::Host && random.chance(1, 4);
        if is_long {
            self.sim.count(Kind::ServerAbsent);
        }
        self.sim.sleep(Duration::from_millis(random.below(if is_long { 200_000 } else { 10_000 })));
        self.restart(process);
        // Again before it came up, now and then.
        if random.chance(1, 4) {
            self.sim.sleep(Duration::from_millis(random.below(20)));
            let steps = random.below(500);
            self.sim.traps.borrow_mut().entry(process).or_default().steps_left = Some(steps);
            if self.sim.wait_crash(process, Duration::from_secs(5)) {
                self.sim.count(Kind::CrashAtStep);
            }
            let ending = if random.chance(1, 2) { Ending::Kill } else { Ending::PowerLoss };
            self.end(process, ending, random);
            self.restart(process);
        }
    }

    fn end(&self, process: Process, ending: Ending, random: &mut Random) {
        let mut ending = ending;
        if ending == Ending::Clean && process == Process::Host && !self.host.stop() {
            ending = Ending::Kill;
        }
        self.sim.note(|| format!("{process:?} ends: {ending:?}"));
        self.sim.count(match (process, ending) {
            (Process::Host, Ending::Kill) => Kind::HostKill,
            (Process::Host, Ending::PowerLoss) => Kind::HostPowerLoss,
            (Process::Host, Ending::Clean) => Kind::HostStop,
            (_, Ending::Kill) => Kind::ServerKill,
            (_, Ending::PowerLoss) => Kind::ServerPowerLoss,
            (_, Ending::Clean) => Kind::ServerStop,
        });
        self.sim.kill(process);
        if process == Process::Host {
            self.host.ended();
            self.sites.iter().for_each(|site| site.network.cut_all());
        } else {
            self.site(process).server.ended();
        }
        if ending == Ending::PowerLoss {
            self.sim.media(process).cut_power(random);
            if process == Process::Host {
                for (id, disk) in &self.host.disks {
                    self.oracle.check_floor(*id, &Content { pages: disk.snapshot() });
                }
            }
        }
    }

    fn restart(&self, process: Process) {
        if process == Process::Host {
            self.host.start();
        } else {
            self.site(process).server.start(&self.sim);
        }
    }

    fn site(&self, process: Process) -> &Site {
        self.sites.iter().find(|site| site.server.process == process).expect("a process server of this run")
    }

    /// Nothing goes wrong any more: everything must come right, by itself.
    fn settle(&self, random: &mut Random) {
        self.sim.note(|| "settling".to_owned());
        for media in [&self.sim.host, &self.sim.server, &self.sim.second] {
            media.rates.set(FaultRates::default());
            media.is_full.set(false);
        }
        for site in &self.sites {
            site.network.weather.set(CALM);
        }
        if self.plan.has_errors {
            // What a failed sync latched opens again with the process.
            let servers = self.sites.iter().map(|site| site.server.process);
            for process in servers.chain([Process::Host]) {
                self.end(process, Ending::Kill, random);
                self.restart(process);
            }
        }
        // Not only at rest: it must come right while the guests write, too.
        self.sim.sleep(Duration::from_millis(random.below(5000)));
        self.host.is_busy.set(false);
        let is_rotten = |site: &&Site| self.plan.has_rot && site.server.is_rotten.get();
        let (rotten, sound): (Vec<&Site>, Vec<&Site>) = self.sites.iter().partition(is_rotten);
        if !rotten.is_empty() {
            self.settle_rotten(&rotten);
        }
        if sound.is_empty() || self.sim.has_failed() {
            return;
        }
        let fed = self.fed(&sound);
        let mark = if fed.is_empty() { None } else { self.converge(&fed) };
        if self.sim.has_failed() {
            return;
        }
        let check = || {
            for site in &sound {
                if let Some(mark) = mark.filter(|_| self.is_fed(site)) {
                    self.await_point(site, mark);
                }
                self.check_all(site, true);
            }
        };
        check();
        if self.sim.has_failed() {
            return;
        }
        // And all of it is there after the next start.
        self.list_points();
        for site in &sound {
            let ending = if random.chance(1, 2) { Ending::PowerLoss } else { Ending::Kill };
            self.end(site.server.process, ending, random);
            self.restart(site.server.process);
        }
        sound.iter().for_each(|site| self.await_up(site));
        check();
        if !self.sim.has_failed() {
            self.sim.count(Kind::Converged);
        }
    }

    /// What is damaged stays away; nothing that is read may be wrong, and all of it is found.
    fn settle_rotten(&self, rotten: &[&Site]) {
        self.sim.sleep(Duration::from_secs(60));
        let mut healing = Vec::new();
        for site in rotten {
            if !site.server.is_up.get() {
                site.server.check_refusal(&self.sim);
                continue;
            }
            self.check_all(site, false);
            if !self.sim.has_failed() {
                site.server.find_rot(&self.sim);
            }
            healing.push(*site);
        }
        let healing = self.fed(&healing);
        if !healing.is_empty() && !self.sim.has_failed() {
            self.heal(&healing);
        }
    }

    /// What a scrub found damaged comes again from the host: the next point is the disk.
    fn heal(&self, sites: &[&Site]) {
        self.sim.sleep(Duration::from_secs(60));
        let Some(mark) = self.converge(sites) else { return };
        for site in sites {
            self.await_point(site, mark);
            let Some(set) = site.server.set.borrow().clone() else { return };
            let point = set.points(site.server.machine).ok().and_then(|points| points.get(mark));
            if !point.is_some_and(|point| site.server.check_point(&self.sim, &set, &point, true))
                && !self.sim.has_failed()
            {
                return self.sim.fail(format!("recovery point {mark}, made after the scrub, cannot be read"));
            }
            self.sim.count(Kind::BitRotHealed);
        }
    }

    /// Waits until everything is replicated to these, and marks that.
    fn converge(&self, sites: &[&Site]) -> Option<MarkId> {
        let servers: Vec<ServerId> = sites.iter().map(|site| site.endpoint.borrow().server).collect();
        let mut last = String::new();
        for _ in 0..600 {
            self.sim.sleep(Duration::from_secs(2));
            if self.sim.has_failed() {
                return None;
            }
            match self.host.status(&servers) {
                Some(status) if status.is_settled => {
                    if let Some(mark) = self.host.mark() {
                        return Some(mark);
                    }
                }
                Some(status) => last = status.text,
                None => last = "the host does not answer".to_owned(),
            }
        }
        self.sim.fail(format!("replication does not converge within 20 minutes: {last}"));
        None
    }

    fn await_up(&self, site: &Site) {
        for _ in 0..120 {
            if site.server.is_up.get() {
                return;
            }
            self.sim.sleep(Duration::from_secs(1));
        }
    }

    /// The server makes a point of the mark, which is what the disks hold now.
    fn await_point(&self, site: &Site, mark: MarkId) {
        let Some(point) = self.point(site, mark) else {
            return self.sim.fail(format!("mark {mark} never became a recovery point"));
        };
        for held in &point.disks {
            let Some(content) = self.oracle.at_mark(mark, held.disk) else { continue };
            let disk = &self.host.disks[&held.disk];
            if disk.snapshot() != content.pages {
                self.sim.fail(format!("disk {} changed although nobody writes", held.disk));
            }
        }
    }

    /// Waits for the point that a mark becomes.
    fn point(&self, site: &Site, mark: MarkId) -> Option<Point> {
        for _ in 0..120 {
            let set = site.server.set.borrow().clone();
            if let Some(set) = set.filter(|_| site.server.is_up.get())
                && let Ok(points) = set.points(site.server.machine)
                && let Some(point) = points.get(mark)
            {
                return Some(point);
            }
            self.sim.sleep(Duration::from_secs(1));
        }
        None
    }

    fn points(&self, site: &Site) -> BTreeSet<MarkId> {
        let set = site.server.set.borrow().clone().filter(|_| site.server.is_up.get());
        let points = set.and_then(|set| set.points(site.server.machine).ok());
        points.map_or_else(BTreeSet::new, |points| points.all().iter().map(|point| point.id).collect())
    }

    /// Whether one that was not there is, or soon is.
    fn has_another_point(&self, site: &Site, before: &BTreeSet<MarkId>) -> bool {
        (0..120).any(|_| {
            let is_there = !self.points(site).is_subset(before);
            if !is_there {
                self.sim.sleep(Duration::from_secs(1));
            }
            is_there
        })
    }

    /// Reads points: the newest, and some of the others.
    fn check_all(&self, site: &Site, must_read: bool) {
        let Some(set) = site.server.set.borrow().clone() else { return };
        let Ok(points) = set.points(site.server.machine) else { return };
        let points = points.all();
        let step = (points.len() / 6).max(1);
        for point in points.iter().rev().step_by(step) {
            site.server.check_point(&self.sim, &set, point, must_read);
            if self.sim.has_failed() {
                return;
            }
        }
    }
}

/// Prints what the product logs, for a run that is traced.
pub fn print_events() {
    let _ = tracing::subscriber::set_global_default(Printer);
}

struct Printer;

impl tracing::Subscriber for Printer {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::DEBUG
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        struct Fields(String);
        impl tracing::field::Visit for Fields {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                self.0.push_str(&format!(" {}={value:?}", field.name()));
            }
        }
        let mut fields = Fields(String::new());
        event.record(&mut fields);
        println!("             [{}]{}", event.metadata().level(), fields.0);
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}
