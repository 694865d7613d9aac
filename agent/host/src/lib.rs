//! The host role, in the order of the path of a write.

pub mod attach;
pub mod capture;
pub mod consumer;
pub mod error;
pub mod events;
pub mod freeze;
pub mod host;
#[cfg(unix)]
pub mod inventory;
pub mod ledger;
pub mod log;
pub mod machine;
pub mod mark;
pub mod master_target;
pub mod pack;
mod platform;
pub mod protected;
pub mod scan;
pub mod send;
pub mod source;
pub mod state;
#[cfg(test)]
mod tests;

pub use error::HostError;
pub use host::{Host, HostConfig, HostLimits, LinkFactory, MachineStatus};
pub use mark::MarkOutcome;
pub use master_target::MasterTargets;
