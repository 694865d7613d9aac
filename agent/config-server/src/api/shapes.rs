//! Shapes of answers that are put together from what several parts say: as [`super::schema`], for the document alone. A test holds
//! them to what is really sent.

use std::borrow::Cow;
use std::collections::BTreeMap;

use utoipa::openapi::schema::{AdditionalProperties, KnownFormat, ObjectBuilder, SchemaFormat, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::schema::DescriptionSchema;
use crate::failover::state::Kind;
use crate::plans::state::{MemberState, RunKind, RunState, StepState};

/// It answers.
#[derive(ToSchema)]
#[schema(as = Ready)]
#[allow(dead_code)]
pub struct ReadySchema {
    /// `ready`.
    status: String,
    version: String,
}

/// It works.
#[derive(ToSchema)]
#[schema(as = Works)]
#[allow(dead_code)]
pub struct HealthSchema {
    /// `ok`.
    status: String,
    version: String,
    #[schema(format = "date-time")]
    time: String,
}

/// A serve that goes on.
#[derive(ToSchema)]
#[schema(as = Lease)]
#[allow(dead_code)]
pub struct LeaseSchema {
    /// Renew it before so long.
    lease_seconds: u64,
}

/// How a machine is run where its replica is, and its test failovers.
#[derive(ToSchema)]
#[schema(as = MachineDescription)]
#[allow(dead_code)]
pub struct MachineDescriptionSchema {
    machine: String,
    description: Option<DescriptionSchema>,
    drills: Vec<DrillSchema>,
}

/// A test failover that runs, or may.
#[derive(ToSchema)]
#[schema(as = Drill)]
#[allow(dead_code)]
pub struct DrillSchema {
    #[schema(format = "uuid")]
    id: String,
    point: String,
    #[schema(format = "date-time")]
    began: String,
    /// The process server that it runs at.
    #[schema(format = "uuid")]
    server: Option<String>,
}

/// What was said of a machine, and what runs it.
#[derive(ToSchema)]
#[schema(as = DescribedMachine)]
#[allow(dead_code)]
pub struct DescribedMachineSchema {
    machine: String,
    description: DescriptionSchema,
    hypervisor: Option<HypervisorSchema>,
}

#[derive(ToSchema)]
#[serde(untagged)]
#[schema(as = Hypervisor)]
#[allow(dead_code)]
pub enum HypervisorSchema {
    Found(HypervisorFoundSchema),
    Missing(WhySchema),
}

/// What runs machines at a process server.
#[derive(ToSchema)]
#[schema(as = HypervisorFound)]
#[allow(dead_code)]
pub struct HypervisorFoundSchema {
    name: String,
    version: String,
    /// `kvm`, `tcg`, or what the hypervisor says.
    accelerator: String,
    /// Why it is not the fastest.
    why: Option<String>,
}

/// Why something is not known, or not there.
#[derive(ToSchema)]
#[schema(as = Why)]
#[allow(dead_code)]
pub struct WhySchema {
    error: String,
    help: String,
}

/// How a machine that failed over does.
#[derive(ToSchema)]
#[schema(as = FailoverShown)]
#[allow(dead_code)]
pub struct FailoverShownSchema {
    machine: String,
    failover: FailoverSchema,
    /// As whoever runs it says.
    running: Option<RunningSchema>,
    /// Why that is not known.
    unknown: Option<WhySchema>,
    /// The way home, once somebody asked for it.
    home: Option<HomeSchema>,
}

/// What is noted of a failover.
#[derive(ToSchema)]
#[schema(as = Failover)]
#[allow(dead_code)]
pub struct FailoverSchema {
    #[schema(format = "uuid")]
    id: String,
    kind: Kind,
    /// `draining`, `starting`, `failed_over`, `changing_point`, `cancelling`, `committed`, `reprotecting`, `reprotected`, `withdrawing`,
    /// `failing_back`, `failed_back` or `landing`.
    phase: String,
    /// Nobody but a person starts the machine.
    disks_only: bool,
    #[schema(format = "date-time")]
    began: String,
    /// Where it runs from; none until it does.
    #[schema(format = "uuid")]
    point: Option<String>,
    #[schema(format = "date-time")]
    time: Option<String>,
    lost: Option<LossSchema>,
    /// Its machine was on at the source, and was shut down for it.
    #[serde(default)]
    source_stopped: bool,
    home: Option<HomeNoteSchema>,
}

/// What a failover costs.
#[derive(ToSchema)]
#[schema(as = Loss)]
#[allow(dead_code)]
pub struct LossSchema {
    seconds: f64,
    bytes: u64,
    /// When the source was last heard of; absent: it is heard.
    #[schema(format = "date-time")]
    source_last_seen: Option<String>,
}

/// What is noted of a way home.
#[derive(ToSchema)]
#[schema(as = HomeNote)]
#[allow(dead_code)]
pub struct HomeNoteSchema {
    /// `delta`, `compare` or `full`.
    method: String,
    #[schema(format = "date-time")]
    began: String,
    /// What only home has is still to be sent.
    keeps: bool,
    /// The point that it became.
    #[schema(format = "uuid")]
    kept: Option<String>,
    #[serde(default)]
    taken: bool,
    from: Option<PlaceSchema>,
}

/// Where a machine's disks are, in their order.
#[derive(ToSchema)]
#[schema(as = Place)]
#[allow(dead_code)]
pub struct PlaceSchema {
    #[schema(format = "uuid")]
    host: String,
    paths: Vec<String>,
}

/// How a machine runs where its replica is.
#[derive(ToSchema)]
#[schema(as = Running)]
#[allow(dead_code)]
pub struct RunningSchema {
    #[schema(format = "uuid")]
    point: String,
    #[schema(format = "date-time")]
    time: String,
    disks: Vec<RunningDiskSchema>,
    hypervisor: String,
    /// `on`, `paused`, `off` or `unknown`.
    power: String,
    first_instruction_seconds: Option<f64>,
    committed: bool,
    /// It is off, on its way home.
    stopped: bool,
    /// `no`, `running`, `filled` or `plain`.
    promotion: String,
    done_bytes: u64,
    total_bytes: u64,
    problem: Option<String>,
}

/// A disk of a machine that failed over.
#[derive(ToSchema)]
#[schema(as = RunningDisk)]
#[allow(dead_code)]
pub struct RunningDiskSchema {
    #[schema(format = "uuid")]
    id: String,
    /// Where it can be opened until the machine has its plain disks.
    nbd: Option<String>,
    /// The plain disk, whole once the promotion says so.
    plain: String,
}

#[derive(ToSchema)]
#[serde(untagged)]
#[schema(as = Home)]
#[allow(dead_code)]
pub enum HomeSchema {
    Known(HomeReportSchema),
    Unknown(WhySchema),
}

/// How far home is.
#[derive(ToSchema)]
#[schema(as = HomeReport)]
#[allow(dead_code)]
pub struct HomeReportSchema {
    /// `idle`, `syncing`, `consistent`, `finished`, `undoing` or `undone`.
    stage: String,
    #[schema(format = "uuid")]
    failover: Option<String>,
    /// Whose content is durable on the home disks.
    rounds: u64,
    done_bytes: u64,
    total_bytes: u64,
    compared_bytes: u64,
    /// Before compression.
    received_bytes: u64,
    /// As it came.
    wire_bytes: u64,
    #[schema(format = "date-time")]
    consistent_at: Option<String>,
    behind_bytes: u64,
    /// What the home disks had, of what was overwritten.
    kept_bytes: u64,
    problem: Option<String>,
    help: Option<String>,
    obstacles: Vec<ObstacleSchema>,
}

#[derive(ToSchema)]
#[schema(as = Obstacle)]
#[allow(dead_code)]
pub struct ObstacleSchema {
    #[schema(format = "uuid")]
    disk: Option<String>,
    message: String,
    help: String,
}

/// How the last run of a plan went.
#[derive(ToSchema)]
#[schema(as = PlanReport)]
#[allow(dead_code)]
pub struct PlanReportSchema {
    plan: String,
    #[schema(format = "uuid")]
    run: String,
    kind: RunKind,
    state: RunState,
    point: String,
    #[schema(format = "date-time")]
    began: String,
    #[schema(format = "date-time")]
    ended: Option<String>,
    seconds: Option<f64>,
    machines: Vec<PlanReportMachineSchema>,
    steps: Vec<PlanReportStepSchema>,
}

#[derive(ToSchema)]
#[schema(as = PlanReportMachine)]
#[allow(dead_code)]
pub struct PlanReportMachineSchema {
    /// Counts from 1.
    step: u64,
    machine: String,
    state: MemberState,
    #[schema(format = "uuid")]
    job: Option<String>,
    point: Option<String>,
    time: Option<String>,
    lost_seconds: Option<f64>,
    lost_bytes: Option<u64>,
    rto_seconds: Option<f64>,
    own_seconds: Option<f64>,
    reason: Option<String>,
}

#[derive(ToSchema)]
#[schema(as = PlanReportStep)]
#[allow(dead_code)]
pub struct PlanReportStepSchema {
    /// Counts from 1.
    step: u64,
    action: String,
    state: StepState,
    seconds: Option<f64>,
    reason: Option<String>,
    /// The end of what a script said.
    output: Option<String>,
}

/// Who connected, ever and now. `/hosts` and `/process-servers` say more.
#[derive(ToSchema)]
#[schema(as = Peers)]
#[allow(dead_code)]
pub struct PeersSchema {
    connected: Vec<ConnectedSchema>,
    /// By their ids.
    hosts: BTreeMap<String, KnownHostSchema>,
    /// By their ids.
    process_servers: BTreeMap<String, KnownServerSchema>,
}

#[derive(ToSchema)]
#[schema(as = ConnectedPeer)]
#[allow(dead_code)]
pub struct ConnectedSchema {
    /// `agent` or `process server`.
    role: String,
    #[schema(format = "uuid")]
    id: String,
    name: String,
}

#[derive(ToSchema)]
#[schema(as = KnownHost)]
#[allow(dead_code)]
pub struct KnownHostSchema {
    name: String,
    /// When it connected last.
    #[schema(format = "date-time")]
    last_seen: String,
}

#[derive(ToSchema)]
#[schema(as = KnownProcessServer)]
#[allow(dead_code)]
pub struct KnownServerSchema {
    name: String,
    address: String,
    /// When it connected last.
    #[schema(format = "date-time")]
    last_seen: String,
}

/// How far a registration is: `waiting` with `registration`, or `issued` with `identity` and `certificate`.
#[derive(ToSchema)]
#[schema(as = RegisterAnswer)]
#[allow(dead_code)]
pub struct RegisterAnswerSchema {
    /// `waiting`: an operator must approve, ask again with the same request; `issued`.
    state: String,
    registration: Option<String>,
    /// The URI in the certificate.
    identity: Option<String>,
    /// X.509, DER, in hex.
    certificate: Option<String>,
    /// Where the control stream is dialled, on the host that answered.
    control_port: u16,
}

/// What a job was for.
pub struct JobResultSchema;

impl PartialSchema for JobResultSchema {
    fn schema() -> RefOr<Schema> {
        let text = |format: Option<KnownFormat>| {
            let format = format.map(SchemaFormat::KnownFormat);
            ObjectBuilder::new().schema_type(Type::String).format(format)
        };
        ObjectBuilder::new()
            .description(Some(
                "What a job was for; which of these are there depends on its kind, and so do further ones.",
            ))
            .property("machine", text(None))
            .property("plan", text(None))
            .property("id", text(None).description(Some("Of a point, a backup or a replica.")))
            .property("point", text(None).description(Some("Its id; of a plan, as it was asked for.")))
            .property("time", text(Some(KnownFormat::DateTime)))
            .additional_properties(Some(AdditionalProperties::<Schema>::FreeForm(true)))
            .into()
    }
}

impl ToSchema for JobResultSchema {
    fn name() -> Cow<'static, str> {
        "JobResult".into()
    }
}

/// The document of the API.
pub struct DocumentSchema;

impl PartialSchema for DocumentSchema {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .description(Some("OpenAPI 3.1, https://spec.openapis.org/oas/v3.1.0"))
            .property("openapi", ObjectBuilder::new().schema_type(Type::String))
            .required("openapi")
            .additional_properties(Some(AdditionalProperties::<Schema>::FreeForm(true)))
            .into()
    }
}

impl ToSchema for DocumentSchema {
    fn name() -> Cow<'static, str> {
        "Document".into()
    }
}
