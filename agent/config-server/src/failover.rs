//! Failovers: how a machine is run where its replica is, drills ([`drill`]), and the life of a machine that runs there.
//!
//! ```text
//! protected ─ planned ─→ draining ─→ starting ─→ failed over ─ commit ─→ committed ─ migrate ─→ (no more protected)
//!          └ unplanned ────────────↗     │         │      ↑
//!                                        │         └ changing point
//!          ←──────── cancelling ←────────┴─ (from each before the commit)
//!
//! committed ─ reprotect ─→ reprotecting ─→ reprotected ─ failback ─→ failing back ─ complete ─→ failed back ─ commit ─→ protected
//!     ↑                         │  │           │    ↑                   │                       │
//!     └──── withdrawing ←───────┴──┼───────────┘    └────── cancel ─────┘                       │
//!                                  └←────────────────────── cancel ─────────────────────────────┘
//! ```
//!
//! [`state`] has what is stored of it and its moves, [`start`] begins it, [`source`] is the machine where it was protected, [`after`] is what follows; [`reprotect`] and [`failback`]
//! are the way home, [`elsewhere`] is one that is not the original, and [`taken`] one
//! without where it ran; [`rights`] is a failover that nobody here knows of. What they promise is in `host/src/master_target/FORMAT.md`.
//!
//! *Consistency.* What is to be done is durable, with raised generations, before a process server is asked: whatever else stops,
//! the source's old generation is refused from then on. *Retries.* Each step may be repeated: the same failover is gone on
//! with. *Cancellation.* Until the commit a failover can be cancelled from every step, and the source goes on with what it had.
//! *Crash.* What was begun is shown, and gone on with or cancelled by whoever wants it.

pub mod after;
pub mod drill;
pub mod elsewhere;
pub mod failback;
pub mod reprotect;
pub mod rights;
pub mod source;
pub mod start;
pub mod state;
pub mod taken;

use std::time::Duration;

use serde_json::{Value, json};
use tidemark_base::ServerId;
use tidemark_hypervisor::call::{Call, Description, encode};
use tidemark_proto::control::{Failure, FailureKind, Reply, ServerCommand};

use crate::consumers;
use crate::core::{Core, SETTLE};
use crate::hub::{PeerId, unexpected};
use crate::machines::vanished;
use crate::model::Machine;
use crate::names::bad_request;

/// The longest that a drill may wait for its sign of life.
const SIGN_LIMIT_MAX_SECONDS: u64 = 3600;

/// How a machine is described, and what it would run on.
pub fn description(core: &Core, name: &str) -> Result<Value, Failure> {
    let machine = core.machine(name)?;
    Ok(json!({ "machine": name, "description": machine.description, "drills": machine.drills }))
}

/// Says how a machine is run where its replica is, and looks at what runs it.
pub async fn describe(core: &Core, name: &str, description: Description) -> Result<Value, Failure> {
    let _lock = core.lock(name).await;
    let machine = core.machine(name)?;
    description
        .hardware
        .check(machine.disks.len())
        .map_err(|error| Failure::new(FailureKind::BadRequest, error.to_string(), error.help()))?;
    if !(1..=SIGN_LIMIT_MAX_SECONDS).contains(&description.sign_limit_seconds) {
        return Err(bad_request(
            format!("a sign of life is waited for between 1 and {SIGN_LIMIT_MAX_SECONDS} seconds"),
            "choose sign_limit_seconds in this range",
        ));
    }
    core.store.change(|state| {
        let machine = state.machines.get_mut(name).ok_or_else(vanished)?;
        machine.description = Some(description.clone());
        Ok(())
    })?;
    // Kept whether or not it can run now; whoever set it is told.
    let hypervisor = match ask(core, &consumers::usable(core, machine), &Call::Check, SETTLE).await {
        Ok(about) => serde_json::from_str(&about).unwrap_or(Value::Null),
        Err(failure) => json!({ "error": failure.message, "help": failure.help }),
    };
    Ok(json!({ "machine": name, "description": description, "hypervisor": hypervisor }))
}

async fn ask(core: &Core, machine: &Machine, call: &Call, limit: Duration) -> Result<String, Failure> {
    ask_at(core, machine, machine.server, call, limit).await
}

/// The same of one of several that a machine is replicated to.
async fn ask_at(
    core: &Core,
    machine: &Machine,
    server: ServerId,
    call: &Call,
    limit: Duration,
) -> Result<String, Failure> {
    let answered = core.server(server, &ServerCommand::Hypervisor(encode(call)), limit).await;
    match answered.map_err(|failure| by_name(machine, failure))? {
        Reply::Hypervisor(answer) => Ok(answer),
        other => Err(unexpected(PeerId::ProcessServer(server), &other)),
    }
}

/// Process servers and agents know machines by their ids, people by their names.
fn by_name(machine: &Machine, failure: Failure) -> Failure {
    let (id, name) = (machine.id.to_string(), format!("{:?}", machine.name));
    Failure { message: failure.message.replace(&id, &name), help: failure.help.replace(&id, &name), ..failure }
}

fn not_understood(error: tidemark_hypervisor::call::NotUnderstood) -> Failure {
    Failure::new(FailureKind::Failed, error.to_string(), "let both ends be of the same version")
}

fn no_description(name: &str) -> Failure {
    Failure::new(
        FailureKind::Conflict,
        format!("machine {name:?} has no description: nobody said what it needs to run"),
        "say it: `tidemark machine set NAME --memory 4G --processors 2 --firmware bios`",
    )
}
