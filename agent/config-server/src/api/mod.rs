//! The REST API, `/api/v1`: JSON over TLS, with a bearer token in every request.
//!
//! Errors are `{"kind": …, "error": …, "help": …}` with the status that fits. What takes time answers 202 with a job; ask for it at
//! `jobs/{id}?version=N&wait_seconds=S`, which answers as soon as it differs from version N. What may be changed by several
//! people has an `ETag`, which a change can name in `If-Match`; creations take an `Idempotency-Key`. The whole API is told
//! at `/api/v1/openapi.json`.

mod access;
mod accounts;
mod events;
mod inventory;
mod listen;
mod metrics;
mod operations;
mod refusals;
pub(crate) mod repeat;
mod rest;
mod routes;
pub mod schema;
pub mod shapes;

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::Value;
use tidemark_proto::control::{Failure, FailureKind};

use crate::identity::Refused;
use crate::names::CHANGED_MEANWHILE;

pub use access::{Access, write_token};
pub use listen::serve;
pub use routes::router;

/// A failure as an answer.
pub struct ApiError {
    failure: Failure,
    retry_after: Option<u64>,
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        Self { failure, retry_after: None }
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Failure(failure) => failure.into(),
            Refused::TooMany(too_many) => {
                let seconds = too_many.wait.as_secs() + 1;
                let failure = Failure::new(
                    FailureKind::Unavailable,
                    "too many wrong passphrases were shown",
                    format!("try again in {seconds} s, with the right one"),
                );
                Self { failure, retry_after: Some(seconds) }
            }
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = match self.failure.kind {
            _ if self.retry_after.is_some() => StatusCode::TOO_MANY_REQUESTS,
            FailureKind::BadRequest => StatusCode::BAD_REQUEST,
            FailureKind::NotFound => StatusCode::NOT_FOUND,
            FailureKind::Conflict if self.failure.message.starts_with(CHANGED_MEANWHILE) => {
                StatusCode::PRECONDITION_FAILED
            }
            FailureKind::Conflict => StatusCode::CONFLICT,
            FailureKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            FailureKind::TimedOut => StatusCode::GATEWAY_TIMEOUT,
            FailureKind::Damaged | FailureKind::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let body: Value = serde_json::to_value(&self.failure).expect("a failure is plain data");
        let mut response = (status, axum::Json(body)).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }
}

type Answer = Result<Response, ApiError>;

fn ok(body: impl Serialize) -> Answer {
    Ok(axum::Json(body).into_response())
}

fn accepted(body: impl Serialize) -> Answer {
    Ok((StatusCode::ACCEPTED, axum::Json(body)).into_response())
}

/// With the revision that a change can name in `If-Match`.
fn versioned(body: impl Serialize, revision: u64) -> Answer {
    let mut response = axum::Json(body).into_response();
    if let Ok(tag) = format!("\"{revision}\"").parse() {
        response.headers_mut().insert(header::ETAG, tag);
    }
    Ok(response)
}

/// Work that waits for the disk or a database, off the threads that answer.
async fn blocking<T: Send + 'static, E: Into<ApiError> + Send + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome.map_err(Into::into),
        Err(error) => {
            let message = format!("the configuration server failed: {error}");
            Err(Failure::new(FailureKind::Failed, message, "see its log").into())
        }
    }
}
