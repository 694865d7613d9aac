#![doc = include_str!("FORMAT.md")]
//!
//! * [`qmp`]: the machine protocol. * [`find`]: which QEMU has an image open, and how it is spoken to. * [`monitor`]: asked over its own socket, or
//!   through libvirt. * [`bitmaps`]: what its dirty bitmaps prove. * [`nodes`]: which node is a disk. * [`machine`]: one QEMU and the disks of
//!   it that are tracked. * [`keep`]: the images of one that is off.

pub mod bitmaps;
pub mod error;
pub mod find;
pub mod keep;
pub mod machine;
pub mod monitor;
pub mod nodes;
pub mod qmp;
mod taken;

pub use error::{QemuError, QmpError};
pub use find::Place;
pub use machine::Machine;
pub use taken::Taken;
