//! Home disks that are brought to the state of a machine elsewhere: interrupted at every call, taken back, finished.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tidemark_base::bits::PART_BYTES;
use tidemark_base::chunk::{ChunkKey, Compression, Sealer};
use tidemark_base::compare::{CompareKey, pieces};
use tidemark_base::disk::is_zero;
use tidemark_base::storage::{RealStorage, Storage};
use tidemark_base::{DiskId, Extent, Generation};
use tidemark_proto::control::MachineSpec;
use tidemark_proto::failback::wire::{
    BeginRound, BlocksReply, BlocksRequest, EndRound, Ended, Round, RoundSize, Run, RunsReply, RunsRequest,
};
use tidemark_proto::failback::{Method, Stage, TargetCall, TargetReport};
use uuid::Uuid;

use super::host::{config, spec};
use crate::Host;
use crate::master_target::{MasterTargets, Source};

const BYTES: usize = 8 << 20;
const LIMIT: Duration = Duration::from_secs(60);

/// The machine at its other place, in memory.
struct There {
    disk: DiskId,
    image: Mutex<Vec<u8>>,
    /// What the round under way shows.
    frozen: Mutex<Vec<u8>>,
    session: Mutex<[u8; 16]>,
    /// Up to where home said that it has everything, but for what was written.
    done: AtomicU64,
    written: Mutex<Vec<Extent>>,
    asked: Mutex<Vec<Extent>>,
    stopped: AtomicBool,
    calls: AtomicU64,
    /// From this call on nothing is answered.
    fails_from: AtomicU64,
}

impl There {
    fn new(disk: DiskId, image: Vec<u8>) -> Arc<Self> {
        Arc::new(Self {
            disk,
            frozen: Mutex::new(image.clone()),
            image: Mutex::new(image),
            session: Mutex::default(),
            done: AtomicU64::new(0),
            written: Mutex::default(),
            asked: Mutex::default(),
            stopped: AtomicBool::new(false),
            calls: AtomicU64::new(0),
            fails_from: AtomicU64::new(u64::MAX),
        })
    }

    fn answer(&self) -> Result<(), String> {
        match self.calls.fetch_add(1, Ordering::SeqCst) >= self.fails_from.load(Ordering::SeqCst) {
            true => Err("cut".to_owned()),
            false => Ok(()),
        }
    }
}

impl Source for There {
    fn begin(&self, asked: BeginRound) -> Result<Round, String> {
        self.answer()?;
        *self.session.lock().unwrap() = asked.session[..].try_into().unwrap();
        self.done.store(asked.disks[0].done, Ordering::SeqCst);
        *self.frozen.lock().unwrap() = self.image.lock().unwrap().clone();
        let disks = vec![RoundSize { disk: self.disk.to_vec(), bytes: BYTES as u64 }];
        Ok(Round { round: 1, time_ns: 1, stopped: self.stopped.load(Ordering::SeqCst), disks })
    }

    fn runs(&self, asked: RunsRequest) -> Result<RunsReply, String> {
        self.answer()?;
        // The first MiB is a hole.
        let done = self.done.load(Ordering::SeqCst);
        let until = [1 << 20, 4 << 20, BYTES as u64].into_iter().find(|until| *until > asked.from.max(done));
        let until = until.unwrap_or(BYTES as u64);
        let run = |of: Extent, zeroes| Run { offset: of.offset, length: of.length, zeroes };
        let mut runs = Vec::new();
        if asked.from < done {
            runs.extend(self.written.lock().unwrap().iter().filter(|of| of.end() <= done).map(|of| run(*of, false)));
        }
        let from = asked.from.max(done);
        if from < until {
            runs.push(run(Extent::new(from, until - from), until == 1 << 20));
        }
        Ok(RunsReply { runs, next: if until == BYTES as u64 { 0 } else { until } })
    }

    fn blocks(&self, asked: Vec<BlocksRequest>) -> Result<Vec<BlocksReply>, String> {
        self.answer()?;
        self.asked.lock().unwrap().extend(asked.iter().map(|asked| Extent::new(asked.offset, asked.length)));
        let image = self.frozen.lock().unwrap();
        let key = CompareKey::new(self.disk, Generation::FIRST, *self.session.lock().unwrap());
        let mut sealer = Sealer::new(ChunkKey::new(self.disk, Generation::FIRST), Compression::Level(1));
        let blocks = asked.into_iter().map(|asked| {
            let mut chunks = Vec::new();
            let window = Extent::new(asked.offset, asked.length);
            for (index, part) in pieces(window, PART_BYTES).enumerate() {
                let content = &image[part.offset as usize..part.end() as usize];
                match asked.hashes.get(index * 16..index * 16 + 16) {
                    Some(hash) if *hash == key.hash(part, content) => {}
                    _ if is_zero(content) => _ = sealer.seal_zeroes(&[part], &mut chunks),
                    _ => _ = sealer.seal(&[part], content, &mut chunks),
                }
            }
            BlocksReply { chunks: chunks.into() }
        });
        Ok(blocks.collect())
    }

    fn end(&self, _: EndRound) -> Result<Ended, String> {
        self.answer()?;
        Ok(Ended { behind_bytes: 0 })
    }
}

struct Home {
    folder: tempfile::TempDir,
    host: Arc<Host>,
    spec: MachineSpec,
    there: Arc<There>,
    failover: Uuid,
    original: Vec<u8>,
}

fn pattern(seed: usize) -> Vec<u8> {
    (0..BYTES).map(|at| if at / 65_536 % 3 == 2 { 0 } else { (at / 512 * (seed + 7) + at) as u8 }).collect()
}

impl Home {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let host = Arc::new(Host::start(config(folder.path())).unwrap());
        let mut spec = spec(folder.path(), "web", 1);
        (spec.fenced, spec.paused) = (true, true);
        let original = pattern(1);
        let file = std::fs::File::create(&spec.disks[0].path).unwrap();
        super::write_all_at(&file, &original, 0).unwrap();
        drop(file);
        host.protect(spec.clone()).unwrap();
        let mut image = pattern(1);
        image[..1 << 20].fill(0);
        image[3 << 20..5 << 20].copy_from_slice(&pattern(2)[3 << 20..5 << 20]);
        let there = There::new(spec.disks[0].disk, image);
        Self { folder, host, spec, there, failover: Uuid::new_v4(), original }
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(&self.spec.disks[0].path).unwrap()
    }

    fn open(&self) -> Arc<MasterTargets> {
        let there = self.there.clone();
        let storage: Arc<dyn Storage> = RealStorage::create(self.folder.path().join("master-target")).unwrap();
        let source = Arc::new(move |_, _: &str| there.clone() as Arc<dyn Source>);
        MasterTargets::open(self.host.clone(), storage, source).unwrap()
    }

    fn call(&self, targets: &MasterTargets, call: TargetCall) -> TargetReport {
        let answer = targets.execute(&serde_json::to_string(&call).unwrap()).unwrap();
        serde_json::from_str(&answer).unwrap()
    }

    fn sync(&self, targets: &MasterTargets, method: Method) -> TargetReport {
        self.call(targets, TargetCall::Sync { machine: self.spec.machine, failover: self.failover, method })
    }

    fn wait(&self, targets: &MasterTargets, until: impl Fn(&TargetReport) -> bool) -> TargetReport {
        let deadline = Instant::now() + LIMIT;
        loop {
            let report = self.call(targets, TargetCall::Report { machine: self.spec.machine });
            if until(&report) {
                return report;
            }
            assert!(Instant::now() < deadline, "{report:?}");
            std::thread::yield_now();
        }
    }

    fn let_go(&self, targets: &MasterTargets) {
        self.call(targets, TargetCall::LetGo { machine: self.spec.machine, failover: self.failover });
        assert_eq!(std::fs::read_dir(self.folder.path().join("master-target")).unwrap().count(), 0, "nothing is left");
    }
}

/// Cut at each call, and the agent started again: home disks are given back what they had, or are finished.
#[test]
fn a_reprotect_that_is_cut_anywhere_is_taken_back_or_finished() {
    for cut in 0.. {
        let home = Home::new();
        home.there.fails_from.store(cut, Ordering::SeqCst);
        let targets = home.open();
        home.sync(&targets, Method::Compare);
        let reached = home.wait(&targets, |report| report.problem.is_some() || report.stage == Stage::Consistent);
        targets.stop();
        drop(targets);
        if reached.stage == Stage::Consistent {
            assert!(cut > 8, "{cut} calls are no round");
            break;
        }
        home.there.fails_from.store(u64::MAX, Ordering::SeqCst);
        let targets = home.open();
        if cut % 2 == 0 {
            home.call(&targets, TargetCall::Undo { machine: home.spec.machine, failover: home.failover });
            home.wait(&targets, |report| report.stage == Stage::Undone);
            assert!(home.content() == home.original, "cut at call {cut}");
            home.let_go(&targets);
        } else {
            home.wait(&targets, |report| report.stage == Stage::Consistent);
            assert!(home.content() == *home.there.image.lock().unwrap(), "cut at call {cut}");
        }
        targets.stop();
        home.host.stop();
    }
}

/// Cut in its middle, and the agent started again: it goes on behind what was noted, and asks before that for nothing but what
/// the machine wrote meanwhile.
#[test]
fn a_first_pass_that_is_cut_goes_on_where_it_was() {
    let home = Home::new();
    // Begin, the hole, its end is told, three MiB, and no more.
    home.there.fails_from.store(5, Ordering::SeqCst);
    let targets = home.open();
    home.sync(&targets, Method::Full);
    home.wait(&targets, |report| report.problem.is_some());
    targets.stop();
    drop(targets);
    let changed = Extent::new(2 << 20, 8192);
    home.there.image.lock().unwrap()[2 << 20..(2 << 20) + 8192].fill(0xa5);
    home.there.written.lock().unwrap().push(changed);
    home.there.asked.lock().unwrap().clear();
    home.there.fails_from.store(home.there.calls.load(Ordering::SeqCst) + 1, Ordering::SeqCst);
    let targets = home.open();
    // The second begin is the last call that is answered: what it said stays.
    home.wait(&targets, |report| report.problem.is_some());
    assert_eq!(home.there.done.load(Ordering::SeqCst), 4 << 20);
    // Asked for the same once more it goes on.
    home.sync(&targets, Method::Full);
    home.there.fails_from.store(u64::MAX, Ordering::SeqCst);
    home.wait(&targets, |report| report.stage == Stage::Consistent);
    assert!(home.content() == *home.there.image.lock().unwrap());
    let asked = home.there.asked.lock().unwrap().clone();
    let first_round = asked.iter().take_while(|of| of.end() < BYTES as u64).collect::<Vec<_>>();
    let before: Vec<_> = first_round.iter().filter(|of| of.offset < 4 << 20).collect();
    assert_eq!(before, [&&changed], "{asked:?}");
    // Taken back, what was there before either part of it is there again.
    home.call(&targets, TargetCall::Undo { machine: home.spec.machine, failover: home.failover });
    home.wait(&targets, |report| report.stage == Stage::Undone);
    assert!(home.content() == home.original);
    home.let_go(&targets);
    targets.stop();
    home.host.stop();
}

/// Home disks that follow a machine show it at an instant, however the next round ends; and take it over when it is off.
#[test]
fn a_round_that_is_cut_leaves_home_disks_at_the_instant_before() {
    let home = Home::new();
    let targets = home.open();
    home.sync(&targets, Method::Delta);
    home.wait(&targets, |report| report.stage == Stage::Consistent);
    let level = home.there.image.lock().unwrap().clone();
    assert!(home.content() == level);
    let refused = targets.execute(
        &serde_json::to_string(&TargetCall::LetGo { machine: home.spec.machine, failover: home.failover }).unwrap(),
    );
    assert!(refused.unwrap_err().message.contains("on their way"));

    home.there.image.lock().unwrap()[2 << 20..7 << 20].fill(0x5a);
    // Begin, two answers about runs, then blocks.
    home.there.fails_from.store(home.there.calls.load(Ordering::SeqCst) + 3, Ordering::SeqCst);
    home.sync(&targets, Method::Delta);
    home.wait(&targets, |report| report.problem.is_some());
    assert!(home.content() == level, "nothing of half a round");
    home.there.fails_from.store(u64::MAX, Ordering::SeqCst);
    home.there.stopped.store(true, Ordering::SeqCst);
    let finish = TargetCall::Finish { machine: home.spec.machine, failover: home.failover, method: Method::Delta };
    home.call(&targets, finish);
    let report = home.wait(&targets, |report| report.stage == Stage::Finished);
    assert!(home.content() == *home.there.image.lock().unwrap());
    assert!(report.kept_bytes > 0, "{report:?}");
    // Until it is let go it can be taken back, to the very beginning.
    home.call(&targets, TargetCall::Undo { machine: home.spec.machine, failover: home.failover });
    home.wait(&targets, |report| report.stage == Stage::Undone);
    assert!(home.content() == home.original);
    home.let_go(&targets);
    targets.stop();
    home.host.stop();
}

/// F4: nothing is written while the machine may be on at home.
#[test]
fn f4_home_disks_that_may_be_in_use_are_refused() {
    let home = Home::new();
    let open = MachineSpec { fenced: false, ..home.spec.clone() };
    home.host.protect(open).unwrap();
    let targets = home.open();
    let call = TargetCall::Sync { machine: home.spec.machine, failover: home.failover, method: Method::Full };
    let refused = targets.execute(&serde_json::to_string(&call).unwrap()).unwrap_err();
    assert!(refused.message.contains("may be on at home"), "{refused}");
    assert!(home.content() == home.original);
    targets.stop();
    home.host.stop();
}
