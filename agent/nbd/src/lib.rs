//! The NBD protocol, for both ends of Tidemark: the front end of protected disks and the serving of recovery points.

pub mod client;
pub mod disk;
pub mod export;
pub mod limits;
pub mod server;
mod stream;
mod wire;

pub use client::{Client, ClientError, ExportInfo};
pub use disk::{CachedReader, DiskExport};
pub use export::{Export, ExportProvider, Exports, OpenError, Peer, WriteRequest};
pub use limits::Limits;
pub use server::{ListenError, Server, StillBusy};
