//! What crosses between the roles: generated wire types, and the validated types that each receiver makes of them.

pub mod control;
pub mod failback;
pub mod health;
pub mod replication;
