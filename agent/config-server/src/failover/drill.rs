//! Drills: a point boots in isolation; the machine and its replication go on.
//!
//! *Consistency.* That a drill may run is noted, durably, before it is asked for, so that a clean-up always finds it. *Retries.*
//! Cleaning up may be repeated. *Cancellation.* A drill runs to its end; its clean-up ends it earlier. *Crash.* What was noted
//! is found again; drills themselves end with their process server.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tidemark_base::{Clock, ServerId, Timestamp};
use tidemark_hypervisor::call::{Call, DrillCall, Drilled, decode};
use tidemark_hypervisor::drill::Outcome;
use tidemark_proto::control::{Failure, FailureKind, Severity};
use uuid::Uuid;

use super::{ask, no_description, not_understood};
use crate::consumers;
use crate::core::{Core, SETTLE};
use crate::history::News;
use crate::hub::PeerId;
use crate::jobs::Job;
use crate::machines::{refuse_unprotected, vanished};
use crate::model::Machine;
use crate::points::selector;

/// Drills of one machine that are left running.
const DRILLS_MAX: usize = 16;

/// A drill that runs, or may.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrillNote {
    pub id: Uuid,
    pub point: String,
    pub began: Timestamp,
    /// The process server that it runs at. Unsaid by servers of before: the machine's first one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<ServerId>,
}

impl DrillNote {
    fn server(&self, machine: &Machine) -> ServerId {
        self.server.unwrap_or(machine.server)
    }
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

/// Boots a point in isolation.
pub fn test(core: &Arc<Core>, name: &str, request: TestRequest) -> Result<Job, Failure> {
    let asked = Instant::now();
    let machine = core.machine(name)?;
    refuse_unprotected(&machine)?;
    let point = selector(&request.point)?;
    let Some(description) = machine.description.clone() else { return Err(no_description(name)) };
    let (core, name) = (core.clone(), name.to_owned());
    core.jobs.clone().start("failover_test", Some(&name.clone()), |progress| async move {
        let id = Uuid::new_v4();
        // Where one is there that has the point.
        let machine = consumers::at(&core, machine, None, &point).await?;
        progress.step("note the drill");
        let (began, server) = (core.clock.wall_now(), Some(machine.server));
        note(&core, &name, DrillNote { id, point: request.point.clone(), began, server })?;
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
            let server = drill.server(&machine);
            // One that is left ended it with its replica.
            if machine.servers().any(|known| known == server) {
                ask(&core, &machine.clone().about(server), &Call::EndDrill { drill: drill.id }, SETTLE).await?;
            }
            forget(&core, &name, drill.id)?;
        }
        Ok(json!({ "machine": name, "ended": machine.drills.len() }))
    })
}

/// As [`refuse_drilled_at`], wherever they run.
pub fn refuse_drilled(core: &Core, machine: &Machine) -> Result<(), Failure> {
    refuse_drilled_at(core, machine, &machine.servers().collect::<Vec<_>>())
}

/// What would lose its disk, at one of these, stays until its drills were ended. A process server that is away ends them itself
/// when it starts, and holds up nobody when it never does.
pub fn refuse_drilled_at(core: &Core, machine: &Machine, at: &[ServerId]) -> Result<(), Failure> {
    let mut servers = machine.drills.iter().map(|drill| drill.server(machine));
    if !servers.any(|server| at.contains(&server) && core.hub.is_connected(PeerId::ProcessServer(server))) {
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
        let machine = state.machines.get_mut(name).ok_or_else(vanished)?;
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
