//! Failovers: how a machine is run where its replica is, and drills.
//!
//! *Consistency.* That a drill may run is noted, durably, before it is asked for, so that a clean-up always finds it. *Retries.*
//! Cleaning up may be repeated. *Cancellation.* A drill runs to its end; its clean-up ends it earlier. *Crash.* What was noted
//! is found again; drills themselves end with their process server.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tidemark_base::{Clock, Timestamp};
use tidemark_hypervisor::call::{Call, Description, DrillCall, Drilled, decode, encode};
use tidemark_hypervisor::drill::Outcome;
use tidemark_proto::control::{Failure, FailureKind, Reply, Selector, ServerCommand, Severity};
use uuid::Uuid;

use crate::core::{Core, SETTLE};
use crate::history::News;
use crate::hub::{PeerId, unexpected};
use crate::jobs::Job;
use crate::machines::refuse_unprotected;
use crate::model::Machine;
use crate::names::bad_request;

/// The longest that a drill may wait for its sign of life.
const SIGN_LIMIT_MAX_SECONDS: u64 = 3600;
/// Drills of one machine that are left running.
const DRILLS_MAX: usize = 16;

/// A drill that runs, or may.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrillNote {
    pub id: Uuid,
    pub point: String,
    pub began: Timestamp,
}

#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TestRequest {
    /// An id, `latest`, `latest-app`, or a time.
    pub point: String,
    /// Ends it when it showed its sign of life, instead of leaving it running.
    pub cleanup: bool,
}

impl Default for TestRequest {
    fn default() -> Self {
        Self { point: "latest".to_owned(), cleanup: false }
    }
}

/// How a machine is described, and what it would run on.
pub fn description(core: &Core, name: &str) -> Result<Value, Failure> {
    let machine = core.machine(name)?;
    Ok(json!({ "machine": name, "description": machine.description, "drills": machine.drills }))
}

/// Says how a machine is run where its replica is, and looks at what runs it.
pub async fn describe(core: &Core, name: &str, description: Description) -> Result<Value, Failure> {
    let _lock = core.lock(name).await;
    let machine = core.machine(name)?;
    description
        .hardware
        .check(machine.disks.len())
        .map_err(|error| Failure::new(FailureKind::BadRequest, error.to_string(), error.help()))?;
    if !(1..=SIGN_LIMIT_MAX_SECONDS).contains(&description.sign_limit_seconds) {
        return Err(bad_request(
            format!("a sign of life is waited for between 1 and {SIGN_LIMIT_MAX_SECONDS} seconds"),
            "choose sign_limit_seconds in this range",
        ));
    }
    core.store.change(|state| {
        let machine = state.machines.get_mut(name).ok_or_else(gone)?;
        machine.description = Some(description.clone());
        Ok(())
    })?;
    // Kept whether or not it can run now; whoever set it is told.
    let hypervisor = match ask(core, &machine, &Call::Check, SETTLE).await {
        Ok(about) => serde_json::from_str(&about).unwrap_or(Value::Null),
        Err(failure) => json!({ "error": failure.message, "help": failure.help }),
    };
    Ok(json!({ "machine": name, "description": description, "hypervisor": hypervisor }))
}

/// Boots a point in isolation.
pub fn test(core: &Arc<Core>, name: &str, request: TestRequest) -> Result<Job, Failure> {
    let asked = Instant::now();
    let machine = core.machine(name)?;
    refuse_unprotected(&machine)?;
    let point = request.point.parse::<Selector>().map_err(|error| {
        bad_request(
            error.to_string(),
            "name an id of `tidemark point list`, `latest`, `latest-app`, or a time such as 2026-11-21T10:04:05.250Z",
        )
    });
    point?;
    let Some(description) = machine.description.clone() else {
        return Err(Failure::new(
            FailureKind::Conflict,
            format!("machine {name:?} has no description: nobody said what it needs to run"),
            "say it: `tidemark machine set NAME --memory 4G --processors 2 --firmware bios`",
        ));
    };
    let (core, name) = (core.clone(), name.to_owned());
    core.jobs.clone().start("failover_test", Some(&name.clone()), |progress| async move {
        let id = Uuid::new_v4();
        progress.step("note the drill");
        note(&core, &name, DrillNote { id, point: request.point.clone(), began: core.clock.wall_now() })?;
        progress.step("boot the point in isolation");
        let limit = Duration::from_secs(description.sign_limit_seconds) + 2 * SETTLE;
        let call = DrillCall {
            drill: id,
            machine: machine.id,
            name: format!("{}-drill-{}", machine.name, &id.simple().to_string()[..8]),
            point: request.point,
            disks: machine.disks.iter().map(|disk| disk.id).collect(),
            description,
            keep: !request.cleanup,
        };
        let before = asked.elapsed();
        let answer = ask(&core, &machine, &Call::Drill(Box::new(call)), limit).await;
        // Only what may still run is kept: a drill that nobody answered for may.
        if let Err(failure) = &answer
            && !matches!(failure.kind, FailureKind::TimedOut | FailureKind::Unavailable)
        {
            forget(&core, &name, id)?;
        }
        let drilled: Drilled = decode(&answer?).map_err(not_understood)?;
        if !drilled.report.running && drilled.report.left.is_none() {
            forget(&core, &name, id)?;
        }
        conclude(&core, &name, id, drilled, before)
    })
}

/// The job's result; a drill without a sign of life fails its job.
fn conclude(core: &Core, name: &str, id: Uuid, drilled: Drilled, before: Duration) -> Result<Value, Failure> {
    let report = &drilled.report;
    let since_asked = |seconds: Option<f64>| seconds.map(|seconds| seconds + before.as_secs_f64());
    let result = json!({
        "machine": name,
        "drill": id,
        "point": drilled.point,
        "time": drilled.time,
        "outcome": report.outcome,
        "rto_seconds": since_asked(report.first_instruction_seconds),
        "sign_seconds": since_asked(report.sign_seconds),
        "sign": report.sign,
        "hypervisor": report.hypervisor,
        "console": report.console,
        "screen": report.screen,
        "running": report.running,
        "left": report.left,
    });
    let alive = report.outcome == Outcome::Alive;
    core.history.note(News {
        severity: if alive { Severity::Info } else { Severity::Warning },
        kind: "failover_test",
        machine: Some(name.to_owned()),
        message: match (&report.reason, alive) {
            (_, true) if report.sign.is_some() => format!("point {} boots", drilled.point),
            (_, true) => format!("point {} was started; no sign of life is set, so nothing is proven", drilled.point),
            (reason, false) => {
                let reason = reason.as_deref().unwrap_or("it did not live");
                format!("point {} was tried and did not boot: {reason}", drilled.point)
            }
        },
        help: report.help.clone().unwrap_or_default(),
    });
    if alive {
        return Ok(result);
    }
    let console = report.console.as_ref().map(|path| format!("; its console was kept in {}", path.display()));
    let reason = report.reason.clone().unwrap_or_else(|| "it did not live".to_owned());
    let message =
        format!("the test failover of {name:?} to point {}: {reason}{}", drilled.point, console.unwrap_or_default());
    Err(Failure::new(FailureKind::Failed, message, report.help.clone().unwrap_or_default()))
}

/// Ends all drills of a machine.
pub fn cleanup(core: &Arc<Core>, name: &str) -> Result<Job, Failure> {
    core.machine(name)?;
    let (core, name) = (core.clone(), name.to_owned());
    core.jobs.clone().start("failover_cleanup", Some(&name.clone()), |progress| async move {
        let machine = core.machine(&name)?;
        for drill in &machine.drills {
            progress.step(format!("end the drill of {}", drill.began));
            ask(&core, &machine, &Call::EndDrill { drill: drill.id }, SETTLE).await?;
            forget(&core, &name, drill.id)?;
        }
        Ok(json!({ "machine": name, "ended": machine.drills.len() }))
    })
}

/// What would lose its disk stays until its drills were ended.
pub fn refuse_drilled(machine: &Machine) -> Result<(), Failure> {
    if machine.drills.is_empty() {
        return Ok(());
    }
    Err(Failure::new(
        FailureKind::Conflict,
        format!("a test failover of machine {:?} runs", machine.name),
        "end it first: `tidemark failover cleanup NAME`",
    ))
}

fn note(core: &Core, name: &str, drill: DrillNote) -> Result<(), Failure> {
    core.store.change(|state| {
        let machine = state.machines.get_mut(name).ok_or_else(gone)?;
        if machine.drills.len() >= DRILLS_MAX {
            return Err(Failure::new(
                FailureKind::Conflict,
                format!("{DRILLS_MAX} test failovers of machine {name:?} run, which is the limit"),
                "end them first: `tidemark failover cleanup NAME`",
            ));
        }
        machine.drills.push(drill);
        Ok(())
    })
}

fn forget(core: &Core, name: &str, id: Uuid) -> Result<(), Failure> {
    core.store.change(|state| {
        if let Some(machine) = state.machines.get_mut(name) {
            machine.drills.retain(|drill| drill.id != id);
        }
        Ok(())
    })
}

async fn ask(core: &Core, machine: &Machine, call: &Call, limit: Duration) -> Result<String, Failure> {
    match core.server(machine.server, &ServerCommand::Hypervisor(encode(call)), limit).await? {
        Reply::Hypervisor(answer) => Ok(answer),
        other => Err(unexpected(PeerId::ProcessServer(machine.server), &other)),
    }
}

fn gone() -> Failure {
    Failure::new(FailureKind::NotFound, "the machine was unprotected meanwhile", "see `tidemark status`")
}

fn not_understood(error: tidemark_hypervisor::call::NotUnderstood) -> Failure {
    Failure::new(FailureKind::Failed, error.to_string(), "let both ends be of the same version")
}
