//! The server's side of a connection, over a client in memory.
//!
//! The parts of the NBD server are compiled here by themselves, with a stream of our own in the place of the socket: a
//! connection is otherwise a dozen system calls and two changes of threads, ten times what it does with its bytes.

#![allow(dead_code)]

#[path = "../../src/export.rs"]
pub mod export;
#[path = "../../src/limits.rs"]
pub mod limits;
pub mod server;
pub mod stream;
#[path = "../../src/wire.rs"]
mod wire;
