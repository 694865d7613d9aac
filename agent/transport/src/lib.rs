//! Connections between the roles: mutual TLS 1.3, who is at the other end, and HTTP/2 tuned for streams of disk data.
//!
//! *Consistency.* A connection exists only after both ends proved an identity that our own certificate authority
//! signed; the identity is a URI in the certificate (`tidemark://agent/<id>`), never an address. *Retries.* None here: a
//! channel that lost its connection dials again at its next call, with the same identity and the same expectation.
//! *Cancellation.* Dropping a listener or a channel closes it. A server that stops lets its streams end, for a limited
//! time. *Crash.* Identities and the authority are single files, replaced atomically.

mod by_path;
pub mod client;
pub mod export;
pub mod identity;
pub mod messages;
pub mod recovery;
pub mod server;
pub mod tls;

pub use by_path::ByPath;
pub use client::{ConnectError, Expected, Remote, connect, connect_noting};
pub use export::{ExportAuthority, ExportTlsError};
pub use identity::{
    Authority, Identity, IdentityError, KeyRequest, PeerIdentity, Role, certificate_digest, fingerprint,
};
pub use messages::{Message, Messages};
pub use server::{Connection, PeerInfo, TlsListener, peer_of, serve};

/// Windows and frames of HTTP/2, the same on both ends. The protocol's default window of 64 KiB allows 3 MB/s at a
/// round trip of 20 ms; these were the fastest of those measured and fit any credit that a process server grants.
pub const STREAM_WINDOW_BYTES: u32 = 8 << 20;
pub const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
pub const HTTP2_FRAME_BYTES_MAX: u32 = 1 << 20;

/// What one connection ciphers ahead of the network: a frame of disk data goes out in one call.
pub const TLS_BUFFER_BYTES: usize = 256 << 10;

/// The largest message that a service of ours decodes: a frame of chunks and what is around it.
pub const MESSAGE_BYTES_MAX: usize = tidemark_base::FRAME_BYTES_MAX + (64 << 10);

/// Streams that one connection may hold open.
pub const STREAMS_MAX: u32 = 1024;
