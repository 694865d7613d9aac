//! Replicas that outlive the protection of their machine: what `unprotect` leaves at a process server until it is deleted.
//!
//! *Consistency.* A replica is kept from the same change on that ends the protection, so one of the two always names it.
//! *Retries.* A deletion that did not get through is asked for again by whoever wants it. *Cancellation.* None.
//! *Crash.* As [`crate::store`]; a deletion that was begun at the process server is repeated there.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::json;
use tidemark_base::{Clock, MachineId, Timestamp};
use tidemark_proto::control::{Failure, FailureKind, PointInfo, Reply, ServerCommand};
use utoipa::ToSchema;

use crate::consumers;
use crate::core::{Core, QUICK};
use crate::hub::{PeerId, unexpected};
use crate::jobs::Job;
use crate::model::{Machine, State};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Kept {
    pub machine: Machine,
    pub unprotected: Timestamp,
}

/// What is told of a replica that was kept.
#[derive(Debug, Serialize, ToSchema)]
pub struct KeptReplica {
    #[schema(value_type = String, format = "uuid")]
    pub id: MachineId,
    /// What the machine was called.
    pub name: String,
    pub process_server: String,
    pub disks: Vec<KeptDisk>,
    #[schema(value_type = String, format = "date-time")]
    pub unprotected: Timestamp,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct KeptDisk {
    pub id: String,
    pub path: String,
    pub bytes: u64,
}

/// From now on only the replica of `machine` is left.
pub fn keep(core: &Core, state: &mut State, machine: Machine) {
    let unprotected = core.clock.wall_now();
    state.kept.insert(machine.id, Kept { machine, unprotected });
}

/// The machine whose points `name` means: one that is protected, or the kept replica of that id or that name, the newest
/// where several had it.
pub fn machine(core: &Core, name: &str) -> Result<Machine, Failure> {
    core.machine(name).or_else(|failure| {
        let state = core.store.state();
        let matching =
            state.kept.values().filter(|kept| kept.machine.name == name || kept.machine.id.to_string() == name);
        matching.max_by_key(|kept| kept.unprotected).map(|kept| kept.machine.clone()).ok_or(failure)
    })
}

pub fn list(core: &Core) -> Vec<KeptReplica> {
    let state = core.store.state();
    let shown = |kept: &Kept| KeptReplica {
        id: kept.machine.id,
        name: kept.machine.name.clone(),
        process_server: kept.machine.servers().map(|server| state.server_name(server)).collect::<Vec<_>>().join(", "),
        disks: kept
            .machine
            .disks
            .iter()
            .map(|disk| KeptDisk { id: disk.id.to_string(), path: disk.path.clone(), bytes: disk.bytes })
            .collect(),
        unprotected: kept.unprotected,
    };
    state.kept.values().map(shown).collect()
}

/// Deletes a kept replica with its points. `force`: locked and served ones as well, and where the process server is gone for
/// good, only its record.
pub fn delete(core: &Arc<Core>, id: &str, force: bool) -> Result<Job, Failure> {
    let kept = id.parse().ok().and_then(|id: MachineId| core.store.state().kept.get(&id).cloned());
    let Some(kept) = kept else {
        return Err(Failure::new(
            FailureKind::NotFound,
            format!("no replica with the id {:?} is kept", id.chars().take(80).collect::<String>()),
            "see `tidemark replica list`",
        ));
    };
    let core = core.clone();
    core.jobs.clone().start("replica_delete", Some(&kept.machine.name.clone()), |progress| async move {
        let machine = kept.machine;
        if !force {
            progress.step("see whether a point of it is locked or served");
            for server in machine.servers() {
                refuse_needed(&core, &machine.clone().about(server)).await?;
            }
        }
        progress.step("delete it at the process server");
        for server in machine.servers() {
            match consumers::let_go(&core, &machine, server, true).await {
                Err(failure) if force && failure.kind == FailureKind::Unavailable => {
                    tracing::warn!(machine = machine.name, %failure, "a replica is forgotten and not deleted");
                }
                told => told?,
            }
        }
        core.store.change(|state| {
            state.kept.remove(&machine.id);
            Ok(())
        })?;
        Ok(json!({ "id": machine.id, "machine": machine.name }))
    })
}

/// Deleting a replica deletes every point: not while one of them is locked, or somebody reads it.
pub async fn refuse_needed(core: &Core, machine: &Machine) -> Result<(), Failure> {
    let help = "unlock or stop it first; with --force everything goes";
    let points: Vec<PointInfo> = match core.server(machine.server, &ServerCommand::Points(machine.id), QUICK).await {
        Ok(Reply::Points(points)) => points,
        Ok(other) => return Err(unexpected(PeerId::ProcessServer(machine.server), &other)),
        // It has nothing of this machine.
        Err(failure) if failure.kind == FailureKind::NotFound => Vec::new(),
        Err(failure) => {
            let help = format!("{}; with --force the replica is deleted whatever it holds", failure.help);
            return Err(Failure { help, ..failure });
        }
    };
    let mut locked = points.iter().filter(|point| point.locked).map(|point| point.id);
    let Some(first) = locked.next() else { return refuse_served(core, machine, help).await };
    let message = match locked.count() {
        0 => format!("recovery point {first} of machine {:?} is locked", machine.name),
        more => format!("{} recovery points of machine {:?} are locked, {first} the first", more + 1, machine.name),
    };
    Err(Failure::new(FailureKind::Conflict, message, help))
}

async fn refuse_served(core: &Core, machine: &Machine, help: &str) -> Result<(), Failure> {
    // Asked now: what was told last may be older than the serve.
    let served = match core.server(machine.server, &ServerCommand::Status, QUICK).await? {
        Reply::Server(report) => report.serves.iter().any(|serve| serve.machine == machine.id),
        other => return Err(unexpected(PeerId::ProcessServer(machine.server), &other)),
    };
    if !served {
        return Ok(());
    }
    Err(Failure::new(FailureKind::Conflict, format!("a point of machine {:?} is being served", machine.name), help))
}
