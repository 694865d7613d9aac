//! What keeps a plan from being run, found out before anything is begun.

use std::sync::Arc;

use futures_util::future::join_all;
use serde::Serialize;
use serde_json::Value;
use tidemark_proto::control::{Failure, FailureKind};
use utoipa::ToSchema;

use super::member::{self, Asked};
use super::state::{Action, Plan, RunKind};
use super::{SCRIPTS, script};
use crate::core::Core;
use crate::groups;

/// One thing that a run needs.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct PlanCheck {
    /// Counts from 1.
    pub step: usize,
    /// A machine, a script, or what somebody is to do.
    pub what: String,
    pub ok: bool,
    /// What would be lost and where it would run, for machines.
    #[schema(value_type = Object)]
    pub details: Value,
    pub error: Option<String>,
    pub help: Option<String>,
}

impl PlanCheck {
    fn new(step: usize, what: &str, outcome: Result<Value, Failure>) -> Self {
        let (details, failure) = match outcome {
            Ok(details) => (details, None),
            Err(failure) => (Value::Null, Some(failure)),
        };
        Self {
            step,
            what: what.to_owned(),
            ok: failure.is_none(),
            details,
            error: failure.as_ref().map(|failure| failure.message.clone()),
            help: failure.map(|failure| failure.help),
        }
    }
}

/// Looks at every step; nothing is begun.
pub async fn all(core: &Arc<Core>, plan: &Plan, asked: &Asked) -> Vec<PlanCheck> {
    let mut checks = Vec::new();
    for (index, step) in plan.steps.iter().enumerate() {
        let number = index + 1;
        match &step.action {
            Action::Script(name) => {
                let found = script::find(&core.scripts(SCRIPTS), name);
                let details = found.map(|path| Value::String(path.display().to_string()));
                checks.push(PlanCheck::new(number, &step.action.name(), details));
            }
            Action::Manual(_) => {
                let details = match asked.kind {
                    RunKind::Test => "left out of a test",
                    _ => "waits for `tidemark plan confirm`",
                };
                checks.push(PlanCheck::new(number, &step.action.name(), Ok(Value::String(details.to_owned()))));
            }
            Action::Machines(_) | Action::Group(_) => match machines(core, &step.action) {
                Ok(machines) => {
                    let checking = machines.iter().map(|name| async move {
                        PlanCheck::new(number, name, member::check(core, name, asked).await)
                    });
                    checks.extend(join_all(checking).await);
                }
                Err(failure) => checks.push(PlanCheck::new(number, &step.action.name(), Err(failure))),
            },
        }
    }
    checks
}

/// The machines of a step, as they are now.
pub fn machines(core: &Core, action: &Action) -> Result<Vec<String>, Failure> {
    match action {
        Action::Machines(machines) => Ok(machines.clone()),
        Action::Group(group) => {
            let state = core.store.state();
            groups::find(&state, group)?;
            let members: Vec<String> = groups::members(&state, group).into_iter().map(|member| member.name).collect();
            match members.is_empty() {
                false => Ok(members),
                true => Err(Failure::new(
                    FailureKind::Conflict,
                    format!("group {group:?} has no machines"),
                    "add some: `tidemark group add GROUP MACHINE`",
                )),
            }
        }
        Action::Script(_) | Action::Manual(_) => Ok(Vec::new()),
    }
}

/// All that is in the way, in one refusal.
pub fn refuse(plan: &str, checks: &[PlanCheck]) -> Result<(), Failure> {
    let wrong: Vec<&PlanCheck> = checks.iter().filter(|check| !check.ok).collect();
    let Some(first) = wrong.first() else { return Ok(()) };
    let reasons: Vec<String> = wrong
        .iter()
        .map(|check| format!("step {}, {}: {}", check.step, check.what, check.error.as_deref().unwrap_or_default()))
        .collect();
    Err(Failure::new(
        FailureKind::Conflict,
        format!("plan {plan:?} cannot be run, and nothing was begun: {}", reasons.join("; ")),
        first.help.clone().unwrap_or_default(),
    ))
}
