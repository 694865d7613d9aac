//! What is stored of a plan, and of its last run.
//!
//! ```text
//!            run, test              every step done
//! (none) ──────────────→ running ───────────────────→ succeeded
//!                        │  ↑ │ a step failed, or timed out
//!       the server stopped  │ └─────────→ failed ─────┐ cancel
//!                        ↓  └── continue ──┘          ├──────────→ cancelling → cancelled
//!                   interrupted ──────────────────────┘                 └ (what could not be undone: failed)
//! ```

use serde::{Deserialize, Serialize};
use tidemark_base::Timestamp;
use utoipa::ToSchema;
use uuid::Uuid;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    pub created: Timestamp,
    pub steps: Vec<PlanStep>,
    /// The last one; a run that did not end is gone on with or taken back.
    #[serde(default)]
    pub run: Option<Run>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PlanStep {
    pub action: Action,
    /// The step fails when it takes longer.
    #[serde(default = "step_timeout")]
    pub timeout_seconds: u64,
}

pub fn step_timeout() -> u64 {
    1800
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// These fail over side by side.
    Machines(Vec<String>),
    /// The machines that the group has when the step begins.
    Group(String),
    /// A script that an administrator of the configuration server installed there.
    Script(String),
    /// Somebody does this, and says so: `tidemark plan confirm`.
    Manual(String),
}

impl Action {
    pub fn name(&self) -> String {
        match self {
            Action::Machines(machines) => format!("machines {}", machines.join(", ")),
            Action::Group(group) => format!("group {group}"),
            Action::Script(script) => format!("script {script}"),
            Action::Manual(text) => format!("manual: {text}"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RunKind {
    /// Sources are stopped, their last changes sent, nothing is lost.
    Planned,
    /// From a point of each machine.
    Unplanned,
    /// Beside the machines, isolated, and cleaned up.
    Test,
}

impl RunKind {
    pub fn name(self) -> &'static str {
        match self {
            RunKind::Planned => "planned",
            RunKind::Unplanned => "unplanned",
            RunKind::Test => "test",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    Running,
    /// A step failed: it can be gone on with, or taken back.
    Failed,
    /// The configuration server stopped meanwhile: as failed.
    Interrupted,
    Cancelling,
    Cancelled,
    Succeeded,
}

impl RunState {
    /// Whether a job of this process works on it, or one did when it stopped.
    pub fn is_worked_on(self) -> bool {
        matches!(self, RunState::Running | RunState::Cancelling)
    }

    pub fn may_become(self, next: RunState) -> bool {
        use RunState::{Cancelled, Cancelling, Failed, Interrupted, Running, Succeeded};
        matches!(
            (self, next),
            (Running, Failed | Interrupted | Succeeded)
                | (Failed | Interrupted, Running | Cancelling)
                | (Succeeded, Cancelling)
                | (Cancelling, Cancelled | Failed | Interrupted)
        )
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Run {
    pub id: Uuid,
    pub kind: RunKind,
    /// As it was asked for.
    pub point: String,
    pub disks_only: bool,
    pub state: RunState,
    #[schema(value_type = String, format = "date-time")]
    pub began: Timestamp,
    #[schema(value_type = Option<String>, format = "date-time")]
    pub ended: Option<Timestamp>,
    /// Somebody wants it back: no further step begins.
    #[serde(default)]
    pub stop: bool,
    pub steps: Vec<RunStep>,
}

impl Run {
    /// What was under way is under way no more; it can be begun again.
    pub fn let_go(&mut self, reason: &str) {
        for step in self.steps.iter_mut().filter(|step| matches!(step.state, StepState::Running | StepState::Waiting)) {
            step.state = StepState::Failed;
            step.reason.get_or_insert_with(|| reason.to_owned());
            for member in step.machines.iter_mut().filter(|member| member.state == MemberState::Running) {
                member.state = MemberState::Failed;
                member.reason.get_or_insert_with(|| reason.to_owned());
            }
        }
    }

    /// Its machines, with the number of their step.
    pub fn machines(&self) -> impl DoubleEndedIterator<Item = (usize, &MemberRun)> {
        self.steps
            .iter()
            .enumerate()
            .flat_map(|(index, step)| step.machines.iter().map(move |member| (index + 1, member)))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StepState {
    Pending,
    Running,
    /// For a person.
    Waiting,
    Done,
    Failed,
    /// A test waits for nobody.
    Skipped,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RunStep {
    pub action: Action,
    pub timeout_seconds: u64,
    pub state: StepState,
    #[schema(value_type = Option<String>, format = "date-time")]
    pub began: Option<Timestamp>,
    #[schema(value_type = Option<String>, format = "date-time")]
    pub ended: Option<Timestamp>,
    /// Why it failed.
    pub reason: Option<String>,
    /// The end of what a script said.
    #[serde(default)]
    pub output: Option<String>,
    /// Somebody said that it is done.
    #[serde(default)]
    pub confirmed: bool,
    pub machines: Vec<MemberRun>,
}

impl RunStep {
    pub fn new(step: &PlanStep) -> Self {
        Self {
            action: step.action.clone(),
            timeout_seconds: step.timeout_seconds,
            state: StepState::Pending,
            began: None,
            ended: None,
            reason: None,
            output: None,
            confirmed: false,
            machines: Vec::new(),
        }
    }

    pub fn is_over(&self) -> bool {
        matches!(self.state, StepState::Done | StepState::Skipped)
    }
}

/// One machine in a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MemberRun {
    pub machine: String,
    pub state: MemberState,
    /// Its failover, or test failover.
    pub job: Option<Uuid>,
    pub point: Option<String>,
    pub time: Option<String>,
    pub lost_seconds: Option<f64>,
    pub lost_bytes: Option<u64>,
    /// From when the run was asked for to its first instruction, or to its disks being ready where nothing starts it.
    pub rto_seconds: Option<f64>,
    /// What of that it took itself.
    pub own_seconds: Option<f64>,
    pub reason: Option<String>,
}

impl MemberRun {
    pub fn new(machine: &str) -> Self {
        Self {
            machine: machine.to_owned(),
            state: MemberState::Pending,
            job: None,
            point: None,
            time: None,
            lost_seconds: None,
            lost_bytes: None,
            rto_seconds: None,
            own_seconds: None,
            reason: None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MemberState {
    Pending,
    Running,
    Done,
    Failed,
    /// Its failover was taken back.
    Undone,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_move_of_a_run_is_written_down() {
        use RunState::{Cancelled, Cancelling, Failed, Interrupted, Running, Succeeded};
        let all = [Running, Failed, Interrupted, Cancelling, Cancelled, Succeeded];
        let legal = |from: RunState| -> Vec<RunState> { all.into_iter().filter(|to| from.may_become(*to)).collect() };
        assert_eq!(legal(Running), [Failed, Interrupted, Succeeded]);
        assert_eq!(legal(Failed), [Running, Cancelling]);
        assert_eq!(legal(Interrupted), [Running, Cancelling]);
        assert_eq!(legal(Cancelling), [Failed, Interrupted, Cancelled]);
        assert_eq!(legal(Succeeded), [Cancelling]);
        assert_eq!(legal(Cancelled), [], "another run begins");
    }
}
