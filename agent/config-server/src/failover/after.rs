//! What follows a failover: another point, back to the source, accepted; plain disks; the end of a migration.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tidemark_hypervisor::call::{Call, FailedOver, Promotion, decode};
use tidemark_proto::control::{Failure, FailureKind, Severity};

use super::start::{call, note};
use super::state::{self, Failover, Phase};
use super::{ask, elsewhere, failback, not_understood, reprotect, rights, source};
use crate::core::{Core, SETTLE, Side};
use crate::history::{News, Query, Stored};
use crate::jobs::Job;
use crate::machines::{settle_unprotected, vanished};
use crate::model::{Machine, Wanted};
use crate::names::bad_request;
use crate::points::selector;

/// The event of a machine that has no way home.
const MIGRATED: &str = "migrated";
/// How often a promotion is looked after.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChangePointRequest {
    /// An id, `latest`, `latest-app`, or a time.
    pub point: String,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PromoteRequest {
    /// The most that is written in a second; absent: no limit.
    pub bytes_per_second: Option<u64>,
    /// Stops it; what was written stays, and it goes on from there when it is asked for again.
    pub stop: bool,
}

/// What is stored of a failover, and how its machine does.
pub async fn show(core: &Core, name: &str) -> Result<Value, Failure> {
    let machine = core.machine(name)?;
    let failover = state::find(&machine)?;
    let mut shown = json!({ "machine": name, "failover": failover });
    match how(core, &machine, &failover).await {
        Ok(answer) => shown["running"] = json!(answer),
        // One that is being started or ended need not be there.
        Err(failure) => shown["unknown"] = json!({ "error": failure.message, "help": failure.help }),
    }
    if failover.home.is_some() {
        shown["home"] = match reprotect::report(core, &machine).await {
            Ok(report) => json!(report),
            Err(failure) => json!({ "error": failure.message, "help": failure.help }),
        };
    }
    Ok(shown)
}

async fn how(core: &Core, machine: &Machine, failover: &Failover) -> Result<FailedOver, Failure> {
    let answer = ask(core, machine, &Call::Failover { failover: failover.id }, SETTLE).await?;
    decode(&answer).map_err(not_understood)
}

/// Runs the machine from another point; what it wrote since the failover is gone.
pub fn change_point(core: &Arc<Core>, name: &str, request: ChangePointRequest) -> Result<Job, Failure> {
    let asked = Instant::now();
    selector(&request.point)?;
    state::find(&core.machine(name)?)?;
    let (core, name) = (core.clone(), name.to_owned());
    core.jobs.clone().start("failover_change_point", Some(&name.clone()), |progress| async move {
        let _lock = core.lock(&name).await;
        let failover = state::find(&core.machine(&name)?)?;
        let machine = state::advance(&core, &name, failover.id, Phase::ChangingPoint, |_| {})?;
        progress.step("run it from the other point");
        let changing = Call::ChangePoint(Box::new(call(&machine, &failover, request.point)));
        let before = asked.elapsed().as_secs_f64();
        let changed = ask(&core, &machine, &changing, SETTLE).await;
        // A refusal leaves it at the point before; after no answer it is asked where it is.
        let answer = match &changed {
            Ok(answer) => decode::<FailedOver>(answer).map_err(not_understood)?,
            Err(failure) => how(&core, &machine, &failover).await.map_err(|_| failure.clone())?,
        };
        state::advance(&core, &name, failover.id, Phase::FailedOver, |failover| {
            failover.point = Some(answer.point);
            failover.time = Some(answer.time);
        })?;
        changed?;
        note(&core, &name, &format!("runs from the point of {}", answer.time));
        let rto = answer.first_instruction_seconds.map(|seconds| seconds + before);
        Ok(json!({ "machine": name, "point": answer.point, "time": answer.time, "rto_seconds": rto,
            "power": answer.power, "disks": answer.disks }))
    })
}

/// The source goes on; what was written since the failover is gone.
pub fn cancel(core: &Arc<Core>, name: &str) -> Result<Job, Failure> {
    let machine = core.machine(name)?;
    // One that a process server refuses may have been failed over without us.
    if !core.is_unsettled(machine.id, Side::Server) {
        state::find(&machine)?;
    }
    let (core, name) = (core.clone(), name.to_owned());
    core.jobs.clone().start("failover_cancel", Some(&name.clone()), |progress| async move {
        let _lock = core.lock(&name).await;
        if core.machine(&name)?.failover.is_none() {
            return rights::take_back(&core, &progress, &name).await;
        }
        let failover = state::find(&core.machine(&name)?)?;
        if !matches!(
            failover.phase,
            Phase::Draining | Phase::Starting | Phase::FailedOver | Phase::ChangingPoint | Phase::Cancelling
        ) {
            return Err(Failure::new(
                FailureKind::Conflict,
                format!("the failover of machine {name:?} was committed"),
                "it cannot be cancelled any more; bring the machine home: `tidemark reprotect NAME`, then `tidemark failback NAME`",
            ));
        }
        let machine = state::advance(&core, &name, failover.id, Phase::Cancelling, |_| {})?;
        progress.step("end the machine where it failed over to");
        ask(&core, &machine, &Call::EndFailover { failover: failover.id }, SETTLE).await?;
        let machine = state::end(&core, &name, failover.id)?;
        progress.step("let the source go on");
        note(&core, &name, "goes on at its source: the failover was cancelled");
        let (told, started) = source::go_on(&core, &progress, &machine, failover.source_stopped).await;
        let waiting = told.err().map(|failure| format!("{}; it goes on when it can be told", failure.message));
        Ok(json!({ "machine": name, "source": if waiting.is_none() { "goes on" } else { "is away" }, "waiting": waiting,
            "started": started }))
    })
}

/// Accepts the point.
pub fn commit(core: &Arc<Core>, name: &str) -> Result<Job, Failure> {
    state::find(&core.machine(name)?)?;
    let (core, name) = (core.clone(), name.to_owned());
    core.jobs.clone().start("commit", Some(&name.clone()), |progress| async move {
        let lock = core.lock(&name).await;
        let machine = core.machine(&name)?;
        let failover = state::find(&machine)?;
        if matches!(failover.phase, Phase::FailedBack | Phase::Landing) {
            let landed = failback::land(&core, &progress, &machine, &failover).await?;
            drop(lock);
            if failover.home.as_ref().is_some_and(|home| home.from.is_some()) && landed["waiting"].is_null() {
                elsewhere::settle_in(&core, &progress, &name).await?;
            }
            return Ok(landed);
        }
        if failover.phase == Phase::FailingBack {
            let message = format!("machine {name:?} is failing back: there is nothing to commit yet");
            let help =
                "complete it first (`tidemark failback complete NAME`), or cancel it: `tidemark failback cancel NAME`";
            return Err(Failure::new(FailureKind::Conflict, message, help));
        }
        if !matches!(failover.phase, Phase::FailedOver | Phase::Committed) {
            let message = format!("machine {name:?} {}: there is nothing to commit yet", failover.phase.name());
            return Err(Failure::new(FailureKind::Conflict, message, "ask for the failover again, or cancel it"));
        }
        progress.step("accept the point");
        let answer = ask(&core, &machine, &Call::Commit { failover: failover.id }, SETTLE).await?;
        let answer: FailedOver = decode(&answer).map_err(not_understood)?;
        state::advance(&core, &name, failover.id, Phase::Committed, |_| {})?;
        note(&core, &name, &format!("was committed to the point of {}", answer.time));
        Ok(json!({ "machine": name, "point": answer.point, "time": answer.time, "promotion": answer.promotion }))
    })
}

/// Gives the machine plain disks, while it runs.
pub fn promote(core: &Arc<Core>, name: &str, request: PromoteRequest) -> Result<Job, Failure> {
    if request.bytes_per_second == Some(0) {
        return Err(bad_request(
            "at no bytes a second nothing is ever written",
            "leave it out, or stop it with --stop",
        ));
    }
    state::find(&core.machine(name)?)?;
    let (core, name) = (core.clone(), name.to_owned());
    core.jobs.clone().start("failover_promote", Some(&name.clone()), |progress| async move {
        let (machine, failover) = {
            let _lock = core.lock(&name).await;
            let machine = core.machine(&name)?;
            let failover = state::find(&machine)?;
            if !matches!(failover.phase, Phase::FailedOver | Phase::Committed) {
                let message = format!("machine {name:?} {}", failover.phase.name());
                return Err(Failure::new(FailureKind::Conflict, message, "wait until it failed over"));
            }
            let change = match request.stop {
                true => Call::StopPromote { failover: failover.id },
                false => Call::Promote { failover: failover.id, bytes_per_second: request.bytes_per_second },
            };
            progress.step(if request.stop { "stop writing plain disks" } else { "write plain disks" });
            ask(&core, &machine, &change, SETTLE).await?;
            (machine, failover)
        };
        // Without the lock: the failover may be cancelled meanwhile.
        let answer = loop {
            let answer = how(&core, &machine, &failover).await?;
            progress.done(answer.done_bytes, answer.total_bytes);
            let ends_filled = failover.disks_only && answer.promotion == Promotion::Filled;
            if request.stop || ends_filled || matches!(answer.promotion, Promotion::Plain | Promotion::No) {
                break answer;
            }
            if tokio::time::timeout(LOOK_AGAIN, core.stop.cancelled()).await.is_ok() {
                break answer;
            }
        };
        if !request.stop && answer.promotion == Promotion::No {
            return Err(Failure::new(
                FailureKind::Conflict,
                format!("the promotion of machine {name:?} was stopped"),
                "ask for it again; what was written stays",
            ));
        }
        Ok(json!({ "machine": name, "promotion": answer.promotion, "done_bytes": answer.done_bytes,
            "total_bytes": answer.total_bytes, "disks": answer.disks }))
    })
}

/// A machine that is to go home. Of one whose migration was completed nothing is kept but its events: they say why it cannot.
pub fn find_returning(core: &Core, name: &str) -> Result<Machine, Failure> {
    core.machine(name).map_err(|failure| {
        let query = Query { machine: Some(name.to_owned()), ..Query::default() };
        let events = core.history.list(&query).unwrap_or_default();
        match events.into_iter().rfind(|event| event.kind == MIGRATED) {
            None => failure,
            Some(Stored { time, .. }) => Failure::new(
                FailureKind::Conflict,
                format!("machine {name:?} has no way home: its migration was completed at {time}, and its replica went with that"),
                "protect it anew where it runs (`tidemark protect`), and fail it over to where it is to be",
            ),
        }
    })
}

/// Completes a migration: the machine stays where it is, its replica goes, and there is no way back.
pub fn migrate(core: &Arc<Core>, name: &str) -> Result<Job, Failure> {
    state::find(&core.machine(name)?)?;
    let (core, name) = (core.clone(), name.to_owned());
    core.jobs.clone().start("migrate", Some(&name.clone()), |progress| async move {
        let _lock = core.lock(&name).await;
        let machine = core.machine(&name)?;
        let failover = state::find(&machine)?;
        if failover.phase != Phase::Committed {
            return Err(Failure::new(
                FailureKind::Conflict,
                format!("the failover of machine {name:?} is not committed"),
                "commit it first: `tidemark commit NAME`",
            ));
        }
        let answer = match how(&core, &machine, &failover).await {
            Ok(answer) => Some(answer),
            // It let go before this server could note it.
            Err(failure) if failure.kind == FailureKind::NotFound => None,
            Err(failure) => return Err(failure),
        };
        let is_plain = |answer: &FailedOver| match failover.disks_only {
            true => matches!(answer.promotion, Promotion::Plain | Promotion::Filled),
            false => answer.promotion == Promotion::Plain,
        };
        if !answer.as_ref().is_none_or(is_plain) {
            return Err(Failure::new(
                FailureKind::Conflict,
                format!("machine {name:?} still runs from its replica"),
                "give it plain disks first: `tidemark failover promote NAME`",
            ));
        }
        progress.step("let go of the machine");
        if answer.is_some() {
            ask(&core, &machine, &Call::LetGo { failover: failover.id }, SETTLE).await?;
        }
        core.store.change(|state| {
            let machine = state.machines.get_mut(&name).ok_or_else(vanished)?;
            machine.failover = None;
            machine.wanted = Wanted::Unprotected { delete_replica: true, agent_done: false, server_done: false };
            Ok(())
        })?;
        core.history.note(News {
            severity: Severity::Warning,
            kind: MIGRATED,
            machine: Some(name.clone()),
            message: format!("machine {name} was migrated: it is not protected any more"),
            help: "protect it anew where it runs: `tidemark protect`".to_owned(),
        });
        // A source that is away lets go when it comes back.
        let waiting = settle_unprotected(&core, Some(&progress), &name).await.err().map(|failure| failure.message);
        let disks = answer.map(|answer| answer.disks).unwrap_or_default();
        Ok(json!({ "machine": name, "disks": disks, "waiting": waiting }))
    })
}
