//! What is left of a request's body when it was refused: it is read and thrown away, within limits. Whoever still sends would
//! otherwise find the connection closed, and never read why.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, BodyDataStream, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::header;
use axum::middleware::Next;
use axum::response::Response;
use futures_util::{Stream, StreamExt};

/// What is thrown away; whoever sends more is cut off.
const REST_BYTES_MAX: u64 = 64 << 20;
/// How long that is waited for.
const REST_LIMIT: Duration = Duration::from_secs(10);

/// A body that was lent to its handler, which may drop it before its end.
struct Lent {
    body: Option<BodyDataStream>,
    /// Whether somebody wanted any of it, which is what a client that asks first waits for.
    wanted: bool,
    back: Back,
}

/// The rest, and whether any of it was wanted.
type Back = Arc<Mutex<Option<(BodyDataStream, bool)>>>;

impl Stream for Lent {
    type Item = Result<Bytes, axum::Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.wanted = true;
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let polled = body.poll_next_unpin(context);
        if matches!(polled, Poll::Ready(None | Some(Err(_)))) {
            self.body = None;
        }
        polled
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(body) = self.body.take() {
            *self.back.lock().expect("no panic while held") = Some((body, self.wanted));
        }
    }
}

pub async fn take_rest(request: Request, next: Next) -> Response {
    if request.body().is_end_stream() {
        return next.run(request).await;
    }
    let asks_first = request.headers().contains_key(header::EXPECT);
    let back = Back::default();
    let (parts, body) = request.into_parts();
    let lent = Lent { body: Some(body.into_data_stream()), wanted: false, back: back.clone() };
    let response = next.run(Request::from_parts(parts, Body::from_stream(lent))).await;
    let rest = back.lock().expect("no panic while held").take();
    if let Some((rest, wanted)) = rest
        // Who asks first has sent nothing yet, and need not.
        && (wanted || !asks_first)
    {
        let _ = tokio::time::timeout(REST_LIMIT, throw_away(rest)).await;
    }
    response
}

async fn throw_away(mut rest: BodyDataStream) {
    let mut bytes = 0;
    while let Some(Ok(part)) = rest.next().await {
        bytes += part.len() as u64;
        if bytes > REST_BYTES_MAX {
            return;
        }
    }
}
