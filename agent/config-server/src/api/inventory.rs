//! Who and what is there: hosts with their disks, and process servers.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Extension;
use axum::extract::{Path, Query, State};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tidemark_base::{DiskId, HostId, ServerId, Timestamp};
use tidemark_proto::control::{DiskUse, Failure, FailureKind, HostDisk, Problem, Volume};
use tidemark_transport::PeerIdentity;
use utoipa::ToSchema;
use utoipa::openapi::schema::Type;

use super::access::Caller;
use super::operations::{Operation, Operations};
use super::schema::{EmptySchema, ProblemSchema};
use super::{Answer, ok};
use crate::core::Core;
use crate::hub::{PeerId, Presence, Report};
use crate::inventory::Told;
use crate::model::{self, Machine, Registration, Standing, UserRole};
use crate::names::bad_request;
use crate::removal;

type App = State<Arc<Core>>;

pub fn declare(api: &mut Operations) {
    let reader = |summary| Operation::new(UserRole::Reader, summary);
    api.get("/hosts", list_hosts, reader("All hosts").answers_list::<HostInfo>());
    let one = reader("A host, by its id or name, with its disks").answers::<HostDetails>();
    api.get("/hosts/{id}", show_host, one);
    let admin = |summary| Operation::new(UserRole::Administrator, summary).answers::<EmptySchema>();
    let one = admin("Takes a host that is gone for good out of the inventory, and refuses its identity from then on");
    api.delete("/hosts/{id}", delete_host, one);
    let list = reader("The disks of all hosts, protected or not, as their agents see them").answers_list::<DiskInfo>();
    let list = list.query("host", Type::String, "Of this host only: its id or name.");
    let list = list.query("unprotected", Type::Boolean, "Only those that are not protected.");
    api.get("/disks", list_disks, list);
    let list = reader("All process servers, those that wait for approval first").answers_list::<ProcessServerInfo>();
    api.get("/process-servers", list_servers, list);
    let one = reader("A process server, by its id or name").answers::<ProcessServerInfo>();
    api.get("/process-servers/{id}", show_server, one);
    let one = admin(
        "Takes a process server that is gone for good out of the inventory, and refuses its identity from then on",
    );
    let force = "Whether replicas that it keeps of machines that are not protected any more are given up.";
    api.delete("/process-servers/{id}", delete_server, one.query("force", Type::Boolean, force));
}

/// Whether its certificate is taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Approval {
    /// It registered, and an operator has to approve.
    Waiting,
    Approved,
    /// An operator revoked it.
    Revoked,
    /// Two live processes showed its identity.
    Fenced,
}

/// A host whose agent registered.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HostInfo {
    #[schema(format = "uuid")]
    pub id: String,
    pub name: String,
    pub approval: Approval,
    pub connected: bool,
    /// When it connected, while it is.
    #[schema(value_type = Option<String>, format = "date-time")]
    pub since: Option<Timestamp>,
    /// When it was heard of last; now, while it is connected.
    #[schema(value_type = Option<String>, format = "date-time")]
    pub last_seen: Option<Timestamp>,
    /// The version of its agent, while it is connected.
    pub version: Option<String>,
    /// How far its clock is ahead of ours, while it is connected.
    pub clock_ahead_seconds: Option<i64>,
    /// Those that are protected from there.
    pub machines: Vec<String>,
    pub disks: u64,
    pub unprotected_disks: u64,
    /// When it told of its disks; absent: never.
    #[schema(value_type = Option<String>, format = "date-time")]
    pub disks_told: Option<Timestamp>,
    /// Disks that it has and that are not listed, because there are too many.
    pub disks_left_out: u32,
}

/// A host and its disks.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HostDetails {
    #[serde(flatten)]
    #[schema(inline)]
    pub host: HostInfo,
    pub inventory: Vec<DiskInfo>,
}

/// A disk of a host.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct DiskInfo {
    /// The name of its host.
    pub host: String,
    #[schema(format = "uuid")]
    pub host_id: String,
    /// As it is named to protect it.
    pub path: String,
    pub bytes: u64,
    /// `disk`, `partition`, `logical_volume`, `crypt`, `raid`, `multipath`, `mapped`, `loop`, `nbd`, `memory` or `optical`, or a newer
    /// word; `image` for one that is protected and no block device of the host.
    pub kind: String,
    /// Its model, or what is behind it.
    pub description: String,
    /// What tells it from others of its kind.
    pub serial: String,
    /// What it holds, as far as the host knows without reading it.
    pub content: String,
    pub read_only: bool,
    pub removable: bool,
    /// Whether it, or a partition of it, is mounted, swap, or part of another device.
    pub in_use: bool,
    pub uses: Vec<UseInfo>,
    pub protected: bool,
    /// Which machine it is of, where it is protected.
    pub machine: Option<String>,
    /// Its id, where it is protected.
    #[schema(format = "uuid")]
    pub disk: Option<String>,
    /// How its changes are captured, where it is protected.
    pub via: Option<String>,
    /// How it could be protected; none where it is.
    pub ways: Vec<WayInfo>,
    /// When its host told of it; absent: it is known only because it is protected.
    #[schema(value_type = Option<String>, format = "date-time")]
    pub told: Option<Timestamp>,
}

/// Who uses a disk.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct UseInfo {
    /// `file_system`, `swap`, `partition` or `holder`: what is made of it, LVM and the like.
    pub kind: String,
    /// A mount point, or the path of a device; may be empty.
    pub at: String,
}

/// A way of capture.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct WayInfo {
    /// As `protect --via` takes it.
    pub via: String,
    pub possible: bool,
    /// What stands in its way.
    pub obstacle: Option<String>,
}

/// A process server.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ProcessServerInfo {
    /// While it waits for approval, the id of its registration.
    pub id: String,
    pub name: String,
    /// Where hosts reach it; while it waits for approval, where it asked from. Empty: it never connected.
    pub address: String,
    pub approval: Approval,
    /// When it asked for approval, while it waits.
    #[schema(value_type = Option<String>, format = "date-time")]
    pub asked: Option<Timestamp>,
    pub connected: bool,
    /// When it connected, while it is.
    #[schema(value_type = Option<String>, format = "date-time")]
    pub since: Option<Timestamp>,
    /// When it was heard of last; now, while it is connected.
    #[schema(value_type = Option<String>, format = "date-time")]
    pub last_seen: Option<Timestamp>,
    /// Its version, while it is connected.
    pub version: Option<String>,
    /// How far its clock is ahead of ours, while it is connected.
    pub clock_ahead_seconds: Option<i64>,
    /// Those whose replicas it keeps.
    pub machines: Vec<String>,
    /// What it keeps replicas on; absent while it is not connected.
    #[schema(value_type = Option<VolumeInfo>)]
    pub volume: Option<Volume>,
    /// Whether that is encrypted; absent: it cannot tell, or is not connected.
    pub storage_encrypted: Option<bool>,
    /// What its replicas take; absent while it is not connected.
    pub stored_bytes: Option<u64>,
    /// Points that it serves; absent while it is not connected.
    pub serves: Option<u64>,
    #[schema(value_type = Vec<ProblemSchema>)]
    pub problems: Vec<Problem>,
}

/// The volume of a process server's replicas.
#[derive(ToSchema)]
#[schema(as = Volume)]
#[allow(dead_code)]
pub struct VolumeInfo {
    bytes: u64,
    /// What can still be written.
    free_bytes: u64,
}

async fn list_hosts(State(core): App) -> Answer {
    ok(hosts(&core).into_iter().map(|(host, _)| host).collect::<Vec<_>>())
}

async fn show_host(State(core): App, Path(wanted): Path<String>) -> Answer {
    let (host, inventory) = named("host", hosts(&core), &wanted, |(host, _)| (&host.id, &host.name))?;
    ok(HostDetails { host, inventory })
}

#[derive(Deserialize)]
struct DiskQuery {
    host: Option<String>,
    #[serde(default)]
    unprotected: bool,
}

async fn list_disks(State(core): App, query: Query<DiskQuery>) -> Answer {
    let mut hosts = hosts(&core);
    if let Some(wanted) = &query.host {
        hosts = vec![named("host", hosts, wanted, |(host, _)| (&host.id, &host.name))?];
    }
    let disks = hosts.into_iter().flat_map(|(_, disks)| disks);
    ok(disks.filter(|disk| !(query.unprotected && disk.protected)).collect::<Vec<_>>())
}

async fn list_servers(State(core): App) -> Answer {
    ok(servers(&core))
}

async fn show_server(State(core): App, Path(wanted): Path<String>) -> Answer {
    ok(named("process server", servers(&core), &wanted, |server| (&server.id, &server.name))?)
}

async fn delete_host(State(core): App, who: Extension<Caller>, Path(wanted): Path<String>) -> Answer {
    let (host, _) = named("host", hosts(&core), &wanted, |(host, _)| (&host.id, &host.name))?;
    let id = host.id.parse().map_err(|_| bad_request("that is no id of a host", "see `tidemark host list`"))?;
    removal::host(&core, id, &host.name).await?;
    who.did(&core, "host_deleted", format!("host {} ({}) was deleted", host.name, host.id));
    ok(json!({}))
}

#[derive(Deserialize)]
struct ForceQuery {
    #[serde(default)]
    force: bool,
}

async fn delete_server(
    State(core): App,
    who: Extension<Caller>,
    Path(wanted): Path<String>,
    query: Query<ForceQuery>,
) -> Answer {
    let server = named("process server", servers(&core), &wanted, |server| (&server.id, &server.name))?;
    if server.asked.is_some() {
        let message = format!("process server {} has not connected yet", server.name);
        let help = "reject its registration: `tidemark process-server reject`";
        return Err(Failure::new(FailureKind::Conflict, message, help).into());
    }
    let wrong = |_| bad_request("that is no id of a process server", "see `tidemark process-server list`");
    removal::server(&core, server.id.parse().map_err(wrong)?, &server.name, query.force).await?;
    who.did(&core, "process_server_deleted", format!("process server {} ({}) was deleted", server.name, server.id));
    ok(json!({}))
}

/// By its id, or by a name that only one has.
fn named<T>(what: &str, all: Vec<T>, wanted: &str, of: impl Fn(&T) -> (&String, &String)) -> Result<T, Failure> {
    let known = all.iter().map(|one| of(one).1.as_str()).collect::<Vec<_>>().join(", ");
    let (by_id, others): (Vec<T>, Vec<T>) = all.into_iter().partition(|one| of(one).0 == wanted);
    let mut found = by_id.into_iter().chain(others.into_iter().filter(|one| of(one).1 == wanted));
    match (found.next(), found.next()) {
        (Some(one), None) => Ok(one),
        // An id is nobody's name.
        (Some(one), Some(_)) if of(&one).0 == wanted => Ok(one),
        (Some(_), Some(_)) => Err(bad_request(
            format!("more than one {what} is called {wanted:?}"),
            "name it by its id, which the list shows",
        )),
        (None, _) => {
            let shown: String = wanted.chars().take(80).collect();
            Err(Failure::new(FailureKind::NotFound, format!("there is no {what} {shown:?}"), format!("known: {known}")))
        }
    }
}

/// How a peer's connection is.
struct Contact {
    connected: bool,
    since: Option<Timestamp>,
    last_seen: Option<Timestamp>,
    version: Option<String>,
    clock_ahead_seconds: Option<i64>,
}

/// `noted`: when it connected last, as it is stored.
fn contact(core: &Core, peer: PeerId, noted: Option<Timestamp>) -> Contact {
    use tidemark_base::Clock as _;
    let (connected, since, last_seen) = match core.hub.presence(peer) {
        Presence::Connected { since, .. } => (true, Some(since), Some(core.clock.wall_now())),
        Presence::Gone { since, .. } => (false, None, Some(since)),
        Presence::NeverSeen => (false, None, noted),
    };
    let version = core.hub.software(peer).filter(|version| !version.is_empty());
    let clock_ahead_seconds = connected.then(|| core.hub.clock_ahead_seconds(peer));
    Contact { connected, since, last_seen, version, clock_ahead_seconds }
}

fn approval(state: &model::State, identity: PeerIdentity) -> Approval {
    match state.identities.get(&identity.to_string()).map(|record| &record.standing) {
        Some(Standing::Revoked { .. }) => Approval::Revoked,
        Some(Standing::Fenced { .. }) => Approval::Fenced,
        Some(Standing::Good) | None => Approval::Approved,
    }
}

/// By name, each with its disks.
fn hosts(core: &Core) -> Vec<(HostInfo, Vec<DiskInfo>)> {
    let state = core.store.state();
    // Those that registered, and those that connected.
    let registered = state.identities.iter().filter_map(|(uri, record)| match uri.parse() {
        Ok(PeerIdentity::Agent(id)) if !record.deleted => Some((id, (record.name.clone(), None))),
        _ => None,
    });
    let connected = state.hosts.iter().map(|(id, host)| (*id, (host.name.clone(), Some(host.last_seen))));
    let known: BTreeMap<HostId, (String, Option<Timestamp>)> = registered.chain(connected).collect();
    let mut hosts: Vec<_> = known
        .into_iter()
        .map(|(id, (name, noted))| {
            let machines: Vec<&Machine> = state.machines.values().filter(|machine| machine.host == id).collect();
            let told = core.store.inventories().of(id);
            let disks = disks(id, &name, &machines, told.as_deref());
            let Contact { connected, since, last_seen, version, clock_ahead_seconds } =
                contact(core, PeerId::Agent(id), noted);
            let host = HostInfo {
                id: id.to_string(),
                name,
                approval: approval(&state, PeerIdentity::Agent(id)),
                connected,
                since,
                last_seen,
                version,
                clock_ahead_seconds,
                machines: machines.iter().map(|machine| machine.name.clone()).collect(),
                disks: disks.len() as u64,
                unprotected_disks: disks.iter().filter(|disk| !disk.protected).count() as u64,
                disks_told: told.as_ref().map(|told| told.time),
                disks_left_out: told.as_ref().map_or(0, |told| told.inventory.left_out),
            };
            (host, disks)
        })
        .collect();
    hosts.sort_by(|(one, _), (other, _)| (&one.name, &one.id).cmp(&(&other.name, &other.id)));
    hosts
}

/// What the host told, and what is protected there and is none of that: files, and disks of machines that it asks others about.
fn disks(host: HostId, host_name: &str, machines: &[&Machine], told: Option<&Told>) -> Vec<DiskInfo> {
    let mut protected: BTreeMap<DiskId, (&Machine, &model::MachineDisk)> =
        machines.iter().flat_map(|machine| machine.disks.iter().map(|disk| (disk.id, (*machine, disk)))).collect();
    let mut disks = Vec::new();
    for seen in told.iter().flat_map(|told| &told.inventory.disks) {
        // By its id; by its path where it was protected since it was told.
        let id = seen
            .disk
            .filter(|id| protected.contains_key(id))
            .or_else(|| protected.iter().find(|(_, (_, disk))| disk.path == seen.path).map(|(id, _)| *id));
        let of = id.and_then(|id| protected.remove(&id));
        disks.push(info(host, host_name, seen, of, told.map(|told| told.time)));
    }
    for of in protected.into_values() {
        let (path, bytes, kind) = (of.1.path.clone(), of.1.bytes, "image".to_owned());
        disks.push(info(host, host_name, &HostDisk { path, bytes, kind, ..HostDisk::default() }, Some(of), None));
    }
    disks
}

fn info(
    host: HostId,
    host_name: &str,
    seen: &HostDisk,
    of: Option<(&Machine, &model::MachineDisk)>,
    told: Option<Timestamp>,
) -> DiskInfo {
    let ways = seen.ways.iter().filter(|_| of.is_none()).map(|way| WayInfo {
        via: way.via.clone(),
        possible: way.obstacle.is_empty(),
        obstacle: (!way.obstacle.is_empty()).then(|| way.obstacle.clone()),
    });
    let uses = seen.uses.iter().map(|DiskUse { kind, at }| UseInfo { kind: kind.clone(), at: at.clone() });
    DiskInfo {
        host: host_name.to_owned(),
        host_id: host.to_string(),
        path: seen.path.clone(),
        bytes: seen.bytes,
        kind: seen.kind.clone(),
        description: seen.description.clone(),
        serial: seen.serial.clone(),
        content: seen.content.clone(),
        read_only: seen.read_only,
        removable: seen.removable,
        in_use: seen.in_use,
        uses: uses.collect(),
        protected: of.is_some(),
        machine: of.map(|(machine, _)| machine.name.clone()),
        disk: of.map(|(_, disk)| disk.id.to_string()),
        via: of.map(|(machine, _)| machine.via.name().to_owned()),
        ways: ways.collect(),
        told,
    }
}

/// Those that wait first, then by name.
fn servers(core: &Core) -> Vec<ProcessServerInfo> {
    let state = core.store.state();
    let mut servers: Vec<ProcessServerInfo> = state
        .registrations
        .iter()
        .filter(|(_, of)| of.role == model::PeerRole::ProcessServer)
        .map(|(id, of)| registered(id, of))
        .collect();
    let certified = state.identities.iter().filter_map(|(uri, record)| match uri.parse() {
        Ok(PeerIdentity::ProcessServer(id)) if !record.deleted => {
            Some((id, (record.name.clone(), String::new(), None)))
        }
        _ => None,
    });
    let connected =
        state.servers.iter().map(|(id, of)| (*id, (of.name.clone(), of.address.clone(), Some(of.last_seen))));
    let known: BTreeMap<ServerId, (String, String, Option<Timestamp>)> = certified.chain(connected).collect();
    // One that has not connected yet is listed by its registration, which stays until then.
    let waits = |id: ServerId| {
        let identity = PeerIdentity::ProcessServer(id).to_string();
        state.registrations.values().any(|of| of.identity == identity)
    };
    for (id, (name, address, noted)) in known {
        if noted.is_some() || !waits(id) {
            servers.push(server(core, &state, id, name, address, noted));
        }
    }
    let rank = |of: &ProcessServerInfo| (of.approval != Approval::Waiting, of.name.clone(), of.id.clone());
    servers.sort_by_key(rank);
    servers
}

fn registered(id: &str, of: &Registration) -> ProcessServerInfo {
    ProcessServerInfo {
        id: id.to_owned(),
        name: of.name.clone(),
        address: of.address.clone(),
        approval: if of.approved { Approval::Approved } else { Approval::Waiting },
        asked: Some(of.asked),
        connected: false,
        since: None,
        last_seen: None,
        version: None,
        clock_ahead_seconds: None,
        machines: Vec::new(),
        volume: None,
        storage_encrypted: None,
        stored_bytes: None,
        serves: None,
        problems: Vec::new(),
    }
}

fn server(
    core: &Core,
    state: &model::State,
    id: ServerId,
    name: String,
    address: String,
    noted: Option<Timestamp>,
) -> ProcessServerInfo {
    let peer = PeerId::ProcessServer(id);
    let Contact { connected, since, last_seen, version, clock_ahead_seconds } = contact(core, peer, noted);
    let report = match core.hub.report(peer) {
        Some(Report::Server(report)) => Some(report),
        _ => None,
    };
    let of_report = report.as_ref();
    let mut problems: Vec<Problem> = Vec::new();
    for problem in of_report.iter().flat_map(|report| &report.disks).flat_map(|disk| &disk.problems) {
        if !problems.contains(problem) {
            problems.push(problem.clone());
        }
    }
    let feeds = state.machines.values().filter(|machine| machine.servers().any(|server| server == id));
    ProcessServerInfo {
        id: id.to_string(),
        name,
        address,
        approval: approval(state, PeerIdentity::ProcessServer(id)),
        asked: None,
        connected,
        since,
        last_seen,
        version,
        clock_ahead_seconds,
        machines: feeds.map(|machine| machine.name.clone()).collect(),
        volume: of_report.and_then(|report| report.volume),
        storage_encrypted: of_report.and_then(|report| report.storage_encrypted),
        stored_bytes: of_report.map(|report| report.disks.iter().map(|disk| disk.stored_bytes).sum()),
        serves: of_report.map(|report| report.serves.len() as u64),
        problems,
    }
}
