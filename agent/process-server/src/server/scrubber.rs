//! Every byte of every replica is read again from time to time: media rot where nobody looks.
//!
//! A pass over a replica reads at a set rate, stands back while hosts send much, and goes on where it was after a restart.
//! What it finds is dealt with as it is found ([`ReplicaSet::quarantine`]).
//!
//! *Consistency.* One scrub at a time. *Retries.* The next pass. *Cancellation.* Within a frame or a piece of 1 MiB.
//! *Crash.* When each replica was last scrubbed, and where a pass is, is in one table, stored at most every ten seconds: a
//! crash repeats what came after.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tidemark_base::stop::Stop;
use tidemark_base::storage::Storage;
use tidemark_base::sync::Mutex;
use tidemark_base::time::Instant;
use tidemark_base::{DiskId, Timestamp};
use tidemark_proto::control::Problem;

use super::background::Background;
use super::recover::describe;
use crate::accept::authorise::Authorisations;
use crate::replica::{Replica, ReplicaSet};
use crate::scrub::{Cursor, Pace, ScrubReport, advance};
use crate::settings::Settings;
use crate::table::{Table, TableError};

const FILE: &str = "scrubs.json";
/// How often it is looked whether a replica is due.
const CHECK_INTERVAL: Duration = Duration::from_secs(600);
const STORE_INTERVAL: Duration = Duration::from_secs(10);
/// Read before it waits.
const BURST_BYTES: u64 = 256 << 10;
/// When hosts send more than this in a second, a scrub stands back …
const BUSY_BYTES: u64 = 8 << 20;
/// … but not for ever: then it reads a burst all the same.
const STAND_BACK_MAX: Duration = Duration::from_secs(10);

pub struct Scrubber {
    worker: Arc<Worker>,
    pub(super) thread: Background,
}

/// The server's own small files, which belong to no replica.
pub struct Tables {
    pub authorisations: Arc<Authorisations>,
    pub settings: Arc<Settings>,
}

struct Worker {
    set: Arc<ReplicaSet>,
    tables: Tables,
    interval: Duration,
    rate_bytes: u64,
    stop: Stop,
    scrubbed: Table<BTreeMap<DiskId, Scrubbed>>,
    /// One scrub at a time.
    running: Mutex<()>,
    /// What was wrong with files of the server itself in the last pass.
    files: Mutex<Vec<String>>,
}

/// When a replica was last scrubbed, and what was found: that outlives a restart, because the damage does.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Scrubbed {
    /// When the last pass ended, or the replica was first seen.
    pub time: Timestamp,
    #[serde(default)]
    pub ended: Option<Timestamp>,
    pub problem: Option<Problem>,
    /// The pass that is under way.
    #[serde(default)]
    pub pass: Option<Pass>,
}

/// A pass that has not ended.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Pass {
    pub started: Timestamp,
    pub cursor: Cursor,
    /// What was read so far.
    pub bytes: u64,
    /// Damaged places so far, the first of them, and the points that show them.
    pub places: u64,
    pub first: Option<String>,
    pub points: u64,
}

impl Scrubber {
    pub fn start(
        set: Arc<ReplicaSet>,
        tables: Tables,
        storage: Arc<dyn Storage>,
        interval: Duration,
        rate_bytes: u64,
    ) -> io::Result<Self> {
        let (scrubbed, forgotten) = Table::open_or_forget(storage, FILE).map_err(io::Error::other)?;
        if let Some(what) = forgotten {
            tracing::warn!(what, "when replicas were scrubbed is not known; they are scrubbed an interval from now");
        }
        let worker = Arc::new(Worker {
            set,
            tables,
            interval,
            rate_bytes,
            stop: Stop::new(),
            scrubbed,
            running: Mutex::default(),
            files: Mutex::default(),
        });
        let thread = Background::start("scrub", "the scrub", {
            let worker = worker.clone();
            move || {
                give_way();
                // A pass that a restart cut short goes on at once.
                worker.run(false);
                while !worker.stop.wait_for(CHECK_INTERVAL.min(worker.interval)) {
                    worker.run(false);
                }
            }
        })?;
        Ok(Self { worker, thread })
    }

    pub fn problem(&self, disk: DiskId) -> Option<Problem> {
        self.worker.scrubbed.read(|scrubbed| scrubbed.get(&disk).and_then(|scrubbed| scrubbed.problem.clone()))
    }

    /// What was covered, and when.
    pub fn scrubbed(&self, disk: DiskId) -> Option<Scrubbed> {
        self.worker.scrubbed.read(|scrubbed| scrubbed.get(&disk).cloned())
    }

    /// What is wrong with files that belong to no disk.
    pub fn file_problems(&self) -> Vec<String> {
        self.worker.files.lock().expect("no panic while held").clone()
    }

    /// Reads every replica now, due or not, as fast as it goes. Blocks until it is done.
    pub fn run_now(&self) {
        self.worker.run(true);
    }

    pub fn stop(&self) {
        self.worker.stop.stop();
        self.thread.join();
    }
}

/// Streams, serves and folds go first, at the processor and at the disk.
pub(super) fn give_way() {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    const IOPRIO_CLASS_IDLE: libc::c_int = 3 << 13;
    // SAFETY: both calls take numbers alone; 0 means the calling thread.
    unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, 19);
        libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_CLASS_IDLE);
    }
}

impl Worker {
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<DiskId, Scrubbed>)) {
        let changed = self.scrubbed.change(|scrubbed| {
            change(scrubbed);
            Ok::<(), TableError>(())
        });
        if let Err(error) = changed {
            tracing::warn!(%error, "where the scrub is cannot be stored");
        }
    }

    fn run(&self, all: bool) {
        let _one = self.running.lock().expect("no panic while held");
        let replicas = self.set.replicas();
        let now = self.now();
        self.change(|scrubbed| {
            scrubbed.retain(|disk, _| replicas.iter().any(|replica| replica.disk() == *disk));
            for replica in &replicas {
                // A new replica was verified as it came; it is due one interval from now.
                scrubbed.entry(replica.disk()).or_insert(Scrubbed {
                    time: now,
                    ended: None,
                    problem: None,
                    pass: None,
                });
            }
        });
        let mut due = false;
        for replica in replicas {
            let Some(before) = self.scrubbed.read(|scrubbed| scrubbed.get(&replica.disk()).cloned()) else { continue };
            if !all && before.pass.is_none() && self.now().saturating_since(before.time) < self.interval {
                continue;
            }
            due = true;
            // What is asked for begins at the beginning.
            let pass = before.pass.filter(|_| !all);
            if !self.scrub(&replica, pass, all) {
                return;
            }
        }
        if due {
            self.check_files();
        }
    }

    /// The server's own small files: named when they are damaged, and written again from memory.
    fn check_files(&self) {
        let mut found = Vec::new();
        found.extend(self.tables.authorisations.check().err().map(|error| format!("{error}: {}", source_of(&error))));
        found.extend(self.tables.settings.check().err().map(|error| error.to_string()));
        found.extend(self.scrubbed.check().err().map(|error| error.to_string()));
        found.extend(
            self.set.check_points().into_iter().map(|(machine, what)| format!("points of machine {machine}: {what}")),
        );
        found.iter().for_each(|what| tracing::error!(what, "a file is damaged and was written again"));
        *self.files.lock().expect("no panic while held") = found;
    }

    /// One pass; false when it was stopped.
    fn scrub(&self, replica: &Replica, pass: Option<Pass>, fast: bool) -> bool {
        let disk = replica.disk();
        let new = || Pass { started: self.now(), cursor: Cursor::Start, bytes: 0, places: 0, first: None, points: 0 };
        let mut pass = pass.unwrap_or_else(new);
        let pace = Paced::new(self, fast);
        let mut stored = Instant::now();
        let mut touched = std::collections::BTreeSet::new();
        while pass.cursor != Cursor::End {
            let mut report = ScrubReport::default();
            let advanced = advance(replica, pass.cursor, &pace, &mut report);
            pass.bytes += report.bytes;
            let left_off = report.findings_left_off;
            let (findings, indexes) = report.take_findings();
            if let Some(first) = findings.first() {
                tracing::error!(%disk, first = describe(first), places = findings.len(), "scrub found damage");
                pass.places += findings.len() as u64 + left_off;
                pass.first.get_or_insert_with(|| describe(first));
                match self.set.quarantine(replica, &findings, &self.stop) {
                    Ok(Some(found)) => touched.extend(found.points),
                    Ok(None) => return false,
                    Err(error) => tracing::error!(%disk, %error, "damaged points cannot be flagged"),
                }
                pass.points = pass.points.max(touched.len() as u64);
            }
            for first in indexes {
                if let Err(error) = replica.repair_segment(first) {
                    tracing::error!(%disk, %error, "an index cannot be made again");
                }
            }
            match advanced {
                Ok(Some(next)) => pass.cursor = next,
                Ok(None) => {
                    self.store_pass(disk, &pass);
                    return false;
                }
                Err(error) => {
                    pass.places += 1;
                    pass.first.get_or_insert_with(|| format!("it cannot be read: {error}"));
                    break;
                }
            }
            let now = Instant::now();
            if now.saturating_duration_since(stored) > STORE_INTERVAL {
                self.store_pass(disk, &pass);
                stored = now;
            }
        }
        self.end_pass(replica, pass);
        true
    }

    fn store_pass(&self, disk: DiskId, pass: &Pass) {
        self.change(|scrubbed| {
            if let Some(scrubbed) = scrubbed.get_mut(&disk) {
                scrubbed.pass = Some(pass.clone());
            }
        });
    }

    fn end_pass(&self, replica: &Replica, mut pass: Pass) {
        let disk = replica.disk();
        // What opening found is damage as well, though nothing of it is read.
        let opening = replica.opening_damage();
        pass.places += opening.len() as u64;
        if pass.first.is_none() {
            pass.first = opening.first().cloned();
        }
        let problem = pass.first.as_ref().map(|first| Problem {
            critical: true,
            message: format!(
                "the replica of disk {disk} has {} damaged places, {} recovery points are touched; the first: {first}",
                pass.places, pass.points
            ),
            help: "check the volume; points flagged as damaged cannot be used whole, others can; what the source still has is sent again by itself".to_owned(),
        });
        tracing::info!(%disk, bytes = pass.bytes, places = pass.places, "replica scrubbed");
        let time = self.now();
        self.change(|scrubbed| drop(scrubbed.insert(disk, Scrubbed { time, ended: Some(time), problem, pass: None })));
    }
}

fn source_of(error: &dyn std::error::Error) -> String {
    error.source().map_or(String::new(), ToString::to_string)
}

/// Waits so that the rate is kept, and while hosts send much.
struct Paced<'a> {
    worker: &'a Worker,
    fast: bool,
    state: RefCell<PaceState>,
}

struct PaceState {
    /// Read since it last waited.
    bytes: u64,
    waited_at: Instant,
    appended: u64,
}

impl<'a> Paced<'a> {
    fn new(worker: &'a Worker, fast: bool) -> Self {
        let state = PaceState { bytes: 0, waited_at: Instant::now(), appended: worker.set.appended_bytes() };
        Self { worker, fast, state: RefCell::new(state) }
    }
}

impl Pace for Paced<'_> {
    fn tick(&self, bytes: u64) -> bool {
        let (worker, mut state) = (self.worker, self.state.borrow_mut());
        state.bytes += bytes;
        if self.fast || state.bytes < BURST_BYTES {
            return !worker.stop.is_stopped();
        }
        let due = Duration::from_secs_f64(state.bytes as f64 / worker.rate_bytes.max(1) as f64);
        let since = Instant::now().saturating_duration_since(state.waited_at);
        if worker.stop.wait_for(due.saturating_sub(since)) {
            return false;
        }
        let began = Instant::now();
        loop {
            let now = Instant::now();
            let seconds = now.saturating_duration_since(state.waited_at).as_secs_f64().max(0.001);
            let appended = worker.set.appended_bytes();
            let busy = (appended.saturating_sub(state.appended)) as f64 / seconds > BUSY_BYTES as f64;
            (state.waited_at, state.appended) = (now, appended);
            if !busy || now.saturating_duration_since(began) > STAND_BACK_MAX {
                break;
            }
            if worker.stop.wait_for(Duration::from_secs(1)) {
                return false;
            }
        }
        state.bytes = 0;
        true
    }
}
