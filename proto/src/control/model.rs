//! What the control stream says, checked. These types are also the JSON of the REST API: snake case, sizes in bytes,
//! times as RFC 3339, durations in seconds.

use std::fmt;
use std::net::SocketAddr;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tidemark_base::error::with_causes;
use tidemark_base::{DiskId, Generation, HostId, MachineId, MarkId, ServerId, Timestamp};
use uuid::Uuid;

use super::policy::{Compression, Grid, Throttle};

/// Who is at the other end of a control stream.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Peer {
    Agent {
        id: HostId,
    },
    /// `address` is where agents reach it, host:port.
    ProcessServer {
        id: ServerId,
        address: String,
    },
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Register {
    pub peer: Peer,
    /// As people know it: the host's name.
    pub name: String,
    pub software: String,
    pub boot: String,
    /// Random for each process; `None`: it does not say.
    pub instance: Option<Uuid>,
    /// Its clock, where it says.
    pub time: Option<Timestamp>,
}

/// How much an event, or what lasts, matters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    Info,
    Warning,
    Critical,
}

/// Something that happened at a host or a process server.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Event {
    /// Within its sender's stream, from 1.
    pub sequence: u64,
    pub time: Timestamp,
    pub severity: Severity,
    pub machine: Option<MachineId>,
    pub disk: Option<DiskId>,
    /// Such as `resync_started`.
    pub kind: String,
    pub message: String,
    pub help: String,
}

/// Events of one sender, ascending.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EventBatch {
    pub stream: Uuid,
    pub events: Vec<Event>,
}

/// Who is refused although the authority signed its certificate. Always the whole list.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct DenyList {
    /// URIs of certificates.
    pub identities: Vec<String>,
    /// BLAKE3 of certificates, as DER.
    pub certificates: Vec<[u8; 32]>,
}

#[derive(Clone, PartialEq, Debug)]
pub enum AgentCommand {
    /// Whether these disks could be protected, without touching them.
    Probe {
        paths: Vec<String>,
        via: Via,
    },
    Protect(Box<MachineSpec>),
    Unprotect(MachineId),
    Pause(MachineId),
    Resume(MachineId),
    Resync(MachineId),
    CancelResync(MachineId),
    Mark(MarkRequest),
    Status,
    /// Process servers that are not to be dialled.
    Deny(DenyList),
    /// Holds the disks of machines at one instant with those of other hosts.
    HoldGroup(HoldGroup),
    ReleaseGroup {
        round: MarkId,
        verdict: Verdict,
    },
    /// What is asked of the master target: JSON, whose types are those of [`crate::failback`].
    MasterTarget(String),
    /// What is asked of whoever runs a machine at its home: JSON, whose types are those of `tidemark_hypervisor::call`.
    Owner(String),
}

/// A barrier over machines of a group: the part of one host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HoldGroup {
    /// The id of the marks.
    pub round: MarkId,
    pub group: String,
    /// Those that this host protects.
    pub machines: Vec<MachineId>,
    /// The longest that a write waits.
    pub limit: Duration,
    pub label: String,
}

/// How a barrier ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Everybody is held: the marks are those of the group.
    Group,
    /// Somebody is not: each machine gets a mark of its own.
    Plain,
    /// No mark; it is tried again.
    Nothing,
}

/// What became of a barrier at one host.
#[derive(Clone, PartialEq, Debug)]
pub struct GroupReleased {
    /// The release came before the host's own time-out, and every machine got its mark.
    pub in_time: bool,
    /// How long writes were held.
    pub held: Duration,
    pub machines: Vec<GroupMark>,
}

#[derive(Clone, PartialEq, Debug)]
pub struct GroupMark {
    pub machine: MachineId,
    /// `None`: it has no mark.
    pub time: Option<Timestamp>,
    /// Why not; `None` where none was wanted.
    pub failure: Option<Failure>,
}

#[derive(Clone, PartialEq, Debug)]
pub struct MachineSpec {
    pub machine: MachineId,
    pub name: String,
    pub disks: Vec<DiskSpec>,
    pub policy: ReplicationPolicy,
    pub server: Endpoint,
    /// Process servers that get the same changes besides. None twice.
    pub others: Vec<Endpoint>,
    pub paused: bool,
    /// Where its disks are served over TLS as well. Port 0: any, which stays the same from then on.
    pub listen: Option<SocketAddr>,
    /// Nobody opens its disks: it runs elsewhere, or is about to.
    pub fenced: bool,
    pub via: Via,
    /// Its disks were brought here from another place: the process servers hold that place's history, which is none of this host's.
    pub moved: bool,
}

impl MachineSpec {
    /// All process servers that its disks feed.
    pub fn servers(&self) -> impl Iterator<Item = &Endpoint> {
        std::iter::once(&self.server).chain(&self.others)
    }
}

/// How the changes of a machine's disks are captured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Via {
    /// The workload writes through the agent.
    #[default]
    Nbd,
    /// The kernel tells which blocks of a device change.
    Bpf,
    /// The workload writes to a file that is the disk.
    Fuse,
    /// Hyper-V keeps logs beside the disk.
    Hrl,
    /// QEMU's dirty bitmaps tell which blocks of a running machine's disks change.
    Qemu,
    /// VMware's changed-block tracking tells which blocks of a machine's disks change.
    Vsphere,
    /// Hyper-V's resilient change tracking tells which blocks of a machine's disks change.
    Rct,
}

impl Via {
    pub const ALL: [Via; 7] = [Via::Nbd, Via::Bpf, Via::Fuse, Via::Hrl, Via::Qemu, Via::Vsphere, Via::Rct];

    pub fn name(self) -> &'static str {
        match self {
            Via::Nbd => "nbd",
            Via::Bpf => "bpf",
            Via::Fuse => "fuse",
            Via::Hrl => "hrl",
            Via::Qemu => "qemu",
            Via::Vsphere => "vsphere",
            Via::Rct => "rct",
        }
    }

    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|via| via.name() == name)
    }

    /// Whether what is written is kept in a log, or only where.
    pub fn keeps_log(self) -> bool {
        matches!(self, Via::Nbd | Via::Fuse | Via::Hrl)
    }
}

/// Whether it is the whole path of a file on a Windows host, whatever system this is: with a drive (`D:\web.vhdx`) or a server (`\\files\share\web.vhdx`).
pub fn is_full_path_of_windows(path: &str) -> bool {
    let is_separator = |byte: u8| matches!(byte, b'\\' | b'/');
    match path.as_bytes() {
        [b'\\', b'\\', first, ..] => !is_separator(*first),
        [drive, b':', separator, _, ..] => drive.is_ascii_alphabetic() && is_separator(*separator),
        _ => false,
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskSpec {
    pub disk: DiskId,
    pub path: String,
    /// The name of its NBD export.
    pub export: String,
    pub generation: Generation,
    pub bytes: u64,
    /// It came to a machine that was protected already: until its first scan ended the machine has points without it.
    pub added: bool,
}

/// Where a process server takes replication streams.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    /// What the agent pins: its certificate names this id.
    pub server: ServerId,
    /// host:port
    pub address: String,
}

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ReplicationPolicy {
    /// `None`: continuous.
    pub cycle: Option<Duration>,
    /// A kept crash-consistent point that often.
    pub point_interval: Option<Duration>,
    /// A kept app-consistent point that often.
    pub app_point_interval: Option<Duration>,
    pub compression: Compression,
    /// `None`: the agent's own default.
    pub log_limit_bytes: Option<u64>,
    pub throttle: Throttle,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MarkRequest {
    pub machine: MachineId,
    pub consistency: Consistency,
    pub label: String,
    pub keep: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Consistency {
    Crash,
    App,
}

#[derive(Clone, PartialEq, Debug)]
pub enum ServerCommand {
    Authorise(MachineGrant),
    Deauthorise {
        machine: MachineId,
        delete_replica: bool,
    },
    Retention {
        machine: MachineId,
        retention: Retention,
    },
    Points(MachineId),
    Resolve {
        machine: MachineId,
        point: Selector,
    },
    Lock {
        machine: MachineId,
        point: Selector,
        locked: bool,
    },
    Verify {
        machine: MachineId,
        point: Selector,
    },
    WaitPoint {
        machine: MachineId,
        mark: MarkId,
        limit: Duration,
    },
    Serve {
        machine: MachineId,
        point: Selector,
        writable: bool,
        /// Where the disks are served over TLS as well. Port 0: any.
        listen: Option<SocketAddr>,
    },
    StopServe(ServeId),
    Export {
        machine: MachineId,
        point: Selector,
        to: String,
        format: ImageFormat,
    },
    Status,
    /// Hosts that are not to be answered, open streams included.
    Deny(DenyList),
    /// What is asked of whoever runs machines there: JSON, whose types are those of the hypervisor's crate.
    Hypervisor(String),
    KeepBackup(BackupPart),
    /// Every machine of the group has this point, made behind the barrier; `None`: it is in no group any more, and none is kept for
    /// one.
    ConfirmPoint {
        machine: MachineId,
        point: Option<MarkId>,
    },
}

/// Which host may write which disks of a machine, and how long their history is kept.
#[derive(Clone, PartialEq, Debug)]
pub struct MachineGrant {
    pub machine: MachineId,
    pub name: String,
    /// The id in its certificate.
    pub host: HostId,
    pub disks: Vec<DiskSpec>,
    pub retention: Retention,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Retention {
    /// Any position of the last so long can be recovered.
    pub any_time: Duration,
    pub age: Option<Duration>,
    pub count: Option<u64>,
    /// Which of them stay as they grow older.
    pub grid: Grid,
}

/// Which point is meant: `latest`, `latest-app`, `lowest-rpo`, an id, or a time (the last position before it).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Selector {
    Latest,
    LatestApp,
    /// The last consistent state that arrived, kept as a point or not.
    LowestRpo,
    Point(MarkId),
    Time(Timestamp),
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "{0:?} names no recovery point: it is no point's id, no time, and none of `latest`, `latest-app` and `lowest-rpo`"
)]
pub struct SelectorError(pub String);

impl FromStr for Selector {
    type Err = SelectorError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "latest" => Ok(Selector::Latest),
            "latest-app" => Ok(Selector::LatestApp),
            "lowest-rpo" => Ok(Selector::LowestRpo),
            _ => text
                .parse()
                .ok()
                .and_then(|id: MarkId| MarkId::from_slice(id.as_bytes()))
                .map(Selector::Point)
                .ok_or(())
                .or_else(|_| Timestamp::parse(text).map(Selector::Time))
                .map_err(|_| SelectorError(text.chars().take(80).collect())),
        }
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Selector::Latest => f.write_str("latest"),
            Selector::LatestApp => f.write_str("latest-app"),
            Selector::LowestRpo => f.write_str("lowest-rpo"),
            Selector::Point(id) => id.fmt(f),
            Selector::Time(time) => time.fmt(f),
        }
    }
}

/// One serve of a point.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ServeId(pub Uuid);

impl ServeId {
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }
}

impl fmt::Display for ServeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for ServeId {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

/// A file that holds a disk: QEMU's name of the format, and which of its kinds is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageFormat {
    Raw,
    Qcow2,
    Vhdx,
    /// All of its room is taken from the beginning.
    VhdxFixed,
    Vhd,
    /// The disk and a footer: the one kind of VHD that Azure takes.
    VhdFixed,
    /// One file that grows.
    Vmdk,
    /// Compressed, to be read from its beginning to its end: what VMware imports, alone or in an OVF package.
    VmdkStream,
}

impl ImageFormat {
    pub const ALL: [ImageFormat; 8] = [
        ImageFormat::Raw,
        ImageFormat::Qcow2,
        ImageFormat::Vhdx,
        ImageFormat::VhdxFixed,
        ImageFormat::Vhd,
        ImageFormat::VhdFixed,
        ImageFormat::Vmdk,
        ImageFormat::VmdkStream,
    ];

    pub fn name(self) -> &'static str {
        match self {
            ImageFormat::VhdxFixed => "vhdx-fixed",
            ImageFormat::VhdFixed => "vhd-fixed",
            ImageFormat::VmdkStream => "vmdk-stream",
            other => other.ending(),
        }
    }

    /// Of a file's name.
    pub fn ending(self) -> &'static str {
        match self {
            ImageFormat::Raw => "raw",
            ImageFormat::Qcow2 => "qcow2",
            ImageFormat::Vhdx | ImageFormat::VhdxFixed => "vhdx",
            ImageFormat::Vhd | ImageFormat::VhdFixed => "vhd",
            ImageFormat::Vmdk | ImageFormat::VmdkStream => "vmdk",
        }
    }

    /// As QEMU's programs call it.
    pub fn qemu_name(self) -> &'static str {
        match self {
            ImageFormat::Vhd | ImageFormat::VhdFixed => "vpc",
            other => other.ending(),
        }
    }

    /// What QEMU's programs are told when they make one.
    pub fn qemu_options(self) -> Option<&'static str> {
        match self {
            ImageFormat::Raw | ImageFormat::Qcow2 | ImageFormat::Vhdx | ImageFormat::Vmdk => None,
            ImageFormat::VhdxFixed => Some("subformat=fixed"),
            // A VHD's geometry would round the size up; its host takes any size.
            ImageFormat::Vhd => Some("force_size=on"),
            ImageFormat::VhdFixed => Some("subformat=fixed,force_size=on"),
            // Its importers know no IDE disk of this kind.
            ImageFormat::VmdkStream => Some("subformat=streamOptimized,adapter_type=lsilogic"),
        }
    }

    /// What a file's name says. Its content never decides: a guest writes the beginning of a raw image.
    pub fn of_name(path: &Path) -> Self {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_ascii_lowercase();
        // Beside its descriptor, which names it: the disk itself and nothing else.
        if name.ends_with("-flat.vmdk") {
            return ImageFormat::Raw;
        }
        match Path::new(&name).extension().and_then(|ending| ending.to_str()).unwrap_or_default() {
            "vhdx" | "avhdx" => ImageFormat::Vhdx,
            "vhd" | "avhd" | "vpc" => ImageFormat::Vhd,
            "qcow2" => ImageFormat::Qcow2,
            "vmdk" => ImageFormat::Vmdk,
            _ => ImageFormat::Raw,
        }
    }
}

impl FromStr for ImageFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|format| format.name() == text).ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            format!("{text:?} is no image format: {known}")
        })
    }
}

#[derive(Clone, PartialEq, Debug)]
pub enum Reply {
    Done,
    Probed(Vec<ProbedDisk>),
    Attached(Vec<AttachedDisk>),
    Marked {
        mark: MarkId,
        time: Timestamp,
    },
    Point(PointInfo),
    Points(Vec<PointInfo>),
    Verified(Verified),
    Serving(Serving),
    Exported(Exported),
    Agent(AgentReport),
    Server(ServerReport),
    /// The answer to [`ServerCommand::Hypervisor`].
    Hypervisor(String),
    GroupReleased(GroupReleased),
    /// The answer to [`AgentCommand::MasterTarget`].
    MasterTarget(String),
    /// The answer to [`AgentCommand::Owner`].
    Owner(String),
}

impl Reply {
    /// Its name, for the message that it was not the one expected.
    pub fn kind(&self) -> &'static str {
        match self {
            Reply::Done => "done",
            Reply::Probed(_) => "probed",
            Reply::Attached(_) => "attached",
            Reply::Marked { .. } => "marked",
            Reply::Point(_) => "point",
            Reply::Points(_) => "points",
            Reply::Verified(_) => "verified",
            Reply::Serving(_) => "serving",
            Reply::Exported(_) => "exported",
            Reply::Agent(_) => "agent report",
            Reply::Server(_) => "server report",
            Reply::Hypervisor(_) => "a hypervisor's answer",
            Reply::GroupReleased(_) => "released",
            Reply::MasterTarget(_) => "a master target's answer",
            Reply::Owner(_) => "an answer of who runs a machine",
        }
    }
}

/// What a caller can do differently about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    BadRequest,
    NotFound,
    /// In use, or in a state that does not allow it.
    Conflict,
    /// Not now; try again.
    Unavailable,
    TimedOut,
    /// Stored bytes do not verify.
    Damaged,
    Failed,
}

/// Why something was not done, for the operator who asked for it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct Failure {
    pub kind: FailureKind,
    #[serde(rename = "error")]
    pub message: String,
    /// What to do; may be empty.
    pub help: String,
}

impl Failure {
    pub fn new(kind: FailureKind, message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { kind, message: message.into(), help: help.into() }
    }

    /// An error with its causes, one after another.
    pub fn from_error(kind: FailureKind, error: &dyn std::error::Error, help: impl Into<String>) -> Self {
        Self::new(kind, with_causes(error), help)
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ProbedDisk {
    pub path: String,
    pub bytes: u64,
    /// What it takes of its volume: no more than this can be other than zero. `None`: not known.
    pub occupied_bytes: Option<u64>,
    /// `None`: it keeps no log, or the system does not say.
    pub log: Option<LogRoom>,
}

/// The volume where a disk's log would be kept.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogRoom {
    pub folder: String,
    pub free_bytes: u64,
    /// With less no log begins: what changes is tracked in a bitmap.
    pub needed_bytes: u64,
}

/// Where a disk, or a served point of it, can be opened.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AttachedDisk {
    pub id: DiskId,
    pub nbd: Option<String>,
    /// The same over TLS, where that is served.
    #[serde(default)]
    pub nbds: Option<String>,
    pub file: Option<String>,
    pub bytes: u64,
}

/// A recovery point as it is listed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PointInfo {
    pub id: MarkId,
    pub time: Timestamp,
    pub consistency: Consistency,
    pub label: String,
    pub locked: bool,
    /// Stored bytes since the point before it.
    pub change_bytes: u64,
    pub flags: Vec<String>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Verified {
    pub point: MarkId,
    pub time: Timestamp,
    /// Checked bytes.
    pub bytes: u64,
    /// Empty: sound.
    pub defects: Vec<String>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Serving {
    pub serve: ServeId,
    pub machine: MachineId,
    pub point: MarkId,
    pub time: Timestamp,
    pub writable: bool,
    pub disks: Vec<AttachedDisk>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Exported {
    pub point: MarkId,
    pub time: Timestamp,
    pub files: Vec<ExportedFile>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ExportedFile {
    pub id: DiskId,
    pub path: String,
    pub bytes: u64,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Problem {
    pub critical: bool,
    #[serde(rename = "problem")]
    pub message: String,
    pub help: String,
}

#[derive(Clone, PartialEq, Debug)]
pub struct AgentReport {
    pub time: Timestamp,
    pub disks: Vec<SourceDisk>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceState {
    /// No stream to the process server.
    Connecting,
    InitialReplication,
    Resynchronising,
    Replicating,
    Paused,
    Failed,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceMode {
    Data,
    Bitmap,
    Compare,
}

/// The RPO of a disk of which nothing is durable at the process server yet.
pub const NO_RPO: Duration = Duration::from_nanos(u64::MAX);

/// A disk, as it is about one process server: one that feeds several is listed once for each.
#[derive(Clone, PartialEq, Debug)]
pub struct SourceDisk {
    pub disk: DiskId,
    /// `None`: the same for all, or an agent that feeds only one.
    pub server: Option<ServerId>,
    pub state: SourceState,
    pub mode: SourceMode,
    /// Why it is not [`SourceMode::Data`]; empty when it is.
    pub mode_reason: String,
    /// Positions as people read them; empty where there is none.
    pub logged: String,
    pub sent: String,
    pub durable: String,
    /// Written and not yet durable at the process server.
    pub pending_bytes: u64,
    pub written_bytes: u64,
    pub sent_bytes: u64,
    pub log_bytes: u64,
    /// Age of the oldest write that is not durable there; [`NO_RPO`] where nothing is.
    pub rpo: Duration,
    /// Done and total bytes of the scan that runs.
    pub scan: Option<(u64, u64)>,
    pub compare: Compared,
    /// How large the disk is now; 0: not said.
    pub current_bytes: u64,
    pub problems: Vec<Problem>,
}

/// What of a disk was compared with its replica, by hash.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Compared {
    /// Since the agent has the disk.
    pub compared_bytes: u64,
    /// Of these, in blocks of which something differed.
    pub differing_bytes: u64,
    /// What the compare that runs has not settled; 0: none runs.
    pub left_bytes: u64,
}

#[derive(Clone, PartialEq, Debug)]
pub struct ServerReport {
    pub time: Timestamp,
    pub disks: Vec<ReplicaDisk>,
    pub serves: Vec<Serving>,
    pub machines: Vec<ReplicaMachine>,
    /// Whether what it keeps is on an encrypted volume; `None`: it cannot tell.
    pub storage_encrypted: Option<bool>,
    /// What it keeps replicas on; `None`: it does not say.
    pub volume: Option<Volume>,
}

/// With less free a process server takes no changes: points, and what it must be able to write to free room, come first.
pub const VOLUME_RESERVE_BYTES: u64 = 64 << 20;

/// The volume of a process server's replicas.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Volume {
    pub bytes: u64,
    /// What can still be written.
    pub free_bytes: u64,
}

#[derive(Clone, PartialEq, Debug)]
pub struct ReplicaMachine {
    pub machine: MachineId,
    /// Listed points.
    pub points: u64,
    pub latest: Option<PointInfo>,
    /// The newest that was made behind a group's barrier.
    pub group_candidate: Option<MarkId>,
    /// The newest of these that every machine of the group is known to have.
    pub group_point: Option<MarkId>,
}

#[derive(Clone, PartialEq, Debug)]
pub struct ReplicaDisk {
    pub disk: DiskId,
    /// False while a scan is open.
    pub consistent: bool,
    pub durable: String,
    pub folded: String,
    pub durable_time: Option<Timestamp>,
    /// Journal and base, as allocated.
    pub stored_bytes: u64,
    pub problems: Vec<Problem>,
    /// When every byte was last read and proven.
    pub scrubbed_time: Option<Timestamp>,
    /// The pass that is under way: when it began, and what it has read.
    pub scrub_started: Option<Timestamp>,
    pub scrub_bytes: u64,
}

/// A part of a sealed backup of the configuration.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackupPart {
    pub name: String,
    pub offset: u64,
    pub bytes: u64,
    pub digest: [u8; 32],
    pub data: Vec<u8>,
    /// Public key that offline failovers must be signed for.
    pub break_glass: [u8; 32],
}

/// A process server that can be asked where the configuration server is.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Neighbour {
    pub server: ServerId,
    pub address: String,
}

/// Where a configuration server is, and which one it is. The higher incarnation counts; of two that were restored from
/// one backup the one that was heard of first.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Whereabouts {
    pub incarnation: u64,
    pub server: ServerId,
    pub addresses: Vec<String>,
}
