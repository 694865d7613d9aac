//! The machine where it was protected: whoever runs it there, as its host's administrator wrote down, is asked to shut it down
//! before its disks are closed, and to start it when they are its own again.
//!
//! *Consistency.* A guest that shut down by itself has written everything; the disks are closed after that whatever it does.
//! *Retries.* None. *Cancellation.* Before anything else is begun: what was asked may still shut down. *Crash.* As cancellation: it is off, and
//! protected.

use std::time::Duration;

use serde_json::{Value, json};
use tidemark_hypervisor::call::{Asked, OwnerAnswer, OwnerCall, decode, encode};
use tidemark_hypervisor::hypervisor::Stopped;
use tidemark_proto::control::{AgentCommand, Failure, Reply};

use super::not_understood;
use super::start::note;
use crate::core::{Core, SETTLE};
use crate::hub::{PeerId, unexpected};
use crate::jobs::Progress;
use crate::model::Machine;

pub async fn ask(core: &Core, machine: &Machine, what: Asked, limit: Duration) -> Result<OwnerAnswer, Failure> {
    let call = OwnerCall { machine: machine.id, name: machine.name.clone(), what };
    match core.agent(machine.host, &AgentCommand::Owner(encode(&call)), limit).await? {
        Reply::Owner(answer) => decode(&answer).map_err(not_understood),
        other => Err(unexpected(PeerId::Agent(machine.host), &other)),
    }
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
    Ok(answer)
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
