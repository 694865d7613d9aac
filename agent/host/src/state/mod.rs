#![doc = include_str!("FORMAT.md")]

pub mod dirty;
pub mod intent;
pub mod session;
pub mod slots;
