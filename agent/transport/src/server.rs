//! Listening: one accept loop, handshakes beside it, and connections that know who is at their other end.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, ToSocketAddrs};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::{Service, http};
use tonic::transport::Server;
use tonic::transport::server::Connected;

use crate::client::{KEEP_ALIVE_INTERVAL, KEEP_ALIVE_TIMEOUT};
use crate::identity::{PeerIdentity, certificate_digest};
use crate::{CONNECTION_WINDOW_BYTES, HTTP2_FRAME_BYTES_MAX, STREAM_WINDOW_BYTES, STREAMS_MAX, TLS_BUFFER_BYTES};

/// Handshakes under way at once. One more takes the place of the oldest: connections that say nothing, however many, keep
/// nobody out, and an honest handshake is done long before as many others began.
pub const HANDSHAKES_MAX: usize = 64;
/// Connections open at once.
pub const CONNECTIONS_MAX: usize = 1024;
/// A handshake that is not done by then is dropped.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long streams may take to end once a server stops; then their connections are cut.
pub const STOP_GRACE: Duration = Duration::from_secs(5);
/// Pause after the system could not accept (out of file descriptors, most often).
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Who is at the other end of a request's connection; in the request's extensions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PeerInfo {
    /// `None` only where the listener asks for no certificate.
    pub identity: Option<PeerIdentity>,
    /// [`certificate_digest`] of the certificate that it showed.
    pub certificate: Option<[u8; 32]>,
    pub address: SocketAddr,
}

/// The proven identity behind a gRPC request.
pub fn peer_of<T>(request: &tonic::Request<T>) -> Option<PeerIdentity> {
    request.extensions().get::<PeerInfo>()?.identity
}

/// A TLS connection. Closes when it is dropped, or when its listener is told to cut what is left.
pub struct Connection {
    stream: TlsStream<TcpStream>,
    peer: PeerInfo,
    cut: Option<Pin<Box<dyn Future<Output = bool> + Send>>>,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    pub fn peer(&self) -> PeerInfo {
        self.peer
    }
}

/// Accepts TCP connections and does their handshakes in the background, so that a slow one holds up no other.
pub struct TlsListener {
    connections: mpsc::Receiver<Connection>,
    address: SocketAddr,
    cut: watch::Sender<bool>,
}

impl TlsListener {
    /// `config` is one of [`crate::tls`]. With a mutual one, a certificate that names no role is refused as well.
    pub async fn bind(address: impl ToSocketAddrs, config: Arc<ServerConfig>) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let (sender, connections) = mpsc::channel(1);
        let (cut, cut_seen) = watch::channel(false);
        tokio::spawn(accept_loop(listener, TlsAcceptor::from(config), sender, cut_seen));
        Ok(Self { connections, address, cut })
    }

    pub fn local_address(&self) -> SocketAddr {
        self.address
    }

    /// The next connection whose handshake is done. Cancel safe.
    pub async fn accept(&mut self) -> Connection {
        match self.connections.recv().await {
            Some(connection) => connection,
            // The accept loop ends only when this listener is gone or the runtime stops.
            None => std::future::pending().await,
        }
    }
}

async fn accept_loop(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    sender: mpsc::Sender<Connection>,
    cut: watch::Receiver<bool>,
) {
    // Of those under way, the oldest first; each ends when its sender is dropped.
    let mut handshakes: VecDeque<oneshot::Sender<()>> = VecDeque::new();
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await.expect("the semaphore is never closed");
            listener.accept().await.map(|(stream, address)| (stream, address, place))
        };
        let (stream, address, place) = tokio::select! {
            () = sender.closed() => return,
            accepted = accepted => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection; trying again");
                    if tokio::time::timeout(ACCEPT_PAUSE, sender.closed()).await.is_ok() {
                        return;
                    }
                    continue;
                }
            },
        };
        handshakes.retain(|handshake| !handshake.is_closed());
        if handshakes.len() == HANDSHAKES_MAX {
            handshakes.pop_front();
        }
        let (handshake, displaced) = oneshot::channel::<()>();
        handshakes.push_back(handshake);
        let (acceptor, sender, cut) = (acceptor.clone(), sender.clone(), cut.clone());
        tokio::spawn(async move {
            let handshaking = tokio::time::timeout(HANDSHAKE_TIMEOUT, shake_hands(&acceptor, stream));
            let result = tokio::select! {
                () = sender.closed() => return,
                _ = displaced => Err(io::Error::other("too many handshakes began after its own")),
                result = handshaking => result.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())),
            };
            match result {
                Ok((stream, shown)) => {
                    let (identity, certificate) = shown.unzip();
                    let peer = PeerInfo { identity, certificate, address };
                    let _ = sender.send(Connection { stream, peer, cut: Some(until_cut(cut)), _place: place }).await;
                }
                Err(error) => tracing::info!(%address, %error, "refused a connection"),
            }
        });
    }
}

fn until_cut(mut cut: watch::Receiver<bool>) -> Pin<Box<dyn Future<Output = bool> + Send>> {
    Box::pin(async move { cut.wait_for(|cut| *cut).await.is_ok() })
}

async fn shake_hands(
    acceptor: &TlsAcceptor,
    stream: TcpStream,
) -> io::Result<(TlsStream<TcpStream>, Option<(PeerIdentity, [u8; 32])>)> {
    stream.set_nodelay(true)?;
    let mut stream = acceptor.accept(stream).await?;
    stream.get_mut().1.set_buffer_limit(Some(TLS_BUFFER_BYTES));
    let identity = match stream.get_ref().1.peer_certificates().and_then(<[_]>::first) {
        Some(certificate) => {
            let identity = PeerIdentity::of_certificate(certificate).map_err(io::Error::other)?;
            Some((identity, certificate_digest(certificate)))
        }
        None => None,
    };
    Ok((stream, identity))
}

/// Serves one gRPC service until `stop`; then takes no more connections, gives streams [`STOP_GRACE`] to end, and cuts
/// what is left.
pub async fn serve<S>(
    listener: TlsListener,
    service: S,
    stop: impl Future<Output = ()> + Send,
) -> Result<(), tonic::transport::Error>
where
    S: Service<http::Request<tonic::body::Body>, Response = http::Response<tonic::body::Body>, Error = Infallible>
        + Clone
        + Send
        + 'static,
    S::Future: Send,
{
    let TlsListener { connections, cut, .. } = listener;
    let (stopping, mut stopping_seen) = watch::channel(false);
    let stop = async move {
        stop.await;
        let _ = stopping.send(true);
    };
    let serving = Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(HTTP2_FRAME_BYTES_MAX)
        .max_concurrent_streams(STREAMS_MAX)
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
        .serve_with_incoming_shutdown(service, ReceiverStream::new(connections).map(Ok::<_, Infallible>), stop);
    let cutting = async {
        // An error means that the server ended by itself; it is what returns below.
        if stopping_seen.wait_for(|stopping| *stopping).await.is_ok() {
            let _ = tokio::time::timeout(STOP_GRACE, std::future::pending::<()>()).await;
            cut.send_replace(true);
        }
        std::future::pending::<Infallible>().await
    };
    tokio::select! {
        result = serving => result,
        never = cutting => match never {},
    }
}

impl Connected for Connection {
    type ConnectInfo = PeerInfo;

    fn connect_info(&self) -> PeerInfo {
        self.peer
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if let Some(cut) = &mut this.cut
            && let Poll::Ready(is_cut) = cut.as_mut().poll(context)
        {
            if is_cut {
                return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
            }
            // Nobody is left who could cut it.
            this.cut = None;
        }
        Pin::new(&mut this.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(context, data)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(context, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}
