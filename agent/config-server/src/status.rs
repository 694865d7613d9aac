//! How a machine does, put together from what is wanted and what both sides say now.

mod view;

use std::time::Duration;

use serde::Serialize;
use tidemark_base::{Clock, DiskId, MachineId, ServerId, Timestamp};
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
use crate::room;
use view::{View, best};

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
    /// The one that the figures here are about: the first that keeps up, where there are several.
    pub process_server: PeerStatus,
    #[serde(skip)]
    pub server: ServerId,
    /// Each that gets the machine's changes.
    pub process_servers: Vec<ProcessServerStatus>,
    /// Age of the oldest write that is not durable at the process server; absent when the agent does not say.
    pub rpo_seconds: Option<f64>,
    /// This figure and the next ones are absent where nobody told them since the configuration server started.
    pub pending_bytes: Option<u64>,
    pub written_bytes: Option<u64>,
    pub sent_bytes: Option<u64>,
    pub log_bytes: Option<u64>,
    pub stored_bytes: Option<u64>,
    pub points: Option<u64>,
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
    /// For programs: `problem`, `room`, `rpo`, `stepped_down`, `log`, `missed_cycles`, `encryption`, `no_contact`, `clock`, `failed`, `disconnected`,
    /// `taken_over`.
    pub kind: &'static str,
    pub message: String,
    pub help: String,
    /// Only that nobody is connected: no alarm right after a start.
    #[serde(skip)]
    pub is_absence: bool,
    /// The process server that it is about, where that is not the one that the machine is judged by.
    #[serde(skip)]
    pub of: Option<ServerId>,
    /// The agent or process server, by its id, that it is about, and not this machine alone.
    #[serde(skip)]
    pub peer: Option<String>,
}

impl Reason {
    pub fn new(health: Health, kind: &'static str, message: String, help: &str, is_absence: bool) -> Self {
        Self { health, kind, message, help: help.to_owned(), is_absence, of: None, peer: None }
    }
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

/// How a machine does at one of its process servers.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ProcessServerStatus {
    #[serde(flatten)]
    pub peer: PeerStatus,
    pub state: State,
    /// How changes are kept for it.
    #[schema(value_type = Option<String>)]
    pub mode: Option<SourceMode>,
    /// Why that is not `data`.
    pub mode_reason: Option<String>,
    /// Age of the oldest write that is not durable there.
    pub rpo_seconds: Option<f64>,
    /// What is left to send.
    pub pending_bytes: Option<u64>,
    pub sent_bytes: Option<u64>,
    pub stored_bytes: Option<u64>,
    pub points: Option<u64>,
    #[schema(value_type = Option<PointSchema>)]
    pub last_point: Option<PointInfo>,
    pub progress: Option<Progress>,
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
    pub pending_bytes: Option<u64>,
    pub written_bytes: Option<u64>,
    pub sent_bytes: Option<u64>,
    pub stored_bytes: Option<u64>,
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

/// What all sides said last.
struct Reports {
    agent: Option<AgentReport>,
    servers: Vec<(ServerId, Option<ServerReport>)>,
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
    let servers = machine.servers().map(|server| (server, reported_by_server(core, server))).collect();
    compose(core, machine, &Reports { agent: reported_by_agent(core, machine), servers })
}

fn reported_by_agent(core: &Core, machine: &Machine) -> Option<AgentReport> {
    match core.hub.report(PeerId::Agent(machine.host)) {
        Some(Report::Agent(report)) => Some(report),
        _ => None,
    }
}

fn reported_by_server(core: &Core, server: ServerId) -> Option<ServerReport> {
    match core.hub.report(PeerId::ProcessServer(server)) {
        Some(Report::Server(report)) => Some(report),
        _ => None,
    }
}

async fn fresh(core: &Core, machine: &Machine) -> MachineStatus {
    let of_servers = machine.servers().map(|server| async move {
        match core.server(server, &ServerCommand::Status, FRESH).await {
            Ok(Reply::Server(report)) => (server, Some(report)),
            _ => (server, reported_by_server(core, server)),
        }
    });
    let of_agent = core.agent(machine.host, &AgentCommand::Status, FRESH);
    let (agent, servers) = futures_util::future::join(of_agent, futures_util::future::join_all(of_servers)).await;
    let agent = match agent {
        Ok(Reply::Agent(report)) => Some(report),
        _ => reported_by_agent(core, machine),
    };
    compose(core, machine, &Reports { agent, servers })
}

fn compose(core: &Core, machine: &Machine, reports: &Reports) -> MachineStatus {
    let state = core.store.state();
    let host = peer_status(core, PeerId::Agent(machine.host), machine.host.to_string(), state.host_name(machine.host));
    let is_agent_connected = host.connected;
    let views: Vec<View<'_>> =
        reports.servers.iter().map(|server| View::of(core, machine, reports.agent.as_ref(), server)).collect();
    let best = best(machine, &views);
    let (sources, replicas) = (&best.sources, &best.replicas);
    let disks: Vec<DiskStatus> = machine
        .disks
        .iter()
        .zip(sources.iter().zip(replicas))
        .map(|(disk, (source, replica))| disk_status(disk, *source, *replica))
        .collect();
    let on_server = best.replicated(machine);

    let mut problems: Vec<Problem> = core
        .unsettled(machine.id)
        .into_iter()
        .map(|failure| Problem { critical: false, message: failure.message, help: failure.help })
        .collect();
    let servers = views.iter().map(|view| (&view.peer, "process server"));
    for (peer, what) in [(&host, "agent")].into_iter().chain(servers) {
        if !peer.connected {
            problems.push(away(core, peer, what));
        }
    }
    for view in &views {
        let of_sources = view.sources.iter().flatten().flat_map(|disk| &disk.problems);
        let of_replicas = view.replicas.iter().flatten().flat_map(|disk| &disk.problems);
        for problem in of_sources.chain(of_replicas) {
            // What all say of a disk is said once.
            if !problems.contains(problem) {
                problems.push(problem.clone());
            }
        }
    }

    let machine_state = state_of(machine, sources, host.connected);
    let taken =
        core.taken_over(machine.id).map(|taken| Problem { critical: true, message: taken.message, help: taken.help });
    if let Some(taken) = &taken {
        // What follows from it is not said besides: that the source, and we, are of an older generation.
        problems.retain(|problem| problem.message != taken.message && !problem.message.contains("is at generation"));
        problems.insert(0, taken.clone());
    }
    let mut reasons = reasons(core, machine, machine_state, &problems, &host, best, &views);
    if let Some(taken) = &taken {
        reasons.retain(|reason| !FOLLOWS.contains(&reason.kind));
        reasons.iter_mut().filter(|reason| reason.message == taken.message).for_each(|reason| reason.kind = TAKEN_OVER);
    }
    let health = reasons.iter().map(|reason| reason.health).max().unwrap_or(Health::Ok);
    MachineStatus {
        name: machine.name.clone(),
        id: machine.id,
        state: machine_state,
        health,
        reasons,
        mode: best.mode(),
        mode_reason: best.mode_reason(),
        policy: machine.policy.clone(),
        group: machine.group.clone(),
        host,
        process_server: best.peer.clone(),
        server: best.server,
        process_servers: views.iter().map(|view| view.status(machine, is_agent_connected)).collect(),
        rpo_seconds: exposure(core, machine, best).map(|rpo| rpo.as_secs_f64()),
        pending_bytes: best.sum(|disk| disk.pending_bytes),
        written_bytes: best.sum(|disk| disk.written_bytes),
        sent_bytes: best.sum(|disk| disk.sent_bytes),
        log_bytes: best.sum(|disk| disk.log_bytes),
        stored_bytes: best.stored_bytes(),
        points: best.points(machine),
        last_point: on_server.and_then(|replicated| replicated.latest.clone()),
        compare: sources.iter().flatten().fold(Compared::default(), |sum, disk| Compared {
            compared_bytes: sum.compared_bytes.saturating_add(disk.compare.compared_bytes),
            differing_bytes: sum.differing_bytes.saturating_add(disk.compare.differing_bytes),
            left_bytes: sum.left_bytes.saturating_add(disk.compare.left_bytes),
        }),
        progress: best.progress(),
        disks,
        problems,
        reported: reports.agent.as_ref().map(|report| report.time),
    }
}

/// A machine that failed over without this configuration server.
const TAKEN_OVER: &str = "taken_over";
/// What that leads to at its source.
const FOLLOWS: [&str; 5] = ["failed", "disconnected", "rpo", "missed_cycles", "log"];

/// The rules of health: what both sides call a problem, and the thresholds of the machine's policy.
fn reasons(
    core: &Core,
    machine: &Machine,
    state: State,
    problems: &[Problem],
    host: &PeerStatus,
    best: &View<'_>,
    views: &[View<'_>],
) -> Vec<Reason> {
    let sources = &best.sources;
    let servers = views.iter().map(|view| (&view.peer, "process server"));
    let absent = || [(host, "agent")].into_iter().chain(servers.clone()).filter(|(peer, _)| !peer.connected);
    let store = core.store.state();
    let policy = store.policies.get(&machine.policy).cloned().unwrap_or_default();
    let is_active = machine.wanted == Wanted::Protected;
    let now = core.clock.wall_now();
    let limit = Duration::from_secs(policy.alarm_no_contact_seconds);
    // One that was never seen since we started may be away for longer than that; it is not known to have been.
    let is_silent = |peer: &PeerStatus| now.saturating_since(peer.since.unwrap_or(core.started)) > limit;
    let mut reasons = Vec::new();
    for problem in problems {
        let of = absent().find(|(peer, what)| problem.message.starts_with(&is_not_connected(peer, what)));
        // Silence that lasts is said below, once.
        if of.is_some_and(|(peer, _)| is_silent(peer)) {
            continue;
        }
        let health = if problem.critical { Health::Critical } else { Health::Warning };
        let is_absence = absent().next().is_some() && problem.message.contains("is not connected");
        let reason = Reason::new(health, "problem", problem.message.clone(), &problem.help, is_absence);
        reasons.push(Reason { peer: of.map(|(peer, _)| peer.id.clone()), ..reason });
    }
    for (peer, what) in absent().filter(|(peer, _)| is_silent(peer)) {
        let message = format!("nothing was heard of {what} {} for longer than {} s", peer.name, limit.as_secs());
        let help = "check that its machine runs and reaches the configuration server";
        let reason = Reason::new(Health::Critical, "no_contact", message, help, true);
        reasons.push(Reason { peer: Some(peer.id.clone()), ..reason });
    }
    for peer in [PeerId::Agent(machine.host)].into_iter().chain(machine.servers().map(PeerId::ProcessServer)) {
        let ahead = core.hub.clock_ahead_seconds(peer);
        if ahead.unsigned_abs() > CLOCK_OFF_SECONDS_MAX {
            let side = if ahead > 0 { "ahead of" } else { "behind" };
            let message =
                format!("the clock of {peer} is {} s {side} the configuration server's", ahead.unsigned_abs());
            let help = "set the clock that is wrong; NTP on both does";
            let reason = Reason::new(Health::Warning, "clock", message, help, false);
            reasons.push(Reason { peer: Some(peer.to_string()), ..reason });
        }
    }
    for view in views {
        let volume = view.report.and_then(|report| report.volume);
        if let Some((health, message, help)) = volume.and_then(|volume| room::alarm(&view.peer.name, volume)) {
            let reason = Reason::new(health, "room", message, help, false);
            reasons.push(Reason { peer: Some(view.peer.id.clone()), ..reason });
        }
    }
    let mut add = |health, kind, message: String, help: &str, is_absence| {
        reasons.push(Reason::new(health, kind, message, help, is_absence));
    };
    if state == State::Failed {
        let help = "see the problems; `tidemark resync` begins again where nothing else helps";
        add(Health::Critical, "failed", "replication failed".to_owned(), help, false);
    }
    if state == State::Disconnected {
        let help = "check that the process server runs and that the host reaches it; changes are kept at the host";
        add(Health::Warning, "disconnected", "the host has no stream to its process server".to_owned(), help, true);
    }
    let rpo_limit = policy.alarm_rpo();
    let exposed = exposure(core, machine, best).filter(|exposed| *exposed > rpo_limit);
    if !is_active {
        if let Some(exposed) = exposed.filter(|_| state == State::Paused) {
            let message = format!(
                "replication is paused: what was written in the last {:.1} s would be lost, over the limit of {} s",
                exposed.as_secs_f64(),
                rpo_limit.as_secs()
            );
            add(Health::Warning, "rpo", message, "`tidemark resume` goes on; nothing is compared for it", false);
        }
        return reasons;
    }
    for view in views.iter().filter(|_| policy.encryption == Encryption::AtRest) {
        if let Some(report) = view.report
            && let Err(failure) = crate::machines::is_encrypted(&view.server.to_string(), report.storage_encrypted)
        {
            add(Health::Critical, "encryption", failure.message, &failure.help, false);
        }
    }
    let limit = u64::from(policy.alarm_missed_percent);
    if let Some(missed) = core.cycles.missed(machine.id).filter(|missed| missed.percent() > limit) {
        let message = format!("{} of the last {} cycles were missed, over {limit} %", missed.missed, missed.cycles);
        let help = "check the link and the process server's volume, raise the throttle, or replicate less often";
        add(Health::Warning, "missed_cycles", message, help, false);
    }
    // While a scan runs there is no consistent replica yet, and no RPO to keep. Whoever is not heard of keeps none either.
    let has_rpo = matches!(state, State::Protected | State::Disconnected | State::Unknown | State::Failed);
    if let Some(exposed) = exposed.filter(|_| has_rpo) {
        let health = if exposed > rpo_limit * 4 { Health::Critical } else { Health::Warning };
        let (seconds, limit) = (exposed.as_secs_f64(), rpo_limit.as_secs());
        let message = match best.rpo() {
            Some(_) => format!("the RPO is {seconds:.1} s, over the limit of {limit} s"),
            None => format!("the RPO may be up to {seconds:.1} s, over the limit of {limit} s: the host does not say"),
        };
        let help = "check the host, the link and the process server's volume; see `tidemark status`";
        add(health, "rpo", message, help, state == State::Unknown);
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
    if machine.failover.is_none() {
        let others = views.iter().filter(|view| view.server != best.server);
        others.for_each(|view| reasons.extend(view.reasons(rpo_limit, best)));
    }
    reasons
}

/// What a failover now would lose at most: as the host says, or where it says nothing, the age of what the replica holds.
fn exposure(core: &Core, machine: &Machine, best: &View<'_>) -> Option<Duration> {
    if machine.failover.is_some() {
        return best.rpo();
    }
    best.rpo().or_else(|| best.age(core.clock.wall_now()))
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
        pending_bytes: source.map(|source| source.pending_bytes),
        written_bytes: source.map(|source| source.written_bytes),
        sent_bytes: source.map(|source| source.sent_bytes),
        stored_bytes: replica.map(|replica| replica.stored_bytes),
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

/// As it is about that process server.
fn source<'a>(report: Option<&'a AgentReport>, server: ServerId, disk: &MachineDisk) -> Option<&'a SourceDisk> {
    let is_about = |source: &&SourceDisk| source.server.is_none_or(|about| about == server);
    report?.disks.iter().filter(is_about).find(|source| source.disk == disk.id)
}

fn replica<'a>(report: Option<&'a ServerReport>, disk: &MachineDisk) -> Option<&'a ReplicaDisk> {
    report?.disks.iter().find(|replica| replica.disk == disk.id)
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
        message: format!("{} {since}", is_not_connected(peer, what)),
        help: "check that it runs and reaches the configuration server".to_owned(),
    }
}

fn is_not_connected(peer: &PeerStatus, what: &str) -> String {
    format!("{what} {} is not connected", peer.name)
}
