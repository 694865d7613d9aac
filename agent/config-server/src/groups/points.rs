//! Points of a group: instants that all of its machines have. A point is the group's when each machine has one with the same id, made
//! behind the barrier; so what is asked are the process servers, and nothing that was noted here can be wrong.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{join_all, try_join_all};
use serde::{Deserialize, Serialize};
use tidemark_base::{HostId, MachineId, MarkId, ServerId, Timestamp};
use tidemark_proto::control::{
    AgentCommand, Consistency, Failure, FailureKind, GROUP_CANDIDATE, GROUP_POINT, GroupReleased, HoldGroup,
    MarkRequest, PointInfo, Reply, ServerCommand, Verdict,
};
use utoipa::ToSchema;

use super::{find, members};
use crate::barrier::{self, Asked, Hosts, Missed, Round};
use crate::consumers;
use crate::core::{Core, QUICK};
use crate::history::News;
use crate::hub::{PeerId, unexpected};
use crate::jobs::Job;
use crate::model::{Machine, State, Wanted};
use crate::names::check_label;

/// How often a barrier is tried before its point is made without it.
const ATTEMPTS: u32 = 4;
/// Between two tries: writes that are long on their way end meanwhile.
const PAUSE: Duration = Duration::from_millis(100);
/// What an agent may need beyond the limit to say that it holds or let go: its own limit has let everybody go on by then.
const ANSWER: Duration = Duration::from_secs(10);
/// How long a mark may take to become durable on every machine.
const POINT_LIMIT: Duration = Duration::from_secs(900);
/// What is written for a machine's own group.
pub const LATEST: &str = "latest-group";

#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CreatePoint {
    pub label: String,
}

/// An instant that all machines of a group have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct GroupPoint {
    /// The same for each machine.
    #[schema(value_type = String, format = "uuid")]
    pub id: MarkId,
    #[schema(value_type = String, format = "date-time")]
    pub time: Timestamp,
    pub label: String,
    pub machines: Vec<String>,
}

/// The agents, over their streams.
struct Agents<'a> {
    core: &'a Core,
    members: &'a [Machine],
}

#[tonic::async_trait]
impl Hosts for Agents<'_> {
    async fn hold(&self, host: HostId, hold: &HoldGroup) -> Result<(), Failure> {
        let limit = hold.limit + ANSWER;
        self.core.agent_does(host, &AgentCommand::HoldGroup(hold.clone()), limit).await
    }

    async fn release(&self, host: HostId, round: MarkId, verdict: Verdict) -> Result<GroupReleased, Failure> {
        match self.core.agent(host, &AgentCommand::ReleaseGroup { round, verdict }, ANSWER).await? {
            Reply::GroupReleased(released) => Ok(released),
            other => Err(unexpected(PeerId::Agent(host), &other)),
        }
    }

    fn name(&self, host: HostId) -> String {
        let known = self.core.store.state().hosts.get(&host).map(|host| host.name.clone());
        let machines: Vec<&str> =
            self.members.iter().filter(|member| member.host == host).map(|member| member.name.as_str()).collect();
        format!("{} ({})", known.unwrap_or_else(|| host.to_string()), machines.join(", "))
    }
}

/// What became of a point of a group.
pub struct Made {
    pub round: Round,
    pub members: Vec<Machine>,
}

/// Makes one point of all machines: at one instant where everybody holds within the limit, else of each machine by itself.
pub async fn make(core: &Core, name: &str, label: &str) -> Result<Made, Failure> {
    // One barrier of a group at a time.
    let _lock = core.lock(&format!("group/{name}")).await;
    let mut attempt = 1;
    loop {
        let state = core.store.state();
        let limit = Duration::from_millis(find(&state, name)?.hold_limit_ms);
        let members = members(&state, name);
        refuse_unfit(core, name, &members)?;
        let mut asked = Asked { group: name, hosts: Default::default(), limit, label, otherwise: Verdict::Plain };
        for member in &members {
            asked.hosts.entry(member.host).or_default().push(member.id);
        }
        if attempt < ATTEMPTS {
            asked.otherwise = Verdict::Nothing;
        }
        let mut round = barrier::run(&Agents { core, members: &members }, &asked).await;
        if !round.missed.is_empty() && attempt < ATTEMPTS {
            attempt += 1;
            let _ = tokio::time::timeout(PAUSE, core.stop.cancelled()).await;
            continue;
        }
        if !round.missed.is_empty() {
            mark_apart(core, &members, label, &mut round).await;
            note_missed(core, name, &round.missed);
        }
        return Ok(Made { round, members });
    }
}

/// Machines whose host missed the barrier get a mark of their own, as far as that can be.
async fn mark_apart(core: &Core, members: &[Machine], label: &str, round: &mut Round) {
    let without: Vec<&Machine> = members.iter().filter(|member| !round.marks.contains_key(&member.id)).collect();
    let marking = without.into_iter().map(|member| async move {
        let (machine, consistency) = (member.id, Consistency::Crash);
        let mark = MarkRequest { machine, consistency, label: label.to_owned(), keep: true };
        match core.agent(member.host, &AgentCommand::Mark(mark), QUICK).await {
            Ok(Reply::Marked { time, .. }) => Some((machine, time)),
            _ => None,
        }
    });
    round.marks.extend(join_all(marking).await.into_iter().flatten());
}

fn note_missed(core: &Core, name: &str, missed: &[Missed]) {
    let who: Vec<String> = missed.iter().map(|missed| format!("host {}: {}", missed.host, missed.reason)).collect();
    core.history.note(News {
        severity: tidemark_proto::control::Severity::Warning,
        kind: "group_point_missed",
        machine: None,
        message: format!(
            "the point of group {name} was made for each machine by itself, not at one instant of all: {}",
            who.join("; ")
        ),
        help: missed.first().map(|missed| missed.help.clone()).unwrap_or_default(),
    });
}

/// What keeps a group from having points at all.
fn refuse_unfit(core: &Core, name: &str, members: &[Machine]) -> Result<(), Failure> {
    let refuse = |message: String, help: &str| Err(Failure::new(FailureKind::Conflict, message, help));
    if members.is_empty() {
        return refuse(format!("group {name:?} has no machines"), "add some: `tidemark group add GROUP MACHINE`");
    }
    for member in members {
        if member.wanted == Wanted::Paused {
            return refuse(
                format!(
                    "machine {:?} of group {name:?} is paused: a point made now would not become durable",
                    member.name
                ),
                "let it send again first: `tidemark resume NAME`, or take it out of the group",
            );
        }
        if member.failover.is_some() {
            return refuse(
                format!("machine {:?} of group {name:?} failed over: its source has no points", member.name),
                "see `tidemark failover show NAME`, or take it out of the group",
            );
        }
        if !core.hub.is_connected(PeerId::Agent(member.host)) {
            return Err(Failure::new(
                FailureKind::Unavailable,
                format!("the host of machine {:?} of group {name:?} is not connected", member.name),
                "all machines of a group are marked together: see `tidemark status`, or take it out of the group",
            ));
        }
    }
    Ok(())
}

/// Makes a point of the group now; the job ends when it is durable on every machine.
pub fn create(core: &Arc<Core>, name: &str, request: CreatePoint) -> Result<Job, Failure> {
    check_label(&request.label)?;
    {
        let state = core.store.state();
        find(&state, name)?;
        refuse_unfit(core, name, &members(&state, name))?;
    }
    let (core, name) = (core.clone(), name.to_owned());
    core.jobs.clone().start("group_point", None, |progress| async move {
        progress.step("hold all machines at one instant");
        let Made { round, members } = make(&core, &name, &request.label).await?;
        let whole = round.missed.is_empty();
        let time = round.marks.values().max().copied();
        if whole {
            progress.step("wait until every machine's process server has it");
            let waiting = members.iter().map(|member| consumers::wait_point(&core, member, round.id, POINT_LIMIT));
            try_join_all(waiting).await?;
            progress.step("note that it is one instant of all");
            let common = Common::ask(&core, &members).await?;
            common.confirm(&core, round.id).await?;
        }
        Ok(serde_json::json!({
            "id": whole.then_some(round.id),
            "time": time,
            "consistency": "crash",
            "group": name,
            "group_consistent": whole,
            "missed": round.missed,
            "held_seconds": round.held.as_secs_f64(),
            "machines": members.iter().map(|member| &member.name).collect::<Vec<_>>(),
        }))
    })
}

/// What the process servers say that can be asked: each machine, and what each of its process servers has.
struct Common(Vec<(MachineId, Vec<(ServerId, Vec<PointInfo>)>)>);

impl Common {
    async fn ask(core: &Core, members: &[Machine]) -> Result<Self, Failure> {
        let asking =
            members.iter().map(|member| async move { Ok((member.id, consumers::points_of_each(core, member).await?)) });
        try_join_all(asking).await.map(Self)
    }

    /// What each machine has somewhere, oldest first.
    fn points(&self) -> Vec<PointInfo> {
        let lists: Vec<Vec<PointInfo>> = self.0.iter().map(|(_, told)| held(told)).collect();
        common(&lists)
    }

    /// Tells those that have the point that it is the group's. Who gets it later is told by [`settle`].
    async fn confirm(&self, core: &Core, point: MarkId) -> Result<(), Failure> {
        let has = |points: &[PointInfo]| points.iter().any(|known| known.id == point && is_of_group(known));
        let of = |(machine, told): &(MachineId, Vec<(ServerId, Vec<PointInfo>)>)| {
            let holders = told.iter().filter(|(_, points)| has(points)).map(|(server, _)| *server);
            let command = ServerCommand::ConfirmPoint { machine: *machine, point: Some(point) };
            holders.map(|server| (server, command.clone())).collect::<Vec<_>>()
        };
        let all: Vec<(ServerId, ServerCommand)> = self.0.iter().flat_map(of).collect();
        try_join_all(all.iter().map(|(server, command)| core.server_does(*server, command, QUICK))).await.map(drop)
    }
}

/// What one machine has of its group: each point once, in the order of their times.
fn held(told: &[(ServerId, Vec<PointInfo>)]) -> Vec<PointInfo> {
    let [(_, alone)] = told else {
        let mut seen = BTreeSet::new();
        let all = told.iter().flat_map(|(_, points)| points).filter(|point| is_of_group(point));
        let mut all: Vec<PointInfo> = all.filter(|point| seen.insert(point.id)).cloned().collect();
        all.sort_by_key(|point| point.time);
        return all;
    };
    alone.clone()
}

fn is_of_group(point: &PointInfo) -> bool {
    let has = |flag: &str| point.flags.iter().any(|known| known == flag);
    (has(GROUP_POINT) || has(GROUP_CANDIDATE)) && !has("damaged")
}

/// What all machines have, oldest first.
fn common(lists: &[Vec<PointInfo>]) -> Vec<PointInfo> {
    let Some((first, others)) = lists.split_first() else { return Vec::new() };
    let ids = |list: &[PointInfo]| -> BTreeSet<MarkId> {
        list.iter().filter(|point| is_of_group(point)).map(|point| point.id).collect()
    };
    let others: Vec<BTreeSet<MarkId>> = others.iter().map(|list| ids(list)).collect();
    let is_common = |point: &&PointInfo| is_of_group(point) && others.iter().all(|other| other.contains(&point.id));
    first.iter().filter(is_common).cloned().collect()
}

async fn common_of(core: &Core, members: &[Machine]) -> Result<Vec<PointInfo>, Failure> {
    Ok(Common::ask(core, members).await?.points())
}

/// Oldest first.
pub async fn list(core: &Core, name: &str) -> Result<Vec<GroupPoint>, Failure> {
    let state = core.store.state();
    find(&state, name)?;
    let members = members(&state, name);
    let machines: Vec<String> = members.iter().map(|member| member.name.clone()).collect();
    let shown = |point: PointInfo| GroupPoint {
        id: point.id,
        time: point.time,
        label: point.label,
        machines: machines.clone(),
    };
    Ok(common_of(core, &members).await?.into_iter().map(shown).collect())
}

/// The newest instant that all machines of the group have.
pub async fn latest(core: &Core, name: &str) -> Result<PointInfo, Failure> {
    let state = core.store.state();
    find(&state, name)?;
    common_of(core, &members(&state, name)).await?.pop().ok_or_else(|| {
        Failure::new(
            FailureKind::NotFound,
            format!("group {name:?} has no point that all of its machines have"),
            "make one: `tidemark group point NAME`; `tidemark events` says who missed the last ones",
        )
    })
}

/// What a user calls a point of a machine: `latest-group` is the newest that all machines of its group have.
pub async fn named(core: &Core, machine: &str, point: String) -> Result<String, Failure> {
    if point != LATEST {
        return Ok(point);
    }
    match core.machine(machine)?.group {
        Some(group) => Ok(latest(core, &group).await?.id.to_string()),
        None => Err(Failure::new(
            FailureKind::Conflict,
            format!("machine {machine:?} is in no group"),
            "name a point of its own: `latest`, an id, or a time",
        )),
    }
}

/// Where the process servers of each machine stand with the group's points, as they reported last: those that are there and have
/// one. `None` while a machine has nobody who does.
pub type Standing = Vec<(ServerId, MarkId, Option<MarkId>)>;

fn standing(core: &Core, members: &[Machine]) -> Option<Standing> {
    let mut all = Vec::new();
    for member in members {
        let before = all.len();
        all.extend(member.servers().filter_map(|server| {
            let crate::hub::Report::Server(report) = core.hub.report(PeerId::ProcessServer(server))? else {
                return None;
            };
            let of = report.machines.iter().find(|of| of.machine == member.id)?;
            Some((server, of.group_candidate?, of.group_point))
        }));
        if all.len() == before {
            return None;
        }
    }
    Some(all)
}

/// Tells process servers of the newest point that all machines have: it is kept, and shown as the group's. `seen` is where they stood
/// when that was last done, so that nothing is asked while nothing changes.
pub async fn settle(core: &Core, name: &str, seen: &mut Option<Standing>) -> Result<(), Failure> {
    let members = members(&core.store.state(), name);
    let Some(standing) = standing(core, &members) else { return Ok(()) };
    let newest = standing.first().map(|(_, candidate, _)| *candidate);
    let is_done = standing.iter().all(|(_, candidate, point)| Some(*candidate) == newest && *point == newest);
    if is_done || seen.as_ref() == Some(&standing) {
        return Ok(());
    }
    let common = Common::ask(core, &members).await?;
    if let Some(point) = common.points().pop() {
        common.confirm(core, point.id).await?;
    }
    *seen = Some(standing);
    Ok(())
}

/// Machines that left their group keep no points for it.
pub async fn let_go(core: &Core, state: &State) -> Result<(), Failure> {
    for machine in state.machines.values().filter(|machine| machine.group.is_none()) {
        for (server, _, point) in standing(core, std::slice::from_ref(machine)).unwrap_or_default() {
            if point.is_some() {
                let command = ServerCommand::ConfirmPoint { machine: machine.id, point: None };
                core.server_does(server, &command, QUICK).await?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(id: u8, flags: &[&str]) -> PointInfo {
        PointInfo {
            id: MarkId::from_bytes([id; 16]),
            time: Timestamp(u64::from(id)),
            consistency: Consistency::Crash,
            label: String::new(),
            locked: false,
            change_bytes: 0,
            flags: flags.iter().map(|flag| (*flag).to_owned()).collect(),
        }
    }

    #[test]
    fn a_point_is_the_groups_when_each_machine_has_it_from_behind_the_barrier() {
        let web = vec![
            point(1, &[GROUP_POINT]),
            point(2, &[GROUP_CANDIDATE]),
            point(3, &[]),
            point(4, &[GROUP_CANDIDATE]),
            point(5, &[GROUP_CANDIDATE]),
        ];
        let database = vec![
            point(1, &[GROUP_CANDIDATE]),
            // It was let go on before it was released: its own point.
            point(2, &[]),
            point(3, &[]),
            point(4, &[GROUP_CANDIDATE]),
            point(5, &["damaged", GROUP_CANDIDATE]),
        ];
        let ids = |lists: &[Vec<PointInfo>]| common(lists).iter().map(|point| point.time.0).collect::<Vec<_>>();
        assert_eq!(ids(&[web.clone(), database.clone()]), [1, 4]);
        assert_eq!(ids(&[web.clone(), database, Vec::new()]), [0; 0], "a machine that came later has none of them");
        assert_eq!(ids(std::slice::from_ref(&web)), [1, 2, 4, 5]);
        assert_eq!(ids(&[]), [0; 0]);
    }

    #[test]
    fn a_machine_has_what_any_of_its_process_servers_has_undamaged() {
        let (first, second) = (ServerId::random(), ServerId::random());
        let behind = vec![point(1, &[GROUP_POINT]), point(2, &["damaged", GROUP_CANDIDATE]), point(9, &[])];
        let ahead = vec![point(2, &[GROUP_CANDIDATE]), point(3, &[GROUP_CANDIDATE])];
        let ids = |told: &[(ServerId, Vec<PointInfo>)]| held(told).iter().map(|point| point.time.0).collect::<Vec<_>>();
        assert_eq!(ids(&[(first, behind.clone()), (second, ahead.clone())]), [1, 2, 3]);
        assert_eq!(ids(&[(second, ahead.clone()), (first, behind.clone())]), [1, 2, 3], "in the order of time");
        // The machines of the group need not have it at the same one.
        let (web, database) = (held(&[(first, behind), (second, ahead.clone())]), held(&[(second, ahead)]));
        let common: Vec<u64> = common(&[web, database]).iter().map(|point| point.time.0).collect();
        assert_eq!(common, [2, 3]);
    }
}
