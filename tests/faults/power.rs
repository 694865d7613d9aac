//! Power cuts. The host's disks and logs, and the process server's store, each lie on a device whose every write is
//! recorded. From the records come states that a cut at some instant could have left, on both at the same instant; from
//! each our roles start, and nothing that was acknowledged as durable may be missing.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tidemark_tests::block::{self, Loop, Mount, StorageDaemon};
use tidemark_tests::image::{self, MIB, Seeded};
use tidemark_tests::nbd::Client;
use tidemark_tests::site::{Machine, number, offline, text};
use tidemark_tests::writelog::{self, Recording, WriteLog};
use tidemark_tests::{Site, need, need_root, tools, wait};

const DISK_BYTES: u64 = 6 * MIB;
/// Sparse; the roles want room before they log or store anything.
const DEVICE_BYTES: u64 = 256 * MIB;
const LOG_BYTES: u64 = 1 << 30;
const BLOCK: u64 = 4096;
/// States that the whole site starts from, and states of the store that are recovered and verified alone.
const SITE_STATES: (usize, usize) = (24, 600);
const STORE_STATES: (usize, usize) = (500, 10_000);
/// The host syncs what it remembers about every second.
const SETTLED_AFTER: Duration = Duration::from_secs(3);
/// Writes before a cut about whose flushes the control's device lies, and how often it may do so unnoticed.
const LIES: usize = 60;
const UNNOTICED_MAX: usize = 40;
/// Stores recovered at once.
const WORKERS: usize = 2;

/// One recorded device: an ext4 file system on a loop device on QEMU's file.
struct Recorded {
    base: PathBuf,
    /// The loop device, which states of it are mounted from as well: a disk after a power cut is the same disk.
    device: PathBuf,
    recording: Recording,
    mount: Option<Mount>,
    daemon: Option<StorageDaemon>,
}

impl Recorded {
    fn start(folder: &Path, name: &str, at: &Path) -> Self {
        let image = folder.join(format!("{name}.raw"));
        block::make_ext4(&image, DEVICE_BYTES, "^metadata_csum_seed");
        let base = folder.join(format!("{name}-base.raw"));
        image::copy(&image, &base);
        let log = folder.join(format!("{name}.log"));
        std::fs::File::create(&log).and_then(|file| file.set_len(LOG_BYTES)).unwrap();
        let daemon = StorageDaemon::start(&image, &folder.join(name), &writelog::nodes(&log));
        let device = Loop::attach(daemon.file());
        let path = device.path().to_owned();
        let mount = Mount::device(device, at, "noatime");
        Self { base, device: path, recording: Recording::new(&log), mount: Some(mount), daemon: Some(daemon) }
    }

    /// Ends the device; what was recorded.
    fn finish(&mut self) -> WriteLog {
        self.mount.take().unwrap().unmount();
        self.daemon.take().unwrap().stop();
        self.recording.read()
    }
}

/// An instant: how many writes each device had seen.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Debug)]
struct Instants {
    host: usize,
    store: usize,
}

/// What somebody was told, and when at the latest.
#[derive(Default)]
struct Told {
    /// Instants of the devices, read together.
    instants: Vec<Instants>,
    /// From here on the host remembers durably that the process server acknowledged something: a cut before that may cost
    /// a whole scan, a later one must not.
    settled: Instants,
    /// Flushes that were acknowledged: every write so far, by block, with its number.
    flushes: Vec<(Instants, BTreeMap<u64, u64>)>,
    /// Points that were reported as made, each with the disk as it was then.
    points: Vec<(Instants, String, PathBuf)>,
    /// Every write that was sent: block and number.
    writes: Vec<(u64, u64)>,
    /// Cuts that the agent called durable: epoch and sequence.
    durable: Vec<(usize, String, u64)>,
}

fn content(block: u64, number: u64) -> Vec<u8> {
    let mut data = vec![0; BLOCK as usize];
    Seeded(block << 32 | number).fill(&mut data);
    data
}

/// `epoch:sequence` as the status prints it.
fn position(text: &str) -> Option<(String, u64)> {
    let (epoch, sequence) = text.split_once(':')?;
    Some((epoch.to_owned(), sequence.parse().ok()?))
}

struct Scene {
    folder: TempDir,
    site: Site,
    machine: Machine,
    told: Told,
    host: (PathBuf, WriteLog),
    store: (PathBuf, WriteLog),
    devices: [PathBuf; 2],
}

/// The host's folder in the site: its disk beside the agent's state.
fn host_folder(site: &Site) -> PathBuf {
    site.path("host")
}

/// Another boot of the machine, as far as anybody who reads /proc can tell.
struct Boot {
    _id: Mount,
    _stat: Mount,
}

impl Boot {
    fn new(site: &Site, number: u64) -> Self {
        let id = format!("{:08x}-0000-4000-8000-{number:012x}\n", 0x7469_6465);
        let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let stat = std::fs::read_to_string("/proc/stat").unwrap();
        // The machine started a moment ago, after everything that was written before.
        let stat: String = stat
            .lines()
            .map(|line| match line.strip_prefix("btime ") {
                Some(_) if number > 0 => format!("btime {}\n", since_epoch.as_secs() + 1),
                _ => format!("{line}\n"),
            })
            .collect();
        let over = |name: &str, content: &str, at: &str| {
            let file = site.path(name);
            std::fs::File::create(&file).and_then(|file| file.write_all_at(content.as_bytes(), 0)).unwrap();
            Mount::bind(&file, Path::new(at))
        };
        Self { _id: over("boot-id", &id, "/proc/sys/kernel/random/boot_id"), _stat: over("stat", &stat, "/proc/stat") }
    }
}

/// Lives under record: writes, flushes, points, while the store's base moves on behind them.
fn record() -> Scene {
    let folder = tempfile::Builder::new().prefix("tidemark-").tempdir_in("/dev/shm").unwrap();
    let mut site = Site::prepare();
    let boot = Boot::new(&site, 0);
    let mut host = Recorded::start(folder.path(), "host", &host_folder(&site));
    let mut store = Recorded::start(folder.path(), "store", &site.state().join("process-server"));
    std::fs::create_dir(host_folder(&site).join("agent")).unwrap();
    let agent = Mount::bind(&host_folder(&site).join("agent"), &site.state().join("agent"));
    site.start_roles_here();
    // Little any-time room: folds happen under the load.
    site.json(&["policy", "create", "short", "--any-time", "1s", "--point-interval", "0s"]);
    let disk = host_folder(&site).join("disk.img");
    image::make_mixed(&disk, DISK_BYTES, 5);
    let machine = site.protect("db", &[&disk], &["--policy", "short"]);
    site.wait_protected("db");
    let told = load(&site, &machine, folder.path(), &host.recording, &store.recording);
    for role in ["agent", "process-server"] {
        site.kill_role(role);
    }
    agent.unmount();
    drop(boot);
    let (host_log, store_log) = (host.finish(), store.finish());
    println!("{} writes of the host, {} of the store", host_log.len(), store_log.len());
    let devices = [host.device.clone(), store.device.clone()];
    Scene {
        folder,
        site,
        machine,
        told,
        host: (host.base.clone(), host_log),
        store: (store.base.clone(), store_log),
        devices,
    }
}

fn load(site: &Site, machine: &Machine, folder: &Path, host: &Recording, store: &Recording) -> Told {
    let mut told = Told::default();
    // The host first: a store that is a moment ahead is a store whose power failed a moment later.
    let now = || Instants { host: host.entries(), store: store.entries() };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (stop, now) = (&stop, &now);
        let sampler = scope.spawn(move || {
            let mut seen = (Vec::new(), Vec::new());
            while !stop.load(Ordering::SeqCst) {
                seen.0.push(now());
                let status = site.status("db");
                let durable = position(&text(&status["disks"][0]["positions"]["durable"]));
                if let Some((epoch, sequence)) = durable {
                    seen.1.push((now().store, epoch, sequence));
                }
            }
            seen
        });
        let mut client = Client::connect(machine.nbd()).unwrap();
        let mut seeded = Seeded(11);
        let mut latest = BTreeMap::new();
        let begin = Instant::now();
        let end = begin + Duration::from_secs(if tools::is_long() { 20 } else { 6 });
        let mut number = 0;
        while Instant::now() < end {
            number += 1;
            if told.settled.host == 0 && begin.elapsed() > SETTLED_AFTER {
                told.settled = now();
            }
            let block = seeded.below(DISK_BYTES / BLOCK);
            client.write(block * BLOCK, &content(block, number)).unwrap();
            told.writes.push((block, number));
            latest.insert(block, number);
            if number % 40 == 0 {
                client.flush().unwrap();
                told.flushes.push((now(), latest.clone()));
            }
            // The first second is for folds, which stop at the first point.
            if number % 150 == 0 && number >= 600 {
                let point = text(&site.point("db")["id"]);
                let reference = folder.join(format!("point-{number}.raw"));
                image::copy(&machine.disks[0].path, &reference);
                told.points.push((now(), point, reference));
            }
        }
        stop.store(true, Ordering::SeqCst);
        client.disconnect().unwrap();
        (told.instants, told.durable) = sampler.join().unwrap();
    });
    println!(
        "{} writes, {} flushes, {} points, {} instants",
        told.writes.len(),
        told.flushes.len(),
        told.points.len(),
        told.instants.len()
    );
    told
}

/// Of the disk: every block that a flush before the cut made durable has that content, or a later one.
fn assert_flushed(scene: &Scene, at: Instants) {
    let Some((_, blocks)) = scene.told.flushes.iter().rev().find(|(told, _)| told.host <= at.host) else { return };
    let file = std::fs::File::open(&scene.machine.disks[0].path).unwrap();
    let mut data = vec![0; BLOCK as usize];
    for (block, number) in blocks {
        file.read_exact_at(&mut data, block * BLOCK).unwrap();
        let later = scene.told.writes.iter().filter(|(other, n)| other == block && n >= number);
        let fine = later.clone().any(|(_, n)| data == content(*block, *n));
        // Torn by the cut: each sector is of some write since.
        let torn = || {
            (0..8).all(|sector| {
                let range = sector * 512..(sector + 1) * 512;
                later.clone().any(|(_, n)| data[range.clone()] == content(*block, *n)[range.clone()])
            })
        };
        assert!(fine || torn(), "block {block} lost its flushed write {number}");
    }
}

/// Starts everything from a state, and again when it is killed while it recovers.
fn judge_site(scene: &mut Scene, at: Instants, state: u64, seeded: &mut Seeded) {
    let _boot = Boot::new(&scene.site, state + 1);
    let folder = scene.folder.path().to_owned();
    let mount = |device: &Path, name: &str, at: &Path| {
        Mount::device_after_a_cut(Loop::attach_at(device, &folder.join(name)), at)
    };
    let host = mount(&scene.devices[0], "host-state.raw", &host_folder(&scene.site));
    let store = mount(&scene.devices[1], "store-state.raw", &scene.site.state().join("process-server"));
    let agent = Mount::bind(&host_folder(&scene.site).join("agent"), &scene.site.state().join("agent"));
    let log_before = std::fs::metadata(scene.site.path("site.log")).map_or(0, |log| log.len());
    let start = |site: &mut Site| ["process-server", "agent"].map(|role| site.start_role(role));
    start(&mut scene.site);
    if seeded.below(3) == 0 {
        // Killed in the middle of recovery, each time after another stretch of it.
        wait::until_passed(Instant::now() + Duration::from_millis(seeded.below(400)));
        for role in ["agent", "process-server"] {
            scene.site.kill_role(role);
        }
        start(&mut scene.site);
    }
    scene.site.wait_connected();
    scene.site.wait_protected("db");
    assert_flushed(scene, at);
    scene.site.point("db");
    let recovered = scene.site.export("db", "latest", "recovered.raw", "raw");
    image::assert_same(&scene.machine.disks[0].path, &recovered);
    std::fs::remove_file(recovered).unwrap();
    let told: Vec<_> = scene.told.points.iter().filter(|(told, ..)| told.store <= at.store).collect();
    if let Some((_, point, reference)) = told.last() {
        let exported = scene.site.export("db", point, "point.raw", "raw");
        image::assert_same(reference, &exported);
        std::fs::remove_file(exported).unwrap();
        let points = scene.site.json(&["point", "list", "db"]);
        let listed = points.as_array().unwrap().iter().map(|point| text(&point["id"])).collect::<Vec<_>>();
        for (_, point, _) in &told {
            assert!(listed.contains(point), "point {point} is gone: {listed:?}");
        }
    }
    let log = std::fs::read(scene.site.path("site.log")).unwrap();
    let log = String::from_utf8_lossy(&log[log_before as usize..]).into_owned();
    let diverged = log.lines().find(|line| line.contains("history diverged"));
    let whole = log.lines().find(|line| line.contains("the whole disk is scanned"));
    if at.host >= scene.told.settled.host {
        assert!(diverged.is_none(), "what was acknowledged is not there: {diverged:?}");
        assert!(whole.is_none(), "a power cut is no reason to read everything: {whole:?}");
    }
    for role in ["agent", "process-server"] {
        scene.site.kill_role(role);
    }
    agent.unmount();
    host.unmount();
    store.unmount();
}

/// Instants to cut at, in order: those at which both devices were read. The first of all is among them: what lay on the
/// disk before it was protected may not have reached the medium by then.
fn instants(told: &Told, count: usize, seeded: &mut Seeded) -> Vec<Instants> {
    let drawn = (1..count).map(|_| told.instants[seeded.below(told.instants.len() as u64) as usize]);
    let mut chosen: Vec<Instants> = drawn.chain(told.instants.first().copied()).collect();
    chosen.sort();
    chosen
}

fn of(figures: (usize, usize)) -> usize {
    if tools::is_long() { figures.1 } else { figures.0 }
}

/// The store alone, by the commands that look into one without a server: what was durable is there, and sound.
fn judge_store(image: &Path, mount: &Path, machine: &Machine, at: usize, durable: &[(usize, String, u64)]) {
    let mounted = Mount::device_after_a_cut(Loop::attach(image), mount);
    let folder = mount.join("replicas").join(&machine.disks[0].id);
    let folder = folder.to_str().unwrap();
    let inspected = offline(&["replica", "inspect", folder, "--json"]);
    assert_eq!(inspected.code, 0, "at {at}: {}", inspected.describe());
    let inspected = inspected.json();
    assert!(inspected["damage"].as_array().is_none_or(Vec::is_empty), "at {at}: {inspected}");
    let position = &inspected["durable"]["position"];
    if let Some((_, epoch, sequence)) = durable.iter().rev().find(|(told, ..)| *told <= at) {
        assert!(text(&position["epoch"]).starts_with(epoch.as_str()), "at {at}: {epoch} became {position}");
        let found = number(&position["sequence"]);
        assert!(found >= *sequence, "at {at}: {sequence} was called durable, {found} is there");
    }
    let verified = offline(&["replica", "verify", folder, "--json"]);
    assert_eq!(verified.code, 0, "at {at}: {}", verified.describe());
    mounted.unmount();
}

#[test]
fn after_a_power_cut_at_any_write_nothing_durable_is_missing() {
    need!("qemu-storage-daemon", "fusermount3", "losetup", "mke2fs", "mount", "umount");
    need_root!("loop devices and mounts");
    block::private_mounts();
    let mut scene = record();
    let mut seeded = Seeded(1);

    let (base, log) = &scene.store;
    let mut device = log.device(base);
    let (machine, durable) = (&scene.machine, &scene.told.durable);
    let first = scene.told.instants.first().unwrap().store;
    assert!(!durable.is_empty(), "nothing was called durable");
    let mut cuts: Vec<usize> =
        (0..of(STORE_STATES)).map(|_| first + seeded.below((log.len() - first) as u64 + 1) as usize).collect();
    cuts.sort_unstable();
    let (mut unflushed, mut kept) = (0, 0);
    for cuts in cuts.chunks(WORKERS) {
        std::thread::scope(|scope| {
            for (worker, cut) in cuts.iter().enumerate() {
                let image = scene.folder.path().join(format!("store-{worker}.raw"));
                let found = device.cut(*cut, &mut seeded, &image);
                (unflushed, kept) = (unflushed + found.0, kept + found.1);
                let mount = scene.folder.path().join(format!("mount-{worker}"));
                scope.spawn(move || judge_store(&image, &mount, machine, *cut, durable));
            }
        });
    }
    println!("{} states of the store: {kept} of {unflushed} unflushed writes kept", cuts.len());
    tools::counted("block-level crash states of the process server's store", cuts.len() as u64);

    // The control: on a device that lies about its flushes, something durable is missed soon.
    let mut lying = log.device(base).lying(LIES);
    let noticed = cuts.iter().rev().take(UNNOTICED_MAX).rev().any(|cut| {
        let image = scene.folder.path().join("store-lying.raw");
        lying.cut(*cut, &mut seeded, &image);
        let mount = scene.folder.path().join("mount-lying");
        std::panic::catch_unwind(|| judge_store(&image, &mount, machine, *cut, durable)).is_err()
    });
    assert!(noticed, "flushes that were never made are not missed");

    // Moved out of the scene for its time: judging changes the rest of it.
    let logs = [std::mem::take(&mut scene.host), std::mem::take(&mut scene.store)];
    let [mut host, mut store] = [logs[0].1.device(&logs[0].0), logs[1].1.device(&logs[1].0)];
    let chosen = instants(&scene.told, of(SITE_STATES), &mut seeded);
    for (state, at) in chosen.iter().enumerate() {
        let folder = scene.folder.path();
        let host = host.cut(at.host, &mut seeded, &folder.join("host-state.raw"));
        let store = store.cut(at.store, &mut seeded, &folder.join("store-state.raw"));
        println!("state {state} at {at:?}: host {host:?}, store {store:?} (unflushed, kept)");
        judge_site(&mut scene, *at, state as u64, &mut seeded);
    }
    tools::counted("block-level crash states of a whole site", chosen.len() as u64);
}
