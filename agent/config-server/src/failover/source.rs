//! The machine where it was protected: whoever runs it there, as its host's administrator wrote down, is asked to shut it down
//! before its disks are closed, and to start it when they are its own again.
//!
//! Where writes pass by the agent (`--via bpf`, `qemu`) it must be known who runs it: he says that it is off, and the agent finds nobody who has the disks
//! open, keeps everybody from them, and reads what changed last. Where neither can be had, nothing is begun.
//!
//! *Consistency.* A guest that shut down by itself has written everything; the disks are closed after that whatever it does.
//! *Retries.* None. *Cancellation.* Before anything else is begun: what was asked may still shut down. *Crash.* As cancellation: it is off, and
//! protected.

use std::time::Duration;

use serde_json::{Value, json};
use tidemark_hypervisor::call::{Asked, OwnerAnswer, OwnerCall, decode, encode};
use tidemark_hypervisor::hypervisor::{Power, Stopped};
use tidemark_proto::control::{AgentCommand, Failure, FailureKind, Reply, Via};

use super::not_understood;
use super::start::note;
use crate::core::{Core, QUICK, SETTLE};
use crate::hub::{PeerId, unexpected};
use crate::jobs::Progress;
use crate::machines::{settle_agent, settle_server};
use crate::model::Machine;

pub async fn ask(core: &Core, machine: &Machine, what: Asked, limit: Duration) -> Result<OwnerAnswer, Failure> {
    let call = OwnerCall { machine: machine.id, name: machine.name.clone(), what };
    match core.agent(machine.host, &AgentCommand::Owner(encode(&call)), limit).await? {
        Reply::Owner(answer) => decode(&answer).map_err(not_understood),
        other => Err(unexpected(PeerId::Agent(machine.host), &other)),
    }
}

/// Others write to its disks, and the agent is told which blocks changed.
pub fn is_tracked(machine: &Machine) -> bool {
    matches!(machine.via, Via::Bpf | Via::Qemu)
}

/// Why nobody can be kept from the disks of a machine that is off.
pub fn refuse_unkept(machine: &Machine) -> Result<(), Failure> {
    let reason = match machine.via {
        Via::Nbd | Via::Fuse | Via::Bpf | Via::Qemu => return Ok(()),
        Via::Hrl => {
            "its last changes are in a log that its Hyper-V host alone closes, and that host can start it at any time"
        }
        Via::Rct => "its last changes are with Hyper-V, which can start it at any time",
        Via::Vsphere => "its last changes are with VMware, which can start it at any time",
    };
    let via = machine.via.name();
    Err(Failure::new(
        FailureKind::Conflict,
        format!(
            "machine {:?} writes to its disks past its agent (--via {via}), and nobody can be kept from them: {reason}. That nothing is lost cannot be proven",
            machine.name
        ),
        "stop what it does, shut it down, make a last point (`tidemark point create NAME`), then: `tidemark failover unplanned NAME`",
    ))
}

/// Who runs it, if that is known; refuses one whose disks are tracked where it is not.
pub async fn find_owner(core: &Core, machine: &Machine) -> Result<OwnerAnswer, Failure> {
    let answer = ask(core, machine, Asked::Power, QUICK).await?;
    if !is_tracked(machine) || answer.owner.is_some() {
        return Ok(answer);
    }
    let (name, via) = (&machine.name, machine.via.name());
    Err(Failure::new(
        FailureKind::Conflict,
        format!(
            "machine {name:?} writes to its disks past its agent (--via {via}), and nobody is known who says that it is off"
        ),
        format!(
            "write down who runs it in `owner.d/{name}/` on its host (a QMP socket, a domain of libvirt, or programs `stop`, `power` and `start`); or shut it down, \
             then: `tidemark failover unplanned {name}`"
        ),
    ))
}

/// Lets the source go on, and has it started where it was stopped for the failover: whether it was told, and what came of the start. Disks that
/// are tracked in its QEMU are attached when that runs again, so it is started whether or not they are.
pub async fn go_on(
    core: &Core,
    progress: &Progress,
    machine: &Machine,
    was_stopped: bool,
) -> (Result<(), Failure>, Value) {
    let mut told = settle_server(core, machine).await;
    let is_free = told.is_ok();
    if is_free {
        told = settle_agent(core, machine).await.map(drop);
    }
    if !was_stopped || !(told.is_ok() || is_free && is_tracked(machine)) {
        return (told, Value::Null);
    }
    let started = start_again(core, progress, machine).await;
    if told.is_err() {
        told = settle_agent(core, machine).await.map(drop);
    }
    (told, started)
}

/// One that nobody is known to run is only kept from its disks.
pub async fn shut_down(
    core: &Core,
    progress: &Progress,
    machine: &Machine,
    limit: Duration,
    turn_off: bool,
) -> Result<OwnerAnswer, Failure> {
    progress.step("shut the machine down at its source");
    let asked = Asked::ShutDown { limit_seconds: limit.as_secs(), turn_off };
    let answer = ask(core, machine, asked, limit + SETTLE).await?;
    match (&answer.owner, answer.stopped) {
        (None, _) => progress.step("nobody is known to run it there: it is only kept from its disks"),
        (Some(owner), Some(Stopped::TurnedOff)) => {
            note(
                core,
                &machine.name,
                &format!("did not shut down within {} s: {owner} turned it off", limit.as_secs()),
            );
        }
        _ => {}
    }
    if is_tracked(machine) {
        refuse_on(core, machine).await?;
    }
    Ok(answer)
}

/// Asked once more: whoever shut it down may have started another one.
async fn refuse_on(core: &Core, machine: &Machine) -> Result<(), Failure> {
    let answer = ask(core, machine, Asked::Power, QUICK).await?;
    if answer.power == Power::Off {
        return Ok(());
    }
    Err(Failure::new(
        FailureKind::Conflict,
        format!("machine {:?} was shut down, and whoever runs it does not say that it is off", machine.name),
        "see what runs it; programs of `owner.d` answer `power` with {\"power\": \"off\"}",
    ))
}

/// Whether it is off because it was asked for.
pub fn was_on(answer: &OwnerAnswer) -> bool {
    matches!(answer.stopped, Some(Stopped::ByGuest | Stopped::TurnedOff))
}

/// Starts it where its disks are its own again. Where that cannot be done, why not: a person starts it.
pub async fn start_again(core: &Core, progress: &Progress, machine: &Machine) -> Value {
    match ask(core, machine, Asked::Start, SETTLE).await {
        Ok(OwnerAnswer { owner: None, .. }) => Value::Null,
        Ok(answer) => {
            progress.step("its machine was started at home");
            json!(answer)
        }
        Err(failure) => {
            progress.step(format!("start its machine at home yourself: {}", failure.message));
            json!({ "error": failure.message, "help": failure.help })
        }
    }
}
