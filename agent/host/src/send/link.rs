//! What carries frames: gRPC ([`super::grpc`]), or a simulation.

use std::net::IpAddr;
use std::sync::Arc;

use tidemark_proto::replication::{HostFrame, ServerFrame};

use crate::pack::Permit;

/// Which connection a stream uses: scans never stand in the way of live changes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Traffic {
    Live,
    Scan,
}

/// Why a stream ended without the server saying so in a frame.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LinkError {
    #[error("cannot reach the process server: {reason}")]
    Unreachable { reason: String, help: String },
    /// The stream was cut; what was not acknowledged is sent again.
    #[error("the stream was cut: {reason}")]
    Cut { reason: String },
    /// The server sent what the protocol does not allow.
    #[error("the process server broke the protocol: {reason}")]
    Protocol { reason: String },
}

impl LinkError {
    pub fn help(&self) -> &str {
        match self {
            LinkError::Unreachable { help, .. } => help,
            LinkError::Cut { .. } => "nothing: it is opened again",
            LinkError::Protocol { .. } => "check that agent and process server are of the same version",
        }
    }
}

/// Opens streams to one process server.
pub trait Link: Send + Sync {
    /// Begins to open a stream and returns at once: that it failed is told to `events`, as is all that comes back.
    fn open(&self, traffic: Traffic, events: Arc<dyn LinkEvents>) -> Box<dyn LinkStream>;

    /// The address that was dialled last; `None`: none yet, or the link has no addresses.
    fn remote(&self) -> Option<IpAddr> {
        None
    }
}

/// One stream. Dropping it resets it: the server discards a cut that was not ended.
pub trait LinkStream: Send {
    /// Queues a frame. Never blocks; the permit of data is dropped when the frame leaves for the network, which is
    /// what keeps the queue short.
    fn send(&mut self, frame: HostFrame, permit: Option<Permit>) -> Result<(), LinkError>;

    /// No frame follows. What was queued is still sent.
    fn finish(&mut self);
}

/// Where a stream tells what came.
pub trait LinkEvents: Send + Sync {
    /// False when nobody listens any more: the stream can be reset.
    fn frame(&self, frame: ServerFrame) -> bool;
    fn closed(&self, error: LinkError);
}
