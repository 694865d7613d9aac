//! What is stored of a machine that runs, or is about to run, where its replica is.

use serde::{Deserialize, Serialize};
use tidemark_base::{Generation, MarkId, Timestamp};
use tidemark_proto::control::{Failure, FailureKind};
use uuid::Uuid;

use crate::core::Core;
use crate::machines::vanished;
use crate::model::{Machine, Wanted};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Failover {
    /// The machine's id at the hypervisor.
    pub id: Uuid,
    pub kind: Kind,
    pub phase: Phase,
    /// Nobody but a person starts the machine.
    pub disks_only: bool,
    pub began: Timestamp,
    /// Where it runs from; none until it does.
    pub point: Option<MarkId>,
    pub time: Option<Timestamp>,
    pub lost: Option<Loss>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The source is stopped, its last changes are sent, nothing is lost.
    Planned,
    /// From a chosen point.
    Unplanned,
}

/// What a failover costs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Loss {
    /// From the point to the newest that is known of the source.
    pub seconds: f64,
    /// What is known to have been written after the point, at most.
    pub bytes: u64,
    /// When the source was last heard of; what it wrote after that is not known. None: it is heard.
    pub source_last_seen: Option<Timestamp>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The workload is kept from its disks, and what is left is sent.
    Draining,
    /// Nothing of the source is taken any more, its machine is made here.
    Starting,
    FailedOver,
    ChangingPoint,
    Cancelling,
    /// The point was accepted.
    Committed,
}

impl Phase {
    fn may_become(self, next: Phase) -> bool {
        use Phase::{Cancelling, ChangingPoint, Committed, Draining, FailedOver, Starting};
        matches!(
            (self, next),
            (Draining, Starting)
                | (Starting, FailedOver)
                | (FailedOver, ChangingPoint | Committed)
                | (ChangingPoint, FailedOver)
                | (Draining | Starting | FailedOver | ChangingPoint | Cancelling, Cancelling)
                // Asked for again after a crash.
                | (Starting, Starting)
                | (ChangingPoint, ChangingPoint)
                | (Committed, Committed)
        )
    }

    pub fn name(self) -> &'static str {
        match self {
            Phase::Draining | Phase::Starting => "is failing over",
            Phase::FailedOver => "failed over",
            Phase::ChangingPoint => "goes to another point",
            Phase::Cancelling => "goes back to its source",
            Phase::Committed => "failed over for good",
        }
    }
}

impl Machine {
    /// Whether its source sends nothing.
    pub fn is_source_paused(&self) -> bool {
        let drains = |failover: &Failover| failover.phase == Phase::Draining;
        self.wanted == Wanted::Paused || self.failover.as_ref().is_some_and(|failover| !drains(failover))
    }

    /// Whether nobody opens the source's disks.
    pub fn is_source_fenced(&self) -> bool {
        self.failover.is_some()
    }
}

/// Begins a failover, or goes on with the one that was begun.
pub fn begin(core: &Core, name: &str, failover: Failover) -> Result<Machine, Failure> {
    core.store.change(|state| {
        let machine = state.machines.get_mut(name).ok_or_else(vanished)?;
        if machine.failover.as_ref().is_none_or(|known| known.id != failover.id) {
            refuse_failed_over(machine)?;
        }
        if failover.phase == Phase::Starting {
            raise(machine);
        }
        machine.failover = Some(failover);
        Ok(machine.clone())
    })
}

/// Makes one move of a failover; nothing when it is not where the caller believes.
pub fn advance(
    core: &Core,
    name: &str,
    id: Uuid,
    next: Phase,
    edit: impl FnOnce(&mut Failover),
) -> Result<Machine, Failure> {
    core.store.change(|state| {
        let machine = state.machines.get_mut(name).ok_or_else(vanished)?;
        let failover = machine.failover.as_mut().filter(|failover| failover.id == id).ok_or_else(|| none(name))?;
        if !failover.phase.may_become(next) {
            return Err(Failure::new(
                FailureKind::Conflict,
                format!("machine {name:?} {}", failover.phase.name()),
                "see `tidemark failover show NAME`",
            ));
        }
        let is_first_start = next == Phase::Starting && failover.phase == Phase::Draining;
        failover.phase = next;
        edit(failover);
        if is_first_start {
            raise(machine);
        }
        Ok(machine.clone())
    })
}

/// The source goes on with its disks, and a new generation where one was given out.
pub fn end(core: &Core, name: &str, id: Uuid) -> Result<Machine, Failure> {
    core.store.change(|state| {
        let machine = state.machines.get_mut(name).ok_or_else(vanished)?;
        if machine.failover.as_ref().is_some_and(|failover| failover.id == id) {
            machine.failover = None;
        }
        Ok(machine.clone())
    })
}

/// What the source sealed with its generation is refused from now on, wherever it is.
fn raise(machine: &mut Machine) {
    machine.disks.iter_mut().for_each(|disk| disk.generation = Generation(disk.generation.0 + 1));
}

pub fn find(machine: &Machine) -> Result<Failover, Failure> {
    machine.failover.clone().ok_or_else(|| none(&machine.name))
}

fn none(name: &str) -> Failure {
    Failure::new(
        FailureKind::Conflict,
        format!("machine {name:?} has not failed over"),
        "begin one: `tidemark failover planned NAME`, or `tidemark failover unplanned NAME`",
    )
}

/// What needs a source that runs.
pub fn refuse_failed_over(machine: &Machine) -> Result<(), Failure> {
    let Some(failover) = &machine.failover else { return Ok(()) };
    let help = match failover.phase {
        Phase::Committed => "see `tidemark failover show NAME`; `tidemark migrate NAME` completes the migration",
        _ => "cancel the failover first: `tidemark failover cancel NAME`, or commit it: `tidemark commit NAME`",
    };
    Err(Failure::new(FailureKind::Conflict, format!("machine {:?} {}", machine.name, failover.phase.name()), help))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_move_that_is_legal_is_written_down() {
        use Phase::{Cancelling, ChangingPoint, Committed, Draining, FailedOver, Starting};
        let all = [Draining, Starting, FailedOver, ChangingPoint, Cancelling, Committed];
        let legal = |from: Phase| -> Vec<Phase> { all.into_iter().filter(|to| from.may_become(*to)).collect() };
        assert_eq!(legal(Draining), [Starting, Cancelling]);
        assert_eq!(legal(Starting), [Starting, FailedOver, Cancelling]);
        assert_eq!(legal(FailedOver), [ChangingPoint, Cancelling, Committed]);
        assert_eq!(legal(ChangingPoint), [FailedOver, ChangingPoint, Cancelling]);
        assert_eq!(legal(Cancelling), [Cancelling], "it ends");
        assert_eq!(legal(Committed), [Committed], "there is no way back but by replication");
    }
}
