//! An event as JSON, by POST. `Tidemark-Signature: t=SECONDS,v1=HEX` is an HMAC-SHA256 with the channel's secret over
//! `SECONDS.BODY`: who takes it computes the same and refuses what is minutes old.

use aws_lc_rs::hmac;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, Uri, header};
use hyper_util::rt::TokioIo;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use tidemark_base::Timestamp;
use tidemark_base::error::with_causes;
use tidemark_transport::tls;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::Webhook;
use crate::history::Stored;

/// Answers are not read beyond their status; this much is, so that the other end sees an end.
const ANSWER_BYTES_MAX: usize = 64 << 10;
const URL_BYTES_MAX: usize = 2048;

pub struct Target {
    host: String,
    port: u16,
    path: String,
    is_plain: bool,
}

impl Target {
    pub fn of(url: &str) -> Result<Self, String> {
        let shown: String = url.chars().take(120).collect();
        let wrong = || format!("{shown:?} is no address of a webhook");
        if url.len() > URL_BYTES_MAX {
            return Err(wrong());
        }
        let parsed: Uri = url.parse().map_err(|_| wrong())?;
        let authority = parsed.authority().filter(|authority| !authority.as_str().contains('@')).ok_or_else(wrong)?;
        let is_plain = match parsed.scheme_str() {
            Some("https") => false,
            Some("http") => true,
            _ => return Err(wrong()),
        };
        let host = authority.host().trim_matches(['[', ']']).to_owned();
        if is_plain && !is_here(&host) {
            return Err(format!("{shown:?} is not encrypted, and not on this machine"));
        }
        let port = authority.port_u16().unwrap_or(if is_plain { 80 } else { 443 });
        let path = parsed.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        Ok(Self { host, port, path, is_plain })
    }
}

/// Whether a name means this machine.
pub fn is_here(host: &str) -> bool {
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// The authorities that a server is checked with: those of PEM, or the system's.
pub fn roots(pem: Option<&String>) -> Result<Vec<CertificateDer<'static>>, String> {
    let found = match pem {
        Some(pem) => CertificateDer::pem_slice_iter(pem.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| format!("ca cannot be read: {error}"))?,
        None => system_roots(),
    };
    if found.is_empty() {
        return Err(match pem {
            Some(_) => "ca holds no certificate".to_owned(),
            None => "this system trusts no authorities: install ca-certificates, or give ca".to_owned(),
        });
    }
    Ok(found)
}

/// Where Linux distributions keep those that the system trusts.
const SYSTEM_ROOTS: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem"];

fn system_roots() -> Vec<CertificateDer<'static>> {
    let read = |path: &&str| {
        let found = CertificateDer::pem_file_iter(path).ok()?.filter_map(Result::ok).collect::<Vec<_>>();
        (!found.is_empty()).then_some(found)
    };
    SYSTEM_ROOTS.iter().find_map(read).unwrap_or_default()
}

pub async fn send(hook: &Webhook, event: &Stored, now: Timestamp) -> Result<(), String> {
    let target = Target::of(&hook.url)?;
    let stream = TcpStream::connect((target.host.as_str(), target.port)).await.map_err(|error| with_causes(&error))?;
    if target.is_plain {
        return post(stream, hook, &target, event, now).await;
    }
    let stream = encrypt(stream, &target.host, hook.ca.as_ref()).await?;
    post(stream, hook, &target, event, now).await
}

/// TLS 1.3 with a server whose name and certificate are checked.
pub async fn encrypt(stream: TcpStream, host: &str, ca: Option<&String>) -> Result<TlsStream<TcpStream>, String> {
    let config = tls::public_client(roots(ca)?).map_err(|error| with_causes(&error))?;
    let name = ServerName::try_from(host.to_owned()).map_err(|error| error.to_string())?;
    TlsConnector::from(config).connect(name, stream).await.map_err(|error| with_causes(&error))
}

async fn post<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    hook: &Webhook,
    target: &Target,
    event: &Stored,
    now: Timestamp,
) -> Result<(), String> {
    let body = serde_json::to_vec(event).map_err(|error| error.to_string())?;
    let host = if target.host.contains(':') { format!("[{}]", target.host) } else { target.host.clone() };
    let mut request = Request::builder()
        .method(Method::POST)
        .uri(&target.path)
        .header(header::HOST, format!("{host}:{}", target.port))
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::USER_AGENT, concat!("tidemark/", env!("CARGO_PKG_VERSION")))
        .header("tidemark-event", event.id);
    if let Some(secret) = &hook.secret {
        request = request.header("tidemark-signature", signature(secret, now.0 / 1_000_000_000, &body));
    }
    let request = request.body(Full::new(Bytes::from(body))).map_err(|error| error.to_string())?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| with_causes(&error))?;
    let connection = tokio::spawn(connection);
    let answer = sender.send_request(request).await.map_err(|error| with_causes(&error));
    let outcome = match answer {
        Ok(answer) => {
            let status = answer.status();
            let _ = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
            // Elsewhere is not where an operator sent it.
            if status.is_success() { Ok(()) } else { Err(format!("it answered {status}")) }
        }
        Err(error) => Err(error),
    };
    connection.abort();
    outcome
}

pub fn signature(secret: &str, seconds: u64, body: &[u8]) -> String {
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
    let mut context = hmac::Context::with_key(&key);
    context.update(format!("{seconds}.").as_bytes());
    context.update(body);
    let digest: String = context.sign().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("t={seconds},v1={digest}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_webhooks_are_https_or_of_this_machine() {
        for good in ["https://a.example/x?y=1", "https://[::1]:8443/", "http://127.0.0.1:9/x", "http://localhost"] {
            Target::of(good).unwrap_or_else(|reason| panic!("{good}: {reason}"));
        }
        let target = Target::of("https://a.example/x?y=1").ok().unwrap();
        assert_eq!((target.host.as_str(), target.port, target.path.as_str()), ("a.example", 443, "/x?y=1"));
        for wrong in
            ["", "a.example", "ftp://a.example/", "http://a.example/", "https://user:word@a.example/", "https:///x"]
        {
            assert!(Target::of(wrong).is_err(), "{wrong}");
        }
        assert!(Target::of(&format!("https://a.example/{}", "x".repeat(3000))).is_err());
    }

    /// As computed by `printf '1795324375.{"a":1}' | openssl dgst -sha256 -hmac 0123456789abcdef`.
    #[test]
    fn a_signature_is_what_others_compute() {
        let expected = "t=1795324375,v1=aa94a896bb350bc0a8c18a2ce87eef6f21448cf09c700089decd60735400f666";
        assert_eq!(signature("0123456789abcdef", 1_795_324_375, br#"{"a":1}"#), expected);
    }
}
