//! What is wanted, as it is stored.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tidemark_base::{DiskId, Generation, HostId, MachineId, ServerId, Timestamp};
use tidemark_proto::control::{DiskSpec, ReplicationPolicy, Retention};

/// Everything that must outlive the process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct State {
    /// The version of this text; a newer one is refused, not guessed at.
    pub version: u32,
    pub machines: BTreeMap<String, Machine>,
    pub policies: BTreeMap<String, Policy>,
    pub hosts: BTreeMap<HostId, Host>,
    pub servers: BTreeMap<ServerId, Server>,
}

pub const STATE_VERSION: u32 = 1;
/// The policy that a machine gets when none is named.
pub const DEFAULT_POLICY: &str = "continuous";

impl Default for State {
    fn default() -> Self {
        Self {
            version: STATE_VERSION,
            machines: BTreeMap::new(),
            policies: BTreeMap::from([(DEFAULT_POLICY.to_owned(), Policy::default())]),
            hosts: BTreeMap::new(),
            servers: BTreeMap::new(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    pub id: MachineId,
    pub name: String,
    pub host: HostId,
    pub server: ServerId,
    pub policy: String,
    pub disks: Vec<MachineDisk>,
    pub wanted: Wanted,
    pub created: Timestamp,
    /// Where its disks are served over TLS as well.
    #[serde(default)]
    pub listen: Option<SocketAddr>,
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
}

impl MachineDisk {
    pub fn spec(&self) -> DiskSpec {
        DiskSpec {
            disk: self.id,
            path: self.path.clone(),
            export: self.export.clone(),
            generation: self.generation,
            bytes: self.bytes,
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
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    pub frequency: Frequency,
    /// Any position of the last so long can be recovered.
    pub any_time_seconds: u64,
    /// Points older than that expire; absent: no limit.
    pub retention_seconds: Option<u64>,
    /// At most so many points; absent: no limit.
    pub retention_count: Option<u64>,
    /// A kept crash-consistent point that often; 0: none.
    pub point_interval_seconds: u64,
    /// zstd level; 0: off; 1: begins there and adapts.
    pub compression: i32,
    /// The most that the log of one disk may occupy; absent: the agent's own default.
    pub log_limit_bytes: Option<u64>,
    /// The most that is sent in a second; absent: no limit.
    pub throttle_bytes_per_second: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
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
            point_interval_seconds: 300,
            compression: 1,
            log_limit_bytes: None,
            throttle_bytes_per_second: None,
        }
    }
}

impl Policy {
    pub fn replication(&self) -> ReplicationPolicy {
        let cycle = match self.frequency {
            Frequency::Continuous => None,
            Frequency::Seconds30 => Some(30),
            Frequency::Minutes5 => Some(300),
            Frequency::Minutes15 => Some(900),
        };
        ReplicationPolicy {
            cycle: cycle.map(Duration::from_secs),
            point_interval: (self.point_interval_seconds > 0).then(|| Duration::from_secs(self.point_interval_seconds)),
            compression: (self.compression != 0).then_some(self.compression),
            log_limit_bytes: self.log_limit_bytes,
            throttle_bytes_per_second: self.throttle_bytes_per_second,
        }
    }

    pub fn retention(&self) -> Retention {
        Retention {
            any_time: Duration::from_secs(self.any_time_seconds),
            age: self.retention_seconds.map(Duration::from_secs),
            count: self.retention_count,
        }
    }
}
