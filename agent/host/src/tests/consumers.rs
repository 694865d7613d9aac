//! A machine that feeds several process servers, in memory: which of them steps down, and how they come and go.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tidemark_base::{MachineId, ServerId};
use tidemark_proto::control::{Consistency, Endpoint, MachineSpec, MarkRequest, SourceDisk, SourceMode, SourceState};
use tidemark_proto::replication::HostFrame;

use super::host::{config, spec};
use super::{Random, write};
use crate::capture::splitter::Splitter;
use crate::events::EventKind;
use crate::host::{Host, HostConfig};
use crate::pack::Permit;
use crate::send::link::{Link, LinkError, LinkEvents, LinkStream, Traffic};
use crate::send::tests::server::{MemoryServer, eventually};
use crate::source::{EpochReason, Source, SourceIdentity};

const LIMIT: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 8 * MIB;
const LOG_LIMIT: u64 = 4 * MIB;
/// Writes stay below, so that a scan of what changed is told from one of the whole disk.
const TOUCHED_BYTES: u64 = 3 * MIB;

/// A process server that can be away.
#[derive(Clone)]
struct Site(Arc<Inner>);

struct Inner {
    id: ServerId,
    server: MemoryServer,
    is_up: AtomicBool,
    open: Mutex<Option<Arc<dyn LinkEvents>>>,
}

struct Guarded {
    inner: Option<Box<dyn LinkStream>>,
    site: Site,
}

impl Site {
    fn of(spec: &MachineSpec) -> Self {
        let disk = &spec.disks[0];
        let identity = SourceIdentity {
            disk: disk.disk,
            machine: spec.machine,
            generation: disk.generation,
            disk_bytes: disk.bytes,
        };
        let (id, server) = (ServerId::random(), MemoryServer::new(identity, 7));
        Self(Arc::new(Inner { id, server, is_up: AtomicBool::new(true), open: Mutex::default() }))
    }

    fn endpoint(&self) -> Endpoint {
        Endpoint { server: self.0.id, address: "memory.example:1".into() }
    }

    fn is_up(&self) -> bool {
        self.0.is_up.load(Ordering::SeqCst)
    }

    fn set_up(&self, is_up: bool) {
        self.0.is_up.store(is_up, Ordering::SeqCst);
        let open = self.0.open.lock().unwrap().take();
        if let Some(events) = open.filter(|_| !is_up) {
            events.closed(LinkError::Cut { reason: "it was killed".into() });
        }
    }

    /// What it holds, and whatever it found wrong.
    fn assert_equals(&self, model: &[u8]) {
        self.0.server.with(|state| {
            assert_eq!(state.violations, Vec::<String>::new());
            assert!(state.image == model, "its image differs");
        });
    }
}

impl Link for Site {
    fn open(&self, traffic: Traffic, events: Arc<dyn LinkEvents>) -> Box<dyn LinkStream> {
        let inner = match self.is_up() {
            true => {
                *self.0.open.lock().unwrap() = Some(events.clone());
                Some(self.0.server.open(traffic, events))
            }
            false => {
                events.closed(LinkError::Unreachable { reason: "it is dead".into(), help: "start it".into() });
                None
            }
        };
        Box::new(Guarded { inner, site: self.clone() })
    }
}

impl LinkStream for Guarded {
    fn send(&mut self, frame: HostFrame, permit: Option<Permit>) -> Result<(), LinkError> {
        match &mut self.inner {
            Some(inner) if self.site.is_up() => inner.send(frame, permit),
            _ => Err(LinkError::Cut { reason: "it is dead".into() }),
        }
    }

    fn finish(&mut self) {
        if let Some(inner) = &mut self.inner {
            inner.finish();
        }
    }
}

/// A host with one machine of one disk, which its workload writes to.
struct Bench {
    folder: tempfile::TempDir,
    spec: MachineSpec,
    sites: Arc<Mutex<Vec<Site>>>,
    host: Host,
    workload: Option<Splitter>,
    model: Vec<u8>,
    random: Random,
}

impl Bench {
    /// Feeds so many process servers, and waits until each holds everything.
    fn new(servers: usize) -> (Self, Vec<Site>) {
        let folder = tempfile::tempdir().unwrap();
        let mut spec = spec(folder.path(), "web", 1);
        spec.policy.log_limit_bytes = Some(LOG_LIMIT);
        let sites: Vec<Site> = (0..servers).map(|_| Site::of(&spec)).collect();
        spec.server = sites[0].endpoint();
        spec.others = sites[1..].iter().map(Site::endpoint).collect();
        let known = Arc::new(Mutex::new(sites.clone()));
        let host = Self::start(folder.path(), &known);
        host.protect(spec.clone()).unwrap();
        let model = vec![0; DISK_BYTES as usize];
        let mut bench = Self { folder, spec, sites: known, host, workload: None, model, random: Random(1) };
        bench.open();
        bench.write(16);
        sites.iter().for_each(|site| bench.settle(site));
        (bench, sites)
    }

    fn start(folder: &std::path::Path, sites: &Arc<Mutex<Vec<Site>>>) -> Host {
        let sites = sites.clone();
        let link = move |endpoint: &Endpoint| -> Arc<dyn Link> {
            let known = sites.lock().unwrap();
            Arc::new(known.iter().find(|site| site.0.id == endpoint.server).expect("a site of the test").clone())
        };
        Host::start(HostConfig { link: Arc::new(link), ..config(folder) }).unwrap()
    }

    fn machine(&self) -> MachineId {
        self.spec.machine
    }

    fn open(&mut self) {
        let disk = self.host.machine(self.machine()).unwrap().disks().next().unwrap();
        self.workload = Some(Splitter::new(disk).unwrap());
    }

    fn write(&mut self, count: u64) {
        for _ in 0..count {
            let at = self.random.below(TOUCHED_BYTES / 4096 - 8) * 4096;
            let data: Vec<u8> = (0..32 << 10).map(|_| self.random.below(256) as u8).collect();
            write(self.workload.as_ref().unwrap(), at, &data).unwrap();
            self.model[at as usize..][..data.len()].copy_from_slice(&data);
        }
    }

    /// What is told of the disk, as it is about one process server.
    fn told(&self, site: &Site) -> SourceDisk {
        let disks = self.host.report().disks;
        disks.into_iter().find(|disk| disk.server == Some(site.0.id)).expect("it is fed")
    }

    fn is_settled(&self, site: &Site) -> bool {
        let told = self.told(site);
        told.state == SourceState::Replicating && told.scan.is_none() && told.durable == told.logged
    }

    fn settle(&self, site: &Site) {
        assert!(eventually(LIMIT, || self.is_settled(site)), "{:?}", self.told(site));
        site.assert_equals(&self.model);
    }

    /// A point that is made now is the same at each of these.
    fn point(&self, sites: &[&Site]) {
        let (machine, label) = (self.machine(), "now".to_owned());
        let request = MarkRequest { machine, consistency: Consistency::Crash, label, keep: true };
        let mut mark = None;
        // Not while what was on its way at the beginning of an epoch goes to the last of them.
        let made = eventually(LIMIT, || {
            mark = self.host.mark(&request).ok();
            mark.is_some()
        });
        assert!(made, "{:?}", self.host.mark(&request));
        let mark = mark.expect("it was made").id;
        for site in sites {
            assert!(site.0.server.wait_until(LIMIT, |state| state.points.contains_key(&mark)));
            site.0.server.with(|state| assert!(state.points[&mark] == self.model, "the point differs"));
        }
    }

    fn count(&self, kind: EventKind) -> usize {
        self.host.events().after(0).iter().filter(|event| event.kind == kind).count()
    }
}

#[test]
fn one_dead_process_server_beside_a_live_one_steps_down_alone() {
    let (mut bench, sites) = Bench::new(3);
    let (live, dead, slow) = (&sites[0], &sites[1], &sites[2]);
    dead.set_up(false);
    // One that is there and takes nothing is no better.
    slow.0.server.with(|state| state.behaviour.hold_acknowledgements = true);
    let mut is_let_go = false;
    for round in 0..24 {
        bench.write(8);
        assert!(eventually(LIMIT, || bench.told(live).durable == bench.told(live).logged), "{:?}", bench.told(live));
        let (told, log_bytes) = (bench.told(live), bench.told(live).log_bytes);
        assert_eq!(told.mode, SourceMode::Data, "round {round}: {}", told.mode_reason);
        assert!(log_bytes <= LOG_LIMIT, "round {round}: the log takes {log_bytes}");
        is_let_go |= bench.told(dead).mode == SourceMode::Bitmap;
    }
    assert!(is_let_go && bench.count(EventKind::ConsumerSteppedDown) >= 2, "{:?}", bench.told(dead));
    assert_eq!(bench.count(EventKind::SteppedDown), 0, "the disk never stopped logging");
    let told = bench.told(dead);
    assert_eq!((told.mode, told.state), (SourceMode::Bitmap, SourceState::Connecting));
    assert!(told.mode_reason.contains("too far behind") && told.pending_bytes > 0, "{told:?}");
    assert!(told.rpo > bench.told(live).rpo, "each has its own");
    // Points go on where somebody holds them.
    bench.point(&[live]);
    bench.settle(live);

    // What changed, never the whole disk.
    let (_, left) = bench.told(dead).scan.expect("it has blocks to get");
    assert!(left <= TOUCHED_BYTES, "{left} bytes are left for it");
    dead.set_up(true);
    slow.0.server.with(|state| state.behaviour.hold_acknowledgements = false);
    bench.host.resume(bench.machine()).unwrap();
    bench.write(8);
    sites.iter().for_each(|site| bench.settle(site));
    sites.iter().for_each(|site| assert_eq!(bench.told(site).mode, SourceMode::Data, "{:?}", bench.told(site)));
    bench.write(8);
    bench.point(&[live, dead, slow]);
    bench.host.stop();
}

/// Small writes and marks fill a log with what is no data.
#[test]
fn what_a_log_occupies_decides_who_is_let_go() {
    let (mut bench, sites) = Bench::new(2);
    let (live, dead) = (&sites[0], &sites[1]);
    let disk = bench.host.machine(bench.machine()).unwrap().disks().next().unwrap();
    // What the log holds already goes before the limit is that small.
    for limit_bytes in [MIB, 256 << 10] {
        bench.spec.policy.log_limit_bytes = Some(limit_bytes);
        bench.host.protect(bench.spec.clone()).unwrap();
        let is_short = || {
            disk.make_room();
            bench.told(live).log_bytes < 64 << 10
        };
        assert!(eventually(LIMIT, is_short), "{:?}", bench.told(live));
    }
    let request =
        MarkRequest { machine: bench.machine(), consistency: Consistency::Crash, label: String::new(), keep: false };
    dead.set_up(false);
    let mut marks = 0;
    while bench.count(EventKind::ConsumerSteppedDown) == 0 && bench.count(EventKind::SteppedDown) == 0 {
        write(bench.workload.as_ref().unwrap(), 0, &[marks as u8; 512]).unwrap();
        bench.model[..512].fill(marks as u8);
        (0..4).for_each(|_| drop(bench.host.mark(&request).unwrap()));
        marks += 4;
        if marks % 32 == 0 {
            assert!(
                eventually(LIMIT, || bench.told(live).durable == bench.told(live).logged),
                "{:?}",
                bench.told(live)
            );
            disk.make_room();
        }
    }
    assert_eq!(bench.count(EventKind::SteppedDown), 0, "after {marks} marks: {:?}", bench.told(live));
    bench.settle(live);
    bench.host.stop();
}

/// An epoch begins with a scan, also where there is nothing to read: a mark inside it is never a point.
#[test]
fn a_point_that_is_asked_for_when_an_epoch_begins_waits_for_its_scan() {
    let (mut bench, sites) = Bench::new(1);
    for _ in 0..3 {
        bench.write(1);
        bench.settle(&sites[0]);
        let disk = bench.host.machine(bench.machine()).unwrap().disks().next().unwrap();
        // Its sender hears of it a little later.
        sites[0].set_up(false);
        disk.new_epoch(EpochReason::Unclean).unwrap();
        sites[0].set_up(true);
        bench.point(&[&sites[0]]);
    }
    bench.host.stop();
}

#[test]
fn process_servers_come_and_go_while_the_workload_writes() {
    let (mut bench, sites) = Bench::new(1);
    let first = &sites[0];
    let asked = || first.0.server.with(|state| (state.asked_bytes, state.streams.len()));
    let before = asked();
    let second = Site::of(&bench.spec);
    bench.sites.lock().unwrap().push(second.clone());
    bench.spec.others = vec![second.endpoint()];
    bench.host.protect(bench.spec.clone()).unwrap();
    assert_eq!(bench.told(&second).pending_bytes / MIB, DISK_BYTES / MIB, "it holds nothing yet");
    // The same disk, opened once: nobody was told to open it again.
    bench.write(16);
    [first, &second].into_iter().for_each(|site| bench.settle(site));
    bench.point(&[first, &second]);
    assert_eq!(asked().0, before.0, "nothing is compared with the one that was there");

    // Which of them comes first is no change, and neither is the agent's restart.
    (bench.spec.server, bench.spec.others) = (second.endpoint(), vec![first.endpoint()]);
    let streams = [first, &second].map(|site| site.0.server.with(|state| state.streams.len()));
    bench.host.protect(bench.spec.clone()).unwrap();
    bench.write(16);
    [first, &second].into_iter().for_each(|site| bench.settle(site));
    assert_eq!([first, &second].map(|site| site.0.server.with(|state| state.streams.len())), streams);
    bench.workload = None;
    bench.host.stop();
    bench.host = Bench::start(bench.folder.path(), &bench.sites);
    bench.open();
    bench.write(16);
    [first, &second].into_iter().for_each(|site| bench.settle(site));
    assert_eq!([first, &second].map(|site| site.0.server.with(|state| state.asked_bytes)), [before.0, 0]);

    // One that is dead goes, and what the log kept for it goes with it.
    first.set_up(false);
    bench.write(64);
    assert!(eventually(LIMIT, || bench.told(&second).durable == bench.told(&second).logged));
    bench.spec.others.clear();
    bench.host.protect(bench.spec.clone()).unwrap();
    let report = bench.host.report();
    assert_eq!(report.disks.iter().map(|disk| disk.server).collect::<Vec<_>>(), [Some(second.0.id)]);
    let state = bench.folder.path().join("web-0.img.tidemark");
    let names: Vec<String> = std::fs::read_dir(state)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains(&first.0.id.to_string()))
        .collect();
    assert!(names.is_empty(), "left behind: {names:?}");
    bench.write(16);
    bench.settle(&second);
    assert!(eventually(LIMIT, || bench.told(&second).log_bytes < MIB), "{:?}", bench.told(&second));
    bench.point(&[&second]);
    bench.host.stop();
}
