//! Real virtual machines whose disk is protected: they write, are drilled, and what boots elsewhere is judged by the guest itself.
//!
//! The guest keeps a chain on its file system: one line a record, with the record's number and the digest of the line before.
//! Booting, it checks the whole chain and says how long it is; then it goes on with it, saying each record that it has synced.

mod drill;
mod elsewhere;
mod failback;
mod failover;
mod generations;
mod group;
mod qemu;
mod shutdown;
mod stream;
