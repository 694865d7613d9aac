#![doc = include_str!("FORMAT.md")]
//!
//! * [`hypervisor`]: what is asked of Hyper-V. * [`changes`]: what changed. * [`kept`]: change ids, and what of a machine is ours, on durable media.
//!   * [`machine`]: one machine and the disks of it that are tracked. * `windows`: Hyper-V itself.

pub mod changes;
pub mod error;
pub mod hypervisor;
pub mod kept;
pub mod machine;
#[cfg(windows)]
pub mod windows;

pub use error::RctError;
pub use hypervisor::Hypervisor;
pub use machine::{Live, Machine, Taken};
