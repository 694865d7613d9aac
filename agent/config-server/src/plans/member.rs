//! One machine of a run: its failover, its test failover, and its way back.
//!
//! *Consistency*, *Crash.* What a machine's failover is, the machine itself says: going on with a plan looks there, and begins, goes on with
//! or takes over what it finds. *Retries.* Going on with the plan. *Cancellation.* A failover that was begun goes to its end; the plan
//! takes it back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use tidemark_proto::control::{Failure, FailureKind};
use uuid::Uuid;

use super::state::RunKind;
use crate::core::Core;
use crate::failover::state::{Kind, Phase};
use crate::failover::{after, drill, start};
use crate::jobs::{Job, JobState};
use crate::points::{self, ServeRequest};
use crate::{groups, serves};

/// How long one look at a job lasts.
const LOOK: Duration = Duration::from_secs(30);

/// What a machine is asked to do.
#[derive(Clone)]
pub struct Asked {
    pub kind: RunKind,
    pub point: String,
    pub disks_only: bool,
}

/// What came of it.
#[derive(Default)]
pub struct Outcome {
    pub point: Option<String>,
    pub time: Option<String>,
    pub lost_seconds: Option<f64>,
    pub lost_bytes: Option<u64>,
    /// From when it began to its first instruction, or to its disks being ready.
    pub own_seconds: Option<f64>,
}

/// Waits for the end of a job.
pub async fn finish(core: &Core, job: Uuid) -> Result<Value, Failure> {
    let mut version = 0;
    loop {
        let gone = || Failure::new(FailureKind::Failed, "the job is not known any more", "see `tidemark job list`");
        let job = core.jobs.get(job, version, LOOK).await.ok_or_else(gone)?;
        version = job.version;
        match job.state {
            JobState::Running => {}
            JobState::Succeeded => return Ok(job.result.unwrap_or(Value::Null)),
            JobState::Failed | JobState::Cancelled => {
                let unknown = || Failure::new(FailureKind::Failed, "the job failed", "see `tidemark job show`");
                return Err(job.failure.unwrap_or_else(unknown));
            }
        }
    }
}

/// Runs the machine where its replica is, or tests that. `began` is told the job of it.
pub async fn go(core: &Arc<Core>, name: &str, asked: &Asked, began: impl Fn(Uuid)) -> Result<Outcome, Failure> {
    let since = Instant::now();
    if asked.kind == RunKind::Test {
        return test(core, name, asked, since, began).await;
    }
    let machine = core.machine(name)?;
    match machine.failover.as_ref().map(|failover| failover.phase) {
        Some(Phase::FailedOver | Phase::Committed) => return Ok(known(&machine)),
        // It stopped in the middle of that: back, and again.
        Some(Phase::Draining | Phase::ChangingPoint | Phase::Cancelling) => {
            finish(core, after::cancel(core, name)?.id).await?;
        }
        Some(_) | None => {}
    }
    let job = begin(core, name, asked, false).await?;
    began(job.id);
    let result = finish(core, job.id).await?;
    let mut outcome = told(&result);
    // Where nothing is started, the disks are what is waited for.
    outcome.own_seconds = result["rto_seconds"].as_f64().or_else(|| Some(since.elapsed().as_secs_f64()));
    Ok(outcome)
}

async fn begin(core: &Arc<Core>, name: &str, asked: &Asked, check_only: bool) -> Result<Job, Failure> {
    let (kind, point) = match asked.kind {
        RunKind::Planned => (Kind::Planned, None),
        _ => (Kind::Unplanned, Some(groups::points::named(core, name, asked.point.clone()).await?)),
    };
    let request = start::StartRequest { point, disks_only: asked.disks_only, check_only, ..Default::default() };
    start::start(core, name, kind, request)
}

/// Whether it could, and what would be lost; nothing is begun.
pub async fn check(core: &Arc<Core>, name: &str, asked: &Asked) -> Result<Value, Failure> {
    crate::failover::state::refuse_failed_over(&core.machine(name)?)?;
    let point = groups::points::named(core, name, asked.point.clone()).await?;
    let resolved = points::resolve(core, name, &point).await.map_err(|failure| match failure.kind {
        FailureKind::NotFound => Failure {
            message: format!("machine {name:?} has no point {:?} to fail over to", asked.point),
            help: "see `tidemark point list NAME`; the first one is there when the initial replication has ended"
                .to_owned(),
            ..failure
        },
        _ => failure,
    })?;
    if asked.kind == RunKind::Test {
        if !asked.disks_only && core.machine(name)?.description.is_none() {
            return Err(Failure::new(
                FailureKind::Conflict,
                format!("machine {name:?} has no description: nobody said what it needs to run"),
                "say it: `tidemark machine set NAME --memory 4G`; or test the disks alone: --disks-only",
            ));
        }
        return Ok(serde_json::json!({ "machine": name, "point": resolved.id, "time": resolved.time }));
    }
    finish(core, begin(core, name, asked, true).await?.id).await
}

async fn test(
    core: &Arc<Core>,
    name: &str,
    asked: &Asked,
    since: Instant,
    began: impl Fn(Uuid),
) -> Result<Outcome, Failure> {
    let point = groups::points::named(core, name, asked.point.clone()).await?;
    if asked.disks_only {
        // As a failover would give them, with a scratch layer: nothing of the replica is written.
        let request = ServeRequest { writable: true, listen: None, process_server: None };
        let serving = points::serve(core, name, &point, request).await?;
        let own_seconds = Some(since.elapsed().as_secs_f64());
        let serve = serving["serve"].as_str().and_then(|id| id.parse().ok());
        if let Some(serve) = serve {
            serves::stop(core, serve).await?;
        }
        return Ok(Outcome { own_seconds, ..told(&serving) });
    }
    let job = drill::test(core, name, drill::TestRequest { point, cleanup: true })?;
    began(job.id);
    let result = finish(core, job.id).await?;
    Ok(Outcome { own_seconds: result["rto_seconds"].as_f64(), ..told(&result) })
}

/// Lets its source go on, or ends what its test left.
pub async fn undo(core: &Arc<Core>, name: &str, kind: RunKind) -> Result<(), Failure> {
    let machine = core.machine(name)?;
    if kind == RunKind::Test {
        return match machine.drills.is_empty() {
            true => Ok(()),
            false => finish(core, drill::cleanup(core, name)?.id).await.map(drop),
        };
    }
    match machine.failover {
        None => Ok(()),
        Some(_) => finish(core, after::cancel(core, name)?.id).await.map(drop),
    }
}

pub async fn commit(core: &Arc<Core>, name: &str) -> Result<(), Failure> {
    finish(core, after::commit(core, name)?.id).await.map(drop)
}

fn told(result: &Value) -> Outcome {
    let text = |name: &str| result[name].as_str().map(str::to_owned);
    Outcome {
        point: text("point"),
        time: text("time"),
        lost_seconds: result["lost_seconds"].as_f64(),
        lost_bytes: result["lost_bytes"].as_u64(),
        own_seconds: None,
    }
}

/// Of one that failed over already.
fn known(machine: &crate::model::Machine) -> Outcome {
    let Some(failover) = &machine.failover else { return Outcome::default() };
    Outcome {
        point: failover.point.map(|point| point.to_string()),
        time: failover.time.map(|time| time.to_string()),
        lost_seconds: failover.lost.map(|lost| lost.seconds),
        lost_bytes: failover.lost.map(|lost| lost.bytes),
        own_seconds: None,
    }
}
