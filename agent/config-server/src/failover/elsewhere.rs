//! A home that is not the original one: another host, another folder, or both. New disks are made there, everything crosses once, and
//! from the commit of the failback on the machine is protected there.
//!
//! *Consistency.* The move is one change of what is stored, with raised generations: from then on what the original home sends is
//! refused. The original disks are not written; their host keeps everybody from them until the commit, and then lets go of them.
//! *Retries.* Making a disk that is there, empty, changes nothing. *Cancellation.* A reprotect that is taken back moves the
//! machine back; the new disks stay where they are. *Crash.* Before the move nothing but empty disks is there; after it the reprotect is gone on with.

use std::path::Path;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tidemark_base::{DiskId, HostId};
use tidemark_hypervisor::call::Difference;
use tidemark_proto::control::{AgentCommand, Failure, FailureKind, Via};
use tidemark_proto::failback::{NewDisk, TargetCall};
use uuid::Uuid;

use super::reprotect::{self, LOOK_AGAIN, ReprotectRequest};
use super::state::{Failover, Home, Phase, raise};
use crate::core::{Core, SETTLE, WHOLE_DISK};
use crate::hub::{PeerId, Report};
use crate::jobs::Progress;
use crate::machines::{disks_are_free, settle_agent, settle_agent_as, vanished};
use crate::model::{Machine, MachineDisk, State};
use crate::names::{bad_request, check_path};
use crate::status;

/// Where a machine's disks are, in their order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    pub host: HostId,
    pub paths: Vec<String>,
}

impl Place {
    pub fn of(machine: &Machine) -> Self {
        Self { host: machine.host, paths: machine.disks.iter().map(|disk| disk.path.clone()).collect() }
    }

    /// `is_unknown_there`: its host knows nothing of what the disks of this machine sent until now.
    fn put(&self, machine: &mut Machine, is_unknown_there: bool) {
        if machine.host != self.host {
            // An address of the host that it leaves.
            machine.listen = None;
        }
        machine.host = self.host;
        machine.moved = is_unknown_there;
        machine.disks.iter_mut().zip(&self.paths).for_each(|(disk, path)| disk.path.clone_from(path));
        raise(machine);
    }
}

/// Where it is to go, when that is not where its disks are.
pub fn wanted(core: &Core, machine: &Machine, request: &ReprotectRequest) -> Result<Option<Place>, Failure> {
    let state = core.store.state();
    let host = match &request.to {
        None => machine.host,
        Some(to) => find_host(&state, to)?,
    };
    let paths = match &request.store {
        None => Place::of(machine).paths,
        Some(store) => paths_in(machine, store)?,
    };
    let place = Place { host, paths };
    if place == Place::of(machine) {
        return Ok(None);
    }
    if let Some(failover) = &machine.failover
        && failover.home.is_some()
    {
        let host = state.host_name(machine.host);
        return Err(Failure::new(
            FailureKind::Conflict,
            format!("machine {:?} is on its way home to host {host} already", machine.name),
            "take that back first: `tidemark reprotect cancel NAME`",
        ));
    }
    if !matches!(machine.via, Via::Nbd | Via::Fuse) {
        return Err(Failure::new(
            FailureKind::Conflict,
            format!("the disks of machine {:?} are tracked where others write them: new ones cannot be", machine.name),
            "complete the migration (`tidemark migrate NAME`) and protect it anew where it is to be",
        ));
    }
    let paths: Vec<&str> = place.paths.iter().map(String::as_str).collect();
    disks_are_free(&state, place.host, &paths)?;
    Ok(Some(place))
}

fn find_host(state: &State, to: &str) -> Result<HostId, Failure> {
    let mut found = state.hosts.iter().filter(|(id, host)| host.name == to || id.to_string() == to);
    match (found.next(), found.next()) {
        (Some((id, _)), None) => Ok(*id),
        (Some(_), Some(_)) => Err(bad_request(
            format!("more than one host is called {to:?}"),
            "choose it by its id, as `tidemark status --json` shows it",
        )),
        (None, _) => {
            let known = state.hosts.values().map(|host| host.name.as_str()).collect::<Vec<_>>().join(", ");
            let shown: String = to.chars().take(80).collect();
            Err(Failure::new(FailureKind::NotFound, format!("there is no host {shown:?}"), format!("known: {known}")))
        }
    }
}

fn paths_in(machine: &Machine, store: &str) -> Result<Vec<String>, Failure> {
    check_path(store)?;
    let mut paths = Vec::new();
    for disk in &machine.disks {
        let name = Path::new(&disk.path).file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| bad_request(format!("disk {} has no file name", disk.path), "name no store"))?;
        let path = format!("{}/{name}", store.trim_end_matches('/'));
        check_path(&path)?;
        if paths.contains(&path) {
            return Err(bad_request(
                format!("two disks of machine {:?} are called {name}: they cannot be in one folder", machine.name),
                "leave --store out, or rename one of them before the failover",
            ));
        }
        paths.push(path);
    }
    Ok(paths)
}

/// Disks of a place, as they would be made: they hold what the machine's do where it runs.
pub fn new_disks(machine: &Machine, place: &Place, fresh: bool, difference: &Difference) -> Vec<NewDisk> {
    let data = |of: DiskId| difference.data_bytes.iter().find(|(disk, _)| *disk == of).map_or(0, |(_, bytes)| *bytes);
    let new = |(disk, path): (&MachineDisk, &String)| NewDisk {
        path: path.clone(),
        bytes: disk.bytes,
        fresh,
        data_bytes: data(disk.id),
    };
    machine.disks.iter().zip(&place.paths).map(new).collect()
}

/// Refused by the host of the place where disks cannot be made, or would not fit.
pub async fn refuse_unfit(core: &Core, machine: &Machine, place: &Place, disks: &[NewDisk]) -> Result<(), Failure> {
    let there = Machine { host: place.host, ..machine.clone() };
    reprotect::call(core, &there, &TargetCall::Room { disks: disks.to_vec() }).await.map(drop)
}

/// Makes the new disks, and from then on that is its home.
pub async fn go(
    core: &Core,
    machine: &Machine,
    id: Uuid,
    place: &Place,
    disks: Vec<NewDisk>,
    home: Home,
) -> Result<Machine, Failure> {
    let there = Machine { host: place.host, ..machine.clone() };
    reprotect::call(core, &there, &TargetCall::Make { disks }).await?;
    if place.host == machine.host {
        // One host knows one place of a disk. What only the old disks have stays on them.
        let_go(core, machine).await?;
    }
    let from = Place::of(machine);
    core.store.change(|state| {
        let machine = state.machines.get_mut(&machine.name).ok_or_else(vanished)?;
        let failover = machine.failover.as_mut().filter(|failover| failover.id == id).ok_or_else(vanished)?;
        failover.phase = Phase::Reprotecting;
        failover.home = Some(Home { from: Some(from), ..home });
        place.put(machine, true);
        machine.left.retain(|left| *left != place.host);
        Ok(machine.clone())
    })
}

/// The original place is its home again; nothing of it was written.
pub async fn go_back(core: &Core, machine: &Machine, failover: &Failover) -> Result<Machine, Failure> {
    let Some(from) = failover.home.as_ref().and_then(|home| home.from.clone()) else { return Ok(machine.clone()) };
    if from == Place::of(machine) {
        return Ok(machine.clone());
    }
    if from.host == machine.host {
        let_go(core, machine).await?;
    }
    let left = machine.host;
    let machine = core.store.change(|state| {
        let machine = state.machines.get_mut(&machine.name).ok_or_else(vanished)?;
        // A host that was told to let go of it remembers nothing of its disks; another one kept everything.
        from.put(machine, from.host == left);
        if from.host != left {
            machine.left.retain(|host| *host != from.host);
            machine.left.push(left);
        }
        Ok(machine.clone())
    })?;
    leave(core, &machine).await;
    if let Err(failure) = settle_agent(core, &machine).await {
        tracing::info!(machine = machine.name, %failure, "its home is told when it connects");
    }
    Ok(machine)
}

async fn let_go(core: &Core, machine: &Machine) -> Result<(), Failure> {
    match core.agent_does(machine.host, &AgentCommand::Unprotect(machine.id), SETTLE).await {
        Err(failure) if failure.kind != FailureKind::NotFound => Err(failure),
        _ => Ok(()),
    }
}

/// Tells hosts that the machine does not come back to them; those that are away are told when they connect.
pub async fn leave(core: &Core, machine: &Machine) {
    for host in &machine.left {
        if let Err(failure) = leave_one(core, machine, *host).await {
            tracing::info!(machine = machine.name, %host, %failure, "a host that it left is told when it connects");
        }
    }
}

pub async fn leave_one(core: &Core, machine: &Machine, host: HostId) -> Result<(), Failure> {
    let_go(core, &Machine { host, ..machine.clone() }).await?;
    core.store.change(|state| {
        if let Some(machine) = state.machines.get_mut(&machine.name) {
            machine.left.retain(|left| *left != host);
        }
        Ok(())
    })
}

/// The host of the original disks keeps everybody from them while the machine is on its way to another one.
pub async fn settle_original(core: &Core, machine: &Machine) -> Result<(), Failure> {
    let Some(from) = original(machine) else { return Ok(()) };
    let mut there = machine.clone();
    there.host = from.host;
    there.listen = None;
    there.disks.iter_mut().zip(&from.paths).for_each(|(disk, path)| disk.path.clone_from(path));
    settle_agent_as(core, &there, true, true).await.map(drop)
}

/// Another host than the one that it goes home to.
pub fn original(machine: &Machine) -> Option<&Place> {
    let from = machine.failover.as_ref()?.home.as_ref()?.from.as_ref()?;
    (from.host != machine.host).then_some(from)
}

/// The replica has the history of the original place, so the new disks are compared with it first. Their host knows that they were
/// brought there ([`Machine::moved`]), so that nobody takes it for two histories.
pub async fn settle_in(core: &Core, progress: &Progress, name: &str) -> Result<(), Failure> {
    progress.step("compare the new disks with the replica");
    let began = Instant::now();
    while began.elapsed() < WHOLE_DISK {
        if tokio::time::timeout(LOOK_AGAIN, core.stop.cancelled()).await.is_ok() {
            break;
        }
        let status = status::of(core, name).await?;
        if let Some(scan) = &status.progress {
            progress.done(scan.done_bytes, scan.total_bytes);
        }
        watch(core)?;
        let machine = core.machine(name)?;
        let is_compared = !machine.moved && status.state == status::State::Protected;
        if is_compared || machine.failover.is_some() {
            break;
        }
    }
    Ok(())
}

/// Looks whether hosts that machines were brought to had something acknowledged. From then on a history that differs is an alarm.
pub fn watch(core: &Core) -> Result<(), Failure> {
    let state = core.store.state();
    let arrived: Vec<&str> = state
        .machines
        .values()
        .filter(|machine| machine.moved && has_sent(core, machine))
        .map(|machine| &*machine.name)
        .collect();
    if arrived.is_empty() {
        return Ok(());
    }
    core.store.change(|state| {
        for name in &arrived {
            if let Some(machine) = state.machines.get_mut(*name) {
                machine.moved = false;
            }
        }
        Ok(())
    })
}

fn has_sent(core: &Core, machine: &Machine) -> bool {
    let Some(Report::Agent(report)) = core.hub.report(PeerId::Agent(machine.host)) else { return false };
    machine.disks.iter().all(|disk| {
        let mut ours = report.disks.iter().filter(|source| source.disk == disk.id).peekable();
        ours.peek().is_some() && ours.all(|source| !source.durable.is_empty())
    })
}
