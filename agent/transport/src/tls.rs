//! TLS 1.3 with our own authority as the only root.
//!
//! Sessions are never resumed: a resumed one would outlive the moment at which its certificate was last checked.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{
    ClientHello, NoServerSessionStorage, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier,
};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, ServerConfig,
    SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::client::Expected;
use crate::identity::{Identity, PeerIdentity, Role, fingerprint};

/// So long after its end a certificate is still taken between the roles: replication must not stop because the authority
/// was away when it should have been renewed, and its owner must reach the authority to renew it.
pub const EXPIRY_GRACE: Duration = Duration::from_secs(30 * 86_400);

/// gRPC between the roles.
const ALPN_HTTP2: &[u8] = b"h2";
/// The REST API and the console.
const ALPN_HTTP1: &[u8] = b"http/1.1";

/// The one provider of this product, given to every configuration, so that none depends on a process-wide default.
/// AES-128-GCM comes first: it is the fastest here and as strong as the P-256 certificates.
pub fn provider() -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

pub(crate) fn roots(authority: &CertificateDer<'static>) -> Result<Arc<RootCertStore>, Error> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.clone())?;
    Ok(Arc::new(roots))
}

/// The certificate and key as they are now; an error when they do not belong together.
pub(crate) fn certified(identity: &Identity) -> Result<CertifiedKey, Error> {
    CertifiedKey::from_der(identity.chain(), identity.key(), &provider())
}

/// Shows an identity as it is at each handshake, so that a renewal needs no restart.
#[derive(Debug)]
struct Live {
    identity: Identity,
    /// The authority's certificate goes along, for whoever knows it by its fingerprint only.
    with_authority: bool,
}

impl Live {
    /// An error now rather than at the first handshake.
    fn new(identity: &Identity, with_authority: bool) -> Result<Arc<Self>, Error> {
        certified(identity)?;
        Ok(Arc::new(Self { identity: identity.clone(), with_authority }))
    }

    fn certified(&self) -> Option<Arc<CertifiedKey>> {
        let mut certified = certified(&self.identity).ok()?;
        if self.with_authority {
            certified.cert.push(self.identity.authority.clone());
        }
        Some(Arc::new(certified))
    }
}

impl ResolvesServerCert for Live {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.certified()
    }
}

impl ResolvesClientCert for Live {
    fn resolve(&self, _roots: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.certified()
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// For gRPC: whoever connects shows a certificate of our authority, or is turned away.
pub fn mutual_server(identity: &Identity) -> Result<Arc<ServerConfig>, Error> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(&identity.authority)?, provider())
        .build()
        .map_err(|error| Error::General(error.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(Graceful(verifier)))
        .with_cert_resolver(Live::new(identity, false)?);
    config.alpn_protocols = vec![ALPN_HTTP2.to_vec()];
    Ok(without_resumption(config))
}

/// For the REST API: the server proves itself, the client does so in the request.
pub fn api_server(identity: &Identity) -> Result<Arc<ServerConfig>, Error> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(Live::new(identity, true)?);
    config.alpn_protocols = vec![ALPN_HTTP1.to_vec()];
    Ok(without_resumption(config))
}

/// Takes certificates that expired within [`EXPIRY_GRACE`].
#[derive(Debug)]
struct Graceful(Arc<dyn ClientCertVerifier>);

/// As it would have been within the grace, where a certificate expired.
fn with_grace<T>(now: UnixTime, verify: impl Fn(UnixTime) -> Result<T, Error>) -> Result<T, Error> {
    match verify(now) {
        Err(Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. })) => {
            let then = Duration::from_secs(now.as_secs()).saturating_sub(EXPIRY_GRACE);
            // What is too old for that too is refused with the time that it is now.
            verify(UnixTime::since_unix_epoch(then)).or_else(|_| verify(now))
        }
        outcome => outcome,
    }
}

impl ClientCertVerifier for Graceful {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        with_grace(now, |now| self.0.verify_client_cert(leaf, intermediates, now))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

pub(crate) fn without_resumption(mut config: ServerConfig) -> Arc<ServerConfig> {
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Arc::new(config)
}

/// For gRPC: shows our certificate and accepts only the server that is expected.
pub fn mutual_client(identity: &Identity, expected: Expected) -> Result<Arc<ClientConfig>, Error> {
    let verifier = ExpectedServer {
        trust: Trust::Roots(roots(&identity.authority)?),
        expected,
        own: Some(identity.clone()),
        algorithms: provider().signature_verification_algorithms,
    };
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Live::new(identity, false)?);
    config.alpn_protocols = vec![ALPN_HTTP2.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Arc::new(config))
}

/// For clients of the REST API: the server's certificate comes from this authority and names the host dialled.
pub fn api_client(authority: &CertificateDer<'static>) -> Result<Arc<ClientConfig>, Error> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots(authority)?)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_HTTP1.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Arc::new(config))
}

/// For servers of others, such as those that take alerts: whom these authorities vouch for.
pub fn public_client(authorities: Vec<CertificateDer<'static>>) -> Result<Arc<ClientConfig>, Error> {
    let mut roots = RootCertStore::empty();
    // A bundle of a system may hold what is no authority here.
    roots.add_parsable_certificates(authorities);
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// The authority that a server showed, once its fingerprint was found to be the expected one.
pub type ShownAuthority = Arc<OnceLock<CertificateDer<'static>>>;

/// For registering: a configuration server whose authority has this fingerprint. Nothing is sent to any other.
pub fn registering_client(fingerprint: &str) -> Result<(Arc<ClientConfig>, ShownAuthority), Error> {
    let shown = ShownAuthority::default();
    let verifier = ExpectedServer {
        trust: Trust::Fingerprint { expected: fingerprint.to_owned(), shown: shown.clone() },
        expected: Expected::Role(Role::ConfigServer),
        own: None,
        algorithms: provider().signature_verification_algorithms,
    };
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_HTTP1.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Ok((Arc::new(config), shown))
}

/// Verifies the chain as always, and the identity instead of the host name: servers move, and what an agent pins is
/// which server it is.
#[derive(Debug)]
struct ExpectedServer {
    trust: Trust,
    expected: Expected,
    /// Knows whom not to talk to.
    own: Option<Identity>,
    algorithms: WebPkiSupportedAlgorithms,
}

#[derive(Debug)]
enum Trust {
    Roots(Arc<RootCertStore>),
    /// The authority is the last certificate that the server shows.
    Fingerprint {
        expected: String,
        shown: ShownAuthority,
    },
}

impl Trust {
    fn roots(&self, intermediates: &[CertificateDer<'_>]) -> Result<Arc<RootCertStore>, Error> {
        match self {
            Trust::Roots(roots) => Ok(roots.clone()),
            Trust::Fingerprint { expected, shown } => {
                let authority =
                    intermediates.last().ok_or_else(|| Error::General("the server shows no authority".to_owned()))?;
                let found = fingerprint(authority);
                if !found.eq_ignore_ascii_case(expected) {
                    return Err(Error::General(format!(
                        "the fingerprint of the server's authority is {found}, not {expected}"
                    )));
                }
                let authority = authority.clone().into_owned();
                let roots = roots(&authority)?;
                let _ = shown.set(authority);
                Ok(roots)
            }
        }
    }
}

impl ServerCertVerifier for ExpectedServer {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = ParsedCertificate::try_from(leaf)?;
        let roots = self.trust.roots(intermediates)?;
        with_grace(now, |now| {
            verify_server_cert_signed_by_trust_anchor(&parsed, &roots, intermediates, now, self.algorithms.all)
        })?;
        match PeerIdentity::of_certificate(leaf) {
            Ok(peer) if self.own.as_ref().is_some_and(|own| own.refuses(&peer, leaf)) => {
                Err(Error::General(format!("the certificate of {peer} was revoked")))
            }
            Ok(peer) if self.expected.matches(&peer) => Ok(ServerCertVerified::assertion()),
            Ok(peer) => Err(Error::General(format!("{peer} answered, {} was expected", self.expected))),
            Err(_) => Err(Error::InvalidCertificate(CertificateError::NotValidForName)),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken here".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
