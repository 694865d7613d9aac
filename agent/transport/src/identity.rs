//! Who is who: certificates that name a role and an id, and the authority that issues them.
//!
//! A certificate carries one URI `tidemark://<role>/<id>` as subject alternative name; that, not a host name, is what
//! the other end checks. Names and addresses are added for programs that connect with ordinary HTTPS clients.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tidemark_base::storage::{Storage, read_file, replace_file};
use tidemark_base::{HostId, ServerId, Timestamp};
use tokio::sync::watch;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// How long an issued certificate holds. It is renewed once a third of that has passed, which bridges an authority that is
/// away for two months.
pub const LEAF_LIFETIME: Duration = Duration::from_secs(90 * 86_400);
const AUTHORITY_LIFETIME: Duration = Duration::from_secs(20 * 365 * 86_400);
/// Certificates begin this much before they are issued, for peers whose clock is behind.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(3_600);
const PEM_BYTES_MAX: u64 = 64 << 10;
const AUTHORITY_FILE: &str = "authority.pem";

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Role {
    Agent,
    ProcessServer,
    ConfigServer,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Role::Agent => "agent",
            Role::ProcessServer => "process-server",
            Role::ConfigServer => "config-server",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Who a certificate speaks for. Prints as the URI in the certificate.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PeerIdentity {
    Agent(HostId),
    ProcessServer(ServerId),
    ConfigServer(ServerId),
}

impl PeerIdentity {
    pub fn role(&self) -> Role {
        match self {
            PeerIdentity::Agent(_) => Role::Agent,
            PeerIdentity::ProcessServer(_) => Role::ProcessServer,
            PeerIdentity::ConfigServer(_) => Role::ConfigServer,
        }
    }

    /// The one identity that a certificate names.
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let unnamed = |reason: &str| IdentityError::Unnamed { reason: reason.to_owned() };
        let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| unnamed("it cannot be parsed"))?;
        let names = parsed.subject_alternative_name().map_err(|_| unnamed("its names cannot be parsed"))?;
        let mut uris = names.iter().flat_map(|names| &names.value.general_names).filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
        let uri = uris.next().ok_or_else(|| unnamed("it has no URI"))?;
        if uris.next().is_some() {
            return Err(unnamed("it has more than one URI"));
        }
        uri.parse()
    }
}

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PeerIdentity::Agent(id) => write!(f, "tidemark://agent/{id}"),
            PeerIdentity::ProcessServer(id) => write!(f, "tidemark://process-server/{id}"),
            PeerIdentity::ConfigServer(id) => write!(f, "tidemark://config-server/{id}"),
        }
    }
}

impl FromStr for PeerIdentity {
    type Err = IdentityError;

    fn from_str(uri: &str) -> Result<Self, IdentityError> {
        let unnamed = || IdentityError::Unnamed { reason: format!("its URI {uri:?} is none of ours") };
        let (role, id) = uri.strip_prefix("tidemark://").and_then(|rest| rest.split_once('/')).ok_or_else(unnamed)?;
        match role {
            "agent" => id.parse().map(PeerIdentity::Agent),
            "process-server" => id.parse().map(PeerIdentity::ProcessServer),
            "config-server" => id.parse().map(PeerIdentity::ConfigServer),
            _ => return Err(unnamed()),
        }
        .map_err(|_| unnamed())
    }
}

#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("cannot read or write the identity in {path}")]
    Storage { path: String, source: io::Error },
    #[error("{path} holds no identity: {reason}")]
    Damaged { path: String, reason: String },
    #[error("a certificate names no role and id: {reason}")]
    Unnamed { reason: String },
    #[error("{name:?} can be no name in a certificate")]
    Name { name: String },
    #[error("a certificate could not be made: {0}")]
    Issue(#[from] rcgen::Error),
}

impl IdentityError {
    /// What to do about it.
    pub fn help(&self) -> &'static str {
        match self {
            IdentityError::Storage { .. } => "check that the folder exists and belongs to this user",
            IdentityError::Damaged { .. } => "restore the file from a backup, or register this role again",
            IdentityError::Unnamed { .. } => "use a certificate that Tidemark's configuration server issued",
            IdentityError::Name { .. } => "give a DNS name or an IP address",
            IdentityError::Issue(_) => "check the system's clock and source of randomness",
        }
    }
}

/// A certificate with its key, and the authority that both ends trust. Clones share it: a renewal reaches them all, and
/// the TLS configurations that were made from them.
#[derive(Clone)]
pub struct Identity {
    pub authority: CertificateDer<'static>,
    peer: PeerIdentity,
    current: Arc<RwLock<Arc<Certified>>>,
    refused: Arc<RwLock<Refused>>,
    refusals: Arc<watch::Sender<u64>>,
}

/// Servers that are not talked to although the authority signed their certificates.
#[derive(Default, PartialEq, Eq)]
struct Refused {
    identities: BTreeSet<String>,
    certificates: BTreeSet<[u8; 32]>,
}

/// What a renewal replaces.
struct Certified {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    validity: Validity,
    /// Key, chain and authority, in this order.
    pem: String,
}

/// Between which times a certificate holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Validity {
    pub begins: Timestamp,
    pub expires: Timestamp,
}

impl Identity {
    /// Who this is.
    pub fn peer(&self) -> PeerIdentity {
        self.peer
    }

    fn current(&self) -> Arc<Certified> {
        self.current.read().expect("no panic while held").clone()
    }

    pub fn chain(&self) -> Vec<CertificateDer<'static>> {
        self.current().chain.clone()
    }

    pub fn key(&self) -> PrivateKeyDer<'static> {
        self.current().key.clone_key()
    }

    pub fn validity(&self) -> Validity {
        self.current().validity
    }

    pub fn expires(&self) -> Timestamp {
        self.validity().expires
    }

    /// Whether a third of its lifetime has passed.
    pub fn renewal_due(&self, now: Timestamp) -> bool {
        let Validity { begins, expires } = self.validity();
        now.saturating_since(begins) > expires.saturating_since(begins) / 3
    }

    /// Servers that connections of this identity, and of its clones, refuse from now on: URIs, and digests of certificates.
    pub fn refuse(
        &self,
        identities: impl IntoIterator<Item = String>,
        certificates: impl IntoIterator<Item = [u8; 32]>,
    ) {
        let refused =
            Refused { identities: identities.into_iter().collect(), certificates: certificates.into_iter().collect() };
        let mut known = self.refused.write().expect("no panic while held");
        if *known != refused {
            *known = refused;
            self.refusals.send_modify(|changes| *changes += 1);
        }
    }

    /// How often it changed who is refused: a connection of before may be to one of them, and is to be made anew.
    pub fn refusals(&self) -> watch::Receiver<u64> {
        self.refusals.subscribe()
    }

    pub(crate) fn refuses(&self, peer: &PeerIdentity, certificate: &CertificateDer<'_>) -> bool {
        let refused = self.refused.read().expect("no panic while held");
        refused.identities.contains(&peer.to_string())
            || refused.certificates.contains(&certificate_digest(certificate))
    }

    /// Takes a new certificate of the same identity for `request`, here and in every clone.
    pub fn renew(&self, request: KeyRequest, certificate: &[u8]) -> Result<(), IdentityError> {
        let renewed = request.complete(certificate, &self.authority)?;
        if renewed.peer != self.peer {
            return Err(IdentityError::Unnamed { reason: format!("it is {} and not {}", renewed.peer, self.peer) });
        }
        *self.current.write().expect("no panic while held") = renewed.current();
        Ok(())
    }

    /// Reads what [`Identity::save`] wrote.
    pub fn load(storage: &dyn Storage, name: &str) -> Result<Self, IdentityError> {
        let path = || storage.path(name).display().to_string();
        let pem = read_file(storage, name, PEM_BYTES_MAX)
            .map_err(|source| IdentityError::Storage { path: path(), source })?;
        Self::from_pem(&pem).map_err(|error| match error {
            IdentityError::Damaged { reason, .. } => IdentityError::Damaged { path: path(), reason },
            other => other,
        })
    }

    /// Writes key, chain and authority, in this order, as PEM into one file of mode 0600, atomically: a key never meets
    /// the certificate of another.
    pub fn save(&self, storage: &dyn Storage, name: &str) -> Result<(), IdentityError> {
        replace_file(storage, name, self.current().pem.as_bytes())
            .map_err(|source| IdentityError::Storage { path: storage.path(name).display().to_string(), source })
    }

    /// For sending an identity to who will own it; holds the secret key.
    pub fn to_pem(&self) -> String {
        self.current().pem.clone()
    }

    pub fn from_pem(pem: &[u8]) -> Result<Self, IdentityError> {
        let damaged = |reason: String| IdentityError::Damaged { path: "the PEM text".to_owned(), reason };
        let key = PrivateKeyDer::from_pem_slice(pem).map_err(|error| damaged(format!("its key: {error}")))?;
        let mut chain = CertificateDer::pem_slice_iter(pem)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| damaged(format!("its certificates: {error}")))?;
        let authority = chain.pop().ok_or_else(|| damaged("no certificate".to_owned()))?;
        let leaf = chain.first().ok_or_else(|| damaged("one certificate, two are needed".to_owned()))?;
        let (peer, validity) = (PeerIdentity::of_certificate(leaf)?, validity(leaf)?);
        let pem = String::from_utf8_lossy(pem).into_owned();
        let current = Arc::new(RwLock::new(Arc::new(Certified { chain, key, validity, pem })));
        Ok(Self { authority, peer, current, refused: Arc::default(), refusals: Arc::default() })
    }

    /// The authority's certificate, for HTTPS clients.
    pub fn authority_pem(&self) -> String {
        last_certificate(&self.current().pem).to_owned()
    }
}

impl fmt::Debug for Identity {
    /// Leaves the key out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({}, until {})", self.peer, self.expires())
    }
}

/// A new key, and the request for a certificate that goes with it. The key stays here.
pub struct KeyRequest {
    key_pem: String,
    request: Vec<u8>,
}

impl KeyRequest {
    pub fn new() -> Result<Self, IdentityError> {
        Self::of(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?)
    }

    /// The request for a key that was made before.
    pub fn from_key_pem(pem: &str) -> Result<Self, IdentityError> {
        Self::of(KeyPair::from_pem(pem)?)
    }

    fn of(key: KeyPair) -> Result<Self, IdentityError> {
        let mut params = CertificateParams::default();
        // Who it is for is said by whoever signs; the request only proves the key.
        params.distinguished_name = DistinguishedName::new();
        let request = params.serialize_request(&key)?;
        Ok(Self { key_pem: key.serialize_pem(), request: request.der().to_vec() })
    }

    /// The secret key.
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// PKCS #10, DER.
    pub fn request(&self) -> &[u8] {
        &self.request
    }

    /// With the certificate that was issued for it, of this authority.
    pub fn complete(self, certificate: &[u8], authority: &CertificateDer<'_>) -> Result<Identity, IdentityError> {
        let pem = self.key_pem + &pem("CERTIFICATE", certificate) + &pem("CERTIFICATE", authority);
        let identity = Identity::from_pem(pem.as_bytes())?;
        crate::tls::certified(&identity).map_err(|error| IdentityError::Damaged {
            path: "the certificate that was issued".to_owned(),
            reason: error.to_string(),
        })?;
        Ok(identity)
    }
}

/// What tells one certificate from another: BLAKE3 of its DER.
pub fn certificate_digest(certificate: &[u8]) -> [u8; 32] {
    *blake3::hash(certificate).as_bytes()
}

/// As in a PEM file.
fn pem(label: &str, der: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = format!("-----BEGIN {label}-----\n");
    // 48 bytes are a line of 64 letters.
    for line in der.chunks(48) {
        for group in line.chunks(3) {
            let bits = group.iter().fold(0_u32, |bits, &byte| bits << 8 | u32::from(byte)) << (8 * (3 - group.len()));
            for place in 0..4 {
                let letter = ALPHABET[(bits >> (18 - 6 * place) & 63) as usize];
                text.push(if place <= group.len() { char::from(letter) } else { '=' });
            }
        }
        text.push('\n');
    }
    text + &format!("-----END {label}-----\n")
}

/// The certificate authority of one installation.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    certificate_pem: String,
}

impl Authority {
    /// Loads the authority in this folder, or makes it.
    pub fn open_or_create(storage: &dyn Storage) -> Result<Self, IdentityError> {
        let failed =
            |source| IdentityError::Storage { path: storage.path(AUTHORITY_FILE).display().to_string(), source };
        if storage.exists(AUTHORITY_FILE).map_err(failed)? {
            return Self::load(storage);
        }
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = authority_params();
        set_validity(&mut params, now(), AUTHORITY_LIFETIME);
        let certificate = params.self_signed(&key)?;
        let pem = key.serialize_pem() + &certificate.pem();
        replace_file(storage, AUTHORITY_FILE, pem.as_bytes()).map_err(failed)?;
        Ok(Self {
            issuer: Issuer::new(authority_params(), key),
            certificate: certificate.der().clone(),
            certificate_pem: certificate.pem(),
        })
    }

    fn load(storage: &dyn Storage) -> Result<Self, IdentityError> {
        let path = || storage.path(AUTHORITY_FILE).display().to_string();
        let damaged = |reason: String| IdentityError::Damaged { path: path(), reason };
        let pem = read_file(storage, AUTHORITY_FILE, PEM_BYTES_MAX)
            .map_err(|source| IdentityError::Storage { path: path(), source })?;
        let key = PrivatePkcs8KeyDer::from_pem_slice(&pem).map_err(|error| damaged(format!("its key: {error}")))?;
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&key, &PKCS_ECDSA_P256_SHA256)
            .map_err(|error| damaged(format!("its key: {error}")))?;
        let certificate =
            CertificateDer::from_pem_slice(&pem).map_err(|error| damaged(format!("its certificate: {error}")))?;
        let certificate_pem = last_certificate(&String::from_utf8_lossy(&pem)).to_owned();
        Ok(Self { issuer: Issuer::new(authority_params(), key), certificate, certificate_pem })
    }

    /// A new key and a certificate for it. `hosts` are the DNS names and IP addresses under which a server is reached.
    pub fn issue(&self, peer: PeerIdentity, hosts: &[String]) -> Result<Identity, IdentityError> {
        self.issue_for(peer, hosts, now(), LEAF_LIFETIME)
    }

    fn issue_for(
        &self,
        peer: PeerIdentity,
        hosts: &[String],
        begins: Duration,
        lifetime: Duration,
    ) -> Result<Identity, IdentityError> {
        let params = leaf_params(peer, hosts, begins, lifetime)?;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let leaf = params.signed_by(&key, &self.issuer)?;
        Identity::from_pem((key.serialize_pem() + &leaf.pem() + &self.certificate_pem).as_bytes())
    }

    /// A certificate for a key that its owner keeps. What the request says but its key is not looked at.
    pub fn sign(&self, peer: PeerIdentity, request: &[u8]) -> Result<CertificateDer<'static>, IdentityError> {
        self.sign_for(peer, request, now(), LEAF_LIFETIME)
    }

    /// As [`Authority::sign`], for tests of certificates that begin and end at other times.
    pub fn sign_for(
        &self,
        peer: PeerIdentity,
        request: &[u8],
        begins: Duration,
        lifetime: Duration,
    ) -> Result<CertificateDer<'static>, IdentityError> {
        let mut asked = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(request))?;
        asked.params = leaf_params(peer, &[], begins, lifetime)?;
        Ok(asked.signed_by(&self.issuer)?.der().clone())
    }

    /// A certificate for one end of an NBD export: it speaks for no role.
    pub(crate) fn issue_export(
        &self,
        name: &str,
        hosts: &[String],
        usage: ExtendedKeyUsagePurpose,
        key: &KeyPair,
    ) -> Result<rcgen::Certificate, IdentityError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.subject_alt_names = hosts.iter().map(|host| host_name(host)).collect::<Result<_, _>>()?;
        // Nothing is enciphered by it, but QEMU takes no certificate without.
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![usage];
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params, now(), LEAF_LIFETIME);
        Ok(params.signed_by(key, &self.issuer)?)
    }

    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// BLAKE3 of the authority's certificate, for people to compare.
    pub fn fingerprint(&self) -> String {
        fingerprint(&self.certificate)
    }
}

/// What tells one key from another, whatever was signed with it: BLAKE3 of the public key of a request, which its
/// signature proves.
pub fn requested_key(request: &[u8]) -> Result<[u8; 32], IdentityError> {
    let asked = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(request))?;
    Ok(certificate_digest(asked.public_key.der_bytes()))
}

/// BLAKE3 of an authority's certificate, for people to compare.
pub fn fingerprint(certificate: &[u8]) -> String {
    blake3::hash(certificate).to_hex().to_string()
}

fn leaf_params(
    peer: PeerIdentity,
    hosts: &[String],
    begins: Duration,
    lifetime: Duration,
) -> Result<CertificateParams, IdentityError> {
    let named = |name: &str| IdentityError::Name { name: name.to_owned() };
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, format!("Tidemark {}", peer.role()));
    let uri = peer.to_string();
    params.subject_alt_names = vec![SanType::URI(uri.as_str().try_into().map_err(|_| named(&uri))?)];
    for host in hosts {
        params.subject_alt_names.push(host_name(host)?);
    }
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // An agent dials and never answers, so its certificate cannot be used to pose as a server.
    params.extended_key_usages = match peer.role() {
        Role::Agent => vec![ExtendedKeyUsagePurpose::ClientAuth],
        Role::ProcessServer | Role::ConfigServer => {
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth]
        }
    };
    params.use_authority_key_identifier_extension = true;
    set_validity(&mut params, begins, lifetime);
    Ok(params)
}

/// The same at every start, so that the issuer's name in new certificates is the one in the authority's own.
fn authority_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "Tidemark certificate authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn now() -> Duration {
    Duration::from_nanos(Timestamp::from_system(std::time::SystemTime::now()).0)
}

fn set_validity(params: &mut CertificateParams, begins: Duration, lifetime: Duration) {
    let moment = |since_1970: Duration| rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(since_1970.as_secs());
    params.not_before = moment(begins.saturating_sub(CLOCK_TOLERANCE));
    params.not_after = moment(begins + lifetime);
}

fn host_name(host: &str) -> Result<SanType, IdentityError> {
    Ok(match host.parse::<IpAddr>() {
        Ok(address) => SanType::IpAddress(address),
        Err(_) => SanType::DnsName(host.try_into().map_err(|_| IdentityError::Name { name: host.to_owned() })?),
    })
}

/// The last certificate of a PEM text: the authority's.
fn last_certificate(pem: &str) -> &str {
    pem.rfind("-----BEGIN CERTIFICATE-----").map_or("", |at| &pem[at..])
}

pub(crate) fn expiry(certificate: &[u8]) -> Result<Timestamp, IdentityError> {
    Ok(validity(certificate)?.expires)
}

/// Between which times a certificate holds.
pub fn validity(certificate: &[u8]) -> Result<Validity, IdentityError> {
    let (_, parsed) = X509Certificate::from_der(certificate)
        .map_err(|_| IdentityError::Unnamed { reason: "it cannot be parsed".to_owned() })?;
    let moment = |seconds: i64| Timestamp((seconds.max(0) as u64).saturating_mul(1_000_000_000));
    let validity = parsed.validity();
    Ok(Validity { begins: moment(validity.not_before.timestamp()), expires: moment(validity.not_after.timestamp()) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemark_base::storage::RealStorage;

    #[test]
    fn an_authority_and_an_identity_survive_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        let first = Authority::open_or_create(&*storage).unwrap();
        let again = Authority::open_or_create(&*storage).unwrap();
        assert_eq!(first.fingerprint(), again.fingerprint());
        let peer = PeerIdentity::Agent(HostId::random());
        let identity = again.issue(peer, &[]).unwrap();
        identity.save(&*storage, "agent.pem").unwrap();
        let loaded = Identity::load(&*storage, "agent.pem").unwrap();
        assert_eq!((loaded.peer(), loaded.chain(), &loaded.authority), (peer, identity.chain(), &identity.authority));
        assert_eq!(loaded.key().secret_der(), identity.key().secret_der());
        #[cfg(unix)]
        for name in ["authority.pem", "agent.pem"] {
            use std::os::unix::fs::PermissionsExt;
            let mode = std::fs::metadata(folder.path().join(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
    }

    #[test]
    fn certificates_hold_for_at_least_thirty_days_and_are_renewed_at_a_third() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::open_or_create(&*RealStorage::open_folder(folder.path())).unwrap();
        let identity = authority.issue(PeerIdentity::Agent(HostId::random()), &[]).unwrap();
        let day = 86_400 * 1_000_000_000;
        let now = Timestamp(now().as_nanos() as u64);
        assert!(identity.expires().saturating_since(now) > Duration::from_secs(30 * 86_400));
        assert!(!identity.renewal_due(Timestamp(now.0 + 29 * day)));
        assert!(identity.renewal_due(Timestamp(now.0 + 31 * day)));
    }

    #[test]
    fn a_request_gets_a_certificate_for_its_key_and_a_renewal_reaches_every_clone() {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        let authority = Authority::open_or_create(&*storage).unwrap();
        let peer = PeerIdentity::Agent(HostId::random());
        let request = KeyRequest::new().unwrap();
        let again = KeyRequest::from_key_pem(request.key_pem()).unwrap();
        let certificate = authority.sign(peer, request.request()).unwrap();
        let identity = request.complete(&certificate, authority.certificate()).unwrap();
        assert_eq!((identity.peer(), identity.chain()), (peer, vec![certificate.clone()]));
        identity.save(&*storage, "agent.pem").unwrap();
        assert_eq!(Identity::load(&*storage, "agent.pem").unwrap().chain(), identity.chain());

        // A certificate for another key is no use, and neither is one of somebody else.
        let other = KeyRequest::new().unwrap();
        let foreign = authority.sign(peer, other.request()).unwrap();
        assert!(again.complete(&foreign, authority.certificate()).is_err());
        let clone = identity.clone();
        let stranger = authority.sign(PeerIdentity::Agent(HostId::random()), other.request()).unwrap();
        assert!(identity.renew(other, &stranger).is_err());
        let renewal = KeyRequest::new().unwrap();
        let renewed = authority.sign(peer, renewal.request()).unwrap();
        identity.renew(renewal, &renewed).unwrap();
        assert_eq!(clone.chain(), vec![renewed]);
        assert!(authority.sign(peer, b"nonsense").is_err());
    }

    #[test]
    fn identities_print_as_the_uri_that_is_read_back() {
        for peer in [
            PeerIdentity::Agent(HostId::random()),
            PeerIdentity::ProcessServer(ServerId::random()),
            PeerIdentity::ConfigServer(ServerId::random()),
        ] {
            assert_eq!(peer.to_string().parse::<PeerIdentity>().unwrap(), peer);
        }
        for alien in ["", "https://agent/x", "tidemark://agent", "tidemark://agent/x", "tidemark://root/4c9c6f9a"] {
            assert!(alien.parse::<PeerIdentity>().is_err(), "{alien}");
        }
    }

    #[test]
    fn a_damaged_identity_names_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        replace_file(&*storage, "agent.pem", b"nothing").unwrap();
        let error = Identity::load(&*storage, "agent.pem").unwrap_err();
        assert!(error.to_string().contains("agent.pem"), "{error}");
    }
}
