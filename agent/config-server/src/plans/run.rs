//! Running a plan: step after step, the machines of a step side by side.
//!
//! *Consistency.* One run of a plan at a time. That a step begins, and how it ended, is durable before the next one begins. *Retries.* A run
//! that failed is gone on with from the step that failed; what was done stays done. *Cancellation.* No further step begins, then the
//! machines are taken back, the last first. *Crash.* A run that the server left is interrupted ([`super::interrupt`]): somebody goes on with it
//! or takes it back.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tidemark_base::{Clock, Timestamp};
use tidemark_proto::control::{Failure, FailureKind, Severity};
use utoipa::ToSchema;
use uuid::Uuid;

use super::member::{self, Asked, Outcome};
use super::state::{Action, MemberRun, MemberState, Run, RunKind, RunState, RunStep, StepState};
use super::{SCRIPTS, check, find, refuse_worked_on, script};
use crate::core::Core;
use crate::history::News;
use crate::jobs::{Job, Progress};

/// How often it is looked whether somebody confirmed a manual step.
const LOOK_EVERY: Duration = Duration::from_millis(200);

#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RunRequest {
    /// From points, instead of stopping the sources; where these are gone.
    pub unplanned: bool,
    /// `latest`, `latest-app`, `latest-group` (the newest that all machines of a machine's group have), `lowest-rpo`, or a time; absent:
    /// `lowest-rpo`, and `latest` for a test.
    pub point: Option<String>,
    /// The disks are made ready, and a person attaches them.
    pub disks_only: bool,
    /// Says what would be done and lost, and what is in the way, and does nothing.
    pub dry_run: bool,
}

/// Runs it, or says what that would do.
pub fn start(core: &Arc<Core>, name: &str, request: RunRequest) -> Result<Job, Failure> {
    if !request.unplanned && request.point.is_some() {
        return Err(crate::names::bad_request(
            "a planned run goes to the last change: no point is chosen",
            "leave the point out, or say --unplanned",
        ));
    }
    let kind = if request.unplanned { RunKind::Unplanned } else { RunKind::Planned };
    begin(core, name, kind, request)
}

/// Tests every machine, isolated, and cleans up.
pub fn test(core: &Arc<Core>, name: &str, request: RunRequest) -> Result<Job, Failure> {
    begin(core, name, RunKind::Test, request)
}

fn begin(core: &Arc<Core>, name: &str, kind: RunKind, request: RunRequest) -> Result<Job, Failure> {
    let began = core.clock.wall_now();
    let default = if kind == RunKind::Unplanned { crate::failover::start::LOWEST_RPO } else { "latest" };
    let point = request.point.unwrap_or_else(|| default.to_owned());
    if point != crate::groups::points::LATEST {
        crate::points::selector(&point)?;
    }
    refuse_worked_on(name, find(&core.store.state(), name)?)?;
    let asked = Asked { kind, point, disks_only: request.disks_only };
    let job = match (request.dry_run, kind) {
        (true, _) => "plan_dry_run",
        (false, RunKind::Test) => "plan_test",
        (false, _) => "plan_run",
    };
    let (core, name) = (core.clone(), name.to_owned());
    core.jobs.clone().start_or_check(job, None, request.dry_run, |progress| async move {
        let _lock = core.lock(&lock_name(&name)).await;
        let plan = find(&core.store.state(), &name)?.clone();
        refuse_open(&name, plan.run.as_ref(), request.dry_run)?;
        progress.step("see whether every step can be done");
        let checks = check::all(&core, &plan, &asked).await;
        if request.dry_run {
            check::refuse(&name, &checks)?;
            return Ok(json!({ "plan": name, "kind": kind, "dry_run": true, "steps": checks }));
        }
        check::refuse(&name, &checks)?;
        let run = Run {
            id: Uuid::new_v4(),
            kind,
            point: asked.point.clone(),
            disks_only: asked.disks_only,
            state: RunState::Running,
            began,
            ended: None,
            stop: false,
            steps: plan.steps.iter().map(RunStep::new).collect(),
        };
        core.store.change(|state| {
            let plan = state.plans.get_mut(&name).ok_or_else(|| gone(&name))?;
            plan.run = Some(run);
            Ok(())
        })?;
        steps(&core, &progress, &name).await
    })
}

fn lock_name(name: &str) -> String {
    format!("plan/{name}")
}

fn gone(name: &str) -> Failure {
    Failure::new(FailureKind::NotFound, format!("plan {name:?} was deleted meanwhile"), "see `tidemark plan list`")
}

/// A run that stopped in the middle is not forgotten by beginning another.
fn refuse_open(name: &str, run: Option<&Run>, dry_run: bool) -> Result<(), Failure> {
    let is_open = |run: &Run| matches!(run.state, RunState::Failed | RunState::Interrupted);
    let has_begun = |run: &Run| run.steps.iter().any(|step| step.state != StepState::Pending);
    match run {
        Some(run) if !dry_run && run.kind != RunKind::Test && is_open(run) && has_begun(run) => Err(Failure::new(
            FailureKind::Conflict,
            format!("the last run of plan {name:?} stopped in the middle"),
            "go on with it: `tidemark plan continue NAME`, or take it back: `tidemark plan cancel NAME`",
        )),
        _ => Ok(()),
    }
}

/// Goes on where it stopped: steps that are done stay done.
pub fn go_on(core: &Arc<Core>, name: &str) -> Result<Job, Failure> {
    open_run(core, name)?;
    let (core, name) = (core.clone(), name.to_owned());
    core.jobs.clone().start("plan_continue", None, |progress| async move {
        let _lock = core.lock(&lock_name(&name)).await;
        open_run(&core, &name)?;
        edit(&core, &name, |run| {
            become_(&name, run, RunState::Running)?;
            (run.stop, run.ended) = (false, None);
            Ok(())
        })?;
        steps(&core, &progress, &name).await
    })
}

fn open_run(core: &Core, name: &str) -> Result<Run, Failure> {
    let run = last_run(core, name)?;
    if matches!(run.state, RunState::Failed | RunState::Interrupted) {
        return Ok(run);
    }
    Err(Failure::new(
        FailureKind::Conflict,
        format!("the last run of plan {name:?} did not stop in the middle"),
        "see `tidemark plan show NAME`; begin another with `tidemark plan run NAME`",
    ))
}

pub fn last_run(core: &Core, name: &str) -> Result<Run, Failure> {
    find(&core.store.state(), name)?.run.clone().ok_or_else(|| {
        Failure::new(FailureKind::Conflict, format!("plan {name:?} was never run"), "run it: `tidemark plan run NAME`")
    })
}

fn become_(name: &str, run: &mut Run, next: RunState) -> Result<(), Failure> {
    if !run.state.may_become(next) {
        return Err(Failure::new(
            FailureKind::Conflict,
            format!("the last run of plan {name:?} is not in a state for that"),
            "see `tidemark plan show NAME`",
        ));
    }
    run.state = next;
    Ok(())
}

fn edit<T>(core: &Core, name: &str, change: impl FnOnce(&mut Run) -> Result<T, Failure>) -> Result<T, Failure> {
    core.store.change(|state| {
        let run = state.plans.get_mut(name).and_then(|plan| plan.run.as_mut()).ok_or_else(|| gone(name))?;
        change(run)
    })
}

fn edit_step(core: &Core, name: &str, index: usize, change: impl FnOnce(&mut RunStep)) -> Result<(), Failure> {
    edit(core, name, |run| {
        if let Some(step) = run.steps.get_mut(index) {
            change(step);
        }
        Ok(())
    })
}

/// Every step that is not done yet.
async fn steps(core: &Arc<Core>, progress: &Progress, name: &str) -> Result<Value, Failure> {
    let run = last_run(core, name)?;
    let all = run.steps.len();
    note(core, Severity::Warning, format!("plan {name} runs ({})", run.kind.name()), "see `tidemark plan show NAME`");
    for index in 0..all {
        let run = last_run(core, name)?;
        let step = &run.steps[index];
        if step.is_over() {
            continue;
        }
        if run.stop {
            return stopped(core, name, "it is being taken back");
        }
        progress.step(format!("step {} of {all}: {}", index + 1, step.action.name()));
        edit_step(core, name, index, |step| {
            (step.state, step.began, step.ended) = (StepState::Running, Some(core.clock.wall_now()), None);
            (step.reason, step.confirmed) = (None, false);
        })?;
        let limit = Duration::from_secs(step.timeout_seconds);
        let outcome = match tokio::time::timeout(limit, one(core, name, &run, index, limit)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(late(core, name, index, limit)),
        };
        let ended = core.clock.wall_now();
        match outcome {
            Ok(state) => edit_step(core, name, index, |step| (step.state, step.ended) = (state, Some(ended)))?,
            Err(failure) => {
                edit_step(core, name, index, |step| {
                    step.ended = Some(ended);
                    step.reason = Some(failure.message.clone());
                })?;
                let what = step.action.name();
                let message =
                    format!("plan {name:?} stopped at step {} of {all} ({what}): {}", index + 1, failure.message);
                return stopped(core, name, &message).map_err(|stopped| Failure { kind: failure.kind, ..stopped });
            }
        }
    }
    edit(core, name, |run| {
        become_(name, run, RunState::Succeeded)?;
        run.ended = Some(core.clock.wall_now());
        Ok(())
    })?;
    note(core, Severity::Info, format!("plan {name} was run to its end ({})", run.kind.name()), "");
    Ok(report(name, &last_run(core, name)?))
}

/// Leaves the run where it can be gone on with or taken back.
fn stopped(core: &Core, name: &str, message: &str) -> Result<Value, Failure> {
    edit(core, name, |run| {
        become_(name, run, RunState::Failed)?;
        run.ended = Some(core.clock.wall_now());
        run.let_go(message);
        Ok(())
    })?;
    let help = "mend it and go on: `tidemark plan continue NAME`; or take everything back: `tidemark plan cancel NAME`";
    note(core, Severity::Critical, message.to_owned(), help);
    Err(Failure::new(FailureKind::Failed, message, help))
}

fn late(core: &Core, name: &str, index: usize, limit: Duration) -> Failure {
    let step = last_run(core, name).ok().and_then(|run| run.steps.get(index).cloned());
    let left: Vec<String> = step
        .iter()
        .flat_map(|step| &step.machines)
        .filter(|member| member.state == MemberState::Running)
        .map(|member| member.machine.clone())
        .collect();
    let whom = if left.is_empty() { String::new() } else { format!(": {}", left.join(", ")) };
    Failure::new(FailureKind::TimedOut, format!("it was not done within {} s{whom}", limit.as_secs_f64()), "")
}

async fn one(core: &Arc<Core>, name: &str, run: &Run, index: usize, limit: Duration) -> Result<StepState, Failure> {
    let step = &run.steps[index];
    match &step.action {
        Action::Machines(_) | Action::Group(_) => {
            machines(core, name, run, index).await?;
            Ok(StepState::Done)
        }
        Action::Script(script) => {
            let path = script::find(&core.scripts(SCRIPTS), script)?;
            let done: Vec<&str> = run
                .machines()
                .filter(|(_, member)| member.state == MemberState::Done)
                .map(|(_, member)| member.machine.as_str())
                .collect();
            let environment = [
                ("TIDEMARK_PLAN", name.to_owned()),
                ("TIDEMARK_RUN", run.kind.name().to_owned()),
                ("TIDEMARK_STEP", (index + 1).to_string()),
                ("TIDEMARK_MACHINES", done.join(" ")),
            ];
            let said = script::run(&path, &environment, limit).await?;
            edit_step(core, name, index, |step| step.output = Some(said))?;
            Ok(StepState::Done)
        }
        Action::Manual(_) if run.kind == RunKind::Test => Ok(StepState::Skipped),
        Action::Manual(text) => {
            edit_step(core, name, index, |step| step.state = StepState::Waiting)?;
            let help = format!("do it, then: `tidemark plan confirm {name}`");
            note(core, Severity::Warning, format!("plan {name} waits for somebody: {text}"), &help);
            loop {
                let run = last_run(core, name)?;
                if run.stop {
                    return Err(Failure::new(FailureKind::Conflict, "it is being taken back", ""));
                }
                if run.steps[index].confirmed {
                    return Ok(StepState::Done);
                }
                if tokio::time::timeout(LOOK_EVERY, core.stop.cancelled()).await.is_ok() {
                    return Err(Failure::new(FailureKind::Unavailable, "the configuration server stops", ""));
                }
            }
        }
    }
}

/// The machines of a step, side by side.
async fn machines(core: &Arc<Core>, name: &str, run: &Run, index: usize) -> Result<(), Failure> {
    let machines = check::machines(core, &run.steps[index].action)?;
    edit_step(core, name, index, |step| {
        for machine in &machines {
            if !step.machines.iter().any(|member| member.machine == *machine) {
                step.machines.push(MemberRun::new(machine));
            }
        }
    })?;
    let asked = Asked { kind: run.kind, point: run.point.clone(), disks_only: run.disks_only };
    let is_done = |machine: &str| {
        let member = run.steps[index].machines.iter().find(|member| member.machine == machine);
        member.is_some_and(|member| member.state == MemberState::Done)
    };
    let going = machines.iter().filter(|machine| !is_done(machine)).map(|machine| {
        let (asked, before) =
            (asked.clone(), run.steps[index].machines.iter().find(|member| member.machine == *machine));
        one_machine(core, name, run.began, index, machine, asked, before.and_then(|member| member.job))
    });
    let failed: Vec<String> = join_all(going)
        .await
        .into_iter()
        .filter_map(Result::err)
        .map(|(machine, failure)| format!("machine {machine:?}: {}", failure.message))
        .collect();
    match failed.is_empty() {
        true => Ok(()),
        false => Err(Failure::new(FailureKind::Failed, failed.join("; "), "")),
    }
}

async fn one_machine(
    core: &Arc<Core>,
    name: &str,
    run_began: Timestamp,
    index: usize,
    machine: &str,
    asked: Asked,
    before: Option<Uuid>,
) -> Result<(), (String, Failure)> {
    let change = |change: &dyn Fn(&mut MemberRun)| {
        edit_step(core, name, index, |step| {
            if let Some(member) = step.machines.iter_mut().find(|member| member.machine == machine) {
                change(member);
            }
        })
    };
    let named = |failure: Failure| (machine.to_owned(), failure);
    change(&|member| (member.state, member.reason) = (MemberState::Running, None)).map_err(named)?;
    // A failover of an earlier try that goes on by itself is waited for, whatever comes of it.
    if let Some(job) = before {
        let _ = member::finish(core, job).await;
    }
    let offset = core.clock.wall_now().saturating_since(run_began).as_secs_f64();
    let began = |job: Uuid| drop(change(&|member| member.job = Some(job)));
    let outcome = member::go(core, machine, &asked, began).await;
    let noted = match &outcome {
        Ok(Outcome { point, time, lost_seconds, lost_bytes, own_seconds }) => change(&|member| {
            member.state = MemberState::Done;
            (member.point, member.time) = (point.clone(), time.clone());
            (member.lost_seconds, member.lost_bytes) = (*lost_seconds, *lost_bytes);
            member.own_seconds = *own_seconds;
            member.rto_seconds = own_seconds.map(|own| offset + own).or(member.rto_seconds);
        }),
        Err(failure) => change(&|member| {
            (member.state, member.reason) = (MemberState::Failed, Some(failure.message.clone()));
        }),
    };
    outcome.map_err(named)?;
    noted.map_err(named)
}

/// Somebody did what a manual step says.
pub fn confirm(core: &Core, name: &str) -> Result<Run, Failure> {
    find(&core.store.state(), name)?;
    edit(core, name, |run| {
        let waiting = run.steps.iter_mut().find(|step| step.state == StepState::Waiting);
        let step = waiting.ok_or_else(|| {
            Failure::new(
                FailureKind::Conflict,
                format!("plan {name:?} waits for nobody"),
                "see `tidemark plan show NAME`",
            )
        })?;
        step.confirmed = true;
        Ok(run.clone())
    })
}

/// Takes everything back: no further step begins, and the machines go on at their sources, the last first.
pub fn cancel(core: &Arc<Core>, name: &str) -> Result<Job, Failure> {
    let run = last_run(core, name)?;
    if run.state == RunState::Cancelled {
        return Err(Failure::new(
            FailureKind::Conflict,
            format!("the last run of plan {name:?} was taken back already"),
            "see `tidemark plan show NAME`",
        ));
    }
    if run.state.is_worked_on() {
        edit(core, name, |run| {
            run.stop = true;
            Ok(())
        })?;
    }
    let (core, name) = (core.clone(), name.to_owned());
    core.jobs.clone().start("plan_cancel", None, |progress| async move {
        progress.step("wait for the step that runs");
        let _lock = core.lock(&lock_name(&name)).await;
        let run = edit(&core, &name, |run| {
            become_(&name, run, RunState::Cancelling)?;
            Ok(run.clone())
        })?;
        let mut failed = Vec::new();
        let mut undone = Vec::new();
        for (step, member) in run.machines().rev() {
            if matches!(member.state, MemberState::Pending | MemberState::Undone) {
                continue;
            }
            progress.step(format!("take machine {} back", member.machine));
            // What it began may still be under way.
            if let Some(job) = member.job {
                let _ = member::finish(&core, job).await;
            }
            match member::undo(&core, &member.machine, run.kind).await {
                Ok(()) => {
                    undone.push(member.machine.clone());
                    edit_step(&core, &name, step - 1, |step| {
                        step.state = StepState::Pending;
                        for known in step.machines.iter_mut().filter(|known| known.machine == member.machine) {
                            (known.state, known.job) = (MemberState::Undone, None);
                        }
                    })?;
                }
                Err(failure) if failure.kind == FailureKind::NotFound => {}
                Err(failure) => failed.push(format!("machine {:?}: {}", member.machine, failure.message)),
            }
        }
        let next = if failed.is_empty() { RunState::Cancelled } else { RunState::Failed };
        edit(&core, &name, |run| {
            become_(&name, run, next)?;
            run.stop = false;
            run.ended = Some(core.clock.wall_now());
            Ok(())
        })?;
        if failed.is_empty() {
            note(&core, Severity::Warning, format!("plan {name} was taken back"), "");
            return Ok(json!({ "plan": name, "undone": undone }));
        }
        Err(Failure::new(
            FailureKind::Failed,
            format!("plan {name:?} could not be taken back whole: {}", failed.join("; ")),
            "see each machine with `tidemark failover show NAME`, then cancel the plan again",
        ))
    })
}

/// Accepts the points that all machines failed over to.
pub fn commit(core: &Arc<Core>, name: &str) -> Result<Job, Failure> {
    let refuse = |run: &Run| match run.state == RunState::Succeeded && run.kind != RunKind::Test {
        true => Ok(()),
        false => Err(Failure::new(
            FailureKind::Conflict,
            format!("plan {name:?} has not failed over to its end"),
            "see `tidemark plan show NAME`",
        )),
    };
    refuse(&last_run(core, name)?)?;
    let (core, name) = (core.clone(), name.to_owned());
    core.jobs.clone().start("plan_commit", None, |progress| async move {
        let _lock = core.lock(&lock_name(&name)).await;
        let run = last_run(&core, &name)?;
        let mut committed = Vec::new();
        for (_, member) in run.machines() {
            progress.step(format!("commit machine {}", member.machine));
            member::commit(&core, &member.machine).await?;
            committed.push(member.machine.clone());
        }
        Ok(json!({ "plan": name, "committed": committed }))
    })
}

fn note(core: &Core, severity: Severity, message: String, help: &str) {
    core.history.note(News { severity, kind: "plan", machine: None, message, help: help.to_owned() });
}

/// How it went: each machine with its RTO, each step with its time.
pub fn report(name: &str, run: &Run) -> Value {
    let seconds =
        |began: Option<Timestamp>, ended: Option<Timestamp>| Some(ended?.saturating_since(began?).as_secs_f64());
    let machines: Vec<Value> = run
        .machines()
        .map(|(step, member)| {
            let mut shown = serde_json::to_value(member).unwrap_or_default();
            shown["step"] = json!(step);
            shown
        })
        .collect();
    let steps: Vec<Value> = run
        .steps
        .iter()
        .enumerate()
        .map(|(index, step)| {
            json!({ "step": index + 1, "action": step.action.name(), "state": step.state,
                "seconds": seconds(step.began, step.ended), "reason": step.reason, "output": step.output })
        })
        .collect();
    json!({ "plan": name, "run": run.id, "kind": run.kind, "state": run.state, "point": run.point, "began": run.began,
        "ended": run.ended, "seconds": seconds(Some(run.began), run.ended), "machines": machines, "steps": steps })
}
