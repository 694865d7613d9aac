//! The NBD protocol (newstyle, structured replies), for both ends of Tidemark: the front end of protected disks and
//! the serving of recovery points.
//!
//! * [`export`]: what is served. The host's capture and the process server's views implement [`Export`], an
//!   [`ExportProvider`] finds one by its name.
//! * [`disk`]: any [`Disk`](tidemark_base::disk::Disk) as an export, the reference of the others.
//! * [`server`]: one thread for each connection; writes that arrived together are one [`Export::write_batch`], straight
//!   from the receive buffer. Unix sockets, and TCP under mutual TLS.
//! * [`address`]: how clients are told where an export is.
//! * [`remote`]: a listener of its own for clients elsewhere.
//! * [`client`]: a blocking client with pipelined writes.
//! * [`qemu`]: images of other formats, through `qemu-nbd`; [`image`]: one as a disk that a guest writes to.
//!
//! On Windows there is what is served, which the write path of the host stands on, and nothing that serves it.
//!
//! The numbers and layouts are those of the protocol's specification (NetworkBlockDevice/nbd, `doc/proto.md`). Extended
//! headers, RESIZE, CACHE and metadata contexts other than `base:allocation` are not offered; clients do without.

pub mod address;
mod cached;
#[cfg(unix)]
pub mod client;
pub mod disk;
pub mod export;
#[cfg(unix)]
pub mod image;
pub mod limits;
#[cfg(unix)]
pub mod qemu;
#[cfg(unix)]
pub mod remote;
#[cfg(unix)]
pub mod server;
#[cfg(unix)]
mod stream;
#[cfg(unix)]
mod wire;

pub use cached::CachedReader;
#[cfg(unix)]
pub use client::{Client, ClientError, ExportInfo};
pub use disk::DiskExport;
pub use export::{Export, ExportProvider, Exports, OpenError, Peer, WriteRequest};
pub use limits::Limits;
#[cfg(unix)]
pub use remote::Remote;
#[cfg(unix)]
pub use server::{ListenError, Server, StillBusy};
