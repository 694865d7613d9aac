//! Creations that may be repeated: with the same `Idempotency-Key` the answer is the first one's, and nothing is done again.
//!
//! Answers that show a secret are not stored: whoever repeats such a request is told that it was done ([`ShownOnce`]).
//!
//! *Crash.* The answer is stored after it was made: a crash between the two does the work again when it is repeated, which
//! then finds what the first one made.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tidemark_base::{Clock, Timestamp};
use tidemark_proto::control::{Failure, FailureKind};

use super::access::Caller;
use crate::core::Core;
use crate::database::{Database, DatabaseError, Statement};

const KEY: &str = "idempotency-key";
const KEY_BYTES_MAX: usize = 255;
const KEPT: Duration = Duration::from_secs(86_400);
const BODY_BYTES_MAX: usize = 2 << 20;

/// On an answer that shows a secret: what is answered to whoever repeats the request.
#[derive(Clone)]
pub struct ShownOnce(pub Failure);

impl ShownOnce {
    /// `what` is made, and its secret was in the first answer.
    pub fn new(what: &str, help: String) -> Self {
        let message = format!("this was done already and made {what}; its text was shown once, and is not kept");
        Self(Failure::new(FailureKind::Conflict, message, help))
    }
}

pub async fn once(State(core): State<Arc<Core>>, request: Request, next: Next) -> Response {
    let Some(key) = request.headers().get(KEY).cloned().filter(|_| request.method() == Method::POST) else {
        return next.run(request).await;
    };
    let user = request.extensions().get::<Caller>().map_or(String::new(), |caller| caller.user.clone());
    match run(&core, &user, &key, request, next).await {
        Ok(response) | Err(response) => response,
    }
}

async fn run(core: &Core, user: &str, key: &HeaderValue, request: Request, next: Next) -> Result<Response, Response> {
    let key = key.to_str().ok().filter(|key| !key.is_empty() && key.len() <= KEY_BYTES_MAX).ok_or_else(|| {
        refused(StatusCode::BAD_REQUEST, "the idempotency key is no plain text of at most 255 letters", "use a UUID")
    })?;
    let id = blake3::hash(format!("{user}\n{key}").as_bytes()).to_hex().to_string();
    // Two at once: the second waits for the first's answer.
    let _lock = core.lock(&format!("key {id}")).await;
    let (parts, body) = request.into_parts();
    let body = to_bytes(body, BODY_BYTES_MAX)
        .await
        .map_err(|_| refused(StatusCode::PAYLOAD_TOO_LARGE, "the request is too large", "send less"))?;
    let asked = [parts.uri.path().as_bytes(), b"\n", &body].concat();
    let asked = blake3::hash(&asked).to_hex().to_string();
    let database = core.store.database().clone();
    let oldest = Timestamp(core.clock.wall_now().0.saturating_sub(KEPT.as_nanos() as u64));
    if let Some((known, status, answer)) = find(&database, &id, oldest).await.map_err(unavailable)? {
        if known != asked {
            let help = "use a new key for a new request";
            return Err(refused(StatusCode::UNPROCESSABLE_ENTITY, "the key was used for another request", help));
        }
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::OK);
        let headers = [(header::CONTENT_TYPE, "application/json"), (REPLAYED, "true")];
        return Ok((status, headers, answer).into_response());
    }
    let response = next.run(Request::from_parts(parts, Body::from(body))).await;
    let (parts, body) = response.into_parts();
    let answer = to_bytes(body, BODY_BYTES_MAX).await.unwrap_or_else(|_| Bytes::new());
    // What failed at our end may succeed when it is repeated.
    if parts.status.is_success() {
        let now = core.clock.wall_now();
        let (status, text) = match parts.extensions.get::<ShownOnce>() {
            Some(ShownOnce(instead)) => (StatusCode::CONFLICT, serde_json::to_string(instead).unwrap_or_default()),
            None => (parts.status, String::from_utf8_lossy(&answer).into_owned()),
        };
        let status = u64::from(status.as_u16());
        if let Err(error) = keep(&database, id, asked, now, oldest, status, text).await {
            tracing::warn!(%error, "an answer cannot be kept for whoever repeats the request");
        }
    }
    Ok(Response::from_parts(parts, Body::from(answer)))
}

/// Takes out the secrets that earlier versions stored.
pub fn forget_secrets(database: &Database) -> Result<(), DatabaseError> {
    let sql = "DELETE FROM answers WHERE body LIKE $1 OR body LIKE $2";
    database.write(vec![Statement::new(sql, ["%\"token\":\"%".into(), "%\"passphrase\":\"%".into()])])
}

const REPLAYED: header::HeaderName = header::HeaderName::from_static("idempotency-replayed");

async fn find(
    database: &Database,
    id: &str,
    oldest: Timestamp,
) -> Result<Option<(String, u16, String)>, DatabaseError> {
    let sql = "SELECT request, status, body FROM answers WHERE id = $1 AND time > $2";
    let (statement, database) = (Statement::new(sql, [id.into(), oldest.0.into()]), database.clone());
    let rows = blocking(move || database.read(statement)).await?;
    Ok(rows
        .first()
        .map(|row| (row[0].text().to_owned(), u16::try_from(row[1].int()).unwrap_or(200), row[2].text().to_owned())))
}

async fn keep(
    database: &Database,
    id: String,
    asked: String,
    now: Timestamp,
    oldest: Timestamp,
    status: u64,
    body: String,
) -> Result<(), DatabaseError> {
    let sql = "INSERT INTO answers (id, time, request, status, body) VALUES ($1, $2, $3, $4, $5) \
               ON CONFLICT (id) DO UPDATE SET time = excluded.time, request = excluded.request, \
               status = excluded.status, body = excluded.body";
    let statements = vec![
        Statement::new("DELETE FROM answers WHERE time <= $1", [oldest.0.into()]),
        Statement::new(sql, [id.into(), now.0.into(), asked.into(), status.into(), body.into()]),
    ];
    let database = database.clone();
    blocking(move || database.write(statements)).await
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, DatabaseError> + Send + 'static,
) -> Result<T, DatabaseError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(DatabaseError::Refused { name: "of its own".to_owned(), reason: error.to_string() })
    })
}

fn unavailable(error: DatabaseError) -> Response {
    super::ApiError::from(Failure::from(error)).into_response()
}

fn refused(status: StatusCode, error: &str, help: &str) -> Response {
    super::refusals::refusal(status, error, help)
}
