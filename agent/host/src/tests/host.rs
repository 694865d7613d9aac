use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tidemark_base::{DiskId, Generation, MachineId, ServerId, SystemClock};
use tidemark_nbd::Export;
use tidemark_proto::control::{
    Consistency, DAY_MINUTES, DiskSpec, Endpoint, MachineSpec, MarkRequest, NO_RPO, ReplicationPolicy, SourceMode,
    SourceState, Throttle, ThrottleRule, Via,
};
use tidemark_proto::replication::HostFrame;

use crate::capture::providers::ProviderError;
use crate::capture::splitter::Splitter;
use crate::error::HostError;
use crate::events::Events;
use crate::freeze::{FreezeError, Freezer, Frozen};
use crate::host::{Host, HostConfig, HostLimits};
use crate::pack::Permit;
use crate::send::link::{Link, LinkError, LinkEvents, LinkStream, Traffic};
use crate::source::Source;
use crate::state::session::Boot;

/// A process server that is never there.
struct Nowhere;

struct Closed;

impl Link for Nowhere {
    fn open(&self, _traffic: Traffic, events: Arc<dyn LinkEvents>) -> Box<dyn LinkStream> {
        events.closed(LinkError::Unreachable { reason: "nobody is there".into(), help: "start it".into() });
        Box::new(Closed)
    }
}

impl LinkStream for Closed {
    fn send(&mut self, _frame: HostFrame, _permit: Option<Permit>) -> Result<(), LinkError> {
        Err(LinkError::Cut { reason: "nobody is there".into() })
    }

    fn finish(&mut self) {}
}

pub(super) fn config(folder: &Path) -> HostConfig {
    HostConfig {
        state_folder: folder.join("state"),
        memory_folder: None,
        run_folder: folder.join("run"),
        allowed_uids: Vec::new(),
        link: Arc::new(|_| Arc::new(Nowhere)),
        freezer: None,
        limits: HostLimits { log_reserve_bytes: 0, mark_scan_wait: Duration::ZERO, ..HostLimits::default() },
        boot: Boot::current().unwrap(),
        clock: Arc::new(SystemClock::new()),
        events: Events::new(Arc::new(SystemClock::new())),
    }
}

pub(super) fn spec(folder: &Path, name: &str, disks: usize) -> MachineSpec {
    let disks = (0..disks).map(|index| {
        let path = folder.join(format!("{name}-{index}.img"));
        std::fs::File::create(&path).unwrap().set_len(8 << 20).unwrap();
        DiskSpec {
            disk: DiskId::random(),
            path: path.to_str().unwrap().to_owned(),
            export: format!("{name}-{index}"),
            generation: Generation::FIRST,
            bytes: 8 << 20,
            added: false,
        }
    });
    MachineSpec {
        machine: MachineId::random(),
        name: name.to_owned(),
        disks: disks.collect(),
        policy: ReplicationPolicy { point_interval: Some(Duration::from_secs(300)), ..ReplicationPolicy::default() },
        server: Endpoint { server: ServerId::random(), address: "nowhere.example:1".into() },
        others: Vec::new(),
        paused: false,
        listen: None,
        fenced: false,
        via: Default::default(),
        moved: false,
    }
}

/// A process server at an address, that is never there.
struct Somewhere(std::net::IpAddr);

impl Link for Somewhere {
    fn open(&self, traffic: Traffic, events: Arc<dyn LinkEvents>) -> Box<dyn LinkStream> {
        Nowhere.open(traffic, events)
    }

    fn remote(&self) -> Option<std::net::IpAddr> {
        Some(self.0)
    }
}

/// Tells when an application is frozen.
/// What should come by itself has come by then, whatever else the machine does.
const LIMIT: Duration = Duration::from_secs(60);

#[derive(Clone)]
struct Telling {
    frozen: std::sync::mpsc::Sender<()>,
    is_set_up: Arc<AtomicBool>,
}

struct Thawed;

impl Frozen for Thawed {
    fn thaw(self: Box<Self>) -> Result<(), FreezeError> {
        Ok(())
    }
}

impl Freezer for Telling {
    fn freeze(&self, _machine: &str, _limit: Duration) -> Result<Box<dyn Frozen>, FreezeError> {
        let _ = self.frozen.send(());
        Ok(Box::new(Thawed))
    }

    fn is_set_up(&self, _machine: &str) -> bool {
        self.is_set_up.load(Ordering::Acquire)
    }
}

fn request(spec: &MachineSpec) -> MarkRequest {
    MarkRequest { machine: spec.machine, consistency: Consistency::Crash, label: "now".into(), keep: true }
}

#[test]
fn what_is_protected_comes_back_at_the_same_addresses() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path(), "web", 2);
    let host = Host::start(config(folder.path())).unwrap();
    assert_eq!(host.probe(&[spec.disks[0].path.clone()], Via::Nbd).unwrap()[0].bytes, 8 << 20);
    let attached = host.protect(spec.clone()).unwrap();
    assert_eq!(attached.len(), 2);
    let socket = folder.path().join("run/nbd.sock");
    let expected = format!("nbd+unix:///web-0?socket={}", socket.display());
    assert_eq!(attached[0].nbd.as_deref(), Some(expected.as_str()));
    assert_eq!(host.protect(spec.clone()).unwrap(), attached, "the same again");
    assert_eq!(host.status()[0].disks[0].rpo, NO_RPO, "nothing is durable anywhere");

    let disk = host.machine(spec.machine).unwrap().disks().next().unwrap().clone();
    let splitter = Splitter::new(disk.clone()).unwrap();
    super::write(&splitter, 0, &[5; 4096]).unwrap();
    // No point without a replica, but any number of marks.
    let error = host.mark(&request(&spec)).unwrap_err();
    assert!(matches!(error, HostError::Scanning { done: 0, total, .. } if total == 8 << 20), "{error}");
    let outcome = host.mark(&MarkRequest { keep: false, ..request(&spec) }).unwrap();
    assert_eq!(outcome.positions.len(), 2);
    let logged = disk.state().logged;
    drop((splitter, disk));
    host.stop();
    drop(host);

    let host = Host::start(config(folder.path())).unwrap();
    let machine = host.machine(spec.machine).unwrap();
    assert_eq!(machine.attachments(), attached);
    assert_eq!(machine.disks().next().unwrap().state().logged, logged, "left cleanly, continued");
    let status = host.status();
    assert_eq!((status.len(), status[0].name.as_str(), status[0].disks.len()), (1, "web", 2));
    assert_eq!(status[0].disks[0].mode, SourceMode::Data);
    assert!(status[0].disks[0].scan.is_some() && status[0].disks[0].pending_bytes > 0);
    assert!(host.report().disks.len() == 2);

    host.pause(spec.machine).unwrap();
    assert!(host.status()[0].paused);
    host.resume(spec.machine).unwrap();
    host.resync(spec.machine).unwrap();
    host.unprotect(spec.machine).unwrap();
    assert!(matches!(host.mark(&request(&spec)), Err(HostError::UnknownMachine { .. })));
    drop(machine);
    let left: Vec<String> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("web") && !name.ends_with(".img"))
        .collect();
    assert!(left.is_empty(), "left behind: {left:?}");
    host.stop();
    assert!(Host::start(config(folder.path())).unwrap().status().is_empty());
}

#[test]
fn the_throttle_follows_the_address_of_the_process_server_and_the_policy() {
    let folder = tempfile::tempdir().unwrap();
    let mut spec = spec(folder.path(), "web", 1);
    let network = Some("10.1.0.0/16".parse().unwrap());
    let rule =
        ThrottleRule { days: 0, from_minute: 0, to_minute: DAY_MINUTES, network, bytes_per_second: Some(5 << 20) };
    spec.policy.throttle = Throttle { bytes_per_second: Some(9 << 20), rules: vec![rule] };
    for (address, limit) in [("10.1.2.3", 5 << 20), ("10.2.2.3", 9 << 20)] {
        let link = Arc::new(Somewhere(address.parse().unwrap()));
        let host = Host::start(HostConfig { link: Arc::new(move |_| link.clone()), ..config(folder.path()) }).unwrap();
        host.protect(spec.clone()).unwrap();
        let machine = host.machine(spec.machine).unwrap();
        machine.follow_throttle();
        assert_eq!(machine.throttled_to(), [Some(limit)], "{address}");
        let mut changed = spec.clone();
        changed.policy.throttle = Throttle::default();
        host.protect(changed).unwrap();
        assert_eq!(machine.throttled_to(), [None], "a changed policy counts at once");
        drop(machine);
        host.stop();
    }
}

/// By the agent itself: nobody needs to be there to ask for it.
#[test]
fn app_consistent_points_are_made_by_the_policy_when_something_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let mut spec = spec(folder.path(), "web", 1);
    spec.policy.app_point_interval = Some(Duration::from_secs(1));
    let (frozen, told) = std::sync::mpsc::channel();
    let freezer = Telling { frozen, is_set_up: Arc::new(AtomicBool::new(true)) };
    let config = HostConfig { freezer: Some(Arc::new(freezer.clone())), ..config(folder.path()) };
    let host = Host::start(config).unwrap();
    host.protect(spec.clone()).unwrap();
    assert!(told.recv_timeout(Duration::from_millis(2500)).is_err(), "nothing was written yet");
    let machine = host.machine(spec.machine).unwrap();
    let splitter = Splitter::new(machine.disks().next().unwrap().clone()).unwrap();
    freezer.is_set_up.store(false, Ordering::Release);
    super::write(&splitter, 0, &[7; 4096]).unwrap();
    assert!(told.recv_timeout(Duration::from_millis(2500)).is_err(), "nothing makes it quiet");
    freezer.is_set_up.store(true, Ordering::Release);
    for round in 1..3 {
        super::write(&splitter, 0, &[round; 4096]).unwrap();
        told.recv_timeout(LIMIT).unwrap();
        // The freezer tells before the mark is made: a write that comes in between is in this mark, and no other is due.
        let deadline = Instant::now() + LIMIT;
        while machine.marker().is_written_since_app() {
            assert!(Instant::now() < deadline, "no mark was made in round {round}");
            std::thread::yield_now();
        }
    }
    drop((splitter, machine));
    host.stop();
}

#[test]
fn what_cannot_be_protected_says_why_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let host = Host::start(config(folder.path())).unwrap();
    let web = spec(folder.path(), "web", 2);
    let mut twice = web.clone();
    twice.disks[1].path = twice.disks[0].path.clone();
    assert!(matches!(host.protect(twice), Err(HostError::DuplicateDisk { .. })));
    let mut absent = web.clone();
    absent.disks[1].path = folder.path().join("absent").to_str().unwrap().to_owned();
    assert!(matches!(host.protect(absent), Err(HostError::Disk(_))));
    assert!(host.status().is_empty());
    // The disk that was attached before the other failed is free again.
    host.protect(web.clone()).unwrap();
    let mut other = spec(folder.path(), "db", 1);
    other.disks[0].path = web.disks[1].path.clone();
    assert!(matches!(host.protect(other), Err(HostError::AlreadyProtected { .. })));
    let mut renamed = web.clone();
    renamed.disks[0].export = "another".to_owned();
    let error = host.protect(renamed).unwrap_err();
    assert!(matches!(error, HostError::OtherDisks { .. }) && !error.help().is_empty());
    host.stop();
}

#[test]
fn a_machine_whose_disk_is_away_shows_it_and_the_others_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let (web, db) = (spec(folder.path(), "web", 1), spec(folder.path(), "db", 1));
    let host = Host::start(config(folder.path())).unwrap();
    host.protect(web.clone()).unwrap();
    host.protect(db.clone()).unwrap();
    host.stop();
    drop(host);
    let away = folder.path().join("away");
    std::fs::hard_link(&web.disks[0].path, &away).unwrap();
    std::fs::remove_file(&web.disks[0].path).unwrap();
    let host = Host::start(config(folder.path())).unwrap();
    let status = host.status();
    let of = |name: &str| status.iter().find(|machine| machine.name == name).unwrap().disks[0].clone();
    assert_eq!(of("web").state, SourceState::Failed);
    assert!(of("web").problems[0].message.contains("does not exist"), "{:?}", of("web").problems);
    assert_ne!(of("db").state, SourceState::Failed);
    host.stop();
}

#[test]
fn a_guest_writes_through_the_socket() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path(), "web", 1);
    let host = Host::start(config(folder.path())).unwrap();
    host.protect(spec.clone()).unwrap();
    let machine = host.machine(spec.machine).unwrap();
    let disk = machine.disks().next().unwrap().clone();
    assert_eq!(Splitter::new(disk.clone()).unwrap().bytes(), 8 << 20);
    let start = disk.state().logged.epoch.start();
    let mut client = tidemark_nbd::client::Client::connect_unix(&folder.path().join("run/nbd.sock"), "web-0").unwrap();
    client.write(4096, &[3; 8192]).unwrap();
    client.flush().unwrap();
    let mut read = [0; 4096];
    client.read(8192, &mut read).unwrap();
    assert_eq!(read, [3; 4096]);
    drop(client);
    let mut image = vec![0; 8 << 20];
    super::replay(&disk, &super::records_after(&disk, &start), &mut image);
    assert!(image == std::fs::read(&spec.disks[0].path).unwrap());
    host.stop();
}

#[test]
fn a_fenced_machine_is_opened_by_nobody_and_goes_on_in_a_new_generation() {
    use tidemark_nbd::client::Client;
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path(), "web", 1);
    let open = || Client::connect_unix(&folder.path().join("run/nbd.sock"), "web-0");
    let logged = |host: &Host| host.machine(spec.machine).unwrap().disks().next().unwrap().log.published().logged;
    let host = Host::start(config(folder.path())).unwrap();
    host.protect(spec.clone()).unwrap();
    let mut client = open().unwrap();
    client.write(0, &[1; 4096]).unwrap();
    let fenced = MachineSpec { fenced: true, ..spec.clone() };
    host.protect(fenced.clone()).unwrap();
    let position = logged(&host);
    assert!(client.write(4096, &[2; 4096]).is_err(), "who was there is put out");
    assert!(open().is_err());
    assert_eq!(logged(&host), position, "nothing is written any more");
    host.stop();
    let host = Host::start(config(folder.path())).unwrap();
    assert!(open().is_err(), "a restart lets nobody in");
    // In a new generation, as after a failover that was cancelled: the same history goes on.
    let mut back = spec.clone();
    back.disks[0].generation = Generation(2);
    host.protect(MachineSpec { fenced: true, ..back.clone() }).unwrap();
    assert!(open().is_err());
    host.protect(back.clone()).unwrap();
    open().unwrap().write(8192, &[3; 4096]).unwrap();
    let now = logged(&host);
    assert!(now.epoch == position.epoch && now.sequence > position.sequence, "{position} and {now}");
    assert!(matches!(host.protect(spec.clone()), Err(HostError::OtherDisks { .. })), "a generation only grows");
    open().unwrap();
    host.stop();
}

#[test]
fn a_machine_is_served_over_tls_at_an_address_that_stays() {
    let folder = tempfile::tempdir().unwrap();
    let spec = MachineSpec { listen: Some("127.0.0.1:0".parse().unwrap()), ..spec(folder.path(), "web", 2) };
    let certificates = folder.path().join(format!("state/nbd-tls/{}/client", spec.machine));
    let host = Host::start(config(folder.path())).unwrap();
    let attached = host.protect(spec.clone()).unwrap();
    let nbds = |index: usize| attached[index].nbds.clone().unwrap();
    let first = nbds(0);
    let (place, rest) = first.strip_prefix("nbds://127.0.0.1:").unwrap().split_once('/').unwrap();
    assert_eq!(rest, format!("web-0?tls-certificates={}", certificates.display()));
    assert!(
        nbds(1).starts_with(&format!("nbds://127.0.0.1:{place}/web-1?")),
        "one listener for all disks: {}",
        nbds(1)
    );
    for file in ["ca-cert.pem", "client-cert.pem", "client-key.pem"] {
        assert!(certificates.join(file).is_file(), "{file}");
    }
    assert_eq!(host.protect(spec.clone()).unwrap(), attached, "any port is the one of before");
    host.stop();

    // A program that took the port meanwhile keeps remote clients out, and nobody else.
    let address = format!("127.0.0.1:{place}");
    let squatter = std::net::TcpListener::bind(&address).unwrap();
    let host = Host::start(config(folder.path())).unwrap();
    let machine = host.machine(spec.machine).unwrap();
    assert_eq!(machine.attachments()[0].nbds, None);
    tidemark_nbd::client::Client::connect_unix(&folder.path().join("run/nbd.sock"), "web-0").unwrap();
    let problems = machine.status()[0].problems.clone();
    assert!(problems.iter().any(|problem| problem.message.contains(&address)), "{problems:?}");
    drop(squatter);
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    while machine.attachments() != attached {
        assert!(std::time::Instant::now() < deadline, "{:?}", machine.attachments());
        std::thread::yield_now();
    }
    assert!(!machine.status()[0].problems.iter().any(|problem| problem.message.contains(&address)));

    // A port of another program is refused at once when somebody asks for it.
    let squatter = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = MachineSpec { listen: Some(squatter.local_addr().unwrap()), ..spec.clone() };
    let refused = host.protect(taken).unwrap_err();
    assert!(
        matches!(refused, HostError::Provider(ProviderError::Listen(_))) && refused.help().contains("--listen"),
        "{refused}: {}",
        refused.help()
    );
    let ended = host.protect(MachineSpec { listen: None, ..spec.clone() }).unwrap();
    assert!(ended.iter().all(|disk| disk.nbds.is_none() && disk.nbd.is_some()));
    assert!(std::net::TcpStream::connect(&address).is_err(), "the listener is gone");
    host.unprotect(spec.machine).unwrap();
    assert!(!certificates.exists(), "what remote clients need goes with the machine");
    host.stop();
}

#[test]
fn disks_come_and_go_while_the_others_stay_attached() {
    let folder = tempfile::tempdir().unwrap();
    let both = spec(folder.path(), "web", 2);
    let one = MachineSpec { disks: both.disks[..1].to_vec(), ..both.clone() };
    let mut both = both;
    both.disks[1].added = true;
    let host = Host::start(config(folder.path())).unwrap();
    let before = host.protect(one.clone()).unwrap();
    let machine = host.machine(one.machine).unwrap();
    let stays = machine.disks().next().unwrap();

    let attached = host.protect(both.clone()).unwrap();
    assert_eq!((attached.len(), &attached[0]), (2, &before[0]));
    assert!(Arc::ptr_eq(&stays, &machine.disks().next().unwrap()), "the disk that stays was attached anew");
    let mark = MarkRequest { keep: false, ..request(&both) };
    let covered =
        |outcome: crate::mark::MarkOutcome| outcome.positions.iter().map(|(disk, _)| *disk).collect::<Vec<_>>();
    // Everything is scanned for the first time here: a machine without any point loses none by waiting for both.
    assert_eq!(covered(host.mark(&mark).unwrap()), [stays.identity.disk], "one that is added is not waited for");
    drop((stays, machine));
    host.stop();
    drop(host);

    let host = Host::start(config(folder.path())).unwrap();
    assert_eq!(host.machine(one.machine).unwrap().attachments(), attached, "over a restart");
    assert_eq!(host.protect(one.clone()).unwrap(), before);
    assert_eq!(host.status()[0].disks.len(), 1);
    assert!(!folder.path().join("web-1.img.tidemark").exists(), "state of the disk that left stays");
    assert!(folder.path().join("web-0.img.tidemark").exists());
    // Under another id, as an operator who adds it again makes it.
    let mut again = both.clone();
    again.disks[1].disk = DiskId::random();
    host.protect(again.clone()).unwrap();
    // What cannot be attached leaves everything as it was.
    let mut absent = again.clone();
    absent.disks.push(DiskSpec {
        disk: DiskId::random(),
        path: folder.path().join("absent.img").to_str().unwrap().to_owned(),
        export: "web-2".to_owned(),
        ..absent.disks[1].clone()
    });
    assert!(matches!(host.protect(absent), Err(HostError::Disk(_))));
    assert_eq!(host.machine(one.machine).unwrap().spec().disks, again.disks);
    // A disk does not move.
    let mut moved = again.clone();
    moved.disks[1].path = again.disks[0].path.clone();
    moved.disks.remove(0);
    assert!(matches!(host.protect(moved), Err(HostError::OtherDisks { .. })));
    host.stop();
}

#[test]
fn a_disk_that_grew_is_attached_at_its_new_size_alone() {
    let folder = tempfile::tempdir().unwrap();
    let mut spec = spec(folder.path(), "web", 2);
    let host = Host::start(config(folder.path())).unwrap();
    let before = host.protect(spec.clone()).unwrap();
    let machine = host.machine(spec.machine).unwrap();
    let stays = machine.disks().nth(1).unwrap();
    std::fs::File::options().write(true).open(&spec.disks[0].path).unwrap().set_len(16 << 20).unwrap();
    assert_eq!(host.report().disks[0].current_bytes, 16 << 20, "it is said");
    (spec.disks[0].generation, spec.disks[0].bytes) = (Generation(2), 16 << 20);
    let after = host.protect(spec.clone()).unwrap();
    assert_eq!((after[0].bytes, &after[0].nbd, &after[1]), (16 << 20, &before[0].nbd, &before[1]));
    assert!(Arc::ptr_eq(&stays, &machine.disks().nth(1).unwrap()));
    let grown = machine.disks().next().unwrap();
    assert_eq!((grown.identity.generation, grown.mode()), (Generation(2), crate::state::session::Mode::Data));
    assert_eq!(host.protect(spec.clone()).unwrap(), after);
    assert!(Arc::ptr_eq(&grown, &machine.disks().next().unwrap()), "the same again attaches nothing anew");
    drop((stays, grown, machine));
    host.stop();
    drop(host);
    let host = Host::start(config(folder.path())).unwrap();
    assert_eq!(host.machine(spec.machine).unwrap().attachments(), after);
    host.stop();
}

/// A crash between forgetting a disk and removing its state.
#[test]
fn the_state_of_a_disk_that_was_here_under_another_id_is_not_taken_over() {
    let folder = tempfile::tempdir().unwrap();
    let mut spec = spec(folder.path(), "web", 1);
    let host = Host::start(config(folder.path())).unwrap();
    host.protect(spec.clone()).unwrap();
    host.stop();
    drop(host);
    std::fs::remove_dir_all(folder.path().join("state/machines")).unwrap();
    spec.disks[0].disk = DiskId::random();
    let host = Host::start(config(folder.path())).unwrap();
    let mut subscription = host.events().subscribe(host.events().newest());
    host.protect(spec.clone()).unwrap();
    let kinds: Vec<_> = subscription.take().into_iter().map(|event| event.kind).collect();
    assert!(kinds.contains(&crate::events::EventKind::DiskAttachedFirst), "{kinds:?}");
    host.stop();
}
