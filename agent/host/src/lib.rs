//! The host role, in the order of the path of a write.

pub mod source;
