//! Between the wire and the model. Receiving checks: ids are ids, texts and lists are bounded, enums are known.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tidemark_base::{DiskId, Generation, HostId, MachineId, MarkId, SECTOR_BYTES, ServerId, Timestamp};
use uuid::Uuid;

use super::model::*;
use super::policy::*;
use super::{
    ADDRESSES_MAX, DISKS_MAX, EVENTS_MAX, GROUP_MACHINES_MAX, HOLD_LIMIT_MAX, NEIGHBOURS_MAX, SERVERS_MAX,
    TEXT_BYTES_MAX, VERSION, wire,
};

/// Why a message cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WireError {
    #[error("{0} is missing or not valid")]
    Invalid(&'static str),
    #[error("{field} has {have} bytes or entries, at most {most} are allowed")]
    TooLong { field: &'static str, have: usize, most: usize },
    #[error("the other side speaks version {0} of the control stream, this one version {VERSION}")]
    Version(u32),
}

/// The most entries of a list that grows with the machine's history.
const LIST_MAX: usize = 1 << 20;

type Checked<T> = Result<T, WireError>;

fn text(value: String, field: &'static str) -> Checked<String> {
    if value.len() > TEXT_BYTES_MAX {
        return Err(WireError::TooLong { field, have: value.len(), most: TEXT_BYTES_MAX });
    }
    Ok(value)
}

fn named(value: String, field: &'static str) -> Checked<String> {
    if value.is_empty() { Err(WireError::Invalid(field)) } else { text(value, field) }
}

fn list<T, U>(values: Vec<T>, field: &'static str, most: usize, convert: impl Fn(T) -> Checked<U>) -> Checked<Vec<U>> {
    if values.len() > most {
        return Err(WireError::TooLong { field, have: values.len(), most });
    }
    values.into_iter().map(convert).collect()
}

fn need<T>(value: Option<T>, field: &'static str) -> Checked<T> {
    value.ok_or(WireError::Invalid(field))
}

fn machine(bytes: &[u8]) -> Checked<MachineId> {
    need(MachineId::from_slice(bytes), "machine")
}

fn disk(bytes: &[u8]) -> Checked<DiskId> {
    need(DiskId::from_slice(bytes), "disk")
}

fn mark(bytes: &[u8]) -> Checked<MarkId> {
    need(MarkId::from_slice(bytes), "mark")
}

fn serve_id(bytes: &[u8]) -> Checked<ServeId> {
    Uuid::from_slice(bytes).ok().filter(|id| !id.is_nil()).map(ServeId).ok_or(WireError::Invalid("serve"))
}

fn optional<T: PartialEq + Default>(value: T) -> Option<T> {
    (value != T::default()).then_some(value)
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn empty() -> wire::Empty {
    wire::Empty {}
}

fn machine_ref(id: &MachineId) -> wire::MachineRef {
    wire::MachineRef { machine: id.to_vec() }
}

// ---- register

impl From<&Register> for wire::Register {
    fn from(from: &Register) -> Self {
        let (role, id, address) = match &from.peer {
            Peer::Agent { id } => (wire::Role::Agent, id.to_vec(), String::new()),
            Peer::ProcessServer { id, address } => (wire::Role::ProcessServer, id.to_vec(), address.clone()),
        };
        wire::Register {
            version: VERSION,
            role: role.into(),
            id,
            name: from.name.clone(),
            address,
            software: from.software.clone(),
            boot: from.boot.clone(),
            instance: from.instance.map_or_else(Vec::new, |instance| instance.as_bytes().to_vec()),
            time_ns: from.time.map_or(0, |time| time.0),
        }
    }
}

impl TryFrom<wire::Register> for Register {
    type Error = WireError;

    fn try_from(from: wire::Register) -> Checked<Self> {
        if from.version != VERSION {
            return Err(WireError::Version(from.version));
        }
        let peer = match from.role() {
            wire::Role::Agent => Peer::Agent { id: need(HostId::from_slice(&from.id), "id")? },
            wire::Role::ProcessServer => Peer::ProcessServer {
                id: need(ServerId::from_slice(&from.id), "id")?,
                address: named(from.address, "address")?,
            },
            wire::Role::Invalid => return Err(WireError::Invalid("role")),
        };
        Ok(Register {
            peer,
            name: named(from.name, "name")?,
            software: text(from.software, "software")?,
            boot: text(from.boot, "boot")?,
            instance: optional(from.instance)
                .map(|bytes| Uuid::from_slice(&bytes).map_err(|_| WireError::Invalid("instance")))
                .transpose()?,
            time: optional(from.time_ns).map(Timestamp),
        })
    }
}

impl From<&Whereabouts> for wire::Whereabouts {
    fn from(from: &Whereabouts) -> Self {
        let (server, addresses) = (from.server.to_vec(), from.addresses.clone());
        wire::Whereabouts { incarnation: from.incarnation, server, addresses }
    }
}

impl TryFrom<wire::Whereabouts> for Whereabouts {
    type Error = WireError;

    fn try_from(from: wire::Whereabouts) -> Checked<Self> {
        Ok(Whereabouts {
            incarnation: optional(from.incarnation).ok_or(WireError::Invalid("incarnation"))?,
            server: need(ServerId::from_slice(&from.server), "server")?,
            addresses: list(from.addresses, "addresses", ADDRESSES_MAX, |address| named(address, "address"))?,
        })
    }
}

impl From<&Neighbour> for wire::Neighbour {
    fn from(from: &Neighbour) -> Self {
        wire::Neighbour { server: from.server.to_vec(), address: from.address.clone() }
    }
}

impl TryFrom<wire::Neighbour> for Neighbour {
    type Error = WireError;

    fn try_from(from: wire::Neighbour) -> Checked<Self> {
        Ok(Neighbour {
            server: need(ServerId::from_slice(&from.server), "server")?,
            address: named(from.address, "address")?,
        })
    }
}

/// Of those that an agent is told of, as many as it asks.
pub fn neighbours(from: Vec<wire::Neighbour>) -> Checked<Vec<Neighbour>> {
    list(from, "process_servers", NEIGHBOURS_MAX, Neighbour::try_from)
}

// ---- events and denials

impl From<&EventBatch> for wire::EventBatch {
    fn from(from: &EventBatch) -> Self {
        let event = |event: &Event| {
            let severity = match event.severity {
                Severity::Info => wire::Severity::Info,
                Severity::Warning => wire::Severity::Warning,
                Severity::Critical => wire::Severity::Critical,
            };
            wire::Event {
                sequence: event.sequence,
                time_ns: event.time.0,
                severity: severity.into(),
                machine: event.machine.map_or_else(Vec::new, MachineId::to_vec),
                disk: event.disk.map_or_else(Vec::new, DiskId::to_vec),
                kind: event.kind.clone(),
                message: event.message.clone(),
                help: event.help.clone(),
            }
        };
        wire::EventBatch { stream: from.stream.as_bytes().to_vec(), events: from.events.iter().map(event).collect() }
    }
}

impl TryFrom<wire::EventBatch> for EventBatch {
    type Error = WireError;

    fn try_from(from: wire::EventBatch) -> Checked<Self> {
        let stream = Uuid::from_slice(&from.stream).map_err(|_| WireError::Invalid("stream"))?;
        let events = list(from.events, "events", EVENTS_MAX, |event| {
            let severity = match event.severity() {
                wire::Severity::Invalid => return Err(WireError::Invalid("severity")),
                wire::Severity::Info => Severity::Info,
                wire::Severity::Warning => Severity::Warning,
                wire::Severity::Critical => Severity::Critical,
            };
            Ok(Event {
                sequence: need(optional(event.sequence), "sequence")?,
                time: Timestamp(event.time_ns),
                severity,
                machine: optional(event.machine).map(|bytes| machine(&bytes)).transpose()?,
                disk: optional(event.disk).map(|bytes| disk(&bytes)).transpose()?,
                kind: named(event.kind, "kind")?,
                message: named(event.message, "message")?,
                help: text(event.help, "help")?,
            })
        })?;
        if events.windows(2).any(|pair| pair[0].sequence >= pair[1].sequence) {
            return Err(WireError::Invalid("sequence"));
        }
        Ok(EventBatch { stream, events })
    }
}

impl From<&DenyList> for wire::DenyList {
    fn from(from: &DenyList) -> Self {
        wire::DenyList {
            identities: from.identities.clone(),
            certificates: from.certificates.iter().map(|digest| digest.to_vec()).collect(),
        }
    }
}

impl TryFrom<wire::DenyList> for DenyList {
    type Error = WireError;

    fn try_from(from: wire::DenyList) -> Checked<Self> {
        Ok(DenyList {
            identities: list(from.identities, "identities", LIST_MAX, |identity| named(identity, "identity"))?,
            certificates: list(from.certificates, "certificates", LIST_MAX, |digest| {
                digest.try_into().map_err(|_| WireError::Invalid("certificate"))
            })?,
        })
    }
}

// ---- commands

impl From<&AgentCommand> for wire::AgentCommand {
    fn from(from: &AgentCommand) -> Self {
        use wire::agent_command::Body;
        let body = match from {
            AgentCommand::Probe { paths, via } => {
                Body::Probe(wire::Probe { paths: paths.clone(), via: via.name().to_owned() })
            }
            AgentCommand::Protect(spec) => Body::Protect((&**spec).into()),
            AgentCommand::Unprotect(id) => Body::Unprotect(machine_ref(id)),
            AgentCommand::Pause(id) => Body::Pause(machine_ref(id)),
            AgentCommand::Resume(id) => Body::Resume(machine_ref(id)),
            AgentCommand::Resync(id) => Body::Resync(machine_ref(id)),
            AgentCommand::CancelResync(id) => Body::CancelResync(machine_ref(id)),
            AgentCommand::Mark(request) => Body::Mark(wire::MakeMark {
                machine: request.machine.to_vec(),
                consistency: wire::PointConsistency::from(request.consistency).into(),
                label: request.label.clone(),
                keep: request.keep,
            }),
            AgentCommand::Status => Body::Status(empty()),
            AgentCommand::Deny(list) => Body::Deny(list.into()),
            AgentCommand::HoldGroup(hold) => Body::HoldGroup(wire::HoldGroup {
                round: hold.round.to_vec(),
                group: hold.group.clone(),
                machines: hold.machines.iter().map(|machine| machine.to_vec()).collect(),
                limit_ms: milliseconds(hold.limit),
                label: hold.label.clone(),
            }),
            AgentCommand::ReleaseGroup { round, verdict } => Body::ReleaseGroup(wire::ReleaseGroup {
                round: round.to_vec(),
                verdict: match verdict {
                    Verdict::Group => wire::Verdict::Group,
                    Verdict::Plain => wire::Verdict::Plain,
                    Verdict::Nothing => wire::Verdict::Nothing,
                }
                .into(),
            }),
            AgentCommand::MasterTarget(call) => Body::MasterTarget(wire::TargetCall { call: call.clone() }),
            AgentCommand::Owner(call) => Body::Owner(wire::OwnerCall { call: call.clone() }),
        };
        wire::AgentCommand { body: Some(body) }
    }
}

impl TryFrom<wire::AgentCommand> for AgentCommand {
    type Error = WireError;

    fn try_from(from: wire::AgentCommand) -> Checked<Self> {
        use wire::agent_command::Body;
        Ok(match need(from.body, "command")? {
            Body::Probe(probe) => {
                let paths = list(probe.paths, "paths", DISKS_MAX, |path| named(path, "path"))?;
                AgentCommand::Probe { paths, via: via(&probe.via)? }
            }
            Body::Protect(spec) => AgentCommand::Protect(Box::new(spec.try_into()?)),
            Body::Unprotect(of) => AgentCommand::Unprotect(machine(&of.machine)?),
            Body::Pause(of) => AgentCommand::Pause(machine(&of.machine)?),
            Body::Resume(of) => AgentCommand::Resume(machine(&of.machine)?),
            Body::Resync(of) => AgentCommand::Resync(machine(&of.machine)?),
            Body::CancelResync(of) => AgentCommand::CancelResync(machine(&of.machine)?),
            Body::Mark(make) => AgentCommand::Mark(MarkRequest {
                machine: machine(&make.machine)?,
                consistency: make.consistency().try_into()?,
                label: text(make.label, "label")?,
                keep: make.keep,
            }),
            Body::Status(_) => AgentCommand::Status,
            Body::Deny(list) => AgentCommand::Deny(list.try_into()?),
            Body::HoldGroup(hold) => AgentCommand::HoldGroup(HoldGroup {
                round: mark(&hold.round)?,
                group: named(hold.group, "group")?,
                machines: list(hold.machines, "machines", GROUP_MACHINES_MAX, |id| machine(&id))?,
                limit: hold_limit(hold.limit_ms)?,
                label: text(hold.label, "label")?,
            }),
            Body::ReleaseGroup(release) => AgentCommand::ReleaseGroup {
                round: mark(&release.round)?,
                verdict: match release.verdict() {
                    wire::Verdict::Group => Verdict::Group,
                    wire::Verdict::Plain => Verdict::Plain,
                    wire::Verdict::Nothing => Verdict::Nothing,
                    wire::Verdict::Invalid => return Err(WireError::Invalid("verdict")),
                },
            },
            Body::MasterTarget(of) => AgentCommand::MasterTarget(named(of.call, "call")?),
            Body::Owner(of) => AgentCommand::Owner(named(of.call, "call")?),
        })
    }
}

/// Whoever asks for more would stop guests for longer than they notice without harm.
fn hold_limit(limit_ms: u64) -> Checked<Duration> {
    let limit = Duration::from_millis(limit_ms);
    if limit.is_zero() || limit > HOLD_LIMIT_MAX { Err(WireError::Invalid("limit")) } else { Ok(limit) }
}

impl From<Consistency> for wire::PointConsistency {
    fn from(from: Consistency) -> Self {
        match from {
            Consistency::Crash => wire::PointConsistency::Crash,
            Consistency::App => wire::PointConsistency::App,
        }
    }
}

impl TryFrom<wire::PointConsistency> for Consistency {
    type Error = WireError;

    fn try_from(from: wire::PointConsistency) -> Checked<Self> {
        match from {
            wire::PointConsistency::Crash => Ok(Consistency::Crash),
            wire::PointConsistency::App => Ok(Consistency::App),
            wire::PointConsistency::Invalid => Err(WireError::Invalid("consistency")),
        }
    }
}

/// Empty: none.
fn address_text(address: Option<SocketAddr>) -> String {
    address.map(|address| address.to_string()).unwrap_or_default()
}

fn optional_address(text: &str) -> Checked<Option<SocketAddr>> {
    match text {
        "" => Ok(None),
        address => address.parse().map(Some).map_err(|_| WireError::Invalid("listen")),
    }
}

impl From<&MachineSpec> for wire::MachineSpec {
    fn from(from: &MachineSpec) -> Self {
        wire::MachineSpec {
            machine: from.machine.to_vec(),
            name: from.name.clone(),
            disks: from.disks.iter().map(Into::into).collect(),
            policy: Some(from.policy.clone().into()),
            server: Some((&from.server).into()),
            others: from.others.iter().map(Into::into).collect(),
            paused: from.paused,
            listen: address_text(from.listen),
            fenced: from.fenced,
            via: from.via.name().to_owned(),
            moved: from.moved,
        }
    }
}

impl TryFrom<wire::MachineSpec> for MachineSpec {
    type Error = WireError;

    fn try_from(from: wire::MachineSpec) -> Checked<Self> {
        let server = Endpoint::try_from(need(from.server, "server")?)?;
        let others = list(from.others, "others", SERVERS_MAX - 1, Endpoint::try_from)?;
        let all = std::iter::once(&server).chain(&others).map(|endpoint| endpoint.server);
        if all.collect::<std::collections::BTreeSet<_>>().len() != others.len() + 1 {
            return Err(WireError::Invalid("others"));
        }
        Ok(MachineSpec {
            machine: machine(&from.machine)?,
            name: named(from.name, "name")?,
            disks: disks(from.disks)?,
            policy: need(from.policy, "policy")?.try_into()?,
            server,
            others,
            paused: from.paused,
            listen: optional_address(&from.listen)?,
            fenced: from.fenced,
            via: via(&from.via)?,
            moved: from.moved,
        })
    }
}

impl From<&Endpoint> for wire::Endpoint {
    fn from(from: &Endpoint) -> Self {
        wire::Endpoint { server: from.server.to_vec(), address: from.address.clone() }
    }
}

impl TryFrom<wire::Endpoint> for Endpoint {
    type Error = WireError;

    fn try_from(from: wire::Endpoint) -> Checked<Self> {
        Ok(Endpoint {
            server: need(ServerId::from_slice(&from.server), "server")?,
            address: named(from.address, "address")?,
        })
    }
}

/// Nothing is what was before there was a choice.
fn via(name: &str) -> Checked<Via> {
    match name {
        "" => Ok(Via::Nbd),
        name => Via::named(name).ok_or(WireError::Invalid("via")),
    }
}

fn disks(from: Vec<wire::DiskSpec>) -> Checked<Vec<DiskSpec>> {
    if from.is_empty() {
        return Err(WireError::Invalid("disks"));
    }
    list(from, "disks", DISKS_MAX, DiskSpec::try_from)
}

impl From<&DiskSpec> for wire::DiskSpec {
    fn from(from: &DiskSpec) -> Self {
        wire::DiskSpec {
            disk: from.disk.to_vec(),
            path: from.path.clone(),
            export: from.export.clone(),
            generation: from.generation.0,
            bytes: from.bytes,
            added: from.added,
        }
    }
}

impl TryFrom<wire::DiskSpec> for DiskSpec {
    type Error = WireError;

    fn try_from(from: wire::DiskSpec) -> Checked<Self> {
        if from.bytes == 0 || !from.bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(WireError::Invalid("bytes"));
        }
        Ok(DiskSpec {
            disk: disk(&from.disk)?,
            path: named(from.path, "path")?,
            export: named(from.export, "export")?,
            generation: Generation(need(optional(from.generation), "generation")?),
            bytes: from.bytes,
            added: from.added,
        })
    }
}

impl From<ReplicationPolicy> for wire::ReplicationPolicy {
    fn from(from: ReplicationPolicy) -> Self {
        wire::ReplicationPolicy {
            cycle_ms: from.cycle.map_or(0, milliseconds),
            point_interval_ms: from.point_interval.map_or(0, milliseconds),
            app_point_interval_ms: from.app_point_interval.map_or(0, milliseconds),
            compression: match from.compression {
                Compression::Off => 0,
                // What an agent that does not know the flag takes for it.
                Compression::Auto => 1,
                Compression::Level(level) => level,
            },
            compression_adapts: from.compression == Compression::Auto,
            log_limit_bytes: from.log_limit_bytes.unwrap_or(0),
            throttle_bytes_per_second: from.throttle.bytes_per_second.unwrap_or(0),
            throttle_rules: from.throttle.rules.into_iter().map(wire::ThrottleRule::from).collect(),
        }
    }
}

impl From<ThrottleRule> for wire::ThrottleRule {
    fn from(from: ThrottleRule) -> Self {
        let (network, prefix_bits) = match from.network {
            None => (Vec::new(), 0),
            Some(Network { address: IpAddr::V4(address), prefix_bits }) => (address.octets().to_vec(), prefix_bits),
            Some(Network { address: IpAddr::V6(address), prefix_bits }) => (address.octets().to_vec(), prefix_bits),
        };
        wire::ThrottleRule {
            days: from.days.into(),
            from_minute: from.from_minute.into(),
            to_minute: from.to_minute.into(),
            network,
            prefix_bits: prefix_bits.into(),
            bytes_per_second: from.bytes_per_second.unwrap_or(0),
        }
    }
}

impl TryFrom<wire::ThrottleRule> for ThrottleRule {
    type Error = WireError;

    fn try_from(from: wire::ThrottleRule) -> Result<Self, WireError> {
        let address: Option<IpAddr> = match from.network.len() {
            0 => None,
            4 => Some(need(<[u8; 4]>::try_from(from.network.as_slice()).ok(), "network")?.into()),
            16 => Some(need(<[u8; 16]>::try_from(from.network.as_slice()).ok(), "network")?.into()),
            _ => return Err(WireError::Invalid("network")),
        };
        let network = match address {
            None => None,
            Some(address) => {
                let prefix_bits = u8::try_from(from.prefix_bits).map_err(|_| WireError::Invalid("prefix_bits"))?;
                Some(need(Network::new(address, prefix_bits), "prefix_bits")?)
            }
        };
        let minute = |minute: u32| {
            u16::try_from(minute)
                .ok()
                .filter(|minute| *minute <= DAY_MINUTES)
                .ok_or(WireError::Invalid("minute of a day"))
        };
        Ok(ThrottleRule {
            days: u8::try_from(from.days).ok().filter(|days| *days < 128).ok_or(WireError::Invalid("days"))?,
            from_minute: minute(from.from_minute)?,
            to_minute: minute(from.to_minute)?,
            network,
            bytes_per_second: optional(from.bytes_per_second),
        })
    }
}

impl TryFrom<wire::ReplicationPolicy> for ReplicationPolicy {
    type Error = WireError;

    fn try_from(from: wire::ReplicationPolicy) -> Result<Self, WireError> {
        if from.throttle_rules.len() > THROTTLE_RULES_MAX {
            return Err(WireError::Invalid("throttle_rules"));
        }
        Ok(ReplicationPolicy {
            cycle: optional(from.cycle_ms).map(Duration::from_millis),
            point_interval: optional(from.point_interval_ms).map(Duration::from_millis),
            app_point_interval: optional(from.app_point_interval_ms).map(Duration::from_millis),
            compression: match from.compression {
                _ if from.compression_adapts => Compression::Auto,
                0 => Compression::Off,
                level => Compression::Level(level),
            },
            log_limit_bytes: optional(from.log_limit_bytes),
            throttle: Throttle {
                bytes_per_second: optional(from.throttle_bytes_per_second),
                rules: from.throttle_rules.into_iter().map(ThrottleRule::try_from).collect::<Result<_, _>>()?,
            },
        })
    }
}

impl From<&ServerCommand> for wire::ServerCommand {
    fn from(from: &ServerCommand) -> Self {
        use wire::server_command::Body;
        let point_ref = |machine: &MachineId, point: &Selector| wire::PointRef {
            machine: machine.to_vec(),
            selector: Some((*point).into()),
        };
        let body = match from {
            ServerCommand::Authorise(grant) => Body::Authorise(grant.into()),
            ServerCommand::Deauthorise { machine, delete_replica } => {
                Body::Deauthorise(wire::Deauthorise { machine: machine.to_vec(), delete_replica: *delete_replica })
            }
            ServerCommand::Retention { machine, retention } => {
                Body::Retention(wire::SetRetention { machine: machine.to_vec(), retention: Some((*retention).into()) })
            }
            ServerCommand::Points(machine) => Body::Points(machine_ref(machine)),
            ServerCommand::Resolve { machine, point } => Body::Resolve(point_ref(machine, point)),
            ServerCommand::Lock { machine, point, locked } => Body::Lock(wire::LockPoint {
                machine: machine.to_vec(),
                selector: Some((*point).into()),
                locked: *locked,
            }),
            ServerCommand::Verify { machine, point } => Body::Verify(point_ref(machine, point)),
            ServerCommand::WaitPoint { machine, mark, limit } => Body::WaitPoint(wire::WaitPoint {
                machine: machine.to_vec(),
                mark: mark.to_vec(),
                limit_ms: milliseconds(*limit),
            }),
            ServerCommand::Serve { machine, point, writable, listen } => Body::Serve(wire::Serve {
                machine: machine.to_vec(),
                selector: Some((*point).into()),
                writable: *writable,
                listen: address_text(*listen),
            }),
            ServerCommand::StopServe(id) => Body::StopServe(wire::ServeRef { serve: id.0.as_bytes().to_vec() }),
            ServerCommand::Export { machine, point, to, format } => Body::Export(wire::Export {
                machine: machine.to_vec(),
                selector: Some((*point).into()),
                to: to.clone(),
                format: format.name().to_owned(),
            }),
            ServerCommand::Status => Body::Status(empty()),
            ServerCommand::Deny(list) => Body::Deny(list.into()),
            ServerCommand::Hypervisor(call) => Body::Hypervisor(wire::HypervisorCall { call: call.clone() }),
            ServerCommand::KeepBackup(part) => Body::KeepBackup(wire::BackupPart {
                name: part.name.clone(),
                offset: part.offset,
                bytes: part.bytes,
                digest: part.digest.to_vec(),
                data: part.data.clone(),
                break_glass: part.break_glass.to_vec(),
            }),
            ServerCommand::ConfirmPoint { machine, point } => {
                let point = point.map_or_else(Vec::new, |id| id.to_vec());
                Body::ConfirmPoint(wire::ConfirmPoint { machine: machine.to_vec(), point })
            }
        };
        wire::ServerCommand { body: Some(body) }
    }
}

impl TryFrom<wire::ServerCommand> for ServerCommand {
    type Error = WireError;

    fn try_from(from: wire::ServerCommand) -> Checked<Self> {
        use wire::server_command::Body;
        Ok(match need(from.body, "command")? {
            Body::Authorise(grant) => ServerCommand::Authorise(grant.try_into()?),
            Body::Deauthorise(of) => {
                ServerCommand::Deauthorise { machine: machine(&of.machine)?, delete_replica: of.delete_replica }
            }
            Body::Retention(of) => ServerCommand::Retention {
                machine: machine(&of.machine)?,
                retention: need(of.retention, "retention")?.try_into()?,
            },
            Body::Points(of) => ServerCommand::Points(machine(&of.machine)?),
            Body::Resolve(of) => {
                ServerCommand::Resolve { machine: machine(&of.machine)?, point: selector(of.selector)? }
            }
            Body::Lock(of) => {
                ServerCommand::Lock { machine: machine(&of.machine)?, point: selector(of.selector)?, locked: of.locked }
            }
            Body::Verify(of) => ServerCommand::Verify { machine: machine(&of.machine)?, point: selector(of.selector)? },
            Body::WaitPoint(of) => ServerCommand::WaitPoint {
                machine: machine(&of.machine)?,
                mark: mark(&of.mark)?,
                limit: Duration::from_millis(need(optional(of.limit_ms), "limit")?),
            },
            Body::Serve(of) => ServerCommand::Serve {
                machine: machine(&of.machine)?,
                point: selector(of.selector)?,
                writable: of.writable,
                listen: optional_address(&of.listen)?,
            },
            Body::StopServe(of) => ServerCommand::StopServe(serve_id(&of.serve)?),
            Body::Export(of) => ServerCommand::Export {
                machine: machine(&of.machine)?,
                point: selector(of.selector)?,
                to: named(of.to, "to")?,
                format: of.format.parse().map_err(|_| WireError::Invalid("format"))?,
            },
            Body::Status(_) => ServerCommand::Status,
            Body::Deny(list) => ServerCommand::Deny(list.try_into()?),
            Body::Hypervisor(of) => ServerCommand::Hypervisor(named(of.call, "call")?),
            Body::KeepBackup(part) => ServerCommand::KeepBackup(BackupPart {
                name: named(part.name, "name")?,
                offset: part.offset,
                bytes: part.bytes,
                digest: part.digest.try_into().map_err(|_| WireError::Invalid("digest"))?,
                data: part.data,
                break_glass: part.break_glass.try_into().map_err(|_| WireError::Invalid("break_glass"))?,
            }),
            Body::ConfirmPoint(of) => {
                let point = optional(of.point).map(|id| mark(&id)).transpose()?;
                ServerCommand::ConfirmPoint { machine: machine(&of.machine)?, point }
            }
        })
    }
}

impl From<Selector> for wire::Selector {
    fn from(from: Selector) -> Self {
        use wire::selector::Body;
        let body = match from {
            Selector::Latest => Body::Latest(empty()),
            Selector::LatestApp => Body::LatestApp(empty()),
            Selector::LowestRpo => Body::LowestRpo(empty()),
            Selector::Point(id) => Body::Point(id.to_vec()),
            Selector::Time(time) => Body::TimeNs(time.0),
        };
        wire::Selector { body: Some(body) }
    }
}

fn selector(from: Option<wire::Selector>) -> Checked<Selector> {
    use wire::selector::Body;
    Ok(match need(from.and_then(|selector| selector.body), "selector")? {
        Body::Latest(_) => Selector::Latest,
        Body::LatestApp(_) => Selector::LatestApp,
        Body::LowestRpo(_) => Selector::LowestRpo,
        Body::Point(id) => Selector::Point(mark(&id)?),
        Body::TimeNs(time) => Selector::Time(Timestamp(time)),
    })
}

impl From<&MachineGrant> for wire::MachineGrant {
    fn from(from: &MachineGrant) -> Self {
        wire::MachineGrant {
            machine: from.machine.to_vec(),
            name: from.name.clone(),
            host: from.host.to_vec(),
            disks: from.disks.iter().map(Into::into).collect(),
            retention: Some(from.retention.into()),
        }
    }
}

impl TryFrom<wire::MachineGrant> for MachineGrant {
    type Error = WireError;

    fn try_from(from: wire::MachineGrant) -> Checked<Self> {
        Ok(MachineGrant {
            machine: machine(&from.machine)?,
            name: named(from.name, "name")?,
            host: need(HostId::from_slice(&from.host), "host")?,
            disks: disks(from.disks)?,
            retention: need(from.retention, "retention")?.try_into()?,
        })
    }
}

impl From<Retention> for wire::Retention {
    fn from(from: Retention) -> Self {
        wire::Retention {
            any_time_ms: milliseconds(from.any_time),
            age_ms: from.age.map_or(0, milliseconds),
            count: from.count.unwrap_or(0),
            grid: (from.grid.steps())
                .map(|step| wire::GridStep {
                    within_ms: step.within.map_or(0, milliseconds),
                    every_ms: milliseconds(step.every),
                })
                .collect(),
        }
    }
}

impl TryFrom<wire::Retention> for Retention {
    type Error = WireError;

    fn try_from(from: wire::Retention) -> Result<Self, WireError> {
        let steps = from.grid.iter().map(|step| GridStep {
            within: optional(step.within_ms).map(Duration::from_millis),
            every: Duration::from_millis(step.every_ms),
        });
        Ok(Retention {
            any_time: Duration::from_millis(from.any_time_ms),
            age: optional(from.age_ms).map(Duration::from_millis),
            count: optional(from.count),
            grid: need(Grid::new(steps), "grid")?,
        })
    }
}

// ---- replies

impl From<&Failure> for wire::Failure {
    fn from(from: &Failure) -> Self {
        let kind = match from.kind {
            FailureKind::BadRequest => wire::FailureKind::BadRequest,
            FailureKind::NotFound => wire::FailureKind::NotFound,
            FailureKind::Conflict => wire::FailureKind::Conflict,
            FailureKind::Unavailable => wire::FailureKind::Unavailable,
            FailureKind::TimedOut => wire::FailureKind::TimedOut,
            FailureKind::Damaged => wire::FailureKind::Damaged,
            FailureKind::Failed => wire::FailureKind::Failed,
        };
        let bounded = |text: &str| text.chars().take(TEXT_BYTES_MAX / 4).collect();
        wire::Failure { kind: kind.into(), message: bounded(&from.message), help: bounded(&from.help) }
    }
}

impl TryFrom<wire::Failure> for Failure {
    type Error = WireError;

    fn try_from(from: wire::Failure) -> Checked<Self> {
        let kind = match from.kind() {
            wire::FailureKind::BadRequest => FailureKind::BadRequest,
            wire::FailureKind::NotFound => FailureKind::NotFound,
            wire::FailureKind::Conflict => FailureKind::Conflict,
            wire::FailureKind::Unavailable => FailureKind::Unavailable,
            wire::FailureKind::TimedOut => FailureKind::TimedOut,
            wire::FailureKind::Damaged => FailureKind::Damaged,
            // A kind of a newer build is still a failure.
            wire::FailureKind::Failed | wire::FailureKind::Invalid => FailureKind::Failed,
        };
        Ok(Failure { kind, message: named(from.message, "message")?, help: text(from.help, "help")? })
    }
}

/// The answer to request `request`.
pub fn reply_to(request: u64, outcome: &Result<Reply, Failure>) -> wire::Reply {
    use wire::reply::Body;
    let body = match outcome {
        Err(failure) => Body::Failure(failure.into()),
        Ok(Reply::Done) => Body::Done(empty()),
        Ok(Reply::Probed(disks)) => Body::Probed(wire::Probed { disks: disks.iter().map(Into::into).collect() }),
        Ok(Reply::Attached(disks)) => Body::Attached(wire::Attached { disks: disks.iter().map(Into::into).collect() }),
        Ok(Reply::Marked { mark, time }) => Body::Marked(wire::Marked { mark: mark.to_vec(), time_ns: time.0 }),
        Ok(Reply::Point(point)) => Body::Point(point.into()),
        Ok(Reply::Points(points)) => Body::Points(wire::Points { points: points.iter().map(Into::into).collect() }),
        Ok(Reply::Verified(verified)) => Body::Verified(wire::Verified {
            point: verified.point.to_vec(),
            time_ns: verified.time.0,
            bytes: verified.bytes,
            defects: verified.defects.clone(),
        }),
        Ok(Reply::Serving(serving)) => Body::Serving(serving.into()),
        Ok(Reply::Exported(exported)) => Body::Exported(wire::Exported {
            point: exported.point.to_vec(),
            time_ns: exported.time.0,
            files: exported
                .files
                .iter()
                .map(|file| wire::ExportedFile { disk: file.id.to_vec(), path: file.path.clone(), bytes: file.bytes })
                .collect(),
        }),
        Ok(Reply::Agent(report)) => Body::AgentReport(report.into()),
        Ok(Reply::Server(report)) => Body::ServerReport(report.into()),
        Ok(Reply::Hypervisor(answer)) => Body::Hypervisor(wire::HypervisorAnswer { answer: answer.clone() }),
        Ok(Reply::GroupReleased(released)) => Body::GroupReleased(wire::GroupReleased {
            in_time: released.in_time,
            held_ns: u64::try_from(released.held.as_nanos()).unwrap_or(u64::MAX),
            machines: released
                .machines
                .iter()
                .map(|of| wire::GroupMark {
                    machine: of.machine.to_vec(),
                    time_ns: of.time.map_or(0, |time| time.0),
                    failure: of.failure.as_ref().map(Into::into),
                })
                .collect(),
        }),
        Ok(Reply::MasterTarget(answer)) => Body::MasterTarget(wire::TargetAnswer { answer: answer.clone() }),
        Ok(Reply::Owner(answer)) => Body::Owner(wire::OwnerAnswer { answer: answer.clone() }),
    };
    wire::Reply { request, body: Some(body) }
}

impl TryFrom<wire::Reply> for (u64, Result<Reply, Failure>) {
    type Error = WireError;

    fn try_from(from: wire::Reply) -> Checked<Self> {
        use wire::reply::Body;
        let reply = match need(from.body, "reply")? {
            Body::Failure(failure) => return Ok((from.request, Err(failure.try_into()?))),
            Body::Done(_) => Reply::Done,
            Body::Probed(probed) => Reply::Probed(list(probed.disks, "disks", DISKS_MAX, ProbedDisk::try_from)?),
            Body::Attached(attached) => {
                Reply::Attached(list(attached.disks, "disks", DISKS_MAX, AttachedDisk::try_from)?)
            }
            Body::Marked(marked) => Reply::Marked { mark: mark(&marked.mark)?, time: Timestamp(marked.time_ns) },
            Body::Point(point) => Reply::Point(point.try_into()?),
            Body::Points(points) => Reply::Points(list(points.points, "points", LIST_MAX, PointInfo::try_from)?),
            Body::Verified(verified) => Reply::Verified(Verified {
                point: mark(&verified.point)?,
                time: Timestamp(verified.time_ns),
                bytes: verified.bytes,
                defects: list(verified.defects, "defects", LIST_MAX, |defect| text(defect, "defect"))?,
            }),
            Body::Serving(serving) => Reply::Serving(serving.try_into()?),
            Body::Exported(exported) => Reply::Exported(Exported {
                point: mark(&exported.point)?,
                time: Timestamp(exported.time_ns),
                files: list(exported.files, "files", DISKS_MAX, |file| {
                    Ok(ExportedFile { id: disk(&file.disk)?, path: named(file.path, "path")?, bytes: file.bytes })
                })?,
            }),
            Body::AgentReport(report) => Reply::Agent(report.try_into()?),
            Body::ServerReport(report) => Reply::Server(report.try_into()?),
            Body::Hypervisor(of) => Reply::Hypervisor(named(of.answer, "answer")?),
            Body::GroupReleased(of) => Reply::GroupReleased(GroupReleased {
                in_time: of.in_time,
                held: Duration::from_nanos(of.held_ns),
                machines: list(of.machines, "machines", GROUP_MACHINES_MAX, |of| {
                    Ok(GroupMark {
                        machine: machine(&of.machine)?,
                        time: optional(of.time_ns).map(Timestamp),
                        failure: of.failure.map(Failure::try_from).transpose()?,
                    })
                })?,
            }),
            Body::MasterTarget(of) => Reply::MasterTarget(named(of.answer, "answer")?),
            Body::Owner(of) => Reply::Owner(named(of.answer, "answer")?),
        };
        Ok((from.request, Ok(reply)))
    }
}

impl From<&ProbedDisk> for wire::ProbedDisk {
    fn from(from: &ProbedDisk) -> Self {
        wire::ProbedDisk {
            path: from.path.clone(),
            bytes: from.bytes,
            occupied_bytes: from.occupied_bytes,
            log: from.log.as_ref().map(|log| wire::LogRoom {
                folder: log.folder.clone(),
                free_bytes: log.free_bytes,
                needed_bytes: log.needed_bytes,
            }),
        }
    }
}

impl TryFrom<wire::ProbedDisk> for ProbedDisk {
    type Error = WireError;

    fn try_from(from: wire::ProbedDisk) -> Checked<Self> {
        let room = |log: wire::LogRoom| -> Checked<LogRoom> {
            Ok(LogRoom {
                folder: text(log.folder, "folder")?,
                free_bytes: log.free_bytes,
                needed_bytes: log.needed_bytes,
            })
        };
        Ok(ProbedDisk {
            path: named(from.path, "path")?,
            bytes: need(optional(from.bytes), "bytes")?,
            occupied_bytes: from.occupied_bytes,
            log: from.log.map(room).transpose()?,
        })
    }
}

impl From<&AttachedDisk> for wire::AttachedDisk {
    fn from(from: &AttachedDisk) -> Self {
        wire::AttachedDisk {
            disk: from.id.to_vec(),
            nbd: from.nbd.clone().unwrap_or_default(),
            nbds: from.nbds.clone().unwrap_or_default(),
            file: from.file.clone().unwrap_or_default(),
            bytes: from.bytes,
        }
    }
}

impl TryFrom<wire::AttachedDisk> for AttachedDisk {
    type Error = WireError;

    fn try_from(from: wire::AttachedDisk) -> Checked<Self> {
        Ok(AttachedDisk {
            id: disk(&from.disk)?,
            nbd: optional(text(from.nbd, "nbd")?),
            nbds: optional(text(from.nbds, "nbds")?),
            file: optional(text(from.file, "file")?),
            bytes: from.bytes,
        })
    }
}

impl From<&PointInfo> for wire::Point {
    fn from(from: &PointInfo) -> Self {
        wire::Point {
            id: from.id.to_vec(),
            time_ns: from.time.0,
            consistency: wire::PointConsistency::from(from.consistency).into(),
            label: from.label.clone(),
            locked: from.locked,
            change_bytes: from.change_bytes,
            flags: from.flags.clone(),
        }
    }
}

impl TryFrom<wire::Point> for PointInfo {
    type Error = WireError;

    fn try_from(from: wire::Point) -> Checked<Self> {
        Ok(PointInfo {
            id: mark(&from.id)?,
            time: Timestamp(from.time_ns),
            consistency: from.consistency().try_into()?,
            label: text(from.label, "label")?,
            locked: from.locked,
            change_bytes: from.change_bytes,
            flags: list(from.flags, "flags", 16, |flag| text(flag, "flag"))?,
        })
    }
}

impl From<&Serving> for wire::Serving {
    fn from(from: &Serving) -> Self {
        wire::Serving {
            serve: from.serve.0.as_bytes().to_vec(),
            machine: from.machine.to_vec(),
            point: from.point.to_vec(),
            time_ns: from.time.0,
            writable: from.writable,
            disks: from.disks.iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<wire::Serving> for Serving {
    type Error = WireError;

    fn try_from(from: wire::Serving) -> Checked<Self> {
        Ok(Serving {
            serve: serve_id(&from.serve)?,
            machine: machine(&from.machine)?,
            point: mark(&from.point)?,
            time: Timestamp(from.time_ns),
            writable: from.writable,
            disks: list(from.disks, "disks", DISKS_MAX, AttachedDisk::try_from)?,
        })
    }
}

// ---- reports

fn problems(from: Vec<wire::Problem>) -> Checked<Vec<Problem>> {
    list(from, "problems", 64, |problem| {
        Ok(Problem {
            critical: problem.critical,
            message: named(problem.message, "problem")?,
            help: text(problem.help, "help")?,
        })
    })
}

fn wire_problems(from: &[Problem]) -> Vec<wire::Problem> {
    from.iter()
        .map(|problem| wire::Problem {
            critical: problem.critical,
            message: problem.message.clone(),
            help: problem.help.clone(),
        })
        .collect()
}

impl From<&AgentReport> for wire::AgentReport {
    fn from(from: &AgentReport) -> Self {
        let disks = from.disks.iter().map(Into::into).collect();
        // Told by the stream, which knows what it told before.
        wire::AgentReport { time_ns: from.time.0, disks, inventory: None }
    }
}

impl TryFrom<wire::AgentReport> for AgentReport {
    type Error = WireError;

    fn try_from(from: wire::AgentReport) -> Checked<Self> {
        Ok(AgentReport {
            time: Timestamp(from.time_ns),
            disks: list(from.disks, "disks", LIST_MAX, SourceDisk::try_from)?,
        })
    }
}

impl From<&SourceDisk> for wire::SourceDisk {
    fn from(from: &SourceDisk) -> Self {
        let state = match from.state {
            SourceState::Connecting => wire::SourceState::Connecting,
            SourceState::InitialReplication => wire::SourceState::Initial,
            SourceState::Resynchronising => wire::SourceState::Resynchronising,
            SourceState::Replicating => wire::SourceState::Replicating,
            SourceState::Paused => wire::SourceState::Paused,
            SourceState::Failed => wire::SourceState::Failed,
        };
        let mode = match from.mode {
            SourceMode::Data => wire::SourceMode::Data,
            SourceMode::Bitmap => wire::SourceMode::Bitmap,
            SourceMode::Compare => wire::SourceMode::Compare,
        };
        let (scan_done_bytes, scan_total_bytes) = from.scan.unwrap_or_default();
        wire::SourceDisk {
            disk: from.disk.to_vec(),
            state: state.into(),
            mode: mode.into(),
            logged: from.logged.clone(),
            sent: from.sent.clone(),
            durable: from.durable.clone(),
            pending_bytes: from.pending_bytes,
            written_bytes: from.written_bytes,
            sent_bytes: from.sent_bytes,
            log_bytes: from.log_bytes,
            rpo_ns: u64::try_from(from.rpo.as_nanos()).unwrap_or(u64::MAX),
            scan_done_bytes,
            scan_total_bytes,
            problems: wire_problems(&from.problems),
            mode_reason: from.mode_reason.clone(),
            compared_bytes: from.compare.compared_bytes,
            differing_bytes: from.compare.differing_bytes,
            compare_left_bytes: from.compare.left_bytes,
            current_bytes: from.current_bytes,
            server: from.server.map_or_else(Vec::new, |server| server.to_vec()),
        }
    }
}

impl TryFrom<wire::SourceDisk> for SourceDisk {
    type Error = WireError;

    fn try_from(from: wire::SourceDisk) -> Checked<Self> {
        let state = match from.state() {
            wire::SourceState::Invalid => return Err(WireError::Invalid("state")),
            wire::SourceState::Connecting => SourceState::Connecting,
            wire::SourceState::Initial => SourceState::InitialReplication,
            wire::SourceState::Resynchronising => SourceState::Resynchronising,
            wire::SourceState::Replicating => SourceState::Replicating,
            wire::SourceState::Paused => SourceState::Paused,
            wire::SourceState::Failed => SourceState::Failed,
        };
        let mode = match from.mode() {
            wire::SourceMode::Invalid => return Err(WireError::Invalid("mode")),
            wire::SourceMode::Data => SourceMode::Data,
            wire::SourceMode::Bitmap => SourceMode::Bitmap,
            wire::SourceMode::Compare => SourceMode::Compare,
        };
        let server = match from.server.is_empty() {
            true => None,
            false => Some(need(ServerId::from_slice(&from.server), "server")?),
        };
        Ok(SourceDisk {
            disk: disk(&from.disk)?,
            server,
            state,
            mode,
            mode_reason: text(from.mode_reason, "mode_reason")?,
            logged: text(from.logged, "logged")?,
            sent: text(from.sent, "sent")?,
            durable: text(from.durable, "durable")?,
            pending_bytes: from.pending_bytes,
            written_bytes: from.written_bytes,
            sent_bytes: from.sent_bytes,
            log_bytes: from.log_bytes,
            rpo: Duration::from_nanos(from.rpo_ns),
            scan: (from.scan_total_bytes > 0).then_some((from.scan_done_bytes, from.scan_total_bytes)),
            compare: Compared {
                compared_bytes: from.compared_bytes,
                differing_bytes: from.differing_bytes,
                left_bytes: from.compare_left_bytes,
            },
            current_bytes: from.current_bytes,
            problems: problems(from.problems)?,
        })
    }
}

impl From<&ServerReport> for wire::ServerReport {
    fn from(from: &ServerReport) -> Self {
        wire::ServerReport {
            // Of the stream, which alone knows its requests.
            working: Vec::new(),
            storage_encrypted: from.storage_encrypted,
            volume_bytes: from.volume.map_or(0, |volume| volume.bytes),
            volume_free_bytes: from.volume.map_or(0, |volume| volume.free_bytes),
            time_ns: from.time.0,
            disks: from
                .disks
                .iter()
                .map(|disk| wire::ReplicaDisk {
                    disk: disk.disk.to_vec(),
                    consistent: disk.consistent,
                    durable: disk.durable.clone(),
                    folded: disk.folded.clone(),
                    durable_time_ns: disk.durable_time.map_or(0, |time| time.0),
                    stored_bytes: disk.stored_bytes,
                    problems: wire_problems(&disk.problems),
                    scrubbed_time_ns: disk.scrubbed_time.map_or(0, |time| time.0),
                    scrub_started_ns: disk.scrub_started.map_or(0, |time| time.0),
                    scrub_bytes: disk.scrub_bytes,
                })
                .collect(),
            serves: from.serves.iter().map(Into::into).collect(),
            machines: from
                .machines
                .iter()
                .map(|of| wire::ReplicaMachine {
                    machine: of.machine.to_vec(),
                    points: of.points,
                    latest: of.latest.as_ref().map(Into::into),
                    group_candidate: of.group_candidate.map_or_else(Vec::new, |id| id.to_vec()),
                    group_point: of.group_point.map_or_else(Vec::new, |id| id.to_vec()),
                })
                .collect(),
        }
    }
}

impl TryFrom<wire::ServerReport> for ServerReport {
    type Error = WireError;

    fn try_from(from: wire::ServerReport) -> Checked<Self> {
        Ok(ServerReport {
            storage_encrypted: from.storage_encrypted,
            volume: optional(from.volume_bytes)
                .map(|bytes| Volume { bytes, free_bytes: from.volume_free_bytes.min(bytes) }),
            time: Timestamp(from.time_ns),
            disks: list(from.disks, "disks", LIST_MAX, |of| {
                Ok(ReplicaDisk {
                    disk: disk(&of.disk)?,
                    consistent: of.consistent,
                    durable: text(of.durable, "durable")?,
                    folded: text(of.folded, "folded")?,
                    durable_time: optional(of.durable_time_ns).map(Timestamp),
                    stored_bytes: of.stored_bytes,
                    problems: problems(of.problems)?,
                    scrubbed_time: optional(of.scrubbed_time_ns).map(Timestamp),
                    scrub_started: optional(of.scrub_started_ns).map(Timestamp),
                    scrub_bytes: of.scrub_bytes,
                })
            })?,
            serves: list(from.serves, "serves", 4096, Serving::try_from)?,
            machines: list(from.machines, "machines", LIST_MAX, |of| {
                Ok(ReplicaMachine {
                    machine: machine(&of.machine)?,
                    points: of.points,
                    latest: of.latest.map(PointInfo::try_from).transpose()?,
                    group_candidate: optional(of.group_candidate).map(|id| mark(&id)).transpose()?,
                    group_point: optional(of.group_point).map(|id| mark(&id)).transpose()?,
                })
            })?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> MachineSpec {
        MachineSpec {
            machine: MachineId::random(),
            name: "web".into(),
            disks: vec![DiskSpec {
                disk: DiskId::random(),
                path: "/d".into(),
                export: "web-0".into(),
                generation: Generation::FIRST,
                bytes: 4096,
                added: true,
            }],
            policy: ReplicationPolicy {
                cycle: Some(Duration::from_secs(30)),
                point_interval: None,
                app_point_interval: Some(Duration::from_secs(3600)),
                compression: Compression::Auto,
                log_limit_bytes: None,
                throttle: Throttle {
                    bytes_per_second: Some(7),
                    rules: vec![
                        ThrottleRule {
                            days: 0b11,
                            from_minute: 60,
                            to_minute: DAY_MINUTES,
                            network: Network::new("10.1.0.0".parse().unwrap(), 16),
                            bytes_per_second: None,
                        },
                        ThrottleRule {
                            days: 0,
                            from_minute: 60,
                            to_minute: 0,
                            network: Network::new("fd00::".parse().unwrap(), 8),
                            bytes_per_second: Some(5),
                        },
                    ],
                },
            },
            server: Endpoint { server: ServerId::random(), address: "127.0.0.1:1".into() },
            others: vec![Endpoint { server: ServerId::random(), address: "127.0.0.1:2".into() }],
            paused: true,
            listen: Some("127.0.0.1:10809".parse().unwrap()),
            fenced: true,
            via: Via::Bpf,
            moved: true,
        }
    }

    fn denied() -> DenyList {
        DenyList { identities: vec!["tidemark://agent/x".into()], certificates: vec![[7; 32]] }
    }

    fn event(sequence: u64) -> Event {
        Event {
            sequence,
            time: Timestamp(9),
            severity: Severity::Warning,
            machine: Some(MachineId::random()),
            disk: None,
            kind: "log_full".into(),
            message: "the log is full".into(),
            help: String::new(),
        }
    }

    #[test]
    fn events_survive_the_wire_in_their_order() {
        let batch = EventBatch { stream: Uuid::new_v4(), events: vec![event(3), event(4)] };
        assert_eq!(EventBatch::try_from(wire::EventBatch::from(&batch)), Ok(batch.clone()));
        let twice = EventBatch { events: vec![event(3), event(3)], ..batch };
        assert_eq!(EventBatch::try_from(wire::EventBatch::from(&twice)), Err(WireError::Invalid("sequence")));
    }

    #[test]
    fn a_registration_survives_the_wire() {
        let register = Register {
            peer: Peer::Agent { id: HostId::random() },
            name: "h".into(),
            software: "1".into(),
            boot: String::new(),
            instance: Some(Uuid::new_v4()),
            time: Some(Timestamp(3)),
        };
        assert_eq!(Register::try_from(wire::Register::from(&register)), Ok(register.clone()));
        let older = Register { instance: None, time: None, ..register };
        assert_eq!(Register::try_from(wire::Register::from(&older)), Ok(older));
    }

    #[test]
    fn agent_commands_survive_the_wire() {
        let machine = MachineId::random();
        for command in [
            AgentCommand::Probe { paths: vec!["/a".into(), "/b".into()], via: Via::Bpf },
            AgentCommand::Protect(Box::new(spec())),
            AgentCommand::Unprotect(machine),
            AgentCommand::Pause(machine),
            AgentCommand::Resume(machine),
            AgentCommand::Resync(machine),
            AgentCommand::CancelResync(machine),
            AgentCommand::Mark(MarkRequest { machine, consistency: Consistency::App, label: "x".into(), keep: true }),
            AgentCommand::Status,
            AgentCommand::Deny(denied()),
            AgentCommand::HoldGroup(HoldGroup {
                round: MarkId::random(),
                group: "shop".into(),
                machines: vec![machine, MachineId::random()],
                limit: Duration::from_millis(250),
                label: "x".into(),
            }),
            AgentCommand::ReleaseGroup { round: MarkId::random(), verdict: Verdict::Group },
            AgentCommand::ReleaseGroup { round: MarkId::random(), verdict: Verdict::Plain },
            AgentCommand::ReleaseGroup { round: MarkId::random(), verdict: Verdict::Nothing },
            AgentCommand::MasterTarget("{}".into()),
            AgentCommand::Owner("{}".into()),
        ] {
            assert_eq!(AgentCommand::try_from(wire::AgentCommand::from(&command)), Ok(command));
        }
    }

    #[test]
    fn server_commands_survive_the_wire() {
        let machine = MachineId::random();
        let steps = [(Some(7200), 0), (None, 3600)].map(|(within, every)| GridStep {
            within: within.map(Duration::from_secs),
            every: Duration::from_secs(every),
        });
        let retention = Retention {
            any_time: Duration::from_secs(7200),
            age: Some(Duration::from_secs(86400)),
            count: Some(7),
            grid: Grid::new(steps).unwrap(),
        };
        let point = Selector::Time(Timestamp(42));
        for command in [
            ServerCommand::Authorise(MachineGrant {
                machine,
                name: "web".into(),
                host: HostId::random(),
                disks: spec().disks,
                retention,
            }),
            ServerCommand::Deauthorise { machine, delete_replica: true },
            ServerCommand::Retention { machine, retention },
            ServerCommand::Points(machine),
            ServerCommand::Resolve { machine, point },
            ServerCommand::Lock { machine, point: Selector::Point(MarkId::random()), locked: true },
            ServerCommand::Verify { machine, point: Selector::Latest },
            ServerCommand::WaitPoint { machine, mark: MarkId::random(), limit: Duration::from_secs(3) },
            ServerCommand::Serve {
                machine,
                point: Selector::LatestApp,
                writable: true,
                listen: Some("[::1]:10810".parse().unwrap()),
            },
            ServerCommand::Serve { machine, point: Selector::Latest, writable: false, listen: None },
            ServerCommand::StopServe(ServeId::random()),
            ServerCommand::Export { machine, point, to: "/x".into(), format: ImageFormat::Vhdx },
            ServerCommand::Status,
            ServerCommand::Deny(denied()),
            ServerCommand::Hypervisor("\"check\"".into()),
            ServerCommand::KeepBackup(BackupPart {
                name: "backup-1.tidemark".into(),
                offset: 4,
                bytes: 7,
                digest: [5; 32],
                data: vec![1, 2, 3],
                break_glass: [6; 32],
            }),
            ServerCommand::ConfirmPoint { machine, point: Some(MarkId::random()) },
            ServerCommand::ConfirmPoint { machine, point: None },
        ] {
            assert_eq!(ServerCommand::try_from(wire::ServerCommand::from(&command)), Ok(command));
        }
    }

    #[test]
    fn replies_and_failures_survive_the_wire() {
        let point = PointInfo {
            id: MarkId::random(),
            time: Timestamp(7),
            consistency: Consistency::Crash,
            label: String::new(),
            locked: true,
            change_bytes: 9,
            flags: vec!["clock_stepped".into()],
        };
        let attached = AttachedDisk {
            id: DiskId::random(),
            nbd: Some("nbd+unix:///a".into()),
            nbds: Some("nbds://a/b".into()),
            file: None,
            bytes: 512,
        };
        let serving = Serving {
            serve: ServeId::random(),
            machine: MachineId::random(),
            point: point.id,
            time: Timestamp(8),
            writable: false,
            disks: vec![attached.clone()],
        };
        let problem = Problem { critical: true, message: "m".into(), help: "h".into() };
        for outcome in [
            Ok(Reply::Done),
            Ok(Reply::Hypervisor("{}".into())),
            Ok(Reply::GroupReleased(GroupReleased {
                in_time: true,
                held: Duration::from_micros(900),
                machines: vec![
                    GroupMark { machine: MachineId::random(), time: Some(Timestamp(4)), failure: None },
                    GroupMark {
                        machine: MachineId::random(),
                        time: None,
                        failure: Some(Failure::new(FailureKind::Unavailable, "busy", "wait")),
                    },
                ],
            })),
            Ok(Reply::MasterTarget("{}".into())),
            Ok(Reply::Owner("{}".into())),
            Ok(Reply::Attached(vec![attached])),
            Ok(Reply::Marked { mark: point.id, time: Timestamp(1) }),
            Ok(Reply::Points(vec![point.clone()])),
            Ok(Reply::Verified(Verified { point: point.id, time: Timestamp(1), bytes: 3, defects: vec!["d".into()] })),
            Ok(Reply::Serving(serving.clone())),
            Ok(Reply::Agent(AgentReport {
                time: Timestamp(5),
                disks: vec![SourceDisk {
                    disk: DiskId::random(),
                    server: Some(ServerId::random()),
                    state: SourceState::InitialReplication,
                    mode: SourceMode::Bitmap,
                    mode_reason: "the log is full".into(),
                    logged: "a:1".into(),
                    sent: String::new(),
                    durable: String::new(),
                    pending_bytes: 1,
                    written_bytes: 2,
                    sent_bytes: 3,
                    log_bytes: 4,
                    rpo: Duration::from_millis(5),
                    scan: Some((1, 2)),
                    compare: Compared { compared_bytes: 7, differing_bytes: 8, left_bytes: 9 },
                    current_bytes: 4096,
                    problems: vec![problem.clone()],
                }],
            })),
            Ok(Reply::Server(ServerReport {
                storage_encrypted: Some(true),
                volume: Some(Volume { bytes: 9, free_bytes: 8 }),
                time: Timestamp(5),
                disks: vec![ReplicaDisk {
                    disk: DiskId::random(),
                    consistent: true,
                    durable: "a:1".into(),
                    folded: String::new(),
                    durable_time: None,
                    stored_bytes: 1,
                    problems: vec![problem],
                    scrubbed_time: Some(Timestamp(5)),
                    scrub_started: None,
                    scrub_bytes: 7,
                }],
                serves: vec![serving],
                machines: vec![ReplicaMachine {
                    machine: MachineId::random(),
                    points: 2,
                    latest: Some(point),
                    group_candidate: Some(MarkId::random()),
                    group_point: None,
                }],
            })),
            Err(Failure::new(FailureKind::Conflict, "in use", "stop it")),
        ] {
            let expected = (3, outcome.clone());
            assert_eq!(<(u64, Result<Reply, Failure>)>::try_from(reply_to(3, &outcome)), Ok(expected));
        }
    }

    #[test]
    fn what_is_not_valid_is_refused_by_name() {
        let mut bad = wire::MachineSpec::from(&spec());
        bad.disks[0].disk = vec![0; 16];
        assert_eq!(MachineSpec::try_from(bad), Err(WireError::Invalid("disk")));
        let mut bad = wire::MachineSpec::from(&spec());
        bad.disks[0].bytes = 1000;
        assert_eq!(MachineSpec::try_from(bad), Err(WireError::Invalid("bytes")));
        let mut bad = wire::MachineSpec::from(&spec());
        bad.via = "by hand".into();
        assert_eq!(MachineSpec::try_from(bad), Err(WireError::Invalid("via")));
        let mut old = wire::MachineSpec::from(&spec());
        old.via = String::new();
        assert_eq!(MachineSpec::try_from(old).unwrap().via, Via::Nbd);
        let mut bad = wire::MachineSpec::from(&spec());
        bad.name = "x".repeat(TEXT_BYTES_MAX + 1);
        assert!(matches!(MachineSpec::try_from(bad), Err(WireError::TooLong { field: "name", .. })));
        let mut bad = wire::MachineSpec::from(&spec());
        bad.disks = vec![bad.disks[0].clone(); DISKS_MAX + 1];
        assert!(matches!(MachineSpec::try_from(bad), Err(WireError::TooLong { field: "disks", .. })));
        assert_eq!(Register::try_from(wire::Register { version: 9, ..Default::default() }), Err(WireError::Version(9)));
        assert_eq!(AgentCommand::try_from(wire::AgentCommand { body: None }), Err(WireError::Invalid("command")));
        for limit in [Duration::ZERO, HOLD_LIMIT_MAX + Duration::from_millis(1)] {
            let (round, machines) = (MarkId::random(), vec![MachineId::random()]);
            let hold = HoldGroup { round, group: "shop".into(), machines, limit, label: String::new() };
            let sent = wire::AgentCommand::from(&AgentCommand::HoldGroup(hold));
            assert_eq!(AgentCommand::try_from(sent), Err(WireError::Invalid("limit")), "{limit:?}");
        }
    }

    #[test]
    fn points_are_named_as_people_name_them() {
        let id = MarkId::random();
        for (name, selector) in [
            ("latest".to_owned(), Selector::Latest),
            ("latest-app".to_owned(), Selector::LatestApp),
            ("lowest-rpo".to_owned(), Selector::LowestRpo),
            (id.to_string(), Selector::Point(id)),
        ] {
            assert_eq!(name.parse(), Ok(selector));
            assert_eq!(selector.to_string(), name);
        }
        assert_eq!(
            "2026-11-21T10:04:05.250Z".parse(),
            Ok(Selector::Time(Timestamp::parse("2026-11-21T10:04:05.25Z").unwrap()))
        );
        assert!("yesterday".parse::<Selector>().is_err());
        assert!("00000000-0000-0000-0000-000000000000".parse::<Selector>().is_err(), "no point has it");
    }
}
