//! Waiting for a condition, never for a time alone.

use std::time::{Duration, Instant};

use tidemark_base::stop::Stop;

/// Asks `condition` until it holds. Panics with `what` when `limit` is over.
#[track_caller]
pub fn until<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    let never = Stop::new();
    let mut pause = Duration::from_millis(2);
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited {limit:?} in vain: {what}");
        never.wait_for(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

/// Waits until a moment has passed, where passing time *is* the condition: marks are made each second.
pub fn until_passed(moment: Instant) {
    Stop::new().wait_for(moment.saturating_duration_since(Instant::now()));
}
