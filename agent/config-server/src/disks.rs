//! The disks of a machine that is protected already: one more, one less, one that grew.
//!
//! *Consistency.* What is wanted is durable first; then each side is told. A disk that comes is known to the process server before
//! its agent sends it, and one that goes is left by its agent before the process server refuses it, so that the marks in between
//! name nothing that nobody takes. *Retries.* A side that is away is told when it comes back; one that fails is tried again. Adding
//! that fails is undone. *Cancellation.* None: each runs to its end;
//! none begins while the machine is failed over. *Crash.* What was stored is told again at the next start.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tidemark_base::{Clock, DiskId, Generation, MachineId};
use tidemark_proto::control::{AgentCommand, DISKS_MAX, Failure, FailureKind, ProbedDisk, Reply};

use crate::core::{Core, SETTLE};
use crate::hub::{PeerId, Report, unexpected};
use crate::jobs::{Job, Progress};
use crate::machines::{
    ProtectRequest, check_disks, disks_are_free, preflight, protected, refuse_failing, refuse_without_source,
    settle_agent, settle_protected, settle_server, vanished, with_warnings,
};
use crate::model::{Machine, MachineDisk};
use crate::names::bad_request;

/// How often it is looked whether a disk grew.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// A disk that grew and could not be taken over is tried again by itself so often.
const AGAIN_AFTER: Duration = Duration::from_secs(600);
/// A replica grows in whole blocks.
const BLOCK_BYTES: u64 = 4096;

#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AddRequest {
    /// Full paths on the machine's host.
    pub disks: Vec<String>,
}

/// Starts the job that adds disks.
pub fn add(core: &Arc<Core>, name: &str, request: AddRequest) -> Result<Job, Failure> {
    refuse_without_source(&core.machine(name)?)?;
    if request.disks.is_empty() {
        return Err(bad_request("no disk is named", "name at least one disk"));
    }
    check_disks(&request.disks)?;
    let (core, name) = (core.clone(), name.to_owned());
    core.jobs.clone().start("disk_add", Some(&name.clone()), |progress| async move {
        let _lock = core.lock(&name).await;
        run_add(&core, &progress, &name, request.disks).await
    })
}

async fn run_add(core: &Core, progress: &Progress, name: &str, paths: Vec<String>) -> Result<Value, Failure> {
    let machine = core.machine(name)?;
    refuse_without_source(&machine)?;
    if machine.disks.len() + paths.len() > DISKS_MAX {
        return Err(bad_request(
            format!("machine {name:?} would have {} disks", machine.disks.len() + paths.len()),
            format!("a machine has at most {DISKS_MAX}"),
        ));
    }
    progress.step("check what is needed");
    let request = ProtectRequest::again(name, paths);
    let found = preflight(core, &request, machine.host, &[machine.server]).await;
    refuse_failing(&found.checks)?;
    if let Some(known) = found.disks.iter().find(|disk| machine.disks.iter().any(|known| known.path == disk.path)) {
        return Err(Failure::new(
            FailureKind::Conflict,
            format!("disk {} is a disk of machine {name:?} already", known.path),
            "see `tidemark status`",
        ));
    }
    let added = with_names(&machine, found.disks);
    let machine = core.store.change(|state| {
        let paths: Vec<&str> = added.iter().map(|disk| disk.path.as_str()).collect();
        disks_are_free(state, machine.host, &paths)?;
        let machine = state.machines.get_mut(name).ok_or_else(vanished)?;
        refuse_without_source(machine)?;
        machine.disks.extend(added.iter().cloned());
        Ok(machine.clone())
    })?;
    match settle_protected(core, Some(progress), &machine).await {
        Ok(attached) => Ok(with_warnings(protected(&machine, &attached), &found.checks)),
        Err(failure) => {
            progress.step("undo");
            let machine = core.store.change(|state| {
                let machine = state.machines.get_mut(name).ok_or_else(vanished)?;
                machine.disks.retain(|disk| added.iter().all(|added| added.id != disk.id));
                Ok(machine.clone())
            })?;
            // A side that is away is told when it comes back.
            if let Err(left) = settle_without(core, None, &machine).await {
                tracing::warn!(machine = name, error = %left, "undoing a disk that could not be added is not complete yet");
            }
            Err(failure)
        }
    }
}

/// Each with an id, and a name of its export that no other disk of the machine has.
fn with_names(machine: &Machine, disks: Vec<ProbedDisk>) -> Vec<MachineDisk> {
    let known: BTreeSet<&str> = machine.disks.iter().map(|disk| disk.export.as_str()).collect();
    let names = (0..).map(|index| format!("{}-{index}", machine.name)).filter(|name| !known.contains(name.as_str()));
    disks
        .into_iter()
        .zip(names)
        .map(|(disk, export)| MachineDisk {
            id: DiskId::random(),
            path: disk.path,
            export,
            bytes: disk.bytes,
            generation: Generation::FIRST,
            added: true,
        })
        .collect()
}

/// Starts the job that takes a disk out of its machine. The recovery points that it is part of stay.
pub fn remove(core: &Arc<Core>, name: &str, disk: &str) -> Result<Job, Failure> {
    let machine = core.machine(name)?;
    refuse_without_source(&machine)?;
    let disk = find(&machine, disk)?.id;
    refuse_last(&machine)?;
    let (core, name) = (core.clone(), name.to_owned());
    core.jobs.clone().start("disk_remove", Some(&name.clone()), move |progress| async move {
        let _lock = core.lock(&name).await;
        let machine = core.store.change(|state| {
            let machine = state.machines.get_mut(&name).ok_or_else(vanished)?;
            refuse_without_source(machine)?;
            if machine.disks.iter().any(|known| known.id == disk) {
                refuse_last(machine)?;
                machine.disks.retain(|known| known.id != disk);
            }
            Ok(machine.clone())
        })?;
        settle_without(&core, Some(&progress), &machine).await.map_err(|failure| Failure {
            help: format!("{}; it is done as soon as that is possible", failure.help),
            ..failure
        })?;
        Ok(json!({ "machine": name, "disk": disk }))
    })
}

/// The agent first: what it sends of a disk that goes is taken until it ends.
async fn settle_without(core: &Core, progress: Option<&Progress>, machine: &Machine) -> Result<(), Failure> {
    if let Some(progress) = progress {
        progress.step("leave the disk at the agent");
    }
    let agent = settle_agent(core, machine).await.map(drop);
    if let Some(progress) = progress {
        progress.step("refuse it at the process server");
    }
    agent.and(settle_server(core, machine).await)
}

fn find<'a>(machine: &'a Machine, named: &str) -> Result<&'a MachineDisk, Failure> {
    machine.disks.iter().find(|disk| disk.path == named || disk.id.to_string() == named).ok_or_else(|| {
        let shown: String = named.chars().take(200).collect();
        let known: Vec<&str> = machine.disks.iter().map(|disk| disk.path.as_str()).collect();
        Failure::new(
            FailureKind::NotFound,
            format!("machine {:?} has no disk {shown:?}", machine.name),
            format!("it has {}", known.join(", ")),
        )
    })
}

fn refuse_last(machine: &Machine) -> Result<(), Failure> {
    match machine.disks.as_slice() {
        [last] => Err(Failure::new(
            FailureKind::Conflict,
            format!("{} is the only disk of machine {:?}", last.path, machine.name),
            "unprotect the machine instead: `tidemark unprotect NAME`",
        )),
        _ => Ok(()),
    }
}

/// Starts the job that takes over disks that grew.
pub fn resize(core: &Arc<Core>, name: &str) -> Result<Job, Failure> {
    refuse_without_source(&core.machine(name)?)?;
    let (core, name) = (core.clone(), name.to_owned());
    core.jobs.clone().start("disk_resize", Some(&name.clone()), |progress| async move {
        let _lock = core.lock(&name).await;
        run_resize(&core, &progress, &name).await
    })
}

async fn run_resize(core: &Core, progress: &Progress, name: &str) -> Result<Value, Failure> {
    let machine = core.machine(name)?;
    refuse_without_source(&machine)?;
    progress.step("ask the agent for sizes");
    let paths = machine.disks.iter().map(|disk| disk.path.clone()).collect();
    let found = match core.agent(machine.host, &AgentCommand::Probe { paths, via: machine.via }, SETTLE).await? {
        Reply::Probed(disks) if disks.len() == machine.disks.len() => disks,
        other => return Err(unexpected(PeerId::Agent(machine.host), &other)),
    };
    let grown = grown(&machine, &found)?;
    let machine = core.store.change(|state| {
        let machine = state.machines.get_mut(name).ok_or_else(vanished)?;
        refuse_without_source(machine)?;
        for disk in &mut machine.disks {
            if let Some(bytes) = grown.get(&disk.id) {
                disk.bytes = *bytes;
                // What the agent sends of the smaller disk is refused from then on.
                disk.generation = Generation(disk.generation.0 + 1);
            }
        }
        Ok(machine.clone())
    })?;
    let attached = settle_protected(core, Some(progress), &machine)
        .await
        .map_err(|failure| Failure { help: format!("{}; it is tried again", failure.help), ..failure })?;
    let mut result = protected(&machine, &attached);
    result["grown"] = json!(grown.keys().collect::<Vec<_>>());
    Ok(result)
}

/// Those that grew, with their new sizes.
fn grown(machine: &Machine, found: &[ProbedDisk]) -> Result<BTreeMap<DiskId, u64>, Failure> {
    let mut grown = BTreeMap::new();
    for (disk, now) in machine.disks.iter().zip(found) {
        let refused = |what: String, help: &str| Err(Failure::new(FailureKind::Conflict, what, help));
        if now.bytes < disk.bytes {
            return refused(
                format!(
                    "disk {} shrank from {} to {} bytes, and a replica does not shrink",
                    disk.path, disk.bytes, now.bytes
                ),
                "give it its size back; or take it out of the machine and add it again, its recovery points stay: \
                 `tidemark machine disk remove`, `tidemark machine disk add`",
            );
        }
        if now.bytes > disk.bytes && !disk.bytes.is_multiple_of(BLOCK_BYTES) {
            return refused(
                format!(
                    "disk {} had {} bytes, which is no multiple of {BLOCK_BYTES}: its replica cannot grow",
                    disk.path, disk.bytes
                ),
                "take it out of the machine and add it again, its recovery points stay: `tidemark machine disk remove`, \
                 `tidemark machine disk add`",
            );
        }
        if now.bytes > disk.bytes {
            grown.insert(disk.id, now.bytes);
        }
    }
    Ok(grown)
}

/// Takes over disks that agents say grew, until the server stops.
pub async fn watch(core: Arc<Core>) {
    let mut tried: BTreeMap<(MachineId, u64), Duration> = BTreeMap::new();
    while tokio::time::timeout(LOOK_EVERY, core.stop.cancelled()).await.is_err() {
        let now = core.clock.monotonic_now();
        tried.retain(|_, at| now.saturating_sub(*at) < AGAIN_AFTER);
        for (name, machine, bytes) in noticed(&core) {
            if core.jobs.is_running("disk_resize", &name) || tried.contains_key(&(machine, bytes)) {
                continue;
            }
            tried.insert((machine, bytes), now);
            if let Err(failure) = resize(&core, &name) {
                tracing::warn!(machine = name, %failure, "a disk that grew cannot be taken over");
            }
        }
    }
}

/// Machines of which a disk grew, with the sum of the sizes.
fn noticed(core: &Core) -> Vec<(String, MachineId, u64)> {
    let state = core.store.state();
    let machines = state.machines.values().filter(|machine| refuse_without_source(machine).is_ok());
    machines
        .filter_map(|machine| {
            let Some(Report::Agent(report)) = core.hub.report(PeerId::Agent(machine.host)) else { return None };
            let now = |disk: &MachineDisk| report.disks.iter().find(|source| source.disk == disk.id);
            let bytes =
                |disk: &MachineDisk| now(disk).map_or(disk.bytes, |source| source.current_bytes.max(disk.bytes));
            let (before, after): (u64, u64) =
                machine.disks.iter().fold((0, 0), |(before, after), disk| (before + disk.bytes, after + bytes(disk)));
            (after > before).then(|| (machine.name.clone(), machine.id, after))
        })
        .collect()
}
