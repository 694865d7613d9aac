//! The REST client: HTTP/1.1 over TLS with the installation's own authority, one connection a request.
//!
//! *Consistency.* A request was done when its answer says so. *Retries.* None for what changes something; polling a job
//! asks again. *Cancellation.* Dropping a request closes its connection; a job goes on. *Crash.* Nothing is kept.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tidemark_transport::tls::{self, ShownAuthority};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Lists of points of years fit.
const ANSWER_BYTES_MAX: usize = 256 << 20;
/// How long a poll of a job waits for news.
const POLL_SECONDS: u64 = 30;
/// What the server may take to answer anything that is no poll: it waits for agents and process servers.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(150);

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("{message}")]
    Refused { status: u16, message: String, help: String },
    #[error("cannot reach the configuration server at {address}: {reason}")]
    Unreachable { address: String, reason: String },
    #[error("the server at {address} is not the one that was expected: {reason}")]
    Untrusted { address: String, reason: String },
    #[error("the configuration server at {address} gave an answer that makes no sense: {reason}")]
    Nonsense { address: String, reason: String },
    #[error("cannot use {path}: {reason}")]
    File { path: PathBuf, reason: String },
    #[error("{0:?} is no address of a server")]
    Address(String),
    #[error("no server was named")]
    Unnamed,
    #[error("{message}")]
    Folder { message: String, help: &'static str },
}

impl ClientError {
    pub fn help(&self) -> String {
        match self {
            ClientError::Refused { help, .. } => help.clone(),
            ClientError::Unreachable { .. } => {
                "check that it runs (`tidemark up --dir DIR`), and that the address is right".to_owned()
            }
            ClientError::Untrusted { .. } => {
                "compare the fingerprint with what `tidemark config-server init` prints there, and both clocks; nothing was sent"
                    .to_owned()
            }
            ClientError::Nonsense { .. } => "check that the address is that of Tidemark's API".to_owned(),
            ClientError::File { .. } => "name the files that the server's ready line names".to_owned(),
            ClientError::Address(_) => "give it as https://HOST:PORT, which `/api/v1` may follow".to_owned(),
            ClientError::Unnamed => {
                "set TIDEMARK_DIR to the folder of `tidemark up`, or give --server, --token-file and --ca-file"
                    .to_owned()
            }
            ClientError::Folder { help, .. } => (*help).to_owned(),
        }
    }
}

/// Where the server is, and what it asks for.
#[derive(Clone)]
pub struct Client {
    /// HOST:PORT
    address: String,
    host: String,
    token: String,
    tls: Arc<ClientConfig>,
}

impl Client {
    pub fn new(server: &str, token_file: &Path, ca_file: &Path) -> Result<Self, ClientError> {
        let (address, host) = address_of(server)?;
        let unusable = |path: &Path, reason: String| ClientError::File { path: path.to_owned(), reason };
        let token = std::fs::read_to_string(token_file).map_err(|error| unusable(token_file, error.to_string()))?;
        let token = token.trim().to_owned();
        if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(unusable(token_file, "it holds no token".to_owned()));
        }
        let authority = CertificateDer::from_pem_file(ca_file).map_err(|error| unusable(ca_file, error.to_string()))?;
        let tls = tls::api_client(&authority).map_err(|error| unusable(ca_file, error.to_string()))?;
        Ok(Self { address, host, token, tls })
    }

    /// For registering: a server whose authority has this fingerprint, and what it showed.
    pub fn registering(server: &str, fingerprint: &str) -> Result<(Self, ShownAuthority), ClientError> {
        let (address, host) = address_of(server)?;
        let (tls, shown) = tls::registering_client(fingerprint.trim())
            .map_err(|error| ClientError::Untrusted { address: address.clone(), reason: error.to_string() })?;
        Ok((Self { address, host, token: String::new(), tls }, shown))
    }

    /// The name or address that was dialled.
    pub fn host(&self) -> String {
        if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() }
    }

    pub async fn get(&self, path: &str) -> Result<Value, ClientError> {
        self.request(Method::GET, path, None).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Result<Value, ClientError> {
        self.request(Method::POST, path, Some(body)).await
    }

    pub async fn request(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value, ClientError> {
        let answering = self.exchange(method, path, body);
        tokio::time::timeout(ANSWER_TIMEOUT, answering)
            .await
            .unwrap_or_else(|_| Err(self.unreachable(&format!("no answer within {} s", ANSWER_TIMEOUT.as_secs()))))
    }

    /// What is answered, as it is.
    pub async fn download(&self, path: &str) -> Result<Vec<u8>, ClientError> {
        let (status, body) = tokio::time::timeout(ANSWER_TIMEOUT, self.bytes(Method::GET, path, None))
            .await
            .unwrap_or_else(|_| Err(self.unreachable(&format!("no answer within {} s", ANSWER_TIMEOUT.as_secs()))))?;
        if status.is_success() {
            return Ok(body.to_vec());
        }
        let value: Value = serde_json::from_slice(&body).map_err(|error| self.nonsense(&error))?;
        Err(refused(status, &value))
    }

    async fn exchange(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value, ClientError> {
        let (status, body) = self.bytes(method, path, body).await?;
        let value: Value = serde_json::from_slice(&body).map_err(|error| self.nonsense(&error))?;
        if status.is_success() { Ok(value) } else { Err(refused(status, &value)) }
    }

    async fn bytes(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let connecting = async {
            let stream = TcpStream::connect(&self.address).await?;
            stream.set_nodelay(true)?;
            let name = ServerName::try_from(self.host.clone()).map_err(std::io::Error::other)?;
            TlsConnector::from(self.tls.clone()).connect(name, stream).await
        };
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, connecting)
            .await
            .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
            .map_err(|error| match error.get_ref().is_some_and(|inner| inner.is::<tokio_rustls::rustls::Error>()) {
                true if self.token.is_empty() => {
                    ClientError::Untrusted { address: self.address.clone(), reason: error.to_string() }
                }
                _ => self.unreachable(&error),
            })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.unreachable(&error))?;
        tokio::spawn(connection);
        let body = body.map_or_else(Bytes::new, |body| body.to_string().into());
        let mut request =
            Request::builder().method(method).uri(format!("/api/v1{path}")).header(header::HOST, &self.address);
        if !self.token.is_empty() {
            request = request.header(header::AUTHORIZATION, format!("Bearer {}", self.token));
        }
        let request = request
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| self.nonsense(&error))?;
        let answer = sender.send_request(request).await.map_err(|error| self.unreachable(&error))?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX)
            .collect()
            .await
            .map_err(|error| self.unreachable(&error))?
            .to_bytes();
        Ok((status, body))
    }

    fn unreachable(&self, reason: &dyn std::fmt::Display) -> ClientError {
        ClientError::Unreachable { address: self.address.clone(), reason: reason.to_string() }
    }

    fn nonsense(&self, reason: &dyn std::fmt::Display) -> ClientError {
        ClientError::Nonsense { address: self.address.clone(), reason: reason.to_string() }
    }

    /// Waits for a job's end, telling its steps; its result, or why it failed.
    pub async fn finish(&self, job: Value, mut tell: impl FnMut(&str)) -> Result<Value, ClientError> {
        let mut told = 0;
        let watching = self.watch(job, |job| {
            let steps = job["steps"].as_array().map(Vec::as_slice).unwrap_or_default();
            for step in steps.iter().skip(told) {
                tell(step["name"].as_str().unwrap_or_default());
            }
            told = told.max(steps.len());
        });
        watching.await
    }

    /// The same, telling the job whenever it changed.
    pub async fn watch(&self, job: Value, mut tell: impl FnMut(&Value)) -> Result<Value, ClientError> {
        let mut job = job;
        loop {
            tell(&job);
            match job["state"].as_str() {
                Some("succeeded") => return Ok(job["result"].take()),
                Some("failed" | "cancelled") => return Err(refused(StatusCode::OK, &job["failure"])),
                _ => {}
            }
            let (Some(id), Some(version)) = (job["id"].as_str(), job["version"].as_u64()) else {
                return Err(self.nonsense(&"a job has no id"));
            };
            job = self.get(&format!("/jobs/{id}?version={version}&wait_seconds={POLL_SECONDS}")).await?;
        }
    }
}

/// HOST:PORT, and the host alone.
fn address_of(server: &str) -> Result<(String, String), ClientError> {
    let wrong = || ClientError::Address(server.to_owned());
    let address = server
        .strip_prefix("https://")
        .map(|rest| rest.trim_end_matches('/'))
        .map(|rest| rest.strip_suffix("/api/v1").unwrap_or(rest))
        .filter(|rest| !rest.contains('/'))
        .ok_or_else(wrong)?;
    let (host, port) = address.rsplit_once(':').ok_or_else(wrong)?;
    if port.parse::<u16>().is_err() {
        return Err(wrong());
    }
    Ok((address.to_owned(), host.trim_matches(['[', ']']).to_owned()))
}

fn refused(status: StatusCode, value: &Value) -> ClientError {
    let text = |field: &str| value[field].as_str().map(str::to_owned);
    ClientError::Refused {
        status: status.as_u16(),
        message: text("error").unwrap_or_else(|| format!("the server answered {status}")),
        help: text("help").unwrap_or_default(),
    }
}

/// A part of a path: what is no plain character is escaped, so that no name becomes two parts.
pub fn escape(part: &str) -> String {
    let mut escaped = String::with_capacity(part.len());
    for byte in part.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'~' => escaped.push(char::from(byte)),
            // Parts that are only dots would be resolved away.
            b'.' if part.bytes().any(|byte| byte != b'.') => escaped.push('.'),
            _ => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    // An empty part would name the list.
    if escaped.is_empty() { "%20".to_owned() } else { escaped }
}

#[cfg(test)]
mod tests {
    use super::escape;

    #[test]
    fn names_stay_one_part() {
        assert_eq!(escape("web-1.example"), "web-1.example");
        assert_eq!(escape("a/b?c#d"), "a%2Fb%3Fc%23d");
        assert_eq!(escape(".."), "%2E%2E");
        assert_eq!(escape("2026-11-21T10:04:05Z"), "2026-11-21T10%3A04%3A05Z");
        assert_eq!(escape(""), "%20");
    }
}
