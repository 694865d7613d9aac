//! Jobs: what was asked for, how far it is, and how it ended.
//!
//! *Consistency.* A job's steps are told in order; its outcome comes last and never changes. *Retries.* None: a job that
//! failed says why and what to do. *Cancellation.* Jobs that only wait for others, or read, can be cancelled; what an agent or
//! a process server began for it may still end there. Others run to their end. *Crash.* The history is saved soon after each
//! change; a job whose end was not saved is shown as interrupted, and what it wanted is in the state.

use std::collections::{BTreeSet, VecDeque};
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tidemark_base::storage::{Storage, read_file};
use tidemark_base::{Clock, SystemClock, Timestamp};
use tidemark_proto::control::{Failure, FailureKind, Severity};
use tokio::sync::{Notify, broadcast, watch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::database::{Database, DatabaseError, Statement};
use crate::history::{History, News};

/// What the first version kept; read once.
const FILE: &str = "jobs.json";
const IMPORTED: &str = "jobs.json.imported";
const FILE_BYTES_MAX: u64 = 64 << 20;
/// Jobs that are at hand; the oldest that are done are asked of the database.
const AT_HAND_MAX: usize = 500;
/// Jobs that are remembered.
const HISTORY_MAX: u64 = 10_000;
/// Jobs that run at once; more are refused.
const RUNNING_MAX: usize = 400;
/// Changes that wait for somebody who follows.
const TOLD_MAX: usize = 256;
/// After the history could not be saved.
const SAVE_AGAIN: Duration = Duration::from_secs(5);
/// Those that can be cancelled: they wait, or read.
const CANCELLABLE: [&str; 8] =
    ["point_create", "group_point", "point_verify", "point_export", "backup", "resync", "reprotect", "failback"];

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    Running,
    Succeeded,
    Failed,
    /// Somebody did not want it any more.
    Cancelled,
}

#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Job {
    pub id: Uuid,
    /// `protect`, `point_create`, …
    pub kind: String,
    pub machine: Option<String>,
    /// It only looks whether that could be done, and does nothing.
    #[serde(default)]
    pub check: bool,
    pub state: JobState,
    pub steps: Vec<Step>,
    #[schema(value_type = String, format = "date-time")]
    pub started: Timestamp,
    #[schema(value_type = Option<String>, format = "date-time")]
    pub finished: Option<Timestamp>,
    /// What it was for: of the shape that its kind has.
    #[schema(value_type = Option<crate::api::shapes::JobResultSchema>)]
    pub result: Option<Value>,
    #[schema(value_type = Option<crate::api::schema::FailureSchema>)]
    pub failure: Option<Failure>,
    /// Grows with each change, for long polls.
    pub version: u64,
    /// How far the step that runs is, where that can be said.
    #[serde(default)]
    pub progress: Option<Amount>,
    /// When the step that runs is likely to be done, from how fast it went so far.
    #[serde(default)]
    #[schema(value_type = Option<String>, format = "date-time")]
    pub estimated: Option<Timestamp>,
}

/// Of a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Amount {
    pub done_bytes: u64,
    pub total_bytes: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Step {
    pub name: String,
    #[schema(value_type = String, format = "date-time")]
    pub started: Timestamp,
    #[schema(value_type = Option<String>, format = "date-time")]
    pub finished: Option<Timestamp>,
}

pub struct Jobs {
    database: Database,
    history: Arc<History>,
    jobs: Mutex<VecDeque<Entry>>,
    /// Those whose last change is not saved.
    unsaved: Mutex<BTreeSet<Uuid>>,
    changed: Notify,
    /// Jobs as they change, for whoever follows.
    told: broadcast::Sender<Job>,
    clock: SystemClock,
}

#[derive(Clone)]
struct Entry {
    job: watch::Sender<Job>,
    cancel: CancellationToken,
}

impl Entry {
    fn is_running(&self, kind: &str, machine: &str) -> bool {
        let job = self.job.borrow();
        job.state == JobState::Running && !job.check && job.kind == kind && job.machine.as_deref() == Some(machine)
    }
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

    /// How far the step is.
    pub fn done(&self, done_bytes: u64, total_bytes: u64) {
        let now = self.jobs.clock.wall_now();
        self.jobs.update(&self.job, |job| {
            let began = job.steps.last().map_or(job.started, |step| step.started);
            job.progress = Some(Amount { done_bytes, total_bytes });
            job.estimated = estimate(began, now, done_bytes, total_bytes);
        });
    }
}

/// As fast as so far.
fn estimate(began: Timestamp, now: Timestamp, done: u64, total: u64) -> Option<Timestamp> {
    let took = now.saturating_since(began);
    if done == 0 || took.is_zero() {
        return None;
    }
    let left = took.as_nanos() * u128::from(total.saturating_sub(done)) / u128::from(done);
    Some(Timestamp(now.0.saturating_add(u64::try_from(left).unwrap_or(u64::MAX))))
}

fn finish_step(job: &mut Job, now: Timestamp) {
    (job.progress, job.estimated) = (None, None);
    if let Some(step) = job.steps.last_mut() {
        step.finished.get_or_insert(now);
    }
}

impl Jobs {
    pub fn open(database: Database, history: Arc<History>, storage: &dyn Storage) -> Result<Arc<Self>, DatabaseError> {
        import(&database, storage)?;
        let sql = "SELECT body FROM jobs ORDER BY started DESC, id LIMIT $1";
        let rows = database.read(Statement::new(sql, [(AT_HAND_MAX as u64).into()]))?;
        let mut at_hand: Vec<Job> = rows.iter().rev().filter_map(|row| job_of(row[0].text())).collect();
        let mut interrupted = BTreeSet::new();
        for job in at_hand.iter_mut().filter(|job| job.state == JobState::Running) {
            interrupted.insert(job.id);
            job.state = JobState::Failed;
            job.finished = job.steps.last().map(|step| step.started).or(Some(job.started));
            job.failure = Some(Failure::new(
                FailureKind::Failed,
                "the configuration server stopped while the job ran",
                "what it wanted was kept and is being done; see `tidemark status`",
            ));
        }
        let entry = |job| Entry { job: watch::Sender::new(job), cancel: CancellationToken::new() };
        Ok(Arc::new(Self {
            database,
            history,
            jobs: Mutex::new(at_hand.into_iter().map(entry).collect()),
            unsaved: Mutex::new(interrupted),
            changed: Notify::new(),
            told: broadcast::Sender::new(TOLD_MAX),
            clock: SystemClock::new(),
        }))
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
        self.start_or_check(kind, machine, false, work)
    }

    /// The same; `check`: it only looks whether that could be done.
    pub fn start_or_check<F>(
        self: &Arc<Self>,
        kind: &str,
        machine: Option<&str>,
        check: bool,
        work: impl FnOnce(Progress) -> F,
    ) -> Result<Job, Failure>
    where
        F: Future<Output = Result<Value, Failure>> + Send + 'static,
    {
        let job = Job {
            id: Uuid::new_v4(),
            kind: kind.to_owned(),
            machine: machine.map(str::to_owned),
            check,
            state: JobState::Running,
            steps: Vec::new(),
            started: self.clock.wall_now(),
            finished: None,
            result: None,
            failure: None,
            version: 1,
            progress: None,
            estimated: None,
        };
        let sender = watch::Sender::new(job.clone());
        let cancel = CancellationToken::new();
        {
            let mut jobs = self.jobs.lock().expect("no panic while held");
            let is_running = |entry: &Entry| entry.job.borrow().state == JobState::Running;
            if jobs.iter().filter(|entry| is_running(entry)).count() >= RUNNING_MAX {
                return Err(Failure::new(
                    FailureKind::Unavailable,
                    format!("{RUNNING_MAX} jobs are running, which is the limit"),
                    "wait for some of them: `tidemark job list`",
                ));
            }
            jobs.push_back(Entry { job: sender.clone(), cancel: cancel.clone() });
        }
        self.unsaved.lock().expect("no panic while held").insert(job.id);
        self.changed.notify_one();
        let _ = self.told.send(job.clone());
        let work = work(Progress { jobs: self.clone(), job: sender.clone() });
        let jobs = self.clone();
        tokio::spawn(async move {
            // A task of its own, so that a panic in it fails the job and not its watchers.
            let mut working = tokio::spawn(work);
            let outcome = tokio::select! {
                outcome = &mut working => Some(outcome.unwrap_or_else(|error| {
                    Err(Failure::new(FailureKind::Failed, format!("the job stopped abruptly: {error}"), "see the log"))
                })),
                () = cancel.cancelled() => {
                    working.abort();
                    None
                }
            };
            let now = jobs.clock.wall_now();
            jobs.update(&sender, |job| {
                job.finished = Some(now);
                match outcome {
                    None => {
                        (job.progress, job.estimated) = (None, None);
                        job.state = JobState::Cancelled;
                        job.failure = Some(Failure::new(
                            FailureKind::Conflict,
                            "the job was cancelled",
                            "what was begun at the agent or the process server may still end there; nothing was lost",
                        ));
                    }
                    Some(Ok(result)) => {
                        finish_step(job, now);
                        job.state = JobState::Succeeded;
                        job.result = Some(result);
                    }
                    Some(Err(failure)) => {
                        tracing::warn!(job = %job.id, kind = job.kind, %failure, "a job failed");
                        jobs.history.note(News {
                            severity: Severity::Warning,
                            kind: "job_failed",
                            machine: job.machine.clone(),
                            message: format!(
                                "{}{} failed: {}",
                                if job.check { "the check of " } else { "" },
                                job.kind,
                                failure.message
                            ),
                            help: failure.help.clone(),
                        });
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
        self.unsaved.lock().expect("no panic while held").insert(job.borrow().id);
        self.changed.notify_one();
        // Nobody follows, most often.
        let _ = self.told.send(job.borrow().clone());
    }

    /// Every change from now on. Whoever is too slow is told that some were left out, and reads the list again.
    pub fn follow(&self) -> broadcast::Receiver<Job> {
        self.told.subscribe()
    }

    /// Ends a job that can be cancelled.
    pub fn cancel(&self, id: Uuid) -> Result<Job, Failure> {
        let conflict = |message: String, help: &str| Err(Failure::new(FailureKind::Conflict, message, help));
        let Some(entry) = self.entry(id) else {
            return Err(Failure::new(FailureKind::NotFound, "there is no such job", "see `tidemark job list`"));
        };
        let job = entry.job.borrow().clone();
        if job.state != JobState::Running {
            return conflict("the job has ended already".to_owned(), "see `tidemark job show`");
        }
        if !CANCELLABLE.contains(&job.kind.as_str()) {
            return conflict(
                format!("a job of the kind {} runs to its end", job.kind),
                "wait for it, then ask for the opposite",
            );
        }
        entry.cancel.cancel();
        Ok(job)
    }

    /// Ends jobs of a kind for a machine, where any run.
    pub fn cancel_all(&self, kind: &str, machine: &str) {
        let jobs = self.jobs.lock().expect("no panic while held");
        jobs.iter().filter(|entry| entry.is_running(kind, machine)).for_each(|entry| entry.cancel.cancel());
    }

    /// Whether a job of a kind runs for a machine.
    pub fn is_running(&self, kind: &str, machine: &str) -> bool {
        self.jobs.lock().expect("no panic while held").iter().any(|entry| entry.is_running(kind, machine))
    }

    fn entry(&self, id: Uuid) -> Option<Entry> {
        let jobs = self.jobs.lock().expect("no panic while held");
        jobs.iter().find(|entry| entry.job.borrow().id == id).cloned()
    }

    /// Newest first.
    pub fn list(&self) -> Vec<Job> {
        self.jobs.lock().expect("no panic while held").iter().rev().map(|entry| entry.job.borrow().clone()).collect()
    }

    /// The job; waits up to `wait` for it to differ from `version`.
    pub async fn get(&self, id: Uuid, version: u64, wait: Duration) -> Option<Job> {
        let Some(entry) = self.entry(id) else {
            // An older one.
            let sql = "SELECT body FROM jobs WHERE id = $1";
            let rows = self.database.read(Statement::new(sql, [id.to_string().into()])).ok()?;
            return job_of(rows.first()?[0].text());
        };
        let mut receiver = entry.job.subscribe();
        let changed = receiver.wait_for(|job| job.version != version || job.state != JobState::Running);
        let _ = tokio::time::timeout(wait, changed).await;
        let job = receiver.borrow().clone();
        Some(job)
    }

    /// Writes the history after changes, until the task is dropped.
    pub async fn keep_saved(self: Arc<Self>) {
        let mut again = tokio::time::interval(SAVE_AGAIN);
        loop {
            self.changed.notified().await;
            loop {
                let jobs = self.clone();
                // One that panicked is not repeated.
                if tokio::task::spawn_blocking(move || jobs.save()).await.unwrap_or(true) {
                    break;
                }
                again.reset();
                again.tick().await;
            }
        }
    }

    /// Whether nothing is left to be saved.
    pub fn save(&self) -> bool {
        let unsaved = std::mem::take(&mut *self.unsaved.lock().expect("no panic while held"));
        let mut statements: Vec<Statement> = Vec::new();
        for id in &unsaved {
            let Some(entry) = self.entry(*id) else { continue };
            statements.push(saved(&entry.job.borrow()));
        }
        let sql = "DELETE FROM jobs WHERE started < \
                   (SELECT MIN(started) FROM (SELECT started FROM jobs ORDER BY started DESC LIMIT $1) AS newest)";
        statements.push(Statement::new(sql, [HISTORY_MAX.into()]));
        if let Err(error) = self.database.write(statements) {
            tracing::warn!(%error, "the history of jobs cannot be saved; trying again");
            self.unsaved.lock().expect("no panic while held").extend(unsaved);
            return false;
        }
        // What is saved and done need not be at hand.
        let unsaved = self.unsaved.lock().expect("no panic while held").clone();
        let mut jobs = self.jobs.lock().expect("no panic while held");
        while jobs.len() > AT_HAND_MAX
            && let Some(index) = jobs.iter().position(|entry| {
                let job = entry.job.borrow();
                job.state != JobState::Running && !unsaved.contains(&job.id)
            })
        {
            jobs.remove(index);
        }
        true
    }
}

fn saved(job: &Job) -> Statement {
    let sql = "INSERT INTO jobs (id, started, body) VALUES ($1, $2, $3) \
               ON CONFLICT (id) DO UPDATE SET body = excluded.body";
    let body = serde_json::to_string(job).expect("jobs are plain data");
    Statement::new(sql, [job.id.to_string().into(), job.started.0.into(), body.into()])
}

/// History only: what cannot be read is left out.
fn job_of(body: &str) -> Option<Job> {
    serde_json::from_str(body).inspect_err(|error| tracing::warn!(%error, "a job of the history cannot be read")).ok()
}

/// Takes over the history of the first version.
fn import(database: &Database, storage: &dyn Storage) -> Result<(), DatabaseError> {
    if !storage.exists(FILE).unwrap_or(false) {
        return Ok(());
    }
    let content = read_file(storage, FILE, FILE_BYTES_MAX).map_err(|error| error.to_string());
    match content.and_then(|content| serde_json::from_slice::<Vec<Job>>(&content).map_err(|error| error.to_string())) {
        Ok(jobs) => database.write(jobs.iter().map(saved).collect())?,
        Err(error) => tracing::warn!(error, "the history of jobs cannot be read; a new one begins"),
    }
    if let Err(error) = storage.rename(FILE, IMPORTED) {
        tracing::warn!(%error, "the older history of jobs stays where it is and will be read again");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::database::DatabaseSetting;
    use tidemark_base::storage::RealStorage;

    fn open(folder: &std::path::Path) -> Arc<Jobs> {
        open_in(folder, Database::open(&DatabaseSetting::Sqlite(folder.join("config.db"))).unwrap())
    }

    fn open_in(folder: &std::path::Path, database: Database) -> Arc<Jobs> {
        let history = Arc::new(History::open(database.clone()).unwrap());
        Jobs::open(database, history, &*RealStorage::open_folder(folder)).unwrap()
    }

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
        let jobs = open(folder.path());
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
        let again = open_in(folder.path(), jobs.database.clone());
        assert_eq!(again.list().len(), 3);
        let interrupted = again.get(hanging.id, 0, SOON).await.unwrap();
        assert_eq!(interrupted.state, JobState::Failed);
        assert!(interrupted.failure.unwrap().message.contains("stopped while"));
    }

    #[tokio::test]
    async fn a_step_says_how_far_it_is_and_when_it_is_likely_done_and_followers_see_every_change() {
        let folder = tempfile::tempdir().unwrap();
        let jobs = open(folder.path());
        let mut followed = jobs.follow();
        let (go, gone) = tokio::sync::oneshot::channel::<()>();
        let job = jobs
            .start("backup", None, |progress| async move {
                progress.step("send");
                progress.done(1, 4);
                let _ = gone.await;
                progress.step("finish");
                Ok(Value::Null)
            })
            .unwrap();
        let mut version = 0;
        let seen = loop {
            let seen = jobs.get(job.id, version, SOON).await.unwrap();
            if seen.progress.is_some() {
                break seen;
            }
            version = seen.version;
        };
        assert_eq!(seen.progress, Some(Amount { done_bytes: 1, total_bytes: 4 }));
        assert!(seen.estimated.is_some_and(|estimated| estimated > seen.steps[0].started));
        let _ = go.send(());
        let ended = end(&jobs, job.id).await;
        assert!(ended.progress.is_none() && ended.estimated.is_none(), "only of a step that runs");
        let mut versions = Vec::new();
        while let Ok(change) = followed.try_recv() {
            versions.push(change.version);
        }
        assert_eq!(versions, (1..=ended.version).collect::<Vec<_>>());
        let at = |seconds: u64| Timestamp(seconds * 1_000_000_000);
        assert_eq!(estimate(at(100), at(110), 1, 4), Some(at(140)));
        assert_eq!((estimate(at(100), at(110), 0, 4), estimate(at(100), at(100), 1, 4)), (None, None));
        assert_eq!(estimate(at(100), at(110), 4, 4), Some(at(110)));
    }

    #[tokio::test]
    async fn what_could_not_be_saved_stays_to_be_saved() {
        let folder = tempfile::tempdir().unwrap();
        let jobs = open(folder.path());
        let job = jobs.start("x", None, |_| async { Ok(Value::Null) }).unwrap();
        end(&jobs, job.id).await;
        let rename = |from: &str, to: &str| Statement::new(format!("ALTER TABLE {from} RENAME TO {to}"), []);
        jobs.database.write(vec![rename("jobs", "elsewhere")]).unwrap();
        assert!(!jobs.save());
        jobs.database.write(vec![rename("elsewhere", "jobs")]).unwrap();
        assert!(jobs.save());
        assert_eq!(open_in(folder.path(), jobs.database.clone()).list()[0].id, job.id);
    }

    #[tokio::test]
    async fn a_panic_fails_the_job() {
        let folder = tempfile::tempdir().unwrap();
        let jobs = open(folder.path());
        let job = jobs.start("x", None, |_| async { panic!("boom") }).unwrap();
        assert_eq!(end(&jobs, job.id).await.state, JobState::Failed);
    }

    #[tokio::test]
    async fn what_only_waits_can_be_cancelled() {
        let folder = tempfile::tempdir().unwrap();
        let jobs = open(folder.path());
        let point = jobs.start("point_create", None, |_| std::future::pending()).unwrap();
        let protect = jobs.start("protect", None, |_| std::future::pending()).unwrap();
        assert!(jobs.cancel(protect.id).unwrap_err().message.contains("runs to its end"));
        jobs.cancel(point.id).unwrap();
        assert_eq!(end(&jobs, point.id).await.state, JobState::Cancelled);
        assert!(jobs.cancel(point.id).unwrap_err().message.contains("ended already"));
        assert_eq!(jobs.cancel(Uuid::new_v4()).unwrap_err().kind, FailureKind::NotFound);
    }
}
