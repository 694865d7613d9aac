//! The process server: receives a disk's changes, keeps the replica, makes and serves recovery points.
//!
//! In the order of the path: [`accept`] (streams of hosts, verified and authorised), [`journal`] (what came, in segments),
//! [`points`] (marks that every disk of a machine holds), [`fold`] (the oldest segments become the base), [`view`] (the disk
//! at a cut), [`serve`] (points over NBD), [`export`] (points as images); [`replica`] ties one disk together, [`scrub`] reads
//! everything again, [`server`] is the role as a whole.

pub mod accept;
mod encrypted;
pub mod export;
pub mod failed_over;
pub mod fold;
pub mod journal;
pub mod offline;
pub mod points;
pub mod replica;
pub mod scrub;
pub mod serve;
pub mod server;
mod settings;
mod table;
pub mod view;
mod volume;

pub use server::failover::{FailoverDisk, FailoverState, Loss};
pub use server::{Directory, ProcessServer, ProcessServerConfig};
