//! Refusals that are the same for all operations, and the shape of those that the framework makes.

use axum::Json;
use axum::body::to_bytes;
use axum::extract::Request;
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde_json::json;
use tidemark_base::words::in_words;

/// What the framework says of a request that it refuses is one line.
const TEXT_BYTES_MAX: usize = 4 << 10;

/// A refusal in the shape of every error: `{"kind": …, "error": …, "help": …}`. Its kind follows from the status.
pub fn refusal(status: StatusCode, error: impl Into<String>, help: impl Into<String>) -> Response {
    let (error, help): (String, String) = (error.into(), help.into());
    (status, Json(json!({ "kind": kind(status), "error": error, "help": help }))).into_response()
}

/// As programs are told of what no operation refuses. What operations refuse has the kinds of `FailureKind`.
fn kind(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED => "unauthenticated",
        StatusCode::FORBIDDEN => "forbidden",
        StatusCode::NOT_FOUND => "not_found",
        StatusCode::METHOD_NOT_ALLOWED => "method_not_allowed",
        StatusCode::PAYLOAD_TOO_LARGE => "too_large",
        StatusCode::UNSUPPORTED_MEDIA_TYPE => "unsupported_media_type",
        StatusCode::UNPROCESSABLE_ENTITY => "key_reused",
        StatusCode::SERVICE_UNAVAILABLE => "unavailable",
        _ if status.is_server_error() => "failed",
        _ => "bad_request",
    }
}

/// Refuses a condition that would not be looked at: whoever sets one relies on it.
pub async fn without_if_match(request: Request, next: Next) -> Response {
    if request.headers().contains_key(header::IF_MATCH) {
        let help =
            "send the request without it; the document of the API (/api/v1/openapi.json) tells which operations do";
        return refusal(StatusCode::BAD_REQUEST, "this operation does not look at If-Match", help);
    }
    next.run(request).await
}

/// What the framework refuses by itself has the shape of every other error: a path that is no UTF-8, a query that makes no
/// sense, a body that is too large.
pub async fn as_json(request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    let status = response.status();
    let is_text = response
        .headers()
        .get(header::CONTENT_TYPE)
        .is_none_or(|of| of.to_str().is_ok_and(|of| of.starts_with("text/plain")));
    if !(status.is_client_error() || status.is_server_error()) || !is_text {
        return response;
    }
    let text = to_bytes(response.into_body(), TEXT_BYTES_MAX).await.unwrap_or_default();
    let text = String::from_utf8_lossy(&text).trim().to_owned();
    let reason = status.canonical_reason().unwrap_or("it is refused");
    let (error, help) = match status {
        StatusCode::PAYLOAD_TOO_LARGE => ("the request is too large".to_owned(), "send less"),
        _ if text.is_empty() => (reason.to_owned(), "see the document of the API, /api/v1/openapi.json"),
        _ => (
            format!("the request makes no sense: {}", query_in_words(&text)),
            "see the document of the API, /api/v1/openapi.json, for what the address and the query may be",
        ),
    };
    refusal(status, error, help)
}

/// What the framework says of a query: `Failed to deserialize query string: after: invalid digit found in string`.
fn query_in_words(text: &str) -> String {
    let Some(of) = text.strip_prefix("Failed to deserialize query string: ") else { return text.to_owned() };
    match of.split_once(": ") {
        Some((name, said)) if !name.contains([' ', '`']) => in_words(name, said),
        _ => in_words("", of),
    }
}
