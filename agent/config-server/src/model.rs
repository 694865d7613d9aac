//! What is wanted, as it is stored.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tidemark_base::{DiskId, Generation, HostId, MachineId, ServerId, Timestamp};
use tidemark_hypervisor::call::Description;
use tidemark_proto::control::{
    Compression, DAY_MINUTES, DiskSpec, Grid, GridStep, Network, ReplicationPolicy, Retention, Severity, Throttle,
    ThrottleRule, Via,
};
use uuid::Uuid;

use crate::deliver::Channel;
use crate::failover::drill::DrillNote;
use crate::failover::state::Failover;
use crate::kept::Kept;
use crate::plans::state::Plan;

/// Everything that must outlive the process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct State {
    /// The version of this text; a newer one is refused, not guessed at.
    pub version: u32,
    pub machines: BTreeMap<String, Machine>,
    pub policies: BTreeMap<String, Policy>,
    pub hosts: BTreeMap<HostId, Host>,
    pub servers: BTreeMap<ServerId, Server>,
    #[serde(default)]
    pub passphrases: BTreeMap<String, Passphrase>,
    #[serde(default)]
    pub registrations: BTreeMap<String, Registration>,
    /// By the URI in their certificates.
    #[serde(default)]
    pub identities: BTreeMap<String, IdentityRecord>,
    #[serde(default)]
    pub users: BTreeMap<String, User>,
    #[serde(default)]
    pub tokens: BTreeMap<String, ApiToken>,
    #[serde(default)]
    pub alerts: BTreeMap<String, Alert>,
    #[serde(default)]
    pub groups: BTreeMap<String, Group>,
    #[serde(default)]
    pub plans: BTreeMap<String, Plan>,
    /// Where alerts are told.
    #[serde(default)]
    pub channels: BTreeMap<String, Channel>,
    /// Replicas of machines that are not protected any more.
    #[serde(default)]
    pub kept: BTreeMap<MachineId, Kept>,
    /// How often each row was changed, by table and id.
    #[serde(skip)]
    pub revisions: BTreeMap<(&'static str, String), u64>,
}

/// Lets a role register.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Passphrase {
    pub role: PeerRole,
    /// Argon2id, with its parameters and salt.
    pub hash: String,
    pub created: Timestamp,
    pub expires: Timestamp,
    pub uses_left: u32,
    /// The identity that may be taken over: an operator's consent for a host that was installed again.
    pub replaces: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PeerRole {
    Agent,
    ProcessServer,
}

impl PeerRole {
    pub fn name(self) -> &'static str {
        match self {
            PeerRole::Agent => "agent",
            PeerRole::ProcessServer => "process-server",
        }
    }
}

/// A process server that waits for an operator's approval, or for fetching what was approved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registration {
    pub role: PeerRole,
    pub name: String,
    pub identity: String,
    /// PKCS #10, DER, in hex.
    pub request: String,
    pub asked: Timestamp,
    pub address: String,
    pub approved: bool,
    pub replaces: bool,
}

/// Who was given a certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentityRecord {
    pub name: String,
    pub registered: Timestamp,
    /// Those that may still be shown.
    pub certificates: Vec<IssuedCertificate>,
    pub standing: Standing,
    /// Its host or process server was deleted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deleted: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IssuedCertificate {
    /// BLAKE3 of its DER, in hex.
    pub digest: String,
    pub expires: Timestamp,
    /// Not taken any more although it has not expired: its owner was installed again.
    #[serde(default)]
    pub denied: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    Good,
    /// An operator said so.
    Revoked {
        since: Timestamp,
        reason: String,
    },
    /// Two live instances were seen.
    Fenced {
        since: Timestamp,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum UserRole {
    /// Sees everything but secrets.
    Reader,
    /// Protects, recovers, changes policies.
    Operator,
    /// Users, tokens, passphrases and certificates as well.
    Administrator,
}

impl UserRole {
    pub fn name(self) -> &'static str {
        match self {
            UserRole::Reader => "reader",
            UserRole::Operator => "operator",
            UserRole::Administrator => "administrator",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    pub role: UserRole,
    pub created: Timestamp,
}

/// What shows who a request is from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiToken {
    pub user: String,
    pub label: String,
    /// BLAKE3 of it, in hex; it is random and long, so that no slow hash is needed.
    pub digest: String,
    pub created: Timestamp,
    pub expires: Option<Timestamp>,
}

/// Something that lasts and needs someone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Alert {
    /// `warning` or `critical`.
    #[schema(value_type = String)]
    pub severity: Severity,
    /// Which rule raised it.
    pub kind: String,
    /// The one that it is about.
    pub machine: Option<String>,
    /// All that it is about: one cause is one alert, however many suffer from it.
    #[serde(default)]
    pub machines: Vec<String>,
    pub message: String,
    pub help: String,
    #[schema(value_type = String, format = "date-time")]
    pub since: Timestamp,
}

impl Alert {
    /// Of no machine.
    pub fn new(severity: Severity, kind: &str, message: String, help: impl Into<String>, since: Timestamp) -> Self {
        Self { severity, kind: kind.to_owned(), machine: None, machines: Vec::new(), message, help: help.into(), since }
    }
}

pub const STATE_VERSION: u32 = 1;
/// The policy that a machine gets when none is named.
pub const DEFAULT_POLICY: &str = "continuous";

impl State {
    /// What a host is called; its id where nothing is known of it.
    pub fn host_name(&self, id: HostId) -> String {
        self.hosts.get(&id).map_or_else(|| id.to_string(), |host| host.name.clone())
    }

    pub fn server_name(&self, id: ServerId) -> String {
        self.servers.get(&id).map_or_else(|| id.to_string(), |server| server.name.clone())
    }
}

impl Default for State {
    fn default() -> Self {
        Self {
            version: STATE_VERSION,
            machines: BTreeMap::new(),
            policies: BTreeMap::from([(DEFAULT_POLICY.to_owned(), Policy::default())]),
            hosts: BTreeMap::new(),
            servers: BTreeMap::new(),
            passphrases: BTreeMap::new(),
            registrations: BTreeMap::new(),
            identities: BTreeMap::new(),
            users: BTreeMap::new(),
            tokens: BTreeMap::new(),
            alerts: BTreeMap::new(),
            groups: BTreeMap::new(),
            plans: BTreeMap::new(),
            channels: BTreeMap::new(),
            kept: BTreeMap::new(),
            revisions: BTreeMap::new(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    pub id: MachineId,
    pub name: String,
    pub host: HostId,
    /// The process server that it is about where one must be chosen: whose points are a group's, and where it runs once it failed over.
    pub server: ServerId,
    /// Process servers that get the same changes besides.
    #[serde(default)]
    pub others: Vec<ServerId>,
    /// Process servers that it feeds no longer, and that do not know it yet.
    #[serde(default)]
    pub leaving: Vec<Leaving>,
    pub policy: String,
    pub disks: Vec<MachineDisk>,
    pub wanted: Wanted,
    pub created: Timestamp,
    /// Where its disks are served over TLS as well.
    #[serde(default)]
    pub listen: Option<SocketAddr>,
    /// How it is run where its replica is.
    #[serde(default)]
    pub description: Option<Description>,
    /// Drills that run, or may.
    #[serde(default)]
    pub drills: Vec<DrillNote>,
    #[serde(default)]
    pub group: Option<String>,
    /// It runs, or is about to run, where its replica is.
    #[serde(default)]
    pub failover: Option<Failover>,
    /// How its changes are captured.
    #[serde(default)]
    pub via: Via,
    /// Hosts that it went away from, and that were not told yet.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left: Vec<HostId>,
    /// Its disks were brought to another place, and its host has sent nothing from there yet.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub moved: bool,
    /// Failovers that came to their end while the process server was away: it ends them when it is back.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ended: Vec<Uuid>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leaving {
    pub server: ServerId,
    pub delete_replica: bool,
}

impl Machine {
    /// All process servers that it feeds.
    pub fn servers(&self) -> impl Iterator<Item = ServerId> {
        std::iter::once(self.server).chain(self.others.iter().copied())
    }

    /// The same machine, with another one of its process servers in the first place.
    pub fn about(mut self, server: ServerId) -> Self {
        if let Some(other) = self.others.iter_mut().find(|other| **other == server) {
            *other = std::mem::replace(&mut self.server, server);
        }
        self
    }
}

/// Machines that belong together: those that name it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    pub created: Timestamp,
    /// A point of all machines at one instant that often; 0: none by itself.
    #[serde(default = "group_interval")]
    pub interval_seconds: u64,
    /// The longest that a write waits for it.
    #[serde(default = "group_hold_limit")]
    pub hold_limit_ms: u64,
}

impl Group {
    pub fn new(created: Timestamp) -> Self {
        Self { created, interval_seconds: group_interval(), hold_limit_ms: group_hold_limit() }
    }
}

fn group_interval() -> u64 {
    60
}

/// Far above what hosts of one site need, far below what a guest takes for a broken disk.
fn group_hold_limit() -> u64 {
    250
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wanted {
    Protected,
    Paused,
    /// Gone as soon as agent and process server have let go of it.
    Unprotected {
        delete_replica: bool,
        agent_done: bool,
        server_done: bool,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineDisk {
    pub id: DiskId,
    pub path: String,
    pub export: String,
    pub bytes: u64,
    pub generation: Generation,
    /// It came when the machine was protected already.
    #[serde(default)]
    pub added: bool,
}

impl MachineDisk {
    pub fn spec(&self) -> DiskSpec {
        DiskSpec {
            disk: self.id,
            path: self.path.clone(),
            export: self.export.clone(),
            generation: self.generation,
            bytes: self.bytes,
            added: self.added,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    pub name: String,
    pub last_seen: Timestamp,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Server {
    pub name: String,
    pub address: String,
    pub last_seen: Timestamp,
}

/// How a machine is protected. Durations are seconds in JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    pub frequency: Frequency,
    /// Any position of the last so long can be recovered.
    pub any_time_seconds: u64,
    /// Points older than that expire; absent: no limit.
    pub retention_seconds: Option<u64>,
    /// At most so many points; absent: no limit.
    pub retention_count: Option<u64>,
    /// How many points stay as they grow older, in steps of ascending age; none: all.
    pub retention_grid: Vec<GridSetting>,
    /// A kept crash-consistent point that often; 0: none.
    pub point_interval_seconds: u64,
    /// `auto`: as link and processors allow; `off`; or a level of zstd.
    #[schema(value_type = CompressionSetting)]
    pub compression: Compression,
    /// The most that the log of one disk may occupy; absent: the agent's own default.
    pub log_limit_bytes: Option<u64>,
    /// The most that is sent in a second; absent: no limit.
    pub throttle_bytes_per_second: Option<u64>,
    /// Other limits at some times of the week or for some addresses; the first that fits counts.
    pub throttle_schedule: Vec<ThrottleWindow>,
    /// A kept app-consistent point that often; 0: none.
    pub app_point_interval_seconds: u64,
    /// An alert when the RPO is over this; 0: three cycles, at least a minute.
    pub alarm_rpo_seconds: u64,
    /// An alert when a log takes so much of its limit.
    pub alarm_log_percent: u8,
    /// An alert when more of the last hour's cycles were missed; for a frequency that has cycles.
    pub alarm_missed_percent: u8,
    /// An alert when nothing was heard of a host or process server for so long.
    pub alarm_no_contact_seconds: u64,
    /// Where data is encrypted.
    pub encryption: Encryption,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Encryption {
    /// On every network, always.
    #[default]
    Transit,
    /// And where it is stored: only process servers whose volume is encrypted take the machine.
    AtRest,
}

/// Of points no older than `within_seconds`, one stays for each `every_seconds`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GridSetting {
    /// Absent: however old. The last step goes on in any case.
    #[serde(default)]
    pub within_seconds: Option<u64>,
    /// 0: all stay.
    pub every_seconds: u64,
}

/// `auto`, `off`, or a level of zstd: the shape of [`Compression`].
#[derive(utoipa::ToSchema)]
#[serde(untagged)]
#[schema(as = Compression)]
#[allow(dead_code)]
pub enum CompressionSetting {
    Level(i32),
    Word(CompressionWord),
}

#[derive(utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
#[allow(dead_code)]
pub enum CompressionWord {
    Auto,
    Off,
}

/// A limit for some hours of some days, in UTC, and some addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ThrottleWindow {
    /// Monday is 1; none: every day.
    #[serde(default)]
    pub days: Vec<u8>,
    /// `HH:MM`.
    #[serde(default = "day_begins")]
    pub from: String,
    /// `HH:MM`, `24:00` for the day's end; before `from`: on the day after.
    #[serde(default = "day_ends")]
    pub to: String,
    /// Only for what is sent to process servers with these addresses: `10.1.0.0/16`.
    #[serde(default)]
    pub network: Option<String>,
    /// Absent: no limit then.
    #[serde(default)]
    pub bytes_per_second: Option<u64>,
}

fn day_begins() -> String {
    "00:00".to_owned()
}

fn day_ends() -> String {
    "24:00".to_owned()
}

impl ThrottleWindow {
    /// As agents follow it. `None`: a time, a day or the network is none.
    pub fn rule(&self) -> Option<ThrottleRule> {
        let days = self.days.iter().try_fold(0u8, |days, day| (1..=7).contains(day).then(|| days | 1 << (day - 1)))?;
        let network = match &self.network {
            None => None,
            Some(text) => Some(text.parse::<Network>().ok()?),
        };
        Some(ThrottleRule {
            days,
            from_minute: minutes(&self.from)?,
            to_minute: minutes(&self.to)?,
            network,
            bytes_per_second: self.bytes_per_second,
        })
    }
}

/// Of a day, at `HH:MM`.
pub fn minutes(time: &str) -> Option<u16> {
    let (hours, minutes) = time.split_once(':')?;
    if hours.len() != 2 || minutes.len() != 2 {
        return None;
    }
    let (hours, minutes): (u16, u16) = (hours.parse().ok()?, minutes.parse().ok()?);
    let all = hours * 60 + minutes;
    (minutes < 60 && all <= DAY_MINUTES).then_some(all)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub enum Frequency {
    #[default]
    #[serde(rename = "continuous")]
    Continuous,
    #[serde(rename = "30s")]
    Seconds30,
    #[serde(rename = "5m")]
    Minutes5,
    #[serde(rename = "15m")]
    Minutes15,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            frequency: Frequency::Continuous,
            any_time_seconds: 2 * 3600,
            retention_seconds: Some(24 * 3600),
            retention_count: None,
            // As the field's: all for two hours, hourly for a day, two-hourly for a week, four-hourly after.
            retention_grid: [(Some(2 * 3600), 0), (Some(86_400), 3600), (Some(7 * 86_400), 7200), (None, 4 * 3600)]
                .map(|(within_seconds, every_seconds)| GridSetting { within_seconds, every_seconds })
                .to_vec(),
            point_interval_seconds: 300,
            compression: Compression::Auto,
            log_limit_bytes: None,
            throttle_bytes_per_second: None,
            throttle_schedule: Vec::new(),
            app_point_interval_seconds: 0,
            alarm_rpo_seconds: 0,
            alarm_log_percent: 80,
            alarm_missed_percent: 20,
            alarm_no_contact_seconds: 300,
            encryption: Encryption::Transit,
        }
    }
}

impl Policy {
    pub fn cycle(&self) -> Option<Duration> {
        let seconds = match self.frequency {
            Frequency::Continuous => return None,
            Frequency::Seconds30 => 30,
            Frequency::Minutes5 => 300,
            Frequency::Minutes15 => 900,
        };
        Some(Duration::from_secs(seconds))
    }

    /// The RPO that an alert is raised above.
    pub fn alarm_rpo(&self) -> Duration {
        match self.alarm_rpo_seconds {
            0 => (self.cycle().unwrap_or_default() * 3).max(Duration::from_secs(60)),
            seconds => Duration::from_secs(seconds),
        }
    }

    /// As agents are told. What makes no sense was refused when the policy was made.
    pub fn replication(&self) -> ReplicationPolicy {
        let interval = |seconds: u64| (seconds > 0).then(|| Duration::from_secs(seconds));
        ReplicationPolicy {
            cycle: self.cycle(),
            point_interval: interval(self.point_interval_seconds),
            app_point_interval: interval(self.app_point_interval_seconds),
            compression: self.compression,
            log_limit_bytes: self.log_limit_bytes,
            throttle: Throttle {
                bytes_per_second: self.throttle_bytes_per_second,
                rules: self.throttle_schedule.iter().filter_map(ThrottleWindow::rule).collect(),
            },
        }
    }

    pub fn retention(&self) -> Retention {
        Retention {
            any_time: Duration::from_secs(self.any_time_seconds),
            age: self.retention_seconds.map(Duration::from_secs),
            count: self.retention_count,
            grid: self.grid().unwrap_or_default(),
        }
    }

    /// `None`: the steps do not ascend, or are too many.
    pub fn grid(&self) -> Option<Grid> {
        Grid::new(self.retention_grid.iter().map(|step| GridStep {
            within: step.within_seconds.map(Duration::from_secs),
            every: Duration::from_secs(step.every_seconds),
        }))
    }
}
