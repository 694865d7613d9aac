//! Who gets through the door, and who does not.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::{ClientConfig, RootCertStore};
use tidemark_base::storage::RealStorage;
use tidemark_base::{HostId, ServerId};
use tidemark_transport::client::connect_with;
use tidemark_transport::server::{HANDSHAKE_TIMEOUT, HANDSHAKES_MAX};
use tidemark_transport::{
    Authority, ConnectError, Expected, Identity, KeyRequest, PeerIdentity, PeerInfo, Remote, Role, TlsListener,
    connect, connect_noting, serve, tls,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tonic::codegen::{Service, http};
use tonic::transport::Channel;

/// Answers every call with an error that says who called: all that is to be seen of a service here.
#[derive(Clone)]
struct WhoAmI;

impl Service<http::Request<tonic::body::Body>> for WhoAmI {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let peer = request.extensions().get::<PeerInfo>().and_then(|peer| peer.identity);
        ready(Ok(tonic::Status::aborted(peer.map_or("nobody".to_owned(), |peer| peer.to_string())).into_http()))
    }
}

async fn ask(channel: Channel) -> tonic::Status {
    let mut client = tonic::client::Grpc::new(channel);
    if let Err(error) = client.ready().await {
        return tonic::Status::unavailable(error.to_string());
    }
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    let path = http::uri::PathAndQuery::from_static("/test/WhoAmI");
    client.unary::<(), (), _>(tonic::Request::new(()), path, codec).await.expect_err("it always answers with an error")
}

fn authority() -> (tempfile::TempDir, Authority) {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::open_or_create(&*RealStorage::open_folder(folder.path())).unwrap();
    (folder, authority)
}

struct Running {
    address: String,
    peer: PeerIdentity,
    stop: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<()>,
}

async fn start(identity: &Identity) -> Running {
    let listener = TlsListener::bind("127.0.0.1:0", tls::mutual_server(identity).unwrap()).await.unwrap();
    let address = listener.local_address().to_string();
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(async move {
        serve(listener, WhoAmI, async move { drop(stopped.await) }).await.unwrap();
    });
    Running { address, peer: identity.peer(), stop, task }
}

async fn start_process_server(authority: &Authority) -> Running {
    start(&authority.issue(PeerIdentity::ProcessServer(ServerId::random()), &[]).unwrap()).await
}

fn agent(authority: &Authority) -> Identity {
    authority.issue(PeerIdentity::Agent(HostId::random()), &[]).unwrap()
}

#[tokio::test]
async fn both_ends_know_each_other() {
    let (_folder, authority) = authority();
    let server = start_process_server(&authority).await;
    let agent = agent(&authority);
    for expected in [Expected::Peer(server.peer), Expected::Role(Role::ProcessServer)] {
        let remote = Remote::default();
        assert_eq!(remote.get(), None);
        let answer = ask(connect_noting(&server.address, expected, &agent, remote.clone()).await.unwrap()).await;
        assert_eq!((answer.code(), answer.message()), (tonic::Code::Aborted, agent.peer().to_string().as_str()));
        assert_eq!(remote.get(), Some(std::net::Ipv4Addr::LOCALHOST.into()));
    }
    server.stop.send(()).unwrap();
    server.task.await.unwrap();
}

/// A certificate that began and ended so many days from now.
fn agent_of_days(authority: &Authority, begins: i64, ends: i64) -> Identity {
    let request = KeyRequest::new().unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64;
    let begins_at = Duration::from_secs((now + begins * 86_400) as u64);
    let lifetime = Duration::from_secs(((ends - begins) * 86_400) as u64);
    let peer = PeerIdentity::Agent(HostId::random());
    let certificate = authority.sign_for(peer, request.request(), begins_at, lifetime).unwrap();
    request.complete(&certificate, authority.certificate()).unwrap()
}

#[tokio::test]
async fn an_expired_certificate_and_a_clock_that_is_off_are_named_with_both_times() {
    let (_folder, authority) = authority();
    let server = start_process_server(&authority).await;
    // Within the grace: the authority may be away.
    let late = agent_of_days(&authority, -100, -2);
    let answer = ask(connect(&server.address, server.peer, &late).await.unwrap()).await;
    assert_eq!(answer.message(), late.peer().to_string());
    for (begins, ends) in [(-200, -31), (3, 90)] {
        let off = agent_of_days(&authority, begins, ends);
        let error = connect(&server.address, server.peer, &off).await.unwrap_err();
        let ConnectError::Expired { identity, expires, .. } = &error else { panic!("{error}") };
        assert!(*identity == off.peer() && *expires == off.expires());
        let text = error.to_string();
        assert!(text.contains(&off.expires().to_string()) && text.contains("this machine's clock says"), "{text}");
        assert!(error.help().contains("clock") && error.help().contains("register"));
        // Also the server takes none, whatever the other end believes.
        let config = tls::mutual_client(&off, server.peer.into()).unwrap();
        let channel = tidemark_transport::client::connect_with(&server.address, config).await;
        let refused = match channel {
            Ok(channel) => ask(channel).await.code() != tonic::Code::Aborted,
            Err(_) => true,
        };
        assert!(refused, "{begins} to {ends}");
    }
    server.stop.send(()).unwrap();
    server.task.await.unwrap();
}

#[tokio::test]
async fn a_server_of_another_role_or_id_is_not_talked_to() {
    let (_folder, authority) = authority();
    let server = start_process_server(&authority).await;
    let agent = agent(&authority);
    for expected in
        [Expected::Role(Role::ConfigServer), Expected::Peer(PeerIdentity::ProcessServer(ServerId::random()))]
    {
        let error = connect(&server.address, expected, &agent).await.unwrap_err();
        assert!(matches!(error, ConnectError::Refused { .. }), "{error}");
        assert!(error.to_string().contains("was expected"), "{error}");
    }
}

#[tokio::test]
async fn an_agent_cannot_pose_as_a_server() {
    let (_folder, authority) = authority();
    let server = start(&agent(&authority)).await;
    let error = connect(&server.address, server.peer, &agent(&authority)).await.unwrap_err();
    assert!(matches!(error, ConnectError::Refused { .. }), "{error}");
}

#[tokio::test]
async fn certificates_of_another_authority_are_refused_on_both_ends() {
    let (_folder, ours) = authority();
    let (_other_folder, others) = authority();
    let server = start_process_server(&ours).await;
    // The client does not trust the server …
    let alien = agent(&others);
    let error = connect(&server.address, server.peer, &alien).await.unwrap_err();
    assert!(matches!(error, ConnectError::Refused { .. }), "{error}");
    // … and where it would, the server does not trust the client.
    let mut forged = alien;
    forged.authority = ours.certificate().clone();
    let answer = ask(connect(&server.address, server.peer, &forged).await.unwrap()).await;
    assert_ne!(answer.code(), tonic::Code::Aborted, "{answer:?}");
}

#[tokio::test]
async fn without_a_certificate_nobody_gets_in() {
    let (_folder, authority) = authority();
    let server_identity =
        authority.issue(PeerIdentity::ProcessServer(ServerId::random()), &["127.0.0.1".to_owned()]).unwrap();
    let server = start(&server_identity).await;
    let mut roots = RootCertStore::empty();
    roots.add(authority.certificate().clone()).unwrap();
    let mut config = ClientConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let answer = ask(connect_with(&server.address, Arc::new(config)).await.unwrap()).await;
    assert_ne!(answer.code(), tonic::Code::Aborted, "{answer:?}");
}

#[tokio::test]
async fn tls_1_2_is_refused() {
    let (_folder, authority) = authority();
    let server = start_process_server(&authority).await;
    let mut hello = vec![3, 3];
    hello.extend([7; 32]); // random
    hello.extend([0]); // no session
    hello.extend([0, 2, 0xc0, 0x2b]); // ECDHE-ECDSA with AES-128-GCM
    hello.extend([1, 0]); // no compression
    let extensions = [0, 10, 0, 4, 0, 2, 0, 23, 0, 13, 0, 4, 0, 2, 4, 3]; // P-256; ECDSA with SHA-256
    hello.extend([0, extensions.len() as u8]);
    hello.extend(extensions);
    let mut record = vec![22, 3, 1, 0, hello.len() as u8 + 4, 1, 0, 0, hello.len() as u8];
    record.extend(hello);
    let mut stream = TcpStream::connect(&server.address).await.unwrap();
    stream.write_all(&record).await.unwrap();
    let mut alert = [0; 7];
    stream.read_exact(&mut alert).await.unwrap();
    // RFC 8446, 6.2: a fatal alert (2), protocol_version (70)
    assert_eq!((alert[0], &alert[5..]), (21, &[2, 70][..]));
}

#[tokio::test]
async fn a_silent_connection_holds_nobody_up() {
    let (_folder, authority) = authority();
    let server = start_process_server(&authority).await;
    let silent = TcpStream::connect(&server.address).await.unwrap();
    let agent = agent(&authority);
    let asked = async { ask(connect(&server.address, server.peer, &agent).await.unwrap()).await };
    let answer = tokio::time::timeout(Duration::from_secs(60), asked).await.unwrap();
    assert_eq!(answer.code(), tonic::Code::Aborted);
    drop(silent);
}

#[tokio::test]
async fn however_many_silent_connections_keep_nobody_out() {
    let (_folder, authority) = authority();
    let server = start_process_server(&authority).await;
    let mut silent = Vec::new();
    for _ in 0..HANDSHAKES_MAX + 8 {
        silent.push(TcpStream::connect(&server.address).await.unwrap());
    }
    let agent = agent(&authority);
    let asked = async { ask(connect(&server.address, server.peer, &agent).await.unwrap()).await };
    let answer = tokio::time::timeout(HANDSHAKE_TIMEOUT / 2, asked).await.expect("no handshake had to time out first");
    assert_eq!(answer.code(), tonic::Code::Aborted);
    // The oldest made room.
    let read = tokio::time::timeout(HANDSHAKE_TIMEOUT / 2, silent[0].read(&mut [0])).await.expect("it was hung up");
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
}

#[tokio::test]
async fn nobody_there_is_said_plainly() {
    let (_folder, authority) = authority();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = connect(&free.to_string(), Expected::Role(Role::ConfigServer), &agent(&authority)).await.unwrap_err();
    assert!(matches!(error, ConnectError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains(&free.to_string()) && !error.help().is_empty());
    let error = connect("no port", Expected::Role(Role::ConfigServer), &agent(&authority)).await.unwrap_err();
    assert!(matches!(error, ConnectError::Address { .. }), "{error}");
}

#[tokio::test]
async fn the_api_speaks_tls_without_client_certificates() {
    let (_folder, authority) = authority();
    let identity = authority.issue(PeerIdentity::ConfigServer(ServerId::random()), &["127.0.0.1".to_owned()]).unwrap();
    let mut listener = TlsListener::bind("127.0.0.1:0", tls::api_server(&identity).unwrap()).await.unwrap();
    let address = listener.local_address().to_string();
    let client = tokio::spawn(async move {
        let config = tls::api_client(&identity.authority).unwrap();
        let mut stream = tidemark_transport::client::dial(&address, config).await.unwrap();
        stream.write_all(b"ping").await.unwrap();
        stream.flush().await.unwrap();
        stream
    });
    let accepted = tokio::time::timeout(Duration::from_secs(60), listener.accept()).await;
    let mut connection = accepted.expect("a client without a certificate is taken");
    assert_eq!(connection.peer().identity, None);
    let mut ping = [0; 4];
    connection.read_exact(&mut ping).await.unwrap();
    assert_eq!(&ping, b"ping");
    drop(client.await.unwrap());
}
