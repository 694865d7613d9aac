//! The host role, in the order of the path of a write.

pub mod attach;
pub mod capture;
pub mod consumer;
pub mod error;
pub mod freeze;
pub mod log;
pub mod pack;
pub mod protected;
pub mod scan;
pub mod send;
pub mod source;
pub mod state;
