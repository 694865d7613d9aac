//! What can be asked.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::routing::{delete, get, post, put};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use tidemark_base::Clock;
use tidemark_proto::control::{Failure, FailureKind, ServeId};
use uuid::Uuid;

use super::{Answer, ApiError, Token, accepted, ok, require_token};
use crate::core::Core;
use crate::hub::{PeerId, kind};
use crate::names::bad_request;
use crate::{console, machines, points, policies, serves, status};

type App = State<Arc<Core>>;

/// The longest that a poll waits.
const POLL_MAX: Duration = Duration::from_secs(60);

pub fn router(core: Arc<Core>, token: Token) -> Router {
    let api = Router::new()
        .route("/health", get(health))
        .route("/machines", get(list_machines).post(protect))
        .route("/machines/{name}", get(show_machine).delete(unprotect))
        .route("/machines/{name}/pause", post(pause))
        .route("/machines/{name}/resume", post(resume))
        .route("/machines/{name}/resync", post(resync))
        .route("/machines/{name}/points", get(list_points).post(create_point))
        .route("/machines/{name}/points/{point}", get(show_point))
        .route("/machines/{name}/points/{point}/lock", put(lock).delete(unlock))
        .route("/machines/{name}/points/{point}/verify", post(verify))
        .route("/machines/{name}/points/{point}/export", post(export))
        .route("/machines/{name}/points/{point}/serve", post(serve))
        .route("/serves/{id}/renew", post(renew_serve))
        .route("/serves/{id}", delete(stop_serve))
        .route("/policies", get(list_policies).post(create_policy))
        .route("/policies/{name}", get(show_policy).patch(set_policy).delete(delete_policy))
        .route("/jobs", get(list_jobs))
        .route("/jobs/{id}", get(show_job))
        .route("/peers", get(list_peers))
        .fallback(nothing_there)
        .method_not_allowed_fallback(wrong_method)
        .with_state(core.clone())
        .layer(axum::middleware::from_fn_with_state(token, require_token));
    Router::new().route("/", get(console::page)).nest("/api/v1", api).fallback(nothing_there)
}

async fn nothing_there() -> Answer {
    Err(Failure::new(FailureKind::NotFound, "there is nothing at this address", "the API is at /api/v1").into())
}

async fn wrong_method() -> Answer {
    Err(bad_request("this address does not take that method", "see the documentation of the API").into())
}

async fn health(State(core): App) -> Answer {
    ok(json!({ "status": "ok", "version": env!("CARGO_PKG_VERSION"), "time": core.clock.wall_now() }))
}

// ---- machines

async fn list_machines(State(core): App) -> Answer {
    ok(status::all(&core).await)
}

async fn show_machine(State(core): App, Path(name): Path<String>) -> Answer {
    ok(status::of(&core, &name).await?)
}

async fn protect(State(core): App, body: Bytes) -> Answer {
    accepted(machines::protect(&core, parse(&body)?)?)
}

#[derive(Deserialize)]
struct UnprotectQuery {
    #[serde(default)]
    delete_replica: bool,
}

async fn unprotect(State(core): App, Path(name): Path<String>, query: Query<UnprotectQuery>) -> Answer {
    accepted(machines::unprotect(&core, &name, query.delete_replica)?)
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

// ---- points

async fn list_points(State(core): App, Path(name): Path<String>) -> Answer {
    ok(points::list(&core, &name).await?)
}

async fn create_point(State(core): App, Path(name): Path<String>, body: Bytes) -> Answer {
    accepted(points::create(&core, &name, parse(&body)?)?)
}

async fn show_point(State(core): App, Path((name, point)): Path<(String, String)>) -> Answer {
    ok(points::resolve(&core, &name, &point).await?)
}

async fn lock(State(core): App, Path((name, point)): Path<(String, String)>) -> Answer {
    ok(points::lock(&core, &name, &point, true).await?)
}

async fn unlock(State(core): App, Path((name, point)): Path<(String, String)>) -> Answer {
    ok(points::lock(&core, &name, &point, false).await?)
}

async fn verify(State(core): App, Path((name, point)): Path<(String, String)>) -> Answer {
    accepted(points::verify(&core, &name, &point)?)
}

async fn export(State(core): App, Path((name, point)): Path<(String, String)>, body: Bytes) -> Answer {
    accepted(points::export(&core, &name, &point, parse(&body)?)?)
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ServeRequest {
    writable: bool,
}

async fn serve(State(core): App, Path((name, point)): Path<(String, String)>, body: Bytes) -> Answer {
    let request: ServeRequest = parse(&body)?;
    ok(points::serve(&core, &name, &point, request.writable).await?)
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

async fn create_policy(State(core): App, body: Bytes) -> Answer {
    let request: CreatePolicy = parse(&body)?;
    ok(policies::create(&core, &request.name, request.settings)?)
}

async fn show_policy(State(core): App, Path(name): Path<String>) -> Answer {
    ok(policies::show(&name, machines::find_policy(&core.store.state(), &name)?))
}

async fn set_policy(State(core): App, Path(name): Path<String>, body: Bytes) -> Answer {
    ok(policies::set(&core, &name, parse(&body)?).await?)
}

async fn delete_policy(State(core): App, Path(name): Path<String>) -> Answer {
    policies::delete(&core, &name)?;
    ok(json!({}))
}

// ---- jobs, peers

async fn list_jobs(State(core): App) -> Answer {
    ok(core.jobs.list())
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
fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let body = if body.is_empty() { b"{}" } else { body };
    serde_json::from_slice(body).map_err(|error| {
        bad_request(format!("the request's body is not what is expected: {error}"), "send a JSON object").into()
    })
}
