//! Events and alerts: lists, long polls, and a stream.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::extract::{Query, State};
use axum::http::HeaderMap;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::{Deserialize, Serialize};
use tidemark_proto::control::{Failure, Severity};
use tokio::sync::broadcast::error::RecvError;
use utoipa::ToSchema;

use super::access::{Ticket, no_token};
use super::{Answer, blocking, ok};
use crate::core::Core;
use crate::database::DatabaseError;
use crate::history::{self, PAGE_MAX, Stored};
use crate::jobs::{Job, JobState};
use crate::model::Alert;

/// After the history could not be read.
const READ_AGAIN: Duration = Duration::from_secs(1);

/// The longest that a poll waits.
const POLL_MAX: Duration = Duration::from_secs(60);

#[derive(Clone, Debug, Default, Deserialize)]
pub struct EventQuery {
    after: Option<u64>,
    epoch: Option<u64>,
    limit: Option<u64>,
    machine: Option<String>,
    severity: Option<Severity>,
    #[serde(default)]
    wait_seconds: u64,
}

impl EventQuery {
    fn history(&self, core: &Core) -> history::Query {
        let EventQuery { after, epoch, limit, machine, severity, .. } = self.clone();
        let after = after.map(|after| core.history.resume(after, epoch));
        history::Query { after, limit, machine, severity }
    }
}

async fn page(core: &Arc<Core>, query: history::Query) -> Result<Vec<Stored>, super::ApiError> {
    let core = core.clone();
    blocking(move || core.history.list(&query).map_err(|error: DatabaseError| Failure::from(error))).await
}

pub async fn list(
    State(core): State<Arc<Core>>,
    Extension(ticket): Extension<Ticket>,
    query: Query<EventQuery>,
) -> Answer {
    let mut newest = core.history.newest();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(query.wait_seconds).min(POLL_MAX);
    loop {
        newest.mark_unchanged();
        let found = page(&core, query.history(&core)).await?;
        if !found.is_empty() || query.after.is_none() {
            return ok(found);
        }
        let waited = tokio::select! {
            changed = tokio::time::timeout_at(deadline, newest.changed()) => matches!(changed, Ok(Ok(()))),
            () = core.stop.cancelled() => false,
        };
        if !ticket.holds() {
            return Ok(no_token());
        }
        if !waited {
            return ok(found);
        }
    }
}

/// Server-sent events from `after`, or the `Last-Event-ID` that a client that was cut off names, or from now.
pub async fn follow(
    State(core): State<Arc<Core>>,
    Extension(ticket): Extension<Ticket>,
    headers: HeaderMap,
    query: Query<EventQuery>,
) -> Response {
    let last = headers.get("last-event-id").and_then(|value| last_told(value.to_str().ok()?));
    let newest = core.history.newest();
    let seen = query.after.map(|after| (query.epoch, after)).or(last);
    let after = seen.map_or(*newest.borrow(), |(epoch, after)| core.history.resume(after, epoch));
    let query = history::Query { after: Some(after), limit: Some(PAGE_MAX), ..query.history(&core) };
    let following = stream::unfold((core, newest, query, Vec::new().into_iter()), |following| async move {
        let (core, mut newest, mut query, mut waiting) = following;
        loop {
            if let Some(stored) = waiting.next() {
                return Some((Ok::<_, Infallible>(told(&stored)), (core, newest, query, waiting)));
            }
            let changed = newest.has_changed().unwrap_or(false);
            newest.mark_unchanged();
            let upto = *newest.borrow();
            let Ok(found) = page(&core, query.clone()).await else {
                // The history cannot be read now: nothing is passed over for it.
                if tokio::time::timeout(READ_AGAIN, core.stop.cancelled()).await.is_ok() {
                    return None;
                }
                continue;
            };
            if let Some(last) = found.last() {
                query.after = Some(last.id);
                waiting = found.into_iter();
                continue;
            }
            // Nothing of what is asked for up to here: it is not looked at again.
            query.after = query.after.max(Some(upto));
            if changed {
                continue;
            }
            tokio::select! {
                changed = newest.changed() => if changed.is_err() { return None },
                () = core.stop.cancelled() => return None,
            }
        }
    });
    Sse::new(ticket.while_it_holds(following)).keep_alive(KeepAlive::default()).into_response()
}

fn told(stored: &Stored) -> Event {
    let data = serde_json::to_string(stored).expect("an event is plain data");
    Event::default().id(format!("{}.{}", stored.epoch, stored.id)).event("event").data(data)
}

/// Epoch and id, as [`told`] writes them; an older version wrote the id alone.
fn last_told(text: &str) -> Option<(Option<u64>, u64)> {
    match text.split_once('.') {
        Some((epoch, id)) => Some((Some(epoch.parse().ok()?), id.parse().ok()?)),
        None => Some((None, text.parse().ok()?)),
    }
}

/// Server-sent events: the jobs that run, then every change of any.
pub async fn follow_jobs(State(core): State<Arc<Core>>, Extension(ticket): Extension<Ticket>) -> Response {
    // First the subscription, then the list: a change in between is told twice, not lost.
    let changes = core.jobs.follow();
    let running = running(&core);
    let following = stream::unfold((core, changes, running.into_iter()), |following| async move {
        let (core, mut changes, mut waiting) = following;
        loop {
            if let Some(job) = waiting.next() {
                return Some((Ok::<_, Infallible>(told_job(&job)), (core, changes, waiting)));
            }
            tokio::select! {
                change = changes.recv() => match change {
                    Ok(job) => return Some((Ok(told_job(&job)), (core, changes, waiting))),
                    // Some were left out: what is at hand is what they led to.
                    Err(RecvError::Lagged(_)) => waiting = core.jobs.list().into_iter(),
                    Err(RecvError::Closed) => return None,
                },
                () = core.stop.cancelled() => return None,
            }
        }
    });
    Sse::new(ticket.while_it_holds(following)).keep_alive(KeepAlive::default()).into_response()
}

fn running(core: &Core) -> Vec<Job> {
    core.jobs.list().into_iter().filter(|job| job.state == JobState::Running).collect()
}

fn told_job(job: &Job) -> Event {
    Event::default().event("job").data(serde_json::to_string(job).expect("a job is plain data"))
}

/// An alert with what names it.
#[derive(Serialize, ToSchema)]
pub struct ListedAlert {
    id: String,
    #[serde(flatten)]
    #[schema(inline)]
    alert: Alert,
}

pub async fn alerts(State(core): State<Arc<Core>>) -> Answer {
    let state = core.store.state();
    let mut alerts: Vec<ListedAlert> =
        state.alerts.iter().map(|(id, alert)| ListedAlert { id: id.clone(), alert: alert.clone() }).collect();
    // The worst first, then the oldest.
    alerts.sort_by_key(|of| (std::cmp::Reverse(of.alert.severity), of.alert.since));
    ok(alerts)
}

#[cfg(test)]
mod tests {
    use super::last_told;

    #[test]
    fn whoever_was_cut_off_says_which_was_the_last_with_or_without_its_epoch() {
        assert_eq!(last_told("2.1234"), Some((Some(2), 1234)));
        assert_eq!(last_told("1234"), Some((None, 1234)));
        for wrong in ["", "x", "2.", ".5", "1.2.3", "-1"] {
            assert_eq!(last_told(wrong), None, "{wrong}");
        }
    }
}
