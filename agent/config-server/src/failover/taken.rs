//! Home without where it ran: the process server that a reprotected machine runs at is lost, and home goes on with what it has.
//!
//! 1. the process server is away, and the home disks show the machine at one instant
//! 2. they stay at that instant, durably
//! 3. stored: it is home; then its workload may open its disks
//! 4. when the process server is back, the machine that may still run there is turned off
//! 5. (commit) what it had there goes, also later
//!
//! *Consistency.* Home shows one instant, and never two. While the process server is away nobody can tell whether the machine still runs
//! there: whoever asks for this says that it does not matter, and 4 ends it. *Retries.* Each step may be repeated. *Cancellation.* Until the
//! commit, when the process server is back: as that of any failback. *Crash.* Asking again goes on where it was left.

use serde_json::{Value, json};
use tidemark_base::Clock;
use tidemark_hypervisor::call::Call;
use tidemark_proto::control::{Failure, FailureKind};
use tidemark_proto::failback::{Stage, TargetCall};
use uuid::Uuid;

use super::ask;
use super::failback::hand_over;
use super::reprotect::{self, follow, wait_for_agent};
use super::start::note;
use super::state::{self, Phase};
use crate::core::{Core, SETTLE};
use crate::hub::PeerId;
use crate::jobs::Progress;
use crate::model::Machine;

/// A machine that nobody knows to be needed gets no time to shut down.
const AT_ONCE_SECONDS: u64 = 1;

pub async fn run(core: &Core, progress: &Progress, name: &str) -> Result<Value, Failure> {
    progress.step("check what is needed");
    wait_for_agent(core, progress, core.machine(name)?.host).await?;
    let _lock = core.lock(name).await;
    let machine = core.machine(name)?;
    let failover = state::find(&machine)?;
    let is_taken = failover.home.as_ref().is_some_and(|home| home.taken);
    if failover.phase == Phase::FailedBack && is_taken {
        return hand_over(core, progress, &machine, &failover, None).await;
    }
    if !matches!(failover.phase, Phase::Reprotected | Phase::FailingBack) {
        let message =
            format!("machine {name:?} {}: its home cannot go on without where it runs", failover.phase.name());
        let help =
            "only the home disks of a reprotected machine show it at one instant; see `tidemark failover show NAME`";
        return Err(Failure::new(FailureKind::Conflict, message, help));
    }
    if core.hub.is_connected(PeerId::ProcessServer(machine.server)) {
        let server = core.store.state().server_name(machine.server);
        return Err(Failure::new(
            FailureKind::Conflict,
            format!("process server {server}, where machine {name:?} runs, is there: nothing need be lost"),
            "fail it back: `tidemark failback NAME`; stop that process server first where it cannot",
        ));
    }
    progress.step("leave the home disks as they are");
    reprotect::call(core, &machine, &TargetCall::TakeOver { machine: machine.id, failover: failover.id }).await?;
    let machine = state::advance(core, name, failover.id, Phase::FailingBack, |_| {})?;
    let step = "finish the round that is whole";
    let report = follow(core, progress, &machine, step, |report| report.stage == Stage::Finished).await?;
    let now = core.clock.wall_now();
    let lost = report.consistent_at.map(|at| now.saturating_since(at).as_secs_f64());
    let machine = state::advance(core, name, failover.id, Phase::FailedBack, |failover| {
        if let Some(home) = &mut failover.home {
            home.taken = true;
        }
    })?;
    let at = report.consistent_at.map_or_else(|| "an instant".to_owned(), |at| at.to_string());
    note(core, name, &format!("goes on at home as it was at {at}: where it ran is lost"));
    let mut result = hand_over(core, progress, &machine, &failover, None).await?;
    result["consistent_at"] = json!(report.consistent_at);
    result["lost_seconds"] = json!(lost);
    Ok(result)
}

/// A process server that comes back turns off what went on elsewhere meanwhile.
pub async fn settle(core: &Core, machine: &Machine) -> Result<(), Failure> {
    for id in &machine.ended {
        end(core, machine, *id).await?;
        core.store.change(|state| {
            if let Some(machine) = state.machines.get_mut(&machine.name) {
                machine.ended.retain(|ended| ended != id);
            }
            Ok(())
        })?;
    }
    match &machine.failover {
        Some(failover) if failover.home.as_ref().is_some_and(|home| home.taken) => {
            stop(core, machine, failover.id).await
        }
        _ => Ok(()),
    }
}

async fn stop(core: &Core, machine: &Machine, id: Uuid) -> Result<(), Failure> {
    let stop = Call::Stop { failover: id, limit_seconds: AT_ONCE_SECONDS };
    match ask(core, machine, &stop, 2 * SETTLE).await {
        // It lost more than its connection.
        Err(failure) if failure.kind != FailureKind::NotFound => Err(failure),
        _ => Ok(()),
    }
}

/// What it had there goes.
pub async fn end(core: &Core, machine: &Machine, id: Uuid) -> Result<(), Failure> {
    stop(core, machine, id).await?;
    ask(core, machine, &Call::Return { failover: id }, SETTLE).await.map(drop)
}
