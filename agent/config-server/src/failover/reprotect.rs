//! Reprotect: the home disks of a machine that runs elsewhere are brought to its state, and follow it.
//!
//! 1. the agent at home is there, and its disks can be written
//! 2. what is wanted is stored
//! 3. what only home has is sent, and kept as a locked point; nothing is overwritten before that
//! 4. the master target pulls what differs ([`tidemark_proto::failback`]) until the home disks show the machine at one instant
//! 5. they follow it from then on
//!
//! *Consistency.* As the master target says: home disks have what they had, or can be finished, at every instant. *Retries.* Asking
//! again goes on where it was left. *Cancellation.* Cancelling the job leaves the master target at its work; [`cancel`] gives the
//! home disks back what they had. *Crash.* The agent goes on by itself; asking again follows it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tidemark_base::{Clock, HostId, MarkId};
use tidemark_hypervisor::call::{Call, Difference, decode};
use tidemark_proto::control::{AgentCommand, Failure, FailureKind, Reply, Selector, ServerCommand};
use tidemark_proto::failback::{Method, NewDisk, Stage, TargetCall, TargetReport};
use tokio::sync::OwnedMutexGuard;
use uuid::Uuid;

use super::elsewhere;
use super::start::{note, send_all};
use super::state::{self, Failover, Home, Phase};
use super::{after, ask, by_name, not_understood};
use crate::core::{Core, QUICK, SETTLE, WHOLE_DISK};
use crate::hub::{PeerId, Presence, unexpected};
use crate::jobs::{Job, Progress};
use crate::machines::{settle_agent, settle_server, vanished};
use crate::model::Machine;
use crate::names::bad_request;

/// How often a master target is looked after.
pub const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// What the master target tries again that long is told as a failure of the job.
const PROBLEM_LIMIT: Duration = Duration::from_secs(120);
/// An agent that has not come back by then is not waited for any more.
const AGENT_LIMIT: Duration = Duration::from_secs(3600);

#[derive(Clone, Debug, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ReprotectRequest {
    /// `delta`, `compare` or `full`; absent: the one that is recommended.
    pub method: Option<String>,
    /// The host that it goes home to; absent: the one that it came from. At another one new disks are made.
    pub to: Option<String>,
    /// A folder of that host where new disks are made; absent: where the original ones are.
    pub store: Option<String>,
    /// The process server that it runs at; absent: that one.
    pub process_server: Option<String>,
    /// Says what is in the way and what is recommended, and does nothing.
    pub check_only: bool,
}

/// A method, and why.
pub struct Recommendation {
    pub method: Method,
    pub why: String,
}

pub fn start(core: &Arc<Core>, name: &str, request: ReprotectRequest) -> Result<Job, Failure> {
    let method = request.method.as_deref().map(|name| {
        Method::named(name).ok_or_else(|| {
            let shown: String = name.chars().take(80).collect();
            bad_request(format!("{shown:?} is no method of a reprotect"), "name `delta`, `compare` or `full`")
        })
    });
    let method = method.transpose()?;
    refuse_phase(name, &state::find(&after::find_returning(core, name)?)?)?;
    let (core, name) = (core.clone(), name.to_owned());
    core.jobs.clone().start_or_check("reprotect", Some(&name.clone()), request.check_only, |progress| async move {
        run(&core, &progress, &name, method, request).await
    })
}

fn refuse_phase(name: &str, failover: &Failover) -> Result<(), Failure> {
    let help = match failover.phase {
        Phase::Committed | Phase::Reprotecting | Phase::Reprotected => return Ok(()),
        Phase::Draining | Phase::Starting | Phase::FailedOver | Phase::ChangingPoint | Phase::Cancelling => {
            "commit the failover first: `tidemark commit NAME`"
        }
        Phase::Withdrawing => "wait until that is done: `tidemark reprotect cancel NAME`",
        Phase::FailingBack => "complete the failback (`tidemark failback complete NAME`), or cancel it",
        Phase::FailedBack | Phase::Landing => "commit the failback (`tidemark commit NAME`), or cancel it",
    };
    let message = format!("machine {name:?} {}: it cannot be reprotected now", failover.phase.name());
    Err(Failure::new(FailureKind::Conflict, message, help))
}

async fn run(
    core: &Core,
    progress: &Progress,
    name: &str,
    method: Option<Method>,
    request: ReprotectRequest,
) -> Result<Value, Failure> {
    progress.step("check what is needed");
    let machine = core.machine(name)?;
    let failover = state::find(&machine)?;
    refuse_phase(name, &failover)?;
    refuse_server(core, &machine, &request)?;
    let place = elsewhere::wanted(core, &machine, &request)?;
    if failover.phase == Phase::Reprotected {
        return Ok(shown(name, &failover, &report(core, &machine).await?, None));
    }
    // Whether it runs where it is said to, and how much there is to do.
    let answer = ask(core, &machine, &Call::Changed { failover: failover.id }, SETTLE).await?;
    let difference: Difference = decode(&answer).map_err(not_understood)?;
    let recommended = recommend(&difference);
    if !request.check_only {
        wait_for_agent(core, progress, place.as_ref().map_or(machine.host, |place| place.host)).await?;
    }
    let lock = core.lock(name).await;
    let machine = core.machine(name)?;
    let failover = state::find(&machine)?;
    refuse_phase(name, &failover)?;
    // A reprotect of before that went on by itself may have arrived since.
    if failover.phase == Phase::Reprotected {
        return Ok(shown(name, &failover, &report(core, &machine).await?, None));
    }
    let place = elsewhere::wanted(core, &machine, &request)?;
    if let Some(place) = place {
        let disks = elsewhere::new_disks(&machine, &place, true, &difference);
        return to_new_disks(core, progress, lock, (&machine, &failover), method, (&place, disks), request.check_only)
            .await;
    }
    settle_server(core, &machine).await?;
    let may_make = method == Some(Method::Full) && failover.home.is_none() && !request.check_only;
    let is_new = match settle_agent(core, &machine).await {
        Ok(_) => false,
        Err(failure) if failure.kind == FailureKind::NotFound && may_make => {
            progress.step("make new disks");
            let disks = elsewhere::new_disks(&machine, &elsewhere::Place::of(&machine), false, &difference);
            call(core, &machine, &TargetCall::Make { disks }).await?;
            settle_agent(core, &machine).await?;
            true
        }
        Err(failure) if failure.kind == FailureKind::NotFound => {
            let help =
                "where the original is gone new disks are made: `tidemark reprotect NAME --method full`".to_owned();
            return Err(Failure { help, ..failure });
        }
        Err(failure) => return Err(failure),
    };
    let found = call(core, &machine, &TargetCall::Check { machine: machine.id }).await?;
    refuse_obstacles(&found)?;
    let wanted = method.unwrap_or(recommended.method);
    let (wanted, why) = match (wanted, difference.changed_bytes) {
        (Method::Delta, None) => (Method::Compare, "what changed is not known, so everything is compared".to_owned()),
        (wanted, _) if wanted == recommended.method => (wanted, recommended.why.clone()),
        (wanted, _) => (wanted, format!("it was asked for; recommended is {}", recommended.method.name())),
    };
    progress.step(format!("recommended: {}, because {}", recommended.method.name(), recommended.why));
    if request.check_only {
        return Ok(json!({ "machine": name, "recommended": recommended.method, "why": recommended.why,
            "changed_bytes": difference.changed_bytes, "total_bytes": difference.total_bytes }));
    }
    // A master target that is at work already, as a configuration server of yesterday finds it, has overwritten what home had.
    let is_at_work = found.failover == Some(failover.id) && !matches!(found.stage, Stage::Idle | Stage::Undone);
    let keeps = !is_new && !is_at_work;
    // One that was begun is gone on with, by its own method.
    let began = core.clock.wall_now();
    let machine = state::advance(core, name, failover.id, Phase::Reprotecting, |failover| {
        failover.home.get_or_insert(Home { method: wanted, began, keeps, kept: None, taken: false, from: None });
    })?;
    note(core, name, &format!("is being reprotected by {}: {why}", wanted.name()));
    let failover = bring(core, progress, &machine).await?;
    drop(lock);
    arrive(core, progress, &machine, &failover, Some(&recommended)).await
}

/// What only home has is kept as a point, then the master target begins.
pub async fn bring(core: &Core, progress: &Progress, machine: &Machine) -> Result<Failover, Failure> {
    let mut machine = machine.clone();
    let home = |machine: &Machine| state::find(machine)?.home.ok_or_else(vanished);
    if home(&machine)?.keeps {
        progress.step("keep what only home has, as a point");
        let kept = keep_aside(core, progress, &machine).await?;
        let id = state::find(&machine)?.id;
        machine = state::advance(core, &machine.name, id, Phase::Reprotecting, |failover| {
            if let Some(home) = &mut failover.home {
                (home.keeps, home.kept) = (false, Some(kept));
            }
        })?;
    }
    // From here on home sends nothing: what is written there is the machine's own.
    settle_agent(core, &machine).await?;
    let failover = state::find(&machine)?;
    ask(core, &machine, &Call::SeeAgain { failover: failover.id }, 2 * SETTLE).await?;
    let sync = TargetCall::Sync { machine: machine.id, failover: failover.id, method: home(&machine)?.method };
    call(core, &machine, &sync).await?;
    Ok(failover)
}

async fn keep_aside(core: &Core, progress: &Progress, machine: &Machine) -> Result<MarkId, Failure> {
    let kept = loop {
        settle_agent(core, machine).await?;
        match send_all(core, machine, "home, before it was overwritten", WHOLE_DISK).await {
            // What it has is not in its log: it is scanned first, and there is no point until then.
            Err(failure) if failure.kind == FailureKind::Unavailable => {
                tracing::info!(machine = machine.name, %failure, "what only home has is not a point yet");
                wait_for_agent(core, progress, machine.host).await?;
                if tokio::time::timeout(LOOK_AGAIN, core.stop.cancelled()).await.is_ok() {
                    return Err(failure);
                }
            }
            other => break other?,
        }
    };
    let lock = ServerCommand::Lock { machine: machine.id, point: Selector::Point(kept), locked: true };
    match core.server(machine.server, &lock, QUICK).await? {
        Reply::Point(_) => Ok(kept),
        other => Err(unexpected(PeerId::ProcessServer(machine.server), &other)),
    }
}

fn recommend(difference: &Difference) -> Recommendation {
    match difference.changed_bytes {
        Some(changed) => Recommendation {
            method: Method::Delta,
            why: format!("at most {changed} of {} bytes differ, and it is known which", difference.total_bytes),
        },
        None => Recommendation {
            method: Method::Compare,
            why: format!("which of {} bytes differ is not known on both sides", difference.total_bytes),
        },
    }
}

/// The data comes from where it runs.
fn refuse_server(core: &Core, machine: &Machine, request: &ReprotectRequest) -> Result<(), Failure> {
    let Some(wanted) = &request.process_server else { return Ok(()) };
    let state = core.store.state();
    let server = state.servers.get(&machine.server).map_or("", |server| server.name.as_str());
    if *wanted != server && *wanted != machine.server.to_string() {
        return Err(bad_request(
            format!("machine {:?} runs at process server {server}, not at {wanted}", machine.name),
            "leave --process-server out: what it writes is only there",
        ));
    }
    Ok(())
}

/// Its home is another place from now on: everything crosses once, and the original disks stay as they are.
async fn to_new_disks(
    core: &Core,
    progress: &Progress,
    lock: OwnedMutexGuard<()>,
    (machine, failover): (&Machine, &Failover),
    method: Option<Method>,
    (place, disks): (&elsewhere::Place, Vec<NewDisk>),
    check_only: bool,
) -> Result<Value, Failure> {
    let name = &machine.name;
    let why = "there is nothing to compare with where new disks are made".to_owned();
    if method.is_some_and(|method| method != Method::Full) {
        let message = format!("machine {name:?} goes home to new disks: everything crosses");
        return Err(bad_request(message, "leave --method out, or name `full`"));
    }
    if !core.hub.is_connected(PeerId::Agent(place.host)) {
        let host = core.store.state().host_name(place.host);
        return Err(Failure::new(FailureKind::Unavailable, format!("host {host} is not connected"), "start its agent"));
    }
    let recommended = Recommendation { method: Method::Full, why };
    elsewhere::refuse_unfit(core, machine, place, &disks).await?;
    if check_only {
        let needed: u64 = disks.iter().map(|disk| disk.data_bytes).sum();
        return Ok(json!({ "machine": name, "recommended": recommended.method, "why": recommended.why,
            "host": place.host, "paths": place.paths, "needed_bytes": needed }));
    }
    progress.step("make new disks");
    let home =
        Home { method: Method::Full, began: core.clock.wall_now(), keeps: false, kept: None, taken: false, from: None };
    let machine = elsewhere::go(core, machine, failover.id, place, disks, home).await?;
    let host = core.store.state().host_name(place.host);
    note(core, name, &format!("is being reprotected to new disks at host {host}"));
    settle_server(core, &machine).await?;
    if let Err(failure) = elsewhere::settle_original(core, &machine).await {
        tracing::info!(machine = name, %failure, "the host of the original disks is told when it connects");
    }
    settle_agent(core, &machine).await?;
    let found = call(core, &machine, &TargetCall::Check { machine: machine.id }).await?;
    refuse_obstacles(&found)?;
    let failover = bring(core, progress, &machine).await?;
    drop(lock);
    arrive(core, progress, &machine, &failover, Some(&recommended)).await
}

/// Until the home disks follow it.
async fn arrive(
    core: &Core,
    progress: &Progress,
    machine: &Machine,
    failover: &Failover,
    recommended: Option<&Recommendation>,
) -> Result<Value, Failure> {
    let report = follow(core, progress, machine, "bring what differs home", |report| {
        matches!(report.stage, Stage::Consistent | Stage::Finished)
    });
    let report = report.await?;
    let _lock = core.lock(&machine.name).await;
    arrived(core, &machine.name, failover.id)?;
    Ok(shown(&machine.name, failover, &report, recommended))
}

/// Its home disks follow it. Of several that wait for that, each sees it, and one is first.
pub fn arrived(core: &Core, name: &str, id: Uuid) -> Result<(), Failure> {
    let now = state::find(&core.machine(name)?)?;
    if (now.id, now.phase) != (id, Phase::Reprotected) {
        state::advance(core, name, id, Phase::Reprotected, |_| {})?;
        note(core, name, "is reprotected: its home disks follow it");
    }
    Ok(())
}

pub fn refuse_obstacles(report: &TargetReport) -> Result<(), Failure> {
    let Some(first) = report.obstacles.first() else { return Ok(()) };
    let all: Vec<&str> = report.obstacles.iter().map(|obstacle| obstacle.message.as_str()).collect();
    Err(Failure::new(FailureKind::Conflict, all.join("; "), first.help.clone()))
}

/// The agent at home may take a while to come back: it is waited for, and who waits is told since when.
pub async fn wait_for_agent(core: &Core, progress: &Progress, host: HostId) -> Result<(), Failure> {
    let began = Instant::now();
    let mut said = false;
    loop {
        let (name, seen) = match core.hub.presence(PeerId::Agent(host)) {
            Presence::Connected { .. } => return Ok(()),
            Presence::Gone { name, since } => (name, Some(since)),
            Presence::NeverSeen => {
                let state = core.store.state();
                let known = state.hosts.get(&host);
                (known.map_or_else(|| host.to_string(), |host| host.name.clone()), known.map(|host| host.last_seen))
            }
        };
        let seen = seen.map_or("it was never seen".to_owned(), |at| format!("last seen {at}"));
        let message = format!("the agent of host {name} has not registered yet ({seen})");
        if began.elapsed() > AGENT_LIMIT {
            return Err(Failure::new(
                FailureKind::Unavailable,
                message,
                "start it, then ask again; nothing was changed",
            ));
        }
        if !said {
            progress.step(format!("{message}; it is waited for"));
            said = true;
        }
        if tokio::time::timeout(LOOK_AGAIN, core.stop.cancelled()).await.is_ok() {
            return Err(Failure::new(FailureKind::Unavailable, "the configuration server is stopping", "ask again"));
        }
    }
}

/// Asks the master target.
pub async fn call(core: &Core, machine: &Machine, call: &TargetCall) -> Result<TargetReport, Failure> {
    let wrong = |error: serde_json::Error| {
        let message = format!("what came about a master target is not understood: {error}");
        Failure::new(FailureKind::BadRequest, message, "let both ends be of the same version")
    };
    let command = AgentCommand::MasterTarget(serde_json::to_string(call).map_err(wrong)?);
    let answered = core.agent(machine.host, &command, SETTLE).await;
    match answered.map_err(|failure| by_name(machine, failure))? {
        Reply::MasterTarget(answer) => serde_json::from_str(&answer).map_err(wrong),
        other => Err(unexpected(PeerId::Agent(machine.host), &other)),
    }
}

pub async fn report(core: &Core, machine: &Machine) -> Result<TargetReport, Failure> {
    call(core, machine, &TargetCall::Report { machine: machine.id }).await
}

/// Looks after the master target until it is where it should be. An agent that is away for a while is waited for.
pub async fn follow(
    core: &Core,
    progress: &Progress,
    machine: &Machine,
    step: &str,
    is_there: impl Fn(&TargetReport) -> bool,
) -> Result<TargetReport, Failure> {
    progress.step(step);
    let mut since: Option<Instant> = None;
    loop {
        match report(core, machine).await {
            Ok(report) => {
                progress.done(report.done_bytes, report.total_bytes);
                match &report.problem {
                    None if is_there(&report) => return Ok(report),
                    None => since = None,
                    Some(problem) => {
                        if since.get_or_insert_with(Instant::now).elapsed() > PROBLEM_LIMIT {
                            let help = report.help.clone().unwrap_or_default();
                            let help = format!("{help}; it is tried again all the time: ask again to follow it");
                            return Err(Failure::new(FailureKind::Unavailable, problem.clone(), help));
                        }
                    }
                }
                if report.stage == Stage::Idle {
                    let message = format!("the master target of machine {:?} has nothing to do any more", machine.name);
                    return Err(Failure::new(FailureKind::Conflict, message, "see `tidemark failover show NAME`"));
                }
            }
            Err(failure) if matches!(failure.kind, FailureKind::Unavailable | FailureKind::TimedOut) => {
                wait_for_agent(core, progress, machine.host).await?;
            }
            Err(failure) => return Err(failure),
        }
        if tokio::time::timeout(LOOK_AGAIN, core.stop.cancelled()).await.is_ok() {
            let message = "the configuration server is stopping";
            return Err(Failure::new(FailureKind::Unavailable, message, "it goes on at home; ask again to follow it"));
        }
    }
}

fn shown(name: &str, failover: &Failover, report: &TargetReport, recommended: Option<&Recommendation>) -> Value {
    json!({
        "machine": name,
        "method": failover.home.as_ref().map(|home| home.method),
        "recommended": recommended.map(|recommended| recommended.method),
        "why": recommended.map(|recommended| recommended.why.clone()),
        "kept_point": failover.home.as_ref().and_then(|home| home.kept),
        "rounds": report.rounds,
        "compared_bytes": report.compared_bytes,
        "received_bytes": report.received_bytes,
        "wire_bytes": report.wire_bytes,
        "consistent_at": report.consistent_at,
        "behind_bytes": report.behind_bytes,
    })
}

/// The home disks are given back what they had.
pub fn cancel(core: &Arc<Core>, name: &str) -> Result<Job, Failure> {
    let failover = state::find(&core.machine(name)?)?;
    if !matches!(failover.phase, Phase::Reprotecting | Phase::Reprotected | Phase::Withdrawing) {
        let message = format!("machine {name:?} {}: there is no reprotect to take back", failover.phase.name());
        return Err(Failure::new(FailureKind::Conflict, message, "see `tidemark failover show NAME`"));
    }
    let (core, name) = (core.clone(), name.to_owned());
    core.jobs.clone().start("reprotect_cancel", Some(&name.clone()), |progress| async move {
        let machine = core.machine(&name)?;
        let is_new = failover.home.as_ref().is_some_and(|home| home.from.is_some());
        let is_there = core.hub.is_connected(PeerId::Agent(machine.host));
        if is_new && !is_there {
            // New disks that nobody reaches have nothing to be given back.
            let _lock = core.lock(&name).await;
            let failover = state::find(&core.machine(&name)?)?;
            let machine = state::advance(&core, &name, failover.id, Phase::Withdrawing, |_| {})?;
            return withdraw(&core, &machine, &failover, 0).await;
        }
        wait_for_agent(&core, &progress, machine.host).await?;
        let _lock = core.lock(&name).await;
        let failover = state::find(&core.machine(&name)?)?;
        let machine = state::advance(&core, &name, failover.id, Phase::Withdrawing, |_| {})?;
        settle_agent(&core, &machine).await?;
        let undo = TargetCall::Undo { machine: machine.id, failover: failover.id };
        call(&core, &machine, &undo).await?;
        let step = "give the home disks back what they had";
        let report = follow(&core, &progress, &machine, step, |report| report.stage == Stage::Undone);
        // One that was never begun has nothing to give back.
        let report = match report.await {
            Err(_) if self::report(&core, &machine).await.is_ok_and(|report| report.stage == Stage::Idle) => {
                TargetReport::default()
            }
            other => other?,
        };
        call(&core, &machine, &TargetCall::LetGo { machine: machine.id, failover: failover.id }).await?;
        withdraw(&core, &machine, &failover, report.kept_bytes).await
    })
}

async fn withdraw(core: &Core, machine: &Machine, failover: &Failover, given_back: u64) -> Result<Value, Failure> {
    let name = &machine.name;
    ask(core, machine, &Call::StayAway { failover: failover.id }, SETTLE).await?;
    let new = failover.home.as_ref().is_some_and(|home| home.from.is_some()).then(|| elsewhere::Place::of(machine));
    let machine = elsewhere::go_back(core, machine, failover).await?;
    state::advance(core, name, failover.id, Phase::Committed, |failover| failover.home = None)?;
    settle_server(core, &machine).await?;
    note(core, name, "is not reprotected: its home disks have what they had");
    Ok(json!({ "machine": name, "given_back_bytes": given_back, "left_disks": new,
        "kept_point": failover.home.as_ref().and_then(|home| home.kept) }))
}
