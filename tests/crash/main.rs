//! Ends that nobody ordered, in the middle of replication, and what is there afterwards.

mod kills;
mod restart;
mod roles;
mod whole;
