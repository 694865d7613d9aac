//! Serves of points expire: whoever asked for one renews its lease, and when that ends the serve is stopped.
//!
//! *Crash.* Leases are in memory. After a restart every serve that a process server reports gets a fresh lease.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tidemark_base::{Clock, ServerId};
use tidemark_proto::control::{Failure, FailureKind, ServeId, ServerCommand};

use crate::core::{Core, SETTLE};
use crate::hub::{PeerId, Report};

pub const LEASE: Duration = Duration::from_secs(60);
const SWEEP: Duration = Duration::from_secs(5);

#[derive(Default)]
pub struct Serves(Mutex<HashMap<ServeId, Lease>>);

struct Lease {
    server: ServerId,
    /// On the monotonic clock.
    ends: Duration,
}

impl Serves {
    pub fn add(&self, id: ServeId, server: ServerId, clock: &dyn Clock) {
        let ends = clock.monotonic_now() + LEASE;
        self.0.lock().expect("no panic while held").insert(id, Lease { server, ends });
    }

    pub fn renew(&self, id: ServeId, clock: &dyn Clock) -> Result<(), Failure> {
        let mut leases = self.0.lock().expect("no panic while held");
        leases.get_mut(&id).map(|lease| lease.ends = clock.monotonic_now() + LEASE).ok_or_else(|| unknown(id))
    }

    fn adopt(&self, id: ServeId, server: ServerId, clock: &dyn Clock) {
        let ends = clock.monotonic_now() + LEASE;
        self.0.lock().expect("no panic while held").entry(id).or_insert(Lease { server, ends });
    }

    fn expired(&self, clock: &dyn Clock) -> Vec<ServeId> {
        let now = clock.monotonic_now();
        let leases = self.0.lock().expect("no panic while held");
        leases.iter().filter(|(_, lease)| lease.ends <= now).map(|(id, _)| *id).collect()
    }
}

fn unknown(id: ServeId) -> Failure {
    Failure::new(FailureKind::NotFound, format!("there is no serve {id}"), "it was stopped or expired; serve again")
}

/// Stops a serve; its writes are gone.
pub async fn stop(core: &Core, id: ServeId) -> Result<(), Failure> {
    let server = {
        let leases = core.serves.0.lock().expect("no panic while held");
        leases.get(&id).ok_or_else(|| unknown(id))?.server
    };
    match core.server_does(server, &ServerCommand::StopServe(id), SETTLE).await {
        Err(failure) if failure.kind != FailureKind::NotFound => Err(failure),
        _ => {
            core.serves.0.lock().expect("no panic while held").remove(&id);
            Ok(())
        }
    }
}

/// Stops what expired, and takes on what process servers still serve from before a restart.
pub async fn sweep(core: Arc<Core>) {
    while tokio::time::timeout(SWEEP, core.stop.cancelled()).await.is_err() {
        for (peer, _) in core.hub.connected() {
            if let (PeerId::ProcessServer(server), Some(Report::Server(report))) = (peer, core.hub.report(peer)) {
                report.serves.iter().for_each(|serving| core.serves.adopt(serving.serve, server, &core.clock));
            }
        }
        for id in core.serves.expired(&core.clock) {
            match stop(&core, id).await {
                Ok(()) => tracing::info!(serve = %id, "a serve that nobody renewed was stopped"),
                Err(failure) => tracing::info!(serve = %id, %failure, "an expired serve cannot be stopped yet"),
            }
        }
    }
}
