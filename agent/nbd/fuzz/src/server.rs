//! What `Server` does for a connection, without its listeners.

#[path = "../../src/server/flight.rs"]
mod flight;
#[path = "../../src/server/negotiate.rs"]
mod negotiate;
#[path = "../../src/server/outlet.rs"]
mod outlet;
#[path = "../../src/server/pool.rs"]
mod pool;
#[path = "../../src/server/registry.rs"]
mod registry;
#[path = "../../src/server/session.rs"]
mod session;
#[path = "../../src/server/task.rs"]
mod task;

use std::sync::Arc;
use std::time::Instant;

use crate::export::{ExportProvider, Peer};
use crate::limits::Limits;
use crate::stream::Stream;
use negotiate::{Admission, Handshake};
use registry::Registry;

pub struct Server {
    provider: Arc<dyn ExportProvider>,
    limits: Limits,
    registry: Arc<Registry>,
}

impl Server {
    /// As long as a connection has an export open, its worker threads stay: one of ours has each of `kept` open for ever.
    pub fn new(provider: Arc<dyn ExportProvider>, limits: Limits, kept: &[&str]) -> Self {
        let registry: Arc<Registry> = Arc::default();
        for name in kept {
            std::mem::forget(registry.lease(0, name, &limits).expect("it is the first one"));
        }
        Self { provider, limits, registry }
    }

    /// To the end of the connection.
    pub fn serve(&self, stream: Stream) {
        let stream = Arc::new(stream);
        let entry = self.registry.admit(&stream, false, &self.limits).expect("one connection at a time");
        let handshake = Handshake {
            stream: &stream,
            provider: &*self.provider,
            registry: &self.registry,
            limits: &self.limits,
            connection: entry.number,
            deadline: Instant::now() + self.limits.handshake_timeout,
        };
        if let Ok(negotiated) = handshake.run(Admission::Known(Peer::Local { uid: 0, pid: 0 })) {
            let _ = session::run(&stream, negotiated, &self.limits, entry.ending.clone());
        }
    }

    pub fn connections(&self, name: &str) -> usize {
        self.registry.connections(name)
    }
}
