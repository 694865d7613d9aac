//! Stopping threads: a [`Stop`] says *started to stop*, a [`Gate`] says *finished*.

use std::sync::Arc;
use std::time::Duration;

use crate::sync::{Condvar, Mutex};
use crate::time::Instant;

/// A signal that can be waited for. Clones share it.
#[derive(Clone, Default)]
pub struct Stop(Arc<(Mutex<bool>, Condvar)>);

impl Stop {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn stop(&self) {
        *self.0.0.lock().expect("no panic while held") = true;
        self.0.1.notify_all();
    }

    pub fn is_stopped(&self) -> bool {
        *self.0.0.lock().expect("no panic while held")
    }

    /// Waits up to `limit`; true as soon as the stop came.
    pub fn wait_for(&self, limit: Duration) -> bool {
        let stopped = self.0.0.lock().expect("no panic while held");
        *self.0.1.wait_timeout_while(stopped, limit, |stopped| !*stopped).expect("no panic while held").0
    }
}

/// Counts holders by name; closing waits for the last one.
#[derive(Clone, Default)]
pub struct Gate(Arc<(Mutex<Holders>, Condvar)>);

#[derive(Default)]
struct Holders {
    names: Vec<String>,
    closed: bool,
}

/// Held by whoever must finish before the gate is closed.
pub struct GateGuard {
    gate: Gate,
    name: String,
}

impl Gate {
    pub fn new() -> Self {
        Self::default()
    }

    /// `None` once the gate is closing.
    pub fn enter(&self, name: impl Into<String>) -> Option<GateGuard> {
        let mut holders = self.0.0.lock().expect("no panic while held");
        if holders.closed {
            return None;
        }
        let name = name.into();
        holders.names.push(name.clone());
        Some(GateGuard { gate: self.clone(), name })
    }

    /// Lets nobody in any more and waits for the holders to leave. Names who is still there when `limit` is over.
    pub fn close(&self, limit: Duration) -> Result<(), Vec<String>> {
        let deadline = Instant::now() + limit;
        let mut holders = self.0.0.lock().expect("no panic while held");
        holders.closed = true;
        while !holders.names.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(holders.names.clone());
            }
            holders = self.0.1.wait_timeout(holders, left).expect("no panic while held").0;
        }
        Ok(())
    }
}

impl Drop for GateGuard {
    fn drop(&mut self) {
        let mut holders = self.gate.0.0.lock().expect("no panic while held");
        if let Some(index) = holders.names.iter().position(|name| *name == self.name) {
            holders.names.swap_remove(index);
        }
        self.gate.0.1.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closing_gate_names_its_last_holder() {
        let gate = Gate::new();
        let guard = gate.enter("sender").unwrap();
        assert_eq!(gate.close(Duration::from_millis(1)), Err(vec!["sender".to_owned()]));
        assert!(gate.enter("late").is_none());
        drop(guard);
        assert_eq!(gate.close(Duration::from_secs(1)), Ok(()));
    }

    #[test]
    fn a_stop_wakes_who_waits() {
        let stop = Stop::new();
        let waiter = std::thread::spawn({
            let stop = stop.clone();
            move || stop.wait_for(Duration::from_secs(60))
        });
        stop.stop();
        assert!(waiter.join().unwrap());
    }
}
