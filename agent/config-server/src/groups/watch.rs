//! The points that groups have by themselves, and what follows from them.
//!
//! *Consistency.* One barrier of a group at a time. *Retries.* The next interval; process servers are told again while they stand elsewhere.
//! *Cancellation.* At the server's stop. *Crash.* Intervals begin anew; what is a point of the group is asked of the process servers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tidemark_base::Clock;
use tidemark_proto::control::{FailureKind, Severity};
use tokio::task::JoinHandle;

use super::points;
use crate::core::Core;
use crate::history::News;

const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What is remembered of one group.
struct Seen {
    /// When its next point is due.
    due: Duration,
    interval_seconds: u64,
    marking: Option<JoinHandle<Option<String>>>,
    /// Why it has no points by itself, as it was told.
    complaint: Option<String>,
    standing: Option<points::Standing>,
}

pub async fn watch(core: Arc<Core>) {
    let mut groups: BTreeMap<String, Seen> = BTreeMap::new();
    while tokio::time::timeout(LOOK_EVERY, core.stop.cancelled()).await.is_err() {
        let state = core.store.state();
        groups.retain(|name, _| state.groups.contains_key(name));
        let now = core.clock.monotonic_now();
        for (name, group) in &state.groups {
            let interval = Duration::from_secs(group.interval_seconds);
            let seen = groups.entry(name.clone()).or_insert_with(|| Seen {
                due: now + interval,
                interval_seconds: group.interval_seconds,
                marking: None,
                complaint: None,
                standing: None,
            });
            if seen.interval_seconds != group.interval_seconds {
                (seen.due, seen.interval_seconds) = (now + interval, group.interval_seconds);
            }
            if seen.marking.as_ref().is_some_and(JoinHandle::is_finished)
                && let Some(marking) = seen.marking.take()
            {
                tell(&core, name, &mut seen.complaint, marking.await.unwrap_or(None));
            }
            if !interval.is_zero() && now >= seen.due && seen.marking.is_none() {
                seen.due = now + interval;
                seen.marking = Some(tokio::spawn(mark(core.clone(), name.clone())));
            }
            if let Err(failure) = points::settle(&core, name, &mut seen.standing).await {
                tracing::debug!(group = name, %failure, "the newest point of a group is not known everywhere yet");
            }
        }
        if let Err(failure) = points::let_go(&core, &state).await {
            tracing::debug!(%failure, "a machine that left its group still keeps a point for it");
        }
    }
}

/// Makes a point; says why there can be none.
async fn mark(core: Arc<Core>, name: String) -> Option<String> {
    // One of each machine by itself was told as an event.
    match points::make(&core, &name, "").await {
        Ok(_) => None,
        // Nobody waits for points of a group that has no machines.
        Err(failure) if failure.kind == FailureKind::NotFound || is_empty(&core, &name) => None,
        Err(failure) => Some(failure.message),
    }
}

fn is_empty(core: &Core, name: &str) -> bool {
    super::members(&core.store.state(), name).is_empty()
}

/// Once for each reason, and once when it is over.
fn tell(core: &Core, name: &str, complaint: &mut Option<String>, now: Option<String>) {
    if *complaint == now {
        return;
    }
    let (severity, message, help) = match &now {
        Some(reason) => {
            let help = "its machines go on having points of their own; see `tidemark group show NAME`";
            (Severity::Warning, format!("group {name} has no points at one instant now: {reason}"), help)
        }
        None => (Severity::Info, format!("group {name} has points at one instant again"), ""),
    };
    core.history.note(News { severity, kind: "group_points", machine: None, message, help: help.to_owned() });
    *complaint = now;
}
