//! The NBD server: many exports by name behind Unix sockets and mutual TLS.
//!
//! One thread for each connection receives, parses and executes what lands in memory; see `session.rs`. Names come from
//! an [`ExportProvider`]; who may connect is decided by the system (Unix) or by TLS, who may open what by the provider.
//!
//! # Consistency
//! A reply is sent after the export has executed the request. Requests in flight together may be executed in any order,
//! but writes of one connection that overlap keep theirs. FLUSH and FUA are what the export makes of them.
//! # Retries
//! None: an error of the export is the client's to judge, a connection that fails is the client's to make again.
//! # Cancellation
//! [`Server::stop`] and [`Server::close_export`] end connections after the requests that were received, and wait for
//! them. A client that leaves changes nothing: what it asked for is done, then the export is released.
//! # Crash
//! Nothing of ours outlives the process but the socket file, which the next start replaces.

mod flight;
mod listen;
mod negotiate;
mod outlet;
mod pool;
mod registry;
mod session;
mod task;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustls::ServerConfig;

use crate::export::{ExportProvider, Peer};
use crate::limits::Limits;
use crate::stream::{Socket, Stream};
use negotiate::{Admission, Handshake, HandshakeError};
use registry::Registry;

pub use listen::ListenError;

/// Serves until it is stopped or dropped.
pub struct Server {
    core: Arc<Core>,
    listeners: Mutex<Vec<Listening>>,
}

struct Core {
    provider: Arc<dyn ExportProvider>,
    limits: Limits,
    registry: Arc<Registry>,
}

struct Listening {
    socket: ListeningSocket,
    path: Option<PathBuf>,
    thread: JoinHandle<()>,
}

enum ListeningSocket {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// Connections did not end in time: a disk hangs, or an export never returns.
#[derive(Debug, thiserror::Error)]
#[error("{connections} NBD connections have requests that do not end")]
pub struct StillBusy {
    pub connections: usize,
}

impl Server {
    pub fn new(provider: Arc<dyn ExportProvider>, limits: Limits) -> Self {
        Self { core: Arc::new(Core { provider, limits, registry: Arc::default() }), listeners: Mutex::default() }
    }

    /// Listens on a socket file of mode 0600 in a folder of mode 0700, which is made when it is absent. Admits
    /// processes of this process's own user, of root, and of `allowed_uids` (whom the folder must let in by an ACL).
    pub fn listen_unix(&self, path: &Path, allowed_uids: &[u32]) -> Result<(), ListenError> {
        let listener = listen::bind_unix(path)?;
        let accepting = listener.try_clone().map_err(|source| ListenError::io(path, source))?;
        let (core, allowed) = (self.core.clone(), allowed_uids.to_vec());
        let thread = spawn("nbd-accept", move || core.accept_unix(&accepting, &allowed))
            .map_err(|source| ListenError::io(path, source))?;
        let listening = Listening { socket: ListeningSocket::Unix(listener), path: Some(path.to_owned()), thread };
        self.listeners.lock().expect("no panic while held").push(listening);
        Ok(())
    }

    /// Listens on TCP, where a client can do nothing before TLS. `config` must ask for and verify client certificates:
    /// a client that shows none is turned away. Returns the address, in which port 0 has become a real one.
    pub fn listen_tcp(&self, address: SocketAddr, config: Arc<ServerConfig>) -> Result<SocketAddr, ListenError> {
        let failed = |source| ListenError::Tcp { address, source };
        let listener = TcpListener::bind(address).map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        let accepting = listener.try_clone().map_err(failed)?;
        let core = self.core.clone();
        let thread = spawn("nbd-accept", move || core.accept_tcp(&accepting, &config)).map_err(failed)?;
        let listening = Listening { socket: ListeningSocket::Tcp(listener), path: None, thread };
        self.listeners.lock().expect("no panic while held").push(listening);
        Ok(bound)
    }

    /// Serves one connection that the caller made, for example the other half of a socket pair.
    pub fn serve_stream(&self, stream: UnixStream) -> io::Result<()> {
        let peer = listen::peer_of(&stream)?;
        self.core.clone().begin(Socket::Unix(stream), Admission::Known(peer))
    }

    /// The same on the caller's thread: comes back when the connection has ended.
    pub fn serve_stream_here(&self, stream: UnixStream) -> io::Result<()> {
        let peer = listen::peer_of(&stream)?;
        let (stream, entry, deadline) = self.core.admit(Socket::Unix(stream), false)?;
        self.core.serve(&stream, Admission::Known(peer), &entry, deadline);
        Ok(())
    }

    /// How many connections have the export open.
    pub fn connections(&self, name: &str) -> usize {
        self.core.registry.connections(name)
    }

    /// Ends the connections that have the export open, after the requests that were received, and waits until the
    /// export is released. The provider must not give it out any more.
    pub fn close_export(&self, name: &str) -> Result<(), StillBusy> {
        busy(self.core.registry.end(Some(name), self.core.limits.stop_timeout))
    }

    /// Stops listening, finishes the requests that were received and ends all connections. Stopping again waits again.
    pub fn stop(&self) -> Result<(), StillBusy> {
        self.core.registry.stop_admitting();
        let listeners = std::mem::take(&mut *self.listeners.lock().expect("no panic while held"));
        for Listening { socket, path, thread } in listeners {
            // Wakes the accepting thread: Linux lets a listening socket be shut down.
            let _ = match &socket {
                ListeningSocket::Unix(socket) => listen::shut(socket),
                ListeningSocket::Tcp(socket) => listen::shut(socket),
            };
            let _ = thread.join();
            if let Some(path) = path {
                // A start that finds it replaces it.
                let _ = std::fs::remove_file(path);
            }
        }
        busy(self.core.registry.end(None, self.core.limits.stop_timeout))
    }
}

fn busy(connections: usize) -> Result<(), StillBusy> {
    if connections == 0 { Ok(()) } else { Err(StillBusy { connections }) }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::error!(%error, "NBD server dropped while it is busy");
        }
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(run)
}

impl Core {
    fn begin(self: Arc<Self>, socket: Socket, admission: Admission) -> io::Result<()> {
        let is_remote = matches!(admission, Admission::Tls { .. });
        let (stream, entry, deadline) = self.admit(socket, is_remote)?;
        spawn("nbd-connection", move || {
            // Dropped last: who waits for the end of connections waits for this.
            let entry = entry;
            self.serve(&stream, admission, &entry, deadline);
            drop(stream);
        })
        .map(drop)
    }

    fn admit(&self, socket: Socket, is_remote: bool) -> io::Result<(Arc<Stream>, registry::Entry, Instant)> {
        let deadline = Instant::now() + self.limits.handshake_timeout;
        let stream = Arc::new(Stream::new(socket));
        match self.registry.admit(&stream, is_remote, &self.limits) {
            Some(entry) => Ok((stream, entry, deadline)),
            None => Err(io::Error::new(io::ErrorKind::QuotaExceeded, "too many NBD connections in the handshake")),
        }
    }

    fn serve(&self, stream: &Arc<Stream>, admission: Admission, entry: &registry::Entry, deadline: Instant) {
        let handshake = Handshake {
            stream,
            provider: &*self.provider,
            registry: &self.registry,
            limits: &self.limits,
            connection: entry.number,
            deadline,
        };
        let connection = entry.number;
        let negotiated = match handshake.run(admission) {
            Ok(negotiated) => negotiated,
            Err(HandshakeError::Left) => return tracing::debug!(connection, "client left in the NBD handshake"),
            Err(error) => {
                let source = std::error::Error::source(&error).map(ToString::to_string);
                stream.shutdown(std::net::Shutdown::Both);
                return tracing::info!(connection, %error, source, "NBD handshake failed");
            }
        };
        if let Err(error) = stream.set_timeout(None) {
            return tracing::info!(connection, %error, "NBD connection failed");
        }
        let (export, peer) = (negotiated.lease.name.clone(), negotiated.peer.to_string());
        tracing::debug!(connection, export, peer, "NBD export opened");
        match session::run(stream, negotiated, &self.limits, entry.ending.clone()) {
            Ok(()) => tracing::debug!(connection, export, "NBD connection ended"),
            Err(error) => tracing::info!(connection, export, %error, "NBD connection ended"),
        }
    }

    fn accept_unix(self: Arc<Self>, listener: &UnixListener, allowed: &[u32]) {
        self.accept(
            || listener.accept().map(|(stream, _)| stream),
            |stream| {
                let peer = listen::peer_of(&stream)?;
                let Peer::Local { uid, .. } = peer else { return Err(io::ErrorKind::PermissionDenied.into()) };
                if !listen::may_connect(uid, allowed) {
                    return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("user {uid} may not connect")));
                }
                Ok((Socket::Unix(stream), Admission::Known(peer)))
            },
        );
    }

    fn accept_tcp(self: Arc<Self>, listener: &TcpListener, config: &Arc<ServerConfig>) {
        self.accept(
            || listener.accept(),
            |(stream, address)| {
                stream.set_nodelay(true)?;
                listen::keep_alive(&stream)?;
                Ok((Socket::Tcp(stream), Admission::Tls { address, config: config.clone() }))
            },
        );
    }

    fn accept<S>(
        self: &Arc<Self>,
        next: impl Fn() -> io::Result<S>,
        admit: impl Fn(S) -> io::Result<(Socket, Admission)>,
    ) {
        let pause = tidemark_base::stop::Stop::new();
        let mut failing = false;
        loop {
            let accepted = next();
            if self.registry.is_stopping() {
                return;
            }
            match accepted {
                Ok(stream) => {
                    failing = false;
                    let begun = admit(stream).and_then(|(socket, admission)| self.clone().begin(socket, admission));
                    if let Err(error) = begun {
                        tracing::info!(%error, "NBD connection refused");
                    }
                }
                // Out of descriptors or memory: others may give some back. Said once, not ten times a second.
                Err(error) => {
                    if !failing {
                        tracing::warn!(%error, "NBD connections cannot be accepted for now");
                    }
                    failing = true;
                    pause.wait_for(Duration::from_millis(100));
                }
            }
        }
    }
}
