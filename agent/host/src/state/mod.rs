#![doc = include_str!("FORMAT.md")]

pub mod dirty;
pub mod intent;
pub mod sealed;
pub mod session;
pub mod slots;
