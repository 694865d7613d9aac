//! A machine that feeds two process servers: each with media, network, limits and troubles of its own. They come and go, and one that
//! is away takes the other one nowhere.

use std::rc::Rc;
use std::time::Duration;

use tidemark_base::random::Random;
use tidemark_base::seam::World;
use tidemark_base::{DiskId, MachineId, ServerId};
use tidemark_process_server::journal::Limits;
use tidemark_process_server::points::Retention;
use tidemark_proto::control::Endpoint;

use crate::counts::Kind;
use crate::link::{CALM, Network, Weather};
use crate::oracle::Oracle;
use crate::server::ServerState;
use crate::world::{Process, Sim};
use crate::{Director, Ending, Site, host};

/// Two are fed in one seed of so many.
const ONE_IN: u64 = 3;
/// In smaller logs a single write decides who steps down.
const PACED_LOG_BYTES_MIN: u64 = 256 << 10;
/// How long one is away, at most: long enough for slow guests to fill three quarters of the log.
const AWAY: Duration = Duration::from_secs(240);

impl Site {
    pub(crate) fn new(sim: &Rc<Sim>, server: Rc<ServerState>, weather: Weather, keeps_all: bool) -> Self {
        let network = Network::new(sim.clone(), server.clone());
        *server.network.borrow_mut() = Rc::downgrade(&network);
        let endpoint = Endpoint { server: ServerId::from_bytes([1; 16]), address: host::address(0) };
        Self { server, network, weather, keeps_all, endpoint: endpoint.into() }
    }
}

/// The other process server, where the seed has one. Of randomness of its own, so that the others are what they were.
pub(crate) fn second(
    seed: u64,
    sim: &Rc<Sim>,
    oracle: &Rc<Oracle>,
    machine: MachineId,
    disks: &[(DiskId, u64)],
) -> Option<Site> {
    let mut random = Random::new(seed ^ 0x0073_6563_6f6e_6400);
    if !random.chance(1, ONE_IN) {
        return None;
    }
    sim.second.slow_one_in.set([0, 0, 0, 0, 0, 64, 16, 4][random.below(8) as usize]);
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
    let weather = Weather {
        is_down: false,
        cut_one_in: if random.chance(1, 4) { 0 } else { 20 << random.below(6) },
        delay_ms_max: [1, 5, 60, 300][random.below(4) as usize],
    };
    let server = ServerState::new(Process::Second, machine, disks.to_vec(), limits, retention, oracle.clone());
    let site = Site::new(sim, server, weather, keeps_all);
    let id = ServerId::from_bytes(random.bytes16());
    *site.endpoint.borrow_mut() = Endpoint { server: id, address: host::address(1) };
    sim.count(Kind::SecondServer);
    Some(site)
}

impl Director {
    /// Whether the machine feeds it.
    pub(crate) fn is_fed(&self, site: &Site) -> bool {
        self.host.fed().contains(&site.endpoint.borrow())
    }

    pub(crate) fn fed<'a>(&self, sites: &[&'a Site]) -> Vec<&'a Site> {
        sites.iter().copied().filter(|site| self.is_fed(site)).collect()
    }

    /// One is left, comes back, or is replaced; or they are named in another order.
    pub(crate) fn change_servers(&self, random: &mut Random) {
        let fed = self.host.fed();
        let Some(left) = self.sites.iter().find(|site| !self.is_fed(site)) else {
            if random.chance(1, 3) {
                self.sim.count(Kind::ServersReordered);
                return self.host.feed(fed.into_iter().rev().collect());
            }
            let gone = self.a_site(random);
            self.sim.count(Kind::ServerRemoved);
            self.sim.note(|| format!("{:?} is left", gone.server.process));
            let stays = |endpoint: &Endpoint| *endpoint != *gone.endpoint.borrow();
            return self.host.feed(fed.into_iter().filter(stays).collect());
        };
        if random.chance(1, 2) {
            self.replace(left, random);
        }
        self.sim.count(Kind::ServerAdded);
        self.sim.note(|| format!("{:?} is fed again", left.server.process));
        let mut fed = fed;
        fed.insert(random.below(2) as usize, left.endpoint.borrow().clone());
        self.host.feed(fed);
    }

    /// What it held is deleted, or another machine is where it was.
    fn replace(&self, site: &Site, random: &mut Random) {
        let process = site.server.process;
        self.sim.count(Kind::ServerReplaced);
        self.end(process, Ending::Kill, random);
        site.server.replace(&self.sim);
        if random.chance(1, 2) {
            site.endpoint.borrow_mut().server = ServerId::from_bytes(random.bytes16());
        }
        self.restart(process);
    }

    /// One is away while the other one keeps up: only the one that is away steps down, and points go on being made.
    pub(crate) fn leave_one_behind(&self, random: &mut Random) {
        // What failed before may hold up anyone.
        let is_in_order = !self.plan.has_errors && self.plan.log_bytes >= PACED_LOG_BYTES_MIN && !self.plan.has_cycle;
        let sites: Vec<&Site> = self.sites.iter().collect();
        if !is_in_order || self.fed(&sites).len() < 2 || sites.iter().any(|site| site.server.is_rotten.get()) {
            return self.crash(self.a_site(random).server.process, random);
        }
        let first = random.below(2) as usize;
        let (live, away) = (sites[first], sites[1 - first]);
        let slow = [&self.sim.host, self.sim.media(live.server.process)].map(|media| media.slow_one_in.replace(0));
        live.network.weather.set(CALM);
        away.network.weather.set(CALM);
        self.host.paced_for.set(Some(self.plan.log_bytes));
        if self.keep_up() {
            self.sim.note(|| format!("{:?} is away, {:?} is there", away.server.process, live.server.process));
            self.await_let_go(live, away, random);
        }
        self.host.paced_for.set(None);
        [&self.sim.host, self.sim.media(live.server.process)]
            .iter()
            .zip(slow)
            .for_each(|(media, one_in)| media.slow_one_in.set(one_in));
        live.network.weather.set(live.weather);
        away.network.weather.set(away.weather);
    }

    /// Waits until both have what was written, but for what is on its way.
    fn keep_up(&self) -> bool {
        let servers: Vec<ServerId> = self.host.fed().iter().map(|endpoint| endpoint.server).collect();
        (0..60).any(|_| {
            self.sim.sleep(Duration::from_secs(1));
            self.host.status(&servers).is_some_and(|status| status.keeps_up)
        })
    }

    fn await_let_go(&self, live: &Site, away: &Site, random: &mut Random) {
        let servers = [live, away].map(|site| site.endpoint.borrow().server);
        let is_killed = random.chance(1, 2);
        if is_killed {
            self.end(away.server.process, Ending::Kill, random);
        } else {
            away.network.weather.set(Weather { is_down: true, ..CALM });
            away.network.cut_all();
        }
        let start = self.sim.now();
        let mut is_let_go = false;
        while self.sim.now() - start < AWAY && !is_let_go && !self.sim.has_failed() {
            self.sim.sleep(Duration::from_secs(1));
            self.must_be_in_data_mode(servers[0]);
            is_let_go = self.host.status(&servers[1..]).is_some_and(|status| !status.is_in_data_mode);
        }
        // Nobody waits for the one that is away.
        // Retention may take the very point before we look, and others are made all the time: any that is new will do. An epoch that
        // begins just then, for the other disk, may take the first one.
        let make = || {
            let before = self.points(live);
            self.host.mark().is_some() && self.has_another_point(live, &before)
        };
        match (0..2).any(|_| make()) {
            true => self.sim.count(Kind::LiveStayed),
            false => self.sim.fail("no point is made beside a process server that is away".to_owned()),
        }
        self.must_be_in_data_mode(servers[0]);
        if is_let_go {
            self.sim.count(Kind::LetGo);
        }
        if is_killed {
            self.restart(away.server.process);
        }
    }

    fn must_be_in_data_mode(&self, server: ServerId) {
        let Some(status) = self.host.status(&[server]) else { return };
        if !status.is_in_data_mode {
            self.sim.fail(format!("the one that is there stepped down with the one that is away: {}", status.text));
        }
    }
}
