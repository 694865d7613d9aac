//! The host role, in the order of the path of a write.

pub mod pack;
pub mod scan;
pub mod send;
pub mod source;
