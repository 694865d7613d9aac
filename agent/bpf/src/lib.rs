#![doc = include_str!("FORMAT.md")]

pub mod device;
pub mod keep;
mod kernel;
mod maps;
pub mod tracker;

pub use device::{Device, DeviceError};
pub use keep::{KeepError, Kept, Writer};
pub use kernel::{Figures, KernelError};
pub use tracker::{BlockTracker, Found, PIN_FOLDER, TrackerError, Witness};
