//! Every byte of every replica is read again from time to time: media rot where nobody looks.
//!
//! *Crash.* When each replica was last scrubbed is in one small file, replaced atomically; a scrub that did not end begins
//! again.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tidemark_base::stop::Stop;
use tidemark_base::storage::{Storage, read_file, replace_file};
use tidemark_base::sync::{Mutex, MutexGuard};
use tidemark_base::thread::JoinHandle;
use tidemark_base::{DiskId, Timestamp};
use tidemark_proto::control::Problem;

use super::now;
use super::recover::describe;
use crate::replica::{Replica, ReplicaSet};
use crate::scrub::{Finding, scrub, touched};

const FILE: &str = "scrubs.json";
const FILE_BYTES_MAX: u64 = 64 << 20;
/// How often it is looked whether a replica is due.
const CHECK_INTERVAL: Duration = Duration::from_secs(600);

pub struct Scrubber {
    worker: Arc<Worker>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Worker {
    set: Arc<ReplicaSet>,
    storage: Arc<dyn Storage>,
    interval: Duration,
    stop: Stop,
    /// By disk; as it is in the file.
    scrubbed: Mutex<BTreeMap<DiskId, Scrubbed>>,
    /// One scrub at a time.
    running: Mutex<()>,
}

/// When a replica was last scrubbed, and what was found: that outlives a restart, because the damage does.
#[derive(Clone, Serialize, Deserialize)]
struct Scrubbed {
    time: Timestamp,
    problem: Option<Problem>,
}

impl Scrubber {
    pub fn start(set: Arc<ReplicaSet>, storage: Arc<dyn Storage>, interval: Duration) -> io::Result<Self> {
        let scrubbed = Mutex::new(load(&*storage));
        let worker =
            Arc::new(Worker { set, storage, interval, stop: Stop::new(), scrubbed, running: Mutex::default() });
        let thread = tidemark_base::thread::Builder::new().name("scrub".to_owned()).spawn({
            let worker = worker.clone();
            move || {
                give_way();
                while !worker.stop.wait_for(CHECK_INTERVAL.min(worker.interval)) {
                    worker.run(false);
                }
            }
        })?;
        Ok(Self { worker, thread: Mutex::new(Some(thread)) })
    }

    pub fn problem(&self, disk: DiskId) -> Option<Problem> {
        self.worker.scrubbed().get(&disk).and_then(|scrubbed| scrubbed.problem.clone())
    }

    /// Reads every replica now, due or not. Blocks until it is done.
    pub fn run_now(&self) {
        self.worker.run(true);
    }

    pub fn stop(&self) {
        self.worker.stop.stop();
        let thread = self.thread.lock().expect("no panic while held").take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the scrub thread panicked");
        }
    }
}

/// Streams, serves and folds go first, at the processor and at the disk.
fn give_way() {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    const IOPRIO_CLASS_IDLE: libc::c_int = 3 << 13;
    // SAFETY: both calls take numbers alone; 0 means the calling thread.
    unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, 19);
        libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_CLASS_IDLE);
    }
}

/// A file that cannot be read only makes scrubs come later.
fn load(storage: &dyn Storage) -> BTreeMap<DiskId, Scrubbed> {
    let read = read_file(storage, FILE, FILE_BYTES_MAX);
    read.ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
}

impl Worker {
    fn scrubbed(&self) -> MutexGuard<'_, BTreeMap<DiskId, Scrubbed>> {
        self.scrubbed.lock().expect("no panic while held")
    }

    fn run(&self, all: bool) {
        let _one = self.running.lock().expect("no panic while held");
        let replicas = self.set.replicas();
        self.scrubbed().retain(|disk, _| replicas.iter().any(|replica| replica.disk() == *disk));
        for replica in replicas {
            // A new replica was verified as it came; it is due one interval from now.
            let fresh = || Scrubbed { time: now(), problem: None };
            let last = self.scrubbed().entry(replica.disk()).or_insert_with(fresh).time;
            if !all && now().saturating_since(last) < self.interval {
                continue;
            }
            let Some(problem) = self.scrub(&replica) else { break };
            self.scrubbed().insert(replica.disk(), Scrubbed { time: now(), problem });
        }
        let stored = serde_json::to_vec_pretty(&*self.scrubbed()).map_err(io::Error::other);
        if let Err(error) = stored.and_then(|text| replace_file(&*self.storage, FILE, &text)) {
            tracing::warn!(%error, "when replicas were scrubbed cannot be stored");
        }
    }

    /// What was found; `None` when it was stopped.
    fn scrub(&self, replica: &Replica) -> Option<Option<Problem>> {
        let disk = replica.disk();
        let (message, help) = match scrub(replica, &self.stop) {
            Ok(report) if !report.finished => return None,
            Ok(report) if report.sound => {
                tracing::info!(%disk, bytes = report.bytes, "replica scrubbed");
                return Some(None);
            }
            Ok(report) => {
                let points = self.flag(replica, &report.findings)?;
                let first = report.findings.first().map_or(String::new(), describe);
                let count = report.findings.len() as u64 + report.findings_left_off;
                let help = "check the volume; points flagged as damaged cannot be used whole, others can; `tidemark resync` makes later points whole";
                let message = format!(
                    "the replica of disk {disk} has {count} damaged places, {points} recovery points are touched; the first: {first}"
                );
                (message, help)
            }
            Err(error) => (format!("the replica of disk {disk} cannot be read: {error}"), error.help()),
        };
        tracing::error!(%disk, message, "scrub found damage");
        Some(Some(Problem { critical: true, message, help: help.to_owned() }))
    }

    /// Flags the points that show what was found, and says how many kept ones there are. `None` when it was stopped.
    fn flag(&self, replica: &Replica, findings: &[Finding]) -> Option<usize> {
        let disk = replica.disk();
        let flagged = self.set.points(replica.machine()).and_then(|store| {
            let points: Vec<_> =
                store.all().into_iter().filter_map(|point| Some((point.cut_of(disk)?, point))).collect();
            let mut cuts: Vec<u64> = points.iter().map(|(cut, _)| *cut).collect();
            cuts.sort_unstable();
            let Some(touched) = touched(replica, findings, &cuts, &self.stop) else { return Ok(None) };
            let hit: Vec<_> = points.iter().filter(|(cut, _)| touched.contains(cut)).map(|(_, point)| point).collect();
            store.flag_all_damaged(&hit.iter().map(|point| point.id).collect::<Vec<_>>())?;
            Ok(Some(hit.iter().filter(|point| point.keep).count()))
        });
        flagged.unwrap_or_else(|error| {
            tracing::error!(%disk, %error, "damaged points cannot be flagged");
            Some(0)
        })
    }
}
