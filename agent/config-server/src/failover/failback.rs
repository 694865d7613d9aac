//! Failback: a reprotected machine goes home.
//!
//! 1. its home disks are brought as close as they can be while it runs
//! 2. it is shut down, and nobody can open its disks there, durably
//! 3. the last round; after it home has everything
//! 4. stored: it is home; then its workload may open its disks there
//! 5. (commit) what it had elsewhere goes, and replication from home goes on with what was written there meanwhile
//!
//! *Consistency.* Home is opened only after 3 and 4, elsewhere only before 2: never both. *Retries.* Each step may be repeated:
//! [`complete`] goes on where it was left. *Cancellation.* Until the commit: before 4 it is started again elsewhere; after it, home is
//! closed first, what was written there is kept as a point, and it goes on elsewhere as it was stopped. *Crash.* As cancellation
//! finds it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tidemark_base::Clock;
use tidemark_hypervisor::call::Call;
use tidemark_proto::control::{AttachedDisk, Failure, FailureKind};
use tidemark_proto::failback::{Method, Stage, TargetCall, TargetReport};

use super::reprotect::{self, bring, follow, wait_for_agent};
use super::start::{call as machine_call, note, settle_source};
use super::state::{self, Failover, Home, Phase};
use super::{after, ask, elsewhere, source, taken};
use crate::core::{Core, SETTLE};
use crate::jobs::{Job, Progress};
use crate::machines::{protected, settle_agent, vanished};
use crate::model::Machine;
use crate::names::bad_request;

/// What a guest may take to shut down, where nobody says.
const SHUTDOWN_SECONDS: u64 = 300;
const SHUTDOWN_SECONDS_MAX: u64 = 3600;

#[derive(Clone, Debug, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FailbackRequest {
    /// Brings the home disks close while it runs, and waits for `complete`.
    pub minimise_downtime: bool,
    /// Shuts it down first, and brings everything, without comparing.
    pub full_download: bool,
    /// Where it runs is lost: home goes on as its disks are, and what they do not have yet is lost.
    pub unplanned: bool,
    /// The host that it goes home to; absent: the one that it was reprotected to.
    pub to: Option<String>,
    /// What the guest may take to shut down, in seconds; then it is turned off. Absent: 300.
    pub shutdown_limit_seconds: Option<u64>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CompleteRequest {
    /// What the guest may take to shut down, in seconds; then it is turned off. Absent: 300.
    pub shutdown_limit_seconds: Option<u64>,
}

pub fn start(core: &Arc<Core>, name: &str, request: FailbackRequest) -> Result<Job, Failure> {
    if request.minimise_downtime && request.full_download {
        return Err(bad_request(
            "a full download shuts the machine down first: it minimises no downtime",
            "choose one of the two",
        ));
    }
    let machine = after::find_returning(core, name)?;
    if !request.unplanned {
        refuse_unready(name, &state::find(&machine)?)?;
    }
    shutdown_limit(request.shutdown_limit_seconds)?;
    if let Some(to) = &request.to {
        let state = core.store.state();
        let host = state.hosts.get(&machine.host).map_or("", |host| host.name.as_str());
        if *to != host && *to != machine.host.to_string() {
            return Err(bad_request(
                format!("machine {name:?} was reprotected to host {host}, not to {to}"),
                "fail it back there, or reprotect it to the other host first",
            ));
        }
    }
    let (core, name) = (core.clone(), name.to_owned());
    if request.unplanned {
        if request.minimise_downtime || request.full_download {
            return Err(bad_request("nothing crosses from where it ran", "name --unplanned alone"));
        }
        return core.jobs.clone().start("failback_unplanned", Some(&name.clone()), |progress| async move {
            taken::run(&core, &progress, &name).await
        });
    }
    core.jobs
        .clone()
        .start("failback", Some(&name.clone()), |progress| async move { run(&core, &progress, &name, request).await })
}

pub fn shutdown_limit(seconds: Option<u64>) -> Result<Duration, Failure> {
    let seconds = seconds.unwrap_or(SHUTDOWN_SECONDS);
    if !(1..=SHUTDOWN_SECONDS_MAX).contains(&seconds) {
        return Err(bad_request(
            format!("a guest is given between 1 and {SHUTDOWN_SECONDS_MAX} seconds to shut down"),
            "choose a limit in this range",
        ));
    }
    Ok(Duration::from_secs(seconds))
}

fn refuse_unready(name: &str, failover: &Failover) -> Result<(), Failure> {
    let help = match failover.phase {
        Phase::Reprotected | Phase::FailingBack | Phase::FailedBack => return Ok(()),
        Phase::Reprotecting => "wait until it is: `tidemark reprotect NAME` follows it",
        Phase::Committed => "reprotect it first: `tidemark reprotect NAME`",
        Phase::Withdrawing => "wait until that is done, then reprotect it again",
        Phase::Landing => "commit it: `tidemark commit NAME`",
        _ => "commit the failover, then reprotect it: `tidemark commit NAME`, `tidemark reprotect NAME`",
    };
    let message = format!("machine {name:?} is not reprotected: it {}", failover.phase.name());
    Err(Failure::new(FailureKind::Conflict, message, help))
}

async fn run(core: &Core, progress: &Progress, name: &str, request: FailbackRequest) -> Result<Value, Failure> {
    progress.step("check what is needed");
    let machine = core.machine(name)?;
    wait_for_agent(core, progress, machine.host).await?;
    let lock = core.lock(name).await;
    let machine = core.machine(name)?;
    let failover = state::find(&machine)?;
    refuse_unready(name, &failover)?;
    if failover.phase == Phase::FailedBack {
        return hand_over(core, progress, &machine, &failover, None).await;
    }
    let method = if request.full_download { Method::Full } else { Method::Delta };
    let before = reprotect::report(core, &machine).await?;
    if failover.phase == Phase::Reprotected {
        refuse_unhealthy(name, &before)?;
    }
    let machine = state::advance(core, name, failover.id, Phase::FailingBack, |_| {})?;
    let limit = shutdown_limit(request.shutdown_limit_seconds)?;
    if request.full_download {
        return complete_run(core, progress, &machine, &failover, method, limit).await;
    }
    let sync = TargetCall::Sync { machine: machine.id, failover: failover.id, method };
    reprotect::call(core, &machine, &sync).await?;
    drop(lock);
    let is_newer = |report: &TargetReport| {
        report.stage == Stage::Finished
            || report.stage == Stage::Consistent && report.consistent_at > before.consistent_at
    };
    let near = follow(core, progress, &machine, "bring the home disks close while it runs", is_newer).await?;
    if request.minimise_downtime {
        progress.step(format!(
            "ready: {} bytes behind; complete it with `tidemark failback complete {name}`",
            near.behind_bytes
        ));
        return Ok(json!({ "machine": name, "ready": true, "behind_bytes": near.behind_bytes,
            "consistent_at": near.consistent_at }));
    }
    let _lock = core.lock(name).await;
    let machine = core.machine(name)?;
    let failover = state::find(&machine)?;
    if failover.phase != Phase::FailingBack {
        let message = format!("machine {name:?} {}", failover.phase.name());
        return Err(Failure::new(FailureKind::Conflict, message, "the failback was cancelled or completed meanwhile"));
    }
    complete_run(core, progress, &machine, &failover, method, limit).await
}

fn refuse_unhealthy(name: &str, report: &TargetReport) -> Result<(), Failure> {
    let Some(problem) = &report.problem else { return Ok(()) };
    let message = format!("the home disks of machine {name:?} do not follow it: {problem}");
    Err(Failure::new(FailureKind::Conflict, message, report.help.clone().unwrap_or_default()))
}

/// Shuts the machine down, brings the last changes, and hands it to its home.
pub fn complete(core: &Arc<Core>, name: &str, request: CompleteRequest) -> Result<Job, Failure> {
    let limit = shutdown_limit(request.shutdown_limit_seconds)?;
    let failover = state::find(&core.machine(name)?)?;
    if !matches!(failover.phase, Phase::FailingBack | Phase::FailedBack) {
        let message = format!("machine {name:?} {}: no failback was begun", failover.phase.name());
        return Err(Failure::new(FailureKind::Conflict, message, "begin one: `tidemark failback NAME`"));
    }
    let (core, name) = (core.clone(), name.to_owned());
    core.jobs.clone().start("failback_complete", Some(&name.clone()), |progress| async move {
        wait_for_agent(&core, &progress, core.machine(&name)?.host).await?;
        let _lock = core.lock(&name).await;
        let machine = core.machine(&name)?;
        let failover = state::find(&machine)?;
        match failover.phase {
            Phase::FailedBack => hand_over(&core, &progress, &machine, &failover, None).await,
            _ => complete_run(&core, &progress, &machine, &failover, Method::Delta, limit).await,
        }
    })
}

async fn complete_run(
    core: &Core,
    progress: &Progress,
    machine: &Machine,
    failover: &Failover,
    method: Method,
    limit: Duration,
) -> Result<Value, Failure> {
    let began = Instant::now();
    progress.step("shut it down where it runs");
    let stop = Call::Stop { failover: failover.id, limit_seconds: limit.as_secs() };
    ask(core, machine, &stop, limit + SETTLE).await?;
    let stopped = began.elapsed();
    let finish = TargetCall::Finish { machine: machine.id, failover: failover.id, method };
    reprotect::call(core, machine, &finish).await?;
    let step = "bring the last changes home";
    follow(core, progress, machine, step, |report| report.stage == Stage::Finished).await?;
    let delta = began.elapsed() - stopped;
    let machine = state::advance(core, &machine.name, failover.id, Phase::FailedBack, |_| {})?;
    hand_over(core, progress, &machine, failover, Some((began, stopped, delta))).await
}

/// It is home: its workload may open its disks.
pub async fn hand_over(
    core: &Core,
    progress: &Progress,
    machine: &Machine,
    failover: &Failover,
    took: Option<(Instant, Duration, Duration)>,
) -> Result<Value, Failure> {
    progress.step("hand it to its home");
    let report = reprotect::report(core, machine).await?;
    reprotect::call(core, machine, &TargetCall::LetGo { machine: machine.id, failover: failover.id }).await?;
    let attached: Vec<AttachedDisk> = settle_agent(core, machine).await?;
    let mut result = protected(machine, &attached);
    if !failover.disks_only || failover.source_stopped {
        result["source"] = source::start_again(core, progress, machine).await;
    }
    if let Some((began, stopped, delta)) = took {
        note(core, &machine.name, "failed back: it is home");
        result["downtime_seconds"] = json!(began.elapsed().as_secs_f64());
        result["stop_seconds"] = json!(stopped.as_secs_f64());
        result["delta_seconds"] = json!(delta.as_secs_f64());
        result["received_bytes"] = json!(report.received_bytes);
        result["compared_bytes"] = json!(report.compared_bytes);
        result["wire_bytes"] = json!(report.wire_bytes);
    }
    result["kept_point"] = json!(failover.home.as_ref().and_then(|home| home.kept));
    Ok(result)
}

/// It goes on where it ran.
pub fn cancel(core: &Arc<Core>, name: &str) -> Result<Job, Failure> {
    let failover = state::find(&core.machine(name)?)?;
    if !matches!(failover.phase, Phase::FailingBack | Phase::FailedBack) {
        let message = format!("machine {name:?} {}: there is no failback to cancel", failover.phase.name());
        return Err(Failure::new(FailureKind::Conflict, message, "see `tidemark failover show NAME`"));
    }
    let (core, name) = (core.clone(), name.to_owned());
    core.jobs.clone().start("failback_cancel", Some(&name.clone()), |progress| async move {
        let lock = core.lock(&name).await;
        let machine = core.machine(&name)?;
        let failover = state::find(&machine)?;
        match failover.phase {
            Phase::FailingBack => stay(&core, &progress, &machine, &failover).await,
            Phase::FailedBack => {
                leave(&core, &progress, &machine, &failover).await?;
                drop(lock);
                let step = "bring what differs home";
                let report = follow(&core, &progress, &machine, step, |report| report.stage == Stage::Consistent);
                let report = report.await?;
                let _lock = core.lock(&name).await;
                reprotect::arrived(&core, &name, failover.id)?;
                Ok(json!({ "machine": name, "state": "reprotected", "received_bytes": report.received_bytes }))
            }
            phase => {
                let message = format!("machine {name:?} {}", phase.name());
                Err(Failure::new(FailureKind::Conflict, message, "see `tidemark failover show NAME`"))
            }
        }
    })
}

/// It never was home.
async fn stay(core: &Core, progress: &Progress, machine: &Machine, failover: &Failover) -> Result<Value, Failure> {
    progress.step("let it go on where it ran");
    let start = Call::Start(Box::new(machine_call(machine, failover, "latest".to_owned())));
    ask(core, machine, &start, SETTLE).await?;
    // An agent that is away goes on with its last round, which does not end without a machine that is off.
    let sync = TargetCall::Sync { machine: machine.id, failover: failover.id, method: Method::Delta };
    let report = reprotect::call(core, machine, &sync).await;
    let is_whole = report.as_ref().is_ok_and(|report| report.stage == Stage::Consistent);
    let phase = if is_whole { Phase::Reprotected } else { Phase::Reprotecting };
    state::advance(core, &machine.name, failover.id, phase, |_| {})?;
    note(core, &machine.name, "goes on where it ran: the failback was cancelled");
    let waiting = report.err().map(|failure| failure.message);
    Ok(
        json!({ "machine": machine.name, "state": if is_whole { "reprotected" } else { "reprotecting" }, "waiting": waiting }),
    )
}

/// It was home, and may have written there.
async fn leave(core: &Core, progress: &Progress, machine: &Machine, failover: &Failover) -> Result<(), Failure> {
    progress.step("keep it from its home disks");
    let name = &machine.name;
    // Home must answer: a machine that is on at both ends has two histories.
    reprotect::report(core, machine).await?;
    let began = core.clock.wall_now();
    let machine = state::advance(core, name, failover.id, Phase::Reprotecting, |failover| {
        let from = failover.home.take().and_then(|home| home.from);
        failover.home = Some(Home { method: Method::Delta, began, keeps: true, kept: None, taken: false, from });
    })?;
    if !failover.disks_only {
        // Its disks are taken from it whatever it does.
        let limit = shutdown_limit(None)?;
        if let Err(failure) = source::shut_down(core, progress, &machine, limit, true).await {
            tracing::warn!(machine = name, %failure, "the machine at home cannot be shut down; its disks are closed");
        }
    }
    settle_agent(core, &machine).await?;
    progress.step("let it go on where it ran");
    let start = Call::Start(Box::new(machine_call(&machine, failover, "latest".to_owned())));
    ask(core, &machine, &start, SETTLE).await?;
    note(core, name, "goes on where it ran: the failback was cancelled");
    bring(core, progress, &machine).await.map(drop)
}

/// Commits a failback: what the machine had elsewhere goes, and replication from home goes on.
pub async fn land(core: &Core, progress: &Progress, machine: &Machine, failover: &Failover) -> Result<Value, Failure> {
    let name = &machine.name;
    state::advance(core, name, failover.id, Phase::Landing, |_| {})?;
    progress.step("delete what it had elsewhere");
    let is_taken = failover.home.as_ref().is_some_and(|home| home.taken);
    let gone = match is_taken {
        true => taken::end(core, machine, failover.id).await,
        false => ask(core, machine, &Call::Return { failover: failover.id }, SETTLE).await.map(drop),
    };
    let waits = match gone {
        Err(failure) if is_taken && matches!(failure.kind, FailureKind::Unavailable | FailureKind::TimedOut) => true,
        other => other.map(|()| false)?,
    };
    let machine = core.store.change(|state| {
        let machine = state.machines.get_mut(name).ok_or_else(vanished)?;
        // The disks that it left are nobody's from now on.
        let left = elsewhere::original(machine).map(|from| from.host);
        machine.left.extend(left);
        machine.failover = None;
        machine.ended.extend(waits.then_some(failover.id));
        Ok(machine.clone())
    })?;
    elsewhere::leave(core, &machine).await;
    progress.step("let replication from home go on");
    let told = settle_source(core, &machine).await;
    note(core, name, "is home: the failback was committed");
    let waiting = told.err().map(|failure| format!("{}; it goes on when it can be told", failure.message));
    Ok(json!({ "machine": name, "home": true, "time": core.clock.wall_now(), "waiting": waiting,
        "kept_point": failover.home.as_ref().and_then(|home| home.kept) }))
}
