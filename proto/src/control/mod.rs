//! The control stream: what agents and process servers are told, and what they say.
//!
//! [`wire`] is generated; everything that is received becomes a type of [`model`] by `TryFrom` before anyone acts on it.

mod convert;
mod inventory;
mod model;
mod policy;

pub mod wire {
    tonic::include_proto!("tidemark.control.v1");
}

pub use convert::{WireError, neighbours, reply_to};
pub use inventory::*;
pub use model::*;
pub use policy::*;

/// The version of the stream that this build speaks.
pub const VERSION: u32 = 1;

/// The longest text that a message may carry: a path, a label, a reason.
pub const TEXT_BYTES_MAX: usize = 8192;
/// The most disks of one machine.
pub const DISKS_MAX: usize = 256;
/// The most process servers that one machine feeds: each costs its host a sender a disk.
pub const SERVERS_MAX: usize = 4;
/// The most machines of one group.
pub const GROUP_MACHINES_MAX: usize = 64;
/// Flag of a point that every machine of its group has, and of one that was made behind the barrier and that they may have.
pub const GROUP_POINT: &str = "group";
pub const GROUP_CANDIDATE: &str = "group unconfirmed";
/// The longest that a barrier may hold writes.
pub const HOLD_LIMIT_MAX: std::time::Duration = std::time::Duration::from_secs(10);
/// The most events of one batch.
pub const EVENTS_MAX: usize = 256;
/// The most addresses of a configuration server.
pub const ADDRESSES_MAX: usize = 16;
/// The most process servers that an agent is told of, to ask them where the configuration server is.
pub const NEIGHBOURS_MAX: usize = 8;
/// The most disks that a host tells of: with the limits below, a message stays far below what one may be.
pub const INVENTORY_DISKS_MAX: usize = 1024;
/// The longest text of an inventory.
pub const INVENTORY_TEXT_BYTES_MAX: usize = 512;
/// The longest word of an inventory: a kind, a way.
pub const INVENTORY_WORD_BYTES_MAX: usize = 32;
/// The most uses of one disk that are told.
pub const INVENTORY_USES_MAX: usize = 16;
/// The most ways of capture of one disk.
pub const INVENTORY_WAYS_MAX: usize = 16;
