//! A machine that was failed over without this configuration server (with the recovery key, where none was left) goes on at its
//! source. Nobody decides that but an operator: what was recovered meanwhile may be what runs.
//!
//! *Consistency.* The generation that lets the source write again is above all that process servers know, and durable before
//! they are told. *Retries.* Again: who has it answers the same. *Cancellation.* Before the generation is stored, nothing changed.
//! *Crash.* What was stored is told to both sides when they connect.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tidemark_base::{DiskId, Generation, ServerId};
use tidemark_hypervisor::call::{Call, Rights, decode};
use tidemark_proto::control::{Failure, FailureKind};

use super::start::{note, settle_source};
use super::{ask_at, not_understood, state};
use crate::core::{Core, QUICK, SETTLE};
use crate::jobs::Progress;
use crate::machines::{refuse_unprotected, vanished};
use crate::model::Machine;

/// Lets the source go on under a generation above that of the failover; what differs is compared as its stream begins.
pub async fn take_back(core: &Core, progress: &Progress, name: &str) -> Result<Value, Failure> {
    let machine = core.machine(name)?;
    refuse_unprotected(&machine)?;
    progress.step("ask who may write the replica");
    let (mut highest, mut by_recovery_key): (BTreeMap<DiskId, Generation>, _) = (BTreeMap::new(), None);
    for server in machine.servers() {
        let answer = ask_at(core, &machine, server, &Call::Rights { machine: machine.id }, SETTLE).await?;
        let rights: Rights = decode(&answer).map_err(not_understood)?;
        if let Some(since) = rights.failed_over {
            let state = core.store.state();
            let server = state.servers.get(&server).map_or_else(|| server.to_string(), |server| server.name.clone());
            return Err(Failure::new(
                FailureKind::Conflict,
                format!(
                    "machine {name:?} has run at process server {server} since {since}, and this configuration server knows nothing of it"
                ),
                "restore the latest backup of the configuration, which does: `tidemark config-server restore`",
            ));
        }
        for (disk, generation) in rights.generations {
            let known = highest.entry(disk).or_insert(generation);
            *known = generation.max(*known);
        }
        by_recovery_key = by_recovery_key.or(rights.by_recovery_key);
    }
    let known = |disk: &DiskId| highest.get(disk).copied();
    if machine.disks.iter().all(|disk| known(&disk.id).is_none_or(|highest| highest <= disk.generation)) {
        return Err(state::none(name));
    }
    let machine = core.store.change(|state| {
        let machine = state.machines.get_mut(name).ok_or_else(vanished)?;
        for disk in &mut machine.disks {
            disk.generation = known(&disk.id).map_or(disk.generation, |highest| disk.generation.max(highest));
        }
        state::raise(machine);
        Ok(machine.clone())
    })?;
    progress.step("let the source go on");
    let told = settle_source(core, &machine).await;
    let of = by_recovery_key.as_ref().map_or(String::new(), |taken| {
        format!(" with the recovery key of {} to the point of {}", taken.at, taken.point_time)
    });
    note(core, name, &format!("goes on at its source: its failover{of} was taken back"));
    let waiting = told.err().map(|failure| format!("{}; it goes on when it can be told", failure.message));
    Ok(json!({ "machine": name, "source": if waiting.is_none() { "goes on" } else { "is away" }, "waiting": waiting,
        "by_recovery_key": by_recovery_key }))
}

/// Why a process server refuses what we want of a machine, where that is a failover that we had no part in: what happened, and what to do.
/// Everything else that is wrong with the machine then follows from it. `None`: that is not why, or it does not say.
pub async fn taken_over(core: &Core, machine: &Machine, server: ServerId) -> Option<Failure> {
    let answer = ask_at(core, machine, server, &Call::Rights { machine: machine.id }, QUICK).await.ok()?;
    let rights: Rights = decode(&answer).ok()?;
    let known = |disk: &DiskId| machine.disks.iter().find(|of| of.id == *disk).map(|of| of.generation);
    let newer = rights.generations.iter().filter(|(disk, there)| known(disk).is_some_and(|ours| **there > ours));
    let generation = newer.map(|(_, there)| *there).max()?;
    let (name, server) = (&machine.name, core.store.state().server_name(server));
    let (what, help) = match (&rights.by_recovery_key, rights.failed_over) {
        (Some(taken), _) => (
            format!(
                "machine {name:?} was failed over with the recovery key at {} to the point of {}, without this configuration server",
                taken.at, taken.point_time
            ),
            "decide which of the two goes on: the source, by `tidemark failover cancel NAME`; or what was recovered, by \
             `tidemark unprotect NAME`, and the source stays off",
        ),
        (None, Some(since)) => (
            format!(
                "machine {name:?} has run at process server {server} since {since}, and this configuration server knows nothing of it"
            ),
            "restore the latest backup of the configuration, which does: `tidemark config-server restore`",
        ),
        (None, None) => return None,
    };
    let message = format!(
        "{what}: process server {server} takes nothing from the source, which is older than generation {generation}"
    );
    Some(Failure::new(FailureKind::Conflict, message, help.replace("NAME", name)))
}
