//! The server and the client as the rest of the world sees them.

mod handshake;
mod raw;
mod tls;
mod tools;
mod transmission;
