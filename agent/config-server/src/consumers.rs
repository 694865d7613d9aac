//! The process servers that a machine feeds: which they are, and which of them is asked.
//!
//! Each gets the same changes and the same marks, and keeps a replica with points of its own; what its agent does about one that is away
//! concerns no other. Whatever is asked of *the* replica is asked of the first one, or of the one that is named or has what is
//! wanted ([`at`]); a failover makes that one the first.
//!
//! *Consistency.* As disks ([`crate::disks`]): one that comes is told before the agent sends to it, one that goes after the agent let go of it.
//! *Retries.* One that is away is told when it comes back, that it is left as well ([`Leaving`]). Adding that fails is undone.
//! *Cancellation.* None: each runs to its end. *Crash.* What was stored is told again at the next start.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tidemark_base::{MarkId, ServerId};
use tidemark_proto::control::{Failure, FailureKind, PointInfo, Reply, SERVERS_MAX, Selector, ServerCommand};

use crate::core::{Core, QUICK, SETTLE};
use crate::failover::drill::refuse_drilled_at;
use crate::hub::{PeerId, unexpected};
use crate::jobs::{Job, Progress};
use crate::machines::{
    ProtectRequest, pick_server, preflight, refuse_failing, refuse_without_source, settle_agent, settle_protected,
    vanished,
};
use crate::model::{Leaving, Machine, State};
use crate::names::bad_request;

#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AddRequest {
    /// By name or id.
    pub process_servers: Vec<String>,
}

/// Those that are named, or the only one that there is.
pub fn pick(core: &Core, named: &[&String]) -> Result<Vec<ServerId>, Failure> {
    if named.len() > SERVERS_MAX {
        return Err(too_many(named.len()));
    }
    if named.is_empty() {
        return Ok(vec![pick_server(core, None)?]);
    }
    let mut servers = Vec::new();
    for name in named {
        let server = pick_server(core, Some(name))?;
        if servers.contains(&server) {
            return Err(bad_request(format!("process server {name:?} is named twice"), "name each once"));
        }
        servers.push(server);
    }
    Ok(servers)
}

fn too_many(count: usize) -> Failure {
    let help = format!("name at most {SERVERS_MAX}");
    bad_request(format!("{count} process servers are too many for one machine"), help)
}

/// Protecting the same again changes no process server.
pub fn refuse_others(machine: &Machine, servers: &[ServerId]) -> Result<(), Failure> {
    let is_other = |server: &ServerId| machine.servers().all(|known| known != *server);
    if servers.iter().any(is_other) {
        return Err(Failure::new(
            FailureKind::Conflict,
            format!("machine {:?} is protected already, with other process servers", machine.name),
            "see `tidemark machine process-server add` and `tidemark machine process-server remove`",
        ));
    }
    Ok(())
}

/// Starts the job that feeds process servers besides those that are fed.
pub fn add(core: &Arc<Core>, name: &str, request: AddRequest) -> Result<Job, Failure> {
    refuse_without_source(&core.machine(name)?)?;
    if request.process_servers.is_empty() {
        return Err(bad_request(
            "no process server is named",
            "name at least one; `tidemark status` has those that are fed",
        ));
    }
    let servers = pick(core, &request.process_servers.iter().collect::<Vec<_>>())?;
    let (core, name) = (core.clone(), name.to_owned());
    core.jobs.clone().start("process_server_add", Some(&name.clone()), |progress| async move {
        let _lock = core.lock(&name).await;
        run_add(&core, &progress, &name, servers).await
    })
}

async fn run_add(core: &Core, progress: &Progress, name: &str, mut added: Vec<ServerId>) -> Result<Value, Failure> {
    let machine = core.machine(name)?;
    refuse_without_source(&machine)?;
    added.retain(|server| machine.servers().all(|known| known != *server));
    let count = machine.servers().count() + added.len();
    if count > SERVERS_MAX {
        return Err(too_many(count));
    }
    progress.step("check what is needed");
    let request = ProtectRequest::again(name, Vec::new());
    refuse_failing(&preflight(core, &request, machine.host, &added).await.checks)?;
    let machine = core.store.change(|state| {
        let machine = state.machines.get_mut(name).ok_or_else(vanished)?;
        refuse_without_source(machine)?;
        machine.leaving.retain(|leaving| !added.contains(&leaving.server));
        machine.others.extend(&added);
        Ok(machine.clone())
    })?;
    if let Err(failure) = settle_protected(core, Some(progress), &machine).await {
        progress.step("undo");
        let left = added.iter().map(|server| Leaving { server: *server, delete_replica: false });
        let machine = leave(core, name, &left.collect::<Vec<_>>())?;
        // A side that is away is told when it comes back.
        if let Err(left) = settle_without(core, None, &machine).await {
            tracing::warn!(machine = name, error = %left, "undoing a process server that could not be added is not complete yet");
        }
        return Err(failure);
    }
    Ok(told(&core.store.state(), &machine))
}

/// Starts the job that feeds one of several no longer. With `delete_replica` its points go as well: refused where one is locked or
/// served, unless `force`.
pub fn remove(core: &Arc<Core>, name: &str, server: &str, delete_replica: bool, force: bool) -> Result<Job, Failure> {
    let machine = core.machine(name)?;
    refuse_without_source(&machine)?;
    let server = named(&core.store.state(), &machine, server)?;
    refuse_last(&machine)?;
    let (core, name) = (core.clone(), name.to_owned());
    core.jobs.clone().start("process_server_remove", Some(&name.clone()), move |progress| async move {
        let _lock = core.lock(&name).await;
        let machine = core.machine(&name)?;
        refuse_without_source(&machine)?;
        refuse_drilled_at(&core, &machine, &[server])?;
        if machine.servers().any(|known| known == server) {
            refuse_last(&machine)?;
        }
        if delete_replica && !force {
            progress.step("see whether a point of it is locked or served");
            crate::kept::refuse_needed(&core, &machine.about(server)).await?;
        }
        let machine = leave(&core, &name, &[Leaving { server, delete_replica }])?;
        let is_told = match settle_without(&core, Some(&progress), &machine).await {
            Ok(()) => true,
            Err(failure) => {
                tracing::info!(machine = name, %failure, "not everyone knows yet that a process server is left");
                false
            }
        };
        let mut result = told(&core.store.state(), &machine);
        result["complete"] = json!(is_told);
        Ok(result)
    })
}

fn leave(core: &Core, name: &str, left: &[Leaving]) -> Result<Machine, Failure> {
    core.store.change(|state| {
        let machine = state.machines.get_mut(name).ok_or_else(vanished)?;
        for leaving in left {
            if machine.server == leaving.server && !machine.others.is_empty() {
                machine.server = machine.others.remove(0);
            } else if machine.others.contains(&leaving.server) {
                machine.others.retain(|server| *server != leaving.server);
            } else {
                continue;
            }
            machine.leaving.retain(|known| known.server != leaving.server);
            machine.leaving.push(*leaving);
        }
        Ok(machine.clone())
    })
}

/// The agent first: what it sends is taken until it ends.
async fn settle_without(core: &Core, progress: Option<&Progress>, machine: &Machine) -> Result<(), Failure> {
    if let Some(progress) = progress {
        progress.step("send nothing more to it");
    }
    let agent = settle_agent(core, machine).await.map(drop);
    if let Some(progress) = progress {
        progress.step("close its replica");
    }
    agent.and(settle_leaving(core, machine).await)
}

/// Tells process servers that are left that they are.
pub async fn settle_leaving(core: &Core, machine: &Machine) -> Result<(), Failure> {
    let mut outcome = Ok(());
    for leaving in &machine.leaving {
        let told = let_go(core, machine, leaving.server, leaving.delete_replica).await;
        if told.is_ok() {
            core.store.change(|state| {
                if let Some(machine) = state.machines.get_mut(&machine.name) {
                    machine.leaving.retain(|known| known != leaving);
                }
                Ok(())
            })?;
        }
        outcome = outcome.and(told);
    }
    outcome
}

/// A process server that does not know the machine has let go of it.
pub async fn let_go(core: &Core, machine: &Machine, server: ServerId, delete_replica: bool) -> Result<(), Failure> {
    let command = ServerCommand::Deauthorise { machine: machine.id, delete_replica };
    match core.server_does(server, &command, SETTLE).await {
        Err(failure) if failure.kind == FailureKind::NotFound => Ok(()),
        told => told,
    }
}

fn refuse_last(machine: &Machine) -> Result<(), Failure> {
    match machine.others.is_empty() {
        false => Ok(()),
        true => Err(Failure::new(
            FailureKind::Conflict,
            format!("it is the only process server of machine {:?}", machine.name),
            "add another one first, or unprotect the machine: `tidemark unprotect NAME`",
        )),
    }
}

fn told(state: &State, machine: &Machine) -> Value {
    let names: Vec<String> = machine.servers().map(|server| state.server_name(server)).collect();
    json!({ "machine": machine.name, "process_servers": names })
}

/// One of the machine's, by name or id.
pub fn named(state: &State, machine: &Machine, wanted: &str) -> Result<ServerId, Failure> {
    let is_it = |server: &ServerId| state.server_name(*server) == wanted || server.to_string() == wanted;
    machine.servers().find(is_it).ok_or_else(|| {
        let names: Vec<String> = machine.servers().map(|server| state.server_name(server)).collect();
        Failure::new(
            FailureKind::NotFound,
            format!(
                "machine {:?} has no process server {:?}",
                machine.name,
                wanted.chars().take(80).collect::<String>()
            ),
            format!("it has {}", names.join(", ")),
        )
    })
}

/// The machine, with the process server in the first place that is asked for a point: the one that is named; or, of those that are
/// there and have one by this name, that with the newest. With one alone nothing is asked.
pub async fn at(core: &Core, machine: Machine, wanted: Option<&str>, point: &Selector) -> Result<Machine, Failure> {
    if let Some(wanted) = wanted {
        let server = named(&core.store.state(), &machine, wanted)?;
        return Ok(machine.about(server));
    }
    if machine.others.is_empty() || machine.failover.is_some() {
        return Ok(machine);
    }
    let asked = machine.servers().map(|server| async move {
        let command = ServerCommand::Resolve { machine: machine.id, point: *point };
        match core.server(server, &command, QUICK).await {
            Ok(Reply::Point(point)) => Some((server, point.time)),
            _ => None,
        }
    });
    let found: Vec<_> = futures_util::future::join_all(asked).await.into_iter().flatten().collect();
    // The first of those that are equal.
    let best = found.iter().rev().max_by_key(|(_, time)| *time).map(|(server, _)| *server);
    // Where nobody has it, the first one says why.
    let server = best.unwrap_or(machine.server);
    Ok(machine.about(server))
}

/// Waits until a mark is a point somewhere, and says where first.
pub async fn wait_point(
    core: &Core,
    machine: &Machine,
    mark: MarkId,
    limit: std::time::Duration,
) -> Result<HeldPoint, Failure> {
    let command = ServerCommand::WaitPoint { machine: machine.id, mark, limit };
    let waiting = machine
        .servers()
        .filter(|server| machine.others.is_empty() || core.hub.is_connected(PeerId::ProcessServer(*server)));
    let waiting: Vec<_> = waiting
        .map(|server| {
            let command = &command;
            Box::pin(async move {
                match core.server(server, command, limit + QUICK).await? {
                    Reply::Point(point) => {
                        let name = core.store.state().server_name(server);
                        Ok(HeldPoint { point, process_servers: vec![name] })
                    }
                    other => Err(unexpected(PeerId::ProcessServer(server), &other)),
                }
            })
        })
        .collect();
    if waiting.is_empty() {
        return Err(Failure::new(
            FailureKind::Unavailable,
            format!("no process server of machine {:?} is connected", machine.name),
            "the point is made, and listed once one of them is there",
        ));
    }
    futures_util::future::select_ok(waiting).await.map(|(point, _)| point)
}

/// A point, and who has it.
#[derive(Clone, Debug, Serialize)]
pub struct HeldPoint {
    #[serde(flatten)]
    pub point: PointInfo,
    /// The names of those that have it.
    pub process_servers: Vec<String>,
}

/// The machine, with one in the first place that can be asked: the first one itself, wherever that is there.
pub fn usable(core: &Core, machine: Machine) -> Machine {
    let there = machine.servers().find(|server| core.hub.is_connected(PeerId::ProcessServer(*server)));
    match there {
        Some(server) => machine.about(server),
        None => machine,
    }
}

/// What those say that can be asked, the first one first. Where nobody can be asked, why the first one cannot.
pub async fn points_of_each(core: &Core, machine: &Machine) -> Result<Vec<(ServerId, Vec<PointInfo>)>, Failure> {
    let command = ServerCommand::Points(machine.id);
    let asked = machine.servers().map(|server| {
        let command = &command;
        async move {
            match core.server(server, command, QUICK).await? {
                Reply::Points(points) => Ok((server, points)),
                other => Err(unexpected(PeerId::ProcessServer(server), &other)),
            }
        }
    });
    let (told, failed): (Vec<_>, Vec<_>) =
        futures_util::future::join_all(asked).await.into_iter().partition(Result::is_ok);
    match failed.into_iter().find_map(Result::err) {
        Some(failure) if told.is_empty() => Err(failure),
        _ => Ok(told.into_iter().flatten().collect()),
    }
}

/// The points that those have which can be asked, oldest first.
pub async fn points(core: &Core, machine: &Machine) -> Result<Vec<HeldPoint>, Failure> {
    let mut all: Vec<HeldPoint> = Vec::new();
    for (server, points) in points_of_each(core, machine).await? {
        let name = core.store.state().server_name(server);
        let known: std::collections::BTreeMap<MarkId, usize> =
            all.iter().enumerate().map(|(at, held)| (held.point.id, at)).collect();
        for point in points {
            match known.get(&point.id) {
                Some(at) => all[*at].process_servers.push(name.clone()),
                None => all.push(HeldPoint { point, process_servers: vec![name.clone()] }),
            }
        }
    }
    // As one lists them, where there is one alone.
    if machine.servers().count() > 1 {
        all.sort_by_key(|held| held.point.time);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(text: &str) -> Machine {
        serde_json::from_str(text).unwrap()
    }

    /// As it was stored when a machine had one process server.
    const BEFORE: &str = r#"{"id":"0a0a0a0a-0a0a-0a0a-0a0a-0a0a0a0a0a0a","name":"web",
        "host":"0b0b0b0b-0b0b-0b0b-0b0b-0b0b0b0b0b0b","server":"01010101-0101-0101-0101-010101010101",
        "policy":"continuous","disks":[],"wanted":"protected","created":"2026-11-01T00:00:00Z"}"#;

    #[test]
    fn a_machine_of_before_has_one_and_what_comes_first_changes_no_other() {
        let before = machine(BEFORE);
        let first = before.server;
        assert_eq!(before.servers().collect::<Vec<_>>(), [first]);
        assert!(before.leaving.is_empty());
        let others: Vec<ServerId> = (0..2).map(|_| ServerId::random()).collect();
        let all = Machine { others: others.clone(), ..before };
        let moved = all.clone().about(others[1]);
        assert_eq!(moved.servers().collect::<Vec<_>>(), [others[1], others[0], first]);
        assert_eq!(moved.about(first), all);
        assert_eq!(all.clone().about(ServerId::random()), all, "nobody else takes the first place");
        let again: Machine = machine(&serde_json::to_string(&all).unwrap());
        assert_eq!(again, all);
    }
}
