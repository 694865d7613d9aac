//! Ends that nobody ordered, in the middle of replication, and what is there afterwards.

mod restart;
mod roles;
mod whole;
