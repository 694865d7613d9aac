//! Certificates for NBD over TCP.
//!
//! Each machine whose disks are served has an authority of its own, beside the disks' state: its certificates open that
//! machine's exports and nothing else, and no certificate of a role opens them. Whoever copies the client's folder can read
//! and write the machine's disks; making the authority anew turns away every certificate that it issued before.
//!
//! ```text
//! authority.pem        key and certificate of the authority
//! client/              what a client needs, named as libnbd and QEMU look for it:
//!     ca-cert.pem  client-cert.pem  client-key.pem
//! ```
//!
//! *Consistency.* Files are replaced as a whole; the client's key stays when its certificate is renewed, so that the two
//! always belong together. *Retries.* A renewal that fails is tried at the next connection. *Cancellation.* None.
//! *Crash.* What was not written is made at the next start.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use rcgen::{ExtendedKeyUsagePurpose, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{Error, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tidemark_base::storage::{Storage, read_file, replace_file};
use tidemark_base::{Clock, SystemClock, Timestamp};

use crate::identity::{Authority, IdentityError, LEAF_LIFETIME, expiry};
use crate::tls::{provider, roots, without_resumption};

const CLIENT_FOLDER: &str = "client";
const PEM_BYTES_MAX: u64 = 64 << 10;

/// The authority of one machine's exports.
pub struct ExportAuthority {
    storage: Arc<dyn Storage>,
    client: Arc<dyn Storage>,
    authority: Authority,
}

impl ExportAuthority {
    /// Opens what is in this folder, or makes it; the client's certificate is good for at least a third of its lifetime
    /// when this returns.
    pub fn open_or_create(storage: Arc<dyn Storage>) -> Result<Self, IdentityError> {
        let failed = |source| IdentityError::Storage { path: storage.path("").display().to_string(), source };
        if !storage.exists(CLIENT_FOLDER).map_err(failed)? {
            storage.create_folder(CLIENT_FOLDER).map_err(failed)?;
            storage.sync_folder("").map_err(failed)?;
        }
        let authority = Authority::open_or_create(&*storage)?;
        let this = Self { client: storage.folder(CLIENT_FOLDER), storage, authority };
        this.renew_client()?;
        Ok(this)
    }

    /// The folder with the client's files: `tls-certificates` of an `nbds://` address, `dir` of QEMU's `tls-creds-x509`.
    pub fn client_folder(&self) -> PathBuf {
        self.storage.path(CLIENT_FOLDER)
    }

    /// Mutual TLS 1.3 for a listener that is reached under these names and addresses. Certificates renew themselves.
    pub fn server(self: &Arc<Self>, hosts: Vec<String>) -> Result<Arc<ServerConfig>, ExportTlsError> {
        let verifier = WebPkiClientVerifier::builder_with_provider(roots(self.authority.certificate())?, provider())
            .build()
            .map_err(|error| Error::General(error.to_string()))?;
        let current = Mutex::new(self.issue_server(&hosts)?);
        let config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(Renewing { authority: self.clone(), hosts, current }));
        Ok(without_resumption(config))
    }

    fn issue_server(&self, hosts: &[String]) -> Result<ServerCertificate, ExportTlsError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(IdentityError::from)?;
        let leaf =
            self.authority.issue_export("Tidemark NBD export", hosts, ExtendedKeyUsagePurpose::ServerAuth, &key)?;
        let expires = expiry(leaf.der())?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let certified = CertifiedKey::from_der(vec![leaf.der().clone()], key, &provider())?;
        Ok(ServerCertificate { certified: Arc::new(certified), expires })
    }

    /// Makes the client's files when they are missing or about to expire.
    fn renew_client(&self) -> Result<(), IdentityError> {
        let client = &*self.client;
        let failed = |source| IdentityError::Storage { path: client.path("").display().to_string(), source };
        let read = |name: &str| match client.exists(name).map_err(failed)? {
            true => read_file(client, name, PEM_BYTES_MAX).map(Some).map_err(failed),
            false => Ok(None),
        };
        let write = |name: &str, pem: &str| replace_file(client, name, pem.as_bytes()).map_err(failed);
        let key = match read("client-key.pem")?.and_then(|pem| KeyPair::from_pem(&String::from_utf8_lossy(&pem)).ok()) {
            Some(key) => key,
            None => {
                let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
                write("client-key.pem", &key.serialize_pem())?;
                key
            }
        };
        let certificate = read("client-cert.pem")?.and_then(|pem| CertificateDer::from_pem_slice(&pem).ok());
        let expires = certificate.and_then(|certificate| expiry(&certificate).ok()).unwrap_or(Timestamp(0));
        if is_due(expires) {
            let usage = ExtendedKeyUsagePurpose::ClientAuth;
            write("client-cert.pem", &self.authority.issue_export("Tidemark NBD client", &[], usage, &key)?.pem())?;
        }
        if read("ca-cert.pem")?.as_deref() != Some(self.authority.certificate_pem().as_bytes()) {
            write("ca-cert.pem", self.authority.certificate_pem())?;
        }
        Ok(())
    }
}

fn is_due(expires: Timestamp) -> bool {
    expires.saturating_since(SystemClock::new().wall_now()) < LEAF_LIFETIME / 3
}

#[derive(Debug, thiserror::Error)]
pub enum ExportTlsError {
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("TLS cannot be set up")]
    Tls(#[from] Error),
}

impl ExportTlsError {
    pub fn help(&self) -> &'static str {
        match self {
            ExportTlsError::Identity(error) => error.help(),
            ExportTlsError::Tls(_) => "remove the folder of the machine's certificates; they are made anew",
        }
    }
}

struct ServerCertificate {
    certified: Arc<CertifiedKey>,
    expires: Timestamp,
}

/// Shows the certificate, and has server's and client's made anew when a third of their lifetime is left. A client that comes
/// too late for its own is turned away once and finds a good one in its folder.
struct Renewing {
    authority: Arc<ExportAuthority>,
    hosts: Vec<String>,
    current: Mutex<ServerCertificate>,
}

impl std::fmt::Debug for Renewing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Renewing({:?})", self.hosts)
    }
}

impl ResolvesServerCert for Renewing {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let mut current = self.current.lock().expect("no panic while held");
        let mut renew = || {
            if is_due(current.expires) {
                *current = self.authority.issue_server(&self.hosts)?;
            }
            Ok::<(), ExportTlsError>(self.authority.renew_client()?)
        };
        if let Err(error) = renew() {
            let folder = self.authority.storage.path("").display().to_string();
            tracing::warn!(folder, %error, help = error.help(), "certificates of NBD exports cannot be renewed");
        }
        Some(current.certified.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemark_base::storage::RealStorage;

    #[test]
    fn a_clients_files_stay_until_they_are_due() {
        let folder = tempfile::tempdir().unwrap();
        let read = |name: &str| std::fs::read(folder.path().join("client").join(name)).unwrap();
        let open = || Arc::new(ExportAuthority::open_or_create(RealStorage::open_folder(folder.path())).unwrap());
        let first = open();
        let names = ["ca-cert.pem", "client-cert.pem", "client-key.pem"];
        let before = names.map(read);
        first.server(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        open();
        assert_eq!(names.map(read), before);
        #[cfg(unix)]
        for name in names {
            use std::os::unix::fs::PermissionsExt;
            let mode = std::fs::metadata(first.client_folder().join(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
        // A certificate that is gone, or cannot be read, is issued again, for the same key.
        std::fs::remove_file(folder.path().join("client/client-cert.pem")).unwrap();
        open();
        assert_ne!(read("client-cert.pem"), before[1]);
        assert_eq!([read("ca-cert.pem"), read("client-key.pem")], [before[0].clone(), before[2].clone()]);
        assert!(is_due(Timestamp(0)) && !is_due(Timestamp(u64::MAX)));
    }

    /// QEMU looks at what a certificate may be used for before it connects anywhere.
    #[cfg(unix)]
    #[test]
    fn qemu_takes_the_clients_folder() {
        let folder = tempfile::tempdir().unwrap();
        let authority = ExportAuthority::open_or_create(RealStorage::open_folder(folder.path())).unwrap();
        let credentials = format!("tls-creds-x509,id=tls,dir={},endpoint=client", authority.client_folder().display());
        let arguments = ["info", "--object", &credentials, "--image-opts", "driver=null-co,size=512"];
        match std::process::Command::new("qemu-img").args(arguments).output() {
            Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr)),
            Err(_) => eprintln!("skipped: qemu-img is not installed"),
        }
    }
}
