//! What can be asked.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse;
use axum::routing::get;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use tidemark_base::Clock;
use tidemark_base::words::in_words;
use tidemark_proto::control::{Failure, FailureKind, ServeId, Severity};
use utoipa::ToSchema;
use utoipa::openapi::schema::Type;
use uuid::Uuid;

use super::access::Caller;
use super::accounts::{
    self, ControlPort, RegistrationInfo, RevokeBody, RoleBody, TokenInfo, TokenRequest, UserBody, UserInfo,
};
use super::operations::{Operation, Operations};
use super::schema::{
    CreatePolicySchema, DescriptionSchema, EmptySchema, HeldPointSchema, NamedPolicySchema, PointSchema,
    PolicySettingsSchema, ServingSchema,
};
use super::shapes::{
    DescribedMachineSchema, DocumentSchema, FailoverShownSchema, HealthSchema, LeaseSchema, MachineDescriptionSchema,
    PeersSchema, PlanReportSchema, ReadySchema, RegisterAnswerSchema,
};
use super::{Access, Answer, ApiError, accepted, events, ok, versioned};
use crate::backup::{self, BackupInfo};
use crate::core::Core;
use crate::deliver::ShownChannel;
use crate::failover::state::Kind;
use crate::groups::{CreateGroup, GroupSettings, ShownGroup};
use crate::hub::{PeerId, kind};
use crate::identity::{IdentityInfo, PassphraseInfo, PassphraseRequest, RegisterRequest};
use crate::jobs::{Job, JobState};
use crate::kept::{self, KeptReplica};
use crate::machines::ProtectRequest;
use crate::model::UserRole;
use crate::names::{Expected, bad_request};
use crate::plans::{CreatePlan, ShownPlan};
use crate::status::MachineStatus;
use crate::{
    console, consumers, deliver, disks, failover, groups, history, machines, plans, points, policies, serves, status,
};

type App = State<Arc<Core>>;
type Who = axum::Extension<Caller>;

/// The longest that a poll waits.
const POLL_MAX: Duration = Duration::from_secs(60);

use UserRole::{Administrator, Operator, Reader};

pub fn router(core: Arc<Core>, access: Access, control_port: u16) -> Router {
    let mut api = Operations::new(core.clone(), access);
    let ready = Operation::public("Whether requests can be answered").answers::<ReadySchema>();
    api.get("/ready", ready_answer, ready);
    api.get("/health", health, Operation::new(Reader, "Whether the server works").answers::<HealthSchema>());

    let list = Operation::new(Reader, "All machines and how they do").answers_list::<MachineStatus>();
    api.get("/machines", list_machines, list);
    let one = Operation::new(Operator, "Protects a machine").takes::<ProtectRequest>().starts_job();
    api.post("/machines", protect, one);
    let one = Operation::new(Reader, "A machine and how it does").answers::<MachineStatus>();
    api.get("/machines/{name}", show_machine, one);
    let one = Operation::new(Operator, "Ends the protection of a machine").starts_job().query(
        "delete_replica",
        Type::Boolean,
        "Whether its replica and points go as well.",
    );
    let one = one.query("force", Type::Boolean, "Whether locked and served points go as well.").takes_if_match();
    api.delete("/machines/{name}", unprotect, one);
    let job = |summary| Operation::new(Operator, summary).starts_job();
    api.post("/machines/{name}/disks", add_disks, job("Adds disks to a machine").takes::<disks::AddRequest>());
    api.delete("/machines/{name}/disks/{disk}", remove_disk, job("Takes a disk, by its id or path, out of a machine"));
    let one = job("Feeds process servers besides those that are fed").takes::<consumers::AddRequest>();
    api.post("/machines/{name}/process-servers", add_process_servers, one);
    let one = job("Feeds one of several process servers, by its name or id, no longer");
    let one =
        one.query("delete_replica", Type::Boolean, "Whether the replica that it has, and its points, go as well.");
    let one = one.query("force", Type::Boolean, "Whether locked and served points go as well.");
    api.delete("/machines/{name}/process-servers/{server}", remove_process_server, one);
    api.post("/machines/{name}/resize", resize_disks, job("Takes over disks that grew"));
    api.post("/machines/{name}/pause", pause, job("Sends nothing for now"));
    api.post("/machines/{name}/resume", resume, job("Sends again"));
    api.post("/machines/{name}/resync", resync, job("Compares every block with the replica"));
    api.delete("/machines/{name}/resync", cancel_resync, job("Ends a compare that was asked for"));
    let list =
        Operation::new(Reader, "Replicas of machines that are not protected any more").answers_list::<KeptReplica>();
    api.get("/replicas", list_replicas, list);
    let one = Operation::new(Operator, "Deletes such a replica").starts_job();
    let one = one.query("force", Type::Boolean, "Whether locked and served points go as well.");
    api.delete("/replicas/{id}", delete_replica, one);
    let list = Operation::new(Reader, "The recovery points of a machine").answers_list::<HeldPointSchema>();
    api.get("/machines/{name}/points", list_points, list);
    let one = job("Makes a recovery point").takes::<points::CreateRequest>();
    api.post("/machines/{name}/points", create_point, one);
    let point = |role, summary| Operation::new(role, summary).answers::<PointSchema>();
    api.get("/machines/{name}/points/{point}", show_point, point(Reader, "A recovery point"));
    api.put("/machines/{name}/points/{point}/lock", lock, point(Operator, "Keeps a point whatever its age"));
    api.delete("/machines/{name}/points/{point}/lock", unlock, point(Operator, "Lets a point expire"));
    api.post("/machines/{name}/points/{point}/verify", verify, job("Checks every byte that a point needs"));
    let one = job("Writes a point as plain disk images").takes::<points::ExportRequest>();
    api.post("/machines/{name}/points/{point}/export", export, one);
    let one = Operation::new(Operator, "Serves a point's disks; renew it within its lease");
    let one = one.takes::<points::ServeRequest>().answers::<ServingSchema>();
    api.post("/machines/{name}/points/{point}/serve", serve, one);
    let one = Operation::new(Operator, "Renews the lease of a serve").answers::<LeaseSchema>();
    api.post("/serves/{id}/renew", renew_serve, one);
    let one = Operation::new(Operator, "Stops a serve").answers::<EmptySchema>();
    api.delete("/serves/{id}", stop_serve, one);

    let one = Operation::new(Reader, "How a machine is run where its replica is");
    api.get("/machines/{name}/description", show_description, one.answers::<MachineDescriptionSchema>());
    let one = Operation::new(Operator, "Says how a machine is run where its replica is").takes::<DescriptionSchema>();
    api.put("/machines/{name}/description", set_description, one.answers::<DescribedMachineSchema>());
    let one = job("Boots a point in isolation").takes::<failover::drill::TestRequest>();
    api.post("/machines/{name}/failover/test", failover_test, one);
    api.post("/machines/{name}/failover/cleanup", failover_cleanup, job("Ends the test failovers of a machine"));
    let one = Operation::new(Reader, "How a machine that failed over does").answers::<FailoverShownSchema>();
    api.get("/machines/{name}/failover", failover_show, one);
    let start = |summary| job(summary).takes::<failover::start::StartRequest>();
    let one = start("Stops the source, sends its last changes, and runs it where its replica is");
    api.post("/machines/{name}/failover/planned", failover_planned, one);
    let one = start("Runs a machine from a point, where its replica is");
    api.post("/machines/{name}/failover/unplanned", failover_unplanned, one);
    let one = job("Runs it from another point").takes::<failover::after::ChangePointRequest>();
    api.post("/machines/{name}/failover/change-point", failover_change_point, one);
    api.post("/machines/{name}/failover/cancel", failover_cancel, job("Lets the source go on"));
    api.post("/machines/{name}/failover/commit", failover_commit, job("Accepts the point that it failed over to"));
    let one = job("Gives it plain disks while it runs").takes::<failover::after::PromoteRequest>();
    api.post("/machines/{name}/failover/promote", failover_promote, one);
    let one = job("Brings the home disks of a committed machine to its state, and keeps them there");
    let one = one.takes::<failover::reprotect::ReprotectRequest>();
    api.post("/machines/{name}/reprotect", reprotect, one);
    let one = job("Gives the home disks back what they had");
    api.post("/machines/{name}/reprotect/cancel", reprotect_cancel, one);
    let one = job("Takes a reprotected machine home").takes::<failover::failback::FailbackRequest>();
    api.post("/machines/{name}/failback", failback, one);
    let one = job("Shuts it down there, brings the last changes, and hands it to its home");
    let one = one.takes::<failover::failback::CompleteRequest>();
    api.post("/machines/{name}/failback/complete", failback_complete, one);
    api.post("/machines/{name}/failback/cancel", failback_cancel, job("It goes on where it ran"));
    let one = job("Completes a migration: it stays there, and is not protected any more");
    api.post("/machines/{name}/migrate", migrate, one);

    let list = Operation::new(Reader, "All policies").answers_list::<NamedPolicySchema>();
    api.get("/policies", list_policies, list);
    let policy = |role, summary| Operation::new(role, summary).answers::<NamedPolicySchema>();
    api.post("/policies", create_policy, policy(Operator, "Creates a policy").takes::<CreatePolicySchema>());
    api.get("/policies/{name}", show_policy, policy(Reader, "A policy"));
    let one = policy(Operator, "Changes settings of a policy").takes::<PolicySettingsSchema>().takes_if_match();
    api.patch("/policies/{name}", set_policy, one);
    let one = Operation::new(Operator, "Deletes a policy that no machine has").answers::<EmptySchema>();
    api.delete("/policies/{name}", delete_policy, one.takes_if_match());

    let list = Operation::new(Reader, "All groups with their machines").answers_list::<ShownGroup>();
    api.get("/groups", list_groups, list);
    let group = |role, summary| Operation::new(role, summary).answers::<ShownGroup>();
    api.post("/groups", create_group, group(Operator, "Makes a group").takes::<CreateGroup>());
    api.get("/groups/{name}", show_group, group(Reader, "A group"));
    let one = Operation::new(Operator, "Deletes a group; its machines stay").answers::<EmptySchema>();
    api.delete("/groups/{name}", delete_group, one.takes_if_match());
    let one = group(Operator, "Changes settings of a group").takes::<GroupSettings>();
    api.patch("/groups/{name}", set_group, one.takes_if_match());
    let list = Operation::new(Reader, "The points that all machines of a group have, at one instant, oldest first");
    api.get("/groups/{name}/points", list_group_points, list.answers_list::<groups::points::GroupPoint>());
    let one = job("Makes a point of all machines of a group at one instant").takes::<groups::points::CreatePoint>();
    api.post("/groups/{name}/points", create_group_point, one);
    let path = "/groups/{name}/machines/{machine}";
    api.put(path, add_to_group, group(Operator, "Puts a machine into a group"));
    api.delete(path, remove_from_group, group(Operator, "Takes a machine out of a group"));

    let list = Operation::new(Reader, "All recovery plans").answers_list::<ShownPlan>();
    api.get("/plans", list_plans, list);
    let plan = |role, summary| Operation::new(role, summary).answers::<ShownPlan>();
    api.post("/plans", create_plan, plan(Operator, "Makes a recovery plan").takes::<CreatePlan>());
    api.get("/plans/{name}", show_plan, plan(Reader, "A recovery plan and its last run"));
    let one = plan(Operator, "Gives a recovery plan other steps").takes::<PlanSteps>();
    api.put("/plans/{name}", set_plan, one.takes_if_match());
    let one = Operation::new(Operator, "Deletes a recovery plan; its machines stay").answers::<EmptySchema>();
    api.delete("/plans/{name}", delete_plan, one.takes_if_match());
    let one = job("Runs a recovery plan, or says what that would do").takes::<plans::run::RunRequest>();
    api.post("/plans/{name}/run", run_plan, one);
    let one =
        job("Tests every machine of a recovery plan in isolation, and cleans up").takes::<plans::run::RunRequest>();
    api.post("/plans/{name}/test", test_plan, one);
    api.post("/plans/{name}/continue", continue_plan, job("Goes on with a run that stopped in the middle"));
    api.post("/plans/{name}/cancel", cancel_plan, job("Takes a run back: its machines go on at their sources"));
    api.post("/plans/{name}/commit", commit_plan, job("Accepts the points that all machines failed over to"));
    let one = plan(Operator, "Says that a manual step is done");
    api.post("/plans/{name}/confirm", confirm_plan, one);
    let one = Operation::new(Reader, "How the last run of a plan went, with the RTO of each machine");
    api.get("/plans/{name}/report", report_plan, one.answers::<PlanReportSchema>());

    let channel = |summary| Operation::new(Administrator, summary).answers::<ShownChannel>();
    let list = Operation::new(Administrator, "Where alerts are told").answers_list::<ShownChannel>();
    api.get("/channels", list_channels, list);
    let one = channel("Makes a channel that alerts are told to").takes::<CreateChannel>();
    api.post("/channels", create_channel, one);
    api.get("/channels/{name}", show_channel, channel("A channel and how it does"));
    let one = Operation::new(Administrator, "Deletes a channel").answers::<EmptySchema>();
    api.delete("/channels/{name}", delete_channel, one.takes_if_match());
    let one = Operation::new(Administrator, "Tells a channel something now, once").answers::<EmptySchema>();
    api.post("/channels/{name}/test", test_channel, one);

    let list = Operation::new(Reader, "Jobs, the newest first").query("machine", Type::String, "Of this machine only.");
    let list =
        list.query("state", Type::String, "In this state only: `running`, `succeeded`, `failed` or `cancelled`.");
    let list = list.query("limit", Type::Integer, "The newest so many.");
    api.get("/jobs", list_jobs, list.answers_list::<Job>());
    let one = Operation::new(Reader, "Jobs as they change, as server-sent events").answers_plain("text/event-stream");
    api.get("/jobs/stream", events::follow_jobs, one);
    let one = Operation::new(Reader, "A job").answers::<Job>();
    let one = one.query("version", Type::Integer, "Waits until the job differs from it.");
    let one = one.query("wait_seconds", Type::Integer, "How long, at most a minute.");
    api.get("/jobs/{id}", show_job, one);
    let one = Operation::new(Operator, "Cancels a job that waits or reads").status(202).answers::<Job>();
    api.post("/jobs/{id}/cancel", cancel_job, one);
    let one = Operation::new(Reader, "Hosts and process servers that connected").answers::<PeersSchema>();
    api.get("/peers", list_peers, one);
    super::inventory::declare(&mut api);

    let list = Operation::new(Reader, "Events, oldest first").answers_list::<history::Stored>();
    let list = list.query("after", Type::Integer, "Only later ones than this id; without it, the newest.");
    let epoch = "The epoch of the event with that id: where the configuration was restored since, those of after the restore follow.";
    let list = list.query("epoch", Type::Integer, epoch);
    let list = list.query("limit", Type::Integer, "At most so many, up to 1000.");
    let list = list.query("machine", Type::String, "Of this machine only.");
    let list = list.query("severity", Type::String, "`info`, `warning` or `critical`, and worse.");
    let list = list.query("wait_seconds", Type::Integer, "With `after`: waits so long for one, at most a minute.");
    api.get("/events", events::list, list);
    let one = Operation::new(Reader, "Events as they happen, as server-sent events").answers_plain("text/event-stream");
    let one = one.query("after", Type::Integer, "Begins after this id; so does the header `Last-Event-ID`.");
    let one = one.query("epoch", Type::Integer, epoch);
    api.get("/events/stream", events::follow, one);
    let list = Operation::new(Reader, "What lasts and needs someone, the worst first");
    api.get("/alerts", events::alerts, list.answers_list::<events::ListedAlert>());
    let one = Operation::new(Reader, "Figures as Prometheus reads them").answers_plain("application/openmetrics-text");
    api.get("/metrics", metrics_text, one);

    let admin = |summary| Operation::new(Administrator, summary);
    api.get("/users", accounts::list_users, admin("Users of the API").answers_list::<UserInfo>());
    api.post("/users", accounts::create_user, admin("Makes a user").takes::<UserBody>().answers::<UserBody>());
    api.put("/users/{name}", accounts::set_user, admin("Sets a user's role").takes::<RoleBody>().answers::<UserBody>());
    api.delete(
        "/users/{name}",
        accounts::delete_user,
        admin("Deletes a user with its tokens").answers::<EmptySchema>(),
    );
    api.get("/tokens", accounts::list_tokens, admin("Tokens, without their text").answers_list::<TokenInfo>());
    let one = admin("Makes a token, shown this once").takes::<TokenRequest>().answers::<TokenInfo>();
    api.post("/tokens", accounts::create_token, one);
    api.delete("/tokens/{id}", accounts::delete_token, admin("Deletes a token").answers::<EmptySchema>());
    let one = admin("Writes another token into the file of the first set-up; the one before is refused at once");
    api.post("/token-file/rotate", accounts::rotate_token_file, one.answers::<EmptySchema>());
    let list = admin("Backups of the configuration, the newest first").answers_list::<BackupInfo>();
    api.get("/backups", list_backups, list);
    api.post("/backups", create_backup, admin("Backs up the configuration now").starts_job());
    let one = admin("A backup's file, sealed for the recovery key").answers_plain("application/octet-stream");
    api.get("/backups/{id}", show_backup, one);
    let list = admin("Passphrases, without their text").answers_list::<PassphraseInfo>();
    api.get("/passphrases", accounts::list_passphrases, list);
    let one = admin("Makes a passphrase, shown this once").takes::<PassphraseRequest>().answers::<PassphraseInfo>();
    api.post("/passphrases", accounts::create_passphrase, one);
    let one = admin("Deletes a passphrase").answers::<EmptySchema>();
    api.delete("/passphrases/{id}", accounts::delete_passphrase, one);
    let list = Operation::new(Operator, "Process servers that wait for approval").answers_list::<RegistrationInfo>();
    api.get("/registrations", accounts::list_registrations, list);
    let one = Operation::new(Operator, "Approves a registration").answers::<RegistrationInfo>();
    api.post("/registrations/{id}/approve", accounts::approve, one);
    let one = Operation::new(Operator, "Rejects a registration").answers::<RegistrationInfo>();
    api.post("/registrations/{id}/reject", accounts::reject, one);
    let list = admin("Who has certificates").answers_list::<IdentityInfo>();
    api.get("/identities", accounts::list_identities, list);
    let one = admin("Refuses an identity from now on").takes::<RevokeBody>().answers::<IdentityInfo>();
    api.post("/identities/{id}/revoke", accounts::revoke, one);
    let one = admin("Takes an identity again").answers::<IdentityInfo>();
    api.post("/identities/{id}/restore", accounts::restore, one);
    let one = Operation::public("Registers a host or process server, by its passphrase").takes::<RegisterRequest>();
    api.post("/register", accounts::register, one.answers::<RegisterAnswerSchema>().or_status(202));

    let described = Operation::public("This document").answers::<DocumentSchema>();
    let text = Arc::new(std::sync::OnceLock::<String>::new());
    let shown = text.clone();
    let describe = move || async move {
        let text = shown.get().cloned().unwrap_or_default();
        ([(axum::http::header::CONTENT_TYPE, "application/json")], text)
    };
    api.get("/openapi.json", describe, described);
    let _ = text.set(api.document().to_json().unwrap_or_default());
    let api = api
        .into_router(|router| router.fallback(nothing_there).method_not_allowed_fallback(wrong_method))
        .layer(axum::Extension(ControlPort(control_port)));
    // Without a token: for whoever asks only whether it runs.
    let alive = get(|| async { axum::Json(json!({ "status": "ok" })) });
    let ready = get(ready_answer).with_state(core);
    Router::new()
        .route("/", get(console::page))
        .route("/health", alive)
        .route("/ready", ready)
        .nest("/api/v1", api)
        .fallback(nothing_there)
        .layer(axum::middleware::from_fn(super::refusals::as_json))
        .layer(axum::middleware::from_fn(super::rest::take_rest))
}

async fn metrics_text(State(core): App) -> Answer {
    let text = super::metrics::text(&core).map_err(|error| {
        Failure::new(FailureKind::Failed, format!("the figures cannot be written: {error}"), "see the log")
    })?;
    let of = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(axum::http::header::CONTENT_TYPE, of)], text).into_response())
}

/// What `If-Match` says.
fn expected(headers: &HeaderMap) -> Result<Expected, Failure> {
    let mut lines = headers.get_all(axum::http::header::IF_MATCH).iter().peekable();
    if lines.peek().is_none() {
        return Ok(Expected::Any);
    }
    let text = lines.map(|line| line.to_str().unwrap_or("?")).collect::<Vec<_>>().join(",");
    if text.trim() == "*" {
        return Ok(Expected::Any);
    }
    tags(&text).map(Expected::OneOf).ok_or_else(|| {
        bad_request("the If-Match header is no list of tags", "send the ETag of the last answer as it was, or `*`")
    })
}

/// The revisions in a list of entity tags (RFC 9110, 8.8.3 and 13.1.1): weak ones match nothing here, nor do those that
/// this API never made. `None`: it is no such list.
fn tags(text: &str) -> Option<Vec<u64>> {
    let (mut rest, mut revisions) = (text.trim(), Vec::new());
    loop {
        // Empty elements of a list are passed over.
        rest = rest.trim_start_matches([',', ' ', '\t']);
        if rest.is_empty() {
            return Some(revisions);
        }
        let (is_weak, opaque) = match rest.strip_prefix("W/") {
            Some(opaque) => (true, opaque),
            None => (false, rest),
        };
        let (tag, after) = opaque.strip_prefix('"')?.split_once('"')?;
        if !is_weak && let Ok(revision) = tag.parse() {
            revisions.push(revision);
        }
        rest = after.trim_start();
        if !rest.is_empty() && !rest.starts_with(',') {
            return None;
        }
    }
}

async fn nothing_there() -> Answer {
    Err(Failure::new(FailureKind::NotFound, "there is nothing at this address", "the API is at /api/v1").into())
}

async fn wrong_method() -> axum::response::Response {
    let help = "the document of the API, /api/v1/openapi.json, says which it takes";
    super::refusals::refusal(StatusCode::METHOD_NOT_ALLOWED, "this address does not take that method", help)
}

// ---- backups

async fn list_backups(State(core): App) -> Answer {
    ok(super::blocking(move || core.backups.list()).await?)
}

async fn create_backup(State(core): App) -> Answer {
    accepted(backup::start(&core)?)
}

async fn show_backup(State(core): App, Path(id): Path<String>) -> Answer {
    let sealed = super::blocking(move || core.backups.read(&id)).await?;
    Ok(([(axum::http::header::CONTENT_TYPE, "application/octet-stream")], sealed).into_response())
}

/// Whether the database answers.
async fn ready_answer(State(core): App) -> Answer {
    let asked = core.clone();
    if let Err(error) = super::blocking(move || asked.is_ready()).await {
        // Whatever is wrong: not now.
        return Err(ApiError {
            failure: Failure { kind: FailureKind::Unavailable, ..error.failure },
            retry_after: None,
        });
    }
    ok(json!({ "status": "ready", "version": env!("CARGO_PKG_VERSION") }))
}

async fn health(State(core): App) -> Answer {
    ok(json!({ "status": "ok", "version": env!("CARGO_PKG_VERSION"), "time": core.clock.wall_now() }))
}

// ---- machines

async fn list_machines(State(core): App) -> Answer {
    ok(status::all(&core).await)
}

async fn show_machine(State(core): App, Path(name): Path<String>) -> Answer {
    versioned(status::of(&core, &name).await?, core.store.revision("machines", &name))
}

async fn protect(State(core): App, body: Bytes) -> Answer {
    accepted(machines::protect(&core, parse(&body)?)?)
}

#[derive(Deserialize)]
struct UnprotectQuery {
    #[serde(default)]
    delete_replica: bool,
    #[serde(default)]
    force: bool,
}

async fn unprotect(
    State(core): App,
    Path(name): Path<String>,
    query: Query<UnprotectQuery>,
    headers: HeaderMap,
) -> Answer {
    expected(&headers)?.check(&core.store.state(), "machines", &name)?;
    accepted(machines::unprotect(&core, &name, query.delete_replica, query.force)?)
}

#[derive(Deserialize)]
struct ForceQuery {
    #[serde(default)]
    force: bool,
}

async fn list_replicas(State(core): App) -> Answer {
    ok(kept::list(&core))
}

async fn delete_replica(State(core): App, Path(id): Path<String>, query: Query<ForceQuery>) -> Answer {
    accepted(kept::delete(&core, &id, query.force)?)
}

async fn add_disks(State(core): App, Path(name): Path<String>, body: Bytes) -> Answer {
    accepted(disks::add(&core, &name, parse(&body)?)?)
}

async fn remove_disk(State(core): App, Path((name, disk)): Path<(String, String)>) -> Answer {
    accepted(disks::remove(&core, &name, &disk)?)
}

async fn add_process_servers(State(core): App, Path(name): Path<String>, body: Bytes) -> Answer {
    accepted(consumers::add(&core, &name, parse(&body)?)?)
}

async fn remove_process_server(
    State(core): App,
    Path((name, server)): Path<(String, String)>,
    query: Query<UnprotectQuery>,
) -> Answer {
    accepted(consumers::remove(&core, &name, &server, query.delete_replica, query.force)?)
}

async fn resize_disks(State(core): App, Path(name): Path<String>) -> Answer {
    accepted(disks::resize(&core, &name)?)
}

async fn pause(State(core): App, Path(name): Path<String>) -> Answer {
    accepted(machines::pause_or_resume(&core, &name, true)?)
}

async fn resume(State(core): App, Path(name): Path<String>) -> Answer {
    accepted(machines::pause_or_resume(&core, &name, false)?)
}

async fn resync(State(core): App, Path(name): Path<String>) -> Answer {
    accepted(machines::resync(&core, &name)?)
}

async fn cancel_resync(State(core): App, Path(name): Path<String>) -> Answer {
    accepted(machines::cancel_resync(&core, &name)?)
}

// ---- points

async fn list_points(State(core): App, Path(name): Path<String>) -> Answer {
    ok(points::list(&core, &name).await?)
}

async fn create_point(State(core): App, Path(name): Path<String>, body: Bytes) -> Answer {
    accepted(points::create(&core, &name, parse(&body)?)?)
}

async fn show_point(State(core): App, Path((name, point)): Path<(String, String)>) -> Answer {
    let point = groups::points::named(&core, &name, point).await?;
    ok(points::resolve(&core, &name, &point).await?)
}

async fn lock(State(core): App, Path((name, point)): Path<(String, String)>) -> Answer {
    let point = groups::points::named(&core, &name, point).await?;
    ok(points::lock(&core, &name, &point, true).await?)
}

async fn unlock(State(core): App, Path((name, point)): Path<(String, String)>) -> Answer {
    ok(points::lock(&core, &name, &point, false).await?)
}

async fn verify(State(core): App, Path((name, point)): Path<(String, String)>) -> Answer {
    let point = groups::points::named(&core, &name, point).await?;
    accepted(points::verify(&core, &name, &point)?)
}

async fn export(State(core): App, Path((name, point)): Path<(String, String)>, body: Bytes) -> Answer {
    let point = groups::points::named(&core, &name, point).await?;
    accepted(points::export(&core, &name, &point, parse(&body)?)?)
}

async fn serve(State(core): App, Path((name, point)): Path<(String, String)>, body: Bytes) -> Answer {
    let point = groups::points::named(&core, &name, point).await?;
    ok(points::serve(&core, &name, &point, parse(&body)?).await?)
}

async fn renew_serve(State(core): App, Path(id): Path<String>) -> Answer {
    core.serves.renew(serve_id(&id)?, &core.clock)?;
    ok(json!({ "lease_seconds": serves::LEASE.as_secs() }))
}

async fn stop_serve(State(core): App, Path(id): Path<String>) -> Answer {
    serves::stop(&core, serve_id(&id)?).await?;
    ok(json!({}))
}

fn serve_id(text: &str) -> Result<ServeId, Failure> {
    text.parse().map_err(|_| bad_request("that is no id of a serve", "use the id that serving answered with"))
}

// ---- failovers

async fn show_description(State(core): App, Path(name): Path<String>) -> Answer {
    ok(failover::description(&core, &name)?)
}

async fn set_description(State(core): App, Path(name): Path<String>, body: Bytes) -> Answer {
    ok(failover::describe(&core, &name, parse(&body)?).await?)
}

async fn failover_test(State(core): App, Path(name): Path<String>, body: Bytes) -> Answer {
    let request: failover::drill::TestRequest = parse(&body)?;
    let point = groups::points::named(&core, &name, request.point).await?;
    accepted(failover::drill::test(&core, &name, failover::drill::TestRequest { point, ..request })?)
}

async fn failover_cleanup(State(core): App, Path(name): Path<String>) -> Answer {
    accepted(failover::drill::cleanup(&core, &name)?)
}

async fn failover_show(State(core): App, Path(name): Path<String>) -> Answer {
    ok(failover::after::show(&core, &name).await?)
}

async fn failover_planned(State(core): App, Path(name): Path<String>, body: Bytes) -> Answer {
    accepted(failover::start::start(&core, &name, Kind::Planned, parse(&body)?)?)
}

async fn failover_unplanned(State(core): App, Path(name): Path<String>, body: Bytes) -> Answer {
    let mut request: failover::start::StartRequest = parse(&body)?;
    if let Some(point) = request.point.take() {
        request.point = Some(groups::points::named(&core, &name, point).await?);
    }
    accepted(failover::start::start(&core, &name, Kind::Unplanned, request)?)
}

async fn failover_change_point(State(core): App, Path(name): Path<String>, body: Bytes) -> Answer {
    let request: failover::after::ChangePointRequest = parse(&body)?;
    let point = groups::points::named(&core, &name, request.point).await?;
    accepted(failover::after::change_point(&core, &name, failover::after::ChangePointRequest { point })?)
}

async fn failover_cancel(State(core): App, Path(name): Path<String>) -> Answer {
    accepted(failover::after::cancel(&core, &name)?)
}

async fn failover_commit(State(core): App, Path(name): Path<String>) -> Answer {
    accepted(failover::after::commit(&core, &name)?)
}

async fn reprotect(State(core): App, Path(name): Path<String>, body: Bytes) -> Answer {
    accepted(failover::reprotect::start(&core, &name, parse(&body)?)?)
}

async fn reprotect_cancel(State(core): App, Path(name): Path<String>) -> Answer {
    accepted(failover::reprotect::cancel(&core, &name)?)
}

async fn failback(State(core): App, Path(name): Path<String>, body: Bytes) -> Answer {
    accepted(failover::failback::start(&core, &name, parse(&body)?)?)
}

async fn failback_complete(State(core): App, Path(name): Path<String>, body: Bytes) -> Answer {
    accepted(failover::failback::complete(&core, &name, parse(&body)?)?)
}

async fn failback_cancel(State(core): App, Path(name): Path<String>) -> Answer {
    accepted(failover::failback::cancel(&core, &name)?)
}

async fn failover_promote(State(core): App, Path(name): Path<String>, body: Bytes) -> Answer {
    accepted(failover::after::promote(&core, &name, parse(&body)?)?)
}

async fn migrate(State(core): App, Path(name): Path<String>) -> Answer {
    accepted(failover::after::migrate(&core, &name)?)
}

// ---- policies

#[derive(Deserialize)]
struct CreatePolicy {
    name: String,
    #[serde(flatten)]
    settings: Map<String, Value>,
}

async fn list_policies(State(core): App) -> Answer {
    ok(policies::list(&core))
}

async fn create_policy(State(core): App, who: Who, body: Bytes) -> Answer {
    let request: CreatePolicy = parse(&body)?;
    let settings = policies::in_words(&request.settings);
    let created = policies::create(&core, &request.name, request.settings)?;
    who.did(&core, "policy_created", format!("policy {} was created: {settings}", request.name));
    versioned(created, core.store.revision("policies", &request.name))
}

async fn show_policy(State(core): App, Path(name): Path<String>) -> Answer {
    let state = core.store.state();
    let revision = state.revisions.get(&("policies", name.clone())).copied().unwrap_or(0);
    versioned(policies::show(&name, machines::find_policy(&state, &name)?), revision)
}

async fn set_policy(State(core): App, who: Who, Path(name): Path<String>, headers: HeaderMap, body: Bytes) -> Answer {
    let asked: Map<String, Value> = parse(&body)?;
    let settings = policies::in_words(&asked);
    let changed = policies::set(&core, &name, asked, expected(&headers)?).await?;
    who.did(&core, "policy_changed", format!("policy {name} was changed: {settings}"));
    versioned(changed, core.store.revision("policies", &name))
}

async fn delete_policy(State(core): App, who: Who, Path(name): Path<String>, headers: HeaderMap) -> Answer {
    policies::delete(&core, &name, expected(&headers)?)?;
    who.did(&core, "policy_deleted", format!("policy {name} was deleted"));
    ok(json!({}))
}

// ---- groups

async fn list_groups(State(core): App) -> Answer {
    ok(groups::list(&core))
}

async fn create_group(State(core): App, body: Bytes) -> Answer {
    let request: CreateGroup = parse(&body)?;
    versioned(groups::create(&core, &request)?, core.store.revision("machine_groups", &request.name))
}

async fn show_group(State(core): App, Path(name): Path<String>) -> Answer {
    versioned(groups::get(&core, &name)?, core.store.revision("machine_groups", &name))
}

async fn set_group(State(core): App, Path(name): Path<String>, headers: HeaderMap, body: Bytes) -> Answer {
    let changed = groups::set(&core, &name, &parse(&body)?, expected(&headers)?)?;
    versioned(changed, core.store.revision("machine_groups", &name))
}

async fn list_group_points(State(core): App, Path(name): Path<String>) -> Answer {
    ok(groups::points::list(&core, &name).await?)
}

async fn create_group_point(State(core): App, Path(name): Path<String>, body: Bytes) -> Answer {
    accepted(groups::points::create(&core, &name, parse(&body)?)?)
}

async fn delete_group(State(core): App, Path(name): Path<String>, headers: HeaderMap) -> Answer {
    groups::delete(&core, &name, expected(&headers)?)?;
    ok(json!({}))
}

async fn add_to_group(State(core): App, Path((name, machine)): Path<(String, String)>) -> Answer {
    ok(groups::add(&core, &name, &machine)?)
}

async fn remove_from_group(State(core): App, Path((name, machine)): Path<(String, String)>) -> Answer {
    ok(groups::remove(&core, &name, &machine)?)
}

// ---- plans

/// Steps in their order.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct PlanSteps {
    steps: Vec<plans::state::PlanStep>,
}

async fn list_plans(State(core): App) -> Answer {
    ok(plans::list(&core))
}

async fn create_plan(State(core): App, body: Bytes) -> Answer {
    let request: CreatePlan = parse(&body)?;
    versioned(plans::create(&core, &request)?, core.store.revision("plans", &request.name))
}

async fn show_plan(State(core): App, Path(name): Path<String>) -> Answer {
    versioned(plans::get(&core, &name)?, core.store.revision("plans", &name))
}

async fn set_plan(State(core): App, Path(name): Path<String>, headers: HeaderMap, body: Bytes) -> Answer {
    let request: PlanSteps = parse(&body)?;
    let changed = plans::set(&core, &name, request.steps, expected(&headers)?)?;
    versioned(changed, core.store.revision("plans", &name))
}

async fn delete_plan(State(core): App, Path(name): Path<String>, headers: HeaderMap) -> Answer {
    plans::delete(&core, &name, expected(&headers)?)?;
    ok(json!({}))
}

async fn run_plan(State(core): App, Path(name): Path<String>, body: Bytes) -> Answer {
    accepted(plans::run::start(&core, &name, parse(&body)?)?)
}

async fn test_plan(State(core): App, Path(name): Path<String>, body: Bytes) -> Answer {
    accepted(plans::run::test(&core, &name, parse(&body)?)?)
}

async fn continue_plan(State(core): App, Path(name): Path<String>) -> Answer {
    accepted(plans::run::go_on(&core, &name)?)
}

async fn cancel_plan(State(core): App, Path(name): Path<String>) -> Answer {
    accepted(plans::run::cancel(&core, &name)?)
}

async fn commit_plan(State(core): App, Path(name): Path<String>) -> Answer {
    accepted(plans::run::commit(&core, &name)?)
}

async fn confirm_plan(State(core): App, Path(name): Path<String>) -> Answer {
    plans::run::confirm(&core, &name)?;
    ok(plans::get(&core, &name)?)
}

async fn report_plan(State(core): App, Path(name): Path<String>) -> Answer {
    ok(plans::run::report(&name, &plans::run::last_run(&core, &name)?))
}

// ---- channels

/// A new channel: exactly one of `webhook` and `mail`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CreateChannel {
    name: String,
    /// `warning` or `critical`: of that and worse.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    severity: Option<Severity>,
    #[serde(default)]
    webhook: Option<deliver::Webhook>,
    #[serde(default)]
    mail: Option<deliver::Mail>,
}

async fn list_channels(State(core): App) -> Answer {
    ok(deliver::list(&core))
}

async fn create_channel(State(core): App, who: Who, body: Bytes) -> Answer {
    let CreateChannel { name, severity, webhook, mail } = parse(&body)?;
    let channel = deliver::Channel { severity: severity.unwrap_or(Severity::Warning), webhook, mail };
    let created = deliver::create(&core, &name, channel)?;
    who.did(&core, "channel_created", format!("channel {name} was created: {} to {}", created.kind, created.to));
    versioned(created, core.store.revision("channels", &name))
}

async fn show_channel(State(core): App, Path(name): Path<String>) -> Answer {
    versioned(deliver::get(&core, &name)?, core.store.revision("channels", &name))
}

async fn delete_channel(State(core): App, who: Who, Path(name): Path<String>, headers: HeaderMap) -> Answer {
    deliver::delete(&core, &name, expected(&headers)?)?;
    who.did(&core, "channel_deleted", format!("channel {name} was deleted"));
    ok(json!({}))
}

async fn test_channel(State(core): App, Path(name): Path<String>) -> Answer {
    deliver::test(&core, &name).await?;
    ok(json!({}))
}

// ---- jobs, peers

#[derive(Deserialize)]
struct JobsQuery {
    machine: Option<String>,
    state: Option<JobState>,
    limit: Option<usize>,
}

async fn list_jobs(State(core): App, query: Query<JobsQuery>) -> Answer {
    let is_of = |job: &Job| {
        query.machine.as_ref().is_none_or(|machine| job.machine.as_ref() == Some(machine))
            && query.state.is_none_or(|state| job.state == state)
    };
    ok(core.jobs.list().into_iter().filter(is_of).take(query.limit.unwrap_or(usize::MAX)).collect::<Vec<_>>())
}

#[derive(Deserialize)]
struct JobQuery {
    #[serde(default)]
    version: u64,
    #[serde(default)]
    wait_seconds: u64,
}

async fn show_job(State(core): App, Path(id): Path<String>, query: Query<JobQuery>) -> Answer {
    let unknown = || Failure::new(FailureKind::NotFound, "there is no such job", "see `tidemark job list`");
    let id: Uuid = id.parse().map_err(|_| unknown())?;
    let wait = Duration::from_secs(query.wait_seconds).min(POLL_MAX);
    let job = tokio::select! {
        job = core.jobs.get(id, query.version, wait) => job,
        () = core.stop.cancelled() => core.jobs.get(id, 0, Duration::ZERO).await,
    };
    ok(job.ok_or_else(unknown)?)
}

async fn cancel_job(State(core): App, Path(id): Path<String>) -> Answer {
    let unknown = || Failure::new(FailureKind::NotFound, "there is no such job", "see `tidemark job list`");
    accepted(core.jobs.cancel(id.parse().map_err(|_| unknown())?)?)
}

async fn list_peers(State(core): App) -> Answer {
    let connected: Vec<Value> = core
        .hub
        .connected()
        .into_iter()
        .map(|(peer, name)| {
            let id = match peer {
                PeerId::Agent(id) => id.to_string(),
                PeerId::ProcessServer(id) => id.to_string(),
            };
            json!({ "role": kind(peer), "id": id, "name": name })
        })
        .collect();
    let state = core.store.state();
    ok(json!({ "connected": connected, "hosts": state.hosts, "process_servers": state.servers }))
}

/// An empty body is an empty object.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let body = if body.is_empty() { b"{}" } else { body };
    let mut json = serde_json::Deserializer::from_slice(body);
    let read = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        (path, error.into_inner())
    });
    let read = read.and_then(|read| json.end().map(|()| read).map_err(|error| (String::new(), error)));
    read.map_err(|(path, error)| {
        let help = "send a JSON object; the document of the API, /api/v1/openapi.json, says what may be in it";
        let what = match error.is_data() {
            true => in_words(&path, &error.to_string()),
            false => format!("it is no JSON: {}", in_words("", &error.to_string())),
        };
        bad_request(format!("the request's body is not what is expected: {what}"), help).into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_lists_of_which_weak_and_foreign_ones_match_nothing() {
        for (text, revisions) in [
            ("\"3\"", vec![3]),
            (" \"3\" ,\"4\",, \"5\"", vec![3, 4, 5]),
            ("W/\"3\"", vec![]),
            ("W/\"3\", \"a,b\", \"7\"", vec![7]),
            ("\"gold\"", vec![]),
        ] {
            assert_eq!(tags(text), Some(revisions), "{text}");
        }
        for text in ["3", "gold", "\"3", "\"3\" \"4\"", "*, \"3\"", "w/\"3\""] {
            assert_eq!(tags(text), None, "{text}");
        }
    }
}
