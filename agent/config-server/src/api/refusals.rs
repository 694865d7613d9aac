//! Refusals that are the same for all operations, and the shape of those that the framework makes.

use axum::Json;
use axum::body::to_bytes;
use axum::extract::Request;
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde_json::json;

/// What the framework says of a request that it refuses is one line.
const TEXT_BYTES_MAX: usize = 4 << 10;

/// Refuses a condition that would not be looked at: whoever sets one relies on it.
pub async fn without_if_match(request: Request, next: Next) -> Response {
    if request.headers().contains_key(header::IF_MATCH) {
        let body = json!({
            "error": "this operation does not look at If-Match",
            "help": "send the request without it; the document of the API (/api/v1/openapi.json) tells which operations do",
        });
        return (StatusCode::BAD_REQUEST, Json(body)).into_response();
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
            format!("the request makes no sense: {text}"),
            "see the document of the API, /api/v1/openapi.json, for what the address and the query may be",
        ),
    };
    (status, Json(json!({ "error": error, "help": help }))).into_response()
}
