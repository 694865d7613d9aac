//! What one client, and all clients together, may take.

use std::time::Duration;

/// Limits of a [`Server`](crate::server::Server). At a limit a connection is refused or waits; nothing grows past it.
#[derive(Clone, Debug)]
pub struct Limits {
    /// From the accepted connection to the transmission phase, TLS included.
    pub handshake_timeout: Duration,
    /// Connections that have not chosen an export yet, local and remote ones each; further ones are closed at once.
    pub connections_in_handshake_max: usize,
    /// Connections that have one export open; a further one is told so.
    pub connections_per_export_max: usize,
    /// Data of one READ or WRITE, as announced in the block size constraints. A connection buffers at most one such
    /// write that is not complete, on top of `in_flight_bytes_max`; the data of a longer one is skipped.
    pub request_bytes_max: u32,
    /// Data of one option in the handshake; a longer option ends the connection.
    pub option_bytes_max: u32,
    /// Options in one handshake.
    pub options_max: u32,
    /// Memory of one connection's requests that wait for a worker thread or for the client to read its replies. The
    /// connection is not read while it is used up. At least `request_bytes_max`.
    pub in_flight_bytes_max: usize,
    /// Requests of one connection at the worker threads.
    pub in_flight_requests_max: usize,
    /// Threads for what must not block a connection: FLUSH, TRIM, uncached reads. Started when needed.
    pub workers_per_export_max: usize,
    /// How long `stop` lets a client read the replies of finished requests before its connection is cut.
    pub stop_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(10),
            connections_in_handshake_max: 32,
            connections_per_export_max: 16,
            request_bytes_max: 32 << 20,
            option_bytes_max: 64 << 10,
            options_max: 64,
            in_flight_bytes_max: 64 << 20,
            in_flight_requests_max: 256,
            workers_per_export_max: 4,
            stop_timeout: Duration::from_secs(5),
        }
    }
}
