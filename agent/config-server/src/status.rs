//! How a machine does, put together from what is wanted and what both sides say now.

use serde::Serialize;
use std::time::Duration;
use tidemark_base::{Clock, DiskId, MachineId, Timestamp};
use tidemark_proto::control::{
    AgentCommand, AgentReport, PointInfo, Problem, ReplicaDisk, Reply, ServerCommand, ServerReport, SourceDisk,
    SourceMode, SourceState,
};

use crate::core::Core;
use crate::hub::{PeerId, Presence, Report};
use crate::model::{Machine, MachineDisk, Wanted};

/// How long a status waits for fresh figures; older ones are shown with their age after that.
const FRESH: Duration = Duration::from_secs(2);

#[derive(Clone, Debug, Serialize)]
pub struct MachineStatus {
    pub name: String,
    pub id: MachineId,
    pub state: State,
    pub health: Health,
    pub mode: Option<SourceMode>,
    /// Why a disk's mode is not `data`.
    pub mode_reason: Option<String>,
    pub policy: String,
    pub host: PeerStatus,
    pub process_server: PeerStatus,
    /// Age of the oldest write that is not durable at the process server; absent when the agent does not say.
    pub rpo_seconds: Option<f64>,
    pub pending_bytes: u64,
    pub written_bytes: u64,
    pub sent_bytes: u64,
    pub log_bytes: u64,
    pub stored_bytes: u64,
    pub points: u64,
    pub last_point: Option<PointInfo>,
    /// Of an initial replication or a resynchronisation.
    pub progress: Option<Progress>,
    pub disks: Vec<DiskStatus>,
    pub problems: Vec<Problem>,
    /// When the agent's figures were taken.
    pub reported: Option<Timestamp>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Enabling,
    /// The agent is not connected: what it does now is not known here.
    Unknown,
    InitialReplication,
    Protected,
    Resynchronising,
    Paused,
    /// The agent has no stream to the process server; changes are kept at the host.
    Disconnected,
    Failed,
    Unprotecting,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    Ok,
    Warning,
    Critical,
}

#[derive(Clone, Debug, Serialize)]
pub struct PeerStatus {
    pub id: String,
    pub name: String,
    pub connected: bool,
    pub since: Option<Timestamp>,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct Progress {
    pub done_bytes: u64,
    pub total_bytes: u64,
    pub fraction: f64,
}

#[derive(Clone, Debug, Serialize)]
pub struct DiskStatus {
    pub id: DiskId,
    pub path: String,
    pub bytes: u64,
    pub state: Option<SourceState>,
    pub mode: Option<SourceMode>,
    pub positions: Positions,
    /// Whether the replica is consistent; absent when the process server does not say.
    pub consistent: Option<bool>,
    pub pending_bytes: u64,
    pub written_bytes: u64,
    pub sent_bytes: u64,
    pub stored_bytes: u64,
    pub rpo_seconds: Option<f64>,
    pub progress: Option<Progress>,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct Positions {
    pub logged: String,
    pub sent: String,
    pub durable: String,
    pub folded: String,
}

/// What both sides said last.
struct Reports {
    agent: Option<AgentReport>,
    server: Option<ServerReport>,
}

pub async fn of(core: &Core, name: &str) -> Result<MachineStatus, tidemark_proto::control::Failure> {
    let machine = core.machine(name)?;
    Ok(fresh(core, &machine).await)
}

pub async fn all(core: &Core) -> Vec<MachineStatus> {
    let state = core.store.state();
    futures_util::future::join_all(state.machines.values().map(|machine| fresh(core, machine))).await
}

async fn fresh(core: &Core, machine: &Machine) -> MachineStatus {
    let (agent, server) = futures_util::future::join(
        core.agent(machine.host, &AgentCommand::Status, FRESH),
        core.server(machine.server, &ServerCommand::Status, FRESH),
    )
    .await;
    let agent = match agent {
        Ok(Reply::Agent(report)) => Some(report),
        _ => match core.hub.report(PeerId::Agent(machine.host)) {
            Some(Report::Agent(report)) => Some(report),
            _ => None,
        },
    };
    let server = match server {
        Ok(Reply::Server(report)) => Some(report),
        _ => match core.hub.report(PeerId::ProcessServer(machine.server)) {
            Some(Report::Server(report)) => Some(report),
            _ => None,
        },
    };
    compose(core, machine, &Reports { agent, server })
}

fn compose(core: &Core, machine: &Machine, reports: &Reports) -> MachineStatus {
    let state = core.store.state();
    let host_name = state.hosts.get(&machine.host).map(|host| host.name.clone());
    let server_name = state.servers.get(&machine.server).map(|server| server.name.clone());
    let host = peer_status(core, PeerId::Agent(machine.host), machine.host.to_string(), host_name);
    let process_server =
        peer_status(core, PeerId::ProcessServer(machine.server), machine.server.to_string(), server_name);

    let sources: Vec<Option<&SourceDisk>> = machine.disks.iter().map(|disk| source(reports, disk)).collect();
    let replicas: Vec<Option<&ReplicaDisk>> = machine.disks.iter().map(|disk| replica(reports, disk)).collect();
    let disks: Vec<DiskStatus> = machine
        .disks
        .iter()
        .zip(sources.iter().zip(&replicas))
        .map(|(disk, (source, replica))| disk_status(disk, *source, *replica))
        .collect();
    let on_server =
        reports.server.iter().flat_map(|report| &report.machines).find(|replicated| replicated.machine == machine.id);

    let mut problems: Vec<Problem> = core
        .unsettled(machine.id)
        .into_iter()
        .map(|failure| Problem { critical: false, message: failure.message, help: failure.help })
        .collect();
    for (peer, what) in [(&host, "agent"), (&process_server, "process server")] {
        if !peer.connected {
            problems.push(away(core, peer, what));
        }
    }
    problems.extend(sources.iter().flatten().flat_map(|disk| disk.problems.clone()));
    problems.extend(replicas.iter().flatten().flat_map(|disk| disk.problems.clone()));
    problems.dedup();

    let machine_state = state_of(machine, &sources, host.connected);
    let health = match problems.iter().any(|problem| problem.critical) || machine_state == State::Failed {
        true => Health::Critical,
        false if !problems.is_empty() || machine_state == State::Disconnected => Health::Warning,
        false => Health::Ok,
    };
    let known = sources.iter().all(Option::is_some);
    let sum = |figure: fn(&SourceDisk) -> u64| sources.iter().flatten().map(|disk| figure(disk)).sum();
    let scans: Vec<(u64, u64)> = sources.iter().flatten().filter_map(|disk| disk.scan).collect();
    MachineStatus {
        name: machine.name.clone(),
        id: machine.id,
        state: machine_state,
        health,
        mode: sources.iter().flatten().map(|disk| disk.mode).max_by_key(|mode| *mode as u8),
        mode_reason: sources.iter().flatten().map(|disk| &disk.mode_reason).find(|reason| !reason.is_empty()).cloned(),
        policy: machine.policy.clone(),
        host,
        process_server,
        rpo_seconds: known.then(|| sources.iter().flatten().map(|disk| disk.rpo.as_secs_f64()).fold(0.0, f64::max)),
        pending_bytes: sum(|disk| disk.pending_bytes),
        written_bytes: sum(|disk| disk.written_bytes),
        sent_bytes: sum(|disk| disk.sent_bytes),
        log_bytes: sum(|disk| disk.log_bytes),
        stored_bytes: replicas.iter().flatten().map(|disk| disk.stored_bytes).sum(),
        points: on_server.map_or(0, |replicated| replicated.points),
        last_point: on_server.and_then(|replicated| replicated.latest.clone()),
        progress: (!scans.is_empty())
            .then(|| progress(scans.iter().map(|(done, _)| done).sum(), scans.iter().map(|(_, total)| total).sum())),
        disks,
        problems,
        reported: reports.agent.as_ref().map(|report| report.time),
    }
}

fn state_of(machine: &Machine, sources: &[Option<&SourceDisk>], is_agent_connected: bool) -> State {
    match machine.wanted {
        Wanted::Unprotected { .. } => return State::Unprotecting,
        Wanted::Paused => return State::Paused,
        Wanted::Protected => {}
    }
    if sources.iter().any(Option::is_none) {
        return if is_agent_connected { State::Enabling } else { State::Unknown };
    }
    // The worst disk decides; this is their order.
    let ranked = [
        (SourceState::Failed, State::Failed),
        (SourceState::Paused, State::Paused),
        (SourceState::Connecting, State::Disconnected),
        (SourceState::InitialReplication, State::InitialReplication),
        (SourceState::Resynchronising, State::Resynchronising),
    ];
    ranked
        .into_iter()
        .find(|(source, _)| sources.iter().flatten().any(|disk| disk.state == *source))
        .map_or(State::Protected, |(_, state)| state)
}

fn disk_status(disk: &MachineDisk, source: Option<&SourceDisk>, replica: Option<&ReplicaDisk>) -> DiskStatus {
    DiskStatus {
        id: disk.id,
        path: disk.path.clone(),
        bytes: disk.bytes,
        state: source.map(|source| source.state),
        mode: source.map(|source| source.mode),
        positions: Positions {
            logged: source.map_or_else(String::new, |source| source.logged.clone()),
            sent: source.map_or_else(String::new, |source| source.sent.clone()),
            durable: source.map_or_else(String::new, |source| source.durable.clone()),
            folded: replica.map_or_else(String::new, |replica| replica.folded.clone()),
        },
        consistent: replica.map(|replica| replica.consistent),
        pending_bytes: source.map_or(0, |source| source.pending_bytes),
        written_bytes: source.map_or(0, |source| source.written_bytes),
        sent_bytes: source.map_or(0, |source| source.sent_bytes),
        stored_bytes: replica.map_or(0, |replica| replica.stored_bytes),
        rpo_seconds: source.map(|source| source.rpo.as_secs_f64()),
        progress: source.and_then(|source| source.scan).map(|(done, total)| progress(done, total)),
    }
}

fn progress(done_bytes: u64, total_bytes: u64) -> Progress {
    let fraction = if total_bytes == 0 { 1.0 } else { done_bytes as f64 / total_bytes as f64 };
    Progress { done_bytes, total_bytes, fraction }
}

fn source<'a>(reports: &'a Reports, disk: &MachineDisk) -> Option<&'a SourceDisk> {
    reports.agent.as_ref()?.disks.iter().find(|source| source.disk == disk.id)
}

fn replica<'a>(reports: &'a Reports, disk: &MachineDisk) -> Option<&'a ReplicaDisk> {
    reports.server.as_ref()?.disks.iter().find(|replica| replica.disk == disk.id)
}

fn peer_status(core: &Core, peer: PeerId, id: String, stored_name: Option<String>) -> PeerStatus {
    match core.hub.presence(peer) {
        Presence::Connected { name, since } => PeerStatus { id, name, connected: true, since: Some(since) },
        Presence::Gone { name, since } => PeerStatus { id, name, connected: false, since: Some(since) },
        Presence::NeverSeen => {
            PeerStatus { name: stored_name.unwrap_or_else(|| id.clone()), id, connected: false, since: None }
        }
    }
}

fn away(core: &Core, peer: &PeerStatus, what: &str) -> Problem {
    let since = match peer.since {
        Some(since) => format!("for {} s", core.clock.wall_now().saturating_since(since).as_secs()),
        None => "since the configuration server started".to_owned(),
    };
    Problem {
        critical: false,
        message: format!("{what} {} is not connected {since}", peer.name),
        help: "check that it runs and reaches the configuration server".to_owned(),
    }
}
