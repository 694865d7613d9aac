//! What is stored of a machine that runs, or is about to run, where its replica is.

use serde::{Deserialize, Serialize};
use tidemark_base::{Generation, MarkId, ServerId, Timestamp};
use tidemark_proto::control::{Failure, FailureKind};
use tidemark_proto::failback::Method;
use uuid::Uuid;

use super::elsewhere::Place;
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
    /// Its machine was on at the source, and was shut down for it: it is started again where the failover is taken back.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub source_stopped: bool,
    /// The way home, once somebody asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub home: Option<Home>,
}

/// How the home disks are brought to the machine's state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Home {
    pub method: Method,
    pub began: Timestamp,
    /// What only home has is still to be sent: nothing is overwritten before.
    #[serde(default)]
    pub keeps: bool,
    /// The point that it became.
    pub kept: Option<MarkId>,
    /// It went on at home without where it ran, which was lost.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub taken: bool,
    /// Where its original disks are, when it goes home to new ones elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Place>,
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
    /// The home disks are brought to its state, which goes on writing.
    Reprotecting,
    /// They follow it.
    Reprotected,
    /// They are given back what they had.
    Withdrawing,
    /// The last changes go home; from a moment on it is off.
    FailingBack,
    /// It is home.
    FailedBack,
    /// What it had elsewhere goes.
    Landing,
}

impl Phase {
    fn may_become(self, next: Phase) -> bool {
        use Phase::{
            Cancelling, ChangingPoint, Committed, Draining, FailedBack, FailedOver, FailingBack, Landing, Reprotected,
            Reprotecting, Starting, Withdrawing,
        };
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
                // Home.
                | (Committed | Reprotecting | FailingBack | FailedBack, Reprotecting)
                | (Reprotecting | FailingBack, Reprotected)
                | (Reprotecting | Reprotected | Withdrawing, Withdrawing)
                | (Withdrawing, Committed)
                | (Reprotected | FailingBack, FailingBack)
                | (FailingBack | FailedBack, FailedBack)
                | (FailedBack | Landing, Landing)
        )
    }

    pub fn name(self) -> &'static str {
        match self {
            Phase::Draining | Phase::Starting => "is failing over",
            Phase::FailedOver => "failed over",
            Phase::ChangingPoint => "goes to another point",
            Phase::Cancelling => "goes back to its source",
            Phase::Committed => "failed over for good",
            Phase::Reprotecting => "is being reprotected",
            Phase::Reprotected => "is reprotected",
            Phase::Withdrawing => "gives its home disks back what they had",
            Phase::FailingBack => "is failing back",
            Phase::FailedBack | Phase::Landing => "failed back, and is not committed",
        }
    }
}

impl Machine {
    /// Whether its source sends nothing.
    pub fn is_source_paused(&self) -> bool {
        let drains = |failover: &Failover| match failover.phase {
            Phase::Draining => true,
            // What only home has is sent before it is overwritten.
            Phase::Reprotecting => failover.home.as_ref().is_some_and(|home| home.keeps),
            _ => false,
        };
        self.wanted == Wanted::Paused || self.failover.as_ref().is_some_and(|failover| !drains(failover))
    }

    /// Whether nobody opens the source's disks.
    pub fn is_source_fenced(&self) -> bool {
        let is_home = |failover: &Failover| matches!(failover.phase, Phase::FailedBack | Phase::Landing);
        self.failover.as_ref().is_some_and(|failover| !is_home(failover))
    }
}

/// Begins a failover to one of its process servers, or goes on with the one that was begun.
pub fn begin(core: &Core, name: &str, server: ServerId, failover: Failover) -> Result<Machine, Failure> {
    core.store.change(|state| {
        let machine = state.machines.get_mut(name).ok_or_else(vanished)?;
        if machine.failover.as_ref().is_none_or(|known| known.id != failover.id) {
            refuse_failed_over(machine)?;
        }
        if failover.phase == Phase::Starting {
            raise(machine);
        }
        machine.failover = Some(failover);
        *machine = machine.clone().about(server);
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
pub fn raise(machine: &mut Machine) {
    machine.disks.iter_mut().for_each(|disk| disk.generation = Generation(disk.generation.0 + 1));
}

pub fn find(machine: &Machine) -> Result<Failover, Failure> {
    machine.failover.clone().ok_or_else(|| none(&machine.name))
}

pub fn none(name: &str) -> Failure {
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
        Phase::Committed => {
            "bring it home (`tidemark reprotect NAME`, then `tidemark failback NAME`), or let it stay: `tidemark migrate NAME`"
        }
        Phase::Reprotecting | Phase::Reprotected => {
            "fail it back first: `tidemark failback NAME`; `tidemark reprotect cancel NAME` takes the reprotect back"
        }
        Phase::Withdrawing => "wait until that is done: `tidemark reprotect cancel NAME`",
        Phase::FailingBack => {
            "complete the failback (`tidemark failback complete NAME`), or cancel it: `tidemark failback cancel NAME`"
        }
        Phase::FailedBack | Phase::Landing => {
            "commit the failback (`tidemark commit NAME`), or cancel it: `tidemark failback cancel NAME`"
        }
        _ => "cancel the failover first: `tidemark failover cancel NAME`, or commit it: `tidemark commit NAME`",
    };
    Err(Failure::new(FailureKind::Conflict, format!("machine {:?} {}", machine.name, failover.phase.name()), help))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_move_that_is_legal_is_written_down() {
        use Phase::{
            Cancelling, ChangingPoint, Committed, Draining, FailedBack, FailedOver, FailingBack, Landing, Reprotected,
            Reprotecting, Starting, Withdrawing,
        };
        let there = [Draining, Starting, FailedOver, ChangingPoint, Cancelling, Committed];
        let home = [Reprotecting, Reprotected, Withdrawing, FailingBack, FailedBack, Landing];
        let all = [there, home].concat();
        let legal = |from: Phase| -> Vec<Phase> { all.iter().copied().filter(|to| from.may_become(*to)).collect() };
        assert_eq!(legal(Draining), [Starting, Cancelling]);
        assert_eq!(legal(Starting), [Starting, FailedOver, Cancelling]);
        assert_eq!(legal(FailedOver), [ChangingPoint, Cancelling, Committed]);
        assert_eq!(legal(ChangingPoint), [FailedOver, ChangingPoint, Cancelling]);
        assert_eq!(legal(Cancelling), [Cancelling], "it ends");
        assert_eq!(legal(Committed), [Committed, Reprotecting], "there is no way back but by replication");
        assert_eq!(legal(Reprotecting), [Reprotecting, Reprotected, Withdrawing]);
        assert_eq!(legal(Reprotected), [Withdrawing, FailingBack]);
        assert_eq!(legal(Withdrawing), [Committed, Withdrawing], "home disks are given back as a whole");
        assert_eq!(legal(FailingBack), [Reprotecting, Reprotected, FailingBack, FailedBack]);
        assert_eq!(legal(FailedBack), [Reprotecting, FailedBack, Landing]);
        assert_eq!(legal(Landing), [Landing], "what it had elsewhere is going");
    }
}
