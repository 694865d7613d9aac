//! A listener of its own for clients elsewhere: some exports over TCP, with mutual TLS, and what these clients are told.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use rustls::ServerConfig;

use crate::address;
use crate::export::Exports;
use crate::limits::Limits;
use crate::server::{ListenError, Server};

pub struct Remote {
    pub server: Server,
    /// What its clients can open: nothing else that is served here.
    pub exports: Arc<Exports>,
    pub address: SocketAddr,
    /// What a client needs, where the listener is.
    client_folder: PathBuf,
}

impl Remote {
    /// Listens; port 0 takes any.
    pub fn listen(at: SocketAddr, config: Arc<ServerConfig>, client_folder: PathBuf) -> Result<Self, ListenError> {
        let exports = Arc::new(Exports::new());
        let server = Server::new(exports.clone(), Limits::default());
        let address = server.listen_tcp(at, config)?;
        Ok(Self { server, exports, address, client_folder })
    }

    pub fn uri(&self, name: &str) -> String {
        address::tls_uri(name, self.address, &self.client_folder)
    }
}
