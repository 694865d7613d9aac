//! TCP: nothing before TLS, nobody without a certificate.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tidemark_nbd::{Client, ClientError, Export, ExportProvider, Limits, OpenError, Peer, Server};

use crate::raw::{Memory, PATIENCE, option_bytes};

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut parameters = CertificateParams::new([]).unwrap();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap())
    }

    fn issue(&self, name: &str) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new([name.to_owned()]).unwrap().signed_by(&key, &self.0).unwrap();
        (vec![certificate.der().clone()], PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())))
    }

    fn roots(&self) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(self.0.der().clone()).unwrap();
        Arc::new(roots)
    }

    fn server(&self) -> Arc<ServerConfig> {
        let verifier = WebPkiClientVerifier::builder(self.roots()).build().unwrap();
        let (chain, key) = self.issue("server");
        Arc::new(ServerConfig::builder().with_client_cert_verifier(verifier).with_single_cert(chain, key).unwrap())
    }

    fn client(&self, name: &str) -> Arc<ClientConfig> {
        let (chain, key) = self.issue(name);
        let builder = ClientConfig::builder().with_root_certificates(self.roots());
        Arc::new(builder.with_client_auth_cert(chain, key).unwrap())
    }
}

/// Opens to clients whose certificate it has been given.
struct ByCertificate(Arc<Memory>, CertificateDer<'static>);

impl ExportProvider for ByCertificate {
    fn names(&self, _peer: &Peer) -> Vec<String> {
        vec!["disk".to_owned()]
    }

    fn open(&self, name: &str, peer: &Peer) -> Result<Arc<dyn Export>, OpenError> {
        match peer {
            Peer::Tls { certificates, .. } if certificates[0] == self.1 => Ok(self.0.clone()),
            _ => Err(OpenError::Forbidden { name: name.to_owned() }),
        }
    }
}

fn connect(address: SocketAddr, config: Arc<ClientConfig>) -> Result<Client, ClientError> {
    let socket = TcpStream::connect(address).unwrap();
    Client::over_tls(socket, ServerName::try_from("server").unwrap(), config, "disk")
}

#[test]
fn mutual_tls_serves_and_shows_the_provider_who_asks() {
    let authority = Authority::new();
    let (chain, key) = authority.issue("guest");
    let provider = Arc::new(ByCertificate(Arc::new(Memory::new(8 << 20)), chain[0].clone()));
    let server = Server::new(provider, Limits::default());
    let address = server.listen_tcp("127.0.0.1:0".parse().unwrap(), authority.server()).unwrap();
    let builder = ClientConfig::builder().with_root_certificates(authority.roots());
    let config = Arc::new(builder.with_client_auth_cert(chain, key).unwrap());
    let mut client = connect(address, config).unwrap();
    let data: Vec<u8> = (0..4u32 << 20).map(|index| (index % 233) as u8).collect();
    client.write(4096, &data).unwrap();
    client.flush().unwrap();
    let mut read = vec![0; data.len()];
    client.read(4096, &mut read).unwrap();
    assert!(read == data);
    // A valid certificate, but not the one that may open this.
    let refused = connect(address, authority.client("other"));
    assert!(matches!(refused, Err(ClientError::Refused { .. })), "{:?}", refused.err());
    server.stop().unwrap();
    assert!(client.read(0, &mut read).is_err());
}

#[test]
fn without_a_certificate_of_ours_nobody_gets_in() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let (chain, _) = authority.issue("guest");
    let provider = Arc::new(ByCertificate(Arc::new(Memory::new(1 << 20)), chain[0].clone()));
    let server = Server::new(provider, Limits::default());
    let address = server.listen_tcp("127.0.0.1:0".parse().unwrap(), authority.server()).unwrap();
    let anonymous =
        || Arc::new(ClientConfig::builder().with_root_certificates(authority.roots()).with_no_client_auth());
    assert!(connect(address, anonymous()).is_err());
    let (chain, key) = stranger.issue("guest");
    let builder = ClientConfig::builder().with_root_certificates(authority.roots());
    assert!(connect(address, Arc::new(builder.with_client_auth_cert(chain, key).unwrap())).is_err());
    // The client does not talk to a server that it does not know either.
    assert!(matches!(connect(address, stranger.client("guest")), Err(ClientError::Tls(_))));

    // A configuration that asks for no certificate lets nobody in all the same.
    let (chain, key) = authority.issue("server");
    let lax = ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key).unwrap();
    let exports = Arc::new(tidemark_nbd::Exports::new());
    exports.insert("disk", Arc::new(Memory::new(1 << 20)));
    let server = Server::new(exports, Limits::default());
    let address = server.listen_tcp("127.0.0.1:0".parse().unwrap(), Arc::new(lax)).unwrap();
    assert!(connect(address, anonymous()).is_err());
}

/// libnbd's TLS (GnuTLS) and ours understand each other.
#[test]
fn nbdinfo_and_nbdcopy_work_through_tls() {
    for program in ["nbdinfo", "nbdcopy"] {
        if std::process::Command::new(program).arg("--version").output().is_err() {
            return eprintln!("skipped: {program} is not installed");
        }
    }
    let authority = Authority::new();
    let folder = tempfile::tempdir().unwrap();
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(["guest".to_owned()]).unwrap().signed_by(&key, &authority.0).unwrap();
    for (name, text) in [
        ("ca-cert.pem", authority.0.pem()),
        ("client-cert.pem", certificate.pem()),
        ("client-key.pem", key.serialize_pem()),
    ] {
        std::fs::File::create(folder.path().join(name)).unwrap().write_all(text.as_bytes()).unwrap();
    }
    let disk = Arc::new(Memory::new(8 << 20));
    let provider = Arc::new(ByCertificate(disk.clone(), certificate.der().clone()));
    let server = Server::new(provider, Limits::default());
    let mut parameters = CertificateParams::new(["localhost".to_owned()]).unwrap();
    parameters.subject_alt_names.push(rcgen::SanType::IpAddress("127.0.0.1".parse().unwrap()));
    let server_key = KeyPair::generate().unwrap();
    let chain = vec![parameters.signed_by(&server_key, &authority.0).unwrap().der().clone()];
    let verifier = WebPkiClientVerifier::builder(authority.roots()).build().unwrap();
    let config = ServerConfig::builder()
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(server_key.serialize_der())))
        .unwrap();
    let address = server.listen_tcp("127.0.0.1:0".parse().unwrap(), Arc::new(config)).unwrap();
    let uri = format!("nbds://localhost:{}/disk?tls-certificates={}", address.port(), folder.path().display());
    let output = std::process::Command::new("nbdinfo").arg(&uri).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("export-size: 8388608"), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let source = folder.path().join("source");
    let data: Vec<u8> = (0..8u32 << 20).map(|index| (index % 229) as u8).collect();
    std::fs::File::create(&source).unwrap().write_all(&data).unwrap();
    let output = std::process::Command::new("nbdcopy").arg(&source).arg(&uri).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(*disk.data.lock().unwrap() == data);
}

#[test]
fn before_tls_nothing_is_answered() {
    let authority = Authority::new();
    let (chain, _) = authority.issue("guest");
    let provider = Arc::new(ByCertificate(Arc::new(Memory::new(1 << 20)), chain[0].clone()));
    let server = Server::new(provider, Limits::default());
    let address = server.listen_tcp("127.0.0.1:0".parse().unwrap(), authority.server()).unwrap();
    let open = || {
        let mut socket = TcpStream::connect(address).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.read_exact(&mut [0; 18]).unwrap();
        socket.write_all(&3u32.to_be_bytes()).unwrap();
        socket
    };
    let mut socket = open();
    for option in [3, 6, 7, 8, 9, 10, 4711] {
        socket.write_all(&option_bytes(option, 4, b"disk")).unwrap();
        let mut head = [0; 20];
        socket.read_exact(&mut head).unwrap();
        // TLS_REQD
        assert_eq!(head[12..16], [0x80, 0, 0, 5], "option {option}");
        let length = u32::from_be_bytes(head[16..].try_into().unwrap());
        socket.read_exact(&mut vec![0; length as usize]).unwrap();
    }
    socket.write_all(&option_bytes(1, 4, b"disk")).unwrap();
    assert_eq!(socket.read(&mut [0; 1]).unwrap_or(0), 0, "EXPORT_NAME ends it");
    // Options sent along with STARTTLS, before TLS is on, are not taken for encrypted ones.
    let mut socket = open();
    socket.write_all(&[option_bytes(5, 0, &[]), option_bytes(3, 0, &[])].concat()).unwrap();
    let mut answer = Vec::new();
    let _ = socket.read_to_end(&mut answer);
    assert!(answer.len() <= 20 + 7, "the acknowledgement and an alert: {answer:?}");
}
