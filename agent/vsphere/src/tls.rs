//! Which server answers: one whose certificate is pinned, or that an authority vouches for. No other gets a password.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::error::VsphereError;
use crate::settings::Trust;

/// Thumbprint of the last certificate that was refused, and why.
pub type Refused = Arc<OnceLock<(String, String)>>;

pub fn thumbprint_of(certificate: &[u8]) -> String {
    let digest = aws_lc_rs_digest(certificate);
    digest.iter().map(|byte| format!("{byte:02X}")).collect::<Vec<_>>().join(":")
}

fn aws_lc_rs_digest(bytes: &[u8]) -> [u8; 32] {
    let digest = ::aws_lc_rs::digest::digest(&::aws_lc_rs::digest::SHA256, bytes);
    digest.as_ref().try_into().expect("SHA-256 has 32 bytes")
}

#[derive(Debug)]
enum Rule {
    Thumbprint([u8; 32]),
    Authorities(Arc<WebPkiServerVerifier>),
    Nobody,
}

#[derive(Debug)]
struct Verifier {
    rule: Rule,
    algorithms: WebPkiSupportedAlgorithms,
    refused: Refused,
}

/// For one connection: what it refuses is told by `refused`.
pub fn client(trust: &Trust, refused: Refused) -> Result<ClientConfig, VsphereError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let rule = match trust {
        Trust::Thumbprint(thumbprint) => Rule::Thumbprint(*thumbprint),
        Trust::Nobody => Rule::Nobody,
        Trust::Authorities(file) => {
            let wrong = |reason: String| VsphereError::WrongSettings { path: file.clone(), reason };
            let verifier =
                WebPkiServerVerifier::builder_with_provider(Arc::new(roots(file)?), provider.clone()).build();
            Rule::Authorities(verifier.map_err(|error| wrong(error.to_string()))?)
        }
    };
    let verifier = Verifier { rule, algorithms: provider.signature_verification_algorithms, refused };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("the provider speaks TLS 1.2 and 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

fn roots(file: &Path) -> Result<RootCertStore, VsphereError> {
    let wrong = |reason: String| VsphereError::WrongSettings { path: file.to_owned(), reason };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(file).map_err(|error| wrong(error.to_string()))? {
        let certificate = certificate.map_err(|error| wrong(error.to_string()))?;
        roots.add(certificate).map_err(|error| wrong(error.to_string()))?;
    }
    if roots.is_empty() {
        return Err(wrong("it holds no certificate".to_owned()));
    }
    Ok(roots)
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let refuse = |error: Error, reason: String| {
            let _ = self.refused.set((thumbprint_of(leaf), reason));
            Err(error)
        };
        let unknown = || Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure);
        match &self.rule {
            Rule::Thumbprint(expected) if *expected == aws_lc_rs_digest(leaf) => Ok(ServerCertVerified::assertion()),
            Rule::Thumbprint(_) => refuse(unknown(), "another one is pinned".to_owned()),
            Rule::Nobody => refuse(unknown(), "neither `thumbprint` nor `ca-file` is set".to_owned()),
            Rule::Authorities(authorities) => {
                match authorities.verify_server_cert(leaf, intermediates, name, ocsp, now) {
                    Ok(verified) => Ok(verified),
                    Err(error) => refuse(error.clone(), error.to_string()),
                }
            }
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
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
