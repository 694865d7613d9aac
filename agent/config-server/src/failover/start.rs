//! The beginning of a failover: what is needed, what is lost, and the machine at its new place.
//!
//! Planned: 0. its machine is shut down, where somebody is known to run it ([`source`])  1. the workload is kept from its disks, durably  2. a mark at their end  3. it is durable at the process server
//! 4. both sides say the same position: nothing is lost. Both: 5. the generations are raised, durably  6. the process server
//! refuses the old ones  7. the machine runs. What fails before 7 is undone; an answer that did not come leaves it at 7, to be
//! asked for again or cancelled.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tidemark_base::{Clock, MarkId, Timestamp};
use tidemark_hypervisor::call::{Call, FailOverCall, FailedOver, Lost, decode};
use tidemark_proto::control::{
    AgentCommand, Consistency, Failure, FailureKind, MarkRequest, Reply, ServerCommand, Severity, SourceDisk, Via,
};
use uuid::Uuid;

use super::drill::refuse_drilled_at;
use super::failback::shutdown_limit;
use super::state::{self, Failover, Kind, Loss, Phase};
use super::{ask, no_description, not_understood, source};
use crate::consumers;
use crate::core::{Core, QUICK, SETTLE};
use crate::history::News;
use crate::hub::{PeerId, Presence, Report, unexpected};
use crate::jobs::{Job, Progress};
use crate::machines::{refuse_unprotected, settle_agent, settle_server};
use crate::model::Machine;
use crate::names::bad_request;
use crate::points::selector;
use crate::status::{self, Health};

/// How long the last changes may take to be sent.
const DRAIN_LIMIT: Duration = Duration::from_secs(900);
/// How often it is looked whether both sides are at the same position.
/// What an unplanned failover goes to where nothing else is said: whoever lost a site wants what there is.
pub const LOWEST_RPO: &str = "lowest-rpo";
const LOOK_AGAIN: Duration = Duration::from_millis(200);

#[derive(Clone, Debug, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct StartRequest {
    /// `lowest-rpo`, an id, `latest`, `latest-app`, or a time; absent: `lowest-rpo`, the last consistent state that arrived. A planned failover goes to the last change.
    pub point: Option<String>,
    /// Where the machine has several, the one that runs it; absent: the one where least is lost.
    pub process_server: Option<String>,
    /// The disks are made ready, and a person attaches them to a machine and starts it.
    pub disks_only: bool,
    /// Says what would be lost and what is in the way, and does nothing.
    pub check_only: bool,
    /// Of a planned failover: what the guest at the source may take to shut down, in seconds. Absent: 300.
    pub shutdown_limit_seconds: Option<u64>,
    /// Turns a machine off that did not shut down by then; otherwise nothing is begun.
    pub turn_off: bool,
}

pub fn start(core: &Arc<Core>, name: &str, kind: Kind, request: StartRequest) -> Result<Job, Failure> {
    let asked = Instant::now();
    let machine = core.machine(name)?;
    refuse_unprotected(&machine)?;
    if kind == Kind::Planned && request.point.is_some() {
        return Err(bad_request(
            "a planned failover goes to the last change: no point is chosen",
            "leave the point out, or choose it with `tidemark failover unplanned NAME --point P`",
        ));
    }
    if kind == Kind::Unplanned && (request.shutdown_limit_seconds.is_some() || request.turn_off) {
        return Err(bad_request(
            "an unplanned failover shuts nothing down: its source may be gone",
            "leave the limit out; where the source is there, fail over by plan: `tidemark failover planned NAME`",
        ));
    }
    if kind == Kind::Planned {
        source::refuse_unkept(&machine)?;
    }
    shutdown_limit(request.shutdown_limit_seconds)?;
    selector(request.point.as_deref().unwrap_or(LOWEST_RPO))?;
    if !request.disks_only && machine.description.is_none() {
        let failure = no_description(name);
        return Err(Failure {
            help: format!("{}; or --disks-only for disks that you attach", failure.help),
            ..failure
        });
    }
    let (core, name) = (core.clone(), name.to_owned());
    let job = match kind {
        Kind::Planned => "failover_planned",
        Kind::Unplanned => "failover_unplanned",
    };
    core.jobs.clone().start_or_check(job, Some(&name.clone()), request.check_only, |progress| async move {
        let _lock = core.lock(&name).await;
        run(&core, &progress, &name, kind, request, asked).await
    })
}

async fn run(
    core: &Core,
    progress: &Progress,
    name: &str,
    kind: Kind,
    request: StartRequest,
    asked: Instant,
) -> Result<Value, Failure> {
    progress.step("check what is needed");
    let machine = core.machine(name)?;
    // One that was begun and did not come to its end is gone on with.
    let begun = machine
        .failover
        .clone()
        .filter(|begun| begun.kind == kind && matches!(begun.phase, Phase::Draining | Phase::Starting));
    let machine = match begun.is_none() {
        true => {
            state::refuse_failed_over(&machine)?;
            choose(core, machine, kind, &request).await?
        }
        false => machine,
    };
    if !request.disks_only {
        ask(core, &machine, &Call::Check, SETTLE).await?;
    }
    if kind == Kind::Planned && begun.is_none() {
        refuse_unfit(core, name).await?;
    }
    let point = request.point.clone().unwrap_or_else(|| LOWEST_RPO.to_owned());
    let lost = lost(core, &machine, &point).await?;
    let loss = match kind {
        Kind::Planned => Loss { seconds: 0.0, bytes: 0, source_last_seen: None },
        Kind::Unplanned => loss(core, &machine, &lost),
    };
    // Whoever loses a site has no source; whoever has one need lose nothing.
    let source_is_well = kind == Kind::Unplanned
        && begun.is_none()
        && matches!(machine.via, Via::Nbd | Via::Fuse)
        && refuse_unfit(core, name).await.is_ok();
    let direction = direction(core, &machine);
    let said = format!("{direction}; {}", said(kind, &lost, &loss));
    progress.step(said.clone());
    // Where its writes pass by the agent, somebody must say that it is off.
    let shuts_down = kind == Kind::Planned && begun.is_none() && (!request.disks_only || source::is_tracked(&machine));
    let owner = if shuts_down { Some(source::find_owner(core, &machine).await?) } else { None };
    if request.check_only {
        let source = owner;
        return Ok(json!({ "machine": name, "direction": direction, "point": lost.point, "time": lost.time,
            "lost_seconds": loss.seconds, "lost_bytes": loss.bytes, "source_last_seen": loss.source_last_seen,
            "source": source, "source_is_well": source_is_well }));
    }
    let limit = shutdown_limit(request.shutdown_limit_seconds)?;
    let shut = match shuts_down {
        true => Some(source::shut_down(core, progress, &machine, limit, request.turn_off).await?),
        false => None,
    };
    let source_stopped = shut.as_ref().is_some_and(source::was_on);
    let failover = begun.unwrap_or_else(|| Failover {
        id: Uuid::new_v4(),
        kind,
        phase: if kind == Kind::Planned { Phase::Draining } else { Phase::Starting },
        disks_only: request.disks_only,
        began: core.clock.wall_now(),
        point: None,
        time: None,
        lost: None,
        source_stopped,
        home: None,
    });
    let (id, source_stopped) = (failover.id, failover.source_stopped);
    let is_new = machine.failover.is_none();
    let machine = if is_new { state::begin(core, name, machine.server, failover)? } else { machine };
    let taken = take_over(core, progress, &machine, id, &point, asked).await;
    let Taken { answer, downtime, not_fenced } = match taken {
        Ok(taken) => taken,
        // Nobody knows whether it runs.
        Err(failure)
            if matches!(failure.kind, FailureKind::TimedOut | FailureKind::Unavailable) && has_begun(core, name) =>
        {
            let help = format!("{}; then ask for the failover again, or cancel it", failure.help);
            return Err(Failure { help, ..failure });
        }
        Err(failure) => {
            progress.step("undo");
            let machine = state::end(core, name, id)?;
            if let (Err(left), _) = source::go_on(core, progress, &machine, source_stopped).await {
                tracing::warn!(machine = name, %left, "the source is told when it can be reached");
            }
            return Err(failure);
        }
    };
    state::advance(core, name, id, Phase::FailedOver, |failover| {
        failover.point = Some(answer.point);
        failover.time = Some(answer.time);
        failover.lost = Some(loss);
    })?;
    note(core, name, &format!("failed over: {said}"));
    let first = answer.first_instruction_seconds;
    Ok(json!({
        "machine": name,
        "failover": id,
        "direction": direction,
        "point": answer.point,
        "time": answer.time,
        "lost_seconds": loss.seconds,
        "lost_bytes": loss.bytes,
        "source_last_seen": loss.source_last_seen,
        "source": shut,
        "source_is_well": source_is_well,
        "not_fenced": not_fenced.map(|failure| json!({ "error": failure.message, "help": failure.help })),
        "rto_seconds": first.map(|seconds| seconds + downtime.as_secs_f64()),
        "hypervisor": answer.hypervisor,
        "power": answer.power,
        "disks": answer.disks,
    }))
}

/// Where it is to run: at the process server that is named, or where least is lost.
async fn choose(core: &Core, machine: Machine, kind: Kind, request: &StartRequest) -> Result<Machine, Failure> {
    let before = machine.server;
    let chosen = match (kind, &request.process_server) {
        // Nothing is lost at any: one that keeps up.
        (Kind::Planned, None) => {
            let server = status::of(core, &machine.name).await?.server;
            machine.about(server)
        }
        (_, wanted) => {
            let point = selector(request.point.as_deref().unwrap_or(LOWEST_RPO))?;
            consumers::at(core, machine, wanted.as_deref(), &point).await?
        }
    };
    if chosen.server != before {
        // Nobody would find them any more.
        let mut unplaced = chosen.clone().about(before);
        unplaced.drills.retain(|drill| drill.server.is_none());
        refuse_drilled_at(core, &unplaced, &[before])?;
    }
    Ok(chosen)
}

fn has_begun(core: &Core, name: &str) -> bool {
    let phase = core.machine(name).ok().and_then(|machine| Some(machine.failover?.phase));
    phase == Some(Phase::Starting)
}

struct Taken {
    /// How it runs there.
    answer: FailedOver,
    /// From the command to the call that runs it.
    downtime: Duration,
    /// Why its source may go on, where it may: what it writes is refused.
    not_fenced: Option<Failure>,
}

async fn take_over(
    core: &Core,
    progress: &Progress,
    machine: &Machine,
    id: Uuid,
    point: &str,
    asked: Instant,
) -> Result<Taken, Failure> {
    let name = &machine.name;
    let failover = state::find(machine)?;
    let mut point = point.to_owned();
    let mut machine = machine.clone();
    if failover.phase == Phase::Draining {
        point = drain(core, progress, &machine).await?;
        machine = state::advance(core, name, id, Phase::Starting, |_| {})?;
    }
    progress.step("refuse the source from now on");
    settle_server(core, &machine).await?;
    let not_fenced = settle_agent(core, &machine).await.err();
    if let Some(failure) = &not_fenced {
        // It is told when it comes back, and its changes are refused until then.
        tracing::warn!(machine = name, %failure, "the source is not fenced yet");
    }
    progress.step("run it from its point");
    let call = Call::FailOver(Box::new(call(&machine, &failover, point)));
    let downtime = asked.elapsed();
    let answer = ask(core, &machine, &call, SETTLE).await?;
    Ok(Taken { answer: decode(&answer).map_err(not_understood)?, downtime, not_fenced })
}

/// As a process server is asked to run it.
pub fn call(machine: &Machine, failover: &Failover, point: String) -> FailOverCall {
    FailOverCall {
        failover: failover.id,
        machine: machine.id,
        name: machine.name.clone(),
        point,
        disks: machine.disks.iter().map(|disk| disk.id).collect(),
        run: machine.description.clone().filter(|_| !failover.disks_only),
    }
}

/// Sends everything; the last point.
async fn drain(core: &Core, progress: &Progress, machine: &Machine) -> Result<String, Failure> {
    progress.step("keep the workload from its disks");
    settle_agent(core, machine).await?;
    progress.step("send the last changes");
    let mark = send_all(core, machine, "planned failover", DRAIN_LIMIT).await?;
    progress.step("prove that nothing is lost");
    let proving = async {
        loop {
            if is_all_there(core, machine).await? {
                return Ok(());
            }
            let _ = tokio::time::timeout(LOOK_AGAIN, core.stop.cancelled()).await;
        }
    };
    match tokio::time::timeout(SETTLE, proving).await {
        Ok(proven) => proven.map(|()| mark.to_string()),
        Err(_) => Err(Failure::new(
            FailureKind::Conflict,
            format!("machine {:?} still writes to its disks: its source is past the last point", machine.name),
            "shut the workload down, then try again",
        )),
    }
}

/// Makes a point of what a source that is kept from its disks has, and waits until it is at the process server.
pub async fn send_all(core: &Core, machine: &Machine, label: &str, limit: Duration) -> Result<MarkId, Failure> {
    let label = label.to_owned();
    let request = MarkRequest { machine: machine.id, consistency: Consistency::Crash, label, keep: true };
    let mark = last_mark(core, machine, &request, limit).await?;
    let command = ServerCommand::WaitPoint { machine: machine.id, mark, limit };
    match core.server(machine.server, &command, limit + QUICK).await? {
        Reply::Point(_) => Ok(mark),
        other => Err(unexpected(PeerId::ProcessServer(machine.server), &other)),
    }
}

/// What a tracker saw may be much, and a raw image is compared once its QEMU has ended: that scan is waited for, while it gets on.
async fn last_mark(core: &Core, machine: &Machine, request: &MarkRequest, limit: Duration) -> Result<MarkId, Failure> {
    let peer = PeerId::Agent(machine.host);
    let (mut left, mut since) = (u64::MAX, Instant::now());
    loop {
        let failure = match core.agent(machine.host, &AgentCommand::Mark(request.clone()), SETTLE).await {
            Ok(Reply::Marked { mark, .. }) => return Ok(mark),
            Ok(other) => return Err(unexpected(peer, &other)),
            Err(failure) => failure,
        };
        if !source::is_tracked(machine) || failure.kind != FailureKind::Unavailable {
            return Err(failure);
        }
        let pending = source_disks(core, machine).await?.iter().map(|source| source.pending_bytes).sum();
        if pending < left {
            (left, since) = (pending, Instant::now());
        }
        if since.elapsed() > limit {
            return Err(failure);
        }
        let _ = tokio::time::timeout(LOOK_AGAIN, core.stop.cancelled()).await;
    }
}

/// What the host says of its disks, of what goes to where it fails over.
async fn source_disks(core: &Core, machine: &Machine) -> Result<Vec<SourceDisk>, Failure> {
    let mut sources = match core.agent(machine.host, &AgentCommand::Status, QUICK).await? {
        Reply::Agent(report) => report.disks,
        other => return Err(unexpected(PeerId::Agent(machine.host), &other)),
    };
    sources.retain(|source| source.server.is_none_or(|server| server == machine.server));
    sources.retain(|source| machine.disks.iter().any(|disk| disk.id == source.disk));
    Ok(sources)
}

/// Whether the process server holds, durably, each disk's log to its end.
async fn is_all_there(core: &Core, machine: &Machine) -> Result<bool, Failure> {
    let sources = source_disks(core, machine).await?;
    let replica = match core.server(machine.server, &ServerCommand::Status, QUICK).await? {
        Reply::Server(report) => report,
        other => return Err(unexpected(PeerId::ProcessServer(machine.server), &other)),
    };
    Ok(machine.disks.iter().all(|disk| {
        let source = sources.iter().find(|source| source.disk == disk.id);
        // What a tracker saw since the mark is in no log.
        let is_settled = source.is_some_and(|source| !source::is_tracked(machine) || source.pending_bytes == 0);
        let logged = source.map(|source| &source.logged);
        let durable = replica.disks.iter().find(|replica| replica.disk == disk.id).map(|replica| &replica.durable);
        is_settled && logged.is_some_and(|logged| !logged.is_empty()) && logged == durable
    }))
}

/// Nothing is planned with a source that is not well.
async fn refuse_unfit(core: &Core, name: &str) -> Result<(), Failure> {
    let status = status::of(core, name).await?;
    let refuse = |message: String, help: &str| Err(Failure::new(FailureKind::Conflict, message, help));
    if !status.host.connected {
        let since = status.host.since.map_or("it was never seen".to_owned(), |at| format!("it was last seen {at}"));
        return refuse(
            format!("the host of machine {name:?} is not connected: {since}"),
            "wait for it, or fail over without it: `tidemark failover unplanned NAME`",
        );
    }
    if status.state != status::State::Protected {
        return refuse(
            format!("machine {name:?} is not replicated to its end: it is {}", status.state.name()),
            "wait for `protected` in `tidemark status`; `tidemark failover unplanned NAME` needs no source",
        );
    }
    if status.health == Health::Critical {
        let reason = status.reasons.iter().find(|reason| reason.health == Health::Critical);
        let reason = reason.map_or_else(String::new, |reason| reason.message.clone());
        return refuse(
            format!("the health of machine {name:?} is not OK: {reason}"),
            "mend that first, or fail over to a point that is there: `tidemark failover unplanned NAME`",
        );
    }
    Ok(())
}

async fn lost(core: &Core, machine: &Machine, point: &str) -> Result<Lost, Failure> {
    let call = Call::Loss { machine: machine.id, point: point.to_owned() };
    let answer = ask(core, machine, &call, QUICK).await.map_err(|failure| match failure.kind {
        FailureKind::NotFound => Failure {
            message: format!("machine {:?} has no such point to fail over to: {}", machine.name, failure.message),
            help: "see `tidemark point list NAME`; the first one is there when the initial replication has ended"
                .to_owned(),
            ..failure
        },
        _ => failure,
    })?;
    decode(&answer).map_err(not_understood)
}

fn loss(core: &Core, machine: &Machine, lost: &Lost) -> Loss {
    let peer = PeerId::Agent(machine.host);
    let pending: u64 = match core.hub.report(peer) {
        Some(Report::Agent(report)) => {
            let ours = |source: &&SourceDisk| {
                machine.disks.iter().any(|disk| disk.id == source.disk)
                    && source.server.is_none_or(|server| server == machine.server)
            };
            report.disks.iter().filter(ours).map(|source| source.pending_bytes).sum()
        }
        _ => 0,
    };
    let (until, source_last_seen) = match core.hub.presence(peer) {
        Presence::Connected { .. } => (core.clock.wall_now(), None),
        Presence::Gone { since, .. } => (lost.newest.max(since), Some(since)),
        Presence::NeverSeen => {
            let seen = core.store.state().hosts.get(&machine.host).map(|host| host.last_seen);
            (lost.newest.max(seen.unwrap_or(Timestamp(0))), seen)
        }
    };
    Loss { seconds: until.saturating_since(lost.time).as_secs_f64(), bytes: lost.bytes + pending, source_last_seen }
}

fn direction(core: &Core, machine: &Machine) -> String {
    let state = core.store.state();
    let (host, server) = (state.host_name(machine.host), state.server_name(machine.server));
    format!("from host {host} to process server {server}")
}

fn said(kind: Kind, lost: &Lost, loss: &Loss) -> String {
    match kind {
        Kind::Planned => "to the last change; nothing is lost".to_owned(),
        Kind::Unplanned => {
            let unknown = loss
                .source_last_seen
                .map_or_else(String::new, |at| format!(", and what the source wrote since it was last seen {at}"));
            let seconds = loss.seconds;
            format!("to the point of {}; {seconds:.1} s and at most {} bytes are lost{unknown}", lost.time, loss.bytes)
        }
    }
}

/// Lets the source go on, as far as it can be reached.
pub async fn settle_source(core: &Core, machine: &Machine) -> Result<(), Failure> {
    settle_server(core, machine).await?;
    settle_agent(core, machine).await.map(drop)
}

pub fn note(core: &Core, name: &str, message: &str) {
    core.history.note(News {
        severity: Severity::Warning,
        kind: "failover",
        machine: Some(name.to_owned()),
        message: format!("machine {name} {message}"),
        help: "see `tidemark failover show NAME`".to_owned(),
    });
}
