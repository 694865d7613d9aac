//! The REST API over one kept connection: for samplers that ask many times a second.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde_json::Value;

use crate::site::text;

/// An answer that takes longer is a failure of the test.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

pub struct Api {
    connection: BufReader<StreamOwned<ClientConnection, TcpStream>>,
    host: String,
    token: String,
}

impl Api {
    /// Connects to the site that printed this ready line.
    pub fn connect(ready: &Value) -> Self {
        let url = text(&ready["api"]);
        let host =
            url.strip_prefix("https://").expect("the API speaks TLS").split('/').next().unwrap_or_default().to_owned();
        let mut roots = RootCertStore::empty();
        for certificate in
            CertificateDer::pem_file_iter(text(&ready["ca_file"])).expect("the authority's file can be read")
        {
            roots.add(certificate.expect("it holds certificates")).expect("and they are sound");
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("TLS 1.3 is there")
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = host.rsplit_once(':').map_or(host.as_str(), |(name, _)| name).to_owned();
        let name = ServerName::try_from(name).expect("the API's address is a name or an IP address");
        let tls = ClientConnection::new(Arc::new(config), name).expect("a TLS client can be made");
        let stream = TcpStream::connect(&host).expect("the API listens");
        stream.set_nodelay(true).expect("a socket option");
        stream.set_read_timeout(Some(ANSWER_LIMIT)).expect("a socket option");
        let token = std::fs::read_to_string(text(&ready["token_file"])).expect("the token's file can be read");
        Self { connection: BufReader::new(StreamOwned::new(tls, stream)), host, token: token.trim().to_owned() }
    }

    #[track_caller]
    pub fn get(&mut self, path: &str) -> Value {
        self.ask("GET", path)
    }

    #[track_caller]
    pub fn post(&mut self, path: &str) -> Value {
        self.ask("POST", path)
    }

    #[track_caller]
    fn ask(&mut self, method: &str, path: &str) -> Value {
        let request = format!(
            "{method} /api/v1/{path} HTTP/1.1\r\nhost: {}\r\nauthorization: Bearer {}\r\ncontent-length: 0\r\n\r\n",
            self.host, self.token
        );
        let stream = self.connection.get_mut();
        stream.write_all(request.as_bytes()).and_then(|()| stream.flush()).expect("the API takes a request");
        let mut line = || {
            let mut line = String::new();
            self.connection.read_line(&mut line).expect("the API answers");
            line.trim_end().to_owned()
        };
        let status = line();
        let mut length = 0;
        loop {
            let header = line().to_ascii_lowercase();
            if header.is_empty() {
                break;
            }
            if let Some(value) = header.strip_prefix("content-length:") {
                length = value.trim().parse().expect("a length is a number");
            }
        }
        let mut body = vec![0; length];
        self.connection.read_exact(&mut body).expect("the API's answer is whole");
        let code = status.split_whitespace().nth(1).unwrap_or_default();
        assert!(code.starts_with('2'), "{method} {path}: {status}: {}", String::from_utf8_lossy(&body));
        if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).expect("the API speaks JSON") }
    }
}
