//! Dialling another role.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tidemark_base::Timestamp;
use tidemark_base::error::with_causes;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};

use crate::identity::{Identity, PeerIdentity, Role, Validity};
use crate::{CONNECTION_WINDOW_BYTES, HTTP2_FRAME_BYTES_MAX, STREAM_WINDOW_BYTES, TLS_BUFFER_BYTES, tls};

/// How long dialling and the handshake may take together.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection that says nothing for so long is asked whether it lives, and given up when it does not answer.
pub(crate) const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(20);
pub(crate) const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// Who must answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Expected {
    /// Any server of this role that our authority vouches for.
    Role(Role),
    /// This one: what agents pin.
    Peer(PeerIdentity),
}

impl Expected {
    pub fn matches(&self, peer: &PeerIdentity) -> bool {
        match self {
            Expected::Role(role) => peer.role() == *role,
            Expected::Peer(expected) => peer == expected,
        }
    }
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Expected::Role(role) => write!(f, "a {role}"),
            Expected::Peer(peer) => peer.fmt(f),
        }
    }
}

impl From<PeerIdentity> for Expected {
    fn from(peer: PeerIdentity) -> Self {
        Expected::Peer(peer)
    }
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("{address:?} is no address of the form HOST:PORT")]
    Address { address: String },
    #[error("cannot reach {address}: {reason}")]
    Unreachable { address: String, reason: String },
    #[error("no secure connection with {address}: {reason}")]
    Refused { address: String, reason: String },
    #[error("no secure connection with {address}, whose certificate does not hold at this machine's time: {reason}")]
    Clock { address: String, reason: String },
    #[error("the identity {identity} cannot be used: {reason}")]
    Identity { identity: PeerIdentity, reason: String },
    #[error("the certificate of {identity} holds from {begins} until {expires}, and this machine's clock says {now}")]
    Expired { identity: PeerIdentity, begins: Timestamp, expires: Timestamp, now: Timestamp },
}

impl ConnectError {
    /// What to do about it.
    pub fn help(&self) -> &'static str {
        match self {
            ConnectError::Address { .. } => "give an address such as backup.example.org:7443 or [2001:db8::1]:7443",
            ConnectError::Unreachable { .. } => {
                "check that the server runs, that the address is right, and that no firewall is between"
            }
            ConnectError::Refused { .. } => {
                "check that both ends were registered with the same configuration server and that their clocks agree"
            }
            ConnectError::Clock { .. } => {
                "set the clocks of both machines; where they are right, renew that certificate"
            }
            ConnectError::Identity { .. } => "register this role again to get a new certificate",
            ConnectError::Expired { .. } => "set this machine's clock; where it is right, register this role again",
        }
    }
}

/// A channel to `address` (`HOST:PORT`), on which only `expected` is talked to. The first connection is made before
/// this returns; later ones are made by the channel itself when they are needed.
pub async fn connect(
    address: &str,
    expected: impl Into<Expected>,
    identity: &Identity,
) -> Result<Channel, ConnectError> {
    connect_noting(address, expected, identity, Remote::default()).await
}

/// The address at the other end of a channel, as of its last connection.
#[derive(Clone, Default)]
pub struct Remote(Arc<Mutex<Option<IpAddr>>>);

impl Remote {
    pub fn get(&self) -> Option<IpAddr> {
        *self.0.lock().expect("no panic while held")
    }

    fn set(&self, address: Option<IpAddr>) {
        *self.0.lock().expect("no panic while held") = address;
    }
}

/// As [`connect`], noting whom it reached.
pub async fn connect_noting(
    address: &str,
    expected: impl Into<Expected>,
    identity: &Identity,
    remote: Remote,
) -> Result<Channel, ConnectError> {
    let (Validity { begins, expires }, now) = (identity.validity(), Timestamp::from_system(SystemTime::now()));
    if now < begins || now.saturating_since(expires) > tls::EXPIRY_GRACE {
        return Err(ConnectError::Expired { identity: identity.peer(), begins, expires, now });
    }
    let config = tls::mutual_client(identity, expected.into())
        .map_err(|error| ConnectError::Identity { identity: identity.peer(), reason: error.to_string() })?;
    connect_by(address, config, remote).await
}

/// As [`connect`], with a configuration of the caller's.
pub async fn connect_with(address: &str, config: Arc<ClientConfig>) -> Result<Channel, ConnectError> {
    connect_by(address, config, Remote::default()).await
}

async fn connect_by(address: &str, config: Arc<ClientConfig>, remote: Remote) -> Result<Channel, ConnectError> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|_| ConnectError::Address { address: address.to_owned() })?
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(HTTP2_FRAME_BYTES_MAX)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    let dialled = address.to_owned();
    let connector = tower::service_fn(move |_| {
        let (address, config, remote) = (dialled.clone(), config.clone(), remote.clone());
        async move {
            let stream = dial(&address, config).await?;
            remote.set(stream.get_ref().0.peer_addr().ok().map(|peer| peer.ip()));
            Ok::<_, ConnectError>(TokioIo::new(stream))
        }
    });
    endpoint.connect_with_connector(connector).await.map_err(|error| {
        find(&error)
            .unwrap_or_else(|| ConnectError::Unreachable { address: address.to_owned(), reason: with_causes(&error) })
    })
}

/// One connection, proven on both ends.
pub async fn dial(address: &str, config: Arc<ClientConfig>) -> Result<TlsStream<TcpStream>, ConnectError> {
    let unreachable =
        |error: io::Error| ConnectError::Unreachable { address: address.to_owned(), reason: error.to_string() };
    let late = || io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {} s", CONNECT_TIMEOUT.as_secs()));
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host).trim_matches(['[', ']']);
    let name =
        ServerName::try_from(host.to_owned()).map_err(|_| ConnectError::Address { address: address.to_owned() })?;
    let dialling = async {
        let stream = TcpStream::connect(address).await.map_err(unreachable)?;
        stream.set_nodelay(true).map_err(unreachable)?;
        let mut stream =
            TlsConnector::from(config).connect(name, stream).await.map_err(|error| refused(address, &error))?;
        stream.get_mut().1.set_buffer_limit(Some(TLS_BUFFER_BYTES));
        Ok(stream)
    };
    tokio::time::timeout(CONNECT_TIMEOUT, dialling).await.unwrap_or_else(|_| Err(unreachable(late())))
}

fn refused(address: &str, error: &io::Error) -> ConnectError {
    use rustls::CertificateError::{Expired, ExpiredContext, NotValidYet, NotValidYetContext};
    let (address, reason) = (address.to_owned(), error.to_string());
    match error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(
            Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. },
        )) => ConnectError::Clock { address, reason },
        _ => ConnectError::Refused { address, reason },
    }
}

/// Our own error within those that the channel wrapped around it.
fn find(error: &(dyn std::error::Error + 'static)) -> Option<ConnectError> {
    std::iter::successors(Some(error), |error| error.source())
        .find_map(|error| error.downcast_ref::<ConnectError>())
        .cloned()
}
