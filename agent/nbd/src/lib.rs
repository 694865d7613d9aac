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
//! The numbers and layouts are those of the protocol's specification (NetworkBlockDevice/nbd, `doc/proto.md`). Extended
//! headers, RESIZE, CACHE and metadata contexts other than `base:allocation` are not offered; clients do without.

pub mod address;
pub mod client;
pub mod disk;
pub mod export;
pub mod image;
pub mod limits;
pub mod qemu;
pub mod remote;
pub mod server;
mod stream;
mod wire;

pub use client::{Client, ClientError, ExportInfo};
pub use disk::{CachedReader, DiskExport};
pub use export::{Export, ExportProvider, Exports, OpenError, Peer, WriteRequest};
pub use limits::Limits;
pub use remote::Remote;
pub use server::{ListenError, Server, StillBusy};
