//! Recovery points: made at an instant of the host, kept at the process server.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tidemark_proto::control::{
    AgentCommand, Consistency, Failure, FailureKind, ImageFormat, MarkRequest, PointInfo, Reply, Selector,
    ServerCommand,
};

use crate::consumers::{self, HeldPoint};
use crate::core::{Core, QUICK, SETTLE, WHOLE_DISK};
use crate::hub::{PeerId, unexpected};
use crate::jobs::{Job, Progress};
use crate::kept;
use crate::machines::{listen_address, refuse_without_source};
use crate::model::{Machine, Wanted};
use crate::names::{bad_request, check_label, check_path};

/// How long a mark may take to become durable at the process server on every disk. Long: a slow link may have much to
/// send before it.
const POINT_LIMIT: Duration = Duration::from_secs(900);
/// How often it is looked at what keeps a point from being made.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

#[derive(Clone, Debug, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CreateRequest {
    pub app_consistent: bool,
    pub label: String,
}

#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExportRequest {
    /// Full path on the process server: a file, or a folder for machines of more than one disk.
    pub to: String,
    #[serde(default = "raw")]
    #[schema(value_type = String)]
    pub format: ImageFormat,
    /// Where the machine has several, the one that writes; absent: one that has the point.
    #[serde(default)]
    pub process_server: Option<String>,
}

fn raw() -> ImageFormat {
    ImageFormat::Raw
}

/// Makes a point now; the job ends when it is durable.
pub fn create(core: &Arc<Core>, name: &str, request: CreateRequest) -> Result<Job, Failure> {
    check_label(&request.label)?;
    let machine = core.machine(name)?;
    refuse_without_source(&machine)?;
    if machine.wanted == Wanted::Paused {
        return Err(Failure::new(
            FailureKind::Conflict,
            format!("machine {name:?} is paused: a point made now would not become durable"),
            "let it send again first: `tidemark resume NAME`",
        ));
    }
    let (core, name) = (core.clone(), name.to_owned());
    core.jobs.clone().start("point_create", Some(&name.clone()), |progress| async move {
        let machine = core.machine(&name)?;
        progress.step("mark the disks at the host");
        let consistency = if request.app_consistent { Consistency::App } else { Consistency::Crash };
        let mark = MarkRequest { machine: machine.id, consistency, label: request.label, keep: true };
        let mark = match core.agent(machine.host, &AgentCommand::Mark(mark), SETTLE).await? {
            Reply::Marked { mark, .. } => mark,
            other => return Err(unexpected(PeerId::Agent(machine.host), &other)),
        };
        let made = consumers::wait_point(&core, &machine, mark, POINT_LIMIT);
        let point = tokio::select! {
            made = made => made?,
            never = say_what_it_waits_for(&core, &machine, &progress) => match never {},
        };
        Ok(serde_json::to_value(point).expect("a point is plain data"))
    })
}

/// What is in the way of a point is said while it is waited for, not when the time is over.
async fn say_what_it_waits_for(core: &Core, machine: &Machine, progress: &Progress) -> Infallible {
    const STEP: &str = "wait until it is durable at the process server";
    progress.step(STEP);
    let mut said = String::new();
    let mut looks = tokio::time::interval(LOOK_AGAIN);
    // The first comes at once.
    looks.tick().await;
    loop {
        looks.tick().await;
        let problems = crate::status::reported(core, machine).problems;
        let Some(problem) = problems.iter().max_by_key(|problem| problem.critical) else { continue };
        // Its figures change all the time.
        let kind = crate::alerts::without_figures(&problem.message);
        if kind != said {
            progress.step(format!("{STEP}: {}", problem.message));
            said = kind;
        }
    }
}

pub async fn list(core: &Core, name: &str) -> Result<Vec<HeldPoint>, Failure> {
    consumers::points(core, &kept::machine(core, name)?).await
}

/// The point or position that `point` names.
pub async fn resolve(core: &Core, name: &str, point: &str) -> Result<PointInfo, Failure> {
    let point = selector(point)?;
    let machine = consumers::at(core, kept::machine(core, name)?, None, &point).await?;
    let command = ServerCommand::Resolve { machine: machine.id, point };
    point_of(core, &machine, &command, QUICK).await
}

/// Everywhere where it is, as far as one can be asked.
pub async fn lock(core: &Core, name: &str, point: &str, locked: bool) -> Result<PointInfo, Failure> {
    let point = selector(point)?;
    let machine = consumers::at(core, kept::machine(core, name)?, None, &point).await?;
    let command = ServerCommand::Lock { machine: machine.id, point, locked };
    let info = point_of(core, &machine, &command, QUICK).await?;
    let command = ServerCommand::Lock { machine: machine.id, point: Selector::Point(info.id), locked };
    for other in &machine.others {
        if let Err(failure) = point_of(core, &machine.clone().about(*other), &command, QUICK).await {
            tracing::info!(machine = name, process_server = %other, %failure, "a point is not locked or unlocked there");
        }
    }
    Ok(info)
}

pub fn verify(core: &Arc<Core>, name: &str, point: &str) -> Result<Job, Failure> {
    let machine = kept::machine(core, name)?;
    let point = selector(point)?;
    let core = core.clone();
    core.jobs.clone().start("point_verify", Some(name), |progress| async move {
        let machine = consumers::at(&core, machine, None, &point).await?;
        let command = ServerCommand::Verify { machine: machine.id, point };
        progress.step("check every byte that the point needs");
        let tell = |done, total| progress.done(done, total);
        match core.hub.server_telling(machine.server, &command, WHOLE_DISK, &tell).await? {
            Reply::Verified(verified) => Ok(serde_json::to_value(verified).expect("plain data")),
            other => Err(unexpected(PeerId::ProcessServer(machine.server), &other)),
        }
    })
}

pub fn export(core: &Arc<Core>, name: &str, point: &str, request: ExportRequest) -> Result<Job, Failure> {
    check_path(&request.to)?;
    let machine = kept::machine(core, name)?;
    let point = selector(point)?;
    let core = core.clone();
    core.jobs.clone().start("point_export", Some(name), |progress| async move {
        let machine = consumers::at(&core, machine, request.process_server.as_deref(), &point).await?;
        let command = ServerCommand::Export { machine: machine.id, point, to: request.to, format: request.format };
        progress.step("write the images");
        let tell = |done, total| progress.done(done, total);
        match core.hub.server_telling(machine.server, &command, WHOLE_DISK, &tell).await? {
            Reply::Exported(exported) => Ok(serde_json::to_value(exported).expect("plain data")),
            other => Err(unexpected(PeerId::ProcessServer(machine.server), &other)),
        }
    })
}

#[derive(Default, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ServeRequest {
    pub writable: bool,
    /// Where the process server serves the disks over TLS as well: IP:PORT.
    pub listen: Option<String>,
    /// Where the machine has several, the one that serves; absent: one that has the point.
    pub process_server: Option<String>,
}

/// Serves a point until it is stopped, or nobody renews it.
pub async fn serve(core: &Core, name: &str, point: &str, request: ServeRequest) -> Result<Value, Failure> {
    let machine = kept::machine(core, name)?;
    let listen = request.listen.as_deref();
    let listen = listen.map(|text| listen_address(text, "give IP:PORT; port 0 takes any")).transpose()?;
    let point = selector(point)?;
    let machine = consumers::at(core, machine, request.process_server.as_deref(), &point).await?;
    let command = ServerCommand::Serve { machine: machine.id, point, writable: request.writable, listen };
    match core.server(machine.server, &command, SETTLE).await? {
        Reply::Serving(serving) => {
            core.serves.add(serving.serve, machine.server, &core.clock);
            let lease = crate::serves::LEASE.as_secs();
            Ok(json!({
                "serve": serving.serve,
                "machine": machine.name,
                "point": serving.point,
                "time": serving.time,
                "writable": serving.writable,
                "lease_seconds": lease,
                "disks": serving.disks,
            }))
        }
        other => Err(unexpected(PeerId::ProcessServer(machine.server), &other)),
    }
}

pub fn selector(point: &str) -> Result<Selector, Failure> {
    point.parse().map_err(|error: tidemark_proto::control::SelectorError| {
        bad_request(
            error.to_string(),
            "name an id of `tidemark point list`, `latest`, `latest-app`, or a time such as 2026-11-21T10:04:05.250Z",
        )
    })
}

async fn point_of(
    core: &Core,
    machine: &Machine,
    command: &ServerCommand,
    limit: Duration,
) -> Result<PointInfo, Failure> {
    match core.server(machine.server, command, limit).await? {
        Reply::Point(point) => Ok(point),
        other => Err(unexpected(PeerId::ProcessServer(machine.server), &other)),
    }
}
