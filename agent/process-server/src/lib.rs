//! The process server role, in the order of the path.

pub mod accept;
