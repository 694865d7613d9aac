//! What is served: the [`Export`] trait, and how a name becomes an export.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use rustls::pki_types::CertificateDer;
use tidemark_base::disk::{Allocation, Durability};
use tidemark_base::{Extent, SECTOR_BYTES};

/// One write as it lies in the receive buffer of its connection.
#[derive(Clone, Copy, Debug)]
pub struct WriteRequest<'a> {
    pub offset: u64,
    pub data: &'a [u8],
    /// Forced unit access: on stable storage before its result is given. Such a write is never executed inline.
    pub fua: bool,
}

impl WriteRequest<'_> {
    pub fn extent(&self) -> Extent {
        Extent::new(self.offset, self.data.len() as u64)
    }
}

/// What stands behind a name: a disk as its clients see it.
///
/// The server has checked every request before it gets here: not empty, inside [`bytes`](Export::bytes), a multiple of
/// [`block_bytes_min`](Export::block_bytes_min), no write where [`is_read_only`](Export::is_read_only).
/// Methods are called from many threads at once; what overlaps within one connection is called in its order.
pub trait Export: Send + Sync + 'static {
    /// The size of the disk; must not change while it is served.
    fn bytes(&self) -> u64;

    fn is_read_only(&self) -> bool {
        false
    }

    /// Offsets and lengths of requests are multiples of it: a power of two, at most 64 KiB.
    fn block_bytes_min(&self) -> u32 {
        SECTOR_BYTES as u32
    }

    /// Whether a FLUSH or FUA on one connection covers what was acknowledged on every other.
    fn multi_conn(&self) -> bool {
        true
    }

    /// Whether [`zero`](Export::zero) costs much less than writing the zeroes. Clients then clear whole disks by it.
    fn zeroes_fast(&self) -> bool {
        false
    }

    /// Fills `buffer` at once, from memory, or says `None`: then [`read`](Export::read) is called on another thread.
    /// Called on the connection's own thread, so it must not wait for a disk or the network.
    fn try_read(&self, _offset: u64, _buffer: &mut [u8]) -> Option<io::Result<()>> {
        None
    }

    /// Fills `buffer`; may take its time.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// Whether [`write_batch`](Export::write_batch) without FUA lands in memory (a page cache), so that the
    /// connection's own thread may call it. Otherwise batches go to the worker threads.
    fn writes_inline(&self) -> bool {
        false
    }

    /// Executes the writes, later ones over earlier ones where they overlap, and sets every result. A result that is
    /// not set counts as failed.
    fn write_batch(&self, writes: &[WriteRequest<'_>], results: &mut [io::Result<()>]);

    /// Makes a range read as zeroes (TRIM does as well); gives its room back where `discard` allows it.
    fn zero(&self, extent: Extent, discard: bool, durability: Durability) -> io::Result<()>;

    /// Reserves room for a range without changing what it reads as, so that writes there do not fail for want of it.
    fn allocate(&self, _extent: Extent) -> io::Result<()> {
        Err(tidemark_base::error::not_supported())
    }

    /// Everything acknowledged before is on stable storage when this returns.
    fn flush(&self) -> io::Result<()>;

    /// The run of one kind that begins at `offset`: its length, at least 1, and what it is.
    fn allocation(&self, offset: u64) -> io::Result<(u64, Allocation)>;
}

/// Who is at the other end of a connection, as far as the system or TLS proved it.
#[derive(Clone, Debug)]
pub enum Peer {
    /// A process of this machine (`SO_PEERCRED`).
    Local { uid: u32, pid: i32 },
    /// A client that authenticated itself; the first certificate is its own.
    Tls { address: SocketAddr, certificates: Vec<CertificateDer<'static>> },
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Peer::Local { uid, pid } => write!(f, "process {pid} of user {uid}"),
            Peer::Tls { address, .. } => write!(f, "{address}"),
        }
    }
}

/// Why a name cannot be opened; the client is told the message.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("there is no export {name:?}")]
    Unknown { name: String },
    #[error("this client may not open export {name:?}")]
    Forbidden { name: String },
    #[error("export {name:?} cannot be opened now: {reason}")]
    Unavailable { name: String, reason: String },
}

/// Resolves names. A name is what a client sent: it is looked up and never used as a path.
pub trait ExportProvider: Send + Sync + 'static {
    /// What NBD_OPT_LIST shows to this peer.
    fn names(&self, peer: &Peer) -> Vec<String>;

    /// Called once for each connection (and for each question about the export's size).
    fn open(&self, name: &str, peer: &Peer) -> Result<Arc<dyn Export>, OpenError>;
}

/// A table of exports that every admitted peer may open.
#[derive(Default)]
pub struct Exports(Mutex<BTreeMap<String, Arc<dyn Export>>>);

impl Exports {
    pub fn new() -> Self {
        Self::default()
    }

    /// Replaces an export of the same name; connections that have the old one open keep it.
    pub fn insert(&self, name: impl Into<String>, export: Arc<dyn Export>) {
        self.0.lock().expect("no panic while held").insert(name.into(), export);
    }

    /// No new connection opens it from now on. `Server::close_export` ends those that have it open.
    pub fn remove(&self, name: &str) -> Option<Arc<dyn Export>> {
        self.0.lock().expect("no panic while held").remove(name)
    }
}

impl ExportProvider for Exports {
    fn names(&self, _peer: &Peer) -> Vec<String> {
        self.0.lock().expect("no panic while held").keys().cloned().collect()
    }

    fn open(&self, name: &str, _peer: &Peer) -> Result<Arc<dyn Export>, OpenError> {
        let exports = self.0.lock().expect("no panic while held");
        exports.get(name).cloned().ok_or_else(|| OpenError::Unknown { name: name.to_owned() })
    }
}
