//! Shapes of what is answered, for the OpenAPI document: those that the API's own crate does not declare. A test holds
//! them to what is really sent.

use utoipa::ToSchema;

/// A recovery point as it is listed.
#[derive(ToSchema)]
#[schema(as = Point)]
#[allow(dead_code)]
pub struct PointSchema {
    #[schema(format = "uuid")]
    id: String,
    #[schema(format = "date-time")]
    time: String,
    /// `crash` or `app`.
    consistency: String,
    label: String,
    locked: bool,
    /// Stored bytes since the point before it.
    change_bytes: u64,
    flags: Vec<String>,
}

/// A recovery point, and who has it.
#[derive(ToSchema)]
#[schema(as = HeldPoint)]
#[allow(dead_code)]
pub struct HeldPointSchema {
    #[serde(flatten)]
    point: PointSchema,
    /// The names of the process servers that have it, of those that can be asked.
    process_servers: Vec<String>,
}

#[derive(ToSchema)]
#[schema(as = Problem)]
#[allow(dead_code)]
pub struct ProblemSchema {
    critical: bool,
    problem: String,
    /// What to do.
    help: String,
}

/// What was compared with the replica, by hash.
#[derive(ToSchema)]
#[schema(as = Compared)]
#[allow(dead_code)]
pub struct ComparedSchema {
    /// Since the agent has the disk.
    compared_bytes: u64,
    /// Of these, in blocks of which something differed.
    differing_bytes: u64,
    /// What the compare that runs has not settled; 0: none runs.
    left_bytes: u64,
}

/// Why something was not done.
#[derive(ToSchema)]
#[schema(as = Failure)]
#[allow(dead_code)]
pub struct FailureSchema {
    /// What happened, naming the thing.
    error: String,
    /// What to do; may be empty.
    help: String,
    /// For programs: `bad_request`, `not_found`, `conflict`, `unavailable`, `timed_out`, `damaged` or `failed`; of a request that comes to no
    /// operation also `unauthenticated`, `forbidden`, `method_not_allowed`, `too_large`, `unsupported_media_type` or `key_reused`.
    kind: String,
}

/// A point that is served.
#[derive(ToSchema)]
#[schema(as = Serving)]
#[allow(dead_code)]
pub struct ServingSchema {
    #[schema(format = "uuid")]
    serve: String,
    #[schema(format = "uuid")]
    machine: String,
    #[schema(format = "uuid")]
    point: String,
    #[schema(format = "date-time")]
    time: String,
    writable: bool,
    disks: Vec<AttachedSchema>,
}

/// Where a disk can be opened.
#[derive(ToSchema)]
#[schema(as = Attached)]
#[allow(dead_code)]
pub struct AttachedSchema {
    #[schema(format = "uuid")]
    id: String,
    nbd: Option<String>,
    file: Option<String>,
    bytes: u64,
}

/// A policy with its name.
#[derive(ToSchema)]
#[schema(as = NamedPolicy)]
#[allow(dead_code)]
pub struct NamedPolicySchema {
    name: String,
    #[schema(inline)]
    #[serde(flatten)]
    settings: crate::model::Policy,
}

/// Some settings of a policy; others stay as they are.
#[derive(ToSchema)]
#[schema(as = PolicySettings)]
#[allow(dead_code)]
pub struct PolicySettingsSchema {
    frequency: Option<crate::model::Frequency>,
    any_time_seconds: Option<u64>,
    retention_seconds: Option<u64>,
    retention_count: Option<u64>,
    point_interval_seconds: Option<u64>,
    app_point_interval_seconds: Option<u64>,
    compression: Option<crate::model::CompressionSetting>,
    retention_grid: Option<Vec<crate::model::GridSetting>>,
    log_limit_bytes: Option<u64>,
    throttle_bytes_per_second: Option<u64>,
    throttle_schedule: Option<Vec<crate::model::ThrottleWindow>>,
    alarm_rpo_seconds: Option<u64>,
    alarm_log_percent: Option<u8>,
    alarm_missed_percent: Option<u8>,
    alarm_no_contact_seconds: Option<u64>,
    encryption: Option<crate::model::Encryption>,
}

/// The body of a new policy: its name, and the settings that differ from the default's.
#[derive(ToSchema)]
#[schema(as = CreatePolicy)]
#[allow(dead_code)]
pub struct CreatePolicySchema {
    name: String,
    #[schema(inline)]
    #[serde(flatten)]
    settings: PolicySettingsSchema,
}

/// How a machine is run where its replica is.
#[derive(ToSchema)]
#[schema(as = Description)]
#[allow(dead_code)]
pub struct DescriptionSchema {
    hardware: Option<HardwareSchema>,
    sign: Option<SignSchema>,
    sign_limit_seconds: Option<u64>,
    converted: Option<ConvertedSchema>,
}

/// What a machine's conversion to the other generation changed.
#[derive(ToSchema)]
#[schema(as = Converted)]
#[allow(dead_code)]
pub struct ConvertedSchema {
    /// As it was before.
    firmware: String,
    buses: Vec<String>,
    /// What the conversion made of the buses.
    became: Vec<String>,
}

/// The machine, whatever runs it.
#[derive(ToSchema)]
#[schema(as = Hardware)]
#[allow(dead_code)]
pub struct HardwareSchema {
    /// `bios` or `uefi`.
    firmware: Option<String>,
    processors: Option<u16>,
    memory_mib: Option<u64>,
    /// Of the disks in their order: `ide`, `sata`, `scsi`, `virtio` or `nvme`. Further disks take the last one's.
    buses: Option<Vec<String>>,
    cards: Option<Vec<CardSchema>>,
    kernel: Option<KernelSchema>,
}

/// What shows that it lives: `"agent"`, `{"port":{"port":22}}` or `{"console":{"text":"login:"}}`.
#[derive(ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = Sign)]
#[allow(dead_code)]
pub enum SignSchema {
    /// Its agent answers.
    Agent,
    /// A program behind this port answers, at once or after it was sent something.
    Port {
        port: u16,
        #[serde(default)]
        send: String,
    },
    /// It says this on its first serial line.
    Console { text: String },
}

/// A network card.
#[derive(ToSchema)]
#[schema(as = Card)]
#[allow(dead_code)]
pub struct CardSchema {
    network: NetworkSchema,
    /// `52:54:00:12:34:56`; absent: one that follows from the machine's id.
    mac: Option<String>,
    /// `virtio` or `e1000e`.
    model: Option<String>,
    /// `10.0.4.7/24`: what the isolated network's DHCP gives to the guest.
    addresses: Option<Vec<String>>,
}

/// `"isolated"` or `{"bridge":"br0"}`.
#[derive(ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = CardNetwork)]
#[allow(dead_code)]
pub enum NetworkSchema {
    Isolated,
    Bridge(String),
}

/// Started instead of what a disk's boot loader names.
#[derive(ToSchema)]
#[schema(as = Kernel)]
#[allow(dead_code)]
pub struct KernelSchema {
    image: String,
    initrd: Option<String>,
    command_line: Option<String>,
}

/// Nothing to say.
#[derive(ToSchema)]
#[schema(as = Empty)]
pub struct EmptySchema {}
