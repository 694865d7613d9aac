//! What happens by itself: points are thinned by their machine's retention, journals folded as far as nothing needs them.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tidemark_base::error::with_causes;
use tidemark_base::stop::Stop;
use tidemark_base::sync::Mutex;
use tidemark_base::{DiskId, MachineId};
use tidemark_proto::control::Problem;

use tokio::sync::watch;

use super::background::Background;
use super::now;
use crate::failed_over::FailedOvers;
use crate::points::Retention;
use crate::replica::ReplicaSet;
use crate::settings::Settings;

fn everything() -> Retention {
    Retention {
        any_time_window: Duration::MAX,
        point_age_max: Duration::MAX,
        points_max: usize::MAX,
        ..Retention::default()
    }
}

/// One thread: thinning and folding are reading and writing in the background, and must not crowd out the streams.
pub struct Maintainer {
    worker: Arc<Worker>,
    pub(super) thread: Background,
}

struct Worker {
    set: Arc<ReplicaSet>,
    settings: Arc<Settings>,
    failed_over: Arc<FailedOvers>,
    points: Arc<watch::Sender<u64>>,
    stop: Stop,
    /// What went wrong the last time, by disk; shown in the status until it goes well.
    problems: Mutex<BTreeMap<DiskId, Problem>>,
}

impl Maintainer {
    /// `points` grows whenever points were made.
    pub fn start(
        set: Arc<ReplicaSet>,
        settings: Arc<Settings>,
        failed_over: Arc<FailedOvers>,
        points: Arc<watch::Sender<u64>>,
        interval: Duration,
    ) -> io::Result<Self> {
        let worker =
            Arc::new(Worker { set, settings, failed_over, points, stop: Stop::new(), problems: Mutex::default() });
        let thread = Background::start("maintain", "folding, and retention of points,", {
            let worker = worker.clone();
            move || {
                while !worker.stop.wait_for(interval) {
                    worker.run();
                }
            }
        })?;
        Ok(Self { worker, thread })
    }

    /// Blocks until it is done.
    pub fn run_now(&self) {
        self.worker.run();
    }

    pub fn problem(&self, disk: DiskId) -> Option<Problem> {
        self.worker.problems.lock().expect("no panic while held").get(&disk).cloned()
    }

    /// A fold stops at its next batch and is finished after the next start.
    pub fn stop(&self) {
        self.worker.stop.stop();
        self.thread.join();
    }
}

impl Worker {
    fn run(&self) {
        for (machine, settings) in self.settings.all() {
            if self.stop.is_stopped() {
                return;
            }
            // Until a failover is committed another point may be chosen: all of them stay, and their pin keeps what they need.
            let retention = if self.failed_over.holds(machine) { everything() } else { settings.retention };
            match self.set.maintain(machine, &retention, now(), &self.stop) {
                Ok(maintenance) => {
                    if !maintenance.made.is_empty() {
                        tracing::info!(%machine, points = maintenance.made.len(), "points were stored after all");
                        self.points.send_modify(|changes| *changes += 1);
                    }
                    if !maintenance.dropped.is_empty() {
                        tracing::debug!(%machine, points = maintenance.dropped.len(), "points thinned");
                    }
                    let failed = |disk| maintenance.folds.iter().any(|fold| fold.disk == disk && fold.result.is_err());
                    for replica in self.set.of_machine(machine).iter().filter(|replica| !failed(replica.disk())) {
                        self.problems.lock().expect("no panic while held").remove(&replica.disk());
                    }
                    for fold in maintenance.folds {
                        match fold.result {
                            Ok(folded) => {
                                tracing::debug!(disk = %fold.disk, from = folded.from, to = folded.to, bytes = folded.bytes, "journal folded");
                            }
                            Err(error) => self.note(fold.disk, &error, error.help()),
                        }
                    }
                }
                Err(error) => self.note_machine(machine, &error, error.help()),
            }
        }
    }

    fn note_machine(&self, machine: MachineId, error: &dyn std::error::Error, help: &str) {
        for replica in self.set.of_machine(machine) {
            self.note(replica.disk(), error, help);
        }
    }

    /// Said once in the log, and in the status until it is gone.
    fn note(&self, disk: DiskId, error: &dyn std::error::Error, help: &str) {
        let message = format!("history cannot be thinned and folded: {}", with_causes(error));
        let problem = Problem { critical: false, message, help: help.to_owned() };
        let before = self.problems.lock().expect("no panic while held").insert(disk, problem.clone());
        if before.as_ref() != Some(&problem) {
            tracing::warn!(%disk, message = problem.message, "maintenance failed");
        }
    }
}
