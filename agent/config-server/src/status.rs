//! How a machine does, put together from what is wanted and what both sides say now.

use std::time::Duration;

use serde::Serialize;
use tidemark_base::{Clock, DiskId, MachineId, Timestamp};
use tidemark_proto::control::{
    AgentCommand, AgentReport, Compared, NO_RPO, PointInfo, Problem, ReplicaDisk, Reply, ServerCommand, ServerReport,
    SourceDisk, SourceMode, SourceState,
};

use utoipa::ToSchema;

use crate::api::schema::{ComparedSchema, PointSchema, ProblemSchema};
use crate::core::Core;
use crate::failover::state::Phase;
use crate::hub::{PeerId, Presence, Report};
use crate::model::{Encryption, Machine, MachineDisk, Wanted};

/// A clock that is off by more is told.
pub const CLOCK_OFF_SECONDS_MAX: u64 = 60;
/// How long a status waits for fresh figures; older ones are shown with their age after that.
const FRESH: Duration = Duration::from_secs(2);

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MachineStatus {
    pub name: String,
    #[schema(value_type = String, format = "uuid")]
    pub id: MachineId,
    pub state: State,
    pub health: Health,
    /// Why the health is not `ok`.
    pub reasons: Vec<Reason>,
    #[schema(value_type = Option<String>)]
    pub mode: Option<SourceMode>,
    /// Why a disk's mode is not `data`.
    pub mode_reason: Option<String>,
    pub policy: String,
    pub group: Option<String>,
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
    #[schema(value_type = Option<PointSchema>)]
    pub last_point: Option<PointInfo>,
    /// Of an initial replication or a resynchronisation.
    pub progress: Option<Progress>,
    /// What was compared with the replica since the agent has the disks, what of it differed, and what is left to compare.
    #[schema(value_type = ComparedSchema)]
    pub compare: Compared,
    pub disks: Vec<DiskStatus>,
    #[schema(value_type = Vec<ProblemSchema>)]
    pub problems: Vec<Problem>,
    /// When the agent's figures were taken.
    #[schema(value_type = Option<String>, format = "date-time")]
    pub reported: Option<Timestamp>,
}

/// What makes a machine's health worse than `ok`.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Reason {
    pub health: Health,
    /// For programs: `problem`, `rpo`, `log`, `missed_cycles`, `encryption`, `no_contact`, `clock`, `failed`, `disconnected`.
    pub kind: &'static str,
    pub message: String,
    pub help: String,
    /// Only that nobody is connected: no alarm right after a start.
    #[serde(skip)]
    pub is_absence: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = MachineState)]
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
    /// On its way to, or back from, where its replica is.
    FailingOver,
    /// It runs where its replica is; another point can be chosen, and it can go back.
    FailedOver,
    /// It runs where its replica is, for good.
    Committed,
    /// It runs where its replica is, and its home disks are brought to its state.
    Reprotecting,
    /// It runs where its replica is, and its home disks follow it.
    Reprotected,
    /// It is about to go home, or on its way.
    FailingBack,
    /// It is home; what it had elsewhere is still there.
    FailedBack,
}

impl State {
    /// As programs are told.
    pub fn name(self) -> String {
        serde_json::to_value(self).ok().and_then(|name| Some(name.as_str()?.to_owned())).unwrap_or_default()
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    Ok,
    Warning,
    Critical,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct PeerStatus {
    pub id: String,
    pub name: String,
    pub connected: bool,
    #[schema(value_type = Option<String>, format = "date-time")]
    pub since: Option<Timestamp>,
}

#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
#[schema(as = ScanProgress)]
pub struct Progress {
    pub done_bytes: u64,
    pub total_bytes: u64,
    pub fraction: f64,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct DiskStatus {
    #[schema(value_type = String, format = "uuid")]
    pub id: DiskId,
    pub path: String,
    pub bytes: u64,
    #[schema(value_type = Option<String>)]
    pub state: Option<SourceState>,
    #[schema(value_type = Option<String>)]
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
    #[schema(value_type = ComparedSchema)]
    pub compare: Compared,
}

#[derive(Clone, Debug, Default, Serialize, ToSchema)]
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

/// From what was reported last, without asking.
pub fn all_reported(core: &Core) -> Vec<MachineStatus> {
    core.store.state().machines.values().map(|machine| reported(core, machine)).collect()
}

pub fn reported(core: &Core, machine: &Machine) -> MachineStatus {
    let agent = match core.hub.report(PeerId::Agent(machine.host)) {
        Some(Report::Agent(report)) => Some(report),
        _ => None,
    };
    let server = match core.hub.report(PeerId::ProcessServer(machine.server)) {
        Some(Report::Server(report)) => Some(report),
        _ => None,
    };
    compose(core, machine, &Reports { agent, server })
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
    let host = peer_status(core, PeerId::Agent(machine.host), machine.host.to_string(), state.host_name(machine.host));
    let process_server = peer_status(
        core,
        PeerId::ProcessServer(machine.server),
        machine.server.to_string(),
        state.server_name(machine.server),
    );

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
    let reasons =
        reasons(core, machine, machine_state, &sources, &problems, [&host, &process_server], reports.server.as_ref());
    let health = reasons.iter().map(|reason| reason.health).max().unwrap_or(Health::Ok);
    let sum = |figure: fn(&SourceDisk) -> u64| sources.iter().flatten().map(|disk| figure(disk)).sum();
    let scans: Vec<(u64, u64)> = sources.iter().flatten().filter_map(|disk| disk.scan).collect();
    MachineStatus {
        name: machine.name.clone(),
        id: machine.id,
        state: machine_state,
        health,
        reasons,
        mode: sources.iter().flatten().map(|disk| disk.mode).max_by_key(|mode| *mode as u8),
        mode_reason: sources.iter().flatten().map(|disk| &disk.mode_reason).find(|reason| !reason.is_empty()).cloned(),
        policy: machine.policy.clone(),
        group: machine.group.clone(),
        host,
        process_server,
        rpo_seconds: sources
            .iter()
            .map(|disk| rpo((*disk)?))
            .collect::<Option<Vec<_>>>()
            .map(|all| all.into_iter().max().unwrap_or_default().as_secs_f64()),
        pending_bytes: sum(|disk| disk.pending_bytes),
        written_bytes: sum(|disk| disk.written_bytes),
        sent_bytes: sum(|disk| disk.sent_bytes),
        log_bytes: sum(|disk| disk.log_bytes),
        stored_bytes: replicas.iter().flatten().map(|disk| disk.stored_bytes).sum(),
        points: on_server.map_or(0, |replicated| replicated.points),
        last_point: on_server.and_then(|replicated| replicated.latest.clone()),
        compare: sources.iter().flatten().fold(Compared::default(), |sum, disk| Compared {
            compared_bytes: sum.compared_bytes.saturating_add(disk.compare.compared_bytes),
            differing_bytes: sum.differing_bytes.saturating_add(disk.compare.differing_bytes),
            left_bytes: sum.left_bytes.saturating_add(disk.compare.left_bytes),
        }),
        progress: (!scans.is_empty())
            .then(|| progress(scans.iter().map(|(done, _)| done).sum(), scans.iter().map(|(_, total)| total).sum())),
        disks,
        problems,
        reported: reports.agent.as_ref().map(|report| report.time),
    }
}

/// The rules of health: what both sides call a problem, and the thresholds of the machine's policy.
fn reasons(
    core: &Core,
    machine: &Machine,
    state: State,
    sources: &[Option<&SourceDisk>],
    problems: &[Problem],
    peers: [&PeerStatus; 2],
    server: Option<&ServerReport>,
) -> Vec<Reason> {
    let store = core.store.state();
    let policy = store.policies.get(&machine.policy).cloned().unwrap_or_default();
    let is_active = machine.wanted == Wanted::Protected;
    let mut reasons: Vec<Reason> = problems
        .iter()
        .map(|problem| Reason {
            health: if problem.critical { Health::Critical } else { Health::Warning },
            kind: "problem",
            message: problem.message.clone(),
            help: problem.help.clone(),
            is_absence: peers.iter().any(|peer| !peer.connected && problem.message.contains("is not connected")),
        })
        .collect();
    let mut add = |health, kind, message: String, help: &str, is_absence| {
        reasons.push(Reason { health, kind, message, help: help.to_owned(), is_absence });
    };
    if state == State::Failed {
        let help = "see the problems; `tidemark resync` begins again where nothing else helps";
        add(Health::Critical, "failed", "replication failed".to_owned(), help, false);
    }
    if state == State::Disconnected {
        let help = "check that the process server runs and that the host reaches it; changes are kept at the host";
        add(Health::Warning, "disconnected", "the host has no stream to its process server".to_owned(), help, true);
    }
    let now = core.clock.wall_now();
    let limit = Duration::from_secs(policy.alarm_no_contact_seconds);
    for (peer, what) in peers.into_iter().zip(["agent", "process server"]) {
        let away = peer.since.filter(|_| !peer.connected).map(|since| now.saturating_since(since));
        if away.is_some_and(|away| away > limit) {
            let message = format!("nothing was heard of {what} {} for longer than {} s", peer.name, limit.as_secs());
            let help = "check that its machine runs and reaches the configuration server";
            add(Health::Critical, "no_contact", message, help, true);
        }
    }
    for peer in [PeerId::Agent(machine.host), PeerId::ProcessServer(machine.server)] {
        let ahead = core.hub.clock_ahead_seconds(peer);
        if ahead.unsigned_abs() > CLOCK_OFF_SECONDS_MAX {
            let side = if ahead > 0 { "ahead of" } else { "behind" };
            let message =
                format!("the clock of {peer} is {} s {side} the configuration server's", ahead.unsigned_abs());
            add(Health::Warning, "clock", message, "set the clock that is wrong; NTP on both does", false);
        }
    }
    if !is_active {
        return reasons;
    }
    if policy.encryption == Encryption::AtRest
        && let Some(report) = server
        && let Err(failure) = crate::machines::is_encrypted(&machine.server.to_string(), report.storage_encrypted)
    {
        add(Health::Critical, "encryption", failure.message, &failure.help, false);
    }
    let limit = u64::from(policy.alarm_missed_percent);
    if let Some(missed) = core.cycles.missed(machine.id).filter(|missed| missed.percent() > limit) {
        let message = format!("{} of the last {} cycles were missed, over {limit} %", missed.missed, missed.cycles);
        let help = "check the link and the process server's volume, raise the throttle, or replicate less often";
        add(Health::Warning, "missed_cycles", message, help, false);
    }
    let rpo_limit = policy.alarm_rpo();
    let rpo = sources.iter().flatten().filter_map(|disk| rpo(disk)).max().unwrap_or_default();
    // While a scan runs there is no consistent replica yet, and no RPO to keep.
    if state == State::Protected && rpo > rpo_limit {
        let health = if rpo > rpo_limit * 4 { Health::Critical } else { Health::Warning };
        let message = format!("the RPO is {:.1} s, over the limit of {} s", rpo.as_secs_f64(), rpo_limit.as_secs());
        add(health, "rpo", message, "check the link and the process server's volume; see `tidemark status`", false);
    }
    if let Some(limit) = policy.log_limit_bytes {
        for disk in sources.iter().flatten() {
            let percent = disk.log_bytes.saturating_mul(100) / limit.max(1);
            if percent >= u64::from(policy.alarm_log_percent) {
                let message = format!("the log of disk {} takes {percent} % of its limit", disk.disk);
                let help = "at the limit the mode steps down to bitmap; raise the limit or the throttle of the policy";
                add(Health::Warning, "log", message, help, false);
            }
        }
    }
    reasons
}

fn state_of(machine: &Machine, sources: &[Option<&SourceDisk>], is_agent_connected: bool) -> State {
    match machine.wanted {
        Wanted::Unprotected { .. } => return State::Unprotecting,
        Wanted::Paused => return State::Paused,
        Wanted::Protected => {}
    }
    if let Some(failover) = &machine.failover {
        return match failover.phase {
            Phase::Draining | Phase::Starting | Phase::ChangingPoint | Phase::Cancelling => State::FailingOver,
            Phase::FailedOver => State::FailedOver,
            Phase::Committed => State::Committed,
            Phase::Reprotecting | Phase::Withdrawing => State::Reprotecting,
            Phase::Reprotected => State::Reprotected,
            Phase::FailingBack => State::FailingBack,
            Phase::FailedBack | Phase::Landing => State::FailedBack,
        };
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
        rpo_seconds: source.and_then(rpo).map(|rpo| rpo.as_secs_f64()),
        progress: source.and_then(|source| source.scan).map(|(done, total)| progress(done, total)),
        compare: source.map(|source| source.compare).unwrap_or_default(),
    }
}

/// None where nothing of the disk is durable yet, or nobody knows what is written to it.
fn rpo(source: &SourceDisk) -> Option<Duration> {
    (source.rpo < NO_RPO && source.state != SourceState::Failed).then_some(source.rpo)
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

fn peer_status(core: &Core, peer: PeerId, id: String, stored_name: String) -> PeerStatus {
    match core.hub.presence(peer) {
        Presence::Connected { name, since } => PeerStatus { id, name, connected: true, since: Some(since) },
        Presence::Gone { name, since } => PeerStatus { id, name, connected: false, since: Some(since) },
        Presence::NeverSeen => PeerStatus { id, name: stored_name, connected: false, since: None },
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
