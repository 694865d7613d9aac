//! The server and the client as the rest of the world sees them.

#![cfg(unix)]

mod handshake;
mod raw;
mod tls;
mod tools;
mod transmission;
