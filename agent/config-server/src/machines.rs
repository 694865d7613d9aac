//! Protecting machines, and letting go of them.
//!
//! What is wanted is durable first; then each side is told. A side that cannot be reached is told when it comes back.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tidemark_base::{Clock, DiskId, Generation, HostId, MachineId, ServerId};
use tidemark_proto::control::{
    AgentCommand, AttachedDisk, DISKS_MAX, Endpoint, Failure, FailureKind, MachineGrant, MachineSpec, ProbedDisk,
    Reply, ServerCommand, Via,
};

use crate::consumers;
use crate::core::{Core, QUICK, SETTLE, Side};
use crate::failover::drill::refuse_drilled;
use crate::failover::elsewhere::leave_one;
use crate::failover::rights;
use crate::failover::state::refuse_failed_over;
use crate::groups;
use crate::hub::{PeerId, unexpected};
use crate::jobs::{Job, Progress};
use crate::model::{DEFAULT_POLICY, Encryption, Machine, MachineDisk, State, Wanted};
use crate::names::{bad_request, check_disk, check_name};
use crate::room;
use crate::status::{self, CLOCK_OFF_SECONDS_MAX, ProcessServerStatus};

/// Between two looks at how far a resync is.
const LOOK: Duration = Duration::from_secs(1);
/// As a request says that a machine is in no group.
const NO_GROUP: &str = "none";
/// How many versions apart agents, process servers and configuration servers work together.
const VERSIONS_APART_MAX: u64 = 2;

#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProtectRequest {
    pub name: String,
    /// Full paths on the host.
    pub disks: Vec<String>,
    #[serde(default)]
    pub host: Option<String>,
    #[serde(default)]
    pub process_server: Option<String>,
    /// Instead of `process_server`: all that get its changes, each with a replica of its own. The first is the one that others stand in
    /// for.
    #[serde(default)]
    pub process_servers: Vec<String>,
    #[serde(default)]
    pub policy: Option<String>,
    /// The group that it comes into; absent: as before, and `none`: no group.
    #[serde(default)]
    pub group: Option<String>,
    /// Where the host serves the disks over TLS as well: IP:PORT, or `none`. Absent: as before.
    #[serde(default)]
    pub listen: Option<String>,
    /// How changes are captured: `nbd` (the workload writes through the agent), `fuse` (the same, as to a file), `bpf` (block
    /// devices, the kernel tells what changed), `hrl` (VHDX and VHD disks of Hyper-V, by the logs that it keeps beside them),
    /// `qemu` (disks of a machine that runs under QEMU: images, or SOCKET/NODE), `vsphere` (disks of a machine on VMware:
    /// vsphere:CONNECTION/MACHINE/DISK) or `rct` (VHDX disks of a machine of Hyper-V, which tracks what changed). Absent: as
    /// before, or `nbd`.
    #[serde(default)]
    pub via: Option<String>,
    /// Of `disks`, those that are left out.
    #[serde(default)]
    pub exclude: Vec<String>,
    /// Whether to look only: the job's result says what is in the way.
    #[serde(default)]
    pub check_only: bool,
}

impl ProtectRequest {
    /// About a machine that is protected.
    pub fn again(name: &str, disks: Vec<String>) -> Self {
        Self {
            name: name.to_owned(),
            disks,
            host: None,
            process_server: None,
            process_servers: Vec::new(),
            policy: None,
            group: None,
            listen: None,
            via: None,
            exclude: Vec::new(),
            check_only: false,
        }
    }

    fn via(&self) -> Result<Option<Via>, Failure> {
        let Some(name) = self.via.as_deref() else { return Ok(None) };
        let unknown = || {
            let shown: String = name.chars().take(200).collect();
            bad_request(
                format!("{shown:?} is no way to capture changes"),
                "name `nbd`, `bpf`, `fuse`, `hrl`, `qemu`, `vsphere` or `rct`",
            )
        };
        Via::named(name).map(Some).ok_or_else(unknown)
    }

    /// The inner `None` ends it.
    fn listen(&self) -> Result<Option<Option<SocketAddr>>, Failure> {
        match self.listen.as_deref() {
            None => Ok(None),
            Some("none") => Ok(Some(None)),
            Some(text) => Ok(Some(Some(listen_address(text, "give IP:PORT, or `none`; port 0 takes any")?))),
        }
    }
}

pub fn listen_address(text: &str, help: &'static str) -> Result<SocketAddr, Failure> {
    text.parse().map_err(|_| bad_request(format!("{text:?} is no address to listen on"), help))
}

/// Starts the job that protects a machine. Protecting the same again is no change, and answers with the same addresses.
pub fn protect(core: &Arc<Core>, mut request: ProtectRequest) -> Result<Job, Failure> {
    check_name("machine", &request.name)?;
    if let Some(unknown) = request.exclude.iter().find(|path| !request.disks.contains(path)) {
        let shown: String = unknown.chars().take(200).collect();
        return Err(bad_request(
            format!("disk {shown:?} is left out, and not among those that are named"),
            "leave out disks by the paths that they are named with",
        ));
    }
    let excluded = std::mem::take(&mut request.exclude);
    request.disks.retain(|path| !excluded.contains(path));
    if request.disks.is_empty() {
        return Err(bad_request(format!("machine {:?} has no disks", request.name), "name at least one disk"));
    }
    if request.disks.len() > DISKS_MAX {
        return Err(bad_request(
            format!("{} disks are too many for one machine", request.disks.len()),
            format!("name at most {DISKS_MAX}"),
        ));
    }
    check_disks(&request.disks)?;
    request.listen()?;
    request.via()?;
    let state = core.store.state();
    let policy = request.policy.as_deref().unwrap_or(DEFAULT_POLICY);
    find_policy(&state, policy)?;
    if let Some(group) = request.group.as_deref().filter(|group| *group != NO_GROUP) {
        groups::find(&state, group)?;
    }
    if request.process_server.is_some() && !request.process_servers.is_empty() {
        return Err(bad_request("process servers are named in two ways", "name all of them in `process_servers`"));
    }
    let named: Vec<&String> = request.process_server.iter().chain(&request.process_servers).collect();
    // Its places are known, also while they are not connected.
    let known = state.machines.get(&request.name);
    let host = match known {
        Some(machine) if request.host.is_none() => machine.host,
        _ => pick_host(core, request.host.as_deref())?,
    };
    let servers = match known {
        Some(machine) if named.is_empty() => machine.servers().collect(),
        _ => consumers::pick(core, &named)?,
    };
    let (core, name) = (core.clone(), request.name.clone());
    core.jobs.clone().start_or_check("protect", Some(&name), request.check_only, |progress| async move {
        let _lock = core.lock(&request.name).await;
        run_protect(&core, &progress, request, host, servers).await
    })
}

async fn run_protect(
    core: &Core,
    progress: &Progress,
    request: ProtectRequest,
    host: HostId,
    servers: Vec<ServerId>,
) -> Result<Value, Failure> {
    progress.step("check what is needed");
    let Preflight { checks, disks: probed } = preflight(core, &request, host, &servers).await;
    if request.check_only {
        return Ok(json!({ "machine": request.name, "checks": checks }));
    }
    refuse_failing(&checks)?;
    let paths: Vec<&str> = probed.iter().map(|disk| disk.path.as_str()).collect();

    let existing = core.store.state().machines.get(&request.name).cloned();
    if let Some(machine) = existing {
        consumers::refuse_others(&machine, &servers)?;
        let again = protect_again(core, progress, &request, &paths, machine, host).await;
        return again.map(|answer| with_warnings(answer, &checks));
    }
    let machine = Machine {
        id: MachineId::random(),
        name: request.name.clone(),
        host,
        server: servers[0],
        others: servers[1..].to_vec(),
        leaving: Vec::new(),
        policy: request.policy.clone().unwrap_or_else(|| DEFAULT_POLICY.to_owned()),
        disks: probed
            .iter()
            .enumerate()
            .map(|(index, disk)| MachineDisk {
                id: DiskId::random(),
                path: disk.path.clone(),
                export: format!("{}-{index}", request.name),
                bytes: disk.bytes,
                generation: Generation::FIRST,
                added: false,
            })
            .collect(),
        wanted: Wanted::Protected,
        created: core.clock.wall_now(),
        listen: request.listen()?.flatten(),
        description: None,
        drills: Vec::new(),
        left: Vec::new(),
        ended: Vec::new(),
        moved: false,
        failover: None,
        group: request.group.clone().filter(|group| group != NO_GROUP),
        via: request.via()?.unwrap_or_default(),
    };
    core.store.change(|state| {
        find_policy(state, &machine.policy)?;
        if let Some(group) = &machine.group {
            groups::has_room(state, group)?;
        }
        disks_are_free(state, host, &paths)?;
        state.machines.insert(machine.name.clone(), machine.clone());
        Ok(())
    })?;
    match settle_protected(core, Some(progress), &machine).await {
        Ok(attached) => Ok(with_warnings(protected(&machine, &attached), &checks)),
        Err(failure) => {
            progress.step("undo");
            // What cannot be undone now is undone when the side that is away comes back.
            if let Err(left) = unprotect_and_settle(core, None, &machine.name, true).await {
                tracing::warn!(machine = machine.name, error = %left, "undoing a failed protect is not complete yet");
            }
            Err(failure)
        }
    }
}

/// One prerequisite of a protection.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// `host`, `process_server`, `room`, `version`, `clock`, `disk`.
    check: &'static str,
    of: String,
    ok: bool,
    /// What is not in the way and should be known.
    warning: Option<String>,
    error: Option<String>,
    help: Option<String>,
    #[serde(skip)]
    failure: Option<Failure>,
}

impl Check {
    fn new(check: &'static str, of: impl Into<String>, outcome: Result<(), Failure>) -> Self {
        let failure = outcome.err();
        Self {
            check,
            of: of.into(),
            ok: failure.is_none(),
            warning: None,
            error: failure.as_ref().map(|failure| failure.message.clone()),
            help: failure.as_ref().map(|failure| failure.help.clone()),
            failure,
        }
    }
}

pub struct Preflight {
    pub checks: Vec<Check>,
    /// Those that were found, in order; all of them where no check of a disk failed.
    pub disks: Vec<ProbedDisk>,
}

/// Looks at everything that a protection needs, and touches nothing.
pub async fn preflight(core: &Core, request: &ProtectRequest, host: HostId, servers: &[ServerId]) -> Preflight {
    let mut checks = Vec::new();
    let mut volumes = Vec::new();
    let connected = core.hub.connected();
    let present = |peer: PeerId| connected.iter().any(|(known, _)| *known == peer);
    let agent = PeerId::Agent(host);
    let state = core.store.state();
    let policy = request.policy.as_deref().or(state.machines.get(&request.name).map(|known| known.policy.as_str()));
    let policy = state.policies.get(policy.unwrap_or(DEFAULT_POLICY));
    // Asking who is away would only wait for the same answer.
    let asked = core.agent(host, &AgentCommand::Status, QUICK).await.map(drop);
    checks.push(Check::new("host", host.to_string(), asked));
    for server in servers {
        let asked = core.server(*server, &ServerCommand::Status, QUICK).await;
        let encrypted = match &asked {
            Ok(Reply::Server(report)) => {
                volumes.extend(report.volume.map(|volume| (*server, volume)));
                Some(report.storage_encrypted)
            }
            _ => None,
        };
        checks.push(Check::new("process_server", server.to_string(), asked.map(drop)));
        if let Some(encrypted) = encrypted
            && policy.is_some_and(|policy| policy.encryption == Encryption::AtRest)
        {
            checks.push(Check::new("encryption", server.to_string(), is_encrypted(&server.to_string(), encrypted)));
        }
    }
    let peers = [agent].into_iter().chain(servers.iter().map(|server| PeerId::ProcessServer(*server)));
    for peer in peers.filter(|peer| present(*peer)) {
        let software = core.hub.software(peer).unwrap_or_default();
        checks.push(Check::new("version", peer.to_string(), version_fits(peer, &software)));
        let ahead = core.hub.clock_ahead_seconds(peer);
        let clock = match ahead.unsigned_abs() <= CLOCK_OFF_SECONDS_MAX {
            true => Ok(()),
            false => Err(Failure::new(
                FailureKind::Conflict,
                format!("the clock of {peer} is {} s off the configuration server's", ahead.unsigned_abs()),
                "set the clock that is wrong; NTP on both does",
            )),
        };
        checks.push(Check::new("clock", peer.to_string(), clock));
    }
    let via = state.machines.get(&request.name).map(|known| known.via);
    let via = request.via().ok().flatten().or(via).unwrap_or_default();
    let mut disks = Vec::new();
    if present(agent) {
        // An already attached disk is exclusively open at its agent, which answers for it as well.
        let probes = request.disks.iter().map(|path| async move {
            let probe = AgentCommand::Probe { paths: vec![path.clone()], via };
            match core.agent(host, &probe, SETTLE).await {
                Ok(Reply::Probed(mut disks)) if disks.len() == 1 => Ok(disks.remove(0)),
                Ok(other) => Err(unexpected(PeerId::Agent(host), &other)),
                Err(failure) => Err(failure),
            }
        });
        let probed = futures_util::future::join_all(probes).await;
        let state = core.store.state();
        for (path, outcome) in request.disks.iter().zip(probed) {
            let of_others = outcome.and_then(|disk| {
                let mut others = State::clone(&state);
                others.machines.remove(&request.name);
                disks_are_free(&others, host, &[disk.path.as_str()]).map(|()| disk)
            });
            let warning = of_others.as_ref().ok().and_then(room::log_warning);
            let check = Check::new("disk", path, of_others.map(|disk| disks.push(disk)));
            checks.push(Check { warning, ..check });
        }
    }
    let own = |disk: &&ProbedDisk| {
        let known = state.machines.get(&request.name);
        known.is_some_and(|known| known.disks.iter().any(|known| known.path == disk.path))
    };
    let new: Vec<ProbedDisk> = disks.iter().filter(|disk| !own(disk)).cloned().collect();
    for (server, volume) in volumes {
        let name = state.server_name(server);
        let check = Check::new("room", server.to_string(), room::check_volume(&name, volume));
        let warning = room::volume_warning(&name, volume, &new).filter(|_| check.ok);
        checks.push(Check { warning, ..check });
    }
    Preflight { checks, disks }
}

/// Whether a process server's volume is as a policy with encryption at rest wants it.
pub fn is_encrypted(server: &str, encrypted: Option<bool>) -> Result<(), Failure> {
    let what = match encrypted {
        Some(true) => return Ok(()),
        Some(false) => "is not encrypted",
        None => "is none of which the kernel tells whether it is encrypted",
    };
    Err(Failure::new(
        FailureKind::Conflict,
        format!("the volume of process server {server} {what}, and the policy wants encryption at_rest"),
        "put its folder on a LUKS (dm-crypt) volume, choose another process server, or another policy",
    ))
}

/// Two versions apart work together; a development build has no version to compare.
fn version_fits(peer: PeerId, software: &str) -> Result<(), Failure> {
    let minor = |text: &str| -> Option<(u64, u64)> {
        let mut parts = text.split('.');
        Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
    };
    match (minor(software), minor(env!("CARGO_PKG_VERSION"))) {
        (Some((major, theirs)), Some((ours_major, ours)))
            if major != ours_major || theirs.abs_diff(ours) > VERSIONS_APART_MAX =>
        {
            Err(Failure::new(
                FailureKind::Conflict,
                format!("{peer} runs version {software}, this configuration server {}", env!("CARGO_PKG_VERSION")),
                "bring them within two versions of each other, process servers and configuration server first",
            ))
        }
        _ => Ok(()),
    }
}

/// A job's result, with what should be known.
pub fn with_warnings(mut result: Value, checks: &[Check]) -> Value {
    let warnings: Vec<&String> = checks.iter().filter_map(|check| check.warning.as_ref()).collect();
    result["warnings"] = json!(warnings);
    result
}

/// One failure for all that is in the way.
pub fn refuse_failing(checks: &[Check]) -> Result<(), Failure> {
    let failing: Vec<&Failure> = checks.iter().filter_map(|check| check.failure.as_ref()).collect();
    match failing.as_slice() {
        [] => Ok(()),
        [failure] => Err((*failure).clone()),
        all => {
            let list = |part: fn(&Failure) -> &str| {
                let numbered = (1..).zip(all).map(|(number, failure)| format!("{number}. {}", part(failure)));
                numbered.collect::<Vec<_>>().join("; ")
            };
            let message = format!("{} things are in the way: {}", all.len(), list(|failure| &failure.message));
            Err(Failure::new(all[0].kind, message, list(|failure| &failure.help)))
        }
    }
}

async fn protect_again(
    core: &Core,
    progress: &Progress,
    request: &ProtectRequest,
    paths: &[&str],
    mut machine: Machine,
    host: HostId,
) -> Result<Value, Failure> {
    let conflict = |what: String, help: &str| Err(Failure::new(FailureKind::Conflict, what, help));
    if matches!(machine.wanted, Wanted::Unprotected { .. }) {
        return conflict(
            format!("machine {:?} is just being unprotected", machine.name),
            "wait until it is gone from `tidemark status`, or choose another name",
        );
    }
    let same_disks =
        machine.host == host && machine.disks.iter().map(|disk| disk.path.as_str()).eq(paths.iter().copied());
    if !same_disks {
        return conflict(
            format!("machine {:?} is protected already, with other disks", machine.name),
            "add and remove disks with `tidemark machine disk add` and `tidemark machine disk remove`, or choose another name",
        );
    }
    if let Some(via) = request.via()?
        && via != machine.via
    {
        return conflict(
            format!("machine {:?} is protected already, via {}", machine.name, machine.via.name()),
            "unprotect it first: `tidemark unprotect NAME`",
        );
    }
    if let Some(policy) = &request.policy
        && *policy != machine.policy
    {
        machine = core.store.change(|state| {
            find_policy(state, policy)?;
            let machine = state.machines.get_mut(&machine.name).ok_or_else(vanished)?;
            machine.policy = policy.clone();
            Ok(machine.clone())
        })?;
    }
    if let Some(group) = request.group.as_deref()
        && machine.group.as_deref().unwrap_or(NO_GROUP) != group
    {
        let group = Some(group.to_owned()).filter(|group| group != NO_GROUP);
        machine = core.store.change(|state| {
            if let Some(group) = &group {
                groups::has_room(state, group)?;
            }
            let machine = state.machines.get_mut(&machine.name).ok_or_else(vanished)?;
            machine.group = group;
            Ok(machine.clone())
        })?;
    }
    if let Some(listen) = request.listen()?
        && listen != machine.listen
    {
        machine = core.store.change(|state| {
            let machine = state.machines.get_mut(&machine.name).ok_or_else(vanished)?;
            machine.listen = listen;
            Ok(machine.clone())
        })?;
    }
    let attached = settle_protected(core, Some(progress), &machine).await?;
    Ok(protected(&machine, &attached))
}

/// Makes both sides do what is wanted of a protected or paused machine. May be repeated.
pub async fn settle_protected(
    core: &Core,
    progress: Option<&Progress>,
    machine: &Machine,
) -> Result<Vec<AttachedDisk>, Failure> {
    if let Some(progress) = progress {
        progress.step("authorise its host at the process server");
    }
    settle_server(core, machine).await?;
    if let Some(progress) = progress {
        progress.step("attach the disks at the agent");
    }
    settle_agent(core, machine).await
}

/// Tells every process server of the machine. One of several that cannot be reached is told when it comes back: the others, and the
/// source, do not wait for it.
pub async fn settle_server(core: &Core, machine: &Machine) -> Result<(), Failure> {
    let outcome = async {
        let state = core.store.state();
        let grant = MachineGrant {
            machine: machine.id,
            name: machine.name.clone(),
            host: machine.host,
            disks: machine.disks.iter().map(MachineDisk::spec).collect(),
            retention: find_policy(&state, &machine.policy)?.retention(),
        };
        let command = ServerCommand::Authorise(grant);
        let told = machine.servers().map(|server| core.server_does(server, &command, SETTLE));
        let told: Vec<Result<(), Failure>> = futures_util::future::join_all(told).await;
        note_taken_over(core, machine, &told).await;
        if let Some(taken) = core.taken_over(machine.id) {
            return Err(taken);
        }
        let mut told = told.into_iter();
        let first = told.next().unwrap_or(Ok(()));
        first.and(told.filter(|told| !matches!(told, Err(failure) if is_away(failure))).collect())
    }
    .await;
    core.settled(machine.id, Side::Server, outcome.as_ref().err());
    outcome
}

/// Whether one of them refuses because the machine failed over without us. Who is away says nothing of it.
async fn note_taken_over(core: &Core, machine: &Machine, told: &[Result<(), Failure>]) {
    for (server, told) in machine.servers().zip(told) {
        let is_refused = matches!(told, Err(failure) if failure.kind == FailureKind::Conflict);
        if machine.failover.is_none() && is_refused {
            let taken = rights::taken_over(core, machine, server).await;
            return core.note_taken_over(machine.id, taken);
        }
    }
    if told.iter().all(Result::is_ok) {
        core.note_taken_over(machine.id, None);
    }
}

fn is_away(failure: &Failure) -> bool {
    matches!(failure.kind, FailureKind::Unavailable | FailureKind::TimedOut)
}

pub async fn settle_agent(core: &Core, machine: &Machine) -> Result<Vec<AttachedDisk>, Failure> {
    let (paused, fenced) = (machine.is_source_paused(), machine.is_source_fenced());
    let outcome = settle_agent_as(core, machine, paused, fenced).await;
    core.settled(machine.id, Side::Agent, outcome.as_ref().err());
    outcome
}

/// Tells the machine's host what it is to do with it.
pub async fn settle_agent_as(
    core: &Core,
    machine: &Machine,
    paused: bool,
    fenced: bool,
) -> Result<Vec<AttachedDisk>, Failure> {
    let state = core.store.state();
    let endpoint = |server: ServerId| {
        let known = state.servers.get(&server).ok_or_else(|| {
            Failure::new(
                FailureKind::Unavailable,
                format!("process server {server} has never connected"),
                "start it; the machine is attached as soon as it connects",
            )
        })?;
        Ok::<_, Failure>(Endpoint { server, address: known.address.clone() })
    };
    let spec = MachineSpec {
        machine: machine.id,
        name: machine.name.clone(),
        disks: machine.disks.iter().map(MachineDisk::spec).collect(),
        policy: find_policy(&state, &machine.policy)?.replication(),
        server: endpoint(machine.server)?,
        others: machine.others.iter().map(|server| endpoint(*server)).collect::<Result<_, _>>()?,
        paused,
        listen: machine.listen,
        fenced,
        via: machine.via,
        moved: machine.moved,
    };
    match core.agent(machine.host, &AgentCommand::Protect(Box::new(spec)), SETTLE).await? {
        Reply::Attached(disks) => Ok(disks),
        other => Err(unexpected(PeerId::Agent(machine.host), &other)),
    }
}

/// What `protect` answers.
pub fn protected(machine: &Machine, attached: &[AttachedDisk]) -> Value {
    let disks: Vec<Value> = machine
        .disks
        .iter()
        .map(|disk| {
            let attach = attached.iter().find(|attached| attached.id == disk.id);
            json!({
                "id": disk.id,
                "path": disk.path,
                "bytes": disk.bytes,
                "attach": {
                    "nbd": attach.and_then(|attach| attach.nbd.as_deref()),
                    "nbds": attach.and_then(|attach| attach.nbds.as_deref()),
                    "file": attach.and_then(|attach| attach.file.as_deref()),
                },
            })
        })
        .collect();
    json!({ "machine": machine.name, "id": machine.id, "disks": disks })
}

/// With `delete_replica` its points go as well: refused where one is locked or served, unless `force`.
pub fn unprotect(core: &Arc<Core>, name: &str, delete_replica: bool, force: bool) -> Result<Job, Failure> {
    let machine = core.machine(name)?;
    refuse_failed_over(&machine)?;
    refuse_drilled(core, &machine)?;
    let (core, name) = (core.clone(), name.to_owned());
    core.jobs.clone().start("unprotect", Some(&name.clone()), |progress| async move {
        let _lock = core.lock(&name).await;
        if delete_replica && !force {
            progress.step("see whether a point of it is locked or served");
            let machine = core.machine(&name)?;
            for server in machine.servers() {
                crate::kept::refuse_needed(&core, &machine.clone().about(server)).await?;
            }
        }
        unprotect_and_settle(&core, Some(&progress), &name, delete_replica).await?;
        Ok(json!({ "machine": name }))
    })
}

async fn unprotect_and_settle(
    core: &Core,
    progress: Option<&Progress>,
    name: &str,
    delete_replica: bool,
) -> Result<(), Failure> {
    core.store.change(|state| {
        let machine = state.machines.get_mut(name).ok_or_else(vanished)?;
        if !matches!(machine.wanted, Wanted::Unprotected { .. }) {
            machine.wanted = Wanted::Unprotected { delete_replica, agent_done: false, server_done: false };
        }
        Ok(())
    })?;
    settle_unprotected(core, progress, name).await
}

/// Tells the sides that have not let go yet; the machine is gone once both have.
pub async fn settle_unprotected(core: &Core, progress: Option<&Progress>, name: &str) -> Result<(), Failure> {
    let machine = core.machine(name)?;
    let Wanted::Unprotected { delete_replica, agent_done, server_done } = machine.wanted else {
        return Ok(());
    };
    let mut failed = None;
    if !agent_done {
        if let Some(progress) = progress {
            progress.step("detach the disks at the agent");
        }
        let told = core.agent_does(machine.host, &AgentCommand::Unprotect(machine.id), SETTLE).await;
        note_let_go(core, &machine, Side::Agent, told, &mut failed)?;
    }
    for host in machine.left.clone() {
        if let Err(failure) = leave_one(core, &machine, host).await {
            failed.get_or_insert(failure);
        }
    }
    if !server_done {
        if let Some(progress) = progress {
            progress.step("close the replica at the process server");
        }
        // Those that were left before are not waited for: one may be gone for good.
        if let Err(failure) = consumers::settle_leaving(core, &machine).await {
            tracing::warn!(machine = name, %failure, "a process server that was left does not know it");
        }
        let mut told = Ok(());
        for server in machine.servers() {
            told = told.and(consumers::let_go(core, &machine, server, delete_replica).await);
        }
        note_let_go(core, &machine, Side::Server, told, &mut failed)?;
    }
    if let Some(failure) = failed {
        return Err(failure);
    }
    core.settled(machine.id, Side::Agent, None);
    core.settled(machine.id, Side::Server, None);
    core.store.change(|state| {
        if let Some(machine) = state.machines.remove(name)
            && !delete_replica
        {
            crate::kept::keep(core, state, machine);
        }
        Ok(())
    })
}

fn note_let_go(
    core: &Core,
    machine: &Machine,
    side: Side,
    told: Result<(), Failure>,
    failed: &mut Option<Failure>,
) -> Result<(), Failure> {
    match told {
        // A side that does not know the machine has let go of it.
        Err(failure) if failure.kind != FailureKind::NotFound => {
            core.settled(machine.id, side, Some(&failure));
            failed.get_or_insert(Failure {
                help: format!("{}; it is done as soon as that is possible", failure.help),
                ..failure
            });
            Ok(())
        }
        _ => core.store.change(|state| {
            let machine = state.machines.get_mut(&machine.name).ok_or_else(vanished)?;
            if let Wanted::Unprotected { agent_done, server_done, .. } = &mut machine.wanted {
                match side {
                    Side::Agent => *agent_done = true,
                    Side::Server => *server_done = true,
                }
            }
            Ok(())
        }),
    }
}

pub fn pause_or_resume(core: &Arc<Core>, name: &str, pause: bool) -> Result<Job, Failure> {
    core.machine(name)?;
    let (core, name) = (core.clone(), name.to_owned());
    let kind = if pause { "pause" } else { "resume" };
    core.jobs.clone().start(kind, Some(&name.clone()), |progress| async move {
        let _lock = core.lock(&name).await;
        let want = |wanted: Wanted| {
            core.store.change(|state| {
                let machine = state.machines.get_mut(&name).ok_or_else(vanished)?;
                refuse_without_source(machine)?;
                let before = std::mem::replace(&mut machine.wanted, wanted);
                Ok((machine.clone(), before))
            })
        };
        let (machine, before) = want(if pause { Wanted::Paused } else { Wanted::Protected })?;
        progress.step("tell the agent");
        let command = if pause { AgentCommand::Pause(machine.id) } else { AgentCommand::Resume(machine.id) };
        match core.agent_does(machine.host, &command, QUICK).await {
            Ok(_) => Ok(json!({ "machine": name })),
            // Not later, when nobody thinks of it any more: a machine must not be without protection unawares. An agent that
            // did pause is told again when it is back.
            Err(failure) if pause => {
                want(before)?;
                let help = format!("it was not paused and is not going to be; {}", failure.help);
                Err(Failure { help, ..failure })
            }
            Err(failure) => {
                let help = format!("it goes on as soon as the agent is back; {}", failure.help);
                Err(Failure { help, ..failure })
            }
        }
    })
}

/// Compares the whole disks with their replicas; the job ends when that is done, which a pause puts off. Cancelled, it takes
/// the resync back.
pub fn resync(core: &Arc<Core>, name: &str) -> Result<Job, Failure> {
    refuse_without_source(&core.machine(name)?)?;
    let (core, name) = (core.clone(), name.to_owned());
    core.jobs.clone().start("resync", Some(&name.clone()), move |progress| async move {
        let lock = core.lock(&name).await;
        let machine = core.machine(&name)?;
        refuse_without_source(&machine)?;
        // A source that a process server refuses would be waited for in vain.
        match settle_server(&core, &machine).await {
            Err(failure) if !is_away(&failure) => return Err(failure),
            _ => {}
        }
        progress.step("tell the agent");
        core.agent_does(machine.host, &AgentCommand::Resync(machine.id), QUICK).await?;
        drop(lock);
        let id = machine.id;
        let mut unfinished = Unfinished { core: core.clone(), machine: Some(machine) };
        progress.step("compare with the replica");
        let mut looks = tokio::time::interval(LOOK);
        loop {
            looks.tick().await;
            let status = status::of(&core, &name).await?;
            let machine = core.machine(&name)?;
            if machine.id != id {
                return Err(vanished());
            }
            // Else it would wait for a source that is fenced.
            refuse_failed_over(&machine)?;
            // One that is away beside others is compared when it comes back.
            let there = || status.process_servers.iter().filter(|server| server.state != status::State::Disconnected);
            let is_done =
                |server: &ProcessServerStatus| server.progress.is_none() && server.state == status::State::Protected;
            if there().all(is_done) && there().next().is_some() {
                unfinished.machine = None;
                return Ok(json!({ "machine": name, "compare": status.compare }));
            }
            if let Some(scan) = there().find_map(|server| server.progress) {
                progress.done(scan.done_bytes, scan.total_bytes);
            }
        }
    })
}

/// A resync whose job is given up is taken back.
struct Unfinished {
    core: Arc<Core>,
    machine: Option<Machine>,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        let Some(machine) = self.machine.take() else { return };
        let core = self.core.clone();
        // At the end of the process there is no runtime, and the resync goes on.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                let command = AgentCommand::CancelResync(machine.id);
                if let Err(failure) = core.agent_does(machine.host, &command, QUICK).await {
                    tracing::warn!(machine = machine.name, %failure, "a resync could not be taken back");
                }
            });
        }
    }
}

/// What only a resync asked for is not read; old recovery points and what is replicated meanwhile stay as they are.
pub fn cancel_resync(core: &Arc<Core>, name: &str) -> Result<Job, Failure> {
    refuse_without_source(&core.machine(name)?)?;
    let (core, name) = (core.clone(), name.to_owned());
    core.jobs.clone().start("cancel_resync", Some(&name.clone()), |progress| async move {
        let _lock = core.lock(&name).await;
        let machine = core.machine(&name)?;
        refuse_without_source(&machine)?;
        progress.step("tell the agent");
        core.agent_does(machine.host, &AgentCommand::CancelResync(machine.id), QUICK).await?;
        core.jobs.cancel_all("resync", &name);
        Ok(json!({ "machine": name }))
    })
}

/// Each is a path, and is named once.
pub fn check_disks(paths: &[String]) -> Result<(), Failure> {
    paths.iter().try_for_each(|path| check_disk(path))?;
    let mut seen = BTreeSet::new();
    match paths.iter().find(|path| !seen.insert(path.as_str())) {
        Some(twice) => Err(bad_request(format!("disk {twice} is named twice"), "name each disk once")),
        None => Ok(()),
    }
}

pub fn refuse_unprotected(machine: &Machine) -> Result<(), Failure> {
    match machine.wanted {
        Wanted::Unprotected { .. } => Err(Failure::new(
            FailureKind::Conflict,
            format!("machine {:?} is just being unprotected", machine.name),
            "protect it again when it is gone from `tidemark status`",
        )),
        _ => Ok(()),
    }
}

/// What needs a source that replicates, or will.
pub fn refuse_without_source(machine: &Machine) -> Result<(), Failure> {
    refuse_unprotected(machine)?;
    refuse_failed_over(machine)
}

pub fn vanished() -> Failure {
    Failure::new(FailureKind::NotFound, "the machine was unprotected meanwhile", "see `tidemark status`")
}

pub fn find_policy<'a>(state: &'a State, name: &str) -> Result<&'a crate::model::Policy, Failure> {
    state.policies.get(name).ok_or_else(|| {
        let shown: String = name.chars().take(80).collect();
        Failure::new(
            FailureKind::NotFound,
            format!("there is no policy {shown:?}"),
            "see `tidemark policy list`, or create it with `tidemark policy create`",
        )
    })
}

pub fn disks_are_free(state: &State, host: HostId, paths: &[&str]) -> Result<(), Failure> {
    for machine in state.machines.values().filter(|machine| machine.host == host) {
        if let Some(disk) = machine.disks.iter().find(|disk| paths.contains(&disk.path.as_str())) {
            return Err(Failure::new(
                FailureKind::Conflict,
                format!("disk {} is protected already, as part of machine {:?}", disk.path, machine.name),
                "a disk belongs to one machine: unprotect that one first, or leave the disk out",
            ));
        }
    }
    Ok(())
}

fn pick_host(core: &Core, wanted: Option<&str>) -> Result<HostId, Failure> {
    let hosts = core.store.state().hosts.iter().map(|(id, host)| (*id, host.name.clone())).collect();
    pick("host", "--host", hosts, wanted, |id: &HostId| id.to_string())
}

pub fn pick_server(core: &Core, wanted: Option<&str>) -> Result<ServerId, Failure> {
    let servers = core.store.state().servers.iter().map(|(id, server)| (*id, server.name.clone())).collect();
    pick("process server", "--process-server", servers, wanted, |id: &ServerId| id.to_string())
}

/// The one that is named, or the only one.
fn pick<I: Copy>(
    what: &str,
    flag: &str,
    known: Vec<(I, String)>,
    wanted: Option<&str>,
    id_text: impl Fn(&I) -> String,
) -> Result<I, Failure> {
    let names = known.iter().map(|(_, name)| name.as_str()).collect::<Vec<_>>().join(", ");
    let matching: Vec<_> = match wanted {
        None => known.iter().collect(),
        Some(wanted) => known.iter().filter(|(id, name)| name == wanted || id_text(id) == wanted).collect(),
    };
    match (matching.as_slice(), wanted) {
        ([(id, _)], _) => Ok(*id),
        ([], None) => Err(Failure::new(
            FailureKind::Unavailable,
            format!("no {what} has connected yet"),
            format!(
                "start one, for example with `tidemark {} run`",
                if what == "host" { "agent" } else { "process-server" }
            ),
        )),
        ([], Some(wanted)) => Err(Failure::new(
            FailureKind::NotFound,
            format!("there is no {what} {:?}", wanted.chars().take(80).collect::<String>()),
            format!("known: {names}"),
        )),
        (_, None) => {
            Err(bad_request(format!("there is more than one {what}"), format!("choose one with {flag}: {names}")))
        }
        (_, Some(wanted)) => Err(bad_request(
            format!("more than one {what} is called {wanted:?}"),
            format!("choose it by its id with {flag}"),
        )),
    }
}
