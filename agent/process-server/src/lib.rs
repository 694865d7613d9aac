//! The process server role, in the order of the path.
//!
//! [`accept`] (streams of hosts), [`journal`] (what came, in segments), [`points`] (marks that every disk of a machine
//! holds), [`fold`] (the oldest segments become the base), [`view`] (the disk at a cut); [`replica`] ties the storage
//! together, [`scrub`] reads everything again.

pub mod accept;
pub mod fold;
pub mod journal;
pub mod points;
pub mod replica;
pub mod scrub;
pub mod view;
