//! The REST API, `/api/v1`: JSON over TLS, with a bearer token in every request.
//!
//! Errors are `{"error": …, "help": …}` with the status that fits. What takes time answers 202 with a job; ask for it at
//! `jobs/{id}?version=N&wait_seconds=S`, which answers as soon as it differs from version N.

mod listen;
mod routes;

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};
use tidemark_proto::control::{Failure, FailureKind};

pub use listen::serve;
pub use routes::router;

/// The bearer token, kept as its digest so that comparing takes the same time whatever is wrong.
#[derive(Clone)]
pub struct Token(Arc<blake3::Hash>);

impl Token {
    pub fn new(text: &str) -> Self {
        Self(Arc::new(blake3::hash(text.trim().as_bytes())))
    }

    fn admits(&self, header: Option<&HeaderValue>) -> bool {
        let given = header.and_then(|value| value.to_str().ok()).and_then(|value| value.strip_prefix("Bearer "));
        // `blake3::Hash` compares in constant time.
        given.is_some_and(|given| blake3::hash(given.trim().as_bytes()) == *self.0)
    }
}

/// Refuses whoever does not show the token.
async fn require_token(State(token): State<Token>, request: Request, next: Next) -> Response {
    if token.admits(request.headers().get(header::AUTHORIZATION)) {
        return next.run(request).await;
    }
    let body = json!({
        "error": "the request shows no valid token",
        "help": "send `Authorization: Bearer TOKEN`; the token is in the file that the server's ready line names (--token-file)",
    });
    (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, "Bearer")], axum::Json(body)).into_response()
}

/// A failure as an answer.
pub struct ApiError(Failure);

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        Self(failure)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = match self.0.kind {
            FailureKind::BadRequest => StatusCode::BAD_REQUEST,
            FailureKind::NotFound => StatusCode::NOT_FOUND,
            FailureKind::Conflict => StatusCode::CONFLICT,
            FailureKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            FailureKind::TimedOut => StatusCode::GATEWAY_TIMEOUT,
            FailureKind::Damaged | FailureKind::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let body: Value = serde_json::to_value(&self.0).expect("a failure is plain data");
        (status, axum::Json(body)).into_response()
    }
}

type Answer = Result<Response, ApiError>;

fn ok(body: impl Serialize) -> Answer {
    Ok(axum::Json(body).into_response())
}

fn accepted(body: impl Serialize) -> Answer {
    Ok((StatusCode::ACCEPTED, axum::Json(body)).into_response())
}
