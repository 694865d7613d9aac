//! Recovery plans: machines, groups, scripts and manual steps that fail over together, in order. [`state`] has what is stored and the
//! moves of a run, [`run`] does it, [`member`] is one machine of it.

pub mod check;
pub mod member;
pub mod run;
mod script;
pub mod state;

use serde::{Deserialize, Serialize};
use tidemark_base::{Clock, Timestamp};
use tidemark_proto::control::{Failure, FailureKind};
use utoipa::ToSchema;

use crate::core::Core;
use crate::groups;
use crate::model::{State, Wanted};
use crate::names::{Expected, bad_request, check_name};
use state::{Action, Plan, PlanStep, Run, RunState};

const PLANS_MAX: usize = 256;
const STEPS_MAX: usize = 128;
/// Of one step: they fail over side by side.
const MACHINES_MAX: usize = 64;
const TEXT_BYTES_MAX: usize = 1024;
const TIMEOUT_SECONDS_MAX: u64 = 7 * 86_400;
/// Folder of scripts, beneath the configuration server's own.
pub const SCRIPTS: &str = "plan.d";

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreatePlan {
    pub name: String,
    /// In their order.
    pub steps: Vec<PlanStep>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = Plan)]
pub struct ShownPlan {
    pub name: String,
    #[schema(value_type = String, format = "date-time")]
    pub created: Timestamp,
    pub steps: Vec<PlanStep>,
    /// The last one.
    pub run: Option<Run>,
}

pub fn list(core: &Core) -> Vec<ShownPlan> {
    core.store.state().plans.iter().map(|(name, plan)| shown(name, plan)).collect()
}

pub fn get(core: &Core, name: &str) -> Result<ShownPlan, Failure> {
    Ok(shown(name, find(&core.store.state(), name)?))
}

pub fn create(core: &Core, request: &CreatePlan) -> Result<ShownPlan, Failure> {
    let name = &request.name;
    check_name("plan", name)?;
    core.store.change(|state| {
        if state.plans.contains_key(name) {
            return Err(Failure::new(
                FailureKind::Conflict,
                format!("there is a plan {name:?} already"),
                "change it with `tidemark plan set`, or choose another name",
            ));
        }
        if state.plans.len() >= PLANS_MAX {
            return Err(bad_request(format!("there are {PLANS_MAX} plans, which is the limit"), "delete one"));
        }
        check_steps(state, &request.steps)?;
        let plan = Plan { created: core.clock.wall_now(), steps: request.steps.clone(), run: None };
        state.plans.insert(name.clone(), plan);
        Ok(())
    })?;
    get(core, name)
}

/// Other steps, in the place of those it has.
pub fn set(core: &Core, name: &str, steps: Vec<PlanStep>, expected: Expected) -> Result<ShownPlan, Failure> {
    core.store.change(|state| {
        refuse_worked_on(name, find(state, name)?)?;
        expected.check(state, "plans", name)?;
        check_steps(state, &steps)?;
        if let Some(plan) = state.plans.get_mut(name) {
            plan.steps = steps;
        }
        Ok(())
    })?;
    get(core, name)
}

/// Its machines stay as they are.
pub fn delete(core: &Core, name: &str, expected: Expected) -> Result<(), Failure> {
    core.store.change(|state| {
        refuse_worked_on(name, find(state, name)?)?;
        expected.check(state, "plans", name)?;
        state.plans.remove(name);
        Ok(())
    })
}

pub fn find<'a>(state: &'a State, name: &str) -> Result<&'a Plan, Failure> {
    state.plans.get(name).ok_or_else(|| {
        let shown: String = name.chars().take(80).collect();
        Failure::new(
            FailureKind::NotFound,
            format!("there is no plan {shown:?}"),
            "see `tidemark plan list`, or make it with `tidemark plan create`",
        )
    })
}

fn refuse_worked_on(name: &str, plan: &Plan) -> Result<(), Failure> {
    match &plan.run {
        Some(run) if run.state.is_worked_on() => Err(Failure::new(
            FailureKind::Conflict,
            format!("plan {name:?} runs"),
            "wait for it, or take it back: `tidemark plan cancel NAME`",
        )),
        _ => Ok(()),
    }
}

fn check_steps(state: &State, steps: &[PlanStep]) -> Result<(), Failure> {
    if steps.is_empty() || steps.len() > STEPS_MAX {
        return Err(bad_request(
            format!("a plan of {} steps is not possible", steps.len()),
            format!("give 1 to {STEPS_MAX} of them"),
        ));
    }
    let mut seen = std::collections::BTreeSet::new();
    for (index, step) in steps.iter().enumerate() {
        let number = index + 1;
        if !(1..=TIMEOUT_SECONDS_MAX).contains(&step.timeout_seconds) {
            return Err(bad_request(
                format!("step {number} may take between 1 and {TIMEOUT_SECONDS_MAX} seconds"),
                "choose a time in this range",
            ));
        }
        match &step.action {
            Action::Machines(machines) => {
                if machines.is_empty() || machines.len() > MACHINES_MAX {
                    return Err(bad_request(
                        format!("step {number} has {} machines", machines.len()),
                        format!("name 1 to {MACHINES_MAX}, or make another step"),
                    ));
                }
                for machine in machines {
                    let is_there = state
                        .machines
                        .get(machine)
                        .is_some_and(|known| !matches!(known.wanted, Wanted::Unprotected { .. }));
                    if !is_there {
                        let shown: String = machine.chars().take(80).collect();
                        return Err(Failure::new(
                            FailureKind::NotFound,
                            format!("step {number}: there is no machine {shown:?}"),
                            "protect it first; see `tidemark status`",
                        ));
                    }
                    if !seen.insert(machine.clone()) {
                        return Err(bad_request(
                            format!("step {number}: machine {machine:?} is in the plan twice"),
                            "a machine fails over once: name it in one step",
                        ));
                    }
                }
            }
            Action::Group(group) => {
                groups::find(state, group)?;
                for machine in groups::members(state, group) {
                    if !seen.insert(machine.name.clone()) {
                        return Err(bad_request(
                            format!(
                                "step {number}: machine {:?} of group {group:?} is in the plan twice",
                                machine.name
                            ),
                            "a machine fails over once: name it in one step",
                        ));
                    }
                }
            }
            Action::Script(name) => check_name("script", name)?,
            Action::Manual(text) => {
                if text.trim().is_empty() || text.len() > TEXT_BYTES_MAX || text.chars().any(char::is_control) {
                    return Err(bad_request(
                        format!("step {number} does not say what somebody is to do"),
                        format!("write 1 to {TEXT_BYTES_MAX} bytes of printable text"),
                    ));
                }
            }
        }
    }
    if seen.is_empty() {
        return Err(bad_request("the plan has no machines", "add a step of machines, or of a group that has some"));
    }
    Ok(())
}

/// Runs that an earlier process of the server left: nobody works on them any more.
pub fn interrupt(core: &Core) -> Result<(), Failure> {
    core.store.change(|state| {
        for run in state.plans.values_mut().filter_map(|plan| plan.run.as_mut()) {
            if run.state.is_worked_on() {
                run.state = RunState::Interrupted;
                run.stop = false;
                run.let_go("the configuration server stopped while it ran");
            }
        }
        Ok(())
    })
}

fn shown(name: &str, plan: &Plan) -> ShownPlan {
    ShownPlan { name: name.to_owned(), created: plan.created, steps: plan.steps.clone(), run: plan.run.clone() }
}
