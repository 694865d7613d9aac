//! Every byte of every replica is read again from time to time: media rot where nobody looks.
//!
//! *Crash.* When each replica was last scrubbed is in one small file, replaced atomically; a scrub that did not end begins
//! again.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use tidemark_base::stop::Stop;
use tidemark_base::storage::{Storage, read_file, replace_file};
use tidemark_base::{DiskId, Timestamp};
use tidemark_proto::control::Problem;

use super::now;
use super::recover::describe;
use crate::replica::{Replica, ReplicaSet};
use crate::scrub::scrub;

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
    /// What the last scrub found, by disk.
    problems: Mutex<BTreeMap<DiskId, Problem>>,
}

impl Scrubber {
    pub fn start(set: Arc<ReplicaSet>, storage: Arc<dyn Storage>, interval: Duration) -> io::Result<Self> {
        let worker = Arc::new(Worker { set, storage, interval, stop: Stop::new(), problems: Mutex::default() });
        let thread = std::thread::Builder::new().name("scrub".to_owned()).spawn({
            let worker = worker.clone();
            move || {
                give_way();
                while !worker.stop.wait_for(CHECK_INTERVAL.min(worker.interval)) {
                    worker.run();
                }
            }
        })?;
        Ok(Self { worker, thread: Mutex::new(Some(thread)) })
    }

    pub fn problem(&self, disk: DiskId) -> Option<Problem> {
        self.worker.problems.lock().expect("no panic while held").get(&disk).cloned()
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

impl Worker {
    fn run(&self) {
        let mut last = self.load();
        let replicas = self.set.replicas();
        last.retain(|disk, _| replicas.iter().any(|replica| replica.disk() == *disk));
        for replica in replicas {
            // A new replica was verified as it came; it is due one interval from now.
            let since = now().saturating_since(*last.entry(replica.disk()).or_insert_with(now));
            if since < self.interval {
                continue;
            }
            if !self.scrub(&replica) {
                return;
            }
            last.insert(replica.disk(), now());
        }
        let stored = serde_json::to_vec_pretty(&last).map_err(io::Error::other);
        if let Err(error) = stored.and_then(|text| replace_file(&*self.storage, FILE, &text)) {
            tracing::warn!(%error, "when replicas were scrubbed cannot be stored");
        }
    }

    /// A file that cannot be read only makes scrubs come later.
    fn load(&self) -> BTreeMap<DiskId, Timestamp> {
        let read = read_file(&*self.storage, FILE, FILE_BYTES_MAX);
        read.ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
    }

    /// False when it was stopped.
    fn scrub(&self, replica: &Replica) -> bool {
        let disk = replica.disk();
        let (message, help) = match scrub(replica, &self.stop) {
            Ok(report) if !report.finished => return false,
            Ok(report) if report.sound => {
                tracing::info!(%disk, bytes = report.bytes, "replica scrubbed");
                self.problems.lock().expect("no panic while held").remove(&disk);
                return true;
            }
            Ok(report) => {
                let first = report.findings.first().map_or(String::new(), describe);
                let count = report.findings.len() as u64 + report.findings_left_off;
                let help = "check the volume; run `tidemark point verify` to see which points are touched, and `tidemark resync`";
                (format!("the replica of disk {disk} has {count} damaged places; the first: {first}"), help)
            }
            Err(error) => (format!("the replica of disk {disk} cannot be read: {error}"), error.help()),
        };
        tracing::error!(%disk, message, "scrub found damage");
        let problem = Problem { critical: true, message, help: help.to_owned() };
        self.problems.lock().expect("no panic while held").insert(disk, problem);
        true
    }
}
