#![doc = include_str!("FORMAT.md")]
//!
//! * [`address`]: how a disk is named. * [`settings`]: how a vCenter is reached. * [`tls`]: which one it is. * [`http`]: requests. * [`soap`], [`session`]: the
//!   vSphere API. * [`inventory`]: machines, disks, snapshots. * [`changes`]: what changed. * [`flat`]: what a disk holds. * [`kept`]: change ids on
//!   durable media. * [`machine`]: one machine and the disks of it that are tracked.

pub mod address;
pub mod changes;
pub mod error;
pub mod flat;
pub mod http;
pub mod inventory;
pub mod kept;
pub mod machine;
mod permits;
pub mod session;
pub mod settings;
pub mod soap;
pub mod tls;

pub use address::DiskAddress;
pub use error::VsphereError;
pub use machine::{Live, Machine, Taken};
pub use session::Session;
