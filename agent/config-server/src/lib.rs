//! The configuration server: who is there, what is wanted, and what is happening.
//!
//! It knows every host, process server, machine, disk and policy; tells agents and process servers what is wanted over
//! the streams that they keep ([`hub`]); and answers operators over REST ([`api`]). It never sees disk data, and losing
//! it stops no replication.
//!
//! *Consistency.* One database, [`database`], holds what is wanted ([`store`]); it is durable before anyone is told. *Retries.* What is
//! wanted is told again whenever an agent or a process server connects, until it was done ([`reconcile`]). *Cancellation.*
//! A job that was interrupted leaves what is wanted; reconciling finishes it. *Crash.* A change of the state is there or not.

mod alerts;
mod announce;
pub mod api;
pub mod backup;
pub mod barrier;
mod console;
mod consumers;
mod core;
mod cycles;
pub mod database;
mod deliver;
mod denials;
mod disks;
mod failover;
mod groups;
pub mod history;
pub mod hub;
pub mod identity;
pub mod installation;
mod inventory;
pub mod jobs;
mod kept;
mod machines;
pub mod model;
mod names;
mod plans;
mod points;
mod policies;
mod reconcile;
mod removal;
mod retry;
mod room;
mod schedule;
mod server;
mod serves;
mod status;
pub mod store;

pub use api::write_token;
pub use server::{ConfigServer, Options, StartError, init};
