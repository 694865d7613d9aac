//! Jobs: what was asked for, how far it is, and how it ended.
//!
//! *Consistency.* A job's steps are told in order; its outcome comes last and never changes. *Retries.* None: a job that
//! failed says why and what to do. *Cancellation.* Jobs run to their end. *Crash.* The history is saved soon after each
//! change; a job whose end was not saved is shown as interrupted, and what it wanted is in the state.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tidemark_base::storage::{Storage, read_file, replace_file};
use tidemark_base::{Clock, SystemClock, Timestamp};
use tidemark_proto::control::{Failure, FailureKind};
use tokio::sync::{Notify, watch};
use uuid::Uuid;

const FILE: &str = "jobs.json";
const FILE_BYTES_MAX: u64 = 64 << 20;
/// Jobs that are remembered; the oldest that are done go first.
const HISTORY_MAX: usize = 500;
/// Jobs that run at once; more are refused.
const RUNNING_MAX: usize = 64;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    Running,
    Succeeded,
    Failed,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    pub id: Uuid,
    /// `protect`, `point_create`, …
    pub kind: String,
    pub machine: Option<String>,
    pub state: JobState,
    pub steps: Vec<Step>,
    pub started: Timestamp,
    pub finished: Option<Timestamp>,
    /// What it was for: of the shape that its kind has.
    pub result: Option<Value>,
    pub failure: Option<Failure>,
    /// Grows with each change, for long polls.
    pub version: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Step {
    pub name: String,
    pub started: Timestamp,
    pub finished: Option<Timestamp>,
}

pub struct Jobs {
    storage: Arc<dyn Storage>,
    jobs: Mutex<VecDeque<watch::Sender<Job>>>,
    changed: Notify,
    clock: SystemClock,
}

/// Given to a running job, to tell its steps.
#[derive(Clone)]
pub struct Progress {
    jobs: Arc<Jobs>,
    job: watch::Sender<Job>,
}

impl Progress {
    /// The step before is done, this one begins.
    pub fn step(&self, name: impl Into<String>) {
        let now = self.jobs.clock.wall_now();
        self.jobs.update(&self.job, |job| {
            finish_step(job, now);
            job.steps.push(Step { name: name.into(), started: now, finished: None });
        });
    }
}

fn finish_step(job: &mut Job, now: Timestamp) {
    if let Some(step) = job.steps.last_mut() {
        step.finished.get_or_insert(now);
    }
}

impl Jobs {
    pub fn open(storage: Arc<dyn Storage>) -> Arc<Self> {
        let mut history: Vec<Job> = match storage.exists(FILE) {
            Ok(true) => read_file(&*storage, FILE, FILE_BYTES_MAX)
                .map_err(|error| error.to_string())
                .and_then(|content| serde_json::from_slice(&content).map_err(|error| error.to_string()))
                .unwrap_or_else(|error| {
                    // History only: what is wanted is in the state.
                    tracing::warn!(error, "the history of jobs cannot be read; a new one begins");
                    Vec::new()
                }),
            _ => Vec::new(),
        };
        for job in &mut history {
            if job.state == JobState::Running {
                job.state = JobState::Failed;
                job.finished = job.steps.last().map(|step| step.started).or(Some(job.started));
                job.failure = Some(Failure::new(
                    FailureKind::Failed,
                    "the configuration server stopped while the job ran",
                    "what it wanted was kept and is being done; see `tidemark status`",
                ));
            }
        }
        let jobs = history.into_iter().map(watch::Sender::new).collect();
        Arc::new(Self { storage, jobs: Mutex::new(jobs), changed: Notify::new(), clock: SystemClock::new() })
    }

    /// Starts a job; it runs whether or not anyone waits for it.
    pub fn start<F>(
        self: &Arc<Self>,
        kind: &str,
        machine: Option<&str>,
        work: impl FnOnce(Progress) -> F,
    ) -> Result<Job, Failure>
    where
        F: Future<Output = Result<Value, Failure>> + Send + 'static,
    {
        let job = Job {
            id: Uuid::new_v4(),
            kind: kind.to_owned(),
            machine: machine.map(str::to_owned),
            state: JobState::Running,
            steps: Vec::new(),
            started: self.clock.wall_now(),
            finished: None,
            result: None,
            failure: None,
            version: 1,
        };
        let sender = watch::Sender::new(job.clone());
        {
            let mut jobs = self.jobs.lock().expect("no panic while held");
            let is_running = |job: &watch::Sender<Job>| job.borrow().state == JobState::Running;
            if jobs.iter().filter(|job| is_running(job)).count() >= RUNNING_MAX {
                return Err(Failure::new(
                    FailureKind::Unavailable,
                    format!("{RUNNING_MAX} jobs are running, which is the limit"),
                    "wait for some of them: `tidemark job list`",
                ));
            }
            jobs.push_back(sender.clone());
            while jobs.len() > HISTORY_MAX
                && let Some(index) = jobs.iter().position(|job| !is_running(job))
            {
                jobs.remove(index);
            }
        }
        self.changed.notify_one();
        let work = work(Progress { jobs: self.clone(), job: sender.clone() });
        let jobs = self.clone();
        tokio::spawn(async move {
            // A task of its own, so that a panic in it fails the job and not its watchers.
            let outcome = tokio::spawn(work).await.unwrap_or_else(|error| {
                Err(Failure::new(FailureKind::Failed, format!("the job stopped abruptly: {error}"), "see the log"))
            });
            let now = jobs.clock.wall_now();
            jobs.update(&sender, |job| {
                job.finished = Some(now);
                match outcome {
                    Ok(result) => {
                        finish_step(job, now);
                        job.state = JobState::Succeeded;
                        job.result = Some(result);
                    }
                    Err(failure) => {
                        tracing::warn!(job = %job.id, kind = job.kind, %failure, "a job failed");
                        job.state = JobState::Failed;
                        job.failure = Some(failure);
                    }
                }
            });
        });
        Ok(job)
    }

    fn update(&self, job: &watch::Sender<Job>, edit: impl FnOnce(&mut Job)) {
        job.send_modify(|job| {
            edit(job);
            job.version += 1;
        });
        self.changed.notify_one();
    }

    /// Newest first.
    pub fn list(&self) -> Vec<Job> {
        self.jobs.lock().expect("no panic while held").iter().rev().map(|job| job.borrow().clone()).collect()
    }

    /// The job; waits up to `wait` for it to differ from `version`.
    pub async fn get(&self, id: Uuid, version: u64, wait: Duration) -> Option<Job> {
        let mut receiver = {
            let jobs = self.jobs.lock().expect("no panic while held");
            jobs.iter().find(|job| job.borrow().id == id)?.subscribe()
        };
        let changed = receiver.wait_for(|job| job.version != version || job.state != JobState::Running);
        let _ = tokio::time::timeout(wait, changed).await;
        let job = receiver.borrow().clone();
        Some(job)
    }

    /// Writes the history after changes, until the task is dropped.
    pub async fn keep_saved(self: Arc<Self>) {
        loop {
            self.changed.notified().await;
            let jobs = self.clone();
            let _ = tokio::task::spawn_blocking(move || jobs.save()).await;
        }
    }

    pub fn save(&self) {
        let jobs: Vec<Job> = {
            let jobs = self.jobs.lock().expect("no panic while held");
            jobs.iter().map(|job| job.borrow().clone()).collect()
        };
        let content = serde_json::to_vec(&jobs).expect("jobs are plain data");
        if let Err(error) = replace_file(&*self.storage, FILE, &content) {
            tracing::warn!(%error, "the history of jobs cannot be saved");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemark_base::storage::RealStorage;

    const SOON: Duration = Duration::from_secs(10);

    async fn end(jobs: &Jobs, id: Uuid) -> Job {
        let mut version = 0;
        loop {
            let job = jobs.get(id, version, SOON).await.unwrap();
            if job.state != JobState::Running {
                return job;
            }
            version = job.version;
        }
    }

    #[tokio::test]
    async fn a_job_tells_steps_and_outcome_and_survives() {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        let jobs = Jobs::open(storage.clone());
        let good = jobs
            .start("protect", Some("web"), |progress| async move {
                progress.step("one");
                progress.step("two");
                Ok(Value::from(7))
            })
            .unwrap();
        let bad = jobs
            .start("protect", None, |progress| async move {
                progress.step("one");
                Err(Failure::new(FailureKind::Conflict, "in use", "stop it"))
            })
            .unwrap();
        let (good, bad) = (end(&jobs, good.id).await, end(&jobs, bad.id).await);
        assert_eq!((good.state, good.result), (JobState::Succeeded, Some(Value::from(7))));
        assert!(good.steps.len() == 2 && good.steps.iter().all(|step| step.finished.is_some()));
        assert_eq!((bad.state, bad.failure.unwrap().message.as_str()), (JobState::Failed, "in use"));
        assert!(bad.steps[0].finished.is_none(), "the step that failed is the one without an end");

        let hanging = jobs.start("export", None, |_| std::future::pending()).unwrap();
        jobs.save();
        let again = Jobs::open(storage);
        assert_eq!(again.list().len(), 3);
        let interrupted = again.get(hanging.id, 0, SOON).await.unwrap();
        assert_eq!(interrupted.state, JobState::Failed);
        assert!(interrupted.failure.unwrap().message.contains("stopped while"));
    }

    #[tokio::test]
    async fn a_panic_fails_the_job() {
        let folder = tempfile::tempdir().unwrap();
        let jobs = Jobs::open(RealStorage::open_folder(folder.path()));
        let job = jobs.start("x", None, |_| async { panic!("boom") }).unwrap();
        assert_eq!(end(&jobs, job.id).await.state, JobState::Failed);
    }
}
